"""Any kind of picture to normalized pixels and back, safely: path, bytes, PIL image, ndarray or tensor in, float tensor out.

Does: read, check against limits before decoding, decode, turn upright, bring to 8-bit RGB, resize, normalise. Every source takes this one
path, so the same picture gives the same pixels however it came. Whatever goes wrong is an `ImageError` that names the source.
Does not: fetch URLs, read formats outside `ACCEPTED_FORMATS`, apply ICC profiles, or read more than one frame.
"""

import io
import logging
import os
import stat
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from dyntok.config import ImageConfig
from dyntok.errors import ImageError
from dyntok.imaging.formats import ACCEPTED_FORMATS as ACCEPTED_FORMATS
from dyntok.imaging.formats import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from dyntok.imaging.formats import UNREADABLE_SUFFIXES as UNREADABLE_SUFFIXES
from dyntok.imaging.formats import sniff as sniff

ImageSource: TypeAlias = str | os.PathLike | bytes | Image.Image | np.ndarray | torch.Tensor

# Reading takes up to 16 bytes per pixel (WebP, AVIF), so these limits keep one file below 2 GB, the half of one for PyTorch included.
# 2**26 lets 61-megapixel cameras in and lies below the size at which Pillow itself begins to warn.
DEFAULT_MAX_PIXELS = 2**26
MAX_FILE_BYTES = 2**28
MAX_SIDE = 2**20  # Pillow's resize needs 32 bytes of filter weights per pixel of a side

_LAZY_FORMATS = (
    *ACCEPTED_FORMATS,
    "MPO",
)  # a JPEG with further pictures behind the first; Pillow's JPEG reader gives it this name
_PHOTOMETRIC_TAG, _WHITE_IS_ZERO = 262, 0  # TIFF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

logging.getLogger("PIL").addHandler(
    logging.NullHandler()
)  # else what Pillow logs about broken files lands on a bare stderr


def load_image(source: ImageSource, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """A new, upright 8-bit RGB image.

    * path: a regular file of at most `MAX_FILE_BYTES`; bytes: the content of such a file, in one of `ACCEPTED_FORMATS`
    * PIL image: any mode, its current frame; one that is not decoded yet meets the same limits as a file
    * ndarray: uint8 [H, W], [H, W, 1], [H, W, 3] (RGB) or [H, W, 4] (RGBA)
    * tensor: [3, H, W], uint8 or floating point in [0, 1] (rounded to 8 bits), on any device

    The EXIF orientation is applied, transparency composited on white, and of an animation the first frame is taken. Mode I;16 is scaled
    from 0..65535. Modes I and F do not say what white is: up to 1 (F only), 255 or 65535, the first that holds every value, is taken
    for it; other values are refused. `max_pixels` is checked before decoding (Pillow has a limit of its own on files,
    twice `PIL.Image.MAX_IMAGE_PIXELS`). Raises `ImageError`.
    """
    with _failures_named(source) as name:
        image = _load(source, name, max_pixels)
        return image.copy() if image is source else image


def to_pixels(source: ImageSource, config: ImageConfig, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> torch.Tensor:
    """Normalised pixels [3, S, S], float32: (value / 255 - mean) / std. Sources and errors as in `load_image`.

    Resized in 8 bits with Pillow's antialiased bicubic filter: `crop` scales the central square, `squash` the whole picture.
    """
    return normalized(to_array(source, config, max_pixels=max_pixels)[0], config)


def to_array(
    source: ImageSource, config: ImageConfig, *, max_pixels: int = DEFAULT_MAX_PIXELS
) -> tuple[np.ndarray, tuple[int, int]]:
    """The first half of `to_pixels`: the resized picture, uint8 [S, S, 3]; and (width, height) of the upright original."""
    with _failures_named(source) as name:
        image = _load(source, name, max_pixels)
        return np.asarray(_resize(image, config)), image.size


def normalized(array: np.ndarray, config: ImageConfig) -> torch.Tensor:
    """The second half of `to_pixels`: uint8 [..., S, S, 3] to float32 [..., 3, S, S]."""
    pixels = np.moveaxis(array, -1, -3).astype(np.float32, order="C")  # NumPy, since torch would start threads
    pixels /= 255
    pixels -= _per_channel(config.mean).numpy()
    pixels /= _per_channel(config.std).numpy()
    return torch.from_numpy(pixels)


def to_image(pixels: torch.Tensor, config: ImageConfig) -> Image.Image:
    """The RGB image of normalized pixels [3, H, W], clamped and rounded to 8 bits; undoes the normalisation of `to_pixels`."""
    name = describe(pixels)
    if pixels.ndim != 3 or pixels.shape[0] != 3 or not pixels.is_floating_point() or 0 in pixels.shape:
        raise ImageError(f"{name}: expected normalized floating-point pixels [3, H, W]")
    values = pixels.detach().cpu().to(torch.float32)
    if not values.isfinite().all():
        raise ImageError(f"{name}: holds NaN or infinite values, expected finite ones")
    values = values * _per_channel(config.std) + _per_channel(config.mean)
    return Image.fromarray(values.clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def is_single(images: object) -> bool:
    """Whether it is one source, and not an iterable of several."""
    if isinstance(images, torch.Tensor | np.ndarray):
        return images.ndim < 4
    # strings, bytes and open files can be iterated over, but not image by image
    return (
        isinstance(images, str | bytes | os.PathLike | Image.Image)
        or hasattr(images, "read")
        or not isinstance(images, Iterable)
    )


def describe(source: Any) -> str:
    """A short printable name for error messages: the path, or the kind and size of what was passed."""
    if isinstance(source, (str, os.PathLike)):
        return _printable(os.fsdecode(source))
    if isinstance(source, bytes):
        return f"<bytes, {len(source):,} bytes>"
    if isinstance(source, Image.Image):
        file = getattr(source, "filename", None)  # only images from Image.open have one, and those from streams have ""
        return (
            f"<PIL {source.mode} {source.width}x{source.height}{' ' + _printable(os.fsdecode(file)) if file else ''}>"
        )
    if isinstance(source, np.ndarray):
        return f"<ndarray {source.dtype} {_printable(str(source.shape))}>"
    if isinstance(source, torch.Tensor):
        return f"<tensor {str(source.dtype).removeprefix('torch.')} {_printable(str(tuple(source.shape)))}>"
    return f"<{type(source).__name__}>"


def _printable(text: str, longest: int = 120) -> str:
    if len(text) > longest:
        text = "..." + text[3 - longest :]
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


@contextmanager
def _failures_named(source: ImageSource) -> Iterator[str]:
    name = describe(source)
    _thread.decoding = True
    if warnings.filters[:1] != [
        _WARNINGS_HERE
    ]:  # elsewhere or nowhere: others put theirs in front, catch_warnings makes new lists
        with suppress(ValueError):
            warnings.filters.remove(_WARNINGS_HERE)
        warnings.filters.insert(0, _WARNINGS_HERE)
    try:
        yield name
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name}: not a readable image; expected one of {', '.join(ACCEPTED_FORMATS)}, intact"
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: too large ({error}); scale it down first") from error
    except Exception as error:  # on broken files Pillow raises almost anything: SyntaxError, struct.error, IndexError, MemoryError, ...
        raise ImageError(
            f"{name}: can't be read as an image; expected an intact one ({type(error).__name__}: {error})"
        ) from error
    finally:
        _thread.decoding = False


class _WhileDecoding:
    """Stands in a warnings filter for the pattern of the message and fits every message of a thread that is decoding.

    Pillow warns about odd metadata, of which nobody can do anything here. `warnings.catch_warnings` would swap the filters of all
    threads; this changes nothing outside this module.
    """

    def match(self, message: str, /) -> bool:
        return getattr(_thread, "decoding", False)


_thread = threading.local()
_WARNINGS_HERE = ("ignore", _WhileDecoding(), Warning, None, 0)


def _load(source: ImageSource, name: str, max_pixels: int) -> Image.Image:
    """May return `source` itself."""
    if isinstance(source, (str, os.PathLike)):
        source = _read_file(source, name)
    if isinstance(source, bytes):
        return _upright_rgb(_open(source, name, max_pixels), name)
    if isinstance(source, Image.Image):
        if isinstance(source, ImageFile.ImageFile) and source.format not in _LAZY_FORMATS:
            formats = ", ".join(ACCEPTED_FORMATS)
            raise ImageError(
                f"{name}: format {source.format}, expected one of {formats}; if you trust it, pass image.copy()"
            )
        _check_size(*source.size, name, max_pixels)
        return _upright_rgb(source, name)
    if isinstance(source, torch.Tensor):
        source = _tensor_to_array(source, name, max_pixels)
    if isinstance(source, np.ndarray):
        return _upright_rgb(_array_to_image(source, name, max_pixels), name)
    raise ImageError(f"{name}: expected a path, bytes, a PIL image, a uint8 ndarray or a tensor")


def _read_file(path: str | os.PathLike, name: str) -> bytes:
    def open_without_waiting(path: str, flags: int) -> int:
        return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a FIFO without a writer would block for ever

    try:
        with open(path, "rb", opener=open_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ImageError(f"{name}: not a regular file; read it yourself and pass the bytes")
            return file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ImageError(f"{name}: can't read the file: {error.strerror or error}") from error


def _open(data: bytes, name: str, max_pixels: int) -> ImageFile.ImageFile:
    if not 0 < len(data) <= MAX_FILE_BYTES:
        raise ImageError(f"{name}: has {len(data):,} bytes, expected 1 to {MAX_FILE_BYTES:,}")
    image = Image.open(io.BytesIO(data), formats=[name for name in ACCEPTED_FORMATS if name not in ("HEIC", "JPEG XL")])
    _check_size(*image.size, name, max_pixels)
    return image


def _check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    if width <= 0 or height <= 0:
        raise ImageError(f"{name}: {width} x {height} pixels, expected at least one")
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: {width} x {height} = {width * height:,} pixels, the limit is {max_pixels:,}; "
            "scale it down first, or pass a larger max_pixels= in Python"
        )
    if max(width, height) > MAX_SIDE:
        raise ImageError(f"{name}: {width} x {height} pixels, the limit for a side is {MAX_SIDE:,}; cut it up first")


def _array_to_image(array: np.ndarray, name: str, max_pixels: int) -> Image.Image:
    if array.dtype != np.uint8:
        raise ImageError(
            f"{name}: expected uint8 with values 0 to 255; for floats in [0, 1] pass (array * 255).round().astype('uint8')"
        )
    if not (array.ndim == 2 or array.ndim == 3 and array.shape[2] in (1, 3, 4)):
        raise ImageError(
            f"{name}: expected the shape [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]; one image at a time, channels last"
        )
    _check_size(array.shape[1], array.shape[0], name, max_pixels)
    return Image.fromarray(np.ascontiguousarray(array[:, :, 0] if array.shape[2:] == (1,) else array))


def _tensor_to_array(tensor: torch.Tensor, name: str, max_pixels: int) -> np.ndarray:
    """[3, H, W] to uint8 [H, W, 3]."""
    if tensor.ndim != 3 or tensor.shape[0] != 3:
        raise ImageError(f"{name}: expected the shape [3, H, W]; one image at a time, channels first")
    if tensor.dtype != torch.uint8 and not tensor.is_floating_point():
        raise ImageError(f"{name}: expected uint8 with values 0 to 255 or floating point in [0, 1]")
    _check_size(tensor.shape[2], tensor.shape[1], name, max_pixels)
    tensor = tensor.detach().cpu()
    if tensor.dtype != torch.uint8:
        low, high = tensor.aminmax()  # NaN if any value is
        if not (low >= 0 and high <= 1):
            raise ImageError(
                f"{name}: values from {low:.4g} to {high:.4g}, expected [0, 1]; scale or clamp them (not normalized pixels)"
            )
        tensor = tensor.to(torch.float32).mul(255).round().to(torch.uint8)
    return tensor.permute(1, 2, 0).numpy()


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    image.load()  # before the orientation is read: TIFF turns itself
    turn = _TURNS.get(_orientation(image))
    image = _rgb(image, name)
    if turn is not None:
        image = image.transpose(turn)
        image.info = {}  # it still tells the orientation
    return image


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged metadata do no harm to the pixels; every viewer shows such a file as it lies
        return None


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """Transparency goes onto white."""
    if image.mode[0] in "IF":
        return Image.fromarray(_grey_8bit(image, name)).convert("RGB")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    opaque = Image.new("RGB", rgba.size, "white")
    opaque.paste(rgba, mask=rgba)
    return opaque


def _grey_8bit(image: Image.Image, name: str) -> np.ndarray:
    """Modes I;16 (all byte orders), I and F to uint8 [H, W]. Pillow's own conversion clips them at 255."""
    values = np.asarray(image)  # [H, W]
    low, high = values.min(), values.max()
    whites = {"I": (255, 65535), "F": (1, 255, 65535)}.get(image.mode, (65535,))
    white = next((white for white in whites if high <= white), None)
    if white is None or not low >= 0:  # not: NaN
        raise ImageError(
            f"{name}: values from {low} to {high}, expected 0 to one of {', '.join(map(str, whites))}; scale them first"
        )
    transparent = image.info.get("transparency")
    clear = values == transparent if isinstance(transparent, int) else None
    scaled = values.astype(np.float32)
    scaled *= 255 / white
    if image.mode.startswith("I;16") and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC_TAG) == _WHITE_IS_ZERO:
        np.subtract(255, scaled, out=scaled)  # Pillow heeds this tag at 8 bits only
    scaled += 0.5
    grey = scaled.astype(np.uint8)
    if clear is not None:
        grey[clear] = 255
    return grey


def _resize(image: Image.Image, config: ImageConfig) -> Image.Image:
    size, (width, height) = config.img_size, image.size
    if config.resize == "crop":
        side = min(width, height)
        left, top = (
            (width - side) // 2,
            (height - side) // 2,
        )  # whole pixels, so that a picture of the right size is not blurred
        return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    if height > 64 * width:  # Pillow scales the width first, which would blow up a tall sliver before it shrinks
        image = image.resize((width, size), Image.Resampling.BICUBIC)
    return image.resize((size, size), Image.Resampling.BICUBIC)


def _per_channel(values: tuple[float, float, float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).view(3, 1, 1)
