"""Rows of ids as one batch, in the form of transformers: padded, truncated between pictures, a `BatchFeature`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dyntok.errors import ConfigError, MissingDependencyError
from dyntok.llm.packing import IGNORED
from dyntok.vocab import VisualVocab


@dataclass(frozen=True)
class RowOptions:
    """What the words of transformers mean here.

    padding         True or "longest": to the longest row; "max_length"; False or "do_not_pad"
    truncation      shorten rows to max_length; a picture that would be cut is left out as a whole, and what follows it
    return_tensors  "pt", "np", or None for lists

    Raises `ConfigError` on other values.
    """

    padding: bool | str = True
    truncation: bool | str = False
    max_length: int | None = None
    return_tensors: Literal["pt", "np"] | None = "pt"

    def __post_init__(self) -> None:
        choices: dict[str, tuple[Any, ...]] = {
            "padding": (True, False, "longest", "max_length", "do_not_pad"),
            "truncation": (True, False, "longest_first", "do_not_truncate"),
            "return_tensors": ("pt", "np", None),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(map(repr, known))}")
        if self.max_length is not None and (type(self.max_length) is not int or self.max_length < 1):
            raise ConfigError(f"max_length is {self.max_length!r}, expected an integer of 1 or more")
        if self.max_length is None and (self.truncates or self.padding == "max_length"):
            raise ConfigError("max_length is needed to truncate rows, or to pad them to it")

    @property
    def truncates(self) -> bool:
        return self.truncation in (True, "longest_first")

    @property
    def pads(self) -> bool:
        return self.padding not in (False, "do_not_pad")


def batch_of(
    rows: Sequence[list[int]],
    labels: Sequence[list[int]] | None,
    tokenizer: Any,
    vocab: VisualVocab,
    options: RowOptions,
) -> Any:
    """Returns a `BatchFeature` with `input_ids`, `attention_mask` and, where given, `labels`: [B, L] each.

    Rows are padded on the tokenizer's side; labels there are -100.

    Raises `ConfigError` where rows of different lengths are not padded, or can't be: the tokenizer has no pad token.
    """
    try:
        from transformers import BatchFeature
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of("transformers", "transformers") from error

    if options.truncates:
        lengths = [_fitting(row, options.max_length, vocab) for row in rows]
        rows = [row[:length] for row, length in zip(rows, lengths, strict=True)]
        labels = labels and [row[:length] for row, length in zip(labels, lengths, strict=True)]
    values = {"input_ids": (rows, tokenizer.pad_token_id or 0), "attention_mask": ([[1] * len(row) for row in rows], 0)}
    if labels is not None:
        values["labels"] = (labels, IGNORED)
    longest = max(map(len, rows), default=0)
    if options.padding == "max_length":
        longest = max(longest, options.max_length)
    ragged = any(len(row) < longest for row in rows)
    if ragged and options.pads and tokenizer.pad_token_id is None:
        raise ConfigError("rows must be padded, and the tokenizer has no pad token; set tokenizer.pad_token")
    if ragged and not options.pads and options.return_tensors is not None:
        raise ConfigError(f"the rows have {min(map(len, rows))} to {longest} ids, and padding is off")
    if options.pads:
        left = tokenizer.padding_side == "left"
        values = {name: (_padded(some, fill, longest, left), fill) for name, (some, fill) in values.items()}
    return BatchFeature({name: _as(options.return_tensors, some) for name, (some, _) in values.items()})


def _fitting(row: list[int], most: int, vocab: VisualVocab) -> int:
    """Returns how many ids to keep so that no picture is cut."""
    if len(row) <= most:
        return len(row)
    kept = row[:most]
    starts = [i for i, id in enumerate(kept) if id == vocab.image_start]
    return starts[-1] if starts and vocab.image_end not in kept[starts[-1] :] else most


def _padded(rows: Sequence[list[int]], fill: int, longest: int, left: bool) -> list[list[int]]:
    blanks = [[fill] * (longest - len(row)) for row in rows]
    return [blank + row if left else row + blank for row, blank in zip(rows, blanks, strict=True)]


def _as(kind: str | None, rows: Sequence[list[int]]) -> Tensor | Any:
    if kind is None:
        return rows
    tensor = torch.tensor(rows, dtype=torch.long)
    return tensor if kind == "pt" else tensor.numpy()
