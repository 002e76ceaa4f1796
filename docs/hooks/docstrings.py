"""Turns dyntok's docstrings into Markdown: argument lines become lists, and `>>>` examples become code blocks.

The comment at the end of a field's line is the docstring of that field.
"""

import re
from typing import Any

import griffe

_FIELD = re.compile(r" {4}\w+: ")
_COMMENT = re.compile(r"^[^#]*  # (?!type:|noqa)(?P<text>.+)", re.MULTILINE)
_ARGUMENTS = re.compile(r"(?P<names>\w+(?:, \w+)*)(?:: |  +)(?P<text>\S.*)")


class MarkdownDocstrings(griffe.Extension):
    """A griffe extension that rewrites every docstring that it meets."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Gives a field its comment, if it has one and nothing else is said of it."""
        if attr.docstring is None and attr.parent and attr.parent.is_class and attr.lineno and attr.endlineno:
            lines = attr.lines_collection[attr.filepath][attr.lineno - 1 : attr.endlineno]
            match = _COMMENT.search("\n".join(lines))
            if match and _FIELD.match(lines[0]):
                attr.docstring = griffe.Docstring(match["text"], parent=attr)


def to_markdown(text: str) -> str:
    """Returns the docstring with lists and fenced examples; other paragraphs stay as they are."""
    return "\n\n".join(_paragraph(lines.strip("\n")) for lines in re.split(r"\n\s*\n", text))


def _paragraph(paragraph: str) -> str:
    lines = paragraph.split("\n")
    if lines[0].lstrip().startswith(">>>"):
        return "\n".join(["```python", *map(_without_prompt, lines), "```"])
    if all(_ARGUMENTS.fullmatch(line) or line.startswith(" ") for line in lines):
        return "\n".join(map(_item, lines))
    return paragraph


def _without_prompt(line: str) -> str:
    line = line.strip()
    return line[4:] if line.startswith((">>> ", "... ")) else f"# {line}"


def _item(line: str) -> str:
    match = _ARGUMENTS.fullmatch(line)
    return f"* `{match['names']}`: {match['text']}" if match else f"  {line.strip()}"
