"""`Features`: continuous merged tokens of a batch, for language models that read embeddings instead of codes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dyntok.ragged import pad_rows, split_rows


@dataclass(frozen=True, eq=False)
class Features:
    """The merged tokens of B images, T in all, image after image in raster order.

    tokens      float [T, D]
    positions   int64 [T]     the patch of each token
    cu_seqlens  int32 [B+1]   image i owns rows cu_seqlens[i] to cu_seqlens[i+1] - 1
    grids       int64 [B, 2]  rows and columns of patches
    """

    tokens: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    grids: Tensor

    @property
    def lengths(self) -> Tensor:
        """Returns the number of tokens of each image, int64 [B]."""
        return self.cu_seqlens.diff().long()

    def __len__(self) -> int:
        return len(self.grids)

    def __eq__(self, other: object) -> bool:
        """Compare the tensors, wherever they are."""
        if not isinstance(other, Features):
            return NotImplemented
        return all(torch.equal(own.cpu(), vars(other)[name].cpu()) for name, own in vars(self).items())

    def split(self) -> list[Tensor]:
        """Returns the tokens of each image, float [T_i, D]; views, not copies."""
        return split_rows(self.tokens, self.cu_seqlens)

    def padded(self) -> tuple[Tensor, Tensor]:
        """Returns tokens [B, Tmax, D], zero after each image's last one, and their mask.

        The mask is bool [B, Tmax] and True where there is a token.
        """
        return pad_rows(self.tokens, self.cu_seqlens, 0.0)
