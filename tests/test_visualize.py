"""Pictures about tokens: sizes, what is dark, what is refused."""

import dataclasses

import numpy as np
import pytest
from support.any_grid import any_grid_tokenizer

from dyntok import CodeError, ConfigError, DynamicVisualTokenizer, ImageError
from dyntok.image import to_image, to_pixels
from dyntok.visualize import contact_sheet

SIDE, GAP, CAPTION = 64, 8, 22  # the small tokenizer's own size, so that nothing is rescaled


def panel(sheet, row, column):
    top, left = GAP + row * (SIDE + CAPTION + GAP), GAP + column * (SIDE + GAP)
    return np.asarray(sheet)[top : top + SIDE, left : left + SIDE]


def test_each_row_shows_the_original_its_kept_patches_and_what_comes_back(tokenizer, photos):
    encoding = tokenizer.encode(photos[:3])
    sheet = contact_sheet(tokenizer, photos[:3], encoding, side=SIDE)
    assert sheet.size == (3 * (SIDE + GAP) + GAP, 3 * (SIDE + CAPTION + GAP) + GAP)
    for i, photo in enumerate(photos[:3]):
        config = tokenizer.config.image
        original, kept = np.asarray(to_image(to_pixels(photo, config), config)), panel(sheet, i, 1)
        mask = encoding[i].keep_mask()[0].view(8, 8).numpy().repeat(8, 0).repeat(8, 1)
        assert 0 < mask.sum() < mask.size
        assert np.array_equal(panel(sheet, i, 0), original) and np.array_equal(kept[mask], original[mask])
        assert np.unique(kept[~mask], axis=0).tolist() == [[32, 32, 40]]
        assert np.array_equal(panel(sheet, i, 2), np.asarray(tokenizer.decode(encoding)[i]))


def test_it_takes_what_encode_takes(tokenizer, photos):
    batch = np.stack([np.asarray(photo)[:40, :40] for photo in photos[:2]])
    listed = contact_sheet(tokenizer, list(batch), tokenizer.encode(batch))
    assert contact_sheet(tokenizer, batch, tokenizer.encode(batch)) == listed
    encoding = tokenizer.encode(photos[0])
    assert contact_sheet(tokenizer, photos[0], encoding) == contact_sheet(tokenizer, photos[:1], encoding)
    for wrong in ({"columns": 0}, {"side": "64"}):
        with pytest.raises(ConfigError, match="expected an integer of 1 or more"):
            contact_sheet(tokenizer, photos[:1], encoding, **wrong)


def test_it_has_the_limit_of_encode(tokenizer, photos):
    with pytest.raises(ImageError, match="the limit is 99"):
        contact_sheet(tokenizer, photos[:1], tokenizer.encode(photos[:1]), max_pixels=99)


def test_without_a_pixel_head_there_are_two_pictures(small_config, photos):
    decoder = dataclasses.replace(small_config.decoder, pixels=False)
    codebook = dataclasses.replace(small_config.codebook, projection="mlp")
    tokenizer = DynamicVisualTokenizer(dataclasses.replace(small_config, decoder=decoder, codebook=codebook)).eval()
    side = 2 * SIDE  # for the width of a caption
    sheet = contact_sheet(tokenizer, photos, tokenizer.encode(photos, budget=9), side=side, columns=3)
    assert sheet.size == (3 * (2 * (side + GAP) + GAP), 2 * (side + CAPTION + GAP) + GAP)


def test_codes_must_be_those_of_the_images(tokenizer, photos):
    encoding = tokenizer.encode(photos[:2])
    for images, codes in ((photos[:1], encoding), (photos[:3], encoding), ([], tokenizer.encode([]))):
        with pytest.raises(CodeError, match="an encoding of the same images"):
            contact_sheet(tokenizer, images, codes)
    with pytest.raises(CodeError, match="needs positions"):
        contact_sheet(tokenizer, photos[:2], dataclasses.replace(encoding, packed_positions=None))


def test_options_must_be_those_of_encode(small_config, photos):
    tokenizer = any_grid_tokenizer(small_config)
    encoding = tokenizer.encode(photos[:1], max_patches=100)
    with pytest.raises(
        CodeError, match=r"grid of 10 x 10 patches, .* give contact_sheet the fit, max_patches and size"
    ):
        contact_sheet(tokenizer, photos[:1], encoding)
    contact_sheet(tokenizer, photos[:1], encoding, max_patches=100)


def test_panels_of_many_shapes_take_the_room_that_they_need(small_config, photos):
    tokenizer = any_grid_tokenizer(small_config)
    images = [photos[0][:40, :160], photos[1][:150, :40], photos[2][:40, :160], photos[3][:100, :100]]
    encoding = tokenizer.encode(images)
    sheet = contact_sheet(tokenizer, images, encoding, side=1, columns=2)
    (h0, w0), (h1, w1), (h2, w2), (h3, w3) = (8 * encoding.grids).tolist()
    assert w0 > 2 * h0 and h1 > 2 * w1
    assert sheet.width == 3 * (max(w0, w2) + GAP) + GAP + 3 * (max(w1, w3) + GAP) + GAP
    assert sheet.height == max(h0, h1) + max(h2, h3) + 2 * (CAPTION + GAP) + GAP


def test_captions_fit_beside_narrow_pictures(small_config, photos):
    tall = any_grid_tokenizer(small_config)
    pictures = [photos[0][:, :64]] * 2
    sheet = contact_sheet(tall, pictures, tall.encode(pictures), columns=2)
    dark = (np.asarray(sheet)[-24:].min(-1) < 128).any(0)  # the line of the captions
    half = sheet.width // 2
    assert dark[:half].any() and dark[half:].any() and not dark[half - 8 : half + 8].any() and not dark[-8:].any()
