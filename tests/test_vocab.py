"""VisualVocab: codes to an LLM's ids and back; layouts, widths and refusals."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyntok import layout
from dyntok.encoding import Encoding
from dyntok.errors import CodeError, FingerprintError
from dyntok.layout import counts_to_mask, lattice_positions
from dyntok.llm import parse_ids, parse_text
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
    "dtype", ["uint16", "int32", "uint32", "int64", "uint64", np.dtype("uint16"), np.uint16, torch.int32], ids=str
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


GRIDS = [(1, 1), (2, 2), (3, 5), (4, 6), (7, 9), (16, 16), (13, 64)]


def canonical_encoding(grid, images=6, size=50, fingerprint="abc"):
    """Random images whose masks follow the fixed order in every cell."""
    _, _, capacity = layout._cells(grid)
    codes, positions = [], []
    while len(codes) < images:
        counts = (torch.rand(len(capacity)) * (capacity + 1)).long()
        if places := counts_to_mask(counts, grid).nonzero()[:, 0].tolist():
            positions.append(places)
            codes.append(torch.randint(0, size, (len(places),)).tolist())
    return Encoding.pack(codes, positions, grid, fingerprint)


def lattice_encoding(grid, images=6, size=50, fingerprint="abc"):
    lengths = torch.randint(1, grid[0] * grid[1] + 1, (images,)).tolist()
    codes = [torch.randint(0, size, (length,)).tolist() for length in lengths]
    return Encoding.pack(codes, [lattice_positions(length, grid) for length in lengths], grid, fingerprint)


def free_encoding(grid, images=6, size=50, fingerprint="abc"):
    masks = torch.rand(images, grid[0] * grid[1]) < 0.4
    masks[:, 0] |= ~masks.any(1)
    positions = [mask.nonzero()[:, 0].tolist() for mask in masks]
    codes = [torch.randint(0, size, (len(row),)).tolist() for row in positions]
    return Encoding.pack(codes, positions, grid, fingerprint)


ENCODINGS = {"map": canonical_encoding, "lattice": lattice_encoding, "positions": free_encoding}


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("sides", [0, 64], ids=["one-grid", "any-grid"])
@pytest.mark.parametrize("name", ENCODINGS)
def test_ids_and_text_carry_codes_positions_and_grid(name, sides, grid):
    patches = (sides**2 or grid[0] * grid[1]) if name == "positions" else 0
    vocab = VisualVocab.after(
        100, 50, patches, layout=name, grid=None if sides else grid, sides=sides, fingerprint="abc"
    )
    enc = ENCODINGS[name](grid)
    rows = vocab.to_ids(enc)
    assert vocab.to_encoding(rows) == enc == vocab.to_encoding(vocab.to_ids(enc, wrap=False))
    header = 2 * bool(sides) + {"map": -(-grid[0] // 4) * -(-grid[1] // 4)}.get(name, 0)
    per_code = 2 if name == "positions" else 1
    assert [len(row) for row in rows] == [header + per_code * length + 2 for length in enc.lengths.tolist()]
    for row, codes, positions in zip(rows, enc.codes, enc.positions, strict=True):
        text = vocab.to_text(codes, positions=positions, grid=grid)
        for written, parse in ((row, parse_ids), (text, parse_text)):
            (segment,) = parse(written, vocab)
            assert segment.kind == "image" and segment.grid == grid
            assert (segment.codes, segment.positions) == (tuple(codes.tolist()), tuple(positions.tolist()))
            assert segment.encoding == Encoding.pack([codes], [positions], grid, "abc")
        assert vocab.to_positions(row).tolist() == positions.tolist()


@pytest.mark.parametrize("name", ["map", "lattice", "positions"])
def test_images_of_many_grids_in_one_encoding(name):
    patches = 64**2 if name == "positions" else 0
    vocab = VisualVocab.after(7, 50, patches, layout=name, sides=64, fingerprint="abc")
    enc = Encoding.cat([ENCODINGS[name](grid, images=2) for grid in GRIDS], renumber=False)
    assert vocab.to_encoding(vocab.to_ids(enc)) == enc


def test_the_ids_of_a_map():
    """By hand: a grid of 2 x 6 has two blocks; the first has two cells of four patches, the second one."""
    vocab = VisualVocab.after(100, 10, layout="map", grid=(2, 6))
    assert (vocab.offset, vocab.map.offset, vocab.vocab_size) == (102, 112, 112 + 625)
    # cell 0 keeps 2 (bottom left, top right), cell 1 none, cell 2 one (bottom left)
    ids = vocab.to_ids([7, 8, 9], positions=[1, 6, 10])
    assert ids.tolist() == [100, 112 + 2, 112 + 1, 109, 110, 111, 101]
    assert vocab.to_text([7, 8, 9], positions=[1, 6, 10]) == (
        "<|image|><|m:002|><|m:001|><|v:7|><|v:8|><|v:9|><|/image|>"
    )
    sized = VisualVocab.after(100, 10, layout="map", sides=64)
    assert (sized.rows.offset, sized.columns.offset, sized.map.offset) == (112, 176, 240)
    ids = sized.to_ids([7, 8, 9], positions=[1, 6, 10], grid=(2, 6))
    assert ids.tolist()[:5] == [100, 113, 181, 242, 241]
    assert sized.to_text([7], positions=[6], grid=(2, 6)).startswith("<|image|><|r:02|><|c:06|><|m:001|><|m:000|>")


def test_the_vocabulary_of_a_tokenizer(tokenizer, photos, tmp_path):
    vocab = VisualVocab.of(tokenizer, after=1000)
    assert (vocab.layout, vocab.grid, vocab.size, vocab.image_start) == ("positions", (8, 8), 256, 1000)
    enc = tokenizer.encode(photos[:3])
    assert vocab.to_encoding(vocab.to_ids(enc)) == enc
    assert len(tokenizer.decode(vocab.to_encoding(vocab.to_ids(enc)))) == 3
    for call in (vocab.to_ids, vocab.to_text):
        for extra in ({"positions": [[0]] * 3}, {"grid": (8, 8)}):
            with pytest.raises(CodeError, match="given with an Encoding, which has its own; leave them out"):
                call(enc, **extra)
    vocab.save_pretrained(tmp_path)
    assert VisualVocab.from_pretrained(tmp_path) == vocab
    sized = VisualVocab.of(tokenizer, after=1000, any_grid=True)
    assert sized.to_encoding(sized.to_ids(enc)) == enc
    other = Encoding.pack(enc.codes, enc.positions, enc.grids, "another")
    with pytest.raises(FingerprintError, match="the codes come from another"):
        vocab.to_ids(other)


@pytest.mark.parametrize(
    "placement, places, layout",
    [("grid", "map", "map"), ("grid", "lattice", "lattice"), ("grid", "free", "positions"), ("rank", "free", "none")],
)
def test_the_layout_follows_the_tokenizer(placement, places, layout):
    config = SimpleNamespace(
        selector=SimpleNamespace(places=places),
        decoder=SimpleNamespace(placement=placement),
        codebook=SimpleNamespace(size=10),
    )
    tok = SimpleNamespace(config=config, grid=(3, 5), fingerprint="abc")
    vocab = VisualVocab.of(tok, after=5)
    assert (vocab.layout, vocab.grid, vocab.max_tokens, vocab.fingerprint) == (layout, (3, 5), 15, "abc")
    assert VisualVocab.of(tok, after=5, layout="lattice").layout == "lattice"


def test_lavits_images_have_no_positions():
    vocab = VisualVocab.lavit()
    rows = vocab.to_ids(free_encoding((16, 16), fingerprint=None))
    assert vocab.to_encoding(rows, grid=(16, 16)).packed_positions is None
    with pytest.raises(CodeError, match="does not say the grid of its images; give grid="):
        vocab.to_encoding(rows)


MAP = VisualVocab.after(0, 10, layout="map", grid=(4, 4))  # start 0, end 1, codes from 2, map values from 12


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: MAP.to_ids([1]), "layout is 'map', and positions were not given"),
        (lambda: MAP.to_ids([1], positions=[0]), r"cell 0 \(row 0, column 0\) .* encode with places=\"map\""),
        (lambda: MAP.to_ids([1], positions=[16]), "position 16 at place 0 is out of range, expected 0 to 15"),
        (lambda: MAP.to_ids([1], positions=[4], grid=(2, 8)), r"grid \(2, 8\), expected \(4, 4\)"),
        (lambda: MAP.to_encoding([[0, 2, 1]]), "id 2 at place 0 of the header is not of kind map, expected 12 to 636"),
        (lambda: MAP.to_encoding([[0, 1]]), "0 ids where 1 of kind map begin an image"),
        (lambda: MAP.to_encoding([[0, 12, 1]]), "no codes among these ids"),
        (lambda: MAP.to_encoding([[0, 14, 2, 1]]), "1 code with 2 positions"),
        (lambda: MAP.to_encoding([[0, 13, 2, 3, 1]]), "2 codes with 1 position"),
        (lambda: MAP.to_encoding([0, 13, 2, 1]), "expected one list per image"),
        (lambda: VisualVocab.after(0, 10, layout="map", grid=(2, 2)).to_encoding([[17, 2]]), "block 0 .* map value 5"),
        (
            lambda: VisualVocab.after(0, 10, layout="lattice", grid=(2, 2)).to_ids([1], positions=[0]),
            "the 1 positions are not those of the lattice",
        ),
        (lambda: VisualVocab.after(0, 10, layout="map", sides=4).to_ids([1], positions=[0]), "give grid="),
        (
            lambda: VisualVocab.after(0, 10, layout="lattice", sides=4).to_ids([1], grid=(5, 1)),
            "a grid of 5 x 1 can't be written, expected sides of 1 to 4",
        ),
        (lambda: VisualVocab.after(0, 10, layout="maps"), "layout is 'maps', expected one of map, positions"),
        (lambda: VisualVocab.after(0, 10, layout="map"), "layout 'map' needs grid="),
        (lambda: VisualVocab.after(0, 10, layout="positions"), "layout 'positions' with 0 position tokens"),
        (lambda: VisualVocab.after(0, 10, 3, layout="positions", grid=(2, 2)), "3 position tokens for a grid of 2 x 2"),
        (lambda: VisualVocab.after(0, 10, layout="map", grid=(0, 2)), "grid of the vocabulary is .0, 2."),
        (lambda: VisualVocab.after(0, 10, layout="map", grid=(2, 2), sides=3), "expected one of the two"),
        (lambda: VisualVocab.after(0, 10, 5, sides=3), "5 position tokens and sides up to 3, expected 9"),
    ],
)
def test_what_no_layout_allows_is_refused(call, message):
    with pytest.raises(CodeError, match=message):
        call()


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "does not exist; vocab.save_pretrained"),
        ("[]", "holds list"),
        ("{", "can't read"),
        ('{"size": 3}', "holds ..size.."),
        ('{"size": 3, "offset": 2, "image_start": 0, "image_end": 1, "colour": 4}', "expected a mapping"),
        ('{"size": 0, "offset": 2, "image_start": 0, "image_end": 1}', "size of the vocabulary is 0"),
    ],
)
def test_files_that_hold_no_vocabulary(content, message, tmp_path):
    if content is not None:
        (tmp_path / "dyntok.json").write_text(content)
    with pytest.raises(CodeError, match=message):
        VisualVocab.from_pretrained(tmp_path)
