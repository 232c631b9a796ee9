"""What every op does alike: derivatives, transforms, hooks of the caller, a registry of its own for a test."""

from __future__ import annotations

import inspect

import pytest
import torch
from helpers.backends import running_on
from torch.utils.checkpoint import checkpoint

from gkt_fast import (
    GKTConfig,
    GroupKnowledgeLoss,
    ghost_batch_norm,
    group_knowledge_loss,
    residual_block,
)
from gkt_fast.ops import (
    BackendError,
    GroupKnowledge,
    LossOptions,
    ghost_batch_norm_reference,
    group_knowledge_loss_reference,
    registry,
    residual_block_reference,
)
from gkt_fast.ops.residual_block import Convolution, Norm

OPTIONS = LossOptions(ema=0.3, temperature=2.0, normalize_logits=True, subnet_ce_weight=0.25)
TARGETS = torch.arange(5)


def loss(logits: torch.Tensor) -> torch.Tensor:
    return group_knowledge_loss(logits, TARGETS, options=OPTIONS)[0]


def norm(x: torch.Tensor) -> torch.Tensor:
    return ghost_batch_norm(x, None, None, ghosts=2, activation="identity")[0].pow(3).sum()


def block(x: torch.Tensor, function=residual_block) -> torch.Tensor:
    layers = [Convolution(torch.eye(3, dtype=x.dtype)[:, :, None, None]) for _ in range(2)]
    return function(x, layers, [Norm(), Norm()], ghosts=2)[0].pow(3).sum()


def reference_of(function):
    if function is block:
        return lambda x: block(x, residual_block_reference)
    if function is loss:
        return lambda z: group_knowledge_loss_reference(z, TARGETS, options=OPTIONS)[0]
    return lambda x: (
        ghost_batch_norm_reference(x, None, None, ghosts=2, activation="identity")[0].pow(3).sum()
    )


CASES = {
    "group_knowledge_loss": (loss, (4, 5, 7)),
    "ghost_batch_norm": (norm, (4, 3, 2, 2)),
    "residual_block": (block, (4, 3, 2, 2)),
}
BACKENDS_OF = {"residual_block": "ghost_batch_norm"}
"""The op whose backends an op without any of its own runs on."""


@pytest.fixture(params=["torch", "cpp"])
def backend(request):
    return request.param


@pytest.fixture(params=CASES)
def case(request, backend):
    """(name of the op, function, input in float64)."""
    function, shape = CASES[request.param]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with running_on(BACKENDS_OF.get(request.param, request.param), backend):
        yield request.param, function, x


def test_gradients_of_autograd_and_of_torch_func(case):
    _, function, x = case
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(reference_of(function)(leaf), leaf)
    (gradient,) = torch.autograd.grad(function(leaf), leaf)
    torch.testing.assert_close(gradient, wanted)
    torch.testing.assert_close(torch.func.grad(function)(x), wanted)
    _, pull_back = torch.func.vjp(function, x)
    torch.testing.assert_close(pull_back(torch.tensor(3.0, dtype=x.dtype))[0], 3 * wanted)


def test_differentiating_twice_is_refused_in_every_form(case):
    """In words that name the way out; never a second derivative that is silently zero."""
    name, function, x = case
    message = f"{name} can't be differentiated twice; {name}_reference can"
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=message):
        gradient.square().sum().backward()
    with pytest.raises(RuntimeError, match=message):
        torch.func.grad(lambda z: torch.func.grad(function)(z).square().sum())(x)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reference_of(function)(leaf), leaf, create_graph=True)
    gradient.square().sum().backward()
    assert leaf.grad.abs().sum() > 0


def test_the_gradient_is_linear_in_the_gradient_of_the_loss():
    """The derivative by grad_output exists: it is the gradient itself."""
    logits = torch.randn(4, 5, 7, requires_grad=True)
    factor = torch.tensor(2.0, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(logits), logits, factor, create_graph=True)
    direction = torch.randn_like(logits)
    (actual,) = torch.autograd.grad(gradient, factor, direction)
    torch.testing.assert_close(actual, (gradient.detach() / 2 * direction).sum())


def test_backward_twice_with_a_retained_graph(case):
    """The memory of the gradient is handed on only where nobody can ask again."""
    _, function, x = case
    leaf = x.clone().requires_grad_()
    output = function(leaf)
    first = torch.autograd.grad(output, leaf, torch.tensor(3.0, dtype=x.dtype), retain_graph=True)[0].clone()
    (second,) = torch.autograd.grad(output, leaf)
    torch.testing.assert_close(first, 3 * second)


def test_hooks_on_saved_tensors_do_not_reach_into_an_op(case):
    """Checkpointing frees what the op saves and runs it again; the torch backend has an autograd graph of its own."""
    _, function, x = case
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    function(leaves[0]).backward()
    checkpoint(function, leaves[1], use_reentrant=False).backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)


def test_an_isolated_registry():
    name = "group_knowledge_loss"
    before = registry.implementations()
    logits = torch.randn(4, 5, 7)
    with registry.isolated():
        assert registry.implementations() == before

        class Failing:
            def forward(self, *arguments):
                raise BackendError("planted")

        dtypes = registry.find(name, "torch").dtypes
        registry.register(registry.Implementation(name, "cpp", ("cpu",), dtypes, Failing))
        loss(logits)
        assert registry.reason_against(name, "cpp", "cpu", torch.float32) == "planted"
        with registry.isolated(without="cpp"):
            assert registry.reason_against(name, "cpp", "cpu", torch.float32) == "the op has no such backend"
        assert registry.reason_against(name, "cpp", "cpu", torch.float32) == "planted"
    assert registry.implementations() == before
    assert registry.reason_against(name, "cpp", "cpu", torch.float32) != "planted"


def test_options_become_arguments_of_an_op_and_back():
    assert LossOptions.unflatten(OPTIONS.flatten()) == OPTIONS
    schema = torch.ops.gkt_fast.group_knowledge_loss.default._schema
    names = [argument.name for argument in schema.arguments][3:-2]
    assert [getattr(OPTIONS, name) for name in names] == list(OPTIONS.flatten())


def test_every_option_comes_from_the_configuration():
    config = GKTConfig(
        groups=2, loops=2, ema=0.1, temperature=3.0, normalize_logits=True, ce_weight=0.5, kd_weight=0.25,
        subnet_ce_weight=0.125, ignore_index=7, label_smoothing=0.2, distill_ignored=False,
        distillation="sigmoid",
    )  # fmt: skip
    options, defaults = LossOptions.from_config(config), LossOptions()
    differ = {name for name in vars(defaults) if getattr(options, name) != getattr(defaults, name)}
    assert differ == set(vars(defaults)) - {"eps"}
    assert all(getattr(options, name) == getattr(config, name) for name in differ)


def test_options_by_name_and_as_an_object_are_the_same():
    logits = torch.randn(7, 5, 9)
    by_name = group_knowledge_loss(logits, TARGETS, loops=2, ema=0.3, temperature=2.0)
    options = LossOptions(loops=2, ema=0.3)
    for other in (
        group_knowledge_loss(logits, TARGETS, options=options, temperature=2.0),
        GroupKnowledgeLoss(loops=2, ema=0.3, temperature=2.0)(logits, TARGETS),
    ):
        assert all(torch.equal(a, b) for a, b in zip(by_name, other, strict=True))


@pytest.mark.parametrize(
    "taker", [group_knowledge_loss, group_knowledge_loss_reference, GroupKnowledge, GroupKnowledgeLoss]
)
def test_options_are_listed_and_unknown_ones_refused(taker):
    listed = inspect.signature(taker).parameters
    for option in inspect.signature(LossOptions).parameters.values():
        assert listed[option.name].default == option.default
        assert listed[option.name].kind is inspect.Parameter.KEYWORD_ONLY
    tensors = (torch.randn(4, 5, 7), TARGETS) if inspect.isfunction(taker) else ()
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
        taker(*tensors, temprature=2.0)
    with pytest.raises(TypeError, match=r"ema is \[0.5\]; it must be a number"):
        taker(*tensors, ema=[0.5])  # without a hash
    with pytest.raises(TypeError, match="groups is True; it must be an int"):
        taker(*tensors, groups=True)


def test_what_is_no_options_object_is_refused():
    with pytest.raises(TypeError, match="options is 3; it must be LossOptions"):
        group_knowledge_loss(torch.randn(4, 5, 7), TARGETS, options=3)


def test_options_may_change_from_call_to_call_of_a_compiled_function():
    logits = torch.randn(4, 5, 7, requires_grad=True)

    def training_loss(logits: torch.Tensor, ema: float) -> torch.Tensor:
        return group_knowledge_loss(logits * 2, TARGETS, options=OPTIONS, ema=ema, kd_weight=2 * ema)[0]

    compiled = torch.compile(training_loss, fullgraph=True, backend="aot_eager")
    for ema in (0.25, 0.5, 0.75):
        wanted = torch.autograd.grad(training_loss(logits, ema), logits)
        torch.testing.assert_close(torch.autograd.grad(compiled(logits, ema), logits), wanted)
