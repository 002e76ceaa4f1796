"""A file that one process at a time can lock, so that two runs do not write into one folder."""

import errno
import sys
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_HELD = (errno.EAGAIN, errno.EACCES)


class HeldError(Exception):
    """Another process holds the lock."""


def lock(file: IO[bytes]) -> str:
    """Locks an open file until it is closed. Returns "", or why there are no locks (nothing is locked then).

    file: opened for writing. A process that locks the same file twice succeeds twice.

    Raises `HeldError` if another process holds the lock.
    """
    if fcntl is None:
        return f"Python offers none on {sys.platform}"
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, it does not live on in forked workers
    except OSError as error:
        if error.errno in _HELD:
            raise HeldError from error
        return error.strerror or str(error)
    return ""
