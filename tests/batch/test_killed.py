"""Runs that are killed, interrupted, or out of disk space resume without loss."""

import errno
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from support.batch_data import (
    codes,
    files,
    pictures,
    records,
    run,
    write_tar,
)

from dyntok.batch import EngineOptions
from dyntok.errors import BatchError


def command(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "dyntok.cli", "batch", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finished(output):
    return len(records(output))


def until(process, condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def many(photos, tmp_path_factory):
    """Two tars of 300 images."""
    folder, some = tmp_path_factory.mktemp("many"), pictures(photos, 60)
    for i in range(2):
        write_tar(
            folder / f"{i}.tar", [(f"{i}-{j}-{key}.jpg", content) for j in range(5) for key, content in some.items()]
        )
    return f"{folder}/{{0..1}}.tar"


@pytest.mark.parametrize(
    "options", [[], ["--workers", "0"], ["--devices", "cpu,cpu"]], ids=["workers", "alone", "devices"]
)
def test_killed_at_any_moment(many, options, checkpoint_folder, tmp_path):
    """Each start makes progress until nothing is left, and in the end all is as in an undisturbed run."""
    output, done, killed = tmp_path / "out", 0, 0
    arguments = ["--model", checkpoint_folder, "--shard-size", 20, "--batch-size", 8, *options, many, output]
    run(many, tmp_path / "undisturbed", checkpoint_folder, shard_size=20)
    rng = np.random.default_rng(0)
    for _ in range(4):
        process = command(*arguments)
        until(process, lambda: finished(output) > done or process.poll() == 0)  # noqa: B023
        time.sleep(rng.random() * 0.05)
        process.kill()
        process.communicate()
        assert finished(output) > done or process.returncode == 0
        killed += process.returncode == -signal.SIGKILL
        done = finished(output)
    process = command(*arguments)
    _, told = process.communicate()
    assert process.returncode == 0, told
    assert killed and done > 3 and files(output) == files(tmp_path / "undisturbed")
    assert {path.name for path in output.iterdir()} - {f"{name}.parquet" for name in records(output)} == {"__run__"}
    assert {path.name for path in (output / "__run__").iterdir()} == {"done", "lock", "run.json"}


@pytest.mark.parametrize("options", [[], ["--devices", "cpu,cpu"]], ids=["one", "devices"])
def test_interrupted_from_the_keyboard(many, options, checkpoint_folder, tmp_path):
    """Ctrl-C reaches every process of the terminal."""
    output = tmp_path / "out"
    process = command(
        "--model", checkpoint_folder, "--shard-size", 40, *options, many, output, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # background jobs ignore it
    )  # fmt: skip
    until(process, lambda: finished(output) >= 2)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate()
    assert process.returncode == 130 and "Traceback" not in told, told
    assert re.search(r"output shards? complete; run the same command again to resume", told), told
    assert not (output / "__run__" / "tmp").exists()
    assert all((output / f"{name}.parquet").exists() for name in records(output))


def test_a_full_disk(many, checkpoint_folder, tmp_path):
    """A limit on the size of a file stands in for it: writing fails with an error of the system."""
    output = tmp_path / "out"
    process = command(
        "--model", checkpoint_folder, "--shard-size", 100, "--workers", 0, many, output,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)),
    )  # fmt: skip
    _, told = process.communicate()
    assert process.returncode == 1 and "can't write" in told and "Traceback" not in told, told
    assert not list(output.glob("*.parquet")) and not (output / "__run__" / "tmp").exists()
    run(many, output, checkpoint_folder, shard_size=100)
    assert len(codes(output)) == 600


@pytest.mark.parametrize("workers", [0, 2])
def test_no_thread_outlives_a_run_that_fails(workers, many, checkpoint_folder, tmp_path, monkeypatch):
    """A thread that computes while the interpreter exits would abort the process after the message."""
    before, held = set(threading.enumerate()), []

    def refuse(*arguments, **options):
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr("dyntok.batch.formats.pq.write_table", refuse)
    try:
        run(
            many, tmp_path / "out", checkpoint_folder, shard_size=8, progress=lambda summary: None,
            engine=EngineOptions(workers=workers, batch_size=8),
        )  # fmt: skip
    except BatchError as error:
        held.append(error)  # as a program does that prints the error and ends
    assert "File too large" in str(held[0]) and set(threading.enumerate()) == before


@pytest.mark.parametrize("options", [["--workers", "2"], ["--devices", "cpu,cpu"]], ids=["workers", "devices"])
def test_no_file_stays_open_after_a_run(options, photos, checkpoint_folder, tmp_path):
    tar = write_tar(tmp_path / "a.tar", [(f"{key}.jpg", content) for key, content in pictures(photos, 8).items()])
    arguments = ["batch", "--model", str(checkpoint_folder), "--batch-size", "4", *options, tar, str(tmp_path / "out")]
    strict = [sys.executable, "-X", "dev", "-W", "error::ResourceWarning", "-m", "dyntok.cli"]
    done = subprocess.run([*strict, *arguments], capture_output=True, text=True)
    assert done.returncode == 0 and "ResourceWarning" not in done.stderr, done.stderr


def test_a_decoding_process_that_dies_is_told(many, checkpoint_folder, tmp_path):
    def kill(summary):
        for process in multiprocessing.active_children():
            process.kill()

    with pytest.raises(BatchError, match="a decoding process died"):
        run(
            many,
            tmp_path / "out",
            checkpoint_folder,
            engine=EngineOptions(workers=1, batch_size=2),
            progress=kill,
            shard_size=40,
        )
    run(many, tmp_path / "out", checkpoint_folder, shard_size=40)
    assert len(codes(tmp_path / "out")) == 600
