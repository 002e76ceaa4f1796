"""`SglangImageGrammar`: every image that an SGLang server writes can be decoded.

The server needs dyntok installed, `--enable-custom-logit-processor` and `--disable-overlap-schedule`. A request names
the processor, the model's folder with `dyntok.json`, and its limits:

>>> body = {
...     "text": "A red chair: ",
...     "sampling_params": {"max_new_tokens": 300, "custom_params": {"dyntok": "models/mine", "dyntok_max_tokens": 96}},
...     "custom_logit_processor": SglangImageGrammar.to_str(),
... }
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from http import HTTPStatus
from typing import Any

from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor
from torch import Tensor

from dyntok.errors import ConfigError, DyntokError
from dyntok.llm.grammar import UNLIMITED, ImageGrammar
from dyntok.llm.serving import PREFIX, RequestGrammar, Served, find_vocab
from dyntok.structure import brief
from dyntok.vocab import VisualVocab


class SglangImageGrammar(CustomLogitProcessor):
    """For `custom_logit_processor` of a request. It keeps nothing from step to step."""

    def __call__(self, logits: Tensor, custom_param_list: Sequence[Mapping[str, Any]] | None = None) -> Tensor:
        """Scores [R, V] of requests with these parameters to scores [R, V], in place.

        A request that can't be served is aborted with a message: it does not say its model, its arguments do not fit,
        or the server runs ahead of the ids.
        """
        rows = Counter(id(params) for params in custom_param_list or ())
        for row, params in enumerate(custom_param_list or ()):
            if params is None:  # nothing says which request this is
                _log.error("a request with this processor goes on without rules: %s", _NO_MODEL)
                continue
            request = params["__req__"]
            try:
                rules = _rules(params, logits.shape[1], rows[id(params)])
            except DyntokError as error:  # raised from here it would end the server
                _abort(request, str(error))
            else:
                logits[row] = rules.constrain(list(request.output_ids), logits[row])
        return logits


_log = logging.getLogger(__name__)
_NO_MODEL = 'custom_params has no "dyntok", the folder of the model with dyntok.json'
_LATE = "SGLang runs ahead of the ids that images depend on; start it with --disable-overlap-schedule"


def _rules(params: Mapping[str, Any], width: int, times: int) -> RequestGrammar:
    """Returns the rules of a request for its next id. times: how many rows of this step are its own.

    Raises `DyntokError` where it can't be served.
    """
    request = params["__req__"]
    if "dyntok" not in params:
        raise ConfigError(_NO_MODEL)
    if len(request.output_ids) < request.decode_batch_idx:
        raise ConfigError(_LATE)
    if times > 1:
        raise ConfigError("images can't be written with speculative decoding; start SGLang without it")
    if not isinstance(params["dyntok"], str):
        raise ConfigError(f"{_NO_MODEL}; it is {brief(params['dyntok'])}")
    own = {name: value for name, value in params.items() if name.startswith(PREFIX)}
    grammar = _grammar(params["dyntok"], _eos(request), width, json.dumps(own, sort_keys=True))
    most = request.sampling_params.max_new_tokens
    return RequestGrammar(grammar, request.origin_input_ids, UNLIMITED if most is None else most)


def _abort(request: Any, reason: str) -> None:
    """Ends a request after this step; the client gets the reason."""
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    request.to_finish = FINISH_ABORT(reason, HTTPStatus.BAD_REQUEST, "BadRequestError")


def _eos(request: Any) -> tuple[int, ...]:
    """Returns the ids that end this request, as SGLang knows them."""
    own = set(request.sampling_params.stop_token_ids or ()) | set(getattr(request, "eos_token_ids", None) or ())
    known = getattr(getattr(request, "tokenizer", None), "eos_token_id", None)
    return tuple(sorted(own | ({known} if known is not None else set())))


@lru_cache(maxsize=1024)
def _grammar(folder: str, eos: tuple[int, ...], width: int, arguments: str) -> ImageGrammar:
    vocab = _vocab(folder)
    if width < vocab.vocab_size:
        raise ConfigError(
            f"the model scores {width} ids, but the ids of {folder} go up to {vocab.vocab_size - 1}; serve the model "
            "that was extended for them"
        )
    return Served(vocab, eos, width).grammar(json.loads(arguments))


@lru_cache
def _vocab(folder: str) -> VisualVocab:
    vocab = find_vocab(folder)
    if vocab is None:
        raise ConfigError(f"{folder} has no dyntok.json; VisualVocab.save_pretrained writes it beside a model")
    return vocab
