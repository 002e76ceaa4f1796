"""What goes wrong in daily use of `dyntok batch` is an error with a reason: slow, damaged and unusual pictures."""

import errno
import gzip
import io
import multiprocessing
import zipfile

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from support.batch_data import codes, errors, pictures, rows, run, write_folder, write_table, write_tar
from support.formats import encoded

import dyntok
from dyntok.batch import EngineOptions, TokenizeColumn
from dyntok.cli.main import main
from dyntok.errors import BatchError, ConfigError


@pytest.fixture(scope="module")
def images(photos):
    return list(pictures(photos, 4).values())


def saved(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def many_scans(photo, scans):
    """A progressive JPEG whose last scan is there many times, so that it decodes slowly."""
    content = saved(Image.fromarray(photo).resize((3200, 3200)), "JPEG", progressive=True)
    last = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + last * (scans - content.count(b"\xff\xda")) + b"\xff\xd9"


def test_an_image_that_takes_too_long_is_an_error(images, photos, checkpoint_folder, tmp_path):
    table = write_table(tmp_path / "a.parquet", {"0": images[0], "slow": many_scans(photos[0], 400), "2": images[2]})
    engine = EngineOptions(workers=1, time_limit=1.0)
    run(table, tmp_path / "out", checkpoint_folder, engine=engine)
    assert set(codes(tmp_path / "out")) == {"0", "2"}
    assert errors(tmp_path / "out") == {"slow": "not decoded within 1 seconds; time_limit (--time-limit) allows more"}


def test_half_precision_that_overflows_is_an_error_per_image(images, tokenizer, tmp_path, capsys):
    with torch.no_grad():
        for name, weight in tokenizer.backbone.named_parameters():
            if "mlp" in name and weight.dim() == 2:
                weight.mul_(3000)
    tokenizer.save_pretrained(tmp_path / "model")
    table = write_table(tmp_path / "a.parquet", {str(i): image for i, image in enumerate(images)})
    command = ["batch", table, str(tmp_path / "out"), "--model", str(tmp_path / "model"), "--workers", "0"]
    assert main([*command, "--dtype", "fp16"]) == 3
    assert "0 images" in capsys.readouterr().out and not rows(tmp_path / "out")
    assert set(errors(tmp_path / "out")) == {"0", "1", "2", "3"}
    assert all(
        "in float16" in reason and "--dtype bf16 or fp32" in reason for reason in errors(tmp_path / "out").values()
    )


def test_unusual_colors_give_the_codes_of_encode(photos, checkpoint_folder, tmp_path):
    photo = Image.fromarray(photos[0]).resize((96, 80))
    deep = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    content = {
        "cmyk": saved(photo.convert("CMYK"), "JPEG"),
        "gray": saved(photo.convert("L"), "PNG"),
        "palette": saved(photo.convert("P"), "GIF"),
        "alpha": saved(photo.convert("RGBA"), "PNG"),
        "deep": saved(deep, "PNG"),
        "deep-tiff": saved(deep, "TIFF"),
    }
    run(write_table(tmp_path / "a.parquet", content), tmp_path / "out", checkpoint_folder)
    tok = dyntok.load(checkpoint_folder)
    assert {key: row for key, (row, _) in codes(tmp_path / "out").items()} == {
        key: tok.encode(image).codes[0].tolist() for key, image in content.items()
    }


def test_pictures_that_need_a_plugin_are_read_and_broken_ones_listed(images, checkpoint_folder, tmp_path):
    heads = {"a.heic": b"\0\0\0\x18ftypheic" + bytes(100), "b.jxl": b"\xff\x0a" + bytes(100)}
    photo = Image.open(io.BytesIO(images[0]))
    whole = {"c.jpg": images[0], "d.heic": encoded(photo, "HEIC"), "e.jxl": encoded(photo, "JPEG XL")}
    (tmp_path / "in").mkdir()
    for name, content in {**heads, **whole}.items():
        (tmp_path / "in" / name).write_bytes(content)
    summary = run(tmp_path / "in", tmp_path / "out", checkpoint_folder)
    assert set(errors(tmp_path / "out")) == set(heads) and set(codes(tmp_path / "out")) == set(whole)
    assert summary.errors == 2 and not summary.left_out


def test_a_damaged_zip_says_so(images, checkpoint_folder, tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i, image in enumerate(images):
            archive.writestr(f"{i}.jpg", image)
    content = bytearray((tmp_path / "a.zip").read_bytes())
    place = content.index(images[1][-160:-100])
    content[place : place + 60] = bytes(60)  # in a member: its checksum is wrong
    (tmp_path / "a.zip").write_bytes(content)
    run(tmp_path / "a.zip", tmp_path / "out", checkpoint_folder)
    assert set(codes(tmp_path / "out")) == {"0", "2", "3"} and len(errors(tmp_path / "out")) == 1
    (tmp_path / "cut.zip").write_bytes(content[: len(content) // 2])
    command = ["batch", str(tmp_path / "cut.zip"), str(tmp_path / "cut"), "--model", str(checkpoint_folder)]
    assert main(command) == 3 and "1 image failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "fault", [OSError(errno.EIO, "it is gone"), RuntimeError("it is gone")], ids=["OSError", "other"]
)
@pytest.mark.parametrize(
    ("name", "reads"), [("a.zip", 0), ("a.zip", 8), ("a.tar.gz", 1), ("a.tar.zst", 1), ("a.tar", 3)]
)
def test_a_storage_that_fails_is_no_damage_of_an_archive(
    name, reads, fault, images, checkpoint_folder, tmp_path, monkeypatch
):
    """A run stops, and resumes where nothing is lost."""
    from fsspec.implementations.memory import MemoryFile

    path = tmp_path / "plain"
    if name == "a.zip":
        with zipfile.ZipFile(path, "w") as archive:
            for i, image in enumerate(images):
                archive.writestr(f"{i}.jpg", image)
    else:
        write_tar(path, [(f"{i}.jpg", image) for i, image in enumerate(images)])
    pack = {"a.tar.gz": gzip.compress, "a.tar.zst": lambda content: pa.compress(content, codec="zstd", asbytes=True)}
    fsspec.filesystem("memory").pipe_file(f"/faults/{name}", pack.get(name, bytes)(path.read_bytes()))
    left = iter(range(reads))

    def read(file, size=-1):
        if next(left, None) is None:
            raise fault
        return io.BytesIO.read(file, size)

    with monkeypatch.context() as patch, pytest.raises(BatchError, match=f"can't read memory://.*{name}: it is gone"):
        patch.setattr(MemoryFile, "read", read)
        run(f"memory://faults/{name}", tmp_path / "out", checkpoint_folder)
    assert run(f"memory://faults/{name}", tmp_path / "out", checkpoint_folder).images == 4
    assert not errors(tmp_path / "out")


def test_the_home_folder_in_paths(images, checkpoint_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_folder(tmp_path / "in", {"0": images[0]})
    run("~/in", "~/out", checkpoint_folder)
    assert list(codes(tmp_path / "out")) == ["0.jpg"]


def test_columns_have_types_where_the_first_images_are_bad(images, checkpoint_folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    cells = [{"bytes": content, "path": None} for content in [b"bad", b"bad", images[0], images[1]]]
    data = datasets.Dataset.from_dict({"image": cells}).cast_column("image", datasets.Image(decode=False))
    column = TokenizeColumn(str(checkpoint_folder))
    mapped = data.map(column, batched=True, batch_size=2, writer_batch_size=2, remove_columns="image")
    assert mapped[0]["codes"] == [] and mapped[0]["error"] and len(mapped[2]["codes"]) > 0
    assert mapped.features["codes"].feature.dtype == "uint8" and mapped.features["width"].dtype == "uint32"


def test_a_device_that_is_not_there(checkpoint_folder, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    command = ["batch", str(tmp_path / "in"), str(tmp_path / "out"), "--model", str(checkpoint_folder)]
    assert main([*command, "--devices", "cuda:99"]) == 1
    told = capsys.readouterr().err
    assert "has no device 'cuda:99' here" in told and told.count("\n") == 1


def _run_in_pool(arguments):
    table, output, model, workers = arguments
    return run(table, output, model, engine=EngineOptions(workers=workers)).images


def test_a_run_in_a_worker_of_a_pool(images, checkpoint_folder, tmp_path):
    """Such processes are daemonic and may have no children."""
    table = write_table(tmp_path / "a.parquet", {str(i): image for i, image in enumerate(images)})
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.map(_run_in_pool, [(table, tmp_path / "out", checkpoint_folder, None)]) == [4]
        with pytest.raises(ConfigError, match="workers is 2, but this is a daemonic process"):
            pool.map(_run_in_pool, [(table, tmp_path / "other", checkpoint_folder, 2)])
