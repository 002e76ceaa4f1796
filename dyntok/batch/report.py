"""What an output folder holds: lengths, use of the codebook, errors; and pictures for people."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dyntok.addresses import StorageOptions
from dyntok.batch.dataset import CodesDataset, packed
from dyntok.batch.engines.rows import Range
from dyntok.batch.inputs.open import open_input
from dyntok.batch.inputs.samples import Broken, Input, Shard
from dyntok.batch.manifest import Record, read_description, read_errors, read_records
from dyntok.batch.options import BatchOptions
from dyntok.batch.shard_reader import read_block
from dyntok.batch.storage import Output
from dyntok.batch.summary import reason_kind
from dyntok.encoding import Encoding
from dyntok.errors import BatchError, FingerprintError, MissingDependencyError
from dyntok.model.codebook import perplexity
from dyntok.tokenizer import DynamicVisualTokenizer
from dyntok.validation import counted
from dyntok.visualize import contact_sheet

_REASONS = 10  # the most frequent ones are reported
_GRIDS = 4  # the most frequent ones are reported
_PER_SHARD = 4  # panels of one output shard in a sheet


@dataclass(frozen=True)
class Report:
    """Lengths and use of the codebook are None for Megatron files, whose codes are not read."""

    description: dict[str, Any]  # `run.json`
    shards: int
    rows: int  # that were read from the input; those with an error, too
    images: int
    tokens: int
    errors: int
    duplicates: int
    bytes: int
    reasons: dict[str, int]  # the most frequent ones, without names of files
    lengths: list[int] | None  # how many images have 0, 1, 2, ... tokens
    codes_used: int | None
    perplexity: float | None  # of the distribution of codes
    grids: dict[str, int] | None  # how many images have each grid, such as "13x19"
    area_used: float | None  # the mean share of an original's area that its crop box covers; None in old outputs

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_per_image": self.tokens_per_image}

    @property
    def tokens_per_image(self) -> float:
        return self.tokens / max(self.images, 1)

    def quantile(self, share: float) -> int:
        """Returns the length that `share` of the images do not exceed."""
        return int(np.searchsorted(np.cumsum(self.lengths), share * sum(self.lengths)))

    def __str__(self) -> str:
        per_image = f" ({8 * self.bytes / self.images:,.0f} bits per image on disk)" if self.images else ""
        lines = [
            f"images       {self.images:,} of {counted(self.rows, 'row')}, "
            f"in {counted(self.shards, 'shard')} of {self.bytes / 1e6:,.1f} MB{per_image}",
            f"tokenizer    {self.description['tokenizer']['fingerprint']}, by dyntok {self.description['dyntok']}",
            f"tokens       {self.tokens:,}, {self.tokens_per_image:.1f} per image",
        ]
        if self.lengths and self.images:
            quantiles = ", ".join(f"{name} {self.quantile(share)}" for name, share in _QUANTILES.items())
            lines += [f"lengths      {quantiles}", *_bars(self.lengths)]
            lines.append(f"codes        {self.codes_used:,} different ones, perplexity {self.perplexity:,.0f}")
        if self.grids:
            lines.append(f"grids        {self._grids_in_words()}")
        if self.area_used is not None:
            lines.append(f"area         {100 * self.area_used:.1f} % of the originals was used")
        if self.duplicates:
            lines.append(f"duplicates   {self.duplicates:,} rows with a key that came before in their shard")
        lines.append(f"errors       {self.errors:,}")
        lines += [f"  {count:>8,}  {reason}" for reason, count in self.reasons.items()]
        return "\n".join(lines)

    def _grids_in_words(self) -> str:
        grids = Counter(self.grids).most_common()
        named = ", ".join(f"{grid} ({counted(count, 'image')})" for grid, count in grids[:_GRIDS])
        return f"{named} and {len(grids) - _GRIDS:,} others" if len(grids) > _GRIDS else named


_QUANTILES = {"least": 1e-12, "1 %": 0.01, "median": 0.5, "99 %": 0.99, "most": 1.0}


def inspect(folder: str, *, storage: StorageOptions | None = None) -> Report:
    """Returns a report on all completed shards of a folder. Raises `DataError` if it is no output folder."""
    output = Output(folder, storage or {})
    description = read_description(output)
    totals: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for span, record in read_records(output):
        totals.update(shards=1, rows=record.rows, images=record.images, tokens=record.tokens, errors=record.errors)
        totals.update(duplicates=record.duplicates, bytes=sum(facts["bytes"] for facts in record.files.values()))
        reasons.update(reason_kind(row["reason"]) for row in read_errors(output, span, record))
        if description["options"]["format"] == "megatron":  # other files are read below
            for file in record.data_files:
                file.check(output.address, size=output.size(file.name))
    lengths = codes = area = None
    grids: Counter[str] | None = None
    if description["options"]["format"] != "megatron":
        lengths, codes = np.zeros(1, np.int64), np.zeros(1, np.int64)
        grids, area = Counter(), 0.0
        for batch in CodesDataset(folder, batch_size=4096, storage=storage):
            lengths = _added(lengths, np.bincount(batch.encoding.lengths.numpy()))
            codes = _added(codes, np.bincount(batch.encoding.packed_codes.numpy()))
            grids.update(f"{rows}x{columns}" for rows, columns in batch.encoding.grids.tolist())
            area = None if area is None or batch.crop_boxes is None else area + _used(batch.sizes, batch.crop_boxes)
    return Report(
        description=description,
        **{name: totals[name] for name in ("shards", "rows", "images", "tokens", "errors", "duplicates", "bytes")},
        reasons=dict(reasons.most_common(_REASONS)),
        lengths=None if lengths is None else lengths.tolist(),
        codes_used=None if codes is None else int((codes > 0).sum()),
        perplexity=None if codes is None else perplexity(torch.from_numpy(codes)),
        grids=None if grids is None else dict(grids.most_common()),
        area_used=area / totals["images"] if area is not None and totals["images"] else None,
    )


def all_errors(folder: str, *, storage: StorageOptions | None = None) -> Iterator[dict[str, Any]]:
    """Yields the rows of the errors table: key, source, reason, place in its range, number among the row's images.

    Raises as `inspect`.
    """
    output = Output(folder, storage or {})
    read_description(output)
    for span, record in read_records(output):
        yield from read_errors(output, span, record)


def _used(sizes: torch.Tensor, boxes: torch.Tensor) -> float:
    """Returns the sum over images of the share of their area that is inside the box."""
    inside = (boxes[:, 2:] - boxes[:, :2]).double().prod(1)
    return float((inside / sizes.double().prod(1)).sum())


def _added(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    total = np.zeros(max(len(one), len(other)), np.int64)
    total[: len(one)] += one
    total[: len(other)] += other
    return total


def _bars(lengths: Sequence[int], rows: int = 12, width: int = 50) -> list[str]:
    """Returns the histogram in characters."""
    first = next(i for i, count in enumerate(lengths) if count) if any(lengths) else 0
    step = max(1, -(-(len(lengths) - first) // rows))
    counts = [sum(lengths[i : i + step]) for i in range(first, len(lengths), step)]
    most = max(counts, default=0) or 1
    return [
        f"  {first + i * step:>5} to {first + (i + 1) * step - 1:<5} {count:>9,}  {'#' * -(-count * width // most)}"
        for i, count in enumerate(counts)
    ]


def draw_lengths(report: Report, path: str | Path) -> None:
    """Writes the histogram of lengths as a picture. Raises `MissingDependencyError` without matplotlib."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of("matplotlib", "batch") from error
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(report.lengths)), report.lengths, width=1.0)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    mean = f"{report.tokens_per_image:.1f} tokens on average"
    axes.set(xlabel="tokens", ylabel="images", title=f"{counted(report.images, 'image')}, {mean}")
    figure.savefig(path, dpi=120)


def draw_sample_sheet(
    folder: str, tokenizer: DynamicVisualTokenizer, *, images: int = 12, storage: StorageOptions | None = None
) -> Image.Image:
    """Returns a contact sheet of images spread over the output: originals, kept patches and reconstructions.

    The originals are read from the input.

    Raises `DataError` or `BatchError` where the input can't be found as it was, `FingerprintError` where the tokenizer
    is another one.
    """
    output = Output(folder, storage or {})
    description = read_description(output)
    written = description["tokenizer"]["fingerprint"]
    if written != tokenizer.fingerprint:
        raise FingerprintError(
            f"these codes were written by the tokenizer {written}, this one is {tokenizer.fingerprint}; load that one"
        )
    records = [(span, record) for span, record in read_records(output) if record.images and span.attempt == 0]
    wanted = -(-images // _PER_SHARD)
    spread = np.linspace(0, len(records) - 1, min(wanted, len(records))).astype(int)
    chosen = dict(records[i] for i in spread)
    if not chosen:
        raise BatchError("no image was tokenized, so there is nothing to draw")
    options = BatchOptions(**{**description["options"], "kind": description["input"]["kind"]})
    source = open_input(description["input"]["sources"], options, storage or {})
    pairs: list[tuple[Any, Encoding]] = []
    for shard in source.shards():
        for span, record in chosen.items():
            if span.shard == shard.index:
                found = _originals(source, shard, span, record, output, written)
                pairs += itertools.islice(found, min(_PER_SHARD, images - len(pairs)))
    if not pairs:
        raise BatchError("the originals were not found in the input; it may have moved or changed")
    originals, encodings = zip(*pairs, strict=True)
    return contact_sheet(
        tokenizer,
        originals,
        Encoding.cat(encodings, renumber=False),
        columns=2,
        fit=options.fit,
        max_patches=options.max_patches,
        size=options.size,
        decoding=options.decoding,
        max_pixels=options.max_pixels,
    )


def _originals(
    source: Input, shard: Shard, span: Range, record: Record, output: Output, fingerprint: str
) -> Iterator[tuple[Any, Encoding]]:
    """Returns the first images of an output shard, and their codes. Rows that share a key are left out."""
    *retried, block = (read_block(output, file, 0) for file in record.data_files)
    times = Counter(row.key for rows in (*retried, block) for row in rows)
    rows = {row.key: row for row in block if row.images and times[row.key] == 1}
    failed = {(row["place"], row["image"] or 0) for row in read_errors(output, span, record)}
    with source.open(shard, record.start) as reading:
        for place, sample in enumerate(itertools.islice(reading, record.rows)):
            present = [i for i, image in enumerate(sample.images) if image is not None and (place, i) not in failed]
            if present and sample.key in rows:
                image = source.fetch(sample).images[present[0]]
                if not isinstance(image, Broken):
                    yield image, packed(rows.pop(sample.key).images[:1], fingerprint)
