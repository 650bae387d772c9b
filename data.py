"""Pictures in, batches, pictures out, and the files of a run.

    python data.py get apple2orange                   # CycleGAN's data sets, to datasets/
    python data.py preview FOLDER --deluxe --diffaug  # preview.png: what D will see

An image is uint8 [3, H, W] until deluxe(). From there it is float in [-1, 1].
"""
import argparse
import contextlib
import functools
import io
import os
import random
import re
import socket
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms.functional import autocontrast, pil_to_tensor
from torchvision.utils import save_image

import diffaug

RANK = int(os.environ.get("RANK", 0))


class BadInput(Exception):
    """Something that the user can mend. Its text says what is wrong and what to do."""


@contextlib.contextmanager
def one_line_errors():
    """What the user can mend becomes one line on stderr and exit status 2."""
    if RANK:  # the first process speaks
        sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        yield
    except KeyboardInterrupt:  # nothing to save yet
        sys.exit(130)
    except (BadInput, OSError, MemoryError, RuntimeError) as error:
        if RANK and not isinstance(error, BadInput):
            sys.stderr = sys.__stderr__  # only it knows
        message = str(error) or "out of memory"
        if isinstance(error, RuntimeError) and not re.search("(of|enough|allocate) mem|state_dict", message):
            raise
        print(f"{Path(sys.argv[0]).name}: error:", *message.split(), file=sys.stderr)
        sys.exit(2)


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


# ---- Images in ----
def to_rgb(image):
    """Any Pillow image -> RGB: upright, on white, more than 8 bits scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # floats may go up to 1, 255 or 65535
        grey = np.nan_to_num(np.asarray(image, dtype=np.float32))
        top = 65535 if image.mode[0] == "I" or grey.max() > 255 else 255 if grey.max() > 1 else 1
        image = Image.fromarray((grey * (255 / top)).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def find_images(source, held_out=False):
    """What load_images takes -> [(name, function that returns a Pillow image)], sorted."""
    def wanted(path):
        return Path(path).suffix.lower() in Image.registered_extensions() and Path(path).name[0] != "."
    if source in DRAWN:
        numbers = HELD_OUT if held_out else DRAWN[source]
        return [(f"{number}.png", functools.partial(draw_cat, number, source[4:])) for number in numbers]
    path = Path(source)
    if path.is_dir() or path.is_file() and wanted(path):
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        runs = {file.parent for file in files if file.name == "ckpt.pt"} - {path}  # made, not real
        files = [file for file in files if wanted(file) and runs.isdisjoint(file.parents)]
        return [(str(file), functools.partial(Image.open, file)) for file in files]
    with contextlib.suppress(zipfile.BadZipFile, OSError, ValueError):
        archive = zipfile.ZipFile(path)
        names = filter(wanted, sorted(archive.namelist()))
        return [(name, lambda name=name: Image.open(archive.open(name))) for name in names]
    raise BadInput(f"{source} is not there, or no folder, image or whole .zip; drawn: {', '.join(DRAWN)}")


def read(source, files, convert):
    """Yield (name, convert(image)) of each readable file. Others are named, counted and skipped."""
    def decode(file):
        try:
            with file[1]() as image:
                return file[0], convert(image)
        except Exception as error:  # damaged files raise anything
            sys.stderr.write(" ".join(f"skipped {file[0]}: {error}".split()) + "\n")  # whole
    good = 0
    with ThreadPoolExecutor(8) as pool:  # more would take memory
        for good, result in enumerate(filter(None, pool.map(decode, files)), 1):
            yield result
    if good < len(files):
        print(f"skipped {len(files) - good} of {len(files)} files in {source}", file=sys.stderr)
    if not good:
        raise BadInput(f"no usable image in {source}: looked for .png, .jpg and others")


def load_images(source, size, limit=None):
    """A folder, a .zip, an image or a drawn set -> uint8 [N, 3, size, size], N > 0, or BadInput.
    The shorter side is resized, antialiased, and the centre cut out."""
    def square(image):
        image.draft("RGB", (2 * size, 2 * size))  # decodes a JPEG smaller: much faster
        return ImageOps.fit(to_rgb(image), (size, size))
    files = find_images(source)[:limit]
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    for i, (_, image) in enumerate(read(source, files, square)):
        images[i] = pil_to_tensor(image)
    torch.empty(33_000_000, dtype=torch.uint8)  # freed at once. glibc then keeps freed memory: faster
    return images[:i + 1]


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
    return images[order[k * size % n:][:size]].to(device, non_blocking=True)


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


def plain(args):  # translation does a crop's work; flips for CycleGAN only, which has args.cycle
    instead = "flip" if hasattr(args, "cycle") else ""
    ops = args.deluxe.replace("plain", instead if "translation" in args.diffaug else "crop,flip").split(",")
    return ",".join(filter(None, ops))


def load_size(size, ops):  # larger, to be cut
    return int(1.1 * size) if "crop" in ops or "zoom" in ops else size


def deluxe(images, size, ops):
    """uint8 [B, 3, L, L] -> float [B, 3, size, size] in [-1, 1], as tanh. ops: such as "crop,flip"."""
    x, ops = images.float() / 255, ops.split(",") if ops else []
    for i, op in enumerate(ops):
        x = DELUXE[op](x, x.shape[-1] if "crop" in ops[i + 1:] else size)  # room for a later crop
    return x * 2 - 1


def add_images(arg):
    def names(known):
        def parse(text):
            if text in ("", "none"):
                return ""
            for op in set(text.split(",")) - {*known}:
                raise argparse.ArgumentTypeError(f"no {op!r} among {', '.join(known)} (a folder goes first)")
            return text
        return parse
    arg("--size", type=int, choices=(32, 64, 128, 256), default=64, help="pixels of a side (64)")
    arg("--deluxe", nargs="?", const="plain", default="", metavar="OPS", type=names(["plain", *DELUXE]),
        help=f"augment the real images: some of {','.join(DELUXE)} (plain: crop,flip; if --diffaug "
             "translates: flip in cyclegan.py, else none)")
    arg("--diffaug", nargs="?", const=diffaug.PLAIN, default="", metavar="OPS", type=names(diffaug.POLICIES),
        help=f"augment all that D sees: some of {','.join(diffaug.POLICIES)} (plain: {diffaug.PLAIN})")


# ---- Pictures out ----
def save_grid(images, path, columns=8):
    """Float images [N, 3, H, W] in [-1, 1] -> a PNG, colours unscaled."""
    Path(path).parent.mkdir(exist_ok=True)
    save_image(images.float(), path, nrow=columns, normalize=True, value_range=(-1, 1))


def save_gif(images, path, milliseconds):
    frames = [image.convert("RGB").quantize(256, Image.Quantize.FASTOCTREE) for image in images]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)


def plot(columns, rows, path):
    """Rows [iteration, a value per column] -> a PNG: left the losses, right D's scores."""
    x, *curves = np.array(rows, dtype=float).T
    image, font = Image.new("RGB", (1800, 660), "white"), ImageFont.load_default(22)
    draw, colours = ImageDraw.Draw(image), "red blue green purple darkorange teal brown magenta".split()
    for left, scores in ((90, False), (990, True)):
        chosen = {name: y for name, y in zip(columns, curves) if ("(" in name) == scores and y.any()}
        low = min([0, *(y.min() for y in chosen.values())])
        high = max([low + 1e-6, *(1.1 * np.percentile(y, 98) for y in chosen.values())])
        for part in (0, 0.25, 0.5, 0.75, 1):
            y = 610 - 540 * part
            draw.line([(left, y), (left + 770, y)], "lightgrey", 2)
            draw.text((left - 10, y), f"{low + (high - low) * part:.2g}", "black", font, "rm")
            draw.text((left + 770 * part, 622), f"{x[0] + (x[-1] - x[0]) * part:.0f}", "black", font, "mt")
        for k, (name, y) in enumerate(chosen.items()):
            y = 610 - 540 * np.clip((y - low) / (high - low), 0, 1.05)
            draw.line(list(zip(left + 770 * (x - x[0]) / (x[-1] - x[0]), y)), colours[k], 4)
            draw.text((left + 10 + k % 4 * 190, 14 + k // 4 * 26), name, colours[k], font)
    image.resize((900, 330), Image.Resampling.LANCZOS).save(path)


# ---- The files of a run ----
def save_views(columns, rows, folder, gif):
    """log.csv, losses.png, timelapse.gif: if one can't be written, that stops no run."""
    with contextlib.suppress(OSError, SyntaxError):  # SyntaxError: Pillow's, for some damaged images
        lines = [",".join(map(str, row)) for row in (["iteration", *columns, "images/s"], *rows)]
        (folder / "log.csv").write_text("\n".join(lines) + "\n")
        if len(rows) > 1:
            plot(columns, rows, folder / "losses.png")
        files = sorted((folder / "samples").glob("[0-9]*.png"))
        if gif and files:
            save_gif(map(Image.open, files[::len(files) // 100 + 1]), folder / "timelapse.gif", 150)


def check_finite(tensors, iteration):
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise BadInput(f"a loss or weight is not finite at iteration {iteration}: try lower --g-lr, --d-lr")


def save_checkpoint(checkpoint, path):
    """Write beside the old file, flush, rename: there always is a whole one."""
    buffer, temporary = io.BytesIO(), Path(f"{path}.tmp")
    torch.save(checkpoint, buffer)  # on a full disk it raises something odd
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path, program):
    """-> the dictionary, on the CPU. weights_only: a stranger's checkpoint can't run code."""
    if not path.is_file():
        raise BadInput(f"no checkpoint {path}; give the folder of a run, such as out/{program}")
    try:
        assert not zipfile.ZipFile(path).testzip()  # torch.load misses a flipped bit
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        assert checkpoint["program"] == program
        return checkpoint
    except Exception:
        raise BadInput(f"{path} is damaged, or no run of this {program}.py") from None


def new_parser(doc):  # without usage: one-line errors
    return argparse.ArgumentParser(description=doc, usage=argparse.SUPPRESS, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def add_run(arg):
    arg("--out", metavar="DIR", help="folder to write (out/NAME)")
    arg("--resume", metavar="RUN", help="go on with this run, with its options and those given here")
    arg("--seed", type=int, default=0, help="another seed is another run (0)")
    arg("--device", default="auto", help="cuda, mps or cpu (auto)")
    arg("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="(auto: bf16 if native)")
    arg("--compile", action=argparse.BooleanOptionalAction, help="torch.compile: slow start, faster run")
    for what, every in (("log", 50), ("sample", 200), ("save", 400)):
        arg(f"--{what}-every", type=int, default=every, metavar="N", help=f"iterations ({every})")


def parse(parser, argv, program, fixed, apply):
    """-> the options, and the checkpoint that --resume or --APPLY names: its options are then defaults."""
    args, checkpoint = parser.parse_args(argv), None
    run = getattr(args, apply) if args.resume is None else args.resume
    if run is not None:
        checkpoint = load_checkpoint(Path(run) / "ckpt.pt", program)
        parser.set_defaults(**checkpoint["options"])
        args = parser.parse_args(argv)
        changed = [name for name in fixed if getattr(args, name) != checkpoint["options"].get(name)]
        if changed:
            parser.error(f"{run} is trained: its {', '.join(changed)} can't change")
    if args.resume and (args.out or getattr(args, apply)):
        parser.error(f"--resume goes on in the run's own folder: leave --out and --{apply} away")
    if min(args.width, args.batch, args.iters, args.log_every, args.sample_every, args.save_every) < 1:
        parser.error("--width, --batch, --iters and --...-every need at least 1")
    if not (0 < args.g_lr < 1 and 0 < args.d_lr < 1 and 0 <= args.ema < 1 and 0 <= args.seed < 2**32):
        parser.error("--g-lr, --d-lr and --ema must be between 0 and 1, --seed between 0 and 2^32 - 1")
    name = program
    for flag, value in vars(args).items():
        if value != parser.get_default(flag) and flag not in ("out", "device"):
            value = Path(value).name if flag in ("data", "X", "Y") else value
            name += f"_{flag}" if value is True or value in ("plain", diffaug.PLAIN) else f"_{flag}={value}"
    args.name, args.deluxe = re.sub(r"[^\w.,=-]", "-", name), plain(args)
    return args, checkpoint


def new_folder(given, otherwise):
    """Make a folder: the given one, which must be free, or else NAME, NAME-2, ..., the first that is free."""
    for k in range(1, sys.maxsize):
        path = Path(given or (otherwise if k == 1 else f"{otherwise}-{k}"))
        with contextlib.suppress(FileExistsError):  # another run may be faster
            if RANK == 0:
                path.mkdir(parents=True, exist_ok=given and path.is_dir() and not any(path.iterdir()))
            return path
        if given:
            raise BadInput(f"{given} is in use: give another --out, or --resume it")


# ---- python data.py get | preview ----
SERVERS = "http://efrosgans.eecs.berkeley.edu/cyclegan", "http://efrosgans.eecs.berkeley.edu/CUT"


def get(name):
    """Download a data set of CycleGAN's authors -> datasets/NAME/{trainA,trainB,testA,testB}."""
    target, problems = Path("datasets") / name, []
    if target.exists():
        raise BadInput(f"{target} is there already")
    target.parent.mkdir(exist_ok=True)
    socket.setdefaulttimeout(30)  # seconds without an answer
    for server in SERVERS:
        try:
            with tempfile.TemporaryDirectory(dir=target.parent) as unpacked:
                download_and_extract_archive(f"{server}/datasets/{name}.zip", unpacked)
                os.replace(Path(unpacked) / name, target)  # only what is whole gets its name
                return print(target)
        except Exception as error:  # addresses and zips break in many ways
            problems.append(f"{server}: {error}")
    raise BadInput(f"no {name} ({'; '.join(problems)}). Put images into {target}/trainA, trainB, ...")


def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("command", choices=("get", "preview"))
    parser.add_argument("source", help="get: grumpifycat, apple2orange, ...; preview: a folder or .zip")
    add_images(parser.add_argument)
    args = parser.parse_args(argv)
    if args.command == "get":
        return get(args.source)
    sheet, ops = [load_images(args.source, args.size, limit=8) / 127.5 - 1], plain(args)
    images = load_images(args.source, load_size(args.size, ops), limit=8)
    sheet += [diffaug.augment(deluxe(images, args.size, ops), args.diffaug) for _ in range(11)]
    save_grid(torch.stack(sheet, dim=1).flatten(0, 1), "preview.png", columns=12)
    print("preview.png: in each row an image, then 11 augmented versions")


if __name__ == "__main__":
    with one_line_errors():
        main()
