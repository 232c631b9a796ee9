"""Fused blocks as one autograd node: when they run so, what they hand over, what they keep."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from gkt_fast import fuse_blocks, use_backend
from gkt_fast.models.cifar_resnet import BasicBlock, cifar_resnet

resnet = pytest.importorskip("torchvision.models.resnet")


def bottleneck() -> nn.Module:
    projection = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    return resnet.Bottleneck(8, 4, 2, projection)


def pair(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A block in float64 and its fused copy."""
    block = block.double()
    fused = copy.deepcopy(block)
    assert fuse_blocks(nn.Sequential(fused))
    return block, fused


def images(channels=8) -> torch.Tensor:
    return torch.randn(4, channels, 6, 5, dtype=torch.float64, requires_grad=True)


def runs_as_one_node(y: torch.Tensor) -> bool:
    return type(y.grad_fn).__name__ == "_DifferentiatedBackward"


def same(block: nn.Module, fused: nn.Module, x: torch.Tensor, tolerance=1e-10) -> torch.Tensor:
    """Outputs, gradients and buffers agree; returns the fused output."""
    results = []
    for module in (block, fused):
        y = module(x)
        sources = [x, *(p for p in module.parameters() if p.requires_grad)]
        weight = torch.arange(1, y.numel() + 1, dtype=y.dtype).reshape(y.shape).cos()
        results.append((y, *torch.autograd.grad((y * weight).sum(), sources)))
    for actual, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)
    for actual, wanted in zip(fused.buffers(), block.buffers(), strict=True):
        torch.testing.assert_close(actual, wanted)
    return results[1][0]


@pytest.mark.parametrize("make", [lambda: BasicBlock(8, 8), lambda: BasicBlock(8, 12, 2), bottleneck])
@pytest.mark.parametrize("recompute", [True, False, "pointwise"])
def test_a_block_is_one_node(make, recompute):
    block = make().double()
    fused = copy.deepcopy(block)
    fuse_blocks(nn.Sequential(fused), recompute=recompute)
    for _ in range(3):
        assert runs_as_one_node(same(block, fused, images()))
    twin = copy.deepcopy(fused)
    assert twin.recompute is recompute
    same(block.eval(), twin.eval(), images())


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_momentum_and_statistics_that_are_not_tracked(momentum):
    block = bottleneck()
    block.bn1.momentum = block.downsample[1].momentum = momentum
    block.bn2.track_running_stats = False
    pair_ = pair(block)
    for _ in range(3):
        assert runs_as_one_node(same(*pair_, images()))


def change_momentum(block):
    block.bn1.momentum = 0.7


def exchange_buffers(block):
    for norm in (block.bn1, block.bn2):
        norm.running_mean, norm.running_var = norm.running_mean + 1, norm.running_var * 2
        norm.num_batches_tracked = norm.num_batches_tracked + 5


def count_in_floats(block):
    block.bn1.num_batches_tracked = torch.tensor(3.0)


def count_in_floats_in_place(block):
    """As what shards or converts a model does, and `load_state_dict(assign=True)` where it swaps tensors."""
    counter = block.bn1.num_batches_tracked
    torch.utils.swap_tensors(counter, counter.float())


def count_in_a_vector(block):
    block.bn1.num_batches_tracked.data = torch.zeros(2, dtype=torch.int64)


def move_statistics(block):
    block.bn1.running_mean.data = block.bn1.running_mean.clone()


def use_no_momentum(block):
    block.bn2.momentum = None


def change_the_statistics_dtype(block):
    block.bn1.running_mean = block.bn1.running_mean.float()
    block.bn1.running_var = block.bn1.running_var.float()


def change_the_statistics_dtype_in_place(block):
    for name in ("running_mean", "running_var"):
        buffer = getattr(block.bn1, name)
        torch.utils.swap_tensors(buffer, buffer.float())


def keep_statistics_as_attributes(block):
    for norm in (block.bn1, block.bn2):
        buffers = dict(norm._buffers)
        norm._buffers.clear()
        for name, buffer in buffers.items():
            setattr(norm, name, buffer)


def exchange_parameters(block):
    block.conv1.weight = nn.Parameter(block.conv1.weight.detach() * 2)
    block.bn2.bias = nn.Parameter(block.bn2.bias.detach() + 1)


def exchange_dictionaries(block):
    """As code does that shares what a module holds."""
    for module in (block.conv2, block.bn1):
        module._parameters = {
            name: p if p is None else nn.Parameter(p.detach() * 3) for name, p in module._parameters.items()
        }
    block.bn2._buffers = {name: buffer + 1 for name, buffer in block.bn2._buffers.items()}


def exchange_data(block):
    block.conv1.weight.data = block.conv1.weight.data[:, :, 1:2, 1:2].clone()
    block.conv1.padding = (0, 0)


@pytest.mark.parametrize(
    "change",
    [
        change_momentum, exchange_buffers, count_in_floats, count_in_floats_in_place, count_in_a_vector,
        move_statistics, use_no_momentum, change_the_statistics_dtype, change_the_statistics_dtype_in_place,
        keep_statistics_as_attributes, exchange_parameters, exchange_dictionaries, exchange_data,
    ],
)  # fmt: skip
def test_what_layers_hold_is_read_at_every_call(change):
    """Changed after the block has run as one node; torch itself refuses statistics of two dtypes."""
    block, fused = pair(BasicBlock(8, 8))
    same(block, fused, images())
    for module in (block, fused):
        change(module)
    if change in (change_the_statistics_dtype, change_the_statistics_dtype_in_place):
        x = images()
        expected = 0.9 * fused.bn1.running_mean + 0.1 * fused.conv1(x).mean((0, 2, 3)).float()
        fused(x)
        torch.testing.assert_close(fused.bn1.running_mean, expected)
        assert int(fused.bn1.num_batches_tracked) == 2
        return
    for _ in range(2):
        assert runs_as_one_node(same(block, fused, images()))


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_statistics_of_another_size_are_refused(backend):
    """And no memory beside them is written."""
    _, fused = pair(BasicBlock(8, 8))
    fused(images())
    fused.bn1.running_mean.data = torch.zeros(4, dtype=torch.float64)
    with use_backend(backend), pytest.raises(ValueError, match=r"shape \(4,\).* must have \(8,\)"):
        fused(images())
    assert torch.equal(fused.bn1.running_mean, torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("make", [lambda: BasicBlock(8, 8), lambda: resnet.BasicBlock(8, 8)])
def test_autocast_of_a_residual_that_is_not_cast(make):
    """torchvision's blocks add it in place."""
    block = make()
    fused = copy.deepcopy(block)
    fuse_blocks(nn.Sequential(fused))
    x = torch.randn(4, 8, 6, 5)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, actual = block(x), fused(x)
    assert actual.dtype is wanted.dtype
    torch.testing.assert_close(actual, wanted, rtol=2e-2, atol=2e-2)


def test_parametrised_convolutions_are_read_at_every_call():
    block = bottleneck()
    parametrizations.weight_norm(block.conv2)
    block, fused = pair(block)
    assert runs_as_one_node(same(block, fused, images()))
    with torch.no_grad():
        for module in (block, fused):
            module.conv2.parametrizations.weight.original0.mul_(2)
    same(block, fused, images())


class Halved(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) / 2


def change_padding(block):
    block.conv1.padding_mode = "reflect"


def change_class(block):
    halved = Halved(8, 8, 3, padding=1, bias=False, dtype=torch.float64)
    halved.load_state_dict(block.conv1.state_dict())
    block.conv1 = halved


def change_hook(block):
    block.conv1.register_forward_hook(lambda module, args, output: output * 3)


def change_stride(block):
    block.conv1.stride = block.conv1.padding = (2, 2)
    block.conv2.padding, block.conv2.dilation = (3, 2), (2, 2)


@pytest.mark.parametrize("change", [change_padding, change_class, change_hook, change_stride])
def test_what_a_convolution_does_otherwise(change):
    """Changed after the block has run as one node."""
    block, fused = pair(BasicBlock(8, 8))
    same(block, fused, images())
    for module in (block, fused):
        change(module)
    if change is not change_stride:
        assert not runs_as_one_node(same(block, fused, images()))
    else:
        assert fused.conv1(images()).shape == block.conv1(images()).shape


def test_a_block_that_ran_is_let_go():
    fused = weakref.ref(pair(BasicBlock(8, 8))[1])
    block = pair(BasicBlock(8, 8))[1]
    block(images()), gc.collect()
    assert fused() is None
    last = weakref.ref(block)
    del block
    gc.collect()
    assert last() is None


def test_frozen_parts_get_no_gradient():
    block, fused = pair(bottleneck())
    for module in (block, fused):
        for parameter in (module.conv1.weight, module.bn1.weight, module.bn3.bias):
            parameter.requires_grad_(False)
    assert runs_as_one_node(same(block, fused, images()))
    x = images().detach()
    fused(x).sum().backward()
    assert fused.conv1.weight.grad is None and fused.conv2.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    block, fused = (module.float() for module in pair(bottleneck()))
    x = torch.randn(4, 8, 6, 5, requires_grad=True)
    results = []
    for module in (block, fused):
        with torch.autocast("cpu", dtype):
            y = module(x)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), [x, *module.parameters()])))
    assert runs_as_one_node(results[1][0])
    for actual, wanted in zip(results[1], results[0], strict=True):
        assert actual.dtype == wanted.dtype
        assert (actual - wanted).abs().max() <= 0.06 * wanted.abs().max().clamp(min=1)


def test_the_cache_of_autocast_is_not_spoilt():
    """A low-precision copy of a weight that was made below autograd must not serve the next one who asks."""
    _, fused = pair(BasicBlock(8, 8))
    fused, x = fused.float(), torch.randn(2, 8, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        fused(x.bfloat16())
        assert fused.conv1(x).requires_grad


def test_operations_are_counted():
    counts = []
    for module in pair(bottleneck()):
        with FlopCounterMode(display=False) as counter:
            module(images()).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    weights = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    y.sum().backward()
    return sum(size for place, size in saved.items() if place not in weights)


def test_a_block_saves_less():
    model, x = cifar_resnet(20, num_classes=4), torch.randn(8, 3, 32, 32)
    plain = saved_bytes(model, x)
    kept, recomputed = copy.deepcopy(model), copy.deepcopy(model)
    fuse_blocks(kept, recompute=False), fuse_blocks(recomputed)
    falsy = copy.deepcopy(model)
    fuse_blocks(falsy, recompute=0)
    assert saved_bytes(recomputed, x) < 0.82 * plain
    assert saved_bytes(falsy, x) == saved_bytes(kept, x)
    assert 0.98 * plain < saved_bytes(kept, x) < 1.1 * plain


def test_a_bottleneck_without_the_outputs_of_pointwise_convolutions_saves_less():
    """An image's x has 240 values, what its four convolutions give 120, 36, 144 and 144; 240 and 36 remain."""
    block, x = bottleneck().double(), images()
    saved = {}
    for recompute in (True, "pointwise"):
        model = copy.deepcopy(block)
        fuse_blocks(nn.Sequential(model), recompute=recompute)
        saved[recompute] = saved_bytes(model, x)
    assert saved["pointwise"] < 0.45 * saved[True]


def test_activation_checkpointing():
    block, fused = pair(bottleneck())
    x = images()
    wanted = torch.autograd.grad(block(x).square().sum(), x)[0]
    y = checkpoint(fused, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], wanted)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_activation_checkpointing_counts_batches_as_torch_does(dtype):
    """What runs again counts again. A counter of floats isn't written by the node, as one on a GPU."""
    block, fused = pair(BasicBlock(8, 8))
    for module in (block, fused):
        for norm in (module.bn1, module.bn2):
            norm.num_batches_tracked = norm.num_batches_tracked.to(dtype)
        for _ in range(2):
            checkpoint(module, images(), use_reentrant=False).sum().backward()
    for name in ("bn1", "bn2"):
        counters = [getattr(module, name).num_batches_tracked for module in (block, fused)]
        assert int(counters[0]) == int(counters[1]) == 4


def test_changing_the_input_before_backward_is_noticed():
    _, fused = pair(BasicBlock(8, 8))
    x = images().detach()
    y = fused(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_differentiating_twice_is_refused():
    _, fused = pair(bottleneck())
    x = images()
    (gradient,) = torch.autograd.grad(fused(x).square().sum(), x, create_graph=True)
    with pytest.raises(
        RuntimeError, match="residual_block can't be differentiated twice; residual_block_ref"
    ):
        gradient.square().sum().backward()


def test_a_retained_graph_and_no_graph():
    block, fused = pair(bottleneck())
    x = images()
    y = fused(x)
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(3 * y.sum(), x)[0], 3 * first)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), block(x))
    block.load_state_dict(fused.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(fused.eval()(x), block.eval()(x))


def test_a_shortcut_that_torch_would_broadcast():
    """What the node can't add runs layer by layer, as torch adds it."""

    class OneChannel(nn.Module):
        def forward(self, x):
            return x[:, :1]

    block = BasicBlock(8, 8)
    block.shortcut = OneChannel()
    assert not runs_as_one_node(same(*pair(block), images()))


def test_one_value_per_channel_is_refused_in_words():
    _, fused = pair(BasicBlock(8, 8))
    with pytest.raises(ValueError, match="one value per channel"):
        fused(torch.randn(1, 8, 1, 1, dtype=torch.float64))


@pytest.mark.parametrize("which", ["one", "all"])
def test_norms_that_count_no_batches(which):
    block, fused = pair(bottleneck())
    for module in (block, fused):
        norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms[: 1 if which == "one" else None]:
            norm.num_batches_tracked = None
    assert runs_as_one_node(same(block, fused, images()))
