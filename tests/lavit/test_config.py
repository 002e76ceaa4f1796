"""The configuration of LaVIT's tokenizer: its own sections, and that they survive JSON."""

import json

import pytest

from dyntok.errors import ConfigError
from dyntok.lavit.config import ConditioningConfig, LavitConfig, LavitDecoderConfig


def test_sections_survive_json():
    conditions = {"embed_dims": [8, 16], "pooled_dim": 16, "folder": "highres"}
    config = LavitConfig.from_dict(
        {"decoder": None, "highres_decoder": {"depth": 3, "conditions": conditions}, "understanding_dim": 7}
    )
    assert config.decoder is None and config.understanding_dim == 7
    made = ConditioningConfig((8, 16), pooled_dim=16, folder="highres")
    assert config.highres_decoder == LavitDecoderConfig(depth=3, conditions=made)
    assert LavitConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.stated()["understanding_dim"] == 7


@pytest.mark.parametrize("folder", ["../unet", "a/b", "", ".", "x" * 65, 3, "unet\n"], ids=repr)
def test_a_folder_of_a_configuration_stays_next_to_it(folder):
    with pytest.raises(ConfigError, match="expected the plain name of a folder"):
        ConditioningConfig(folder=folder)


@pytest.mark.parametrize(
    "options",
    [{"embed_dims": []}, {"embed_dims": [0]}, {"embed_dims": 768}, {"pooled_dim": 0}, {"num_heads": 0}],
    ids=str,
)
def test_wrong_conditions_are_named(options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"conditions.{name} "):
        ConditioningConfig(**options)
    with pytest.raises(ConfigError, match=f"decoder.conditions.{name} |^conditions.{name} "):
        LavitConfig.from_dict({"decoder": {"conditions": options}})


def test_other_wrong_values_are_named():
    with pytest.raises(ConfigError, match="unknown decoder.conditions.dims"):
        LavitConfig.from_dict({"decoder": {"conditions": {"dims": [8]}}})
    with pytest.raises(ConfigError, match="understanding_dim is 0"):
        LavitConfig(understanding_dim=0)
    with pytest.raises(ConfigError, match="expected one way to make images"):
        LavitDecoderConfig(pixels=True, conditions=ConditioningConfig())
    with pytest.raises(ConfigError, match="only the decoder can have a pixel head"):
        LavitConfig(highres_decoder=LavitDecoderConfig(pixels=True))
