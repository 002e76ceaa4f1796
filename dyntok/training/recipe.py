"""A recipe: everything a training run is made of, from one YAML file, checked before anything starts."""

import dataclasses
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from dyntok.config import TokenizerConfig
from dyntok.errors import ConfigError
from dyntok.training.typed import build

RECIPES = Path(__file__).parent / "recipes"
PARTS = ("backbone", "selector", "merger", "projection", "codebook", "decoder", "pixel_head")

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class Weights:
    """Factors of the losses; 0 leaves a loss out."""

    pixel: float = 0.0  # mean squared error of normalized pixels
    feature: float = 0.0  # cosine to the backbone's features (LaVIT)
    perceptual: float = 0.0  # distance of the teacher's feature maps
    perceptual_unplaced: float = (
        1.0  # its share on images that are decoded without positions: what is in another place can't look alike
    )
    recognition: float = 0.0  # distance of the teacher's pooled features: is it still the same picture to it?
    recognition_unplaced: float = 1.0  # its share on images that are decoded without positions
    semantic: float = 0.0  # teacher's pooled features from the mean code vector
    commitment: float = 0.25
    rate: float = 2.0
    local: float = 0.0  # scores follow the error that random masks leave; needs random masks

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            _check(value >= 0, f"weights.{name} is {value}, expected 0 or more")

    @property
    def teaches(self) -> bool:
        """Whether any loss looks through the teacher."""
        return self.perceptual + self.recognition + self.semantic > 0


@dataclass(frozen=True)
class Masks:
    """Shares of batches whose keep masks are: the learned choice (sampled), the best by score under a random budget, random ones."""

    learned: float = 1.0
    budget: float = 0.0
    random: float = 0.0

    def __post_init__(self) -> None:
        shares = self.learned, self.budget, self.random
        right = min(shares) >= 0 and sum(shares) > 0
        _check(right, f"masks are {shares} (learned, budget, random), expected shares of 0 or more, not all 0")


@dataclass(frozen=True)
class Stage:
    """One part of a run. Quantization begins, with k-means, at the first stage that has `quantize`."""

    name: str = ""
    images: int = 0
    lr: float = 1e-3
    warmup: int = 0  # images over which the learning rate rises
    decay: Literal["constant", "linear"] = "constant"  # linear: down to nothing at the end of the stage
    quantize: bool = False
    rho: float = 1 / 3  # wanted share of kept patches
    budgets: tuple[float, float] = (0.1, 1.0)  # range of random budgets, as a share of the patches (log-uniform)
    position_drop: float = 0.0  # share of images decoded without positions
    freeze: tuple[str, ...] = ()  # of `PARTS`, those that are not trained
    weights: Weights = field(default_factory=Weights)
    masks: Masks = field(default_factory=Masks)

    def __post_init__(self) -> None:
        object.__setattr__(self, "budgets", tuple(self.budgets))
        object.__setattr__(self, "freeze", tuple(self.freeze))
        name = f"stage {self.name!r}"
        _check(
            self.images >= 1 and self.lr > 0,
            f"{name} has images {self.images} and lr {self.lr}, expected both to be positive",
        )
        _check(self.warmup >= 0, f"{name} has warmup {self.warmup}, expected 0 or more images")
        _check(0 < self.rho <= 1, f"{name} has rho {self.rho}, expected a share in (0, 1]")
        _check(
            0 <= self.position_drop <= 1, f"{name} has position_drop {self.position_drop}, expected a share from 0 to 1"
        )
        right = len(self.budgets) == 2 and 0 < self.budgets[0] <= self.budgets[1] <= 1
        _check(right, f"{name} has budgets {self.budgets}, expected [low, high] within (0, 1]")
        reconstructs = self.weights.pixel + self.weights.feature + self.weights.perceptual > 0
        _check(
            reconstructs,
            f"{name} has no loss on the reconstruction; give weights.pixel, feature or perceptual a positive value",
        )
        wrong = sorted(set(self.freeze) - set(PARTS))
        _check(not wrong, f"{name} freezes {', '.join(wrong)}, expected some of {', '.join(PARTS)}")


@dataclass(frozen=True)
class Teacher:
    """A fixed timm network whose features guide the training. weights: "hub" or a safetensors file."""

    name: str = ""
    weights: str = "hub"
    kwargs: dict[str, Any] = field(default_factory=dict)
    layers: tuple[int, ...] = ()  # indices of its intermediate features; none: all
    sizes: tuple[
        int, ...
    ] = ()  # sides in pixels that pictures are scaled to before it looks, one drawn per step; none: as they are

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "sizes", tuple(self.sizes))
        _check(
            all(size >= 1 for size in self.sizes), f"teacher.sizes are {self.sizes}, expected sides of at least 1 pixel"
        )


@dataclass(frozen=True)
class Recipe:
    """A training run. Environment variables in text are filled in ($NAME or ${NAME}).

    tokenizer: {"preset": name} and/or sections of `TokenizerConfig` that override it. backbone_weights: "", "hub" or a safetensors file.
    """

    tokenizer: dict[str, Any] = field(default_factory=lambda: {"preset": "tiny"})
    backbone_weights: str = ""
    data: tuple[str, ...] = ()
    split: Literal["all", "train", "validation"] = "train"
    min_crop: float = 0.8
    teacher: Teacher = field(default_factory=Teacher)
    stages: tuple[Stage, ...] = ()
    batch_size: int = 32  # per process
    precision: Literal["no", "bf16"] = "no"
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of transformer blocks
    pca_init: bool = False  # begin as a linear (PCA) codec: see training/start.py
    weight_decay: float = 0.02
    seed: int = 0
    workers: int = 1
    log_every: int = 20  # steps
    save_every: int = 500  # steps

    def __post_init__(self) -> None:
        _check(not isinstance(self.data, str | Path), f"data is {self.data!r}, expected a list of folders or tars")
        object.__setattr__(self, "data", tuple(self.data))
        object.__setattr__(self, "stages", tuple(self.stages))
        stages = self.stages
        _check(bool(self.data and stages), "a recipe needs `data` (folders or tars) and at least one of `stages`")
        for name, least in {"batch_size": 1, "log_every": 1, "save_every": 1, "workers": 0, "weight_decay": 0}.items():
            value = getattr(self, name)
            _check(value >= least, f"{name} is {value}, expected {least} or more")
        _check(0 < self.min_crop <= 1, f"min_crop is {self.min_crop}, expected a share of the short side in (0, 1]")
        _check(0 <= self.seed < 2**31, f"seed is {self.seed}, expected 0 to {2**31 - 1}")
        quantize = [stage.quantize for stage in stages]
        _check(
            quantize == sorted(quantize),
            "a stage without quantize follows one with it; quantization can't be switched off again",
        )
        taught = any(stage.weights.teaches for stage in stages)
        _check(
            bool(self.teacher.name) or not taught,
            "perceptual, recognition and semantic losses need teacher.name (a timm model)",
        )
        self.to_dict()  # refuses a wrong tokenizer

    @property
    def config(self) -> TokenizerConfig:
        sections = dict(self.tokenizer)
        base = TokenizerConfig.preset(str(sections.pop("preset"))).to_dict() if "preset" in sections else {}
        for name, values in sections.items():
            base[name] = {**base.get(name, {}), **values} if isinstance(values, dict) else values
        return TokenizerConfig.from_dict(base)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, the tokenizer's configuration in full."""
        return dataclasses.asdict(self) | {"tokenizer": self.config.to_dict()}

    @classmethod
    def find(cls, name: str | Path) -> "Recipe":
        """A YAML file, or one of the recipes in the package by name (such as "paper-vit")."""
        bundled = {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}
        path = Path(name)
        if not path.exists() and str(name) not in bundled:
            raise ConfigError(f"there is no recipe {name}; expected a YAML file or one of {', '.join(bundled)}")
        return cls.load(path if path.is_file() else bundled.get(str(name), path))

    @classmethod
    def load(cls, path: str | Path) -> "Recipe":
        """Raises `ConfigError` on a file that can't be read, an unknown key, a wrong type or value, or an unset environment variable."""
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"can't read the recipe {path}: {error}") from error
        try:
            return build(cls, _expand(values))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """What changed between two trees of plain values, such as "codebook.size: 8192, now 4096".

    A list equals a tuple. A key that only one of them has is left out: another version of dyntok may know other options.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        prefix = f"{where}." if where else ""
        return [told for name in old if name in new for told in differences(old[name], new[name], f"{prefix}{name}")]
    if isinstance(old, list | tuple) and isinstance(new, list | tuple):
        old, new = list(old), list(new)
    return [] if old == new else [f"{where}: {old!r}, now {new!r}"]


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
