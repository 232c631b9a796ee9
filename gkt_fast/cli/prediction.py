"""Classifying images by an elastic network: what `predict` does."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data import Data, load_image
from ..deployment import elastic_file
from ..deployment.cascade import Cascade
from ..deployment.elastic import ElasticNetwork, load_elastic
from ..deployment.latency import measure_latencies
from ..network.calls import logits_of
from ..subnets.subnet import Subnet
from .arguments import chosen_device
from .recipe import build_model
from .requirements import require

__all__ = ["predict"]

Classify = Callable[[Tensor], "tuple[Tensor, Subnet]"]
"""Image (1, C, H, W) -> logits (1, C), depths used."""


@torch.no_grad()
def predict(args: argparse.Namespace) -> None:
    """Prints class, confidence, depths used and time of each image."""
    require("predict", "torchvision")
    device = str(chosen_device(args))
    settings = elastic_file.read(args.file)["metadata"]
    missing = [
        key for key in ("model", "data", "image_size", "in_channels", "classes") if key not in settings
    ]
    if missing:
        raise ValueError(
            f"{args.file} doesn't say which network it is of (no {missing[0]!r}); write it by elastic"
        )
    classes = settings["classes"]
    shape = Data(None, None, len(classes), settings["in_channels"])  # type: ignore[arg-type]
    elastic = load_elastic(args.file, build_model(settings["model"], shape)).to(device)
    images = [load_image(path, settings["data"], settings["image_size"]) for path in args.images]
    images = [image.to(device) for image in images]
    classify = _classifier(args, elastic, settings, images[0])
    classify(images[0])  # a first call is slower
    width = max(len("image"), *(len(str(path)) for path in args.images))
    names = max(len("class"), *map(len, classes))
    print(f"{'image':{width}}  {'class':{names}}  confidence  {'depths':>12}  {'ms':>8}")
    for path, image in zip(args.images, images, strict=True):
        _synchronize(device)
        start = time.perf_counter()
        logits, subnet = classify(image)
        _synchronize(device)
        milliseconds = 1e3 * (time.perf_counter() - start)
        confidence, index = logits[0].float().softmax(0).max(0)
        print(
            f"{path!s:{width}}  {classes[int(index)]:{names}}  {100 * float(confidence):8.2f} %  {subnet!s:>12}  "
            f"{milliseconds:8.3f}"
        )


def _classifier(
    args: argparse.Namespace, elastic: ElasticNetwork, settings: dict[str, Any], image: Tensor
) -> Classify:
    if args.cascade:
        if settings.get("cascade") is None:
            raise ValueError(f"{args.file} holds no cascade: its depths aren't nested")
        cascade = Cascade.from_dict(elastic, settings["cascade"])

        def classify(image: Tensor) -> tuple[Tensor, Subnet]:
            result = cascade(image)
            return result.logits, cascade.order[int(result.exits[0])]

        return classify
    if args.max_ms is not None:
        subnet = _within(args.max_ms, elastic, settings.get("accuracies", {}), image)
    else:
        subnet = elastic.subnet(elastic.depths if args.depths is None else args.depths)
    return lambda image: (logits_of(elastic(image, depths=subnet)), subnet)


def _within(max_ms: float, elastic: ElasticNetwork, accuracies: dict[str, float], image: Tensor) -> Subnet:
    """The most accurate depths that take at most so long for the image.

    Raises:
        ValueError: none do; the message says how long the fastest take.
    """
    subnets: Sequence[Subnet] = elastic.subnets
    latencies = measure_latencies([elastic.at(s) for s in subnets], (image.cpu(),), runtimes=["torch"])
    times = {subnet: found[0].median_ms for subnet, found in zip(subnets, latencies, strict=True)}
    fast = [subnet for subnet in subnets if times[subnet] <= max_ms]
    if not fast:
        least = min(subnets, key=times.__getitem__)
        raise ValueError(
            f"max_ms is {max_ms:.4g}; the fastest depths, {least}, take {times[least]:.4g} ms here"
        )
    return max(fast, key=lambda subnet: (accuracies.get(str(subnet), 0.0), sum(subnet.depths)))


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
