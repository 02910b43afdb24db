"""Weights that are moved, replaced or laid out anew between steps: never in the displacement, and said."""

import functools
import math
import re
from collections.abc import Callable, Collection

import pytest
import torch
from optimizer_cases import EXACT, KINEMATIC, WORKS, Walk, assert_right
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from trajectory_reference import Run, measure

from lightning_speedlimit.trajectory import TrajectoryMeter

STEPS, RATE = 10, 0.1
ALL = (*KINEMATIC, *WORKS, "moved_outside", "net_displacement")
KINDS = {"SGD": (SGD, {}), "Adam": (Adam, {}), "AdamW": (AdamW, {"weight_decay": 0.5})}
kinds = pytest.mark.parametrize("kind", KINDS)


def walk_of(kind: str = "SGD", dtype: torch.dtype = torch.float64) -> Walk:
    make, options = KINDS[kind]
    shrink = RATE * options.get("weight_decay", 0.0)
    return Walk(lambda parameters: make(parameters, lr=RATE, **options), dtype=dtype, shrink=shrink)


def edited(walk: Walk, edit: Callable[[Tensor], object], at: Collection[int]) -> Walk:
    """Each parameter is edited before the steps `at`; STEPS: after the last."""
    for k in range(STEPS + 1):
        for p in walk.parameters if k in at else ():
            edit(p)
        if k < STEPS:
            walk.backward()
            walk.step()
    return walk


EDITS: dict[str, Callable[[Tensor], object]] = {
    "in place": torch.no_grad()(lambda p: p.clamp_(-0.5, 0.5)),
    "through data": lambda p: p.data.clamp_(-0.5, 0.5),
    "one coordinate": lambda p: p.data.view(-1)[-1:].add_(0.7),
    "replaced": lambda p: setattr(p, "data", p.data + 0.3),
}
edits = pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)


@kinds
@edits
@pytest.mark.parametrize("at", [{1}, {7}, {STEPS - 1}, set(range(1, STEPS))], ids=["1", "7", "last", "always"])
@pytest.mark.mode("weights edited between steps", "measured", "left out of the displacement; their size is reported")
def test_an_edit_is_no_displacement(kind: str, edit: Callable[[Tensor], object], at: set[int]) -> None:
    walk = edited(walk_of(kind), edit, at)
    values = assert_right(walk.meter, walk.copies, ALL)
    ends = float((walk.copies.after[-1] - walk.copies.before[0]).norm())
    assert abs(ends / values["displacement"] - 1) > 1e-3, "with the edits it would be another"
    assert re.search(rf"\b{len(at)}\b", walk.meter.reasons["displacement"]), "before how many steps"
    # The weighted bound holds for Σ u as it does for any sum; SGD's is the kinematic one.
    assert 0 < values["efficiency_action"] <= 1 + 1e-12
    if kind == "SGD":
        assert values["efficiency_action"] == pytest.approx(values["kinematic_efficiency"], rel=EXACT)


def test_edits_of_float32_weights() -> None:
    # float32: updates of 0.1 of weights of 1 are differences known to 1e-6 each, at random signs.
    walk = edited(walk_of(dtype=torch.float32), EDITS["through data"], range(1, STEPS))
    assert_right(walk.meter, walk.copies, ALL, rel=1e-5)


@edits
@pytest.mark.parametrize("at", [{0}, {STEPS}], ids=["before the first step", "after the last"])
def test_an_edit_that_no_two_steps_enclose(edit: Callable[[Tensor], object], at: set[int]) -> None:
    walk = edited(walk_of(), edit, at)
    assert assert_right(walk.meter, walk.copies, ALL)["moved_outside"] == 0.0
    assert "displacement" not in walk.meter.reasons


@pytest.mark.parametrize("turn", [lambda p: p.data.t(), lambda p: p.data.t().clone()], ids=["strides", "values"])
def test_a_square_matrix_that_is_turned(turn: Callable[[Tensor], Tensor]) -> None:
    """By its strides alone the same numbers lie in the same memory, and are those of other coordinates."""
    walk = Walk(lambda parameters: SGD(parameters, lr=RATE), sizes=((4, 4), (5,)))
    edited(walk, lambda p: setattr(p, "data", turn(p)) if p.dim() == 2 else None, {4})
    assert assert_right(walk.meter, walk.copies, ALL)["moved_outside"] > 1.0


def test_a_small_edit_is_measured_and_not_worth_a_word() -> None:
    """Below 1e-6 of the path length."""
    walk = edited(walk_of(), lambda p: p.data.add_(1e-9), {4})
    # 17 coordinates by 1e-9, of weights of 1 whose ulp is 2e-16
    assert walk.meter.compute()["moved_outside"] == pytest.approx(17**0.5 * 1e-9, rel=1e-6)
    assert "displacement" not in walk.meter.reasons


def test_a_parameter_that_waits_for_its_first_gradient() -> None:
    """Its θ_0 is that of the optimizer's first step: what moves it before its own first gradient is outside."""
    walk = walk_of()
    for k in range(STEPS):
        walk.backward()
        if k == 2:
            walk.parameters[1].data.add_(0.5)
        if k < 4:
            walk.parameters[1].grad = None
        walk.step()
    assert assert_right(walk.meter, walk.copies, ALL)["moved_outside"] == pytest.approx(5**0.5 * 0.5, rel=EXACT)


@torch.no_grad()
def copied(parameters: list[nn.Parameter], elsewhere: Callable[[], object]) -> None:
    """Averages are copied in, or FGM's perturbation added, and the own values are copied back."""
    held = [p.clone() for p in parameters]
    for p in parameters:
        p.mul_(0.9)
    elsewhere()
    for p, h in zip(parameters, held, strict=True):
        p.copy_(h)


def swapped(parameters: list[nn.Parameter], elsewhere: Callable[[], object], saved: bool = False) -> None:
    """The parameters point to other tensors, and back to their own; `saved`: to clones of what these were."""
    held = [p.data.clone() if saved else p.data for p in parameters]
    for p in parameters:
        p.data = p.data.add_(0.3) if saved else p.data.sign()
    elsewhere()
    for p, h in zip(parameters, held, strict=True):
        p.data = h


Swap = Callable[[list[nn.Parameter], Callable[[], object]], None]
SWAPS: dict[str, Swap] = {"copied": copied, "swapped": swapped, "saved": functools.partial(swapped, saved=True)}
swaps = pytest.mark.parametrize("swap", SWAPS.values(), ids=SWAPS)


@kinds
@swaps
@pytest.mark.parametrize("at", [{0}, {1}, {7}, set(range(STEPS))], ids=["0", "1", "7", "always"])
@pytest.mark.mode("weights swapped and restored (averages, FGM)", "measured", "restored bitwise, they have not moved")
def test_a_gradient_taken_elsewhere(kind: str, swap: Swap, at: set[int]) -> None:
    walk = walk_of(kind)
    for k in range(STEPS):
        walk.backward()
        if k in at:
            swap(walk.parameters, lambda: walk.backward(another=False))
        walk.step()
    assert assert_right(walk.meter, walk.copies, ALL)["moved_outside"] == 0.0
    assert "displacement" not in walk.meter.reasons


@swaps
def test_a_validation_with_other_weights(swap: Swap) -> None:
    """Numbers read within it are those of the training's weights."""
    walk = walk_of()
    for k in range(STEPS):
        walk.backward()
        walk.step()
        if k in (2, 5, STEPS - 1):
            swap(walk.parameters, lambda: assert_right(walk.meter, walk.copies))
    assert assert_right(walk.meter, walk.copies, ALL)["moved_outside"] == 0.0
    assert not {"displacement", "kinematic_efficiency"} & set(walk.meter.reasons)


def clone(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data.clone()


LAST, FIRST = (
    functools.partial(nn.Module.to, memory_format=layout) for layout in (torch.channels_last, torch.contiguous_format)
)
LAYOUTS = [{3: LAST}, {3: LAST, 6: FIRST}, {0: LAST, 5: FIRST}, {3: clone}]


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
@pytest.mark.parametrize("layouts", LAYOUTS, ids=["channels_last", "there and back", "from channels_last", "cloned"])
def test_the_same_values_in_another_layout(kind: str, layouts: dict[int, Callable[[nn.Module], object]]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 2)).double()
    optimizer = KINDS[kind][0](model.parameters(), lr=0.05)
    meter, run = TrajectoryMeter(optimizer), Run(optimizer)
    for k in range(STEPS):
        if k in layouts:
            layouts[k](model)
        found = model(torch.randn(2, 3, 6, 6, dtype=torch.float64))
        optimizer.zero_grad()
        (found.square().sum() - found.sum()).backward()
        run.step()
    expected, values = measure(run), meter.compute()
    for name in (*KINEMATIC, *WORKS, "work_action", "efficiency_action"):
        assert values[name] == pytest.approx(expected[name], rel=EXACT), name
    for p, mobility in expected.mobility.items():  # each coordinate's, in the parameter's own order
        m = torch.as_tensor(meter.accumulated_mobility(p), dtype=torch.float64).expand(p.shape)
        torch.testing.assert_close(m, mobility.reshape(p.shape), rtol=EXACT, atol=0.0)
    assert values["moved_outside"] == 0.0


@pytest.mark.parametrize("coordinates", ["all", 96])
@pytest.mark.parametrize("at", [set(), {2, 5}], ids=["never", "twice"])
@pytest.mark.parametrize("marked", [True, False])
def test_what_the_host_sees_at_once_is_what_a_device_would_say(
    coordinates: int | str, at: set[int], marked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU numpy takes drawn rows and adds up products, and weights that have not moved are seen as such at once.

    Where a device's weights are moved through .data, nothing tells so before a reading: θ_0 is lost, and it says so.
    """
    found = []
    for hosts in (("cpu",), ()):
        monkeypatch.setattr("lightning_speedlimit.trajectory.gathering.HOST", hosts)
        torch.manual_seed(4)
        weight = nn.Parameter(torch.randn(1000))
        optimizer = SGD([weight], lr=0.1)
        meter = TrajectoryMeter(optimizer, coordinates=coordinates)  # type: ignore[arg-type]
        for k in range(8):
            if k in at:
                (weight.detach() if marked else weight.data).add_(0.01)
            weight.grad = weight.detach().sin() * (1 + k)
            optimizer.step()
        found.append(meter.compute())
        meter.close()
    assert (found[0]["moved_outside"] > 0) is bool(at)
    if at and not marked:
        assert math.isnan(found[1].pop("net_displacement"))
        assert ".data" in meter.reasons["net_displacement"]
        assert "from the first weights" not in meter.reasons["displacement"]
        lost = {name for name in found[0] if name.startswith("net_displacement")}
        found = [{name: value for name, value in values.items() if name not in lost} for values in found]
    # Float32 sums of a row's products, in another order: 6e-8 each; what cancels, and errors of it, are ten times less.
    assert found[0] == pytest.approx(found[1], rel=1e-5, nan_ok=True)
