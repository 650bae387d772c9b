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
    return x.new_empty(len(x), 1, 1, 1).uniform_(low, high)

def brightness(x):
    return x + uniform(x, -0.5, 0.5)

def saturation(x):
    return torch.lerp(x.mean(dim=1, keepdim=True), x, uniform(x, 0, 2))  # grey + factor * (x - grey)

def contrast(x):
    return torch.lerp(x.mean(dim=(1, 2, 3), keepdim=True), x, uniform(x, 0.5, 1.5))

def window(x, size):
    """A window of size x size pixels, at a random place in each image: [B, C, size, size]."""
    B, C, side, _ = x.shape
    starts = torch.randint(side - size + 1, (2, B, 1), device=x.device)
    rows, columns = torch.arange(size, device=x.device) + starts  # each [B, size]
    pixels = rows[:, :, None] * side + columns[:, None, :]  # [B, size, size]: where in the flat image
    return x.flatten(2).gather(2, pixels.view(B, 1, -1).expand(-1, C, -1)).view(B, C, size, size)

def translation(x):
    """Shift by up to an eighth of the side each way. What comes in from outside is 0, mid-grey."""
    size = x.shape[-1]
    return window(F.pad(x, [int(0.125 * size + 0.5)] * 4), size)

def cutout(x):
    """Set a square of half the side to 0. Up to half of its height and width can lie outside the image."""
    size = x.shape[-1]
    hole = int(0.5 * size + 0.5)
    mask = F.pad(x.new_zeros(len(x), 1, hole, hole), [size - (hole + 1) // 2] * 4, value=1)
    return x * window(mask, size)

POLICIES = {"color": (brightness, saturation, contrast), "translation": (translation,), "cutout": (cutout,)}

def augment(x, policy):
    """Apply a policy such as "color,translation,cutout" from left to right, to float images [B, C, H, H] in
    [-1, 1]. Each image gets its own random numbers, new ones at every call."""
    for name in policy.split(",") if policy else ():
        for function in POLICIES[name]:
            x = function(x)
    return x
