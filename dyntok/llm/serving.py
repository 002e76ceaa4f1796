"""The image grammar for servers of language models: rules out of a request, and one row of scores at a time.

Nothing here knows a server; `vllm_plugin.py` and `sglang_plugin.py` do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyntok.errors import ConfigError
from dyntok.llm.grammar import ImageGrammar
from dyntok.vocab import VOCAB_FILE, VisualVocab

PREFIX = "dyntok_"
_NUMBERS = ("max_tokens", "min_tokens")  # one, or one for each image
ARGUMENTS = (*_NUMBERS, "min_images", "max_images", "text", "grid")


def request_rules(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the arguments of `ImageGrammar` among those of a request: `dyntok_max_tokens` is its `max_tokens`.

    Lists become tuples, and `dyntok_text` may be 0 or 1. Raises `ConfigError` on a name that begins with `dyntok_` and
    is none of these.
    """
    rules: dict[str, Any] = {}
    for name, value in (arguments or {}).items():
        if not name.startswith(PREFIX):
            continue
        own = name.removeprefix(PREFIX)
        if own not in ARGUMENTS:
            raise ConfigError(f"{name} is no argument; expected one of {', '.join(PREFIX + a for a in ARGUMENTS)}")
        if own == "text" and value not in (0, 1):
            raise ConfigError(f"{name} is {value!r}, expected true or false")
        if own in ("min_images", "max_images") and type(value) is not int:
            raise ConfigError(f"{name} is {value!r}, expected an integer")
        numbers = value if isinstance(value, list | tuple) else [value]
        if own in (*_NUMBERS, "grid") and not all(type(number) is int for number in numbers):
            raise ConfigError(f"{name} is {value!r}, expected an integer or a list of integers")
        rules[own] = bool(value) if own == "text" else tuple(value) if isinstance(value, list) else value
    return rules


def find_vocab(model: str) -> VisualVocab | None:
    """Returns the vocabulary beside a model, in its folder or its repository on the hub; None where there is none.

    Raises `CodeError` on a file that can't be read.
    """
    if Path(model).is_dir():
        return VisualVocab.from_pretrained(model) if (Path(model) / VOCAB_FILE).exists() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

    try:
        return VisualVocab.from_pretrained(Path(hf_hub_download(model, VOCAB_FILE)).parent)
    except (EntryNotFoundError, HFValidationError, RepositoryNotFoundError):
        return None


@dataclass(frozen=True)
class Served:
    """A model that writes images: what all of its requests share."""

    vocab: VisualVocab
    eos: tuple[int, ...]
    vocab_size: int

    def grammar(self, arguments: Mapping[str, Any] | None) -> ImageGrammar:
        """Returns the grammar of a request. Raises `ConfigError`."""
        size = max(self.vocab_size, self.vocab.vocab_size)
        rules = {"max_tokens": None, **request_rules(arguments)}
        eos = tuple(id for id in self.eos if not self.vocab.is_visual(id) and 0 <= id < size)
        return ImageGrammar(self.vocab, eos=eos, vocab_size=size, **rules)


class RequestGrammar:
    """The grammar along one request: `constrain` takes all ids that were written so far, at every step.

    room: how many ids may be written in all; an image is ended in time
    """

    def __init__(self, grammar: ImageGrammar, prompt: Sequence[int], room: int) -> None:
        self.grammar, self.room = grammar, room
        self._start = self._state = grammar.start(prompt)
        self._seen = 0

    def constrain(self, written: Sequence[int], scores: Tensor) -> Tensor:
        """Returns scores [V] with -inf where an id may not come next; a new tensor.

        Where one id alone is allowed, its score is 0.
        """
        if len(written) < self._seen:
            self._state, self._seen = self._start, 0
        for id in written[self._seen :]:
            self._state = self.grammar.step(self._state, id)
        self._seen = len(written)
        allowed = self.grammar.allowed(self._state, self.room - self._seen)
        result = torch.full_like(scores, -torch.inf)
        for low, stop in allowed:
            result[low:stop] = scores[low:stop]
        if len(allowed) == 1 and allowed[0][1] - allowed[0][0] == 1:
            result[allowed[0][0]] = 0.0
        return result
