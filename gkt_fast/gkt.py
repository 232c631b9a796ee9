"""`GKT`: a residual network trained together with its subnets (Tang et al., AAAI-24, arXiv 2308.13772)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from .batch_norm.fusion import fuse_blocks
from .config import GKTConfig
from .execution import Choice, GroupKnowledgeMemory, check_remembered, choose_execution, explain_step
from .network.discovery import Stages, as_stages
from .network.inputs import call_model, map_tensors, model_inputs, rows_in
from .network.network import Network
from .network.wrappers import check_called_as_written, check_not_compiled, check_not_wrapped
from .ops import Past, wrong_class_index
from .subnets.budget import expected_cost, expected_sequential_cost, solve_min_depth
from .subnets.plan import Cost, Layer, make_plan
from .subnets.sampling import check_sampling, sample_resolutions, sample_subnets
from .subnets.streams import Streams, first_group, make_streams
from .subnets.subnet import Stage, Subnet

__all__ = ["GKT", "GKTOutput"]


@dataclass(frozen=True)
class GKTOutput:
    """What a training step returns.

    Args:
        loss: scalar; `loss.backward()` delivers the gradients of all streams, in every execution mode.
        ce: scalar, detached, the full network's loss on the targets, without the distillation that `loss` holds:
            cross entropy, or the value of the criterion; with `train_full=False` of the subnet.
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
    """Wraps a model for Group Knowledge based Training (Tang et al., AAAI-24, arXiv 2308.13772).

    The model itself, and its state_dict keys, stay as they are.

    Args:
        model: any torch network with runs of residual blocks; it returns logits (B, C, *spatial), or an object
            with `.logits`, or a dict with "logits" or "out".
        config: the hyper-parameters; None: the defaults.
        stages: the stages, where they aren't found automatically: for each the module path of its container, or the
            module paths of its blocks in order (see `stages_from_paths`); or those of another `GKT`.
        criterion: the loss of logits on targets, where that is not cross entropy: (logits (B, C, *spatial), targets)
            -> scalar, the mean over the batch. The targets are then whatever it takes. `ce_weight` weighs it for the
            full network, `subnet_ce_weight` for the subnets. A module without parameters, or any function.

    Raises:
        ValueError: the model has no residual blocks, or lazy modules without weights yet, config doesn't fit its
            stages, or there is a criterion and config sets options of cross entropy, or the criterion has parameters.
        TypeError: model is not an nn.Module, config not a GKTConfig, or criterion not callable.
    """

    def __init__(
        self,
        model: nn.Module,
        config: GKTConfig | None = None,
        stages: Stages | None = None,
        *,
        criterion: Callable[[Tensor, Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        config = GKTConfig() if config is None else config
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {type(model).__name__}; it must be a torch.nn.Module")
        if not isinstance(config, GKTConfig):
            raise TypeError(f"config is {type(config).__name__}; it must be a GKTConfig")
        if criterion is not None:
            _check_criterion(criterion, config)
        check_not_wrapped(model)
        _check_initialized(model)
        stages = as_stages(model, stages)
        check_sampling(stages, config)
        if config.fuse_blocks and config.groups:
            fuse_blocks(model)
        self.model = model
        self.config = config
        self.criterion = criterion
        self.next_step = 0
        self._network = Network(model, stages)
        self._within_budget: GKTConfig | None = None
        self._memory: GroupKnowledgeMemory | None = None

    @property
    def memory(self) -> GroupKnowledgeMemory | None:
        """What groups know of every training sample, with knowledge="dataset"; attach it before the first step.

        It isn't part of the state_dict. Setting it raises ValueError where it doesn't fit the configuration.
        """
        return self._memory

    @memory.setter
    def memory(self, memory: GroupKnowledgeMemory | None) -> None:
        if memory is not None:
            if not isinstance(memory, GroupKnowledgeMemory):
                raise TypeError(f"memory is {type(memory).__name__}; it must be a GroupKnowledgeMemory")
            if self.config.knowledge != "dataset":
                raise ValueError(
                    f"memory is given and knowledge is {self.config.knowledge!r}; it must be 'dataset'"
                )
            if memory.groups != self.config.groups:
                raise ValueError(
                    f"memory has groups={memory.groups}; the configuration has {self.config.groups}"
                )
        self._memory = memory

    @property
    def network(self) -> Network:
        """What is known of the model."""
        if self._network.model is not self.model:  # a replica, or exchanged by hand
            self._network = self._network.of(self.model)
        return self._network

    @property
    def stages(self) -> list[Stage]:
        """The model's stages."""
        return self._network.stages

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
        inputs: Tensor | Sequence[Any] | Mapping[str, Any],
        targets: Tensor | None = None,
        step: int | None = None,
        loss_scale: float | Tensor | None = None,
        kd_weight: float | None = None,
        indices: Tensor | None = None,
    ) -> GKTOutput | Any:
        """Runs the full network and the step's subnets.

        Args:
            inputs: the model's input, or a tuple or list of its positional arguments, or a mapping of its keyword
                arguments (see `gkt_fast.network.inputs.model_inputs`, which also says when a mapping is passed as
                one argument); batch first.
            targets: class indices (B, *spatial) int64, or probabilities (B, C, *spatial); with a criterion, what that
                takes. None: only the model's own forward, for evaluation; returns what the model returns.
            step: which subnets to draw. None: an internal counter that is saved with the state and goes up with each
                call in training mode.
            loss_scale: factor on losses that are differentiated inside the forward (modes `sequential` and `lean`),
                so that float16 gradients don't underflow; the gradients delivered are not scaled by it.
            kd_weight: weight of the distillation terms in this call; None: the configuration's.
            indices: (B,) int64, the samples' places in the data set, for knowledge="dataset" (see
                `GroupKnowledgeMemory`). In evaluation mode the memory is only read, and may be left out.

        Raises:
            ValueError, TypeError: targets don't fit the logits (see `group_knowledge_loss`), step is not an
                integer, the batch has no rows, indices don't fit, the model returns no logits, skips blocks by itself
                or is compiled as a whole, or this is compiled or a copy made by DataParallel.
        """
        check_called_as_written(self)
        inputs = model_inputs(self.model, inputs)
        if targets is None:
            return call_model(self.model, inputs)
        check_not_compiled(self.model, self.stages)
        if rows_in(inputs) == 0:
            raise ValueError(
                "the batch has no rows; leave it out. (Where other processes have rows, all must leave the step out: "
                "drop_last=True, or a sampler that gives each as many batches.)"
            )
        step = self.next_step if step is None else step
        if torch.is_inference_mode_enabled():  # tensors without version counters can't be shared safely
            with torch.inference_mode(False), torch.no_grad():
                inputs, targets = map_tensors(torch.clone, (inputs, targets))
                output = self._run_step(inputs, targets, step, loss_scale, kd_weight, indices)
        else:
            output = self._run_step(inputs, targets, step, loss_scale, kd_weight, indices)
        if self.training:
            self.next_step = step + 1
        return output

    def _run_step(
        self,
        inputs: tuple[Any, ...],
        targets: Tensor,
        step: int,
        loss_scale: float | Tensor | None,
        kd_weight: float | None,
        indices: Tensor | None,
    ) -> GKTOutput:
        network = self.network
        with network.seeing(inputs):
            subnets = self.sample(step)
            streams = self._streams(subnets, step, kd_weight)
            streams = replace(streams, past=self._past(streams, inputs, targets, indices))
            result = choose_execution(network, streams).run(network, inputs, targets, streams, loss_scale)
        _check_classes(result.logits, streams)
        if streams.past is not None and self.training:
            self.memory.write(indices, result.learnt)
        return GKTOutput(result.loss, result.terms[0], result.terms[1:], result.logits, subnets)

    def _past(
        self, streams: Streams, inputs: tuple[Any, ...], targets: Any, indices: Tensor | None
    ) -> Mapping[int, Past | None] | None:
        """What groups know of the batch's samples; None: knowledge doesn't outlive the step."""
        config, memory = self.config, self.memory
        if config.knowledge == "batch":
            if indices is not None:
                self.network.tell_once(
                    "indices are given and knowledge is 'batch', which makes no use of them", logging.WARNING
                )
            return None
        rows, training = rows_in(inputs), self.training
        check_remembered(memory, indices, targets, rows=rows, groups=config.groups, training=training)
        return {} if memory is None or indices is None else memory.read(indices, streams)

    def _streams(self, subnets: Sequence[Subnet], step: int, kd_weight: float | None = None) -> Streams:
        config = self.config if kd_weight is None else self.config.replace(kd_weight=kd_weight)
        resolutions = sample_resolutions(config, step)
        group = first_group(config, step)
        return make_streams(subnets, self.stages, config, resolutions, self.criterion, group)

    def explain(self, step: int = 0) -> str:
        """A step as text: subnets, states per layer, cost, activations kept for backward, the mode that runs and why.

        Raises:
            ValueError: the model has not been called yet (see `layers`).
        """
        subnets = self.sample(step)
        streams = self._streams(subnets, step)
        self.layers()
        choice = self._choice(step)
        return explain_step(self.network, streams, subnets, step, self.expected_cost(), choice, self.memory)

    def _choice(self, step: int = 0) -> Choice:
        """How a step runs: the mode, the reason, and what runs it."""
        return choose_execution(self.network, self._streams(self.sample(step), step))

    def expected_cost(self, one_by_one: bool = False) -> float:
        """Expected cost of a step, in plain steps (gkt_fast.subnets.budget).

        Args:
            one_by_one: of streams that run one by one, instead of a step that runs every state once.

        Raises:
            ValueError: the model has not been called yet (see `layers`).
        """
        estimate = expected_sequential_cost if one_by_one else expected_cost
        return estimate(self.stages, self.layers(), self.sampling_config())

    def wrong_class_index(self) -> str | None:
        """What was wrong with class indices on the model's device, told once; None: nothing. Waits for the device.

        There they make the loss NaN; on the CPU they are a ValueError.
        """
        return wrong_class_index(next(self.model.parameters()).device)

    def cost(self, subnets: Sequence[Subnet], inputs: Tensor | tuple[Any, ...] | None = None) -> Cost:
        """Floating point operations of a step with these subnets: plain, one by one, shared.

        Counted by torch's FLOP counter (a multiply-add is two) in one forward pass of the model on one sample. What
        subnets alone run counts by their share of the batch's rows (`subnet_share`). Subnets whose images are resized
        (`subnet_resolution`) are counted at the full resolution.

        Args:
            subnets: as returned by `sample`.
            inputs: an example of the model's input. None: the shape of the last call's.

        Raises:
            ValueError: inputs is None and the model has not been called yet.
        """
        dropped = self._streams(subnets, step=0).dropped
        return make_plan(self.layers(inputs), dropped, self.config.subnet_share).cost()

    def layers(self, inputs: Tensor | tuple[Any, ...] | None = None) -> list[Layer]:
        """The blocks and the modules between them, in order of execution, with their cost (see `cost`)."""
        network = self.network
        with nullcontext() if inputs is None else network.seeing(model_inputs(self.model, inputs)):
            return network.layers(self.config.independent_noise)

    def get_extra_state(self) -> Tensor:
        """The step counter and what was learnt of the model; in this module's state_dict, not in the model's.

        An int64 tensor whose shape never changes, since safetensors and averaged weights want tensors in a state_dict:
        the counter, min_depth of every stage as solved for the budget, then for every block and module between whether
        it writes into its input and how many values it returns; -1 where that isn't known.
        """
        solved = None if self._within_budget is None else self._within_budget.min_depth
        return torch.tensor([self.next_step, *(solved or [-1] * len(self.stages)), *self._network.state()])

    def set_extra_state(self, state: Tensor) -> None:
        """The inverse of `get_extra_state`."""
        counter, *values = state.tolist()
        min_depth, learnt = values[: len(self.stages)], values[len(self.stages) :]
        self._network.load_state(learnt)
        self.next_step = counter
        if self.config.budget is not None and min(min_depth) >= 0:
            self._within_budget = self.config.replace(min_depth=tuple(min_depth), budget=None)

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        super().__setstate__({"criterion": None, "_memory": None} | _since_0_2(state))

    def extra_repr(self) -> str:
        depths = "-".join(str(stage.depth) for stage in self.stages)
        return f"depths={depths}, groups={self.config.groups}, loops={self.config.loops}, sampler={self.config.sampler}"


def _check_initialized(model: nn.Module) -> None:
    lazy = [
        path
        for path, module in model.named_modules()
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()
    ]
    if lazy:
        raise ValueError(
            f"model has lazy modules that have no weights yet ({', '.join(map(repr, lazy[:5]))}"
            f"{', ...' if len(lazy) > 5 else ''}); run its forward once on an example of its input, and make the "
            "optimizer, before GKT takes it"
        )


def _check_criterion(criterion: Any, config: GKTConfig) -> None:
    if not callable(criterion):
        raise TypeError(f"criterion is {criterion!r}; it must be a function of logits and targets, or None")
    for field in ("label_smoothing", "ignore_index", "distill_ignored"):
        value, default = getattr(config, field), getattr(GKTConfig, field)
        if value != default:
            raise ValueError(
                f"{field} is {value} and there is a criterion; it is an option of cross entropy, so that the criterion "
                f"must see to it, and the configuration leave it at {default}"
            )
    if isinstance(criterion, nn.Module) and any(True for _ in criterion.parameters()):
        raise ValueError(
            f"criterion is {type(criterion).__name__}, which has parameters; put them into the model, and give GKT a "
            "criterion without any"
        )


def _check_classes(logits: Tensor, streams: Streams) -> None:
    """Checks that there is something to choose from.

    Raises:
        ValueError: there is a single class, and cross entropy or a softmax over it.
    """
    sigmoids_alone = streams.criterion is not None and streams.config.distillation == "sigmoid"
    if logits.shape[1] == 1 and not sigmoids_alone:
        raise ValueError(
            f"logits have 1 class, shape {tuple(logits.shape)}; cross entropy and distillation need at least 2, since "
            "the softmax over one is always 1. Let the model return 2 logits for two classes, or train one logit with "
            "criterion=torch.nn.BCEWithLogitsLoss() and distillation='sigmoid'"
        )


def _since_0_2(state: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a pickled `GKT`; in 0.1 it held by itself what `Network` holds now."""
    if "_network" in state:
        return dict(state)
    network = Network(state["_modules"]["model"], state["stages"])
    network.writes_input, network.returns = state["_writes_input"], state["_returns"]
    found_anew = {
        "stages", "_sites", "_writes_input", "_returns", "_example", "_layers", "_refused_stacking", "_last_choice",
        "_noisy", "_looked_for_noise",
    }  # fmt: skip
    return {name: value for name, value in state.items() if name not in found_anew} | {"_network": network}
