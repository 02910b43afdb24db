"""What happens at each step: the hooks of the optimizers, in which a fault ends the measurement, never the training."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, SupportsFloat

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_speedlimit.checks.guard import shown, told, warn
from lightning_speedlimit.trajectory.follower import LOOKS, Follower
from lightning_speedlimit.trajectory.joint import JointSteps
from lightning_speedlimit.trajectory.losses import LossWindows
from lightning_speedlimit.trajectory.mobility import Scalar
from lightning_speedlimit.trajectory.optimizers import unwrapped, within_another_step
from lightning_speedlimit.trajectory.sums import sum_dtype


def _never_raising(method: Callable[..., Any]) -> Callable[..., Any]:
    """For hooks within a training: a fault of the measurement ends the measurement, never the training.

    (Lightning would take a StopIteration for the end of the epoch, for one.)
    """

    @functools.wraps(method)
    def guarded(recorder: Recorder, *args: Any, **kwargs: Any) -> Any:
        if recorder.failure is not None:
            return None
        if torch.is_inference_mode_enabled():  # what is made there can't be written to elsewhere
            with torch.inference_mode(mode=False):
                return guarded(recorder, *args, **kwargs)
        enabled = torch.is_grad_enabled()
        try:
            torch.set_grad_enabled(False)
            return method(recorder, *args, **kwargs)
        except Exception as error:
            recorder.stop(error)
            if not recorder._shared:  # the step that failed counts: who looks for new ones finds it, and the reason
                recorder.joint.advance()
            return None
        except BaseException:  # Ctrl-C, perhaps with half of a step in the sums
            recorder.interrupted = True
            raise
        finally:
            torch.set_grad_enabled(enabled)

    return guarded


def _untraced(method: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo would trace through hooks of a compiled step, and what runs in its closure: it must not look inside."""
    disable: Callable[..., Callable[..., Any]] = torch.compiler.disable
    disabled = disable(method)

    def either(*args: Any) -> Any:  # where nothing is traced, leaving Dynamo takes longer than the hook's own lines
        return disabled(*args) if torch.compiler.is_compiling() else method(*args)

    return either


class Recorder:
    """Follows optimizers step by step, and the losses beside them.

    Args:
        followers: one of each optimizer. shared: other processes wait for this one at every reading.
    """

    def __init__(self, followers: list[Follower], joint: JointSteps, losses: LossWindows, *, shared: bool) -> None:
        self.followers, self.joint, self.losses, self._shared = followers, joint, losses, shared
        self.failure: str | None = None  # why the measurement has ended
        self.interrupted = False
        self._by_optimizer = {id(f.optimizer): f for f in followers}
        self._loss_step: int | None = None  # of the last loss, until an optimizer steps
        self._handles: list[Any] = []
        self.observe, self._after_closure = _untraced(self._observe), _untraced(self._observe_closure)
        before, after = _untraced(self._before_step), _untraced(self._after_step)
        setattr(before, LOOKS, True)
        for follower in followers:
            self._handles.append(follower.optimizer.register_step_pre_hook(before))
            follower.hook = self._handles[-1].id
            self._handles.append(follower.optimizer.register_step_post_hook(after))

    def follower(self, optimizer: Optimizer) -> Follower:
        """Raises ValueError where it is not one of them."""
        found = self._by_optimizer.get(id(optimizer)) or self._by_optimizer.get(id(unwrapped(optimizer)))
        if found is None:
            raise ValueError(f"{type(optimizer).__name__} is not one of the optimizers that this meter measures")
        return found

    @property
    def in_step(self) -> bool:
        """An optimizer's step has begun to move weights and not ended, or Ctrl-C came while it was being added."""
        return self.interrupted or any(follower.has_moved for follower in self.followers)

    def has_observed(self, optimizer: Optimizer) -> bool:
        """The coming step's raw gradients have been seen."""
        return self.follower(optimizer).observed

    def takes_what_is_given(self, optimizer: Optimizer) -> bool:
        """The force is what the optimizer is given: nothing is to be seen before its step."""
        return self.follower(optimizer).changes.mode == "given"

    def has_stepped(self, optimizer: Optimizer) -> bool:
        """A `step` of it has been entered."""
        return self.follower(optimizer).stepped

    def moved_since(self) -> bool:
        """Whether weights have been moved since the last step. Syncs."""
        return any(bool(follower.membership.moved()) for follower in self.followers if follower.motions)

    def has_moved(self, parameter: Tensor) -> bool:
        """A measured step has had a gradient of it."""
        return any(follower.membership.has_moved(parameter) for follower in self.followers)

    def expect_writes(self, writes: int) -> None:
        """Clipping writes to each gradient so many times, in place: where it was more, others have changed it too."""
        for follower in self.followers:
            follower.changes.writes = writes

    def close(self) -> None:
        """Remove the hooks."""
        while self._handles:
            self._handles.pop().remove()

    # -- losses, gradients ---------------------------------------------------------------------------------------

    def record_loss(self, loss: Tensor | float, step: int | None) -> None:
        if step is None and self.in_step and self.failure is None:
            return
        if not isinstance(loss, Tensor):
            if not isinstance(loss, SupportsFloat):
                raise TypeError(f"record_loss got {shown(loss)}, wanted a number or a tensor of one")
            loss = torch.tensor(float(loss), dtype=torch.float64, device="cpu")
        if loss.numel() != 1:
            raise ValueError(f"record_loss got a tensor of shape {tuple(loss.shape)}, wanted one number: loss.mean()")
        value = loss.detach() if loss.dim() == 0 else loss.detach().reshape(())
        at = self.joint.steps if step is None else step
        if self.joint.moved and step is None:
            at += 1  # the joint step has moved: the loss belongs to what follows it
        self.losses.record(value.real if value.is_complex() else value, at, again=at == self._loss_step)
        self._loss_step = at
        if self.joint.left_out is not None and self.joint.left_out[0] == at:
            self.losses.leave_out(*self.joint.left_out)

    @_never_raising
    def _observe(self, followers: list[Follower], scale: Scalar | None) -> None:
        if any(not follower.in_step and follower in self.joint.moved for follower in followers):
            self._end_step()
        for follower in followers:
            follower.observe(scale, measure=self.joint.measuring())

    @_never_raising
    def observe_changed(self) -> None:
        """Gradients of the optimizers whose gradients have changed since they were last seen."""
        for follower in self.followers:
            if not follower.has_new_gradients():
                continue
            if follower.in_step:
                self.observe([follower], None)
            else:  # another optimizer's backward may have done it: only its own step ends a joint step
                follower.observe(None, measure=True)

    # -- steps -----------------------------------------------------------------------------------------------------

    @_never_raising
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        follower = self.follower(optimizer)
        if follower.in_step and within_another_step(optimizer):
            follower.nested = True
            return None
        if follower in self.joint.moved:
            self._end_step()
        if follower.in_step:  # the last step ended in an exception
            follower.observed = False
        closure = kwargs.get("closure") if len(args) < 2 else args[1]
        follower.begin(closure=closure is not None)
        measure, scale = self.joint.measuring(), _scale_of(optimizer)
        if closure is None or follower.observed:
            seen_before = follower.observed
            follower.observe(scale, measure=measure)
            follower.force(seen_now=not seen_before)
            follower.look_again()
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
                self._after_closure(follower, measure)
            return result

        return observed_closure

    @_never_raising
    def _observe_closure(self, follower: Follower, measure: bool) -> None:
        follower.after_closure(_scale_of(follower.optimizer), measure=measure)

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step = self.joint.steps
        self._finish(optimizer)
        if self.failure is None or not self._shared:
            return
        self._loss_step = None  # a process that can't measure goes on counting
        follower = self.follower(optimizer)
        if len(self.followers) == 1:
            if self.joint.steps == step:
                self.joint.advance()
            return
        if follower in self.joint.moved and step == self.joint.steps:
            self.joint.advance()
        self.joint.moved[follower] = []

    @_never_raising
    def _finish(self, optimizer: Optimizer) -> None:
        follower = self.follower(optimizer)
        if not follower.in_step or (follower.nested and within_another_step(optimizer)):
            return
        rates: list[Scalar] = [_rate(group.get("lr")) for group in optimizer.param_groups]
        measure = self.joint.measuring()
        valid = follower.finish(rates, measure=measure)
        self._loss_step = None
        self.joint.add(follower, rates, valid, measured=measure and bool(follower.motions))
        if len(self.followers) == 1:
            self._end_step()

    def end_step(self) -> None:
        """The joint step is over."""
        if self.joint.moved and self.failure is not None:
            self.joint.advance()
        elif self.joint.moved:
            with self.changing(), torch.no_grad():
                self._end_step()

    def _end_step(self) -> None:
        self.joint.end(self.followers)
        if self.joint.left_out is not None and self.joint.left_out[0] == self.joint.steps - 1:
            self.losses.leave_out(*self.joint.left_out)

    # -- faults ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Sums are changing: what is no `Exception` (Ctrl-C) may leave them with half of a step."""
        try:
            yield
        except BaseException as error:
            self.interrupted |= not isinstance(error, Exception)
            raise

    def stop(self, error: Exception) -> bool:
        """Stop measuring and say so; every value is NaN with this reason from here on. Returns whether it went on."""
        if self.failure is not None:
            return False
        self.failure = f"the measurement stopped at step {self.joint.steps}: {told(error)}"
        warn(f"{self.failure}. The training goes on", stacklevel=3)
        if not self._shared:  # else others read on, and wait for this one at every reading: it goes on counting
            self.joint.begin()
            self.close()
        return True


def _rate(value: Any) -> Scalar:
    """A learning rate as a number, or as the device tensor where reading it would sync; NaN where there is none."""
    if value is None:
        return math.nan
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return value.detach().reshape(()).to(sum_dtype(value.device), copy=True)  # a scheduler may write to it in place
    return float(value)


def _scale_of(optimizer: Optimizer) -> Tensor | None:
    """The loss scale that a fused optimizer divides its gradients by within the step."""
    scale = getattr(optimizer, "grad_scale", None)
    return scale if isinstance(scale, Tensor) else None
