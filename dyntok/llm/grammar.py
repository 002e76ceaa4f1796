"""`ImageGrammar`: which ids may come next, so that everything a language model writes decodes to images. Plain Python.

Outside an image: text and image start. Inside, in this order:

    rows, columns    where the vocabulary has them
    map tokens       in the layout "map", one for each block; their counts add up to the number of codes
    codes            in the layout "positions" each after its position
    image end

The same for whole batches of logits is in `mask.py`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from dyntok.errors import ConfigError
from dyntok.layout import MAP_VALUES, block_capacities, map_digits, num_blocks
from dyntok.llm import dialects
from dyntok.llm.rules import Language
from dyntok.structure import require_type
from dyntok.validation import integers
from dyntok.vocab import VisualVocab

UNLIMITED = 2**31 - 1
_Ranges = list[tuple[int, int]]


class GrammarState(NamedTuple):
    """A sequence's place in the grammar. All but `images` starts anew with each image."""

    inside: bool = False  # in an image
    count: int = 0  # type: ignore[assignment]  # codes; hides tuple.count
    images: int = 0  # image ends so far
    position: int = -1  # the last position
    waiting: bool = False  # a position was written, its code was not
    rows: int = 0  # the last number of rows; 0: none was written
    columns: int = 0
    blocks: int = 0  # map tokens
    total: int = 0  # the sum of their counts


def as_tuple(value: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """Returns numbers as a tuple: one number is a tuple of one, None an empty tuple."""
    if isinstance(value, tuple):
        return value
    return () if value is None else (value,)


@dataclass(frozen=True)
class ImageGrammar:
    """The rules for one sequence.

    >>> grammar = ImageGrammar(VisualVocab.lavit(), max_tokens=256)
    >>> state = grammar.start([1, 15, 32000, 32002])   # a prompt; this one ends inside an image
    >>> grammar.allowed(state)                         # ranges of ids, each without its end
    [(32002, 48386), (32001, 32002)]
    >>> state = grammar.step(state, 32001)             # the id that was chosen

    max_tokens  most codes of an image, at most one for each patch (the default, where the vocabulary knows the grid). A
                tuple gives the limits of the first image that is written, the second, and so on; its last number is for
                all that follow
    min_tokens  fewest codes, in the same form; min_tokens = max_tokens asks for an exact number
    min_images, max_images  how many images are written
    text        False: nothing but images, then one of `eos`
    eos         ids that end a sequence; they are not allowed before there are min_images
    vocab_size  number of ids of the tokenizer, when tokens were added after the visual ones; higher ids are never
                written
    grid        (rows, columns) that all images must have, where the vocabulary leaves the choice
    """

    vocab: VisualVocab
    max_tokens: int | tuple[int, ...] | None = None
    min_tokens: int | tuple[int, ...] = 1
    min_images: int = 0
    max_images: int = UNLIMITED
    text: bool = True
    eos: int | tuple[int, ...] = ()
    vocab_size: int | None = None
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        require_type("vocab", self.vocab, VisualVocab, "a VisualVocab")
        most = self.vocab.max_tokens or UNLIMITED
        if self.grid is not None:
            grid = tuple(self.grid) if isinstance(self.grid, Iterable) else ()
            if len(grid) != 2 or not all(type(side) is int and 1 <= side <= self.vocab.sides for side in grid):
                raise ConfigError(
                    f"grid is {self.grid!r}, expected rows and columns of 1 to {self.vocab.sides}; "
                    "a vocabulary with any_grid=True leaves the choice"
                )
            object.__setattr__(self, "grid", grid)
            most = grid[0] * grid[1]
        if self.max_tokens is None:
            if most == UNLIMITED:
                raise ConfigError("max_tokens is needed: this vocabulary does not know the grid of its images")
            object.__setattr__(self, "max_tokens", most)
        for name in ("max_tokens", "min_tokens", "eos"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, tuple | list) else (value,))
        if self.vocab_size is None:
            object.__setattr__(self, "vocab_size", self.vocab.vocab_size)
        if type(self.vocab_size) is not int or self.vocab_size < self.vocab.vocab_size:
            raise ConfigError(
                f"vocab_size is {self.vocab_size!r}, expected an integer of at least {self.vocab.vocab_size}, "
                "the number of ids up to the last visual one"
            )
        self._check_limits(most)
        for id in as_tuple(self.eos):
            if type(id) is not int or not 0 <= id < self.vocab_size or self.vocab.is_visual(id):
                raise ConfigError(f"eos is {id!r}, expected ids of text below {self.vocab_size}")
        if not self.eos and not (self.text and self.text_ranges):
            raise ConfigError("without text, eos= is needed: the id that ends a sequence after its last image")

    def _check_limits(self, most: int) -> None:
        images = 1
        if self.max_tokens and self.min_tokens:
            images = max(len(as_tuple(self.max_tokens)), len(as_tuple(self.min_tokens)))
        for i in range(images):
            low, high = self.limits(i) if self.max_tokens and self.min_tokens else (None, None)
            if type(low) is not int or type(high) is not int or not 1 <= low <= high <= most:
                raise ConfigError(
                    f"image {i} must have {low} to {high} tokens, "
                    f"expected integers with 1 <= min_tokens <= max_tokens <= {most}"
                )
        low, high = self.min_images, self.max_images
        if type(low) is not int or type(high) is not int or not 0 <= low <= high:
            raise ConfigError(f"{low} to {high} images were requested, expected integers with 0 <= min <= max")

    def limits(self, image: int) -> tuple[int, int]:
        """Returns the fewest and most codes of the image with this number, counted from 0."""
        least, most = as_tuple(self.min_tokens), as_tuple(self.max_tokens)
        return least[min(image, len(least) - 1)], most[min(image, len(most) - 1)]

    def start(self, prompt: Sequence[int] = ()) -> GrammarState:
        """Returns the state after a prompt. Images that are complete there do not count; one that is left open does."""
        state = GrammarState()
        for id in integers(prompt, "prompt").tolist():
            state = self.step(state, id)
        return state._replace(images=0)

    def step(self, state: GrammarState, id: int) -> GrammarState:
        """Returns the state after one more id, allowed or not. Text, too, ends an image."""
        kind, number = self.vocab.meaning(id)
        if kind == "start":
            return GrammarState(inside=True, images=state.images)
        if kind == "end":
            return GrammarState(images=state.images + 1)
        if kind == "text" or not state.inside:
            return GrammarState(images=state.images)
        if kind == "code":
            return state._replace(count=state.count + 1, waiting=False)
        if kind == "position":
            return state._replace(position=number, waiting=True)
        if kind == "map":
            digits = int(map_digits()[number].sum())
            return state._replace(blocks=state.blocks + 1, total=state.total + digits)
        return state._replace(rows=number) if kind == "rows" else state._replace(columns=number)

    def allowed(self, state: GrammarState, room: int = UNLIMITED) -> list[tuple[int, int]]:
        """Returns the ranges (first id, last id + 1) that may come next; at least one.

        room: how many ids can still be written, this one included. An image ends in time, and does not begin where it
        would not fit.
        """
        if state.inside:
            return self._inside(state, room)
        vocab, ranges = self.vocab, []
        if self.text:
            ranges += self.text_ranges
        least, _ = self.limits(state.images)
        if state.images < self.max_images and room >= self.shortest(least):
            ranges.append((vocab.image_start, vocab.image_start + 1))
        if state.images >= self.min_images or not ranges:
            ranges += [(id, id + 1) for id in as_tuple(self.eos)]
        return ranges

    def _inside(self, state: GrammarState, room: int) -> _Ranges:
        vocab, width = self.vocab, self.ids_per_code
        least, most = self.limits(state.images)
        if vocab.sides and not state.rows:
            return _shifted(self._rows(least, room), vocab.rows.offset - 1)
        if vocab.sides and not state.columns:
            return _shifted(self._columns(state.rows, least, room), vocab.columns.offset - 1)
        grid = (state.rows, state.columns) if vocab.sides else vocab.grid
        patches = grid[0] * grid[1] if grid else vocab.patches or UNLIMITED
        least, most = min(least, patches), min(most, patches)
        codes, end = (vocab.offset, vocab.codes.stop), (vocab.image_end, vocab.image_end + 1)
        if vocab.layout == "map":
            blocks = num_blocks(grid) - state.blocks  # those that are left
            if blocks > 0:
                most = min(most, room - blocks - 1)  # leaves ids for the other map tokens and the end
                return self._map(grid, state, least, most)
            return [codes if state.count < state.total else end]
        if state.waiting:
            return [codes]
        if state.count >= most or room <= width or state.position + 1 >= patches:
            return [end]
        ranges = [codes]
        if vocab.patches:
            low = state.position + 1
            high = patches - max(least - state.count, 1)  # leaves a patch for each code that must follow
            ranges = [(vocab.position_offset + low, vocab.position_offset + max(high, low) + 1)]
        return [*ranges, end] if state.count >= least else ranges

    def _map(self, grid: tuple[int, int], state: GrammarState, least: int, most: int) -> _Ranges:
        """Returns the map tokens with which the total can still reach `least` and does not exceed `most`."""
        capacities = block_capacities(grid)
        own, after = capacities[state.blocks], int(capacities[state.blocks + 1 :].sum())
        low = min(max(least - state.total - after, 0), int(own.sum()))
        values = _map_values(tuple(own.tolist()), low, max(most - state.total, low))
        return _shifted(values, self.vocab.map.offset)

    def _rows(self, least: int, room: int) -> list[int]:
        sides = range(1, self.vocab.sides + 1)
        fitting = [r for r in sides if any(self._fits(r, c, least, room) for c in sides)]
        return fitting or [r for r in sides if any(self._fits(r, c, least, UNLIMITED) for c in sides)]

    def _columns(self, rows: int, least: int, room: int) -> list[int]:
        sides = range(1, self.vocab.sides + 1)
        for space in (room + 1, UNLIMITED):  # the rows are written already
            if fitting := [c for c in sides if self._fits(rows, c, least, space)]:
                return fitting
        return list(sides)

    def _fits(self, rows: int, columns: int, least: int, room: int) -> bool:
        """Returns whether an image of this grid may be written, with `room` ids from its rows token to its end."""
        if self.grid not in (None, (rows, columns)) or rows * columns < least:
            return False
        return self.header((rows, columns)) + self.ids_per_code * least + 1 <= room

    @property
    def ids_per_code(self) -> int:
        return 2 if self.vocab.patches else 1

    def header(self, grid: tuple[int, int] | None) -> int:
        """Returns the number of ids between image start and the first code or position."""
        return 2 * (self.vocab.sides > 0) + (num_blocks(grid) if self.vocab.layout == "map" else 0)

    def shortest(self, least: int) -> int:
        """Returns the smallest number of ids of an image of `least` codes, start and end included."""
        return _shortest_header(self, least) + self.ids_per_code * least + 2

    def to_xgrammar(self) -> str:
        """Returns the same rules as EBNF over ids: `xgrammar.Grammar.from_ebnf(grammar.to_xgrammar())`.

        This and the other three leave the end of a sequence to the engine, which must have `eos` as its stop ids.
        """
        return dialects.to_xgrammar(self._language)

    def to_lark(self) -> str:
        """Returns the same rules as a Lark grammar over ids, for llguidance."""
        return dialects.to_lark(self._language)

    def to_gbnf(self) -> str:
        """Returns the rules over the spelling of tokens in GBNF, for llama.cpp; text can't contain `<|`."""
        return dialects.to_gbnf(self._language)

    def to_regex(self) -> str:
        """Returns the rules over the spelling of tokens as a regular expression, for outlines; text can't contain `<|`.

        Raises `ConfigError` for the layouts "map" and "positions".
        """
        return dialects.to_regex(self._language)

    @property
    def _language(self) -> Language:
        images = range(max(len(as_tuple(self.min_tokens)), len(as_tuple(self.max_tokens))))
        most = None if self.max_images == UNLIMITED else self.max_images
        text = self.text_ranges if self.text else []
        return Language(self.vocab, [self.limits(i) for i in images], (self.min_images, most), text, self.grid)

    @property
    def text_ranges(self) -> list[tuple[int, int]]:
        """Ranges of ids that are text, `eos` excluded; in order."""
        vocab = self.vocab
        taken = [(id, id + 1) for id in (vocab.image_start, vocab.image_end, *as_tuple(self.eos))]
        taken.append((vocab.offset, vocab.ranges[-1].stop))
        ranges, first = [], 0
        for low, high in sorted(taken) + [(self.vocab_size,) * 2]:
            if first < low:
                ranges.append((first, low))
            first = max(first, high)
        return ranges


@lru_cache
def _shortest_header(grammar: ImageGrammar, least: int) -> int:
    vocab = grammar.vocab
    if not vocab.sides:
        return grammar.header(vocab.grid)
    if grammar.grid is not None:
        return grammar.header(grammar.grid)
    sides = range(1, vocab.sides + 1)
    return min(grammar.header((r, -(-least // r))) for r in sides if -(-least // r) <= vocab.sides)


@lru_cache(maxsize=4096)
def _map_values(capacities: tuple[int, ...], low: int, high: int) -> tuple[int, ...]:
    """Returns the map values of a block whose counts add up to `low` to `high`."""
    digits = map_digits().tolist()
    return tuple(
        value
        for value in range(MAP_VALUES)
        if low <= sum(digits[value]) <= high and all(map(int.__le__, digits[value], capacities))
    )


def _shifted(numbers: Iterable[int], offset: int) -> _Ranges:
    """Returns rising numbers plus an offset as ranges."""
    ranges: _Ranges = []
    for id in (number + offset for number in numbers):
        if ranges and ranges[-1][1] == id:
            ranges[-1] = (ranges[-1][0], id + 1)
        else:
            ranges.append((id, id + 1))
    return ranges
