"""Trainings that one process does alone or several do together, and what each of them measures on the way.

The reference is always the one process that trains on all the batches: its loss is the mean over the parts of
the losses that the processes would have had.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_speedlimit.trajectory import TrajectoryMeter
from lightning_speedlimit.trajectory.follower import Follower

STEPS = 14
READ_AT = (3, 4, 9, STEPS)  # steps between readings that differ, one of them a single step
PARTS = ((6, 4), (3, 7), (5, 5))  # samples of the first and of the second process, by turns

Part = tuple[Tensor, Tensor]


class Net(nn.Module):
    """8 → 11 → 3, times a number: rows that two processes share unevenly, and of the number one has none."""

    def __init__(self, width: int = 11, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Linear(8, width)
        self.second = nn.Linear(width, 3)
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.second(torch.tanh(self.first(x)))


def parts(number: int, dtype: torch.dtype = torch.float64) -> Iterator[tuple[Part, Part]]:
    """Noisy classification; each batch cut in two of unequal sizes."""
    generator = torch.Generator().manual_seed(11)
    for k in range(number):
        x = torch.randn(10, 8, generator=generator, dtype=torch.float64).to(dtype)
        y = (x[:, :3].argmax(1) + (torch.rand(10, generator=generator) < 0.1)) % 3
        cut = PARTS[k % len(PARTS)][0]
        yield (x[:cut], y[:cut]), (x[cut:], y[cut:])


def loss_of(model: nn.Module, part: Part) -> Tensor:
    return nn.functional.cross_entropy(model(part[0]), part[1])


@dataclass(frozen=True)
class Case:
    """optimizer: of the parameters. clip: the largest norm of a gradient. options: the meter's."""

    optimizer: Callable[[Any], torch.optim.Optimizer]
    clip: float | None = None
    options: dict[str, Any] = field(default_factory=dict)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def two_groups(parameters: Any) -> torch.optim.Optimizer:
    first, *rest = parameters
    return torch.optim.Adam([{"params": [first], "lr": 0.02}, {"params": rest, "lr": 0.01}])


WIDE, SOME = 400, 1600  # a width of which two weights are large enough to draw from, and how many coordinates are drawn

CASES = {
    "SGD": Case(sgd),
    "SGD, momentum, L2, clipped": Case(momentum, clip=0.5),
    "AdamW, clipped": Case(adamw, clip=0.5),
    "Adam, two groups": Case(two_groups),
    "clock lr": Case(sgd, options={"clock": "lr"}),
    "every third step": Case(momentum, options={"measure_every_n_steps": 3}),
}


class Collectives(TorchDispatchMode):
    """Counts what is sent between processes, whoever sends it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace in ("c10d", "_c10d_functional", "c10d_functional")
        return func(*args, **(kwargs or {}))


def train(
    model: nn.Module,
    case: Case,
    losses: Callable[[tuple[Part, Part]], Tensor],
    *,
    clip: Callable[[float], Any] | None = None,
    measured: bool = True,
    sketch: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """One training; its readings, and the collectives of each."""
    optimizer = case.optimizer(model.parameters())
    meter = TrajectoryMeter(optimizer, **case.options, **options) if measured else None
    found: dict[str, Any] = {"readings": [], "reasons": [], "sketches": [], "collectives": [], "losses": []}
    for k, both in enumerate(parts(STEPS), start=1):
        optimizer.zero_grad()
        loss = losses(both)
        loss.backward()
        found["losses"].append(float(loss.detach()))
        if meter is not None:
            meter.observe_gradients()
            meter.record_loss(loss)
        if case.clip is not None:
            (clip or (lambda limit: nn.utils.clip_grad_norm_(model.parameters(), limit)))(case.clip)
        optimizer.step()
        if meter is None or k not in READ_AT:
            continue
        with Collectives() as sent:
            values, buckets = meter.measure(sketch=sketch)
        found["readings"].append(values)
        found["reasons"].append(dict(meter.reasons))
        found["sketches"].append(buckets)
        found["collectives"].append(sent.count)
    if meter is not None and "coordinates" in options:
        found["drawn"] = [meter.accumulated_mobility(p).isfinite() for p in model.parameters()]
        found["numbers"] = meter.measured_coordinates, meter.optimized_coordinates
    return found


def alone(case: Case, *, width: int = 11, **options: Any) -> dict[str, Any]:
    """The one process that trains on everything."""
    model = Net(width)
    return train(model, case, lambda both: sum(loss_of(model, part) for part in both) / 2, **options)


@contextmanager
def processes(rank: int, folder: str, size: int = 2) -> Iterator[None]:
    torch.set_num_threads(1)
    random.seed(0)
    torch.manual_seed(0)
    # A collective that one process never joins ends in an error, not in a hang.
    dist.init_process_group("gloo", f"file://{folder}/store", timeout=timedelta(seconds=60), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def measurement_that_fails(rank: int) -> Iterator[None]:
    """On the second process, at its sixth step."""
    plain = Follower.finish

    def failing(follower: Follower, *args: Any, **kwargs: Any) -> Any:
        if rank == 1 and follower.motions[0].members[0].steps == 5:
            raise RuntimeError("no memory left")
        return plain(follower, *args, **kwargs)

    Follower.finish = failing  # type: ignore[method-assign]
    try:
        yield
    finally:
        Follower.finish = plain  # type: ignore[method-assign]
