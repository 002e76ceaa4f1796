"""Measures a tokenizer on held-out pictures while it is trained.

Not here: the full evaluation of a finished tokenizer (`evaluate.py`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from dyntok.tokenizer import DynamicVisualTokenizer
from dyntok.training.evaluate import evaluate
from dyntok.training.sources import ImageSample


def validate(
    tokenizer: DynamicVisualTokenizer, samples: Sequence[ImageSample], weights: Mapping[str, Tensor] | None = None
) -> dict[str, float]:
    """Returns figures for the log, such as "validation_psnr".

    weights: measure these instead of the tokenizer's own, which it gets back.

    Raises `DataError` if no picture can be read.
    """
    with _replaced(tokenizer, weights):
        report = evaluate(tokenizer, samples)
    figures = {
        "psnr": report.psnr,
        "feature_cosine": report.feature_cosine,
        "tokens": report.tokens.mean,
        "usage": report.usage,
        "perplexity": report.perplexity,
    }
    return {f"validation_{name}": value for name, value in figures.items() if value is not None}


def quality(figures: Mapping[str, float]) -> float:
    """Returns the figure by which the best weights are chosen: PSNR, or else the cosine of features."""
    return figures["validation_psnr"] if "validation_psnr" in figures else figures["validation_feature_cosine"]


@contextmanager
def _replaced(tokenizer: DynamicVisualTokenizer, weights: Mapping[str, Tensor] | None) -> Iterator[None]:
    if weights is None:
        yield
        return
    own = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    tokenizer.load_state_dict(weights)
    try:
        yield
    finally:
        tokenizer.load_state_dict(own)
