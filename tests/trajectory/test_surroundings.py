"""What surrounds a measurement neither reaches its numbers nor is hindered: modes, and tensors that are swapped."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from optimizer_cases import KINEMATIC, Copies, assert_right
from torch import nn
from torch.optim import SGD, Adadelta, AdamW

from lightning_speedlimit.trajectory import TrajectoryMeter

STEPS = 8


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "deterministic": deterministic,
}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "AdamW": (AdamW, {"lr": 0.01}),
    "Adadelta": (Adadelta, {"lr": 1.0}),
}
METERS: dict[str, dict[str, Any]] = {
    "all": {},
    "drawn": {"coordinates": 600},
    "sampled": {"measure_every_n_steps": 2},
}


def measured(kind: str, around: AbstractContextManager[Any], **options: Any) -> list[str]:
    """All that a meter says of a clipped run that is resumed on the way, read after it."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    parameters = [nn.Parameter(draw(*shape)) for shape in ((60, 40), (301,), (12,))]
    gradients = [[0.5 + draw(*p.shape) for p in parameters] for _ in range(STEPS)]
    make, group = KINDS[kind]
    optimizer = make(parameters, **group)

    def new() -> TrajectoryMeter:
        return TrajectoryMeter(optimizer, loss_window=3, layer_of=lambda p: str(p.dim()), **options)

    with around:
        meter = new()
        for k in range(STEPS):
            if k == 4:
                state = meter.state_dict()
                meter.close()
                meter = new()
                meter.load_state_dict(state)
            for p, g in zip(parameters, gradients[k], strict=True):
                p.grad = g.clone()
            meter.record_loss(3.0 - 0.1 * k)
            meter.observe_gradients()
            with torch.no_grad():
                torch._foreach_mul_([p.grad for p in parameters], 0.5)
                optimizer.step()
        within, sketch = meter.measure(sketch=True)
    found = {**within, **{f"{a} {b}": v for a, row in meter.compute_layers().items() for b, v in row.items()}}
    assert meter.recorder.failure is None
    meter.close()
    assert sketch is not None
    mobility = meter.accumulated_mobility(parameters[1])
    return [*(f"{name} {v.hex()}" for name, v in found.items()), *map(str, [*sketch.tolist(), *mobility.tolist()])]


@pytest.mark.parametrize("options", METERS.values(), ids=METERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", AROUND)
def test_numbers_are_bitwise_the_same(name: str, kind: str, options: dict[str, Any]) -> None:
    assert measured(kind, AROUND[name](), **options) == measured(kind, nullcontext(), **options)


@pytest.fixture
def _swaps() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("_swaps")
@pytest.mark.parametrize("graded", [False, True], ids=["", "with gradients"])
def test_modules_may_swap_their_parameters_for_others(graded: bool) -> None:
    """As they do of shards in any case: torch refuses where somebody holds a weak reference."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    optimizer = SGD(model.parameters(), lr=0.1)
    meter, copies = TrajectoryMeter(optimizer), Copies(model.parameters())
    for k in range(STEPS):
        optimizer.zero_grad()
        model(torch.randn(5, 4, dtype=torch.float64)).square().mean().backward()
        copies.step(optimizer.step)
        if k == 3:
            if not graded:
                optimizer.zero_grad()
            model.to(torch.float32).to(torch.float64)
            model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    assert assert_right(meter, copies, (*KINEMATIC, "moved_outside"))["moved_outside"] > 0  # by rounding to float32
    meter.close()
