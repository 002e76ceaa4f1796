"""The fingerprint: what it depends on, and what not."""

import dataclasses
import hashlib
import json
import struct

import pytest
import torch

from dyntok.checkpoint.fingerprint import fingerprint
from dyntok.config import BackboneConfig, CodebookConfig, ImageConfig, TokenizerConfig

CONFIG = TokenizerConfig.preset("tiny")


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "backbone.weight": torch.randn(24, 12, generator=generator),
        "backbone.bias": torch.randn(24, generator=generator),
        "codebook.steps": torch.tensor(17),
        "codebook.used": torch.tensor([True, False, True]),
        "merger.half": torch.randn(5, generator=generator).half(),
        "merger.brain": torch.randn(5, generator=generator).bfloat16(),
        "merger.empty": torch.empty(0, 3),
    }


def test_the_fingerprint_is_pinned():
    """Stored codes refer to it: a change here makes every Parquet file written so far unreadable."""
    state = {
        "merger.b": torch.tensor([[1.5, -2.0]]),
        "merger.a": torch.tensor([3, 4]),
        "merger.c": torch.tensor(True),
        "decoder.d": torch.tensor(1.0),
    }
    config = TokenizerConfig(backbone=BackboneConfig(name="n"))
    digest = hashlib.sha256(b'{"backbone":{"name":"n"}}')
    digest.update(b'\n["merger.a", "int64", [2]]\n' + struct.pack("<2q", 3, 4))
    digest.update(b'\n["merger.b", "float32", [1, 2]]\n' + struct.pack("<2f", 1.5, -2.0))
    digest.update(b'\n["merger.c", "bool", []]\n\x01')
    assert fingerprint(config, state) == digest.hexdigest()[:16]


def test_fingerprint_does_not_depend_on_storage_order_or_chunks(monkeypatch):
    state = weights()
    stated = fingerprint(CONFIG, state)
    assert fingerprint(CONFIG, dict(reversed(state.items()))) == stated
    assert fingerprint(CONFIG, {name: t.float() if t.is_floating_point() else t for name, t in state.items()}) == stated
    assert fingerprint(CONFIG, state | {"backbone.weight": state["backbone.weight"].t().contiguous().t()}) == stated
    assert fingerprint(TokenizerConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))), state) == stated
    monkeypatch.setattr("dyntok.checkpoint.fingerprint._PIECE", 7)
    assert fingerprint(CONFIG, state) == stated


@pytest.mark.parametrize(
    "change",
    [
        {"backbone.bias": weights(1)["backbone.bias"]},
        {"backbone.weight": weights()["backbone.weight"].reshape(12, 24)},
        {"codebook.steps": torch.tensor(18)},
        {"codebook.steps": torch.tensor(17, dtype=torch.int32)},
        {"codebook.used": torch.tensor([True, True, True])},
        {"selector.another": torch.zeros(1)},
    ],
    ids=["value", "shape", "count", "integer type", "bool", "one more"],
)
def test_fingerprint_sees_every_tensor(change):
    assert fingerprint(CONFIG, weights() | change) != fingerprint(CONFIG, weights())


def test_fingerprint_leaves_out_what_only_reads_codes():
    state = weights()
    readers = {
        f"{part}.weight": torch.ones(2) for part in ("decoder", "highres_decoder", "pixel_head", "understanding")
    }
    other = dataclasses.replace(CONFIG, decoder=None)
    assert fingerprint(other, state | readers) == fingerprint(CONFIG, state)


def test_fingerprint_sees_names_and_configuration():
    state = weights()
    stated = fingerprint(CONFIG, state)
    renamed = {name.replace("bias", "shift"): tensor for name, tensor in state.items()}
    assert fingerprint(CONFIG, renamed) != stated
    for other in (
        TokenizerConfig(),
        TokenizerConfig(image=ImageConfig(resize="squash")),
        TokenizerConfig(codebook=CodebookConfig(dim=8)),
    ):
        assert fingerprint(other, state) != stated
