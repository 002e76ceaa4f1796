"""The moving average of a tokenizer's weights, which is better than the weights of any single step."""

import torch
from torch import Tensor

from dyntok.tokenizer import DynamicVisualTokenizer

_SHORT = 10  # steps: until the average has seen many, it forgets faster, so that the start does not linger


class WeightAverage:
    """Averages the parameters that are trained. All else is copied: buffers, and parts that a stage freezes.

    So a decoder that is trained alone belongs to the same codes as before, bit for bit. The codebook's rows are a
    buffer, and averages already.

    decay: weight of the old average in each update, 0 to 1.
    """

    def __init__(self, tokenizer: DynamicVisualTokenizer, decay: float) -> None:
        self.decay = decay
        self.values: dict[str, Tensor] = {name: v.detach().clone() for name, v in tokenizer.state_dict().items()}

    @torch.no_grad()
    def update(self, tokenizer: DynamicVisualTokenizer, step: int) -> None:
        """Adds the weights after a step of the run, which is counted from 0."""
        decay = min(self.decay, 1 - 1 / (step + _SHORT))
        trained = {name for name, parameter in tokenizer.named_parameters() if parameter.requires_grad}
        for name, value in tokenizer.state_dict().items():
            if name in trained:
                self.values[name].lerp_(value, 1 - decay)
            else:
                self.values[name].copy_(value)

    def load(self, values: dict[str, Tensor]) -> None:
        """Raises `KeyError` or `RuntimeError` if the values belong to another tokenizer."""
        for name, value in self.values.items():
            value.copy_(values[name])
