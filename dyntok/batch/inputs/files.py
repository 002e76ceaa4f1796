"""Folders of image files, and text files of paths: a shard is the next so many of them, in a fixed order.

A folder's key is the path below it, a list's key the path as it is written there. Local folders are listed with bounded memory however
many files they hold; of other file systems fsspec gives one folder at a time.
"""

import hashlib
import heapq
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import fsspec
from fsspec.core import split_protocol
from fsspec.implementations.local import LocalFileSystem

from dyntok.batch.inputs.names import is_image, without_surrogates
from dyntok.batch.inputs.samples import Broken, InputSample, Shard, text_types
from dyntok.batch.options import BatchOptions
from dyntok.batch.storage import (
    StorageOptions,
    address_key,
    address_of,
    locate,
    redact,
    redact_message,
    version_stamp,
    wrap_storage_errors,
)
from dyntok.chunks import batched
from dyntok.errors import ConfigError
from dyntok.image import MAX_FILE_BYTES

_NAMES = 100_000  # names of a folder that are sorted in memory


class _Found(NamedTuple):
    key: str
    address: str
    size: int
    stamp: str


@dataclass(frozen=True)
class _Paths:
    addresses: list[str]
    options: BatchOptions
    storage: StorageOptions

    def shards(self) -> Iterator[Shard]:
        for index, found in enumerate(batched(self._found(), self.options.shard_size)):
            entries = tuple((file.key, file.address) for file in found)
            stamps = json.dumps([[file.key, file.size, file.stamp] for file in found])
            digest = hashlib.sha256(stamps.encode()).hexdigest()[:16]
            yield Shard(index, self.addresses[0], sum(file.size for file in found), digest, entries)

    @contextmanager
    def open(self, shard: Shard, start: int) -> Iterator["_Files"]:
        yield _Files(shard, start, self)

    def fetch(self, sample: InputSample) -> InputSample:
        (address,) = sample.images
        columns = {name: self._companion(address, name) for name in self.options.keep_columns}
        broken = [value for value in columns.values() if isinstance(value, Broken)]
        images = broken[:1] or [address if "://" not in address else self._content(address)]
        return replace(sample, images=images, columns={} if broken else columns)

    def _content(self, address: str) -> bytes | Broken:
        try:
            fs, path = locate(address, self.storage)
            with fs.open(path, "rb") as file:
                return file.read(MAX_FILE_BYTES + 1)
        except Exception as error:  # see storage.told; a single file that can't be had is no reason to stop
            return Broken(redact_message(f"can't read the file: {error}", self.storage))

    def _companion(self, address: str, extension: str) -> str | Broken | None:
        folder, _, name = address.rpartition("/")
        beside = f"{folder}/{name.rpartition('.')[0]}.{extension}"
        fs, path = locate(beside, self.storage)
        content = self._content(beside) if fs.exists(path) else None
        try:
            return content.decode() if isinstance(content, bytes) else content
        except UnicodeDecodeError:
            return Broken(f"its companion {extension} is not UTF-8")

    def _found(self) -> Iterator[_Found]:
        raise NotImplementedError


@dataclass(frozen=True)
class Folders(_Paths):
    kind = "folder"

    def _found(self) -> Iterator[_Found]:
        for address in self.addresses:
            fs, root = locate(address, self.storage)
            with wrap_storage_errors("read", address, self.storage):
                if not fs.isdir(root):
                    yield _found(fs, PurePosixPath(root).name, root, fs.info(root))
                elif isinstance(fs, LocalFileSystem):
                    yield from _walk_local(root, "")
                else:
                    yield from _walk(fs, root, "")


@dataclass(frozen=True)
class Lists(_Paths):
    kind = "list"

    def _found(self) -> Iterator[_Found]:
        if self.options.keep_columns:
            raise ConfigError("a list of paths has no companions; leave keep out, or give folders, tars or parquet")
        for address in self.addresses:
            fs, path = locate(address, self.storage)
            folder = address_of(fs, path.rpartition("/")[0])
            with (
                wrap_storage_errors("read", address, self.storage),
                fs.open(path, "rt", encoding="utf-8", errors="surrogateescape") as lines,
            ):
                for line in lines:
                    name = line.rstrip("\r\n")
                    if name.strip():
                        here = split_protocol(name)[0] or os.path.isabs(name)
                        yield self._line(name, name if here else f"{folder}/{name}")

    def _line(self, name: str, address: str) -> _Found:
        size, stamp = 0, ""
        if "://" not in address and os.path.isfile(address):  # of other files it would take a request for each
            info = os.stat(address)
            size, stamp = info.st_size, str(info.st_mtime)
        return _Found(without_surrogates(address_key(name)), address, size, stamp)


@dataclass
class _Files:
    shard: Shard
    start: int
    paths: _Paths
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def types(self) -> dict[str, Any]:
        return dict(text_types(self.paths.options.keep_columns))

    def __iter__(self) -> Iterator[InputSample]:
        for i, (key, address) in enumerate(self.shard.entries[self.start :], self.start):
            yield InputSample(key, [address], {}, i + 1, without_surrogates(redact(address)))


def _walk(fs: fsspec.AbstractFileSystem, folder: str, below: str) -> Iterator[_Found]:
    for info in sorted(fs.ls(folder, detail=True), key=lambda info: info["name"]):
        name = info["name"].rstrip("/").rpartition("/")[2]
        if info["type"] == "directory":
            yield from _walk(fs, info["name"], f"{below}{name}/")
        elif is_image(name):
            yield _found(fs, f"{below}{name}", info["name"], info)


def _walk_local(folder: str, below: str) -> Iterator[_Found]:
    with ExitStack() as stack:
        for name, is_folder in _sorted(
            ((entry.name, entry.is_dir(follow_symlinks=False)) for entry in os.scandir(folder)), stack
        ):
            path = f"{folder.rstrip('/')}/{name}"
            if is_folder:
                yield from _walk_local(path, f"{below}{name}/")
            elif is_image(name):
                try:
                    info = os.stat(path)
                except OSError:  # a link to nowhere, say: reading it will tell
                    yield _Found(without_surrogates(below + name), path, 0, "")
                else:
                    yield _Found(without_surrogates(below + name), path, info.st_size, str(info.st_mtime))


def _found(fs: fsspec.AbstractFileSystem, key: str, path: str, info: dict[str, Any]) -> _Found:
    return _Found(without_surrogates(key), address_of(fs, path), info["size"] or 0, version_stamp(info))


def _sorted(names: Iterable[tuple[str, bool]], stack: ExitStack) -> Iterator[tuple[str, bool]]:
    """In order, by way of temporary files where there are many."""
    runs = []
    for chunk in batched(names, _NAMES):
        chunk = sorted(chunk)
        if len(chunk) == _NAMES:
            file = stack.enter_context(tempfile.TemporaryFile("w+", encoding="ascii"))  # noqa: SIM115
            file.writelines(json.dumps(pair) + "\n" for pair in chunk)
            file.seek(0)
            runs.append(map(_pair, file))
        else:
            runs.append(iter(chunk))
    return heapq.merge(*runs)


def _pair(line: str) -> tuple[str, bool]:
    name, is_folder = json.loads(line)
    return name, is_folder
