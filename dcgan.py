"""DCGAN: cats from noise. Radford et al. 2016 (arXiv:1511.06434), least-squares loss of Mao et al. 2017 (arXiv:1611.04076).

    python dcgan.py --deluxe --diffaug                    # drawn cats, nothing to download; look into out/ after a minute
    python dcgan.py --deluxe --diffaug --data FOLDER      # your own pictures: any folder, or a .zip of one
    python dcgan.py --resume RUN                          # go on after a stop; with more --iters, after the end
    python dcgan.py --sample RUN --n 64                   # images, a latent walk, nearest training images

Two networks play against each other. The generator G turns noise z into an image. The discriminator D scores images,
and learns to give real ones 1 and G's fakes 0. G learns to make fakes that D scores 1. Nobody ever tells G what a cat is.
"""
import copy
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.parametrizations import spectral_norm

import data
import diffaug
from diffaug import RANK, WORLD

# ---------------------------------------------------------------------------------------------------------------------
# Options

FIXED = ("size", "width", "z", "up", "norm", "d_norm", "spectral_norm", "patch", "selu", "loss")  # for the life of a run


def options(argv=None):
    parser = data.Parser(__doc__)
    arg = parser.add_argument
    arg("--data", default="toy-grumpy", help="folder or .zip of images, or a drawn set: toy-grumpy, toy-blue")
    parser.add_augmentation()
    arg("--size", type=int, choices=(32, 64, 128, 256), default=64, help="side of the images, in pixels (%(default)s)")
    arg("--width", type=data.number(1, 2**16, kind=int), default=32, help="channels of the layers at the highest resolution (%(default)s)")
    arg("--z", type=data.number(2, 2**16, kind=int), default=100, help="numbers of noise that an image is made from (%(default)s)")
    arg("--up", choices=("resize", "transpose"), default="resize", help="how G doubles the resolution (%(default)s)")
    arg("--norm", choices=("batch", "instance", "none"), default="batch", help="normalisation in G (%(default)s)")
    arg("--d-norm", choices=("batch", "instance", "none"), default=None, help="normalisation in D (none; wgan: batch)")
    arg("--spectral-norm", action="store_true", help="on every layer of D, in place of --d-norm")
    arg("--patch", action="store_true", help="D scores overlapping patches instead of the image")
    arg("--selu", action="store_true", help="SELU instead of normalisation and ReLU, in both networks")
    arg("--loss", choices=("lsgan", "vanilla", "wgan", "wgan-gp"), default="lsgan", help="(%(default)s)")
    arg("--critic-iters", type=data.number(1, kind=int), default=None, metavar="N", help="steps of D per step of G (1; wgan, wgan-gp: 5)")
    arg("--smooth", type=data.number(0, 2), nargs=2, default=(1.0, 1.0), metavar=("LO", "HI"), help="draw D's target for reals from here")
    arg("--g-target", type=data.number(-1, 2), default=1.0, metavar="T", help="score that G aims at (lsgan); 0.5: the boundary")
    arg("--g-lr", type=data.number(1e-9, 1), default=4e-4, metavar="RATE", help="of Adam (%(default)s)")
    arg("--d-lr", type=data.number(1e-9, 1), default=8e-4, metavar="RATE", help="of Adam (%(default)s)")
    arg("--batch", type=data.number(1, 2**16, kind=int), default=16, help="images per step (%(default)s)")
    arg("--iters", type=data.number(1, kind=int), default=6400, help="steps of G (%(default)s)")
    arg("--ema", type=data.number(0, 0.999999), default=0.999, help="memory of the averaged generator; 0: no average (%(default)s)")
    arg("--sample", metavar="RUN", help="don't train: draw from this run's averaged generator")
    arg("--n", type=data.number(1, 2**16, kind=int), default=64, help="how many images --sample draws")
    parser.add_run()
    opt, checkpoint = parser.parse(argv, "dcgan", FIXED, apply="sample")
    if opt.smooth[0] > opt.smooth[1]:
        parser.error(f"--smooth {opt.smooth[0]:g} {opt.smooth[1]:g}: the lower limit comes first")
    for name, without_effect, why in (("smooth", opt.loss.startswith("wgan"), "a critic has no targets"),
                                      ("g_target", opt.loss != "lsgan", "only lsgan has one"),
                                      ("norm", opt.selu, "SELU stands in its place"),
                                      ("d_norm", opt.selu or opt.spectral_norm, "it stands in its place")):
        if without_effect and getattr(opt, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} would have no effect here: {why}")
    if opt.d_norm is None:  # weights clipped at 0.01 would let every signal fade
        opt.d_norm = "batch" if opt.loss == "wgan" and not opt.spectral_norm and not opt.selu else "none"
    if opt.loss == "wgan-gp" and opt.d_norm == "batch":
        parser.error("--d-norm batch: the gradient penalty is each image's own, so wgan-gp can't have batch statistics in D")
    if opt.critic_iters is None:
        opt.critic_iters = 5 if opt.loss.startswith("wgan") else 1
    return opt, checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# Networks

class UpConv(nn.Conv2d):
    """Nearest-neighbour upsampling x2, then a 3x3 convolution: [B, C, H, W] -> [B, K, 2H, 2W] (Odena et al. 2016).

    A transposed 4x4 convolution reaches some output pixels through other weights than their neighbours, and leaves a
    checkerboard that G has to unlearn. Upsampling first cannot; but it makes the convolution read every input pixel
    four times over. Of the 3x3 = 9 products per output pixel, many multiply the same pixel, so their weights can be
    added first. In one dimension, with w = (w0, w1, w2) and pixels ..., a, b, c, ... doubled to ..., a, a, b, b, c, c, ...

        first b:   w0 a + w1 b + w2 b = w0 a + (w1 + w2) b       second b:  (w0 + w1) b + w2 c

    which is a transposed convolution of stride 2 with the kernel (w2, w1 + w2, w0 + w1, w0). In two dimensions: a 4x4
    kernel, 4 products per output pixel instead of 9, the same result but for rounding, and no large intermediate image.
    """

    def __init__(self, inputs, outputs, bias=True):
        super().__init__(inputs, outputs, 3, bias=bias)
        self.register_buffer("fold", torch.tensor([[0., 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]]), persistent=False)

    def forward(self, x):
        kernel = torch.einsum("ia,jb,kcab->ckij", self.fold, self.fold, self.weight)  # [C, K, 4, 4]
        return F.conv_transpose2d(x, kernel, self.bias, stride=2, padding=1)


def norm_layer(norm, channels):
    return {"batch": [nn.BatchNorm2d(channels)], "instance": [nn.InstanceNorm2d(channels)], "none": []}[norm]


def init_weights(net):
    """N(0, 0.02) for every convolution (Radford et al.)."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0, 0.02)


class Generator(nn.Sequential):
    """Noise [B, z, 1, 1], N(0, 1) -> images [B, 3, size, size] in [-1, 1]. In the comments size = 64, width = 32."""

    def __init__(self, size=64, width=32, z=100, up="resize", norm="batch", selu=False):
        norm, activation = ("none", nn.SELU) if selu else (norm, nn.ReLU)
        doublings = int(math.log2(size)) - 2
        channels = width * 2 ** (doublings - 1)
        bias = norm == "none"  # a norm subtracts the mean, and a constant with it
        layers = [nn.ConvTranspose2d(z, channels, 4, bias=bias), *norm_layer(norm, channels), activation()]  # [B, 256, 4, 4]
        for i in range(doublings):
            last = i == doublings - 1
            inputs, channels = channels, 3 if last else channels // 2
            if up == "resize":
                layers += [UpConv(inputs, channels, bias=bias or last)]
            else:
                layers += [nn.ConvTranspose2d(inputs, channels, 4, stride=2, padding=1, bias=bias or last)]
            # [B, 128, 8, 8], [B, 64, 16, 16], [B, 32, 32, 32], [B, 3, 64, 64]
            layers += [nn.Tanh()] if last else [*norm_layer(norm, channels), activation()]
        super().__init__(*layers)
        init_weights(self)


class Discriminator(nn.Sequential):
    """Images [B, 3, size, size] in [-1, 1] -> scores without limits: [B, 1, 1, 1], or one per patch [B, 1, h, w].

    With patch=True it is a PatchGAN (Isola et al. 2017): fewer layers, so that a score has seen 70 x 70 pixels, at
    64 px 34 x 34. Spectral normalisation (Miyato et al. 2018) divides each layer's weights by their largest singular
    value: D's slope stays bounded, and with it the gradient that G gets, even when D is far ahead. With DiffAugment D is
    hardly ever far ahead, and a D without any normalisation is as good and a quarter faster: the default.
    """

    def __init__(self, size=64, width=32, norm="none", spectral=False, patch=False, selu=False):
        norm = "none" if spectral or selu else norm
        activation = nn.SELU if selu else lambda: nn.LeakyReLU(0.2)
        halvings = min(3, int(math.log2(size)) - 4) if patch else int(math.log2(size)) - 2
        strides = [2] * halvings + [1] * patch
        layers, inputs = [], 3
        for i, stride in enumerate(strides):  # [B, 32, 32, 32], [B, 64, 16, 16], [B, 128, 8, 8], [B, 256, 4, 4]
            channels = width * 2 ** i
            layers += [nn.Conv2d(inputs, channels, 4, stride, padding=1, bias=i == 0 or norm != "batch")]
            layers += [*(norm_layer(norm, channels) if i else []), activation()]
            inputs = channels
        layers += [nn.Conv2d(inputs, 1, 4, padding=1 if patch else 0)]  # one score: no norm, no activation
        super().__init__(*layers)
        init_weights(self)
        if spectral:
            for layer in self:
                if isinstance(layer, nn.Conv2d):
                    spectral_norm(layer)


# ---------------------------------------------------------------------------------------------------------------------
# One step

def step(G, D, opt_G, opt_D, next_real, opt, cast):
    """Train D once (or --critic-iters times) and G once. next_real() -> float [B, 3, size, size] in [-1, 1].

    Returns 0-d tensors: D's loss on reals and on fakes, G's loss, mean D(real) and D(fake), gradient penalty.
    """
    for k in range(opt.critic_iters):
        real = next_real()
        noise = torch.randn(WORLD * len(real), opt.z, 1, 1, device=real.device)[RANK::WORLD]
        # The last fakes serve G's step too, so only they need a graph through G: one generator forward a step.
        with torch.set_grad_enabled(k == opt.critic_iters - 1), cast():
            fake = G(noise)
        fake = fake.float()  # losses and augmentation stay in float32

        # Train D. detach: nothing here may reach G's weights.
        D.requires_grad_(True)
        images = diffaug.augment(torch.cat([real, fake.detach()]), opt.diffaug)
        with cast():
            if any(isinstance(layer, nn.BatchNorm2d) for layer in D.modules()):  # its statistics must not mix real and fake
                score_real, score_fake = D(images[:len(real)]), D(images[len(real):])
            else:
                score_real, score_fake = D(images).chunk(2)
        score_real, score_fake = score_real.float(), score_fake.float()
        target = diffaug.uniform(real, *opt.smooth)  # only reals: one-sided (Salimans et al. 2016)
        penalty = torch.zeros((), device=real.device)
        if opt.loss == "lsgan":
            loss_real, loss_fake = ((score_real - target) ** 2).mean(), (score_fake ** 2).mean()
        elif opt.loss == "vanilla":  # Goodfellow et al. 2014: -t log D(x) - (1 - t) log(1 - D(x)), D a sigmoid
            loss_real = (F.softplus(score_real) - target * score_real).mean()
            loss_fake = F.softplus(score_fake).mean()
        else:  # the critic's estimate of the Wasserstein distance (Arjovsky et al. 2017)
            loss_real, loss_fake = -score_real.mean(), score_fake.mean()
        if opt.loss == "wgan-gp":
            penalty = gradient_penalty(D, *images.chunk(2))
        opt_D.zero_grad()
        (loss_real + loss_fake + 10 * penalty).backward()
        data.average_gradients(opt_D)  # of several processes
        # Nothing bounds D's scores, and the gradient of a squared loss grows with them: one odd batch makes a large step,
        # the next scores are worse, and within ten steps D is lost. A norm of 1 ends that. Adam does not mind the scale.
        nn.utils.clip_grad_norm_(D.parameters(), 1)
        opt_D.step()
        if opt.loss == "wgan":
            with torch.no_grad():
                for weight in D.parameters():
                    weight.clamp_(-0.01, 0.01)

    # Train G, through a D that stands still.
    D.requires_grad_(False)
    with cast():
        score = D(diffaug.augment(fake, opt.diffaug))
    score = score.float()
    if opt.loss == "lsgan":
        loss_g = ((score - opt.g_target) ** 2).mean()
    elif opt.loss == "vanilla":
        loss_g = F.softplus(-score).mean()  # -log D(G(z)): steeper than log(1 - D(G(z))) where D is sure
    else:
        loss_g = -score.mean()
    opt_G.zero_grad()
    loss_g.backward()
    data.average_gradients(opt_G)
    opt_G.step()
    if opt.loss == "vanilla":
        score_real, score_fake = score_real.sigmoid(), score_fake.sigmoid()
    return loss_real, loss_fake, loss_g, score_real.mean(), score_fake.mean(), penalty


def gradient_penalty(D, real, fake):
    """Mean (|gradient of D| - 1)^2 at random points between real and fake (Gulrajani et al. 2017), in float32."""
    between = torch.lerp(real, fake, diffaug.uniform(real, 0, 1)).requires_grad_()
    gradient, = torch.autograd.grad(D(between).sum(), between, create_graph=True)
    return ((gradient.flatten(1).norm(dim=1) - 1) ** 2).mean()


@torch.no_grad()
def average(pairs, decay, iteration):
    """Move the averaged generator towards G: pairs of tensors (average, now).

    Its memory is short at first, or it would long remember the random start.
    """
    decay = min(decay, (1 + iteration) / (10 + iteration))
    for mean, now in pairs:
        mean.lerp_(now, 1 - decay)


# ---------------------------------------------------------------------------------------------------------------------
# The loop

def build(opt, device):
    G = Generator(opt.size, opt.width, opt.z, opt.up, opt.norm, opt.selu)
    D = Discriminator(opt.size, opt.width, opt.d_norm, opt.spectral_norm, opt.patch, opt.selu)
    return G.to(device), D.to(device)


def optimizer(net, rate, loss):
    if loss == "wgan":  # momentum harms a critic whose weights keep hitting the clip
        return torch.optim.RMSprop(net.parameters(), rate)
    return torch.optim.Adam(net.parameters(), rate, betas=(0.5, 0.999), fused=True)


def train(opt, checkpoint):
    if checkpoint and checkpoint["iteration"] >= opt.iters:
        return print(f"{opt.resume} is finished, at iteration {checkpoint['iteration']}: to go on, give more --iters")
    device, cast = data.setup(opt)
    images = data.load_images(opt.data, data.load_size(opt.size, opt.deluxe))
    batches = data.Batches(images, opt.batch, device, opt.seed)
    G, D = build(opt, device)
    ema = copy.deepcopy(G).eval()
    # What is averaged: the weights and batch norm's statistics, not its count of batches.
    pairs = [(mean, now) for mean, now in zip(ema.state_dict().values(), G.state_dict().values()) if mean.is_floating_point()]
    if opt.compile:
        data.compile_networks([G] if opt.loss == "wgan-gp" else [G, D], device)  # torch.compile has no second derivatives
    opt_G, opt_D = optimizer(G, opt.g_lr, opt.loss), optimizer(D, opt.d_lr, opt.loss)
    parts = {"G": G, "D": D, "ema": ema, "opt_G": opt_G, "opt_D": opt_D, "batches": batches}
    columns = ["D_real_loss", "D_fake_loss", "G_loss", "D(real)", "D(fake)"] + ["penalty"] * (opt.loss == "wgan-gp")
    run = data.Run(opt, "dcgan", checkpoint, parts, columns, device)
    opt_G.param_groups[0]["lr"], opt_D.param_groups[0]["lr"] = opt.g_lr, opt.d_lr  # new ones, if given on a resume
    fixed_noise = torch.randn(64, opt.z, 1, 1, generator=torch.Generator().manual_seed(opt.seed)).to(device)
    print(f"{run.path}: {len(images)} images of {opt.data} at {opt.size} px, on {device}, "
          f"G {sum(p.numel() for p in G.parameters()):,} and D {sum(p.numel() for p in D.parameters()):,} parameters")

    while run.iteration < opt.iters and not run.stopped_by:
        run.iteration += 1
        if opt.compile:
            torch.compiler.cudagraph_mark_step_begin()  # what the last step's graphs left on the GPU may be written over
        next_real = lambda: data.deluxe(batches.next(), opt.size, opt.deluxe)
        losses = step(G, D, opt_G, opt_D, next_real, opt, cast)
        average(pairs, opt.ema, run.iteration)
        run.add(*losses[:len(columns)])
        if run.due(opt.log_every):
            run.log()  # the one place that waits for the device
        if run.due(opt.sample_every):
            with torch.no_grad():
                data.save_grid(ema(fixed_noise), run.path / "samples" / f"{run.iteration:06d}.png")
        if run.due(opt.save_every):
            run.save()
    run.finish()


# ---------------------------------------------------------------------------------------------------------------------
# Sampling

def slerp(a, b, t):
    """Between two noises along the sphere: on the straight line the norm would drop to what G has never seen."""
    angle = torch.acos(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


@torch.no_grad()
def sample(opt, checkpoint):
    """Write RUN/generated/: grid.png, images/, walk.gif, walk.png (a row per leg), nearest.png."""
    device, _ = data.setup(opt)
    G, _ = build(opt, device)
    with data.restoring():
        G.load_state_dict(checkpoint["parts"]["ema"])
    G.eval()
    noise = torch.randn(opt.n + 6, opt.z, 1, 1, generator=torch.Generator().manual_seed(opt.seed)).to(device)
    fakes = torch.cat([G(z).cpu() for z in noise[:opt.n].split(64)])
    ends = noise[opt.n:]
    walk = torch.cat([G(torch.stack([slerp(a, b, t / 16) for t in range(16)])).cpu() for a, b in zip(ends, ends.roll(-1, 0))])

    images = data.load_images(opt.data, opt.size)
    folder = data.new_folder(opt.out, Path(opt.sample) / "generated", "images")
    for i, image in enumerate(fakes):
        data.save_grid(image[None], folder / "images" / f"{i:05d}.png")
    data.save_grid(fakes, folder / "grid.png")
    data.save_grid(walk[::2], folder / "walk.png")
    data.save_gif(walk, folder / "walk.gif", 60)
    print(f"{folder}: {opt.n} images, grid.png, walk.gif, walk.png")
    closest, distance, others = data.nearest(fakes, images)
    data.save_grid(torch.cat([fakes, closest], dim=2), folder / "nearest.png")
    # Copies would be much nearer to a training image than training images are to each other.
    print(f"nearest.png: each sample above the training image that is nearest to it, at a median distance of "
          f"{distance.median():.3f}; training images are {others.median():.3f} from their nearest")


if __name__ == "__main__":
    with data.one_line_errors():
        opt, checkpoint = options()
        if opt.sample:
            sample(opt, checkpoint)
        else:
            train(opt, checkpoint)
