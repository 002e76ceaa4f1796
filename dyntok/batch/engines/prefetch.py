"""An iterator that a thread runs a few items ahead of its reader."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

_POLL_SECONDS = 0.2
_END = object()


class Prefetch(Generic[T]):
    """Iterates over `items` once; an exception in them is raised where its item would have come."""

    def __init__(self, items: Iterable[T], limit: int = 4) -> None:
        self._items = items
        self._queue: queue.Queue = queue.Queue(limit)
        self._closed = threading.Event()

    def __iter__(self) -> Iterator[T]:
        threading.Thread(target=self._fill, daemon=True).start()
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
