"""Vectors to codes and back: l2-normalized nearest-neighbor search (paper section 3.1).

Not here: how a codebook is learned (`dyntok/training/codebook.py`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyntok.errors import CodeError
from dyntok_kernels import nearest_code


class Codebook(nn.Module):
    """K rows of dimension C.

    Search compares l2-normalized vectors with the rows as stored; the lowest index wins a tie.
    """

    embedding: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("embedding", F.normalize(torch.randn(size, dim), dim=-1))

    def forward(self, vectors: Tensor) -> Tensor:
        """Returns the codes, LongTensor [T], of vectors [T, C] of any norm.

        Computed in the codebook's dtype, at least float32.
        """
        with torch.autocast(vectors.device.type, enabled=False):
            rows = self.embedding if self.embedding.dtype == torch.float64 else self.embedding.float()
            return nearest_code(vectors.to(rows.dtype), rows)

    def lookup(self, codes: Tensor) -> Tensor:
        """Returns the rows [T, C] of codes [T]. Raises `CodeError` on a code outside 0..K-1."""
        if codes.numel():
            low, high = int(codes.min()), int(codes.max())
            if low < 0 or high >= len(self.embedding):
                wrong = low if low < 0 else high
                raise CodeError(f"code {wrong} is out of range, this codebook has codes 0 to {len(self.embedding) - 1}")
        return self.embedding[codes]

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (rows [T, C] with the gradient of the normalized vectors, codes [T]), for training."""
        codes = self(vectors)
        z = F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1)
        return z + (self.embedding[codes] - z).detach(), codes


def perplexity(counts: Tensor) -> float:
    """Returns exp(entropy) of code counts [K]: the number of equally used codes with that entropy; 0 if all are 0."""
    total = counts.sum()
    if total == 0:
        return 0.0
    p = counts[counts > 0].double() / total
    return float((-(p * p.log()).sum()).exp())
