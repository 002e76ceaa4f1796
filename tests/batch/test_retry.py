"""`--retry-errors`: pictures that failed are tried again, and everything else must be as it was."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.batch_data import (
    codes,
    errors,
    files,
    pictures,
    records,
    run,
    tar_members,
    write_folder,
    write_table,
    write_tar,
)

from dyntok.cli.main import main
from dyntok.errors import BatchError, ConfigError


@pytest.fixture(scope="module")
def images(photos):
    return pictures(photos)


def test_errors_are_tried_again(images, checkpoint_folder, tmp_path):
    folder = tmp_path / "folder"
    write_folder(folder, images)
    missing = ["a/001", "a/008", "b/013"]
    for key in missing:
        (folder / f"{key}.jpg").write_bytes(b"")
    run(str(folder), tmp_path / "out", checkpoint_folder, shard_size=6)
    before = files(tmp_path / "out")
    for key in missing[:2]:
        (folder / f"{key}.jpg").write_bytes(images[key])
    summary = run(str(folder), tmp_path / "out", checkpoint_folder, shard_size=6, retry_errors=True)
    assert (summary.rows, summary.images, summary.errors) == (3, 2, 1)
    data = {name: content for name, content in before.items() if "__run__" not in name}
    assert data.items() <= files(tmp_path / "out").items()
    found = codes(tmp_path / "out")
    assert len(found) == 19 and sorted(set(f"{key}.jpg" for key in images) - set(found)) == ["b/013.jpg"]
    (folder / "b" / "013.jpg").write_bytes(images["b/013"])
    summary = run(str(folder), tmp_path / "out", checkpoint_folder, shard_size=6, retry_errors=True)
    assert (summary.rows, summary.images, summary.errors) == (1, 1, 0) and len(codes(tmp_path / "out")) == 20
    assert sum(record["images"] for record in records(tmp_path / "out").values()) == 20
    assert run(str(folder), tmp_path / "out", checkpoint_folder, shard_size=6, retry_errors=True).rows == 0


def test_a_lost_file_after_a_retry_is_done_without_doubles(images, checkpoint_folder, tmp_path):
    table = write_table(tmp_path / "a.parquet", {**images, "a/001": None})
    run(table, tmp_path / "out", checkpoint_folder, shard_size=6)
    write_table(tmp_path / "a.parquet", images)
    run(table, tmp_path / "out", checkpoint_folder, shard_size=6, retry_errors=True)
    assert (tmp_path / "out" / "000000-000000-retry1.parquet").exists() and len(codes(tmp_path / "out")) == 20
    (tmp_path / "out" / "000000-000000.parquet").unlink()
    run(table, tmp_path / "out", checkpoint_folder, shard_size=6)
    assert len(codes(tmp_path / "out")) == 20 and not list((tmp_path / "out").glob("*retry*"))


def test_a_tar_that_was_cut_is_read_to_its_end_when_it_is_whole(images, checkpoint_folder, tmp_path):
    tar = tmp_path / "a.tar"
    write_tar(tar, tar_members(images))
    whole = tar.read_bytes()
    tar.write_bytes(whole[: len(whole) // 2])
    run(tar, tmp_path / "out", checkpoint_folder, shard_size=4)
    assert len(codes(tmp_path / "out")) < 12 and list(errors(tmp_path / "out")) == [""]
    tar.write_bytes(whole)
    run(tar, tmp_path / "out", checkpoint_folder, shard_size=4, retry_errors=True)
    run(tar, tmp_path / "clean", checkpoint_folder)
    assert codes(tmp_path / "out") == codes(tmp_path / "clean")


def test_retry_refuses_what_it_can_not_do(images, checkpoint_folder, tmp_path):
    table = write_table(tmp_path / "a.parquet", {**images, "bad": b"x"})
    run(table, tmp_path / "out", checkpoint_folder)
    write_table(
        tmp_path / "a.parquet", {**{f"new{key}": content for key, content in images.items()}, "other": images["a/000"]}
    )
    with pytest.raises(BatchError, match="is 'other' now and was 'bad'"):
        run(table, tmp_path / "out", checkpoint_folder, retry_errors=True)
    tar = write_tar(tmp_path / "a.tar", tar_members(images))
    with pytest.raises(ConfigError, match="retry_errors"):
        run(tar, tmp_path / "rows", checkpoint_folder, interleaved=True, retry_errors=True)


@pytest.mark.parametrize("change", ["added before", "added at the end", "renamed", "removed", "none"])
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_other_pictures_than_the_failed_ones_must_not_change(kind, change, images, checkpoint_folder, tmp_path):
    some = {f"{name}": content for name, content in zip("acegi", images.values(), strict=False)}

    def write(**changed):
        content = {key: value for key, value in {**some, **changed}.items() if value is not None}
        if kind == "tar":
            return write_tar(tmp_path / "in.tar", tar_members(dict(sorted(content.items()))))
        for path in (tmp_path / "in").glob("*"):
            path.unlink()
        return write_folder(tmp_path / "in", content)

    source = write(c=b"broken")
    run(source, tmp_path / "out", checkpoint_folder)
    before = files(tmp_path / "out")
    other = images["b/013"]
    changes = {
        "added before": {"d": other},
        "added at the end": {"z": other},
        "renamed": {"e": None, "f": some["e"]},
        "removed": {"i": None},
        "none": {},
    }
    source = write(**changes[change])
    if change == "none":
        assert run(source, tmp_path / "out", checkpoint_folder, retry_errors=True).images == 1
        assert len(codes(tmp_path / "out")) == 5
    else:
        with pytest.raises(BatchError, match="only pictures that failed may change; run into a new folder"):
            run(source, tmp_path / "out", checkpoint_folder, retry_errors=True)
        assert files(tmp_path / "out") == before


def test_failures_in_several_ranges_of_a_repaired_tar(images, checkpoint_folder, tmp_path):
    """Repaired pictures have other sizes, so what follows them in the tar has moved."""
    tar = write_tar(tmp_path / "a.tar", tar_members({**images, "a/001": b"x", "b/013": b"broken"}))
    run(tar, tmp_path / "out", checkpoint_folder, shard_size=4)
    write_tar(tmp_path / "a.tar", tar_members({**images, "b/013": b"broken"}))
    for rows, shards in ((2, 2), (1, 1)):  # the second time nothing has changed
        summary = run(tar, tmp_path / "out", checkpoint_folder, shard_size=4, retry_errors=True)
        assert (summary.rows, summary.errors, summary.shards) == (rows, 1, shards)
    write_tar(tmp_path / "a.tar", tar_members(images))
    assert run(tar, tmp_path / "out", checkpoint_folder, shard_size=4, retry_errors=True).images == 1
    assert run(tar, tmp_path / "out", checkpoint_folder, shard_size=4).rows == 0
    run(tar, tmp_path / "clean", checkpoint_folder, shard_size=4)
    assert codes(tmp_path / "out") == codes(tmp_path / "clean")
    for record, clean in zip(records(tmp_path / "out").values(), records(tmp_path / "clean").values(), strict=True):
        assert {**record, "files": 0, "attempt": 0} == {**clean, "files": 0, "attempt": 0}


def test_a_stopped_retry_of_a_repaired_tar_goes_on(images, checkpoint_folder, tmp_path):
    tar = write_tar(tmp_path / "a.tar", tar_members({**images, "a/001": b"x"}))
    run(tar, tmp_path / "out", checkpoint_folder, shard_size=4)
    record = tmp_path / "out" / "__run__" / "done" / "000000-000003.json"
    before = record.read_bytes()
    write_tar(tmp_path / "a.tar", tar_members(images))
    run(tar, tmp_path / "out", checkpoint_folder, shard_size=4, retry_errors=True)
    record.write_bytes(before)  # as if the run had not come so far
    summary = run(tar, tmp_path / "out", checkpoint_folder, shard_size=4, retry_errors=True)
    assert (summary.rows, summary.shards) == (0, 0) and record.read_bytes() != before
    assert run(tar, tmp_path / "out", checkpoint_folder, shard_size=4).rows == 0 and len(codes(tmp_path / "out")) == 20


@pytest.mark.parametrize("change", ["renamed", "removed"])
def test_ranges_without_failures_must_not_change(change, images, checkpoint_folder, tmp_path):
    tar = write_tar(tmp_path / "a.tar", tar_members({**images, "a/001": b"x"}))
    run(tar, tmp_path / "out", checkpoint_folder, shard_size=4)
    others = {"b/new" if key == "b/018" else key: content for key, content in images.items()}
    if change == "removed":
        others.pop("b/019")
    write_tar(tmp_path / "a.tar", tar_members(others))
    with pytest.raises(BatchError, match="only pictures that failed may change; run into a new folder"):
        run(tar, tmp_path / "out", checkpoint_folder, shard_size=4, retry_errors=True)


def test_a_tar_that_was_cut_after_its_last_picture(images, checkpoint_folder, tmp_path):
    tar = write_tar(tmp_path / "a.tar", [*tar_members(dict(list(images.items())[:3])), ("notes.json", b"x" * 600)])
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: whole.index(b"x" * 600) + 300])
    run(tar, tmp_path / "out", checkpoint_folder)
    assert len(codes(tmp_path / "out")) == 3 and list(errors(tmp_path / "out")) == [""]
    (tmp_path / "a.tar").write_bytes(whole[:2048])
    with pytest.raises(BatchError, match="a.tar: the tar can't be read further"):
        run(tar, tmp_path / "out", checkpoint_folder, retry_errors=True)
    (tmp_path / "a.tar").write_bytes(whole)
    run(tar, tmp_path / "out", checkpoint_folder, retry_errors=True)
    assert len(codes(tmp_path / "out")) == 3
    assert [record["errors"] for record in records(tmp_path / "out").values()] == [0]


def test_a_row_that_had_no_key(images, checkpoint_folder, tmp_path):
    content = list(images.values())[:3]
    for keys in (["a", None, "c"], ["a", "b", "c"]):
        table = pa.table({"key": keys, "image": pa.array(content, pa.binary())})
        pq.write_table(table, tmp_path / "a.parquet")
        options = {"image_column": "image", "retry_errors": keys[1] == "b"}
        run(tmp_path / "a.parquet", tmp_path / "out", checkpoint_folder, **options)
    assert set(codes(tmp_path / "out")) == {"a", "b", "c"}


def test_records_of_earlier_versions_have_no_digest(images, checkpoint_folder, tmp_path):
    table = write_table(tmp_path / "a.parquet", {**images, "bad": b"x"})
    run(table, tmp_path / "out", checkpoint_folder)
    (record,) = (tmp_path / "out" / "__run__" / "done").glob("*.json")
    values = json.loads(record.read_text())
    del values["digest"]
    record.write_text(json.dumps(values))
    assert run(table, tmp_path / "out", checkpoint_folder, retry_errors=True).rows == 1


def test_nothing_to_retry(images, checkpoint_folder, tmp_path, capsys):
    table = write_table(tmp_path / "a.parquet", images)
    command = ["batch", table, str(tmp_path / "out"), "--model", str(checkpoint_folder), "--retry-errors"]
    assert main(command) == 1 and "no run whose failed pictures could be tried again" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, "--dry-run"]) == 1 and "give one of them" in capsys.readouterr().err
