"""Compressed tars as plain ones: a compressed stream is copied to an unnamed temporary file, within limits.

The first bytes decide whether a file is compressed, not its name.
"""

import bz2
import gzip
import lzma
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, cast

import pyarrow as pa

from dyntok.batch.inputs.samples import StorageFile
from dyntok.errors import BatchError

MAX_RATIO = 100  # photographs hardly shrink; what expands more than this is not a data set
MIN_LIMIT = 2**30  # bytes that a small file may always expand to
_CHUNK = 2**20
_OPENERS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": lambda file: pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd"),
}
_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)


@dataclass(frozen=True)
class Decompressed:
    """A stream that can seek."""

    file: IO[bytes]
    damage: str = ""  # why it ends before its end


@contextmanager
def decompressed(file: StorageFile, size: int) -> Iterator[Decompressed]:
    """Yields `file` itself if it is not compressed, else its content, up to the first damage.

    Raises what its storage raises.
    """
    head = file.read(6)
    file.seek(0)
    opener = next((opener for magic, opener in _OPENERS.items() if head.startswith(magic)), None)
    if opener is None:
        yield Decompressed(cast(IO[bytes], file))
        return
    with tempfile.TemporaryFile() as copy:
        damage = _copy(opener, file, copy, max(MIN_LIMIT, MAX_RATIO * size))
        copy.seek(0)
        yield Decompressed(copy, damage)


def _copy(opener: Callable[[Any], Any], file: StorageFile, copy: IO[bytes], limit: int) -> str:
    """Returns why copying stopped early, or ""."""
    copied = 0
    try:
        stream = opener(file)
    except _DAMAGE as error:
        file.raise_failure()
        return str(error)
    while True:
        try:
            chunk = stream.read(_CHUNK)
        except _DAMAGE as error:
            file.raise_failure()
            return f"the compressed data is damaged ({error})"
        if not chunk:
            return ""
        try:
            copy.write(chunk[: limit - copied])
        except OSError as error:
            reason = f"can't unpack an archive into {tempfile.gettempdir()}: {error.strerror or error}"
            raise BatchError(f"{reason}; TMPDIR names another folder") from error
        copied += len(chunk)
        if copied > limit:
            return f"it expands to more than {limit:,} bytes, the limit for its size"
