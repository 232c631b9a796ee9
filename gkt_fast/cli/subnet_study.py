"""The subnets of a trained network: what `subnets` does."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..deployment.calibration import recalibrate_batch_norm
from ..deployment.evaluation import Evaluation, evaluate
from ..deployment.export import export_onnx
from ..deployment.extraction import extract_subnet
from ..deployment.files import check_writable
from ..deployment.subnet_report import plot_subnets, write_subnets_csv
from ..deployment.subnet_table import SubnetResult, best_subnet, evaluate_subnets, pareto_front
from .requirements import require
from .trained_run import open_run

__all__ = ["print_subnets"]


def print_subnets(args: argparse.Namespace) -> None:
    """Evaluates the subnets of a trained network; prints, writes and draws the table, and exports the best."""
    if args.min_accuracy is not None and args.min_accuracy > 1:
        raise ValueError(f"min_accuracy is {args.min_accuracy}; it must be between 0 and 1")
    if args.budget_ms is not None and not args.latency:
        raise ValueError("budget_ms is given without --latency, which measures the times")
    require("subnets, which draws a picture,", "matplotlib")
    if args.export_onnx is not None:
        require("--export-onnx", "onnx", "onnxscript", "onnxruntime")
    run = open_run(args)
    output = run.checkpoint.parent if args.output is None else args.output
    output.mkdir(parents=True, exist_ok=True)
    if args.export_onnx is not None:
        check_writable(args.export_onnx)
    run.announce("Evaluating the subnets")
    as_trained = evaluate(run.model, run.test_loader)
    results = evaluate_subnets(
        run.model,
        run.test_loader,
        min_depth=run.trained_depth() if args.min_depth is None else args.min_depth,
        max_subnets=args.max_subnets,
        calibration_loader=run.train_loader,
        calibration_samples=args.calibration_samples,
        latency=args.latency,
        latency_batch=args.latency_batch,
        progress=True,
    )
    _print_table(results, as_trained)
    write_subnets_csv(results, output / "subnets.csv")
    best = None
    try:
        best = best_subnet(
            results, budget_flops=args.budget_flops, budget_ms=args.budget_ms, min_accuracy=args.min_accuracy
        )
    finally:  # also where none qualifies: the picture shows why
        title = f"{run.flags.model}: accuracy of subnets against their cost"
        runtime = "torch" if args.latency else None
        plot_subnets(results, output / "subnets.png", title, best, runtime=runtime)
        print(f"Written to {output}: subnets.csv, subnets.png")
    time = f", {best.milliseconds():.3g} ms" if args.latency else ""
    print(
        f"Best: depths {best.subnet}, accuracy {100 * best.accuracy:.2f} %, {best.flops / 1e6:.2f} MFLOPs{time}"
    )
    if args.export_onnx is not None:
        network = extract_subnet(run.model, best.subnet)
        recalibrate_batch_norm(network, run.train_loader, args.calibration_samples)
        export_onnx(network, args.export_onnx, inputs=run.example())
        print(f"Written to {args.export_onnx}")


def _print_table(results: Sequence[SubnetResult], as_trained: Evaluation) -> None:
    front = pareto_front(results)
    width = max(len("depths"), *(len(str(result.subnet)) for result in results))
    timed = [(entry.runtime, entry.batch_size) for entry in results[0].latencies]
    times = "".join(f"{f'{runtime} b{size}, ms':>22}" for runtime, size in timed)
    print(f"{'depths':{width}}{'parameters':>14}{'MFLOPs':>12}{'accuracy':>12}{'loss':>10}{times}")
    for r in sorted(results, key=lambda result: -result.flops):
        times = "".join(f"{r.milliseconds(*key):22.3f}" for key in timed)
        print(
            f"{r.subnet!s:{width}}{r.parameters:14,}{r.flops / 1e6:12.2f}{100 * r.accuracy:10.2f} %{r.loss:10.4f}"
            f"{times}{'  *' if r in front else ''}"
        )
    print("* no other subnet is as accurate at the same cost or less")
    full = next((str(result.subnet) for result in results if result.subnet.is_full), "not in the table")
    print(
        f"The full network ({full}) as it was trained: {100 * as_trained.accuracy:.2f} %, loss {as_trained.loss:.4f}. "
        "In the table BatchNorm's statistics are re-estimated for every network, the full one too, to compare alike"
    )
