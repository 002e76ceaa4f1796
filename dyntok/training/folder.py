"""The folder of a run belongs to one run at a time.

Not here: what the folder holds (`loop.py`).
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dyntok.errors import CheckpointError
from dyntok.locks import HeldError, lock

_log = logging.getLogger(__name__)


@contextmanager
def own(folder: Path) -> Iterator[None]:
    """Makes the folder, and keeps runs of other processes from writing there.

    Raises `CheckpointError` if another run is writing there, or if the folder can't be written.
    """
    path = folder / "lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "wb")  # noqa: SIM115
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"can't write {path}: {reason}; choose a folder that can be written") from error
    with file:
        try:
            missing = lock(file)
        except HeldError as error:
            message = f"another run is training into {folder}; wait until it ends, stop it, or choose another folder"
            raise CheckpointError(message) from error
        if missing:
            _log.warning("%s has no file locks (%s); make sure that no second run trains there", folder, missing)
        yield
