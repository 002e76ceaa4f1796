"""Codes know the picture that they were made of: its size, the part that was used, and how it met its grid."""

import json

import numpy as np
import pytest
from PIL import Image
from support.any_grid import any_grid_tokenizer
from support.batch_data import run

import dyntok
from dyntok import CodeError, Encoding
from dyntok.batch import read
from dyntok.cli.main import main
from dyntok.original import Original

SIZES = [(240, 180), (111, 166), (300, 100), (64, 64)]  # width, height


@pytest.fixture(scope="module")
def tok(small_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    any_grid_tokenizer(small_config).save_pretrained(folder)
    return dyntok.load(folder)


@pytest.fixture(scope="module")
def pictures(photos):
    return [Image.fromarray(photos[i]).resize(size) for i, size in enumerate(SIZES)]


@pytest.mark.parametrize("fit", ["keep", "crop", "squash", "pad"])
def test_every_picture_comes_back_in_its_size(tok, pictures, fit):
    encoding = tok.encode(pictures, fit=fit, size=(48, 96))
    assert [original.size for original in encoding.originals] == [(height, width) for width, height in SIZES]
    assert {original.fit for original in encoding.originals} == {fit}
    again = tok.decode(encoding, size="original")
    assert [picture.size for picture in again] == SIZES
    left, top, right, bottom = encoding.originals[0].crop_box
    assert (left, top, right, bottom) == ((0, 30, 240, 150) if fit == "crop" else (0, 0, 240, 180))
    outside = np.asarray(again[0]).astype(int)[[0, -1]]
    assert (outside == 128).all() == (fit == "crop")


def test_padding_is_cut_off_again():
    """With every patch kept, the borders of a padded picture show the picture, not the white around it."""
    flex, dark = dyntok.load(), Image.new("RGB", (300, 100), (20, 60, 40))
    encoding = flex.encode(dark, fit="pad", size=(128, 128), budget=1.0)
    assert np.asarray(flex.decode(encoding)[0])[:30].mean() > 200
    (again,) = flex.decode(encoding, size="original")
    assert again.size == (300, 100) and np.asarray(again).max(-1).mean() < 100


def test_the_part_that_was_used_is_at_its_place():
    """Of a picture that is black, then white, then black, the crop shows the white."""
    picture = Image.new("RGB", (384, 128))
    picture.paste("white", (128, 0, 256, 128))
    flex = dyntok.load()
    (again,) = flex.decode(flex.encode(picture, fit="crop", size=128, budget=1.0), size="original")
    columns = np.asarray(again).mean((0, 2))
    assert (columns[:128] == 128).all() and (columns[256:] == 128).all() and columns[136:248].mean() > 230


def test_rows_and_batches_keep_theirs(tok, pictures):
    encoding = tok.encode(pictures)
    assert encoding[2].originals == encoding.originals[2:3] and encoding[[3, 0]].originals[1].size == (180, 240)
    assert Encoding.cat(encoding).originals == encoding.originals
    assert Encoding.cat([encoding, tok.encode_tensor(np_pixels(tok))]).originals is None
    with_failure = tok.encode([b"no picture", pictures[1]], errors="skip")
    assert [original.size for original in with_failure.originals] == [(166, 111)]


def np_pixels(tok):
    from dyntok.image import to_pixels

    return to_pixels(dyntok.example_image(), tok.image_config())[None]


def test_json_and_the_command_line(tok, pictures, tmp_path, capsys):
    for i, picture in enumerate(pictures[:2]):
        picture.save(tmp_path / f"{i}.png")
    names = [str(tmp_path / f"{i}.png") for i in range(2)]
    assert main(["encode", *names, "-o", str(tmp_path / "codes.json"), "--fit", "crop"]) == 0
    values = json.loads((tmp_path / "codes.json").read_text())
    assert values["originals"][1] == {"size": [166, 111], "crop_box": [0, 27, 111, 138], "fit": "crop"}
    del values["sources"]
    assert Encoding.from_dict(values).to_dict() == values
    decode = ["decode", str(tmp_path / "codes.json"), "-o", str(tmp_path / "again")]
    assert main([*decode, "--size", "original"]) == 0
    assert [Image.open(tmp_path / "again" / f"0000{i}.png").size for i in range(2)] == SIZES[:2]
    assert main([*decode, "--size", "30x40"]) == 0
    assert Image.open(tmp_path / "again" / "00000.png").size == (40, 30)


def test_codes_that_do_not_say_it(tok, pictures, tmp_path, capsys):
    """Files of earlier versions have no originals, and load as before."""
    values = tok.encode(pictures).to_dict()
    del values["originals"]
    before = Encoding.from_dict(values)
    assert before == tok.encode(pictures) and before.originals is None and before.to_dict()["originals"] is None
    with pytest.raises(CodeError, match="do not say how large their pictures were"):
        tok.decode(before, size="original")
    (tmp_path / "codes.json").write_text("[[1, 2, 3]]")
    assert main(["decode", str(tmp_path / "codes.json"), "-o", str(tmp_path / "a.png"), "--size", "original"]) == 1
    assert "give size=(height, width)" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["parquet", "webdataset"])
@pytest.mark.parametrize("options", [{}, {"fit": "pad"}, {"fit": "crop", "size": (48, 96)}], ids=str)
def test_data_sets_agree_with_encode(form, options, tok, pictures, tmp_path):
    (tmp_path / "in").mkdir()
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / "in" / f"{i}.png")
    run(tmp_path / "in", tmp_path / "out", tok, format=form, **options)
    (batch,) = read(tmp_path / "out")
    wanted = tok.encode(pictures, **options)
    assert batch.encoding == wanted
    found = [(original.size, original.crop_box) for original in batch.encoding.originals]
    assert found == [(original.size, original.crop_box) for original in wanted.originals]
    pairs = zip(tok.decode(batch.encoding, size="original"), tok.decode(wanted, size="original"), strict=True)
    assert all(np.array_equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(
    "values",
    [
        {"size": [0, 5], "crop_box": [0, 0, 5, 5]},
        {"size": [5, 2**30], "crop_box": [0, 0, 5, 5]},
        {"size": [5, 5], "crop_box": [0, 0, 6, 5]},
        {"size": [5, 5], "crop_box": [3, 0, 3, 5]},
        {"size": [5, 5], "crop_box": [0, 0, 5]},
        {"size": [5, True], "crop_box": [0, 0, 1, 5]},
        {"size": [5, 5], "crop_box": [0, 0, 5, 5], "fit": "stretch"},
        {"size": [5, 5]},
        "5x5",
    ],
    ids=str,
)
def test_values_that_no_picture_has(values):
    with pytest.raises(CodeError, match="original"):
        Encoding.from_dict({"codes": [[1]], "grids": [[1, 1]], "originals": [values]})


def test_one_for_each_image(tok, pictures):
    encoding = tok.encode(pictures[:2])
    with pytest.raises(CodeError, match="expected an Original for each image"):
        Encoding.pack(encoding.codes, None, encoding.grids, originals=encoding.originals[:1])
    huge = Encoding.pack([[1]], [[0]], (1, 1), originals=[Original((2**20, 2**20), (0, 0, 5, 5))])
    with pytest.raises(CodeError, match="give a smaller size"):
        tok.decode(huge, size="original")


def test_padding_of_a_tokenizer_with_one_grid(tokenizer, pictures):
    again = tokenizer.decode(tokenizer.encode(pictures, fit="pad"), size="original")
    assert [picture.size for picture in again] == SIZES
