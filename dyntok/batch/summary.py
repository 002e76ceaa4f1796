"""What a run has done so far, for progress displays and for its last words."""

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from dyntok.batch.engines.rows import RangeEnd, Row, TokenizedImage
from dyntok.batch.inputs.left_out import LeftOut
from dyntok.batch.manifest import Record
from dyntok.policy import KeepPolicy
from dyntok.target import missed_in_words
from dyntok.validation import counted

_TOP_REASONS = 3
_CUT = 0.01  # share of the area; less is not worth a line


@dataclass
class Summary:
    """What a run did. Rows are images, or documents in interleaved data; everything counts this run alone."""

    output: str = ""  # its address, without credentials
    rows: int = 0
    images: int = 0
    tokens: int = 0
    errors: int = 0
    reasons: Counter[str] = field(default_factory=Counter)  # of the errors, without names of files
    area_used: float = 0.0  # sum over images of the share of the original's area that is inside the crop box
    missed_psnr: int = 0  # images that keep as many patches as they may, and may not reach the wanted quality
    left_out: LeftOut = field(default_factory=LeftOut)  # input files that were not read, by suffix; earlier runs' too
    duplicates: int = 0  # rows whose key came before in their output shard
    shards: int = 0  # output shards that were completed
    bytes: int = 0  # of those
    finished_before: int = 0  # images, by earlier runs
    failed_before: int = 0  # images, in earlier runs; those of a run with `retry_errors` count as errors
    can_retry: bool = True  # False for interleaved rows, which are written with gaps
    seconds: float = 0.0
    input_shards: float = 0.0  # read, partly read ones in proportion
    input_shards_before: float = 0.0  # finished by earlier runs
    input_shards_in_all: int | None = None  # None: not counted yet
    found_nothing: bool = False  # the input holds no images, neither good nor bad ones; known at the end

    @property
    def seconds_left(self) -> float | None:
        """Returns an estimate; None until something is read and everything counted."""
        if self.input_shards_in_all is None or not self.input_shards:
            return None
        left = self.input_shards_in_all - self.input_shards_before - self.input_shards
        return self.seconds / self.input_shards * max(left, 0)

    @property
    def images_expected(self) -> int | None:
        """Returns an estimate of the images of the whole run, without those of earlier runs; None as `seconds_left`."""
        if self.input_shards_in_all is None or not self.input_shards:
            return None
        share = (self.input_shards_in_all - self.input_shards_before) / self.input_shards
        return max(self.images, round(self.images * share))

    @property
    def tokens_per_image(self) -> float:
        return self.tokens / max(self.images, 1)

    @property
    def images_per_second(self) -> float:
        return self.images / max(self.seconds, 1e-9)

    def add_row(self, row: Row[TokenizedImage], policy: KeepPolicy) -> None:
        """Counts a row that is encoded."""
        self.rows += 1
        self.images += len(row.present)
        self.tokens += sum(len(image.codes) for image in row.present)
        self.area_used += sum(image.used for image in row.present)
        self.missed_psnr += sum(policy.may_miss(len(image.codes), math.prod(image.grid)) for image in row.present)
        self.errors += len(row.failures)
        self.reasons.update(reason_kind(failure.reason) for failure in row.failures)
        self.input_shards += row.share

    def add_shard(self, end: RangeEnd, record: Record) -> None:
        """Counts an output shard that is complete."""
        self.shards += 1
        self.bytes += sum(facts["bytes"] for facts in record.files.values())
        self.duplicates += record.duplicates
        self.input_shards += end.share
        self.left_out.merge(record.left_out)

    def to_dict(self) -> dict[str, Any]:
        """Returns numbers, strings and mappings of them, ready for JSON."""
        return {**asdict(self), "reasons": dict(self.reasons), "left_out": dict(self.left_out)}

    def __str__(self) -> str:
        lines = [
            f"{counted(self.images, 'image')}, {counted(self.tokens, 'token')} "
            f"({self.tokens_per_image:.1f} per image), {self.images_per_second:.1f} images/s",
            f"written to {self.output}: {counted(self.shards, 'output shard')}, {self.bytes / 1e6:.1f} MB",
        ]
        if self.found_nothing:
            lines.append("the input holds no images; archives inside archives are not opened")
        if self.images and self.area_used < (1 - _CUT) * self.images:
            lines.append(
                f"{100 * (1 - self.area_used / self.images):.1f} % of the originals' area was cut off to fit the grid; "
                "--fit squash or pad uses all of it"
            )
        if self.missed_psnr:
            lines.append(missed_in_words(self.missed_psnr, self.images))
        if self.finished_before:
            lines.append(f"{self.finished_before:,} images were finished by earlier runs")
        if self.duplicates:
            lines.append(f"{self.duplicates:,} rows repeat a key of their shard; all of them were written")
        if self.left_out:
            lines.append(f"left out: {self.left_out}")
        if self.errors:
            lines.append(f"{counted(self.errors, 'image')} failed:")
            lines += [f"  {count:>8,}  {reason}" for reason, count in self.reasons.most_common(_TOP_REASONS)]
            rest = len(self.reasons) - _TOP_REASONS
            if rest > 0:
                lines.append(f"  and {rest:,} other reasons")
        if self.failed_before:
            lines.append(f"{counted(self.failed_before, 'image')} failed in earlier runs")
        if self.errors or self.failed_before:
            again = "; try them again: --retry-errors" if self.can_retry else ""
            lines.append(f"list them: dyntok inspect {self.output} -o report{again}")
        return "\n".join(lines)


def reason_kind(reason: str) -> str:
    """Returns a reason without the name of the image that it begins with."""
    return reason.partition(": ")[2] or reason
