"""The three graphs that the page runs, as ONNX: scores of patches, codes of a mask, the picture of codes.

All images have one row, and all patches are computed: a mask takes the place of ragged batches, so that one graph
serves every number of tokens, and every grid where the tokenizer takes any. Which patches are kept is decided in
between, by `site/policy.js`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyntok.errors import ConfigError
from dyntok.export import require_onnx, save_onnx
from dyntok.model.decoder import coordinate_waves
from dyntok.model.merger import Merger, SimilarMerger
from dyntok.model.pixel_head import PixelHead
from dyntok.model.rotary import rotate
from dyntok.model.selector import DROP, KEEP
from dyntok.tokenizer import DynamicVisualTokenizer

_NEVER = -1e9  # added to logits; a softmax of such logits alone is uniform, which is LaVIT's average over all patches
_SMALL = 1024  # values; smaller weights stay as they are
_OPSET = 18  # has Col2Im, which folds patches


class ScoreGraph(nn.Module):
    """Normalized pixels [1, 3, H, W] -> features [1, N, D], and scores [N] whose sign is the learned choice."""

    def __init__(self, tokenizer: DynamicVisualTokenizer) -> None:
        super().__init__()
        self.backbone, self.selector = tokenizer.backbone, tokenizer.selector

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(pixels)
        log_probs = self.selector(features, self.backbone.grid_of(pixels))[0]
        return features, log_probs[:, KEEP] - log_probs[:, DROP]


class CodeGraph(nn.Module):
    """Features [1, N, D] and a keep mask, float [rows, columns] of 0 and 1 -> codes, int32 [N].

    Codes of dropped patches have no meaning. At least one patch is kept.
    """

    rows: Tensor
    half_squares: Tensor

    def __init__(self, tokenizer: DynamicVisualTokenizer) -> None:
        super().__init__()
        self.merger, self.projection = tokenizer.merger, tokenizer.projection
        self.register_buffer("rows", tokenizer.codebook.embedding.float())
        self.register_buffer("half_squares", self.rows.square().sum(-1) / 2)

    def forward(self, features: Tensor, keep: Tensor) -> Tensor:
        grid, mask = (keep.shape[0], keep.shape[1]), keep.flatten()
        if isinstance(self.merger, SimilarMerger):
            merged = _similar(features[0], mask)
        else:
            merged = self._merged(self.merger, features, mask, grid)
        vectors = F.normalize(self.projection(merged), dim=-1)
        return (vectors @ self.rows.T - self.half_squares).argmax(-1).to(torch.int32)

    def _merged(self, merger: Merger, features: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
        """Does what `Merger.forward` does, over all patches."""
        attention = _MaskedAttention(mask, None if merger.rotary is None else merger.rotary(grid))
        heads = (merger.num_heads, features.shape[-1] // merger.num_heads)
        context = merger.context_kv(merger.context_norm(features[0])).unflatten(-1, (len(merger.blocks), 2, *heads))
        x = features[0]
        for number, block in enumerate(merger.blocks):
            x = block(x, context[:, number, 0], context[:, number, 1], attention)
        return merger.norm(x)


class PictureGraph(nn.Module):
    """Codes and their mask to pixels [3, H, W], 0 to 1.

    codes: int32 [rows, columns]. keep: float of the same shape, 0 or 1. known: whether the places of the codes are
    known, float [1], 0 or 1.
    """

    embedding: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, tokenizer: DynamicVisualTokenizer) -> None:
        super().__init__()
        self.decoder, self.head = tokenizer.require_decoder(), _require_head(tokenizer)
        self.register_buffer("embedding", tokenizer.codebook.embedding.float())
        for name, values in (("mean", tokenizer.config.image.mean), ("std", tokenizer.config.image.std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(3, 1, 1))

    def forward(self, codes: Tensor, keep: Tensor, known: Tensor) -> Tensor:
        decoder, grid = self.decoder, (keep.shape[0], keep.shape[1])
        tokens = decoder.in_proj(self.embedding[codes.flatten().long()])
        tokens = tokens + known * decoder.placed_embed[0] + (1 - known) * decoder.placed_embed[1]
        x = decoder.query_embed
        if decoder.coordinates is not None:
            x = x + decoder.coordinates(_coordinates(keep))
        x = (x + keep.flatten()[:, None] * tokens)[None]
        rotation = None if decoder.rotary is None else decoder.rotary(grid)
        for block in decoder.blocks:
            x = block(x, grid, rotation, None, None, None)
        return (self.head(decoder.head(x), grid)[0] * self.std + self.mean).clamp(0, 1)


def _require_head(tokenizer: DynamicVisualTokenizer) -> PixelHead:
    if tokenizer.pixel_head is None or tokenizer.require_decoder().placement != "grid":
        raise ConfigError(
            "the page needs a tokenizer that makes pixels, with decoder.pixels: true and decoder.placement: grid"
        )
    return tokenizer.pixel_head


def _coordinates(plane: Tensor) -> Tensor:
    """Does what `coordinate_features` does, for the grid of a plane [rows, columns] that the exporter does not know."""
    waves = coordinate_waves((plane.shape[0], plane.shape[1]))
    sides = torch.stack([torch.ones_like(plane[:, 0]).sum(), torch.ones_like(plane[0]).sum()])
    return torch.cat([waves, (sides / 16).log2().expand(waves.shape[0], 2)], 1)


class _MaskedAttention:
    """The merger's attention over all patches of one image; see `_PackedAttention` in `model/merger.py`."""

    def __init__(self, mask: Tensor, table: Tensor | None) -> None:
        count = mask.shape[0]
        later = torch.ones(count, count).triu(1)
        self.to_kept = _NEVER * (1 - mask) + _NEVER * later
        self.to_others, self.table = _NEVER * mask, table

    def among_kept(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attention(rotate(q, self.table), rotate(k, self.table), v, self.to_kept)

    def to_dropped(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attention(rotate(q, self.table), rotate(k, self.table), v, self.to_others)


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # [H, N, d]
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias).softmax(-1)
    return (weights @ v).transpose(0, 1)


def _similar(features: Tensor, mask: Tensor) -> Tensor:
    """Does what `merge_similar` does: each kept patch becomes the average of it and its dropped ones."""
    unit = F.normalize(features, dim=-1)
    owner = (unit @ unit.T + _NEVER * (1 - mask)).argmax(-1)
    places = torch.arange(features.shape[0])
    owner = torch.where(mask > 0, places, owner)
    owned = (owner[None] == places[:, None]).to(features.dtype)  # [owner, patch]
    return owned @ features / owned.sum(-1, keepdim=True).clamp(min=1)


def write_graphs(tokenizer: DynamicVisualTokenizer, folder: Path) -> None:
    """Write score.onnx, codes.onnx and picture.onnx.

    Raises `ConfigError` where the tokenizer makes no pictures or its decoder knows tokens by their rank, and
    `MissingDependencyError` without the extra `export`.
    """
    require_onnx()
    _require_head(tokenizer)
    patch, (rows, columns) = tokenizer.backbone.patch_size, tokenizer.grid
    if tokenizer.any_grid:
        rows, columns = 12, 10  # different, so that the exporter takes neither for the other
    pixels, plane = torch.zeros(1, 3, rows * patch, columns * patch), torch.zeros(rows, columns)
    features = torch.zeros(1, rows * columns, tokenizer.backbone.embed_dim)
    r, c = (torch.export.Dim(name, min=2, max=128) for name in ("rows", "columns"))
    n = torch.export.Dim("patches", min=4, max=4096)
    free = tokenizer.any_grid
    write = _writer(folder)
    write("score", ScoreGraph(tokenizer), (pixels,), ({2: patch * r, 3: patch * c},) if free else None)
    write("codes", CodeGraph(tokenizer), (features, plane), ({1: n}, {0: r, 1: c}) if free else None)
    same = torch.export.Dim.AUTO  # naming the sides again would be a warning
    shapes: Any = ({0: r, 1: c}, {0: same, 1: same}, {}) if free else None
    write("picture", PictureGraph(tokenizer), (plane.int(), plane, torch.ones(1)), shapes)


def _writer(folder: Path) -> Callable[..., None]:
    def write(name: str, module: nn.Module, inputs: tuple[Tensor, ...], shapes: tuple | None) -> None:
        names = {"score": ["features", "score"], "codes": ["codes"], "picture": ["picture"]}[name]
        with torch.no_grad():
            program = torch.onnx.export(
                module.eval(), inputs, dynamo=True, verbose=False,
                opset_version=_OPSET, dynamic_shapes=shapes, output_names=names,
            )  # fmt: skip
        save_onnx(program, folder / f"{name}.onnx")
        store_halves(folder / f"{name}.onnx")

    return write


def store_halves(path: Path) -> None:
    """Store in float16 all weights that it holds exactly, which is half the file. The graph computes in float32."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    casts = []
    for weight in model.graph.initializer:
        values = numpy_helper.to_array(weight)
        if values.dtype != np.float32 or values.size < _SMALL or np.abs(values).max() > np.finfo(np.float16).max:
            continue
        if not (values.astype(np.float16) == values).all():
            continue
        name = weight.name
        weight.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.half"))
        casts.append(onnx.helper.make_node("Cast", [f"{name}.half"], [name], to=onnx.TensorProto.FLOAT))
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*casts, *nodes])
    onnx.save(model, path)
