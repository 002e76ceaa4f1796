"""Codes out of an output folder, and the `map` of other libraries."""

import multiprocessing
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.batch_data import codes, files, pictures, rows, run, tar_members, write_table, write_tar
from torch.utils.data import DataLoader

import dyntok
from dyntok.batch import CodesDataset, TokenizeColumn, inspect, read, write_memmap
from dyntok.batch.storage import Output
from dyntok.errors import ConfigError, DataError
from dyntok.llm import read_documents
from dyntok.vocab import VisualVocab


@pytest.fixture(scope="module")
def images(photos):
    return pictures(photos)


@pytest.fixture(scope="module")
def outputs(images, checkpoint_folder, tmp_path_factory):
    """Format -> folder; 60 images in 9 shards."""
    folder = tmp_path_factory.mktemp("outputs")
    tars = [
        write_tar(folder / f"{i}.tar", tar_members({f"{i}/{key}": image for key, image in images.items()}))
        for i in range(3)
    ]
    for form in ("parquet", "webdataset"):
        run(tars, folder / form, checkpoint_folder, shard_size=7, format=form, keep_columns=["txt"])
    return {form: folder / form for form in ("parquet", "webdataset")}


@pytest.fixture(scope="module")
def wanted(outputs):
    return codes(outputs["parquet"])


def keyed(batches):
    found = {}
    for batch in batches:
        assert batch.row_of_image == list(range(len(batch.keys)))
        for key, row in zip(batch.keys, batch.encoding, strict=True):
            assert key not in found
            found[key] = (row.codes[0].tolist(), row.positions[0].tolist())
    return found


@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_read_gives_everything_in_order(form, outputs, wanted, tokenizer):
    batches = list(read(outputs[form], batch_size=25, columns=["txt"]))
    assert [len(batch.keys) for batch in batches] == [25, 25, 10]
    assert keyed(batches) == wanted and [key for batch in batches for key in batch.keys] == list(wanted)
    assert batches[0].columns["txt"] == [f"caption of {key[:2]}{key[2:]}" for key in batches[0].keys]
    images = tokenizer.decode(batches[0].encoding[:2])  # the fingerprint is known, and fits
    assert images[0].size == (64, 64) and batches[0].encoding.fingerprint == tokenizer.fingerprint
    padded, mask = batches[0].encoding.padded()
    assert padded.shape == mask.shape and mask.sum() == batches[0].encoding.num_tokens


def test_several_images_per_row(images, checkpoint_folder, tmp_path):
    content = list(images.values())
    cells = pa.array([[content[0], None, content[1]], [], [content[2]]], pa.list_(pa.binary()))
    pq.write_table(pa.table({"key": ["a", "b", "c"], "images": cells}), tmp_path / "in.parquet")
    run(tmp_path / "in.parquet", tmp_path / "out", checkpoint_folder, interleaved=True)
    (batch,) = read(tmp_path / "out")
    assert batch.keys == ["a", "b", "c"] and batch.row_of_image == [0, 0, 2]
    written = [image for row in rows(tmp_path / "out") for image in row["codes"] if image]
    assert [row.tolist() for row in batch.encoding.codes] == written


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_share_the_rows(shuffle, workers, outputs, wanted):
    found = {}
    for rank in range(3):
        data = CodesDataset(outputs["parquet"], batch_size=4, rank=rank, world=3, shuffle=shuffle)
        part = keyed(
            DataLoader(data, batch_size=None, num_workers=workers, multiprocessing_context="fork" if workers else None)
        )
        assert part and not part.keys() & found.keys()
        found |= part
    assert found == wanted


@pytest.mark.parametrize("remainder, rows", [("repeat", 8), ("drop", 7)])
def test_ranks_have_equally_many_batches(remainder, rows, outputs, wanted):
    """60 rows among 8 ranks, as plain dicts for `DataLoader`, in batches that it collates itself, too."""
    counts, seen = [], []
    for rank in range(8):
        data = CodesDataset(outputs["parquet"], batch_size=4, rank=rank, world=8, remainder=remainder, pad_to=64)
        batches = list(DataLoader(data, batch_size=None))
        assert len(batches) == len(data) and type(batches[0]) is dict
        counts.append([len(batch["codes"]) for batch in batches])
        seen += [row[:length].tolist() for b in batches for row, length in zip(b["codes"], b["lengths"], strict=True)]
    assert counts == [[4, rows - 4]] * 8
    expected = [codes for codes, _ in wanted.values()]
    assert all(row in seen for row in expected) if remainder == "repeat" else all(row in expected for row in seen)
    singles = CodesDataset(outputs["parquet"], batch_size=1, pad_to=64)
    assert next(iter(DataLoader(singles, batch_size=5)))["codes"].shape == (5, 1, 64)


def test_shuffling_follows_from_seed_and_epoch(outputs, wanted):
    def order(seed, epoch):
        data = CodesDataset(outputs["parquet"], shuffle=True, seed=seed)
        data.set_epoch(epoch)
        return [key for batch in data for key in batch.keys]

    assert order(0, 0) == order(0, 0) != order(0, 1) != order(1, 1) and sorted(order(3, 4)) == sorted(wanted)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_epoch_reaches_workers_that_persist(method, outputs):
    def loader(persistent):
        data = CodesDataset(outputs["parquet"], batch_size=4, shuffle=True)
        how = {"num_workers": 2, "multiprocessing_context": method, "persistent_workers": persistent}
        return data, DataLoader(data, batch_size=None, **how)

    def order(epoch, data, batches):
        data.set_epoch(epoch)
        return [batch.keys for batch in batches]

    fresh, kept = [order(epoch, *loader(False)) for epoch in range(2)], loader(True)
    assert [order(epoch, *kept) for epoch in (0, 1, 0, 1)] == fresh * 2 and fresh[0] != fresh[1]
    copy = pickle.loads(pickle.dumps(kept[0]))
    assert copy.epoch == 1 and order(2, copy, copy) == order(2, kept[0], kept[0])


@pytest.mark.parametrize("shuffle", [False, True])
def test_reading_goes_on_where_it_stood(shuffle, outputs, wanted):
    whole = [batch.keys for batch in CodesDataset(outputs["parquet"], batch_size=4, shuffle=shuffle)]
    for stop in (1, 5, 14):
        data = CodesDataset(outputs["parquet"], batch_size=4, shuffle=shuffle)
        stream = iter(data)
        first = [next(stream).keys for _ in range(stop)]
        data.set_epoch(1)  # of the next iteration
        again = CodesDataset(outputs["parquet"], batch_size=4, shuffle=shuffle)
        again.load_state_dict(pickle.loads(pickle.dumps(data.state_dict())))
        assert first + [batch.keys for batch in again] == whole
        assert [batch.keys for batch in again] == whole  # the next epoch begins at the beginning
    with pytest.raises(ConfigError, match="rank was 0, is 1; world was 1, is 2"):
        CodesDataset(outputs["parquet"], rank=1, world=2).load_state_dict(data.state_dict())


@pytest.mark.parametrize("stop", [6, 13, 14, 15])
def test_a_stateful_loader_goes_on(stop, outputs, wanted):
    """At the end of an epoch, too, when one of the two workers has given its last batch."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    def loader():
        return stateful(
            CodesDataset(outputs["parquet"], batch_size=4),
            batch_size=None,
            num_workers=2,
            multiprocessing_context="fork",
        )

    whole, first, begun = [batch.keys for batch in loader()], [], loader()
    for batch in begun:
        first.append(batch.keys)
        if len(first) == stop:
            state = begun.state_dict()
            break
    again = loader()
    again.load_state_dict(state)
    assert first + [batch.keys for batch in again] == whole
    assert [batch.keys for batch in again] == whole  # the next epoch begins at the beginning


def test_a_forked_process_has_its_own_file_system():
    """Asynchronous ones refuse to work in another process than the one that made them."""
    pytest.importorskip("aiohttp")
    output = Output("http://127.0.0.1:1/out", {})  # which is not asked
    process = multiprocessing.get_context("fork").Process(target=lambda: output.fs.loop)
    process.start()
    process.join(60)
    assert process.exitcode == 0 and output.fs is output.fs


def test_folders_and_columns_that_do_not_fit(outputs, images, checkpoint_folder, tmp_path):
    with pytest.raises(DataError, match="no output of `dyntok batch`"):
        read(str(tmp_path))
    with pytest.raises(DataError, match="title"):
        list(read(outputs["parquet"], columns=["title"]))
    with pytest.raises(DataError, match="title"):
        list(read(outputs["webdataset"], columns=["title"]))
    with pytest.raises(ConfigError, match="rank"):
        CodesDataset(outputs["parquet"], rank=2, world=2)
    tar = write_tar(tmp_path / "a.tar", tar_members(images))
    run(tar, tmp_path / "megatron", checkpoint_folder, format="megatron", vocab_size=100)
    with pytest.raises(DataError, match="Megatron"):
        read(tmp_path / "megatron")


def test_an_output_that_grows_gives_what_is_complete(outputs, wanted, images, checkpoint_folder, tmp_path):
    tar = write_tar(tmp_path / "a.tar", tar_members(images))
    run(tar, tmp_path / "out", checkpoint_folder, shard_size=7)
    (tmp_path / "out" / "__run__" / "done" / "000000-000001.json").unlink()
    assert sum(len(batch.keys) for batch in read(tmp_path / "out")) == 13


def test_the_map_of_datasets(images, checkpoint_folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    encoding = dyntok.load(checkpoint_folder).encode(list(images.values()))
    cells = [{"bytes": content, "path": None} for content in [*images.values(), b"broken", None]]
    plain = datasets.Dataset.from_dict({"image": cells, "label": list(range(22))})
    undecoded = plain.cast_column("image", datasets.Image(decode=False))
    mapped = undecoded.map(TokenizeColumn(str(checkpoint_folder)), batched=True, batch_size=5, remove_columns="image")
    assert [row["codes"] for row in mapped][:20] == [row.tolist() for row in encoding.codes]
    assert mapped["label"] == list(range(22)) and "image" not in mapped.column_names
    assert (
        mapped[0]["positions"] == encoding.positions[0].tolist()
        and mapped[0]["grid"] == [8, 8]
        and mapped[0]["width"] == 96
    )
    assert mapped[20]["codes"] == [] and "not a readable image" in mapped[20]["error"]
    assert mapped[21]["error"] == "is null" and mapped[0]["error"] == ""
    pictures_ = datasets.Dataset.from_dict({"image": cells[:20]}).cast_column("image", datasets.Image())
    mapped = pictures_.map(TokenizeColumn(str(checkpoint_folder)), batched=True, remove_columns="image", num_proc=2)
    assert [row["codes"] for row in mapped] == [row.tolist() for row in encoding.codes]


def test_the_cache_of_datasets_knows_the_weights(images, checkpoint_folder, tmp_path):
    """A folder whose tokenizer was trained further gives new codes."""
    datasets = pytest.importorskip("datasets")
    model, tokenizer = tmp_path / "model", dyntok.load(checkpoint_folder)
    cells = [{"bytes": content, "path": None} for content in list(images.values())[:3]]
    datasets.Dataset.from_dict({"image": cells}).save_to_disk(tmp_path / "data")
    found = []
    for _ in range(2):
        tokenizer.save_pretrained(model)
        data = datasets.load_from_disk(tmp_path / "data")
        mapped = data.map(TokenizeColumn(str(model)), batched=True, remove_columns="image")
        wanted = [row.tolist() for row in tokenizer.encode(list(images.values())[:3]).codes]
        assert [row["codes"] for row in mapped] == wanted
        found.append(wanted)
        tokenizer.codebook.embedding.copy_(tokenizer.codebook.embedding.flip(0))
    assert found[0] != found[1]


def test_the_map_of_ray(images, checkpoint_folder, tmp_path):
    ray = pytest.importorskip("ray")
    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        ignore_reinit_error=True,
    )
    encoding = dyntok.load(checkpoint_folder).encode(list(images.values()))
    table = pa.table({"key": list(images), "image": pa.array(list(images.values()), pa.binary())})
    mapped = ray.data.from_arrow(table).map_batches(
        TokenizeColumn, fn_constructor_args=(str(checkpoint_folder),), concurrency=1, batch_size=6
    )
    found = {row["key"]: list(row["codes"]) for row in mapped.take_all()}
    ray.shutdown()
    assert found == {key: row.tolist() for key, row in zip(images, encoding.codes, strict=True)}


def test_map_options(images, checkpoint_folder):
    content = list(images.values())
    column = TokenizeColumn(str(checkpoint_folder), image="picture", budget=5, batch_invariant=True)
    mapped = column({"picture": content[:3], "x": [1, 2, 3]})
    assert column.tokenizer.batch_invariant
    assert [len(row) for row in mapped["codes"]] == [5] * 3 and mapped["x"] == [1, 2, 3] and "margins" not in mapped
    closer = TokenizeColumn(str(checkpoint_folder), margins=True)({"image": [*content[:3], b"no image"]})["margins"]
    expected = column.tokenizer.encode(content[:3], margins=True).margins
    assert np.array_equal(np.stack(closer), [*expected.numpy(), (0, 0)]) and closer[0].dtype == np.float32
    with pytest.raises(DataError, match="no column 'picture'; it has image"):
        TokenizeColumn(str(checkpoint_folder), image="picture")({"image": content})
    with pytest.raises(ConfigError):
        TokenizeColumn(budget=5, threshold=0.5)


SWAPPED = {
    "read": lambda output, path: list(read(output)),
    "CodesDataset": lambda output, path: list(CodesDataset(output, shuffle=True)),
    "inspect": lambda output, path: inspect(output),
    "read_documents": lambda output, path: list(read_documents(output, text=None)),
    "write_memmap": lambda output, path: write_memmap(output, path / "ids.bin", VisualVocab.after(1000, size=256)),
}


@pytest.mark.parametrize("call", SWAPPED.values(), ids=SWAPPED.keys())
@pytest.mark.parametrize("format", ["parquet", "webdataset"])
def test_a_shard_that_is_not_the_recorded_one_is_an_error(call, format, photos, checkpoint_folder, tmp_path):
    table = write_table(tmp_path / "a.parquet", pictures(photos, 6))
    run(table, tmp_path / "out", checkpoint_folder, format=format, shard_size=2)
    undisturbed = files(tmp_path / "out")
    first, second, _ = sorted(path for path in (tmp_path / "out").iterdir() if path.is_file())
    first.write_bytes(second.read_bytes() + b"\0" * 512)
    with pytest.raises(
        DataError, match=f"{first.name} has [0-9,]+ bytes, and [0-9,]+ were written; to write it anew, run the same"
    ):
        call(str(tmp_path / "out"), tmp_path)
    run(table, tmp_path / "out", checkpoint_folder, format=format, shard_size=2)
    assert files(tmp_path / "out") == undisturbed


def test_rows_that_the_record_does_not_count_are_an_error(photos, checkpoint_folder, tmp_path):
    """The record is changed here, since a file of the same size with other rows is hard to make."""
    run(write_table(tmp_path / "a.parquet", pictures(photos, 6)), tmp_path / "out", checkpoint_folder)
    (record,) = (tmp_path / "out" / "__run__" / "done").iterdir()
    record.write_text(record.read_text().replace('"rows": 6', '"rows": 5'))
    with pytest.raises(DataError, match=r"parquet has 6 rows, and 5 were written"):
        list(read(str(tmp_path / "out")))


def test_inspect_notices_a_changed_megatron_file(photos, checkpoint_folder, tmp_path):
    table = write_table(tmp_path / "a.parquet", pictures(photos, 4))
    run(table, tmp_path / "out", checkpoint_folder, format="megatron", vocab_size=1000)
    inspect(str(tmp_path / "out"))
    (ids,) = (tmp_path / "out").glob("*.bin")
    ids.write_bytes(ids.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"\.bin has [0-9,]+ bytes, and [0-9,]+ were written"):
        inspect(str(tmp_path / "out"))
    ids.unlink()
    with pytest.raises(DataError, match=r"\.bin is missing; to write it anew"):
        inspect(str(tmp_path / "out"))
