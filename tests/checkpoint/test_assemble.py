"""Weights and the module that they are for: what fits, and what is refused before anything large is built."""

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules import module as torch_module

import dyntok
from dyntok.checkpoint.assemble import check_state_dict
from dyntok.errors import CheckpointError


@pytest.fixture
def folder(checkpoint_folder, tmp_path):
    """A checkpoint that may be damaged."""
    return shutil.copytree(checkpoint_folder, tmp_path / "checkpoint")


def change_config(folder, section, **values):
    header = json.loads((folder / "config.json").read_text())
    where = header["config"]
    for name in section.split("."):
        where = where[name]
    where.update(values)
    (folder / "config.json").write_text(json.dumps(header))


def change_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize("depth", [20_000, 2**24])
@pytest.mark.parametrize("section", ["merger", "decoder", "backbone.kwargs"])
def test_a_configuration_of_a_far_larger_model_is_refused_at_once(folder, section, depth):
    change_config(folder, section, depth=depth)
    start = time.process_time()
    with pytest.raises(CheckpointError, match="far larger model"):
        dyntok.load(folder)
    assert time.process_time() - start < 5  # building it would take minutes, or forever


def test_widths_of_a_far_larger_model_are_refused_before_memory_is_taken(folder):
    change_config(folder, "codebook", size=2**24, dim=2**20)
    with pytest.raises(CheckpointError, match="of another shape: .*codebook.embedding"):
        dyntok.load(folder)


def test_a_refused_model_leaves_no_hooks(folder):
    change_config(folder, "merger", depth=20_000)
    with pytest.raises(CheckpointError):
        dyntok.load(folder)
    assert not torch_module._global_parameter_registration_hooks
    assert not torch_module._global_module_registration_hooks


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_weights_of_another_type_are_named(folder, dtype):
    change_weights(folder, lambda state: state.update({"projection.bias": state["projection.bias"].to(dtype)}))
    with pytest.raises(CheckpointError, match=rf"1 of another type: projection.bias \(checkpoint {dtype}"):
        dyntok.load(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", ["codebook.embedding", "decoder.in_proj.weight"])
def test_weights_that_are_not_finite_are_refused(folder, name, value):
    change_weights(folder, lambda state: state[name].view(-1)[3:4].fill_(value))
    with pytest.raises(CheckpointError, match=f"NaN or infinite values in 1 tensors: {name}; .*use another checkpoint"):
        dyntok.load(folder)


def test_weights_that_are_infinite_in_float32_are_refused(folder):
    change_weights(folder, lambda state: state.update({"projection.bias": state["projection.bias"].double() + 1e300}))
    with pytest.raises(CheckpointError, match="NaN or infinite values in 1 tensors: projection.bias"):
        dyntok.load(folder)


@pytest.mark.parametrize("heads", [-1, 0, True])
def test_heads_that_timm_builds_but_cannot_run_are_refused(folder, heads):
    change_config(folder, "backbone.kwargs", num_heads=heads)
    with pytest.raises(CheckpointError, match="num_heads"):
        dyntok.load(folder)


def test_large_weights_are_finite(folder):
    change_weights(folder, lambda state: state["pixel_head.proj.bias"].fill_(3e38))  # their sum is infinite in float32
    assert dyntok.load(folder).pixel_head.proj.bias.isfinite().all()


def test_fitting_weights_pass_also_on_meta():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    check_state_dict(model, model.state_dict())
    with torch.device("meta"):
        bare = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    check_state_dict(bare, model.state_dict())


def test_foreign_weights_are_listed():
    model = nn.Sequential(*[nn.Linear(2, 3) for _ in range(8)])
    state = {f"x{i}": torch.zeros(1) for i in range(7)} | {"0.weight": torch.zeros(3, 5)}
    with pytest.raises(CheckpointError) as caught:
        check_state_dict(model, state)
    text = str(caught.value)
    assert "15 missing: 0.bias, 1.weight, 1.bias, 2.weight, 2.bias and 10 more" in text
    assert "7 not expected: x0, x1, x2, x3, x4 and 2 more" in text
    assert "1 of another shape: 0.weight (checkpoint [3, 5], model [3, 2])" in text
