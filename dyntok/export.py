"""Encoder and decoder with fixed shapes, for `torch.compile`, `torch.export` and ONNX.

Every image gets the same number of tokens, so no shape depends on an image. Loading images, ragged batches and
fingerprints are in `tokenizer.py`.
"""

from contextlib import AbstractContextManager, nullcontext
from numbers import Integral
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyntok.config import MAX_PATCHES
from dyntok.errors import ConfigError, ImageError, MissingDependencyError
from dyntok.layout import MAX_SIDE, canonical_mask
from dyntok.policy import KeepPolicy
from dyntok.precision import autocast, full_float32
from dyntok.ragged import cu_seqlens_from_mask
from dyntok.structure import brief, pair_of, require
from dyntok.tokenizer import DynamicVisualTokenizer
from dyntok_kernels import compact


class FixedEncoder(nn.Module):
    """Encodes normalized pixels [B, 3, H, W] as codes and positions, int64 [B, budget].

    The codes are those of `encode_tensor(pixels, budget=budget)`, in half precision, too. Compiled for a GPU they are
    where TF32 is switched off around the call. grid: (rows, columns) of the images, by default the tokenizer's own.

    It uses the weights of the tokenizer itself, and puts them into evaluation mode. Move or cast the tokenizer first.

    Raises `ConfigError` unless the budget is from 1 to the number of patches, and on a grid the tokenizer can't take. A
    call raises `ImageError` on pixels of another grid or that are not normalized floats.
    """

    def __init__(self, tokenizer: DynamicVisualTokenizer, budget: int, grid: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.grid = fixed_grid(tokenizer, grid)
        self.shape = (3, *(side * tokenizer.backbone.patch_size for side in self.grid))
        self.places = tokenizer.config.selector.places
        patches = self.grid[0] * self.grid[1]
        whole = isinstance(budget, Integral) and 1 <= budget <= patches
        require(whole, f"budget is {brief(budget)} tokens, expected 1 to {patches}, the number of patches")
        self.budget, self.policy, self.patches = budget, KeepPolicy(budget=budget), patches
        self.backbone, self.selector, self.merger = tokenizer.backbone, tokenizer.selector, tokenizer.merger
        self.projection, self.codebook = tokenizer.projection, tokenizer.codebook
        self.eval()

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        if not pixels.is_floating_point() or pixels.shape[1:] != self.shape:
            sizes = ", ".join(map(str, self.shape))
            raise ImageError(f"pixels are {pixels.dtype} {list(pixels.shape)}, expected normalized floats [B, {sizes}]")
        dtype = next(self.backbone.parameters()).dtype
        with autocast(pixels.device.type, dtype), _precise(pixels.device):
            return self._encode(pixels.to(dtype))

    def _encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        images = len(pixels)
        features = self.backbone(pixels)
        keep = canonical_mask(self.policy(self.selector(features, self.grid)), self.grid, self.places)
        merged = self.merger(features, keep, total=images * self.budget, grid=self.grid)
        codes = self.codebook(self.projection(merged))
        positions = compact(keep)[0][: images * self.budget] % self.patches
        return codes.view(images, -1), positions.long().view(images, -1)


class FixedDecoder(nn.Module):
    """Decodes codes and positions, int64 [B, n], into normalized pixels [B, 3, H, W].

    If the positions of an image are unknown, all of them are -1. A tokenizer without a pixel head gives patch features
    [B, N, D]. Codes are not checked. grid: (rows, columns) of the images, by default the tokenizer's own.

    Raises `ConfigError` on a grid that the tokenizer can't take.
    """

    embedding: Tensor

    def __init__(self, tokenizer: DynamicVisualTokenizer, grid: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.grid = fixed_grid(tokenizer, grid)
        self.register_buffer("embedding", tokenizer.codebook.embedding)
        self.decoder = tokenizer.require_decoder()
        self.head = tokenizer.pixel_head
        self.eval()

    def forward(self, codes: Tensor, positions: Tensor) -> Tensor:
        images, count = codes.shape
        cu_seqlens = torch.arange(images + 1, dtype=torch.int32, device=codes.device) * count
        with autocast(codes.device.type, self.decoder.in_proj.weight.dtype), _precise(codes.device):
            vectors = F.embedding(codes.flatten(), self.embedding)
            features = self.decoder(vectors, cu_seqlens, positions.flatten(), self.grid)
            return features if self.head is None else self.head(features, self.grid)


def _precise(device: torch.device) -> AbstractContextManager[None]:
    """Returns `full_float32`, but in a graph nothing: a graph changes no settings while it runs."""
    return nullcontext() if torch.compiler.is_compiling() else full_float32(device)


def fixed_grid(tokenizer: DynamicVisualTokenizer, grid: tuple[int, int] | None) -> tuple[int, int]:
    """Returns the grid, or the tokenizer's own for None. Raises `ConfigError` where the tokenizer can't take it."""
    if grid is None:
        return tokenizer.grid
    pair = pair_of(grid)
    if pair is None or not all(1 <= side <= MAX_SIDE for side in pair) or pair[0] * pair[1] > MAX_PATCHES:
        raise ConfigError(
            f"grid is {brief(grid)}, expected (rows, columns) of 1 to {MAX_SIDE}, and at most {MAX_PATCHES:,} patches"
        )
    if pair != tokenizer.grid and not tokenizer.any_grid:
        rows, columns = tokenizer.grid
        raise ConfigError(f"grid is {grid}, but this tokenizer knows the grid {rows} x {columns} alone")
    return pair


def export(module: FixedEncoder | FixedDecoder, *inputs: Tensor) -> torch.export.ExportedProgram:
    """Returns the module as a graph for inputs of these shapes. Operations of `dyntok_kernels` stay single nodes."""
    with torch.no_grad():
        return torch.export.export(module, inputs)


def to_onnx(module: FixedEncoder | FixedDecoder, path: str | Path, *inputs: Tensor) -> None:
    """Write an ONNX file with standard operators only, for inputs of these shapes.

    Raises `MissingDependencyError` without the extra `export`.
    """
    require_onnx()
    program = export(module, *inputs).run_decompositions(_decompositions())
    save_onnx(torch.onnx.export(program, dynamo=True, verbose=False), path)


def save_onnx(program: "torch.onnx.ONNXProgram | None", path: str | Path) -> None:
    """Write what `torch.onnx.export` returned, without the names of source files on this machine that it holds."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    assert program is not None  # as with `dynamo=True`
    ClearMetadataAndDocStringPass()(program.model)
    program.save(str(path), external_data=False)


def require_onnx() -> None:
    """Raises `MissingDependencyError` without the extra `export`."""
    try:
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(str(error.name), "export") from error


def _decompositions() -> dict:
    """Returns dyntok's operations, and others that ONNX lacks, as standard ones. They need images of equal lengths."""
    table = torch.export.default_decompositions()
    ops = torch.ops.dyntok
    return table | {
        ops.varlen_attention.default: _attention,
        ops.nearest_code.default: _nearest_code,
        ops.compact.default: _compact,
        ops.gather_rows.default: lambda x, index, embed: x.index_select(0, index.long()),
        ops.scatter_rows.default: _scatter_rows,
        torch.ops.aten.sort.stable: _stable_sort,
    }


def _stable_sort(x: Tensor, *, stable: bool, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    # ONNX's TopK, unlike PyTorch's, keeps the order of equal values.
    values, indices = torch.topk(x, x.shape[dim], dim, descending)
    return values, indices


def _attention(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    q, k, v = (x.unflatten(0, (cu_q.shape[0] - 1, -1)).transpose(1, 2) for x in (q, k, v))  # [B, H, T, d]
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        count = q.shape[-2]
        scores = scores + torch.full((count, count), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(0, 1)
    return out, out.new_zeros(0)


def _nearest_code(z: Tensor, codebook: Tensor, normalize: bool) -> Tensor:
    z = F.normalize(z, dim=-1) if normalize else z
    return (z @ codebook.T - codebook.square().sum(-1) / 2).argmax(-1)


def _compact(keep: Tensor) -> tuple[Tensor, Tensor]:
    places = torch.arange(keep.numel(), dtype=torch.float32, device=keep.device)
    order = torch.where(keep.flatten(), keep.numel() - places, -places).topk(keep.numel()).indices
    cu_seqlens = cu_seqlens_from_mask(keep)
    return torch.where(places < cu_seqlens[-1], order, -1).to(torch.int32), cu_seqlens


def _scatter_rows(rows: Tensor, index: Tensor, base: Tensor, total: int) -> Tensor:
    grid = base.repeat(total // base.shape[0], 1)
    return grid.index_put((index.long(),), grid.index_select(0, index.long()) + rows)
