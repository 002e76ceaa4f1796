"""The folder that a run writes into. A file appears whole or not at all, and one run at a time writes there.

Not here: what the files hold (`formats.py`), and how addresses are read (`addresses.py`).
"""

import contextlib
import errno
import json
import os
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from dyntok.addresses import StorageOptions, locate, redact, wrap_storage_errors
from dyntok.errors import BatchError
from dyntok.locks import HeldError, lock
from dyntok.structure import require_path, require_type

RUN = "__run__"  # pyarrow, Spark and `datasets` skip names that begin with an underscore
_TEMPORARY = f"{RUN}/tmp"
_DATA_IS_LOST = (errno.EIO, errno.ENOSPC, errno.EDQUOT)  # other errors of fsync say that it is not supported


class Output:
    """An output folder.

    Local: a file is written to a temporary name, synced to the disk and renamed. Elsewhere: it is written to this
    machine's temporary folder and uploaded; object stores make it appear as a whole.
    """

    def __init__(self, address: str | os.PathLike, options: StorageOptions) -> None:
        require_path("the output", address)
        require_type("storage", options, Mapping, "options of fsspec by protocol, such as {'s3': {'key': ...}}")
        self.address, self.options = os.fspath(address), options
        fs, self.root = locate(self.address, options)
        self.local = isinstance(fs, LocalFileSystem)
        self._by_process = {os.getpid(): fs}
        self._warned: set[str] = set()

    def __reduce__(self):
        return Output, (self.address, self.options)

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        """Returns the file system; a forked process gets its own, since asynchronous ones refuse to work in another."""
        process = os.getpid()
        if process not in self._by_process:  # the other stays, too: closing it would disturb the process that made it
            self._by_process[process] = locate(self.address, self.options)[0]
        return self._by_process[process]

    def path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other runs from writing here (local folders only), and removes what a killed run left half-written.

        Raises `BatchError` where another run holds the lock. Where there are no locks, a warning says so.
        """
        if not self.local:
            yield
            return
        with wrap_storage_errors("make the folder", self.address):
            os.makedirs(self.path(RUN), exist_ok=True)
            file = open(self.path(f"{RUN}/lock"), "wb")  # noqa: SIM115
        with file:
            self._lock(file)
            shutil.rmtree(self.path(_TEMPORARY), ignore_errors=True)
            try:
                yield
            finally:
                shutil.rmtree(self.path(_TEMPORARY), ignore_errors=True)

    def _lock(self, file: IO[bytes]) -> None:
        try:
            missing = lock(file)
        except HeldError as error:
            message = f"another run is writing to {redact(self.address)}; wait until it ends, or stop it first"
            raise BatchError(message) from error
        if missing:
            self._warn(f"has no file locks ({missing}); make sure that no second run writes there")

    def publish(self, name: str, write: Callable[[str], Any]) -> int:
        """Calls `write(path)`, makes the file appear under `name`, and returns its size. Raises `BatchError`."""
        folder = self.path(_TEMPORARY) if self.local else tempfile.gettempdir()
        temporary = os.path.join(folder, f"dyntok-{uuid.uuid4().hex}")
        with wrap_storage_errors("write", f"{self.address.rstrip('/')}/{name}", self.options):
            try:
                os.makedirs(folder, exist_ok=True)
                write(temporary)
                size = os.path.getsize(temporary)
                self._move_into_place(temporary, name)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(temporary)
        return size

    def _move_into_place(self, temporary: str, name: str) -> None:
        if not self.local:
            self.fs.put_file(temporary, self.path(name))
            return
        self._sync(temporary, os.O_RDWR)
        target = self.path(name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.replace(temporary, target)
        if os.name == "posix":  # the new name is on the disk only when its folder is
            self._sync(os.path.dirname(target), os.O_RDONLY)

    def _sync(self, path: str, flags: int) -> None:
        try:
            descriptor = os.open(path, flags)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno in _DATA_IS_LOST:
                raise
            what = "folders" if os.path.isdir(path) else "files"
            self._warn(f"can't sync {what} to the disk ({_reason(error)}); a power failure may lose finished shards")

    def _warn(self, problem: str) -> None:
        if problem not in self._warned:
            self._warned.add(problem)
            warnings.warn(f"the file system of {redact(self.address)} {problem}", RuntimeWarning, stacklevel=2)

    def publish_json(self, name: str, values: Any) -> None:
        text = json.dumps(values, indent=1) + "\n"
        self.publish(name, lambda path: Path(path).write_text(text, encoding="utf-8"))

    def remove(self, name: str) -> None:
        """Removes a file if it exists. Raises `BatchError`."""
        with (
            wrap_storage_errors("remove", f"{self.address.rstrip('/')}/{name}", self.options),
            contextlib.suppress(FileNotFoundError),
        ):
            self.fs.rm_file(self.path(name))

    def read_json(self, name: str) -> Any:
        """Returns the content of a JSON file, or None where there is no such file. Raises `BatchError`."""
        with wrap_storage_errors("read", f"{self.address.rstrip('/')}/{name}", self.options):
            try:
                return json.loads(self.fs.cat_file(self.path(name)))
            except FileNotFoundError:
                return None

    def read_jsons(self, names: Sequence[str]) -> list[Any]:
        """Returns the contents of JSON files, which are requested together if the file system can.

        Raises `BatchError`.
        """
        everything = [None] * len(names)  # `cat` would take brackets in a path for a pattern
        with wrap_storage_errors("read", f"{self.address.rstrip('/')}/{RUN}", self.options):
            contents = self.fs.cat_ranges([self.path(name) for name in names], everything, everything, on_error="raise")
            return [json.loads(content) for content in contents]

    def open(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """Opens a file for reading. Raises `BatchError`."""
        with wrap_storage_errors("read", f"{self.address.rstrip('/')}/{name}", self.options):
            return self.fs.open(self.path(name), "rb")

    def size(self, name: str) -> int | None:
        """Returns the size of a file in bytes, or None where there is no such file. Raises `BatchError`."""
        with wrap_storage_errors("read", f"{self.address.rstrip('/')}/{name}", self.options):
            try:
                return self.fs.size(self.path(name))
            except FileNotFoundError:
                return None

    def names(self, folder: str = "") -> Iterator[str]:
        """Yields the names of the files in a folder of the output, unordered; none if it does not exist.

        Raises `BatchError`.
        """
        path = self.path(folder).rstrip("/")
        with wrap_storage_errors("list", f"{self.address.rstrip('/')}/{folder}", self.options):
            if self.local:
                with contextlib.suppress(FileNotFoundError), os.scandir(path) as entries:
                    yield from (entry.name for entry in entries if entry.is_file())
                return
            self.fs.invalidate_cache()
            with contextlib.suppress(FileNotFoundError):
                for info in self.fs.ls(path, detail=True):
                    if info["type"] == "file":
                        yield info["name"].rsplit("/", 1)[-1]


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__
