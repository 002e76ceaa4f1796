"""The processor through `AutoProcessor`: beside a language model, and beside a tokenizer of pictures alone."""

import json
import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")
from support.processors import made  # noqa: E402

import dyntok.llm.auto as auto  # noqa: E402
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
    auto.add_transformers_files(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    processor.vocab.save_pretrained(tmp_path)
    again = transformers.AutoProcessor.from_pretrained(tmp_path, max_tokens=7)
    assert len(ids(again, photos[0])[0]) < len(ids(processor, photos[0])[0])
    images, model = (
        kind.from_pretrained(tmp_path) for kind in (transformers.AutoImageProcessor, transformers.AutoModel)
    )
    tokens = model.get_image_tokens(images(photos[0])["pixel_values"], processor.vocab)
    assert tokens[0].tolist() == [id for id in ids(processor, photos[0])[0] if processor.vocab.is_visual(id)]


@pytest.mark.slow
def test_another_program_needs_one_import_and_no_remote_code(tokenizer, photos, tmp_path):
    processor = made(tokenizer, max_tokens=5)
    processor.save_pretrained(tmp_path)
    torch.save(torch.from_numpy(photos[0]), tmp_path / "photo.pt")
    program = """
import sys, torch, transformers, dyntok.llm.auto
processor = transformers.AutoProcessor.from_pretrained(sys.argv[1], local_files_only=True)
photo = torch.load(sys.argv[1] + "/photo.pt", weights_only=True).numpy()
print(processor("a <image> cat", photo)["input_ids"].tolist())
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert json.loads(done.stdout) == ids(processor, photos[0]), done.stderr


def test_what_does_not_fit_is_told(tokenizer, tmp_path):
    processor = made(tokenizer)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="size: no options of a processor of pictures"):
        transformers.AutoProcessor.from_pretrained(tmp_path, size=3)
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
