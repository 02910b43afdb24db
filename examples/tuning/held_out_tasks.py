"""The tasks of held_out.py, trained as people do: epochs, augmentation, BatchNorm, schedules, clipping; and one run.

    python fetch.py mnist|cifar10  →  FOLDER/mnist/train-images-idx3-ubyte, …; FOLDER/cifar10/data_batch_1.bin, …

The text is Python's own library, as installed; other modules than in tasks.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from tasks import EVALUATED, Letters, Task, blobs, mnist, windows
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from training import LOOKS, Course

from lightning_speedlimit import RunRecord, TrajectoryMeter

LOOKED, ROWS = 40, 48  # times in a run: at the evaluation set, and rows of the record
SIDE, BORDER = 32, 4  # pixels: of a picture, and by how many a crop is shifted at most
WARM_UP = 0.05  # of the schedule
LEARNT = ("subprocess", "threading", "tempfile", "socket", "pickle", "pydoc", "turtle", "logging/__init__")
HELD_OUT = ("configparser", "csv", "heapq", "locale", "gettext")


def as_they_are(inputs: Tensor, draw: torch.Generator) -> Tensor:
    return inputs


@dataclass(frozen=True)
class Problem:
    """A task, and how it is trained.

    rate: where the search for the best one begins, at batch 64. make: of parameters and a rate. schedule: (step from 0,
    steps in all) → share of that rate. shown: inputs as training sees them. clip: the longest gradient; None: any.
    """

    task: Task
    optimizer: str
    rate: float
    make: Callable[[Any, float], torch.optim.Optimizer]
    schedule: Callable[[int, int], float]
    shown: Callable[[Tensor, torch.Generator], Tensor] = as_they_are
    clip: float | None = None


@dataclass(frozen=True)
class Trial:
    """One run. steps: that its schedule spans. level: the loss at which it ends; None: it ends with its schedule."""

    task: str
    optimizer: str
    batch: int
    rate: float
    seed: int
    steps: int
    level: float | None = None


# --- how they are trained


def constant(step: int, steps: int) -> float:
    return 1.0


def cosine(step: int, steps: int) -> float:
    return 0.5 + 0.5 * math.cos(math.pi * step / steps)


def warmed_up(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / (WARM_UP * steps))


def momentum(parameters: Any, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=5e-4)


def adamw(parameters: Any, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, rate)


def cropped_and_flipped(images: Tensor, draw: torch.Generator) -> Tensor:
    """Shifted by up to four pixels and mirrored, each by itself; (N, 3, 32, 32) uint8 → float32."""
    corners = torch.randint(2 * BORDER + 1, (2, len(images), 1), generator=draw) + torch.arange(SIDE)
    mirrored = torch.randint(2, (len(images), 1), generator=draw).bool()
    rows, columns = corners[0], torch.where(mirrored, corners[1].flip(1), corners[1])
    each = torch.arange(len(images))[:, None, None]
    shifted = pad(images, (BORDER,) * 4)[each, :, rows[:, :, None], columns[:, None, :]]
    return scaled(shifted.permute(0, 3, 1, 2).contiguous())


def scaled(images: Tensor) -> Tensor:
    """Brightness 0 to 255 → about unit variance about 0."""
    return (images.float() / 255 - 0.5) * 4


# --- tasks


def digits(folder: Path | None) -> Iterator[Problem]:
    """MNIST: an MLP 784-100-100-10 at a constant rate."""

    def model() -> nn.Module:
        layers = (nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
        return nn.Sequential(*layers)

    task = replace(mnist(folder), model=model)
    yield Problem(task, "momentum", 0.02, momentum, constant)
    yield Problem(task, "AdamW", 1e-3, adamw, constant)


def objects(folder: Path | None) -> Iterator[Problem]:
    """CIFAR-10: three convolutions with BatchNorm, random crops and flips, a cosine to 0."""

    def convolution(before: int, after: int, stride: int) -> tuple[nn.Module, ...]:
        return nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()

    def model() -> nn.Module:
        convolutions = (*convolution(3, 12, 2), *convolution(12, 24, 2), *convolution(24, 24, 1))
        return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))

    parts = [read_cifar(folder, f"data_batch_{part}") for part in range(1, 6)]
    inputs, targets = (torch.cat([part[which] for part in parts]) for which in (0, 1))
    held, held_targets = (found[:EVALUATED] for found in read_cifar(folder, "test_batch"))
    task = Task("CIFAR-10, CNN", inputs, targets, scaled(held), held_targets, model, {})
    yield Problem(task, "momentum", 0.05, momentum, cosine, cropped_and_flipped)


def read_cifar(folder: Path | None, part: str) -> tuple[Tensor, Tensor]:
    """(N, 3, 32, 32) uint8 and (N,) int64."""
    if folder is None or not (folder / "cifar10" / f"{part}.bin").exists():
        raise SystemExit(f"wanted cifar10/{part}.bin in the folder that --data names, got --data {folder}")
    content = np.fromfile(folder / "cifar10" / f"{part}.bin", np.uint8).reshape(-1, 1 + 3 * SIDE**2)
    images, labels = content[:, 1:].reshape(-1, 3, SIDE, SIDE).copy(), content[:, 0].astype(np.int64)
    return torch.from_numpy(images), torch.from_numpy(labels)


class TwoLayers(Letters):
    """Scores of the next letter by two layers of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.TransformerEncoderLayer(32, 2, 64, 0.0, "gelu", batch_first=True, norm_first=True)

    def forward(self, text: Tensor) -> Tensor:
        x = self.letters(text) + self.places
        for block in (self.block, self.second):
            x = block(x, src_mask=self.later, is_causal=True)
        return self.head(self.norm(x))


def letters(folder: Path | None) -> Iterator[Problem]:
    """A transformer of two layers, warmed up, its gradients clipped to norm 1."""
    learnt, held = windows(LEARNT), windows(HELD_OUT)
    held = held[torch.randperm(len(held), generator=torch.Generator().manual_seed(0))[:EVALUATED]]
    task = Task("text, transformer", learnt[:, :-1], learnt[:, 1:], held[:, :-1], held[:, 1:], TwoLayers, {})
    yield Problem(task, "AdamW", 4e-3, adamw, warmed_up, clip=1.0)


def points(folder: Path | None = None) -> Iterator[Problem]:
    """The blobs, shaken a little and warmed up. Takes seconds and no files."""

    def shaken(inputs: Tensor, draw: torch.Generator) -> Tensor:
        return inputs + 0.1 * torch.randn(inputs.shape, generator=draw)

    yield Problem(blobs(), "momentum", 0.02, momentum, warmed_up, shaken)


PROBLEMS: dict[str, Callable[[Path | None], Iterator[Problem]]] = {"mnist": digits, "cifar10": objects, "text": letters}


# --- a run


class Run:
    """A model on its way: a step at a time, with what the callback would have written down of it."""

    def __init__(self, problem: Problem, trial: Trial) -> None:
        torch.manual_seed(trial.seed)
        self.problem, self.trial, self.step = problem, trial, 0
        self.model = problem.task.model()
        self.optimizer = problem.make(self.model.parameters(), trial.rate)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda k: problem.schedule(k, trial.steps))
        self.draw = torch.Generator().manual_seed(1000 * trial.seed + trial.batch)
        self.batches = self._epochs()
        self.meter = TrajectoryMeter(self.optimizer) if trial.level is None else None
        norms = sum(isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d) for part in self.model.modules())
        said = {"batch_size": trial.batch, "batch_norm_layers": norms, "lr_schedules": [problem.schedule.__name__]}
        self.record = RunRecord((self.meter.description() if self.meter else {}) | said)

    def _epochs(self) -> Iterator[Tensor]:
        """Indices of batches: each epoch sees every sample once, in an order of its own."""
        count, waiting = len(self.problem.task.inputs), torch.empty(0, dtype=torch.int64)
        while True:
            while len(waiting) < self.trial.batch:
                waiting = torch.cat([waiting, torch.randperm(count, generator=self.draw)])
            yield waiting[: self.trial.batch]
            waiting = waiting[self.trial.batch :]

    def advance(self) -> None:
        index, task = next(self.batches), self.problem.task
        scores = self.model(self.problem.shown(task.inputs[index], self.draw))
        loss = cross_entropy(scores.flatten(0, -2), task.targets[index].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        if self.meter:
            self.meter.record_loss(loss.detach())
            self.meter.observe_gradients(self.optimizer)
        if self.problem.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.problem.clip)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        if self.meter and self.step % max(2, self.trial.steps // ROWS) == 0:
            self.record.take(self.meter, {"samples": float(self.trial.batch * self.step)})

    def evaluate(self) -> float:
        self.model.eval()
        loss = self.problem.task.evaluate(self.model)
        self.model.train()
        return loss


def train(problem: Problem, trial: Trial) -> tuple[Course, RunRecord]:
    """Until its schedule is over; where there is a level, until its smoothed loss is there, or it diverged."""
    run, course = Run(problem, trial), Course()
    every = max(1, trial.steps // LOOKED)
    course.add(0, run.evaluate())

    def over() -> bool:
        return trial.level is not None and (course.diverged or fmean(course.losses[-LOOKS:]) <= trial.level)

    while run.step < trial.steps and not over():
        run.advance()
        if run.step % every == 0:
            course.add(run.step, run.evaluate())
    if run.meter:
        run.meter.close()
    return course, run.record
