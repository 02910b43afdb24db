"""How a run is measured, the same for all of its optimizers, and where in its parameter vector parameters lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_speedlimit.trajectory.draw import Draw
from lightning_speedlimit.trajectory.optimizers import parameters_of
from lightning_speedlimit.trajectory.owners import Owners
from lightning_speedlimit.trajectory.runs import Member
from lightning_speedlimit.trajectory.shards import is_flat

Clock = Literal["steps", "lr"]
GradientChanges = Literal["clipping", "given", "unknown"]


@dataclass(frozen=True)
class Settings:
    """Of a meter, as its followers and motions need them."""

    optimizers: list[Optimizer]
    owners: Owners
    changes: GradientChanges  # what changes gradients between being seen and being used
    response: bool  # momentum's mobility is the response
    per_rate: bool  # the action's clock is the learning rate
    snapshots: bool  # sums are kept as they were before each measured step: sampled steps tell their spread by them
    draw: Draw  # which coordinates are measured
    place: Callable[[Tensor], int]  # the position of a parameter in the whole run's parameter vector
    layer_of: Callable[[Tensor], str] | None  # the name under which a parameter's sums are kept apart
    layers: list[str]  # the names that are known
    overlaps: bool  # of neighbouring gradients count: the works tell signal and noise of plain SGD alone
    processes: int  # that hold shards of the parameters; 0: this one has them whole


class Places:
    """Positions in the parameter vector: in the order of the optimizers' groups, whatever is seen first."""

    def __init__(self, optimizers: list[Optimizer]) -> None:
        self._optimizers = optimizers
        self._known: dict[int, int] = {}
        self._next = 0

    def __call__(self, parameter: Tensor) -> int:
        if not self._known:
            for other in parameters_of(self._optimizers):
                self._take(other)
        self._take(parameter)
        return self._known[id(parameter)]

    def _take(self, parameter: Tensor) -> None:
        if id(parameter) in self._known or isinstance(parameter, torch.nn.UninitializedParameter):
            return
        self._known[id(parameter)] = self._next
        self._next += size_of(parameter)

    def load(self, members: list[tuple[Tensor, Member]]) -> None:
        """Some may have left the optimizer: the others keep their places, and new ones come after them all."""
        if any(self._known.get(id(parameter)) != member.position for parameter, member in members):
            self._known = {id(parameter): member.position for parameter, member in members}
            self._next = max(member.position + member.size for _, member in members)


def size_of(parameter: Tensor) -> int:
    """Coordinates of the whole parameter; of an FSDP flat one, of this process's shard."""
    return parameter.numel() * (2 if parameter.is_complex() else 1)


def count(parameters: list[Tensor], processes: int) -> int:
    """Coordinates of all of them; of shards, those of all processes."""
    known = {id(p): p for p in parameters if not isinstance(p, torch.nn.UninitializedParameter) and p.requires_grad}
    return sum(size_of(p) * (processes if processes and is_flat(p) else 1) for p in known.values())
