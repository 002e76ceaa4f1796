"""The shapes of pictures in a run: how they meet their grids, and which types hold their codes and positions."""

import numpy as np

from dyntok.batch.options import BatchOptions
from dyntok.config import ImageConfig
from dyntok.errors import ConfigError
from dyntok.tokenizer import DynamicVisualTokenizer


def image_config(tokenizer: DynamicVisualTokenizer, options: BatchOptions) -> ImageConfig:
    """Returns how the pictures of a run are prepared.

    Raises `ConfigError` on values out of range, and where the tokenizer knows one grid alone.
    """
    return tokenizer.image_config(
        fit=options.fit, max_patches=options.max_patches, size=options.size, decoding=options.decoding
    )


def most_patches(tokenizer: DynamicVisualTokenizer, options: BatchOptions) -> int:
    """Returns the largest number of patches that a picture of the run can have."""
    config = image_config(tokenizer, options)
    if config.max_patches is None:
        return tokenizer.grid[0] * tokenizer.grid[1]
    if config.size is None:
        return config.max_patches
    return config.size[0] * config.size[1] // tokenizer.backbone.patch_size**2


def check_shapes(tokenizer: DynamicVisualTokenizer, options: BatchOptions) -> None:
    """Raises `ConfigError` where the tokenizer can't follow the options, before any picture is read."""
    patches = most_patches(tokenizer, options)
    if isinstance(options.budget, int) and options.budget > patches:
        raise ConfigError(f"budget is {options.budget} tokens, but a picture has at most {patches} patches")
    if options.psnr is not None and tokenizer.pixel_head is None:
        raise ConfigError(f"psnr is {options.psnr} dB, but this tokenizer makes no pictures; leave it out")
    if options.refine and tokenizer.pixel_head is None:
        raise ConfigError(f"refine is {options.refine}, but this tokenizer has no pixel head; leave it out")


def code_type(tokenizer: DynamicVisualTokenizer) -> np.dtype:
    """Returns the narrowest unsigned type that holds every code."""
    return narrowest(tokenizer.config.codebook.size)


def position_type(tokenizer: DynamicVisualTokenizer, options: BatchOptions) -> np.dtype:
    """Returns the narrowest unsigned type that holds every position of the run."""
    return narrowest(most_patches(tokenizer, options))


def narrowest(count: int) -> np.dtype:
    """Returns the first unsigned type that holds `count` different values from 0."""
    return next(np.dtype(name) for name in ("uint8", "uint16", "uint32") if count - 1 <= np.iinfo(name).max)
