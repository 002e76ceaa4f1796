"""No input is left out in silence: links, unsorted tars, unusual names, archives, paths in lists and tables."""

import errno
import gzip
import io
import json
import os
import sys
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.batch_data import codes, errors, pictures, rows, run, tables, write_folder, write_table, write_tar

from dyntok import locks
from dyntok.batch import storage
from dyntok.batch.inputs import listing
from dyntok.batch.manifest import recorded_files
from dyntok.cli.main import main
from dyntok.errors import BatchError, ConfigError


@pytest.fixture(scope="module")
def images(photos):
    return list(pictures(photos, 4).values())


def write_links(path, members):
    """members: (name, bytes, or a pair of link type and target)."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                member.type, member.linkname = content
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return str(path)


def write_zip(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return str(path)


def test_links_in_a_tar(images, checkpoint_folder, tmp_path):
    hard, soft = tarfile.LNKTYPE, tarfile.SYMTYPE
    members = [("a/0.jpg", images[0]), ("1.jpg", (hard, "a/0.jpg")), ("b/2.jpg", (soft, "../a/0.jpg"))]
    members += [("3.jpg", (soft, "4.jpg")), ("4.jpg", (soft, "3.jpg")), ("5.jpg", (soft, "../../etc/passwd"))]
    members += [("6.jpg", (hard, "none.jpg")), ("7.jpg", (soft, "8.jpg")), ("8.jpg", images[1])]
    members += [("c", (soft, "a")), ("d", (soft, "./c")), ("9.jpg", (soft, "d/10.jpg")), ("a/10.jpg", images[2])]
    run(write_links(tmp_path / "a.tar", members), tmp_path / "out", checkpoint_folder)
    found = codes(tmp_path / "out")
    assert found["1"] == found["b/2"] == found["a/0"] and found["7"] == found["8"] and found["9"] == found["a/10"]
    reasons = errors(tmp_path / "out")
    assert set(reasons) == {"3", "4", "5", "6"}
    assert "circle" in reasons["3"] and "out of the tar" in reasons["5"] and "not in the tar" in reasons["6"]


@pytest.mark.parametrize(
    "order",
    [
        "0.jpg 1.jpg 0.txt 1.txt",
        "0.txt 1.txt 0.jpg 1.jpg",
        "./0.jpg 0.txt 1.jpg ./1.txt",
        "./1.jpg 0.jpg ./0.txt 1.txt",
        "0.txt ./0.jpg ./1.txt 1.jpg",
    ],
)
@pytest.mark.parametrize("form", ["parquet", "webdataset"])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_archive_that_is_not_sorted_by_key(kind, order, form, images, checkpoint_folder, tmp_path):
    content = {"0.jpg": images[0], "1.jpg": images[1], "0.txt": b"zero", "1.txt": b"one"}
    members = [(name, content[name.removeprefix("./")]) for name in order.split()]
    archive = (write_tar if kind == "tar" else write_zip)(tmp_path / f"a.{kind}", members)
    summary = run(archive, tmp_path / "out", checkpoint_folder, keep_columns=["txt"], format=form)
    assert summary.images == 2 and not summary.left_out
    if form == "parquet":
        names = [name.removesuffix(".jpg") for name in order.split() if name.endswith(".jpg")]
        texts = {row["key"]: row["txt"] for row in rows(tmp_path / "out")}
        assert texts == {name: {"0": "zero", "1": "one"}[name.removeprefix("./")] for name in names}


def test_a_remote_tar_that_is_not_sorted_names_the_key(images, checkpoint_folder, tmp_path):
    import fsspec

    members = [("0.jpg", images[0]), ("1.jpg", images[1]), ("0.txt", b"zero"), ("1.txt", b"one")]
    fsspec.filesystem("memory").put(write_tar(tmp_path / "a.tar", members), "/unsorted/a.tar")
    run("memory://unsorted/a.tar", tmp_path / "out", checkpoint_folder, keep_columns=["txt"])
    assert "0.txt: no image next to it; sort the tar" in errors(tmp_path / "out")["0"]


def test_missing_remote_pictures_have_one_reason(images, checkpoint_folder, tmp_path):
    import fsspec

    fsspec.filesystem("memory").pipe_file("/reasons/0.jpg", images[0])
    names = [f"memory://reasons/{i}.jpg" for i in range(3)]
    (tmp_path / "l.txt").write_text("\n".join(names))
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    cells = pa.array([{"bytes": None, "path": f"{i}.jpg"} for i in range(3)], kind)
    pq.write_table(pa.table({"key": names, "image": cells}), tmp_path / "t.parquet")
    fsspec.filesystem("memory").pipe_file("/reasons/t.parquet", (tmp_path / "t.parquet").read_bytes())
    for i, source in enumerate((tmp_path / "l.txt", "memory://reasons/t.parquet")):
        summary = run(source, tmp_path / "out" / str(i), checkpoint_folder)
        assert dict(summary.reasons) == {"no such file": 2} and summary.images == 1
        found = errors(tmp_path / "out" / str(i))
        assert set(found) == set(names[1:]) and found[names[1]].endswith("reasons/1.jpg: no such file")


def test_two_tars_in_one_file(images, checkpoint_folder, tmp_path):
    parts = [write_tar(tmp_path / f"{i}.tar", [(f"{i}.jpg", images[i])]) for i in range(2)]
    whole = tmp_path / "whole.tar"
    whole.write_bytes(b"".join(Path(part).read_bytes() for part in parts))
    run(whole, tmp_path / "out", checkpoint_folder)
    assert list(codes(tmp_path / "out")) == ["0", "1"]


def test_what_is_left_out_is_counted(images, checkpoint_folder, tmp_path, capsys):
    folder = tmp_path / "in"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    for name in ("0.jpg", "1.JPG", "2.jfif", "3", ".ipynb_checkpoints/0.jpg", "._0.jpg"):
        (folder / name).write_bytes(images[0])
    for name in ("a.mp4", "b.mp4", "c.txt", "README", "d.zip"):
        (folder / name).write_bytes(b"no image")
    (folder / "x.ppm").write_bytes(b"P6 2 2 255 " + bytes(12))
    (folder / "y.psd").write_bytes(b"8BPS")
    command = ["batch", str(folder), str(tmp_path / "out"), "--model", str(checkpoint_folder)]
    counts = {".mp4": 2, "hidden": 2, ".txt": 1, ".zip": 1, "without a suffix": 1}
    for _ in range(2):  # a resumed run reports them, too
        main([*command, "--json"])
        assert json.loads(capsys.readouterr().out)["left_out"] == counts
    assert set(codes(tmp_path / "out")) == {"0.jpg", "1.JPG", "2.jfif", "3", "x.ppm"}
    assert set(errors(tmp_path / "out")) == {"y.psd"}
    main(command)
    assert "left out: 2 .mp4, 2 hidden, 1 .txt" in capsys.readouterr().out


def test_less_common_suffixes_of_pictures(images, checkpoint_folder, tmp_path):
    """Readable ones are read; those of other formats are errors with a reason, whatever is in the file."""
    (tmp_path / "in").mkdir()
    for suffix in ("jpe", "JFIF", "jfi", "pjpeg", "pjp"):
        (tmp_path / "in" / f"0.{suffix}").write_bytes(images[0])
    for suffix in ("jxr", "wdp", "srw", "x3f", "iiq"):
        (tmp_path / "in" / f"1.{suffix}").write_bytes(b"II\xbc\x01" + bytes(40))
    summary = run(tmp_path / "in", tmp_path / "out", checkpoint_folder)
    assert (summary.images, summary.errors, dict(summary.left_out)) == (5, 5, {})
    assert all("convert it to PNG or JPEG" in reason for reason in errors(tmp_path / "out").values())


def test_linked_folders_are_followed(images, checkpoint_folder, tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "0.jpg").write_bytes(images[0])
    (tmp_path / "in" / "link").symlink_to(tmp_path / "else")
    (tmp_path / "in" / "a" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "self.jpg").symlink_to("self.jpg")
    summary = run(tmp_path / "in", tmp_path / "out", checkpoint_folder)
    assert list(codes(tmp_path / "out")) == ["link/0.jpg"] and "self.jpg" in errors(tmp_path / "out")
    assert summary.left_out == {"linked folders that lead back to themselves": 1}


@pytest.mark.parametrize("suffix", ["tar.gz", "tgz", "tar.bz2", "tar.xz", "tar.zst"])
def test_compressed_tars(suffix, images, checkpoint_folder, tmp_path):
    plain = write_tar(tmp_path / "plain.tar", [(f"{i}.jpg", image) for i, image in enumerate(images)])
    content = Path(plain).read_bytes()
    target = tmp_path / f"in.{suffix}"
    codec = {"tar.gz": "gzip", "tgz": "gzip", "tar.bz2": "bz2", "tar.zst": "zstd"}.get(suffix)
    if codec:
        with pa.CompressedOutputStream(str(target), codec) as file:
            file.write(content)
    else:
        import lzma

        target.write_bytes(lzma.compress(content))
    run(target, tmp_path / "out", checkpoint_folder, shard_size=2)
    run(plain, tmp_path / "plain", checkpoint_folder)
    assert codes(tmp_path / "out") == codes(tmp_path / "plain")


def test_a_compressed_tar_that_expands_without_end(images, checkpoint_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("dyntok.batch.inputs.compression.MIN_LIMIT", 20_000)
    monkeypatch.setattr("dyntok.batch.inputs.compression.MAX_RATIO", 2)
    members = [("0.jpg", images[0]), ("zeros.jpg", bytes(2**20))]
    packed = gzip.compress(Path(write_tar(tmp_path / "a.tar", members)).read_bytes())
    (tmp_path / "a.tar.gz").write_bytes(packed)
    run(tmp_path / "a.tar.gz", tmp_path / "out", checkpoint_folder)
    assert list(codes(tmp_path / "out")) == ["0"] and "can't be read further" in errors(tmp_path / "out")[""]


def test_zip_archives(images, checkpoint_folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("d/0.jpg", "d/1.jpg", "__MACOSX/d/._0.jpg"):
            archive.writestr(name, images[int(name[-5])])
        archive.writestr("d/0.txt", "\ufeffzero")  # with the mark that some editors write
        archive.writestr("./d/1.txt", "one")
    summary = run(tmp_path / "a.zip", tmp_path / "out", checkpoint_folder, keep_columns=["txt"], shard_size=1)
    assert {row["key"]: row["txt"] for row in rows(tmp_path / "out")} == {"d/0": "zero", "d/1": "one"}
    assert summary.left_out == {"hidden": 1}
    run(f"zip://d::{tmp_path}/a.zip", tmp_path / "chain", checkpoint_folder)
    assert set(codes(tmp_path / "chain")) == {"0.jpg", "1.jpg"}


@pytest.mark.parametrize("name", ["a::b", "[2020]", "{x}", "~y", "C:\\z", "ü %41"])
def test_unusual_names_of_folders(name, images, checkpoint_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (name, "in"):
        (tmp_path / folder).mkdir()
    (tmp_path / name / "k.jpg").write_bytes(images[0])
    write_tar(tmp_path / name / "t.tar", [("k.jpg", images[0])])
    run(f"{tmp_path}/{name}/*.tar", tmp_path / "tars", checkpoint_folder)
    for i, source in enumerate((name, f"file://{tmp_path}/{name}")):
        run(source, f"{name}-out/{i}", checkpoint_folder, kind="folder")
        assert run(source, f"{name}-out/{i}", checkpoint_folder, kind="folder").rows == 0
        assert list(codes(tmp_path / f"{name}-out" / str(i))) == ["k.jpg"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-8"])
def test_encodings_of_lists(encoding, images, checkpoint_folder, tmp_path):
    (tmp_path / "d").mkdir()
    for i in range(2):
        (tmp_path / "d" / f"{i}.jpg").write_bytes(images[i])
    (tmp_path / "l.txt").write_bytes("d/0.jpg\r\n# a comment\r\n\r\nd\\1.jpg\r\n".encode(encoding))
    summary = run(tmp_path / "l.txt", tmp_path / "out", checkpoint_folder)
    assert (summary.images, summary.errors) == (2, 0)
    assert summary.left_out == {"comment lines": 1, "empty lines": 1}


def test_paths_in_a_table(images, checkpoint_folder, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "0.jpg").write_bytes(images[0])
    local = tmp_path / "d" / "0.jpg"
    paths = ["d/0.jpg", str(local), f"file://{local}", "d/none.jpg", "http://127.0.0.1/0.jpg"]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    cells = pa.array([{"bytes": None, "path": path} for path in paths], kind)
    pq.write_table(pa.table({"key": list("abcde"), "image": cells}), tmp_path / "t.parquet")
    run(tmp_path / "t.parquet", tmp_path / "out", checkpoint_folder)
    assert set(codes(tmp_path / "out")) == {"a", "b", "c"} and set(errors(tmp_path / "out")) == {"d", "e"}


@pytest.mark.parametrize("kind", ["binary_view", "large_binary", "dictionary"])
def test_types_of_columns(kind, images, checkpoint_folder, tmp_path):
    column = pa.array(images).dictionary_encode() if kind == "dictionary" else pa.array(images, getattr(pa, kind)())
    keys = pa.array([str(i) for i in range(4)], pa.string_view())
    text = pa.array(["x", "y", "x", "y"]).dictionary_encode()
    pq.write_table(pa.table({"key": keys, "image": column, "txt": text}), tmp_path / "t.parquet")
    summary = run(tmp_path / "t.parquet", tmp_path / "out", checkpoint_folder, keep_columns=["txt"])
    assert summary.images == 4 and [row["txt"] for row in rows(tmp_path / "out")] == ["x", "y", "x", "y"]


def test_a_file_system_without_locks_and_sync(images, checkpoint_folder, tmp_path, monkeypatch):
    def missing(code):
        def call(*arguments):
            raise OSError(code, "not supported")

        return call

    monkeypatch.setattr(locks.fcntl, "lockf", missing(errno.ENOSYS))
    monkeypatch.setattr(storage.os, "fsync", missing(errno.EINVAL))
    table = write_table(tmp_path / "a.parquet", {str(i): image for i, image in enumerate(images)})
    with pytest.warns(RuntimeWarning) as warned:
        run(table, tmp_path / "out", checkpoint_folder, shard_size=1)
    told = [str(warning.message) for warning in warned]
    assert sum("has no file locks" in text for text in told) == 1
    assert sum("can't sync folders" in text for text in told) == 1 and len(codes(tmp_path / "out")) == 4


def test_files_that_no_record_names_are_not_listed(images, checkpoint_folder, tmp_path):
    table = write_table(tmp_path / "a.parquet", {str(i): image for i, image in enumerate(images)})
    run(table, tmp_path / "out", checkpoint_folder, shard_size=2)
    (tmp_path / "out" / "999999-000000.parquet").write_bytes(b"left over")
    assert [(file.name, file.rows) for file in recorded_files(tmp_path / "out")] == [
        ("000000-000000.parquet", 2),
        ("000001-000000.parquet", 2),
    ]


@pytest.mark.parametrize("kind", ["tar", "zip", "parquet"])
def test_an_input_without_images_says_so(kind, checkpoint_folder, tmp_path, capsys):
    source = str(tmp_path / f"a.{kind}")
    if kind == "tar":
        write_tar(source, [("nested.tar", b"")])
    elif kind == "zip":
        zipfile.ZipFile(source, "w").close()
    else:
        write_table(source, {})
    for extra, told in (["--dry-run"], "no images were found"), ([], "the input holds no images"):
        assert main(["batch", source, str(tmp_path / "out"), "--model", str(checkpoint_folder), *extra]) == 3
        assert told in capsys.readouterr().out


def test_a_run_that_finds_nothing_new_does_not_call_its_input_empty(images, checkpoint_folder, tmp_path, capsys):
    """Everything failed before, or nothing failed and the errors are tried again."""
    broken = write_tar(tmp_path / "broken.tar", [("0.png", b"broken")])
    good, empty = write_tar(tmp_path / "good.tar", [("0.png", images[0])]), write_tar(tmp_path / "empty.tar", [])

    def told(source, *extra):
        code = main(["batch", str(source), f"{source}-out", "--model", str(checkpoint_folder), *extra])
        return code, "the input holds no images" in capsys.readouterr().out

    assert told(broken) == (3, False) and told(good) == (0, False) and told(empty) == (3, True)
    assert told(broken) == (3, False) and told(good, "--retry-errors") == (0, False) and told(empty) == (3, True)


@pytest.mark.parametrize("names", [[".txt"], ["jpg"], "json"])
def test_names_of_columns_that_would_stay_empty_are_refused(names, images, checkpoint_folder, tmp_path):
    tar = write_tar(tmp_path / "a.tar", [("0.jpg", images[0]), ("0.txt", b"zero")])
    with pytest.raises(ConfigError, match="keep_columns"):
        run(tar, tmp_path / "out", checkpoint_folder, keep_columns=names)


def test_a_dry_run_over_images_that_all_fail(checkpoint_folder, tmp_path, capsys):
    tar = write_tar(tmp_path / "a.tar", [(f"{i}.jpg", b"broken") for i in range(5)])
    command = ["batch", "--dry-run", tar, str(tmp_path / "out"), "--model", str(checkpoint_folder)]
    assert main(command) == 3
    told = capsys.readouterr().out
    assert "every image of the sample failed" in told and "not a readable image" in told and "minutes" not in told


def test_a_folder_that_can_not_be_read_is_named(images, checkpoint_folder, tmp_path, monkeypatch):
    """Root may read everything, so the refusal of the system is made here."""
    write_folder(tmp_path / "in", {"a/0": images[0], "locked/1": images[1]})
    scan = os.scandir

    def refuse(folder):
        if str(folder).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return scan(folder)

    monkeypatch.setattr(listing.os, "scandir", refuse)
    with pytest.raises(BatchError, match=f"can't read the folder {tmp_path}/in/locked: Permission denied"):
        run(tmp_path / "in", tmp_path / "out", checkpoint_folder)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names that differ in case may be one file")
@pytest.mark.parametrize("names", [["txt"], ["TXT"]])
def test_captions_in_any_case(names, images, checkpoint_folder, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i, suffix in enumerate(("txt", "TXT", "Txt")):
        (folder / f"{i}.jpg").write_bytes(images[i])
        (folder / f"{i}.{suffix}").write_text(suffix)
    summary = run(folder, tmp_path / "out", checkpoint_folder, keep_columns=names)
    assert [row[names[0]] for row in rows(tmp_path / "out")] == ["txt", "TXT", None]
    assert summary.left_out == {".txt": 1}


def test_a_text_that_is_too_large_is_an_error(images, checkpoint_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("dyntok.batch.inputs.files.MAX_TEXT_BYTES", 20)
    write_folder(tmp_path / "in", {"0": images[0], "1": images[1]})
    (tmp_path / "in" / "1.txt").write_text("x" * 21)
    run(tmp_path / "in", tmp_path / "out", checkpoint_folder, keep_columns=["txt"])
    assert [row["txt"] for row in rows(tmp_path / "out")] == ["caption of 0"]
    assert errors(tmp_path / "out") == {"1.jpg": "its txt file is too large; the limit is 20 bytes"}


def test_spaces_between_names_of_columns(images, checkpoint_folder, tmp_path):
    tar = write_tar(tmp_path / "a.tar", [("0.jpg", images[0]), ("0.txt", b"zero"), ("0.cls", b"7")])
    command = ["batch", tar, str(tmp_path / "out"), "--model", str(checkpoint_folder), "--keep-columns"]
    assert main([*command, "cls, txt"]) == 0
    assert [(row["cls"], row["txt"]) for row in rows(tmp_path / "out")] == [("7", "zero")]
    assert main([*command, "txt,"]) == 1


def test_keys_that_are_bytes(images, checkpoint_folder, tmp_path):
    table = pa.table({"__key__": pa.array([b"r0", b"r1"], pa.binary()), "image": pa.array(images[:2], pa.binary())})
    pq.write_table(table, tmp_path / "a.parquet")
    run(tmp_path / "a.parquet", tmp_path / "out", checkpoint_folder, image_column="image")
    assert set(codes(tmp_path / "out")) == {"r0", "r1"}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are Unicode")
def test_paths_that_are_not_utf8(images, checkpoint_folder, tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/f\xe9")
    write_folder(folder, {"a/0": images[0]})
    tar = os.fsdecode(os.fsencode(tmp_path) + b"/t\xe9.tar")
    write_tar(tar, [("0.jpg", images[0]), ("1.jpg", b"broken")])
    for i, source in enumerate((folder, tar, tar)):
        summary = run(source, tmp_path / f"out{i > 0}", checkpoint_folder)
        assert summary.images == (i < 2)  # the third run finds that everything is done
    (row,) = tables(tmp_path / "outTrue", "__run__/errors/*.parquet")[0].to_pylist()
    assert row["source"].endswith(r"/t\xe9.tar")


def test_a_folder_that_is_refused_is_not_touched(images, checkpoint_folder, tmp_path):
    table = write_table(tmp_path / "a.parquet", {"0": images[0]})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(BatchError, match="holds files that are of no run"):
        run(table, tmp_path / "mine", checkpoint_folder)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
