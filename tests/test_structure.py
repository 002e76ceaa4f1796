"""Dataclasses from plain values: what is built, and which slips are named with their place."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from dyntok.config import DecoderConfig, TokenizerConfig
from dyntok.errors import ConfigError
from dyntok.structure import build, differences, stated, without_unused


@dataclass(frozen=True)
class Part:
    size: int
    scale: float = 1.0
    mode: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Whole:
    part: Part | None = None
    parts: tuple[Part, ...] = ()
    pair: tuple[int, float] = (1, 1.0)
    limit: int | float | None = None
    options: dict[str, Any] = field(default_factory=dict)


def test_nested_values_are_built():
    values = {"part": {"size": 3}, "parts": [{"size": 1}, {"size": 2, "mode": "b"}], "pair": [2, 3], "limit": 0.5}
    assert build(Whole, values) == Whole(Part(3), (Part(1), Part(2, mode="b")), (2, 3), 0.5)
    assert build(Whole, {"part": None, "limit": None}) == Whole() and build(Whole, {"part": Part(3)}).part == Part(3)


def test_sections_may_be_built_alone():
    assert build(DecoderConfig, {"embed_dim": 64}).embed_dim == 64
    assert build(DecoderConfig, {"embed_dim": None, "depth": 2}, "decoder") == DecoderConfig(depth=2)


@pytest.mark.parametrize(
    "values, message",
    [
        ([], r"^the configuration is \[\] \(list\), expected a mapping"),
        ({"prat": {}}, "^unknown prat; expected some of part, parts"),
        ({"part": 3}, r"^part is 3 \(int\), expected a mapping"),
        ({"part": {}}, "^part lacks size; add the missing entries"),
        ({"part": {"size": 1, "sise": 2}}, "^unknown part.sise; expected some of size, scale, mode"),
        ({"part": {"size": "1"}}, r"^part.size is '1' \(str\), expected an integer"),
        ({"part": {"size": True}}, r"^part.size is True \(bool\), expected an integer"),
        ({"part": {"size": 1, "scale": "1e-3"}}, "^part.scale is '1e-3' .*YAML reads 1e-3 as text, write 1.0e-3"),
        ({"part": {"size": 1, "scale": float("nan")}}, "^part.scale is nan .*expected a finite number"),
        ({"part": {"size": 1, "scale": 10**5000}}, "^part.scale is a very large int"),
        ({"part": {"size": 1, "mode": "c"}}, r"^part.mode is 'c' \(str\), expected 'a' or 'b'"),
        ({"part": {"size": 1, "mode": False}}, "^part.mode is False .*YAML reads no, off, yes and on as booleans"),
        ({"parts": [{"size": 1}, {"size": None}]}, r"^parts\[1\].size is None \(NoneType\), expected an integer"),
        ({"pair": [1]}, "^pair has 1 entries, expected 2"),
        ({"pair": [1, "x"]}, r"^pair\[1\] is 'x'"),
        ({"limit": "much"}, "^limit is 'much'"),
        ({"options": []}, r"^options is \[\] \(list\), expected a mapping"),
    ],
)
def test_slips_are_named_with_their_place(values, message):
    with pytest.raises(ConfigError, match=message):
        build(Whole, values)


def test_the_whole_and_its_place_can_be_named():
    with pytest.raises(ConfigError, match="^the recipe is 3"):
        build(Whole, 3, what="the recipe")
    with pytest.raises(ConfigError, match=r"^stages\[0\].part.size is"):
        build(Whole, {"part": {"size": 1.5}}, "stages[0]")


def test_stated_values_are_those_that_differ():
    assert stated(Whole()) == {} and stated(Whole(Part(3, mode="b"))) == {"part": {"size": 3, "mode": "b"}}
    assert stated(TokenizerConfig.preset("tiny"))["codebook"] == {"size": 8192, "dim": 16, "projection": "linear"}


def test_unknown_values_are_dropped_only_where_they_are_null():
    assert without_unused(Whole, {"old": None, "part": {"size": 1, "old": None}, "limit": None}) == {
        "part": {"size": 1},
        "limit": None,
    }
    assert without_unused(Whole, {"old": 1}) == {"old": 1} and without_unused(Whole, 3) == 3


def test_differences_of_two_trees():
    old = {"a": 1, "b": {"c": [1, 2], "d": "x"}, "only_old": 1}
    new = {"a": 2, "b": {"c": (1, 2), "d": "y"}, "only_new": 3}
    shared = ["a is 2, was 1", "b.d is 'y', was 'x'"]
    assert differences(new, old, shared=True) == shared
    assert differences(new, old) == [*shared, "only_new is 3, was None", "only_old is None, was 1"]
    assert differences({"c": [1]}, {"c": (1, 2)}, "b") == ["b.c is [1], was [1, 2]"]
