"""What a comparison comes to: its fields, and who is ahead."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_speedlimit.report.alignment import By
from lightning_speedlimit.report.clouds import GroupDistance
from lightning_speedlimit.report.costs import Axis
from lightning_speedlimit.report.levels import Level
from lightning_speedlimit.report.places import Group
from lightning_speedlimit.report.ranking import winner
from lightning_speedlimit.words import number


@dataclass(frozen=True)
class Result:
    """Runs at one loss, step or time, and what follows.

    τ·A ≥ D²: steps trade against action, so at the same loss one group beats another when it took less of both
    (the plane of cost and action); where their intervals overlap no winner is named.
    """

    by: By
    at: float
    """The loss, step or second at which the runs are compared."""
    set_by: str | None
    """The run that `at` was taken from, for it got no further; None: it was asked for, or all got lower."""
    axis: Axis
    """What is counted as cost."""
    groups: tuple[Group, ...]
    """In the order of their ranking: by cost at the same loss, by loss at the same step or time."""
    at_loss: tuple[Group, ...]
    """The groups at the same loss, for the plane; those of `groups` where `by` is "loss", empty without losses."""
    loss_level: float
    """The loss of `at_loss`; NaN without."""
    levels: tuple[Level, ...] = ()
    """The order of the groups early, midway and at `loss_level`."""
    distances: tuple[GroupDistance, ...] = ()
    """W₂ between the clouds of groups that have replicas with sketches."""
    notes: tuple[str, ...] = ()
    """What to beware of."""
    late: tuple[str, ...] = ()
    """Runs that are left out, as they were measured only from a later step on than the others: name and step."""

    @property
    def winner(self) -> str | None:
        """The first of the ranking, where its interval does not overlap with any other's; else None.

        A run that did not get to the loss is not behind before it took more steps than the first.
        """
        return winner(self.groups, self.by)

    @property
    def frontier(self) -> tuple[str, ...]:
        """The groups that are beaten by none at the same loss, from the fastest to the cheapest."""
        return tuple(group.name for group in self.at_loss if group.placed and group.beaten_by is None)

    @property
    def reach(self) -> str:
        """ "to loss 0.138": up to where the values of the groups are."""
        unit = {"loss": "to loss {}", "step": "to step {}", "time": "to second {}"}[self.by]
        return unit.format(number(self.at))

    @property
    def where(self) -> str:
        """ "at the same loss, 0.138"."""
        unit = {"loss": "at the same loss, {}", "step": "after {} steps", "time": "after {} seconds"}[self.by]
        return unit.format(number(self.at))
