"""pytest -q test_smoke.py: offline, on a CPU, in about a minute. Each test says which error it catches."""
import contextlib
import copy
import http.server
import io
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
os.environ["OMP_NUM_THREADS"] = "1"  # for tiny networks the fastest, also in the processes that tests start
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageCms

import cyclegan
import data
import dcgan
import diffaug
HERE, CPU = Path(__file__).parent, torch.device("cpu")
SMALL = ("--size 32 --width 4 --batch 4 --iters 2 --log-every 1 --sample-every 2 --save-every 2 "
         "--device cpu").split()
FILES = ["ckpt.pt", "log.csv", "losses.png", "samples", "timelapse.gif"]  # of a run
both = pytest.mark.parametrize("program", [dcgan, cyclegan])
@pytest.fixture(autouse=True)
def clean():
    """The same random numbers for each test; a training's signal handler goes with it."""
    torch.manual_seed(0)
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

@pytest.fixture(scope="session")
def cats(tmp_path_factory):  # a folder of six
    folder = tmp_path_factory.mktemp("cats")
    for i in range(6):
        data.draw_cat(i, "grumpy", 40).save(folder / f"{i}.png")
    return folder
def options(flags="", program=dcgan):
    return program.options([*SMALL, *flags.split()])[0]
def command(program, cats, folder, flags):
    """The command line of a small run in this folder, or of going on with the one that is there."""
    sets = ["--data", cats] if program is dcgan else ["--X", cats, "--Y", cats]
    start = ["--resume", folder] if folder.exists() else [*SMALL, *sets, "--out", folder]
    return [*map(str, start), *flags.split()]
def train(program, cats, folder, flags=""):
    """Train in this process -> the checkpoint."""
    program.train(*program.options(command(program, cats, folder, flags)))
    return data.load_checkpoint(folder, program.__name__)
def same(a, b):  # two networks' saved weights
    return all(map(torch.equal, a.values(), b.values()))
def assert_same_run(a, b):
    """Two checkpoints, bit for bit, but for how fast the runs were and what was on the command line."""
    a, b = [{**run, "program": 0, "options": 0, "rows": [{**row, "images/s": 0} for row in run["rows"]]}
            for run in (a, b)]
    torch.testing.assert_close(a, b, rtol=0, atol=0)
def pixels(path):  # of a saved picture: [3, H, W]
    return np.asarray(Image.open(path)).astype(float).transpose(2, 0, 1)
def shows(picture, image):  # [3, H, W] in [0, 255], float [1, 3, H, W] in [-1, 1]
    return np.abs(picture - (image[0].detach().numpy() + 1) * 127.5).max() < 2
def names(folder):
    return sorted(path.name for path in folder.iterdir())
# ---- networks ----
class Plus(nn.Module):  # a residual block
    def __init__(self, f):
        super().__init__()
        self.f = f
    def forward(self, x):
        return x + self.f(x)

def reference(name):
    """The networks of width 4 as plain lists of layers, each written out once."""
    def up(a, b):
        return [nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(a, b, 3, 1, 1)]
    def block(c):
        return Plus(nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(c, c, 3), nn.InstanceNorm2d(c), nn.ReLU(),
            nn.ReflectionPad2d(1), nn.Conv2d(c, c, 3), nn.InstanceNorm2d(c)))
    return nn.Sequential(*{
        "G": [nn.ConvTranspose2d(5, 16, 4), nn.ReLU(), *up(16, 8), nn.ReLU(), *up(8, 4), nn.ReLU(),
              *up(4, 2), nn.ReLU(), nn.Conv2d(2, 3, 3, 1, 1), nn.Tanh()],
        "G batch transpose": [
            nn.ConvTranspose2d(5, 16, 4, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.ConvTranspose2d(16, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.ConvTranspose2d(8, 4, 4, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
            nn.ConvTranspose2d(4, 2, 4, 2, 1, bias=False), nn.BatchNorm2d(2), nn.ReLU(),
            nn.Conv2d(2, 3, 3, 1, 1), nn.Tanh()],
        "G selu": [nn.ConvTranspose2d(5, 16, 4), nn.SELU(), *up(16, 8), nn.SELU(), *up(8, 4), nn.SELU(),
                   *up(4, 2), nn.SELU(), nn.Conv2d(2, 3, 3, 1, 1), nn.Tanh()],
        "D": [nn.Conv2d(3, 4, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(4, 8, 4, 2, 1), nn.LeakyReLU(0.2),
              nn.Conv2d(8, 16, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 1, 4)],
        "D selu": [nn.Conv2d(3, 4, 4, 2, 1), nn.SELU(), nn.Conv2d(4, 8, 4, 2, 1), nn.SELU(),
                   nn.Conv2d(8, 16, 4, 2, 1), nn.SELU(), nn.Conv2d(16, 1, 4)],
        "D instance patch": [
            nn.Conv2d(3, 4, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(4, 8, 4, 1, 1, bias=False), nn.InstanceNorm2d(8), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 4, 1, 1)],
        "D batch": [
            nn.Conv2d(3, 4, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(4, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.LeakyReLU(0.2),
            nn.Conv2d(8, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16), nn.LeakyReLU(0.2), nn.Conv2d(16, 1, 4)],
        "X to Y": [
            nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1), nn.InstanceNorm2d(8), nn.ReLU(),
            block(8), block(8), *up(8, 4), nn.ReLU(), *up(4, 3), nn.Tanh()],
        "X to Y 256": [
            nn.ReflectionPad2d(3), nn.Conv2d(3, 4, 7), nn.ReLU(),
            nn.Conv2d(4, 8, 3, 2, 1), nn.InstanceNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, 2, 1), nn.InstanceNorm2d(16), nn.ReLU(), block(16),
            *up(16, 8), nn.InstanceNorm2d(8), nn.ReLU(), *up(8, 4), nn.ReLU(),
            nn.ReflectionPad2d(3), nn.Conv2d(4, 3, 7), nn.Tanh()],
    }[name])

@pytest.mark.parametrize("name, program, flags, k", [
    ("G", dcgan, "--norm none --z 5", 0), ("G batch transpose", dcgan, "--norm batch --up transpose --z 5", 0),
    ("G selu", dcgan, "--selu --z 5", 0), ("D", dcgan, "--no-minibatch-std", 1),
    ("D selu", dcgan, "--selu --d-norm batch --no-minibatch-std", 1), ("D", cyclegan, "", 3),
    ("D instance patch", dcgan, "--patch --d-norm instance --no-minibatch-std", 1),
    ("D batch", dcgan, "--loss wgan --no-minibatch-std", 1),
    ("X to Y", cyclegan, "--blocks 2", 0), ("X to Y 256", cyclegan, "--blocks 1 --size 256", 1),
])
def test_networks_are_what_their_flags_say(name, program, flags, k):
    """Layer by layer. Catches missing activations, x + f(x) without x, norms next to the image, shared blocks."""
    net, plain = program.build(options(flags, program), CPU)[k], reference(name)
    x = torch.randn(3, 5, 1, 1) if name[0] == "G" else torch.randn(3, 3, 32, 32)
    plain.load_state_dict(net.state_dict())  # as many layers, at the same places, of the same shapes
    torch.testing.assert_close(net(x), plain(x))
    assert len({id(weight) for weight in net.parameters()}) == len(list(plain.parameters()))

@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_shapes_at_every_size(size):
    """Layers are added as the size doubles; a layer has at most 8 times --width channels."""
    G, D = dcgan.build(options(f"--size {size} --width 2 --z 5"), CPU)
    x, sides, channels = torch.randn(2, 5, 1, 1), [], []
    for layer in G:
        x = layer(x, torch.randn(2, 5, 1, 1)) if isinstance(layer, dcgan.Modulated) else layer(x)
        if isinstance(layer, dcgan.Modulated):
            sides, channels = [*sides, x.shape[2]], [*channels, x.shape[1]]
    assert sides == [4 * 2 ** i for i in range(len(sides))] and sides[-1] == size
    assert channels == [min(16, size // side) for side in sides] and x.shape == (2, 3, size, size)
    assert D(x).shape == (2, 1, 1, 1)
    assert [w.shape[0] for w in D.parameters() if w.dim() == 4] == [min(16, size // side) for side in sides[-2::-1]] + [1]

def test_parameter_counts_of_the_papers():
    for net, expected in ((dcgan.Discriminator(256, 64, patch=True, std=False), 2_764_737),
                          (cyclegan.Discriminator(256, 64, patch=True), 2_764_737),
                          (cyclegan.Generator(256, 64, blocks=9), 11_378_179)):
        assert sum(p.numel() for p in net.parameters()) == expected

@both
@pytest.mark.parametrize("size, field", [(32, 16), (64, 34), (128, 70), (256, 70)])
def test_patch_discriminator_sees_a_patch(program, size, field):
    D = program.build(options(f"--patch --size {size}", program), CPU)[-1]
    x = torch.randn(1, 3, size, size, requires_grad=True)
    scores = nn.Sequential(*[layer for layer in D if not isinstance(layer, dcgan.MinibatchStd)][:-1])(x)
    scores = F.conv2d(scores, D[-1].weight[:, :scores.shape[1]], padding=1)  # without the deviation of the batch
    assert scores.shape[2] > 1 and D(x).shape == scores.shape
    scores[0, 0, scores.shape[2] // 2, scores.shape[3] // 2].backward()
    rows = x.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert rows[-1] - rows[0] + 1 == field

@both
def test_initial_weights_and_spectral_norm(program):
    nets = program.build(options("--width 16", program), CPU)
    for net in nets:
        weights = torch.cat([p.flatten() for p in net.parameters() if p.dim() == 4])
        assert abs(weights.mean()) < 1e-3 and abs(weights.std() - 0.02) < 1e-3
    for D in program.build(options("--spectral-norm --patch", program), CPU)[len(nets) // 2:]:
        for layer in D:
            if isinstance(layer, nn.Conv2d):
                for _ in range(30):  # the estimate gets better at each look
                    weight = layer.weight
                assert torch.linalg.matrix_norm(weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)

def test_minibatch_std_is_the_mean_deviation_over_the_batch():
    x = torch.randn(6, 4, 3, 3)
    out, alike = dcgan.MinibatchStd()(x), dcgan.MinibatchStd()(x[:1].expand(6, -1, -1, -1))
    assert torch.equal(out[:, :4], x) and alike[:, 4].max() < 1e-3
    assert torch.allclose(out[:, 4], torch.tensor(x.numpy().std(0).mean()), atol=1e-4)

def test_the_noise_scales_and_shifts_every_channel():
    layer, x, z = dcgan.Modulated(2, 3), torch.randn(5, 2, 16, 16), torch.randn(5, 3, 1, 1)
    out, (scale, shift) = F.batch_norm(x, None, None, training=True), layer.style(z).chunk(2, dim=1)
    assert torch.allclose(layer(x, z), out * (1 + scale) + shift, atol=1e-5)
    G = dcgan.Generator(32, 2, 3)
    G[0].weight.data.zero_()  # so z has no other way
    assert G(z).std(dim=0).max() > 1e-3

# ---- one step ----
class Toy(nn.Module):
    """One weight w: D(x) = w * mean(x) + 0.25 in four patches, G(x) = x + w, of noise G(z) = w."""
    def __init__(self, name, w):
        super().__init__()
        self.name, self.w, self.calls = name, nn.Parameter(torch.tensor(w)), []
    def forward(self, x):
        self.calls.append((len(x), torch.is_grad_enabled()))
        if self.name == "D":
            return self.w * x.mean((1, 2, 3), keepdim=True).expand(-1, -1, 2, 2) + 0.25
        return x + self.w if x.shape[1] == 3 else self.w.expand(len(x), 3, 32, 32)
class KeepGrad(torch.optim.SGD):
    def zero_grad(self):
        """Leave the gradients, to be looked at."""
def one_step(flags="", slope=1.0, train_G=True):
    """A step without learning, of reals 0.5 and fakes -0.3: D's scores are 0.75 and -0.05 -> losses, G, D."""
    G, D, real = Toy("G", -0.3), Toy("D", slope), torch.full((4, 3, 32, 32), 0.5)
    optims = KeepGrad(G.parameters(), 0.0), KeepGrad(D.parameters(), 0.0)
    losses = dcgan.step(G, D, *optims, real, train_G, options(flags), contextlib.nullcontext())
    return {name: value.item() for name, value in losses.items()}, G, D

@pytest.mark.parametrize("flags, real, fake, g", [
    ("--loss lsgan", 0.25 ** 2, 0.05 ** 2, 1.05 ** 2), ("--g-target 0.5", 0.25 ** 2, 0.05 ** 2, 0.55 ** 2),
    ("--smooth 0.9 0.9", 0.15 ** 2, 0.05 ** 2, 1.05 ** 2), ("--loss wgan-gp", -0.75, -0.05, 0.05),
    ("--loss vanilla", 0.386871, 0.668460, 0.718460),  # log(1 + exp(-0.75)), of -0.05, of 0.05
    ("--loss vanilla --smooth 0.9 0.9", 0.9 * 0.386871 + 0.1 * 1.136871, 0.668460, 0.718460),
    ("--loss wgan", -0.75, -0.05, 0.003 - 0.25),  # G meets a D that is clipped by then
])
def test_losses_by_hand(flags, real, fake, g):
    """Each loss under its own name, and its gradient the right way: D pulls apart, G goes up."""
    losses, G, D = one_step(flags)
    expected = {"D_real": real, "D_fake": fake, "G": g, "D(real)": 0.75, "D(fake)": -0.05}
    if "vanilla" in flags:
        expected |= {"D(real)": 0.679179, "D(fake)": 0.487503}
    if "gp" in flags:  # the gradient of a mean over 3072 numbers, and of the mean of patches
        expected["penalty"] = 10 * (1 - 1 / math.sqrt(3072)) ** 2
    assert losses == pytest.approx(expected, abs=1e-5)
    assert G.w.grad < 0 and (D.w.grad < 0 or "gp" in flags)

def test_gradient_penalty_is_taken_between_real_and_fake():
    points = []
    def D(x):  # |gradient| is 2 |x|
        points.append(x.detach())
        return x.square().sum((1, 2, 3)).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    real, fake = torch.ones(50, 1, 1, 1), -torch.ones(50, 1, 1, 1)
    penalty = dcgan.gradient_penalty(D, real, fake)
    x = points[0].flatten()
    assert -1 < x.min() < -0.7 and 0.7 < x.max() < 1 and len(x.unique()) == 50
    assert penalty.item() == pytest.approx(((2 * x.abs() - 1) ** 2).mean().item())

def test_a_step_of_D_and_of_both():
    """One forward of G serves both steps; D sees reals and fakes apart; its gradient is clipped."""
    _, G, D = one_step(slope=10.0)  # scores of 5.25 and -2.75
    assert D.calls == [(4, True)] * 3 and G.calls == [(4, True)]
    assert D.w.grad.item() == pytest.approx(1, abs=1e-3)  # not 2 * 4.25 * 0.5 + 2 * 2.75 * 0.3 = 5.9
    losses, G, D = one_step(train_G=False)
    assert len(G.calls) == 1 and len(D.calls) == 2 and G.w.grad is None and "G" not in losses
    smoothed = {one_step("--smooth 0.55 0.95")[0]["D_real"] for _ in range(20)}  # drawn anew each time
    assert len(smoothed) == 20 and max(smoothed) <= 0.2 ** 2

def test_the_step_of_the_readme_is_the_step():
    """The page's snippet, run as it stands, trains the same weights."""
    snippet = re.search(r"```python\n(fake = G.*?)```", (HERE / "README.md").read_text(), re.S).group(1)
    args = options("--z 32 --d-norm instance")
    nets, real = dcgan.build(args, CPU), torch.rand(16, 3, 32, 32) * 2 - 1
    twins = copy.deepcopy(nets)
    (optim_G, optim_D), optims = [[dcgan.optimizer(net, 1e-3, "lsgan") for net in pair] for pair in (twins, nets)]
    for seed in range(2):
        torch.manual_seed(seed)
        dcgan.step(*nets, *optims, real, True, args, contextlib.nullcontext())
        torch.manual_seed(seed)
        exec(snippet, {"torch": torch, "G": twins[0], "D": twins[1], "real": real, "optim_G": optim_G,
                       "optim_D": optim_D, "augment": lambda x: x})
    for ours, theirs in zip(nets, twins):
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-3, atol=1e-6)

def test_critic_iters_and_what_else_the_loop_hands_to_a_step(cats, tmp_path, monkeypatch):
    seen, moved, step = [], [], dcgan.step
    monkeypatch.setattr(dcgan, "step", lambda *args: seen.append(args) or step(*args))
    monkeypatch.setattr(dcgan, "average", lambda *args: moved.append(args[3]))
    saved = train(dcgan, cats, tmp_path / "run", "--loss wgan --critic-iters 3 --iters 7 --log-every 7")
    reals, train_Gs = [args[4] for args in seen], [args[5] for args in seen]
    assert train_Gs == [False, False, True, False, False, True, False] and moved == [3, 6]
    assert len(torch.cat(reals[:3]).unique(dim=0)) == 6  # each has its own images
    assert saved["D"]["0.weight"].abs().max() <= 0.01 and "square_avg" in saved["optim_D"]["state"][0]
    assert saved["rows"][0]["G"] != 0  # of the steps that have one
    assert [options(f"--loss {loss}").critic_iters for loss in ("lsgan", "wgan", "wgan-gp")] == [1, 5, 5]

def test_step_equals_the_textbook():
    """Two separate, plain updates. Catches fakes not detached, D learning in G's step, wrong signs."""
    args = options("--norm instance --d-norm instance")
    nets, real = dcgan.build(args, CPU), torch.rand(4, 3, 32, 32) * 2 - 1
    G, D = copy.deepcopy(nets)
    *optims, optim_G, optim_D = [torch.optim.SGD(net.parameters(), 1e-4) for net in (*nets, G, D)]
    for seed in range(2):
        torch.manual_seed(seed)
        dcgan.step(*nets, *optims, real, True, args, contextlib.nullcontext())
        torch.manual_seed(seed)
        z = torch.randn(4, args.z, 1, 1)
        optim_D.zero_grad()
        (((D(real) - 1) ** 2).mean() + (D(G(z).detach()) ** 2).mean()).backward()
        nn.utils.clip_grad_norm_(D.parameters(), 1)
        optim_D.step()
        optim_G.zero_grad()
        ((D(G(z)) - 1) ** 2).mean().backward()
        optim_G.step()
    for ours, expected in zip(nets, (G, D)):
        torch.testing.assert_close(ours.state_dict(), expected.state_dict(), rtol=1e-3, atol=1e-6)

@pytest.mark.parametrize("program, flags", [
    (dcgan, "--deluxe --diffaug"), (dcgan, "--loss wgan --diffaug cutout"),
    (dcgan, "--deluxe zoom,jitter,autocontrast --d-norm batch --patch --loss vanilla"),
    (dcgan, "--loss wgan-gp --spectral-norm --up transpose --smooth 0.8 0.9"),
    (cyclegan, "--patch --cycle --spectral-norm"), (cyclegan, "--diffaug --identity 0"),
])
def test_a_step_asks_the_device_for_no_number(program, flags):
    """A tensor on "meta" has no numbers: .item(), a boolean index and a tensor left on the CPU fail here."""
    args = options(flags, program)
    images = torch.empty(4, 3, 35, 35, dtype=torch.uint8, device="meta")
    x, nets = data.deluxe(images, 32, args.deluxe)[:, :, :32, :32], program.build(args, "meta")
    optims = [torch.optim.SGD(net.parameters(), 0.1) for net in (nets[0], nets[-1])]
    rest = [x, True] if program is dcgan else [x, x, [cyclegan.Pool(6), cyclegan.Pool(6)]]
    for _ in range(3):  # until the pools are full
        losses = program.step(*nets, *optims, *rest, args, contextlib.nullcontext())
    program.average(program.floats(nets[0]), program.floats(copy.deepcopy(nets[0])), 0.9, 1)
    assert all(loss.is_meta and loss.shape == () for loss in losses.values())

@both
def test_average_moves_from_1_towards_3(program):
    for decay, iteration, expected in ((0.9, 10_000, 1.2), (0.999, 0, 2.8), (0, 10_000, 3)):  # at first fast
        mean, now = nn.BatchNorm2d(1), nn.BatchNorm2d(1)
        nn.init.constant_(now.weight, 3.0)
        program.average([mean.weight.data], [now.weight.data], decay, iteration)
        assert mean.weight.item() == pytest.approx(expected)

@both
def test_each_average_starts_from_its_own_network(program, cats, tmp_path):
    saved, names = train(program, cats, tmp_path / "run", "--iters 1"), {"ema": "G", "ema_XY": "G_XY", "ema_YX": "G_YX"}
    torch.manual_seed(0)  # the run's seed: the networks as they were made
    for (mean, now), start in zip([(mean, now) for mean, now in names.items() if mean in saved],
                                  program.build(options("", program), CPU)):
        for name, weight in start.named_parameters():
            expected = torch.lerp(weight.detach(), saved[now][name], 1 - 2 / 11)
            torch.testing.assert_close(saved[mean][name], expected)
# ---- augmentation ----
def test_color_ranges():
    x = torch.rand(4000, 3, 2, 2) * 2 - 1
    shift, changed = diffaug.brightness(x) - x, diffaug.contrast(x)
    assert torch.allclose(shift, shift[:, :1, :1, :1].expand_as(x), atol=1e-6)  # one draw an image
    assert -0.5 <= shift.min() < -0.49 and 0.49 < shift.max() <= 0.5001
    grey, mean = x.mean(1, keepdim=True), x.mean((1, 2, 3), keepdim=True)
    factor = ((diffaug.saturation(x) - grey) / (x - grey)).median(1).values[:, 0, 0]
    assert -1e-3 <= factor.min() < 0.02 and 1.98 < factor.max() <= 2.001 and abs(factor.mean() - 1) < 0.05
    factor = (changed - mean).flatten(1).norm(dim=1) / (x - mean).flatten(1).norm(dim=1)
    assert 0.499 <= factor.min() < 0.51 and 1.49 < factor.max() <= 1.501
    assert torch.allclose(changed.mean((1, 2, 3), keepdim=True), mean, atol=1e-5)
def are_its_windows(results, image):  # each result is a window of the image, and each window turns up
    size, places = results.shape[-1], range(image.shape[-1] - results.shape[-1] + 1)
    windows = [image[:, top:top + size, left:left + size] for top in places for left in places]
    hits = torch.stack([(results == window).flatten(1).all(1) for window in windows])
    return hits.any(0).all() and hits.any(1).all()

@pytest.mark.parametrize("size", [15, 16])
def test_translation_and_cutout_geometry(size):
    x, hole = 1 + torch.rand(1, 3, size, size).expand(2000, -1, -1, -1), int(0.5 * size + 0.5)
    assert are_its_windows(diffaug.translation(x), F.pad(x[0], [int(0.125 * size + 0.5)] * 4))
    holed = diffaug.cutout(x)
    cut = holed != x
    sides = cut[:, 0].any(2).sum(1), cut[:, 0].any(1).sum(1)
    assert torch.equal(cut.sum((1, 2, 3)), 3 * sides[0] * sides[1])  # a full rectangle, in all three channels
    assert not holed[cut].any() and all(side.max() == hole and side.min() == hole // 2 for side in sides)

def test_policy_is_applied_in_order_and_its_gradient_is_the_finite_difference(monkeypatch):
    def seeded(x):
        torch.manual_seed(3)
        return diffaug.augment(x, "color,translation,cutout")
    assert torch.autograd.gradcheck(seeded, torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True))
    monkeypatch.setattr(diffaug, "POLICIES", {"double": (lambda x: 2 * x,), "next": (lambda x: x + 1,)})
    assert [diffaug.augment(5, policy) for policy in ("double,next", "next,double", "")] == [11, 12, 5]

def test_diffaug_reaches_reals_and_fakes_in_both_steps(monkeypatch):
    """The best known bug of this field: a flag that is parsed and never used."""
    seen = []
    monkeypatch.setattr(diffaug, "augment", lambda x, policy: seen.append((x.mean().item(), policy)) or x * 0)
    losses, G, _ = one_step("--diffaug cutout")
    assert seen == [(pytest.approx(level), "cutout") for level in (0.5, -0.3, -0.3)]
    assert losses["D(real)"] == losses["D(fake)"] == 0.25 and G.w.grad == 0  # D saw what came out

def test_deluxe_operations():
    x, gentle = torch.rand(3, 35, 35).expand(500, -1, -1, -1), torch.rand(500, 3, 8, 8) * 0.4 + 0.3
    assert are_its_windows(data.DELUXE["crop"](x, 32), x[0])
    flipped = data.DELUXE["flip"](x, 35)
    mirrored = (flipped == x.flip(3)).flatten(1).all(1)
    assert torch.equal(flipped[~mirrored], x[~mirrored]) and 200 < mirrored.sum() < 300
    out = data.DELUXE["jitter"](torch.full((500, 3, 8, 8), 0.5), 8)
    assert 0.349 <= out.min() < 0.36 and 0.64 < out.max() <= 0.651 and len(out[:, 0, 0, 0].unique()) > 400
    stripes = torch.tensor([[0.4], [0.5], [0.5]]).view(1, 3, 1, 1) + torch.tensor([0, 0.1]).repeat(4).view(1, 1, 1, 8)
    out = data.DELUXE["jitter"](stripes.expand(500, 3, 8, 8), 8)  # two kinds of difference: of columns, of colours
    columns, colours = out[:, 0, 0, 1] - out[:, 0, 0, 0], out[:, 1, 0, 0] - out[:, 0, 0, 0]
    for factor in (columns / out.mean((1, 2, 3)) * 5.1667, colours / columns):  # contrast alone, then saturation alone
        assert factor.min() < 0.75 and factor.max() > 1.25
    assert 180 < (data.DELUXE["autocontrast"](gentle, 8).amax((2, 3)) > 0.999).all(1).sum() < 320
    ramp = torch.linspace(0, 1, 70).view(1, 1, 1, 70).expand(500, 3, 70, 70)
    for image in (ramp, ramp.transpose(2, 3)):
        zoomed = data.DELUXE["zoom"](image, 64).flatten(1)
        spread = (zoomed.amax(1) - zoomed.amin(1)) * 64 / 63
        assert 0.78 < spread.min() < 0.82 and 0.97 < spread.max() <= 1.02

def test_deluxe_range_sizes_and_what_the_plain_flags_mean():
    """tanh's range, whatever the flags; where DiffAugment translates, plain --deluxe does not crop."""
    assert [data.load_size(64, ops) for ops in ("crop,flip", "flip,zoom", "flip", "")] == [70, 70, 64, 64]
    images = torch.randint(0, 256, (1, 3, 70, 70), dtype=torch.uint8).expand(4, -1, -1, -1)
    assert torch.allclose(data.deluxe(images, 70, ""), images / 127.5 - 1)
    for ops in ("crop,flip", "zoom", "crop,flip,zoom,jitter,autocontrast", "flip,zoom,crop"):
        out = data.deluxe(images, 64, ops)
        assert out.shape == (4, 3, 64, 64) and -1.001 <= out.min() < -0.8 and out.max() <= 1.001
    for flags, expected in (("--deluxe", "crop,flip"), ("--deluxe --diffaug cutout", "crop,flip"), ("", ""),
                            ("--deluxe --diffaug", "flip"), ("--deluxe crop --diffaug", "crop")):
        assert options(flags).deluxe == options(flags, cyclegan).deluxe == expected
    assert not options("--diffaug none").diffaug and not options("--deluxe none").deluxe
# ---- images in and out ----
@pytest.mark.parametrize("mode, value, expected", [
    ("RGBA", (255, 0, 0, 0), (255, 255, 255)), ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
    ("LA", (0, 0), (255, 255, 255)), ("RGBa", (0, 0, 0, 0), (255, 255, 255)), ("1", 1, (255, 255, 255)),
    ("I;16", 32768, (128, 128, 128)), ("F", 0.5, (128, 128, 128)), ("L", 7, (7, 7, 7)),
    ("CMYK", (0, 255, 255, 0), (255, 0, 0)), ("HSV", (0, 0, 255), (255, 255, 255)),
])
def test_every_mode_becomes_rgb_on_white_and_scaled_to_8_bits(mode, value, expected, tmp_path):
    assert data.to_rgb(Image.new(mode, (6, 6), value)).getpixel((1, 1)) == pytest.approx(expected, abs=1)
    if mode == "RGBA":
        Image.new(mode, (6, 6), value).convert("P").save(tmp_path / "p.png")  # transparency by palette entry
        assert data.to_rgb(Image.open(tmp_path / "p.png")).getpixel((1, 1)) == pytest.approx(expected, abs=60)

def test_load_images_from_folder_and_zip(tmp_path, capsys):
    """All that can be read, square and upright. What is left out, or can't be read, is told."""
    turned, half, stripes = Image.Exif(), Image.new("L", (80, 40)), Image.new("RGB", (60, 20))
    turned[0x0112] = 6  # the white half, on the left, belongs on top
    half.paste(255, (0, 0, 40, 40))
    (tmp_path / "in" / "deep").mkdir(parents=True)
    half.save(tmp_path / "in" / "deep" / "b.JPEG", exif=turned, quality=95)
    stripes.paste("lime", (20, 0, 40, 20))  # what a centre crop keeps
    stripes.save(tmp_path / "in" / "a.png")
    for name in ("broken.png", "notes.txt", "1.HEIC", "2.heic"):
        (tmp_path / "in" / name).write_text("not an image")
    for name in ("._a.png", ".thumbnails/a.png", "@eaDir/a.png", "__MACOSX/a.png", "deep/.Trash-1000/a.png"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        stripes.save(tmp_path / "in" / name)
    data.save_png(stripes, tmp_path / "in" / "preview.png")  # made by one of the programs, as also samples
    data.save_gif([stripes], tmp_path / "in" / "walk.gif", 60)
    with zipfile.ZipFile(tmp_path / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted((tmp_path / "in").rglob("*")):
            archive.write(file, file.relative_to(tmp_path))
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "folder").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "deep" / "back").symlink_to(tmp_path / "linked")
    for source in (tmp_path / "in", tmp_path / "all.zip", tmp_path / "linked"):
        images, told = data.load_images(str(source), 16), capsys.readouterr().err
        assert images.shape == (2, 3, 16, 16) and images.dtype == torch.uint8
        assert images[0, 1].min() > 240 and images[0, 0].max() == 0
        assert images[1, :, 0].min() > 240 and images[1, :, 15].max() < 15
        assert "broken.png" in told and "1 of 3" in told
        assert "left out 3 files (.heic .txt)" in told and "left out 2 pictures made by" in told
    data.save_png(stripes, tmp_path / "made" / "1.png")
    assert len(data.load_images(str(tmp_path / "made"), 16)) == 1  # where there are no others, they are meant

def test_a_damaged_zip_is_one_line_whatever_is_wrong_with_it(tmp_path):
    with zipfile.ZipFile(tmp_path / "good.zip", "w") as archive:
        archive.writestr("a.bin", b"0")
    whole, results = (tmp_path / "good.zip").read_bytes(), set()
    for i in range(len(whole)):
        for bit in (1, 64):
            (tmp_path / "bad.zip").write_bytes(whole[:i] + bytes([whole[i] ^ bit]) + whole[i + 1:])
            try:
                results.add(len(data.find_images(str(tmp_path / "bad.zip"))))
            except data.BadInput:
                results.add("refused")
    assert results == {0, "refused"}

def test_pictures_are_decoded_only_a_little_ahead(tmp_path):
    opened = []
    files = [(f"{i}.png", lambda i=i: opened.append(i) or Image.new("L", (4, 4))) for i in range(100)]
    next(data.read("many", files, data.to_rgb))
    assert len(opened) <= 16

def test_colours_of_another_profile_become_srgb(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = profile.replace(b"rXYZ", b"tmp.").replace(b"bXYZ", b"rXYZ").replace(b"tmp.", b"bXYZ")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png", icc_profile=swapped)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "b.png", icc_profile=b"damaged")
    a, b = data.load_images(str(tmp_path), 8).float().mean((2, 3)).tolist()
    assert a[2] > 200 > 100 > a[0] and b == [255, 0, 0]

def test_drawn_cats_are_pairs_in_two_breeds_and_in_disjoint_sets():
    few, blue = [data.load_images(name, 32, limit=20) for name in ("toy-grumpy", "toy-blue")]
    assert len(few.unique(dim=0)) == 20
    assert few[:, 0].float().mean() > blue[:, 0].float().mean() + 10  # cream against blue-grey
    pair = [np.asarray(data.draw_cat(3, breed, 64)).astype(int) for breed in ("grumpy", "blue")]
    assert np.array_equal(pair[0][:6], pair[1][:6]) and np.abs(pair[0][32] - pair[1][32]).mean() > 20
    edges = [np.abs(np.diff(cat.sum(2), axis=0)) > 60 for cat in pair]
    assert (edges[0] & edges[1]).sum() > 0.2 * edges[1].sum()
    sets = [*data.DRAWN.values(), data.HELD_OUT]
    assert [len(numbers) for numbers in sets] == [204, 75, 16] and len(set().union(*sets)) == 204 + 75 + 16

def test_batches_are_epochs_and_never_short():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 2, 2)
    def batch(k, size=4, seed=1, n=10):
        return data.batch(images[:n], size, k, seed, CPU)[:, 0, 0, 0].tolist()
    epochs = torch.tensor([batch(k) for k in range(25)]).view(10, 10)
    assert (epochs.sort(dim=1).values == torch.arange(10)).all() and len(epochs.unique(dim=0)) == 10
    few = batch(0, size=8, n=3)
    assert len(few) == 8 and sorted(few[:3]) == sorted(few[3:6]) == [0, 1, 2]
    assert batch(7) == batch(7) and [batch(k) for k in range(5)] != [batch(k, seed=2) for k in range(5)]

def test_get(tmp_path, monkeypatch):
    """The second address is tried if the first is dead; what is damaged, missing or outside is not kept."""
    monkeypatch.chdir(tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(data, "SERVERS", (f"{address}/gone", f"{address}/www"))
    Path("www/datasets").mkdir(parents=True)
    with zipfile.ZipFile("www/datasets/fruit.zip", "w") as archive:
        for name in ("fruit/trainA/x.png", "fruit/testB/x.png", "../climbed.png"):
            archive.writestr(name, "picture")
    whole = Path("www/datasets/fruit.zip").read_bytes()
    Path("www/datasets/half.zip").write_bytes(whole.replace(b"picture", b"pixture"))
    data.main(["get", "fruit"])
    for name, words in (("half", "datasets/half/trainA"), ("none", "datasets/none"), ("fruit", "already")):
        with pytest.raises(data.BadInput, match=words):
            data.main(["get", name])
    assert names(Path("datasets")) == ["fruit"] and names(Path("datasets/fruit")) == ["testB", "trainA"]

def test_preview_and_the_colours_of_a_grid(cats, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data.main(["preview", str(cats), "--size", "32", "--deluxe", "jitter", "--diffaug", "cutout"])
    sheet, original = pixels("preview.png"), data.load_images(str(cats), 32)[0].numpy()
    assert sheet.shape == (3, 6 * 34 + 2, 12 * 34 + 2) and np.abs(sheet[:, 2:34, 2:34] - original).max() <= 1
    assert (np.abs(sheet[:, 2:34, 36:68] - 127).max(0) <= 1).mean() >= 0.1  # a hole
# ---- a run ----
def test_what_a_run_writes_and_that_a_second_one_gets_a_new_name(cats, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = f"--data {cats} --iters 7 --deluxe --diffaug --loss wgan-gp"
    for _ in range(2):
        dcgan.train(*dcgan.options([*SMALL, *flags.split()]))
    run, second = sorted(Path("out").iterdir())
    assert second.name == run.name + "-2" and "deluxe_diffaug_loss_wgan_gp" in run.name
    assert names(run) == FILES and names(run / "samples") == [f"00000{i}.png" for i in (2, 4, 6, 7)]
    assert Image.open(run / "timelapse.gif").size == (8 * 34 + 2, 8 * 34 + 2 + 24)
    head, *rows = [line.split(",") for line in (run / "log.csv").read_text().splitlines()]
    assert sorted(head) == sorted(["iteration", "D_real", "D_fake", "penalty", "G", "D(real)", "D(fake)", "images/s"])
    assert [row[0] for row in rows] == [*"1234567"] and {len(row) for row in rows} == {len(head)}
    assert [row[head.index("G")] != "" for row in rows] == [False] * 4 + [True] + [False] * 2  # --critic-iters 5
    lines = capsys.readouterr().out.splitlines()
    for word in ("6 images", "32 px", "on cpu", "deluxe flip", "diffaug translation"):
        assert word in lines[0]
    assert all(len(line) <= 120 for line in lines if "images/s" in line)

@pytest.mark.parametrize("program, flags", [
    (dcgan, "--deluxe --diffaug"), (dcgan, "--loss wgan --log-every 2 --sample-every 99"),
    (dcgan, "--loss wgan-gp --patch"), (dcgan, "--loss vanilla --deluxe zoom --smooth .8 .9 --up transpose"),
    (cyclegan, "--patch --cycle --deluxe --diffaug --decay --pool 6 --log-every 2"),
])
def test_a_stopped_run_goes_on_bit_for_bit(program, flags, cats, tmp_path, monkeypatch, capsys):
    """Seven iterations at once, or three and then the rest, whatever happens to the log in between."""
    a, b, batch = tmp_path / "a", tmp_path / "b", data.batch
    def interrupted(*args):
        if args[2] == 2 and signal.getsignal(signal.SIGINT) != signal.SIG_DFL:  # once, at the third iteration
            signal.raise_signal(signal.SIGINT)  # Ctrl-C
            assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # a second one would end it at once
        return batch(*args)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(data, "batch", interrupted)
        train(program, cats, b, f"{flags} --iters 7")
    assert f"go on with: python {program.__name__}.py --resume {b}" in capsys.readouterr().err
    (b / "log.csv").unlink()
    (b / "log.csv").mkdir()  # nothing can be written there
    assert_same_run(train(program, cats, b), train(program, cats, a, f"{flags} --iters 7"))
    for file in (a / "samples").iterdir():
        assert file.read_bytes() == (b / "samples" / file.name).read_bytes()

def test_sigkill_and_resume_end_in_the_same_bits(cats, tmp_path):
    a, b, flags = tmp_path / "a", tmp_path / "b", "--deluxe --diffaug --iters 40 --save-every 5"
    argv = [sys.executable, "-u", HERE / "dcgan.py", *command(dcgan, cats, b, flags)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("12/40"):
                process.kill()
    assert_same_run(train(dcgan, cats, b), train(dcgan, cats, a, flags))
    assert (a / "timelapse.gif").read_bytes() == (b / "timelapse.gif").read_bytes()

def test_a_run_is_what_was_asked_for(cats, tmp_path):
    """Seed, rates, average, pool, in a second stage what is given anew; --decay from the middle on."""
    for program, names in ((dcgan, "ab"), (cyclegan, "cd")):
        a, b = [train(program, cats, tmp_path / names[seed], f"--iters 1 --seed {seed}") for seed in (0, 1)]
        assert list(a["rows"][0].values())[1] != list(b["rows"][0].values())[1]
    def rates(saved):
        return [saved[name]["param_groups"][0]["lr"] for name in ("optim_G", "optim_D")]
    first = "--iters 1 --g-lr 1e-5 --d-lr 1e-3 --ema 0 --deluxe --diffaug cutout"
    saved = train(dcgan, cats, tmp_path / "run", first)
    assert rates(saved) == [1e-5, 1e-3] and saved["optim_G"]["param_groups"][0]["betas"] == (0.5, 0.999)
    assert torch.equal(saved["ema"]["1.running_mean"], saved["G"]["1.running_mean"])  # and all weights
    train(dcgan, cats, tmp_path / "run", "--iters 3 --g-lr 1e-6 --d-lr 1e-2 --diffaug")
    saved = train(dcgan, cats, tmp_path / "run")  # finished: says so
    assert saved["iteration"] == 3 and rates(saved) == [1e-6, 1e-2]
    assert saved["options"]["diffaug"] == diffaug.PLAIN and saved["options"]["deluxe"] == "crop,flip"
    flags = "--decay --g-lr 3e-4 --d-lr 6e-4 --pool 5 --iters"
    for iters, part in ((2, 2 / 3), (6, 2 / 7)):
        saved = train(cyclegan, cats, tmp_path / f"{iters}", f"{flags} {iters}")
        assert rates(saved) == pytest.approx([3e-4 * part, 6e-4 * part])
        assert len(saved["pool_X"]["images"]) == len(saved["pool_Y"]["images"]) == 5

@both
def test_images_per_second(program, cats, tmp_path, monkeypatch):
    clock, step = [0.0], program.step
    monkeypatch.setattr(program.time, "perf_counter", lambda: clock[0])
    def slow(*args):
        clock[0] += 0.5
        return step(*args)
    monkeypatch.setattr(program, "step", slow)
    rows = train(program, cats, tmp_path / "run", "--iters 6 --log-every 3")["rows"]
    assert [row["images/s"] for row in rows] == [8, 8]  # batches of 4

def test_samples_are_the_average_of_G(cats, tmp_path):
    saved = train(dcgan, cats, tmp_path / "run", "--iters 2 --g-lr 0.1 --dtype fp32")
    z = torch.randn(64, 32, 1, 1, generator=torch.Generator().manual_seed(0))
    G, sheet = dcgan.build(options(), CPU)[0].eval(), pixels(tmp_path / "run/samples/000002.png")
    for name, is_shown in (("ema", True), ("G", False)):
        G.load_state_dict(saved[name])
        images = G(z)
        assert shows(sheet[:, 2:34, 2:34], images[:1]) == shows(sheet[:, 36:68, 36:68], images[9:10]) == is_shown

class Heart(nn.Module):
    """A D that knows its images by heart: 1 for these, 0 for others."""
    def __init__(self, images):
        super().__init__()
        self.known, self.w = images / 127.5 - 1, nn.Parameter(torch.ones(()))
    def forward(self, x):
        known = torch.stack([torch.isclose(image, self.known, atol=1e-4).flatten(1).all(1).any() for image in x])
        return self.w * known.float().view(-1, 1, 1, 1) + 0 * x.mean((1, 2, 3), keepdim=True)

def test_hold_out_shows_whether_D_knows_its_images_by_heart(tmp_path, monkeypatch):
    for i in range(16):
        Image.fromarray(np.random.RandomState(i).randint(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / f"{i:02d}.png")
    def run(name, flags):
        argv = [*SMALL, *f"--data {tmp_path} --hold-out 4 --d-lr 1e-9 --dtype fp32 {flags}".split()]
        dcgan.train(*dcgan.options([*argv, "--out", str(tmp_path / name)]))
        return data.load_checkpoint(tmp_path / name, "dcgan")
    looked, not_looked = run("a", "--spectral-norm --iters 6 --log-every 1"), run("b", "--spectral-norm --iters 6 --log-every 6")
    assert same(looked["D"], not_looked["D"])  # a look changes nothing
    trained = data.load_images(str(tmp_path), 32)[[i for i in range(16) if i % 4]]
    monkeypatch.setattr(dcgan, "build", lambda args, device: [dcgan.Generator(32, 4), Heart(trained)])
    row = run("c", "")["rows"][0]
    assert [row[f"D({name})"] for name in ("real", "trained", "unseen", "generated")] == pytest.approx([1, 1, 0, 0], abs=1e-6)

@pytest.mark.parametrize("what", ["loss", "weight", "statistic"])
def test_what_is_not_finite_stops_the_run_before_a_checkpoint(what, cats, tmp_path, monkeypatch):
    calls, good = [], dcgan.step
    def step(G, *args):
        calls.append(good(G, *args))
        if len(calls) == 4:
            parts = {"loss": calls[3]["D_fake"], "weight": G[0].weight.data, "statistic": G[1].running_var}
            parts[what].fill_(math.inf)
        return calls[-1]
    monkeypatch.setattr(dcgan, "step", step)
    with pytest.raises(data.BadInput, match="not finite at iteration 4"):
        train(dcgan, cats, tmp_path / "run", "--iters 9 --sample-every 9 --log-every 9")
    assert data.load_checkpoint(tmp_path / "run", "dcgan")["iteration"] == 2

def test_a_checkpoint_is_whole_and_can_not_run_code(tmp_path, monkeypatch):
    """A failed write leaves the old file; a flipped bit, unseen by torch, and code are refused."""
    path, numbers = tmp_path / "ckpt.pt", torch.arange(999.)
    good = {"program": "dcgan", "iteration": 7, "rows": [], "recent": [], "options": {}, "numbers": numbers}
    data.save_checkpoint(good, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(data.BadInput, match="can't write .*No space"):
        patch.setattr(os, "fsync", lambda file: exec("raise OSError(28, 'No space left')"))
        data.save_checkpoint({**good, "iteration": 8}, tmp_path)
    assert data.load_checkpoint(tmp_path, "dcgan")["iteration"] == 7 and names(tmp_path) == ["ckpt.pt"]
    monkeypatch.setattr(os, "replace", lambda a, b: Path(b).write_bytes(Path(a).read_bytes()))
    monkeypatch.setattr(os, "getpid", lambda: 1)
    (tmp_path / "ckpt.pt.2.tmp").write_text("another process writes here")
    data.save_checkpoint(good, tmp_path)
    assert names(tmp_path) == ["ckpt.pt", "ckpt.pt.2.tmp"]
    raw = bytearray(path.read_bytes())
    raw[raw.index(numbers.numpy().tobytes()) + 100] ^= 1
    path.write_bytes(raw)
    for bad in ({**good, "rows": Path("any object but tensors and plain values")}, {**good, "program": "cyclegan"},
                {"program": "dcgan"}, [1], None):
        with pytest.raises(data.BadInput, match="damaged"):
            data.load_checkpoint(tmp_path, "dcgan")
        torch.save(bad, path)
    path.unlink()
    path.mkdir()
    with pytest.raises(data.BadInput, match="directory"):
        data.load_checkpoint(tmp_path, "dcgan")

def test_moments_lie_in_memory_as_their_weights_do():
    """Fused Adam pairs numbers by their place: a checkpoint of another layout must be laid out anew."""
    nets = [nn.Conv2d(3, 4, 3).to(memory_format=layout) for layout in (torch.channels_last, torch.contiguous_format)]
    optims, x = [torch.optim.Adam(net.parameters(), 0.1, fused=True) for net in nets], torch.randn(2, 3, 8, 8)
    def train(net, optim):
        net(x).square().sum().backward()
        optim.step()
        optim.zero_grad()
    train(nets[0], optims[0])
    saved = copy.deepcopy({"net": nets[0].state_dict(), "optim": optims[0].state_dict()})
    data.restore({"net": nets[1], "optim": optims[1]}, saved)
    for net, optim in zip(nets, optims):
        train(net, optim)
    torch.testing.assert_close(nets[0].weight, nets[1].weight)

def test_what_is_for_show_ends_no_run(cats, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise OSError("disk full")
    with monkeypatch.context() as patch:
        patch.setattr(data, "save_png", fail)
        saved = train(dcgan, cats, tmp_path / "run")
    assert saved["iteration"] == 2 and "not written: OSError: disk full" in capsys.readouterr().err
    sheets, samples = torch.zeros(1, 3, 8, 8), tmp_path / "run" / "samples"
    for iteration, size in ((999_900, 8), (1_000_000, 16), (20, 8)):  # in number, not in letters; of two sizes
        data.save_sheet(F.interpolate(sheets + iteration / 1e6 - 1, size), tmp_path / "run", iteration)
    data.save_views([{"iteration": 1, "G": 0.5, "D(real)": 1}, {"iteration": 2, "G": 0.4}], tmp_path / "run", True)
    movie = Image.open(tmp_path / "run" / "timelapse.gif")
    assert movie.size == Image.open(samples / "1000000.png").size and movie.n_frames == 3
    assert (tmp_path / "run/log.csv").read_text() == "iteration,G,D(real)\n1,0.5,1\n2,0.4,\n"

@pytest.mark.parametrize("output", ["a closed pipe", "/dev/full"])
def test_a_run_whose_output_nobody_can_take(output, cats, tmp_path):
    """It goes on; Ctrl-C saves, and says so where it can."""
    argv = [sys.executable, "-u", HERE / "dcgan.py",
            *command(dcgan, cats, tmp_path / "run", "--iters 100000 --save-every 5 --sample-every 3")]
    stdout = subprocess.PIPE if output == "a closed pipe" else open(output, "w")
    with subprocess.Popen(argv, stdout=stdout, stderr=subprocess.PIPE, text=True) as process:
        if stdout == subprocess.PIPE:
            process.stdout.readline()
            process.stdout.close()
        while not (tmp_path / "run" / "ckpt.pt").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        told = process.stderr.read()
    assert process.returncode == 130 and "--resume" in told and "Traceback" not in told and "rror" not in told
    iteration = int(re.search(r"iteration (\d+)", told).group(1))
    assert data.load_checkpoint(tmp_path / "run", "dcgan")["iteration"] == iteration

def test_say_shows_any_name_on_any_terminal():
    raw = io.BytesIO()
    terminal = io.TextIOWrapper(raw, "cp1252", write_through=True)
    data.say("猫", "\udcff", "é", file=terminal)
    assert raw.getvalue().decode("cp1252").split() == ["\\u732b", "\\udcff", "é"]

@pytest.mark.parametrize("variables, expected", [
    ({"RANK": "1"}, "0 1"), ({"RANK": "", "WORLD_SIZE": "2", "LOCAL_RANK": ""}, "0 1"),
    ({"RANK": "1", "WORLD_SIZE": "3", "TORCHELASTIC_RUN_ID": "x"}, "1 3")])
def test_only_torchrun_makes_several_processes(variables, expected):
    code = "import dcgan, cyclegan; print(dcgan.RANK, dcgan.WORLD); assert cyclegan.WORLD == dcgan.WORLD"
    told = subprocess.run([sys.executable, "-c", code], env=os.environ | variables, cwd=HERE, text=True, capture_output=True)
    assert told.stdout.strip() == expected, told.stderr

def test_names_and_places(cats, tmp_path, monkeypatch):
    """Long names are cut, ~ is the user's folder, and a stranger's checkpoint can't say where to write."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert options("--out=~/run --data ~/cats").out == str(tmp_path / "run")
    args = cyclegan.options(["--X", "ä" * 90, "--Y", "b" * 90, "--patch", "--cycle", "--lambda-cycle", "1.25"])[0]
    assert args.name.startswith("cyclegan") and len(args.name.encode()) <= 250
    stranger = {**train(dcgan, cats, tmp_path / "run")}
    stranger["options"] |= {"out": "/etc", "resume": "/etc", "device": "elsewhere", "sample": "/etc"}
    data.save_checkpoint(stranger, tmp_path / "run")
    args = dcgan.options(["--sample", str(tmp_path / "run")])[0]
    assert (args.out, args.resume, args.device, args.sample) == (None, None, "auto", str(tmp_path / "run"))

def test_a_mistake_in_the_code_keeps_its_traceback():
    for error, kept in ((OSError("of a learner's change"), True), (RuntimeError("shapes"), True),
                        (data.BadInput("x"), False), (RuntimeError("DefaultCPUAllocator: not enough memory"), False)):
        with pytest.raises(type(error) if kept else SystemExit), data.one_line_errors():
            raise error
    sources = [Path(program.__file__).read_text() for program in (dcgan, cyclegan, data, diffaug)]
    assert not re.search(r"^\s*assert ", "\n".join(sources), re.M)  # python -O would skip them

BAD_INPUT = [  # program, command line, words of the message
    (dcgan, "--data nowhere", "nowhere is no"), (cyclegan, "--X run/samples --Y nowhere", "nowhere is no"),
    (dcgan, "--data empty", "no usable image in empty"), (dcgan, "--data damaged.zip", "whole .zip"),
    (dcgan, "--data=", "empty path"), (dcgan, "--resume=", "empty path"), (dcgan, "--sample=", "empty path"),
    (dcgan, "--out=", "empty path"), (cyclegan, "--X=", "empty path"), (data, "preview ''", "empty path"),
    (cyclegan, "--deluxe flip,", "no '' among"), (cyclegan, "--batch 0", "at least 1"),
    (dcgan, "--g-lr nan", "between 0 and 1"), (dcgan, "--smooth 0.9 0.2", "LO <= HI"),
    (dcgan, "--width 1", "--width and --z 2"), (dcgan, "--g-target 9", "-1 to 2"),
    (cyclegan, "--cycle --lambda-cycle nan", "--lambda-cycle"), (cyclegan, "--lambda-cycle 3", "needs --cycle"),
    (cyclegan, "--pool 3", "--pool"), (cyclegan, "--X run/samples", "--X and --Y"),
    (dcgan, "--diffaug colour", "'colour' among color, "), (dcgan, "--hold-out 1", "--hold-out"),
    (dcgan, "--loss wgan-gp --d-norm batch", "--d-norm"), (dcgan, "--device gpu", "--device gpu"),
    (dcgan, "--device cuda:99", "--device cuda:99"), (cyclegan, "--input empty", "go together"),
    (dcgan, "--resume nowhere", "no checkpoint"), (cyclegan, "--translate nowhere --input empty", "no checkpoint"),
    (dcgan, "--resume broken", "damaged"), (cyclegan, "--resume run", "no run of this cyclegan.py"),
    (dcgan, "--resume run --width 8", "width"), (dcgan, "--resume run --out new", "leave --out"),
    (dcgan, "--resume changed --iters 9", "does not fit"), (dcgan, "--sample changed", "does not fit"),
    (dcgan, "--data run/samples --out run", "in use"), (dcgan, "--data run/samples --out damaged.zip/new", "can't write"),
    (dcgan, "--data run/samples --width 60000", "memory"),
    (data, "preview --diffaug run", "a folder goes first"), (data, "fetch apple2orange", "choose from"),
]

@pytest.fixture(scope="module")
def bad_inputs(cats, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    saved = train(dcgan, cats, folder / "run", "--iters 2")
    for name in ("empty", "broken", "changed"):
        (folder / name).mkdir()
    (folder / "damaged.zip").write_bytes(b"PK\5\6\0\0\0\0\1\0\1\0" + b"\xff" * 8 + b"\0\0")
    (folder / "broken/ckpt.pt").write_bytes(b"PK\3\4 nothing")
    saved["G"]["99.weight"] = saved["ema"]["99.weight"] = torch.zeros(1)  # as of one with more layers
    torch.save(saved, folder / "changed/ckpt.pt")
    return folder

@pytest.mark.parametrize("program, line, words", BAD_INPUT)
def test_bad_input_gets_one_line_and_writes_nothing(program, line, words, bad_inputs, monkeypatch, capsys):
    monkeypatch.chdir(bad_inputs)
    before = {path: path.stat().st_mtime_ns for path in bad_inputs.rglob("*")}
    with pytest.raises(SystemExit, match="2"), data.one_line_errors():
        if program is data:
            data.main(shlex.split(line))
        args, checkpoint = program.options([*(SMALL if "--resume" not in line else []), *line.split()])
        (dcgan.sample if "--sample" in line else program.train)(args, checkpoint)
    error = [line for line in capsys.readouterr().err.splitlines() if "left out" not in line]
    assert len(error) == 1 and words in error[0]
    assert {path: path.stat().st_mtime_ns for path in bad_inputs.rglob("*")} == before

def test_sampling_of_the_averaged_network_also_without_the_training_images(cats, tmp_path):
    run, z = tmp_path / "run", torch.randn(16, 5, 1, 1, generator=torch.Generator().manual_seed(3))
    saved, G = train(dcgan, cats, run, "--iters 2 --width 3 --z 5"), dcgan.Generator(32, 3, 5).eval()
    for name, value in saved["ema"].items():  # after two steps all is grey, and a GIF merges equal frames
        saved["ema"][name] = value * 20 if name.endswith("weight") else value
    data.save_checkpoint(saved, run)
    for source in (cats, "moved"):
        dcgan.sample(*dcgan.options(["--sample", str(run), "--n", "10", "--seed", "3", "--data", str(source)]))
    first, second = run / "generated", run / "generated-2"  # nothing is overwritten
    assert names(second) == ["grid.png", "images", "walk.gif", "walk.png"]
    assert names(first) == sorted([*names(second), "nearest.png"]) and len(names(first / "images")) == 10
    sizes = [Image.open(first / name).size for name in ("images/00000.png", "grid.png", "nearest.png")]
    assert sizes == [(32, 32), (8 * 34 + 2, 2 * 34 + 2), (8 * 34 + 2, 2 * 66 + 2)]
    G.load_state_dict(saved["ema"])
    movie, walk = Image.open(first / "walk.gif"), pixels(first / "walk.png")
    assert movie.n_frames == 16 and movie.size == (6 * 34 + 2, 36)
    assert shows(pixels(first / "images/00000.png"), G(z)) and shows(walk[:, 2:34, 2:34], G(z)[10:])
    images = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)
    mirrored = images[2:3].flip(3) / 127.5 - 1
    assert torch.allclose(dcgan.nearest(mirrored, images), mirrored)
    a, b = F.normalize(z[:2])
    walk = torch.stack([dcgan.slerp(a, b, t / 4) for t in range(5)])  # along the sphere, from a to b
    assert torch.allclose(walk.norm(dim=1), torch.ones(1)) and torch.allclose(walk[::4], torch.stack([a, b]))

@both
@pytest.mark.parametrize("dtype, has, bf16", [("auto", 1, 1), ("auto", 0, 0), ("bf16", 0, 1), ("fp32", 1, 0)])
def test_auto_precision_is_bf16_where_the_hardware_has_it(program, dtype, has, bf16, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bool(has)}, raising=False)
    with program.setup(options(f"--dtype {dtype}", program))[1]:
        assert (torch.mm(torch.ones(1, 1), torch.ones(1, 1)).dtype == torch.bfloat16) == bf16

@pytest.mark.parametrize("program", [dcgan, cyclegan, data, diffaug])
def test_the_source_keeps_its_shape_and_the_help_fits_a_terminal(program, monkeypatch, capsys):
    allowed = {"torch", "torchvision", "PIL", "numpy", "data", "diffaug"} | sys.stdlib_module_names
    lines = Path(program.__file__).read_text().splitlines()
    imports = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert imports <= allowed and max(map(len, lines)) <= 110
    monkeypatch.setenv("COLUMNS", "100")
    if program is not diffaug:
        with pytest.raises(SystemExit):
            (program.main if program is data else program.options)(["--help"])
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 100
# ---- CycleGAN ----
@pytest.mark.parametrize("flags, cycle, identity, pull_cycle, pull_identity, calls", [
    ("--identity 0", None, None, 0, 0, 1), ("--identity 0 --cycle", 0.2, None, 2 * 2, 0, 2),
    ("--identity 0 --cycle l2 --lambda-cycle 5", 0.04, None, 5 * 2 * 0.4, 0, 2),
    ("--identity 3 --cycle --diffaug cutout", 0.2, 0.4, 2 * 2, 3, 2),
])
def test_cyclegan_losses_by_hand(flags, cycle, identity, pull_cycle, pull_identity, calls, monkeypatch):
    """x = 0.2, y = 0.5, G_XY adds 0.1, G_YX takes 0.3 off. All that D sees goes through DiffAugment: here
    it takes off the 0.25 that D adds. The gradient of each D is clipped, here doubled, to be seen."""
    seen = []
    monkeypatch.setattr(diffaug, "augment", lambda x, policy: seen.extend([policy] * len(x)) or x - 0.25)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda weights, most: next(weights).grad.mul_(2 * most))
    args, Gs, Ds = options(flags, cyclegan), [Toy("G", 0.1), Toy("G", -0.3)], [Toy("D", 1.0), Toy("D", 1.0)]
    optims = [KeepGrad([p for net in nets for p in net.parameters()], 1e-5) for nets in (Gs, Ds)]
    pools = [cyclegan.Pool(0), cyclegan.Pool(0)]
    x, y = torch.full((2, 3, 32, 32), 0.2), torch.full((2, 3, 32, 32), 0.5)
    losses = cyclegan.step(*Gs, *Ds, *optims, x, y, pools, args, contextlib.nullcontext())
    expected = {"D_X": 0.8 ** 2 + 0.2 ** 2, "D_Y": 0.5 ** 2 + 0.3 ** 2, "G_XY": 0.7 ** 2, "G_YX": 0.8 ** 2,
                "cycle_X": cycle, "cycle_Y": cycle, "identity": identity,
                "D_X(real)": 0.2, "D_X(fake)": 0.2, "D_Y(real)": 0.5, "D_Y(fake)": 0.3}
    expected = {name: value for name, value in expected.items() if value is not None}  # no cycle, no column
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected)
    assert [net.w.grad.item() for net in Gs + Ds] == pytest.approx([  # D's: of its own step alone
        -1.4 - pull_cycle + pull_identity, -1.6 - pull_cycle - pull_identity, 2 * 0.06, 2 * -0.22], abs=1e-4)
    assert [len(G.calls) for G in Gs] == [calls, calls] and seen == [args.diffaug] * 12

def test_pool_keeps_half_and_returns_old_fakes():
    pool, image = cyclegan.Pool(50), lambda value, n: torch.full((n, 3, 2, 2), float(value))
    for i in range(5):
        assert torch.equal(pool.swap(image(i, 10)), image(i, 10))  # as long as it fills, everything passes
    returned = torch.cat([pool.swap(image(9, 10)) for _ in range(20)])[:, 0, 0, 0]
    assert 40 < (returned != 9).sum() < 50.5 and set(returned.tolist()) == {0, 1, 2, 3, 4, 9}
    assert len(pool.images) == 50 and torch.equal(cyclegan.Pool(0).swap(image(1, 3)), image(1, 3))

def test_cyclegan_loop_hands_each_part_its_own(tmp_path, monkeypatch):
    """Sets, networks, averages, pools, samples; and the truth, from the same cats in both breeds."""
    for name, numbers in list(data.DRAWN.items()):
        monkeypatch.setitem(data.DRAWN, name, numbers[:5])  # all of them would take long
    nets, batches, step = [], {"toy-blue": [], "toy-grumpy": []}, cyclegan.step
    def spy(G_XY, G_YX, D_X, D_Y, optim_G, optim_D, x, y, *rest):
        nets.extend(copy.deepcopy([G_XY, G_YX, D_X, D_Y]))
        batches["toy-blue"].append(x)
        batches["toy-grumpy"].append(y)
        return step(G_XY, G_YX, D_X, D_Y, optim_G, optim_D, x, y, *rest)
    monkeypatch.setattr(cyclegan, "step", spy)
    saved = train(cyclegan, None, tmp_path / "run", "--X toy-blue --Y toy-grumpy --ema 0 --iters 2")
    assert len(saved["pool_X"]["images"]) == len(saved["pool_Y"]["images"]) == 8
    orders = []
    for name, seen in batches.items():  # all five, and no others
        known = data.load_images(name, 32) / 127.5 - 1
        found = [torch.isclose(image, known, atol=1e-5).flatten(1).all(1) for image in torch.cat(seen)]
        assert torch.stack(found).any(0).all() and torch.stack(found).any(1).all()
        orders.append(torch.stack(found).int().argmax(1).tolist())
    assert orders[0] != orders[1]  # a permutation for each
    for name, before in zip(("G_XY", "G_YX", "D_X", "D_Y"), nets):  # all are trained
        assert not same(saved[name], before.state_dict())
    assert same(saved["G_XY"], saved["ema_XY"]) and same(saved["G_YX"], saved["ema_YX"])  # without memory
    G_XY, G_YX = [cyclegan.Generator(32, 4) for _ in "XY"]
    G_XY.load_state_dict(saved["ema_XY"])
    G_YX.load_state_dict(saved["ema_YX"])
    grumpy, blue = [torch.cat([cat for _, cat in cyclegan.read_pictures(name, 32)]) for name in data.DRAWN]
    expected = (F.l1_loss(G_XY(blue), grumpy) + F.l1_loss(G_YX(grumpy), blue)) / 2
    assert saved["rows"][1]["truth_error"] == pytest.approx(expected.item(), rel=1e-3)

def test_cyclegan_sheet_shows_the_middle_of_the_first_pictures(cats, tmp_path):
    saved = train(cyclegan, cats, tmp_path / "run", "--deluxe crop --iters 2")
    assert "truth_error" not in saved["rows"][0] and "cycle_X" not in saved["rows"][0]
    G_XY, G_YX = [cyclegan.Generator(32, 4) for _ in "XY"]
    G_XY.load_state_dict(saved["ema_XY"])
    G_YX.load_state_dict(saved["ema_YX"])
    sheet = pixels(tmp_path / "run/samples/000002.png")
    x = y = data.load_images(str(cats), 35, limit=1)[:, :, 2:34, 2:34] / 127.5 - 1  # 35: to be cropped
    for row, image in enumerate((x, G_XY(x), G_YX(G_XY(x)), y, G_YX(y), G_XY(G_YX(y)))):
        assert shows(sheet[:, 34 * row + 2:34 * row + 34, 2:34], image)

def test_translation(cats, tmp_path):
    """One PNG per input, under its name and at its proportions; two directions are two networks."""
    run, photos, G = tmp_path / "run", tmp_path / "photos", cyclegan.Generator(32, 4)
    saved = train(cyclegan, cats, run, "--cycle --iters 2")
    (photos / "sub").mkdir(parents=True)
    Image.new("RGBA", (300, 101), "red").save(photos / "sub" / "été 1.png")
    Image.new("L", (30, 90)).save(photos / "sub" / "été 1.jpg")
    Image.new("RGB", (50, 50)).save(photos / "b.webp")
    with zipfile.ZipFile(tmp_path / "long.zip", "w") as archive:
        for end in "ab":
            archive.write(photos / "b.webp", f"{'ä' * 150}{end}.webp")
    def translate(*argv):
        cyclegan.translate(*cyclegan.options(["--translate", str(run), "--input", *map(str, argv)]))
    for to, weights in (("X", "ema_YX"), ("Y", "ema_XY")):
        translate(photos, "--to", to)
        G.load_state_dict(saved[weights])
        sizes = {path.name: Image.open(path).size for path in (run / f"translated_to_{to}").iterdir()}
        assert sizes == {"b.png": (32, 32), "été 1.png": (32, 96), "été 1-2.png": (95, 32)}
        assert shows(pixels(run / f"translated_to_{to}" / "b.png"), G(-torch.ones(1, 3, 32, 32)))
    assert not same(saved["ema_XY"], saved["ema_YX"])
    ramp = torch.linspace(-1, 1, 51).round(decimals=1).expand(1, 3, 33, 51)  # not in fours: continued at the border
    data.save_png(data.to_pillow(ramp), tmp_path / "ramp" / "1.png")
    G.load_state_dict(saved["ema_XY"])
    cyclegan.translate(*cyclegan.options(["--translate", str(run), "--input", str(tmp_path / "ramp"), "--out", str(tmp_path / "o")]))
    (_, image), = cyclegan.read_pictures(str(tmp_path / "ramp"), 32)
    width = image.shape[3]
    assert width % 4 and shows(pixels(tmp_path / "o" / "1.png"), G(F.pad(image, (0, -width % 4, 0, 0), "replicate"))[:, :, :, :width])
    translate(tmp_path / "long.zip")  # names too long for a file, and alike where they are cut
    assert len(names(run / "translated_to_Y-2")) == 2
    translate("toy-blue")  # there is something to translate after the first run
    assert len(names(run / "translated_to_Y-3")) == 16
# ---- several processes ----
SPY = """
import sys, torch, {program} as program
step = program.step
def spy(*args):
    losses = step(*args)
    images = next(part for part in args if isinstance(part, torch.Tensor))
    nets = torch.nn.ModuleList(part for part in args if isinstance(part, torch.nn.Module))
    weights = torch.cat([p.detach().flatten() for p in nets.parameters()])
    for mine, alike in ((images, False), (torch.rand(9), False), (weights, True)):
        both = [torch.zeros_like(mine) for _ in range(2)]
        torch.distributed.all_gather(both, mine)
        assert torch.equal(*both) == alike
    return losses
program.step = spy
with program.data.one_line_errors():
    program.train(*program.options(sys.argv[1:]))
"""

@both
def test_two_processes_draw_their_own_take_the_same_steps_and_one_speaks(program, cats, tmp_path):
    (tmp_path / "spy.py").write_text(SPY.format(program=program.__name__))
    torchrun = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node 2".split()]
    argv = [*torchrun, tmp_path / "spy.py", *command(program, cats, tmp_path / "run", "--diffaug --iters 3")]
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    result = subprocess.run(argv, text=True, capture_output=True, timeout=200, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("finished") == 1 and result.stdout.count("3/3") == 1
    assert names(tmp_path / "run") == FILES
