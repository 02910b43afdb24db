"""What a DataLoader tells of the data of a training: of one process and of several, with the samplers there are."""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_speedlimit.loaders import Epoch, described, samples_without_replacement

SAMPLED = TensorDataset(torch.zeros(24, 1))


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(24))


class Own(Sampler[int]):
    """Of the user's own: what it draws is its own affair."""

    def __iter__(self) -> Iterator[int]:
        return iter([3] * 24)

    def __len__(self) -> int:
        return 24


@pytest.mark.parametrize(
    ("sampler", "batch", "wanted"),
    [
        (RandomSampler(SAMPLED), 24, 1),
        (RandomSampler(SAMPLED), 5, 5),
        (RandomSampler(SAMPLED, num_samples=22), 4, None),  # six batches of 4, two samples short
        (RandomSampler(SAMPLED, replacement=True), 24, None),  # a batch as large as the data, and not the data
        (WeightedRandomSampler([1.0] * 24, 24), 24, None),
        (SubsetRandomSampler(range(10)), 10, 1),  # the data are those 10
        (SubsetRandomSampler(range(10)), 4, 3),
        (SequentialSampler(SAMPLED), 8, 3),
        (Own(), 24, None),
        (Own(), 4, None),
    ],
)
def test_an_epoch_sees_all_data_where_its_sampler_draws_each_once(sampler: Any, batch: int, wanted: int | None) -> None:
    loads = DataLoader(SAMPLED, batch_size=batch, sampler=sampler)
    assert described(Epoch(loads, len(loads), 1))["batches_per_epoch"] == wanted
    assert described(Epoch(loads, len(loads) - 1, 1))["batches_per_epoch"] is None


def test_what_is_no_loader_tells_nothing() -> None:
    class Raising:
        @property
        def batch_sampler(self) -> Any:
            raise RuntimeError("not here")

    for loads in (None, [], Raising(), DataLoader(Stream(), batch_size=None)):
        assert set(described(Epoch(loads, math.nan, 1)).values()) == {None}


def test_of_several_processes_the_samplers_share_tells() -> None:
    """Of two: torch's own, Lightning's wrapper around others, and one that knows of neither."""
    from lightning_fabric.utilities.distributed import DistributedSamplerWrapper

    def told(sampler: Any) -> int | None:
        loads = SimpleNamespace(batch_sampler=SimpleNamespace(sampler=sampler), batch_size=4)
        return samples_without_replacement(Epoch(loads, 3, 2))

    two = {"num_replicas": 2, "rank": 0}
    assert told(DistributedSampler(SAMPLED, **two)) == 24
    assert told(DistributedSamplerWrapper(SubsetRandomSampler(range(10)), **two)) == 10
    assert told(DistributedSamplerWrapper(WeightedRandomSampler([1.0] * 24, 24), **two)) is None
    assert told(DistributedSamplerWrapper(RandomSampler(SAMPLED, replacement=True), **two)) is None
    assert told(RandomSampler(SAMPLED)) is None, "each process draws for itself"


class BatchSamplerShard:
    """As Accelerate deals batches out among processes: by that name, for it need not be installed."""

    def __init__(self, batch_sampler: BatchSampler, *, split_batches: bool) -> None:
        self.batch_sampler, self.batch_size = batch_sampler, batch_sampler.batch_size
        self.num_processes, self.split_batches = 2, split_batches


@pytest.mark.parametrize("split", [False, True])
def test_batches_that_accelerate_deals_out(split: bool) -> None:
    """Two processes have 4 samples each, of 24 that are drawn once for both."""
    shard = BatchSamplerShard(BatchSampler(RandomSampler(SAMPLED), 8 if split else 4, False), split_batches=split)
    loads = SimpleNamespace(batch_size=None, batch_sampler=shard)
    told = {"batch_size": 4, "batches_per_epoch": 3, "samples_without_replacement": 24}
    assert described(Epoch(loads, 3, 2)) == told
    assert described(Epoch(loads, 2, 2)) == told | {"batches_per_epoch": None}
    drawn = BatchSamplerShard(BatchSampler(WeightedRandomSampler([1.0] * 24, 24), 8, False), split_batches=True)
    assert described(Epoch(SimpleNamespace(batch_sampler=drawn), 3, 2))["samples_without_replacement"] is None
