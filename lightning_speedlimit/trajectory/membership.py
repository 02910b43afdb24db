"""Which parameters of an optimizer are measured: groups may be replaced, and parameters may come and leave."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_speedlimit.trajectory import mobility
from lightning_speedlimit.trajectory.coordinates import Coordinates
from lightning_speedlimit.trajectory.gathering import compute_dtype
from lightning_speedlimit.trajectory.motion import Motion
from lightning_speedlimit.trajectory.norms import total
from lightning_speedlimit.trajectory.runs import Member
from lightning_speedlimit.trajectory.settings import Settings, size_of
from lightning_speedlimit.trajectory.shards import first_coordinate, gradient_of, is_flat, replication


class Membership:
    """The motions of one optimizer's parameters."""

    def __init__(self, optimizer: Optimizer, settings: Settings) -> None:
        self.motions: list[Motion] = []
        self._optimizer, self._settings = optimizer, settings
        self._seen: set[int] = set()
        self._groups: list[list[Tensor]] = []  # their parameters, when last looked at
        self._held: list[dict[str, Any]] = []  # the groups themselves, then
        self._candidates: list[tuple[int, Tensor]] = []  # by group, those that have not been seen yet
        self._away: set[int] = set()  # of its own that another optimizer measures, by id

    def follow(self) -> None:
        """Groups may be replaced, and parameters may come and leave."""
        groups, held, known = self._optimizer.param_groups, self._held, self._groups
        self._held = list(groups)
        unchanged = len(known) == len(groups) and all(map(_alike, known, groups))
        if unchanged and not self._away:
            return
        away = self._anothers(p for group in groups for p in group["params"])
        if unchanged and away == self._away:
            return
        self._away = away
        self._groups = [list(group["params"]) for group in groups]
        self._candidates = self._unknown()
        places = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
        for motion in self.motions:
            for member, parameter in zip(motion.members, motion.coordinates.parameters, strict=True):
                index = places.get(id(parameter))
                gone = index is None or id(parameter) in away
                if gone and not member.gone:
                    member.options = {k: v for k, v in held[member.group].items() if k != "params"}
                elif member.gone and not gone:
                    self._settings.owners.take([parameter], self._optimizer)
                member.gone, member.group = gone, member.group if index is None else index
            motion.runs.forget()

    def newcomers(self) -> list[tuple[int, Tensor]]:
        """By group, the parameters that could be measured from now on."""
        self.follow()
        if not self._candidates:
            return []
        away = self._anothers(p for _, p in self._candidates)
        return [(index, p) for index, p in self._candidates if _ready(p) and id(p) not in away]

    def discover(self) -> list[Motion]:
        """Parameters that are there for the first time: θ is their θ_0. Returns their motions."""
        new: dict[tuple[Any, ...], list[tuple[int, Tensor]]] = {}
        for index, parameter in self.newcomers():
            new.setdefault((compute_dtype(parameter), parameter.device), []).append((index, parameter))
            self._seen.add(id(parameter))
            self._settings.owners.take([parameter], self._optimizer)
        made = []
        for found in new.values():
            parameters, processes = [p for _, p in found], self._settings.processes
            shares = [1.0 / replication(p, processes) if processes else 1.0 for p in parameters]
            drawn = self._settings.draw(parameters, map(gradient_of, parameters))
            made.append(self.take_in(Coordinates(parameters, *drawn, shares), [self._member(i, p) for i, p in found]))
        if new:
            self._candidates = self._unknown()
        return made

    def _unknown(self) -> list[tuple[int, Tensor]]:
        return [
            (index, p)
            for index, group in enumerate(self._optimizer.param_groups)
            for p in dict.fromkeys(group["params"])
            if id(p) not in self._seen
        ]

    def _anothers(self, parameters: Iterable[Tensor]) -> set[int]:
        return self._settings.owners.anothers(parameters, self._optimizer)

    def _member(self, index: int, parameter: Tensor) -> Member:
        group, settings = self._optimizer.param_groups[index], self._settings
        step = self._optimizer.state.get(parameter, {}).get("step", 0)
        member = Member(
            group=index,
            layer=settings.layer_of(parameter) if settings.layer_of else "",
            position=settings.place(parameter),
            first=first_coordinate(parameter) if settings.processes else 0,
            size=size_of(parameter),
            steps=int(step) if not isinstance(step, Tensor) or step.device.type == "cpu" else 0,
            known=sum(p is parameter for p in group["params"]) == 1,
        )
        momentum = _momentum(group)
        formula = mobility.formula(self._optimizer, group)
        if settings.response and formula is not None and not formula.coordinates(group) and 0.0 < momentum < 1.0:
            running = "momentum_buffer" in self._optimizer.state.get(parameter, {})
            member.response = (1.0 - float(group["dampening"])) / (1.0 - momentum) if running else 0.0
            member.steps = 1 if running else 0
        return member

    def take_in(self, coordinates: Coordinates, members: list[Member]) -> Motion:
        motion = Motion(self._optimizer, coordinates, members, self._settings)
        for run in motion.runs.current([]) if self._settings.response else ():
            if "square_avg" in run.names and 0.0 < _momentum(run.group) < 1.0:
                motion.mobility.start_response(run)
        self.motions.append(motion)
        return motion

    def places(self, parameter: Tensor) -> list[tuple[Motion, int]]:
        """The motions that hold a parameter, and its place there."""
        return [(m, i) for m in self.motions for i, known in enumerate(m.coordinates.parameters) if known is parameter]

    def has_moved(self, parameter: Tensor) -> bool:
        """It took part in a measured step."""
        return any(motion.members[i].moved for motion, i in self.places(parameter))

    def moved(self) -> Tensor:
        """Whether weights have been moved since they were gathered, on the device."""
        return total([(motion.now() != motion.theta.rows).any() for motion in self.motions])

    def accumulated_mobility(self, parameter: Tensor) -> Tensor | None:
        """m of the measured steps, in the parameter's shape; NaN where no coordinate is measured. None: not here."""
        for motion, i in self.places(parameter):
            if next(run for run in motion.runs.current(motion.missing) if i in run.members).formula is None:
                name = type(self._optimizer).__name__
                raise ValueError(
                    f"accumulated_mobility: {name} has no mobility formula; register_mobility gives it one"
                )
            return motion.mobility.of(i)
        return None

    def loaded(self) -> None:
        """Motions have been taken in from a saved state."""
        parameters = [p for motion in self.motions for p in motion.coordinates.parameters]
        self._seen, self._held = {id(p) for p in parameters}, list(self._optimizer.param_groups)
        members = [member for motion in self.motions for member in motion.members]
        measured = [p for p, member in zip(parameters, members, strict=True) if not member.gone]
        self._settings.owners.take(measured, self._optimizer)
        self._candidates = self._unknown()
        self._settings.draw.met(parameters)


def _ready(parameter: Tensor) -> bool:
    if isinstance(parameter, torch.nn.UninitializedParameter) or (parameter.numel() == 0 and not is_flat(parameter)):
        return False
    return parameter.requires_grad or parameter.grad is not None


def _alike(known: list[Tensor], group: dict[str, Any]) -> bool:
    parameters = group["params"]
    return len(known) == len(parameters) and all(map(operator.is_, known, parameters))


def _momentum(group: dict[str, Any]) -> float:
    return float(group.get("momentum", 0.0) or 0.0)
