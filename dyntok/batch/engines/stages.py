"""What both engines do to every row, stage by stage: `read`, `decode`, `encode`. Queues between them are the engines' own."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

import numpy as np
import pyarrow as pa

from dyntok.batch.inputs.names import LeftOut
from dyntok.batch.inputs.samples import Broken, Input, InputSample, Shard
from dyntok.batch.options import BatchOptions
from dyntok.config import ImageConfig
from dyntok.errors import BatchError, ImageError
from dyntok.image import normalized, to_array
from dyntok.tokenizer import DynamicVisualTokenizer

_BATCH_BYTES = 2**26  # of undecoded images in a batch, at most, unless a single one has more


@dataclass(frozen=True)
class Range:
    """Consecutive rows of an input shard, which become one output shard."""

    shard: int  # index of the input shard
    number: int  # in the input shard
    attempt: int = 0  # above 0: rows that failed before and are tried again

    @property
    def name(self) -> str:
        return f"{self.shard:06d}-{self.number:06d}" + f"-retry{self.attempt}" * bool(self.attempt)


@dataclass(frozen=True)
class Work:
    """What is to be read of an input shard."""

    shard: Shard
    number: int  # of the first range
    start: int  # where that begins
    stop: int | None = None  # the number of the first range that is not wanted; None: to the end of the shard
    retry: "Retry | None" = None  # of one range, only some rows


@dataclass(frozen=True)
class Retry:
    attempt: int
    keys: dict[int, str]  # of the rows that failed, by their place in the range
    rows: int  # of the range
    last: bool  # of its input shard: what stands behind it now was out of reach before


@dataclass(frozen=True)
class Item:
    """One row on its way. Its images are what the last stage made of them: sources, then `Picture`, then `Tokens`; or Broken, or None."""

    range: Range
    place: int  # in the range
    sample: InputSample


@dataclass(frozen=True)
class End:
    """Comes behind the last row of a range (in an engine that keeps order)."""

    range: Range
    shard: dict[str, Any]  # identity of the input shard
    rows: int  # of this range
    start: int
    next: int
    last: bool  # range of its input shard
    types: dict[str, pa.DataType]  # of the extra columns
    share: float  # of the input shard
    left_out: dict[str, int] = field(default_factory=dict)  # files of the input, by suffix


@dataclass(frozen=True)
class Picture:
    array: np.ndarray  # uint8 [S, S, 3]
    size: tuple[int, int]  # width and height of the original


@dataclass(frozen=True)
class Tokens:
    codes: np.ndarray  # [T], the narrowest unsigned type that holds every code
    positions: np.ndarray  # [T], the narrowest that holds every position
    grid: tuple[int, int]
    size: tuple[int, int]


def read(source: Input, work: Work, shard_size: int) -> Iterator[Item | End]:
    """Rows and ends of ranges, in order. Raises `BatchError` or `DataError` where the shard can't be read."""
    with source.open(work.shard, work.start) as reading:
        if work.retry is not None:
            yield from _read_again(reading, work)
            return
        samples, start = iter(reading), work.start
        first = next(samples, None)
        number = work.number
        while number != work.stop:
            span, rows, behind, left_out = Range(work.shard.index, number), 0, start, LeftOut()
            for sample in islice(chain([first] if first else [], samples), shard_size):
                yield Item(span, rows, sample)
                rows, behind = rows + 1, sample.next
                left_out.merge(sample.left_out)
            first = next(samples, None)
            if first is None:
                left_out.merge(reading.left_out)
            reached = work.shard.begin + work.shard.extent if first is None else behind
            share = max(reached - start, 0) / max(work.shard.extent, 1)
            types = dict(reading.types)
            yield End(span, work.shard.identity, rows, start, behind, first is None, types, share, dict(left_out))
            if first is None:
                return
            number, start = number + 1, behind


def _read_again(reading: Any, work: Work) -> Iterator[Item | End]:
    retry, span = work.retry, Range(work.shard.index, work.number, work.retry.attempt)
    rows = 0
    for place, sample in enumerate(reading):
        if place >= retry.rows and not retry.last:
            break
        if place in retry.keys or place >= retry.rows:
            before = retry.keys.get(place, "")
            if before and sample.key != before:
                raise BatchError(
                    f"row {place} of {sample.source} is {sample.key!r} now and was {before!r}: the input changed; run into a new folder"
                )
            yield Item(span, place, sample)
            rows += 1
    yield End(span, work.shard.identity, rows, work.start, work.start, retry.last, dict(reading.types), 0.0)


def batches(rows: Iterable[Item | End], size: int) -> Iterator[list[Item | End]]:
    """Of at most `size` rows, and fewer where images are large."""
    batch, bytes_, count = [], 0, 0
    for row in rows:
        batch.append(row)
        if isinstance(row, Item):
            count += 1
            bytes_ += sum(len(image) for image in row.sample.images if isinstance(image, bytes))
        if count >= size or bytes_ >= _BATCH_BYTES:
            yield batch
            batch, bytes_, count = [], 0, 0
    if batch:
        yield batch


def decode(rows: Sequence[Item | End], source: Input, config: ImageConfig, max_pixels: int) -> list[Item | End]:
    """Sources become pictures of the tokenizer's size; what can't be read becomes a Broken."""

    def picture(image: Any) -> Any:
        if image is None or isinstance(image, Broken):
            return image
        try:
            return Picture(*to_array(image, config, max_pixels=max_pixels))
        except ImageError as error:
            return Broken(str(error))

    def decoded(item: Item) -> Item:
        if not item.sample.key and not any(isinstance(image, Broken) for image in item.sample.images):
            return replace(
                item, sample=replace(item.sample, images=[Broken("has no key: its key column is null or empty")])
            )
        sample = source.fetch(item.sample)
        return replace(item, sample=replace(sample, images=[picture(image) for image in sample.images]))

    return [decoded(row) if isinstance(row, Item) else row for row in rows]


def encode(rows: Sequence[Item | End], tokenizer: DynamicVisualTokenizer, options: BatchOptions) -> list[Item | End]:
    """Pictures become tokens."""
    pictures = [
        image for row in rows if isinstance(row, Item) for image in row.sample.images if isinstance(image, Picture)
    ]
    tokens = iter(tokens_of(pictures, tokenizer, options))

    def encoded(item: Item) -> Item:
        images = [next(tokens) if isinstance(image, Picture) else image for image in item.sample.images]
        return replace(item, sample=replace(item.sample, images=images))

    return [encoded(row) if isinstance(row, Item) else row for row in rows]


def tokens_of(
    pictures: Sequence[Picture], tokenizer: DynamicVisualTokenizer, options: BatchOptions
) -> Iterator[Tokens]:
    if not pictures:
        return
    pixels = normalized(np.stack([picture.array for picture in pictures]), tokenizer.config.image)
    encoding = tokenizer.encode_tensor(pixels, batch_size=len(pictures), **options.policy).to("cpu")
    kinds = narrowest(tokenizer.config.codebook.size), narrowest(tokenizer.grid[0] * tokenizer.grid[1])
    for picture, codes, positions, grid in zip(
        pictures, encoding.codes, encoding.positions, encoding.grids.tolist(), strict=True
    ):
        yield Tokens(codes.numpy().astype(kinds[0]), positions.numpy().astype(kinds[1]), tuple(grid), picture.size)


def narrowest(count: int) -> np.dtype:
    """Of the unsigned types, the first that holds `count` different values from 0."""
    return next(np.dtype(name) for name in ("uint8", "uint16", "uint32") if count - 1 <= np.iinfo(name).max)
