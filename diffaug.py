"""DiffAugment: differentiable augmentation for GANs that have few images (Zhao et al. 2020, arXiv:2006.10738).

With 200 real images D soon knows every one by heart, and what it then tells G is worthless. Augmenting the reals
alone does not cure this: D learns that real images have, say, odd colours, and G learns to draw odd colours. The
augmentation has leaked. DiffAugment augments everything that D looks at, real and fake, in D's step and in G's step.
D never sees an unaugmented image, so G need not imitate the augmentation: only clean images look right under all
of its draws. In G's step the gradient has to come back through it, hence "differentiable".

Each function takes float images [B, C, H, W] in [-1, 1] and returns the same shape. Every image gets its own draws,
fresh at every call, made on the images' device and without waiting for it.
"""
import os

import torch
import torch.nn.functional as F

# Under torchrun each of the WORLD processes has every WORLD-th image of a batch, and draws the numbers for all images to
# use its own: N processes with batches of b do what one does with a batch of N b, and share one random state.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def uniform(x, low, high):
    return low + (high - low) * torch.rand(WORLD * len(x), 1, 1, 1, dtype=x.dtype, device=x.device)[RANK::WORLD]


def integers(x, low, high):
    """One integer per image from low to high, both included: int64 [B, 1]."""
    return torch.randint(low, high + 1, (WORLD * len(x), 1), device=x.device)[RANK::WORLD]


def brightness(x):
    return x + uniform(x, -0.5, 0.5)


def saturation(x):
    return torch.lerp(x.mean(dim=1, keepdim=True), x, uniform(x, 0, 2))  # lerp: grey + factor * (x - grey)


def contrast(x):
    return torch.lerp(x.mean(dim=(1, 2, 3), keepdim=True), x, uniform(x, 0.5, 1.5))


def window(x, H, W):
    """A random H x W window of each image."""
    B, C, height, width = x.shape
    rows = torch.arange(H, device=x.device) + integers(x, 0, height - H)  # [B, H]: the rows to take
    cols = torch.arange(W, device=x.device) + integers(x, 0, width - W)
    pixels = (rows[:, None, :, None] * width + cols[:, None, None, :]).flatten(2)  # [B, 1, H * W]: where in the flat image
    return x.flatten(2).gather(2, pixels.expand(B, C, H * W)).view(B, C, H, W)


def translation(x, ratio=0.125):
    """Shift by up to ratio of the side each way. What comes in from outside is 0: mid-grey in [-1, 1]."""
    H, W = x.shape[2:]
    up, left = int(ratio * H + 0.5), int(ratio * W + 0.5)
    return window(F.pad(x, (left, left, up, up)), H, W)


def cutout(x, ratio=0.5):
    """Set a square to 0. Its centre may be any pixel, so it can stick out: the edge of the image gets hidden as well."""
    B, C, H, W = x.shape
    h, w = int(ratio * H + 0.5), int(ratio * W + 0.5)
    # An even square has no middle pixel: its centre is a corner between pixels, of which there is one more than pixels.
    top, left = integers(x, 0, H - h % 2) - h // 2, integers(x, 0, W - w % 2) - w // 2
    rows = torch.arange(H, device=x.device) - top  # [B, H]: 0 .. h-1 inside the square
    cols = torch.arange(W, device=x.device) - left
    hole = ((rows >= 0) & (rows < h))[:, None, :, None] & ((cols >= 0) & (cols < w))[:, None, None, :]
    return x * ~hole


POLICIES = {"color": (brightness, saturation, contrast), "translation": (translation,), "cutout": (cutout,)}


def augment(x, policy):
    """Apply e.g. "color,translation,cutout" from left to right. The empty policy returns x itself."""
    for name in policy.split(",") if policy else ():
        for function in POLICIES[name]:
            x = function(x)
    return x
