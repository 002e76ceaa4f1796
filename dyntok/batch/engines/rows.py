"""The rows of a batch run, from stage to stage: `SourceRow`, then `Row[DecodedImage]`, then `Row[TokenizedImage]`.

Not here: what the stages do (`stages.py`).
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa

from dyntok.batch.inputs.samples import InputSample, Shard

ImageT = TypeVar("ImageT")
RowT = TypeVar("RowT")


@dataclass(frozen=True)
class Range:
    """Consecutive rows of an input shard, which become one output shard."""

    shard: int  # index of the input shard
    number: int  # in the input shard
    attempt: int = 0  # above 0: rows that failed before and are tried again

    @property
    def name(self) -> str:
        name = f"{self.shard:06d}-{self.number:06d}"
        return f"{name}-retry{self.attempt}" if self.attempt else name


@dataclass(frozen=True)
class Work:
    """The part of an input shard that is to be read."""

    shard: Shard
    number: int  # of the first range
    start: int  # where that range begins
    stop: int | None = None  # number of the first range that is not wanted; None: read to the end of the shard
    retries: tuple["Retry", ...] = ()  # only some rows, of so many ranges


@dataclass(frozen=True)
class Retry:
    """The rows of a range that failed before; none where the range is only compared with its record."""

    attempt: int
    keys: dict[int, str]  # by their place in the range
    rows: int  # of the range
    last: bool  # of its input shard
    digest: str  # `KeyDigest` of the range; "" where it was not noted

    @property
    def broke_off(self) -> bool:
        """Returns whether the shard may not have been read to its end, so that rows may follow now."""
        return self.last and self.keys.get(self.rows - 1) == ""


class KeyDigest:
    """What the keys of rows are, in order. Rows without a key do not count."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, key: str) -> None:
        if key:
            self._hash.update(key.encode("utf-8", "surrogatepass") + b"\0")

    def __str__(self) -> str:
        return self._hash.hexdigest()[:16]


@dataclass(frozen=True)
class SourceRow:
    """A row as it was read; its images are not decoded."""

    range: Range
    place: int  # in the range
    sample: InputSample
    share: float  # of the input shard that this row is


@dataclass(frozen=True)
class Failure:
    """An image that could not be tokenized."""

    image: int  # its place among the images of the row
    reason: str


@dataclass(frozen=True)
class Row(Generic[ImageT]):
    """A row with images of one type. An image is None where it failed, or where the row has none in that place."""

    range: Range
    place: int  # in the range
    share: float
    key: str
    source: str  # the file that it comes from
    columns: dict[str, Any]
    images: tuple[ImageT | None, ...]
    failures: tuple[Failure, ...]

    @property
    def present(self) -> list[ImageT]:
        """Returns the images without the gaps."""
        return [image for image in self.images if image is not None]

    @property
    def failed(self) -> bool:
        """Returns whether every image failed, so that only the errors table has the row."""
        return bool(self.images) and len(self.failures) == len(self.images)


@dataclass(frozen=True)
class RangeEnd:
    """Says that a range has been read to its end."""

    range: Range
    shard: dict[str, Any]  # identity of the input shard
    rows: int  # of this range
    start: int
    next: int
    last: bool  # range of its input shard
    types: dict[str, pa.DataType]  # of the extra columns
    share: float = 0.0  # of the input shard that is left after its last row
    left_out: dict[str, int] = field(default_factory=dict)  # files of the input, by suffix
    digest: str = ""  # `KeyDigest` of the range
    compared: bool = False  # no row of it was tried again


@dataclass(frozen=True)
class RowChunk(Generic[RowT]):
    """Rows that go through a stage together, and the ranges whose last row is among them or came before."""

    rows: list[RowT]
    ends: list[RangeEnd] = field(default_factory=list)


@dataclass(frozen=True)
class DecodedImage:
    """An image as the tokenizer sees it."""

    array: np.ndarray  # uint8 [H, W, 3]
    size: tuple[int, int]  # width and height of the original
    crop_box: tuple[int, ...]  # the part of the original that is used: left, top, right, bottom in its pixels


@dataclass(frozen=True)
class TokenizedImage:
    """The codes of one image."""

    codes: np.ndarray  # [T], the narrowest unsigned type that holds every code
    positions: np.ndarray  # [T], the narrowest that holds every position
    grid: tuple[int, int]
    size: tuple[int, int]
    crop_box: tuple[int, ...]
    margins: tuple[float, ...] | None = None  # shares of close codes and keep decisions, where a run asks for them

    @property
    def used(self) -> float:
        """Returns the share of the original's area that is used."""
        left, top, right, bottom = self.crop_box
        return (right - left) * (bottom - top) / (self.size[0] * self.size[1])


TokenizedRow: TypeAlias = Row[TokenizedImage]
