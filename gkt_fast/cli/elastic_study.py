"""An elastic network of a trained one: what `elastic` does."""

from __future__ import annotations

import argparse

from ..data import Data
from ..deployment.cascade import Cascade
from ..deployment.cascade_fit import fit_cascade
from ..deployment.elastic import make_elastic
from ..deployment.export import export_onnx
from ..deployment.files import check_writable
from ..deployment.subnet_choice import nested_subnets
from ..deployment.subnet_table import SubnetResult, evaluate_subnets
from ..network.discovery import find_stages
from .requirements import require
from .trained_run import open_run

__all__ = ["write_elastic"]


def write_elastic(args: argparse.Namespace) -> None:
    """Makes an elastic network of a trained one, evaluates its depths, fits a cascade and writes all into one file."""
    if args.export_onnx is not None:
        require("--export-onnx", "onnx", "onnxscript", "onnxruntime")
    run = open_run(args)
    check_writable(args.output)
    depths = args.depths
    if depths is None:
        least = run.trained_depth() if args.min_depth is None else args.min_depth
        depths = nested_subnets(find_stages(run.model), least, args.max_depths)
    run.announce("Calibrating and evaluating depths")
    elastic = make_elastic(
        run.model,
        depths,
        calibration_loader=run.train_loader,
        calibration_samples=args.calibration_samples,
    )
    results = evaluate_subnets(elastic, run.test_loader, latency=["torch"], latency_batch=1, progress=True)
    nested = all(a.is_within(b) for a, b in zip(elastic.subnets, elastic.subnets[1:], strict=False))
    cascade = fit_cascade(elastic, run.test_loader, args.max_drop) if nested else None
    elastic.metadata = {
        "model": run.flags.model,
        "data": run.flags.data.partition(":")[0],
        "image_size": run.flags.image_size,
        "in_channels": run.data.in_channels,
        "classes": class_names(run.data),
        "accuracies": {str(result.subnet): result.accuracy for result in results},
        "cascade": None if cascade is None else cascade.to_dict(),
    }
    elastic.save(args.output)
    _print_table(results, cascade)
    print(f"Written to {args.output}")
    if args.export_onnx is not None:
        export_onnx(elastic, args.export_onnx, results=results)
        print(f"Written to {args.export_onnx}")


def class_names(data: Data) -> list[str]:
    """The classes' names where the data set has them, else their numbers."""
    names = getattr(data.test, "classes", None)
    return list(names) if names else [str(number) for number in range(data.num_classes)]


def _print_table(results: list[SubnetResult], cascade: Cascade | None) -> None:
    width = max(len("cascade"), *(len(str(result.subnet)) for result in results))
    print(f"{'depths':{width}}{'parameters':>14}{'MFLOPs':>12}{'accuracy':>12}{'one image, ms':>16}")
    for r in results:
        print(
            f"{r.subnet!s:{width}}{r.parameters:14,}{r.flops / 1e6:12.2f}{100 * r.accuracy:10.2f} %"
            f"{r.milliseconds():16.3f}"
        )
    if cascade is None or cascade.evaluation is None:
        print("no cascade: these depths aren't nested")
        return
    found = cascade.evaluation
    shares = zip(cascade.order, found.shares, strict=True)
    leave = ", ".join(f"{100 * share:.1f} % at {subnet}" for subnet, share in shares)
    cells = f"{'':14}{found.mean_flops / 1e6:12.2f}{100 * found.accuracy:10.2f} %"
    print(f"{'cascade':{width}}{cells}   images leave: {leave}")
