"""Everything that touches the disk: images in, batches, pictures out, and the folder of a run.

    python data.py get apple2orange                     # a data set of the CycleGAN authors -> datasets/apple2orange
    python data.py preview FOLDER --deluxe --diffaug    # preview.png: look at an augmentation before you trust it

Inside the programs an image is a uint8 tensor [3, H, W] until it is in a batch, then a float tensor in [-1, 1].
"""
import argparse
import collections
import colorsys
import contextlib
import ctypes
import io
import itertools
import math
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageDraw, ImageFilter, ImageFont, ImageOps
from torchvision.datasets.utils import download_url
from torchvision.transforms.functional import autocontrast, to_pil_image
from torchvision.utils import make_grid, save_image

import diffaug
from diffaug import RANK, WORLD

warnings.filterwarnings("ignore", module="PIL")  # odd metadata and the like: what can be read, is


class BadInput(Exception):
    """Something that the user can mend. Its text is one line: what is wrong, and what to do."""


@contextlib.contextmanager
def one_line_errors():
    """Bad input and disk errors become one line on stderr and exit status 2, without a traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")  # the names of files may hold anything
    try:
        yield
    except (BadInput, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "to allocate" not in str(error):
            raise
        print(f"{Path(sys.argv[0]).name}: error: out of memory; try a smaller --batch, --width or --size", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before the loop has begun; there is nothing to save yet
        sys.exit(130)


# ---------------------------------------------------------------------------------------------------------------------
# Drawn cats: a data set that is always there

DRAWN = {"toy-grumpy": ("grumpy", 0, 204), "toy-blue": ("blue", 1000, 75)}  # name: breed, number of the first cat, count


def draw_cat(number, breed, size):
    """Cat `number` as "grumpy" or "blue" -> RGB image, size x size.

    Pose, background and light depend on the number alone: the two breeds of one number are a true translation pair.
    The head is drawn in its own coordinates (centre 0, radius 1, y down), then turned, scaled and moved.
    """
    U, grumpy, side = random.Random(number).uniform, breed == "grumpy", max(256, 2 * size)
    centre, radius, tilt = np.array([U(0.42, 0.58), U(0.50, 0.60)]), U(0.29, 0.39), U(-0.35, 0.35)
    turn, nod, ears, lids, gaze = U(-0.2, 0.2), U(-0.08, 0.1), U(0.85, 1.2), U(0.75, 1.1), U(-0.06, 0.06)
    hue, shade, light, fluff = U(0, 1), U(0.88, 1.1), U(-0.25, 0.25), [U(0.97, 1.05) for _ in range(48)]
    sky, floor = (np.array(colorsys.hsv_to_rgb(hue + U(-0.1, 0.1), U(0.1, 0.4), U(0.45, 0.95))) * 255 for _ in "ab")
    rotation = np.array([[math.cos(tilt), math.sin(tilt)], [-math.sin(tilt), math.cos(tilt)]])

    def place(points):
        return [tuple(p) for p in ((np.array(points) @ rotation) * radius + centre) * side]

    def ellipse(x, y, rx, ry, rough=(1,)):
        angles = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        return [(x + rx * math.cos(a) * rough[i % len(rough)], y + ry * math.sin(a) * rough[i % len(rough)])
                for i, a in enumerate(angles)]

    def paint(colour, *shapes, soft=0.0, line=0.0):
        """Fill polygons (or draw open lines of a width) with a colour; soft blurs their edge like short fur."""
        mask = Image.new("L", canvas.size)
        for shape in shapes:
            if line:
                ImageDraw.Draw(mask).line(place(shape), 255, max(1, round(line * radius * side)), joint="curve")
            else:
                ImageDraw.Draw(mask).polygon(place(shape), 255)
        mask = mask.filter(ImageFilter.BoxBlur(1.5 * soft * radius * side)) if soft else mask
        canvas.paste(tuple(int(min(255, c)) for c in colour), mask=mask)

    fur = np.array([226, 208, 182] if grumpy else [112, 124, 146]) * shade
    dark, pale = (np.array([70, 50, 42]) * shade, fur * 1.13) if grumpy else (fur * 0.72, fur * 1.16)
    height = np.linspace(0, 1, side)[:, None, None]
    canvas = Image.fromarray(np.broadcast_to(sky * (1 - height) + floor * height, (side, side, 3)).astype(np.uint8))
    for _ in range(3):  # blurred lights behind the cat
        x, y, r = U(-2, 2), U(-2, 1), U(0.2, 0.6)
        paint(sky * 0.5 + floor * 0.5 + U(-40, 60), ellipse(x, y, r, r), soft=0.12)
    paint(fur * 0.85, ellipse(0.1 * turn, 1.75, 1.15, 1.1, fluff), soft=0.03)
    paint(pale, ellipse(0.5 * turn, 1.5, 0.55, 0.7), soft=0.15)
    for s in (-1, 1):
        paint(dark if grumpy else fur * 0.9, [(s * 0.95, -0.2), (s * 0.86 + turn / 3, -1.12 * ears), (s * 0.15, -0.75)], soft=0.02)
        paint((206, 150, 145), [(s * 0.80, -0.4), (s * 0.79 + turn / 3, -0.95 * ears), (s * 0.36, -0.72)], soft=0.05)
    paint(fur, ellipse(0, 0, 1, 0.86, fluff), ellipse(-0.55, 0.3, 0.55, 0.45, fluff), ellipse(0.55, 0.3, 0.55, 0.45, fluff), soft=0.025)
    if grumpy:  # the dark mask, and the white blaze that widens from the brow to the chin
        paint(dark, *[ellipse(s * 0.44 + turn, -0.14 + nod, 0.44, 0.44, fluff) for s in (-1, 1)], soft=0.09)
        paint((246, 240, 232), [(turn, -0.62 + nod), (turn + 0.16, 0.1 + nod), (turn + 0.42, 0.62), (turn, 0.83),
                                (turn - 0.42, 0.62), (turn - 0.16, 0.1 + nod)], soft=0.06)
    paint(pale if not grumpy else (250, 246, 240), *[ellipse(s * 0.19 + 1.1 * turn, 0.42 + nod, 0.25, 0.2) for s in (-1, 1)], soft=0.05)
    for s in (-1, 1):
        x, y = s * 0.41 + 1.1 * turn, -0.1 + nod
        paint(dark * 0.45, ellipse(x, y, 0.225, 0.2 * lids), soft=0.012)
        paint((122, 182, 222) if grumpy else (148, 190, 74), ellipse(x, y, 0.19, 0.17 * lids))
        paint((18, 18, 22), ellipse(x + gaze, y, 0.075, 0.14 * lids))
        paint((255, 255, 255), ellipse(x + gaze - 0.06, y - 0.07, 0.04, 0.04))
        if grumpy:  # the heavy lid, lower at the nose, makes the mood
            paint(dark, [(x - s * 0.24, y - 0.01), (x + s * 0.24, y - 0.09), *ellipse(x, y - 0.12, 0.24, 0.16)[24:][::-s]], soft=0.012)
    x, y = 1.15 * turn, 0.27 + nod
    paint((226, 138, 140) if grumpy else (122, 100, 118), [(x - 0.12, y), (x + 0.12, y), (x + 0.03, y + 0.11), (x - 0.03, y + 0.11)], soft=0.012)
    curve = [(t / 10, (0.14 * (t / 4) ** 2 if grumpy else 0.09 * math.sin(abs(t) / 4 * math.pi))) for t in range(-4, 5)]
    paint((96, 62, 60), [(x + 0.85 * a, y + 0.24 + b) for a, b in curve], [(x, y + 0.1), (x, y + 0.24)], line=0.04)
    paint((250, 250, 250), *[[(x + s * 0.3, y + 0.14 + 0.05 * k), (x + s * 1.15, y + 0.05 + 0.16 * k)] for s in (-1, 1) for k in (-1, 0, 1)], line=0.014)
    ramp = 1 + light * np.linspace(-1, 1, side)[None, :, None]  # light from one side
    lit = np.clip(np.asarray(canvas) * ramp, 0, 255).astype(np.uint8)
    return Image.fromarray(lit).resize((size, size), Image.Resampling.LANCZOS)


def drawn_pairs(X, Y, size):
    """If X and Y are drawn sets of two breeds: the same 16 cats, in neither set, in both -> float [16, 3, S, S] each."""
    if {X, Y} != set(DRAWN):
        return None
    return [torch.stack([torch.from_numpy(np.array(draw_cat(number, DRAWN[name][0], size))).permute(2, 0, 1) / 127.5 - 1
                         for number in range(2000, 2016)]) for name in (X, Y)]


# ---------------------------------------------------------------------------------------------------------------------
# Images in

def to_rgb(image):
    """Any Pillow image -> mode RGB: upright, transparency laid on white, more than 8 bits scaled down (not clipped)."""
    if math.prod(image.size) > 2**26:  # decoded, it would take gigabytes
        raise ValueError(f"{image.width} x {image.height} pixels are too many")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.nan_to_num(np.asarray(image, dtype=np.float32))
        top = 65535 if image.mode != "F" or grey.max() > 255 else 255 if grey.max() > 1 else 1
        grey = grey * (255 / top)
        image = Image.fromarray(np.clip(grey, 0, 255).round().astype(np.uint8))
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def square(image, size):
    """A Pillow image -> uint8 array [3, size, size]: shorter side resized (antialiased), then centre crop."""
    image.draft("RGB", (2 * size, 2 * size))  # a JPEG can be decoded at 1/2, 1/4 or 1/8: fast for photographs
    return np.asarray(ImageOps.fit(to_rgb(image), (size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def member(archive, name):
    if archive.getinfo(name).file_size > 2**27:
        raise ValueError("more than 128 MB when unpacked")
    return archive.open(name)


def find_images(source):
    """A folder or .zip -> ([(name, function that returns a file object or path)]), every image below it, sorted."""
    readable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in [*Image.OPEN, "MPO"]}
    wanted = lambda name: Path(name).suffix.lower() in readable and not Path(name).name.startswith(".")
    path = Path(source)
    if path.is_dir():
        return [(str(p), lambda p=p: p) for p in sorted(path.rglob("*")) if wanted(p) and p.is_file()]
    try:
        if path.exists() and not path.is_file():  # a pipe would keep us waiting
            raise OSError
        archive = zipfile.ZipFile(path)
        return [(name, lambda name=name: member(archive, name)) for name in sorted(archive.namelist()) if wanted(name)]
    except Exception:  # what a damaged zip raises depends on where it is damaged
        what = "is neither a folder nor an undamaged .zip" if path.exists() else "does not exist"
    raise BadInput(f"{source} {what}; give a folder of images, a .zip of one, or one of {', '.join(DRAWN)}")


def storage(count, size, memory=None):
    """Room for a set: uint8 [count, 3, size, size], in memory, or in a mapped temporary file if over a third of it."""
    memory = memory or (os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**33)
    numbers = count * 3 * size * size * int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of all processes on this machine
    if numbers <= memory / 3:  # there may be two sets
        return torch.empty(count, 3, size, size, dtype=torch.uint8)
    with tempfile.TemporaryFile(dir=".") as file:  # not in /tmp, which may be memory; gone as soon as nothing maps it
        return torch.from_numpy(np.memmap(file, np.uint8, "w+", shape=(count, 3, size, size)))


def load_images(source, size, limit=None):
    """A folder (searched recursively), a .zip, or the name of a drawn set -> uint8 tensor [N, 3, size, size].

    Files that can't be read are named, counted and skipped. Raises BadInput if nothing usable is found. A result of
    more than a third of the machine's memory is put in a memory-mapped temporary file instead.
    """
    if source in DRAWN:
        breed, first, count = DRAWN[source]
        names = [f"{breed} cat {first + i}" for i in range(count)][:limit]
        decode = lambda i: np.asarray(draw_cat(first + i, breed, size)).transpose(2, 0, 1)
    else:
        found = find_images(source)[:limit]
        names, files = [name for name, _ in found], [file for _, file in found]

        def decode(i):
            with Image.open(files[i]()) as image, big if math.prod(image.size) > 2**23 else contextlib.nullcontext():
                return square(image, size)

    def fill(i):
        try:
            images[i] = torch.from_numpy(np.ascontiguousarray(decode(i)))
        except Exception as error:  # a damaged file can raise anything, and none may stop the others
            return f"{names[i]}: {error}"

    images, big = storage(len(names), size), threading.Lock()  # big pictures one at a time: a whole one takes memory
    problems, told = [], time.time()
    with ThreadPoolExecutor() as pool:
        for problem in pool.map(fill, range(len(names))):
            problems.append(problem)
            if time.time() > told + 2:
                print(f"reading {source}: {len(problems)} of {len(names)}", file=sys.stderr)
                told = time.time()
    good = [i for i, problem in enumerate(problems) if not problem]
    if len(good) < len(names):
        for problem in filter(None, problems):
            print("skipped", *problem.split(), file=sys.stderr)  # in one line, whatever the name
        print(f"skipped {len(names) - len(good)} of {len(names)} files in {source}: not readable as images", file=sys.stderr)
        for to, i in enumerate(good):  # close the gaps where they are: a copy might not fit into memory
            images[to] = images[i]
    if not good:
        raise BadInput(f"no usable image in {source}: looked for .png, .jpg, .webp, .gif and whatever else Pillow reads, in all its subfolders")
    return images[:len(good)]


def read_pictures(source, side):
    """An image file, a folder or a .zip -> one by one (name for the result, float [1, 3, H, W] in [-1, 1]).

    The shorter side becomes `side` pixels, the proportions stay. The name is the picture's own, with .png for its suffix,
    or behind it where two differ in nothing else. What can't be read is named and skipped.
    """
    path = Path(source)
    single = path.is_file() and not zipfile.is_zipfile(path)
    found = [(str(path), lambda: path)] if single else find_images(source)
    names = [os.path.relpath(name, path.parent if single else path) if path.is_dir() or single else name for name, _ in found]
    stems = collections.Counter(str(Path(name).with_suffix("")).lower() for name in names)
    done = False
    for name, (_, file) in zip(names, found):
        try:
            with Image.open(file()) as image:
                image = to_rgb(image)
            scale = side / min(image.size)
            if max(image.size) * scale > 64 * side:
                raise ValueError(f"{image.width} x {image.height} is too long and thin")
            image = image.resize([round(scale * n) for n in image.size], Image.Resampling.BICUBIC)
        except Exception as error:  # as in load_images
            print("skipped", *f"{name}: {error}".split(), file=sys.stderr)
            continue
        stem = Path(*[part for part in Path(name).parts if Path(part).name == part != ".."]).with_suffix("")
        twice = stems[str(Path(name).with_suffix("")).lower()] > 1
        done = True
        yield f"{stem}{Path(name).suffix if twice else ''}.png", torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    if not done:
        raise BadInput(f"no usable image in {source}: give an image, or a folder or .zip of images")


def upload(x, device):
    """To the device; to a GPU from pinned memory, as a copy from there need not wait for what the GPU has still to do."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


class Batches:
    """Endless random batches of a uint8 tensor [N, 3, L, L], which stays on the device if it fits there.

    Each epoch is a permutation, of which each process takes its share. A batch that reaches past an epoch's end goes on
    in the next one, so it is never short, not even with fewer images than a batch. state_dict() holds the order, so that
    a resumed run sees the same images.
    """

    def __init__(self, images, batch, device, seed):
        room = {"cuda": lambda: torch.cuda.mem_get_info(device)[0], "mps": torch.mps.recommended_max_memory}
        fits = device.type == "cpu" or images.nbytes < room[device.type]() / 3
        self.images, self.batch, self.device = images.to(device) if fits else images, batch, device
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.int64, device=self.images.device)

    def next(self):
        """-> uint8 [batch, 3, L, L] on the device."""
        batch = self.batch * WORLD
        while len(self.order) < batch:
            epoch = torch.randperm(len(self.images), generator=self.generator)
            self.order = torch.cat([self.order, upload(epoch, self.order.device)])
        index, self.order = self.order.split([batch, len(self.order) - batch])
        return upload(self.images[index[RANK::WORLD]], self.device)

    def state_dict(self):
        return {"order": self.order.cpu().clone(), "generator": self.generator.get_state(), "count": len(self.images)}

    def load_state_dict(self, state):
        if state["count"] != len(self.images):
            raise BadInput(f"the run was trained on {state['count']} images and the set now has {len(self.images)}: "
                           "restore the set, or start a new run")
        self.order = state["order"].to(self.images.device)
        self.generator.set_state(state["generator"])


# ---------------------------------------------------------------------------------------------------------------------
# "Deluxe": augmentation of the real images. Float [B, 3, L, L] in [0, 1] in, L -> size, each image its own draws.

def crop(x, size):
    return diffaug.window(x, size, size)


def flip(x, size):
    return torch.where(diffaug.uniform(x, 0, 1) < 0.5, x, x.flip(3))


def zoom(x, size):
    """Random resized crop: 64 to 100 % of the area, aspect ratio 4:5 to 5:4, bilinear."""
    area, aspect = diffaug.uniform(x, 0.64, 1).flatten(), diffaug.uniform(x, math.log(0.8), math.log(1.25)).flatten().exp()
    w, h, zero = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1), torch.zeros_like(area)
    left, top = ((1 - side) * diffaug.uniform(x, -1, 1).flatten() for side in (w, h))
    theta = torch.stack([w, zero, left, zero, h, top], dim=1).view(-1, 2, 3)
    inside = 1 - 1 / x.shape[-1]  # the centres of the outermost pixels; beyond them grid_sample mixes in black
    grid = F.affine_grid(theta, (len(x), 3, size, size), align_corners=False).clamp(-inside, inside)
    return F.grid_sample(x, grid, align_corners=False)


def jitter(x, size):
    """Brightness, contrast and saturation, each times U(0.7, 1.3)."""
    brightness, contrast, saturation = (diffaug.uniform(x, 0.7, 1.3) for _ in range(3))
    x = (x * brightness).clamp(0, 1)
    x = torch.lerp(x.mean(dim=(1, 2, 3), keepdim=True), x, contrast).clamp(0, 1)
    return torch.lerp(x.mean(dim=1, keepdim=True), x, saturation).clamp(0, 1)


def stretch(x, size):
    """Autocontrast: half of the images get each channel stretched to the full range."""
    return torch.where(diffaug.uniform(x, 0, 1) < 0.5, x, autocontrast(x))


DELUXE = {"crop": crop, "flip": flip, "zoom": zoom, "jitter": jitter, "autocontrast": stretch}


def load_size(size, ops):
    """Images are kept a tenth larger where something is to be cut out of them."""
    return int(1.1 * size) if {"crop", "zoom"} & set(ops.split(",")) else size


def deluxe(images, size, ops):
    """uint8 [B, 3, L, L] -> float [B, 3, size, size] in [-1, 1], tanh's range. ops: e.g. "crop,flip", or "" for none."""
    x, ops = images.float() / 255, ops.split(",") if ops else []
    for i, op in enumerate(ops):
        x = DELUXE[op](x, x.shape[-1] if "crop" in ops[i + 1:] else size)  # what comes before the crop leaves it room
    return x * 2 - 1


# ---------------------------------------------------------------------------------------------------------------------
# Pictures out

def save_grid(images, path, columns=8):
    """Float images [N, 3, H, W] in [-1, 1], any N -> a PNG with so many columns. No min-max: colours stay what they are."""
    if RANK == 0:
        save_image(make_grid((images.float().clamp(-1, 1) + 1) / 2, nrow=columns), path)


def readable(files):
    for file in files:
        with contextlib.suppress(OSError, SyntaxError), Image.open(file) as image:  # what Pillow says of damaged ones
            yield image.convert("RGB")


def save_gif(frames, path, milliseconds):
    """Pillow images, or float images [N, 3, H, W] in [-1, 1] -> an endless GIF."""
    frames = (to_pil_image((f.clamp(-1, 1) + 1) / 2) if isinstance(f, torch.Tensor) else f.convert("RGB") for f in frames)
    frames = (f.quantize(256, Image.Quantize.FASTOCTREE) for f in frames)
    next(frames).save(path, save_all=True, append_images=frames, duration=milliseconds, loop=0)


def nearest(fakes, images):
    """For each float image [N, 3, S, S] in [-1, 1] the closest of uint8 [M, 3, S, S] -> float [N, 3, S, S], distances [N],
    and for the first 512 of the M themselves the distance of each to its closest other [min(M, 512)].

    Root mean square difference at 32 x 32 pixels; a training image's mirror image counts as well.
    """
    small = torch.cat([F.adaptive_avg_pool2d(chunk.float() / 127.5 - 1, 32) for chunk in images.split(256)])
    both = torch.cat([small, small.flip(3)]).flatten(1)
    distance, index = torch.cdist(F.adaptive_avg_pool2d(fakes, 32).flatten(1), both).min(dim=1)
    others = torch.cdist(small[:512].flatten(1), both)
    itself = torch.arange(len(others))
    others[itself, itself] = others[itself, itself + len(images)] = math.inf
    others = others.amin(dim=1)
    closest = images[index % len(images)].float() / 127.5 - 1
    mirrored = (index >= len(images)).view(-1, 1, 1, 1)
    scale = math.sqrt(both.shape[1])
    return torch.where(mirrored, closest.flip(3), closest), distance / scale, others / scale


def read_log(path, width):
    """The rows of log.csv that are so many numbers, as text: someone may have opened it and saved something else."""
    rows = []
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as file:
        for row in (line.strip().split(",") for line in file):
            with contextlib.suppress(ValueError):
                if len(row) == width and all(math.isfinite(float(v)) for v in row):
                    rows.append(row)
    return rows


def plot(log, columns, path, size=(900, 330)):
    """log.csv -> losses.png: on the left every loss, on the right what D says; raw values pale, smoothed ones on top."""
    rows = [dict(zip(["iteration", *columns], map(float, r))) for r in read_log(log, len(columns) + 2)]
    x = np.array([r["iteration"] for r in rows])
    if len(set(x)) < 2:
        return
    canvas = Image.new("RGB", (2 * size[0], 2 * size[1]), "white")  # drawn at twice the size, which smooths the lines
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(22)
    colours = ["#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2"]
    groups = [[c for c in columns if "(" not in c], [c for c in columns if "(" in c]]
    for left, names in zip((90, size[0] + 90), groups):
        curves = [np.array([float(r[name]) for r in rows]) for name in names]
        low, high = min(map(np.min, curves)), max(np.percentile(c, 98) for c in curves)
        low, high = min(0, low), max(high * 1.1, low + 1e-6)
        width, top, bottom = size[0] - 130, 70, 2 * size[1] - 50
        px = left + width * (x - x[0]) / (x[-1] - x[0])
        py = lambda v: bottom - (bottom - top) * np.clip((v - low) / (high - low), 0, 1.05)
        for tick in np.linspace(low, high, 5):
            draw.line([(left, py(tick)), (left + width, py(tick))], "#dddddd", 2)
            draw.text((left - 10, py(tick)), f"{tick:.2g}", "black", font, anchor="rm")
        for tick in np.linspace(0, len(x) - 1, 5).astype(int):
            draw.text((px[tick], bottom + 12), f"{x[tick]:.0f}", "black", font, anchor="mt")
        kernel = np.ones(max(1, len(x) // 20 | 1))
        for k, (name, curve) in enumerate(zip(names, curves)):
            smooth = np.convolve(curve, kernel, "same") / np.convolve(np.ones_like(curve), kernel, "same")
            pale = tuple((c + 510) // 3 for c in Image.new("RGB", (1, 1), colours[k]).getpixel((0, 0)))
            draw.line(list(zip(px, py(curve))), pale, 2)
            draw.line(list(zip(px, py(smooth))), colours[k], 5)
            draw.text((left + 10 + k % 4 * 190, 14 + k // 4 * 26), name, colours[k], font)
    canvas.resize(size, Image.Resampling.LANCZOS).save(path)


# ---------------------------------------------------------------------------------------------------------------------
# Options, device, checkpoints, and the folder of a run

def number(low, high=math.inf, kind=float):
    """An argparse type: numbers from low to high, neither nan nor infinite."""
    def parse(text):
        with contextlib.suppress(ValueError, OverflowError):
            if low <= kind(text) <= high and math.isfinite(kind(text)):
                return kind(text)
        name, limit = "whole number" if kind is int else "number", f" to {high:g}" if high < math.inf else " up"
        raise argparse.ArgumentTypeError(f"needs a {name} from {low:g}{limit}, not {text!r}")
    return parse


def policy(known):
    """An argparse type: names from a dictionary, joined by commas; "none" turns it off."""
    def parse(text):
        if text not in ("", "none") and (wrong := [name for name in text.split(",") if name not in known]):
            raise argparse.ArgumentTypeError(f"no {wrong[0]!r} among {', '.join(known)} (join several with commas)")
        return "" if text == "none" else text
    return parse


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, the options that every run has, and options that come back from a checkpoint."""

    def __init__(self, doc="", **keys):
        super().__init__(description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **keys)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def add_augmentation(self):
        self.add_argument("--deluxe", nargs="?", const="crop,flip", default="", type=policy(DELUXE), metavar="OPS",
                          help=f"augment the real images: {', '.join(DELUXE)} (plain --deluxe: crop,flip)")
        self.add_argument("--diffaug", nargs="?", const=",".join(diffaug.POLICIES), default="", type=policy(diffaug.POLICIES),
                          metavar="POLICY", help="DiffAugment, on reals and fakes (plain --diffaug: color,translation,cutout)")

    def add_run(self):
        arg = self.add_argument_group("the run").add_argument
        arg("--out", metavar="DIR", help="folder of the run (default: out/NAME, named after the flags)")
        arg("--resume", metavar="RUN", help="go on with the run in this folder; options given here win over its own")
        arg("--seed", type=number(0, 2**62, kind=int), default=0, help="the same seed: the same run")
        arg("--device", default="auto", help="cuda, mps, cpu (default: the best that is here)")
        arg("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 where the hardware has it")
        arg("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the networks, on CUDA with CUDA graphs; a slow start")
        for what, every in (("log", 50), ("sample", 200), ("save", 400)):
            arg(f"--{what}-every", type=number(1, kind=int), default=every, metavar="N", help="iterations (%(default)s)")
        arg("--tensorboard", action=argparse.BooleanOptionalAction, default=False, help="log for it too (pip install tensorboard)")

    def parse(self, argv, program, fixed, apply):
        """-> (options, checkpoint or None). With --resume, or `apply`, the option that names a run to apply, the options
        start from that run's own; those named in `fixed` can't change any more."""
        opt, checkpoint = self.parse_args(argv), None
        if "" in (opt.resume, getattr(opt, apply)):  # an empty variable of the shell; a new run is not what was meant
            self.error(f"--resume and --{apply} need the folder of a run")
        if run := opt.resume or getattr(opt, apply):
            if opt.resume and (opt.out or getattr(opt, apply)):
                self.error(f"--resume goes on in the run's own folder: leave {'--out' if opt.out else '--' + apply} away")
            checkpoint = load_checkpoint(Path(run) / "ckpt.pt", program)
            own = checkpoint["options"]
            self.set_defaults(**{k: v for k, v in own.items() if k not in ("out", "device", "resume", apply)})
            opt = self.parse_args(argv)
            for name in fixed + (("seed",) if opt.resume else ()):  # the random state is the checkpoint's
                if getattr(opt, name) != own.get(name):
                    self.error(f"--{name.replace('_', '-')}: {run} was trained with {own.get(name)}, which can't change any more")
        flags = [k if v is True else f"{k}={v}" for k, v in vars(opt).items()
                 if k not in ("out", "device", "tensorboard") and not k.endswith("_every") and v != self.get_default(k)]
        name = "_".join([program, *flags]).replace("=crop,flip", "").replace("=" + ",".join(diffaug.POLICIES), "")
        opt.name = "".join(c if c.isalnum() or c in "-_=.," else "-" for c in name)[:100]
        return opt, checkpoint


def setup(opt):
    """Seed, device and precision -> (device, a function that returns the autocast context for the networks)."""
    torch.manual_seed(opt.seed)
    best = "mps" if torch.backends.mps.is_available() and WORLD == 1 else "cpu"  # nothing joins several on Apple's
    if torch.cuda.is_available():
        best = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # each process its own
    try:
        assert opt.device.split(":")[0] in ("auto", "cuda", "mps", "cpu")
        device = torch.device(best if opt.device in ("auto", best.split(":")[0]) else opt.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise BadInput(f"--device {opt.device}: there is no such device here, or not one for each process; cpu always works") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)  # or another GPU's random state would be saved
        torch.set_float32_matmul_precision("high")  # what is not bf16 may use TF32
        native = torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere
    else:  # other CPUs would only imitate bf16, slowly
        flags = getattr(torch.cpu, "get_capabilities", dict)()
        native = device.type == "cpu" and bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if RANK:
        sys.stdout = open(os.devnull, "w")  # one process speaks for all
    bf16 = opt.dtype == "bf16" or opt.dtype == "auto" and native
    return device, lambda: torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def compile_networks(nets, device):
    """torch.compile, in place. On CUDA with CUDA graphs: a pass through a network, forward or backward, is launched at once
    instead of operation by operation. What else a step does stays as it is."""
    try:
        torch.compile(torch.neg)(torch.zeros(9, device=device))
    except RuntimeError as error:
        reason = str(getattr(error, "inner_exception", error)).splitlines()[0]
        raise BadInput(f"--compile does not work here ({reason}); go on without it") from None
    graphs = device.type == "cuda"
    if not graphs and RANK == 0:
        print(f"--compile: no CUDA graphs on {device.type}, where it may be slower than without: compare the images/s", file=sys.stderr)
    for net in nets:  # by net.compile() some versions of torch would compile hardly anything of an nn.Sequential
        net.forward = torch.compile(net.forward, mode="reduce-overhead" if graphs else "default", dynamic=False)


def average_gradients(optimizer):
    """Between backward() and step(): with several processes, each gets the mean of all their gradients."""
    if WORLD > 1:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        for gradient, mean in zip(gradients, (flat / WORLD).split([g.numel() for g in gradients])):
            gradient.copy_(mean.view_as(gradient))


def gather(x):
    """Each process's part [B, ...] of a batch -> the whole of it, [WORLD * B, ...], on every process."""
    if WORLD == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(WORLD)]
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)


def random_state(device):
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def set_random_state(state, device):
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and device.type in state:  # a run may go on elsewhere
        torch.get_device_module(device).set_rng_state(state[device.type])


def save_checkpoint(checkpoint, path):
    """Write beside the old file, flush to the disk, then rename: at every moment there is one whole checkpoint."""
    temporary = Path(f"{path}.tmp")
    try:
        buffer = io.BytesIO()  # a full disk makes torch.save raise something odd
        torch.save(checkpoint, buffer)
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # the new name, too, has to reach the disk; not every system lets us ask
            folder = os.open(temporary.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path, program):
    """-> the dictionary, on the CPU. weights_only: a checkpoint from a stranger can't run code."""
    if not Path(path).is_file():
        raise BadInput(f"no checkpoint {path}; give the folder of a run, such as out/{program}, that came as far as a checkpoint")
    try:
        with zipfile.ZipFile(path) as file:
            assert not file.testzip()  # torch.load would not notice a flipped bit
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        assert {"program", "iteration", "options", "parts", "logged", "sums", "random"} <= checkpoint.keys()
        assert isinstance(checkpoint["options"], dict) and isinstance(checkpoint["iteration"], int)
        if checkpoint["program"] == program:
            return checkpoint
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise BadInput(f"{path} is damaged or no checkpoint ({type(error).__name__}); restore it or start a new run") from None
    raise BadInput(f"{path} was written by {checkpoint['program']}.py; this is {program}.py")


@contextlib.contextmanager
def restoring():
    """Around load_state_dict: what does not fit the networks becomes one line."""
    try:
        yield
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise BadInput(f"the checkpoint does not fit this program; was it written by another version? ({error})") from None


def new_folder(given, otherwise, inside):
    """Make a folder, with one inside it, and never over an old run: a given one must be free, else try -2, -3, ..."""
    if given:
        path = Path(given)
        with contextlib.suppress(FileExistsError):  # of two that start together one is first
            if not path.is_dir() or not any(path.iterdir()):
                (path / inside).mkdir(parents=True, exist_ok=not inside)
                return path
        raise BadInput(f"{given} is in use already: go on with --resume {given}, or give another --out")
    otherwise.parent.mkdir(parents=True, exist_ok=True)
    for path in itertools.chain([otherwise], (Path(f"{otherwise}-{k}") for k in itertools.count(2))):
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            (path / inside).mkdir(exist_ok=True)
            return path


def keep_memory():
    """Let glibc, the C library of most Linux systems, keep the memory that tensors free. By default it returns large blocks
    to the system, which fills them with zeros, page by page, when the next step asks for them: 6 % of the time at 64 px.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # other C libraries have no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at its highest: smaller blocks come from the heap,
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: and the heap does not shrink


class Run:
    """The folder of a run: log.csv, losses.png, samples/, timelapse.gif, ckpt.pt. `parts` are what a checkpoint holds:
    names and things that have state_dict() and load_state_dict(). The losses named in `columns` are summed up on the
    device by add() and read by log(), the only place where training waits for the device; what is named in `measured`
    is given to log(). Of several processes only the first writes.
    """

    def __init__(self, opt, program, checkpoint, parts, columns, device, measured=()):
        self.opt, self.program, self.parts, self.columns = opt, program, parts, [*columns, *measured]
        self.iteration = self.logged = self.first = 0
        self.sums, self.time = torch.zeros(len(columns), device=device), time.perf_counter()
        self.signal = self.stopped_by = 0
        self.board, self.path = None, Path(opt.resume or opt.out or opt.name)
        if opt.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise BadInput("--tensorboard needs a package that is not here: pip install tensorboard") from None
        if checkpoint:
            with restoring():
                for name, part in parts.items():
                    part.load_state_dict(checkpoint["parts"][name])
                self.sums += checkpoint["sums"].to(device)
                set_random_state(checkpoint["random"], device)
            self.iteration, self.logged, self.first = checkpoint["iteration"], checkpoint["logged"], checkpoint["iteration"]
            if RANK == 0:
                self.cut_log()
        elif RANK == 0:
            self.path = new_folder(opt.out, Path("out") / opt.name, "samples")
            with open(self.path / "log.csv", "w") as file:
                file.write(",".join(["iteration", *self.columns, "images/s"]) + "\n")
        if opt.tensorboard and RANK == 0:
            self.board = SummaryWriter(self.path, purge_step=self.iteration + 1)
        keep_memory()  # not before the images are loaded, which takes large blocks once
        for number in (signal.SIGINT, signal.SIGTERM):  # the loop ends after the iteration in hand; a second one kills
            signal.signal(number, self.stop)

    def cut_log(self):
        """Drop the lines that were logged after the checkpoint: they are about to be made again."""
        header, path = ["iteration", *self.columns, "images/s"], self.path / "log.csv"
        rows = [r for r in read_log(path, len(header)) if float(r[0]) <= self.logged]
        with open(f"{path}.tmp", "w") as file:
            file.writelines(",".join(row) + "\n" for row in [header, *rows])
        os.replace(f"{path}.tmp", path)
        (self.path / "samples").mkdir(exist_ok=True)

    def stop(self, number, frame):
        self.signal = number
        if WORLD == 1:  # several processes first have to agree, and may be told twice
            self.stopped_by = number
            signal.signal(number, signal.SIG_DFL)

    def agree(self):
        """Several processes: take the mean of their sums, and stop all if one was told to."""
        if WORLD > 1:
            both = torch.cat([self.sums, self.sums.new_tensor([self.signal])])
            dist.all_reduce(both)
            self.sums, self.stopped_by = both[:-1] / WORLD, int(both[-1] > 0) and (self.signal or signal.SIGTERM)

    def due(self, every):
        return self.iteration % every == 0 or self.iteration == self.opt.iters

    def add(self, *values):
        """Add this iteration's losses and scores, 0-d tensors on the device."""
        self.sums += torch.stack([v.detach().float() for v in values])

    def log(self, *measured):
        """Write the means since the last line to log.csv and the terminal. A mean that is not finite ends the run."""
        self.agree()
        means = (self.sums / (self.iteration - self.logged)).tolist() + [m.item() for m in measured]
        self.check(means)
        speed = (self.iteration - self.first) / (time.perf_counter() - self.time)
        images = speed * self.opt.batch * WORLD
        if RANK == 0:
            with open(self.path / "log.csv", "a") as file:
                file.write(",".join([str(self.iteration), *(f"{m:.5g}" for m in means), f"{images:.1f}"]) + "\n")
        if self.board:
            for name, mean in zip(self.columns, means):
                self.board.add_scalar(name, mean, self.iteration)
        left = int((self.opt.iters - self.iteration) / speed)
        print(f"{self.iteration:6d}/{self.opt.iters}", *(f"{n} {m:.3f}" for n, m in zip(self.columns, means)),
              f"{images:.0f} images/s", f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left", sep="  ", flush=True)
        self.sums.zero_()
        self.logged = self.first = self.iteration
        self.time = time.perf_counter()

    def check(self, numbers):
        """A number that is not finite ends the run, before it can get into the log or a checkpoint."""
        if not all(map(math.isfinite, numbers)):
            good = self.path / "ckpt.pt"
            raise BadInput(f"a loss is not finite by iteration {self.iteration}. The last good checkpoint: "
                           f"{good if good.exists() else 'none yet'}. Try lower rates, or --dtype fp32")

    def save(self):
        """Write losses.png, at the end timelapse.gif, and ckpt.pt last: a run that is killed before that makes them again."""
        self.agree()
        networks = [part for part in self.parts.values() if isinstance(part, torch.nn.Module)]
        self.check([self.sums.sum().item(), *(p.detach().float().sum().item() for net in networks for p in net.parameters())])
        if RANK:
            return
        plot(self.path / "log.csv", self.columns, self.path / "losses.png")
        files = sorted((self.path / "samples").glob("[0-9]*.png"), key=lambda file: (len(file.name), file.name))
        if files and (self.stopped_by or self.iteration == self.opt.iters):
            save_gif(readable(files[::len(files) // 100 + 1]), self.path / "timelapse.gif", 150)
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        save_checkpoint({"program": self.program, "iteration": self.iteration, "options": vars(self.opt), "parts": parts,
                         "logged": self.logged, "sums": self.sums.cpu(), "random": random_state(self.sums.device)}, self.path / "ckpt.pt")

    def finish(self):
        """After the loop: the save that a stop asks for, and how to go on. Ctrl-C and SIGTERM show in the exit status."""
        if self.stopped_by:
            self.save()
        if WORLD > 1:
            dist.destroy_process_group()
        print(f"{'stopped' if self.stopped_by else 'finished'} at iteration {self.iteration}: {self.path}")
        if self.stopped_by:
            print(f"go on with: python {self.program}.py --resume {self.path}")
            sys.exit(128 + self.stopped_by)


# ---------------------------------------------------------------------------------------------------------------------
# python data.py get | preview

HOST = "http://efrosgans.eecs.berkeley.edu"


def get(name, url=None, root="datasets"):
    """Download a CycleGAN data set's zip and unpack it -> datasets/NAME/{trainA,trainB,testA,testB}."""
    url = url or f"{HOST}/{'CUT' if name == 'grumpifycat' else 'cyclegan'}/datasets/{name}.zip"
    target, archive = Path(root) / name, Path(root) / f"{name}.zip"
    by_hand = f"get the images elsewhere and put them into {target}/trainA, trainB, testA and testB"
    if not name.replace("-", "").replace("_", "").isalnum():
        raise BadInput(f"{name!r} is not the name of a data set, such as apple2orange")
    if target.exists():
        raise BadInput(f"{target} is there already; delete it to fetch it again")
    socket.setdefaulttimeout(30)  # a host that accepts and then says nothing
    try:
        download_url(url, root, archive.name)
        with zipfile.ZipFile(archive) as file, tempfile.TemporaryDirectory(dir=root) as unpacked:
            if damaged := file.testzip():
                raise zipfile.BadZipFile(f"{damaged} is damaged")
            members = [m for m in file.namelist() if m.startswith(f"{name}/")]  # whatever else is in it stays there
            if not members:
                raise zipfile.BadZipFile(f"no folder {name} in it")
            file.extractall(unpacked, members)
            os.replace(Path(unpacked) / name, target)
    except Exception as error:  # addresses, connections and zips can be broken in many ways
        archive.unlink(missing_ok=True)
        raise BadInput(f"could not fetch {url} ({error}); {by_hand}") from None
    archive.unlink()
    print(f"{target}: " + ", ".join(f"{p.name} {sum(1 for _ in p.iterdir())}" for p in sorted(target.iterdir()) if p.is_dir()))


def preview(source, size, ops, augmentation, path, rows=8):
    """A contact sheet: in each row an image as it is, then 11 augmented versions of it."""
    if Path(path).suffix.lower() not in (".png", ".jpg"):
        raise BadInput(f"--out {path}: give it a name that ends in .png or .jpg")
    images = load_images(source, load_size(size, ops), limit=rows)
    plain = F.interpolate(images.float() / 127.5 - 1, size=(size, size), mode="bilinear", antialias=True)
    versions = [diffaug.augment(deluxe(images, size, ops), augmentation) for _ in range(11)]
    save_grid(torch.stack([plain, *versions], dim=1).flatten(0, 1), path, columns=12)
    print(path)


def main(argv=None):
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    fetch, show = commands.add_parser("get"), commands.add_parser("preview")
    fetch.add_argument("name", help="apple2orange, grumpifycat, horse2zebra, monet2photo, ...")
    fetch.add_argument("--url", help="another address of the zip")
    show.add_argument("folder")
    show.add_argument("--size", type=number(8, kind=int), default=64)
    show.add_argument("--out", default="preview.png")
    show.add_augmentation()
    opt = parser.parse_args(argv)
    if opt.command == "get":
        get(opt.name, opt.url)
    else:
        preview(opt.folder, opt.size, opt.deluxe, opt.diffaug, opt.out)


if __name__ == "__main__":
    with one_line_errors():
        main()
