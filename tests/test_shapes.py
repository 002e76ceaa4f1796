"""Pictures of any shape: the grid that fits them, the same codes in every batch, and decoding to their shape."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from support.any_grid import any_grid_config, any_grid_tokenizer

from dyntok import CodeError, ConfigError, DynamicVisualTokenizer, ImageError, VisualVocab
from dyntok.batch import TokenizeColumn
from dyntok.cli.main import main
from dyntok.config import ImageConfig
from dyntok.fitting import choose_grid, fit
from dyntok.layout import mask_to_counts
from dyntok.visualize import contact_sheet

KEEP = ImageConfig(resize="keep", max_patches=256, patch_size=8)


@pytest.fixture
def tok(small_config):
    return any_grid_tokenizer(small_config)


@pytest.fixture(scope="module")
def shapes(photos):
    """The same photograph in many shapes: square, wide, tall, strips, tiny, odd sides."""
    sizes = [(64, 64), (640, 480), (333, 500), (2304, 512), (120, 700), (17, 13), (1000, 333), (8, 64), (511, 509)]
    return [Image.fromarray(photos[0]).resize(size) for size in sizes]


def test_grids_are_within_the_limit_and_near_the_aspect_ratio():
    generator = np.random.default_rng(0)
    for _ in range(200):
        width, height = (int(side) for side in generator.integers(16, 4000, 2))
        if max(width, height) > 8 * min(width, height):
            continue
        for patches in (64, 256, 1024, 4096):
            rows, columns = choose_grid(width, height, patches)
            assert rows * columns <= patches and max(rows, columns) <= 128
            assert rows * columns >= 0.6 * patches or max(rows, columns) >= 100
            assert 0.8 < columns / rows / (width / height) < 1.25


@pytest.mark.parametrize(
    "size, patches, grid",
    [((100, 100), 256, (16, 16)), ((768, 512), 256, (13, 19)), ((768, 512), 1024, (26, 39)), ((512, 768), 64, (9, 6))],
)
def test_grids_by_hand(size, patches, grid):
    assert choose_grid(*size, patches) == grid


def test_every_fit_says_what_it_uses():
    def fitted(**options):
        return fit(200, 100, ImageConfig(max_patches=256, patch_size=8, **options))

    crop = fitted(resize="crop")
    assert crop.size == (128, 128) and crop.box == (50, 0, 150, 100) and crop.inner == (0, 0, 128, 128)
    assert fitted(resize="squash").box == (0, 0, 200, 100)
    assert fitted(resize="pad").inner == (0, 32, 128, 96)
    assert fitted(resize="crop", size=(64, 128)).box == (0, 0, 200, 100)
    assert fitted(resize="keep", size=(64, 64)).size == (32, 64)
    keep = fitted(resize="keep")
    assert keep.box == (0, 0, 200, 100) and keep.size[1] > keep.size[0]


def test_size_and_max_patches_are_one_choice(tok, shapes, tmp_path, capsys):
    both = {"size": (64, 96), "max_patches": 128}
    doors = [
        lambda: tok.encode(shapes[0], **both),
        lambda: contact_sheet(tok, [shapes[0]], tok.encode(shapes[0]), **both),
        lambda: TokenizeColumn("flex", **both)({"image": [np.asarray(shapes[0])]}),
    ]
    for door in doors:
        with pytest.raises(ConfigError, match=r"max_patches=128 and size=\(64, 96\) were both given, expected one"):
            door()
    shapes[0].save(tmp_path / "a.png")
    for command in (["encode"], ["batch", "--dry-run"], ["show", "-o", str(tmp_path / "b.png")], ["eval"]):
        output = [str(tmp_path / "out")] if command[0] == "batch" else []
        options = ["--size", "64x96", "--max-patches", "128"]
        assert main([*command, str(tmp_path / "a.png"), *output, *options]) == 1
        assert "max_patches=128 and size=(64, 96) were both given" in capsys.readouterr().err


def test_max_patches_takes_the_place_of_a_size_in_the_configuration(small_config, shapes):
    config = any_grid_config(small_config)
    image = dataclasses.replace(config.image, size=(64, 32))
    tok = DynamicVisualTokenizer(dataclasses.replace(config, image=image)).eval()
    assert tok.encode(shapes[0]).grids.tolist() == [[4, 4]]
    assert tok.encode(shapes[0], max_patches=100).grids.tolist() == [[10, 10]]


def test_padding_is_white_and_the_picture_is_whole(tok):
    black = Image.new("RGB", (64, 32))
    image = tok.decode(tok.encode(black, fit="pad", policy=None))[0]
    assert image.size == (64, 64)
    from dyntok.image import to_array

    pixels, _ = to_array(black, tok.image_config(fit="pad"))
    assert (pixels[:16] == 255).all() and (pixels[16:48] == 0).all() and (pixels[48:] == 255).all()


def test_pictures_come_back_in_their_shape(tok, shapes):
    encoding = tok.encode(shapes)
    for image, grid, again in zip(shapes, encoding.grids.tolist(), tok.decode(encoding), strict=True):
        assert again.size == (grid[1] * 8, grid[0] * 8)
        assert grid[0] * grid[1] <= 64
        assert 0.6 < again.width / again.height / (image.width / image.height) < 1.67
    sized = tok.decode(encoding[0], size=(50, 30))
    assert sized[0].size == (30, 50)


def test_batches_of_mixed_grids_equal_singles(tok, shapes):
    together = tok.encode(shapes)
    for index, image in enumerate(shapes):
        assert tok.encode(image) == together[index]
    backwards = tok.encode(shapes[::-1])
    assert all(backwards[i] == together[len(shapes) - 1 - i] for i in range(len(shapes)))
    for image, alone in zip(tok.decode(together), (tok.decode(row)[0] for row in together), strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(alone))
    features = tok.features(shapes)
    assert features.lengths.tolist() == together.lengths.tolist() and features.grids.tolist() == together.grids.tolist()


def test_bad_pictures_among_mixed_grids_keep_their_place(tok, shapes):
    mixed = [shapes[1], b"no picture", shapes[2], Image.new("RGB", (900, 10))]
    encoding = tok.encode(mixed, errors="skip")
    assert encoding.source_index.tolist() == [0, 2] and [index for index, _ in encoding.failures] == [1, 3]
    with pytest.raises(ImageError, match="expected at most 8 to 1 with fit 'keep'"):
        tok.encode(mixed[3])
    assert tok.encode(mixed[3], fit="squash").grids.tolist() == [[8, 8]]


def test_more_patches_and_sizes(tok, shapes):
    large = tok.encode(shapes[1], max_patches=300)
    rows, columns = large.grids[0].tolist()
    assert 240 <= rows * columns <= 300 and len(tok.decode(large)) == 1
    assert tok.encode(shapes[1], size=(96, 160), fit="crop").grids.tolist() == [[12, 20]]
    for options, message in [
        (dict(max_patches=32), "^max_patches is 32, expected a whole number from 64 to 4096"),
        (dict(size=(60, 64)), "^size is .60, 64., expected .height, width., multiples of 8 pixels"),
        (dict(size=5000), "at most 4,096 patches"),
        (dict(size="big"), "expected .height, width. in pixels"),
        (dict(fit="stretch"), "^fit is 'stretch', expected one of crop, squash, pad, keep"),
    ]:
        with pytest.raises(ConfigError, match=message):
            tok.encode(shapes[1], **options)


@pytest.mark.parametrize("places", ["map", "lattice"])
@pytest.mark.parametrize(
    "options", [{}, {"budget": 20}, {"budget": 0.4}, {"threshold": 0.6}, {"sample": 3}, {"max_tokens": 9}]
)
def test_masks_are_canonical_under_every_policy(tok, shapes, places, options):
    encoding = tok.encode(shapes[:4], places=places, **options)
    free = tok.encode(shapes[:4], places="free", **options)
    assert encoding.lengths.tolist() == free.lengths.tolist()
    for row in encoding:
        grid = tuple(row.grids[0].tolist())
        mask = row.keep_mask()
        assert int(mask_to_counts(mask, grid).sum()) == row.num_tokens
    vocab = VisualVocab.of(tok, after=100, layout=places, any_grid=True)
    again = vocab.to_encoding(vocab.to_ids(encoding))
    assert again == encoding
    if places == "lattice":
        alone = tok.decode([row.codes[0].tolist() for row in encoding][:1], grid=tuple(encoding.grids[0].tolist()))[0]
        unplaced = tok.decode(type(encoding).pack([encoding.codes[0]], None, encoding.grids[:1]))[0]
        assert np.array_equal(np.asarray(alone), np.asarray(unplaced))


def test_a_tokenizer_of_one_grid_says_so(tokenizer, photos):
    for options in (dict(max_patches=256), dict(size=64), dict(fit="keep")):
        with pytest.raises(ConfigError, match="knows the grid 8 x 8 alone"):
            tokenizer.encode(photos[0], **options)
    assert tokenizer.encode(photos[0], fit="squash") != tokenizer.encode(photos[1][:, :300], fit="crop")
    with pytest.raises(CodeError, match="another grid than 8 x 8"):
        tokenizer.decode([[1, 2, 3]], grid=(4, 4))


def test_large_pictures_are_decoded_a_few_at_a_time(tok):
    """Memory follows the patches that are decoded together."""
    at_once = []
    tok.pixel_head.register_forward_hook(lambda module, inputs, pixels: at_once.append(len(pixels)))
    for grid, expected in (((8, 8), [20]), ((32, 64), [4] * 5), ((128, 128), [1] * 2)):
        tok.decode([[1]] * sum(expected), grid=grid)
        assert at_once == expected
        at_once.clear()


def test_a_file_can_not_ask_for_a_huge_picture(tok, tmp_path, capsys):
    """One code on a huge grid: the decoder would compute every patch of it."""
    tok.save_pretrained(tmp_path / "model")
    hostile = {"codes": [[1]], "positions": [[0]], "grids": [[2000, 2000]]}
    (tmp_path / "codes.json").write_text(json.dumps(hostile))
    command = ["decode", str(tmp_path / "codes.json"), "-o", str(tmp_path / "huge.png")]
    assert main([*command, "--model", str(tmp_path / "model")]) == 1
    assert "the grid of image 0 is [2000, 2000], expected sides of at most 128 patches" in capsys.readouterr().err
    assert tok.decode([[1]], grid=(1, 128))[0].size == (1024, 8)  # as large as a vocabulary writes them


def test_parts_that_take_one_grid_alone_are_refused(small_config):
    import dataclasses

    good = any_grid_config(small_config)
    for part, name in [("selector", "selector.bias: fixed"), ("decoder", "decoder.position: rotary")]:
        section = getattr(small_config, part)
        section = dataclasses.replace(section, dither=1.0) if part == "selector" else section
        with pytest.raises(ConfigError, match=name):
            DynamicVisualTokenizer(dataclasses.replace(good, **{part: section}))


def test_tensors_have_one_grid(tok, shapes):
    pixels = torch.rand(2, 3, 48, 80)
    encoding = tok.encode_tensor(pixels, budget=10)
    assert encoding.grids.tolist() == [[6, 10]] * 2
    assert tok.decode_to_pixels(encoding).shape == (2, 3, 48, 80)
    with pytest.raises(ImageError, match="multiples of 8"):
        tok.encode_tensor(torch.rand(1, 3, 50, 80))
    with pytest.raises(CodeError, match="2 different grids"):
        tok.decode_to_features(tok.encode(shapes[:2]))


def test_saved_and_loaded(tok, shapes, tmp_path):
    tok.save_pretrained(tmp_path)
    again = DynamicVisualTokenizer.from_pretrained(tmp_path)
    assert again.any_grid and again.encode(shapes[:3]) == tok.encode(shapes[:3])
    assert "images of any shape, up to 64 patches" in repr(again)


def test_the_command_line_takes_shapes(tok, shapes, tmp_path, capsys):
    """Encode, decode and show, with the grid in the JSON file."""
    model, picture, codes = tmp_path / "model", tmp_path / "wide.png", tmp_path / "codes.json"
    tok.save_pretrained(model)
    shapes[1].save(picture)
    options = ["--model", str(model), "--max-patches", "128"]
    assert main(["encode", str(picture), "-o", str(codes), *options, "--places", "lattice"]) == 0
    written = json.loads(codes.read_text())
    rows, columns = written["grids"][0]
    assert 64 < rows * columns <= 128 and columns > rows
    assert main(["decode", str(codes), "-o", str(tmp_path / "again.png"), "--model", str(model)]) == 0
    assert Image.open(tmp_path / "again.png").size == (columns * 8, rows * 8)
    sheet = tmp_path / "sheet.png"
    assert main(["show", str(picture), str(picture), "-o", str(sheet), *options, "--columns", "2"]) == 0
    wide = Image.open(sheet)
    assert wide.width > 6 * 256 and wide.height < 256 + 60
    with pytest.raises(SystemExit):
        main(["encode", str(picture), "--model", str(model), "--size", "big"])
    assert main(["encode", str(picture), "--model", str(model), "--size", "64x4096"]) == 1
    assert "128 along a side" in capsys.readouterr().err
