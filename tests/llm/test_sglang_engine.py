"""Engines of SGLang with a toy Llama, on a GPU or on a CPU."""

import pytest
from support.sglang_engine import answers
from support.toy_llama import GREEDY, LONGEST, WISHES, check, prompt_of, save, written_by_transformers

from dyntok import VisualVocab
from dyntok.llm import ImageGrammar

pytestmark = pytest.mark.slow
NAMES = {"max_tokens": "max_new_tokens", "temperature": "temperature"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"))


def request(number, model, limits, options):
    own = {"dyntok": str(model), **{f"dyntok_{name}": value for name, value in limits.items()}}
    sampling = {"temperature": 1.0, "max_new_tokens": LONGEST, "custom_params": own}
    return [prompt_of(number), sampling | {NAMES[name]: value for name, value in options.items()}]


def test_an_engine_writes_images_that_decode(model, tmp_path, monkeypatch):
    """Side by side, some of them interrupted; requests that do not fit end nothing but themselves."""
    wishes = WISHES * 2
    requests = [request(number % len(WISHES), model, *wish) for number, wish in enumerate(wishes)]
    wrong = [request(0, model, limits, {}) for limits in ({"max_tokens": 0}, {"tokens": 3})]
    monkeypatch.setenv("SGLANG_TEST_RETRACT", "1")
    monkeypatch.setenv("SGLANG_TEST_RETRACT_INTERVAL", "20")
    options = dict(disable_overlap_schedule=True, allow_auto_truncate=True)
    found = answers(model, tmp_path, requests + wrong, **options)
    assert not [answer for answer in found[: len(wishes)] if "error" in answer]
    for answer, (limits, _) in zip(found, wishes, strict=False):
        check(answer["output_ids"], limits, model)
    assert sum(answer["meta_info"]["num_retractions"] for answer in found[: len(wishes)]) > 0
    assert found[GREEDY]["output_ids"] == written_by_transformers(model)
    assert [answer["error"].split(" ", 1)[0] for answer in found[len(wishes) :]] == ["image", "dyntok_tokens"]


@pytest.mark.parametrize("waits", ["0", "1"])
def test_an_engine_that_runs_ahead(model, tmp_path, monkeypatch, waits):
    """It waits for the ids or refuses the request. The exported grammar is SGLang's own business, and always holds."""
    monkeypatch.setenv("SGLANG_ENABLE_DELAY_SAMPLE", waits)
    limits = WISHES[0][0]
    vocab = VisualVocab.from_pretrained(model)
    exact = {**limits, "grid": (16, 16), "text": False}
    exported = ImageGrammar(vocab, eos=vocab.image_start - 1, **exact).to_xgrammar()
    alone = [prompt_of(0), {"max_new_tokens": 90, "ebnf": exported}]
    requests = [request(0, model, *WISHES[0]), alone]
    answer, other = answers(model, tmp_path, requests, allow_auto_truncate=True, grammar_backend="xgrammar")
    check(other["output_ids"], limits, model)
    if waits == "1":
        check(answer["output_ids"], limits, model)
    else:
        assert "start it with --disable-overlap-schedule" in answer["error"]
