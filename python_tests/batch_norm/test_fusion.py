"""fuse_blocks: the same results, keys, hooks and copies as the unfused model; what is left alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from gkt_fast import fuse_blocks, unfuse_blocks
from gkt_fast.batch_norm.fusion import FusedBlock
from gkt_fast.batch_norm.layer import ghost_batches
from gkt_fast.models.cifar_resnet import BasicBlock, cifar_resnet

torchvision_resnet = pytest.importorskip("torchvision.models.resnet")


def torchvision_model(block):
    return torchvision_resnet.ResNet(block, [2, 1, 1, 1], num_classes=4)


def timm_model(block, **options):
    resnet = pytest.importorskip("timm.models.resnet")
    return resnet.ResNet(getattr(resnet, block), [1, 2, 1, 1], num_classes=4, zero_init_last=False, **options)


def timm_preactivation_model(block):
    resnetv2 = pytest.importorskip("timm.models.resnetv2")
    layers = pytest.importorskip("timm.layers")
    return resnetv2.ResNetV2(
        [1, 2, 1, 1],
        num_classes=4,
        norm_layer=layers.BatchNormAct2d,
        conv_layer=layers.create_conv2d,
        preact=True,
        basic=block == "basic",
        bottle_ratio=1.0 if block == "basic" else 0.25,
    )


MODELS = {
    "cifar": lambda: cifar_resnet(14, num_classes=4),
    "torchvision-basic": lambda: torchvision_model(torchvision_resnet.BasicBlock),
    "torchvision-bottleneck": lambda: torchvision_model(torchvision_resnet.Bottleneck),
    "timm-basic": lambda: timm_model("BasicBlock"),
    "timm-bottleneck-d": lambda: timm_model("Bottleneck", avg_down=True, stem_type="deep"),
    "timm-preactivation": lambda: timm_preactivation_model("bottleneck"),
    "timm-preactivation-basic": lambda: timm_preactivation_model("basic"),
}


@pytest.fixture(params=MODELS)
def pair(request):
    """A model in float64 and its fused copy."""
    torch.manual_seed(0)
    model = MODELS[request.param]().double()
    fused = copy.deepcopy(model)
    blocks = fuse_blocks(fused)
    assert len(blocks) == (6 if request.param == "cifar" else 5)
    assert all(isinstance(fused.get_submodule(path), FusedBlock) for path in blocks)
    return model, fused


def images(rows=4):
    return torch.randn(rows, 3, 32, 32, dtype=torch.float64)


def close(actual, wanted):
    torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=1e-11)


def test_outputs_gradients_and_buffers(pair):
    model, fused = pair
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = images().to(memory_format=memory_format)
        outputs = [m(x) for m in pair]
        close(outputs[1], outputs[0])
        for m, output in zip(pair, outputs, strict=True):
            m.zero_grad()
            output.square().sum().backward()
        scale = max(p.grad.abs().max() for p in model.parameters())
        for (name, p), q in zip(model.named_parameters(), fused.parameters(), strict=True):
            assert (p.grad - q.grad).abs().max() <= 1e-11 * scale, name
        for p, q in zip(model.buffers(), fused.buffers(), strict=True):
            close(q, p)
    for m in pair:
        m.eval()
    close(fused(x), model(x))


def test_a_frozen_norm_in_a_training_model(pair):
    for m in pair:
        m.eval(), m.train()
        for module in m.modules():
            if isinstance(module, nn.BatchNorm2d) and module.num_features % 64 == 0:
                module.eval()
    x = images()
    close(pair[1](x), pair[0](x))
    for p, q in zip(pair[0].buffers(), pair[1].buffers(), strict=True):
        close(q, p)


def test_keys_and_classes_stay(pair):
    model, fused = pair
    assert list(fused.state_dict()) == list(model.state_dict())
    for module, original in zip(fused.modules(), model.modules(), strict=True):
        assert isinstance(module, type(original))
    fused.load_state_dict(model.state_dict())


def test_copies_and_the_way_back(pair):
    model, fused = pair
    x = images()
    wanted = model.eval()(x)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert any(isinstance(module, FusedBlock) for module in twin.modules())
        close(twin.eval()(x), wanted)
        assert len(unfuse_blocks(twin)) >= 5
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        close(twin(x), wanted)


def test_fusing_twice_is_fusing_once():
    model = cifar_resnet(8)
    assert len(fuse_blocks(model)) == 3
    assert fuse_blocks(model) == []
    assert len(unfuse_blocks(model)) == 3
    assert unfuse_blocks(model) == []


def test_ghost_batches_run_as_one_after_another(pair):
    """Every norm inside the blocks, also in a shortcut, is normalised and reported per ghost batch."""
    model, fused = pair
    blocks = [
        (fused.get_submodule(p), model.get_submodule(p))
        for p, m in fused.named_modules()
        if isinstance(m, FusedBlock)
    ]
    x = images(6)
    for block, original in blocks:
        features = next(m.in_channels for m in block.modules() if isinstance(m, nn.Conv2d))
        x = torch.randn(6, features, 8, 8, dtype=torch.float64)
        heard = []
        with ghost_batches(3, heard.append):
            y = block(x)
        heard = [(report.layer, report.mean, report.variance) for report in heard]
        norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
        assert {id(layer) for layer, _, _ in heard} == {id(norm) for norm in norms} and len(heard) == len(
            norms
        )
        for g in range(3):
            twin = copy.deepcopy(original)
            for norm in twin.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    norm.momentum = 1.0
            close(y[2 * g : 2 * g + 2], twin(x[2 * g : 2 * g + 2]))
            names = {id(m): name for name, m in block.named_modules()}
            for layer, mean, var in heard:
                norm = twin.get_submodule(names[id(layer)])
                close(mean[g], norm.running_mean)
                close(var[g], norm.running_var)


def test_hooks_on_the_block_fire():
    model = cifar_resnet(8)
    fuse_blocks(model)
    seen = []
    block = model.layer2[0]
    block.register_forward_pre_hook(lambda module, args: seen.append("before"))
    block.register_forward_hook(lambda module, args, output: seen.append("after"))
    block.register_full_backward_hook(lambda module, before, after: seen.append("backward"))
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert seen == ["before", "after", "backward"]


@pytest.mark.parametrize("inner", ["bn1", "bn2"])
def test_a_hook_on_a_norm_runs_the_blocks_own_forward(inner):
    model = cifar_resnet(8).double()
    wanted = copy.deepcopy(model)
    fuse_blocks(model)
    seen = []
    handle = getattr(model.layer1[0], inner).register_forward_hook(lambda *_: seen.append(inner))
    x = images()
    close(model(x), wanted(x))
    assert seen == [inner]
    handle.remove()
    model(x)
    assert seen == [inner]


def test_a_global_hook_sees_every_module():
    model, seen = cifar_resnet(8), []
    fuse_blocks(model)
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        model(torch.randn(2, 3, 8, 8))
    finally:
        handle.remove()
    assert seen.count(nn.BatchNorm2d) == 7


def test_a_norm_exchanged_after_fusing():
    model = cifar_resnet(8).double()
    fuse_blocks(model)
    model.layer1[0].bn1 = nn.GroupNorm(4, 16, dtype=torch.float64)
    x = images()
    y = model(x)
    unfuse_blocks(model)
    close(y, model(x))


class Subclass(BasicBlock):
    def forward(self, x):
        return super().forward(x) * 2


def unusual_blocks():
    def changed(change, block=None):
        block = block or torchvision_resnet.BasicBlock(8, 8)
        change(block)
        return block

    def drop_shortcut_norm(block):
        block.downsample = nn.Sequential(nn.Conv2d(8, 8, 1), nn.SyncBatchNorm(8))

    yield "subclass", Subclass(8, 8)
    yield "group norm", changed(lambda b: setattr(b, "bn2", nn.GroupNorm(2, 8)))
    yield "synchronised", changed(lambda b: setattr(b, "bn1", nn.SyncBatchNorm(8)))
    yield (
        "no running statistics",
        changed(lambda b: setattr(b, "bn1", nn.BatchNorm2d(8, track_running_stats=False))),
    )
    yield "another activation", changed(lambda b: setattr(b, "relu", nn.SiLU()))
    yield "hook on a norm", changed(lambda b: b.bn1.register_forward_hook(lambda *_: None))
    yield "hook on the activation", changed(lambda b: b.relu.register_forward_pre_hook(lambda *_: None))
    yield "own forward", changed(lambda b: setattr(b, "forward", b.forward))
    yield "synchronised shortcut", changed(drop_shortcut_norm)


@pytest.mark.parametrize(
    ("what", "block"), list(unusual_blocks()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_an_unusual_block_is_left_alone(what, block):
    kind = type(block)
    assert fuse_blocks(nn.Sequential(block)) == []
    assert type(block) is kind


@pytest.mark.parametrize(
    "options",
    [
        {"block_args": {"attn_layer": "se"}},
        {"drop_path_rate": 0.1},
        {"drop_block_rate": 0.1},
        {"aa_layer": "blurpc"},
        {"act_layer": nn.SiLU},
    ],
    ids=str,
)
def test_timm_extras_are_left_alone(options):
    if options.get("aa_layer"):
        options = {"aa_layer": pytest.importorskip("timm.layers").BlurPool2d}
    model = timm_model("BasicBlock", **options)
    left = [path for path, module in model.named_modules() if type(module).__name__ == "BasicBlock"]
    fused = fuse_blocks(model)
    for path in set(left) & set(fused):
        block = model.get_submodule(path)
        assert block.se is None and block.drop_path is None and isinstance(block.act1, nn.ReLU)
    assert len(fused) < len(left)


def test_low_precision_shortcut_of_another_dtype():
    """Under autocast the shortcut of a float32 input stays in float32; the sum promotes, as without fusion."""
    model = cifar_resnet(8)
    block, x = model.layer1[0], torch.randn(4, 16, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = block(x)
        fuse_blocks(model)
        actual = block(x)
    assert actual.dtype == wanted.dtype == torch.float32
    torch.testing.assert_close(actual, wanted, rtol=2e-2, atol=2e-2)


def test_compiles_without_graph_break():
    model = cifar_resnet(8)
    fuse_blocks(model)
    x = torch.randn(2, 16, 8, 8)
    compiled = torch.compile(model.layer1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model.layer1(x))
