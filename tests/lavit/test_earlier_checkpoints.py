"""Checkpoints of LaVIT by earlier versions, whose config.json has no kind: they load with the same fingerprint."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.lavit_files import write_release

import dyntok
from dyntok import CheckpointError, DynamicVisualTokenizer
from dyntok.lavit.convert import convert
from dyntok.lavit.tokenizer import LavitTokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
FINGERPRINT = "59d1c77ad44fd8b6"


@pytest.fixture(scope="module")
def earlier(parity, tmp_path_factory):
    """A folder with the config.json of before; the tensors have kept their names."""
    folder = tmp_path_factory.mktemp("earlier")
    release = write_release(parity, tmp_path_factory.mktemp("release"))
    convert(release, folder, config=parity.config)
    shutil.copy(FIXTURES / "lavit_converted_config.json", folder / "config.json")
    return folder


def without(folder, target, change):
    """A copy of the folder with a changed config.json."""
    shutil.copytree(folder, target)
    header = json.loads((target / "config.json").read_text())
    change(header)
    (target / "config.json").write_text(json.dumps(header))
    return target


def test_it_loads_as_lavits_tokenizer_with_every_part(earlier, parity):
    tokenizer = dyntok.load(earlier)
    assert isinstance(tokenizer, LavitTokenizer) and tokenizer.fingerprint == FINGERPRINT
    enc = tokenizer.encode_tensor(parity["io/pixels"])
    assert torch.equal(enc.packed_codes, parity["io/codes"])
    assert parity.error("io/decoder_highres_pooled", tokenizer.decode_to_conditioning(enc, highres=True)[1]) < 1e-4
    understanding = tokenizer.features_tensor(parity["io/pixels"], path="understanding")
    assert parity.error("io/continuous_features", understanding.tokens) < 1e-4


def test_saved_again_it_says_what_it_is(earlier, tmp_path):
    dyntok.load(earlier).save_pretrained(tmp_path)
    header = json.loads((tmp_path / "config.json").read_text())
    assert header["kind"] == "lavit" and header["fingerprint"] == FINGERPRINT
    assert isinstance(dyntok.load(tmp_path), LavitTokenizer)
    with pytest.raises(
        CheckpointError, match="a tokenizer of the kind 'lavit', expected 'dynamic'; load it with dyntok"
    ):
        DynamicVisualTokenizer.from_pretrained(tmp_path)


def test_a_kind_of_a_later_version_is_refused(earlier, tmp_path):
    folder = without(earlier, tmp_path / "later", lambda header: header.update(kind="video"))
    with pytest.raises(CheckpointError, match="kind 'video'"):
        dyntok.load(folder)


def test_ordinary_checkpoints_of_before_name_lavits_sections_as_null(checkpoint_folder, photos, tmp_path):
    def as_before(header):
        del header["kind"]
        header["config"] |= {"highres_decoder": None, "understanding_dim": None}
        header["config"]["decoder"]["conditions"] = None

    folder = without(checkpoint_folder, tmp_path / "before", as_before)
    now, before = dyntok.load(checkpoint_folder), dyntok.load(folder)
    assert type(before) is DynamicVisualTokenizer and before.encode(photos[0]) == now.encode(photos[0])
