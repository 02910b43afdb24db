"""SpeedLimit: translates Lightning's hooks into calls of the measurement."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from lightning_speedlimit.callback import figure_logging, lightning, logger_runs
from lightning_speedlimit.callback.alerts import Alerts
from lightning_speedlimit.callback.measuring import Measuring
from lightning_speedlimit.callback.value_log import LOGGED, PREFIX, ValueLog
from lightning_speedlimit.checks import arguments, guard
from lightning_speedlimit.checks.guard import never_raising
from lightning_speedlimit.record.keeper import FINISHED, RecordKeeper
from lightning_speedlimit.trajectory.draw import DEFAULT
from lightning_speedlimit.trajectory.estimates import Estimator
from lightning_speedlimit.trajectory.settings import Clock

Particles = Literal["neurons"]


class SpeedLimit(Measuring):
    """Tells what a training run's steps were spent on, and what another batch or rate would buy; changes nothing of it.

    ```python
    trainer = Trainer(callbacks=[SpeedLimit()])
    ```

    On the Trainer's own log steps it logs `speed_limit/…` (see `LOGGED`) to every logger and keeps a row in `record`,
    which it saves beside the logs; at the end of the fit it prints the summary. Every optimizer step is measured, and
    no number of the training changes.

    First to be read are noise_share, critical_batch_size and step_headroom (`RunRecord.tuning`). The speed limit is
    η = Σ (Δθ_i)²/m_i / Q, the least time for this change of the weights at the entropy production Q over the time
    taken, with the accumulated mobilities m_i (Seroussi et al., arXiv:2307.14653). All formulas and units are those of
    `record.Summary`.

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
        samples_per_batch: samples in one batch of one process; None: the first dimension of the batch's first tensor.
        clouds: "neurons": at the end of each epoch, W₂ between each layer's neurons at θ_0 and now, and how much of
            the displacement is neurons changing places (identity_excess); see the docs for what it costs.
        per_layer: log displacement, path length, … of each layer too, under `speed_limit/layers/…`; the record has
            them in any case.
        prog_bar: show the noise share and the critical batch size in the progress bar.
        coordinates: models of up to so many are measured exactly; of larger ones so many are drawn at the first
            gradient, and every value carries its standard error. "all": exact at any size.
        dirpath: folder of the record; None: "speed_limit" beside the logs.
        log_figures: draw the run at the end of the fit, for loggers that show pictures (TensorBoard, W&B, MLflow),
            else as PNG files in "figures" within the record's folder. Needs the extra "report".
        log_record: give the record and its page to the logger's run as an artifact at the end (W&B, MLflow).
        print_summary: print a table at the end of the fit.
        alert_after: n: say once when the loss has run away, or stopped falling, for n log steps: by the alert of a
            logger that has them (W&B), else as a warning; of a loss that ran away later than that, at the end of the
            fit. None: never.

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
        samples_per_batch: int | None = None,
        clouds: Particles | None = None,
        per_layer: bool = False,
        prog_bar: bool = False,
        coordinates: int | Literal["all"] = DEFAULT,
        dirpath: str | Path | None = None,
        log_figures: bool = True,
        log_record: bool = False,
        print_summary: bool = True,
        alert_after: int | None = None,
    ) -> None:
        super().__init__()
        arguments.check_choice("clock", clock, get_args(Clock))
        arguments.check_choice("entropy_production", entropy_production, get_args(Estimator))
        arguments.check_coordinates(coordinates)
        arguments.check_at_least("loss_window", loss_window, 2, arguments.MOST_LOSSES)
        arguments.check_at_least("probe_batches", probe_batches, 0)
        arguments.check_at_least("measure_every_n_steps", measure_every_n_steps, 1)
        for name, count in {"samples_per_batch": samples_per_batch, "alert_after": alert_after}.items():
            if count is not None:
                arguments.check_at_least(name, count, 1)
        if clouds is not None and not (isinstance(clouds, str) and clouds in get_args(Particles)):
            raise ValueError(
                f"clouds got {guard.shown(clouds)}, wanted 'neurons' or None: neurons are the particles there are"
            )
        arguments.check_name("monitor", monitor)
        flags = {"per_layer": per_layer, "prog_bar": prog_bar, "log_figures": log_figures, "log_record": log_record}
        for name, flag in {**flags, "print_summary": print_summary}.items():
            arguments.check_flag(name, flag)
        self.clock, self.entropy_production, self.monitor = clock, entropy_production, monitor
        self.loss_window, self.probe_batches = loss_window, probe_batches
        self.measure_every_n_steps, self.per_layer = measure_every_n_steps, per_layer
        self.prog_bar, self.coordinates, self.print_summary = prog_bar, coordinates, print_summary
        self.log_figures, self.log_record = log_figures, log_record
        self.clouds, self.samples_per_batch, self.alert_after = clouds, samples_per_batch, alert_after
        self.dirpath = arguments.folder("dirpath", dirpath)

    def _clear(self) -> None:
        super()._clear()
        self._values: ValueLog | None = None
        self._alerts: Alerts | None = None
        self._folder: Path | None = None
        self._keeper: RecordKeeper | None = None
        self._tried = False
        self._began = time.monotonic()  # earlier by what a resumed run has taken before

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
        self._said, self.record = set(), None
        self._writes, self._several = trainer.is_global_zero, trainer.world_size > 1
        self._values = ValueLog(trainer, self, self._say)
        if self.alert_after is not None and self._writes:
            self._alerts = Alerts(self.alert_after, trainer.loggers, self._say)
        if self._several:  # the values are of all processes already; Lightning can't know, and says so for each name
            warnings.filterwarnings("ignore", rf".*self\.log\('{PREFIX}.*sync_dist=True.*")
        loaded, self._loaded = self._loaded, None
        # a broadcast under several processes: on every rank
        folder = None if trainer.fast_dev_run or trainer.barebones else self.dirpath or self._default_folder(trainer)
        self._folder = folder
        self._keeper = RecordKeeper(folder) if folder is not None and self._writes else None
        self._measure_anew(trainer, pl_module, trainer.global_step if loaded is None else 0)
        if loaded is not None and self._resume(trainer, pl_module, loaded, trainer.global_step):
            self._began -= self._last_seconds()
        measured = self._measured
        if measured is not None and measured.last_of_epoch:  # Lightning skips this epoch's end
            if measured.behind:
                self._measure(trainer, pl_module, on_step=False, log=False)
            measured.measure_clouds(pl_module)

    def _default_folder(self, trainer: Any) -> Path:
        """Beside what the first logger writes, a folder for each run; agreed on by all processes."""
        try:
            where = lightning.run_folder(trainer)
        except Exception as error:  # a logger of the user's own; the others must not wait in the broadcast
            where = str(trainer.default_root_dir)
            self._say(
                f"SpeedLimit keeps its record in {where}, for the logger does not tell where it writes "
                f"({guard.told(error)}); set dirpath="
            )
        return Path(trainer.strategy.broadcast(where)) / "speed_limit"

    # -- steps -----------------------------------------------------------------------------------------------

    @never_raising
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        changed = self._change_of_optimizers(trainer)
        if changed is not None and self._measured is not None:
            self._say(f"{changed}: SpeedLimit measures anew from here")
            self._measured.optimizers = list(trainer.optimizers)  # once, whatever comes of it
            self._measure_anew(trainer, pl_module, trainer.global_step)
        self._batch += 1
        measured = self._measured
        if measured is not None:
            measured.take_start()
        if self._values is not None:
            self._values.announce_clouds(trainer, pl_module, {} if measured is None else measured.clouds_shown)
        if measured is not None:
            measured.samples.begin(trainer, batch, first=batch_idx == 0)
            measured.begin_probe(trainer, pl_module, batch)

    @never_raising
    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        self._losses.see_backward(trainer, loss, self.monitor)

    @never_raising
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._tried = True
        if self._measured is None:
            return
        self._measured.take_start()
        plain, meter = lightning.plain_optimizer(optimizer), self._measured.meter
        if meter is None or not any(o is plain for o in meter.optimizers):
            return
        scale = lightning.loss_scale(trainer, plain)
        manual, recorder = not pl_module.automatic_optimization, meter.recorder
        if scale is None and (recorder.has_observed(plain) if manual else recorder.takes_what_is_given(plain)):
            return  # seen after backward: what is here now may be clipped by the user; or seen by the step itself
        meter.observe_gradients(plain, scale=scale)

    @never_raising
    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        meter = None if self._measured is None else self._measured.meter
        if pl_module.automatic_optimization or meter is None:
            return
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            meter.recorder.observe_changed()

    @never_raising
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        values, measured = self._values, self._measured
        if values is not None:
            values.announce_rows(trainer, pl_module, self.record)
        if values is None or measured is None or measured.meter is None:
            return
        measured.last_of_epoch = trainer.is_last_batch
        measured.samples.end(trainer, batch)
        self._losses.add(trainer, pl_module, outputs, self.monitor)
        tried, self._tried = self._tried, False
        closed = measured.close_step(self._losses, tried=tried)
        # Monitors look at the ends of validations, some before this hook's next call.
        awaited = values.announces and (trainer.is_last_batch or lightning.validates_next(trainer))
        logs = lightning.should_log(trainer)
        if (closed and logs) or (awaited and measured.behind):
            self._measure(trainer, pl_module)
        if logs or (closed and awaited):
            measured.look_for_unseen_steps()
        if closed and values.announces and trainer.is_last_batch:  # they may look after validation, before its end
            measured.measure_clouds(pl_module)
            values.give(pl_module, measured.clouds_shown, on_step=True, logger=False)

    def _measure(self, trainer: Any, pl_module: Any, *, on_step: bool = True, log: bool = True) -> None:
        """One row of the record and of the loggers."""
        if self._measured is None:
            return
        seconds = time.monotonic() - self._began  # validation included; without the pause before a run was resumed
        row = self._measured.add_row(trainer, pl_module, seconds, sketch=not on_step)
        if not row:
            return
        if log and self._values is not None:
            shown = {name: row[name] for name in LOGGED} | self._measured.layers()
            self._values.give(pl_module, shown, on_step=on_step)
        self._write()
        if self._alerts is not None and self.record is not None:
            self._alerts.look(self.record)

    @never_raising
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        measured = self._measured
        if measured is None or measured.meter is None:
            return
        if measured.behind:
            self._measure(trainer, pl_module, on_step=False, log=not trainer.barebones)
        measured.look_for_unseen_steps(at_the_end=True)
        measured.measure_clouds(pl_module)
        if not trainer.barebones and self._values is not None:
            self._values.give(pl_module, measured.clouds_shown, on_step=False)
        self._write()

    # -- end -------------------------------------------------------------------------------------------------

    @never_raising
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """θ is not read here: averaging callbacks may have overwritten it."""
        changed = self._change_of_optimizers(trainer)
        if changed is not None:
            self._say(f"{changed}, in its last batch: SpeedLimit has not measured what that did")
        self._detach()
        if self._alerts is not None:
            self._alerts.conclude()
        self._write(ended=FINISHED)
        if self.record is None or not len(self.record):
            return
        if self.log_figures:
            self._draw(trainer)
        if self.log_record and self._writes and self._folder is not None and "write" not in self._said:
            logger_runs.attach(self.record, self._folder, trainer.loggers, self._say)
        if self.print_summary and trainer.is_global_zero and not trainer.barebones:
            from lightning_speedlimit.report.closing import closing

            try:
                print(f"\n{self.record.summary()}")
                if below := closing(self.record, None if "write" in self._said else self._folder):
                    print(f"\n{below}")
            except Exception as error:  # a pipe that is closed, an encoding that lacks a letter
                why = guard.told(error)
                self._say(f"SpeedLimit could not print its summary ({why}); callback.record.summary() has it")

    def _draw(self, trainer: Any) -> None:
        """Figures of this run, by the process that writes; no process waits for another within."""
        if trainer.fast_dev_run or trainer.barebones or not self._writes or self.record is None:
            return
        step = max(lightning.stepped_batches(trainer) - 1, 0)  # where the last step's metrics stand
        figure_logging.show(self.record, trainer.loggers, self._folder, step, self._say)

    @never_raising
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self._is_anothers(trainer):
            return
        try:
            self._end_early(trainer, pl_module, exception)
        finally:  # whatever comes within, Ctrl-C too: else the folder stays locked for as long as the process lives
            self._leave()

    def _end_early(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        measured = self._measured
        # With several processes the last row stands: one that fails alone would wait for the others for ever.
        if measured is not None and measured.behind and not measured.in_step and not self._several:
            try:
                self._measure(trainer, pl_module, on_step=False, log=False)
            except Exception as error:  # the device may be lost; the user's exception must get through
                self._say(f"SpeedLimit could not measure the last step: {guard.told(error)}")
        self._detach()
        if self._alerts is not None:
            self._alerts.conclude()
        self._write(ended=type(exception).__name__)

    @never_raising
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self._is_anothers(trainer):
            return
        try:
            self._detach()
        finally:
            self._leave()

    def _leave(self) -> None:
        if self._keeper is not None:
            self._keeper.release()
            self._keeper = None
        super()._leave()

    def _write(self, *, ended: str | None = None) -> None:
        """Save the record; a disk that will not take it is said once, and the training goes on.

        Args:
            ended: how the fit ended; None: it goes on.
        """
        if self._keeper is None or self.record is None or not len(self.record):
            return
        try:
            self._keeper.write(self.record, ended=ended)
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
