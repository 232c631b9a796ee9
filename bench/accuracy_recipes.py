"""What `bench/accuracy.py` compares: recipes, and the studies that they belong to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """One row of the comparison.

    Args:
        method: name for `gkt_fast.method_config`.
        changes: fields of `GKTConfig` that differ from the method's.
        alone: depths of the network that is trained, a subnet of the full one; None: the full one itself.
        costs_as: train for as many epochs as cost what this recipe costs at the epochs asked for.
        kd_warmup: share of the training in which the distillation terms' weight rises from 0.
        baseline: the recipe that the report compares this one with.
    """

    method: str
    changes: dict[str, Any] = field(default_factory=dict)
    alone: tuple[int, ...] | None = None
    costs_as: str | None = None
    kd_warmup: float = 0.0
    baseline: str = "plain"

    def fits(self, depths: tuple[int, ...], resizable: bool) -> bool:
        """Whether a network of these depths, which takes images of any size or doesn't, can be trained this way."""
        alone = depths if self.alone is None else self.alone
        fewer = len(alone) == len(depths) and all(map(int.__le__, alone, depths)) and self.alone != depths
        return fewer and (resizable or self.method != "st++")


METHODS = {
    "plain": Recipe("plain"),
    "plain, cost of gkt": Recipe("plain", costs_as="gkt"),
    "label smoothing": Recipe("plain", {"label_smoothing": 0.1}),
    "stochastic depth": Recipe("stochastic_depth"),
    "st": Recipe("st"),
    "st, 3 subnets": Recipe("st", {"loops": 3}),
    "st++": Recipe("st++"),
    "gkt": Recipe("gkt"),
    "gkt, 2 groups": Recipe("gkt", {"groups": 2}),
    "gkt, 2 loops": Recipe("gkt", {"loops": 2}),
}
ALONE = {
    f"plain {'-'.join(map(str, depths))}": Recipe("plain", alone=depths)
    for depths in ((1, 1, 1), (2, 2, 2), (2,), (4,), (6,))
}
"""Networks of fewer blocks, by their stages: residual networks of three, transformers of one."""
BUDGETS = {
    f"gkt, budget {budget}": Recipe("gkt", {"budget": budget}, baseline="gkt")
    for budget in (1.0, 1.2, 1.25, 1.5)
}
SHARES = {
    f"gkt, share {share}": Recipe("gkt", {"subnet_share": share}, baseline="gkt") for share in (0.5, 0.25)
}
"""Subnets on a part of each batch."""
CHOICES = {
    "gkt, normalised": Recipe("gkt", {"normalize_logits": True}, baseline="gkt"),
    "gkt, decay 0.8": Recipe("gkt", {"decay": 0.8}, baseline="gkt"),
    "gkt, temperature 2": Recipe("gkt", {"temperature": 2.0}, baseline="gkt"),
    "gkt, kd_weight 0.33": Recipe("gkt", {"kd_weight": 0.33}, baseline="gkt"),
    "gkt, kd_weight 0.5": Recipe("gkt", {"kd_weight": 0.5}, baseline="gkt"),
    "gkt, kd_weight 2": Recipe("gkt", {"kd_weight": 2.0}, baseline="gkt"),
    "gkt, kd warm-up 0.2": Recipe("gkt", kd_warmup=0.2, baseline="gkt"),
    "gkt, ema 0.9, 2 loops": Recipe("gkt", {"loops": 2, "ema": 0.9}, baseline="gkt, 2 loops"),
    "gkt, ema 0, 2 loops": Recipe("gkt", {"loops": 2, "ema": 0.0}, baseline="gkt, 2 loops"),
    "gkt, batch_norm all_streams": Recipe("gkt", {"batch_norm": "all_streams"}, baseline="gkt"),
    "gkt, subnet_ce_weight 0.33": Recipe("gkt", {"subnet_ce_weight": 0.33}, baseline="gkt"),
}
OVER_STEPS = {
    f"gkt, steps, dataset{note}": Recipe(
        "gkt", {"chain": "steps", "knowledge": "dataset", "ema": ema}, baseline="gkt"
    )
    for note, ema in (("", 0.5), (", ema 0.9", 0.9))
}
"""One subnet a step, and knowledge that is kept by sample."""
STUDIES = {
    "methods": METHODS,
    "alone": ALONE,
    "budgets": BUDGETS,
    "shares": SHARES,
    "choices": CHOICES,
    "over_steps": OVER_STEPS,
}
ONE_BY_ONE = {"gkt, one by one": Recipe("gkt", {"execution": "sequential"})}
"""In no study, since it trains what "gkt" does: for its cost alone."""
RECIPES = METHODS | ALONE | BUDGETS | SHARES | CHOICES | OVER_STEPS | ONE_BY_ONE
