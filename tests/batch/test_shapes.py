"""Data sets of pictures of many shapes: the same codes as one picture at a time, and grids, sizes and boxes kept."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from support.any_grid import any_grid_tokenizer
from support.batch_data import codes, errors, files, rows, run, write_table

import dyntok
from dyntok.batch import EngineOptions, TokenizeColumn, inspect, read
from dyntok.cli.main import main
from dyntok.errors import BatchError, ConfigError

SIZES = [(64, 64), (240, 180), (111, 166), (300, 100), (90, 300), (17, 13), (64, 64), (240, 180), (511, 509)]
TARGET = 9.0  # dB; these weights are random


@pytest.fixture(scope="module")
def folder(photos, tmp_path_factory):
    """Nine pictures of seven shapes, and a strip that is too long for fit "keep"."""
    folder = tmp_path_factory.mktemp("shapes") / "in"
    folder.mkdir()
    for i, size in enumerate([*SIZES, (900, 10)]):
        Image.fromarray(photos[i % 4]).resize(size).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def model(small_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    any_grid_tokenizer(small_config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tok(model):
    return dyntok.load(model)


def singles(tok, folder, **options):
    """Key -> codes and positions, one call for each picture."""
    encodings = {f"{i}.png": tok.encode(folder / f"{i}.png", **options) for i in range(len(SIZES))}
    return {key: (e.codes[0].tolist(), e.positions[0].tolist()) for key, e in encodings.items()}


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        (EngineOptions(workers=0), {}),
        (EngineOptions(workers=2, batch_size=3), {"psnr": TARGET}),
        (EngineOptions(devices=("cpu", "cpu"), workers=2), {}),
        (EngineOptions("ray", actors=1, batch_size=4), {"psnr": TARGET}),
    ],
    ids=["alone", "workers", "devices", "ray"],
)
def test_every_engine_gives_the_codes_of_single_pictures(engine, options, folder, model, tok, tmp_path):
    if engine.name == "ray":
        ray = pytest.importorskip("ray")
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        run(folder, tmp_path / "out", model, engine=engine, shard_size=4, **options)
    finally:
        if engine.name == "ray":
            ray.shutdown()
    found = codes(tmp_path / "out")
    assert found == singles(tok, folder, **options)
    assert len({len(row[0]) for row in found.values()}) > 2  # the length follows the picture
    assert "90.0 to 1" in errors(tmp_path / "out")["9.png"]
    found = {row["key"]: row for row in rows(tmp_path / "out")}
    assert found["3.png"]["grid"][1] > 2 * found["3.png"]["grid"][0] and found["4.png"]["grid"][0] > 2
    assert found["4.png"]["crop_box"] == [0, 0, 90, 300]


@pytest.mark.parametrize(
    "options",
    [
        {"max_patches": 300},
        {"size": (48, 96), "fit": "crop"},
        {"fit": "pad", "places": "lattice"},
        {"fit": "squash", "budget": 9},
    ],
    ids=str,
)
def test_shape_options_are_those_of_encode(options, folder, model, tok, tmp_path):
    run(folder, tmp_path / "out", model, **options)
    found = codes(tmp_path / "out")
    assert {key: found[key] for key in found if key != "9.png"} == singles(tok, folder, **options)
    wide = 300 if "max_patches" in options else 64
    (table,) = [pq.read_table(path) for path in (tmp_path / "out").glob("*.parquet")]
    assert table.schema.field("positions").type.value_type == (pa.uint16() if wide > 256 else pa.uint8())


def test_the_command_line_and_a_resumed_run(folder, model, tok, tmp_path, capsys):
    command = ["batch", str(folder), str(tmp_path / "out"), "--model", str(model), "--shard-size", "3"]
    shape = ["--fit", "crop", "--size", "64x128", "--places", "lattice", "--psnr", str(TARGET)]
    assert main([*command, *shape]) == 0
    assert "of the originals' area was cut off" in capsys.readouterr().out
    before = files(tmp_path / "out")
    sorted((tmp_path / "out").glob("*.parquet"))[1].unlink()
    assert main([*command, *shape]) == 0 and files(tmp_path / "out") == before
    capsys.readouterr()
    assert main([*command, "--fit", "crop", "--max-patches", "128"]) == 1
    told = capsys.readouterr().err
    assert f"options.psnr is None, was {TARGET}" in told
    assert "options.max_patches is 128" in told and "options.size is None, was [64, 128]" in told
    found = codes(tmp_path / "out")
    wanted = singles(tok, folder, fit="crop", size=(64, 128), places="lattice", psnr=TARGET)
    assert {key: found[key] for key in wanted} == wanted


@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_readers_give_grids_sizes_and_boxes(form, folder, model, tok, tmp_path, capsys):
    run(folder, tmp_path / "out", model, format=form, fit="crop", size=(48, 96))
    (batch,) = read(tmp_path / "out")
    assert batch.encoding.grids.tolist() == [[6, 12]] * 10
    assert batch.sizes.tolist() == [[h, w] for w, h in [*SIZES, (900, 10)]]
    assert batch.crop_boxes[0].tolist() == [0, 16, 64, 48]
    assert batch.to_tensors(72)["crop_box"].shape == (10, 4)
    size = tuple(batch.sizes[1].tolist())
    assert tok.decode(batch.encoding[1], size=size)[0].size == (240, 180)
    report = inspect(tmp_path / "out")
    assert report.grids == {"6x12": 10} and 0.2 < report.area_used < 0.9
    assert main(["inspect", str(tmp_path / "out"), "--model", str(model), "-o", str(tmp_path / "report")]) == 0
    assert "grids        6x12 (10 images)" in capsys.readouterr().out
    sheet = Image.open(tmp_path / "report" / "sheet.png")
    assert sheet.width > 6 * 256  # two panels of three wide pictures


def test_several_shapes_in_a_row(folder, model, tok, tmp_path):
    content = [(folder / f"{i}.png").read_bytes() for i in range(4)]
    cells = pa.array([[content[1], None, b"bad", content[3]], [], [content[2]]], pa.list_(pa.binary()))
    pq.write_table(pa.table({"key": ["a", "b", "c"], "images": cells}), tmp_path / "in.parquet")
    run(tmp_path / "in.parquet", tmp_path / "out", model, interleaved=True)
    (batch,) = read(tmp_path / "out")
    wanted = tok.encode([content[1], content[3], content[2]])
    assert batch.encoding == wanted and batch.row_of_image == [0, 0, 2]
    assert batch.sizes.tolist() == [[180, 240], [100, 300], [166, 111]]
    assert batch.crop_boxes.tolist() == [[0, 0, 240, 180], [0, 0, 300, 100], [0, 0, 111, 166]]


@pytest.mark.parametrize("places", ["map", "lattice", "free"])
def test_megatron_documents_say_their_grids(places, folder, model, tok, tmp_path):
    layout = "positions" if places == "free" else None
    run(folder, tmp_path / "out", model, format="megatron", vocab_size=1000, places=places, layout=layout)
    ids = np.fromfile(tmp_path / "out" / "000000-000000.bin", np.uint16).astype(np.int64)
    pieces = torch.from_numpy(ids).split([int(n) for n in np.diff(np.append(np.flatnonzero(ids == 1000), len(ids)))])
    vocab = dyntok.VisualVocab.of(tok, after=1000, layout=layout or places, any_grid=True)
    wanted = tok.encode([folder / f"{i}.png" for i in range(len(SIZES))], places=places)
    assert vocab.to_encoding(pieces) == wanted


def test_the_map_column(folder, model, tok):
    paths = [str(folder / f"{i}.png") for i in range(4)] + ["none.png"]
    column = TokenizeColumn(str(model), max_patches=300, places="lattice", psnr=TARGET)
    mapped = column({"image": paths})
    wanted = tok.encode(paths[:4], max_patches=300, places="lattice", psnr=TARGET)
    assert [row.tolist() for row in mapped["codes"][:4]] == [row.tolist() for row in wanted.codes]
    assert [row.tolist() for row in mapped["grid"][:4]] == wanted.grids.tolist()
    assert mapped["crop_box"][1].tolist() == [0, 0, 240, 180] and mapped["crop_box"][4].tolist() == [0] * 4
    assert mapped["positions"][4].dtype == mapped["positions"][0].dtype == np.uint16
    assert "none.png" in mapped["error"][4]


def test_what_does_not_fit_is_refused_before_the_run(folder, model, checkpoint_folder, small_config, tmp_path):
    decoder = dataclasses.replace(small_config.decoder, pixels=False)
    without_pixels = dyntok.DynamicVisualTokenizer(dataclasses.replace(small_config, decoder=decoder))
    for name, options, message in [
        (checkpoint_folder, {"max_patches": 256}, "knows the grid 8 x 8 alone"),
        (checkpoint_folder, {"budget": 65}, "a picture has at most 64 patches"),
        (model, {"size": (60, 64)}, "multiples of 8 pixels"),
        (model, {"fit": "stretch"}, "fit is 'stretch', expected one of"),
        (model, {"places": "here"}, "places is 'here'"),
        (model, {"psnr": 200}, "psnr is 200, expected decibels"),
        (model, {"psnr": 20.0, "budget": 5}, "budget and psnr were both given"),
        (without_pixels, {"psnr": 20.0}, "this tokenizer makes no pictures"),
    ]:
        with pytest.raises(ConfigError, match=message):
            run(folder, tmp_path / "out", name, **options)
        assert not (tmp_path / "out").exists()


def test_a_budget_over_the_grid_is_an_error_of_that_picture(folder, model, tmp_path):
    run(folder, tmp_path / "out", model, budget=60)
    assert "the picture's grid of" in errors(tmp_path / "out")["3.png"] and "0.png" in codes(tmp_path / "out")


def test_an_output_of_an_earlier_version(folder, model, checkpoint_folder, photos, tmp_path):
    """Without crop boxes it is read as before; another run into it is refused."""
    source = write_table(tmp_path / "in.parquet", {"a": (folder / "0.png").read_bytes()})
    run(source, tmp_path / "out", checkpoint_folder)
    described = tmp_path / "out" / "__run__" / "run.json"
    values = json.loads(described.read_text())
    options = {
        name: values["options"][name] for name in values["options"] if name not in ("fit", "size", "places", "psnr")
    }
    described.write_text(json.dumps({**values, "version": 1, "options": options}))
    path = tmp_path / "out" / "000000-000000.parquet"
    pq.write_table(pq.read_table(path).drop_columns("crop_box"), path)
    record = tmp_path / "out" / "__run__" / "done" / "000000-000000.json"
    facts = {path.name: {"rows": 1, "bytes": path.stat().st_size}}
    record.write_text(json.dumps({**json.loads(record.read_text()), "files": facts}))
    (batch,) = read(tmp_path / "out")
    assert batch.keys == ["a"] and batch.crop_boxes is None and batch.sizes.tolist() == [[64, 64]]
    assert "crop_box" not in batch.to_tensors(64) and inspect(tmp_path / "out").area_used is None
    with pytest.raises(BatchError, match="version is 2, was 1"):
        run(source, tmp_path / "out", checkpoint_folder)
