"""Rules in the words of engines: xgrammar's EBNF, llguidance's Lark, llama.cpp's GBNF, and regular expressions.

The first two name ids, and hold every rule. The other two see the spelling of tokens, such as `<|v:0017|>`. Text is
then any text without `<|` that does not end with `<`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from dyntok.errors import ConfigError
from dyntok.ids import END_TOKEN, START_TOKEN, IdRange, IdRanges
from dyntok.llm.rules import CODE, TEXT, Alt, Ids, Language, Node, Ref, Repeat, Seq


@dataclass(frozen=True)
class _Dialect:
    """How rules are written."""

    ids: Callable[[Ids], str]
    arrow: str = "::="
    root: str = "root"
    nothing: str = '""'

    def write(self, language: Language, given: dict[str, str]) -> str:
        """Returns all rules, one a line. given: rules that are written already."""
        lines = []
        for name, node in language.rules.items():
            lines.append(f"{self._name(name)} {self.arrow} {given.get(name) or self.show(node)}")
        return "\n".join(lines) + "\n"

    def show(self, node: Node) -> str:
        """Returns one rule's right side; choices stand in parentheses."""
        if isinstance(node, Ids):
            return self.ids(node)
        if isinstance(node, Ref):
            return self._name(node.name)
        if isinstance(node, Alt):
            return f"({' | '.join(map(self.show, node.parts))})"
        if isinstance(node, Seq):
            return " ".join(map(self.show, node.parts)) or self.nothing
        part = self.show(node.part)
        return (f"({part})" if isinstance(node.part, Seq) else part) + _times(node)

    def _name(self, name: str) -> str:
        return self.root if name == "root" else name


def _times(node: Repeat) -> str:
    short = {(0, None): "*", (1, None): "+", (0, 1): "?"}.get((node.low, node.high))
    if short:
        return short
    high = "" if node.high is None else node.high
    return f"{{{node.low}}}" if node.low == node.high else f"{{{node.low},{high}}}"


def to_xgrammar(language: Language) -> str:
    """Returns EBNF whose terminals are ids, for `xgrammar.Grammar.from_ebnf`."""

    def ids(node: Ids) -> str:
        return f"Token({', '.join(str(id) for low, stop in node.ranges for id in range(low, stop))})"

    return _Dialect(ids).write(language, {})


def to_lark(language: Language) -> str:
    """Returns a Lark grammar whose terminals are ranges of ids, for llguidance."""

    def ids(node: Ids) -> str:
        return f"<[{','.join(f'{low}-{stop - 1}' for low, stop in node.ranges)}]>"

    return _Dialect(ids, ":", "start").write(language, {})


def to_gbnf(language: Language) -> str:
    """Returns GBNF over the spelling of tokens, for llama.cpp."""
    dialect = _Dialect(lambda node: _GBNF.spelled(node, language.vocab))
    return dialect.write(language, {"text": '[^<] | "<"+ [^<|]'})


def to_regex(language: Language) -> str:
    """Returns a regular expression over the spelling of tokens, for outlines.

    Raises `ConfigError` on map and position tokens: how they belong together is beyond a regular expression of
    reasonable size.
    """
    if language.vocab.layout in ("map", "positions"):
        raise ConfigError(
            f"a regular expression can't hold the layout {language.vocab.layout!r}; "
            "use to_xgrammar() or to_lark(), or a vocabulary with the layout 'lattice' or 'none'"
        )

    def show(node: Node) -> str:
        if node == TEXT:
            return "(?:[^<]|<+[^<|])"
        if isinstance(node, Ids):
            return _REGEX.spelled(node, language.vocab)
        if isinstance(node, Ref):
            return f"(?:{show(language.rules[node.name])})" if node != CODE else show(language.rules["code"])
        if isinstance(node, Alt):
            return f"(?:{'|'.join(map(show, node.parts))})"
        if isinstance(node, Seq):
            return "".join(map(show, node.parts))
        return f"(?:{show(node.part)}){_times(node)}"

    return show(language.rules["root"])


@dataclass(frozen=True)
class _Characters:
    """Tokens as patterns of characters."""

    quote: Callable[[str], str]
    space: str
    group: str  # what opens one

    def spelled(self, node: Ids, vocab: IdRanges) -> str:
        """Returns a pattern for the tokens of ids as text."""
        choices = []
        for id, token in ((vocab.image_start, START_TOKEN), (vocab.image_end, END_TOKEN)):
            if any(low <= id < stop for low, stop in node.ranges):
                choices.append(self.quote(token))
        for part in vocab.ranges:
            numbers = [
                id - part.offset + part.first
                for low, stop in node.ranges
                for id in range(max(low, part.offset), min(stop, part.stop))
            ]
            if numbers:
                choices.append(self._numbered(part, numbers))
        return self._either(choices)

    def _numbered(self, part: IdRange, numbers: list[int]) -> str:
        head, tail = part.spell(0).split("0", 1)[0], "|>"
        digits = frozenset(part.spell(number)[len(head) : -len(tail)] for number in numbers)
        return self.space.join((self.quote(head), self._digits(digits), self.quote(tail)))

    def _digits(self, numbers: frozenset[str]) -> str:
        """Returns decimal numbers of equal length, digit by digit."""
        following: dict[str, set[str]] = {}
        for number in numbers:
            following.setdefault(number[0], set()).add(number[1:])
        by_rest: dict[frozenset[str], str] = {}
        for digit in sorted(following):
            rest = frozenset(following[digit])
            by_rest[rest] = by_rest.get(rest, "") + digit
        return self._either(
            [
                _one_of(first) + ("" if rest == {""} else self.space + self._digits(rest))
                for rest, first in by_rest.items()
            ]
        )

    def _either(self, choices: list[str]) -> str:
        return choices[0] if len(choices) == 1 else f"{self.group}{'|'.join(choices)})"


_GBNF, _REGEX = _Characters('"{}"'.format, " ", "("), _Characters(re.escape, "", "(?:")


def _one_of(digits: str) -> str:
    whole = len(digits) > 2 and int(digits[-1]) - int(digits[0]) == len(digits) - 1
    return f"[{digits[0]}-{digits[-1]}]" if whole else f"[{digits}]"
