"""One training, measured: what the findings' runs have in common. A plain loop with a `TrajectoryMeter`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from statistics import fmean
from typing import Any

import torch
from nets import NETS
from sets import Set
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training import LOOKS, Course

from lightning_speedlimit import RunRecord, TrajectoryMeter

Schedule = Callable[[int, int], float]  # (step from 0, steps in all) → share of the rate
SCHEDULES: dict[str, Schedule] = {
    "constant": lambda step, steps: 1.0,
    "linear": lambda step, steps: 1.0 - step / steps,
    "cosine": lambda step, steps: 0.5 + 0.5 * math.cos(math.pi * step / steps),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": torch.optim.SGD,
    "momentum": lambda parameters, lr, **more: torch.optim.SGD(parameters, lr, momentum=0.9, **more),
    "RMSprop": torch.optim.RMSprop,
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
}


@dataclass(frozen=True)
class Training:
    """A run's setting, which with its seed says all of it: `key` is what a row of results is found by.

    rate: at its highest. steps: that the schedule spans. warm_up: share of them, linear from 0. decay: of weights.
    clip: the longest gradient; 0: any. epochs: batches go through the set in a new order each time, else each is drawn
    with replacement. net_options, optimizer_options: further arguments of both.
    """

    data: str
    net: str
    optimizer: str
    rate: float
    batch: int
    steps: int
    seed: int
    schedule: str = "constant"
    warm_up: float = 0.0
    decay: float = 0.0
    clip: float = 0.0
    epochs: bool = False
    net_options: Mapping[str, Any] = field(default_factory=dict)
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> dict[str, Any]:
        """What differs from the defaults, and all that has none."""
        named = {part.name: getattr(self, part.name) for part in fields(self)}
        plain = Training(*(value for name, value in named.items() if name not in UNUSUAL))
        return {name: value for name, value in named.items() if name not in UNUSUAL or value != getattr(plain, name)}


UNUSUAL = {part.name for part in fields(Training)} - {"data", "net", "optimizer", "rate", "batch", "steps", "seed"}


class Run:
    """A network on its way, a step at a time.

    The weights come from the seed, the batches from `order` (the seed, where None): replicas of one start have one
    seed and an order each. `control` may change the rate before each step, after the schedule did.
    """

    def __init__(self, training: Training, data: Set, *, order: int | None = None, measured: bool = True) -> None:
        self.training, self.data, self.step = training, data, 0
        torch.manual_seed(training.seed)
        self.network = NETS[training.net](training.data, **training.net_options)
        more = {"weight_decay": training.decay} if training.decay else {}
        self.optimizer = OPTIMIZERS[training.optimizer](
            self.network.parameters(), lr=training.rate, **more, **training.optimizer_options
        )
        self.control: Callable[[Run], None] | None = None
        self._draw = torch.Generator().manual_seed(1000 + (training.seed if order is None else order))
        self._batches = self._epochs() if training.epochs else self._replaced()
        self.meter = TrajectoryMeter(self.optimizer) if measured else None
        said: dict[str, Any] = {"batch_size": training.batch}
        if training.epochs:
            said["samples_without_replacement"] = len(data.inputs)
            said["batches_per_epoch"] = len(data.inputs) // training.batch
        self.record = RunRecord((self.meter.description() if self.meter else {}) | said)
        self.course = Course()

    def _replaced(self) -> Iterator[Tensor]:
        while True:
            yield torch.randint(len(self.data.inputs), (self.training.batch,), generator=self._draw)

    def _epochs(self) -> Iterator[Tensor]:
        size = self.training.batch
        while True:
            shuffled = torch.randperm(len(self.data.inputs), generator=self._draw)
            yield from (part for part in shuffled.split(size) if len(part) == size)

    def loss(self, index: Tensor) -> Tensor:
        """Mean cross entropy of the training samples at `index`, nats."""
        return _crossed(self.network(self.data.inputs[index]), self.data.targets[index])

    @torch.no_grad()
    def held_loss(self) -> float:
        """Of the samples that no training sees."""
        self.network.eval()
        found = float(_crossed(self.network(self.data.held_inputs), self.data.held_targets))
        self.network.train()
        return found

    def share(self) -> float:
        """Of the highest rate, in the step to come: warm-up times schedule."""
        training, warm = self.training, self.training.warm_up * self.training.steps
        return min(1.0, (self.step + 1) / max(1.0, warm)) * SCHEDULES[training.schedule](self.step, training.steps)

    def advance(self) -> float:
        """One step; the loss of its batch."""
        loss = self.loss(next(self._batches))
        self.optimizer.zero_grad()
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = self.training.rate * self.share()
        if self.control is not None:
            self.control(self)
        if self.meter:
            self.meter.record_loss(loss.detach())
            self.meter.observe_gradients(self.optimizer)
        if self.training.clip:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.training.clip)
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def go(self, rows: int = 40, looks: int = 40, level: float | None = None) -> Run:
        """To the end of its schedule, or until the smoothed held-out loss is at the level, or it diverged."""
        steps = self.training.steps
        row_every, look_every = max(2, steps // rows), max(1, steps // looks)
        self.course.add(0, self.held_loss())
        while self.step < steps and not (self.course.diverged or self._reached(level)):
            self.advance()
            if self.meter and self.step % row_every == 0:
                self.record.take(self.meter, {"samples": float(self.training.batch * self.step)})
            if self.step % look_every == 0:
                self.course.add(self.step, self.held_loss())
        if self.meter:
            self.meter.close()
        return self

    def _reached(self, level: float | None) -> bool:
        losses = self.course.losses
        return level is not None and len(losses) >= LOOKS and fmean(losses[-LOOKS:]) <= level


def _crossed(scores: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(scores.flatten(0, -2), targets.flatten())


def flat(network: nn.Module) -> Tensor:
    """All weights (P,) float64, a copy."""
    return nn.utils.parameters_to_vector(network.parameters()).detach().double().clone()
