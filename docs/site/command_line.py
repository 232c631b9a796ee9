"""Writes the commands and their flags, as their parsers have them, into the page of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

from gkt_fast.cli import COMMANDS, command_parser

PAGE = "reference/command-line.md"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if page.file.src_uri != PAGE:
        return markdown
    return "\n".join([markdown, *(line for name in COMMANDS for line in command(name))])


def command(name: str) -> Iterator[str]:
    """A section: what the command does, how it is called, a table for each group of flags."""
    parser = command_parser(name)
    yield f"## {name}\n"
    yield f"{parser.description}\n"
    yield f"```text\n{parser.format_usage().removeprefix('usage: ').strip()}\n```\n"
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
        actions = [action for action in actions if not isinstance(action, argparse._HelpAction)]
        if actions:
            if group.title not in ("options", "positional arguments"):
                yield f"**{group.title}**\n"
            yield "| flag | effect |\n| --- | --- |"
            yield from (row(parser, action) for action in actions)
            yield ""


def row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    formatter = parser._get_formatter()
    flag = formatter._format_action_invocation(action)
    return f"| `{escaped(flag)}` | {escaped(formatter._expand_help(action))} |"


def escaped(text: str) -> str:
    """Pipes would end the cell of a table."""
    return text.replace("|", "\\|")
