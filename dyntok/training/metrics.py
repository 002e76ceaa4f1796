"""Measures of pictures, features and lengths, as plain functions.

Not here: running a tokenizer (`evaluate.py`), a classifier's view (`classifier.py`), semantics (`probe.py`), the
perplexity of codes (`dyntok/model/codebook.py`).
"""

import io
import math
from collections.abc import Sequence

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dyntok.errors import MissingDependencyError

try:
    from scipy.stats import spearmanr
    from skimage.metrics import structural_similarity
except ImportError as error:
    raise MissingDependencyError.of("scikit-image", "train") from error

JPEG_QUALITY = 75
SSIM_WINDOW = 11  # pixels


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """Returns the peak signal-to-noise ratio of each image in dB, at most 100. Both [B, 3, H, W] in [0, 1] -> [B]."""
    error = (images.double() - originals.double()).square().mean((1, 2, 3))
    return -10 * error.clamp(min=1e-10).log10()


def ssim(images: Tensor, originals: Tensor) -> list[float]:
    """Returns the structural similarity of each image, -1 to 1, as the mean of the three channels.

    It uses the Gaussian window (sigma 1.5) of Wang et al. (2004). Both [B, 3, H, W] in [0, 1], H and W at least
    `SSIM_WINDOW`.
    """
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    pairs = zip(images.cpu().numpy(), originals.cpu().numpy(), strict=True)
    return [
        float(structural_similarity(image, original, channel_axis=0, data_range=1.0, **window))
        for image, original in pairs
    ]


def patch_cosine(features: Tensor, target: Tensor) -> Tensor:
    """Returns the cosine of the two, mean over an image's patches. Both [B, N, D] -> [B], -1 to 1."""
    return F.cosine_similarity(features.float(), target.float(), dim=-1).mean(1)


def jpeg_bytes(image: Image.Image) -> int:
    """Returns the size of an image as a JPEG of quality 75, a simple measure of its detail."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.tell()


def bits_per_pixel(tokens: float, codebook_size: int, pixels: float) -> float:
    """Returns the bits per pixel of codes of equal length, log2 K bits each.

    Positions are not counted; as a bit mask they take N bits more.
    """
    return tokens * math.log2(codebook_size) / pixels


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Returns Spearman's rank correlation, -1 to 1; None if one of the two does not vary."""
    if len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return float(spearmanr(a, b).statistic)
