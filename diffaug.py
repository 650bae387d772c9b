"""DiffAugment: differentiable augmentation for GANs with few images (Zhao et al. 2020, arXiv:2006.10738).

With 200 real images D soon knows each by heart, and what it then tells G is worthless. Augmenting the
real images alone helps, but leaks: where they have odd colours, G learns to draw odd colours. DiffAugment
augments everything that D looks at, real and fake, in D's step and in G's. So G has no reason to imitate
it. In G's step the gradient comes back through the augmentation: hence "differentiable".
"""
import torch
import torch.nn.functional as F

def uniform(x, low, high):
    """One number per image, from U(low, high): [B, 1, 1, 1]."""
    return torch.empty(len(x), 1, 1, 1, dtype=x.dtype, device=x.device).uniform_(low, high)

def integers(x, low, high):
    """One integer per image, from low to high, both included: int64 [B, 1]."""
    return torch.randint(low, high + 1, (len(x), 1), device=x.device)

def brightness(x):
    return x + uniform(x, -0.5, 0.5)

def saturation(x):
    return torch.lerp(x.mean(dim=1, keepdim=True), x, uniform(x, 0, 2))  # grey + factor * (x - grey)

def contrast(x):
    return torch.lerp(x.mean(dim=(1, 2, 3), keepdim=True), x, uniform(x, 0.5, 1.5))

def window(x, size):
    """A window of size x size pixels, at a random place in each image: [B, C, size, size]."""
    B, C, height, width = x.shape
    rows = torch.arange(size, device=x.device) + integers(x, 0, height - size)  # [B, size]
    columns = torch.arange(size, device=x.device) + integers(x, 0, width - size)
    pixels = rows[:, :, None] * width + columns[:, None, :]  # [B, size, size]: where in the flat image
    return x.flatten(2).gather(2, pixels.view(B, 1, -1).expand(-1, C, -1)).view(B, C, size, size)

def translation(x, ratio=0.125):
    """Shift square images by up to ratio of the side each way. What comes in from outside is 0, mid-grey."""
    size = x.shape[-1]
    return window(F.pad(x, [int(ratio * size + 0.5)] * 4), size)

def cutout(x, ratio=0.5):
    """Set a square to 0. Its centre may be any pixel, so a part of it can lie outside the image."""
    H, W = x.shape[2:]
    h, w = int(ratio * H + 0.5), int(ratio * W + 0.5)
    # The centre of an even square is a corner between pixels. There is one more of these than pixels.
    top, left = integers(x, 0, H - h % 2) - h // 2, integers(x, 0, W - w % 2) - w // 2
    rows = torch.arange(H, device=x.device) - top  # [B, H]: 0 to h - 1 inside the square
    columns = torch.arange(W, device=x.device) - left
    inside_rows, inside_columns = (rows >= 0) & (rows < h), (columns >= 0) & (columns < w)
    return x * ~(inside_rows[:, None, :, None] & inside_columns[:, None, None, :])

POLICIES = {"color": (brightness, saturation, contrast), "translation": (translation,), "cutout": (cutout,)}

def augment(x, policy):
    """Apply a policy such as "color,translation,cutout" from left to right, to float images [B, C, H, W] in
    [-1, 1]. Each image gets its own random numbers, new ones at every call."""
    for name in policy.split(",") if policy else ():
        for function in POLICIES[name]:
            x = function(x)
    return x
