"""Cascades: every row is what its depth gives alone, rows really leave, shared states run once; fitting; errors."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from helpers.reference_step import one_thread  # noqa: F401
from helpers.small_nets import Net
from torch import nn

from gkt_fast import Cascade, Subnet, fit_cascade, make_elastic
from gkt_fast.deployment.cascade import CONFIDENCES, confidence_of
from gkt_fast.deployment.subnet_choice import nested_subnets
from gkt_fast.instruments.zoo import ZOO, ZooModel
from gkt_fast.models import cifar_resnet
from gkt_fast.network.calls import logits_of
from gkt_fast.network.discovery import find_stages
from gkt_fast.network.profile import count_flops

DEPTHS = [(1, 1, 1), (1, 2, 2), (2, 2, 2)]
ROWS = 10


def images(size=12, rows=ROWS, seed=1):
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def elastic():
    torch.manual_seed(0)
    model = cifar_resnet(14, num_classes=5, width=4)
    return make_elastic(model, DEPTHS, calibration_loader=[images(seed=2)])


def alone(elastic, x, order):
    with torch.no_grad():
        return [logits_of(elastic(x, depths=depths)) for depths in order]


def by_hand(logits, thresholds, kind="probability"):
    """Exits and logits of rows that are decided one by one."""
    sure = [confidence_of(z, kind) for z in logits]
    exits = [
        next((i for i, t in enumerate(thresholds) if sure[i][row] >= t), len(thresholds))
        for row in range(ROWS)
    ]
    return torch.tensor(exits), torch.stack([logits[exit][row] for row, exit in enumerate(exits)])


def between(values):
    """A threshold in the middle of a gap, so that rounding moves no row over it."""
    ordered = values.sort().values
    gap = (ordered[1:] - ordered[:-1]).argmax()
    return float(ordered[gap : gap + 2].mean())


@pytest.mark.parametrize("zoo_model", ZOO, ids=str)
def test_rows_are_what_their_depth_gives_alone(zoo_model: ZooModel):
    torch.manual_seed(0)
    model = zoo_model.build_small()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    subnets = nested_subnets(find_stages(model), 1, 4)
    x = images(zoo_model.small_pixels)
    elastic = make_elastic(model, subnets, calibration_loader=[x])
    logits = alone(elastic, x, subnets)
    thresholds = [between(confidence_of(z, "probability")) for z in logits[:-1]]
    result = Cascade(elastic, subnets, thresholds)(x)
    exits, expected = by_hand(logits, thresholds)
    assert torch.equal(result.exits, exits) and len(exits.unique()) > 1
    torch.testing.assert_close(result.logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_confidences_and_temperatures(elastic, confidence):
    x, temperatures = images(), (0.5, 2.0, 1.5)
    logits = [z / t for z, t in zip(alone(elastic, x, DEPTHS), temperatures, strict=True)]
    thresholds = [between(confidence_of(z, confidence)) for z in logits[:-1]]
    cascade = Cascade(elastic, None, thresholds, confidence=confidence, temperatures=temperatures)
    result = cascade(x)
    exits, expected = by_hand(logits, thresholds, confidence)
    assert torch.equal(result.exits, exits)
    torch.testing.assert_close(result.logits, expected)
    torch.testing.assert_close(result.confidence, confidence_of(expected, confidence))


def test_confidence_by_hand():
    logits = torch.tensor([[0.6, 0.3, 0.1]]).log()
    assert confidence_of(logits, "probability").item() == pytest.approx(0.6)
    assert confidence_of(logits, "margin").item() == pytest.approx(0.3)
    even = torch.zeros(1, 7)
    assert confidence_of(even, "entropy").item() == pytest.approx(0, abs=1e-6)
    assert confidence_of(torch.tensor([[100.0, 0.0]]), "entropy").item() == pytest.approx(1)
    assert confidence_of(logits.half(), "margin").dtype == torch.float32


class Counted(nn.Module):
    """A residual block that counts the rows that it computes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.rows = 0

    def forward(self, x):
        self.rows += len(x)
        return x + F.gelu(self.conv(x))


def test_rows_leave_and_shared_states_run_once():
    """Of a network of one stage: after the exit it goes on with the rows that are left, from where it was."""
    elastic = make_elastic(Net(Counted, depth=4).float(), [(1,), (2,), (4,)], stages=["blocks"])
    x = images(6)
    blocks = elastic.at((4,)).blocks
    logits = alone(elastic, x, [(1,), (2,), (4,)])
    thresholds = [between(confidence_of(z, "probability")) for z in logits[:-1]]
    cascade = Cascade(elastic, None, thresholds)
    cascade(x)
    for block in blocks:
        block.rows = 0
    exits = cascade(x).exits
    left = [ROWS, int((exits > 0).sum()), int((exits > 1).sum())]
    assert [block.rows for block in blocks] == [left[0], left[1], left[2], left[2]]
    assert 0 < left[2] <= left[1] < ROWS
    for block in blocks:
        block.rows = 0
    everything = Cascade(elastic, None, [0.0, 0.0])
    assert everything(x).exits.tolist() == [0] * ROWS
    for block in blocks:
        block.rows = 0
    everything(x)
    assert [block.rows for block in blocks] == [ROWS, 0, 0, 0]


def test_costs(elastic):
    """A depth adds what it doesn't share with the one before; the last one alone is the sum of a single exit."""
    x = images()
    single = [sum(Cascade(elastic, [depths]).flops(x)) for depths in DEPTHS]
    assert single == [
        count_flops(elastic.at(depths), (torch.empty(1, 3, 12, 12, device="meta"),)) for depths in DEPTHS
    ]
    steps = Cascade(elastic, None, [0.5, 0.5]).flops(x)
    assert steps[0] == single[0] and all(
        0 < step < cost for step, cost in zip(steps[1:], single[1:], strict=True)
    )
    vit = next(z for z in ZOO if str(z) == "timm-vit_tiny_patch16_224").build_small()
    whole = make_elastic(vit, [(2,), (4,)])
    first, second = Cascade(whole, None, [0.5]).flops(images(16))
    head = 2 * vit.head.in_features * vit.head.out_features
    assert first + second == count_flops(vit, (torch.empty(1, 3, 16, 16, device="meta"),)) + head


class WritesAndReturnsTuples(nn.Module):
    """Takes and returns (activation, scale), and writes into its input."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x, scale):
        y = self.norm(self.conv(x)) * scale
        x += y
        return x, scale


class Awkward(nn.Module):
    """Dict of logits, tuples between blocks, a constant as long as a batch may be, in-place code between layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.blocks = nn.ModuleList(WritesAndReturnsTuples() for _ in range(3))
        self.scales = Scales()
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x)
        scale = self.scales(x)
        x += 1
        for block in self.blocks:
            x, scale = block(x, scale)
        return {"logits": self.head(x.mean((2, 3))), "scale": scale}


class Scales(nn.Module):
    """Gives a tensor of 6 rows whatever the batch is."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 6))

    def forward(self, x):
        return self.weight.reshape(6, 1, 1) * 1.0


@pytest.mark.parametrize("rows", [6, 10])
def test_awkward_networks(rows):
    torch.manual_seed(0)
    x = images(6)
    order = [(1,), (2,), (3,)]
    elastic = make_elastic(Awkward(), order, calibration_loader=[x], stages=["blocks"])
    logits = alone(elastic, x, order)
    thresholds = [between(confidence_of(z, "probability")) for z in logits[:-1]]
    exits, expected = by_hand(logits, thresholds)
    result = Cascade(elastic, None, thresholds)(x[:rows].clone())
    assert torch.equal(result.exits, exits[:rows])
    torch.testing.assert_close(result.logits, expected[:rows])


class LooksBack(nn.Module):
    """The head reads the stem's output again, over all blocks."""

    def __init__(self):
        super().__init__()
        net = Net(depth=3).float()
        self.stem, self.blocks, self.head = net.stem, net.blocks, net.head

    def forward(self, x):
        stem = x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head((x + stem.tanh()).mean((2, 3)))


def test_networks_that_read_back():
    x, order = images(6), [(1,), (2,), (3,)]
    elastic = make_elastic(LooksBack(), order, calibration_loader=[x])
    logits = alone(elastic, x, order)
    thresholds = [between(confidence_of(z, "probability")) for z in logits[:-1]]
    exits, expected = by_hand(logits, thresholds)
    result = Cascade(elastic, None, thresholds)(x)
    assert torch.equal(result.exits, exits)
    torch.testing.assert_close(result.logits, expected)


class DependentRows(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net(depth=2).float()
        self.norm = nn.Identity()

    def forward(self, x):
        x = self.net.stem(x)
        for block in self.net.blocks:
            x = block(x)
        x = x.mean((2, 3))
        return self.net.head(x - x.mean(0))


def test_rows_that_depend_on_each_other_are_refused():
    """The rows that leave would change those that stay."""
    x = images(6)
    elastic = make_elastic(DependentRows(), [(1,), (2,)], calibration_loader=[x])
    with pytest.raises(ValueError, match="rows aren't independent of each other"):
        Cascade(elastic, None, [0.5])(x)


class Splits(nn.Module):
    """Two rows for each image behind the stem."""

    def __init__(self):
        super().__init__()
        self.net = Net(depth=2).float()
        self.split = nn.Sequential(nn.Conv2d(3, 12, 1), nn.Unflatten(1, (2, 6)), nn.Flatten(0, 1))

    def forward(self, x):
        x = self.split(x)
        for block in self.net.blocks:
            x = block(x)
        return self.net.head(x.mean((2, 3))).unflatten(0, (-1, 2)).mean(1)


def test_batches_that_grow_are_refused():
    x = images(6)
    elastic = make_elastic(Splits(), [(1,), (2,)], calibration_loader=[x])
    with pytest.raises(ValueError, match="first dimension is neither the batch nor fixed"):
        Cascade(elastic, None, [0.5])(x)


@pytest.mark.parametrize("rows", [1, 2])
def test_small_batches_and_channels_last(elastic, rows):
    cascade = Cascade(copy.deepcopy(elastic).to(memory_format=torch.channels_last), None, [1.0, 1.0])
    x = images()[:rows].to(memory_format=torch.channels_last)
    with torch.inference_mode():
        result = cascade(x)
    torch.testing.assert_close(result.logits, alone(elastic, x, DEPTHS)[-1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="the batch has no rows"):
        Cascade(elastic, None, [1.0, 1.0])(x[:0])


def test_copies_and_conversions(elastic):
    """A cascade that has run follows its network to another dtype, and its copy has a network of its own."""
    x = images()
    cascade = Cascade(copy.deepcopy(elastic), None, [0.3, 0.3])
    first = cascade(x)
    other = pickle.loads(pickle.dumps(cascade))
    assert torch.equal(other(x).logits, first.logits)
    with torch.no_grad():
        other.elastic.at().fc.bias += 1
    assert torch.equal(cascade(x).logits, first.logits)
    assert cascade.double()(x.double()).logits.dtype == torch.float64
    cascade.elastic.bfloat16()
    assert cascade(x.bfloat16()).logits.dtype == torch.bfloat16


def test_several_threads(elastic):
    x = images()
    cascade = Cascade(elastic, None, [0.3, 0.4])
    batches = [x, x[:3], x[5:]]
    expected = [cascade(batch).logits for batch in batches]
    wrong = []

    def work(batch, logits):
        wrong.extend(1 for _ in range(20) if not torch.equal(cascade(batch).logits, logits))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(batches, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        ({"thresholds": [0.5, 1.5]}, ValueError, "thresholds has the entry 1.5; it must be between 0 and 1"),
        ({"thresholds": [-0.1, 0.5]}, ValueError, "thresholds has the entry -0.1"),
        ({"thresholds": [float("nan"), 0.5]}, ValueError, "thresholds has the entry nan"),
        ({"thresholds": [0.5]}, ValueError, "thresholds has 1 entries; .* but the last: 2"),
        (
            {"order": [(1, 2, 2), (1, 1, 1), (2, 2, 2)]},
            ValueError,
            "it must be nested, smallest first, but 1-2-2",
        ),
        ({"order": [(2, 2, 2)] * 3}, ValueError, "it must be nested"),
        ({"order": [(2, 1, 1), (2, 2, 2)]}, ValueError, "this network was made for 1-1-1, 1-2-2, 2-2-2"),
        ({"order": []}, ValueError, "order is empty"),
        ({"confidence": "luck"}, ValueError, "confidence is 'luck'; it must be one of 'probability'"),
        ({"temperatures": [1, 2]}, ValueError, "temperatures has 2 entries"),
        (
            {"temperatures": [1, 0, 1]},
            ValueError,
            "temperatures has the entry 0.0; it must be greater than 0",
        ),
    ],
)
def test_arguments_that_do_not_fit(elastic, arguments, kind, message):
    with pytest.raises(kind, match=message):
        Cascade(elastic, **({"thresholds": [0.5, 0.5]} | arguments))


def test_an_order_that_is_not_nested():
    model = cifar_resnet(14, num_classes=5, width=4)
    elastic = make_elastic(model, [(2, 1, 1), (1, 2, 2)], calibration_loader=[images()])
    with pytest.raises(ValueError, match="order is 2-1-1, 1-2-2; it must be nested"):
        Cascade(elastic, None, [0.5])
    with pytest.raises(TypeError, match="elastic is CifarResNet; it must be an ElasticNetwork"):
        Cascade(model, None, [0.5])


def test_training_mode_is_refused(elastic):
    cascade = Cascade(copy.deepcopy(elastic), None, [0.5, 0.5]).train()
    with pytest.raises(RuntimeError, match=r"the network is in training mode.*call \.eval\(\)"):
        cascade(images())
    with pytest.raises(RuntimeError, match="the network is in training mode"):
        fit_cascade(cascade.elastic, [(images(), torch.zeros(ROWS))])
    cascade.eval()(images())


def test_dense_predictions_are_refused():
    class Dense(Net):
        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = block(x)
            return x

    elastic = make_elastic(Dense(depth=2).float(), [(1,), (2,)], calibration_loader=[images(6)])
    with pytest.raises(ValueError, match=r"logits of shape \(10, 6, 6, 6\); a cascade needs \(B, C\)"):
        Cascade(elastic, None, [0.5])(images(6))


@pytest.fixture(scope="module")
def validation(elastic):
    """Targets that the larger depths get right more often."""
    x = images(rows=300, seed=3)
    logits = alone(elastic, x, DEPTHS)
    targets = logits[-1].argmax(1)
    targets[::7] = (targets[::7] + 1) % 5
    return [(x[:200], targets[:200]), (x[200:], targets[200:])], logits, targets


def test_fit_to_an_accuracy(elastic, validation):
    loader, logits, targets = validation
    last = float((logits[-1].argmax(1) == targets).double().mean())
    costs = []
    for max_drop in (0.0, 2.0, 10.0, 100.0):
        cascade = fit_cascade(elastic, loader, max_drop)
        evaluation = cascade.evaluation
        assert evaluation.accuracy >= last - max_drop / 100 - 1e-9
        assert sum(evaluation.shares) == pytest.approx(1) and evaluation.samples == 300
        assert evaluation.milliseconds > 0
        exits = torch.cat([cascade(x).exits for x, _ in loader])
        assert evaluation.shares == pytest.approx(
            [float((exits == i).double().mean()) for i in range(len(cascade.order))]
        )
        steps = cascade.flops(loader[0][0])
        spent = sum(sum(steps[: int(exit) + 1]) for exit in exits) / 300
        assert evaluation.mean_flops == pytest.approx(spent)
        costs.append(spent)
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1]
    assert fit_cascade(elastic, loader).evaluation.accuracy >= last - 0.005 - 1e-9


def test_fit_is_no_worse_than_a_search_over_a_grid(elastic, validation):
    """Of two depths every threshold can be tried."""
    loader, logits, targets = validation
    sure = confidence_of(logits[0], "probability")
    right = [z.argmax(1) == targets for z in (logits[0], logits[-1])]
    first, second = Cascade(elastic, [DEPTHS[0], DEPTHS[-1]], [0.5]).flops(loader[0][0])
    for max_drop in (1.0, 5.0):
        least = float(right[1].double().mean()) - max_drop / 100 - 1e-9
        costs = [
            first + second * float((sure < t).double().mean())
            for t in sure.tolist()
            if float(torch.where(sure >= t, right[0], right[1]).double().mean()) >= least
        ]
        found = fit_cascade(elastic, loader, max_drop, order=[DEPTHS[0], DEPTHS[-1]])
        alone_cost = sum(Cascade(elastic, [DEPTHS[-1]]).flops(loader[0][0]))
        assert found.evaluation.mean_flops <= min([*costs, alone_cost]) * (1 + 1e-6)


def test_fit_to_a_cost(elastic, validation):
    loader, _, _ = validation
    full = sum(Cascade(elastic, [DEPTHS[-1]]).flops(loader[0][0]))
    accuracies = []
    for max_cost in (0.6, 0.8, 1.0):
        evaluation = fit_cascade(elastic, loader, max_cost=max_cost).evaluation
        assert evaluation.mean_flops <= max_cost * full * (1 + 1e-9)
        accuracies.append(evaluation.accuracy)
    assert accuracies == sorted(accuracies)


def test_temperature_scaling(elastic, validation):
    loader, logits, targets = validation
    cascade = fit_cascade(elastic, loader, 100.0, temperature_scaling=True, order=[DEPTHS[0]])
    (temperature,) = cascade.temperatures
    loss = {
        t: float(F.cross_entropy(logits[0] / t, targets))
        for t in (temperature, 0.9 * temperature, 1.1 * temperature)
    }
    assert temperature != 1 and loss[temperature] == min(loss.values())


def test_settings_as_plain_values(elastic):
    cascade = Cascade(elastic, DEPTHS[1:], [0.25], confidence="margin", temperatures=[1.5, 1.0])
    again = Cascade.from_dict(elastic, cascade.to_dict())
    assert again.to_dict() == cascade.to_dict() and again.order == cascade.order
    assert isinstance(again.order[0], Subnet)


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        ({"max_drop": 1.0, "max_cost": 0.5}, ValueError, "both given"),
        ({"max_drop": -1}, ValueError, "max_drop is -1; it must be between 0 and 100"),
        ({"max_cost": 0}, ValueError, "max_cost is 0; it must be greater than 0"),
        ({"max_cost": 0.01}, ValueError, r"max_cost is 0.01; the least is 0\.\d+, the cost of depths 1-1-1"),
        ({"confidence": "luck"}, ValueError, "confidence is 'luck'"),
        ({"val_loader": []}, ValueError, "val_loader gave no row"),
        ({"val_loader": iter([])}, TypeError, "val_loader is an iterator"),
        ({"order": [(2, 2, 2), (1, 1, 1)]}, ValueError, "it must be nested"),
    ],
)
def test_fits_that_cannot_be(elastic, validation, arguments, kind, message):
    with pytest.raises(kind, match=message):
        fit_cascade(elastic, **({"val_loader": validation[0]} | arguments))
