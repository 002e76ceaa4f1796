"""The image grammar for servers of language models: rules out of a request, and one row of scores at a time.

Nothing here knows a server; `vllm_plugin.py` and `sglang_plugin.py` do.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyntok.errors import ConfigError
from dyntok.layout import MAX_SIDE
from dyntok.llm.grammar import ImageGrammar
from dyntok.vocab import VOCAB_FILE, VisualVocab

PREFIX = "dyntok_"
_NUMBERS = ("max_tokens", "min_tokens")  # one, or one for each image
ARGUMENTS = (*_NUMBERS, "min_images", "max_images", "text", "grid")
# what fits no model, because no tokenizer makes larger grids
_WIDEST = VisualVocab.after(1, size=1, layout="lattice", sides=MAX_SIDE)
_MOST_NUMBERS = 1000  # of a stranger's request
_LEAST = -1e30  # as good as never, and still a number
_log = logging.getLogger(__name__)


def request_rules(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the arguments of `ImageGrammar` among those of a request: `dyntok_max_tokens` is its `max_tokens`.

    Lists become tuples, and `dyntok_text` may be 0 or 1. Raises `ConfigError` on a name that begins with `dyntok_` and
    is none of these, and on values that fit no model.
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
        if len(numbers) > _MOST_NUMBERS:
            raise ConfigError(f"{name} has {len(numbers)} numbers, expected at most {_MOST_NUMBERS}")
        rules[own] = bool(value) if own == "text" else tuple(value) if isinstance(value, list) else value
    ImageGrammar(_WIDEST, eos=0, **rules)
    return rules


def find_vocab(model: str, revision: str | None = None) -> VisualVocab | None:
    """Returns the vocabulary beside a model, in its folder or its repository on the hub; None where there is none.

    Raises `CodeError` on a file that can't be read.
    """
    if Path(model).is_dir():
        return VisualVocab.from_pretrained(model) if (Path(model) / VOCAB_FILE).exists() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

    try:
        return VisualVocab.from_pretrained(Path(hf_hub_download(model, VOCAB_FILE, revision=revision)).parent)
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
        return ImageGrammar(self.vocab, **self._shared, **{"max_tokens": None, **request_rules(arguments)})

    def grammar_or_text(self, arguments: Mapping[str, Any] | None) -> ImageGrammar:
        """Returns the grammar of a request, and one without images where its arguments do not fit the model.

        The reason goes to the log. An error would end the server, with the requests of everybody else.
        """
        try:
            return self.grammar(arguments)
        except ConfigError as error:
            _log.error("a request writes no images, because its limits do not fit the model: %s", error)
            return ImageGrammar(self.vocab, **self._shared, max_tokens=1, max_images=0)

    @property
    def _shared(self) -> dict[str, Any]:
        """What the grammars of all requests have in common."""
        size = max(self.vocab_size, self.vocab.vocab_size)
        eos = tuple(id for id in self.eos if not self.vocab.is_visual(id) and 0 <= id < size)
        return {"eos": eos, "vocab_size": size}


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

        An allowed id has a finite score, even if another rule of the server had excluded all of them.
        """
        if len(written) < self._seen:
            self._state, self._seen = self._start, 0
        for id in written[self._seen :]:
            self._state = self.grammar.step(self._state, id)
        self._seen = len(written)
        result = torch.full_like(scores, -torch.inf)
        for low, stop in self.grammar.allowed(self._state, self.room - self._seen):
            result[low:stop] = finite(scores[low:stop])
        return result


def finite(scores: Tensor) -> Tensor:
    """Returns scores without -inf: what was excluded keeps a probability of 0, until nothing else is left."""
    return scores.clamp(min=max(_LEAST, torch.finfo(scores.dtype).min / 16))
