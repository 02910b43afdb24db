"""A fixed probe: the loss of the first training batches, at θ_0 and again on log steps, without a trace."""

from __future__ import annotations

import copy
import inspect
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
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


@contextmanager
def start_weights(module: torch.nn.Module, start_of: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """θ_0 in place of θ, and θ back afterwards, bitwise."""
    held: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for parameter in module.parameters():
                start = start_of(parameter)
                if start is not None:
                    held.append((parameter, parameter.detach().clone()))
                    parameter.copy_(start)
        yield
    finally:
        with torch.no_grad():
            for kept, value in held:
                kept.copy_(value)


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
