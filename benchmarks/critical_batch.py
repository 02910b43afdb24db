"""The critical batch size from a run's own numbers, against tr Σ/‖F‖² from per-sample gradients.

Four tasks × (SGD, momentum, Adam) × three thirds of a run. The truth of a third: Σ tr Σ over Σ ‖F‖² at 15 of its
points, of all training samples' own gradients (torch.func). Nothing of it is known to the estimate.

    python benchmarks/critical_batch.py [--tasks digits ...] [--seeds 3] [--output critical_batch.json]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lightning_speedlimit import RunRecord, TrajectoryMeter
from lightning_speedlimit.record.tuning import Tuning

torch.set_num_threads(1)
POINTS, ROWS, THIRDS = 15, 20, 3


@dataclass(frozen=True)
class Task:
    """name; model and data, made anew for each seed; loss of a batch (a mean); steps; batch; rate by optimizer."""

    name: str
    make: Callable[[], tuple[nn.Module, Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    steps: int
    batch: int
    rates: dict[str, float]


def digits() -> tuple[nn.Module, Tensor, Tensor]:
    data = load_digits()
    x = torch.tensor(data.data / 16.0, dtype=torch.float32)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), x, torch.tensor(data.target)


def images() -> tuple[nn.Module, Tensor, Tensor]:
    _, x, y = digits()
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.Tanh(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    return network, x.reshape(-1, 1, 8, 8), y


def regression() -> tuple[nn.Module, Tensor, Tensor]:
    """A wide teacher's outputs with noise, in 20 dimensions."""
    x = torch.randn(2000, 20)
    teacher = nn.Sequential(nn.Linear(20, 100), nn.Tanh(), nn.Linear(100, 1))
    with torch.no_grad():
        y = 3.0 * teacher(x) + 0.3 * torch.randn(2000, 1)
    return nn.Sequential(nn.Linear(20, 50), nn.Tanh(), nn.Linear(50, 1)), x, y


class Letters(nn.Module):
    """The next of 64 kinds of letters from 16 before it, by one layer of attention."""

    def __init__(self, width: int = 32, context: int = 16) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(64, width), nn.Parameter(0.1 * torch.randn(context, width))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.head = nn.Linear(width, 64)

    def forward(self, text: Tensor) -> Tensor:
        x = self.letters(text) + self.places
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, -1)
        seen = torch.tril(torch.ones(x.shape[-2], x.shape[-2]))
        weights = (q @ k.mT / math.sqrt(x.shape[-1])).masked_fill(seen == 0, -1e9).softmax(-1)
        x = x + self.out(weights @ v)
        x = x + self.mlp(self.norms[1](x))
        return self.head(self.norms[2](x))


def text() -> tuple[nn.Module, Tensor, Tensor]:
    """Sequences of Python's own library."""
    source = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text("utf-8")
    codes = torch.tensor([min(max(ord(c) - 32, 0), 94) * 63 // 94 for c in source])
    starts = torch.randint(len(codes) - 17, (2000,))
    windows = codes[starts[:, None] + torch.arange(17)]
    return Letters(), windows[:, :-1], windows[:, 1:]


def crossed(out: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(out.reshape(-1, out.shape[-1]), y.reshape(-1))


TASKS = {
    task.name: task
    for task in (
        Task("digits, MLP", digits, crossed, 900, 16, {"sgd": 0.1, "momentum": 0.01, "adam": 1e-3}),
        Task("digits, CNN", images, crossed, 900, 32, {"sgd": 0.2, "momentum": 0.02, "adam": 2e-3}),
        Task("regression, MLP", regression, nn.functional.mse_loss, 900, 16,
             {"sgd": 0.05, "momentum": 0.005, "adam": 2e-3}),
        Task("text, transformer", text, crossed, 900, 8, {"sgd": 0.2, "momentum": 0.02, "adam": 1e-3}),
    )
}  # fmt: skip
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], float], torch.optim.Optimizer]] = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "adam": lambda p, lr: torch.optim.Adam(p, lr=lr),
}


def gradient_moments(task: Task, model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """tr Σ and ‖F‖² of the samples' own gradients, whose number is taken out of ‖F‖²."""
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(w: dict[str, Tensor], one: Tensor, target: Tensor) -> Tensor:
        return task.loss(functional_call(model, w, (one[None],)), target[None])

    each = vmap(grad(loss), (None, 0, 0))
    total, squares, count = None, 0.0, len(x)
    for low in range(0, count, 250):
        found = each(weights, x[low : low + 250], y[low : low + 250])
        flat = torch.cat([g.reshape(len(g), -1) for g in found.values()], 1).double()
        total = flat.sum(0) if total is None else total + flat.sum(0)
        squares += float(flat.square().sum())
    assert total is not None
    mean = float((total / count).square().sum())
    return (squares / count - mean) * count / (count - 1), mean


@dataclass(frozen=True)
class Third:
    task: str
    optimizer: str
    seed: int
    third: int
    estimate: float
    standard_error: float
    truth: float
    reason: str


def measure(task: Task, optimizer: str, seed: int) -> list[Third]:
    torch.manual_seed(seed)
    model, x, y = task.make()
    stepper = OPTIMIZERS[optimizer](list(model.parameters()), task.rates[optimizer])
    meter, record, draw = TrajectoryMeter(stepper), None, torch.Generator().manual_seed(seed)
    record = RunRecord(meter.description())
    third = task.steps // THIRDS
    points = {int(third * (i + (j + 0.5) / POINTS)): i for i in range(THIRDS) for j in range(POINTS)}
    truth = np.zeros((THIRDS, 2))
    for step in range(task.steps):
        if step in points:
            truth[points[step]] += gradient_moments(task, model, x, y)
        index = torch.randint(len(x), (task.batch,), generator=draw)
        loss = task.loss(model(x[index]), y[index])
        stepper.zero_grad()
        loss.backward()
        meter.record_loss(loss.detach())
        stepper.step()
        if (step + 1) % (task.steps // (THIRDS * ROWS)) == 0:
            record.append(meter.steps, {**meter.compute(), "samples": float(task.batch * (step + 1))})
    found = []
    for i in range(THIRDS):
        tuned = Tuning(record.columns, record.run, None if i == 0 else i * ROWS - 1, (i + 1) * ROWS - 1)
        size = tuned.critical_batch_size
        true = truth[i, 0] / truth[i, 1]
        found.append(Third(task.name, optimizer, seed, i, size.value, size.standard_error, float(true), size.reason))
    return found


def verdict(rows: list[Third]) -> dict[str, float]:
    known = [row for row in rows if math.isfinite(row.estimate)]
    ratios = [float(row.estimate / row.truth) for row in known]
    return {
        "known": len(known),
        "of": len(rows),
        "median": median(ratios) if ratios else math.nan,
        "within a factor of 2": sum(0.5 <= r <= 2 for r in ratios),
        "within two errors": sum(bool(abs(r.estimate - r.truth) <= 2 * r.standard_error) for r in known),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    began, rows = time.monotonic(), list[Third]()
    for name in arguments.tasks:
        for optimizer in OPTIMIZERS:
            for seed in range(arguments.seeds):
                rows += measure(TASKS[name], optimizer, seed)
            here = [r for r in rows if r.task == name and r.optimizer == optimizer]
            print(f"{name:20s} {optimizer:9s}", "  ".join(
                f"{r.estimate:.3g}+-{r.standard_error:.2g}/{r.truth:.3g}" for r in here), flush=True)  # fmt: skip
    told = {"all": verdict(rows)} | {o: verdict([r for r in rows if r.optimizer == o]) for o in OPTIMIZERS}
    for name, found in told.items():
        print(name, found)
    if arguments.output:
        seconds = round(time.monotonic() - began)
        content = {"seconds": seconds, "verdict": told, "rows": [asdict(row) for row in rows]}
        arguments.output.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
