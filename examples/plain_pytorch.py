"""A plain PyTorch loop, with clipping and a schedule, measured; and its record on disk, as Lightning's would be.

    python examples/plain_pytorch.py

The meter hooks the optimizer, and measures whenever `optimizer.step()` is called. Three lines are yours to write:
`record_loss` (without it there is no loss drop), `observe_gradients` (only where you clip: before you do, so that the
work is that of the raw gradient), and on your log steps `record.take(meter)`. Nothing else waits for the device.

At the end it prints the course of the run. Where the rate is at its height the path turns: straightness falls from 0.78
to 0.21 between steps 90 and 230. Where the rate fades the steps are too short to matter: steadiness falls from 0.89 to
0.61 in the second half.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import OneCycleLR

from lightning_speedlimit import RunRecord, TrajectoryMeter

BATCH_SIZE = 64
LOG_EVERY = 5  # steps
CLIP_AT = 0.5


def digits(epochs: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the 1,797 images of 8 x 8 pixels that come with scikit-learn, in another order each epoch."""
    images, labels = load_digits(return_X_y=True)
    inputs, targets = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for chosen in torch.randperm(len(inputs), generator=order).split(BATCH_SIZE):
            yield inputs[chosen], targets[chosen]


def train(epochs: int) -> RunRecord:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    batches = list(digits(epochs))
    schedule = OneCycleLR(optimizer, max_lr=0.2, total_steps=len(batches), cycle_momentum=False)

    meter = TrajectoryMeter(optimizer)
    # What summaries and comparisons say about the run; the last three the meter can't know.
    more = {"model": "MLP 64-128-10", "batch_size": BATCH_SIZE, "gradient_clip_val": CLIP_AT}
    record = RunRecord(meter.description() | more)
    for step, (images, labels) in enumerate(batches, start=1):
        loss = cross_entropy(model(images), labels)
        loss.backward()
        meter.record_loss(loss)
        meter.observe_gradients()  # before clipping
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_AT)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % LOG_EVERY == 0 or step == len(batches):
            record.take(meter)
    meter.close()
    return record


def print_course(record: RunRecord) -> None:
    """Nine rows of the record, the last among them. (NaN: the loss has not yet fallen by two standard errors.)"""
    names = ("learning_rate", "grad_norm", "grad_norm_clipped", "efficiency", "straightness", "steadiness")
    columns = record.columns
    print(f"\n{'step':>6}" + "".join(f"{name.replace('_', ' '):>19}" for name in names))
    for row in range((len(record) - 1) % 8, len(record), max(1, len(record) // 8)):
        print(f"{columns['step'][row]:>6}" + "".join(f"{columns[name][row]:>19.3f}" for name in names))


def main() -> None:
    parser = argparse.ArgumentParser(description="A plain PyTorch loop on digits, measured.")
    parser.add_argument("--output", type=Path, default=Path("demo_runs"), metavar="DIR", help="where the record goes")
    parser.add_argument("--quick", action="store_true", help="2 epochs instead of 20")
    options = parser.parse_args()
    torch.set_num_threads(1)

    record = train(epochs=2 if options.quick else 20)
    folder = options.output / "plain_pytorch" / "speed_limit"
    record.save(folder)

    print(record.summary())
    print_course(record)
    print("\nHow to go on")
    print(f"  record   speedlimit show {folder}")


if __name__ == "__main__":
    main()
