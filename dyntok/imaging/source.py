"""The bytes of an image from a path, a file object or bytes; and the name of a source in error messages.

Not here: URLs and globs. They are refused with the lines that do what was meant.
"""

import os
import re
import stat
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image

from dyntok.errors import ImageError, MissingImageError

MAX_FILE_BYTES = 2**28
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://|data:image/")


def is_single(images: object) -> bool:
    """Returns whether this is one image source and not an iterable of several."""
    if isinstance(images, torch.Tensor | np.ndarray):
        return images.ndim < 4
    # strings, bytes and open files can be iterated over, but not image by image
    alone = isinstance(images, str | bytes | bytearray | memoryview | os.PathLike | Image.Image)
    return alone or hasattr(images, "read") or not isinstance(images, Iterable)


def describe(source: Any) -> str:
    """Returns a short printable name for error messages: the path, or the kind and size of what was passed."""
    if isinstance(source, str | os.PathLike):
        return _printable(os.fsdecode(source))
    if isinstance(source, bytes | bytearray | memoryview):
        return f"<{type(source).__name__}, {memoryview(source).nbytes:,} bytes>"
    if isinstance(source, Image.Image):
        file = getattr(source, "filename", None)  # only images from Image.open have one, and those from streams have ""
        path = f" {_printable(os.fsdecode(file))}" if file else ""
        return f"<PIL {source.mode} {source.width}x{source.height}{path}>"
    if isinstance(source, np.ndarray):
        return f"<ndarray {source.dtype} {_printable(str(source.shape))}>"
    if isinstance(source, torch.Tensor):
        return f"<tensor {str(source.dtype).removeprefix('torch.')} {_printable(str(tuple(source.shape)))}>"
    return f"<{type(source).__name__}>"


def _printable(text: str, longest: int = 120) -> str:
    if len(text) > longest:
        text = "..." + text[3 - longest :]
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def read_bytes(source: Any, name: str) -> bytes | None:
    """Returns the content of a path, a file object or a buffer; None for any other kind of source.

    Raises `ImageError`.
    """
    if isinstance(source, str | os.PathLike):
        data = _read_file(source, name)
    elif isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
    elif callable(getattr(source, "read", None)) and not isinstance(source, Image.Image):
        data = source.read(MAX_FILE_BYTES + 1)
        if not isinstance(data, bytes | bytearray | memoryview):
            raise ImageError(
                f"{name}: read() gave {type(data).__name__}, expected bytes; open the file in binary mode ('rb')"
            )
        data = bytes(data)
    else:
        return None
    if not 0 < len(data) <= MAX_FILE_BYTES:
        rewind = "; seek(0) goes back to the start of a file object" if not data and hasattr(source, "read") else ""
        raise ImageError(f"{name}: has {len(data):,} bytes, expected 1 to {MAX_FILE_BYTES:,}{rewind}")
    return data


def _read_file(path: str | os.PathLike, name: str) -> bytes:
    def open_without_waiting(path: str, flags: int) -> int:
        return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a FIFO without a writer would block forever

    try:
        with open(path, "rb", opener=open_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ImageError(f"{name}: not a regular file; read it yourself and pass the bytes")
            return file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise _missing(os.fsdecode(path), name) from error
    except OSError as error:
        if os.path.isdir(path):
            raise ImageError(
                f"{name}: a folder (directory), expected an image file; pass its files, as in "
                "encode(sorted(pathlib.Path(folder).glob('*.jpg'))), or run: dyntok batch FOLDER OUTPUT"
            ) from error
        raise ImageError(f"{name}: can't read the file: {error.strerror or error}") from error


def _missing(path: str, name: str) -> ImageError:
    if _URL.match(path):
        return ImageError(
            f"{name}: a URL, expected a file; download it first: "
            "import urllib.request; image = urllib.request.urlopen(url).read(), then pass image"
        )
    if any(character in path for character in "*?["):
        return MissingImageError(
            f"{name}: No such file; to read the files that match a pattern, pass sorted(glob.glob(pattern))"
        )
    return MissingImageError(f"{name}: No such file; check the path and the working directory")


def from_array(array: np.ndarray, name: str) -> Image.Image:
    """Returns the image of a [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] array: uint8, or floating point in [0, 1]."""
    if not (array.ndim == 2 or array.ndim == 3 and array.shape[2] in (1, 3, 4)):
        raise ImageError(
            f"{name}: expected the shape [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]; one image at a time, channels last"
        )
    if np.issubdtype(array.dtype, np.floating):
        check_unit_range(float(array.min()), float(array.max()), name)
        array = (array.astype(np.float32) * 255).round().astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ImageError(f"{name}: expected uint8 with values 0 to 255, or floating point in [0, 1]; convert it first")
    return Image.fromarray(np.ascontiguousarray(array[:, :, 0] if array.shape[2:] == (1,) else array))


def from_tensor(tensor: torch.Tensor, name: str) -> Image.Image:
    """Returns the image of a [3, H, W] or [1, H, W] tensor: uint8, or floating point in [0, 1]."""
    if tensor.dtype != torch.uint8 and not tensor.is_floating_point():
        raise ImageError(f"{name}: expected uint8 with values 0 to 255 or floating point in [0, 1]")
    tensor = tensor.detach().cpu()
    if tensor.dtype != torch.uint8:
        low, high = tensor.aminmax()  # NaN if any value is
        check_unit_range(low.item(), high.item(), name)
        tensor = tensor.to(torch.float32).mul(255).round().to(torch.uint8)
    return from_array(tensor.permute(1, 2, 0).numpy(), name)


def check_unit_range(low: float, high: float, name: str) -> None:
    if not (low >= 0 and high <= 1):
        raise ImageError(
            f"{name}: values from {low:.4g} to {high:.4g}, expected [0, 1]; scale or clamp them (not normalized pixels)"
        )
