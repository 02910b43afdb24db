"""TrajectoryMeter: the per-step meter for plain PyTorch, Fabric, or anything that steps a torch optimizer."""

from __future__ import annotations

import contextlib
import functools
import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_speedlimit.trajectory import losses, mobility
from lightning_speedlimit.trajectory.bank import SUMS, WORK_ACTION, WORK_ITO, Bank
from lightning_speedlimit.trajectory.description import describe_optimizers
from lightning_speedlimit.trajectory.estimates import Estimates, Estimator, RunTotals, SectionTotals
from lightning_speedlimit.trajectory.layout import Section, Slot
from lightning_speedlimit.trajectory.mail import Mail
from lightning_speedlimit.trajectory.ranks import MOST, Pending, Ranks, Share, alike, header
from lightning_speedlimit.trajectory.shards import are_sharded, group_of
from lightning_speedlimit.trajectory.sketch import BUCKETS, Signs
from lightning_speedlimit.trajectory.sums import RunningSum, upload
from lightning_speedlimit.trajectory.survey import survey
from lightning_speedlimit.trajectory.trace import OptimizerTrace, Scalar

Clock = Literal["steps", "lr"]
_SAMPLED = ("action", "path_length", "work_ito", "work_action")


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
        optimizers: one, or several that share no parameter; wrapped by Fabric or not. A joint step ends when an
            optimizer that already moved in it steps again, or with `end_step()`.
        clock: Δ_k = 1 ("steps") or the learning rate ("lr").
        entropy_production: the estimate of Q that `efficiency` divides by; see the theory page, §2.
        loss_window: losses at each end from which L_0 and L_K are extrapolated.
        measure_every_n_steps: one step of each block of n is measured, drawn by a private generator; sums are
            scaled to all steps and carry standard errors, and bounds hold only up to these.
        momentum_mobility: "steady" (keeps the bound) or "response" (truer in the first 1/(1−β) steps).
        keep_raw_gradient: gradients are clipped by value (or changed by more than a factor) before the step:
            keeps a copy of the raw ones, and the mobility is the effective one.
        watch_clipping: gradients may be clipped by your own code before the step: norms are then compared parameter
            by parameter, and where more than one factor was at work the works are NaN.
        layer_of: parameter → name under which its sums are kept apart as well; see `compute_layers`.
        process_group: the processes that train together (DDP: `torch.distributed.group.WORLD`): losses are then
            averaged over them. All of them must call what reads (`compute`, `measure`, `sketch`,
            `compute_layers`), in the same order: each call is one all_reduce. None: this process alone.
        seed: of the generator that draws the measured steps.

    Memory, in copies of the parameters: 2 (θ_0, θ_k/u_k); + 1 for a diagonal mobility (Adam and its kin);
    + 1 for decoupled weight decay; + 1 for Adadelta, for response mobility of RMSprop, for raw gradients each.

    Raises:
        TypeError: an argument that is no optimizer, or has no step hooks; a process_group that is none.
        ValueError: an unknown name, a number out of range, an optimizer twice, a parameter in two optimizers.
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
        keep_raw_gradient: bool = False,
        watch_clipping: bool = True,
        layer_of: Callable[[Tensor], str] | None = None,
        process_group: Any | None = None,
        seed: int = 0,
    ) -> None:
        self.optimizers = _checked_optimizers(optimizers)
        parameters = [p for o in self.optimizers for g in o.param_groups for p in g["params"]]
        group = group_of(parameters, process_group)
        self._ranks = None if group is None else Ranks(group)
        self.sharded = are_sharded(parameters) and self._ranks is not None
        check_choice("clock", clock, get_args(Clock))
        check_choice("entropy_production", entropy_production, get_args(Estimator))
        check_choice("momentum_mobility", momentum_mobility, get_args(mobility.MomentumMobility))
        check_at_least("loss_window", loss_window, 2)
        check_at_least("measure_every_n_steps", measure_every_n_steps, 1)
        self.clock, self.entropy_production = clock, entropy_production
        self.every, self.seed = measure_every_n_steps, seed
        self.reasons: dict[str, str] = {}
        self._places: dict[int, int] = {}
        self._next_place = 0
        self._traces = {
            id(optimizer): OptimizerTrace(
                optimizer,
                momentum_mobility=momentum_mobility,
                keep_raw_gradient=keep_raw_gradient,
                watch_clipping=watch_clipping,
                per_rate=clock == "lr",
                sampled=self.every > 1,
                place=self._place,
                layer_of=layer_of,
                processes=self._ranks.size if self.sharded and self._ranks is not None else 0,
            )
            for optimizer in self.optimizers
        }
        self._settings = {"clock": clock, "every": self.every, "momentum_mobility": momentum_mobility}
        if self.sharded and self._ranks is not None:
            self._settings["processes"] = self._ranks.size
        self._losses = losses.LossWindows(loss_window)
        self._handles: list[Any] = []
        self._signs: dict[int, Signs] = {}
        self._lost: tuple[str, ...] = ()
        self._reset_sums()
        self._hook()

    def _reset_sums(self) -> None:
        self.steps = 0  # K, skipped ones included
        self._read_at = 0
        self.measured = 0
        self._elapsed = 0.0
        self._several_rates = False
        self._rate_value: Scalar = math.nan
        self._probe: tuple[Tensor, Tensor] | None = None
        self._moved: set[int] = set()
        self._rates: list[Scalar] = []  # of the joint step, as its optimizers used them
        self._loss_step: int | None = None  # of the last loss, until an optimizer steps
        self._left_out: tuple[int, Tensor] | None = None  # the last step, and whether a loss scaler skipped it
        self._failure: str | None = None
        self._interrupted = False
        self._latest: RunTotals | None = None
        self._joint: dict[str, Tensor] = {}
        self._norms: dict[str, Tensor] = {}
        self._totals: RunningSum | None = None  # ℓ, A
        self._skipped: RunningSum | None = None  # steps and time in which a fused optimizer found inf
        self._rate_sum: RunningSum | None = None  # τ of learning rates that live on the device
        self._spread: RunningSum | None = None  # Σ (x_j − x_{j−1})² over measured steps
        self._last_sample: Tensor | None = None
        self._pending = Pending() if self.sharded else None  # what is not linear in the shards

    # -- what a training loop calls --------------------------------------------------------------------------

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
        if self._moved and step is None:
            at = self.steps + 1  # the joint step has moved: the loss belongs to what follows it
        self._losses.record(value.real if value.is_complex() else value, at, again=at == self._loss_step)
        self._loss_step = at
        if self._left_out is not None and self._left_out[0] == at:
            self._losses.leave_out(*self._left_out)

    def record_probe(self, first: Tensor, last: Tensor) -> None:
        """Losses of the same batches at θ_0 and now, (n,) each: from here on loss_drop is their mean difference."""
        self._probe = first.detach(), last.detach()

    def observe_gradients(self, optimizer: Optimizer | None = None, *, scale: Scalar | None = None) -> None:
        """The gradients are raw now: call it after backward and before clipping.

        Args:
            optimizer: None: all of them.
            scale: what the gradients are multiplied by (a loss scaler's scale; a tensor is not read).
        """
        for trace in self._traces.values() if optimizer is None else [self._trace(optimizer)]:
            self._observe_untraced(trace, scale)

    @_never_raising
    @torch.no_grad()
    def _observe(self, trace: OptimizerTrace, scale: Scalar | None) -> None:
        if not trace.in_step and id(trace.optimizer) in self._moved:
            self.end_step()
        if trace.in_step and trace.observed:
            return
        trace.observe(measure=self._measuring(), scale=scale)
        if trace.in_step:
            trace.before_update(measure=self._measuring())

    def has_observed(self, optimizer: Optimizer) -> bool:
        """The coming step's raw gradients have been seen."""
        return self._trace(optimizer).holds_observed()

    @_never_raising
    @torch.no_grad()
    def observe_changed_gradients(self) -> None:
        """`observe_gradients` for the optimizers whose gradients have changed since they were last seen."""
        for trace in self._traces.values():
            if not trace.has_new_gradients():
                continue
            if trace.in_step:
                self.observe_gradients(trace.optimizer)
            else:  # another optimizer's backward may have done it: only its own step ends a joint step
                trace.observe(measure=True)

    def end_step(self) -> None:
        """The joint step is over: K and τ advance. Needed only where several optimizers step in turn."""
        if not self._moved:
            return
        if self._failure is not None:
            self.steps, self._moved = self.steps + 1, set()
            return
        with self._changing():
            rate = self._joint_rate()
            measured = "sums" in self._joint
            if measured:
                self._close_sums(rate)
            self.measured += measured or self._measuring()  # a step without gradients has been measured: 0
            self.steps += 1
            self._advance_clock(rate)
            self._moved, self._joint, self._rates = set(), {}, []

    def compute(self) -> dict[str, float]:
        """All numbers of the run up to now, by their names; NaN where undefined, with `reasons`. One sync.

        Ends the joint step. Keys: efficiency, efficiency_lower, efficiency_action, kinematic_efficiency,
        straightness, steadiness, conversion, signal_fraction (no unit); displacement, path_length, step_norm
        (parameter unit); action (parameter²/clock); loss_drop, entropy_production, work_… , loss (loss unit);
        grad_norm, grad_norm_clipped (loss/parameter); elapsed, speed_limit_time (clock); learning_rate; …_se.
        """
        return self.measure(sketch=False)[0]

    @torch.no_grad()
    def measure(self, *, sketch: bool) -> tuple[dict[str, float], Tensor | None]:
        """`compute`, and with it the sketch (4093 float32 on the host) where it is asked for: one sync for both."""
        self.end_step()
        mail, totals = self._read(sketch)
        estimates = Estimates(totals, self.entropy_production)
        self.reasons, self._latest = estimates.reasons, totals
        if self._failure is not None:
            self.reasons = dict.fromkeys(estimates.values, self._failure)
            return dict.fromkeys(estimates.values, math.nan), None
        return estimates.values, mail["sketch"].float() if sketch and "sketch" in mail else None

    def compute_layers(self) -> dict[str, dict[str, float]]:
        """displacement, path_length, action, straightness, …, of each layer that `layer_of` names. One sync."""
        self.compute()
        return self.layers()

    def layers(self) -> dict[str, dict[str, float]]:
        """`compute_layers` as of the last `compute` or `measure`: no sync of its own."""
        totals = self._latest
        if totals is None or self._failure is not None:
            return {}
        found: dict[str, dict[str, float]] = {}
        for name in sorted({section.layer for section in totals.sections}):
            sections = [s for s in totals.sections if s.layer == name]
            part = RunTotals(
                sections=sections,
                steps=totals.steps,
                measured=totals.measured,
                elapsed=totals.elapsed,
                path_length=math.fsum(s.sums["path_length"] for s in sections),
                action=math.fsum(s.sums["action"] for s in sections),
                loss=None,
                gradient_norm=math.nan,
                clipped_norm=math.nan,
                step_norm=math.nan,
                learning_rate=math.nan,
                unknown_moves=totals.unknown_moves,
                silent_moves=totals.silent_moves,
                lost=totals.lost,
            )
            values = Estimates(part, self.entropy_production).values
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
            "measure_every_n_steps": self.every,
            "optimizers": describe_optimizers(self.optimizers),
            "parameters": sum(p.numel() for p in known),
            "versions": {"torch": str(torch.__version__)},
        }

    def sketch(self) -> Tensor:
        """Σ over buckets of s_i (θ − θ_0)_i: (4093,) float32 on the host; distances within 2.2 %. One sync."""
        found = self.measure(sketch=True)[1]
        return torch.zeros(BUCKETS) if found is None else found

    def accumulated_mobility(self, parameter: Tensor) -> Tensor | float:
        """m_i = Σ_{k: u_{k,i} ≠ 0} μ_{k,i}, in parameter²/loss; a number where all coordinates share it. Syncs.

        A tensor has the parameter's shape (complex: with a last dimension of 2).

        Raises:
            KeyError: the parameter has not been seen with a gradient. ValueError: its mobility is effective.
        """
        for trace in self._traces.values():
            for bank in trace.banks.values():
                place = 0
                for section in bank.sections:
                    for slot in section.slots:
                        if slot.parameter is parameter:
                            return self._mobility_of(bank, section, slot, place)
                        place += 1
        raise KeyError("accumulated_mobility got a parameter that no measured optimizer has moved yet")

    def _mobility_of(self, bank: Bank, section: Section, slot: Slot, place: int) -> Tensor | float:
        factor = self._factor
        if section.mobility is not None and section.diagonal:
            return slot.ordered(section.mobility[slot.offset : slot.offset + slot.numel]) * factor
        if section.scalar:
            return float(bank.slot_mobility.host()[0, place]) * factor
        name = type(section.optimizer).__name__
        raise ValueError(f"accumulated_mobility: {name} has no mobility formula; register_mobility gives it one")

    @property
    def _factor(self) -> float:
        """Steps over measured steps: what sums over measured steps are multiplied by. NaN before the first."""
        if self.steps == 0:
            return 1.0
        return self.steps / self.measured if self.measured else math.nan

    def expect_moves(self) -> None:
        """Weights may be moved before the next step (validation with averaged weights, say): keep a copy of θ.

        The move is then measured and taken out of the displacement. One more copy until the next step.
        """
        with torch.no_grad():
            for trace in self._traces.values():
                trace.guard()

    def check_moves(self) -> None:
        """Look now for moves outside of step, before moving the weights oneself; see `forget_moves`."""
        with torch.no_grad():
            for trace in self._traces.values():
                trace.check_moves()

    def forget_moves(self) -> None:
        """The weights are bitwise back where `check_moves` found them: changed versions mean nothing."""
        for trace in self._traces.values():
            for slot in trace.slots:
                slot.version = slot.parameter._version

    def start_of(self, parameter: Tensor) -> Tensor | None:
        """θ_0 of a parameter, in its shape (a copy); None where it has not been seen with a gradient."""
        for trace in self._traces.values():
            for section in trace.sections:
                for slot in section.slots:
                    if slot.parameter is parameter:
                        return slot.unflatten(section.start[slot.offset : slot.offset + slot.numel])
        return None

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
        self.steps = steps  # no step failed
        return True

    def state_dict(self, *, exact: bool = True) -> dict[str, Any]:
        """Plain types and tensors; of shards, each process's own.

        `exact`: with m and u_k (the size of the parameters); θ_0 apart, see `start`.

        A measurement that is resumed without θ_0, m and u_k keeps its sums (ℓ, A, the works, the losses); what
        needs θ_0 or m is NaN from there on, and says so.
        """
        self.end_step()
        sums = {n: getattr(self, n).host() for n in _SUMS if getattr(self, n) is not None}
        return {
            "settings": self._settings,
            "steps": self.steps,
            "measured": self.measured,
            "elapsed": self._elapsed,
            "several_rates": self._several_rates,
            "rate": float(self._rate_value),
            "sums": sums,
            "norms": {name: value.detach().cpu() for name, value in self._norms.items()},
            "last_sample": None if self._last_sample is None else self._last_sample.detach().cpu(),
            "losses": self._losses.state_dict(),
            "traces": [trace.state_dict(exact=exact) for trace in self._traces.values()],
            "exact": exact,
            "lost": list(self._lost),
            "failure": self._failure,
        } | ({} if self._pending is None else {"shards": self._pending.state_dict()})

    def start(self) -> list[Tensor]:
        """θ_0 of every section, flat, on the host: beside `state_dict`, what resuming exactly needs."""
        return [s.start.detach().cpu().clone() for trace in self._traces.values() for s in trace.sections]

    def start_mark(self) -> tuple[int, ...]:
        """Changes when θ_0 does: with new parameters, or a move that was taken out of the displacement."""
        sections = [s for trace in self._traces.values() for s in trace.sections]
        return tuple(n for s in sections for n in (id(s.start), s.start._version))

    @property
    def in_step(self) -> bool:
        """An optimizer's step has begun to move weights and not ended, or Ctrl-C came while it was being added."""
        return self._interrupted or any(trace.has_moved for trace in self._traces.values())

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

    def load_state_dict(self, state: dict[str, Any], start: list[Tensor] | None = None) -> None:
        """Go on with a measurement: call it on a new meter, before the first step.

        Args:
            start: what `start()` gave; None: θ_0 is lost, and D with it.
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
        if len(state["traces"]) != len(self._traces):
            raise ValueError(f"the saved measurement is of {len(state['traces'])} optimizers, got {len(self._traces)}")
        for trace, entry in zip(self._traces.values(), state["traces"], strict=True):
            trace.load_state_dict(entry)
        sections = [s for trace in self._traces.values() for s in trace.sections]
        slots = [slot for section in sections for slot in section.slots]
        if any(self._places.get(id(slot.parameter)) != slot.position for slot in slots):
            # Some have left the optimizer: the others keep their places, and new ones come after them all.
            self._places = {id(slot.parameter): slot.position for slot in slots}
            self._next_place = max(slot.position + slot.numel for slot in slots)
        device = sections[0].device if sections else torch.device("cpu")
        self.steps, self.measured = state["steps"], state["measured"]
        self._elapsed, self._several_rates = state["elapsed"], state["several_rates"]
        self._rate_value = state["rate"]
        for name, value in state["sums"].items():
            total = RunningSum(*value.shape, device=device)
            total.load_(value)
            setattr(self, name, total)
        self._norms = {name: value.to(device) for name, value in state["norms"].items()}
        sample = state["last_sample"]
        self._last_sample = None if sample is None else sample.to(device)
        self._losses.load_state_dict(state["losses"], device)
        self._failure = state["failure"]
        if self._pending is not None:
            self._pending.load_state_dict(state["shards"], device)
        self._read_at = self.steps - (0 if self._pending is None else self._pending.count)
        lost = set(state["lost"])
        if not state["exact"]:
            lost.add("the accumulated mobility")
        if start is None and sections:
            lost.add("the initial weights")
        elif start is not None:
            for section, value in zip(sections, start, strict=True):
                section.start.copy_(value.reshape(section.start.shape))
        self._lost = tuple(sorted(lost))

    # -- hooks -----------------------------------------------------------------------------------------------

    def _fail(self, error: Exception) -> None:
        """Stop measuring and say so; every value is NaN with this reason from here on."""
        self._failure = f"the measurement stopped at step {self.steps}: {type(error).__name__}: {error}"
        warnings.warn(f"{self._failure}. The training goes on", stacklevel=3)
        if self._ranks is not None:
            return  # the other processes read on, and wait for this one at every reading: it goes on counting
        self.steps += 1  # the one that failed: who looks for new steps finds it, and the reason
        self._moved = set()
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
        trace = self._trace(optimizer)
        if trace.repeated():
            return None
        if id(optimizer) in self._moved:
            self.end_step()
        if trace.in_step or not trace.holds_observed():  # the last step ended in an exception, or was skipped
            trace.observed = False
        trace.in_step = True
        measure = self._measuring()
        if trace.observed:
            trace.before_update(measure=measure)
            trace.at_the_door()
            return None
        closure = kwargs.get("closure") if len(args) < 2 else args[1]
        if closure is None:
            trace.observe(measure=measure, scale=_scale_of(optimizer))
            trace.before_update(measure=measure)
            return None
        wrapped = self._wrapped(trace, closure, measure)
        if len(args) < 2:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    def _wrapped(self, trace: OptimizerTrace, closure: Callable[[], Any], measure: bool) -> Callable[[], Any]:
        """The closure, and at its end the gradients seen: before it they are those of the step before."""

        def observed_closure() -> Any:
            result = closure()
            self._after_closure_untraced(trace, measure)
            return result

        return observed_closure

    @_never_raising
    @torch.no_grad()
    def _after_closure(self, trace: OptimizerTrace, measure: bool) -> None:
        trace.observe(measure=measure, scale=_scale_of(trace.optimizer))
        trace.before_update(measure=measure)
        trace.at_the_door()

    def _post_hook(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step = self.steps
        self._finish(optimizer)
        if self._failure is None or self._ranks is None:
            return
        self._loss_step = None
        if len(self._traces) == 1:
            self.steps, self._moved = step + 1, set()
            return
        if id(optimizer) in self._moved and step == self.steps:
            self.end_step()
        self._moved.add(id(optimizer))

    @_never_raising
    @torch.no_grad()
    def _finish(self, optimizer: Optimizer) -> None:
        trace = self._trace(optimizer)
        if not trace.in_step:
            return
        rates: list[Scalar] = [_rate(group.get("lr")) for group in optimizer.param_groups]
        totals = trace.finish(rates)
        self._loss_step = None
        self._moved.add(id(optimizer))
        self._rates += rates
        if totals is not None:
            for name, value in totals.items():
                joint = self._joint.get(name)
                self._joint[name] = value if joint is None else joint + value.to(joint.device, non_blocking=True)
        if len(self._traces) == 1:
            self.end_step()

    def _trace(self, optimizer: Optimizer) -> OptimizerTrace:
        optimizer = _unwrapped(optimizer)
        if id(optimizer) not in self._traces:
            raise ValueError(f"{type(optimizer).__name__} is not one of the optimizers that this meter measures")
        return self._traces[id(optimizer)]

    def _measuring(self) -> bool:
        """One step of each block of n, from a generator seeded by the block: resuming draws the same."""
        if self.every == 1:
            return True
        block, position = divmod(self.steps, self.every)
        return random.Random(f"{self.seed}:{block}").randrange(self.every) == position

    def _place(self, parameter: Tensor) -> int:
        """Position in the parameter vector: in the order of the optimizers' groups, whatever is seen first."""
        if not self._places:
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    for other in group["params"]:
                        self._take_place(other)
        self._take_place(parameter)
        return self._places[id(parameter)]

    def _take_place(self, parameter: Tensor) -> None:
        if id(parameter) in self._places or isinstance(parameter, torch.nn.UninitializedParameter):
            return
        self._places[id(parameter)] = self._next_place
        self._next_place += parameter.numel() * (2 if parameter.is_complex() else 1)

    # -- the joint step --------------------------------------------------------------------------------------

    def _joint_rate(self) -> Scalar:
        rates = self._rates
        first = rates[0]
        if any(r is not first and (isinstance(r, Tensor) or isinstance(first, Tensor) or r != first) for r in rates):
            self._several_rates = True
        return first

    def _close_sums(self, rate: Scalar) -> None:
        joint = self._joint
        sums = joint["sums"]
        squares = sums[0]
        if self._totals is None:
            self._totals = RunningSum(2, device=squares.device)
        action = squares
        if self.clock == "lr":
            over = squares / rate if isinstance(rate, Tensor) or rate != 0 else torch.full_like(squares, torch.nan)
            action = torch.where(squares == 0, torch.zeros_like(squares), over)
        path = squares.sqrt()
        self._totals.add_(torch.stack([path, action]))
        norms = {"squares": squares, "gradients": joint["norms"]}
        if self._pending is not None:
            step = torch.stack([squares, action, sums[WORK_ITO], sums[WORK_ACTION]])
            self._pending.append(step, joint["norms"])
        elif self.every > 1:
            self._sample(torch.stack([action, path, sums[WORK_ITO], sums[WORK_ACTION]]))
        if "valid" in joint:
            if self._skipped is None:
                self._skipped = RunningSum(2, device=squares.device)
            skipped = (joint["valid"].reshape(()) == 0) & (squares == 0)
            missed = skipped.to(squares.dtype)
            self._skipped.add_(torch.stack([missed, missed * rate]))
            norms = {name: torch.where(skipped, self._norms.get(name, new), new) for name, new in norms.items()}
            self._left_out = self.steps, skipped
            self._losses.leave_out(*self._left_out)
        self._norms = norms

    def _sample(self, sample: Tensor) -> None:
        if self._spread is None:
            self._spread = RunningSum(len(_SAMPLED), device=sample.device)
        if self._last_sample is not None:
            self._spread.add_((sample - self._last_sample) ** 2)
        self._last_sample = sample

    def _advance_clock(self, rate: Scalar) -> None:
        if isinstance(rate, Tensor):
            if self._rate_sum is None:
                self._rate_sum = RunningSum(1, device=rate.device)
            self._rate_sum.add_(rate.reshape(1))
        else:
            self._elapsed += rate
        self._rate_value = rate

    # -- reading ---------------------------------------------------------------------------------------------

    def _read(self, sketch: bool) -> tuple[dict[str, Tensor], RunTotals]:
        collected = self._collected(sketch)
        mail = Mail()
        if self._ranks is not None:
            mail.put("header", header(self._failure is not None, self._facts(), self._device), "sum")
        mail.extend(collected)
        if self._losses.tensor is not None:
            mail.put("losses", self._losses.tensor, "mean")
        if self._probe is not None:
            mail.put("probe", torch.stack(self._probe), "mean")
        host = mail.deliver(self._ranks, self._room(sketch))
        self._read_at = self.steps
        agreed = self._ranks is None or alike(host["header"], self._ranks.size)
        if self._pending is not None:
            self._add_shards(host, agreed)
        if self._ranks is not None and agreed and self._losses.tensor is not None:
            self._losses.tensor.copy_(upload(host["losses"], self._losses.tensor.device))
        return host, self._totals_from(host, self._factor, agreed)

    def _room(self, sketch: bool) -> int:
        """No process has more numbers to tell; from what one that has failed knows, too."""
        losses = 2 * self._losses.size + (0 if self._probe is None else 2 * self._probe[0].numel())
        if self._pending is None:
            return 3 + losses
        parameters = sum(len(group["params"]) for o in self.optimizers for group in o.param_groups)
        each = len(SUMS) + 5  # a section's sums and its bank's sight, a slot's survey and mobility
        steps = min(self.steps - self._read_at, MOST)
        few = 5 + 2 * len(self.optimizers)  # totals and norms, silent and uneven
        return 3 + losses + each * parameters + few + Pending.WIDTH * steps + (BUCKETS if sketch else 0)

    def _facts(self) -> object:
        """What all processes must know alike, for their losses to be of the same steps."""
        known = self._losses
        probe = None if self._probe is None else self._probe[0].numel()
        sections = [(s.index, s.layer, s.share, len(s.slots)) for t in self._traces.values() for s in t.sections]
        shards = (sections, self._pending.count) if self._pending is not None else None
        return self.steps, known.first_steps, known.last_steps, known.tensor is None, probe, shards

    @property
    def _device(self) -> torch.device:
        found: Tensor = next(p for o in self.optimizers for g in o.param_groups for p in g["params"])
        return found.device

    def _collected(self, sketch: bool) -> Mail:
        """`_collect`; where other processes wait for this one in the collective, its faults end the measurement."""
        mail = Mail()
        if self._failure is not None:
            return mail
        try:
            self._collect(mail, sketch)
        except Exception as error:
            if self._ranks is None:
                raise
            self.stop(error)
            return Mail()
        return mail

    def _collect(self, mail: Mail, sketch: bool) -> None:
        """Everything but the losses into the mail."""
        with self._changing():
            for trace in self._traces.values():
                if not trace.in_step:
                    trace.check_moves()
        factor = self._factor
        share: Share = "own" if self._pending is None else "sum"
        sketch = sketch and self.no_sketch is None
        buckets: Tensor | None = None
        for t, trace in enumerate(self._traces.values()):
            for b, bank in enumerate(trace.banks.values()):
                mail.put_sum(f"sums {t} {b}", bank.sums, share)
                self._put_mobility(mail, f"mobility {t} {b}", bank, trace)
                for s, section in enumerate(bank.sections):
                    found = survey(section, factor, self._signs if sketch else None, trace.sampled)
                    values = torch.stack([found.displacement, found.free, found.weighted]) * section.share
                    mail.put(f"survey {t} {b} {s}", values, share)
                    if found.sketch is not None:
                        part = found.sketch * section.share
                        buckets = part if buckets is None else buckets + part.to(buckets.device)
            if trace.silent is not None:
                mail.put(f"silent {t}", trace.silent, share)
            if trace.uneven is not None:
                uneven = trace.uneven if self._pending is None else (trace.uneven > _UNEVEN).to(trace.uneven.dtype)
                mail.put(f"uneven {t}", uneven, share)
        for name in _SUMS:
            if getattr(self, name) is not None:
                mail.put_sum(name, getattr(self, name), share if name == "_totals" else "own")
        for name, value in self._norms.items():
            mail.put(name, value, share)
        if self._pending is not None and self._pending.rows is not None:
            mail.put("pending", self._pending.rows, "sum")
        if buckets is not None:
            mail.put("sketch", buckets, share)
        if isinstance(self._rate_value, Tensor):
            mail.put("rate", self._rate_value)

    def _put_mobility(self, mail: Mail, name: str, bank: Bank, trace: OptimizerTrace) -> None:
        """m where coordinates share it: of shards, that of the processes which could tell the clip factor.

        A process whose shards had no gradient in some step cannot; it counts where there is no other.
        """
        if self._pending is None:
            mail.put_sum(name, bank.slot_mobility)
            return
        value = bank.slot_mobility.value
        sight = torch.ones_like(value[0, :1]) if trace.blind is None else (trace.blind.reshape(1) == 0).to(value.dtype)
        sight = sight.clamp_min(1e-12).to(value.device)
        mail.put(name, value * sight, "sum")
        mail.put(f"sight {name}", sight, "sum")

    def _add_shards(self, host: dict[str, Tensor], agreed: bool) -> None:
        """What the shards' sums do not say by themselves: ℓ and the spread of steps, from each step's ‖u‖²."""
        assert self._pending is not None
        assert self._ranks is not None
        failed = float(host["header"][0]) > 0
        if self._failure is None and (failed or not agreed):
            self._failure = "another process could not measure" if failed else _NOT_ALIKE
            warnings.warn(f"{self._failure}. The training goes on", stacklevel=4)
        if self._failure is not None:
            return
        for name in [n for n in host if n.startswith("sums")]:
            host[name][SUMS.index("noise_weight")] /= self._ranks.size  # each process has the whole of it
            host[name][SUMS.index("path_length")] = math.nan  # ‖u‖ of a layer is no sum over shards
        for name in [n for n in host if n.startswith("mobility")]:
            host[name] = host[name] / host[f"sight {name}"]
        self._pending.fold(host.get("pending"), sampled=self.every > 1)
        if "_totals" in host:
            host["_totals"][0] = self._pending.path_length
        if self._pending.spread is not None:
            host["_spread"] = self._pending.spread

    @property
    def no_sketch(self) -> str | None:
        """Why there is no sketch; None where there is one."""
        for trace in self._traces.values():
            for slot in trace.slots:
                if slot.first is None:
                    return (
                        "no sketch: a shard's coordinates lie scattered in the whole parameter (tensor parallel by "
                        "columns, or FSDP's flat parameters)"
                    )
        return None

    def _totals_from(self, host: dict[str, Tensor], factor: float, agreed: bool) -> RunTotals:
        skipped = (host["_skipped"] * factor).tolist() if "_skipped" in host else [0.0, 0.0]
        elapsed = self._elapsed + float(host.get("_rate_sum", torch.zeros(1)).sum())
        path, action = (host.get("_totals", torch.zeros(2)) * factor).tolist()
        steps = self.steps - skipped[0]
        clock = steps if self.clock == "steps" else (math.nan if self._several_rates else elapsed - skipped[1])
        if self.clock == "lr" and self._several_rates:
            action = math.nan
        norms = host["gradients"].sqrt().tolist() if "gradients" in host else [math.nan, math.nan]
        sections = [s for trace in self._traces.values() for s in trace.sections]
        return RunTotals(
            sections=[] if self._failure is not None else self._whole_sections(host, factor),
            steps=steps,
            measured=self.measured,
            elapsed=clock,
            path_length=path,
            action=action,
            loss=self._loss_from(host, self.steps) if agreed and len(self._signs_of_loss()) == 1 else None,
            no_loss=_DISAGREED if not agreed else "" if len(self._signs_of_loss()) == 1 else _BOTH_WAYS,
            coarse_mobility=self.measured > _COARSE and any(s.diagonal and s.dtype == torch.float32 for s in sections),
            gradient_norm=norms[0],
            clipped_norm=norms[1],
            step_norm=float(host["squares"].sqrt()) if "squares" in host else math.nan,
            learning_rate=float(host["rate"]) if "rate" in host else float(self._rate_value),
            unknown_moves=sum(trace.moves for trace in self._traces.values()),
            no_path=self._pending.why if self._pending is not None else "",
            silent_moves=any(float(host[name]) > 0 for name in host if name.startswith("silent")),
            uneven_clipping=any(float(host[name]) > _UNEVEN for name in host if name.startswith("uneven"))
            or (self._pending is not None and self._pending.uneven),
            lost=self._lost,
            no_formula=tuple(
                sorted(
                    {
                        type(t.optimizer).__name__
                        for t in self._traces.values()
                        for s in t.sections
                        if _kind(s) == "effective"
                    }
                )
            ),
            sampling_se=self._sampling_errors(host),
        )

    def _loss_from(self, host: dict[str, Tensor], steps: int) -> losses.LossDrop | None:
        if "probe" in host:
            found = losses.paired_drop(host["probe"])
        elif "losses" in host:
            found = losses.drop(*self._losses.windows(host["losses"]), steps)
        else:
            return None
        return replace(found, value=self._signs_of_loss().pop() * found.value)

    def _whole_sections(self, host: dict[str, Tensor], factor: float) -> list[SectionTotals]:
        """Sections that are kept apart only because they are shared out otherwise, put together again."""
        found = self._sections_from(host, factor)
        if self._pending is None:
            return found
        keys = [(t, s.index, s.dtype, s.device) for t, trace in self._traces.items() for s in _in_banks(trace)]
        whole: dict[object, SectionTotals] = {}
        for key, part in zip(keys, found, strict=True):
            known = (*key, part.layer, part.kind, part.sums["noise_weight"])
            whole[known] = whole[known].plus(part) if known in whole else part
        return list(whole.values())

    def _signs_of_loss(self) -> set[float]:
        """−1 where the loss is maximized: of the groups that were measured, of all before the first is."""
        groups = [s.group for trace in self._traces.values() for s in trace.sections]
        groups = groups or [g for o in self.optimizers for g in o.param_groups]
        return {-1.0 if g.get("maximize", False) else 1.0 for g in groups} or {1.0}

    def _sections_from(self, host: dict[str, Tensor], factor: float) -> list[SectionTotals]:
        found: list[SectionTotals] = []
        for t, trace in enumerate(self._traces.values()):
            for b, bank in enumerate(trace.banks.values()):
                place = 0
                for s, section in enumerate(bank.sections):
                    displacement, free, weighted = host[f"survey {t} {b} {s}"]
                    count = len(section.slots)
                    if section.scalar:
                        m = host[f"mobility {t} {b}"][0, place : place + count] * factor
                        weighted = torch.where(free == 0, 0.0, free / m)
                    place += count
                    sums = dict(zip(SUMS, (host[f"sums {t} {b}"][:, s] * factor).tolist(), strict=True))
                    formula = section.formula
                    gain = math.nan if formula is None or section.effective else formula.noise_gain(section.group)
                    found.append(
                        SectionTotals(
                            layer=section.layer,
                            kind=_kind(section),
                            sums=sums,
                            displacement_squared=float(displacement.sum()),
                            free_displacement_squared=float(free.sum()),
                            weighted=float(weighted.sum()),
                            noise_gain=gain,
                        )
                    )
        return found

    def _sampling_errors(self, host: dict[str, Tensor]) -> dict[str, float]:
        """K/J √(½ Σ (x_j − x_{j−1})² J/(J−1)): differences of neighbours, so that a trend is not taken for noise."""
        if self.every == 1:
            return {}
        if self.measured < 2 or "_spread" not in host:
            return dict.fromkeys(_SAMPLED, math.nan)
        count = self.measured
        variance = 0.5 * host["_spread"] / (count - 1)
        error = (self.steps / count) * (variance * count).clamp_min(0).sqrt()
        return dict(zip(_SAMPLED, error.tolist(), strict=True))


_SUMS = ("_totals", "_skipped", "_rate_sum", "_spread")
_COARSE = 2**21  # additions to a float32 sum of equal terms, after which each may be off by an eighth of itself
_BOTH_WAYS = (
    "some parameter groups descend the loss and others climb it (maximize=True): its difference is no entropy "
    'production; entropy_production="ito" counts the work of each, or measure them with a meter for each'
)
_DISAGREED = (
    "the processes have not taken the same steps, or not each of them has a loss for each (numbers of batches that "
    "differ?): there is no mean over them"
)
_NOT_ALIKE = (
    "the processes do not hold the same parameters, or have not taken the same steps: their shards do not add up"
)
_UNEVEN = 2e-3  # ratio of squares: float32 sums of the same numbers differ by 1e-6, half precision by its ulp
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


def _in_banks(trace: OptimizerTrace) -> list[Section]:
    return [section for bank in trace.banks.values() for section in bank.sections]


def _kind(section: Section) -> Literal["scalar", "diagonal", "effective"]:
    return "scalar" if section.scalar else "diagonal" if section.diagonal else "effective"


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


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer whose step runs, and whose hooks fire, in a wrapper of Fabric, Lightning or Accelerate.

    (Others that hold an optimizer, as Lookahead does, move weights of their own.)
    """
    wrappers = ("lightning", "lightning_fabric", "pytorch_lightning", "accelerate")
    wrapper = any(kind.__module__.split(".")[0] in wrappers for kind in type(optimizer).__mro__)
    inner = getattr(optimizer, "optimizer", None) if wrapper else None
    return optimizer if inner is None else _unwrapped(inner)


def _checked_optimizers(optimizers: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    found = [_unwrapped(o) for o in ([optimizers] if isinstance(optimizers, Optimizer) else optimizers)]
    if not found:
        raise ValueError("optimizers got an empty list, wanted at least one torch optimizer")
    owner: dict[int, str] = {}
    for optimizer in found:
        name = type(optimizer).__name__
        if not hasattr(optimizer, "register_step_post_hook"):
            raise TypeError(
                f"optimizers got {name}, which has no step hooks, wanted a torch.optim.Optimizer: derive it from that"
            )
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in owner:
                    raise ValueError(
                        f"optimizers got a parameter in both {owner[id(parameter)]} and {name}, wanted each "
                        "parameter in one: measure each optimizer with a meter of its own"
                    )
                owner[id(parameter)] = name
    return found


def check_choice(name: str, got: object, wanted: tuple[str, ...]) -> None:
    if got not in wanted:
        raise ValueError(f"{name} got {got!r}, wanted one of {', '.join(map(repr, wanted))}")


def check_at_least(name: str, got: object, least: int) -> None:
    if isinstance(got, bool) or not isinstance(got, int) or got < least:
        raise ValueError(f"{name} got {got!r}, wanted a whole number of at least {least}")
