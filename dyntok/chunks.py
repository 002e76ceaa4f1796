"""Inputs of a call in chunks for the network, and its results image by image.

Not here: the network itself, and the way the results become an `Encoding` or `Features` (`tokenizer.py`).
"""

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dyntok.ahead import in_order
from dyntok.config import ImageConfig
from dyntok.device import integers_on
from dyntok.errors import ImageError
from dyntok.fitting import original
from dyntok.image import ImageSource, is_single, to_array
from dyntok.original import Original
from dyntok.ragged import cu_seqlens_from_lengths
from dyntok.structure import require_integer

_MAX_WAITING = 256  # images of different shapes
_CHECKED_TOGETHER = 32  # chunks: an error is raised so much later, at most
Failures = list[tuple[int, ImageError]]  # input index and error
Originals = dict[int, Original]  # by input index


@dataclass(frozen=True)
class Chunk:
    """Images that go through the network together.

    input_indices: the index of each among all inputs of the call. pixels: normalized, float [B, 3, H, W], or uint8 of
    that shape, which the network normalizes on its device.
    """

    input_indices: Sequence[int]
    pixels: Tensor


@dataclass(frozen=True)
class Rows:
    """What the network made of a chunk.

    values: one row per kept patch, codes [T] or tokens [T, D]. positions: of these patches, int64 [T]. lengths: the
    number of kept patches of each image. finite: bool [B], False where a number on the way to an image's rows was NaN
    or infinite. grid: (rows, columns) of all images of the chunk.
    """

    input_indices: Sequence[int]
    values: Tensor
    positions: Tensor
    lengths: Sequence[int]
    finite: Tensor
    grid: tuple[int, int]
    margins: Tensor | None = None  # float32 [B, 2], where they were asked for; see `Encoding`


def load_chunks(
    images: ImageSource | Iterable[ImageSource],
    config: ImageConfig,
    size: int,
    *,
    max_pixels: int,
    failures: Failures | None = None,
    originals: Originals | None = None,
    workers: int = 0,
) -> Iterator[Chunk]:
    """Yields chunks of at most `size` readable images of one shape, uint8. Images of one shape stay in order.

    What was read is added to `originals`. Errors are added to `failures`, or raised where that is None.
    workers: threads that decode ahead.

    Raises `ConfigError` on a limit that is no positive integer: with it, every picture would be a failure.
    """
    require_integer("max_pixels", max_pixels, 1)
    single = is_single(images)

    def read(index: int, image: Any) -> tuple[np.ndarray, Original]:
        try:
            array, (width, height) = to_array(image, config, max_pixels=max_pixels)
            return array, original(width, height, config)
        except ImageError as error:
            if failures is not None or single or isinstance(image, str | os.PathLike):  # it names the file already
                raise
            raise ImageError(f"input {index}: {error}") from error

    def readable() -> Iterator[tuple[int, np.ndarray]]:
        sources: Iterable[Any] = [images] if single else images  # type: ignore[assignment]  # see is_single
        for index, result in enumerate(in_order(sources, read, workers, size + 2 * workers)):
            try:
                array, known = result()
            except ImageError as error:
                if failures is None:
                    raise
                failures.append((index, error))
                continue
            if originals is not None:
                originals[index] = known
            yield index, array

    waiting: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}  # by shape, fewer than `size` of each
    for index, pixels in readable():
        group = waiting.setdefault(pixels.shape, [])
        group.append((index, pixels))
        if len(group) == size or sum(map(len, waiting.values())) > _MAX_WAITING:
            fullest = max(waiting, key=lambda shape: len(waiting[shape]))
            yield _stack(waiting.pop(fullest))
    for group in waiting.values():
        yield _stack(group)


def _stack(group: Sequence[tuple[int, np.ndarray]]) -> Chunk:
    indices, arrays = zip(*group, strict=True)
    return Chunk(indices, torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2))


def join_images(parts: Sequence[Rows], nothing: Tensor) -> tuple[list[int], Tensor, Tensor, Tensor, Tensor]:
    """Returns input indices, rows [T, ...], positions [T], cu_seqlens [B+1] and grids [B, 2], images in input order.

    nothing: rows [0, ...] in the dtype and on the device of all others.
    """
    images = []
    for part in parts:
        values, positions = (packed.split(list(part.lengths)) for packed in (part.values, part.positions))
        rows = zip(part.input_indices, values, positions, part.lengths, strict=True)
        images += [(*row, part.grid) for row in rows]
    images.sort(key=lambda image: image[0])
    device = nothing.device
    none = torch.empty(0, dtype=torch.long, device=device)
    return (
        [image[0] for image in images],
        torch.cat([nothing, *(image[1] for image in images)]),
        torch.cat([none, *(image[2] for image in images)]),
        cu_seqlens_from_lengths(integers_on(device, [image[3] for image in images])),
        integers_on(device, [image[4] for image in images]).view(-1, 2),
    )


def join_margins(parts: Sequence[Rows], device: torch.device) -> Tensor:
    """Returns the margins of all parts, float32 [B, 2], images in input order."""
    margins = [part.margins for part in parts if part.margins is not None]
    indices = [index for part in parts for index in part.input_indices]
    order = integers_on(device, sorted(range(len(indices)), key=indices.__getitem__))
    return torch.cat([torch.empty(0, 2, dtype=torch.float32, device=device), *margins])[order]


def split_chunks(pixels: Tensor, size: int) -> Iterator[Chunk]:
    """Yields chunks of at most `size` images of pixels [B, 3, H, W]."""
    for start in range(0, len(pixels), size):
        part = pixels[start : start + size]
        # a copy with one layout and alignment: both may change how a kernel rounds
        yield Chunk(range(start, start + len(part)), part.clone(memory_format=torch.contiguous_format))


def limited(chunk: Chunk, pixels: int) -> Iterator[Chunk]:
    """Yields the chunk in parts of at most so many pixels, or of one image."""
    size = max(1, pixels // math.prod(chunk.pixels.shape[2:]))
    for start in range(0, len(chunk.pixels), size):
        yield Chunk(chunk.input_indices[start : start + size], chunk.pixels[start : start + size])


def finite_images(features: Tensor, log_probs: Tensor, vectors: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Returns bool [B]: whether every number of an image is finite. The host does not wait for the device.

    features: [B, N, D]. log_probs: [B, N, 2]. vectors: [T, C] with cu_seqlens int32 [B+1].
    """
    # a sum is not finite where one of its terms is not; float32 holds the sums of half-precision numbers
    sums = features.flatten(1).sum(1, dtype=torch.float32) + log_probs.flatten(1).sum(1, dtype=torch.float32)
    bad = ~vectors.flatten(1).sum(1, dtype=torch.float32).isfinite()  # [T]
    bad_before = torch.nn.functional.pad(bad.long().cumsum(0), (1, 0))  # [T + 1]
    return sums.isfinite() & (bad_before[cu_seqlens.long()].diff() == 0)


def without_failures(rows: Iterable[Rows], dtype: torch.dtype, failures: Failures | None = None) -> Iterator[Rows]:
    """Yields the rows of images whose numbers are finite.

    The other images are added to `failures`, or raised where that is None.

    The host reads the results of many chunks at once, so that the device seldom waits for it.
    """
    for chunks in batched(rows, _CHECKED_TOGETHER):
        finite = iter(torch.cat([chunk.finite for chunk in chunks]).tolist())
        for chunk in chunks:
            yield _checked(chunk, list(itertools.islice(finite, len(chunk.finite))), dtype, failures)


def _checked(rows: Rows, finite: list[bool], dtype: torch.dtype, failures: Failures | None) -> Rows:
    if all(finite):
        return rows
    for index, fine in zip(rows.input_indices, finite, strict=True):
        if not fine:
            error = ImageError(f"input {index}: {_not_finite(dtype)}")
            if failures is None:
                raise error
            failures.append((index, error))
    left = [row for row, fine in enumerate(finite) if fine]
    values, positions = (
        torch.cat([packed[:0], *(packed.split(list(rows.lengths))[row] for row in left)])
        for packed in (rows.values, rows.positions)
    )
    indices, lengths = ([numbers[row] for row in left] for numbers in (rows.input_indices, rows.lengths))
    margins = None if rows.margins is None else rows.margins[rows.finite]
    return Rows(indices, values, positions, lengths, rows.finite[rows.finite], rows.grid, margins)


def require_finite(decoded: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns what a decoder computed. Raises `ImageError` where a number of it is NaN or infinite."""
    if not decoded.sum(dtype=torch.float32).isfinite():
        raise ImageError(_not_finite(dtype))
    return decoded


def _not_finite(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    advice = "check the weights and the pixels"
    if dtype == torch.float16:
        advice = "load the tokenizer in bf16 or fp32 (dtype=torch.bfloat16 or torch.float32, --dtype bf16 or fp32)"
    elif dtype == torch.bfloat16:
        advice = "load the tokenizer in fp32 (dtype=torch.float32, --dtype fp32)"
    return f"the network computed NaN or infinite values in {name}, expected finite ones; {advice}"


def batched(items: Iterable, size: int) -> Iterator[tuple]:
    """Yields tuples of `size` items; the last one may be shorter."""
    items = iter(items)
    while chunk := tuple(itertools.islice(items, size)):
        yield chunk
