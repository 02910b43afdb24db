"""The compiled passes against torch's operations: the same numbers, and who gets none of them."""

from __future__ import annotations

import copy
import ctypes
import importlib.metadata
import math
import shutil
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop
from torch.optim.swa_utils import AveragedModel

from lightning_speedlimit.trajectory import TrajectoryMeter, compiled

SHAPES = [(), (1,), (7,), (8, 1), (3, 3), (255,), (16, 16), (257,), (40, 33), (5, 4, 3, 2), (3, 0)]
Make = Callable[[Any], Optimizer]
needs_library = pytest.mark.skipif(compiled.LIBRARY is None, reason="the compiled part was not built")


def test_it_is_there_where_it_could_be_built() -> None:
    try:
        importlib.metadata.distribution("lightning-speedlimit")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed here")
    if shutil.which("cc") is None:
        pytest.skip("there is no compiler")
    assert compiled._found() is not None


# -- the same numbers -------------------------------------------------------------------------------------------


def values_of(make: Make, library: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, float]:
    """Of twelve random steps in two groups: all values, layers, sketch and m; clip, dtype, absent: see the cases."""
    monkeypatch.setattr(compiled, "LIBRARY", library)
    clip, dtype, absent = options.pop("clip", 0.0), options.pop("dtype", torch.float32), options.pop("absent", False)
    dice = torch.Generator().manual_seed(3)
    parameters = [nn.Parameter(torch.randn(shape, generator=dice).to(dtype)) for shape in SHAPES]
    optimizer = make([{"params": parameters[:5]}, {"params": parameters[5:], "lr": 0.003}])
    layers = {id(p): str(i % 3) for i, p in enumerate(parameters)}
    meter = TrajectoryMeter(optimizer, layer_of=lambda p: layers[id(p)], gradient_changes="clipping", **options)
    for k in range(12):
        for i, p in enumerate(parameters):
            p.grad = torch.randn(p.shape, generator=dice).to(dtype) * (torch.rand(p.shape, generator=dice) > 0.2)
            if absent and (i + k) % 4 == 0:
                p.grad = None
        if clip:
            meter.observe_gradients()
            clip_grad_norm_(parameters, clip)
        if k == 6:
            with torch.no_grad():
                parameters[8].data[0] += 0.5  # outside of the steps
        meter.record_loss(1.0 / (k + 1))
        optimizer.step()
    values, sketch = meter.measure(sketch=True)
    found = values | {f"{layer} {n}": x for layer, own in meter.layers().items() for n, x in own.items()}
    assert sketch is not None
    found |= {f"sketch {i}": float(x) for i, x in enumerate(sketch)}
    for i, p in enumerate(parameters):
        if p.numel() and "RMSprop c" not in str(optimizer):
            found[f"m {i}"] = float(meter.accumulated_mobility(p).nansum())
    meter.close()
    return found


CASES: dict[str, tuple[Make, dict[str, Any]]] = {
    "SGD": (lambda p: SGD(p, lr=0.1), {}),
    "SGD, missing gradients": (lambda p: SGD(p, lr=0.1), {"absent": True}),
    "SGD, momentum": (lambda p: SGD(p, lr=0.01, momentum=0.9, nesterov=True), {}),
    "SGD, response": (lambda p: SGD(p, lr=0.01, momentum=0.9), {"momentum_mobility": "response"}),
    "SGD, L2": (lambda p: SGD(p, lr=0.1, weight_decay=0.1), {}),
    "SGD, L2, clipped": (lambda p: SGD(p, lr=0.1, weight_decay=0.1), {"clip": 5.0, "absent": True}),
    "SGD, maximize": (lambda p: SGD(p, lr=0.1, maximize=True), {}),
    "SGD, every second": (lambda p: SGD(p, lr=0.1), {"measure_every_n_steps": 2}),
    "Adam, L2": (lambda p: Adam(p, lr=0.01, weight_decay=0.1), {"absent": True}),
    "AMSGrad": (lambda p: Adam(p, lr=0.01, amsgrad=True), {}),
    "AdamW": (lambda p: AdamW(p, lr=0.01, weight_decay=0.1), {"absent": True}),
    "AdamW, clipped, by the rate": (lambda p: AdamW(p, lr=0.01, weight_decay=0.1), {"clip": 5.0, "clock": "lr"}),
    "AdamW, every second": (lambda p: AdamW(p, lr=0.01), {"measure_every_n_steps": 2}),
    "AdamW, rate 0": (lambda p: AdamW(p, lr=0.0, weight_decay=0.1), {}),
    "NAdam": (lambda p: NAdam(p, lr=0.01), {}),
    "RAdam": (lambda p: RAdam(p, lr=0.01), {}),
    "Adagrad": (lambda p: Adagrad(p, lr=0.01), {}),
    "RMSprop": (lambda p: RMSprop(p, lr=0.01), {}),
    "RMSprop, centered": (lambda p: RMSprop(p, lr=0.01, centered=True, momentum=0.5), {}),
    "AdamW, bfloat16": (lambda p: AdamW(p, lr=0.01), {"dtype": torch.bfloat16}),
    "AdamW, float64": (lambda p: AdamW(p, lr=0.01), {"dtype": torch.float64}),
}
BY_TORCH = {"RMSprop, centered", "AdamW, bfloat16", "AdamW, float64"}


@needs_library
@pytest.mark.parametrize("coordinates", ["all", 600])
@pytest.mark.parametrize("case", CASES)
def test_the_same_by_both(case: str, coordinates: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make, options = CASES[case]
    closed = [0]
    close_step = compiled.Passes.close_step

    def counted(self: compiled.Passes, *arguments: Any) -> None:
        closed[0] += 1
        close_step(self, *arguments)

    monkeypatch.setattr(compiled.Passes, "close_step", counted)
    ours = values_of(make, compiled.LIBRARY, monkeypatch, coordinates=coordinates, **options)
    assert (closed[0] > 0) == (case not in BY_TORCH)
    closed[0] = 0
    theirs = values_of(make, None, monkeypatch, coordinates=coordinates, **options)
    assert closed[0] == 0
    assert ours.keys() == theirs.keys()
    sketch = math.hypot(*(x for name, x in theirs.items() if name.startswith("sketch")))
    for name, value in theirs.items():
        # float32 products: 1e-7 of each; works add products of both signs, ratios and errors divide by such sums
        size = sketch if name.startswith("sketch") else abs(theirs["work_ito"]) if "work" in name else 0.0
        size = 1.0 if name == "signal_fraction" else theirs["gradient_noise"] if name == "gradient_signal" else size
        assert ours[name] == pytest.approx(value, rel=2e-5, abs=1e-6 * size, nan_ok=True), name


class Copies(defaultdict):  # type: ignore[type-arg]
    """An optimizer's state that is kept elsewhere: whoever asks gets tensors of his own."""

    def get(self, key: Any, default: Any = None) -> Any:
        found = super().get(key, default)
        return found and {name: value.clone() for name, value in found.items()}


@needs_library
def test_a_state_that_is_copied_for_each_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies stay until they have been read."""

    def run(library: Any) -> float:
        monkeypatch.setattr(compiled, "LIBRARY", library)
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(300, 300)) for _ in range(3)]
        optimizer = Adam([{"params": [p]} for p in parameters], lr=0.1)
        optimizer.state = Copies(dict)
        meter = TrajectoryMeter(optimizer)
        for _ in range(4):
            for p in parameters:
                p.grad = torch.randn_like(p)
            optimizer.step()
        action = meter.compute()["work_action"]
        meter.close()
        return action

    assert run(compiled._found()) == pytest.approx(run(None), rel=1e-6)  # float32 sums


@pytest.mark.parametrize("library", [compiled.LIBRARY, None], ids=["compiled", "torch"])
def test_what_is_not_a_number_has_not_moved_outside(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits are compared: a NaN is not equal to itself."""
    monkeypatch.setattr(compiled, "LIBRARY", library)
    for sizes in ((300, 40), (300_000, 200_000)):
        a, b = parameters = [nn.Parameter(torch.randn(n)) for n in sizes]
        optimizer = AdamW(parameters, lr=0.01)
        meter = TrajectoryMeter(optimizer, layer_of=lambda p, a=a: "a" if p is a else "b")  # type: ignore[misc]
        start = b.detach().clone()
        for k in range(4):
            for p in parameters:
                p.grad = torch.full_like(p, math.nan if p is a and k == 1 else 1.0)
            meter.observe_gradients()
            optimizer.step()
        assert meter.compute()["moved_outside"] == 0.0
        layer = meter.layers()["b"]
        assert layer["displacement"] == pytest.approx(float((b.detach() - start).norm()), rel=1e-5)
        assert layer["efficiency_action"] > 0.9
        meter.close()


# -- what is loaded ---------------------------------------------------------------------------------------------


def measured(number: int = 1) -> tuple[list[nn.Parameter], list[Optimizer], TrajectoryMeter]:
    parameters = [nn.Parameter(torch.randn(4000)) for _ in range(number)]
    optimizers: list[Optimizer] = [SGD([p], lr=0.1) for p in parameters]
    return parameters, optimizers, TrajectoryMeter(optimizers, coordinates=800 * number)


def step(parameters: list[nn.Parameter], optimizers: list[Optimizer]) -> None:
    for p, optimizer in zip(parameters, optimizers, strict=True):
        p.grad = torch.randn(4000)
        optimizer.step()


@pytest.mark.parametrize("library", [compiled.LIBRARY, None], ids=["compiled", "torch"])
def test_units_that_are_not_there_are_refused(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is left of what was refused: the next state is taken as if it were the first."""
    monkeypatch.setattr(compiled, "LIBRARY", library)
    parameters, optimizers, meter = measured(2)
    step(parameters, optimizers)
    state, action = copy.deepcopy(meter.state_dict()), meter.compute()["action"]
    meter.close()
    for wrong in (-1, 500):
        resumed = TrajectoryMeter(optimizers, coordinates=1600)
        bad = copy.deepcopy(state)
        bad["followers"][1]["motions"][0]["drawn"][0][-1] = wrong
        with pytest.raises(ValueError, match="damaged"):
            resumed.load_state_dict(bad)
        assert resumed.compute()["action"] == 0.0
        resumed.load_state_dict(state)
        assert resumed.compute()["action"] == pytest.approx(action, rel=1e-12)
        resumed.close()
    # Without another one it measures as one that is new: both optimizers, from the next step on.
    alone = TrajectoryMeter(optimizers, coordinates=1600)
    with pytest.raises(ValueError, match="damaged"):
        alone.load_state_dict(bad)
    before = [p.detach().clone() for p in parameters]
    step(parameters, optimizers)
    apart = sum(float((p.detach() - b).square().sum()) for p, b in zip(parameters, before, strict=True))
    assert alone.compute()["action"] == pytest.approx(apart, rel=0.2)  # 1600 of 8000 coordinates: 3 of its errors
    assert alone.measured_coordinates == 1600
    alone.close()


@needs_library
def test_a_state_that_is_written_over_is_not_looked_at_again() -> None:
    """As a file that was mapped into memory."""
    parameters, optimizers, meter = measured()
    step(parameters, optimizers)
    state = meter.state_dict()
    meter.close()
    resumed = TrajectoryMeter(optimizers, coordinates=800)
    resumed.load_state_dict(state)
    for units in state["followers"][0]["motions"][0]["drawn"]:
        units.fill_(10**12)
    before = resumed.compute()["action"]
    step(parameters, optimizers)
    assert resumed.recorder.failure is None
    assert resumed.compute()["action"] > before
    resumed.close()


def test_a_module_that_holds_its_meter_can_be_copied() -> None:
    net: Any = nn.Linear(20, 20)
    optimizer = AdamW(net.parameters(), lr=0.1)
    net.meter = TrajectoryMeter(optimizer)
    for _ in range(3):
        net(torch.randn(4, 20)).square().mean().backward()
        optimizer.step()
    AveragedModel(net)
    net.meter.close()


# -- who gets none ----------------------------------------------------------------------------------------------


def passes(sizes: list[int]) -> compiled.Passes:
    rows, low = [], 0
    for n in sizes:
        rows.append(slice(low, low + -(-n // 256)))
        low = rows[-1].stop
    return compiled.Passes(256, rows, sizes, [None] * len(sizes))


class Own(Tensor):
    pass


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(12, dtype=torch.float64),
        torch.zeros(12, dtype=torch.bfloat16),
        torch.zeros(24)[::2],
        torch.zeros(4, 3).T,
        torch.zeros(13),
        torch.zeros(12).to_sparse(),
        torch.zeros(12, device="meta"),
        torch.zeros(12).as_subclass(Own),
        torch._neg_view(torch.zeros(12)),
        torch.frombuffer(bytearray(49), dtype=torch.float32, offset=1),
    ],
    ids=[
        "double",
        "half",
        "gaps",
        "transposed",
        "longer",
        "sparse",
        "meta",
        "subclass",
        "negative view",
        "odd address",
    ],
)
def test_what_torch_has_to_bring(tensor: Tensor) -> None:
    plain, found = torch.ones(12), passes([12, 12])
    assert found.sources([plain, tensor]) is None
    known = found.sources([plain, None])
    assert known is not None
    assert list(known.addresses) == [plain.data_ptr(), None]


@needs_library
def test_a_copy_has_addresses_of_its_own() -> None:
    """Those of the first one may be another's soon."""
    parameter = nn.Parameter(torch.randn(4000))
    optimizer = SGD([parameter], lr=0.1)
    meter = TrajectoryMeter(optimizer, coordinates=800)
    parameter.grad = torch.randn(4000)
    optimizer.step()
    first = meter.recorder.followers[0].motions[0].coordinates
    second = copy.deepcopy(first)
    assert first.passes is not None
    assert second.passes is not None
    units = {int(p._pieces[0, 3]) for p in (first.passes, second.passes)}
    assert len(units) == 2
    assert units == {p._drawn[0].data_ptr() for p in (first.passes, second.passes) if p._drawn[0] is not None}
    into = second.vector()
    assert torch.equal(second.gather([parameter], into), first.gather([parameter], first.vector()))
    meter.close()


@needs_library
def test_a_library_of_other_lines_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled._found() is not None
    monkeypatch.setattr(compiled, "VERSION", compiled.VERSION + 1)
    assert compiled._found() is None
    monkeypatch.undo()
    monkeypatch.setattr(compiled, "Step", type("Step", (ctypes.Structure,), {"_fields_": [("theta", ctypes.c_void_p)]}))
    assert compiled._found() is None


def test_without_a_library_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "EXTENSION_SUFFIXES", [".none"])
    assert compiled._found() is None


@needs_library
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100_003])
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
def test_a_sum_of_squares_is_exact_whatever_its_size(size: int, scale: float) -> None:
    values = scale * torch.randn(size, generator=torch.Generator().manual_seed(0))
    found = compiled.norm_squared(values)
    assert found == pytest.approx(float(values.double().square().sum()), rel=1e-12)  # float64: as many roundings
    assert compiled.norm_squared(values.double()) is None
    assert compiled.norm_squared(torch.stack([values, values])[:, ::2]) is None or size < 2
