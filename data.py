"""Pictures in, batches, pictures out, and the files of a run.

    python data.py get apple2orange                   # CycleGAN's data sets, to datasets/
    python data.py preview FOLDER --deluxe --diffaug  # preview.png: what D will see

An image is uint8 [3, H, W] until deluxe(). From there it is float in [-1, 1].
"""
import argparse
import contextlib
import functools
import io
import itertools
import math
import os
import random
import re
import shlex
import signal
import socket
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageDraw, ImageFilter, ImageFont, ImageOps, PngImagePlugin
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms.functional import autocontrast, pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

import diffaug

RANK = int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0  # torchrun sets both


# ---- Images in ----
MARK = "made by dcgan.py or cyclegan.py"  # stands in every picture that they write
READABLE = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}

def to_rgb(image):
    """Any Pillow image -> RGB: upright, on white, more than 8 bits scaled to 8, colours as in sRGB."""
    profile = image.info.get("icc_profile")
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # floats may go up to 1, 255 or 65535
        grey = np.nan_to_num(np.asarray(image, dtype=np.float32))
        top = 65535 if image.mode[0] == "I" or grey.max() > 255 else 255 if grey.max() > 1 else 1
        image = Image.fromarray((grey * (255 / top)).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB")
    if profile:
        with contextlib.suppress(Exception):  # a damaged one, or not for RGB: colours stay as they are
            profile = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            image = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"))
    return image

def walk(folder, seen):
    """Yield the files below a folder, through links, but into no folder twice: a link may lead back."""
    seen.add(folder.resolve())
    for path in folder.iterdir():
        if path.is_file():
            yield path
        elif path.resolve() not in seen:
            yield from walk(path, seen)

def is_ours(open_file):
    with contextlib.suppress(Exception), open_file() as file:  # what is damaged will be told by read()
        return MARK.encode() in file.read(1000)

def find_images(source, held_out=False):
    """What load_images takes -> [(name, function that returns a Pillow image)], sorted."""
    if source in DRAWN:
        numbers = HELD_OUT if held_out else DRAWN[source]
        return [(f"{number}.png", functools.partial(draw_cat, number, source[4:])) for number in numbers]
    path = Path(source)
    with mendable(f"{source} is no folder, image or whole .zip, nor drawn ({', '.join(DRAWN)})", Exception):
        if path.is_dir():
            files = {file.relative_to(path).as_posix(): functools.partial(file.open, "rb")
                     for file in walk(path, set())}
        elif path.suffix.lower() in READABLE:
            files = {path.name: functools.partial(path.resolve(strict=True).open, "rb")}
        else:
            archive = zipfile.ZipFile(path)
            files = {name: functools.partial(archive.open, name) for name in archive.namelist()}
    # Systems put things beside pictures: .thumbnails/1.png, .Trash-1000, @eaDir, __MACOSX/._1.png.
    names = [name for name in sorted(files) if not re.search("(^|/)([.@]|__MACOSX)|/$", name)]
    images = [name for name in names if Path(name).suffix.lower() in READABLE]
    real = [name for name in images if not is_ours(files[name])] or images  # if all are ours, they are meant
    kinds = {Path(name).suffix.lower() for name in names} - READABLE
    for count, what in ((len(names) - len(images), f"files ({' '.join(sorted(kinds))})"),
                        (len(images) - len(real), f"pictures {MARK}")):
        if count:
            say(f"{source}: left out {count} {what}", file=sys.stderr)
    return [(name, lambda name=name: Image.open(files[name]())) for name in real]

def read(source, files, convert):
    """Yield (name, convert(image)) of each readable file. Others are named, counted and skipped."""
    def decode(file):
        try:
            with file[1]() as image:
                return file[0], convert(image)
        except Exception as error:  # damaged files raise anything
            say(f"skipped {file[0]}:", *str(error).split(), file=sys.stderr)

    good = 0
    with ThreadPoolExecutor(8) as pool:
        for i in range(0, len(files), 16):  # so many are decoded ahead, and no more
            for result in filter(None, pool.map(decode, files[i:i + 16])):
                good += 1
                yield result
    if good < len(files):
        say(f"skipped {len(files) - good} of {len(files)} files in {source}", file=sys.stderr)
    if not good:
        raise BadInput(f"no usable image in {source}: looked for .png, .jpg and others")

def load_images(source, size, limit=None):
    """A folder, a .zip, an image or a drawn set -> uint8 [N, 3, size, size], N > 0, or BadInput.
    The shorter side is resized, antialiased, and the centre cut out."""
    def square(image):
        image.draft("RGB", (2 * size, 2 * size))  # decodes a JPEG smaller: much faster
        return ImageOps.fit(to_rgb(image), (size, size))

    files, count = find_images(source)[:limit], 0
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    for _, image in read(source, files, square):
        images[count] = pil_to_tensor(image)
        count += 1
    return images[:count]


# ---- Batches ----
@functools.lru_cache(maxsize=8)
def permutation(n, seed, epoch, device):
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return order.to(device, non_blocking=device.type == "cuda")

def batch(images, size, k, seed, device):
    """Slice k = 0, 1, ... of an endless stream of permutations, by the seed: uint8 [size, 3, L, L]."""
    n = len(images)
    epochs = range(k * size // n, ((k + 1) * size - 1) // n + 1)
    order = torch.cat([permutation(n, seed, epoch, images.device) for epoch in epochs])
    start = k * size % n
    return images[order[start:start + size]].to(device, non_blocking=True)


# ---- "Deluxe": augmentation of the real images only, float [B, 3, L, L] in [0, 1] ----
def flip(x, size):
    return torch.where(diffaug.uniform(x, 0, 1) < 0.5, x, x.flip(3))

def zoom(x, size):
    """Random resized crop: 80 to 100 % of either side, bilinear."""
    width, height = [diffaug.uniform(x, 0.8, 1).flatten() for _ in range(2)]
    left, top = [(1 - side) * diffaug.uniform(x, -1, 1).flatten() for side in (width, height)]
    theta = torch.stack([width, 0 * width, left, 0 * height, height, top], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, (len(x), 3, size, size), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)

def jitter(x, size):
    """Brightness, contrast and saturation, each times U(0.7, 1.3)."""
    x = (x * diffaug.uniform(x, 0.7, 1.3)).clamp(0, 1)
    x = torch.lerp(x.mean(dim=(1, 2, 3), keepdim=True), x, diffaug.uniform(x, 0.7, 1.3)).clamp(0, 1)
    return torch.lerp(x.mean(dim=1, keepdim=True), x, diffaug.uniform(x, 0.7, 1.3)).clamp(0, 1)

def stretch(x, size):
    return torch.where(diffaug.uniform(x, 0, 1) < 0.5, x, autocontrast(x))  # of half of the images

DELUXE = {"crop": diffaug.window, "flip": flip, "zoom": zoom, "jitter": jitter, "autocontrast": stretch}

def load_size(size, ops):
    return int(1.1 * size) if "crop" in ops or "zoom" in ops else size  # larger, to be cut

def deluxe(images, size, ops):
    """uint8 [B, 3, L, L] -> float [B, 3, size, size] in [-1, 1], as tanh. ops: such as "crop,flip"."""
    x, ops = images.float() / 255, ops.split(",") if ops else []
    for i, op in enumerate(ops):
        later_crop = "crop" in ops[i + 1:]  # which needs its room
        x = DELUXE[op](x, x.shape[-1] if later_crop else size)
    return x * 2 - 1


# ---- Pictures out ----
def to_pillow(images, columns=8):
    """Float images [N, 3, H, W] in [-1, 1] -> one RGB image, a grid. Colours are not rescaled."""
    levels = ((images.float() + 1) * 127.5).round().clamp(0, 255).byte()
    return to_pil_image(make_grid(levels, columns))

def save_png(image, path):
    mark = PngImagePlugin.PngInfo()
    mark.add_text("Software", MARK)
    Path(path).parent.mkdir(exist_ok=True)
    image.save(path, "PNG", pnginfo=mark)

def save_gif(images, path, milliseconds):
    frames = [image.convert("RGB").quantize(256, Image.Quantize.FASTOCTREE) for image in images]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, comment=MARK)

def save_sheet(images, folder, iteration, columns=8):
    """A grid, and the iteration below it -> samples/000200.png."""
    with only_for_show():
        sheet = ImageOps.expand(to_pillow(images, columns), (0, 0, 0, 24))
        label = f"iteration {iteration}"
        ImageDraw.Draw(sheet).text((6, sheet.height - 24), label, "white", ImageFont.load_default(18))
        save_png(sheet, folder / "samples" / f"{iteration:06d}.png")

def ticks(low, high):
    step = float(f"{(high - low) / 4:.0e}")  # a round number
    return [k * step for k in range(math.ceil(low / step), int(high / step) + 1)]

def plot(names, rows, path):
    """Rows {"iteration": ..., name: number} -> a PNG: on the left the losses, on the right D's scores."""
    image, font = Image.new("RGB", (1800, 700), "white"), ImageFont.load_default(22)
    draw, colours = ImageDraw.Draw(image), "red blue green purple darkorange teal brown magenta".split()
    across = rows[0]["iteration"], rows[-1]["iteration"]
    scores = [name for name in names if "(" in name]
    losses = [name for name in names if name not in scores]
    for left, title, chosen in ((90, "losses", losses), (990, "D's mean scores", scores)):
        values = [row[name] for row in rows for name in chosen if name in row]
        up = min(0, *values), max(1e-3, 1.1 * np.percentile(values, 99))

        def place(iteration, value):
            return np.interp(iteration, across, (left, left + 770)), np.interp(value, up, (610, 90))
        for value in ticks(*up):
            draw.line([place(across[0], value), place(across[1], value)], "lightgrey", 2)
            draw.text((left - 10, place(0, value)[1]), f"{value:.3g}", "black", font, "rm")
        for iteration in ticks(*across):
            draw.text((place(iteration, 0)[0], 622), f"{iteration:.0f}", "black", font, "mt")
        draw.text((left + 385, 658), f"{title}, by iteration", "black", font, "mt")
        for k, name in enumerate(chosen):
            draw.line([place(row["iteration"], row[name]) for row in rows if name in row], colours[k], 4)
            draw.text((left + 10 + k % 4 * 190, 14 + k // 4 * 26), name, colours[k], font)
    save_png(image.resize((900, 350), Image.Resampling.LANCZOS), path)


# ---- The files of a run ----
@contextlib.contextmanager
def only_for_show():
    """Around what a run can do without: if it can't be written, that is told, and the run goes on."""
    try:
        yield
    except Exception as error:
        say(f"not written: {type(error).__name__}: {error}", file=sys.stderr)

def save_views(rows, folder, last):
    """log.csv, losses.png and, at the end, timelapse.gif."""
    with only_for_show():
        names = list(dict.fromkeys(name for row in rows for name in row))  # a resumed run may have more
        lines = [names] + [[str(row.get(name, "")) for name in names] for row in rows]
        (folder / "log.csv").write_text("".join(",".join(line) + "\n" for line in lines))
        if len(rows) > 1:
            curves = [name for name in names if name not in ("iteration", "images/s", "truth_error")]
            plot(curves, rows, folder / "losses.png")
        files = sorted(folder.glob("samples/[0-9]*.png"), key=lambda file: int(file.stem))
        if last and files:
            frames = [Image.open(file) for file in files[::len(files) // 100 + 1]]
            frames = [frame.resize(frames[-1].size) for frame in frames]  # of a resumed run they may differ
            save_gif(frames, folder / "timelapse.gif", 150)

def check_finite(tensors, iteration):
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise BadInput(f"a loss or weight is not finite at iteration {iteration}: try lower --g-lr, --d-lr")

def save_checkpoint(checkpoint, folder):
    """Write beside the old file, flush, rename: there always is a whole one."""
    path, buffer = folder / "ckpt.pt", io.BytesIO()
    temporary = folder / f"ckpt.pt.{os.getpid()}.tmp"  # of this process alone
    torch.save(checkpoint, buffer)  # to memory first: it hides that a disk is full
    with mendable(f"can't write {path}"):
        try:
            with open(temporary, "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

def load_checkpoint(run, program):
    """-> the dictionary in RUN/ckpt.pt, on the CPU. weights_only: a stranger's checkpoint can't run code."""
    path = Path(run) / "ckpt.pt"
    with mendable(f"no checkpoint {path} (give the folder of a run, such as out/{program})"):
        file = io.BytesIO(path.read_bytes())
    with mendable(f"{path} is damaged, or no run of this {program}.py", Exception):
        if zipfile.ZipFile(file).testzip():
            raise ValueError("a flipped bit")  # torch.load does not notice
        file.seek(0)
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        if checkpoint["program"] != program or not isinstance(checkpoint["options"], dict):
            raise ValueError("of another program")
    return checkpoint

@torch.no_grad()
def restore(parts, checkpoint):
    """Load a checkpoint's networks, optimizers and pools."""
    with mendable("the checkpoint does not fit", Exception):
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    # Fused Adam takes numbers in the order in which they lie in memory. After a run on another kind of
    # device those of the moments can lie in another order than the weight's.
    for part in parts.values():
        for weight, state in getattr(part, "state", {}).items():
            moments = {name: value for name, value in state.items() if value.shape == weight.shape}
            state |= {name: torch.empty_like(weight).copy_(value) for name, value in moments.items()}

def shorten(name):
    return os.fsencode(name)[:200].decode(errors="replace")  # file systems take up to 255 bytes

def new_folder(given, otherwise):
    """Make the given folder, which has to be empty or new, or else OTHERWISE, OTHERWISE-2, ..."""
    folder = Path(given or otherwise)
    if RANK:
        return folder  # the first process writes
    with mendable(f"can't write {folder}"):
        if given:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise BadInput(f"{given} is in use: give another --out, or --resume it")
            return folder
        for k in itertools.count(2):
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:  # another run may be faster
                folder = Path(f"{otherwise}-{k}")


# ---- Messages ----
class BadInput(Exception):
    """Something that the user can mend. Its text says what is wrong and what to do."""

@contextlib.contextmanager
def mendable(what, kind=OSError):
    """Around work with something that the user named: an error there becomes BadInput."""
    try:
        yield
    except (BadInput, MemoryError):
        raise
    except kind as error:
        raise BadInput(f"{what}: {getattr(error, 'strerror', None) or error or type(error)}") from None

@contextlib.contextmanager
def one_line_errors():
    """What the user can mend becomes one line on stderr and exit status 2."""
    if RANK:  # the first process speaks for all
        sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        yield
    except KeyboardInterrupt:  # nothing is lost: training catches the signal itself
        sys.exit(130)
    except (BadInput, MemoryError, RuntimeError) as error:
        message = str(error) or "out of memory"
        if not isinstance(error, BadInput):
            sys.stderr = sys.__stderr__ if RANK else sys.stderr  # perhaps only this process is in trouble
            if not re.search("(of|enough|allocate) mem", message):
                raise
        say(f"{Path(sys.argv[0]).name}: error:", *message.split(), file=sys.stderr)
        sys.exit(2)

def say(*words, sep=" ", file=None):
    """print() that ends no run: neither by a closed pipe, nor by a letter that the terminal has not."""
    file = file or sys.stdout
    encoding = getattr(file, "encoding", None) or "utf-8"
    text = sep.join(map(str, words)).encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(text, file=file, flush=True)
    except OSError:  # nobody reads it any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())

def status(row, iters, minutes):
    """One line, of the first numbers of a row of the log."""
    shown = [f"{name} {value:#.3g}" for name, value in row.items()][1:6]
    shown += [f"{row['images/s']:.0f} images/s", f"{minutes:.0f} min left"]
    say(f"{row['iteration']}/{iters}", *shown, sep="  ")

def end(program, folder, iteration, iters, signals):
    """The last words of a training, and its exit status if it was told to stop."""
    if iteration == iters:
        return say(f"finished at iteration {iteration}: {folder}")
    again = f"python {program}.py --resume {shlex.quote(str(folder))}"
    say(f"stopped at iteration {iteration}; go on with: {again}", file=sys.stderr)
    sys.exit(128 + signals[0] if signals else 143)

def catch_signals():
    """-> a list, to which Ctrl-C or SIGTERM will add its number. The second one ends the program at once."""
    caught = []

    def catch(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, catch)
    return caught


# ---- Command line ----
def path(text):
    if not text:
        raise argparse.ArgumentTypeError("an empty path: is a variable of the shell not set?")
    return os.path.expanduser(text)

def listed(known, text):
    """Check a list such as "crop,flip"; "none" is the empty one."""
    text = "" if text == "none" else text
    for name in text.split(",") if text else ():
        if name not in known:
            raise argparse.ArgumentTypeError(f"no {name!r} among {', '.join(known)} (a folder goes first)")
    return text

def new_parser(doc):  # without usage, which would make errors longer than a line
    return argparse.ArgumentParser(description=doc, usage=argparse.SUPPRESS, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)

def add_images(arg):
    arg("--size", type=int, choices=(32, 64, 128, 256), default=64, help="pixels of a side (64)")
    arg("--deluxe", nargs="?", const="plain", default="", metavar="OPS",
        type=functools.partial(listed, ["plain", *DELUXE]),
        help=f"augment the real images: some of {','.join(DELUXE)} (plain: crop,flip; flip where --diffaug "
             "translates, which does a crop's work)")
    arg("--diffaug", nargs="?", const=diffaug.PLAIN, default="", metavar="OPS",
        type=functools.partial(listed, diffaug.POLICIES),
        help=f"augment all that D sees: some of {','.join(diffaug.POLICIES)} (plain: {diffaug.PLAIN})")

def plain_deluxe(args):
    args.deluxe = args.deluxe.replace("plain", "flip" if "translation" in args.diffaug else "crop,flip")

PLACES = ("out", "resume", "sample", "translate", "input", "device")  # never taken from a checkpoint

def add_run(arg):
    arg("--out", type=path, metavar="DIR", help="folder to write (out/NAME)")
    arg("--resume", type=path, metavar="RUN", help="go on with this run, its options and those given here")
    arg("--seed", type=int, default=0, help="another seed is another run (0)")
    arg("--device", default="auto", help="cuda, cuda:1, mps, cpu (auto: the first of them that is there)")
    arg("--dtype", choices=("auto", "bf16", "fp32"), default="auto",
        help="precision inside the networks (auto: bf16 if the hardware computes in it)")
    for what, every, thing in (("log", 50, "row"), ("sample", 200, "sheet"), ("save", 400, "checkpoint")):
        arg(f"--{what}-every", type=int, default=every, metavar="N",
            help=f"iterations from one {thing} to the next ({every})")

def parse(parser, argv, program, apply):
    """-> the options, and the checkpoint of the run that --resume or --APPLY names, or None."""
    args = parser.parse_args(argv)
    run = args.resume or getattr(args, apply)
    checkpoint = load_checkpoint(run, program) if run else None
    if checkpoint:
        options = checkpoint["options"].items()
        parser.set_defaults(**{name: value for name, value in options if name not in PLACES})
        args = parser.parse_args(argv)
    else:
        given = " ".join([program, *(sys.argv[1:] if argv is None else argv)])
        args.name = shorten(re.sub(r"[^\w.,=]+", "_", given))
    plain_deluxe(args)
    return args, checkpoint

def check(parser, args, checkpoint, fixed, apply):
    """End with one line where options can't be."""
    trained = checkpoint["options"] if checkpoint else vars(args)
    changed = [name for name in fixed if getattr(args, name) != trained.get(name)]
    if changed:
        parser.error(f"the networks are trained: their {', '.join(changed)} can't change")
    if args.resume and (args.out or getattr(args, apply)):
        parser.error(f"--resume goes on in the run's own folder: leave --out and --{apply} away")
    if min(args.width, args.batch, args.iters, args.log_every, args.sample_every, args.save_every) < 1:
        parser.error("--width, --batch, --iters and --...-every need at least 1")
    if not (0 < args.g_lr < 1 and 0 < args.d_lr < 1 and 0 <= args.ema < 1 and 0 <= args.seed < 2**32):
        parser.error("--g-lr, --d-lr and --ema must be between 0 and 1, --seed between 0 and 2^32 - 1")


# ---- python data.py get | preview ----
SERVERS = "http://efrosgans.eecs.berkeley.edu/cyclegan", "http://efrosgans.eecs.berkeley.edu/CUT"

def get(name):
    """Download a data set of CycleGAN's authors -> datasets/NAME/{trainA,trainB,testA,testB}."""
    target, problems = Path("datasets") / name, []
    if target.exists():
        raise BadInput(f"{target} is there already")
    socket.setdefaulttimeout(30)  # seconds without an answer
    for server in SERVERS:
        try:
            target.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as unpacked:
                download_and_extract_archive(f"{server}/datasets/{name}.zip", unpacked)
                os.replace(Path(unpacked) / name, target)  # only what is whole gets its name
                return say(target)
        except Exception as error:  # addresses and zips break in many ways
            problems.append(f"{server}: {error}")
    raise BadInput(f"no {name} ({'; '.join(problems)}). Put images into {target}/trainA, trainB, ...")

def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("command", choices=("get", "preview"))
    parser.add_argument("source", type=path, help="get: grumpifycat, ...; preview: a folder or .zip")
    add_images(parser.add_argument)
    args = parser.parse_args(argv)
    if args.command == "get":
        return get(args.source)
    plain_deluxe(args)
    sheet = [load_images(args.source, args.size, limit=8) / 127.5 - 1]
    images = load_images(args.source, load_size(args.size, args.deluxe), limit=8)
    for _ in range(11):
        sheet.append(diffaug.augment(deluxe(images, args.size, args.deluxe), args.diffaug))
    with mendable("can't write preview.png"):
        save_png(to_pillow(torch.stack(sheet, dim=1).flatten(0, 1), columns=12), "preview.png")
    say("preview.png: in each row an image, then 11 augmented versions")


# ---- Drawn cats ----
DRAWN, HELD_OUT = {"toy-grumpy": range(204), "toy-blue": range(1000, 1075)}, range(2000, 2016)
COLOURS = {"grumpy": "#e2d0b6 #c0b19b #4e382e #faf5ee #e28a8c #70b2e2",
           "blue": "#707c92 #5f697c #5a6478 #8c98ae #705c6c #96c046"}

def draw_cat(number, breed, side=288):
    """Cat `number` as "grumpy" or "blue": RGB, side x side. All else follows from the number: a true pair.
    Drawn in units of its head (centre 0, radius 1), then turned and scaled."""
    U, grumpy = random.Random(number).uniform, breed == "grumpy"
    x0, y0, radius, tilt, shade, light = U(.4, .6), U(.5, .6), U(.28, .39), U(-20, 20), U(.9, 1.1), U(-.3, .3)
    turn, nod, ears, lids, gaze = U(-.2, .2), U(-.1, .1), U(.85, 1.2), U(.8, 1.15), U(-.06, .06)
    fluff, angle = [U(.96, 1.05) for _ in range(40)], np.linspace(0, 2 * np.pi, 40, endpoint=False)
    fur, shadow, dark, pale, nose, iris = COLOURS[breed].split()
    cat, unit = Image.new("RGBA", (side, side), fur + "00"), side / 5.2  # 2.6 heads each way, to be turned

    def paint(colour, points, soft=0.0):  # a polygon; soft blurs its edge, like short fur
        mask = Image.new("L", (side, side))
        ImageDraw.Draw(mask).polygon([((x + 2.6) * unit, (y + 2.6) * unit) for x, y in points], 255)
        cat.paste(colour, mask=mask.filter(ImageFilter.BoxBlur(soft * unit)))
    def oval(x, y, rx, ry, rough=1.0):
        return list(zip(x + rx * np.cos(angle) * rough, y + ry * np.sin(angle) * rough))

    sky, floor = [f"hsl({U(0, 360):.0f}, {U(10, 45):.0f}%, {U(60, 85):.0f}%)" for _ in range(2)]
    scene = ImageOps.colorize(Image.linear_gradient("L").resize((side, side)), sky, floor)
    paint(shadow, oval(.1 * turn, 1.9, 1.15, 1.25, fluff), .08)  # body
    for s in (-1, 1):
        paint(dark, [(s * .95, -.2), (s * .86 + turn / 3, -1.12 * ears), (s * .15, -.75)], .03)  # ear
        paint("#ce9691", [(s * .8, -.4), (s * .79 + turn / 3, -.95 * ears), (s * .36, -.72)], .08)
        paint(fur, oval(s * .55, .3, .55, .45, fluff), .04)  # cheek
    paint(fur, oval(0, 0, 1, .86, fluff), .04)  # head
    for s in (-1, 1) if grumpy else ():  # the dark mask and the white blaze
        paint(dark, oval(turn + s * .44, nod - .14, .44, .44, fluff), .13)
        paint(pale, [(turn, nod - .62), (turn + .42, .62), (turn, .83), (turn - .42, .62)], .09)
    face, t = 1.1 * turn, np.linspace(-1, 1, 9)
    for s in (-1, 1):
        x, y = face + s * .41, nod - .1
        paint(pale, oval(face + s * .19, nod + .42, .25, .2), .08)
        paint("#1e1616", oval(x, y, .225, .2 * lids), .02)
        paint(iris, oval(x, y, .19, .17 * lids))
        paint("#121216", oval(x + gaze, y, .075, .14 * lids))
        paint("white", oval(x + gaze - .06, y - .07, .04, .04))
        if grumpy:  # the heavy lid, lower at the nose, makes the mood
            paint(dark, [(x - s * .26, y + .02), (x + s * .26, y - .09), (x + s * .2, y - .3), (x, y - .3)])
        x = face + s * .3
        for y in (.36, .41, .46):  # whiskers
            paint("white", [(x, nod + y), (x + s * .9, nod + 3 * y - .9), (x, nod + y + .03)])
    paint(nose, [(face - .12, nod + .27), (face + .12, nod + .27), (face, nod + .4)], .03)
    x, y = face + .34 * t, nod + .5 + (.14 * t * t if grumpy else .1 * abs(np.sin(np.pi * t)))
    paint("#603e3c", [*zip(x, y), *reversed([*zip(x, y + .05)])])  # mouth
    cat = cat.rotate(tilt, Image.Resampling.BICUBIC).resize([round(5.2 * radius * side)] * 2)
    scene.paste(cat, (round(x0 * side - cat.width / 2), round(y0 * side - cat.width / 2)), cat)
    lit = np.asarray(scene) * (shade + light * np.linspace(-1, 1, side)[:, None])
    return Image.fromarray(lit.clip(0, 255).astype(np.uint8))


if __name__ == "__main__":
    with one_line_errors():
        main()
