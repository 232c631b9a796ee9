"""Wrappers around GKT, a model or its blocks: refused in words, or seen through; and other threads on the model."""

from __future__ import annotations

import threading

import pytest
import torch
import torch._dynamo
import torch.ao.quantization as quantization
from helpers.reference_step import one_thread  # noqa: F401
from torch import nn
from torch.nn.parallel import DataParallel

from gkt_fast import GKT, GKTConfig, compile_blocks
from gkt_fast.network.discovery import find_stages
from gkt_fast.network.interception import Site, intercept

MODES = ("sequential", "shared", "lean", "stacked")


# torch.compile, torch.jit.script and torch.ao.quantization warn of themselves.
pytestmark = pytest.mark.filterwarnings("ignore")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


def network(block=Block):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Sequential(*[block() for _ in range(3)]), nn.Linear(8, 5))


X, Y = torch.randn(6, 4), torch.randint(5, (6,))


@pytest.mark.parametrize("options", [{}, {"fullgraph": True}, {"dynamic": True}])
def test_a_compiled_gkt_is_refused(options):
    torch._dynamo.reset()
    error = torch._dynamo.exc.Unsupported if "fullgraph" in options else ValueError
    with pytest.raises(error, match=r"GKT is compiled by torch.compile.*gkt_fast.compile_blocks\(model\)"):
        torch.compile(GKT(network()), backend="eager", **options)(X, Y)


def test_a_gkt_compiled_in_place_or_within_another_module_is_refused():
    gkt = GKT(network())
    gkt.compile(backend="eager")
    with pytest.raises(ValueError, match="GKT is compiled"):
        gkt(X, Y)

    class Task(nn.Module):
        def __init__(self):
            super().__init__()
            self.gkt = GKT(network())

        def forward(self, x, y):
            return self.gkt(x, y).loss

    with pytest.raises(ValueError, match="GKT is compiled"):
        torch.compile(Task(), backend="eager")(X, Y)


def test_compiled_containers_of_blocks_are_refused():
    model = network()
    gkt = GKT(model)
    model[1].compile(backend="eager")
    with pytest.raises(ValueError, match=r"'1' is compiled as a whole and holds residual blocks"):
        gkt(X, Y)
    model = network()
    model[1] = torch.compile(model[1], backend="eager")
    for stages in (None, ["1._orig_mod"]):
        with pytest.raises(ValueError, match=r"'1' is what torch.compile returned.*compile_blocks"):
            GKT(model, stages=stages)


def test_blocks_wrapped_one_by_one_are_refused():
    model = network()
    for i in range(3):
        model[1][i] = torch.compile(model[1][i], backend="eager")
    for stages in (None, ["1"]):
        with pytest.raises(ValueError, match=r"'1\.0' is what torch.compile returned.*compile_blocks"):
            GKT(model, stages=stages)


def test_compiled_parts_without_blocks_stay():
    model = network()
    model[0] = torch.compile(model[0], backend="eager")
    model[2].compile(backend="eager")
    expected = GKT(network())(X, Y)
    torch.testing.assert_close(GKT(model)(X, Y).loss, expected.loss)
    compiled = network()
    compile_blocks(compiled, backend="eager")
    torch.testing.assert_close(GKT(compiled)(X, Y).loss, expected.loss)


def test_a_wrapped_norm_outside_of_the_blocks_is_not_stacked():
    model = nn.Sequential(
        torch.compile(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), backend="eager"), *network()[1:]
    )
    gkt = GKT(model, GKTConfig())
    gkt(X, Y).loss.backward()
    assert "execution: shared (states can't be stacked: '0' is compiled" in gkt.explain()


def test_data_parallel_is_refused_on_both_sides():
    with pytest.raises(ValueError, match=r"model is in DataParallel.*model\.module.*torchrun"):
        GKT(DataParallel(network()))
    replica = GKT(network())._replicate_for_data_parallel()
    replica.model = network()
    with pytest.raises(ValueError, match=r"in a copy made by DataParallel.*one process for each GPU"):
        replica(X, Y)


def test_script_modules_are_refused():
    with pytest.raises(ValueError, match=r"model is a ScriptModule \(RecursiveScriptModule\)"):
        GKT(torch.jit.script(network()))
    model = network()
    for i in range(3):
        model[1][i] = torch.jit.script(model[1][i])
    with pytest.raises(
        ValueError, match=r"1: 3 x RecursiveScriptModule \(ScriptModules, whose forward can't be seen"
    ):
        GKT(model)
    with pytest.raises(ValueError, match=r"'1\.0' is a ScriptModule"):
        GKT(model, stages=["1"])
    model = network()
    model[1] = torch.jit.script(model[1])
    with pytest.raises(ValueError, match="'1' is a ScriptModule"):
        GKT(model, stages=[["1.0", "1.1"]])


class OnTheFly(Block):
    """As the ResNets of a popular collection of CIFAR-100 models."""

    def forward(self, x):
        return nn.ReLU(inplace=True)(self.linear(x) + nn.Sequential()(x))


class OnTheFlyInside(Block):
    def forward(self, x):
        return x + nn.Sequential(nn.Tanh(), nn.Dropout(0.0))(self.linear(x))


class OnTheFlyUnskipped(Block):
    def forward(self, x):
        return nn.Softmax(1)(self.linear(x) + x)


@pytest.mark.parametrize("block", [OnTheFly, OnTheFlyInside])
@pytest.mark.parametrize("mode", MODES)
def test_blocks_whose_forward_makes_modules_are_found(block, mode):
    model = network(block)
    assert [stage.droppable for stage in find_stages(model)] == [(True,) * 3]
    reference = GKT(network(block), GKTConfig(execution="sequential"))(X, Y)
    result = GKT(model, GKTConfig(execution=mode))(X, Y)
    result.loss.backward()
    torch.testing.assert_close(result.loss, reference.loss)


def test_made_modules_that_change_the_skip_path_count():
    with pytest.raises(ValueError, match="no run of residual blocks"):
        find_stages(network(OnTheFlyUnskipped))


def quantised(fused):
    """Residual blocks that were prepared for quantisation-aware training."""

    class Quantised(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.relu = nn.Linear(8, 8), nn.ReLU()
            self.addition = nn.quantized.FloatFunctional()

        def forward(self, x):
            y = self.linear(x)
            return self.addition.add_relu(y, x) if fused else self.relu(self.addition.add(x, y))

    model = network(Quantised).train()
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    return quantization.prepare_qat(model)


@pytest.mark.parametrize("fused", [False, True])
def test_blocks_prepared_for_quantisation_are_found(fused):
    gkt = GKT(quantised(fused), GKTConfig())
    assert gkt.stages[0].droppable == (True,) * 3
    gkt(X, Y).loss.backward()
    assert all(parameter.grad is not None for parameter in gkt.parameters())
    assert "execution: shared" in gkt.explain() and "takes its range over all stacked states" in gkt.explain()


@pytest.mark.parametrize("mode", ["shared", "lean", "sequential"])
def test_another_thread_runs_the_modules_themselves(mode):
    """In the middle of a step, while stand-ins are in place, another thread's inference gets the plain result.

    Not in the first one, which tries the mode with other gains and biases.
    """
    results, meddling = [], False

    class Meddled(Block):
        def forward(self, x):
            if meddling and threading.current_thread() is threading.main_thread():
                thread = threading.Thread(target=infer)
                thread.start()
                thread.join()
            return super().forward(x)

    def infer():
        with torch.no_grad():
            results.append(model(X))

    model = network(Meddled)
    expected = model(X).detach()
    gkt = GKT(model, GKTConfig(execution=mode))
    gkt(X, Y, step=0)
    meddling = True
    loss = gkt(X, Y, step=0).loss
    loss.backward()
    assert len(results) >= 3 and all(torch.equal(result, expected) for result in results)
    torch.testing.assert_close(loss, GKT(network(), GKTConfig(execution=mode))(X, Y).loss)


def test_a_stand_in_without_its_module_is_an_error_and_no_recursion():
    model = network()
    with intercept(model, [Site(0, "1.0", True)], lambda site, module, args, kwargs: module(*args, **kwargs)):
        stand_in = model[1]._modules["0"]
        assert stand_in.linear is not None and isinstance(stand_in, Block)
        with pytest.raises(AttributeError):
            _ = type(stand_in).__new__(type(stand_in)).anything
