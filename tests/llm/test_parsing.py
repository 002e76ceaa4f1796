"""Codes as text, and generated output taken apart: every round trip, and nothing that makes the parser fail."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyntok import CodeError, Encoding, FingerprintError, VisualVocab
from dyntok.llm import Segment, parse_ids, parse_text

PLAIN = VisualVocab.after(100, size=12)
PLACED = VisualVocab.after(100, size=12, patches=9)
START, END = PLAIN.image_start, PLAIN.image_end

codes = st.lists(st.integers(0, 11), min_size=1, max_size=9)
placed = st.sets(st.integers(0, 8), min_size=1).flatmap(
    lambda places: st.tuples(
        st.lists(st.integers(0, 11), min_size=len(places), max_size=len(places)), st.just(sorted(places))
    )
)
tokens = st.sampled_from(
    [*PLACED.tokens, "<|v:3|>", "<|v:00003|>", "<|v:12|>", "<|p:9|>", "<|v:", "|>", " ", "\n", "text", "<|v:٣|>"]
)


def test_spelling_follows_from_the_number_of_codes():
    assert VisualVocab.lavit().to_text([17, 16383]) == "<|image|><|v:00017|><|v:16383|><|/image|>"
    assert VisualVocab.after(0, 10).to_text([9]) == "<|image|><|v:9|><|/image|>"
    assert VisualVocab.after(0, 11, patches=256).to_text([9, 10], positions=[0, 255]) == (
        "<|image|><|p:000|><|v:09|><|p:255|><|v:10|><|/image|>"
    )


def test_tokens_are_in_the_order_of_their_ids():
    assert list(PLACED.tokens.values()) == list(range(100, 100 + 2 + 12 + 9)) and PLACED.vocab_size == 123
    assert list(PLACED.tokens)[:3] == ["<|image|>", "<|/image|>", "<|v:00|>"] and list(PLACED.tokens)[-1] == "<|p:8|>"
    other = VisualVocab(size=2, offset=10, image_start=50, image_end=3)
    assert other.tokens == {"<|/image|>": 3, "<|v:0|>": 10, "<|v:1|>": 11, "<|image|>": 50}


def test_positions_in_ids():
    ids = PLACED.to_ids([3, 4], positions=[0, 8])
    assert ids.tolist() == [100, 114, 105, 122, 106, 101]
    assert PLACED.to_codes(ids).tolist() == [3, 4] and PLACED.to_positions(ids).tolist() == [0, 8]
    enc = Encoding.pack([[3, 1], [9]], [[0, 5], [2]], (3, 3))
    assert [row.tolist() for row in PLACED.to_ids(enc, wrap=False)] == [[114, 105, 119, 103], [116, 111]]
    assert PLAIN.to_positions(PLAIN.to_ids(enc)[0]) is None


@pytest.mark.parametrize(
    "vocab, positions, message",
    [
        (PLACED, None, "layout is 'positions', and positions were not given; give one for each code"),
        (PLAIN, [0, 1], "layout is 'none', and positions were given; leave them out"),
        (PLACED, [0], "2 codes with 1 position,"),
        (PLACED, [0, 9], "position 9 at place 1 is out of range, expected 0 to 8"),
        (PLACED, [4, 4], "position 4 comes after 4"),
    ],
    ids=str,
)
def test_positions_that_do_not_fit_are_refused(vocab, positions, message):
    for spell in (vocab.to_ids, vocab.to_text):
        with pytest.raises(CodeError, match=message):
            spell([1, 2], positions=positions)


@pytest.mark.parametrize("ids", [[114], [114, 105, 115], [105, 114], [115, 105, 114, 105]], ids=str)
def test_ids_that_are_no_pairs_are_refused(ids):
    with pytest.raises(CodeError):
        PLACED.to_codes(ids)


def test_markers_lie_outside_the_positions():
    with pytest.raises(
        CodeError, match="image_end is 115, expected an id outside 102 to 122, the range of codes and positions"
    ):
        VisualVocab(size=12, offset=102, image_start=100, image_end=115, patches=9)


@given(codes)
@settings(deadline=None)
def test_codes_to_text_to_codes(row):
    assert parse_text(PLAIN.to_text(row), PLAIN) == [Segment("image", 0, len(PLAIN.to_text(row)), tuple(row))]


@given(placed)
@settings(deadline=None)
def test_codes_with_positions_to_text_and_ids_and_back(image):
    row, places = image
    for written, parse in (
        (PLACED.to_text(row, positions=places), parse_text),
        (PLACED.to_ids(row, positions=places), parse_ids),
    ):
        assert parse(written, PLACED) == [Segment("image", 0, len(written), tuple(row), tuple(places))]


@given(st.lists(st.one_of(st.lists(st.integers(0, 99), min_size=1, max_size=4), codes.map(tuple)), max_size=6))
@settings(deadline=None)
def test_documents_of_text_and_images_come_back(pieces):
    ids, expected = [], []
    for piece in pieces:
        new = PLAIN.to_ids(piece).tolist() if isinstance(piece, tuple) else piece
        kind = "image" if isinstance(piece, tuple) else "text"
        if kind == "text" and expected and expected[-1][0] == "text":
            expected[-1] = ("text", expected[-1][1] + new, ())
        else:
            expected.append((kind, new, piece if kind == "image" else ()))
        ids += new
    assert [
        (s.kind, ids[s.start : s.stop], s.codes) for s in parse_ids(torch.tensor(ids, dtype=torch.long), PLAIN)
    ] == expected


@given(
    st.lists(st.one_of(st.integers(98, 126), st.integers(-(2**63), 2**63 - 1)), max_size=40),
    st.sampled_from([PLAIN, PLACED]),
)
@settings(deadline=None, max_examples=300)
def test_any_ids_parse_and_nothing_is_lost(ids, vocab):
    _check(parse_ids(ids, vocab), len(ids), vocab)


@given(st.one_of(st.text(), st.lists(tokens, max_size=30).map("".join)), st.sampled_from([PLAIN, PLACED]))
@settings(deadline=None, max_examples=300)
def test_any_text_parses_and_nothing_is_lost(text, vocab):
    _check(parse_text(text, vocab), len(text), vocab)


def _check(segments, length, vocab):
    """The segments tile the whole, and what is called an image can be written again."""
    assert [s.start for s in segments] == [0, *[s.stop for s in segments]][: len(segments)]
    assert (segments[-1].stop if segments else 0) == length and all(s.start < s.stop for s in segments)
    for i, segment in enumerate(segments):
        assert segment.kind != "truncated" or i == len(segments) - 1
        assert (segment.kind == "image") <= bool(segment.codes)
        if segment.positions is not None:
            assert vocab.to_ids(segment.codes, positions=segment.positions) is not None
        elif segment.codes:
            assert all(0 <= code < vocab.size for code in segment.codes)


@pytest.mark.parametrize(
    "ids, expected",
    [
        ([], []),
        ([1, START, 102, END, 2], [("text", 0, 1, ()), ("image", 1, 4, (0,)), ("text", 4, 5, ())]),
        ([START, 102, 103], [("truncated", 0, 3, (0, 1))]),
        ([START], [("truncated", 0, 1, ())]),
        ([102, END], [("malformed", 0, 2, (0,))]),
        ([START, END], [("malformed", 0, 2, ())]),
        ([START, 102, 5, 103, END], [("malformed", 0, 2, (0,)), ("text", 2, 3, ()), ("malformed", 3, 5, (1,))]),
        ([START, 102, START, 103, END], [("malformed", 0, 2, (0,)), ("image", 2, 5, (1,))]),
        ([START, 102, END, START, 103, END], [("image", 0, 3, (0,)), ("image", 3, 6, (1,))]),
        ([-1, 2**40], [("text", 0, 2, ())]),
    ],
    ids=str,
)
def test_what_the_parser_says(ids, expected):
    assert [(s.kind, s.start, s.stop, s.codes) for s in parse_ids(ids, PLAIN)] == expected
    assert all(s.positions is None for s in parse_ids(ids, PLAIN))


@pytest.mark.parametrize(
    "pairs, positions",
    [
        ([114, 102, 116, 103], (0, 2)),
        ([114, 102, 114, 103], None),
        ([116, 102, 114, 103], None),
        ([114, 102, 103], None),
        ([114, 115, 102], None),
        ([102, 103], None),
    ],
    ids=str,
)
def test_positions_are_given_where_the_layout_is_kept(pairs, positions):
    (segment,) = parse_ids([START, *pairs, END], PLACED)
    assert segment.kind == "image" and segment.positions == positions
    (segment,) = parse_ids([START, 114, 102, 116], PLACED)
    assert (segment.kind, segment.codes, segment.positions) == ("truncated", (0,), (0,))


def test_white_space_between_tokens_belongs_to_the_image():
    text = "a <|image|> <|v:03|>\n<|v:4|> <|/image|> b"
    assert [(s.kind, text[s.start : s.stop], s.codes) for s in parse_text(text, PLAIN)] == [
        ("text", "a ", ()),
        ("image", "<|image|> <|v:03|>\n<|v:4|> <|/image|>", (3, 4)),
        ("text", " b", ()),
    ]


def test_only_integers_are_ids():
    with pytest.raises(CodeError, match="ids: expected"):
        parse_ids([0.5], PLAIN)


def test_a_parsed_image_is_refused_by_another_tokenizer(tokenizer, photos):
    vocab = VisualVocab.of(tokenizer, after=100)
    encoding = tokenizer.encode(photos[0])
    (ids,) = vocab.to_ids(encoding)
    for image in (*parse_ids(ids, vocab), *parse_text(vocab.to_text(encoding)[0], vocab)):
        assert image.encoding == encoding and len(tokenizer.decode(image.encoding)) == 1
    foreign = dataclasses.replace(vocab, fingerprint="0" * 16)
    with pytest.raises(FingerprintError):
        tokenizer.decode(parse_ids(ids, foreign)[0].encoding)
