"""The merger without parameters: `merger.kind: similar`."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from dyntok.config import MergerConfig
from dyntok.errors import ConfigError
from dyntok.image import to_pixels
from dyntok.policy import KeepPolicy
from dyntok.tokenizer import DynamicVisualTokenizer
from dyntok_kernels import reference


def similar(config):
    return DynamicVisualTokenizer(dataclasses.replace(config, merger=MergerConfig(kind="similar")))


def test_a_merger_without_parameters(small_config, photos, tmp_path):
    tokenizer = similar(small_config)
    assert not list(tokenizer.merger.parameters())
    encoding = tokenizer.encode(photos, budget=20)
    features = tokenizer.features(photos[0], budget=20)
    tokenizer.save_pretrained(tmp_path)
    again = DynamicVisualTokenizer.from_pretrained(tmp_path)
    assert again.config.merger.kind == "similar" and again.encode(photos, budget=20) == encoding
    pixels = to_pixels(photos[0], small_config.image)[None]
    with torch.no_grad():
        patches = tokenizer.backbone(pixels)
        keep = KeepPolicy(budget=20)(tokenizer.selector(patches))
        expected = reference.merge_similar(patches.double(), keep, torch.ones(1, 64).double())[0]
    assert_close(features.tokens.double(), expected, atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match="merger of kind 'similar' has no attention"):
        tokenizer.merger(patches, keep, exact=True)


def test_the_gate_of_a_merger_without_parameters_has_a_gradient(small_config):
    features, keep = torch.randn(2, 64, 48), torch.rand(2, 64) < 0.5
    gate = keep.float().requires_grad_()
    merger = similar(small_config).merger
    assert_close(merger(features, keep, gate), merger(features, keep))
    merger(features, keep, gate).sum().backward()
    assert (gate.grad[keep] != 0).all() and (gate.grad[~keep] == 0).all()
