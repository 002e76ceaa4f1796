"""Small data sets in every form that `dyntok batch` reads, and how its output looks; for several test files."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dyntok.batch import BatchOptions, EngineOptions, tokenize

HERE = EngineOptions(workers=0)  # no processes: quick


def pictures(photos, count=20):
    """Key -> JPEG: other pieces of the photographs, keys in folders."""
    found = {}
    for i in range(count):
        photo = photos[i % 4]
        height, width = photo.shape[:2]
        top, left = height * (i // 4) // (count // 4 + 1), width * (i % 3) // 4
        file = io.BytesIO()
        Image.fromarray(photo[top : top + height // 3, left : left + width // 3]).resize((96 + i, 80)).save(
            file, "JPEG"
        )
        found[f"{'ab'[i // 10 % 2]}/{i:03d}"] = file.getvalue()
    return found


def write_folder(folder, images):
    for key, content in images.items():
        path = Path(folder) / f"{key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.with_suffix(".txt").write_text(f"caption of {key}")
    return str(folder)


def write_tar(path, members):
    """members: (name, content) in order."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


def tar_members(images):
    return [
        pair
        for key, content in images.items()
        for pair in ((f"{key}.jpg", content), (f"{key}.txt", f"caption of {key}".encode()))
    ]


def write_table(path, images, **columns):
    """As Hugging Face datasets writes images; more columns by name."""
    cells = [content if content is None else {"bytes": content, "path": None} for content in images.values()]
    image = pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    captions = pa.array([f"caption of {key}" for key in images])
    table = pa.table({"key": pa.array(list(images)), "image": image, "txt": captions, **columns})
    pq.write_table(table, path, row_group_size=3)
    return str(path)


def run(
    inputs,
    output,
    model,
    *,
    engine=HERE,
    retry_errors=False,
    max_error_rate=1.0,
    storage=None,
    progress=None,
    **options,
):
    how = {"retry_errors": retry_errors, "max_error_rate": max_error_rate, "storage": storage, "progress": progress}
    return tokenize(inputs, output, model=model, options=BatchOptions(**options), engine=engine, **how)


def files(output):
    """Name -> bytes of everything but the lock."""
    return {
        str(path.relative_to(output)): path.read_bytes()
        for path in Path(output).rglob("*")
        if path.is_file() and path.name != "lock"
    }


def tables(output, pattern="*.parquet"):
    return [pq.read_table(path) for path in sorted(Path(output).glob(pattern))]


def rows(output):
    return [row for table in tables(output) for row in table.to_pylist()]


def codes(output):
    """Key -> codes and positions."""
    found = {row["key"]: (row["codes"], row["positions"]) for row in rows(output)}
    assert len(found) == len(rows(output))
    return found


def errors(output):
    """Key -> reason, of the errors table."""
    return {
        row["key"]: row["reason"] for table in tables(output, "__run__/errors/*.parquet") for row in table.to_pylist()
    }


def records(output):
    return {path.stem: json.loads(path.read_text()) for path in sorted(Path(output).glob("__run__/done/*.json"))}
