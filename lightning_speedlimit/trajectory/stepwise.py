"""What is no sum over shards, or tells how sampled steps spread: taken in at each reading, step by step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_speedlimit.trajectory.joint import JointSteps
from lightning_speedlimit.trajectory.ranks import MOST, lengths_and_unevenness
from lightning_speedlimit.trajectory.run_totals import NAMES, Error, SectionTotals, directions
from lightning_speedlimit.trajectory.sums import NEGATIVE, SUMS

_STEP = len(SUMS) + 1  # numbers of a sampled step: its sums, and its mean mobility


class Stepwise:
    """Of all steps up to the last reading."""

    def __init__(self) -> None:
        self.path_length = 0.0  # of shards: Σ ‖u‖ of the whole
        self.no_path = ""  # why that is unknown
        self.uneven = False  # shards were clipped by several factors
        self.sampled = 0  # steps
        # Σ (x_j − x_{j−1})(x_j − x_{j−1})ᵀ of their sums
        self.spread = torch.zeros(_STEP, _STEP, dtype=torch.float64, device="cpu")
        self.mobilities = 0.0  # Σ of theirs
        self.last = self.spread[:0, 1:]  # the sums before and after the last of them

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def fold(self, host: dict[str, Tensor], joint: JointSteps) -> None:
        """Take in what has been kept since the last reading."""
        joint.read_at = joint.steps
        samples = host.get("samples")
        if joint.rows is not None:
            if "rows" in host:
                lengths, uneven = lengths_and_unevenness(host["rows"])
                if samples is not None:  # what the sums of each process say is the path of its own part
                    samples[:, SUMS.index("path_length")] = self.path_length + lengths.cumsum(0) - lengths
                self.path_length, self.uneven = self.path_length + float(lengths.sum()), self.uneven or uneven
            if joint.rows.full:
                self.path_length = math.nan
                self.no_path = f"more than {MOST} steps were taken between two readings of shards: read more often"
            joint.rows.clear()
        if joint.samples is not None and samples is not None:
            self._fold_samples(samples)
            if joint.samples.full:  # the next one is no neighbour
                self.last = self.last[:0]
            joint.samples.clear()

    def _fold_samples(self, samples: Tensor) -> None:
        """samples: the sums before each measured step; differences are what the step before them added."""
        rows = torch.cat([self.last, samples])
        steps = _steps(rows)
        new = steps[max(0, len(self.last) - 1) :]
        self.sampled, self.mobilities = self.sampled + len(new), self.mobilities + float(new[:, -1].sum())
        apart = steps.diff(dim=0)
        self.spread = self.spread + apart.T @ apart
        self.last = rows[-2:]

    def errors(self, sections: list[SectionTotals], joint: JointSteps) -> list[Error]:
        """K/J √(½ Σ (x_j − x_{j−1})² J/(J−1)): differences of neighbours, so that a trend is not taken for noise."""
        count = self.sampled
        if count < 2:
            return []
        factor = joint.steps / count
        found = directions(factor**2 * 0.5 * self.spread * count / (count - 1))
        changes, mobility = found[:, :-1], found[:, -1] / (factor * self.mobilities or math.inf)
        named = changes.new_zeros(len(found), len(NAMES))
        named[:, : len(SUMS)] = changes
        named[:, [SUMS.index(name) for name in NEGATIVE]] *= -1.0
        named[:, NAMES.index("work_ito")] = named[:, NAMES.index("work_met")]
        whole = sum(s.sums["squares"] for s in sections) or 1.0
        errors: Error = {}
        for section in sections:
            own = torch.where(named == 0.0, named, named * (section.sums["squares"] / whole))  # 0 beside NaN too
            own[:, NAMES.index("weighted")] = -mobility * section.sums["weighted"]
            errors[section.group] = errors.get(section.group, 0.0) + own.numpy().T
        return [errors]


def _steps(sums: Tensor) -> Tensor:
    """(n + 1, SUMS) → (n, _STEP): what steps added, and their mean mobilities ‖u‖²/Σ(u²/μ); 0 where nothing moved."""
    added = sums.diff(dim=0)
    squares, free, work = added[:, [SUMS.index(n) for n in ("squares", "free_squares", "work_action")]].T
    mobility = torch.where(work > 0, torch.where(free != 0, free, squares) / work, torch.zeros_like(work))
    return torch.cat([added, mobility[:, None]], 1)
