"""What is known of a motion's parameter groups: their learning rates, and which rows are theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_speedlimit.trajectory.coordinates import Coordinates
from lightning_speedlimit.trajectory.mobility import Scalar
from lightning_speedlimit.trajectory.runs import Member
from lightning_speedlimit.trajectory.sums import sum_dtype
from lightning_speedlimit.trajectory.valid import chosen


class GroupRates:
    """By group lr of the update that waits for its next gradient, and Σ lr_k over those that have met it."""

    def __init__(self, members: list[Member], coordinates: Coordinates) -> None:
        self._members, self._coordinates = members, coordinates
        self.waiting: list[Scalar] = []
        self.weight: dict[int, Scalar] = {}

    def rows(self) -> list[tuple[int, slice | None]]:
        """Neighbouring rows of one group, which may have others elsewhere; None: all."""
        found: list[tuple[int, slice]] = []
        for member, rows in zip(self._members, self._coordinates.rows, strict=True):
            if found and found[-1][0] == member.group:
                found[-1] = member.group, slice(found[-1][1].start, rows.stop)
            else:
                found.append((member.group, rows))
        return [(index, None if len(found) == 1 else rows) for index, rows in found]

    def of(self, index: int) -> Scalar:
        """Of the update that waits; 0 where none does."""
        return self.waiting[index] if index < len(self.waiting) else 0.0

    def met(self, valid: Tensor | None) -> None:
        """The update has met its next gradient."""
        for index in {member.group for member in self._members}:
            rate = self.of(index)
            rate = rate if valid is None else rate * valid.to(sum_dtype(valid.device))
            self.weight[index] = self.weight.get(index, 0.0) + rate

    def take(self, rates: list[Scalar], valid: Tensor | None) -> None:
        """Those of the update that waits now."""
        if valid is not None:
            rates = [chosen(valid, now, known) for now, known in zip(rates, self.waiting or rates, strict=False)]
        self.waiting = rates

    def forget(self, valid: Tensor) -> None:
        """Where a step was one, no update waits any more."""
        self.waiting = [chosen(valid, 0.0, rate) for rate in self.waiting]

    def regroup(self, before: list[int]) -> None:
        """The members are in other groups than before: what is known by group goes with them."""
        came: dict[int, int] = {}
        for gone in (False, True):  # a group of the same number may have left
            for member, old in zip(self._members, before, strict=True):
                if member.gone is gone:
                    came.setdefault(member.group, old)
        waiting, weight = self.waiting, self.weight
        numbers = range(max(came) + 1) if waiting else ()
        self.waiting = [waiting[old] if (old := came.get(i, i)) < len(waiting) else 0.0 for i in numbers]
        self.weight = {new: weight[old] for new, old in came.items() if old in weight}

    def state_dict(self) -> dict[str, Any]:
        return {
            "waiting": [float(rate) for rate in self.waiting],
            "weight": {index: float(weight) for index, weight in self.weight.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.waiting, self.weight = list(state["waiting"]), dict(state["weight"])


def over(squared: Tensor, rate: Scalar) -> Tensor:
    """‖u‖²/lr: 0/0 counts 0 (a warm-up from 0); a motion without learning rate is undefined."""
    if isinstance(rate, Tensor):
        moved = torch.where(rate > 0, squared / rate, torch.full_like(squared, torch.nan))
    else:
        moved = squared / rate if rate > 0 else torch.full_like(squared, torch.nan)
    return torch.where(squared == 0, torch.zeros_like(squared), moved)
