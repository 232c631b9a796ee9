"""Parts of documents that a benchmark writes, between two marks; the first names the command."""

from __future__ import annotations

import re

END = "<!-- end of table -->\n"


def start(command: str) -> str:
    return f"<!-- {command} -->\n"


def marked(text: str, command: str) -> str:
    """What stands between the marks of a command.

    Raises:
        ValueError: there are none.
    """
    found = re.search(f"{re.escape(start(command))}(.*?){re.escape(END)}", text, re.DOTALL)
    if found is None:
        raise ValueError(f"no table between {start(command).strip()!r} and {END.strip()!r}")
    return found[1]


def replace_marked(text: str, command: str, new: str) -> str:
    """The text with something else between the marks."""
    old = marked(text, command)
    return text.replace(f"{start(command)}{old}{END}", f"{start(command)}{new}{END}")
