"""Which patches carry information: a score per patch. Not here: the rules that turn scores into a keep mask
(`policy.py`), and what happens to dropped patches (`merger.py`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyntok.errors import ConfigError
from dyntok.layout import bayer_pattern

KEEP, DROP = 0, 1


class Selector(nn.Module):
    """Scores patches: log-probabilities of keeping and dropping each (paper section 3.1).

    It computes in float32 or better, even if its weights are stored in half precision. The second half of the channels
    is replaced by its mean over all patches, so that every patch is judged in the context of the picture. An untrained
    selector keeps: its last bias favors that, because one that starts by dropping may never recover.

    With `dither`, every position has a bias: an ordered dither (a tiled 8 x 8 Bayer matrix) within plus and minus
    `dither` logits. Without it a smooth region, whose patches all score alike, is kept or dropped as a whole. With it
    the score sets how densely a region is kept, and the bias sets which of its patches. Given a grid, the bias is a
    learned table that starts as the dither; without one it stays fixed and fits any grid. `first` adds to a fixed bias,
    in logits, at the first patch of every 2 x 2 cell: an empty cell costs more than a second patch gains elsewhere.
    """

    def __init__(
        self, embed_dim: int, grid: tuple[int, int] | None = None, dither: float = 0.0, first: float = 0.0
    ) -> None:
        super().__init__()
        learned = dither > 0 and grid is not None
        self.position_bias = nn.Parameter(dither * bayer_pattern(grid)) if learned else None
        self.dither, self.first = dither, first
        self.embed_dim = embed_dim
        self.norm = nn.LayerNorm(embed_dim, eps=1e-5)
        self.in_proj = nn.Linear(embed_dim, embed_dim)
        self.hidden1 = nn.Linear(embed_dim, embed_dim // 2)
        self.hidden2 = nn.Linear(embed_dim // 2, embed_dim // 4)
        self.head = nn.Linear(embed_dim // 4, 2)
        with torch.no_grad():
            self.head.bias.copy_(torch.tensor([0.25, -0.25]))

    def bias(self, grid: tuple[int, int] | None) -> Tensor | float:
        """Returns the position bias in logits, float [N], or 0.0 where there is none. A fixed dither needs the grid."""
        if self.position_bias is not None:
            return self.position_bias
        if not self.dither:
            return 0.0
        if grid is None:
            raise ConfigError("a selector with a fixed dither needs grid=(rows, columns)")
        pattern = bayer_pattern(grid, self.head.bias.device)
        bias = self.dither * pattern
        return bias + self.first * (pattern > 0.5) if self.first else bias  # the highest quarter is first in its cell

    def forward(self, features: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Returns log-probabilities [B, N, 2] for features [B, N, D]; index 0 is keep.

        A fixed dither needs the grid.
        """
        with torch.autocast(features.device.type, enabled=False):
            dtype = torch.promote_types(self.head.weight.dtype, torch.float32)
            scale, shift = (p.to(dtype) for p in self.norm.parameters())
            x = F.layer_norm(features.to(dtype), self.norm.normalized_shape, scale, shift, self.norm.eps)
            x = F.gelu(_linear(self.in_proj, x))
            local, shared = x.split([self.embed_dim // 2, self.embed_dim - self.embed_dim // 2], dim=-1)
            x = torch.cat([local, shared.mean(1, keepdim=True).expand_as(shared)], dim=-1)
            x = F.gelu(_linear(self.hidden2, F.gelu(_linear(self.hidden1, x))))
            logits = _linear(self.head, x)
            if self.dither:
                bias = torch.as_tensor(self.bias(grid), device=x.device).to(dtype) / 2
                logits = logits + torch.stack([bias, -bias], dim=-1)
            return F.log_softmax(logits, dim=-1)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Applies a layer in the dtype of x."""
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def straight_through(log_probs: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Returns the choice of training: hard Gumbel-softmax with a straight-through gradient (paper section 3.1).

    log_probs [B, N, 2] -> (keep mask bool [B, N], gate float [B, N]: 1.0 where kept, 0.0 where dropped, its gradient
    that of the relaxed choice).
    """
    gate = F.gumbel_softmax(log_probs, tau=temperature, hard=True, dim=-1)[..., KEEP]
    return gate.detach() > 0.5, gate
