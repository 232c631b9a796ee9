"""What is known of a model has one owner, a look at a model leaves nothing behind, and one place decides what runs."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
from helpers.reference_step import one_thread  # noqa: F401
from torch import nn

from gkt_fast import GKT, GKTConfig, Subnet, active_subnet, evaluate
from gkt_fast.execution import EXECUTION_MODES, Mode, StackingError, choice, choose_execution
from gkt_fast.models import CifarResNet
from gkt_fast.network.look import look
from gkt_fast.network.network import Network
from gkt_fast.network.profile import count_layers, one_sample
from gkt_fast.subnets.streams import make_streams, place_of, stream_at

CLASSES = 5


def small(seed: int = 0) -> CifarResNet:
    torch.manual_seed(seed)
    return CifarResNet((2, 2, 2), CLASSES, width=4)


def batch(size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 3, 8, 8, generator=generator), torch.arange(size) % CLASSES


# --- one owner ---


@pytest.mark.parametrize("how", [copy.deepcopy, lambda gkt: pickle.loads(pickle.dumps(gkt))])
def test_a_copys_network_is_of_the_copys_model(how):
    gkt = GKT(small())
    gkt(*batch())
    twin = how(gkt)
    assert twin.network.model is twin.model is not gkt.model
    assert twin.network is not gkt.network and twin.network.returns == gkt.network.returns
    twin.network.returns.clear()
    assert gkt.network.returns


def test_a_model_put_in_anothers_place_is_the_one_that_runs():
    """As DataParallel does with its replicas, which share everything but the model."""
    gkt, other = GKT(small()), small(seed=1)
    gkt(*batch())
    expected = GKT(copy.deepcopy(other))(*batch(), step=1).loss
    gkt.model = other
    assert torch.equal(gkt(*batch(), step=1).loss, expected)
    assert gkt.network.model is other and gkt.network.returns
    replica = gkt._replicate_for_data_parallel()
    replica.model = small(seed=2)
    assert replica.network.model is replica.model and gkt.network.model is other


def test_stages_of_another_gkt_are_taken():
    first = GKT(small())
    assert GKT(small(), stages=first.stages[1:]).stages == first.stages[1:]


def test_a_state_of_another_model_is_refused():
    state = GKT(small()).network.state()
    with pytest.raises(ValueError, match="state has 18 entries; it must have 2 for each of 12 sites"):
        GKT(CifarResNet((3, 3, 3), CLASSES, width=4)).network.load_state(state)


# --- looks ---


class Restless(nn.Module):
    """Everything that a look must put back: noise of two generators, buffers, modes within modes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.other = nn.Module()
        self.other.register_buffer("calls", self.calls)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        assert self.other.calls is self.calls
        return self.dropout(self.norm(x)) * random.random()


@pytest.mark.parametrize("training", [False, True, None])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_a_look_leaves_nothing_behind(training, gradients, fails):
    model = Restless()
    model.norm.eval()
    buffers = dict(model.named_buffers(remove_duplicate=False))
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate()
    try:
        with look(model, training=training, gradients=gradients):
            output = model(batch()[0])
            assert output.requires_grad == gradients and model.calls == 1
            assert [m.training for m in model.modules()] == (
                modes if training is None else [training] * len(modes)
            )
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    for name, buffer in model.named_buffers(remove_duplicate=False):
        assert buffer is buffers[name] and torch.equal(buffer, before[name])


def test_buffers_are_no_activations_kept_for_backward():
    class WithTable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.ones(1, 8))
            self.scale = nn.Parameter(torch.ones(8))
            self.same = nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.same(self.scale * self.table)

    model = nn.Sequential(nn.Sequential(WithTable(), WithTable()), nn.Identity())
    network = Network(model, GKT(model, GKTConfig(groups=0), stages=["0"]).stages)
    layers = count_layers(model, network.sites, one_sample((torch.randn(2, 8),)))
    assert [layer.saved_bytes for layer in layers] == [0, 0, 0]


def test_evaluation_leaves_layers_in_the_modes_that_they_had():
    """A frozen BatchNorm stays frozen."""
    model = small().train()
    model.bn1.eval()
    modes = [module.training for module in model.modules()]
    evaluate(model, [batch()], (1, 1, 1), calibration_loader=[batch()])
    with active_subnet(model, (1, 1, 1)):
        model(batch()[0])
    assert [module.training for module in model.modules()] == modes


# --- one place decides ---


def mode_that_ran(gkt: GKT, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modes whose functions a step calls, in order."""
    ran: list[str] = []

    def noting(name: str, run):
        def note(*args):
            ran.append(name)
            return run(*args)

        return note

    with monkeypatch.context() as patch:
        for name, mode in EXECUTION_MODES.items():
            patch.setitem(
                EXECUTION_MODES, name, Mode(noting(name, mode.run), mode.refusal, mode.shares_states)
            )
        plain = choice.plain.MODE
        patch.setattr(choice.plain, "MODE", Mode(noting("plain", plain.run), shares_states=False))
        gkt(*batch(), step=0)
    return ran


def explained(gkt: GKT) -> str:
    return gkt.explain().splitlines()[-1].removeprefix("execution: ").partition(" ")[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"groups": 0},
        {"groups": 0, "execution": "stacked"},
        {"groups": 1, "train_full": False, "sampler": "stochastic_depth"},
        {"groups": 1, "subnet_resolution": 6},
        *({"execution": mode} for mode in EXECUTION_MODES),
    ],
    ids=str,
)
def test_explain_names_the_mode_that_runs(options, monkeypatch):
    gkt = GKT(small(), GKTConfig(**options))
    gkt.layers(batch()[0])
    named = explained(gkt)
    assert mode_that_ran(gkt, monkeypatch) == [named]
    assert explained(gkt) == named


class Between(CifarResNet):
    """Computes something between two blocks, which shows only while stacked states run."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer1[0](torch.relu(self.bn1(self.conv1(x)))) * 1.5
        x = self.layer1[1](x) * 1.5
        x = self.layer3(self.layer2(x))
        return self.fc(x.mean((2, 3)))


def test_what_shows_only_while_it_runs_is_explained_from_then_on(monkeypatch):
    gkt = GKT(
        Between((2, 2, 2), CLASSES, width=4), GKTConfig(groups=1, sampler="fixed", subnets=((1, 1, 1),))
    )
    gkt.layers(batch()[0])
    assert "the first step shows whether the model can be stacked" in gkt.explain()
    assert mode_that_ran(gkt, monkeypatch) == ["stacked", "shared"]
    assert explained(gkt) == "shared" and "computes something between two blocks" in gkt.explain()
    assert mode_that_ran(gkt, monkeypatch) == ["shared"]


def test_a_mode_that_is_asked_for_and_refuses_is_explained(monkeypatch):
    model = small()
    model.bn1.register_forward_hook(lambda *_: None)
    gkt = GKT(model, GKTConfig(execution="stacked", fuse_blocks=False))
    gkt.layers(batch()[0])
    assert "execution: stacked (asked for, but it refuses this model: " in gkt.explain()
    with pytest.raises(StackingError, match=r"'bn1'.*has hooks"):
        gkt(*batch())
    assert mode_that_ran(GKT(model, GKTConfig(fuse_blocks=False)), monkeypatch) == ["shared"]


def test_what_runs_takes_the_signature_of_a_mode():
    network = Network(small(), GKT(small()).stages)
    network.remember(batch()[:1])
    config = GKTConfig(groups=0)
    streams = make_streams([], network.stages, config)
    chosen = choose_execution(network, streams)
    result = chosen.run(network, batch()[:1], batch()[1], streams, None)
    assert (chosen.mode, chosen.reason) == ("plain", "the step has a single stream")
    assert torch.equal(result.loss.detach(), nn.functional.cross_entropy(result.logits, batch()[1]))


# --- streams ---


@pytest.mark.parametrize(("groups", "loops"), [(1, 1), (3, 1), (1, 4), (3, 2)])
def test_places_of_streams(groups, loops):
    expected = [(loop, group) for loop in range(1, loops + 1) for group in range(1, groups + 1)]
    assert [place_of(stream, groups) for stream in range(1, 1 + groups * loops)] == expected
    assert [stream_at(*place, groups) for place in expected] == [*range(1, 1 + groups * loops)]


def test_a_subnet_of_depths_or_as_it_is():
    stages = GKT(small()).stages
    subnet = Subnet.of((1, 2, 1), stages)
    assert subnet.depths == (1, 2, 1) and Subnet.of(subnet, stages) is subnet
    with pytest.raises(ValueError, match=r"depths is \(9, 1, 1\)"):
        Subnet.of((9, 1, 1), stages)


def test_forms_that_come_back_are_not_counted_again(monkeypatch):
    """Images of several sizes, batch by batch."""
    from gkt_fast.network import network as module

    counted, count = [], module.count_layers
    monkeypatch.setattr(module, "count_layers", lambda *args: counted.append(args[2]) or count(*args))
    gkt = GKT(small(seed=0), GKTConfig(groups=1))
    costs = {}
    for size in (8, 12, 8, 12, 16, 8):
        gkt(torch.randn(2, 3, size, size), torch.tensor([0, 1]))
        cost = sum(layer.flops for layer in gkt.layers())
        assert costs.setdefault(size, cost) == cost
    assert len(counted) == 3
    assert costs[8] < costs[12] < costs[16]
