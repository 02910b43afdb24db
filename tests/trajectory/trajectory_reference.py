"""A second, naive measurement of a training run: everything kept in lists, everything summed in float64.

`Run` wraps the training loop (no hooks) and keeps θ, the raw and the clipped gradient, the learning rates
and the losses of every step. `measure` turns them into the quantities of THEORY §1-4.

The mobilities come by another route than the formulas of §3. They are defined as the response of the update
to a constant unit force with the denominators held, so that is what is done here: the optimizer's own class
is run in float64 on a shadow parameter under a constant gradient too small to move a denominator, and the
denominators are set, at every step, to running averages that are recomputed from the recorded gradients.
"""

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor
from torch.optim import Optimizer

# So small that its square vanishes against every denominator, and far from underflow in float64.
PROBE = 1e-30


def flat(tensor: Tensor) -> Tensor:
    """Any tensor as a float64 vector of reals: complex entries are pairs, sparse ones are filled up."""
    tensor = tensor.detach()
    if tensor.is_sparse:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.double().reshape(-1).clone()


@dataclass
class Move:
    """What one optimizer did to one parameter in one step."""

    optimizer: int
    group: int
    kind: type
    options: dict[str, object]
    before: Tensor
    after: Tensor
    raw: Tensor
    seen: Tensor

    @property
    def lr(self) -> float:
        return float(self.options["lr"])

    @property
    def sign(self) -> float:
        return -1.0 if self.options.get("maximize", False) else 1.0

    @property
    def decoupled(self) -> float:
        """The coefficient of the decay that is not a force of the loss."""
        decay = float(self.options.get("weight_decay", 0.0))
        return decay if decays_decoupled(self.kind, self.options) else 0.0

    @property
    def coupled(self) -> float:
        decay = float(self.options.get("weight_decay", 0.0))
        return 0.0 if decays_decoupled(self.kind, self.options) else decay

    @property
    def force(self) -> Tensor:
        """f = −(g + w θ) with the raw gradient."""
        return -(self.sign * self.raw + self.coupled * self.before)

    @property
    def input(self) -> Tensor:
        """What entered the optimizer's averages: the clipped gradient and the L2 term."""
        return self.sign * self.seen + self.coupled * self.before

    @property
    def update(self) -> Tensor:
        """u without the decoupled decay."""
        return self.after - self.before + self.lr * self.decoupled * self.before


def decays_decoupled(kind: type, options: dict[str, object]) -> bool:
    names = {base.__name__ for base in kind.__mro__}
    return bool(options.get("decoupled_weight_decay", False)) or bool(names & {"AdamW", "Muon", "Adafactor"})


class Run:
    """A training loop that remembers. `meter`, where given, is told what a user would tell it.

    Call `step` once per joint step with the gradients in place, and `finish` once after the last.
    """

    def __init__(self, *optimizers: Optimizer, meter: object = None, joint: bool = False) -> None:
        self.optimizers = optimizers
        self.meter = meter
        self.joint = joint
        self.steps: list[dict[Tensor, Move]] = []
        self.losses: list[float] = []
        self.lrs: list[set[float]] = []
        self.start = {p: flat(p) for p in self.parameters()}

    def parameters(self) -> Iterable[Tensor]:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                yield from group["params"]

    def step(
        self,
        loss: float | Tensor | None = None,
        *,
        clip: float | None = None,
        closure: Callable[[], Tensor] | None = None,
        only: Collection[int] | None = None,
    ) -> None:
        """`only`: the numbers of the optimizers that take part in this joint step; None: all."""
        if loss is not None:
            self.losses.append(float(loss))
            if self.meter is not None:
                self.meter.record_loss(loss if isinstance(loss, Tensor) else torch.tensor(loss))
        self.lrs.append({float(group["lr"]) for o in self.optimizers for group in o.param_groups})
        moves: dict[Tensor, Move] = {}
        for number, optimizer in enumerate(self.optimizers):
            if only is not None and number not in only:
                continue
            moves.update(self._one(number, optimizer, clip, closure))
        self.steps.append(moves)
        if self.joint and self.meter is not None:
            self.meter.end_step()

    def _one(
        self, number: int, optimizer: Optimizer, clip: float | None, closure: Callable[[], Tensor] | None
    ) -> dict[Tensor, Move]:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        raw = {p: flat(p.grad) for p in parameters}
        if clip is not None:
            if self.meter is not None:
                self.meter.observe_gradients(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        seen = {p: flat(p.grad) for p in parameters}
        before = {p: flat(p) for p in parameters}
        options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        for option in options:
            option["lr"] = float(option["lr"])
        where = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        optimizer.step() if closure is None else optimizer.step(closure)
        return {
            p: Move(number, where[p], type(optimizer), options[where[p]], before[p], flat(p), raw[p], seen[p])
            for p in parameters
        }

    def finish(self, loss: float | Tensor | None = None) -> "Run":
        if loss is not None:
            self.losses.append(float(loss))
            if self.meter is not None:
                self.meter.record_loss(loss if isinstance(loss, Tensor) else torch.tensor(loss))
        return self


# --- Mobilities -------------------------------------------------------------------------------------------


def _averages(inputs: list[Tensor], decay: float, power: int) -> list[Tensor]:
    """Exponential averages of the inputs' powers, from 0, without correction."""
    average, out = torch.zeros_like(inputs[0]), []
    for value in inputs:
        average = decay * average + (1 - decay) * value**power
        out.append(average)
    return out


def _running_maximum(values: list[Tensor]) -> list[Tensor]:
    out = [values[0]]
    for value in values[1:]:
        out.append(torch.maximum(out[-1], value))
    return out


def _pins(kind: type, options: dict[str, object], inputs: list[Tensor]) -> list[dict[str, Tensor]]:
    """Per step, what the shadow's denominators must hold BEFORE its step so that they are right within it."""
    if issubclass(kind, (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam)):
        beta = float(options["betas"][1])
        square = _averages(inputs, beta, 2)
        if options.get("amsgrad", False):
            largest = _running_maximum(square)
            return [{"exp_avg_sq": 0 * m, "max_exp_avg_sq": m} for m in largest]
        return [{"exp_avg_sq": v / beta} for v in square]
    if issubclass(kind, torch.optim.RMSprop):
        alpha = float(options["alpha"])
        square = _averages(inputs, alpha, 2)
        pins = [{"square_avg": v / alpha} for v in square]
        if options["centered"]:
            for pin, mean in zip(pins, _averages(inputs, alpha, 1), strict=True):
                pin["grad_avg"] = mean / alpha
        return pins
    if issubclass(kind, torch.optim.Adamax):
        beta, eps = float(options["betas"][1]), float(options["eps"])
        largest, pins = torch.zeros_like(inputs[0]), []
        for value in inputs:
            largest = torch.maximum(beta * largest, value.abs() + eps)
            pins.append({"exp_inf": largest / beta})
        return pins
    if issubclass(kind, torch.optim.Adagrad):
        total, pins = torch.full_like(inputs[0], float(options["initial_accumulator_value"])), []
        for value in inputs:
            total = total + value**2
            pins.append({"sum": total})
        return pins
    if issubclass(kind, torch.optim.Adadelta):
        rho, eps = float(options["rho"]), float(options["eps"])
        moved, pins = torch.zeros_like(inputs[0]), []
        for value, square in zip(inputs, _averages(inputs, rho, 2), strict=True):
            pins.append({"square_avg": square / rho, "acc_delta": moved})
            delta = value * ((moved + eps) / (square + eps)).sqrt()
            moved = rho * moved + (1 - rho) * delta**2
        return pins
    if issubclass(kind, torch.optim.SGD):
        return [{} for _ in inputs]
    raise NotImplementedError(kind)


FORMULAS = (
    torch.optim.SGD,
    torch.optim.RMSprop,
    torch.optim.AdamW,  # a subclass of Adam in recent versions of torch only
    torch.optim.Adam,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
)

_NUMBERS = (
    "betas",
    "alpha",
    "rho",
    "eps",
    "momentum",
    "dampening",
    "nesterov",
    "centered",
    "amsgrad",
    "momentum_decay",
    "lr_decay",
    "initial_accumulator_value",
)


def _shadow(kind: type, options: dict[str, object], like: Tensor, **changed: object) -> tuple[Tensor, Optimizer]:
    """The same optimizer in float64 on a parameter at 0, without decay, one tensor at a time."""
    base = next(known for known in FORMULAS if issubclass(kind, known))
    kept = {name: options[name] for name in _NUMBERS if name in options} | changed
    parameter = torch.zeros_like(like, dtype=torch.float64).requires_grad_()
    return parameter, base([parameter], lr=1.0, weight_decay=0.0, foreach=False, **kept)


def _prepare(optimizer: Optimizer, parameter: Tensor) -> None:
    """Fill the shadow's state without a trace: a step under no gradient, then undo what it did."""
    if isinstance(optimizer, (torch.optim.SGD, torch.optim.Adagrad)):
        return  # SGD's first step is special and pins nothing; Adagrad fills its state when it is built
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in optimizer.state[parameter].items():
        if isinstance(value, Tensor):
            value.fill_(1.0 if name == "mu_product" else 0.0)
    parameter.data.zero_()


def response(kind: type, options: dict[str, object], inputs: list[Tensor], lrs: list[float]) -> list[Tensor]:
    """Per step, −u per unit of a force that has been constant since the first step."""
    parameter, optimizer = _shadow(kind, options, inputs[0])
    _prepare(optimizer, parameter)
    out = []
    for pin, lr in zip(_pins(kind, options, inputs), lrs, strict=True):
        for name, value in pin.items():
            optimizer.state[parameter][name].copy_(value)
        parameter.data.zero_()
        parameter.grad = torch.full_like(parameter, PROBE)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        out.append(-parameter.detach() / PROBE)
    return out


@cache
def _steady_momentum(momentum: float, dampening: float, nesterov: bool) -> float:
    """What SGD's update tends to, per unit of force and learning rate: run until it stays."""
    parameter = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], 1.0, momentum, dampening, nesterov=nesterov)
    value = math.nan
    for _ in range(100_000):
        parameter.data.zero_()
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        last, value = value, -parameter.item()
        if value == last:
            return value
    raise AssertionError("the momentum does not settle")


def mobilities(moves: list[Move], momentum_mobility: str = "steady") -> list[Tensor]:
    """μ of one parameter at each of its steps, a vector each."""
    first = moves[0]
    options = first.options
    inputs = [move.input for move in moves]
    lrs = [move.lr for move in moves]
    if momentum_mobility == "steady" and issubclass(first.kind, torch.optim.SGD):
        steady = _steady_momentum(options["momentum"], options["dampening"], options["nesterov"])
        return [torch.full_like(value, lr * steady) for value, lr in zip(inputs, lrs, strict=True)]
    if momentum_mobility == "steady" and issubclass(first.kind, torch.optim.RMSprop) and options["momentum"]:
        now = response(first.kind, options | {"momentum": 0.0}, inputs, lrs)
        steady = _steady_momentum(options["momentum"], 0.0, False)
        return [steady * mobility for mobility in now]
    return response(first.kind, options, inputs, lrs)


# --- Sums ----------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """What THEORY §1-4 says of a run, by name, and the accumulated mobility of each parameter."""

    values: dict[str, float]
    mobility: dict[Tensor, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        return self.values[name]


def divided(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator != 0 else math.nan


def _squared(vectors: Iterable[Tensor]) -> float:
    return sum(float(v @ v) for v in vectors)


def idle(moves: list[Move]) -> list[Tensor]:
    """Per step, the coordinates with u = 0. Under decoupled decay u is a rounding error where no gradient
    has come yet, so there the gradients are asked instead."""
    touched, out = torch.zeros_like(moves[0].before, dtype=torch.bool), []
    for move in moves:
        touched = touched | (move.input != 0)
        out.append(~touched if move.decoupled else move.update == 0)
    return out


def clip_factors(run: Run) -> list[dict[int, float]]:
    """‖g_clipped‖/‖g‖ per step and optimizer; 1 where there is no gradient."""
    out = []
    for moves in run.steps:
        factors = {}
        for number in {move.optimizer for move in moves.values()}:
            mine = [move for move in moves.values() if move.optimizer == number]
            raw, seen = _squared(m.raw for m in mine), _squared(m.seen for m in mine)
            factors[number] = math.sqrt(seen / raw) if raw > 0 else 1.0
        out.append(factors)
    return out


def measure(run: Run, *, clock: str = "steps", momentum_mobility: str = "steady") -> Measured:
    """All sums of one recorded run."""
    values = _kinematics(run, clock) | _works(run)
    numerator, action, mobility = _weighted(run, momentum_mobility, clip_factors(run))
    values |= {"numerator": numerator, "work_action": action}
    values["efficiency_action"] = divided(numerator, action)
    values["efficiency_ito"] = divided(numerator, values["work_ito"])
    last = run.steps[-1].values()
    values["grad_norm"] = math.sqrt(_squared(m.raw for m in last))
    values["grad_norm_clipped"] = math.sqrt(_squared(m.seen for m in last))
    values["l2_drop"] = _l2_drop(run)
    return Measured(values, mobility)


def _kinematics(run: Run, clock: str) -> dict[str, float]:
    """§1: all motion counts, decay as well."""
    path = action = elapsed = norm = 0.0
    for moves, lrs in zip(run.steps, run.lrs, strict=True):
        squared = _squared(move.after - move.before for move in moves.values())
        norm = math.sqrt(squared)
        tick = 1.0 if clock == "steps" else next(iter(lrs)) if len(lrs) == 1 else math.nan
        path += norm
        elapsed += tick
        action += 0.0 if squared == 0 and tick == 0 else divided(squared, tick)
    displacement_squared = _squared(flat(p) - start for p, start in run.start.items())
    return {
        "displacement": math.sqrt(displacement_squared),
        "path_length": path,
        "action": action,
        "elapsed": elapsed,
        "step_norm": norm,
        "speed_limit_time": divided(displacement_squared, action),
        "straightness": divided(displacement_squared, path**2),
        "steadiness": divided(path**2, elapsed * action),
        "kinematic_efficiency": divided(displacement_squared, elapsed * action),
    }


def _works(run: Run) -> dict[str, float]:
    """§2: the force at each end of the step; the last step's far end is not known yet."""
    ito = known = anti = 0.0
    for k, moves in enumerate(run.steps):
        near = sum(float(move.force @ move.update) for move in moves.values())
        ito += near
        if k + 1 < len(run.steps):
            following = run.steps[k + 1]
            known += near
            anti += sum(float(following[p].force @ move.update) for p, move in moves.items() if p in following)
    return {
        "work_ito": ito,
        "work_anti_ito": anti,
        "work_stratonovich": (known + anti) / 2,
        "signal_fraction": divided(anti, known),
    }


def counted_mobilities(
    run: Run,
    parameter: Tensor,
    momentum_mobility: str = "steady",
    factors: list[dict[int, float]] | None = None,
) -> list[Tensor]:
    """What each step of a parameter adds to its m: c_k μ_k, and 0 where a coordinate is idle."""
    factors = clip_factors(run) if factors is None else factors
    steps = [k for k, moves in enumerate(run.steps) if parameter in moves]
    moves = [run.steps[k][parameter] for k in steps]
    still = idle(moves)
    out = []
    for k, move, mobility, rest in zip(steps, moves, mobilities(moves, momentum_mobility), still, strict=True):
        mobility = factors[k][move.optimizer] * mobility
        out.append(torch.where(rest, 0.0, mobility))
    return out


def _weighted(
    run: Run, momentum_mobility: str, factors: list[dict[int, float]]
) -> tuple[float, float, dict[Tensor, Tensor]]:
    """§3: Σ (Δθ_i)²/m_i, Σ u²/μ and m, with one scalar for every group whose optimizer has no formula."""
    numerator = action = 0.0
    accumulated: dict[Tensor, Tensor] = {}
    groups: dict[tuple[int, int], list[float]] = {}
    for parameter, start in run.start.items():
        moves = [step[parameter] for step in run.steps if parameter in step]
        if not moves:
            continue
        kind = moves[0].kind
        decayed = sum((move.lr * move.decoupled * move.before for move in moves), torch.zeros_like(start))
        distance = flat(parameter) - start + decayed
        if not issubclass(kind, FORMULAS):
            sums = groups.setdefault((moves[0].optimizer, moves[0].group), [0.0, 0.0, 0.0])
            sums[0] += float(distance @ distance)
            sums[1] += _squared(move.update for move in moves)
            sums[2] += sum(float(move.force @ move.update) for move in moves)
            continue
        mobility = counted_mobilities(run, parameter, momentum_mobility, factors)
        total = torch.stack(mobility).sum(0)
        for move, mu, still in zip(moves, mobility, idle(moves), strict=True):
            moved = (move.update != 0) & ~still
            action += float((move.update[moved] ** 2 / mu[moved]).sum())
        accumulated[parameter] = total
        moved = (distance != 0) & (total != 0)
        numerator += float((distance[moved] ** 2 / total[moved]).sum())
    for distance_squared, squared, work in groups.values():
        numerator += distance_squared * work / (len(run.steps) * squared) if work > 0 else math.nan
        action += work
    return numerator, action, accumulated


def _l2_drop(run: Run) -> float:
    """½ w (‖θ_0‖² − ‖θ_K‖²): what the L2 term inside the gradient lost."""
    total = 0.0
    for parameter, start in run.start.items():
        coupled = next((moves[parameter].coupled for moves in run.steps if parameter in moves), 0.0)
        end = flat(parameter)
        total += 0.5 * coupled * float(start @ start - end @ end)
    return total
