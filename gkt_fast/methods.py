"""The published ways of training a residual network with its subnets, as configurations of one trainer. No torch here.

`plain`: the network alone.
`stochastic_depth`: Huang et al., ECCV 2016. A step trains one randomly masked network; block l of L survives with
    probability 1 - drop_rate * l / L. Blocks that change shape always survive here (there they have a projection).
`st`: Stimulative Training (Ye et al., NeurIPS 2022). The full network learns the targets, a uniformly drawn ordered
    subnet the full network's soft labels.
`st++`: Stimulative Training++ (Ye et al., arXiv 2305.02507). Five subnets, soft labels of standardised logits ("KL-"),
    and images of subnets resized to a random, smaller resolution. The cross entropy stays on raw logits, where the
    authors' code standardises those too: `NormalizedCrossEntropy` as the criterion, `train --normalize-ce`. Its third
    strategy, restricting how depths vary over stages, is `min_depth`.
`gkt`: this package's own, with the defaults of `GKTConfig`.

In all of them subnets see whole batches, as published. `subnet_share` may be changed for `st`, `st++` and `gkt`; the
smaller images of `st++` have nothing in common with the full network's, so that its subnets run on their share alone.
"""

from __future__ import annotations

from typing import Any

from .config import GKTConfig

__all__ = ["METHODS", "method_config"]

METHODS: dict[str, dict[str, Any]] = {
    "plain": {"groups": 0},
    "stochastic_depth": {"groups": 1, "sampler": "stochastic_depth", "train_full": False},
    "st": {"groups": 1, "sampler": "uniform"},
    "st++": {"groups": 1, "loops": 5, "sampler": "uniform", "normalize_logits": True},
    "gkt": {},
}

SMALLEST_RESOLUTION = 0.43
"""Of the full one, for `st++`, as in the authors' code: 96 of 224."""


def method_config(method: str, image_size: int | None = None, **changes: Any) -> GKTConfig:
    """The configuration of a method.

    Args:
        method: "plain", "stochastic_depth", "st", "st++" or "gkt".
        image_size: height and width of the training images; only `st++` needs it, unless `subnet_resolution` is given.
        changes: fields of `GKTConfig` that differ from the method's.

    Raises:
        ValueError: the method is unknown, `st++` lacks the image size, or a change is out of its range.
        TypeError: a change is no field of `GKTConfig`, or of the wrong type.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(METHODS)}")
    values = METHODS[method] | changes
    if method == "st++" and "subnet_resolution" not in values:
        if image_size is None:
            raise ValueError("image_size is None; method 'st++' needs it, or subnet_resolution")
        values["subnet_resolution"] = (max(round(SMALLEST_RESOLUTION * image_size), 1), image_size)
    return GKTConfig(**values)
