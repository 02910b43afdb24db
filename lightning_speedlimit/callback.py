"""SpeedLimit: translates Lightning's hooks into calls of the trajectory meter."""

from __future__ import annotations

import math
import time
import uuid
import warnings
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_speedlimit import _arguments, _figure_logging, _guard, _lightning, _neuron_clouds
from lightning_speedlimit._fits import OneFitAtATime
from lightning_speedlimit._guard import look, never_raising
from lightning_speedlimit._plain_batches import why_not_plain
from lightning_speedlimit._probe import Probe, StartWeights
from lightning_speedlimit._record_keeper import RecordKeeper
from lightning_speedlimit._unseen_steps import UnseenSteps
from lightning_speedlimit.record import RunRecord
from lightning_speedlimit.trajectory import TrajectoryMeter
from lightning_speedlimit.trajectory.draw import DEFAULT
from lightning_speedlimit.trajectory.estimates import LAYER_VALUES, Estimator
from lightning_speedlimit.trajectory.optimizers import (
    MOST_LOSSES,
    check_at_least,
    check_choice,
    check_coordinates,
    cure_of,
    why_unhooked,
)
from lightning_speedlimit.trajectory.settings import Clock

PREFIX = "speed_limit/"
LOGGED = (
    "efficiency",
    "efficiency_lower",
    "efficiency_action",
    "kinematic_efficiency",
    "straightness",
    "steadiness",
    "conversion",
    "signal_fraction",
    "displacement",
    "path_length",
    "action",
    "loss_drop",
    "entropy_production",
    "grad_norm",
    "grad_norm_clipped",
    "step_norm",
    "elapsed",
    "speed_limit_time",
)
Particles = Literal["neurons"]
_WITHIN_EPOCH = "the neurons are compared at the ends of epochs; the last of these is in record.clouds"
SECONDS = "seconds"  # the column of the record that no logger gets: wall-clock time since the fit began


class SpeedLimit(OneFitAtATime):
    """η = Σ (Δθ_i)²/m_i / Q: how close a training run came to the speed limit, and why not closer.

    ```python
    trainer = Trainer(callbacks=[SpeedLimit()])
    ```

    Measures every optimizer step and changes none of the training's numbers. On the Trainer's own log steps
    it logs `speed_limit/…` (see `LOGGED`; units and formulas: `record.Summary`, and Seroussi et al.,
    arXiv:2307.14653) to every logger, keeps a row in `record`, and saves the record beside the logs.

    Args:
        clock: of the kinematic efficiency: optimizer "steps", or the learning rate ("lr").
        entropy_production: the estimate of Q that `efficiency` divides by.
        monitor: the loss: None = training_step's, else the name of a metric that is logged at every step.
        loss_window: losses at each end of the run from which L_0 and L_K are extrapolated.
        probe_batches: n > 0: loss_drop from the first n training batches, evaluated at θ_0 and on log steps on
            copies of the module (n forward passes each), instead of from the window of training losses. Where the
            module can't be copied without a trace, it says so, and the loss drop is NaN.
        measure_every_n_steps: measure one step of each block of n, drawn at random: cheaper, with standard
            errors; the bounds then hold up to these. What is logged follows the Trainer.
        clouds: "neurons": at the end of each epoch, W₂ between each layer's neurons at θ_0 and now, and how much of
            the displacement is neurons changing places (identity_excess); see the docs for what it costs.
        per_layer: log displacement, path length, … of each layer too, under `speed_limit/layers/…`.
        prog_bar: show the efficiency in the progress bar.
        coordinates: models of up to so many are measured exactly; of larger ones so many are drawn at the first
            gradient, and every value carries its standard error. "all": exact at any size.
        dirpath: folder of the record; None: "speed_limit" beside the logs.
        log_figures: draw the run at the end of the fit, for loggers that show pictures (TensorBoard, W&B, MLflow),
            else as PNG files in "figures" within the record's folder. Needs the extra "report".
        print_summary: print a table at the end of the fit.

    Attributes:
        record: the RunRecord, from the start of the fit on; None before.

    Raises:
        TypeError, ValueError: an argument of another type, or out of its range.
        ValueError: at the start of a fit: probe_batches, optimizing manually. Nothing else of it ends a fit.
    """

    def __init__(
        self,
        *,
        clock: Clock = "steps",
        entropy_production: Estimator = "loss_drop",
        monitor: str | None = None,
        loss_window: int = 50,
        probe_batches: int = 0,
        measure_every_n_steps: int = 1,
        clouds: Particles | None = None,
        per_layer: bool = False,
        prog_bar: bool = False,
        coordinates: int | Literal["all"] = DEFAULT,
        dirpath: str | Path | None = None,
        log_figures: bool = True,
        print_summary: bool = True,
    ) -> None:
        super().__init__()
        check_choice("clock", clock, get_args(Clock))
        check_choice("entropy_production", entropy_production, get_args(Estimator))
        check_coordinates(coordinates)
        check_at_least("loss_window", loss_window, 2, MOST_LOSSES)
        check_at_least("probe_batches", probe_batches, 0)
        check_at_least("measure_every_n_steps", measure_every_n_steps, 1)
        if clouds is not None and not (isinstance(clouds, str) and clouds in get_args(Particles)):
            raise ValueError(
                f"clouds got {_guard.shown(clouds)}, wanted 'neurons' or None: neurons are the particles there are"
            )
        _arguments.check_name("monitor", monitor)
        flags = {"per_layer": per_layer, "prog_bar": prog_bar, "log_figures": log_figures}
        for name, flag in {**flags, "print_summary": print_summary}.items():
            _arguments.check_flag(name, flag)
        self.clock, self.entropy_production, self.monitor = clock, entropy_production, monitor
        self.loss_window, self.probe_batches = loss_window, probe_batches
        self.measure_every_n_steps, self.per_layer = measure_every_n_steps, per_layer
        self.prog_bar, self.coordinates, self.print_summary = prog_bar, coordinates, print_summary
        self.log_figures = log_figures
        self.clouds = clouds
        self.dirpath = _arguments.folder("dirpath", dirpath)
        self.record: RunRecord | None = None
        self._loaded: dict[str, Any] | None = None
        self._said: set[str] = set()
        self._writes, self._several = True, False  # this process writes files and says things; there are others
        self._clear()

    def _clear(self) -> None:
        self._meter: TrajectoryMeter | None = None
        self._optimizers: list[Any] = []
        self._unseen: UnseenSteps | None = None  # until steps have been seen
        self._probe: Probe | None = None
        self._folder: Path | None = None
        self._keeper: RecordKeeper | None = None
        self._start: StartWeights | None = None  # θ_0, for as long as clouds or the probe need it
        self._loss_sum: Tensor | None = None
        self._loss_count = 0
        self._first_loss: Tensor | None = None  # of this batch's backwards
        self._last_monitored: Tensor | None = None
        self._backwards = 0
        self._tried = False
        self._last_of_epoch = False
        self._closed_steps = 0
        self._measured_at = -1
        self._clouds_at = -1
        self._clouds_shown: dict[str, float] = {}
        self._announced = self._registered = False
        self._has_logger = False  # Lightning warns of each name that is logged to none
        self._batch = 0
        self._fit = uuid.uuid4().hex  # a state of it has the same θ_0 and probe
        self._restored_step: int | None = None  # global_step of a checkpoint that is being restored
        self._began, self._seconds_before = time.monotonic(), 0.0
        self._announce = False

    @property
    def state_key(self) -> str:
        """The class name alone: changing a setting must not lose the state."""
        return "SpeedLimit"

    # -- start -----------------------------------------------------------------------------------------------

    @never_raising
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget the measurement of the fit before: the learning rate finder would save it and load it again.

        `record` stays until the next one begins.
        """
        if stage == "fit":
            self._enter(trainer)
            self._clear()
            self._loaded = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.probe_batches and not pl_module.automatic_optimization:
            raise ValueError(
                f"probe_batches={self.probe_batches} needs automatic optimization: under manual optimization "
                "training_step would step the optimizers. Use monitor='a logged loss' and probe_batches=0"
            )
        self._start_measuring(trainer, pl_module)

    @never_raising
    def _start_measuring(self, trainer: Any, pl_module: Any) -> None:
        self._clear()
        self._module = pl_module
        self._said, self.record = set(), None
        self._writes, self._several = trainer.is_global_zero, trainer.world_size > 1
        self._has_logger = bool(trainer.loggers)
        self._announce = any(key.startswith(PREFIX) for key in _lightning.watched(trainer))
        if self._several:  # the values are of all processes already; Lightning can't know, and says so for each name
            warnings.filterwarnings("ignore", rf".*self\.log\('{PREFIX}.*sync_dist=True.*")
        loaded, self._loaded = self._loaded, None
        # a broadcast under several processes: on every rank
        folder = None if trainer.fast_dev_run or trainer.barebones else self.dirpath or self._default_folder(trainer)
        self._folder = folder
        self._keeper = RecordKeeper(folder) if folder is not None and self._writes else None
        try:
            self._measure_anew(trainer, pl_module, trainer.global_step if loaded is None else 0)
        finally:
            self._agree(trainer)
        if loaded is not None:
            self._resume(trainer, pl_module, loaded, trainer.global_step)
        if self._last_of_epoch:  # Lightning skips this epoch's end
            if self._meter is not None and self._measured_at != self._meter.steps:
                self._measure(trainer, pl_module, on_step=False, log=False)
            self._measure_clouds(trainer, pl_module)

    def _default_folder(self, trainer: Any) -> Path:
        """Beside what the first logger writes, a folder for each run; agreed on by all processes."""
        try:
            where = _lightning.run_folder(trainer)
        except Exception as error:  # a logger of the user's own; the others must not wait in the broadcast
            where = str(trainer.default_root_dir)
            self._say(
                f"SpeedLimit keeps its record in {where}, for the logger does not tell where it writes "
                f"({_guard.told(error)}); set dirpath="
            )
        return Path(trainer.strategy.broadcast(where)) / "speed_limit"

    def _attach(self, trainer: Any, pl_module: Any) -> None:
        """A meter on every optimizer that has step hooks; says which have not."""
        self._optimizers = list(trainer.optimizers)
        why = _lightning.unmeasurable(trainer, pl_module)
        if why is not None:
            self._say(f"SpeedLimit measures nothing in this run: {why}, which it does not support")
            return
        # For "no optimizer" Lightning has one without groups.
        real = [o for o in self._optimizers if look(_has_groups, True, o)]
        hooked = [o for o in real if why_unhooked(o) is None]
        for optimizer in real:
            unhooked = why_unhooked(optimizer)
            if unhooked is not None:
                self._say(
                    f"SpeedLimit can't measure {type(optimizer).__name__}, which {unhooked}: "
                    f"{cure_of(optimizer)}. What others do is measured",
                )
        if not hooked:
            if not real:
                self._say("SpeedLimit measures nothing: configure_optimizers returned no optimizer")
            return
        parameters = [p for o in hooked for g in o.param_groups for p in g["params"]]
        if not any(p.requires_grad for p in parameters):
            self._say(
                "SpeedLimit got optimizers whose parameters are all frozen, wanted one with "
                "requires_grad=True: nothing is measured until one is unfrozen"
            )
        names = look(lambda: {id(p): name.rpartition(".")[0] for name, p in pl_module.named_parameters()}, {})
        self._meter = TrajectoryMeter(
            hooked,
            clock=self.clock,
            entropy_production=self.entropy_production,
            loss_window=self.loss_window,
            measure_every_n_steps=self.measure_every_n_steps,
            coordinates=self.coordinates,
            gradient_changes=_lightning.gradient_changes(trainer, pl_module, self),
            layer_of=(lambda p: names.get(id(p), "")) if self.per_layer else None,
            process_group=_lightning.process_group(trainer),
        )
        self._unseen = look(lambda: UnseenSteps(pl_module, hooked), None)
        writes = _lightning.writes_of_clipping(trainer, pl_module)
        if writes is not None:
            self._meter.expect_writes(writes)
        if (self.probe_batches or self.clouds is not None) and not self._meter.sharded:
            self._start = StartWeights(pl_module, self._optimizers)
        if self._meter.sharded:
            self._say(
                f"SpeedLimit under {type(trainer.strategy).__name__}: each process holds a part of the parameters. "
                "Nothing is saved in checkpoints (a resumed run is measured from there); probe_batches and clouds are "
                "left out"
            )

    def _agree(self, trainer: Any) -> None:
        """All processes measure, or none: each waits for the others at every reading."""
        if self._several and not trainer.strategy.reduce_boolean_decision(self._meter is not None) and self._meter:
            self._say("SpeedLimit measures nothing: another process can't")
            self._detach()
            self._meter = self._unseen = None

    def _measure_anew(self, trainer: Any, pl_module: Any, since: int) -> None:
        """From the weights as they are now, which are those of step `since` of the training."""
        self._detach()
        self._attach(trainer, pl_module)
        self._probe = Probe(self.probe_batches) if self.probe_batches and self._start is not None else None
        self._loss_sum, self._loss_count = None, 0
        self._closed_steps, self._measured_at = 0, -1
        self._clouds_at, self._clouds_shown = -1, {}
        self.record = self._new_record(trainer, pl_module)
        if since:
            self.record.run["since_step"] = since

    def _description(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        settings = {
            "clock": self.clock,
            "entropy_production": self.entropy_production,
            "monitor": self.monitor,
            "loss_window": self.loss_window,
            "probe_batches": self.probe_batches,
            "measure_every_n_steps": self.measure_every_n_steps,
            "clouds": self.clouds,
            "coordinates": self.coordinates,
        }
        return {**settings, **_lightning.run_description(trainer, pl_module)}

    def _new_record(self, trainer: Any, pl_module: Any) -> RunRecord:
        """Empty, with a description of the run, where a record can hold that."""
        try:
            return RunRecord(self._description(trainer, pl_module))
        except Exception as error:  # settings of optimizers may be anything
            self._say(f"SpeedLimit's record does not tell what was run: {_guard.told(error)}")
            return RunRecord({"clock": self.clock, "entropy_production": self.entropy_production})

    # -- steps -----------------------------------------------------------------------------------------------

    @never_raising
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        changed = None if self.record is None else _lightning.change_of_optimizers(trainer, self._optimizers)
        if changed is not None:
            self._say(f"{changed}: SpeedLimit measures anew from here")
            self._measure_anew(trainer, pl_module, trainer.global_step)
        self._batch += 1
        if self._start is not None:
            self._start.take()
        if self._announce and self.clouds is not None and not self._registered:
            self._register_clouds(trainer, pl_module)
        if self._probe is not None and self._probe.first is None:
            self._begin_probe(self._probe, trainer, pl_module, batch)

    @never_raising
    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        self._backwards += 1
        if self._backwards == 1:
            self._first_loss = loss.detach() if self.monitor is None else self._monitored(trainer)

    @never_raising
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._tried = True
        if self._start is not None:
            self._start.take()
        plain = _lightning.plain_optimizer(optimizer)
        if self._meter is None or not any(o is plain for o in self._meter.optimizers):
            return
        scale = _lightning.loss_scale(trainer, plain)
        if not pl_module.automatic_optimization and scale is None and self._meter.has_observed(plain):
            return  # seen after backward: what is here now may be clipped by the user
        self._meter.observe_gradients(plain, scale=scale)

    @never_raising
    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if pl_module.automatic_optimization or self._meter is None:
            return
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            self._meter.observe_changed_gradients()

    @never_raising
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._announce and not self._announced:
            self._announce_values(trainer, pl_module)
        if self._meter is None:
            return
        self._last_of_epoch = trainer.is_last_batch
        self._take_loss(trainer, pl_module, outputs)
        self._meter.end_step()
        tried, self._tried = self._tried, False
        # Monitors look at the ends of validations, some before this hook's next call.
        awaited = self._announce and (trainer.is_last_batch or _lightning.validates_next(trainer))
        if self._meter.steps == self._closed_steps:
            if tried:  # the loss scaler skipped the step: its loss, often infinite, belongs to none
                self._loss_sum, self._loss_count = None, 0
            if awaited and self._measured_at != self._meter.steps:
                self._measure(trainer, pl_module)
            if _lightning.should_log(trainer):
                self._look_for_unseen_steps()
            return
        step, self._closed_steps = self._closed_steps, self._meter.steps
        loss = self._window_loss()
        if loss is not None:
            self._meter.record_loss(loss, step=step)
        if _lightning.should_log(trainer) or awaited:
            self._measure(trainer, pl_module)
            self._look_for_unseen_steps()
        if self._announce and trainer.is_last_batch:  # monitors may look before the epoch's end, after validation
            self._measure_clouds(trainer, pl_module)
            self._log(self._clouds_shown, on_step=True, logger=False)

    def _take_loss(self, trainer: Any, pl_module: Any, outputs: Any) -> None:
        """Add a batch's loss to its accumulation window; automatic optimization divided it by that."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if self.monitor is not None:
            loss = self._monitored(trainer)
            self._last_monitored = loss if loss is not None else self._last_monitored
        if pl_module.automatic_optimization and self._backwards > 1:
            loss = self._first_loss  # LBFGS evaluates it again and again; the first one is at θ_k
        self._first_loss, self._backwards = None, 0
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            return
        loss = loss.detach() if loss.dtype.itemsize > 2 else loss.detach().float()
        if self.monitor is None and pl_module.automatic_optimization and trainer.accumulate_grad_batches > 1:
            loss = loss * trainer.accumulate_grad_batches
        self._loss_sum = loss if self._loss_sum is None else self._loss_sum + loss
        self._loss_count += 1

    def _monitored(self, trainer: Any) -> Tensor | None:
        """What was logged as `monitor` in this batch; what an earlier one logged is no loss of this one."""
        assert self.monitor is not None
        found = _lightning.last_logged(trainer, self.monitor)
        return None if found is self._last_monitored else found

    def _window_loss(self) -> Tensor | None:
        total, count = self._loss_sum, self._loss_count
        self._loss_sum, self._loss_count = None, 0
        return None if total is None else (total if count == 1 else total / count)

    def _begin_probe(self, probe: Probe, trainer: Any, pl_module: Any, batch: Any) -> None:
        """Keeps a batch; the probe's losses at θ_0 once they can be had."""
        if self._meter is None:
            return
        probe.keep(batch)
        if self._start is not None and probe.begin(trainer, pl_module, self._start.known()) and self.clouds is None:
            self._start = None
        self._tell_of_probe(probe)

    def _use_probe(self, meter: TrajectoryMeter, trainer: Any, pl_module: Any) -> None:
        if self._probe is None:
            return
        found = self._probe.losses(trainer, pl_module)
        if found is not None:
            meter.record_probe(*found)
        self._tell_of_probe(self._probe)

    def _agree_on_probe(self, drop: float) -> None:
        """One process that gives up makes the mean NaN for all: the others give up too, and wait for it no more."""
        if self._several and self._probe is not None and self._probe.first is not None and math.isnan(drop):
            self._probe.give_up("its losses are NaN on one of the processes")
            self._tell_of_probe(self._probe)

    def _tell_of_probe(self, probe: Probe) -> None:
        if probe.why is not None:
            self._say(
                f"SpeedLimit gives up probe_batches={probe.size}: {probe.why}. loss_drop and what rests on it are NaN; "
                "probe_batches=0 estimates it from the losses of training",
                key="probe",
            )

    def _look_for_unseen_steps(self, *, at_the_end: bool = False) -> None:
        """Says once where weights have moved and no step was seen that did it."""
        unseen, meter = self._unseen, self._meter
        if unseen is None or meter is None or self.record is None:
            return
        message = unseen.message(meter, self.record, at_the_end=at_the_end)
        if message is not None:
            self._say(message, key="unseen")
        if message is not None or unseen.over:
            self._unseen = None

    # -- measuring -------------------------------------------------------------------------------------------

    def _measure(self, trainer: Any, pl_module: Any, *, on_step: bool = True, log: bool = True) -> None:
        """One row of the record and of the loggers; the only device-to-host copy."""
        meter, record = self._meter, self.record
        if meter is None or record is None or meter.steps == 0:
            return
        self._use_probe(meter, trainer, pl_module)
        values, sketch = meter.measure(sketch=True)
        self._agree_on_probe(values["loss_drop"])
        if meter.no_sketch is not None:
            self._say(f"SpeedLimit keeps {meter.no_sketch}", key="sketch")
        record.run["measured_coordinates"] = meter.measured_coordinates
        record.run["optimized_coordinates"] = meter.optimized_coordinates
        record.append(meter.steps, {**values, SECONDS: self._seconds()}, self._reasons(meter))
        self._measured_at = meter.steps  # not before: Ctrl-C may come within the row, which is then written anew
        if sketch is not None and (record.wants_sketch() or not on_step):
            record.add_sketch(meter.steps, sketch.numpy())
        if log:
            shown = {name: values[name] for name in LOGGED}
            if self.per_layer:
                for layer, numbers in meter.layers().items():
                    shown |= {f"layers/{layer or 'model'}/{name}": value for name, value in numbers.items()}
            self._log(shown, on_step=on_step)
        self._write()

    def _seconds(self) -> float:
        """Wall-clock time of the fit so far, validation included; without the pause before it was resumed."""
        return self._seconds_before + time.monotonic() - self._began

    def _reasons(self, meter: TrajectoryMeter) -> dict[str, str]:
        reasons = dict(meter.reasons)
        if self._probe is not None and self._probe.why is not None:
            reasons["loss_drop"] = f"probe_batches was given up: {self._probe.why}"
        elif self._probe is not None and self._probe.first is None:
            reasons["loss_drop"] = f"until {self.probe_batches} probe batches have come, from the training losses"
        if self.monitor is not None and "no loss was recorded" in reasons.values():
            reasons["loss_drop"] = f"monitor={self.monitor!r} was not among the metrics logged at each step"
        return reasons | dict.fromkeys(_neuron_clouds.TOTALS if self.clouds else (), _WITHIN_EPOCH)

    def _measure_clouds(self, trainer: Any, pl_module: Any) -> None:
        """Completes the last row with W₂ between the neurons at θ_0 and at the θ that the row was measured at."""
        meter, record = self._meter, self.record
        if self.clouds is None or meter is None or record is None or not len(record) or self._clouds_at == meter.steps:
            return
        self._clouds_at = meter.steps
        try:
            if meter.sharded:
                raise NotImplementedError("each process holds a part of them")
            if self._start is None:
                found = _neuron_clouds.Measured.undefined("resumed without the initial weights")
            else:
                found = _neuron_clouds.measure(pl_module, meter, self._optimizers, self._start.of)
        except Exception as error:  # the training goes on
            why = f"the neurons could not be compared: {_guard.told(error)}"
            found = _neuron_clouds.Measured.undefined(why, said={"failure": f"SpeedLimit: {why}"})
        record.amend(found.totals, found.reasons)
        if found.layers:
            record.add_clouds(meter.steps, found.layers)
        self._clouds_shown = dict.fromkeys(self._clouds_shown, math.nan) | found.shown()
        for topic, message in found.said.items():
            self._say(message, key=f"clouds: {topic}")

    def _register_clouds(self, trainer: Any, pl_module: Any) -> None:
        """Monitors find their keys from the first batch on: NaN, or what a resumed run knows."""
        self._registered = True
        names = {
            _neuron_clouds.layer_key(layer.name, name)
            for layer in _neuron_clouds.layers(pl_module)
            for name in _neuron_clouds.SHOWN
        }
        watched = {key.removeprefix(PREFIX) for key in _lightning.watched(trainer)}
        awaited = dict.fromkeys([*_neuron_clouds.SHOWN, *sorted(names & watched)], math.nan)
        self._log(awaited | self._clouds_shown, on_step=True, logger=False)

    def _announce_values(self, trainer: Any, pl_module: Any) -> None:
        """Monitors find their keys from the first batch on: NaN, or what a resumed run knows."""
        self._announced = True
        parameters = pl_module.named_parameters() if self.per_layer else ()
        layers = {name.rpartition(".")[0] or "model" for name, _ in parameters}
        known = [f"layers/{layer}/{value}" for layer in layers for value in LAYER_VALUES]
        watched = {key.removeprefix(PREFIX) for key in _lightning.watched(trainer)}
        columns = self.record.columns if self.record is not None and len(self.record) else {}
        last = {name: float(columns[name][-1]) for name in LOGGED if name in columns}
        names = [*LOGGED, *sorted(watched.intersection(known))]
        self._log(dict.fromkeys(names, math.nan) | last, on_step=True)

    def _log(self, values: dict[str, float], *, on_step: bool, logger: bool = True) -> None:
        """Through the module's `log`, so that monitors see it; 0-d host tensors: no upload, no read."""
        for name, value in values.items():
            try:
                self._module.log(  # not self.log: Lightning makes it another module's where trainers share a callback
                    PREFIX + name,
                    torch.tensor(value, dtype=torch.float64).float(),
                    on_step=on_step,
                    on_epoch=not on_step,
                    logger=logger and self._has_logger,
                    prog_bar=self.prog_bar and name == "efficiency",
                    batch_size=1,
                )
            except Exception as error:  # the module logs that name itself in another way, or has a `log` of its own
                self._say(
                    f"SpeedLimit could not log {PREFIX}{name} ({_guard.told(error)}); it stays in callback.record",
                    key="log",
                )

    @never_raising
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self._meter is None:
            return
        if self._meter.steps and self._measured_at != self._meter.steps:
            self._measure(trainer, pl_module, on_step=False, log=not trainer.barebones)
        self._look_for_unseen_steps(at_the_end=True)
        self._measure_clouds(trainer, pl_module)
        if not trainer.barebones:
            self._log(self._clouds_shown, on_step=False)
        self._write()

    # -- end -------------------------------------------------------------------------------------------------

    @never_raising
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """θ is not read here: averaging callbacks may have overwritten it."""
        changed = None if self.record is None else _lightning.change_of_optimizers(trainer, self._optimizers)
        if changed is not None:
            self._say(f"{changed}, in its last batch: SpeedLimit has not measured what that did")
        self._detach()
        self._write(at_once=True)
        measured = self.record is not None and len(self.record) > 0
        if self.log_figures and measured:
            self._draw(trainer)
        if self.print_summary and measured and trainer.is_global_zero and not trainer.barebones:
            assert self.record is not None
            try:
                print(f"\n{self.record.summary()}")
                if self._folder is not None and "write" not in self._said:
                    print(f"\nRecord: {self._folder}")
            except Exception as error:  # a pipe that is closed, an encoding that lacks a letter
                why = _guard.told(error)
                self._say(f"SpeedLimit could not print its summary ({why}); callback.record.summary() has it")

    def _draw(self, trainer: Any) -> None:
        """Figures of this run, by the process that writes; no process waits for another within."""
        if trainer.fast_dev_run or trainer.barebones or not self._writes or self.record is None:
            return
        step = max(_lightning.stepped_batches(trainer) - 1, 0)  # where the last step's metrics stand
        _figure_logging.show(self.record, trainer.loggers, self._folder, step, self._say)

    @never_raising
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self._is_anothers(trainer):
            return
        meter = self._meter
        # With several processes the last row stands: one that fails alone would wait for the others for ever.
        behind = meter is not None and not self._several and meter.steps != self._measured_at
        if meter is not None and behind and not meter.in_step:
            try:
                self._measure(trainer, pl_module, on_step=False, log=False)
            except Exception as error:  # the device may be lost; the user's exception must get through
                self._say(f"SpeedLimit could not measure the last step: {_guard.told(error)}")
        self._detach()
        self._write(at_once=True)
        self._leave_folder()
        self._leave()

    @never_raising
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if not self._is_anothers(trainer):
            self._detach()
            self._leave_folder()
            self._leave()

    def _detach(self) -> None:
        if self._meter is not None:
            self._meter.close()

    def _stop_measuring(self, error: Exception) -> None:
        """What the meter does about a fault in its own hooks: all is NaN with the reason, which is said once."""
        if self._meter is None:
            self._say(f"SpeedLimit measures nothing: {_guard.told(error)}. The training goes on", key="failed")
        elif self._meter.stop(error):
            self._measured_at = -1  # the row of this step is written anew, with the reason

    def _write(self, *, at_once: bool = False) -> None:
        """Save the record; a disk that will not take it is said once, and the training goes on."""
        if self._keeper is None or self.record is None or not len(self.record):
            return
        try:
            self._keeper.write(self.record, at_once=at_once)
        except Exception as error:  # mostly OSError; what half-written archives raise is not documented
            self._say(
                f"SpeedLimit could not save its record in {self._keeper.folder}: {error}. It stays in "
                "callback.record; set dirpath= to a folder that can be written",
                key="write",
            )
        self._folder = self._keeper.folder
        if self._folder != self._keeper.wanted:
            self._say(
                f"SpeedLimit keeps its record in {self._folder}: another fit, which is not over, writes in "
                f"{self._keeper.wanted}. Give each its own dirpath="
            )

    def _leave_folder(self) -> None:
        if self._keeper is not None:
            self._keeper.release()
            self._keeper = None

    def _say(self, message: str, key: str | None = None) -> None:
        """Once per fit, by the process that writes."""
        if (key or message) not in self._said:
            self._said.add(key or message)
            if self._writes:
                _guard.warn(message, stacklevel=2)

    # -- state -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors: the meter's sums and its vectors of the measured coordinates, the record."""
        try:
            return self._state()
        except Exception as error:  # a checkpoint is written within the training
            self._say(
                f"SpeedLimit could not put its state in a checkpoint ({_guard.told(error)}); a run "
                "resumed from it is measured anew from there",
                key="state",
            )
            return {}

    def _state(self) -> dict[str, Any]:
        meter, record = self._meter, self.record
        if meter is None or record is None or meter.sharded:
            return {}  # of shards: the checkpoint would hold the sums of one process
        state: dict[str, Any] = {
            "meter": meter.state_dict(),
            "record": _to_tensors(record.state_dict()),
            "fit": self._fit,
            "batch": self._batch,
            "closed": self._closed_steps,
            "measured_at": self._measured_at,
            "last_of_epoch": self._last_of_epoch,
            "clouds": [self._clouds_at, dict(self._clouds_shown)],
            "loss": (None if self._loss_sum is None else self._loss_sum.cpu(), self._loss_count),
            "start": None if self._start is None else self._start.state_dict(),
        }
        probe = {} if self._probe is None else self._probe.state_dict()
        if probe:
            state["probe"] = probe
        unfit = why_not_plain(state)
        if unfit is not None:
            raise TypeError(
                f"it holds {unfit}, wanted plain types and tensors: checkpoints are loaded with weights_only"
            )
        return state

    @never_raising
    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """In the middle of a fit, one that has no state for `load_state_dict`: measure anew from there."""
        if self._module is None or self._is_anothers(trainer):
            return
        self._restored_step = checkpoint.get("global_step")
        if not checkpoint.get("callbacks", {}).get(self.state_key):
            self._restored(trainer, pl_module, None)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until the optimizers exist, and told then where it is no state of ours.

        In the middle of a fit, what was measured since is forgotten.
        """
        self._loaded = None if isinstance(state_dict, dict) and not state_dict else state_dict
        if self._module is not None and self._loaded is not None:
            loaded, self._loaded = self._loaded, None
            self._restored(self._trainer, self._module, loaded)

    @never_raising
    def _restored(self, trainer: Any, pl_module: Any, loaded: dict[str, Any] | None) -> None:
        """Weights and optimizers are taken back in the middle of a fit, by a tuner after its trial steps, say."""
        step, self._restored_step = self._restored_step, None
        since = trainer.global_step if step is None else step
        known, clock = (self._probe, self._start), (self._began, self._seconds_before)
        closed, run = self._closed_steps, {} if self.record is None else self.record.run
        self._measure_anew(trainer, pl_module, since if loaded is None else 0)
        if loaded is None:
            self._say(f"a checkpoint without SpeedLimit's state was loaded: it measures anew from step {since}")
            return
        own = isinstance(loaded, dict) and loaded.get("fit") == self._fit
        if own and self.record is not None:
            self.record.run = run  # trial steps may have other settings
        self._resume(trainer, pl_module, loaded, since)
        self._began, self._seconds_before = clock  # the time has passed
        if own:
            self._probe, self._start = known
            if loaded["batch"] == self._batch:  # its end is still to come
                self._closed_steps = closed

    def _resume(self, trainer: Any, pl_module: Any, loaded: dict[str, Any], since: int) -> None:
        """Go on where a state was taken; since: the training's step of it."""
        if self._meter is None:
            return
        try:
            self._restore(trainer, pl_module, loaded, self._meter)
        except Exception as error:  # a state of another version, of another class of this name, damaged
            self._say(f"SpeedLimit starts anew at step {since}: {_told(error)}")
            self._last_of_epoch = False
            self._measure_anew(trainer, pl_module, since)
            self._began, self._seconds_before = time.monotonic(), 0.0

    def _restore(self, trainer: Any, pl_module: Any, loaded: dict[str, Any], meter: TrajectoryMeter) -> None:
        assert self.record is not None
        restored = RunRecord.from_state_dict(_to_arrays(loaded["record"]))
        meter.load_state_dict(loaded["meter"])
        # Not what was closed: another callback may have written it before this one saw the end of the batch.
        self._closed_steps, self._measured_at = meter.steps, int(loaded["measured_at"])
        loss, self._loss_count = loaded["loss"]
        self._loss_sum = None if loss is None else loss.to(pl_module.device)
        self._probe = None
        if "probe" in loaded and self.probe_batches:
            self._probe = Probe.restored(loaded["probe"], pl_module.device)
        wanting = [("probe_batches", self.probe_batches and self._probe is None), ("clouds", self.clouds is not None)]
        names = [name for name, wants in wanting if wants]
        if self._start is not None:
            self._start = self._start.restored(loaded["start"]) if names else None
            if names and self._start is None:
                self._say(
                    "SpeedLimit resumed without the initial weights, which the checkpoint was saved without: "
                    f"{' and '.join(names)} left out in this run"
                )
        if self.probe_batches and self._probe is None and self._start is not None:  # saved before all had come
            self._probe = Probe(self.probe_batches)
        if self.clouds is not None:
            self._clouds_at, self._clouds_shown = loaded.get("clouds", (-1, {}))
        self._last_of_epoch = bool(loaded["last_of_epoch"])
        restored.run.update(self.record.run)
        seconds = restored.columns.get(SECONDS, [math.nan])  # rows of earlier versions have none
        self._seconds_before = float(seconds[-1]) if len(seconds) else 0.0
        self.record = restored


def _has_groups(optimizer: Any) -> bool:
    return bool(optimizer.param_groups)


def _told(error: Exception) -> str:
    """A message of the package's own as it is; of others, which often are one word, the kind as well."""
    told = _guard.told(error)
    return told.removeprefix("ValueError: ") if isinstance(error, ValueError) else f"the checkpoint's state has {told}"


def _to_tensors(state: dict[str, Any]) -> dict[str, Any]:
    """The record's arrays as tensors: checkpoints are loaded with weights_only."""
    return state | {"arrays": {k: torch.from_numpy(v) for k, v in state["arrays"].items()}}


def _to_arrays(state: dict[str, Any]) -> dict[str, Any]:
    return state | {"arrays": {k: v.cpu().numpy() for k, v in state["arrays"].items()}}
