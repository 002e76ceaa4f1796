"""Code vectors to features of all N patches, in one pass. Not here: pixels (`pixel_head.py`).

Two ways for tokens to reach the patches: they lie on the grid at their positions, or learned queries read them by
cross-attention and know them by their rank alone (LaVIT).
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from dyntok.config import DecoderConfig
from dyntok.errors import ConfigError
from dyntok.layout import lattice_mask
from dyntok.model.blocks import check_heads, feed_forward, scale_branches
from dyntok.model.rotary import Rotary, rotate
from dyntok.ragged import image_of_token
from dyntok_kernels import compact, scatter_rows, varlen_attention

_WAVES = 4  # frequencies per axis of the coordinate features


def guessed_positions(cu_seqlens: Tensor, tokens: int, grid: tuple[int, int], dithered: bool) -> Tensor:
    """Returns places for tokens whose positions are unknown: int64 [T], strictly increasing within an image.

    With a dithered selector they are the lattice, on which most kept patches lie. Otherwise they are evenly spread.
    cu_seqlens: int32 [B+1] of images of 1 to N tokens, `tokens` in all.
    """
    lengths, num_patches = cu_seqlens.diff().long(), grid[0] * grid[1]
    if dithered:
        return compact(lattice_mask(lengths, grid))[0][:tokens].long() % num_patches
    place, image = rank_of_token(cu_seqlens, tokens)
    return (place * 2 + 1) * num_patches // (2 * lengths[image])


def rank_of_token(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Returns the number of each token within its image and the number of that image, int64 [T] both."""
    image = image_of_token(cu_seqlens, tokens)
    return torch.arange(tokens, device=cu_seqlens.device) - cu_seqlens.long()[image], image


class Decoder(nn.Module):
    """Code vectors [T, C] of B images with one grid -> features [B, N, out_dim].

    placement "grid": tokens are added to the patch queries at their positions. Unknown positions are guessed from the
    number of tokens (`guessed_positions`), and the blocks are informed. placement "rank": every block's queries attend
    to the tokens, which carry an embedding of their rank. Positions are not used.

    position "table": every patch of one fixed grid has a learned query. position "rotary": any grid; queries follow
    from coordinates, and self-attention from rotary embeddings.

    config: `embed_dim` and `out_dim` default to the backbone's `width`. dithered: whether the selector has a dither.
    Raises `ConfigError` where num_heads does not divide the width.
    """

    def __init__(
        self, grid: tuple[int, int], code_dim: int, width: int, config: DecoderConfig, *, dithered: bool = False
    ) -> None:
        super().__init__()
        embed_dim = config.embed_dim or width
        check_heads("decoder", embed_dim, config.num_heads)
        self.dithered, self.grid, self.placement = dithered, grid, config.placement
        self.out_dim = (config.out_dim or width) if config.head == "mlp" else embed_dim
        self.in_proj = nn.Linear(code_dim, embed_dim)
        self.rotary = Rotary(embed_dim // config.num_heads) if config.position == "rotary" else None
        queries = 1 if self.rotary else grid[0] * grid[1]
        self.query_embed = nn.Parameter(torch.randn(queries, embed_dim) * 0.02)
        self.coordinates = nn.Linear(4 * _WAVES + 2, embed_dim, bias=False) if self.rotary else None
        if self.placement == "rank":
            self.rank_embed = nn.Parameter(torch.randn(queries, embed_dim) * 0.02)
        else:
            self.placed_embed = nn.Parameter(torch.zeros(2, embed_dim))  # at a known position, at a guessed one
        self.blocks = nn.ModuleList(DecoderBlock(embed_dim, config) for _ in range(config.depth))
        self.head: nn.Module = nn.Identity()
        if config.head == "mlp":
            norm = nn.LayerNorm(embed_dim, eps=1e-5)
            hidden, out = nn.Linear(embed_dim, embed_dim), nn.Linear(embed_dim, self.out_dim)
            self.head = nn.Sequential(norm, hidden, nn.Tanh(), out)

    def forward(
        self,
        vectors: Tensor,
        cu_seqlens: Tensor,
        positions: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """Returns features [B, N, out_dim].

        vectors: [T, C]. cu_seqlens: int32 [B+1].
        positions: int64 [T], -1 throughout an image whose positions are unknown; None where all are unknown.
        grid: (rows, columns) of all images of the call.

        Raises `ConfigError` where a decoder with a table of positions gets another grid than its own.
        """
        grid = self.grid if grid is None else grid
        if self.rotary is None and grid != self.grid:
            raise ConfigError(
                f"this decoder knows the grid {self.grid[0]} x {self.grid[1]} alone, got {grid[0]} x {grid[1]}; "
                "decoder.position: rotary takes any"
            )
        tokens, images = self.in_proj(vectors), len(cu_seqlens) - 1
        if self.placement == "rank":
            x = self.query_embed.expand(images, -1, -1)
            tokens = tokens + self.rank_embed[rank_of_token(cu_seqlens, len(tokens))[0]]
            steps = torch.arange(images + 1, dtype=torch.int32, device=vectors.device)
            cu_queries = steps * len(self.query_embed)
        else:
            x, tokens, cu_queries = self._place(tokens, cu_seqlens, positions, grid), None, None
        rotation = None if self.rotary is None else self.rotary(grid)
        for block in self.blocks:
            x = block(x, grid, rotation, tokens, cu_seqlens, cu_queries)
        return self.head(x)

    def _place(self, tokens: Tensor, cu_seqlens: Tensor, positions: Tensor | None, grid: tuple[int, int]) -> Tensor:
        """Returns patch queries [B, N, D] with the tokens put on the grid."""
        num_patches = grid[0] * grid[1]
        cell = guessed_positions(cu_seqlens, len(tokens), grid, self.dithered)
        known = torch.zeros_like(cell, dtype=torch.bool) if positions is None else positions >= 0
        cell = cell if positions is None else torch.where(known, positions, cell)
        cell = cell + image_of_token(cu_seqlens, len(tokens)) * num_patches
        tokens = tokens + torch.where(known[:, None], self.placed_embed[0], self.placed_embed[1])
        queries = self.query_embed
        if self.coordinates is not None:
            features = coordinate_features(grid, tokens.device).to(self.coordinates.weight)
            queries = queries + self.coordinates(features)
        placed = scatter_rows(tokens, cell, queries, total=(len(cu_seqlens) - 1) * num_patches)
        return placed.unflatten(0, (-1, num_patches))


def coordinate_features(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Returns what a patch knows about its place in the picture: float [N, 18].

    Cosines and sines of its coordinates, from 0 to 1 along each side, at four frequencies; and the grid's size.
    """
    waves = coordinate_waves(grid, device)
    sizes = [waves.new_full((len(waves), 1), math.log2(side / 16)) for side in grid]
    return torch.cat([waves, *sizes], 1)


def coordinate_waves(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Returns cosines, then sines, of each patch's coordinates at four frequencies: float [N, 16]."""
    axes = [(torch.arange(side, dtype=torch.float32, device=device) + 0.5) / side for side in grid]
    places = torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")], 1)  # [N, 2]
    angles = (places[:, :, None] * math.pi * torch.arange(1, _WAVES + 1, device=device)).flatten(1)
    return torch.cat([angles.cos(), angles.sin()], 1)


class DecoderBlock(nn.Module):
    """Self-attention over all patches, cross-attention to tokens or a 3x3 convolution, MLP; pre-norm, residual."""

    def __init__(self, embed_dim: int, config: DecoderConfig) -> None:
        super().__init__()
        cross = config.placement == "rank"
        self.num_heads = config.num_heads
        self.self_norm = nn.LayerNorm(embed_dim, eps=1e-5)
        self.self_qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.self_proj = nn.Linear(embed_dim, embed_dim)
        self.cross_norm = nn.LayerNorm(embed_dim, eps=1e-5) if cross else None
        self.cross_query = nn.Linear(embed_dim, embed_dim) if cross else None
        self.cross_kv = nn.Linear(embed_dim, 2 * embed_dim) if cross else None
        self.cross_proj = nn.Linear(embed_dim, embed_dim) if cross else None
        self.conv = nn.Conv2d(embed_dim, embed_dim, 3, padding=1, groups=embed_dim) if config.conv else None
        self.mlp_norm = nn.LayerNorm(embed_dim, eps=1e-5)
        self.mlp = feed_forward(embed_dim, config.mlp_ratio)
        scale_branches(config.init_scale, self.self_proj, self.cross_proj, self.mlp[-1], self.conv)

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int],
        rotation: Tensor | None,
        tokens: Tensor | None,
        cu_tokens: Tensor,
        cu_queries: Tensor | None,
    ) -> Tensor:
        """Returns x after one block.

        x: [B, N, D]; rotation: [N, 2 d] of the self-attention; tokens: [T, D] for the cross-attention.
        """
        qkv = self.self_qkv(self.self_norm(x)).unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, H, d]
        q, k, v = qkv.unbind(2)
        q, k = rotate(q, rotation), rotate(k, rotation)
        attended = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = x + self.self_proj(attended.transpose(1, 2).flatten(2))
        if self.cross_query is not None:
            q = rearrange(self.cross_query(self.cross_norm(x)), "b n (h d) -> (b n) h d", h=self.num_heads)
            k, v = rearrange(self.cross_kv(tokens), "t (two h d) -> two t h d", two=2, h=self.num_heads)
            x = x + self.cross_proj(varlen_attention(q, k, v, cu_queries, cu_tokens).flatten(-2)).view_as(x)
        if self.conv is not None:
            image = rearrange(x, "b (rows cols) d -> b d rows cols", rows=grid[0])
            x = x + rearrange(self.conv(image), "b d rows cols -> b (rows cols) d")
        return x + self.mlp(self.mlp_norm(x))
