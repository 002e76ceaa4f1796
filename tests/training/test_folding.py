"""Batch norms folded into the convolutions of the teacher."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from dyntok.training.folding import fold_batch_norms
from dyntok.training.recipe import Teacher
from dyntok.training.teacher import TeacherFeatures, View


def network(name):
    """With statistics that a trained network could have."""
    model = timm.create_model(name, num_classes=0).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return model


def norms(model):
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize(
    "name, left",
    [
        ("mobilenetv2_050", 0),
        ("tf_efficientnet_lite0", 0),
        ("test_efficientnet", 0),
        ("resnet10t", 1),  # pools between one of its convolutions and the norm
    ],
)
def test_norms_vanish_and_features_and_gradients_stay(name, left):
    model = network(name)
    folded = fold_batch_norms(model)
    assert norms(model) > left and norms(folded) == left
    results = []
    for net in (model, folded):
        pixels = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(1)).requires_grad_()
        last, maps = net.forward_intermediates(pixels)
        (sum(x.square().mean() for x in maps) + net.forward_head(last).square().mean()).backward()
        results.append([*maps, pixels.grad])
    for a, b in zip(*results, strict=True):
        assert (a - b).detach().norm() < 1e-3 * a.detach().norm()


class _NormFirst(nn.Module):
    """Defines convolution and norm in one order and calls them in the other."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        nn.init.constant_(self.norm.running_mean, 0.5)

    def forward_intermediates(self, pixels):
        last = self.conv(self.norm(pixels))
        return last, [last]

    def forward_head(self, last):
        return last.mean((2, 3))


def test_a_network_that_calls_them_in_another_order_stays_as_it_is():
    model = _NormFirst().eval()
    assert fold_batch_norms(model) is model and norms(model) == 1


def test_a_network_for_another_size_stays_as_it_is():
    model = timm.create_model("levit_128s", num_classes=0, img_size=128).eval()
    assert fold_batch_norms(model) is model and norms(model) > 0


def test_norms_that_measure_every_batch_stay():
    model = network("test_efficientnet")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_var = None
    assert fold_batch_norms(model) is model


def test_a_network_without_norms_stays_as_it_is():
    model = timm.create_model("test_convnext", num_classes=0).eval()
    assert fold_batch_norms(model) is model


def test_the_teacher_has_no_norms(tmp_path):
    model = network("mobilenetv2_050")
    path = tmp_path / "teacher.safetensors"
    save_file(timm.create_model("mobilenetv2_050").state_dict() | model.state_dict(), path)
    teacher = TeacherFeatures(Teacher("mobilenetv2_050", weights=str(path)), (0.5,) * 3, (0.5,) * 3)
    assert norms(teacher.model) == 0 and not any(p.requires_grad for p in teacher.parameters())
    maps, pooled = teacher(torch.zeros(1, 3, 64, 64), View())
    assert all(x.isfinite().all() for x in (*maps, pooled))
