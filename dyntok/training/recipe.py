"""A recipe: everything a training run is made of, from one YAML file, checked before anything starts."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from dyntok.config import TokenizerConfig, build_dataclass
from dyntok.errors import ConfigError


RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Weights:
    """Factors of the losses; 0 leaves a loss out."""

    pixel: float = 0.0  # mean squared error of normalised pixels
    feature: float = 0.0  # cosine to the backbone's features (LaVIT)
    perceptual: float = 0.0  # distance of the teacher's feature maps
    semantic: float = 0.0  # teacher's pooled features from the mean code vector
    commitment: float = 0.25
    rate: float = 2.0
    local: float = 0.0  # per-patch benefit of keeping


@dataclass(frozen=True)
class Masks:
    """Shares of batches whose keep masks are: the learned choice (sampled), the best by score under a random budget, random ones."""

    learned: float = 1.0
    budget: float = 0.0
    random: float = 0.0


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
    freeze: tuple[str, ...] = ()  # parts that are not trained: backbone, selector, merger, decoder, ...
    weights: Weights = field(default_factory=Weights)
    masks: Masks = field(default_factory=Masks)

    def __post_init__(self) -> None:
        object.__setattr__(self, "budgets", tuple(self.budgets))
        object.__setattr__(self, "freeze", tuple(self.freeze))
        if self.images < 1 or self.lr <= 0:
            raise ConfigError(f"stage {self.name!r} has images {self.images} and lr {self.lr}, expected both to be positive")
        if len(self.budgets) != 2 or not 0 < self.budgets[0] <= self.budgets[1] <= 1:
            raise ConfigError(f"stage {self.name!r} has budgets {self.budgets}, expected [low, high] within (0, 1]")


@dataclass(frozen=True)
class Teacher:
    """A fixed timm network whose features guide the training. weights: "hub" or a safetensors file."""

    name: str = ""
    weights: str = "hub"
    kwargs: dict[str, Any] = field(default_factory=dict)
    layers: tuple[int, ...] = ()  # indices of its intermediate features; none: all

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))


@dataclass(frozen=True)
class Recipe:
    """A training run. Environment variables in paths are filled in ($NAME or ${NAME}).

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
    precision: Literal["no", "bf16", "fp16"] = "no"
    linear_start: bool = False  # begin as a linear (PCA) codec: see training/start.py
    weight_decay: float = 0.02
    seed: int = 0
    workers: int = 1
    log_every: int = 20  # steps
    save_every: int = 500  # steps

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", tuple(self.data))
        stages = tuple(build_dataclass(Stage, stage, f"stages[{i}].") if isinstance(stage, dict) else stage for i, stage in enumerate(self.stages))
        object.__setattr__(self, "stages", stages)
        if not self.data or not stages:
            raise ConfigError("a recipe needs `data` (folders or tars) and at least one of `stages`")
        if [stage.quantize for stage in stages] != sorted(stage.quantize for stage in stages):
            raise ConfigError("a stage without quantize follows one with it; quantization can't be switched off again")
        wants_teacher = any(stage.weights.perceptual or stage.weights.semantic for stage in stages)
        if wants_teacher and not self.teacher.name:
            raise ConfigError("a perceptual or semantic loss needs `teacher.name` (a timm model)")

    @property
    def config(self) -> TokenizerConfig:
        sections = dict(self.tokenizer)
        base = TokenizerConfig.preset(sections.pop("preset")).to_dict() if "preset" in sections else {}
        for name, values in sections.items():
            base[name] = {**base.get(name, {}), **values} if isinstance(values, dict) else values
        return TokenizerConfig.from_dict(base)

    @classmethod
    def find(cls, name: str | Path) -> "Recipe":
        """A YAML file, or one of the recipes in the package by name (such as "tiny")."""
        bundled = RECIPES / f"{name}.yaml"
        return cls.load(bundled if bundled.is_file() and not Path(name).exists() else name)

    @classmethod
    def load(cls, path: str | Path) -> "Recipe":
        """Raises `ConfigError` on a file that can't be read, an unknown key, a wrong value, or an unset environment variable."""
        try:
            values = yaml.safe_load(Path(path).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"can't read the recipe {path}: {error}") from error
        return build_dataclass(cls, _expand(values), "")


def _expand(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _expand(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_expand(value) for value in values]
    if isinstance(values, str):
        expanded = os.path.expandvars(values)
        if unset := re.findall(r"\$\{?(\w+)\}?", expanded):
            raise ConfigError(f"the recipe uses the environment variable {unset[0]}, which is not set")
        return expanded
    return values
