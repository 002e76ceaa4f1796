"""`dyntok batch` on real data sets: broken files mixed with good ones, and runs that are killed over and over.

Needs the folders `nasty`, `photos` and `captioned` in the one that DYNTOK_DATA names.
"""

import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.batch_data import codes, errors, files, records, write_tar

from dyntok import ImageError
from dyntok.cli.main import main
from dyntok.config import ImageConfig
from dyntok.image import to_array

DATA = os.environ.get("DYNTOK_DATA")
pytestmark = pytest.mark.skipif(not DATA, reason="DYNTOK_DATA names no folder of photographs")


def photographs(count):
    """Key -> JPEG, from the first tar."""
    found = {}
    with tarfile.open(Path(DATA) / "photos" / "photos-000.tar") as tar:
        for member in tar:
            if member.name.endswith(".jpg"):
                found[member.name.removesuffix(".jpg")] = tar.extractfile(member).read()
            if len(found) == count:
                return found


@pytest.fixture(scope="module")
def mixed():
    """(key, extension, content, whether it can be read), one good photograph for each file of `nasty`."""
    nasty = sorted(path for path in (Path(DATA) / "nasty").iterdir() if path.is_file())
    good = photographs(len(nasty))
    rows = []
    for path, (key, content) in zip(nasty, good.items(), strict=True):
        try:
            to_array(path, ImageConfig(img_size=64))
            readable = True
        except ImageError:
            readable = False
        rows += [(path.stem.replace(".", "_") + f"-{len(rows)}", path.suffix[1:].lower(), path.read_bytes(), readable)]
        rows += [(key, "jpg", content, True)]
    return rows


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_broken_files_among_good_ones(kind, mixed, checkpoint_folder, tmp_path):
    """Every good image is tokenized, every bad one is in the errors table, and the run ends normally."""
    readable = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"}
    if kind == "tar":  # where a name says what is an image; the others are no members that anybody asks for
        rows = [row for row in mixed if row[1] in readable]
        source = write_tar(
            tmp_path / "in.tar", [(f"{key}.{extension}", content) for key, extension, content, _ in rows]
        )
    else:
        rows, source = mixed, str(tmp_path / "in.parquet")
        cells = pa.array([content for *_, content, _ in rows], pa.binary())
        pq.write_table(pa.table({"key": [key for key, *_ in rows], "image": cells}), source, row_group_size=50)
    assert main(["batch", source, str(tmp_path / "out"), "--model", str(checkpoint_folder), "--shard-size", "300"]) == 3
    assert set(codes(tmp_path / "out")) == {key for key, *_, good in rows if good}
    assert set(errors(tmp_path / "out")) == {key for key, *_, good in rows if not good}
    assert len(rows) > 700 and sum(not good for *_, good in rows) > 30


def start(output, *options):
    sources = [str(path) for folder in ("photos", "captioned") for path in sorted((Path(DATA) / folder).glob("*.tar"))]
    command = [sys.executable, "-m", "dyntok.cli", "batch", *sources, str(output), "--shard-size", "512", *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """All photographs with the bundled tokenizer, in one run."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    process = start(output)
    _, told = process.communicate()
    assert process.returncode == 0, told
    assert len(codes(output)) == sum(record["rows"] for record in records(output).values()) > 18_000
    return output


def finished(output):
    return sum(1 for _ in Path(output).glob("__run__/done/*.json"))


def wait_for(process, output, count):
    deadline = time.monotonic() + 300
    while finished(output) < count:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.02)


def check(output, undisturbed):
    assert files(output) == files(undisturbed)
    assert {path.name for path in (output / "__run__").iterdir()} == {"done", "lock", "run.json"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_thirty_times(undisturbed, tmp_path):
    """Spread over the images of the run; every start makes progress."""
    output, chance = tmp_path / "out", random.Random(0)
    for _ in range(30):
        before = finished(output)
        process = start(output)
        wait_for(process, output, before + 1)
        time.sleep(chance.random() * 1.0)
        process.kill()
        process.communicate()
    process = start(output)
    _, told = process.communicate()
    assert process.returncode == 0, told
    check(output, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ray_killed_ten_times(undisturbed, tmp_path):
    """The pool's actors and the driver by turns; every start makes progress."""
    pytest.importorskip("ray")
    output, chance = tmp_path / "out", random.Random(1)
    kills = 0
    for _ in range(5):
        before = finished(output)
        process = start(output, "--engine", "ray", "--actors", "1")
        while not (actors := pool()):
            time.sleep(0.1)
            assert process.poll() is None, process.stderr.read()
        time.sleep(3 + chance.random() * 6)
        actors = pool()
        for actor in actors:
            os.kill(actor, signal.SIGKILL)
        wait_for(process, output, before + 1)
        time.sleep(chance.random())
        process.kill()
        process.communicate()
        kills += bool(actors) + 1
        while pool():  # Ray's own processes follow their driver
            time.sleep(0.1)
    process = start(output, "--engine", "ray", "--actors", "1")
    _, told = process.communicate()
    assert process.returncode == 0 and kills == 10, told
    check(output, undisturbed)


def pool():
    """The processes of the pool's actors."""
    return [
        int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if b"ray::MapWorker" in content(path)
    ]


def content(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""
