"""Small trainings to try the comparison on: one network, several optimizers and seeds, no download, plain PyTorch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_speedlimit.record import RunRecord
from lightning_speedlimit.trajectory import TrajectoryMeter

BATCH_SIZE = 128
LOG_EVERY = 5  # steps
TARGET = 0.2  # loss at which a run ends
MOST_STEPS = 1500
SEEDS = 3
QUICK_STEPS = 30

Data = tuple[Tensor, Tensor]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
}
QUICK_OPTIMIZERS = ("sgd", "adamw")


def train_all(output: Path, *, quick: bool = False, say: Callable[[str], None]) -> Iterator[Path]:
    """Trains every optimizer with every seed; yields the folder of each record when it is written.

    Args:
        output: the records are in `output`/optimizer/seed_n.
        quick: two optimizers, one seed, few steps.
        say: takes a line of progress for each run.

    Raises:
        OSError: the folder can't be written.
    """
    torch.set_num_threads(1)  # the fastest for tensors this small, by far where other programs want the cores too
    name, data = dataset()
    optimizers = QUICK_OPTIMIZERS if quick else tuple(OPTIMIZERS)
    seeds = 1 if quick else SEEDS
    say(f"Training on {name}: {len(optimizers) * seeds} runs, each until its loss is {TARGET:g}.")
    for optimizer in optimizers:
        for seed in range(seeds):
            record = train(OPTIMIZERS[optimizer], data, seed=seed, most_steps=QUICK_STEPS if quick else MOST_STEPS)
            folder = output / optimizer / f"seed_{seed}"
            record.save(folder)
            summary = record.summary()
            say(f"  {optimizer:<9} seed {seed}   {summary.steps:>5} steps   loss {summary.loss:6.3f}")
            yield folder


def train(make_optimizer: MakeOptimizer, data: Data, *, seed: int, most_steps: int) -> RunRecord:
    """One run, until its loss is `TARGET` or after `most_steps`; the record has a row every 5 steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(data)
    optimizer = make_optimizer(model.parameters())
    meter = TrajectoryMeter(optimizer)
    record = RunRecord(description(model, optimizer, meter, len(data[0])))
    began = time.monotonic()
    for step, (inputs, labels) in zip(range(1, most_steps + 1), batches(data, seed), strict=False):
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        meter.record_loss(loss)
        optimizer.step()
        if step % LOG_EVERY and step < most_steps:
            continue
        values, sketch = meter.measure(sketch=True)
        record.append(step, {**values, "seconds": time.monotonic() - began}, meter.reasons)
        done = values["loss"] <= TARGET or step == most_steps
        if sketch is not None and (done or record.wants_sketch()):
            record.add_sketch(step, sketch.numpy())
        if done:
            break
    meter.close()
    return record


def description(
    model: nn.Module, optimizer: torch.optim.Optimizer, meter: TrajectoryMeter, samples: int
) -> dict[str, object]:
    """What comparisons say about the run."""
    settings = {"lr": optimizer.defaults["lr"], "momentum": optimizer.defaults.get("momentum", 0.0)}
    return {
        "clock": meter.clock,
        "entropy_production": meter.entropy_production,
        "model": "MLP",
        "parameters": sum(p.numel() for p in model.parameters()),
        "optimizers": [{"class": type(optimizer).__name__, "groups": [settings]}],
        "batch_size": BATCH_SIZE,
        "samples_without_replacement": samples,
        "versions": {"torch": str(torch.__version__)},
    }


def network(data: Data) -> nn.Sequential:
    """An MLP with two hidden layers of 64."""
    inputs, classes = data[0].shape[1], int(data[1].max()) + 1
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, classes))


def batches(data: Data, seed: int) -> Iterator[Data]:
    """Without end, in another order in each epoch; of one size."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(data[0]), generator=draw)
        for start in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
            chosen = order[start : start + BATCH_SIZE]
            yield data[0][chosen], data[1][chosen]


def dataset() -> tuple[str, Data]:
    """Name and data: the handwritten digits that scikit-learn ships, else two spirals."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        return "two spirals", spirals()
    digits = load_digits()
    return f"{len(digits.data):,} handwritten digits", (
        torch.tensor(digits.data, dtype=torch.float32) / 16,
        torch.tensor(digits.target),
    )


def spirals(count: int = 1024) -> Data:
    """Points (count, 2) on two arms of three quarters of a turn, with some noise, and the arm of each."""
    draw = torch.Generator().manual_seed(0)
    arm = torch.arange(count) % 2
    radius = 0.3 + 1.7 * torch.rand(count, generator=draw)
    angle = 0.75 * math.pi * radius + math.pi * arm
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    return points + 0.05 * torch.randn(count, 2, generator=draw), arm
