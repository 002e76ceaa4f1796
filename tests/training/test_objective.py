"""The forward pass of training: masks, which losses reach which parts, freezing; and the linear start."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from support.small_run import write_teacher

from dyntok.config import BackboneConfig
from dyntok.errors import CheckpointError, ConfigError
from dyntok.image import to_pixels
from dyntok.model.selector import KEEP
from dyntok.tokenizer import DynamicVisualTokenizer
from dyntok.training.choices import draw_choice, make_mask
from dyntok.training.objective import Objective
from dyntok.training.recipe import Teacher
from dyntok.training.stage import Masks, Stage, Weights
from dyntok.training.teacher import TeacherFeatures, View

NO_RATE = Weights(pixel=1, rate=0)


@pytest.fixture
def pixels(photos, small_config):
    return torch.stack([to_pixels(photo, small_config.image) for photo in photos[:4]])


@pytest.fixture
def make(tokenizer):
    def make(weights=NO_RATE, teacher=None, tokenizer=tokenizer, **options):
        objective = Objective(tokenizer, teacher)
        objective.set_stage(Stage(images=1, weights=weights, **options))
        return objective.train()

    return make


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A small network with random weights from a file."""
    section = write_teacher(tmp_path_factory.mktemp("teacher"))
    return TeacherFeatures(Teacher(**section), (0.5,) * 3, (0.5,) * 3)


def fill(bank):
    """As if it were full of other pictures."""
    bank.added.fill_(len(bank.vectors))
    bank.vectors.normal_()
    bank.targets.normal_()


def draw_mask(objective, log_probs):
    """Draws a mask as a step does, on a square grid: the keep mask, its gate, and whether it ignores the scores."""
    side = int(log_probs.shape[1] ** 0.5)
    choice = draw_choice(objective.stage)
    mask = make_mask(choice, log_probs, (side, side), objective.tokenizer.config.selector.places)
    return mask.keep, mask.gate, choice.measures


def gradients(part):
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in part.parameters()])


# Masks


def log_probs_of(*scores):
    return F.log_softmax(torch.tensor(scores).unsqueeze(-1) * torch.tensor([1.0, 0.0]), dim=-1)


def test_learned_masks_follow_the_probabilities(make):
    objective = make(masks=Masks(learned=1))
    log_probs = log_probs_of([[-30.0] * 32 + [30.0] * 32, [0.0] * 64])[0].requires_grad_()
    keeps = torch.stack([draw_mask(objective, log_probs)[0] for _ in range(200)])
    assert not keeps[:, 0, :32].any() and keeps[:, 0, 32:].all()
    assert 0.45 < keeps[:, 1].float().mean() < 0.55
    keep, gate, _ = draw_mask(objective, log_probs)
    assert torch.equal(gate.detach(), keep.float()) and gate.requires_grad


def test_budget_masks_take_the_best(make):
    objective = make(masks=Masks(learned=0, budget=1), budgets=(0.25, 0.25))
    scores = torch.randn(3, 64)
    keep, gate, _ = draw_mask(objective, F.log_softmax(torch.stack([scores, -scores], dim=-1), dim=-1))
    assert gate is None and torch.equal(keep, scores.argsort(1, descending=True).argsort(1) < 16)


def test_random_masks_ignore_the_scores(make):
    objective = make(masks=Masks(learned=0, random=1), budgets=(0.5, 0.5))
    log_probs = log_probs_of([[30.0] * 32 + [-30.0] * 32] * 2)[0]
    keeps = torch.stack([draw_mask(objective, log_probs)[0] for _ in range(200)])
    assert (keeps.sum(-1) == 32).all()
    assert 0.45 < keeps[..., :32].float().mean() < 0.55
    assert (keeps[:, 0] != keeps[:, 1]).any()


def test_budgets_are_drawn_log_uniformly_from_their_range(make):
    objective = make(masks=Masks(learned=0, budget=1), budgets=(0.25, 1.0))
    counts = torch.tensor([int(draw_mask(objective, torch.randn(1, 64, 2))[0].sum()) for _ in range(300)])
    assert counts.min() >= 16 and counts.max() <= 64
    assert 0.4 < (counts <= 32).float().mean() < 0.6


def test_shares_of_kinds(make):
    objective = make(masks=Masks(learned=1, budget=1, random=2))
    drawn = [draw_mask(objective, torch.zeros(1, 64, 2))[1] is not None for _ in range(400)]
    assert 0.18 < sum(drawn) / 400 < 0.32


@pytest.mark.parametrize(
    "masks", [Masks(1), Masks(0, budget=1), Masks(0, random=1)], ids=["learned", "budget", "random"]
)
def test_no_mask_is_ever_empty(make, masks):
    objective = make(masks=masks, budgets=(0.001, 0.01))
    log_probs = log_probs_of([[-40.0] * 63 + [-39.0], [-40.0] * 64])[0].requires_grad_()
    for _ in range(20):
        keep, gate, _ = draw_mask(objective, log_probs)
        assert (keep.sum(1) == 1).all()
        if gate is not None:
            assert torch.equal(gate.detach(), keep.float())
            assert keep[0, 63]  # the best patch
            (slope,) = torch.autograd.grad(gate[0, 63], log_probs)
            assert slope.isfinite().all()


# Gradients


def test_reconstruction_alone_teaches_the_selector(make, pixels):
    objective = make()
    result = objective(pixels)
    result.loss.backward()
    assert set(result.metrics) == {"pixel", "psnr", "keep", "rate", "loss"}
    assert result.metrics["loss"] == result.metrics["pixel"]
    for part in ("selector", "backbone", "merger", "projection", "decoder", "pixel_head"):
        assert gradients(getattr(objective.tokenizer, part)).norm() > 0, part
    assert gradients(objective.tokenizer.selector.head).norm() > 1e-6


@pytest.mark.parametrize("masks", [Masks(0, budget=1), Masks(0, random=1)], ids=["budget", "random"])
def test_other_masks_do_not_teach_the_selector(make, pixels, masks):
    objective = make(masks=masks)
    objective(pixels).loss.backward()
    assert gradients(objective.tokenizer.selector).norm() == 0
    assert gradients(objective.tokenizer.merger).norm() > 0


def test_rate_is_over_the_batch_and_lengths_may_differ(make, pixels):
    objective = make(Weights(pixel=1e-9, rate=1), rho=0.5)
    # first half of the batch keeps all, second half nothing: right in the mean
    probabilities = torch.tensor([0.9, 0.9, 0.1, 0.1]).log()[:, None].expand(4, 64)
    log_probs = torch.stack([probabilities, (1 - probabilities.exp()).log()], dim=-1)
    objective.tokenizer.selector.forward = lambda features, grid: log_probs
    result = objective(pixels)
    assert result.lengths.tolist() == [64, 64, 1, 1]
    assert result.metrics["keep"] == 0.5 and result.metrics["rate"] == 0


def test_rate_has_the_gradient_of_the_probability(make, pixels):
    objective = make(Weights(pixel=1e-9, rate=1), rho=0.25, masks=Masks(0, random=1))
    logits = torch.zeros(4, 64, 2).index_fill_(2, torch.tensor([KEEP]), 0.1).requires_grad_()  # all are kept
    objective.tokenizer.selector.forward = lambda features, grid: F.log_softmax(logits, dim=-1)
    objective(pixels).loss.backward()
    p = torch.tensor(0.1).sigmoid()
    assert torch.allclose(logits.grad[..., KEEP], (2 * (1 - 0.25) * p * (1 - p) / 256).expand(4, 64), rtol=1e-4)


def test_quantization_passes_gradients_straight_through(make, pixels):
    objective = make(Weights(pixel=1, rate=0, commitment=0), quantize=True)
    result = objective(pixels)
    result.loss.backward()
    assert gradients(objective.tokenizer.projection).norm() > 0
    assert len(result.codes) == len(result.vectors) and int(result.codes.max()) < 256
    rows = objective.tokenizer.codebook.embedding[result.codes]
    expected = (F.normalize(result.vectors, dim=-1) - rows).square().sum(-1).mean()
    assert torch.allclose(result.metrics["commitment"], expected)


def test_psnr_is_of_images_whose_positions_are_known(make, pixels):
    assert make(position_drop=1.0)(pixels).metrics["psnr"].isnan()
    objective = make(masks=Masks(0, budget=1), budgets=(1.0, 1.0))
    painted = {}
    objective.tokenizer.pixel_head.register_forward_hook(lambda module, args, out: painted.update(out=out.detach()))
    got = objective(pixels).metrics["psnr"]
    mse = ((painted["out"] - pixels) / 2).square().mean((1, 2, 3))  # of values 0 to 1: std is 0.5
    assert torch.allclose(got, (-10 * mse.log10()).mean())


def test_scores_learn_only_from_what_random_masks_leave(make, pixels):
    for options, learns in [
        (dict(masks=Masks(0, random=1)), True),
        (dict(masks=Masks(0, budget=1, random=1e-12)), False),
        (dict(masks=Masks(0, random=1), position_drop=1.0), False),  # what is guessed wrong is no error of the mask
    ]:
        objective = make(Weights(pixel=1e-9, rate=0, local=1.0), **options)
        objective.zero_grad()
        result = objective(pixels)
        assert ("local" in result.metrics) == learns
        result.loss.backward()
        assert (gradients(objective.tokenizer.selector).norm() > 1e-4) == learns


def test_teacher_guides_pixels_and_codes_and_stays_as_it_is(make, teacher, pixels):
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    objective = make(Weights(perceptual=1, rate=0), teacher)
    objective(pixels).loss.backward()
    assert gradients(objective.tokenizer.pixel_head).norm() > 0 and gradients(objective.tokenizer.decoder).norm() > 0
    objective = make(Weights(pixel=1e-9, semantic=1, rate=0), teacher)
    first = objective(pixels)
    assert "semantic" not in first.metrics and len(first.pictures[0]) == len(pixels)  # nothing to compare with yet
    assert objective.bank.added == 0  # the loop adds them, if the step was good
    fill(objective.bank)
    objective.zero_grad()
    objective(pixels).loss.backward()
    assert gradients(objective.tokenizer.projection).norm() > 1e-4
    assert gradients(objective.tokenizer.decoder).norm() < 1e-6
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not teacher.model.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_teacher_sees_its_own_normalisation(teacher, pixels):
    images = pixels * 0.5 + 0.5
    config = teacher.model.pretrained_cfg
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    last, expected = teacher.model.forward_intermediates((images - mean) / std)
    maps, pooled = teacher(pixels, View())
    for got, wanted in zip([*maps, pooled], [*expected, teacher.model.forward_head(last)], strict=True):
        assert torch.allclose(got, wanted, atol=1e-4)


def test_views_move_by_a_pixel_and_scale(pixels):
    moved = View(1, 0)(pixels)
    assert torch.equal(moved[:, :, :-1], pixels[:, :, 1:]) and torch.equal(moved[:, :, -1], pixels[:, :, -1])
    assert torch.equal(View(0, 1)(pixels)[..., :-1], pixels[..., 1:])
    assert View(1, 1, 96)(pixels).shape[2:] == (96, 96)
    flat = torch.full((1, 3, 64, 64), 0.25)
    assert torch.allclose(View(size=80)(flat), torch.tensor(0.25))


def test_the_teacher_looks_at_every_size_it_was_given(teacher):
    assert teacher.draw_view().size is None
    several = copy.copy(teacher)
    several.sizes = (64, 96)
    assert {several.draw_view().size for _ in range(40)} == {64, 96}
    assert {(view.top, view.left) for view in (several.draw_view() for _ in range(80))} == {
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    }


@pytest.mark.parametrize("loss", ["perceptual", "recognition"])
def test_images_without_positions_may_count_less_for_the_teacher(make, teacher, pixels, loss):
    def measured(share, drop):
        torch.manual_seed(0)
        weights = Weights(**{"pixel": 1e-9, loss: 1, f"{loss}_unplaced": share, "rate": 0})
        result = make(weights, teacher, position_drop=drop)(pixels)
        return float(result.loss.detach()), float(result.metrics[loss])

    assert measured(0.25, 0.0) == measured(1.0, 0.0)
    whole, unweighted = measured(1.0, 1.0)
    assert whole == pytest.approx(unweighted, rel=1e-4) and measured(0.25, 1.0)[0] == pytest.approx(whole / 4, rel=1e-4)


def test_recognition_is_left_out_for_a_single_picture(make, teacher, pixels):
    """Nothing tells it from others: the loss would be 1, whatever was painted."""

    def step(recognition, images):
        torch.manual_seed(0)
        return make(Weights(perceptual=1, recognition=recognition, rate=0), teacher)(images)

    alone = step(1, pixels[:1])
    assert "recognition" not in alone.metrics and "perceptual" in alone.metrics
    assert torch.equal(alone.loss, step(0, pixels[:1]).loss)
    assert "recognition" in step(1, pixels[:2]).metrics and step(1, pixels[:2]).loss > step(0, pixels[:2]).loss


def test_semantic_loss_without_pixels_and_with_one_image(small_config, make, teacher, pixels):
    config = dataclasses.replace(small_config, decoder=dataclasses.replace(small_config.decoder, pixels=False))
    objective = make(Weights(feature=1, semantic=1), teacher, DynamicVisualTokenizer(config))
    fill(objective.bank)
    result = objective(pixels[:1])
    assert "semantic" in result.metrics and "psnr" not in result.metrics and result.loss.isfinite()


@pytest.mark.parametrize(
    "name, options",
    [("no_such_model", {}), ("convnext_atto", {"layers": (9,)}), ("convnext_atto", {"kwargs": {"x": 1}})],
)
def test_wrong_teacher(name, options):
    with pytest.raises(ConfigError, match=f"the teacher '{name}'"):
        TeacherFeatures(Teacher(name, weights="nowhere.safetensors", **options), (0.5,) * 3, (0.5,) * 3)


def test_missing_teacher_weights(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.safetensors"):
        TeacherFeatures(Teacher("convnext_atto", weights=str(tmp_path / "nowhere.safetensors")), (0.5,) * 3, (0.5,) * 3)


# Stages


def test_stages_freeze_and_thaw(make, pixels):
    objective = make(freeze=("backbone", "selector"))
    objective(pixels).loss.backward()
    assert gradients(objective.tokenizer.backbone).norm() == gradients(objective.tokenizer.selector).norm() == 0
    assert gradients(objective.tokenizer.merger).norm() > 0
    objective.set_stage(Stage(images=1, weights=NO_RATE))
    objective(pixels).loss.backward()
    assert gradients(objective.tokenizer.backbone).norm() > 0 and gradients(objective.tokenizer.selector).norm() > 0


@pytest.mark.parametrize("by", ["configuration", "stage"])
def test_a_frozen_backbone_is_untouched_also_in_its_statistics(small_config, make, by):
    config = dataclasses.replace(
        small_config,
        backbone=BackboneConfig("test_efficientnet", layer=2, frozen=by == "configuration"),
        merger=dataclasses.replace(small_config.merger, num_heads=2),
        decoder=dataclasses.replace(small_config.decoder, num_heads=2, pixels=False),
    )
    freeze = () if by == "configuration" else ("backbone",)
    objective = make(Weights(feature=1), tokenizer=DynamicVisualTokenizer(config), freeze=freeze)
    before = {name: value.clone() for name, value in objective.tokenizer.backbone.state_dict().items()}
    assert any("running_mean" in name for name in before)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        objective.train()
        objective(torch.randn(2, 3, 64, 64)).loss.backward()
        optimizer.step()
    after = objective.tokenizer.backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert gradients(objective.tokenizer.selector).norm() > 0


def test_stages_that_the_tokenizer_cannot_serve(small_config, make, tokenizer):
    without_pixels = DynamicVisualTokenizer(
        dataclasses.replace(small_config, decoder=dataclasses.replace(small_config.decoder, pixels=False, embed_dim=24))
    )
    for weights, options, told in [
        (Weights(pixel=1), {}, "decoder.pixels: true"),
        (Weights(feature=1), {}, "24 channels and the backbone's 48"),
        (Weights(feature=1), {"freeze": ("pixel_head",)}, "decoder.pixels: true"),
    ]:
        with pytest.raises(ConfigError, match=told):
            make(weights, tokenizer=without_pixels, **options)
    with pytest.raises(ConfigError, match="no teacher"):
        make(Weights(perceptual=1))
