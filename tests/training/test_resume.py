"""Runs that are killed, stopped, changed or damaged, and started again."""

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from support.small_run import CODES, EXTRA, SAVE_EVERY, WARM, Stop, changed, copy_run, log_of, run_until, trainer

import dyntok
from dyntok.errors import CheckpointError
from dyntok.training.loop import Trainer

ROOT = Path(__file__).parents[2]


# `dyntok`, but the process kills itself as it comes to a step.
KILLED = """
import os, signal, sys
from dyntok.cli import main as cli
from dyntok.training.loop import Trainer

step, *arguments = sys.argv[1:]
train_step = Trainer.train_step

def killed(self, *arguments):
    if self.step == int(step):
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(self, *arguments)

Trainer.train_step = killed
sys.exit(cli.main(arguments))
"""


def test_killed_and_started_again(undisturbed, values, tmp_path):
    """Between two checkpoints, and with other worker processes than the undisturbed run."""
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(changed(values, workers=1)))
    arguments = ["train", str(recipe), "-o", str(folder), "--cpu"]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    # no pipes: the loader's worker process, which outlives the kill for some seconds, would hold them open
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(SAVE_EVERY + 3), *arguments], env=environment, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL
    assert log_of(folder) == log_of(undisturbed)[: SAVE_EVERY + 3]
    assert torch.load(folder / "state.pt", weights_only=True)["step"] == SAVE_EVERY
    subprocess.run(
        [sys.executable, "-m", "dyntok.cli", *arguments], env=environment, check=True, capture_output=True, timeout=300
    )
    assert log_of(folder) == log_of(undisturbed)
    assert same_weights(folder, undisturbed)


def same_weights(folder, other):
    one, two = (torch.load(path / "state.pt", weights_only=True) for path in (folder, other))
    return all(torch.equal(one["objective"][name], two["objective"][name]) for name in two["objective"])


def test_stopped_in_the_second_stage_starts_the_codebook_once(undisturbed, values, tmp_path, monkeypatch):
    starts = []
    original = Trainer._kmeans
    monkeypatch.setattr(Trainer, "_kmeans", lambda self: starts.append(self.step) or original(self))
    run_until(trainer(values, tmp_path), WARM + 8)  # the last state is of WARM + 6
    assert starts == [WARM] and (tmp_path / "tokenizer" / "config.json").exists()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 1, "los')  # killed while it wrote
    resumed = trainer(values, tmp_path)
    assert resumed.quantizing and resumed.step == WARM + 6
    resumed.run()
    assert starts == [WARM]
    assert log_of(tmp_path) == log_of(undisturbed) and same_weights(tmp_path, undisturbed)


def test_stopped_before_the_first_state_begins_anew(undisturbed, values, tmp_path):
    run_until(trainer(values, tmp_path), 4)
    assert len(log_of(tmp_path)) == 4 and not (tmp_path / "state.pt").exists()
    run_until(trainer(values, tmp_path), 2)
    assert log_of(tmp_path) == log_of(undisturbed)[:2]


def same_as_saved(folder):
    """Whether `tokenizer/` holds the weights of `state.pt`."""
    saved = torch.load(folder / "state.pt", weights_only=True)["objective"]
    return all(
        torch.equal(value, saved[f"tokenizer.{name}"])
        for name, value in dyntok.load(folder / "tokenizer").state_dict().items()
    )


def test_every_save_leaves_a_tokenizer(undisturbed, values, tmp_path, monkeypatch):
    run_until(trainer(values, tmp_path), SAVE_EVERY + 1)
    assert same_as_saved(tmp_path)

    def killed(path, state):
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):  # between the two files of the second save
        patch.setattr("dyntok.training.loop.write_state", killed)
        trainer(values, tmp_path).run()
    assert not same_as_saved(tmp_path)
    resumed = trainer(values, tmp_path)
    assert resumed.step == SAVE_EVERY
    resumed.run()
    assert log_of(tmp_path) == log_of(undisturbed) and same_weights(tmp_path, undisturbed) and same_as_saved(tmp_path)


def test_a_finished_run_has_nothing_to_do(undisturbed, values, tmp_path):
    copy_run(undisturbed, tmp_path)
    trainer(values, tmp_path).run()
    assert log_of(tmp_path) == log_of(undisturbed)
    assert dyntok.load(tmp_path / "tokenizer").fingerprint == dyntok.load(undisturbed / "tokenizer").fingerprint


def test_stages_may_be_appended(undisturbed, values, tmp_path):
    copy_run(undisturbed, tmp_path)
    trainer({**values, "stages": [*values["stages"], EXTRA]}, tmp_path).run()
    log = log_of(tmp_path)
    assert log[:-2] == log_of(undisturbed) and [line["stage"] for line in log[-2:]] == ["more", "more"]


@pytest.mark.parametrize(
    "change",
    [
        dict(log_every=7, save_every=3, workers=2),
        dict(stages=[(1, dict(images=4000, lr=0.5))]),
        dict(stages=[(0, dict(images=4 * 50))]),  # longer, at a constant learning rate
    ],
)
def test_what_may_change_between_two_parts_of_a_run(values, tmp_path, change):
    run_until(trainer(values, tmp_path), 11)
    assert trainer(changed(values, **change), tmp_path).step == 10


@pytest.mark.parametrize(
    "change, told",
    [
        (dict(batch_size=8), "images_per_step is 8, was 4"),
        (dict(seed=6), "seed is 6, was 5"),
        (dict(min_crop=0.5), r"min_crop is 0\.5, was 0\.8"),
        (dict(pca_init=False), "pca_init is False, was True"),
        (dict(stages=[(0, dict(rho=0.5))]), r"stages\[0\]\.rho is 0\.5, was 0\.333\d*"),
        (
            dict(stages=[(0, dict(weights={"pixel": 3}))]),
            r"stages\[0\]\.weights\.local is 0\.0, was 0\.1; stages\[0\]\.weights\.pixel is 3, was 10",
        ),
        (dict(stages=[(0, dict(images=20))]), r"stages\[0\]\.images is 20, was 96"),
        (dict(stages=[(0, dict(decay="linear"))]), r"stages\[0\]\.decay is 'linear', was 'constant'"),
    ],
)
def test_resuming_with_another_recipe_is_refused(values, tmp_path, change, told):
    run_until(trainer(values, tmp_path), 11)
    before = (tmp_path / "state.pt").read_bytes(), (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(
        CheckpointError, match=rf"state\.pt belongs to a run of another recipe \({told}.*another folder"
    ):
        trainer(changed(values, **change), tmp_path)
    assert before == ((tmp_path / "state.pt").read_bytes(), (tmp_path / "log.jsonl").read_bytes())


def test_resuming_with_other_stages_images_or_tokenizer_is_refused(undisturbed, values, tmp_path):
    copy_run(undisturbed, tmp_path)
    with pytest.raises(CheckpointError, match=r"stages\[1\] \('codes'\) is gone"):
        trainer({**values, "stages": values["stages"][:1]}, tmp_path)
    with pytest.raises(
        CheckpointError, match=r"stages\[1\]\.images is 80, was 45"
    ):  # its learning rate went down to nothing
        trainer(changed(values, [(1, dict(images=80))]), tmp_path)
    with pytest.raises(CheckpointError, match=r"the images are others \(\d+, were 24\)"):
        trainer(changed(values, split="train"), tmp_path)
    other = copy.deepcopy(values)
    other["tokenizer"]["codebook"]["size"] = 64
    with pytest.raises(CheckpointError, match=r"tokenizer\.codebook\.size is 64, was 32"):
        trainer(other, tmp_path)


def test_the_same_images_elsewhere_are_welcome(undisturbed, values, tmp_path):
    copy_run(undisturbed, tmp_path)
    (tmp_path / "moved").symlink_to(values["data"][0])
    assert trainer(changed(values, data=[str(tmp_path / "moved")]), tmp_path).step == WARM + CODES


def test_a_state_without_a_recipe_is_taken_as_it_is(undisturbed, values, tmp_path):
    old = torch.load(undisturbed / "state.pt", weights_only=True)
    for later in ("run", "average", "best"):
        del old[later]
    assert set(old) == {"step", "quantizing", "objective", "optimizer"}
    torch.save(old, tmp_path / "state.pt")
    assert trainer({**values, "stages": [*values["stages"], EXTRA]}, tmp_path).step == WARM + CODES


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state["objective"].pop("tokenizer.selector.head.bias"),
        lambda state: state["objective"].update(odd=torch.ones(1)),
    ],
    ids=["missing", "unexpected"],
)
def test_states_that_do_not_fit(undisturbed, values, tmp_path, damage):
    damaged = torch.load(undisturbed / "state.pt", weights_only=True)
    damage(damaged)
    torch.save(damaged, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match=r"does not fit this recipe.*1 tensors.*(selector\.head\.bias|odd)"):
        trainer(values, tmp_path)


@pytest.mark.parametrize("content", [b"", b"no pickle", b"PK\x03\x04 half a file", None])
def test_damaged_states(values, tmp_path, content):
    if content is None:
        torch.save({"weights": 1}, tmp_path / "state.pt")
    else:
        (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"state\.pt is damaged or no state"):
        trainer(values, tmp_path)


def test_a_kill_while_saving_leaves_the_old_state(undisturbed, values, tmp_path, monkeypatch):
    run = trainer(values, tmp_path)
    run_until(run, 11)
    save = torch.save

    def killed(state, file):
        save(state, file)
        file.truncate(file.tell() // 2)
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(torch, "save", killed)
        run.save()
    assert (tmp_path / "state.tmp").exists()
    resumed = trainer(values, tmp_path)
    assert resumed.step == 10
    before = (tmp_path / "state.pt").read_bytes()
    with open(tmp_path / "state.pt", "rb") as old:
        run_until(resumed, 21)
        assert old.read() == before  # not written over but replaced, at once
    assert log_of(tmp_path) == log_of(undisturbed)[:21]
    assert not (tmp_path / "state.tmp").exists()
