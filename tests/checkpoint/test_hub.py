"""`Origin.resolve` with the real hub client, over HTTP, against a small hub on this machine's loopback interface."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from support.loopback_hub import COMMIT, TOKEN, Hub, downloads, serve
from support.shards import save_in_shards

from dyntok.checkpoint import format as checkpoint
from dyntok.checkpoint.hub import Origin
from dyntok.config import TokenizerConfig
from dyntok.errors import CheckpointError

CONFIG = TokenizerConfig.preset("tiny")
STATE = {f"layer{i}": torch.full((100,), float(i)) for i in range(3)}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    checkpoint.save(folder / "whole", CONFIG, STATE)
    save_in_shards(400, folder / "sharded", CONFIG, STATE)
    extra = {
        "README.md": b"card",
        "pytorch_model.bin": b"pickle",
        "unet/model.safetensors": b"big",
        "model/x.safetensors": b"big",
        "run.py": b"code",
    }
    whole = contents(folder / "whole")
    Hub.repos = {
        "org/whole": whole | extra,
        "org/sharded": contents(folder / "sharded"),
        "org/private": whole,
        "org/vit": {"config.json": b'{"model_type": "vit"}', "model.safetensors": b"gigabytes"},
        "org/bare": {"README.md": b"card"},
    }
    with serve() as address:
        yield address


@pytest.fixture
def hub(endpoint, tmp_path, monkeypatch):
    """resolve, with the client pointed at the loopback hub by its own `endpoint` option and at an empty cache."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", functools.partial(huggingface_hub.snapshot_download, endpoint=endpoint)
    )
    Hub.requests.clear()
    Hub.tokens.clear()
    defaults = {"cache_dir": tmp_path / "cache", "token": False}
    return lambda name, **options: Origin(name, **defaults | options).resolve()[0]


def check(folder):
    config, state = checkpoint.load(folder)
    assert config == CONFIG and all(torch.equal(state[name], tensor) for name, tensor in STATE.items())


def test_a_repository_is_downloaded_and_cached(hub, tmp_path):
    folder = hub("org/whole")
    check(folder)
    assert downloads() == ["README.md", "config.json", "model.safetensors"]
    assert folder.is_relative_to(tmp_path / "cache")
    Hub.requests.clear()
    assert hub("org/whole", local_files_only=True) == folder and Hub.requests == []
    assert hub("org/whole") == folder and downloads() == []
    assert hub("org/whole", force_download=True) == folder and "model.safetensors" in downloads()


def test_shards_are_downloaded(hub):
    check(hub("org/sharded"))
    assert len([name for name in downloads() if name.startswith("model-")]) == 3


def test_a_commit_can_be_named(hub):
    check(hub("org/whole", revision=COMMIT))


def test_weights_of_another_library_are_not_downloaded(hub):
    with pytest.raises(CheckpointError, match="org/vit on the hub can't be used: .*is not of dyntok"):
        hub("org/vit")
    with pytest.raises(CheckpointError, match="org/bare on the hub can't be used: it has no config.json"):
        hub("org/bare")
    assert downloads() == ["config.json"]


def test_a_private_repository_needs_the_token(hub):
    with pytest.raises(CheckpointError, match="'org/private': it does not exist or is private.*token"):
        hub("org/private")
    with pytest.raises(CheckpointError) as caught:
        hub("org/private", token="hf_wrong")
    assert "hf_wrong" not in str(caught.value)
    check(hub("org/private", token=TOKEN))
    assert f"Bearer {TOKEN}" in Hub.tokens


@pytest.mark.parametrize(
    "name, options, message",
    [
        (
            "org/none",
            {},
            "no folder 'org/none' on this machine; .*: it does not exist or is private.*token=.*works without",
        ),
        ("org/whole", {"revision": "v9"}, "'org/whole' at revision 'v9': it has no such revision"),
        ("org/gated", {}, "'org/gated': it is gated; ask for access"),
        ("org/whole", {"local_files_only": True}, "it is not in the local cache"),
    ],
    ids=["missing", "revision", "gated", "cache"],
)
def test_what_the_hub_refuses_is_explained(hub, name, options, message):
    with pytest.raises(CheckpointError, match=message):
        hub(name, **options)


def test_no_network_is_explained_unless_the_cache_has_it(hub, monkeypatch):
    folder = hub("org/whole")
    closed = functools.partial(huggingface_hub.snapshot_download.func, endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", closed)
    assert hub("org/whole") == folder
    with pytest.raises(CheckpointError, match="the hub can't be reached.*works without the hub"):
        hub("org/sharded")


def test_any_other_trouble_is_named(hub, monkeypatch):
    def out_of_space(*_, **__):
        raise OSError("No space left on device\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", out_of_space)
    with pytest.raises(CheckpointError, match="'org/whole': OSError: No space left on device. The path"):
        hub("org/whole")


def test_a_folder_needs_no_hub(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub(tmp_path) == hub(str(tmp_path)) == hub("~") == tmp_path
    assert Hub.requests == []


@pytest.mark.parametrize(
    "name", ["./models/mine", "/no/such/folder", "a/b/c", "", "with space", "org/na\0me", "x" * 5000], ids=range(7)
)
def test_neither_folder_nor_repository(hub, name):
    with pytest.raises(CheckpointError, match="neither a folder on this machine nor the name of a hub repository"):
        hub(name)
    assert Hub.requests == []


def test_files_and_missing_paths_are_not_looked_up(hub, tmp_path):
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(CheckpointError, match="model.safetensors is a file; expected the folder"):
        hub(str(tmp_path / "model.safetensors"))
    with pytest.raises(CheckpointError, match="org/whole is not there"):
        hub(Path("org/whole"))
    assert Hub.requests == []


def test_it_works_with_nothing_but_the_hub_s_own_environment(endpoint, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    code = """
from dyntok.checkpoint import format, hub
print(len(format.load(hub.Origin('org/sharded').resolve()[0])[1]))
"""
    root = Path(checkpoint.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.strip() == "3", done.stderr
