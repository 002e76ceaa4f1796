"""Continuous tokens for a language model that reads pictures (LaVIT's understanding path).

They have a merger of their own and are never quantized.
"""

from torch import Tensor, nn

from dyntok.config import MergerConfig
from dyntok.model.merger import build_merger


class Understanding(nn.Module):
    """Backbone features [B, N, D] and a keep mask [B, N] -> tokens [T, out_dim], image by image, in raster order."""

    def __init__(self, embed_dim: int, merger: MergerConfig, out_dim: int) -> None:
        super().__init__()
        self.merger = build_merger(embed_dim, merger)
        self.proj = nn.Linear(embed_dim, out_dim)

    def forward(
        self,
        features: Tensor,
        keep: Tensor,
        *,
        exact: bool = False,
        total: int | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        return self.proj(self.merger(features, keep, exact=exact, total=total, grid=grid))
