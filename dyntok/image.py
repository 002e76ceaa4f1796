"""Any kind of picture to normalized pixels and back, safely: path, bytes, PIL image, ndarray or tensor in, float tensor
out.

Does: read, check against limits before decoding, decode, turn upright, bring to 8-bit RGB, resize, normalize. Every
source takes this one path, so the same picture gives the same pixels however it came. Every failure is an
`ImageError` that names the source. Does not: fetch URLs, read formats outside `ACCEPTED_FORMATS`, or read more than one
frame.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageFile

from dyntok.config import ImageConfig
from dyntok.errors import ConfigError, ImageError
from dyntok.fitting import Fitting, fit, padded_inside, smallest_decoding
from dyntok.imaging.color import to_srgb
from dyntok.imaging.container import orientation
from dyntok.imaging.decode import CheckSize, Picture, Smallest, decode, load, says_more
from dyntok.imaging.formats import ACCEPTED_FORMATS as ACCEPTED_FORMATS
from dyntok.imaging.formats import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from dyntok.imaging.formats import UNREADABLE_SUFFIXES as UNREADABLE_SUFFIXES
from dyntok.imaging.formats import sniff as sniff
from dyntok.imaging.samples import gray_8bit
from dyntok.imaging.source import MAX_FILE_BYTES as MAX_FILE_BYTES
from dyntok.imaging.source import describe as describe
from dyntok.imaging.source import from_array, from_tensor, read_bytes
from dyntok.imaging.source import is_single as is_single
from dyntok.original import Original


class BinaryFile(Protocol):
    """An open file or anything else whose `read` returns bytes."""

    def read(self, size: int = -1, /) -> bytes: ...


ImageSource: TypeAlias = (
    str | os.PathLike | bytes | bytearray | memoryview | BinaryFile | Image.Image | np.ndarray | torch.Tensor
)

# Reading takes up to 16 bytes per pixel (WebP, AVIF), so these limits keep one file below 2 GB, the half of one for
# PyTorch included.
# 2**26 lets 61-megapixel cameras in.
DEFAULT_MAX_PIXELS = 2**26
MAX_SIDE = 2**20  # Pillow's resize needs 32 bytes of filter weights per pixel of a side

_LAZY_FORMATS = (*ACCEPTED_FORMATS, "MPO", "HEIF", "JXL")  # names that plugins give to the same formats
_FILES_SAY_MORE = ("JPEG", "MPO", "PNG", "TIFF")  # than Pillow's image of them does
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(
    source: ImageSource, *, max_pixels: int = DEFAULT_MAX_PIXELS, color: Literal["ignore", "srgb"] = "ignore"
) -> Image.Image:
    """Return a new, upright 8-bit RGB image.

    * path: a regular file of at most `MAX_FILE_BYTES`; bytes, bytearray, memoryview or file object: the content of such
    a file, in one of
      `ACCEPTED_FORMATS`
    * PIL image: any mode, its current frame; one that is not decoded yet is read like its file
    * ndarray: [H, W], [H, W, 1], [H, W, 3] (RGB) or [H, W, 4] (RGBA), uint8 or floating point in [0, 1]
    * tensor: [3, H, W] or [1, H, W], uint8 or floating point in [0, 1], on any device

    Floating point is rounded to 8 bits. The EXIF orientation is applied, transparency composited on white, and of an
    animation the first frame is taken. `color="srgb"` converts colors by the embedded ICC profile; PNG's cICP, gAMA and
    cHRM chunks and EXIF's ColorSpace are ignored.

    White is what the file states: TIFF's BitsPerSample, SMaxSampleValue and MaxSampleValue (rounded up to whole bits),
    and PNG's sBIT where no sample exceeds it. A PIL image that is decoded, as by `image.load()`, states nothing, unless
    it is a PPM. Where nothing states it, or a sample exceeds it, 16-bit samples are scaled from 0..65535, and for modes
    I and F the first of 1 (F only), 255 and 65535 that holds every value is white; other values are refused.

    `max_pixels` is checked before decoding. Settings of Pillow such as `LOAD_TRUNCATED_IMAGES` have no effect. Raises
    `ImageError`, and `ConfigError` on another color.
    """
    if color not in ("ignore", "srgb"):
        raise ConfigError(f"color is {color!r}, expected 'ignore' or 'srgb'")
    with _failures_named(source) as name:
        image = _upright_rgb(_load(source, name, max_pixels), name, color)
        return image.copy() if image is source else image


def to_pixels(source: ImageSource, config: ImageConfig, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> torch.Tensor:
    """Return normalized pixels [3, H, W], float32: (value / 255 - mean) / std. Sources and errors as in `load_image`.

    The picture is resized in 8 bits with Pillow's antialiased bicubic filter; `ImageConfig` says to which size. Its
    `decoding: scaled` concerns JPEG files (paths, bytes, file objects), not pictures that are decoded already.
    """
    return normalized(to_array(source, config, max_pixels=max_pixels)[0], config)


def to_array(
    source: ImageSource, config: ImageConfig, *, max_pixels: int = DEFAULT_MAX_PIXELS
) -> tuple[np.ndarray, tuple[int, int]]:
    """Return the resized picture, uint8 [H, W, 3], and (width, height) of the upright original.

    This is the first half of `to_pixels`.
    """
    with _failures_named(source) as name:

        def smallest(width: int, height: int) -> tuple[int, int]:
            return smallest_decoding(width, height, _fitted(width, height, name, config))

        picture = _load(source, name, max_pixels, smallest if config.decoding == "scaled" else None)
        place = _fitted(*picture.upright_size, name, config)
        image = _upright_rgb(picture, name, config.color)
        return np.asarray(_resize(image, place, picture.reduced(place.box))), picture.upright_size


def normalized(array: np.ndarray, config: ImageConfig) -> torch.Tensor:
    """Return float32 [..., 3, H, W] for uint8 [..., H, W, 3]: the second half of `to_pixels`."""
    pixels = np.moveaxis(array, -1, -3).astype(np.float32, order="C")  # NumPy, since torch would start threads
    pixels /= 255
    pixels -= np.array(config.mean, np.float32).reshape(3, 1, 1)
    pixels /= np.array(config.std, np.float32).reshape(3, 1, 1)
    return torch.from_numpy(pixels)


def normalize(pixels: torch.Tensor, config: ImageConfig) -> torch.Tensor:
    """Return float32 [B, 3, H, W] for uint8 [B, 3, H, W], on its device: the values of `to_pixels`, bit by bit.

    They come from a table of all 8-bit values, so that no device computes them in its own way.
    """
    table, first = _table(config, pixels.device)
    return table[pixels.contiguous().int() + first]


@functools.lru_cache(maxsize=16)
def _table(config: ImageConfig, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the normalized values of the three channels, one after another, and where each channel begins.

    Both are copied from the host, which waits: they are complete for every stream of a GPU.
    """
    gray = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2)  # [256, 1, 3]
    first = torch.arange(0, 768, 256, dtype=torch.int32, device="cpu").view(3, 1, 1)
    return normalized(gray, config).flatten().to(device), first.to(device)


def to_image(pixels: torch.Tensor, config: ImageConfig) -> Image.Image:
    """Return the RGB image of normalized pixels [3, H, W], clamped and rounded to 8 bits.

    Undoes the normalization of `to_pixels`.
    """
    name = describe(pixels)
    if pixels.ndim != 3 or pixels.shape[0] != 3 or not pixels.is_floating_point() or 0 in pixels.shape:
        raise ImageError(f"{name}: expected normalized floating-point pixels [3, H, W]")
    values = pixels.detach().cpu().to(torch.float32)
    if not values.isfinite().all():
        raise ImageError(f"{name}: holds NaN or infinite values, expected finite ones")
    values = values * _per_channel(config.std) + _per_channel(config.mean)
    return Image.fromarray(values.clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return the image at (height, width) in pixels, by the antialiased bicubic filter."""
    return image.resize(size[::-1], Image.Resampling.BICUBIC)


def restore(image: Image.Image, original: Original, config: ImageConfig) -> Image.Image:
    """Return a reconstruction at its original's size and place: without padding, and gray where it was cut off.

    config: tells the fit of originals that do not.
    """
    height, width = original.size
    left, top, right, bottom = original.crop_box
    if (original.fit or config.resize) == "pad":
        image = image.crop(padded_inside(width, height, (image.height, image.width)))
    painted = resize(image, (bottom - top, right - left))
    if painted.size == (width, height):
        return painted
    canvas = Image.new("RGB", (width, height), "gray")
    canvas.paste(painted, (left, top))
    return canvas


@contextmanager
def _failures_named(source: ImageSource) -> Iterator[str]:
    name = describe(source)
    try:
        yield name
    except ImageError:
        raise
    except Exception as error:  # on broken files Pillow raises almost anything: SyntaxError, IndexError, ...
        raise ImageError(
            f"{name}: can't be read as an image; expected an intact one ({type(error).__name__}: {error})"
        ) from error


def _load(source: ImageSource, name: str, max_pixels: int, smallest: Smallest | None = None) -> Picture:
    """Returns the decoded picture, whose image may be `source` itself."""

    def check_size(width: int, height: int) -> None:
        _check_size(width, height, name, max_pixels)

    if isinstance(source, Image.Image):
        check_size(*source.size)
        return _decoded(source, name, check_size)
    if isinstance(source, torch.Tensor):
        if source.ndim != 3 or source.shape[0] not in (1, 3):
            raise ImageError(f"{name}: expected the shape [3, H, W] or [1, H, W]; one image at a time, channels first")
        check_size(source.shape[2], source.shape[1])
        return Picture(from_tensor(source, name))
    if isinstance(source, np.ndarray):
        if source.ndim in (2, 3):
            check_size(source.shape[1], source.shape[0])
        return Picture(from_array(source, name))
    data = read_bytes(source, name)
    if data is None:
        raise ImageError(f"{name}: expected a path, bytes, a file object, a PIL image, an ndarray or a tensor")
    return decode(data, name, check_size, smallest)


def _check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    if width <= 0 or height <= 0:
        raise ImageError(f"{name}: {width} x {height} pixels, expected at least one")
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: {width} x {height} = {width * height:,} pixels, the limit is {max_pixels:,}; "
            "scale it down first, or raise the limit: max_pixels=, --max-pixels"
        )
    if max(width, height) > MAX_SIDE:
        raise ImageError(f"{name}: {width} x {height} pixels, the limit for a side is {MAX_SIDE:,}; cut it up first")


def _decoded(image: Image.Image, name: str, check_size: CheckSize) -> Picture:
    """Returns a PIL image of the caller's, decoded in place if it was not yet."""
    if isinstance(image, ImageFile.ImageFile):
        if image.format not in _LAZY_FORMATS:
            formats = ", ".join(ACCEPTED_FORMATS)
            raise ImageError(
                f"{name}: format {image.format}, expected one of {formats}; if you trust it, pass image.copy()"
            )
        content = _file_of(image, name)
        if content is not None and ("transparency" in image.info or says_more(content, name)):
            return decode(content, name, check_size)
        load(image)
    else:
        image.load()
    exif = image.info.get("exif")
    state = orientation(exif if isinstance(exif, bytes) else None, None) if exif else _stated_orientation(image)
    profile = image.info.get("icc_profile")
    white = 65535 if image.format == "PPM" and image.mode == "I" else None  # Pillow scales these samples
    return Picture(image, state, profile if isinstance(profile, bytes) else None, white)


def _file_of(image: ImageFile.ImageFile, name: str) -> bytes | None:
    """Returns the file of an image that is not decoded yet.

    None where it says nothing about the current frame, or may be a large stack of pages.
    """
    if image.format not in _FILES_SAY_MORE or not image.tile or image.fp is None or image.tell() > 0:
        return None
    position = image.fp.tell()
    too_large = image.fp.seek(0, os.SEEK_END) > MAX_FILE_BYTES
    image.fp.seek(0)
    content = None if too_large and image.format == "TIFF" else read_bytes(image.fp, name)
    image.fp.seek(position)
    return content


def _stated_orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(274, 1)
    except Exception:  # damaged metadata do no harm to the pixels; every viewer shows such a file as it lies
        return 1


def _upright_rgb(picture: Picture, name: str, color: str) -> Image.Image:
    profile = picture.profile if color == "srgb" else None
    image = _rgb(picture.image, name, picture.white, profile)
    turn = _TURNS.get(picture.orientation)
    if turn is not None:
        image = image.transpose(turn)
        image.info = {key: value for key, value in image.info.items() if key == "icc_profile"}  # not the orientation
    if color == "ignore" and picture.profile:
        image.info["icc_profile"] = picture.profile
    return image


def _rgb(image: Image.Image, name: str, white: float | None, profile: bytes | None) -> Image.Image:
    """Returns the image in RGB; transparency goes onto white."""
    if image.mode[0] in "IF":
        return to_srgb(Image.fromarray(gray_8bit(image, name, white)), profile).convert("RGB")
    if not image.has_transparency_data:
        if image.mode == "LAB":  # says itself what its colors are
            return image.convert("RGB")
        fitting = image if image.mode in ("RGB", "L", "CMYK") else image.convert("RGB")
        return to_srgb(fitting, profile).convert("RGB")
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    colors = (
        rgba if profile is None else to_srgb(rgba.convert("L" if image.mode in ("L", "LA", "La") else "RGB"), profile)
    )
    opaque = Image.new("RGB", rgba.size, "white")
    opaque.paste(colors, mask=rgba)
    return opaque


def _fitted(width: int, height: int, name: str, config: ImageConfig) -> Fitting:
    try:
        return fit(width, height, config)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error


def _resize(image: Image.Image, place: Fitting, box: tuple[float, float, float, float]) -> Image.Image:
    """Returns the fitted image. box: the used part, in pixels of this image."""
    left, top, right, bottom = place.inner
    size = (right - left, bottom - top)
    if image.height > 64 * image.width:  # Pillow scales the width first, which would blow up a tall sliver
        image = image.resize((image.width, size[1]), Image.Resampling.BICUBIC, box=box)
        box = (0, 0, *image.size)
    resized = image.resize(size, Image.Resampling.BICUBIC, box=box)
    if place.size == size[::-1]:
        return resized
    canvas = Image.new("RGB", place.size[::-1], "white")
    canvas.paste(resized, (left, top))
    return canvas


def _per_channel(values: tuple[float, float, float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu").view(3, 1, 1)
