"""What all kinds of input have in common: shards, their files, and the samples in them.

Not here: the kinds of input (`files.py`, `tars.py`, `zips.py`, `parquet.py`), and which kind an address is (`open.py`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

import pyarrow as pa

from dyntok.addresses import (
    StorageOptions,
    address_key,
    locate,
    redact,
    storage_reason,
    version_stamp,
    wrap_storage_errors,
)
from dyntok.batch.inputs.names import without_surrogates
from dyntok.batch.options import BatchOptions
from dyntok.image import MAX_FILE_BYTES


@dataclass(frozen=True)
class Shard:
    """What one reader reads from beginning to end: an archive, rows of a Parquet file, or a list of image files."""

    index: int
    address: str
    size: int  # bytes
    stamp: str  # changes when the content does
    entries: tuple[tuple[str, str], ...] = ()  # (key, address) of each image, if the shard is a list of image files
    rows: tuple[int, int] | None = None  # first row and end, if the shard is a part of a Parquet file
    left_out: tuple[tuple[str, int], ...] = ()  # files around this shard that are not read, by suffix

    @property
    def begin(self) -> int:
        """Returns where reading starts."""
        return self.rows[0] if self.rows else 0

    @property
    def extent(self) -> int:
        """Returns how far `InputSample.next` gets from there; of a compressed tar it is an estimate."""
        return self.rows[1] - self.rows[0] if self.rows else len(self.entries) or self.size

    @property
    def identity(self) -> dict[str, Any]:
        """Returns what must not have changed when a run resumes."""
        rows = {} if self.rows is None else {"first_row": self.rows[0]}
        return {"address": address_key(self.address), "size": self.size, "stamp": self.stamp, **rows}


@dataclass(frozen=True)
class Broken:
    """Stands for an image that can't be read, and says why."""

    reason: str  # a name in it comes first, with ": " after it: reasons are counted without that


@dataclass(frozen=True)
class InputSample:
    """One row: one image, or several in interleaved data."""

    key: str
    images: list[Any]  # bytes, a path or a Broken each; None: no image at this place of an interleaved row
    columns: dict[str, Any]  # the extra columns that are kept
    next: int  # where a later reading of the shard has to start to get the samples that follow
    source: str  # its file, without credentials
    left_out: Mapping[str, int] = field(default_factory=dict)  # files between the sample before and this one, by suffix


class StorageFile:
    """A file that notes where its storage failed to read it.

    Libraries take such an error for damage of what they read. Errors of `seek` are not noted: damage leads to them.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._failure: Exception | None = None

    def read(self, size: int = -1) -> bytes:
        try:
            return self._file.read(size)
        except Exception as error:  # fsspec passes on what its back ends raise
            self._failure = error
            raise

    def raise_failure(self) -> None:
        """Raises the error of the storage, if there was one."""
        if self._failure is not None:
            raise self._failure

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class ShardReader(Protocol):
    """An open shard."""

    @property
    def types(self) -> dict[str, pa.DataType]:
        """Returns the types of the extra columns."""
        ...

    @property
    def left_out(self) -> Mapping[str, int]:
        """Returns the files after the last sample, counted by suffix. Complete once the iterator is exhausted."""
        ...

    def __iter__(self) -> Iterator[InputSample]: ...


class Input(Protocol):
    """All shards of one kind of input."""

    @property
    def kind(self) -> str:
        """Returns the name of the kind, as `BatchOptions.kind` has it."""
        ...

    def shards(self) -> Iterator[Shard]:
        """Yields the shards, in the same order every time. Raises `DataError`, `BatchError`."""
        ...

    def open(self, shard: Shard, start: int) -> AbstractContextManager[ShardReader]:
        """Opens a shard at `start`, which is its beginning or a `next`.

        Raises `BatchError` where it can't be read, `DataError` where a column is missing.
        """
        ...

    def fetch(self, sample: InputSample) -> InputSample:
        """Reads what lies in separate files. Decoding processes call it."""
        ...


@dataclass(frozen=True)
class FileShards:
    """Shards that are files, such as tars and Parquet files. The subclass opens them."""

    addresses: Sequence[str]
    options: BatchOptions
    storage: StorageOptions
    left_out: Mapping[str, int] = field(default_factory=dict)  # files next to them that are not read, by suffix

    def shards(self) -> Iterator[Shard]:
        for index, address in enumerate(self.addresses):
            fs, path = locate(address, self.storage)
            with wrap_storage_errors("read", address, self.storage):
                info = fs.info(path)
            left_out = tuple(self.left_out.items()) if index == 0 else ()
            yield Shard(index, address, info["size"] or 0, version_stamp(info), left_out=left_out)

    def fetch(self, sample: InputSample) -> InputSample:
        return sample


def read_image(address: str, storage: StorageOptions) -> bytes | Broken:
    """Returns the content of an image file, at most one byte more than a picture may have."""
    try:
        fs, path = locate(address, storage)
        with fs.open(path, "rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except Exception as error:  # any back end's; one file that can't be read does not stop a run
        return Broken(f"{without_surrogates(redact(address))}: {storage_reason(error, address, storage)}")


def text_types(names: Sequence[str]) -> dict[str, pa.DataType]:
    """Returns the types of columns that come from text files."""
    return {name: pa.string() for name in names}
