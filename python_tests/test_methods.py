"""The published methods as configurations: their gradients against plain loops that know nothing of this package's."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.reference_step import Skip, one_thread  # noqa: F401
from helpers.small_nets import Block, Net
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gkt_fast import (
    GKT,
    METHODS,
    CheckpointError,
    GKTConfig,
    GKTTrainer,
    evaluate,
    method_config,
    survival_scaling,
)
from gkt_fast.models import cifar_resnet
from gkt_fast.network.discovery import find_stages
from gkt_fast.subnets.sampling import sample_resolutions, sample_subnets


def network(depth: int = 20) -> nn.Module:
    torch.manual_seed(0)
    return cifar_resnet(depth, num_classes=5, width=4).double()


def batch(seed: int = 0, size: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(6, 3, size, size, dtype=torch.float64, generator=generator)
    return images, torch.randint(5, (6,), generator=generator)


def skipping(model: nn.Module, subnet, stages) -> nn.Module:
    """A copy with the same parameters whose dropped blocks hand their input through."""
    other = copy.deepcopy(model, memo={id(p): p for p in model.parameters()})
    for path in subnet.dropped(stages):
        other.set_submodule(path, Skip())
    return other


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(actual: nn.Module, expected: nn.Module) -> None:
    for name, wanted in gradients(expected).items():
        got = gradients(actual)[name]
        if wanted is None:
            assert got is None, name
        else:
            assert (got - wanted).norm() <= 1e-11 * wanted.norm() + 1e-15, name


def standardised(z: torch.Tensor) -> torch.Tensor:
    return (z - z.mean(1, keepdim=True)) / torch.sqrt(z.var(1, keepdim=True, unbiased=False) + 1e-7)


def test_plain_is_the_network_alone():
    model, reference = network(), network()
    images, targets = batch()
    output = GKT(model, method_config("plain"))(images, targets)
    output.loss.backward()
    F.cross_entropy(reference(images), targets).backward()
    assert_same_gradients(model, reference)
    assert output.subnets == []
    for key, value in reference.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize("step", [0, 3, 7])
def test_stochastic_depth_trains_one_masked_network_alone(step):
    model, reference = network(), network()
    images, targets = batch()
    gkt = GKT(model, method_config("stochastic_depth", seed=2))
    output = gkt(images, targets, step=step)
    output.loss.backward()
    (subnet,) = output.subnets
    assert subnet == gkt.sample(step)[0]
    assert not all(map(all, subnet.keep))
    masked = skipping(reference, subnet, gkt.stages)
    logits = masked(images)
    loss = F.cross_entropy(logits, targets)
    loss.backward()
    assert_same_gradients(model, reference)
    assert output.kd.shape == (0,)
    assert torch.allclose(output.ce, loss.detach(), rtol=1e-12)
    assert torch.allclose(output.logits, logits.detach(), rtol=1e-9)
    kept_statistics = {k: v for k, v in masked.state_dict().items() if "running" in k or "num_batches" in k}
    for key, value in kept_statistics.items():
        assert torch.allclose(model.state_dict()[key], value, rtol=1e-11), key
    for path in subnet.dropped(gkt.stages):
        assert model.get_submodule(path).bn1.num_batches_tracked == 0


def test_stochastic_depth_runs_each_kept_block_once_and_no_other():
    model = network()
    gkt = GKT(model, method_config("stochastic_depth"))
    images, targets = batch()
    gkt(images, targets, step=0)  # the first step looks at what every block returns
    calls = []
    blocks = [path for stage in gkt.stages for path in stage.blocks]
    for path in blocks:
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: calls.append(path))
    (subnet,) = gkt(images, targets, step=5).subnets
    assert sorted(calls) == sorted(set(blocks) - subnet.dropped(gkt.stages))
    cost = gkt.cost([subnet])
    assert cost.shared == cost.sequential < cost.plain
    assert gkt.expected_cost() < 1.0


class TupleBlock(Block):
    """Returns its activation in a tuple, as blocks of transformers do."""

    def forward(self, x):
        return (super().forward(x[0] if isinstance(x, tuple) else x),)


class TupleNet(Net):
    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            (x,) = block(x)
        return self.head(x.mean((2, 3)))


def test_stochastic_depth_of_blocks_that_return_tuples():
    gkt = GKT(TupleNet(TupleBlock), method_config("stochastic_depth", drop_rate=0.9), stages=["blocks"])
    images = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    for step in range(4):
        assert torch.isfinite(gkt(images, torch.tensor([0, 1, 2, 3]), step=step).loss)


@pytest.mark.parametrize("loops", [1, 3])
@pytest.mark.parametrize("execution", ["sequential", "stacked"])
def test_stimulative_training(loops, execution):
    """Main network on the targets; every subnet, drawn uniformly, on the main network's soft labels."""
    model, reference = network(), network()
    images, targets = batch()
    gkt = GKT(model, method_config("st", loops=loops, execution=execution))
    output = gkt(images, targets, step=4)
    output.loss.backward()
    assert len(output.subnets) == loops
    teacher = reference(images)
    F.cross_entropy(teacher, targets).backward()
    for subnet in output.subnets:
        student = skipping(reference, subnet, gkt.stages)(images)
        soft = teacher.detach().softmax(1)
        F.kl_div(student.log_softmax(1), soft, reduction="batchmean").backward()
    assert_same_gradients(model, reference)


def test_stimulative_training_draws_all_depths_alike():
    stages = find_stages(network())
    config = method_config("st", loops=1)
    depths = [sample_subnets(stages, config, step)[0].depths[0] for step in range(900)]
    shares = [depths.count(depth) / len(depths) for depth in (1, 2, 3)]
    assert sum(shares) == 1.0
    assert all(abs(share - 1 / 3) < 0.05 for share in shares)


@pytest.mark.parametrize("resolution", [7, (5, 11)])
def test_stimulative_training_plus_plus(resolution):
    """Standardised logits, and images of subnets resized to a smaller resolution."""
    model, reference = network(), network()
    images, targets = batch()
    config = method_config("st++", subnet_resolution=resolution)
    gkt = GKT(model, config)
    sizes = sample_resolutions(config, 2)
    output = gkt(images, targets, step=2)
    output.loss.backward()
    assert len(output.subnets) == len(sizes) == 5
    teacher = reference(images)
    F.cross_entropy(teacher, targets).backward()
    soft = standardised(teacher.detach()).softmax(1)
    terms = []
    for subnet, size in zip(output.subnets, sizes, strict=True):
        small = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        student = skipping(reference, subnet, gkt.stages)(small)
        divergence = F.kl_div(standardised(student).log_softmax(1), soft, reduction="batchmean")
        divergence.backward()
        terms.append(divergence.detach())
    assert_same_gradients(model, reference)
    assert torch.allclose(output.kd, torch.stack(terms), rtol=1e-10)


def test_resolutions_are_drawn_anew_and_repeatably():
    config = method_config("st++", image_size=32)
    assert config.subnet_resolution == (14, 32)
    drawn = [size for step in range(200) for size in sample_resolutions(config, step)]
    assert {min(drawn), max(drawn)} == {14, 32}
    assert sample_resolutions(config, 5) == sample_resolutions(config, 5) != sample_resolutions(config, 6)
    assert sample_resolutions(config, 5) != sample_resolutions(config.replace(seed=1), 5)
    assert sample_resolutions(method_config("st"), 5) == []


def test_smaller_images_are_said_to_share_nothing(caplog):
    gkt = GKT(network(8), method_config("st++", subnet_resolution=6))
    with caplog.at_level(logging.INFO, "gkt_fast"):
        for step in range(2):
            gkt(*batch(), step=step)
    messages = [message for message in caplog.messages if "smaller images" in message]
    assert messages == [
        "execution='auto' runs 'sequential': subnets see smaller images (subnet_resolution), so that no activation "
        "can be shared"
    ]
    assert "full resolution" in gkt.explain()


def test_gkt_is_the_default():
    assert method_config("gkt") == GKTConfig()
    assert method_config("gkt", groups=2, kd_weight=0.5) == GKTConfig(groups=2, kd_weight=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sgd"}, "method is 'sgd'; it must be one of plain, stochastic_depth, st, st\\+\\+, gkt"),
        ({"method": "st++"}, "image_size is None; method 'st\\+\\+' needs it, or subnet_resolution"),
        ({"method": "stochastic_depth", "loops": 2}, "loops is 2 with train_full=False; it must be 1"),
        ({"method": "stochastic_depth", "groups": 2}, "groups is 2 with train_full=False; it must be 1"),
        ({"method": "stochastic_depth", "budget": 2.0}, "budget is 2.0 and subnet_resolution is None"),
        ({"method": "st++", "subnet_resolution": (9, 5)}, "lowest must be at most its highest"),
        ({"method": "st++", "subnet_resolution": (9,)}, "must be a number or \\(lowest, highest\\)"),
        ({"method": "st++", "subnet_resolution": 0}, "subnet_resolution is 0; it must be at least 1"),
        ({"method": "st", "subnet_resolution": 8, "execution": "lean"}, "execution is 'lean'; with"),
        ({"method": "st", "subnet_resolution": 8, "budget": 2.0}, "budget is 2.0; with subnet_resolution"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        method_config(**options)


def scaled_forward(model: nn.Module, images: torch.Tensor, drop_rate: float) -> torch.Tensor:
    """The paper's rule written down for CifarResNet: ReLU(p f(x) + x), p falling linearly over all blocks."""
    x = F.relu(model.bn1(model.conv1(images)))
    blocks = [*model.layer1, *model.layer2, *model.layer3]
    for i, block in enumerate(blocks, start=1):
        same_shape = isinstance(block.shortcut, nn.Identity)
        p = 1 - drop_rate * i / len(blocks) if same_shape else 1.0
        y = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
        x = F.relu(p * y + block.shortcut(x))
    return model.fc(x.mean((2, 3)))


def trained_a_little(model: nn.Module) -> nn.Module:
    """Statistics and affine parameters that are not those of a fresh network."""
    model.train()
    for seed in range(3):
        model(batch(seed)[0])
    return model.eval()


def test_survival_scaling_is_the_papers_rule():
    model = trained_a_little(network())
    images, _ = batch(5)
    expected = scaled_forward(model, images, 0.4)
    with torch.no_grad():
        before = model(images)
        with survival_scaling(model, 0.4):
            assert torch.allclose(model(images), expected, rtol=1e-10)
        assert torch.equal(model(images), before)
    assert not torch.allclose(before, expected, rtol=1e-3)


def test_survival_scaling_of_fused_blocks():
    """`GKT` fuses the blocks of the network that it trains."""
    model = trained_a_little(network())
    GKT(model, method_config("stochastic_depth"))
    images, _ = batch(5)
    with torch.no_grad(), survival_scaling(model, 0.5):
        assert torch.allclose(model(images), scaled_forward(model, images, 0.5), rtol=1e-10)


class Transformer(nn.Module):
    """Two residual branches in one block."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(6), nn.LayerNorm(6)
        self.mix, self.mlp = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = x + self.mix(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UntraceableBlock(Block):
    def forward(self, x):
        if x.sum() > 1e9:  # a decision by values
            return x
        return super().forward(x)


def test_survival_scaling_of_several_branches_and_of_blocks_that_cant_be_traced(caplog):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(*(Transformer() for _ in range(2)))).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    y = model[0](x)
    for p, block in zip((0.75, 0.5), model[1], strict=True):
        y = y + p * block.mix(block.norm1(y))
        y = y + p * block.mlp(block.norm2(y))
    with survival_scaling(model, 0.5):
        assert torch.allclose(model(x), y, rtol=1e-12)
    untraceable, traceable = Net(UntraceableBlock).eval(), Net().eval()
    images = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    with (
        caplog.at_level(logging.INFO, "gkt_fast"),
        survival_scaling(untraceable, 0.5, GKT(untraceable, stages=["blocks"]).stages),
        survival_scaling(traceable, 0.5),
    ):
        assert torch.allclose(untraceable(images), traceable(images), rtol=1e-12)
    assert caplog.messages == [
        f"block 'blocks.{i}' can't be traced; its output is scaled, not its branch" for i in range(4)
    ]


class BlockWithOptions(nn.Module):
    """As transformers' blocks: an activation and a flag that callers may leave out."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(6, 6)

    def forward(self, x, flip=False, mask=None):
        y = self.mix(x if mask is None else x * mask)
        return x + (-y if flip else y)


class NetWithOptions(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(BlockWithOptions() for _ in range(2))

    def forward(self, x, *args, **kwargs):
        for block in self.blocks:
            x = block(x, *args, **kwargs)
        return x


def test_survival_scaling_of_blocks_with_optional_arguments(caplog):
    torch.manual_seed(0)
    model = NetWithOptions().double()
    x, mask = torch.randn(3, 6, dtype=torch.float64), torch.rand(3, 6, dtype=torch.float64)
    stages = GKT(model, stages=["blocks"]).stages

    def expected(sign, mask):
        y = x
        for p, block in zip((0.75, 0.5), model.blocks, strict=True):
            y = y + sign * p * block.mix(y * mask)
        return y

    with survival_scaling(model, 0.5, stages), caplog.at_level(logging.INFO, "gkt_fast"):
        plain = expected(1, torch.ones_like(x))
        for values in ((), (False,), (False, None)):
            assert torch.allclose(model(x, *values), plain, rtol=1e-12)
        for given in ({"mask": mask}, {"flip": False, "mask": mask}):
            assert torch.allclose(model(x, **given), expected(1, mask), rtol=1e-12)
        assert torch.allclose(model(x, True, mask), expected(-1, mask), rtol=1e-12)
        assert torch.allclose(model(x), plain, rtol=1e-12)
    assert caplog.messages == []


@pytest.mark.parametrize("method", METHODS)
def test_the_trainer_runs_every_method_and_goes_on_from_its_checkpoint(tmp_path, method):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(5, (40,), generator=generator)
    images = torch.randn(40, 3, 12, 12, generator=generator) + targets.view(-1, 1, 1, 1) - 2

    def make(epochs: int) -> tuple[GKTTrainer, list[dict[str, float]]]:
        torch.manual_seed(0)
        model = cifar_resnet(14, num_classes=5, width=4)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        trainer = GKTTrainer(model, optimizer, method_config(method, image_size=12))
        loader = DataLoader(TensorDataset(images, targets), 20, shuffle=True)
        return trainer, trainer.fit(
            loader, epochs=epochs, val_loader=loader, output_dir=tmp_path / method, progress=False
        )

    make(4)
    trainer, history = make(8)
    assert [row["epoch"] for row in history] == [4, 5, 6, 7]
    assert history[-1]["train_ce"] < math.log(5)
    groups = 0 if method in ("plain", "stochastic_depth") else trainer.config.groups
    assert [name for name in history[0] if name.startswith("kd_")] == [
        f"kd_group{g}" for g in range(1, groups + 1)
    ]
    loader = [(images, targets)]
    with survival_scaling(trainer.model, 0.5, trainer.gkt.stages):
        scaled = evaluate(trainer.model, loader)
    assert (trainer.evaluate(loader).loss == scaled.loss) == (method == "stochastic_depth")
    if groups:
        return
    other = GKTTrainer(trainer.model, trainer.optimizer, GKTConfig(groups=1))
    with pytest.raises(CheckpointError, match=r"was written with (groups|train_full)="):
        other.load_checkpoint(tmp_path / method / "last.pt")
