"""When a callback's measurement begins, ends, is saved, gone on with and taken back; and who speaks of it."""

from __future__ import annotations

import math
import uuid
from typing import Any

from lightning_speedlimit.callback import lightning
from lightning_speedlimit.callback.batch_losses import BatchLosses
from lightning_speedlimit.callback.fits import OneFitAtATime
from lightning_speedlimit.callback.measurement import SECONDS, Measurement
from lightning_speedlimit.callback.saved_state import restore, state_of
from lightning_speedlimit.callback.settings import Settings
from lightning_speedlimit.checks import guard
from lightning_speedlimit.checks.guard import never_raising
from lightning_speedlimit.record import RunRecord


class Measuring(Settings, OneFitAtATime):
    """A callback that has one measurement at a time; the settings are those of `SpeedLimit`."""

    def __init__(self) -> None:
        super().__init__()
        self.record: RunRecord | None = None
        self._loaded: Any = None
        self._said: set[str] = set()
        self._writes, self._several = True, False  # this process writes files and says things; there are others
        self._clear()

    def _clear(self) -> None:
        self._measured: Measurement | None = None
        self._losses = BatchLosses()
        self._batch = 0
        self._fit = uuid.uuid4().hex  # a state of it has the same θ_0 and probe
        self._restored_step: int | None = None  # global_step of a checkpoint that is being restored

    @property
    def state_key(self) -> str:
        """The class name alone: changing a setting must not lose the state."""
        return "SpeedLimit"

    def _say(self, message: str, key: str | None = None) -> None:
        """Once per fit, by the process that writes."""
        if (key or message) not in self._said:
            self._said.add(key or message)
            if self._writes:
                guard.warn(message, stacklevel=2)

    # -- begin and end --------------------------------------------------------------------------------------

    def _measure_anew(self, trainer: Any, pl_module: Any, since: int) -> None:
        """From the weights as they are now, which are those of step `since` of the training."""
        able = False
        try:
            self._detach()
            self._losses.take()
            measured = Measurement(self, trainer, pl_module, self._say, several=self._several)
            if since:
                measured.record.run["since_step"] = since
            self._measured, self.record = measured, measured.record
            able = measured.meter is not None
        finally:
            if not self._all(trainer, able):  # each waits for the others at every reading
                if able:
                    self._say("SpeedLimit measures nothing: another process can't")
                self._detach()
                self._measured = None

    def _all(self, trainer: Any, able: bool) -> bool:
        """Whether all processes are able; of a single one, True: what it is not able to do it tells itself."""
        return not self._several or bool(trainer.strategy.reduce_boolean_decision(able))

    def _change_of_optimizers(self, trainer: Any) -> str | None:
        return None if self._measured is None else lightning.change_of_optimizers(trainer, self._measured.optimizers)

    @never_raising
    def _detach(self) -> None:
        if self._measured is not None:
            self._measured.detach()

    def _stop_measuring(self, error: Exception) -> None:
        """What the meter does about a fault in its own hooks: all is NaN with the reason, which is said once."""
        measured = self._measured
        if measured is None or measured.meter is None:
            self._say(f"SpeedLimit measures nothing: {guard.told(error)}. The training goes on", key="failed")
        elif measured.meter.recorder.stop(error):
            measured.measured_at = -1  # the row of this step is written anew, with the reason

    # -- state -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors: the meter's sums and its vectors of the measured coordinates, the record."""
        try:
            state = {} if self._measured is None else state_of(self._measured, self._losses)
        except Exception as error:  # a checkpoint is written within the training
            self._say(
                f"SpeedLimit could not put its state in a checkpoint ({guard.told(error)}); a run "
                "resumed from it is measured anew from there",
                key="state",
            )
            return {}
        return state and {**state, "fit": self._fit, "batch": self._batch}

    @never_raising
    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """In the middle of a fit, one that has no state for `load_state_dict`: measure anew from there."""
        if self._measured is None or self._trainer is not trainer:
            return
        self._restored_step = checkpoint.get("global_step")
        if not checkpoint.get("callbacks", {}).get(self.state_key):
            self._restored(trainer, None)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until the optimizers exist, and told then where it is no state of ours.

        In the middle of a fit, what was measured since is forgotten.
        """
        loaded = None if isinstance(state_dict, dict) and not state_dict else state_dict
        if self._trainer is None or self._measured is None:
            self._loaded = loaded
        elif loaded is not None:
            self._restored(self._trainer, loaded)

    @never_raising
    def _restored(self, trainer: Any, loaded: dict[str, Any] | None) -> None:
        """Weights and optimizers are taken back in the middle of a fit, by a tuner after its trial steps, say."""
        before, step = self._measured, self._restored_step
        module, self._restored_step = trainer.lightning_module, None
        since = trainer.global_step if step is None else step
        self._measure_anew(trainer, module, since if loaded is None else 0)
        if loaded is None:
            self._say(f"a checkpoint without SpeedLimit's state was loaded: it measures anew from step {since}")
            return
        own = isinstance(loaded, dict) and loaded.get("fit") == self._fit
        measured = self._measured
        if own and before is not None and measured is not None:
            measured.record.run = before.record.run  # trial steps may have other settings
        if self._resume(trainer, module, loaded, since) and own and before is not None and measured is not None:
            measured.probe, measured.start = before.probe, before.start
            if loaded["batch"] == self._batch:  # its end is still to come
                measured.closed_steps = before.closed_steps

    def _resume(self, trainer: Any, pl_module: Any, loaded: dict[str, Any], since: int) -> bool:
        """Go on where a state was taken, or else measure anew. since: the training's step of it."""
        measured, failed = self._measured, None
        if measured is None or measured.meter is None:
            return False
        try:
            restore(measured, self._losses, loaded, pl_module.device)
        except Exception as error:  # a state of another version, of another class of this name, damaged
            failed = _told(error)
        if self._all(trainer, failed is None) and failed is None:
            self.record = measured.record
            return True
        self._say(f"SpeedLimit starts anew at step {since}: {failed or 'another process can not go on'}")
        self._measure_anew(trainer, pl_module, since)
        return False

    def _last_seconds(self) -> float:
        """Of the record's last row; 0 where there is none (rows of earlier versions have none)."""
        seconds = [] if self.record is None else self.record.columns.get(SECONDS, [math.nan])
        return float(seconds[-1]) if len(seconds) else 0.0


def _told(error: Exception) -> str:
    """A message of the package's own as it is; of others, which often are one word, the kind as well."""
    told = guard.told(error)
    return told.removeprefix("ValueError: ") if isinstance(error, ValueError) else f"the checkpoint's state has {told}"
