"""What a meter keeps: as many vectors of the measured coordinates as it says, and no gradient."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import SGD, Adadelta, Adam, AdamW, Optimizer, RMSprop

from lightning_speedlimit.trajectory import TrajectoryMeter, compiled

NUMEL = 1 << 20


@pytest.fixture
def _only_new_objects() -> Iterator[None]:
    """A collection looks at what the test makes; all that the libraries made would take it a third of a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_only_new_objects")
@pytest.mark.parametrize("kind", [SGD, Adam, AdamW], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("options", [{}, {"measure_every_n_steps": 3}, {"coordinates": 100}], ids=str)
def test_gradients_are_not_kept(kind: type[Optimizer], options: dict[str, Any]) -> None:
    shapes = [(), (5, 7), (4, 3, 3, 3), (70_001, 2)]
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = kind(parameters, lr=0.01)
    meter = TrajectoryMeter(optimizer, **options)
    for _ in range(4):
        for p in parameters:
            p.grad = torch.randn_like(p)
        tensors = [weakref.ref(p.grad) for p in parameters]
        memory = [StorageWeakRef(p.grad.untyped_storage()) for p in parameters]  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        gc.collect()
        assert all(t() is None for t in tensors)
        assert all(m.expired() for m in memory)
    meter.close()


def test_a_kept_view_would_be_noticed() -> None:
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.ones(4)
    memory = StorageWeakRef(p.grad.untyped_storage())
    view = p.grad.detach().view(-1)
    p.grad = None
    gc.collect()
    assert not memory.expired()
    del view
    gc.collect()
    assert memory.expired()


def tensors_under(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors reachable through attributes and containers; optimizers are passed by."""
    if id(thing) in seen or isinstance(thing, Optimizer | type | str | int | float | bytes):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        for key, value in thing.items():
            yield from tensors_under(key, seen)
            yield from tensors_under(value, seen)
    elif isinstance(thing, list | tuple | set):
        for value in thing:
            yield from tensors_under(value, seen)
    elif hasattr(thing, "__dict__"):
        yield from tensors_under(vars(thing), seen)


def copies_kept(meter: TrajectoryMeter, optimizer: Optimizer, weight: nn.Parameter) -> float:
    """Memory that a meter keeps alive beside the training's own, in copies of the parameters."""
    own = {weight.untyped_storage().data_ptr()}
    own |= {
        value.untyped_storage().data_ptr()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    }
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_under(meter, set())}
    return sum(size for place, size in sizes.items() if place not in own) / weight.untyped_storage().nbytes()


# Vectors of all coordinates that stay, and those to work in: by operations, and where there are compiled passes.
MEMORY = [
    ("SGD", SGD, {}, {}, 6, 3, 0),
    ("SGD momentum", SGD, {"momentum": 0.9, "weight_decay": 0.1}, {}, 7, 3, 0),
    ("Adam", Adam, {}, {}, 7, 3, 0),
    ("AdamW", AdamW, {"weight_decay": 0.1}, {}, 9, 3, 0),
    ("AdamW without decay", AdamW, {"weight_decay": 0.0}, {}, 7, 3, 0),
    ("AdamW sampled", AdamW, {"weight_decay": 0.1}, {"measure_every_n_steps": 2}, 9, 3, 0),
    ("RMSprop", RMSprop, {}, {}, 7, 3, 0),
    ("RMSprop centered", RMSprop, {"centered": True}, {}, 7, 4, 4),
    ("RMSprop response", RMSprop, {"momentum": 0.9}, {"momentum_mobility": "response"}, 8, 3, 3),
    ("Adadelta", Adadelta, {}, {}, 8, 3, 3),
]


@pytest.mark.parametrize("library", [compiled.LIBRARY, None], ids=["compiled", "torch"])
@pytest.mark.parametrize(
    ("kind", "options", "meter_options", "vectors", "work", "least"),
    [m[1:] for m in MEMORY],
    ids=[m[0] for m in MEMORY],
)
def test_memory_in_vectors(
    kind: type[Optimizer], options: dict[str, Any], meter_options: dict[str, Any], vectors: int, work: int, least: int,
    library: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(compiled, "LIBRARY", library)
    weight = nn.Parameter(torch.zeros(NUMEL))
    optimizer = kind([weight], lr=0.01, **options)
    meter = TrajectoryMeter(optimizer, coordinates="all", **meter_options)
    for _ in range(4):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    # On top some thirty numbers for each row of 256, twice as wide.
    copies = vectors + (work if library is None else least)
    assert copies <= copies_kept(meter, optimizer, weight) < copies + 0.2
    meter.compute()
    assert copies <= copies_kept(meter, optimizer, weight) < copies + 0.2
    meter.close()


@pytest.mark.parametrize("number", ["all", 8192])
def test_the_sketch_keeps_half_a_number_for_each_measured_coordinate(number: Any) -> None:
    weight = nn.Parameter(torch.zeros(NUMEL))
    optimizer = SGD([weight], lr=0.01)
    meter = TrajectoryMeter(optimizer, coordinates=number)
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    before = copies_kept(meter, optimizer, weight)
    meter.sketch()
    share = 0.5 if number == "all" else 0.5 * 8192 / NUMEL
    assert copies_kept(meter, optimizer, weight) - before == pytest.approx(share, rel=0.01)
    meter.close()


def test_drawn_coordinates_are_all_that_is_kept() -> None:
    weight = nn.Parameter(torch.zeros(NUMEL))
    optimizer = AdamW([weight], lr=0.01)
    meter = TrajectoryMeter(optimizer, coordinates=8192)
    for _ in range(3):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    # Nine vectors of 8192 and scratch for two, and forty numbers in float64 for each unit of 8.
    assert copies_kept(meter, optimizer, weight) < 22 * 8192 / NUMEL
    meter.close()


@pytest.mark.parametrize("library", [compiled.LIBRARY, None], ids=["compiled", "torch"])
@pytest.mark.parametrize("drawn", ["all", 256])
def test_steps_keep_nothing(drawn: Any, library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever parameters are without a gradient."""
    monkeypatch.setattr(compiled, "LIBRARY", library)
    parameters, dice = [nn.Parameter(torch.randn(30)) for _ in range(40)], torch.Generator().manual_seed(0)
    optimizer = AdamW(parameters, lr=0.01)
    meter, counts = TrajectoryMeter(optimizer, coordinates=drawn), []
    for _ in range(30):
        for p in parameters:
            p.grad = torch.randn(30, generator=dice) if torch.rand((), generator=dice) < 0.5 else None
        optimizer.step()
        counts.append(sum(1 for _ in tensors_under(meter, set())))
    # By then each parameter has had a state, whose number of steps is looked at.
    assert max(counts[10:]) <= counts[9]
    meter.close()


@pytest.mark.parametrize("hosts", [("cpu",), ()], ids=["host", "device"])
def test_a_reading_keeps_nothing(hosts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_speedlimit.trajectory.gathering.HOST", hosts)
    parameters = [nn.Parameter(torch.randn(300)) for _ in range(4)]
    optimizer = AdamW([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=0.01)
    meter, counts = TrajectoryMeter(optimizer, layer_of=lambda p: str(parameters[0] is p)), []
    for _ in range(12):
        for p in parameters:
            p.grad = torch.randn(300)
        optimizer.step()
        meter.compute()
        spread = meter.recorder.followers[0].motions[0].coordinates._spread
        counts.append((sum(1 for _ in tensors_under(meter, set())), len(spread)))
    assert counts[3:] == [counts[2]] * 9
    meter.close()
