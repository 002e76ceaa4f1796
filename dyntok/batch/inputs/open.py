"""Finds out which kind of input an address is, and opens it: a folder, tars, zips, Parquet or a list of paths."""

import glob
import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import PurePosixPath

import fsspec
from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]  # it has no __all__
from fsspec.implementations.local import LocalFileSystem

from dyntok.addresses import StorageOptions, address_of, is_remote, locate, redact, wrap_storage_errors
from dyntok.batch.inputs.files import Folders, Lists
from dyntok.batch.inputs.left_out import LeftOut
from dyntok.batch.inputs.listing import find_unnamed_images, list_files
from dyntok.batch.inputs.names import is_image, kind_of
from dyntok.batch.inputs.parquet import Tables
from dyntok.batch.inputs.samples import Input
from dyntok.batch.inputs.tars import Tars
from dyntok.batch.inputs.zips import Zips
from dyntok.batch.options import BatchOptions
from dyntok.errors import ConfigError, DataError
from dyntok.names import is_hidden

_FILE_KINDS: dict[str, type[Tars] | type[Zips] | type[Tables]] = {"tar": Tars, "zip": Zips, "parquet": Tables}
_ESCAPES = os.name != "nt"  # whether a backslash makes a brace an ordinary letter; on Windows it separates folders
_EXPECTED = "a folder of images, .tar, .zip or .parquet files, or a .txt list of paths"


def open_input(sources: Sequence[str], options: BatchOptions, storage: StorageOptions) -> Input:
    """Opens one address or several of one kind: folders, files, globs or brace ranges. What several name is read once.

    Raises `ConfigError`, `DataError`, `BatchError`.
    """
    addresses = list(dict.fromkeys(address for source in sources for address in _expand(source, storage)))
    kinds: list[str] = [options.kind]
    if options.kind == "auto":
        kinds = sorted({_kind_of_address(address, storage) for address in addresses})
    if len(kinds) != 1:
        found = " and ".join(kinds)
        raise ConfigError(f"the input holds {found}; give one kind at a time, or name it with kind (--kind)")
    (kind,) = kinds
    if options.interleaved and kind in ("folder", "list"):
        first = redact(addresses[0])
        raise ConfigError(f"interleaved rows are read from parquet, tar and zip, but {first} is a {kind}")
    if kind != "parquet":
        _check_extensions(options.keep_columns)
    if kind in _FILE_KINDS:
        left_out = LeftOut()
        files = dict.fromkeys(file for some in addresses for file in _files_of_kind(some, kind, storage, left_out))
        return _FILE_KINDS[kind](list(files), options, storage, left_out)
    if kind == "list":
        return Lists(addresses, options, storage)
    return Folders(_without_overlaps(addresses, storage), options, storage)


def _check_extensions(names: Sequence[str]) -> None:
    """Raises `ConfigError` for names that no file beside an image can have as its extension."""
    for name in names:
        if not name or name.startswith(".") or is_image(f".{name}"):
            raise ConfigError(
                f"keep_columns has {name!r}; expected the extension of a text file without the dot, such as 'txt'"
            )


def _expand(source: str, storage: StorageOptions) -> Iterator[str]:
    """Yields the addresses that a pattern stands for. A name that exists as it is written is not a pattern."""
    fs, path = locate(source, storage)
    with wrap_storage_errors("read", source, storage):
        if fs.exists(path):
            yield address_of(source, fs, path)
            return
    try:
        patterns = list(braceexpand(source, escape=_ESCAPES)) if "{" in source else [source]
    except (UnbalancedBracesError, ValueError) as error:
        raise ConfigError(f"{redact(source)} is not a valid pattern: {error}") from error
    for pattern in patterns:
        fs, path = locate(pattern, storage)
        with wrap_storage_errors("read", pattern, storage):
            paths = _matches(fs, path)
        if not paths:
            raise DataError(f"{redact(pattern)} does not exist; expected {_EXPECTED}, or a glob of them")
        yield from (address_of(pattern, fs, found) for found in paths)


def _without_overlaps(addresses: Sequence[str], storage: StorageOptions) -> list[str]:
    """Returns folders and images without those that are also found in a folder among them."""

    @cache
    def is_folder(address: str) -> bool:
        fs, path = locate(address, storage)
        with wrap_storage_errors("read", address, storage):
            return fs.isdir(path)

    named = {_place(address): address for address in reversed(addresses)}

    def is_found_twice(address: str) -> bool:
        path, chain = _place(address)
        if named[path, chain] != address:  # the same place was named before
            return True
        found = is_image(path) or kind_of(path) == "list" or is_folder(address)  # pictures, and texts beside them
        if not found:  # only read where it is named, as are hidden files
            return False
        parts = path.split("/")
        above = [("/".join(parts[:i]), "/".join(parts[i:])) for i in range(1, len(parts))]
        return any(
            (folder, chain) in named and not is_hidden(below) and is_folder(named[folder, chain])
            for folder, below in above
        )

    return [address for address in addresses if not is_found_twice(address)]


def _place(address: str) -> tuple[str, str]:
    """Returns the path of an address, and the rest of its chain."""
    path, _, chain = address.partition("::") if is_remote(address) else (address, "", "")
    return path.rstrip("/"), chain


def _matches(fs: fsspec.AbstractFileSystem, path: str) -> list[str]:
    if not glob.has_magic(path):
        return [path] if fs.exists(path) else []
    if not isinstance(fs, LocalFileSystem):
        return sorted(fs.glob(path))
    parts = path.split("/")  # folders that exist are not patterns: "/data/[2020]/*.tar"
    literal = next(i for i in range(len(parts) - 1, 0, -1) if os.path.isdir("/".join(parts[:i]) or "/"))
    folder = "/".join(parts[:literal])
    found = glob.glob("/".join(parts[literal:]), root_dir=folder or "/", recursive=True)
    return sorted(f"{folder}/{name}" for name in found)


def _kind_of_address(address: str, storage: StorageOptions) -> str:
    """Returns the kind by the suffix; of a folder, by the first files in it that have a known one."""
    fs, path = locate(address, storage)
    with wrap_storage_errors("read", address, storage):
        if not fs.isdir(path):
            name = PurePosixPath(path).name
            if kind := kind_of(name):
                return kind
            raise DataError(
                f"{redact(address)} has an unknown suffix; expected {_EXPECTED}; kind (--kind) names the kind"
            )
        return _kind_of_folder(fs, path, address)


def _kind_of_folder(fs: fsspec.AbstractFileSystem, path: str, address: str) -> str:
    left_out, place = LeftOut(), None
    found: set[str] = set()
    for file, unnamed in find_unnamed_images(fs, list_files(fs, path, left_out)):
        kind = "folder" if unnamed else kind_of(file.key)
        folder = file.key.rpartition("/")[0]
        if found and folder != place:  # the files of one folder decide
            break
        if kind in (None, "list"):
            left_out.count(file.key)
        else:
            found.add(kind)
            place = folder
    if len(found) > 1:
        found.discard("zip")  # next to images or tars it is nested, and counted as left out
    if len(found) == 1:
        return found.pop()
    if found:
        kinds = " and ".join(sorted(found))
        raise DataError(f"{redact(address)} holds {kinds}; expected one kind; kind (--kind) picks one")
    others = f"; it holds {left_out}" if left_out else ""
    raise DataError(f"{redact(address)} holds no images, tars, zip archives or Parquet files{others}")


def _files_of_kind(address: str, kind: str, storage: StorageOptions, left_out: LeftOut) -> Iterator[str]:
    """Yields a file itself, or the files of a kind below a folder, sorted."""
    fs, path = locate(address, storage)
    with wrap_storage_errors("read", address, storage):
        if not fs.isdir(path):
            yield address
            return
        found = False
        for file in list_files(fs, path, left_out):
            if kind_of(file.key) == kind:
                found = True
                yield address_of(address, fs, file.path)
            else:
                left_out.count(file.key)
        if not found:
            raise DataError(f"{redact(address)} holds no {kind} files; it holds {left_out or 'nothing'}")
