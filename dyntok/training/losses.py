"""The losses, as plain functions of tensors."""

import torch
import torch.nn.functional as F
from torch import Tensor


def feature_cosine(features: Tensor, target: Tensor) -> Tensor:
    """Mean over patches of 1 - cosine (LaVIT, section 3.1). features, target: [B, N, D] -> scalar in 0..2."""
    return (1 - F.cosine_similarity(features.float(), target.float(), dim=-1)).mean()


def rate(gate: Tensor, rho: float) -> Tensor:
    """(rho - mean keep)^2 (LaVIT, section 3.1), the mean taken over the whole batch, so that images may differ. gate: [B, N] -> scalar."""
    return (rho - gate.mean()).square()


def commitment(z: Tensor, rows: Tensor) -> Tensor:
    """Squared distance from normalised vectors to their codebook rows, which get no gradient (VQ-VAE, arXiv 1711.00937).

    z, rows: [T, C] -> scalar: sum over C, mean over T.
    """
    return (z - rows.detach()).square().sum(-1).mean()


def patch_error(pixels: Tensor, target: Tensor, patch_size: int) -> Tensor:
    """Mean squared error of every patch. [B, 3, H, W] twice -> [B, N], raster order."""
    return F.avg_pool2d((pixels - target).square().mean(1, keepdim=True), patch_size).flatten(1)


def perceptual(maps: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Distance of feature maps of a fixed network, each position normalised over its channels (as LPIPS, arXiv 1801.03924, without its
    learned channel weights). Lists of [B, D, h, w] -> scalar: mean over maps and positions.
    """
    distances = [_normalised_distance(a, b).mean() for a, b in zip(maps, targets, strict=True)]
    return torch.stack(distances).mean()


def perceptual_per_patch(maps: list[Tensor], targets: list[Tensor], grid: tuple[int, int]) -> Tensor:
    """The same distance, per patch of the grid: lists of [B, D, h, w] -> [B, N]."""
    distances = [F.adaptive_avg_pool2d(_normalised_distance(a, b), grid) for a, b in zip(maps, targets, strict=True)]
    return torch.stack(distances).mean(0).flatten(1)


def _normalised_distance(a: Tensor, b: Tensor) -> Tensor:
    a, b = (F.normalize(x.float(), dim=1, eps=1e-4) for x in (a, b))
    return (a - b).square().sum(1, keepdim=True)  # [B, 1, h, w]


def local_choice(log_probs: Tensor, gain: Tensor) -> Tensor:
    """Minus the expected gain of keeping: gives each patch's keep probability the direction of its own estimated benefit.

    log_probs: [B, N, 2], index 0 = keep; gain: [B, N], the error that keeping the patch saves; no gradient flows into it.
    """
    return -(log_probs[..., 0].exp() * gain.detach()).mean()
