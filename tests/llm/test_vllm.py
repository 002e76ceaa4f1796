"""The plug-in for vLLM, called as each of vLLM's two interfaces calls it; engines are in `test_vllm_engine.py`."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.grammars import EOS

import dyntok
from dyntok import ConfigError, VisualVocab
from dyntok.llm import ImageGrammar, parse_ids

VOCAB = VisualVocab.after(8, size=20, layout="map", grid=(3, 4))
SIZE = 700


def test_the_entry_point_names_the_class():
    tomllib = pytest.importorskip("tomllib")
    project = Path(dyntok.__file__).parents[1] / "pyproject.toml"
    if not project.exists():
        pytest.skip("the package was installed without its checkout")
    points = tomllib.loads(project.read_text())["project"]["entry-points"]["vllm.logits_processors"]
    assert points == {"dyntok": "dyntok.llm.vllm_plugin:VllmImageGrammar"}


@pytest.fixture
def plugin():
    pytest.importorskip("vllm")
    from dyntok.llm import vllm_plugin

    return vllm_plugin


@pytest.fixture
def config(tmp_path):
    VOCAB.save_pretrained(tmp_path)
    model = SimpleNamespace(
        model=str(tmp_path),
        revision=None,
        max_model_len=64,
        hf_config=SimpleNamespace(eos_token_id=EOS),
        try_get_generation_config=dict,
        get_vocab_size=lambda: SIZE,
        logits_processors=None,
    )
    scheduler = SimpleNamespace(async_scheduling=False)
    return SimpleNamespace(model_config=model, scheduler_config=scheduler, speculative_config=None)


def params(**arguments):
    return SimpleNamespace(extra_args={f"dyntok_{name}": value for name, value in arguments.items()}, max_tokens=40)


STATES = SimpleNamespace(device=torch.device("cpu"), max_num_reqs=6)
ASKED = [dict(max_tokens=5, min_tokens=5, max_images=1, text=0), dict(min_images=1, max_tokens=3), {}]
PROMPTS = [[1, 3], [4], [5, VOCAB.image_start]]


def rows(step):
    return torch.randn(len(PROMPTS), SIZE, generator=torch.Generator().manual_seed(step))


def expected(asked, prompt, written):
    grammar = ImageGrammar(VOCAB, **{"eos": EOS, "vocab_size": SIZE, **asked, "text": asked.get("text", 1) != 0})
    state = grammar.start(prompt)
    for id in written:
        state = grammar.step(state, id)
    allowed = grammar.allowed(state, 40 - len(written))
    return [id for low, high in allowed for id in range(low, high)]


def walk(apply):
    """Both interfaces allow exactly what the grammar of each request allows."""
    written = [[] for _ in PROMPTS]
    for step in range(40):
        scores = apply(written, rows(step))
        for row, (asked, prompt, ids) in enumerate(zip(ASKED, PROMPTS, written, strict=True)):
            allowed = expected(asked, prompt, ids)
            assert scores[row].isfinite().nonzero()[:, 0].tolist() == sorted(allowed), (step, row)
            ids.append(int(scores[row].argmax()))
    return written


def test_rows_on_the_host(plugin, config):
    from vllm.v1.sample.logits_processor import BatchUpdate

    processor = plugin.VllmImageGrammar(config, torch.device("cpu"), False)
    lists = [[] for _ in PROMPTS]
    added = [(row, params(**ASKED[row]), PROMPTS[row], lists[row]) for row in range(len(PROMPTS))]
    processor.update_state(BatchUpdate(batch_size=3, removed=[], added=added, moved=[]))

    def apply(written, scores):
        for known, ids in zip(lists, written, strict=True):
            known[:] = ids
        return processor.apply(scores)

    written = walk(apply)
    assert [len(s.codes) for s in parse_ids(written[0], VOCAB) if s.kind == "image"] == [5]
    lists[1][-1:] = [-1]
    with pytest.raises(ConfigError, match="--no-async-scheduling"):
        processor.apply(rows(0))


def test_batches_on_the_device(plugin, config):
    interface = pytest.importorskip("vllm.v1.worker.gpu.sample.logits_processor.interface")
    slots = [4, 0, 2]  # requests are in any order
    tokens, lengths = torch.zeros(6, 64, dtype=torch.int32), torch.zeros(6, dtype=torch.int32)
    for slot, prompt in zip(slots, PROMPTS, strict=True):
        lengths[slot] = len(prompt)
    buffer = SimpleNamespace
    state = interface.LogitsProcRequestState(
        torch.device("cpu"), 6, SIZE, buffer(gpu=tokens), buffer(gpu=lengths), buffer(gpu=lengths), buffer(gpu=lengths)
    )
    processor = plugin.VllmImageGrammar(config, state)
    for slot, asked in zip(slots, ASKED, strict=True):
        assert processor.add_request(slot, params(**asked))

    def apply(written, scores):
        known = [prompt + ids for prompt, ids in zip(PROMPTS, written, strict=True)]
        for slot, ids in zip(slots, known, strict=True):
            tokens[slot, : len(ids) - 1] = torch.tensor(ids[:-1])  # the newest is in input_ids alone
        context = interface.LogitsContext(
            torch.tensor(slots),
            torch.tensor(slots),
            np.array(slots),
            torch.zeros(3),
            torch.tensor([ids[-1] for ids in known]),
            torch.tensor([len(ids) - 1 for ids in known]),
            np.array([len(ids) for ids in known]),
        )
        return processor.apply(scores, context)

    walk(apply)


def test_other_models_are_left_alone(plugin, config, tmp_path):
    (tmp_path / "dyntok.json").unlink()
    processor = plugin.VllmImageGrammar(config, torch.device("cpu"), False)
    assert processor.new_req_logits_processor(params()) is None
    assert not plugin.VllmImageGrammar(config, STATES).add_request(0, params())


def test_what_can_not_work_is_refused(plugin, config):
    config.speculative_config = object()
    with pytest.raises(ConfigError, match="speculative decoding"):
        plugin.VllmImageGrammar(config, STATES)
    with pytest.raises(ConfigError, match="dyntok_tokens is no argument"):
        plugin.VllmImageGrammar.validate_params(params(tokens=3))
    with pytest.raises(ConfigError, match="image 0 must have 1 to 0 tokens"):
        plugin.VllmImageGrammar.validate_params(params(max_tokens=0))


def test_ids_that_come_late_are_refused_at_the_start(plugin, config):
    """Where vLLM runs ahead, it passes every id in time to the processors that are named, not to those it finds."""
    config.scheduler_config.async_scheduling = True
    with pytest.raises(ConfigError, match="--no-async-scheduling"):
        plugin.VllmImageGrammar(config, torch.device("cpu"), False)
    config.model_config.logits_processors = ["dyntok.llm.vllm_plugin:VllmImageGrammar"]
    assert plugin.VllmImageGrammar(config, torch.device("cpu"), False).served is not None


def test_a_model_without_rows_for_pictures_is_refused(plugin, config):
    config.model_config.get_vocab_size = lambda: 30
    with pytest.raises(ConfigError, match="has 30 ids, but its dyntok.json goes up to 655; .*extend_model"):
        plugin.VllmImageGrammar(config, torch.device("cpu"), False)


def test_what_ends_a_text_comes_from_both_of_the_models_files(plugin, config):
    config.model_config.hf_config.eos_token_id = [EOS, 5]
    config.model_config.try_get_generation_config = lambda: {"eos_token_id": 6}
    grammar = plugin.VllmImageGrammar(config, torch.device("cpu"), False).served.grammar({})
    assert grammar.eos == (EOS, 5, 6)


def test_vllm_takes_the_class_for_both(plugin):
    from vllm.v1.sample.logits_processor import LogitsProcessor

    assert issubclass(plugin.VllmImageGrammar, LogitsProcessor)
    interface = pytest.importorskip("vllm.v1.worker.gpu.sample.logits_processor.interface")
    assert issubclass(plugin.VllmImageGrammar, interface.LogitsProcessor)
