"""Joint steps: K, τ, ‖u‖ over all that moved in one, and what sampled steps say of their spread."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor

from lightning_speedlimit.trajectory.follower import Follower
from lightning_speedlimit.trajectory.mobility import Scalar
from lightning_speedlimit.trajectory.motion import Motion
from lightning_speedlimit.trajectory.norms import total
from lightning_speedlimit.trajectory.ranks import Rows, norms_row
from lightning_speedlimit.trajectory.sums import RunningSum, sum_dtype

_SUMS = ("skipped", "rate_sum", "paths")


class JointSteps:
    """One step of each optimizer, or of some of them.

    Args:
        every: one step of each block of so many is measured. seed: of their draw. sharded: rows are kept for what
            is not linear in the shards.
    """

    def __init__(self, every: int, seed: int, *, sharded: bool) -> None:
        self.every, self.seed = every, seed
        self.steps = self.measured = 0  # K, skipped ones included
        self.read_at = 0  # steps at the last reading
        self.elapsed = self.rate_squares = 0.0  # Σ lr and Σ lr²
        self.several_rates = False
        self.rate: Scalar = math.nan
        self.moved: set[int] = set()  # optimizers, in the step that goes on
        self.squared: Tensor | None = None  # ‖u‖² of the last measured step
        self.left_out: tuple[int, Tensor] | None = None  # the last step, and whether a loss scaler skipped it
        self.skipped: RunningSum | None = None  # steps and time in which a fused optimizer found inf
        self.rate_sum: RunningSum | None = None  # both of learning rates that live on the device
        self.rows = Rows() if sharded else None
        self.samples = Rows() if every > 1 else None
        self.layers: list[str] = []  # names; "" of all where none has one
        self.paths: RunningSum | None = None  # Σ ‖u‖ of each layer alone
        self._rates: list[Scalar] = []  # of the joint step, as its optimizers used them
        self._parts: list[tuple[Follower, list[Motion]]] = []
        self._valid: list[Tensor] = []

    @property
    def factor(self) -> float:
        """Steps over measured steps: what sums over measured steps are multiplied by. NaN before the first."""
        if self.steps == 0:
            return 1.0
        return self.steps / self.measured if self.measured else math.nan

    def measuring(self) -> bool:
        """One step of each block of n, from a generator seeded by the block: resuming draws the same."""
        if self.every == 1:
            return True
        block, position = divmod(self.steps, self.every)
        return random.Random(f"{self.seed}:{block}").randrange(self.every) == position

    def add(self, follower: Follower, rates: list[Scalar], valid: Tensor | None, *, measured: bool) -> None:
        """An optimizer has stepped."""
        self.moved.add(id(follower.optimizer))
        self._rates += rates
        if measured:
            self._parts.append((follower, list(follower.motions)))
        if valid is not None:
            self._valid.append(valid)

    def drop(self) -> None:
        """The step counts, though it could not be measured."""
        self.steps += 1
        self.moved, self._rates, self._parts, self._valid = set(), [], [], []

    def end(self, followers: list[Follower]) -> None:
        """The joint step is over; followers: of all optimizers."""
        rate = self._rate()
        motions = [motion for _, own in self._parts for motion in own]
        skipped = self._leave_out(rate)
        if motions:
            for follower in followers:
                follower.took_part = any(follower is other for other, _ in self._parts)
            self._close(motions, [motion for follower in followers for motion in follower.motions], skipped)
        self.measured += bool(self._parts) or self.measuring()
        self.steps += 1
        if isinstance(rate, Tensor):
            if self.rate_sum is None:
                self.rate_sum = RunningSum(2, device=rate.device)
            self.rate_sum.add_(torch.stack([rate, rate * rate]))
        else:
            self.elapsed += rate
            self.rate_squares += rate * rate
        self.rate = rate
        self.moved, self._rates, self._parts, self._valid = set(), [], [], []

    def _rate(self) -> Scalar:
        first = self._rates[0]
        for rate in self._rates:
            tensors = isinstance(rate, Tensor) or isinstance(first, Tensor)
            self.several_rates |= rate is not first and (tensors or bool(rate != first))
        return first

    def _close(self, motions: list[Motion], known: list[Motion], skipped: Tensor | None) -> None:
        """motions: that moved; known: all; skipped: see `_leave_out`."""
        squares = total([motion.layer_squares(len(self.layers)) for motion in motions])
        squared = squares.sum()
        for motion in motions:
            own = motion.coordinates
            motion.share_path(squared.to(own.device, non_blocking=not own.on_host))  # the host reads it at once
        if any(self.layers) and self.rows is None:  # of shards, no process knows a layer's path
            self._add_paths(squares)
        if self.rows is not None:
            norms = [n for follower, _ in self._parts if (n := follower.norms()) is not None]
            self.rows.append(norms_row(squared, total(norms)))
        if self.samples is not None:
            here = {id(motion) for motion in motions}
            sums = [m.snapshot if id(m) in here and m.snapshot is not None else m.sums.totals() for m in known]
            self.samples.append(total(sums))
        if skipped is not None and self.squared is not None:
            squared = torch.where(skipped.to(squared.device, non_blocking=True), self.squared, squared)
        self.squared = squared

    def _add_paths(self, squares: Tensor) -> None:
        """‖u‖ of each layer, which may be spread over several motions."""
        known = self.paths
        if known is None or len(known.value) < len(squares):
            self.paths = RunningSum(len(squares), device=squares.device)
            if known is not None:
                self.paths.load_(torch.cat([known.host(), torch.zeros(len(squares) - len(known.value))]))
        assert self.paths is not None
        self.paths.add_(squares.sqrt().to(self.paths.value.device, non_blocking=True))

    def _leave_out(self, rate: Scalar) -> Tensor | None:
        """A step that fused optimizers left out is none: neither its time nor its loss counts. None: it is one.

        (Others do not even step then. Measured or not: what is known here costs nothing.)
        """
        if not self._valid or len(self._valid) < len(self.moved):
            return None
        skipped = total([valid.to(sum_dtype(valid.device)) for valid in self._valid]) == 0
        missed = skipped.to(sum_dtype(skipped.device))
        if self.skipped is None:
            self.skipped = RunningSum(2, device=missed.device)
        self.skipped.add_(torch.stack([missed, missed * rate]))
        self.left_out = self.steps, skipped
        return skipped

    def state_dict(self) -> dict[str, Any]:
        sums = {n: s.host() for n in _SUMS if (s := getattr(self, n)) is not None}
        return {
            "steps": self.steps,
            "measured": self.measured,
            "read_at": self.read_at,
            "elapsed": self.elapsed,
            "rate_squares": self.rate_squares,
            "several_rates": self.several_rates,
            "rate": float(self.rate),
            "squared": None if self.squared is None else self.squared.detach().cpu(),
            "sums": sums,
            "layers": list(self.layers),
            "rows": None if self.rows is None else self.rows.state_dict(),
            "samples": None if self.samples is None else self.samples.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        for name in ("steps", "measured", "read_at", "elapsed", "several_rates", "rate"):
            setattr(self, name, state[name])
        self.rate_squares = state.get("rate_squares", math.nan)  # former versions did not sum them up
        self.squared = None if state["squared"] is None else state["squared"].to(device)
        for name, value in state["sums"].items():
            if name == "rate_sum" and len(value) == 1:  # of a former version: without Σ lr²
                value = torch.cat([value, value.new_full((1,), math.nan)])
            known = RunningSum(*value.shape, device=device)
            known.load_(value)
            setattr(self, name, known)
        for name in ("rows", "samples"):
            if getattr(self, name) is not None:
                getattr(self, name).load_state_dict(state[name], device)
