"""One network at every depth: equal to the extracted ones, weights shared whatever is done with it, files, errors."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from helpers.reference_step import one_thread  # noqa: F401
from helpers.small_nets import Net
from torch import nn

from gkt_fast import (
    ElasticNetwork,
    Subnet,
    choose_subnets,
    extract_subnet,
    fuse_blocks,
    load_elastic,
    make_elastic,
    recalibrate_batch_norm,
)
from gkt_fast.deployment.subnet_choice import nested_subnets
from gkt_fast.instruments.zoo import ZOO, ZooModel
from gkt_fast.models import cifar_resnet
from gkt_fast.network.calls import logits_of
from gkt_fast.network.discovery import find_stages

DEPTHS = [(1, 1, 1), (1, 2, 2), (2, 2, 2)]


def batches(size=12, channels=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, channels, size, size, generator=generator) for _ in range(2)]


def resnet(width=4):
    torch.manual_seed(0)
    return cifar_resnet(14, num_classes=5, width=width)


@pytest.fixture
def elastic():
    return make_elastic(resnet(), DEPTHS, calibration_loader=batches())


def tensors(module):
    return len({id(tensor) for tensor in [*module.parameters(), *module.buffers()]})


def assert_same(a, b, depths=DEPTHS):
    x = batches()[0]
    with torch.no_grad():
        for these in depths:
            assert torch.equal(a(x, depths=these), b(x, depths=these)), these


@pytest.mark.parametrize("zoo_model", ZOO, ids=str)
def test_each_depth_is_the_extracted_one(zoo_model: ZooModel):
    """Of every network of the model table, with statistics on the same batches, the last of which is cut short."""
    torch.manual_seed(0)
    model = zoo_model.build_small()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    subnets = nested_subnets(find_stages(model), 0, 3)
    loader = batches(zoo_model.small_pixels)
    elastic = make_elastic(model, subnets, calibration_loader=loader, calibration_samples=8)
    x = loader[0]
    outputs = []
    for subnet in subnets:
        alone = extract_subnet(model, subnet)
        recalibrate_batch_norm(alone, loader, 8)
        with torch.no_grad():
            outputs.append(logits_of(elastic(x, depths=subnet)))
            torch.testing.assert_close(outputs[-1], logits_of(alone.eval()(x)))
        assert elastic.at(subnet).state_dict().keys() == alone.state_dict().keys()
    assert not torch.allclose(outputs[0], outputs[-1], rtol=1e-3, atol=1e-3)
    kept = sum(p.numel() for p in extract_subnet(model, subnets[-1]).parameters())
    assert sum(p.numel() for p in elastic.parameters()) == kept


def test_subnets_that_are_not_ordered():
    model = cifar_resnet(20, width=4)
    some = choose_subnets(find_stages(model), max_subnets=4)
    masked = Subnet(((False, True, True), (True, False, True), (True, True, False)))
    elastic = make_elastic(model, [*some, masked], calibration_loader=batches())
    alone = extract_subnet(model, masked)
    recalibrate_batch_norm(alone, batches())
    x = batches()[0]
    with torch.no_grad():
        torch.testing.assert_close(elastic(x, depths=masked), alone.eval()(x))
    elastic.depths = masked
    assert elastic.depths == masked and torch.equal(elastic(x), elastic(x, depths=masked))


def test_states_that_depths_share_have_one_set_of_statistics(elastic):
    small, middle, large = (elastic.at(depths) for depths in DEPTHS)
    assert small.bn1 is middle.bn1 is large.bn1
    assert small.layer1 is middle.layer1 and small.layer1[0] is large.layer1[0]
    assert small.layer2[0] is middle.layer2[0] and middle.layer2[0] is not large.layer2[0]
    assert middle.layer2[0].bn1.running_mean is not large.layer2[0].bn1.running_mean
    assert middle.layer2[0].bn1.weight is large.layer2[0].bn1.weight
    keys = [key for key in elastic.state_dict() if "layer2.0.bn1.running_mean" in key]
    assert keys == [f"statistics.{depths}.layer2.0.bn1.running_mean" for depths in ("1-1-1", "2-2-2")]
    assert {key for key in elastic.state_dict() if key.startswith("weights.")} == {
        f"weights.{name}" for name, _ in resnet().named_parameters()
    }


def test_depths_at_hand(elastic):
    x = batches()[0]
    assert elastic.depths == (2, 2, 2) and not elastic.training
    elastic.depths = [1, 1, 1]
    assert elastic.depths == (1, 1, 1)
    assert torch.equal(elastic(x), elastic(x, depths=(1, 1, 1))) and torch.equal(elastic(x), elastic.at()(x))


def test_the_model_is_left_as_it_was():
    model = resnet().train()
    fuse_blocks(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    state = torch.get_rng_state()
    elastic = make_elastic(model, DEPTHS, calibration_loader=batches())
    with torch.no_grad():
        for parameter in elastic.parameters():
            parameter.zero_()
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda elastic: pickle.loads(pickle.dumps(elastic)),
        lambda elastic: elastic.double().float(),
        lambda elastic: elastic.to(memory_format=torch.channels_last),
    ],
    ids=["deepcopy", "pickle", "dtype", "memory format"],
)
def test_what_is_shared_stays_shared(elastic, change):
    count = tensors(elastic)
    other = change(copy.deepcopy(elastic))
    assert tensors(other) == count
    if other.at().conv1.weight.is_contiguous():
        assert_same(other, elastic)
    with torch.no_grad():
        other.at((1, 1, 1)).layer1[0].conv1.weight.zero_()
    assert not other.at((2, 2, 2)).layer1[0].conv1.weight.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(elastic, dtype, tmp_path):
    x = batches()[0]
    half = copy.deepcopy(elastic).to(dtype)
    assert tensors(half) == tensors(elastic)
    with torch.no_grad():
        for depths in DEPTHS:
            torch.testing.assert_close(
                half(x.to(dtype), depths=depths).float(), elastic(x, depths=depths), rtol=0.1, atol=0.1
            )
    half.save(tmp_path / "half.pt")
    loaded = load_elastic(tmp_path / "half.pt", resnet())
    assert loaded(x.to(dtype)).dtype == dtype and tensors(loaded) == tensors(elastic)


def test_to_another_device_and_swapped_parameters(elastic):
    count = tensors(elastic)
    assert tensors(copy.deepcopy(elastic).to("meta")) == count
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        other = copy.deepcopy(elastic).double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert tensors(other) == count


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict(elastic, assign):
    other = make_elastic(resnet().apply(_randomised), DEPTHS, calibration_loader=batches())
    other.load_state_dict(elastic.state_dict(), assign=assign)
    assert tensors(other) == tensors(elastic)
    assert_same(other, elastic)


def _randomised(module):
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight)


def test_state_dict_within_another_module(elastic):
    outer = nn.ModuleDict({"a": elastic})
    state = outer.state_dict()
    assert len(state) == len(elastic.state_dict()) and all(key.startswith("a.") for key in state)
    outer.load_state_dict(state)
    del state["a.weights.layer1.0.conv1.weight"], state["a.statistics.1-1-1.bn1.running_mean"]
    with pytest.raises(RuntimeError) as caught:
        outer.load_state_dict(state)
    message = str(caught.value)
    assert message.count("a.weights.layer1.0.conv1.weight") == 1
    assert "a.statistics.1-1-1.bn1.running_mean" in message and "networks" not in message


def test_file(elastic, tmp_path):
    elastic.metadata = {"accuracy": [0.5, None], "name": "digits"}
    elastic.save(tmp_path / "net.pt")
    loaded = load_elastic(tmp_path / "net.pt", resnet().apply(_randomised))
    assert loaded.metadata == elastic.metadata and loaded.subnets == elastic.subnets
    assert tensors(loaded) == tensors(elastic) and not loaded.training
    assert_same(loaded, elastic)
    assert [path.name for path in tmp_path.iterdir()] == ["net.pt"]


def test_file_without_batch_norm(tmp_path):
    """ConvNeXt of the model table: no calibration is needed, no statistics are kept."""
    model = next(z for z in ZOO if str(z) == "timm-convnext_atto").build_small()
    elastic = make_elastic(model)
    assert [str(subnet) for subnet in elastic.subnets] == ["1-1-1-1", "1-1-2-1", "2-1-2-1", "2-1-3-1"]
    assert all(key.startswith("weights.") for key in elastic.state_dict())
    elastic.save(tmp_path / "net.pt")
    x = torch.randn(2, 3, 32, 32)
    loaded = load_elastic(tmp_path / "net.pt", copy.deepcopy(model))
    assert torch.equal(loaded(x, depths=(1, 1, 1, 1)), elastic(x, depths=(1, 1, 1, 1)))


def test_calibration_that_nobody_needs_is_mentioned(caplog):
    model = next(z for z in ZOO if str(z) == "timm-vit_tiny_patch16_224").build_small()
    with caplog.at_level("INFO", "gkt_fast"):
        make_elastic(model, [(1,), (4,)], calibration_loader=batches(16))
    assert "VisionTransformer has no BatchNorm: its depths need no calibration" in caplog.text


@pytest.mark.parametrize(
    "model, message",
    [
        (lambda: cifar_resnet(14, num_classes=5, width=8), r"than CifarResNet: \d+ of another shape"),
        (lambda: cifar_resnet(8, num_classes=5, width=4), "which has no 'layer1.1'"),
        (lambda: Net(), "than Net, which has no 'layer1.0'"),
    ],
    ids=["wider", "shallower", "another class"],
)
def test_file_of_another_network(elastic, tmp_path, model, message):
    elastic.save(tmp_path / "net.pt")
    with pytest.raises(ValueError, match=f"net.pt is of another network.*{message}"):
        load_elastic(tmp_path / "net.pt", model())


def test_files_that_are_none(elastic, tmp_path):
    path = tmp_path / "net.pt"
    with pytest.raises(FileNotFoundError):
        load_elastic(path, resnet())
    torch.save({"model": 1}, path)
    with pytest.raises(ValueError, match=r"is no file of ElasticNetwork.save \(found None\)"):
        load_elastic(path, resnet())
    elastic.save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="it may be cut off or damaged"):
        load_elastic(path, resnet())
    elastic.metadata["model"] = resnet()
    with pytest.raises(ValueError, match="metadata holds CifarResNet; it must hold plain"):
        elastic.save(tmp_path / "other.pt")
    assert [found.name for found in tmp_path.iterdir()] == ["net.pt"]


def test_several_threads(elastic):
    x = batches()[0]
    with torch.no_grad():
        expected = {depths: elastic(x, depths=depths) for depths in DEPTHS}
    wrong = []

    def work(depths):
        for _ in range(20):
            with torch.no_grad():
                if not torch.equal(elastic(x, depths=depths), expected[depths]):
                    wrong.append(depths)

    threads = [threading.Thread(target=work, args=(depths,)) for depths in DEPTHS * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_compiled_per_depth(elastic):
    reference = copy.deepcopy(elastic)
    elastic.compile(backend="eager", fullgraph=True)
    assert_same(elastic, reference)
    assert_same(torch.compile(copy.deepcopy(reference), backend="eager"), reference)
    assert_same(copy.deepcopy(elastic), reference)


def test_calibration_after_training_trains_no_statistics_of_other_states(elastic):
    """A step in training mode touches the statistics of its own states; `calibrate` makes all of them anew."""
    x = batches()[0]
    before = {key: value.clone() for key, value in elastic.state_dict().items()}
    elastic.train()
    elastic(x, depths=(1, 1, 1))
    moved = {k for k, v in elastic.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(key.startswith("statistics.1-1-1.") for key in moved)
    assert elastic.calibrate(batches()) == 12 and elastic.training
    after = elastic.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


class Codebook(nn.Module):
    """A buffer that training moves on, in a layer that is no norm."""

    def __init__(self):
        super().__init__()
        self.register_buffer("level", torch.zeros(1))
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x):
        if self.training:
            self.level += x.detach().mean()
        return (x - self.level) * self.scale


class CodebookBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.book = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), Codebook()

    def forward(self, x):
        return x + self.book(self.norm(self.conv(x)))


def test_other_running_buffers_belong_to_a_state(caplog):
    model = Net(CodebookBlock, depth=3).float()
    loader = batches(6)
    elastic = make_elastic(model, [(1,), (2,), (3,)], calibration_loader=loader)
    assert "buffers of 'blocks.0.book', 'blocks.1.book', 'blocks.2.book' change in training" in caplog.text
    keys = [key for key in elastic.state_dict() if "book" in key]
    assert keys == [
        f"statistics.{i + 1}.blocks.{i}.book.{name}" for i in range(3) for name in ("level", "scale")
    ]
    assert not any(block.book.level.any() for block in model.blocks)


class Tied(nn.Module):
    """One block at two places, and one norm in two blocks."""

    def __init__(self):
        super().__init__()
        from helpers.small_nets import Block

        self.stem = nn.Conv2d(3, 6, 1)
        first, second = Block(), Block()
        second.bn = first.bn
        self.blocks = nn.ModuleList([first, second, first, Block()])
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def test_tied_blocks_and_norms():
    torch.manual_seed(0)
    model, loader = Tied(), batches(6)
    elastic = make_elastic(model, [(1,), (2,), (3,), (4,)], calibration_loader=loader)
    for depths in [(1,), (2,), (3,), (4,)]:
        alone = extract_subnet(model, depths)
        recalibrate_batch_norm(alone, loader)
        with torch.no_grad():
            torch.testing.assert_close(elastic(loader[0], depths=depths), alone.eval()(loader[0]))


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        ({"depths": [(1, 1)]}, ValueError, "must have one entry for each of 3 stages"),
        ({"depths": [(1, 1, 3)]}, ValueError, "its entry 2 must be between"),
        ({"depths": (1, 1, 1)}, TypeError, r"it must hold the depths of several subnets, \[\(1, 1, 1\)\]"),
        ({"depths": "111"}, TypeError, "it must hold the depths of several subnets"),
        ({"depths": []}, ValueError, "depths is empty"),
        ({"depths": [(1, 1, 1), (1, 1, 1)]}, ValueError, "depths holds 1-1-1 twice"),
        ({"calibration_loader": None}, ValueError, "CifarResNet has BatchNorm, whose statistics differ"),
        ({"calibration_loader": []}, ValueError, "loader gave no sample"),
        ({"calibration_samples": 0}, ValueError, "num_samples is 0; it must be at least 1"),
    ],
)
def test_arguments_that_do_not_fit(arguments, kind, message):
    with pytest.raises(kind, match=message):
        make_elastic(resnet(), **({"depths": DEPTHS, "calibration_loader": batches()} | arguments))


@pytest.mark.parametrize("depths", [(2, 1, 1), (9, 9, 9), 3, [[1], [2]], "1-1-1"])
def test_depths_without_statistics(elastic, depths):
    message = "this network was made for 1-1-1, 1-2-2, 2-2-2. Other depths have no statistics"
    with pytest.raises(ValueError, match=message):
        elastic(batches()[0], depths=depths)
    with pytest.raises(ValueError, match=message):
        elastic.depths = depths
    with pytest.raises(ValueError, match=message):
        elastic.at(depths)


def test_a_loader_that_can_be_gone_through_once():
    elastic = make_elastic(resnet(), DEPTHS, calibration_loader=iter(batches()))
    assert_same(elastic, make_elastic(resnet(), DEPTHS, calibration_loader=batches()))
    assert isinstance(elastic, ElasticNetwork) and elastic.sample == (3, 12, 12)
