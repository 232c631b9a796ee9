"""One network that runs at several depths: weights are shared, statistics are those of each depth."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..batch_norm.fusion import unfuse_blocks
from ..network.batch import inputs_of
from ..network.discovery import Stages, as_stages
from ..network.inputs import map_tensors, model_inputs
from ..network.interception import find_sites
from ..network.profile import count_layers, one_sample
from ..subnets.plan import Layer
from ..subnets.subnet import Stage, Subnet
from . import elastic_file
from .calibration import calibrate_together
from .running_buffers import has_running_buffers, updated_elsewhere
from .shared_weights import LightSubnet, light_subnets, part_name
from .subnet_choice import nested_subnets

logger = logging.getLogger("gkt_fast")

__all__ = ["ElasticNetwork", "load_elastic", "make_elastic", "share_weights"]


class ElasticNetwork(nn.Module):
    """A network at several depths. Made by `make_elastic`, or by `load_elastic` from a file.

    `elastic(x)` runs at `elastic.depths`, `elastic(x, depths=(1, 1, 1))` at those; the output is what the network
    itself returns. Switching copies nothing, and calls from several threads at once are safe in evaluation mode: a
    thread that wants its own depth passes `depths`, since the attribute is one for all.

    Every depth is a module of the network's class, `elastic.at(depths)`, over the same parameters. BatchNorm's running
    statistics belong to a *state*: depths that have executed the same blocks before a layer share its statistics.
    `state_dict` holds every weight once, as "weights.<key in the network>", and every state's statistics once, as
    "statistics.<depths>.<key in the network>" under the first depths that reach it.

    Args:
        parts: the depths' modules (`light_subnets`).
        stages: the whole network's stages.
        layers: its layers in order of execution; empty where they weren't looked at, for want of an example.
        running: paths of modules, no norms, whose buffers belong to a state.
        sample: shape of one input, without the batch; None: not known.
        metadata: plain values that `save` writes and `load_elastic` reads back.
    """

    def __init__(
        self,
        parts: Sequence[LightSubnet],
        stages: Sequence[Stage],
        layers: Sequence[Layer] = (),
        running: frozenset[str] = frozenset(),
        sample: tuple[int, ...] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.stages = tuple(stages)
        self.layers = tuple(layers)
        self.running = running
        self.sample = sample
        self.subnets = tuple(part.subnet for part in parts)
        self.metadata: dict[str, Any] = dict(metadata or {})
        self.networks = nn.ModuleDict({part_name(part.subnet): part.network for part in parts})
        self._paths = {part_name(part.subnet): part.names for part in parts}
        self._generation = 0
        self._names = {key: part_name(s) for s in self.subnets for key in _spellings(s)}
        self._keys = elastic_file.clear_keys(parts, running)
        self._by_name = {part_name(subnet): subnet for subnet in self.subnets}
        self._current = part_name(max(self.subnets, key=lambda subnet: sum(subnet.depths)))
        self.register_state_dict_post_hook(elastic_file.to_clear_keys)
        self.register_load_state_dict_pre_hook(elastic_file.from_clear_keys)
        self.register_load_state_dict_post_hook(elastic_file.report_clear_keys)

    @property
    def depths(self) -> tuple[int, ...] | Subnet:
        """The depths at which `elastic(x)` runs, at first the deepest; a `Subnet` where they aren't ordered."""
        current = self._by_name[self._current]
        return current.depths if current.is_ordered else current

    @depths.setter
    def depths(self, depths: Subnet | Sequence[int]) -> None:
        self._current = self._name_of(depths)

    def at(self, depths: Subnet | Sequence[int] | None = None) -> nn.Module:
        """The module of these depths, of the network's own class; shares weights and statistics with this one.

        Raises:
            ValueError: they aren't among `subnets`, whose statistics are known.
        """
        return self.networks[self._current if depths is None else self._name_of(depths)]

    def subnet(self, depths: Subnet | Sequence[int]) -> Subnet:
        """The entry of `subnets` of these depths.

        Raises:
            ValueError: there is none.
        """
        return self._by_name[self._name_of(depths)]

    def names(self, depths: Subnet | Sequence[int]) -> dict[str, str]:
        """For every module path of `at(depths)` the path in the whole network, where a gap may have been closed."""
        return self._paths[self._name_of(depths)]

    @property
    def generation(self) -> int:
        """How often tensors were moved, converted or loaded: what holds on to modules of this one looks at it."""
        return self._generation

    def forward(self, *inputs: Any, depths: Subnet | Sequence[int] | None = None, **options: Any) -> Any:
        """What the network returns at these depths; None: at `self.depths`.

        Raises:
            ValueError: the depths aren't among `subnets`.
        """
        name = self._current if depths is None else self._name_of(depths)
        return self.networks[name](*inputs, **options)

    def _name_of(self, depths: Subnet | Sequence[int]) -> str:
        key = tuple(depths) if isinstance(depths, list) else depths
        try:
            name = self._names.get(key)
        except TypeError:  # not hashable
            name = None
        if name is None:
            known = ", ".join(map(str, self.subnets))
            raise ValueError(
                f"depths is {str(depths) if isinstance(depths, Subnet) else depths!r}; this network was made for "
                f"{known}. Other depths have no statistics: name them in make_elastic(model, depths=[...])"
            )
        return name

    def calibrate(self, loader: Iterable[Any], num_samples: int = 2000) -> int:
        """Estimates the statistics of all states anew, all on the same batches, for example after fine-tuning.

        Args:
            loader: as of `recalibrate_batch_norm`.
            num_samples: how many samples to use; fewer when the loader ends before.

        Returns:
            The number of samples used; 0 where there is no BatchNorm.

        Raises:
            ValueError: the loader gave no sample, or num_samples is not positive.
        """
        if not has_running_buffers(self):
            return 0
        return calibrate_together(list(self.networks.values()), loader, num_samples)

    def compile(self, *args: Any, **options: Any) -> None:
        """Compiles every depth by itself, in place (`torch.nn.Module.compile`): a graph for each, no switching cost.

        torch gives up on a function after `torch._dynamo.config.recompile_limit` graphs, and the depths are one
        function: the limit is raised to 8 graphs for each depth where it is lower.
        """
        import torch._dynamo

        limit = 8 * len(self.subnets)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
        for network in self.networks.values():
            network.compile(*args, **options)

    def save(self, path: str | Path) -> None:
        """Writes weights, statistics, depths and metadata as one file, which `load_elastic` reads without running code.

        Raises:
            OSError: it can't be written; a file that was there stays.
            ValueError: the metadata holds something else than plain values.
        """
        content = {
            "network": type(self.at()).__name__,
            "stages": [[list(stage.blocks), list(stage.droppable)] for stage in self.stages],
            "subnets": [[list(row) for row in subnet.keep] for subnet in self.subnets],
            "layers": [asdict(layer) for layer in self.layers],
            "running": sorted(self.running),
            "sample": None if self.sample is None else list(self.sample),
            "metadata": self.metadata,
            "state": self.state_dict(),
        }
        elastic_file.write(path, content)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As of any module. What the depths share stays shared, also with `assign`."""
        with self._kept_shared():
            return super().load_state_dict(state_dict, strict, assign)

    def _apply(self, fn: Any, recurse: bool = True) -> ElasticNetwork:
        with self._kept_shared():
            return super()._apply(fn, recurse)

    @contextmanager
    def _kept_shared(self) -> Iterator[None]:
        """Places that hold one tensor before hold one tensor afterwards, where torch puts another one into each."""
        places: dict[int, list[tuple[dict, str]]] = {}
        for module in self.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        places.setdefault(id(tensor), []).append((tensors, name))
        try:
            yield
        finally:
            self._generation += 1
            for (first, name), *others in places.values():
                for tensors, other in others:
                    tensors[other] = first[name]


def make_elastic(
    model: nn.Module,
    depths: Iterable[Subnet | Sequence[int]] | None = None,
    *,
    calibration_loader: Iterable[Any] | None = None,
    calibration_samples: int = 2000,
    stages: Stages | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> ElasticNetwork:
    """A copy of a trained network that runs at each of these depths. The model is left as it was.

    All depths are calibrated on the same batches: each is what `extract_subnet` and `recalibrate_batch_norm` make of
    the model, up to rounding. It is in evaluation mode.

    Args:
        model: the trained network.
        depths: those wanted, ordered or as `Subnet`s; None: a nested chain of at most five, the full network included.
        calibration_loader: batches of training images as of `recalibrate_batch_norm`. A network without BatchNorm
            needs none, and doesn't look at it.
        calibration_samples: how many of its samples to use.
        stages: the model's stages, or their module paths; None: found automatically.
        metadata: plain values to keep with it (see `save`).

    Raises:
        ValueError, TypeError: depths don't fit the model, are given twice or are none; the model has running
            statistics and no calibration_loader was given, or the loader gave no sample.
    """
    found = as_stages(model, stages)
    subnets = _distinct(depths, found)
    layers, running, sample = [], frozenset(), None
    batches = calibration_loader
    if batches is not None:
        remaining = iter(batches)
        first = next(remaining, None)
        if first is None:
            raise ValueError("calibration_loader gave no sample")
        batches, inputs = itertools.chain([first], remaining), model_inputs(model, inputs_of(first))
        sample = tuple(inputs[0].shape[1:]) if isinstance(inputs[0], Tensor) else None
        layers = count_layers(model, find_sites(model, found), one_sample(inputs))
    if has_running_buffers(model):
        if batches is None:
            raise ValueError(
                f"calibration_loader is None, but {type(model).__name__} has BatchNorm, whose statistics differ from "
                "depth to depth: give a loader of training images to estimate them on"
            )
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        running = updated_elsewhere(model, map_tensors(lambda tensor: tensor.to(device), inputs))
    elif batches is not None:
        logger.info("%s has no BatchNorm: its depths need no calibration", type(model).__name__)
    parts = light_subnets(_own_copy(model), found, subnets, layers, running)
    elastic = ElasticNetwork(parts, found, layers, running, sample, metadata).eval()
    if batches is not None:
        elastic.calibrate(batches, calibration_samples)
    return elastic


def load_elastic(path: str | Path, model: nn.Module) -> ElasticNetwork:
    """Reads what `ElasticNetwork.save` wrote, without running code. It is in evaluation mode, on the CPU.

    Args:
        path: the file.
        model: a network built as that one was, with any weights; left as it was.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, no such file, or of another network; the message says how they differ.
    """
    content = elastic_file.read(path)
    stages = [Stage(tuple(blocks), tuple(droppable)) for blocks, droppable in content["stages"]]
    subnets = [Subnet(tuple(map(tuple, keep))) for keep in content["subnets"]]
    layers = [Layer(**layer) for layer in content["layers"]]
    running = frozenset(content["running"])
    kind = type(model).__name__
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    wanted = [*(block for stage in stages for block in stage.blocks), *(layer.path for layer in layers)]
    absent = [name for name in wanted if name not in modules]
    if absent:
        raise ValueError(
            f"{path} is of another network ({content['network']}) than {kind}, which has no {absent[0]!r}"
        )
    parts = light_subnets(_own_copy(model).cpu(), stages, subnets, layers, running)
    sample = None if content["sample"] is None else tuple(content["sample"])
    elastic = ElasticNetwork(parts, stages, layers, running, sample, content["metadata"])
    elastic_file.check_fits(elastic, content["state"], path, kind)
    elastic.to(next((t.dtype for t in content["state"].values() if t.is_floating_point()), torch.float32))
    elastic.load_state_dict(content["state"])
    return elastic.eval()


def share_weights(model: nn.Module, stages: Sequence[Stage], subnets: Sequence[Subnet]) -> list[nn.Module]:
    """The subnets as modules over one copy of the model's weights, in evaluation mode, with statistics of no meaning.

    For timing them, which doesn't ask for statistics.
    """
    return [part.network.eval() for part in light_subnets(_own_copy(model), stages, subnets, ())]


def _own_copy(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    unfuse_blocks(model)
    return model


def _distinct(depths: Iterable[Subnet | Sequence[int]] | None, stages: Sequence[Stage]) -> list[Subnet]:
    """The subnets wanted, those with fewer blocks first."""
    if depths is None:
        return nested_subnets(stages)
    if isinstance(depths, (str, Subnet)) or not isinstance(depths, Iterable):
        raise TypeError(f"depths is {depths!r}; it must hold the depths of several subnets, [(1, 1), (2, 2)]")
    given = list(depths)
    if any(isinstance(entry, int) for entry in given):
        raise TypeError(
            f"depths is {given!r}; it must hold the depths of several subnets, [{tuple(given)!r}]"
        )
    subnets = [Subnet.of(entry, stages) for entry in given]
    if not subnets:
        raise ValueError("depths is empty; it must hold at least one subnet's depths")
    for i, subnet in enumerate(subnets):
        subnet.dropped(stages)  # raises where it doesn't fit
        if subnet in subnets[:i]:
            raise ValueError(f"depths holds {subnet} twice")
    return sorted(subnets, key=lambda subnet: (sum(subnet.depths), subnet.depths))


def _spellings(subnet: Subnet) -> list[Any]:
    """What may stand for a subnet."""
    return [subnet, subnet.depths] if subnet.is_ordered else [subnet]
