"""L_0 and L_K from the losses of noisy steps: a window's line, extrapolated to steps 0 and K."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_SMALLEST_WINDOW = 3
_APART, _DOUBTED = 5.0, 3.0  # standard errors between lines of two windows: the longer one is bent; it may be
_NEAR = 8  # losses at least, around a short window, whose noise counts for it
_JUMP = 5.0  # standard deviations of a loss from the middle of its neighbours

_Numbers = npt.NDArray[np.float64]
_Window = tuple[list[int], list[float]]  # steps and their losses
# A loss and, where it is the mean of several, their finite number; −1: of no step.
_Entry = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Extrapolation:
    """A loss at a step, as a weighted sum of recorded losses.

    value: the loss, in loss units. weights: step → weight (they sum to 1).
    variance: of one loss about a smooth curve; NaN where fewer than three losses tell it.
    bias_squared: what the window's curvature may have moved the value by, squared.
    hidden_squared: what it may have moved it by unseen: the squared distance to the farthest of the lines of shorter
        windows, whether or not noise alone puts them there.
    """

    value: float
    weights: dict[int, float]
    variance: float
    bias_squared: float
    hidden_squared: float = 0.0

    @property
    def error_squared(self) -> float:
        """Var + bias²; the variance counts 0 where too few points tell it."""
        variance = 0.0 if math.isnan(self.variance) else self.variance
        return variance * math.fsum(w * w for w in self.weights.values()) + self.bias_squared


@dataclass(frozen=True)
class LossDrop:
    """L_0 − L_K with its standard error, in loss units; both ends beside it, and the last one's standard error."""

    value: float
    standard_error: float
    first: float
    last: float
    last_error: float


def extrapolate(steps: list[int], losses: list[float], target: int) -> Extrapolation:
    """L(target) from the least-squares line through (step, loss).

    Of the whole window and its halves, quarters, … nearest to the target, the one with the smallest variance +
    bias² is taken: a quiet, curved start then uses few points, a noisy one all. The bias is what a parabola
    through the same points says of the line, as far as it exceeds its own noise; the noise is told from a smooth
    curve by second differences, of the whole window or of the twice as many points nearest to the target, whichever
    is more: two hard batches in a row at an end are no bend. With one point, that point.

    Whether it is a bend or chance that a shorter window's line lies apart may be open, between three standard errors
    and five: the longer one counts then, and the error that is stated goes as far as the shorter one.

    A bend that noise hides is in no bias that the data show: the error that is stated goes as far as the shorter
    windows' lines do. It is about that of the shortest one, 0.8 of a loss's noise, where the choice is free.
    """
    if not steps:
        raise ValueError("extrapolate needs at least one recorded loss, got none")
    order = sorted(range(len(steps)), key=lambda i: abs(steps[i] - target))
    steps, losses = [steps[i] for i in order], [losses[i] for i in order]
    variance = _noise_variance(steps, losses)
    found: list[Extrapolation] = []
    size = len(order)
    while size:
        near = max(2 * size, _NEAR)
        local = _noise_variance(steps[:near], losses[:near])
        noise = variance if math.isnan(local) else max(variance, local)
        found.append(_line_at(target, steps[:size], losses[:size], noise))
        size = 0 if size <= _SMALLEST_WINDOW else max(_SMALLEST_WINDOW, size // 2)
    compared = [_compared(line, found[i + 1 :], _APART) for i, line in enumerate(found)]
    chosen = min(range(len(found)), key=lambda i: compared[i].error_squared)
    doubted = [replace(line, variance=variance) for line in found[chosen:]]
    doubt = _compared(doubted[0], doubted[1:], _DOUBTED).bias_squared
    return replace(compared[chosen], bias_squared=max(compared[chosen].bias_squared, doubt))


def _compared(line: Extrapolation, shorter: list[Extrapolation], errors: float) -> Extrapolation:
    """The line with the bias that shorter windows nearer to the target show (Lepski's comparison).

    Args:
        errors: standard errors between two lines, above which the longer one is bent.
    """
    own = line.error_squared - line.bias_squared
    squares = [(line.value - other.value) * (line.value - other.value) for other in shorter]  # `**` may raise
    noise = [max(0.0, other.error_squared - other.bias_squared - own) for other in shorter]
    apart = [squared for squared, own in zip(squares, noise, strict=True) if squared > errors**2 * own]
    hidden = max(squares, default=0.0)
    return replace(line, bias_squared=max([line.bias_squared, *apart]), hidden_squared=hidden)


def _noise_variance(steps: list[int], losses: list[float]) -> float:
    """mean (y_{i−1} − 2y_i + y_{i+1})²/6: the variance of independent noise on a smooth curve."""
    if len(steps) < 3:
        return math.nan
    y = [losses[i] for i in sorted(range(len(steps)), key=steps.__getitem__)]
    bends = [before - 2.0 * here + after for before, here, after in zip(y, y[1:], y[2:], strict=False)]
    return sum(bend * bend for bend in bends) / len(bends) / 6.0


def _line_at(target: int, steps: list[int], losses: list[float], variance: float) -> Extrapolation:
    """The line through a window, by polynomials orthogonal on its points, at x = step − target = 0."""
    x, y = np.array(steps, dtype=np.float64) - target, np.array(losses, dtype=np.float64)
    mean, first = float(x.mean()), x - x.mean()
    weights, residual = np.full_like(x, 1.0 / len(x)), y - y.mean()
    squares = float(first @ first)
    bias_squared = 0.0
    if squares > 0.0:
        weights -= first * (mean / squares)
        residual -= first * (float(first @ residual) / squares)
    if len(x) > 2:
        bias_squared = _bias_squared(mean, first, squares, residual, variance)
    value = float(weights @ y)
    return Extrapolation(value, dict(zip(steps, weights.tolist(), strict=True)), variance, bias_squared)


def _bias_squared(mean: float, first: _Numbers, squares: float, residual: _Numbers, variance: float) -> float:
    """(parabola − line)² at x = 0, less the variance that this difference has from noise alone."""
    skew = float(first @ first**2) / squares
    second = first**2 - squares / len(first) - first * skew
    height = float(second @ second)
    if height <= 1e-12 * squares**2:
        return 0.0  # the points carry no parabola
    coefficient = float(second @ residual) / height
    at_target = mean**2 - squares / len(first) + mean * skew
    return at_target * at_target * max(0.0, coefficient * coefficient - variance / height)


def drop(first: _Window, last: _Window, step: int) -> LossDrop:
    """L_0 − L_K and √(Σ weights² · variance + bias²); steps that serve both ends are subtracted first.

    Args:
        first: steps and losses of the first window, last: of the last one; step: K.
    NaN where a window is empty; a non-finite loss in a window makes the value NaN.
    The standard error is 0 where a window has fewer than three points: nothing tells noise from descent there.
    """
    if not first[0] or not last[0] or not all(map(math.isfinite, (*first[1], *last[1]))):
        return LossDrop(*[math.nan] * 5)
    start, end = _extrapolated_start(tuple(first[0]), tuple(first[1])), extrapolate(*last, step)
    # Decays bend where they start; at the end what a bend may hide is counted where the data show it.
    squared = max(start.bias_squared, start.hidden_squared) + end.bias_squared
    for index in start.weights.keys() | end.weights.keys():
        weight = start.weights.get(index, 0.0) - end.weights.get(index, 0.0)
        ends = [found.variance for found in (start, end) if index in found.weights]
        known = [variance for variance in ends if not math.isnan(variance)]
        squared += weight**2 * (sum(known) / len(known) if known else 0.0)
    return LossDrop(start.value - end.value, math.sqrt(squared), start.value, end.value, math.sqrt(end.error_squared))


@functools.lru_cache(maxsize=16)  # the first window stays as it is once it is full
def _extrapolated_start(steps: tuple[int, ...], losses: tuple[float, ...]) -> Extrapolation:
    return extrapolate(*_without_jumps(list(steps), list(losses)), 0)


def _without_jumps(steps: list[int], losses: list[float]) -> _Window:
    """The window without single losses that stand out against both neighbours.

    An optimizer without bias correction may throw the weights far in its first step and come back in the next:
    that loss is not one from which L(θ_0) follows. Only at the start: late in a run the high losses of hard
    batches belong to the mean.
    """
    y = np.array(losses, dtype=np.float64)
    if len(y) < 10:
        return steps, losses
    before, after = y[1:-1] - y[:-2], y[1:-1] - y[2:]
    height = 0.5 * (before + after)
    away = np.abs(height - _median(height))
    jumps = (before * after > 0) & (away > _JUMP * 1.4826 * _median(away))
    kept = [0, *(i + 1 for i, jump in enumerate(jumps.tolist()) if not jump), len(y) - 1]
    return [steps[i] for i in kept], [losses[i] for i in kept]


def _median(values: _Numbers) -> float:
    """The lower of two in the middle."""
    middle = (len(values) - 1) // 2
    return float(np.partition(values, middle)[middle])


def paired_drop(probe: Tensor) -> LossDrop:
    """mean(L_0 − L_K) over the same batches, and its standard error over them (NaN for a single batch).

    Args:
        probe: (2, n): losses at θ_0, losses now.
    """
    difference = probe[0] - probe[1]
    n = difference.numel()
    error = float(difference.std()) / math.sqrt(n) if n > 1 else math.nan
    last_error = float(probe[1].std()) / math.sqrt(n) if n > 1 else math.nan
    return LossDrop(float(difference.mean()), error, float(probe[0].mean()), float(probe[1].mean()), last_error)


class LossWindows:
    """The first and the last `size` losses, kept on their device: nothing is computed before `tensor` is asked."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._windows: tuple[dict[int, _Entry], dict[int, _Entry]] = {}, {}  # step → loss: the first, the last

    @property
    def steps(self) -> tuple[list[int], list[int]]:
        """Of the first and the last window."""
        return list(self._windows[0]), list(self._windows[1])

    def record(self, loss: Tensor, step: int, *, again: bool = False) -> None:
        """Keep the loss of a step. A second one for the same step replaces the first, or, `again`, joins the mean.

        That is the mean of the finite ones; where none is finite, the last one.
        """
        entry: _Entry = loss.clone(), None
        for number, window in enumerate(self._windows):
            if step in window:
                window[step] = _joined(window[step], entry) if again else entry
            elif len(window) < self.size or number == 1:
                window[step] = entry
                if len(window) > self.size:
                    del window[next(iter(window))]

    def leave_out(self, step: int, skipped: Tensor) -> None:
        """The step was none, where `skipped` is true: so is its loss. Nothing is read."""
        for window in self._windows:
            if step in window:
                loss, count = window[step]
                known = _counted(loss, count)
                out = skipped.to(known.device, non_blocking=True)
                window[step] = loss, torch.where(out, -torch.ones_like(known), known)

    @property
    def tensor(self) -> Tensor | None:
        """(4, size): losses and counts of the first window, then of the last one. None before the first loss."""
        if not self._windows[1]:
            return None
        device = next(iter(self._windows[1].values()))[0].device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        rows = []
        for window in self._windows:
            losses = torch.stack([loss.to(device) for loss, _ in window.values()]).to(dtype)
            counts = losses.isfinite().to(dtype)
            if any(count is not None for _, count in window.values()):
                known = zip(window.values(), counts.unbind(), strict=True)
                counts = torch.stack([own if n is None else n.to(device, dtype) for (_, n), own in known])
            pad = losses.new_full((self.size - len(losses),), math.nan)
            rows += [torch.cat([losses, pad]), torch.cat([counts, pad])]
        return torch.stack(rows)

    def take(self, values: Tensor) -> None:
        """Take over (4, size) values, as the mean over several processes."""
        for window, losses, counts in zip(self._windows, values[::2], values[1::2], strict=True):
            for place, step in enumerate(window):
                window[step] = losses[place], counts[place]

    def windows(self, host: Tensor) -> tuple[_Window, _Window]:
        """The two windows as (steps, losses), from a host copy of `tensor`; without the losses that are left out."""
        rows, found = host.reshape(4, self.size).tolist(), list[_Window]()
        for window, losses, counts in zip(self._windows, rows[::2], rows[1::2], strict=True):
            kept = [(s, y) for s, y, n in zip(window, losses, counts, strict=False) if n >= 0]
            found.append(([s for s, _ in kept], [y for _, y in kept]))
        return found[0], found[1]

    def state_dict(self) -> dict[str, object]:
        tensor = self.tensor
        return {"steps": list(self.steps), "values": None if tensor is None else tensor.detach().cpu()}

    def load_state_dict(self, state: dict[str, object], device: torch.device) -> None:
        values, steps = cast(Tensor | None, state["values"]), cast(list[list[int]], state["steps"])
        if values is not None:
            self.size = values.shape[1]
            none: _Entry = torch.zeros((), dtype=torch.float64, device="cpu"), None
            self._windows = dict.fromkeys(steps[0], none), dict.fromkeys(steps[1], none)
            self.take(values.to(device))


def _counted(loss: Tensor, count: Tensor | None) -> Tensor:
    return loss.isfinite().to(torch.float32) if count is None else count


def _joined(known: _Entry, new: _Entry) -> _Entry:
    """The mean of the finite losses, and their number."""
    count, finite = _counted(*known), _counted(*new)
    mean, loss = known[0], new[0].to(known[0].device, non_blocking=True)
    joined = torch.where(count > 0, mean + (loss - mean) / (count + 1), loss)
    return torch.where((finite > 0) | (count == 0), joined, mean), count + finite
