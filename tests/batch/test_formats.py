"""What `dyntok batch` writes, read by the libraries it is written for."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.batch_data import codes, pictures, rows, run, tables, tar_members, write_folder, write_table, write_tar

import dyntok
from dyntok.batch import BatchOptions, read, report
from dyntok.batch.formats import Megatron, megatron_index
from dyntok.errors import BatchError, ConfigError, DataError


@pytest.fixture(scope="module")
def images(photos):
    return pictures(photos)


@pytest.fixture(scope="module")
def tar(images, tmp_path_factory):
    return write_tar(tmp_path_factory.mktemp("in") / "in.tar", tar_members(images))


def test_parquet_columns_and_metadata(tar, checkpoint_folder, tokenizer, tmp_path):
    run(tar, tmp_path / "out", checkpoint_folder, keep_columns=["txt"])
    (table,) = tables(tmp_path / "out")
    kinds = {
        "key": "string",
        "codes": "list<element: uint8>",
        "positions": "list<element: uint8>",
        "width": "uint32",
        "height": "uint32",
    }
    kinds |= {
        "grid": "fixed_size_list<element: uint16>[2]",
        "crop_box": "fixed_size_list<element: uint32>[4]",
        "txt": "string",
    }
    assert {field.name: str(field.type) for field in table.schema} == kinds
    facts = json.loads(table.schema.metadata[b"dyntok"])
    assert facts["tokenizer"]["fingerprint"] == tokenizer.fingerprint and facts["dyntok"] == dyntok.__version__
    assert facts["codebook_size"] == 256 and facts["options"]["keep_columns"] == ["txt"]
    for row in table.to_pylist():
        assert row["positions"] == sorted(set(row["positions"])) and len(row["positions"]) == len(row["codes"]) > 0


def test_margins_are_a_column_on_request(images, checkpoint_folder, tmp_path):
    folder = write_folder(tmp_path / "in", images)
    run(folder, tmp_path / "out", checkpoint_folder, margins=True, dtype="bf16")  # in which many decisions are close
    (table,) = tables(tmp_path / "out")
    assert str(table.schema.field("margins").type) == "fixed_size_list<element: float>[2]"
    assert json.loads(table.schema.metadata[b"dyntok"])["options"]["margins"] is True
    (part,) = read(tmp_path / "out", columns=["margins"])
    tokenizer = dyntok.load(checkpoint_folder, dtype="bf16")
    wanted = tokenizer.encode([f"{folder}/{key}" for key in part.keys], margins=True)
    assert part.columns["margins"] == wanted.margins.tolist() and (wanted.margins.sum(0) > 0).all()
    with pytest.raises(BatchError, match="options.margins is False, was True"):
        run(folder, tmp_path / "out", checkpoint_folder, dtype="bf16")
    for form in ({"format": "webdataset"}, {"format": "megatron", "vocab_size": 1000}):
        with pytest.raises(ConfigError, match="margins are a column of parquet"):
            BatchOptions(margins=True, **form)


def test_margins_with_a_psnr_and_of_interleaved_rows(images, checkpoint_folder, tmp_path):
    first, second, *_ = images.values()
    column = pa.array([[first, None], [second]], pa.list_(pa.binary()))
    pq.write_table(pa.table({"key": ["a", "b"], "image": column}), tmp_path / "in.parquet")
    run(tmp_path / "in.parquet", tmp_path / "out", checkpoint_folder, margins=True, psnr=12.0, interleaved=True)
    (table,) = tables(tmp_path / "out")
    shapes = [[cell and len(cell) for cell in row] for row in table["margins"].to_pylist()]
    assert shapes == [[2, None], [2]]


def test_the_bundled_tokenizer_needs_two_bytes_per_code(tar, tmp_path):
    run(tar, tmp_path / "out", None)
    (table,) = tables(tmp_path / "out")
    assert str(table.schema.field("codes").type) == "list<element: uint16>"


def test_parquet_is_what_datasets_loads(tar, checkpoint_folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    run([tar], tmp_path / "out", checkpoint_folder, shard_size=7)
    loaded = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.num_rows == 20 and {row["key"]: (row["codes"], row["positions"]) for row in loaded} == codes(
        tmp_path / "out"
    )
    assert pq.read_table(tmp_path / "out").num_rows == 20  # pyarrow, the whole folder


def test_rewriting_gives_the_same_bytes(tar, checkpoint_folder, tmp_path):
    for form in ({"format": "parquet"}, {"format": "webdataset"}, {"format": "megatron", "vocab_size": 1000}):
        contents = []
        for name in ("a", "b"):
            run(tar, tmp_path / f"{form['format']}-{name}", checkpoint_folder, **form)
            output = tmp_path / f"{form['format']}-{name}"
            contents.append({path.name: path.read_bytes() for path in output.iterdir() if path.is_file()})
        assert contents[0] == contents[1] and contents[0]


def test_webdataset_is_what_webdataset_loads(images, checkpoint_folder, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    some = {**images, "../x.y/..": images["a/000"], "a/000 ": images["a/001"]}
    table = write_table(tmp_path / "in.parquet", some)
    run(table, tmp_path / "parquet", checkpoint_folder)
    run(table, tmp_path / "out", checkpoint_folder, format="webdataset", keep_columns=["txt"], shard_size=16)
    wanted = codes(tmp_path / "parquet")
    urls = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len(urls) == 2 and [sample["json"]["key"] for sample in samples] == list(wanted)
    for sample in samples:
        facts = sample["json"]
        assert (sample["codes.npy"].tolist(), sample["positions.npy"].tolist()) == wanted[facts["key"]]
        assert facts["grid"] == [8, 8] and facts["height"] == 80 and sample["txt"] == f"caption of {facts['key']}"
        assert ".." not in sample["__key__"] and not sample["__key__"].startswith("/")


def test_webdataset_names_are_different_where_keys_are_not(images, checkpoint_folder, tmp_path):
    content = images["a/000"]
    tar = write_tar(
        tmp_path / "in.tar", [("k.jpg", content), ("k.jpg", content), ("..jpg", content), ("...jpg", content)]
    )
    run(tar, tmp_path / "out", checkpoint_folder, format="webdataset")
    webdataset = pytest.importorskip("webdataset")
    samples = list(webdataset.WebDataset([str(tmp_path / "out" / "000000-000000.tar")], shardshuffle=False).decode())
    assert [sample["json"]["key"] for sample in samples].count("k") == 2
    assert len({sample["__key__"] for sample in samples}) == len(samples)


def test_companions_that_are_no_json(images, checkpoint_folder, tmp_path):
    table = write_table(tmp_path / "in.parquet", images, raw=[b"\xff"] * 20)
    with pytest.raises(DataError, match="can't be written as JSON"):
        run(table, tmp_path / "out", checkpoint_folder, format="webdataset", keep_columns=["raw"], image_column="image")


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1000, np.uint16), (70_000, np.int32)])
def test_megatron_is_what_megatron_loads(tar, vocab_size, dtype, checkpoint_folder, tmp_path):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    run(tar, tmp_path / "parquet", checkpoint_folder)
    run(tar, tmp_path / "out", checkpoint_folder, format="megatron", vocab_size=vocab_size, shard_size=8)
    wanted, vocab = codes(tmp_path / "parquet"), dyntok.VisualVocab.after(vocab_size, 256)
    found = {}
    for index in sorted((tmp_path / "out").glob("*.idx")):
        dataset = indexed.IndexedDataset(str(index.with_suffix("")))
        keys = json.loads(index.with_name(f"{index.stem}.keys.json").read_text())
        assert len(dataset) == len(keys) and dataset.document_indices.tolist() == list(range(len(keys) + 1))
        for i, key in enumerate(keys):
            assert dataset[i].dtype == dtype
            found[key] = vocab.to_codes(dataset[i].astype(np.int64)).tolist()
    assert found == {key: row for key, (row, _) in wanted.items()}


def megatron_documents(output):
    """Key -> ids of each document."""
    indexed, found = pytest.importorskip("megatron.core.datasets.indexed_dataset"), {}
    for index in sorted(output.glob("*.idx")):
        dataset = indexed.IndexedDataset(str(index.with_suffix("")))
        keys = json.loads(index.with_name(f"{index.stem}.keys.json").read_text())
        found |= {key: dataset[i].astype(np.int64).tolist() for i, key in enumerate(keys)}
    return found


@pytest.fixture
def text_tokenizer(tmp_path):
    """A tokenizer of bytes, as a file; it knows the start of an image, as one that was extended does."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>"), AddedToken("<|image|>")])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tokenizer


@pytest.mark.parametrize("layout", ["map", "lattice", "positions", "none", None])
def test_megatron_has_places_texts_and_ends_of_documents(layout, images, text_tokenizer, tokenizer, tmp_path):
    texts = [f"caption of {key}" for key in images]
    texts[:2] = ['["one caption", "another"]', "an <|image|> in text"]
    table = write_table(tmp_path / "in.parquet", images, text=texts)
    folder = tmp_path / "checkpoint"
    tokenizer.save_pretrained(folder)
    size = text_tokenizer.get_vocab_size() - 1  # <|image|> comes after the language model's own tokens
    options = dict(format="megatron", vocab_size=size, eod=size - 1, layout=layout, shard_size=8)
    run(table, tmp_path / "out", folder, **options, keep_columns=["text"], text_tokenizer=str(tmp_path))
    vocab = dyntok.VisualVocab.of(tokenizer, after=size, layout=layout or "none")
    places = layout if layout in ("map", "lattice") else None
    for key, words in zip(images, texts, strict=True):
        ids = megatron_documents(tmp_path / "out")[key]
        end = ids.index(vocab.image_end) + 1
        encoding = tokenizer.encode(images[key], places=places)
        assert ids[:end] == vocab.to_ids(encoding)[0].tolist() and ids[-1] == size - 1
        written = text_tokenizer.decode(ids[end:-1]).replace(" ", "").replace("Ġ", " ")
        if words.startswith("["):
            assert written in ("one caption", "another")
        else:
            assert written == words.replace("<|image|>", "")


def test_megatron_texts_belong_to_the_run(images, text_tokenizer, checkpoint_folder, tmp_path):
    """Another text tokenizer under the same name is another run; one that does not exist is refused."""
    table = write_table(tmp_path / "in.parquet", images, text=["a"] * len(images))
    options = dict(format="megatron", vocab_size=300, keep_columns=["text"])
    with pytest.raises(ConfigError, match="can't read the text tokenizer"):
        run(table, tmp_path / "none", checkpoint_folder, **options, text_tokenizer=str(tmp_path / "missing.json"))
    run(table, tmp_path / "out", checkpoint_folder, **options, text_tokenizer=str(tmp_path))
    text_tokenizer.add_tokens(["more"])
    text_tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(BatchError, match="options.text_tokenizer is .sha256:"):
        run(table, tmp_path / "out", checkpoint_folder, **options, text_tokenizer=str(tmp_path))


def test_megatron_index_byte_for_byte():
    """By hand, from the documented format.

    Magic, version, type, sequences, documents + 1, lengths, byte offsets, first sequences.
    """
    written = megatron_index([3, 1], np.dtype("uint16"))
    by_hand = (
        b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + b"\x08" + (2).to_bytes(8, "little") + (3).to_bytes(8, "little")
    )
    by_hand += (
        b"\x03\0\0\0"
        + b"\x01\0\0\0"
        + bytes(8)
        + b"\x06"
        + bytes(7)
        + bytes(8)
        + b"\x01"
        + bytes(7)
        + b"\x02"
        + bytes(7)
    )
    assert written == by_hand


def test_megatron_documents_of_several_images(images, checkpoint_folder, tmp_path):
    content = list(images.values())
    cells = pa.array([[content[0], None, content[1]], [content[2]], []], pa.list_(pa.binary()))
    pq.write_table(pa.table({"key": ["a", "b", "c"], "images": cells}), tmp_path / "in.parquet")
    run(
        tmp_path / "in.parquet",
        tmp_path / "out",
        checkpoint_folder,
        format="megatron",
        vocab_size=1000,
        interleaved=True,
    )
    run(tmp_path / "in.parquet", tmp_path / "parquet", checkpoint_folder, interleaved=True)
    vocab = dyntok.VisualVocab.after(1000, 256)
    wanted = [
        [id for image in row["codes"] if image for id in vocab.to_ids(image).tolist()]
        for row in rows(tmp_path / "parquet")
    ]
    ids = np.fromfile(tmp_path / "out" / "000000-000000.bin", np.uint16).tolist()
    assert ids == [id for document in wanted for id in document] and ids.count(1000) == 3


def test_megatron_refuses_ids_that_do_not_fit():
    with pytest.raises(BatchError, match="do not fit"):
        Megatron(dyntok.VisualVocab.after(2**31 - 10, 256))


def test_a_sheet_shows_no_codes_of_other_pictures(photos, checkpoint_folder, tokenizer, tmp_path, monkeypatch):
    """Rows that share a key are left out, and so is a broken picture before the first one that has codes."""
    content = list(pictures(photos, 5).values())
    shown = []
    monkeypatch.setattr(
        report, "contact_sheet", lambda tok, images, encoding, **options: shown.append((images, encoding))
    )
    for name, some in (("a", {"0": content[0], "1": content[1]}), ("b", {"0": content[2]})):
        write_folder(tmp_path / name, some)
    folders = [tmp_path / "a", tmp_path / "b"]
    run(folders, tmp_path / "folders", checkpoint_folder)
    report.draw_sample_sheet(str(tmp_path / "folders"), tokenizer)
    (tmp_path / "b" / "0.jpg").write_bytes(b"broken")
    run(folders, tmp_path / "retried", checkpoint_folder)
    (tmp_path / "b" / "0.jpg").write_bytes(content[2])
    run(folders, tmp_path / "retried", checkpoint_folder, retry_errors=True)
    report.draw_sample_sheet(str(tmp_path / "retried"), tokenizer)
    struct = pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    cells = [[{"bytes": part, "path": None} for part in row] for row in ((b"broken", content[3]), (content[4],))]
    pq.write_table(pa.table({"key": ["a", "b"], "images": pa.array(cells, struct)}), tmp_path / "in.parquet")
    run(tmp_path / "in.parquet", tmp_path / "rows", checkpoint_folder, interleaved=True)
    report.draw_sample_sheet(str(tmp_path / "rows"), tokenizer)
    for (images, encoding), expected in zip(shown, ([content[1]], [content[1]], content[3:]), strict=True):
        assert tokenizer.encode(images) == tokenizer.encode(expected) == encoding
