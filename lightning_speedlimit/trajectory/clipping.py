"""What happened to the gradients between being seen and being used: clipping, or something else.

    "clipping"  the force is the gradient that was observed. By one factor c = ‖g_clipped‖/‖g‖ the mobility is c times
                as large; by anything else (by value, module by module) it is the effective one.
    "given"     the force is what the optimizer was given.
    "unknown"   told from all steps together: one factor whose results have one norm was clipping; one and the same
                factor at each step (a mean over accumulated batches) was what the optimizer was given.

Whether a change was by one factor is known on the device alone; what it means is decided when somebody reads.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_speedlimit.trajectory.sums import sum_dtype

GradientChanges = Literal["clipping", "given", "unknown"]
_SAME = 1e-5  # relative rounding of gradients that one factor multiplied: 6e-8 in float32
_ALIKE = 1e-3  # spread of a norm or a factor that counts as one; float32 norms of many coordinates differ by 1e-6
_STATS = ("uneven", "changed", "−least factor", "largest factor", "−least norm", "largest norm")

UNTOLD = (
    "gradients were changed between backward and step by a factor that is neither clipping to one norm nor the same at "
    "each step: whether it is part of the loss can't be told"
)


class Change(NamedTuple):
    """Of one step, on the device. even: one factor changed all. factor: ‖g given‖/‖g observed‖. squared: ‖g given‖²."""

    even: Tensor
    factor: Tensor
    squared: Tensor


def change(rr: Tensor, ss: Tensor, residual: Tensor, coarse: bool) -> Change:
    """From Σ g², Σ g'² and Σ (g' − cg)², c = √(Σ g'²/Σ g²); coarse: gradients in half precision."""
    allowed = (4 * torch.finfo(torch.bfloat16).eps if coarse else _SAME) ** 2
    return Change(residual <= allowed * ss, factor_of(rr, ss), ss)


def factor_of(rr: Tensor, ss: Tensor) -> Tensor:
    """c; 1 where there is no gradient."""
    return torch.where(rr > 0, (ss / rr).sqrt(), 1.0)


class Changes:
    """Of all steps of one optimizer, on the device; see `_STATS`."""

    def __init__(self, mode: GradientChanges) -> None:
        self.mode = mode
        self.writes: int | None = None  # in place, that clipping does to each gradient; None: any number
        self.by_others = False  # other writes were seen
        self.stats: Tensor | None = None
        self.steps = 0  # in which gradients were looked at

    def add(self, found: Change) -> None:
        if self.stats is None:
            none = [0.0, 0.0, -math.inf, -math.inf, -math.inf, -math.inf]
            self.stats = torch.tensor(none, dtype=sum_dtype(found.squared.device), device=found.squared.device)
        told = found.factor < math.inf  # gradients that are not finite, of a step that a scaler skips, tell nothing
        scaled = found.even & told & ((found.factor - 1.0).abs() > _SAME) & (found.squared > 0)
        norm = found.squared.sqrt()
        extremes = torch.stack([-found.factor, found.factor, -norm, norm])
        self.stats[:2] += torch.stack([~found.even & told, scaled])
        self.stats[2:] = torch.where(scaled, torch.maximum(self.stats[2:], extremes), self.stats[2:])

    def state_dict(self) -> dict[str, Any]:
        stats = None if self.stats is None else self.stats.cpu().clone()
        return {"stats": stats, "steps": self.steps, "by_others": self.by_others}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        stats = state["stats"]
        self.stats = None if stats is None else stats.to(device, copy=True)
        self.steps, self.by_others = state["steps"], state["by_others"]


class Verdict(NamedTuple):
    """What the changes of a run were. effective: the mobility is. factor: works count so many times; NaN: untold."""

    effective: bool = False
    factor: float = 1.0


def verdict(changes: Changes, stats: list[float] | None) -> Verdict:
    """stats: on the host; None: no gradient changed."""
    if stats is None or changes.mode == "given":
        return Verdict()
    uneven, changed, least, largest, least_norm, largest_norm = stats
    if changes.mode == "clipping" and not changes.by_others:
        return Verdict(effective=uneven > 0)
    if changed == 0:
        return Verdict(factor=math.nan) if changes.by_others and uneven > 0 else Verdict()
    one_norm = largest_norm <= -(1.0 + _ALIKE) * least_norm and largest < 1.0 + _ALIKE
    one_factor = largest <= -(1.0 + _ALIKE) * least and changed == changes.steps and uneven == 0
    if one_norm == one_factor or (one_norm and changes.by_others):
        return Verdict(factor=math.nan)
    return Verdict(factor=1.0 if one_norm else largest)
