"""Losses on numbers small enough to check by hand, and where their gradients go."""

import math

import pytest
import torch

from dyntok.training import losses
from dyntok.training.bank import PictureBank


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
    vectors = torch.cat([targets * 5 + 3, 7 - targets], 1)  # neither scale nor number of components matter
    same = losses.similarities(vectors[:2], targets[:2], vectors, targets)
    assert float(same) == pytest.approx(0, abs=1e-3)
    mixed = vectors[[0, 2, 1, 3]]  # who was alike is not, and the other way round
    assert float(losses.similarities(mixed[:2], targets[:2], mixed, targets)) > 0.5


def test_similarities_move_the_batch_alone():
    torch.manual_seed(0)
    tensors = [torch.randn(*shape, requires_grad=True) for shape in ((3, 4), (3, 9), (20, 4), (20, 9))]
    vectors = tensors[0]
    optimizer = torch.optim.SGD([vectors], 1.0)
    found = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = losses.similarities(*tensors)
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    assert found[-1] < found[0] - 0.2
    assert [tensor.grad is None for tensor in tensors] == [False, True, True, True]


def test_similarities_are_computed_in_float32():
    torch.manual_seed(0)
    tensors = [torch.randn(*shape) for shape in ((3, 4), (3, 9), (20, 4), (20, 9))]
    with torch.autocast("cpu", torch.bfloat16):
        loss = losses.similarities(*tensors)
    assert torch.equal(loss, losses.similarities(*tensors))


def test_a_component_that_is_constant_in_the_bank_does_not_outweigh_the_rest():
    torch.manual_seed(0)
    others = torch.randn(200, 12)
    images = torch.randn(4, 12)
    silent, loud = torch.zeros(200, 1), torch.tensor([[0.5], [0.0], [0.0], [0.0]])
    targets, other_targets = torch.cat([images, loud], 1), torch.cat([others, silent], 1)
    assert float(losses.similarities(images, targets, others, other_targets)) < 0.1  # 0.13 without the limit


def test_the_bank_compares_once_it_is_full_and_keeps_the_last_pictures():
    bank = PictureBank(2, 3)
    generator = torch.Generator().manual_seed(0)
    vectors, targets = torch.randn(300, 2, generator=generator), torch.randn(300, 3, generator=generator)
    for start in range(0, 300, 20):
        ours, theirs = vectors[start : start + 20].requires_grad_(), targets[start : start + 20]
        loss = bank.compare(ours, theirs)
        if start < 256:
            assert loss is None
        else:
            assert torch.equal(loss, losses.similarities(ours, theirs, bank.vectors, bank.targets))
        bank.add(ours, theirs)
    kept = torch.cat([vectors[256:], vectors[44:256]])  # number i is in place i modulo 256
    assert torch.equal(bank.vectors, kept) and torch.equal(bank.targets, torch.cat([targets[256:], targets[44:256]]))
    bank.clear()
    assert bank.compare(vectors[:2], targets[:2]) is None


def test_of_a_batch_larger_than_the_bank_the_last_pictures_stay():
    bank, vectors = PictureBank(1, 1), torch.arange(300.0)[:, None]
    bank.add(vectors, vectors)
    assert torch.equal(bank.vectors, vectors[-256:]) and torch.equal(bank.targets, vectors[-256:])


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
