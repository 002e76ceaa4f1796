"""An untrained tokenizer that takes pictures of any shape."""

import dataclasses

import torch

from dyntok.config import BackboneConfig, ImageConfig
from dyntok.tokenizer import DynamicVisualTokenizer


def any_grid_config(config, places="map"):
    """The small tokenizer's configuration, with parts that take any grid: 64 patches of 8 pixels by default."""
    kwargs = dict(
        img_size=64, patch_size=8, embed_dim=48, depth=1, num_heads=3, class_token=False, global_pool="avg",
        dynamic_img_size=True,
    )  # fmt: skip
    return dataclasses.replace(
        config,
        image=ImageConfig(img_size=64, resize="keep", max_patches=64, patch_size=8),
        backbone=BackboneConfig(name="vit_small_patch16_rope_224", kwargs=kwargs, frozen=False),
        selector=dataclasses.replace(config.selector, dither=1.0, bias="fixed", places=places),
        merger=dataclasses.replace(config.merger, position="rotary"),
        decoder=dataclasses.replace(config.decoder, position="rotary"),
    )


def any_grid_tokenizer(config, places="map"):
    """Returns a tokenizer with the same weights every time and a selector that tells patches apart."""
    torch.manual_seed(0)
    tokenizer = DynamicVisualTokenizer(any_grid_config(config, places)).eval()
    with torch.no_grad():
        tokenizer.selector.head.weight.mul_(30)
        tokenizer.selector.head.bias.zero_()
    return tokenizer
