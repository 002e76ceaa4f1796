"""A recipe: everything that defines a training run, read from a YAML file and checked before the run starts."""

import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from dyntok.config import TokenizerConfig
from dyntok.errors import ConfigError
from dyntok.structure import build, require
from dyntok.training.grids import Grids
from dyntok.training.stage import Stage

RECIPES = Path(__file__).parent / "recipes"

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")
_RENAMED = {"linear_start": "pca_init"}  # keys of earlier versions


@dataclass(frozen=True)
class Teacher:
    """A fixed timm network whose features guide the training."""

    name: str = ""
    weights: str = "hub"  # "hub", or a safetensors file
    kwargs: dict[str, Any] = field(default_factory=dict)  # for timm.create_model
    layers: tuple[int, ...] = ()  # indices of the feature maps that are used; empty: all
    sizes: tuple[int, ...] = ()  # sides in pixels, one drawn per step: pictures get the area of its square
    share: float = 1.0  # of each batch's pictures that the teacher sees, at least four

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "sizes", tuple(self.sizes))
        valid = all(size >= 1 for size in self.sizes)
        require(valid, f"teacher.sizes are {self.sizes}, expected sides of at least 1 pixel")
        require(0 < self.share <= 1, f"teacher.share is {self.share}, expected a share in (0, 1]")


@dataclass(frozen=True)
class Recipe:
    """A training run. Texts may contain environment variables, as $NAME or ${NAME}."""

    description: str = ""  # what the recipe makes and how long it takes; printed when a run begins
    tokenizer: dict[str, Any] = field(
        default_factory=lambda: {"preset": "tiny"}
    )  # a preset, and sections replacing its own
    backbone_weights: str = ""  # "" (random), "hub" or a safetensors file
    data: tuple[str, ...] = ()  # folders of images, tars; with `stream` also Parquet files, and fsspec addresses
    stream: int = 0  # reads shards from front to back, and draws from a buffer of so many images; 0: lists images first
    split: Literal["all", "train", "validation"] = "train"
    min_crop: float = 0.8  # smallest random crop, as a share of the sides of the largest one
    grids: Grids | None = None  # a grid for each batch; needs a tokenizer that takes any (image.max_patches)
    teacher: Teacher = field(default_factory=Teacher)
    stages: tuple[Stage, ...] = ()
    batch_size: int = 32  # images per step and process; with grids, of images of the tokenizer's square grid
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the processor is fast at it
    accumulate: int = 1  # batches per step and process whose gradients are averaged, where memory is small
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of transformer blocks
    pca_init: bool = False  # start as a linear (PCA) codec, see pca_init.py
    weight_decay: float = 0.02
    ema: float = 0.0  # decay of a moving average of the weights, which becomes the result; 0: the weights themselves
    seed: int = 0
    workers: int = 1  # processes that load images; 0: none
    log_every: int = 20  # steps between two lines of log.jsonl
    save_minutes: float = 10.0  # time between two checkpoints; each stage ends with one, too
    save_every: int = 0  # also save after this number of steps; 0: by time only
    validate_every: int = 0  # steps between two measurements on the validation part; the best weights stay in `best`
    validation_images: int = 64  # for each of them, spread evenly over that part
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()  # get the lines of the log, too

    def __post_init__(self) -> None:
        require(not isinstance(self.data, str | Path), f"data is {self.data!r}, expected a list of folders or tars")
        object.__setattr__(self, "data", tuple(self.data))
        object.__setattr__(self, "stages", tuple(self.stages))
        stages = self.stages
        require(bool(stages), "the recipe has no stages, expected at least one under `stages`")
        require(bool(self.data), "the recipe names no data; pass --data FOLDER, or list folders or tars under `data`")
        object.__setattr__(self, "trackers", tuple(self.trackers))
        ones, zeros = ("batch_size", "accumulate", "log_every", "validation_images"), ("save_minutes", "save_every")
        lowest = dict.fromkeys(ones, 1) | dict.fromkeys(
            (*zeros, "workers", "weight_decay", "validate_every", "stream"), 0
        )
        for name, low in lowest.items():
            value = getattr(self, name)
            require(value >= low, f"{name} is {value}, expected {low} or more")
        require(0 <= self.ema < 1, f"ema is {self.ema}, expected a decay from 0 to below 1, such as 0.999")
        require(0 < self.min_crop <= 1, f"min_crop is {self.min_crop}, expected a share of the short side in (0, 1]")
        require(0 <= self.seed < 2**31, f"seed is {self.seed}, expected 0 to {2**31 - 1}")
        held_out = not self.validate_every or self.split == "train"
        require(held_out, f"validate_every needs split: train, which leaves pictures out; it is {self.split}")
        quantize = [stage.quantize for stage in stages]
        message = "a stage without quantize follows a stage with it; quantization can't be switched off again"
        require(quantize == sorted(quantize), message)
        needs_teacher = any(stage.weights.needs_teacher for stage in stages)
        message = "perceptual, recognition, semantic and distill losses need teacher.name (a timm model)"
        require(bool(self.teacher.name) or not needs_teacher, message)
        compares = any(stage.weights.recognition for stage in stages)
        message = "the recognition loss compares the pictures of a batch; set batch_size to 2 or more"
        require(self.batch_size > 1 or not compares, message)
        config = self.config  # refuses an invalid tokenizer
        remedy = "remove grids, or choose a tokenizer with image.max_patches"
        fits = self.grids is None or config.image.max_patches is not None
        require(fits, f"the recipe has grids, but its tokenizer takes squares of {config.image.img_size} px; {remedy}")

    @property
    def config(self) -> TokenizerConfig:
        """Returns the tokenizer's configuration in full."""
        sections = dict(self.tokenizer)
        base = TokenizerConfig.preset(str(sections.pop("preset"))).to_dict() if "preset" in sections else {}
        for name, values in sections.items():
            base[name] = {**base.get(name, {}), **values} if isinstance(values, dict) else values
        return TokenizerConfig.from_dict(base)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain types only, with the tokenizer's configuration in full."""
        return dataclasses.asdict(self) | {"tokenizer": self.config.to_dict()}

    @classmethod
    def find(cls, name: str | Path, *, data: Sequence[str] = ()) -> "Recipe":
        """Loads a YAML file, or one of the package's recipes by its name, such as "quickstart".

        data: replaces the recipe's own data.

        Raises `ConfigError` if there is no such recipe, and as `load`.
        """
        bundled = {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}
        path = Path(name)
        if not path.exists() and str(name) not in bundled:
            raise ConfigError(f"there is no recipe {name}; expected a YAML file or one of {', '.join(bundled)}")
        return cls.load(path if path.is_file() else bundled.get(str(name), path), data=data)

    @classmethod
    def load(cls, path: str | Path, *, data: Sequence[str] = ()) -> "Recipe":
        """Loads a YAML file; `data` replaces the recipe's own.

        Raises `ConfigError` on a file that can't be read, an unknown key, a wrong type or value, or an environment
        variable that is not set.
        """
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"can't read the recipe {path}: {error}") from error
        if data and isinstance(values, dict):
            values = values | {"data": list(data)}
        try:
            _refuse_renamed(values)
            return build(cls, _expand(values), what="the recipe")
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


def _refuse_renamed(values: Any) -> None:
    for old, new in _RENAMED.items():
        if isinstance(values, dict) and old in values:
            raise ConfigError(f"{old} is now called {new}; rename the key")


def _expand(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _expand(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_expand(value) for value in values]
    return _VARIABLE.sub(_variable, values) if isinstance(values, str) else values


def _variable(match: re.Match) -> str:
    name = match[1] or match[2]
    if not os.environ.get(name):
        raise ConfigError(f"the recipe uses the environment variable {name}, which is not set (or empty)")
    return os.environ[name]
