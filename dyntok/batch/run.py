"""A whole run, from input to output: what is missing is read, encoded by an engine, and written shard by shard."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import dyntok
from dyntok.batch.addresses import StorageOptions, locate, redact
from dyntok.batch.engines.local import dead_workers_told, run_local
from dyntok.batch.engines.stages import End, Item, Range, Tokens
from dyntok.batch.formats import make_writer
from dyntok.batch.inputs.names import LeftOut
from dyntok.batch.inputs.open import open_input
from dyntok.batch.inputs.samples import Broken, Input
from dyntok.batch.manifest import Manifest, Record, describe_run
from dyntok.batch.options import BatchOptions, EngineOptions
from dyntok.batch.storage import Output
from dyntok.errors import BatchError, ConfigError, DyntokError
from dyntok.loading import load
from dyntok.precision import DTYPES
from dyntok.tokenizer import DynamicVisualTokenizer

_ENOUGH = 100  # rows, before a rate of errors says something


@dataclass
class Summary:
    """What a run did. Rows are images, or documents in interleaved data."""

    rows: int = 0  # that were read now
    images: int = 0  # that were tokenized now, and their tokens
    tokens: int = 0
    errors: int = 0  # now
    duplicates: int = 0  # rows whose key came before in their output shard, now
    shards: int = 0  # output shards that were completed now
    bytes: int = 0  # of those
    finished_before: int = 0  # images, by earlier runs
    seconds: float = 0.0
    input_shards: float = 0.0  # finished now, and before, as far as they were
    input_shards_before: float = 0.0
    input_shards_in_all: int | None = None  # None: not counted yet
    left_out: LeftOut = field(default_factory=LeftOut)  # input files that were not read, by suffix, of earlier runs too

    @property
    def seconds_left(self) -> float | None:
        """About; None until something is finished and everything counted."""
        if self.input_shards_in_all is None or not self.input_shards:
            return None
        return (
            self.seconds
            / self.input_shards
            * max(self.input_shards_in_all - self.input_shards_before - self.input_shards, 0)
        )

    def add(self, end: End, record: Record) -> None:
        """An output shard that is complete."""
        self.shards += 1
        self.bytes += sum(facts["bytes"] for facts in record.files.values())
        self.duplicates += record.duplicates
        self.input_shards += end.share
        self.left_out.merge(record.left_out)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        parts = [f"{self.images:,} images, {self.tokens:,} tokens ({self.tokens / max(self.images, 1):.1f} per image)"]
        parts.append(
            f"{self.shards:,} output shards of {self.bytes / 1e6:.1f} MB, {self.images / max(self.seconds, 1e-9):.1f} images/s"
        )
        parts += [f"{self.finished_before:,} images were finished before"] * bool(self.finished_before)
        parts += [f"{self.duplicates:,} keys came twice or more in a shard; all of their rows were written"] * bool(
            self.duplicates
        )
        parts += [f"{self.errors:,} images left out, see the errors table (dyntok inspect)"] * bool(self.errors)
        parts += [f"left out: {self.left_out}"] * bool(self.left_out)
        return "\n".join(parts)


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
    """Codes of all images of `inputs`, into the folder `output`; goes on where an earlier run of the same kind stopped.

    inputs, output  paths or fsspec addresses (`s3://`, `hf://`, ...); inputs may be globs, brace ranges, several of one kind
    model           as in `dyntok.load`, or a tokenizer
    options         what is written; `engine`: how the work is done, which changes no code
    retry_errors    only the rows of the errors table, from where they were
    max_error_rate  stop when a larger share of rows fails
    storage         arguments of fsspec's file systems, by protocol; they are written nowhere
    progress        called with what was done so far, after every row

    Raises `ConfigError`, `DataError` on what can't be done; `BatchError` where it had to stop: what is finished stays.
    """
    engine = engine or EngineOptions()
    if not 0 <= max_error_rate <= 1:
        raise ConfigError(f"max_error_rate is {max_error_rate}, expected a share from 0 to 1")
    task = prepare(inputs, output, model=model, options=options, storage=storage)
    if retry_errors and task.options.interleaved:
        raise ConfigError("retry_errors works on rows of one image; interleaved rows are written already, with a gap")
    with task.output.locked(), dead_workers_told():
        manifest = task.manifest()
        writer = make_writer(task.options, task.tokenizer, task.description)
        work = manifest.failed_work(task.source) if retry_errors else manifest.unfinished_work(task.source)
        summary, open_ranges, begin = Summary(), _OpenRanges(), time.monotonic()
        if progress is not None and not retry_errors:
            threading.Thread(target=_count_shards, args=(task.source, summary), daemon=True).start()
        run = _engine(engine)(work, task.source, task.options, _with_devices(engine), task.tokenizer)
        with contextlib.closing(
            run
        ) as batches:  # at once when something stops: else its processes live on until the exception is gone
            for row in (row for batch in batches for row in batch):
                _count(row, summary)
                for end, items in open_ranges.add(row):
                    summary.add(end, manifest.commit(end, items, writer))
                summary.finished_before, summary.input_shards_before = (
                    manifest.finished_before,
                    manifest.finished_shards,
                )
                summary.seconds = time.monotonic() - begin
                if progress is not None:
                    progress(summary)
                if summary.rows >= _ENOUGH:
                    _check_errors(summary, max_error_rate)
        _check_errors(summary, max_error_rate)
        summary.seconds, summary.finished_before = time.monotonic() - begin, manifest.finished_before
        summary.left_out.merge(manifest.finished_left_out)
    return summary


@dataclass(frozen=True)
class Task:
    """What a run is about: input, output and tokenizer, opened; nothing is written yet."""

    source: Input
    output: Output
    tokenizer: DynamicVisualTokenizer
    options: BatchOptions
    description: dict[str, Any]

    def manifest(self, *, create: bool = True) -> Manifest:
        return Manifest(self.output, self.description, create=create)


def prepare(
    inputs: str | os.PathLike | Sequence[str | os.PathLike],
    output: str | os.PathLike,
    *,
    model: str | os.PathLike | DynamicVisualTokenizer | None = None,
    options: BatchOptions | None = None,
    storage: StorageOptions | None = None,
) -> Task:
    """Arguments and errors are those of `tokenize`."""
    options, storage = options or BatchOptions(), storage or {}
    sources = (
        [os.fspath(inputs)] if isinstance(inputs, (str, os.PathLike)) else [os.fspath(source) for source in inputs]
    )
    target = Output(output, storage)
    for name in sources:
        fs, path = locate(name, storage)
        if type(fs) is type(target.fs) and f"{target.root}/".startswith(f"{path.rstrip('/')}/"):
            raise ConfigError(
                f"the output {redact(target.address)} lies inside the input {redact(name)}; name another folder"
            )
    source = open_input(sources, options, storage)
    tokenizer = model if isinstance(model, DynamicVisualTokenizer) else load(model, dtype=DTYPES[options.dtype])
    description = describe_run(sources, source.kind, tokenizer.fingerprint, options, dyntok.__version__)
    return Task(source, target, tokenizer, options, description)


def _engine(engine: EngineOptions) -> Callable[..., Iterator[list[Item | End]]]:
    if engine.name == "local":
        return run_local
    from dyntok.batch.engines.ray import run_ray

    return run_ray


def _with_devices(engine: EngineOptions) -> EngineOptions:
    if engine.name == "ray" or engine.devices or not torch.cuda.is_available():
        return engine
    return EngineOptions(**{**vars(engine), "devices": tuple(f"cuda:{i}" for i in range(torch.cuda.device_count()))})


class _OpenRanges:
    """Rows of output shards that are not complete; they may come in any order."""

    def __init__(self) -> None:
        self._items: dict[Range, list[Item]] = {}
        self._ends: dict[Range, End] = {}

    def add(self, row: Item | End) -> Iterable[tuple[End, list[Item]]]:
        """The range that is complete now, if one is, with its rows in order."""
        span = row.range
        if isinstance(row, End):
            self._ends[span] = row
        else:
            self._items.setdefault(span, []).append(row)
        if span in self._ends and len(self._items.get(span, [])) == self._ends[span].rows:
            yield self._ends.pop(span), sorted(self._items.pop(span, []), key=lambda item: item.place)


def _count_shards(source: Input, summary: Summary) -> None:
    with contextlib.suppress(DyntokError):  # whoever reads them will tell
        summary.input_shards_in_all = sum(1 for _ in source.shards())


def _count(row: Item | End, summary: Summary) -> None:
    if isinstance(row, End):
        return
    images: Sequence[Any] = row.sample.images
    tokens = [len(image.codes) for image in images if isinstance(image, Tokens)]
    summary.rows += 1
    summary.images += len(tokens)
    summary.tokens += sum(tokens)
    summary.errors += sum(isinstance(image, Broken) for image in images)


def _check_errors(summary: Summary, limit: float) -> None:
    if summary.errors > limit * max(summary.images + summary.errors, 1):
        raise BatchError(
            f"{summary.errors:,} of {summary.images + summary.errors:,} images failed, more than the share of {limit:g} that is allowed "
            "(max_error_rate, --max-error-rate); what is finished stays, with its errors table"
        )
