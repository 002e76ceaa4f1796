"""VisualVocab: codes to an LLM's ids and back; layouts, widths and refusals."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyntok.encoding import Encoding
from dyntok.errors import CodeError
from dyntok.vocab import VisualVocab


def test_lavit_layout():
    vocab = VisualVocab.lavit()
    assert (vocab.image_start, vocab.image_end, vocab.offset, vocab.size) == (32000, 32001, 32002, 16384)
    assert vocab.to_ids([0, 1, 16383]).tolist() == [32000, 32002, 32003, 48385, 32001]
    assert vocab.vocab_size == 48386
    assert VisualVocab.after(32000, 16384) == vocab


@given(st.integers(0, 10**6), st.integers(1, 10**5), st.data())
@settings(deadline=None)
def test_codes_come_back(vocab_size, size, data):
    vocab = VisualVocab.after(vocab_size, size)
    codes = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20))
    wrapped, bare = vocab.to_ids(codes), vocab.to_ids(torch.tensor(codes), wrap=False)
    assert wrapped.dtype == bare.dtype == torch.int64
    assert wrapped[0] == vocab.image_start and wrapped[-1] == vocab.image_end and torch.equal(wrapped[1:-1], bare)
    assert vocab.to_codes(wrapped).tolist() == vocab.to_codes(bare.tolist()).tolist() == codes
    assert wrapped.min() >= vocab_size and wrapped.max() < vocab.vocab_size == vocab_size + size + 2
    assert np.array_equal(wrapped.numpy().astype(vocab.dtype), wrapped.numpy())


def test_an_encoding_gives_ids_image_by_image():
    vocab = VisualVocab(size=10, offset=100, image_start=7, image_end=200)
    enc = Encoding.pack([[3, 1], [9]], None, (2, 2))
    assert [ids.tolist() for ids in vocab.to_ids(enc)] == [[7, 103, 101, 200], [7, 109, 200]]
    assert [ids.tolist() for ids in vocab.to_ids(enc, wrap=False)] == [[103, 101], [109]]


@pytest.mark.parametrize(
    "codes, message",
    [
        ([10], "code 10 at place 0 is out of range, expected 0 to 9"),
        ([1, -1], "code -1 at place 1"),
        ([], "no codes"),
        ([0.5], "expected integers"),
        ([[1, 2]], "expected one dimension"),
        (torch.tensor([True]), "expected integers"),
    ],
    ids=str,
)
def test_bad_codes_are_refused(codes, message):
    with pytest.raises(CodeError, match=message):
        VisualVocab.after(0, 10).to_ids(codes)


@pytest.mark.parametrize(
    "ids, message",
    [
        ([100, 5, 101], "id 5 is not the id of a code, expected 102 to 111"),
        ([102, 112], "id 112"),
        ([102, -1], "id -1"),
        ([100, 102], "start .100. at .0. and end .101. at .."),
        ([102, 101], "at .. and end .101. at .1."),
        ([102, 100, 103, 101], "start first"),
        ([100, 102, 101, 103], "end last"),
        ([100, 102, 101, 100, 103, 101], "one image"),
        ([100, 100, 102, 101], "one image"),
        ([101, 102, 100], "one image"),
        ([100, 101], "no codes"),
        ([100], "one image"),
        ([101], "one image"),
        ([], "no codes"),
        ([102.0], "expected integers"),
    ],
    ids=str,
)
def test_bad_ids_are_refused(ids, message):
    with pytest.raises(CodeError, match=message):
        VisualVocab.after(100, 10).to_codes(ids)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"size": 0}, "size of the vocabulary is 0"),
        ({"size": True}, "size of the vocabulary is True"),
        ({"offset": -1}, "offset"),
        ({"image_start": 1.0}, "image_start"),
        ({"image_start": 109}, "image_start is 109, expected an id outside"),
        ({"image_end": 100}, "image_end is 100, expected an id outside"),
        ({"image_end": 7}, "both 7"),
        ({"image_end": 2**32}, "highest id"),
    ],
    ids=str,
)
def test_impossible_layouts_are_refused(fields, message):
    with pytest.raises(CodeError, match=message):
        VisualVocab(**({"size": 10, "offset": 100, "image_start": 7, "image_end": 8} | fields))


def test_neighbours_of_the_codes_are_allowed():
    vocab = VisualVocab(size=10, offset=100, image_start=99, image_end=110)
    assert vocab.vocab_size == 111 and vocab.to_codes(vocab.to_ids([0, 9])).tolist() == [0, 9]


def test_after_needs_a_count():
    with pytest.raises(CodeError, match="vocab_size is -1"):
        VisualVocab.after(-1, 10)


def test_dtype_is_the_narrowest_that_holds_every_id():
    assert VisualVocab.lavit().dtype == "uint16"
    assert VisualVocab.after(2**16 - 12, 10).dtype == "uint16"
    assert VisualVocab.after(2**16 - 11, 10).dtype == "uint32"
    assert VisualVocab.after(2**32 - 12, 10).dtype == "uint32"


@pytest.mark.parametrize(
    "dtype", ["uint16", "int32", "uint32", "int64", "uint64", np.dtype("uint16"), torch.int32], ids=str
)
def test_wide_enough_dtypes_pass(dtype):
    VisualVocab.lavit().check_dtype(dtype)


@pytest.mark.parametrize(
    "vocab, dtype, message",
    [
        (VisualVocab.lavit(), "int16", "48385 overflow int16 .at most 32767.; store them as uint16"),
        (VisualVocab.lavit(), torch.uint8, "overflow uint8"),
        (VisualVocab.after(2**16 - 11, 10), "uint16", "65536 overflow uint16"),
        (VisualVocab.after(2**31, 10), "int32", "store them as uint32"),
        (VisualVocab.lavit(), "float32", "can't be stored as float32"),
    ],
)
def test_narrow_dtypes_are_refused(vocab, dtype, message):
    with pytest.raises(CodeError, match=message):
        vocab.check_dtype(dtype)
