"""Colors to sRGB by the ICC profile that a file embeds.

The intent is relative colorimetric with black point compensation: a color that sRGB holds stays what it is, and only
others are clipped, while the perceptual intent would change all of them. A broken profile, or one of another kind of
color than the picture's, is ignored.
"""

import functools
import io

import numpy as np
from PIL import Image, ImageCms

_SPACES = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK"}  # mode -> the color space of a profile that fits it
_FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION
_SAME = 1  # levels: profiles of sRGB differ from each other by rounding


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Returns an image of mode RGB, L or CMYK as sRGB in mode RGB, or `image` itself if nothing changes."""
    transform = _transform(profile, image.mode) if profile and image.mode in _SPACES else None
    if transform is None:
        return image
    converted = transform.apply(image)
    converted.info = {key: value for key, value in image.info.items() if key != "icc_profile"}
    return converted


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Returns the transform, or None where the profile is broken, does not fit the mode, or is sRGB."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space != _SPACES[mode]:
            return None
        transform = ImageCms.buildTransform(source, _srgb(), mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC, _FLAGS)
        return None if mode != "CMYK" and _changes_nothing(transform, mode) else transform
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None


@functools.cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, len(levels), 3)
    image = Image.fromarray(grid if mode == "RGB" else np.arange(256, dtype=np.uint8)[None])
    difference = np.asarray(transform.apply(image)).astype(int) - np.asarray(image.convert("RGB"))
    return bool(abs(difference).max() <= _SAME)
