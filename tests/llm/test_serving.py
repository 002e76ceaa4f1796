"""The image grammar for servers: arguments of requests, and one row of scores at a time."""

import pytest
import torch
from support.grammars import EOS

from dyntok import CodeError, ConfigError, VisualVocab
from dyntok.llm import ImageGrammar, parse_ids
from dyntok.llm.serving import RequestGrammar, Served, find_vocab, request_rules

VOCAB = VisualVocab.after(8, size=20, layout="lattice", grid=(3, 4))
SERVED = Served(VOCAB, (EOS,), 40)
ANY_GRID = VisualVocab.after(8, size=20, layout="map", sides=3)


def written(rules, vocab, seed, steps=60):
    """What a model without any idea writes under these rules, up to the end."""
    generator, ids = torch.Generator().manual_seed(seed), []
    while len(ids) < steps:
        scores = rules.constrain(ids, torch.randn(vocab, generator=generator))
        ids.append(int(scores.softmax(0).multinomial(1, generator=generator)))
        if ids[-1] == EOS:
            break
    return ids


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("vocab", [VOCAB, ANY_GRID], ids=["lattice", "map of any grid"])
def test_requests_write_what_they_asked_for(vocab, seed):
    arguments = {"dyntok_max_tokens": [3, 7], "dyntok_min_tokens": [3, 7], "dyntok_min_images": 2, "other": 1}
    arguments |= {"dyntok_max_images": 2, "dyntok_text": 0}
    served = Served(vocab, (EOS,), vocab.vocab_size)
    ids = written(RequestGrammar(served.grammar(arguments), [1, 5], 100), vocab.vocab_size, seed)
    assert [len(segment.codes) for segment in parse_ids(ids[:-1], vocab)] == [3, 7] and ids[-1] == EOS


@pytest.mark.parametrize("room", range(3, 20))
def test_images_end_in_time(room):
    ids = written(RequestGrammar(SERVED.grammar({"dyntok_text": False}), [], room), 40, room, steps=room)
    assert {segment.kind for segment in parse_ids(ids, VOCAB)} <= {"image", "text"} and len(ids) <= room


def test_a_request_may_begin_again():
    """Servers take a request off the device and start it over with the ids it has, or fewer."""
    grammar, scores = SERVED.grammar({"dyntok_max_tokens": 2}), torch.zeros(40)
    rules, ids = RequestGrammar(grammar, [1], 50), [8, 10, 11, 9, 3, 8, 12]
    for length in (7, 2, 3, 0, 6):
        fresh = RequestGrammar(grammar, [1], 50).constrain(ids[:length], scores)
        assert torch.equal(rules.constrain(ids[:length], scores), fresh)


def test_without_arguments_everything_decodes():
    assert SERVED.grammar(None) == ImageGrammar(VOCAB, eos=EOS, vocab_size=40)
    assert request_rules({"dyntok_grid": [2, 3], "temperature": 1}) == {"grid": (2, 3)}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"dyntok_max_token": 3}, "dyntok_max_token is no argument; expected one of dyntok_max_tokens"),
        ({"dyntok_max_tokens": "3"}, "dyntok_max_tokens is '3', expected an integer"),
        ({"dyntok_max_images": [3]}, "expected an integer"),
        ({"dyntok_text": "no"}, "expected true or false"),
        ({"dyntok_max_tokens": [2] * 1001}, "has 1001 numbers, expected at most 1000"),
        ({"dyntok_min_tokens": 3, "dyntok_max_tokens": 2}, "must have 3 to 2 tokens"),
        ({"dyntok_grid": [2, 129]}, "expected rows and columns of 1 to"),
        ({"dyntok_max_tokens": 13}, "<= 12"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        SERVED.grammar(arguments)


@pytest.mark.parametrize(
    "arguments", [{"dyntok_max_tokens": 0}, {"dyntok_min_images": 2, "dyntok_max_images": 1}, {"dyntok_grid": [0, 9]}]
)
def test_values_that_fit_no_model_are_refused_before_the_model_is_known(arguments):
    with pytest.raises(ConfigError):
        request_rules(arguments)


def test_what_does_not_fit_the_model_ends_no_server(caplog):
    """A server checks a request before it knows the model; in the middle of a batch an error would end everything."""
    arguments = {"dyntok_max_tokens": 13, "dyntok_min_images": 1}
    request_rules(arguments)
    grammar = SERVED.grammar_or_text(arguments)
    assert "limits do not fit the model: image 0 must have 1 to 13 tokens" in caplog.text
    ids = written(RequestGrammar(grammar, [], 100), 40, 0)
    assert {segment.kind for segment in parse_ids(ids, VOCAB)} == {"text"}
    assert SERVED.grammar_or_text({"dyntok_max_tokens": 12}) == SERVED.grammar({"dyntok_max_tokens": 12})


def test_a_vocabulary_without_a_grid_needs_a_limit():
    """LaVIT's, for example: nothing else says how many codes still make a picture."""
    served = Served(VisualVocab.lavit(), (EOS,), 48500)
    assert served.grammar_or_text(None).max_images == 0
    assert served.grammar_or_text({"dyntok_max_tokens": 256}).max_images > 0


def test_another_rule_of_the_server_can_not_break_an_image():
    """Scores of -inf, as servers give them to ids that a request excludes, decide as long as they leave anything."""
    rules, inside = RequestGrammar(SERVED.grammar({}), [], 50), [VOCAB.image_start]
    scores = torch.full((40,), -torch.inf)
    scores[VOCAB.offset + 3] = 0.5
    probabilities = rules.constrain(inside, scores).softmax(0)
    assert probabilities[VOCAB.offset + 3] == 1 and probabilities.sum() == 1
    scores[VOCAB.offset + 3] = -torch.inf
    nothing_left = (rules.constrain(inside, scores) / 0.01).softmax(0)
    allowed = nothing_left.nonzero()[:, 0].tolist()
    assert allowed == list(range(VOCAB.codes.offset, VOCAB.codes.stop)) and torch.allclose(
        nothing_left.sum(), torch.ones(())
    )


def test_the_vocabulary_is_found_beside_the_model(tmp_path):
    assert find_vocab(str(tmp_path)) is None
    VOCAB.save_pretrained(tmp_path)
    assert find_vocab(str(tmp_path)) == VOCAB
    (tmp_path / "dyntok.json").write_text("{}")
    with pytest.raises(CodeError, match="expected a mapping"):
        find_vocab(str(tmp_path))
