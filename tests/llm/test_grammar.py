"""ImageGrammar and GrammarMask against a checker that knows every legal image by heart, and against each other."""

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.grammars import EOS, LAYOUTS, VOCABS, grammars

from dyntok import CodeError, ConfigError
from dyntok.layout import mask_to_counts
from dyntok.llm import GrammarMask, ImageGrammar, ImageLogitsProcessor, parse_ids
from dyntok.llm.grammar import UNLIMITED


def legal_masks(vocab, grid, count):
    """Positions that an image of so many codes may have in this layout."""
    if vocab.layout in ("lattice", "none"):
        yield None
        return
    patches = grid[0] * grid[1] if grid else vocab.patches
    for positions in itertools.combinations(range(patches), count):
        mask = torch.zeros(patches, dtype=torch.bool).index_fill(0, torch.tensor(positions), True)
        try:
            yield positions if vocab.layout != "map" or mask_to_counts(mask, grid) is not None else None
        except CodeError:  # not canonical
            continue


@functools.cache
def legal_prefixes(vocab, least, most, only):
    """Every beginning of every legal image, as ids, with the fewest ids that are missing to its end."""
    sides = range(1, vocab.sides + 1)
    grids = [grid for grid in itertools.product(sides, sides) if only in (None, grid)] if vocab.sides else [vocab.grid]
    missing = {}
    for grid in grids:
        for count in range(least, min(most, grid[0] * grid[1] if grid else most) + 1):
            for positions in legal_masks(vocab, grid, count):
                for codes in itertools.product(range(vocab.size), repeat=count):
                    ids = tuple(vocab.to_ids(list(codes), positions=positions, grid=grid).tolist())
                    for i in range(1, len(ids) + 1):
                        missing[ids[:i]] = min(missing.get(ids[:i], len(ids)), len(ids) - i)
    return missing


def is_legal(ids, room, grammar):
    """Whether these ids are legal so far and an open image can be ended with `room` more.

    The end of sequence is not checked.
    """
    vocab, images, i = grammar.vocab, 0, 0
    while i < len(ids):
        if ids[i] == vocab.image_start:
            if images == grammar.max_images:
                return False
            known = legal_prefixes(vocab, *grammar.limits(images), grammar.grid)
            if vocab.image_end not in ids[i:]:
                return known.get(tuple(ids[i:]), UNLIMITED) <= room
            stop = ids.index(vocab.image_end, i) + 1
            if known.get(tuple(ids[i:stop])) != 0:
                return False
            images, i = images + 1, stop
        elif vocab.is_visual(ids[i]) or ids[i] >= grammar.vocab_size or not (grammar.text or ids[i] in grammar.eos):
            return False
        else:
            i += 1
    return True


def legal_next(ids, room, grammar):
    next_ids = [id for id in range(grammar.vocab_size + 2) if is_legal([*ids, id], room - 1, grammar)]
    images = sum(id == grammar.vocab.image_end for id in ids)
    others = [id for id in next_ids if id not in grammar.eos]
    return set(next_ids if images >= grammar.min_images or not others else others)


@pytest.mark.parametrize("vocab", VOCABS, ids=LAYOUTS)
@given(st.data())
@settings(deadline=None, max_examples=40)
def test_every_walk_agrees_with_the_checker(vocab, data):
    grammar = data.draw(grammars(vocab))
    room = data.draw(st.one_of(st.just(UNLIMITED), st.integers(1, 25)))
    random = data.draw(st.randoms(use_true_random=False))
    mask, width = GrammarMask(grammar), grammar.vocab_size + 2
    ids, state, tensors = [], grammar.start(), mask.start(1)
    for left in range(room, max(0, room - 14), -1):
        expected = legal_next(ids, left, grammar)
        ranges = grammar.allowed(state, left)
        assert expected and sorted(i for low, high in ranges for i in range(low, high)) == sorted(expected)
        for tensor_state in (tensors, mask.scan(torch.tensor([ids], dtype=torch.long).view(1, -1))):
            assert set((~mask.forbidden(tensor_state, width, left))[0].nonzero()[:, 0].tolist()) == expected
        ids.append(random.choice(sorted(expected)))
        state, tensors = grammar.step(state, ids[-1]), mask.step(tensors, torch.tensor(ids[-1:]))
    if room <= 14:  # the walk went to its end
        assert {s.kind for s in parse_ids(ids, grammar.vocab)} <= {"text", "image"}


@pytest.mark.parametrize("vocab", VOCABS, ids=LAYOUTS)
@given(st.data(), st.integers(0, 12), st.integers(1, 40))
@settings(deadline=None, max_examples=40)
def test_the_state_after_anything_is_the_same_three_ways(vocab, data, prompt, room):
    ids = st.sampled_from([*range(-2, 15), *(part.offset + part.size * 2 // 3 for part in vocab.ranges)])
    rows = data.draw(st.lists(st.lists(ids, min_size=12, max_size=12), min_size=1, max_size=4))
    grammar = ImageGrammar(vocab, 3)
    mask = GrammarMask(grammar)
    scanned, stepped = mask.scan(torch.tensor(rows), prompt), mask.scan(torch.tensor(rows)[:, :prompt], prompt)
    states = [grammar.start(row[:prompt]) for row in rows]
    for i in range(prompt, 12):
        stepped = mask.step(stepped, torch.tensor([row[i] for row in rows]))
        states = [grammar.step(state, row[i]) for state, row in zip(states, rows, strict=True)]
    assert (
        states
        == list(zip(*(t.tolist() for t in scanned), strict=True))
        == list(zip(*(t.tolist() for t in stepped), strict=True))
    )
    allowed = ~mask.forbidden(scanned, vocab.vocab_size, room)
    for row, state, found in zip(rows, states, allowed, strict=True):  # something is always allowed
        ranges = grammar.allowed(state, room)
        assert ranges, row
        assert found.nonzero()[:, 0].tolist() == sorted(i for low, high in ranges for i in range(low, high))


@given(st.data())
@settings(deadline=None)
def test_each_prompt_may_have_its_grammar(data):
    vocab = data.draw(st.sampled_from(VOCABS))
    several = data.draw(st.lists(grammars(vocab), min_size=1, max_size=3))
    several = [g for g in several if g.vocab_size == several[0].vocab_size]
    rows = torch.tensor(
        data.draw(
            st.lists(
                st.lists(st.integers(0, 12), min_size=5, max_size=5),
                min_size=2 * len(several),
                max_size=2 * len(several),
            )
        )
    )
    mask, width = GrammarMask(several), several[0].vocab_size
    together = mask.forbidden(mask.scan(rows), width, 9)
    for i, row in enumerate(rows):
        alone = GrammarMask(several[i // 2])
        assert torch.equal(together[i], alone.forbidden(alone.scan(row[None]), width, 9)[0])
    rooms = torch.arange(1, len(rows) + 1) * 2  # and its room
    together = mask.forbidden(mask.scan(rows), width, rooms)
    for i, (row, room) in enumerate(zip(rows, rooms.tolist(), strict=True)):
        alone = GrammarMask(several[i // 2])
        assert torch.equal(together[i], alone.forbidden(alone.scan(row[None]), width, room)[0])
    numbers = torch.tensor(
        data.draw(st.lists(st.integers(0, len(several) - 1), min_size=len(rows), max_size=len(rows)))
    )
    together = mask.of_rows(numbers).forbidden(mask.scan(rows), width, rooms)  # in any order
    for i, (row, number, room) in enumerate(zip(rows, numbers.tolist(), rooms.tolist(), strict=True)):
        alone = GrammarMask(several[number])
        assert torch.equal(together[i], alone.forbidden(alone.scan(row[None]), width, room)[0])


def test_budgets_are_per_image():
    vocab = VOCABS[0]
    grammar = ImageGrammar(vocab, max_tokens=(3, 1), min_tokens=(3, 1))
    state, lengths = grammar.start(), []
    for _ in range(3):
        state = grammar.step(state, vocab.image_start)
        while (vocab.image_end, vocab.image_end + 1) not in grammar.allowed(state):
            state = grammar.step(state, vocab.offset)
        lengths.append(state.count)
        assert len(grammar.allowed(state)) == 1
        state = grammar.step(state, vocab.image_end)
    assert lengths == [3, 1, 1]


def test_images_of_the_prompt_do_not_count():
    vocab = VOCABS[0]
    ids = [*vocab.to_ids([0, 1]).tolist(), 0]
    grammar = ImageGrammar(vocab, 2, max_images=1, text=False, eos=EOS)
    assert (vocab.image_start, vocab.image_start + 1) in grammar.allowed(grammar.start(ids))
    scores = torch.zeros(1, vocab.vocab_size)
    assert ImageLogitsProcessor(grammar, prompt_length=5)(torch.tensor([ids]), scores).isfinite()[0].nonzero()[
        :, 0
    ].tolist() == [EOS, 4]
    assert ImageLogitsProcessor(grammar, prompt_length=0)(torch.tensor([ids]), scores).isfinite()[0].nonzero()[
        :, 0
    ].tolist() == [EOS]


def test_what_must_come_can_be_chosen_even_if_another_rule_forbids_it():
    vocab = VOCABS[0]
    processor = ImageLogitsProcessor(ImageGrammar(vocab, 1, text=False, min_images=1, eos=EOS), prompt_length=0)
    nothing = torch.full((1, vocab.vocab_size), -torch.inf)
    for ids, must in (([], vocab.image_start), ([vocab.image_start, vocab.offset], vocab.image_end)):
        scores = processor(torch.tensor([ids], dtype=torch.long).view(1, -1), nothing)
        assert scores[0, must] == 0 and scores.isfinite().sum() == 1
    assert nothing.isinf().all()  # a new tensor


def test_the_room_that_is_left_ends_an_image_in_time():
    vocab = VOCABS[0]
    processor = ImageLogitsProcessor(ImageGrammar(vocab, 50), prompt_length=2, max_new_tokens=4)
    ids = torch.tensor([[0, vocab.image_start]])
    for expected in ([6, 7], [5, 6, 7], [5, 6, 7], [5]):
        assert processor(ids, torch.zeros(1, 8)).isfinite()[0].nonzero()[:, 0].tolist() == expected
        ids = torch.cat([ids, ids.new_tensor([[6]])], 1)
    outside = torch.tensor([[0, 0, 0, 0]])
    assert ImageLogitsProcessor(ImageGrammar(vocab, 50), 2, 4)(outside, torch.zeros(1, 8)).isfinite()[0].nonzero()[
        :, 0
    ].tolist() == [
        0,
        1,
        2,
        3,
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("vocab", VOCABS, ids=LAYOUTS)
def test_a_step_compiles_as_one_graph(vocab):
    """Fullgraph: no value is read back, so nothing waits for the device."""
    torch._dynamo.reset()  # or it counts the compilations of the other layouts
    mask = GrammarMask([ImageGrammar(vocab, 3, eos=EOS), ImageGrammar(vocab, 2, text=False, eos=EOS)])

    def step(scores, state, ids):
        state = mask.step(state, ids)
        return mask.constrain(scores, state), state

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    state = mask.start(4)
    scores = torch.randn(4, vocab.vocab_size)
    for id in (vocab.image_start, *(part.offset for part in vocab.ranges), vocab.image_end, 3):
        ids = torch.full((4,), id)
        for got, expected in zip(compiled(scores, state, ids), step(scores, state, ids), strict=True):
            assert all(map(torch.equal, got, expected)) if isinstance(got, tuple) else torch.equal(got, expected)
        state = mask.step(state, ids)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"max_tokens": 0}, "image 0 must have 1 to 0 tokens"),
        ({"max_tokens": (2, 1), "min_tokens": 2}, "image 1 must have 2 to 1 tokens"),
        ({"max_tokens": ()}, "image 0 must have"),
        ({"max_tokens": 2.0}, "image 0 must have 1 to 2.0 tokens"),
        ({"max_tokens": 4, "vocab": VOCABS[1]}, "<= 3"),
        ({"max_tokens": 6, "vocab": VOCABS[4]}, "<= 5"),
        ({"max_tokens": None}, "max_tokens is needed"),
        ({"vocab": VOCABS[4], "grid": (1, 5)}, "any_grid=True leaves the choice"),
        ({"vocab": VOCABS[6], "grid": (1, 3)}, "grid is .1, 3., expected rows and columns of 1 to 2"),
        ({"vocab": VOCABS[6], "grid": (1, 2)}, "image 0 must have 1 to 3 tokens, .* <= 2"),
        ({"min_images": 2, "max_images": 1}, "2 to 1 images"),
        ({"eos": 5}, "eos is 5, expected ids of text below 8"),
        ({"eos": -1}, "eos is -1"),
        ({"text": False}, "without text, eos= is needed"),
        ({"vocab_size": 7}, "vocab_size is 7, expected an integer of at least 8"),
    ],
    ids=str,
)
def test_impossible_rules_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        ImageGrammar(**({"vocab": VOCABS[0], "max_tokens": 3} | fields))


def test_grammars_and_logits_that_do_not_fit_are_refused():
    grammar = ImageGrammar(VOCABS[0], 3)
    for several in ([], [grammar, ImageGrammar(VOCABS[1], 3)], [grammar, ImageGrammar(VOCABS[0], 3, eos=EOS)]):
        with pytest.raises(ConfigError, match="all with equal vocab, eos"):
            GrammarMask(several)
    mask = GrammarMask([grammar, grammar])
    with pytest.raises(ConfigError, match="2 grammars for 3 rows"):
        mask.forbidden(mask.start(3), 8)
    with pytest.raises(ConfigError, match="logits for 7 ids, but the grammar's vocabulary has 8"):
        mask.forbidden(mask.start(2), 7)
