"""The start from a PCA: an untrained tokenizer is a linear codec at once."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dyntok.config import TokenizerConfig
from dyntok.errors import ConfigError
from dyntok.image import to_pixels
from dyntok.tokenizer import DynamicVisualTokenizer
from dyntok.training.pca_init import pca_init


def psnr_of_everything(tokenizer, pixels):
    """All patches kept, no quantization."""
    keep = torch.ones(len(pixels), tokenizer.max_tokens, dtype=torch.bool)
    with torch.no_grad():
        vectors = F.normalize(tokenizer.projection(tokenizer.merger(tokenizer.backbone(pixels), keep)), dim=-1)
        lengths = torch.full((len(pixels),), keep.shape[1])
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
        painted = tokenizer.pixel_head(tokenizer.decoder(vectors, cu_seqlens, keep.nonzero()[:, 1]), tokenizer.grid)
    return float((-10 * ((painted - pixels) / 2).square().mean((1, 2, 3)).log10()).mean())


def calm(config, **sections):
    """With residual branches that start small, as in `tiny`."""
    kwargs = {**config.backbone.kwargs, "init_values": 0.1}
    changed = {
        "backbone": dataclasses.replace(config.backbone, kwargs=kwargs),
        "merger": dataclasses.replace(config.merger, init_scale=0.1),
        "decoder": dataclasses.replace(config.decoder, init_scale=0.1),
        **sections,
    }
    return dataclasses.replace(config, **changed)


def test_linear_start_is_a_codec_at_once(small_config, photos):
    tokenizer = DynamicVisualTokenizer(calm(small_config)).eval()
    crops = [
        Image.fromarray(photo).crop((x, y, x + 160, y + 100)) for photo in photos for x in (0, 60) for y in (0, 100)
    ]
    pixels = torch.stack([to_pixels(crop, small_config.image) for crop in crops])
    training, others = pixels[::2], pixels[1::2]
    random = psnr_of_everything(tokenizer, others)
    pca_init(tokenizer, [training])
    assert random < 10
    assert psnr_of_everything(tokenizer, others) > 19  # a PCA of 7 components per 8 x 8 patch gives 20 to 21 dB
    vectors = tokenizer.projection(tokenizer.backbone(others))
    assert F.normalize(vectors, dim=-1)[..., -1].min() > 0.2  # the constant tells magnitudes apart


def test_linear_start_refuses_what_is_not_linear(small_config):
    pixels = torch.randn(4, 3, 64, 64)
    replace = dataclasses.replace
    for config in [
        replace(small_config, merger=replace(small_config.merger, norm=True)),
        replace(small_config, backbone=replace(small_config.backbone, norm=True)),
        replace(small_config, codebook=replace(small_config.codebook, projection="mlp")),
        replace(small_config, decoder=replace(small_config.decoder, placement="rank")),
        replace(small_config, decoder=replace(small_config.decoder, head="mlp")),
        replace(small_config, decoder=replace(small_config.decoder, pixels=False)),
    ]:
        with pytest.raises(ConfigError, match="pca_init needs a ViT backbone"):
            pca_init(DynamicVisualTokenizer(config), [pixels])
    for config in [
        replace(small_config, decoder=replace(small_config.decoder, embed_dim=24)),
        replace(small_config, codebook=replace(small_config.codebook, dim=50)),
        replace(small_config, codebook=replace(small_config.codebook, dim=1)),
    ]:
        with pytest.raises(ConfigError, match="width of at most 192"):
            pca_init(DynamicVisualTokenizer(config), [pixels])
    with pytest.raises(ConfigError, match="got 40 patches for 48 components"):
        narrow = torch.randn(1, 3, 40, 64)
        pca_init(DynamicVisualTokenizer(small_config), [narrow])


@pytest.mark.parametrize("name", ["tiny", "flex"])
def test_presets_that_are_meant_for_it_take_the_linear_start(name):
    tokenizer = DynamicVisualTokenizer(TokenizerConfig.preset(name))
    pca_init(tokenizer, [torch.randn(1, 3, 128, 128)])
