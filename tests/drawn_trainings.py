"""Trainings drawn at random, each from its number: model, optimizer, precision, callbacks, rhythm, what is measured.

`draw(7)` is the same training wherever it is drawn. What Lightning itself refuses is drawn again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torchmetrics
from pytorch_lightning import callbacks
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.loggers.logger import Logger
from torch import Tensor, nn

SAMPLES = 24
EPOCHS = 3

OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True, weight_decay=0.01),
    "AdamW": lambda p, lr: torch.optim.AdamW(p, lr=lr),
    "fused AdamW": lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True),
    "RMSprop": lambda p, lr: torch.optim.RMSprop(p, lr=lr, momentum=0.5),
    "LBFGS": lambda p, lr: torch.optim.LBFGS(p, lr=lr, max_iter=3),
}
SCHEDULES: dict[str, Any] = {
    "none": None,
    "each step": lambda o: {"scheduler": torch.optim.lr_scheduler.ExponentialLR(o, 0.95), "interval": "step"},
    "each epoch": lambda o: {"scheduler": torch.optim.lr_scheduler.StepLR(o, 1, 0.5), "interval": "epoch"},
    "on plateaus": lambda o: {
        "scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
        "monitor": "train_loss",
    },
}
CLIPPING: dict[str, dict[str, Any]] = {
    "none": {},
    "norm": {"gradient_clip_val": 0.3},
    "value": {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
}
VALIDATION: dict[str, dict[str, Any]] = {
    "none": {"limit_val_batches": 0},
    "each epoch": {"num_sanity_val_steps": 1},
    "every second epoch": {"check_val_every_n_epoch": 2},
    "twice an epoch": {"val_check_interval": 0.5},
    "every two batches": {"val_check_interval": 2, "num_sanity_val_steps": 0},
    "every four batches, of any epoch": {"val_check_interval": 4, "check_val_every_n_epoch": None},
}
COMPILED = (*["none"] * 6, "module, eager", *["body, eager"] * 2, *["body, aot_eager"] * 2)
MODELS = ("perceptron", "convolution", "noisy", "two optimizers")
ENDINGS = ("whole", "whole", "resumed at an epoch's end", "resumed within an epoch", "raised")
STEPS_UNTIL = {"resumed at an epoch's end": 1.0, "resumed within an epoch": 1.5}  # epochs before the resumption


class Kept(Logger):
    """Keeps what is logged."""

    name, version = "kept", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """There are none."""


LOGGERS: dict[str, Callable[[Path], Any]] = {
    "none": lambda _: False,
    "kept": lambda _: Kept(),
    "CSV": lambda folder: CSVLogger(folder),
    "TensorBoard": lambda folder: TensorBoardLogger(folder),
}


class Unfreezing(callbacks.BaseFinetuning):
    """The body joins the optimizer in the second epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)


def _kept(folder: Path) -> Any:
    return callbacks.ModelCheckpoint(folder / "best", monitor="train_loss", save_top_k=2, save_last=True)


def _kept_often(folder: Path) -> Any:
    return callbacks.ModelCheckpoint(folder / "often", every_n_train_steps=3, save_top_k=-1)


CALLBACKS: dict[str, Any] = {
    "SWA": lambda _: callbacks.StochasticWeightAveraging(0.01, swa_epoch_start=1, annealing_epochs=1),
    "EMA": lambda _: callbacks.EMAWeightAveraging(decay=0.9),
    "averages of epochs": lambda _: callbacks.WeightAveraging(avg_fn=_mean),
    "pruning": lambda _: callbacks.ModelPruning("l1_unstructured", amount=0.3),
    "unfreezing": lambda _: Unfreezing(),
    "BackboneFinetuning": lambda _: callbacks.BackboneFinetuning(1, lambda epoch: 1.5, 0.01, verbose=False),
    "LearningRateFinder": lambda _: callbacks.LearningRateFinder(1e-4, 0.1, num_training_steps=14),
    "BatchSizeFinder": lambda _: callbacks.BatchSizeFinder("power", steps_per_trial=1, init_val=2, max_trials=2),
    "EarlyStopping": lambda _: callbacks.EarlyStopping("train_loss", min_delta=0.3, patience=1),
    "ModelCheckpoint": _kept,
    "ModelCheckpoint in epochs": _kept_often,
    "GradientAccumulationScheduler": lambda _: callbacks.GradientAccumulationScheduler({0: 1, 1: 2}),
    "LearningRateMonitor": lambda _: callbacks.LearningRateMonitor("step"),
}
# At most one of each line.
GROUPS = (
    ("SWA", "EMA", "averages of epochs", "pruning", "unfreezing", "BackboneFinetuning"),
    ("LearningRateFinder", "BatchSizeFinder"),
    ("EarlyStopping", "GradientAccumulationScheduler"),
    ("ModelCheckpoint", "ModelCheckpoint in epochs"),
    ("LearningRateMonitor",),
)
FINETUNING = {"unfreezing", "BackboneFinetuning"}


def _mean(averaged: Tensor, new: Tensor, number: Any) -> Tensor:
    return averaged + (new - averaged) / (number + 1)


@dataclass(frozen=True)
class Training:
    number: int
    model: str
    optimizers: tuple[str, ...]
    schedule: str
    precision: str
    accumulated: int
    clipping: str
    callbacks: tuple[str, ...]
    validation: str
    compiled: str
    logger: str
    log_every: int
    ending: str
    place: str  # of the callback under test, among the others
    measured: dict[str, Any] = field(default_factory=dict)

    def refused(self) -> bool:
        """By Lightning or torch, with or without SpeedLimit; and what torch traces for ten seconds."""
        chosen, manual = set(self.callbacks), self.model == "two optimizers"
        several_rates = {"SWA", "LearningRateFinder", "GradientAccumulationScheduler"} | FINETUNING
        return any(
            (
                manual and (chosen & several_rates or "LBFGS" in self.optimizers or self.accumulated > 1),
                manual and self.measured["probe_batches"],
                manual and self.compiled.startswith("module"),
                "LBFGS" in self.optimizers and chosen & FINETUNING,
                "LBFGS" in self.optimizers and self.accumulated > 1,
                "GradientAccumulationScheduler" in chosen and self.accumulated > 1,
                "LearningRateMonitor" in chosen and self.logger == "none",
                self.schedule != "none" and manual,  # is stepped by hand there
                self.schedule == "on plateaus" and "SWA" in chosen,
                self.clipping == "value" and "SWA" in chosen,  # its last epoch has no gradients
                self.precision in ("bf16-true", "64-true") and "pruning" in chosen,  # its masks are float32
            )
        )

    @property
    def stops_in_finder(self) -> bool:
        """The exception comes before the training itself begins."""
        return self.ending == "raised" and "LearningRateFinder" in self.callbacks

    def features(self) -> dict[str, Iterable[str]]:
        """name → what of it this training has."""
        plain = {"validation": self.validation, "model": self.model, "schedule": self.schedule, "logger": self.logger}
        plain |= {"precision": self.precision, "clipping": self.clipping, "compiled": self.compiled}
        plain |= {"ending": self.ending, "accumulated": str(self.accumulated), "place": self.place}
        measured = [f"{name}={value}" for name, value in self.measured.items()]
        return {"optimizer": set(self.optimizers), "callbacks": self.callbacks or ("none",), "SpeedLimit": measured} | {
            name: (value,) for name, value in plain.items()
        }


def draw(number: int) -> Training:
    chance = random.Random(number)
    model = chance.choice(MODELS)  # once: most of what else may be drawn is refused with two optimizers
    while True:
        found = _draw(number, model, chance)
        if not found.refused():
            return found


def _draw(number: int, model: str, chance: random.Random) -> Training:
    several = 2 if model == "two optimizers" else 1
    return Training(
        number=number,
        model=model,
        optimizers=tuple(chance.choice(list(OPTIMIZERS)) for _ in range(several)),
        schedule=chance.choice(list(SCHEDULES)),
        precision=chance.choice(["32-true", "32-true", "bf16-mixed", "64-true", "bf16-true"]),
        accumulated=chance.choice([1, 1, 2, 4]),
        clipping=chance.choice(list(CLIPPING)),
        callbacks=tuple(chance.choice(group) for group in GROUPS if chance.random() < 0.5),
        validation=chance.choice(list(VALIDATION)),
        compiled=chance.choice(COMPILED),
        logger=chance.choice(list(LOGGERS)),
        log_every=chance.choice([1, 3, 50]),
        ending=chance.choice(ENDINGS),
        place=chance.choice(["first", "last"]),
        measured={
            "clock": chance.choice(["steps", "lr"]),
            "entropy_production": chance.choice(["loss_drop", "stratonovich", "action"]),
            "monitor": chance.choice([None, None, "train_loss"]),
            "loss_window": chance.choice([2, 50]),
            "probe_batches": chance.choice([0, 1, 3]),
            "measure_every_n_steps": chance.choice([1, 1, 4]),
            "clouds": chance.choice([None, "neurons"]),
            "per_layer": chance.choice([False, True]),
            "coordinates": chance.choice(["all", 2**20, 16]),
            "log_figures": chance.choice([False, True]),
            "print_summary": chance.choice([False, True]),
        },
    )


class Stopped(Exception):
    """Raised within a training, on purpose."""


class Drawn(pl.LightningModule):
    """8 → 6 → 1 with BatchNorm and dropout; what it logs, losses and metrics are kept."""

    def __init__(self, training: Training, raises_at: int = -1) -> None:
        super().__init__()
        self.training_drawn, self.raises_at = training, raises_at
        self.lr, self.batch_size = 0.05 if "SGD" in training.optimizers else 0.01, 4
        body = nn.Conv1d(2, 6, 4) if training.model == "convolution" else nn.Linear(8, 6)
        self.backbone = nn.Sequential(body, nn.Flatten(), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2))
        self.head = nn.Linear(6, 1)
        self.error = torchmetrics.MeanSquaredError()
        self.register_buffer("mean", torch.zeros(()))
        self.seen: list[Tensor] = []
        self.gradients: list[list[Tensor | None]] = []  # after each batch
        self.automatic_optimization = training.model != "two optimizers"
        if training.compiled.startswith("body"):
            self.backbone.compile(backend=training.compiled.split(", ")[1])

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.head(self.backbone(x)), y)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if len(self.seen) == self.raises_at:
            raise Stopped

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.gradients.append([None if p.grad is None else p.grad.clone() for p in self.parameters()])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = self.loss(batch)
        if self.training_drawn.model == "noisy":
            with torch.no_grad():
                self.mean.lerp_(loss.to(self.mean.dtype), 0.1)
            drawn = torch.rand((), dtype=loss.dtype) + np.random.rand() + random.random()  # noqa: NPY002
            loss = loss * (1 + 0.1 * drawn) + 0.01 * self.mean
        self.tell(loss)
        if self.automatic_optimization:
            return loss
        return self.steps_by_hand(batch, loss, batch_idx)

    @torch.compiler.disable  # type: ignore[untyped-decorator] # Lightning's `log` can't be traced
    def tell(self, loss: Tensor) -> None:
        self.seen.append(loss.detach().clone())
        self.error.update(loss.detach().float().reshape(1), torch.zeros(1))
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("error", self.error, on_epoch=True)

    def steps_by_hand(self, batch: Any, loss: Tensor, batch_idx: int) -> None:
        """Two optimizers take turns, one of them with the others' parameters switched off."""
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            if self.training_drawn.clipping != "none":
                self.clip_gradients(optimizer, **CLIPPING[self.training_drawn.clipping])
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        makes = [OPTIMIZERS[name] for name in self.training_drawn.optimizers]
        if len(makes) == 2:
            parts = (self.backbone, self.head)
            return [make(list(part.parameters()), self.lr) for make, part in zip(makes, parts, strict=True)]
        optimizer = makes[0]([p for p in self.parameters() if p.requires_grad], self.lr)
        schedule = SCHEDULES[self.training_drawn.schedule]
        return optimizer if schedule is None else {"optimizer": optimizer, "lr_scheduler": schedule(optimizer)}

    def data(self, size: int, seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        dtype = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(
            self.training_drawn.precision, torch.float32
        )
        x = torch.randn(size, 8, generator=generator)
        y = x[:, :1] - 2 * x[:, 1:2] + 0.3 * torch.randn(size, 1, generator=generator)
        x = x.reshape(size, 2, 4) if self.training_drawn.model == "convolution" else x
        return torch.utils.data.TensorDataset(x.to(dtype), y.to(dtype))

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.data(SAMPLES, 1), self.batch_size, shuffle=True)

    def val_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.data(8, 2), 4)
