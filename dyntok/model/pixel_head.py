"""Patch features to normalized pixels. Not here: turning those into image files (`image.py`)."""

import torch.nn.functional as F
from torch import Tensor, nn


class PixelHead(nn.Module):
    """One linear layer per patch.

    A patch paints an area of twice its side, and overlapping areas add up to hide seams.
    """

    def __init__(self, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(embed_dim, 3 * (2 * patch_size) ** 2)

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """Returns pixels [B, 3, rows * patch_size, columns * patch_size] for features [B, N, D]."""
        painted = self.proj(features).transpose(1, 2)  # [B, 3 (2p)^2, N]
        p = self.patch_size
        height, width = (side * p for side in grid)
        # an odd patch can't lie in the middle of its area: it then paints one pixel more to the right and below
        canvas = F.fold(painted, (height + p % 2, width + p % 2), kernel_size=2 * p, stride=p, padding=p // 2)
        return canvas[..., :height, :width]
