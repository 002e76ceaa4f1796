"""What every engine does to the rows of the input: `read`, `decode`, `encode`.

Not here: the queues and processes between these stages; each engine has its own.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import torch

from dyntok.addresses import redact
from dyntok.batch.engines.rows import (
    DecodedImage,
    Failure,
    KeyDigest,
    Range,
    RangeEnd,
    Row,
    RowChunk,
    SourceRow,
    TokenizedImage,
    Work,
)
from dyntok.batch.inputs.left_out import LeftOut
from dyntok.batch.inputs.samples import Broken, Input, Shard, ShardReader
from dyntok.batch.options import BatchOptions
from dyntok.batch.shapes import code_type, image_config, position_type
from dyntok.config import ImageConfig
from dyntok.errors import BatchError, ImageError
from dyntok.fitting import original
from dyntok.image import ImageSource, to_array
from dyntok.tokenizer import DynamicVisualTokenizer

Place: TypeAlias = tuple[int, int]  # row of a chunk, and image of that row

_CHUNK_BYTES = 2**26  # of undecoded images in a chunk, at most, unless a single one has more
_FETCH = -1  # in a place: reading the files of a row, before its first image
_NOTHING_REFUSED: Mapping[Place, str] = MappingProxyType({})


@dataclass(frozen=True)
class DecodeOptions:
    """How images are decoded."""

    image: ImageConfig
    max_pixels: int

    @classmethod
    def of(cls, tokenizer: DynamicVisualTokenizer, options: BatchOptions) -> "DecodeOptions":
        """Returns how a run decodes its images."""
        return cls(image_config(tokenizer, options), options.max_pixels)


def read(source: Input, work: Work, shard_size: int) -> Iterator[SourceRow | RangeEnd]:
    """Yields rows in order, and a `RangeEnd` after the last row of each range.

    Raises `BatchError` or `DataError` where the shard can't be read.
    """
    with source.open(work.shard, work.start) as reading:
        if work.retries:
            yield from _read_again(reading, work)
            return
        samples, start = iter(reading), work.start
        first = next(samples, None)
        number = work.number
        while number != work.stop:
            span, rows, end, left_out = Range(work.shard.index, number), 0, start, LeftOut()
            digest = KeyDigest()
            for sample in islice(chain([first] if first else [], samples), shard_size):
                left_out.merge(sample.left_out)
                digest.add(sample.key)
                yield SourceRow(span, rows, sample, _share(work.shard, end, sample.next))
                rows, end = rows + 1, sample.next
            first = next(samples, None)
            rest = 0.0
            if first is None:
                left_out.merge(reading.left_out)
                rest = _share(work.shard, end, work.shard.begin + work.shard.extent)
            yield RangeEnd(
                span,
                work.shard.identity,
                rows,
                start,
                end,
                last=first is None,
                types=dict(reading.types),
                share=rest,
                left_out=dict(left_out),
                digest=str(digest),
            )
            if first is None:
                return
            number, start = number + 1, end


def _share(shard: Shard, start: int, end: int) -> float:
    return max(end - start, 0) / max(shard.extent, 1)


def _read_again(reading: ShardReader, work: Work) -> Iterator[SourceRow | RangeEnd]:
    """Yields the rows to be tried again, and a `RangeEnd` for each range, which says where it is now."""
    samples, start = iter(reading), work.start
    for number, retry in enumerate(work.retries, work.number):
        span = Range(work.shard.index, number, retry.attempt)
        rows, found, end, before, now, damage = 0, 0, start, KeyDigest(), KeyDigest(), ""
        for place, sample in enumerate(samples if retry.last else islice(samples, retry.rows)):
            was = retry.keys.get(place, "")
            if was and sample.key != was:
                raise BatchError(
                    f"row {place} of {sample.source} is {sample.key!r} now and was {was!r}: "
                    "the input changed; run into a new folder"
                )
            found, end = found + 1, sample.next
            now.add(sample.key)
            if not sample.key and isinstance(sample.images[0], Broken):
                damage = sample.images[0].reason
            if retry.keys.get(place) != "" and place < retry.rows:
                before.add(sample.key)
            if place in retry.keys or place >= retry.rows:
                yield SourceRow(span, place, sample, 0.0)
                rows += 1
        as_many = found == retry.rows or (retry.broke_off and found >= retry.rows - 1)
        if not as_many or retry.digest not in ("", str(before)):
            changed = "holds other pictures, or in another order, than when this run began: only pictures that failed "
            reason = f": {damage}" if damage else f" {changed}may change; run into a new folder"
            raise BatchError(f"{redact(work.shard.address)}{reason}")
        if retry.keys or retry.digest:  # else nothing shows that the range has the same rows, and its record stays
            types = dict(reading.types)
            yield RangeEnd(
                span, work.shard.identity, rows, start, end, retry.last, types, digest=str(now), compared=not retry.keys
            )
        start = end


def chunked(rows: Iterable[SourceRow | RangeEnd], size: int) -> Iterator[RowChunk[SourceRow]]:
    """Yields chunks of at most `size` rows, and of fewer where images are large."""
    content = 0
    chunk: RowChunk[SourceRow] = RowChunk([])
    for row in rows:
        if isinstance(row, RangeEnd):
            chunk.ends.append(row)
            continue
        if len(chunk.rows) >= size or content >= _CHUNK_BYTES:
            yield chunk
            chunk, content = RowChunk([]), 0
        chunk.rows.append(row)
        content += sum(len(image) for image in row.sample.images if isinstance(image, bytes))
    if chunk.rows or chunk.ends:
        yield chunk


def decode(
    chunk: RowChunk[SourceRow],
    source: Input,
    options: DecodeOptions,
    refused: Mapping[Place, str] = _NOTHING_REFUSED,
    on_place: Callable[[Place], None] = lambda place: None,
) -> RowChunk[Row[DecodedImage]]:
    """Decodes every image; what can't be read becomes a failure of its row.

    refused: images that must not be touched, with the reason. on_place: called before each of the others.
    """

    def picture(image: Any, place: Place) -> DecodedImage | Failure | None:
        if image is None:
            return None
        if isinstance(image, Broken):
            return Failure(place[1], image.reason)
        if place in refused:
            return Failure(place[1], refused[place])
        on_place(place)
        try:
            return to_picture(image, options)
        except ImageError as error:
            return Failure(place[1], str(error))

    def decoded(row: SourceRow, number: int) -> Row[DecodedImage]:
        sample = row.sample
        if not sample.key and not any(isinstance(image, Broken) for image in sample.images):
            sample = replace(sample, images=[Broken("has no key: its key column is null or empty")])
        elif (number, _FETCH) in refused:
            sample = replace(sample, images=[Broken(refused[number, _FETCH]) for _ in sample.images])
        else:
            on_place((number, _FETCH))
            sample = source.fetch(sample)
        results = [picture(image, (number, i)) for i, image in enumerate(sample.images)]
        pictures = tuple(result if isinstance(result, DecodedImage) else None for result in results)
        failures = tuple(result for result in results if isinstance(result, Failure))
        return Row(row.range, row.place, row.share, sample.key, sample.source, sample.columns, pictures, failures)

    return RowChunk([decoded(row, number) for number, row in enumerate(chunk.rows)], chunk.ends)


def encode(
    chunk: RowChunk[Row[DecodedImage]], tokenizer: DynamicVisualTokenizer, options: BatchOptions
) -> RowChunk[Row[TokenizedImage]]:
    """Tokenizes every picture; one that the tokenizer refuses becomes a failure of its row."""
    results = iter(tokenize_pictures([image for row in chunk.rows for image in row.present], tokenizer, options))

    def encoded(row: Row[DecodedImage]) -> Row[TokenizedImage]:
        images: list[TokenizedImage | None] = []
        failures = list(row.failures)
        for i, picture in enumerate(row.images):
            result = None if picture is None else next(results)
            if isinstance(result, ImageError):
                failures.append(Failure(i, str(result)))
            images.append(result if isinstance(result, TokenizedImage) else None)
        untyped: Any = row  # `replace` can't change the type of a row
        failed = tuple(sorted(failures, key=lambda failure: failure.image))
        return replace(untyped, images=tuple(images), failures=failed)

    return RowChunk([encoded(row) for row in chunk.rows], chunk.ends)


def to_picture(image: ImageSource, options: DecodeOptions) -> DecodedImage:
    """Returns an image as the tokenizer sees it. Raises `ImageError`."""
    array, size = to_array(image, options.image, max_pixels=options.max_pixels)
    return DecodedImage(array, size, original(*size, options.image).crop_box)


def tokenize_pictures(
    pictures: Sequence[DecodedImage], tokenizer: DynamicVisualTokenizer, options: BatchOptions
) -> list[TokenizedImage | ImageError]:
    """Returns a result for each picture, or the error that the tokenizer has for it.

    Pictures of one shape go through the network together; nothing is padded.
    """
    numbers: dict[tuple[int, ...], list[int]] = {}  # of the pictures of each shape
    for number, picture in enumerate(pictures):
        numbers.setdefault(picture.array.shape, []).append(number)
    results: dict[int, TokenizedImage | ImageError] = {}
    for group in numbers.values():
        found = _tokenize_group([pictures[number] for number in group], tokenizer, options)
        results.update(zip(group, found, strict=True))
    return [results[number] for number in range(len(pictures))]


def _tokenize_group(
    pictures: Sequence[DecodedImage], tokenizer: DynamicVisualTokenizer, options: BatchOptions
) -> list[TokenizedImage | ImageError]:
    """Returns the results of pictures of one shape."""
    height, width, _ = pictures[0].array.shape
    rows, columns = height // tokenizer.backbone.patch_size, width // tokenizer.backbone.patch_size
    if isinstance(options.budget, int) and options.budget > rows * columns:
        reason = f"budget is {options.budget} tokens, but the picture's grid of {rows} x {columns} has fewer patches"
        return [ImageError(reason) for _ in pictures]
    pixels = torch.from_numpy(np.stack([picture.array for picture in pictures])).permute(0, 3, 1, 2)
    encoding = tokenizer.encode_tensor(
        pixels,
        batch_size=len(pictures),
        errors="skip",
        policy=options.policy,
        margins=options.margins,
        refine=options.refine,
    ).to("cpu")
    results: dict[int, TokenizedImage | ImageError] = {
        index: ImageError(str(error).removeprefix(f"input {index}: ")) for index, error in encoding.failures
    }
    types = code_type(tokenizer), position_type(tokenizer, options)
    tokens = zip(encoding.source_index.tolist(), encoding.codes, encoding.positions or (), strict=True)
    for place, (index, codes, positions) in enumerate(tokens):
        margins = None if encoding.margins is None else tuple(encoding.margins[place].tolist())
        values = codes.numpy().astype(types[0]), positions.numpy().astype(types[1])
        picture = pictures[index]
        results[index] = TokenizedImage(*values, (rows, columns), picture.size, picture.crop_box, margins)
    return [results[index] for index in range(len(pictures))]
