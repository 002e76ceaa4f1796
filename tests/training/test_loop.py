"""The training loop: it learns, reports, leaves a tokenizer, and fails with clear errors."""

import copy
import json
import logging
import re
from pathlib import Path

import pytest
import torch
import yaml
from support.small_run import CODES, EXTRA, WARM, changed, log_of, run_until, trainer, write_teacher

import dyntok
from dyntok.cli import main as cli
from dyntok.errors import CheckpointError, ConfigError, DataError, DyntokError
from dyntok.structure import build
from dyntok.tokenizer import DynamicVisualTokenizer
from dyntok.training.recipe import Recipe


def test_a_run_learns_and_leaves_a_tokenizer(undisturbed, values, photos):
    log = log_of(undisturbed)
    assert [line["step"] for line in log] == list(range(1, WARM + CODES + 1))
    assert [line["images"] for line in log] == [4 * step for step in range(1, WARM + CODES + 1)]
    assert [line["stage"] for line in log] == ["warm"] * WARM + ["codes"] * CODES
    first, last = (sum(line["loss"] for line in part) / 4 for part in (log[:4], log[WARM - 4 : WARM]))
    assert last < 0.8 * first
    assert sorted(path.name for path in undisturbed.iterdir()) == ["lock", "log.jsonl", "state.pt", "tokenizer"]
    tokenizer = dyntok.load(undisturbed / "tokenizer")
    trained = torch.load(undisturbed / "state.pt", weights_only=True)
    assert trained["step"] == WARM + CODES and trained["quantizing"]
    assert all(
        torch.equal(value, trained["objective"][f"tokenizer.{name}"]) for name, value in tokenizer.state_dict().items()
    )
    assert tokenizer.decode(tokenizer.encode(photos[0]))[0].size == (64, 64)


def test_lines_of_the_log(undisturbed, values, tmp_path, caplog):
    run = trainer(changed(values, log_every=3), tmp_path)
    run.data.samples = [run.data.samples[0]] * 23 + [type(run.data.samples[0])("broken", str(tmp_path / "none.jpg"))]
    with caplog.at_level(logging.WARNING, "dyntok"):
        run_until(run, 9)
    (*_, line) = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    names = "loss psnr tokens tokens_std usage perplexity images_per_second pixel rate grad unreadable"
    assert set(names.split()) <= set(line)
    assert line["unreadable"] == 1 and "left out broken" in caplog.text
    # a line is the mean over its steps
    short, long = log_of(undisturbed), log_of(tmp_path)
    assert [line["step"] for line in long] == [3, 6, 9]
    run = trainer(changed(values, log_every=3), tmp_path / "again")
    run_until(run, 3)
    (line,) = log_of(tmp_path / "again")
    for name in ("loss", "keep", "tokens"):
        assert line[name] == pytest.approx(sum(one[name] for one in short[:3]) / 3, rel=1e-5)
    codes = short[WARM:]
    assert max(one["usage"] for one in codes) > 0.5 and max(one["perplexity"] for one in codes) > 10
    assert short[0]["usage"] == 0
    assert all("psnr" in one or one["step"] for one in short) and 10 < short[0]["psnr"] < 40


# Disks


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_full_disk(values, tmp_path):
    run = trainer(values, tmp_path)
    run_until(run, 11)
    before = (tmp_path / "state.pt").read_bytes()
    (tmp_path / "state.tmp").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"can't write .*state\.pt.*make room"):
        run.save()
    assert (tmp_path / "state.pt").read_bytes() == before and not (tmp_path / "state.tmp").is_symlink()

    original = run.train_step

    def fill_the_disk(*arguments):
        (tmp_path / "log.jsonl").unlink()
        (tmp_path / "log.jsonl").symlink_to("/dev/full")
        return original(*arguments)

    run.train_step = fill_the_disk
    with pytest.raises(CheckpointError, match=r"can't write .*log\.jsonl: No space left"):
        run.run()


def test_folders_that_cannot_be_written(values, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "run" / "log.jsonl").mkdir(parents=True)
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "run"):
        with pytest.raises(CheckpointError, match=rf"can't write {folder}.*choose a folder"):
            trainer(values, folder).run()


def test_images_that_cannot_be_found(values, tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        trainer(changed(values, data=[str(tmp_path / "nowhere")]), tmp_path / "run")


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_end_it_in_one_line(values, tmp_path, capsys, workers):
    (tmp_path / "photos").mkdir()
    for i in range(6):
        (tmp_path / "photos" / f"{i}.jpg").write_bytes(b"no photograph")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(changed(values, data=[str(tmp_path / "photos")], pca_init=False, workers=workers)))
    assert cli.main(["train", str(recipe), "-o", str(tmp_path / "run"), "--cpu"]) == cli.FAILED
    assert re.fullmatch(r"(.*\n)*dyntok: 6 images in a row can't be read, the last one .*\n", capsys.readouterr().err)


# Starts and steps


def test_start_from_a_tokenizer(undisturbed, values, tmp_path):
    start = dyntok.load(undisturbed / "tokenizer")
    before = start.codebook.embedding.clone()
    run = trainer({**values, "stages": [EXTRA]}, tmp_path, tokenizer=start)
    assert run.quantizing  # it brings its codebook
    assert torch.equal(run.objective.tokenizer.codebook.embedding, before)
    run.run()
    line = log_of(tmp_path)[0]
    assert line["psnr"] > log_of(undisturbed)[WARM]["psnr"] - 3


def test_stages_are_checked_before_anything_runs(values, tmp_path):
    other = copy.deepcopy(values)
    other["tokenizer"]["decoder"]["embed_dim"] = 24
    other["pca_init"] = False
    other["stages"][1]["weights"]["feature"] = 1
    with pytest.raises(ConfigError, match="'codes' compares features"):
        trainer(other, tmp_path)


def test_frozen_parts_do_not_move(values, tmp_path):
    run = trainer(changed(values, [(0, dict(freeze=["selector", "backbone"]))], weight_decay=0.5), tmp_path)
    before = copy.deepcopy(run.objective.tokenizer.state_dict())
    run_until(run, 3)
    moved = {
        name.split(".")[0]
        for name, value in run.objective.tokenizer.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert moved == {"merger", "projection", "decoder", "pixel_head"}


def test_a_frozen_codebook_keeps_its_rows(values, tmp_path):
    for freeze in (["codebook"], []):
        run = trainer(
            {**values, "stages": [{**EXTRA, "freeze": freeze}]}, tmp_path / str(len(freeze)),
            tokenizer=DynamicVisualTokenizer(build(Recipe, values).config),
        )  # fmt: skip
        before = copy.deepcopy(run.objective.tokenizer.state_dict())
        run.run()
        after = run.objective.tokenizer.state_dict()
        assert torch.equal(after["codebook.embedding"], before["codebook.embedding"]) == bool(freeze)
        assert not torch.equal(after["projection.weight"], before["projection.weight"])


def test_a_decoder_that_is_trained_alone_reads_the_same_codes(values, tmp_path):
    encoder = ["backbone", "selector", "merger", "projection", "codebook"]
    start = DynamicVisualTokenizer(build(Recipe, values).config)
    with torch.no_grad():
        start.projection.weight[0] = -0.0  # equal to 0, but other bits
    before, decoder = start.fingerprint, copy.deepcopy(start.decoder.state_dict())
    stage = {**EXTRA, "quantize": True, "freeze": encoder}
    trainer({**values, "ema": 0.9, "stages": [stage]}, tmp_path, tokenizer=start).run()
    found = dyntok.load(tmp_path / "tokenizer")
    assert found.fingerprint == before
    assert not all(torch.equal(value, decoder[name]) for name, value in found.decoder.state_dict().items())


def test_an_average_copies_what_a_later_stage_freezes(values, tmp_path):
    stages = [EXTRA, {**EXTRA, "name": "frozen", "freeze": ["backbone"]}]
    run = trainer({**values, "ema": 0.9, "stages": stages}, tmp_path)
    run.run()
    trained, average = run.objective.tokenizer.state_dict(), run.average.values
    same = {name for name, value in trained.items() if torch.equal(value, average[name])}
    assert {name for name in trained if name.startswith("backbone.")} <= same
    assert not any(name.startswith("decoder.blocks") for name in same)


def test_learning_rate(values, tmp_path):
    run = trainer(values, tmp_path)
    warm, codes = run.recipe.stages
    assert [run.schedule.lr_factor(warm, step) for step in (0, 4, 9, 10, WARM - 1)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    assert [run.schedule.lr_factor(codes, step) for step in (0, CODES // 2, CODES - 1)] == pytest.approx(
        [1, 0.5, 1 / CODES]
    )
    run_until(run, 5)
    groups = [group for part in run.optimizer.parts for group in part.param_groups]
    assert len(groups) == 3 and all(group["lr"] == pytest.approx(3e-3 * 0.5) for group in groups)


def test_a_gradient_that_is_not_finite_is_left_out(values, tmp_path, caplog):
    stages = [{**EXTRA, "weights": {"pixel": 1, "semantic": 1, "distill": 1}}]
    values = {**values, "stages": stages, "teacher": write_teacher(tmp_path)}
    run = trainer(values, tmp_path, tokenizer=DynamicVisualTokenizer(build(Recipe, values).config))
    stage = run.recipe.stages[0]
    run.train_step([run.data[0]], stage, 0)
    before = copy.deepcopy(run.objective.state_dict())
    assert before["bank.added"] == 4
    poisoned = run.data[1].clone()
    poisoned[0, 0, 0, 0] = float("nan")
    with caplog.at_level(logging.WARNING, "dyntok"):
        for _ in range(19):
            run.train_step([poisoned], stage, 1)
    assert "step 0 skipped" in caplog.text
    assert all(torch.equal(value, before[name]) for name, value in run.objective.state_dict().items())
    run.train_step([run.data[1]], stage, 1)  # one good step, and the count begins anew
    for _ in range(19):
        run.train_step([poisoned], stage, 1)
    with pytest.raises(DyntokError, match="20 steps in a row"):
        run.train_step([poisoned], stage, 1)
    assert all(value.isfinite().all() for value in run.objective.state_dict().values())
