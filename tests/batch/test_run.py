"""A stopped run resumes: nothing is lost, nothing is written twice, and no finished byte changes.

Other runs are refused.
"""

import dataclasses
import json
import subprocess
import sys

import pyarrow as pa
import pytest
import torch
from support.batch_data import (
    HERE,
    codes,
    errors,
    files,
    pictures,
    rows,
    run,
    tar_members,
    write_folder,
    write_table,
    write_tar,
)

import dyntok
from dyntok.addresses import read_storage_options
from dyntok.batch import BatchOptions, Summary, tokenize
from dyntok.batch.engines.stages import Range
from dyntok.batch.manifest import Record, read_records
from dyntok.batch.storage import Output
from dyntok.cli.main import main
from dyntok.errors import BatchError, ConfigError, DyntokError


@pytest.fixture(scope="module")
def images(photos):
    return pictures(photos)


@pytest.fixture
def tars(images, tmp_path):
    """Three tars of 20 images; the second has two bad ones."""
    sources = []
    for i in range(3):
        some = {f"{i}/{key}": content for key, content in images.items()}
        if i == 1:
            some |= {"1/a/003": b"broken", "1/b/015": b"\xff\xd8 broken, too"}
        sources.append(write_tar(tmp_path / f"in-{i}.tar", tar_members(some)))
    return sources


@pytest.fixture
def undisturbed(tars, checkpoint_folder, tmp_path):
    run(tars, tmp_path / "undisturbed", checkpoint_folder, shard_size=6)
    return files(tmp_path / "undisturbed")


class Stop(Exception):
    pass


def stop_after(count):
    def progress(summary):
        if summary.rows == count:
            raise Stop

    return progress


def test_a_stopped_run_goes_on(tars, undisturbed, checkpoint_folder, tmp_path):
    output, before = tmp_path / "out", {}
    for stop in (1, 7, 13, 9, 6, 20):
        with pytest.raises(Stop):
            run(tars, output, checkpoint_folder, shard_size=6, progress=stop_after(stop))
        now = files(output)
        assert before.items() <= now.items() and not (output / "__run__" / "tmp").exists()
        before = now
    summary = run(tars, output, checkpoint_folder, shard_size=6)
    assert files(output) == undisturbed
    assert summary.finished_before + summary.images == 58 and summary.finished_before > 30
    again = run(tars, output, checkpoint_folder, shard_size=6)
    assert (again.rows, again.shards, again.finished_before) == (0, 0, 58) and files(output) == undisturbed


def test_what_is_lost_of_the_output_is_done_again(tars, undisturbed, checkpoint_folder, tmp_path):
    """Also in the middle of an input shard, and a file that was cut."""
    output = tmp_path / "undisturbed"
    (output / "000001-000001.parquet").unlink()
    (output / "__run__" / "done" / "000000-000002.json").unlink()
    (output / "000002-000003.parquet").write_bytes(b"cut")
    summary = run(tars, output, checkpoint_folder, shard_size=6)
    assert summary.shards == 3 and files(output) == undisturbed


def test_another_run_is_refused(tars, checkpoint_folder, tokenizer, tmp_path):
    output = tmp_path / "out"
    run(tars, output, checkpoint_folder, shard_size=6)
    before = files(output)
    torn = dataclasses.replace(tokenizer.config.merger, num_heads=1)
    other = dyntok.DynamicVisualTokenizer(dataclasses.replace(tokenizer.config, merger=torn)).eval()
    with pytest.raises(
        BatchError, match=f"tokenizer.fingerprint is '{other.fingerprint}', was '{tokenizer.fingerprint}'"
    ):
        run(tars, output, other, shard_size=6)
    with pytest.raises(BatchError, match=r"options.budget is 9, was None; options.shard_size is 8192, was 6"):
        run(tars, output, checkpoint_folder, budget=9)
    with pytest.raises(BatchError, match="input.sources is "):
        run(tars[:2], output, checkpoint_folder, shard_size=6)
    assert files(output) == before


def test_a_run_does_not_go_on_with_another_kind_of_device(images, checkpoint_folder, tmp_path, monkeypatch, capsys):
    source, output = write_folder(tmp_path / "in", images), tmp_path / "out"
    command = ["batch", source, str(output), "--model", str(checkpoint_folder), "--shard-size", "6", "--workers", "0"]
    assert main(command) == 0
    path = output / "__run__" / "run.json"
    described = json.loads(path.read_text())
    assert described["device"] == "cpu" and described["options"]["dtype"] == "fp32"
    next(output.glob("*.parquet")).unlink()
    with monkeypatch.context() as patch:
        patch.setattr("dyntok.batch.task.device_kind", lambda device: "Example GPU 80GB")
        for more in ([], ["--dry-run"], ["--retry-errors"]):
            assert main([*command, *more]) == 1
            told = capsys.readouterr().err
            assert "begun on the device 'cpu' and would go on with 'Example GPU 80GB'" in told
            assert "Resume it on 'cpu' (devices, --devices), or name a new folder" in told
        assert main([*command[:2], str(tmp_path / "other"), *command[3:]]) == 0
        assert json.loads((tmp_path / "other/__run__/run.json").read_text())["device"] == "Example GPU 80GB"
        del described["device"], described["options"]["margins"], described["options"]["batch_invariant"]
        del described["options"]["refine"]
        path.write_text(json.dumps(described))
        assert main(command) == 0  # of dyntok 0.1
    assert len(codes(output)) == 20


def test_changed_input_is_refused(images, checkpoint_folder, tmp_path):
    folder = write_folder(tmp_path / "folder", images)
    table = write_table(tmp_path / "t.parquet", images)
    write_tar(tmp_path / "t-0.tar", tar_members(images))
    write_tar(tmp_path / "t-1.tar", tar_members(images))
    sources = {"folder": folder, "table": table, "tar": f"{tmp_path}/t-*.tar"}
    for name, source in sources.items():
        run(source, tmp_path / "out" / name, checkpoint_folder, shard_size=8)
    (tmp_path / "folder" / "a" / "000.jpg").write_bytes(images["a/001"])
    write_table(tmp_path / "t.parquet", dict(list(images.items())[1:]))
    (tmp_path / "t-1.tar").unlink()
    for name, source in sources.items():
        before = files(tmp_path / "out" / name)
        with pytest.raises(BatchError, match="the input (changed|has fewer)"):
            run(source, tmp_path / "out" / name, checkpoint_folder, shard_size=8)
        assert files(tmp_path / "out" / name) == before


def test_new_shards_behind_the_last_are_done(images, checkpoint_folder, tmp_path):
    write_tar(tmp_path / "t-0.tar", tar_members(images))
    run(f"{tmp_path}/t-*.tar", tmp_path / "out", checkpoint_folder)
    before = files(tmp_path / "out")
    write_tar(tmp_path / "t-1.tar", tar_members({f"new/{key}": content for key, content in images.items()}))
    assert run(f"{tmp_path}/t-*.tar", tmp_path / "out", checkpoint_folder).images == 20
    assert before.items() <= files(tmp_path / "out").items() and len(codes(tmp_path / "out")) == 40


def test_a_folder_with_other_files_is_not_touched(tars, checkpoint_folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(BatchError, match="files that are of no run"):
        run(tars, tmp_path / "mine", checkpoint_folder)
    assert [path.name for path in (tmp_path / "mine").rglob("*") if path.is_file() and path.name != "lock"] == [
        "thesis.txt"
    ]


def test_an_output_inside_the_input_is_refused(images, checkpoint_folder, tmp_path):
    folder = write_folder(tmp_path / "in", images)
    for output in (folder, f"{folder}/codes", f"file://{folder}/codes"):
        with pytest.raises(ConfigError, match="lies inside the input"):
            run(folder, output, checkpoint_folder)
    assert {path.name for path in (tmp_path / "in").iterdir()} == {"a", "b"}


def test_two_runs_at_once_are_refused(tars, checkpoint_folder, tmp_path):
    code = f"""
import sys
from dyntok.batch.storage import Output
with Output({str(tmp_path / "out")!r}, {{}}).locked():
    print("locked", flush=True)
    sys.stdin.read()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(BatchError, match="another run is writing"):
        run(tars, tmp_path / "out", checkpoint_folder)
    process.kill()
    process.communicate()
    assert run(tars, tmp_path / "out", checkpoint_folder).images == 58


def test_errors_are_listed_counted_and_can_stop_a_run(tars, checkpoint_folder, tmp_path):
    with pytest.raises(BatchError, match="2 of 20 images failed, more than the share of 0.05"):
        run(tars[1:2], tmp_path / "out", checkpoint_folder, shard_size=6, max_error_rate=0.05)
    assert set(errors(tmp_path / "out")) == {"1/a/003", "1/b/015"} and len(rows(tmp_path / "out")) == 18
    summary = run(tars[1:2], tmp_path / "ok", checkpoint_folder, max_error_rate=0.1)
    assert (summary.errors, summary.images) == (2, 18)
    with pytest.raises(ConfigError, match="share from 0 to 1"):
        run(tars, tmp_path / "ok", checkpoint_folder, max_error_rate=10)


def test_a_run_that_goes_wrong_stops_early(images, checkpoint_folder, tmp_path):
    bad = {f"{i:04d}": b"broken" for i in range(1000)}
    with pytest.raises(BatchError, match="of 1[0-9][0-9] images failed"):
        run(
            write_tar(tmp_path / "a.tar", tar_members(bad)),
            tmp_path / "out",
            checkpoint_folder,
            shard_size=50,
            max_error_rate=0.5,
        )
    assert len(errors(tmp_path / "out")) in (50, 100, 150)


def test_what_a_run_left_that_finished_nothing(tars, checkpoint_folder, tmp_path):
    """Data was written, its record was not, and then somebody asked for another format."""
    output = tmp_path / "out"
    run(tars[:1], output, checkpoint_folder)
    (output / "__run__" / "done" / "000000-000000.json").unlink()
    run(tars[:1], output, checkpoint_folder, format="webdataset")
    assert {path.name for path in output.iterdir()} == {"__run__", "000000-000000.tar"}


def test_an_output_that_can_not_be_written(tars, checkpoint_folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BatchError, match="can't"):
        run(tars, tmp_path / "file" / "out", checkpoint_folder)


def test_credentials_show_nowhere(tars, checkpoint_folder, tmp_path):
    secret = "hunter2hunter2"
    (tmp_path / "options.json").write_text(json.dumps({"s3": {"secret": secret}}))
    storage = read_storage_options(tmp_path / "options.json")
    assert storage["s3"]["secret"] == secret
    for address in (f"ftp://user:{secret}@127.0.0.1:1/in.tar", f"http://127.0.0.1:1/in.tar?token={secret}"):
        with pytest.raises(DyntokError) as caught:
            run(address, tmp_path / "out", checkpoint_folder, storage=storage)
        assert secret not in str(caught.value) and "127.0.0.1:1/in.tar" in str(caught.value)
    run(f"file://{tars[0]}", tmp_path / "out", checkpoint_folder, storage=storage)
    assert all(secret.encode() not in content for content in files(tmp_path / "out").values())


def test_a_file_system_without_folders(tars, checkpoint_folder):
    """fsspec's memory: another one than the local, here and for input."""
    import fsspec

    fsspec.filesystem("memory").put(tars[0], "/in/0.tar")
    summary = run("memory://in/0.tar", "memory://out", checkpoint_folder, shard_size=6)
    assert summary.images == 20 and run("memory://in/0.tar", "memory://out", checkpoint_folder, shard_size=6).rows == 0
    assert len(list(Output("memory://out", {}).names())) == 4


def test_progress_and_summary(tars, checkpoint_folder, tmp_path):
    seen = []

    def progress(summary):
        seen.append((summary.rows, summary.seconds_left))

    summary = run(tars, tmp_path / "out", checkpoint_folder, shard_size=6, progress=progress)
    assert [rows for rows, _ in seen][-1] == 60 and seen[-1][1] == pytest.approx(0, abs=0.01)
    assert summary.images == 58 and summary.tokens == sum(len(c) for c, _ in codes(tmp_path / "out").values())
    assert summary.bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.parquet"))
    assert "58 images" in str(summary) and "2 images failed" in str(summary) and isinstance(summary, Summary)


def test_a_tokenizer_that_is_loaded_already(tars, tokenizer, tmp_path):
    summary = tokenize(tars, tmp_path / "out", model=tokenizer, options=BatchOptions(budget=9), engine=HERE)
    assert summary.tokens == 9 * 58
    (table,) = {len(row["codes"]) for row in rows(tmp_path / "out")}
    assert table == 9 and pa.types.is_uint8(pa.array([1], pa.uint8()).type)


def test_a_run_notes_dtype_and_batch_invariance_and_does_not_mix_them(
    images, checkpoint_folder, tokenizer, tmp_path, capsys
):
    source, output = write_folder(tmp_path / "in", images), tmp_path / "out"
    command = ["batch", source, str(output), "--model", str(checkpoint_folder), "--shard-size", "6", "--workers", "0"]
    assert main([*command, "--batch-invariant"]) == 0
    assert json.loads((output / "__run__/run.json").read_text())["options"]["batch_invariant"] is True
    capsys.readouterr()
    assert main(command) == 1
    assert "holds another run: options.batch_invariant is False, was True" in capsys.readouterr().err
    tokenizer.in_precision(torch.bfloat16).batch_invariant = True
    tokenize(source, tmp_path / "given", model=tokenizer, engine=HERE)
    noted = json.loads((tmp_path / "given/__run__/run.json").read_text())["options"]
    assert noted["dtype"] == "bf16" and noted["batch_invariant"] is True
    with pytest.raises(ConfigError, match="dtype is 'fp16' in the options, but the given tokenizer has 'bf16'"):
        tokenize(source, tmp_path / "other", model=tokenizer, options=BatchOptions(dtype="fp16"), engine=HERE)


def test_records_come_in_the_order_of_the_input(tmp_path):
    """Beyond a million shards, too, whose numbers have more digits."""
    output = Output(tmp_path, {})
    record = Record({}, 0, 1, True, 1, 1, 1, 0, 0, {})
    spans = [Range(0, 2), Range(0, 1_000_000), Range(1, 0), Range(999_999, 0), Range(1_000_000, 0)]
    for span in reversed(spans):
        output.publish_json(f"__run__/done/{span.name}.json", dataclasses.asdict(record))
    assert list(read_records(output)) == [(span, record) for span in spans]
