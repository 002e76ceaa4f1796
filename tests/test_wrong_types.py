"""Objects of a wrong type, given to public calls: an error of ours that says what came and what was expected."""

import dataclasses

import numpy as np
import pytest
import torch

import dyntok
from dyntok import batch, llm
from dyntok.errors import CodeError, ConfigError, DyntokError
from dyntok.export import FixedEncoder
from dyntok.image import load_image

VOCAB = dyntok.VisualVocab.after(300, size=256, patches=64)
GRAMMAR = llm.ImageGrammar(VOCAB)
WRONG = {"None": None, "3": 3, "'x'": "x", "[]": [], "[3]": [3], "no folder": "/no/such folder", "bytes": b"x"}


def encode(text):
    return list(text.encode())


def packer(**options):
    given = {"length": 64, "vocab": VOCAB, "encode": encode, "bos": None, "eos": None, "pad": 0}
    return llm.Packer(**(given | options))


CALLS = {  # each with the values that are right there
    "load": (lambda wrong: dyntok.load(wrong), ["None"]),
    "load(device=)": (lambda wrong: dyntok.load("tiny", device=wrong), []),
    "load(dtype=)": (lambda wrong: dyntok.load("tiny", dtype=wrong), []),
    "in_precision": (lambda wrong: dyntok.load("tiny").in_precision(wrong), []),
    "TokenizerConfig(codebook=)": (lambda wrong: dyntok.TokenizerConfig(codebook=wrong), []),
    "load_image(color=)": (lambda wrong: load_image(dyntok.example_image(), color=wrong), []),
    "FixedEncoder(budget=)": (lambda wrong: FixedEncoder(dyntok.load("tiny"), wrong), ["3"]),
    "Encoding.to": (lambda wrong: dyntok.Encoding.pack([[1]], None, (2, 2)).to(wrong), []),
    "VisualVocab.save_pretrained": (VOCAB.save_pretrained, ["'x'", "no folder"]),
    "TokenizerConfig.preset": (dyntok.TokenizerConfig.preset, []),
    "DynamicVisualTokenizer": (dyntok.DynamicVisualTokenizer, []),
    "Encoding.cat": (dyntok.Encoding.cat, []),
    "Encoding.pack(codes)": (lambda wrong: dyntok.Encoding.pack(wrong, None, (2, 2)), ["[]"]),
    "Encoding.pack(positions)": (lambda wrong: dyntok.Encoding.pack([[1]], wrong, (2, 2)), ["None"]),
    "Encoding.pack(failures)": (lambda wrong: dyntok.Encoding.pack([[1]], None, (2, 2), failures=wrong), ["[]"]),
    "Encoding.pack(originals)": (lambda wrong: dyntok.Encoding.pack([[1]], None, (2, 2), originals=wrong), ["None"]),
    "KeepPolicy": (lambda wrong: dyntok.KeepPolicy(budget=wrong), ["None", "3"]),
    "VisualVocab.of": (lambda wrong: dyntok.VisualVocab.of(wrong, 300), []),
    "VisualVocab.from_pretrained": (dyntok.VisualVocab.from_pretrained, []),
    "VisualVocab.to_encoding": (VOCAB.to_encoding, ["[]"]),
    "tokenize(inputs)": (lambda wrong: batch.tokenize(wrong, "out"), []),
    "tokenize(output)": (lambda wrong: batch.tokenize("in", wrong), ["'x'", "no folder"]),
    "tokenize(options=)": (lambda wrong: batch.tokenize("in", "out", options=wrong), ["None", "[]"]),
    "tokenize(engine=)": (lambda wrong: batch.tokenize("in", "out", engine=wrong), ["None", "[]"]),
    "tokenize(storage=)": (lambda wrong: batch.tokenize("in", "out", storage=wrong), ["None", "[]"]),
    "BatchOptions(keep_columns=)": (lambda wrong: batch.BatchOptions(keep_columns=wrong), ["[]"]),
    "EngineOptions(devices=)": (lambda wrong: batch.EngineOptions(devices=wrong), ["[]"]),
    "CodesDataset": (batch.CodesDataset, []),
    "read": (batch.read, []),
    "inspect": (batch.inspect, []),
    "write_memmap(folder)": (lambda wrong: batch.write_memmap(wrong, "ids.bin", VOCAB), []),
    "write_memmap(path)": (lambda wrong: batch.write_memmap("out", wrong, VOCAB), []),
    "write_memmap(vocab)": (lambda wrong: batch.write_memmap("out", "ids.bin", wrong), []),
    "TokenizeColumn": (lambda wrong: batch.TokenizeColumn("tiny")(wrong), []),
    "read_documents": (lambda wrong: list(llm.read_documents(wrong)), []),
    "read_documents(text=)": (lambda wrong: list(llm.read_documents("out", text=wrong)), []),
    "in_drawn_order": (llm.in_drawn_order, []),
    "extend_tokenizer": (lambda wrong: llm.extend_tokenizer(wrong, VOCAB), []),
    "extend_model": (lambda wrong: llm.extend_model(wrong, VOCAB), []),
    "check_packing": (llm.check_packing, []),
    "document_leak": (llm.document_leak, []),
    "fetch_image": (llm.fetch_image, []),
    "fetch_image(timeout=)": (lambda wrong: llm.fetch_image("http://127.0.0.1:9/x", timeout=wrong), []),
    "ImageGrammar": (llm.ImageGrammar, []),
    "ImageGrammar(grid=)": (lambda wrong: llm.ImageGrammar(VOCAB, grid=wrong), ["None"]),
    "ImageGrammar.start": (GRAMMAR.start, ["[]", "[3]"]),
    "GrammarMask": (llm.GrammarMask, []),
    "ImageLogitsProcessor": (lambda wrong: llm.ImageLogitsProcessor(wrong, 1), []),
    "parse_ids": (lambda wrong: llm.parse_ids(wrong, VOCAB), ["[]", "[3]"]),
    "parse_ids(vocab)": (lambda wrong: llm.parse_ids([1], wrong), []),
    "parse_text": (lambda wrong: llm.parse_text(wrong, VOCAB), ["'x'", "no folder"]),
    "parse_text(vocab)": (lambda wrong: llm.parse_text("x", wrong), []),
    "Packer(length)": (lambda wrong: packer(length=wrong), ["3"]),
    "Packer(vocab)": (lambda wrong: packer(vocab=wrong), []),
    "Packer(encode)": (lambda wrong: packer(encode=wrong), []),
    "Packer.pack": (lambda wrong: list(packer().pack(wrong)), ["[]"]),
    "PackedDataset(documents)": (lambda wrong: llm.PackedDataset(wrong, packer), []),
    "PackedDataset(packer)": (lambda wrong: llm.PackedDataset(lambda epoch: [], wrong), []),
    "PackedDataset(rank=)": (lambda wrong: llm.PackedDataset(lambda epoch: [], packer, rank=wrong), []),
    "PackedDataset(epoch=)": (lambda wrong: llm.PackedDataset(lambda epoch: [], packer, epoch=wrong), ["3"]),
    "collate_rows": (llm.collate_rows, []),
    "flatten_rows": (llm.flatten_rows, []),
    "VisualPrefix": (lambda wrong: llm.VisualPrefix(wrong, 8), ["3"]),
    "VisualProcessor": (lambda wrong: llm.VisualProcessor(wrong, dyntok.load("tiny"), VOCAB), []),
    "VisualProcessor(visual)": (lambda wrong: llm.VisualProcessor(None, wrong, VOCAB), []),
    "VisualProcessor.from_pretrained": (llm.VisualProcessor.from_pretrained, []),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_type_is_an_error_of_ours(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "in").mkdir()
    call, right = CALLS[name]
    for label in WRONG.keys() - set(right):
        with pytest.raises(DyntokError) as caught:
            call(WRONG[label])
        assert len(str(caught.value)) > 20, (label, caught.value)


@pytest.mark.parametrize("option", ["rank", "world", "batch_size", "pad_to", "columns", "storage"])
@pytest.mark.parametrize("wrong", ["x", 1.5, [3], True])
def test_options_of_a_dataset(option, wrong, tmp_path):
    with pytest.raises(DyntokError, match=option):
        batch.CodesDataset(tmp_path, **{option: wrong})


def test_whole_numbers_of_numpy_are_numbers():
    assert packer(length=np.int64(64)).length == 64


PHOTO = np.zeros((64, 64, 3), np.uint8)


@pytest.mark.parametrize("wrong", [None, 0, -1, 1.5, "x"])
def test_max_pixels(wrong, tokenizer):
    """With errors="skip", a wrong limit would leave out every picture."""
    for call in (
        lambda: tokenizer.encode(PHOTO, max_pixels=wrong, errors="skip"),
        lambda: tokenizer.features(PHOTO, max_pixels=wrong),
    ):
        with pytest.raises(ConfigError, match="max_pixels is .*, expected an integer of 1 or more"):
            call()


@pytest.mark.parametrize("grid", [16, (16,), "ab", (1, 2, 3), (2.0, 4)], ids=str)
def test_grids_of_ids(grid):
    with pytest.raises(CodeError, match=r"grid is .*, expected \(rows, columns\)"):
        dyntok.VisualVocab.after(100, 16, layout="lattice", sides=8).to_ids([1, 2], positions=[0, 1], grid=grid)


@pytest.mark.parametrize("name", ["bos", "eos", "pad"])
@pytest.mark.parametrize("wrong", ["x", 2.5, -1, True])
def test_ids_of_a_packer(name, wrong):
    with pytest.raises(ConfigError, match=f"{name} is .*, expected an integer of 0 or more"):
        packer(**{name: wrong})
    with pytest.raises(ConfigError, match="pad is None"):
        packer(pad=None)


def test_a_row_of_grids_is_a_grid(tokenizer):
    encoding = tokenizer.encode(PHOTO, budget=9)
    rows = {"positions": [encoding.positions[0]], "grid": encoding.grids[0]}
    assert tokenizer.decode([encoding.codes[0]], **rows)[0].tobytes() == tokenizer.decode(encoding)[0].tobytes()


def test_a_vocabulary_of_a_tokenizer_without_a_decoder(small_config):
    tokenizer = dyntok.DynamicVisualTokenizer(dataclasses.replace(small_config, decoder=None))
    vocab, encoding = dyntok.VisualVocab.of(tokenizer, after=10), tokenizer.encode(PHOTO, budget=9)
    assert vocab.layout == "positions" and vocab.to_encoding(vocab.to_ids(encoding)) == encoding
    with pytest.raises(CodeError, match="it can only encode"):
        tokenizer.decode(encoding)


@pytest.mark.parametrize("name", ["attention_mask", "labels"])
def test_shapes_of_a_prefix(name, tokenizer):
    features, prefix = tokenizer.features(PHOTO, budget=9), llm.VisualPrefix(48, 8)
    with pytest.raises(CodeError, match=f"{name} has shape .*, expected .1, 5., as the text"):
        prefix(features, torch.zeros(1, 5, 8), **{name: torch.ones(1, 4, dtype=torch.long)})
    with pytest.raises(CodeError, match="expected at least one"):
        prefix(tokenizer.features([]), torch.zeros(0, 5, 8))


def test_a_codebook_as_an_array():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    with pytest.raises(ConfigError, match="expected 'mean' or the codebook's vectors"):
        llm.extend_model(transformers.LlamaForCausalLM(config), VOCAB, init=np.zeros((256, 8)))


def test_grids_of_numpy():
    vocab = dyntok.VisualVocab.of(dyntok.load("tiny"), after=10, layout="positions", any_grid=True)
    wanted = vocab.to_ids([1, 2], positions=[0, 1], grid=(4, 8))
    for grid in (np.array([4, 8], np.uint16), (np.int64(4), np.int64(8)), torch.tensor([4, 8])):
        assert torch.equal(vocab.to_ids([1, 2], positions=[0, 1], grid=grid), wanted)
