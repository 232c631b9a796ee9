"""What the documents of this repository tell their readers to type, and what it names."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Block:
    """A fenced code block: its language, its text, and the line of the file that its first line is."""

    language: str
    text: str
    line: int


@dataclass(frozen=True)
class Command:
    """A shell command: its words, the variables set in front of it, and its line."""

    words: tuple[str, ...]
    variables: tuple[tuple[str, str], ...]
    line: int

    def __str__(self) -> str:
        return shlex.join(self.words)


def fenced_blocks(text: str) -> list[Block]:
    """All code blocks between lines of three backticks."""
    blocks, lines, start = [], text.splitlines(), None
    for number, line in enumerate(lines, start=1):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
        else:
            content = "".join(f"{inner}\n" for inner in lines[start : number - 1])
            blocks.append(Block(lines[start - 1][3:].strip(), content, start + 1))
            start = None
    if start is not None:
        raise ValueError(f"line {start}: the code block is not closed")
    return blocks


def shell_commands(block: Block) -> list[Command]:
    """The commands of a block: without prompts and comments, lines that end in a backslash joined, && split."""
    commands, pending, first = [], "", block.line
    for number, line in enumerate(block.text.splitlines(), start=block.line):
        first = first if pending else number
        pending += line.removeprefix("$ ")
        if pending.endswith("\\"):
            pending = pending[:-1] + " "
            continue
        lexer = shlex.shlex(pending, posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, "&&"]:
            if word != "&&":
                words.append(word)
                continue
            names = [w.split("=", 1) for w in words if re.match(r"\w+=", w)]
            count = next((i for i, w in enumerate(words) if not re.match(r"\w+=", w)), len(words))
            if words[count:]:
                commands.append(Command(tuple(words[count:]), tuple(map(tuple, names[:count])), first))
            words = []
        pending = ""
    return commands


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def extras() -> set[str]:
    section = re.search(
        r"^\[project.optional-dependencies\]\n(.*?)^\[", (ROOT / "pyproject.toml").read_text(), re.M | re.S
    )
    return set(re.findall(r"^([\w-]+) = \[", section[1], re.MULTILINE))
