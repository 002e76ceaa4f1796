"""Which patches carry information: a score per patch, and the rules that turn scores into a keep mask.

Not here: what happens to dropped patches (`merger.py`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyntok.layout import bayer_pattern

KEEP, DROP = 0, 1


class Selector(nn.Module):
    """Log-probabilities of keeping and dropping each patch (paper section 3.1), in float32 or better whatever the weights are stored as.

    The second half of the channels is replaced by its mean over all patches, so that every patch is judged in the light of the picture.
    Starts by keeping: the last bias favours it (a selector that starts by dropping may never recover).

    With `dither`, every position has a learned bias that starts as an ordered dither (a tiled 8 x 8 Bayer matrix, within plus and minus
    `dither` logits). Without it a smooth region, whose patches all score alike, is kept or dropped as a whole; with it the score sets how
    densely a region is kept, and the bias which of its patches.
    """

    def __init__(self, embed_dim: int, grid: tuple[int, int] | None = None, dither: float = 0.0) -> None:
        super().__init__()
        self.position_bias = nn.Parameter(dither * bayer_pattern(grid)) if dither else None
        self.embed_dim = embed_dim
        self.norm = nn.LayerNorm(embed_dim, eps=1e-5)
        self.in_proj = nn.Linear(embed_dim, embed_dim)
        self.hidden1 = nn.Linear(embed_dim, embed_dim // 2)
        self.hidden2 = nn.Linear(embed_dim // 2, embed_dim // 4)
        self.head = nn.Linear(embed_dim // 4, 2)
        with torch.no_grad():
            self.head.bias.copy_(torch.tensor([0.25, -0.25]))

    def forward(self, features: Tensor) -> Tensor:
        """[B, N, D] -> log-probabilities [B, N, 2], index 0 = keep."""
        with torch.autocast(features.device.type, enabled=False):
            dtype = torch.promote_types(self.head.weight.dtype, torch.float32)
            scale, shift = (p.to(dtype) for p in self.norm.parameters())
            x = F.layer_norm(features.to(dtype), self.norm.normalized_shape, scale, shift, self.norm.eps)
            x = F.gelu(_linear(self.in_proj, x))
            local, shared = x.split([self.embed_dim // 2, self.embed_dim - self.embed_dim // 2], dim=-1)
            x = torch.cat([local, shared.mean(1, keepdim=True).expand_as(shared)], dim=-1)
            x = F.gelu(_linear(self.hidden2, F.gelu(_linear(self.hidden1, x))))
            logits = _linear(self.head, x)
            if self.position_bias is not None:
                bias = self.position_bias.to(dtype) / 2
                logits = logits + torch.stack([bias, -bias], dim=-1)
            return F.log_softmax(logits, dim=-1)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """In the dtype of x, whatever the weights are stored as."""
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def straight_through(log_probs: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The training choice: hard Gumbel-softmax with a straight-through gradient (paper section 3.1).

    log_probs [B, N, 2] -> (keep mask bool [B, N], gate float [B, N]: 1.0 where kept, 0.0 where dropped, its gradient that of the
    relaxed choice).
    """
    gate = F.gumbel_softmax(log_probs, tau=temperature, hard=True, dim=-1)[..., KEEP]
    return gate.detach() > 0.5, gate
