"""Tokenizers on disk and on the hub, and the fingerprint that ties codes to weights."""

import copy
import dataclasses
import json
import pickle
import re
import shutil
import socket

import pytest
import torch
from safetensors.torch import load_file
from support.upload_hub import COMMIT, receive

import dyntok
from dyntok import CheckpointError, ConfigError, DynamicVisualTokenizer, FingerprintError, loading
from dyntok.checkpoint import format as checkpoint
from dyntok.checkpoint import pretrained
from dyntok.checkpoint.fingerprint import fingerprint

FILES = ("config.json", "model.safetensors", "preprocessor_config.json")


def rounded(tokenizer):
    """A copy whose weights went through half precision."""
    twin = copy.deepcopy(tokenizer)
    twin.load_state_dict({name: value.half().float() for name, value in tokenizer.state_dict().items()})
    return twin


def test_the_fingerprint_follows_weights_and_configuration(tokenizer, photos):
    first = tokenizer.fingerprint
    assert re.fullmatch("[0-9a-f]{16}", first) and copy.deepcopy(tokenizer).fingerprint == first
    tokenizer.encode(photos[0])
    tokenizer.train().eval()
    tokenizer.double()
    assert tokenizer.fingerprint == first
    seen = {first, DynamicVisualTokenizer(tokenizer.config).fingerprint}
    tokenizer.half().float()
    seen.add(tokenizer.fingerprint)
    with torch.no_grad():
        tokenizer.codebook.embedding[3, 3] += 0.5
    seen.add(tokenizer.fingerprint)
    optimizer = torch.optim.SGD(tokenizer.parameters(), lr=0.1)
    tokenizer.pixel_head.proj.weight.sum().backward()
    optimizer.step()
    assert tokenizer.fingerprint in seen  # what reads codes may learn more
    optimizer.zero_grad()
    tokenizer.projection.weight.sum().backward()
    optimizer.step()
    seen.add(tokenizer.fingerprint)
    tokenizer.load_state_dict({name: value + 1 for name, value in tokenizer.state_dict().items()}, assign=True)
    assert len(seen | {tokenizer.fingerprint}) == 6


def test_the_fingerprint_is_not_worked_out_again_and_again(tokenizer, photos, monkeypatch):
    calls = []
    monkeypatch.setattr(pretrained, "fingerprint", lambda *args: calls.append(args) or fingerprint(*args))
    for _ in range(3):
        tokenizer.decode(tokenizer.encode(photos[:2]))
    assert len(calls) == 1


def test_the_configuration_cannot_be_replaced(tokenizer):
    """Codes of another configuration under the same fingerprint would be wrong without an error."""
    other = dataclasses.replace(tokenizer.config, image=dataclasses.replace(tokenizer.config.image, resize="squash"))
    with pytest.raises(
        ConfigError, match=r"cannot be replaced.*make a new tokenizer: DynamicVisualTokenizer\(config\)"
    ):
        tokenizer.config = other
    with pytest.raises(dataclasses.FrozenInstanceError):
        tokenizer.config.image.resize = "squash"
    assert tokenizer.config.image.resize == "crop"


def test_a_configuration_changed_by_force_changes_the_fingerprint(tokenizer):
    first = tokenizer.fingerprint
    object.__setattr__(tokenizer.config.image, "resize", "squash")
    squashed = tokenizer.fingerprint
    object.__setattr__(tokenizer.config.image, "resize", "crop")
    assert squashed != first == tokenizer.fingerprint
    tokenizer.config.backbone.kwargs["drop_rate"] = 0.5
    assert tokenizer.fingerprint not in (first, squashed)
    del tokenizer.config.backbone.kwargs["drop_rate"]


def test_pickles_of_the_same_tokenizer_are_equal_and_carry_no_hash(tokenizer):
    """What other libraries use as a key of their caches: it must not depend on addresses in memory."""
    before = pickle.dumps(tokenizer)
    first = tokenizer.fingerprint
    assert pickle.dumps(tokenizer) == before
    again = pickle.loads(before)
    with torch.no_grad():
        again.codebook.embedding.neg_()
    assert again.fingerprint != first and pickle.dumps(again) != before


def test_weights_made_in_inference_mode_have_a_fingerprint_too(tokenizer, checkpoint_folder, photos):
    with torch.inference_mode():
        loaded = dyntok.load(checkpoint_folder)
        assert loaded.encode(photos) == tokenizer.encode(photos)
        loaded.codebook.embedding.neg_()
        assert loaded.fingerprint != tokenizer.fingerprint


def test_saved_and_loaded_it_is_the_same(tokenizer, photos, tmp_path):
    tokenizer.train()
    tokenizer.save_pretrained(tmp_path / "new" / "folder")
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {"README.md", *FILES}
    for loaded in (
        dyntok.load(tmp_path / "new" / "folder"),
        DynamicVisualTokenizer.from_pretrained(str(tmp_path / "new" / "folder")),
    ):
        assert not any(module.training for module in loaded.modules()) and loaded.config == tokenizer.config
        assert loaded.fingerprint == tokenizer.fingerprint and loaded.encode(photos) == tokenizer.encode(photos)
        assert all(torch.equal(value, tokenizer.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_codes_are_defined_on_what_is_stored(tokenizer, photos, tmp_path):
    tokenizer.save_pretrained(tmp_path, dtype=torch.float16)
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}
    loaded, twin = dyntok.load(tmp_path), rounded(tokenizer)
    assert (
        loaded.dtype == torch.float32
        and loaded.fingerprint == twin.fingerprint == checkpoint.read_header(tmp_path)["fingerprint"]
    )
    encoding = loaded.encode(photos)
    assert encoding == twin.encode(photos)
    with pytest.raises(FingerprintError):
        tokenizer.decode(encoding)
    assert dyntok.load(tmp_path, dtype=torch.float64).dtype == torch.float64


def test_load_without_a_name_takes_the_bundled_one_and_no_network(checkpoint_folder, tokenizer, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("dyntok.loading.BUNDLED", checkpoint_folder)
    assert dyntok.load().fingerprint == tokenizer.fingerprint


def test_the_bundled_tokenizer_is_whole():
    if not (loading.BUNDLED / "model.safetensors").exists():
        pytest.skip("the bundled tokenizer is not trained yet")
    loaded = dyntok.load()
    assert (
        loaded.fingerprint == checkpoint.read_header(loading.BUNDLED)["fingerprint"] and loaded.pixel_head is not None
    )
    assert (loading.BUNDLED / "model.safetensors").stat().st_size < 20e6


def edit_config(folder, change):
    header = json.loads((folder / "config.json").read_text())
    change(header["config"])
    (folder / "config.json").write_text(json.dumps(header))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda config: config["backbone"].update(name="no_such_model"),
            "no tokenizer can be made from .*config.json: timm can't make",
        ),
        (lambda config: config["backbone"].update(layer=7), "backbone.layer is 7"),
        (
            lambda config: config["codebook"].update(size=128),
            r"1 of another shape: codebook.embedding \(checkpoint \[256, 8\]",
        ),
        (lambda config: config["merger"].update(depth=2), "missing: merger.blocks.1"),
        (lambda config: config["decoder"].update(pixels=False), "2 not expected: pixel_head.proj"),
        (lambda config: config.update(extra=1), "unknown extra"),
    ],
    ids=["model", "layer", "shape", "missing", "unexpected", "unknown"],
)
def test_what_does_not_fit_is_explained(checkpoint_folder, tmp_path, change, message):
    folder = shutil.copytree(checkpoint_folder, tmp_path / "copy")
    edit_config(folder, change)
    with pytest.raises(CheckpointError, match=message):
        dyntok.load(folder)


def test_a_failed_save_leaves_the_old_checkpoint_and_a_card_stays(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("my own words")
    before = tokenizer.fingerprint
    with torch.no_grad():
        tokenizer.projection.bias.add_(1e6)
    with pytest.raises(CheckpointError, match="projection.bias has values up to 1e\\+06"):
        tokenizer.save_pretrained(tmp_path, dtype=torch.float16)
    assert dyntok.load(tmp_path).fingerprint == before
    tokenizer.save_pretrained(tmp_path)
    assert dyntok.load(tmp_path).fingerprint == tokenizer.fingerprint != before
    assert (tmp_path / "README.md").read_text() == "my own words"
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="can't write"):
        tokenizer.save_pretrained(tmp_path / "file")
    with pytest.raises(TypeError, match="repo, which only push_to_hub=True uses"):
        tokenizer.save_pretrained(tmp_path, repo="org/name")


@pytest.fixture
def hub(monkeypatch):
    files = {".gitattributes": b"", "model-00001-of-00002.safetensors": b"old", "sheet.png": b"a picture"}
    with receive(monkeypatch, files) as hub:
        yield hub


def test_pushed_it_can_be_loaded_again(tokenizer, hub, photos, tmp_path):
    address = tokenizer.push_to_hub(
        "org/name", dtype=torch.float16, token="hf_secret", private=True, commit_message="My tokenizer"
    )
    assert address.endswith(f"/org/name/commit/{COMMIT}")
    ((path, authorization, done),) = hub.commits
    assert path == "/api/models/org/name/commit/main" and authorization == "Bearer hf_secret"
    assert done[0] == "header My tokenizer" and "deletedFile model-00001-of-00002.safetensors" in done
    assert set(hub.files) == {".gitattributes", "README.md", *FILES, "sheet.png"}
    assert b"library_name: dyntok" in hub.files["README.md"]
    for name, raw in hub.files.items():
        (tmp_path / name).write_bytes(raw)
    assert dyntok.load(tmp_path).encode(photos) == rounded(tokenizer).encode(photos)


def test_a_folder_is_pushed_with_its_own_card(tokenizer, hub, tmp_path):
    (tmp_path / "README.md").write_text("my own words")
    (tmp_path / "notes.txt").write_text("not for the hub")
    tokenizer.save_pretrained(tmp_path, push_to_hub=True, repo_id="org/name", token="hf_secret")
    assert hub.files["README.md"] == b"my own words" and "notes.txt" not in hub.files


def test_a_refused_push_is_explained(tokenizer, hub):
    with pytest.raises(CheckpointError, match="can't upload .* to the hub as 'forbidden/name': .*403"):
        tokenizer.push_to_hub("forbidden/name", token="hf_secret")
    assert hub.commits == []
    with pytest.raises(TypeError, match="unexpected keyword argument 'privat'"):
        tokenizer.push_to_hub("org/name", privat=True)


def test_a_codebook_that_was_replaced_twice_has_another_fingerprint(tokenizer):
    """The second one may get the address in memory that the first one had."""
    codebook = tokenizer.codebook
    for seed in range(8):
        codebook.embedding = codebook.embedding.clone()
        before = tokenizer.fingerprint
        codebook.embedding = torch.randn(codebook.embedding.shape, generator=torch.Generator().manual_seed(seed))
        codebook.embedding = torch.nn.functional.normalize(codebook.embedding, dim=-1)
        assert before != tokenizer.fingerprint == fingerprint(tokenizer.config, tokenizer.state_dict())


def test_the_home_folder_may_be_a_tilde(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    tokenizer.save_pretrained("~/mine")
    assert (tmp_path / "mine" / "config.json").is_file()
    assert dyntok.load("~/mine").fingerprint == tokenizer.fingerprint
