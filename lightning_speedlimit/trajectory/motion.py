"""The motion of some parameters of one optimizer on one device: what is seen before its step and after it.

    observe   g ← the gradients                       (after backward, before clipping)
    open      θ_k; what has moved since the last step goes into θ_0, so that D is of the steps alone
    force     g ← ±g + wθ_k = −f; the update before meets it
    close     u = θ_{k+1} − θ_k;  ‖u‖², f·u, Σ u²/μ of each row;  m += μ where u ≠ 0

Nothing is read from the device, and there is no loop over parameters but where the lists are built. Vectors that
stay: θ, θ_0, u, g; one more for the gradient before where its overlap counts, two for m, two for decoupled decay, and
one where moves went into θ_0; three to work in, where there is no compiled pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_speedlimit.trajectory.accumulated import AccumulatedMobility, Answer
from lightning_speedlimit.trajectory.compiled import Step
from lightning_speedlimit.trajectory.coordinates import Coordinates
from lightning_speedlimit.trajectory.decay import Decay
from lightning_speedlimit.trajectory.mobility import Scalar
from lightning_speedlimit.trajectory.overlap import Overlap
from lightning_speedlimit.trajectory.runs import Member, Run, Runs
from lightning_speedlimit.trajectory.settings import Settings
from lightning_speedlimit.trajectory.shards import gradient_of
from lightning_speedlimit.trajectory.sums import RowSums, RunningSum, Term, cut, masked, sum_dtype


class Motion:
    """See the module.

    Args:
        members: of each of the coordinates' parameters, in their order. settings: of the meter; names of layers are
            added to its own.
    """

    def __init__(
        self, optimizer: Optimizer, coordinates: Coordinates, members: list[Member], settings: Settings
    ) -> None:
        self.optimizer, self.coordinates, self.members = optimizer, coordinates, members
        self.per_rate, self.snapshots = settings.per_rate, settings.snapshots
        self.theta, self.gradient = coordinates.vector(), coordinates.vector()  # θ_k; from `close` on θ_{k+1}
        self.start, self.update = coordinates.zeros(), coordinates.zeros()
        self.mobility = AccumulatedMobility(optimizer, coordinates, self.start)
        self.decay = Decay(coordinates, self.start, sampled=self.snapshots)
        self.overlap = Overlap(coordinates) if settings.overlaps else None
        self.closed = False  # the gradient is the last step's
        self.total = sum_dtype(coordinates.device)
        self.sums = RowSums(coordinates.weights, coordinates.unscaled, coordinates.passes)
        # Of each row; products as `coordinates.dots` makes them, scaled. last: −f·u of the update that waits.
        self.squares, self.work, self.anti, self.last, self._l2_drop = (coordinates.row() for _ in range(5))
        self._little = torch.finfo(coordinates.dtype).tiny * 1e8  # a norm below it is 0: its square was none
        self.waiting = False  # `update` has met no gradient yet
        self.missing: list[int] = []
        self.runs = Runs(optimizer, coordinates, members)
        self._met = False
        self.snapshot: Tensor | None = None  # of the sums before the last measured step's own
        self.gradient_squares: Tensor | None = None  # of each row, of the last step, where its gradients do not stay
        layers = settings.layers
        layers += [name for name in dict.fromkeys(m.layer for m in members) if name not in layers]
        self._layer = [layers.index(m.layer) for m in members]
        coordinates.gather(coordinates.parameters, self.theta)
        self.start.copy_(self.theta.rows)
        self.moves = Moves(coordinates, self.start)

    # -- before the step -------------------------------------------------------------------------------------

    def gradients(self) -> list[Tensor | None]:
        """Of each parameter; None of those that have left the optimizer."""
        members = zip(self.members, self.coordinates.parameters, strict=True)
        if self.coordinates.local:
            return [None if member.gone else p.grad for member, p in members]
        return [None if member.gone else gradient_of(p) for member, p in members]

    def observe(self, scale: Scalar | None) -> None:
        """g ← the gradients; scale: what they are multiplied by (a loss scaler's)."""
        if self.overlap is not None and self.closed:
            self.gradient, self.overlap.before = self.overlap.before, self.gradient
        self.closed = False
        gradients = self.gradients()
        self.missing = [i for i, g in enumerate(gradients) if g is None]
        self.coordinates.gather(gradients, self.gradient)
        if scale is not None:
            self.gradient.rows.div_(scale)

    def open(self) -> None:
        """θ_k; moves since the last step go into θ_0."""
        coordinates = self.coordinates
        if coordinates.holds(self.theta, coordinates.parameters):
            return
        now = coordinates.gather(coordinates.parameters, coordinates.room)
        self.moves.take_in(now - self.theta.rows)
        self.theta.rows.copy_(now)

    def force(self) -> None:
        """g ← −f = ±g + wθ_k, the upper sign unless the loss is maximized; the update that waits meets it."""
        runs = self.runs.current(self.missing)
        self.mobility.keep(runs)
        for run in runs:
            if run.group.get("maximize", False) and not run.missing:
                cut(self.gradient.rows, run.rows).neg_()
            if run.coupled:
                cut(self.gradient.rows, run.rows).add_(cut(self.theta.rows, run.rows), alpha=run.coupled)
        self._met = self.waiting
        if self.waiting:
            pairs = [(self.gradient.rows, self.update, self.anti)]
            self.coordinates.dots(pairs + (self.overlap.pairs(self.gradient) if self.overlap is not None else []))

    # -- after the step --------------------------------------------------------------------------------------

    def close(self, rates: list[Scalar], clip: Tensor | None, valid: Tensor | None, *, measured: bool) -> None:
        """θ_{k+1}; the step's sums go into the running ones.

        Args:
            rates: by group. clip: the factor of clipping by norm. valid: False where a fused optimizer found inf and
                left θ alone. measured: False: only the update before is still to be summed up.
        """
        self.moves.settled()
        terms = self._met_terms(valid, measured=measured)
        self.closed = True
        if self.overlap is not None:
            self.overlap.keep(self.gradient, valid, measured=measured)
        if not measured or self.snapshots:
            self.sums.add(terms)
            terms = []
        if not measured:
            self.coordinates.gather(self.coordinates.parameters, self.theta)
            self._count_unmeasured()
            return
        self.snapshot = self.sums.totals() if self.snapshots else None
        self.runs.recount(self.missing)
        runs = self.runs.current(self.missing)
        waited = self.update.clone() if valid is not None and self.waiting else None
        self.decay.begin(runs, self.theta.rows)
        answers = [self._answer(run, clip, valid) for run in runs]
        if valid is not None or not self._closed_at_once(runs, answers):
            self._close_by_operations(runs, answers, valid)
        for run, answer in zip(runs, answers, strict=True):
            terms += self._terms(run, answer, rates, valid)
        if self.mobility.m is not None:
            self.mobility.m.added()
        if valid is not None:
            self.squares.copy_(masked(self.squares, valid))
        self.sums.add([*terms, *self.decay.terms(self.sums, runs, valid), Term("squares", self.squares)])
        self._wait(valid)
        if waited is not None and valid is not None:
            torch.where(valid, self.update, waited, out=self.update)
        self.waiting = True

    def _met_terms(self, valid: Tensor | None, *, measured: bool) -> list[Term]:
        """f_k·u_k and f_{k+1}·u_k of the update that waited."""
        if not self._met:
            return []
        found = [Term("work_met", masked(self.last, valid)), Term("work_anti_ito", masked(self.anti, valid))]
        if self.overlap is not None:
            found += self.overlap.terms(valid)
        self._met, self.waiting = False, valid is not None
        if valid is not None and not measured:  # no update takes its place: it must not meet another gradient
            for waited in (self.update, self.last):
                torch.where(valid, torch.zeros_like(waited), waited, out=waited)
        return found

    def _terms(self, run: Run, answer: Answer | None, rates: list[Scalar], valid: Tensor | None) -> list[Term]:
        """What a run adds to the sums, but for what all runs do."""
        found, squares = list[Term](), cut(self.squares, run.rows)
        if run.coupled:
            found.append(Term("l2_drop", masked(cut(self._l2_drop, run.rows), valid), 0.5 * run.coupled, run.rows))
        free = self.decay.squares(run, squares)
        if answer is not None:
            work, factor = answer.work(free)
            found.append(Term("work_action", masked(work, valid), factor, run.rows))
        if self.per_rate:
            rate = rates[run.index] if run.index < len(rates) else 0.0  # of a group that is gone: it does not move
            found.append(Term("action", _over(masked(squares, valid), rate), rows=run.rows))
        return found

    def _count_unmeasured(self) -> None:
        """What a response so far remembers of a step that is not measured."""
        if self.mobility.averages is None and all(member.response is None for member in self.members):
            return
        for run in self.runs.current([i for i, g in enumerate(self.gradients()) if g is None]):
            self.runs.count(run, measured=False)
            if self.mobility.averages is not None and not run.missing:
                self.mobility.remember(run)

    def _answer(self, run: Run, clip: Tensor | None, valid: Tensor | None) -> Answer | None:
        """Of a run that takes part in the step, to its force; None where nothing is known of it."""
        self.runs.count(run, measured=True)
        if run.formula is None or run.missing or run.rows.start == run.rows.stop:  # a shard may have nothing of it
            return None
        return self.mobility.answer(run, clip, valid, self.members[run.members.start].response)

    def _closed_at_once(self, runs: list[Run], answers: Sequence[Answer | None]) -> bool:
        """In one pass over the rows of each run, where there is such a pass for all of them."""
        coordinates, passes = self.coordinates, self.coordinates.passes
        if passes is None or (parameters := passes.sources(coordinates.parameters)) is None:
            return False
        asked = []
        for run, answer in zip(runs, answers, strict=True):
            step = Step(scale=coordinates.scale, clip=1.0)
            step.take(theta=self.theta.rows, update=self.update, gradient=self.gradient.rows)
            step.take(squares=self.squares, work=self.work)
            known, averages = answer.ask(step) if answer is not None else (True, None)
            if not known or not self.decay.ask(step, run):
                return False
            if run.coupled:
                step.take(l2_drop=self._l2_drop)
            asked.append((run, averages, step))
        for run, averages, step in asked:
            passes.close_step(run.members, parameters, averages, step)
        return True

    def _close_by_operations(self, runs: list[Run], answers: Sequence[Answer | None], valid: Tensor | None) -> None:
        """u, ‖u‖² and −f·u; of decoupled decay the rest, and of an L2 term what it lost. θ_k gives way to θ_{k+1}."""
        coordinates, theta, update, gradient = self.coordinates, self.theta.rows, self.update, self.gradient.rows
        after = coordinates.gather(coordinates.parameters, coordinates.room)
        torch.sub(after, theta, out=update)
        coordinates.dots([(update, update, self.squares)])
        for run in runs:  # from here on the first scratch is 1 where u ≠ 0, else 0, of those with decoupled decay
            self.decay.take_out(run, update, theta, gradient, valid)
        coordinates.dots([(gradient, update, self.work)])
        if any(run.coupled for run in runs):  # ½w (‖θ_{k+1}‖² − ‖θ_k‖²) = ½w (θ_k + θ_{k+1})·u
            coordinates.dots([(theta + after, update, self._l2_drop)])
        theta.copy_(after)
        for run, answer in zip(runs, answers, strict=True):
            if answer is not None:
                answer.add(cut(update, run.rows), mask_ready=bool(run.decoupled))

    def _wait(self, valid: Tensor | None) -> None:
        """−f_k·u_k waits for the next gradient."""
        if valid is None:
            self.last, self.work = self.work, self.last
        else:
            self.last.copy_(torch.where(valid, self.work, self.last) if self.waiting else masked(self.work, valid))

    def share_path(self, squared: Tensor) -> None:
        """‖u‖²/‖u of all‖ of each row, now that ‖u of all‖² of the joint step is known."""
        if self.coordinates.on_host:
            share: Scalar = 1.0 / max(math.sqrt(squared), self._little)
        else:
            share = squared.sqrt().clamp_min(self._little).reciprocal()
        self.sums.add([Term("path_length", self.squares, share)])

    def layer_squares(self, number: int) -> Tensor:
        """‖u‖² of the last step in each of so many layers."""
        return self.coordinates.totals(self.squares, self._layer, number, self.coordinates.unscaled)

    def now(self) -> Tensor:
        """θ as it is."""
        return self.coordinates.gather(self.coordinates.parameters, self.coordinates.vector())


def _over(squared: Tensor, rate: Scalar) -> Tensor:
    """‖u‖²/lr: 0/0 counts 0 (a warm-up from 0); a motion without learning rate is undefined."""
    if isinstance(rate, Tensor):
        moved = torch.where(rate > 0, squared / rate, torch.full_like(squared, torch.nan))
    else:
        moved = squared / rate if rate > 0 else torch.full_like(squared, torch.nan)
    return torch.where(squared == 0, torch.zeros_like(squared), moved)


class Moves:
    """What moved θ outside of `step`, seen by its values, moves θ_0 along: D = ‖θ − θ_0‖ is of the steps alone.

    sums: of moves Σ 1 and Σ ‖move‖², and the latter of those that came before θ_0 was kept apart.
    origin: θ_0 as it was, where there have been any.
    """

    def __init__(self, coordinates: Coordinates, start: Tensor) -> None:
        self._coordinates, self._start = coordinates, start
        self.sums = RunningSum(3, device=coordinates.device)
        self.origin: Tensor | None = None
        self.settled()

    def settled(self) -> None:
        """A step has ended: writes to the weights count from here on."""
        self._version = self._written()

    def take_in(self, moved: Tensor) -> None:
        """(rows, width), what the move was."""
        coordinates = self._coordinates
        if coordinates.on_host and not any(torch.aminmax(moved)):
            return  # on a device, looking would wait for it
        if self.origin is None and (coordinates.on_host or self._written() != self._version):
            self.origin = self._start.clone()
        self._start.add_(moved)
        total = coordinates.fast_norm_squared(moved)
        self.sums.add_(torch.stack([total.sign(), total, total * (self.origin is None)]))

    def _written(self) -> int:
        """Grows with each write to the parameters (not through .data); 0 where the values themselves tell of moves."""
        if self._coordinates.on_host or self.origin is not None:
            return 0
        return sum(p._version for p in self._coordinates.parameters)
