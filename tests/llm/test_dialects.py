"""`ImageGrammar` in the words of other engines: at every step the engine itself allows the same ids."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engines import LLGuidance, Outlines, Spelled, XGrammar
from support.grammars import EOS, LAYOUTS, VOCABS, grammars

from dyntok import ConfigError, VisualVocab
from dyntok.llm import ImageGrammar

PACKAGES = {XGrammar: "xgrammar", Spelled: "xgrammar", LLGuidance: "llguidance", Outlines: "outlines_core"}
LARGE = {
    "map": VisualVocab.after(1000, size=8192, layout="map", grid=(16, 16)),
    "positions": VisualVocab.after(1000, size=8192, patches=256),
    "lattice": VisualVocab.after(1000, size=8192, layout="lattice", grid=(16, 16)),
    "map of any grid": VisualVocab.after(1000, size=8192, layout="map", sides=128),
    "lattice of any grid": VisualVocab.after(1000, size=8192, layout="lattice", sides=128),
}


def walk(grammar, engine, steps, draw):
    """Goes through both, and returns the number of steps before nothing but the end was allowed."""
    pytest.importorskip(PACKAGES[engine])
    other, state = engine(grammar), grammar.start()
    for step in range(steps):
        expected = [id for low, high in grammar.allowed(state) for id in range(low, high)]
        assert other.allowed() == sorted(expected), (step, state)
        choices = [id for id in expected if id != EOS]
        if not choices:
            return step
        begin = grammar.vocab.image_start in choices and draw.random() < 0.5
        id = grammar.vocab.image_start if begin else draw.choice(choices)
        other.step(id)
        state = grammar.step(state, id)
    return steps


@pytest.mark.parametrize("engine", [XGrammar, LLGuidance])
@pytest.mark.parametrize("vocab", VOCABS, ids=LAYOUTS)
@given(st.data())
@settings(deadline=None, max_examples=6)
def test_engines_over_ids_allow_the_same_at_every_step(engine, vocab, data):
    grammar = data.draw(grammars(vocab))
    walk(grammar, engine, 14, data.draw(st.randoms(use_true_random=False)))


@pytest.mark.parametrize("engine", [Spelled, Outlines])
@pytest.mark.parametrize("vocab", VOCABS, ids=LAYOUTS)
@given(st.data())
@settings(deadline=None, max_examples=5)
def test_engines_over_text_allow_the_same_at_every_step(engine, vocab, data):
    grammar = data.draw(grammars(vocab))
    if engine is Outlines and vocab.layout in ("map", "positions"):
        with pytest.raises(ConfigError, match=f"can't hold the layout '{vocab.layout}'; use to_xgrammar"):
            grammar.to_regex()
    else:
        walk(grammar, engine, 14, data.draw(st.randoms(use_true_random=False)))


@pytest.mark.parametrize(
    "engine, layout", [(XGrammar, "map"), (LLGuidance, "map"), (Spelled, "map"), (Outlines, "lattice")]
)
def test_requests_side_by_side(engine, layout):
    """Three requests take turns, each with its own limits."""
    pytest.importorskip(PACKAGES[engine])
    vocab = VisualVocab.after(4, size=2, layout=layout, grid=(3, 2))
    asked = [(6, 6, 1), (2, 2, 3), (4, 1, 2)]
    rules = [ImageGrammar(vocab, most, least, count, count, False, EOS) for most, least, count in asked]
    requests = [[grammar, engine(grammar), grammar.start()] for grammar in rules]
    draw = random.Random(0)
    for _ in range(12):
        for request in requests:
            grammar, other, state = request
            expected = [id for low, high in grammar.allowed(state) for id in range(low, high)]
            assert other.allowed() == sorted(expected)
            if choices := [id for id in expected if id != EOS]:
                id = draw.choice(choices)
                other.step(id)
                request[2] = grammar.step(state, id)


@pytest.mark.parametrize("engine", [pytest.param(XGrammar, marks=pytest.mark.slow), LLGuidance])
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("limits", [{"max_tokens": 60}, {"max_tokens": (64, 5), "min_tokens": (64, 5)}], ids=str)
def test_real_sizes(engine, name, limits):
    grid = (12, 20) if name == "map of any grid" else None
    grammar = ImageGrammar(LARGE[name], **limits, min_images=2, max_images=2, text=False, eos=EOS, grid=grid)
    steps = walk(grammar, engine, 400, random.Random(0))
    assert 10 < steps < 400  # two images, and then the end


def test_every_choice_of_a_whole_grid():
    """Without limits the map needs few rules."""
    grammar = ImageGrammar(LARGE["map"], max_images=1, text=False, min_images=1, eos=EOS)
    assert grammar.to_lark().count("\n") < 80
    walk(grammar, LLGuidance, 300, random.Random(1))


def test_text_can_not_spell_an_image():
    pytest.importorskip("xgrammar")
    vocab = VisualVocab.after(8, size=2)
    words = ["<", "a<", "<|", "|image|>", "|", "a", "<<", ">", *vocab.tokens, "x", "y"]
    grammar = ImageGrammar(vocab, 1, max_images=0)
    engine = XGrammar(grammar, grammar.to_gbnf(), words)
    engine.step(0)
    assert engine.allowed() == [0, 1, 5, 6, 7, 12, 13]  # no |, and no end right after <
    engine.step(5)
    assert engine.allowed() == [0, 1, 2, 3, 4, 5, 6, 7, 12, 13]


@pytest.mark.parametrize("fields", [{}, {"max_tokens": 2000}, {"grid": (128, 128), "max_tokens": 9000}], ids=str)
def test_grammars_that_are_too_large_are_refused(fields):
    with pytest.raises(ConfigError, match="needs more than 40000 rules; give grid="):
        ImageGrammar(LARGE["map of any grid"], **fields).to_lark()


@pytest.mark.parametrize(
    "fields", [{"max_tokens": 9}, {"max_tokens": 9, "min_tokens": 9}, {"grid": (5, 6)}, {"max_tokens": 36}], ids=str
)
def test_the_limit_of_rules_is_exact(fields, monkeypatch):
    """A grammar that has as many rules as it may is written, and not with one more."""
    vocab = VisualVocab.after(8, size=10, layout="map", sides=6)
    size = ImageGrammar(vocab, max_images=1, **fields)._language._size
    monkeypatch.setattr("dyntok.llm.rules.MOST_RULES", size)
    assert len(ImageGrammar(vocab, max_images=1, **fields).to_gbnf().splitlines()) > 10
    monkeypatch.setattr("dyntok.llm.rules.MOST_RULES", size - 1)
    with pytest.raises(ConfigError, match=f"needs more than {size - 1} rules"):
        ImageGrammar(vocab, max_images=1, **fields).to_gbnf()


def test_many_grids_that_are_too_small_do_not_count():
    """One grid of 128 x 128 has as many patches as must be kept."""
    vocab = LARGE["map of any grid"]
    assert "map128by128" in ImageGrammar(vocab, max_tokens=128 * 128, min_tokens=128 * 128).to_lark()


def test_the_forms_are_plain_text():
    """What the pages show."""
    grammar = ImageGrammar(VisualVocab.after(8, size=10), max_tokens=4, max_images=1, text=False, eos=EOS)
    assert grammar.to_lark() == (
        "start : image0?\ncode : <[10-19]>\nimage0 : <[8-8]> codes1to4 <[9-9]>\ncodes1to4 : code{1,4}\n"
    )
    assert grammar.to_regex() == r"(?:(?:<\|image\|>(?:(?:<\|v:[0-9]\|>){1,4})<\|/image\|>))?"
