"""Trainings that move weights where no step is seen to: two-step SAM, updates by hand, dummy optimizers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_speedlimit.checks.guard import look
from lightning_speedlimit.record import RunRecord
from lightning_speedlimit.trajectory import TrajectoryMeter
from lightning_speedlimit.trajectory.optimizers import cure_of, inner_optimizers

_SAMPLED = 64  # coordinates of each parameter, spread over it


class UnseenSteps:
    """A few weights as they were when the measurement began, and whether they have moved without a step.

    Reads them from the device only as long as no step has moved anything.

    Args:
        optimizers: that the meter measures. The module's other parameters that require gradients are looked at too.
    """

    def __init__(self, module: torch.nn.Module, optimizers: Iterable[Any]) -> None:
        self.over = False  # there is nothing left to look for
        self._optimizers = list(optimizers)
        self._looked = False
        held = [p for o in self._optimizers for p in _held(o)]
        named = {id(p): name for name, p in module.named_parameters()}
        others = [p for p in module.parameters() if p.requires_grad]
        self._names = {id(p): named.get(id(p), "") for p in (*held, *others)}
        self._weights = list({id(p): p for p in (*held, *others)}.values())
        samples = ((id(p), look(_sample, None, p)) for p in self._weights)
        self._start = {key: sample for key, sample in samples if sample is not None}

    def message(self, meter: TrajectoryMeter, record: RunRecord, *, at_the_end: bool) -> str | None:
        """What to say; None where all is well, or it is too early to tell. Looks at the first call and `at_the_end`."""
        if self._looked and not at_the_end:
            return None
        self._looked = True
        stepped = [o for o in self._optimizers if meter.recorder.has_stepped(o)]
        seen = {id(p) for o in stepped for p in _held(o)}
        for optimizer in self._optimizers:
            own = [p for p in _held(optimizer) if id(p) not in seen]  # none, if it has stepped
            if self._moved(own) is not None:
                return _no_step(optimizer)
        path, norm = _last(record, "path_length"), _last(record, "grad_norm")
        if not stepped or path != 0.0:
            self.over = len(stepped) == len(self._optimizers)
            return None
        forced = norm > 0.0
        if forced and not at_the_end:
            return None  # a learning rate that begins at 0
        moved = self._moved(self._weights)
        if moved is None and (forced or not at_the_end or not any(p.requires_grad for o in stepped for p in _held(o))):
            return None
        return _still(stepped, meter.steps, None if moved is None else self._names[id(moved)])

    def _moved(self, parameters: Iterable[Tensor]) -> Tensor | None:
        """The first of these that is not where it was."""
        return next((p for p in parameters if look(self._has_moved, False, p)), None)

    def _has_moved(self, parameter: Tensor) -> bool:
        start, now = self._start[id(parameter)], _sample(parameter)
        return start.shape == now.shape and not torch.equal(start.nan_to_num(), now.nan_to_num())


def _last(record: RunRecord, name: str) -> float:
    """Of the last row; NaN where there is none."""
    return float(record.columns[name][-1]) if len(record) else math.nan


def _held(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@torch.no_grad()
def _sample(parameter: Tensor) -> Tensor:
    """(≤ 127,) of its coordinates in this process, copied. Raises for what holds no numbers (lazy, meta)."""
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    flat = local.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLED)].clone()


def _no_step(optimizer: Any) -> str:
    name = type(optimizer).__name__
    cure = "move them in its `step` alone (first_step, second_step and what is written by hand are not seen)"
    if inner_optimizers(optimizer):
        cure += f", or {cure_of(optimizer)}"
    return f"SpeedLimit saw no step of {name}, and yet its weights have moved: nothing of that is measured; {cure}"


def _still(optimizers: list[Any], steps: int, moved: str | None) -> str:
    names = ", ".join(dict.fromkeys(type(o).__name__ for o in optimizers))
    seen = f"SpeedLimit saw {steps} step{'s' if steps > 1 else ''} of {names} in which no weight moved"
    if moved is None:
        return (
            f"{seen} or had a gradient: return the optimizer that trains from configure_optimizers, or give it to a "
            "TrajectoryMeter"
        )
    return (
        f"{seen}, and yet {f'{moved!r} has' if moved else 'weights have'} moved: nothing of that is measured; return "
        "the optimizer that moves them from configure_optimizers, or give it to a TrajectoryMeter"
    )
