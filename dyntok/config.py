"""The configuration of a tokenizer and the named presets.

Small frozen dataclasses, checked when they are made, and plain JSON on disk.
Not here: how to train a tokenizer (`dyntok/training/recipes/*.yaml`).
"""

import copy
import dataclasses
import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from typing_extensions import Self

from dyntok.errors import ConfigError
from dyntok.layout import MAX_SIDE
from dyntok.structure import MAX_COUNT, brief, build, is_number, require, require_bool, require_whole, stated

OPENAI_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


MAX_PATCHES = 4096  # of one picture
_MAX_SIDE = 1 << 14  # pixels
_MAX_TEXT = 64  # characters of a backbone's option

# Options of timm.create_model that read files, reach the network or change what the model returns.
_REFUSED_OPTIONS = {
    "cache_dir",
    "checkpoint_path",
    "exportable",
    "feature_cfg",
    "feature_cls",
    "features_only",
    "kwargs_filter",
    "model_cfg",
    "num_classes",
    "out_indices",
    "scriptable",
}


@dataclass(frozen=True)
class ImageConfig:
    """How a picture becomes a normalized float tensor [3, H, W].

    Without `max_patches` every picture becomes the square of `img_size`. With it, pictures have grids of their own.

    resize: "keep" keeps the whole picture and its aspect ratio, and chooses a grid that suits it. The others fit it to
        a rectangle: "crop" cuts its center, "squash" stretches it, "pad" adds white borders.
    """

    img_size: int = 224
    resize: Literal["crop", "squash", "pad", "keep"] = "crop"
    max_patches: int | None = None  # of one picture, 64 to 4,096; needs a backbone and decoder that take any grid
    patch_size: int | None = None  # of the backbone, in pixels; needed with max_patches
    size: tuple[int, int] | None = None  # (height, width) of the rectangle in pixels, where it is not a square
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    color: Literal["ignore", "srgb"] = "ignore"  # of embedded ICC profiles: ignore them, or convert to sRGB by them
    # scaled: JPEG files are decoded at 1/2, 1/4 or 1/8, never below twice the size that they get; None: in full
    decoding: Literal["scaled"] | None = None

    def __post_init__(self) -> None:
        require_whole("image.img_size", self.img_size, 1, _MAX_SIDE)
        self._require_shape()
        require(self.color in ("ignore", "srgb"), f"image.color is {brief(self.color)}, expected 'ignore' or 'srgb'")
        require(
            self.decoding in ("scaled", None), f"image.decoding is {brief(self.decoding)}, expected 'scaled' or null"
        )
        for name in ("mean", "std"):
            value = getattr(self, name)
            wanted = f"image.{name} is {brief(value)}, expected three numbers, one for each of R, G, B"
            require(isinstance(value, tuple | list) and len(value) == 3 and all(map(is_number, value)), wanted)
            object.__setattr__(self, name, tuple(float(v) for v in value))
        require(min(self.std) > 0, f"image.std is {self.std}, expected positive values")

    def _require_shape(self) -> None:
        kinds = ("crop", "squash", "pad", "keep")
        require(self.resize in kinds, f"image.resize is {brief(self.resize)}, expected one of {', '.join(kinds)}")
        if self.max_patches is None:
            given = self.resize == "keep" or self.size is not None
            require(not given, "image.resize: keep and image.size need image.max_patches, which is not set")
            return
        require_whole("image.max_patches", self.max_patches, 64, MAX_PATCHES)
        require_whole("image.patch_size", self.patch_size, 1, _MAX_SIDE)
        if self.size is None:
            return
        patch = self.patch_size
        pair = isinstance(self.size, tuple | list) and len(self.size) == 2 and all(type(n) is int for n in self.size)
        fits = pair and all(n >= patch and n % patch == 0 for n in self.size)
        fits = fits and max(self.size) <= MAX_SIDE * patch and self.size[0] * self.size[1] <= MAX_PATCHES * patch**2
        expected = f"expected (height, width), multiples of {patch} pixels, at most {MAX_PATCHES:,} patches in all"
        require(fits, f"image.size is {brief(self.size)}, {expected} and {MAX_SIDE} along a side")
        object.__setattr__(self, "size", tuple(self.size))


@dataclass(frozen=True)
class BackboneConfig:
    """A timm model, by name, and which of its layers gives the patch features.

    kwargs go to timm.create_model: img_size, patch_size, depth, ... Only numbers, bools, short strings, None and lists
    of numbers, and no option that reads files or reaches the network: a configuration may come from a stranger.
    """

    name: str = "vit_small_patch16_224"
    kwargs: dict[str, Any] = field(default_factory=dict)
    layer: int = -1  # index into the model's intermediate features, as in timm's forward_intermediates
    norm: bool = False  # apply the model's final norm to them
    frozen: bool = True

    def __post_init__(self) -> None:
        plain = isinstance(self.name, str) and re.fullmatch(r"[A-Za-z0-9_.-]{1,128}", self.name)
        require(
            bool(plain),
            f"backbone.name is {brief(self.name)}, expected the plain name of a timm model, without source or path",
        )
        require(
            isinstance(self.kwargs, dict), f"backbone.kwargs is {brief(self.kwargs)}, expected a mapping of options"
        )
        object.__setattr__(self, "kwargs", dict(self.kwargs))  # so that the caller's can change
        for option, value in self.kwargs.items():
            refused = not isinstance(option, str) or option in _REFUSED_OPTIONS or option.startswith("pretrained")
            require(
                not refused, f"backbone.kwargs has {brief(option)}, which a configuration may not set; leave it out"
            )
            require(
                _is_plain(value),
                f"backbone.kwargs.{option} is {brief(value)}, expected a number, bool, short text or list of numbers",
            )
        if self.kwargs.get("num_heads") is not None:  # timm builds a network that fails later
            heads = self.kwargs["num_heads"]
            for number in heads if isinstance(heads, list | tuple) else [heads]:  # some have a number for each stage
                require_whole("backbone.kwargs.num_heads", number, 1)
        require_whole("backbone.layer", self.layer, -MAX_COUNT)
        require_bool("backbone.norm", self.norm)
        require_bool("backbone.frozen", self.frozen)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= _MAX_TEXT and all(map(is_number, value))
    return (
        value is None
        or isinstance(value, bool)
        or isinstance(value, str)
        and len(value) <= _MAX_TEXT
        or is_number(value)
    )


@dataclass(frozen=True)
class SelectorConfig:
    """The head that scores patches."""

    dither: float = 0.0  # amplitude of the position bias, in logits; 0: no position bias
    bias: Literal["table", "fixed"] = "table"  # a learned bias per patch of one grid, or an ordered dither of any grid
    first: float = 0.0  # logits that a fixed bias adds at the first patch of every 2 x 2 cell
    places: Literal["free", "map", "lattice"] = "free"  # which masks are allowed; see dyntok/layout.py

    def __post_init__(self) -> None:
        require(self.bias in ("table", "fixed"), f"selector.bias is {brief(self.bias)}, expected 'table' or 'fixed'")
        require(
            self.places in ("free", "map", "lattice"),
            f"selector.places is {brief(self.places)}, expected 'free', 'map' or 'lattice'",
        )
        for name, value in (("dither", self.dither), ("first", self.first)):
            require(
                is_number(value) and value >= 0, f"selector.{name} is {brief(value)}, expected a number of 0 or more"
            )
        require(
            not self.first or (self.dither > 0 and self.bias == "fixed"),
            f"selector.first is {brief(self.first)}, which needs a dither above 0 and bias: fixed",
        )


@dataclass(frozen=True)
class MergerConfig:
    """What folds dropped patches into kept ones.

    kind: "blocks" are attention blocks (paper section 3.1). "similar" averages the most similar patches; it has no
        parameters, and the other options mean nothing.
    """

    depth: int = 12
    num_heads: int = 16
    mlp_ratio: float = 4.3637
    norm: bool = True  # final LayerNorm
    init_scale: float = 1.0  # factor on the output layer of every residual branch at the start of training
    kind: Literal["blocks", "similar"] = "blocks"
    position: Literal["none", "rotary"] = "none"  # rotary: attention knows where patches lie, on any grid

    def __post_init__(self) -> None:
        _check_blocks("merger", self)
        require(
            self.position in ("none", "rotary"),
            f"merger.position is {brief(self.position)}, expected 'none' or 'rotary'",
        )
        require(
            self.kind in ("blocks", "similar"), f"merger.kind is {brief(self.kind)}, expected 'blocks' or 'similar'"
        )
        require_bool("merger.norm", self.norm)


def _check_blocks(section: str, config: "MergerConfig | DecoderConfig") -> None:
    require_whole(f"{section}.depth", config.depth, 0)
    require_whole(f"{section}.num_heads", config.num_heads, 1)
    require(
        is_number(config.mlp_ratio) and config.mlp_ratio > 0,
        f"{section}.mlp_ratio is {brief(config.mlp_ratio)}, expected a positive number",
    )
    require(is_number(config.init_scale), f"{section}.init_scale is {brief(config.init_scale)}, expected a number")


@dataclass(frozen=True)
class CodebookConfig:
    """K codes of dimension C, and the projection (the paper's task layer) that leads to them."""

    size: int = 16384
    dim: int = 32
    projection: Literal["mlp", "linear"] = "mlp"  # mlp: Linear, Tanh, Linear as in LaVIT

    def __post_init__(self) -> None:
        require_whole("codebook.size", self.size, 1)
        require_whole("codebook.dim", self.dim, 1)
        require(
            self.projection in ("mlp", "linear"),
            f"codebook.projection is {self.projection!r}, expected 'mlp' or 'linear'",
        )


@dataclass(frozen=True)
class DecoderConfig:
    """The blocks that turn code vectors back into features of all N patches."""

    embed_dim: int | None = None  # None: the backbone's width
    out_dim: int | None = None  # of the features it makes (with head "mlp"); None: the backbone's width
    depth: int = 12
    num_heads: int = 16
    mlp_ratio: float = 4.3637
    placement: Literal["rank", "grid"] = (
        "rank"  # rank: queries read tokens by cross-attention, as in LaVIT; grid: tokens lie on the grid
    )
    conv: bool = False  # a depth-wise 3x3 convolution in every block
    head: Literal["mlp", "none"] = "mlp"  # mlp: norm, Linear, Tanh, Linear as in LaVIT; none: the last block's output
    pixels: bool = False  # features -> image with the pixel head (pixels.py)
    init_scale: float = 1.0
    position: Literal["table", "rotary"] = "table"  # a learned query per patch of one grid, or rotary for any grid

    def __post_init__(self) -> None:
        _check_blocks("decoder", self)
        for name in ("embed_dim", "out_dim"):
            if getattr(self, name) is not None:
                require_whole(f"decoder.{name}", getattr(self, name), 1)
        require(not (self.out_dim and self.head == "none"), "decoder.out_dim needs decoder.head: mlp")
        require(
            self.position == "table" or (self.position == "rotary" and self.placement == "grid"),
            f"decoder.position is {brief(self.position)}, expected 'table', or 'rotary' with placement: grid",
        )
        require_bool("decoder.conv", self.conv)
        require_bool("decoder.pixels", self.pixels)
        require(
            self.placement in ("rank", "grid"), f"decoder.placement is {self.placement!r}, expected 'rank' or 'grid'"
        )
        require(self.head in ("mlp", "none"), f"decoder.head is {self.head!r}, expected 'mlp' or 'none'")


@dataclass(frozen=True)
class TokenizerConfig:
    """Everything that defines a tokenizer, apart from its weights.

    >>> TokenizerConfig.preset("tiny").codebook.size
    8192
    >>> TokenizerConfig.from_dict({"codebook": {"size": 1024, "dim": 8}}).codebook.dim
    8
    """

    image: ImageConfig = field(default_factory=ImageConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    selector: SelectorConfig = field(default_factory=SelectorConfig)
    merger: MergerConfig = field(default_factory=MergerConfig)
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    decoder: DecoderConfig | None = field(default_factory=DecoderConfig)  # None: it only encodes

    def __post_init__(self) -> None:
        kinds = (ImageConfig, BackboneConfig, SelectorConfig, MergerConfig, CodebookConfig, DecoderConfig)
        for name, kind in zip(("image", "backbone", "selector", "merger", "codebook", "decoder"), kinds, strict=True):
            value = getattr(self, name)
            valid = isinstance(value, kind) or (value is None and name == "decoder")
            expected = f"a {kind.__name__}; TokenizerConfig.from_dict takes mappings"
            require(valid, f"{name} is {brief(value)}, expected {expected}")

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON types only; `from_dict` is its inverse."""
        return dataclasses.asdict(self)

    def stated(self) -> dict[str, Any]:
        """Returns `to_dict` without default values: the result stays the same when later versions add options."""
        return stated(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Raises `ConfigError` on an unknown section or key, and on a value out of range."""
        return build(cls, values)

    @classmethod
    def preset(cls, name: str) -> "TokenizerConfig":
        """Returns one of `PRESETS`: tiny, flex, small, lavit. Raises `ConfigError` on another name."""
        if not isinstance(name, str) or name not in PRESETS:
            raise ConfigError(f"there is no preset {name!r}; expected one of {', '.join(PRESETS)}")
        return copy.deepcopy(PRESETS[name])  # options of the backbone can be changed in place


_TINY = TokenizerConfig(
    image=ImageConfig(img_size=128),
    backbone=BackboneConfig(
        name="vit_tiny_patch16_224",
        kwargs=dict(
            img_size=128,
            patch_size=8,
            embed_dim=192,
            depth=4,
            num_heads=3,
            init_values=0.1,
            class_token=False,
            global_pool="avg",
        ),
        frozen=False,
    ),
    selector=SelectorConfig(dither=4.0),
    merger=MergerConfig(depth=2, num_heads=3, mlp_ratio=4.0, norm=False, init_scale=0.1),
    codebook=CodebookConfig(size=8192, dim=16, projection="linear"),
    decoder=DecoderConfig(
        depth=4, num_heads=3, mlp_ratio=4.0, placement="grid", conv=True, head="none", pixels=True, init_scale=0.0
    ),
)

PRESETS = {
    "tiny": _TINY,
    "flex": replace(
        _TINY,
        image=ImageConfig(img_size=128, resize="keep", max_patches=256, patch_size=8, color="srgb"),
        backbone=replace(
            _TINY.backbone,
            name="vit_small_patch16_rope_224",
            kwargs={**_TINY.backbone.kwargs, "dynamic_img_size": True},
        ),
        selector=replace(_TINY.selector, bias="fixed", first=1.0, places="map"),
        merger=replace(_TINY.merger, position="rotary"),
        codebook=replace(_TINY.codebook, size=16384),
        decoder=replace(_TINY.decoder, depth=8, position="rotary"),
    ),
    "small": TokenizerConfig(
        backbone=BackboneConfig(name="vit_small_patch16_224"),
        merger=MergerConfig(depth=4, num_heads=6, mlp_ratio=4.0),
        codebook=CodebookConfig(size=8192, dim=32),
        decoder=DecoderConfig(depth=4, num_heads=6, mlp_ratio=4.0),
    ),
    "lavit": TokenizerConfig(
        image=ImageConfig(img_size=224, resize="squash", mean=OPENAI_CLIP_MEAN, std=OPENAI_CLIP_STD),
        backbone=BackboneConfig(name="eva_giant_patch14_clip_224"),
        merger=MergerConfig(depth=12, num_heads=16),
        codebook=CodebookConfig(size=16384, dim=32),
        decoder=DecoderConfig(depth=12, num_heads=16),
    ),
}
