"""What a DataLoader tells of the data of a training: how many samples a batch has, and which of them an epoch sees."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch.utils.data import DistributedSampler, RandomSampler, SequentialSampler, SubsetRandomSampler

from lightning_speedlimit.checks.guard import look

_ONCE = (SequentialSampler, SubsetRandomSampler, DistributedSampler)
_OF_ALL_PROCESSES = ("DistributedSamplerWrapper", "BatchSamplerShard")  # Lightning's and Accelerate's, around any other


class Epoch(NamedTuple):
    """One epoch of a training's data."""

    loader: Any
    """A DataLoader, or what else hands out batches."""
    batches: float
    """Of one process; inf or NaN: not known."""
    processes: int
    """That have samples of their own."""


def described(epoch: Epoch) -> dict[str, int | None]:
    """All of these for a record of a run; None where one is not known: loaders and samplers may be the user's own."""
    known = (batch_size, batches_per_epoch, samples_without_replacement)
    return {at.__name__: look(at, None, epoch) for at in known}


def batch_size(epoch: Epoch) -> int | None:
    """Samples of one batch of one process; None where the loader does not say."""
    loader = epoch.loader
    size = look(lambda: loader.batch_size, None)
    batches: Any = look(lambda: loader.batch_sampler, None)
    if size is None:
        size = look(lambda: batches.batch_size, None)
    if not isinstance(size, int):
        return None
    return size // batches.num_processes if getattr(batches, "split_batches", False) else size  # Accelerate's


def batches_per_epoch(epoch: Epoch) -> int | None:
    """Batches of one process in which an epoch sees all data; None where it sees a part of it, or that is not known.

    `limit_train_batches` and `drop_last` leave a part out, another one in each epoch where the data are shuffled, and
    a sampler that draws with replacement leaves out what chance will have. What a sampler of the user's own draws is
    not known.
    """
    sampler, size = _sampler(epoch.loader), batch_size(epoch)
    there = _drawn_once(sampler)
    if there is None or size is None or not math.isfinite(epoch.batches):
        return None
    drawn = sampler.num_samples if isinstance(sampler, RandomSampler) else there
    return int(epoch.batches) if min(drawn, epoch.batches * size * epoch.processes) >= there else None


def samples_without_replacement(epoch: Epoch) -> int | None:
    """Samples of which an epoch sees none twice, and each epoch in another order; None where that is not known.

    Not of a loader that hands out what its data hold, as these may be batches; nor of several processes that draw for
    themselves.
    """
    sampler = _sampler(epoch.loader)
    if epoch.processes > 1 and not _is_shared(epoch.loader):
        return None
    there = _drawn_once(sampler)
    if there is None or isinstance(sampler, RandomSampler):
        return there
    seen = epoch.batches * (batch_size(epoch) or 1) * epoch.processes
    return int(min(there, seen))  # a part of the data is always the same part


def _drawn_once(sampler: Any) -> int | None:
    """Samples that it draws from, none twice in an epoch; None where it may, or that is not known."""
    if isinstance(sampler, RandomSampler):
        there = len(sampler.data_source)
        return None if sampler.replacement or sampler.num_samples > there else there
    if not isinstance(sampler, _ONCE):
        return None
    data: Any = getattr(sampler, "dataset", sampler)  # a DistributedSampler's own length is that of its share
    return len(data)


def _sampler(loader: Any) -> Any:
    """Which samples come: the sampler of the batches, out of what deals it out among processes."""
    batches: Any = look(lambda: loader.batch_sampler, None)
    if type(batches).__name__ in _OF_ALL_PROCESSES:
        batches = look(lambda: batches.batch_sampler, None)
    sampler: Any = look(lambda: batches.sampler, None)
    return look(lambda: sampler.dataset._sampler, None) if type(sampler).__name__ in _OF_ALL_PROCESSES else sampler


def _is_shared(loader: Any) -> bool:
    """The processes deal out one epoch among them, each sample to one of them."""
    batches: Any = look(lambda: loader.batch_sampler, None)
    sampler: Any = look(lambda: batches.sampler, None)
    return isinstance(sampler, DistributedSampler) or type(batches).__name__ in _OF_ALL_PROCESSES
