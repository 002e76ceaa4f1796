"""Frozen dataclasses from the plain values of a YAML file, checked against their annotations.

YAML guesses types, so `lr: 1e-3` is text and `precision: no` is a boolean: such slips are told by name instead of
failing hours later. Ranges are not checked here; the dataclasses do that themselves.
"""

import dataclasses
import math
import re
import typing
from typing import Any, Literal, TypeVar

from dyntok.errors import ConfigError

T = TypeVar("T")

_NUMERAL = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # to people and Python, but not to YAML 1.1
_WANTED = {
    int: "an integer",
    float: "a finite number",
    bool: "true or false",
    str: "text",
    tuple: "a list",
    dict: "a mapping",
}


def build(cls: type[T], values: Any, where: str = "") -> T:
    """An instance of the dataclass `cls`; nested dataclasses are built, lists become tuples where a tuple is annotated.

    where: the path of these values, for messages ("" or "stages[0]"). Raises `ConfigError` on an unknown key or a
    wrong type.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where or 'the recipe'} is {_shown(values)}, expected a mapping")
    prefix = f"{where}." if where else ""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(map(str, set(values) - set(fields)))
    if unknown:
        raise ConfigError(f"unknown {prefix}{', '.join(unknown)}; expected some of {', '.join(fields)}")
    hints = typing.get_type_hints(cls)
    return cls(**{name: _convert(hints[name], value, prefix + name) for name, value in values.items()})


def _convert(expected: Any, value: Any, where: str) -> Any:
    kind, arguments = typing.get_origin(expected) or expected, typing.get_args(expected)
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else build(kind, value, where)
    if kind is Literal:
        if value not in arguments:
            hint = (
                "; YAML reads no, off, yes and on as booleans: put the word in quotes"
                if isinstance(value, bool)
                else ""
            )
            raise ConfigError(f"{where} is {_shown(value)}, expected {' or '.join(map(repr, arguments))}{hint}")
        return value
    accepted = {float: (float, int), tuple: (tuple, list)}.get(kind, kind)
    if (
        not isinstance(value, accepted)
        or (isinstance(value, bool) and kind is not bool)
        or (kind is float and not math.isfinite(value))
    ):
        hint = "; YAML reads 1e-3 as text, write 1.0e-3" if kind is float and _NUMERAL.fullmatch(str(value)) else ""
        raise ConfigError(f"{where} is {_shown(value)}, expected {_WANTED[kind]}{hint}")
    if kind is tuple:
        kinds = [arguments[0]] * len(value) if arguments[-1] is ... else arguments
        if len(kinds) != len(value):
            raise ConfigError(f"{where} has {len(value)} entries, expected {len(kinds)}")
        return tuple(
            _convert(item_kind, item, f"{where}[{i}]")
            for i, (item_kind, item) in enumerate(zip(kinds, value, strict=True))
        )
    return value


def _shown(value: Any) -> str:
    """repr and type, neither too long."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
