"""DCGAN: cats from noise (Radford et al. 2016), with the loss of LSGAN (Mao et al. 2017).

    python dcgan.py --deluxe --diffaug                # drawn cats, no download; look into out/
    python dcgan.py --deluxe --diffaug --data FOLDER  # your own pictures
    python dcgan.py --resume RUN                      # go on after a stop, or with more --iters
    python dcgan.py --sample RUN --n 64               # images, latent walk, nearest training images

Two networks play against each other. The generator G turns noise z into an image. The
discriminator D learns to score real images 1 and G's fakes 0. G learns to make fakes that D
scores 1. Nobody ever tells G what a cat is.

Unlike Radford et al.: G doubles the size by copying pixels. The noise steers its norms, a random
pattern helps to make fur. D has no norm, its gradient is clipped, from 128 px on it sees how much
a batch varies. Samples come from an average of G. assets/experiments.md has the paper's flags.
"""
import argparse
import copy
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms.functional import center_crop

import data
import diffaug
from data import RANK, WORLD

# ---- Networks ----
class Modulated(nn.BatchNorm2d):
    """Batch norm, then the noise scales and shifts each channel: self-modulation (Chen et al. 2019).
    Then each adds its share of random pixels, to make fur of (Karras et al. 2019): here always the same ones.
    x [B, C, side, side], z [B, Z, 1, 1] -> [B, C, side, side]."""

    def __init__(self, channels, z, side):
        super().__init__(channels, affine=False)
        self.style = nn.Conv2d(z, 2 * channels, 1)
        self.share = nn.Parameter(torch.zeros(channels, 1, 1))
        self.register_buffer("pattern", torch.randn(1, side, side))

    def forward(self, x, z):
        scale, shift = self.style(z).chunk(2, dim=1)
        x = torch.addcmul(shift, super().forward(x), 1 + scale)  # shift + x * (1 + scale)
        return x + (self.share * self.pattern).to(x.dtype)

class MinibatchStd(nn.Module):
    """[B, C, H, W] -> [B, C + 1, H, W]: adds how much the batch varies (Karras et al. 2018)."""

    def forward(self, x):
        apart = x.float() - x.float().mean(dim=0)  # faster than var()
        deviation = apart.square().mean(dim=0).add(1e-8).sqrt().mean().to(x.dtype)
        return torch.cat([x, deviation.expand(len(x), 1, *x.shape[2:])], dim=1)

def norm_layers(norm, channels, z=None, side=None):
    if norm == "modulated":
        return [Modulated(channels, z, side)]
    plain = {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d}
    return [plain[norm](channels)] if norm in plain else []

def init_weights(net):
    """N(0, 0.02) for the convolutions' weights (Radford et al. 2016)."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, std=0.02)

class Generator(nn.Sequential):
    """Noise [B, z, 1, 1] -> images [B, 3, size, size] in [-1, 1]. In the comments size 64, width 32."""

    def __init__(self, size=64, width=32, z=32, up="resize", norm="modulated", selu=False):
        bias = norm == "none"  # a norm would take it out again
        activation = nn.SELU() if selu else nn.ReLU()
        side, channels = 4, min(8, size // 8) * width
        layers = [nn.ConvTranspose2d(z, channels, 4, bias=bias)]  # [B, 256, 4, 4]
        layers += [*norm_layers(norm, channels, z, side), activation]
        while side < size:
            side *= 2
            inputs, channels = channels, min(8 * width, width * size // side // 2)  # at full size width / 2
            if up == "transpose":
                layers += [nn.ConvTranspose2d(inputs, channels, 4, stride=2, padding=1, bias=bias)]
            else:  # pixels doubled first: no checkerboard to start from (Odena et al. 2016)
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(inputs, channels, 3, padding=1, bias=bias)]
            layers += [*norm_layers(norm, channels, z, side), activation]
            # [B, 128, 8, 8], [B, 64, 16, 16], [B, 32, 32, 32], [B, 16, 64, 64]
        layers += [nn.Conv2d(channels, 3, 3, padding=1), nn.Tanh()]  # [B, 3, 64, 64]
        super().__init__(*layers)
        init_weights(self)

    def forward(self, z):
        x = z
        *layers, last, tanh = self
        for layer in layers:
            x = layer(x, z) if isinstance(layer, Modulated) else layer(x)
        with torch.autocast(x.device.type, enabled=False):  # no pixel is rounded to bf16
            return tanh(last(x.float()))

class Discriminator(nn.Sequential):
    """Images [B, 3, size, size] in [-1, 1] -> unbounded scores: [B, 1, 1, 1], of patches [B, 1, h, w].
    patch=True is a PatchGAN (Isola et al. 2017): convolutions see 70 x 70 pixels, at 64 px 34, at 32 px 16.
    spectral=True divides all weight matrices but the last by their spectral norms (Miyato et al. 2018)."""

    def __init__(self, size=64, width=32, norm="none", spectral=False, patch=False, selu=False, std=False):
        strides = [2] * int(math.log2(size // 4))  # down to 4 x 4
        if patch:
            strides = {32: [2, 1], 64: [2, 2, 1]}.get(size, [2, 2, 2, 1])
        activation = nn.SELU() if selu else nn.LeakyReLU(0.2)
        channels = width
        layers = [nn.Conv2d(3, channels, 4, strides[0], padding=1), activation]
        for stride in strides[1:]:
            inputs, channels = channels, min(8 * width, 2 * channels)
            layers += [nn.Conv2d(inputs, channels, 4, stride, padding=1, bias=norm == "none")]
            layers += [*norm_layers(norm, channels), activation]
            # after the first layer [B, 32, 32, 32], then [B, 64, 16, 16], [B, 128, 8, 8], [B, 256, 4, 4]
        if std:
            layers += [MinibatchStd()]
            channels += 1
        layers += [nn.Conv2d(channels, 1, 4, padding=1 if patch else 0)]  # no norm, no activation
        super().__init__(*layers)
        init_weights(self)
        if spectral:
            for layer in layers[:-1]:  # not the last, or scores stay near 0.5
                if isinstance(layer, nn.Conv2d):
                    nn.utils.parametrizations.spectral_norm(layer)

def build(args, device):
    G = Generator(args.size, args.width, args.z, args.up, args.norm, args.selu)
    D = Discriminator(args.size, args.width, args.d_norm, args.spectral_norm, args.patch, args.selu,
                      args.minibatch_std)
    layout = torch.contiguous_format if "mps" in str(device) else torch.channels_last  # slow on Apple's GPUs
    return [net.to(device, memory_format=layout) for net in (G, D)]

# ---- Losses ----
def d_losses(D, real, fake, score_real, score_fake, args):
    """Images that D saw and its scores of them -> D's losses by name. It learns from their sum."""
    target = diffaug.uniform(score_real, *args.smooth)  # 1, or one-sided smoothing (Salimans et al. 2016)
    if args.loss == "lsgan":  # Mao et al. 2017, equation 9, doubled
        return {"D_real": ((score_real - target) ** 2).mean(), "D_fake": (score_fake ** 2).mean()}
    if args.loss == "vanilla":  # Goodfellow et al. 2014: the score's sigmoid is a probability
        return {"D_real": F.binary_cross_entropy_with_logits(score_real, target.expand_as(score_real)),
                "D_fake": F.softplus(score_fake).mean()}
    losses = {"D_real": -score_real.mean(), "D_fake": score_fake.mean()}  # Arjovsky et al. 2017
    if args.loss == "wgan-gp":
        losses["penalty"] = 10 * gradient_penalty(D, real, fake)
    return losses

def gradient_penalty(D, real, fake):
    """Mean (|gradient of D| - 1)^2 at random points between real and fake (Gulrajani et al. 2017)."""
    between = torch.lerp(real, fake, diffaug.uniform(real, 0, 1)).requires_grad_()
    score = D(between).mean(dim=(1, 2, 3))  # of an image: its patches' mean
    gradient, = torch.autograd.grad(score.sum(), between, create_graph=True)
    return ((gradient.flatten(1).norm(dim=1) - 1) ** 2).mean()

def g_loss(score, args):
    """D's scores of G's images -> G's loss."""
    if args.loss == "lsgan":
        return ((score - args.g_target) ** 2).mean()
    if args.loss == "vanilla":  # -log D(G(z)): steeper than log(1 - D(G(z))) where D is sure
        return F.softplus(-score).mean()
    return -score.mean()

def mean_score(score, args):
    """For the log: with the vanilla loss, a probability."""
    return (score.sigmoid() if args.loss == "vanilla" else score).mean()

# ---- One step ----
def step(G, D, optim_G, optim_D, real, train_G, args, autocast):
    """Train D, and G if train_G. real: float [B, 3, size, size] in [-1, 1].
    Returns losses and scores by name: tensors, as .item() would wait for the device."""
    z = torch.randn(len(real), args.z, 1, 1, device=real.device)
    with autocast:
        fake = G(z)  # once for D's step and G's. Pixels, augmentation and losses are in float32

    # Train D. detach: D's loss must not reach G. Real and fake apart: no norm may mix their statistics.
    D.requires_grad_(True)
    seen_real, seen_fake = diffaug.augment(real, args.diffaug), diffaug.augment(fake.detach(), args.diffaug)
    with autocast:
        score_real, score_fake = D(seen_real).float(), D(seen_fake).float()
    losses = d_losses(D, seen_real, seen_fake, score_real, score_fake, args)
    sum(losses.values()).backward()
    average_over_processes(weight.grad for weight in D.parameters())
    # Without this cut D's loss leapt, at 128 px, to 300,000. Adam remembers that for long: tiny steps.
    nn.utils.clip_grad_norm_(D.parameters(), 1)
    optim_D.step()
    optim_D.zero_grad()
    if args.loss == "wgan":
        for weight in D.parameters():
            weight.data.clamp_(-0.01, 0.01)

    # Train G, through a D that stands still.
    if train_G:
        D.requires_grad_(False)
        with autocast:
            score = D(diffaug.augment(fake, args.diffaug)).float()
        losses["G"] = g_loss(score, args)
        losses["G"].backward()
        average_over_processes(weight.grad for weight in G.parameters())
        optim_G.step()
        optim_G.zero_grad()

    losses |= {"D(real)": mean_score(score_real, args), "D(fake)": mean_score(score_fake, args)}
    return {name: value.detach() for name, value in losses.items()}

def average_over_processes(tensors):
    """In place. Of gradients: so that all processes take the same step."""
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
        torch.backends.cudnn.benchmark = True
        bf16 = torch.cuda.get_device_capability() >= (8, 0)
    if WORLD > 1:
        dist.init_process_group("gloo" if device.type == "cpu" else None)  # None: what suits a GPU
    bf16 = args.dtype == "bf16" or (args.dtype == "auto" and bf16)
    return device, torch.autocast(device.type, torch.bfloat16, enabled=bf16)

def optimizer(net, rate, args):
    if args.loss == "wgan":  # momentum harms a D with clipped weights (Arjovsky et al. 2017)
        return torch.optim.RMSprop(net.parameters(), rate)
    return torch.optim.Adam(net.parameters(), rate, betas=(args.beta1, 0.999), fused=True)

def floats(*nets):
    """Weights, patterns, running statistics: all values that are not counts."""
    return [value for net in nets for value in net.state_dict().values() if value.is_floating_point()]

def hold_out(images, n):
    """-> the images to train on, and n of them, evenly spread, that stay out of training."""
    out = torch.zeros(len(images), dtype=torch.bool)
    out[[i * len(images) // n for i in range(n)]] = True
    return images[~out], images[out]

@torch.no_grad()
def score_as_they_are(D, images, args):
    """D's mean score of float images, not augmented. In batches as in training: D may look at a batch."""
    D = copy.deepcopy(D)  # a look would change the estimates of spectral norm
    batches = center_crop(images, args.size).tensor_split(max(1, len(images) // args.batch))
    return mean_score(torch.cat([D(batch) for batch in batches]), args).item()

def train(args, checkpoint):
    device, autocast = setup(args)
    images = data.load_images(args.data, data.load_size(args.size, args.deluxe))
    if args.hold_out:
        if not args.batch <= args.hold_out <= len(images) // 2:
            raise data.BadInput(f"--hold-out: at least --batch, at most half of {len(images)} images")
        if vars(args).setdefault("images", len(images)) != len(images):  # in the checkpoint, too
            raise data.BadInput("--hold-out: the images have changed since the run began")
        images, unseen = hold_out(images, args.hold_out)
        _, trained = hold_out(images, args.hold_out)  # as many that it trains on
        trained, unseen = [some.to(device) / 127.5 - 1 for some in (trained, unseen)]
    if device.type != "cuda" or images.nbytes < torch.cuda.mem_get_info()[0] / 3:
        images = images.to(device)  # a larger set stays on the CPU

    torch.manual_seed(args.seed)
    G, D = build(args, device)
    ema = copy.deepcopy(G).eval().requires_grad_(False)  # the averaged generator, which draws all samples
    optim_G, optim_D = optimizer(G, args.g_lr, args), optimizer(D, args.d_lr, args)
    parts = {"G": G, "D": D, "ema": ema, "optim_G": optim_G, "optim_D": optim_D}
    iteration, rows, recent = 0, [], {}  # rows of the log, and the losses since the last row
    if checkpoint:
        data.restore(parts, checkpoint)
        for optim in optim_G, optim_D:
            optim.param_groups[0].update(optim.defaults)  # --g-lr, --d-lr and --beta1 may be new
        iteration, rows = checkpoint["iteration"], checkpoint["rows"]
        recent = {name: [value.to(device) for value in old] for name, old in checkpoint["recent"].items()}
    ema_values, G_values = floats(ema), floats(G)
    fixed_z = torch.randn(64, args.z, 1, 1, generator=torch.Generator().manual_seed(args.seed)).to(device)
    folder = Path(args.resume or data.new_folder(args.out, f"out/{args.name}"))
    data.say(f"{folder}: {len(images)} images of {args.data} at {args.size} px, on {device}, "
             f"deluxe {args.deluxe or 'none'}, diffaug {args.diffaug or 'none'}")

    signals, stop = data.catch_signals(), False
    first, start = iteration, time.perf_counter()  # where a row of the log begins: for images/s
    rng = torch.default_generator if device.type == "cpu" else torch.get_device_module(device)
    while iteration < args.iters and not stop:
        iteration += 1
        # A seed for each iteration: a resumed run draws the same numbers as one that never stopped.
        rng.manual_seed(args.seed * 1_000_003 + iteration * WORLD + RANK)
        batch = data.batch(images, args.batch, (iteration - 1) * WORLD + RANK, args.seed, device)
        real = data.deluxe(batch, args.size, args.deluxe)
        train_G = iteration % args.critic_iters == 0
        losses = step(G, D, optim_G, optim_D, real, train_G, args, autocast)
        if train_G:
            # The average moves towards G. It spans a tenth of all iterations so far, at most 1 / (1 - --ema).
            torch._foreach_lerp_(ema_values, G_values, 1 - min(args.ema, (1 + iteration) / (10 + iteration)))
        for name, value in losses.items():
            recent.setdefault(name, []).append(value)
        last = iteration == args.iters
        stop = WORLD == 1 and len(signals) > 0
        if WORLD > 1 and iteration % 10 == 0:  # all have to stop at the same iteration: they ask each other
            caught = torch.tensor(len(signals), device=device)
            dist.all_reduce(caught)
            stop = caught.item() > 0
        log = last or iteration % args.log_every == 0
        sample = RANK == 0 and (last or iteration % args.sample_every == 0)
        save = RANK == 0 and (last or stop or iteration % args.save_every == 0)
        if log or save:
            data.check_finite(floats(G, D), recent, iteration)
        if log:
            row = {name: torch.stack(values).mean() for name, values in recent.items()}
            average_over_processes(row.values())
            if args.hold_out:
                for name, some in ("trained", trained), ("unseen", unseen), ("generated", ema(fixed_z)):
                    row[f"D({name})"] = score_as_they_are(D, some, args)
            row["images/s"] = args.batch * WORLD * (iteration - first) / (time.perf_counter() - start)
            rows.append({"iteration": iteration, **{name: float(f"{row[name]:.5g}") for name in row}})
            recent, first, start = {}, iteration, time.perf_counter()
        if save:  # before all that is for show, and may fail
            data.save_checkpoint({
                "program": "dcgan", "iteration": iteration, "rows": rows, "recent": recent,
                "options": vars(args), **{name: part.state_dict() for name, part in parts.items()}}, folder)
        if log:
            data.status(rows[-1], args)
        with data.mendable("not written", fatal=False):  # what is for show ends no run
            if sample:
                data.save_sheet(ema(fixed_z), folder, iteration)
            if save:
                data.save_views(rows, folder, last or stop)

    if WORLD > 1:
        dist.destroy_process_group()
    data.end(folder, iteration, args)

# ---- Sampling ----
def slerp(a, b, t):
    """From a to b along the sphere: on the straight line, noise is too short."""
    angle = torch.acos(F.cosine_similarity(a, b))[:, None]
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)

def nearest(fakes, images):
    """For float fakes [N, 3, S, S] the closest of uint8 images [M, 3, S, S] or mirrored ones, as float."""
    images = torch.cat([images, images.flip(3)])
    small = torch.cat([F.adaptive_avg_pool2d(part / 127.5 - 1, 32).flatten(1) for part in images.split(256)])
    distances = torch.cdist(F.adaptive_avg_pool2d(fakes, 32).flatten(1), small)
    return images[distances.argmin(dim=1)] / 127.5 - 1

@torch.no_grad()
def sample(args, checkpoint):
    """Write RUN/generated/: grid.png, images/, walk.gif, walk.png, nearest.png."""
    device, _ = setup(args)
    G = build(args, device)[0].eval()
    data.restore({"ema": G}, checkpoint)
    generator = torch.Generator().manual_seed(args.seed)
    z, ends = torch.randn(args.n + 6, args.z, 1, 1, generator=generator).split([args.n, 6])
    walk = [slerp(ends, ends.roll(-1, 0), t / 16) for t in range(16)]  # six, each to where the next begins
    made = torch.cat([G(part.to(device)).cpu() for part in torch.cat([z, *walk]).split(64)])
    fakes, walk = made[:args.n], made[args.n:].split(6)
    folder = data.new_folder(args.out, Path(args.sample) / "generated")
    with data.mendable(f"can't write {folder}", OSError):
        for i, fake in enumerate(fakes):
            data.save_png(data.to_pillow(fake[None]), folder / "images" / f"{i:05d}.png")
        data.save_png(data.to_pillow(fakes), folder / "grid.png")
        data.save_png(data.to_pillow(torch.stack(walk[::2], dim=1).flatten(0, 1)), folder / "walk.png")
        data.save_gif([data.to_pillow(row) for row in walk], folder / "walk.gif", 100)
        data.say(f"{folder}: images, grid.png, walk.gif, walk.png")
        with data.mendable("no nearest.png", (data.BadInput, IndexError), fatal=False):  # images may be gone
            images, _ = hold_out(data.load_images(args.data, args.size), args.hold_out)
            pairs = torch.cat([fakes, nearest(fakes, images)], dim=2)
            data.save_png(data.to_pillow(pairs), folder / "nearest.png")

# ---- Options ----
def options(argv=None):
    parser = data.new_parser(__doc__)
    arg = parser.add_argument_group("data").add_argument
    arg("--data", type=data.path, default="toy-grumpy", help="folder or .zip; drawn: toy-grumpy, toy-blue")
    data.add_images(arg)
    arg("--hold-out", type=int, default=0, metavar="N",
        help="keep N images, at least --batch, out of training: does D know the others by heart? (0)")
    arg = parser.add_argument_group("networks").add_argument
    arg("--width", type=int, default=32, help="channels of D's first layer (32)")
    arg("--z", type=int, default=32, help="length of the noise z (32)")
    arg("--up", choices=("resize", "transpose"), default="resize", help="how G doubles the size (resize)")
    arg("--norm", choices=("modulated", "batch", "instance", "none"),
        help="norm in G; modulated: batch norm, scaled and shifted by z (modulated; --selu: none)")
    arg("--d-norm", choices=("batch", "instance", "none"), help="norm in D (none; wgan: batch)")
    arg("--spectral-norm", action="store_true", help="on D's weights: limits how steeply D responds")
    arg("--patch", action="store_true", help="D scores overlapping patches: texture more than shape")
    arg("--selu", action="store_true", help="SELU in place of norms and ReLU, in both networks")
    arg("--minibatch-std", action=argparse.BooleanOptionalAction,
        help="show D how much a batch varies (from 128 px on, but for --patch and wgan-gp)")
    arg = parser.add_argument_group("training").add_argument
    arg("--loss", choices=("lsgan", "vanilla", "wgan", "wgan-gp"), default="lsgan",
        help="squared distance; log-likelihood; the last two with D of limited slope (lsgan)")
    arg("--critic-iters", type=int, metavar="N", help="train G at every N-th iteration (1; both wgan: 5)")
    arg("--smooth", type=float, nargs=2, default=(1.0, 1.0), metavar=("LO", "HI"),
        help="lsgan, vanilla: D's target for real images, at random; 0.8 0.9 if D is too sure (1 1)")
    arg("--g-target", type=float, default=1.0, help="the score that G aims at, with lsgan (1)")
    arg("--g-lr", type=float, default=4e-4, help="learning rate of G (4e-4)")
    arg("--d-lr", type=float, default=8e-4, help="learning rate of D (8e-4)")
    arg("--beta1", type=float, default=0.5, help="momentum of Adam; StyleGAN has 0 (0.5)")
    arg("--batch", type=int, default=16, help="images per iteration and process (16)")
    arg("--iters", type=int, default=6400, help="iterations: steps of D (6400)")
    arg("--ema", type=float, default=0.999, help="decay of the averaged generator; 0: no average (0.999)")
    arg = parser.add_argument_group("the run").add_argument
    arg("--sample", type=data.path, metavar="RUN", help="draw from this run's averaged generator")
    arg("--n", type=int, default=64, help="images to draw (64)")
    data.add_run(arg)
    args, checkpoint = data.parse(parser, argv, "dcgan", "sample")
    if args.critic_iters is None:
        args.critic_iters = 5 if args.loss.startswith("wgan") else 1
    if args.minibatch_std is None:
        args.minibatch_std = args.size > 64 and not args.patch and args.loss != "wgan-gp"
    args.norm = args.norm or ("none" if args.selu else "modulated")
    if args.d_norm is None:  # clipped weights are small: without a norm, D's signals fade from layer to layer
        args.d_norm = "batch" if args.loss == "wgan" and not (args.selu or args.spectral_norm) else "none"
    data.check(parser, args, checkpoint, "sample",
               fixed="size width z up norm d_norm spectral_norm patch selu minibatch_std loss hold_out")
    if min(args.width - 1, args.z - 1, args.n, args.critic_iters) < 1:
        parser.error("--n and --critic-iters need at least 1, --width and --z 2")
    if not (0 <= args.smooth[0] <= args.smooth[1] <= 1 and -1 <= args.g_target <= 2 and 0 <= args.beta1 < 1):
        parser.error("--smooth needs 0 <= LO <= HI <= 1, --g-target -1 to 2, 0 <= --beta1 < 1")
    if args.loss == "wgan-gp" and (args.d_norm == "batch" or args.minibatch_std):
        parser.error("wgan-gp scores each image alone: no --d-norm batch, no --minibatch-std")
    return args, checkpoint

if __name__ == "__main__":
    with data.one_line_errors():
        args, checkpoint = options()
        (sample if args.sample else train)(args, checkpoint)
