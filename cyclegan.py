"""CycleGAN: blue cats into grumpy cats and back, from unpaired pictures (Zhu et al. 2017).

    python cyclegan.py --patch --cycle                        # drawn cats; look into out/
    python cyclegan.py --patch --cycle --X FOLDER --Y FOLDER  # your own two sets of pictures
    python cyclegan.py --resume RUN                           # after a stop, or with more --iters
    python cyclegan.py --translate RUN --input FOLDER --to Y  # pictures of any size, or one

Two games as in dcgan.py, with pictures for noise. G_XY turns pictures of X into what D_Y takes
for Y. G_YX goes the other way. On its own, G_XY may turn any blue cat into any grumpy one. The
cycle ties the two together: from the translation, G_YX must restore the original.
"""
import copy
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms.functional import center_crop, pil_to_tensor

import data
import diffaug

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

# ---- Options ----
FIXED = "size width blocks patch".split()  # once trained


def options(argv=None):
    """-> the options, and the checkpoint of the run that they name, or None."""
    parser = data.new_parser(__doc__)
    arg = parser.add_argument_group("data").add_argument
    arg("--X", default="toy-blue", help="folder or .zip of images; drawn: toy-grumpy, toy-blue")
    arg("--Y", default="toy-grumpy", help="the other set: unpaired")
    data.add_images(arg)
    arg = parser.add_argument_group("networks").add_argument
    arg("--width", type=int, default=32, help="channels of the first layer (32); 64: better, slower")
    arg("--blocks", type=int, help="residual blocks of G: more for larger changes (3; at 256 px 9)")
    arg("--patch", action="store_true", help="D scores overlapping patches: texture more than shape")
    arg = parser.add_argument_group("training").add_argument
    arg("--cycle", nargs="?", const="l1", default="none", choices=("l1", "l2", "none"),
        help="a translation must lead back to its original (plain: l1)")
    arg("--lambda-cycle", type=float, default=2.0, help="weight of that (2); less: more change")
    arg("--identity", type=float, default=2.0,
        help="weight: G_XY must leave Y as it is, which keeps colours (2)")
    arg("--pool", type=int, default=50, help="earlier fakes to show D again (50)")
    arg("--g-lr", type=float, default=1e-3, help="learning rate of both G (1e-3)")
    arg("--d-lr", type=float, default=1e-3, help="learning rate of both D (1e-3)")
    arg("--decay", action="store_true", help="rates fall to 0 in the second half of the run")
    arg("--batch", type=int, default=4, help="images of each set per iteration and process (4)")
    arg("--iters", type=int, default=10000, help="iterations: steps of all networks (10000)")
    arg("--ema", type=float, default=0.999, help="decay of the averaged generators; 0: no average (0.999)")
    arg = parser.add_argument_group("the run").add_argument
    arg("--translate", metavar="RUN", help="translate with this run's averaged generators")
    arg("--input", metavar="PATH", help="an image, a folder or .zip of them, or drawn cats")
    arg("--to", choices=("X", "Y"), default="Y", help="translate into this set (Y)")
    data.add_run(arg)
    args, checkpoint = data.parse(parser, argv, "cyclegan", FIXED, "translate")
    if (args.translate is None) != (args.input is None):
        parser.error("--translate RUN and --input PATH go together")
    if not (0 <= args.lambda_cycle < math.inf and 0 <= args.identity < math.inf and args.pool >= 0):
        parser.error("--lambda-cycle, --identity and --pool can't be negative")
    if (args.X in data.DRAWN) != (args.Y in data.DRAWN):
        parser.error("--X and --Y go together, and drawn cats with drawn cats")
    if 0 < args.pool < args.batch:
        parser.error("--pool needs to be 0, or at least --batch")
    if args.blocks is None:
        args.blocks = 9 if args.size == 256 else 3
    return args, checkpoint


# ---- Networks ----
class UpConv(nn.Conv2d):
    """Nearest-neighbour upsampling x2, then a 3x3 convolution: [B, C, H, W] -> [B, K, 2H, 2W]. See
    dcgan.py: weights of equal pixels are added first."""

    def __init__(self, inputs, outputs, bias=True):
        super().__init__(inputs, outputs, 3, bias=bias)
        self.register_buffer("fold", torch.tensor([[0., 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]]), False)

    def forward(self, x):
        kernel = torch.einsum("ia,jb,kcab->ckij", self.fold, self.fold, self.weight)  # [C, K, 4, 4]
        return F.conv_transpose2d(x, kernel, self.bias, stride=2, padding=1)


def init_weights(net):
    """N(0, 0.02) for the convolutions' weights (Radford et al. 2016)."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
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


class Generator(nn.Sequential):
    """Images [B, 3, H, W] -> images of the other set, the same shape, both in [-1, 1]; H, W multiples of 4.

    In the comments size 64, width 32. At 256 px and width 64 it is the paper's, with 7x7 layers at both ends,
    but UpConv, and no norms next to the image: they would make a bright image equal to a dark one.
    """

    def __init__(self, size=64, width=32, blocks=3):
        inner = 2 * width
        down = [nn.Conv2d(3, width, 3, stride=2, padding=1), nn.ReLU(),  # [B, 32, 32, 32]
                nn.Conv2d(width, inner, 3, stride=2, padding=1)]  # [B, 64, 16, 16]
        up = [UpConv(inner, width), nn.ReLU(), UpConv(width, 3)]  # [B, 32, 32, 32], [B, 3, 64, 64]
        if size == 256:
            inner = 4 * width
            down = [nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7), nn.ReLU(),
                    nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
                    nn.InstanceNorm2d(2 * width), nn.ReLU(),
                    nn.Conv2d(2 * width, inner, 3, stride=2, padding=1)]
            up = [UpConv(inner, 2 * width), nn.InstanceNorm2d(2 * width), nn.ReLU(),
                  UpConv(2 * width, width), nn.ReLU(), nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7)]
        middle = [ResidualBlock(inner) for _ in range(blocks)]
        super().__init__(*down, nn.InstanceNorm2d(inner), nn.ReLU(), *middle, *up, nn.Tanh())
        init_weights(self)


class Discriminator(nn.Sequential):
    """Images [B, 3, size, size] in [-1, 1] -> unbounded scores: [B, 1, 1, 1], of patches [B, 1, h, w].
    patch=True is a PatchGAN (Isola et al. 2017): a score has seen 70 x 70 pixels, at 64 px 34 x 34."""

    def __init__(self, size=64, width=32, patch=False):
        halvings = min(3, int(math.log2(size)) - 4) if patch else int(math.log2(size)) - 2
        layers, inputs = [], 3
        for i in range(halvings + 1 if patch else halvings):  # a PatchGAN has one more, of stride 1
            channels, stride = width * 2 ** i, 2 if i < halvings else 1
            layers += [nn.Conv2d(inputs, channels, 4, stride, padding=1), nn.LeakyReLU(0.2)]
            inputs = channels  # [B, 32, 32, 32], [B, 64, 16, 16], [B, 128, 8, 8], [B, 256, 4, 4]
        layers += [nn.Conv2d(inputs, 1, 4, padding=1 if patch else 0)]  # no norm, no activation
        super().__init__(*layers)
        init_weights(self)


def build(args, device):
    Gs = [Generator(args.size, args.width, args.blocks) for _ in "XY"]
    Ds = [Discriminator(args.size, args.width, args.patch) for _ in "XY"]
    return [net.to(device, memory_format=torch.channels_last) for net in Gs + Ds]


class Pool:
    """Up to `size` earlier fakes, half of the fakes that D sees, lest it forget (Shrivastava et al. 2017)."""

    def __init__(self, size):
        self.size, self.images = size, torch.empty(0)

    def swap(self, fakes):
        """Fakes [B, C, H, W] -> as many. A full pool swaps each for an earlier one with probability 1/2."""
        self.images = self.images.to(fakes)  # a checkpoint is read on the CPU
        missing = self.size - len(self.images)
        if missing > 0 or not self.size:
            self.images = torch.cat([self.images, fakes[:missing]])
            return fakes
        slots = torch.rand(self.size, device=fakes.device).argsort()[:len(fakes)]  # different ones
        old, keep = self.images[slots], torch.rand(len(fakes), 1, 1, 1, device=fakes.device) < 0.5
        self.images[slots] = torch.where(keep, fakes, old)
        return torch.where(keep, old, fakes)

    def state_dict(self):
        return {"images": self.images}

    def load_state_dict(self, state):
        self.images = state["images"][:self.size]


# ---- One step ----
def step(G_XY, G_YX, D_X, D_Y, optim_G, optim_D, x, y, pools, args, autocast):
    """Train both D, then both G. x, y: float [B, 3, size, size] in [-1, 1].
    Returns a tensor of COLUMNS, not yet weighted."""
    with autocast:
        if args.identity:  # x is translated, y should stay: at once, as instance norm takes each image alone
            fake_y, same_y = G_XY(torch.cat([x, y])).float().chunk(2)
            fake_x, same_x = G_YX(torch.cat([y, x])).float().chunk(2)
        else:
            fake_y, fake_x = G_XY(x).float(), G_YX(y).float()

    # Train D. detach: D's loss must not reach G. Real and fake together: this D has no norm.
    losses_D, scores = [], []
    for D, real, fake, pool in ((D_X, x, fake_x, pools[0]), (D_Y, y, fake_y, pools[1])):
        D.requires_grad_(True)
        seen = diffaug.augment(torch.cat([real, pool.swap(fake.detach())]), args.diffaug)
        with autocast:
            score_real, score_fake = D(seen).float().chunk(2)
        losses_D.append(((score_real - 1) ** 2).mean() + (score_fake ** 2).mean())
        scores += [score_real.mean(), score_fake.mean()]
    (losses_D[0] + losses_D[1]).backward()
    for D in (D_X, D_Y):
        average_gradients(D)
        nn.utils.clip_grad_norm_(D.parameters(), 1)  # see dcgan.py
        D.requires_grad_(False)
    optim_D.step()
    optim_D.zero_grad()

    # Train G, through D that stand still.
    with autocast:
        score_x = D_X(diffaug.augment(fake_x, args.diffaug)).float()
        score_y = D_Y(diffaug.augment(fake_y, args.diffaug)).float()
    loss_XY, loss_YX = ((score_y - 1) ** 2).mean(), ((score_x - 1) ** 2).mean()
    cycle_x = cycle_y = identity = torch.zeros_like(loss_XY)
    if args.cycle != "none":
        distance = F.mse_loss if args.cycle == "l2" else F.l1_loss
        with autocast:
            back_x, back_y = G_YX(fake_y).float(), G_XY(fake_x).float()
        cycle_x, cycle_y = distance(back_x, x), distance(back_y, y)
    if args.identity:
        identity = F.l1_loss(same_y, y) + F.l1_loss(same_x, x)
    (loss_XY + loss_YX + args.lambda_cycle * (cycle_x + cycle_y) + args.identity * identity).backward()
    average_gradients(G_XY)
    average_gradients(G_YX)
    optim_G.step()
    optim_G.zero_grad()
    return torch.stack([*losses_D, loss_XY, loss_YX, cycle_x, cycle_y, identity, *scores]).detach()


def average_gradients(net):
    """Over all processes, so that they take the same step."""
    if WORLD > 1:
        for weight in net.parameters():
            dist.all_reduce(weight.grad)
            weight.grad /= WORLD


@torch.no_grad()
def average(ema, G, decay, iteration):
    """Move the averaged generator towards G, at first fast, to forget the random start."""
    decay = min(decay, (1 + iteration) / (10 + iteration))
    for mean, now in zip(ema.parameters(), G.parameters()):
        mean.lerp_(now, 1 - decay)


# ---- The loop ----
COLUMNS = ["D_X", "D_Y", "G_XY", "G_YX", "cycle_X", "cycle_Y", "identity",
           "D_X(real)", "D_X(fake)", "D_Y(real)", "D_Y(fake)"]  # of the log; truth_error follows


def setup(args):
    """-> the device, and the networks' precision: a context."""
    found = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    if args.device not in ("auto", "cpu", found):
        raise data.BadInput(f"--device {args.device}: torch finds only {found}")
    device = torch.device(found if args.device == "auto" else args.device)
    bf16 = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)  # native
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
        bf16 = torch.cuda.get_device_capability() >= (8, 0)
    if WORLD > 1:
        dist.init_process_group()
    bf16 = args.dtype == "bf16" or args.dtype == "auto" and bf16
    return device, torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def optimizer(nets, rate):
    weights = [weight for net in nets for weight in net.parameters()]
    return torch.optim.Adam(weights, rate, betas=(0.5, 0.999), fused=True)


def train(args, checkpoint):
    if checkpoint and checkpoint["iteration"] >= args.iters:
        return print(f"{args.resume} is at iteration {checkpoint['iteration']}; give more --iters")
    device, autocast = setup(args)
    sets = [data.load_images(source, data.load_size(args.size, args.deluxe)) for source in (args.X, args.Y)]
    if device.type != "cuda" or sets[0].nbytes + sets[1].nbytes < torch.cuda.mem_get_info()[0] / 3:
        sets = [images.to(device) for images in sets]  # larger sets stay on the CPU
    truth = None  # drawn cats that are in neither set, each in both breeds: the right answers
    if {args.X, args.Y} == set(data.DRAWN):
        truth = [torch.cat([cat for _, cat in read_pictures(name, args.size)]).to(device)
                 for name in (args.X, args.Y)]

    torch.manual_seed(args.seed)
    G_XY, G_YX, D_X, D_Y = nets = build(args, device)
    ema_XY, ema_YX = copy.deepcopy(G_XY), copy.deepcopy(G_YX)
    if args.compile:
        for net in nets:
            net.forward = torch.compile(net.forward)
    optim_G, optim_D = optimizer([G_XY, G_YX], args.g_lr), optimizer([D_X, D_Y], args.d_lr)
    pools = Pool(args.pool), Pool(args.pool)
    parts = {"G_XY": G_XY, "G_YX": G_YX, "D_X": D_X, "D_Y": D_Y, "ema_XY": ema_XY, "ema_YX": ema_YX,
             "optim_G": optim_G, "optim_D": optim_D, "pool_X": pools[0], "pool_Y": pools[1]}
    iteration, rows, sums = 0, [], torch.zeros(len(COLUMNS) + 2, device=device)
    if checkpoint:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        iteration, rows, sums = checkpoint["iteration"], checkpoint["rows"], checkpoint["sums"].to(device)
        sums[-1] = 0  # a stop that was asked for then
    folder = Path(args.resume) if args.resume else data.new_folder(args.out, f"out/{args.name}")
    print(f"{folder}: {len(sets[0])} images of {args.X} and {len(sets[1])} of {args.Y} at {args.size} px, "
          f"on {device}, deluxe {args.deluxe or 'none'}, diffaug {args.diffaug or 'none'}", flush=True)
    few = min(8, *map(len, sets))
    fixed_x, fixed_y = [center_crop(images[:few].to(device), args.size) / 127.5 - 1 for images in sets]

    signals, stop, first, start = [], False, iteration, time.perf_counter()
    for kind in (signal.SIGINT, signal.SIGTERM):  # both end the loop in good order
        signal.signal(kind, lambda number, frame: signals.append(number))
    while iteration < args.iters and not stop:
        iteration += 1
        # Its randomness follows from its number: a resumed run has none to restore.
        torch.manual_seed(args.seed * 1_000_003 + iteration * WORLD + RANK)
        decay = min(1, 2 - 2 * iteration / (args.iters + 1)) if args.decay else 1
        optim_G.param_groups[0]["lr"], optim_D.param_groups[0]["lr"] = args.g_lr * decay, args.d_lr * decay
        k = (iteration - 1) * WORLD + RANK
        x, y = [data.deluxe(data.batch(images, args.batch, k, args.seed + i, device), args.size, args.deluxe)
                for i, images in enumerate(sets)]
        losses = step(G_XY, G_YX, D_X, D_Y, optim_G, optim_D, x, y, pools, args, autocast)
        average(ema_XY, G_XY, args.ema, iteration)
        average(ema_YX, G_YX, args.ema, iteration)

        # Since the last row: losses, iterations, whether any process was told to stop.
        sums[:-2] += losses
        sums[-2] += 1
        sums[-1] += len(signals)
        last, stop = iteration == args.iters, bool(signals) and WORLD == 1
        if iteration % args.log_every == 0 or last:
            if WORLD > 1:
                dist.all_reduce(sums)
            data.check_finite([sums], iteration)  # the one place that waits for the device
            *means, count, told = sums.tolist()
            means, stop = [float(f"{mean / count:.5g}") for mean in means], told > 0
            error = 0.0
            if truth:
                with torch.no_grad():
                    error = F.l1_loss(ema_XY(truth[0]), truth[1]) + F.l1_loss(ema_YX(truth[1]), truth[0])
            means.append(float(f"{error / 2:.5g}"))
            seconds = (time.perf_counter() - start) / (iteration - first)
            rows.append([iteration, *means, round(args.batch * WORLD / seconds, 1)])
            shown = [f"{name} {mean:#.3g}" for name, mean in zip(COLUMNS[:6], means)]
            print(f"{iteration}/{args.iters}", *shown, f"{rows[-1][-1]:.0f} images/s",
                  f"{seconds * (args.iters - iteration) / 60:.0f} min left", sep="  ", flush=True)
            sums.zero_()
            first, start = iteration, time.perf_counter()
        if RANK == 0 and (iteration % args.sample_every == 0 or last):
            with torch.no_grad():
                y, x = ema_XY(fixed_x), ema_YX(fixed_y)
                images = torch.cat([fixed_x, y, ema_YX(y), fixed_y, x, ema_XY(x)])
            data.save_grid(images, folder / "samples" / f"{iteration:06d}.png", columns=few)
        if RANK == 0 and (iteration % args.save_every == 0 or last or stop):
            weights = [weight for net in nets for weight in net.state_dict().values()]
            data.check_finite([sums, *weights], iteration)
            data.save_checkpoint({
                "program": "cyclegan", "iteration": iteration, "rows": rows, "sums": sums,
                "options": vars(args) | {"out": None, "resume": None, "device": "auto"},
                **{name: part.state_dict() for name, part in parts.items()}}, folder / "ckpt.pt")
            data.save_views(COLUMNS + ["truth_error"], rows, folder, gif=last or stop)
    stop = iteration < args.iters
    print("stopped" if stop else "finished", f"at iteration {iteration}: {folder}")
    if WORLD > 1:
        dist.destroy_process_group()
    if stop:
        print(f"go on with: python cyclegan.py --resume {folder}")
        sys.exit(128 + signals[0] if signals else 143)


# ---- Translating ----
def read_pictures(source, side):
    """Yield (name for the result, float [1, 3, H, W] in [-1, 1]) for each image of a source; for a drawn set,
    of its held-out cats. The shorter side becomes `side` pixels."""
    def resize(image):
        image, scale = data.to_rgb(image), side / min(image.size)
        return image.resize([round(scale * n) for n in image.size])

    taken = set()
    for name, image in data.read(source, data.find_images(source, held_out=True), resize):
        name = Path(name).stem
        while name.lower() in taken:  # in another folder or format
            name += "-2"
        taken.add(name.lower())
        yield f"{name}.png", pil_to_tensor(image)[None] / 127.5 - 1


@torch.no_grad()
def translate(args, checkpoint):
    """Write a PNG per input to RUN/translated_to_X or _Y: under its own name, at its own proportions."""
    device, _ = setup(args)
    G = build(args, device)[0]
    G.load_state_dict(checkpoint["ema_XY" if args.to == "Y" else "ema_YX"])
    folder = None
    for name, image in read_pictures(args.input, args.size):
        folder = folder or data.new_folder(args.out, Path(args.translate) / f"translated_to_{args.to}")
        height, width = image.shape[2:]
        padded = F.pad(image, (0, -width % 4, 0, -height % 4), mode="replicate")  # G halves sides twice
        data.save_grid(G(padded.to(device))[:, :, :height, :width], folder / name)
    print(folder)


if __name__ == "__main__":
    with data.one_line_errors():
        args, checkpoint = options()
        (translate if args.translate else train)(args, checkpoint)
