"""What a run has finished: one record per output shard, written last of all; and the rows that failed.

`OUTPUT/__run__/run.json` says what the run is, `done/NAME.json` that an output shard is complete, `errors/NAME.parquet`
which rows are not in it. A file that no record names is not part of the output.
"""

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dyntok.addresses import StorageOptions, address_key, is_remote, local_path, redact, wrap_storage_errors
from dyntok.batch.engines.rows import Failure, Range, RangeEnd, Retry, TokenizedRow, Work
from dyntok.batch.formats import Writer
from dyntok.batch.inputs.left_out import LeftOut
from dyntok.batch.inputs.names import without_surrogates
from dyntok.batch.inputs.samples import Input, Shard
from dyntok.batch.megatron import text_tokenizer_digest
from dyntok.batch.options import BatchOptions
from dyntok.batch.storage import RUN, Output
from dyntok.chunks import batched
from dyntok.errors import BatchError, DataError
from dyntok.structure import differences

_VERSION = 2  # of what a run writes
_READABLE = (1, 2)  # 1: without crop boxes
_TOGETHER = 256  # records that are read at once
_SHARD = re.compile(r"\d{6,}-\d{6,}(-retry\d+)?\.(parquet|tar|bin|idx|keys\.json)")
_ERRORS = pa.schema(
    [
        ("key", pa.string()),
        ("source", pa.string()),
        ("reason", pa.string()),
        ("place", pa.int64()),
        ("image", pa.int32()),
    ],
)


@dataclass(frozen=True)
class Record:
    """An output shard that is complete."""

    shard: dict[str, Any]  # identity of the input shard
    start: int  # where the range begins in it, and where the next one
    next: int
    last: bool
    rows: int  # that were read; those with an error, too
    images: int
    tokens: int
    errors: int
    duplicates: int  # rows whose key came before in this range
    files: dict[str, dict[str, int]]  # name -> {"rows": ..., "bytes": ...}
    attempt: int = 0  # the last `--retry-errors`
    left_out: dict[str, int] = field(default_factory=dict)  # input files that were not read, by suffix
    digest: str = ""  # of the keys of its rows; "" in old outputs

    @property
    def data_files(self) -> list["RecordedFile"]:
        return [RecordedFile(name, facts["rows"], facts["bytes"]) for name, facts in sorted(self.files.items())]


def describe_run(
    sources: Sequence[str], kind: str, fingerprint: str, options: BatchOptions, version: str
) -> dict[str, Any]:
    """Returns the content of `run.json`, which must be the same when the run resumes, except the version of dyntok."""
    values = {name: value for name, value in options.to_dict().items() if name != "kind"}
    if options.text_tokenizer is not None:
        values["text_tokenizer"] = text_tokenizer_digest(options.text_tokenizer)
    return {
        "version": _VERSION,
        "dyntok": version,
        "tokenizer": {"fingerprint": fingerprint},
        "input": {
            "kind": kind,
            "sources": [
                address_key(source if is_remote(source) else os.path.abspath(local_path(source))) for source in sources
            ],
        },
        "options": values,
    }


def refuse_foreign(output: Output) -> None:
    """Raises `BatchError` where a folder holds files and is not the output of a run."""
    if output.read_json(f"{RUN}/run.json") is None and next(iter(output.names()), None) is not None:
        raise BatchError(f"{redact(output.address)} holds files that are of no run; name a new or an empty folder")


def require_records(output: Output) -> None:
    """Raises `BatchError` where no run has finished anything in a folder."""
    if next(iter(output.names(f"{RUN}/done")), None) is None:
        raise BatchError(
            f"{redact(output.address)} holds no run whose failed pictures could be tried again; leave retry_errors "
            "(--retry-errors) out"
        )


def read_description(output: Output) -> dict[str, Any]:
    """Returns the description of an output folder. Raises `DataError` where it is none."""
    described = output.read_json(f"{RUN}/run.json")
    if described is None:
        raise DataError(f"{redact(output.address)} is no output of `dyntok batch`: it has no {RUN}/run.json")
    if not isinstance(described, dict) or described.get("version") not in _READABLE:
        raise DataError(f"{redact(output.address)}/{RUN}/run.json is of another version of dyntok, or damaged")
    if "keep" in described["options"]:  # as dyntok 0.1 called it
        described["options"]["keep_columns"] = described["options"].pop("keep")
    for name, value in {"margins": False, "batch_invariant": False, "refine": 0}.items():  # missing in dyntok 0.1
        described["options"].setdefault(name, value)
    return described


def read_records(output: Output) -> Iterator[tuple[Range, Record]]:
    """Returns the records of all completed shards, in order. Raises `BatchError`."""
    all_names = sorted((name.removesuffix(".json") for name in output.names(f"{RUN}/done")), key=_numbers)
    for names in batched(all_names, _TOGETHER):
        for name, values in zip(names, output.read_jsons([f"{RUN}/done/{name}.json" for name in names]), strict=True):
            shard, _, number = name.partition("-")
            try:
                yield Range(int(shard), int(number)), Record(**values)
            except (TypeError, ValueError) as error:
                raise BatchError(
                    f"{redact(output.address)}/{RUN}/done/{name}.json is damaged; remove it, and run again"
                ) from error


def _numbers(name: str) -> list[int]:
    """Returns the numbers in a shard's name, for sorting: as text, 1000000 would come before 999999."""
    return [int(part) if part.isdecimal() else -1 for part in name.split("-")]


@dataclass(frozen=True)
class RecordedFile:
    """A data file that a record names: complete, and part of the output."""

    name: str  # below the output folder
    rows: int
    bytes: int

    def check(self, folder: str, *, size: int | None, rows: int | None = None) -> None:
        """Raises `DataError` where the file is gone, or where its size or number of rows is not what was written."""
        if size is None:
            found = "is missing"
        elif size != self.bytes:
            found = f"has {size:,} bytes, and {self.bytes:,} were written"
        elif rows not in (None, self.rows):
            found = f"has {rows:,} rows, and {self.rows:,} were written"
        else:
            return
        raise DataError(
            f"{redact(folder)}/{self.name} {found}; to write it anew, run the same `dyntok batch` command again"
        )


def recorded_files(folder: str | os.PathLike | Output, storage: StorageOptions | None = None) -> list[RecordedFile]:
    """Returns the files of an output folder that its records name, in the order of the input.

    Every reader of an output goes through this list: a file that no record names, such as one that a killed run left
    over, is not part of the output. Raises `DataError` where the folder is not an output, `BatchError` where it can't
    be read.
    """
    output = folder if isinstance(folder, Output) else Output(folder, storage or {})
    read_description(output)
    return [file for _, record in read_records(output) for file in record.data_files]


def read_errors(output: Output, span: Range, record: Record) -> list[dict[str, Any]]:
    """Returns the rows of the errors table that belong to a record. Raises `BatchError`."""
    if not record.errors:
        return []
    name = _errors_name(replace(span, attempt=record.attempt))
    with wrap_storage_errors("read", f"{output.address}/{name}", output.options), output.open(name) as file:
        return pq.read_table(file).to_pylist()


class Manifest:
    """Of one output folder; made where there is none, unless `create` is false.

    Raises `BatchError` where the folder holds another run.
    """

    def __init__(self, output: Output, description: Mapping[str, Any], *, create: bool = True) -> None:
        self.output = output
        before = output.read_json(f"{RUN}/run.json")
        if next(iter(output.names(f"{RUN}/done")), None) is not None:
            described = read_description(output)
            known = {"dyntok": None, "device": None}  # another version may resume; devices have a message of their own
            if found := differences({**description, **known}, {**described, **known}):
                raise BatchError(
                    f"{redact(output.address)} holds another run: {'; '.join(found)}; "
                    "repeat the original command, or name a new folder"
                )
            _check_device(output, description["device"], described.get("device"))
        elif create and before != description:  # a run without completed shards may restart with other options
            for name in [name for name in output.names() if _SHARD.fullmatch(name)]:
                output.remove(name)
            output.publish_json(f"{RUN}/run.json", description)
        self.finished_before = 0  # images in the records that were met, and input shards as far as they are finished
        self.failed_before = 0  # images, in these records
        self.finished_shards = 0.0
        self.finished_left_out = LeftOut()

    def unfinished_work(self, source: Input) -> Iterator[Work]:
        """Yields the work that is not complete, in the order of the input. Raises `BatchError` if the input changed."""
        records = _RecordsByShard(read_records(self.output))
        for shard in source.shards():
            done = records.of(shard.index)
            for record in done.values():
                if changed := differences(shard.identity, record.shard):
                    raise BatchError(
                        f"the input changed since this run began: {'; '.join(changed)}; run into a new folder"
                    )
            done = {number: record for number, record in done.items() if self._files_intact(record)}
            self.finished_before += sum(record.images for record in done.values())
            self.failed_before += sum(record.errors for record in done.values())
            for record in done.values():
                self.finished_left_out.merge(record.left_out)
            self.finished_shards += sum(record.next - record.start for record in done.values()) / max(shard.extent, 1)
            yield from _unfinished_ranges(shard, done)
        if (beyond := records.rest()) is not None:
            raise BatchError(
                f"the input has fewer shards than when this run began: {beyond['address']} is not there; "
                "run into a new folder"
            )

    def failed_work(self, source: Input) -> Iterator[Work]:
        """Yields the failed rows as work, to be tried again.

        A repaired file is read from its beginning: its other rows may have moved, and their records must say so.
        """
        records = _RecordsByShard(read_records(self.output))
        for shards in _by_file(source.shards()):
            found = [(shard, records.of(shard.index)) for shard in shards]
            repaired = _was_repaired(found)
            for shard, done in found:
                known = next(n for n in itertools.count() if n not in done) if repaired else 0
                if known:
                    retries = tuple(self._retry(Range(shard.index, n), done[n]) for n in range(known))
                    yield Work(shard, 0, shard.begin, retries=retries)
                for number, record in done.items():
                    if record.errors and number >= known:
                        retry = self._retry(Range(shard.index, number), record)
                        yield Work(shard, number, record.start, retries=(retry,))

    def _retry(self, span: Range, record: Record) -> Retry:
        keys = {row["place"]: row["key"] for row in read_errors(self.output, span, record)}
        return Retry(record.attempt + 1, keys, record.rows, record.last, record.digest)

    def commit(self, end: RangeEnd, rows: Sequence[TokenizedRow], writer: Writer) -> Record:
        """Writes an output shard: its errors, then its data, and its record last. Returns what was written now.

        Raises `BatchError`; then no record was written, and the files do not count.
        """
        failures = [_failure(row, failure) for row in rows for failure in row.failures]
        good = [row for row in rows if not row.failed]
        if failures:
            table = pa.Table.from_pylist(failures, _ERRORS)
            self.output.publish(_errors_name(end.range), lambda path: pq.write_table(table, path))
        retry_without_success = end.range.attempt and not good
        sizes = {} if retry_without_success else writer.write(self.output, end.range.name, good, end.types)
        images = [image for row in good for image in row.present]
        written = Record(
            shard=end.shard,
            start=end.start,
            next=end.next,
            last=end.last,
            rows=end.rows,
            images=len(images),
            tokens=sum(len(image.codes) for image in images),
            errors=len(failures),
            duplicates=len(good) - len({row.key for row in good}),
            files={file: {"rows": len(good), "bytes": size} for file, size in sizes.items()},
            attempt=end.range.attempt,
            left_out=end.left_out,
            digest=end.digest,
        )
        name = f"{RUN}/done/{replace(end.range, attempt=0).name}.json"
        values = self.output.read_json(name)  # of a range that is retried, or whose files were lost
        before = Record(**values) if values else written
        record = _merged(before, written, rows) if end.range.attempt else written
        self.output.publish_json(name, asdict(record))
        for file in before.files.keys() - record.files.keys():  # other readers of the folder would see their rows twice
            self.output.remove(file)
        return written

    def _files_intact(self, record: Record) -> bool:
        """Returns whether the files of a record still exist with the same sizes."""
        return all(self.output.size(name) == facts["bytes"] for name, facts in record.files.items())


def _check_device(output: Output, now: str, before: str | None) -> None:
    """Raises `BatchError` where a run would go on with another kind of device; dyntok 0.1 did not note the kind."""
    if before not in (None, now):
        raise BatchError(
            f"the run in {redact(output.address)} was begun on the device {before!r} and would go on with {now!r}; "
            f"they round differently, and some codes would differ. Resume it on {before!r} (devices, --devices), "
            "or name a new folder"
        )


class _RecordsByShard:
    """Records by the index of their input shard, as they come in order."""

    def __init__(self, records: Iterator[tuple[Range, Record]]) -> None:
        self._records = records
        self._next = next(records, None)

    def of(self, shard: int) -> dict[int, Record]:
        found = {}
        while self._next is not None and self._next[0].shard <= shard:
            found[self._next[0].number] = self._next[1]
            self._next = next(self._records, None)
        return found

    def rest(self) -> dict[str, Any] | None:
        return None if self._next is None else self._next[1].shard


def _by_file(shards: Iterator[Shard]) -> Iterator[list[Shard]]:
    """Yields the shards of each file together; only Parquet files have several."""
    for _, some in itertools.groupby(shards, lambda shard: shard.address if shard.rows else shard.index):
        yield list(some)


def _was_repaired(found: Sequence[tuple[Shard, Mapping[int, Record]]]) -> bool:
    """Returns whether a file with failed rows has changed. `found`: its shards, each with its records.

    Records of several states of the file say that rows were tried again before, perhaps not all of them.
    """
    records = [record for _, done in found for record in done.values()]
    states = {(record.shard["size"], record.shard["stamp"]) for record in records}
    now = {(shard.size, shard.stamp) for shard, _ in found}
    return len(states) > 1 or (states != now and any(record.errors for record in records))


def _unfinished_ranges(shard: Shard, done: Mapping[int, Record]) -> Iterator[Work]:
    number, start = 0, shard.begin
    while True:
        if number in done:
            if done[number].last:
                return
            number, start = number + 1, done[number].next
            continue
        stop = min((n for n in done if n > number), default=None)
        yield Work(shard, number, start, stop)
        if stop is None:
            return
        number, start = stop, done[stop].start


def _merged(before: Record, retried: Record, rows: Sequence[TokenizedRow]) -> Record:
    """Returns the record of a range after some of its rows were tried again."""
    return replace(
        retried,
        rows=before.rows + sum(row.place >= before.rows for row in rows),
        images=before.images + retried.images,
        tokens=before.tokens + retried.tokens,
        duplicates=before.duplicates + retried.duplicates,
        files=before.files | retried.files,
        left_out=before.left_out,
    )


def _errors_name(span: Range) -> str:
    return f"{RUN}/errors/{span.name}.parquet"


def _failure(row: TokenizedRow, failure: Failure) -> dict[str, Any]:
    return {
        "key": row.key,
        "source": without_surrogates(row.source),
        "reason": failure.reason,
        "place": row.place,
        "image": failure.image if len(row.images) > 1 else None,
    }
