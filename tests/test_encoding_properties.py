"""`Encoding` on random batches: round trips, joins, and untrusted JSON of any content."""

import json
from contextlib import suppress

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyntok.encoding import Encoding
from dyntok.errors import CodeError, ImageError

LIMITED = settings(max_examples=60, deadline=None)
PLAIN = {"codes": [[7, 1], [4]], "positions": [[0, 3], [2]], "grids": [[2, 2], [1, 3]], "fingerprint": "ab"}


@st.composite
def batches(draw):
    grids = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=0, max_size=6))
    positions = [sorted(draw(st.sets(st.integers(0, r * c - 1), min_size=1))) for r, c in grids]
    codes = [draw(st.lists(st.integers(0, 2**40), min_size=len(p), max_size=len(p))) for p in positions]
    failures = draw(st.dictionaries(st.integers(0, 50), st.text(max_size=10), max_size=3))
    source = draw(st.lists(st.integers(0, 50), min_size=len(grids), max_size=len(grids)))
    return Encoding.pack(
        codes,
        draw(st.sampled_from([None, positions])),
        grids,
        draw(st.sampled_from([None, "0123abcd"])),
        [(i, ImageError(m)) for i, m in failures.items()],
        source,
    )


@given(batches())
@LIMITED
def test_json_round_trip_is_lossless(enc):
    back = Encoding.from_dict(json.loads(json.dumps(enc.to_dict(), allow_nan=False)))
    assert back == enc and back.to_dict() == enc.to_dict()
    assert all(isinstance(error, ImageError) for _, error in back.failures)


@given(batches(), st.data())
@LIMITED
def test_rows_taken_apart_and_joined_are_the_same(enc, data):
    if len(enc):
        assert Encoding.cat(iter(enc), renumber=False) == enc
        order = data.draw(st.permutations(range(len(enc))))
        back = enc[order][torch.tensor(order).argsort()]
        assert back == enc and torch.equal(back.source_index, enc.source_index)
    cut = data.draw(st.integers(0, len(enc)))
    assert Encoding.cat([enc[:cut], enc[cut:]]) == enc


@given(batches())
@LIMITED
def test_padded_rows_hold_exactly_the_codes(enc):
    codes, mask = enc.padded(fill=-7)
    assert torch.equal(codes[mask], enc.packed_codes) and torch.equal(mask.sum(1), enc.lengths)
    assert (codes[~mask] == -7).all()


@given(batches())
@LIMITED
def test_keep_masks_give_the_positions_back(enc):
    for one in enc:
        if one.positions is not None:
            assert torch.equal(one.keep_mask()[0].nonzero().flatten(), one.positions[0])


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["codes", "grids", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(JUNK)
@LIMITED
def test_from_dict_never_fails_in_another_way(junk):
    with suppress(CodeError):
        assert len(Encoding.from_dict(junk)) == 0  # by chance it draws an encoding of no images


@given(st.sampled_from(["codes", "positions", "grids", "fingerprint", "failures", "source_index"]), JUNK)
@LIMITED
def test_one_foreign_value_is_refused_or_harmless(key, junk):
    try:
        enc = Encoding.from_dict(PLAIN | {key: junk})
    except CodeError:
        return
    assert enc.to_dict()[key] == junk or junk is None and key == "source_index"
