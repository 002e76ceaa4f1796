"""Frozen dataclasses from plain values (JSON, YAML), checked against their annotations; and checks that they share.

The annotations decide which types are accepted. Ranges are checked by the dataclasses themselves, with the `require_*`
functions below.
"""

import dataclasses
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, Literal, TypeVar

from dyntok.errors import ConfigError

T = TypeVar("T")

MAX_COUNT = 1 << 24  # codes, channels, ...: configurations may come from strangers
_NUMERAL = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # a number to people and Python, but text to YAML 1.1
_EXPECTED = {
    int: "an integer",
    float: "a finite number",
    bool: "true or false",
    str: "text",
    tuple: "a list",
    dict: "a mapping",
}


def build(cls: type[T], values: Any, where: str = "", *, what: str = "the configuration") -> T:
    """Returns an instance of the dataclass `cls`. Nested dataclasses are built too, and lists become tuples.

    where: the path of these values, for messages, such as "" or "stages[0]". what: the name of the whole, for messages.

    Raises `ConfigError` on an unknown key, a missing key or a value of the wrong type.

    >>> build(DecoderConfig, {"embed_dim": 64}).embed_dim
    64
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where or what} is {_value_and_type(values)}, expected a mapping")
    prefix = f"{where}." if where else ""
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]  # cls is a dataclass
    if unknown := sorted(map(str, set(values) - set(fields))):
        raise ConfigError(f"unknown {prefix}{', '.join(unknown)}; expected some of {', '.join(fields)}")
    missing = [name for name, field in fields.items() if name not in values and not _has_default(field)]
    if missing:
        raise ConfigError(f"{where or what} lacks {', '.join(missing)}; add the missing entries")
    hints = typing.get_type_hints(cls)
    return cls(**{name: _convert(hints[name], value, prefix + name) for name, value in values.items()})


def without_unused(cls: type, values: Any) -> Any:
    """Returns plain values without entries that are None and unknown to the dataclass `cls`.

    Older checkpoints list the parts that they do not have.
    """
    if not isinstance(values, dict):
        return values
    hints, kept = typing.get_type_hints(cls), {}
    for name, value in values.items():
        if name in hints:
            kinds = typing.get_args(hints[name]) or (hints[name],)
            section: Any = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
            kept[name] = value if section is None else without_unused(section, value)
        elif value is not None:
            kept[name] = value
    return kept


def stated(config: Any) -> dict[str, Any]:
    """Returns the values of a dataclass that differ from their defaults, nested dataclasses as dicts."""
    differing = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if value != default:
            differing[field.name] = stated(value) if dataclasses.is_dataclass(value) else value
    return differing


def differences(new: Any, old: Any, where: str = "", *, shared: bool = False) -> list[str]:
    """Returns what differs between two trees of plain values, such as "codebook.size is 4096, was 8192".

    A list equals a tuple. shared: ignore names that only one of the two has, as another version of dyntok may write.
    """
    if isinstance(new, Mapping) and isinstance(old, Mapping):
        prefix = f"{where}." if where else ""
        names = sorted({*new} & {*old} if shared else {*new, *old})
        pairs = [(f"{prefix}{name}", new.get(name), old.get(name)) for name in names]
        return [text for name, now, before in pairs for text in differences(now, before, name, shared=shared)]
    if isinstance(new, list | tuple) and isinstance(old, list | tuple):
        new, old = list(new), list(old)
    return [] if new == old else [f"{where} is {new!r}, was {old!r}"]


def require(condition: bool, message: str) -> None:
    """Raises `ConfigError` with this message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_type(name: str, value: Any, kinds: type | tuple[type, ...], expected: str) -> None:
    """Raises `ConfigError` unless the value is of one of these types."""
    require(isinstance(value, kinds), f"{name} is {_value_and_type(value)}, expected {expected}")


def require_path(name: str, value: Any) -> None:
    """Raises `ConfigError` unless the value is text or an object that stands for a path."""
    require_type(name, value, (str, os.PathLike), "a path")


def require_integer(name: str, value: Any, lowest: int) -> None:
    """Raises `ConfigError` unless the value is an integer, of Python or NumPy, of at least `lowest`."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    require(whole and value >= lowest, f"{name} is {brief(value)}, expected an integer of {lowest} or more")


def require_methods(name: str, value: Any, methods: Sequence[str], expected: str) -> None:
    """Raises `ConfigError` unless the value has these methods."""
    has = all(callable(getattr(value, method, None)) for method in methods)
    require(has, f"{name} is {_value_and_type(value)}, expected {expected}")


def pair_of(values: Any) -> tuple[int, int] | None:
    """Returns two whole numbers, of Python, NumPy or a tensor, as a tuple; None for anything else."""
    given = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(given, tuple | list) or len(given) != 2:
        return None
    whole = all(isinstance(value, Integral) and not isinstance(value, bool) for value in given)
    return (int(given[0]), int(given[1])) if whole else None


def names_of(name: str, values: Any) -> tuple[str, ...]:
    """Returns a list of names as a tuple. Raises `ConfigError` on anything else, such as one text."""
    found = tuple(values) if isinstance(values, Iterable) and not isinstance(values, str | bytes) else (None,)
    require(all(isinstance(each, str) for each in found), f"{name} is {brief(values)}, expected a list of names")
    return found


def require_whole(name: str, value: Any, lowest: int, highest: int = MAX_COUNT) -> None:
    """Raises `ConfigError` unless the value is an int from `lowest` to `highest`."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    expected = f"expected a whole number from {lowest} to {highest}"
    require(whole and lowest <= value <= highest, f"{name} is {brief(value)}, {expected}")


def require_bool(name: str, value: Any) -> None:
    """Raises `ConfigError` unless the value is a bool."""
    require(isinstance(value, bool), f"{name} is {brief(value)}, expected true or false")


def is_number(value: Any) -> bool:
    """Returns whether the value is an int or float of a moderate size. NaN and bools are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_COUNT


def brief(value: Any) -> str:
    """Returns the value for an error message, cut to 80 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print an int of more than 4,300 digits
        return f"a very large {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _convert(expected: Any, value: Any, where: str) -> Any:
    kind: Any = typing.get_origin(expected) or expected
    arguments = typing.get_args(expected)
    if kind in (types.UnionType, typing.Union):
        return _convert_union(arguments, value, where)
    if dataclasses.is_dataclass(kind):
        section: Any = kind
        return value if isinstance(value, section) else build(section, value, where)
    if kind is Literal:
        return _convert_literal(arguments, value, where)
    if kind is Any:
        return value
    if not _is_of_kind(value, kind):
        numeral = kind is float and isinstance(value, str) and _NUMERAL.fullmatch(value)
        hint = "; YAML reads 1e-3 as text, write 1.0e-3" if numeral else ""
        raise ConfigError(f"{where} is {_value_and_type(value)}, expected {_EXPECTED[kind]}{hint}")
    return _convert_items(arguments, value, where) if kind is tuple else value


def _convert_union(members: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in members:
        return None
    *others, last = [member for member in members if member is not type(None)]
    for member in others:
        try:
            return _convert(member, value, where)
        except ConfigError:
            continue
    return _convert(last, value, where)


def _convert_literal(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if value in choices:
        return value
    hint = "; YAML reads no, off, yes and on as booleans: put the word in quotes" if isinstance(value, bool) else ""
    raise ConfigError(f"{where} is {_value_and_type(value)}, expected {' or '.join(map(repr, choices))}{hint}")


def _convert_items(kinds: tuple[Any, ...], values: Any, where: str) -> tuple[Any, ...]:
    kinds = (kinds[0],) * len(values) if kinds[-1] is ... else kinds
    if len(kinds) != len(values):
        raise ConfigError(f"{where} has {len(values)} entries, expected {len(kinds)}")
    pairs = zip(kinds, values, strict=True)
    return tuple(_convert(kind, value, f"{where}[{i}]") for i, (kind, value) in enumerate(pairs))


def _is_of_kind(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float) and -1e300 < value < 1e300  # false for NaN, too
    return isinstance(value, tuple | list) if kind is tuple else isinstance(value, kind)


def _value_and_type(value: Any) -> str:
    return f"{brief(value)} ({type(value).__name__})"
