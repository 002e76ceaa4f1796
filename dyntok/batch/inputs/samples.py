"""What all kinds of input have in common: shards, the samples in them, and which kind an address is.

One kind each: `files.py` (folders, lists of paths), `tars.py`, `tables.py` (Parquet). Nothing here decodes images.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Protocol

import fsspec
import pyarrow as pa
from braceexpand import UnbalancedBracesError, braceexpand

from dyntok.batch.options import BatchOptions
from dyntok.batch.storage import StorageOptions, key_of, locate, shown, stamp_of, told
from dyntok.errors import ConfigError, DataError
from dyntok.image import IMAGE_SUFFIXES

_KINDS = {".tar": "tar", ".parquet": "parquet", ".txt": "list"} | dict.fromkeys(IMAGE_SUFFIXES, "folder")


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
        return {"address": key_of(self.address), "size": self.size, "stamp": self.stamp, **rows}


@dataclass(frozen=True)
class Broken:
    """Stands in the place of an image that can't be had, and says why."""

    reason: str


@dataclass(frozen=True)
class Sample:
    """One row: one image, or several in interleaved data."""

    key: str
    images: list[Any]  # bytes, a path or a Broken each; None: a place without an image, in interleaved data
    companions: dict[str, Any]
    next: int  # where a later reading of the shard has to begin to get what comes behind
    source: str  # where it lies, as it may be shown


class Reading(Protocol):
    """An opened shard."""

    types: dict[str, pa.DataType]  # of the companions

    def __iter__(self) -> Iterator[Sample]: ...


class Input(Protocol):
    kind: str

    def shards(self) -> Iterator[Shard]:
        """Streamed, in the same order every time. Raises `DataError`, `BatchError`."""
        ...

    def open(self, shard: Shard, start: int) -> AbstractContextManager[Reading]:
        """From `start`, which is 0 or a `next`. Raises `BatchError` where it can't be read, `DataError` where a column is missing."""
        ...

    def fetch(self, sample: Sample) -> Sample:
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
            with told("read", address, self.storage):
                info = fs.info(path)
            yield Shard(index, address, info["size"] or 0, stamp_of(info))

    def fetch(self, sample: Sample) -> Sample:
        return sample


def open_input(sources: Sequence[str], options: BatchOptions, storage: StorageOptions) -> Input:
    """Of one address or several: a folder, a file, a glob, a brace range. Raises `ConfigError`, `DataError`, `BatchError`."""
    from dyntok.batch.inputs.files import Folders, Lists
    from dyntok.batch.inputs.parquet import Tables
    from dyntok.batch.inputs.tars import Tars

    addresses = [address for source in sources for address in _expanded(source, storage)]
    found = [(options.kind if options.kind != "auto" else _kind_of(address, storage), address) for address in addresses]
    kinds = sorted({kind for kind, _ in found})
    if len(kinds) != 1:
        raise ConfigError(
            f"the input holds {' and '.join(kinds)}; give one kind at a time, or say which with kind (--kind)"
        )
    (kind,) = kinds
    if options.interleaved and kind not in ("parquet", "tar"):
        raise ConfigError(f"interleaved rows come from parquet and tar, and {shown(addresses[0])} is {kind}")
    if kind == "list":
        return Lists(addresses, options, storage)
    if kind == "folder":
        return Folders(addresses, options, storage)
    files = [file for address in addresses for file in _files(address, f".{kind}", storage)]
    return Tars(files, options, storage) if kind == "tar" else Tables(files, options, storage)


def address_of(fs: fsspec.AbstractFileSystem, path: str) -> str:
    """The address of another path of that file system."""
    return path if "file" in _protocols(fs) else fs.unstrip_protocol(path)


def _protocols(fs: fsspec.AbstractFileSystem) -> Sequence[str]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol


def _expanded(source: str, storage: StorageOptions) -> Iterator[str]:
    fs, path = locate(source, storage)
    with told("read", source, storage):
        if fs.exists(path):
            yield address_of(fs, path)
            return
    try:
        sources = list(braceexpand(source)) if "{" in source else [source]
    except (UnbalancedBracesError, ValueError) as error:
        raise ConfigError(f"{shown(source)} is no pattern: {error}") from error
    for single in sources:
        fs, path = locate(single, storage)
        with told("read", single, storage):
            names = sorted(fs.glob(path)) if any(c in path for c in "*?[") else [path] if fs.exists(path) else []
        if not names:
            raise DataError(
                f"{shown(single)} does not exist; expected a folder, a tar, a Parquet file, a list of paths, or a glob of them"
            )
        yield from (address_of(fs, name) for name in names)


def _kind_of(address: str, storage: StorageOptions) -> str:
    """By its suffix; of a folder, by the first files that are met in it."""
    fs, path = locate(address, storage)
    with told("read", address, storage):
        if not fs.isdir(path):
            found = {_KINDS.get(PurePosixPath(path).suffix.lower(), f"a file named {PurePosixPath(path).name}")}
        else:
            found = set()
            for _, _, names in fs.walk(path):
                found = {_KINDS.get(PurePosixPath(name).suffix.lower()) for name in names} - {None, "list"}
                if found:
                    break
    if len(found) != 1 or not found <= set(_KINDS.values()):
        what = " and ".join(sorted(found)) or "no images, tars or Parquet files"
        raise DataError(
            f"{shown(address)} holds {what}; expected one kind of image files, .tar, .parquet or .txt; kind (--kind) picks one"
        )
    return found.pop()


def _files(address: str, suffix: str, storage: StorageOptions) -> list[str]:
    """A file itself, or all of a folder that end so, sorted."""
    fs, path = locate(address, storage)
    with told("read", address, storage):
        if not fs.isdir(path):
            return [address]
        return [address_of(fs, name) for name in sorted(fs.find(path)) if name.lower().endswith(suffix)]


def without_surrogates(text: str) -> str:
    """Names that are not UTF-8 come with surrogates, which no file format takes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def text_types(names: Sequence[str]) -> Mapping[str, pa.DataType]:
    return {name: pa.string() for name in names}
