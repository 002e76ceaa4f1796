"""Losses on numbers small enough to check by hand, and where their gradients go."""

import math

import pytest
import torch

from dyntok.training import losses


def leaf(values):
    return torch.tensor(values, dtype=torch.float32, requires_grad=True)


def test_feature_cosine():
    features = leaf([[[1.0, 0.0], [3.0, 4.0], [1.0, 0.0]]])
    target = leaf([[[5.0, 0.0], [4.0, 3.0], [-2.0, 0.0]]])
    loss = losses.feature_cosine(features, target)
    assert loss.item() == pytest.approx((0 + (1 - 24 / 25) + 2) / 3)
    loss.backward()
    assert features.grad.abs().sum() > 0
    assert target.grad is None  # a backbone in training must not meet its reconstruction half-way


def test_rate_is_of_the_mean():
    gate = leaf([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    loss = losses.rate(gate.mean(), 1 / 3)
    assert loss.item() == pytest.approx((1 / 3 - 1 / 2) ** 2)
    loss.backward()
    # the same everywhere: the loss does not depend on the length of a single image
    assert torch.allclose(gate.grad, torch.full((2, 4), 2 * (1 / 2 - 1 / 3) / 8))
    assert float(losses.rate(torch.tensor(1 / 3), 1 / 3)) == 0


def test_commitment():
    z, rows = leaf([[1.0, 0.0], [0.0, 1.0]]), leaf([[1.0, 0.0], [0.6, 0.8]])
    loss = losses.commitment(z, rows)
    assert loss.item() == pytest.approx((0 + 0.36 + 0.04) / 2)
    loss.backward()
    assert torch.allclose(z.grad, torch.tensor([[0.0, 0.0], [-0.6, 0.2]]))
    assert rows.grad is None


def test_patch_error_in_raster_order():
    target = torch.zeros(1, 3, 4, 6)
    pixels = target.clone()
    pixels[0, 0, 0, 5] = 6.0  # first row of patches, last column
    pixels[0, :, 2:, 0:2] = 2.0  # second row, first column
    error = losses.patch_error(pixels, target, 2)
    assert error.tolist() == [[0, 0, 36 / 3 / 4, 4, 0, 0]]


def test_perceptual_by_hand():
    maps = [torch.tensor([3.0, 4.0]).view(1, 2, 1, 1), torch.tensor([[1.0, 0.0], [0.0, 1.0]]).T.view(1, 2, 1, 2)]
    targets = [torch.tensor([30.0, 40.0]).view(1, 2, 1, 1), torch.tensor([[1.0, 0.0], [0.0, -1.0]]).T.view(1, 2, 1, 2)]
    # the first differ in length alone; of the second, one place agrees and one points the other way
    assert float(losses.perceptual(maps, targets)) == pytest.approx((0 + (0 + 4) / 2) / 2)
    per_patch = losses.perceptual_per_patch(maps, targets, (1, 2))
    assert torch.allclose(per_patch, torch.tensor([[0.0, 2.0]]))
    assert float(per_patch.mean()) == pytest.approx(float(losses.perceptual(maps, targets)))


def test_perceptual_tells_images_apart():
    maps, targets = (
        torch.tensor([[1.0, 0.0], [1.0, 0.0]]).view(2, 2, 1, 1),
        torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).view(2, 2, 1, 1),
    )
    assert losses.perceptual([maps], [targets]).tolist() == [0.0, 4.0]


def test_centered_cosine_by_hand():
    targets = torch.tensor([[5.0, 1.0], [5.0, 3.0]])  # around (5, 2)
    assert losses.centered_cosine(targets, targets).tolist() == pytest.approx([0, 0])
    assert losses.centered_cosine(targets.flip(0), targets).tolist() == pytest.approx([2, 2])
    assert losses.centered_cosine(torch.tensor([[9.0, 2.0], [5.0, 9.0]]), targets).tolist() == pytest.approx([1, 0])


def test_similarities_by_hand():
    targets = torch.tensor([[1.0, 0.0], [0.9, 0.0], [-1.0, 1.0], [-0.9, -1.0]])
    assert float(losses.similarities(targets * 5 + 3, targets)) == pytest.approx(0, abs=1e-3)
    other = targets[[0, 2, 1, 3]]  # pairs that were alike are not, and the other way round
    assert float(losses.similarities(other, targets)) > 1
    wide = torch.cat([targets, -targets], 1)  # the number of components may differ
    assert float(losses.similarities(wide, targets)) == pytest.approx(0, abs=1e-3)


def test_similarities_are_learned_from_three_images_on():
    targets = torch.tensor([[1.0, 0.0, 0.2], [0.0, 1.0, 0.5], [0.0, 0.9, 0.1], [0.3, 0.3, 0.3]])
    vectors = torch.tensor([[0.1, 0.0], [0.0, 0.2], [0.3, 0.1], [0.5, 0.9]], requires_grad=True)
    before = float(losses.similarities(vectors.detach(), targets))
    optimizer = torch.optim.SGD([vectors], 0.1)
    for _ in range(50):
        optimizer.zero_grad()
        losses.similarities(vectors, targets).backward()
        optimizer.step()
    assert float(losses.similarities(vectors.detach(), targets)) < before - 0.2
    for count in (1, 2):
        loss = losses.similarities(vectors[:count], targets[:count])
        (gradient,) = torch.autograd.grad(loss, vectors)
        assert float(loss.detach()) == 1 and not gradient.any()


def test_perceptual_per_patch_knows_where():
    target = [torch.ones(1, 3, 8, 8), torch.ones(1, 3, 2, 2)]
    changed = [x.clone() for x in target]
    changed[0][0, 0, 4:, :4] = -1  # lower left quarter
    per_patch = losses.perceptual_per_patch(changed, target, (4, 4)).view(4, 4)
    assert (per_patch[2:, :2] > 0).all() and per_patch.sum() == per_patch[2:, :2].sum()


def test_perceptual_refuses_lists_of_different_length():
    with pytest.raises(ValueError, match="argument 2"):
        losses.perceptual([torch.ones(1, 2, 1, 1)], [])


def test_perceptual_of_blank_maps_is_finite():
    blank = torch.zeros(1, 4, 2, 2, requires_grad=True)
    loss = losses.perceptual([blank], [torch.rand(1, 4, 2, 2)])
    loss.backward()
    assert loss.isfinite() and blank.grad.isfinite().all()


def test_around_is_the_mean_with_the_neighbours_that_there_are():
    error = torch.arange(12.0)[None]
    around = losses.around(error, (3, 4))
    assert around[0, 5] == torch.tensor([0.0, 1, 2, 4, 5, 6, 8, 9, 10]).mean()
    assert around[0, 0] == torch.tensor([0.0, 1, 4, 5]).mean()
    assert around[0, 7] == torch.tensor([2.0, 3, 6, 7, 10, 11]).mean()


def test_local_wants_scores_that_follow_the_log_of_the_error():
    error = leaf([[1.0, math.e, math.e**2, math.e]])
    score = leaf([[0.5, 1.5, 2.5, 1.5]])
    assert losses.local(score, error, logits_per_nat=1.0).item() == pytest.approx(
        0.0, abs=1e-10
    )  # an offset is the rate's business
    loss = losses.local(score, error, logits_per_nat=2.0)
    assert loss.item() == pytest.approx((1 + 0 + 1 + 0) / 4)
    loss.backward()
    assert score.grad[0, 0] > 0 > score.grad[0, 2] and score.grad[0, 1] == pytest.approx(0.0, abs=1e-7)
    assert error.grad is None
