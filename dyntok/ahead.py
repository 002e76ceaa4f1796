"""Results in the order of their inputs, computed by threads a few inputs ahead of the reader."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


def in_order(
    inputs: Iterable[Any], work: Callable[[int, Any], T], workers: int, ahead: int
) -> Iterator[Callable[[], T]]:
    """Yields a function for each input that returns `work(index, input)`, or raises what that raised.

    Paths and bytes go to the threads. Other inputs are worked on when they come, because their owner may change or
    close them once the next one is asked for.

    workers: threads; with 0 the work is done when its function is called. ahead: results that may wait for the reader.
    """
    if not workers:
        yield from (partial(work, index, given) for index, given in enumerate(inputs))
        return
    threads = ThreadPoolExecutor(workers, thread_name_prefix="dyntok")
    waiting: deque[Future[T]] = deque()
    try:
        for index, given in enumerate(inputs):
            lasting = isinstance(given, str | os.PathLike | bytes)
            waiting.append(threads.submit(work, index, given) if lasting else _done(work, index, given))
            if len(waiting) > ahead:
                yield waiting.popleft().result
        while waiting:
            yield waiting.popleft().result
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def _done(work: Callable[[int, Any], T], index: int, given: Any) -> Future[T]:
    future: Future[T] = Future()
    try:
        future.set_result(work(index, given))
    except Exception as error:  # raised where the result is asked for, as the threads do
        future.set_exception(error)
    return future
