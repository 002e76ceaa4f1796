"""What a run can do besides its steps: validation with the best kept, accumulated gradients, trackers, schedules."""

import pytest
import torch
from PIL import Image
from support.small_run import changed, log_of, run_until, trainer, write_teacher

import dyntok
from dyntok.errors import ConfigError, MissingDependencyError
from dyntok.structure import build
from dyntok.training import bank, trackers, validation
from dyntok.training.recipe import Recipe
from dyntok.training.schedule import Schedule
from dyntok.training.sources import is_validation
from dyntok.training.stage import Stage, Weights

STEPS = 6


@pytest.fixture
def short(values, tmp_path, photos):
    """The small recipe with one stage, on pictures of which some are held out."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(60):
        Image.fromarray(photos[i % len(photos)]).resize((80, 70)).save(folder / f"photo-{i}.jpg")
    assert 0 < sum(is_validation(f"photo-{i}") for i in range(60)) < 20
    values = changed(values, data=[str(folder)], split="train", save_every=4, pca_init=False)
    values["stages"] = [{**values["stages"][0], "images": 4 * STEPS, "warmup": 0}]
    return values


def test_the_weights_that_are_best_at_validation_are_kept(short, tmp_path, monkeypatch):
    measured = iter([10.0, 30.0, 20.0])
    fingerprints = []

    def measure(tokenizer, samples, weights=None):
        assert samples and all(is_validation(sample.key) for sample in samples)
        fingerprints.append(tokenizer.fingerprint)
        return {"validation_psnr": next(measured)}

    monkeypatch.setattr("dyntok.training.loop.validate", measure)
    trainer(changed(short, validate_every=2), tmp_path / "run").run()
    assert [line["validation_psnr"] for line in log_of(tmp_path / "run") if "validation_psnr" in line] == [10, 30, 20]
    best, last = (dyntok.load(tmp_path / "run" / name) for name in ("best", "tokenizer"))
    assert best.fingerprint == fingerprints[1] != last.fingerprint == fingerprints[2]


def test_validation_measures_what_a_user_would_get(short, tmp_path):
    trainer(changed(short, validate_every=STEPS, validation_images=2, ema=0.9), tmp_path / "run").run()
    (line,) = [line for line in log_of(tmp_path / "run") if "validation_psnr" in line]
    run = trainer(changed(short, validate_every=STEPS), tmp_path / "other")
    chosen = [run.validation[0], run.validation[len(run.validation) // 2]]
    expected = validation.validate(dyntok.load(tmp_path / "run" / "tokenizer"), chosen)
    assert line["validation_psnr"] == pytest.approx(expected["validation_psnr"], abs=1e-4)
    assert line["validation_tokens"] == expected["validation_tokens"]


def test_a_resumed_run_remembers_the_best(short, tmp_path):
    values = changed(short, validate_every=2, validation_images=2)
    trainer(values, tmp_path / "whole").run()
    run_until(trainer(values, tmp_path / "parts"), 5)
    trainer(values, tmp_path / "parts").run()
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    fingerprints = {dyntok.load(tmp_path / name / "best").fingerprint for name in ("whole", "parts")}
    assert len(fingerprints) == 1


def test_validation_needs_pictures_that_training_leaves_out(short):
    with pytest.raises(ConfigError, match="validate_every needs split: train"):
        build(Recipe, changed(short, validate_every=2, split="all"))


def test_accumulated_gradients_are_those_of_one_large_batch(short, tmp_path):
    """With masks and losses that are means over the pictures."""
    stage = {
        "images": 8,
        "masks": {"learned": 0, "budget": 1},
        "budgets": [0.5, 0.5],
        "weights": {"pixel": 1, "rate": 0},
    }
    found = []
    for batch, accumulate in ((4, 1), (2, 2)):
        values = changed(short, batch_size=batch, accumulate=accumulate, stages=[], save_every=0, optimizer="adamw")
        run = trainer({**values, "stages": [stage]}, tmp_path / str(accumulate))
        assert run.schedule.images_per_step == 4 and run.schedule.total_steps == 2
        gradients = {}
        clip = run.accelerator.clip_grad_norm_

        def look(parameters, norm, run=run, gradients=gradients, clip=clip):
            named = run.objective.named_parameters()
            gradients.update({name: p.grad.clone() for name, p in named if p.grad is not None})
            return clip(parameters, norm)

        run.accelerator.clip_grad_norm_ = look
        run.train_step(next(run.batches(0, 1)), run.recipe.stages[0], 0)
        found.append(gradients)
    assert set(found[0]) == set(found[1]) and found[0]
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-3, atol=1e-6 + 1e-4 * float(expected.abs().max()))


def test_an_accumulating_run_trains_quantizes_and_resumes(values, tmp_path, monkeypatch):
    monkeypatch.setattr(bank, "_PICTURES", 8)
    small = changed(values, batch_size=2, accumulate=2, teacher=write_teacher(tmp_path))
    for stage in small["stages"]:
        stage["images"] = 4 * 4
        stage["weights"]["semantic"] = 1.0
    trainer(small, tmp_path / "whole").run()
    run_until(trainer(changed(small, save_every=3), tmp_path / "parts"), 5)
    trainer(small, tmp_path / "parts").run()
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    log = log_of(tmp_path / "whole")
    assert [line["images"] for line in log] == [4 * step for step in range(1, 9)]
    assert [line["step"] for line in log if "semantic" in line] == [3, 4, 7, 8]


def test_tensorboard_gets_the_lines_of_the_log(short, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer(changed(short, trackers=["tensorboard"], log_every=2), tmp_path / "run").run()
    events = EventAccumulator(str(tmp_path / "run" / "dyntok")).Reload()
    written = {event.step: event.value for event in events.Scalars("loss")}
    assert written == pytest.approx({line["step"]: line["loss"] for line in log_of(tmp_path / "run")})
    assert "images_per_second" in events.Tags()["scalars"]


def test_a_tracker_that_is_not_installed_is_told_before_anything_runs(short, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install wandb"):
        trainer(changed(short, trackers=["wandb"]), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"trackers\[0\] is 'paper'"):
        build(Recipe, changed(short, trackers=["paper"]))


def test_a_cosine_falls_to_nothing():
    stage = Stage(images=100, decay="cosine", warmup=10, weights=Weights(pixel=1))
    schedule = Schedule([stage], 1)
    factors = [schedule.lr_factor(stage, step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[50] == pytest.approx(0.5) and factors[-1] < 0.001
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_stages_before_the_codes_are_not_measured(short, tmp_path):
    (first,) = short["stages"]
    stages = [first, {**first, "name": "codes", "quantize": True}]
    trainer({**changed(short, validate_every=1, validation_images=2), "stages": stages}, tmp_path / "run").run()
    measured = [line["stage"] for line in log_of(tmp_path / "run") if "validation_psnr" in line]
    assert measured == ["codes"] * STEPS


def test_a_tokenizer_without_pixels_is_measured_by_its_features(short, tmp_path):
    (stage,) = short["stages"]
    values = changed(short, validate_every=STEPS, validation_images=2)
    values["tokenizer"]["decoder"] = {**values["tokenizer"].get("decoder", {}), "pixels": False}
    values["stages"] = [{**stage, "weights": {"feature": 1}}]
    trainer(values, tmp_path / "run").run()
    (line,) = [line for line in log_of(tmp_path / "run") if "validation_feature_cosine" in line]
    assert -1 <= line["validation_feature_cosine"] <= 1 and "validation_psnr" not in line
    assert (tmp_path / "run" / "best").is_dir()
