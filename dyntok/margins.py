"""How close decisions were: which codes and which kept patches another machine may choose differently.

Processors and library versions round differently. A decision can differ only where its best and second best lie within
that rounding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dyntok.ragged import image_of_token

# Errors of features and scores are taken to be this many roundings of their dtype: more than the difference between
# float32 and float64, which tests/test_margins.py measures.
UNITS = 16
_ROWS = 1024  # vectors compared with the whole codebook at once


def rounding(dtype: torch.dtype) -> float:
    """Returns the relative error that a network with weights of this dtype is taken to make."""
    return UNITS * torch.finfo(dtype).eps


def close_codes(vectors: Tensor, codebook: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns which vectors [T, C] have a second code that rounding could prefer: bool [T].

    codebook: [K, C]. dtype: of the network that made the vectors.
    """
    if len(codebook) < 2:
        return torch.zeros(len(vectors), dtype=torch.bool, device=vectors.device)
    rows = codebook.to(torch.promote_types(codebook.dtype, torch.float32))
    close = [_close(F.normalize(part.to(rows.dtype), dim=-1), rows, dtype) for part in vectors.split(_ROWS)]
    return torch.cat(close) if close else vectors.new_zeros(0, dtype=torch.bool)


def _close(z: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    score, codes = (z @ rows.T - rows.square().sum(-1) / 2).topk(2)  # [t, 2]
    best, second = rows[codes].unbind(1)
    # an error e of z changes the difference of two scores by at most |e| |best - second|
    return score[:, 0] - score[:, 1] <= rounding(dtype) * (best - second).norm(dim=-1)


def close_choices(distance: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns which patches rounding could keep or drop instead, bool [B, N].

    distance: of each score from where its decision changes, in logits [B, N]; see `KeepPolicy.distance`.
    """
    return distance.abs() <= rounding(dtype) * distance.abs().amax(1, keepdim=True).clamp(min=1.0)


def shares(codes: Tensor, choices: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Returns the share of close codes and of close choices of each image, float32 [B, 2].

    codes: bool [T]; choices: bool [B, N].
    """
    lengths = cu_seqlens.diff()
    image = image_of_token(cu_seqlens, len(codes))
    counted = torch.zeros(len(lengths), dtype=torch.float32, device=codes.device).index_add_(0, image, codes.float())
    return torch.stack([counted / lengths, choices.float().mean(1)], 1)
