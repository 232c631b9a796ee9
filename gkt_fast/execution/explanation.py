"""A step in words: its subnets, what each layer costs, and the mode that runs it."""

from __future__ import annotations

from collections.abc import Sequence

from ..network.network import Network
from ..subnets.plan import Plan, make_plan
from ..subnets.streams import Streams
from ..subnets.subnet import Subnet
from .choice import Choice
from .memory import GroupKnowledgeMemory

__all__ = ["explain_step"]


def explain_step(
    network: Network,
    streams: Streams,
    subnets: Sequence[Subnet],
    step: int,
    expected_cost: float,
    choice: Choice,
    memory: GroupKnowledgeMemory | None = None,
) -> str:
    """A step as text: subnets, states per layer, cost, activations kept for backward, the mode that runs it and why.

    Args:
        network: the network, with the form of its inputs known.
        streams: the step's streams.
        subnets: the subnets that they run.
        step: number of the step.
        expected_cost: of a step with this configuration on average, in plain steps.
        choice: how the step runs.
        memory: what outlives the step; None: nothing, or nothing was attached yet.
    """
    config = streams.config
    plan = make_plan(network.layers(config.independent_noise), streams.dropped, config.subnet_share)
    place = (
        f" (group {streams.first_group} of {config.groups})" if config.chain == "steps" and subnets else ""
    )
    counted = f"{len(subnets)} subnet{'' if len(subnets) == 1 else 's'}"
    lines = [
        f"{type(network.model).__name__}, step {step}: {counted} {', '.join(map(str, subnets))}{place}",
        *_layer_lines(plan),
        *_cost_lines(plan, streams, expected_cost),
        *_knowledge_lines(streams, memory),
        f"execution: {choice.mode} ({choice.reason})",
    ]
    return "\n".join(lines)


def _knowledge_lines(streams: Streams, memory: GroupKnowledgeMemory | None) -> list[str]:
    if streams.config.knowledge == "batch":
        return []
    return [
        memory.describe(streams) if memory else "knowledge by sample: no memory is attached yet (GKT.memory)"
    ]


def _layer_lines(plan: Plan) -> list[str]:
    lines = [f"{'layer':40}{'states':>8}{'MFLOPs':>12}{'saved KiB':>12}"]
    for layer, states in zip(plan.layers, plan.states_per_layer(), strict=True):
        kibibytes = layer.saved_bytes / 1024
        lines.append(f"{layer.path:40}{states:8}{layer.flops / 1e6:12.2f}{kibibytes:12.1f}")
    return lines


def _cost_lines(plan: Plan, streams: Streams, expected_cost: float) -> list[str]:
    cost, memory = plan.cost(), plan.memory()
    lines = [
        f"forward FLOPs per sample: plain {cost.plain:.4g}, one by one {cost.sequential_ratio:.2f} x, "
        f"shared {cost.shared_ratio:.2f} x (expected {expected_cost:.2f} x)"
    ]
    if streams.config.subnet_resolution is not None:
        lines.append("subnets are counted at the full resolution; on their smaller images they cost less")
    lines.append(
        f"predicted activations kept for backward, per sample: plain {memory.plain / 2**20:.2f} MiB, "
        f"shared and stacked {memory.shared / 2**20:.2f} MiB, lean {memory.lean / 2**20:.2f} MiB"
    )
    if plan.share != 1:
        lines.append(
            f"subnets see {plan.share:g} of a batch's rows; what they have in common with the full network has all"
        )
    noisy = [layer.path for layer in plan.layers if layer.draws_noise]
    if noisy:
        lines.append(f"every stream draws noise of its own in {', '.join(noisy)}")
    return lines
