"""The loss that lets the tokenizer's own features tell what a teacher finds in a picture."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from support.small_run import CODES, WARM, changed, log_of, run_until, trainer, write_teacher

import dyntok
from dyntok.errors import ConfigError
from dyntok.image import to_pixels
from dyntok.tokenizer import DynamicVisualTokenizer
from dyntok.training.distillation import Distillation, _RunningScale
from dyntok.training.objective import Objective
from dyntok.training.recipe import Teacher
from dyntok.training.stage import Masks, Stage, Weights
from dyntok.training.teacher import TeacherFeatures

GRID = (4, 4)


@pytest.fixture
def teacher(tmp_path):
    return TeacherFeatures(Teacher(**write_teacher(tmp_path)), (0.5,) * 3, (0.5,) * 3)


def test_heads_learn_what_features_tell_and_nothing_from_noise():
    torch.manual_seed(0)
    told = torch.randn(32, 16, 12)
    lattice = told.mT.unflatten(2, GRID)
    project = torch.randn(6, 12, 1, 1)
    maps = [F.conv2d(lattice, project), F.avg_pool2d(F.conv2d(lattice, project), 2)]
    pooled = maps[0].mean((2, 3)) + 5  # the mean does not count

    def remaining(features):
        loss_of = Distillation(12, 12, [6, 6], 6)
        optimizer = torch.optim.Adam(loss_of.parameters(), lr=3e-3)
        for _ in range(150):
            optimizer.zero_grad()
            loss = loss_of(features, features, GRID, maps, pooled)
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    start = float(Distillation(12, 12, [6, 6], 6)(told, told, GRID, maps, pooled).detach())
    assert 2.4 < start < 3.6  # 1 - cosine is about 1 for each of two terms, weighted 1.5 in all
    assert remaining(told) < 0.3
    assert remaining(torch.randn(1, 1, 12).expand(32, 16, 12)) > 2  # the same features for all pictures


def test_means_and_deviations_are_of_the_last_batches():
    scale = _RunningScale(2)
    rows = torch.tensor([[1.0, 10.0], [3.0, 10.0]])
    centered, deviation = scale(rows)
    assert torch.allclose(centered, torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    assert torch.allclose(deviation, torch.tensor([1.0, 1e-3]))
    scale(rows + 4)
    assert torch.allclose(scale.mean, torch.tensor([4.0, 12.0]))  # of two batches, half each
    before = {name: value.clone() for name, value in scale.state_dict().items()}
    assert scale(torch.full((2, 2), torch.nan))[0].isnan().all()  # the step is skipped, and leaves no trace
    scale.eval()(rows + 100)
    assert all(torch.equal(value, before[name]) for name, value in scale.state_dict().items())


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_loss_reaches_encoder_and_decoder_but_no_pixels(tokenizer, photos, small_config, teacher, share):
    teacher.share = share
    pixels = torch.stack([to_pixels(photo, small_config.image) for photo in [*photos, *photos][:8]])
    objective = Objective(tokenizer, teacher, distill=True)
    weights = Weights(pixel=1e-12, distill=1, rate=0)
    objective.set_stage(Stage(images=1, weights=weights, masks=Masks(0, budget=1), quantize=True))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    result = objective.train()(pixels)
    assert 0 < result.metrics["distill"] < 6
    result.loss.backward()
    norms = {
        name: sum(float(p.grad.norm()) for p in getattr(tokenizer, name).parameters() if p.grad is not None)
        for name in ("backbone", "merger", "projection", "decoder", "pixel_head")
    }
    assert norms.pop("pixel_head") < 1e-6 and min(norms.values()) > 1e-4, norms
    assert all(p.grad is not None for p in objective.distillation.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_teacher_is_needed(tokenizer):
    with pytest.raises(ConfigError, match="distill loss, but there is no teacher"):
        Objective(tokenizer, None, distill=True).set_stage(Stage(images=1, weights=Weights(pixel=1, distill=1)))


def test_features_without_pixels(tokenizer, photos, small_config, teacher):
    config = dataclasses.replace(small_config, decoder=dataclasses.replace(small_config.decoder, pixels=False))
    objective = Objective(DynamicVisualTokenizer(config), teacher, distill=True)
    objective.set_stage(Stage(images=1, weights=Weights(feature=1, distill=1)))
    pixels = torch.stack([to_pixels(photo, small_config.image) for photo in photos[:1]])
    result = objective.train()(pixels)
    assert "distill" in result.metrics and "psnr" not in result.metrics and result.loss.isfinite()


def test_a_run_goes_on_with_its_heads_and_saves_none(values, tmp_path):
    values = changed(values, [(1, {"weights": {"pixel": 10, "rate": 2, "distill": 1}})])
    values["teacher"] = write_teacher(tmp_path)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer(values, whole).run()
    run_until(trainer(values, parts), WARM + CODES // 2)
    trainer(values, parts).run()
    assert log_of(parts) == log_of(whole)
    assert ["distill" in line for line in log_of(whole)] == [False] * WARM + [True] * CODES
    saved = dyntok.load(whole / "tokenizer").state_dict()
    assert not any("distillation" in name for name in saved)
    state = torch.load(whole / "state.pt", weights_only=True)["objective"]
    assert state["distillation.pooled_scale.batches"] == CODES
