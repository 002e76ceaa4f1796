"""Two-dimensional rotary position embeddings: attention that knows where patches lie on a grid of any size.

The angles come from timm. Every axis has its own half of a head's channels (RoPE-Axial, arXiv 2403.13298), in units of
patches, so that a neighbor is a neighbor at every picture size.
"""

from torch import Tensor, nn

from dyntok.errors import ConfigError

_TEMPERATURE = 100.0  # the slowest channel turns by one radian in 100 patches


class Rotary(nn.Module):
    """Makes the rotation table of a grid. It has no parameters.

    Raises `ConfigError` unless `head_dim` is a multiple of 4: two axes, and a pair of channels for each angle.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        from timm.layers import RotaryEmbeddingCat  # imported here because it takes a second

        if head_dim % 4:
            raise ConfigError(
                f"rotary positions need heads whose width is a multiple of 4, got {head_dim}; change num_heads"
            )
        self.embedding = RotaryEmbeddingCat(head_dim, in_pixels=False, temperature=_TEMPERATURE, grid_indexing="xy")

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """Returns sines, then cosines, of every patch: float32 [N, 2 * head_dim], in raster order."""
        return self.embedding.get_embed(list(grid))


def rotate(x: Tensor, table: Tensor | None) -> Tensor:
    """Rotates queries or keys [..., T, H, d] by their rows of the table [T, 2 * d]. Without a table x is returned."""
    if table is None:
        return x
    from timm.layers import apply_rot_embed_cat

    return apply_rot_embed_cat(x, table[:, None]).to(x.dtype)  # timm 1.0.17 to 1.0.28 give float32
