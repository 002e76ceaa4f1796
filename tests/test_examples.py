"""The example of a model that reads and writes pictures: two steps of training, its figures and its page."""

import json
import os
import subprocess
import sys
import tarfile
from itertools import islice
from pathlib import Path

import pytest

from dyntok import VisualVocab

pytest.importorskip("transformers")
FOLDER = Path(__file__).parents[1] / "examples" / "tiny_any_to_any"


@pytest.fixture
def photographs(tmp_path):
    """A tar of the first captioned photographs."""
    if "DYNTOK_DATA" not in os.environ:
        pytest.skip("DYNTOK_DATA names no folder of captioned photographs")
    (tmp_path / "captioned").mkdir()
    source = Path(os.environ["DYNTOK_DATA"]) / "captioned" / "captioned-000.tar"
    with tarfile.open(source) as tar, tarfile.open(tmp_path / "captioned" / "some.tar", "w") as some:
        for member in islice(tar, 2 * 320):
            some.addfile(member, tar.extractfile(member))
    return tmp_path / "captioned"


def run(script, *arguments):
    done = subprocess.run([sys.executable, FOLDER / script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_it_trains_on_pictures_with_maps_and_generates_some(photographs, tmp_path):
    output = tmp_path / "run"
    run("train.py", "--data", photographs, "-o", output, "--steps", "2")
    assert VisualVocab.from_pretrained(output / "model").layout == "map"
    judge = Path(os.environ["DYNTOK_DATA"]) / "teacher" / "mobilenetv2_100_imagenet.safetensors"
    run("generate.py", output, "--generations", "5", "--judge", judge)
    figures = json.loads((output / "figures.json").read_text())
    assert all(setting["share"] == 1 for setting in figures["with grammar"].values())
    assert figures["recognition"]["images"] == figures["matching"]["images"] > 10
    assert (output / "report.html").read_text().count("<img") == 24


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_is_used_where_it_is_fast(fast, monkeypatch):
    """Processors without its instructions are many times slower in it than in float32."""
    import torch
    import transformers

    monkeypatch.syspath_prepend(str(FOLDER))
    import model as example

    monkeypatch.setattr(example, "supports_bf16", lambda device: fast)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **sizes)).to(example.DEVICE)
    dtypes = []
    llama.lm_head.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    ids = torch.randint(0, 50, (2, 7))
    losses = example.token_losses(llama, ids, ids, position_ids=torch.arange(7).expand(2, 7), use_cache=False)
    assert losses.shape == (2, 6) and losses.device.type == example.DEVICE
    assert dtypes == [torch.bfloat16 if fast else torch.float32]
