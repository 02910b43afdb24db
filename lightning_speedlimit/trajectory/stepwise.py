"""What is no sum over shards, or tells how sampled steps spread: taken in at each reading, step by step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_speedlimit.trajectory.joint import JointSteps
from lightning_speedlimit.trajectory.ranks import MOST, lengths_and_unevenness
from lightning_speedlimit.trajectory.run_totals import Error, SectionTotals, directions
from lightning_speedlimit.trajectory.sums import NEGATIVE, SUMS


class Stepwise:
    """Of all steps up to the last reading."""

    def __init__(self) -> None:
        self.path_length = 0.0  # of shards: Σ ‖u‖ of the whole
        self.no_path = ""  # why that is unknown
        self.uneven = False  # shards were clipped by several factors
        self.spread: Tensor | None = None  # Σ (x_j − x_{j−1})(x_j − x_{j−1})ᵀ of the sampled steps' sums
        self.sampled = 0
        self.mean_mobility = 0.0
        self.last: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        return vars(self) | {"last": list(self.last)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"last": list(state["last"])})

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
            self._fold_samples(list(samples.unbind()))
            if joint.samples.full:  # the next one is no neighbour
                self.last = []
            joint.samples.clear()

    def _fold_samples(self, rows: list[Tensor]) -> None:
        """rows: the sums before each measured step; differences are what the step before them added."""
        for row in rows:
            self.last.append(row)
            if len(self.last) < 2:
                continue
            step = _step(self.last[-2], self.last[-1])
            self.sampled, self.mean_mobility = self.sampled + 1, self.mean_mobility + float(step[-1])
            if len(self.last) == 3:
                apart = step - _step(self.last[0], self.last[1])
                outer = torch.outer(apart, apart)
                self.spread = outer if self.spread is None else self.spread + outer
                self.last.pop(0)

    def errors(self, sections: list[SectionTotals], joint: JointSteps) -> list[Error]:
        """K/J √(½ Σ (x_j − x_{j−1})² J/(J−1)): differences of neighbours, so that a trend is not taken for noise."""
        if joint.every == 1 or self.spread is None or self.sampled < 2 or not sections:
            return []
        count = self.sampled
        covariance = (joint.steps / count) ** 2 * 0.5 * self.spread * count / (count - 1)
        squares = sum(s.sums["squares"] for s in sections) or 1.0
        mobility = joint.steps / count * self.mean_mobility
        errors = []
        for column in directions(covariance):
            *changes, of_mobility = column.tolist()
            named = dict(zip(SUMS, changes, strict=True))
            named |= {name: -named[name] for name in NEGATIVE}
            named["work_ito"] = named["work_met"]
            relative = of_mobility / mobility if mobility else 0.0
            shares = {i: s.sums["squares"] / squares for i, s in enumerate(sections)}
            own = {i: {n: share * v for n, v in named.items()} for i, share in shares.items()}
            for i, section in enumerate(sections):
                own[i]["weighted"] = -relative * section.sums["weighted"]
            errors.append(Error(own))
        return errors


def _step(before: Tensor, after: Tensor) -> Tensor:
    """What a step added to the sums, and its mean mobility ‖u‖²/Σ(u²/μ); 0 where nothing moved."""
    sums = after - before
    free, work = sums[SUMS.index("free_squares")], sums[SUMS.index("work_action")]
    free = free if float(free) else sums[SUMS.index("squares")]
    mobility = free / work if float(work) > 0 else torch.zeros_like(work)
    return torch.cat([sums, mobility.reshape(1)])
