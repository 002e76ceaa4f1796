"""Codes on the device named by DYNTOK_TEST_DEVICE (a CPU without it): decisions that differ were close."""

import pytest
import torch
from support.device import DEVICE

import dyntok

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
