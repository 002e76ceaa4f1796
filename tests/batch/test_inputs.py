"""`dyntok batch` reads every kind of input the same way: keys, companions, codes.

And what shards from the wild hold.
"""

import io
import os
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.batch_data import (
    codes,
    errors,
    pictures,
    records,
    rows,
    run,
    tar_members,
    write_folder,
    write_table,
    write_tar,
)

import dyntok
from dyntok import ConfigError
from dyntok.batch import BatchOptions
from dyntok.batch.engines import stages
from dyntok.batch.engines.rows import RangeEnd, Work
from dyntok.batch.inputs.open import open_input
from dyntok.errors import BatchError, DataError


@pytest.fixture(scope="module")
def images(photos):
    return pictures(photos)


@pytest.fixture(scope="module")
def wanted(images, checkpoint_folder):
    """Key -> codes and positions, as `encode` gives them."""
    encoding = dyntok.load(checkpoint_folder).encode(list(images.values()))
    pairs = zip(encoding.codes, encoding.positions, strict=True)
    return {key: (c.tolist(), p.tolist()) for key, (c, p) in zip(images, pairs, strict=True)}


def test_every_kind_gives_the_codes_of_encode(images, wanted, checkpoint_folder, tmp_path):
    folder = write_folder(tmp_path / "folder", images)
    (tmp_path / "list.txt").write_text("".join(f"folder/{key}.jpg\n" for key in images) + "\n")
    inputs = {
        "tar": write_tar(tmp_path / "one.tar", tar_members(images)),
        "parquet": write_table(tmp_path / "one.parquet", images),
        "bytes": str(tmp_path / "bytes.parquet"),
        "folder": folder,
        "list": str(tmp_path / "list.txt"),
        "url": f"file://{folder}",
    }
    pq.write_table(
        pa.table({"__key__": list(images), "jpg": pa.array(list(images.values()), pa.binary())}), inputs["bytes"]
    )
    for name, source in inputs.items():
        output = tmp_path / f"from-{name}"
        summary = run(source, output, checkpoint_folder, shard_size=7)
        assert (summary.images, summary.errors, summary.shards) == (20, 0, 3), name
        found = {key.removeprefix("folder/").removesuffix(".jpg"): value for key, value in codes(output).items()}
        assert found == wanted, name
        assert list(found) == list(images), name


def test_several_files_globs_and_braces(images, wanted, checkpoint_folder, tmp_path):
    (tmp_path / "in").mkdir()
    parts = np.array_split(list(images), 3)
    for i, keys in enumerate(parts):
        write_tar(tmp_path / "in" / f"p-{i:03d}.tar", tar_members({key: images[key] for key in keys}))
    sources = [
        f"{tmp_path}/in/p-{{000..002}}.tar",
        f"{tmp_path}/in/p-*.tar",
        str(tmp_path / "in"),
        [f"{tmp_path}/in/p-00{i}.tar" for i in range(3)],
    ]
    for i, source in enumerate(sources):
        output = tmp_path / "out" / str(i)
        run(source, output, checkpoint_folder)
        assert codes(output) == wanted
    assert sorted(records(output)) == ["000000-000000", "000001-000000", "000002-000000"]


def test_inputs_that_overlap_are_read_once(images, tmp_path):
    folder = write_folder(tmp_path / "folder", images)
    (tmp_path / "tars" / ".hidden").mkdir(parents=True)
    tars = [write_tar(tmp_path / "tars" / f"{name}.tar", []) for name in ("0", "1", ".hidden/2")]

    def shards(*sources, kind="auto"):
        return list(open_input(sources, BatchOptions(kind=kind), {}).shards())

    def keys(*sources, **options):
        return [key for shard in shards(*sources, **options) for key, _ in shard.entries]

    assert sorted(keys(f"{folder}/**/*", kind="folder")) == sorted(f"{key.partition('/')[2]}.jpg" for key in images)
    for sources in ([folder, f"{folder}/a"], [f"{folder}/a/000.jpg", f"file://{folder}/", folder]):
        assert keys(*sources) == [f"{key}.jpg" for key in images]
    assert len(keys(f"{folder}/a/000.jpg", f"{folder}/a/00*.jpg")) == 10
    for sources in ([tars[0], f"{tmp_path}/tars/*.tar"], [tars[1], f"{tmp_path}/tars"], [*tars[:2], *tars[:2]]):
        assert sorted(shard.address for shard in shards(*sources)) == tars[:2]
    assert [shard.address for shard in shards(f"{tmp_path}/tars", tars[2])] == tars
    with pytest.raises(ConfigError, match="the input holds folder and tar"):
        shards(folder, write_tar(tmp_path / "folder" / "b" / "0.tar", []))


def test_a_file_that_its_folder_leaves_out_is_read_where_it_is_named(images, tmp_path):
    folder = write_folder(tmp_path / "folder", images)
    (tmp_path / "tars").mkdir()
    other, tar = tmp_path / "folder" / "a" / "x.xyz", write_tar(tmp_path / "tars" / "0.bin", [])
    other.write_bytes(b"an image")
    source = open_input([folder, str(other)], BatchOptions(kind="folder"), {})
    assert "x.xyz" in [key for shard in source.shards() for key, _ in shard.entries]
    write_tar(tmp_path / "tars" / "1.tar", [])
    source = open_input([f"{tmp_path}/tars", tar], BatchOptions(kind="tar"), {})
    assert {shard.address for shard in source.shards()} == {f"{tmp_path}/tars/1.tar", tar}


@pytest.mark.skipif(os.name == "nt", reason="there it is no letter of a name")
def test_a_backslash_separates_folders_on_windows(tmp_path, monkeypatch):
    """Here it is a letter of a name, which must stay."""
    monkeypatch.setattr("dyntok.batch.inputs.open._ESCAPES", False)
    tars = [write_tar(tmp_path / f"a\\{i}.tar", []) for i in range(2)]
    source = open_input([f"{tmp_path}/a\\{{0..1}}.tar"], BatchOptions(), {})
    assert [shard.address for shard in source.shards()] == tars


def test_companions_travel_along(images, checkpoint_folder, tmp_path):
    captions = {key: f"caption of {key}" for key in images}
    folder = write_folder(tmp_path / "folder", images)
    first = next((tmp_path / "folder").rglob("*.txt"))
    first.write_bytes(b"\xef\xbb\xbf" + first.read_bytes())  # the mark that some editors write
    tar = write_tar(tmp_path / "one.tar", [*tar_members(images), ("c/bare.jpg", images["a/000"])])
    label = pa.array([{"id": i, "names": ["x"] * i} for i in range(20)])
    table = write_table(tmp_path / "one.parquet", images, label=label)
    for name, source, keep in (("folder", folder, ["txt"]), ("tar", tar, ["txt"]), ("table", table, ["txt", "label"])):
        run(source, tmp_path / "out" / name, checkpoint_folder, keep_columns=keep)
    assert {row["key"].removesuffix(".jpg"): row["txt"] for row in rows(tmp_path / "out" / "folder")} == captions
    assert {row["key"]: row["txt"] for row in rows(tmp_path / "out" / "tar")} == {**captions, "c/bare": None}
    assert [row["label"] for row in rows(tmp_path / "out" / "table")] == label.to_pylist()


def test_sizes_and_grid_are_of_the_upright_original(photos, checkpoint_folder, tmp_path):
    file = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    Image.fromarray(photos[0]).resize((90, 60)).save(file, "JPEG", exif=exif)
    run(write_tar(tmp_path / "a.tar", [("k.jpg", file.getvalue())]), tmp_path / "out", checkpoint_folder)
    (row,) = rows(tmp_path / "out")
    assert (row["width"], row["height"], row["grid"]) == (60, 90, [8, 8])


def test_a_tar_cut_anywhere_gives_what_stands_before(images, wanted, checkpoint_folder, tmp_path):
    whole = (tmp_path / "whole.tar").with_suffix(".tar")
    write_tar(whole, tar_members(images))
    content = whole.read_bytes()
    for place in (len(content) // 2, 512 * 9 + 17, 600, 100, 512):
        cut = tmp_path / f"cut-{place}.tar"
        cut.write_bytes(content[:place])
        output = tmp_path / f"out-{place}"
        summary = run([str(cut), str(whole)], output, checkpoint_folder)
        table = rows(output)
        before = len(table) - 20
        assert summary.errors == 1 and before < 12 and list(errors(output)) == [""]
        assert "lost" in errors(output)[""]
        assert [(row["key"], (row["codes"], row["positions"])) for row in table[:before]] == list(wanted.items())[
            :before
        ]


def test_empty_shards_and_shards_of_bad_images(images, checkpoint_folder, tmp_path):
    bad = {f"bad{i}": b"no image" * i for i in range(1, 4)}
    sources = [
        write_tar(tmp_path / "0.tar", []),
        write_tar(tmp_path / "1.tar", [(f"{key}.jpg", content) for key, content in bad.items()]),
        write_tar(tmp_path / "2.tar", [("readme.md", b"no images here")]),
        write_tar(tmp_path / "3.tar", tar_members(images)),
    ]
    (tmp_path / "4.tar").write_bytes(b"")
    summary = run([*sources, str(tmp_path / "4.tar")], tmp_path / "tars", checkpoint_folder)
    found = errors(tmp_path / "tars")
    assert (summary.images, summary.errors, summary.shards) == (20, 4, 5) and set(found) == {*bad, ""}
    assert "can't be read further: empty file" in found[""]
    write_table(tmp_path / "0.parquet", {})
    write_table(tmp_path / "1.parquet", bad)
    summary = run([f"{tmp_path}/0.parquet", f"{tmp_path}/1.parquet"], tmp_path / "tables", checkpoint_folder)
    assert (summary.images, summary.errors, summary.shards) == (0, 3, 2) and set(errors(tmp_path / "tables")) == set(
        bad
    )
    again = run([f"{tmp_path}/0.parquet", f"{tmp_path}/1.parquet"], tmp_path / "tables", checkpoint_folder)
    assert (again.rows, again.shards) == (0, 0)


def test_duplicate_keys_are_kept_and_counted(images, checkpoint_folder, tmp_path):
    one, other = list(images.values())[:2]
    tar = write_tar(tmp_path / "a.tar", [("same.jpg", one), ("same.jpg", other), ("else.jpg", one), ("same.jpg", one)])
    summary = run(tar, tmp_path / "out", checkpoint_folder)
    assert [row["key"] for row in rows(tmp_path / "out")] == [
        "same",
        "same",
        "else",
        "same",
    ] and summary.duplicates == 2
    assert rows(tmp_path / "out")[0]["codes"] != rows(tmp_path / "out")[1]["codes"]


def test_strange_keys_stay_and_become_no_paths(images, checkpoint_folder, tmp_path):
    keys = ["../../up", "/etc/passwd", "a/../../b", "ünï/日本", "with space", "a/b/c", "..", "C:\\windows\\x"]
    content = next(iter(images.values()))
    before = set(tmp_path.parent.iterdir())
    table = write_table(tmp_path / "a.parquet", dict.fromkeys(keys, content))
    for form in ("parquet", "webdataset"):
        run(table, tmp_path / form, checkpoint_folder, format=form)
    assert [row["key"] for row in rows(tmp_path / "parquet")] == keys
    tar = write_tar(tmp_path / "a.tar", [(f"{key}.jpg", content) for key in keys[:6]])
    run(tar, tmp_path / "tar", checkpoint_folder)
    assert [row["key"] for row in rows(tmp_path / "tar")] == keys[:6]
    assert set(tmp_path.parent.iterdir()) == before


def test_names_that_are_not_utf8(images, checkpoint_folder, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with open(os.fsencode(folder) + b"/\xff.jpg", "wb") as file:
        file.write(next(iter(images.values())))
    run(str(folder), tmp_path / "out", checkpoint_folder)
    assert [row["key"] for row in rows(tmp_path / "out")] == ["\\xff.jpg"]


def test_nulls_in_a_table(images, wanted, checkpoint_folder, tmp_path):
    some = {**dict(list(images.items())[:2]), "none": None}
    table = pq.read_table(write_table(tmp_path / "a.parquet", some))
    table = table.set_column(0, "key", pa.array(["a/000", None, "none"]))
    pq.write_table(table, tmp_path / "a.parquet")
    run(tmp_path / "a.parquet", tmp_path / "out", checkpoint_folder)
    assert codes(tmp_path / "out") == {"a/000": wanted["a/000"]}
    assert errors(tmp_path / "out") == {"": "has no key: its key column is null or empty", "none": "is null"}


def test_tables_without_keys_or_with_paths_only(images, checkpoint_folder, tmp_path):
    table = pq.read_table(write_table(tmp_path / "b.parquet", images)).drop_columns("key")
    pq.write_table(table, tmp_path / "b.parquet")
    run(tmp_path / "b.parquet", tmp_path / "out", checkpoint_folder, shard_size=8)
    assert [row["key"] for row in rows(tmp_path / "out")] == [f"b-{i:08d}" for i in range(20)]
    only_paths = pa.array(
        [{"bytes": None, "path": "/etc/hostname"}], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    pq.write_table(pa.table({"key": ["k"], "image": only_paths}), tmp_path / "c.parquet")
    run(tmp_path / "c.parquet", tmp_path / "paths", checkpoint_folder)
    assert "not a readable image" in errors(tmp_path / "paths")["k"]


def test_no_rows_of_a_row_group_are_read_behind_a_shard(tmp_path, monkeypatch):
    table = pa.table({"key": [f"{i}" for i in range(100)], "image": pa.array([b"x"] * 100, pa.binary())})
    pq.write_table(table, tmp_path / "a.parquet")
    iter_batches, read = pq.ParquetFile.iter_batches, []

    def counted(self, *arguments, **options):
        for batch in iter_batches(self, *arguments, **options):
            read.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    source = open_input([str(tmp_path / "a.parquet")], BatchOptions(shard_size=16), {})
    ends = [end for end in stages.read(source, Work(next(source.shards()), 0, 0), 16) if isinstance(end, RangeEnd)]
    assert [(end.rows, end.last) for end in ends] == [(16, True)] and sum(read) <= 32


def test_columns_that_are_missing_or_unclear(images, checkpoint_folder, tmp_path):
    two = write_table(tmp_path / "a.parquet", images, mask=pa.array([b"x"] * 20))
    for options, message in (
        ({"keep_columns": ["title"]}, "no column 'title'; it has key, image, txt, mask"),
        ({"image_column": "picture"}, "no column 'picture'"),
        ({"key_column": "id"}, "no column 'id'"),
        ({"image_column": "txt"}, "of type string"),
        ({}, "several columns that may hold images: image, mask"),
    ):
        with pytest.raises(DataError, match=message):
            run(two, tmp_path / "out", checkpoint_folder, **options)
    run(two, tmp_path / "good", checkpoint_folder, image_column="image", key_column="txt")
    assert [row["key"] for row in rows(tmp_path / "good")] == [f"caption of {key}" for key in images]


def test_files_that_can_not_be_read(images, checkpoint_folder, tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 is how it begins")
    with pytest.raises(BatchError, match="can't read .*bad.parquet"):
        run(tmp_path / "bad.parquet", tmp_path / "out", checkpoint_folder)
    for source, message in (
        ("nothing.tar", "does not exist"),
        ("*.tar", "does not exist"),
        ("empty", "no images, tars, zip archives or Parquet"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(DataError, match=message):
            run(tmp_path / source, tmp_path / "out", checkpoint_folder)
    with pytest.raises(ConfigError, match="folder and tar"):
        run(
            [write_folder(tmp_path / "f", images), write_tar(tmp_path / "a.tar", [])],
            tmp_path / "out",
            checkpoint_folder,
        )


def test_a_list_with_files_that_are_not_there(images, checkpoint_folder, tmp_path):
    write_folder(tmp_path / "folder", images)
    (tmp_path / "l.txt").write_text(
        f"folder/a/000.jpg\nfolder/none.jpg\nfile://{tmp_path}/folder/a/001.jpg\nnowhere://x.jpg\n{tmp_path}/folder\n"
    )
    summary = run(tmp_path / "l.txt", tmp_path / "out", checkpoint_folder)
    assert (summary.images, summary.errors) == (2, 3)
    assert set(errors(tmp_path / "out")) == {"folder/none.jpg", "nowhere://x.jpg", f"{tmp_path}/folder"}


def test_images_over_the_limit_are_refused_before_they_are_decoded(checkpoint_folder, tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + b"\0\0\0\0"

    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    file = io.BytesIO()
    Image.new("RGB", (300, 300)).save(file, "PNG")
    tar = write_tar(tmp_path / "a.tar", [("bomb.png", bomb), ("big.png", file.getvalue())])
    run(tar, tmp_path / "out", checkpoint_folder, max_pixels=50_000)
    assert "the limit is 50,000" in errors(tmp_path / "out")["big"] and "bomb" in errors(tmp_path / "out")


def test_several_images_per_row(images, wanted, checkpoint_folder, tmp_path):
    keys, content = list(images), list(images.values())
    cells = [[content[0], None, content[1]], [], [b"broken", content[2]], None, [content[3]]]
    table = pa.table(
        {"key": list("abcde"), "images": pa.array(cells, pa.list_(pa.binary())), "texts": [["x", "y"]] * 5}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    for name, shard_size in (("whole", 100), ("split", 2)):
        summary = run(
            tmp_path / "a.parquet",
            tmp_path / name,
            checkpoint_folder,
            interleaved=True,
            keep_columns=["texts"],
            shard_size=shard_size,
        )
        assert (summary.images, summary.errors) == (4, 2)
        assert "list them" in str(summary) and "--retry-errors" not in str(summary)  # which refuses such rows
        found = {row["key"]: row for row in rows(tmp_path / name)}
        assert set(found) == set("abce") and found["a"]["texts"] == ["x", "y"]
        assert found["a"]["codes"] == [wanted[keys[0]][0], None, wanted[keys[1]][0]]
        assert found["c"]["codes"] == [None, wanted[keys[2]][0]] and found["b"]["codes"] == []
        assert found["e"]["grid"] == [[8, 8]] and found["e"]["positions"] == [wanted[keys[3]][1]]
    table = pq.read_table(tmp_path / "whole" / "__run__" / "errors" / "000000-000000.parquet").to_pylist()
    assert [(row["key"], row["image"]) for row in table] == [("c", 0), ("d", None)]


def test_several_images_per_sample_of_a_tar(images, wanted, checkpoint_folder, tmp_path):
    content = list(images.values())
    tar = write_tar(tmp_path / "a.tar", [("k.1.jpg", content[0]), ("k.2.jpg", content[1]), ("l.jpg", content[2])])
    run(tar, tmp_path / "rows", checkpoint_folder, interleaved=True)
    assert [len(row["codes"]) for row in rows(tmp_path / "rows")] == [2, 1]
    run(tar, tmp_path / "single", checkpoint_folder)
    assert [row["key"] for row in rows(tmp_path / "single")] == ["l"] and "interleaved" in errors(tmp_path / "single")[
        "k"
    ]


def test_options_that_do_not_fit():
    for options in (
        {"format": "csv"},
        {"kind": "rar"},
        {"shard_size": 0},
        {"keep_columns": ["key"]},
        {"keep_columns": ["a", "a"]},
        {"budget": 2, "threshold": 0.5},
        {"format": "megatron"},
        {"vocab_size": 100},
        {"format": "megatron", "vocab_size": 100, "keep_columns": ["txt"]},
        {"format": "webdataset", "interleaved": True},
    ):
        with pytest.raises(ConfigError):
            BatchOptions(**options)


def test_shards_of_folders_are_streamed_in_order(tmp_path, monkeypatch):
    """Also where a folder has more names than are sorted in memory."""
    for i in range(57):
        path = tmp_path / "in" / f"{i % 3}" / f"{(i * 37) % 57:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    names = sorted(str(path.relative_to(tmp_path / "in")) for path in (tmp_path / "in").rglob("*.jpg"))
    monkeypatch.setattr("dyntok.batch.inputs.listing._NAMES_IN_MEMORY", 4)
    shards = list(open_input([str(tmp_path / "in")], BatchOptions(shard_size=10), {}).shards())
    assert [key for shard in shards for key, _ in shard.entries] == names
    assert [len(shard.entries) for shard in shards] == [10] * 5 + [7]
