"""What trainers make of the files: Megatron's `GPTDataset` with its resets, datatrove's `.ds`, ranks and resuming."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.batch_data import pictures, run, write_folder
from torch.utils.data import DataLoader, DistributedSampler

from dyntok import VisualVocab
from dyntok.batch import read, write_litdata, write_memmap
from dyntok.llm import parse_ids

EOD, AFTER, LENGTH = 3, 1000, 40
VOCAB = VisualVocab.after(AFTER, size=256, patches=64)


@pytest.fixture(scope="module")
def inputs(photos, tmp_path_factory):
    place = tmp_path_factory.mktemp("inputs")
    write_folder(place, pictures(photos))
    return str(place)


@pytest.fixture(scope="module")
def folder(inputs, checkpoint_folder, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("codes") / "out")
    run(inputs, out, str(checkpoint_folder), shard_size=8)
    return out


@pytest.fixture(scope="module")
def stream(folder, tmp_path_factory):
    """All ids, one document after another."""
    path = tmp_path_factory.mktemp("ids") / "train.bin"
    write_memmap(folder, path, VOCAB, eod=EOD)
    return np.fromfile(path, np.uint16).astype(np.int64)


def gpt_dataset(prefix, seed=1):
    """One epoch of the documents, with everything that Megatron resets at their ends."""
    blended = pytest.importorskip("megatron.core.datasets.gpt_dataset")
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    config = blended.GPTDatasetConfig(
        random_seed=seed,
        sequence_length=LENGTH,
        tokenizer=SimpleNamespace(eod=EOD, pad=-1, vocab_size=VOCAB.vocab_size, unique_identifiers={"name": "dyntok"}),
        reset_position_ids=True,
        reset_attention_mask=True,
        eod_mask_loss=True,
        mid_level_dataset_surplus=0.0,
    )
    documents = IndexedDataset(prefix)
    return blended.GPTDataset(documents, prefix, np.arange(len(documents)), None, Split.train, config)


def test_megatron_resets_at_the_end_of_every_document(inputs, folder, checkpoint_folder, tmp_path):
    options = dict(format="megatron", vocab_size=AFTER, eod=EOD, layout="positions")
    run(inputs, str(tmp_path / "out"), str(checkpoint_folder), **options)
    (index,) = (tmp_path / "out").glob("*.idx")
    data, ends, found = gpt_dataset(str(index.with_suffix(""))), 0, []
    for sample in (data[i] for i in range(len(data))):
        tokens, positions = sample["tokens"], sample["position_ids"]
        last = tokens == EOD
        document = last.cumsum(0) - last.long()  # an end belongs to the document that it ends
        starts = torch.cat([torch.tensor([True]), last[:-1]])
        assert torch.equal(positions == 0, starts)
        seen = ~sample["attention_mask"][0]
        assert torch.equal(seen, torch.ones_like(seen).tril() & (document[:, None] == document))
        assert torch.equal(sample["loss_mask"] == 0, last)
        assert torch.equal(sample["labels"][:-1], tokens[1:])
        ends += int(last.sum())
        found += [image.codes for image in parse_ids(tokens, VOCAB) if image.kind == "image"]
    known = [tuple(codes.tolist()) for batch in read(folder) for codes in batch.encoding.codes]
    assert ends >= 18 and found and set(found) <= set(known)  # of 20; the last row may be left out, as Megatron does


def test_datatrove_reads_a_memory_map(folder, stream, tmp_path):
    datatrove = pytest.importorskip("datatrove.utils.dataset")
    write_memmap(folder, tmp_path / "train.ds", VOCAB, eod=EOD)
    data = datatrove.DatatroveFileDataset(
        f"file://{tmp_path}/train.ds", LENGTH, token_size=2, return_positions=True, positions_from_eos_token_id=EOD
    )
    whole = torch.cat([data[i]["input_ids"] for i in range(len(data))])
    assert whole.tolist() == stream[: len(whole)].tolist() and len(stream) - len(whole) <= LENGTH
    for row in (data[i] for i in range(len(data))):
        starts = torch.cat([torch.tensor([True]), row["input_ids"][:-1] == EOD])
        assert torch.equal(row["positions"] == 0, starts)
    check_ranks(data, lambda row: tuple(row["input_ids"].tolist()))


def test_ranks_share_a_memory_map(stream):
    """The class that small trainers write themselves: rows of a memory map."""
    rows = stream[: len(stream) // LENGTH * LENGTH].reshape(-1, LENGTH)
    check_ranks(rows, lambda row: tuple(np.asarray(row).tolist()))


def check_ranks(data, key):
    """Two ranks see everything once; one goes on in the middle with what torchdata's loader saved."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    def rank(number):
        sampler = DistributedSampler(data, num_replicas=2, rank=number, shuffle=False, drop_last=True)
        return stateful(data, batch_size=1, sampler=sampler, collate_fn=lambda rows: key(rows[0]))

    both = [row for number in (0, 1) for row in rank(number)]
    assert sorted(both) == sorted(key(data[i]) for i in range(len(data) // 2 * 2)) and len(both) > 8
    first, second = rank(0), rank(0)
    rows = iter(first)
    begin = [next(rows) for _ in range(3)]
    second.load_state_dict(first.state_dict())
    assert [*begin, *second] == list(rank(0))


def test_megatron_goes_on_after_the_samples_it_had(inputs, checkpoint_folder, tmp_path):
    """Megatron resumes by the number of samples: the order follows from the seed."""
    run(inputs, str(tmp_path / "out"), str(checkpoint_folder), format="megatron", vocab_size=AFTER, eod=EOD)
    (index,) = (tmp_path / "out").glob("*.idx")
    first, again = (gpt_dataset(str(index.with_suffix(""))) for _ in range(2))
    check_ranks(first, lambda row: tuple(row["tokens"].tolist()))
    assert all(torch.equal(first[i]["tokens"], again[i]["tokens"]) for i in range(len(first)))


RANK = """
import sys, json, litdata
from litdata.streaming.item_loader import TokensLoader
data = litdata.StreamingDataset(sys.argv[1], item_loader=TokensLoader(block_size=20))
rows = [batch[0].tolist() for batch in litdata.StreamingDataLoader(data, batch_size=1, num_workers=0)]
print(json.dumps(rows))
"""


@pytest.mark.slow
def test_litdata_on_two_ranks(folder, stream, tmp_path):
    pytest.importorskip("litdata")
    write_litdata(folder, tmp_path / "tokens", VOCAB, eod=EOD)
    ranks = []
    for number in (0, 1):
        env = os.environ | dict(WORLD_SIZE="2", NNODES="1", GLOBAL_RANK=str(number), NODE_RANK="0")
        done = subprocess.run(
            [sys.executable, "-c", RANK, str(tmp_path / "tokens")], env=env, capture_output=True, text=True
        )
        ranks.append(json.loads(done.stdout.splitlines()[-1]))
    whole = [stream[i : i + 20].tolist() for i in range(0, len(stream) - 19, 20)]
    both = [row for rows in ranks for row in rows]
    assert all(row in whole for row in both) and len(whole) - 2 <= len(both) == len({tuple(row) for row in both})


def test_webdataset_on_two_ranks_and_resumes(inputs, folder, checkpoint_folder, tmp_path, monkeypatch):
    """webdataset has no state: a rank goes on with the tars that it has not read."""
    webdataset = pytest.importorskip("webdataset")
    run(inputs, str(tmp_path), str(checkpoint_folder), format="webdataset", shard_size=5)
    tars = sorted(map(str, tmp_path.glob("*.tar")))
    monkeypatch.setenv("WORLD_SIZE", "2")

    def rank(number, names):
        monkeypatch.setenv("RANK", str(number))
        rows = webdataset.WebDataset(names, shardshuffle=False, nodesplitter=webdataset.split_by_node).decode()
        return [tuple(row["codes.npy"].tolist()) for row in DataLoader(rows, batch_size=None)]

    known = sorted(tuple(codes.tolist()) for batch in read(folder) for codes in batch.encoding.codes)
    first, second = rank(0, tars), rank(1, tars)
    assert sorted(first + second) == known and 5 < len(first) < len(known) - 5
    assert first[:5] + rank(0, tars[2:]) == first
