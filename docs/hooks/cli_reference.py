"""Writes the command reference of the documentation from the parser of `dyntok`."""

import argparse
from typing import Any

from dyntok.cli.main import build_parser

PLACE = "<!-- command reference -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replaces the marker of a page by the reference; mkdocs calls it for every page."""
    return markdown.replace(PLACE, reference()) if PLACE in markdown else markdown


def reference() -> str:
    """Returns one section per command, with its usage and a table for every group of its options."""
    (commands,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    summaries = {action.dest: action.help for action in commands._choices_actions}
    return "\n".join(_section(name, parser, summaries[name]) for name, parser in commands.choices.items())


def _section(name: str, parser: argparse.ArgumentParser, summary: str) -> str:
    formatter = argparse.HelpFormatter(parser.prog, width=76)
    formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups, prefix="")
    lines = [f"## dyntok {name}", "", parser.description or f"{summary[0].upper()}{summary[1:]}.", ""]
    lines += ["```text", formatter.format_help().strip(), "```", ""]
    if parser.epilog:
        lines += ["```text", parser.epilog.strip(), "```", ""]
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        if actions:
            lines += [f"**{_capitalized(group.title)}**", "", "| option | meaning |", "|---|---|"]
            lines += [f"| {_names(action)} | {_meaning(parser, action)} |" for action in actions]
            lines += [""]
    return "\n".join(lines)


def _capitalized(title: str | None) -> str:
    title = title or "options"
    return title[0].upper() + title[1:]


def _names(action: argparse.Action) -> str:
    value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else "")
    names = ", ".join(f"{name} {value}".strip() for name in action.option_strings) or str(value or action.dest)
    return "`" + names.replace("|", "\\|") + "`"


def _meaning(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    return text.replace("|", "\\|").replace("<", "&lt;")
