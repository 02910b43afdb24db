"""A fixed probe: the loss of the first training batches, at θ_0 and again on log steps, without a trace."""

from __future__ import annotations

import inspect
import random
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
    # training_step may put other tensors in their places
    tables = [(m._buffers, dict(m._buffers)) for m in module.modules()]
    buffers = [(b, b.detach().clone()) for b in module.buffers()]
    modes = [(m, m.training) for m in module.modules()]
    metrics = [(m, _metric_state(m)) for m in module.modules() if isinstance(m, Metric)]
    for metric, state in metrics:
        # In place of the states themselves: they may be part of a graph, and are changed in place.
        metric.__dict__.update(apply_to_collection(state, Tensor, lambda t: t.detach().clone()))
    loggers, python, numpy = trainer.loggers, random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    muted = {name: module.__dict__.get(name) for name in ("log", "log_dict")}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            trainer.loggers = [muted_logger(trainer)]
            for name in muted:
                module.__dict__[name] = _ignore
            yield
    finally:
        trainer.loggers = loggers
        for name, value in muted.items():
            if value is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = value
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for part, training in modes:
            part.training = training
        for metric, state in metrics:
            metric.__dict__.update(state)
        for table, entries in tables:
            table.clear()
            table.update(entries)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Takes the place of `log` while the probe is evaluated."""


def _metric_state(metric: Metric) -> dict[str, Any]:
    """States and counters of a torchmetrics Metric; it keeps them as plain attributes."""
    kept = [*metric._defaults, "_update_count", "_computed", "_forward_cache", "_is_synced", "_cache"]
    return {name: metric.__dict__[name] for name in kept if name in metric.__dict__}
