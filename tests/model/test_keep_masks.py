"""Keep masks that are given instead of chosen: random and evenly spread ones, and `encode_tensor(keep_mask=)`."""

import numpy as np
import pytest
import torch

from dyntok.errors import ConfigError
from dyntok.image import to_pixels
from dyntok.training.masks import even_mask, random_mask


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (5, 1), (3, 5), (16, 16)], ids=str)
def test_masks_have_exactly_as_many_patches_as_wanted(grid):
    for count in range(1, grid[0] * grid[1] + 1):
        assert int(even_mask(count, grid).sum()) == count
        assert int(random_mask(count, grid, "key").sum()) == count


def test_random_masks_are_those_of_their_key():
    assert torch.equal(random_mask(60, (16, 16), "a"), random_mask(60, (16, 16), "a"))
    assert not torch.equal(random_mask(60, (16, 16), "a"), random_mask(60, (16, 16), "b"))


@pytest.mark.parametrize("count", [16, 32, 64, 85, 128])
def test_even_masks_leave_no_patch_far_from_a_kept_one(count):
    cells = torch.cartesian_prod(torch.arange(16.0), torch.arange(16.0))
    distance = torch.cdist(cells, cells)

    def mean_square(mask):
        return float(distance[:, mask].amin(1).square().mean())

    drawn = np.mean([mean_square(random_mask(count, (16, 16), str(i))) for i in range(8)])
    assert mean_square(even_mask(count, (16, 16))) < 0.95 * drawn
    mask = even_mask(count, (16, 16)).view(16, 16)
    assert mask.sum(1).max() - mask.sum(1).min() <= 1
    quarters = [
        int(mask[rows, columns].sum()) for rows in (slice(8), slice(8, 16)) for columns in (slice(8), slice(8, 16))
    ]
    assert max(quarters) - min(quarters) <= 4


@pytest.fixture
def pixels(tokenizer, photos):
    return torch.stack([to_pixels(photo, tokenizer.config.image) for photo in photos[:3]])


def test_keep_says_which_patches_are_encoded(tokenizer, pixels):
    keep = torch.zeros(3, 64, dtype=torch.bool)
    keep[0, 5], keep[1], keep[2, ::3] = True, True, True
    encoding = tokenizer.encode_tensor(pixels, keep_mask=keep)
    assert torch.equal(encoding.keep_mask(), keep)
    assert encoding.lengths.tolist() == [1, 64, 22]
    assert encoding[1] == tokenizer.encode_tensor(pixels[1:2], budget=64)


def test_keep_of_the_learned_choice_changes_nothing(tokenizer, pixels):
    learned = tokenizer.encode_tensor(pixels)
    assert 0 < learned.num_tokens < 192
    assert tokenizer.encode_tensor(pixels, keep_mask=learned.keep_mask()) == learned


OTHER_CHOICES = [{"budget": 4}, {"threshold": 0.5}, {"sample": torch.Generator()}, {"max_tokens": 3}]


@pytest.mark.parametrize("option", OTHER_CHOICES, ids=lambda option: next(iter(option)))
def test_keep_and_another_choice_contradict(tokenizer, pixels, option):
    with pytest.raises(ConfigError, match="the mask alone"):
        tokenizer.encode_tensor(pixels, keep_mask=torch.ones(3, 64, dtype=torch.bool), **option)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (torch.ones(2, 64, dtype=torch.bool), r"torch.bool \[2, 64\], expected a bool tensor \[3, 64\]"),
        (torch.ones(3, 8, 8, dtype=torch.bool), r"expected a bool tensor \[3, 64\]"),
        (torch.ones(3, 64), "torch.float32"),
        ([[True] * 64] * 3, "list"),
        (torch.tensor([[True] * 64, [False] * 64, [True] * 64]), "every patch of image 1"),
    ],
    ids=["images", "dimensions", "dtype", "list", "empty"],
)
def test_keep_that_does_not_fit_is_refused(tokenizer, pixels, keep, message):
    with pytest.raises(ConfigError, match=message):
        tokenizer.encode_tensor(pixels, keep_mask=keep)


def test_no_pixels_give_an_empty_encoding(tokenizer):
    assert len(tokenizer.encode_tensor(torch.empty(0, 3, 64, 64))) == len(tokenizer.encode([])) == 0
