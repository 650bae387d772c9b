"""pytest -q test_smoke.py: offline, on a CPU, in about a minute."""
import copy
import os
import re
import signal
import subprocess
import sys
import zipfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.path.dirname(__file__)}  # tiny networks: fast
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
import cyclegan
import data
import dcgan
import diffaug
HERE, CPU = Path(__file__).parent, torch.device("cpu")
SMALL = "--size 32 --width 4 --batch 4 --iters 2 --log-every 1 --sample-every 2 --save-every 2 --device cpu"
FILES = ["ckpt.pt", "log.csv", "losses.png", "samples", "timelapse.gif"]  # of a run
CATS = [data.draw_cat(i, "grumpy", 40) for i in range(6)]
both = pytest.mark.parametrize("program", [dcgan, cyclegan])
@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):  # for each test the same random numbers, and a folder with six pictures
    torch.manual_seed(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a training sets its own
    monkeypatch.chdir(tmp_path)
    Path("cats").mkdir()
    for i, cat in enumerate(CATS):
        cat.save(f"cats/{i}.png")
def options(flags="", program=dcgan):
    return program.options(f"{SMALL} {flags}".split())[0]
def command(program, flags="", folder="run"):  # a small run in this folder, or to go on with the one there
    sets = "--data cats" if program is dcgan else "--X cats --Y cats"
    start = f"--resume {folder} --device cpu" if Path(folder).exists() else f"{SMALL} {sets} --out {folder}"
    return f"{start} {flags}".split()
def train(program, flags="", folder="run"):  # in this process -> the checkpoint
    program.train(*program.options(command(program, flags, folder)))
    return data.load_checkpoint(folder, program.__name__)
def load(saved, name):  # the generator of this name in a checkpoint
    G = sys.modules[saved["program"]].build(SimpleNamespace(**saved["options"]), CPU)[0].eval()
    G.load_state_dict(saved[name])
    return G
def same(a, b):  # two networks' saved weights
    return all(map(torch.equal, a.values(), b.values()))
def files(folder):
    return sorted(os.listdir(folder))
def pixels(path, row=None, column=0):  # of a picture, or of one in a grid: float [1, 3, H, W] in [-1, 1]
    picture = pil_to_tensor(Image.open(path))[None] / 127.5 - 1
    return picture if row is None else picture[:, :, 34 * row + 2:, 34 * column + 2:][:, :, :32, :32]
def alike(picture, image):  # but for the rounding to 8 bits
    return (picture - image).abs().max() < 0.015
# ---- networks ----
relu, leaky, selu = nn.ReLU(), nn.LeakyReLU(0.2), nn.SELU()
none, batch, instance = nn.Identity, nn.BatchNorm2d, nn.InstanceNorm2d
class Block(nn.Sequential):  # a residual block
    def forward(self, x):
        return x + super().forward(x)
def reference(name, act, norm):  # the networks of width 4, layer by layer; in dcgan.py no bias before a norm
    conv, turned, double, pad = nn.Conv2d, nn.ConvTranspose2d, nn.Upsample(scale_factor=2), nn.ReflectionPad2d
    def layer(a, b, *shape, norm=norm, kind=turned if "transpose" in name else conv):
        return nn.Sequential(kind(a, b, *shape, bias=norm is none or "X" in name), norm(b), act)
    block = lambda c: Block(pad(1), layer(c, c, 3), pad(1), layer(c, c, 3)[:2])
    return nn.Sequential(*{
        "G": [layer(5, 16, 4, kind=turned), double, layer(16, 8, 3, 1, 1), double, layer(8, 4, 3, 1, 1),
              double, layer(4, 2, 3, 1, 1), conv(2, 3, 3, 1, 1), nn.Tanh()],
        "G transpose": [layer(5, 16, 4), layer(16, 8, 4, 2, 1), layer(8, 4, 4, 2, 1), layer(4, 2, 4, 2, 1),
                        conv(2, 3, 3, 1, 1), nn.Tanh()],
        "D": [layer(3, 4, 4, 2, 1, norm=none), layer(4, 8, 4, 2, 1), layer(8, 16, 4, 2, 1), conv(16, 1, 4)],
        "D patch": [layer(3, 4, 4, 2, 1, norm=none), layer(4, 8, 4, 1, 1), conv(8, 1, 4, 1, 1)],
        "X to Y": [layer(3, 4, 3, 2, 1, norm=none), layer(4, 8, 3, 2, 1), block(8), block(8),
                   double, layer(8, 4, 3, 1, 1, norm=none), double, conv(4, 3, 3, 1, 1), nn.Tanh()],
        "X to Y 256": [pad(3), layer(3, 4, 7, norm=none), layer(4, 8, 3, 2, 1), layer(8, 16, 3, 2, 1),
                       *[block(16) for _ in range(9)], double, layer(16, 8, 3, 1, 1),
                       double, layer(8, 4, 3, 1, 1, norm=none), pad(3), conv(4, 3, 7), nn.Tanh()]}[name])

@pytest.mark.parametrize("program, k, flags, name, act, norm", [
    (dcgan, 0, "--norm none", "G", relu, none), (dcgan, 0, "--selu", "G", selu, none),
    (dcgan, 0, "--norm batch --up transpose", "G transpose", relu, batch), (dcgan, 1, "", "D", leaky, none),
    (dcgan, 1, "--loss wgan", "D", leaky, batch), (dcgan, 1, "--loss wgan --selu", "D", selu, none),
    (dcgan, 1, "--selu --d-norm batch", "D", selu, batch),
    (dcgan, 1, "--patch --d-norm instance", "D patch", leaky, instance), (cyclegan, 3, "", "D", leaky, none),
    (cyclegan, 0, "--blocks 2", "X to Y", relu, instance),
    (cyclegan, 1, "--size 256", "X to Y 256", relu, instance)])
def test_networks_are_what_their_flags_say(program, k, flags, name, act, norm):
    flags += " --z 5" if program is dcgan else ""
    net, plain = program.build(options(flags, program), CPU)[k], reference(name, act, norm)
    plain.load_state_dict(dict(zip(plain.state_dict(), net.state_dict().values(), strict=True)))
    x = torch.randn(3, 5, 1, 1) if "G" in name else torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(net(x), plain(x))
    assert len(list(net.parameters())) == len(list(plain.parameters()))

@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_layers_are_added_as_the_size_doubles_with_at_most_8_times_the_width(size):
    G, D = dcgan.build(options(f"--size {size} --width 2 --z 5"), CPU)
    images = G(torch.randn(2, 5, 1, 1))
    assert images.shape == (2, 3, size, size) and D(images).shape == (2, 1, 1, 1)
    assert isinstance(D[-2], dcgan.MinibatchStd) == (size > 64)
    channels = [min(16, size // side) for side in (4, 8, 16, 32, 64, 128, 256) if side <= size]
    assert [layer.num_features for layer in G if isinstance(layer, dcgan.Modulated)] == channels
    assert [weight.shape[0] for weight in D.parameters() if weight.dim() == 4] == [*channels[-2::-1], 1]
    nets = cyclegan.Generator(256, 64, blocks=9), cyclegan.Discriminator(256, 64, patch=True)  # the paper's
    assert [sum(p.numel() for p in net.parameters()) for net in nets] == [11_378_179, 2_764_737]

@both
@pytest.mark.parametrize("size, field", [(32, 16), (64, 34), (128, 70), (256, 70)])
def test_patch_discriminator_sees_a_patch(program, size, field):
    x = torch.randn(2, 3, size, size, requires_grad=True)
    scores = program.build(options(f"--patch --size {size}", program), CPU)[-1](x)
    scores[0, 0, scores.shape[2] // 2, scores.shape[3] // 2].backward()
    rows = x.grad.abs().sum((0, 1, 3)).nonzero()
    assert scores.shape[2] > 1 and rows[-1] - rows[0] + 1 == field

@both
def test_initial_weights_and_spectral_norm(program):
    nets = program.build(options("--width 16", program), CPU)
    for net in nets:
        weights = torch.cat([p.flatten() for p in net.parameters() if p.dim() == 4])
        assert abs(weights.mean()) < 1e-3 and abs(weights.std() - 0.02) < 1e-3
    Ds = program.build(options("--spectral-norm --patch", program), CPU)[len(nets) // 2:]
    assert not any(nn.utils.parametrize.is_parametrized(D[-1]) for D in Ds)
    for layer in [layer for D in Ds for layer in list(D)[:-1] if isinstance(layer, nn.Conv2d)]:
        weight = [layer.weight for _ in range(30)][-1]  # the estimate gets better at each look
        assert torch.linalg.matrix_norm(weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)

def test_minibatch_std_and_modulation():
    x, std = torch.randn(6, 4, 3, 3), dcgan.build(options("--minibatch-std"), CPU)[1][-2]
    assert torch.equal(std(x)[:, :4], x) and std(x[:1].expand(6, -1, -1, -1))[:, 4].max() < 1e-3
    assert torch.allclose(std(x)[:, 4], x.std(0, correction=0).mean(), atol=1e-4)  # over the batch
    layer, x, z = dcgan.Modulated(2, 3, 16), torch.randn(5, 2, 16, 16), torch.randn(5, 3, 1, 1)
    out, (scale, shift) = F.batch_norm(x, None, None, training=True), layer.style(z).chunk(2, dim=1)
    fur = nn.init.normal_(layer.get_parameter("share")) * layer.get_buffer("pattern")  # trained; saved
    assert torch.allclose(layer(x, z), out * (1 + scale) + shift + fur, atol=1e-5) and fur.std((1, 2)).all()
    G = dcgan.Generator(32, 2, 3)
    G[0].weight.data.zero_()  # so z has no other way
    with torch.autocast("cpu", torch.bfloat16):
        assert G(z).std(dim=0).max() > 1e-3 and not torch.equal(G(z), G(z).bfloat16())  # pixels in float32
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
IDLE = SimpleNamespace(step=lambda: None, zero_grad=lambda: None)  # an optimizer that leaves gradients to see
@pytest.mark.parametrize("flags, real, fake, g", [
    ("--loss lsgan", 0.5 ** 2, 0.3 ** 2, 0.7 ** 2), ("--g-target 0.5", 0.5 ** 2, 0.3 ** 2, 0.2 ** 2),
    ("--smooth 0.6 0.8", 0.2 ** 2, 0.3 ** 2, 0.7 ** 2), ("--loss wgan-gp", -0.5, 0.3, -0.3),
    ("--loss vanilla", 0.474077, 0.854355, 0.554355),  # log(1 + exp(-0.5)), of 0.3, of -0.3
    ("--loss vanilla --smooth 0.8 1", 0.9 * 0.474077 + 0.1 * 0.974077, 0.854355, 0.554355),
    ("--loss wgan", -0.5, 0.3, -0.01 * 0.05 - 0.25)])  # G meets a D that is clipped by then
def test_losses_by_hand(flags, real, fake, g, monkeypatch):
    """Reals 0.5, fakes 0.3. All that D sees is augmented: here by taking off the 0.25 that D adds."""
    seen, args = [], options(f"{flags} --diffaug cutout")
    monkeypatch.setattr(diffaug, "augment", lambda x, policy: seen.append(policy) or x - 0.25)
    monkeypatch.setattr(diffaug, "uniform", lambda x, *ends: torch.full((len(x), 1, 1, 1), sum(ends) / 2))
    G, D, images = Toy("G", 0.3), Toy("D", 1.0), torch.full((4, 3, 32, 32), 0.5)
    losses = dcgan.step(G, D, IDLE, IDLE, images, True, args, nullcontext())
    expected = {"D_real": real, "D_fake": fake, "G": g, "D(real)": 0.5, "D(fake)": 0.3}
    if "vanilla" in flags:
        expected |= {"D(real)": 0.622459, "D(fake)": 0.574443}
    if "gp" in flags:  # the gradient of a mean over 3072 numbers, and of the mean of patches
        expected["penalty"] = 10 * (1 - 3072 ** -0.5) ** 2
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, abs=1e-5)
    assert G.w.grad < 0 and (D.w.grad < 0 or "gp" in flags)  # D pulls apart, G goes up
    assert seen == ["cutout"] * 3 and G.calls == [(4, True)]  # one forward of G; D sees reals and fakes apart
    assert D.calls == [(4, True)] * (4 if "gp" in flags else 3)

def test_gradient_penalty_is_taken_between_real_and_fake():
    points, ones = [], torch.ones(50, 1, 1, 1)
    penalty = dcgan.gradient_penalty(lambda x: points.append(x) or x.square(), ones, -ones)
    x = points[0].flatten()
    assert -1 < x.min() < -0.7 and 0.7 < x.max() < 1 and len(x.unique()) == 50
    assert penalty.item() == pytest.approx(((2 * x.abs() - 1) ** 2).mean().item())  # |gradient| is 2 |x|

def test_the_step_of_the_readme_is_the_step():
    snippet = re.search(r"```python\n(fake = G.*?)```", (HERE / "README.md").read_text(), re.S).group(1)
    args = options("--z 32 --d-norm instance")
    nets, real = dcgan.build(args, CPU), torch.rand(16, 3, 32, 32) * 2 - 1
    G, D = copy.deepcopy(nets)
    optim_G, optim_D, *optims = [torch.optim.SGD(net.parameters(), 9) for net in (G, D, *nets)]  # not Adam
    for seed in range(2):
        torch.manual_seed(seed)
        dcgan.step(*nets, *optims, real, True, args, nullcontext())
        torch.manual_seed(seed)
        exec(snippet, {**globals(), **locals(), "augment": lambda x: x})
    for ours, theirs in zip(nets, (G, D)):
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-3, atol=1e-6)
runs = pytest.mark.parametrize("program, flags", [
    (dcgan, "--deluxe --diffaug"), (dcgan, "--loss wgan --diffaug cutout --log-every 2 --sample-every 99"),
    (dcgan, "--deluxe zoom,jitter,autocontrast --d-norm batch --patch --loss vanilla"),
    (dcgan, "--loss wgan-gp --spectral-norm --up transpose --smooth 0.8 0.9"), (cyclegan, "--identity 0"),
    (cyclegan, "--patch --cycle --deluxe --diffaug --spectral-norm --decay --pool 6 --log-every 2")])

@runs
def test_a_step_asks_the_device_for_no_number(program, flags, monkeypatch):
    """A tensor on "meta" has no numbers: .item(), a boolean index and a tensor left on the CPU fail here."""
    monkeypatch.setattr(torch, "autocast", lambda device, enabled: nullcontext())  # there is none for "meta"
    args = options(flags, program)
    images = torch.empty(4, 3, 35, 35, dtype=torch.uint8, device="meta")
    x, nets = data.deluxe(images, 32, args.deluxe)[:, :, :32, :32], program.build(args, "meta")
    rest = [x, True] if program is dcgan else [x, x, [cyclegan.Pool(6), cyclegan.Pool(6)]]
    for _ in range(3):  # until the pools are full
        losses = program.step(*nets, IDLE, IDLE, *rest, args, nullcontext())
    assert all(loss.is_meta and loss.shape == () for loss in losses.values())
# ---- augmentation ----
def test_color_ranges():
    x = torch.rand(4000, 3, 2, 2) * 2 - 1
    shift = diffaug.brightness(x) - x
    assert torch.allclose(shift, shift[:, :1, :1, :1].expand_as(x), atol=1e-6)  # one draw an image
    assert -0.5 <= shift.min() < -0.49 and 0.49 < shift.max() <= 0.5001
    for change, dims, low, high in ((diffaug.saturation, 1, 0, 2), (diffaug.contrast, (1, 2, 3), 0.5, 1.5)):
        out, mean = change(x), x.mean(dims, keepdim=True)
        factor = ((out - mean) / (x - mean)).flatten(1).median(1).values.view(-1, 1, 1, 1)
        assert torch.allclose(out, mean + factor * (x - mean), atol=1e-5) and abs(factor.mean() - 1) < 0.05
        assert low - 1e-3 <= factor.min() < low + 0.02 and high - 0.02 < factor.max() <= high + 1e-3
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
    seeded = lambda x: torch.manual_seed(3) and diffaug.augment(x, "color,translation,cutout")
    assert torch.autograd.gradcheck(seeded, torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True))
    monkeypatch.setattr(diffaug, "POLICIES", {"double": (lambda x: 2 * x,), "next": (lambda x: x + 1,)})
    assert [diffaug.augment(5, policy) for policy in ("double,next", "next,double", "")] == [11, 12, 5]

def test_deluxe_operations():
    x, gentle = torch.rand(3, 35, 35).expand(500, -1, -1, -1), torch.rand(500, 3, 8, 8) * 0.4 + 0.3
    assert are_its_windows(data.DELUXE["crop"](x, 32), x[0])
    flipped = data.DELUXE["flip"](x, 35)
    mirrored = (flipped == x.flip(3)).flatten(1).all(1)
    assert torch.equal(flipped[~mirrored], x[~mirrored]) and 200 < mirrored.sum() < 300
    assert 180 < (data.DELUXE["autocontrast"](gentle, 8).amax((2, 3)) > 0.999).all(1).sum() < 320
    x = torch.tensor([0.4, 0.5, 0.5]).view(3, 1, 1) + torch.tensor([0, 0.1])  # colours, and columns
    x = data.DELUXE["jitter"](x.expand(500, 3, 2, 2), 2)
    level, columns, colours = x.mean((1, 2, 3)), x[:, 0, 0, 1] - x[:, 0, 0, 0], x[:, 1, 0, 0] - x[:, 0, 0, 0]
    for factor in (level / 0.51667, columns / level * 5.1667, colours / columns):  # then contrast, saturation
        assert 0.699 <= factor.min() < 0.72 and 1.28 < factor.max() <= 1.301 and len(factor.unique()) > 400
    ramp = torch.linspace(0, 1, 70).expand(500, 3, 70, 70)
    for image in (ramp, ramp.transpose(2, 3)):
        zoomed = data.DELUXE["zoom"](image, 64).flatten(1)
        spread = (zoomed.amax(1) - zoomed.amin(1)) * 64 / 63
        assert 0.78 < spread.min() < 0.82 and 0.97 < spread.max() <= 1.02

def test_deluxe_range_sizes_and_what_the_plain_flags_mean():
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
    typed = options("--spectral-norm --selu --d-norm batch --size 128 --no-minibatch-std")
    assert typed.d_norm == "batch" and not typed.minibatch_std  # what is typed, is built
# ---- images in and out ----
@pytest.mark.parametrize("mode, value, expected", [
    ("RGBA", (255, 0, 0, 0), (255, 255, 255)), ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
    ("LA", (0, 0), (255, 255, 255)), ("RGBa", (0, 0, 0, 0), (255, 255, 255)), ("1", 1, (255, 255, 255)),
    ("I;16", 32768, (128, 128, 128)), ("F", 0.5, (128, 128, 128)), ("L", 7, (7, 7, 7)),
    ("CMYK", (0, 255, 255, 0), (255, 0, 0)), ("HSV", (0, 0, 255), (255, 255, 255))])
def test_every_mode_becomes_rgb_on_white_and_scaled_to_8_bits(mode, value, expected):
    image = Image.new(mode, (6, 6), value)
    image.putpixel((0, 0), float("nan") if mode == "F" else value)  # a hole in a measured picture
    assert data.to_rgb(image).getpixel((1, 1)) == pytest.approx(expected, abs=1)

def test_load_images_from_folder_and_zip(monkeypatch, capfd):
    image, half, turned = Image.new("RGBA", (60, 20)), Image.new("L", (80, 40)), Image.Exif()
    image.paste("lime", (20, 0, 40, 10))  # the upper half of what a centre crop keeps, above nothing
    for name in ("a", "._a", ".thumbnails/a", "@eaDir/a", "__MACOSX/a", "deep/.Trash-1000/a"):
        Path(f"in/{name}.png").parent.mkdir(parents=True, exist_ok=True)
        image.convert("P").save(f"in/{name}.png")  # where transparency is that of a colour
    half.paste(255, (0, 0, 40, 40))
    turned[0x0112] = 6  # the white half, on the left, belongs on top
    half.save("in/deep/@b.JPEG", exif=turned, quality=95)
    for name in ("broken.png", "notes.txt", "1.HEIC", "2.heic"):
        Path("in", name).write_text("not an image")
    data.save_png(half, "in/preview.png")  # made by one of the programs, as also samples
    data.save_gif([half], "in/walk.gif", 60)
    zipfile.main(["-c", "all.zip", "in"])
    Path("linked/lost+found").mkdir(parents=True)
    for link, target in (("linked/folder", "../in"), ("linked/.folder", "../in"), ("in/gone.png", "nowhere"),
                         ("in/deep/back", "../../linked")):
        Path(link).symlink_to(target)
    listed = Path.iterdir  # of a disk, only the administrator may list lost+found
    monkeypatch.setattr(Path, "iterdir", lambda path: listed(path / "0" if path.match("lost*") else path))
    folder = "2 of 4", "gone.png: No such file", "lost+found: No such file"
    for source, words in ("in", folder), ("linked", folder), ("all.zip", ["1 of 3"]):
        (a, b), told = data.load_images(source, 16), capfd.readouterr().err
        assert a[1].min() > 240 and a[::2, :7].max() < 15 and a[:, 9:].min() > 240
        assert b[:, :7].min() > 240 and b[:, 7].min() > 228 and b[:, 8].max() < 27 and b[:, 9:].max() < 15
        for part in (*words, "broken.png", "left out 3 files (.heic .txt)", "left out 2 pictures made by"):
            assert part in told
    assert len(data.load_images("in/preview.png", 16)) == 1  # where nothing else is, it is meant

def test_pictures_are_decoded_only_a_little_ahead():
    opened = []
    many = [(f"{i}.png", lambda i=i: opened.append(i) or Image.new("L", (4, 4))) for i in range(100)]
    next(data.read("many", many, data.to_rgb))
    assert len(opened) <= 16

def test_drawn_cats_are_pairs_in_two_breeds_and_in_disjoint_sets():
    grumpy, blue = [pil_to_tensor(data.draw_cat(3, breed, 64)).float() for breed in ("grumpy", "blue")]
    assert torch.equal(grumpy[:, :6], blue[:, :6]) and grumpy[0].mean() > blue[0].mean() + 5  # cream
    edges = [cat.sum(0).diff(dim=0).abs() > 60 for cat in (grumpy, blue)]
    assert (edges[0] & edges[1]).sum() > 0.2 * edges[1].sum()
    sets = [*data.DRAWN.values(), data.HELD_OUT]
    assert [len(numbers) for numbers in sets] == [204, 75, 16] and len(set().union(*sets)) == 204 + 75 + 16

def test_batches_are_epochs_and_never_short():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 2, 2)
    batch = lambda k, size=4, seed=1, n=10: data.batch(images[:n], size, k, seed, CPU)[:, 0, 0, 0].tolist()
    epochs = torch.tensor([batch(k) for k in range(25)]).view(10, 10)
    assert (epochs.sort(dim=1).values == torch.arange(10)).all() and len(epochs.unique(dim=0)) == 10
    few = batch(0, size=8, n=3)
    assert len(few) == 8 and sorted(few[:3]) == sorted(few[3:6]) == [0, 1, 2]
    assert batch(7) == batch(7) and [batch(k) for k in range(5)] != [batch(k, seed=2) for k in range(5)]

def test_get(monkeypatch):
    monkeypatch.setattr(data, "SERVERS", [Path(name).absolute().as_uri() for name in ("gone", "www")])
    monkeypatch.setattr("urllib.response.addinfourl.length", None, raising=False)  # files have none
    Path("www/datasets").mkdir(parents=True)
    with zipfile.ZipFile("www/datasets/fruit.zip", "w") as archive:
        for name in ("fruit/trainA/x.png", "fruit/testB/x.png", "../climbed.png"):
            archive.writestr(name, "picture")
    damaged = Path("www/datasets/fruit.zip").read_bytes().replace(b"picture", b"pixture")
    Path("www/datasets/half.zip").write_bytes(damaged)
    for name, words in (("half", "datasets/half/trainA"), ("none", "datasets/none"), ("fruit", "already")):
        assert not Path("datasets").exists()
        with pytest.raises(data.BadInput, match=words):
            data.main(["get", name])
            data.main(["get", name])  # once more
    assert files("datasets") == ["fruit"] and files("datasets/fruit") == ["testB", "trainA"]

def test_preview_and_the_colours_of_a_grid():
    Path("cats/!.png").touch()  # one that can't be read
    data.main("preview cats --size 32 --deluxe jitter --diffaug cutout".split())
    assert alike(pixels("out/preview.png", 0, 0), data.load_images("cats", 32, limit=1) / 127.5 - 1)
    assert (pixels("out/preview.png", 5, 11).abs().amax(1) < 0.01).float().mean() >= 0.1  # a hole
# ---- a run ----
def test_what_a_run_does_and_writes(monkeypatch, capfd):
    seen, moved, step = [], [], dcgan.step
    monkeypatch.setattr(dcgan, "step", lambda *args: seen.append(args[4:6]) or step(*args))
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda *args: moved.append(args[2]))  # the average
    flags = f"{SMALL} --data cats --iters 7 --log-every 2 --deluxe --diffaug --loss wgan --critic-iters 3"
    for _ in range(2):
        dcgan.train(*dcgan.options(flags.split()))
    run, second = sorted(Path("out").iterdir())
    assert second.name == run.name + "-2" and "deluxe_diffaug_loss_wgan_" in run.name
    assert files(run) == FILES and files(run / "samples") == [f"00000{i}.png" for i in (2, 4, 6, 7)]
    reals, train_Gs = zip(*seen[:7])  # each batch has its own of the 6 images, some of them flipped
    assert train_Gs == (False, False, True, False, False, True, False) and moved[:2] == [9 / 13, 9 / 16]
    assert len({f"{x.mean():.3f}" for x in torch.cat(reals)}) == 6 < len(torch.cat(reals).unique(dim=0))
    head, *rows = [line.split(",") for line in (run / "log.csv").read_text().splitlines()]
    assert sorted(head) == ["D(fake)", "D(real)", "D_fake", "D_real", "G", "images/s", "iteration"]
    assert [row[0] for row in rows] == [*"2467"] and {len(row) for row in rows} == {7}
    assert [row[head.index("G")] != "" for row in rows] == [False, True, True, False]  # where it has a step
    saved = data.load_checkpoint(run, "dcgan")
    assert saved["D"]["0.weight"].abs().max() <= 0.01
    assert "square_avg" in saved["optim_G"]["state"][0] and "square_avg" in saved["optim_D"]["state"][0]
    first, *lines = capfd.readouterr().out.splitlines()
    assert re.search("6 images .* 32 px, on cpu, deluxe flip, diffaug translation", first)
    assert all(len(line) <= 120 for line in lines if "images/s" in line)
    assert [options(f"--size 128 --loss {k}").critic_iters for k in ("lsgan", "wgan", "wgan-gp")] == [1, 5, 5]

@runs
def test_a_stopped_run_goes_on_bit_for_bit(program, flags, monkeypatch, capfd):
    """Seven iterations at once; or a signal in the third, another device and a power cut in the sixth."""
    ended = []
    def interrupted(images, size, k, *rest, batch=data.batch):
        for now in (0, 0.4, 2) if k == 2 and not ended else ():  # notebooks send a signal twice
            patch.setattr(data, "monotonic", lambda: now)
            os.kill(os.getpid(), signal.SIGTERM if "patch" in flags else signal.SIGINT)
        assert k < 5 and images.shape[3] == (35 if "zoom" in flags else 32), "a power cut"
        return batch(images, size, k, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(data, "batch", interrupted)
        patch.setattr(signal, "raise_signal", lambda number: ended.append(signal.getsignal(number)))
        with pytest.raises(SystemExit, match="130"):
            train(program, f"{flags} --iters 7", "b")
        assert ended == [signal.SIG_DFL]  # the third would have ended it at once
        assert f"go on with: python {data.shlex.quote(sys.argv[0])} --resume=b" in capfd.readouterr().err
        saved = data.load_checkpoint("b", program.__name__)
        for state in (*saved["optim_G"]["state"].values(), *saved["optim_D"]["state"].values()):
            state |= {name: value.contiguous() for name, value in state.items()}  # not channels-last
        data.save_checkpoint(saved, Path("b"))
        Path("b/log.csv").unlink()
        with pytest.raises(AssertionError, match="a power cut"):
            train(program, "", "b")
        assert data.load_checkpoint("b", program.__name__)["iteration"] == 4
    ends = train(program, "", "b"), train(program, f"{flags} --iters 7", "a")
    for end in ends:
        end |= {"program": 0, "options": 0, "rows": [{**row, "images/s": 0} for row in end["rows"]]}
    torch.testing.assert_close(*ends, rtol=0, atol=0)
    for file in ("timelapse.gif", *(f"samples/{name}" for name in files("a/samples"))):
        assert Path("a", file).read_bytes() == Path("b", file).read_bytes()

@pytest.mark.parametrize("program, ends", [(dcgan, [""]), (cyclegan, ["_XY", "_YX"])])
def test_networks_averages_images_and_noise_follow_from_the_seed(program, ends, monkeypatch):
    steps, step = [], program.step
    monkeypatch.setattr(program, "step", lambda *args: steps.append(
        [torch.rand(5), *(x.mean((1, 2, 3)) for x in args if torch.is_tensor(x))]) or step(*args))
    monkeypatch.setattr(program.time, "perf_counter", lambda: len(steps) / 2)  # a step takes half a second
    other = train(program, "--iters 1 --batch 5 --ema 0", "other")
    saved = train(program, "--iters 1 --batch 5 --seed 1")
    assert all(len(a) == 5 and not torch.equal(a, b) for a, b in zip(*steps))
    torch.manual_seed(1)
    for end, start in zip(ends, program.build(options("", program), CPU)):
        for name, weight in start.named_parameters():
            assert torch.equal(other["ema" + end][name], other["G" + end][name])  # without memory
            assert torch.allclose(saved["ema" + end][name], weight.lerp(saved["G" + end][name], 1 - 2 / 11))
    saved = train(program, "--iters 7 --log-every 3")
    assert [row["images/s"] for row in saved["rows"]] == [10] * 4 and len(files("run/samples")) == 5

def test_rates_averages_pools_and_what_a_second_stage_is_given_anew():
    rates = lambda saved, beta1=0.5: [group["lr"] for name in ("optim_G", "optim_D")
        for group in saved[name]["param_groups"] if group["betas"] == (beta1, 0.999)]
    saved = train(dcgan, "--iters 1 --g-lr 1e-5 --d-lr 1e-3 --ema 0 --deluxe --diffaug cutout")
    assert rates(saved) == [1e-5, 1e-3]
    assert torch.equal(saved["ema"]["1.running_mean"], saved["G"]["1.running_mean"])  # and all weights
    train(dcgan, "--iters 3 --g-lr 1e-6 --d-lr 1e-2 --beta1 0 --diffaug")
    saved = train(dcgan)  # finished: says so
    assert saved["iteration"] == 3 and rates(saved, 0) == [1e-6, 1e-2]
    assert saved["options"]["diffaug"] == "translation" and saved["options"]["deluxe"] == "crop,flip"
    for iters, part in ((2, 2 / 3), (6, 2 / 7)):  # --decay: in the second half
        saved = train(cyclegan, f"--decay --g-lr 3e-4 --d-lr 6e-4 --pool 20 --iters {iters}", f"{iters}")
        assert rates(saved) == pytest.approx([3e-4 * part, 6e-4 * part])
        assert len(saved["pool_X"]["images"]) == len(saved["pool_Y"]["images"]) == min(20, 4 * iters)
class Heart(Toy):  # a D that knows each third of the dark pictures that it trains on: 14, 10, 6, 2
    def forward(self, x):
        level = ((x.mean((1, 2, 3), keepdim=True) + 1) * 127.5).round()
        return self.w * ((level < 16) & (level % 4 == 2)) + 0 * level

def test_hold_out_shows_whether_D_knows_its_images_by_heart(monkeypatch):
    for i in range(16):
        data.save_png(Image.new("L", (32, 32), 15 - i), f"dark/{i:02}.png")
    flags = "--data dark --hold-out 4 --d-lr 1e-9 --dtype fp32"
    often, once = [train(dcgan, f"{flags} --spectral-norm --iters 6 --log-every {n}", n) for n in "16"]
    assert same(often["D"], once["D"])  # a look changes nothing
    dcgan.sample(*dcgan.options(["--sample", "1"]))  # grey, so the brightest is the nearest
    assert Image.open("1/generated/nearest.png").getpixel((9, 50)) == (14, 14, 14)  # 15 is held out
    with pytest.raises(data.BadInput, match="images have changed"):
        train(dcgan, "--data toy-blue --iters 9", "1")
    monkeypatch.setattr(dcgan, "build", lambda args, device: [dcgan.Generator(32, 4), Heart("D", 1.0)])
    row = train(dcgan, flags)["rows"][0]
    scores = [row[f"D({name})"] for name in ("real", "trained", "unseen", "generated")]
    assert scores == pytest.approx([0.5, 1, 0, 0], abs=1e-6)  # real: two of a batch of four
    assert dcgan.score_as_they_are(lambda x: 0 * x[:, 0, 0, 0] + len(x), torch.zeros(50, 3, 32, 32),
                                   options("--batch 12")) == pytest.approx(12.52)  # 13, 13, 12, 12: none of 2

@pytest.mark.parametrize("part", ["losses['D_fake']", "G[0].weight.data", "G[1].running_var"])
def test_what_is_not_finite_stops_the_run_before_a_checkpoint(part, monkeypatch):
    def spoiled(G, *args, step=dcgan.step):
        losses = step(G, *args)
        eval(part).fill_(torch.inf)
        return losses
    monkeypatch.setattr(dcgan, "step", spoiled)
    with pytest.raises(data.BadInput, match="not finite at iteration 2"):
        train(dcgan, "--iters 9 --log-every 9")
    assert files("run") == []

def test_a_checkpoint_is_whole_and_can_not_run_code(monkeypatch):
    """A failed write leaves the old file; a flipped bit, unseen by torch, and code are refused."""
    path, numbers = Path("cats/ckpt.pt"), torch.arange(999.)
    good = {"program": "dcgan", "options": {}, "iteration": 7, "rows": [], "recent": [], "numbers": numbers}
    data.save_checkpoint(good, path.parent)
    with monkeypatch.context() as patch, pytest.raises(data.BadInput, match="can't write .*No space"):
        patch.setattr(os, "fsync", lambda file: exec("raise OSError(28, 'No space left')"))
        data.save_checkpoint({**good, "iteration": 8}, path.parent)
    assert data.load_checkpoint("cats", "dcgan")["iteration"] == 7 and len(files("cats")) == 7
    raw = bytearray(path.read_bytes())
    raw[raw.index(numbers.numpy().tobytes()) + 100] ^= 1  # torch.load does not see it
    path.write_bytes(raw)
    for bad in ({**good, "rows": Path("no tensor, and no plain value")}, {"program": "dcgan"}, [1], None):
        with pytest.raises(data.BadInput, match="damaged"):
            data.load_checkpoint("cats", "dcgan")
        torch.save(bad, path)

def test_what_is_for_show_ends_no_run_and_comes_after_the_checkpoint(monkeypatch, capfd):
    with monkeypatch.context() as patch:
        patch.setattr(data, "save_png", None)
        train(dcgan, "--iters 4 --sample-every 4")
        assert capfd.readouterr().err.count("not written: TypeError: ") == 2  # losses, and a sheet
        patch.setattr(data, "status", None)
        with pytest.raises(TypeError):
            train(dcgan, "--iters 6 --log-every 6")
    assert data.load_checkpoint("run", "dcgan")["iteration"] == 6
    for iteration, size in ((999_900, 8), (1_000_000, 16), (20, 8)):  # by number, not by letter; two sizes
        data.save_sheet(torch.full((1, 3, size, size), iteration / 1e6 - 1), Path("run"), iteration)
    Path("run/samples/1 copy.png").write_text("of a file manager")
    data.save_views([{"iteration": 1, "G": 0.5, "D(real)": 1}, {"iteration": 2, "G": 0.4}], Path("run"), True)
    movie = Image.open("run/timelapse.gif")
    assert movie.size == Image.open("run/samples/1000000.png").size and movie.n_frames == 3
    assert Path("run/log.csv").read_text() == "iteration,G,D(real)\n1,0.5,1\n2,0.4,\n"

@pytest.mark.parametrize("sink", ["> /dev/full"] * os.path.exists("/dev/full") + [">&-", "| true"])
def test_a_run_whose_output_nobody_can_take_goes_on(sink):  # true closes the pipe
    line = f"'{sys.executable}' '{HERE}/dcgan.py' {' '.join(command(dcgan))} {sink}"
    env = os.environ | {"RANK": "1", "WORLD_SIZE": "3"}  # not torchrun's: this is one process
    ended = subprocess.run(["bash", "-o", "pipefail", "-c", line], stderr=subprocess.PIPE, text=True, env=env)
    assert ended.returncode == 0 and "rror" not in ended.stderr and files("run") == FILES

def test_a_stopped_run_says_how_to_go_on(monkeypatch, capfd):
    monkeypatch.setattr(data, "WORLD", 2)
    Path("my run").mkdir()  # as good as a new one, as it is empty
    with pytest.raises(SystemExit, match="130"):
        data.end(data.new_folder("my run", ""), 1, options("--device cpu"))
    assert re.search("torchrun --nproc_per_node=2 .* --resume='my run' --device=cpu$", capfd.readouterr().err)

def test_names_are_cut_and_shown_on_any_terminal_and_places_are_for_the_user_to_say(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert options("--out=~/run --data ~/cats").out == "/home/me/run"
    name = options(f"--X {'ä' * 90} --Y {'b' * 90} --patch --cycle", cyclegan).name
    assert name.startswith("cyclegan") and len(name.encode()) <= 250
    with open("terminal", "w", encoding="cp1252") as terminal:
        data.say("猫 \udcff é", terminal)
    assert Path("terminal").read_text("cp1252").split() == ["\\u732b", "\\udcff", "é"]
    stranger = train(dcgan)
    stranger["options"] |= {"out": "/etc", "resume": "/etc", "device": "elsewhere", "sample": "/etc"}
    data.save_checkpoint(stranger, Path("run"))
    args = dcgan.options(["--sample", "run"])[0]
    assert (args.out, args.resume, args.device, args.sample) == (None, None, "auto", "run")

@pytest.mark.parametrize("error, end", [
    (OSError("of a learner's change"), OSError), (NotImplementedError(), NotImplementedError),
    (RuntimeError("shapes"), RuntimeError), (MemoryError(), SystemExit),
    (data.BadInput("x"), SystemExit), (RuntimeError("DefaultCPUAllocator: not enough memory"), SystemExit)])
def test_a_mistake_in_the_code_keeps_its_traceback(error, end):
    with pytest.raises(end), data.one_line_errors():
        raise error
BAD_INPUT = """dcgan --data run/samples --out run: another --out | dcgan --data run: no usable image in run
dcgan --data run/samples --hold-out 1: --hold-out | cyclegan --X run/samples --Y nowhere: nowhere is no
dcgan --data run/samples --out newer.zip/new: can't make | dcgan --loss wgan-gp --minibatch-std: image alone
dcgan --resume changed --iters 9: does not fit | cyclegan --resume run: no run of this cyclegan.py
dcgan --data run/samples --width 60000: lower --size | cyclegan --cycle --lambda-cycle nan: --lambda-cycle
dcgan --diffaug colour: 'colour' among color, | cyclegan --input empty: go together | dcgan --out=: empty path
dcgan --device cuda:99: --device cuda:99 | cyclegan --X run/samples: --X and --Y | dcgan --g-target 9: -1 to 2
dcgan --loss wgan-gp --d-norm batch: --d-norm | dcgan --data newer.zip: whole .zip | data preview : empty path
dcgan --data broken/ckpt.pt: whole .zip | dcgan --smooth 0.9 0.2: LO <= HI | dcgan --device gpu: --device gpu
dcgan --data nowhere: nowhere is no | dcgan --data empty: no usable image in empty | dcgan --data=: empty path
cyclegan --lambda-cycle 3: needs --cycle | dcgan --resume nowhere: no checkpoint | cyclegan --pool 3: --pool
dcgan --sample changed: does not fit | dcgan --width 1: --width and --z 2 | dcgan --beta1 1: --beta1
dcgan --sample run --hold-out 9: hold_out | dcgan --resume run --width 8: width | dcgan --resume=: empty path
dcgan --g-lr nan: between 0 and 1 | dcgan --resume run --out new: leave --out | cyclegan --batch 0: at least 1
dcgan --resume folder: directory | cyclegan --deluxe flip,: no '' among | data fetch apple2orange: choose from
dcgan --sample=: empty path | cyclegan --blocks -1: --blocks | dcgan --resume broken: damaged
cyclegan --translate nowhere --input empty: no checkpoint | data preview --diffaug run: a folder goes first"""
@pytest.mark.parametrize("case", re.split(r"\n| \| ", BAD_INPUT.strip("\n")))
def test_bad_input_gets_one_line_and_writes_nothing(case, capfd):
    program, line, words = re.fullmatch("(.+?) (.*): (.*)", case).groups()
    program, saved = sys.modules[program], train(dcgan)
    for name in ("empty", "broken", "changed", "folder/ckpt.pt"):
        Path(name).mkdir(parents=True)
    Path("broken/ckpt.pt").write_bytes(b"PK\3\4 nothing")
    Path("newer.zip").write_bytes(b"PK\1\2\0\0\xff\0" + bytes(38) + b"PK\5\6\0\0\0\0\1\0\1\0." + bytes(9))
    saved["G"]["99.weight"] = saved["ema"]["99.weight"] = torch.zeros(1)  # as of one with more layers
    torch.save(saved, "changed/ckpt.pt")
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    with pytest.raises(SystemExit, match="2"), data.one_line_errors():
        if program is data:
            data.main(line.split(" "))
        args, checkpoint = program.options(f"{'' if '--resume' in line else SMALL} {line}".split())
        (dcgan.sample if "--sample" in line else program.train)(args, checkpoint)
    error, = [line for line in capfd.readouterr().err.splitlines() if "left out" not in line]
    assert len(error) <= 300
    assert words in error and before == {path: path.stat().st_mtime_ns for path in Path().rglob("*")}

def test_samples_are_of_the_averaged_network_and_walk_on_the_sphere():
    saved = train(dcgan, "--z 5 --g-lr .1 --dtype fp32 --batch 3 --hold-out 3 --seed 2")
    z, png = torch.randn(64, 5, 1, 1, generator=torch.Generator().manual_seed(2)), "run/samples/000002.png"
    for name, shown in (("ema", True), ("G", False)):
        images = load(saved, name)(z)
        assert alike(pixels(png, 0, 0), images[0]) == alike(pixels(png, 1, 1), images[9]) == shown
    for source in ("cats", "cats/0.png", "cats/0.png --out few"):  # also without the training images
        dcgan.sample(*dcgan.options(f"--sample run --n 10 --seed 3 --data {source}".split()))
    assert files("run/generated-2") == files("few") == ["grid.png", "images", "walk.gif", "walk.png"]
    assert files("run/generated") == ["grid.png", "images", "nearest.png", "walk.gif", "walk.png"]
    sizes = [Image.open(f"run/generated/{name}").size for name in ("grid.png", "nearest.png", "walk.gif")]
    assert sizes == [(8 * 34 + 2, 2 * 34 + 2), (8 * 34 + 2, 2 * 66 + 2), (6 * 34 + 2, 36)]
    assert Image.open("run/generated/walk.gif").n_frames == 16 and len(files("run/generated/images")) == 10
    images = load(saved, "ema")(torch.randn(16, 5, 1, 1, generator=torch.Generator().manual_seed(3)))
    assert alike(pixels("run/generated/images/00009.png"), images[9])
    assert alike(pixels("run/generated/walk.png", 0), images[10])
    images = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)
    mirrored = images[2:3].flip(3) / 127.5 - 1
    assert torch.allclose(dcgan.nearest(mirrored, images), mirrored)
    a, b = F.normalize(torch.randn(2, 3, 5, 1, 1), dim=2)
    walk = torch.stack([dcgan.slerp(a, b, t / 4) for t in range(5)])
    assert torch.allclose(walk.norm(dim=2), torch.ones(1)) and torch.allclose(walk[::4], torch.stack([a, b]))

@both
@pytest.mark.parametrize("dtype, has, bf16", [("auto", 1, 1), ("auto", 0, 0), ("bf16", 0, 1), ("fp32", 1, 0)])
def test_auto_precision_is_bf16_where_the_hardware_has_it(program, dtype, has, bf16, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bool(has)}, raising=False)
    with program.setup(options(f"--dtype {dtype}", program))[1]:
        assert (torch.mm(torch.ones(1, 1), torch.ones(1, 1)).dtype == torch.bfloat16) == bf16

@pytest.mark.parametrize("program", [dcgan, cyclegan, data, diffaug])
def test_the_source_keeps_its_shape_and_the_help_fits_a_terminal(program, capfd):
    source = Path(program.__file__).read_text()
    allowed = {"torch", "torchvision", "PIL", "numpy", "data", "diffaug"} | sys.stdlib_module_names
    assert set(re.findall(r"^(?:import|from) (\w+)", source, re.M)) <= allowed
    assert not re.search(r".{111}|^ *assert ", source, re.M)  # too wide a line; what python -O would skip
    if program is not diffaug:
        with pytest.raises(SystemExit):
            (program.main if program is data else program.options)(["--help"])
        assert not re.search(".{101}", capfd.readouterr().out)
# ---- CycleGAN ----
@pytest.mark.parametrize("flags, cycle, identity, pull_cycle, pull_identity, calls", [
    ("--identity 0", None, None, 0, 0, 1), ("--identity 0 --cycle", 0.2, None, 2 * 2, 0, 2),
    ("--identity 0 --cycle l2 --lambda-cycle 5", 0.04, None, 5 * 2 * 0.4, 0, 2),
    ("--identity 3 --cycle --diffaug cutout", 0.2, 0.4, 2 * 2, 3, 2)])
def test_cyclegan_losses_by_hand(flags, cycle, identity, pull_cycle, pull_identity, calls, monkeypatch):
    """x = 0.2, y = 0.5, G_XY adds 0.1, G_YX takes 0.3 off; what D sees is augmented as above."""
    seen = []
    monkeypatch.setattr(diffaug, "augment", lambda x, policy: seen.extend([policy] * len(x)) or x - 0.25)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda weights, most: next(weights).grad.mul_(2 * most))
    nets, args = [Toy("G", 0.1), Toy("G", -0.3), Toy("D", 1.0), Toy("D", 1.0)], options(flags, cyclegan)
    x, y = torch.full((2, 3, 32, 32), 0.2), torch.full((2, 3, 32, 32), 0.5)
    losses = cyclegan.step(*nets, IDLE, IDLE, x, y, [cyclegan.Pool(0)] * 2, args, nullcontext())
    expected = {"D_X": 0.8 ** 2 + 0.2 ** 2, "D_Y": 0.5 ** 2 + 0.3 ** 2, "G_XY": 0.7 ** 2, "G_YX": 0.8 ** 2,
                "cycle_X": cycle, "cycle_Y": cycle, "identity": identity,
                "D_X(real)": 0.2, "D_X(fake)": 0.2, "D_Y(real)": 0.5, "D_Y(fake)": 0.3}
    expected = {name: value for name, value in expected.items() if value is not None}  # no cycle, no column
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected)
    assert [net.w.grad.item() for net in nets] == pytest.approx([  # D's: of its own step alone, and "clipped"
        -1.4 - pull_cycle + pull_identity, -1.6 - pull_cycle - pull_identity, 2 * 0.06, 2 * -0.22])
    assert [len(G.calls) for G in nets[:2]] == 2 * [calls] and seen == ["cutout" * ("cutout" in flags)] * 12

def test_pool_keeps_half_and_returns_old_fakes():
    pool, image = cyclegan.Pool(50), lambda value, n: torch.full((n, 3, 2, 2), float(value))
    for i in range(5):
        assert torch.equal(pool.swap(image(i, 10)), image(i, 10))  # as long as it fills, everything passes
    returned = torch.cat([pool.swap(image(9, 10)) for _ in range(20)])[:, 0, 0, 0]
    assert 40 < (returned != 9).sum() < 50.5 and set(returned.tolist()) == {0, 1, 2, 3, 4, 9}
    assert len(pool.images) == 50 and torch.equal(cyclegan.Pool(0).swap(image(1, 3)), image(1, 3))

def test_cyclegan_loop_hands_each_part_its_own(monkeypatch):
    monkeypatch.setattr(data, "DRAWN", {name: numbers[:5] for name, numbers in data.DRAWN.items()})
    monkeypatch.setitem(data.DELUXE, "crop", lambda x, size: x[:, :, 2:34, 2:34])  # the middle
    seen, sets, step = [], ("toy-blue", "toy-grumpy"), cyclegan.step
    monkeypatch.setattr(cyclegan, "step", lambda *args: seen.append(args[6:8]) or step(*args))
    saved = train(cyclegan, "--X toy-blue --Y toy-grumpy --g-lr .1 --deluxe crop")
    torch.manual_seed(0)
    for name, start in zip(("G_XY", "G_YX", "D_X", "D_Y"), cyclegan.build(options("", cyclegan), CPU)):
        assert not same(saved[name], start.state_dict())  # all are trained
    known = [data.load_images(name, 35)[:, :, 2:34, 2:34] / 127.5 - 1 for name in sets]
    found = [torch.isclose(torch.cat(images)[:, None], cats, atol=1e-5).flatten(2).all(2)
             for images, cats in zip(zip(*seen), known)]
    assert all(some.any(0).all() and some.any(1).all() for some in found)  # all five, and no others
    assert not torch.equal(*found)  # a permutation for each
    G_XY, G_YX, x, y = load(saved, "ema_XY"), load(saved, "ema_YX"), known[0][:1], known[1][:1]
    for row, image in enumerate((x, G_XY(x), G_YX(G_XY(x)), y, G_YX(y), G_XY(G_YX(y)))):
        assert alike(pixels("run/samples/000002.png", row), image)
    x, y = [torch.cat([cat for _, cat in cyclegan.read_pictures(name, 32)]) for name in sets]
    expected = (F.l1_loss(G_XY(x), y) + F.l1_loss(G_YX(y), x)) / 2
    assert saved["rows"][1]["truth_error"] == pytest.approx(expected.item(), rel=1e-3)
    assert not {"truth_error", "cycle_X"} & train(cyclegan, "", "other")["rows"][0].keys()

@pytest.mark.parametrize("to, name", [("X", "ema_YX"), ("Y", "ema_XY")])
def test_translations_have_the_names_and_proportions_of_their_inputs(to, name):
    four = {"s/été 1.png": Image.new("RGB", (300, 101), "red"), "./s/été 1.gif": Image.new("L", (30, 90)),
            "ä" * 150 + "a.png": Image.new("L", (50, 50)), "ä" * 150 + "b.png": Image.new("L", (50, 50))}
    with zipfile.ZipFile("photos.zip", "w") as archive:
        for path, picture in four.items():
            with archive.open(path, "w") as file:
                picture.save(file, path[-3:])
    G = load(train(cyclegan, "--g-lr 0.1"), name)
    for source in ("photos.zip", "toy-blue", "toy-blue --out blue"):
        cyclegan.translate(*cyclegan.options(f"--translate run --input {source} --to {to}".split()))
    results = {path.name: pixels(path) for path in Path(f"run/translated_to_{to}").iterdir()}
    assert len(results) == 4 and len(files(f"run/translated_to_{to}-2")) == len(files("blue")) == 16
    red = torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1).expand(1, 3, 32, 96)  # padded with its own border
    assert results["été 1.png"].shape[2:] == (96, 32) and alike(results["été 1-2.png"], G(red)[..., :95])
SPY = """import sys, torch, {0}
def spy(*args, step={0}.step):
    losses = step(*args)
    images = next(part for part in args if isinstance(part, torch.Tensor))
    weights = [p.sum() for part in args if isinstance(part, torch.nn.Module) for p in part.parameters()]
    told, mine = [0, 0], [part.sum().item() for part in (images, torch.rand(9), torch.stack(weights))]
    torch.distributed.all_gather_object(told, mine)
    assert [a == b for a, b in zip(*told)] == [False, False, True]
    return losses
{0}.step = spy
{0}.train(*{0}.options(sys.argv[1:]))
"""

@both
def test_two_processes_draw_their_own_take_the_same_steps_and_one_speaks(program):
    Path("spy.py").write_text(SPY.format(program.__name__))
    argv = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node 2 spy.py".split(),
            *command(program, "--diffaug --iters 3")]
    result = subprocess.run(argv, text=True, capture_output=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("finished") == 1 and result.stdout.count("3/3") == 1 and files("run") == FILES
