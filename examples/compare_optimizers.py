"""Which optimizer wastes what: one MLP and one small CNN on real images, several optimizers, the same loss.

    pip install -e ".[report,test]"
    python examples/compare_optimizers.py            # about a minute on two cores
    python examples/compare_optimizers.py --help

The images are the 1,797 handwritten digits that scikit-learn ships. Every run starts from the same weights,
sees the same batches and ends when the loss on all images reaches the same target. The LightningModules below
know nothing of the measurement: it is one line in `train`, and `--bare` leaves that line out. What is said in the end
is `compare`'s, for each model, at the lowest loss that all its runs clearly reached.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_speedlimit import Comparison, SpeedLimit, compare
from lightning_speedlimit.report.page import write_page

BATCH_SIZE = 128
LOG_EVERY = 5  # steps

LEARNING_RATES = {
    "sgd": {"mlp": 0.1, "cnn": 0.1},
    "momentum": {"mlp": 0.05, "cnn": 0.05},
    "rmsprop": {"mlp": 1e-3, "cnn": 1e-3},
    "adamw": {"mlp": 1e-3, "cnn": 3e-3},
    "muon": {"mlp": 0.02},  # of its AdamW: that of "adamw"
}
TITLES = {
    "sgd": "SGD",
    "momentum": "SGD+momentum",
    "rmsprop": "RMSprop",
    "adamw": "AdamW",
    "muon": "Muon+AdamW",
}
MakeOptimizer = Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr),
    "momentum": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
    "rmsprop": lambda parameters, lr: torch.optim.RMSprop(parameters, lr=lr),
    "adamw": lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr),
}


# --- what is trained


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def cnn() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 2 * 2, 10)),
    )


MODELS = {"mlp": mlp, "cnn": cnn}


class Classifier(pl.LightningModule):
    """A LightningModule like any other."""

    def __init__(self, network: nn.Sequential, make_optimizer: MakeOptimizer, lr: float) -> None:
        super().__init__()
        self.network, self.make_optimizer, self.lr = network, make_optimizer, lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self.network(images), labels)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters(), self.lr)


class MuonClassifier(Classifier):
    """Muon for the matrices that feed hidden neurons, AdamW for the rest: two optimizers, stepped by hand."""

    def __init__(self, network: nn.Sequential, muon_lr: float, adamw_lr: float) -> None:
        super().__init__(network, OPTIMIZERS["adamw"], adamw_lr)
        self.muon_lr = muon_lr
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        return loss.detach()

    def configure_optimizers(self) -> Any:
        hidden = [p for p in self.network[:-1].parameters() if p.ndim == 2]
        rest = [p for p in self.parameters() if all(p is not h for h in hidden)]
        return [torch.optim.Muon(hidden, lr=self.muon_lr), self.make_optimizer(rest, self.lr)]


# --- how it is trained


@dataclass(frozen=True)
class Job:
    """A run to be done."""

    model: str
    optimizer: str

    @property
    def lr(self) -> float:
        return LEARNING_RATES[self.optimizer][self.model]

    @property
    def title(self) -> str:
        return f"{TITLES[self.optimizer]} lr {self.lr:g}"

    @property
    def full_title(self) -> str:
        return f"{self.model.upper()} {self.title}"

    def module(self) -> pl.LightningModule:
        network = MODELS[self.model]()
        if self.optimizer == "muon":
            return MuonClassifier(network, self.lr, LEARNING_RATES["adamw"][self.model])
        return Classifier(network, OPTIMIZERS[self.optimizer], self.lr)


class StopAtLoss(pl.Callback):
    """Ends the fit when the loss on all images reaches the target, or after max_steps.

    Looking at the loss draws no random number and leaves no gradient: the training does not notice. The steps
    are counted here, since `Trainer(max_steps=…)` counts a step of two optimizers twice.
    """

    def __init__(self, images: Tensor, labels: Tensor, target: float, max_steps: int) -> None:
        self.images, self.labels, self.target, self.max_steps = images, labels, target, max_steps
        self.steps, self.loss = 0, math.nan

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        pl_module.eval()
        with torch.no_grad():
            loss = cross_entropy(pl_module.network(self.images), self.labels)
        pl_module.train()
        pl_module.log("loss_on_all_images", loss)
        self.steps, self.loss = self.steps + 1, loss.item()
        if self.loss <= self.target or self.steps >= self.max_steps:
            trainer.should_stop = True


class ProgressLine(pl.Callback):
    """One line per run, rewritten in place where standard output is a terminal."""

    def __init__(self, title: str, stop: StopAtLoss) -> None:
        self.title, self.stop = title, stop

    def show(self, trainer: pl.Trainer, end: str) -> None:
        line = f"  {self.title:<24} step {self.stop.steps:>5}   loss {self.stop.loss:7.4f}"
        efficiency = trainer.callback_metrics.get("speed_limit/efficiency")
        if efficiency is not None:
            line += f"   efficiency {efficiency:5.2f}"
        print(f"\r{line}" if sys.stdout.isatty() else line, end=end, flush=True)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if sys.stdout.isatty() and self.stop.steps % LOG_EVERY == 0:
            self.show(trainer, end="")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.show(trainer, end="\n")


def train(job: Job, data: tuple[Tensor, Tensor], options: argparse.Namespace) -> None:
    pl.seed_everything(options.seed, verbose=False)
    module = job.module()
    order = torch.Generator().manual_seed(options.seed)
    batches = DataLoader(TensorDataset(*data), BATCH_SIZE, shuffle=True, drop_last=True, generator=order)
    stop = StopAtLoss(*data, options.target, options.steps)
    callbacks: list[pl.Callback] = [stop]
    if not options.bare:
        callbacks.append(SpeedLimit(print_summary=False, log_figures=False))  # the one line: all else is shared
    callbacks.append(ProgressLine(job.full_title, stop))
    trainer = pl.Trainer(
        callbacks=callbacks,
        logger=loggers(options.output / job.model, job.optimizer + ("-bare" if options.bare else "")),
        log_every_n_steps=LOG_EVERY,
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, batches)


def loggers(folder: Path, name: str) -> list[Any]:
    """CSV and TensorBoard side by side; an earlier demo's curves are not drawn under the new ones."""
    for old in (folder / name).glob("events.out.tfevents.*"):
        old.unlink()
    return [CSVLogger(folder, name, version=""), TensorBoardLogger(folder, name, version="")]


# --- what is told


def main() -> None:
    started = time.monotonic()
    options = parse_arguments()
    quieten_lightning()
    torch.set_num_threads(1)  # the fastest for tensors this small; and the same sums on every machine
    digits = load_digits()
    data = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)
    jobs = [Job(m, o) for m in options.models for o in options.optimizers if m in LEARNING_RATES[o]]
    if not hasattr(torch.optim, "Muon") and any(job.optimizer == "muon" for job in jobs):
        print(f"Muon is left out: it came with torch 2.9, and this is torch {torch.__version__}.")
        jobs = [job for job in jobs if job.optimizer != "muon"]
    if not jobs:
        return
    count = len(digits.images)
    print(f"{len(jobs)} training runs on {count:,} images of handwritten digits, {BATCH_SIZE} a batch.")
    print(f"Each ends when the loss on all images is {options.target:g}, or after {options.steps:,} steps.")
    print("All runs of a model start from the same weights and see the same batches.\n")
    for job in jobs:
        train(job, data, options)
    print(f"\nThis took {time.monotonic() - started:.0f} s.")
    if options.bare:
        print(f"Nothing was measured; the losses in {options.output} are those of the measured runs.")
        return
    comparisons = [compare_runs(model, jobs, options.output) for model in dict.fromkeys(j.model for j in jobs)]
    page = options.output / "report.html"
    write_page(page, comparisons, command=shlex.join(["python", *sys.argv]))
    print(f"""
How to go on
  the page with figures   {page.resolve().as_uri()}
  one run                 {command("speedlimit")} show {options.output / jobs[-1].model / jobs[-1].optimizer}
  curves                  {command("tensorboard")} --logdir {options.output}
  numbers                 {options.output}/<model>/<optimizer>/metrics.csv""")


def command(name: str) -> str:
    """As it can be typed here: by its path where the environment is not activated."""
    path = Path(sys.executable).with_name(name)
    return name if shutil.which(name) or not path.exists() else os.path.relpath(path)


def compare_runs(model: str, jobs: list[Job], output: Path) -> Comparison:
    """Prints the comparison of a model's runs."""
    comparison = compare({job.title: output / model / job.optimizer for job in jobs if job.model == model})
    print(f"\n{model.upper()}\n\n{comparison}")
    return comparison


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains two small models to the same loss and tells what each optimizer wasted.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("demo_runs"), metavar="DIR", help="logs and records")
    parser.add_argument("--target", type=float, default=0.1, metavar="LOSS", help="loss at which a run ends")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--optimizers", nargs="+", choices=LEARNING_RATES, default=list(LEARNING_RATES))
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the images")
    parser.add_argument("--steps", type=int, default=3000, metavar="MAX", help="a run ends here at the latest")
    parser.add_argument("--quick", action="store_true", help="at most 40 steps, to see that everything works")
    parser.add_argument("--bare", action="store_true", help="without SpeedLimit: the losses are the same")
    options = parser.parse_args()
    if not any(model in LEARNING_RATES[name] for model in options.models for name in options.optimizers):
        parser.error("Muon is for the hidden matrices of an MLP, got --models cnn alone; add mlp")
    if options.quick:
        options.steps = min(options.steps, 40)
    return options


def quieten_lightning() -> None:
    """No tips, no devices that were not found, no advice for larger data sets."""
    for name in ("pytorch_lightning", "lightning.pytorch"):  # the package under its two names
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*exists and is not empty.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")


if __name__ == "__main__":
    main()
