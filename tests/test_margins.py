"""Which decisions are so close that another machine may decide otherwise."""

import dataclasses

import pytest
import torch

import dyntok
from dyntok.encoding import Encoding
from dyntok.image import to_pixels
from dyntok.margins import close_choices, close_codes, rounding, shares
from dyntok.policy import KeepPolicy

EPS = rounding(torch.float32)


def test_codes_are_close_where_an_error_of_the_vector_could_change_them():
    codebook = torch.eye(4)
    far = torch.tensor([1.0, 0.2, 0.0, 0.0])
    middle = torch.tensor([1.0, 1.0, 0.0, 0.0])
    nearly = middle + torch.tensor([3 * EPS, 0.0, 0.0, 0.0])  # a little beyond
    assert close_codes(torch.stack([far, middle, nearly]), codebook, torch.float32).tolist() == [False, True, False]
    assert close_codes(nearly[None], codebook, torch.bfloat16).tolist() == [True]
    assert close_codes(far[None], codebook[:1], torch.float32).tolist() == [False]
    assert close_codes(torch.zeros(0, 4), codebook, torch.float32).tolist() == []


def log_probs_of(score):
    return torch.log_softmax(torch.stack([score, -score], -1) / 2, -1)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [-1.0, 0.0, 2.0, 3.0]),
        ({"threshold": 0.5}, [-1.0, 0.0, 2.0, 3.0]),
        ({"budget": 2}, [-2.0, -1.0, 1.0, 2.0]),  # changes at 1.0, half way between 0.0 and 2.0
        ({"max_tokens": 1}, [-3.5, -2.5, -0.5, 0.5]),
        ({"threshold": 0.99}, [-3.5, -2.5, -0.5, 0.5]),  # keeps one patch, because an image keeps one at least
    ],
    ids=str,
)
def test_the_distance_of_a_decision_from_its_change(options, expected):
    got = KeepPolicy(**options).distance(log_probs_of(torch.tensor([[-1.0, 0.0, 2.0, 3.0]])))
    torch.testing.assert_close(got, torch.tensor([expected]))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"threshold": 0.7},
        {"budget": 3},
        {"budget": 8},
        {"sample": 5},
        {"max_tokens": 2},
        {"sample": 5, "max_tokens": 2},
    ],
    ids=str,
)
def test_the_sign_of_the_distance_is_the_decision(options):
    log_probs, policy = log_probs_of(torch.randn(5, 8)), KeepPolicy(**options)
    assert torch.equal(policy.distance(log_probs) > 0, policy(log_probs))
    none = log_probs_of(torch.randn(5, 8) - 9)  # above no threshold
    assert torch.equal(policy.distance(none) > 0, policy(none))


@pytest.mark.parametrize(
    "options", [{}, {"threshold": 0.9}, {"sample": 3}, {"max_tokens": 9}, {"sample": 3, "max_tokens": 1}], ids=str
)
def test_a_tie_for_the_only_patch_is_close(options):
    """A black picture scores alike in several places, and rounding decides which of them it keeps."""
    score = torch.full((1, 8), -30.0)
    score[0, [2, 5]] = -20.0
    close = close_choices(KeepPolicy(**options).distance(log_probs_of(score)), torch.float32)
    assert close[0].nonzero().flatten().tolist() == [2, 5]


@pytest.mark.parametrize(
    "options",
    [{}, {"threshold": 0.4}, {"budget": 3}, {"sample": 5}, {"max_tokens": 1}, {"max_tokens": 2},
     {"threshold": 0.4, "max_tokens": 2}, {"sample": 5, "max_tokens": 1}, {"sample": 5, "max_tokens": 2}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("around", [0.0, -9.0])
def test_choices_that_rounding_changes_are_close(options, around):
    """Scores lie on few values here, so that many decisions are at their limits. Errors of 5e-7 change them."""
    policy, grid = KeepPolicy(**options), 0.5
    score = (torch.randn(300, 8, dtype=torch.float64) / grid).round() * grid + around
    score = score + 1e-9 * torch.randn(300, 8, dtype=torch.float64)  # no exact ties
    if "threshold" in options:
        score = score + torch.logit(torch.tensor(options["threshold"], dtype=torch.float64))
    keep = policy(log_probs_of(score))
    changed = torch.zeros(300, dtype=torch.bool)
    for _ in range(8):
        nudged = score + 5e-7 * torch.randn_like(score).clamp(-1, 1)
        changed |= (policy(log_probs_of(nudged)) != keep).any(1)
    close = close_choices(policy.distance(log_probs_of(score)), torch.float32).any(1)
    assert changed.sum() > (10 if "sample" not in options else 0) and not (changed & ~close).any()


def test_shares_per_image():
    choices = close_choices(torch.tensor([[0.0, 1.0, -2.0, 3.0], [1.0, 1.0, 1.0, 1.0]]), torch.float32)
    assert choices.tolist() == [[True, False, False, False], [False] * 4]
    got = shares(torch.tensor([True, False, True]), choices, torch.tensor([0, 2, 3], dtype=torch.int32))
    assert got.tolist() == [[0.5, 0.25], [1.0, 0.0]]


def test_margins_come_on_request_and_follow_their_images(tokenizer, photos):
    plain, enc = (
        tokenizer.encode(photos),
        tokenizer.encode([photos[0], b"bad", *photos[1:]], margins=True, errors="skip"),
    )
    assert plain.margins is None and enc == plain and enc.margins.shape == (len(photos), 2)
    assert enc.margins.min() >= 0 and enc.margins.max() <= 1
    assert torch.equal(enc[[2, 0]].margins, enc.margins[[2, 0]])
    assert torch.equal(Encoding.cat([enc, enc]).margins, torch.cat([enc.margins] * 2))
    assert Encoding.cat([enc, plain]).margins is None
    with pytest.raises(dyntok.CodeError, match=r"margins has shape \[1, 2\]"):
        dataclasses.replace(enc, margins=enc.margins[:1])


def test_equal_codes_are_close(tokenizer, photos):
    """Half of the codebook is a copy of the other half: every code has an equal rival."""
    with torch.no_grad():
        tokenizer.codebook.embedding[128:] = tokenizer.codebook.embedding[:128]
    enc = tokenizer.encode(photos, margins=True)
    assert (enc.margins[:, 0] == 1).all() and (enc.margins[:, 1] < 0.5).all()


@torch.no_grad()
def test_float32_is_as_near_to_float64_as_is_assumed(photos):
    single, double = dyntok.load("tiny"), dyntok.load("tiny", dtype=torch.float64)
    for photo in photos[:4]:
        pixels = to_pixels(photo, single.config.image)[None]
        features = [tokenizer.backbone(pixels.to(tokenizer.dtype)) for tokenizer in (single, double)]
        scores = [t.selector(f, t.grid).diff(dim=-1).double() for t, f in zip((single, double), features, strict=True)]
        assert (scores[0] - scores[1]).abs().max() < EPS * scores[1].abs().max()
        keep = KeepPolicy(budget=80)(double.selector(features[1], double.grid))
        vectors = [t.projection(t.merger(f, keep)) for t, f in zip((single, double), features, strict=True)]
        one, other = (torch.nn.functional.normalize(v.double(), dim=-1) for v in vectors)
        assert EPS / 100 < (one - other).norm(dim=-1).max() < EPS
