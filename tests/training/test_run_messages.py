"""What a person sees of `dyntok train`: first line, progress, checkpoints by time, last line, dry run, quickstart."""

import errno
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from support.small_run import CODES, SAVE_EVERY, WARM, changed, log_of, run_until, trainer

import dyntok
from dyntok import locks
from dyntok.cli import main as cli
from dyntok.errors import CheckpointError
from dyntok.training import display, loop, precision
from dyntok.training.display import Display, format_duration
from dyntok.training.folder import own
from dyntok.training.recipe import Recipe


@pytest.fixture
def recipe_file(values, tmp_path):
    def write(**options):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(changed(values, **options)))
        return path

    return write


def test_the_first_line_says_what_is_trained_and_the_last_what_was_made(recipe_file, tmp_path, capsys):
    folder = tmp_path / "run"
    assert cli.main(["train", str(recipe_file()), "-o", str(folder), "--cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = "training: a tokenizer with 32 codes; 144 images in 2 stages, from 24 pictures, on cpu in fp32, into "
    assert lines[0] == expected + str(folder)
    assert "starting with new weights; --init NAME starts from the weights of a tokenizer" in lines
    assert any(line == "starting the codebook by k-means on 512 vectors" for line in lines)
    fingerprint = dyntok.load(folder / "tokenizer").fingerprint
    assert lines[-1].startswith("trained in ") and f"{folder / 'tokenizer'}, fingerprint {fingerprint};" in lines[-1]
    told = f"no picture was held out, measure it on others with `dyntok eval PICTURES --model {folder}"
    assert told in lines[-1] and "--split" not in lines[-1]
    assert f"dyntok.load('{folder / 'tokenizer'}')" in lines[-1]
    assert cli.main(["train", str(recipe_file()), "-o", str(folder), "--cpu"]) == 0
    resumed = capsys.readouterr().out
    assert resumed.startswith("resuming at image 144: ") and "starting " not in resumed


def test_a_run_says_what_its_weights_start_from(values, tmp_path, capsys):
    small = changed(values, pca_init=False)
    first = trainer(small, tmp_path / "first")
    first.save()
    capsys.readouterr()
    given = dyntok.load(tmp_path / "first" / "tokenizer")
    trainer(small, tmp_path / "second", tokenizer=given)
    count = len(given.state_dict())
    assert f"starting from {given.name}: {count} of {count} tensors fit\n" in capsys.readouterr().out

    weights = {name: value + 1 for name, value in given.backbone.model.state_dict().items()}
    save_file(weights, tmp_path / "backbone.safetensors")
    run = trainer(changed(small, backbone_weights=str(tmp_path / "backbone.safetensors")), tmp_path / "third")
    assert "starting with a pretrained backbone; --init NAME starts from" in capsys.readouterr().out
    found = run.objective.tokenizer.backbone.model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in weights.items())


def test_a_log_gets_a_line_of_progress_at_least_every_minute(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: clock[0])
    shown = Display(1000, 0, enabled=True)
    for _ in range(100):
        clock[0] += 2
        shown.advance(10, "codes", lambda: "loss 0.5")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "50 of 1,000 images (5%), 5.0 images/s, 3 min left; stage codes: loss 0.5"
    assert len(lines) == 7  # after 10 seconds, then every 30 of 200
    assert lines[-1].startswith("950 of 1,000 images (95%), 5.0 images/s, 10 s left")


def test_other_ranks_show_nothing(capsys):
    shown = Display(10, 0, enabled=False)
    shown.note("hello")
    shown.advance(10, "codes", lambda: "")
    assert capsys.readouterr() == ("", "")


def test_durations_in_words():
    assert [format_duration(seconds) for seconds in (42.3, 754, 7300)] == ["42 s", "13 min", "2 h 02 min"]


def test_checkpoints_by_minutes(values, tmp_path, monkeypatch):
    clock = [0.0]
    run = trainer(changed(values, save_every=0, save_minutes=10), tmp_path)
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock[0])
    original = run.train_step

    def train_step(*arguments):
        clock[0] += 4 * 60
        return original(*arguments)

    run.train_step = train_step
    run_until(run, 5)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 3  # after 12 minutes
    assert dyntok.load(tmp_path / "tokenizer")


def test_a_run_with_checkpoints_by_time_alone_resumes(undisturbed, values, tmp_path):
    run_until(trainer(changed(values, save_every=0, save_minutes=0), tmp_path), 7)
    resumed = trainer(changed(values, save_every=0), tmp_path)
    assert resumed.step == 7
    resumed.run()
    assert log_of(tmp_path) == log_of(undisturbed)


def test_a_dry_run_estimates_every_stage_and_writes_nothing(recipe_file, tmp_path, capsys):
    folder = tmp_path / "run"
    assert cli.main(["train", str(recipe_file()), "-o", str(folder), "--cpu", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["starting", "warm", "codes", "k-means", "total", "dry"]
    assert f"{4 * WARM} images" in lines[2] and f"{4 * CODES} images" in lines[3]
    assert all(re.search(r"\d+ (s|min)$", line) for line in lines[2:6])
    assert not folder.exists()


def test_a_dry_run_finds_what_a_run_would_stumble_over(recipe_file, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for arguments, message in (
        (["-o", str(tmp_path / "file" / "run")], "can't write"),
        (["-o", str(tmp_path / "run"), "--data", str(tmp_path / "none")], "none does not exist"),
    ):
        assert cli.main(["train", str(recipe_file()), *arguments, "--cpu", "--dry-run"]) == cli.FAILED
        assert message in capsys.readouterr().err


def test_two_runs_into_one_folder_are_refused(recipe_file, tmp_path, capsys):
    folder = tmp_path / "run"
    code = f"""
import sys
from pathlib import Path
from dyntok.training.folder import own
with own(Path({str(folder)!r})):
    print("locked", flush=True)
    sys.stdin.read()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    arguments = ["train", str(recipe_file()), "-o", str(folder), "--cpu"]
    assert cli.main(arguments) == cli.FAILED
    assert f"another run is training into {folder}" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["lock"]
    process.kill()
    process.communicate()
    assert cli.main(arguments) == 0


def test_a_run_that_another_one_overtook_is_refused(values, tmp_path):
    run_until(trainer(values, tmp_path / "run"), SAVE_EVERY + 1)
    late = trainer(values, tmp_path / "run")
    assert late.step == SAVE_EVERY
    trainer(values, tmp_path / "run").run()
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    with pytest.raises(CheckpointError, match="another run has trained into .*; run the same command again"):
        late.run()
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}


def test_ranks_that_find_checkpoints_of_different_steps_stop(values, tmp_path, monkeypatch):
    run_until(trainer(values, tmp_path), SAVE_EVERY + 1)
    monkeypatch.setattr(loop, "gather_object", lambda own: [*own, 0])  # another machine finds an empty folder
    with pytest.raises(CheckpointError, match=rf"different steps in .* \(\[0, {SAVE_EVERY}\]\); use a folder that all"):
        trainer(values, tmp_path)


def test_a_system_without_locks(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(locks, "fcntl", None)
    with own(tmp_path):
        pass
    assert f"has no file locks (Python offers none on {sys.platform})" in caplog.text


@pytest.mark.parametrize("device, expected", [(None, True), ("mps", True), ("cuda", False)])
def test_ranks_without_a_gpu_that_accelerate_knows(device, expected, monkeypatch):
    """Others would each become a run of their own."""
    found = device and torch.device(device)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert loop._is_rank_without_gpu() == expected
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not loop._is_rank_without_gpu()


def test_a_folder_on_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def missing(*arguments):
        raise OSError(errno.ENOSYS, "not supported")

    monkeypatch.setattr(locks.fcntl, "lockf", missing)
    with own(tmp_path):
        pass
    assert "has no file locks (not supported)" in caplog.text


def test_data_on_the_command_line_replaces_the_recipes(recipe_file, photos, tmp_path, capsys):
    folder = tmp_path / "Others"
    folder.mkdir()
    for i, photo in enumerate(photos):
        Image.fromarray(photo).resize((80, 70)).save(folder / f"{i}.JPG")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture")
    (folder / "bad.tar").write_bytes(b"no tar" * 200)
    arguments = ["train", str(recipe_file()), "-o", str(tmp_path / "run"), "--cpu", "--data", str(folder)]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert f"from {len(photos) + 1} pictures" in out and "left out: 1 .txt" in out and "bad.tar can't be read" in out
    assert "1 unreadable images left out" in out.splitlines()[-1]


def test_precision_follows_the_processor_and_may_change_on_resume(values, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "supports_bf16", lambda device: False)
    run = trainer(changed(values, precision="bf16"), tmp_path)
    assert run.autocast_dtype == torch.float32
    assert "bf16 is slow on this cpu, using fp32 instead" in capsys.readouterr().out
    run_until(run, 11)
    monkeypatch.setattr(loop, "supports_bf16", lambda device: True)
    resumed = trainer(changed(values, precision="auto"), tmp_path)
    assert resumed.step == 10 and resumed.autocast_dtype == torch.bfloat16
    run_until(resumed, 12)


def test_ranks_compute_in_float32_unless_all_are_fast_in_bf16(values, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "supports_bf16", lambda device: True)
    monkeypatch.setattr(loop.Accelerator, "gather", lambda self, own: torch.cat([own, ~own]))
    assert trainer(changed(values, precision="auto"), tmp_path).autocast_dtype == torch.float32


def test_a_processor_without_bf16_instructions_gets_float32(monkeypatch):
    precision._cpu_is_fast_in_bf16.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
        assert not precision.supports_bf16("cpu")
    precision._cpu_is_fast_in_bf16.cache_clear()


def test_quickstart_asks_for_data_and_names_its_time():
    with pytest.raises(dyntok.ConfigError, match="pass --data FOLDER"):
        Recipe.find("quickstart")
    recipe = Recipe.find("quickstart", data=["photos"])
    assert recipe.data == ("photos",) and "about 10 minutes on two CPU cores" in recipe.description


@pytest.mark.slow
def test_quickstart_makes_a_tokenizer_that_reconstructs(photos, tmp_path):
    """A twentieth of the recipe: pictures get better than their mean color by more than 1 dB."""
    for i, photo in enumerate(photos):
        Image.fromarray(photo).save(tmp_path / f"{i}.png")
    recipe = yaml.safe_load((dyntok.training.recipe.RECIPES / "quickstart.yaml").read_text())
    for stage in recipe["stages"]:
        stage["images"] //= 20
    path = tmp_path / "short.yaml"
    path.write_text(yaml.safe_dump({**recipe, "split": "all"}))
    command = [sys.executable, "-m", "dyntok.cli", "train", str(path), "--cpu", "--data", str(tmp_path)]
    subprocess.run([*command, "-o", str(tmp_path / "run")], check=True, capture_output=True)
    evaluate = [sys.executable, "-m", "dyntok.cli", "eval", str(tmp_path), "--json", "--model"]
    done = subprocess.run([*evaluate, str(tmp_path / "run" / "tokenizer")], check=False, capture_output=True)
    reached = json.loads(done.stdout)["psnr"]
    pixels = [np.float64(photo) / 255 for photo in photos]
    plain = np.mean([-10 * np.log10(np.square(array - array.mean((0, 1))).mean()) for array in pixels])
    assert reached > plain + 1, f"{reached:.2f} dB, and {plain:.2f} dB for mean colors"
