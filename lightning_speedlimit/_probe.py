"""A fixed probe: the loss of the first training batches, at θ_0 and again on log steps, without a trace."""

from __future__ import annotations

import copy
import inspect
import random
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.nn import UninitializedParameter
from torchmetrics import Metric

from lightning_speedlimit._lightning import muted_logger

_SEED = 0  # dropout draws the same masks at θ_0 and later: the difference is then the weights' alone


class Probe:
    """L on the first `size` batches that training delivered, through training_step.

    Logging is muted; buffers, metrics, module modes and random states are as they were afterwards, and
    neither the loader nor global_step moves.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.batches: list[Any] = []
        self.first: Tensor | None = None

    @property
    def complete(self) -> bool:
        return len(self.batches) == self.size

    def keep(self, batch: Any) -> None:
        """A copy of a batch on its way into training_step, as long as there are too few."""
        if not self.complete:
            self.batches.append(apply_to_collection(batch, Tensor, lambda t: t.detach().clone()))

    def losses(self, trainer: Any, module: Any) -> Tensor:
        """(size,) float64 losses at the weights as they are now; nothing is read from the device."""
        with _undisturbed(trainer, module):
            values = [self._loss(trainer, module, batch, i) for i, batch in enumerate(self.batches)]
            return torch.stack([v.detach().double().reshape(()) for v in values])

    def _loss(self, trainer: Any, module: Any, batch: Any, index: int) -> Tensor:
        torch.manual_seed(_SEED + index)
        batch = apply_to_collection(batch, Tensor, torch.clone)
        step = module.training_step
        wanted = inspect.signature(step).parameters.values()
        takes_index = len(wanted) > 1 or any(p.kind is p.VAR_POSITIONAL for p in wanted)
        arguments = [batch, index] if takes_index else [batch]
        with trainer.precision_plugin.train_step_context(), torch.no_grad():
            output = step(*arguments)
        loss = output["loss"] if isinstance(output, dict) else output
        if not isinstance(loss, Tensor):
            raise TypeError(f"training_step returned {type(loss).__name__} for a probe batch, wanted a loss")
        return loss


class StartWeights:
    """A copy of θ_0 of the parameters of a module and of its optimizers, by their names."""

    def __init__(self, module: torch.nn.Module, optimizers: Sequence[Any]) -> None:
        self._module = module
        held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        found = {f"optimizers.{i}": p for i, p in enumerate(held)} | dict(module.named_parameters())
        self._names = {id(p): name for name, p in found.items()}
        self._waiting = {name: p for name, p in found.items() if self._names[id(p)] == name}
        self._values: dict[str, Tensor] = {}

    def take(self) -> None:
        """θ as it is, of those that have not been taken yet: call it before the first step of each.

        (Lazy layers are there after their first forward pass.)
        """
        for name, parameter in list(self._waiting.items()):
            if not isinstance(parameter, UninitializedParameter):
                self._values[name] = self._waiting.pop(name).detach().clone()

    def of(self, parameter: Tensor) -> Tensor | None:
        """θ_0 of one of them; None where it is not known."""
        return self._values.get(self._names.get(id(parameter), ""))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """θ_0 in place of θ, and θ back afterwards, bitwise."""
        held: list[tuple[Tensor, Tensor]] = []
        try:
            with torch.no_grad():
                for parameter in self._module.parameters():
                    start = self.of(parameter)
                    if start is not None:
                        held.append((parameter, parameter.detach().clone()))
                        parameter.copy_(start)
            yield
        finally:
            with torch.no_grad():
                for kept, value in held:
                    kept.copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: value.cpu() for name, value in self._values.items()}

    def restored(self, state: dict[str, Tensor] | None) -> StartWeights | None:
        """With what was saved; None where nothing was, or of others: what the module holds now is not θ_0."""
        if state is None or not state.keys() <= set(self._names.values()):
            return None
        homes = {name: p.device for name, p in self._waiting.items()} | {n: v.device for n, v in self._values.items()}
        self._values |= {name: value.to(homes[name]) for name, value in state.items()}
        self._waiting = {name: p for name, p in self._waiting.items() if name not in state}
        return self


@contextmanager
def _undisturbed(trainer: Any, module: torch.nn.Module) -> Iterator[None]:
    attributes = [(m, dict(m.__dict__)) for m in module.modules()]  # modes, counters, and metrics' states too
    collections = [
        (value, copy.copy(value))  # buffers by name, and what training_step collects
        for _, names in attributes
        for value in names.values()
        if isinstance(value, (list, dict, set, deque))
    ]
    buffers = [(b, b.detach().clone()) for b in module.buffers()]
    loggers, python, numpy = trainer.loggers, random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    try:
        for metric in (m for m in module.modules() if isinstance(m, Metric)):
            # In place of the states themselves: they may be part of a graph, and are changed in place.
            metric.__dict__.update(apply_to_collection(_states(metric), Tensor, lambda t: t.detach().clone()))
        with torch.random.fork_rng(devices=list(devices)):
            trainer.loggers = [muted_logger(trainer)]
            module.__dict__.update(log=_ignore, log_dict=_ignore)
            yield
    finally:
        trainer.loggers = loggers
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for part, names in attributes:
            part.__dict__.clear()
            part.__dict__.update(names)
        for collection, entries in collections:
            _put_back(collection, entries)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _put_back(collection: Any, entries: Any) -> None:
    """The entries that a collection held, in itself: others may hold it too."""
    collection.clear()
    if isinstance(collection, (list, deque)):
        collection.extend(entries)
    else:
        collection.update(entries)


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Takes the place of `log` while the probe is evaluated."""


def _states(metric: Metric) -> dict[str, Any]:
    """The states of a torchmetrics Metric, which it keeps as plain attributes, and its cache of them."""
    kept = [*metric._defaults, "_computed", "_forward_cache", "_cache"]
    return {name: metric.__dict__[name] for name in kept if name in metric.__dict__}
