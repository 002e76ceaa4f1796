"""Several model processes, one for each device.

Each asks for one input shard after another and sends back the encoded rows.
"""

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from dyntok.batch.engines.pipeline import ModelJob, encode_work
from dyntok.batch.engines.process import CONNECTION_LOST, Channel, FreshChild, exit_reason
from dyntok.batch.engines.rows import Row, RowChunk, TokenizedImage, Work
from dyntok.device import make_current
from dyntok.errors import BatchError, DyntokError

_RESULTS_PER_DEVICE = 4  # chunks that wait for the writer
_POLL_SECONDS = 0.2
_END_SECONDS = 10.0  # for a thread that lists input when the run stops; one that hangs is not waited for


@dataclass(frozen=True)
class _DeviceJob:
    model: ModelJob
    device: str
    threads: int


@dataclass(frozen=True)
class _WorkRequest:
    """A model process asks for work; the answer is a `Work`, or None where there is no more."""


@dataclass(frozen=True)
class _Finished:
    """The last message of a model process."""


_Result = RowChunk[Row[TokenizedImage]] | _Finished | BaseException


def encode_on_devices(
    work: Iterable[Work], job: ModelJob, devices: Sequence[str], threads: int
) -> Iterator[RowChunk[Row[TokenizedImage]]]:
    """Yields encoded rows, in order for each device. Raises what a process raised, `BatchError` where one died."""
    pool = _Pool(work, len(devices))
    children = [FreshChild(_serve) for _ in devices]
    drivers = [
        threading.Thread(target=pool.drive, args=(child, _DeviceJob(job, device, threads)), daemon=True)
        for child, device in zip(children, devices, strict=True)
    ]
    for driver in drivers:
        driver.start()
    running = len(devices)
    try:
        while running:
            result = pool.results.get()
            if isinstance(result, BaseException):
                raise result
            if isinstance(result, RowChunk):
                yield result
            else:
                running -= 1
    finally:
        pool.closed.set()
        for child in children:
            child.kill()
        for child in children:
            child.wait()
        for driver in drivers:
            driver.join(_END_SECONDS)


class _Pool:
    """What the threads of all devices share."""

    def __init__(self, work: Iterable[Work], devices: int) -> None:
        self.results: queue.Queue[_Result] = queue.Queue(_RESULTS_PER_DEVICE * devices)
        self.closed = threading.Event()
        self._work = iter(work)
        self._lock = threading.Lock()

    def drive(self, child: FreshChild, job: _DeviceJob) -> None:
        """Runs in a thread: serves one model process until it has finished."""
        try:
            child.channel.send(job)
            while True:
                message = child.channel.receive()
                if isinstance(message, _WorkRequest):
                    child.channel.send(self._next_work())
                    continue
                self._put(message)
                if not isinstance(message, RowChunk):
                    return
        except _WorkFailed as failed:
            self._put(failed.error)
        except CONNECTION_LOST:
            if not self.closed.is_set():
                reason = exit_reason(child.wait())
                self._put(BatchError(f"the model process for {job.device} died ({reason}); its own output says why"))
        except Exception as error:  # something that can't be pickled, such as a file system of the user's main module
            self._put(
                BatchError(f"can't send the job to the process for {job.device}: {type(error).__name__}: {error}")
            )

    def _next_work(self) -> Work | None:
        with self._lock:
            try:
                return next(self._work, None)
            except Exception as error:
                raise _WorkFailed(error) from error

    def _put(self, result: _Result) -> None:
        while not self.closed.is_set():
            with contextlib.suppress(queue.Full):
                self.results.put(result, timeout=_POLL_SECONDS)
                return


class _WorkFailed(Exception):
    """The input could not be listed."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _serve(channel: Channel) -> None:
    """Runs in the model process."""
    device = "its device"
    try:
        job: _DeviceJob = channel.receive()
        device = job.device
        torch.set_num_threads(job.threads)
        make_current(device)
        for chunk in encode_work(_requested_work(channel), job.model, device):
            channel.send(chunk)
        channel.send(_Finished())
    except DyntokError as error:
        channel.send(error)
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        channel.send(BatchError(f"the model process for {device} failed: {reason}"))


def _requested_work(channel: Channel) -> Iterator[Work]:
    """Runs in the thread that reads ahead, the only one that receives."""
    while True:
        channel.send(_WorkRequest())
        work = channel.receive()
        if work is None:
            return
        yield work
