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
from lightning_speedlimit.trajectory.sums import RunningSum, on, sum_dtype

_PLAIN = ("steps", "measured", "read_at", "elapsed", "rate_squares", "several_rates")


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
        self.squared: Tensor | None = None  # ‖u‖² of the last measured step
        self.left_out: tuple[int, Tensor] | None = None  # the last step, and whether a loss scaler skipped it
        # "skipped": steps and time in which a fused optimizer found inf; "rate_sum": Σ lr and Σ lr² of learning rates
        # that live on the device; "paths": Σ ‖u‖ of each layer alone.
        self.sums: dict[str, RunningSum] = {}
        self.rows = Rows() if sharded else None
        self.samples = Rows() if every > 1 else None
        self.layers: list[str] = []  # names; "" of all where none has one
        self.begin()

    def begin(self) -> None:
        """Another step; nothing has moved in it."""
        self.moved: dict[Follower, list[Motion]] = {}  # in the step that goes on, and what was measured of it
        self._rates: list[Scalar] = []  # as the optimizers used them
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
        self.moved[follower] = list(follower.motions) if measured else []
        self._rates += rates
        if valid is not None:
            self._valid.append(valid)

    def advance(self) -> None:
        """The step counts, even where it could not be measured."""
        self.steps += 1
        self.begin()

    def end(self, followers: list[Follower]) -> None:
        """The joint step is over; followers: of all optimizers."""
        rate = self._rate()
        motions = [motion for own in self.moved.values() for motion in own]
        skipped = self._leave_out(rate)
        if motions:
            for follower in followers:
                follower.took_part = bool(self.moved.get(follower))
            self._close(motions, [motion for follower in followers for motion in follower.motions], skipped)
        self.measured += bool(motions) or self.measuring()
        if isinstance(rate, Tensor):
            self._add("rate_sum", torch.stack([rate, rate * rate]))
        else:
            self.elapsed += rate
            self.rate_squares += rate * rate
        self.rate = rate
        self.advance()

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
            self._add("paths", squares.sqrt())
        if self.rows is not None:
            norms = [n for follower, own in self.moved.items() if own and (n := follower.norms()) is not None]
            self.rows.append(norms_row(squared, total(norms)))
        if self.samples is not None:
            sums = [m.snapshot if m in motions and m.snapshot is not None else m.sums.totals() for m in known]
            self.samples.append(total(sums))
        if skipped is not None and self.squared is not None:
            squared = torch.where(skipped.to(squared.device, non_blocking=True), self.squared, squared)
        self.squared = squared

    def _add(self, name: str, terms: Tensor) -> None:
        """To a sum that may begin now, or have more terms than before: those of new layers."""
        known = self.sums.get(name)
        if known is None or len(known.value) < len(terms):
            self.sums[name] = RunningSum(len(terms), device=terms.device)
            if known is not None:
                self.sums[name].load_(torch.nn.functional.pad(known.host(), (0, len(terms) - len(known.value))))
        self.sums[name].add_(terms.to(self.sums[name].value.device, non_blocking=True))

    def _leave_out(self, rate: Scalar) -> Tensor | None:
        """A step that fused optimizers left out is none: neither its time nor its loss counts. None: it is one.

        (Others do not even step then. Measured or not: what is known here costs nothing.)
        """
        if not self._valid or len(self._valid) < len(self.moved):
            return None
        skipped = total([valid.to(sum_dtype(valid.device)) for valid in self._valid]) == 0
        missed = skipped.to(sum_dtype(skipped.device))
        self._add("skipped", torch.stack([missed, missed * rate]))
        self.left_out = self.steps, skipped
        return skipped

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _PLAIN} | {
            "rate": float(self.rate),
            "squared": on("cpu", self.squared),
            "sums": {name: total.host() for name, total in self.sums.items()},
            "layers": list(self.layers),
            "rows": None if self.rows is None else self.rows.state_dict(),
            "samples": None if self.samples is None else self.samples.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """All but the layers: the motions need those before."""
        for name in (*_PLAIN, "rate"):
            setattr(self, name, state[name])
        self.squared = on(device, state["squared"])
        for name, value in state["sums"].items():
            self.sums[name] = RunningSum(len(value), device=device)
            self.sums[name].load_(value)
        for name in ("rows", "samples"):
            if getattr(self, name) is not None:
                getattr(self, name).load_state_dict(state[name], device)
