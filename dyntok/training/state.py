"""What a run leaves on disk to be taken up again: `state.pt`, written atomically, and the check that a recipe goes on with it.

Not here: what the state consists of (`loop.py`).
"""

import os
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError  # what torch.load raises on a file that holds more than weights
from typing import Any

import torch

from dyntok.errors import CheckpointError
from dyntok.training.data import Sample, digest_of
from dyntok.training.recipe import Recipe, differences

# May differ between two parts of a run: where things lie (which images and files they are is compared), and how the work is organised.
_FREE = {"data", "split", "backbone_weights", "batch_size", "workers", "log_every", "save_every", "stages"}


def write_state(path: Path, state: dict[str, Any]) -> None:
    """First to another name, then renamed, so that a kill leaves the old one. Raises `CheckpointError`, on a full disk for example."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns what the system says into a RuntimeError
        temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"can't write {path}: {error}; make room, then start again: the state saved before is still there"
        ) from error


def read_state(path: Path) -> dict[str, Any] | None:
    """None where there is no file. Raises `CheckpointError` on one that is damaged or no state of a run."""
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: state[name] for name in ("step", "quantizing", "objective", "optimizer")} | {
            "run": state.get("run")
        }
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, AttributeError, UnpicklingError) as error:
        raise CheckpointError(
            f"{path} is damaged or no state of a training run ({error}); remove it to begin anew"
        ) from error


def describe_run(recipe: Recipe, samples: Sequence[Sample], images_per_step: int) -> dict[str, Any]:
    """What state.pt keeps to recognise its run: plain types only."""
    return {
        "recipe": recipe.to_dict(),
        "images": len(samples),
        "digest": digest_of(samples),
        "images_per_step": images_per_step,
    }


def check_same_run(path: Path, state: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises `CheckpointError` that tells what differs in what the run has been through; later stages may be changed or added.

    A state without a description (of an early version) is taken as it is.
    """
    if state["run"] is None:
        return
    then = state["run"]
    changes = differences({"images_per_step": then["images_per_step"]}, now)
    if then["digest"] != now["digest"]:
        changes.append(f"other images: {then['images']:,}, now {now['images']:,}")
    changes += differences(_fixed(then["recipe"]), _fixed(now["recipe"]))
    if not changes:
        changes = _changed_stages(
            then["recipe"]["stages"], now["recipe"]["stages"], state["step"], now["images_per_step"]
        )
    if changes:
        raise CheckpointError(
            f"{path} is of a run with another recipe ({'; '.join(changes[:5])}{'; ...' if len(changes) > 5 else ''}). "
            "Go on with the old recipe, or train into another folder."
        )


def _fixed(recipe: dict[str, Any]) -> dict[str, Any]:
    fixed = {name: value for name, value in recipe.items() if name not in _FREE}
    return fixed | {"teacher": recipe["teacher"] | {"weights": Path(recipe["teacher"]["weights"]).name}}


def _changed_stages(then: list[dict], now: list[dict], step: int, images_per_step: int) -> list[str]:
    changes = []
    for i, stage in enumerate(then):
        if step <= 0:
            break  # not begun
        steps = -(-stage["images"] // images_per_step)
        if i >= len(now):
            changes.append(f"stages[{i}] ({stage['name']!r}) is gone")
        else:
            new = now[i]
            if step <= steps and stage["decay"] == "constant" and -(-new["images"] // images_per_step) >= step:
                new = new | {"images": stage["images"]}  # its length changes nothing of what was
            changes += differences(stage, new, f"stages[{i}]")
        step -= steps
    return changes
