"""`Network`: a model with everything that is known of it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..subnets.plan import Layer
from ..subnets.subnet import Stage
from .calls import logits_of, run_on_shared_input, skip_block, untrained_outputs, values_returned
from .fingerprint import Watch
from .inputs import first_rows, rows_in
from .interception import Site, find_sites
from .noise import noisy_layers
from .profile import count_layers, example_for, form_of, one_sample

__all__ = ["Network"]

KEPT_FORMS = 16
"""Forms of inputs whose layers stay counted, for images whose size changes from batch to batch."""

Found = TypeVar("Found")

logger = logging.getLogger("gkt_fast")


_UNTRAINED = (
    "the model returns %s beside its logits; GKT trains the logits alone, so that an auxiliary head or loss gets no "
    "gradient. Build the model without it (aux_loss=False, aux_logits=False), or take it away (model.aux_classifier = "
    "None)"
)


_outputs_told_of: WeakSet[nn.Module] = WeakSet()
"""The models whose outputs were looked at."""


class Network:
    """A model, the places where its streams may part, and what was learnt of it from step to step.

    It lives as long as the `GKT` that holds it, and is copied and pickled with it.

    Args:
        model: the network.
        stages: its stages.

    Attributes:
        sites: its blocks and the modules between them.
        writes_input: for every layer that ran on a state, by its path, whether it writes into its input.
        returns: for every block that ran, by its path, how many values it returns (see `values_returned`).
        verdicts: of the execution modes that were tried on the model as it is set up now, None where a mode is right,
            or the reason why it isn't.
        running_buffers: module path and name of the buffers that a training forward writes, beside those of
            normalisation layers; None: not looked for yet.
        agreed: whether the ranks of a distributed run have agreed on a mode.
        looked_for_noise: whether a step was searched for noise that streams share.

    Raises:
        ValueError: two blocks are one place (see `find_sites`).
    """

    def __init__(self, model: nn.Module, stages: Sequence[Stage]) -> None:
        self.model = model
        self.stages = list(stages)
        self.sites = find_sites(model, self.stages)
        self.writes_input: dict[str, bool] = {}
        self.returns: dict[str, int] = {}
        self.verdicts: dict[str, str | None] = {}
        self.running_buffers: list[tuple[str, str]] | None = None
        self.agreed = False
        self.looked_for_noise = False
        self._watch: Watch | None = None
        self._setup: Hashable = None
        self._found: dict[str, Any] = {}
        self._verdicts_of: dict[Hashable, dict[str, str | None]] = {}
        self._told: set[str] = set()
        self._form: list[Any] = []
        self._example: tuple[Any, ...] | None = None
        self._batch: tuple[Any, ...] | None = None
        self._layers: list[Layer] | None = None
        self._counted: list[tuple[list[Any], list[Layer]]] = []
        self._noisy: tuple[list[bool], frozenset[str]] | None = None

    def of(self, model: nn.Module) -> Network:
        """The same knowledge of a model that took this one's place, such as a replica on another device."""
        other = copy.copy(self)
        other.model = model
        other.agreed, other._verdicts_of = self.agreed, self._verdicts_of
        other._found = {}
        return other

    @property
    def refused(self) -> dict[str, str]:
        """The execution modes that were found wrong for the model as it is set up now, with the reason."""
        return {mode: reason for mode, reason in self.verdicts.items() if reason is not None}

    def note_setup(self) -> None:
        """Looks whether modules, modes, flags, hooks or the form of the inputs changed; `verdicts` are those of now."""
        if self._watch is None or not self._watch.is_current(self.model):
            self._watch, self._setup = Watch(self.model), None
        form = tuple((len(entry[0]), entry[1]) if isinstance(entry, tuple) else entry for entry in self._form)
        setup = self._watch.fingerprint(), form, torch.is_grad_enabled()
        if setup != self._setup:
            self._setup, self._found = setup, {}
        self.verdicts = self._verdicts_of.setdefault(setup, {})

    def once(self, what: str, find: Callable[[], Found]) -> Found:
        """What `find` finds in the model, which depends on what `note_setup` notes and on nothing else; asked once.

        Args:
            what: its name.
            find: walks the model.
        """
        if what not in self._found:
            self._found[what] = find()
        return self._found[what]

    def __getstate__(self) -> dict[str, Any]:
        """Without what is found anew: verdicts, and values of a batch."""
        return self.__dict__ | {
            "_watch": None,
            "_setup": None,
            "_found": {},
            "_verdicts_of": {},
            "verdicts": {},
            "agreed": False,
            "_batch": None,
        }

    def remember(self, inputs: tuple[Any, ...]) -> None:
        """Keeps the form of one sample of the model's inputs, with its whole numbers; a new form is counted anew."""
        form = form_of(inputs)
        if self._example is not None and form == self._form:
            return
        counted = (layers for known, layers in self._counted if known == form)
        self._form, self._example, self._noisy = form, one_sample(inputs), None
        self._layers = next(counted, None)

    @contextmanager
    def seeing(self, inputs: tuple[Any, ...]) -> Iterator[None]:
        """As `remember`; inside, the model is looked at with values of this batch. None of them is kept longer."""
        self.remember(inputs)
        self._batch = inputs
        try:
            yield
        finally:
            self._batch = None

    @property
    def sees_batch(self) -> bool:
        """Whether a look at the model has values of a batch (`seeing`)."""
        return self._batch is not None

    def layers(self, independent_noise: bool = False) -> list[Layer]:
        """The blocks and the modules between them, in order of execution, with their cost for one sample.

        Args:
            independent_noise: whether layers that draw random numbers are marked, for streams that draw their own.

        Raises:
            ValueError: the form of the inputs is not known yet (see `remember`).
        """
        if self._layers is None:
            self._layers = self._count_layers()
            self._counted = [(self._form, self._layers), *self._counted[: KEPT_FORMS - 1]]
        if not independent_noise:
            return self._layers
        noisy = self.noisy_layers()
        return [replace(layer, draws_noise=layer.path in noisy) for layer in self._layers]

    def _count_layers(self) -> list[Layer]:
        try:
            return count_layers(self.model, self.sites, self._sample())
        except Exception:
            rows = rows_in(self._batch) or 1
            if rows == 1:
                raise
        # A model may know the size of its batch.
        layers = count_layers(self.model, self.sites, self._batch)
        return [
            replace(layer, flops=layer.flops // rows, saved_bytes=layer.saved_bytes // rows)
            for layer in layers
        ]

    def noisy_layers(self) -> frozenset[str]:
        """Paths of the layers that draw random numbers; looked for again when a layer changed its mode.

        Raises:
            ValueError: the form of the inputs is not known yet (see `remember`).
        """
        modes = [module.training for module in self.model.modules()] if self.model.training else []
        if self._noisy is None or self._noisy[0] != modes:
            inputs = example_for(self.model, self._sample())
            self._noisy = modes, noisy_layers(self.model, self.sites, inputs)
        return self._noisy[1]

    def _sample(self) -> tuple[Any, ...]:
        """One sample: of the batch at hand, else what is remembered of one."""
        if self._batch is not None:
            return first_rows(self._batch, 1)
        if self._example is None:
            raise ValueError(
                "inputs is None and the model has not been called yet; pass an example of its input"
            )
        return self._example

    def run_on_shared_input(self, site: Site, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Runs a layer whose input others read too (see `calls.run_on_shared_input`)."""
        return run_on_shared_input(self.writes_input, site.path, module, args, kwargs)

    def logits(self, output: Any) -> Tensor:
        """The logits in what the model returned in a step (see `calls.logits_of`).

        What else it returned is not trained. Of outputs that would need to be, a warning tells once.
        """
        logits = logits_of(output)
        if logits is not output and logits.requires_grad and self.model not in _outputs_told_of:
            _outputs_told_of.add(self.model)
            names = untrained_outputs(output, logits)
            if names:
                logger.warning(_UNTRAINED, ", ".join(map(repr, names)))
        return logits

    def learn_returns(self, site: Site, output: Any) -> None:
        """Keeps how many values a block returned."""
        self.returns[site.path] = values_returned(output)

    def skip(self, site: Site, args: tuple, kwargs: dict) -> Any:
        """What a dropped block hands on (see `calls.skip_block`)."""
        return skip_block(site.path, self.returns.get(site.path, 0), args, kwargs)

    def tell_once(self, message: str, level: int = logging.INFO) -> None:
        """Logs a message that this network has not logged before."""
        if message not in self._told:
            self._told.add(message)
            logger.log(level, message)

    def state(self) -> list[int]:
        """What was learnt, for a checkpoint: for every site whether it writes into its input, then how many values it
        returns; -1 where that isn't known."""
        paths = [site.path for site in self.sites]
        return [
            *(int(self.writes_input.get(path, -1)) for path in paths),
            *(self.returns.get(path, -1) for path in paths),
        ]

    def load_state(self, state: Sequence[int]) -> None:
        """The inverse of `state`.

        Raises:
            ValueError: it is of a network with another number of sites.
        """
        paths = [site.path for site in self.sites]
        if len(state) != 2 * len(paths):
            raise ValueError(f"state has {len(state)} entries; it must have 2 for each of {len(paths)} sites")
        writes, returns = state[: len(paths)], state[len(paths) :]
        self.writes_input = {
            path: bool(value) for path, value in zip(paths, writes, strict=True) if value >= 0
        }
        self.returns = {path: value for path, value in zip(paths, returns, strict=True) if value >= 0}
