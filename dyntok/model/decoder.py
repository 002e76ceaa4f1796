"""Code vectors to features of all N patches, in one pass.

Two ways to let tokens reach the patches: by cross-attention from learned queries, tokens known by their rank alone (LaVIT), or by
putting them on the grid at their positions. Not here: pixels (`pixels.py`).
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from dyntok.config import DecoderConfig
from dyntok.layout import lattice_positions
from dyntok.model.merger import check_heads, scale_branches
from dyntok_kernels import lengths_of, scatter_rows, varlen_attention


def guessed_positions(length: int, grid: tuple[int, int], dithered: bool) -> Tensor:
    """Places for tokens whose positions are unknown: LongTensor [length], strictly increasing, all N where length is N.

    Evenly spread; or, where the selector has a dither, the patches that it favours: most kept ones lie on its lattice.
    """
    if dithered:
        return lattice_positions(length, grid)
    return ((torch.arange(length) * 2 + 1) * grid[0] * grid[1]) // (2 * length)


class Decoder(nn.Module):
    """Code vectors [T, C] of B images -> features [B, N, out_dim].

    placement "grid": tokens are added to the patch queries at their positions; where positions are unknown they are guessed from the
    tokens' order (`guessed_positions`), and the blocks are told so. placement "rank": every block's queries attend to the tokens, which
    carry an embedding of their rank; positions are not used.

    config: with its `embed_dim` and `out_dim`, or the backbone's `width` where they are None. Raises `ConfigError` where num_heads does
    not divide the width. dithered: whether the selector has a dither.
    """

    def __init__(
        self, grid: tuple[int, int], code_dim: int, width: int, config: DecoderConfig, *, dithered: bool = False
    ) -> None:
        super().__init__()
        self.dithered = dithered
        embed_dim = config.embed_dim or width
        self.out_dim = (config.out_dim or width) if config.head == "mlp" else embed_dim
        check_heads("decoder", embed_dim, config.num_heads)
        self.grid = grid
        self.placement = config.placement
        self.num_patches = grid[0] * grid[1]
        self.in_proj = nn.Linear(code_dim, embed_dim)
        self.query_embed = nn.Parameter(torch.randn(self.num_patches, embed_dim) * 0.02)
        if self.placement == "rank":
            self.rank_embed = nn.Parameter(torch.randn(self.num_patches, embed_dim) * 0.02)
        else:
            self.placed_embed = nn.Parameter(torch.zeros(2, embed_dim))  # at a known position, at a guessed one
        self.blocks = nn.ModuleList(
            DecoderBlock(
                grid, embed_dim, config.num_heads, config.mlp_ratio,
                cross=self.placement == "rank", conv=config.conv, init_scale=config.init_scale,
            )
            for _ in range(config.depth)
        )  # fmt: skip
        self.head = nn.Identity()
        if config.head == "mlp":
            self.head = nn.Sequential(
                nn.LayerNorm(embed_dim, eps=1e-5),
                nn.Linear(embed_dim, embed_dim),
                nn.Tanh(),
                nn.Linear(embed_dim, self.out_dim),
            )

    def forward(
        self, vectors: Tensor, cu_seqlens: Tensor, positions: Tensor | None = None, lengths: list[int] | None = None
    ) -> Tensor:
        """vectors: [T, C]; cu_seqlens: int32 [B+1]; positions: LongTensor [T], -1 throughout an image whose positions are unknown, or
        None where all are. lengths: B numbers of 1 to N, where the host knows them already. Returns [B, N, out_dim].
        """
        lengths = lengths_of(cu_seqlens) if lengths is None else lengths
        tokens = self.in_proj(vectors)
        if self.placement == "rank":
            x = self.query_embed.expand(len(lengths), -1, -1)
            tokens = tokens + torch.cat([self.rank_embed[:n] for n in [0, *lengths]])
            cu_queries = torch.arange(len(lengths) + 1, dtype=torch.int32, device=vectors.device) * self.num_patches
        else:
            x, tokens, cu_queries = self._place(tokens, lengths, positions), None, None
        for block in self.blocks:
            x = block(x, tokens, cu_seqlens, cu_queries)
        return self.head(x)

    def _place(self, tokens: Tensor, lengths: list[int], positions: Tensor | None) -> Tensor:
        """Patch queries [B, N, D] with the tokens put on the grid."""
        none = torch.empty(0, dtype=torch.long)  # so that a batch of no images is one, too
        guessed = torch.cat([none, *(guessed_positions(n, self.grid, self.dithered) for n in lengths)]).to(
            tokens.device
        )
        known = torch.zeros_like(guessed, dtype=torch.bool) if positions is None else positions >= 0
        cell = guessed if positions is None else torch.where(known, positions, guessed)
        image = torch.cat([none, *(torch.full((n,), i, dtype=torch.long) for i, n in enumerate(lengths))]).to(
            tokens.device
        )
        tokens = tokens + torch.where(known[:, None], self.placed_embed[0], self.placed_embed[1])
        total = len(lengths) * self.num_patches
        return scatter_rows(tokens, image * self.num_patches + cell, self.query_embed, total=total).unflatten(
            0, (-1, self.num_patches)
        )


class DecoderBlock(nn.Module):
    """Self-attention over all patches, cross-attention to the tokens or a 3x3 convolution where wanted, MLP; pre-norm, residual."""

    def __init__(
        self,
        grid: tuple[int, int],
        embed_dim: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        cross: bool,
        conv: bool,
        init_scale: float,
    ) -> None:
        super().__init__()
        hidden = int(mlp_ratio * embed_dim)
        self.grid, self.num_heads = grid, num_heads
        self.self_norm = nn.LayerNorm(embed_dim, eps=1e-5)
        self.self_qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.self_proj = nn.Linear(embed_dim, embed_dim)
        self.cross_norm = nn.LayerNorm(embed_dim, eps=1e-5) if cross else None
        self.cross_query = nn.Linear(embed_dim, embed_dim) if cross else None
        self.cross_kv = nn.Linear(embed_dim, 2 * embed_dim) if cross else None
        self.cross_proj = nn.Linear(embed_dim, embed_dim) if cross else None
        self.conv = nn.Conv2d(embed_dim, embed_dim, 3, padding=1, groups=embed_dim) if conv else None
        self.mlp_norm = nn.LayerNorm(embed_dim, eps=1e-5)
        self.mlp = nn.Sequential(nn.Linear(embed_dim, hidden), nn.GELU(), nn.Linear(hidden, embed_dim))
        scale_branches(
            init_scale,
            *(layer for layer in (self.self_proj, self.cross_proj, self.mlp[-1], self.conv) if layer is not None),
        )

    def forward(self, x: Tensor, tokens: Tensor | None, cu_tokens: Tensor, cu_queries: Tensor | None) -> Tensor:
        """x: [B, N, D]; tokens: [T, D] for the cross-attention."""
        q, k, v = rearrange(
            self.self_qkv(self.self_norm(x)), "b n (three h d) -> three b h n d", three=3, h=self.num_heads
        )
        x = x + self.self_proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))
        if self.cross_query is not None:
            q = rearrange(self.cross_query(self.cross_norm(x)), "b n (h d) -> (b n) h d", h=self.num_heads)
            k, v = rearrange(self.cross_kv(tokens), "t (two h d) -> two t h d", two=2, h=self.num_heads)
            x = x + self.cross_proj(varlen_attention(q, k, v, cu_queries, cu_tokens).flatten(-2)).view_as(x)
        if self.conv is not None:
            grid = rearrange(x, "b (rows cols) d -> b d rows cols", rows=self.grid[0])
            x = x + rearrange(self.conv(grid), "b d rows cols -> b (rows cols) d")
        return x + self.mlp(self.mlp_norm(x))
