"""LaVIT's files from a hub: the real client, a local server, and downloads that break off."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.lavit_files import write_release
from support.loopback_hub import COMMIT, Hub, downloads, only_hub

import dyntok
from dyntok import CheckpointError
from dyntok.lavit.release import FILES, RELEASES

NAME = RELEASES[0]
ENCODING = sorted([FILES["backbone"], FILES["encoder"]])


@pytest.fixture
def hub(parity, tmp_path, monkeypatch):
    """Options of `dyntok.load` for a client that knows the loopback hub alone, with an empty cache."""
    folder = write_release(parity, tmp_path / "release")
    files = {path: (folder / path).read_bytes() for path in FILES.values()}
    extra = {"language_model/model-00001.safetensors": b"gigabytes", "README.md": b"card"}
    monkeypatch.setattr(Hub, "torn", set())
    with only_hub({NAME: files | extra}, monkeypatch):
        yield {"config": parity.config, "cache_dir": tmp_path / "cache", "token": False}


def test_only_what_is_needed_is_asked_for(hub, parity):
    tokenizer = dyntok.load(NAME, **hub)
    assert downloads() == ENCODING
    enc = tokenizer.encode_tensor(parity["io/pixels"])
    assert torch.equal(enc.packed_codes, parity["io/codes"]) and downloads() == ENCODING
    tokenizer.decode_to_features(enc)
    assert downloads() == sorted([*ENCODING, FILES["decoder"]])
    tokenizer.features_tensor(parity["io/pixels"], path="understanding")
    assert downloads() == sorted([*ENCODING, FILES["decoder"], FILES["understanding"]])
    Hub.requests.clear()
    again = dyntok.load(NAME, local_files_only=True, **hub)
    again.decode_to_features(enc)
    assert Hub.requests == []
    with pytest.raises(CheckpointError, match="it is not in the local cache"):
        again.decode_to_features(enc, highres=True)


def test_a_revision_is_pinned_for_parts_that_come_later(hub, parity):
    tokenizer = dyntok.load(NAME, revision=COMMIT, **hub)
    tokenizer.part("decoder")
    assert all(f"/resolve/{COMMIT}/" in request for request in Hub.requests if "/resolve/" in request)
    with pytest.raises(CheckpointError, match="'v9': it has no such revision"):
        dyntok.load(NAME, revision="v9", **hub)


def test_an_interrupted_download_goes_on_where_it_broke_off(hub, parity, monkeypatch):
    monkeypatch.setattr(
        "huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 4096
    )  # the file is smaller than the client's usual chunk
    Hub.torn = {FILES["encoder"]}
    size = len(Hub.repos[NAME][FILES["encoder"]])
    tokenizer = dyntok.load(NAME, **hub)
    resumed = [int(request.split()[1]) for request in Hub.requests if request.startswith("RANGE")]
    assert resumed and all(0 < start < size for start in resumed)
    assert torch.equal(tokenizer.encode_tensor(parity["io/pixels"]).packed_codes, parity["io/codes"])


def test_a_file_that_the_repository_lacks(hub, parity):
    del Hub.repos[NAME][FILES["encoder"]]
    with pytest.raises(CheckpointError, match=f"{NAME} on the hub has no {FILES['encoder']}"):
        dyntok.load(NAME, **hub)


def test_a_hostile_file_of_the_hub_is_refused(hub, parity):
    Hub.repos[NAME][FILES["encoder"]] = b"cos\nsystem\n(S'exit 1'\ntR."
    with pytest.raises(CheckpointError, match="is damaged or holds more than tensors"):
        dyntok.load(NAME, **hub)


def test_with_nothing_but_the_hub_s_own_environment(hub, parity, tmp_path):
    import huggingface_hub

    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": huggingface_hub.constants.ENDPOINT,
        "HF_HOME": str(tmp_path / "home"),
        "NO_PROXY": "127.0.0.1",
    }
    code = f"import dyntok; print(dyntok.load({NAME!r}, config={parity.config}).grid)"
    root = Path(dyntok.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.strip() == "(5, 5)", done.stderr


def test_a_diffusion_model_is_fetched_when_pictures_are_wanted_and_nothing_else_of_its_folder(hub, parity, tmp_path):
    pytest.importorskip("diffusers")
    from support import diffusion_files

    folder = diffusion_files.write_release(tmp_path / "diffusion", cross_attention_dim=24)
    diffusion = {
        f"pixel_decoding/{path.relative_to(folder).as_posix()}": path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    Hub.repos[NAME] |= diffusion | {"pixel_decoding/safety_checker/model.bin": b"gigabytes"}
    tokenizer = dyntok.load(NAME, **hub)
    enc = tokenizer.encode_tensor(parity["io/pixels"][:1])
    assert downloads() == ENCODING
    assert tokenizer.decode(enc, steps=1)[0].size == (8, 8)
    assert downloads() == sorted([*ENCODING, FILES["decoder"], *diffusion])


def test_the_commit_stays_the_same_for_parts_that_come_later(hub):
    tokenizer = dyntok.load(NAME, **hub)
    assert tokenizer.origin.revision == COMMIT
    Hub.requests.clear()
    tokenizer.part("decoder")
    assert Hub.requests and all(f"/resolve/{COMMIT}/" in request for request in Hub.requests if "/resolve/" in request)
