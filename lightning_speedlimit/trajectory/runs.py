"""The parameters of a vector: what is known of each, and the runs for which one formula with the same numbers holds."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_speedlimit.trajectory import mobility
from lightning_speedlimit.trajectory.coordinates import Coordinates
from lightning_speedlimit.trajectory.mobility import Formula


@dataclass
class Member:
    """One parameter: where it belongs, and what the meter knows of its steps."""

    group: int
    layer: str
    position: int  # in the whole run's parameter vector
    first: int | None  # its first coordinate here, in the whole parameter; None: they lie scattered there
    size: int  # of the whole parameter
    steps: int = 0  # that it took part in, those before it was measured included where they are known
    moved: bool = False  # in a measured step
    response: float | None = None  # b_k of momentum, where that is the mobility
    gone: bool = False  # it has left the optimizer
    known: bool = True  # its mobility has a formula; else the group's is "effective"
    options: dict[str, Any] = field(default_factory=dict)  # of its group, where that has gone too


@dataclass
class Run:
    """Neighbouring parameters of one group, all with a gradient or none of them, after equally many steps.

    lead: the first that has coordinates here; the optimizer's numbers of it (its step) are those of all. coarsest: the
    largest ε of their dtypes. coupled: w of an L2 term inside the gradient. decoupled: w of decay that is no force of
    the loss.
    """

    group: dict[str, Any]
    index: int
    members: range
    rows: slice
    formula: Formula | None
    missing: bool
    lead: Tensor
    coarsest: float
    flag: Any  # `decoupled_weight_decay`, of which this is made
    decays: Literal["coupled", "decoupled", "unknown"]
    coupled: float = 0.0
    decoupled: float = 0.0

    def weigh(self) -> None:
        """The group's weight decay as it is now."""
        known = not self.missing and self.decays != "unknown"  # else it may be anything
        weight = float(self.group.get("weight_decay") or 0.0) if known else 0.0
        self.coupled = weight if self.decays == "coupled" else 0.0
        self.decoupled = weight if self.decays == "decoupled" else 0.0

    @property
    def names(self) -> tuple[str, ...]:
        """The state entries that the formula reads at each coordinate."""
        return self.formula.coordinates(self.group) if self.formula else ()

    def is_current(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Its group is there, and decays as it did."""
        if self.group.get("decoupled_weight_decay") != self.flag:
            return False
        return self.index >= len(groups) or self.group is groups[self.index]


class Runs:
    """The runs of a motion, made anew only where something has changed."""

    def __init__(self, optimizer: Optimizer, coordinates: Coordinates, members: list[Member]) -> None:
        self._optimizer, self._coordinates, self._members = optimizer, coordinates, members
        self._found: list[Run] = []
        self._missing: list[int] | None = None
        self._counters: list[Any] = [None] * len(members)
        self._counts: list[Callable[[], float] | None] = [None] * len(members)

    def current(self, missing: list[int]) -> list[Run]:
        """missing: the parameters without a gradient."""
        groups = self._optimizer.param_groups
        if missing != self._missing or not all(run.is_current(groups) for run in self._found):
            self._missing = list(missing)
            self._found = self._made(groups, set(missing))
        for run in self._found:
            run.weigh()
        return self._found

    def recount(self, missing: list[int]) -> None:
        """After a step and before it is counted: how many the optimizer has counted of each parameter.

        A formula reads that number of one for all of a run, and the optimizer's state may be made anew, or loaded, of
        some parameters alone. Of a state that lies on a device the number is read where it is another tensor.
        """
        if not any(run.names and mobility.CUSTOM not in run.names for run in self._found):
            return
        counters = self._steps_taken()
        if not all(map(operator.is_, counters, self._counters)):
            self._look_at(counters)
        absent = set(missing)
        for i, (member, count) in enumerate(zip(self._members, self._counts, strict=True)):
            if count is not None and (taken := count()) != member.steps + 1 and i not in absent:
                member.steps = int(taken) - 1
                self.forget()

    def _steps_taken(self) -> list[Any]:
        """The entry of each parameter in the optimizer's state, as it is."""
        states = map(self._optimizer.state.get, self._coordinates.parameters)
        return [None if state is None else state.get("step") for state in states]

    def _look_at(self, counters: list[Any]) -> None:
        """Some of them are not those that were there."""
        for i, (step, known) in enumerate(zip(counters, self._counters, strict=True)):
            if type(step) is Tensor and step.device.type == "cpu":
                self._counts[i] = step.detach().numpy().item
            elif step is not known:
                self._counts[i] = None
                if known is not None and isinstance(step, Tensor):
                    self._members[i].steps = int(step) - 1
                    self.forget()
        self._counters = counters

    def count(self, run: Run, *, measured: bool) -> None:
        """The run's parameters take part in a step."""
        if run.missing:
            return
        members = self._members[run.members.start : run.members.stop]
        response = members[0].response  # of all of them, as the number of their steps
        if response is not None:
            response = mobility.next_momentum_response(run.group, response if members[0].steps else None)
        for member in members:
            member.steps += 1
            member.moved |= measured
            member.response = response

    def forget(self) -> None:
        """Parameters have come or gone."""
        self._missing = None

    def _made(self, groups: Sequence[dict[str, Any]], missing: set[int]) -> list[Run]:
        def key(i: int) -> tuple[Any, ...]:
            member = self._members[i]
            return member.group, member.gone, member.steps, member.response, member.known, i in missing

        found = []
        for _, neighbours in groupby(range(len(self._members)), key):
            here = list(neighbours)
            first = self._members[here[0]]
            group = groups[first.group] if first.group < len(groups) and not first.gone else first.options
            rows = slice(self._coordinates.rows[here[0]].start, self._coordinates.rows[here[-1]].stop)
            parameters = [self._coordinates.parameters[i] for i in here]
            found.append(
                Run(
                    group,
                    first.group,
                    range(here[0], here[-1] + 1),
                    rows,
                    mobility.formula(self._optimizer, group) if first.known else None,
                    here[0] in missing,
                    next((p for p in parameters if p.numel()), parameters[0]),
                    max(torch.finfo(p.dtype).eps for p in parameters),
                    group.get("decoupled_weight_decay"),
                    mobility.decays(self._optimizer, group),
                )
            )
        return found
