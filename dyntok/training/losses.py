"""The losses of training, as plain functions of tensors."""

import torch
import torch.nn.functional as F
from torch import Tensor


def feature_cosine(features: Tensor, target: Tensor) -> Tensor:
    """Returns the mean over patches of 1 - cosine (LaVIT, section 3.1). No gradient flows into the target.

    features, target: [B, N, D] -> scalar in 0..2.
    """
    return (1 - F.cosine_similarity(features.float(), target.detach().float(), dim=-1)).mean()


def rate(mean_keep: Tensor, rho: float) -> Tensor:
    """Returns (rho - mean keep)^2 (LaVIT, section 3.1).

    mean_keep: scalar, the mean over all patches of the batch. A mean per image would make all lengths equal.
    """
    return (rho - mean_keep).square()


def commitment(z: Tensor, rows: Tensor) -> Tensor:
    """Returns the squared distance of normalized vectors to their codebook rows (VQ-VAE, arXiv 1711.00937).

    No gradient flows into the rows.

    z, rows: [T, C] -> scalar: sum over C, mean over T.
    """
    return (z - rows.detach()).square().sum(-1).mean()


def patch_error(pixels: Tensor, target: Tensor, patch_size: int) -> Tensor:
    """Returns the mean squared error of each patch. Both [B, 3, H, W] -> [B, N], raster order."""
    return F.avg_pool2d((pixels - target).square().mean(1, keepdim=True), patch_size).flatten(1)


def low_frequency(pixels: Tensor, target: Tensor) -> Tensor:
    """Returns the mean squared error of the means over 4 x 4 pixels. Both [B, 3, H, W] -> scalar."""
    return F.avg_pool2d(pixels - target, 4).square().mean()


def perceptual(maps: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Returns the distance of feature maps of a fixed network, each position normalized over its channels.

    This is LPIPS (arXiv 1801.03924) without its learned channel weights. Lists of [B, D, h, w] -> [B], the mean over
    maps and positions. Gradients flow into both.
    """
    return torch.stack([_normalized_distance(a, b).mean((1, 2, 3)) for a, b in zip(maps, targets, strict=True)]).mean(0)


def perceptual_per_patch(maps: list[Tensor], targets: list[Tensor], grid: tuple[int, int]) -> Tensor:
    """Does what `perceptual` does, for each patch of the grid: lists of [B, D, h, w] -> [B, N]."""
    distances = [F.adaptive_avg_pool2d(_normalized_distance(a, b), grid) for a, b in zip(maps, targets, strict=True)]
    return torch.stack(distances).mean(0).flatten(1)


def centered_cosine(features: Tensor, targets: Tensor) -> Tensor:
    """Returns 1 - cosine of feature vectors, after subtracting the targets' mean over the batch.

    Only what distinguishes the pictures of a batch counts. Both [B, D] -> [B] in 0..2. No gradient flows into the
    targets.
    """
    targets = targets.detach().float()
    center = targets.mean(0)
    return 1 - F.cosine_similarity(features.float() - center, targets - center, dim=-1)


def similarities(vectors: Tensor, targets: Tensor, other_vectors: Tensor, other_targets: Tensor) -> Tensor:
    """Returns 1 - correlation of the similarities of images to other images, by their vectors and by the targets.

    Images that the targets call alike get similar vectors (similarity-preserving distillation, arXiv 1907.09682). A
    similarity is the cosine of two images' vectors, each component scaled to mean 0 and deviation 1 over the others and
    clamped to -10..10, so that one that is constant over the others does not outweigh the rest. Computed in float32.

    vectors [B, C], targets [B, D], of the others [M, C] and [M, D] -> scalar in 0..2. Gradients flow into `vectors`
    alone.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        found = _cosines(vectors.float(), other_vectors.detach().float()).flatten()
        wanted = _cosines(targets.detach().float(), other_targets.detach().float()).flatten()
    return 1 - F.cosine_similarity(found - found.mean(), wanted - wanted.mean(), dim=0)


def _cosines(vectors: Tensor, others: Tensor) -> Tensor:
    mean, std = others.mean(0), others.std(0, correction=0) + 1e-4
    a, b = (F.normalize(((x - mean) / std).clamp(-10, 10), dim=1, eps=1e-4) for x in (vectors, others))
    return a @ b.T  # [B, M]


def _normalized_distance(a: Tensor, b: Tensor) -> Tensor:
    a, b = (F.normalize(x.float(), dim=1, eps=1e-4) for x in (a, b))
    return (a - b).square().sum(1, keepdim=True)  # [B, 1, h, w]


def around(error: Tensor, grid: tuple[int, int]) -> Tensor:
    """Returns the mean over each patch and its neighbors, because a kept patch helps them, too. [B, N] -> [B, N]"""
    return F.avg_pool2d(error.unflatten(1, grid)[:, None], 3, stride=1, padding=1, count_include_pad=False).flatten(1)


def local(score: Tensor, error: Tensor, logits_per_nat: float = 2.5) -> Tensor:
    """Returns the mean squared distance of scores to the log error that random or lattice masks leave around a patch.

    Patches are kept more densely where a picture is hard to fill in. Both are centered over the batch, because the rate
    loss decides how many patches are kept in all.

    score: [B, N], in logits.
    error: [B, N], positive. No gradient flows into it.
    logits_per_nat: how steeply the scores follow.
    """
    wanted = (error / error.mean()).clamp(min=0.03).log().detach()
    return ((score - score.mean()) - logits_per_nat * (wanted - wanted.mean())).square().mean()
