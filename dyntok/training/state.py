"""`state.pt`, from which a run resumes: written atomically, and checked against the recipe that wants to resume it.

Not here: what the state consists of (`loop.py`).
"""

import os
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError  # what torch.load raises on a file that holds more than weights
from typing import Any

import torch

from dyntok.errors import CheckpointError
from dyntok.structure import differences
from dyntok.training.recipe import Recipe
from dyntok.training.sources import digest_of

# What may change when a run resumes: where the files are (their keys are compared), and how the work is organized. The
# order of a stream depends on `split`, though, and on the number of processes: there, both are compared, too.
_FREE = {
    "description", "data", "split", "backbone_weights", "batch_size", "workers", "precision",
    "log_every", "save_minutes", "save_every", "stages", "accumulate", "validate_every", "validation_images",
    "trackers",
}  # fmt: skip


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Replaces the file in one step, so that a killed process leaves the old one.

    Raises `CheckpointError` if it can't be written, on a full disk for example.
    """
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
            f"can't write {path}: {error}; make room, then run the same command: it resumes from the checkpoint before"
        ) from error


def read_state(path: Path) -> dict[str, Any] | None:
    """Returns None if there is no file. Raises `CheckpointError` on a file that is damaged or no state of a run."""
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: state[name] for name in ("step", "quantizing", "objective", "optimizer")} | {
            "run": state.get("run"),
            "average": state.get("average"),
            "best": state.get("best"),
        }
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, AttributeError, UnpicklingError) as error:
        raise CheckpointError(
            f"{path} is damaged or no state of a training run ({error}); remove it to start over"
        ) from error


def describe_run(recipe: Recipe, keys: Sequence[str], images_per_step: int, processes: int) -> dict[str, Any]:
    """Returns what `state.pt` keeps to recognize its run, as plain types. keys: of the images, or of their shards."""
    streamed = {"processes": processes} if recipe.stream else {}
    return streamed | {
        "recipe": {name: value for name, value in recipe.to_dict().items() if name != "data"},  # may hold a password
        "images": len(keys),
        "digest": digest_of(keys),
        "images_per_step": images_per_step,
    }


def check_same_run(path: Path, state: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises `CheckpointError` if the recipe differs in what the run has already done.

    Later stages may be changed or added. A state without a description, of an early version, is accepted.
    """
    if state["run"] is None:
        return
    then = state["run"]
    compared = {name: then[name] for name in ("images_per_step", "processes") if name in then}
    changes = differences(now, compared, shared=True)
    if then["digest"] != now["digest"]:
        changes.append(f"the images are others ({now['images']:,}, were {then['images']:,})")
    changes += differences(_fixed(now["recipe"]), _fixed(then["recipe"]), shared=True)
    if not changes:
        changes = _changed_stages(
            then["recipe"]["stages"], now["recipe"]["stages"], state["step"], now["images_per_step"]
        )
    if changes:
        shown = "; ".join([*changes[:5], *(["..."] if len(changes) > 5 else [])])
        raise CheckpointError(
            f"{path} belongs to a run of another recipe ({shown}). "
            "Resume with the old recipe, or train into another folder."
        )


def _fixed(recipe: dict[str, Any]) -> dict[str, Any]:
    free = _FREE - {"split"} if recipe.get("stream") else _FREE
    fixed = {name: value for name, value in recipe.items() if name not in free}
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
                new = new | {"images": stage["images"]}  # its length has changed nothing so far
            changes += differences(new, stage, f"stages[{i}]", shared=True)
        step -= steps
    return changes
