"""DCGAN: cats from noise (Radford et al. 2016), with the loss of LSGAN (Mao et al. 2017).

    python dcgan.py --deluxe --diffaug                # drawn cats, no download; look into out/
    python dcgan.py --deluxe --diffaug --data FOLDER  # your own pictures
    python dcgan.py --resume RUN                      # go on after a stop, or with more --iters
    python dcgan.py --sample RUN --n 64               # images, latent walk, nearest training images

Two networks play against each other. The generator G turns noise z into an image. The
discriminator D learns to score real images 1 and G's fakes 0. G learns to make fakes that D
scores 1. Nobody ever tells G what a cat is.
"""
import argparse
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
from torchvision.transforms.functional import to_pil_image

import data
import diffaug

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

# ---- Options ----
FIXED = "size width z up norm d_norm spectral_norm patch selu minibatch_std loss".split()  # once trained


def options(argv=None):
    """-> the options, and the checkpoint of the run that they name, or None."""
    parser = data.new_parser(__doc__)
    arg = parser.add_argument_group("data").add_argument
    arg("--data", default="toy-grumpy", help="folder or .zip of images; drawn: toy-grumpy, toy-blue")
    data.add_images(arg)
    arg = parser.add_argument_group("networks").add_argument
    arg("--width", type=int, default=32, help="channels of D's first layer (32); 64: better, slower")
    arg("--z", type=int, default=32, help="length of the noise z (32)")
    arg("--up", choices=("resize", "transpose"), default="resize", help="how G doubles the size (resize)")
    arg("--norm", choices=("modulated", "batch", "instance", "none"), default="modulated",
        help="norm in G; modulated: batch, scaled by z (modulated)")
    arg("--d-norm", choices=("batch", "instance", "none"), help="norm in D (none; wgan: batch)")
    arg("--spectral-norm", action="store_true", help="in D, in place of a norm: calms losses that jump")
    arg("--patch", action="store_true", help="D scores overlapping patches: texture more than shape")
    arg("--selu", action="store_true", help="SELU in place of norms and ReLU, in both networks")
    arg("--minibatch-std", action=argparse.BooleanOptionalAction, default=True,
        help="show D how much a batch varies (on)")
    arg = parser.add_argument_group("training").add_argument
    arg("--loss", choices=("lsgan", "vanilla", "wgan", "wgan-gp"), default="lsgan", help="(lsgan)")
    arg("--critic-iters", type=int, metavar="N", help="train G at every N-th iteration (1; both wgan: 5)")
    arg("--smooth", type=float, nargs=2, default=(1.0, 1.0), metavar=("LO", "HI"),
        help="draw D's target for real images from U(LO, HI): 0.8 0.9 if D is too sure (1 1)")
    arg("--g-target", type=float, default=1.0, help="the score that G aims at, with lsgan (1)")
    arg("--g-lr", type=float, default=4e-4, help="learning rate of G (4e-4)")
    arg("--d-lr", type=float, default=8e-4, help="learning rate of D (8e-4)")
    arg("--batch", type=int, default=16, help="images per iteration and process (16)")
    arg("--iters", type=int, default=6400, help="steps of D (6400)")
    arg("--ema", type=float, default=0.999, help="decay of the averaged generator; 0: no average (0.999)")
    arg = parser.add_argument_group("the run").add_argument
    arg("--sample", metavar="RUN", help="draw from this run's averaged generator")
    arg("--n", type=int, default=64, help="images to draw (64)")
    data.add_run(arg)
    args, checkpoint = data.parse(parser, argv, "dcgan", FIXED, "sample")
    if args.critic_iters is None:
        args.critic_iters = 5 if args.loss.startswith("wgan") else 1
    args.d_norm = args.d_norm or ("batch" if args.loss == "wgan" else "none")  # clipped: signals fade
    if min(args.width - 1, args.z - 1, args.n, args.critic_iters) < 1:
        parser.error("--n and --critic-iters need at least 1, --width and --z 2")
    if not (0 <= args.smooth[0] <= args.smooth[1] <= 1 and -1 <= args.g_target <= 2):
        parser.error("--smooth needs 0 <= LO <= HI <= 1, --g-target -1 to 2")
    if args.loss == "wgan-gp" and (args.d_norm == "batch" or args.compile):
        parser.error("wgan-gp goes neither with --d-norm batch nor with --compile")
    return args, checkpoint


# ---- Networks ----
class UpConv(nn.Conv2d):
    """Nearest-neighbour upsampling x2, then a 3x3 convolution: [B, C, H, W] -> [B, K, 2H, 2W].

    It starts without a transposed convolution's checkerboard (Odena et al. 2016). Weights that meet equal
    pixels are added first: with a b c doubled to a a b b c c, the first b becomes w0 a + (w1 + w2) b, the
    second (w0 + w1) b + w2 c. So: a transposed one with the kernel w2, w1 + w2, w0 + w1, w0."""

    def __init__(self, inputs, outputs, bias=True):
        super().__init__(inputs, outputs, 3, bias=bias)
        self.register_buffer("fold", torch.tensor([[0., 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]]), False)

    def forward(self, x):
        kernel = torch.einsum("ia,jb,kcab->ckij", self.fold, self.fold, self.weight)  # [C, K, 4, 4]
        return F.conv_transpose2d(x, kernel, self.bias, stride=2, padding=1)


class Modulated(nn.BatchNorm2d):
    """Batch norm, then the noise scales and shifts each channel: self-modulation (Chen et al. 2019).
    x [B, C, H, W], z [B, Z, 1, 1] -> [B, C, H, W]."""

    def __init__(self, channels, z):
        super().__init__(channels, affine=False)
        self.style = nn.Conv2d(z, 2 * channels, 1)

    def forward(self, x, z):
        scale, shift = self.style(z).chunk(2, dim=1)
        return torch.addcmul(shift, super().forward(x), 1 + scale)


class MinibatchStd(nn.Module):
    """[B, C, H, W] -> [B, C + 1, H, W]: append the standard deviation over the batch, averaged over all else
    (Karras et al. 2018). It shows D when G repeats itself."""

    def forward(self, x):
        apart = x.float() - x.float().mean(dim=0)  # faster than var()
        deviation = apart.square().mean(dim=0).add(1e-8).sqrt().mean().to(x.dtype)
        return torch.cat([x, deviation.expand(len(x), 1, *x.shape[2:])], dim=1)


def norm_layer(norm, channels):
    return {"batch": [nn.BatchNorm2d(channels)], "instance": [nn.InstanceNorm2d(channels)], "none": []}[norm]


def init_weights(net):
    """N(0, 0.02) for the convolutions' weights (Radford et al. 2016)."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, std=0.02)


class Generator(nn.Sequential):
    """Noise [B, z, 1, 1] -> images [B, 3, size, size] in [-1, 1]. In the comments size 64, width 32."""

    def __init__(self, size=64, width=32, z=32, up="resize", norm="modulated", selu=False):
        norm = "none" if selu else norm
        bias = norm == "none"  # a norm subtracts the mean, and a constant with it
        layers, inputs = [], z
        for i in reversed(range(int(math.log2(size)) - 1)):
            channels = width * 2 ** i // 2  # [B, 256, 4, 4], [B, 128, 8, 8], ..., [B, 16, 64, 64]
            layers += [UpConv(inputs, channels, bias) if layers and up == "resize" else
                       nn.ConvTranspose2d(inputs, channels, 4, 2, padding=1 if layers else 0, bias=bias)]
            layers += [Modulated(channels, z)] if norm == "modulated" else norm_layer(norm, channels)
            layers += [nn.SELU() if selu else nn.ReLU()]
            inputs = channels
        # Upsampled pixels are much alike. The last layer draws detail.
        super().__init__(*layers, nn.Conv2d(inputs, 3, 3, padding=1), nn.Tanh())
        init_weights(self)

    def forward(self, z):
        x = z
        for layer in self:
            x = layer(x, z) if isinstance(layer, Modulated) else layer(x)
        return x


class Discriminator(nn.Sequential):
    """Images [B, 3, size, size] in [-1, 1] -> unbounded scores: [B, 1, 1, 1], of patches [B, 1, h, w].
    patch=True is a PatchGAN (Isola et al. 2017): a score has seen 70 x 70 pixels, at 64 px 34 x 34. Spectral
    normalisation (Miyato et al. 2018) bounds D's slope: divides weights by their largest singular value."""

    def __init__(self, size=64, width=32, norm="none", spectral=False, patch=False, selu=False, std=True):
        norm = "none" if spectral or selu else norm
        halvings = min(3, int(math.log2(size)) - 4) if patch else int(math.log2(size)) - 2
        layers, inputs = [], 3
        for i in range(halvings + 1 if patch else halvings):  # a PatchGAN has one more, of stride 1
            channels, stride = width * 2 ** i, 2 if i < halvings else 1
            layers += [nn.Conv2d(inputs, channels, 4, stride, padding=1, bias=i == 0 or norm == "none")]
            layers += norm_layer(norm if i > 0 else "none", channels)
            layers += [nn.SELU() if selu else nn.LeakyReLU(0.2)]
            inputs = channels  # [B, 32, 32, 32], [B, 64, 16, 16], [B, 128, 8, 8], [B, 256, 4, 4]
        layers += [MinibatchStd()] if std else []
        layers += [nn.Conv2d(inputs + std, 1, 4, padding=int(patch))]  # no norm, no activation
        super().__init__(*layers)
        init_weights(self)
        for layer in self if spectral else ():
            if isinstance(layer, nn.Conv2d):
                nn.utils.parametrizations.spectral_norm(layer)


def build(args, device):
    G = Generator(args.size, args.width, args.z, args.up, args.norm, args.selu)
    D = Discriminator(args.size, args.width, args.d_norm, args.spectral_norm, args.patch, args.selu,
                      args.minibatch_std)
    return [net.to(device, memory_format=torch.channels_last) for net in (G, D)]


# ---- Losses ----
def d_losses(real, fake, args):
    """D's scores of real and of fake images -> its loss on each."""
    target = diffaug.uniform(real, *args.smooth)  # one-sided (Salimans et al. 2016)
    if args.loss == "lsgan":  # Mao et al. 2017, equation 9
        return ((real - target) ** 2).mean(), (fake ** 2).mean()
    if args.loss == "vanilla":  # Goodfellow et al. 2014: -t log D(x) - (1 - t) log(1 - D(x)), D a sigmoid
        return (F.softplus(real) - target * real).mean(), F.softplus(fake).mean()
    return -real.mean(), fake.mean()  # Arjovsky et al. 2017


def g_loss(fake, args):
    """D's scores of G's images -> G's loss."""
    if args.loss == "lsgan":
        return ((fake - args.g_target) ** 2).mean()
    if args.loss == "vanilla":  # -log D(G(z)): steeper than log(1 - D(G(z))) where D is sure
        return F.softplus(-fake).mean()
    return -fake.mean()


def gradient_penalty(D, real, fake):
    """Mean (|gradient of D| - 1)^2 at random points between real and fake (Gulrajani et al. 2017)."""
    between = torch.lerp(real, fake, diffaug.uniform(real, 0, 1)).requires_grad_()
    score = D(between).mean(dim=(1, 2, 3))  # of an image: its patches' mean
    gradient, = torch.autograd.grad(score.sum(), between, create_graph=True)
    return ((gradient.flatten(1).norm(dim=1) - 1) ** 2).mean()


# ---- One step ----
def step(G, D, optim_G, optim_D, real, train_G, args, autocast):
    """Train D, and G if train_G. real: float [B, 3, size, size] in [-1, 1].
    Returns a tensor of COLUMNS. With the vanilla loss, scores are probabilities."""
    z = torch.randn(len(real), args.z, 1, 1, device=real.device)
    with autocast, torch.set_grad_enabled(train_G):
        fake = G(z)  # once for D's step and G's
    fake = fake.float()  # losses and augmentation in float32

    # Train D. detach: D's loss must not reach G. Real and fake apart: no norm may see both.
    D.requires_grad_(True)
    seen_real, seen_fake = diffaug.augment(torch.cat([real, fake.detach()]), args.diffaug).chunk(2)
    with autocast:
        score_real, score_fake = D(seen_real).float(), D(seen_fake).float()
    loss_real, loss_fake = d_losses(score_real, score_fake, args)
    gp = args.loss == "wgan-gp"
    penalty = gradient_penalty(D, seen_real, seen_fake) if gp else torch.zeros_like(loss_real)
    (loss_real + loss_fake + 10 * penalty).backward()
    average_gradients(D)
    # Nothing bounds D's scores, and a squared loss's gradient grows with them. So the large step after one
    # odd batch could ruin D. Cutting the gradient to norm 1 ends that.
    nn.utils.clip_grad_norm_(D.parameters(), 1)
    optim_D.step()
    optim_D.zero_grad()
    if args.loss == "wgan":
        for weight in D.parameters():
            weight.data.clamp_(-0.01, 0.01)

    # Train G, through a D that stands still.
    loss_G = g_loss(score_fake, args)  # only logged, if G rests
    if train_G:
        D.requires_grad_(False)
        with autocast:
            score = D(diffaug.augment(fake, args.diffaug)).float()
        loss_G = g_loss(score, args)
        loss_G.backward()
        average_gradients(G)
        optim_G.step()
        optim_G.zero_grad()

    if args.loss == "vanilla":
        score_real, score_fake = score_real.sigmoid(), score_fake.sigmoid()
    return torch.stack([loss_real, loss_fake, loss_G, score_real.mean(), score_fake.mean(), penalty]).detach()


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
    for mean, now in zip(ema.state_dict().values(), G.state_dict().values()):
        if mean.is_floating_point():  # weights, and the statistics of batch norm
            mean.lerp_(now, 1 - decay)


# ---- The loop ----
COLUMNS = ["D_real", "D_fake", "G", "D(real)", "D(fake)", "penalty"]  # of the log


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


def optimizer(net, rate, loss):
    if loss == "wgan":  # momentum harms a D with clipped weights (Arjovsky et al. 2017)
        return torch.optim.RMSprop(net.parameters(), rate)
    return torch.optim.Adam(net.parameters(), rate, betas=(0.5, 0.999), fused=True)


def train(args, checkpoint):
    if checkpoint and checkpoint["iteration"] >= args.iters:
        return print(f"{args.resume} is at iteration {checkpoint['iteration']}; give more --iters")
    device, autocast = setup(args)
    images = data.load_images(args.data, data.load_size(args.size, args.deluxe))
    if device.type != "cuda" or images.nbytes < torch.cuda.mem_get_info()[0] / 3:
        images = images.to(device)  # a larger set stays on the CPU

    torch.manual_seed(args.seed)
    G, D = build(args, device)
    ema = copy.deepcopy(G).eval()
    if args.compile:
        G.forward, D.forward = torch.compile(G.forward), torch.compile(D.forward)
    optim_G, optim_D = optimizer(G, args.g_lr, args.loss), optimizer(D, args.d_lr, args.loss)
    parts = {"G": G, "D": D, "ema": ema, "optim_G": optim_G, "optim_D": optim_D}
    iteration, rows, sums = 0, [], torch.zeros(len(COLUMNS) + 2, device=device)
    if checkpoint:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        optim_G.param_groups[0]["lr"], optim_D.param_groups[0]["lr"] = args.g_lr, args.d_lr
        iteration, rows, sums = checkpoint["iteration"], checkpoint["rows"], checkpoint["sums"].to(device)
        sums[-1] = 0  # a stop that was asked for then
    folder = Path(args.resume) if args.resume else data.new_folder(args.out, f"out/{args.name}")
    print(f"{folder}: {len(images)} images of {args.data} at {args.size} px, on {device}, "
          f"deluxe {args.deluxe or 'none'}, diffaug {args.diffaug or 'none'}", flush=True)
    fixed_z = torch.randn(64, args.z, 1, 1, generator=torch.Generator().manual_seed(args.seed)).to(device)

    signals, stop, first, start = [], False, iteration, time.perf_counter()
    for kind in (signal.SIGINT, signal.SIGTERM):  # both end the loop in good order
        signal.signal(kind, lambda number, frame: signals.append(number))
    while iteration < args.iters and not stop:
        iteration += 1
        # Its randomness follows from its number: a resumed run has none to restore.
        torch.manual_seed(args.seed * 1_000_003 + iteration * WORLD + RANK)
        batch = data.batch(images, args.batch, (iteration - 1) * WORLD + RANK, args.seed, device)
        real = data.deluxe(batch, args.size, args.deluxe)
        train_G = iteration % args.critic_iters == 0
        losses = step(G, D, optim_G, optim_D, real, train_G, args, autocast)
        if train_G:
            average(ema, G, args.ema, iteration)

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
            seconds = (time.perf_counter() - start) / (iteration - first)
            rows.append([iteration, *means, round(args.batch * WORLD / seconds, 1)])
            shown = [f"{name} {mean:#.3g}" for name, mean in zip(COLUMNS[:5], means)]
            print(f"{iteration}/{args.iters}", *shown, f"{rows[-1][-1]:.0f} images/s",
                  f"{seconds * (args.iters - iteration) / 60:.0f} min left", sep="  ", flush=True)
            sums.zero_()
            first, start = iteration, time.perf_counter()
        if RANK == 0 and (iteration % args.sample_every == 0 or last):
            with torch.no_grad():
                data.save_grid(ema(fixed_z), folder / "samples" / f"{iteration:06d}.png")
        if RANK == 0 and (iteration % args.save_every == 0 or last or stop):
            data.check_finite([sums, *G.state_dict().values(), *D.state_dict().values()], iteration)
            data.save_checkpoint({
                "program": "dcgan", "iteration": iteration, "rows": rows, "sums": sums,
                "options": vars(args) | {"out": None, "resume": None, "device": "auto"},
                **{name: part.state_dict() for name, part in parts.items()}}, folder / "ckpt.pt")
            data.save_views(COLUMNS, rows, folder, gif=last or stop)
    stop = iteration < args.iters
    print("stopped" if stop else "finished", f"at iteration {iteration}: {folder}")
    if WORLD > 1:
        dist.destroy_process_group()
    if stop:
        print(f"go on with: python dcgan.py --resume {folder}")
        sys.exit(128 + signals[0] if signals else 143)


# ---- Sampling ----
def slerp(a, b, t):
    """From a to b along the sphere: on the straight line, noise is too short."""
    angle = torch.acos(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def nearest(fakes, images):
    """For float fakes [N, 3, S, S] the closest of the uint8 images [M, 3, S, S] and their mirror images, at
    32 x 32 pixels: float [N, 3, S, S]."""
    images = torch.cat([images, images.flip(3)])
    small = torch.cat([F.adaptive_avg_pool2d(part / 127.5 - 1, 32).flatten(1) for part in images.split(256)])
    distances = torch.cdist(F.adaptive_avg_pool2d(fakes, 32).flatten(1), small)
    return images[distances.argmin(dim=1)] / 127.5 - 1


@torch.no_grad()
def sample(args, checkpoint):
    """Write RUN/generated/: grid.png, images/, walk.gif, walk.png, nearest.png."""
    device, _ = setup(args)
    G = build(args, device)[0].eval()
    G.load_state_dict(checkpoint["ema"])
    z = torch.randn(args.n + 6, args.z, 1, 1, generator=torch.Generator().manual_seed(args.seed))
    z, ends = z[:args.n], z[args.n:]
    walk = [slerp(a, b, t / 16) for a, b in zip(ends, ends.roll(-1, 0)) for t in range(16)]
    images = torch.cat([G(part.to(device)).cpu() for part in torch.cat([z, torch.stack(walk)]).split(64)])
    fakes, walk = images[:args.n], images[args.n:]
    folder = data.new_folder(args.out, Path(args.sample) / "generated")
    for i, image in enumerate(fakes):
        data.save_grid(image[None], folder / "images" / f"{i:05d}.png")
    data.save_grid(fakes, folder / "grid.png")
    data.save_grid(walk[::2], folder / "walk.png")
    data.save_gif([to_pil_image((image + 1) / 2) for image in walk], folder / "walk.gif", 60)
    print(f"{folder}: images, grid.png, walk.gif, walk.png")
    try:
        images = data.load_images(args.data, args.size)
    except data.BadInput as error:
        return print(f"no nearest.png: {error}")
    data.save_grid(torch.cat([fakes, nearest(fakes, images)], dim=2), folder / "nearest.png")
    print("nearest.png: each sample above its nearest training image")


if __name__ == "__main__":
    with data.one_line_errors():
        args, checkpoint = options()
        (sample if args.sample else train)(args, checkpoint)
