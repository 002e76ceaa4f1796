"""The processor for SGLang, through SGLang's own serialization and with requests as it passes them."""

from types import SimpleNamespace

import pytest
import torch
from support.grammars import EOS

from dyntok import VisualVocab
from dyntok.llm import parse_ids

interface = pytest.importorskip("sglang.srt.sampling.custom_logit_processor")
from dyntok.llm.sglang_plugin import SglangImageGrammar  # noqa: E402

VOCAB = VisualVocab.after(8, size=20, patches=12)


def request(prompt, most):
    return SimpleNamespace(
        origin_input_ids=prompt,
        output_ids=[],
        decode_batch_idx=0,
        to_finish=None,
        eos_token_ids={EOS},
        tokenizer=None,
        sampling_params=SimpleNamespace(max_new_tokens=most, stop_token_ids=None),
    )


def test_requests_write_what_they_asked_for(tmp_path):
    VOCAB.save_pretrained(tmp_path)
    processor = interface.CustomLogitProcessor.from_str(SglangImageGrammar.to_str())
    requests = [request([1], 60), request([4, VOCAB.image_start], 9)]
    asked = [
        {
            "dyntok_max_tokens": 5,
            "dyntok_min_tokens": 5,
            "dyntok_min_images": 1,
            "dyntok_max_images": 1,
            "dyntok_text": False,
        },
        {},
    ]
    for step in range(60):
        params = [own | {"dyntok": str(tmp_path), "__req__": r} for own, r in zip(asked, requests, strict=True)]
        logits = torch.randn(2, VOCAB.vocab_size, generator=torch.Generator().manual_seed(step))
        for row, r in zip(processor(logits, params), requests, strict=True):
            if EOS not in r.output_ids and len(r.output_ids) < r.sampling_params.max_new_tokens:
                r.output_ids.append(int(row.argmax()))
                r.decode_batch_idx += 1
    first, second = (r.origin_input_ids[1:] + [id for id in r.output_ids if id != EOS] for r in requests)
    assert [len(segment.codes) for segment in parse_ids(first, VOCAB)] == [5]
    assert {segment.kind for segment in parse_ids(second, VOCAB)} <= {"text", "image"} and len(second) > 4


def test_what_can_not_work_is_refused(tmp_path, caplog):
    """The request alone ends, with a message for its client; an error would end the server."""
    VOCAB.save_pretrained(tmp_path / "model")
    ahead, wrong = request([1], 5), {"dyntok_max_tokens": 0}
    ahead.decode_batch_idx = 1
    model = {"dyntok": str(tmp_path / "model")}
    for params, asked, message in (
        ({}, request([1], 5), 'has no "dyntok"'),
        ({"dyntok": str(tmp_path)}, request([1], 5), "has no dyntok.json"),
        (model | wrong, request([1], 5), "image 0 must have 1 to 0 tokens"),
        (model, ahead, "start it with --disable-overlap-schedule"),
    ):
        other, logits = request([1], 5), torch.zeros(2, 50)
        SglangImageGrammar()(logits, [params | {"__req__": asked}, model | {"__req__": other}])
        assert message in asked.to_finish.message and asked.to_finish.status_code == 400
        assert other.to_finish is None and logits[0].isfinite().all() and not logits[1].isfinite().all()
    twice = model | {"__req__": request([1], 5)}
    SglangImageGrammar()(torch.zeros(2, 50), [twice, twice])
    assert "speculative decoding" in twice["__req__"].to_finish.message
    assert SglangImageGrammar()(torch.zeros(1, 50), [None]).isfinite().all()
    assert 'goes on without rules: custom_params has no "dyntok"' in caplog.text
