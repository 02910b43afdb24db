"""L_0 and L_K from the losses of noisy steps: a window's line, extrapolated to steps 0 and K."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_SMALLEST_WINDOW = 3
_CURVED = 3.0  # t value of the window's parabola above which a line does not describe it


@dataclass(frozen=True)
class Extrapolation:
    """A loss at a step, as a weighted sum of recorded losses.

    value: the loss, in loss units. weights: step → weight (they sum to 1).
    variance: of one loss about the line; NaN where the window has no spare point.
    """

    value: float
    weights: dict[int, float]
    variance: float


@dataclass(frozen=True)
class LossDrop:
    """L_0 − L_K with its standard error, in loss units; both ends beside it."""

    value: float
    standard_error: float
    first: float
    last: float


def extrapolate(steps: list[int], losses: list[float], target: int) -> Extrapolation:
    """L(target) from the least-squares line through (step, loss).

    The window is halved, keeping the points nearest to the target, while a parabola fits them significantly
    better (t > 3): a curved, quiet start is then not mistaken for a line. With one point, that point.
    """
    order = sorted(range(len(steps)), key=lambda i: abs(steps[i] - target))
    kept = [(steps[i], losses[i]) for i in order]
    while True:
        x = torch.tensor([float(step - target) for step, _ in kept], dtype=torch.float64)
        y = torch.tensor([loss for _, loss in kept], dtype=torch.float64)
        if len(kept) <= _SMALLEST_WINDOW or _parabola_t(x, y) <= _CURVED:
            break
        kept = kept[: max(_SMALLEST_WINDOW, len(kept) // 2)]
    weights = _line_weights(x)
    value = float(weights @ y)
    freedom = len(kept) - 2
    variance = _residuals(x, y)[0] / freedom if freedom > 0 else math.nan
    return Extrapolation(value, {step: float(w) for (step, _), w in zip(kept, weights, strict=True)}, variance)


def drop(first: tuple[list[int], list[float]], last: tuple[list[int], list[float]], step: int) -> LossDrop:
    """L_0 − L_K and √(Σ weights² · variance): weights of steps that serve both ends are subtracted first.

    Args:
        first: steps and losses of the first window, last: of the last one; step: K.
    NaN where a window is empty; a non-finite loss in a window makes the value NaN.
    The standard error is 0 where a window has fewer than three points: nothing tells noise from descent there.
    """
    if not first[0] or not last[0]:
        return LossDrop(math.nan, math.nan, math.nan, math.nan)
    start, end = extrapolate(*first, 0), extrapolate(*last, step)
    squared = 0.0
    for index in start.weights.keys() | end.weights.keys():
        weight = start.weights.get(index, 0.0) - end.weights.get(index, 0.0)
        variances = [v for v, used in ((start.variance, index in start.weights), (end.variance, index in end.weights))
                     if used and not math.isnan(v)]
        squared += weight**2 * (sum(variances) / len(variances) if variances else 0.0)
    return LossDrop(start.value - end.value, math.sqrt(squared), start.value, end.value)


def paired_drop(probe: Tensor) -> LossDrop:
    """mean(L_0 − L_K) over the same batches, and its standard error over them (NaN for a single batch).

    Args:
        probe: (2, n): losses at θ_0, losses now.
    """
    difference = probe[0] - probe[1]
    n = difference.numel()
    error = float(difference.std()) / math.sqrt(n) if n > 1 else math.nan
    return LossDrop(float(difference.mean()), error, float(probe[0].mean()), float(probe[1].mean()))


def _line_weights(x: Tensor) -> Tensor:
    """w with Σ w_i y_i = the least-squares line's value at x = 0."""
    centred = x - x.mean()
    spread = float((centred**2).sum())
    uniform = torch.full_like(x, 1.0 / x.numel())
    return uniform if spread == 0.0 else uniform - centred * (x.mean() / spread)


def _residuals(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Σ residual² of the best line and of the best parabola, by orthogonal polynomials on the points x."""
    first = x - x.mean()
    squares = torch.dot(first, first)
    if float(squares) == 0.0:
        return float(((y - y.mean()) ** 2).sum()), math.nan
    line = y - y.mean()
    line = line - first * (torch.dot(first, line) / squares)
    second = first**2 - squares / x.numel() - first * (torch.dot(first, first**2) / squares)
    height = torch.dot(second, second)
    parabola = line - second * (torch.dot(second, line) / height) if float(height) > 0.0 else line
    return float(torch.dot(line, line)), float(torch.dot(parabola, parabola))


def _parabola_t(x: Tensor, y: Tensor) -> float:
    """|t| of the quadratic term: √F of adding it to the line. 0 where nothing is left to explain."""
    if not bool(torch.isfinite(y).all()):
        return 0.0
    line, parabola = _residuals(x, y)
    floor = 1e-24 * float((y**2).sum())  # rounding of float64 losses, squared
    if not line > floor or math.isnan(parabola):
        return 0.0
    freedom = x.numel() - 3
    return math.sqrt(max(0.0, line - parabola) * freedom / max(parabola, floor))


class LossWindows:
    """The first and the last `size` losses, kept on their device: nothing is read before `host` is asked."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.first_steps: list[int] = []
        self.last_steps: list[int] = []
        self._next = 0
        self._values: Tensor | None = None

    def record(self, loss: Tensor, step: int) -> None:
        """Keep the loss of a step; a second loss for the same step replaces the first."""
        if self._values is None:
            dtype = torch.float32 if loss.device.type == "mps" else torch.float64
            self._values = torch.full((2, self.size), float("nan"), dtype=dtype, device=loss.device)
        if len(self.first_steps) < self.size or step in self.first_steps:
            if step not in self.first_steps:
                self.first_steps.append(step)
            self._values[0, self.first_steps.index(step)] = loss
        newest = (self._next - 1) % self.size
        if self.last_steps and newest < len(self.last_steps) and self.last_steps[newest] == step:
            self._values[1, newest] = loss
            return
        if len(self.last_steps) < self.size:
            self.last_steps.append(step)
        else:
            self.last_steps[self._next] = step
        self._values[1, self._next] = loss
        self._next = (self._next + 1) % self.size

    @property
    def tensor(self) -> Tensor | None:
        """(2, size): first and last window, NaN where nothing was recorded; None before the first loss."""
        return self._values

    def windows(self, host: Tensor) -> tuple[tuple[list[int], list[float]], tuple[list[int], list[float]]]:
        """The two windows as (steps, losses), from a host copy of `tensor`."""
        rows = host.reshape(2, self.size).tolist()
        return (self.first_steps, rows[0][: len(self.first_steps)]), (
            self.last_steps,
            rows[1][: len(self.last_steps)],
        )

    def state_dict(self) -> dict[str, object]:
        values = None if self._values is None else self._values.detach().cpu().clone()
        return {"first": list(self.first_steps), "last": list(self.last_steps), "next": self._next, "values": values}

    def load_state_dict(self, state: dict[str, object], device: torch.device) -> None:
        values = state["values"]
        self.first_steps = list(state["first"])  # type: ignore[call-overload]
        self.last_steps = list(state["last"])  # type: ignore[call-overload]
        self._next = int(state["next"])  # type: ignore[call-overload]
        self._values = values.to(device).clone() if isinstance(values, Tensor) else None
