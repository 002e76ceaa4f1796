"""The loss that lets the tokenizer's own features tell what a teacher finds in a picture."""

import dataclasses

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from support.small_run import CODES, SAVE_EVERY, WARM, changed, log_of, run_until, trainer, write_teacher

import dyntok
from dyntok.errors import ConfigError
from dyntok.image import to_pixels
from dyntok.structure import build
from dyntok.tokenizer import DynamicVisualTokenizer
from dyntok.training.distillation import Distillation
from dyntok.training.objective import Objective
from dyntok.training.recipe import Recipe, Teacher
from dyntok.training.stage import Masks, Stage, Weights
from dyntok.training.teacher import TeacherFeatures

GRID = (4, 4)


@pytest.fixture
def teacher(tmp_path):
    return TeacherFeatures(Teacher(**write_teacher(tmp_path)), (0.5,) * 3, (0.5,) * 3)


def arguments(features, decoded, maps, pooled, known=True):
    return features, decoded, GRID, maps, pooled, torch.as_tensor(known).expand(len(pooled))


def test_heads_learn_what_features_tell_and_nothing_from_constant_features():
    torch.manual_seed(0)
    told = torch.randn(32, 16, 12, requires_grad=True)
    patches = told.detach().mT.unflatten(2, GRID)
    first = F.conv2d(patches, torch.randn(6, 12, 1, 1))
    maps, pooled = [first, F.avg_pool2d(first, 2)], first.mean((2, 3)) + 5  # the mean does not count

    def remaining(features, steps=150):
        distillation = Distillation(12, 12, [6, 6], 6)
        optimizer = torch.optim.Adam(distillation.parameters(), lr=3e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = distillation(*arguments(features, features, maps, pooled))
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    assert 2.4 < remaining(told, 1) < 3.6  # 1 - cosine is about 1 in each of two terms, which count 1.5 times
    assert remaining(told) < 0.3
    same = torch.randn(1, 1, 12).expand(32, 16, 12).clone().requires_grad_()
    assert remaining(same) > 2  # the same features for all pictures tell nothing


def test_what_counts():
    torch.manual_seed(0)
    distillation = Distillation(12, 8, [6], 5)
    features, decoded = (torch.randn(3, 16, channels, requires_grad=True) for channels in (12, 8))
    maps, pooled = [torch.randn(3, 6, 2, 3)], torch.randn(3, 5)

    def gradients(features, decoded, maps=maps, pooled=pooled, known=True):
        distillation(*arguments(features, decoded, maps, pooled, known)).backward()
        found = [None if x.grad is None else x.grad.clone() for x in (features, decoded)]
        features.grad = decoded.grad = None
        return found

    usual = gradients(features, decoded)
    assert all(grad.norm() > 0 for grad in usual)
    # neither the size of a map's channels nor the mean of anything
    moved = gradients(features, decoded, [5 * maps[0] + 3], pooled + 2)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(usual, moved, strict=True))
    # without positions, the decoder's maps do not count
    unplaced = gradients(features, decoded, known=False)
    assert torch.allclose(unplaced[0], usual[0]) and not torch.allclose(unplaced[1], usual[1])
    assert torch.allclose(unplaced[1], gradients(features, decoded, [torch.randn(3, 6, 2, 3)], known=False)[1])
    # a frozen backbone has no term, and its head learns nothing
    distillation.zero_grad()
    assert gradients(features.detach(), decoded)[0] is None
    assert all(p.grad is None for p in distillation.backbone_head.parameters())
    # a picture alone is its own mean
    distillation.zero_grad()
    assert (
        gradients(features.detach()[:1], decoded.detach()[:1].requires_grad_(), [maps[0][:1]], pooled[:1])[1].norm() > 0
    )
    assert all(p.grad is None for p in distillation.decoder_head.pooled.parameters())


def test_maps_count_where_positions_are_known():
    torch.manual_seed(0)
    distillation, decoded = Distillation(12, 8, [6], 5), torch.randn(3, 16, 8, requires_grad=True)
    maps, pooled = [torch.randn(3, 6, 8, 8)], torch.randn(3, 5)  # finer than the patches
    found, _ = distillation.decoder_head(decoded, GRID, [(8, 8)])
    assert torch.allclose(found[0], F.interpolate(distillation.decoder_head(decoded, GRID, [GRID])[0][0], (8, 8)))
    wanted = (maps[0] - maps[0].mean((0, 2, 3), keepdim=True)) / maps[0].std((0, 2, 3), correction=0, keepdim=True)
    distances = (1 - F.cosine_similarity(found[0], wanted)).mean((1, 2))

    def loss(known):
        features = torch.zeros(3, 16, 12)  # without gradient
        return distillation(*arguments(features, decoded, maps, pooled, known))

    none = loss([False] * 3)
    assert torch.allclose(loss([True, False, True]) - none, (distances[0] + distances[2]) / 2, atol=1e-5)
    assert torch.allclose(loss([True] * 3) - none, distances.mean(), atol=1e-5)


@pytest.mark.parametrize("frozen", [(), ("backbone",)])
def test_the_loss_reaches_encoder_and_decoder_but_no_pixels(tokenizer, photos, small_config, teacher, frozen):
    pixels = torch.stack([to_pixels(photo, small_config.image) for photo in photos[:4]])
    objective = Objective(tokenizer, teacher)
    weights, masks = Weights(pixel=1e-12, distill=1, rate=0, commitment=0), Masks(0, budget=1)
    objective.set_stage(Stage(images=1, weights=weights, masks=masks, quantize=True, freeze=frozen))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    result = objective.train()(pixels)
    assert 0 < result.metrics["distill"] < 6
    result.loss.backward()
    norms = {
        name: sum(float(p.grad.norm()) for p in getattr(tokenizer, name).parameters() if p.grad is not None)
        for name in ("backbone", "merger", "projection", "decoder", "pixel_head")
    }
    assert norms.pop("pixel_head") < 1e-6
    assert {name for name, norm in norms.items() if norm > 1e-4} == set(norms) - set(frozen)
    assert all(p.grad is not None for p in objective.distillation.decoder_head.parameters())
    assert all((p.grad is None) == bool(frozen) for p in objective.distillation.backbone_head.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_what_is_refused(tokenizer, small_config, teacher):
    stage = Stage(images=1, weights=Weights(pixel=1, distill=1))
    with pytest.raises(ConfigError, match="distill losses need teacher.name"):
        build(Recipe, {"data": ["photos"], "stages": [{"images": 8, "weights": {"pixel": 1, "distill": 1}}]})
    with pytest.raises(ConfigError, match="distill loss, but there is no teacher"):
        Objective(tokenizer, None).set_stage(stage)
    encoder = DynamicVisualTokenizer(dataclasses.replace(small_config, decoder=None))
    with pytest.raises(ConfigError, match="remove decoder: null"):
        Objective(encoder, teacher).set_stage(stage)


def test_features_without_pixels(photos, small_config, teacher):
    config = dataclasses.replace(small_config, decoder=dataclasses.replace(small_config.decoder, pixels=False))
    objective = Objective(DynamicVisualTokenizer(config), teacher)
    objective.set_stage(Stage(images=1, weights=Weights(feature=1, distill=1)))
    pixels = torch.stack([to_pixels(photo, small_config.image) for photo in photos[:1]])
    result = objective.train()(pixels)
    assert "distill" in result.metrics and "psnr" not in result.metrics and result.loss.isfinite()


@pytest.mark.parametrize(
    "options",
    [
        {"layers": (3, 1)},
        {"layers": (-1, 3)},
        {"layers": (2,)},
        {"classes": True},
        {"name": "mobilenetv2_035", "kwargs": {"global_pool": "catavgmax"}},
        {"name": "vit_tiny_patch16_224", "kwargs": {"img_size": 64, "depth": 3}},
    ],
)
def test_any_teacher(options, tokenizer, photos, small_config, tmp_path):
    section = write_teacher(tmp_path)
    if options.pop("classes", False):
        section["kwargs"] = {**section["kwargs"], "num_classes": 1000}
    if "name" in options:
        torch.manual_seed(0)
        model = timm.create_model(options["name"], **options["kwargs"])
        save_file(model.state_dict(), tmp_path / "teacher.safetensors")
    teacher = TeacherFeatures(Teacher(**{**section, **options}), (0.5,) * 3, (0.5,) * 3)
    objective = Objective(tokenizer, teacher)
    objective.set_stage(Stage(images=1, weights=Weights(pixel=1, distill=1, semantic=1)))
    result = objective.train()(torch.stack([to_pixels(photo, small_config.image) for photo in photos[:4]]))
    result.loss.backward()
    assert 0 < result.metrics["distill"] < 6
    assert all(p.grad is not None for p in objective.distillation.parameters())
    objective.bank.add(*result.pictures)
    assert objective.bank.added == 4


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


@pytest.mark.parametrize("first, later", [({"pixel": 1, "distill": 1}, {"pixel": 1, "perceptual": 1}), (None, None)])
def test_later_stages_may_begin_and_end_with_it(values, tmp_path, first, later):
    perceptual, distill = {"pixel": 1, "perceptual": 1}, {"pixel": 1, "distill": 1}
    first, later = first or perceptual, later or distill
    values = changed(values, [(0, {"weights": perceptual}), (1, {"weights": first})])
    values["teacher"] = write_teacher(tmp_path)
    run_until(trainer(values, tmp_path / "run"), SAVE_EVERY + 2)
    resumed = trainer(changed(values, [(1, {"weights": later})]), tmp_path / "run")
    assert resumed.step == SAVE_EVERY
    resumed.run()
    assert ["distill" in line for line in log_of(tmp_path / "run")] == [False] * WARM + ["distill" in later] * CODES
