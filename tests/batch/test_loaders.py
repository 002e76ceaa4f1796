"""Codes for other loaders, read back by the loader itself."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.batch_data import pictures, run, write_folder

from dyntok import ConfigError, FingerprintError, VisualVocab
from dyntok.batch import prepare_energon, read, write_litdata, write_memmap
from dyntok.errors import BatchError, CodeError
from dyntok.llm import parse_ids

EOD = 3


@pytest.fixture(scope="module")
def folder(photos, checkpoint_folder, tmp_path_factory):
    """Codes of twenty pictures with captions."""
    place = tmp_path_factory.mktemp("codes")
    write_folder(place / "in", pictures(photos))
    run(str(place / "in"), str(place / "out"), str(checkpoint_folder), keep_columns=("txt",), shard_size=8)
    return str(place / "out")


@pytest.fixture(scope="module")
def vocab():
    return VisualVocab.after(1000, size=256, patches=64)


def known(folder):
    return [tuple(codes.tolist()) for batch in read(folder) for codes in batch.encoding.codes]


def images(ids, vocab):
    return [segment.codes for segment in parse_ids(ids, vocab) if segment.kind == "image"]


def test_a_memory_map_of_ids(folder, vocab, tmp_path):
    count = write_memmap(folder, tmp_path / "train.bin", vocab, eod=EOD)
    ids = np.memmap(tmp_path / "train.bin", dtype=np.uint16, mode="r")
    assert len(ids) == count and images(torch.from_numpy(ids.astype(np.int64)), vocab) == known(folder)
    facts = json.loads((tmp_path / "train.json").read_text())
    assert (ids[np.array(facts["documents"])[1:] - 1] == EOD).all() and facts["dtype"] == "uint16"
    large = VisualVocab.after(70_000, size=256, patches=64)
    write_memmap(folder, tmp_path / "large.bin", large)
    assert np.memmap(tmp_path / "large.bin", dtype=np.uint32, mode="r")[0] == 70_000


def test_one_text_of_a_list_is_drawn(photos, checkpoint_folder, vocab, tmp_path):
    """A companion in JSON is a list of captions, not text with brackets."""
    write_folder(tmp_path / "in", pictures(photos, 8))
    for path in (tmp_path / "in").rglob("*.txt"):
        path.with_suffix(".json").write_text('["one", "two"]')
    run(str(tmp_path / "in"), str(tmp_path / "out"), str(checkpoint_folder), keep_columns=("json",))
    write_memmap(
        str(tmp_path / "out"), tmp_path / "train.bin", vocab, text="json", encode=lambda t: list(map(ord, t)), eod=EOD
    )
    ids = np.memmap(tmp_path / "train.bin", dtype=np.uint16, mode="r").tolist()
    words = "".join(chr(id) for id in ids if id < 1000).split(chr(EOD))[:-1]
    assert len(words) == 8 and set(words) == {"one", "two"}


def test_text_follows_its_image(folder, vocab, tmp_path):
    def encode(text):
        return [*(ord(letter) for letter in text), vocab.image_start]  # spells a start, which is left out

    write_memmap(folder, tmp_path / "train.bin", vocab, text="txt", encode=encode, eod=EOD)
    ids = np.memmap(tmp_path / "train.bin", dtype=np.uint16, mode="r").astype(np.int64)
    first = ids[: int((ids == EOD).argmax())]
    assert "".join(map(chr, first[first < 1000])).startswith("caption of a/")
    assert images(torch.from_numpy(ids), vocab) == known(folder)
    with pytest.raises(ConfigError, match="give both"):
        write_memmap(folder, tmp_path / "other.bin", vocab, text="txt")


def test_what_does_not_fit_is_refused(folder, vocab, tmp_path):
    other = VisualVocab.after(1000, size=256, patches=64, fingerprint="0" * 16)
    with pytest.raises(FingerprintError, match="the vocabulary is that of 0000"):
        write_memmap(folder, tmp_path / "train.bin", other)
    assert not (tmp_path / "train.bin").exists()
    with pytest.raises(ConfigError, match="eod is -1"):
        write_memmap(folder, tmp_path / "train.bin", vocab, eod=-1)
    with pytest.raises(BatchError, match="has no tars"):
        pytest.importorskip("megatron.energon")
        prepare_energon(folder)


def test_ids_of_texts_that_do_not_fit_are_refused(folder, vocab, tmp_path):
    wide = VisualVocab.after(70_000, size=256, patches=64)
    with pytest.raises(CodeError, match="id 70000 of a text, or of eod, does not fit uint16"):
        write_memmap(folder, tmp_path / "train.bin", vocab, text="txt", encode=lambda text: [70_000])
    pytest.importorskip("litdata")
    for words, id, dtype in ((vocab, 70_000, "uint16"), (wide, 2**31, "int32")):
        with pytest.raises(CodeError, match=f"id {id} of a text, or of eod, does not fit {dtype}"):
            write_litdata(folder, tmp_path / dtype, words, text="txt", encode=lambda text: [id])  # noqa: B023


def test_litdata_reads_its_tokens_and_resumes(folder, vocab, tmp_path):
    litdata = pytest.importorskip("litdata")
    from litdata.streaming.item_loader import TokensLoader

    assert write_litdata(folder, tmp_path / "tokens", vocab, eod=EOD) == 20
    with pytest.raises(BatchError, match="not empty"):
        write_litdata(folder, tmp_path / "tokens", vocab)

    def loader():
        data = litdata.StreamingDataset(str(tmp_path / "tokens"), item_loader=TokensLoader(block_size=50))
        return litdata.StreamingDataLoader(data, batch_size=2, num_workers=0)

    whole = torch.cat([batch.flatten() for batch in loader()]).long()
    write_memmap(folder, tmp_path / "train.bin", vocab, eod=EOD)
    expected = np.memmap(tmp_path / "train.bin", dtype=np.uint16, mode="r").astype(np.int64)
    assert whole.tolist() == expected[: len(whole)].tolist() and len(whole) > len(expected) - 100
    first, second = loader(), loader()
    rows = iter(first)
    begin = [next(rows) for _ in range(3)]
    second.load_state_dict(first.state_dict())
    assert torch.equal(torch.cat([*begin, *second]).flatten().long(), whole)


def test_datasets_stream_on_two_ranks_and_resume(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    from datasets.distributed import split_dataset_by_node

    def rank(number):
        address = f"file://{folder}/*.parquet"
        rows = datasets.load_dataset("parquet", data_files=address, streaming=True, cache_dir=str(tmp_path))["train"]
        return split_dataset_by_node(rows, rank=number, world_size=2)

    rows = [row for number in (0, 1) for row in rank(number)]
    assert sorted(tuple(row["codes"]) for row in rows) == sorted(known(folder))
    first, second = rank(0), rank(0)
    stream = iter(first)
    begin = [next(stream)["key"] for _ in range(3)]
    second.load_state_dict(first.state_dict())
    assert [*begin, *(row["key"] for row in second)] == [row["key"] for row in rank(0)]


def energon_loader(folder, rank):
    """What one of two ranks reads."""
    import megatron.energon as energon

    class Codes(energon.DefaultTaskEncoder):
        cookers = [energon.Cooker(energon.stateless(lambda sample: sample))]

        @energon.stateless
        def encode_sample(self, sample):
            return sample

        def batch(self, samples):
            return samples

    config = energon.WorkerConfig(rank=rank, world_size=2, num_workers=0)
    order = {"shuffle_buffer_size": None, "max_samples_per_sequence": None, "repeat": False}
    encoder = Codes()
    data = energon.get_train_dataset(folder, batch_size=1, worker_config=config, task_encoder=encoder, **order)
    return energon.get_savable_loader(data)


def test_energon_reads_on_two_ranks_and_resumes(photos, checkpoint_folder, tmp_path):
    pytest.importorskip("megatron.energon")
    write_folder(tmp_path / "in", pictures(photos))
    out = tmp_path / "out"
    run(str(tmp_path / "in"), str(out), str(checkpoint_folder), format="webdataset", shard_size=5)
    (out / "999999-000000.tar").write_bytes(next(out.glob("*.tar")).read_bytes())  # as a killed run may leave one
    assert prepare_energon(out) == 20
    found = {sample["__key__"]: sample["codes.npy"] for rank in (0, 1) for (sample,) in energon_loader(out, rank)}
    assert len(found) == 20
    assert sorted(tuple(codes.tolist()) for codes in found.values()) == sorted(known(str(out)))

    first, second = energon_loader(out, 0), energon_loader(out, 0)
    rows = iter(first)
    begin = [next(rows)[0]["__key__"] for _ in range(3)]
    second.restore_state_rank(first.save_state_rank())
    assert [*begin, *(sample["__key__"] for (sample,) in second)] == [s["__key__"] for (s,) in energon_loader(out, 0)]


def test_a_row_without_pictures_and_with_an_empty_text(photos, checkpoint_folder, vocab, tmp_path):
    content = list(pictures(photos, 1).values())
    rows = pa.array(
        [[{"bytes": content[0], "path": None}], []], pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    )
    pq.write_table(pa.table({"key": ["a", "b"], "images": rows, "txt": ["", ""]}), tmp_path / "in.parquet")
    run(
        str(tmp_path / "in.parquet"),
        str(tmp_path / "out"),
        str(checkpoint_folder),
        interleaved=True,
        keep_columns=("txt",),
    )
    write_memmap(
        str(tmp_path / "out"), tmp_path / "ids.bin", vocab, text="txt", encode=lambda text: list(map(ord, text))
    )
    assert json.loads((tmp_path / "ids.json").read_text())["documents"] == [0]
