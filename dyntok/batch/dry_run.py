"""What a run would do, without writing anything: counted where it can be counted, estimated from a sample otherwise."""

import itertools
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from dyntok.addresses import redact
from dyntok.batch.engines.rows import TokenizedRow, Work
from dyntok.batch.engines.stages import DecodeOptions, chunked, decode, encode, read
from dyntok.batch.formats import make_writer
from dyntok.batch.inputs.left_out import LeftOut
from dyntok.batch.storage import Output
from dyntok.batch.summary import reason_kind
from dyntok.batch.task import Task
from dyntok.validation import counted

_SAMPLE = 96  # rows
_CHUNK = 16
_REASONS = 3


@dataclass(frozen=True)
class DryRun:
    """What a run would read and write.

    Seconds, tokens and bytes are estimated from a sample, and so are the rows of archives.
    """

    kind: str
    output: str
    input_shards: int  # to be read; 0 where everything is finished
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

    @property
    def found_nothing(self) -> bool:
        """Returns whether what is left of the input holds no images, neither good nor bad ones."""
        return self.input_shards > 0 and not (self.sampled or self.errors)

    def __str__(self) -> str:
        if not self.input_shards:
            return f"nothing is left to be done in {self.output}"
        finished = f"; {self.input_shards_finished:,} are finished" if self.input_shards_finished else ""
        lines = [
            f"would read   {counted(self.input_shards, 'input shard')} ({self.kind}) "
            f"of {self.input_bytes / 1e6:,.1f} MB, about {counted(self.rows, 'row')}{finished}",
        ]
        if self.found_nothing:
            lines.append("no images were found; a run would write nothing")
        elif self.all_failed:
            lines.append(
                f"every image of the sample failed ({self.errors:,} of {self.errors:,}); a run would write nothing"
            )
        else:
            lines += self._estimates()
            if self.errors:
                lines.append(
                    f"failed       {counted(self.errors, 'image')} of the sample; a run would list them as errors:"
                )
        lines += [f"  {count:>8,}  {reason}" for reason, count in self.reasons.items()]
        if self.left_out:
            lines.append(f"left out so far: {LeftOut(self.left_out)}")
        return "\n".join(lines)

    def _estimates(self) -> list[str]:
        minutes = f"{self.seconds / 60:.1f} minutes" if self.seconds < 7200 else f"{self.seconds / 3600:.1f} hours"
        return [
            f"would write  about {self.output_bytes / 1e6:,.1f} MB in {counted(self.output_shards, 'shard')} or more, "
            f"to {self.output}",
            f"would take   about {minutes} on this machine with one device",
            f"from a sample of {counted(self.sampled, 'row')}: {self.tokens_per_image:.1f} tokens per image, "
            f"{counted(self.errors, 'error')}",
        ]


def dry_run(task: Task, device: str | None = None) -> DryRun:
    """Measures on `device`, by default where the tokenizer is.

    Raises what `tokenize` raises before it writes.
    """
    if device is not None:
        task.tokenizer.to(device)
    manifest, sampling = task.manifest(create=False), _Sampling(task)
    shards = extent = size = 0
    for work in manifest.unfinished_work(task.source):
        sampling.take(work)
        shards += 1
        extent += work.shard.begin + work.shard.extent - work.start
        size += work.shard.size if work.shard.rows is None or work.shard.rows[0] == 0 else 0
    failures = [failure for row in sampling.rows for failure in row.failures]
    reasons = Counter(reason_kind(failure.reason) for failure in failures)
    tokens = [len(image.codes) for row in sampling.rows for image in row.present]
    rows = extent  # of lists and tables; of archives it is bytes
    if task.source.kind in ("tar", "zip"):
        rows = round(extent * len(sampling.rows) / max(sampling.extent, 1))
    return DryRun(
        kind=task.source.kind,
        output=redact(task.output.address),
        input_shards=shards,
        input_shards_finished=int(manifest.finished_shards),
        input_bytes=size,
        rows=rows,
        sampled=len(sampling.rows),
        errors=len(failures),
        reasons=dict(reasons.most_common(_REASONS)),
        left_out=dict(sampling.left_out),
        tokens_per_image=sum(tokens) / max(len(tokens), 1),
        seconds=rows * sampling.seconds / max(sampling.timed, 1),
        output_bytes=round(rows * sampling.output_bytes() / max(len(sampling.rows), 1)),
        output_shards=max(shards, -(-rows // task.options.shard_size)),
    )


class _Sampling:
    """The first rows of the work, encoded."""

    def __init__(self, task: Task) -> None:
        self.task, self.left_out = task, LeftOut()
        self.rows: list[TokenizedRow] = []
        self.types: dict[str, pa.DataType] = {}
        self.extent = 0  # of their input shards
        self.seconds, self.timed = 0.0, 0  # for so many rows; the first chunk only warms up

    def take(self, work: Work) -> None:
        """Adds rows of this work until the sample is large enough."""
        wanted = _SAMPLE - len(self.rows)
        if wanted <= 0:
            return
        task, options, began = self.task, self.task.options, time.monotonic()
        decode_options = DecodeOptions.of(task.tokenizer, options)
        chunks = list(chunked(itertools.islice(read(task.source, work, options.shard_size), wanted), _CHUNK))
        position = work.start
        for chunk in chunks:
            encoded = encode(decode(chunk, task.source, decode_options), task.tokenizer, options)
            if self.rows:
                self.seconds += time.monotonic() - began
                self.timed += len(encoded.rows)
            self.rows += encoded.rows
            began = time.monotonic()
            position = chunk.rows[-1].sample.next if chunk.rows else position
        ends = [end for chunk in chunks for end in chunk.ends]
        with task.source.open(work.shard, work.start) as reading:
            self.types = dict(reading.types)
        for end in ends:
            self.left_out.merge(end.left_out)
        if any(end.last for end in ends):
            position = work.shard.begin + work.shard.extent
        self.extent += position - work.start

    def output_bytes(self) -> int:
        """Returns the size of the sample's output, written to a temporary folder."""
        good = [row for row in self.rows if not row.failures]
        if not good:
            return 0
        with tempfile.TemporaryDirectory() as folder:
            writer = make_writer(self.task.options, self.task.tokenizer, self.task.description)
            return sum(writer.write(Output(folder, {}), "sample", good, self.types).values())
