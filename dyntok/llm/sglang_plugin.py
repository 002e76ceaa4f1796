"""`SglangImageGrammar`: every image that an SGLang server writes can be decoded.

The server needs dyntok installed and `--enable-custom-logit-processor`. A request names the processor, the model's
folder with `dyntok.json`, and its limits:

>>> body = {
...     "text": "A red chair: ",
...     "sampling_params": {"max_new_tokens": 300, "custom_params": {"dyntok": "models/mine", "dyntok_max_tokens": 96}},
...     "custom_logit_processor": SglangImageGrammar.to_str(),
... }
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor
from torch import Tensor

from dyntok.errors import ConfigError
from dyntok.llm.grammar import UNLIMITED
from dyntok.llm.serving import RequestGrammar, Served, find_vocab
from dyntok.vocab import VisualVocab


class SglangImageGrammar(CustomLogitProcessor):
    """For `custom_logit_processor` of a request. It keeps nothing from step to step."""

    def __call__(self, logits: Tensor, custom_param_list: Sequence[Mapping[str, Any]] | None = None) -> Tensor:
        """Scores [R, V] of requests with these parameters to scores [R, V], in place.

        Raises `ConfigError` where a request does not say its model, or has arguments that do not fit.
        """
        for row, params in enumerate(custom_param_list or ()):
            if params is None or "dyntok" not in params:
                raise ConfigError('custom_params has no "dyntok", the folder of the model with dyntok.json')
            request = params["__req__"]
            served = Served(_vocab(params["dyntok"]), _eos(request), logits.shape[1])
            own = {name: value for name, value in params.items() if name not in ("dyntok", "__req__")}
            most = request.sampling_params.max_new_tokens
            rules = RequestGrammar(served.grammar(own), request.origin_input_ids, UNLIMITED if most is None else most)
            logits[row] = rules.constrain(list(request.output_ids), logits[row])
        return logits


def _eos(request: Any) -> tuple[int, ...]:
    """Returns the ids that end this request, as SGLang knows them."""
    own = set(request.sampling_params.stop_token_ids or ()) | set(getattr(request, "eos_token_ids", None) or ())
    known = getattr(getattr(request, "tokenizer", None), "eos_token_id", None)
    return tuple(sorted(own | ({known} if known is not None else set())))


@lru_cache
def _vocab(folder: str) -> VisualVocab:
    vocab = find_vocab(folder)
    if vocab is None:
        raise ConfigError(f"{folder} has no dyntok.json; VisualVocab.save_pretrained writes it beside a model")
    return vocab
