"""`dyntok doctor`: what the machine is, and whether it makes the golden codes."""

import json
import re

import pytest
import torch

import dyntok
from dyntok import machine
from dyntok.cli.main import main
from dyntok.golden import GOLDEN, pictures


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What the doctor says about the bundled tokenizer, as JSON."""
    return json.loads(GOLDEN.read_text())


def test_the_bundled_golden_codes_are_of_the_bundled_tokenizer(told):
    """New weights need new ones: dyntok doctor --write-golden dyntok/pretrained/flex/golden.json"""
    assert told["fingerprint"] == dyntok.load().fingerprint
    assert list(told["pictures"]) == list(pictures()) and len(told["pictures"]) == 11


def test_this_machine_makes_the_golden_codes(capsys):
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] and "cpu" in facts["devices"] and set(facts["kernels"].values()) == {"PyTorch"}
    assert "nearest_code" in facts["kernels"] and isinstance(facts["instructions"]["AVX2"], bool)
    assert len(facts["golden"]) == 11
    assert all(not one["differing"] or one["close_codes"] + one["close_choices"] > 0 for one in facts["golden"])


def test_other_codes_are_told(run, tmp_path):
    golden = tmp_path / "golden.json"
    code, out, _ = run("doctor", "--write-golden", golden)
    assert code == 0 and "golden codes of the tokenizer" in out
    other_picture = golden.read_text().replace('"gray"', '"grey"')
    code, out, _ = run("doctor", "--golden", golden)
    assert code == 0 and out.count("equal (close:") == 11 and "torch" in out
    stored = json.loads(golden.read_text())
    stored["pictures"]["gray"]["codes"] = [(code + 1) % 256 for code in stored["pictures"]["gray"]["codes"]]
    golden.write_text(json.dumps(stored))
    code, out, _ = run("doctor", "--golden", golden)
    assert re.search(r"gray +(\d+) of \1 tokens differ", out) and out.count("equal (close:") == 10
    for content in ("no JSON", "[]", '{"fingerprint": "", "pictures": {"a": 1}}', other_picture):
        golden.write_text(content)
        code, out, err = run("doctor", "--golden", golden)
        assert code == 1 and "can't read the golden codes" in err
    code, out, err = run("doctor", "--write-golden", tmp_path)
    assert code == 1 and f"can't write {tmp_path}" in err


def test_golden_codes_of_another_tokenizer_are_not_compared(run):
    code, out, _ = run("doctor")
    assert code == 0 and "of another tokenizer" in out and "equal" not in out


def test_codes_are_not_compared_where_operations_fail(run, monkeypatch):
    """As on a GPU without Triton: the doctor says so instead of encoding with them."""
    monkeypatch.setattr(machine, "kernels", lambda device: {"compact": "PyTorch", "nearest_code": "fails: no Triton"})
    monkeypatch.setattr(dyntok.golden, "compare", None)
    code, out, _ = run("doctor")
    assert code == 1 and "fails: no Triton" in out and "not compared, because operations fail" in out


def test_builds_of_pytorch_without_onednn(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    assert machine.instructions()["bf16 in hardware"] is False
