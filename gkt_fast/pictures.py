"""How every picture looks: one size of type, one colour for each thing, names beside what they name.

matplotlib is imported when a picture is begun; it comes with the extras `vision`, `bench`, `export` and `logging`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "INK", "QUIET", "SERIES", "ask", "name_lines", "picture", "style"]

INK, QUIET = "#1f2933", "#6b7785"
"""Of what is said, and of axes and remarks."""
COLOURS = {"gkt": "#0f766e", "plain": "#c2570c", "alone": INK, "st": "#6d28d9"}
"""What is the same in every picture has the same colour in all."""
SERIES = (
    "#0f766e",
    "#c2570c",
    "#6d28d9",
    "#1d4ed8",
    "#a16207",
    "#be185d",
    "#475569",
    "#4d7c0f",
    "#0e7490",
    "#9f1239",
)
"""For what has no colour of its own, in this order."""
DARK = {
    INK: "#e6edf3", QUIET: "#9aa7b5", "#0f766e": "#2dd4bf", "#c2570c": "#fb923c", "#6d28d9": "#b197fc",
}  # fmt: skip
"""What stands for a colour on a dark background."""

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": QUIET,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": QUIET,
    "grid.alpha": 0.18,
    "grid.linewidth": 0.8,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.linewidth": 2,
    "lines.markersize": 6,
    "errorbar.capsize": 2.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "gkt_fast",
}


@contextmanager
def style() -> Iterator[None]:
    """What is drawn inside is drawn in the house's style."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


@contextmanager
def picture(
    path: str | Path, size: tuple[float, float], *, dark: str | Path | None = None, dpi: int = 130
) -> Iterator[Figure]:
    """A figure to draw on, in the house's style; written to the file when the block ends.

    Args:
        path: file to write; its ending says the format.
        size: width and height, inches.
        dark: where to write the same in colours for a dark background; both are then SVG, and transparent.
        dpi: of formats made of pixels.
    """
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        vector: dict[str, Any] = {"metadata": {"Date": None}, "transparent": True}
        figure.savefig(path, **(vector if Path(path).suffix == ".svg" else {"dpi": dpi}))
    if dark is not None:
        text = Path(path).read_text()
        for light, replacement in DARK.items():
            text = text.replace(light, replacement)
        Path(dark).write_text(text)


def ask(axes: Axes, question: str, remark: str = "") -> None:
    """Puts above a panel the question that it answers, and below it what was measured."""
    title = f"{question}\n" if remark else question
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    if remark:
        axes.annotate(
            remark,
            (0, 1),
            (0, 6),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=8.5,
            color=QUIET,
        )


def name_lines(
    axes: Axes,
    names: Sequence[tuple[str, float, float, str]],
    *,
    gap: float = 11,
    dx: float = 8,
    side: str = "left",
) -> None:
    """Writes names beside points (name, x, y, colour); names that would touch move apart.

    Args:
        axes: with its limits and scale as they stay.
        names: of each the text, the point in data coordinates, and the colour.
        gap: least distance of two lines of text, in points.
        dx: distance from the point, in points.
        side: the side of the text that faces the point, "left" or "right".
    """
    axes.figure.canvas.draw()
    scale = 72 / axes.figure.dpi
    places = sorted(names, key=lambda place: place[2])
    heights = [axes.transData.transform((x, y))[1] * scale for _, x, y, _ in places]
    for (text, x, y, colour), height, spread in zip(places, heights, _spread(heights, gap), strict=True):
        axes.annotate(
            text,
            (x, y),
            (dx if side == "left" else -dx, spread - height),
            textcoords="offset points",
            ha=side,
            va="center",
            color=colour,
            fontsize=8.5,
            annotation_clip=False,
        )


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights in rising order, moved as little as keeps them `gap` apart: those that touch share their middle."""
    clusters: list[list[float]] = []
    for height in heights:
        clusters.append([height])
        while len(clusters) > 1 and _bottom(clusters[-1], gap) - gap < _bottom(clusters[-2], gap) + gap * (
            len(clusters[-2]) - 1
        ):
            last = clusters.pop()
            clusters[-1] += last
    return [_bottom(cluster, gap) + gap * i for cluster in clusters for i in range(len(cluster))]


def _bottom(cluster: Sequence[float], gap: float) -> float:
    return sum(cluster) / len(cluster) - gap * (len(cluster) - 1) / 2
