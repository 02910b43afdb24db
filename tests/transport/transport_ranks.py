"""What each of two ranks does in its own process; apart from the tests, so that it imports no more than it needs."""

import math
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transport_cases import Draw, features, independent, lazy, lazy_and_permuted, softplus_ridges

from lightning_speedlimit.transport import Transport, wasserstein2_squared

CUT = 11  # coordinates of the first rank


def weighted(draw: Draw, n: int, d: int) -> tuple[Tensor, Tensor]:
    return draw.normal(n, d), draw.normal(n + 7, d)


def duplicates(draw: Draw, n: int, d: int) -> tuple[Tensor, Tensor]:
    x = draw.normal(n, d)[torch.arange(n) % (n // 2)]
    return x, x.roll(1, 0) + 1e-6 * draw.normal(n, d)


CASES: dict[str, tuple[Callable[[Draw, int, int], tuple[Tensor, Tensor]], int]] = {
    "lazy": (lazy, 40),
    "softplus": (softplus_ridges, 40),
    "permuted": (lazy_and_permuted, 40),
    "duplicates": (duplicates, 40),
    "independent": (independent, 40),
    "beyond 512": (features, 530),
    "weighted": (weighted, 30),
    "moments": (independent, 20),
}


def clouds(title: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
    kind, n = CASES[title]
    x, y = kind(Draw(n), n, 30)
    if title != "weighted":
        return x, y, {}
    v = torch.rand(len(y), generator=Draw(1).generator).double()
    return x, y, {"weights_y": v / v.sum()}


def ways(cloud: Tensor) -> dict[str, Callable[[], Any]]:
    return {"tensor": lambda: cloud, "list": lambda: cloud.split(4, 1), "generator": lambda: iter(cloud.split(4, 1))}


def fields(found: Transport) -> dict[str, Any]:
    return {name: getattr(found, name) for name in Transport.__dataclass_fields__}


def by(title: str, x: object, y: object, **options: Any) -> Transport:
    with pytest.MonkeyPatch.context() as patch:
        if title == "moments":
            patch.setattr("lightning_speedlimit.transport.wasserstein2.MAX_PAIRS", 0)
        return wasserstein2_squared(x, y, **options)  # type: ignore[arg-type]


def work_of_a_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # A collective that one rank never joins ends in an error, not in a hang.
    dist.init_process_group("gloo", f"file://{folder}/store", timeout=timedelta(seconds=60), rank=rank, world_size=2)
    part = slice(None, CUT) if rank == 0 else slice(CUT, None)
    found: dict[str, Any] = {}
    for title in CASES:
        x, y, options = clouds(title)
        mine = ways(x[:, part]), ways(y[:, part])
        for way in mine[0]:
            result = by(title, mine[0][way](), mine[1][way](), process_group=dist.group.WORLD, **options)
            found[f"{title} {way}"] = fields(result)
    # A group of one rank, and ranks that are not 0 of the world; all ranks make all groups.
    for k, group in enumerate([dist.new_group([0]), dist.new_group([1])]):
        if k == rank:
            x, y, _ = clouds("permuted")
            found["alone"] = fields(wasserstein2_squared(x, y, process_group=group))
    for name, bad in (("x", math.nan), ("y", math.inf)):
        given = {"x": torch.zeros(3, 4), "y": torch.ones(3, 4)}
        if rank == 1:
            given[name][1, 2] = bad  # one rank sees it; both must raise, or the other would wait for ever
        try:
            wasserstein2_squared(**given, process_group=dist.group.WORLD)
        except ValueError as error:
            found[f"bad {name}"] = str(error)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
