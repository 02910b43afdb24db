"""What each of two processes does where it holds a part of each parameter; apart, so that it imports little."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from ranks_cases import (
    CASES,
    READ_AT,
    SOME,
    STEPS,
    WIDE,
    Case,
    Collectives,
    Net,
    loss_of,
    measurement_that_fails,
    parts,
    processes,
    sgd,
    train,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_speedlimit.trajectory import TrajectoryMeter, reading, stepwise
from lightning_speedlimit.trajectory import ranks as process_ranks


def fsdp2(*shape: int, width: int = 11) -> nn.Module:
    """Two dimensions: replicas of shards."""
    model = Net(width)
    names = ("replica", "shard")[-len(shape) :]
    fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
    return model


def fsdp1(**options: Any) -> nn.Module:
    return FullyShardedDataParallel(Net(), device_id=torch.device("cpu"), **options)


def tensor_parallel() -> nn.Module:
    """The first weight cut by rows, the second by columns; its bias and the number are whole on both processes."""
    plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
    return parallelize_module(Net(12), init_device_mesh("cpu", (2,)), plan)


def clip_by_hand(model: nn.Module) -> Callable[[float], None]:
    """By the norm of the whole gradient, written without DTensor or FSDP."""

    def clip(limit: float) -> None:
        mine = [p.grad for p in model.parameters() if p.grad is not None]
        square = sum((g.square().sum() for g in mine), torch.zeros((), dtype=torch.float64))
        dist.all_reduce(square)
        for g in mine:
            g.mul_(torch.clamp(limit / (square.sqrt() + 1e-6), max=1.0))

    return clip


def clip_each_by_its_own(model: nn.Module) -> Callable[[float], None]:
    """A mistake that is easily made: each process clips by the norm of its shard."""

    def clip(limit: float) -> None:
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.numel()], limit)

    return clip


WAYS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "FSDP2": (lambda: fsdp2(2), {}),
    "FSDP2, replicas": (lambda: fsdp2(2, 1), {}),
    "FSDP2, replicas of shards": (lambda: fsdp2(1, 2), {}),
    "tensor parallel": (tensor_parallel, {}),
    "FSDP, flat parameters": (fsdp1, {}),
    "FSDP, original parameters": (lambda: fsdp1(use_orig_params=True), {}),
}


def under(way: str, rank: int, case: Case, **options: Any) -> dict[str, Any]:
    make, given = WAYS[way]
    model = make()
    whole = way == "tensor parallel"  # both processes see all batches

    def losses(both: Any) -> Any:
        return sum(loss_of(model, part) for part in both) / 2 if whole else loss_of(model, both[rank])

    if way.startswith("FSDP,"):
        given = given | {"process_group": dist.group.WORLD}
        options = {"clip": clip_by_hand(model)} | options
    return train(model, case, losses, **(given | options))


SHAPES, SEEDS = ((2,), (2, 1)), 16  # shards, and replicas of the whole
RESUMED = ("SGD", "Adam, two groups", "every third step")


def cases_of(way: str) -> dict[str, Case]:
    if way == "tensor parallel":  # torch clips no mixture of whole and sharded gradients
        return {title: case for title, case in CASES.items() if case.clip is None}
    if way == "FSDP, flat parameters":  # has one parameter, not two groups
        return {title: case for title, case in CASES.items() if "groups" not in title}
    return CASES


def sent(way: str, rank: int, *, measured: bool) -> int:
    with Collectives() as mode:
        under(way, rank, CASES["SGD"], measured=measured)
    return mode.count


def drawn(rank: int, shape: tuple[int, ...], seed: int = 0, every: int = 1) -> dict[str, Any]:
    model = fsdp2(*shape, width=WIDE)
    options = {"coordinates": SOME, "seed": seed, "measure_every_n_steps": every}
    return train(model, CASES["AdamW, clipped"], lambda both: loss_of(model, both[rank]), **options)


def layers(model: nn.Module, losses: Callable[[Any], Any]) -> dict[str, dict[str, float]]:
    optimizer = sgd(model.parameters())
    meter = TrajectoryMeter(optimizer, layer_of=lambda p: "matrices" if p.ndim > 1 else "vectors")
    for both in parts(5):
        optimizer.zero_grad()
        losses(both).backward()
        optimizer.step()
    return meter.compute_layers()


def layers_of_shards(rank: int) -> dict[str, dict[str, float]]:
    model = fsdp2(2)
    return layers(model, lambda both: loss_of(model, both[rank]))


def silent_norm(rank: int) -> tuple[float, float, float]:
    """What `g.norm()` of a sharded gradient says where it is read, the true norm, and ours."""
    model = fsdp2(2)
    optimizer = sgd(model.parameters())
    meter = TrajectoryMeter(optimizer)
    loss_of(model, next(parts(1))[rank]).backward()
    gradients = [p.grad for p in model.parameters()]
    local = torch.stack([g.norm().to_local() if isinstance(g, DTensor) else g.norm() for g in gradients]).norm()
    whole = torch.stack([g.full_tensor().norm() for g in gradients]).norm()  # type: ignore[union-attr]
    optimizer.step()
    return float(local), float(whole), meter.compute()["grad_norm"]


def one_fails(rank: int) -> dict[str, Any]:
    with measurement_that_fails(rank):
        return under("FSDP2", rank, CASES["SGD"])


def resumed(rank: int, case: Case) -> dict[str, float]:
    """The meter is taken off in mid-run, between readings, and another goes on with what it knew."""
    model = fsdp2(2)
    optimizer = case.optimizer(model.parameters())
    meter = TrajectoryMeter(optimizer, **case.options)
    for k, both in enumerate(parts(STEPS), start=1):
        optimizer.zero_grad()
        loss = loss_of(model, both[rank])
        loss.backward()
        meter.record_loss(loss)
        optimizer.step()
        if k == READ_AT[1]:
            meter.compute()
        if k == READ_AT[1] + 3:
            state = meter.state_dict()
            meter.close()
            meter = TrajectoryMeter(optimizer, **case.options)
            meter.load_state_dict(state)
    return meter.compute()


def read_too_seldom(rank: int) -> list[tuple[dict[str, float], dict[str, str]]]:
    """Six steps between two readings, with room for five; then one step and a reading more, and the same resumed."""
    model = fsdp2(2)
    optimizer = sgd(model.parameters())
    meter, found = TrajectoryMeter(optimizer), []
    most = process_ranks.MOST
    for module in (process_ranks, reading, stepwise):
        module.MOST = 5
    for k, both in enumerate(parts(9), start=1):
        loss_of(model, both[rank]).backward()
        optimizer.step()
        if k in (2, 8, 9):
            found.append((meter.compute(), meter.reasons))
    again = TrajectoryMeter(optimizer)
    again.load_state_dict(meter.state_dict())
    found.append((again.compute(), again.reasons))
    for module in (process_ranks, reading, stepwise):
        module.MOST = most
    return found


def summands(rank: int) -> tuple[float, dict[str, str]]:
    """A gradient whose processes hold summands of it."""
    mesh = init_device_mesh("cpu", (2,))
    weight = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Replicate()]))
    optimizer = sgd([weight])
    meter = TrajectoryMeter(optimizer)
    weight.grad = DTensor.from_local(torch.full((4,), rank + 1.0), mesh, [Partial()])
    optimizer.step()
    return meter.compute()["path_length"], meter.reasons


def without_group() -> str:
    try:
        TrajectoryMeter(sgd(fsdp1().parameters()))
    except ValueError as error:
        return str(error)
    return ""


def work_of_a_rank(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    with processes(rank, folder):
        found: dict[str, Any] = {
            f"{way}: {title}": under(way, rank, case) for way in WAYS for title, case in cases_of(way).items()
        }
        found["sent"] = {way: (sent(way, rank, measured=True), sent(way, rank, measured=False)) for way in WAYS}
        found["drawn"] = {shape: [drawn(rank, shape, seed) for seed in range(SEEDS)] for shape in SHAPES}
        found["layers"] = layers_of_shards(rank)
        found["norms"] = silent_norm(rank)
        found["one fails"] = one_fails(rank)
        found["without group"] = without_group()
        found["resumed"] = {title: resumed(rank, CASES[title]) for title in RESUMED}
        found["summands"] = summands(rank)
        found["read too seldom"] = read_too_seldom(rank)
        model = fsdp1(use_orig_params=True)
        own = Case(CASES["SGD"].optimizer, clip=0.2)
        found["clipped apart"] = train(
            model,
            own,
            lambda both: loss_of(model, both[rank]),
            clip=clip_each_by_its_own(model),
            process_group=dist.group.WORLD,
            entropy_production="ito",
        )
        torch.save(found, f"{folder}/{rank}.pt")
