"""`GKT` as an nn.Module: state, copies, modes of the model, cost, and the messages for bad input."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers.reference_step import MODES, count_calls, one_thread  # noqa: F401
from torch import nn

from gkt_fast import GKT, GKTConfig, Subnet
from gkt_fast.models import CifarResNet, cifar_resnet

CLASSES = 5


def small(dtype=torch.float32):
    torch.manual_seed(0)
    return CifarResNet((2, 2, 2), CLASSES, width=4).to(dtype)


def batch(size=4, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 8, 8, dtype=dtype, generator=generator)
    return images, torch.randint(CLASSES, (size,), generator=generator)


@pytest.mark.parametrize("mode", MODES)
def test_state_dict_keys_of_the_model_are_unchanged(mode):
    model = small()
    before, modules = list(model.state_dict()), list(model.named_modules())
    gkt = GKT(model, GKTConfig(execution=mode))
    assert gkt.model is model
    gkt(*batch()).loss.backward()
    assert list(model.state_dict()) == before
    assert list(model.named_modules()) == modules
    assert set(gkt.state_dict()) == {f"model.{key}" for key in before} | {"_extra_state"}
    CifarResNet((2, 2, 2), CLASSES, width=4).load_state_dict(model.state_dict())


@pytest.mark.parametrize("mode", MODES)
def test_the_model_keeps_nothing_of_a_step(mode):
    model = small()
    buffers = dict(model.named_buffers())
    vars_before = {name: set(vars(module)) for name, module in model.named_modules()}
    gkt = GKT(model, GKTConfig(execution=mode, batch_norm="all_streams"))
    gkt(*batch()).loss.backward()
    for name, module in model.named_modules():
        assert set(vars(module)) == vars_before[name]
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(model.get_buffer(name) is buffer for name, buffer in buffers.items())
    assert all(p.is_leaf and isinstance(p, nn.Parameter) for p in model.parameters())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("mode", MODES)
def test_copies_go_on_as_the_original(mode, how):
    gkt = GKT(small(), GKTConfig(groups=2, execution=mode, seed=3))
    gkt(*batch()).loss.backward()
    gkt.zero_grad()
    if how == "deepcopy":
        twin = copy.deepcopy(gkt)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(gkt))
    else:
        file = io.BytesIO()
        torch.save(gkt, file)
        twin = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert twin.config == gkt.config and twin.next_step == gkt.next_step == 1
    outs = [module(*batch(seed=1)) for module in (gkt, twin)]
    for out in outs:
        out.loss.backward()
    assert torch.equal(outs[0].loss, outs[1].loss) and outs[0].subnets == outs[1].subnets
    for ours, theirs in zip(gkt.parameters(), twin.parameters(), strict=True):
        assert ours is not theirs and torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_to_another_dtype(dtype, mode):
    gkt = GKT(small(), GKTConfig(groups=2, execution=mode))
    gkt(*batch())
    cost = gkt.cost(gkt.sample(0))
    gkt.to(dtype)
    out = gkt(*batch(dtype=dtype))
    out.loss.backward()
    assert out.logits.dtype == dtype
    assert out.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(p.grad.dtype == dtype for p in gkt.parameters())
    assert gkt.cost(gkt.sample(0)) == cost


def test_cost_after_a_change_of_dtype_without_another_call():
    gkt = GKT(small())
    gkt(*batch())
    gkt.double()
    assert gkt.cost(gkt.sample(0)).plain > 0


@pytest.mark.parametrize("mode", MODES)
def test_autocast(mode):
    gkt = GKT(small(), GKTConfig(groups=2, execution=mode))
    with torch.autocast("cpu", torch.bfloat16):
        out = gkt(*batch())
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in gkt.parameters())


@pytest.mark.parametrize("scale", [1024.0, torch.tensor(1024.0)])
def test_loss_scale_does_not_change_the_gradients(scale):
    """The inner backward passes of `sequential` run scaled; what is delivered is not."""
    found = {}
    runs = {"plain": ("sequential", None), "scaled": ("sequential", scale), "shared": ("shared", scale)}
    for name, (mode, loss_scale) in runs.items():
        gkt = GKT(small(torch.float64), GKTConfig(execution=mode))
        out = gkt(*batch(dtype=torch.float64), step=0, loss_scale=loss_scale)
        out.loss.backward()
        found[name] = [out.loss.detach(), *(p.grad for p in gkt.parameters())]
    for name in ("scaled", "shared"):
        for actual, expected in zip(found[name], found["plain"], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-13)


def test_train_and_eval():
    gkt = GKT(small())
    assert gkt.training and gkt.model.training
    gkt.eval()
    images, targets = batch()
    assert not gkt.model.training
    assert torch.equal(gkt(images), gkt.model(images))
    before = copy.deepcopy(gkt.model.state_dict())
    out = gkt(images, targets)
    assert gkt.next_step == 0 and torch.equal(out.logits, gkt.model(images))
    assert all(torch.equal(value, before[key]) for key, value in gkt.model.state_dict().items())
    gkt.train()
    gkt(images, targets)
    assert gkt.next_step == 1


def test_without_targets_the_model_runs_once():
    gkt = GKT(small())
    with count_calls(gkt.model, ["layer1.0", "fc"]) as calls:
        logits = gkt(batch()[0])
    assert calls == {"layer1.0": 1, "fc": 1} and gkt.next_step == 0
    assert logits.requires_grad and logits.shape == (4, CLASSES)


@pytest.mark.parametrize("mode", MODES)
def test_step_counter(mode):
    gkt = GKT(small(), GKTConfig(groups=2, execution=mode))
    drawn = [gkt(*batch()).subnets for _ in range(4)]
    assert drawn == [gkt.sample(step) for step in range(4)]
    assert gkt.next_step == 4
    assert gkt(*batch(), step=17).subnets == gkt.sample(17)
    assert gkt(*batch()).subnets == gkt.sample(18)


def test_the_step_counter_is_saved_with_the_state():
    gkt = GKT(small())
    fresh_state = gkt.get_extra_state()
    for _ in range(3):
        gkt(*batch())
    state = torch.load(_saved(gkt.state_dict()), weights_only=True)
    other = GKT(small())
    other.load_state_dict(state)
    assert other.next_step == 3
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert torch.equal(other.get_extra_state(), gkt.get_extra_state())
    assert gkt.get_extra_state().shape == fresh_state.shape
    assert other(*batch()).subnets == gkt(*batch()).subnets


def _saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


class Tiny(nn.Module):
    """Linear layers, whose FLOPs are counted in the head: 2 * inputs * outputs."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(10, 8)
        self.first = nn.Sequential(TinyBlock(), TinyBlock())
        self.between = nn.Linear(8, 8)
        self.second = nn.Sequential(TinyBlock(), TinyBlock(), TinyBlock())
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.second(self.between(self.first(self.stem(x)))))


class TinyBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(F.relu(self.up(x)))


STEM, BLOCK, BETWEEN, HEAD = 2 * 10 * 8, 2 * 2 * 8 * 16, 2 * 8 * 8, 2 * 8 * CLASSES
PLAIN = STEM + 5 * BLOCK + BETWEEN + HEAD


@pytest.mark.parametrize(
    "depths, sequential, shared",
    [
        ([(2, 3)], PLAIN, 0),
        ([(2, 1)], PLAIN - 2 * BLOCK, HEAD),
        ([(2, 1), (2, 1)], 2 * (PLAIN - 2 * BLOCK), HEAD),
        ([(1, 3)], PLAIN - BLOCK, BETWEEN + 3 * BLOCK + HEAD),
        ([(1, 3), (1, 2)], 2 * PLAIN - 3 * BLOCK, BETWEEN + 3 * BLOCK + 2 * HEAD),
        ([(0, 1)], PLAIN - 4 * BLOCK, BETWEEN + BLOCK + HEAD),
        ([], 0, 0),
    ],
)
def test_cost_by_hand(depths, sequential, shared):
    gkt = GKT(Tiny(), GKTConfig(groups=0))
    cost = gkt.cost([Subnet.ordered(d, gkt.stages) for d in depths], torch.randn(3, 10))
    assert (cost.plain, cost.sequential, cost.shared) == (PLAIN, PLAIN + sequential, PLAIN + shared)
    assert cost.shared_ratio == cost.shared / PLAIN


def test_cost_of_masks_that_are_not_ordered():
    gkt = GKT(Tiny())
    subnet = Subnet(((False, True), (True, False, True)))
    cost = gkt.cost([subnet], torch.randn(1, 10))
    assert cost.shared == PLAIN + BLOCK + BETWEEN + 2 * BLOCK + HEAD


def test_cost_of_a_cifar_resnet():
    """40.8 million multiply-adds at 32 x 32, He et al.'s ResNet-20 (3 x 32 x 32 images)."""
    gkt = GKT(cifar_resnet(20))
    plain = gkt.cost([], torch.randn(1, 3, 32, 32)).plain
    assert plain == pytest.approx(2 * 40.55e6, rel=2e-3)


def test_cost_takes_the_shape_of_the_last_call():
    gkt = GKT(small())
    with pytest.raises(ValueError, match="inputs is None and the model has not been called yet"):
        gkt.cost(gkt.sample(0))
    gkt(*batch())
    at_8 = gkt.cost([]).plain
    images, targets = torch.randn(2, 3, 16, 16), torch.tensor([0, 1])
    gkt(images, targets)
    head = 2 * 16 * CLASSES
    assert gkt.cost([]).plain - head == 4 * (at_8 - head)
    assert gkt.cost([], torch.randn(1, 3, 8, 8)).plain == at_8


def test_cost_leaves_the_model_as_it_is():
    gkt = GKT(small())
    gkt.model.bn1.eval()
    before = copy.deepcopy(gkt.state_dict())
    state = torch.get_rng_state()
    gkt.cost(gkt.sample(0), batch()[0])
    assert gkt.model.training and not gkt.model.bn1.training
    assert all(torch.equal(v, before[k]) for k, v in gkt.state_dict().items() if k != "_extra_state")
    assert torch.equal(torch.get_rng_state(), state)


class WithMask(Tiny):
    """Its second argument has no batch dimension."""

    def forward(self, x, mask, scale):
        return self.head(self.second(self.between(self.first(self.stem(x * mask * scale)))))


@pytest.mark.parametrize("mode", MODES)
def test_several_inputs(mode):
    gkt = GKT(WithMask(), GKTConfig(groups=2, execution=mode))
    out = gkt((torch.randn(4, 10), torch.ones(10), torch.tensor(2.0)), batch()[1])
    out.loss.backward()
    assert gkt.cost([]).plain == PLAIN


def test_shows_what_it_trains():
    text = repr(GKT(small(), GKTConfig(groups=2, loops=3)))
    assert "depths=2-2-2, groups=2, loops=3, sampler=inherit_decay" in text


def test_wrong_arguments_of_the_constructor():
    with pytest.raises(TypeError, match=r"model is list; it must be a torch.nn.Module"):
        GKT([])
    with pytest.raises(TypeError, match=r"config is dict; it must be a GKTConfig"):
        GKT(small(), {"groups": 2})
    with pytest.raises(ValueError, match=r"min_depth is \(1, 1\); it must have one entry for each of 3"):
        GKT(small(), GKTConfig(min_depth=(1, 1)))
    with pytest.raises(ValueError, match="sampler is 'best'; it must be one of"):
        GKT(small(), GKTConfig(sampler="best"))
    with pytest.raises(ValueError, match=r"depths is \(9, 1, 1\); its entry 0 must be between"):
        GKT(small(), GKTConfig(groups=1, sampler="fixed", subnets=((9, 1, 1),)))
    with pytest.raises(ValueError, match="temperature is nan; it must be in"):
        GKT(small(), GKTConfig(temperature=float("nan")))
    with pytest.raises(ValueError, match=r"model \(Linear\) has no run of residual blocks"):
        GKT(nn.Linear(2, 2))


TARGETS = [
    (torch.tensor([0, 1, 2, CLASSES]), ValueError, r"targets has class index 5; it must lie in \[0, 5\)"),
    (torch.tensor([0, -1, 2, 3]), ValueError, "targets has class index -1"),
    (torch.tensor([0, 1, 2]), ValueError, r"targets has shape \(3,\); class indices must have shape \(4,\)"),
    (torch.zeros(4, 1, dtype=torch.int64), ValueError, r"targets has shape \(4, 1\)"),
    (torch.zeros(4, 3), ValueError, r"targets has shape \(4, 3\); class probabilities must have"),
    (torch.zeros(4, dtype=torch.int32), TypeError, "targets is torch.int32; it must be int64"),
    ([0, 1, 2, 3], TypeError, "targets is a list; it must be a tensor"),
]


@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("targets, error, message", TARGETS)
def test_wrong_targets(targets, error, message, mode, groups):
    gkt = GKT(small(), GKTConfig(groups=groups, execution=mode))
    with pytest.raises(error, match=message):
        gkt(batch()[0], targets)
    assert all(p.grad is None for p in gkt.parameters())
    gkt(*batch()).loss.backward()


@pytest.mark.parametrize("mode", MODES)
def test_ignored_rows(mode):
    gkt = GKT(small(), GKTConfig(groups=2, execution=mode))
    images, targets = batch()
    targets[0] = -100
    assert gkt(images, targets).loss.isfinite()


@pytest.mark.parametrize("step", [1.0, "1", torch.tensor(1)])
def test_a_step_that_is_no_integer(step):
    gkt = GKT(small())
    with pytest.raises(TypeError, match=r"step is .*; it must be an integer"):
        gkt(*batch(), step=step)
    assert gkt.next_step == 0


class Returns(Tiny):
    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(super().forward(x))


class Output:
    def __init__(self, logits):
        self.logits = logits


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrap", [lambda z: {"logits": z}, lambda z: {"out": z, "aux": 2 * z}, Output])
def test_models_that_wrap_their_logits(wrap, mode):
    torch.manual_seed(0)
    wrapped = GKT(Returns(wrap), GKTConfig(execution=mode))
    torch.manual_seed(0)
    bare = GKT(Tiny(), GKTConfig(execution=mode))
    x, targets = torch.randn(4, 10), batch()[1]
    assert torch.equal(wrapped(x, targets, step=0).loss, bare(x, targets, step=0).loss)


@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("mode", MODES)
def test_models_that_return_something_else(mode, groups):
    gkt = GKT(Returns(lambda z: [z]), GKTConfig(groups=groups, execution=mode))
    with pytest.raises(TypeError, match="model returned list; it must return a tensor of logits"):
        gkt(torch.randn(4, 10), batch()[1])


@pytest.mark.parametrize("mode", MODES)
def test_dense_prediction(mode):
    """Logits (B, C, H, W), one target per position."""

    class Dense(CifarResNet):
        def forward(self, x):
            x = F.relu(self.bn1(self.conv1(x)))
            x = self.layer3(self.layer2(self.layer1(x)))
            return torch.einsum("kc,bchw->bkhw", self.fc.weight, x)

    torch.manual_seed(0)
    model = Dense((2, 2, 2), CLASSES, width=4).double()
    gkt = GKT(model, GKTConfig(groups=2, execution=mode))
    targets = torch.randint(CLASSES, (4, 2, 2))
    out = gkt(batch(dtype=torch.float64)[0], targets)
    assert out.logits.shape == (4, CLASSES, 2, 2)
    torch.testing.assert_close(out.ce, F.cross_entropy(out.logits, targets))
    out.loss.backward()
