"""The engine for one machine: decoding processes, and one model process for each device (for a single device, this one).

Rows come in the order of their input shards from each device, so that one output shard after the other gets complete.
"""

import gc
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from dyntok.batch.engines.stages import End, Item, Work, batches, decode, encode, read
from dyntok.batch.inputs.samples import Input
from dyntok.batch.options import BatchOptions, EngineOptions
from dyntok.config import ImageConfig
from dyntok.errors import BatchError, DyntokError
from dyntok.tokenizer import DynamicVisualTokenizer

_AHEAD = 4  # batches that are read and wait for a decoding process
_MAX_WORKERS = 16
_START = (
    "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
)  # decoding processes need neither CUDA nor OpenMP

Rows = Iterator[list[Item | End]]


def run_local(
    work: Iterable[Work], source: Input, options: BatchOptions, engine: EngineOptions, tokenizer: DynamicVisualTokenizer
) -> Rows:
    """Encoded rows, batch by batch. Raises `BatchError` where input can't be read, or a process died."""
    devices = engine.devices or (str(tokenizer.device),)
    if len(devices) > 1:
        yield from _several(work, source, options, engine, devices, tokenizer)
        return
    if engine.threads:
        torch.set_num_threads(engine.threads)
    yield from _one(work, source, options, engine, tokenizer.to(devices[0]), _workers(engine, 1))


def _workers(engine: EngineOptions, devices: int) -> int:
    """Decoding processes of each model process."""
    if engine.workers is not None:
        return -(-engine.workers // devices)
    return min(_MAX_WORKERS, max(1, (os.cpu_count() or 1) // (2 * devices)))


class _Decoding(Dataset):
    """What a decoding process does with the batches it is sent."""

    def __init__(self, source: Input, config: ImageConfig, max_pixels: int) -> None:
        self.source, self.config, self.max_pixels = source, config, max_pixels

    def __getitem__(self, batch: list[Item | End]) -> list[Item | End]:
        return decode(batch, self.source, self.config, self.max_pixels)


def _one(
    work: Iterable[Work],
    source: Input,
    options: BatchOptions,
    engine: EngineOptions,
    tokenizer: DynamicVisualTokenizer,
    workers: int,
) -> Rows:
    for batch in decoded(work, source, options, tokenizer.config.image, engine.batch_size, workers):
        yield encode(batch, tokenizer, options)


def decoded(
    work: Iterable[Work], source: Input, options: BatchOptions, config: ImageConfig, batch_size: int, workers: int
) -> Rows:
    """Batches before they are encoded, in order. Raises `BatchError` where input can't be read."""
    loader = DataLoader(
        _Decoding(source, config, options.max_pixels),
        batch_size=None,
        sampler=_Ahead(batches((row for task in work for row in read(source, task, options.shard_size)), batch_size)),
        num_workers=workers,
        multiprocessing_context=_START if workers else None,
        collate_fn=_as_it_is,
        worker_init_fn=_end_with_parent,
    )
    gc.freeze()  # else the collector writes to every object, and pages that forked processes share become two
    try:
        with _deaf_to_the_keyboard():
            rows = iter(loader)
        yield from rows
    finally:
        gc.unfreeze()


@contextmanager
def dead_workers_told() -> Iterator[None]:
    """PyTorch raises from a signal handler, wherever this process is just then, when a decoding process died."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, DyntokError) or "DataLoader worker" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise BatchError(
            f"a decoding process died ({reason}), perhaps for want of memory; run again with fewer --workers"
        ) from error


def _as_it_is(batch: Any) -> Any:
    return batch


class _Ahead:
    """An iterator that a thread runs, a few items ahead of its reader; exceptions come where the item would."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = items
        self._queue: queue.Queue = queue.Queue(_AHEAD)
        self._closed = threading.Event()

    def __iter__(self) -> Iterator[Any]:
        threading.Thread(target=self._fill, daemon=True).start()
        try:
            while True:
                item, error = self._queue.get()
                if error is not None:
                    raise error
                if item is None:
                    return
                yield item
        finally:
            self._closed.set()

    def _fill(self) -> None:
        try:
            for item in self._items:
                if not self._put(item, None):
                    return
            self._put(None, None)
        except BaseException as error:
            self._put(None, error)

    def _put(self, item: Any, error: BaseException | None) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put((item, error), timeout=0.2)
                return True
            except queue.Full:
                continue
        return False


def _several(
    work: Iterable[Work],
    source: Input,
    options: BatchOptions,
    engine: EngineOptions,
    devices: tuple[str, ...],
    tokenizer: DynamicVisualTokenizer,
) -> Rows:
    """A process for each device takes one input shard after another; what they encode comes here."""
    context = multiprocessing.get_context("spawn")
    tasks, results = context.Queue(len(devices)), context.Queue(4 * len(devices))
    threads = engine.threads or max(1, (os.cpu_count() or 1) // len(devices))
    arguments = (tasks, results, source, options, engine, _workers(engine, len(devices)), threads, tokenizer)
    # not daemons: those may not have decoding processes of their own; they watch this process instead
    processes = [context.Process(target=_serve, args=(device, *arguments)) for device in devices]
    waiting, running = iter(_Ahead(work)), len(devices)
    try:
        with _deaf_to_the_keyboard():
            for process in processes:
                process.start()
        following = next(waiting, None)
        while running:
            while running and not tasks.full():
                tasks.put(following)  # None: there is no more
                if following is None:
                    break
                following = next(waiting, None)
            try:
                rows, error = results.get(timeout=0.2)
            except queue.Empty:
                if dead := [process for process in processes if process.exitcode]:
                    raise BatchError(
                        f"a model process died (exit code {dead[0].exitcode}); see above, and run again"
                    ) from None
                continue
            if error is not None:
                raise error
            if rows is None:
                running -= 1
            else:
                yield rows
    finally:
        tasks.cancel_join_thread()
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _serve(
    device: str,
    tasks: Any,
    results: Any,
    source: Input,
    options: BatchOptions,
    engine: EngineOptions,
    workers: int,
    threads: int,
    tokenizer: DynamicVisualTokenizer,
) -> None:
    _end_with_parent()
    torch.set_num_threads(threads)
    try:
        with dead_workers_told():
            for rows in _one(iter(tasks.get, None), source, options, engine, tokenizer.to(device), workers):
                results.put((rows, None))
        results.put((None, None))
    except DyntokError as error:
        results.put((None, error))


@contextmanager
def _deaf_to_the_keyboard() -> Iterator[None]:
    """Processes that begin here never hear Ctrl-C, wherever they are just then; this one hears it a moment later, and ends them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent(worker: int = 0) -> None:
    """From now on. PyTorch's own watch over the parent ends in a wait for a full pipe that nobody reads any more."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
