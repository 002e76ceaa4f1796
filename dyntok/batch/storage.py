"""Where files lie: any fsspec address, local paths included. A file appears whole or not at all; credentials never show.

Not here: what the files hold.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any, TypeAlias

import fsspec
from fsspec.core import split_protocol, url_to_fs
from fsspec.implementations.local import LocalFileSystem

from dyntok.errors import BatchError, ConfigError, DyntokError, MissingDependencyError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

StorageOptions: TypeAlias = Mapping[str, Mapping[str, Any]]  # protocol -> arguments of its fsspec file system

BLOCK = 2**22  # bytes that a remote file is read in
RUN = "__run__"  # beside the data: what pyarrow, Spark and `datasets` pass over, by its underscores
_TEMPORARY = f"{RUN}/tmp"
_EXTRAS = {"s3": "s3", "s3a": "s3"}
_STAMPS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")


def redact(address: str) -> str:
    """An address without user, password and query: what may be written and printed."""
    return re.sub(r"(\w+://[^\s?]*)\?[^\s'\"]*", r"\1", re.sub(r"(\w+://)[^/\s@]*@", r"\1", address))


def address_key(address: str) -> str:
    """`shown`, and a digest in the place of a query, so that addresses that differ there only stay apart."""
    clean = redact(address)
    _, _, query = address.partition("?")
    return f"{clean}?{hashlib.sha256(query.encode()).hexdigest()[:8]}" if "://" in address and query else clean


def read_storage_options(path: str | os.PathLike | None) -> StorageOptions:
    """From a JSON file such as {"s3": {"key": "...", "secret": "..."}}; it is never copied anywhere. Raises `ConfigError`."""
    if path is None:
        return {}
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"can't read storage options from {path}: {type(error).__name__}; expected JSON") from error
    if not isinstance(values, dict) or not all(isinstance(value, dict) for value in values.values()):
        raise ConfigError(
            f'{path} holds no mapping of protocols to options; expected such as {{"s3": {{"anon": true}}}}'
        )
    return values


def locate(address: str, options: StorageOptions) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of an address, and its path there. Raises `BatchError`, `MissingDependencyError`."""
    protocol = (split_protocol(address)[0] or "file").split("::")[0]
    try:
        with wrap_storage_errors("reach", address, options):
            return url_to_fs(address, **options.get(protocol, {}))
    except ImportError as error:
        raise MissingDependencyError.of(
            f"the fsspec file system of {protocol}://", _EXTRAS.get(protocol, "batch")
        ) from error


def address_of(fs: fsspec.AbstractFileSystem, path: str) -> str:
    """The address of another path of that file system."""
    return path if "file" in _protocols(fs) else fs.unstrip_protocol(path)


def _protocols(fs: fsspec.AbstractFileSystem) -> Sequence[str]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol


def version_stamp(info: Mapping[str, Any]) -> str:
    """Changes when the file does, as far as its file system tells."""
    return str(next((info[name] for name in _STAMPS if info.get(name)), ""))


@contextmanager
def wrap_storage_errors(action: str, address: str, options: StorageOptions | None = None) -> Iterator[None]:
    """Whatever a file system raises becomes a `BatchError` of one line, without credentials."""
    try:
        yield
    except (DyntokError, ImportError):
        raise
    except Exception as error:  # fsspec passes on what its back ends raise: OSError, botocore's, aiohttp's, asyncio's
        text = redact_message(getattr(error, "strerror", None) or str(error) or type(error).__name__, options or {})
        raise BatchError(f"can't {action} {redact(address)}: {text}") from error


def redact_message(text: str, options: StorageOptions) -> str:
    """On one line, without what stands in the storage options."""
    for secret in _strings(options):
        text = text.replace(secret, "***")
    return " ".join(redact(text).split())


def _strings(values: Any) -> Iterator[str]:
    for value in values.values() if isinstance(values, Mapping) else [values]:
        if isinstance(value, Mapping):
            yield from _strings(value)
        elif isinstance(value, str) and len(value) > 3:
            yield value


class Output:
    """The folder that a run writes into.

    Local: a file is written beside, synced to the disk and renamed. Elsewhere: written to this machine's temporary folder and uploaded,
    which in object stores makes it appear as a whole.
    """

    def __init__(self, address: str | os.PathLike, options: StorageOptions) -> None:
        self.address, self.options = os.fspath(address), options
        self.fs, self.root = locate(self.address, options)
        self.local = isinstance(self.fs, LocalFileSystem)

    def __reduce__(self):
        return Output, (self.address, self.options)

    def path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """No second run writes here meanwhile (local folders only), and what a killed one left half-written is removed.

        Raises `BatchError`.
        """
        if not self.local:
            yield
            return
        with wrap_storage_errors("make the folder", self.address):
            os.makedirs(self.path(RUN), exist_ok=True)
            lock = open(self.path(f"{RUN}/lock"), "wb")  # noqa: SIM115
        with lock:
            try:
                if fcntl:
                    fcntl.lockf(
                        lock, fcntl.LOCK_EX | fcntl.LOCK_NB
                    )  # unlike flock's, such a lock does not live on in forked workers
            except OSError as error:
                raise BatchError(
                    f"another run is writing to {redact(self.address)}; wait for it, or end it first"
                ) from error
            shutil.rmtree(self.path(_TEMPORARY), ignore_errors=True)
            try:
                yield
            finally:
                shutil.rmtree(self.path(_TEMPORARY), ignore_errors=True)

    def publish(self, name: str, write: Callable[[str], Any]) -> int:
        """`write(path)` makes a file, which then appears under `name`; its size in bytes. Raises `BatchError`."""
        folder = self.path(_TEMPORARY) if self.local else tempfile.gettempdir()
        temporary = os.path.join(folder, f"dyntok-{uuid.uuid4().hex}")
        with wrap_storage_errors("write", f"{self.address.rstrip('/')}/{name}", self.options):
            try:
                os.makedirs(folder, exist_ok=True)
                write(temporary)
                size = os.path.getsize(temporary)
                self._place(temporary, name)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(temporary)
        return size

    def _place(self, temporary: str, name: str) -> None:
        if not self.local:
            self.fs.put_file(temporary, self.path(name))
            return
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        target = self.path(name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.replace(temporary, target)
        if os.name == "posix":  # the name itself is on the disk only when its folder is
            folder = os.open(os.path.dirname(target), os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def publish_json(self, name: str, values: Any) -> None:
        text = json.dumps(values, ensure_ascii=False, indent=1) + "\n"
        self.publish(name, lambda path: Path(path).write_text(text, encoding="utf-8"))

    def remove(self, name: str) -> None:
        """Nothing happens where there is no such file. Raises `BatchError`."""
        with (
            wrap_storage_errors("remove", f"{self.address.rstrip('/')}/{name}", self.options),
            contextlib.suppress(FileNotFoundError),
        ):
            self.fs.rm_file(self.path(name))

    def read_json(self, name: str) -> Any:
        """None where there is no such file. Raises `BatchError`."""
        with wrap_storage_errors("read", f"{self.address.rstrip('/')}/{name}", self.options):
            try:
                return json.loads(self.fs.cat_file(self.path(name)))
            except FileNotFoundError:
                return None

    def read_jsons(self, names: Sequence[str]) -> list[Any]:
        """Of files that are there; at once, where the file system can. Raises `BatchError`."""
        paths = [self.path(name) for name in names]
        with wrap_storage_errors("read", f"{self.address.rstrip('/')}/{RUN}", self.options):
            contents = self.fs.cat(paths) if paths else {}
            return [json.loads(content) for content in map(contents.__getitem__, paths)]

    def open(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """For reading."""
        with wrap_storage_errors("read", f"{self.address.rstrip('/')}/{name}", self.options):
            return self.fs.open(self.path(name), "rb")

    def size(self, name: str) -> int | None:
        """In bytes; None where there is no such file. Raises `BatchError`."""
        with wrap_storage_errors("read", f"{self.address.rstrip('/')}/{name}", self.options):
            try:
                return self.fs.size(self.path(name))
            except FileNotFoundError:
                return None

    def names(self, folder: str = "") -> Iterator[str]:
        """Names of the files in a folder below, unordered; none where there is no such folder. Raises `BatchError`."""
        place = self.path(folder).rstrip("/")
        with wrap_storage_errors("list", f"{self.address.rstrip('/')}/{folder}", self.options):
            if self.local:
                with contextlib.suppress(FileNotFoundError), os.scandir(place) as entries:
                    yield from (entry.name for entry in entries if entry.is_file())
                return
            self.fs.invalidate_cache()
            with contextlib.suppress(FileNotFoundError):
                yield from (
                    info["name"].rsplit("/", 1)[-1] for info in self.fs.ls(place, detail=True) if info["type"] == "file"
                )
