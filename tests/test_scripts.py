"""The scripts of `examples/`, as a reader runs them."""

import runpy
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.batch_data import pictures, run, write_folder, write_table

import dyntok

FOLDER = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="the package was installed without its checkout")


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Runs a script with arguments, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def start(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(FOLDER / name), run_name="__main__")

    return start


@pytest.fixture(scope="module")
def codes(photos, tmp_path_factory):
    """Codes of the bundled tokenizer, with captions."""
    place = tmp_path_factory.mktemp("codes")
    write_folder(place / "in", pictures(photos))
    run(str(place / "in"), str(place / "out"), None, keep_columns=("txt",), max_tokens=40)
    return place / "out"


@pytest.fixture
def language_model(tmp_path):
    """A small Llama with a tokenizer of its own, on disk."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = {letter: i for i, letter in enumerate(["<unk>", "</s>", *map(chr, range(32, 127))])}
    plain = Tokenizer(models.BPE(letters, [], unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="</s>")
    words.save_pretrained(tmp_path / "base")
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, head_dim=32)
    config = transformers.LlamaConfig(vocab_size=len(words), eos_token_id=1, pad_token_id=None, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_scripts_are_short():
    for path in FOLDER.glob("*.py"):
        assert len(path.read_text().splitlines()) < 80, path.name


def test_codes_in_a_training_loop_of_your_own(script, codes, tmp_path, capsys):
    script("nanogpt.py", codes, "--steps", 2, "--block", 64, "-o", tmp_path / "pictures")
    assert "step 1: loss" in capsys.readouterr().out
    sizes = [Image.open(tmp_path / "pictures" / f"{i}.png").size for i in (0, 1)]  # the model chooses the grids
    assert all(side % 8 == 0 and 0 < side <= 1024 for size in sizes for side in size)


def test_a_language_model_learns_captions_and_pictures(script, codes, language_model, tmp_path):
    script("finetune.py", codes, "--model", language_model, "--steps", 2, "--length", 256, "-o", tmp_path / "model")
    vocab = dyntok.VisualVocab.from_pretrained(tmp_path / "model")
    assert vocab.fingerprint == dyntok.load().fingerprint
    assert (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_vllm_serves_what_was_trained(script, codes, language_model, tmp_path, monkeypatch):
    pytest.importorskip("vllm")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, where it runs on a CPU
    script("finetune.py", codes, "--model", language_model, "--steps", 1, "--length", 256, "-o", tmp_path / "model")
    script("serve.py", tmp_path / "model", "a cat", "a red chair", "--max-tokens", 20, "-o", tmp_path / "pictures")
    sizes = [Image.open(tmp_path / "pictures" / f"{i}.png").size for i in (0, 1)]  # the model chooses the grids
    assert all(side % 8 == 0 and 0 < side <= 1024 for size in sizes for side in size)


def test_a_stream_becomes_codes(script, photos, tmp_path, capsys):
    pytest.importorskip("datasets")
    write_table(tmp_path / "images.parquet", {**pictures(photos), "broken": b"no picture"})
    script("tokenize_stream.py", tmp_path / "images.parquet", tmp_path / "codes", "--columns", "txt", "--shard", 16)
    tables = [pq.read_table(path) for path in sorted((tmp_path / "codes").glob("*.parquet"))]
    assert [table.num_rows for table in tables] == [16, 5] and "1 pictures failed" in capsys.readouterr().out
    captions = [caption for table in tables for caption in table["txt"].to_pylist()]
    assert captions[0].startswith("caption of a/") and len(set(captions)) == 21
    assert all(len(codes) for codes in tables[0]["codes"].to_pylist())
