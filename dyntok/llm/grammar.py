"""`ImageGrammar`: which ids may come next, so that whatever a language model writes decodes to pictures. Plain Python, O(1) per step.

Outside an image: text and image start. Inside: codes (each behind its position, where the vocabulary has positions), then the end.
The same for whole batches of logits is in `mask.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dyntok.errors import ConfigError
from dyntok.vocab import VisualVocab

UNLIMITED = 2**31 - 1


class GrammarState(NamedTuple):
    """Where in the grammar a sequence stands."""

    inside: bool = False  # in an image
    count: int = 0  # codes since the last image start
    images: int = 0  # image ends so far
    position: int = -1  # the last one since the last image start
    waiting: bool = False  # a position was written, its code was not


@dataclass(frozen=True)
class ImageGrammar:
    """Rules for one sequence.

    >>> grammar = ImageGrammar(VisualVocab.lavit(), max_tokens=256)
    >>> state = grammar.start([1, 15, 32000, 32002])   # a prompt; here it ends inside an image
    >>> grammar.allowed(state)                         # ranges of ids, each without its end
    [(32002, 48386), (32001, 32002)]
    >>> state = grammar.step(state, 32001)             # the id that was chosen

    max_tokens  most codes in an image, at most as many as the tokenizer has patches; or one number per image: the first that is written,
                the second, ..., the last number for all that follow
    min_tokens  fewest codes, in the same form; min_tokens = max_tokens asks for exactly so many
    min_images, max_images  how many images are written
    text        False: nothing but images, then one of `eos`
    eos         ids that end a sequence; they are held back until there are min_images
    vocab_size  how many ids the tokenizer has, when tokens were added behind the visual ones; ids from there on are never written
    """

    vocab: VisualVocab
    max_tokens: int | tuple[int, ...]
    min_tokens: int | tuple[int, ...] = 1
    min_images: int = 0
    max_images: int = UNLIMITED
    text: bool = True
    eos: int | tuple[int, ...] = ()
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "min_tokens", "eos"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, tuple | list) else (value,))
        if self.vocab_size is None:
            object.__setattr__(self, "vocab_size", self.vocab.vocab_size)
        if type(self.vocab_size) is not int or self.vocab_size < self.vocab.vocab_size:
            raise ConfigError(
                f"vocab_size is {self.vocab_size!r}, expected an integer of {self.vocab.vocab_size} or more: codes reach so far"
            )
        most = self.vocab.patches or UNLIMITED
        images = max(len(self.max_tokens), len(self.min_tokens))
        for i in range(images if self.max_tokens and self.min_tokens else 1):
            low, high = self.limits(i) if self.max_tokens and self.min_tokens else (None, None)
            if type(low) is not int or type(high) is not int or not 1 <= low <= high <= most:
                raise ConfigError(
                    f"image {i} is to have {low} to {high} tokens, expected integers with 1 <= min_tokens <= max_tokens <= {most}"
                )
        if (
            type(self.min_images) is not int
            or type(self.max_images) is not int
            or not 0 <= self.min_images <= self.max_images
        ):
            raise ConfigError(
                f"{self.min_images} to {self.max_images} images were asked for, expected integers with 0 <= min <= max"
            )
        visual = {self.vocab.image_start, self.vocab.image_end}
        codes = range(self.vocab.offset, self.vocab.position_offset + self.vocab.patches)
        for id in self.eos:
            if type(id) is not int or not 0 <= id < self.vocab_size or id in visual or id in codes:
                raise ConfigError(f"eos is {id!r}, expected ids of text below {self.vocab_size}")
        if not self.eos and not (self.text and self.text_ranges):
            raise ConfigError(
                "without text, eos= is needed, the id that ends a sequence: something must be allowed when all images are written"
            )

    def limits(self, image: int) -> tuple[int, int]:
        """Fewest and most codes of the image with this number, counted from 0."""
        return self.min_tokens[min(image, len(self.min_tokens) - 1)], self.max_tokens[
            min(image, len(self.max_tokens) - 1)
        ]

    def start(self, prompt: Sequence[int] = ()) -> GrammarState:
        """The state behind a prompt. Images that were finished in it do not count; one that it left open does."""
        state = GrammarState()
        for id in prompt:
            state = self.step(state, id)
        return state._replace(images=0)

    def step(self, state: GrammarState, id: int) -> GrammarState:
        """The state after one more id, allowed or not: text, too, ends an image."""
        vocab = self.vocab
        if id == vocab.image_start:
            return GrammarState(inside=True, images=state.images)
        if id == vocab.image_end:
            return GrammarState(images=state.images + 1)
        if vocab.offset <= id < vocab.position_offset:
            return state._replace(count=state.count + 1, waiting=False) if state.inside else state
        if vocab.position_offset <= id < vocab.position_offset + vocab.patches:
            return state._replace(position=id - vocab.position_offset, waiting=True) if state.inside else state
        return GrammarState(images=state.images)

    def allowed(self, state: GrammarState, room: int = UNLIMITED) -> list[tuple[int, int]]:
        """Ranges (first id, last id + 1) that may come next; never none.

        room: how many ids can still be written, this one included. An image is ended in time, and not begun where it would not fit.
        """
        vocab, width = self.vocab, 2 if self.vocab.patches else 1  # ids per code
        least, most = self.limits(state.images)
        if state.inside:
            if state.waiting:
                return [(vocab.offset, vocab.position_offset)]
            end = (vocab.image_end, vocab.image_end + 1)
            if state.count >= most or room <= width or state.position + 1 >= (vocab.patches or 1):
                return [end]
            ranges = [(vocab.offset, vocab.position_offset)]
            if vocab.patches:
                low = state.position + 1
                high = vocab.patches - max(least - state.count, 1)  # leaves a patch for each code that must follow
                ranges = [(vocab.position_offset + low, vocab.position_offset + max(high, low) + 1)]
            return [*ranges, end] if state.count >= least else ranges
        ranges = []
        if self.text:
            ranges += self.text_ranges
        if state.images < self.max_images and room >= width * least + 2:
            ranges.append((vocab.image_start, vocab.image_start + 1))
        if state.images >= self.min_images or not ranges:
            ranges += [(id, id + 1) for id in self.eos]
        return ranges

    @property
    def text_ranges(self) -> list[tuple[int, int]]:
        """Ranges of ids that are text, `eos` excluded; in order."""
        vocab = self.vocab
        taken = [(id, id + 1) for id in (vocab.image_start, vocab.image_end, *self.eos)]
        taken.append((vocab.offset, vocab.position_offset + vocab.patches))
        ranges, first = [], 0
        for low, high in sorted(taken) + [(self.vocab_size,) * 2]:
            if first < low:
                ranges.append((first, low))
            first = max(first, high)
        return ranges
