"""One stage of a training run: its length, learning rate, losses and masks.

Not here: the recipe that a run's stages belong to (`recipe.py`), and the losses themselves (`losses.py`).
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from dyntok.structure import require

PARTS = ("backbone", "selector", "merger", "projection", "codebook", "decoder", "pixel_head")


@dataclass(frozen=True)
class Weights:
    """Factors of the losses. A factor of 0 turns a loss off."""

    pixel: float = 0.0  # mean squared error of normalized pixels
    low: float = 0.0  # the same of means over 4 x 4 pixels: colors and smooth areas
    feature: float = 0.0  # cosine distance to the backbone's features (LaVIT)
    perceptual: float = 0.0  # distance of the teacher's feature maps
    perceptual_unplaced: float = 1.0  # extra factor on images decoded without positions: their content may move
    recognition: float = 0.0  # distance of the teacher's pooled features
    recognition_unplaced: float = 1.0  # extra factor on images decoded without positions
    semantic: float = 0.0  # similarities between pictures, by their pooled code vectors and by the teacher's features
    distill: float = 0.0  # distance of the teacher's features to those that heads predict from the tokenizer's
    commitment: float = 0.25  # distance of the encoder's vectors to their codes
    rate: float = 2.0  # distance of the mean number of tokens to `rho`
    local: float = 0.0  # selector scores follow the error that random or lattice masks leave

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            require(value >= 0, f"weights.{name} is {value}, expected 0 or more")

    @property
    def needs_teacher(self) -> bool:
        return self.perceptual + self.recognition + self.semantic + self.distill > 0


@dataclass(frozen=True)
class Masks:
    """Shares of the batches by the origin of their keep masks."""

    learned: float = 1.0  # the selector's choice, sampled; needs selector.places: free, merger.position: none
    budget: float = 0.0  # the best scores under a random budget, placed as selector.places allows
    random: float = 0.0  # random patches, under a random budget
    lattice: float = 0.0  # the lattice's patches, under a random budget

    def __post_init__(self) -> None:
        shares = self.learned, self.budget, self.random, self.lattice
        valid = min(shares) >= 0 and sum(shares) > 0
        require(
            valid, f"masks are {shares} (learned, budget, random, lattice), expected shares of 0 or more, not all 0"
        )


@dataclass(frozen=True)
class Stage:
    """One part of a run. The first stage with `quantize` starts the codebook by k-means."""

    name: str = ""
    images: int = 0
    lr: float = 1e-3
    warmup: int = 0  # images over which the learning rate rises
    decay: Literal["constant", "linear", "cosine"] = "constant"  # the others: the rate falls to 0 over the stage
    quantize: bool = False
    rho: float = 1 / 3  # target share of kept patches
    budgets: tuple[float, float] = (0.1, 1.0)  # range of random budgets as shares of the patches, log-uniform
    position_drop: float = 0.0  # share of images decoded without positions; of lattice masks see lattice_drop
    lattice_drop: float = 0.0  # the same of lattice masks, whose places follow from the number of tokens
    local_slope: float = 2.5  # change of the score, in logits, where the error around a patch is e times as large
    freeze: tuple[str, ...] = ()  # parts (see `PARTS`) that are not trained
    weights: Weights = field(default_factory=Weights)
    masks: Masks = field(default_factory=Masks)

    def __post_init__(self) -> None:
        object.__setattr__(self, "budgets", tuple(self.budgets))
        object.__setattr__(self, "freeze", tuple(self.freeze))
        name = f"stage {self.name!r}"
        positive = self.images >= 1 and self.lr > 0
        require(positive, f"{name} has images {self.images} and lr {self.lr}, expected both to be positive")
        require(self.warmup >= 0, f"{name} has warmup {self.warmup}, expected 0 or more images")
        require(0 < self.rho <= 1, f"{name} has rho {self.rho}, expected a share in (0, 1]")
        for option in ("position_drop", "lattice_drop"):
            drop = getattr(self, option)
            require(0 <= drop <= 1, f"{name} has {option} {drop}, expected a share from 0 to 1")
        require(self.local_slope > 0, f"{name} has local_slope {self.local_slope}, expected a positive number")
        valid = len(self.budgets) == 2 and 0 < self.budgets[0] <= self.budgets[1] <= 1
        require(valid, f"{name} has budgets {self.budgets}, expected [low, high] within (0, 1]")
        reconstructs = self.weights.pixel + self.weights.low + self.weights.feature + self.weights.perceptual > 0
        remedy = "give weights.pixel, feature or perceptual a positive value"
        require(reconstructs, f"{name} has no loss on the reconstruction; {remedy}")
        measured = self.masks.random + self.masks.lattice > 0
        require(
            measured or not self.weights.local,
            f"{name} has weights.local, which follows the error of random or lattice masks, and masks has neither; "
            "give masks.lattice a share, or leave weights.local out",
        )
        unknown = sorted(set(self.freeze) - set(PARTS))
        require(not unknown, f"{name} freezes {', '.join(unknown)}, expected some of {', '.join(PARTS)}")
