"""Tokenizers of pictures through the `Auto` classes of transformers."""

import json
import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")
from support.any_grid import any_grid_tokenizer  # noqa: E402

from dyntok.errors import ConfigError  # noqa: E402
from dyntok.llm.auto_processors import DyntokImageProcessor  # noqa: E402
from dyntok.vocab import VisualVocab  # noqa: E402


@pytest.fixture
def folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_the_auto_classes_find_a_checkpoint(folder, tokenizer, photos):
    images = transformers.AutoImageProcessor.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder)
    inputs = images(photos[:3], return_tensors="pt").to("cpu")
    assert isinstance(inputs, transformers.BatchFeature) and inputs.pixel_values.shape == (3, 3, 64, 64)
    encoding = tokenizer.encode(photos[:3])
    tokens = model.get_image_tokens(inputs["pixel_values"])
    assert all(map(torch.equal, tokens, encoding.codes)) and len(tokens) == 3
    vocab = VisualVocab.of(tokenizer, after=100, layout="positions")
    ids = model.get_image_tokens(inputs["pixel_values"], vocab)
    assert vocab.to_encoding(ids) == encoding
    again = tokenizer.decode(encoding)
    pictures = model.decode_image_tokens(ids, vocab)
    assert [picture.tobytes() for picture in pictures] == [picture.tobytes() for picture in again]
    assert len(model.get_image_tokens(inputs["pixel_values"], policy={"budget": 5})[0]) == 5
    assert model(inputs["pixel_values"]).shape == (3, 64, 48)


def test_one_picture_and_other_types(folder, photos):
    images = transformers.AutoImageProcessor.from_pretrained(folder)
    assert images(photos[0], return_tensors="np")["pixel_values"].shape == (1, 3, 64, 64)
    assert [row.shape for row in images(photos[:2], return_tensors=None)["pixel_values"]] == [(3, 64, 64)] * 2
    with pytest.raises(ConfigError, match="do_resize is not possible"):
        images(photos[0], do_resize=False)


@pytest.mark.parametrize("layout", ["map", "lattice", "positions"])
def test_pictures_of_several_shapes(layout, small_config, photos, tmp_path):
    tokenizer = any_grid_tokenizer(small_config)
    tokenizer.save_pretrained(tmp_path)
    images = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    model = transformers.AutoModel.from_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"fitted to 2 shapes, such as \(48, 72\) and \(64, 64\).*return_tensors=None"
    ):
        images(photos[:2])
    pixels = images(photos[:2], return_tensors=None)["pixel_values"]
    vocab = VisualVocab.of(tokenizer, after=100, layout=layout)
    places = None if layout == "positions" else layout
    encoding = tokenizer.encode(photos[:2], places=places)
    ids = model.get_image_tokens(pixels, vocab)
    assert vocab.to_encoding(ids) == encoding
    assert [picture.size for picture in model.decode_image_tokens(ids, vocab)] == [
        picture.shape[:0:-1] for picture in pixels
    ]
    assert all(map(torch.equal, model.get_image_tokens(pixels), tokenizer.encode(photos[:2]).codes))


def test_the_processor_saves_and_loads_again(folder, photos, tmp_path):
    images = transformers.AutoImageProcessor.from_pretrained(folder)
    images.save_pretrained(tmp_path / "again")
    again = DyntokImageProcessor.from_pretrained(tmp_path / "again")
    assert torch.equal(images(photos[0])["pixel_values"], again(photos[0])["pixel_values"])


def test_what_it_saves_is_what_the_checkpoint_has(folder, tmp_path):
    written = json.loads((folder / "preprocessor_config.json").read_text())
    transformers.AutoImageProcessor.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "preprocessor_config.json").read_text()) == written


def test_other_options_are_refused(folder):
    with pytest.raises(ConfigError, match="device_map: no options of a tokenizer"):
        transformers.AutoModel.from_pretrained(folder, device_map="auto")


def test_the_room_does_not_import_transformers():
    code = "import sys, dyntok.llm; raise SystemExit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_image_tokens_can_be_trained_with(folder, photos):
    model = transformers.AutoModel.from_pretrained(folder)
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)(photos[:1], return_tensors="pt")["pixel_values"]
    (tokens,) = model.get_image_tokens(pixels)
    torch.nn.Embedding(256, 4)(tokens).sum().backward()
    tokens[0] = 0
