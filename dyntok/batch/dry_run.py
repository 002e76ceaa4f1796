"""What a run would do, without writing anything: counted where it can be counted, estimated from a sample otherwise."""

import itertools
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from dyntok.batch.addresses import redact
from dyntok.batch.engines.stages import End, Item, Tokens, Work, batches, decode, encode, read
from dyntok.batch.formats import make_writer
from dyntok.batch.inputs.names import LeftOut
from dyntok.batch.inputs.samples import Broken
from dyntok.batch.run import Task
from dyntok.batch.storage import Output
from dyntok.errors import DataError

_SAMPLE = 96  # rows
_BATCH = 16
_REASONS = 3


@dataclass(frozen=True)
class DryRun:
    """What a run would read and write. Seconds, tokens and bytes are estimated from a sample, and so are the rows of archives."""

    kind: str
    output: str
    input_shards: int  # to be read
    input_shards_finished: int
    input_bytes: int
    rows: int  # to be read, about
    sampled: int
    errors: int  # images of the sample that failed
    reasons: dict[str, int]  # the most frequent ones
    left_out: dict[str, int]  # files in and around the sample that are not read, by suffix
    tokens_per_image: float
    seconds: float  # on this machine, one device
    output_bytes: int
    output_shards: int  # at least

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def all_failed(self) -> bool:
        """Returns whether images were sampled, and none could be read."""
        return self.errors > 0 and not self.tokens_per_image

    def __str__(self) -> str:
        lines = [
            f"would read   {self.input_shards:,} input shards ({self.kind}) of {self.input_bytes / 1e6:,.1f} MB, about {self.rows:,} rows"
            + f"; {self.input_shards_finished:,} are finished" * bool(self.input_shards_finished),
        ]
        if self.all_failed:
            lines.append(
                f"every image of the sample failed ({self.errors:,} of {self.errors:,}); a run would write nothing"
            )
        else:
            lines += self._estimates()
        lines += [f"  {count:>8,}  {reason}" for reason, count in self.reasons.items()]
        lines += [f"left out so far: {LeftOut(self.left_out)}"] * bool(self.left_out)
        return "\n".join(lines)

    def _estimates(self) -> list[str]:
        minutes = f"{self.seconds / 60:.1f} minutes" if self.seconds < 7200 else f"{self.seconds / 3600:.1f} hours"
        return [
            f"would write  about {self.output_bytes / 1e6:,.1f} MB in {self.output_shards:,} shards or more, to {self.output}",
            f"would take   about {minutes} on this machine with one device",
            f"from a sample of {self.sampled} rows: {self.tokens_per_image:.1f} tokens per image, {self.errors} errors",
        ]


def dry_run(task: Task) -> DryRun:
    """Raises what `tokenize` raises before it writes; `DataError` where nothing is left to be done."""
    manifest, sampling = task.manifest(create=False), _Sampling(task)
    shards = extent = size = 0
    for work in manifest.unfinished_work(task.source):
        sampling.take(work)
        shards += 1
        extent += work.shard.begin + work.shard.extent - work.start
        size += work.shard.size if work.shard.rows is None or work.shard.rows[0] == 0 else 0
    if not shards:
        raise DataError(f"nothing is left to be done in {redact(task.output.address)}")
    images = [image for item in sampling.items for image in item.sample.images]
    broken = [image for image in images if isinstance(image, Broken)]
    reasons = Counter(image.reason.partition(": ")[2] or image.reason for image in broken)
    tokens = [len(image.codes) for image in images if isinstance(image, Tokens)]
    rows = extent  # of lists and tables; of tars it is bytes
    if task.source.kind in ("tar", "zip"):
        rows = round(extent * len(sampling.items) / max(sampling.extent, 1))
    return DryRun(
        kind=task.source.kind,
        output=redact(task.output.address),
        input_shards=shards,
        input_shards_finished=int(manifest.finished_shards),
        input_bytes=size,
        rows=rows,
        sampled=len(sampling.items),
        errors=len(broken),
        reasons=dict(reasons.most_common(_REASONS)),
        left_out=dict(sampling.left_out),
        tokens_per_image=sum(tokens) / max(len(tokens), 1),
        seconds=rows * sampling.seconds / max(sampling.timed, 1),
        output_bytes=round(rows * sampling.output_bytes() / max(len(sampling.items), 1)),
        output_shards=max(shards, -(-rows // task.options.shard_size)),
    )


class _Sampling:
    """The first rows of the work, encoded."""

    def __init__(self, task: Task) -> None:
        self.task, self.left_out = task, LeftOut()
        self.items: list[Any] = []
        self.types: dict[str, Any] = {}
        self.extent = 0  # of their input shards
        self.seconds, self.timed = 0.0, 0  # for so many rows; the first batch only warms up

    def take(self, work: Work) -> None:
        if len(self.items) >= _SAMPLE:
            return
        task, options, began = self.task, self.task.options, time.monotonic()
        with task.source.open(work.shard, work.start) as reading:
            self.types = dict(reading.types)
        rows = list(itertools.islice(read(task.source, work, options.shard_size), _SAMPLE - len(self.items)))
        for row in rows:
            self.left_out.merge(row.left_out if isinstance(row, End) else {})
        for batch in batches((row for row in rows if isinstance(row, Item)), _BATCH):
            encoded = encode(
                decode(batch, task.source, task.tokenizer.config.image, options.max_pixels), task.tokenizer, options
            )
            if self.items:
                self.seconds += time.monotonic() - began
                self.timed += len(encoded)
            self.items += encoded
            began = time.monotonic()
        if rows and isinstance(rows[-1], End) and rows[-1].last:
            self.extent += work.shard.begin + work.shard.extent - work.start
        elif self.items:
            self.extent += self.items[-1].sample.next - work.start

    def output_bytes(self) -> int:
        """Of the sample, written to a temporary folder."""
        good = [item for item in self.items if all(isinstance(image, Tokens) for image in item.sample.images)]
        if not good:
            return 0
        with tempfile.TemporaryDirectory() as folder:
            writer = make_writer(self.task.options, self.task.tokenizer, self.task.description)
            return sum(writer.write(Output(folder, {}), "sample", good, self.types).values())
