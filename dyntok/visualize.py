"""Contact sheets: the original image, its kept patches and its reconstruction, side by side for people to look at."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from dyntok.encoding import Encoding
from dyntok.errors import CodeError
from dyntok.image import ImageSource, to_image, to_pixels
from dyntok.tokenizer import DynamicVisualTokenizer
from dyntok.validation import counted

_GAP = 8
_CAPTION = 22
_DROPPED = (32, 32, 40)


def contact_sheet(
    tokenizer: DynamicVisualTokenizer,
    images: Sequence[ImageSource],
    encoding: Encoding,
    *,
    side: int = 256,
    columns: int = 1,
) -> Image.Image:
    """Returns a contact sheet with one panel per image.

    A panel shows the original as the tokenizer sees it, its kept patches, its reconstruction (if the tokenizer makes
    pixels), and the number of tokens.

    encoding: of exactly these images, in this order, with positions.
    side: width and height of each picture, in pixels.
    columns: panels side by side.

    Raises `CodeError` if there is no image or the encoding does not belong to the images.
    """
    if len(encoding) != len(images) or not images:
        got = f"{counted(len(images), 'image')} and an encoding of {counted(len(encoding), 'image')}"
        raise CodeError(f"contact_sheet got {got}, expected at least one image and an encoding of the same images")
    originals = [to_image(to_pixels(image, tokenizer.config.image), tokenizer.config.image) for image in images]
    pictures = [[original, _kept(original, part)] for original, part in zip(originals, encoding, strict=True)]
    if tokenizer.pixel_head is not None:
        for row, again in zip(pictures, tokenizer.decode(encoding), strict=True):
            row.append(again)
    width = len(pictures[0]) * (side + _GAP) + _GAP
    height = side + _CAPTION + _GAP
    sheet = Image.new("RGB", (width * columns, height * -(-len(images) // columns) + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i, (row, part) in enumerate(zip(pictures, encoding, strict=True)):
        left, top = width * (i % columns) + _GAP, height * (i // columns) + _GAP
        for j, picture in enumerate(row):
            sheet.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (left + j * (side + _GAP), top))
        rows, cols = part.grids[0].tolist()
        draw.text((left, top + side + 3), f"{part.num_tokens} tokens of {rows * cols} patches", "black", font)
    return sheet


def _kept(image: Image.Image, encoding: Encoding) -> Image.Image:
    """Returns the image with its dropped patches dark."""
    mask = encoding.keep_mask()[0].view(*encoding.grids[0].tolist())
    stencil = Image.fromarray(mask.cpu().numpy().astype("uint8") * 255).resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(image, Image.new("RGB", image.size, _DROPPED), stencil)
