"""The configuration of LaVIT's networks, read off the shapes of the released weights."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyntok.config import BackboneConfig, CodebookConfig, MergerConfig, TokenizerConfig
from dyntok.errors import ConfigError
from dyntok.lavit.config import ConditioningConfig, LavitConfig, LavitDecoderConfig
from dyntok.lavit.weights import ReleasedWeights

_MLP_RATIO = MergerConfig.mlp_ratio


@dataclass(frozen=True)
class Sizes:
    """Sizes of the networks.

    The head counts cannot be read off the weights. Of the other sizes, those that are given are checked.

    heads: of merger, decoders and attention pooling; vit_heads: of the backbone. dim, vit_depth, merger_depth,
    decoder_depth, mlp_hidden: widths and depths. grid: patches along a side; patch: pixels along a patch. codebook,
    code_dim: K and C. llm_dim: width of the understanding path's tokens.
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
    def of(cls, values: Mapping[str, Any] | None) -> "Sizes":
        """Raises `ConfigError` on an unknown key or a value that is no positive whole number."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name, value in (values or {}).items():
            if name not in known:
                raise ConfigError(f"config has {name!r}, expected for LaVIT's files some of {', '.join(known)}")
            if type(value) is not int or value < 1:
                raise ConfigError(f"config's {name} is {value!r}, expected a positive whole number")
        return cls(**(values or {}))

    def check(self, file: Path, **found: int) -> None:
        """Raises `ConfigError` where the file has other sizes than were given."""
        for name, value in found.items():
            given = getattr(self, name)
            if given not in (None, value):
                raise ConfigError(
                    f"config says {name}: {given}, but {file} has {value}; leave {name} out or correct it"
                )


def encoder_config(backbone: ReleasedWeights, encoder: ReleasedWeights, sizes: Sizes) -> LavitConfig:
    """Returns the configuration of everything that makes codes."""
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
    other: dict[str, Any] = {name: value for name, value in found.items() if value != released[name]}
    if "mlp_ratio" in other or "embed_dim" in other:
        other["mlp_ratio"] = (vit_hidden + 0.5) / vit_dim
    return LavitConfig(
        image=dataclasses.replace(preset.image, img_size=grid * patch),
        backbone=BackboneConfig(name=preset.backbone.name, kwargs=other),
        merger=MergerConfig(depth=depth, num_heads=sizes.heads, mlp_ratio=_ratio(hidden, dim)),
        codebook=CodebookConfig(size=codebook, dim=code_dim),
    )


def decoder_config(weights: ReleasedWeights, sizes: Sizes, width: int, folder: str) -> LavitDecoderConfig:
    """Returns the configuration of a decoder; width: of the backbone; folder: of its diffusion model."""
    hidden, dim = weights.shape("blocks.0.mlp.fc1.weight")
    depth, out_dim = weights.depth("blocks."), weights.shape("decode_task_layer.2.weight")[0]
    sizes.check(weights.file, dim=dim, decoder_depth=depth, mlp_hidden=hidden)
    dims = tuple(weights.shape(f"{layer}.weight")[0] for layer in prompt_layers(weights))
    pooled = weights.shape("unet_attnpool.c_proj.weight")[0] if len(dims) > 1 else None
    return LavitDecoderConfig(
        embed_dim=None if dim == width else dim,
        out_dim=None if out_dim == width else out_dim,
        depth=depth,
        num_heads=sizes.heads,
        mlp_ratio=_ratio(hidden, dim),
        conditions=ConditioningConfig(dims, pooled_dim=pooled, num_heads=sizes.heads, folder=folder),
    )


def prompt_layers(weights: ReleasedWeights) -> list[str]:
    """Returns the names of the layers that make prompt embeddings; the decoder for larger pictures has two."""
    return ["unet_proj_1", "unet_proj_2"] if "unet_proj_1.weight" in weights.tensors else ["unet_proj"]


def _ratio(hidden: int, dim: int) -> float:
    """Returns a ratio that gives `hidden` channels, which are int(ratio * dim)."""
    return _MLP_RATIO if int(_MLP_RATIO * dim) == hidden else (hidden + 0.5) / dim
