"""Running sums that stay on the device, as exact as float64 or, without it, as pairs of float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_speedlimit.trajectory.compiled import Passes

# Sums over the run of each row. Of drawn coordinates they are unweighted; the signs are those of −f.
SUMS = (
    "squares",  # Σ ‖u‖²
    "action",  # Σ ‖u‖²/lr, on the clock "lr"
    "path_length",  # Σ ‖u‖²/‖u of all‖, which adds up to Σ ‖u‖
    "free_squares",  # Σ ‖u‖², u without decoupled decay, where there is one
    "work_met",  # Σ −f_k·u_k over the steps whose next gradient is known
    "work_anti_ito",  # Σ −f_{k+1}·u_k over those steps
    "l2_drop",  # ½w Σ (‖θ_{k+1}‖² − ‖θ_k‖²)
    "work_action",  # Σ u²/μ
    "work_decay",  # Σ f_k·v_k of decoupled decay, v = −lr w θ_k; with this sign
    "gradient_signal",  # Σ g_k·g_{k−1} over the steps whose gradient before is known
    "gradient_noise",  # Σ (‖g_k‖² − g_k·g_{k−1}) over those steps
)
NEGATIVE = ("work_met", "work_anti_ito", "l2_drop")  # products with −f
_DOUBLE = 8  # bytes
_RENORMALISED = 64  # additions to `Pair.low` between two renormalisations: it rounds to 4e-6 of itself at most


def sum_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it, else float32 (kept in compensated pairs)."""
    return torch.float32 if device.type == "mps" else torch.float64


def on(device: torch.device | str, tensor: Tensor | None) -> Tensor | None:
    """A copy on a device, where there is something to copy."""
    return None if tensor is None else tensor.detach().to(device, copy=True)


def masked(row: Tensor, valid: Tensor | bool | None) -> Tensor:
    """0 of a step that was none.

    valid: on the device, False where a loss scaler skipped the step. No tensor: it was one.
    """
    return torch.where(valid, row, torch.zeros_like(row)) if isinstance(valid, Tensor) else row


def cut(tensor: Tensor, rows: slice) -> Tensor:
    """Some of its rows; all of them are the tensor itself: no operation."""
    return tensor if rows.stop - rows.start == len(tensor) else tensor[rows]


class RunningSum:
    """S ← S + x for a tensor of any shape: float64, or float32 with Kahan's correction carried along.

    Kahan, "Pruning inverse rounding errors in summation", CACM 8(1), 1965: the pair (sum, correction)
    has an error of 2ε, whatever the number of terms.
    """

    def __init__(self, *shape: int, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype or sum_dtype(device)
        self.value = torch.zeros(shape, dtype=self.dtype, device=device)
        self.correction = None if self.dtype == torch.float64 else torch.zeros_like(self.value)

    def add_(self, increment: Tensor, alpha: float | Tensor = 1.0, rows: slice | None = None) -> None:
        """S[rows] ← S[rows] + alpha x."""
        if isinstance(alpha, Tensor):
            increment, alpha = increment * alpha, 1.0
        value = self.value if rows is None else cut(self.value, rows)
        if self.correction is None:
            value.add_(increment, alpha=alpha)
            return
        correction = self.correction if rows is None else cut(self.correction, rows)
        corrected = increment.to(self.dtype) * alpha - correction
        total = value + corrected
        correction.copy_((total - value) - corrected)
        value.copy_(total)

    def copy_(self, other: RunningSum) -> None:
        """S ← the other one, with its correction."""
        for own, value in zip(self.parts(), other.parts(), strict=True):
            own.copy_(value)

    def parts(self) -> list[Tensor]:
        """The tensors whose float64 difference is the sum: [value] or [value, correction]."""
        return [self.value] if self.correction is None else [self.value, self.correction]

    def load_(self, value: Tensor) -> None:
        """Take over a float64 host value."""
        self.value.copy_(value.reshape(self.value.shape))
        if self.correction is not None:
            rest = self.value.cpu().double() - value.cpu().double().reshape(self.value.shape)
            self.correction = rest.to(self.value.device, self.dtype)

    def host(self) -> Tensor:
        """The sum as a float64 tensor on the host (a device sync)."""
        first, *rest = (part.detach().cpu().double() for part in self.parts())
        return first - rest[0] if rest else first.clone()


class Term(NamedTuple):
    """What is added to the sum of a name: factor · row, the row as `Coordinates.dots` makes it, scaled.

    rows: where; None: all of them.
    """

    name: str
    row: Tensor
    factor: float | Tensor = 1.0
    rows: slice | None = None


class RowSums:
    """SUMS of each row; those that nothing has been added to take no memory.

    Args:
        weights: of the rows. unscaled: what products of rows are multiplied by, which are scaled. passes: that the
            host has compiled.
    """

    def __init__(self, weights: Tensor, unscaled: float, passes: Passes | None) -> None:
        self._weights, self._count, self._unscaled, self._passes = weights, len(weights), unscaled, passes
        self.known: dict[str, RunningSum] = {}

    def add(self, terms: Sequence[Term]) -> None:
        """S[rows] ← S[rows] + factor · row for each."""
        numbers = [term.factor for term in terms if not isinstance(term.factor, Tensor)]
        if self._passes is not None and len(numbers) == len(terms):
            found = zip(map(self._place, terms), (term.row for term in terms), numbers, strict=True)
            self._passes.add([(place, row, factor * self._unscaled) for place, row, factor in found])
            return
        for name, row, factor, rows in terms:
            self._sum(name).add_(row, factor * self._unscaled, rows or slice(0, self._count))

    def _place(self, term: Term) -> int:
        """Where a term is added, in memory."""
        first = 0 if term.rows is None else term.rows.start
        return self._sum(term.name).value.data_ptr() + _DOUBLE * first

    def begin(self, name: str, like: str) -> None:
        """A sum that was the same as another one up to now."""
        if name not in self.known and like in self.known:
            self._sum(name).copy_(self.known[like])

    def of(self, name: str) -> RunningSum | None:
        """None: 0. Without decoupled decay all of u is free of it."""
        found = self.known.get(name)
        return self.known.get("squares") if found is None and name == "free_squares" else found

    def totals(self) -> Tensor:
        """Over all rows as they are now, (SUMS,)."""
        weights = self._weights
        return torch.stack([weights.new_zeros(()) if (s := self.of(n)) is None else s.value @ weights for n in SUMS])

    def load(self, name: str, value: Tensor) -> None:
        """Take over what was saved."""
        self._sum(name).load_(value)

    def _sum(self, name: str) -> RunningSum:
        if name not in self.known:
            self.known[name] = RunningSum(self._count, device=self._weights.device)
        return self.known[name]


class Pair:
    """high + low: what is added step by step goes into `low`, which keeps its digits beside a sum of many steps.

    (Equal terms added to one float32 are each off by 0.8 % after 10⁵ of them.)
    """

    def __init__(self, like: Tensor) -> None:
        self.high, self.low = torch.zeros_like(like), torch.zeros_like(like)
        self.count = 0

    def added(self) -> None:
        """Something has been added to `low`."""
        self.count += 1
        if self.count % _RENORMALISED == 0:
            self.renormalise()

    def renormalise(self) -> None:
        """The same sum with all of it that fits in `high` (Dekker's fast two-sum, where |high| ≥ |low|)."""
        total = self.high + self.low
        self.low -= total - self.high
        self.high.copy_(total)

    def value(self) -> Tensor:
        """The sum, float64 where there is one."""
        return self.high.to(sum_dtype(self.high.device)) + self.low
