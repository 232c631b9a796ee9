"""What `GKTTrainer.step` does beyond forward and backward, each against the same thing written down plainly."""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
import math
import os
import signal
import traceback

import pytest
import torch
import torch.nn.functional as F
from helpers.reference_step import choice_of
from helpers.small_nets import CLASSES, Net
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from gkt_fast import GKT, Callback, CheckpointError, GKTConfig, GKTTrainer, LinearWarmup, NonFiniteLossError
from gkt_fast.ops import GroupKnowledge
from gkt_fast.training.checkpoint import load_checkpoint, save_checkpoint
from gkt_fast.training.weight_average import WeightAverage

CONFIG = GKTConfig(groups=2)
LOSS_OP = os.path.dirname(inspect.getsourcefile(GroupKnowledge))
"""Its folder: on the CPU, where reading costs nothing, the op reads class indices and the gradient of the loss."""


class PlainBlock(nn.Module):
    """x + f(x) without BatchNorm, so that a batch is the sum of its parts."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.gelu(self.conv(x))


def batches(*sizes: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 3, 6, 6, dtype=torch.float64, generator=generator),
            torch.randint(CLASSES, (size,), generator=generator),
        )
        for size in sizes
    ]


def make(net: nn.Module | None = None, config: GKTConfig = CONFIG, **options) -> GKTTrainer:
    net = Net(PlainBlock) if net is None else net
    return GKTTrainer(net, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9), config, **options)


def plain_steps(
    batches: list, config: GKTConfig = CONFIG, net: nn.Module | None = None, clip=None
) -> nn.Module:
    """One optimizer step per batch, by hand."""
    net = Net(PlainBlock) if net is None else net
    gkt = GKT(net, config.replace(execution="sequential"))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for step, (images, targets) in enumerate(batches):
        optimizer.zero_grad()
        gkt(images, targets, step=step).loss.backward()
        if clip is not None:
            norm = torch.stack([p.grad.norm() for p in net.parameters()]).norm()
            for p in net.parameters():
                p.grad *= min(1.0, clip / (float(norm) + 1e-6))
        optimizer.step()
    return net


def assert_same_weights(actual: nn.Module, expected: nn.Module, tolerance: float = 1e-11) -> None:
    for (name, a), b in zip(actual.state_dict().items(), expected.state_dict().values(), strict=True):
        assert (a - b).double().norm() <= tolerance * b.double().norm(), name


def joined(parts: list) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([images for images, _ in parts]), torch.cat([targets for _, targets in parts])


@pytest.mark.parametrize("execution", ["sequential", "shared", "stacked", "lean"])
def test_accumulated_batches_are_one_big_batch(execution):
    """Batches of 4, 4, 2 and 5, 5, 5 samples; two steps with momentum."""
    parts = batches(4, 4, 2, 5, 5, 5)
    trainer = make(config=CONFIG.replace(execution=execution), accumulate=3)
    outputs = []
    for i, part in enumerate(parts, start=1):
        before = copy.deepcopy(trainer.model.state_dict())
        outputs.append(trainer.step(*part))
        stepped = any(
            not torch.equal(before[key], value) for key, value in trainer.model.state_dict().items()
        )
        assert stepped == (i % 3 == 0)
    assert trainer.gkt.next_step == 2
    assert outputs[0].subnets == outputs[2].subnets == trainer.gkt.sample(0)
    assert outputs[3].subnets == outputs[5].subnets == trainer.gkt.sample(1)
    assert_same_weights(trainer.model, plain_steps([joined(parts[:3]), joined(parts[3:])]))


class Stream(IterableDataset):
    """Batches whose number is not known before."""

    def __init__(self, parts: list) -> None:
        self.parts = parts

    def __iter__(self):
        return iter(self.parts)


@pytest.mark.parametrize("length_known", [True, False])
def test_an_epoch_that_ends_within_a_step_completes_it(length_known, tmp_path):
    parts = batches(4, 4, 4, 4, 3)
    loader = parts if length_known else DataLoader(Stream(parts), batch_size=None)
    trainer = make(accumulate=2)
    trainer.fit(loader, epochs=2, progress=False, output_dir=tmp_path)
    assert trainer.gkt.next_step == 6
    epoch = [joined(parts[:2]), joined(parts[2:4]), parts[4]]
    assert_same_weights(trainer.model, plain_steps([*epoch, *epoch]))


def test_the_state_in_the_middle_of_a_step_is_refused():
    trainer = make(accumulate=2)
    trainer.step(*batches(4)[0])
    with pytest.raises(RuntimeError, match="1 of 2 batches of a step are done"):
        trainer.state_dict()
    trainer.step(*batches(4)[0])
    trainer.state_dict()


def test_training_goes_on_after_a_step_that_was_broken_off(tmp_path):
    """An error between the batches of a step: its gradients are forgotten when the checkpoint is loaded."""
    parts = batches(4, 4, 4, 4)
    trainer = make(accumulate=2)
    trainer.fit(parts, epochs=1, output_dir=tmp_path, progress=False)

    def broken():
        yield from parts[:3]
        raise OSError("a cable")

    with pytest.raises(OSError, match="a cable"):
        trainer.fit(broken(), epochs=2, progress=False)
    assert trainer.optimization.batches == 1
    trainer.fit(parts, epochs=2, output_dir=tmp_path, progress=False)
    assert_same_weights(trainer.model, plain_steps([joined(parts[:2]), joined(parts[2:])] * 2))


def test_infinite_masks_are_no_broken_network(tmp_path):
    net = Net(PlainBlock)
    net.register_buffer("mask", torch.full((3,), -math.inf))
    make(net).fit(batches(4), epochs=1, output_dir=tmp_path, progress=False)
    assert (tmp_path / "last.pt").exists()


@pytest.mark.parametrize("clip", [0.05, 1e6])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_clipped_by_their_norm(clip, accumulate):
    parts = batches(4, 4, 4, 4)
    trainer = make(accumulate=accumulate, clip_grad_norm=clip)
    for part in parts:
        trainer.step(*part)
    wholes = [joined(parts[i : i + accumulate]) for i in range(0, 4, accumulate)]
    assert_same_weights(trainer.model, plain_steps(wholes, clip=clip))
    clipped, free = plain_steps(wholes, clip=0.05), plain_steps(wholes)
    assert not torch.allclose(clipped.head.weight, free.head.weight)


def test_clipping_sees_unscaled_gradients_under_float16():
    """The same step in float32, whose gradients are about those of float16."""
    weights = []
    for amp in (None, "fp16"):
        net = Net(PlainBlock).float()
        start = copy.deepcopy(net.state_dict())
        trainer = GKTTrainer(
            net, torch.optim.SGD(net.parameters(), 1.0), CONFIG, amp=amp, clip_grad_norm=0.01
        )
        images, targets = batches(8)[0]
        trainer.step(images.float(), targets)
        change = torch.cat([(value - start[key]).flatten() for key, value in net.state_dict().items()])
        weights.append(change)
    assert torch.allclose(weights[0].norm(), torch.tensor(0.01), rtol=1e-3)
    assert torch.allclose(weights[0], weights[1], rtol=0.05, atol=2e-4)


def test_averaged_weights_are_torchs():
    net = Net()
    reference_net = copy.deepcopy(net)
    trainer = make(net, ema_decay=0.7)
    reference = AveragedModel(reference_net, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=True)
    for part in batches(4, 4, 4, 4):
        trainer.step(*part)
        reference_net.load_state_dict(trainer.model.state_dict())
        reference.update_parameters(reference_net)
    for key, value in reference.module.state_dict().items():
        assert torch.equal(trainer.ema_model.state_dict()[key], value), key
    assert not torch.equal(trainer.ema_model.head.weight, trainer.model.head.weight)


def test_averaged_weights_follow_optimizer_steps_not_batches():
    parts = batches(4, 4, 4, 4)
    accumulated = make(accumulate=2, ema_decay=0.5)
    for part in parts:
        accumulated.step(*part)
    whole = make(ema_decay=0.5)
    for part in (joined(parts[:2]), joined(parts[2:])):
        whole.step(*part)
    assert_same_weights(accumulated.ema_model, whole.ema_model)


def test_averaged_weights_are_evaluated_kept_and_decide_which_is_best(tmp_path):
    parts = batches(6, 6, 6)

    def run(epochs: int, folder: str, **options) -> tuple[GKTTrainer, list[dict[str, float]]]:
        trainer = make(Net(), ema_decay=0.9, **options)
        history = trainer.fit(
            parts, epochs=epochs, val_loader=parts, output_dir=tmp_path / folder, progress=False
        )
        return trainer, history

    whole, history = run(4, "whole")
    assert history[0]["val_loss_ema"] != history[0]["val_loss"]
    last = history[-1]
    result = whole.evaluate(parts, ema=True)
    assert (result.accuracy, result.loss) == (last["val_accuracy_ema"], last["val_loss_ema"])
    assert whole.best_accuracy == max(row["val_accuracy_ema"] for row in history)
    run(2, "parts")
    resumed, _ = run(4, "parts")
    for key, value in whole.ema_model.state_dict().items():
        assert torch.equal(resumed.ema_model.state_dict()[key], value), key
    with pytest.raises(CheckpointError, match="was written with averaged weights; this trainer is without"):
        make(Net()).load_checkpoint(tmp_path / "whole" / "last.pt")
    with pytest.raises(ValueError, match="ema is True, but the trainer was made without ema_decay"):
        make(Net()).evaluate(parts, ema=True)


def test_kd_weight_follows_its_schedule():
    parts = batches(4, 4, 4, 4)
    trainer = make(config=CONFIG.replace(kd_weight=0.8), kd_schedule=LinearWarmup(3), accumulate=2)
    net = Net(PlainBlock)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for step, part in enumerate((joined(parts[:2]), joined(parts[2:]))):
        gkt = GKT(net, CONFIG.replace(kd_weight=0.8 * (step + 1) / 3))
        optimizer.zero_grad()
        gkt(*part, step=step).loss.backward()
        optimizer.step()
    for part in parts:
        trainer.step(*part)
    assert_same_weights(trainer.model, net)
    assert [LinearWarmup(3)(step) for step in range(5)] == [1 / 3, 2 / 3, 1.0, 1.0, 1.0]
    assert LinearWarmup(0)(0) == 1.0


class NoHostSynchronisation(TorchDispatchMode):
    """Fails where the host reads a value of a tensor.

    The op of the loss may: it reads the incoming gradient on the CPU, and only there.
    """

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen += 1
        reads = function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        if reads and not any(
            os.path.dirname(frame.filename) == LOSS_OP for frame in traceback.extract_stack()
        ):
            raise AssertionError(f"{function} waits for the device")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("execution", ["sequential", "shared", "stacked", "lean"])
def test_a_step_reads_no_value(execution, tmp_path):
    """All features at once; probabilities as targets, since class indices on the CPU are checked by reading them."""
    net = Net().float()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    trainer = GKTTrainer(
        net,
        optimizer,
        CONFIG.replace(execution=execution, label_smoothing=0.1),
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100),
        scheduler_interval="step",
        amp="bf16",
        channels_last=True,
        accumulate=2,
        clip_grad_norm=1.0,
        ema_decay=0.9,
        kd_schedule=LinearWarmup(10),
        skip_nonfinite=True,
    )
    images, targets = batches(4)[0]
    images = images.float()
    probabilities = F.one_hot(targets, CLASSES).float()
    for _ in range(2):  # the first step looks at the model
        trainer.step(images, probabilities)
    with NoHostSynchronisation() as mode:
        for step in range(4):
            output = trainer.step(images, probabilities)
            trainer.metrics.update(output, step)
    assert mode.seen > 100
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoHostSynchronisation():
        float(output.loss)


class Interrupt(Callback):
    """Ctrl-C at a batch of the run, counted from 1."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_step_end(self, trainer, output):
        self.batch -= 1
        if self.batch == 0:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("batch, done", [(2, 2), (8, 9), (10, 10)])
def test_everything_at_once_resumes_exactly_at_the_end_of_a_step(tmp_path, batch, done):
    """Epochs of 5 batches, two of them a step: interrupted within a step, training finishes it first."""
    parts = batches(4, 4, 4, 4, 3)
    parts[1] = poisoned(parts[1])

    def run(folder: str, seed: int = 0, **options) -> GKTTrainer:
        torch.manual_seed(seed)
        net = Net()
        net.head = nn.Sequential(nn.Dropout(0.2), net.head)
        optimizer = torch.optim.AdamW(net.parameters(), 0.01)
        trainer = GKTTrainer(
            net,
            optimizer,
            CONFIG.replace(execution="shared"),
            scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20),
            scheduler_interval="step",
            accumulate=2,
            clip_grad_norm=0.5,
            ema_decay=0.8,
            kd_schedule=LinearWarmup(8),
            skip_nonfinite=True,
        )
        trainer.fit(parts, epochs=3, output_dir=tmp_path / folder, progress=False, **options)
        return trainer

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("parts", callbacks=[Interrupt(batch)])
    state = load_checkpoint(tmp_path / "parts" / "last.pt")
    assert 5 * state["epoch"] + state["batches_done"] == done
    resumed = run("parts", seed=9)
    assert int(resumed.optimization.skipped) == int(whole.optimization.skipped) == 3
    for own, other in ((resumed.model, whole.model), (resumed.ema_model, whole.ema_model)):
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in own.state_dict().items())


def poisoned(part: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    images, targets = part
    images = images.clone()
    images[0, 0, 0, 0] = math.nan
    return images, targets


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("bad", [{0}, {1, 3}])
def test_skipped_steps_change_nothing(optimizer, bad):
    """BatchNorm's statistics and the optimizer's state included: the good steps alone lead to the same weights."""
    parts = batches(5, 5, 5, 5, 5)
    kinds = {
        "sgd": lambda net: torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=0.1),
        "adamw": lambda net: torch.optim.AdamW(net.parameters(), 0.01),
    }
    net, expected = Net(), Net()
    trainer = GKTTrainer(net, kinds[optimizer](net), CONFIG, skip_nonfinite=True)
    for i, part in enumerate(parts):
        trainer.step(*(poisoned(part) if i in bad else part))
    reference = GKT(expected, CONFIG)
    optimizer = kinds[optimizer](expected)
    for i, part in enumerate(parts):
        if i not in bad:
            optimizer.zero_grad()
            reference(*part, step=i).loss.backward()
            optimizer.step()
    assert int(trainer.optimization.skipped) == len(bad)
    assert_same_weights(net, expected, tolerance=1e-14)


@pytest.mark.parametrize("kind", ["loss", "overflow"])
def test_skipped_float16_steps_change_nothing(kind):
    """A NaN loss is counted; gradients that overflow are the loss scaling's business, which lowers the scale."""
    net = Net().float()
    trainer = GKTTrainer(
        net, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9), CONFIG, amp="fp16", skip_nonfinite=True
    )
    images, targets = batches(5)[0]
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": 8.0})
    trainer.step(images.float(), targets)
    before = copy.deepcopy(net.state_dict())
    if kind == "overflow":
        trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": 1e30})
        trainer.step(images.float(), targets)
        assert trainer.scaler.get_scale() < 1e30
    else:
        trainer.step(poisoned((images.float(), targets))[0], targets)
    assert int(trainer.optimization.skipped) == (kind == "loss")
    changed = {key for key, value in net.state_dict().items() if not torch.equal(before[key], value)}
    assert all("running" in key or "num_batches" in key for key in changed)
    assert bool(changed) == (kind == "overflow")


def test_skipped_steps_are_counted_logged_and_left_out_of_the_means(tmp_path, caplog):
    parts = batches(5, 5, 5, 5)
    parts[2] = poisoned(parts[2])
    trainer = make(Net(), skip_nonfinite=True)
    with caplog.at_level(logging.WARNING, "gkt_fast"):
        history = trainer.fit(parts, epochs=2, output_dir=tmp_path, progress=False, log_interval=1)
    assert [row["skipped_steps"] for row in history] == [1, 2]
    assert all(math.isfinite(row["train_loss"]) for row in history)
    assert caplog.messages[0] == (
        "1 steps skipped so far for NaN or infinite losses or gradients; the first loss of this epoch at step 2 "
        f"(epoch 1) in the full network, loop 1 group 1 ({trainer.gkt.sample(2)[0]}), "
        f"loop 1 group 2 ({trainer.gkt.sample(2)[1]})"
    )
    assert len(caplog.messages) == 2
    resumed = make(Net(), skip_nonfinite=True)
    resumed.load_checkpoint(tmp_path / "last.pt")
    assert int(resumed.optimization.skipped) == 2


def test_one_bad_batch_spoils_its_whole_step_only():
    parts = batches(4, 4, 4, 4)
    trainer = make(accumulate=2, skip_nonfinite=True)
    for part in (parts[0], poisoned(parts[1]), *parts[2:]):
        trainer.step(*part)
    expected = Net(PlainBlock)
    optimizer = torch.optim.SGD(expected.parameters(), 0.1, momentum=0.9)
    GKT(expected, CONFIG)(*joined(parts[2:]), step=1).loss.backward()
    optimizer.step()
    assert_same_weights(trainer.model, expected)


class BrokenGradient(torch.autograd.Function):
    """Passes its input on; its gradient is NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


class BrokenNet(Net):
    broken = False

    def forward(self, x):
        x = super().forward(x)
        return BrokenGradient.apply(x) if self.broken else x


def test_finite_losses_with_broken_gradients_are_skipped_or_stop_before_the_checkpoint(tmp_path):
    parts = batches(4, 4)
    trainer = make(BrokenNet(), skip_nonfinite=True, config=CONFIG.replace(execution="shared"))
    trainer.step(*parts[0])
    before = copy.deepcopy(trainer.model.state_dict())
    BrokenNet.broken = True
    try:
        assert math.isfinite(trainer.step(*parts[1]).loss)
        assert int(trainer.optimization.skipped) == 1
        assert all(torch.equal(before[key], value) for key, value in trainer.model.state_dict().items())
        stopping = make(BrokenNet(), config=CONFIG.replace(execution="shared"))
        with pytest.raises(
            NonFiniteLossError, match=r"the network is not finite after step 0 \(\d+ tensors, stem"
        ):
            stopping.fit(parts[:1], epochs=1, output_dir=tmp_path, progress=False)
    finally:
        BrokenNet.broken = False
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile looks at all attributes
def test_compiled_blocks_give_the_same_numbers():
    trainer, expected = make(compile_blocks=True), make()
    assert all(block._compiled_call_impl is not None for block in trainer.model.blocks)
    assert trainer.model.state_dict().keys() == expected.model.state_dict().keys()
    for part in batches(4, 4):
        trainer.step(*part)
        expected.step(*part)
    assert_same_weights(trainer.model, expected.model, 1e-10)


def test_compiled_blocks_with_batch_norm_are_shared_not_stacked():
    trainer = make(Net(), compile_blocks=True)
    choice = choice_of("auto", trainer.model, batches(1, 4)[0][:1])
    assert choice.mode == "shared"
    assert "'blocks.0' is compiled" in choice.reason


def test_deterministic_mode():
    was = torch.are_deterministic_algorithms_enabled()
    try:
        states = []
        for _ in range(2):
            trainer = make(Net(), deterministic=True)
            assert torch.are_deterministic_algorithms_enabled()
            for part in batches(4, 4):
                trainer.step(*part)
            states.append(trainer.model.state_dict())
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    finally:
        torch.use_deterministic_algorithms(was)


class Recorder(Callback):
    def __init__(self) -> None:
        self.events: list[object] = []

    def on_fit_start(self, trainer):
        self.events.append(("fit start", trainer.epoch))

    def on_epoch_start(self, trainer):
        self.events.append(("epoch start", trainer.epoch))

    def on_step_end(self, trainer, output):
        self.events.append(("step", trainer.gkt.next_step, tuple(output.logits.shape)))

    def on_epoch_end(self, trainer, metrics):
        self.events.append(("epoch end", trainer.epoch, "val_accuracy" in metrics))
        metrics["twice"] = 2.0 * trainer.epoch

    def on_checkpoint(self, trainer, path):
        self.events.append(("checkpoint", path.name, path.exists()))

    def on_fit_end(self, trainer):
        self.events.append("fit end")


def test_callbacks_hear_of_everything_in_order(tmp_path):
    parts, recorder = batches(4, 3), Recorder()
    history = make().fit(
        parts,
        epochs=2,
        val_loader=parts,
        output_dir=tmp_path,
        progress=False,
        callbacks=[recorder, Callback()],
    )
    epoch = [
        [
            ("epoch start", e),
            ("step", 2 * e + 1, (4, CLASSES)),
            ("step", 2 * e + 2, (3, CLASSES)),
            ("epoch end", e, True),
            ("checkpoint", "last.pt", True),
        ]
        for e in range(2)
    ]
    assert recorder.events == [("fit start", 0), *itertools.chain(*epoch), "fit end"]
    assert [row["twice"] for row in history] == [0.0, 2.0]
    assert "twice" in (tmp_path / "summary.csv").read_text()


def test_a_callback_may_end_training():
    class Stop(Callback):
        def on_step_end(self, trainer, output):
            raise StopIteration("enough")

    recorder = Recorder()
    with pytest.raises(StopIteration, match="enough"):
        make().fit(batches(4), epochs=1, progress=False, callbacks=[recorder, Stop()])
    assert recorder.events[-1] == "fit end"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"accumulate": 0}, ValueError, "accumulate is 0; it must be at least 1"),
        ({"accumulate": 1.5}, TypeError, "accumulate is 1.5; it must be an integer"),
        ({"clip_grad_norm": 0.0}, ValueError, "clip_grad_norm is 0.0; it must be a positive number or None"),
        ({"clip_grad_norm": math.nan}, ValueError, "clip_grad_norm is nan"),
        ({"ema_decay": 1.5}, ValueError, r"ema_decay is 1.5; it must be in \[0, 1\]"),
        ({"kd_schedule": 3}, TypeError, "kd_schedule is 3; it must be a function of the step, or None"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)
    with pytest.raises(ValueError, match="steps is -1; it must be at least 0"):
        LinearWarmup(-1)


def test_the_average_of_no_update_is_the_network():
    net = Net()
    average = WeightAverage(net, 0.5)
    state = average.state_dict()
    other = WeightAverage(net, 0.5)
    other.load_state_dict(state)
    with torch.no_grad():
        net.head.weight += 1
    average.update()
    other.update()
    assert torch.equal(average.model.head.weight, net.head.weight)
    assert torch.equal(other.model.head.weight, net.head.weight)


def test_mixed_targets_train():
    """Probability targets as mixup makes them, with label smoothing; a loader of a TensorDataset."""
    images, targets = batches(12)[0]
    mixed = F.one_hot(targets, CLASSES).double()
    mixed = 0.7 * mixed + 0.3 * mixed.roll(1, 0)
    trainer = make(config=CONFIG.replace(label_smoothing=0.1))
    history = trainer.fit(
        DataLoader(TensorDataset(images, mixed), 6), epochs=20, val_loader=[(images, targets)], progress=False
    )
    assert history[-1]["train_loss"] < history[0]["train_loss"]


def test_what_a_checkpoint_holds_stays_readable(tmp_path):
    """The names in the file; checkpoints of earlier versions are read by them."""
    trainer = make(Net(), ema_decay=0.5)
    trainer.fit(batches(4), epochs=1, output_dir=tmp_path, progress=False)
    saved = load_checkpoint(tmp_path / "last.pt")
    assert saved["format"] == 2
    assert saved.keys() == {
        "format", "model", "optimizer", "optimizer_class", "scheduler", "scaler", "ema", "gkt", "config",
        "best_accuracy", "skipped_steps", "metrics", "memory", "epoch", "batches_done", "samples_per_batch",
        "random_states", "epoch_random_states",
    }  # fmt: skip
    assert saved["metrics"].keys() == {"sums", "non_finite_step", "non_finite_streams"}
    assert saved["random_states"][0].keys() == {"python", "numpy", "torch", "cuda", "loader"}


def test_the_state_counts_steps_not_batches_and_callbacks_see_it():
    class Places(Callback):
        def __init__(self) -> None:
            self.seen: list[tuple[int, int, int]] = []

        def on_step_end(self, trainer, output):
            state = trainer.state
            self.seen.append((state.epoch, state.batches.done, state.step))

    places = Places()
    trainer = make(accumulate=2)
    assert trainer.state.step == 0
    trainer.fit(batches(4, 4, 4), epochs=2, progress=False, callbacks=[places])
    # Epochs of three batches are two steps; within a step, the next batch belongs to the same one.
    assert places.seen == [(0, 1, 0), (0, 2, 1), (0, 3, 2), (1, 1, 2), (1, 2, 3), (1, 3, 4)]
    assert trainer.state.step == trainer.gkt.next_step == 4


def test_a_state_that_a_callback_saves_after_a_step_goes_on_exactly(tmp_path):
    class Save(Callback):
        def on_step_end(self, trainer, output):
            if trainer.state.step == 3:
                save_checkpoint(tmp_path / "saved.pt", trainer.state_dict())

    parts = batches(4, 4, 4, 4)
    whole = make()
    whole.fit(parts, epochs=2, progress=False, callbacks=[Save()])
    resumed = make()
    history = resumed.fit(parts, epochs=2, resume=tmp_path / "saved.pt", progress=False)
    assert history[-1]["step"] == 8
    assert_same_weights(resumed.model, whole.model, 0.0)


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_replaced_scheduler_is_the_one_that_steps_and_is_saved(interval):
    trainer = make(scheduler_interval=interval)
    parts = batches(4, 4)
    trainer.fit(parts, epochs=1, progress=False)
    assert trainer.optimizer.param_groups[0]["lr"] == 0.1
    trainer.scheduler = torch.optim.lr_scheduler.ExponentialLR(trainer.optimizer, 0.5)
    trainer.fit(parts, epochs=2, progress=False)
    assert trainer.optimizer.param_groups[0]["lr"] == {"step": 0.025, "epoch": 0.05}[interval]
    assert trainer.state_dict()["scheduler"] == trainer.scheduler.state_dict()
    for name in (
        "optimizer",
        "optimization",
        "metrics",
        "best_accuracy",
        "amp",
    ):  # of the parts, which own them
        with pytest.raises(AttributeError):
            setattr(trainer, name, None)
