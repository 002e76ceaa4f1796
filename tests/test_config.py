"""Configurations: what they take, what they refuse, and that they survive JSON. They may come from strangers."""

import json
import math

import pytest

from dyntok.config import (
    PRESETS,
    BackboneConfig,
    CodebookConfig,
    DecoderConfig,
    MergerConfig,
    TokenizerConfig,
)
from dyntok.errors import ConfigError

HUGE = 10**400  # no float is so large
ENDLESS = 10**5000  # and Python doesn't even write this one


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    config = TokenizerConfig.preset(name)
    again = TokenizerConfig.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False)))
    assert again == config and hash(again.image) == hash(config.image)


def test_sections_that_are_null_where_they_must_not_be():
    with pytest.raises(ConfigError, match=r"^backbone is None \(NoneType\), expected a mapping"):
        TokenizerConfig.from_dict({"backbone": None})


def test_out_dim_needs_a_head():
    with pytest.raises(ConfigError, match="decoder.out_dim needs decoder.head: mlp"):
        DecoderConfig(out_dim=8, head="none")


def test_stated_leaves_defaults_out():
    assert TokenizerConfig().stated() == {}
    config = TokenizerConfig(backbone=BackboneConfig(layer=3), codebook=CodebookConfig(size=64), decoder=None)
    assert config.stated() == {"backbone": {"layer": 3}, "codebook": {"size": 64}, "decoder": None}


def test_sections_and_values_may_be_left_out():
    config = TokenizerConfig.from_dict({"codebook": {"size": 64}, "decoder": {"embed_dim": None}})
    assert (
        config.codebook == CodebookConfig(size=64)
        and config.merger == MergerConfig()
        and config.decoder.embed_dim is None
    )


@pytest.mark.parametrize(
    "values, message",
    [
        ([], r"the configuration is \[\] \(list\), expected a mapping"),
        ({"codebok": {}}, "unknown codebok; expected some of image, backbone"),
        ({"codebook": {"sizes": 3}}, "unknown codebook.sizes; expected some of size, dim"),
        ({"codebook": 3}, r"codebook is 3 \(int\), expected a mapping"),
        ({1: {}}, "unknown 1"),
    ],
    ids=str,
)
def test_unknown_parts_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        TokenizerConfig.from_dict(values)


def test_unknown_presets_are_named():
    with pytest.raises(ConfigError, match="there is no preset 'huge'; expected one of tiny, flex, small, lavit"):
        TokenizerConfig.preset("huge")


@pytest.mark.parametrize(
    "section, values",
    [
        ("image", {"img_size": 0}),
        ("image", {"img_size": 1.5}),
        ("image", {"img_size": "224"}),
        ("image", {"img_size": True}),
        ("image", {"img_size": 10**6}),
        ("image", {"img_size": HUGE}),
        ("image", {"img_size": ENDLESS}),
        ("image", {"resize": "stretch"}),
        ("image", {"mean": 0.5}),
        ("image", {"mean": "abc"}),
        ("image", {"mean": [0.5, 0.5]}),
        ("image", {"mean": [0.5, 0.5, None]}),
        ("image", {"mean": [0.5, 0.5, HUGE]}),
        ("image", {"mean": [0.5, 0.5, ENDLESS]}),
        ("image", {"mean": [0.5, 0.5, math.nan]}),
        ("image", {"std": [0.5, 0.5, math.inf]}),
        ("image", {"std": [0.5, 0.5, 0.0]}),
        ("image", {"std": [0.5, -0.5, 0.5]}),
        ("backbone", {"layer": 1.0}),
        ("backbone", {"norm": "false"}),
        ("backbone", {"frozen": 1}),
        ("selector", {"dither": -0.5}),
        ("selector", {"dither": "much"}),
        ("selector", {"dither": math.nan}),
        ("selector", {"dither": HUGE}),
        ("selector", {"first": -0.5}),
        ("selector", {"first": "much"}),
        ("selector", {"first": 1.0}),  # without a fixed dither
        ("merger", {"depth": -1}),
        ("merger", {"depth": 2.0}),
        ("merger", {"num_heads": 0}),
        ("merger", {"mlp_ratio": 0}),
        ("merger", {"mlp_ratio": math.inf}),
        ("merger", {"mlp_ratio": HUGE}),
        ("merger", {"norm": None}),
        ("merger", {"init_scale": "small"}),
        ("codebook", {"size": 0}),
        ("codebook", {"size": HUGE}),
        ("codebook", {"dim": -4}),
        ("codebook", {"projection": "conv"}),
        ("decoder", {"embed_dim": 0}),
        ("decoder", {"placement": "anywhere"}),
        ("decoder", {"head": "linear"}),
        ("decoder", {"conv": "yes"}),
        ("decoder", {"pixels": 1}),
        ("decoder", {"init_scale": math.nan}),
    ],
    ids=lambda value: str(list(value)[0]) if isinstance(value, dict) else value,
)
def test_senseless_values_are_named_whichever_door_they_come_through(section, values):
    (name,) = values
    with pytest.raises(ConfigError, match=rf"^{section}\.{name}(\[\d\])? (is|has) "):
        TokenizerConfig.from_dict({section: values})
    part = type(getattr(TokenizerConfig(), section))
    with pytest.raises(ConfigError, match=f"{section}.{name} "):
        part(**values)


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_224", "vit_base_patch16_224.augreg_in21k", "eva02_tiny_patch14_224.mim_in22k", "a-b"]
)
def test_backbones_are_named_as_in_timm(name):
    assert BackboneConfig(name).name == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "hf-hub:stranger/model",
        "hf_hub:stranger/model",
        "hf-hub:model",
        "local-dir:/etc",
        "local-dir:model",
        "timm/vit_small_patch16_224",
        "https://example.org/vit",
        "../vit",
        "..\\vit",
        "vit small",
        "vit\n",
        "vit" * 100,
        None,
        5,
    ],
    ids=lambda name: repr(name)[:30],
)
def test_other_sources_of_backbones_are_refused(name):
    with pytest.raises(ConfigError, match="backbone.name is .*expected the plain name of a timm model"):
        BackboneConfig(name)


@pytest.mark.parametrize("value", [4, 0.1, -1, True, None, "avg", [2, 2, 6, 2], (1, 0.5), []], ids=str)
def test_plain_options_of_backbones_are_taken(value):
    assert BackboneConfig(kwargs={"option": value}).kwargs == {"option": value}


@pytest.mark.parametrize(
    "value",
    [
        {"url": "x"},
        [[1]],
        ["a"],
        [True],
        {1},
        print,
        "x" * 65,
        b"avg",
        math.nan,
        math.inf,
        HUGE,
        ENDLESS,
        [ENDLESS],
        [1] * 65,
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_options_of_backbones_are_refused(value):
    with pytest.raises(
        ConfigError, match="backbone.kwargs.option is .*expected a number, bool, short text or list of numbers"
    ):
        BackboneConfig(kwargs={"option": value})


@pytest.mark.parametrize(
    "option",
    [
        "cache_dir",
        "checkpoint_path",
        "exportable",
        "feature_cfg",
        "features_only",
        "model_cfg",
        "num_classes",
        "out_indices",
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "pretrained_custom_load",
        "pretrained_strict",
        "scriptable",
    ],
)
def test_options_that_reach_for_files_or_the_network_are_refused(option):
    with pytest.raises(ConfigError, match=f"backbone.kwargs has '{option}', which a configuration may not set"):
        TokenizerConfig.from_dict({"backbone": {"kwargs": {option: 1}}})


@pytest.mark.parametrize("kwargs", [None, "depth=3", [1], {3: 4}], ids=str)
def test_options_of_backbones_are_a_mapping_from_names(kwargs):
    with pytest.raises(ConfigError, match="backbone.kwargs"):
        BackboneConfig(kwargs=kwargs)


def test_a_preset_can_be_changed_without_changing_others():
    TokenizerConfig.preset("tiny").backbone.kwargs["depth"] = 1
    assert TokenizerConfig.preset("tiny").backbone.kwargs["depth"] == 4
    given = {"img_size": 128}
    config = BackboneConfig(kwargs=given)
    given["checkpoint_path"] = "/etc/x"
    assert config.kwargs == {"img_size": 128}
