"""Backbones: timm models of several kinds against timm itself, weights from files, and LaVIT's own numbers."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from dyntok.config import BackboneConfig
from dyntok.errors import CheckpointError, ConfigError
from dyntok.model.backbone import Backbone, load_timm_weights

VIT = dict(name="vit_tiny_patch16_224", kwargs=dict(img_size=64, patch_size=8, embed_dim=48, depth=3, num_heads=3))
WITHOUT_CLASS_TOKEN = dict(VIT, kwargs=VIT["kwargs"] | dict(class_token=False, global_pool="avg"))
MOBILE = dict(name="mobilenetv2_035", kwargs=dict(pad_type="same"))
SWIN = dict(
    name="swin_tiny_patch4_window7_224",
    kwargs=dict(img_size=64, window_size=4, embed_dim=24, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8]),
)


def new_backbone(source, img_size=64, **options):
    torch.manual_seed(0)
    return Backbone(BackboneConfig(**source, **options), img_size)


def direct(source, pixels, layer, norm):
    """What timm gives when asked directly, with the same random weights: [B, D, h, w]."""
    torch.manual_seed(0)
    model = timm.create_model(source["name"], num_classes=0, **source["kwargs"]).eval()
    with torch.no_grad():
        return model.forward_intermediates(
            pixels, indices=[layer], norm=norm, output_fmt="NCHW", intermediates_only=True
        )[0]


@pytest.mark.parametrize(
    "source, layer, norm, img_size, grid, width",
    [
        (VIT, -1, False, 64, (8, 8), 48),
        (VIT, 0, False, 64, (8, 8), 48),
        (VIT, -1, True, 64, (8, 8), 48),
        (WITHOUT_CLASS_TOKEN, 1, False, 64, (8, 8), 48),
        (MOBILE, -1, False, 64, (2, 2), 112),
        (MOBILE, 3, False, 64, (4, 4), 32),
        (MOBILE, -2, False, 72, (5, 5), 32),  # 72 / 16 is no whole number: the last patches reach over the edge
        (MOBILE, 1, False, 64, (16, 16), 8),
        (SWIN, 1, False, 64, (8, 8), 48),
    ],
    ids=lambda value: value["name"].split("_")[0] if isinstance(value, dict) else None,
)
def test_features_are_those_of_timm(source, layer, norm, img_size, grid, width):
    backbone = new_backbone(source, img_size, layer=layer, norm=norm).eval()
    assert backbone.grid == grid and backbone.embed_dim == width
    pixels = torch.randn(2, 3, img_size, img_size)
    with torch.no_grad():
        features = backbone(pixels)
    expected = direct(source, pixels, backbone.layer, norm)
    assert expected.shape[2:] == grid
    assert features.shape == (2, grid[0] * grid[1], width)
    for row in range(grid[0]):  # patches in raster order
        assert_close(features[:, row * grid[1] : (row + 1) * grid[1]], expected[:, :, row].transpose(1, 2))


def test_layers_behind_the_chosen_one_are_not_kept():
    whole, cut = new_backbone(VIT), new_backbone(VIT, layer=0)
    assert len(whole.model.blocks) == 3 and len(cut.model.blocks) == 1
    assert not any("norm." in name and name.startswith("norm") for name in cut.model.state_dict())
    assert "norm.weight" in new_backbone(VIT, norm=True).model.state_dict()


def test_a_frozen_backbone_stays_as_it_is():
    backbone = new_backbone(MOBILE)
    assert not backbone.training and not any(p.requires_grad for p in backbone.parameters())
    assert not any(module.training for module in backbone.train().modules())
    holder = torch.nn.Sequential(backbone, torch.nn.Linear(2, 2)).train()
    assert holder[1].training and not any(module.training for module in backbone.modules())
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    backbone(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())


def test_a_trained_backbone_learns_and_changes_its_mode():
    backbone = new_backbone(MOBILE, frozen=False)
    assert all(module.training for module in backbone.train().modules())
    means = backbone.model.bn1.running_mean.clone()
    backbone(torch.randn(2, 3, 64, 64) + 1).square().mean().backward()
    assert not torch.equal(means, backbone.model.bn1.running_mean)
    used = dict(backbone.model.named_parameters())
    assert used["conv_stem.weight"].grad.abs().sum() > 0
    assert not any(module.training for module in backbone.eval().modules())


@pytest.mark.parametrize(
    "source, options, message",
    [
        (dict(name="no_such_model"), {}, "timm can't make the backbone 'no_such_model'"),
        (dict(VIT, kwargs=dict(no_such_option=3)), {}, "no_such_option"),
        (dict(VIT, kwargs=dict(num_heads=0)), {}, "num_heads is 0, expected a whole number"),
        (dict(VIT, kwargs=dict(num_heads=[3, -1])), {}, "num_heads is -1, expected a whole number"),
        (dict(VIT, kwargs=dict(embed_dim=50, num_heads=3)), {}, "timm can't make the backbone"),
        (VIT, {"layer": 3}, "backbone.layer is 3, but vit_tiny_patch16_224 has 3 layers"),
        (VIT, {"layer": -4}, "backbone.layer is -4, but"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_can_not_be_made_is_a_configuration_error(source, options, message):
    with pytest.raises(ConfigError, match=message):
        new_backbone(source, **options)


def test_a_model_without_intermediate_features_is_a_configuration_error(monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: torch.nn.Identity())
    with pytest.raises(
        ConfigError,
        match="'vit_tiny_patch16_224' gives no intermediate features; choose one with forward_intermediates",
    ):
        new_backbone(VIT)


def test_an_image_size_that_the_patches_do_not_divide_is_explained():
    source = dict(VIT, kwargs=VIT["kwargs"] | {"img_size": 60})
    backbone = new_backbone(source, 60)
    with pytest.raises(ConfigError, match="gives 7 x 7 patches instead of 8 x 8; choose image sides divisible by 8"):
        backbone(torch.randn(1, 3, 60, 60))


# Weights from a file.


@pytest.fixture
def weights(tmp_path):
    """A safetensors file with the whole model as timm makes it, classifier included, from other random weights."""
    torch.manual_seed(5)
    model = timm.create_model(VIT["name"], **VIT["kwargs"])
    path = tmp_path / "vit.safetensors"
    save_file(model.state_dict(), path)
    return path, model.state_dict()


def test_weights_come_from_a_file(weights):
    path, state = weights
    backbone = new_backbone(VIT, layer=1)
    assert not torch.equal(backbone.model.pos_embed, state["pos_embed"])
    backbone.load_weights(path)
    own = backbone.model.state_dict()
    assert "blocks.1.mlp.fc2.weight" in own and all(torch.equal(tensor, state[name]) for name, tensor in own.items())


def test_weights_that_do_not_fit_are_refused_and_change_nothing(weights, tmp_path):
    _, state = weights
    model = new_backbone(VIT).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    partial = {name: tensor for name, tensor in state.items() if not name.startswith("blocks.2.norm1")}
    other = state | {"pos_embed": torch.zeros(1, 3, 48), "cls_token": torch.zeros(1, 1, 2)}
    for wrong, message in (
        (partial, r"2 tensors missing, 0 of another shape \(first: blocks.2.norm1.weight, blocks.2.norm1.bias\)"),
        (other, r"0 tensors missing, 2 of another shape \(first: cls_token, pos_embed\)"),
    ):
        path = tmp_path / "wrong.safetensors"
        save_file(wrong, path)
        with pytest.raises(CheckpointError, match=message) as caught:
            load_timm_weights(model, path)
        assert str(path) in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("content", [None, b"", b"no weights at all" * 10], ids=["missing", "empty", "text"])
def test_unreadable_weights_are_a_checkpoint_error(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match="can't read the backbone's weights .*weights.safetensors"):
        new_backbone(VIT).load_weights(path)


# LaVIT's own numbers.


def test_timms_eva_gives_lavits_features(parity, tmp_path):
    config = parity.config
    kwargs = dict(
        img_size=config["grid"] * config["patch"],
        patch_size=config["patch"],
        embed_dim=config["dim"],
        depth=config["vit_depth"],
        num_heads=config["vit_heads"],
    )
    backbone = Backbone(BackboneConfig("eva_giant_patch14_clip_224", kwargs), kwargs["img_size"])
    save_file(parity.weights("eva_vitg_psz14.bin/", {}), tmp_path / "eva.safetensors")
    backbone.load_weights(tmp_path / "eva.safetensors")
    with torch.no_grad():
        assert parity.error("io/backbone_features", backbone(parity["io/pixels"])) < 1e-4


def test_another_image_size_than_the_network_was_made_for_is_told():
    with pytest.raises(
        ConfigError,
        match=r"image.img_size is 160, but vit_tiny_patch16_224 takes 224 x 224; set backbone.kwargs.img_size",
    ):
        Backbone(BackboneConfig(name="vit_tiny_patch16_224"), 160)


def test_a_hub_that_can_not_be_reached_is_told(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("timm.create_model", unreachable)
    with pytest.raises(CheckpointError, match="can't fetch the weights of resnet18: no network"):
        Backbone(BackboneConfig(name="resnet18"), 64, pretrained=True)
