"""m, what each coordinate's mobility adds up to, and Σ u²/μ: the optimizer's state, read after each step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_speedlimit.trajectory import mobility
from lightning_speedlimit.trajectory.compiled import Sources, Step
from lightning_speedlimit.trajectory.coordinates import Coordinates
from lightning_speedlimit.trajectory.gathering import Vector
from lightning_speedlimit.trajectory.mobility import Root, Scalar, number
from lightning_speedlimit.trajectory.runs import Run
from lightning_speedlimit.trajectory.shards import local
from lightning_speedlimit.trajectory.sums import Pair, cut


class AccumulatedMobility:
    """m_i = Σ_{k: u_{k,i} ≠ 0} μ_{k,i}, for one vector."""

    def __init__(self, optimizer: Optimizer, coordinates: Coordinates, like: Tensor) -> None:
        self.optimizer, self.coordinates = optimizer, coordinates
        self.m: Pair | None = None
        self.averages: Tensor | None = None  # B_k of RMSprop with momentum, where the response is its mobility
        self.work = coordinates.row()  # Σ u²/μ of each row, of the last step
        self._like = like
        self._rooms: dict[str, Vector] = {}  # of what has been gathered of the state, but for one entry

    def keep(self, runs: list[Run]) -> None:
        """Before the step: the entries that are needed as they are now."""
        for run in runs:
            if run.formula is not None and run.formula.before is not None:
                self._gather(run, run.formula.before)

    def answer(self, run: Run, clip: Tensor | None, valid: Tensor | None, response: float | None) -> Answer:
        """The run's answer to the force of this step.

        Args:
            clip: c of clipping by norm. valid: False where a fused optimizer left θ alone. response: b_k.
        """
        self.m = self.m or Pair(self._like)
        return Answer(self, run, self.m, clip, valid, response)

    def of(self, i: int) -> Tensor:
        """m of the measured steps of parameter i, in its shape; NaN where no coordinate is measured."""
        rows = torch.zeros_like(self._like) if self.m is None else self.m.value()
        return self.coordinates.scatter(rows, i, elsewhere=torch.nan)

    def entries(self, run: Run) -> dict[str, Tensor]:
        """What the formula reads of the state at each of the run's coordinates."""
        assert run.formula is not None
        found = {}
        for i, name in enumerate(run.names):
            if name == run.formula.before:
                found[name] = cut(self._rooms[name].rows, run.rows)
            else:
                found[name] = self._gather(run, name, self.coordinates.room if i == 0 else None)
        if self.averages is not None:
            found[mobility.RESPONSE] = self.averages[run.rows]
        return found

    def _gather(self, run: Run, name: str, room: Vector | None = None) -> Tensor:
        own = self._custom(run) if name == mobility.CUSTOM else self.state(run, name)
        if room is None:
            room = self._rooms[name] = self._rooms.get(name) or self.coordinates.vector()
        self.coordinates.gather(own, room, run.members.start)
        return cut(room.rows, run.rows)

    def state(self, run: Run, name: str) -> list[Tensor | None]:
        """An entry of the optimizer's state, of each of the run's parameters."""
        parameters = self.coordinates.parameters[run.members.start : run.members.stop]
        entries = (self.optimizer.state.get(p, {}).get(name) for p in parameters)
        return [entry if isinstance(entry, Tensor) else None for entry in entries]

    def _custom(self, run: Run) -> list[Tensor | None]:
        """What a registered function says, spread over each parameter's shape."""
        function = mobility.registered(self.optimizer)
        assert function is not None
        found: list[Tensor | None] = []
        for i in run.members:
            value: Any = function(self.optimizer, run.group, self.coordinates.parameters[i])
            if not isinstance(value, Tensor):
                value = torch.full((), value, dtype=self._like.dtype, device=self._like.device)
            found.append(local(value).detach().to(self._like).expand(self.coordinates.shapes[i]))
        return found

    def remember(self, run: Run) -> None:
        """B_k of a step that is not measured."""
        if run.formula is None or not run.names:
            return
        write = run.formula.evaluate(run.group, {})[1]
        assert write is not None
        write(self.entries(run), cut(self.coordinates.scratch[1], run.rows))

    def start_response(self, run: Run) -> None:
        """B of a fresh optimizer is 0; of one that has been running, the steady value."""
        if self.averages is None:
            self.averages = torch.zeros_like(self._like)
        if self.optimizer.state.get(run.lead, {}).get("momentum_buffer") is None:
            return
        here, lasting = self.entries(run), 1.0 - float(run.group["momentum"])
        average = here["square_avg"]
        if run.group["centered"]:
            average = average - here["grad_avg"] ** 2
        self.averages[run.rows] = 1.0 / (lasting * (average.sqrt() + run.group["eps"]))


class Answer:
    """A run's answer to the force of one step: m += μ where u ≠ 0, and Σ u²/μ."""

    def __init__(
        self, known: AccumulatedMobility, run: Run, m: Pair, clip: Tensor | None, valid: Tensor | None,
        response: float | None,
    ) -> None:  # fmt: skip
        assert run.formula is not None
        self._known, self._run, self._m, self._clip, self._valid = known, run, m, clip, valid
        state = known.optimizer.state.get(run.lead, {}) if run.names else {mobility.RESPONSE: response}
        numerator, self._write = run.formula.evaluate(run.group, state)
        self._divisor: Tensor | None = None  # of the denominators, where the numerator is a tensor
        self._numerator = 1.0
        if self._write is None:
            self._mu = self._shared(numerator)
        elif isinstance(numerator, Tensor):  # a rate of 0 moves nothing: what it is divided by does not matter
            self._divisor = torch.where(numerator == 0, torch.ones_like(numerator), numerator)
        else:
            self._numerator = numerator

    def _shared(self, mu: Scalar) -> Scalar:
        """One μ for all coordinates."""
        mu = mu if self._clip is None else mu * self._clip
        if self._valid is not None and isinstance(mu, Tensor):  # a skipped step's gradients, and c, are not finite
            mu = torch.where(self._valid, mu, torch.zeros_like(mu))
        return mu

    def add(self, update: Tensor, *, mask_ready: bool) -> None:
        """update: at the run's rows. mask_ready: the first scratch holds 1 where u ≠ 0, else 0."""
        coordinates, rows = self._known.coordinates, self._run.rows
        moved, out, low, work = (cut(x, rows) for x in (*coordinates.scratch, self._m.low, self._known.work))
        if not mask_ready:
            torch.ne(update, 0.0, out=moved)
        if self._write is not None:
            self._write(self._known.entries(self._run), out)
            self._complete(out)
            low.addcdiv_(moved, out, value=self._numerator)
            coordinates.dots([(out.mul_(update), update, work)])
        elif isinstance(self._mu, Tensor):
            low.addcmul_(moved, self._mu.to(low.dtype))
        else:
            low.add_(moved, alpha=self._mu)

    def ask(self, step: Step) -> tuple[bool, Sources | None]:
        """The same of a compiled pass: whether there is one, and where the averages lie that it needs."""
        step.take(mobility=self._m.low)
        if self._write is None:
            step.numerator = number(self._mu)
            return True, None
        if self._divisor is not None or not isinstance(self._write, Root) or isinstance(self._write.epsilon, Tensor):
            return False, None
        passes, run = self._known.coordinates.passes, self._run
        averages = self._known.state(run, self._write.entry)
        found = None if passes is None else passes.sources(averages, run.members.start)
        step.numerator, step.epsilon = self._numerator, self._write.epsilon
        step.clip = 1.0 if self._clip is None else float(self._clip)
        step.take(action_work=self._known.work)
        return found is not None, found

    def _complete(self, out: Tensor) -> None:
        """The denominators of μ = numerator / out."""
        if self._clip is not None:
            out.div_(self._clip)
        if self._divisor is not None:
            out.div_(self._divisor)
        if self._valid is not None:  # a skipped first step leaves a state of zeros: 0/0
            torch.where(self._valid, out, torch.ones_like(out), out=out)

    def work(self, free: Tensor) -> tuple[Tensor, float]:
        """Σ u²/μ of the run's rows, as `Coordinates.dots` scales it, and a factor to it; free: ‖u‖² without decay."""
        if self._write is not None:
            return cut(self._known.work, self._run.rows), 1.0 / self._numerator if self._numerator else 0.0
        mu = self._mu
        if isinstance(mu, Tensor):
            return torch.where(free == 0, torch.zeros_like(free), free / mu), 1.0
        return free, 1.0 / mu if mu else 0.0
