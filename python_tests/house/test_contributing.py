"""CONTRIBUTING.md names what exists: targets of the Makefile, commands, folders. test_docs.py follows its links."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from helpers.documents import ROOT, fenced_blocks, make_targets, shell_commands

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
INLINE = re.findall(r"`([^`\n]+)`", TEXT)


def test_every_make_command_is_a_target_of_the_makefile() -> None:
    shown = {word for block in fenced_blocks(TEXT) for word in targets(block.text)}
    named = {target for code in INLINE for target in targets(code)}
    assert shown | named <= make_targets()
    assert named >= {"test", "lint", "demo", "bench"}


def targets(text: str) -> list[str]:
    return re.findall(r"\bmake ([a-z]\w*)", text)


def test_the_shown_commands_are_of_known_kinds() -> None:
    commands = [command for block in fenced_blocks(TEXT) for command in shell_commands(block)]
    assert [command.words[0] for command in commands] == ["git", "cd", "make"]


@pytest.mark.parametrize(
    "target, command",
    [
        ("test", "-m pytest"),
        ("lint", "ruff check"),
        ("docs", "mkdocs build"),
        ("demo", "examples/demo.py"),
        ("bench", "bench/throughput.py"),
    ],
)
def test_targets_do_what_the_table_says(target: str, command: str) -> None:
    result = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert command in result.stdout


def test_paths_in_running_text_exist() -> None:
    paths = {
        part
        for code in INLINE
        for part in code.split()
        if re.fullmatch(r"[\w.]+/[\w./]*", part) and not part.startswith((".venv", "build/"))
    }
    assert len(paths) >= 8
    assert not [path for path in sorted(paths) if not (ROOT / path).exists()]


def test_the_settings_it_names_are_read_somewhere() -> None:
    names = {name for code in INLINE for name in re.findall(r"\b(GKT_[A-Z]+|PYTHON|VENV)=", code)}
    sources = [ROOT / "Makefile", *(ROOT / "python_tests").rglob("*.py")]
    read = "".join(path.read_text() for path in sources if path != Path(__file__))
    assert names and all(name in read for name in names)
