"""Optimizers of torch, schedulefree, pytorch_optimizer and timm: D, action and works against copies of θ and gradients.

Each walks through a noisy quadratic in float64. What has no formula for its mobility gets the effective one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_cases import EXACT, Walk, assert_right
from torch import nn
from torch.optim import SGD, Optimizer

from lightning_speedlimit.trajectory import TrajectoryMeter

STEPS = 9
MATRICES = ((4, 3), (3, 5))  # Muon takes nothing else
Make = Callable[[list[nn.Parameter]], Optimizer]


def walked(make: Make, swaps: bool = False, **more: Any) -> Walk:
    """`swaps`: to the averaged weights and back, after every third step."""
    walk = Walk(make, **more)
    (optimizer,) = walk.optimizers
    if swaps:
        optimizer.train()  # type: ignore[attr-defined]
    for k in range(STEPS):
        walk.backward()
        walk.step()
        if swaps and k % 3 == 2:
            trained = walk.copies.weights()
            optimizer.eval()  # type: ignore[attr-defined]
            if k == STEPS - 1:  # RAdam moves the average alone in its first steps
                assert not torch.equal(walk.copies.weights(), trained)
            optimizer.train()  # type: ignore[attr-defined]
    return walk


def assert_measured(walk: Walk) -> None:
    values = assert_right(walk.meter, walk.copies)
    assert values["displacement"] > 0
    assert values["moved_outside"] <= 1e-12 * values["path_length"]  # a swap and back: rounding
    walk.meter.close()


# -- torch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("make", "sizes"),
    [
        pytest.param(torch.optim.Muon, MATRICES, marks=pytest.mark.mode("torch.optim: Muon", "measured"), id="Muon"),
        pytest.param(
            torch.optim.Adafactor,
            ((4, 3), (5,)),
            marks=pytest.mark.mode("torch.optim: Adafactor", "measured"),
            id="Adafactor",
        ),
    ],
)
def test_of_torch(make: Any, sizes: Any, decay: float) -> None:
    """Their decoupled weight decay is no work."""
    assert_measured(walked(lambda p: make(p, lr=0.05, weight_decay=decay), sizes=sizes, shrink=0.05 * decay))


# -- schedulefree -----------------------------------------------------------------------------------------------

OPEN = ("SGDScheduleFree", "AdamWScheduleFree", "RAdamScheduleFree")
REFERENCES = ("SGDScheduleFreeReference", "AdamWScheduleFreeReference", "AdamWScheduleFreePaper")
CLOSURES = ("SGDScheduleFreeClosure", "AdamWScheduleFreeClosure", "RAdamScheduleFreeClosure")
WRAPPERS = ("ScheduleFreeWrapper", "ScheduleFreeWrapperReference")
SWAPPED = pytest.mark.mode("schedulefree: its optimizers, train() and eval() in between", "measured")


def test_all_its_classes_are_here() -> None:
    schedulefree = pytest.importorskip("schedulefree")
    there = {name for name, kind in vars(schedulefree).items() if isinstance(kind, type)}
    assert there == {*OPEN, *REFERENCES, *CLOSURES, *WRAPPERS}


@SWAPPED
@pytest.mark.parametrize("name", [*OPEN, *REFERENCES])
def test_of_schedulefree(name: str) -> None:
    make = getattr(pytest.importorskip("schedulefree"), name)
    assert_measured(walked(lambda p: make(p, lr=0.05), swaps=True))


@pytest.mark.mode("schedulefree: its optimizers that take a closure", "measured")
@pytest.mark.parametrize("name", CLOSURES)
def test_of_schedulefree_by_closure(name: str) -> None:
    make = getattr(pytest.importorskip("schedulefree"), name)
    walk = Walk(lambda p: make(p, lr=0.05))
    for _ in range(STEPS):
        walk.by_closure()
    assert_measured(walk)


@pytest.mark.mode(
    "schedulefree: its wrappers",
    "caveat",
    "`optimizers got ScheduleFreeWrapper, which has no step hooks`: TrajectoryMeter(optimizer.base) measures the "
    "iterates z of the optimizer within, at which its gradients are not taken",
)
@pytest.mark.parametrize("name", WRAPPERS)
def test_of_schedulefree_around_another(name: str) -> None:
    wrapper = getattr(pytest.importorskip("schedulefree"), name)
    walk = Walk(lambda p: SGD(p, lr=0.05))
    optimizer = wrapper(walk.optimizers[0])
    with pytest.raises(TypeError, match=rf"{name}, which has no step hooks.*TrajectoryMeter\(optimizer\.base\)"):
        TrajectoryMeter(optimizer)
    # The base's steps are seen between its hooks, not about the wrapper's.
    walk.optimizers[0].register_step_pre_hook(lambda *_: walk.copies.before.append(walk.copies.weights()))
    walk.optimizers[0].register_step_post_hook(lambda *_: walk.copies.after.append(walk.copies.weights()))
    optimizer.train()
    for _ in range(STEPS):
        walk.backward()
        walk.copies.raw.append(walk.copies.gradient())
        optimizer.step()
        optimizer.eval()
        optimizer.train()
    values = assert_right(walk.meter, walk.copies)
    iterates = torch.cat([optimizer.state[p]["z"].flatten() for p in walk.parameters])
    assert values["displacement"] == pytest.approx(float((iterates - walk.copies.before[0]).norm()), rel=EXACT)
    assert values["moved_outside"] == 0


# -- pytorch_optimizer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("Lion", marks=pytest.mark.mode("pytorch_optimizer: Lion", "measured")),
        pytest.param("SOAP", marks=pytest.mark.mode("pytorch_optimizer: SOAP", "measured")),
        pytest.param("Prodigy", marks=pytest.mark.mode("pytorch_optimizer: Prodigy", "measured")),
        pytest.param(
            "Muon", marks=pytest.mark.mode("pytorch_optimizer: Muon, with AdamW for what is no matrix", "measured")
        ),
    ],
)
def test_of_pytorch_optimizer(name: str) -> None:
    make = getattr(pytest.importorskip("pytorch_optimizer"), name)

    def muon(parameters: list[nn.Parameter]) -> Optimizer:
        groups = (
            {"params": [p for p in parameters if (p.ndim == 2) == matrix], "use_muon": matrix} for matrix in (0, 1)
        )
        return make(list(groups), lr=0.05)

    assert_measured(walked(muon if name == "Muon" else lambda p: make(p, lr=1.0 if name == "Prodigy" else 0.05)))


# -- timm -------------------------------------------------------------------------------------------------------


def names_in_timm() -> list[str]:
    try:
        import timm.optim
    except ImportError:
        return []

    names: list[str] = timm.optim.list_optimizers()
    return [name for name in names if not name.startswith(("bnb", "fused"))]  # these need a GPU


@pytest.mark.mode("timm.optim: all of its optimizers that run on a CPU", "measured")
@pytest.mark.parametrize("name", names_in_timm() or [pytest.param("", marks=pytest.mark.skip("timm is not there"))])
def test_of_timm(name: str) -> None:
    from timm.optim import create_optimizer_v2

    def make(parameters: list[nn.Parameter]) -> Optimizer:
        return create_optimizer_v2(parameters, opt=name, lr=0.05)

    if name != "adahessian":
        assert_measured(walked(make))
        return
    walk = Walk(make)  # by Hessians times vectors
    for _ in range(STEPS):
        walk.backward()
        for p in walk.parameters:
            p.grad = p.grad + (p - p.detach())  # the same gradient, which can be differentiated
        walk.step()
    assert_measured(walk)
