"""The page on file formats names every column, member and key that the commands write, and no other."""

import json
import re
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.batch_data import pictures, write_folder
from support.pages import FOLDER

from dyntok.cli.main import main

PAGE = (FOLDER / "formats.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """The cells of the table whose first column has this heading."""
    (table,) = re.findall(rf"^\| {re.escape(heading)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()]


def names(heading: str) -> list[str]:
    return [row[0].strip("`") for row in rows(heading)]


def described(kind) -> str:
    """An Arrow type in the page's words."""
    text = str(kind)
    for pattern, words in (
        (r"fixed_size_list<\w+: (\w+)>\[(\d+)\]", r"list of \2 \1"),
        (r"list<\w+: (\w+)>", r"list of \1"),
    ):
        text = re.sub(pattern, words, text)
    return text


@pytest.fixture(scope="module")
def written(photos, tmp_path_factory):
    """A folder with the output of every format, made from three photographs and a broken file."""
    folder = tmp_path_factory.mktemp("formats")
    images = {key.replace("/", "-"): content for key, content in pictures(photos, 3).items()}
    write_folder(folder / "in", images)
    (folder / "in" / "broken.jpg").write_bytes(b"no picture")
    (folder / "in" / "broken.txt").write_text("caption")
    here = ["--workers", "0"]
    for name in ("parquet", "webdataset"):
        options = ["--format", name, "--keep-columns", "txt", *here]
        assert main(["batch", str(folder / "in"), str(folder / name), *options]) == 3
    megatron = ["--format", "megatron", "--vocab-size", "32000", *here]
    assert main(["batch", str(folder / "in"), str(folder / "megatron"), *megatron]) == 3
    return folder


def test_parquet_has_the_columns_and_types_of_the_page(written):
    schema = pq.read_schema(next((written / "parquet").glob("*.parquet")))
    found = [[f"`{field.name}`", described(field.type)] for field in schema]
    assert [row[:2] for row in rows("column")] + [["`txt`", "string"]] == found


def test_parquet_metadata_has_the_names_of_the_page(written):
    schema = pq.read_schema(next((written / "parquet").glob("*.parquet")))
    assert set(schema.metadata) == {b"dyntok"}
    values = json.loads(schema.metadata[b"dyntok"])
    assert names("name in the JSON object") == list(values)
    assert "fingerprint" in values["tokenizer"] and set(values["input"]) == {"kind", "sources"}


def test_webdataset_has_the_members_of_the_page(written):
    (path,) = (written / "webdataset").glob("*.tar")
    with tarfile.open(path) as tar:
        contents = {member.name: tar.extractfile(member).read() for member in tar}
    keys = {name.partition(".")[0] for name in contents}
    assert len(keys) == 3
    assert {name.replace("KEY", key) for name in names("member") for key in keys} == set(contents)
    for key in keys:
        assert names("name in `KEY.json`") == list(json.loads(contents[f"{key}.json"]))
        assert contents[f"{key}.txt"].startswith(b"caption of")


def test_megatron_has_the_files_of_the_page(written):
    found = {path.name for path in (written / "megatron").iterdir() if path.is_file()}
    assert {name.replace("NAME", "000000-000000") for name in names("file of the Megatron format")} == found


def test_the_run_folder_has_the_files_of_the_page(written):
    run = written / "parquet" / "__run__"
    found = {path.relative_to(run.parent).as_posix() for path in run.rglob("*") if path.is_file()} - {"__run__/lock"}
    assert {name.replace("NAME", "000000-000000") for name in names("file of the run folder")} == found
    table = pq.read_schema(run / "errors" / "000000-000000.parquet")
    assert [row[:2] for row in rows("column of the error table")] == [
        [f"`{field.name}`", described(field.type)] for field in table
    ]
    metadata = json.loads(pq.read_schema(next((written / "parquet").glob("*.parquet"))).metadata[b"dyntok"])
    assert json.loads((run / "run.json").read_text()) == {k: v for k, v in metadata.items() if k != "codebook_size"}


def test_encode_writes_the_names_of_the_page(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photos[2]).save("cat.jpg")
    assert main(["encode", "cat.jpg", "-o", "codes.json"]) == 0
    assert names("name in `codes.json`") == list(json.loads(Path("codes.json").read_text()))


def test_a_checkpoint_has_the_files_of_the_page(checkpoint_folder):
    assert set(names("file of a checkpoint")) == {path.name for path in checkpoint_folder.iterdir()}
