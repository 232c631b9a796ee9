"""`python -m gkt_fast selfcheck`: passes here, and finds what is planted: wrong kernels, wrong modes, crashes."""

from __future__ import annotations

import dataclasses
import json
import math
import types

import pytest
import torch
from helpers.backends import unavailable

from gkt_fast.cli import main
from gkt_fast.execution import EXECUTION_MODES
from gkt_fast.ops import BackendError, registry
from gkt_fast.selfcheck import check_op, check_step, op_checks, run_selfcheck, step_check, timing
from gkt_fast.selfcheck.report import Check, Report, compare

CPU = torch.device("cpu")
OPS = ("ghost_batch_norm", "group_knowledge_loss")


@pytest.fixture(autouse=True)
def without_interpreter():
    """Triton's interpreter would take most of the time; it has a test of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with registry.isolated(without="triton"):
        yield
    torch.set_num_threads(threads)


def plant(op: str, make, backend: str = "torch", of: str = "torch") -> registry.Implementation:
    """Replaces a backend of an op by what `make` makes of the working one."""
    working = registry.find(op, of)
    planted = dataclasses.replace(
        working, backend=backend, devices=("cpu",), load=lambda: make(working.load())
    )
    registry.register(planted)
    return planted


def wrong_norm(working):
    """Its gradient of x is off by a thousandth."""

    def backward(problem, *tensors):
        working.backward(problem, *tensors)
        tensors[6].mul_(1.001)

    return types.SimpleNamespace(forward=working.forward, backward=backward)


def test_passes_here_and_writes_json(capsys, tmp_path):
    path = tmp_path / "report.json"
    assert main(["selfcheck", "--device", "cpu", "--json", str(path)]) == 0
    text = capsys.readouterr().out
    assert "checked on cpu against float64:" in text and "PASSED" in text and "FAILED" not in text
    assert f"torch     {torch.__version__.partition('+')[0]}" in text  # the table of `env`
    report = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert report["passed"] is True and report["device"] == "cpu"
    assert report["environment"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    ran = {(check["subject"], check["backend"]) for check in report["checks"]}
    for row in report["environment"]["backends"]:
        place, out = (row["op"], row["backend"]), {(r["op"], r["backend"]) for r in report["unavailable"]}
        assert (place in ran) != (place in out)
    steps = {subject for subject, backend in ran if backend == "automatic"}
    assert steps == {f"step, {mode}" for mode in EXECUTION_MODES}
    dtypes = {check["dtype"] for check in report["checks"]}
    assert dtypes == {"float64", "float32", "bfloat16", "float16"}
    assert all(check["error"] < check["limit"] for check in report["checks"])


def test_a_wrong_backend_fails_with_exit_code_1(capsys, tmp_path):
    plant("ghost_batch_norm", wrong_norm, backend="cpp")
    path = tmp_path / "report.json"
    assert main(["selfcheck", "--device", "cpu", "--json", str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("FAILED: ")
    assert any(
        line.startswith("FAILED: ghost_batch_norm, cpp, float32") and "gradient of x is off by 1" in line
        for line in lines
    )
    report = json.loads(path.read_text())
    assert report["passed"] is False
    wrong = {(check["subject"], check["backend"]) for check in report["checks"] if not check["passed"]}
    assert ("ghost_batch_norm", "cpp") in wrong and ("ghost_batch_norm", "torch") not in wrong
    assert ("step, stacked", "automatic") in wrong  # in float64, where a thousandth is much


def loss_without_grad_output(working):
    def forward(problem, logits, targets, full_logits, loss, terms, gradient, full_gradient):
        working.forward(problem, logits, targets, full_logits, loss, terms, gradient, full_gradient)
        gradient /= op_checks.GRAD_OUTPUT

    return types.SimpleNamespace(forward=forward)


def loss_of_contiguous(working):
    def forward(problem, logits, *tensors):
        wrong = logits.as_strided(logits.shape, torch.empty(logits.shape).stride())
        working.forward(problem, wrong.nan_to_num(), *tensors)

    return types.SimpleNamespace(forward=forward)


def loss_without_ema(working):
    def forward(problem, *tensors):
        options = dataclasses.replace(problem.options, ema=1.0)
        working.forward(problem._replace(options=options), *tensors)

    return types.SimpleNamespace(forward=forward)


def norm_of_one_ghost(working):
    def forward(problem, x, residual, weight, bias, keep, y, statistics, mask):
        working.forward(problem, x, residual, weight, bias, keep, y, statistics, mask)
        statistics[2] *= 1.001

    return types.SimpleNamespace(forward=forward, backward=working.backward)


def norm_without_residual_gradient(working):
    def backward(problem, *tensors):
        working.backward(problem, *tensors)
        if tensors[7] is not None:
            tensors[7].zero_()

    return types.SimpleNamespace(forward=working.forward, backward=backward)


@pytest.mark.parametrize(
    ("op", "wrong", "quantity"),
    [
        ("group_knowledge_loss", loss_without_grad_output, "gradient"),
        ("group_knowledge_loss", loss_of_contiguous, "gradient"),
        ("group_knowledge_loss", loss_without_ema, "gradient"),
        ("ghost_batch_norm", wrong_norm, "gradient of x"),
        ("ghost_batch_norm", norm_of_one_ghost, "variance"),
        ("ghost_batch_norm", norm_without_residual_gradient, "gradient of residual"),
    ],
)
def test_planted_mistakes_are_found(op, wrong, quantity):
    planted = plant(op, wrong, backend="cpp", of="cpp" if op == "group_knowledge_loss" else "torch")
    checks = [check for check in check_op(planted, CPU) if check.dtype == "float32"]
    assert quantity in {check.quantity for check in checks if not check.passed}


def test_a_block_is_checked_on_the_backends_of_its_norms():
    planted = plant("ghost_batch_norm", wrong_norm, backend="cpp")
    checks = [check for check in check_op(planted, CPU) if check.subject == "residual_block"]
    assert {check.backend for check in checks} == {"cpp"}
    assert not any(check.passed for check in checks if check.dtype in ("float64", "float32"))


@pytest.mark.parametrize("op", OPS)
def test_a_crash_is_a_failed_check(op):
    def make(working):
        def crash(*arguments):
            raise ZeroDivisionError("planted")

        return types.SimpleNamespace(forward=crash)

    planted = plant(op, make, backend="cpp")
    checks = list(check_op(planted, CPU))
    assert checks and not any(check.passed for check in checks)
    assert all(check.message == "ZeroDivisionError: planted" for check in checks)


def test_a_backend_that_turns_out_not_to_work_is_listed_with_the_reason(monkeypatch):
    def make(working):
        def fail(*arguments):
            raise BackendError("no compiler")

        return types.SimpleNamespace(forward=fail)

    plant("group_knowledge_loss", make, backend="cpp")
    monkeypatch.setattr("gkt_fast.selfcheck.check_step", lambda *arguments: [])
    report = run_selfcheck("cpu")
    assert report.passed
    reasons = {(op, backend): reason for op, backend, reason in report.unavailable}
    assert "no compiler" in reasons["group_knowledge_loss", "cpp"]
    assert ("ghost_batch_norm", "cpp") not in reasons
    assert "failed for torch.float32 on cpu: no compiler" in report.to_text()


def test_a_wrong_mode_is_found(monkeypatch):
    def wrong(network, inputs, targets, streams, loss_scale):
        fewer = dataclasses.replace(streams, dropped=(streams.dropped[0], *reversed(streams.dropped[1:])))
        return right(network, inputs, targets, fewer, loss_scale)

    right = EXECUTION_MODES["shared"]
    monkeypatch.setitem(EXECUTION_MODES, "shared", dataclasses.replace(right, run=wrong))
    results = {check.subject: check.passed for check in check_step(None, EXECUTION_MODES, torch.float64, CPU)}
    assert results == {f"step, {mode}": mode != "shared" for mode in EXECUTION_MODES}


def test_the_loop_tells_subnets_apart():
    """A loop that dropped nothing would agree with a package that dropped nothing."""
    model = step_check.cifar_resnet(14, num_classes=5, width=4).double()
    images, targets = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.arange(4)
    terms = step_check.loop_step(model, images, targets)["terms"]
    assert len(terms) == 5 and (terms[1:] > 1e-6).all()


def test_triton_in_its_interpreter(monkeypatch):
    implementations = [_triton(op) for op in OPS]
    monkeypatch.setattr(op_checks, "LOSS_CASES", op_checks.LOSS_CASES[-2:-1])
    monkeypatch.setattr(op_checks, "NORM_CASES", op_checks.NORM_CASES[1:2])
    monkeypatch.setattr(op_checks, "BLOCK_CASES", op_checks.BLOCK_CASES[2:3])
    for implementation in implementations:
        registry.register(implementation)
        reason = registry.reason_against(implementation.op, "triton", "cpu", torch.float32)
        if reason is not None:
            unavailable("triton", reason)
        checks = list(check_op(dataclasses.replace(implementation, dtypes=(torch.float32,)), CPU))
        subjects = [implementation.op]
        subjects += ["residual_block"] if implementation.op == "ghost_batch_norm" else []
        assert [check.subject for check in checks] == subjects and all(check.passed for check in checks)


def _triton(op: str) -> registry.Implementation:
    from gkt_fast.ops.ghost_batch_norm.triton import TritonBackend as TritonNorm
    from gkt_fast.ops.group_knowledge_loss.triton import TritonBackend as TritonLoss
    from gkt_fast.ops.triton import DEVICES

    load = {"ghost_batch_norm": TritonNorm, "group_knowledge_loss": TritonLoss}[op]
    return registry.Implementation(op, "triton", DEVICES, (torch.float32,), load)


@pytest.mark.parametrize("compiles", [True, False])
def test_bench_adds_ratios(monkeypatch, compiles):
    def compile(function, **options):
        if not compiles:
            raise FileNotFoundError("no compiler")
        return function

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(timing, "MEASURED_SECONDS", 1e-3)
    monkeypatch.setattr(timing, "LOSS_SHAPES", {"cpu": ((4, 5, 7),)})
    monkeypatch.setattr(timing, "NORM_SHAPES", {"cpu": ((4, 3, 5, 5),)})
    monkeypatch.setattr("gkt_fast.selfcheck.check_op", lambda *arguments: [])
    monkeypatch.setattr("gkt_fast.selfcheck.check_step", lambda *arguments: [])
    report = run_selfcheck("cpu", bench=True)
    rows = json.loads(report.to_json())["timings"]
    ops = [row for row in rows if row["what"] in OPS]
    assert {row["what"] for row in ops} == set(OPS)
    for row in ops:
        assert row["eager / it"] > 0 and row["it / copy"] > 0
        assert (row["compiled / it"] is not None) == compiles
        assert row.get("note", "") == ("" if compiles else "torch.compile failed: FileNotFoundError")
    steps = {row["what"]: row["plain steps"] for row in rows if row["what"] not in OPS}
    assert set(steps) == {f"step, {mode}" for mode in EXECUTION_MODES} and min(steps.values()) > 0
    assert "eager / it" in report.to_text()
    assert not report.passed  # nothing was checked


def test_a_backend_that_fails_while_it_is_measured_has_a_note(monkeypatch):
    def make(working):
        def fail(*arguments):
            raise torch.OutOfMemoryError("planted")

        return types.SimpleNamespace(forward=fail)

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(timing, "MEASURED_SECONDS", 1e-3)
    monkeypatch.setattr(timing, "LOSS_SHAPES", {"cpu": ((4, 5, 7),)})
    monkeypatch.setattr(timing, "NORM_SHAPES", {"cpu": ()})
    (row,) = timing.time_ops([plant("group_knowledge_loss", make, backend="cpp")], CPU)
    assert row["note"] == "OutOfMemoryError: planted"


def test_results_that_are_no_numbers_fail():
    one = torch.ones(3, dtype=torch.float64)
    assert math.isnan(compare({"y": one * math.nan}, {"y": one})[1])
    assert compare({"y": one[:2]}, {"y": one})[1] == math.inf
    assert compare({"x": one * (1 + 1e-9), "y": one.float()}, {"x": one, "y": one})[0] == "x"
    wrong = [Check("op", "cpp", "float64", "case", "y", error, 1e-11) for error in (math.nan, math.inf)]
    assert not any(check.passed for check in wrong)
    report = Report("cpu", {}, wrong, [], [], 0.0)
    assert [check["error"] for check in json.loads(report.to_json())["checks"]] == [None, None]


def test_a_device_that_is_not_there_is_refused(capsys):
    if torch.cuda.is_available():
        unavailable("cuda", "a GPU is here")
    with pytest.raises(SystemExit) as exit:
        main(["selfcheck", "--device", "cuda"])
    assert exit.value.code == 2
    assert "argument --device: 'cuda' can't be used" in capsys.readouterr().err
