"""Contact sheets: the original image, its kept patches and its reconstruction, side by side for people to look at."""

from collections.abc import Iterable
from math import ceil
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from dyntok.encoding import Encoding
from dyntok.errors import CodeError
from dyntok.image import DEFAULT_MAX_PIXELS, ImageSource, is_single, to_image, to_pixels
from dyntok.structure import require_integer
from dyntok.tokenizer import Decoding, DynamicVisualTokenizer, Fit, Size
from dyntok.validation import counted

_GAP = 8
_CAPTION = 22
_DROPPED = (32, 32, 40)


def contact_sheet(
    tokenizer: DynamicVisualTokenizer,
    images: ImageSource | Iterable[ImageSource],
    encoding: Encoding,
    *,
    side: int = 256,
    columns: int = 1,
    fit: Fit | None = None,
    max_patches: int | None = None,
    size: Size | None = None,
    decoding: Decoding | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Image.Image:
    """Returns a contact sheet with one panel per image, every picture in its own shape.

    A panel shows the original as the tokenizer sees it, its kept patches, its reconstruction (if the tokenizer makes
    pixels), and the number of tokens.

    encoding: of exactly these images, in this order, with positions.
    side: pixels along the longer side of a picture; larger pictures keep their size.
    columns: panels side by side.
    fit, max_patches, size, decoding, max_pixels: what `encode` was given.

    Raises `CodeError` if there is no image or the encoding does not belong to the images, and `ConfigError` where side
    or columns is no integer of 1 or more.
    """
    require_integer("columns", columns, 1)
    require_integer("side", side, 1)
    sources: list[Any] = [images] if is_single(images) else list(images)  # type: ignore[arg-type]  # see is_single
    if len(encoding) != len(sources) or not sources:
        got = f"{counted(len(sources), 'image')} and an encoding of {counted(len(encoding), 'image')}"
        raise CodeError(f"contact_sheet got {got}, expected at least one image and an encoding of the same images")
    config = tokenizer.image_config(fit=fit, max_patches=max_patches, size=size, decoding=decoding)
    originals = [to_image(to_pixels(image, config, max_pixels=max_pixels), config) for image in sources]
    for original, (rows, cols) in zip(originals, encoding.grids.tolist(), strict=True):
        patch = tokenizer.backbone.patch_size
        if original.size != (cols * patch, rows * patch):
            raise CodeError(
                f"the encoding has a grid of {rows} x {cols} patches, but its image is fitted to {original.width} x "
                f"{original.height} pixels; give contact_sheet the fit, max_patches and size that encode was given"
            )
    panels = [[original, _kept(original, part)] for original, part in zip(originals, encoding, strict=True)]
    if tokenizer.pixel_head is not None:
        for panel, again in zip(panels, tokenizer.decode(encoding), strict=True):
            panel.append(again)
    panels = [[_enlarged(picture, side) for picture in panel] for panel in panels]
    columns = min(columns, len(panels))
    font = ImageFont.load_default(14)
    captions = [f"{part.num_tokens} tokens of {int(part.grids[0].prod())} patches" for part in encoding]
    needed = [
        max(len(panel) * (panel[0].width + _GAP), ceil(font.getlength(caption)) + _GAP)
        for panel, caption in zip(panels, captions, strict=True)
    ]
    widths = [max(needed[i::columns]) + _GAP for i in range(columns)]
    lines = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [max(panel[0].height for panel in line) + _CAPTION + _GAP for line in lines]
    sheet = Image.new("RGB", (sum(widths), sum(heights) + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (panel, caption) in enumerate(zip(panels, captions, strict=True)):
        left, top = sum(widths[: i % columns]) + _GAP, sum(heights[: i // columns]) + _GAP
        for j, picture in enumerate(panel):
            sheet.paste(picture, (left + j * (picture.width + _GAP), top))
        draw.text((left, top + panel[0].height + 3), caption, "black", font)
    return sheet


def _enlarged(picture: Image.Image, side: int) -> Image.Image:
    """Returns the picture with a longer side of at least `side` pixels."""
    scale = max(1.0, side / max(picture.size))
    width, height = (max(1, round(length * scale)) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def _kept(image: Image.Image, encoding: Encoding) -> Image.Image:
    """Returns the image with its dropped patches dark."""
    mask = encoding.keep_mask()[0].unflatten(0, encoding.grids[0].tolist())
    stencil = Image.fromarray(mask.cpu().numpy().astype("uint8") * 255).resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(image, Image.new("RGB", image.size, _DROPPED), stencil)
