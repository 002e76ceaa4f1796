"""Folders of image files, and text files that list paths. A shard is the next `shard_size` of them, in a fixed order.

The key of a file in a folder is its path from the folder; the key of a listed file is its path as the list has it.
"""

import hashlib
import io
import itertools
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import NamedTuple

import fsspec
import pyarrow as pa

from dyntok.addresses import (
    StorageOptions,
    address_key,
    address_of,
    is_remote,
    local_path,
    locate,
    redact,
    storage_reason,
    wrap_storage_errors,
)
from dyntok.batch.inputs.left_out import LeftOut
from dyntok.batch.inputs.listing import ListedFile, find_unnamed_images, list_files, size_and_stamp
from dyntok.batch.inputs.members import MAX_TEXT_BYTES
from dyntok.batch.inputs.names import is_image, without_surrogates
from dyntok.batch.inputs.samples import Broken, InputSample, Shard, read_image, text_types
from dyntok.batch.options import BatchOptions
from dyntok.chunks import batched
from dyntok.errors import ConfigError, DataError
from dyntok.names import split_key

_BOMS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


class _ImageFile(NamedTuple):
    key: str
    address: str
    size: int
    stamp: str


@dataclass(frozen=True)
class _ImageFiles(ABC):
    addresses: list[str]
    options: BatchOptions
    storage: StorageOptions

    def shards(self) -> Iterator[Shard]:
        left_out, shard = LeftOut(), None
        for index, files in enumerate(batched(self._image_files(left_out), self.options.shard_size)):
            if shard is not None:
                yield shard
            stamps = json.dumps([[file.key, file.size, file.stamp] for file in files])
            digest = hashlib.sha256(stamps.encode()).hexdigest()[:16]
            entries = tuple((file.key, file.address) for file in files)
            size = sum(file.size for file in files)
            shard = Shard(index, self.addresses[0], size, digest, entries, left_out=tuple(left_out.items()))
            left_out.clear()
        if shard is None:
            found = f"; it holds {left_out}" if left_out else ""
            raise DataError(f"{redact(self.addresses[0])} holds no images{found}")
        left_out.merge(dict(shard.left_out))
        yield replace(shard, left_out=tuple(left_out.items()))

    @contextmanager
    def open(self, shard: Shard, start: int) -> Iterator["_ImageFilesReader"]:
        yield _ImageFilesReader(shard, start, self.options, dict(shard.left_out))

    def fetch(self, sample: InputSample) -> InputSample:
        (address,) = sample.images
        columns = {name: self._text_beside(address, name) for name in self.options.keep_columns}
        broken = [value for value in columns.values() if isinstance(value, Broken)]
        if broken:
            return replace(sample, images=broken[:1], columns={})
        image = read_image(address, self.storage) if is_remote(address) else address
        return replace(sample, images=[image], columns=columns)

    def _text_beside(self, address: str, extension: str) -> str | Broken | None:
        """Returns the text of the file with the same name and another extension, or None where there is none."""
        try:
            fs, path = locate(address, self.storage)
            for written in _spellings(extension):
                name = f"{_stem(path)}.{written}"
                if fs.isfile(name):
                    with fs.open(name, "rb") as file:
                        content = file.read(MAX_TEXT_BYTES + 1)
                    if len(content) > MAX_TEXT_BYTES:
                        return Broken(f"its {extension} file is too large; the limit is {MAX_TEXT_BYTES:,} bytes")
                    return content.decode("utf-8-sig")
        except UnicodeDecodeError:
            return Broken(f"its {extension} file is not UTF-8")
        except Exception as error:  # any back end's; one file that can't be read does not stop a run
            reason = storage_reason(error, address, self.storage)
            return Broken(f"{without_surrogates(redact(address))}: can't read its {extension} file: {reason}")
        return None

    @abstractmethod
    def _image_files(self, left_out: LeftOut) -> Iterator[_ImageFile]:
        """Yields the files in a fixed order, and adds files that are not images to `left_out`."""


@dataclass(frozen=True)
class Folders(_ImageFiles):
    kind = "folder"

    def _image_files(self, left_out: LeftOut) -> Iterator[_ImageFile]:
        for address in self.addresses:
            fs, root = locate(address, self.storage)
            with wrap_storage_errors("read", address, self.storage):
                if fs.isdir(root):
                    for file in self._images_in(fs, root, left_out):
                        yield _image_file(address, fs, file)
                else:
                    yield _image_file(address, fs, ListedFile(PurePosixPath(root).name, root, fs.info(root)))

    def _images_in(self, fs: fsspec.AbstractFileSystem, root: str, left_out: LeftOut) -> Iterator[ListedFile]:
        files = find_unnamed_images(fs, list_files(fs, root, left_out))
        texts = {written for name in self.options.keep_columns for written in _spellings(name)}
        for _, pairs in itertools.groupby(files, key=lambda pair: split_key(pair[0].key)[0]):
            group = [(file, unnamed or is_image(file.key)) for file, unnamed in pairs]
            stems = {_stem(file.key) for file, image in group if image}
            for file, image in group:
                if image:
                    yield file
                elif not (file.key.rpartition(".")[2] in texts and _stem(file.key) in stems):
                    left_out.count(file.key)


@dataclass(frozen=True)
class Lists(_ImageFiles):
    kind = "list"

    def _image_files(self, left_out: LeftOut) -> Iterator[_ImageFile]:
        if self.options.keep_columns:
            raise ConfigError("a list of paths has no extra columns; leave keep_columns out, or give a folder of files")
        for address in self.addresses:
            fs, path = locate(address, self.storage)
            with wrap_storage_errors("read", address, self.storage):
                encoding = _encoding_of(fs.cat_file(path, start=0, end=4))
                with fs.open(path, "rb") as file, io.TextIOWrapper(file, encoding, "surrogateescape") as lines:
                    for line in lines:
                        name = line.rstrip("\r\n")
                        listed = _listed_address(name, address, fs, path) if name.strip() else ""
                        if not listed:
                            left_out.add("empty lines")
                        elif name.lstrip().startswith("#") and not os.path.lexists(listed):
                            left_out.add("comment lines")
                        else:
                            yield _listed_file(name, listed)


@dataclass
class _ImageFilesReader:
    shard: Shard
    start: int
    options: BatchOptions
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def types(self) -> dict[str, pa.DataType]:
        return text_types(self.options.keep_columns)

    def __iter__(self) -> Iterator[InputSample]:
        for i, (key, address) in enumerate(self.shard.entries[self.start :], self.start):
            yield InputSample(key, [address], {}, i + 1, without_surrogates(redact(address)))


def _image_file(address: str, fs: fsspec.AbstractFileSystem, file: ListedFile) -> _ImageFile:
    return _ImageFile(without_surrogates(file.key), address_of(address, fs, file.path), *size_and_stamp(file))


def _listed_file(name: str, address: str) -> _ImageFile:
    size, stamp = 0, ""
    if not is_remote(address) and os.path.isfile(address):  # other files would take a request each
        size, stamp = size_and_stamp(ListedFile(name, address, None))
    return _ImageFile(without_surrogates(address_key(name)), address, size, stamp)


def _listed_address(name: str, list_address: str, fs: fsspec.AbstractFileSystem, list_path: str) -> str:
    """Returns the address of a path in a list. Relative paths start at the folder of the list."""
    if is_remote(name):
        return name
    if os.path.isabs(name) or (name.startswith("~") and not is_remote(list_address)):
        return local_path(name)
    path = f"{list_path.rpartition('/')[0]}/{name}"
    if not is_remote(list_address) and "\\" in name and not os.path.lexists(path):
        path = path.replace("\\", "/")  # written on Windows
    return address_of(list_address, fs, path)


def _encoding_of(head: bytes) -> str:
    """Returns the encoding of a text file by its first bytes: by a byte order mark, or by the zeros of UTF-16."""
    marked = next((encoding for mark, encoding in _BOMS.items() if head.startswith(mark)), None)
    if marked is None and len(head) >= 2 and 0 in head[:2]:
        return "utf-16-le" if head[1] == 0 else "utf-16-be"
    return marked or "utf-8"


def _stem(path: str) -> str:
    """Returns a path without the extension."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + (name.rpartition(".")[0] or name)


def _spellings(extension: str) -> list[str]:
    """Returns the forms in which an extension is looked for: as it was given, in lower case and in upper case."""
    return list(dict.fromkeys((extension, extension.lower(), extension.upper())))
