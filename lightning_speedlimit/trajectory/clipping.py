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
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_speedlimit.trajectory.motion import Motion
from lightning_speedlimit.trajectory.norms import total
from lightning_speedlimit.trajectory.settings import GradientChanges
from lightning_speedlimit.trajectory.sums import sum_dtype

_SAME = 1e-5  # relative rounding of gradients that one factor multiplied: 6e-8 in float32
_ALIKE = 1e-3  # spread of a norm or a factor that counts as one; float32 norms of many coordinates differ by 1e-6
_STATS = ("uneven", "changed", "−least factor", "largest factor", "−least norm", "largest norm")

UNTOLD = (
    "gradients were changed between backward and step by a factor that is neither clipping to one norm nor the same at "
    "each step: whether it is part of the loss can't be told"
)
LATE = (
    "a hook that was registered after the meter's may have changed the gradients within the step: "
    "register_step_pre_hook it before the meter is made"
)


class Changes:
    """Of all steps of one optimizer, on the device; see `_STATS`."""

    def __init__(self, mode: GradientChanges) -> None:
        self.mode = mode
        self.writes: int | None = None  # in place, that clipping does to each gradient; None: any number
        self.by_others = False  # other writes were seen
        self.late = False  # written to in a step, in which other hooks came after the meter's
        self.stats: Tensor | None = None
        self.steps = 0  # in which gradients were looked at

    def add(self, motions: Sequence[Motion], given: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Of one step, between the gradients that were observed and those that the optimizer was given.

        Returns whether one factor changed them all, Σ (g' − cg)² ≈ 0, and c = √(Σ g'²/Σ g²), 1 where there is no
        gradient; on the device.
        """
        rr = total([m.coordinates.fast_norm_squared(m.gradient.rows) for m in motions])
        ss = total([m.coordinates.fast_norm_squared(rows) for m, rows in zip(motions, given, strict=True)])
        factor, rests = torch.where(rr > 0, (ss / rr).sqrt(), 1.0), []
        for motion, rows in zip(motions, given, strict=True):
            rest = torch.mul(motion.gradient.rows, factor.to(rows)).sub_(rows)
            rests.append(motion.coordinates.fast_norm_squared(rest))
        coarse = any(p.dtype.itemsize < 4 for m in motions for p in m.coordinates.parameters)
        even = total(rests) <= (4 * torch.finfo(torch.bfloat16).eps if coarse else _SAME) ** 2 * ss
        if self.stats is None:
            none = [0.0, 0.0, -math.inf, -math.inf, -math.inf, -math.inf]
            self.stats = torch.tensor(none, dtype=sum_dtype(ss.device), device=ss.device)
        told = factor < math.inf  # gradients that are not finite, of a step that a scaler skips, tell nothing
        scaled = even & told & ((factor - 1.0).abs() > _SAME) & (ss > 0)
        norm = ss.sqrt()
        extremes = torch.stack([-factor, factor, -norm, norm])
        self.stats[:2] += torch.stack([~even & told, scaled])
        self.stats[2:] = torch.where(scaled, torch.maximum(self.stats[2:], extremes), self.stats[2:])
        return even, factor


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
