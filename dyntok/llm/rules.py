"""`Language`: what `ImageGrammar` allows, as rules of a context-free grammar over ids. `dialects.py` writes them down.

The rules hold the choice of what comes next. Not here: room that is left (`max_new_tokens`), which no grammar knows.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from typing import TypeAlias

from dyntok.errors import ConfigError
from dyntok.ids import IdRange, IdRanges
from dyntok.layout import block_capacities, map_digits, num_blocks

MOST_RULES = 40_000  # repetitions count, too: engines write them out


@dataclass(frozen=True)
class Ids:
    """One id out of ranges (first, last + 1)."""

    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, ids: Iterable[int]) -> "Ids":
        """Returns rising ids as ranges."""
        ranges: list[tuple[int, int]] = []
        for id in ids:
            if ranges and ranges[-1][1] == id:
                ranges[-1] = (ranges[-1][0], id + 1)
            else:
                ranges.append((id, id + 1))
        return cls(tuple(ranges))


@dataclass(frozen=True)
class Ref:
    """A rule by its name."""

    name: str


@dataclass(frozen=True)
class Seq:
    """One after another; without parts: nothing."""

    parts: tuple["Node", ...] = ()

    @classmethod
    def of(cls, *parts: "Node") -> "Node":
        """Returns parts one after another, those that are nothing left out."""
        parts = tuple(part for part in parts if part != NOTHING)
        return parts[0] if len(parts) == 1 else cls(parts)


@dataclass(frozen=True)
class Alt:
    """One of them."""

    parts: tuple["Node", ...]


@dataclass(frozen=True)
class Repeat:
    """`low` to `high` times; None: any number."""

    part: "Node"
    low: int
    high: int | None


Node: TypeAlias = Ids | Ref | Seq | Alt | Repeat
TEXT, CODE, NOTHING = Ref("text"), Ref("code"), Seq()


@dataclass
class Language:
    """The rules of a grammar, "root" first. The end of a sequence is not among them: engines write it by themselves.

    vocab       which ids mean what
    limits      (fewest, most) codes of the first image, the second, ...; the last pair is for all that follow
    images      (fewest, most) images; None: any number
    text        ranges of ids that are text; empty: images alone
    grid        the only (rows, columns) that may be written, where the vocabulary leaves the choice

    Raises `ConfigError` where the rules would be too many.
    """

    vocab: IdRanges
    limits: list[tuple[int, int]]
    images: tuple[int, int | None]
    text: list[tuple[int, int]]
    grid: tuple[int, int] | None = None
    rules: dict[str, Node] = field(default_factory=dict, init=False)
    _size: int = field(default=0, init=False)
    _waiting: list[tuple[str, Callable[[], Node]]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        codes = self.vocab.codes
        self._named("root", lambda: self._images_from(0))
        self._named("code", lambda: Ids(((codes.offset, codes.stop),)))
        if self.text:
            self._named("text", lambda: Ids(tuple(self.text)))
        while self._waiting:  # one after another: rules reach deep
            name, make = self._waiting.pop()
            self.rules[name] = make()

    def _images_from(self, number: int) -> Node:
        """Returns the rule for text and the images from this number on."""
        low = max(self.images[0] - number, 0)
        high = None if self.images[1] is None else self.images[1] - number
        if high == 0:
            return self._text
        image = self._named(f"image{number}", lambda: self._image(*self.limits[number]))
        if number == len(self.limits) - 1:
            return Seq.of(self._text, _repeated(Seq.of(image, self._text), low, high))
        following = self._named(f"after{number}", lambda: self._images_from(number + 1))
        both = Seq.of(image, following)
        return Seq.of(self._text, both if low else _repeated(both, 0, 1))

    @property
    def _text(self) -> Node:
        return _repeated(TEXT, 0, None) if self.text else NOTHING

    def _named(self, name: str, make: Callable[[], Node], size: int = 1) -> Ref:
        """Returns a reference to a rule, which is made once."""
        if name not in self.rules:
            self._size += size
            _check_size(self._size)
            self.rules[name] = NOTHING  # holds the place
            self._waiting.append((name, make))
        return Ref(name)

    def _image(self, least: int, most: int) -> Node:
        vocab = self.vocab
        start, end = (Ids(((id, id + 1),)) for id in (vocab.image_start, vocab.image_end))
        if not vocab.sides:
            return Seq.of(start, self._body(least, most, vocab.grid), end)
        sides = range(1, vocab.sides + 1)
        known = [self.grid] if self.grid else [(rows, columns) for rows in sides for columns in sides]
        known = [grid for grid in known if grid[0] * grid[1] >= least]
        if vocab.layout == "map":  # each block of each grid needs a rule of its own, so that this is a lower bound
            _check_size(sum(map(num_blocks, known)))
        same: dict[tuple[tuple[Node, ...], ...], list[int]] = {}  # what follows a number of rows -> those numbers
        for rows in sorted({grid[0] for grid in known}):
            bodies: dict[Node, list[int]] = {}
            for columns in (grid[1] for grid in known if grid[0] == rows):
                bodies.setdefault(self._body(least, most, (rows, columns)), []).append(columns)
            following = tuple((_numbers(vocab.columns, columns), body) for body, columns in bodies.items())
            same.setdefault(following, []).append(rows)
        choices = [
            Seq.of(_numbers(vocab.rows, rows), Alt(tuple(Seq.of(*parts) for parts in following)))
            for following, rows in same.items()
        ]
        return Seq.of(start, Alt(tuple(choices)), end)

    def _body(self, least: int, most: int, grid: tuple[int, int] | None) -> Node:
        """Returns what stands between the grid and the end of an image."""
        patches = grid[0] * grid[1] if grid else self.vocab.patches
        if patches:
            least, most = min(least, patches), min(most, patches)
        if self.vocab.layout == "positions":
            return self._positions(0, patches, least, most)
        if self.vocab.layout == "map" and grid:
            return self._map(grid, 0, least, most)
        return self._named(f"codes{least}to{most}", lambda: _repeated(CODE, least, most), most)

    def _positions(self, first: int, patches: int, low: int, high: int) -> Node:
        """Pairs of position and code, `low` to `high` of them, at rising positions from `first` on."""
        left = patches - first
        high = min(high, left)
        if not high:
            return NOTHING

        def make() -> Node:
            rest = self._positions(first + 1, patches, max(low - 1, 0), high - 1)
            used = Seq.of(_numbers(self.vocab.positions, [first]), CODE, rest)
            return Alt((used, self._positions(first + 1, patches, low, high))) if low < left else used

        return self._named(f"of{patches}from{first}take{low}to{high}", make)

    def _map(self, grid: tuple[int, int], block: int, low: int, high: int) -> Node:
        """Returns map tokens from this block on, whose counts add up to `low` to `high`, and as many codes."""
        if block == num_blocks(grid):
            return NOTHING
        own, after = _capacities(grid)[block]
        high = min(high, after + sum(own))

        def make() -> Node:
            choices = []
            for count, values in _values_by_count(own).items():
                if low - count <= after and count <= high:
                    name = f"map{'x'.join(map(str, own))}of{count}"
                    value = self._named(name, partial(_numbers, self.vocab.map, values))
                    rest = self._map(grid, block + 1, max(low - count, 0), high - count)
                    choices.append(Seq.of(value, rest, _repeated(CODE, count, count)))
            return Alt(tuple(choices))

        return self._named(f"map{grid[0]}by{grid[1]}at{block}take{low}to{high}", make)


def _check_size(rules: int) -> None:
    if rules > MOST_RULES:
        raise ConfigError(
            f"the grammar needs more than {MOST_RULES} rules; give grid= or a smaller max_tokens=, "
            "or with one grid leave the number of codes free (max_tokens=None, min_tokens=1)"
        )


@lru_cache(maxsize=8)
def _capacities(grid: tuple[int, int]) -> list[tuple[tuple[int, ...], int]]:
    """Returns for each block the capacities of its four cells, and that of all later blocks together."""
    each = block_capacities(grid)
    later = each.sum() - each.sum(1).cumsum(0)
    return [(tuple(own), after) for own, after in zip(each.tolist(), later.tolist(), strict=True)]


def _repeated(part: Node, low: int, high: int | None) -> Node:
    if high == 0 or part == NOTHING:
        return NOTHING
    return part if (low, high) == (1, 1) else Repeat(part, low, high)


@cache
def _values_by_count(capacities: tuple[int, ...]) -> dict[int, list[int]]:
    """Returns map values that fit into a block, by the sum of their four counts."""
    found: dict[int, list[int]] = {}
    for value, digits in enumerate(map_digits().tolist()):
        if all(map(int.__le__, digits, capacities)):
            found.setdefault(sum(digits), []).append(value)
    return found


def _numbers(part: IdRange, numbers: Iterable[int]) -> Ids:
    """Returns the ids of numbers of one kind."""
    return Ids.of(number - part.first + part.offset for number in numbers)
