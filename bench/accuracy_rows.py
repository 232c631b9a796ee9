"""Rows of `bench/accuracy.py`, grouped and summed up: settings, values by seed, means, paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

from accuracy import SETTING
from accuracy_models import forward_flops, title_of

Rows = list[dict[str, str]]


def by(rows: Rows, columns: Iterable[str]) -> dict[tuple[str, ...], Rows]:
    groups: dict[tuple[str, ...], Rows] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return groups


def measured_depths(rows: Rows) -> list[str]:
    """The columns of subnets' accuracies, deepest first."""
    found = {column for row in rows for column, value in row.items() if column[:1].isdigit() and value}
    return sorted(found, key=lambda depths: sum(map(int, depths.split("-"))), reverse=True)


def title(setting: tuple[str, ...]) -> str:
    values = dict(zip(SETTING, setting, strict=True))
    return (
        f"{title_of(values['model'])}, {int(values['train_images']):,} images of "
        f"{values['image_size']}x{values['image_size']}, {values['epochs']} epochs"
    )


def picture(setting: tuple[str, ...]) -> str:
    values = dict(zip(SETTING, setting, strict=True))
    return (
        f"accuracy_{values['model']}_{values['train_images']}x{values['image_size']}px_{values['epochs']}epochs_"
        f"{values['augmentation']}.png"
    )


def cost(rows: Rows) -> float:
    """Mean cost of a training, in epochs of plain training."""
    return statistics.fmean(float(row["step_cost"]) * int(row["epochs_run"]) for row in rows)


def inference_cost(rows: Rows, depths: tuple[int, ...] | None) -> float:
    """MFLOPs of one image in the network of these depths; None: in the full one."""
    values = rows[0]
    return forward_flops(values["model"], int(values["width"]), int(values["image_size"]), depths) / 1e6


def values_of(rows: Rows, column: str) -> dict[str, float]:
    """Seed -> value."""
    return {row["seed"]: float(row[column]) for row in rows if row.get(column)}


def difference(values: dict[str, float], baseline: dict[str, float]) -> tuple[float, float] | None:
    """Mean of the paired differences and the half width of its 95 % interval; None without two common seeds."""
    from scipy.stats import t

    differences = [values[seed] - baseline[seed] for seed in values if seed in baseline]
    if len(differences) < 2:
        return None
    spread = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences), float(t.ppf(0.975, len(differences) - 1)) * spread


def interval(difference: tuple[float, float] | None) -> str:
    return "" if difference is None else f"{difference[0]:+.2f} ± {difference[1]:.2f}"


def spread(values: Iterable[float]) -> str:
    values = list(values)
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


def mean_and_error(rows: Rows, column: str) -> tuple[float, float]:
    """NaN, which isn't drawn, where nothing was evaluated."""
    values = list(values_of(rows, column).values())
    if not values:
        return math.nan, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values), error
