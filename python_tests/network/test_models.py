"""Networks, and how their stages of residual blocks are found or named."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers.reference_step import assert_modes_agree, one_thread, random_drops  # noqa: F401
from torch import nn
from torchvision.models import SwinTransformer, VisionTransformer
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.resnet import Bottleneck

from gkt_fast import GKT, GKTConfig
from gkt_fast.models import cifar_resnet
from gkt_fast.network.discovery import find_stages, is_residual, stages_from_paths


def summary(model, stages=None):
    """First block, and one letter per block: x can be dropped, . can't."""
    stages = find_stages(model) if stages is None else stages
    return [(s.blocks[0], "".join("x" if d else "." for d in s.droppable)) for s in stages]


@pytest.mark.parametrize("depth, million", [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_cifar_resnet_parameter_counts(depth, million):
    """Table 6 of He et al., CVPR 2016, to the digits it gives."""
    count = sum(p.numel() for p in cifar_resnet(depth).parameters())
    digits = 1 if million == 1.7 else 2
    assert round(count / 1e6, digits) == million


def test_cifar_resnet_shapes():
    model = cifar_resnet(20, num_classes=7, width=4, in_channels=1)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert [len(stage) for stage in (model.layer1, model.layer2, model.layer3)] == [3, 3, 3]
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules()) == 20


@pytest.mark.parametrize("depth", [0, 2, 7, 21, -4])
def test_cifar_resnet_depths_that_do_not_exist(depth):
    with pytest.raises(ValueError, match=rf"depth is {depth}; it must be 6n \+ 2"):
        cifar_resnet(depth)


class PreNorm(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x + self.scale * F.gelu(self.mlp(self.norm(x)))


class ListModel(nn.Module):
    """Two ModuleLists of blocks with a projection between them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.early = nn.ModuleList(PreNorm() for _ in range(3))
        self.project = nn.Linear(8, 6)
        self.late = nn.ModuleList(PreNorm(6) for _ in range(2))
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.embed(x)
        for block in self.early:
            x = block(x)
        x = self.project(x)
        for block in self.late:
            x = block(x)
        return self.head(x)


def vit():
    return VisionTransformer(
        image_size=16, patch_size=8, num_layers=4, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=5
    )


def swin():
    return SwinTransformer(
        patch_size=[2, 2], embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=[2, 2], num_classes=5,
        stochastic_depth_prob=0.0,
    )  # fmt: skip


def convnext():
    stages = [CNBlockConfig(8, 12, 3), CNBlockConfig(12, None, 2)]
    return ConvNeXt(stages, stochastic_depth_prob=0.0, num_classes=5)


FOUND = [
    (lambda: cifar_resnet(20, width=4), [("layer1.0", "xxx"), ("layer2.0", ".xx"), ("layer3.0", ".xx")]),
    (
        torchvision.models.resnet18,
        [("layer1.0", "xx"), ("layer2.0", ".x"), ("layer3.0", ".x"), ("layer4.0", ".x")],
    ),
    (
        lambda: torchvision.models.ResNet(Bottleneck, [3, 4, 6, 3], width_per_group=2),
        [("layer1.0", ".xx"), ("layer2.0", ".xxx"), ("layer3.0", ".xxxxx"), ("layer4.0", ".xx")],
    ),
    (vit, [("encoder.layers.encoder_layer_0", "xxxx")]),
    (convnext, [("features.1.0", "xxx"), ("features.3.0", "xx")]),
    (swin, [("features.1.0", "xx"), ("features.3.0", "xx")]),
    (
        lambda: torchvision.models.mobilenet_v2(width_mult=0.25),
        [
            ("features.1", "x"), ("features.2", ".x"), ("features.4", ".xx"), ("features.7", ".xxx"),
            ("features.11", ".xx"), ("features.14", ".xx"),
        ],
    ),
    (ListModel, [("early.0", "xxx"), ("late.0", "xx")]),
]  # fmt: skip


@pytest.mark.parametrize("build, expected", FOUND)
def test_stages_are_found(build, expected):
    assert summary(build()) == expected


@pytest.mark.parametrize("build", [vit, swin, convnext])
def test_networks_with_layer_norm_equal_the_plain_loop(build):
    torch.manual_seed(0)
    model = build().double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    config = GKTConfig(groups=2, loops=2)
    images, targets = torch.randn(3, 3, 16, 16, dtype=torch.float64), torch.randint(5, (3,))
    if build is vit:
        nn.init.normal_(model.heads.head.weight, std=0.1)
    assert_modes_agree(model, (images,), targets, random_drops(find_stages(model), 5, seed=1), config)


def test_mobilenet_equals_the_plain_loop():
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v2(width_mult=0.25, num_classes=5, dropout=0.0).double()
    images, targets = torch.randn(4, 3, 64, 64, dtype=torch.float64), torch.randint(5, (4,))
    config = GKTConfig(groups=2, batch_norm="all_streams")
    dropped = random_drops(find_stages(model), 3, seed=0)
    assert_modes_agree(model, (images,), targets, dropped, config, floor=1e-14)


class Block(nn.Module):
    """A residual block whose forward is given."""

    def __init__(self, rule):
        super().__init__()
        self.rule = rule
        self.layer = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.1)
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        return self.rule(self, x)


@pytest.mark.parametrize(
    "rule, residual",
    [
        (lambda self, x: x + self.layer(x), True),
        (lambda self, x: self.layer(x) + x, True),
        (lambda self, x: F.relu(self.layer(x).add(x)), True),
        (lambda self, x: torch.add(self.drop(self.layer(x)), x), True),
        (lambda self, x: self.drop(x + self.layer(x)), True),
        (lambda self, x: (lambda y: y + self.norm(y))(x + self.layer(x)), True),
        (lambda self, x: (x + self.layer(x), x.mean()), True),
        (lambda self, x: self.layer(x), False),
        (lambda self, x: self.norm(x + self.layer(x)), False),
        (lambda self, x: self.norm(x) + self.layer(x), False),
        (lambda self, x: 2 * x + self.layer(x), False),
        (lambda self, x: x * self.layer(x), False),
        (lambda self, x: torch.cat([x, self.layer(x)], 1), False),
        (lambda self, x: x, False),
        (lambda self, x: x.relu(), False),
        (lambda self, x: x + 1, False),
    ],
)
def test_what_counts_as_residual(rule, residual):
    assert is_residual(Block(rule)) == residual


class WithArguments(Block):
    """A shortcut that the caller may compute, and a flag."""

    def forward(self, x, shortcut=None, flag=False, **others):
        if flag:
            return self.layer(x)
        return self.layer(x) + (x if shortcut is None else shortcut)


class WithFlag(WithArguments):
    def forward(self, x, mask=None, flag=False, **others):
        return self.layer(x) if flag else x + self.layer(x)


def test_arguments_with_defaults():
    """What is None by default may be an activation; a flag has its default."""
    assert not is_residual(WithArguments(None))
    assert is_residual(WithFlag(None))


@pytest.mark.parametrize(
    "rule, residual",
    [
        (lambda self, x: (x + self.layer(x)).reshape(x.shape[0], -1).reshape(x.shape), True),
        (lambda self, x: (x.flatten(1) + self.layer(x)).view(x.size(0), x.size(1)), True),
        (lambda self, x: (x.flatten(1) + self.layer(x)).view_as(x), True),
        (lambda self, x: (x + self.layer(x)).reshape(x.shape[0], -1), False),
        (lambda self, x: (x + self.layer(x)).reshape(x.shape[1], x.shape[0]), False),
        (lambda self, x: (x + self.layer(x)).reshape(self.layer(x).shape), False),
        (lambda self, x: self.empty(x) + self.layer(x), True),
        (lambda self, x: self.linear(x) + self.layer(x), False),
    ],
)
def test_reshapes_and_shortcuts_of_sequentials(rule, residual):
    block = Block(rule)
    block.empty = nn.Sequential(nn.Sequential(), nn.Identity())
    block.linear = nn.Sequential(nn.Linear(4, 4))
    assert is_residual(block) == residual


class SideBySide(nn.Module):
    """Blocks as attributes, without a container."""

    def __init__(self):
        super().__init__()
        self.b1, self.b2, self.b3 = (Block(lambda self, x: x + self.layer(x)) for _ in range(3))

    def forward(self, x):
        return self.b3(self.b2(self.b1(x)))


def test_blocks_in_a_module_that_is_no_container():
    model = nn.Sequential(nn.Linear(4, 4), SideBySide(), nn.Linear(4, 2))
    assert summary(model) == [("1.b1", "xxx")]


def test_finding_stages_leaves_the_model_as_it_was():
    model = cifar_resnet(8, width=4).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    find_stages(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and not model.training


class WithoutBlocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(*(Block(lambda self, x: self.layer(x)) for _ in range(3)))
        self.tail = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


def test_a_model_without_residual_blocks_says_what_was_found_where():
    with pytest.raises(ValueError) as error:
        GKT(WithoutBlocks())
    message = str(error.value)
    assert "model (WithoutBlocks) has no run of residual blocks" in message
    assert "features: 3 x Block" in message and "tail: 2 x Linear" in message and "stages=" in message
    with pytest.raises(ValueError, match=r"model \(Linear\).*found in containers: none"):
        GKT(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"model \(SqueezeNet\) has no run of residual blocks"):
        GKT(torchvision.models.squeezenet1_1())


def test_stages_by_container_and_by_block_paths():
    model = cifar_resnet(20, width=4)
    by_container = GKT(model, GKTConfig(), stages=["layer1", "layer2", "layer3"]).stages
    assert by_container == find_stages(model)
    by_paths = GKT(model, GKTConfig(), stages=[["layer1.0", "layer1.1", "layer1.2"], "layer3"]).stages
    assert summary(model, by_paths) == [("layer1.0", "xxx"), ("layer3.0", ".xx")]
    some = GKT(model, GKTConfig(), stages=[("layer2.1", "layer2.2")]).stages
    assert summary(model, some) == [("layer2.1", "xx")]


def test_named_stages_that_skip_blocks_run():
    torch.manual_seed(0)
    model = cifar_resnet(20, num_classes=5, width=4).double()
    stages = stages_from_paths(model, [["layer1.0", "layer1.2"], "layer3"])
    images, targets = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randint(5, (4,))
    assert_modes_agree(model, (images,), targets, random_drops(stages, 4, seed=0), GKTConfig(), stages=stages)


class Untraceable(Block):
    """Its forward looks at shapes, which can't be followed without running it."""

    def __init__(self):
        super().__init__(None)

    def forward(self, x):
        if x.shape[0] > 1:
            return x + self.layer(x)
        return x + self.layer(x) * 2


def test_a_block_that_cannot_be_traced_can_be_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Untraceable(), Untraceable()), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"1: 2 x Untraceable"):
        GKT(model)
    gkt = GKT(model, stages=["1"])
    assert summary(model, gkt.stages) == [("1.0", "xx")]
    gkt(torch.randn(5, 4), torch.randint(3, (5,))).loss.backward()


@pytest.mark.parametrize(
    "stages, message",
    [
        (["layer9"], "stages names 'layer9', which the model doesn't have; its children are conv1, bn1, lay"),
        ([["layer1.0", "layer1.7"]], "stages names 'layer1.7', which the model doesn't have"),
        (["fc"], r"stages names 'fc' \(Linear\), which holds no blocks"),
        ("layer1", "stages is 'layer1'; it must be a sequence with one entry per stage"),
        ([], r"stages is \[\]; it must be a sequence"),
        ([["conv1", "fc"]], "stages names blocks of Conv2d, Linear; none of them has a skip connection"),
        ([[]], "stages has an entry without blocks"),
        ([3], r"stages has the entry 3; it must be a module path or a sequence of them"),
        (["layer1", "layer1"], "stages names 'layer1.0' twice"),
        (["layer1", ["layer1.0.conv1"]], "stages names 'layer1.0.conv1', which lies within 'layer1.0'"),
    ],
)
def test_wrong_paths(stages, message):
    with pytest.raises((ValueError, TypeError), match=message):
        GKT(cifar_resnet(20, width=4), stages=stages)
