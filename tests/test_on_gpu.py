"""Codes on the device named by DYNTOK_TEST_DEVICE (a CPU without it): decisions that differ were close."""

import pytest
import torch
from support.device import DEVICE

import dyntok
from dyntok.image import to_pixels
from dyntok.target import visible_psnr

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def tokenizer_there():
    return dyntok.load(device=DEVICE)


def unexplained(one, other):
    """Images whose tokens differ although no decision was within rounding."""
    pairs = zip(one, other, one.margins.sum(1).tolist(), strict=True)
    return [i for i, (a, b, close) in enumerate(pairs) if a != b and close == 0]


@pytest.mark.parametrize("options", [{}, {"budget": 64}], ids=str)
def test_codes_are_those_of_a_cpu(options, tokenizer_there, photos):
    here = dyntok.load().encode(photos[:3], margins=True, **options)
    there = tokenizer_there.encode(photos[:3], **options)
    assert there.device.type == DEVICE.split(":")[0] and unexplained(here, there) == []


def test_batch_sizes_change_close_decisions_alone(tokenizer_there, photos):
    alone = tokenizer_there.encode(photos[:3], batch_size=1, margins=True)
    assert unexplained(alone, tokenizer_there.encode(photos[:3], batch_size=3)) == []


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_batch_invariance(dtype, photos):
    tokenizer = dyntok.load("tiny", device=DEVICE, dtype=dtype, batch_invariant=True)
    alone = [tokenizer.encode(photo) for photo in photos]
    for shift in range(len(photos)):
        order = [(i + shift) % len(photos) for i in range(len(photos))]
        found = tokenizer.encode([photos[i] for i in order], batch_size=3)
        assert all(row == alone[i] for row, i in zip(found, order, strict=True))


def test_numbers_that_are_not_finite_are_an_error_when_codes_are_read():
    broken = dyntok.load("tiny", device=DEVICE)
    with torch.no_grad():
        broken.projection.weight.view(-1)[0] = torch.nan
    with pytest.raises(dyntok.ImageError, match="input 0: the network computed NaN"):
        _ = broken.encode(dyntok.example_image(), fit="crop").codes


def test_pictures_come_back(tokenizer_there, photos):
    images = tokenizer_there.decode(tokenizer_there.encode(photos[:2]))
    assert [image.size for image in images] == [(128, 128), (152, 104)]


def test_refined_codes_paint_closer_pictures(tokenizer_there, photos):
    options = {"budget": 40, "max_patches": 96}
    config = tokenizer_there.image_config(max_patches=96)
    for photo in photos[:2]:
        wanted = to_pixels(photo, config)[None].to(DEVICE)
        painted = [
            tokenizer_there.decode_to_pixels(tokenizer_there.encode(photo, refine=refine, **options))
            for refine in (0, 1)
        ]
        plain, refined = (float(visible_psnr(pixels, wanted, config)) for pixels in painted)
        assert refined > plain
