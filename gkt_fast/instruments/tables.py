"""Tables of figures: as CSV files, on the terminal, and in documents between two marks, the first of which names the
command that writes what is between them."""

from __future__ import annotations

import csv
import re
from pathlib import Path

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


def read_csv(path: str | Path) -> list[dict[str, str]]:
    """The rows of a file; of none, if there is no such file."""
    if not Path(path).exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: str | Path, rows: list[dict[str, object]]) -> None:
    """Writes the rows, with the union of their columns in order of appearance."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)


def print_table(rows: list[dict[str, object]], columns: list[str]) -> None:
    """Prints the chosen columns as an aligned table; floats with four significant digits."""
    cells = [columns] + [[_cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
