"""Starts a tokenizer with the weights of another one: the parts that both have, where their shapes fit.

So an any-grid tokenizer starts from one with a fixed grid, and a deeper decoder from a shallower one.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dyntok.checkpoint.assemble import few
from dyntok.structure import differences
from dyntok.tokenizer import DynamicVisualTokenizer
from dyntok.training.recipe import Recipe

_ENCODER = ("backbone.", "selector.", "merger.", "projection.", "codebook.")
_QUERIES = "decoder.query_embed"
# timm's vision transformers with a table of positions and those with rotary ones call the same tensors differently
_LAYER_SCALE = re.compile(r"\bgamma_(\d)\b")


def first_tokenizer(
    recipe: Recipe, given: DynamicVisualTokenizer | None, *, resuming: bool, tell: Callable[[str], None]
) -> tuple[DynamicVisualTokenizer, bool]:
    """Returns the tokenizer that a run trains, and whether it brings a codebook that fits its encoder.

    given: its own weights are trained where it is configured as the recipe wants; otherwise a new one takes what fits.
    resuming: weights follow from the run's state. tell: gets a line about where the first weights come from.
    """
    if given is not None and not differences(recipe.config.to_dict(), given.config.to_dict(), shared=True):
        if not resuming:
            tell(Start(len(given.state_dict()), (), codes=True).describe(given.name))
        return given, True
    weights = "" if resuming else recipe.backbone_weights
    tokenizer = DynamicVisualTokenizer(recipe.config, pretrained_backbone=weights == "hub")
    if weights not in ("", "hub"):
        tokenizer.backbone.load_weights(weights)
    if given is None:
        if not resuming:
            parts = "a pretrained backbone" if weights else "new weights"
            tell(f"starting with {parts}; --init NAME starts from the weights of a tokenizer")
            if recipe.config.backbone.frozen and not weights:
                tell("the backbone is frozen with random weights; set backbone_weights, or backbone.frozen: false")
        return tokenizer, False
    start = take_weights(tokenizer, given)
    if not resuming:
        tell(start.describe(given.name))
    return tokenizer, start.codes


@dataclass(frozen=True)
class Start:
    """What was taken. new: names of the tensors that keep their initial values.

    codes: whether the whole encoder was taken, so that its codebook is still the right one.
    """

    taken: int
    new: tuple[str, ...]
    codes: bool

    def describe(self, name: str) -> str:
        """Returns a line for people."""
        line = f"starting from {name}: {self.taken} of {self.taken + len(self.new)} tensors fit"
        return f"{line}; new: {few(list(self.new))}" if self.new else line


@torch.no_grad()
def take_weights(target: DynamicVisualTokenizer, source: DynamicVisualTokenizer) -> Start:
    """Copies into `target` every tensor of `source` that has the same name and shape there.

    A table of queries for the patches of one grid becomes the one query of all grids by its mean.
    """
    given = {_common_name(name): value for name, value in source.state_dict().items()}
    taken: dict[str, Tensor] = {}
    for name, value in target.state_dict().items():
        other = given.get(_common_name(name))
        if other is not None and name == _QUERIES and len(value) == 1 and other.shape[1:] == value.shape[1:]:
            other = other.mean(0, keepdim=True)
        if other is not None and other.shape == value.shape:
            taken[name] = other
    target.load_state_dict(taken, strict=False)
    new = tuple(name for name in target.state_dict() if name not in taken)
    left = set(given) - {_common_name(name) for name in taken}
    codes = not any(name.startswith(_ENCODER) for name in (*new, *left))
    return Start(len(taken), new, codes)


def _common_name(name: str) -> str:
    return _LAYER_SCALE.sub(r"ls\1.gamma", name)
