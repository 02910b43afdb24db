"""SpeedLimitCallback: measures what a Trainer of Hugging Face's transformers does."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import find_batch_size
from torch import Tensor
from transformers import TrainerCallback, __version__
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lightning_speedlimit import loaders
from lightning_speedlimit.checks.arguments import check_flag, check_text
from lightning_speedlimit.checks.guard import look, never_raising, shown, told, warn
from lightning_speedlimit.record import RunRecord
from lightning_speedlimit.record.keeper import FINISHED, RecordKeeper
from lightning_speedlimit.trajectory import TrajectoryMeter
from lightning_speedlimit.trajectory.optimizers import cure_of, unwrapped, why_unhooked

PREFIX = "speed_limit/"
FOLDER = "speed_limit"  # within output_dir
STATE = "speed_limit.pt"  # within each checkpoint: a record folder there would count as a run
LOGGED = (
    *("noise_share", "critical_batch_size", "step_headroom"),
    *("efficiency", "kinematic_efficiency", "straightness", "steadiness", "conversion"),
)


class SpeedLimitCallback(TrainerCallback):
    """How close the Trainer's run came to the speed limit, and what was in the way: `SpeedLimit` for transformers.

    ```python
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.add_callback(SpeedLimitCallback(trainer))
    trainer.train()
    ```

    Each time that the Trainer logs its loss, the record gets a row, and the Trainer logs values of it. The record is in
    `output_dir/speed_limit`, where `speedlimit show` and `compare` find it, and in each checkpoint: a resumed run goes
    on with it. The training is not changed.

    No event of the Trainer carries the loss, or comes before gradients are clipped: the callback wraps
    `trainer.training_step`, which returns the loss and leaves the gradients as backward made them.

    Args:
        trainer: the Trainer that the callback is added to.
        logged: names of the record's columns that the Trainer logs, as "speed_limit/…", wherever they are defined.
        print_summary: at the end of the training, by the first process.
        settings: `clock`, `entropy_production`, `coordinates`, …, as `TrajectoryMeter` takes them.

    Attributes:
        record: the `RunRecord` of the last training; None before it, and where nothing can be measured.

    Raises:
        TypeError: no Trainer, or arguments of other types. At the beginning of the training, TypeError or ValueError: a
            setting that `TrajectoryMeter` does not take.
    """

    def __init__(
        self, trainer: Any, *, logged: Sequence[str] = LOGGED, print_summary: bool = True, **settings: Any
    ) -> None:
        if not callable(getattr(trainer, "training_step", None)):
            raise TypeError(f"trainer got {shown(trainer)}, wanted the Trainer that the callback is added to")
        if isinstance(logged, str):
            raise TypeError(f"logged got {shown(logged)}, wanted names of columns, as in ({shown(logged)},)")
        for name in logged:
            check_text("logged", name)
        check_flag("print_summary", print_summary)
        self.record: RunRecord | None = None
        self.logged, self.print_summary, self.settings = tuple(logged), print_summary, settings
        self._trainer = trainer
        self._run: _Run | None = None  # while it goes on
        trainer.training_step = functools.partial(self._training_step, trainer.training_step)

    def _training_step(self, step: Callable[..., Tensor], model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss = step(model, inputs, *args, **kwargs)
        self._after_backward(inputs, loss)
        return loss

    @never_raising
    def _after_backward(self, inputs: Any, loss: Tensor) -> None:
        if self._run is not None:
            self._run.after_backward(inputs, loss)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end()
        self.record = None
        why = _why_unmeasured(self._trainer)
        if why is not None:
            warn(f"SpeedLimitCallback measures nothing in this run: {why}", stacklevel=2)
            return
        run = _Run(self._trainer, self.settings, kwargs.get("train_dataloader"))
        if state.global_step:
            run.resume(_checkpoint(args, state), state.global_step)
        self._run, self.record = run, run.record

    @never_raising
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._run is not None:
            self._run.end_step()

    @never_raising
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._run is None or "loss" not in (logs or {}):
            return  # logs of an evaluation, of the end, or those below
        row = self._run.take_row(state.epoch)
        values = {PREFIX + name: row[name] for name in self.logged if not math.isnan(row.get(name, math.nan))}
        if values:
            self._trainer.log(values)

    @never_raising
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._run is not None:
            self._run.save(_checkpoint(args, state))

    @never_raising
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run = self._run
        if run is None:
            return
        try:
            if run.behind:
                run.take_row(state.epoch)
            run.write(ended=FINISHED)
        finally:
            self._end()
        if len(run.record) and self.print_summary and state.is_world_process_zero:
            from lightning_speedlimit.report.closing import closing

            print(f"\n{run.record.summary()}")
            if below := closing(run.record, run.folder):
                print(f"\n{below}")

    def _end(self) -> None:
        """Of a training that is over, or was interrupted: takes the hooks off, and leaves the folder to others."""
        if self._run is not None:
            self._run.close()
        self._run = None

    def _stop_measuring(self, error: Exception) -> None:
        """For `never_raising`."""
        if self._run is not None:
            self._run.meter.recorder.stop(error)  # which warns


class _Run:
    """One training, from its first step or from a checkpoint on.

    Attributes:
        behind: steps were made since the last row.
    """

    def __init__(self, trainer: Any, settings: dict[str, Any], loader: Any) -> None:
        args = trainer.args
        several = args.world_size > 1 and torch.distributed.is_initialized()
        group = torch.distributed.group.WORLD if several else None
        self._trainer = trainer
        self.meter = TrajectoryMeter(trainer.optimizer, **{"process_group": group, **settings})
        self.record = RunRecord(self.meter.description() | _description(trainer, loader))
        self._keeper = RecordKeeper(Path(args.output_dir) / FOLDER) if args.should_save else None
        self._saved = False  # by the last write
        self._told_of_folder = False  # that another training has the one that was wanted
        self._steps = 0  # that have their loss
        self._loss: Tensor | None = None  # of the batches since the last step
        self._costs = {"samples": 0.0, "tokens": 0.0}

    @property
    def behind(self) -> bool:
        return self.meter.steps > (self.record.columns["step"][-1] if len(self.record) else 0)

    @property
    def folder(self) -> Path | None:
        """Where the record was written; None where it was not."""
        return self._keeper.folder if self._keeper is not None and self._saved else None

    # -- steps ---------------------------------------------------------------------------------------------------

    def after_backward(self, inputs: Any, loss: Tensor) -> None:
        """The Trainer divides the losses of accumulated batches before backward: their sum is that of the step."""
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
        processes = self._trainer.args.world_size  # each is taken to have as many samples as this one
        self._costs["samples"] += processes * look(find_batch_size, math.nan, inputs)
        self._costs["tokens"] += processes * look(lambda: inputs["input_ids"].numel(), 0)
        if self._trainer.accelerator.sync_gradients:  # the last batch before the step: gradients are clipped next
            self.meter.observe_gradients(scale=_loss_scale(self._trainer.optimizer))

    def end_step(self) -> None:
        loss, self._loss = self._loss, None
        self.meter.end_step()
        if self.meter.steps > self._steps and loss is not None:  # else a loss scaler skipped the step
            self.meter.record_loss(loss, step=self._steps)
        self._steps = self.meter.steps

    def take_row(self, epochs: float | None) -> dict[str, float]:
        """The row's values; empty before the first step. The only sync; all processes come here, for one message."""
        meter, record = self.meter, self.record
        if not meter.steps:
            return {}
        costs = {name: value for name, value in self._costs.items() if value}
        per_step = {f"{name}_per_step": value / meter.steps for name, value in costs.items() if math.isfinite(value)}
        record.run.update(per_step)
        record.take(meter, costs if epochs is None else costs | {"epochs": float(epochs)})
        self.write()
        return {name: float(column[-1]) for name, column in record.columns.items()}

    # -- files ---------------------------------------------------------------------------------------------------

    def write(self, *, ended: str | None = None) -> None:
        """The first process alone; a disk that will not take it is told of, and the training goes on.

        Args:
            ended: how the training ended; None: it goes on.
        """
        if self._keeper is None or not len(self.record):
            return
        self._saved = False
        try:
            self._keeper.write(self.record, ended=ended)
            self._saved = True
        except Exception as error:  # mostly OSError
            said = f"SpeedLimitCallback could not save its record in {self._keeper.folder}: {told(error)}"
            warn(f"{said}. It stays in callback.record", stacklevel=4)
        folder, wanted = self._keeper.folder, self._keeper.wanted
        if folder != wanted and not self._told_of_folder:
            self._told_of_folder = True
            said = f"SpeedLimitCallback keeps its record in {folder}: another training, which is not over, writes in"
            warn(f"{said} {wanted}. Give each its own output_dir", stacklevel=4)

    def save(self, checkpoint: Path) -> None:
        """The measurement in the Trainer's checkpoint; of shards it would be that of one process, and is left out."""
        if self._keeper is None or self.meter.sharded or not checkpoint.is_dir():
            return
        record = self.record.state_dict()
        record["arrays"] = {name: torch.from_numpy(array) for name, array in record["arrays"].items()}
        state = {"meter": self.meter.state_dict(), "record": record, "costs": dict(self._costs)}
        torch.save(state, checkpoint / STATE)

    def resume(self, checkpoint: Path, step: int) -> None:
        """Goes on with the measurement in the checkpoint; where there is none, it begins at this step, and says so."""
        try:
            loaded = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
            saved = loaded["record"]
            arrays = {name: array.numpy() for name, array in saved["arrays"].items()}
            record = RunRecord.from_state_dict(saved | {"arrays": arrays})
            costs = {name: float(loaded["costs"][name]) for name in self._costs}
            self.meter.load_state_dict(loaded["meter"])
        except Exception as error:  # no file, a damaged one, one of other parameters
            self.record.run["since_step"] = step
            said = f"SpeedLimitCallback starts anew at step {step}: no measurement to go on with in {checkpoint}"
            warn(f"{said} ({told(error)})", stacklevel=4)
            return
        record.run.update(self.record.run)
        self.record, self._costs, self._steps = record, costs, self.meter.steps

    def close(self) -> None:
        self.meter.close()
        if self._keeper is not None:
            self._keeper.release()


def _why_unmeasured(trainer: Any) -> str | None:
    if trainer.is_deepspeed_enabled:
        return "DeepSpeed keeps gradients and weights in its engine, which it does not support"
    optimizer = unwrapped(trainer.optimizer)
    why = why_unhooked(optimizer)
    return None if why is None else f"{type(optimizer).__name__} {why}: {cure_of(optimizer)}"


def _checkpoint(args: Any, state: Any) -> Path:
    """Of the step that the Trainer is at, with which a resumed run begins."""
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _loss_scale(optimizer: Any) -> Tensor | None:
    """What a loss scaler has multiplied the gradients by. `GradScaler.get_scale()` would wait for the device."""
    scale = getattr(getattr(optimizer, "scaler", None), "_scale", None)
    return scale if isinstance(scale, Tensor) else None


def _description(trainer: Any, loader: Any) -> dict[str, Any]:
    args = trainer.args
    data = loaders.described(loaders.Epoch(loader, look(len, math.nan, loader), args.world_size))
    if data["batch_size"] is None:
        data["batch_size"] = args.train_batch_size
    return {
        "model": look(lambda: type(trainer.accelerator.unwrap_model(trainer.model)).__name__, None),
        **data,
        "accumulate_grad_batches": args.gradient_accumulation_steps,
        "world_size": args.world_size,
        "gradient_clip_val": args.max_grad_norm,
        "precision": "bf16-mixed" if args.bf16 else "16-mixed" if args.fp16 else "32-true",
        "lr_schedules": [str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))],
        "versions": {"torch": str(torch.__version__), "transformers": __version__},
    }
