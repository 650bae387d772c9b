"""Pictures in, batches, pictures out, and the files of a run.

    python data.py get apple2orange                   # CycleGAN's data sets, to datasets/
    python data.py preview FOLDER --deluxe --diffaug  # out/preview.png: what D will see

An image is uint8 [3, H, W] until deluxe(). From there it is float in [-1, 1].
"""
import argparse
import io
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
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from time import monotonic

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps, PngImagePlugin
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms.functional import autocontrast, center_crop, pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

import diffaug

RANK, WORLD = 0, 1  # this process's number, and how many there are
if "TORCHELASTIC_RUN_ID" in os.environ:  # started by torchrun
    RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

# ---- Images in ----
MARK = "made by dcgan.py or cyclegan.py"
READABLE = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
Image.MAX_IMAGE_PIXELS = 2 ** 28  # phones take 200 million

def to_rgb(image):
    """Any Pillow image -> RGB: upright, on white, more than 8 bits scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        grey, top = np.nan_to_num(np.asarray(image, dtype=np.float32)), 65535
        if image.mode == "F" and grey.max() <= 255:  # floats may go up to 1, 255 or 65535
            top = 255 if grey.max() > 1 else 1
        image = Image.fromarray((grey * (255 / top)).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")

def is_ours(file):
    with suppress(Exception), file.open("rb") as opened:  # read() tells what is damaged
        return MARK.encode() in opened.read(1000)

def walk(folder, seen):
    """Yield the files of a folder or .zip, through links, but nothing hidden, and no folder twice."""
    place = os.path.realpath(folder) if isinstance(folder, Path) else str(folder)
    if place in seen:
        return
    seen.add(place)
    for path in sorted(folder.iterdir(), key=str):
        if path.name.startswith((".", "@eaDir", "__MACOSX", "$RECYCLE")):  # .thumbnails, .Trash-1000
            continue
        if path.is_dir():
            with mendable(f"left out {path}", OSError, fatal=False):  # not ours to read, such as lost+found
                yield from walk(path, seen)
        elif path.is_file() or not path.exists():  # a broken link: read() tells
            yield path

def find_images(source, held_out=False):
    """-> [(name, function that returns a Pillow image)], sorted."""
    if source in DRAWN:
        numbers = HELD_OUT if held_out else DRAWN[source]
        return [(f"{number}.png", partial(draw_cat, number, source[4:])) for number in numbers]
    path = Path(source)
    with mendable(f"{source} is no folder, image or whole .zip, nor drawn ({', '.join(DRAWN)})"):
        if path.is_file() and path.suffix.lower() in READABLE:
            files = [path]
        else:
            files = sorted(walk(path if path.is_dir() else zipfile.Path(path), set()), key=str)
    images = [file for file in files if Path(file.name).suffix.lower() in READABLE]
    real = [file for file in images if not is_ours(file)]
    if not real and images == files:  # nothing else is there: it is meant
        real = images
    kinds = " ".join(sorted({Path(file.name).suffix.lower() or "no suffix" for file in files} - READABLE))
    for more, less, what in ((files, images, f"files ({kinds})"), (images, real, f"pictures {MARK}")):
        if more != less:
            say(f"{source}: left out {len(more) - len(less)} {what}", sys.stderr)
    return [(str(file), lambda file=file: Image.open(file.open("rb"))) for file in real]

def read(source, files, convert):
    """Yield (name, convert(image)) of each readable file. Others are named, counted and skipped."""
    def decode(file):
        name, open_image = file
        with mendable(f"skipped {name}", fatal=False), open_image() as image:
            return name, convert(image)

    good = 0
    with ThreadPoolExecutor(8) as pool:
        for i in range(0, len(files), 16):  # so many are decoded ahead
            for result in filter(None, pool.map(decode, files[i:i + 16])):
                good += 1
                yield result
    if good < len(files):
        say(f"{source}: skipped {len(files) - good} of {len(files)} files", sys.stderr)
    if not good:
        raise BadInput(f"no usable image in {source}: looked for .png, .jpg and others")

def load_images(source, size, limit=None):
    """A folder, .zip, image or drawn set -> uint8 [N, 3, size, size], N > 0: middle squares. Or BadInput."""
    def square(image):
        image.draft("RGB", (2 * size, 2 * size))  # decodes a JPEG smaller: much faster
        return ImageOps.fit(to_rgb(image), (size, size))

    files = find_images(source)
    images = torch.empty(limit or len(files), 3, size, size, dtype=torch.uint8)
    for (_, image), good in zip(read(source, files, square), range(len(images))):
        images[good] = pil_to_tensor(image)
    return images[:good + 1]

# ---- Batches ----
@lru_cache(4)
def permutation(n, seed, epoch, device):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).to(device)

def batch(images, count, k, seed, device):
    """Slice k = 0, 1, ... of an endless stream of permutations, by the seed: uint8 [count, 3, L, L]."""
    n, start = len(images), k * count % len(images)
    epochs = range(k * count // n, ((k + 1) * count - 1) // n + 1)
    order = torch.cat([permutation(n, seed, epoch, images.device) for epoch in epochs])
    return images[order[start:start + count]].to(device, non_blocking=True)

# ---- "Deluxe": augmentation of the real images only, float [B, 3, L, L] in [0, 1] ----
def flip(x, size):
    return torch.where(diffaug.uniform(x, 0, 1) < 0.5, x, x.flip(3))

def zoom(x, size):
    """Random resized crop: 80 to 100 % of either side, bilinear."""
    width, height = diffaug.uniform(x, 0.8, 1), diffaug.uniform(x, 0.8, 1)
    left, top = (1 - width) * diffaug.uniform(x, -1, 1), (1 - height) * diffaug.uniform(x, -1, 1)
    theta = torch.cat([width, 0 * width, left, 0 * width, height, top], dim=1).view(-1, 2, 3)
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
        x = DELUXE[op](x, x.shape[-1] if "crop" in ops[i + 1:] else size)  # a later crop needs its room
    return x * 2 - 1

# ---- Pictures out ----
def to_pillow(images, columns=8):
    """Float images [N, 3, H, W] in [-1, 1] -> one RGB image, a grid. Colours are not rescaled."""
    levels = ((images + 1) * 127.5).round().clamp(0, 255).byte()
    return to_pil_image(make_grid(levels, columns))

def save_png(image, path):
    mark = PngImagePlugin.PngInfo()
    mark.add_text("Software", MARK)
    Path(path).parent.mkdir(exist_ok=True)
    image.save(path, "PNG", pnginfo=mark)

def save_gif(images, path, milliseconds):
    frames = [image.quantize(256, Image.FASTOCTREE) for image in images]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, comment=MARK)

def save_sheet(images, folder, iteration, columns=8):
    """A grid, and the iteration below it -> samples/000200.png."""
    sheet = ImageOps.expand(to_pillow(images, columns), (0, 0, 0, 24))
    ImageDraw.Draw(sheet).text((6, sheet.height - 24), f"iteration {iteration}", "white", font_size=18)
    save_png(sheet, folder / "samples" / f"{iteration:06d}.png")

def ticks(low, high):
    step = float(f"{(high - low) / 4:.0e}")  # a round number
    return step * np.arange(math.ceil(low / step), high // step + 1)

def plot(names, rows, path):
    """Rows {"iteration": ..., name: number} -> a PNG: on the left the losses, on the right D's scores."""
    image = Image.new("RGB", (1800, 700), "white")
    draw, colours = ImageDraw.Draw(image), "red blue green purple darkorange teal brown magenta".split()
    draw.font = ImageFont.load_default(22)
    across = rows[0]["iteration"], rows[-1]["iteration"]
    scores = [name for name in names if "(" in name]
    losses = [name for name in names if name not in ("iteration", "images/s", "truth_error", *scores)]
    for left, title, chosen in ((90, "losses", losses), (990, "D's mean scores", scores)):
        values = [row[name] for row in rows for name in chosen if name in row]
        up = min(0, *values), max(1e-3, 1.1 * np.percentile(values, 99))
        def place(iteration, value):
            return np.interp(iteration, across, (left, left + 770)), np.interp(value, up, (610, 90))
        for value in ticks(*up):
            draw.line([place(across[0], value), place(across[1], value)], "lightgrey", 2)
            draw.text((left - 10, place(0, value)[1]), f"{value:.3g}", "black", anchor="rm")
        for iteration in ticks(*across):
            draw.text((place(iteration, 0)[0], 622), f"{iteration:.0f}", "black", anchor="mt")
        draw.text((left + 385, 658), f"{title}, by iteration", "black", anchor="mt")
        for k, name in enumerate(chosen):
            draw.line([place(row["iteration"], row[name]) for row in rows if name in row], colours[k], 4)
            draw.text((left + 10 + k % 4 * 190, 14 + k // 4 * 26), name, colours[k])
    save_png(image.reduce(2), path)

# ---- The files of a run ----
def save_views(rows, folder, last):
    """log.csv, losses.png and, if it is the last time, timelapse.gif."""
    names = list(dict.fromkeys(name for row in rows for name in row))  # a resumed run may have more
    lines = [names] + [[str(row.get(name, "")) for name in names] for row in rows]
    (folder / "log.csv").write_text("".join(",".join(line) + "\n" for line in lines))
    if len(rows) > 1:
        plot(names, rows, folder / "losses.png")
    files = [file for file in folder.glob("samples/*.png") if file.stem.isdecimal()]
    if last and files:
        files.sort(key=lambda file: -int(file.stem))  # the last one first
        frames = [Image.open(file) for file in reversed(files[::len(files) // 100 + 1])]
        frames = [frame.resize(frames[-1].size) for frame in frames]  # of a resumed run they may differ
        save_gif(frames, folder / "timelapse.gif", 150)

def check_finite(weights, recent, iteration):
    finite = [value.isfinite().all() for values in (weights, *recent.values()) for value in values]
    if not torch.stack(finite).all():  # waits for the device, once
        raise BadInput(f"a loss or weight is not finite at iteration {iteration}: try lower --g-lr, --d-lr")

def save_checkpoint(checkpoint, folder):
    """Write beside the old file, flush, rename: there always is a whole one."""
    path, buffer = folder / "ckpt.pt", io.BytesIO()
    torch.save(checkpoint, buffer)  # to memory first, as torch.save hides that a disk is full
    with mendable(f"can't write {path}", OSError), tempfile.TemporaryDirectory(dir=folder) as beside:
        with open(f"{beside}/ckpt.pt", "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)

def load_checkpoint(run, program):
    """-> the dictionary in RUN/ckpt.pt, on the CPU. weights_only: a stranger's checkpoint can't run code."""
    path = Path(run) / "ckpt.pt"
    with mendable(f"no checkpoint {path}, or damaged, or no run of this {program}.py"):
        damaged = zipfile.ZipFile(path).testzip()  # torch.load does not notice a flipped bit
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        needed = {"options", "iteration", "rows", "recent"}
        if damaged or checkpoint["program"] != program or not needed <= checkpoint.keys():
            raise ValueError("not all that a run needs is in it")
    return checkpoint

def restore(parts, checkpoint):
    """Load a checkpoint's networks, optimizers and pools."""
    with mendable("the checkpoint does not fit"):
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
            for weight, state in getattr(part, "state", {}).items():  # of an optimizer
                for moment, value in state.items():
                    if value.dim():  # fused Adam needs the memory layout of the weight
                        state[moment] = torch.empty_like(weight).copy_(value)

def shorten(name):
    return name.encode(errors="replace")[:200].decode(errors="ignore")  # file systems take up to 255 bytes

def unused(start, suffix=""):
    """-> the first of START, START-2, START-3, ..., each with the suffix, that is not there yet."""
    path, k = Path(f"{start}{suffix}"), 2
    while path.exists():
        path, k = Path(f"{start}-{k}{suffix}"), k + 1
    return path

def new_folder(given, otherwise):
    """Make the given folder, which has to be new or empty, or else an unused one."""
    with mendable(f"can't make the folder {given or otherwise}: give another --out", OSError):
        folder = Path(given) if given else unused(otherwise)
        if RANK == 0:  # the first process writes
            folder.mkdir(parents=True, exist_ok=folder.is_dir() and not any(folder.iterdir()))
    return folder

# ---- Messages ----
class BadInput(Exception):
    """Something that the user can mend. Its text says what is wrong and what to do."""
    strerror = property(str)  # for mendable

@contextmanager
def mendable(what, kind=Exception, fatal=True):
    """An error in the block becomes BadInput, or with fatal=False a line on stderr."""
    try:
        yield
    except kind as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}".splitlines()[0][:200]
        if fatal:
            raise BadInput(f"{what}: {reason}") from None
        say(f"{what}: {reason}", sys.stderr)

@contextmanager
def one_line_errors():
    """What the user can mend becomes one line on stderr and exit status 2."""
    try:
        yield
    except KeyboardInterrupt:  # nothing is lost: training catches the signal itself
        sys.exit(130)
    except (BadInput, MemoryError, RuntimeError) as error:
        if not isinstance(error, BadInput):
            if not re.search("(out of|enough|allocate) memory|bad_alloc|MemoryError", repr(error)):
                raise
            error = "out of memory: try a lower --size, --batch, --width or --n"
        say(f"{Path(sys.argv[0]).name}: error: {error}", sys.stderr)
        sys.exit(2)

def say(text, stream=None):
    """Print a line. It ends no run: neither by a closed pipe, nor by a letter that the terminal has not."""
    if RANK and not stream:
        return  # on stdout the first process speaks for all
    stream = stream or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    line = text.replace("\n", " ").encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(line + "\n", end="", file=stream, flush=True)  # at once, as threads print too
    except OSError:  # nobody reads it any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

def status(row, args):
    numbers = "  ".join([f"{name} {value:#.3g}" for name, value in row.items()][1:-1][:5])
    k, speed = row["iteration"], row["images/s"]
    minutes = (args.iters - k) * args.batch * WORLD / speed / 60
    say(f"{k}/{args.iters}  {numbers}  {speed:.0f} images/s  {minutes:.0f} min left")

def end(folder, iteration, args):
    if iteration >= args.iters:
        return say(f"finished at iteration {iteration}: {folder}")
    start = f"torchrun --nproc_per_node={WORLD}" if WORLD > 1 else "python"
    program, run = [shlex.quote(Path(name).as_posix()) for name in (sys.argv[0], folder)]
    device = "" if args.device == "auto" else f" --device={args.device}"  # a checkpoint does not choose it
    again = f"{start} {program} --resume={run}{device}"
    if RANK == 0:
        say(f"stopped at iteration {iteration}; go on with: {again}", sys.stderr)
    sys.exit(130)

def catch_signals():
    """-> a list, to which a signal to end adds its time. A second one ends the program at once."""
    caught = []
    def catch(number, frame):
        caught.append(monotonic())
        if caught[-1] > caught[0] + 0.5:  # two at once are one: notebooks send it twice
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
    for number in {1, 2, 15} & signal.valid_signals():  # a closed terminal, Ctrl-C, kill
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
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
    arg("--deluxe", nargs="?", const="plain", default="", type=partial(listed, ["plain", *DELUXE]),
        help=f"augment real images: some of {','.join(DELUXE)} (alone: crop,flip; if --diffaug shifts: flip)")
    arg("--diffaug", nargs="?", const="translation", default="", type=partial(listed, diffaug.POLICIES),
        help=f"augment all that D sees: some of {','.join(diffaug.POLICIES)} (alone: translation)")

def plain_deluxe(args):
    args.deluxe = args.deluxe.replace("plain", "flip" if "translation" in args.diffaug else "crop,flip")

def add_run(arg):
    arg("--out", type=path, metavar="DIR", help="folder to write (out/NAME)")
    arg("--resume", type=path, metavar="RUN", help="go on with this run, its options and those given here")
    arg("--seed", type=int, default=0, help="another seed is another run (0)")
    arg("--device", default="auto", help="cuda, cuda:1, mps, cpu (auto: the first that is there)")
    arg("--dtype", choices=("auto", "bf16", "fp32"), default="auto",
        help="precision inside the networks: bf16 is faster where hardware computes in it, fp32 safer (auto)")
    arg("--log-every", type=int, default=50, metavar="N", help="a row of the log every N iterations (50)")
    arg("--sample-every", type=int, default=200, metavar="N", help="samples every N iterations (200)")
    arg("--save-every", type=int, default=400, metavar="N", help="a checkpoint every N iterations (400)")

def parse(parser, argv, program, apply):
    """-> the options, and the checkpoint of the run that --resume or --APPLY names, or None."""
    given = " ".join([program, *(sys.argv[1:] if argv is None else argv)])
    parser.set_defaults(name=shorten(re.sub(r"[^\w.,=]+", "_", given)))
    args, checkpoint = parser.parse_args(argv), None
    run = args.resume or getattr(args, apply)
    if run:
        checkpoint = load_checkpoint(run, program)
        places = "out", "resume", "sample", "translate", "input", "device"  # these no stranger may set
        parser.set_defaults(**{k: v for k, v in checkpoint["options"].items() if k not in places})
        args = parser.parse_args(argv)  # again: what is typed wins
    plain_deluxe(args)
    return args, checkpoint

def check(parser, args, checkpoint, apply, fixed):
    trained = checkpoint["options"] if checkpoint else vars(args)
    changed = [name for name in fixed.split() if getattr(args, name) != trained.get(name)]
    if changed:
        parser.error(f"a trained run's {', '.join(changed)} can't change")
    if args.resume and (args.out or getattr(args, apply)):
        parser.error(f"with --resume, leave --out and --{apply} away")
    if min(args.width, args.batch, args.iters, args.log_every, args.sample_every, args.save_every) < 1:
        parser.error("--width, --batch, --iters and --...-every need at least 1")
    if not (0 < args.g_lr < 1 and 0 < args.d_lr < 1 and 0 <= args.ema < 1 and 0 <= args.seed < 2**32):
        parser.error("--g-lr, --d-lr and --ema need to be between 0 and 1, --seed from 0 to 2^32 - 1")

# ---- python data.py get | preview ----
SERVERS = "http://efrosgans.eecs.berkeley.edu/cyclegan", "http://efrosgans.eecs.berkeley.edu/CUT"

def get(name):
    """Download a data set of CycleGAN's authors -> datasets/NAME/{trainA,trainB,testA,testB}."""
    target = Path("datasets") / name
    socket.setdefaulttimeout(30)  # seconds without an answer
    if target.exists():
        raise BadInput(f"{target} is there already")
    for server in SERVERS:
        with mendable(server, fatal=False), tempfile.TemporaryDirectory(dir=".") as unpacked:
            download_and_extract_archive(f"{server}/datasets/{name}.zip", unpacked)
            target.parent.mkdir(exist_ok=True)
            os.replace(Path(unpacked) / name, target)  # only what is whole gets its name
            return say(str(target))
    raise BadInput(f"no {name}: put images into {target}/trainA, trainB, ...")

def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("command", choices=("get", "preview"))
    parser.add_argument("source", type=path, help="get: grumpifycat, ...; preview: a folder or .zip")
    add_images(parser.add_argument)
    args = parser.parse_args(argv)
    if args.command == "get":
        return get(args.source)
    plain_deluxe(args)
    images = load_images(args.source, load_size(args.size, args.deluxe), limit=8)
    sheet = [center_crop(images, args.size) / 127.5 - 1]
    sheet += [diffaug.augment(deluxe(images, args.size, args.deluxe), args.diffaug) for _ in range(11)]
    with mendable("can't write out/preview.png", OSError):
        save_png(to_pillow(torch.stack(sheet, dim=1).flatten(0, 1), columns=12), "out/preview.png")
    say("out/preview.png: in each row an image, then 11 augmented versions")

# ---- Drawn cats ----
DRAWN, HELD_OUT = {"toy-grumpy": range(204), "toy-blue": range(1000, 1075)}, range(2000, 2016)
COLOURS = {"grumpy": "#e2d0b6 #c0b19b #4e382e #faf5ee #e28a8c #70b2e2",
           "blue": "#707c92 #5f697c #5a6478 #8c98ae #705c6c #96c046"}

def draw_cat(number, breed, side=288):
    """Cat `number` as "grumpy" or "blue": RGB, side x side. All else follows from the number: a true pair."""
    U, grumpy = random.Random(number).uniform, breed == "grumpy"
    x0, y0, radius, tilt, shade, light = U(.4, .6), U(.5, .6), U(.28, .39), U(-20, 20), U(.9, 1.1), U(-.3, .3)
    turn, nod, ears, lids, gaze = U(-.2, .2), U(-.1, .1), U(.85, 1.2), U(.8, 1.15), U(-.06, .06)
    fluff, angle = [U(.96, 1.05) for _ in range(40)], np.linspace(0, 2 * np.pi, 40, endpoint=False)
    fur, shadow, dark, pale, nose, iris = COLOURS[breed].split()
    cat, unit = Image.new("RGBA", (side, side), fur + "00"), side / 5.2  # of the head's radius

    def paint(colour, points, soft=0.0):  # a polygon; soft blurs its edge, like short fur
        mask = Image.new("L", (side, side))
        ImageDraw.Draw(mask).polygon([((x + 2.6) * unit, (y + 2.6) * unit) for x, y in points], 255)
        cat.paste(colour, mask=mask.filter(ImageFilter.BoxBlur(soft * unit)))
    def oval(x, y, rx, ry, rough=1.0):
        return zip(x + rx * np.cos(angle) * rough, y + ry * np.sin(angle) * rough)

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
    paint("#603e3c", [*zip(x, y), *zip(x[::-1], y[::-1] + .05)])  # mouth
    cat = cat.rotate(tilt, Image.BICUBIC).resize([round(5.2 * radius * side)] * 2)
    scene.paste(cat, (round(x0 * side - cat.width / 2), round(y0 * side - cat.width / 2)), cat)
    lit = np.asarray(scene) * (shade + light * np.linspace(-1, 1, side)[:, None])
    return Image.fromarray(lit.clip(0, 255).astype(np.uint8))

if __name__ == "__main__":
    with one_line_errors():
        main()
