"""Codes do not depend on how the work is done: processes, batch sizes, devices, Ray; and Ray's workers may die."""

import json
import os
import signal
from pathlib import Path

import pytest
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

from dyntok.batch import EngineOptions
from dyntok.batch.engines.rows import Work
from dyntok.batch.inputs.samples import Shard
from dyntok.errors import BatchError, ConfigError, DataError


@pytest.fixture(scope="module")
def inputs(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("in")
    images = pictures(photos) | {"bad/1": b"broken", "bad/2": b""}
    for i in range(3):
        write_tar(folder / f"{i}.tar", tar_members({f"{i}/{key}": content for key, content in images.items()}))
        write_table(folder / f"{i}.parquet", {f"{i}/{key}": content for key, content in images.items()})
    (folder / "list.txt").write_text("".join(f"folder/{key}.jpg\n" for key in images))
    return {
        "tar": f"{folder}/*.tar",
        "parquet": f"{folder}/*.parquet",
        "folder": write_folder(folder / "folder", images),
        "list": str(folder / "list.txt"),
    }


@pytest.fixture(scope="module")
def wanted(inputs, checkpoint_folder, tmp_path_factory):
    """Kind -> files of the output."""
    found = {}
    for kind, source in inputs.items():
        output = tmp_path_factory.mktemp("wanted") / kind
        run(source, output, checkpoint_folder, shard_size=9)
        found[kind] = files(output)
    return found


@pytest.mark.parametrize("kind", ["tar", "parquet", "folder", "list"])
@pytest.mark.parametrize(
    "engine",
    [
        EngineOptions(workers=1),
        EngineOptions(workers=2, batch_size=1),
        EngineOptions(workers=4, batch_size=5),
        EngineOptions(workers=0, batch_size=64, threads=1),
    ],
    ids=["1 worker", "2 workers", "4 workers", "alone"],
)
def test_processes_and_batch_sizes(kind, engine, inputs, wanted, checkpoint_folder, tmp_path):
    run(inputs[kind], tmp_path / "out", checkpoint_folder, shard_size=9, engine=engine)
    assert files(tmp_path / "out") == wanted[kind]


@pytest.mark.parametrize("devices", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_model_processes(devices, inputs, wanted, checkpoint_folder, tmp_path):
    run(
        inputs["tar"],
        tmp_path / "out",
        checkpoint_folder,
        shard_size=9,
        engine=EngineOptions(devices=("cpu",) * devices, workers=devices),
    )
    assert files(tmp_path / "out") == wanted["tar"]


def test_an_error_in_a_model_process_is_told(inputs, checkpoint_folder, tmp_path):
    with pytest.raises(DataError, match="no column 'title'"):
        run(
            inputs["parquet"],
            tmp_path / "out",
            checkpoint_folder,
            keep_columns=["title"],
            engine=EngineOptions(devices=("cpu", "cpu")),
        )


def test_engines_that_do_not_fit():
    for options in (
        {"name": "spark"},
        {"workers": -1},
        {"batch_size": 0},
        {"address": "auto"},
        {"actors": 2},
        {"name": "ray", "workers": 2},
        {"name": "ray", "devices": ("cpu",)},
        {"threads": 0},
    ):
        with pytest.raises(ConfigError):
            EngineOptions(**options)


@pytest.fixture(scope="module")
def ray():
    """One cluster for all of these tests, where there is Ray."""
    ray = pytest.importorskip("ray")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield ray
    ray.shutdown()


@pytest.mark.parametrize("kind", ["tar", "parquet", "folder", "list"])
def test_ray_gives_the_same_files(kind, ray, inputs, wanted, checkpoint_folder, tmp_path):
    engine = EngineOptions("ray", actors=1, batch_size=4)
    run(inputs[kind], tmp_path / "out", checkpoint_folder, shard_size=9, engine=engine)
    assert files(tmp_path / "out") == wanted[kind]
    assert run(inputs[kind], tmp_path / "out", checkpoint_folder, shard_size=9, engine=engine).rows == 0


def test_ray_begins_before_millions_of_files_are_listed():
    pytest.importorskip("ray")
    from dyntok.batch.engines.ray import _portions

    entries = (("k.jpg", "in/k.jpg"),) * 8192
    folder = iter([Work(Shard(i, "in", 0, "", entries), 0, 0) for i in range(200)])
    assert len(next(_portions(folder))) == 128 and len(list(folder)) == 72
    tars = [Work(Shard(i, f"{i}.tar", 0, ""), 0, 0) for i in range(5000)]
    assert [len(portion) for portion in _portions(tars)] == [4096, 904]


def test_ray_writes_the_same_margins(ray, inputs, checkpoint_folder, tmp_path):
    for name, engine in (("ray", EngineOptions("ray", actors=1, batch_size=4)), ("local", HERE)):
        run(inputs["tar"], tmp_path / name, checkpoint_folder, margins=True, engine=engine)
    assert files(tmp_path / "ray") == files(tmp_path / "local")
    assert all(len(row["margins"]) == 2 for row in rows(tmp_path / "ray"))


def test_ray_tells_errors_of_ours(ray, inputs, checkpoint_folder, tmp_path):
    with pytest.raises(DataError, match="no column 'title'; it has key, image, txt$"):
        run(
            inputs["parquet"],
            tmp_path / "out",
            checkpoint_folder,
            keep_columns=["title"],
            engine=EngineOptions("ray", actors=1),
        )


def test_ray_does_not_go_on_with_another_kind_of_device(ray, inputs, checkpoint_folder, tmp_path):
    run(inputs["tar"], tmp_path / "out", checkpoint_folder, shard_size=9)
    path = tmp_path / "out" / "__run__" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"device": "Example GPU 80GB"}))
    with pytest.raises(BatchError, match="begun on the device 'Example GPU 80GB' and would go on with 'cpu'"):
        run(inputs["tar"], tmp_path / "out", checkpoint_folder, shard_size=9, engine=EngineOptions("ray", actors=1))


def test_ray_keeps_a_core_for_reading(ray, inputs, checkpoint_folder, tmp_path):
    with pytest.raises(ConfigError, match="leave nothing of a cluster of 2 cores"):
        run(inputs["tar"], tmp_path / "out", checkpoint_folder, engine=EngineOptions("ray", actors=1, threads=2))


def test_ray_retries_what_failed(ray, inputs, wanted, checkpoint_folder, tmp_path):
    run(inputs["tar"], tmp_path / "out", checkpoint_folder, shard_size=9)
    summary = run(
        inputs["tar"],
        tmp_path / "out",
        checkpoint_folder,
        shard_size=9,
        retry_errors=True,
        engine=EngineOptions("ray", actors=1),
    )
    assert (summary.rows, summary.errors) == (6, 6) and len(errors(tmp_path / "out")) == 6
    assert len(codes(tmp_path / "out")) == 60


def test_ray_actors_that_die_change_nothing(ray, photos, checkpoint_folder, tmp_path):
    images = pictures(photos)
    many = {f"{i}/{key}": content for i in range(15) for key, content in images.items()}
    sources = [
        write_tar(tmp_path / f"{i}.tar", tar_members({f"{i}/{key}": content for key, content in many.items()}))
        for i in range(2)
    ]
    run(sources, tmp_path / "wanted", checkpoint_folder, shard_size=50, engine=HERE)
    killed = []

    def kill(summary):
        """SIGKILL to every process of the pool, twice."""
        if summary.rows in (20, 320) and len(killed) < 2:
            processes = [
                int(path.parent.name)
                for path in Path("/proc").glob("[0-9]*/cmdline")
                if b"ray::MapWorker" in path.read_bytes()
            ]
            for process in processes:
                os.kill(process, signal.SIGKILL)
            killed.append(len(processes))

    summary = run(
        sources,
        tmp_path / "out",
        checkpoint_folder,
        shard_size=50,
        engine=EngineOptions("ray", actors=1, batch_size=4),
        progress=kill,
    )
    assert sum(killed) >= 1 and summary.images == 600
    assert files(tmp_path / "out") == files(tmp_path / "wanted")
