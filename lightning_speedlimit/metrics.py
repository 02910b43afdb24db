"""The quantities of the speed limit as torchmetrics: accumulated over updates, gathered over ranks.

An update reads no value of a tensor, so nothing waits for the device before `compute`. Sums are float64, float32 on a
device without it, and clouds keep the precision they came in, whatever `.half()`, `.to(dtype)`, `set_dtype` or a
Trainer's precision do to the module around them. Tensors are taken from the metric's device and from the host.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from lightning_speedlimit.checks.tensors import number, positive
from lightning_speedlimit.trajectory.sums import sum_dtype
from lightning_speedlimit.transport import Transport, wasserstein2_squared

__all__ = ["EntropyProduction", "SpeedLimitEfficiency", "Wasserstein2Squared"]

_CLOUD_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _KeepsPrecision(Metric):
    """A metric whose states follow the module to another device, but not to another dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Module:
        # Metric shields its states from .half() and the like, but not from .to(dtype), with which Lightning's
        # "bf16-true" would leave 8 bits of the sums; torchmetrics has no public hook for it.
        def move(state: Tensor) -> Tensor:
            device = fn(torch.empty(0, dtype=torch.float32, device=state.device)).device
            dtype = sum_dtype(device) if state.ndim == 0 else _kept(state.dtype, device)
            # What loses precision is cast here, what gains it there: one of the two may know no float64.
            state = state if dtype == torch.float64 else state.to(dtype)
            return state.to(device).to(dtype)

        return super()._apply(move, exclude_state)


class Wasserstein2Squared(_KeepsPrecision):
    """W₂² = min over plans π of Σ π_ij |x_i − y_j|², of all particles given, on all ranks; all weigh the same.

    With a replica of a run in each update or on each rank, x its weights at the start and y those now, this is the
    W₂²(p_0, p_τ) of the speed limit τ ≥ W₂²/(⟨L⟩_0 − ⟨L⟩_τ) (Seroussi, Alemi, Helias, Ringel, Speed Limits for Deep
    Learning, arXiv:2307.14653).

    `update(x, y)` takes x (N, D) and y (M, D), or (D,) for one particle; N ≠ M is allowed. It keeps a copy of both on
    the metric's device, so weights may change afterwards. `compute()` returns W₂² per particle, a scalar whose unit
    is that of the coordinates, squared; every rank solves the same transport problem, of all particles. `forward`
    solves that of its own particles at each call: use `update` where their value is not needed.

    NaN: before the first update, and where a coordinate is not finite or beyond 1e150: a diverged replica ends
    no training.

    Args:
        tolerance: upper/lower − 1 that is aimed at.
        kwargs: those of `torchmetrics.Metric`.

    Raises:
        TypeError, ValueError: at construction, a tolerance that is not positive; in `update`, clouds that are no dense
            floating-point tensors, are empty, on another device, or of different D; in `compute`, ranks of different D.

    Warns:
        UserWarning: in `compute`, half precision.

    Example:
        >>> import torch
        >>> metric = Wasserstein2Squared()
        >>> metric.update(x=torch.tensor([0.0, 0.0]), y=torch.tensor([4.0, 0.0]))
        >>> metric.update(x=torch.tensor([3.0, 0.0]), y=torch.tensor([1.0, 0.0]))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
        >>> metric.lower <= 1 <= metric.upper
        True
        >>> metric.transport.identity_excess
        9.0
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    x: list[Tensor]
    y: list[Tensor]
    tolerance: float
    transport: Transport | None
    """What the last `compute` or `forward` found, whole; None before it, after `reset`, and where W₂² is NaN."""

    def __init__(self, tolerance: float = 1e-3, **kwargs: Any) -> None:
        tolerance = positive("tolerance", tolerance, "1e-3 is the default")
        super().__init__(**{"dist_sync_fn": _gather_particles, **kwargs})
        self.tolerance = tolerance
        self.transport = None
        self.add_state("x", [], dist_reduce_fx="cat")
        self.add_state("y", [], dist_reduce_fx="cat")

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add particles: x (N, D) and y (M, D), or (D,) for one."""
        x, y = _particles("x", x, self.device), _particles("y", y, self.device)
        if x.shape[1] != y.shape[1]:
            raise ValueError(
                f"x and y must have the same number of coordinates, got {tuple(x.shape)} and {tuple(y.shape)}; "
                "particles are rows: transpose, or compare clouds of one space"
            )
        if self.x and self.x[0].shape[1] != x.shape[1]:
            raise ValueError(
                f"x and y must have {self.x[0].shape[1]} coordinates as those before, got {x.shape[1]}; "
                "use a metric for each space, or reset()"
            )
        self.x.append(x)
        self.y.append(y)

    def compute(self) -> Tensor:
        """W₂², a scalar; NaN where there is no particle, or a coordinate is not finite."""
        self.transport = None
        if len(self.x):
            x, y = dim_zero_cat(self.x), dim_zero_cat(self.y)
            if _finite(x) and _finite(y):
                self.transport = wasserstein2_squared(x, y, tolerance=self.tolerance)
        value = math.nan if self.transport is None else self.transport.value
        return torch.full((), value, dtype=sum_dtype(self.device), device=self.device)

    def reset(self) -> None:
        """Forget all particles, and what was found of them."""
        super().reset()
        self.transport = None

    @property
    def lower(self) -> float:
        """Lower bound of W₂² that the last `compute` or `forward` proved; NaN where `transport` is None."""
        return math.nan if self.transport is None else self.transport.lower

    @property
    def upper(self) -> float:
        """Upper bound of W₂² that the last `compute` or `forward` proved; NaN where `transport` is None."""
        return math.nan if self.transport is None else self.transport.upper


class EntropyProduction(_KeepsPrecision):
    """Q = Σ_k w_k: temperature × total entropy production, in units of the loss, from works w_k.

    A work is force times update, f_k·u_k with f = −∇L, or what takes its place: the drop of the loss, which the speed
    limit τ ≥ W₂²/Q divides by in Seroussi, Alemi, Helias, Ringel, Speed Limits for Deep Learning, arXiv:2307.14653.

    `update(work)` takes a number, or a tensor of any shape, which is summed, in units of the loss. `compute()` returns
    the sum over updates and ranks, a scalar: of shards of a run's parameters the run's Q, of N replicas N times their
    mean. Before the first update it is 0, with torchmetrics' warning. NaN where a work was NaN.

    Args:
        kwargs: those of `torchmetrics.Metric`.

    Raises:
        TypeError, ValueError: in `update`, a work that is neither a real number nor a tensor of real numbers, or that
            is on another device.

    Example:
        >>> import torch
        >>> metric = EntropyProduction()
        >>> metric.update(0.5)
        >>> metric.update(torch.tensor([1.0, 2.0]))
        >>> metric.compute()
        tensor(3.5000, dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = None
    full_state_update = False

    work: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("work", _zero(self.device), dist_reduce_fx="sum")

    def update(self, work: Tensor | float) -> None:
        """Add a work, or the sum of a tensor of works."""
        self.work = self.work + _total("work", work, self.work)

    def compute(self) -> Tensor:
        """Q, a scalar in units of the loss."""
        return self.work


class SpeedLimitEfficiency(_KeepsPrecision):
    """η = Σ_n D_n² / (τ Σ_n A_n): the kinematic efficiency τ_SL/τ, in [0, 1] to rounding.

    n runs over shards of one run's parameters, or over replicas: D_n = ‖θ_K − θ_0‖ is its displacement, A_n =
    Σ_k ‖u_k‖²/Δ_k its action, τ = Σ_k Δ_k the elapsed time, the largest given. η ≤ 1 for any parts, as
    D_n² ≤ τ_n A_n ≤ τ A_n (Cauchy–Schwarz). With the drop of the loss for the action this is the efficiency of
    Seroussi, Alemi, Helias, Ringel, Speed Limits for Deep Learning, arXiv:2307.14653, for gradient flow.

    `update(displacement_squared, action, elapsed)` takes one n with its values over the whole run (the displacements
    of its steps do not add up), as numbers or tensors of one element, in parameter², parameter²/clock and clock; any
    clock. `compute()` returns η over all updates and ranks, a scalar without a unit.

    NaN: before the first update, where the action or the elapsed time is 0 (0/0) or negative, and where a value was
    NaN. Nothing is clipped. Values are not checked in `update`, which would have to wait for the device.

    Args:
        kwargs: those of `torchmetrics.Metric`.

    Raises:
        TypeError, ValueError: in `update`, what is neither a real number nor a tensor of one, or is on another device.

    Example:
        >>> metric = SpeedLimitEfficiency()
        >>> metric.update(displacement_squared=4.0, action=1.0, elapsed=10.0)
        >>> metric.update(displacement_squared=1.0, action=1.0, elapsed=10.0)
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = True
    full_state_update = False

    displacement_squared: Tensor
    action: Tensor
    elapsed: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("displacement_squared", _zero(self.device), dist_reduce_fx="sum")
        self.add_state("action", _zero(self.device), dist_reduce_fx="sum")
        self.add_state("elapsed", _zero(self.device), dist_reduce_fx="max")

    def update(self, displacement_squared: Tensor | float, action: Tensor | float, elapsed: Tensor | float) -> None:
        """Add a shard or a replica, with its values over the whole run."""
        squared = _scalar("displacement_squared", displacement_squared, self.displacement_squared)
        action = _scalar("action", action, self.action)
        elapsed = _scalar("elapsed", elapsed, self.elapsed)
        self.displacement_squared = self.displacement_squared + squared
        self.action = self.action + action
        self.elapsed = torch.maximum(self.elapsed, elapsed)

    def compute(self) -> Tensor:
        """η, a scalar without a unit; NaN where τ ΣA is not positive."""
        most = self.elapsed * self.action
        return torch.where(most > 0, self.displacement_squared / most, math.nan)


def _zero(device: torch.device) -> Tensor:
    return torch.zeros((), dtype=sum_dtype(device), device=device)


def _kept(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype itself, except float64 on a device without it."""
    return sum_dtype(device) if dtype == torch.float64 else dtype


def _total(name: str, value: object, like: Tensor) -> Tensor:
    """A number, or the sum of a tensor, as a scalar like a state."""
    if isinstance(value, Real):
        return torch.full_like(like, value if isinstance(value, float) else number(name, value))
    if not isinstance(value, Tensor) or value.is_complex():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a real number or a real tensor, got {got}; use float(), or .real")
    _check_device(name, value, like.device)
    return value.sum(dtype=like.dtype).to(like.device, non_blocking=True)


def _scalar(name: str, value: object, like: Tensor) -> Tensor:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} must be a scalar, got a tensor of shape {tuple(value.shape)}; add it up: .sum()")
    return _total(name, value, like)


def _particles(name: str, cloud: object, device: torch.device) -> Tensor:
    """A copy (N, D) on the device, without a graph; (D,) is one particle."""
    if not isinstance(cloud, Tensor) or cloud.layout != torch.strided:
        got = cloud.layout if isinstance(cloud, Tensor) else type(cloud).__name__
        raise TypeError(f"{name} must be a dense tensor, got {got}; use torch.stack, or .to_dense()")
    if cloud.dtype not in _CLOUD_DTYPES:
        raise TypeError(f"{name} must be of a real floating type, got {cloud.dtype}; use .to(torch.float64)")
    if cloud.ndim not in (1, 2) or not cloud.numel():
        raise ValueError(
            f"{name} must have shape (particles, coordinates), or (coordinates,) for one particle, and none of them 0, "
            f"got {tuple(cloud.shape)}; use flatten(1)"
        )
    _check_device(name, cloud, device)
    copy = cloud.detach().clone().to(_kept(cloud.dtype, device))
    return copy.to(device, non_blocking=True).reshape(-1, cloud.shape[-1])


def _check_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device not in (device, torch.device("cpu")):
        raise ValueError(
            f"{name} must be on the metric's device, {device}, or on the host, got {value.device}; "
            f"use metric.to({str(value.device)!r})"
        )


def _finite(cloud: Tensor) -> bool:
    """Whether squares of all coordinates are numbers: up to 1e150."""
    return not cloud.numel() or bool((torch.stack(cloud.aminmax()).double().abs() < 1e150).all())


def _gather_particles(held: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """[(N_r, D)] of every rank r, in one dtype; [(0,)] where none holds any.

    torchmetrics' own gathering asks for one dtype and as many dimensions everywhere, neither of which a rank without
    particles knows.
    """
    rows, width = held.shape if held.ndim == 2 else (0, 0)
    own = torch.tensor([rows, width, _CLOUD_DTYPES.index(held.dtype)], dtype=torch.int64, device=held.device)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    sizes = torch.stack(every).tolist()
    widths = sorted({size[1] for size in sizes if size[0]})
    if not widths:
        return [held]
    if len(widths) > 1:
        raise ValueError(f"particles must have as many coordinates on all ranks, got {widths}; use a metric for each")
    dtype = functools.reduce(torch.promote_types, [_CLOUD_DTYPES[size[2]] for size in sizes if size[0]])
    padded = torch.zeros(max(size[0] for size in sizes), widths[0], dtype=dtype, device=held.device)
    if rows:
        padded[:rows] = held
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return [part[: size[0]] for part, size in zip(parts, sizes, strict=True)]
