"""Decoding in child processes, with a time limit for each image.

An image that takes too long, or that crashes the decoder, costs its process. The process is replaced, the image
becomes a failure of its row, and the rest of its chunk is decoded again.
"""

import signal
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from queue import SimpleQueue

import torch

from dyntok.batch.engines.prefetch import Prefetch
from dyntok.batch.engines.process import CONNECTION_LOST, NOWHERE, Channel, ForkedChild, exit_reason, note_place
from dyntok.batch.engines.rows import DecodedImage, Row, RowChunk, SourceRow
from dyntok.batch.engines.stages import DecodeOptions, Place, decode
from dyntok.batch.inputs.samples import Input
from dyntok.errors import BatchError, DyntokError

_CHUNKS_PER_PROCESS = 2  # that are read and wait, so that no process waits
_CRASHES = {
    signal.Signals[name] for name in ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGFPE", "SIGILL") if hasattr(signal, name)
}


@dataclass(frozen=True)
class DecodeJob:
    """Everything that a decoding process needs."""

    source: Input
    options: DecodeOptions
    time_limit: float  # seconds for each image


def decode_chunks(
    chunks: Iterable[RowChunk[SourceRow]], job: DecodeJob, processes: int
) -> Generator[RowChunk[Row[DecodedImage]], None, None]:
    """Yields the decoded chunks in their order; without processes they are decoded here, without a time limit.

    Raises what reading raises, and `BatchError` where a process dies of something other than an image.
    """
    if not processes:
        with closing(iter(Prefetch(chunks))) as read_ahead:
            for chunk in read_ahead:
                yield decode(chunk, job.source, job.options)
        return
    decoders = [DecodingProcess(job) for _ in range(processes)]
    idle: SimpleQueue[DecodingProcess] = SimpleQueue()
    for decoder in decoders:
        idle.put(decoder)

    def decode_one(chunk: RowChunk[SourceRow]) -> RowChunk[Row[DecodedImage]]:
        decoder = idle.get()
        try:
            return decoder.decode(chunk)
        finally:
            idle.put(decoder)

    threads = ThreadPoolExecutor(processes)
    futures: Iterator[Future] = (threads.submit(decode_one, chunk) for chunk in chunks)
    try:
        with closing(iter(Prefetch(futures, _CHUNKS_PER_PROCESS * processes))) as ahead:
            for future in ahead:
                yield future.result()
    finally:
        for decoder in decoders:
            decoder.kill()
        threads.shutdown(cancel_futures=True)
        for decoder in decoders:
            decoder.close()


class DecodingProcess:
    """Decodes chunks in a process of its own."""

    def __init__(self, job: DecodeJob) -> None:
        self._job, self._lock, self._closed = job, threading.Lock(), False
        self._child = self._start()

    def decode(self, chunk: RowChunk[SourceRow]) -> RowChunk[Row[DecodedImage]]:
        """Raises `BatchError` where the process dies of something other than an image."""
        refused: dict[Place, str] = {}
        while True:
            try:
                self._child.channel.send((chunk, refused))
                answer = self._child.channel.receive()
            except CONNECTION_LOST as error:
                place, reason = self._cause_of_death()
                if place == NOWHERE or place in refused:
                    raise BatchError(f"a decoding process died ({reason}); run again with fewer --workers") from error
                refused[place] = reason
                self._replace_child()
                continue
            if isinstance(answer, BaseException):
                raise answer
            return answer

    def kill(self) -> None:
        """Ends the process; a thread that is in `decode` raises an error."""
        with self._lock:
            self._closed = True
            self._child.kill()

    def close(self) -> None:
        """Ends the process and closes its files. No thread may be in `decode`."""
        self.kill()
        self._child.wait()

    def _start(self) -> ForkedChild:
        child = ForkedChild(_serve)
        child.channel.send(self._job)
        return child

    def _replace_child(self) -> None:
        with self._lock:
            if self._closed:
                raise BatchError("decoding was stopped")
            self._child = self._start()

    def _cause_of_death(self) -> tuple[Place, str]:
        """Returns the image that caused it, or `NOWHERE`, and the reason."""
        place = self._child.place()
        code = self._child.wait()
        if code == -signal.SIGALRM:
            limit = f"{self._job.time_limit:g} seconds"
            return place, f"not decoded within {limit}; time_limit (--time-limit) allows more"
        if -code in _CRASHES:
            return place, f"the decoder crashed on it ({exit_reason(code)})"
        return NOWHERE, f"{exit_reason(code)}, perhaps because memory ran out"


def _serve(channel: Channel, places: int) -> None:
    """Runs in the decoding process: answers every chunk with its decoded form or an exception."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the process, whatever the decoder is doing
    job: DecodeJob = channel.receive()

    def on_place(place: Place) -> None:
        note_place(places, *place)
        signal.setitimer(signal.ITIMER_REAL, job.time_limit if place != NOWHERE else 0)

    while True:
        chunk, refused = channel.receive()
        channel.send(_decoded_or_error(chunk, job, refused, on_place))


def _decoded_or_error(chunk, job: DecodeJob, refused: Mapping[Place, str], on_place) -> object:
    try:
        return decode(chunk, job.source, job.options, refused, on_place)
    except DyntokError as error:
        return error
    except Exception as error:
        return BatchError(f"decoding failed: {type(error).__name__}: {error}")
    finally:
        on_place(NOWHERE)
