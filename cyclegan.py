"""CycleGAN: blue cats into grumpy cats and back, from unpaired pictures. Zhu et al. 2017 (arXiv:1703.10593).

    python cyclegan.py --patch --cycle                            # drawn cats, nothing to download; look into out/
    python cyclegan.py --patch --cycle --X FOLDER --Y FOLDER      # your own two sets of pictures
    python cyclegan.py --resume RUN                               # go on after a stop; with more --iters, after the end
    python cyclegan.py --translate RUN --input FILE_OR_FOLDER --to Y

Two games as in dcgan.py, with pictures in the place of noise: G_XY turns pictures of X into pictures that D_Y takes for
Y, G_YX goes the other way. So far G_XY may answer any blue cat with any grumpy one. The cycle ties the answer to the
question: from the translation, G_YX must be able to restore the original.
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

FIXED = ("size", "width", "blocks", "up", "d_norm", "spectral_norm", "patch", "pool")  # for the life of a run


def options(argv=None):
    parser = data.Parser(__doc__)
    arg = parser.add_argument
    arg("--X", default="toy-blue", help="folder or .zip of images, or a drawn set: toy-grumpy, toy-blue")
    arg("--Y", default="toy-grumpy", help="the other set; nothing in it needs a partner in X")
    parser.add_augmentation()
    arg("--size", type=int, choices=(32, 64, 128, 256), default=64, help="side of the images, in pixels (%(default)s)")
    arg("--width", type=data.number(1, 2**16, kind=int), default=32, help="channels of the layers at the highest resolution (%(default)s)")
    arg("--blocks", type=data.number(0, 2**16, kind=int), default=None, help="residual blocks of G (default: 3; 9 at 256 px)")
    arg("--up", choices=("resize", "transpose"), default="resize", help="how G doubles the resolution (%(default)s)")
    arg("--d-norm", choices=("instance", "none"), default="none", help="normalisation in D (%(default)s)")
    arg("--spectral-norm", action="store_true", help="on every layer of D, in place of --d-norm")
    arg("--patch", action="store_true", help="D scores overlapping patches instead of the image")
    arg("--cycle", nargs="?", const="l1", default="none", choices=("l1", "l2", "none"), help="cycle consistency (plain: l1)")
    arg("--lambda-cycle", type=data.number(0), default=2.0, metavar="W", help="its weight (%(default)s)")
    arg("--identity", type=data.number(0), default=2.0, metavar="W", help="weight of: G_XY shall leave a picture of Y as it is (%(default)s)")
    arg("--pool", type=data.number(0, kind=int), default=50, help="earlier fakes that are shown to D again (%(default)s)")
    arg("--g-lr", type=data.number(1e-9, 1), default=1e-3, metavar="RATE", help="of Adam (%(default)s)")
    arg("--d-lr", type=data.number(1e-9, 1), default=1e-3, metavar="RATE", help="of Adam (%(default)s)")
    arg("--decay", action="store_true", help="let the rates fall to 0 over the second half of the run")
    arg("--batch", type=data.number(1, 2**16, kind=int), default=4, help="images of each set per step (%(default)s)")
    arg("--iters", type=data.number(1, kind=int), default=10000, help="steps of G (%(default)s)")
    arg("--ema", type=data.number(0, 0.999999), default=0.999, help="memory of the averaged generators; 0: no average (%(default)s)")
    arg("--translate", metavar="RUN", help="don't train: translate --input with this run's averaged generators")
    arg("--input", metavar="PATH", help="what --translate translates: an image, or a folder or .zip of images")
    arg("--to", choices=("X", "Y"), default="Y", help="into which set (%(default)s)")
    parser.add_run()
    opt, checkpoint = parser.parse(argv, "cyclegan", FIXED, apply="translate")
    if opt.blocks is None:
        opt.blocks = 9 if opt.size == 256 else 3
    if opt.cycle == "none" and opt.lambda_cycle != parser.get_default("lambda_cycle"):
        parser.error("--lambda-cycle would have no effect here: it needs --cycle")
    if opt.spectral_norm and opt.d_norm != "none":
        parser.error("--d-norm would have no effect here: --spectral-norm stands in its place")
    if bool(opt.translate) != bool(opt.input):
        parser.error("--translate RUN and --input FILE_OR_FOLDER go together")
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
    return {"instance": [nn.InstanceNorm2d(channels)], "none": []}[norm]


def init_weights(net):
    """N(0, 0.02) for every convolution (Radford et al.)."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0, 0.02)


class ResidualBlock(nn.Module):
    """[B, C, H, W] -> the same: x + f(x). Reflection, because a border of zeros would show."""

    def __init__(self, channels):
        super().__init__()
        self.f = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels), nn.ReLU(),
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels))

    def forward(self, x):
        return x + self.f(x)


class Generator(nn.Sequential):
    """Images [B, 3, H, W] -> images of the other set, the same shape, both in [-1, 1]; H and W multiples of 4.

    In the comments size = 64, width = 32. At 256 px it is the paper's network (with width 64), which has a 7x7 layer at
    both ends. But the paper normalises every hidden layer. A norm right behind the first convolution makes a brighter
    image equal to a darker one, and one before the last fixes the mean of each channel that the colours are mixed from.
    So the layers next to the image, with `width` channels, go without.
    """

    def __init__(self, size=64, width=32, blocks=3, up="resize"):
        full = size == 256
        channels = [width, 2 * width, 4 * width] if full else [3, width, 2 * width]
        norm = lambda channels: [nn.InstanceNorm2d(channels)] if channels > width else []
        layers = []
        if full:
            layers += [nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7), nn.ReLU()]  # [B, width, 256, 256]
        for inputs, outputs in zip(channels, channels[1:]):  # [B, 32, 32, 32], [B, 64, 16, 16]
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), *norm(outputs), nn.ReLU()]
        layers += [ResidualBlock(channels[2]) for _ in range(blocks)]  # [B, 64, 16, 16]
        for inputs, outputs in zip(channels[:0:-1], channels[1::-1]):  # [B, 32, 32, 32], [B, 3, 64, 64]
            double = UpConv(inputs, outputs) if up == "resize" else nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1)
            layers += [double] if inputs == width else [double, *norm(outputs), nn.ReLU()]
        if full:
            layers += [nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7)]
        super().__init__(*layers, nn.Tanh())
        init_weights(self)


class Discriminator(nn.Sequential):
    """Images [B, 3, size, size] in [-1, 1] -> scores without limits: [B, 1, 1, 1], or one per patch [B, 1, h, w].

    With patch=True it is a PatchGAN (Isola et al. 2017): fewer layers, so that a score has seen 70 x 70 pixels, at
    64 px 34 x 34. Spectral normalisation (Miyato et al. 2018) divides each layer's weights by their largest singular
    value: D's slope stays bounded, and with it the gradient that G gets, even when D is far ahead.
    """

    def __init__(self, size=64, width=32, norm="none", spectral=False, patch=False):
        norm = "none" if spectral else norm
        halvings = min(3, int(math.log2(size)) - 4) if patch else int(math.log2(size)) - 2
        strides = [2] * halvings + [1] * patch
        layers, inputs = [], 3
        for i, stride in enumerate(strides):  # [B, 32, 32, 32], [B, 64, 16, 16], [B, 128, 8, 8], [B, 256, 4, 4]
            channels = width * 2 ** i
            layers += [nn.Conv2d(inputs, channels, 4, stride, padding=1)]
            layers += [*(norm_layer(norm, channels) if i else []), nn.LeakyReLU(0.2)]
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

class Pool:
    """Up to `size` earlier fakes. Half of D's fakes come from here, so that D does not forget what G did (Shrivastava et al. 2017)."""

    def __init__(self, size):
        self.size, self.images = size, torch.empty(0)

    def swap(self, fakes):
        """Fakes [B, C, H, W] -> the same number. Once the pool is full, each is with probability 1/2 kept, and an earlier one returned."""
        fakes = data.gather(fakes)  # several processes share one pool
        self.images = self.images.to(fakes)  # a checkpoint is read into host memory
        missing = self.size - len(self.images)
        if missing > 0:
            self.images = torch.cat([self.images, fakes[:missing]])
        if missing > 0 or self.size == 0:
            return fakes[RANK::WORLD]
        new, rest = fakes[:self.size], fakes[self.size:]
        slots = torch.rand(self.size, device=fakes.device).argsort()[:len(new)]  # different ones, drawn on the device
        old, keep = self.images[slots], torch.rand(len(new), 1, 1, 1, device=new.device) < 0.5
        self.images[slots] = torch.where(keep, new, old)
        return torch.cat([torch.where(keep, old, new), rest])[RANK::WORLD]

    def state_dict(self):
        return {"images": self.images}

    def load_state_dict(self, state):
        self.images = state["images"]


def step(G_XY, G_YX, D_X, D_Y, opt_G, opt_D, x, y, pools, opt, cast):
    """Train both D once and both G once. x, y: float [B, 3, size, size] in [-1, 1].

    Returns 0-d tensors: the losses of D_X, D_Y, G_XY, G_YX, the cycle of X and of Y (before their weight), the identity
    (likewise), and mean D_X(real), D_X(fake), D_Y(real), D_Y(fake).
    """
    # Instance norm treats every image alone, so what goes through the same network can go through it together:
    # with the identity loss, G_XY gets x to translate and y to leave alone.
    with cast():
        same = opt.identity > 0
        from_x = G_XY(torch.cat([x, y]) if same else x).float()
        from_y = G_YX(torch.cat([y, x]) if same else y).float()
    fake_y, fake_x = from_x[:len(x)], from_y[:len(y)]

    # Train D. detach: nothing here may reach G's weights.
    D_X.requires_grad_(True), D_Y.requires_grad_(True)
    losses_d, scores = [], []
    for D, real, fake, pool in ((D_X, x, fake_x, pools[0]), (D_Y, y, fake_y, pools[1])):
        images = diffaug.augment(torch.cat([real, pool.swap(fake.detach())]), opt.diffaug)
        with cast():
            score_real, score_fake = D(images).chunk(2)
        score_real, score_fake = score_real.float(), score_fake.float()
        losses_d += [((score_real - 1) ** 2).mean() + (score_fake ** 2).mean()]
        scores += [score_real.mean(), score_fake.mean()]
    opt_D.zero_grad()
    sum(losses_d).backward()
    data.average_gradients(opt_D)  # of several processes
    for D in (D_X, D_Y):  # see dcgan.py
        nn.utils.clip_grad_norm_(D.parameters(), 1)
    opt_D.step()

    # Train G, through D that stand still.
    D_X.requires_grad_(False), D_Y.requires_grad_(False)
    distance = F.mse_loss if opt.cycle == "l2" else F.l1_loss
    zero = torch.zeros((), device=x.device)
    with cast():
        score_x, score_y = D_X(diffaug.augment(fake_x, opt.diffaug)), D_Y(diffaug.augment(fake_y, opt.diffaug))
        back = (G_YX(fake_y).float(), G_XY(fake_x).float()) if opt.cycle != "none" else (x, y)
    loss_xy, loss_yx = ((score_y.float() - 1) ** 2).mean(), ((score_x.float() - 1) ** 2).mean()
    cycle_x, cycle_y = distance(back[0], x), distance(back[1], y)
    identity = F.l1_loss(from_x[len(x):], y) + F.l1_loss(from_y[len(y):], x) if same else zero
    opt_G.zero_grad()
    (loss_xy + loss_yx + opt.lambda_cycle * (cycle_x + cycle_y) + opt.identity * identity).backward()
    data.average_gradients(opt_G)
    opt_G.step()
    return *losses_d, loss_xy, loss_yx, cycle_x, cycle_y, identity, *scores


@torch.no_grad()
def average(pairs, decay, iteration):
    """Move the averaged generators towards the present ones, as in dcgan.py: pairs of tensors (average, now)."""
    decay = min(decay, (1 + iteration) / (10 + iteration))
    for mean, now in pairs:
        mean.lerp_(now, 1 - decay)


# ---------------------------------------------------------------------------------------------------------------------
# The loop

COLUMNS = ["D_X_loss", "D_Y_loss", "G_XY_loss", "G_YX_loss", "cycle_X", "cycle_Y", "identity",
           "D_X(real)", "D_X(fake)", "D_Y(real)", "D_Y(fake)"]


def build(opt, device):
    Gs = [Generator(opt.size, opt.width, opt.blocks, opt.up) for _ in "XY"]
    Ds = [Discriminator(opt.size, opt.width, opt.d_norm, opt.spectral_norm, opt.patch) for _ in "XY"]
    return (net.to(device, memory_format=torch.channels_last) for net in Gs + Ds)


def optimizer(nets, rate):
    return torch.optim.Adam([p for net in nets for p in net.parameters()], rate, betas=(0.5, 0.999), fused=True)


def train(opt, checkpoint):
    if checkpoint and checkpoint["iteration"] >= opt.iters:
        return print(f"{opt.resume} is finished, at iteration {checkpoint['iteration']}: to go on, give more --iters")
    device, cast = data.setup(opt)
    images = [data.load_images(source, data.load_size(opt.size, opt.deluxe)) for source in (opt.X, opt.Y)]
    batches_X, batches_Y = (data.Batches(part, opt.batch, device, opt.seed + k) for k, part in enumerate(images))
    G_XY, G_YX, D_X, D_Y = build(opt, device)
    ema_XY, ema_YX = copy.deepcopy(G_XY), copy.deepcopy(G_YX)
    pairs = [*zip(ema_XY.parameters(), G_XY.parameters()), *zip(ema_YX.parameters(), G_YX.parameters())]
    if opt.compile:
        data.compile_networks([G_XY, G_YX, D_X, D_Y], device)
    opt_G, opt_D = optimizer([G_XY, G_YX], opt.g_lr), optimizer([D_X, D_Y], opt.d_lr)
    pools = Pool(opt.pool), Pool(opt.pool)
    parts = {"G_XY": G_XY, "G_YX": G_YX, "D_X": D_X, "D_Y": D_Y, "ema_XY": ema_XY, "ema_YX": ema_YX, "opt_G": opt_G,
             "opt_D": opt_D, "batches_X": batches_X, "batches_Y": batches_Y, "pool_X": pools[0], "pool_Y": pools[1]}
    truth = data.drawn_pairs(opt.X, opt.Y, opt.size)  # drawn cats have a known right answer
    if truth:
        truth = [part.to(device) for part in truth]
    run = data.Run(opt, "cyclegan", checkpoint, parts, COLUMNS, device, measured=["truth_error"] if truth else [])
    shown = min(8, *map(len, images))
    fixed_x, fixed_y = (F.interpolate(part[:shown].float() / 127.5 - 1, (opt.size, opt.size), mode="bilinear", antialias=True).to(device)
                        for part in images)
    print(f"{run.path}: X {len(images[0])} images of {opt.X}, Y {len(images[1])} of {opt.Y} at {opt.size} px, on {device}, "
          f"each G {sum(p.numel() for p in G_XY.parameters()):,} and D {sum(p.numel() for p in D_X.parameters()):,} parameters"
          + (f"; truth error of the unchanged input {F.l1_loss(*truth):.3f}" if truth else ""))

    while run.iteration < opt.iters and not run.stopped_by:
        run.iteration += 1
        if opt.compile:
            torch.compiler.cudagraph_mark_step_begin()  # what the last step's graphs left on the GPU may be written over
        fall = min(1, 2 - 2 * run.iteration / (opt.iters + 1)) if opt.decay else 1
        opt_G.param_groups[0]["lr"], opt_D.param_groups[0]["lr"] = opt.g_lr * fall, opt.d_lr * fall
        x, y = (data.deluxe(batches.next(), opt.size, opt.deluxe) for batches in (batches_X, batches_Y))
        losses = step(G_XY, G_YX, D_X, D_Y, opt_G, opt_D, x, y, pools, opt, cast)
        average(pairs, opt.ema, run.iteration)
        run.add(*losses)
        if run.due(opt.log_every):
            with torch.no_grad():
                run.log(*([(F.l1_loss(ema_XY(truth[0]), truth[1]) + F.l1_loss(ema_YX(truth[1]), truth[0])) / 2] if truth else []))
        if run.due(opt.sample_every):
            with torch.no_grad():
                rows = [fixed_x, ema_XY(fixed_x), ema_YX(ema_XY(fixed_x)), fixed_y, ema_YX(fixed_y), ema_XY(ema_YX(fixed_y))]
            data.save_grid(torch.cat(rows), run.path / "samples" / f"{run.iteration:06d}.png", columns=shown)
        if run.due(opt.save_every):
            run.save()
    run.finish()


# ---------------------------------------------------------------------------------------------------------------------
# Translating

@torch.no_grad()
def translate(opt, checkpoint):
    """Write one PNG per input into RUN/translated_to_X or _Y, under its own name and at its own proportions."""
    device, _ = data.setup(opt)
    G, _, _, _ = build(opt, device)
    with data.restoring():
        G.load_state_dict(checkpoint["parts"]["ema_XY" if opt.to == "Y" else "ema_YX"])
    folder = None
    for name, image in data.read_pictures(opt.input, opt.size):
        folder = folder or data.new_folder(opt.out, Path(opt.translate) / f"translated_to_{opt.to}", "")
        height, width = image.shape[2:]
        padded = F.pad(image, (0, -width % 4, 0, -height % 4), mode="replicate")  # G halves the sides twice
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        data.save_grid(G(padded.to(device))[:, :, :height, :width].cpu(), target)
    print(folder)


if __name__ == "__main__":
    with data.one_line_errors():
        opt, checkpoint = options()
        if opt.translate:
            translate(opt, checkpoint)
        else:
            train(opt, checkpoint)
