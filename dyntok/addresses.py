"""Addresses of files: local paths, and what fsspec reads (`s3://`, `hf://`, `zip://member::archive.zip`, ...).

Credentials never show: messages and records hold redacted addresses. Not here: reading and writing.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote

import fsspec
from fsspec.core import split_protocol, url_to_fs
from fsspec.implementations.local import LocalFileSystem, make_path_posix

from dyntok.errors import BatchError, ConfigError, DyntokError, MissingDependencyError

StorageOptions: TypeAlias = Mapping[str, Mapping[str, Any]]  # protocol -> arguments of its fsspec file system

BLOCK = 2**22  # bytes of a remote file that are read at once
_EXTRAS = {"s3": "s3", "s3a": "s3"}
_STAMPS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")


def redact(address: str) -> str:
    """Returns an address without user, password and query, as it may be printed and stored."""
    return re.sub(r"(\w+://[^\s?]*)\?[^\s'\"]*", r"\1", re.sub(r"(\w+://)[^/\s@]*@", r"\1", address))


def redact_message(text: str, options: StorageOptions) -> str:
    """Returns a message on one line, without the values of the storage options."""
    for secret in _strings(options):
        text = text.replace(secret, "***")
    return " ".join(redact(text).split())


def address_key(address: str) -> str:
    """Returns a redacted address that still tells addresses apart: a digest replaces the query."""
    clean = redact(address)
    _, _, query = address.partition("?")
    return f"{clean}?{hashlib.sha256(query.encode()).hexdigest()[:8]}" if "://" in address and query else clean


def is_remote(address: str) -> bool:
    """Returns whether an address names a protocol. Everything else is a local path, `a::b` and `[2020]` included."""
    return "://" in address


def local_path(path: str) -> str:
    """Returns an absolute path; `~` is the home folder unless a file of that name exists."""
    if path.startswith("~") and os.path.lexists(path):
        path = f"./{path}"
    return make_path_posix(path).rstrip("/") or "/"


def locate(address: str, options: StorageOptions) -> tuple[fsspec.AbstractFileSystem, str]:
    """Returns the file system of an address, and the path on it.

    Raises `BatchError`, and `MissingDependencyError` where the protocol needs a package that is not installed.
    """
    protocol = (split_protocol(address)[0] or "file").split("::")[0] if is_remote(address) else "file"
    own = dict(options.get(protocol, {}))
    if not is_remote(address):
        return LocalFileSystem(**own), local_path(address)
    if protocol == "file" and ("::" not in address or os.path.lexists(_path_of_file_url(address))):
        return LocalFileSystem(**own), _path_of_file_url(address)
    if "::" in address:  # a chain takes the options of every protocol in it
        own = {name: dict(values) for name, values in options.items()}
    try:
        with wrap_storage_errors("reach", address, options):
            return url_to_fs(address, **own)
    except ImportError as error:
        raise MissingDependencyError.of(
            f"the fsspec file system of {protocol}://", _EXTRAS.get(protocol, "batch")
        ) from error


def address_of(address: str, fs: fsspec.AbstractFileSystem, path: str) -> str:
    """Returns the address of another path on the file system of `address`."""
    if isinstance(fs, LocalFileSystem):
        return path
    chain = address.partition("::")[2]
    return f"{fs.unstrip_protocol(path)}::{chain}" if chain else fs.unstrip_protocol(path)


def version_stamp(info: Mapping[str, Any]) -> str:
    """Returns what changes when a file changes, if its file system says so."""
    return str(next((info[name] for name in _STAMPS if info.get(name)), ""))


def read_storage_options(path: str | os.PathLike | None) -> StorageOptions:
    """Reads a JSON file such as {"s3": {"key": "...", "secret": "..."}}. Its values are never copied anywhere.

    Raises `ConfigError`.
    """
    if path is None:
        return {}
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"can't read storage options from {path}: {type(error).__name__}; expected JSON") from error
    if not isinstance(values, dict) or not all(isinstance(value, dict) for value in values.values()):
        raise ConfigError(
            f'{path} does not map protocols to options; expected, for example, {{"s3": {{"anon": true}}}}'
        )
    return values


def storage_reason(error: Exception, address: str, options: StorageOptions | None = None) -> str:
    """Returns why a file system refused an address: on one line, without credentials, and without the address."""
    if isinstance(error, BatchError) and isinstance(error.__cause__, Exception):  # of `locate`; it names the address
        error = error.__cause__
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if isinstance(error, FileNotFoundError) and str(error).strip("/") in address:  # fsspec says no more than the path
        text = "no such file"
    if is_remote(address):  # HTTP errors end with it
        text = text.replace(address, "...")
    return redact_message(text, options or {})


@contextmanager
def wrap_storage_errors(action: str, address: str, options: StorageOptions | None = None) -> Iterator[None]:
    """Turns every error of a file system into a `BatchError` of one line, without credentials."""
    try:
        yield
    except (DyntokError, ImportError):
        raise
    except Exception as error:  # fsspec passes on what its back ends raise: OSError, botocore's, aiohttp's, asyncio's
        raise BatchError(f"can't {action} {redact(address)}: {storage_reason(error, address, options)}") from error


def _path_of_file_url(address: str) -> str:
    path = LocalFileSystem._strip_protocol(address)
    return path if os.path.lexists(path) or "%" not in path else unquote(path)


def _strings(values: Any) -> Iterator[str]:
    for value in values.values() if isinstance(values, Mapping) else [values]:
        if isinstance(value, Mapping):
            yield from _strings(value)
        elif isinstance(value, str) and len(value) > 3:
            yield value
