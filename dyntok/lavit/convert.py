"""LaVIT's released tokenizer inside dyntok: its files onto our parts, one file at a time, when it is needed.

Torch pickles from strangers are read for these files alone (by `diffusion.py` where it is told so from here), and of them only tensors
(`weights_only`). The weights are under the Llama 2 licence; nothing of them is in this package. Not here: the parts themselves, which
know nothing of LaVIT's names, and its diffusion model (`diffusion.py`).
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dyntok.checkpoint.hub import Origin
from dyntok.checkpoint.pretrained import cast, fill, new_on_meta
from dyntok.config import (
    BackboneConfig,
    CodebookConfig,
    ConditioningConfig,
    DecoderConfig,
    MergerConfig,
    TokenizerConfig,
)
from dyntok.errors import CheckpointError, ConfigError
from dyntok.lavit.diffusion import DiffusionDecoder
from dyntok.lavit.understanding import Understanding
from dyntok.model.decoder import Decoder
from dyntok.tokenizer import DynamicVisualTokenizer

RELEASES = ("rain1011/LaVIT-7B-v2",)
FILES = {
    "backbone": "visual_tokenizer/eva_vitg_psz14.bin",
    "encoder": "visual_tokenizer/tokenizer_encoder.bin",
    "decoder": "visual_tokenizer/tokenizer_decoder.bin",
    "highres_decoder": "visual_tokenizer/highres_tokenizer_decoder.bin",
    "understanding": "language_model/visual_weight.bin",
}
PAINTERS = {"decoder": "pixel_decoding", "highres_decoder": "highres_pixel_decoding"}
PARTS = ("decoder", "highres_decoder", "understanding", "pixels")

_CARD = """---
license: llama2
library_name: dyntok
tags: [image-tokenizer, dyntok, lavit]
---
# LaVIT's visual tokenizer as a dyntok checkpoint

The weights of LaVIT (ICLR 2024, arXiv 2309.04669) as its authors released them, from {source}, converted by `dyntok import-lavit`.

**Licence.** These weights are under the LLAMA 2 Community License and its acceptable use policy, as stated by their authors: Llama 2 is
licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved. Whoever passes this folder on passes
the licence on with it. dyntok's own Apache-2.0 licence covers the code that reads the weights, not the weights.
"""

_MLP_RATIO = MergerConfig.mlp_ratio
_PAINTER_FILES = ("unet/*", "vae/*", "scheduler/*", "uncond_embeddings.bin")
_BLOCK = {"norm0": "self_norm", "norm1": "cross_norm", "norm2": "mlp_norm", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}
_MERGER_BLOCK = _BLOCK | {
    "token_causal_attn.qkv": "self_qkv", "token_causal_attn.proj": "self_proj",
    "token_cross_attn.query": "cross_query", "token_cross_attn.proj": "cross_proj",
}  # fmt: skip
_DECODER_BLOCK = _BLOCK | {
    "self_attn.qkv": "self_qkv", "self_attn.proj": "self_proj", "cross_attn.query": "cross_query", "cross_attn.proj": "cross_proj",
}  # fmt: skip
_SELECTOR = {
    "in_conv.0": "norm",
    "in_conv.1": "in_proj",
    "out_conv.0": "hidden1",
    "out_conv.2": "hidden2",
    "out_conv.4": "head",
}


@dataclass(frozen=True)
class Sizes:
    """What the files do not say, `heads` and `vit_heads`, and what they do: None, or a value that must be theirs.

    heads: of merger, decoders and attention pooling; vit_heads: of the backbone. dim, vit_depth, merger_depth, decoder_depth, mlp_hidden:
    widths and depths; grid: patches along a side; patch: pixels along a patch; codebook, code_dim: K and C; llm_dim: of the understanding
    path's tokens.
    """

    heads: int = 16
    vit_heads: int = 16
    dim: int | None = None
    grid: int | None = None
    patch: int | None = None
    vit_depth: int | None = None
    merger_depth: int | None = None
    decoder_depth: int | None = None
    mlp_hidden: int | None = None
    codebook: int | None = None
    code_dim: int | None = None
    llm_dim: int | None = None

    @classmethod
    def of(cls, values: dict[str, Any] | None) -> "Sizes":
        """Raises `ConfigError` on an unknown key or a value that is no positive whole number."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name, value in (values or {}).items():
            if name not in known:
                raise ConfigError(f"config has {name!r}, expected for LaVIT's files some of {', '.join(known)}")
            if type(value) is not int or value < 1:
                raise ConfigError(f"config's {name} is {value!r}, expected a positive whole number")
        return cls(**(values or {}))

    def check(self, file: Path, **found: int) -> None:
        """Raises `ConfigError` where the file has other sizes than were stated."""
        for name, value in found.items():
            if getattr(self, name) not in (None, value):
                raise ConfigError(
                    f"config says {name}: {getattr(self, name)}, but {file} has {value}; leave {name} out or correct it"
                )


def is_release(name_or_path: str | os.PathLike) -> bool:
    """Whether it names LaVIT's released files: a repository of theirs, or a folder laid out like it (which need not be whole)."""
    folder = Path(os.path.expanduser(name_or_path))
    return (
        any((folder / file).is_file() for file in FILES.values()) if folder.is_dir() else str(name_or_path) in RELEASES
    )


def load(
    name_or_path: str | os.PathLike = RELEASES[0],
    *,
    config: dict[str, Any] | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    force_download: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> DynamicVisualTokenizer:
    """LaVIT's tokenizer from its released files: a folder laid out like the repository, or the repository on the hub.

    Now only the backbone and the encoder are fetched (about 3 GB); a decoder, the understanding path and the diffusion models come when
    they are first needed. Sizes are read off the weights. config: see `Sizes`; head counts that are not the released ones must be given.
    dtype: see `DynamicVisualTokenizer.in_precision`.

    Raises `CheckpointError` on a file that can't be had, holds anything but tensors, or lacks a tensor or has one too many; `ConfigError`
    on a config that is not that of the files.
    """
    origin = Origin(name_or_path, revision, local_files_only, token, cache_dir, force_download)
    sizes = Sizes.of(config)
    backbone = _Weights.read(origin.file(FILES["backbone"]))
    origin = origin.pinned(backbone.file)
    encoder = _Weights.read(origin.file(FILES["encoder"]))
    whole = _encoder_config(backbone, encoder, sizes)
    backbone_state, encoder_state = _backbone_state(backbone), _encoder_state(encoder)
    for weights in (backbone, encoder):
        weights.check_all_used()
    tokenizer = new_on_meta(lambda: DynamicVisualTokenizer(whole))
    _fill(tokenizer.backbone.model, backbone_state, backbone.file)
    _fill(
        tokenizer,
        {f"backbone.model.{name}": value for name, value in backbone_state.items()} | encoder_state,
        encoder.file,
    )
    tokenizer.origin, tokenizer.card = origin, _card(origin)
    tokenizer.late_parts = _ReleasedParts(origin, sizes)
    return tokenizer.in_precision(dtype).to(device).eval()


class _ReleasedParts:
    """The parts that encoding does without."""

    def __init__(self, origin: Origin, sizes: Sizes) -> None:
        self.origin, self.sizes = origin, sizes

    def fetch(self, name: str, tokenizer: DynamicVisualTokenizer) -> tuple[dict[str, Any], nn.Module]:
        weights = _Weights.read(self.origin.file(FILES[name]))
        width, section = tokenizer.backbone.embed_dim, {}
        if name == "understanding":
            out_dim = weights.shape("vit_proj.weight")[0]
            self.sizes.check(weights.file, llm_dim=out_dim)
            section = {"understanding_dim": out_dim}
            part = new_on_meta(lambda: Understanding(width, tokenizer.config.merger, out_dim))
            state = _merger_state(weights, "causal_encoder.", "merger.") | weights.renamed("", {"vit_proj": "proj"})
        else:
            section = {name: _decoder_config(weights, self.sizes, width, PAINTERS[name])}
            part = new_on_meta(lambda: Decoder(tokenizer.grid, tokenizer.config.codebook.dim, width, section[name]))
            state = _decoder_state(weights)
        weights.check_all_used()
        _fill(part, state, weights.file)
        return section, cast(part, tokenizer.dtype).to(tokenizer.device).train(tokenizer.training)

    def painter(self, folder: str, device: torch.device, dtype: torch.dtype) -> DiffusionDecoder:
        return DiffusionDecoder.load(
            self.origin.folder(folder, _PAINTER_FILES), pickles=True, device=device, dtype=dtype
        )


class _Weights:
    """The tensors of one file, and which of them have been used."""

    def __init__(self, file: Path, tensors: dict[str, Tensor]) -> None:
        self.file, self.tensors, self.used = file, tensors, set[str]()

    @classmethod
    def read(cls, file: Path) -> "_Weights":
        try:
            try:
                tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # written before PyTorch 1.6: those can't be memory-mapped
                tensors = torch.load(file, map_location="cpu", weights_only=True)
        except OSError as error:
            raise CheckpointError(f"can't read {file}: {error.strerror or error}") from error
        except Exception as error:  # of any type: pickles fail in many ways. PyTorch's advice to load without weights_only is not passed on
            raise CheckpointError(
                f"{file} is damaged or holds more than tensors ({type(error).__name__}); it was not loaded"
            ) from error
        if not isinstance(tensors, dict) or not all(
            isinstance(k, str) and isinstance(v, Tensor) for k, v in tensors.items()
        ):
            raise CheckpointError(f"{file} holds {type(tensors).__name__}, expected a mapping of names to tensors")
        for name, tensor in tensors.items():
            if not tensor.is_floating_point() or tensor.is_meta or tensor.layout != torch.strided:
                raise CheckpointError(
                    f"{file}: {name} is {tensor.dtype} on {tensor.device}, expected dense floating-point values"
                )
        return cls(file, tensors)

    def _find(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise CheckpointError(f"{self.file} lacks the tensor {name}; expected one of LaVIT's released files")
        return self.tensors[name]

    def take(self, name: str) -> Tensor:
        self.used.add(name)
        return self._find(name)

    def shape(self, name: str, dims: int = 2) -> torch.Size:
        shape = self._find(name).shape
        if len(shape) != dims:
            raise CheckpointError(f"{self.file}: {name} has the shape {list(shape)}, expected {dims} dimensions")
        return shape

    def joined(self, *names: str) -> Tensor:
        tensors = [self.take(name) for name in names]
        if len({(t.dim(), t.shape[1:]) for t in tensors}) > 1:
            raise CheckpointError(
                f"{self.file}: {', '.join(names[:4])} have different shapes, expected widths that fit together"
            )
        return torch.cat(tensors)

    def depth(self, prefix: str) -> int:
        """How many blocks there are."""
        numbers = {name.removeprefix(prefix).split(".")[0] for name in self.tensors if name.startswith(prefix)}
        return len(numbers)

    def renamed(self, prefix: str, layers: dict[str, str], to: str = "") -> dict[str, Tensor]:
        """Weight and bias of every layer `prefix + old`, as `to + new`."""
        pairs = [(f"{old}.{kind}", f"{new}.{kind}") for old, new in layers.items() for kind in ("weight", "bias")]
        return {to + new: self.take(prefix + old) for old, new in pairs}

    def check_all_used(self) -> None:
        unexpected = [name for name in self.tensors if name not in self.used]
        if unexpected:
            raise CheckpointError(
                f"{self.file} has {len(unexpected)} tensors that were not expected: {', '.join(unexpected[:5])}"
            )


def _encoder_config(backbone: _Weights, encoder: _Weights, sizes: Sizes) -> TokenizerConfig:
    preset = TokenizerConfig.preset("lavit")
    _, tokens, vit_dim = backbone.shape("pos_embed", 3)
    patch, grid = backbone.shape("patch_embed.proj.weight", 4)[-1], math.isqrt(tokens - 1)
    vit_depth, vit_hidden = backbone.depth("blocks."), backbone.shape("blocks.0.mlp.fc1.weight")[0]
    hidden, dim = encoder.shape("causal_encoder.blocks.0.mlp.fc1.weight")
    depth = encoder.depth("causal_encoder.blocks.")
    codebook, code_dim = encoder.shape("quantize.embedding.weight")
    sizes.check(backbone.file, dim=vit_dim, grid=grid, patch=patch, vit_depth=vit_depth)
    sizes.check(encoder.file, dim=dim, merger_depth=depth, mlp_hidden=hidden, codebook=codebook, code_dim=code_dim)
    released = {"img_size": 224, "patch_size": 14, "embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 6144}
    found = dict(zip(released, (grid * patch, patch, vit_dim, vit_depth, sizes.vit_heads, vit_hidden), strict=True))
    other = {name: value for name, value in found.items() if value != released[name]}
    if "mlp_ratio" in other or "embed_dim" in other:
        other["mlp_ratio"] = (vit_hidden + 0.5) / vit_dim
    return TokenizerConfig(
        image=dataclasses.replace(preset.image, img_size=grid * patch),
        backbone=BackboneConfig(name=preset.backbone.name, kwargs=other),
        merger=MergerConfig(depth=depth, num_heads=sizes.heads, mlp_ratio=_ratio(hidden, dim)),
        codebook=CodebookConfig(size=codebook, dim=code_dim),
        decoder=None,
    )


def _decoder_config(weights: _Weights, sizes: Sizes, width: int, folder: str) -> DecoderConfig:
    hidden, dim = weights.shape("blocks.0.mlp.fc1.weight")
    depth, out_dim = weights.depth("blocks."), weights.shape("decode_task_layer.2.weight")[0]
    sizes.check(weights.file, dim=dim, decoder_depth=depth, mlp_hidden=hidden)
    dims = tuple(weights.shape(f"{layer}.weight")[0] for layer in _prompt_layers(weights))
    pooled = weights.shape("unet_attnpool.c_proj.weight")[0] if len(dims) > 1 else None
    return DecoderConfig(
        embed_dim=None if dim == width else dim,
        out_dim=None if out_dim == width else out_dim,
        depth=depth,
        num_heads=sizes.heads,
        mlp_ratio=_ratio(hidden, dim),
        conditions=ConditioningConfig(dims, pooled_dim=pooled, num_heads=sizes.heads, folder=folder),
    )


def _prompt_layers(weights: _Weights) -> list[str]:
    return ["unet_proj_1", "unet_proj_2"] if "unet_proj_1.weight" in weights.tensors else ["unet_proj"]


def _ratio(hidden: int, dim: int) -> float:
    """A ratio that gives `hidden` channels: int(ratio * dim)."""
    return _MLP_RATIO if int(_MLP_RATIO * dim) == hidden else (hidden + 0.5) / dim


def _backbone_state(weights: _Weights) -> dict[str, Tensor]:
    """In timm's naming, which is the released one. The final norm and the head come after the layer that is read."""
    weights.used |= {name for name in weights.tensors if name.startswith(("norm.", "head."))}
    return {name: weights.take(name) for name in weights.tensors if name not in weights.used}


def _encoder_state(weights: _Weights) -> dict[str, Tensor]:
    return {
        **weights.renamed("token_predictor.", _SELECTOR, "selector."),
        **_merger_state(weights, "causal_encoder.", "merger."),
        **weights.renamed("encode_task_layer.", {"0": "0", "2": "2"}, "projection."),
        "codebook.embedding": weights.take("quantize.embedding.weight"),
    }


def _merger_state(weights: _Weights, prefix: str, to: str) -> dict[str, Tensor]:
    state = weights.renamed(prefix, {"ln_vision": "context_norm", "norm": "norm"}, to)
    depth = weights.depth(f"{prefix}blocks.")
    for i in range(depth):
        state |= weights.renamed(f"{prefix}blocks.{i}.", _MERGER_BLOCK, f"{to}blocks.{i}.")
    for kind in ("weight", "bias"):
        names = [
            f"{prefix}blocks.{i}.token_cross_attn.{which}.{kind}" for i in range(depth) for which in ("key", "value")
        ]
        state[f"{to}context_kv.{kind}"] = weights.joined(*names)
    return state


def _decoder_state(weights: _Weights) -> dict[str, Tensor]:
    layers = {"in_proj": "in_proj", "norm": "head.0", "decode_task_layer.0": "head.1", "decode_task_layer.2": "head.3"}
    state = weights.renamed("", layers)
    state |= {"rank_embed": weights.take("pos_embed")[0], "query_embed": weights.take("query_embed")[0]}
    for i in range(weights.depth("blocks.")):
        state |= weights.renamed(f"blocks.{i}.", _DECODER_BLOCK, f"blocks.{i}.")
        for kind in ("weight", "bias"):
            names = [f"blocks.{i}.cross_attn.{which}.{kind}" for which in ("key", "value")]
            state[f"blocks.{i}.cross_kv.{kind}"] = weights.joined(*names)
    prompt = _prompt_layers(weights)
    state |= weights.renamed("", {layer: f"proj.{i}" for i, layer in enumerate(prompt)}, "conditions.")
    if len(prompt) > 1:
        state |= weights.renamed("unet_attnpool.", {"q_proj": "query", "c_proj": "out"}, "conditions.pool.")
        state["conditions.pool.pos_embed"] = weights.take("unet_attnpool.positional_embedding")
        for kind in ("weight", "bias"):
            state[f"conditions.pool.kv.{kind}"] = weights.joined(
                *(f"unet_attnpool.{which}_proj.{kind}" for which in "kv")
            )
    return state


def _fill(part: nn.Module, state: dict[str, Tensor], file: Path) -> None:
    try:
        fill(part, state, advice="Check heads and vit_heads in config=, or fetch the file again.")
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error


def convert(
    source: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    parts: Sequence[str] | None = None,
    config: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    **options,
) -> DynamicVisualTokenizer:
    """Write the released files as an ordinary checkpoint, with the licence note that must stay with it; returns the tokenizer.

    parts: of `PARTS`, what to take besides the encoder; None: all there is. "pixels" are the diffusion models of the decoders taken (extra
    `diffusion`). dtype: of most weights, see `DynamicVisualTokenizer.in_precision`. Other options are those of `load`.

    Raises as `load` does, `ConfigError` on an unknown part, pixels without a decoder or a folder that holds released files, and
    `CheckpointError` where the folder can't be written.
    """
    unknown = sorted(set(parts or ()) - set(PARTS))
    if unknown:
        raise ConfigError(f"there is no part {', '.join(unknown)}; expected some of {', '.join(PARTS)}")
    if parts is not None and "pixels" in parts and not set(parts) & set(PAINTERS):
        raise ConfigError(f"pixels were asked for without a decoder; add {' or '.join(PAINTERS)}")
    if is_release(folder):
        raise ConfigError(
            f"{folder} holds released files, which would shadow the new checkpoint; write it to another folder"
        )
    tokenizer, folder = load(source, config=config, dtype=dtype, **options), Path(folder)
    origin = tokenizer.origin

    def wanted(name: str, path: str) -> bool:
        return name in parts if parts is not None else origin.path is None or (origin.path / path).exists()

    taken = [name for name in ("decoder", "highres_decoder", "understanding") if wanted(name, FILES[name])]
    for name in taken:
        tokenizer.part(name)
    painters = [painter for name, painter in PAINTERS.items() if name in taken and wanted("pixels", painter)]
    for painter in painters:  # first, because more can go wrong here
        tokenizer.late_parts.painter(painter, torch.device("cpu"), dtype).save(folder / painter)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _card(origin: Origin) -> str:
    where = "a local copy" if origin.path is not None else f"{origin.name_or_path} at {origin.revision}"
    return _CARD.format(source=where)
