"""Finds out which kind of input an address is, and opens it: a folder, tars, Parquet files or a list of paths."""

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from braceexpand import UnbalancedBracesError, braceexpand

from dyntok.batch.inputs.files import Folders, Lists
from dyntok.batch.inputs.parquet import Tables
from dyntok.batch.inputs.samples import Input
from dyntok.batch.inputs.tars import Tars
from dyntok.batch.options import BatchOptions
from dyntok.batch.storage import StorageOptions, address_of, locate, redact, wrap_storage_errors
from dyntok.errors import ConfigError, DataError
from dyntok.image import IMAGE_SUFFIXES

_KINDS = {".tar": "tar", ".parquet": "parquet", ".txt": "list"} | dict.fromkeys(IMAGE_SUFFIXES, "folder")


def open_input(sources: Sequence[str], options: BatchOptions, storage: StorageOptions) -> Input:
    """Of one address or several: a folder, a file, a glob, a brace range. Raises `ConfigError`, `DataError`, `BatchError`."""

    addresses = [address for source in sources for address in _expanded(source, storage)]
    found = [(options.kind if options.kind != "auto" else _kind_of(address, storage), address) for address in addresses]
    kinds = sorted({kind for kind, _ in found})
    if len(kinds) != 1:
        raise ConfigError(
            f"the input holds {' and '.join(kinds)}; give one kind at a time, or say which with kind (--kind)"
        )
    (kind,) = kinds
    if options.interleaved and kind not in ("parquet", "tar"):
        raise ConfigError(f"interleaved rows come from parquet and tar, and {redact(addresses[0])} is {kind}")
    if kind == "list":
        return Lists(addresses, options, storage)
    if kind == "folder":
        return Folders(addresses, options, storage)
    files = [file for address in addresses for file in _files(address, f".{kind}", storage)]
    return Tars(files, options, storage) if kind == "tar" else Tables(files, options, storage)


def _expanded(source: str, storage: StorageOptions) -> Iterator[str]:
    fs, path = locate(source, storage)
    with wrap_storage_errors("read", source, storage):
        if fs.exists(path):
            yield address_of(fs, path)
            return
    try:
        sources = list(braceexpand(source)) if "{" in source else [source]
    except (UnbalancedBracesError, ValueError) as error:
        raise ConfigError(f"{redact(source)} is no pattern: {error}") from error
    for single in sources:
        fs, path = locate(single, storage)
        with wrap_storage_errors("read", single, storage):
            names = sorted(fs.glob(path)) if any(c in path for c in "*?[") else [path] if fs.exists(path) else []
        if not names:
            raise DataError(
                f"{redact(single)} does not exist; expected a folder, a tar, a Parquet file, a list of paths, or a glob of them"
            )
        yield from (address_of(fs, name) for name in names)


def _kind_of(address: str, storage: StorageOptions) -> str:
    """By its suffix; of a folder, by the first files that are met in it."""
    fs, path = locate(address, storage)
    with wrap_storage_errors("read", address, storage):
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
            f"{redact(address)} holds {what}; expected one kind of image files, .tar, .parquet or .txt; kind (--kind) picks one"
        )
    return found.pop()


def _files(address: str, suffix: str, storage: StorageOptions) -> list[str]:
    """A file itself, or all of a folder that end so, sorted."""
    fs, path = locate(address, storage)
    with wrap_storage_errors("read", address, storage):
        if not fs.isdir(path):
            return [address]
        return [address_of(fs, name) for name in sorted(fs.find(path)) if name.lower().endswith(suffix)]
