"""Encoding: packing, checks, indexing, joining, padding and the JSON form; no tokenizer is involved."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from hypothesis import settings

from dyntok.encoding import Encoding
from dyntok.errors import CodeError, ConfigError, FingerprintError, ImageError
from dyntok.validation import MAX_GRID_SIDE

LIMITED = settings(max_examples=60, deadline=None)


def small(**changes):
    arguments = {
        "codes": [[7, 1], [4], [9, 9, 0]],
        "positions": [[0, 3], [2], [1, 2, 5]],
        "grids": [(2, 2), (1, 3), (2, 3)],
        "fingerprint": "ab",
    }
    return Encoding.pack(**(arguments | changes))


def test_a_batch_is_stored_packed_and_read_per_image():
    enc = small()
    assert len(enc) == 3 and enc.num_tokens == 6
    assert enc.packed_codes.tolist() == [7, 1, 4, 9, 9, 0] and enc.packed_positions.tolist() == [0, 3, 2, 1, 2, 5]
    assert enc.cu_seqlens.tolist() == [0, 2, 3, 6] and enc.cu_seqlens.dtype == torch.int32
    assert enc.lengths.tolist() == [2, 1, 3] and enc.lengths.dtype == torch.int64
    assert [c.tolist() for c in enc.codes] == [[7, 1], [4], [9, 9, 0]]
    assert [p.tolist() for p in enc.positions] == [[0, 3], [2], [1, 2, 5]]
    assert enc.grids.tolist() == [[2, 2], [1, 3], [2, 3]] and enc.source_index.tolist() == [0, 1, 2]
    assert all(c.untyped_storage().data_ptr() == enc.packed_codes.untyped_storage().data_ptr() for c in enc.codes)


def test_the_packed_constructor_gives_the_same_batch():
    packed = Encoding(
        torch.tensor([7, 1, 4, 9, 9, 0]),
        torch.tensor([0, 3, 2, 1, 2, 5]),
        torch.tensor([0, 2, 3, 6], dtype=torch.int32),
        torch.tensor([[2, 2], [1, 3], [2, 3]]),
        "ab",
    )
    assert packed == small() and packed.source_index.tolist() == [0, 1, 2]


def test_pack_takes_tensors_arrays_and_narrow_integers():
    enc = small(
        codes=[torch.tensor([7, 1], dtype=torch.int32), np.array([4], dtype=np.uint16), (9, 9, 0)],
        grids=torch.tensor([[2, 2], [1, 3], [2, 3]]),
    )
    assert enc == small() and enc.packed_codes.dtype == torch.int64


@pytest.mark.parametrize("grid", [(3, 2), [3, 2], torch.tensor([3, 2])], ids=["tuple", "list", "tensor"])
def test_one_grid_may_serve_all_images(grid):
    assert Encoding.pack([[1], [2], [3]], None, grid).grids.tolist() == [[3, 2]] * 3
    assert Encoding.pack([[1], [2]], None, [(3, 2), (1, 1)]).grids.tolist() == [[3, 2], [1, 1]]


def test_source_index_defaults_to_the_inputs_that_did_not_fail():
    enc = small(failures=[(1, ImageError("b.jpg is no image")), (4, ImageError("e.jpg is no image"))])
    assert enc.source_index.tolist() == [0, 2, 3]
    with pytest.raises(CodeError, match="source indices"):
        small(failures=[(9, ImageError("there are no ten inputs"))])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"codes": [[7, 1], [], [9, 9, 0]], "positions": None}, "image 1 has 0 tokens"),
        ({"codes": [[7, 1], [-4], [9, 9, 0]]}, "image 1 has code -4"),
        ({"codes": [[7, 1], [4.0], [9, 9, 0]]}, "image 1: expected integers, got torch.float32"),
        ({"codes": [[7, 1], [True], [9, 9, 0]]}, "image 1: expected integers, got torch.bool"),
        ({"codes": [[7, 1], ["4"], [9, 9, 0]]}, "image 1: expected a list or tensor of integers"),
        ({"codes": [[7, 1], [2**70], [9, 9, 0]]}, "image 1: expected a list or tensor of integers"),
        ({"codes": [[7, 1], 4, [9, 9, 0]]}, "image 1: expected one dimension"),
        ({"codes": [[7, 1], [4]]}, "lengths .2, 1. and positions .2, 1, 3."),
        ({"codes": [[7, 1], [4], [9, 9]]}, "lengths .2, 1, 2. and positions .2, 1, 3."),
        ({"positions": [[0, 3], [2], [1, 5, 2]]}, "image 2 has position 2 after 5"),
        ({"positions": [[0, 3], [2], [1, 2, 2]]}, "image 2 has position 2 after 2"),
        ({"positions": [[0, 4], [2], [1, 2, 5]]}, "image 0 has position 4, expected 0 to 3"),
        ({"positions": [[0, 3], [-1], [1, 2, 5]]}, "image 1 has position -1"),
        ({"positions": None, "grids": [(2, 2), (1, 3), (1, 2)]}, "image 2 has 3 tokens, more than its 2 patches"),
        ({"grids": [(2, 2), (0, 3), (2, 3)]}, "grid of image 1"),
        ({"grids": [(2, 2), (1, 3), (2, MAX_GRID_SIDE + 1)]}, "grid of image 2"),
        ({"grids": [(2, 2), (1, 3)]}, "grids has shape"),
        ({"grids": [(2, 2), (1, 3, 1), (2, 3)]}, "grid of image 1 has 3 numbers"),
        ({"grids": None}, "grids is None"),
        ({"grids": torch.tensor(4)}, "expected .rows, columns."),
        ({"fingerprint": 7}, "fingerprint is int"),
        ({"source_index": [0, 1]}, "3 images have 2 source indices"),
        ({"source_index": [0, -1, 2]}, "source_index of image 1 is -1"),
        ({"failures": [(0, ValueError("not an ImageError"))]}, "failures holds"),
        ({"failures": [(-1, ImageError("x"))]}, "failures holds"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(CodeError, match=message):
        small(**changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"packed_codes": torch.zeros(6, dtype=torch.int32)}, "packed_codes is torch.int32"),
        ({"packed_codes": [1, 2]}, "packed_codes is list"),
        ({"packed_positions": torch.zeros(2, 3, dtype=torch.long)}, "packed_positions is torch.int64 .2, 3."),
        ({"packed_positions": torch.tensor([0, 3])}, "6 codes have 2 positions"),
        ({"packed_positions": torch.zeros(6, dtype=torch.long, device="meta")}, "is on meta"),
        ({"cu_seqlens": torch.tensor([0, 2, 3, 6])}, "cu_seqlens is torch.int64"),
        ({"cu_seqlens": torch.tensor([1, 2, 3, 6], dtype=torch.int32)}, "begin with 0"),
        ({"cu_seqlens": torch.tensor([0, 2, 3, 5], dtype=torch.int32)}, "end with 6"),
        ({"cu_seqlens": torch.tensor([], dtype=torch.int32)}, "begin with 0"),
        ({"cu_seqlens": torch.tensor([0, 4, 3, 6], dtype=torch.int32)}, "image 1 has -1 tokens"),
        ({"grids": torch.ones(3, 2)}, "grids is torch.float32"),
    ],
)
def test_the_packed_constructor_checks_too(changes, message):
    with pytest.raises(CodeError, match=message):
        dataclasses.replace(small(), **changes)


def test_too_many_tokens_for_int32_offsets_are_refused():
    row = torch.zeros(1, dtype=torch.long).expand(2**30)
    with pytest.raises(CodeError, match="too many"):
        Encoding.pack([row, row], None, (4096, 4096))


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        small().fingerprint = "other"
    assert isinstance(small(failures=[]).failures, tuple)


@pytest.mark.parametrize(
    "index, rows",
    [
        (0, [0]),
        (-1, [2]),
        (-3, [0]),
        (np.int64(1), [1]),
        (torch.tensor(1), [1]),
        (slice(1, None), [1, 2]),
        (slice(None, None, -1), [2, 1, 0]),
        (slice(2, 2), []),
        ([2, 0], [2, 0]),
        ([1, 1], [1, 1]),
        ((0, -1), [0, 2]),
        ([], []),
        (torch.tensor([2, 1]), [2, 1]),
        (np.array([2, 1]), [2, 1]),
        ([True, False, True], [0, 2]),
        (torch.tensor([False, True, True]), [1, 2]),
        (torch.zeros(3, dtype=torch.bool), []),
    ],
    ids=str,
)
def test_rows_are_picked_like_from_a_tensor(index, rows):
    enc = small(failures=[(3, ImageError("d.jpg is no image"))])
    picked = enc[index]
    assert [c.tolist() for c in picked.codes] == [enc.codes[r].tolist() for r in rows]
    assert [p.tolist() for p in picked.positions] == [enc.positions[r].tolist() for r in rows]
    assert picked.grids.tolist() == enc.grids[rows].tolist() and picked.source_index.tolist() == rows
    assert picked.fingerprint == "ab" and picked.failures == ()
    dataclasses.replace(picked)  # runs the checks


@pytest.mark.parametrize("index", [3, -4, [0, 3], torch.tensor([5])], ids=str)
def test_a_row_that_is_not_there_is_an_index_error(index):
    with pytest.raises(IndexError, match="3 images"):
        small()[index]


@pytest.mark.parametrize(
    "index", [1.0, "0", [0, True], [True, False], torch.tensor([0.5]), torch.tensor([[0]]), None, True], ids=str
)
def test_what_is_no_index_is_refused(index):
    with pytest.raises(CodeError):
        small()[index]


def test_iteration_gives_single_images_and_ends():
    assert [one.codes[0].tolist() for one in small()] == [[7, 1], [4], [9, 9, 0]]
    assert all(len(one) == 1 for one in small())


def test_cat_counts_sources_as_though_given_at_once():
    first = small(failures=[(1, ImageError("b")), (4, ImageError("e"))])
    second = small(failures=[(0, ImageError("f"))])
    both = Encoding.cat([first, second])
    assert both.source_index.tolist() == [0, 2, 3, 6, 7, 8]
    assert [(i, str(e)) for i, e in both.failures] == [(1, "b"), (4, "e"), (5, "f")]
    assert [c.tolist() for c in both.codes] == [c.tolist() for c in first.codes + second.codes]
    assert Encoding.cat([first[2], first[0]], renumber=False).source_index.tolist() == [3, 0]


def test_cat_accepts_a_batch_in_which_everything_failed():
    nothing = Encoding.pack([], None, (2, 2), "ab", [(0, ImageError("a")), (1, ImageError("b"))])
    both = Encoding.cat([nothing, small()])
    assert both == small() and both.source_index.tolist() == [2, 3, 4]
    assert len(Encoding.cat([nothing])) == 0


@pytest.mark.parametrize("other", [{"fingerprint": "cd"}, {"fingerprint": None}], ids=str)
def test_cat_refuses_codes_of_another_tokenizer(other):
    with pytest.raises(FingerprintError, match="ab"):
        Encoding.cat([small(), small(**other)])


def test_cat_refuses_what_can_not_be_joined():
    with pytest.raises(CodeError, match="1 of 2 encodings have no positions"):
        Encoding.cat([small(), small(positions=None)])
    with pytest.raises(CodeError, match="at least one"):
        Encoding.cat([])
    with pytest.raises(CodeError, match="cpu and meta"):
        Encoding.cat([small(), small().to("meta")])


def test_padded_fills_the_end_of_short_rows():
    codes, mask = small().padded()
    assert codes.tolist() == [[7, 1, -1], [4, -1, -1], [9, 9, 0]] and codes.dtype == torch.int64
    assert mask.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    positions, same = small().padded_positions(fill=0)
    assert positions.tolist() == [[0, 3, 0], [2, 0, 0], [1, 2, 5]] and torch.equal(same, mask)
    with pytest.raises(CodeError, match="have none"):
        small(positions=None).padded_positions()
    assert [t.shape for t in small()[[]].padded()] == [(0, 0), (0, 0)]


def test_keep_mask_marks_the_positions():
    enc = small(grids=(2, 3))
    assert enc.keep_mask().int().tolist() == [[1, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0], [0, 1, 1, 0, 0, 1]]
    assert enc[[]].keep_mask().shape == (0, 0)
    with pytest.raises(CodeError, match="equal grids"):
        small().keep_mask()
    with pytest.raises(CodeError, match="needs positions"):
        small(positions=None).keep_mask()


def test_to_moves_every_tensor():
    enc = small()
    moved = enc.to("meta")
    names = ("packed_codes", "packed_positions", "cu_seqlens", "grids", "source_index")
    assert all(getattr(moved, name).device.type == "meta" for name in names) and moved.fingerprint == "ab"
    assert enc.to("cpu") is enc and small(positions=None).to("meta").positions is None


@pytest.mark.parametrize(
    "changes",
    [
        {"codes": [[7, 1], [4], [9, 9, 1]]},
        {"codes": [[7, 1, 4], [9], [9, 0]], "positions": [[0, 2, 3], [1], [2, 5]]},
        {"positions": [[0, 3], [2], [1, 2, 4]]},
        {"positions": None},
        {"grids": [(2, 2), (3, 1), (2, 3)]},
        {"fingerprint": None},
    ],
    ids=lambda c: " ".join(c),
)
def test_equality_sees_every_difference_that_counts(changes):
    assert small() != small(**changes)


def test_equality_does_not_count_where_it_came_from():
    assert small() == small(failures=[(0, ImageError("a"))], source_index=[4, 5, 6])
    assert small() != "something else"
    with pytest.raises(TypeError):
        hash(small())


def test_copies_and_pickles_are_equal():
    enc = small(failures=[(3, ImageError("d"))])
    assert copy.deepcopy(enc) == enc
    assert pickle.loads(pickle.dumps(enc)) == enc


@pytest.mark.parametrize(
    "enc, text",
    [
        (small(), "Encoding(3 images, 6 tokens (1 to 3 each), 3 different grids, with positions, fingerprint ab)"),
        (small()[1], "Encoding(1 image, 1 token (1 each), grid 1x3, with positions, fingerprint ab)"),
        (
            Encoding.pack([], None, (2, 2), None, [(0, ImageError("a"))]),
            "Encoding(0 images, 0 tokens, no positions, 1 failure)",
        ),
    ],
    ids=["three", "one", "none"],
)
def test_repr_is_short(enc, text):
    assert repr(enc) == text


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"codes": [[7, True], [4], [9, 9, 0]]}, r"codes\[0\]"),
        ({"codes": [[7, 1], [4], [9, 9, 2**64]]}, "image 2"),
        ({"codes": "7 1 4"}, "codes is str"),
        ({"codes": [[7] * 1000 + ["1" * 10_000], [4], [9, 9, 0]]}, "7, 7, ..."),
        ({"failures": ["1" * 10_000]}, "failures holds"),
        ({"positions": [[0, 3.0], [2], [1, 2, 5]]}, r"positions\[0\]"),
        ({"grids": [2, 2]}, r"grids\[0\]"),
        ({"failures": [[0, 5], [True, "a.jpg"]]}, r"failures holds \[0, 5\]"),
        ({"failures": {"0": "a.jpg"}}, "failures holds"),
        ({"source_index": [0, "1", 2]}, "source_index"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_from_dict_names_the_offender(changes, message):
    with pytest.raises(CodeError, match=message) as caught:
        Encoding.from_dict(small().to_dict() | changes)
    assert len(str(caught.value)) < 300


def test_from_dict_needs_only_codes_and_grids():
    enc = Encoding.from_dict({"codes": [[7, 1], [4]], "grids": [[2, 2], [1, 1]]})
    assert enc == Encoding.pack([[7, 1], [4]], None, [(2, 2), (1, 1)])
    with pytest.raises(CodeError, match="codes and grids"):
        Encoding.from_dict({"codes": [[7, 1]]})


@pytest.mark.parametrize("wrong", [torch.bfloat16, torch.int32, None, 1.5], ids=str)
def test_codes_keep_their_dtype(wrong):
    with pytest.raises(ConfigError, match="expected a device such as 'cpu'; codes are always int64"):
        Encoding.pack([[5280, 12247]], None, (2, 2)).to(wrong)
