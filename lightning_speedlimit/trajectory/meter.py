"""TrajectoryMeter: the per-step meter for plain PyTorch, Fabric, or anything that steps a torch optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_speedlimit.checks.arguments import MOST_LOSSES, check_at_least, check_choice, check_coordinates
from lightning_speedlimit.checks.guard import shown
from lightning_speedlimit.trajectory import checkpoint, mobility
from lightning_speedlimit.trajectory.description import describe
from lightning_speedlimit.trajectory.draw import DEFAULT, Draw
from lightning_speedlimit.trajectory.estimates import Estimates, Estimator, of_layers
from lightning_speedlimit.trajectory.follower import Follower
from lightning_speedlimit.trajectory.joint import JointSteps
from lightning_speedlimit.trajectory.losses import LossWindows
from lightning_speedlimit.trajectory.mobility import Scalar
from lightning_speedlimit.trajectory.optimizers import followed, parameters_of
from lightning_speedlimit.trajectory.owners import Owners
from lightning_speedlimit.trajectory.ranks import Ranks
from lightning_speedlimit.trajectory.reading import Reader
from lightning_speedlimit.trajectory.recorder import Recorder
from lightning_speedlimit.trajectory.run_totals import RunTotals
from lightning_speedlimit.trajectory.settings import Clock, GradientChanges, Places, Settings, count
from lightning_speedlimit.trajectory.shards import are_sharded, group_of
from lightning_speedlimit.trajectory.sketch import BUCKETS

_LARGEST_SEED = 2**48
_APART = 0x9E3779B1  # between the seeds of processes that hold shards: each draws its own; torch takes 32 bits of them


class TrajectoryMeter:
    """η, ℓ, A, D and the works of a run, through step hooks on its optimizer(s).

    ```python
    meter = TrajectoryMeter(optimizer)
    for batch in batches:
        loss = model(batch); loss.backward()
        meter.record_loss(loss)                 # no sync
        optimizer.step(); optimizer.zero_grad()
    meter.compute()["kinematic_efficiency"]     # the only sync
    ```

    Gradients are taken as they are when `step` begins. Where they are clipped before, call
    `observe_gradients(optimizer)` between backward and clipping: works then come from the unclipped ones.

    Args:
        optimizers: one, or several; wrapped by Fabric or not. A joint step ends when an optimizer that already moved
            in it steps again, or with `end_step()`.
        clock: Δ_k = 1 ("steps") or the learning rate ("lr").
        entropy_production: the estimate of Q that `efficiency` divides by; see the theory page, §2.
        loss_window: losses at each end from which L_0 and L_K are extrapolated.
        measure_every_n_steps: one step of each block of n is measured, drawn by a private generator; sums are
            scaled to all steps and carry standard errors, and bounds hold only up to these.
        momentum_mobility: "steady" (keeps the bound) or "response" (truer in the first 1/(1−β) steps).
        coordinates: models of up to so many are measured exactly; of larger ones so many are drawn at the first
            gradient, bounds hold as ever, and every value carries its standard error. "all": exact at any size. At
            the default, one coordinate of 64 is drawn at least.
        gradient_changes: what changes gradients between `observe_gradients` and the step. "clipping": the force is the
            gradient that was observed; where more than one factor was at work (by value, module by module), the
            mobility is the effective one. "given": no clipping, the force is what the optimizer was given. "unknown":
            told from the numbers, see the limits page; works are NaN where they can't tell.
        layer_of: parameter → name under which its sums are kept apart as well; see `compute_layers`.
        process_group: the processes that train together (DDP: `torch.distributed.group.WORLD`): losses are then
            averaged over them. All of them must call what reads (`compute`, `measure`, `sketch`,
            `compute_layers`), in the same order: each call is one all_reduce. None: this process alone.
        seed: of the generators that draw the measured coordinates and steps.

    Memory, in vectors of the measured coordinates: 4 (θ, θ_0, u, g), + 1 for the gradient before (not for SGD without
    momentum), + 2 for the accumulated mobility, + 2 for decoupled weight decay, + 1 for Adadelta and for response
    mobility each, + 1 for θ_0 as it was, from the first move outside of `step` on; and three to work in where
    no compiled pass does it.

    Raises:
        TypeError: an argument that is no optimizer, or none whose step hooks fire; a process_group that is none.
        ValueError: an unknown name, a number out of range, no optimizer.
    """

    def __init__(
        self,
        optimizers: Optimizer | Iterable[Optimizer],
        *,
        clock: Clock = "steps",
        entropy_production: Estimator = "loss_drop",
        loss_window: int = 50,
        measure_every_n_steps: int = 1,
        momentum_mobility: mobility.MomentumMobility = "steady",
        coordinates: int | Literal["all"] = DEFAULT,
        gradient_changes: GradientChanges = "clipping",
        layer_of: Callable[[Tensor], str] | None = None,
        process_group: Any | None = None,
        seed: int = 0,
    ) -> None:
        self.optimizers = followed(optimizers)
        parameters = parameters_of(self.optimizers)
        ranks = None if (group := group_of(parameters, process_group)) is None else Ranks(group)
        self.sharded = are_sharded(parameters) and ranks is not None
        check_choice("clock", clock, get_args(Clock))
        check_choice("entropy_production", entropy_production, get_args(Estimator))
        check_choice("momentum_mobility", momentum_mobility, get_args(mobility.MomentumMobility))
        check_choice("gradient_changes", gradient_changes, get_args(GradientChanges))
        check_at_least("loss_window", loss_window, 2, MOST_LOSSES)
        check_at_least("measure_every_n_steps", measure_every_n_steps, 1)
        check_at_least("seed", seed, 0, _LARGEST_SEED)
        check_coordinates(coordinates)
        if layer_of is not None and not callable(layer_of):
            raise TypeError(f"layer_of got {shown(layer_of)}, wanted a function: parameter → the name of its layer")
        self.clock, self.entropy_production, self.coordinates = clock, entropy_production, coordinates
        self.reasons: dict[str, str] = {}
        self._latest: RunTotals | None = None
        processes, rank = (ranks.size, ranks.rank) if self.sharded and ranks is not None else (0, 0)
        self._places = Places(self.optimizers)
        self._joint = JointSteps(measure_every_n_steps, seed, sharded=self.sharded)
        settings = Settings(
            optimizers=self.optimizers,
            owners=Owners(self.optimizers),
            changes="clipping" if self.sharded else gradient_changes,
            response=momentum_mobility == "response",
            per_rate=clock == "lr",
            snapshots=measure_every_n_steps > 1,
            draw=Draw(coordinates, count(parameters, processes), seed + _APART * rank),
            place=self._places,
            layer_of=layer_of,
            layers=self._joint.layers,
            overlaps=not all(map(mobility.is_plain_sgd, self.optimizers)),
            processes=processes,
        )
        self._followers = [Follower(optimizer, settings) for optimizer in self.optimizers]
        self._losses = LossWindows(loss_window)
        self.recorder = Recorder(self._followers, self._joint, self._losses, shared=ranks is not None)
        self.reader = Reader(self.recorder, ranks, sharded=self.sharded, per_rate=settings.per_rate)
        self._settings = {  # of the sums: those of others do not add to them
            "clock": clock,
            "every": measure_every_n_steps,
            "momentum_mobility": momentum_mobility,
            "coordinates": coordinates,
        } | ({"processes": processes} if processes else {})

    # -- what a training loop calls --------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """K, joint steps; those that a loss scaler skipped within a fused optimizer included."""
        return self._joint.steps

    @property
    def measured(self) -> int:
        return self._joint.measured

    def record_loss(self, loss: Tensor | float, *, step: int | None = None) -> None:
        """L at the current θ (before the step), in loss units: detached, kept on its device, no sync.

        Called several times before one step (accumulated gradients), the mean counts. Within a step that evaluates
        its closure again and again, the loss at θ_k counts and those after the first move do not.

        Args:
            loss: a scalar. step: the step it belongs to, where it is recorded later; None: the coming one. A
                loss recorded after the last step belongs to θ_K.

        Raises:
            ValueError: a tensor of several numbers. TypeError: no number.
        """
        self.recorder.record_loss(loss, step)

    def record_probe(self, first: Tensor, last: Tensor) -> None:
        """Losses of the same batches at θ_0 and now, (n,) each: from here on loss_drop is their mean difference."""
        self.reader.probe = first.detach(), last.detach()

    def observe_gradients(self, optimizer: Optimizer | None = None, *, scale: Scalar | None = None) -> None:
        """The gradients are raw now: call it after backward and before clipping.

        Args:
            optimizer: None: all of them.
            scale: what the gradients are multiplied by (a loss scaler's scale; a tensor is not read).
        """
        self.recorder.observe(self._followers if optimizer is None else [self.recorder.follower(optimizer)], scale)

    def end_step(self) -> None:
        """The joint step is over: K and τ advance. Needed only where several optimizers step in turn."""
        self.recorder.end_step()

    def close(self) -> None:
        """Remove the hooks; may be called twice. Numbers can still be computed."""
        self.recorder.close()

    # -- what it says ----------------------------------------------------------------------------------------

    def compute(self) -> dict[str, float]:
        """All numbers of the run up to now, by their names; NaN where undefined, with `reasons` (of a value and its
        `…_se` under the value's name). One sync.

        Ends the joint step. Keys: efficiency, efficiency_low, efficiency_drift, efficiency_action,
        kinematic_efficiency, straightness, steadiness, conversion, signal_fraction (no unit); displacement,
        net_displacement, path_length, step_norm, moved_outside (parameter unit); action (parameter²/clock); loss_drop,
        entropy_production, work_… , loss (loss unit); gradient_signal, gradient_noise ((loss/parameter)²); grad_norm,
        grad_norm_clipped (loss/parameter); elapsed, speed_limit_time (clock); learning_rate; …_se.
        """
        return self.measure(sketch=False)[0]

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def measure(self, *, sketch: bool) -> tuple[dict[str, float], Tensor | None]:
        """`compute`, and with it the sketch (4093 float32 on the host) where it is asked for: one sync for both."""
        self.end_step()
        with np.errstate(all="ignore"):  # what is not finite is NaN, with its reason
            found, totals = self.reader.read(sketch=sketch)
        estimates = Estimates(totals, self.entropy_production)
        self.reasons, self._latest = estimates.reasons, totals
        if (failure := self.recorder.failure) is not None:
            self.reasons = dict.fromkeys(estimates.values, failure)
            return dict.fromkeys(estimates.values, math.nan), None
        return estimates.values, found

    def compute_layers(self) -> dict[str, dict[str, float]]:
        """displacement, path_length, action, straightness, …, of each layer that `layer_of` names. One sync."""
        self.compute()
        return self.layers()

    def layers(self) -> dict[str, dict[str, float]]:
        """`compute_layers` as of the last `compute` or `measure`: no sync of its own."""
        known = None if self.recorder.failure is not None else self._latest
        return {} if known is None else of_layers(known, self.entropy_production)

    def sketch(self) -> Tensor:
        """Σ over buckets of s_i (θ − θ_0)_i: (4093,) float32 on the host; distances within 2.2 %. One sync."""
        found = self.measure(sketch=True)[1]
        return torch.zeros(BUCKETS, dtype=torch.float32, device="cpu") if found is None else found

    def accumulated_mobility(self, parameter: Tensor) -> Tensor:
        """m_i = Σ_{k: u_{k,i} ≠ 0} μ_{k,i}, in parameter²/loss, in the parameter's shape. Syncs.

        (Complex: with a last dimension of 2. Of drawn coordinates alone where some are drawn: NaN elsewhere.)

        Raises:
            KeyError: the parameter has not been measured yet. ValueError: its mobility is effective.
        """
        for follower in self._followers:
            found = follower.membership.accumulated_mobility(parameter)
            if found is not None:
                return found * self._joint.factor
        raise KeyError("accumulated_mobility got a parameter that no measured optimizer has moved yet")

    def description(self) -> dict[str, Any]:
        """What is measured and how, in plain types, as a record's `run` wants it: RunRecord(meter.description())."""
        return {
            "clock": self.clock,
            "entropy_production": self.entropy_production,
            "loss_window": self._losses.size,
            "measure_every_n_steps": self._joint.every,
            "coordinates": self.coordinates,
            "measured_coordinates": self.measured_coordinates,
            "optimized_coordinates": self.optimized_coordinates,
            **describe(self.optimizers),
        }

    @property
    def measured_coordinates(self) -> int | None:
        """How many coordinates are measured; None before the first step (of shards: before the first reading)."""
        return self.reader.numbers[0]

    @property
    def optimized_coordinates(self) -> int | None:
        """How many coordinates the optimizers move: as many as are measured, unless some are drawn."""
        return self.reader.numbers[1]

    # -- state -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors (of shards, each process's own): some vectors of the measured coordinates."""
        self.end_step()
        return {"settings": self._settings} | checkpoint.state_of(self.recorder, self.reader)

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a measurement: call it on a new meter, before the first step.

        Raises:
            ValueError: the state is of other optimizers, parameters or settings, or none of `state_dict`; the meter
                has already measured.
        """
        if self.steps:
            raise ValueError(f"load_state_dict needs a new meter, got one that has measured {self.steps} steps")
        if not isinstance(state, dict) or not state.keys() >= {"settings", *checkpoint.KEYS}:
            raise ValueError(f"load_state_dict got {shown(state)}, wanted what state_dict() of a meter returned")
        if state["settings"] != self._settings:
            raise ValueError(
                f"the saved measurement was made with {state['settings']}, got {self._settings}: resume with the "
                "settings that it was made with; sums of different definitions do not add"
            )
        motions = checkpoint.load(self.recorder, self.reader, state)
        self._places.load([p for m in motions for p in zip(m.coordinates.parameters, m.members, strict=True)])
