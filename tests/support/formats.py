"""Pictures as files of every format that is read, those included that need a plugin of Pillow."""

import io

import numpy as np
import pillow_heif
import pillow_jxl  # noqa: F401 - registers itself
from PIL import Image

pillow_heif.register_heif_opener()
_SAVED_AS = {"HEIC": "HEIF", "JPEG XL": "JXL"}


def encoded(image, format, **options):
    """image: of Pillow, or an array [H, W] or [H, W, C]. format: one of `ACCEPTED_FORMATS`, or a name of Pillow's."""
    stream = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(stream, _SAVED_AS.get(format, format), **options)
    return stream.getvalue()
