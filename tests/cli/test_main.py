"""The command line: what it prints and writes, what it refuses, and with which exit code."""

import io
import json
import os
import re
import subprocess
import sys

import pytest
from PIL import Image

from dyntok.cli import main as cli
from dyntok.loading import BUNDLED


@pytest.fixture
def run(checkpoint_folder, capsys):
    """A command with the small tokenizer, in this process -> (exit code, stdout, stderr)."""

    def run(command, *arguments):
        code = cli.main([command, "--model", str(checkpoint_folder), *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def folder(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    for name, photo in zip(("astronaut", "coffee", "cat"), photos, strict=False):
        Image.fromarray(photo).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def bad(tmp_path):
    path = tmp_path / "bad.jpg"
    path.write_bytes(b"not an image")
    return path


def from_stdin(monkeypatch, raw):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))


def start(*arguments, **options):
    """The command in a process of its own, as a user starts it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(
        [sys.executable, "-m", "dyntok.cli", *map(str, arguments)], env=environment, **{**pipes, **options}
    )


def picture_size(path):
    with Image.open(path) as image:
        return image.size


def test_encode_prints_codes(run, tokenizer, folder):
    code, out, err = run("encode", folder / "cat.png", folder / "coffee.png")
    (cat, coffee), names = tokenizer.encode([folder / "cat.png", folder / "coffee.png"]).codes, out.splitlines()
    assert code == 0 and err == ""
    assert names[0] == f"{folder}/cat.png: {len(cat)} tokens: {' '.join(map(str, cat.tolist()))}"
    assert names[1].startswith(f"{folder}/coffee.png: {len(coffee)} tokens: ")


def test_encode_and_decode_through_a_file(run, tokenizer, folder, tmp_path):
    photographs = sorted(folder.iterdir())
    code, out, _ = run("encode", *photographs, "-o", tmp_path / "codes.json", "--budget", "0.25")
    assert code == 0 and out.splitlines()[0] == f"{photographs[0]}: 16 tokens"
    values = json.loads((tmp_path / "codes.json").read_text())
    encoding = tokenizer.encode(photographs, budget=16)
    assert values["sources"] == list(map(str, photographs)) and values["codes"] == [c.tolist() for c in encoding.codes]
    assert values["fingerprint"] == tokenizer.fingerprint

    code, out, _ = run("decode", tmp_path / "codes.json", "-o", tmp_path / "again")
    assert code == 0 and out.splitlines() == [f"{tmp_path}/again/0000{i}.png" for i in range(3)]
    for i, image in enumerate(tokenizer.decode(encoding)):
        with Image.open(tmp_path / "again" / f"0000{i}.png") as written:
            assert written.tobytes() == image.tobytes()


def test_json_goes_to_stdout(run, folder, tmp_path):
    _, out, _ = run("encode", folder / "cat.png", "--json")
    assert set(json.loads(out)) == {"codes", "positions", "grids", "fingerprint", "failures", "source_index", "sources"}
    assert run("encode", folder / "cat.png", "-o", "-")[1] == out
    _, again, _ = run("encode", folder / "cat.png", "--json", "-o", tmp_path / "codes.json")
    assert json.loads((tmp_path / "codes.json").read_text()) == json.loads(again) == json.loads(out)
    (tmp_path / "of.2024").mkdir()
    assert json.loads(run("decode", tmp_path / "codes.json", "-o", tmp_path / "of.2024", "--json")[1]) == [
        f"{tmp_path}/of.2024/00000.png"
    ]
    _, out, _ = run("decode", tmp_path / "codes.json", "-o", tmp_path / "cat.png", "--json")
    assert json.loads(out) == [f"{tmp_path}/cat.png"] and picture_size(tmp_path / "cat.png") == (64, 64)


@pytest.mark.parametrize("text, images", [("[[17, 42, 9], [3]]", 2), ("[17, 42, 9]", 1), ("[]", 0)])
def test_decode_reads_codes_alone_from_stdin(run, monkeypatch, tmp_path, text, images):
    from_stdin(monkeypatch, text.encode())
    code, out, _ = run("decode", "-", "-o", tmp_path / "out", "--json")
    assert code == 0 and len(json.loads(out)) == len(list((tmp_path / "out").iterdir())) == images


def test_pictures_go_to_stdout(checkpoint_folder, folder, tmp_path, capsysbinary):
    (tmp_path / "codes.json").write_text("[1, 2, 3]")
    commands = [["decode", str(tmp_path / "codes.json")], ["show", str(folder / "cat.png")], ["demo"]]
    for command, size in zip(commands, [(64, 64), (800, 294), (800, 294)], strict=True):
        assert cli.main([*command, "--model", str(checkpoint_folder), "-o", "-"]) == 0
        assert picture_size(io.BytesIO(capsysbinary.readouterr().out)) == size


@pytest.mark.parametrize(
    "options, count",
    [
        (["--budget", "7"], 7),
        (["--budget", ".5"], 32),
        (["--threshold", "0"], 64),
        (["--sample", "3", "--max-tokens", "4"], 4),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_policies_are_options(run, folder, options, count):
    assert len(json.loads(run("encode", folder / "cat.png", "--json", *options)[1])["codes"][0]) == count


def test_show_draws_a_row_for_each(run, folder, tmp_path):
    photographs = sorted(folder.iterdir())
    code, out, _ = run("show", *photographs, "-o", tmp_path / "sheet.png", "--columns", 2, "--max-tokens", 5)
    assert code == 0 and out == f"{tmp_path}/sheet.png: " + ", ".join(f"{path} 5 tokens" for path in photographs) + "\n"
    assert picture_size(tmp_path / "sheet.png") == (2 * 800, 2 * 286 + 8)
    _, out, _ = run("show", folder / "cat.png", "-o", tmp_path / "sheet.png", "--json")
    assert json.loads(out)["picture"] == f"{tmp_path}/sheet.png" and picture_size(tmp_path / "sheet.png") == (800, 294)


def test_info_tells_what_a_tokenizer_is_made_of(run, tokenizer):
    code, out, _ = run("info")
    assert code == 0 and tokenizer.fingerprint in out and "8 x 8" in out and "256 codes of dimension 8" in out
    values = json.loads(run("info", "--json")[1])
    assert (
        values["config"] == json.loads(json.dumps(tokenizer.config.to_dict()))
        and values["parameters"]["codebook"] == 256 * 8
    )
    assert values["parameters"]["pixel_head"] == 49 * 3 * 16 * 16


def test_demo_leaves_a_picture(run, tmp_path):
    code, out, _ = run("demo", "-o", tmp_path / "demo.png", "--budget", "10")
    first, codes, last = out.splitlines()
    assert code == 0 and first == "astronaut.jpg: 64 patches became 10 integers (10 bytes)" and len(codes.split()) == 10
    assert last.endswith(f"{tmp_path}/demo.png") and picture_size(tmp_path / "demo.png") == (800, 294)
    values = json.loads(run("demo", "-o", tmp_path / "demo.png", "--json", "--budget", "10")[1])
    assert " ".join(map(str, values["codes"][0])) == codes and values["picture"] == f"{tmp_path}/demo.png"


@pytest.mark.skipif(not (BUNDLED / "model.safetensors").exists(), reason="the bundled tokenizer is not trained yet")
def test_demo_works_out_of_the_box(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo"]) == 0
    assert "256 patches became" in capsys.readouterr().out and picture_size("demo.png") == (800, 294)


def test_bad_images_end_it_or_are_left_out(run, folder, bad, tmp_path):
    photograph = folder / "cat.png"
    code, out, err = run("encode", bad, photograph)
    assert (code, out) == (1, "") and err.startswith(f"dyntok: {bad}: ") and err.count("\n") == 1
    code, out, err = run("encode", bad, photograph, tmp_path / "none.png", "--skip-errors", "--json")
    values = json.loads(out)
    assert code == 3 and values["source_index"] == [1] and values["sources"] == [str(photograph)]
    assert [f"left out {name}: {name}: " in err for name in (bad, photograph, tmp_path / "none.png")] == [
        True,
        False,
        True,
    ]
    assert run("show", bad, "-o", tmp_path / "sheet.png")[0] == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("not JSON", "can't read codes from .*: Expecting value.*expected JSON as `dyntok encode -o` writes it"),
        ("[" * 100_000, "can't read codes from"),
        ("17", "holds int, expected what `dyntok encode -o` writes or a list of lists of codes"),
        ("[[256]]", "code 256 is out of range, this codebook has codes 0 to 255"),
        ('[["a"]]', "expected a list or tensor of integers"),
        ('{"codes": [[1]]}', "expected a mapping with codes and grids"),
        (
            '{"codes": [[1]], "grids": [[8, 8]], "fingerprint": "0123456789abcdef"}',
            "written by the tokenizer 0123456789abcdef",
        ),
    ],
    ids=range(7),
)
def test_bad_codes_are_refused(run, tmp_path, text, message):
    (tmp_path / "codes.json").write_text(text)
    code, out, err = run("decode", tmp_path / "codes.json", "-o", tmp_path / "out.png")
    assert (code, out) == (1, "") and not (tmp_path / "out.png").exists()
    assert re.search(message, err)


def test_files_that_are_not_there_or_can_not_be_written(run, folder, bad, tmp_path):
    photograph, nowhere = folder / "cat.png", tmp_path / "no" / "where.png"
    codes = tmp_path / "codes.json"
    codes.write_text("[[1], [2]]")
    for arguments, message in (
        (("decode", tmp_path / "none.json", "-o", tmp_path / "a.png"), "can't read codes from"),
        (("decode", codes, "-o", tmp_path / "a.png"), "the codes of 2 images, and .*a.png takes one; give a folder"),
        (("decode", codes, "-o", bad), "takes one"),
        (("decode", codes, "-o", tmp_path / "out.txt"), r"can't write pictures as \.txt; name a \.png"),
        (("decode", codes, "-o", bad / "folder"), "can't write"),
        (("encode", photograph, "-o", nowhere), "can't write .*where.png"),
        (("show", photograph, "-o", nowhere), "can't write .*where.png"),
        (("show", photograph, "-o", tmp_path / "sheet.xyz"), "can't write .*unknown file extension"),
        (("demo", "-o", nowhere), "can't write .*where.png"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (1, "") and err.startswith("dyntok: "), arguments
        assert re.search(message, err)


@pytest.mark.parametrize("command", ["demo", "encode x", "decode x -o y.png", "show x -o y.png", "info", "eval ."])
def test_every_command_takes_a_device(run, command):
    for device in ("meta", "quantum"):  # where nothing can be computed; and no device at all
        code, out, err = run(*command.split(), "--device", device)
        assert (code, out) == (1, "") and re.fullmatch(
            f"dyntok: PyTorch .* has no device {device} here; name another, such as .*\n", err
        )


def test_a_device_is_used(run, folder):
    assert run("encode", folder / "cat.png", "--device", "cpu:0") == run("encode", folder / "cat.png")


def test_a_tokenizer_that_is_not_there(tmp_path, capsys):
    assert cli.main(["info", "--model", str(tmp_path)]) == 1
    assert "has no config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "required"),
        (["paint"], "invalid choice"),
        (["encode"], "IMAGE"),
        (["decode", "codes.json"], "-o/--output"),
        (["encode", "a.jpg", "--budget", "5", "--threshold", "0.5"], "not allowed with"),
        (["encode", "a.jpg", "--budget", "many"], "'many' is neither a number of tokens nor a share"),
        (["encode", "a.jpg", "--sample", "-1"], "'-1' is no whole number from 0 to|expected one argument"),
        (["encode", "a.jpg", "--sample", str(2**63)], "is no whole number from 0 to"),
        (["show", "a.jpg", "-o", "b.png", "--columns", "0"], "'0' is no whole number from 1 to"),
        (["eval", "folder", "--teacher-args", "[1]"], r"'\[1\]' is no JSON object"),
        (["eval", "folder", "--teacher-args", "{"], "'{' is no JSON object"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_usage_ends_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_impossible_policies_are_errors_of_ours(run, folder):
    code, _, err = run("encode", folder / "cat.png", "--budget", "65")
    assert code == 1 and err == "dyntok: budget is 65 tokens, but an image has 64 patches\n"


def test_an_interrupt_has_its_own_code(run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load", interrupted)
    assert run("info") == (130, "", "dyntok: interrupted\n")


def test_eval_measures_a_folder(run, folder, bad):
    code, out, _ = run("eval", folder, "--limit", 2, "--selection", "even", "--without-positions", "--budget", 9)
    assert code == 0 and "PSNR" in out and "images" in out
    code, out, _ = run("eval", folder, bad, "--json", "--budget", 9)
    values = json.loads(out)
    assert code == 3 and values["images"] == 3 and values["failures"] == 1 and values["tokens"]["mean"] == 9
    code, out, _ = run("eval", folder, "--keys", "ca", "--json")
    assert code == 0 and json.loads(out)["images"] == 1
    for arguments, message in (((folder, "--keys", "x"), "no key of an image"), ((folder / "none",), "does not exist")):
        code, _, err = run("eval", *arguments)
        assert code == 1 and message in err


@pytest.mark.parametrize("command", [["eval", "folder"], ["train", "tiny", "-o", "folder"]], ids=" ".join)
def test_a_missing_extra_is_named(command, monkeypatch, capsys):
    for module in ("evaluate", "loop"):
        monkeypatch.setitem(sys.modules, f"dyntok.training.{module}", None)
    assert cli.main(command) == 1
    assert "pip install 'dyntok[train]'" in capsys.readouterr().err


def test_a_process_reads_stdin_and_writes_json(checkpoint_folder, tokenizer, folder):
    process = start("encode", "--model", checkpoint_folder, "-", "--json")
    out, err = process.communicate((folder / "cat.png").read_bytes(), timeout=300)
    assert process.returncode == 0 and err == b""
    assert json.loads(out)["codes"] == [tokenizer.encode(folder / "cat.png").codes[0].tolist()]


def test_a_process_fails_in_one_line(checkpoint_folder):
    process = start("encode", "--model", checkpoint_folder, "none.jpg")
    out, err = process.communicate(timeout=300)
    assert (
        process.returncode == 1
        and out == b""
        and err == b"dyntok: none.jpg: can't read the file: No such file or directory\n"
    )


def test_a_reader_that_goes_away_is_no_error(checkpoint_folder, folder):
    process = start("encode", "--model", checkpoint_folder, folder / "cat.png")
    process.stdout.close()
    assert process.wait(timeout=300) == 0 and process.stderr.read() == b""
