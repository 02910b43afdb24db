"""One optimizer, followed step by step: which gradients count, how they were changed, what the step did."""

from __future__ import annotations

from itertools import zip_longest

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_speedlimit.trajectory.clipping import Changes
from lightning_speedlimit.trajectory.gathering import Vector
from lightning_speedlimit.trajectory.marks import Marks
from lightning_speedlimit.trajectory.membership import Membership
from lightning_speedlimit.trajectory.mobility import Scalar
from lightning_speedlimit.trajectory.norms import gradient_squares, norms_as_used, norms_observed, total
from lightning_speedlimit.trajectory.optimizers import parameters_of
from lightning_speedlimit.trajectory.settings import Settings

LOOKS = "_changes_nothing"  # an attribute of meters' hooks


class Follower:
    """`observe` (gradients) → `open` (θ_k) → `force` → (the update) → `close`."""

    def __init__(self, optimizer: Optimizer, settings: Settings) -> None:
        self.optimizer, self._settings = optimizer, settings
        self.membership = Membership(optimizer, settings)
        self.motions = self.membership.motions
        self.changes = Changes(settings.changes)
        self._given: list[Vector] = []
        self.in_step = self.observed = self.stepped = False
        self.hook = 0  # the number of the hook in which its gradients are looked at
        self._looked: Marks | None = None  # the gradients then, where other hooks come later
        self.unforced: Tensor | None = None  # steps that moved weights without any gradient
        self.took_part = False  # in the last measured joint step
        self.nested = False  # its `step` calls another that torch hooks too
        self._opened = self._arrived = self._empty = self._wanted = False
        self._marks, self._left = Marks(), Marks()  # of the gradients: when observed, when the last step ended
        self._weights = Marks()  # when `step` was entered
        self._entered: list[Tensor] = []  # gradients that were there when `step` was entered with a closure
        self._norms: Tensor | None = None  # of the last step, where its gradients do not stay
        self._scale: Scalar | None = None
        self._clip: Tensor | None = None

    def discover(self) -> None:
        """Parameters that are there for the first time are measured from now on."""
        for motion in self.membership.discover():
            if self.in_step and self._opened:  # it came with the closure
                motion.open()

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
        if not self.in_step and self._norms is None and self.took_part and self.changes.mode != "given":
            self._norms = self.norms()  # of the step before, as long as its gradients are here
        if self.in_step and not self._opened:
            self.open()
        elif not (self.in_step and self.observed):
            self.discover()
        if self.observed and self.in_step and (self._wanted or not measure):
            return
        self.observed, self._arrived, self._scale, self._clip = True, False, scale, None
        gradients = self._gradients()
        self._marks, self._empty = Marks(gradients), all(g is None for g in gradients)
        self._wanted = measure or any(motion.waiting for motion in self.motions)
        if self._wanted and (self.in_step or self.changes.mode != "given"):
            self._take()

    def _take(self) -> None:
        for motion in self.motions:
            motion.observe(self._scale)

    def has_new_gradients(self) -> bool:
        """A gradient has appeared or changed since the last look, or the last step."""
        gradients = self._gradients()
        if not self.motions:
            return any(p.grad is not None for p in parameters_of([self.optimizer]))
        known = self._marks if self.observed else self._left
        return any(g is not None for g in gradients) and not known.hold(gradients)

    def open(self) -> None:
        """θ_k, before anything moves it."""
        self.discover()
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
            seen_now: they have just been observed. Else they are taken, or compared: what was written through `.data`
                shows in the values alone.
        """
        if self._arrived or not self._wanted:
            return
        self._arrived = True
        self.changes.steps += not self._empty
        if not seen_now and self.changes.mode == "given":
            self._take()
        elif not (seen_now or self._empty):
            self.changes.by_others |= self._written_by_others()
            self._compare()
        for motion in self.motions:
            motion.force()

    def look_again(self) -> None:
        """After the step: hooks that come later than the meter's may have changed what the optimizer was given."""
        for number, hook in reversed(self.optimizer._optimizer_step_pre_hooks.items()):
            if number == self.hook:
                return
            if not hasattr(hook, LOOKS):
                self._looked = Marks(self._gradients())
                return

    def _written_by_others(self) -> bool:
        """More than clipping. (Under a TorchDispatchMode foreach operations, and clipping is one, leave no mark.)"""
        expected = self.changes.writes
        if expected is None or torch._C._len_torch_dispatch_stack():
            return False
        return not self._marks.hold(self._gradients(), expected)

    def _compare(self) -> None:
        if self._scale is None and all(m.coordinates.holds(m.gradient, m.gradients()) for m in self.motions):
            return  # on the host: they are what was observed
        for motion in self.motions[len(self._given) :]:
            self._given.append(motion.coordinates.vector())
        for motion, vector in zip(self.motions, self._given, strict=True):
            motion.coordinates.gather(motion.gradients(), vector)
            if self._scale is not None:
                vector.rows.div_(self._scale)
        given = [vector.rows for vector in self._given]
        even, factor = self.changes.add(self.motions, given)
        self._clip = factor
        if self.changes.mode == "clipping":
            return
        self._clip = torch.where(even, factor, 1.0)
        for motion, rows in zip(self.motions, given, strict=True):
            torch.where(even, motion.gradient.rows, rows, out=motion.gradient.rows)

    # -- within the step -------------------------------------------------------------------------------------

    def begin(self, *, closure: bool) -> None:
        """`step` was entered. Where gradients decide what is drawn, the first ones may come with the closure."""
        self.in_step, self._opened, self.stepped = True, False, True
        if closure:
            unseen = [p for _, p in self.membership.newcomers()]
            if any(p.grad is not None for p in unseen) or not self._settings.draw.samples(unseen):
                self.open()

    def remember_gradients(self, scale: Scalar | None) -> None:
        """Those that are there when `step` is entered, where they are new since the last one."""
        self._entered = []
        for motion in self.motions if self.has_new_gradients() else ():
            vector = motion.coordinates.vector()
            motion.coordinates.gather(motion.gradients(), vector)
            self._entered.append(vector.rows if scale is None else vector.rows.div_(scale))

    def after_closure(self, scale: Scalar | None, *, measure: bool) -> None:
        """The closure has been evaluated for the first time."""
        seen_before = self.observed
        self.observe(scale, measure=measure)
        if self._entered and self._wanted:
            if seen_before and self.changes.mode == "given":
                self._take()
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
                there &= (now.rows != motion.theta.rows).any()
            torch.where(there, rows, motion.gradient.rows, out=motion.gradient.rows)

    def finish(self, rates: list[Scalar], *, measure: bool) -> Tensor | None:
        """The step is over. False, on the device, where a fused optimizer found inf and left θ alone."""
        if not self.observed:  # no gradient came, not even within a closure
            self.observe(None, measure=measure)
        self.force()
        if self._looked is not None:
            self.changes.late |= not self._looked.hold(self._gradients())
            self._looked = None
        found = getattr(self.optimizer, "found_inf", None)
        valid = (found == 0).reshape(()) if isinstance(found, Tensor) else None
        # A batch without a loss is no step to speak of: the update before waits on, unless weights moved all the same.
        # A batch that did not need these parameters, but others of the meter, is: the force on them was 0.
        moved = None
        if self._wanted and self._empty and self.motions:
            elsewhere = any(p.grad is not None for p in parameters_of(self._settings.optimizers))
            moved = None if elsewhere else self.membership.moved()
        # Later, the gradients are of another step.
        at_once = self._wanted and (valid is not None or self._settings.snapshots)
        squares = [gradient_squares(motion, closed=False) for motion in self.motions] if at_once else []
        known = norms_observed(self.motions, squares, self._clip) if squares else None
        if self._wanted:
            self._keep(squares, valid)
        for motion in self.motions:
            motion.close(rates, self._clip, valid if moved is None else moved, measured=measure)
        if known is not None and valid is not None and self._norms is not None:
            known = torch.where(valid, known, self._norms)
        if self._wanted:
            self._norms = known
        if moved is not None:
            moved = moved.to(self.motions[0].total)
            self.unforced = moved if self.unforced is None else total([self.unforced, moved])
        self.observed = self.in_step = self._opened = False
        self._left = Marks(self._gradients())
        return valid

    def _keep(self, squares: list[Tensor], valid: Tensor | None) -> None:
        """For the error of the norms of drawn coordinates, where gradients do not stay: not those of a skipped step."""
        for motion, now in zip_longest(self.motions, squares):
            before, motion.gradient_squares = motion.gradient_squares, None if motion.coordinates.exact else now
            if before is not None and now is not None and valid is not None:
                motion.gradient_squares = torch.where(valid, now, before)

    # -- what is known of the last step ------------------------------------------------------------------------

    def norms(self) -> Tensor | None:
        """‖g‖² before and after clipping, of the last step."""
        if self._norms is not None or not self.motions:
            return self._norms
        return norms_observed(self.motions, [gradient_squares(m, closed=True) for m in self.motions], self._clip)

    def norms_of_all(self) -> Tensor | None:
        """The same of all coordinates where some are drawn, as long as the gradients are there as they were used."""
        gradients = self._gradients()
        if self._norms is not None or not self._left.hold(gradients) or self._empty:
            return None
        return norms_as_used(gradients, self._scale, self._clip, self.motions[0].total)

    def restore(self, norms: Tensor | None) -> None:
        """After motions have been loaded."""
        self._norms = norms
        self.membership.loaded()
