"""Between log steps nothing is read from a device on the host: seen on the CPU (tests/host_reads.py)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from host_reads import HostReads, step_counters, watched
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop

from lightning_speedlimit.trajectory import TrajectoryMeter
from lightning_speedlimit.trajectory.reading import Mail

pytestmark = pytest.mark.usefixtures("on_a_device")
Step = Callable[[], None]
RECIPES: list[tuple[type[Optimizer], dict[str, Any]]] = [
    (SGD, {}),
    (SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    (SGD, {"momentum": 0.9, "nesterov": True}),
    (RMSprop, {"momentum": 0.9}),
    (Adam, {"foreach": True}),
    (Adam, {"amsgrad": True, "weight_decay": 0.1}),
    (AdamW, {"foreach": True, "weight_decay": 0.1}),
    (NAdam, {}),
    (RAdam, {}),
]
recipes = pytest.mark.parametrize(("kind", "options"), RECIPES, ids=["-".join([k.__name__, *o]) for k, o in RECIPES])


def training(kind: type[Optimizer], options: dict[str, Any], **meter_options: Any) -> tuple[Step, Optimizer, Any]:
    """A step of a small training, with backward and clipping, and its meter (None: without one)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    large = nn.Parameter(torch.zeros(300_000))  # two stretches
    optimizer = kind([*model.parameters(), large], lr=1e-3, **options)
    wanted = meter_options.pop("measured", True)
    meter = TrajectoryMeter(optimizer, **meter_options) if wanted else None
    x, y = torch.randn(8, 1, 4, 4), torch.randint(3, (8,))

    def step() -> None:
        loss = nn.functional.cross_entropy(model(x), y) + (large - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if meter is not None:
            meter.record_loss(loss)
            meter.observe_gradients()
        for p in (*model.parameters(), large):
            assert p.grad is not None
            p.grad.mul_(0.5)  # a clip that reads nothing itself
        optimizer.step()

    return step, optimizer, meter


def reads(step: Step, steps: int = 4, warm_up: int = 0) -> list[tuple[str, int]]:
    for _ in range(warm_up):
        step()
    with watched() as found:
        for _ in range(steps):
            step()
    return found


SUMS = [{}, {"coordinates": 1000}]  # whose sums each optimizer has of its own
METERS: list[dict[str, Any]] = [
    {"clock": "lr"},
    {"measure_every_n_steps": 2},
    {"momentum_mobility": "response"},
    {"gradient_changes": "given"},
    {"gradient_changes": "unknown"},
]


@pytest.mark.parametrize(
    ("kind", "options", "meter_options"),
    [
        *[(*recipe, meter) for recipe in RECIPES for meter in SUMS],
        *[(*recipe, meter) for recipe in (RECIPES[1], RECIPES[6]) for meter in METERS],
    ],
    ids=str,
)
def test_no_step_reads_the_device(
    kind: type[Optimizer], options: dict[str, Any], meter_options: dict[str, Any]
) -> None:
    # Adam and its kin keep `step` as a CPU tensor, and read it there themselves; so does the meter. On an
    # accelerator these are CPU tensors too unless fused or capturable: a read of them waits for nothing.
    bare_step, bare_optimizer, _ = training(kind, options, measured=False)
    step, optimizer, meter = training(kind, options, **meter_options)
    warm_up = int("coordinates" in meter_options)  # the draw looks at the first gradient
    bare, measured = reads(bare_step, warm_up=warm_up), reads(step, warm_up=warm_up)
    meter.close()
    own, extra = step_counters(bare_optimizer), step_counters(optimizer)
    bare_elsewhere = [name for name, place in bare if place not in own]
    elsewhere = [name for name, place in measured if place not in extra]
    assert elsewhere == bare_elsewhere
    if not extra:
        assert len(measured) == len(bare)


def test_several_optimizers_read_nothing() -> None:
    first, second = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(7))
    optimizers = [SGD([first], lr=0.1), RMSprop([second], lr=0.2)]
    meter = TrajectoryMeter(optimizers)

    def step() -> None:
        for optimizer, parameter in zip(optimizers, (first, second), strict=True):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()

    found = reads(step)
    meter.close()
    counters = step_counters(optimizers[0]) | step_counters(optimizers[1])
    assert [name for name, place in found if place not in counters] == []


@recipes
def test_a_log_step_is_one_copy(
    kind: type[Optimizer], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, _, meter = training(kind, options)
    for _ in range(3):
        step()
    delivered = []
    original = Mail.deliver

    def counted(mail: Mail, *processes: Any) -> dict[str, Tensor]:
        delivered.append(1)
        with HostReads() as mode:
            found = original(mail, *processes)
        assert mode.found == []
        return found

    monkeypatch.setattr(Mail, "deliver", counted)
    meter.measure(sketch=True)
    meter.close()
    assert len(delivered) == 1


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.sum().item(),
        lambda t: float(t.sum()),
        lambda t: bool(t.sum() > 0),
        lambda t: torch.equal(t, t),
        lambda t: t.nonzero(),
        lambda t: t[t > 0],
        lambda t: t.tolist(),
        lambda t: t.numpy(),
        lambda t: t.cpu(),
        lambda t: t.to("cpu"),
        lambda t: torch.cuda.synchronize(),
    ],
    ids=["item", "float", "bool", "equal", "nonzero", "mask", "tolist", "numpy", "cpu", "to", "synchronize"],
)
def test_the_guard_can_fail(read: Callable[[Tensor], object]) -> None:
    step, optimizer, meter = training(SGD, {})

    def reading(stepped: Optimizer, args: Any, kwargs: Any) -> None:
        read(stepped.param_groups[0]["params"][0].detach())

    optimizer.register_step_post_hook(reading)
    meter.close()
    assert reads(step, steps=1) != []
