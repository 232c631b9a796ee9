"""The documentation's site: it builds without a warning, and its reference leaves nothing out."""

from __future__ import annotations

import ast
import dataclasses
import html
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.documents import ROOT

import gkt_fast
from gkt_fast.cli import COMMANDS, command_parser

MISSING = [name for name in ("mkdocs", "material", "mkdocstrings") if not importlib.util.find_spec(name)]


def integrations() -> set[str]:
    """The public names of the modules for other libraries, read from the source: importing them takes long."""
    names = set()
    for path in (ROOT / "gkt_fast" / "integrations").glob("[!_]*.py"):
        if path.stem not in ("knowledge", "scaling"):  # what the others share
            public = re.search(r"^__all__ = (\[.*?\])", path.read_text(), re.MULTILINE | re.DOTALL)
            names |= {f"gkt_fast.integrations.{path.stem}.{name}" for name in ast.literal_eval(public[1])}
    return names


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Warnings are errors: dead links, anchors without a heading, pages that nothing leads to."""
    if MISSING:
        reason = f"{', '.join(MISSING)} not installed (extra 'docs')"
        if "docs" in os.environ.get("GKT_REQUIRE", "").split(","):
            pytest.fail(reason)
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def text_of(page: Path) -> str:
    """What a reader sees of a page."""
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text()))


def test_the_site_needs_nothing_from_the_network(site: Path) -> None:
    """Fonts, scripts and styles are its own."""
    fetched = re.compile(r"<(?:script|link|img)\b[^>]*(?:src|href)=\"?(?:https?:)?//[^\"\s>]*")
    for page in site.rglob("*.html"):
        assert not fetched.findall(page.read_text()), page


def test_every_field_of_the_configuration_is_explained(site: Path) -> None:
    page = (site / "reference" / "configuration.html").read_text()
    rows = {
        name: text
        for name, text in re.findall(r"<tr[^>]*>\s*<td>\s*<code>(\w+)</code>(.*?)</tr>", page, re.DOTALL)
    }
    for field in dataclasses.fields(gkt_fast.GKTConfig):
        cells = [
            html.unescape(re.sub(r"<[^>]+>", "", cell)).strip()
            for cell in re.findall(r"<td>(.*?)</td>", rows[field.name], re.DOTALL)
        ]
        assert repr(field.default).replace("'", '"') == cells[-1].replace("'", '"'), field.name
        assert len(cells[-2].split()) >= 2, field.name


def test_every_flag_of_every_command_is_listed(site: Path) -> None:
    sections = re.split(r"<h2 id=\"([\w-]+)\">", (site / "reference" / "command-line.html").read_text())
    listed = dict(zip(sections[1::2], sections[2::2], strict=True))
    assert list(listed) == list(COMMANDS)
    for name in COMMANDS:
        flags = command_parser(name)._option_string_actions.keys() - {"-h", "--help"}
        assert not [flag for flag in flags if flag not in listed[name]], name


def test_every_public_name_has_an_entry(site: Path) -> None:
    anchors = {
        anchor
        for page in (site / "reference").glob("*.html")
        for anchor in re.findall(r'id="(gkt_fast[\w.]+)"', page.read_text())
    }
    names = {f"gkt_fast.{name}" for name in gkt_fast.__all__ if not name.startswith("__")} | integrations()
    assert sorted(names - anchors) == []
