"""The merger gives the numbers of LaVIT's released code."""

import pytest
import torch
import torch.nn.functional as F

from dyntok.config import MergerConfig
from dyntok.model.merger import Merger

RELEASED_NAMES = {
    "ln_vision.": "context_norm.",
    "norm0.": "self_norm.",
    "norm1.": "cross_norm.",
    "norm2.": "mlp_norm.",
    "token_causal_attn.": "self_",
    "token_cross_attn.": "cross_",
    "mlp.fc1.": "mlp.0.",
    "mlp.fc2.": "mlp.2.",
}


def lavit_merger(parity, file="tokenizer_encoder.bin"):
    state = parity.weights(f"{file}/causal_encoder.", RELEASED_NAMES)
    depth = parity.config["merger_depth"]
    for kind in ("weight", "bias"):
        rows = [state.pop(f"blocks.{i}.cross_{part}.{kind}") for i in range(depth) for part in ("key", "value")]
        state[f"context_kv.{kind}"] = torch.cat(rows)
    merger = Merger(parity.config["dim"], MergerConfig(depth=depth, num_heads=parity.config["heads"]))
    merger.load_state_dict(state)
    return merger


@pytest.mark.parametrize("exact, budget", [(False, 1e-4), (True, 1e-5)], ids=["packed", "exact"])
@pytest.mark.parametrize("masks", ["io", "merger/all_kept", "merger/one_kept", "merger/mixed"])
def test_merger_gives_lavits_numbers(parity, masks, exact, budget):
    merged = lavit_merger(parity)(parity["io/backbone_features"], parity[f"{masks}/keep_mask"], exact=exact)
    assert parity.error(f"{masks}/merged_features", merged) < budget


def test_only_exact_gives_lavits_numbers_for_large_logits(parity):
    merger = lavit_merger(parity)
    with torch.no_grad():
        for block in merger.blocks:
            block.self_qkv.weight[: parity.config["dim"]].mul_(6)
            block.cross_query.weight.mul_(6)
    inputs = parity["io/backbone_features"], parity["io/keep_mask"]
    assert parity.error("merger/peaky/merged_features", merger(*inputs, exact=True)) < 1e-5
    assert parity.error("merger/peaky/merged_features", merger(*inputs)) > 1e-2


@pytest.mark.parametrize("exact, budget", [(False, 1e-4), (True, 1e-5)], ids=["packed", "exact"])
def test_the_understanding_path_gives_lavits_numbers(parity, exact, budget):
    merged = lavit_merger(parity, "visual_weight.bin")(
        parity["io/backbone_features"], parity["io/keep_mask"], exact=exact
    )
    words = F.linear(merged, parity["visual_weight.bin/vit_proj.weight"], parity["visual_weight.bin/vit_proj.bias"])
    assert parity.error("io/continuous_features", words) < budget
