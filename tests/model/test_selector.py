"""Scores and keep policies: what is kept, how often, and that it depends on nothing but the picture and the options."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from dyntok.errors import ConfigError
from dyntok.layout import bayer_pattern
from dyntok.model.selector import DROP, KEEP, Selector, straight_through
from dyntok.policy import KeepPolicy

RELEASED_NAMES = {
    "in_conv.0.": "norm.",
    "in_conv.1.": "in_proj.",
    "out_conv.0.": "hidden1.",
    "out_conv.2.": "hidden2.",
    "out_conv.4.": "head.",
}


def log_probs_of(*rows):
    """Log-probabilities [B, N, 2] of these keep probabilities."""
    keep = torch.tensor(rows, dtype=torch.float64)
    return torch.stack([keep.log(), (1 - keep).log()], dim=-1).float()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def kept(mask):
    return [row.nonzero()[:, 0].tolist() for row in mask]


# The scores.


def test_selector_gives_lavits_numbers(parity):
    selector = Selector(parity.config["dim"])
    selector.load_state_dict(parity.weights("tokenizer_encoder.bin/token_predictor.", RELEASED_NAMES))
    log_probs = selector(parity["io/backbone_features"])
    assert parity.error("io/selector_log_probs", log_probs) < 1e-5
    assert torch.equal(KeepPolicy()(log_probs), parity["io/keep_mask"])


def test_scores_are_log_probabilities_in_float32():
    features = torch.randn(2, 9, 32)
    log_probs = Selector(32)(features)
    assert log_probs.shape == (2, 9, 2) and log_probs.dtype == torch.float32
    assert_close(log_probs.exp().sum(-1), torch.ones(2, 9))


def test_scores_stay_in_float32_under_autocast():
    selector, features = Selector(32), torch.randn(2, 9, 32)
    expected = selector(features)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(selector(features), expected)
        assert torch.equal(selector(features.bfloat16()), selector(features.bfloat16().float()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_computed_in_float32_also_where_weights_are_stored_in_half_precision(dtype):
    selector, features = Selector(32).to(dtype), torch.randn(2, 9, 32).to(dtype)
    log_probs = selector(features)
    assert log_probs.dtype == torch.float32
    assert torch.equal(log_probs, selector.float()(features.float()))
    assert selector.double()(features.double()).dtype == torch.float64


def test_an_untrained_selector_keeps():
    for seed in range(5):
        torch.manual_seed(seed)
        log_probs = Selector(48)(torch.randn(4, 64, 48))
        assert KeepPolicy()(log_probs).float().mean() > 0.99


def test_a_patch_is_judged_in_the_light_of_the_picture():
    selector, features = Selector(32), torch.randn(1, 9, 32)
    other = features.clone()
    other[:, 1:] += 3 * torch.randn(1, 8, 32)
    assert not torch.allclose(selector(features)[:, 0], selector(other)[:, 0])
    order = torch.randperm(9)  # but not in the light of where the others lie
    assert_close(selector(features[:, order]), selector(features)[:, order])


def test_bayer_pattern_by_hand():
    levels = [0, 2, 3, 1]  # of the 2 x 2 matrix; the 8 x 8 one repeats it within itself, 16 levels apart
    pattern = ((bayer_pattern((8, 8)) + 1) * 64 - 1) / 2
    assert sorted(pattern.tolist()) == list(range(64))
    assert pattern.view(8, 8)[::4, ::4].flatten().tolist() == levels
    assert (pattern.view(8, 8)[:2, :2].flatten() // 16).tolist() == levels
    assert bayer_pattern((8, 8)).abs().max() == 63 / 64 and bayer_pattern((8, 8)).sum() == 0
    assert torch.equal(bayer_pattern((5, 19)), bayer_pattern((8, 24)).view(8, 24)[:5, :19].flatten())


@pytest.mark.parametrize("score, share", [(-2.5, 1 / 64), (-1.0, 0.25), (0.0, 0.5), (1.5, 0.875), (2.5, 1.0)])
def test_with_dither_the_score_of_a_smooth_region_sets_its_density(score, share):
    selector = Selector(32, (8, 8), dither=2.0)
    with torch.no_grad():
        selector.head.weight.zero_()
        selector.head.bias.copy_(torch.tensor([score / 2, -score / 2]))
    mask = KeepPolicy()(selector(torch.randn(1, 64, 32)))
    assert mask.float().mean() == share
    if share == 0.25:  # and evenly: in every 2 x 2 patches one
        assert (mask.view(4, 2, 4, 2).sum((1, 3)) == 1).all()


def test_without_dither_positions_have_no_bias():
    assert Selector(32, (8, 8)).position_bias is None
    bias = Selector(32, (8, 8), dither=0.5).position_bias
    assert bias.requires_grad and bias.abs().max() == 0.5 * 63 / 64


def test_the_first_patch_of_every_cell_can_have_a_bonus():
    plain, bonus = (Selector(32, dither=4.0, first=first).bias((6, 8)) for first in (0.0, 1.5))
    best = plain.view(3, 2, 4, 2).amax((1, 3), keepdim=True) == plain.view(3, 2, 4, 2)
    assert torch.equal(bonus, plain + 1.5 * best.flatten())
    odd = Selector(32, dither=4.0, first=1.5).bias((3, 5))
    assert (odd.view(3, 5)[0] - 4 * bayer_pattern((3, 5)).view(3, 5)[0]).tolist() == [0.0] * 5  # they lie in row 1
    assert (odd.view(3, 5)[1] - 4 * bayer_pattern((3, 5)).view(3, 5)[1]).tolist() == [1.5, 0.0, 1.5, 0.0, 1.5]


# The policies.


def test_learned_choice_keeps_what_is_likelier_kept():
    mask = KeepPolicy()(log_probs_of([0.9, 0.1, 0.51, 0.49], [0.2, 0.8, 0.3, 0.7]))
    assert mask.dtype == torch.bool and kept(mask) == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    "budget, count",
    [(1, 1), (5, 5), (10, 10), (1.0, 10), (0.5, 5), (0.34, 3), (0.36, 4), (0.01, 1)],
    ids=lambda v: f"{v!r}",
)
def test_budget_keeps_exactly_so_many_of_the_best(budget, count):
    keep = torch.rand(3, 10, dtype=torch.float64) * 0.2  # none of them by itself likelier kept
    mask = KeepPolicy(budget=budget)(log_probs_of(*keep.tolist()))
    assert mask.sum(1).tolist() == [count] * 3
    for row, scores in zip(mask, keep, strict=True):
        assert sorted(scores[row].tolist()) == sorted(scores.tolist())[-count:]


def test_threshold_keeps_every_patch_at_least_so_likely():
    log_probs = log_probs_of([0.9, 0.39, 0.41, 0.6])
    assert kept(KeepPolicy(threshold=0.4)(log_probs)) == [[0, 2, 3]]
    assert kept(KeepPolicy(threshold=0.0)(log_probs)) == [[0, 1, 2, 3]]
    assert kept(KeepPolicy(threshold=0)(log_probs)) == [[0, 1, 2, 3]]
    assert kept(KeepPolicy(threshold=0.95)(log_probs)) == [[0]]  # none is so likely; the best stays


@pytest.mark.parametrize("policy", [{}, {"threshold": 1.0}, {"sample": 0}, {"max_tokens": 3}], ids=str)
def test_never_without_a_token(policy):
    policy = {name: generator() if name == "sample" else value for name, value in policy.items()}
    log_probs = torch.tensor([-30.0, -1e-13]).expand(4, 6, 2).clone()
    log_probs[2, 4, KEEP] = -29.0
    assert kept(KeepPolicy(**policy)(log_probs)) == [[0], [0], [4], [0]]


def test_impossible_probabilities_still_leave_a_token():
    log_probs = torch.tensor([-math.inf, 0.0]).expand(1, 5, 2)
    for policy in (KeepPolicy(), KeepPolicy(budget=1), KeepPolicy(threshold=0.5), KeepPolicy(sample=generator())):
        assert kept(policy(log_probs)) == [[0]]


def test_equal_scores_are_taken_in_raster_order():
    flat = log_probs_of([0.3] * 100, [0.7] * 100)
    for budget in (1, 7, 50, 99):
        assert kept(KeepPolicy(budget=budget)(flat)) == [list(range(budget))] * 2
    uneven = log_probs_of([0.2, 0.6, 0.2, 0.6, 0.2, 0.6])
    assert kept(KeepPolicy(budget=4)(uneven)) == [[0, 1, 3, 5]]
    assert kept(KeepPolicy(max_tokens=2)(uneven)) == [[1, 3]]


def test_max_tokens_trims_every_policy_by_score():
    log_probs = log_probs_of([0.6, 0.9, 0.2, 0.7, 0.55, 0.8])
    for options in ({}, {"budget": 5}, {"budget": 0.9}, {"threshold": 0.3}):
        assert kept(KeepPolicy(**options, max_tokens=2)(log_probs)) == [[1, 5]]
        assert torch.equal(KeepPolicy(**options, max_tokens=6)(log_probs), KeepPolicy(**options)(log_probs))
        assert torch.equal(KeepPolicy(**options, max_tokens=600)(log_probs), KeepPolicy(**options)(log_probs))


def test_max_tokens_trims_what_was_sampled_not_what_might_have_been():
    log_probs = log_probs_of(*torch.rand(20, 30).tolist())
    sampled = KeepPolicy(sample=generator())(log_probs)
    trimmed = KeepPolicy(sample=generator(), max_tokens=5)(log_probs)
    assert (trimmed.sum(1) == sampled.sum(1).clamp(max=5)).all() and not (trimmed & ~sampled).any()
    for mask, before, scores in zip(trimmed, sampled, log_probs[..., KEEP], strict=True):
        left_out = before & ~mask
        assert not left_out.any() or scores[mask].min() >= scores[left_out].max()


def test_sampling_follows_seed_and_place_alone():
    log_probs = log_probs_of(*torch.rand(6, 40).tolist())
    used = generator(7)
    torch.rand(100, generator=used)  # what was drawn from it before does not count
    together = KeepPolicy(sample=used)(log_probs)
    assert torch.equal(KeepPolicy(sample=used)(log_probs), together)
    assert torch.equal(KeepPolicy(sample=generator(7))(log_probs), together)
    for place in range(6):
        alone = KeepPolicy(sample=generator(7))(log_probs[place : place + 1], [place])
        assert torch.equal(alone[0], together[place])
    order = [4, 1, 5]
    assert torch.equal(KeepPolicy(sample=generator(7))(log_probs[order], order), together[order])
    assert not torch.equal(KeepPolicy(sample=generator(8))(log_probs), together)


def test_equal_pictures_at_different_places_are_sampled_differently():
    masks = KeepPolicy(sample=generator())(log_probs_of(*[[0.5] * 64] * 50))
    assert len(torch.unique(masks, dim=0)) == 50


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1, -1])
def test_any_seed_can_be_sampled_from(seed):
    assert KeepPolicy(sample=generator(seed))(log_probs_of([0.5] * 8)).shape == (1, 8)


def test_sampling_keeps_as_often_as_the_probability_says():
    probabilities = [0.02, 0.1, 0.3, 0.5, 0.8, 0.97]
    draws = 3000
    # one more patch that is always kept, so that the rule "never without a token" does not count
    masks = KeepPolicy(sample=generator(1))(log_probs_of(*[[*probabilities, 0.9999999]] * draws)).double()
    for frequency, p in zip(masks.mean(0).tolist(), probabilities, strict=False):
        assert abs(frequency - p) < 4 * math.sqrt(p * (1 - p) / draws)
    correlation = torch.corrcoef(masks[:, :6].T) - torch.eye(6)  # patches are drawn independently
    assert correlation.abs().max() < 4.5 / math.sqrt(draws)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"budget": 4, "threshold": 0.5}, "budget and threshold were both given"),
        ({"budget": 4, "sample": 0}, "budget and sample were both given"),
        ({"threshold": 0.1, "sample": 0}, "threshold and sample were both given"),
        ({"budget": 0}, "budget is 0, expected at least 1"),
        ({"budget": -3}, "budget is -3"),
        ({"budget": 0.0}, r"budget is 0.0, expected a share in \(0, 1\]"),
        ({"budget": 64.0}, "for a number of tokens give an int"),
        ({"budget": math.nan}, "budget is nan"),
        ({"budget": True}, "budget is True"),
        ({"budget": "half"}, "budget is 'half'"),
        ({"threshold": -0.1}, "threshold is -0.1"),
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"threshold": math.nan}, "threshold is nan"),
        ({"threshold": "0.5"}, "threshold is '0.5'"),
        ({"threshold": True}, "threshold is True"),
        ({"sample": -3}, "sample is -3, expected a seed of 0 or more, or a torch.Generator"),
        ({"sample": True}, "sample is True, expected a seed"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5"),
        ({"max_tokens": True}, "max_tokens is True"),
    ],
    ids=str,
)
def test_contradictory_or_senseless_policies_are_refused(options, message):
    if options.get("sample") == 0:
        options = options | {"sample": generator()}
    with pytest.raises(ConfigError, match=message):
        KeepPolicy(**options)


def test_numbers_of_numpy_are_numbers():
    log_probs = log_probs_of([0.1, 0.6, 0.7, 0.8])
    for options, plain in (
        ({"budget": np.int64(2)}, {"budget": 2}),
        ({"budget": np.float32(0.5)}, {"budget": 0.5}),
        ({"threshold": np.float64(0.65)}, {"threshold": 0.65}),
        ({"max_tokens": np.uint8(2)}, {"max_tokens": 2}),
    ):
        assert torch.equal(KeepPolicy(**options)(log_probs), KeepPolicy(**plain)(log_probs)) and KeepPolicy(
            **options
        ) == KeepPolicy(**plain)
    for name in ("budget", "threshold", "max_tokens"):
        with pytest.raises(ConfigError, match=f"{name} is .*True"):
            KeepPolicy(**{name: np.bool_(True)})


def test_a_budget_beyond_the_patches_is_refused():
    with pytest.raises(ConfigError, match="budget is 11 tokens, but an image has 10 patches"):
        KeepPolicy(budget=11)(log_probs_of([0.5] * 10))


# The choice in training.


def test_the_training_gate_equals_the_mask_exactly():
    log_probs = Selector(32)(torch.randn(50, 64, 32) * 5)
    for temperature in (0.3, 1.0, 3.0):
        mask, gate = straight_through(log_probs, temperature)
        assert torch.equal(gate, mask.float())  # 1 - 1e-7 would count as a dropped patch, a very small one


def test_the_training_gate_has_the_gradient_of_the_relaxed_choice():
    log_probs = log_probs_of(*torch.rand(4, 16).tolist()).requires_grad_()
    torch.manual_seed(3)
    _, gate = straight_through(log_probs, 0.7)
    torch.manual_seed(3)
    relaxed = torch.nn.functional.gumbel_softmax(log_probs, tau=0.7, hard=False)[..., KEEP]
    towards = torch.randn(4, 16)
    got, expected = (torch.autograd.grad(x, log_probs, towards)[0] for x in (gate, relaxed))
    assert_close(got, expected)
    assert (got[..., KEEP] * got[..., DROP] < 0).all()


def test_the_training_choice_keeps_as_often_as_the_probability_says():
    probabilities = torch.tensor([0.05, 0.3, 0.5, 0.9])
    mask, _ = straight_through(log_probs_of(*[probabilities.tolist()] * 3000))
    spread = (probabilities * (1 - probabilities) / 3000).sqrt()
    assert ((mask.float().mean(0) - probabilities).abs() < 4 * spread).all()


def test_sampling_may_drop_the_best_patch_but_never_all():
    scores = torch.tensor([[0.1, 0.0, -0.1, 0.0]])
    log_probs = torch.log_softmax(torch.stack([scores, torch.zeros_like(scores)], dim=-1), dim=-1)
    masks = torch.cat([KeepPolicy(sample=torch.Generator().manual_seed(seed))(log_probs) for seed in range(400)])
    assert masks.any(1).all()
    nothing = 0.5**4  # of draws, which keep the best patch instead
    assert float(masks[:, 0].double().mean()) == pytest.approx(0.525 + nothing, abs=0.07)
    assert float(masks[:, 1].double().mean()) == pytest.approx(0.5, abs=0.07)
