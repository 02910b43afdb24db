"""μ: the update's response to a constant unit force, given the denominators in the optimizer's state.

One formula per optimizer class (the table of the theory page). After a step it gives a numerator, and what writes the
denominators of its coordinates into `out`: μ = numerator / out. A formula without coordinates gives μ itself. Nothing
here reads a device tensor on the host.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_speedlimit.trajectory.optimizers import inner_optimizers
from lightning_speedlimit.trajectory.sums import sum_dtype

Group = Mapping[str, Any]
State = Mapping[str, Any]
_Entries = Mapping[str, Tensor]
Scalar = float | Tensor
Write = Callable[[_Entries, Tensor], object]  # (state entries, out): the denominators
MomentumMobility = Literal["steady", "response"]
MobilityFunction = Callable[[Optimizer, dict[str, Any], Tensor], Tensor | float]

RESPONSE = "response so far"  # B_k: memory that the meter keeps for a formula, per coordinate or per parameter
CUSTOM = "registered mobility"


class Inertia(NamedTuple):
    """How an update spreads a force over the steps after it.

    gain: c, steady over instantaneous response. memory: β, the share of an update that the next one keeps. Without
    memory 1 and 0.
    """

    gain: float
    memory: float


UNKNOWN = Inertia(math.nan, math.nan)


@dataclass(frozen=True)
class Formula:
    """How one optimizer class answers a force.

    evaluate(group, state) → numerator, write(entries, out); `entries` are those of the state that
    `coordinates(group)` names, at the measured coordinates. Without these write is None and the numerator μ.
    inertia(group): how it spreads a force over steps; of SGD, Adam and AdamW. Where denominators grow from 0, or the
        momentum changes by itself, early steps diffuse farther than c N/K says.
    before: the state entry that has to be read before the step.
    """

    evaluate: Callable[[Group, State], tuple[Scalar, Write | None]]
    coordinates: Callable[[Group], tuple[str, ...]]
    inertia: Callable[[Group], Inertia] = lambda group: UNKNOWN
    before: str | None = None


def number(value: Any) -> Scalar:
    """A Python float where reading costs no device sync, else the device tensor in float64 (float32 on MPS)."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return value.to(sum_dtype(value.device))
    return float(value)


def _sqrt(value: Scalar) -> Scalar:
    return torch.sqrt(value) if isinstance(value, Tensor) else math.sqrt(value)


@dataclass(frozen=True)
class Root:
    """out = √entry + ε."""

    entry: str
    epsilon: Scalar

    def __call__(self, entries: _Entries, out: Tensor) -> None:
        torch.sqrt(entries[self.entry], out=out).add_(self.epsilon)


def next_momentum_response(group: Group, previous: float | None) -> float:
    """b_k = β b_{k−1} + (1 − d), b_0 = 1: torch does not dampen the first step."""
    if previous is None:
        return 1.0
    return float(group["momentum"]) * previous + 1.0 - float(group["dampening"])


def _sgd(group: Group, state: State) -> tuple[Scalar, None]:
    """lr (1−d)/(1−β), or lr b_k where the meter keeps b; Nesterov lr (1 + β b_k), whose limit is the same for d = 0."""
    momentum = float(group["momentum"])
    response: float | None = state[RESPONSE]
    if momentum == 0.0:
        return number(group["lr"]), None
    if response is None:
        response = (1.0 - float(group["dampening"])) / (1.0 - momentum)
    return number(group["lr"]) * (1.0 + momentum * response if group["nesterov"] else response), None


def _rmsprop(group: Group, state: State) -> tuple[Scalar, Write]:
    """lr/(√v + ε), v − ḡ² when centered; with momentum over (1−β), or lr B_k where the meter keeps B."""
    momentum, epsilon = float(group["momentum"]), group["eps"]
    if momentum == 0.0 and not group["centered"]:
        return number(group["lr"]), Root("square_avg", epsilon)

    def write(entries: _Entries, out: Tensor) -> None:
        if group["centered"]:
            average = entries["grad_avg"]
            torch.addcmul(entries["square_avg"], average, average, value=-1.0, out=out).sqrt_().add_(epsilon)
        else:
            torch.sqrt(entries["square_avg"], out=out).add_(epsilon)
        if momentum and RESPONSE in entries:
            response = entries[RESPONSE]
            response.mul_(momentum).add_(out.reciprocal_())
            torch.reciprocal(response, out=out)
        elif momentum:
            out.mul_(1.0 - momentum)

    return number(group["lr"]), write


def _corrected_adam(group: Group, state: State) -> tuple[Scalar, Scalar]:
    """(1 − β₁^t, 1 − β₂^t)."""
    step = number(state["step"])
    beta1, beta2 = (number(beta) for beta in group["betas"])
    return 1.0 - beta1**step, 1.0 - beta2**step


def _adam_average(group: Group) -> str:
    return "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"


def _adam(group: Group, state: State) -> tuple[Scalar, Write]:
    """lr/(√v̂ + ε), v̂ = v/(1 − β₂^t); with AMSGrad v is the maximum of the uncorrected v."""
    root: Scalar = _sqrt(_corrected_adam(group, state)[1])
    return number(group["lr"]) * root, Root(_adam_average(group), group["eps"] * root)


def _nadam(group: Group, state: State) -> tuple[Scalar, Write]:
    """Adam's × [(1−μ_t)/(1−Π_t) + μ_{t+1}(1−β₁^t)/(1−Π_t μ_{t+1})], Π_t the stored product of the μ."""
    first, second = _corrected_adam(group, state)
    step, product = number(state["step"]), number(state["mu_product"])
    beta1, decay = number(group["betas"][0]), float(group["momentum_decay"])
    now = beta1 * (1.0 - 0.5 * 0.96 ** (step * decay))
    following = beta1 * (1.0 - 0.5 * 0.96 ** ((step + 1) * decay))
    response = (1.0 - now) / (1.0 - product) + following * first / (1.0 - product * following)
    root = _sqrt(second)
    return number(group["lr"]) * root * response, Root("exp_avg_sq", group["eps"] * root)


def _radam(group: Group, state: State) -> tuple[Scalar, Write]:
    """lr while ρ_t ≤ 5 (no denominator), then lr r_t √(1−β₂^t)/(√v + ε)."""
    step, beta2 = number(state["step"]), float(group["betas"][1])
    second = _corrected_adam(group, state)[1]
    limit = 2.0 / (1.0 - beta2) - 1.0
    rho = limit - 2.0 * step * beta2**step / second
    rectified = (rho - 4.0) * (rho - 2.0) * limit / ((limit - 4.0) * (limit - 2.0) * rho)
    write = Root("exp_avg_sq", group["eps"])
    if not isinstance(rho, Tensor):
        if rho <= 5.0:
            return number(group["lr"]), lambda entries, out: out.fill_(1.0)
        return number(group["lr"]) * _sqrt(rectified * second), write
    adaptive = rho > 5.0

    def write_either(entries: _Entries, out: Tensor) -> None:
        write(entries, out)
        out.copy_(torch.where(adaptive, out, torch.ones_like(out)))

    scale = torch.where(adaptive, (rectified * second).clamp_min(0.0).sqrt(), torch.ones_like(rho))
    return scale * number(group["lr"]), write_either


def _adamax(group: Group, state: State) -> tuple[Scalar, Write]:
    """lr/`exp_inf`: ε is already inside."""
    return number(group["lr"]), lambda entries, out: out.copy_(entries["exp_inf"])


def _adagrad(group: Group, state: State) -> tuple[Scalar, Write]:
    """lr_k/(√sum + ε), lr_k = lr/(1 + (t−1) lr_decay): the stored step is post-increment."""
    rate = number(group["lr"]) / (1.0 + (number(state["step"]) - 1.0) * float(group["lr_decay"]))
    return rate, Root("sum", group["eps"])


def _adadelta(group: Group, state: State) -> tuple[Scalar, Write]:
    """lr √((acc_delta before the step + ε)/(square_avg + ε))."""

    def write(entries: _Entries, out: Tensor) -> None:
        torch.add(entries["square_avg"], group["eps"], out=out)
        out.div_(entries["acc_delta"] + group["eps"]).sqrt_()

    return number(group["lr"]), write


def _custom(group: Group, state: State) -> tuple[Scalar, Write]:
    """A registered function's μ: out = 1/μ, kept finite so that an idle coordinate with μ = 0 counts 0."""

    def write(entries: _Entries, out: Tensor) -> None:
        torch.reciprocal(entries[CUSTOM], out=out)
        out.clamp_(max=torch.finfo(out.dtype).max ** 0.5)  # clipping divides it by its factor

    return 1.0, write


def _momentum_inertia(group: Group) -> Inertia:
    """c = 1/(1−β); with Nesterov the instantaneous response is 1 + β, so 1/(1−β²)."""
    momentum = float(group["momentum"])
    return Inertia(1.0 / (1.0 - momentum**2) if group["nesterov"] else 1.0 / (1.0 - momentum), momentum)


def _beta1_inertia(group: Group) -> Inertia:
    beta1 = float(group["betas"][0])
    return Inertia(1.0 / (1.0 - beta1), beta1)


_ADAM = Formula(_adam, lambda group: (_adam_average(group),), _beta1_inertia)
_BUILT_IN: dict[type[Optimizer], Formula] = {
    torch.optim.SGD: Formula(_sgd, lambda group: (), _momentum_inertia),
    torch.optim.RMSprop: Formula(
        _rmsprop, lambda group: ("square_avg", "grad_avg") if group["centered"] else ("square_avg",)
    ),
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.NAdam: Formula(_nadam, lambda group: ("exp_avg_sq",)),
    torch.optim.RAdam: Formula(_radam, lambda group: ("exp_avg_sq",)),
    torch.optim.Adamax: Formula(_adamax, lambda group: ("exp_inf",)),
    torch.optim.Adagrad: Formula(_adagrad, lambda group: ("sum",)),
    torch.optim.Adadelta: Formula(_adadelta, lambda group: ("square_avg", "acc_delta"), before="acc_delta"),
}
_REGISTERED: dict[type[Optimizer], MobilityFunction] = {}


def register_mobility(optimizer_class: type[Optimizer], function: MobilityFunction) -> None:
    """μ = function(optimizer, group, parameter): the mobility of an optimizer that this package does not know.

    Args:
        optimizer_class: the class, and those derived from it, that the function answers for.
        function: called once per parameter after each measured step. Returns μ ≥ 0 in units of
            parameter²/loss: a tensor of the parameter's shape, or a number for all its coordinates. It must
            not read the device from the host (`.item()`).
    Raises:
        TypeError: where the first is not an optimizer class or the second cannot be called.
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
        raise TypeError(f"optimizer_class must be a subclass of torch.optim.Optimizer, got {optimizer_class!r}")
    if not callable(function):
        raise TypeError(f"function must be callable (optimizer, group, parameter) -> tensor, got {function!r}")
    _REGISTERED[optimizer_class] = function


def registered(optimizer: Optimizer) -> MobilityFunction | None:
    """The function registered for the nearest of the optimizer's classes."""
    return next((_REGISTERED[c] for c in type(optimizer).__mro__ if c in _REGISTERED), None)


def formula(optimizer: Optimizer, group: Group) -> Formula | None:
    """The optimizer's formula; None where it has none, and its mobility is then "effective".

    A subclass has its parent's formula as long as it keeps the parent's `step`.
    """
    if registered(optimizer) is not None:
        return Formula(_custom, lambda group: (CUSTOM,))
    owner = next((c for c in type(optimizer).__mro__ if c in _BUILT_IN), None)
    if owner is None or _plain_step(type(optimizer)) is not _plain_step(owner):
        return None
    if owner in (torch.optim.SGD, torch.optim.RMSprop) and group["momentum"] >= 1.0:
        return None  # nothing is steady
    return _BUILT_IN[owner]


def _plain_step(optimizer_class: type[Optimizer]) -> object:
    return inspect.unwrap(optimizer_class.step)


def decays(optimizer: Optimizer, group: Group) -> Literal["coupled", "decoupled", "unknown"]:
    """Whether an optimizer's weight decay is part of the gradient, or apart from it.

    Decoupled: the group's flag `decoupled_weight_decay`, AdamW, Muon, Adafactor. An optimizer from elsewhere
    that has no such flag, or has it from the optimizer that it wraps, whose update it may change, may do either: its
    decay is then counted as part of the update.
    """
    if any(group is own for inner in inner_optimizers(optimizer).values() for own in inner.param_groups):
        return "unknown"
    decoupled = tuple(getattr(torch.optim, name, torch.optim.AdamW) for name in ("AdamW", "Muon", "Adafactor"))
    if group.get("decoupled_weight_decay", False) or isinstance(optimizer, decoupled):
        return "decoupled"
    known = formula(optimizer, group) is not None and registered(optimizer) is None
    known = known or type(optimizer).__module__.startswith("torch.optim")
    return "coupled" if known else "unknown"


def is_plain_sgd(optimizer: Optimizer) -> bool:
    """SGD without momentum: each update is along its own gradient alone."""
    return type(optimizer) is torch.optim.SGD and not any(group["momentum"] for group in optimizer.param_groups)
