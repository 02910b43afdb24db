"""Two trainings of a real size with SpeedLimit attached by its one line, as long as a processor allows, in pieces.

    python examples/findings/real_size.py --data FOLDER --output docs/findings    # all; an hour of two cores
    … --run transformer --minutes 45          # one of them, for so many minutes of the processor; again: it goes on
    … --run resnet --steps 390 --batch 512    # shortened, or with another batch
    … --run transformer --size gpt2 --device cuda      # 124 M parameters, for a GPU
    … --shown                                 # nothing is run: JSON, figure and tables of what has been
    … --quick                                 # small and made up; seconds

transformer   a GPT of 10.8 M parameters, on bytes of Python's library (29 MB to learn from): 800 steps of 8 windows of
              256 bytes, AdamW 1e-3 with decay 0.1 of matrices, warm-up of 5 %, a cosine to a tenth, clipped at norm 1,
              matrix products in bfloat16
resnet        1.2 M parameters, on all 50,000 images of CIFAR-10, shifted and mirrored: 10 epochs of 390 batches of 128,
              SGD 0.1 with Nesterov's momentum 0.9, decay 5e-4, warm-up of 10 %, a cosine to 0, float32

What is over is in a checkpoint, and the record goes on with it, mid-epoch too. Sizes were set from one pilot of the
time per step, and lowered once, when two minutes of the runs had shown how little of two shared cores is to be had.

Stated before the runs, of each:

    bounds       efficiency_action and kinematic_efficiency are at most 1 in every row
    noise        the critical batch size grows: over the last third of the steps it is at least twice that of the first
    regimes      `regimes` finds, as the paper in its images, a first one of less than a tenth of the steps that is less
                 efficient than the next
    cost         the measurement takes at most a tenth more processor time per step
    early word   the causes that `diagnose` names at a tenth of the steps are those that it names at the end

An advice that both runs got at a tenth, a batch × 4 at the same rate for fewer steps, is followed on the ResNet, from
the start again, with a schedule of 390 steps: to the validation loss at which batch 128 ends.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lab

sys.path.append(str(Path(__file__).resolve().parents[1]))

import pytorch_lightning as pl
import real_size_models as models
import torch
from char_transformer import quieten_lightning
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from real_size_reading import LOOKED_AT, Reading
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_speedlimit import SpeedLimit

# Batch, steps, highest rate, steps between two rows of the record.
SETTINGS = {"tiny": (8, 40, 1e-2, 2), "10M": (8, 800, 1e-3, 10), "gpt2": (16, 10_000, 6e-4, 50)}
RESNETS = {True: ((4, 8, 8, 8), 50, 30, 3), False: ((32, 64, 128, 256), 128, 3900, 39)}  # quick → widths, batch, …
FOLLOWED = {True: 12, False: 390}  # quick → steps of the ResNet with its own batch, and with 4 times that


@dataclass(frozen=True)
class Plan:
    """A training. shown: validation samples during the run; at its end there are `at_the_end`."""

    name: str
    module: Callable[[], pl.LightningModule]
    data: Callable[[], tuple[Dataset[Any], Dataset[Any]]]
    batch: int
    steps: int
    log_every: int
    validate_every: int
    shown: int
    at_the_end: int
    precision: Any = "32-true"
    clip: float | None = None


def transformer(options: lab.Options) -> Plan:
    size = "tiny" if options.quick else options.more.size
    batch, steps, rate, log_every = SETTINGS[size]
    batch, steps = options.more.batch or batch, options.more.steps or steps
    context = models.SIZES[size].context

    def data() -> tuple[Dataset[Any], Dataset[Any]]:
        learnt, held = models.library(20 if options.quick else None)
        return models.Windows(learnt, context), models.Windows(held, context)

    def module() -> pl.LightningModule:
        return models.Bytes(size, rate, steps)

    name = "gpt2" if size == "gpt2" else "transformer"
    return Plan(name, module, data, batch, steps, log_every, steps // 10, 64, 512, "bf16-mixed", 1.0)


def resnet(options: lab.Options) -> Plan:
    widths, size, length, log_every = RESNETS[options.quick]
    steps, batch = options.more.steps or length, options.more.batch or size

    def module() -> pl.LightningModule:
        pictures = models.Pictures(widths, 0.1, steps, options.more.seed)
        return pictures.to(memory_format=torch.channels_last)  # a fifth faster on a processor

    def data() -> tuple[Dataset[Any], Dataset[Any]]:
        return models.images(options.data)

    return Plan("resnet", module, data, batch, steps, log_every, steps // 10, 2000, 10_000)


PLANS = {"transformer": transformer, "resnet": resnet}


class Piece(pl.Callback):
    """Ends the fit after so many processor seconds with a checkpoint; keeps the record at some shares of the run.

    Its state goes with the checkpoint: processor seconds of all pieces, the steps that pieces ended at, validations.
    """

    def __init__(self, plan: Plan, measurement: SpeedLimit, folder: Path, seconds: float) -> None:
        self.plan, self.measurement, self.folder, self.seconds = plan, measurement, folder, seconds
        self.before, self.began = 0.0, time.process_time()
        self.ended: list[int] = []
        self.validations: list[dict[str, float]] = []

    @property
    def spent(self) -> float:
        """Processor seconds of this piece."""
        return time.process_time() - self.began

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.before + self.spent, "ended": [*self.ended], "validations": [*self.validations]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.before, self.ended, self.validations = state["seconds"], state["ended"], state["validations"]

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
        step, record = trainer.global_step, self.measurement.record
        for name, share in LOOKED_AT.items():
            if step == round(share * self.plan.steps) and record is not None:
                record.save(self.folder / f"at {name}")
        if self.spent >= self.seconds and step < self.plan.steps:
            self.ended.append(step)
            trainer.save_checkpoint(self.folder / "last.ckpt")
            trainer.should_stop = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val_")}
        self.validations.append({"step": float(trainer.global_step), **found})


def trainer_of(plan: Plan, options: lab.Options, callbacks: list[pl.Callback], folder: Path, steps: int) -> pl.Trainer:
    return pl.Trainer(
        callbacks=callbacks,
        logger=CSVLogger(folder, "", ""),
        log_every_n_steps=plan.log_every,
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=plan.validate_every,
        check_val_every_n_epoch=None,
        precision=plan.precision,
        gradient_clip_val=plan.clip,
        accelerator="gpu" if options.more.device == "cuda" else "cpu",
        devices=1,
        num_sanity_val_steps=0,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def train(plan: Plan, options: lab.Options, folder: Path) -> bool:
    """One piece of it, and what it came to at its end; whether it is over."""
    last, ended = folder / "last.ckpt", folder / "ended.json"
    if ended.exists():
        return True
    pl.seed_everything(options.more.seed, verbose=False)
    learnt, held = plan.data()
    measurement = SpeedLimit(log_figures=False, print_summary=False)  # the one line; what it found is shown at the end
    piece = Piece(plan, measurement, folder, 60 * options.more.minutes)
    kept = ModelCheckpoint(folder, "last", every_n_train_steps=10 * plan.log_every, enable_version_counter=False)
    trainer = trainer_of(plan, options, [measurement, piece, kept], folder, plan.steps)
    loader = models.ResumableLoader(learnt, plan.batch, options.more.seed)
    module = plan.module()
    trainer.fit(module, loader, spread(held, plan.shown), ckpt_path=last if last.exists() else None)
    if trainer.global_step < plan.steps:
        return False
    trainer.save_checkpoint(last)
    said = {"run": plan.name, "steps": plan.steps, "batch": plan.batch, "seed": options.more.seed, **piece.state_dict()}
    (found,) = trainer.validate(module, spread(held, plan.at_the_end), verbose=False)
    ended.write_text(json.dumps(said | {"end": found}), "utf-8")
    return True


def spread(samples: Dataset[Any], count: int) -> DataLoader[Any]:
    """So many of the samples, in equal distances."""
    have = len(samples)  # type: ignore[arg-type]
    places = torch.linspace(0, have - 1, min(count, have)).long().tolist()
    return DataLoader(Subset(samples, places), batch_size=min(250, max(8, count // 8)))


# --- what it costs


class Stopwatch(pl.Callback):
    """Processor time of the steps between two."""

    def __init__(self, first: int, last: int) -> None:
        self.marks = dict.fromkeys((first, last), 0.0)

    def on_train_batch_start(self, trainer: pl.Trainer, *rest: Any) -> None:
        if trainer.global_step in self.marks:
            self.marks[trainer.global_step] = time.process_time()

    @property
    def seconds_per_step(self) -> float:
        (first, begun), (last, over) = self.marks.items()
        return (over - begun) / (last - first)


def cost(plan: Plan, options: lab.Options, folder: Path, key: dict[str, Any]) -> dict[str, float]:
    """Of one pair of trainings from the same start: s per step over one log interval, after the first 5 steps."""
    found, (learnt, held) = {}, plan.data()
    for name in ("bare", "measured"):
        pl.seed_everything(key["pair"], verbose=False)
        watch = Stopwatch(5, 5 + plan.log_every)
        callbacks = [watch, *([SpeedLimit(log_figures=False, print_summary=False)] if name == "measured" else [])]
        trainer = trainer_of(
            replace(plan, validate_every=10_000), options, callbacks, folder / "cost", 6 + plan.log_every
        )
        trainer.fit(plan.module(), models.ResumableLoader(learnt, plan.batch, key["pair"]), spread(held, 8))
        found[name] = watch.seconds_per_step
    return found | {"ratio": found["measured"] / found["bare"]}


# --- all of it


def run(options: lab.Options, made: lab.Lab, folder: Path) -> None:
    """What the file of results does not have yet."""

    def over(plan: Plan) -> bool:
        known = made.results.find("runs", {"run": plan.name}) is not None
        return known or train(plan, options, folder / plan.name)

    plans = {name: make(options) for name, make in PLANS.items() if options.more.run in (None, name)}
    for name, plan in plans.items():
        if not over(plan):
            print(f"{name} is not over: the same command goes on with it")
    if options.more.run is not None:
        return
    for name, plan in plans.items():
        keys = [{"run": name, "pair": pair} for pair in range(1 if options.quick else 4)]
        made.rows("cost", keys, lambda key, plan=plan: cost(plan, options, folder, dict(key)))
    for multiple in (1, 4):
        plan = resnet(with_schedule(options, FOLLOWED[options.quick]))
        over(replace(plan, name=f"resnet × {multiple}", batch=multiple * plan.batch))


def with_schedule(options: lab.Options, steps: int) -> lab.Options:
    return replace(options, more=argparse.Namespace(**{**vars(options.more), "steps": steps, "batch": None}))


def main() -> None:
    quieten_lightning()
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", choices=PLANS, help="default: both, what they cost, and an advice followed")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of the processor, for this piece")
    parser.add_argument("--steps", type=int, help="that the schedule spans")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--size", choices=[name for name in models.SIZES if name != "tiny"], default="10M")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--folder", type=Path, default=Path("findings_runs/real_size"), help="of checkpoints and records"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shown", action="store_true", help="nothing is run")
    options = lab.begin(__doc__, parser)
    folder = options.output / "real_size" if options.quick else options.more.folder
    made = lab.Lab("real_size", options)
    if not options.more.shown:
        run(options, made, folder)
    reading = Reading(made)
    reading.collect(folder)
    if options.more.run is None:
        reading.show()


if __name__ == "__main__":
    main()
