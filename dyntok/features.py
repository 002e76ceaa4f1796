"""`Features`: continuous merged tokens of a batch, ragged, for language models that read embeddings instead of codes."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Features:
    """B images, T merged tokens in all, image after image in raster order.

    tokens      float [T, D]
    positions   int64 [T]     the patch each token came from
    cu_seqlens  int32 [B+1]   image i owns rows cu_seqlens[i] to cu_seqlens[i+1]
    grids       int64 [B, 2]  rows and columns of patches
    """

    tokens: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    grids: Tensor

    @property
    def lengths(self) -> Tensor:
        """int64 [B]"""
        return self.cu_seqlens.diff().long()

    def __len__(self) -> int:
        return len(self.grids)

    def split(self) -> list[Tensor]:
        """One float [T_i, D] per image."""
        return list(self.tokens.split(self.lengths.tolist()))

    def padded(self) -> tuple[Tensor, Tensor]:
        """(tokens [B, Tmax, D], zero behind each image's end; mask bool [B, Tmax], True where there is a token)"""
        lengths = self.lengths
        longest = int(lengths.max()) if len(self) else 0
        mask = torch.arange(longest, device=lengths.device) < lengths[:, None]
        padded = self.tokens.new_zeros(len(self), longest, self.tokens.shape[-1])
        padded[mask] = self.tokens
        return padded, mask
