"""CycleGAN: blue cats into grumpy cats and back, from unpaired pictures (Zhu et al. 2017).

    python cyclegan.py --patch --cycle                        # drawn cats; look into out/
    python cyclegan.py --patch --cycle --X FOLDER --Y FOLDER  # your own two sets of pictures
    python cyclegan.py --resume RUN                           # after a stop, or with more --iters
    python cyclegan.py --translate RUN --input FOLDER --to Y  # pictures of any size, or one

Two games as in dcgan.py, with pictures in place of noise. G_XY turns pictures of X into what
D_Y takes for Y. G_YX goes the other way. On its own, G_XY may turn any blue cat into any grumpy
one. The cycle ties the two together: from the translation, G_YX must restore the original. What
dcgan.py has too is explained there.

Unlike Zhu et al.: G doubles the size by copying pixels, and is smaller below 256 px. No norm
stands next to an image. D has no norm, and its gradient is clipped. Samples come from a running
average of each G. The flags closest to the paper are in assets/experiments.md.
"""
import copy
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import ImageOps
from torchvision.transforms.functional import center_crop, pil_to_tensor

import data
import diffaug
from data import RANK, WORLD

# ---- Networks ----
def init_weights(net):
    """N(0, 0.02) for the convolutions' weights (Radford et al. 2016)."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.02)

class ResidualBlock(nn.Module):
    """[B, C, H, W] -> the same: x + f(x). Padded by reflection, as a border of zeros would show."""

    def __init__(self, channels):
        super().__init__()
        self.f = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels), nn.ReLU(),
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels))

    def forward(self, x):
        return x + self.f(x)

def down_conv(inputs, outputs):
    """[B, C, H, W] -> [B, K, H / 2, W / 2]."""
    return [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.InstanceNorm2d(outputs), nn.ReLU()]

def up_conv(inputs, outputs):
    """[B, C, H, W] -> [B, K, 2H, 2W]. Pixels doubled first: no checkerboard (Odena et al. 2016)."""
    return [nn.Upsample(scale_factor=2), nn.Conv2d(inputs, outputs, 3, padding=1)]

class Generator(nn.Sequential):
    """Images [B, 3, H, W] -> images of the other set, the same shape, both in [-1, 1]; H, W multiples of 4.
    In the comments size 64, width 32. No norm next to the image, or dark and bright ones would look alike."""

    def __init__(self, size=64, width=32, blocks=3):
        if size == 256:  # two layers more, of 7 x 7
            inner = 4 * width
            down = [nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7), nn.ReLU(),
                    *down_conv(width, 2 * width), *down_conv(2 * width, inner)]
            up = [*up_conv(inner, 2 * width), nn.InstanceNorm2d(2 * width), nn.ReLU(),
                  *up_conv(2 * width, width), nn.ReLU(), nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7)]
        else:
            inner = 2 * width
            down = [nn.Conv2d(3, width, 3, stride=2, padding=1), nn.ReLU(),  # [B, 32, 32, 32]
                    *down_conv(width, inner)]  # [B, 64, 16, 16]
            up = [*up_conv(inner, width), nn.ReLU(), *up_conv(width, 3)]  # [B, 32, 32, 32], [B, 3, 64, 64]
        middle = [ResidualBlock(inner) for _ in range(blocks)]  # [B, 64, 16, 16]
        super().__init__(*down, *middle, *up, nn.Tanh())
        init_weights(self)

class Discriminator(nn.Sequential):
    """Images [B, 3, size, size] in [-1, 1] -> unbounded scores: [B, 1, 1, 1], of patches [B, 1, h, w].
    A patch has 70 x 70 pixels, at 64 px 34, at 32 px 16 (PatchGAN, Isola et al. 2017)."""

    def __init__(self, size=64, width=32, spectral=False, patch=False):
        strides = [2] * int(math.log2(size // 4))  # down to 4 x 4
        if patch:
            strides = {32: [2, 1], 64: [2, 2, 1]}.get(size, [2, 2, 2, 1])
        channels = width
        layers = [nn.Conv2d(3, channels, 4, strides[0], padding=1), nn.LeakyReLU(0.2)]  # [B, 32, 32, 32]
        for stride in strides[1:]:
            inputs, channels = channels, min(8 * width, 2 * channels)
            layers += [nn.Conv2d(inputs, channels, 4, stride, padding=1), nn.LeakyReLU(0.2)]
            # [B, 64, 16, 16], [B, 128, 8, 8], [B, 256, 4, 4]
        layers += [nn.Conv2d(channels, 1, 4, padding=1 if patch else 0)]  # no norm, no activation
        super().__init__(*layers)
        init_weights(self)
        if spectral:
            for layer in layers[:-1]:  # not the last, or scores stay near 0.5
                if isinstance(layer, nn.Conv2d):
                    nn.utils.parametrizations.spectral_norm(layer)

def build(args, device):
    Gs = [Generator(args.size, args.width, args.blocks) for _ in "XY"]
    Ds = [Discriminator(args.size, args.width, args.spectral_norm, args.patch) for _ in "XY"]
    layout = torch.contiguous_format if "mps" in str(device) else torch.channels_last
    return [net.to(device, memory_format=layout) for net in Gs + Ds]

class Pool:
    """Up to `size` earlier fakes. Half of D's fakes are old, lest it forget (Shrivastava et al. 2017)."""

    def __init__(self, size):
        self.size, self.images = size, torch.empty(0)

    def swap(self, fakes):
        """Fakes [B, C, H, W] -> as many. A full pool swaps each for an earlier one with probability 1/2."""
        self.images = self.images.to(fakes)  # those of a checkpoint are still on the CPU
        missing = self.size - len(self.images)
        if missing > 0 or not self.size:
            self.images = torch.cat([self.images, fakes[:missing]])
            return fakes
        slots = torch.rand(self.size, device=fakes.device).argsort()[:len(fakes)]  # different ones
        old, swapped = self.images[slots], diffaug.uniform(fakes, 0, 1) < 0.5
        self.images[slots] = torch.where(swapped, fakes, old)
        return torch.where(swapped, old, fakes)

    def state_dict(self):
        return {"images": self.images}

    def load_state_dict(self, state):
        self.images = state["images"]

# ---- One step ----
def step(G_XY, G_YX, D_X, D_Y, optim_G, optim_D, x, y, pools, args, autocast):
    """Train both D, then both G. x, y: float [B, 3, size, size] in [-1, 1]. Returns losses and scores."""
    with autocast:
        if args.identity:  # x to translate, y to keep: in one batch, as instance norm keeps images apart
            fake_y, same_y = G_XY(torch.cat([x, y])).float().chunk(2)
            fake_x, same_x = G_YX(torch.cat([y, x])).float().chunk(2)
        else:
            fake_y, fake_x = G_XY(x).float(), G_YX(y).float()

    # Train D. detach: D's loss must not reach G. Real and fake together: this D has no norm to mix them.
    losses, scores = {}, {}
    for name, D, real, fake, pool in (("D_X", D_X, x, fake_x, pools[0]), ("D_Y", D_Y, y, fake_y, pools[1])):
        D.requires_grad_(True)
        seen = diffaug.augment(torch.cat([real, pool.swap(fake.detach())]), args.diffaug)
        with autocast:
            score_real, score_fake = D(seen).float().chunk(2)
        losses[name] = ((score_real - 1) ** 2).mean() + (score_fake ** 2).mean()
        scores |= {f"{name}(real)": score_real.mean(), f"{name}(fake)": score_fake.mean()}
    (losses["D_X"] + losses["D_Y"]).backward()
    average_over_processes(weight.grad for D in (D_X, D_Y) for weight in D.parameters())
    for D in (D_X, D_Y):  # as in dcgan.py, where D's loss leapt without it
        nn.utils.clip_grad_norm_(D.parameters(), 1)
    optim_D.step()
    optim_D.zero_grad()

    # Train G, through D that stand still.
    D_X.requires_grad_(False)
    D_Y.requires_grad_(False)
    with autocast:
        score_x = D_X(diffaug.augment(fake_x, args.diffaug)).float()
        score_y = D_Y(diffaug.augment(fake_y, args.diffaug)).float()
    losses |= {"G_XY": ((score_y - 1) ** 2).mean(), "G_YX": ((score_x - 1) ** 2).mean()}
    loss_G = losses["G_XY"] + losses["G_YX"]
    if args.cycle != "none":
        with autocast:
            back_x, back_y = G_YX(fake_y).float(), G_XY(fake_x).float()
        distance = F.mse_loss if args.cycle == "l2" else F.l1_loss
        losses |= {"cycle_X": distance(back_x, x), "cycle_Y": distance(back_y, y)}
        loss_G = loss_G + args.lambda_cycle * (losses["cycle_X"] + losses["cycle_Y"])
    if args.identity:
        losses["identity"] = F.l1_loss(same_y, y) + F.l1_loss(same_x, x)
        loss_G = loss_G + args.identity * losses["identity"]
    loss_G.backward()
    average_over_processes(weight.grad for G in (G_XY, G_YX) for weight in G.parameters())
    optim_G.step()
    optim_G.zero_grad()
    return {name: value.detach() for name, value in (losses | scores).items()}

def average_over_processes(tensors):
    if WORLD > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= WORLD

# ---- The loop ----
def setup(args):
    """-> the device, and a context in which networks compute in bf16 or float32, as --dtype says."""
    torch.empty(33_000_000, dtype=torch.uint8)  # freed at once: Linux then lets us keep memory, 10 % faster
    with data.mendable(f"--device {args.device} (any computer has --device cpu)"):
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        device = torch.device(found if args.device == "auto" else args.device)
        if str(device) == "cuda":  # without a number
            device = torch.device("cuda", dist.get_node_local_rank() if WORLD > 1 else 0)
        torch.zeros(1, device=device)
    bf16 = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = not args.translate  # whose pictures differ in shape
        bf16 = torch.cuda.get_device_capability() >= (8, 0)
    if WORLD > 1:
        dist.init_process_group("gloo" if device.type == "cpu" else None)  # None: what suits a GPU
    bf16 = args.dtype == "bf16" or (args.dtype == "auto" and bf16)
    return device, torch.autocast(device.type, torch.bfloat16, enabled=bf16)

def optimizer(nets, rate):
    return torch.optim.Adam(nn.ModuleList(nets).parameters(), rate, betas=(0.5, 0.999), fused=True)

def floats(*nets):
    """Weights, and the estimates of spectral norm."""
    return [value for net in nets for value in net.state_dict().values()]

def train(args, checkpoint):
    device, autocast = setup(args)
    sets = [data.load_images(source, data.load_size(args.size, args.deluxe)) for source in (args.X, args.Y)]
    if device.type != "cuda" or sets[0].nbytes + sets[1].nbytes < torch.cuda.mem_get_info()[0] / 3:
        sets = [images.to(device) for images in sets]
    drawn = {args.X, args.Y} == set(data.DRAWN)
    if drawn:  # cats that are in neither set, each in both breeds: the right answers
        true_x, true_y = [torch.cat([cat for _, cat in read_pictures(name, args.size)]).to(device)
                          for name in (args.X, args.Y)]

    torch.manual_seed(args.seed)
    G_XY, G_YX, D_X, D_Y = nets = build(args, device)
    ema_XY, ema_YX = [copy.deepcopy(G).requires_grad_(False) for G in (G_XY, G_YX)]
    optim_G, optim_D = optimizer([G_XY, G_YX], args.g_lr), optimizer([D_X, D_Y], args.d_lr)
    pools = Pool(args.pool), Pool(args.pool)
    parts = {"G_XY": G_XY, "G_YX": G_YX, "D_X": D_X, "D_Y": D_Y, "ema_XY": ema_XY, "ema_YX": ema_YX,
             "optim_G": optim_G, "optim_D": optim_D, "pool_X": pools[0], "pool_Y": pools[1]}
    iteration, rows, recent = 0, [], {}
    if checkpoint:
        data.restore(parts, checkpoint)
        iteration, rows = checkpoint["iteration"], checkpoint["rows"]
        recent = {name: [value.to(device) for value in old] for name, old in checkpoint["recent"].items()}
    ema_values, G_values = floats(ema_XY, ema_YX), floats(G_XY, G_YX)
    few = min(8, len(sets[0]), len(sets[1]))
    fixed_x, fixed_y = [center_crop(images[:few].to(device), args.size) / 127.5 - 1 for images in sets]
    folder = Path(args.resume or data.new_folder(args.out, f"out/{args.name}"))
    data.say(f"{folder}: {len(sets[0])} images of {args.X} and {len(sets[1])} of {args.Y} at {args.size} px, "
             f"on {device}, deluxe {args.deluxe or 'none'}, diffaug {args.diffaug or 'none'}")

    signals, stop = data.catch_signals(), False
    first, start = iteration, time.perf_counter()
    rng = torch.default_generator if device.type == "cpu" else torch.get_device_module(device)
    while iteration < args.iters and not stop:
        iteration += 1
        rng.manual_seed(args.seed * 1_000_003 + iteration * WORLD + RANK)
        fade = min(1, 2 - 2 * iteration / (args.iters + 1)) if args.decay else 1  # 1 to half-way, then to 0
        optim_G.param_groups[0]["lr"], optim_D.param_groups[0]["lr"] = args.g_lr * fade, args.d_lr * fade
        k = (iteration - 1) * WORLD + RANK
        x, y = [data.deluxe(data.batch(images, args.batch, k, args.seed + i, device), args.size, args.deluxe)
                for i, images in enumerate(sets)]
        losses = step(G_XY, G_YX, D_X, D_Y, optim_G, optim_D, x, y, pools, args, autocast)
        # The averages move towards G. They span a tenth of all iterations so far, at most 1 / (1 - --ema).
        torch._foreach_lerp_(ema_values, G_values, 1 - min(args.ema, (1 + iteration) / (10 + iteration)))
        for name, value in losses.items():
            recent.setdefault(name, []).append(value)
        last = iteration == args.iters
        stop = WORLD == 1 and len(signals) > 0
        if WORLD > 1 and iteration % 10 == 0:
            caught = torch.tensor(len(signals), device=device)
            dist.all_reduce(caught)
            stop = caught.item() > 0
        log = last or iteration % args.log_every == 0
        sample = RANK == 0 and (last or iteration % args.sample_every == 0)
        save = RANK == 0 and (last or stop or iteration % args.save_every == 0)
        if log or save:
            data.check_finite(floats(*nets), recent, iteration)
        if log:
            row = {name: torch.stack(values).mean() for name, values in recent.items()}
            average_over_processes(row.values())
            if drawn:  # mean |difference| of translations and right answers
                errors = F.l1_loss(ema_XY(true_x), true_y) + F.l1_loss(ema_YX(true_y), true_x)
                row["truth_error"] = errors / 2
            row["images/s"] = args.batch * WORLD * (iteration - first) / (time.perf_counter() - start)
            rows.append({"iteration": iteration, **{name: float(f"{row[name]:.5g}") for name in row}})
            recent, first, start = {}, iteration, time.perf_counter()
        if save:  # before all that is for show, and may fail
            data.save_checkpoint({
                "program": "cyclegan", "iteration": iteration, "rows": rows, "recent": recent,
                "options": vars(args), **{name: part.state_dict() for name, part in parts.items()}}, folder)
        if log:
            data.status(rows[-1], args)
        with data.mendable("not written", fatal=False):  # what is for show ends no run
            if sample:
                fake_y, fake_x = ema_XY(fixed_x), ema_YX(fixed_y)
                sheet = torch.cat([fixed_x, fake_y, ema_YX(fake_y), fixed_y, fake_x, ema_XY(fake_x)])
                data.save_sheet(sheet, folder, iteration, columns=few)
            if save:
                data.save_views(rows, folder, last or stop)

    if WORLD > 1:
        dist.destroy_process_group()
    data.end(folder, iteration, args)

# ---- Translating ----
def read_pictures(source, side):
    """Yield (name, float [1, 3, H, W] in [-1, 1]) of each image; of a drawn set, its held-out cats. The
    shorter side becomes `side` pixels."""
    def convert(image):
        return pil_to_tensor(ImageOps.cover(data.to_rgb(image), (side, side)))[None] / 127.5 - 1

    return data.read(source, data.find_images(source, held_out=True), convert)

@torch.no_grad()
def translate(args, checkpoint):
    """Write a PNG per input to RUN/translated_to_X or _Y: under its own name, at its own proportions."""
    device, _ = setup(args)
    G, folder = build(args, device)[0], None
    data.restore({"ema_XY" if args.to == "Y" else "ema_YX": G}, checkpoint)
    for name, image in read_pictures(args.input, args.size):
        folder = folder or data.new_folder(args.out, Path(args.translate) / f"translated_to_{args.to}")
        height, width = image.shape[2:]
        padded = F.pad(image, (0, -width % 4, 0, -height % 4), mode="replicate")  # G halves sides twice
        result = G(padded.to(device))[:, :, :height, :width]
        path = data.unused(folder / data.shorten(Path(name).stem), ".png")  # two inputs may share it
        with data.mendable(f"can't write {path}", OSError):
            data.save_png(data.to_pillow(result), path)
    data.say(str(folder))

# ---- Options ----
def options(argv=None):
    parser = data.new_parser(__doc__)
    arg = parser.add_argument_group("data").add_argument
    arg("--X", type=data.path, default="toy-blue", help="folder or .zip; drawn: toy-grumpy, toy-blue")
    arg("--Y", type=data.path, default="toy-grumpy", help="the other set: unpaired")
    data.add_images(arg)
    arg = parser.add_argument_group("networks").add_argument
    arg("--width", type=int, default=32, help="channels of the first layer (32)")
    arg("--blocks", type=int, help="residual blocks of G: more for larger changes (3; at 256 px 9)")
    arg("--patch", action="store_true", help="D scores overlapping patches: texture more than shape")
    arg("--spectral-norm", action="store_true", help="in both D: limits how steeply they respond")
    arg = parser.add_argument_group("training").add_argument
    arg("--cycle", nargs="?", const="l1", default="none", choices=("l1", "l2", "none"),
        help="a translation must lead back to its original (alone: l1)")
    arg("--lambda-cycle", type=float, help="weight of that (2); less: more change")
    arg("--identity", type=float, default=2.0, help="weight: G_XY must leave Y as it is; keeps colours (2)")
    arg("--pool", type=int, default=50, help="earlier fakes to show D again (50)")
    arg("--g-lr", type=float, default=1e-3, help="learning rate of both G (1e-3)")
    arg("--d-lr", type=float, default=1e-3, help="learning rate of both D (1e-3)")
    arg("--decay", action="store_true", help="rates fall to 0 in the second half of --iters")
    arg("--batch", type=int, default=4, help="images of each set per iteration and process (4)")
    arg("--iters", type=int, default=10000, help="iterations: steps of all networks (10000)")
    arg("--ema", type=float, default=0.999, help="decay of the averaged generators; 0: no average (0.999)")
    arg = parser.add_argument_group("the run").add_argument
    arg("--translate", type=data.path, metavar="RUN", help="translate with this run's averaged generators")
    arg("--input", type=data.path, metavar="PATH", help="an image, a folder or .zip of them, or drawn cats")
    arg("--to", choices=("X", "Y"), default="Y", help="translate into this set (Y)")
    data.add_run(arg)
    args, checkpoint = data.parse(parser, argv, "cyclegan", "translate")
    if args.cycle == "none" and args.lambda_cycle != parser.get_default("lambda_cycle"):
        parser.error("--lambda-cycle needs --cycle")
    if args.lambda_cycle is None:
        args.lambda_cycle = 2.0
    if args.blocks is None:
        args.blocks = 9 if args.size == 256 else 3
    data.check(parser, args, checkpoint, "translate", fixed="size width blocks patch spectral_norm")
    if (args.translate is None) != (args.input is None):
        parser.error("--translate RUN and --input PATH go together")
    if not all(0 <= n < math.inf for n in (args.lambda_cycle, args.identity, args.pool, args.blocks)):
        parser.error("--lambda-cycle, --identity, --blocks and --pool can't be negative or infinite")
    if (args.X in data.DRAWN) != (args.Y in data.DRAWN):
        parser.error("--X and --Y go together, and drawn cats with drawn cats")
    if 0 < args.pool < args.batch:
        parser.error("--pool needs to be 0, or at least --batch")
    return args, checkpoint

if __name__ == "__main__":
    with data.one_line_errors():
        args, checkpoint = options()
        (translate if args.translate else train)(args, checkpoint)
