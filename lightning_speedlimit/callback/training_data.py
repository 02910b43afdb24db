"""What the data of a training are, as the Trainer and its DataLoader say: a schedule may change them between epochs."""

from __future__ import annotations

import math
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from lightning_speedlimit import loaders
from lightning_speedlimit.checks.guard import look


def training_batches(trainer: Any) -> float:
    """Of one process in an epoch, inf where its data have no length.

    The Trainer asks once; a batch size that a schedule raises in place leaves fewer.
    """
    loader, there = trainer.train_dataloader, math.inf
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        there = look(len, math.inf, loader)
    return float(min(trainer.num_training_batches, there))


def batch_size(trainer: Any) -> int | None:
    """Examples of one batch of one process, as the training's DataLoader says; None where there is no such thing."""
    return loaders.batch_size(loaders.Epoch(trainer.train_dataloader, math.nan, 1))


def described(trainer: Any) -> dict[str, Any]:
    """What the record holds of the data at the moment; None where it is not known."""
    batches = look(training_batches, math.nan, trainer)
    loader = look(lambda: trainer.train_dataloader, None)
    return loaders.described(loaders.Epoch(loader, batches, trainer.world_size))
