"""Child processes and the pickled messages between them and this process.

No child imports the user's main module, so scripts need no `if __name__ == "__main__"`. A forked child starts at once
and shares memory, which suits decoding. A fresh interpreter is slower to start and safe for CUDA and OpenMP, which
suits models.

Only this process and its children write to these pipes. Files from users are never unpickled.
"""

import contextlib
import json
import multiprocessing
import os
import pickle
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, Protocol, TypeAlias

CAN_FORK = "fork" in multiprocessing.get_all_start_methods()
CONNECTION_LOST = (EOFError, OSError, ValueError, pickle.UnpicklingError)  # what `send` and `receive` raise then
NOWHERE = (-1, -1)

_PLACE = struct.Struct("<qq")
_WATCH_SECONDS = 0.5
_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv.pop()); " + (
    "from dyntok.batch.engines.process import serve_fresh; serve_fresh(int(sys.argv.pop()))"
)
_starting = threading.Lock()  # a child forked between the two ends of another one's pipes would keep them open


class Channel:
    """Sends and receives pickled messages over two pipes."""

    def __init__(self, reading: IO[bytes], writing: IO[bytes]) -> None:
        self._reading, self._writing = reading, writing
        self._lock = threading.Lock()

    def send(self, message: Any) -> None:
        """Send a message; several threads may.

        A model is streamed tensor by tensor, without a file descriptor for each.
        """
        with self._lock:
            pickle.dump(message, self._writing, protocol=pickle.HIGHEST_PROTOCOL)
            self._writing.flush()

    def receive(self) -> Any:
        """Returns the next message; raises one of `CONNECTION_LOST` after the last one."""
        return pickle.load(self._reading)

    def close(self) -> None:
        for stream in (self._reading, self._writing):
            with contextlib.suppress(*CONNECTION_LOST):
                stream.close()


Target: TypeAlias = Callable[[Channel], None]  # a function of a module, which runs in the child


class Child(Protocol):
    """A running child process."""

    channel: Channel

    def kill(self) -> None:
        """Ends the process; does nothing where it has ended already."""
        ...

    def wait(self) -> int:
        """Returns the exit code once the process has ended; minus the signal's number where a signal ended it."""
        ...


class ForkedChild:
    """A copy of this process that runs `target`. It can note a place in memory that survives its death."""

    def __init__(self, target: Callable[[Channel, int], None]) -> None:
        self._places = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        with _starting, keyboard_interrupts_blocked():
            (read_here, write_there), (read_there, write_here) = os.pipe(), os.pipe()
            arguments = (target, read_there, write_there, (read_here, write_here), self._places.fileno(), os.getpid())
            self._process = multiprocessing.get_context("fork").Process(target=_serve_forked, args=arguments)
            self._process.daemon = True
            self._process.start()
            os.close(read_there)
            os.close(write_there)
        self.channel = Channel(os.fdopen(read_here, "rb"), os.fdopen(write_here, "wb"))

    def place(self) -> tuple[int, int]:
        """Returns what the child last gave to `note_place`."""
        content = os.pread(self._places.fileno(), _PLACE.size, 0)
        return _PLACE.unpack(content) if content else NOWHERE

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> int:
        while self._process.exitcode is None:  # another thread may have collected the exit code first
            self._process.join(0.1)
        self.channel.close()
        self._places.close()
        return self._process.exitcode


class FreshChild:
    """A new Python interpreter that runs `target`. It finds modules where this process finds them."""

    def __init__(self, target: Target) -> None:
        command = [sys.executable, "-c", _BOOT, str(os.getpid()), json.dumps(sys.path)]
        with _starting, keyboard_interrupts_blocked():
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.channel = Channel(self._process.stdout, self._process.stdin)
        with contextlib.suppress(*CONNECTION_LOST):  # `receive` reports a child that did not start
            self.channel.send(target)

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> int:
        code = self._process.wait()
        self.channel.close()
        return code


def note_place(places: int, first: int, second: int) -> None:
    """Note what a forked child works on; the child itself calls this."""
    os.pwrite(places, _PLACE.pack(first, second), 0)


def serve_fresh(parent: int) -> None:
    """Serve the parent in a new interpreter: standard input and output carry messages, prints go to standard error."""
    channel = Channel(os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)
    _end_with(parent)
    with contextlib.suppress(EOFError):
        channel.receive()(channel)


def exit_reason(code: int) -> str:
    """Returns the name of the signal that ended a process, or its exit code."""
    if code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"


@contextmanager
def keyboard_interrupts_blocked() -> Iterator[None]:
    """Hides Ctrl-C from children that start here. This process handles it afterwards and ends them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve_forked(target: Callable, reading: int, writing: int, others: tuple[int, int], places: int, parent: int):
    for other in others:  # the parent's ends: while they are open here, the pipes would never end
        os.close(other)
    _end_with(parent)
    with contextlib.suppress(EOFError, BrokenPipeError):
        target(Channel(os.fdopen(reading, "rb"), os.fdopen(writing, "wb")), places)


def _end_with(parent: int) -> None:
    """Ends this process soon after its parent, also where it waits for a pipe without a reader."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    if os.name == "posix":
        threading.Thread(target=watch, daemon=True).start()
