"""What all kinds of input have in common: shards, the samples in them, and which kind an address is.

One kind each: `files.py` (folders, lists of paths), `tars.py`, `tables.py` (Parquet). Nothing here decodes images.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

from dyntok.batch.options import BatchOptions
from dyntok.batch.storage import StorageOptions, address_key, locate, version_stamp, wrap_storage_errors


@dataclass(frozen=True)
class Shard:
    """What one reader reads from beginning to end: a tar, a Parquet file, or so many paths."""

    index: int
    address: str
    size: int  # bytes
    stamp: str  # changes when the content does
    entries: tuple[tuple[str, str], ...] = ()  # (key, address) of each image, where the shard is a list of them
    rows: tuple[int, int] | None = None  # the first and the one behind the last, where the shard is a part of a table

    @property
    def begin(self) -> int:
        """Where reading starts."""
        return self.rows[0] if self.rows else 0

    @property
    def extent(self) -> int:
        """How far a `Sample.next` can get from there."""
        return self.rows[1] - self.rows[0] if self.rows else len(self.entries) or self.size

    @property
    def identity(self) -> dict[str, Any]:
        """What must be as before when a run goes on."""
        rows = {} if self.rows is None else {"first_row": self.rows[0]}
        return {"address": address_key(self.address), "size": self.size, "stamp": self.stamp, **rows}


@dataclass(frozen=True)
class Broken:
    """Stands in the place of an image that can't be had, and says why."""

    reason: str


@dataclass(frozen=True)
class InputSample:
    """One row: one image, or several in interleaved data."""

    key: str
    images: list[Any]  # bytes, a path or a Broken each; None: a place without an image, in interleaved data
    columns: dict[str, Any]
    next: int  # where a later reading of the shard has to start to get the samples that follow
    source: str  # its file, without credentials
    left_out: Mapping[str, int] = field(default_factory=dict)  # files between the sample before and this one, by suffix


class ShardReader(Protocol):
    """An opened shard."""

    types: dict[str, pa.DataType]  # of the extra columns
    left_out: Mapping[str, int]  # files after the last sample, by suffix; complete when the iterator is exhausted

    def __iter__(self) -> Iterator[InputSample]: ...


class Input(Protocol):
    kind: str

    def shards(self) -> Iterator[Shard]:
        """Streamed, in the same order every time. Raises `DataError`, `BatchError`."""
        ...

    def open(self, shard: Shard, start: int) -> AbstractContextManager[ShardReader]:
        """From `start`, which is 0 or a `next`. Raises `BatchError` where it can't be read, `DataError` where a column is missing."""
        ...

    def fetch(self, sample: InputSample) -> InputSample:
        """With what lies in files of its own; called in a decoding process."""
        ...


@dataclass(frozen=True)
class FileShards:
    """Shards that are files: tars and Parquet. They are opened by the subclass."""

    addresses: Sequence[str]
    options: BatchOptions
    storage: StorageOptions

    def shards(self) -> Iterator[Shard]:
        for index, address in enumerate(self.addresses):
            fs, path = locate(address, self.storage)
            with wrap_storage_errors("read", address, self.storage):
                info = fs.info(path)
            yield Shard(index, address, info["size"] or 0, version_stamp(info))

    def fetch(self, sample: InputSample) -> InputSample:
        return sample


def text_types(names: Sequence[str]) -> Mapping[str, pa.DataType]:
    return {name: pa.string() for name in names}
