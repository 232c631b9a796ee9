"""`GKT`: a residual network trained together with its subnets (Tang et al., AAAI-24, arXiv 2308.13772)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .batch_norm.fusion import fuse_blocks
from .config import GKTConfig
from .execution import (
    EXECUTION_MODES,
    Choice,
    Network,
    StackingError,
    StepResult,
    Streams,
    choose_execution,
    run_plain,
)
from .network.compilation import reason_against_compiled_model
from .network.discovery import find_stages, stages_from_paths
from .network.interception import find_sites
from .network.noise import GeneratorWatch, noisy_layers
from .network.profile import count_layers, one_sample, same_form, zeros_for
from .subnets.budget import expected_cost, expected_sequential_cost, solve_min_depth
from .subnets.plan import Cost, Layer, make_plan
from .subnets.sampling import minimum_depths, sample_resolutions, sample_subnets
from .subnets.subnet import Subnet

__all__ = ["GKT", "GKTOutput"]

logger = logging.getLogger("gkt_fast")

_SHARED_NOISE = (
    "the model draws random numbers in training (dropout, stochastic depth): streams that share a state share them, "
    "where streams run one by one draw their own. GKTConfig(independent_noise=True) draws them for every stream, and "
    "shares states only up to the first such layer"
)


@dataclass(frozen=True)
class GKTOutput:
    """What a training step returns.

    Args:
        loss: scalar; `loss.backward()` delivers the gradients of all streams, in every execution mode.
        ce: scalar, detached: cross entropy of the full network; with `train_full=False` of the subnet.
        kd: (S - 1,), detached: distillation term of each subnet.
        logits: (B, C, *spatial), detached: logits of the network that `ce` is of.
        subnets: the subnets of this step, in the order of `kd`.
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor
    logits: Tensor
    subnets: list[Subnet]


class GKT(nn.Module):
    """Wraps a model for Group Knowledge based Training. The model itself, and its state_dict keys, stay as they are.

    Args:
        model: any torch network with runs of residual blocks; it returns logits (B, C, *spatial), or an object
            with `.logits`, or a dict with "logits" or "out".
        config: the hyper-parameters.
        stages: the stages, where they aren't found by themselves: for each the module path of its container, or the
            module paths of its blocks in order (see `stages_from_paths`).

    Raises:
        ValueError: the model has no residual blocks, or config doesn't fit its stages.
        TypeError: model is not an nn.Module, or config not a GKTConfig.
    """

    def __init__(
        self,
        model: nn.Module,
        config: GKTConfig | None = None,
        stages: Sequence[str | Sequence[str]] | None = None,
    ) -> None:
        super().__init__()
        config = GKTConfig() if config is None else config
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {type(model).__name__}; it must be a torch.nn.Module")
        if not isinstance(config, GKTConfig):
            raise TypeError(f"config is {type(config).__name__}; it must be a GKTConfig")
        self.model = model
        self.config = config
        self.stages = find_stages(model) if stages is None else stages_from_paths(model, stages)
        minimum_depths(self.stages, config)
        sample_subnets(self.stages, config, step=0)
        if config.fuse_blocks and config.groups:
            fuse_blocks(model)
        self.next_step = 0
        self._sites = find_sites(model, self.stages)
        self._writes_input: dict[str, bool] = {}
        self._returns: dict[str, int] = {}
        self._example: tuple[Any, ...] | None = None
        self._layers: list[Layer] | None = None
        self._within_budget: GKTConfig | None = None
        self._refused_stacking: str | None = None
        self._last_choice: Choice | None = None
        self._noisy: tuple[list[bool], frozenset[str]] | None = None
        self._looked_for_noise = config.independent_noise

    def sample(self, step: int) -> list[Subnet]:
        """The subnets of a step, S - 1 of them, in the order of their streams; the same in every process.

        Raises:
            ValueError: there is a budget, and the model has not been called yet (see `layers`).
        """
        return sample_subnets(self.stages, self.sampling_config(), step)

    def sampling_config(self) -> GKTConfig:
        """The configuration by which subnets are drawn: with a budget, min_depth as solved for it.

        Raises:
            ValueError: the budget can't be met, or the costs of the blocks are not known yet.
        """
        if self.config.budget is None:
            return self.config
        if self._within_budget is None:
            min_depth = solve_min_depth(self.stages, self.layers(), self.config)
            self._within_budget = self.config.replace(min_depth=min_depth, budget=None)
        return self._within_budget

    def forward(
        self,
        inputs: Tensor | tuple[Any, ...],
        targets: Tensor | None = None,
        step: int | None = None,
        loss_scale: float | Tensor | None = None,
        kd_weight: float | None = None,
    ) -> GKTOutput | Any:
        """Runs the full network and the step's subnets.

        Args:
            inputs: the model's input, or a tuple of its positional arguments; batch first.
            targets: class indices (B, *spatial) int64, or probabilities (B, C, *spatial). None: only the model's own
                forward, for evaluation; returns what the model returns.
            step: which subnets to draw. None: an internal counter that is saved with the state and goes up with each
                call in training mode.
            loss_scale: factor on losses that are differentiated inside the forward (modes `sequential` and `lean`),
                so that float16 gradients don't underflow; the gradients delivered are not scaled by it.
            kd_weight: weight of the distillation terms in this call; None: the configuration's.

        Raises:
            ValueError, TypeError: targets don't fit the logits (see `group_knowledge_loss`), step is not an
                integer, the model returns no logits, skips blocks by itself or is compiled as a whole.
        """
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        if targets is None:
            return self.model(*inputs)
        reason = reason_against_compiled_model(self.model)
        if reason is not None:
            raise ValueError(reason)
        if step is None:
            step = self.next_step
        self._remember(inputs)
        subnets = self.sample(step)
        noisy = self._noisy_layers() if self.config.independent_noise else None
        network = Network(self.model, self._sites, self._writes_input, self._returns, self.layers, noisy)
        config = self.config if kd_weight is None else self.config.replace(kd_weight=kd_weight)
        streams = Streams(self._dropped(subnets), config, tuple(sample_resolutions(config, step)))
        several = len(streams.dropped) > 1
        looks = self.training and several and not self._looked_for_noise
        watch = GeneratorWatch(self.model) if looks else None
        run = self._run if several else run_plain
        result = run(network, inputs, targets, streams, loss_scale)
        if watch is not None:
            self._looked_for_noise = True
            if watch.moved() and self._choice().mode != "sequential":
                logger.warning(_SHARED_NOISE)
        if self.training:
            self.next_step = step + 1
        return GKTOutput(result.loss, result.terms[0], result.terms[1:], result.logits, subnets)

    def _dropped(self, subnets: Sequence[Subnet]) -> tuple[frozenset[str], ...]:
        """The blocks that each stream of a step drops."""
        dropped = tuple(subnet.dropped(self.stages) for subnet in subnets)
        return (frozenset(), *dropped) if self.config.train_full else dropped

    def _run(
        self,
        network: Network,
        inputs: tuple[Any, ...],
        targets: Tensor,
        streams: Streams,
        loss_scale: float | Tensor | None,
    ) -> StepResult:
        """Runs the chosen mode; with `auto`, a model that turns out not to be stackable is run again as shared."""
        mode = self._choice().mode
        try:
            return EXECUTION_MODES[mode](network, inputs, targets, streams, loss_scale)
        except StackingError as error:
            if self.config.execution != "auto":
                raise
            self._refused_stacking = str(error)
        return EXECUTION_MODES[self._choice().mode](network, inputs, targets, streams, loss_scale)

    def _choice(self) -> Choice:
        resized = self.config.subnet_resolution is not None
        choice = choose_execution(self.config.execution, self.model, self._refused_stacking, resized=resized)
        if choice != self._last_choice and self.config.execution == "auto" and choice.mode != "stacked":
            logger.info("execution='auto' runs %r: %s", choice.mode, choice.reason)
        self._last_choice = choice
        return choice

    def explain(self, step: int = 0) -> str:
        """The plan of a step as text: subnets, states per layer, cost, activations kept for backward, chosen mode.

        Raises:
            ValueError: the model has not been called yet (see `layers`).
        """
        subnets = self.sample(step)
        plan = make_plan(self.layers(), self._dropped(subnets))
        cost, memory = plan.cost(), plan.memory()
        lines = [
            f"{type(self.model).__name__}, step {step}: {len(subnets)} subnets {', '.join(map(str, subnets))}"
        ]
        lines += [f"{'layer':40}{'states':>8}{'MFLOPs':>12}{'saved KiB':>12}"]
        for layer, states in zip(plan.layers, plan.states_per_layer(), strict=True):
            kibibytes = layer.saved_bytes / 1024
            lines.append(f"{layer.path:40}{states:8}{layer.flops / 1e6:12.2f}{kibibytes:12.1f}")
        lines.append(
            f"forward FLOPs per sample: plain {cost.plain:.4g}, one by one {cost.sequential_ratio:.2f} x, "
            f"shared {cost.shared_ratio:.2f} x (expected {self.expected_cost():.2f} x)"
        )
        if self.config.subnet_resolution is not None:
            lines.append("subnets are counted at the full resolution; on their smaller images they cost less")
        lines.append(
            f"predicted activations kept for backward, per sample: plain {memory.plain / 2**20:.2f} MiB, "
            f"shared and stacked {memory.shared / 2**20:.2f} MiB, lean {memory.lean / 2**20:.2f} MiB"
        )
        noisy = [layer.path for layer in plan.layers if layer.draws_noise]
        if noisy:
            lines.append(f"every stream draws noise of its own in {', '.join(noisy)}")
        choice = self._choice()
        lines.append(f"execution: {choice.mode} ({choice.reason})")
        return "\n".join(lines)

    def expected_cost(self, one_by_one: bool = False) -> float:
        """Expected cost of a step, in plain steps (gkt_fast.subnets.budget).

        Args:
            one_by_one: of streams run one by one, instead of a step that runs every state once.

        Raises:
            ValueError: the model has not been called yet (see `layers`).
        """
        estimate = expected_sequential_cost if one_by_one else expected_cost
        return estimate(self.stages, self.layers(), self.sampling_config())

    def cost(self, subnets: Sequence[Subnet], inputs: Tensor | tuple[Any, ...] | None = None) -> Cost:
        """Floating point operations of a step with these subnets: plain, one by one, shared.

        Counted by torch's FLOP counter (a multiply-add is two) in one forward pass of the model on one sample. Subnets
        whose images are resized (`subnet_resolution`) are counted at the full resolution.

        Args:
            subnets: as returned by `sample`.
            inputs: an example of the model's input. None: the shape of the last call's.

        Raises:
            ValueError: inputs is None and the model has not been called yet.
        """
        return make_plan(self.layers(inputs), self._dropped(subnets)).cost()

    def layers(self, inputs: Tensor | tuple[Any, ...] | None = None) -> list[Layer]:
        """The blocks and the modules between them, in order of execution, with their cost (see `cost`)."""
        if inputs is not None:
            self._remember(inputs if isinstance(inputs, tuple) else (inputs,))
        if self._example is None:
            raise ValueError(
                "inputs is None and the model has not been called yet; pass an example of its input"
            )
        if self._layers is None:
            self._layers = count_layers(self.model, self._sites, self._example)
        if not self.config.independent_noise:
            return self._layers
        noisy = self._noisy_layers()
        return [replace(layer, draws_noise=layer.path in noisy) for layer in self._layers]

    def _noisy_layers(self) -> frozenset[str]:
        """The layers that draw random numbers; looked for again when a layer went into training or evaluation mode."""
        modes = [module.training for module in self.model.modules()] if self.model.training else []
        if self._noisy is None or self._noisy[0] != modes:
            inputs = zeros_for(self.model, self._example)
            self._noisy = modes, noisy_layers(self.model, self._sites, inputs)
        return self._noisy[1]

    def _remember(self, inputs: tuple[Any, ...]) -> None:
        """Keeps the form of one sample, without its values; another form is counted anew."""
        example = one_sample(inputs)
        if self._example is None or not same_form(example, self._example):
            self._example, self._layers, self._noisy = example, None, None

    def get_extra_state(self) -> Tensor:
        """The step counter and what was learnt of the model; in this module's state_dict, not in the model's.

        An int64 tensor whose shape never changes, since safetensors and averaged weights want tensors in a state_dict:
        the counter, min_depth of every stage as solved for the budget, then for every block and module between whether
        it writes into its input and how many values it returns; -1 where that isn't known.
        """
        solved = None if self._within_budget is None else self._within_budget.min_depth
        paths = [site.path for site in self._sites]
        values = [self.next_step, *(solved or [-1] * len(self.stages))]
        values += [int(self._writes_input.get(path, -1)) for path in paths]
        values += [self._returns.get(path, -1) for path in paths]
        return torch.tensor(values)

    def set_extra_state(self, state: Tensor) -> None:
        """The inverse of `get_extra_state`."""
        paths = [site.path for site in self._sites]
        counter, min_depth, writes, returns = state.cpu().split([1, len(self.stages), len(paths), len(paths)])
        self.next_step = int(counter)
        if self.config.budget is not None and min_depth.min() >= 0:
            self._within_budget = self.config.replace(min_depth=tuple(min_depth.tolist()), budget=None)
        self._writes_input = {p: bool(v) for p, v in zip(paths, writes.tolist(), strict=True) if v >= 0}
        self._returns = {p: v for p, v in zip(paths, returns.tolist(), strict=True) if v >= 0}

    def extra_repr(self) -> str:
        depths = "-".join(str(stage.depth) for stage in self.stages)
        return f"depths={depths}, groups={self.config.groups}, loops={self.config.loops}, sampler={self.config.sampler}"
