"""What the data of a training are, as the Trainer and its DataLoader say: a schedule may change them between epochs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from lightning_speedlimit.checks.guard import look

_ONCE = (SequentialSampler, SubsetRandomSampler, DistributedSampler)


def batches_per_epoch(trainer: Any) -> int | None:
    """Batches of one process in which an epoch sees all data; None where it sees a part of it, or that is not known.

    `limit_train_batches` and `drop_last` leave a part out, another one in each epoch where the data are shuffled.
    """
    batches, size = training_batches(trainer), batch_size(trainer)
    examples = look(lambda: len(trainer.train_dataloader.dataset), None)  # there may be no DataLoader, or a stream
    if examples is None or size is None or not math.isfinite(batches) or batches * size * trainer.world_size < examples:
        return None
    return int(batches)


def samples_without_replacement(trainer: Any) -> int | None:
    """Samples of which an epoch sees none twice, and each epoch in another order; None where that is not known.

    Not of a loader that hands out what its data hold, as these may be batches; nor of several processes that draw for
    themselves.
    """
    sampler: Any = look(lambda: trainer.train_dataloader.batch_sampler.sampler, None)
    if type(sampler).__name__ == "DistributedSamplerWrapper":  # Lightning's, around any other
        sampler = look(lambda: sampler.dataset._sampler, None)
    elif trainer.world_size > 1 and not isinstance(sampler, DistributedSampler):
        return None
    if isinstance(sampler, RandomSampler):
        pool = len(sampler.data_source)
        return None if sampler.replacement or sampler.num_samples > pool else pool
    if not isinstance(sampler, _ONCE):
        return None
    data: Any = getattr(sampler, "dataset", sampler)  # a DistributedSampler's own length is that of its share
    seen = training_batches(trainer) * (batch_size(trainer) or 1) * trainer.world_size
    return int(min(len(data), seen))  # a part of the data is always the same part


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
    loader = trainer.train_dataloader
    size = look(lambda: loader.batch_size, None)
    if size is None:
        size = look(lambda: loader.batch_sampler.batch_size, None)
    return size if isinstance(size, int) else None


_KNOWN: dict[str, Callable[[Any], Any]] = {
    "batch_size": batch_size,
    "batches_per_epoch": batches_per_epoch,
    "samples_without_replacement": samples_without_replacement,
}


def described(trainer: Any) -> dict[str, Any]:
    """All of these at the moment; None where one is not known."""
    return {name: look(at, None, trainer) for name, at in _KNOWN.items()}
