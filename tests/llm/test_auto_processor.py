"""The processor through `AutoProcessor`: beside a language model, and beside a tokenizer of pictures alone."""

import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")
from support.loopback_hub import COMMIT, Hub, downloads, only_hub  # noqa: E402
from support.processors import made  # noqa: E402
from support.upload_hub import receive  # noqa: E402

from dyntok.errors import CheckpointError, CodeError, ConfigError  # noqa: E402
from dyntok.llm import VisualProcessor, extend_model  # noqa: E402

SIZES = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16)


def ids(processor, photo):
    return processor("a <image> cat", photo)["input_ids"].tolist()


def test_beside_a_language_model(tokenizer, photos, tmp_path):
    processor = made(tokenizer, "map", budget=9)
    config = transformers.LlamaConfig(vocab_size=processor.vocab.image_start, **SIZES)
    small = transformers.LlamaForCausalLM(config)
    extend_model(small, processor.vocab)
    small.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = transformers.AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is VisualProcessor and ids(again, photos[0]) == ids(processor, photos[0])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model(**again("a <image> cat", photos[0])).loss.isfinite()
    fewer = transformers.AutoProcessor.from_pretrained(tmp_path, budget=5)
    assert len(ids(fewer, photos[0])[0]) == len(ids(processor, photos[0])[0]) - 4


def test_beside_a_tokenizer_of_pictures(tokenizer, photos, tmp_path):
    processor = made(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    processor.vocab.save_pretrained(tmp_path)
    again = transformers.AutoProcessor.from_pretrained(tmp_path, max_tokens=7)
    assert len(ids(again, photos[0])[0]) < len(ids(processor, photos[0])[0])
    images, model = (
        kind.from_pretrained(tmp_path) for kind in (transformers.AutoImageProcessor, transformers.AutoModel)
    )
    tokens = model.get_image_tokens(images(photos[0])["pixel_values"], processor.vocab)
    assert tokens[0].tolist() == [id for id in ids(processor, photos[0])[0] if processor.vocab.is_visual(id)]


def test_what_does_not_fit_is_told(tokenizer, tmp_path):
    processor = made(tokenizer)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="pixels: no options of a processor of pictures"):
        transformers.AutoProcessor.from_pretrained(tmp_path, pixels=3)
    file = tmp_path / "processor_config.json"
    file.write_text(file.read_text().replace("placeholder", "place"))
    with pytest.raises(CheckpointError, match="holds place, expected some of budget"):
        VisualProcessor.from_pretrained(tmp_path)
    file.write_text('{"processor_class": "ChameleonProcessor"}')
    with pytest.raises(CheckpointError, match="belongs to another processor"):
        VisualProcessor.from_pretrained(tmp_path)
    file.unlink()
    (tmp_path / "dyntok.json").unlink()
    with pytest.raises((CheckpointError, CodeError), match="has no dyntok.json"):
        VisualProcessor.from_pretrained(tmp_path)


@pytest.fixture
def hub(tokenizer, tmp_path, monkeypatch):
    """Options for clients that know the loopback hub alone, with an empty cache. It holds a processor, and `photos`."""
    made(tokenizer, "map", budget=9).save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "photos")
    with only_hub({f"org/{name}": contents(tmp_path / name) for name in ("saved", "photos")}, monkeypatch):
        yield {"cache_dir": tmp_path / "cache", "token": False}


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_from_the_hub(hub, tokenizer, photos):
    processor = transformers.AutoProcessor.from_pretrained("org/saved", max_tokens=7, budget=None, **hub)
    assert type(processor) is VisualProcessor and "visual/model.safetensors" in downloads()
    assert ids(processor, photos[0]) == ids(made(tokenizer, "map", max_tokens=7), photos[0])
    Hub.requests.clear()
    again = transformers.AutoProcessor.from_pretrained("org/saved", local_files_only=True, **hub)
    assert ids(again, photos[0]) == ids(made(tokenizer, "map", budget=9), photos[0]) and Hub.requests == []


def test_a_tokenizer_of_pictures_from_the_hub(hub, tokenizer, photos):
    images, model = (
        kind.from_pretrained("org/photos", revision=COMMIT, **hub)
        for kind in (transformers.AutoImageProcessor, transformers.AutoModel)
    )
    tokens = model.get_image_tokens(images(photos[0])["pixel_values"])[0]
    assert torch.equal(tokens, tokenizer.encode(photos[0]).codes[0])
    assert all(COMMIT in request for request in Hub.requests if "/resolve/" in request)


def test_what_was_pushed_is_found(hub, tokenizer, photos, monkeypatch):
    """A process without transformers pushes a tokenizer of pictures; another one pushes a processor beside a model."""
    model_files = {"config.json": b"{}", "model.safetensors": b"of the language model"}
    with monkeypatch.context() as patch, receive(patch, {}) as received:
        patch.setitem(sys.modules, "transformers", None)
        tokenizer.push_to_hub("org/photos", token="hf_secret")
        Hub.repos["org/photos"] = dict(received.files)
    with monkeypatch.context() as patch:
        stale = {"visual/model-00001-of-00002.safetensors": b"old", **model_files}
        with receive(patch, stale) as received:
            made(tokenizer, "map", budget=9).push_to_hub("org/saved", token="hf_secret", commit_message="Processor")
            Hub.repos["org/saved"] = dict(received.files)
            assert received.commits[0][2][0] == "header Processor"
    assert model_files.items() <= Hub.repos["org/saved"].items() and not stale.keys() <= Hub.repos["org/saved"].keys()
    images, model = (
        kind.from_pretrained("org/photos", **hub) for kind in (transformers.AutoImageProcessor, transformers.AutoModel)
    )
    tokens = model.get_image_tokens(images(photos[0])["pixel_values"])[0]
    assert torch.equal(tokens, tokenizer.encode(photos[0]).codes[0])
    processor = transformers.AutoProcessor.from_pretrained("org/saved", **hub)
    assert ids(processor, photos[0]) == ids(made(tokenizer, "map", budget=9), photos[0])


def test_a_folder_is_pushed_with_what_the_auto_classes_need(hub, tokenizer, photos, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, receive(patch, {}) as received:
        tokenizer.save_pretrained(tmp_path / "own", push_to_hub=True, repo_id="org/photos", token="hf_secret")
        Hub.repos["org/photos"] = dict(received.files)
    images = transformers.AutoImageProcessor.from_pretrained("org/photos", **hub)
    assert images(photos[:2])["pixel_values"].shape == (2, 3, 64, 64)
