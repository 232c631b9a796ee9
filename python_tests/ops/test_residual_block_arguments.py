"""What residual_block refuses, in words, and tensors whose memory doesn't hold their values as they are."""

from __future__ import annotations

import pytest
import torch
from helpers.residual_block_formula import CASES, make
from torch.testing._internal.two_tensor import TwoTensor

from gkt_fast import ghost_batch_norm, residual_block
from gkt_fast.ops.residual_block import Norm

NAN = float("nan")


def run(inputs, x=None, first_norm=None, first_convolution=None, **options):
    """The case with some of its arguments exchanged; y."""
    convolutions, norms = [*inputs.convolutions], [*inputs.norms]
    if first_norm is not None:
        norms[0] = first_norm
    if first_convolution is not None:
        convolutions[0] = convolutions[0]._replace(**first_convolution)
    x = inputs.x if x is None else x
    return residual_block(x, convolutions, norms, **{**inputs.options, **options})[0]


VALUES = {
    "no ghost batch": ({"ghosts": 0}, "ghosts is 0; it must be at least 1"),
    "less than none": ({"ghosts": -1}, "ghosts is -1; it must be at least 1"),
    "rows that don't divide": ({"ghosts": 3}, "divide the 4 rows"),
    "no lead rows": ({"lead_rows": 0}, "lead_rows is 0; it must be at least 1"),
    "lead rows below zero": ({"lead_rows": -2}, "lead_rows is -2; it must be at least 1"),
    "lead rows alone": ({"lead_rows": 4}, "lead_rows is 4; it must be at least 1 and leave rows"),
    "lead rows of one": ({"ghosts": 1, "lead_rows": 2}, "the one ghost batch has all 4 rows"),
    "skip that broadcasts": ({"skip": torch.ones(4, 5, 1, 1).double()}, r"must be \(4, 5, 7, 5\), as what"),
    "skip of one row": ({"skip": torch.ones(1, 5, 7, 5).double()}, r"must be \(4, 5, 7, 5\)"),
    "skip without rows": ({"skip": torch.ones(5, 7, 5).double()}, "skip has shape"),
    "few to keep": ({"keep": torch.tensor([True])}, r"keep has shape \(1,\); it must be \(2,\)"),
    "no list to keep": ({"keep": torch.tensor(True)}, r"keep has shape \(\)"),
    "keep elsewhere": ({"keep": torch.ones(2, dtype=torch.bool, device="meta")}, "keep is on meta"),
    "short weight": ({"first_norm": Norm(torch.ones(4).double())}, r"weight has shape \(4,\)"),
    "weight elsewhere": ({"first_norm": Norm(torch.ones(5, device="meta").double())}, "weight is on meta"),
    "mean alone": ({"first_norm": Norm(running_mean=torch.ones(5).double())}, "must be given together"),
    "eps below zero": ({"first_norm": Norm(eps=-1.0)}, "eps is -1.0"),
    "eps that is no number": ({"first_norm": Norm(eps=NAN)}, "eps is nan"),
    "one value": ({"x": torch.ones(2, 5, 1, 1).double()}, r"norms\[0\] reads has shape .* no variance"),
    "convolution elsewhere": (
        {"first_convolution": {"weight": torch.ones(5, 5, 3, 3, device="meta")}},
        r"convolutions\[0\] is on meta",
    ),
}
TYPES = {
    "skip of another dtype": ({"skip": torch.ones(4, 5, 7, 5)}, "skip is a tensor of torch.float32"),
    "keep of numbers": ({"keep": torch.ones(2)}, "it must be a tensor of torch.bool"),
    "ghosts no number": ({"ghosts": True}, "ghosts is True"),
    "sparse": ({"x": torch.ones(4, 5, 7, 5).double().to_sparse()}, "must be a dense tensor"),
    "mkldnn": ({"x": torch.ones(4, 5, 7, 5).to_mkldnn()}, "must be a dense tensor"),
}


@pytest.mark.parametrize("what", VALUES)
def test_wrong_values(what):
    options, words = VALUES[what]
    with pytest.raises(ValueError, match=words):
        run(make(CASES["basic"]), **options)


@pytest.mark.parametrize("what", TYPES)
def test_wrong_types(what):
    options, words = TYPES[what]
    with pytest.raises(TypeError, match=words):
        run(make(CASES["basic"]), **options)


def test_a_shortcut_of_another_shape():
    inputs = make(CASES["basic, strided"])
    convolution, norm = inputs.options["shortcut"]
    with pytest.raises(ValueError, match="what shortcut gives has shape"):
        run(inputs, shortcut=(convolution._replace(stride=(1, 1)), norm))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_leave_the_backend_in_use():
    inputs = make(CASES["basic"], torch.float32)
    nested = torch.nested.nested_tensor([torch.ones(5, 7, 5)] * 4)
    with pytest.raises(TypeError, match="x is a nested tensor"):
        run(inputs, x=nested)
    with pytest.raises(TypeError, match="x is a nested tensor"):
        ghost_batch_norm(nested, None, None, ghosts=2)
    assert run(inputs).isfinite().all()


def negated(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, as a view that torch negates when it reads it."""
    view = torch._neg_view(-tensor.detach())
    assert view.is_neg()
    return view


@pytest.mark.parametrize("case", ["basic, skip", "preactivation"])
def test_views_that_are_negated_when_read(case):
    inputs = make(CASES[case])
    norm, weight = inputs.norms[0], inputs.convolutions[0].weight
    of_norm = norm._replace(weight=negated(norm.weight), bias=negated(norm.bias))
    views = {"x": negated(inputs.x), "first_norm": of_norm, "first_convolution": {"weight": negated(weight)}}
    if "skip" in inputs.options:
        views["skip"] = negated(inputs.options["skip"])
    wanted = run(inputs)
    for name, view in views.items():
        torch.testing.assert_close(run(inputs, **{name: view}), wanted, msg=name)
    x = views["x"].requires_grad_()
    y = run(inputs, x=x)
    found = torch.autograd.grad(y, x, torch._neg_view(-torch.ones_like(y)))
    torch.testing.assert_close(found, torch.autograd.grad(wanted, inputs.x, torch.ones_like(y)))


def test_a_gradient_of_zeros_without_memory():
    inputs = make(CASES["basic"])
    y = run(inputs)
    for gradient in torch.autograd.grad(
        y, [*inputs.leaves.values()], torch._efficientzerotensor(y.shape, dtype=y.dtype)
    ):
        assert not gradient.any()


@pytest.mark.parametrize("which", ["convolution", "norm", "skip"])
def test_subclasses_among_the_tensors_see_the_op(which):
    inputs = make(CASES["basic, skip"])
    weight, norm = inputs.convolutions[0].weight.detach(), inputs.norms[0]
    twice = lambda tensor: TwoTensor(tensor, 2 * tensor)  # noqa: E731
    options = {
        "convolution": {"first_convolution": {"weight": twice(weight)}},
        "norm": {"first_norm": norm._replace(weight=twice(norm.weight.detach()))},
        "skip": {"skip": twice(inputs.options["skip"].detach())},
    }[which]
    with torch.no_grad():
        y, wanted = run(inputs, **options), run(inputs)
        assert isinstance(y, TwoTensor)
        torch.testing.assert_close(y.a, wanted)
        assert which == "convolution" or not torch.equal(y.b, wanted)


@pytest.mark.parametrize("recompute", [True, False, "pointwise"], ids=["recomputed", "saved", "pointwise"])
@pytest.mark.parametrize("layout", ["planes", "channels_last"])
@pytest.mark.parametrize("case", ["basic", "bottleneck, projection", "preactivation, bottleneck"])
def test_hooks_on_saved_tensors_that_change_layouts(case, layout, recompute):
    other = torch.contiguous_format if layout == "channels_last" else torch.channels_last
    inputs = make(CASES[case], layout=layout)

    def gradients():
        y, _ = residual_block(
            inputs.x, inputs.convolutions, inputs.norms, recompute=recompute, **inputs.options
        )
        return torch.autograd.grad(y.cos().sum(), [*inputs.leaves.values()])

    def pack(tensor):
        return tensor.contiguous(memory_format=other) if tensor.dim() == 4 else tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = gradients()
    torch.testing.assert_close(found, gradients())
