"""`GrammarMask`: `ImageGrammar` for batches, as tensor operations without a read back from the device, and as a logits processor.

Nothing here imports transformers; its `generate` takes any callable.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dyntok.errors import ConfigError
from dyntok.llm.grammar import UNLIMITED, ImageGrammar


class MaskState(NamedTuple):
    """`GrammarState` of R rows."""

    inside: Tensor  # bool [R]
    count: Tensor  # int64 [R]
    images: Tensor  # int64 [R]
    position: Tensor  # int64 [R]
    waiting: Tensor  # bool [R]


class GrammarMask:
    """One grammar for all rows, or one for each prompt of a batch (with beams or several sequences per prompt, prompt by prompt).

    The grammars must agree in `vocab`, `eos` and `vocab_size`. Raises `ConfigError` where they do not.
    """

    def __init__(self, grammars: ImageGrammar | Sequence[ImageGrammar], device: torch.device | str = "cpu") -> None:
        grammars = [grammars] if isinstance(grammars, ImageGrammar) else list(grammars)
        if not grammars or len({(g.vocab, g.eos, g.vocab_size) for g in grammars}) > 1:
            raise ConfigError(
                f"{len(grammars)} grammars, expected at least one, all with equal vocab, eos and vocab_size"
            )
        self.grammar, self.device = grammars[0], torch.device(device)
        images = max(len(limit) for g in grammars for limit in (g.min_tokens, g.max_tokens))
        limits = torch.tensor([[g.limits(i) for i in range(images)] for g in grammars], device=device)  # [G, images, 2]
        self._least, self._most = limits.unbind(-1)
        self._min_images = torch.tensor([g.min_images for g in grammars], device=device)
        self._max_images = torch.tensor([g.max_images for g in grammars], device=device)
        self._text = torch.tensor([g.text for g in grammars], device=device)

    def start(self, rows: int) -> MaskState:
        """R rows at the beginning."""
        flags, numbers = (
            torch.zeros(2, rows, dtype=torch.bool, device=self.device),
            torch.zeros(3, rows, dtype=torch.long, device=self.device),
        )
        return MaskState(flags[0], numbers[0], numbers[1], numbers[2] - 1, flags[1])

    def scan(self, ids: Tensor, prompt_length: int = 0) -> MaskState:
        """The state behind ids, int64 [R, L]; images that ended before `prompt_length` do not count."""
        vocab, length = self.grammar.vocab, ids.shape[1]
        if not length:
            return self.start(len(ids))
        place = torch.arange(1, length + 1, device=ids.device)
        starts, codes = ids == vocab.image_start, (ids >= vocab.offset) & (ids < vocab.position_offset)
        positions = (ids >= vocab.position_offset) & (ids < vocab.position_offset + vocab.patches)
        last_start = (starts * place).amax(1)  # counted from 1; 0: there is none
        last_break = (~(starts | codes | positions) * place).amax(1)
        inside = last_start > last_break
        since = place > last_start[:, None]  # [R, L]
        last_position = (positions & since).mul(place).amax(1)
        position = ids.gather(1, (last_position[:, None] - 1).clamp(min=0))[:, 0] - vocab.position_offset
        return MaskState(
            inside,
            (codes & since).sum(1) * inside,
            (ids[:, prompt_length:] == vocab.image_end).sum(1),
            torch.where(inside & (last_position > 0), position, -1),
            inside & (last_position == length),
        )

    def step(self, state: MaskState, ids: Tensor) -> MaskState:
        """The state after one more id per row, int64 [R]."""
        vocab = self.grammar.vocab
        start, end = ids == vocab.image_start, ids == vocab.image_end
        code = (ids >= vocab.offset) & (ids < vocab.position_offset)
        place = (ids >= vocab.position_offset) & (ids < vocab.position_offset + vocab.patches)
        stays = state.inside & (code | place)
        return MaskState(
            start | stays,
            (state.count + code) * stays,
            state.images + end,
            torch.where(stays, torch.where(place, ids - vocab.position_offset, state.position), -1),
            stays & place,
        )

    def forbidden(self, state: MaskState, width: int, room: int = UNLIMITED) -> Tensor:
        """bool [R, width]: True where an id may not come next. width: of the logits; room: as in `ImageGrammar.allowed`."""
        return self._decide(state, width, room)[0]

    def constrain(self, scores: Tensor, state: MaskState, room: int = UNLIMITED) -> Tensor:
        """Scores [R, V] with -inf where an id may not come next; a new tensor.

        Where start or end of an image is all that may come, its score becomes 0, so that it can be chosen even if another rule had ruled
        it out.
        """
        forbidden, start, end = self._decide(state, scores.shape[1], room)
        scores = scores.masked_fill(forbidden, float("-inf"))
        for id, only in ((self.grammar.vocab.image_start, start), (self.grammar.vocab.image_end, end)):
            scores[:, id] = scores[:, id].masked_fill(only, 0.0)
        return scores

    def _decide(self, state: MaskState, width: int, room: int) -> tuple[Tensor, Tensor, Tensor]:
        """What is forbidden, bool [R, V], and where start and end are all that may come, bool [R]."""
        grammar, vocab = self.grammar, self.grammar.vocab
        if width < grammar.vocab_size:
            raise ConfigError(
                f"logits for {width} ids, but the grammar's vocabulary has {grammar.vocab_size}; extend_model() makes room"
            )
        rows, per_code = len(state.inside), 2 if vocab.patches else 1
        image = state.images.clamp(max=self._least.shape[1] - 1)[:, None]
        least, most = (self._rows(table, rows).gather(1, image)[:, 0] for table in (self._least, self._most))
        text, min_images, max_images = (self._rows(t, rows) for t in (self._text, self._min_images, self._max_images))
        free = state.inside & ~state.waiting
        full = free & ((state.count >= most) | (state.position + 1 >= (vocab.patches or 1)))
        full = full | free if room <= per_code else full
        end = free & (full | (state.count >= least))
        codes = state.waiting | (free & ~full) if not vocab.patches else state.waiting
        start = ~state.inside & (state.images < max_images) & (per_code * least + 2 <= room)
        text = text & ~state.inside
        eos = ~state.inside & ((state.images >= min_images) | ~(start | (text if grammar.text_ranges else False)))

        forbidden = torch.empty(rows, width, dtype=torch.bool, device=state.inside.device)
        forbidden[:, grammar.vocab_size :] = True
        for low, high in grammar.text_ranges:
            forbidden[:, low:high] = ~text[:, None]
        for id in grammar.eos:
            forbidden[:, id] = ~eos
        forbidden[:, vocab.image_start], forbidden[:, vocab.image_end] = ~start, ~end
        forbidden[:, vocab.offset : vocab.position_offset] = ~codes[:, None]
        if vocab.patches:
            place = torch.arange(vocab.patches, device=forbidden.device)
            low = state.position + 1
            high = torch.maximum(vocab.patches - (least - state.count).clamp(min=1), low)
            fits = (place >= low[:, None]) & (place <= high[:, None]) & (free & ~full)[:, None]
            forbidden[:, vocab.position_offset : vocab.position_offset + vocab.patches] = ~fits
        return forbidden, start & ~(text | eos), full

    def _rows(self, table: Tensor, rows: int) -> Tensor:
        """[G, ...] -> [R, ...]"""
        prompts = len(table)
        if rows % prompts:
            raise ConfigError(
                f"{prompts} grammars for {rows} rows of logits, expected one grammar, or one for each prompt"
            )
        return table.repeat_interleave(rows // prompts, 0, output_size=rows)


class ImageLogitsProcessor:
    """For `generate(logits_processor=[...])` of transformers: greedy, sampling, beams, guidance, left padding, several prompts.

    >>> inputs = tokenizer(["A dog: "], return_tensors="pt")
    >>> only_pictures = ImageLogitsProcessor(grammar, prompt_length=inputs["input_ids"].shape[1], max_new_tokens=300)
    >>> model.generate(**inputs, max_new_tokens=300, logits_processor=[only_pictures])

    prompt_length: where generation begins; images that the prompt finished do not count
    max_new_tokens: where given, an image is ended in time and not begun where it would not fit

    It keeps nothing from step to step, so beams may be reordered and a processor may be used again for prompts of the same length.
    """

    def __init__(
        self, grammars: ImageGrammar | Sequence[ImageGrammar], prompt_length: int, max_new_tokens: int | None = None
    ) -> None:
        self._mask = GrammarMask(grammars)
        self._grammars, self.prompt_length, self.max_new_tokens = grammars, prompt_length, max_new_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Ids so far [R, L] and scores [R, V] to scores [R, V]."""
        if self._mask.device != scores.device:
            self._mask = GrammarMask(self._grammars, scores.device)
        room = (
            UNLIMITED if self.max_new_tokens is None else self.prompt_length + self.max_new_tokens - input_ids.shape[1]
        )
        return self._mask.constrain(scores, self._mask.scan(input_ids, self.prompt_length), room)
