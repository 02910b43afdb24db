"""One optimizer, followed step by step: its motions, which gradients count, and how they were clipped."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_speedlimit.trajectory import mobility
from lightning_speedlimit.trajectory.clipping import Change, Changes, GradientChanges, change, factor_of
from lightning_speedlimit.trajectory.coordinates import Coordinates, Vector, compute_dtype, dense
from lightning_speedlimit.trajectory.draw import Draw
from lightning_speedlimit.trajectory.marks import Marks
from lightning_speedlimit.trajectory.mobility import Scalar
from lightning_speedlimit.trajectory.motion import Motion
from lightning_speedlimit.trajectory.runs import Member
from lightning_speedlimit.trajectory.shards import first_coordinate, gradient_of, is_flat, replication

_PIECE = 1 << 20


class Follower:
    """`observe` (gradients) → `open` (θ_k) → `force` → (the update) → `close`.

    Args:
        changes: what changes gradients between `observe` and the step. response: momentum's mobility.
        per_rate: the action's clock is the learning rate. snapshots: steps are sampled, see Motion.
        draw: which coordinates are measured.
        place: the position of a parameter in the whole run's parameter vector. layer_of: the name under which a
            parameter's sums are kept apart, or None. others: parameters that other optimizers measure.
            gradient_elsewhere: whether any optimizer of the meter has a gradient now.
            processes: that hold shards of the parameters; 0: this one has them whole.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        changes: GradientChanges,
        response: bool,
        per_rate: bool,
        snapshots: bool,
        draw: Draw,
        place: Callable[[Tensor], int],
        layer_of: Callable[[Tensor], str] | None,
        others: set[int],
        gradient_elsewhere: Callable[[], bool],
        processes: int = 0,
    ) -> None:
        self.optimizer = optimizer
        self.motions: list[Motion] = []
        self.changes = Changes(changes)
        self._given: list[Vector] = []
        self.in_step = self.observed = False
        self.unforced: Tensor | None = None  # steps that moved weights without any gradient
        self.took_part = False  # in the last measured joint step
        self.nested = False  # its `step` calls another that torch hooks too
        self._response, self._per_rate, self._snapshots, self._draw = response, per_rate, snapshots, draw
        self._place, self._layer_of, self._processes = place, layer_of, processes
        self._others, self._gradient_elsewhere = others, gradient_elsewhere
        self._seen: set[int] = set()
        self._members: list[list[int]] = []  # of its groups, when last looked at
        self._opened = self._arrived = self._empty = self._wanted = self._taken = False
        self._marks, self._left = Marks(), Marks()  # of the gradients: when observed, when the last step ended
        self._weights = Marks()  # when `step` was entered
        self._entered: list[Tensor] = []  # gradients that were there when `step` was entered with a closure
        self._norms: Tensor | None = None
        self._scale: Scalar | None = None
        self._clip: Tensor | None = None

    # -- which parameters ------------------------------------------------------------------------------------

    def follow(self) -> bool:
        """Groups may be replaced, and parameters may come and leave. Returns whether any have."""
        groups = self.optimizer.param_groups
        members = [[id(p) for p in group["params"]] for group in groups]
        if members == self._members:
            return False
        self._members = members
        owner = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
        for motion in self.motions:
            for i, (member, parameter) in enumerate(zip(motion.members, motion.coordinates.parameters, strict=True)):
                index = owner.get(id(parameter))
                if index is None and not member.gone:
                    member.options = motion.runs.last_options(i) or member.options
                member.gone = index is None
                member.group = member.group if index is None else index
            motion.runs.forget()
        return True

    def discover(self) -> None:
        """Parameters that are there for the first time: θ is their θ_0."""
        if not self.follow() and not self._unseen():
            return
        new: dict[tuple[Any, ...], list[tuple[int, Tensor]]] = {}
        for index, parameter in self._unseen():
            key = compute_dtype(parameter), parameter.device
            new.setdefault(key, []).append((index, parameter))
            self._seen.add(id(parameter))
        for found in new.values():
            parameters = [p for _, p in found]
            shares = [1.0 / replication(p, self._processes) if self._processes else 1.0 for p in parameters]
            coordinates = Coordinates(parameters, *self._draw(parameters, map(gradient_of, parameters)), shares)
            self.take_in(coordinates, [self._member(index, p) for index, p in found])

    def _unseen(self) -> list[tuple[int, Tensor]]:
        return [
            (index, p)
            for index, group in enumerate(self.optimizer.param_groups)
            for p in dict.fromkeys(group["params"])
            if id(p) not in self._seen and id(p) not in self._others and self._ready(p)
        ]

    @staticmethod
    def _ready(parameter: Tensor) -> bool:
        if isinstance(parameter, torch.nn.UninitializedParameter) or (
            parameter.numel() == 0 and not is_flat(parameter)
        ):
            return False
        return parameter.requires_grad or parameter.grad is not None

    def _member(self, index: int, parameter: Tensor) -> Member:
        group = self.optimizer.param_groups[index]
        step = self.optimizer.state.get(parameter, {}).get("step", 0)
        member = Member(
            group=index,
            layer=self._layer_of(parameter) if self._layer_of else "",
            position=self._place(parameter),
            first=first_coordinate(parameter) if self._processes else 0,
            size=parameter.numel() * (2 if parameter.is_complex() else 1),
            steps=int(step) if not isinstance(step, Tensor) or step.device.type == "cpu" else 0,
            known=sum(p is parameter for p in group["params"]) == 1,
        )
        momentum = float(group.get("momentum", 0.0) or 0.0)
        formula = mobility.formula(self.optimizer, group)
        if self._response and formula is not None and not formula.coordinates(group) and 0.0 < momentum < 1.0:
            running = "momentum_buffer" in self.optimizer.state.get(parameter, {})
            member.response = (1.0 - float(group["dampening"])) / (1.0 - momentum) if running else 0.0
            member.steps = 1 if running else 0
        return member

    def take_in(self, coordinates: Coordinates, members: list[Member]) -> Motion:
        motion = Motion(self.optimizer, coordinates, members, per_rate=self._per_rate, snapshots=self._snapshots)
        if self._response:
            for run in motion.runs.current([]):
                if run.formula is not None and run.names and 0.0 < float(run.group.get("momentum", 0.0) or 0.0) < 1.0:
                    motion.mobility.start_response(run)
        self.motions.append(motion)
        if self.in_step and self._opened:  # it came with the closure
            motion.open()
        return motion

    # -- gradients -------------------------------------------------------------------------------------------

    def _gradients(self) -> list[Tensor | None]:
        return [g for motion in self.motions for g in motion.gradients()]

    def _parameters(self) -> list[Tensor]:
        return [p for motion in self.motions for p in motion.coordinates.parameters]

    def observe(self, scale: Scalar | None, *, measure: bool) -> None:
        """The gradients are raw now: before a step the last call counts, within it the first.

        Args:
            scale: what the gradients are multiplied by (a loss scaler's). measure: the step will be measured.
        """
        if self.observed and self.in_step:
            return
        if not self.in_step and self._norms is None and self.took_part and self.changes.mode != "given":
            self._norms = self.norms()  # of the step before, as long as its gradients are here
        self.discover()
        if self.in_step and not self._opened:
            self.open()
        self.observed, self._arrived, self._scale, self._clip = True, False, scale, None
        self._taken = False
        gradients = self._gradients()
        self._marks, self._empty = Marks(gradients), all(g is None for g in gradients)
        self._wanted = measure or any(motion.waiting for motion in self.motions)
        for motion in self.motions if self._wanted and self.changes.mode != "given" else ():
            motion.observe(motion.gradients(), scale)

    def has_new_gradients(self) -> bool:
        """A gradient has appeared or changed since the last look, or the last step."""
        gradients = self._gradients()
        if not self.motions:
            return any(p.grad is not None for group in self.optimizer.param_groups for p in group["params"])
        known = self._marks if self.observed else self._left
        return any(g is not None for g in gradients) and not known.hold(gradients)

    def open(self) -> None:
        """θ_k, before anything moves it."""
        self._opened = True
        for motion in self.motions:
            motion.open()
        self._weights = Marks(self._parameters())

    @property
    def has_moved(self) -> bool:
        """Within a step: weights have been moved (a version or an address tells; not through .data)."""
        return self.in_step and self._opened and not self._weights.hold(self._parameters())

    def force(self, *, seen_now: bool = False) -> None:
        """The gradients are what the optimizer will use: how they were changed, and −f of it.

        Args:
            seen_now: they have just been observed. Else they are compared: what was written through `.data` shows in
                the values alone.
        """
        if self._arrived or not self._wanted:
            return
        self._arrived = True
        self.changes.steps += not self._empty
        if self.changes.mode == "given":
            self._take_given()
        elif not (seen_now or self._empty):
            self.changes.by_others |= self._written_by_others()
            self._compare()
        for motion in self.motions:
            motion.force()

    def _written_by_others(self) -> bool:
        """More than clipping. (Under a TorchDispatchMode foreach operations, and clipping is one, leave no mark.)"""
        expected = self.changes.writes
        if expected is None or torch._C._len_torch_dispatch_stack():
            return False
        return self._marks.writes(self._gradients()) != expected

    def _take_given(self) -> None:
        if not self._taken:
            for motion in self.motions:
                motion.observe(motion.gradients(), self._scale)
        self._taken = True

    def _compare(self) -> None:
        for motion in self.motions[len(self._given) :]:
            self._given.append(motion.coordinates.vector())
        for motion, vector in zip(self.motions, self._given, strict=True):
            motion.coordinates.gather(motion.gradients(), vector)
            if self._scale is not None:
                vector.rows.div_(self._scale)
        given = [vector.rows for vector in self._given]
        found = self._change(given)
        self.changes.add(found)
        self._clip = found.factor
        if self.changes.mode == "clipping":
            return
        self._clip = torch.where(found.even, found.factor, 1.0)
        for motion, rows in zip(self.motions, given, strict=True):
            torch.where(found.even, motion.gradient.rows, rows, out=motion.gradient.rows)

    def _change(self, given: list[Tensor]) -> Change:
        rr = total([m.coordinates.fast_norm_squared(m.gradient.rows) for m in self.motions])
        ss = total([m.coordinates.fast_norm_squared(rows) for m, rows in zip(self.motions, given, strict=True)])
        factor = factor_of(rr, ss)
        rests = []
        for motion, rows in zip(self.motions, given, strict=True):
            rest = torch.mul(motion.gradient.rows, factor.to(rows)).sub_(rows)
            rests.append(motion.coordinates.fast_norm_squared(rest))
        coarse = any(p.dtype.itemsize < 4 for m in self.motions for p in m.coordinates.parameters)
        return change(rr, ss, total(rests), coarse)

    # -- within the step -------------------------------------------------------------------------------------

    def begin(self, *, closure: bool) -> None:
        """`step` was entered. Where gradients decide what is drawn, the first ones may come with the closure."""
        self.in_step, self._opened = True, False
        unseen = [p for _, p in self._unseen()]
        if closure and self._draw.samples(unseen) and all(p.grad is None for p in unseen):
            return
        self.discover()
        self.open()

    def remember_gradients(self, scale: Scalar | None) -> None:
        """Those that are there when `step` is entered, where they are new since the last one."""
        self._entered = []
        if not self._fresh():
            return
        for motion in self.motions:
            vector = motion.coordinates.vector()
            motion.coordinates.gather(motion.gradients(), vector)
            self._entered.append(vector.rows if scale is None else vector.rows.div_(scale))

    def _fresh(self) -> bool:
        gradients = self._gradients()
        return any(g is not None for g in gradients) and not self._left.hold(gradients)

    def after_closure(self, scale: Scalar | None, *, measure: bool) -> None:
        """The closure has been evaluated for the first time."""
        seen_before = self.observed
        self.observe(scale, measure=measure)
        if self._entered and self._wanted:
            if self.changes.mode == "given":
                self._take_given()
                seen_before = False
            self._choose(self._entered)
        self._entered = []
        self.force(seen_now=not seen_before)

    def _choose(self, known: list[Tensor]) -> None:
        """The gradient at θ_k: the closure's, but where weights had moved before it was evaluated the one before.

        (Optimizers of others may move them through .data: only their values tell. Zeros are no gradient.)
        """
        moved_already = self.has_moved
        for motion, rows in zip(self.motions, known, strict=False):
            there = (rows != 0).any()
            if not moved_already:
                now = motion.coordinates.vector()
                motion.coordinates.gather(motion.coordinates.parameters, now)
                there &= (now.rows != motion.before.rows).any()
            torch.where(there, rows, motion.gradient.rows, out=motion.gradient.rows)

    def finish(self, rates: list[Scalar], *, measure: bool) -> Tensor | None:
        """The step is over. False, on the device, where a fused optimizer found inf and left θ alone."""
        if not self.observed:  # no gradient came, not even within a closure
            self.observe(None, measure=measure)
        self.force()
        found = getattr(self.optimizer, "found_inf", None)
        valid = (found == 0).reshape(()) if isinstance(found, Tensor) else None
        moved = self._without_any_gradient() if measure and self._empty and self.motions else None
        at_once = self._wanted and (valid is not None or self._snapshots)  # later, the gradients are of another step
        known = self._norms_now(closed=False) if at_once and self.motions else None
        for motion in self.motions:
            motion.close(rates, self._clip, valid if moved is None else moved, measured=measure)
        if known is not None and valid is not None and self._norms is not None:
            known = torch.where(valid, known, self._norms)
        if self._wanted:
            self._norms = known
        if moved is not None:
            self.unforced = _plus(self.unforced, moved.to(self.motions[0].total))
        self.observed = self.in_step = self._opened = False
        self._left = Marks(self._gradients())
        return valid

    def _without_any_gradient(self) -> Tensor | None:
        """Whether weights moved all the same, on the device; None where other optimizers do have gradients.

        A batch without a loss is no step to speak of: the update before waits on. A batch that did not need these
        parameters is: the force on them was 0.
        """
        if self._gradient_elsewhere():
            return None
        moved = []
        for motion in self.motions:
            motion.coordinates.gather(motion.coordinates.parameters, motion.after)
            moved.append((motion.after.rows != motion.before.rows).any())
        return total(moved)

    def norms(self) -> Tensor | None:
        """‖g‖² before and after clipping, of the last step."""
        return self._norms if self._norms is not None or not self.motions else self._norms_now(closed=True)

    def norms_of_all(self) -> Tensor | None:
        """The same of all coordinates where some are drawn, as long as the gradients are there as they were used."""
        gradients = self._gradients()
        if self._norms is not None or not self._left.hold(gradients) or self._empty:
            return None
        used = total([squared(dense(g), self.motions[0].total) for g in gradients if g is not None])
        used = used if self._scale is None else used / self._scale**2
        return torch.stack([used if self._clip is None else used / self._clip**2, used])

    def has_moved_parameter(self, parameter: Tensor) -> bool:
        """It took part in a measured step."""
        members = [pair for m in self.motions for pair in zip(m.coordinates.parameters, m.members, strict=True)]
        return any(p is parameter and member.steps > 0 for p, member in members)

    def restore(self, norms: Tensor | None) -> None:
        """After motions have been loaded."""
        self._norms = norms
        self._seen = {id(p) for p in self._parameters()}
        self._draw.met(self._parameters())

    def mobility_of(self, parameter: Tensor) -> Tensor | None:
        """m of the measured steps, in the parameter's shape; NaN where no coordinate is measured. None: not here."""
        for motion in self.motions:
            for i, known in enumerate(motion.coordinates.parameters):
                if known is not parameter:
                    continue
                if not mobility.formula(self.optimizer, self.optimizer.param_groups[motion.members[i].group]):
                    name = type(self.optimizer).__name__
                    raise ValueError(
                        f"accumulated_mobility: {name} has no mobility formula; register_mobility gives it one"
                    )
                m = motion.mobility.m
                rows = torch.zeros_like(motion.start) if m is None else m.value(slice(None))
                return motion.coordinates.scatter(rows, i, elsewhere=math.nan)
        return None

    def _norms_now(self, *, closed: bool) -> Tensor:
        raw = total([self._norm(motion, closed) for motion in self.motions])
        return torch.stack([raw, raw if self._clip is None else raw * self._clip**2])

    @staticmethod
    def _norm(motion: Motion, closed: bool) -> Tensor:
        raw = motion.gradient.rows
        for run in motion.runs.current(motion.missing):
            if run.coupled:  # g = −f − wθ_k
                raw = raw.clone() if raw is motion.gradient.rows else raw
                here = run.rows
                theta = motion.after.rows[here] - motion.update[here] if closed else motion.before.rows[here]
                raw[here] -= run.coupled * theta
        return motion.coordinates.norm_squared(raw)


def squared(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ x² of a tensor of any size, piece by piece: without another one of its size."""
    pieces = [piece.to(compute_dtype(piece)) for piece in torch.split(values.reshape(-1), _PIECE)]
    return torch.stack([torch.sum(piece * piece).to(dtype) for piece in pieces]).sum()


def total(values: list[Tensor]) -> Tensor:
    """Σ over motions, which may lie on several devices."""
    found = values[0]
    for value in values[1:]:
        found = found + value.to(found.device, non_blocking=True)
    return found


def _plus(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total + term.to(total.device, non_blocking=True)
