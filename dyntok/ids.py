"""`IdRanges`: which ids of a language model stand for codes, map values, positions and sides, and their spelling.

Not here: whole images (`vocab.py`).
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from dyntok.errors import CodeError
from dyntok.layout import MAP_VALUES
from dyntok.validation import MAX_GRID_SIDE

START_TOKEN, END_TOKEN = "<|image|>", "<|/image|>"
Layout: TypeAlias = Literal["map", "positions", "lattice", "none"]
Kind: TypeAlias = Literal["start", "end", "code", "rows", "columns", "map", "position", "text"]

_LARGEST = {
    "uint8": 2**8 - 1,
    "int16": 2**15 - 1,
    "uint16": 2**16 - 1,
    "int32": 2**31 - 1,
    "uint32": 2**32 - 1,
    "int64": 2**63 - 1,
    "uint64": 2**64 - 1,
}


class IdRange(NamedTuple):
    """The ids `offset` to `offset + size - 1`, which stand for the numbers `first` to `first + size - 1`."""

    kind: Kind
    letter: str  # in the spelling <|letter:number|>
    offset: int
    size: int
    first: int = 0

    @property
    def stop(self) -> int:
        return self.offset + self.size

    def spell(self, number: int) -> str:
        """Returns the token of a number, with as many digits as the largest number of the range."""
        return f"<|{self.letter}:{number:0{len(str(self.first + self.size - 1))}d}|>"

    def __str__(self) -> str:
        return f"{self.offset} to {self.stop - 1}"


@dataclass(frozen=True)
class IdRanges:
    """The ids of a vocabulary: codes, rows, columns, map values or positions, in this order; start and end anywhere.

    Raises `CodeError` on ranges that overlap and on a layout that lacks what it needs.
    """

    size: int  # K, the number of codes
    offset: int  # id of code 0
    image_start: int
    image_end: int
    patches: int = 0  # number of position tokens; 0 unless the layout is "positions"
    layout: Layout | None = None  # None: "positions" where there are position tokens, otherwise "none"
    grid: tuple[int, int] | None = None  # rows and columns of every image; None: written with each image, or not known
    sides: int = 0  # number of tokens for rows, and again for columns; 0 where images do not say their grid
    fingerprint: str | None = None  # of the tokenizer whose codes these are

    def __post_init__(self) -> None:
        for name in ("size", "offset", "image_start", "image_end", "patches", "sides"):
            value, low = getattr(self, name), int(name == "size")
            if type(value) is not int or value < low:
                raise CodeError(f"{name} of the vocabulary is {value!r}, expected an integer of {low} or more")
        self._check_layout()
        if self.vocab_size > 2**32:
            raise CodeError(f"the highest id would be {self.vocab_size - 1}, expected at most {2**32 - 1} (uint32)")
        first, stop = self.offset, self.ranges[-1].stop
        for name in ("image_start", "image_end"):
            if first <= getattr(self, name) < stop:
                raise CodeError(
                    f"{name} is {getattr(self, name)}, expected an id outside {first} to {stop - 1}, the range of codes"
                    f"{' and positions' if stop > self.codes.stop else ''}"
                )
        if self.image_start == self.image_end:
            raise CodeError(f"image_start and image_end are both {self.image_start}, expected two different ids")

    def _check_layout(self) -> None:
        if self.layout is None:
            object.__setattr__(self, "layout", "positions" if self.patches else "none")
        if self.layout not in get_args(Layout):
            raise CodeError(f"layout is {self.layout!r}, expected one of {', '.join(get_args(Layout))}")
        if (self.layout == "positions") != (self.patches > 0):
            raise CodeError(
                f"layout {self.layout!r} with {self.patches} position tokens; expected some with 'positions', else 0"
            )
        if self.grid is not None:
            grid = tuple(self.grid) if isinstance(self.grid, tuple | list) else ()
            if len(grid) != 2 or any(type(side) is not int or not 1 <= side <= MAX_GRID_SIDE for side in grid):
                raise CodeError(f"grid of the vocabulary is {self.grid!r}, expected (rows, columns) of patches")
            object.__setattr__(self, "grid", grid)
            if self.sides:
                raise CodeError("the vocabulary has one grid and tokens for other grids, expected one of the two")
            if self.patches and self.patches < grid[0] * grid[1]:
                raise CodeError(f"{self.patches} position tokens for a grid of {grid[0]} x {grid[1]} are too few")
        elif self.sides and self.patches not in (0, self.sides**2):
            raise CodeError(f"{self.patches} position tokens and sides up to {self.sides}, expected {self.sides**2}")
        elif self.layout in ("map", "lattice") and not self.sides:
            raise CodeError(f"layout {self.layout!r} needs grid=(rows, columns), or sides= for images of any grid")

    @property
    def codes(self) -> IdRange:
        return IdRange("code", "v", self.offset, self.size)

    @property
    def rows(self) -> IdRange:
        return IdRange("rows", "r", self.codes.stop, self.sides, first=1)

    @property
    def columns(self) -> IdRange:
        return IdRange("columns", "c", self.rows.stop, self.sides, first=1)

    @property
    def map(self) -> IdRange:
        return IdRange("map", "m", self.columns.stop, MAP_VALUES * (self.layout == "map"))

    @property
    def positions(self) -> IdRange:
        return IdRange("position", "p", self.columns.stop, self.patches)

    @property
    def ranges(self) -> list[IdRange]:
        """All ranges that are not empty, in the order of their ids."""
        return [r for r in (self.codes, self.rows, self.columns, self.map, self.positions) if r.size]

    @property
    def position_offset(self) -> int:
        """Id of position 0."""
        return self.positions.offset

    @property
    def vocab_size(self) -> int:
        """Highest id + 1: the number of rows that the language model's embedding needs."""
        return max(self.ranges[-1].stop, self.image_start + 1, self.image_end + 1)

    @property
    def max_tokens(self) -> int | None:
        """Returns the most codes that an image may have; None where the grid is not known."""
        if self.grid is not None:
            return self.grid[0] * self.grid[1]
        return self.sides**2 or self.patches or None

    @property
    def tokens(self) -> dict[str, int]:
        """Every token as text with its id, in order of ids. Numbers have the number of digits of the largest one."""
        tokens = {START_TOKEN: self.image_start, END_TOKEN: self.image_end}
        for part in self.ranges:
            tokens |= {part.spell(part.first + i): part.offset + i for i in range(part.size)}
        return dict(sorted(tokens.items(), key=lambda item: item[1]))

    @property
    def dtype(self) -> str:
        """Returns the narrowest of uint16 and uint32 that holds every id (names as in NumPy)."""
        return "uint16" if self.vocab_size - 1 <= _LARGEST["uint16"] else "uint32"

    def check_dtype(self, dtype: Any) -> None:
        """Raises `CodeError` when some id would overflow `dtype`: a name such as "uint16", a NumPy or a torch dtype."""
        name = dtype.__name__ if isinstance(dtype, type) else str(dtype).removeprefix("torch.")
        if name not in _LARGEST:
            raise CodeError(f"ids can't be stored as {name}; expected one of {', '.join(_LARGEST)}")
        if self.vocab_size - 1 > _LARGEST[name]:
            raise CodeError(
                f"ids up to {self.vocab_size - 1} overflow {name} (at most {_LARGEST[name]}); "
                f"store them as {self.dtype}"
            )

    def meaning(self, id: int) -> tuple[Kind, int]:
        """Returns the kind of an id and its number: ("code", 17), ("rows", 16), ...; ("text", 0) for other tokens."""
        if id in (self.image_start, self.image_end):
            return ("start" if id == self.image_start else "end"), 0
        for part in self.ranges:
            if part.offset <= id < part.stop:
                return part.kind, id - part.offset + part.first
        return "text", 0

    def is_visual(self, id: int) -> bool:
        """Returns whether this is the id of a start, an end, a code, a map value, a position or a side."""
        return id in (self.image_start, self.image_end) or self.offset <= id < self.ranges[-1].stop
