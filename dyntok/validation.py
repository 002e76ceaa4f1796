"""Checks of values that come from callers, files and language models, and the wording that their messages share.

A check raises `CodeError`, says what came and what was expected, and names the image where
there is one. Packing itself is in `ragged.py`; the class that these checks protect is in `encoding.py`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dyntok.errors import CodeError, ImageError
from dyntok.ragged import image_of_token
from dyntok.structure import brief

MAX_GRID_SIDE = 4096  # patches; a grid from an untrusted file must not make keep_mask() allocate terabytes


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun: "1 image", "2 images"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def refuse(bad: Tensor, message: Callable[[int], str]) -> None:
    """Raise `CodeError` with the message for the first index at which `bad`, a bool vector, is True."""
    if bad.any():
        raise CodeError(message(int(bad.nonzero()[0, 0])))


def integers(values: Tensor | Sequence[int], what: str) -> Tensor:
    """Returns a list, array or tensor of integers as int64 [T]. Floats and bools are refused."""
    try:
        tensor = values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CodeError(f"{what}: expected a list or tensor of integers, got {brief(values)} ({error})") from error
    if tensor.dim() != 1:
        raise CodeError(f"{what}: expected one dimension, got shape {tuple(tensor.shape)}")
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        raise CodeError(f"{what}: expected integers, got {tensor.dtype}")
    return tensor.to(torch.long)


def as_list(values: Any, what: str, expected: str) -> list:
    """Returns several values as a list. Raises `CodeError` on what holds none."""
    if not isinstance(values, Iterable) or isinstance(values, str | bytes):
        raise CodeError(f"{what} is {brief(values)}, expected {expected}")
    return list(values)


def integer_rows(rows: Iterable[Tensor | Sequence[int]], what: str) -> list[Tensor]:
    """Returns one int64 tensor per image. A flat list is refused, because it is the row of a single image."""
    rows = as_list(rows, what, "one list per image")
    if rows and all(_is_scalar(row) for row in rows):
        flat = brief([int(row) for row in rows])
        raise CodeError(
            f"{what} are one list of integers, expected one list per image; for a single image pass [{flat}]"
        )
    return [integers(row, f"{what} of image {i}") for i, row in enumerate(rows)]


def _is_scalar(value: Any) -> bool:
    return isinstance(value, int | np.integer) or (isinstance(value, Tensor) and value.dim() == 0)


def grid_pairs(grids: Any, images: int) -> Tensor:
    """Returns int64 [B, 2] of one (rows, columns) pair per image, or of one pair for all images."""
    given = grids if isinstance(grids, Tensor) or not isinstance(grids, Iterable) else list(grids)
    if _is_one_pair(given):
        given = [given] * images
    if not isinstance(given, list | Tensor) or (isinstance(given, Tensor) and given.dim() == 0):
        raise CodeError(f"grids is {brief(grids)}, expected (rows, columns) for each image, or one such pair for all")
    rows = [integers(grid, f"grid of image {i}") for i, grid in enumerate(given)]
    for i, row in enumerate(rows):
        if len(row) != 2:
            raise CodeError(f"grid of image {i} has {counted(len(row), 'number')}, expected rows and columns")
    return torch.stack(rows) if rows else torch.empty(0, 2, dtype=torch.long, device="cpu")


def _is_one_pair(grids: Any) -> bool:
    if isinstance(grids, Tensor):
        return grids.dim() == 1
    return isinstance(grids, list) and len(grids) == 2 and not hasattr(grids[0], "__len__")


def failure_pairs(pairs: Iterable[tuple[int, ImageError]]) -> tuple[tuple[int, ImageError], ...]:
    """Returns the pairs as a tuple, once each is known to be (input index, ImageError)."""
    pairs = tuple(as_list(pairs, "failures", "pairs of an input index and an ImageError"))
    for pair in pairs:
        fits = isinstance(pair, tuple) and len(pair) == 2 and type(pair[0]) is int and isinstance(pair[1], ImageError)
        if not fits or pair[0] < 0:
            raise CodeError(f"failures holds {brief(pair)}, expected (input index of 0 or more, ImageError)")
    return pairs


def json_rows(values: Any, what: str) -> list[list[int]]:
    """Returns the value unchanged, once it is known to be a list of lists of integers, as JSON delivers them."""
    # torch.as_tensor would accept [1, true] as integers, so every type is checked here.
    if not isinstance(values, list):
        raise CodeError(f"{what} is {type(values).__name__}, expected a list of lists of integers")
    for i, row in enumerate(values):
        if not isinstance(row, list) or any(type(v) is not int for v in row):
            raise CodeError(f"{what}[{i}] is {brief(row)}, expected a list of integers")
    return values


def row_indices(index: Any, count: int) -> list[int]:
    """Returns the rows, 0 to count - 1, that an int, a slice, a list or tensor of indices, or a mask of bools selects.

    Raises `IndexError` on a row that does not exist and `CodeError` on anything that is not an index.
    """
    if isinstance(index, slice):
        return list(range(count))[index]
    index = index.tolist() if hasattr(index, "tolist") else index  # of tensors and NumPy arrays
    items = index if isinstance(index, list | tuple) else [index]
    if items and all(type(i) is bool for i in items):
        if len(items) != count:
            raise CodeError(f"the mask has {len(items)} entries, expected one for each of {counted(count, 'image')}")
        return [i for i, chosen in enumerate(items) if chosen]
    for i in items:
        if type(i) is not int:
            raise _not_an_index(index)
        if not -count <= i < count:
            raise IndexError(f"there is no image {i} in an Encoding of {counted(count, 'image')}")
    return [i % count for i in items]


def _not_an_index(index: Any) -> CodeError:
    expected = "an int, a slice, a list of ints or a mask of bools"
    return CodeError(f"can't index an Encoding with {brief(index)}; expected {expected}")


def check_tensor(tensor: Any, name: str, dtype: torch.dtype, dims: int, device: torch.device | None = None) -> None:
    """Raise `CodeError` unless the value is a tensor of this dtype, number of dimensions and device."""
    if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tensor.dim() != dims:
        got = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise CodeError(f"{name} is {got}, expected a {dims}-D tensor of {dtype}; Encoding.pack makes one from lists")
    if device is not None and tensor.device != device:
        raise CodeError(f"{name} is on {tensor.device} and the codes are on {device}, expected one device")


def check_computed(codes: Tensor, cu_seqlens: Tensor, source_index: Tensor) -> None:
    """Raise `ImageError` on a code of -1, which the network gives images whose numbers are not finite."""
    if not codes.is_meta and (codes < 0).any():
        image = image_of_token(cu_seqlens, len(codes))[int((codes < 0).nonzero()[0, 0])]
        raise ImageError(
            f"input {source_index[image]}: the network computed NaN or infinite values, expected finite ones; "
            "check the weights and the pixels, or load the tokenizer in fp32 (dtype=torch.float32, --dtype fp32)"
        )


def check_packed(codes: Tensor, positions: Tensor | None, cu_seqlens: Tensor, grids: Tensor) -> None:
    """Raise `CodeError` unless the values of the four tensors agree. Their dtypes must have been checked before."""
    bounds, images = cu_seqlens.tolist(), len(cu_seqlens) - 1
    if bounds[:1] != [0] or bounds[-1] != len(codes):
        expected = f"expected to begin with 0 and end with {len(codes)}, the number of codes"
        raise CodeError(f"cu_seqlens is {brief(bounds)}, {expected}")
    if grids.shape != (images, 2):
        raise CodeError(f"grids has shape {list(grids.shape)}, expected [{images}, 2]: rows and columns for each image")
    if positions is not None and len(positions) != len(codes):
        raise CodeError(f"{len(codes)} codes have {len(positions)} positions, expected one for each")

    sides = f"expected sides of 1 to {MAX_GRID_SIDE} patches"
    too_large = ((grids < 1) | (grids > MAX_GRID_SIDE)).any(1)
    refuse(too_large, lambda i: f"grid of image {i} is {grids[i].tolist()}, {sides}")
    lengths, patches = cu_seqlens.diff(), grids.prod(1)
    refuse(lengths < 1, lambda i: f"image {i} has {lengths[i]} tokens, expected at least one")
    refuse(lengths > patches, lambda i: f"image {i} has {lengths[i]} tokens, more than its {patches[i]} patches")

    image = image_of_token(cu_seqlens, len(codes))
    refuse(codes < 0, lambda t: f"image {image[t]} has code {codes[t]}, expected 0 or more")
    if positions is not None:
        _check_positions(positions, image, patches)


def _check_positions(positions: Tensor, image: Tensor, patches: Tensor) -> None:
    outside = (positions < 0) | (positions >= patches[image])
    unordered = (positions.diff() <= 0) & (image.diff() == 0)
    refuse(outside, lambda t: f"image {image[t]} has position {positions[t]}, expected 0 to {patches[image[t]] - 1}")
    refuse(
        unordered,
        lambda t: f"image {image[t]} has position {positions[t + 1]} after {positions[t]}; expected raster order",
    )
