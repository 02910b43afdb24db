"""TrajectoryMeter: the per-step meter for plain PyTorch, Fabric, or anything that steps a torch optimizer."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_speedlimit.trajectory import checkpoint, losses, mobility
from lightning_speedlimit.trajectory.clipping import GradientChanges
from lightning_speedlimit.trajectory.description import describe_optimizers
from lightning_speedlimit.trajectory.draw import DEFAULT, Draw
from lightning_speedlimit.trajectory.estimates import Estimates, Estimator, RunTotals
from lightning_speedlimit.trajectory.follower import Follower
from lightning_speedlimit.trajectory.joint import JointSteps
from lightning_speedlimit.trajectory.mail import Mail
from lightning_speedlimit.trajectory.mobility import Scalar
from lightning_speedlimit.trajectory.optimizers import (
    check_at_least,
    check_choice,
    check_coordinates,
    followed,
    unwrapped,
    within_another_step,
)
from lightning_speedlimit.trajectory.ranks import Ranks, alike, header
from lightning_speedlimit.trajectory.reading import NO_SKETCH, NOT_ALIKE, Part, Reader, loss_drop
from lightning_speedlimit.trajectory.shards import are_sharded, group_of, is_flat
from lightning_speedlimit.trajectory.sketch import BUCKETS

Clock = Literal["steps", "lr"]

_Method = TypeVar("_Method", bound=Callable[..., Any])


def _never_raising(method: _Method) -> _Method:
    """For hooks within a training: a fault of the measurement ends the measurement, never the training.

    (Lightning would take a StopIteration for the end of the epoch, for one.)
    """

    @functools.wraps(method)
    def guarded(meter: TrajectoryMeter, *args: Any, **kwargs: Any) -> Any:
        if meter._failure is not None:
            return None
        try:
            return method(meter, *args, **kwargs)
        except Exception as error:
            meter._fail(error)
            return None
        except BaseException:  # Ctrl-C, perhaps with half of a step in the sums
            meter._interrupted = True
            raise

    return cast(_Method, guarded)


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

    Memory, in vectors of the measured coordinates: 5 (θ before and after the step, θ_0, u, g), + 2 for the accumulated
    mobility, + 2 for decoupled weight decay, + 1 for Adadelta, for response mobility and for a second state entry each.

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
        self.optimizers, others = followed(optimizers)
        parameters = [p for o in self.optimizers for g in o.param_groups for p in g["params"]]
        group = group_of(parameters, process_group)
        self._ranks = None if group is None else Ranks(group)
        self.sharded = are_sharded(parameters) and self._ranks is not None
        check_choice("clock", clock, get_args(Clock))
        check_choice("entropy_production", entropy_production, get_args(Estimator))
        check_choice("momentum_mobility", momentum_mobility, get_args(mobility.MomentumMobility))
        check_choice("gradient_changes", gradient_changes, get_args(GradientChanges))
        check_at_least("loss_window", loss_window, 2)
        check_at_least("measure_every_n_steps", measure_every_n_steps, 1)
        check_coordinates(coordinates)
        self.clock, self.entropy_production, self.coordinates = clock, entropy_production, coordinates
        self.reasons: dict[str, str] = {}
        self._places = _Places(self.optimizers)
        processes = self._ranks.size if self.sharded and self._ranks is not None else 0
        rank = self._ranks.rank if self.sharded and self._ranks is not None else 0
        draw = Draw(coordinates, _count(parameters, processes), seed + _APART * rank)
        self._followers = {
            id(optimizer): Follower(
                optimizer,
                changes="clipping" if self.sharded else gradient_changes,
                response=momentum_mobility == "response",
                per_rate=clock == "lr",
                snapshots=measure_every_n_steps > 1,
                draw=draw,
                place=self._places,
                layer_of=layer_of,
                others=others[id(optimizer)],
                gradient_elsewhere=self._has_gradient,
                processes=processes,
            )
            for optimizer in self.optimizers
        }
        self._settings = {
            "clock": clock,
            "every": measure_every_n_steps,
            "momentum_mobility": momentum_mobility,
            "coordinates": coordinates,
        }
        self._settings |= {"processes": processes} if processes else {}
        self._losses = losses.LossWindows(loss_window)
        self._joint = JointSteps(measure_every_n_steps, seed, sharded=self.sharded)
        self._reader = Reader(list(self._followers.values()), self._ranks, sharded=self.sharded)
        self._probe: tuple[Tensor, Tensor] | None = None
        self._loss_step: int | None = None  # of the last loss, until an optimizer steps
        self._failure: str | None = None
        self._interrupted = False
        self._latest: RunTotals | None = None
        self._handles: list[Any] = []
        self._hook()

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
        """
        if step is None and self.in_step and self._failure is None:
            return
        value = (
            loss.detach().reshape(()) if isinstance(loss, Tensor) else torch.tensor(float(loss), dtype=torch.float64)
        )
        at = self.steps if step is None else step
        if self._joint.moved and step is None:
            at = self.steps + 1  # the joint step has moved: the loss belongs to what follows it
        self._losses.record(value.real if value.is_complex() else value, at, again=at == self._loss_step)
        self._loss_step = at
        if self._joint.left_out is not None and self._joint.left_out[0] == at:
            self._losses.leave_out(*self._joint.left_out)

    def record_probe(self, first: Tensor, last: Tensor) -> None:
        """Losses of the same batches at θ_0 and now, (n,) each: from here on loss_drop is their mean difference."""
        self._probe = first.detach(), last.detach()

    def observe_gradients(self, optimizer: Optimizer | None = None, *, scale: Scalar | None = None) -> None:
        """The gradients are raw now: call it after backward and before clipping.

        Args:
            optimizer: None: all of them.
            scale: what the gradients are multiplied by (a loss scaler's scale; a tensor is not read).
        """
        for follower in self._followers.values() if optimizer is None else [self._follower(optimizer)]:
            self._observe_untraced(follower, scale)

    def expect_writes(self, writes: int) -> None:
        """Clipping writes to each gradient so many times, in place: where it was more, others have changed it too."""
        for follower in self._followers.values():
            follower.changes.writes = writes

    @_never_raising
    @torch.no_grad()
    def _observe(self, follower: Follower, scale: Scalar | None) -> None:
        if not follower.in_step and id(follower.optimizer) in self._joint.moved:
            self.end_step()
        follower.observe(scale, measure=self._joint.measuring())

    def has_observed(self, optimizer: Optimizer) -> bool:
        """The coming step's raw gradients have been seen."""
        return self._follower(optimizer).observed

    @_never_raising
    @torch.no_grad()
    def observe_changed_gradients(self) -> None:
        """`observe_gradients` for the optimizers whose gradients have changed since they were last seen."""
        for follower in self._followers.values():
            if not follower.has_new_gradients():
                continue
            if follower.in_step:
                self.observe_gradients(follower.optimizer)
            else:  # another optimizer's backward may have done it: only its own step ends a joint step
                follower.observe(None, measure=True)

    def end_step(self) -> None:
        """The joint step is over: K and τ advance. Needed only where several optimizers step in turn."""
        if not self._joint.moved:
            return
        if self._failure is not None:
            self._joint.drop()
            return
        with self._changing(), torch.no_grad():
            self._joint.end(self._reader.followers)
            if self._joint.left_out is not None and self._joint.left_out[0] == self.steps - 1:
                self._losses.leave_out(*self._joint.left_out)

    def compute(self) -> dict[str, float]:
        """All numbers of the run up to now, by their names; NaN where undefined, with `reasons`. One sync.

        Ends the joint step. Keys: efficiency, efficiency_lower, efficiency_action, kinematic_efficiency,
        straightness, steadiness, conversion, signal_fraction (no unit); displacement, path_length, step_norm,
        moved_outside (parameter unit); action (parameter²/clock); loss_drop, entropy_production, work_… , loss (loss
        unit); grad_norm, grad_norm_clipped (loss/parameter); elapsed, speed_limit_time (clock); learning_rate; …_se.
        """
        return self.measure(sketch=False)[0]

    @torch.no_grad()
    def measure(self, *, sketch: bool) -> tuple[dict[str, float], Tensor | None]:
        """`compute`, and with it the sketch (4093 float32 on the host) where it is asked for: one sync for both."""
        self.end_step()
        host, totals = self._read(sketch)
        estimates = Estimates(totals, self.entropy_production)
        self.reasons, self._latest = estimates.reasons, totals
        if self._failure is not None:
            self.reasons = dict.fromkeys(estimates.values, self._failure)
            return dict.fromkeys(estimates.values, math.nan), None
        return estimates.values, host["sketch"].float() if sketch and "sketch" in host else None

    def compute_layers(self) -> dict[str, dict[str, float]]:
        """displacement, path_length, action, straightness, …, of each layer that `layer_of` names. One sync."""
        self.compute()
        return self.layers()

    def layers(self) -> dict[str, dict[str, float]]:
        """`compute_layers` as of the last `compute` or `measure`: no sync of its own."""
        if self._latest is None or self._failure is not None:
            return {}
        found: dict[str, dict[str, float]] = {}
        for name in sorted({section.layer for section in self._latest.sections}):
            values = Estimates(self._latest.layer(name), self.entropy_production).values
            found[name] = {key: values[key] for key in LAYER_VALUES}
        return found

    def description(self) -> dict[str, Any]:
        """What is measured and how, in plain types, as a record's `run` wants it: RunRecord(meter.description())."""
        parameters = {id(p): p for o in self.optimizers for g in o.param_groups for p in g["params"]}
        known = [p for p in parameters.values() if not isinstance(p, torch.nn.UninitializedParameter)]
        return {
            "clock": self.clock,
            "entropy_production": self.entropy_production,
            "loss_window": self._losses.size,
            "measure_every_n_steps": self._joint.every,
            "coordinates": self.coordinates,
            "measured_coordinates": self.measured_coordinates,
            "optimized_coordinates": self.optimized_coordinates,
            "optimizers": describe_optimizers(self.optimizers),
            "parameters": sum(p.numel() for p in known),
            "versions": {"torch": str(torch.__version__)},
        }

    @property
    def measured_coordinates(self) -> int | None:
        """How many coordinates are measured; None before the first step (of shards: before the first reading)."""
        return self._numbers[0]

    @property
    def optimized_coordinates(self) -> int | None:
        """How many coordinates the optimizers move: as many as are measured, unless some are drawn."""
        return self._numbers[1]

    @property
    def _numbers(self) -> tuple[int | None, int | None]:
        measured, there = (self._reader.coordinates if self.sharded else self._reader.numbers()) or (0.0, 0.0)
        return (round(measured), round(there)) if there else (None, None)

    def sketch(self) -> Tensor:
        """Σ over buckets of s_i (θ − θ_0)_i: (4093,) float32 on the host; distances within 2.2 %. One sync."""
        found = self.measure(sketch=True)[1]
        return torch.zeros(BUCKETS) if found is None else found

    @property
    def no_sketch(self) -> str | None:
        """Why there is no sketch; None where there is one."""
        return NO_SKETCH if self._reader.scattered else None

    def accumulated_mobility(self, parameter: Tensor) -> Tensor:
        """m_i = Σ_{k: u_{k,i} ≠ 0} μ_{k,i}, in parameter²/loss, in the parameter's shape. Syncs.

        (Complex: with a last dimension of 2. Of drawn coordinates alone where some are drawn: NaN elsewhere.)

        Raises:
            KeyError: the parameter has not been measured yet. ValueError: its mobility is effective.
        """
        for follower in self._followers.values():
            found = follower.mobility_of(parameter)
            if found is not None:
                return found * self._reader.factor(self._joint)
        raise KeyError("accumulated_mobility got a parameter that no measured optimizer has moved yet")

    def has_moved(self, parameter: Tensor) -> bool:
        """A measured step has had a gradient of it."""
        return any(follower.has_moved_parameter(parameter) for follower in self._followers.values())

    def moved_since(self) -> bool:
        """Whether weights have been moved since the last step. Syncs."""
        motions = [motion for follower in self._followers.values() for motion in follower.motions]
        return any(bool((motion.now() != motion.after.rows).any()) for motion in motions)

    def close(self) -> None:
        """Remove the hooks; may be called twice. Numbers can still be computed."""
        while self._handles:
            self._handles.pop().remove()

    def stop(self, error: Exception) -> bool:
        """End the measurement for a fault outside of its hooks: every value is NaN with this reason from here on.

        Returns whether it was going on.
        """
        if self._failure is not None:
            return False
        steps = self.steps
        self._fail(error)
        self._joint.steps = steps  # no step failed
        return True

    @property
    def in_step(self) -> bool:
        """An optimizer's step has begun to move weights and not ended, or Ctrl-C came while it was being added."""
        return self._interrupted or any(follower.has_moved for follower in self._followers.values())

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Sums are changing: what is no `Exception` (Ctrl-C) may leave them with half of a step."""
        try:
            yield
        except Exception:
            raise
        except BaseException:
            self._interrupted = True
            raise

    # -- state -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors (of shards, each process's own): some vectors of the measured coordinates."""
        self.end_step()
        return {
            "settings": self._settings,
            "joint": self._joint.state_dict(),
            "losses": self._losses.state_dict(),
            "followers": [checkpoint.follower_state(f) for f in self._followers.values()],
            "reader": checkpoint.reader_state(self._reader),
            "failure": self._failure,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a measurement: call it on a new meter, before the first step.

        Raises:
            ValueError: the state is of other optimizers or parameters; the meter has already measured.
        """
        if self.steps:
            raise ValueError(f"load_state_dict needs a new meter, got one that has measured {self.steps} steps")
        if state["settings"] != self._settings:
            raise ValueError(
                f"the saved measurement was made with {state['settings']}, got {self._settings}: resume with the "
                "settings that it was made with; sums of different definitions do not add"
            )
        followers = list(self._followers.values())
        if len(state["followers"]) != len(followers):
            raise ValueError(f"the saved measurement is of {len(state['followers'])} optimizers, got {len(followers)}")
        for follower, entry in zip(followers, state["followers"], strict=True):
            checkpoint.load_follower(follower, entry)
        motions = [motion for follower in followers for motion in follower.motions]
        self._places.load(motions)
        device = motions[0].coordinates.device if motions else torch.device("cpu")
        self._joint.load_state_dict(state["joint"], device)
        self._losses.load_state_dict(state["losses"], device)
        checkpoint.load_reader(self._reader, state["reader"])
        self._failure = state["failure"]

    # -- hooks -----------------------------------------------------------------------------------------------

    def _fail(self, error: Exception) -> None:
        """Stop measuring and say so; every value is NaN with this reason from here on."""
        self._failure = f"the measurement stopped at step {self.steps}: {type(error).__name__}: {error}"
        warnings.warn(f"{self._failure}. The training goes on", stacklevel=3)
        if self._ranks is not None:
            return  # the other processes read on, and wait for this one at every reading: it goes on counting
        self._joint.drop()  # the one that failed: who looks for new steps finds it, and the reason
        self.close()

    def _hook(self) -> None:
        # Dynamo would trace through hooks of a compiled step, and what runs in its closure: it must not look inside.
        untraced: Callable[[Any], Any] = torch.compiler.disable
        self._observe_untraced, self._after_closure_untraced = untraced(self._observe), untraced(self._after_closure)
        before, after = untraced(self._pre_hook), untraced(self._post_hook)
        for optimizer in self.optimizers:
            self._handles.append(optimizer.register_step_pre_hook(before))
            self._handles.append(optimizer.register_step_post_hook(after))

    @_never_raising
    @torch.no_grad()
    def _pre_hook(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        follower = self._follower(optimizer)
        if follower.in_step and within_another_step(optimizer):
            follower.nested = True
            return None
        if id(optimizer) in self._joint.moved:
            self.end_step()
        if follower.in_step:  # the last step ended in an exception
            follower.observed = False
        closure = kwargs.get("closure") if len(args) < 2 else args[1]
        follower.begin(closure=closure is not None)
        measure, scale = self._joint.measuring(), _scale_of(optimizer)
        if closure is None or follower.observed:
            seen_before = follower.observed
            follower.observe(scale, measure=measure)
            follower.force(seen_now=not seen_before)
            return None
        follower.remember_gradients(scale)
        wrapped = self._wrapped(follower, closure, measure)
        if len(args) < 2:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    def _wrapped(self, follower: Follower, closure: Callable[[], Any], measure: bool) -> Callable[[], Any]:
        """The closure, and after its first evaluation the gradients seen: before it they may be of the step before."""
        evaluated = False

        def observed_closure() -> Any:
            nonlocal evaluated
            result = closure()
            if not evaluated:
                evaluated = True
                self._after_closure_untraced(follower, measure)
            return result

        return observed_closure

    @_never_raising
    @torch.no_grad()
    def _after_closure(self, follower: Follower, measure: bool) -> None:
        follower.after_closure(_scale_of(follower.optimizer), measure=measure)

    def _post_hook(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step = self.steps
        self._finish(optimizer)
        if self._failure is None or self._ranks is None:
            return
        self._loss_step = None
        if len(self._followers) == 1:
            if self.steps == step:
                self._joint.drop()
            return
        if id(optimizer) in self._joint.moved and step == self.steps:
            self.end_step()
        self._joint.moved.add(id(optimizer))

    @_never_raising
    @torch.no_grad()
    def _finish(self, optimizer: Optimizer) -> None:
        follower = self._follower(optimizer)
        if not follower.in_step or (follower.nested and within_another_step(optimizer)):
            return
        rates: list[Scalar] = [_rate(group.get("lr")) for group in optimizer.param_groups]
        measure = self._joint.measuring()
        valid = follower.finish(rates, measure=measure)
        self._loss_step = None
        self._joint.add(follower, rates, valid, measured=measure and bool(follower.motions))
        if len(self._followers) == 1:
            self.end_step()

    def _has_gradient(self) -> bool:
        return any(p.grad is not None for o in self.optimizers for group in o.param_groups for p in group["params"])

    def _follower(self, optimizer: Optimizer) -> Follower:
        optimizer = unwrapped(optimizer)
        if id(optimizer) not in self._followers:
            raise ValueError(f"{type(optimizer).__name__} is not one of the optimizers that this meter measures")
        return self._followers[id(optimizer)]

    # -- reading ---------------------------------------------------------------------------------------------

    def _read(self, sketch: bool) -> tuple[dict[str, Tensor], RunTotals]:
        collected, parts = self._collected(sketch)
        mail = Mail()
        if self._ranks is not None:
            mail.put("header", header(self._failure is not None, self._facts(collected), self._device), "sum")
        mail.extend(collected)
        known = self._losses.tensor
        if known is not None:
            mail.put("losses", known, "mean")
        if self._probe is not None:
            mail.put("probe", torch.stack(self._probe), "mean")
        losses = 2 * self._losses.size * 2 + (0 if self._probe is None else 2 * self._probe[0].numel())
        host = mail.deliver(self._ranks, self._reader.room(self._joint, losses, sketch=sketch))
        agreed = self._ranks is None or alike(host["header"], self._ranks.size)
        if self.sharded:
            self._agree(host, agreed)
        if self._failure is not None:
            host, parts = {n: v for n, v in host.items() if n in ("losses", "probe")}, []
        self._reader.fold(host, self._joint)
        if self._ranks is not None and agreed and known is not None:
            self._losses.take(host["losses"])
        loss, no_loss = loss_drop(host, self._losses, self.steps, list(self._followers.values()), agreed=agreed)
        per_rate = self.clock == "lr"
        totals = self._reader.totals(parts, host, self._joint, per_rate=per_rate, loss=loss, no_loss=no_loss)
        return host, totals

    def _facts(self, mail: Mail) -> object:
        """What all processes must know alike, for their losses and their shards to be of the same steps."""
        probe = None if self._probe is None else self._probe[0].numel()
        shards = mail.shared() if self.sharded else None
        return self.steps, self._losses.steps, self._losses.tensor is None, probe, shards

    @property
    def _device(self) -> torch.device:
        found: Tensor = next(p for o in self.optimizers for g in o.param_groups for p in g["params"])
        return found.device

    def _collected(self, sketch: bool) -> tuple[Mail, list[Part]]:
        """Where other processes wait for this one in the collective, its faults end the measurement."""
        if self._failure is not None:
            return Mail(), []
        try:
            with self._changing():
                return self._reader.collect(self._joint, sketch=sketch)
        except Exception as error:
            self.stop(error)
            return Mail(), []

    def _agree(self, host: dict[str, Tensor], agreed: bool) -> None:
        failed = float(host["header"][0]) > 0
        if self._failure is None and (failed or not agreed):
            self._failure = "another process could not measure" if failed else NOT_ALIKE
            warnings.warn(f"{self._failure}. The training goes on", stacklevel=4)


_APART = 0x9E3779B1  # between the seeds of processes that hold shards: each draws its own; torch takes 32 bits of them

LAYER_VALUES = (
    "displacement",
    "path_length",
    "action",
    "straightness",
    "steadiness",
    "kinematic_efficiency",
    "efficiency_action",
    "signal_fraction",
    "work_ito",
)


class _Places:
    """Positions in the parameter vector: in the order of the optimizers' groups, whatever is seen first."""

    def __init__(self, optimizers: list[Optimizer]) -> None:
        self._optimizers = optimizers
        self._known: dict[int, int] = {}
        self._next = 0

    def __call__(self, parameter: Tensor) -> int:
        if not self._known:
            for optimizer in self._optimizers:
                for group in optimizer.param_groups:
                    for other in group["params"]:
                        self._take(other)
        self._take(parameter)
        return self._known[id(parameter)]

    def _take(self, parameter: Tensor) -> None:
        if id(parameter) in self._known or isinstance(parameter, torch.nn.UninitializedParameter):
            return
        self._known[id(parameter)] = self._next
        self._next += parameter.numel() * (2 if parameter.is_complex() else 1)

    def load(self, motions: list[Any]) -> None:
        """Some may have left the optimizer: the others keep their places, and new ones come after them all."""
        members = [pair for m in motions for pair in zip(m.coordinates.parameters, m.members, strict=True)]
        if any(self._known.get(id(parameter)) != member.position for parameter, member in members):
            self._known = {id(parameter): member.position for parameter, member in members}
            self._next = max(member.position + member.size for _, member in members)


def _count(parameters: list[Tensor], processes: int) -> int:
    """Coordinates of all of them; of shards, those of all processes."""
    known = {id(p): p for p in parameters if not isinstance(p, torch.nn.UninitializedParameter) and p.requires_grad}
    return sum(
        p.numel() * (2 if p.is_complex() else 1) * (processes if processes and is_flat(p) else 1)
        for p in known.values()
    )


def _rate(value: Any) -> Scalar:
    """A learning rate as a number, or as the device tensor where reading it would sync; NaN where there is none."""
    if value is None:
        return math.nan
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return value.detach().double().reshape(()) if value.device.type != "mps" else value.detach().reshape(())
    return float(value)


def _scale_of(optimizer: Optimizer) -> Tensor | None:
    """The loss scale that a fused optimizer divides its gradients by within the step."""
    scale = getattr(optimizer, "grad_scale", None)
    return scale if isinstance(scale, Tensor) else None
