"""`encode(psnr=)`: the shortest sequence from which the decoder reaches a given quality.

Not here: other rules for the number of tokens (`policy.py`), and a report on many pictures (`training/evaluate.py`).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dyntok.config import ImageConfig
from dyntok.validation import counted

Reconstruct = Callable[[Tensor], Tensor]  # keep mask [B, N] -> normalized pixels [B, 3, H, W]


def shortest_mask(
    ranks: Tensor, pixels: Tensor, target: float, image: ImageConfig, most: int | None, reconstruct: Reconstruct
) -> Tensor:
    """Returns the smallest keep masks, bool [B, N], whose reconstructions reach `target` dB, found by bisection.

    The network decodes about log2(N) reconstructions of each image. Quality rises with the number of tokens except for
    small steps back, so that a mask with a few tokens fewer may exist. An image that does not reach the target keeps
    all its patches, or `most` of them.

    ranks: int64 [B, N], 0 for the patch that is kept first. pixels: normalized originals [B, 3, H, W].
    """
    limit = min(ranks.shape[1], most or ranks.shape[1])
    low, high = torch.ones(len(ranks), dtype=torch.long, device=ranks.device), torch.full_like(ranks[:, 0], limit)
    while bool((low < high).any()):
        middle = (low + high) // 2
        reached = visible_psnr(reconstruct(ranks < middle[:, None]), pixels, image) >= target
        searching = low < high
        high = torch.where(searching & reached, middle, high)
        low = torch.where(searching & ~reached, middle + 1, low)
    return ranks < high[:, None]


def missed_in_words(missed: int, images: int) -> str:
    """Returns the line that says how many of the images may not have reached the quality."""
    return f"{missed:,} of {counted(images, 'image')} may not reach the psnr, even with all the patches allowed"


def visible_psnr(decoded: Tensor, pixels: Tensor, image: ImageConfig) -> Tensor:
    """Returns the PSNR in dB, float [B], of normalized pixels [B, 3, H, W] after clipping to what a file can hold."""
    squared = (visible(decoded, image) - visible(pixels, image)).square()
    return -10 * squared.mean((1, 2, 3)).clamp(min=1e-10).log10()


def normalized(visible: Tensor, image: ImageConfig) -> Tensor:
    """Returns pictures [B, 3, H, W] from 0 to 1 as normalized pixels: what undoes `visible`, but for its clipping."""
    channels = zip(visible.unbind(1), image.std, image.mean, strict=True)
    return torch.stack([(channel - mean) / std for channel, std, mean in channels], 1)


def visible(pixels: Tensor, image: ImageConfig) -> Tensor:
    """Returns normalized pixels [B, 3, H, W] as float32 from 0 to 1, clipped to what a file can hold."""
    # by channels, because a tensor of the constants would have to be sent to a GPU at every call
    channels = zip(pixels.float().unbind(1), image.std, image.mean, strict=True)
    return torch.stack([channel * std + mean for channel, std, mean in channels], 1).clamp(0, 1)
