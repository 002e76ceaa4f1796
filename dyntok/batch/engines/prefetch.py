"""An iterator that a thread runs a few items ahead of its reader.

The thread ends before its reader goes on: one that is still in C++ code when the interpreter exits would abort it.
"""

import queue
import threading
from collections.abc import Generator, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")

_POLL_SECONDS = 0.2
_END_SECONDS = 10.0  # for an item that is being made when the reader stops; one that hangs is not waited for
_END = object()


class Prefetch(Generic[T]):
    """Iterates over `items` once; an exception in them is raised where its item would have come."""

    def __init__(self, items: Iterable[T], limit: int = 4) -> None:
        self._items = items
        self._queue: queue.Queue = queue.Queue(limit)
        self._closed = threading.Event()

    def __iter__(self) -> Generator[T, None, None]:
        thread = threading.Thread(target=self._fill, daemon=True)
        thread.start()
        try:
            while True:
                item, error = self._queue.get()
                if error is not None:
                    raise error
                if item is _END:
                    return
                yield item
        finally:
            self._closed.set()
            thread.join(_END_SECONDS)

    def _fill(self) -> None:
        try:
            for item in self._items:
                if not self._put(item, None):
                    return
            self._put(_END, None)
        except BaseException as error:
            self._put(None, error)

    def _put(self, item: object, error: BaseException | None) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put((item, error), timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False
