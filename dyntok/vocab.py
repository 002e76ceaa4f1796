"""`VisualVocab`: the ids and the spelling of codes in an LLM's vocabulary, and the conversion in both directions.

Not here: tolerant parsing of generated output (`dyntok/llm/parsing.py`). An id that does not fit raises an error.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dyntok.encoding import Encoding
from dyntok.errors import CodeError
from dyntok.validation import counted, integers, refuse

LAVIT_IMAGE_START, LAVIT_IMAGE_END = 32000, 32001  # ids in LaVIT's LLM
LAVIT_OFFSET = 32002  # id of code 0
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
    """A layout of visual tokens in an LLM's vocabulary.

    Code k has id offset + k. An image's codes stand between the ids image_start and image_end. With `patches`, every
    code follows its position: position p has id offset + size + p.

    >>> VisualVocab.lavit().to_ids([0, 16383])
    tensor([32000, 32002, 48385, 32001])
    >>> VisualVocab.lavit().to_text([0, 16383])
    '<|image|><|v:00000|><|v:16383|><|/image|>'
    """

    size: int  # K, the number of codes
    offset: int  # id of code 0
    image_start: int
    image_end: int
    patches: int = 0  # N, the number of position tokens; 0 if positions are not written

    def __post_init__(self) -> None:
        for name in ("size", "offset", "image_start", "image_end", "patches"):
            value, low = getattr(self, name), int(name == "size")
            if type(value) is not int or value < low:
                raise CodeError(f"{name} of the vocabulary is {value!r}, expected an integer of {low} or more")
        if self.vocab_size > 2**32:
            raise CodeError(f"the highest id would be {self.vocab_size - 1}, expected at most {2**32 - 1} (uint32)")
        for name in ("image_start", "image_end"):
            if self.offset <= getattr(self, name) < self.position_offset + self.patches:
                taken = f"the codes' {self._range}" + (" and the positions after them" if self.patches else "")
                raise CodeError(f"{name} is {getattr(self, name)}, expected an id outside {taken}")
        if self.image_start == self.image_end:
            raise CodeError(f"image_start and image_end are both {self.image_start}, expected two different ids")

    @classmethod
    def after(cls, vocab_size: int, size: int, patches: int = 0) -> "VisualVocab":
        """Append visual tokens to a vocabulary of `vocab_size` entries.

        The order is LaVIT's: start, end, `size` codes; then `patches` positions.
        """
        if type(vocab_size) is not int or vocab_size < 0:
            raise CodeError(f"vocab_size is {vocab_size!r}, expected an integer of 0 or more")
        return cls(size=size, offset=vocab_size + 2, image_start=vocab_size, image_end=vocab_size + 1, patches=patches)

    @classmethod
    def lavit(cls) -> "VisualVocab":
        """Returns LaVIT's layout after LLaMA's 32,000 entries: start 32000, end 32001, 16,384 codes from 32002."""
        return cls(LAVIT_CODES, LAVIT_OFFSET, LAVIT_IMAGE_START, LAVIT_IMAGE_END)

    @property
    def vocab_size(self) -> int:
        """The highest id + 1: the number of rows that the LLM's embedding needs."""
        return max(self.position_offset + self.patches, self.image_start + 1, self.image_end + 1)

    @property
    def position_offset(self) -> int:
        """The id of position 0."""
        return self.offset + self.size

    @property
    def tokens(self) -> dict[str, int]:
        """Every token's text and id, in order of ids. Numbers are padded with zeros to the width of the largest."""
        tokens = {START_TOKEN: self.image_start, END_TOKEN: self.image_end}
        tokens |= {self._spelled("v", k, self.size): self.offset + k for k in range(self.size)}
        tokens |= {self._spelled("p", p, self.patches): self.position_offset + p for p in range(self.patches)}
        return dict(sorted(tokens.items(), key=lambda item: item[1]))

    @property
    def dtype(self) -> str:
        """The NumPy name of the narrowest of uint16 and uint32 that holds every id."""
        return "uint16" if self.vocab_size - 1 <= _LARGEST["uint16"] else "uint32"

    def check_dtype(self, dtype: str) -> None:
        """Raise `CodeError` if an id would overflow `dtype`, a name such as "uint16" or a dtype of NumPy or torch."""
        name = str(dtype).removeprefix("torch.")
        if name not in _LARGEST:
            raise CodeError(f"ids can't be stored as {name}; expected one of {', '.join(_LARGEST)}")
        if self.vocab_size - 1 > _LARGEST[name]:
            highest = f"ids up to {self.vocab_size - 1} overflow {name} (at most {_LARGEST[name]})"
            raise CodeError(f"{highest}; store them as {self.dtype}")

    def is_visual(self, id: int) -> bool:
        """Returns whether this is the id of a start, an end, a code or a position."""
        return id in (self.image_start, self.image_end) or self.offset <= id < self.position_offset + self.patches

    def to_ids(
        self,
        codes: Tensor | Sequence[int] | Encoding,
        wrap: bool = True,
        *,
        positions: Tensor | Sequence[int] | None = None,
    ) -> Tensor | list[Tensor]:
        """Returns one image's codes [T] as ids between start and end, int64 [T + 2].

        codes: one image's, or an Encoding, which gives a list with one tensor per image.
        wrap: add start and end.
        positions: [T], required if the vocabulary has tokens for them. Each code then follows its position, 2 T ids in
        all.

        Raises `CodeError` on a code outside 0 to K - 1, on an empty row, and on positions that are missing, unexpected,
        out of range or not increasing.
        """
        if isinstance(codes, Encoding):
            known = codes.positions if self.patches else None
            if known is None:
                return [self._ids(row, wrap, None) for row in codes.codes]
            return [self._ids(row, wrap, place) for row, place in zip(codes.codes, known, strict=True)]
        return self._ids(codes, wrap, positions)

    def _ids(self, codes: Tensor | Sequence[int], wrap: bool, positions: Tensor | Sequence[int] | None) -> Tensor:
        row = integers(codes, "codes")
        if not len(row):
            raise CodeError("no codes; an image has at least one")
        refuse(
            (row < 0) | (row >= self.size),
            lambda i: f"code {row[i]} at place {i} is out of range, expected 0 to {self.size - 1}",
        )
        ids = row + self.offset
        if (positions is None) != (self.patches == 0):
            problem = "positions were not given; give one for each code"
            if positions is not None:
                problem = "positions were given; leave them out"
            raise CodeError(f"this vocabulary has {counted(self.patches, 'position token')}, and {problem}")
        if positions is not None:
            place = integers(positions, "positions").to(ids.device)
            self._check_positions(place, len(row))
            ids = torch.stack([place + self.position_offset, ids], 1).flatten()
        return torch.cat([ids.new_tensor([self.image_start]), ids, ids.new_tensor([self.image_end])]) if wrap else ids

    def to_codes(self, ids: Tensor | Sequence[int]) -> Tensor:
        """Returns the codes of one image's ids, int64 [T]: the inverse of `to_ids`, with or without start and end.

        Raises `CodeError` on any other id, on a misplaced or single start or end, and if there are no codes.
        """
        return self._codes_and_positions(ids)[0]

    def to_positions(self, ids: Tensor | Sequence[int]) -> Tensor | None:
        """Returns the positions in one image's ids, int64 [T], or None if the vocabulary has none.

        Errors are those of `to_codes`.
        """
        return self._codes_and_positions(ids)[1]

    def to_text(self, codes: Tensor | Sequence[int], *, positions: Tensor | Sequence[int] | None = None) -> str:
        """Returns one image as text between start and end. Arguments and errors: see `to_ids`."""
        ids = self._ids(codes, False, positions).tolist()
        return START_TOKEN + "".join(map(self._text_of, ids)) + END_TOKEN

    def _text_of(self, id: int) -> str:
        if id < self.position_offset:
            return self._spelled("v", id - self.offset, self.size)
        return self._spelled("p", id - self.position_offset, self.patches)

    def _codes_and_positions(self, ids: Tensor | Sequence[int]) -> tuple[Tensor, Tensor | None]:
        row = integers(ids, "ids")
        starts, ends = ((row == marker).nonzero().flatten().tolist() for marker in (self.image_start, self.image_end))
        if starts or ends:
            if starts != [0] or ends != [len(row) - 1]:
                found = f"start ({self.image_start}) at {starts} and end ({self.image_end}) at {ends}"
                expected = "expected one image: start first, end last, or neither of them"
                raise CodeError(f"{counted(len(row), 'id')} with {found}; {expected}")
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
