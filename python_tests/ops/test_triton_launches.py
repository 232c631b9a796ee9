"""What the Triton launchers launch is what `aot_configurations()` lists, and with that what was compiled and judged.

Runs in a process without Triton's interpreter, on CPU tensors: a launch is caught where Triton would compile it, after
it has made the signature of the arguments. Does not prove that a GPU accepts the launch.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from gkt_fast.instruments import machine_code

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def _key(name: str, types: dict, constants: dict, options: dict) -> tuple:
    return name, *(
        tuple(sorted((k, str(v)) for k, v in part.items())) for part in (types, constants, options)
    )


def _listed() -> set[tuple]:
    keys = set()
    for _, (_, function, signature, constants, options) in machine_code.triton_configurations():
        types = {name: kind for name, kind in signature.items() if name not in constants}
        keys.add(_key(function.__name__, types, constants, options))
    return keys


def _catch_launches(launches: set[tuple]) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))

    def run(self, *arguments, grid, warmup, **options):
        bind = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, rest = bind(*arguments, **options)
        types, constants = {}, {}
        for name, (kind, special) in zip(bound, specialization, strict=True):
            if kind == "constexpr":
                constants[name] = special
            else:
                assert not special, f"Triton specialises {self.__name__} on {name}"
                types[name] = kind
        launches.add(_key(self.__name__, types, constants, rest))

    JITFunction.run = run


def _run_losses() -> None:
    from gkt_fast.ops import LossOptions
    from gkt_fast.ops.group_knowledge_loss.problem import Problem, outputs
    from gkt_fast.ops.group_knowledge_loss.triton import TritonBackend

    backend = TritonBackend()
    for dtype, classes, groups, loops, probabilities, gradient in itertools.product(
        DTYPES[:3], (21, 32, 64, 101, 1000, 1001, 2048, 4097), (0, 2), (1, 2), (False, True), (False, True)
    ):
        for spatial in ((), (4, 8), (3, 3)):
            if spatial and classes not in (21, 64):
                continue
            shape = (1 + groups * loops, 3, classes, *spatial)
            for logits in (
                torch.zeros(shape, dtype=dtype),
                torch.zeros(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2],
            ):
                targets = torch.zeros(shape[1:] if probabilities else (3, *spatial), dtype=torch.int64)
                targets = targets.float() if probabilities else targets
                problem = Problem(LossOptions(groups=groups, loops=loops), 1.0)
                loss, terms, written, _ = outputs(logits, None, gradient)
                written = written if gradient else None
                backend.forward(problem, logits, targets, None, loss, terms, written, None)


def _run_norms() -> None:
    from gkt_fast.kernels.triton import ghost_batch_norm as kernels

    from gkt_fast.ops.ghost_batch_norm.problem import describe, mask_size

    for dtype, shape, channels_last, relu, with_residual, running in itertools.product(
        DTYPES,
        (
            *((4, 8, 4, 4), (4, 7, 7, 7), (4, 128, 8, 8), (2, 71, 20, 20), (2, 16, 17, 17)),
            *((4, 4, 2, 6), (4, 6, 7, 2), (2, 68, 14, 14), (2, 70, 9, 10)),  # multiples of 4 and 2
        ),
        (False, True),
        (False, True),
        (False, True),
        (False, True),
    ):
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        x = torch.zeros(shape, dtype=dtype).contiguous(memory_format=memory_format)
        problem = describe(x, channels_last, 2, relu, 1e-5, running)
        accumulated = torch.float64 if dtype == torch.float64 else torch.float32
        statistics = torch.zeros(3, 2, shape[1], dtype=accumulated)
        weight = torch.ones(shape[1], dtype=accumulated) if running else None
        keep = torch.ones(2, dtype=torch.bool) if with_residual and running else None
        mask = torch.zeros(mask_size(shape, channels_last) if relu else 0, dtype=torch.uint8)
        residual = torch.zeros_like(x) if with_residual else None
        kernels.forward(problem, x, residual, weight, weight, keep, torch.empty_like(x), statistics, mask)
        grad_residual = torch.zeros_like(x) if with_residual and relu else None
        gradients = torch.empty_like(x), grad_residual, statistics[0, 0], statistics[0, 1]
        kernels.backward(problem, x, x, weight, statistics, mask, keep, *gradients)


def launched_and_listed() -> tuple[list[tuple], list[tuple]]:
    launches: set[tuple] = set()
    listed = _listed()
    _catch_launches(launches)
    _run_losses()
    _run_norms()
    return sorted(launches), sorted(listed)


def test_launches_are_those_that_were_compiled():
    pytest.importorskip("triton")
    with machine_code.compiler_processes(1) as pool:
        launches, listed = pool.submit(launched_and_listed).result()
    assert launches == listed
