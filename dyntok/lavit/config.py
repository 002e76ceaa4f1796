"""The configuration of `LavitTokenizer`: what a tokenizer has, and the parts that only LaVIT has."""

import re
from dataclasses import dataclass

from dyntok.config import DecoderConfig, TokenizerConfig
from dyntok.structure import brief, require, require_whole

_MAX_EMBEDDINGS = 64


@dataclass(frozen=True)
class ConditioningConfig:
    """What a diffusion U-Net reads in place of a text prompt (extra `diffusion`).

    It is computed from the decoder's features.
    """

    embed_dims: tuple[int, ...] = (768,)  # a linear layer for each; concatenated they are the prompt embeddings
    pooled_dim: int | None = None  # width of the pooled embedding for SDXL's U-Net; None: there is none
    num_heads: int = 16  # of the attention pooling
    folder: str = "pixel_decoding"  # of the U-Net, VAE and scheduler, next to the checkpoint

    def __post_init__(self) -> None:
        dims = self.embed_dims
        some = isinstance(dims, tuple | list) and 0 < len(dims) <= _MAX_EMBEDDINGS
        require(some, f"conditions.embed_dims is {brief(dims)}, expected a list of widths")
        object.__setattr__(self, "embed_dims", tuple(dims))
        for dim in dims:
            require_whole("conditions.embed_dims", dim, 1)
        if self.pooled_dim is not None:
            require_whole("conditions.pooled_dim", self.pooled_dim, 1)
        require_whole("conditions.num_heads", self.num_heads, 1)
        plain = isinstance(self.folder, str) and re.fullmatch(r"\w[\w-]{0,63}", self.folder)
        expected = "expected the plain name of a folder next to the checkpoint"
        require(bool(plain), f"conditions.folder is {brief(self.folder)}, {expected}")


@dataclass(frozen=True)
class LavitDecoderConfig(DecoderConfig):
    """A decoder whose features may become the conditioning of a diffusion model."""

    conditions: ConditioningConfig | None = None  # the name in config.json

    def __post_init__(self) -> None:
        super().__post_init__()
        both = self.pixels and self.conditions is not None
        require(not both, "decoder has pixels and conditions, expected one way to make images")


@dataclass(frozen=True)
class LavitConfig(TokenizerConfig):
    """Everything that defines a `LavitTokenizer`, apart from its weights."""

    decoder: LavitDecoderConfig | None = None  # None: not there, or not fetched yet
    highres_decoder: LavitDecoderConfig | None = None  # a second decoder, for larger pictures
    understanding_dim: int | None = None  # width of the understanding path's tokens; None: there is no such path

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.understanding_dim is not None:
            require_whole("understanding_dim", self.understanding_dim, 1)
        highres = self.highres_decoder
        pixels = highres is not None and highres.pixels
        require(not pixels, "highres_decoder.pixels is true, but only the decoder can have a pixel head")
