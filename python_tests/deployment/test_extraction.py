"""Subnets as networks of their own: masked, cut out, recalibrated, and loaded without this package."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers.deployable_nets import NETS, logits
from helpers.processes import environment
from helpers.reference_step import one_thread  # noqa: F401
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from gkt_fast import GKT, GKTConfig, Subnet, active_subnet, extract_subnet, recalibrate_batch_norm
from gkt_fast.models import cifar_resnet
from gkt_fast.network.discovery import as_stages


def images(count=3, size=16, channels=3):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0))


def trained(build, depths, stages=None):
    """A network with statistics and weights that are no longer those of its initialisation, fused as GKT leaves it."""
    torch.manual_seed(0)
    model = build(depths)
    gkt = GKT(model, GKTConfig(groups=1, execution="shared"), stages).train()
    x = images()
    shape = logits(model(x)).shape
    gkt(x, torch.randint(5, (shape[0], *shape[2:])), step=0).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
    return model.eval()


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    """Every network of NETS: the masked network's logits, and its subnet on disk."""
    folder = tmp_path_factory.mktemp("subnets")
    results = {}
    for name, (build, full, depths, stages) in NETS.items():
        model = trained(build, full, stages)
        subnet = extract_subnet(model, depths, stages)
        x = images()
        with torch.no_grad():
            with active_subnet(model, depths, stages):
                masked = logits(model(x))
            y = logits(subnet(x))
            whole = logits(model(x))
        torch.save(
            {"module": subnet, "state_dict": subnet.state_dict(), "x": x, "y": y}, folder / f"{name}.pt"
        )
        results[name] = model, subnet, masked, y, whole
    return folder, results


@pytest.mark.parametrize("name", NETS)
def test_a_subnet_is_the_masked_network_with_fewer_parameters(extracted, name):
    model, subnet, masked, y, whole = extracted[1][name]
    assert type(subnet) is type(model)
    assert parameters(subnet) < parameters(model)
    # The model's blocks run fused, those of the subnet don't: float32 rounding.
    torch.testing.assert_close(y, masked, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(y, whole, rtol=1e-3, atol=1e-3), "the dropped blocks make no difference"


def test_subnets_are_loaded_without_this_package(extracted):
    """As whole modules, and as states of networks of the same class that were built at the subnet's depths."""
    result = subprocess.run(
        [sys.executable, "-m", "helpers.deployable_nets", extracted[0]],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert set(result.stdout.splitlines()) == set(NETS)


@pytest.mark.parametrize("name", [name for name in NETS if name.startswith("transformers")])
def test_hugging_face_subnets_are_saved_with_their_configuration(extracted, name, tmp_path):
    model, subnet, _, y, _ = extracted[1][name]
    full = NETS[name][1]
    subnet.save_pretrained(tmp_path)
    loaded = type(subnet).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(loaded(images())), y)
    counted = getattr(model.config, "depths", None) or (model.config.num_hidden_layers,)
    assert tuple(counted) == full, "the model's own configuration has changed"


def test_masks_that_are_not_ordered():
    torch.manual_seed(0)
    model = cifar_resnet(20, width=4).eval()
    mask = Subnet(((False, True, False), (True, False, True), (True, True, False)))
    x = images()
    with torch.no_grad(), active_subnet(model, mask):
        masked = model(x)
    subnet = extract_subnet(model, mask)
    torch.testing.assert_close(subnet(x), masked)
    assert [len(stage) for stage in (subnet.layer1, subnet.layer2, subnet.layer3)] == [1, 2, 2]
    assert torch.equal(subnet.layer1[0].conv1.weight, model.layer1[1].conv1.weight)


class Attributes(nn.Module):
    """Blocks that are attributes of the model; each writes into its input and returns a tuple."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x, scale):
            y = self.norm(self.linear(x)) * scale
            x += y
            return x, scale

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.first, self.second = self.Block(), self.Block()

    def forward(self, x):
        x, scale = self.stem(x), torch.tensor(2.0)
        x, scale = self.first(x, scale)
        x, scale = self.second(x, scale)
        return x * scale


@pytest.mark.parametrize("training", [True, False])
def test_a_dropped_block_hands_on_what_it_would_return(training):
    """Without having seen the block run before, and without a trace of finding out."""
    torch.manual_seed(0)
    model = Attributes().train(training)
    x = torch.randn(5, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with active_subnet(model, (1,), [["first", "second"]]):
        y = model(x)
    with torch.no_grad():
        scale = torch.tensor(2.0)
        stem = model.stem(x)
        expected = (
            (stem + model.first.eval()(stem.clone(), scale)[0] - stem) * scale if not training else None
        )
    if expected is not None:
        torch.testing.assert_close(y, expected)
    for name, value in model.second.state_dict().items():
        assert torch.equal(value, before[f"second.{name}"]), name
    assert model.second.training == training and model.second.norm.training == training


def test_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    model = cifar_resnet(14, width=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    blocks = [type(block) for block in model.layer1]
    subnet = extract_subnet(model, (1, 2, 1))
    with torch.no_grad():
        for parameter in subnet.parameters():
            parameter.zero_()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [type(block) for block in model.layer1] == blocks


def test_recalibrated_statistics_are_those_of_the_data():
    torch.manual_seed(0)
    model = cifar_resnet(14, width=4)
    batches = [images(4, 8) + i for i in range(3)]
    assert recalibrate_batch_norm(model, batches, num_samples=10, depths=(1, 2, 1)) == 10
    inputs = {}
    subnet = extract_subnet(model, (1, 2, 1)).train()
    norms = {name: m for name, m in subnet.named_modules() if isinstance(m, _NormBase)}
    hooks = [
        norm.register_forward_hook(lambda m, args, _, name=name: inputs.setdefault(name, []).append(args[0]))
        for name, norm in norms.items()
    ]
    kept = {name: (norm.running_mean.clone(), norm.running_var.clone()) for name, norm in norms.items()}
    for batch in (batches[0], batches[1], batches[2][:2]):
        subnet(batch)
    for hook in hooks:
        hook.remove()
    for name, seen in inputs.items():
        mean = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
        var = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in seen]).mean(0)
        torch.testing.assert_close(kept[name][0], mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(kept[name][1], var, rtol=1e-4, atol=1e-5)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    "depths, kind, message",
    [
        ((1, 1), ValueError, r"depths is \(1, 1\); it must have one entry for each of 3 stages"),
        ((1, 1, 3), ValueError, r"depths is \(1, 1, 3\); its entry 2 must be between 1 and 2"),
        ((1, 0, 1), ValueError, r"its entry 1 must be between 1 and 2"),
        (3, TypeError, r"depths is 3; it must be a sequence of integers, one for each stage"),
        ("111", TypeError, r"depths is '111'; it must be a sequence of integers"),
        ((1, 1.5, 1), TypeError, r"depths is \(1, 1.5, 1\); it must be a sequence of integers"),
        (Subnet(((True,), (True,))), ValueError, r"keep has masks of lengths \(1, 1\)"),
    ],
)
def test_depths_that_do_not_fit(depths, kind, message):
    model = cifar_resnet(14, width=4)
    with pytest.raises(kind, match=message):
        extract_subnet(model, depths)
    with pytest.raises(kind, match=message), active_subnet(model, depths):
        pass


def test_stages_by_their_paths():
    model = cifar_resnet(14, width=4)
    assert as_stages(model, ["layer1", "layer2", "layer3"]) == as_stages(model, None)
    assert as_stages(model, as_stages(model, None)[1:]) == as_stages(model, ["layer2", "layer3"])
    assert Subnet.of((1, 2), as_stages(model, ["layer2", "layer3"])).depths == (1, 2)
    with pytest.raises(ValueError, match="stages names 'layer9'"):
        extract_subnet(model, (1,), ["layer9"])
    with pytest.raises(ValueError, match="stages is 'layer1'; it must be a sequence"):
        extract_subnet(model, (1,), "layer1")


def test_running_statistics_of_instance_norm_are_estimated_too():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4, track_running_stats=True))
    batches = [images(4, 8) + i for i in range(3)]
    recalibrate_batch_norm(model, batches)
    with torch.no_grad():
        means = [model[0](batch).mean((0, 2, 3)) for batch in batches]
    torch.testing.assert_close(model[1].running_mean, torch.stack(means).mean(0))
    assert model[1].momentum == 0.1
