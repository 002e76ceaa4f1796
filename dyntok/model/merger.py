"""Folds the information of dropped patches into the kept ones (paper section 3.1).

Only rows of kept patches are computed: dropped rows never reach them through the stream. The keys and values of all
blocks' cross-attention come from one fixed context, that of the dropped patches, in one matrix product.
`SimilarMerger` has no weights. Not here: which patches are kept (`selector.py`).
"""

import torch
from torch import Tensor, nn

from dyntok.config import MergerConfig
from dyntok.errors import ConfigError
from dyntok.model.blocks import check_heads, feed_forward, scale_branches
from dyntok.model.rotary import Rotary, rotate
from dyntok_kernels import compact, gather_rows, merge_similar, soft_masked_attention, total_of, varlen_attention

LAVIT_EPS = 1e-6  # of the softmax formula in LaVIT's released code
_MOST = 20.0  # logits of kept patches above the largest of a dropped one, which can't overflow then


class Merger(nn.Module):
    """`depth` blocks over the features of kept patches. LayerNorm(features) is the context of every cross-attention.

    position "none": only their features distinguish tokens. position "rotary": queries and keys are rotated by
    their patch's place, so that a token knows where its neighbors lie on a grid of any size.

    Raises `ConfigError` where num_heads does not divide the width.
    """

    def __init__(self, embed_dim: int, config: MergerConfig) -> None:
        super().__init__()
        check_heads("merger", embed_dim, config.num_heads)
        self.num_heads = config.num_heads
        self.rotary = Rotary(embed_dim // config.num_heads) if config.position == "rotary" else None
        self.context_norm = nn.LayerNorm(embed_dim, eps=1e-5)
        self.context_kv = nn.Linear(embed_dim, 2 * config.depth * embed_dim)  # for each block its keys, then its values
        self.blocks = nn.ModuleList(MergerBlock(embed_dim, config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-5) if config.norm else nn.Identity()

    def forward(
        self,
        features: Tensor,
        keep: Tensor,
        gate: Tensor | None = None,
        *,
        exact: bool = False,
        total: int | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """Returns merged tokens [T, D] of the kept patches, image by image, in raster order.

        features: [B, N, D]. keep: bool [B, N], at least one True per image.
        gate: float [B, N], equal to `keep` in value: a training choice whose gradient is wanted. It enters the
            attention weights as a factor, `gate` for keys of the self-attention, `1 - gate` for keys of the
            cross-attention. Rows of dropped patches are not computed unless `exact`, so a dropped patch's gate has
            its gradient from the cross-attention alone.
        exact: the softmax formula of LaVIT's released code over all N keys. It is dense and about three times the work.
        total: T, where it is known (an exact budget): the host then need not wait for the device to count.
        grid: (rows, columns); needed for rotary positions.
        """
        if self.rotary is not None and (grid is None or exact or gate is not None):
            raise ConfigError("a merger with rotary positions needs grid=, and takes neither exact nor gate")
        table = None if self.rotary is None else self.rotary(grid)
        attention: _DenseAttention | _PackedAttention | _GatedAttention
        if exact:
            attention = _DenseAttention(keep, gate)
        elif gate is None:
            attention = _PackedAttention(keep, total, table)
        else:
            attention = _GatedAttention(keep, gate)
        heads = (self.num_heads, features.shape[-1] // self.num_heads)
        context = self.context_kv(attention.context(self.context_norm(features)))
        context = context.unflatten(-1, (len(self.blocks), 2, *heads))  # [..., depth, 2, H, d]
        x = attention.rows(features)
        for block, (key, value) in zip(self.blocks, (c.unbind(-3) for c in context.unbind(-4)), strict=True):
            x = block(x, key, value, attention)
        return self.norm(x[keep] if exact else x)


class SimilarMerger(nn.Module):
    """A merger without parameters: averages every dropped patch into the most similar kept one (`merge_similar`)."""

    def forward(
        self,
        features: Tensor,
        keep: Tensor,
        gate: Tensor | None = None,
        *,
        exact: bool = False,
        total: int | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """Returns merged tokens as `Merger` does. The gate is a factor of the kept tokens; `grid` is not used.

        Raises `ConfigError` for `exact`, which is a form of attention.
        """
        if exact:
            raise ConfigError("exact was asked for, but a merger of kind 'similar' has no attention; leave exact out")
        tokens, _, _ = merge_similar(features, keep, features.new_ones(keep.shape), total=total)
        return tokens if gate is None else tokens * gate[keep][:, None].to(tokens.dtype)


def build_merger(embed_dim: int, config: MergerConfig) -> Merger | SimilarMerger:
    if config.kind == "similar":
        return SimilarMerger()
    return Merger(embed_dim, config)


class MergerBlock(nn.Module):
    """Causal self-attention among kept tokens, cross-attention to dropped patches, MLP; pre-norm, residual."""

    def __init__(self, embed_dim: int, config: MergerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.self_norm = nn.LayerNorm(embed_dim, eps=1e-5)
        self.self_qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.self_proj = nn.Linear(embed_dim, embed_dim)
        self.cross_norm = nn.LayerNorm(embed_dim, eps=1e-5)
        self.cross_query = nn.Linear(embed_dim, embed_dim)
        self.cross_proj = nn.Linear(embed_dim, embed_dim)
        self.mlp_norm = nn.LayerNorm(embed_dim, eps=1e-5)
        self.mlp = feed_forward(embed_dim, config.mlp_ratio)
        scale_branches(config.init_scale, self.self_proj, self.cross_proj, self.mlp[-1])

    def forward(self, x: Tensor, key: Tensor, value: Tensor, attention: "_Attention") -> Tensor:
        """Returns the kept patches after one block.

        x: [T, D] packed or [B, N, D] dense; key, value: of the context, [..., H, d].
        """
        q, k, v = self.self_qkv(self.self_norm(x)).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        x = x + self.self_proj(attention.among_kept(q, k, v).flatten(-2))
        q = self.cross_query(self.cross_norm(x)).unflatten(-1, (self.num_heads, -1))
        x = x + self.cross_proj(attention.to_dropped(q, key, value).flatten(-2))
        return x + self.mlp(self.mlp_norm(x))


class _PackedAttention:
    """Kept rows only, exact masked softmax over packed rows.

    Where every patch is kept the cross-attention averages all values, as LaVIT does. A value is linear in its context,
    so the average is the value of the context's mean.
    """

    def __init__(self, keep: Tensor, total: int | None, table: Tensor | None = None) -> None:
        kept, self.cu_kept = compact(keep)
        dropped, self.cu_dropped = compact(~keep)
        self.num_patches = keep.shape[1]
        total = total_of(self.cu_kept) if total is None else total
        self.kept, self.dropped = kept[:total], dropped[: keep.numel() - total]
        self.image = self.kept.long() // self.num_patches  # [T]
        self.full = (self.cu_dropped.diff() == 0)[self.image, None, None]
        rows = (self.kept, self.dropped)
        places = [None if table is None else table[index.long() % self.num_patches] for index in rows]
        self.of_kept, self.of_dropped = places  # rotations, [T, 2 d] and [B N - T, 2 d]

    def rows(self, features: Tensor) -> Tensor:
        return gather_rows(features.flatten(0, 1), self.kept)

    def context(self, context: Tensor) -> Tensor:
        """Returns the rows of all dropped patches, then the mean of each image."""
        return torch.cat([gather_rows(context.flatten(0, 1), self.dropped), context.mean(1)])

    def among_kept(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = rotate(q, self.of_kept), rotate(k, self.of_kept)
        return varlen_attention(q, k, v, self.cu_kept, self.cu_kept, causal=True)

    def to_dropped(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        count = len(self.dropped)
        q, k = rotate(q, self.of_kept), rotate(k[:count], self.of_dropped)
        out = varlen_attention(q, k, v[:count], self.cu_kept, self.cu_dropped)
        return torch.where(self.full, v[count:][self.image], out)


class _GatedAttention:
    """Kept rows only, the keep decision a factor in the attention weights, for its gradient.

    All images at once, padded to the longest: the number of operations does not depend on the number of images.
    """

    def __init__(self, keep: Tensor, gate: Tensor) -> None:
        self.keep = keep
        lengths = keep.sum(1)
        longest = int(lengths.max()) if len(keep) else 0
        filled = torch.arange(longest, device=keep.device) < lengths[:, None]  # [B, Tmax]
        self.filled = filled.flatten().nonzero()[:, 0]  # [T], the padded row of each token
        # [B, Tmax], the token of each padded row; rows beyond an image's last token repeat any token
        self.token = (filled.flatten().cumsum(0) - 1).clamp(min=0).view_as(filled)
        # the gate of each token; elsewhere 1, whose logarithm has a gradient
        weight = filled.to(gate.dtype).masked_scatter(filled, gate[keep]).masked_fill(~filled, 1.0)
        future = torch.ones(longest, longest, dtype=torch.bool, device=keep.device).triu(1)
        hidden = future | ~filled[:, None]  # [B, Tmax, Tmax]
        self.kept_bias = weight.log()[:, None].masked_fill(hidden, -torch.inf)[:, None]  # [B, 1, Tmax, Tmax]
        self.dropped_weight = (1 - gate)[:, None, :, None]  # [B, 1, N, 1]
        self.full = keep.all(1)[:, None, None, None]  # images without any dropped patch

    def rows(self, features: Tensor) -> Tensor:
        return features[self.keep]

    def context(self, context: Tensor) -> Tensor:
        return context

    def _padded(self, x: Tensor) -> Tensor:
        """Returns the rows [T, H, d] as [B, H, Tmax, d]."""
        return x[self.token].transpose(1, 2)

    def _packed(self, x: Tensor) -> Tensor:
        """Returns [B, H, Tmax, d] as the rows [T, H, d]."""
        return x.transpose(1, 2).flatten(0, 1)[self.filled]

    def among_kept(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = self._padded(q), self._padded(k), self._padded(v)
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + self.kept_bias
        return self._packed(logits.softmax(-1).to(v.dtype) @ v)

    def to_dropped(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Does what `soft_masked_attention` does, with the weights multiplied into the values.

        The values are fewer than the logits. The weight as one more channel of the values gives the sum to divide by.
        """
        q, k, v, weight = self._padded(q), k.transpose(1, 2), v.transpose(1, 2), self.dropped_weight
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [B, H, Tmax, N]
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
        top = logits.detach().masked_fill(weight.detach().mT == 0, -torch.inf).amax(-1, keepdim=True)
        mass = (logits - top.masked_fill(self.full, 0.0)).clamp(max=_MOST).exp()
        values = torch.cat([v * weight, weight.expand(*v.shape[:-1], 1)], -1).to(v.dtype)  # [B, H, N, d + 1]
        sums = mass.to(v.dtype) @ values
        out = sums[..., :-1] / sums[..., -1:].masked_fill(self.full, 1.0)
        return self._packed(torch.where(self.full, v.mean(2, keepdim=True), out))


class _DenseAttention:
    """All rows, by the softmax formula of LaVIT's released code."""

    def __init__(self, keep: Tensor, gate: Tensor | None) -> None:
        weight = keep.float() if gate is None else gate
        num_patches = keep.shape[1]
        causal = torch.ones(num_patches, num_patches, device=keep.device, dtype=weight.dtype).tril()
        itself = torch.eye(num_patches, device=keep.device, dtype=weight.dtype)
        # a token sees itself also where it is dropped
        self.kept_weight = weight[:, None] * causal + itself * (~keep).to(weight.dtype)[:, None]
        self.dropped_weight = 1 - weight[:, None]

    def rows(self, features: Tensor) -> Tensor:
        return features

    def context(self, context: Tensor) -> Tensor:
        return context

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return soft_masked_attention(q, k, v, weight, eps=LAVIT_EPS).transpose(1, 2)

    def among_kept(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._attend(q, k, v, self.kept_weight)

    def to_dropped(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._attend(q, k, v, self.dropped_weight)


_Attention = _PackedAttention | _GatedAttention | _DenseAttention
