"""Dense prediction: torchvision's FCN and DeepLabV3 and models with skip connections against the plain loop."""

from __future__ import annotations

import copy
import dataclasses
import logging

import pytest
import torch
import torch.nn.functional as F
from helpers.reference_step import (
    MODES,
    TOLERANCES,
    assert_modes_agree,
    assert_same,
    one_thread,  # noqa: F401
    package_step,
    random_drops,
    reference_step,
)
from helpers.small_nets import Block
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import ResNet
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import Bottleneck
from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3
from torchvision.models.segmentation.fcn import FCN, FCNHead

from gkt_fast import GKT, GKTConfig, GKTTrainer, evaluate
from gkt_fast.execution import StackingError
from gkt_fast.network.calls import SharedStateError
from gkt_fast.network.discovery import find_stages

CLASSES = 3
IGNORED = 255


def backbone(aux=False):
    """A dilated ResNet as in torchvision's segmentation networks, each stage narrowed to a few channels."""
    resnet = ResNet(
        Bottleneck, [2, 2, 2, 2], width_per_group=2, replace_stride_with_dilation=[False, True, True]
    )
    narrow(resnet)
    return IntermediateLayerGetter(resnet, {"layer4": "out"} | ({"layer3": "aux"} if aux else {}))


def narrow(module, factor=16):
    """Divides all channels but those of images: torchvision's widths are fixed, and these tests are many."""
    for name, layer in module.named_children():
        if isinstance(layer, nn.Conv2d):
            narrowed = nn.Conv2d(
                layer.in_channels if layer.in_channels == 3 else -(-layer.in_channels // factor),
                -(-layer.out_channels // factor), layer.kernel_size, layer.stride, layer.padding, layer.dilation,
                bias=layer.bias is not None,
            )  # fmt: skip
            setattr(module, name, narrowed)
        elif isinstance(layer, nn.BatchNorm2d):
            setattr(module, name, nn.BatchNorm2d(-(-layer.num_features // factor)))
        else:
            narrow(layer, factor)


def fcn(aux=False):
    auxiliary = FCNHead(1024 // 16, CLASSES) if aux else None
    return FCN(backbone(aux), FCNHead(2048 // 16, CLASSES), auxiliary)


def deeplab():
    head = DeepLabHead(2048, CLASSES, (2, 3, 4))
    last = head[-1]
    narrow(head)
    head[-1] = nn.Conv2d(16, CLASSES, 1)
    assert isinstance(last, nn.Conv2d)
    return DeepLabV3(backbone(), head)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def batch(size=2, side=17, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, side, side, dtype=torch.float64, generator=generator)
    targets = torch.randint(CLASSES, (size, side, side), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < 0.3] = IGNORED
    return images, targets


class Out(nn.Module):
    """What the plain loop needs: the logits themselves."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        output = self.model(x)
        return output["out"] if isinstance(output, dict) else output.logits


def assert_agrees(model, modes, config, seed=0, floor=0.0):
    """Every mode against the plain loop, of a model that doesn't return bare logits."""
    images, targets = batch()
    dropped = random_drops(find_stages(model), 1 + config.groups * config.loops, seed)
    outer = [frozenset(f"model.{path}" for path in stream) for stream in dropped]
    expected = reference_step(Out(copy.deepcopy(model)), (images,), targets, outer, config)
    expected.gradients = {name.removeprefix("model."): g for name, g in expected.gradients.items()}
    expected.buffers = {name.removeprefix("model."): b for name, b in expected.buffers.items()}
    for mode in modes:
        actual = package_step(mode, copy.deepcopy(model), (images,), targets, dropped, config)
        assert_same(actual, expected, TOLERANCES.get(mode, 1e-12), floor)
    return expected


@pytest.mark.parametrize("build", [fcn, deeplab])
@pytest.mark.parametrize(
    "options",
    [
        {"batch_norm": "all_streams"},
        {"distill_ignored": False, "subnet_ce_weight": 0.5, "normalize_logits": True, "temperature": 2.0},
    ],
    ids=["all positions", "without the ignored"],
)
def test_torchvision_networks_equal_the_plain_loop(build, options):
    torch.manual_seed(0)
    model = without_dropout(build()).double()
    config = GKTConfig(groups=2, loops=2, ignore_index=IGNORED, **options)
    outcome = assert_agrees(model, MODES, config, floor=1e-13)
    assert outcome.logits.shape == (2, CLASSES, 17, 17)
    assert all(gradient is not None for gradient in outcome.gradients.values())


@dataclasses.dataclass
class Output:
    logits: Tensor


class Segmenter(nn.Module):
    """Returns a dataclass."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.head = nn.Conv2d(6, CLASSES, 1)
        self.double()

    def forward(self, x):
        return Output(self.head(self.blocks(self.stem(x))))


def test_a_dataclass_with_logits_equals_the_plain_loop():
    assert_agrees(Segmenter(), MODES, GKTConfig(groups=2, ignore_index=IGNORED))


class Pyramid(nn.Module):
    """Adds the output of an early stage to that of a later one, through a layer or directly."""

    def __init__(self, lateral=True):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.early = nn.Sequential(Block(), Block(), Block())
        self.down = nn.Conv2d(6, 6, 3, stride=2, padding=1)
        self.late = nn.Sequential(Block(), Block(), Block())
        self.lateral = nn.Conv2d(6, 6, 1) if lateral else None
        self.head = nn.Conv2d(6, CLASSES, 1)
        self.double()

    def forward(self, x):
        early = self.early(self.stem(x))
        late = self.late(self.down(early))
        lateral = early if self.lateral is None else self.lateral(early)
        return self.head(F.interpolate(late, size=x.shape[-2:]) + lateral)


class Residual(Segmenter):
    """The model's own code reads the first block's output again, after the last layer; the blocks are all alike."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(6, 6, 1).double()

    def forward(self, x):
        first = self.blocks[0](self.stem(x))
        return (self.head(self.blocks[2](self.blocks[1](first))) + first)[:, :CLASSES]


SKIPS = [
    (Pyramid, "'lateral' or the code beside it reads the output of 'early.2' again"),
    (lambda: Pyramid(lateral=False), "'head' or the code beside it reads the output of 'early.2' again"),
    (Residual, "'head' or the code beside it reads the output of 'blocks.0' again"),
]


@pytest.mark.parametrize("build, message", SKIPS)
def test_skip_connections_over_stages(build, message, caplog):
    """Modes that can't run them say so before they run; auto takes one that can."""
    model, (images, targets) = build(), batch(side=16)
    config = GKTConfig(groups=2, loops=2, ignore_index=IGNORED)
    dropped = random_drops(find_stages(model), 5, seed=1)
    assert_modes_agree(model, (images,), targets, dropped, config, ("shared", "sequential"))
    for mode, error in (("stacked", StackingError), ("lean", SharedStateError)):
        with pytest.raises(error, match=f"{message}.*execution='{mode}' has"):
            package_step(mode, copy.deepcopy(model), (images,), targets, dropped, config)
    with caplog.at_level(logging.INFO, "gkt_fast"):
        GKT(model, config)(images, targets, step=0).loss.backward()
    assert f"execution='auto' runs 'shared': states can't be stacked: {message}" in caplog.text


def test_a_frozen_activation_may_be_read_again_by_lean():
    """No gradient flows back there."""
    model, (images, targets) = Pyramid(lateral=False), batch(side=16)
    for part in (model.stem, model.early):
        part.requires_grad_(False)
    dropped = random_drops(find_stages(model), 5, seed=1)
    config = GKTConfig(groups=2, loops=2, ignore_index=IGNORED)
    assert_modes_agree(model, (images,), targets, dropped, config, ("shared", "sequential", "lean"))
    with pytest.raises(StackingError, match=r"the output of 'early\.2' again"):
        package_step("stacked", model, (images,), targets, dropped, config)


def test_an_auxiliary_head_is_left_out_and_said_so(caplog):
    """It gets no gradient; what else is trained is the same as without it."""
    torch.manual_seed(0)
    model = without_dropout(fcn(aux=True)).double()
    plain = copy.deepcopy(model)
    plain.aux_classifier = None
    images, targets = batch()
    config = GKTConfig(groups=2, ignore_index=IGNORED, execution="shared")
    with caplog.at_level(logging.WARNING, "gkt_fast"):
        for _ in range(2):
            GKT(model, config)(images, targets, step=0).loss.backward()
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == 1
    assert "'aux'" in caplog.text and "aux_classifier = None" in caplog.text
    for _ in range(2):
        GKT(plain, config)(images, targets, step=0).loss.backward()
    gradients = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=1e-12, atol=0)
    assert all(parameter.grad is None for parameter in model.aux_classifier.parameters())


def segmentation_loader():
    images, targets = batch(6, side=17)
    return DataLoader(TensorDataset(images.float(), targets), 3)


def test_evaluation_of_dense_targets():
    """Held against a confusion matrix counted position by position."""
    torch.manual_seed(0)
    model = fcn().eval()
    loader = segmentation_loader()
    result = evaluate(model, loader, ignore_index=IGNORED)
    confusion = torch.zeros(CLASSES, CLASSES)
    losses = []
    for images, targets in loader:
        with torch.no_grad():
            logits = model(images)["out"]
        for image in range(len(images)):
            for target, z in zip(targets[image].flatten(), logits[image].flatten(1).T, strict=True):
                if target != IGNORED:
                    confusion[target, z.argmax()] += 1
                    losses.append(-torch.log_softmax(z, 0)[target])
    hits = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - hits
    assert result.samples == confusion.sum()
    assert result.accuracy == pytest.approx(float(hits.sum() / confusion.sum()))
    assert result.mean_iou == pytest.approx(float((hits / union)[union > 0].mean()))
    assert result.loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


@pytest.mark.parametrize("first", [6, 3])
def test_every_rank_gets_the_result_over_all_samples(monkeypatch, first):
    """Two ranks one after the other: each adds what the other gave to the reduction. One of them may have no batch."""
    torch.manual_seed(0)
    model = fcn().eval()
    samples = list(segmentation_loader().dataset)
    shares = [DataLoader(samples[:first], 3), DataLoader(samples[first:], 3) if first < 6 else []]
    whole = evaluate(model, segmentation_loader(), ignore_index=IGNORED)
    given = [[], []]
    for ranks in ((0, 1), (0,), (1,)):  # until both have given to both reductions
        for rank in ranks:
            others = list(given[1 - rank])
            given[rank] = []

            def reduce_sum(tensor, rank=rank, others=others):
                other = (
                    others[len(given[rank])] if len(given[rank]) < len(others) else torch.zeros_like(tensor)
                )
                given[rank].append(tensor)
                return tensor + other

            monkeypatch.setattr("gkt_fast.deployment.evaluation.reduce_sum", reduce_sum)
            try:
                result = evaluate(model, shares[rank], ignore_index=IGNORED)
            except ValueError:  # as long as no rank has given a row
                continue
    assert (result.samples, result.accuracy) == (whole.samples, whole.accuracy)
    assert result.mean_iou == pytest.approx(whole.mean_iou, rel=1e-12)


def test_classes_that_do_not_occur_are_no_part_of_the_mean():
    class Fixed(nn.Module):
        def forward(self, x):
            return x

    logits = F.one_hot(torch.tensor([[[0, 0, 1, 1]]]), 4).movedim(-1, 1).float()
    targets = torch.tensor([[[0, 1, 1, -100]]])
    result = evaluate(Fixed(), [(logits, targets)])
    assert result.mean_iou == pytest.approx((1 / 2 + 1 / 2) / 2) and result.accuracy == pytest.approx(2 / 3)


def test_the_trainer_on_dense_targets(tmp_path):
    torch.manual_seed(0)
    model = fcn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    trainer = GKTTrainer(model, optimizer, GKTConfig(groups=2, ignore_index=IGNORED), channels_last=True)
    loader = segmentation_loader()
    history = trainer.fit(loader, epochs=2, val_loader=loader, output_dir=tmp_path, progress=False)
    assert history[1]["train_loss"] < history[0]["train_loss"]
    subnet = trainer.evaluate(loader, (1, 1, 1, 1), calibration_loader=loader)
    assert 0 < subnet.mean_iou <= 1 and subnet.samples == history_rows(loader)


def history_rows(loader):
    return sum(int((targets != IGNORED).sum()) for _, targets in loader)
