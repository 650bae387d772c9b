"""pytest -q test_smoke.py: offline, on a CPU, in a minute or two. Each test says which error it would catch."""
import contextlib
import copy
import csv
import ctypes
import functools
import http.server
import math
import os
import signal
import subprocess
import sys
import threading
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import cyclegan
import data
import dcgan
import diffaug

HERE = Path(__file__).parent
SMALL = "--size 32 --width 4 --z 8 --batch 4 --log-every 1 --sample-every 2 --save-every 2 --device cpu".split()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def options(*argv):
    return dcgan.options([*SMALL, *map(str, argv)])[0]


def parameters(net):
    return sum(p.numel() for p in net.parameters())


@pytest.fixture(scope="session")
def cats(tmp_path_factory):
    """A folder of six drawn cats."""
    folder = tmp_path_factory.mktemp("cats")
    for i in range(6):
        data.draw_cat(i, "grumpy", 40).save(folder / f"{i}.png")
    return folder


# ---- networks -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_shapes_at_every_layer(size):
    """Layers are added as the size doubles; the widest resolution has `width` channels, half the resolution twice that."""
    n, width = int(math.log2(size)) - 2, 2
    for up in ("resize", "transpose"):
        x, shapes = torch.randn(2, 5, 1, 1), []
        for layer in dcgan.Generator(size, width, z=5, up=up):
            x = layer(x)
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                shapes.append(tuple(x.shape[1:]))
        assert shapes == [(width * 2 ** (n - 1 - i), 4 * 2 ** i, 4 * 2 ** i) for i in range(n)] + [(3, size, size)]
        assert x.abs().max() <= 1
    shapes = []
    for layer in dcgan.Discriminator(size, width):
        x = layer(x)
        if isinstance(layer, nn.Conv2d):
            shapes.append(tuple(x.shape[1:]))
    assert shapes == [(width * 2 ** i, size // 2 ** (i + 1), size // 2 ** (i + 1)) for i in range(n)] + [(1, 1, 1)]


def test_parameter_counts_by_hand():
    norms = 2 * (256 + 128 + 64 + 32)
    assert parameters(dcgan.Generator(64, 32, 100)) == 100 * 256 * 16 + 9 * (256 * 128 + 128 * 64 + 64 * 32 + 32 * 3) + 3 + norms
    transposed = 16 * (100 * 256 + 256 * 128 + 128 * 64 + 64 * 32 + 32 * 3) + 3
    assert parameters(dcgan.Generator(64, 32, 100, up="transpose")) == transposed + norms
    assert parameters(dcgan.Generator(64, 32, 100, up="transpose", norm="instance")) == transposed
    assert parameters(dcgan.Generator(64, 32, 100, up="transpose", norm="none")) == transposed + 256 + 128 + 64 + 32
    assert parameters(dcgan.Generator(64, 16, 7, up="transpose")) == 16 * (7 * 128 + 128 * 64 + 64 * 32 + 32 * 16 + 16 * 3) + 3 + norms // 2
    convs = 16 * (3 * 32 + 32 * 64 + 64 * 128 + 128 * 256 + 256)
    assert parameters(dcgan.Discriminator(64, 32)) == convs + 32 + 64 + 128 + 256 + 1
    assert parameters(dcgan.Discriminator(64, 32, spectral=True)) == convs + 32 + 64 + 128 + 256 + 1
    assert parameters(dcgan.Discriminator(64, 32, "batch")) == convs + 32 + 2 * (64 + 128 + 256) + 1
    assert parameters(dcgan.Discriminator(256, 64, "instance", False, patch=True)) == 2_764_737  # the PatchGAN of the papers


@pytest.mark.parametrize("size, field", [(32, 16), (64, 34), (128, 70), (256, 70)])
def test_patch_discriminator_sees_a_patch(size, field):
    """One channel of scores, a score's gradient covers field x field pixels, and its last layer is a bare convolution."""
    D = dcgan.Discriminator(size, 2, "none", spectral=False, patch=True)
    x = torch.randn(1, 3, size, size, requires_grad=True)
    scores = D(x)
    assert scores.shape[1] == 1 and scores.shape[2] > 1 and isinstance(D[-1], nn.Conv2d)
    scores[0, 0, scores.shape[2] // 2, scores.shape[3] // 2].backward()
    rows = x.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert rows[-1] - rows[0] + 1 == field


def test_upconv_is_upsampling_then_convolution():
    layer, x = dcgan.UpConv(3, 5), torch.randn(2, 3, 6, 7)
    expected = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), layer.weight, layer.bias, padding=1)
    assert torch.allclose(layer(x), expected, atol=1e-5)


def kinds(net):
    return {type(layer).__name__.replace("Parametrized", "") for layer in net}


def test_norm_activation_and_spectral_options():
    assert "BatchNorm2d" in kinds(dcgan.Generator(norm="batch")) & kinds(dcgan.Discriminator(norm="batch"))
    assert "InstanceNorm2d" in kinds(dcgan.Generator(norm="instance")) & kinds(dcgan.Discriminator(norm="instance"))
    assert kinds(dcgan.Discriminator()) == {"Conv2d", "LeakyReLU"}
    assert kinds(dcgan.Generator(norm="none")) == {"ConvTranspose2d", "UpConv", "ReLU", "Tanh"}
    assert kinds(dcgan.Generator(selu=True)) == {"ConvTranspose2d", "UpConv", "SELU", "Tanh"}
    assert kinds(dcgan.Discriminator(norm="batch", selu=True)) == {"Conv2d", "SELU"}
    assert kinds(dcgan.Discriminator(norm="batch", spectral=True)) == {"Conv2d", "LeakyReLU"}
    assert all(layer.negative_slope == 0.2 for layer in dcgan.Discriminator() if isinstance(layer, nn.LeakyReLU))
    assert all(layer.eps == 1e-5 for layer in dcgan.Generator() if isinstance(layer, nn.BatchNorm2d))


def test_initial_weights_and_spectral_norm():
    for net in (dcgan.Generator(), dcgan.Discriminator()):
        weights = torch.cat([m.weight.flatten() for m in net if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))])
        assert abs(weights.mean()) < 1e-4 and abs(weights.std() - 0.02) < 2e-4
    D = dcgan.Discriminator(64, 8, spectral=True)
    for _ in range(60):  # power iteration: one round a forward
        D(torch.zeros(1, 3, 64, 64))
    for layer in D.eval():
        if isinstance(layer, nn.Conv2d):
            assert abs(torch.linalg.matrix_norm(layer.weight.flatten(1), 2) - 1) < 0.03
            assert abs(layer.parametrizations.weight.original.std() - 0.02) < 0.004


# ---- one step -------------------------------------------------------------------------------------------------------

class MeanD(nn.Module):
    """D(x) = slope * mean(x) + 0.25: with reals of 0.5 and fakes of -0.3 it scores 0.75 and -0.05."""
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.ones(1))
        self.calls = []

    def forward(self, x):
        self.calls.append(len(x))
        return self.slope * x.mean((1, 2, 3)).view(-1, 1, 1, 1) + 0.25


class ConstantG(nn.Module):
    def __init__(self):
        super().__init__()
        self.level = nn.Parameter(torch.tensor(-0.3))
        self.noise, self.graphs = [], []

    def forward(self, z):
        self.noise.append(z)
        self.graphs.append(torch.is_grad_enabled())
        return self.level.expand(len(z), 3, 32, 32)


def one_step(*argv, rate=0.0):
    """One step of ConstantG against MeanD -> losses, G, D, number of batches of reals used."""
    opt, G, D, used = options(*argv), ConstantG(), MeanD(), []
    next_real = lambda: used.append(1) or torch.full((4, 3, 32, 32), 0.5)
    optimizers = torch.optim.SGD(G.parameters(), rate), torch.optim.SGD(D.parameters(), rate)
    losses = dcgan.step(G, D, *optimizers, next_real, opt, contextlib.nullcontext)
    return [loss.item() for loss in losses], G, D, len(used)


@pytest.mark.parametrize("argv, real, fake, g, scores", [
    (["--loss", "lsgan"], 0.25 ** 2, 0.05 ** 2, 1.05 ** 2, (0.75, -0.05)),
    (["--loss", "lsgan", "--g-target", 0.5], 0.25 ** 2, 0.05 ** 2, 0.55 ** 2, (0.75, -0.05)),
    (["--loss", "lsgan", "--smooth", 0.9, 0.9], 0.15 ** 2, 0.05 ** 2, 1.05 ** 2, (0.75, -0.05)),
    (["--loss", "vanilla"], math.log(1 + math.exp(-0.75)), math.log(1 + math.exp(-0.05)), math.log(1 + math.exp(0.05)),
     (1 / (1 + math.exp(-0.75)), 1 / (1 + math.exp(0.05)))),
    (["--loss", "vanilla", "--smooth", 0.9, 0.9], math.log(1 + math.exp(0.75)) - 0.9 * 0.75, math.log(1 + math.exp(-0.05)),
     math.log(1 + math.exp(0.05)), (1 / (1 + math.exp(-0.75)), 1 / (1 + math.exp(0.05)))),
    (["--loss", "wgan-gp"], -0.75, -0.05, 0.05, (0.75, -0.05)),
])
def test_losses_by_hand(argv, real, fake, g, scores):
    """Each loss under its own name, and its gradient the right way: D pulls apart, G goes up."""
    losses, G, D, _ = one_step(*argv)
    assert losses[:5] == pytest.approx([real, fake, g, *scores], abs=1e-5)
    if "wgan-gp" in argv:  # the gradient of a mean over 3 * 32 * 32 numbers has norm 1 / sqrt(3 * 32 * 32)
        assert losses[5] == pytest.approx((1 - 1 / math.sqrt(3072)) ** 2, abs=1e-5)
    else:
        assert D.slope.grad < 0
    assert G.level.grad < 0


def test_gradient_of_D_is_clipped(monkeypatch):
    monkeypatch.setattr(torch, "ones", lambda *shape: torch.full(shape, 10.0))  # MeanD's slope: scores of 5.25 and -2.75
    _, _, D, _ = one_step("--loss", "lsgan")
    assert D.slope.grad.item() == pytest.approx(1, abs=1e-3)  # not 2 * 4.25 * 0.5 + 2 * 2.75 * 0.3 = 5.9


def test_wgan_clips_and_iterates_its_critic():
    losses, G, D, used = one_step("--loss", "wgan", "--d-lr", 5e-5)
    assert losses[0] == pytest.approx(-0.005 - 0.25) and D.slope.item() == pytest.approx(0.01)  # clipped from the 1st step on
    assert used == 5 and len(G.noise) == 5 and not torch.equal(G.noise[0], G.noise[1])
    assert G.graphs == [False] * 4 + [True]  # only the last fakes are G's to learn from
    assert one_step("--loss", "wgan", "--critic-iters", 2)[3] == 2 and one_step("--loss", "wgan-gp")[3] == 5
    opt = options("--loss", "wgan")
    _, D = dcgan.build(opt, torch.device("cpu"))
    assert isinstance(dcgan.optimizer(D, opt.d_lr, "wgan"), torch.optim.RMSprop) and "BatchNorm2d" in kinds(D)
    assert options("--loss", "wgan-gp").d_norm == options("--loss", "wgan", "--spectral-norm").d_norm == options().d_norm == "none"


def test_smooth_draws_each_target_for_reals_only():
    draws = [one_step("--smooth", 0.55, 0.95)[0] for _ in range(20)]
    assert all(0 < d[0] <= 0.2 ** 2 for d in draws) and len({d[0] for d in draws}) == 20
    assert all(d[1] == pytest.approx(0.05 ** 2) for d in draws)


def test_one_generator_forward_and_two_discriminator_calls():
    _, G, D, _ = one_step()
    assert [len(z) for z in G.noise] == [4] and D.calls == [8, 4]


class BatchNormD(MeanD):  # it only has to be there
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)


def test_batch_statistics_never_mix_real_and_fake(monkeypatch):
    monkeypatch.setitem(globals(), "MeanD", BatchNormD)
    assert one_step()[2].calls == [4, 4, 4]


def test_step_equals_the_textbook():
    """The oracle: two separate, plain updates. Catches fakes not detached, D learning in G's step, wrong signs."""
    opt = options("--norm", "instance", "--d-norm", "instance")
    G, D = dcgan.build(opt, torch.device("cpu"))
    G2, D2, real = copy.deepcopy(G), copy.deepcopy(D), torch.rand(4, 3, 32, 32) * 2 - 1
    optG, optD, optG2, optD2 = (torch.optim.SGD(net.parameters(), 1e-4) for net in (G, D, G2, D2))
    for it in range(2):
        torch.manual_seed(it)
        dcgan.step(G, D, optG, optD, lambda: real, opt, contextlib.nullcontext)
        torch.manual_seed(it)
        z = torch.randn(4, 8, 1, 1)
        optD2.zero_grad()
        (((D2(real) - 1) ** 2).mean() + (D2(G2(z).detach()) ** 2).mean()).backward()
        norm = torch.stack([p.grad.norm() for p in D2.parameters()]).norm()
        for p in D2.parameters():
            p.grad /= max(1, norm)
        optD2.step()
        optG2.zero_grad()
        ((D2(G2(z)) - 1) ** 2).mean().backward()
        optG2.step()
    for ours, theirs in zip([*G.parameters(), *D.parameters()], [*G2.parameters(), *D2.parameters()]):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("flags", ["--deluxe --diffaug", "--deluxe zoom,jitter,autocontrast --d-norm batch --patch --loss vanilla",
                                   "--loss wgan", "--loss wgan-gp --spectral-norm", "--up transpose --norm instance --smooth 0.8 0.9"])
def test_a_step_asks_the_device_for_no_number(flags):
    """A tensor on "meta" has a shape and no numbers. What a GPU would have to be waited for (.item(), a boolean index) and
    what would fail there (a tensor left on the CPU) fails here."""
    opt = options(*flags.split())
    G, D = dcgan.build(opt, "meta")
    images = torch.empty(4, 3, *[data.load_size(32, opt.deluxe)] * 2, dtype=torch.uint8, device="meta")
    optimizers = [torch.optim.SGD(net.parameters(), 0.1) for net in (G, D)]
    losses = dcgan.step(G, D, *optimizers, lambda: data.deluxe(images, 32, opt.deluxe), opt, contextlib.nullcontext)
    dcgan.average([(p.detach().clone(), p) for p in G.parameters()], 0.9, 1)
    assert all(loss.is_meta and loss.ndim == 0 for loss in losses)


def test_rates_and_average_are_what_was_asked_for(cats, tmp_path):
    train("--data", cats, "--iters", 1, "--out", tmp_path / "a", "--g-lr", 1e-5, "--d-lr", 1e-3, "--ema", 0)
    saved = data.load_checkpoint(tmp_path / "a" / "ckpt.pt", "dcgan")["parts"]
    rates = {name: saved[name]["param_groups"][0]["lr"] for name in ("opt_G", "opt_D")}
    assert rates == {"opt_G": 1e-5, "opt_D": 1e-3} and saved["opt_G"]["param_groups"][0]["betas"] == (0.5, 0.999)
    assert all(torch.equal(mean, saved["G"][name]) for name, mean in saved["ema"].items() if mean.is_floating_point())
    assert saved["ema"]["1.running_mean"].any()  # batch norm's statistics among them


def test_average():
    mean, now = torch.tensor([1.0]), nn.Parameter(torch.tensor([3.0]))
    dcgan.average([(mean, now)], 0.9, iteration=10_000)
    assert mean.item() == pytest.approx(0.9 * 1 + 0.1 * 3)
    dcgan.average([(mean, now)], 0.999, iteration=0)  # a short memory at first
    assert mean.item() == pytest.approx(0.1 * 1.2 + 0.9 * 3)
    dcgan.average([(mean, now)], 0, iteration=10_000)
    assert mean.item() == 3


# ---- augmentation ---------------------------------------------------------------------------------------------------

def test_color_ranges():
    x = torch.rand(4000, 3, 2, 2) * 2 - 1
    shift = (diffaug.brightness(x) - x)
    assert torch.allclose(shift, shift[:, :1, :1, :1].expand_as(x), atol=1e-6)  # one draw an image
    assert -0.5 <= shift.min() < -0.49 and 0.49 < shift.max() <= 0.5001
    grey = x.mean(1, keepdim=True)
    factor = ((diffaug.saturation(x) - grey) / (x - grey)).median(1).values[:, 0, 0]
    assert -1e-3 <= factor.min() < 0.02 and 1.98 < factor.max() <= 2.001 and abs(factor.mean() - 1) < 0.05
    mean = x.mean((1, 2, 3), keepdim=True)
    changed = diffaug.contrast(x)
    factor = (changed - mean).flatten(1).norm(dim=1) / (x - mean).flatten(1).norm(dim=1)
    assert 0.499 <= factor.min() < 0.51 and 1.49 < factor.max() <= 1.501
    assert torch.allclose(changed.mean((1, 2, 3), keepdim=True), mean, atol=1e-5)


@pytest.mark.parametrize("size", [15, 16])
def test_translation_and_cutout_geometry(size):
    reach, hole = int(0.125 * size + 0.5), int(0.5 * size + 0.5)
    x = 1 + torch.arange(size * size).float().view(1, 1, size, size).repeat(2000, 3, 1, 1)  # no two pixels alike, none 0
    moved, seen = diffaug.translation(x), set()
    for image in moved[:300]:
        y, x0 = (image[0] > 0).nonzero()[0].tolist()
        dy, dx = divmod(int(image[0, y, x0]) - 1, size)
        dy, dx = y - dy, x0 - dx
        expected = torch.zeros(size, size)
        expected[max(dy, 0):size + min(dy, 0), max(dx, 0):size + min(dx, 0)] = x[0, 0, max(-dy, 0):size - max(dy, 0), max(-dx, 0):size - max(dx, 0)]
        assert torch.equal(image, expected.expand(3, -1, -1))
        seen.add((dy, dx))
    assert {dy for dy, _ in seen} == {dx for _, dx in seen} == set(range(-reach, reach + 1)) and len(seen) > 2 * reach + 1
    holed = diffaug.cutout(x)
    cut = holed == 0
    heights, widths = cut[:, 0].any(2).sum(1), cut[:, 0].any(1).sum(1)
    assert torch.equal(cut[:, 0].sum((1, 2)), heights * widths)  # a full rectangle
    for sides in (heights, widths):  # a whole square inside; at the border at least the half of it
        assert sides.max() == hole and sides.min() == hole // 2
    assert torch.equal(holed[~cut], x[~cut]) and torch.equal(cut[:, 0], cut[:, 2])


def test_policy_applies_what_it_says_in_order(monkeypatch):
    calls = []
    for name in diffaug.POLICIES:
        monkeypatch.setitem(diffaug.POLICIES, name, (lambda x, name=name: calls.append(name) or x,))
    diffaug.augment(torch.zeros(1), "cutout,color")
    assert calls == ["cutout", "color"]
    x = torch.zeros(1)
    assert diffaug.augment(x, "") is x


def test_gradient_through_diffaug_is_the_finite_difference():
    def seeded(x):
        torch.manual_seed(3)
        return diffaug.augment(x, "color,translation,cutout")
    assert torch.autograd.gradcheck(seeded, torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True))


def test_diffaug_reaches_reals_and_fakes_in_both_steps(monkeypatch):
    """The best known bug of this field: a flag that is parsed and never used."""
    seen = []
    monkeypatch.setattr(diffaug, "augment", lambda x, policy: seen.append((len(x), policy)) or x * 0)
    losses, G, D, _ = one_step("--diffaug")
    assert seen == [(8, "color,translation,cutout"), (4, "color,translation,cutout")]
    assert losses[3] == losses[4] == 0.25 and G.level.grad == 0  # what D saw went through it, and so did the gradient


def test_deluxe_crop_and_flip():
    coded = torch.arange(35 * 35).view(1, 1, 35, 35).expand(400, 3, 35, 35) / 1225  # every pixel tells where it was
    out = data.crop(coded, 32)
    top, left = (out[:, 0, 0, 0] * 1225).round().long() // 35, (out[:, 0, 0, 0] * 1225).round().long() % 35
    assert set(top.tolist()) == set(left.tolist()) == {0, 1, 2, 3}
    assert all(torch.equal(o, c[:, t:t + 32, l:l + 32]) for o, c, t, l in zip(out, coded, top, left))
    flipped = data.flip(coded, 35)
    mirrored = [torch.equal(f, c.flip(2)) for f, c in zip(flipped, coded)]
    assert all(m or torch.equal(f, c) for m, f, c in zip(mirrored, flipped, coded)) and 140 < sum(mirrored) < 260


def test_deluxe_colours_and_zoom():
    flat = torch.full((500, 3, 8, 8), 0.5)
    out = data.jitter(flat, 8)
    assert 0.349 <= out.min() < 0.36 and 0.64 < out.max() <= 0.651 and len(out[:, 0, 0, 0].unique()) > 400
    x = torch.rand(500, 3, 8, 8) * 0.4 + 0.3
    saturation = lambda x: x.std(1).mean((1, 2))
    assert (saturation(data.jitter(x, 8)) / saturation(x)).std() > 0.1
    stretched = (data.stretch(x, 8).amax((2, 3)) > 0.999).all(1)
    assert 180 < stretched.sum() < 320
    ramp = torch.linspace(0, 1, 70).view(1, 1, 1, 70).expand(500, 3, 70, 70)
    zoomed = data.zoom(ramp, 64)
    widths = (zoomed[:, 0, 32, 63] - zoomed[:, 0, 32, 0]) * 64 / 63
    assert zoomed.shape == (500, 3, 64, 64) and 0.70 < widths.min() < 0.78 and 0.97 < widths.max() <= 1.02


def test_deluxe_range_and_sizes():
    images = torch.randint(0, 256, (4, 3, data.load_size(64, "crop,flip"), 70), dtype=torch.uint8)
    assert data.load_size(64, "crop,flip") == 70 and data.load_size(64, "flip") == data.load_size(64, "") == 64
    assert torch.allclose(data.deluxe(images, 70, ""), images / 127.5 - 1)  # tanh's range, whatever the flags
    for ops in ("crop,flip", "zoom", "crop,flip,zoom,jitter,autocontrast"):
        out = data.deluxe(images, 64, ops)
        assert out.shape == (4, 3, 64, 64) and out.min() >= -1.001 and out.max() <= 1.001 and out.min() < -0.8
    a, b = (data.deluxe(images[:1].expand(4, -1, -1, -1), 64, "crop,flip") for _ in range(2))
    assert not torch.equal(a, b) and not torch.equal(a[0], a[1])


# ---- images in and out ----------------------------------------------------------------------------------------------

def test_every_mode_becomes_rgb(tmp_path):
    red = np.zeros((6, 6, 4), np.uint8)
    red[:, 3:] = 255, 0, 0, 255  # left: fully transparent black
    red = Image.fromarray(red)
    def colours(image):
        a = np.asarray(data.to_rgb(image))
        return a[2, 1].tolist(), a[2, 4].tolist()
    assert colours(red) == ([255, 255, 255], [255, 0, 0])
    for mode in ("P", "LA", "PA", "RGBa"):
        left, right = colours(red.convert(mode))
        assert left == [255, 255, 255] and right != left
    red.convert("P").save(tmp_path / "p.png")  # transparency by palette entry
    assert colours(Image.open(tmp_path / "p.png"))[1][0] > 200
    assert colours(Image.new("CMYK", (6, 6), (0, 255, 255, 0))) == ([254, 0, 0],) * 2 or colours(Image.new("CMYK", (6, 6), (0, 255, 255, 0))) == ([255, 0, 0],) * 2
    sixteen = Image.fromarray(np.full((6, 6), 32768, np.uint16))
    sixteen.save(tmp_path / "16.png")
    assert colours(Image.open(tmp_path / "16.png")) == ([128] * 3,) * 2
    assert colours(Image.fromarray(np.full((6, 6), 0.5, np.float32))) == ([128] * 3,) * 2
    for mode, value in (("1", 1), ("L", 255), ("HSV", (0, 0, 255)), ("YCbCr", (255, 128, 128)), ("LAB", (255, 128, 128))):
        assert min(colours(Image.new(mode, (6, 6), value))[0]) > 245, mode


def test_load_images_from_folder_and_zip(tmp_path, capsys):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    stripes = np.zeros((20, 60, 3), np.uint8)
    stripes[:, 20:40] = 0, 255, 0  # the middle third is what a centre crop keeps
    Image.fromarray(stripes).save(tmp_path / "in" / "a.png")
    turned = Image.fromarray(stripes).getexif()
    turned[0x0112] = 6
    upright = np.zeros((40, 80, 3), np.uint8)
    upright[:, :40] = 255
    Image.fromarray(upright).save(tmp_path / "in" / "deep" / "b.JPEG", exif=turned, quality=95)
    (tmp_path / "in" / "broken.png").write_bytes(b"\x89PNG no")
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    (tmp_path / "in" / "._a.png").write_bytes(b"what macOS leaves behind")
    images = data.load_images(str(tmp_path / "in"), 16)
    assert images.shape == (2, 3, 16, 16) and images.dtype == torch.uint8
    assert images[0, 1].min() > 240 and images[0, 0].max() == 0  # bicubic, a little ringing at the crop's edge
    assert images[1, :, 0].min() > 240 and images[1, :, 15].max() < 15  # the white half is on top after the turn
    told = capsys.readouterr().err
    assert "broken.png" in told and "1 of 3" in told and "notes" not in told
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for file in (tmp_path / "in").rglob("*.*"):
            archive.write(file, file.relative_to(tmp_path))
    assert torch.equal(data.load_images(str(tmp_path / "in.zip"), 16), images)


def test_bombs_are_skipped(tmp_path, capsys):
    """A picture that takes kilobytes on disk and gigabytes in memory, and a member of a zip that does."""
    Image.new("1", (30_000, 30_000)).save(tmp_path / "huge.png")
    Image.new("1", (8200, 8200)).save(tmp_path / "large.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    assert len(data.load_images(str(tmp_path), 8)) == 1
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "small.png", "small.png")
        archive.writestr("zeros.webp", bytes(2**27 + 1))
    assert len(data.load_images(str(tmp_path / "a.zip"), 8)) == 1
    told = capsys.readouterr().err
    assert all(f"skipped {name}" in told.replace(f"{tmp_path}/", "") for name in ("huge.png", "large.png", "zeros.webp: more than 128 MB"))


def test_storage_maps_a_file_when_memory_is_short():
    images = data.storage(5, 8, memory=1000)
    images[:] = 7
    assert images.shape == (5, 3, 8, 8) and int(images.sum()) == 7 * 5 * 3 * 64
    assert "(deleted)" in Path("/proc/self/maps").read_text() if Path("/proc/self/maps").exists() else True


def test_drawn_cats():
    grumpy, blue = data.load_images("toy-grumpy", 32), data.load_images("toy-blue", 32)
    assert len(grumpy) == 204 and len(blue) == 75 and len(grumpy.flatten(1).unique(dim=0)) == 204
    again = np.asarray(data.draw_cat(7, "grumpy", 32))
    assert np.array_equal(grumpy[7].permute(1, 2, 0), again)
    assert grumpy.float().mean((0, 2, 3))[0] > blue.float().mean((0, 2, 3))[0] + 10  # cream and brown against blue-grey
    pair = [np.asarray(data.draw_cat(3, breed, 64)).astype(int) for breed in ("grumpy", "blue")]
    assert np.array_equal(pair[0][:6], pair[1][:6])  # one background,
    assert np.abs(pair[0][32] - pair[1][32]).mean() > 20  # two cats
    edges = [np.abs(np.diff(p.sum(2), axis=0)) > 60 for p in pair]
    assert (edges[0] & edges[1]).sum() > 0.2 * edges[1].sum()  # in one pose


def test_batches_are_epochs_and_never_short():
    device, images = torch.device("cpu"), torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 2, 2)
    batches = data.Batches(images, 4, device, seed=1)
    seen = torch.cat([batches.next()[:, 0, 0, 0] for _ in range(25)])
    epochs = seen.view(10, 10)
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in epochs) and len(epochs.unique(dim=0)) == 10
    few = data.Batches(images[:3], 8, device, seed=1).next()
    assert len(few) == 8 and sorted(few[:3, 0, 0, 0].tolist()) == sorted(few[3:6, 0, 0, 0].tolist()) == [0, 1, 2]
    state = copy.deepcopy(batches.state_dict())
    ahead = [batches.next() for _ in range(6)]
    other = data.Batches(images, 4, device, seed=99)
    other.load_state_dict(state)
    assert all(torch.equal(a, other.next()) for a in ahead)
    with pytest.raises(data.BadInput, match="trained on 10 images"):
        data.Batches(images[:3], 4, device, 0).load_state_dict(state)


def test_grid_of_any_number_keeps_colours(tmp_path):
    images = torch.full((5, 3, 8, 8), -0.2)
    images[0] = 3.0  # out of range is clipped, not scaled into
    data.save_grid(images, tmp_path / "grid.png", columns=3)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * 10 + 2, 3 * 10 + 2, 3) and grid[4, 4, 0] == 255 and abs(int(grid[4, 14, 0]) - 102) <= 1


def test_nearest_finds_the_image_and_its_mirror():
    images = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)
    images[4, :, :, 16:] = images[4, :, :, :16].flip(2)  # its own mirror image
    images[4, 0, 0, 0] ^= 128  # but for a pixel
    query = images[[4, 2]].float() / 127.5 - 1
    query[1] = query[1].flip(2)
    closest, distance, others = data.nearest(query, images)
    assert torch.allclose(closest, query) and distance.max() < 1e-3
    apart = torch.cat([images, images.flip(3)]).float() / 127.5 - 1 - query[:1]
    apart = apart.square().mean((1, 2, 3)).sqrt()[[i for i in range(14) if i % 7 != 4]]  # neither itself nor its mirror image
    assert len(others) == 7 and torch.isclose(others[4], apart.min(), atol=1e-4)


@pytest.fixture
def server(tmp_path):
    """Serves a folder on 127.0.0.1 -> (folder, address)."""
    (tmp_path / "www").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield tmp_path / "www", f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_get(server, tmp_path, monkeypatch):
    folder, address = server
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "HOST", address)
    (folder / "cyclegan" / "datasets").mkdir(parents=True)
    with zipfile.ZipFile(folder / "cyclegan" / "datasets" / "fruit.zip", "w") as archive:
        for part in ("trainA", "trainB", "testA", "testB"):
            Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
            archive.write(tmp_path / "x.png", f"fruit/{part}/x.png")
    data.main(["get", "fruit"])
    assert sorted(p.name for p in Path("datasets/fruit").iterdir()) == ["testA", "testB", "trainA", "trainB"]
    assert len(data.load_images("datasets/fruit/trainA", 8)) == 1 and not Path("datasets/fruit.zip").exists()
    whole = (folder / "cyclegan" / "datasets" / "fruit.zip").read_bytes()
    (folder / "cyclegan" / "datasets" / "half.zip").write_bytes(whole.replace(b"IHDR", b"IHDX"))
    for name in ("half", "gone"):  # a damaged zip, and a dead link
        with pytest.raises(data.BadInput, match=f"put them into datasets/{name}/trainA"):
            data.main(["get", name])
    with zipfile.ZipFile(folder / "cyclegan" / "datasets" / "greedy.zip", "w") as archive:
        for name in ("greedy/trainA/x.png", "fruit/trainA/x.png", "../climbed.png"):
            archive.writestr(name, "")
    data.main(["get", "greedy"])
    assert sorted(str(p) for p in Path("datasets").rglob("x.png") if not p.stat().st_size) == ["datasets/greedy/trainA/x.png"]
    with pytest.raises(data.BadInput, match="not the name of a data set"):
        data.main(["get", "../fruit"])
    assert sorted(p.name for p in Path("datasets").iterdir()) == ["fruit", "greedy"] and not list(tmp_path.rglob("climbed.png"))


def test_preview(cats, tmp_path):
    data.main(["preview", str(cats), "--size", "32", "--deluxe", "jitter", "--diffaug", "cutout", "--out", str(tmp_path / "sheet.png")])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (6 * 34 + 2, 12 * 34 + 2, 3)
    plain, augmented = sheet[2:34, 2:34].astype(int), sheet[2:34, 36:68].astype(int)
    assert np.abs(plain - data.load_images(str(cats), 32)[0].permute(1, 2, 0).numpy()).max() <= 1
    assert (np.abs(augmented - 127).max(2) <= 1).mean() >= 0.1  # the hole, at least a fourth of the image if none sticks out


# ---- a run ----------------------------------------------------------------------------------------------------------

def train(*argv):
    dcgan.train(*dcgan.options([*SMALL, *map(str, argv)]))


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("flags", ["--deluxe --diffaug", "--loss wgan-gp --patch", "--loss vanilla --deluxe zoom,jitter --smooth 0.8 0.9 --up transpose"])
def test_a_run_on_disk_and_its_exact_resume(flags, cats, tmp_path):
    """Seven iterations at once, or three and then the rest: the same bits. Log and samples without gaps."""
    flags = [*flags.split(), "--data", cats, "--dtype", "fp32"]
    train(*flags, "--iters", 7, "--out", tmp_path / "a")
    train(*flags, "--iters", 3, "--out", tmp_path / "b")
    with open(tmp_path / "b" / "log.csv", "a") as file:
        file.write("4,1,1,1,1,1,1\n")  # as if killed between a log line and the next checkpoint
    train("--resume", tmp_path / "b", "--iters", 7)
    a, b = (data.load_checkpoint(tmp_path / run / "ckpt.pt", "dcgan") for run in "ab")
    for key in ("iteration", "parts", "sums", "logged", "random"):
        assert same(a[key], b[key]), key
    assert b["options"]["deluxe"] == options(*flags).deluxe and b["options"]["loss"] == options(*flags).loss
    logs = [[row[:-1] for row in csv.reader(open(tmp_path / run / "log.csv"))] for run in "ab"]
    assert logs[0] == logs[1] and [row[0] for row in logs[0]] == ["iteration", *"1234567"]
    assert logs[0][0][1:6] == ["D_real_loss", "D_fake_loss", "G_loss", "D(real)", "D(fake)"]
    for run in (tmp_path / "a", tmp_path / "b"):
        assert {p.name for p in run.iterdir()} == {"ckpt.pt", "log.csv", "losses.png", "samples", "timelapse.gif"}
        assert {"000002.png", "000004.png", "000006.png", "000007.png"} <= {p.name for p in (run / "samples").iterdir()}
    assert Image.open(tmp_path / "a" / "samples" / "000007.png").size == (8 * 34 + 2, 8 * 34 + 2)


def test_gif_has_every_frame(tmp_path):
    data.save_gif(torch.rand(5, 3, 8, 8) * 2 - 1, tmp_path / "a.gif", 60)
    gif = Image.open(tmp_path / "a.gif")
    assert gif.n_frames == 5 and gif.size == (8, 8) and gif.info["duration"] == 60


def test_seed_repeats_and_differs(cats, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        train("--data", cats, "--iters", 2, "--seed", seed, "--out", tmp_path / name, "--dtype", "fp32")
    a, b, c = (data.load_checkpoint(tmp_path / name / "ckpt.pt", "dcgan")["parts"] for name in "abc")
    assert same(a, b) and not same(a["G"], c["G"]) and not same(a["batches"], c["batches"])
    for seed in (5, 6):
        train_cyclegan("--X", cats, "--Y", cats, "--iters", 1, "--seed", seed, "--out", tmp_path / str(seed))
    a, b = (data.load_checkpoint(tmp_path / seed / "ckpt.pt", "cyclegan")["parts"] for seed in "56")
    assert not same(a["G_XY"], b["G_XY"]) and not same(a["batches_X"], b["batches_X"])


def test_sampling(cats, tmp_path, capsys):
    train("--data", cats, "--iters", 2, "--width", 3, "--z", 5, "--out", tmp_path / "run")
    checkpoint = data.load_checkpoint(tmp_path / "run" / "ckpt.pt", "dcgan")
    for name, value in checkpoint["parts"]["ema"].items():  # after two steps all is grey, and equal frames of a GIF are merged
        checkpoint["parts"]["ema"][name] = value * 20 if name.endswith("weight") else value
    data.save_checkpoint(checkpoint, tmp_path / "run" / "ckpt.pt")
    for _ in range(2):
        opt, checkpoint = dcgan.options(["--sample", str(tmp_path / "run"), "--n", "10"])
        dcgan.sample(opt, checkpoint)
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {"generated", "generated-2"}  # nothing is overwritten
    folder = tmp_path / "run" / "generated"
    assert len(list((folder / "images").iterdir())) == 10
    assert Image.open(folder / "grid.png").size == (8 * 34 + 2, 2 * 34 + 2)
    assert Image.open(folder / "nearest.png").size == (8 * 34 + 2, 2 * 66 + 2)
    assert Image.open(folder / "walk.gif").n_frames == 96
    G = dcgan.Generator(32, 3, 5).eval()
    G.load_state_dict(checkpoint["parts"]["ema"])
    noise = torch.randn(16, 5, 1, 1, generator=torch.Generator().manual_seed(opt.seed))
    first = (G(noise)[0].detach() + 1) * 127.5
    drawn = np.asarray(Image.open(folder / "images" / "00000.png")).transpose(2, 0, 1)
    assert np.abs(first.numpy() - drawn).max() < 2  # the averaged generator, in evaluation mode


def test_slerp_keeps_the_length():
    a, b = torch.randn(100, 1, 1), torch.randn(100, 1, 1)
    a, b = a / a.norm(), b / b.norm()
    assert all(abs(dcgan.slerp(a, b, t / 4).norm() - 1) < 1e-5 for t in range(5))
    assert torch.allclose(dcgan.slerp(a, b, 0), a, atol=1e-6) and torch.allclose(dcgan.slerp(a, b, 1), b, atol=1e-6)


def test_second_stage_changes_what_it_is_told(cats, tmp_path):
    train("--data", cats, "--iters", 2, "--deluxe", "--diffaug", "cutout", "--out", tmp_path / "run")
    train("--resume", tmp_path / "run", "--diffaug", "cutout,translation", "--iters", 3, "--g-lr", 1e-6)
    stored = data.load_checkpoint(tmp_path / "run" / "ckpt.pt", "dcgan")
    assert stored["options"]["diffaug"] == "cutout,translation" and stored["options"]["deluxe"] == "crop,flip"
    assert stored["iteration"] == 3 and stored["parts"]["opt_G"]["param_groups"][0]["lr"] == 1e-6
    train("--resume", tmp_path / "run")  # finished: says so, does nothing
    assert data.load_checkpoint(tmp_path / "run" / "ckpt.pt", "dcgan")["iteration"] == 3


def test_runs_are_named_after_their_flags(cats, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        train("--data", cats, "--iters", 1, "--deluxe", "--diffaug")
    names = sorted(p.name for p in Path("out").iterdir())
    assert len(names) == 2 and names[1] == names[0] + "-2" and "deluxe" in names[0] and "diffaug" in names[0]


def test_ctrl_c_saves_and_says_how_to_go_on(cats, tmp_path):
    command = [sys.executable, HERE / "dcgan.py", *SMALL, "--data", cats, "--iters", "100000", "--out", tmp_path / "run"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    while "3/100000" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and f"--resume {tmp_path / 'run'}" in out
    assert data.load_checkpoint(tmp_path / "run" / "ckpt.pt", "dcgan")["iteration"] >= 3


def test_sigkill_and_resume_end_in_the_same_bits(cats, tmp_path):
    flags = ["--data", cats, "--deluxe", "--diffaug", "--iters", 40, "--save-every", 5]
    command = [sys.executable, HERE / "dcgan.py", *SMALL, *flags, "--out", tmp_path / "killed"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    while "12/40" not in process.stdout.readline():
        pass
    process.kill()
    process.communicate(timeout=60)
    subprocess.run(list(map(str, [sys.executable, HERE / "dcgan.py", "--resume", tmp_path / "killed"])), check=True, timeout=200)
    command[-1] = tmp_path / "whole"
    subprocess.run(list(map(str, command)), check=True, timeout=200)
    killed, whole = (data.load_checkpoint(tmp_path / run / "ckpt.pt", "dcgan") for run in ("killed", "whole"))
    assert whole["iteration"] == 40 and all(same(killed[key], whole[key]) for key in ("iteration", "parts", "sums", "logged", "random"))
    for sample in (tmp_path / "whole" / "samples").iterdir():
        assert sample.read_bytes() == (tmp_path / "killed" / "samples" / sample.name).read_bytes()
    assert len(list((tmp_path / "killed" / "samples").iterdir())) == 20
    assert (tmp_path / "killed" / "timelapse.gif").read_bytes() == (tmp_path / "whole" / "timelapse.gif").read_bytes()


def test_a_loss_that_is_not_finite_stops_the_run(cats, tmp_path, monkeypatch):
    good, count = dcgan.step, [0]
    def step(*args):
        count[0] += 1
        return good(*args) if count[0] < 4 else [x * math.nan for x in good(*args)]
    monkeypatch.setattr(dcgan, "step", step)
    with pytest.raises(data.BadInput, match="not finite by iteration 4.*ckpt.pt"):
        train("--data", cats, "--iters", 9, "--out", tmp_path / "run", "--sample-every", 1)
    assert data.load_checkpoint(tmp_path / "run" / "ckpt.pt", "dcgan")["iteration"] == 2


def test_weights_that_are_not_finite_are_never_saved(cats, tmp_path, monkeypatch):
    good, count = dcgan.step, [0]
    def step(G, *args):
        losses, count[0] = good(G, *args), count[0] + 1
        if count[0] == 4:
            next(G.parameters()).data.fill_(math.inf)
        return losses
    monkeypatch.setattr(dcgan, "step", step)
    with pytest.raises(data.BadInput, match="not finite by iteration 4"):
        train("--data", cats, "--iters", 9, "--out", tmp_path / "run", "--log-every", 9, "--sample-every", 9)
    assert data.load_checkpoint(tmp_path / "run" / "ckpt.pt", "dcgan")["iteration"] == 2


CHECKPOINT = {"program": "dcgan", "iteration": 1, "options": {}, "parts": {}, "logged": 1, "sums": torch.zeros(1), "random": None}


def test_checkpoint_survives_a_failed_write(tmp_path, monkeypatch):
    flushed, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: flushed.append(fsync(number)))
    data.save_checkpoint(CHECKPOINT | {"iteration": 7}, tmp_path / "ckpt.pt")
    assert len(flushed) == 2  # the file, then its name in the folder
    monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        data.save_checkpoint(CHECKPOINT, tmp_path / "ckpt.pt")
    assert data.load_checkpoint(tmp_path / "ckpt.pt", "dcgan")["iteration"] == 7 and len(list(tmp_path.iterdir())) == 1


def test_a_flipped_bit_is_noticed(tmp_path):
    data.save_checkpoint(CHECKPOINT | {"sums": torch.arange(999.)}, tmp_path / "ckpt.pt")
    raw = bytearray((tmp_path / "ckpt.pt").read_bytes())
    raw[raw.index(torch.arange(999.).numpy().tobytes()) + 100] ^= 1
    (tmp_path / "ckpt.pt").write_bytes(raw)
    assert torch.load(tmp_path / "ckpt.pt")["sums"].shape == (999,)  # torch itself does not
    with pytest.raises(data.BadInput, match="damaged"):
        data.load_checkpoint(tmp_path / "ckpt.pt", "dcgan")


def test_a_kill_during_the_last_save_loses_nothing(cats, tmp_path, monkeypatch):
    """Whatever is written after the checkpoint would be missing for good: --resume takes the run for finished."""
    train("--data", cats, "--iters", 4, "--out", tmp_path / "a")
    keep = data.save_checkpoint
    def killed(checkpoint, path):
        keep(checkpoint, path)
        if checkpoint["iteration"] == 4:
            raise ZeroDivisionError
    monkeypatch.setattr(data, "save_checkpoint", killed)
    with pytest.raises(ZeroDivisionError):
        train("--data", cats, "--iters", 4, "--out", tmp_path / "b")
    for name in ("timelapse.gif", "samples/000004.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("edit", ["", "rubbish\n\n;;", "iteration;D_real_loss\n1;2\n", "nan,nan\n\0", None])
def test_a_log_that_someone_edited_stops_no_run(edit, cats, tmp_path, monkeypatch):
    train("--data", cats, "--iters", 2, "--out", tmp_path / "run")
    def spoil():
        if edit is None:
            (tmp_path / "run" / "log.csv").unlink()
        else:
            (tmp_path / "run" / "log.csv").write_text(edit)
    spoil()
    good = dcgan.average
    monkeypatch.setattr(dcgan, "average", lambda *args: (good(*args), args[2] == 5 and spoil()))  # and once more while it runs
    train("--resume", tmp_path / "run", "--iters", 8)
    rows = [row[0] for row in csv.reader(open(tmp_path / "run" / "log.csv")) if row]
    assert rows[-3:] == ["6", "7", "8"] and (tmp_path / "run" / "losses.png").exists()


class Planted:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_can_not_run_code(tmp_path):
    torch.save(CHECKPOINT | {"random": Planted(tmp_path / "ran")}, tmp_path / "ckpt.pt")
    with pytest.raises(data.BadInput, match="damaged or no checkpoint"):
        data.load_checkpoint(tmp_path / "ckpt.pt", "dcgan")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("argv, words", [
    (["--data", "nowhere"], "nowhere does not exist"),
    (["--data", "empty"], "no usable image in empty"),
    (["--diffaug", "colour"], "'colour' among color, translation, cutout"),
    (["--deluxe", "crop,spin"], "'spin' among crop, flip, zoom"),
    (["--size", "100"], "choose from"),
    (["--batch", "0"], "needs a whole number from 1"),
    (["--g-lr", "nan"], "needs a number"),
    (["--smooth", "0.9", "0.2"], "the lower limit comes first"),
    (["--loss", "wgan", "--g-target", "0.5"], "--g-target would have no effect"),
    (["--spectral-norm", "--d-norm", "batch"], "--d-norm would have no effect"),
    (["--loss", "wgan-gp", "--d-norm", "batch"], "can't have batch statistics"),
    (["--data", "damaged.zip"], "neither a folder nor an undamaged .zip"),
    (["--device", "meta"], "no such device"),
    (["--device", "cuda:9"], "no such device"),
    (["--resume", "nowhere"], "no checkpoint"),
    (["--resume", "broken"], "damaged"),
    (["--resume", "run", "--width", "8"], "--width: run was trained with 4"),
    (["--resume", "run", "--seed", "1"], "--seed: run was trained with 0"),
    (["--data", "run/samples", "--out", "run"], "run is in use already"),
    (["--sample", "other"], "written by cyclegan.py"),
    (["--sample", "changed"], "does not fit this program"),
    (["--resume", "changed", "--iters", "9"], "does not fit this program"),
    (["--resume", ""], "need the folder of a run"),
    (["--out", "empty/ckpt.pt"], "Not a directory"),
    (["--out", "broken"], "broken is in use"),
    (["--data", "pipe"], "neither a folder nor"),
    (["--seed", 2**64], "needs a whole number"),
    (["--device", "hpu"], "no such device"),
    (["--width", "60000"], "out of memory"),
])
def test_bad_input_gets_one_line(argv, words, cats, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir(), Path("broken").mkdir(), Path("other").mkdir()
    Path("damaged.zip").write_bytes(b"PK\5\6\0\0\0\0\1\0\1\0" + b"\xff" * 8 + b"\0\0")
    Path("broken/ckpt.pt").write_bytes(b"PK\3\4 nothing")
    Path("empty/ckpt.pt").touch(), os.mkfifo("pipe")
    torch.save(CHECKPOINT | {"program": "cyclegan"}, "other/ckpt.pt")
    if "run" in argv or "changed" in argv:
        train("--data", cats, "--iters", 2, "--out", "run" if "run" in argv else "changed")
    if "changed" in argv:  # as if someone had added a layer to the program
        saved = torch.load("changed/ckpt.pt")
        for name in ("G", "ema"):
            saved["parts"][name]["9.weight"] = torch.zeros(1)
        torch.save(saved, "changed/ckpt.pt")
    before = sorted(map(str, Path().rglob("*")))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped, data.one_line_errors():
        opt, checkpoint = dcgan.options([*([*SMALL, "--data", str(cats)] if "--resume" not in argv else []), *map(str, argv)])
        dcgan.sample(opt, checkpoint) if opt.sample else dcgan.train(opt, checkpoint)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and words in error
    assert sorted(map(str, Path().rglob("*"))) == before


def test_precision(monkeypatch):
    """auto: bf16 where the hardware has it, and nowhere else."""
    for capabilities, dtype, expected in (({"avx512_bf16": True}, "auto", True), ({"avx512_bf16": False}, "auto", False),
                                          ({}, "bf16", True), ({"amx_bf16": True}, "fp32", False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
        with data.setup(options("--dtype", dtype))[1]():
            assert (F.conv2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1)).dtype == torch.bfloat16) == expected


def test_only_the_promised_packages_are_imported():
    allowed = {"torch", "torchvision", "PIL", "numpy", "data", "diffaug"} | sys.stdlib_module_names
    for file in ("dcgan.py", "cyclegan.py", "data.py", "diffaug.py"):
        words = [line.split() for line in (HERE / file).read_text().splitlines() if line.lstrip().startswith(("import ", "from "))]
        assert {w[1].split(".")[0] for w in words} <= allowed, file


# ---- CycleGAN -------------------------------------------------------------------------------------------------------

def cycle_options(*argv):
    return cyclegan.options([*SMALL[:4], *SMALL[6:], "--identity", "0", *map(str, argv)])


def train_cyclegan(*argv):
    cyclegan.train(*cycle_options(*argv))


def test_cyclegan_networks():
    """The paper's sizes at 256 px; blocks with weights of their own; the discriminator of dcgan.py."""
    assert parameters(cyclegan.Generator(256, 64, blocks=9)) == 11_378_179
    assert parameters(cyclegan.Discriminator(256, 64, patch=True)) == 2_764_737
    G = cyclegan.Generator(64, 4, blocks=3)
    assert G(torch.zeros(1, 3, 64, 48)).shape == (1, 3, 64, 48)
    assert len({id(p) for p in G.parameters()}) == len(list(G.parameters())) and len([m for m in G if isinstance(m, cyclegan.ResidualBlock)]) == 3
    for net in (G, cyclegan.Generator(256, 4, blocks=3)):  # the image's own brightness gets past the layers next to it
        assert sorted(m.num_features for m in net.modules() if isinstance(m, torch.nn.InstanceNorm2d)) == [8] * (7 if net is G else 2) + [16] * (0 if net is G else 7)
    assert [type(layer) for layer in cyclegan.Generator(64, 3)] == [type(layer) for layer in G]  # 3 channels are not always an image
    assert parameters(G) - parameters(cyclegan.Generator(64, 4, blocks=2)) == 2 * (9 * 8 * 8 + 8)
    assert parameters(cyclegan.Generator(64, 4, up="transpose")) - parameters(G) == (16 - 9) * (8 * 4 + 4 * 3)
    for flags in ({"patch": True}, {"patch": False}, {"spectral": True}, {"norm": "instance"}):
        ours, theirs = cyclegan.Discriminator(64, 4, **flags), dcgan.Discriminator(64, 4, **flags)
        assert ours.state_dict().keys() == theirs.state_dict().keys() and parameters(ours) == parameters(theirs)


def test_flags_of_the_networks_reach_them():
    def built(*flags):
        _, D = dcgan.build(options(*flags), torch.device("cpu"))
        _, _, *both = cyclegan.build(cycle_options(*flags)[0], torch.device("cpu"))
        return [D, *both]
    for D in built("--spectral-norm"):
        assert all(nn.utils.parametrize.is_parametrized(layer) for layer in D if isinstance(layer, nn.Conv2d))
    for D in built("--d-norm", "instance"):
        assert "InstanceNorm2d" in kinds(D)
    for D in built("--patch"):
        assert D(torch.zeros(1, 3, 32, 32)).shape[2] > 1
    for D in built():
        assert kinds(D) == {"Conv2d", "LeakyReLU"} and D(torch.zeros(1, 3, 32, 32)).shape[2:] == (1, 1)
        assert not any(nn.utils.parametrize.is_parametrized(layer) for layer in D)
    for flags, layers in ((["--norm", "instance"], {"ConvTranspose2d", "UpConv", "InstanceNorm2d", "ReLU", "Tanh"}),
                          (["--up", "transpose"], {"ConvTranspose2d", "BatchNorm2d", "ReLU", "Tanh"}),
                          (["--selu"], {"ConvTranspose2d", "UpConv", "SELU", "Tanh"})):
        G, D = dcgan.build(options(*flags), torch.device("cpu"))
        assert kinds(G) == layers and ("SELU" in kinds(D)) == ("--selu" in flags)
    G, *_ = cyclegan.build(cycle_options("--up", "transpose", "--blocks", 1)[0], torch.device("cpu"))
    assert [type(layer).__name__ for layer in G if not isinstance(layer, (nn.ReLU, nn.InstanceNorm2d))] == [
        "Conv2d", "Conv2d", "ResidualBlock", "ConvTranspose2d", "ConvTranspose2d", "Tanh"]


class ShiftG(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by, self.calls = nn.Parameter(torch.tensor(by)), 0

    def forward(self, x):
        self.calls += 1
        return x + self.by


@pytest.mark.parametrize("argv, cycle, identity, pull_cycle, pull_identity, calls", [
    ([], 0.0, 0.0, 0, 0, 1),
    (["--cycle"], 0.2, 0.0, 2 * 2, 0, 2),
    (["--cycle", "l2", "--lambda-cycle", 5], 0.04, 0.0, 5 * 2 * 0.4, 0, 2),
    (["--cycle", "--identity", 3], 0.2, 0.4, 2 * 2, 3, 2),
])
def test_cyclegan_losses_by_hand(argv, cycle, identity, pull_cycle, pull_identity, calls):
    """x = 0.2, y = 0.5, G_XY adds 0.1, G_YX takes 0.3 off, D is the mean. Two forwards, four with the cycle."""
    opt, _ = cycle_options(*argv)
    Gs, Ds = [ShiftG(0.1), ShiftG(-0.3)], [MeanD(), MeanD()]
    optimizers = [torch.optim.SGD([p for net in nets for p in net.parameters()], 1e-5) for nets in (Gs, Ds)]
    starts = [next(net.parameters()).detach().clone() for net in Gs + Ds]
    x, y = torch.full((2, 3, 32, 32), 0.2), torch.full((2, 3, 32, 32), 0.5)
    pools = cyclegan.Pool(0), cyclegan.Pool(0)
    losses = cyclegan.step(*Gs, *Ds, *optimizers, x, y, pools, opt, contextlib.nullcontext)
    d = lambda value: value + 0.25
    assert [loss.item() for loss in losses] == pytest.approx([
        (d(0.2) - 1) ** 2 + d(0.2) ** 2, (d(0.5) - 1) ** 2 + d(0.3) ** 2, (d(0.3) - 1) ** 2, (d(0.2) - 1) ** 2,
        cycle, cycle, identity, d(0.2), d(0.2), d(0.5), d(0.3)], abs=1e-5)
    assert Gs[0].by.grad.item() == pytest.approx(2 * (d(0.3) - 1) - pull_cycle + pull_identity, abs=1e-4)
    assert Gs[1].by.grad.item() == pytest.approx(2 * (d(0.2) - 1) - pull_cycle - pull_identity, abs=1e-4)
    assert all(p != start for net, start in zip(Gs + Ds, starts) for p in net.parameters())  # each takes its step
    assert [G.calls for G in Gs] == [calls, calls] and [D.calls for D in Ds] == [[4, 2], [4, 2]]


def test_cyclegan_diffaug_reaches_both_discriminators_in_both_steps(monkeypatch):
    seen = []
    monkeypatch.setattr(diffaug, "augment", lambda x, policy: seen.append((len(x), policy)) or x)
    test_cyclegan_losses_by_hand(["--diffaug", "cutout"], 0.0, 0.0, 0, 0, 1)
    assert seen == [(4, "cutout"), (4, "cutout"), (2, "cutout"), (2, "cutout")]


def test_tensorboard_reaches_both_programs(cats, tmp_path, monkeypatch):
    """A stand-in: a writer that only takes numbers."""
    written = []

    class SummaryWriter:
        def __init__(self, path, purge_step):
            written.append((path, purge_step))

        def add_scalar(self, name, value, iteration):
            written.append((name, iteration))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    train("--data", cats, "--iters", 1, "--tensorboard", "--out", tmp_path / "a")
    assert written == [(tmp_path / "a", 1)] + [(name, 1) for name in ("D_real_loss", "D_fake_loss", "G_loss", "D(real)", "D(fake)")]
    train_cyclegan("--X", cats, "--Y", cats, "--iters", 1, "--tensorboard", "--out", tmp_path / "c")
    assert written[6:] == [(tmp_path / "c", 1)] + [(name, 1) for name in cyclegan.COLUMNS]


@pytest.fixture
def compiled(monkeypatch):
    """torch.compile without a compiler. What CUDA graphs do to a network's outputs and gradients, which is to write over
    them in the next step, is done here as well -> [(network, mode)], [the number of results in each step]."""
    nets, left, steps = [], [], []

    def compile_function(function, mode=None, dynamic=None):
        if mode:
            net = function.__self__
            nets.append((type(net).__name__, mode))
            net.register_forward_hook(lambda net, inputs, output: left.append(output.detach()))
            for p in net.parameters():
                p.register_post_accumulate_grad_hook(lambda p: left.append(p.grad))
        return function

    def begin_step():
        steps.append(len(left))
        for result in left:
            result.fill_(math.nan)
        left.clear()
    monkeypatch.setattr(torch, "compile", compile_function)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", begin_step)
    return nets, steps


def test_compile_takes_cuda_graphs_on_a_gpu_and_needs_a_compiler(compiled, cats, tmp_path, monkeypatch, capsys):
    data.compile_networks([nn.Flatten()], torch.device("cpu"))
    assert compiled[0] == [("Flatten", "default")] and "no CUDA graphs on cpu" in capsys.readouterr().err
    ones = torch.ones(9)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", lambda *size, device: ones)  # there may be no GPU
        data.compile_networks([nn.Flatten()], torch.device("cuda"))
    assert compiled[0][1:] == [("Flatten", "reduce-overhead")] and not capsys.readouterr().err

    def compiler(function):
        raise RuntimeError("no compiler\nand much more")
    monkeypatch.setattr(torch, "compile", compiler)
    with pytest.raises(data.BadInput, match=r"does not work here \(no compiler\)"):
        train("--data", cats, "--compile", "--iters", 1, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None) if os.name == "posix" else None, "mallopt"), reason="for glibc")
def test_a_run_keeps_the_memory_that_tensors_free(cats, tmp_path):
    """Ten blocks of 4 MB: glibc by itself would give them back each time, and each page of 4 KB would fault anew."""
    program = """import resource, sys, torch, dcgan
dcgan.train(*dcgan.options(sys.argv[1:]))
for _ in range(4):
    faults, blocks = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, [torch.ones(1_000_000) for _ in range(10)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)"""
    flags = [*SMALL, "--data", cats, "--iters", 1, "--out", tmp_path / "run"]
    result = subprocess.run([sys.executable, "-c", program, *map(str, flags)], cwd=HERE, capture_output=True, text=True, check=True)
    assert int(result.stdout.split()[-1]) < 3000


def test_compile_takes_each_network_as_a_whole(monkeypatch):
    """As one graph that holds every layer: what torch can't compile, it would leave as it is without a word."""
    graphs, compile_function = [], torch.compile
    count = lambda graph, inputs: graphs.append(sum(node.op == "call_function" for node in graph.graph.nodes)) or graph.forward
    monkeypatch.setattr(torch, "compile", lambda function, mode=None, dynamic=None: compile_function(function, backend=count, dynamic=dynamic))
    G_XY, _, D_X, _ = cyclegan.build(cycle_options("--spectral-norm")[0], "cpu")
    nets = [*dcgan.build(options(), "cpu"), G_XY, D_X]
    data.compile_networks(nets, torch.device("cpu"))
    graphs.clear()
    for net, x in zip(nets, (torch.ones(2, 8, 1, 1), *[torch.ones(2, 3, 32, 32)] * 3)):
        net(x)
    assert len(graphs) == len(nets) and all(ops >= len(net) for ops, net in zip(graphs, nets))


@pytest.mark.parametrize("flags", ["--critic-iters 2 --d-norm batch", "--loss wgan-gp", "--spectral-norm --loss wgan"])
def test_dcgan_reads_nothing_of_the_last_step(flags, cats, tmp_path, compiled):
    train("--data", cats, "--iters", 3, "--dtype", "fp32", *flags.split(), "--out", tmp_path / "a")
    train("--data", cats, "--iters", 3, "--dtype", "fp32", *flags.split(), "--compile", "--out", tmp_path / "b")
    saved = [data.load_checkpoint(tmp_path / run / "ckpt.pt", "dcgan")["parts"] for run in "ab"]
    assert same(saved[0], saved[1]) and len(compiled[1]) == 3 and min(compiled[1][1:]) > 4
    assert [name for name, _ in compiled[0]] == ["Generator", "Discriminator"][:1 if "gp" in flags else 2]  # no second derivatives


def test_cyclegan_reads_nothing_of_the_last_step(cats, tmp_path, compiled):
    flags = "--X", cats, "--Y", cats, "--iters", 4, "--dtype", "fp32", "--patch", "--cycle", "--pool", 4, "--identity", 1
    train_cyclegan(*flags, "--out", tmp_path / "a")
    train_cyclegan(*flags, "--compile", "--out", tmp_path / "b")
    saved = [data.load_checkpoint(tmp_path / run / "ckpt.pt", "cyclegan")["parts"] for run in "ab"]
    assert same(saved[0], saved[1]) and len(compiled[1]) == 4 and min(compiled[1][1:]) > 8
    assert [name for name, _ in compiled[0]] == ["Generator"] * 2 + ["Discriminator"] * 2


@pytest.mark.parametrize("argv, words", [
    (["--lambda-cycle", "5"], "--lambda-cycle would have no effect"),
    (["--spectral-norm", "--d-norm", "instance"], "--d-norm would have no effect"),
    (["--input", "somewhere"], "go together"),
])
def test_cyclegan_refuses_options_without_effect(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped, data.one_line_errors():
        cyclegan.options(argv)
    assert stopped.value.code == 2 and words in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_pool_keeps_half_and_returns_old_fakes():
    pool, image = cyclegan.Pool(50), lambda value, n: torch.full((n, 3, 2, 2), float(value))
    for i in range(5):
        assert torch.equal(pool.swap(image(i, 10)), image(i, 10))  # as long as it fills, everything passes
    assert len(pool.images) == 50
    returned = torch.cat([pool.swap(image(9, 10)) for _ in range(20)])[:, 0, 0, 0]
    assert 40 < (returned != 9).sum() < 50.5 and set(returned.tolist()) == {0, 1, 2, 3, 4, 9}
    assert len(pool.swap(image(1, 60))) == 60 and len(pool.images) == 50  # a batch larger than the pool
    assert torch.equal(cyclegan.Pool(0).swap(image(1, 3)), image(1, 3))
    pool.load_state_dict({"images": image(1, 50).half()})  # a checkpoint's: brought to where the fakes are
    pool.swap(image(1, 3))
    assert pool.images.dtype == torch.float32


@pytest.mark.parametrize("flags", ["--patch --cycle --identity 1", "--diffaug"])
def test_cyclegan_step_asks_the_device_for_no_number(flags):
    opt, _ = cycle_options(*flags.split())
    nets, x = list(cyclegan.build(opt, "meta")), torch.empty(4, 3, 32, 32, device="meta")
    optimizers = [torch.optim.SGD([p for net in pair for p in net.parameters()], 0.1) for pair in (nets[:2], nets[2:])]
    pools = cyclegan.Pool(6), cyclegan.Pool(6)
    for _ in range(3):  # until the pools are full
        losses = cyclegan.step(*nets, *optimizers, x, x, pools, opt, contextlib.nullcontext)
    assert all(loss.is_meta and loss.ndim == 0 for loss in losses)


def test_cyclegan_loop_hands_each_part_its_own(tmp_path, monkeypatch):
    """X is red and Y blue; without memory each average is its own G; every G and D is trained; two pools."""
    for name, colour in (("X", "red"), ("Y", "blue")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (32, 32), colour).save(tmp_path / name / "1.png")
    steps, step = [], cyclegan.step

    def spy(*args):
        G_XY, G_YX, D_X, D_Y, _, _, x, y, *_ = args
        for p in [*D_X.parameters(), *D_Y.parameters()]:
            p.data.mul_(20)  # for a gradient that is too long
        steps.append((x, y, [next(net.parameters()).detach().clone() for net in args[:4]]))
        result = step(*args)
        norms = [torch.cat([p.grad.flatten() for p in D.parameters()]).norm().item() for D in (D_X, D_Y)]
        assert norms == pytest.approx([1, 1], abs=1e-3)
        return result
    monkeypatch.setattr(cyclegan, "step", spy)
    train_cyclegan("--X", tmp_path / "X", "--Y", tmp_path / "Y", "--cycle", "--ema", 0, "--iters", 1, "--out", tmp_path / "run")
    (x, y, before), = steps
    assert x[:, 0].min() == 1 == y[:, 2].min() and x[:, 1:].max() == -1 == y[:, :2].max()
    parts = data.load_checkpoint(tmp_path / "run" / "ckpt.pt", "cyclegan")["parts"]
    assert same(parts["G_XY"], parts["ema_XY"]) and same(parts["G_YX"], parts["ema_YX"]) and not same(parts["G_XY"], parts["G_YX"])
    for name, weight in zip(("G_XY", "G_YX", "D_X", "D_Y"), before):
        assert not torch.equal(next(iter(parts[name].values())), weight)
    assert [len(parts[pool]["images"]) for pool in ("pool_X", "pool_Y")] == [4, 4]


def test_cyclegan_run_resume_and_translation(cats, tmp_path, monkeypatch):
    few = tmp_path / "few"
    few.mkdir()
    for i in range(3):  # fewer than a batch, and not as many as the other set
        data.draw_cat(1000 + i, "blue", 32).save(few / f"{i}.png")
    flags = ["--X", few, "--Y", cats, "--patch", "--cycle", "--deluxe", "--diffaug", "--identity", 1, "--decay", "--g-lr", 3e-4, "--d-lr", 3e-4, "--pool", 6, "--dtype", "fp32",
             "--log-every", 2]
    saved, save = [], data.save_checkpoint
    monkeypatch.setattr(data, "save_checkpoint", lambda checkpoint, path: saved.append(checkpoint["iteration"]) or save(checkpoint, path))
    train_cyclegan(*flags, "--iters", 6, "--out", tmp_path / "a")
    assert saved == [2, 4, 6] and [p.stem for p in sorted((tmp_path / "a" / "samples").iterdir())] == ["000002", "000004", "000006"]
    stopping = cyclegan.average  # SIGINT at the third iteration
    calls = []
    def interrupted(*args):
        calls.append(1)
        stopping(*args)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
    cyclegan.average = interrupted
    try:
        with pytest.raises(SystemExit) as stopped:
            train_cyclegan(*flags, "--iters", 6, "--out", tmp_path / "b")
    finally:
        cyclegan.average = stopping
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert stopped.value.code == 130 and saved[3:] == [2, 3]
    cyclegan.train(*cyclegan.options(["--resume", str(tmp_path / "b")]))
    a, b = (data.load_checkpoint(tmp_path / run / "ckpt.pt", "cyclegan") for run in "ab")
    assert all(same(a[key], b[key]) for key in ("iteration", "parts", "sums", "logged", "random"))
    logs = [[row[:-1] for row in csv.reader(open(tmp_path / run / "log.csv"))] for run in "ab"]
    assert logs[0] == logs[1] and [row[0] for row in logs[0]] == ["iteration", "2", "4", "6"]  # the third was half a line
    assert len(a["parts"]["pool_X"]["images"]) == 6
    for part in ("opt_G", "opt_D"):
        assert a["parts"][part]["param_groups"][0]["lr"] == pytest.approx(3e-4 * (2 - 12 / 7))
    assert Image.open(tmp_path / "a" / "samples" / "000006.png").size == (3 * 34 + 2, 6 * 34 + 2)  # three rows each way
    header = next(csv.reader(open(tmp_path / "a" / "log.csv")))
    assert header[1:8] == ["D_X_loss", "D_Y_loss", "G_XY_loss", "G_YX_loss", "cycle_X", "cycle_Y", "identity"] and "truth_error" not in header

    photos = tmp_path / "photos" / "sub"
    photos.mkdir(parents=True)
    Image.new("RGBA", (300, 101), (255, 0, 0, 0)).save(photos / "été 1.png")
    Image.new("L", (30, 90)).save(photos / "été 1.jpg")
    Image.new("RGB", (50, 50)).save(tmp_path / "photos" / "b.webp")
    for to in "XY":
        cyclegan.translate(*cycle_options("--translate", tmp_path / "a", "--input", tmp_path / "photos", "--to", to))
    results = tmp_path / "a" / "translated_to_Y"
    sizes = {str(p.relative_to(results)): Image.open(p).size for p in results.rglob("*.png")}
    assert sizes == {"b.png": (32, 32), os.path.join("sub", "été 1.png.png"): (95, 32), os.path.join("sub", "été 1.jpg.png"): (32, 96)}
    with zipfile.ZipFile(tmp_path / "climbing.zip", "w") as archive:
        for i, name in enumerate(("../up.webp", "/root.webp", "//two.webp")):
            archive.write(tmp_path / "photos" / "b.webp", name)
    cyclegan.translate(*cycle_options("--translate", tmp_path / "a", "--input", tmp_path / "climbing.zip", "--out", tmp_path / "out"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["root.png", "two.png", "up.png"]
    (tmp_path / "none").mkdir()
    (tmp_path / "long.png").write_bytes(b"no picture")
    for source, out, words in (("none", "new", "no usable image"), ("long.png", "new", "no usable image"), ("photos", "photos", "in use")):
        with pytest.raises(data.BadInput, match=words):
            cyclegan.translate(*cycle_options("--translate", tmp_path / "a", "--input", tmp_path / source, "--out", tmp_path / out))
    assert not (tmp_path / "new").exists() and len(list((tmp_path / "photos").iterdir())) == 2
    for to, name in (("X", "ema_YX"), ("Y", "ema_XY")):  # two directions, two networks
        G = cyclegan.Generator(32, 4)
        G.load_state_dict(a["parts"][name])
        expected = (G(-torch.ones(1, 3, 32, 32))[0].detach() + 1) * 127.5
        drawn = np.asarray(Image.open(tmp_path / "a" / f"translated_to_{to}" / "b.png")).transpose(2, 0, 1)
        assert np.abs(expected.numpy() - drawn).max() <= 1 and not same(a["parts"]["ema_XY"], a["parts"]["ema_YX"])


@pytest.mark.parametrize("program, flags", [
    ("dcgan", "--norm instance --smooth 0.7 0.9"), ("cyclegan", "--patch --cycle --identity 1 --pool 6")])
def test_two_processes_do_what_one_does(program, flags, cats, tmp_path):
    """torchrun: half of the batch each, every random draw its share, gradients averaged, one pool, one writer, one resume."""
    rates = ["--g-lr", 0.01, "--d-lr", 0.01]  # high ones: what differs at all soon differs much
    flags = [*SMALL, *flags.split(), *rates, "--deluxe", "--diffaug", "--dtype", "fp32", *(["--data", cats] if program == "dcgan" else ["--X", cats, "--Y", cats])]
    flags = [flag for flag in flags if program == "dcgan" or flag not in ("--z", "8")]
    def run(processes, *argv):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes] if processes > 1 else []
        command = [sys.executable, *launch, HERE / f"{program}.py", *argv]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True, timeout=200).stdout
    run(1, *flags, "--iters", 6, "--out", tmp_path / "one")
    out = run(2, *flags, "--batch", 2, "--iters", 3, "--out", tmp_path / "two") + run(2, "--resume", tmp_path / "two", "--iters", 6)
    assert out.count("6/6") == 1 and out.count("finished") == 2
    one, two = ([list(map(float, list(row.values())[:-1])) for row in csv.DictReader(open(tmp_path / name / "log.csv"))] for name in ("one", "two"))
    assert len(one) == 6 and np.allclose(one, two, rtol=1e-3, atol=1e-4)
    assert {p.name for p in (tmp_path / "two").iterdir()} == {"ckpt.pt", "log.csv", "losses.png", "samples", "timelapse.gif"}


def test_truth_error_of_drawn_cats(tmp_path, monkeypatch):
    numbers = {n for _, first, count in data.DRAWN.values() for n in range(first, first + count)}
    assert len(numbers) == 204 + 75 and not numbers & set(range(2000, 2016))  # unpaired, and held out
    for name, (breed, first, _) in data.DRAWN.items():
        monkeypatch.setitem(data.DRAWN, name, (breed, first, 5))  # all of them would take long
    pairs = data.drawn_pairs("toy-blue", "toy-grumpy", 32)
    assert pairs[0].shape == pairs[1].shape == (16, 3, 32, 32) and 0.1 < F.l1_loss(*pairs) < 0.5
    assert data.drawn_pairs("toy-blue", "elsewhere", 32) is None
    expected = [np.asarray(data.draw_cat(2015, breed, 32)) / 127.5 - 1 for breed in ("blue", "grumpy")]
    assert all(np.allclose(pair[15].permute(1, 2, 0), cat, atol=1e-6) for pair, cat in zip(pairs, expected))
    train_cyclegan("--iters", 1, "--out", tmp_path / "run")
    row = next(csv.DictReader(open(tmp_path / "run" / "log.csv")))
    ema = [cyclegan.Generator(32, 4) for _ in "XY"]
    for G, name in zip(ema, ("ema_XY", "ema_YX")):
        G.load_state_dict(data.load_checkpoint(tmp_path / "run" / "ckpt.pt", "cyclegan")["parts"][name])
    expected = (F.l1_loss(ema[0](pairs[0]), pairs[1]) + F.l1_loss(ema[1](pairs[1]), pairs[0])) / 2
    assert float(row["truth_error"]) == pytest.approx(expected.item(), rel=1e-3)
