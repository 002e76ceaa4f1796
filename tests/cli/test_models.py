"""`dyntok info`, and the options `--model` and `--device` of all commands."""

import json
import re

import pytest

from dyntok.cli.main import main


def test_info_describes_a_tokenizer(run, tokenizer):
    code, out, _ = run("info")
    assert code == 0 and tokenizer.fingerprint in out and "8 x 8" in out and "256 codes of dimension 8" in out
    values = json.loads(run("info", "--json")[1])
    assert values["config"] == json.loads(json.dumps(tokenizer.config.to_dict()))
    assert re.search("input +64 x 64 pixels; fit: crop", out)
    assert values["parameters"]["codebook"] == 256 * 8 and values["parameters"]["pixel_head"] == 49 * 3 * 16 * 16


def test_info_on_a_tokenizer_of_any_shape(capsys):
    assert main(["info", "--model", "flex"]) == 0
    out = capsys.readouterr().out
    assert re.search("input +any shape; fit: keep\n", out) and re.search("patches +up to 256 of 8 pixels\n", out)


def test_info_takes_the_name_with_and_without_the_option(capsys):
    assert main(["info", "--model", "tiny"]) == 0
    tiny = capsys.readouterr().out
    assert main(["info", "tiny"]) == 0 and capsys.readouterr().out == tiny and "128 x 128" in tiny
    with pytest.raises(SystemExit, match="2"):
        main(["info", "tiny", "--model", "flex"])
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "encode x", "decode x -o y.png", "show x -o y.png", "info", "eval ."])
def test_an_unknown_device_is_an_error_of_every_command(run, command):
    for device in ("meta", "quantum"):  # a device that computes nothing, and no device at all
        code, out, err = run(*command.split(), "--device", device)
        assert (code, out) == (1, "") and err.startswith("dyntok: ") and err.count("\n") == 1
        assert device in err and re.search("name another|expected|such as", err)


def test_a_device_is_used(run, folder):
    assert run("encode", folder / "cat.png", "--device", "cpu:0") == run("encode", folder / "cat.png")


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path, capsys):
    assert main(["info", "--model", str(tmp_path)]) == 1
    assert "config.json" in capsys.readouterr().err
