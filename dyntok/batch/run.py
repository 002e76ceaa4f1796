"""A whole run, from input to output: unfinished work is read, encoded by an engine, and written shard by shard."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from dyntok.addresses import StorageOptions, redact
from dyntok.batch.engines.local import run_local
from dyntok.batch.engines.rows import Range, RangeEnd, RowChunk, TokenizedRow
from dyntok.batch.formats import make_writer
from dyntok.batch.inputs.samples import Input
from dyntok.batch.manifest import Manifest, read_records, require_records
from dyntok.batch.options import BatchOptions, EngineOptions
from dyntok.batch.summary import Summary
from dyntok.batch.task import Task, prepare
from dyntok.errors import BatchError, ConfigError, DyntokError
from dyntok.structure import brief, is_number, require_type
from dyntok.tokenizer import DynamicVisualTokenizer

_ENOUGH = 100  # rows, before a rate of errors means something
_END_SECONDS = 10.0  # that a run waits for its counting thread; one that hangs is not waited for


def tokenize(
    inputs: str | os.PathLike | Sequence[str | os.PathLike],
    output: str | os.PathLike,
    *,
    model: str | os.PathLike | DynamicVisualTokenizer | None = None,
    options: BatchOptions | None = None,
    engine: EngineOptions | None = None,
    retry_errors: bool = False,
    max_error_rate: float = 1.0,
    storage: StorageOptions | None = None,
    progress: Callable[[Summary], None] | None = None,
) -> Summary:
    """Writes the codes of all images of `inputs` into the folder `output`; resumes an earlier run of the same kind.

    inputs, output  paths or fsspec addresses (`s3://`, `hf://`, ...); inputs may be globs, brace ranges, several of
                    one kind
    model           as in `dyntok.load`, or a tokenizer
    options         what is written
    engine          performance options; of these only `time_limit` can affect the output
    retry_errors    encode only the rows of the errors table
    max_error_rate  stop when a larger share of images fails
    storage         arguments of fsspec's file systems, by protocol; they are written nowhere
    progress        called after every row with what was done so far

    Raises `ConfigError` or `DataError` before anything starts, and `BatchError` where a run had to stop; what is
    finished stays.
    """
    engine = engine or EngineOptions()
    require_type("engine", engine, EngineOptions, "EngineOptions")
    if not (is_number(max_error_rate) and 0 <= max_error_rate <= 1):
        raise ConfigError(f"max_error_rate is {brief(max_error_rate)}, expected a share from 0 to 1")
    engine = with_devices(engine)
    task = prepare(inputs, output, model=model, options=options, engine=engine, storage=storage)
    if retry_errors and task.options.interleaved:
        raise ConfigError(
            "retry_errors works on rows of one image; interleaved rows are already written, with gaps for their errors"
        )
    if retry_errors:
        require_records(task.output)
    with task.output.locked():
        return _run(task, engine, retry_errors, max_error_rate, progress)


def _run(
    task: Task,
    engine: EngineOptions,
    retry_errors: bool,
    max_error_rate: float,
    progress: Callable[[Summary], None] | None,
) -> Summary:
    manifest, begin = task.manifest(), time.monotonic()
    writer = make_writer(task.options, task.tokenizer, task.description)
    work = manifest.failed_work(task.source) if retry_errors else manifest.unfinished_work(task.source)
    policy, open_ranges = task.options.policy, _OpenRanges()
    summary = Summary(output=redact(task.output.address), can_retry=not task.options.interleaved)
    chunks: Any = _engine(engine)(work, task.source, task.options, engine, task.tokenizer)

    def commit(completed: Iterable[tuple[RangeEnd, list[TokenizedRow]]]) -> None:
        for end, rows in completed:
            record = manifest.commit(end, rows, writer)
            if not end.compared:
                summary.add_shard(end, record)

    shown = progress is not None and not retry_errors
    counting = _counted_shards(task.source, summary) if shown else contextlib.nullcontext()
    with counting, contextlib.closing(chunks):  # else its processes would live on until an exception is forgotten
        for chunk in chunks:
            commit(open_ranges.expect(chunk.ends))
            for row in chunk.rows:
                summary.add_row(row, policy)
                commit(open_ranges.add(row))
                _update(summary, manifest, begin)
                if progress is not None:
                    progress(summary)
                if summary.rows >= _ENOUGH:
                    _check_errors(summary, max_error_rate)
    _update(summary, manifest, begin)
    summary.left_out.merge(manifest.finished_left_out)
    earlier_or_now = (record.rows for _, record in read_records(task.output))
    summary.found_nothing = not summary.rows and not any(earlier_or_now)
    if progress is not None:
        progress(summary)
    _check_errors(summary, max_error_rate)
    return summary


def _engine(engine: EngineOptions) -> Callable[..., Iterator[RowChunk[TokenizedRow]]]:
    if engine.name == "local":
        return run_local
    from dyntok.batch.engines.ray import run_ray  # imports Ray, which only this engine needs

    return run_ray


def with_devices(engine: EngineOptions) -> EngineOptions:
    """Returns the options with all GPUs of this machine where none are named. Raises `ConfigError` on missing ones."""
    if engine.name == "ray":
        return engine
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device in engine.devices:
        _check_device(device, gpus)
    return replace(engine, devices=engine.devices or tuple(f"cuda:{i}" for i in range(gpus)))


def _check_device(name: str, gpus: int) -> None:
    try:
        device = torch.device(name)
        found = (device.index or 0) < gpus if device.type == "cuda" else torch.zeros(1, device=device).numel() == 1
    except (RuntimeError, AssertionError, ImportError):  # a misspelt name, or a build of PyTorch without that device
        found = False
    if not found:
        raise ConfigError(
            f"PyTorch {torch.__version__} has no device {name!r} here ({gpus} CUDA GPUs); name others, such as cpu"
        )


class _OpenRanges:
    """Rows of output shards that are not complete; they may come in any order."""

    def __init__(self) -> None:
        self._rows: dict[Range, list[TokenizedRow]] = {}
        self._ends: dict[Range, RangeEnd] = {}

    def expect(self, ends: Iterable[RangeEnd]) -> Iterator[tuple[RangeEnd, list[TokenizedRow]]]:
        """Yields those of these ranges whose rows are all here."""
        for end in ends:
            self._ends[end.range] = end
            yield from self._completed(end.range)

    def add(self, row: TokenizedRow) -> Iterator[tuple[RangeEnd, list[TokenizedRow]]]:
        """Yields the range of this row where it was the last one, with its rows in order."""
        self._rows.setdefault(row.range, []).append(row)
        yield from self._completed(row.range)

    def _completed(self, span: Range) -> Iterator[tuple[RangeEnd, list[TokenizedRow]]]:
        if span in self._ends and len(self._rows.get(span, [])) == self._ends[span].rows:
            yield self._ends.pop(span), sorted(self._rows.pop(span, []), key=lambda row: row.place)


@contextlib.contextmanager
def _counted_shards(source: Input, summary: Summary) -> Iterator[None]:
    """Counts the input shards in a thread, which ends with the run."""
    ended = threading.Event()

    def count() -> None:
        shards = 0
        with contextlib.suppress(DyntokError):  # reading them will raise it, too
            for _ in source.shards():
                shards += 1
                if ended.is_set():
                    return
            summary.input_shards_in_all = shards

    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(_END_SECONDS)


def _update(summary: Summary, manifest: Manifest, begin: float) -> None:
    summary.finished_before, summary.failed_before = manifest.finished_before, manifest.failed_before
    summary.input_shards_before = manifest.finished_shards
    summary.seconds = time.monotonic() - begin


def _check_errors(summary: Summary, limit: float) -> None:
    images = summary.images + summary.errors
    if summary.errors > limit * max(images, 1):
        raise BatchError(
            f"{summary.errors:,} of {images:,} images failed, more than the share of {limit:g} that is allowed "
            "(max_error_rate, --max-error-rate); what is finished stays, with its errors table"
        )
