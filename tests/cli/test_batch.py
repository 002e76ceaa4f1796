"""`dyntok batch` and `dyntok inspect` as a user types them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.batch_data import codes, files, pictures, run, tar_members, write_folder, write_table, write_tar

from dyntok import DynamicVisualTokenizer, VisualVocab, load
from dyntok.cli.main import main
from dyntok.llm import parse_ids


@pytest.fixture(scope="module")
def tar(photos, tmp_path_factory):
    return write_tar(tmp_path_factory.mktemp("in") / "in.tar", tar_members(pictures(photos) | {"bad": b"broken"}))


def test_batch_and_again(tar, checkpoint_folder, tmp_path, capsys):
    command = [
        "batch",
        tar,
        str(tmp_path / "out"),
        "--model",
        str(checkpoint_folder),
        "--shard-size",
        "8",
        "--keep-columns",
        "txt",
        "--json",
    ]
    assert main(command) == 3
    first = json.loads(capsys.readouterr().out)
    assert (first["images"], first["errors"], first["shards"]) == (20, 1, 3)
    before = files(tmp_path / "out")
    assert main(command) == 3
    again = json.loads(capsys.readouterr().out)
    assert (again["finished_before"], again["failed_before"], again["errors"]) == (20, 1, 0)
    assert files(tmp_path / "out") == before
    run(tar, tmp_path / "api", checkpoint_folder, shard_size=8, keep_columns=["txt"])
    assert codes(tmp_path / "api") == codes(tmp_path / "out")
    assert main([*command, "--budget", "7"]) == 1
    told = capsys.readouterr().err
    assert "options.budget is 7, was None" in told and told.count("\n") == 1


def test_a_summary_for_people(tar, checkpoint_folder, tmp_path):
    command = [
        sys.executable,
        "-m",
        "dyntok.cli",
        "batch",
        tar,
        str(tmp_path / "out"),
        "--model",
        str(checkpoint_folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3 and "20 images" in done.stdout and "1 image failed" in done.stdout, done.stderr


def test_a_log_gets_lines_and_the_summary_says_why_and_where(tar, checkpoint_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dyntok.cli.batch_progress._WAIT", 0.0)
    output = tmp_path / "out"
    assert main(["batch", tar, str(output), "--model", str(checkpoint_folder), "--workers", "0"]) == 3
    told = capsys.readouterr()
    assert "batch: " in told.err and "images/s, " in told.err and "left" in told.err
    assert f"written to {output}: 1 output shard," in told.out and "1 image failed:\n" in told.out
    assert "1  not a readable image" in told.out and f"next: dyntok inspect {output}" in told.out


def test_a_second_run_says_what_failed_in_the_first_until_it_is_tried_again(
    photos, checkpoint_folder, tmp_path, capsys
):
    images, folder = pictures(photos, 4), tmp_path / "in"
    write_folder(folder, images | {"a/bad": b"broken"})
    command = ["batch", str(folder), str(tmp_path / "out"), "--model", str(checkpoint_folder), "--workers", "0"]
    assert main(command) == 3 and "earlier runs" not in capsys.readouterr().out
    assert main(command) == 3
    told = capsys.readouterr().out
    assert "1 image failed in earlier runs\nlist them: " in told and "--retry-errors" in told
    assert main([*command, "--retry-errors"]) == 3 and "earlier runs" not in capsys.readouterr().out
    (folder / "a" / "bad.jpg").write_bytes(images["a/000"])
    assert main([*command, "--retry-errors"]) == 0


def test_dry_run_writes_nothing(tar, photos, checkpoint_folder, tmp_path, capsys):
    model = ["--model", str(checkpoint_folder)]
    table = write_table(tmp_path / "in.parquet", pictures(photos))
    for source, exact in ((tar, 21), (table, 20)):
        command = ["batch", "--dry-run", source, str(tmp_path / "out"), *model, "--shard-size", "8", "--json"]
        assert main(command) == 0
        plan = json.loads(capsys.readouterr().out)
        assert plan["rows"] == pytest.approx(exact, abs=1) and plan["output_shards"] == 3 and plan["seconds"] > 0
        assert plan["sampled"] > 7 and plan["tokens_per_image"] > 5 and not (tmp_path / "out").exists()
    assert main(["batch", "--dry-run", tar, str(tmp_path / "out"), *model]) == 0
    told = capsys.readouterr().out
    assert "would read   1 input shard (tar)" in told and "failed       1 image of the sample" in told
    run(tar, tmp_path / "out", checkpoint_folder)
    before = files(tmp_path / "out")
    assert main(["batch", "--dry-run", tar, str(tmp_path / "out"), *model]) == 0
    assert capsys.readouterr().out == f"nothing is left to be done in {tmp_path / 'out'}\n"
    assert files(tmp_path / "out") == before


def test_the_estimate_comes_near(photos, checkpoint_folder, tmp_path, capsys):
    many = {f"{i}/{key}": content for i in range(15) for key, content in pictures(photos).items()}
    tar = write_tar(tmp_path / "in.tar", tar_members(many))
    assert main(["batch", "--dry-run", tar, str(tmp_path / "out"), "--model", str(checkpoint_folder), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    summary = run(tar, tmp_path / "out", checkpoint_folder)
    assert plan["rows"] == pytest.approx(300, rel=0.1) and plan["tokens_per_image"] == pytest.approx(
        summary.tokens / 300, rel=0.2
    )


def test_inspect(tar, checkpoint_folder, tmp_path, capsys):
    run(tar, tmp_path / "out", checkpoint_folder, shard_size=8)
    command = ["inspect", str(tmp_path / "out"), "--model", str(checkpoint_folder)]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    written = codes(tmp_path / "out").values()
    lengths = [len(row) for row, _ in written]
    assert report["images"] == 20 and report["errors"] == 1 and report["tokens"] == sum(lengths)
    assert [report["lengths"].count(0), len(report["lengths"]) - 1, sum(report["lengths"])] == [
        len(report["lengths"]) - len(set(lengths)), max(lengths), 20,
    ]  # fmt: skip
    assert report["codes_used"] == len({code for row, _ in written for code in row}) and 1 < report["perplexity"] <= 256
    assert main([*command, "-o", str(tmp_path / "report")]) == 0
    told = capsys.readouterr().out
    assert "images       20 of 21 rows, in 3 shards" in told and "not a readable image" in told and "####" in told
    assert Image.open(tmp_path / "report" / "lengths.png").width > 300
    sheet = Image.open(tmp_path / "report" / "sheet.png")
    assert sheet.width > 1000 and len(sheet.getcolors(2**24)) > 1000
    (error,) = [json.loads(line) for line in (tmp_path / "report" / "errors.jsonl").read_text().splitlines()]
    assert error["key"] == "bad" and error["source"] == tar


def test_inspect_where_it_can_not(tar, checkpoint_folder, tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 1
    assert "no output of `dyntok batch`" in capsys.readouterr().err
    moved = tmp_path / "in.tar"
    moved.write_bytes(Path(tar).read_bytes())
    run(moved, tmp_path / "out", checkpoint_folder)
    moved.unlink()
    command = ["inspect", str(tmp_path / "out"), "--model", str(checkpoint_folder), "-o", str(tmp_path / "report")]
    assert main(command) == 0 and (tmp_path / "report" / "lengths.png").exists()
    assert f"can't draw sheet.png: {moved} does not exist" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "out"), "-o", str(tmp_path / "report")]) == 1
    assert "these codes were written by the tokenizer" in capsys.readouterr().err


def test_megatron_with_places_texts_and_ends(tar, checkpoint_folder, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    models, splitters = tokenizers.models, tokenizers.pre_tokenizers
    words = tokenizers.Tokenizer(models.WordLevel({"?": 0, "caption": 1, "of": 2, "</s>": 3}, unk_token="?"))
    words.pre_tokenizer = splitters.WhitespaceSplit()
    words.save(str(tmp_path / "words.json"))
    command = ["batch", tar, str(tmp_path / "out"), "--model", str(checkpoint_folder), "--format", "megatron"]
    command += ["--vocab-size", "300", "--eod", "3", "--layout", "map", "--keep-columns", "txt"]
    assert main([*command, "--text-tokenizer", str(tmp_path / "words.json")]) == 3
    ids = np.fromfile(tmp_path / "out" / "000000-000000.bin", np.uint16).tolist()
    vocab = VisualVocab.of(load(checkpoint_folder), after=300, layout="map")
    segments = parse_ids(ids, vocab)
    assert [s.kind for s in segments] == ["image", "text"] * 20 and all(s.positions for s in segments[::2])
    assert all(ids[s.start : s.stop] == [1, 2, 0, 3] for s in segments[1::2])


def test_inspect_megatron_and_webdataset(tar, checkpoint_folder, tmp_path, capsys):
    for form, options in (("megatron", {"vocab_size": 1000}), ("webdataset", {})):
        run(tar, tmp_path / form, checkpoint_folder, format=form, **options)
        assert main(["inspect", str(tmp_path / form), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["images"] == 20 and (report["lengths"] is None) == (form == "megatron")


def test_wrong_options(tar, tmp_path, capsys):
    for options in (
        ["--format", "megatron"],
        ["--address", "auto"],
        ["--storage-options", str(tmp_path / "none.json")],
        ["--threshold", "2"],
    ):
        assert main(["batch", tar, str(tmp_path / "out"), *options]) == 1
        assert capsys.readouterr().err.startswith("dyntok: ")
    with pytest.raises(SystemExit):
        main(["batch", tar, str(tmp_path / "out"), "--shard-size", "0"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("missing", "extra", "options"), [("pyarrow", "batch", []), ("ray", "ray", ["--engine", "ray"])]
)
def test_an_extra_that_is_not_installed(missing, extra, options, tar, tmp_path):
    code = (
        f"import sys; sys.modules[{missing!r}] = None; from dyntok.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "batch", tar, str(tmp_path / "out"), *options], capture_output=True, text=True
    )
    assert done.returncode == 1 and f"pip install 'dyntok[{extra}]'" in done.stderr and done.stderr.count("\n") == 1


def test_a_dry_run_measures_on_the_device_of_the_run(tar, checkpoint_folder, tmp_path, capsys, monkeypatch):
    moved, to = [], DynamicVisualTokenizer.to
    monkeypatch.setattr(DynamicVisualTokenizer, "to", lambda self, *a, **k: moved.append(a) or to(self, *a, **k))
    command = ["batch", "--dry-run", tar, str(tmp_path / "out"), "--model", str(checkpoint_folder), "--devices"]
    assert main([*command, "cpu:0,cpu:0"]) == 0 and ("cpu:0",) in moved
    assert main([*command, "cuda:7"]) == 1 and "no device 'cuda:7' here" in capsys.readouterr().err
