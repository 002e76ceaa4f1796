"""The tokenizer's doors: pictures to codes and back, every source, every policy, and what is refused."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from dyntok import CodeError, ConfigError, DynamicVisualTokenizer, Encoding, FingerprintError, ImageError
from dyntok.chunks import batched
from dyntok.image import to_image, to_pixels

N = 64  # patches of the small tokenizer
JUNK = b"not an image"


@pytest.fixture(scope="module")
def sources(photos, tmp_path_factory):
    """One photograph in every form that is accepted."""
    path = tmp_path_factory.mktemp("photo") / "cat.png"
    Image.fromarray(photos[2]).save(path)
    tensor = torch.from_numpy(photos[2]).permute(2, 0, 1)
    forms = {"str": str(path), "path": path, "bytes": path.read_bytes(), "PIL": Image.open(path), "array": photos[2]}
    return forms | {"uint8 tensor": tensor, "float tensor": tensor / 255}


@pytest.fixture
def featureless(small_config):
    """A tokenizer without a pixel head."""
    decoder = dataclasses.replace(small_config.decoder, pixels=False, head="mlp", placement="rank")
    return DynamicVisualTokenizer(dataclasses.replace(small_config, decoder=decoder)).eval()


def rows(encoding):
    return list(
        zip(map(torch.Tensor.tolist, encoding.codes), map(torch.Tensor.tolist, encoding.positions), strict=True)
    )


@pytest.mark.parametrize("form", ["str", "path", "bytes", "PIL", "array", "uint8 tensor", "float tensor"])
def test_every_source_gives_the_same_codes(tokenizer, photos, sources, form):
    encoding = tokenizer.encode(sources[form])
    assert len(encoding) == 1 and encoding == tokenizer.encode([photos[2]]) == tokenizer.encode([sources[form]])


def test_an_encoding_tells_codes_places_and_origin(tokenizer, photos):
    encoding = tokenizer.encode(photos)
    assert len(encoding) == len(photos) and encoding.fingerprint == tokenizer.fingerprint
    assert encoding.grids.tolist() == [[8, 8]] * len(photos) and encoding.source_index.tolist() == list(
        range(len(photos))
    )
    assert encoding.failures == () and len(set(encoding.lengths.tolist())) > 1
    for codes, positions in rows(encoding):
        assert set(codes) <= set(range(256)) and positions == sorted(set(positions))


def test_many_are_as_many_singles_in_any_container(tokenizer, photos):
    encoding = tokenizer.encode(photos)
    assert rows(encoding) == [rows(tokenizer.encode(photo))[0] for photo in photos]
    assert encoding == tokenizer.encode(tuple(photos)) == tokenizer.encode(photo for photo in photos)
    squares = np.stack([photo[:150, :150] for photo in photos])  # [B, H, W, 3]
    assert len(tokenizer.encode(squares)) == len(photos)
    assert tokenizer.encode(squares) == tokenizer.encode(torch.from_numpy(squares).permute(0, 3, 1, 2))


def test_nothing_gives_an_empty_encoding(tokenizer):
    for encoding in (
        tokenizer.encode([]),
        tokenizer.encode(iter(())),
        tokenizer.encode_tensor(torch.empty(0, 3, 64, 64)),
    ):
        assert len(encoding) == 0 and encoding.num_tokens == 0 and encoding.grids.shape == (0, 2)
        assert tokenizer.decode(encoding) == []
    assert tokenizer.decode([]) == [] and tokenizer.decode_to_features([]).shape == (0, N, 48)
    assert len(tokenizer.features([])) == 0 and tokenizer.features([]).padded()[0].shape == (0, 0, 48)


@pytest.mark.parametrize(
    "options, lengths",
    [
        ({"budget": 5}, {5}),
        ({"budget": 1}, {1}),
        ({"budget": 0.25}, {16}),
        ({"budget": 1.0}, {64}),
        ({"budget": 0.001}, {1}),
        ({"threshold": 0.0}, {64}),
        ({"threshold": 1.0}, {1}),
        ({"max_tokens": 3}, {3}),
        ({"budget": 20, "max_tokens": 7}, {7}),
        ({"threshold": 0.0, "max_tokens": 9}, {9}),
        ({"sample": 1, "max_tokens": 2}, {2}),
    ],
    ids=str,
)
def test_policies_set_the_lengths(tokenizer, photos, options, lengths):
    assert set(tokenizer.encode(photos, **options).lengths.tolist()) == lengths
    features = tokenizer.features(photos, **options)
    assert set(features.lengths.tolist()) == lengths
    assert features == tokenizer.features(photos, **options) != tokenizer.features(photos[:1], **options)


def test_policies_keep_the_best_by_score(tokenizer, photos):
    def kept(**options):
        return [set(positions.tolist()) for positions in tokenizer.encode(photos, **options).positions]

    learned = kept()
    assert all(
        fewer <= some <= more
        for fewer, some, more in zip(kept(threshold=0.51), learned, kept(threshold=0.49), strict=True)
    )
    assert all(few < more for few, more in zip(kept(budget=8), kept(budget=12), strict=True))
    assert all(few <= full for few, full in zip(kept(max_tokens=8), learned, strict=True))


def test_sampling_follows_the_seed_and_the_place(tokenizer, photos):
    def draw(images, seed):
        return rows(tokenizer.encode(images, sample=torch.Generator().manual_seed(seed), errors="skip"))

    drawn = draw(photos, 1)
    assert drawn == draw(photos, 1) and drawn[:2] == draw(photos[:2], 1)
    assert drawn != draw(photos, 2) and drawn != rows(tokenizer.encode(photos)) and drawn[1:] != draw(photos[1:], 1)
    assert draw([JUNK, *photos[1:]], 1) == drawn[1:]  # places count inputs, readable or not
    generator = torch.Generator().manual_seed(1)
    assert tokenizer.encode(photos, sample=generator) == tokenizer.encode(photos, sample=generator)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"budget": 5, "threshold": 0.5}, "budget and threshold were both given"),
        ({"budget": 65}, "budget is 65 tokens, but an image has 64 patches"),
        ({"budget": 0}, "budget is 0, expected at least 1"),
        ({"threshold": 1.5}, "threshold is 1.5, expected a probability"),
        ({"sample": -7}, "sample is -7, expected a seed of 0 or more, or a torch.Generator"),
        ({"sample": "7"}, "sample is '7', expected a seed"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"errors": "ignore"}, "errors is 'ignore', expected 'raise' or 'skip'"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(tokenizer, photos, options, message):
    with pytest.raises(ConfigError, match=message):
        tokenizer.encode(photos, **options)


def test_bad_images_raise_or_are_left_out(tokenizer, photos, tmp_path):
    missing = tmp_path / "missing.jpg"
    images = [photos[0], JUNK, photos[1], missing, None]
    with pytest.raises(ImageError, match="12 bytes"):
        tokenizer.encode(images)
    encoding = tokenizer.encode(images, errors="skip")
    assert encoding == tokenizer.encode(photos[:2]) and encoding.source_index.tolist() == [0, 2]
    assert [index for index, _ in encoding.failures] == [1, 3, 4]
    assert all(isinstance(error, ImageError) for _, error in encoding.failures) and "missing.jpg" in str(
        encoding.failures[1][1]
    )
    nothing = tokenizer.encode([JUNK, missing], errors="skip")
    assert len(nothing) == 0 and len(nothing.failures) == 2
    with pytest.raises(ImageError, match="missing.jpg"):
        tokenizer.features(missing)


def test_the_bad_one_of_many_is_named(tokenizer, photos):
    for bad, name in (
        (JUNK, "<bytes, 12 bytes>"),
        (photos[0] / 100, "<ndarray float64"),
        (Image.new("I", (4, 4), -3), "<PIL I 4x4>"),
    ):
        for encode in (tokenizer.encode, tokenizer.features):
            with pytest.raises(ImageError, match=f"^input 2: {name}"):
                encode([photos[0], photos[1], bad])
            with pytest.raises(ImageError, match=f"^{name}"):
                encode(bad)
    with pytest.raises(ImageError, match=r"^none\.jpg: "):
        tokenizer.encode([photos[0], "none.jpg"])


def test_large_scans_are_a_matter_of_choice(tokenizer, photos):
    height, width, _ = photos[0].shape
    for encode in (tokenizer.encode, tokenizer.features):
        with pytest.raises(ImageError, match="pixels, the limit is .*raise the limit: max_pixels=, --max-pixels"):
            encode(photos[0], max_pixels=height * width - 1)
        assert len(encode(photos[0], max_pixels=height * width)) == 1
    scan = np.zeros((2**13, 2**13 + 1), np.uint8)
    with pytest.raises(ImageError, match="the limit is 67,108,864"):
        tokenizer.encode(scan)
    assert len(tokenizer.encode(scan, max_pixels=2**27)) == 1


def test_what_is_no_image_at_all(tokenizer):
    for image in (5, None, object()):
        with pytest.raises(ImageError, match="expected a path, bytes"):
            tokenizer.encode(image)


def test_open_files_are_images(tokenizer, sources):
    with open(sources["path"], "rb") as file:
        assert tokenizer.encode(file) == tokenizer.encode(sources["path"])


def test_inputs_are_drawn_one_after_another_and_their_own_errors_pass(tokenizer, photos):
    taken = []

    def stream():
        for item in (photos[0], JUNK, photos[1]):
            taken.append(item)
            yield item
        raise RuntimeError("the disk is gone")

    with pytest.raises(ImageError):
        tokenizer.encode(stream())
    assert len(taken) == 2
    with pytest.raises(RuntimeError, match="the disk is gone"):
        tokenizer.encode(stream(), errors="skip")


def test_codes_become_pictures(tokenizer, photos):
    encoding = tokenizer.encode(photos)
    images = tokenizer.decode(encoding)
    assert [(image.mode, image.size) for image in images] == [("RGB", (64, 64))] * len(photos)
    pixels = tokenizer.decode_to_pixels(encoding)
    assert pixels.shape == (len(photos), 3, 64, 64) and not pixels.requires_grad
    assert [image.tobytes() for image in images] == [to_image(row, tokenizer.config.image).tobytes() for row in pixels]
    assert torch.equal(tokenizer.pixel_head(tokenizer.decode_to_features(encoding), tokenizer.grid), pixels)
    given = tokenizer.decode_to_pixels(encoding.codes, positions=encoding.positions, grid=(8, 8))
    assert torch.equal(given, pixels)
    assert not torch.equal(tokenizer.decode_to_pixels(encoding.codes), pixels)  # positions tell something
    assert torch.allclose(tokenizer.decode_to_pixels(encoding[2]), pixels[2:3], atol=1e-5)


def test_codes_alone_as_a_language_model_writes_them(tokenizer):
    written = [[17, 4, 9], [200], list(range(64))]
    pixels = tokenizer.decode_to_pixels(written)
    assert torch.equal(pixels, tokenizer.decode_to_pixels([torch.tensor(codes) for codes in written]))
    assert torch.equal(pixels, tokenizer.decode_to_pixels(np.array(codes, dtype=np.uint16) for codes in written))
    assert torch.equal(
        tokenizer.decode_to_pixels(torch.tensor([[1, 2], [3, 4]])), tokenizer.decode_to_pixels([[1, 2], [3, 4]])
    )
    assert (
        len(tokenizer.decode(written)) == 3 and len(tokenizer.decode([[1]] * 70)) == 70
    )  # more than are decoded at once


@pytest.mark.parametrize(
    "codes, options, message",
    [
        ([[3], [256]], {}, "code 256 is out of range, this codebook has codes 0 to 255"),
        ([[-1]], {}, "image 0 has code -1"),
        ([[3], []], {}, "image 1 has 0 tokens, expected at least one"),
        ([list(range(65))], {}, "image 0 has 65 tokens, more than its 64 patches"),
        ([17, 42], {}, r"codes are one list of integers, .*; for a single image pass \[\[17, 42\]\]$"),
        (torch.tensor([17, 42]), {}, r"for a single image pass \[\[17, 42\]\]"),
        (np.array([17, 42]), {}, r"for a single image pass \[\[17, 42\]\]"),
        ([[3], 17], {}, "codes of image 1: expected one dimension"),
        ([[1, 2]], {"positions": [0, 5]}, r"positions are one list of integers, .* pass \[\[0, 5\]\]"),
        ("17 4", {}, "codes is the text '17 4', expected an Encoding"),
        ([[0.5]], {}, "expected integers"),
        (17, {}, "codes are int, expected an Encoding or one list of integers per image"),
        ([[1, 2]], {"positions": [[1]]}, "lengths"),
        ([[1, 2]], {"positions": [[5, 4]]}, "expected raster order"),
        ([[1]], {"positions": [[64]]}, "position 64, expected 0 to 63"),
        ([[1]], {"grid": (4, 16)}, "another grid than 8 x 8"),
        (Encoding.pack([[1]], None, (4, 16)), {}, "another grid than 8 x 8"),
        (Encoding.pack([[1]], None, (8, 8)), {"positions": [[1]]}, "was given with an Encoding"),
        (Encoding.pack([[1]], None, (8, 8)), {"grid": (8, 8)}, "was given with an Encoding"),
    ],
)
def test_codes_that_can_not_be_decoded(tokenizer, codes, options, message):
    for decode in (tokenizer.decode, tokenizer.decode_to_features, tokenizer.decode_to_pixels):
        with pytest.raises(CodeError, match=message):
            decode(codes, **options)


def test_codes_of_another_tokenizer_are_refused(tokenizer):
    strange = Encoding.pack([[1]], [[0]], (8, 8), "0123456789abcdef")
    with pytest.raises(FingerprintError, match=f"0123456789abcdef, this one is {tokenizer.fingerprint}"):
        tokenizer.decode(strange)
    assert len(tokenizer.decode(dataclasses.replace(strange, fingerprint=None))) == 1


def test_without_a_pixel_head_there_are_features_only(featureless, photos):
    encoding = featureless.encode(photos)
    assert featureless.decode_to_features(encoding).shape == (len(photos), N, 48)
    for decode in (featureless.decode, featureless.decode_to_pixels):
        with pytest.raises(CodeError, match="pixel head.*decode_to_features"):
            decode(encoding)


def test_features_are_what_the_codes_quantize(tokenizer, photos):
    features, encoding = tokenizer.features(photos), tokenizer.encode(photos)
    assert features.tokens.shape == (encoding.num_tokens, 48) and features.tokens.dtype == torch.float32
    assert torch.equal(features.positions, encoding.packed_positions) and torch.equal(
        features.cu_seqlens, encoding.cu_seqlens
    )
    assert torch.equal(features.lengths, encoding.lengths) and torch.equal(features.grids, encoding.grids)
    with torch.no_grad():
        codes = [tokenizer.codebook(tokenizer.projection(tokens)) for tokens in features.split()]
    assert [c.tolist() for c in codes] == [c.tolist() for c in encoding.codes]
    padded, mask = features.padded()
    assert padded.shape == (len(photos), int(features.lengths.max()), 48) and torch.equal(padded[mask], features.tokens)
    assert torch.equal(mask.sum(1), features.lengths) and not padded[~mask].any()
    assert torch.equal(tokenizer.features(photos[1]).tokens, features.split()[1])


def test_the_raw_door_gives_the_same(tokenizer, photos):
    pixels = torch.stack([to_pixels(photo, tokenizer.config.image) for photo in photos])
    encoding = tokenizer.encode(photos)
    assert tokenizer.encode_tensor(pixels) == encoding
    assert tokenizer.encode_tensor(pixels.to(memory_format=torch.channels_last)) == encoding
    assert tokenizer.encode_tensor(pixels.double()) == encoding
    assert tokenizer.encode_tensor(pixels, budget=9) == tokenizer.encode(photos, budget=9)
    assert tokenizer.encode_tensor(pixels, keep_mask=encoding.keep_mask()) == encoding


@pytest.mark.parametrize(
    "pixels",
    [
        torch.zeros(3, 64, 64),
        torch.zeros(1, 3, 64, 32),
        torch.zeros(1, 1, 64, 64),
        torch.zeros(1, 3, 64, 64).int(),
        [[0.0]],
    ],
    ids=["no batch", "oblong", "gray", "integers", "list"],
)
def test_pixels_of_another_shape_are_refused(tokenizer, pixels):
    with pytest.raises(ImageError, match=r"expected normalized floats \[B, 3, 64, 64\]"):
        tokenizer.encode_tensor(pixels)


def test_pixels_must_be_finite(tokenizer):
    for value in (torch.nan, torch.inf):
        with pytest.raises(ImageError, match="NaN or infinite"):
            tokenizer.encode_tensor(torch.full((1, 3, 64, 64), value))


def test_a_mask_stands_alone_and_fits(tokenizer):
    pixels, mask = torch.zeros(2, 3, 64, 64), torch.ones(2, N, dtype=torch.bool)
    for options in (
        {"keep_mask": mask, "budget": 3},
        {"keep_mask": mask[:1]},
        {"keep_mask": mask.float()},
        {"keep_mask": mask & False},
    ):
        with pytest.raises(ConfigError, match="keep"):
            tokenizer.encode_tensor(pixels, **options)


def test_training_mode_changes_nothing_and_stays(small_config, photos):
    kwargs = dict(small_config.backbone.kwargs, proj_drop_rate=0.5)
    config = dataclasses.replace(small_config, backbone=dataclasses.replace(small_config.backbone, kwargs=kwargs))
    tokenizer = DynamicVisualTokenizer(config).eval()
    encoding, features = tokenizer.encode(photos), tokenizer.features(photos).tokens
    pixels = tokenizer.decode_to_pixels(encoding)
    tokenizer.train()
    tokenizer.decoder.eval()
    modes = [module.training for module in tokenizer.modules()]
    assert tokenizer.encode(photos) == encoding and torch.equal(tokenizer.features(photos).tokens, features)
    assert torch.equal(tokenizer.decode_to_pixels(encoding), pixels)
    with pytest.raises(CodeError):
        tokenizer.decode([[999]])
    assert [module.training for module in tokenizer.modules()] == modes and any(modes) and not all(modes)
    assert all(p.requires_grad for p in tokenizer.parameters()) and torch.is_grad_enabled()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_precisions_work(tokenizer, photos, dtype):
    tokenizer.to(dtype)
    encoding = tokenizer.encode(photos[:2])
    assert tokenizer.dtype == tokenizer.features(photos[0]).tokens.dtype == dtype
    assert tokenizer.decode_to_pixels(encoding).dtype == dtype and len(tokenizer.decode(encoding)) == 2


def test_batches_end_with_what_is_left():
    assert list(batched(itertools.islice(itertools.count(), 5), 2)) == [(0, 1), (2, 3), (4,)]
    assert list(batched([], 3)) == []
