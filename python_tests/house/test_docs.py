"""Links and commands in the documentation lead somewhere."""

from __future__ import annotations

import ast
import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("python_tests/**/*.md")])
NAMED = re.compile(r"`((?:gkt_fast|bench|docs|examples|csrc|kernels|python_tests)/[\w./]+)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def anchors(page: Path) -> set[str]:
    """The names that a forge gives to headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    broken = []
    for target in LINK.findall(without_code(page.read_text())):
        if target.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        anchor = "" if anchor in ("only-light", "only-dark") else anchor  # a picture for one kind of page
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or not file.is_relative_to(ROOT) or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def sentences() -> str:
    """All texts of the package, with what is filled in left out."""
    found = []
    for path in (ROOT / "gkt_fast").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_the_messages_that_troubleshooting_explains_are_raised_or_logged() -> None:
    page = (ROOT / "docs" / "guide" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 15
    texts = sentences()
    assert [message for message in messages if message not in texts] == []


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 160
    assert [line for line in lines if len(line) > 120] == []


def test_the_readme_opens_with_the_measured_cost_of_a_step() -> None:
    with open(ROOT / "bench" / "results" / "throughput.csv", newline="") as file:
        ratios = {
            row["mode"]: float(row["ratio"])
            for row in csv.DictReader(file)
            if row["model"] == "cifar_resnet56"
        }
    costs = f"a step costs {ratios['stacked']:.2f} plain steps instead of {ratios['sequential']:.2f} "
    assert costs in " ".join((ROOT / "README.md").read_text().split())


def test_what_pages_name_exists() -> None:
    """Paths in backticks, such as `bench/norm.py`, unless they are examples of a new op's name."""
    missing = []
    for page in PAGES:
        for path in re.findall(
            r"`((?:gkt_fast|bench|docs|examples|csrc|kernels|python_tests)/[\w./]+)`", page.read_text()
        ):
            if "my_op" not in path and not (ROOT / path).exists():
                missing.append((page.name, path))
    assert not missing
