"""Checkpoints on disk: round trips, shards, interrupted writes, damaged and hostile folders."""

import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.shards import save_in_shards
from torch import nn

from dyntok.checkpoint import format as checkpoint
from dyntok.checkpoint.fingerprint import fingerprint
from dyntok.config import BackboneConfig, TokenizerConfig
from dyntok.errors import CheckpointError, ConfigError

CONFIG = TokenizerConfig.preset("tiny")

IMAGES = "preprocessor_config.json"


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "backbone.weight": torch.randn(24, 12, generator=generator),
        "backbone.bias": torch.randn(24, generator=generator),
        "codebook.steps": torch.tensor(17),
        "codebook.used": torch.tensor([True, False, True]),
        "merger.half": torch.randn(5, generator=generator).half(),
        "merger.brain": torch.randn(5, generator=generator).bfloat16(),
        "merger.empty": torch.empty(0, 3),
    }


def unwritable_config():
    config = TokenizerConfig(backbone=BackboneConfig(kwargs={}))
    config.backbone.kwargs["drop"] = {
        1,
        2,
    }  # refused when a configuration is made, but a mapping can be changed afterwards
    return config


@pytest.fixture
def folder(tmp_path):
    checkpoint.save(tmp_path / "model", CONFIG, weights())
    return tmp_path / "model"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def same(got, expected):
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


def test_round_trip(folder):
    config, state = checkpoint.load(folder)
    assert config == CONFIG
    same(state, weights())
    assert names(folder) == ["config.json", "model.safetensors", IMAGES]


def test_config_json_says_what_it_is(folder):
    header = json.loads((folder / "config.json").read_text())
    assert list(header) == ["model_type", "format", "format_version", "dyntok_version", "kind", "fingerprint", "config"]
    assert header["format"] == "dyntok" and header["format_version"] == 1
    assert header["config"]["codebook"]["size"] == 8192
    assert header["fingerprint"] == fingerprint(CONFIG, weights())


def test_large_models_are_sharded(folder):
    state = {f"layer{i}": torch.full((100,), float(i)) for i in range(5)}
    save_in_shards(900, folder, CONFIG, state)
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert names(folder) == ["config.json", *shards, "model.safetensors.index.json", IMAGES]
    same(checkpoint.load(folder)[1], state)
    assert json.loads((folder / "model.safetensors.index.json").read_text())["metadata"] == {"total_size": 2000}

    save_in_shards(1000, folder, CONFIG, state)
    assert len(names(folder)) == 6 and "model-00003-of-00003.safetensors" in names(folder)
    checkpoint.save(folder, CONFIG, weights())
    assert names(folder) == ["config.json", "model.safetensors", IMAGES]
    same(checkpoint.load(folder)[1], weights())


def test_shard_size_counts_what_is_stored(tmp_path):
    state = {"a": torch.zeros(100), "b": torch.zeros(100)}
    save_in_shards(400, tmp_path, CONFIG, state, dtype=torch.float16)
    assert "model.safetensors" in names(tmp_path)


def test_floating_tensors_are_stored_as_asked(tmp_path):
    stated = checkpoint.save(tmp_path, CONFIG, weights(), dtype=torch.float16)
    _, state = checkpoint.load(tmp_path)
    assert state["backbone.weight"].dtype == state["merger.brain"].dtype == torch.float16
    assert state["codebook.steps"].dtype == torch.int64 and state["codebook.used"].dtype == torch.bool
    assert stated == fingerprint(CONFIG, state) != fingerprint(CONFIG, weights())


def test_tensors_that_share_memory_or_are_strided_survive(tmp_path):
    table = torch.arange(6.0).reshape(2, 3)
    state = {"a": table, "b": table, "c": table.t(), "d": nn.Parameter(table)}
    checkpoint.save(tmp_path, CONFIG, state)
    same(checkpoint.load(tmp_path)[1], {name: tensor.detach() for name, tensor in state.items()})


def test_only_what_the_auto_classes_can_load_is_told_to_them(folder):
    assert json.loads((folder / "config.json").read_text())["model_type"] == "dyntok"
    checkpoint.save(folder, CONFIG, weights(), kind="lavit")
    assert names(folder) == ["config.json", "model.safetensors"]
    assert "model_type" not in json.loads((folder / "config.json").read_text())


def test_other_files_in_the_folder_stay(folder):
    for name in ("README.md", "model.safetensors.backup", "samples.safetensors"):
        (folder / name).write_text("mine")
    (folder / "model-00007-of-00009.safetensors").write_text("old shard")
    (folder / "model-00001-of-00002.safetensors.tmp").write_text("left by a killed process")
    checkpoint.save(folder, CONFIG, weights(1))
    assert names(folder) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "model.safetensors.backup",
        IMAGES,
        "samples.safetensors",
    ]


def test_a_failed_write_leaves_the_old_checkpoint(folder, monkeypatch):
    calls = []

    def second_shard_fails(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(checkpoint, "save_file", second_shard_fails)
    with pytest.raises(CheckpointError, match="can't write the checkpoint to .*No space left"):
        save_in_shards(500, folder, CONFIG, weights(1))
    assert len(calls) == 2 and names(folder) == ["config.json", "model.safetensors", IMAGES]
    same(checkpoint.load(folder)[1], weights())


@pytest.mark.parametrize("moves", range(4))
def test_a_reader_never_sees_a_mixture(folder, monkeypatch, moves):
    """The process dies after so many files were moved into place: what is left is refused, or is the new checkpoint."""
    save_in_shards(400, folder, CONFIG, {f"old{i}": torch.zeros(100) for i in range(2)})
    new = {f"new{i}": torch.ones(100) for i in range(2)}
    done = []

    def killed(source, target):
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(target)
        os.rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            save_in_shards(400, folder, CONFIG, new)
    with pytest.raises(CheckpointError, match="has no config.json"):
        checkpoint.load(folder)
    save_in_shards(400, folder, CONFIG, new)
    same(checkpoint.load(folder)[1], new)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"state_dict": {}}, CheckpointError, "no tensors"),
        (
            {"state_dict": {"merger.a": torch.tensor([1.0, 70000.0])}, "dtype": torch.float16},
            CheckpointError,
            "merger.a has values up to 7e.04, too large for torch.float16",
        ),
        ({"state_dict": {"a": "text"}}, CheckpointError, "a is no dense tensor"),
        ({"state_dict": {"a": torch.zeros(2, device="meta")}}, CheckpointError, "a is no dense tensor"),
        ({"state_dict": {"a": torch.zeros(2).to_sparse()}}, CheckpointError, "a is no dense tensor"),
        ({"dtype": torch.int8}, ConfigError, "can't store weights as torch.int8"),
        ({"config": unwritable_config()}, ConfigError, "as JSON"),
    ],
    ids=["empty", "overflow", "text", "meta", "sparse", "dtype", "config"],
)
def test_what_can_not_be_stored_is_refused_and_nothing_written(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        checkpoint.save(tmp_path / "model", **({"config": CONFIG, "state_dict": weights()} | arguments))
    assert not (tmp_path / "model").exists()


def test_infinities_that_were_there_before_are_kept(tmp_path):
    state = {"mask": torch.tensor([0.0, -torch.inf, torch.nan])}
    checkpoint.save(tmp_path, CONFIG, state, dtype=torch.float16)
    assert str(checkpoint.load(tmp_path)[1]["mask"].tolist()) == "[0.0, -inf, nan]"


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "model").write_text("")
    with pytest.raises(CheckpointError, match="can't write the checkpoint"):
        checkpoint.save(tmp_path / "model", CONFIG, weights())


tensors = st.tuples(
    st.sampled_from(
        [torch.float16, torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    ),
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(0, 2**31),
).map(lambda t: (torch.rand(t[1], generator=torch.Generator().manual_seed(t[2])) * 9).to(t[0]))


@given(
    st.dictionaries(st.text("abc.", min_size=1, max_size=4), tensors, min_size=1, max_size=6),
    st.sampled_from([1, 100, 10**9]),
)
@settings(max_examples=30, deadline=None)
def test_any_state_dict_comes_back(tmp_path_factory, state, max_shard_size):
    folder = tmp_path_factory.mktemp("model")
    stated = save_in_shards(max_shard_size, folder, CONFIG, state)
    config, back = checkpoint.load(folder)
    same(back, state)
    assert stated == fingerprint(config, back)


BROKEN = {
    "no folder": (lambda f: [p.unlink() for p in f.iterdir()] and f.rmdir(), "there is no folder .*model; expected"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
    "not UTF-8": (lambda f: (f / "config.json").write_bytes(b'{"a": "\xff"}'), "config.json is not valid JSON"),
    "nested too deeply": (lambda f: (f / "config.json").write_text("[" * 200_000), "config.json is not valid JSON"),
    "no object": (lambda f: (f / "config.json").write_text("[]"), "holds a list, expected a JSON object"),
    "huge config": (lambda f: (f / "config.json").write_text(" " * 2_000_000), "larger than 1048576 bytes"),
    "another library's": (lambda f: (f / "config.json").write_text('{"model_type": "vit"}'), "is not of dyntok"),
    "newer format": (
        lambda f: edit(f, format_version=2, dyntok_version="9.1"),
        "format 2, written by dyntok 9.1; upgrade",
    ),
    "no version": (lambda f: edit(f, format_version=True), "format_version 'True', expected a positive integer"),
    "no configuration": (lambda f: edit(f, config=None), "the configuration is None"),
    "unknown key": (lambda f: edit(f, config={"codebook": {"sise": 3}}), "unknown codebook.sise"),
    "absurd number": (
        lambda f: edit(f, config={"image": {"mean": [10**400, 0, 0]}}),
        r"image.mean\[0\] is 1000.*expected a finite number",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "holds no weights; expected model.safetensors",
    ),
    "truncated": (lambda f: os.truncate(f / "model.safetensors", 500), "model.safetensors is damaged"),
    "merger.empty": (lambda f: os.truncate(f / "model.safetensors", 0), "model.safetensors is damaged"),
    "a pickle": (lambda f: torch.save({"a": torch.zeros(3)}, f / "model.safetensors"), "model.safetensors is damaged"),
}


@pytest.mark.parametrize("damage, message", BROKEN.values(), ids=BROKEN.keys())
def test_damaged_folders_are_explained(folder, damage, message):
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(folder)


@pytest.fixture
def sharded(tmp_path):
    save_in_shards(400, tmp_path, CONFIG, {f"layer{i}": torch.zeros(100) for i in range(3)})
    return tmp_path


def reindex(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of 3 shards: model-00002-of-00003.safetensors"):
        checkpoint.load(sharded)


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "model/../../x.safetensors",
        "model\\x.safetensors",
        "model.bin",
        "",
        "model.safetensors\n",
        None,
        5,
    ],
)
def test_shards_outside_the_folder_are_refused(sharded, name):
    reindex(sharded, {"layer0": name})
    with pytest.raises(CheckpointError, match="names the shard"):
        checkpoint.load(sharded)


@pytest.mark.parametrize("weight_map", [None, {}, ["a"]], ids=str)
def test_an_index_without_a_map_is_refused(sharded, weight_map):
    reindex(sharded, weight_map)
    with pytest.raises(CheckpointError, match="has no weight_map"):
        checkpoint.load(sharded)


def test_index_and_shards_must_agree(sharded):
    first = "model-00001-of-00003.safetensors"
    save_file({"layer0": torch.zeros(1), "layer1": torch.zeros(1)}, sharded / first)
    for weight_map in (
        {"layer0": first},
        {"layer0": first, "layer1": first, "layer2": first},
        {"layer8": first, "layer9": first},
    ):
        reindex(sharded, weight_map)
        with pytest.raises(CheckpointError, match="disagree about layer"):
            checkpoint.load(sharded)


@pytest.mark.skipif(os.name != "posix", reason="modes of files")
def test_weights_are_as_readable_as_other_files(tmp_path):
    checkpoint.save(tmp_path / "a", CONFIG, weights())
    modes = {path.stat().st_mode for path in (tmp_path / "a").iterdir()}
    (tmp_path / "plain").write_text("")
    assert modes == {(tmp_path / "plain").stat().st_mode}
