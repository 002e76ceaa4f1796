"""Encoder and decoder of fixed shapes: modules that `torch.compile`, `torch.export` and ONNX take as a whole.

Every image gets the same number of tokens, so no shape depends on a picture. Not here: pictures, ragged batches, fingerprints
(`tokenizer.py`).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyntok.errors import ConfigError, MissingDependencyError
from dyntok.policy import KeepPolicy
from dyntok.tokenizer import DynamicVisualTokenizer
from dyntok_kernels import compact


class FixedEncoder(nn.Module):
    """Normalised pixels float [B, 3, S, S] -> codes and positions, LongTensors [B, budget], as `encode_tensor(pixels, budget=budget)`.

    Raises `ConfigError` where the budget is not from 1 to the number of patches.
    """

    def __init__(self, tokenizer: DynamicVisualTokenizer, budget: int) -> None:
        super().__init__()
        patches = tokenizer.grid[0] * tokenizer.grid[1]
        if not 1 <= budget <= patches:
            raise ConfigError(f"budget is {budget} tokens, expected 1 to {patches}, the patches of an image")
        self.budget, self.policy, self.patches = budget, KeepPolicy(budget=budget), patches
        for name in ("backbone", "selector", "merger", "projection", "codebook"):
            self.add_module(name, getattr(tokenizer, name))
        self.eval()

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        images = len(pixels)
        features = self.backbone(pixels)
        keep = self.policy(self.selector(features))
        codes = self.codebook(self.projection(self.merger(features, keep, total=images * self.budget)))
        positions = compact(keep)[0][: images * self.budget] % self.patches
        return codes.view(images, -1), positions.long().view(images, -1)


class FixedDecoder(nn.Module):
    """Codes and positions, LongTensors [B, n] (positions -1 throughout an image where they are unknown) -> normalized pixels
    [B, 3, S, S], or patch features [B, N, D] of a tokenizer without a pixel head. Codes out of range are not checked here.
    """

    def __init__(self, tokenizer: DynamicVisualTokenizer) -> None:
        super().__init__()
        self.register_buffer("embedding", tokenizer.codebook.embedding)
        self.decoder = tokenizer.require_decoder()
        self.head = tokenizer.pixel_head or nn.Identity()
        self.eval()

    def forward(self, codes: Tensor, positions: Tensor) -> Tensor:
        images, count = codes.shape
        cu_seqlens = torch.arange(images + 1, dtype=torch.int32, device=codes.device) * count
        vectors = F.embedding(codes.flatten(), self.embedding)
        return self.head(self.decoder(vectors, cu_seqlens, positions.flatten(), [count] * images))


def export(module: FixedEncoder | FixedDecoder, *inputs: Tensor) -> torch.export.ExportedProgram:
    """The module as a graph for inputs of these shapes; its operations of `dyntok_kernels` stay what they are."""
    with torch.no_grad():
        return torch.export.export(module, inputs)


def to_onnx(module: FixedEncoder | FixedDecoder, path: str | Path, *inputs: Tensor) -> None:
    """Writes an ONNX file for inputs of these shapes, with nothing in it but standard operators.

    Raises `MissingDependencyError` without the extra `export`.
    """
    try:
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(str(error.name), "export") from error
    program = export(module, *inputs).run_decompositions(_decompositions())
    torch.onnx.export(program, f=str(path), dynamo=True, external_data=False, verbose=False)


def _decompositions() -> dict:
    """Operations of ours, and what ONNX lacks, in terms of what it has. Right for images of equal lengths only."""
    table = torch.export.default_decompositions()
    ops = torch.ops.dyntok
    return table | {
        ops.varlen_attention.default: _attention,
        ops.nearest_code.default: _nearest_code,
        ops.compact.default: _compact,
        ops.gather_rows.default: lambda x, index, embed: x.index_select(0, index.long()),
        ops.scatter_rows.default: _scatter_rows,
        # ONNX's TopK, unlike PyTorch's, keeps the order of equal values
        torch.ops.aten.sort.stable: lambda x, *, stable, dim=-1, descending=False: torch.topk(
            x, x.shape[dim], dim, descending
        ),
    }


def _attention(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    q, k, v = (x.unflatten(0, (cu_q.shape[0] - 1, -1)).transpose(1, 2) for x in (q, k, v))  # [B, H, T, d]
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        count = q.shape[-2]
        scores = scores + torch.full((count, count), -torch.inf, dtype=q.dtype).triu(1)
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(0, 1)
    return out, out.new_zeros(0)


def _nearest_code(z: Tensor, codebook: Tensor, normalize: bool) -> Tensor:
    z = F.normalize(z, dim=-1) if normalize else z
    return (z @ codebook.T - codebook.square().sum(-1) / 2).argmax(-1)


def _compact(keep: Tensor) -> tuple[Tensor, Tensor]:
    places = torch.arange(keep.numel(), dtype=torch.float32)
    order = torch.where(keep.flatten(), keep.numel() - places, -places).topk(keep.numel()).indices
    kept = keep.sum(1).cumsum(0)
    indices = torch.where(places < kept[-1], order, -1).to(torch.int32)
    return indices, F.pad(kept, (1, 0)).to(torch.int32)


def _scatter_rows(rows: Tensor, index: Tensor, base: Tensor, total: int) -> Tensor:
    grid = base.repeat(total // base.shape[0], 1)
    return grid.index_put((index.long(),), grid.index_select(0, index.long()) + rows)
