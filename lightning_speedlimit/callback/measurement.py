"""What is measured from one θ_0 on: the meter, the probe, the neurons and the rows of the record."""

from __future__ import annotations

import math
from typing import Any

from lightning_speedlimit.callback import logged_metrics, neuron_clouds
from lightning_speedlimit.callback.attaching import attach, new_record
from lightning_speedlimit.callback.batch_losses import BatchLosses
from lightning_speedlimit.callback.batch_size import SampleCount
from lightning_speedlimit.callback.layer_names import LayerNames, layer_key
from lightning_speedlimit.callback.probe import Probe, StartWeights
from lightning_speedlimit.callback.settings import Settings
from lightning_speedlimit.callback.unseen_steps import UnseenSteps
from lightning_speedlimit.callback.value_log import PREFIX
from lightning_speedlimit.checks import guard
from lightning_speedlimit.checks.guard import Say, look
from lightning_speedlimit.record import why
from lightning_speedlimit.trajectory import TrajectoryMeter
from lightning_speedlimit.trajectory.reading import NO_SKETCH
from lightning_speedlimit.words import listed

_FEW = 0.5  # of the samples of the batch before, at the end of an epoch: its loss is left out
SECONDS = "seconds"  # the column of the record that no logger gets: wall-clock time since the fit began
_WITHIN_EPOCH = "the neurons are compared at the ends of epochs; the last of these is in record.clouds"


def _cure(trainer: Any, monitor: str | None) -> str:
    """What to do where no loss was recorded."""
    if monitor is None:
        return "return it from training_step, or log it there and pass SpeedLimit(monitor='its name')"
    told = f"monitor={monitor!r} was not among the metrics logged at each step"
    known = [name for name in look(lambda: logged_metrics.names(trainer), []) if not name.startswith(PREFIX)]
    return f"{told}; these are: {listed(known)}" if known else f"{told}: self.log({monitor!r}, loss) in training_step"


class Measurement:
    """From the weights as they are now. Where these become another run's, another one takes its place.

    Args:
        callback: whose settings it has, and whose place among the Trainer's callbacks counts.
        several: other processes measure the same run.

    Attributes:
        meter: None where nothing can be measured.
        optimizers: the Trainer's, when it began.
        samples: what the joint steps cost in samples, tokens and epochs.
        start: θ_0, for as long as clouds or the probe need it.
        closed_steps: joint steps whose loss has been recorded.
        measured_at: the joint steps of the last row.
        clouds_shown: what was last logged of the neurons.
        last_of_epoch: the last batch was an epoch's last.
    """

    def __init__(self, callback: Settings, trainer: Any, module: Any, say: Say, *, several: bool) -> None:
        self.callback, self.say, self._several = callback, say, several
        self.optimizers = list(trainer.optimizers)
        self._names = LayerNames.of(module, every=callback.per_layer)
        self.meter: TrajectoryMeter | None = attach(callback, trainer, module, self._names, say)
        self.start: StartWeights | None = None
        self.unseen: UnseenSteps | None = None  # until steps have been seen
        if (meter := self.meter) is not None:
            self.unseen = look(lambda: UnseenSteps(module, meter.optimizers), None)
            if (callback.probe_batches or callback.clouds is not None) and not meter.sharded:
                self.start = StartWeights(module, self.optimizers)
        self.probe = Probe(callback.probe_batches) if callback.probe_batches and self.start is not None else None
        self.record = new_record(callback, trainer, module, say)
        self.samples = SampleCount(callback.samples_per_batch, trainer)
        self.closed_steps, self.measured_at, self.clouds_at = 0, -1, -1
        self.clouds_shown: dict[str, float] = {}
        self.last_of_epoch = False

    @property
    def behind(self) -> bool:
        """Steps were made since the last row."""
        return self.meter is not None and self.meter.steps != self.measured_at

    @property
    def in_step(self) -> bool:
        """An optimizer's `step` is under way."""
        return self.meter is not None and self.meter.recorder.in_step

    def detach(self) -> None:
        if self.meter is not None:
            self.meter.close()

    # -- steps -----------------------------------------------------------------------------------------------

    def take_start(self) -> None:
        if self.start is not None:
            self.start.take()

    def begin_probe(self, trainer: Any, module: Any, batch: Any) -> None:
        """Keeps a batch; the probe's losses at θ_0 once they can be had."""
        if self.probe is None or self.probe.first is not None:
            return
        self.probe.keep(batch)
        known = None if self.start is None else self.start.known()
        if known is not None and self.probe.begin(trainer, module, known) and self.callback.clouds is None:
            self.start = None
        self._tell_of_probe(self.probe)

    def close_step(self, losses: BatchLosses, *, tried: bool) -> bool:
        """At the end of a batch: whether a joint step ended with it, which then has its loss."""
        meter = self.meter
        if meter is None:
            return False
        meter.end_step()
        if meter.steps == self.closed_steps:
            if tried:  # the loss scaler skipped the step: its loss, often infinite, belongs to none
                losses.take()
                self.samples.close(stepped=False)
            return False
        step, self.closed_steps = self.closed_steps, meter.steps
        self.samples.close(stepped=True)
        loss = losses.take()
        # The few samples that an epoch may end on would be the noisiest loss, and the nearest to the end of a fit.
        # (Several processes, which may have others each, keep the losses of the same steps.)
        few = self.samples.share < _FEW and self.last_of_epoch and not self._several
        if loss is not None and not few:
            meter.record_loss(loss, step=step)
        return True

    def look_for_unseen_steps(self, *, at_the_end: bool = False) -> None:
        """Says once where weights have moved and no step was seen that did it."""
        if self.unseen is None or self.meter is None:
            return
        message = self.unseen.message(self.meter, self.record, at_the_end=at_the_end)
        if message is not None:
            self.say(message, "unseen")
        if message is not None or self.unseen.over:
            self.unseen = None

    # -- rows ------------------------------------------------------------------------------------------------

    def add_row(self, trainer: Any, module: Any, seconds: float, *, sketch: bool) -> dict[str, float]:
        """A row of the record, and its values; the only device-to-host copy. Empty before the first step.

        Args:
            sketch: keep one in any case.
        """
        meter, record = self.meter, self.record
        if meter is None or meter.steps == 0:
            return {}
        self._use_probe(meter, trainer, module)
        values, found = meter.measure(sketch=True)
        self._agree_on_probe(values["loss_drop"])
        if meter.reader.scattered:
            self.say(f"SpeedLimit keeps {NO_SKETCH}", "sketch")
        record.run["measured_coordinates"] = meter.measured_coordinates
        record.run["optimized_coordinates"] = meter.optimized_coordinates
        record.run.update(self.samples.described() | self.samples.per_step(meter.steps))
        costs = {**self.samples.columns(), SECONDS: seconds}
        record.append(meter.steps, {**values, **costs}, self._reasons(meter, trainer) | self.samples.reasons)
        values |= record.tune()
        record.add_layers(meter.steps, self._names.measured(meter.layers()))
        self.measured_at = meter.steps  # not before: Ctrl-C may come within the row, which is then written anew
        if found is not None and (record.wants_sketch() or sketch):
            record.add_sketch(meter.steps, found.numpy())
        return values

    def layers(self) -> dict[str, float]:
        """Of the last row, by the names under which they are logged."""
        if self.meter is None or not self.callback.per_layer:
            return {}
        names, found = self._names.logged, self.meter.layers()  # those of a state that was loaded may be others
        return {
            layer_key(names.get(layer, layer), name): value
            for layer, values in found.items()
            for name, value in values.items()
        }

    def _reasons(self, meter: TrajectoryMeter, trainer: Any) -> dict[str, str]:
        callback = self.callback
        reasons = why.with_cure(meter.reasons, _cure(trainer, callback.monitor))
        if self.probe is not None and self.probe.why is not None:
            reasons["loss_drop"] = f"probe_batches was given up: {self.probe.why}"
        elif self.probe is not None and self.probe.first is None:
            reasons["loss_drop"] = f"until {self.probe.size} probe batches have come, from the training losses"
        return reasons | dict.fromkeys(neuron_clouds.TOTALS if callback.clouds else (), _WITHIN_EPOCH)

    def _use_probe(self, meter: TrajectoryMeter, trainer: Any, module: Any) -> None:
        if self.probe is None:
            return
        found = self.probe.losses(trainer, module)
        if found is not None:
            meter.record_probe(*found)
        self._tell_of_probe(self.probe)

    def _agree_on_probe(self, drop: float) -> None:
        """One process that gives up makes the mean NaN for all: the others give up too, and wait for it no more."""
        if self._several and self.probe is not None and self.probe.first is not None and math.isnan(drop):
            self.probe.give_up("its losses are NaN on one of the processes")
            self._tell_of_probe(self.probe)

    def _tell_of_probe(self, probe: Probe) -> None:
        if probe.why is not None:
            said = (
                f"SpeedLimit gives up probe_batches={probe.size}: {probe.why}. loss_drop and what rests on it are NaN"
            )
            self.say(f"{said}; probe_batches=0 estimates it from the losses of training", "probe")

    def measure_clouds(self, module: Any) -> None:
        """Completes the last row with W₂ between the neurons at θ_0 and at the θ that the row was measured at."""
        meter, record = self.meter, self.record
        if self.callback.clouds is None or meter is None or not len(record) or self.clouds_at == meter.steps:
            return
        self.clouds_at = meter.steps
        try:
            if meter.sharded:
                raise NotImplementedError("each process holds a part of them")
            if self.start is None:
                found = neuron_clouds.Measured.undefined("resumed without the initial weights")
            else:
                found = neuron_clouds.measure(module, meter, self.optimizers, self.start.of)
        except Exception as error:  # the training goes on
            why = f"the neurons could not be compared: {guard.told(error)}"
            found = neuron_clouds.Measured.undefined(why, said={"failure": f"SpeedLimit: {why}"})
        record.amend(found.totals, found.reasons)
        if found.layers:
            record.add_clouds(meter.steps, found.layers)
        self.clouds_shown = dict.fromkeys(self.clouds_shown, math.nan) | found.shown()
        for topic, message in found.said.items():
            self.say(message, f"clouds: {topic}")
