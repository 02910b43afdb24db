"""Which runs were measured from the same step of their trainings on: the others are cheaper for what is not counted."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_speedlimit.record.late import since
from lightning_speedlimit.report.runs import Run
from lightning_speedlimit.words import listed


def from_one_start(runs: Sequence[Run]) -> tuple[list[Run], tuple[str, ...]]:
    """The runs that were measured from their start on, and what is to be said of each of the others.

    Where none was, but all from one step on, all of them: what they lack is alike.

    Raises:
        ValueError: none was measured from its start on, and they begin at different steps.
    """
    begun = {since(run.record.run) for run in runs}
    if len(begun) == 1:
        return list(runs), ()
    told = [_told(run) for run in runs if since(run.record.run)]
    whole = [run for run in runs if not since(run.record.run)]
    if not whole:
        raise ValueError(
            f"runs must be measured from their start on, or all from one step, got {listed(told)}; resume from a "
            "checkpoint that has SpeedLimit's state, or compare those that begin at one step"
        )
    return whole, tuple(told)


def _told(run: Run) -> str:
    return f"{run.name} (measured only from step {since(run.record.run)} on)"
