"""What the experiments on the diagnosis share: two problems, settings, and a run beside an exact oracle.

The oracle knows what a training does not: the loss L of all data and its force F = −∇L, before and after a step, by
plain tensors. With f the force of the batch, u the update and W = Σ f_k·u_k, the work was spent on

    noise     Σ (f_k − F_k)·u_k / W                   what only this batch wanted
    useful    Σ (L_k − L_{k+1}) / W                   what lowered the loss
    bouncing  Σ [F_k·u_k − (L_k − L_{k+1})] / W       what the slope promised and the step overshot: ½ u·H·u + …

which add up to 1, exactly. The diagnosis has to find out from the batches alone.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the fastest for tensors this small; and the same sums everywhere

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_speedlimit import RunRecord, TrajectoryMeter

sys.path.insert(0, str(Path(__file__).parents[1]))

import char_transformer

torch.set_num_threads(1)

LOG_EVERY = 5  # steps


@dataclass(frozen=True)
class Problem:
    """Data, a model from a seed, and a loss: loss(model, index) is the mean over the data at `index`."""

    name: str
    size: int
    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], Tensor]
    target: float
    """Loss on all data at which a run ends."""
    oracle_every: int
    """The oracle looks at one step of so many, and the others are left out of both sides of its shares. Odd, since
    what bounces does so with period 2."""


def digits() -> Problem:
    """1,797 images, an MLP 64-128-128-10."""
    found = load_digits()
    images = torch.tensor(found.data, dtype=torch.float32) / 16
    labels = torch.tensor(found.target)

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def loss(model: nn.Module, index: Any) -> Tensor:
        return cross_entropy(model(images[index]), labels[index])

    return Problem("digits", len(labels), model, loss, target=0.15, oracle_every=1)


def transformer() -> Problem:
    """243 windows of 32 letters, two layers of width 64: `char_transformer.py`."""
    alphabet, windows = char_transformer.read_text()

    def model() -> nn.Module:
        return char_transformer.CharTransformer(len(alphabet))

    def loss(model: nn.Module, index: Any) -> Tensor:
        return char_transformer.loss_of(model, windows[index])

    return Problem("transformer", len(windows), model, loss, target=2.4, oracle_every=3)


@dataclass(frozen=True)
class Setting:
    """An optimizer ("SGD", "momentum", "Adam"), its rate, and a batch; batch None: all data."""

    optimizer: str
    lr: float
    batch: int | None
    beta: float = 0.9
    """Of "momentum", and β₁ of "Adam"."""
    schedule: str = "constant"
    """Or "decay": lr (1 − k/horizon); "exponential": lr 0.05^(k/horizon); "warmup": lr min(1, (k + 1)/horizon);
    "rise": lr (0.2 + 0.8 k/horizon), not beyond lr."""
    horizon: int = 0
    """Steps, of the schedule."""

    @property
    def name(self) -> str:
        beta = "" if self.beta == 0.9 else f", beta {self.beta:g}"
        scheduled = "" if self.schedule == "constant" else f", {self.schedule} over {self.horizon}"
        return f"{self.optimizer} {self.lr:.3g}, {'all' if self.batch is None else self.batch}{beta}{scheduled}"

    def make(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.optimizer == "Adam":
            return torch.optim.Adam(model.parameters(), lr=self.lr, betas=(self.beta, 0.999))
        return torch.optim.SGD(
            model.parameters(), lr=self.lr, momentum=self.beta if self.optimizer == "momentum" else 0.0
        )

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, …"""
        share = min(step / self.horizon, 1.0) if self.horizon else 0.0
        factors = {
            "constant": 1.0,
            "decay": max(1 - share, 0.01),
            "exponential": 0.05**share,
            "warmup": min((step + 1) / max(self.horizon, 1), 1.0),
            "rise": 0.2 + 0.8 * share,
        }
        return self.lr * factors[self.schedule]


@dataclass(frozen=True)
class Look:
    """What the oracle saw before a step: weights and force (P,) float64, and the loss of all data."""

    weights: Tensor
    force: Tensor
    loss: float


class Oracle:
    """Sums of the work and its shares over the steps that it looks at."""

    def __init__(self, problem: Problem, model: nn.Module) -> None:
        self.problem, self.model = problem, model
        self.parameters = list(model.parameters())
        self.work = self.noise = self.bouncing = self.useful = 0.0

    @torch.no_grad()
    def loss(self) -> Tensor:
        """Of all data, now."""
        return self.problem.loss(self.model, slice(None))

    def before(self, weights: Tensor) -> Look:
        """Before a step; the gradients of the training are left alone."""
        loss = self.problem.loss(self.model, slice(None))
        return Look(weights, -flat(torch.autograd.grad(loss, self.parameters)), loss.item())

    def add(self, look: Look, force: Tensor) -> None:
        """After the step; `force` (P,) is that of its batch."""
        update = flat(self.parameters) - look.weights
        work, slope = (force @ update).item(), (look.force @ update).item()
        fell = look.loss - self.loss().item()
        self.work += work
        self.noise += work - slope
        self.bouncing += slope - fell
        self.useful += fell

    def shares(self) -> dict[str, float]:
        """noise, bouncing, useful; NaN where no step was looked at."""
        values = {"noise": self.noise, "bouncing": self.bouncing, "useful": self.useful}
        return {name: value / self.work if self.work else math.nan for name, value in values.items()}


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


@dataclass(frozen=True)
class Run:
    """A run: what the meter left behind, and what the oracle knows."""

    setting: Setting
    record: RunRecord
    reached: bool
    loss: float
    truth: dict[str, float]
    """noise, bouncing, useful: shares of the work; NaN without the oracle."""


def train(
    problem: Problem, setting: Setting, seed: int, *, max_steps: int, oracle: bool = True, epochs: bool = False
) -> Run:
    """Trains until the loss on all data is the problem's target, or `max_steps`.

    Args:
        oracle: look at the gradient of all data as well; else at its loss only.
        epochs: batches without replacement, as a DataLoader draws them; False: independent batches.
    """
    torch.manual_seed(seed)
    model = problem.model()
    optimizer = setting.make(model)
    batches = Batches(problem.size, setting.batch, seed, epochs)
    record, meter = RunRecord(description(setting, optimizer)), TrajectoryMeter(optimizer)
    exact = Oracle(problem, model)
    loss_on_all, steps = math.inf, 0
    while steps < max_steps and loss_on_all > problem.target:
        for group in optimizer.param_groups:
            group["lr"] = setting.rate(steps)
        look = exact.before(flat(model.parameters())) if oracle and steps % problem.oracle_every == 0 else None
        optimizer.zero_grad()
        loss = problem.loss(model, batches.next())
        loss.backward()
        meter.record_loss(loss)
        force = -flat(p.grad for p in model.parameters()) if look else None
        optimizer.step()
        steps += 1
        if look is not None and force is not None:
            exact.add(look, force)
        if steps % LOG_EVERY == 0 or steps == max_steps:
            loss_on_all = exact.loss().item()
        if steps % LOG_EVERY == 0:
            record.append(steps, meter.compute(), meter.reasons)
    record.append(steps, meter.compute(), meter.reasons)
    meter.close()
    return Run(setting, record, loss_on_all <= problem.target, loss_on_all, exact.shares())


class Batches:
    """Indices of one batch after the other, with or without replacement; all data where the batch is None."""

    def __init__(self, size: int, batch: int | None, seed: int, epochs: bool) -> None:
        self.size, self.batch, self.epochs = size, batch, epochs
        self.generator = torch.Generator().manual_seed(seed + 100)
        self.order = torch.empty(0, dtype=torch.int64)

    def next(self) -> Any:
        if self.batch is None or self.batch >= self.size:
            return slice(None)
        if not self.epochs:
            return torch.randint(self.size, (self.batch,), generator=self.generator)
        if len(self.order) < self.batch:
            self.order = torch.randperm(self.size, generator=self.generator)
        index, self.order = self.order[: self.batch], self.order[self.batch :]
        return index


def description(setting: Setting, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What the callback writes into a record, as far as the diagnosis reads it."""
    groups = [
        {k: list(v) if isinstance(v, tuple) else v for k, v in g.items() if k != "params"}
        for g in optimizer.param_groups
    ]
    return {
        "clock": "steps",
        "entropy_production": "loss_drop",
        "optimizers": [{"class": type(optimizer).__name__, "groups": groups}],
        "batch_size": setting.batch,
    }


# --- results


def plain(value: Any) -> Any:
    """JSON has no NaN: null; numbers to six digits."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, bool) or value is None or isinstance(value, (int, str)):
        return value
    return float(f"{float(value):.6g}") if math.isfinite(float(value)) else None


def save(path: Path, part: str, content: Any) -> None:
    """Writes one part of the result file; the other parts stay as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found[part] = plain(content)
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


__all__ = ["Problem", "Run", "Setting", "asdict", "digits", "replace", "save", "train", "transformer"]
