"""The bytes of an image file to a decoded Pillow image, with results that depend on the bytes alone.

Pillow reads `ImageFile.LOAD_TRUNCATED_IMAGES`, `Image.MAX_IMAGE_PIXELS` and its table of plugins from module globals,
which other libraries change. So its plugins are called without `Image.open`, files reach them without metadata (of
which Pillow warns), and each decoder runs inside a `_StrictDecoder` that insists on a complete picture.
"""

import io
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from dyntok.errors import ImageError
from dyntok.imaging import gif, jpeg, jpeg2000, jxl, png, tiff, webp
from dyntok.imaging.container import Container, Packing, orientation
from dyntok.imaging.formats import ACCEPTED_FORMATS, BY_NAME, sniff
from dyntok.imaging.samples import rgb_8bit, scaled, unpacked

CheckSize = Callable[[int, int], None]  # (width, height): raises `ImageError` for a picture that is too large
Smallest = Callable[[int, int], tuple[int, int]]  # (width, height), upright: the least size that is enough

SIDEWAYS = (5, 6, 7, 8)  # orientations whose sides change places
_FAR_EDGE_LEFT, _FAR_EDGE_TOP = (2, 3, 6, 7), (3, 4, 7, 8)  # where the right or bottom edge gets when it is turned
_STRICT = "dyntok_strict"
_BLOCK = 65536  # bytes that a decoder gets at a time
logging.getLogger("PIL").addHandler(
    logging.NullHandler()
)  # else what Pillow logs about broken files lands on a bare stderr


@dataclass(frozen=True)
class Picture:
    """A decoded image and what its file says about it.

    full_size: (width, height) of the picture in the file. reduction: how many of its pixels are one pixel of the image,
    along each side.
    """

    image: Image.Image
    orientation: int = 1
    profile: bytes | None = None  # ICC
    white: float | None = None
    full_size: tuple[int, int] | None = None  # None: the size of the image
    reduction: int = 1

    @property
    def upright_size(self) -> tuple[int, int]:
        """Returns (width, height) of the whole picture after it was turned upright."""
        width, height = self.full_size or self.image.size
        return (height, width) if self.orientation in SIDEWAYS else (width, height)

    def reduced(self, box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        """Returns a box of the whole upright picture (left, top, right, bottom) in pixels of the upright image.

        The last column and row of the image may be covered in part; turning may bring them to the left or the top.
        """
        sides = self.image.size[::-1] if self.orientation in SIDEWAYS else self.image.size
        wide, high = (side - full / self.reduction for side, full in zip(sides, self.upright_size, strict=True))
        x = wide if self.orientation in _FAR_EDGE_LEFT else 0.0
        y = high if self.orientation in _FAR_EDGE_TOP else 0.0
        left, top, right, bottom = (edge / self.reduction for edge in box)
        return left + x, top + y, right + x, bottom + y


def decode(data: bytes, name: str, check_size: CheckSize, smallest: Smallest | None = None) -> Picture:
    """Returns the first picture of a file, decoded. Raises `ImageError`, and the errors of Pillow on broken files.

    smallest: JPEG files may be decoded at a fraction of their size, if that is not below what this function returns.
    """
    format = sniff(data)
    if format is None:
        raise ImageError(f"{name}: not a readable image; expected one of {', '.join(ACCEPTED_FORMATS)}, intact")
    if BY_NAME[format].advice:
        raise ImageError(f"{name}: {format} can't be read; {BY_NAME[format].advice}")
    if format == "JPEG XL":
        check_size(*jxl.size(data))
        held = jxl.read(data)
        return (
            Picture(held.image, profile=held.profile) if held.image else decode(held.jpeg, name, check_size, smallest)
        )
    container = _container(data, format, name)
    for packing in container.packings:
        try:
            return replace(_unpacked(container, packing, check_size), orientation=container.orientation)
        except (OSError, ValueError) as error:
            if isinstance(error, ImageError) or packing == container.packings[-1]:
                raise
    image = _open(container.data, format, name)
    check_size(*image.size)
    if format in ("AVIF", "HEIC"):  # their decoders turn the picture, or say in EXIF how to
        container = replace(container, orientation=orientation(image.info.get("exif"), None))
    elif format == "PPM" and image.mode == "I":
        container = replace(container, white=65535)
    rawmode, full_size, reduction = _rawmode(image), image.size, 1
    if format == "JPEG" and smallest is not None:
        reduction = _reduce(image, container.orientation, smallest)
    load(image)
    picture: Image.Image = image
    if format == "PNG":
        picture = _png(image, container, rawmode)
    elif container.signed:
        picture = Image.fromarray(np.asarray(image).view(np.int8).astype(np.int32))
    profile = container.profile or picture.info.get("icc_profile")
    return Picture(picture, container.orientation, profile, container.white, full_size, reduction)


def says_more(data: bytes, name: str) -> bool:
    """Returns whether a file says of its samples what Pillow does not heed. Raises `ImageError` as `decode` does."""
    container = _container(data, sniff(data) or "", name)
    return container.signed or bool(container.white or container.packings)


def _reduce(image: ImageFile.ImageFile, turned: int, smallest: Smallest) -> int:
    """Makes a JPEG decode at 1/2, 1/4 or 1/8 of its size where that is enough. Returns the divisor."""
    width, height = image.size
    if turned in SIDEWAYS:
        least_height, least_width = smallest(height, width)
    else:
        least_width, least_height = smallest(width, height)
    divisor = next(n for n in (8, 4, 2, 1) if n == 1 or width >= n * least_width and height >= n * least_height)
    if divisor > 1:
        image.draft(None, (width // divisor, height // divisor))
    return divisor


def _container(data: bytes, format: str, name: str) -> Container:
    match format:
        case "JPEG":
            return jpeg.read(data, name)
        case "PNG":
            return png.read(data)
        case "GIF":
            return gif.read(data)
        case "WEBP":
            return webp.read(data)
        case "TIFF":
            return tiff.read(data, name)
        case "JPEG2000":
            return jpeg2000.read(data)
    return Container(data)


def _open(data: bytes, format: str, name: str = "") -> ImageFile.ImageFile:
    """Returns the image of Pillow's plugin, not yet decoded. name: for messages about an intact file."""
    match format:
        case "JPEG":
            return JpegImagePlugin.JpegImageFile(io.BytesIO(data))
        case "PNG":
            return PngImagePlugin.PngImageFile(io.BytesIO(data))
        case "GIF":
            return GifImagePlugin.GifImageFile(io.BytesIO(data))
        case "WEBP":
            return WebPImagePlugin.WebPImageFile(_ShortFirstRead(data))
        case "TIFF":
            return _tiff(data, name)
        case "BMP":
            return BmpImagePlugin.BmpImageFile(io.BytesIO(data))
        case "JPEG2000":
            return Jpeg2KImagePlugin.Jpeg2KImageFile(io.BytesIO(data))
        case "PPM":
            return PpmImagePlugin.PpmImageFile(io.BytesIO(data))
        case "AVIF":
            from PIL import AvifImagePlugin

            return AvifImagePlugin.AvifImageFile(io.BytesIO(data))
    import pillow_heif  # only HEIC is left

    return pillow_heif.HeifImageFile(io.BytesIO(data))


def _tiff(data: bytes, name: str) -> ImageFile.ImageFile:
    try:
        return TiffImagePlugin.TiffImageFile(io.BytesIO(data))
    except SyntaxError as error:
        if str(error) != "unknown pixel mode":
            raise
        raise ImageError(
            f"{name}: a TIFF with {tiff.samples(data)}, which can't be read; "
            "save it as gray or RGB with 8 or 16 unsigned bits per sample"
        ) from error


class _ShortFirstRead(io.BytesIO):
    """Gives 16 bytes at first, as a pipe might.

    Pillow's WebP plugin compares the size in bytes 24 to 29 of its first read with `Image.MAX_IMAGE_PIXELS`, if they
    came.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(16 if self.tell() == 0 and size is not None and size > 0 else size)


def load(image: ImageFile.ImageFile) -> None:
    """Decode a Pillow image in place. Raises an error unless every pixel was in the file."""
    progress = _Progress()
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tile:
        # Otherwise Pillow compares the size with MAX_IMAGE_PIXELS.
        image.im = Image.new(image.mode, image._tile_size, None).im
    image.tile = [_strict(tile, progress) for tile in image.tile]  # type: ignore[misc]  # plain tuples are tiles, too
    image.decodermaxblock = _BLOCK
    if isinstance(image, JpegImagePlugin.JpegImageFile) and image.fp is not None:
        # Pillow's own adds an end where there is none, if LOAD_TRUNCATED_IMAGES is set.
        image.load_read = image.fp.read  # type: ignore[method-assign,assignment]
    image.load()
    if progress.started != progress.finished:
        raise OSError("image file is truncated")


def _strict(tile: tuple, progress: "_Progress") -> tuple:
    decoder, extents, offset, args = tile
    if decoder == "libtiff":  # Pillow runs it in another way, which is strict
        return tile
    args = args if isinstance(args, tuple) else () if args is None else (args,)
    make = getattr(type(tile), "_make", tuple)  # a named tuple since Pillow 11
    return make((_STRICT, extents, offset, (progress, decoder, *args)))


class _Progress:
    """How many decoders of one picture have started and come to their end."""

    def __init__(self) -> None:
        self.started = self.finished = 0


class _StrictDecoder:
    """One of Pillow's decoders whose errors are raised whatever `ImageFile.LOAD_TRUNCATED_IMAGES` says."""

    def __init__(self, mode: str, progress: _Progress, name: str, *args: Any) -> None:
        self._decoder, self._progress = Image._getdecoder(mode, name, args), progress
        self.setimage, self.setfd, self.cleanup = self._decoder.setimage, self._decoder.setfd, self._decoder.cleanup
        self.pulls_fd = self._decoder.pulls_fd
        progress.started += 1

    def decode(self, data: bytes) -> tuple[int, int]:
        consumed, error = self._decoder.decode(data)
        if error < 0:
            raise OSError(f"broken data stream (decoder error {error})")
        self._progress.finished += consumed < 0 or self.pulls_fd
        return consumed, error


Image.register_decoder(_STRICT, _StrictDecoder)  # type: ignore[arg-type]  # only its methods are used


def _rawmode(image: ImageFile.ImageFile) -> str:
    args = image.tile[0][3] if image.tile else ""
    return args[0] if isinstance(args, tuple) else args or ""


def _png(image: ImageFile.ImageFile, container: Container, rawmode: str) -> Image.Image:
    """Returns a PNG with what Pillow does not heed of its sBIT and tRNS chunks."""
    picture = _by_significant_bits(image, container, rawmode) if container.white else image
    key = image.info.get("transparency")
    if image.mode not in ("1", "L", "RGB") or not isinstance(key, int | tuple):
        return picture
    # the color that is transparent, in samples of the file; Pillow compares it with those that it has scaled
    depth = 1 if image.mode == "1" else int(rawmode.partition(";")[2].rstrip("B") or 8)
    samples = np.asarray(image).astype(np.uint16)
    if depth == 16:
        samples = samples << 8 | _decoded_as(container.data, rawmode[:-1] + "L")[..., :3]
    elif depth > 1:
        samples //= 255 // ((1 << depth) - 1)
    same = samples == np.array(key) % (1 << depth)
    transparent = same if samples.ndim == 2 else same.all(2)
    picture = picture.convert("L") if picture.mode == "1" else picture.copy()
    picture.info.pop("transparency", None)
    picture.putalpha(Image.fromarray(np.where(transparent, 0, 255).astype(np.uint8)))
    return picture


def _by_significant_bits(image: Image.Image, container: Container, rawmode: str) -> Image.Image:
    """Returns a PNG with white as 255 where its samples are as small as its sBIT chunk says."""
    white = int(container.white or 0)
    if image.mode not in ("RGB", "RGBA", "L", "LA"):  # I;16 is scaled later; a palette holds full colors
        return image
    samples, gray = np.asarray(image), rawmode.startswith("L")
    colors = samples.reshape(*samples.shape[:2], -1)[..., : 1 if gray else 3]
    if rawmode.endswith(";16B"):
        if colors.max() > white >> 8:
            return image
        if gray:  # with alpha: four bytes
            low = _decoded_as(container.data, "RGBA")[..., 1:2]
        else:
            low = _decoded_as(container.data, rawmode[:-1] + "L")[..., :3]
        bright = rgb_8bit(colors, low, white)
    else:
        bright = scaled(colors, white) if colors.max() <= white else None
    if bright is None:
        return image
    result = Image.fromarray(bright[..., 0] if gray else bright)
    if image.mode in ("RGBA", "LA"):
        result.putalpha(image.getchannel("A"))
    return result


def _decoded_as(png: bytes, rawmode: str) -> np.ndarray:
    """Returns the samples of a PNG, read by another layout of their bytes."""
    image = _open(png, "PNG")
    decoder, extents, offset, _ = image.tile[0]
    image.tile = [type(image.tile[0])(decoder, extents, offset, rawmode)]
    load(image)
    return np.asarray(image)


def _unpacked(container: Container, packing: Packing, check_size: CheckSize) -> Picture:
    image = _open(tiff.as_bytes(container.data, packing), "TIFF")
    check_size(packing.width, image.height)
    load(image)
    values = unpacked(np.asarray(image), packing)
    full = (1 << packing.bits) - 1
    stated = container.white if container.white and values.max() <= container.white else full
    samples = scaled(values, stated)
    colors = samples[:, :, 0] if packing.colors == 1 else samples[:, :, :3]
    result = Image.fromarray(255 - colors if packing.white_is_zero else colors)
    if packing.alpha:
        result.putalpha(Image.fromarray(samples[:, :, packing.colors]))
    if packing.alpha == "premultiplied":
        result = Image.frombytes("RGBa", result.size, result.convert("RGBA").tobytes()).convert("RGBA")
    return Picture(result, profile=container.profile)
