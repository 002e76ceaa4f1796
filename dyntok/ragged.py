"""Ragged batches: rows of all images packed one after another, because every image has its own number of tokens.

`cu_seqlens` (int32 [B+1]) marks the boundaries: image i owns rows cu_seqlens[i] to cu_seqlens[i+1] - 1. This file holds
every conversion between lengths, masks, boundaries, lists of rows and padded tensors. The checks are in
`validation.py`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def cu_seqlens_from_lengths(lengths: Tensor) -> Tensor:
    """Returns int32 [B+1], the boundaries of images that have `lengths` [B] tokens."""
    return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def cu_seqlens_from_mask(keep: Tensor) -> Tensor:
    """Returns int32 [B+1], the boundaries of images once the True entries of `keep` (bool [B, N]) are packed."""
    return cu_seqlens_from_lengths(keep.sum(1))


def image_of_token(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Returns int64 [T], the image of each of `tokens` tokens. Every image must have at least one."""
    # repeat_interleave gives the same, but starts all threads for a few numbers: milliseconds on a busy machine.
    begins = torch.zeros(tokens, dtype=torch.long, device=cu_seqlens.device)
    return begins.index_fill_(0, cu_seqlens[1:-1].long(), 1).cumsum(0)


def join_rows(rows: Sequence[Tensor], device: torch.device | None) -> Tensor:
    """Returns all rows as one packed tensor on `device`. No rows give an empty int64 tensor."""
    if not rows:
        return torch.empty(0, dtype=torch.long, device=device)
    return torch.cat([row.to(device) for row in rows])


def split_rows(packed: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    """Returns one view [T_i, ...] of `packed` [T, ...] per image."""
    if len(cu_seqlens) == 1:
        return []
    return list(packed.split(cu_seqlens.diff().tolist()))


def pad_rows(packed: Tensor, cu_seqlens: Tensor, fill: float) -> tuple[Tensor, Tensor]:
    """Returns `packed` [T, ...] as [B, Tmax, ...], with `fill` after each image's last token, and its mask.

    The mask is bool [B, Tmax] and True where there is a token.
    """
    lengths = cu_seqlens.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    mask = torch.arange(longest, device=lengths.device) < lengths[:, None]  # [B, Tmax]
    padded = packed.new_full((*mask.shape, *packed.shape[1:]), fill)
    padded[mask] = packed
    return padded, mask
