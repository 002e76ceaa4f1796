"""`VllmImageGrammar`: every image that a vLLM server writes can be decoded. Found by vLLM through its entry point.

It acts where the model's folder has a `dyntok.json` (`VisualVocab.save_pretrained`), and leaves other models alone. A
request sets its own limits: `SamplingParams(extra_args={"dyntok_max_tokens": 96})`, or `vllm_xargs` over HTTP.

vLLM has two interfaces for the same entry point, and this class has both: one row after another with ids on the host
(V1), and whole batches on the device (V2), where nothing waits for the device.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from dyntok.errors import ConfigError
from dyntok.llm.grammar import UNLIMITED, ImageGrammar
from dyntok.llm.mask import GrammarMask
from dyntok.llm.serving import RequestGrammar, Served, find_vocab, finite, request_rules

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as _SlotProcessor
except ImportError:  # an earlier vLLM has V1 alone
    _SlotProcessor = object

_LATE = (
    "vLLM would not pass the ids that were generated last; start it with --no-async-scheduling, or with "
    "--logits-processors dyntok.llm.vllm_plugin:VllmImageGrammar"
)


class VllmImageGrammar(AdapterLogitsProcessor, _SlotProcessor):
    """For `vllm.logits_processors`; not to be made by hand.

    place: the device (V1), or the state of all requests (V2)

    Raises `ConfigError` for a model with images where vLLM would not pass every id in time, and with speculative
    decoding (V2; V1 with speculative decoding loads no plug-ins).
    """

    def __init__(self, vllm_config: Any, place: Any, is_pin_memory: bool = False) -> None:
        model = vllm_config.model_config
        self.served, self.longest = _served(model), int(model.max_model_len)
        if isinstance(place, torch.device | str):
            super().__init__(vllm_config, place, is_pin_memory)
            if self.served and vllm_config.scheduler_config.async_scheduling and not model.logits_processors:
                raise ConfigError(_LATE)
            return
        if self.served and vllm_config.speculative_config:
            raise ConfigError("images can't be written with speculative decoding; start vLLM without it")
        self._states = place  # all below is of V2: the grammars, one for each slot, and the different ones in the mask
        self._grammars: dict[int, ImageGrammar] = {}
        self._kinds: dict[ImageGrammar, int] = {}
        self._mask: GrammarMask | None = None
        self._numbers, self._rooms = torch.zeros(2, place.max_num_reqs, dtype=torch.long, device=place.device)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raises `ConfigError` on arguments of a request that do not fit."""
        request_rules(sampling_params.extra_args)

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        """Returns what V1 calls at each step of a request, with the prompt's ids, those written, and scores [V]."""
        if self.served is None:
            return None
        return _Request(self.served.grammar_or_text(params.extra_args), self._room(params), self.longest)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Takes a request into a slot, for V2; returns whether its scores change."""
        if self.served is None:
            return False
        grammar = self.served.grammar_or_text(sampling_params.extra_args)
        self._grammars[req_idx] = grammar
        if grammar not in self._kinds:
            self._kinds = {kind: number for number, kind in enumerate(dict.fromkeys(self._grammars.values()))}
            self._mask = GrammarMask(list(self._kinds), self._states.device)
            for slot, kind in self._grammars.items():
                self._numbers[slot] = self._kinds[kind]
        self._numbers[req_idx], self._rooms[req_idx] = self._kinds[grammar], self._room(sampling_params)
        return True

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Returns scores [R, V] with -inf where an id may not come next."""
        if ctx is None:
            return super().apply(logits)
        if self.served is None:
            return logits
        place, lengths = ctx.idx_mapping.long(), ctx.pos.long() + 1
        mask = self._mask if len(self._kinds) == 1 else self._mask.of_rows(self._numbers[place])
        prompts = self._states.prompt_len.gpu.to(logits.device)[place]
        # all rows end in the last column: what stands before a row's first id is no id
        longest = int(ctx.seq_lens_upper_bound_np.max())
        column = lengths[:, None] - longest + torch.arange(longest, device=logits.device)  # [R, L]
        ids = self._states.all_token_ids.gpu[place].long().gather(1, column.clamp(min=0))
        ids[:, -1] = ctx.input_ids  # the newest, which may be on its way still
        ids = ids.masked_fill(column < 0, -1)
        ends = (ids == self.served.vocab.image_end) & (column >= prompts[:, None])
        state = mask.scan(ids)._replace(images=ends.sum(1))
        room = torch.minimum(self._rooms[place], self.longest - prompts) - (lengths - prompts)
        return mask.constrain(finite(logits), state, room)

    def _room(self, params: Any) -> int:
        return UNLIMITED if params.max_tokens is None else params.max_tokens


class _Request:
    """V1: a request's rules, made when the prompt is known."""

    def __init__(self, grammar: ImageGrammar, room: int, longest: int) -> None:
        self._grammar, self._room, self._longest = grammar, room, longest
        self._rules: RequestGrammar | None = None

    def __call__(self, prompt: list[int], written: list[int], scores: Tensor) -> Tensor:
        if any(id < 0 for id in written[-4:]):
            raise ConfigError(_LATE)
        if self._rules is None:
            self._rules = RequestGrammar(self._grammar, prompt, min(self._room, self._longest - len(prompt)))
        return self._rules.constrain(written, scores)


def _served(model: Any) -> Served | None:
    vocab = find_vocab(model.model, model.revision)
    if vocab is None:
        return None
    size = model.get_vocab_size()
    if size < vocab.vocab_size:
        raise ConfigError(
            f"the model has {size} ids, but its dyntok.json goes up to {vocab.vocab_size}; "
            "save the model after extend_model()"
        )
    ends = (getattr(model.hf_config, "eos_token_id", None), model.try_get_generation_config().get("eos_token_id"))
    eos = {id for end in ends if end is not None for id in (end if isinstance(end, list) else [end])}
    return Served(vocab, tuple(sorted(eos)), size)
