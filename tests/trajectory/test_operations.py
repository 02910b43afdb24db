"""How many tensor operations a meter adds to a step: what an accelerator's host pays for, each of them once."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from dispatched import Counter
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_speedlimit import TrajectoryMeter
from lightning_speedlimit.trajectory import compiled

STEPS = 6
KINDS: dict[str, tuple[type[Optimizer], int]] = {"SGD": (SGD, 60), "AdamW": (AdamW, 90)}
kinds = pytest.mark.parametrize("kind", KINDS)


def dispatched(
    kind: str, shapes: list[tuple[int, ...]], measured: bool, extra: Callable[[Tensor], object] | None
) -> int:
    """Operations of `step` with both hooks, the most of the third step and those after it."""
    parameters = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = KINDS[kind][0](parameters, lr=1e-3)
    meter = TrajectoryMeter(optimizer, coordinates="all") if measured else None
    if measured and extra is not None:
        optimizer.register_step_post_hook(lambda *stepped: [extra(p.data) for p in parameters] and None)
    counts = []
    for _ in range(STEPS):
        for p in parameters:
            p.grad = torch.randn_like(p)
        with Counter() as counter:
            optimizer.step()
        counts.append(counter.count)
    if meter is not None:
        meter.close()
    return max(counts[2:])


def added(kind: str, shapes: list[tuple[int, ...]], extra: Callable[[Tensor], object] | None = None) -> int:
    return dispatched(kind, shapes, True, extra) - dispatched(kind, shapes, False, extra)


def mlp(*sizes: int) -> list[tuple[int, ...]]:
    return [shape for a, b in pairwise(sizes) for shape in ((b, a), (b,))]


MLP = mlp(64, 512, 512, 10)
SMALL: list[tuple[int, ...]] = [(4, 3) if i % 2 else (5,) for i in range(146)]


@kinds
@pytest.mark.usefixtures("on_a_device")
def test_a_small_network(kind: str) -> None:
    assert added(kind, MLP) <= KINDS[kind][1]


@kinds
@pytest.mark.usefixtures("on_a_device")
def test_many_small_parameters(kind: str) -> None:
    assert added(kind, SMALL) <= KINDS[kind][1] + 2 * len(SMALL)


@kinds
def test_growth_with_the_number_of_parameters(kind: str) -> None:
    """None: they are brought together in a single operation."""
    assert len({added(kind, [(5, 4)] * number) for number in (10, 110, 210)}) == 1


@kinds
def test_growth_with_their_size(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """None."""
    monkeypatch.setattr(compiled, "LIBRARY", None)  # whose passes are not counted
    assert len({added(kind, [(n,)]) for n in (10, 1000, 1_000_000)}) == 1


@kinds
def test_the_counts_can_fail(kind: str) -> None:
    """Three operations more for each parameter would be too many."""

    def three(p: Tensor) -> None:
        p.abs().sum().sqrt()

    few, many = [(5, 4)] * 10, [(5, 4)] * 110
    assert added(kind, many, three) >= added(kind, few, three) + 3 * 100
    assert added(kind, SMALL, three) > KINDS[kind][1] + 2 * len(SMALL)
