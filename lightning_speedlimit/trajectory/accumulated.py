"""m, what each coordinate's mobility adds up to, and Σ u²/μ: the optimizer's state, read after each step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_speedlimit.trajectory import mobility
from lightning_speedlimit.trajectory.coordinates import Coordinates, Vector
from lightning_speedlimit.trajectory.mobility import Scalar
from lightning_speedlimit.trajectory.runs import Run
from lightning_speedlimit.trajectory.shards import local
from lightning_speedlimit.trajectory.sums import Pair


class AccumulatedMobility:
    """m_i = Σ_{k: u_{k,i} ≠ 0} μ_{k,i}, for one vector.

    Args:
        spare: a vector that is free after the step, for the state; a second one is made where it is needed.
    """

    def __init__(self, optimizer: Optimizer, coordinates: Coordinates, spare: Vector, like: Tensor) -> None:
        self._optimizer, self._coordinates = optimizer, coordinates
        self._spare = [spare]
        self._like = like
        self.m: Pair | None = None
        self._kept: Vector | None = None  # a state entry as it was before the step
        self._work: Tensor | None = None  # Σ u²/μ of each row, of the last step
        self.averages: Tensor | None = None  # B_k of RMSprop with momentum, where the response is its mobility

    def keep(self, runs: list[Run]) -> None:
        """Before the step: the entries that are needed as they are now."""
        for run in runs:
            if run.formula is not None and run.formula.before is not None:
                self._kept = self._kept or self._coordinates.vector()
                self._gather(run, run.formula.before, self._kept)

    def add(
        self, run: Run, update: Tensor, free: Tensor, scratch: tuple[Tensor, Tensor], clip: Tensor | None,
        valid: Tensor | None, response: float | None,
    ) -> tuple[Tensor, float]:  # fmt: skip
        """m += μ where u ≠ 0; returns Σ u²/μ of the run's rows, as `Coordinates.dot` scales it, and a factor to it.

        Args:
            update, free: of all rows; u without decoupled decay and its squares. scratch: room for two stretches.
            clip: c of clipping by norm. valid: False where a fused optimizer left θ alone. response: b_k.
        """
        assert run.formula is not None
        self.m = self.m or Pair(self._like)
        if not run.names:
            return self._add_shared(run, update, free, scratch[0], clip, valid, response)
        if not run.stretches:  # shards of no coordinate
            return free, 1.0
        entries, cut = self._entries(run), self._coordinates.cut
        state = self._optimizer.state.get(run.lead, {})
        factor = 1.0
        self._work = self._coordinates.row() if self._work is None else self._work
        for rows in run.stretches:
            moved, out = (cut(room, slice(0, rows.stop - rows.start)) for room in scratch)
            u, own = cut(update, rows), {name: cut(vector, rows) for name, vector in entries.items()}
            numerator = run.formula.evaluate(run.group, state, own, out)
            if clip is not None:
                out.div_(clip)
            if isinstance(numerator, Tensor):  # a rate of 0 moves nothing: what it is divided by does not matter
                out.div_(torch.where(numerator == 0, torch.ones_like(numerator), numerator))
                numerator = 1.0
            if valid is not None:  # a skipped first step leaves a state of zeros: 0/0
                torch.where(valid, out, torch.ones_like(out), out=out)
            cut(self.m.low, rows).addcdiv_(torch.ne(u, 0.0, out=moved), out, value=numerator)
            self._coordinates.dot(out.mul_(u), u, moved, cut(self._work, rows))
            factor = 1.0 / numerator if numerator else 0.0
        return cut(self._work, run.rows), factor

    def _add_shared(
        self, run: Run, update: Tensor, free: Tensor, scratch: Tensor, clip: Tensor | None, valid: Tensor | None,
        response: float | None,
    ) -> tuple[Tensor, float]:  # fmt: skip
        """One μ for all coordinates."""
        assert run.formula is not None
        assert self.m is not None
        mu: Scalar = run.formula.evaluate(
            run.group, {} if response is None else {mobility.RESPONSE: response}, {}, None
        )
        mu = mu if clip is None else mu * clip
        if valid is not None and isinstance(mu, Tensor):  # a skipped step's gradients, and c of them, are not finite
            mu = torch.where(valid, mu, torch.zeros_like(mu))
        cut = self._coordinates.cut
        for rows in run.stretches:
            moved = torch.ne(cut(update, rows), 0.0, out=cut(scratch, slice(0, rows.stop - rows.start)))
            low = cut(self.m.low, rows)
            low.addcmul_(moved, mu.to(low.dtype)) if isinstance(mu, Tensor) else low.add_(moved, alpha=mu)
        if isinstance(mu, Tensor):
            return torch.where(free == 0, torch.zeros_like(free), free / mu), 1.0
        return free, 1.0 / mu if mu else 0.0

    def of(self, i: int) -> Tensor:
        """m of the measured steps of parameter i, in its shape; NaN where no coordinate is measured."""
        rows = torch.zeros_like(self._like) if self.m is None else self.m.value(slice(None))
        return self._coordinates.scatter(rows, i, elsewhere=torch.nan)

    def _entries(self, run: Run) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name in run.names:
            if run.formula is not None and name == run.formula.before and self._kept is not None:
                found[name] = self._kept.rows
                continue
            if len(found) == len(self._spare):
                self._spare.append(self._coordinates.vector())
            into = self._spare[len(found)]
            found[name] = self._custom(run, into) if name == mobility.CUSTOM else self._gather(run, name, into)
        if self.averages is not None:
            found[mobility.RESPONSE] = self.averages
        return found

    def _gather(self, run: Run, name: str, into: Vector) -> Tensor:
        parameters = self._coordinates.parameters[run.members.start : run.members.stop]
        entries = [self._optimizer.state.get(p, {}).get(name) for p in parameters]
        return self._coordinates.gather([e if isinstance(e, Tensor) else None for e in entries], into, run.members)

    def _custom(self, run: Run, into: Vector) -> Tensor:
        """What a registered function says, spread over each parameter's shape."""
        function = mobility.registered(self._optimizer)
        assert function is not None
        values: list[Tensor | None] = []
        for i in run.members:
            parameter, shape = self._coordinates.parameters[i], self._coordinates.shapes[i]
            value: Any = function(self._optimizer, run.group, parameter)
            if not isinstance(value, Tensor):
                value = torch.full((), value, dtype=into.rows.dtype, device=into.rows.device)
            values.append(local(value).detach().to(into.rows).expand(shape))
        return self._coordinates.gather(values, into, run.members)

    def remember(self, run: Run, scratch: Tensor) -> None:
        """B_k of a step that is not measured."""
        if run.formula is None or not run.names or self.averages is None:
            return
        entries, cut = self._entries(run), self._coordinates.cut
        for rows in run.stretches:
            own = {name: cut(vector, rows) for name, vector in entries.items()}
            run.formula.evaluate(run.group, {}, own, cut(scratch, slice(0, rows.stop - rows.start)))

    def start_response(self, run: Run) -> None:
        """B of a fresh optimizer is 0; of one that has been running, the steady value."""
        if self.averages is None:
            self.averages = torch.zeros_like(self._like)
        if self._optimizer.state.get(run.lead, {}).get("momentum_buffer") is None:
            return
        entries = self._entries(run)
        average = entries["square_avg"]
        if run.group["centered"]:
            average = average - entries["grad_avg"] ** 2
        steady = 1.0 / ((1.0 - float(run.group["momentum"])) * (average.sqrt() + run.group["eps"]))
        self.averages[run.rows] = steady[run.rows]
