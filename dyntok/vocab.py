"""`VisualVocab`: where codes live in an LLM's vocabulary, how they are spelled there, and the way there and back.

Not here: forgiving parsing of what a model wrote (`dyntok/llm/parsing.py`); ids that do not fit raise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dyntok.encoding import Encoding
from dyntok.errors import CodeError
from dyntok.ragged import counted, integers, refuse

LAVIT_IMAGE_START, LAVIT_IMAGE_END, LAVIT_OFFSET = 32000, 32001, 32002  # ids in LaVIT's LLM: code k is LAVIT_OFFSET + k
LAVIT_CODES = 16384
START_TOKEN, END_TOKEN = "<|image|>", "<|/image|>"

_LARGEST = {
    "uint8": 2**8 - 1,
    "int16": 2**15 - 1,
    "uint16": 2**16 - 1,
    "int32": 2**31 - 1,
    "uint32": 2**32 - 1,
    "int64": 2**63 - 1,
    "uint64": 2**64 - 1,
}


@dataclass(frozen=True)
class VisualVocab:
    """Code k, 0 to size - 1, has id offset + k; an image's codes stand between the ids image_start and image_end.

    With `patches`, every code is written behind its patch: position p has id offset + size + p, 0 to patches - 1.

    >>> VisualVocab.lavit().to_ids([0, 16383])
    tensor([32000, 32002, 48385, 32001])
    >>> VisualVocab.lavit().to_text([0, 16383])
    '<|image|><|v:00000|><|v:16383|><|/image|>'
    """

    size: int  # K, the number of codes
    offset: int  # id of code 0
    image_start: int
    image_end: int
    patches: int = 0  # N, the number of position tokens; 0 where positions are not written

    def __post_init__(self) -> None:
        for name in ("size", "offset", "image_start", "image_end", "patches"):
            value, low = getattr(self, name), int(name == "size")
            if type(value) is not int or value < low:
                raise CodeError(f"{name} of the vocabulary is {value!r}, expected an integer of {low} or more")
        if self.vocab_size > 2**32:
            raise CodeError(f"the highest id would be {self.vocab_size - 1}, expected at most {2**32 - 1} (uint32)")
        for name in ("image_start", "image_end"):
            if self.offset <= getattr(self, name) < self.position_offset + self.patches:
                also = " and the positions behind them" * bool(self.patches)
                raise CodeError(
                    f"{name} is {getattr(self, name)}, expected an id outside the codes' {self._range}{also}"
                )
        if self.image_start == self.image_end:
            raise CodeError(f"image_start and image_end are both {self.image_start}, expected two different ids")

    @classmethod
    def after(cls, vocab_size: int, size: int, patches: int = 0) -> "VisualVocab":
        """Appended to a vocabulary of `vocab_size` entries: start, end, then `size` codes, as LaVIT does; then `patches` positions."""
        if type(vocab_size) is not int or vocab_size < 0:
            raise CodeError(f"vocab_size is {vocab_size!r}, expected an integer of 0 or more")
        return cls(size=size, offset=vocab_size + 2, image_start=vocab_size, image_end=vocab_size + 1, patches=patches)

    @classmethod
    def lavit(cls) -> "VisualVocab":
        """LaVIT's layout behind LLaMA's 32,000 entries: start 32000, end 32001, code k = 32002 + k, K = 16,384."""
        return cls(LAVIT_CODES, LAVIT_OFFSET, LAVIT_IMAGE_START, LAVIT_IMAGE_END)

    @property
    def vocab_size(self) -> int:
        """Highest id + 1: how many rows the LLM's embedding needs."""
        return max(self.position_offset + self.patches, self.image_start + 1, self.image_end + 1)

    @property
    def position_offset(self) -> int:
        """Id of position 0."""
        return self.offset + self.size

    @property
    def tokens(self) -> dict[str, int]:
        """Every token as text, and its id; in the order of ids. Numbers have as many digits as the largest of their kind."""
        tokens = {START_TOKEN: self.image_start, END_TOKEN: self.image_end}
        tokens |= {self._spelled("v", k, self.size): self.offset + k for k in range(self.size)}
        tokens |= {self._spelled("p", p, self.patches): self.position_offset + p for p in range(self.patches)}
        return dict(sorted(tokens.items(), key=lambda item: item[1]))

    @property
    def dtype(self) -> str:
        """The narrowest of uint16 and uint32 that holds every id (names as NumPy has them)."""
        return "uint16" if self.vocab_size - 1 <= _LARGEST["uint16"] else "uint32"

    def check_dtype(self, dtype: str) -> None:
        """Raises `CodeError` when some id would overflow `dtype`: a name such as "uint16", a NumPy dtype or a torch dtype."""
        name = str(dtype).removeprefix("torch.")
        if name not in _LARGEST:
            raise CodeError(f"ids can't be stored as {name}; expected one of {', '.join(_LARGEST)}")
        if self.vocab_size - 1 > _LARGEST[name]:
            raise CodeError(
                f"ids up to {self.vocab_size - 1} overflow {name} (at most {_LARGEST[name]}); store them as {self.dtype}"
            )

    def is_visual(self, id: int) -> bool:
        """Whether this is start, end, or the id of a code or position."""
        return id in (self.image_start, self.image_end) or self.offset <= id < self.position_offset + self.patches

    def to_ids(
        self,
        codes: Tensor | Sequence[int] | Encoding,
        wrap: bool = True,
        *,
        positions: Tensor | Sequence[int] | None = None,
    ) -> Tensor | list[Tensor]:
        """int64 [T + 2] of one image's codes [T], between start and end; [T] without `wrap`. An Encoding gives a list, image by image.

        positions: [T], where the vocabulary has tokens for them; there are 2 T ids then, each code behind its position.

        Raises `CodeError` on a code outside 0 to K - 1, on no codes at all, and on positions that are missing, too many or not rising.
        """
        if isinstance(codes, Encoding):
            places = codes.positions if self.patches and codes.positions is not None else [None] * len(codes)
            return [self.to_ids(row, wrap, positions=place) for row, place in zip(codes.codes, places, strict=True)]
        row = integers(codes, "codes")
        if not len(row):
            raise CodeError("no codes; an image has at least one")
        refuse(
            (row < 0) | (row >= self.size),
            lambda i: f"code {row[i]} at place {i} is out of range, expected 0 to {self.size - 1}",
        )
        ids = row + self.offset
        if (positions is None) != (self.patches == 0):
            raise CodeError(
                f"this vocabulary has {counted(self.patches, 'position token')}, and positions were {'not ' * (positions is None)}given; "
                f"{'give one for each code' if positions is None else 'leave them out'}"
            )
        if positions is not None:
            place = integers(positions, "positions").to(ids.device)
            self._check_positions(place, len(row))
            ids = torch.stack([place + self.position_offset, ids], 1).flatten()
        return torch.cat([ids.new_tensor([self.image_start]), ids, ids.new_tensor([self.image_end])]) if wrap else ids

    def to_codes(self, ids: Tensor | Sequence[int]) -> Tensor:
        """int64 [T], the inverse of `to_ids`: one image's ids, with start and end around them or with neither.

        Raises `CodeError` on any other id, on start or end in the wrong place or without the other, and on no codes at all.
        """
        return self._codes_and_positions(ids)[0]

    def to_positions(self, ids: Tensor | Sequence[int]) -> Tensor | None:
        """int64 [T], the positions in one image's ids; None where the vocabulary has none. Errors are those of `to_codes`."""
        return self._codes_and_positions(ids)[1]

    def to_text(self, codes: Tensor | Sequence[int], *, positions: Tensor | Sequence[int] | None = None) -> str:
        """One image as text, between start and end; arguments and errors are those of `to_ids`."""
        ids = self.to_ids(codes, wrap=False, positions=positions).tolist()
        numbers = (
            (id - self.offset, "v", self.size)
            if id < self.position_offset
            else (id - self.position_offset, "p", self.patches)
            for id in ids
        )
        return (
            START_TOKEN + "".join(self._spelled(letter, number, count) for number, letter, count in numbers) + END_TOKEN
        )

    def _codes_and_positions(self, ids: Tensor | Sequence[int]) -> tuple[Tensor, Tensor | None]:
        row = integers(ids, "ids")
        starts, ends = ((row == marker).nonzero().flatten().tolist() for marker in (self.image_start, self.image_end))
        if starts or ends:
            if starts != [0] or ends != [len(row) - 1]:
                raise CodeError(
                    f"{counted(len(row), 'id')} with start ({self.image_start}) at {starts} and end ({self.image_end}) at {ends}; "
                    "expected one image: start first, end last, or neither of them"
                )
            row = row[1:-1]
        positions = None
        if self.patches:
            if len(row) % 2:
                raise CodeError(f"{counted(len(row), 'id')} in an image, expected pairs of position and code")
            positions, row = row[::2] - self.position_offset, row[1::2]
        if not len(row):
            raise CodeError("no codes among these ids; an image has at least one")
        codes = row - self.offset
        refuse(
            (codes < 0) | (codes >= self.size), lambda i: f"id {row[i]} is not the id of a code, expected {self._range}"
        )
        if positions is not None:
            self._check_positions(positions, len(codes))
        return codes, positions

    def _check_positions(self, positions: Tensor, codes: int) -> None:
        if len(positions) != codes:
            raise CodeError(
                f"{counted(codes, 'code')} with {counted(len(positions), 'position')}, expected one for each"
            )
        outside = (positions < 0) | (positions >= self.patches)
        refuse(
            outside, lambda i: f"position {positions[i]} at place {i} is out of range, expected 0 to {self.patches - 1}"
        )
        unordered = positions.diff() <= 0
        refuse(unordered, lambda i: f"position {positions[i + 1]} comes after {positions[i]}; expected raster order")

    @staticmethod
    def _spelled(letter: str, number: int, count: int) -> str:
        return f"<|{letter}:{number:0{len(str(count - 1))}d}|>"

    @property
    def _range(self) -> str:
        return f"{self.offset} to {self.offset + self.size - 1}"
