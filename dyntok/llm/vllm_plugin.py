"""`VllmImageGrammar`: every image that a vLLM server writes can be decoded. Found by vLLM through its entry point.

It acts where the model's folder has a `dyntok.json` (`VisualVocab.save_pretrained`), and leaves other models alone. A
request sets its own limits: `SamplingParams(extra_args={"dyntok_max_tokens": 96})`, or `vllm_xargs` over HTTP.

vLLM has two interfaces for the same entry point, and this class has both: one row after another with ids on the host
(V1), and whole batches on the device (V2), where nothing waits for the device.
"""

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from dyntok.errors import ConfigError
from dyntok.llm.grammar import UNLIMITED, ImageGrammar
from dyntok.llm.mask import GrammarMask
from dyntok.llm.serving import RequestGrammar, Served, find_vocab, request_rules

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as _SlotProcessor
except ImportError:  # an earlier vLLM has V1 alone
    _SlotProcessor = object


class VllmImageGrammar(AdapterLogitsProcessor, _SlotProcessor):
    """For `vllm.logits_processors`; not to be made by hand.

    place: the device (V1), or the state of all requests (V2)

    Raises `ConfigError` for a model with images and speculative decoding, which V2 offers.
    """

    def __init__(self, vllm_config: Any, place: Any, is_pin_memory: bool = False) -> None:
        self.served = _served(vllm_config)
        self.longest = int(vllm_config.model_config.max_model_len)
        self._slots: dict[int, tuple[ImageGrammar, int]] = {}  # V2: grammar and room of each slot
        self._states = None
        if isinstance(place, torch.device | str):
            super().__init__(vllm_config, place, is_pin_memory)
            return
        if self.served and getattr(vllm_config, "speculative_config", None):
            raise ConfigError("images can't be written with speculative decoding; start vLLM without it")
        self._states = place

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
        return _Request(self.served.grammar(params.extra_args), self._room(params))

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Takes a request into a slot, for V2; returns whether its scores change."""
        if self.served is not None:
            grammar = self.served.grammar(sampling_params.extra_args)
            self._slots[req_idx] = grammar, self._room(sampling_params)
        return self.served is not None

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Returns scores [R, V] with -inf where an id may not come next."""
        if ctx is None:
            return super().apply(logits)
        if self.served is None:
            return logits
        slots = ctx.idx_mapping_np.tolist()
        grammars, rooms = zip(*(self._slots[slot] for slot in slots), strict=True)
        mask = _mask(grammars if len(set(grammars)) > 1 else grammars[:1], logits.device)
        place, lengths = ctx.idx_mapping.long(), ctx.pos.long() + 1
        prompts = self._states.prompt_len.gpu.to(logits.device)[place]
        # all rows end in the last column: what stands before a row's first id is no id
        longest = int(ctx.seq_lens_upper_bound_np.max())
        column = lengths[:, None] - longest + torch.arange(longest, device=logits.device)  # [R, L]
        ids = self._states.all_token_ids.gpu[place].long().gather(1, column.clamp(min=0))
        ids[:, -1] = ctx.input_ids  # the newest, which may be on its way still
        ids = ids.masked_fill(column < 0, -1)
        ends = (ids == self.served.vocab.image_end) & (column >= prompts[:, None])
        state = mask.scan(ids)._replace(images=ends.sum(1))
        room = torch.tensor(rooms, device=logits.device).clamp(max=self.longest - prompts) - (lengths - prompts)
        return mask.constrain(logits, state, room)

    def _room(self, params: Any) -> int:
        return UNLIMITED if params.max_tokens is None else params.max_tokens


class _Request:
    """V1: a request's rules, made when the prompt is known."""

    def __init__(self, grammar: ImageGrammar, room: int) -> None:
        self._make = partial(RequestGrammar, grammar)
        self._room = room
        self._rules: RequestGrammar | None = None

    def __call__(self, prompt: list[int], written: list[int], scores: Tensor) -> Tensor:
        if any(id < 0 for id in written[-4:]):
            raise ConfigError(
                "vLLM did not pass the ids that were generated last; start it with --no-async-scheduling, or with "
                "--logits-processors dyntok.llm.vllm_plugin:VllmImageGrammar"
            )
        if self._rules is None:
            self._rules = self._make(prompt, self._room)
        return self._rules.constrain(written, scores)


def _served(config: Any) -> Served | None:
    model = config.model_config
    vocab = find_vocab(model.model)
    if vocab is None:
        return None
    eos = model.hf_config.eos_token_id
    return Served(vocab, tuple(eos) if isinstance(eos, list) else (eos,) * (eos is not None), model.get_vocab_size())


@lru_cache(maxsize=64)
def _mask(grammars: tuple[ImageGrammar, ...], device: torch.device) -> GrammarMask:
    return GrammarMask(grammars, device)
