"""Draws the states of one step, for pages with a light and with a dark background.

    python docs/site/state_drawing.py

writes docs/pictures/states-light.svg and states-dark.svg: a network of three stages with three blocks each, and two
subnets that keep 3-2-2 and 3-2-1 of them.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "pictures"
STREAMS = (("full network", (3, 3, 3)), ("group 1", (3, 2, 2)), ("group 2", (3, 2, 1)))
THEMES = {
    "light": {
        "text": "#1f2933",
        "quiet": "#6b7785",
        "streams": ("#0f766e", "#c2570c", "#6d28d9"),
        "on": "#ffffff",
    },
    "dark": {
        "text": "#e6edf3",
        "quiet": "#9aa7b5",
        "streams": ("#2dd4bf", "#fb923c", "#b197fc"),
        "on": "#10161d",
    },
}
LEFT, TOP, WIDTH, HEIGHT = 146, 66, 52, 34
STEP, GAP, ROW = 62, 26, 68
HEAD_WIDTH = 58


def main() -> None:
    for name in THEMES:
        path = FOLDER / f"states-{name}.svg"
        path.write_text(drawing(name))
        print(path)


def drawing(theme: str) -> str:
    colours = THEMES[theme]
    executed: dict[tuple[int, ...], int] = {}
    parts, calls = [], 0
    heads = []
    for row, (name, depths) in enumerate(STREAMS):
        parts.append(text(16, centre(row) - 4, name, colours["streams"][row], "600"))
        parts.append(
            text(16, centre(row) + 13, f"keeps {'-'.join(map(str, depths))}", colours["quiet"], size=12)
        )
        state: tuple[int, ...] = ()
        last = (LEFT - 12, centre(row)) if row == 0 else None
        for stage, depth in enumerate(depths):
            for block in range(depth):
                calls += 1
                position = 3 * stage + block
                state = (*state, position)
                if state in executed:
                    last = (left(stage, block) + WIDTH, centre(executed[state]))
                    continue
                executed[state] = row
                x = left(stage, block)
                parts.append(line(last, (x, centre(row)), colours["streams"][row]))
                parts.append(box(x, row, f"{'abc'[stage]}{block + 1}" + "′" * row, colours, WIDTH))
                last = (x + WIDTH, centre(row))
        x = left(3, 0)
        parts.append(line(last, (x, centre(row)), colours["streams"][row]))
        parts.append(box(x, row, "head", colours, HEAD_WIDTH))
        heads.append(x + HEAD_WIDTH)
    for stage in range(3):
        middle = (left(stage, 0) + left(stage, 2) + WIDTH) / 2
        parts.append(text(middle, 48, f"stage {stage + 1}", colours["quiet"], anchor="middle", size=13))
    parts += lessons(heads[0], colours)
    parts.append(stack(left(2, 0), "one call", colours))
    parts.append(stack(left(2, 1), "one call", colours))
    title = f"{len(executed)} block runs instead of {calls}: what two streams share is computed once"
    parts.insert(0, text(16, 24, title, colours["text"], "600", size=17))
    width, height = heads[0] + 118, TOP + 3 * ROW - 6
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" font-family="system-ui, Segoe UI, Helvetica, Arial, sans-serif" '
        f'font-size="14">\n<title>{title}</title>\n'
        f'<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{colours["quiet"]}"/></marker></defs>\n{body}\n</svg>\n'
    )


def left(stage: int, block: int) -> float:
    return LEFT + stage * (3 * STEP + GAP) + block * STEP


def centre(row: int) -> float:
    return TOP + row * ROW + HEIGHT / 2


def box(x: float, row: int, label: str, colours: dict, width: float) -> str:
    return (
        f'<rect x="{x:g}" y="{TOP + row * ROW:g}" width="{width:g}" height="{HEIGHT}" rx="7" '
        f'fill="{colours["streams"][row]}"/>'
        + text(x + width / 2, centre(row) + 5, label, colours["on"], "600", anchor="middle")
    )


def line(start: tuple[float, float] | None, end: tuple[float, float], colour: str) -> str:
    """Straight, or bent where a stream leaves another."""
    assert start is not None
    (x0, y0), (x1, y1) = start, end
    path = (
        f"M{x0:g} {y0:g} H{x1:g}"
        if y0 == y1
        else f"M{x0:g} {y0:g} C{x0 + 22:g} {y0:g} {x0 - 8:g} {y1:g} {x0 + 30:g} {y1:g} H{x1:g}"
    )
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2.5"/>'


def lessons(x: float, colours: dict) -> list[str]:
    """Each stream's logits teach the next smaller one."""
    parts = []
    for row in range(2):
        y0, y1 = centre(row) + 3, centre(row + 1) - 3
        parts.append(
            f'<path d="M{x + 3:g} {y0:g} C{x + 30:g} {y0:g} {x + 30:g} {y1:g} {x + 5:g} {y1:g}" fill="none" '
            f'stroke="{colours["quiet"]}" stroke-width="1.8" marker-end="url(#tip)"/>'
        )
        parts.append(text(x + 32, (y0 + y1) / 2 + 4, "soft labels", colours["quiet"], size=12))
    return parts


def stack(x: float, label: str, colours: dict) -> str:
    """Around two states that run the same block."""
    y, height = TOP - 7, ROW + HEIGHT + 14
    return (
        f'<rect x="{x - 3:g}" y="{y:g}" width="{WIDTH + 6}" height="{height}" rx="10" fill="none" '
        f'stroke="{colours["quiet"]}" stroke-width="1.4" stroke-dasharray="4 4"/>'
        + text(x + WIDTH / 2, y + height + 15, label, colours["quiet"], anchor="middle", size=12)
    )


def text(
    x: float, y: float, content: str, colour: str, weight: str = "400", anchor: str = "start", size: int = 14
) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" fill="{colour}" font-weight="{weight}" text-anchor="{anchor}" '
        f'font-size="{size}">{content}</text>'
    )


if __name__ == "__main__":
    main()
