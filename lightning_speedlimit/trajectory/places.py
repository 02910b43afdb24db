"""Where parameters lie in the whole run's parameter vector, and how many coordinates it has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_speedlimit.trajectory.shards import is_flat


class Places:
    """Positions in the parameter vector: in the order of the optimizers' groups, whatever is seen first."""

    def __init__(self, optimizers: list[Optimizer]) -> None:
        self._optimizers = optimizers
        self._known: dict[int, int] = {}
        self._next = 0

    def __call__(self, parameter: Tensor) -> int:
        if not self._known:
            for optimizer in self._optimizers:
                for group in optimizer.param_groups:
                    for other in group["params"]:
                        self._take(other)
        self._take(parameter)
        return self._known[id(parameter)]

    def _take(self, parameter: Tensor) -> None:
        if id(parameter) in self._known or isinstance(parameter, torch.nn.UninitializedParameter):
            return
        self._known[id(parameter)] = self._next
        self._next += parameter.numel() * (2 if parameter.is_complex() else 1)

    def load(self, motions: list[Any]) -> None:
        """Some may have left the optimizer: the others keep their places, and new ones come after them all."""
        members = [pair for m in motions for pair in zip(m.coordinates.parameters, m.members, strict=True)]
        if any(self._known.get(id(parameter)) != member.position for parameter, member in members):
            self._known = {id(parameter): member.position for parameter, member in members}
            self._next = max(member.position + member.size for _, member in members)


def count(parameters: list[Tensor], processes: int) -> int:
    """Coordinates of all of them; of shards, those of all processes."""
    known = {id(p): p for p in parameters if not isinstance(p, torch.nn.UninitializedParameter) and p.requires_grad}
    return sum(
        p.numel() * (2 if p.is_complex() else 1) * (processes if processes and is_flat(p) else 1)
        for p in known.values()
    )
