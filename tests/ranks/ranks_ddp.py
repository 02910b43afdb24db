"""What each of two processes does under DistributedDataParallel; apart from the tests, so that it imports little."""

import warnings
from typing import Any

import ranks_cases as cases
import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from lightning_speedlimit.trajectory import TrajectoryMeter


def under_ddp(rank: int, case: cases.Case, *, width: int = 11, **options: Any) -> dict[str, Any]:
    model = DistributedDataParallel(cases.Net(width))
    options = {"process_group": dist.group.WORLD} | options
    return cases.train(model, case, lambda both: cases.loss_of(model, both[rank]), **options)


def collectives_of_a_training(rank: int, *, measured: bool) -> int:
    with cases.Collectives() as sent:
        under_ddp(rank, cases.CASES["SGD"], measured=measured)
    return sent.count


def unequal_numbers(rank: int) -> dict[str, Any]:
    """torch's own way of it: the process that has run out of batches shadows what the others send."""
    model = DistributedDataParallel(cases.Net())
    optimizer = cases.sgd(model.parameters())
    meter = TrajectoryMeter(optimizer, process_group=dist.group.WORLD)
    with Join([model]):
        for both in list(cases.parts(6 if rank == 0 else 4)):
            optimizer.zero_grad()
            loss = cases.loss_of(model, both[rank])
            loss.backward()
            meter.record_loss(loss)
            optimizer.step()
            after = [p.detach().clone() for p in model.parameters()]
    # The end of Join has written the weights of the last process into all.
    moved = [not torch.equal(p, a) for p, a in zip(model.parameters(), after, strict=True)]
    squares = [(a - s).square().sum() for a, s in zip(after, cases.Net().parameters(), strict=True)]
    values = meter.compute()
    found = {"values": values, "reasons": meter.reasons, "steps": meter.steps}
    return found | {"moved": any(moved), "displacement": float(torch.stack(squares).sum().sqrt())}


def one_measurement_fails(rank: int) -> dict[str, Any]:
    with cases.measurement_that_fails(rank):
        return under_ddp(rank, cases.CASES["SGD"])


def a_loss_is_missing(rank: int) -> dict[str, Any]:
    model = DistributedDataParallel(cases.Net())
    optimizer = cases.sgd(model.parameters())
    meter = TrajectoryMeter(optimizer, process_group=dist.group.WORLD)
    for k, both in enumerate(cases.parts(4)):
        optimizer.zero_grad()
        loss = cases.loss_of(model, both[rank])
        loss.backward()
        if (rank, k) != (1, 2):
            meter.record_loss(loss)
        optimizer.step()
    return {"values": meter.compute(), "reasons": meter.reasons}


def probes(rank: int) -> dict[str, Any]:
    model = DistributedDataParallel(cases.Net())
    meter = TrajectoryMeter(cases.sgd(model.parameters()), process_group=dist.group.WORLD)
    meter.record_probe(torch.tensor([2.0, 3.0, 4.0]) + rank, torch.tensor([1.0, 1.5, 3.0]) - rank)
    return meter.compute()


def work_of_a_rank(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    with cases.processes(rank, folder):
        found: dict[str, Any] = {title: under_ddp(rank, case) for title, case in cases.CASES.items()}
        found["drawn"] = under_ddp(rank, cases.CASES["AdamW, clipped"], width=cases.WIDE, coordinates=cases.SOME)
        found["without group"] = under_ddp(rank, cases.CASES["SGD"], process_group=None)
        found["sent, measured"] = collectives_of_a_training(rank, measured=True)
        found["sent, unmeasured"] = collectives_of_a_training(rank, measured=False)
        found["join"] = unequal_numbers(rank)
        found["one fails"] = one_measurement_fails(rank)
        found["a loss is missing"] = a_loss_is_missing(rank)
        found["probe"] = probes(rank)
        torch.save(found, f"{folder}/{rank}.pt")
