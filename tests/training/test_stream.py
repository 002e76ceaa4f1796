"""Images streamed from tars and Parquet files: complete, disjoint between ranks, shuffled, the same after a restart."""

import io
import logging
import tarfile
from collections import Counter
from itertools import islice
from pathlib import PurePath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.core import url_to_fs
from support.small_run import changed, log_of, run_until, trainer
from support.tars import jpeg, write_tar

from dyntok.config import ImageConfig
from dyntok.errors import CheckpointError, DataError
from dyntok.structure import build
from dyntok.tables import RowGroup
from dyntok.tars import tar_members
from dyntok.training.crops import Crops
from dyntok.training.data import held_out, open_data
from dyntok.training.recipe import Recipe
from dyntok.training.shards import find_shards
from dyntok.training.sources import Inventory, is_validation
from dyntok.training.stream import StreamedImages

CONFIG = ImageConfig(img_size=16)
SHARDS, EACH = 5, 8


@pytest.fixture
def folder(tmp_path, photos):
    (tmp_path / "tars").mkdir()
    for shard in range(SHARDS):
        members = [(f"{shard}-{i}.jpg", jpeg(photos[(shard + i) % len(photos)], 40 + i)) for i in range(EACH)]
        extra = [("notes.txt", b"no image"), ("._0.jpg", b"hidden")]
        write_tar(tmp_path / "tars" / f"{shard}.tar", [*members, *extra])
    return tmp_path / "tars"


@pytest.fixture(params=["parquet", "file://, parquet", "memory://, parquet", "memory://, tar"])
def source(request, folder, tmp_path):
    """The same images at other addresses; as Parquet in the form of Hugging Face `datasets`, three in a row group."""
    address, _, kind = f", {request.param}".rpartition(", ")
    address = {"": str(tmp_path / "shards"), "file://": f"file://{tmp_path}/shards", "memory://": "memory://shards"}[
        address.removeprefix(", ")
    ]
    fs, root = url_to_fs(address)
    fs.mkdirs(root, exist_ok=True)
    for shard in sorted(folder.glob("*.tar")):
        content = io.BytesIO(shard.read_bytes())
        if kind == "parquet":
            with tarfile.open(shard) as tar:
                images = {m.name.removesuffix(".jpg"): tar.extractfile(m).read() for m in tar if m.name[0] != "." and
                          m.name.endswith(".jpg")}  # fmt: skip
            rows = [{"bytes": image, "path": f"{key}.jpg"} for key, image in images.items()]
            table = pa.table({"image": rows, "__key__": list(images), "label": [1] * len(rows)})
            pq.write_table(table, content := io.BytesIO(), row_group_size=3)
        fs.pipe_file(f"{root}/{shard.stem}.{kind}", content.getvalue())
    yield address
    fs.rm(root, recursive=True)


def test_every_kind_of_shard_is_complete_and_disjoint_between_ranks(source, folder):
    everything = sorted(f"{shard}-{i}" for shard in range(SHARDS) for i in range(EACH))
    parts = [keys(stream(source, buffer=1, rank=rank, world=2), n) for rank, n in ((0, 24), (1, 16))]
    assert sorted(parts[0] + parts[1]) == everything
    same = zip(islice(stream(source).batches(0), 12), islice(stream(folder).batches(0), 12), strict=True)
    assert all(torch.equal(one, other) for one, other in same)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_kind_of_shard_goes_on_where_it_was(source, workers):
    expected = list(islice(stream(source).batches(0), 14))
    assert all(torch.equal(a, b) for a, b in zip(loaded(stream(source), 5, 14, workers), expected[5:], strict=True))


@pytest.mark.parametrize("source", ["memory://, parquet"], indirect=True)
def test_a_run_on_tables_resumes_and_validates(source, values, tmp_path):
    small = changed(values, data=[source], stream=6, split="train", validate_every=4, pca_init=False)
    small["stages"] = [{**values["stages"][0], "images": 4 * 8}]
    trainer(small, tmp_path / "whole").run()
    run_until(trainer(changed(small, save_every=4), tmp_path / "parts"), 5)
    resumed = trainer(small, tmp_path / "parts")
    assert resumed.step == 4 and all(is_validation(sample.key) for sample in resumed.validation)
    resumed.run()
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    assert "validation_psnr" in log_of(tmp_path / "whole")[-1]


def test_a_resumed_stream_reads_no_image_that_it_has_used(folder, tmp_path, monkeypatch):
    images = [jpeg(gray(value)) for value in range(40)]
    pq.write_table(pa.table({"image": images}), tmp_path / "gray.parquet", row_group_size=4)
    read, whole = [], RowGroup.image
    monkeypatch.setattr(RowGroup, "image", lambda group, row: read.append((group.number, row)) or whole(group, row))
    list(stream(tmp_path / "gray.parquet", buffer=4).batches(7, 9))
    assert len(read) == 8 and len(set(read)) == 8
    assert keys(stream(tmp_path / "gray.parquet", buffer=1), 40)[0] == "gray-00000000"


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_worker_processes_read_no_row_group_twice(workers, tmp_path, monkeypatch):
    images = [jpeg(gray(6 * i)) for i in range(40)]
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet", row_group_size=4)
    read, opened = pq.ParquetFile.read_row_group, pq.ParquetFile.__init__

    def note(line):
        with open(tmp_path / "read.txt", "a") as file:  # of all processes
            file.write(f"{line}\n")

    def read_noted(file, number, columns):
        note(number)
        return read(file, number, columns)

    def opened_noted(file, *arguments, metadata=None, **options):
        note("footer" if metadata is None else "again")
        opened(file, *arguments, metadata=metadata, **options)

    expected = list(stream(tmp_path / "a.parquet", buffer=4).batches(0, 9))
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read_noted)
    monkeypatch.setattr(pq.ParquetFile, "__init__", opened_noted)
    got = loaded(stream(tmp_path / "a.parquet", buffer=4), 0, 9, workers)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    counts = Counter((tmp_path / "read.txt").read_text().split())
    assert counts == {**{str(group): 1 for group in range(10)}, "again": 10, "footer": max(workers, 1)}


def test_tables_without_bytes_or_a_column_of_images_are_told(photos, tmp_path, caplog):
    rows = [{"bytes": jpeg(photos[0]) if i % 4 else None, "path": "a.jpg"} for i in range(8)]
    pq.write_table(pa.table({"image": rows}), tmp_path / "holes.parquet")
    streamed = stream(tmp_path / "holes.parquet", buffer=1)
    with caplog.at_level(logging.WARNING, "dyntok"):
        assert len(list(streamed.batches(0, 2))) == 2 and len(streamed.unreadable) == 2
    assert "left out holes-00000004" in caplog.text and "has no bytes; embed the images" in caplog.text
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "texts.parquet")
    with pytest.raises(DataError, match="texts.parquet has no column of images; expected bytes, or a struct"):
        keys(stream(tmp_path / "texts.parquet"), 1)
    (tmp_path / "broken.parquet").write_bytes((tmp_path / "holes.parquet").read_bytes()[:500])
    with caplog.at_level(logging.WARNING, "dyntok"), pytest.raises(DataError, match="no images of the split"):
        keys(stream(tmp_path / "broken.parquet"), 1)
    assert "left out the rest of" in caplog.text


def gray(value):
    return np.full((40, 40, 3), value, np.uint8)


def stream(source, buffer=10, split="all", **options):
    crops = Crops(CONFIG, 4, seed=3, min_crop=0.8, **options)
    return StreamedImages(find_shards([source]), crops, split=split, buffer=buffer)


def loaded(streamed, first, last, workers):
    """The batches, as a run loads them."""
    dataset, sampler = streamed.for_loader(first, last)
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, sampler=sampler, num_workers=workers)
    return list(streamed.from_loader(loader, workers))


def keys(streamed, number):
    return [sample.key for sample in islice(streamed.order(), number)]


def test_a_pass_has_every_image_once_and_the_next_another_order(folder):
    everything = {f"{shard}-{i}" for shard in range(SHARDS) for i in range(EACH)}
    one, two = (keys(stream(folder, buffer=1), 2 * len(everything))[start:][:40] for start in (0, 40))
    assert set(one) == set(two) == everything and one != two
    shuffled = keys(stream(folder, buffer=10), 4 * len(everything))
    counts = Counter(shuffled)  # but for what waits in the buffer
    assert set(counts) == everything and max(counts.values()) - min(counts.values()) <= 2
    shards = [key[0] for key in shuffled[:10]]
    assert len(set(shards)) > 1 and shuffled[:40] != one


def test_two_tars_in_one_file_and_links(folder, tmp_path, caplog):
    parts = [path.read_bytes() for path in sorted(folder.glob("*.tar"))[:2]]
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "a.tar").write_bytes(b"".join(parts))
    found = set(keys(stream(tmp_path / "whole", buffer=1), 2 * EACH))
    assert found == {f"{shard}-{i}" for shard in (0, 1) for i in range(EACH)}
    link = tarfile.TarInfo("9.jpg")
    link.type, link.linkname = tarfile.LNKTYPE, "0-0.jpg"
    with tarfile.open(folder / "0.tar", "a") as tar:
        tar.addfile(link)
    keys(stream(folder, buffer=1), SHARDS * EACH)
    assert "left out 1 link of" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_shard_leaves_out_is_told_once(folder, photos, workers, capfd):
    """Not in every pass and by every worker process; in a run as in these, warnings go to standard error."""
    write_tar(folder / "5.tar", [(f"x.{i}.jpg", jpeg(photos[0])) for i in range(3)])
    streamed = stream(folder)
    logging.getLogger("dyntok").addHandler(handler := logging.StreamHandler())
    try:
        for first, last in ((0, 30), (30, 34)):
            assert len(loaded(streamed, first, last, workers)) == last - first
    finally:
        logging.getLogger("dyntok").removeHandler(handler)
    assert capfd.readouterr().err.count("left out 2 further images of a key that has one") == 1


def test_hidden_folders_at_an_address_are_left_out(folder):
    fs, root = url_to_fs("memory://hidden")
    for name in ("0.tar", "more/1.TAR", ".cache/2.tar", "__MACOSX/3.tar"):
        fs.pipe_file(f"{root}/{name}", (folder / "0.tar").read_bytes())
    inventory = Inventory()
    assert find_shards(["memory://hidden"], inventory) == ["memory:///hidden/0.tar", "memory:///hidden/more/1.TAR"]
    assert inventory.report() == ["left out: 2 hidden"]
    assert len(keys(stream("memory://hidden", buffer=1), 2 * EACH)) == 2 * EACH
    fs.rm(root, recursive=True)


def test_names_with_several_dots(photos, tmp_path, caplog):
    a, b = jpeg(photos[0]), jpeg(photos[1])
    members = [("a.b.jpg", a), ("b.mask.png", a), ("b.jpg", b), ("c.1.jpg", b), ("c.2.JPG", a), (".d/x.jpg", a)]
    write_tar(tmp_path / "a.tar", members)
    images = list(islice(stream(tmp_path, buffer=1).order(), 3))
    assert {image.key: image.read() for image in images} == {"a": a, "b": b, "c": b}
    list(islice(stream(tmp_path, buffer=1).order(), 7))
    assert f"left out 2 further images of a key that has one, of {tmp_path}/a.tar" in caplog.text


def test_shards_in_linked_folders_and_what_is_no_shard(folder, values, tmp_path):
    (folder / "more").mkdir()
    (folder / "4.tar").rename(folder / "more" / "4.TAR")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "linked").symlink_to(folder)
    (folder / "back").symlink_to(tmp_path / "source")
    for name in ("._0.tar", "notes.md", "README"):
        (folder / name).write_bytes(b"no shard")
    recipe = build(Recipe, changed(values, data=[str(tmp_path / "source")], stream=1))
    data, left_out = open_data(recipe, Crops(CONFIG, 4, seed=3, min_crop=0.7))
    assert [PurePath(shard).name for shard in data.shards] == ["0.tar", "1.tar", "2.tar", "3.tar", "4.TAR"]
    assert left_out == ["left out: 1 hidden, 1 without suffix, 1 .md"]
    assert len(set(keys(data, SHARDS * EACH))) == SHARDS * EACH


def test_ranks_are_disjoint_and_complete(folder):
    parts = [keys(stream(folder, buffer=1, rank=rank, world=2), n) for rank, n in ((0, 24), (1, 16))]
    assert sorted(parts[0] + parts[1]) == sorted(f"{shard}-{i}" for shard in range(SHARDS) for i in range(EACH))
    with pytest.raises(DataError, match="5 shards for 6 processes"):
        stream(folder, rank=0, world=6)


def test_the_split_is_that_of_listed_images(folder):
    found = {split: set(keys(stream(folder, buffer=1, split=split), 40)) for split in ("train", "validation")}
    assert not found["train"] & found["validation"] and all(map(is_validation, found["validation"]))
    assert len(found["train"] | found["validation"]) == SHARDS * EACH


def test_a_streamed_run_validates_on_what_it_leaves_out(folder, values, tmp_path):
    expected = sorted(key for shard in range(SHARDS) for i in range(EACH) if is_validation(key := f"{shard}-{i}"))
    stage = {**values["stages"][0], "images": 8}
    small = changed(values, data=[str(folder)], stream=6, split="train", validate_every=2, pca_init=False)
    run = trainer({**small, "stages": [stage]}, tmp_path / "run")
    assert expected and [sample.key for sample in run.validation] == expected
    run.run()
    assert "validation_psnr" in log_of(tmp_path / "run")[-1]


def test_every_shard_has_its_share_of_the_validation_pictures(folder, values):
    small = changed(values, data=[str(folder)], stream=6, split="train", validate_every=2, validation_images=SHARDS)
    found = [sample.key.partition("-")[0] for sample in held_out(build(Recipe, small))]
    all_of_them = {f"{i}" for i in range(SHARDS) if any(is_validation(f"{i}-{j}") for j in range(EACH))}
    assert len(found) == len(all_of_them) > 1 and set(found) == all_of_them


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_later_start_and_other_worker_processes_give_the_same_batches(folder, workers):
    expected = list(islice(stream(folder).batches(0), 14))
    assert len({float(batch.sum()) for batch in expected}) == 14
    got = loaded(stream(folder), 5, 14, workers)
    assert len(got) == 9 and all(torch.equal(a, b) for a, b in zip(got, expected[5:], strict=True))


def test_damage_is_told_and_changes_no_other_batch(folder, caplog):
    before = keys(stream(folder, buffer=1), 30)
    shard = next(iter(folder.glob("2.tar")))
    content = bytearray(shard.read_bytes())
    sample = next(s for s in islice(stream(folder, buffer=1).order(), 40) if s.key == "2-3")
    content[sample.offset : sample.offset + 40] = bytes(40)  # an image that is none
    shard.write_bytes(content)
    streamed = stream(folder, buffer=1)
    with caplog.at_level(logging.WARNING, "dyntok"):
        batches = list(islice(streamed.batches(0), 10))
    assert keys(stream(folder, buffer=1), 30) == before and all(batch.shape == (4, 3, 16, 16) for batch in batches)
    assert "left out 2-3" in caplog.text and len(streamed.unreadable) == 1
    shard.write_bytes(content[: sample.offset + 10])  # and a tar that is cut off
    with caplog.at_level(logging.WARNING, "dyntok"):
        assert "2-6" not in keys(stream(folder, buffer=1), 40)
    assert f"left out the rest of {shard}" in caplog.text


def test_what_is_no_shard_is_refused(tmp_path):
    for source in (tmp_path, tmp_path / "missing", tmp_path / "missing.tar"):
        with pytest.raises(DataError, match="expected a folder of them, a .tar or a .parquet file"):
            find_shards([source])


def test_a_streamed_run_resumes_as_if_it_had_not_stopped(folder, values, tmp_path):
    small = changed(values, data=[str(folder)], stream=6, pca_init=True)
    for stage in small["stages"]:
        stage["images"] = 4 * 6
    trainer(small, tmp_path / "whole").run()
    run_until(trainer(changed(small, save_every=4), tmp_path / "parts"), 9)
    resumed = trainer(changed(small, workers=2), tmp_path / "parts")
    assert resumed.step == 8
    resumed.run()
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    one, two = (torch.load(tmp_path / name / "state.pt", weights_only=True)["objective"] for name in ("whole", "parts"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_workers_that_read_different_shards_end_the_run(folder, monkeypatch):
    """The storage failed for one of them, and its share of the next batches would be of other images."""
    sound = stream(folder, buffer=1).parts(0, 9, worker=0, workers=2)
    whole = [next(sound) for _ in range(9)]
    monkeypatch.setattr("dyntok.training.shards.tar_members", lambda file, start: islice(tar_members(file, start), 5))
    short = list(stream(folder, buffer=1).parts(0, 9, worker=1, workers=2))
    mixed = [part for both in zip(whole, short, strict=True) for part in both]
    with pytest.raises(DataError, match="worker processes drew different images, .* when the storage answers"):
        list(stream(folder, buffer=1).from_loader(mixed, 2))


def test_what_the_order_of_a_stream_depends_on_may_not_change(folder, values, tmp_path):
    small = changed(values, data=[str(folder)], stream=6, pca_init=False, save_every=2)
    run_until(trainer(small, tmp_path), 3)
    with pytest.raises(CheckpointError, match="another recipe .split is 'train', was 'all'"):
        trainer(changed(small, split="train"), tmp_path)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    state["run"]["processes"] = 2
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="another recipe .processes is 1, was 2"):
        trainer(small, tmp_path)


def test_a_batch_of_one_unreadable_picture(photos, tmp_path):
    """The batch before it comes again; only many in a row end the run."""

    def ones(name, pictures):
        write_tar(tmp_path / name, [(f"{i}.jpg", picture) for i, picture in enumerate(pictures)])
        crops = Crops(CONFIG, 1, seed=3, min_crop=0.8)
        return StreamedImages([str(tmp_path / name)], crops, split="all", buffer=1).batches(0)

    batches = list(islice(ones("a.tar", [*(jpeg(photo) for photo in photos[:4]), b"broken"]), 10))
    assert [torch.equal(batches[i], batches[i - 1]) for i in range(1, 10)] == [i in (4, 9) for i in range(1, 10)]
    with pytest.raises(DataError, match="1 images in a row can't be read"):
        next(ones("b.tar", [b"broken"] * 5))
