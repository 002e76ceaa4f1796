"""The command line as a whole: help, usage, exit codes, and what a process prints."""

import argparse
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from PIL import Image, ImageFile

from dyntok.batch.options import BatchOptions
from dyntok.cli import main as cli
from dyntok.cli.main import GROUPS, build_parser, main
from dyntok.lavit.convert import PARTS

COMMANDS = [name for members in GROUPS.values() for name in members]


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def start(*arguments):
    """Start a command in a process of its own, as a user does."""
    command = [sys.executable, "-m", "dyntok.cli", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment(), stdin=pipe, stdout=pipe, stderr=pipe)


def subparsers():
    (action,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return action.choices


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["paint"], *([name, "--help"] for name in COMMANDS), ["encode"], ["train", "--no"]],
    ids=" ".join,
)
def test_help_and_wrong_usage_do_not_load_torch(arguments):
    code = (
        "import sys\n"
        "from dyntok.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    print([m for m in ('torch', 'numpy', 'PIL', 'tqdm') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment(), capture_output=True, text=True)
    assert "[]" in done.stderr.splitlines(), done.stderr


def test_help_lists_every_command_in_groups(capsys):
    assert sorted(COMMANDS) == sorted(subparsers())
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and out.index("images:") < out.index("datasets:") < out.index("tokenizers:")
    for name in COMMANDS:
        assert re.search(rf"^  {name} +[A-Z].*\.$", out, re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_has_two_lines_an_example_and_every_option(name):
    parser = subparsers()[name]
    lines = parser.description.splitlines()
    assert len(lines) == 2 and all(line.endswith(".") for line in lines)
    assert re.fullmatch(rf"example:\n  dyntok {name} .+", parser.epilog)
    assert [action.option_strings for action in parser._actions if not action.help] == []
    parser.format_help()  # a stray % in a help text would raise here


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_of_a_command_is_valid(name, monkeypatch):
    example = subparsers()[name].epilog.splitlines()[1].split()[1:]
    assert build_parser().parse_args(example).run is not None


def test_the_help_states_values_that_are_defined_elsewhere():
    assert f"(default: {BatchOptions().max_pixels})" in subparsers()["batch"].format_help()
    (parts,) = (a for a in subparsers()["import-lavit"]._actions if "--parts" in a.option_strings)
    assert all(part in parts.help for part in PARTS)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "required"),
        (["paint"], "invalid choice"),
        (["encode"], "IMAGE"),
        (["decode", "codes.json"], "-o/--output"),
        (["encode", "a.jpg", "--budget", "5", "--threshold", "0.5"], "not allowed with"),
        (["encode", "a.jpg", "--budget", "many"], "'many' is neither a number of tokens nor a share"),
        (["encode", "a.jpg", "--sample", "-1"], "'-1' is not a whole number from 0 to|expected one argument"),
        (["encode", "a.jpg", "--sample", str(2**63)], "is not a whole number from 0 to"),
        (["show", "a.jpg", "-o", "b.png", "--columns", "0"], "'0' is not a whole number from 1 to"),
        (["eval", "folder", "--teacher-args", "[1]"], r"'\[1\]' is not a JSON object"),
        (["eval", "folder", "--teacher-args", "{"], "'{' is not a JSON object"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_usage_ends_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_an_interrupt_has_its_own_exit_code(run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("dyntok.load", interrupted)
    assert run("info") == (130, "", "dyntok: interrupted\n")


def global_state():
    return {
        "warnings": list(warnings.filters),
        "pixels": Image.MAX_IMAGE_PIXELS,
        "truncated": ImageFile.LOAD_TRUNCATED_IMAGES,
        "threads of torch": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "random": (random.getstate(), torch.random.get_rng_state().tolist()),
        "signals": [signal.getsignal(number) for number in sorted(signal.valid_signals())],
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "streams": (sys.stdin, sys.stdout, sys.stderr),
    }


def test_no_command_leaves_global_state_behind(run, folder, tmp_path):
    run("info")  # imports happen here
    before = global_state()
    codes, photograph = tmp_path / "codes.json", folder / "cat.png"
    assert run("encode", photograph, photograph, "--sample", 1, "-o", codes)[0] == 0
    assert run("decode", codes, "-o", tmp_path / "again")[0] == 0
    assert run("show", photograph, "-o", tmp_path / "sheet.png")[0] == 0
    assert run("demo", "-o", tmp_path / "demo.png")[0] == 0
    assert run("info", "--json")[0] == 0
    assert run("encode", "none.jpg")[0] == 1
    after = global_state()
    assert {name for name in before if before[name] != after[name]} == set()


@pytest.mark.parametrize("command", [["eval", "folder"], ["train", "tiny", "-o", "folder"]], ids=" ".join)
def test_a_missing_extra_is_named(command, monkeypatch, capsys):
    for module in ("evaluate", "loop"):
        monkeypatch.setitem(sys.modules, f"dyntok.training.{module}", None)
    assert main(command) == 1
    assert "pip install 'dyntok[train]'" in capsys.readouterr().err


def test_a_process_reads_stdin_and_writes_json(checkpoint_folder, tokenizer, folder):
    process = start("encode", "--model", checkpoint_folder, "-", "--json")
    out, err = process.communicate((folder / "cat.png").read_bytes(), timeout=300)
    assert process.returncode == 0 and err.startswith(b"encoded 1 image, ")
    assert json.loads(out)["codes"] == [tokenizer.encode(folder / "cat.png").codes[0].tolist()]


def test_a_process_fails_in_one_line(checkpoint_folder):
    process = start("encode", "--model", checkpoint_folder, "none.jpg")
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (1, b"")
    assert err.startswith(b"dyntok: none.jpg: ") and b"No such file" in err and err.count(b"\n") == 1


def test_a_reader_that_closes_the_pipe_is_no_error(checkpoint_folder, folder):
    process = start("encode", "--model", checkpoint_folder, folder / "cat.png")
    process.stdout.close()
    assert process.wait(timeout=300) == 0 and process.stderr.read() == b""


def test_python_m_starts_the_same_command():
    out, _ = start("--version").communicate(timeout=300)
    assert out.decode().strip() == f"dyntok {cli.__version__}"


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
@pytest.mark.parametrize("command", ["encode in/0.png --json", "batch in out --workers 1"])
def test_closed_streams(command, closed, photos, checkpoint_folder, tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(photos[0]).save(tmp_path / "in" / "0.png")
    line = f"{shlex.quote(sys.executable)} -m dyntok.cli {command} --model {checkpoint_folder} {closed}"
    done = subprocess.run(line, shell=True, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    if closed == "2>&-" and "json" in command:
        assert len(json.loads(done.stdout)["codes"]) == 1  # no message among it
    assert (tmp_path / "out" / "000000-000000.parquet").exists() == ("batch" in command)


@pytest.mark.parametrize("command", ["info", "encode 0.png", "encode 0.png --json"])
def test_a_full_disk_behind_standard_output(command, photos, checkpoint_folder, tmp_path):
    Image.fromarray(photos[0]).save(tmp_path / "0.png")
    arguments = [sys.executable, "-m", "dyntok.cli", *command.split(), "--model", str(checkpoint_folder)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            arguments, cwd=tmp_path, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1 and done.stderr.startswith("dyntok: can't write: No space left"), done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
