"""The rules of packed codes: what counts as integers, and how codes, positions, lengths and grids must fit together;
and which rows an index means.

Every breach raises `CodeError` and names the image where there is one. The class that obeys these rules is in `encoding.py`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dyntok.errors import CodeError, ImageError

MAX_GRID_SIDE = 4096  # patches; a grid from a stranger's file must not make keep_mask() ask for terabytes


def brief(value: Any) -> str:
    """A value for an error message, cut to 80 characters."""
    text = (
        f"[{', '.join(map(str, value[:8]))}{', ...' if len(value) > 8 else ''}]"
        if isinstance(value, list)
        else repr(value)
    )
    return text if len(text) <= 80 else text[:77] + "..."


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def integers(values: Tensor | Sequence[int], what: str) -> Tensor:
    """A one-dimensional int64 tensor of a list, array or tensor of integers; floats and bools are refused."""
    try:
        tensor = values if isinstance(values, Tensor) else torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CodeError(f"{what}: expected a list or tensor of integers, got {brief(values)} ({error})") from error
    if tensor.dim() != 1:
        raise CodeError(f"{what}: expected one dimension, got shape {tuple(tensor.shape)}")
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        raise CodeError(f"{what}: expected integers, got {tensor.dtype}")
    return tensor.to(torch.long)


def integer_rows(rows: Iterable[Tensor | Sequence[int]], what: str) -> list[Tensor]:
    """One int64 tensor per image; a flat list, which is one image's row, is refused."""
    rows = list(rows)
    if rows and all(isinstance(row, int | np.integer) or isinstance(row, Tensor) and row.dim() == 0 for row in rows):
        flat = brief([int(row) for row in rows])
        raise CodeError(
            f"{what} are one list of integers, expected a list of lists, one for each image; for a single image pass [{flat}]"
        )
    return [integers(row, f"{what} of image {i}") for i, row in enumerate(rows)]


def grid_pairs(grids: Any, images: int) -> Tensor:
    """int64 [B, 2] of one (rows, columns) pair per image, or of one pair for all."""
    given = grids if isinstance(grids, Tensor) or not isinstance(grids, Iterable) else list(grids)
    if (
        isinstance(given, Tensor)
        and given.dim() == 1
        or isinstance(given, list)
        and len(given) == 2
        and not hasattr(given[0], "__len__")
    ):
        given = [given] * images
    if not isinstance(given, list | Tensor) or isinstance(given, Tensor) and given.dim() == 0:
        raise CodeError(f"grids is {brief(grids)}, expected (rows, columns) for each image, or one such pair for all")
    rows = [integers(g, f"grid of image {i}") for i, g in enumerate(given)]
    for i, row in enumerate(rows):
        if len(row) != 2:
            raise CodeError(f"grid of image {i} has {counted(len(row), 'number')}, expected rows and columns")
    return torch.stack(rows) if rows else torch.empty(0, 2, dtype=torch.long)


def failure_pairs(pairs: Iterable[tuple[int, ImageError]]) -> tuple[tuple[int, ImageError], ...]:
    """A tuple of (input index, ImageError)."""
    pairs = tuple(pairs)
    for pair in pairs:
        if not (
            isinstance(pair, tuple)
            and len(pair) == 2
            and type(pair[0]) is int
            and pair[0] >= 0
            and isinstance(pair[1], ImageError)
        ):
            raise CodeError(f"failures holds {brief(pair)}, expected (input index of 0 or more, ImageError)")
    return pairs


def check_tensor(tensor: Any, name: str, dtype: torch.dtype, dims: int, device: torch.device | None = None) -> None:
    """Raises unless it is a tensor of that dtype, that many dimensions and that device."""
    if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tensor.dim() != dims:
        got = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise CodeError(f"{name} is {got}, expected a {dims}-D tensor of {dtype}; Encoding.pack makes one from lists")
    if device is not None and tensor.device != device:
        raise CodeError(f"{name} lies on {tensor.device} and the codes on {device}, expected one device")


def check_packed(codes: Tensor, positions: Tensor | None, cu_seqlens: Tensor, grids: Tensor) -> None:
    """The values of the four tensors, whose dtypes are right already, against each other."""
    bounds, images = cu_seqlens.tolist(), len(cu_seqlens) - 1
    if bounds[:1] != [0] or bounds[-1] != len(codes):
        raise CodeError(
            f"cu_seqlens is {brief(bounds)}, expected to begin with 0 and end with {len(codes)}, the number of codes"
        )
    if grids.shape != (images, 2):
        raise CodeError(f"grids has shape {list(grids.shape)}, expected [{images}, 2]: rows and columns for each image")
    if positions is not None and len(positions) != len(codes):
        raise CodeError(f"{len(codes)} codes have {len(positions)} positions, expected one for each")

    outside = ((grids < 1) | (grids > MAX_GRID_SIDE)).any(1)
    refuse(
        outside, lambda i: f"grid of image {i} is {grids[i].tolist()}, expected sides of 1 to {MAX_GRID_SIDE} patches"
    )
    lengths, patches = cu_seqlens.diff(), grids.prod(1)
    refuse(lengths < 1, lambda i: f"image {i} has {lengths[i]} tokens, expected at least one")
    refuse(lengths > patches, lambda i: f"image {i} has {lengths[i]} tokens, more than its {patches[i]} patches")

    image = image_of_token(cu_seqlens, len(codes))
    refuse(codes < 0, lambda t: f"image {image[t]} has code {codes[t]}, expected 0 or more")
    if positions is not None:
        outside = (positions < 0) | (positions >= patches[image])
        refuse(
            outside, lambda t: f"image {image[t]} has position {positions[t]}, expected 0 to {patches[image[t]] - 1}"
        )
        unordered = (positions.diff() <= 0) & (image.diff() == 0)
        refuse(
            unordered,
            lambda t: f"image {image[t]} has position {positions[t + 1]} after {positions[t]}; expected raster order",
        )


def image_of_token(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """int64 [T]: which image each token belongs to; every image has at least one."""
    # repeat_interleave says the same, but starts all threads for a handful of numbers: milliseconds on a busy machine.
    begins = torch.zeros(tokens, dtype=torch.long, device=cu_seqlens.device)
    begins[cu_seqlens[1:-1].long()] = 1
    return begins.cumsum(0)


def refuse(bad: Tensor, message: Callable[[int], str]) -> None:
    """Raises the message for the first index at which `bad`, bool [any], is True."""
    if bad.any():
        raise CodeError(message(int(bad.nonzero()[0, 0])))


def row_indices(index: Any, count: int) -> list[int]:
    """The rows, 0 to count - 1, that an int, slice, list or tensor of indices or mask of bools picks; IndexError where one is missing."""
    if isinstance(index, slice):
        return list(range(count))[index]
    items = (
        index.tolist() if hasattr(index, "tolist") else index
    )  # tensors and NumPy arrays become lists, their scalars ints
    items = [items] if type(items) is int else list(items) if isinstance(items, list | tuple) else [None]
    if items and all(type(i) is bool for i in items):
        if len(items) != count:
            raise CodeError(f"the mask has {len(items)} entries, expected one for each of {counted(count, 'image')}")
        return [i for i, wanted in enumerate(items) if wanted]
    if not all(type(i) is int for i in items):
        raise CodeError(
            f"can't index an Encoding with {brief(index)}; expected an int, a slice, a list of ints or a mask of bools"
        )
    for i in items:
        if not -count <= i < count:
            raise IndexError(f"there is no image {i} in an Encoding of {counted(count, 'image')}")
    return [i % count for i in items]


def json_rows(values: Any, what: str) -> list[list[int]]:
    """The same value, if it is a list of lists of integers as JSON brings them."""
    # torch.as_tensor would take [1, true] for integers, so the types are looked at one by one.
    if not isinstance(values, list):
        raise CodeError(f"{what} is {type(values).__name__}, expected a list of lists of integers")
    for i, row in enumerate(values):
        if not isinstance(row, list) or any(type(v) is not int for v in row):
            raise CodeError(f"{what}[{i}] is {brief(row)}, expected a list of integers")
    return values
