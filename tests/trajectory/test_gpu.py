"""The same on an accelerator: the same numbers, and no wait for the device between log steps."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop

from lightning_speedlimit.trajectory import TrajectoryMeter

pytestmark = pytest.mark.gpu

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
STEPS = 12
# float32 on both: kernels add in another order, a few 1e-7 per step, and training carries the differences on.
SAME = 1e-4


@contextmanager
def no_sync() -> Iterator[None]:
    """An error at whatever makes the host wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Training:
    """A small network in float32; weights and data are drawn on the CPU for both devices."""

    def __init__(self, device: torch.device, kind: type[Optimizer], options: dict[str, Any], **meter: Any) -> None:
        torch.manual_seed(0)
        self.device = device
        self.model = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, 64), nn.Tanh(), nn.Linear(64, 4)
        ).to(device)
        rate = options.get("lr")
        options = options | ({"lr": rate.to(device)} if isinstance(rate, Tensor) else {})
        self.optimizer = kind(self.model.parameters(), **options)
        self.meter = TrajectoryMeter(self.optimizer, **meter)
        generator = torch.Generator().manual_seed(1)
        self.batches = [
            (
                torch.randn(16, 1, 8, 8, generator=generator).to(device),
                torch.randint(4, (16,), generator=generator).to(device),
            )
            for _ in range(STEPS)
        ]

    def step(self, k: int, scaler: Any = None, clip: float | None = None) -> None:
        x, y = self.batches[k]
        loss = nn.functional.cross_entropy(self.model(x), y)
        self.optimizer.zero_grad()
        (loss if scaler is None else scaler.scale(loss)).backward()
        self.meter.record_loss(loss)
        if clip is not None:
            self.meter.observe_gradients()
            nn.utils.clip_grad_norm_(self.model.parameters(), clip, foreach=True)
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()

    def run(self, **options: Any) -> dict[str, float]:
        for k in range(STEPS):
            self.step(k, **options)
        values = self.meter.compute()
        self.meter.close()
        return values

    def flat(self) -> Tensor:
        return torch.cat([p.detach().double().cpu().reshape(-1) for p in self.model.parameters()])


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    """float32 products as on the CPU: TF32 has 10 bits and would change the training."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


OPTIMIZERS: list[tuple[str, type[Optimizer], dict[str, Any]]] = [
    ("sgd", SGD, {"lr": 0.05}),
    ("sgd L2", SGD, {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.1}),
    ("rmsprop", RMSprop, {"lr": 1e-3, "momentum": 0.5, "eps": 1e-4}),
    ("adam", Adam, {"lr": 1e-3, "eps": 1e-4}),
    ("adamw", AdamW, {"lr": 1e-3, "eps": 1e-4, "weight_decay": 0.5}),
    ("nadam", NAdam, {"lr": 1e-3, "eps": 1e-4}),
    ("radam", RAdam, {"lr": 1e-3, "eps": 1e-4}),
    ("adagrad", Adagrad, {"lr": 1e-2, "eps": 1e-4}),
]
optimizers = pytest.mark.parametrize(("kind", "options"), [o[1:] for o in OPTIMIZERS], ids=[o[0] for o in OPTIMIZERS])


def assert_same(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name in ("loss_drop_se", "conversion_se", "efficiency_se"):
            continue  # told from second differences of a dozen losses: a window may be chosen otherwise
        assert found[name] == pytest.approx(value, rel=SAME, abs=1e-7, nan_ok=True), name


# ---- the same numbers ----------------------------------------------------------------------------------


@optimizers
def test_the_same_training_gives_the_same_numbers(kind: type[Optimizer], options: dict[str, Any]) -> None:
    assert_same(Training(CUDA, kind, options).run(), Training(CPU, kind, options).run())


@optimizers
def test_the_same_sketch(kind: type[Optimizer], options: dict[str, Any]) -> None:
    # Signs are drawn on the CPU whatever the device: sketches compare across machines.
    here, there = Training(CPU, kind, options), Training(CUDA, kind, options)
    here.run(), there.run()
    difference = here.meter.sketch().double() - there.meter.sketch().double()
    # The distance between the two runs is their rounding, of the order of SAME times the displacement.
    assert float(difference.norm()) < 10 * SAME * float(here.meter.sketch().norm())
    assert float(here.meter.sketch().norm()) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_precisions_are_read_as_they_are(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.randn(3000, device=CUDA).to(dtype))
    optimizer = SGD([weight], lr=0.1)
    meter = TrajectoryMeter(optimizer)
    start, path = weight.detach().double().clone(), 0.0
    for _ in range(5):
        before = weight.detach().double().clone()
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        path += float((weight.detach().double() - before).norm())
    values = meter.compute()
    meter.close()
    rounding = 1e-12 if dtype == torch.float64 else 1e-5  # differences of bfloat16 weights are exact in float32
    assert values["displacement"] == pytest.approx(float((weight.detach().double() - start).norm()), rel=rounding)
    assert values["path_length"] == pytest.approx(path, rel=rounding)


@pytest.mark.parametrize("kind", [Adam, AdamW], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("flags", [{"fused": True}, {"capturable": True}, {"fused": True, "capturable": True}], ids=str)
def test_device_step_tensors(kind: type[Optimizer], flags: dict[str, bool]) -> None:
    options: dict[str, Any] = {"lr": 1e-3, "eps": 1e-4, "weight_decay": 0.1}
    training = Training(CUDA, kind, options | flags)
    assert_same(training.run(), Training(CPU, kind, options).run())
    assert training.optimizer.state[next(training.model.parameters())]["step"].is_cuda


@pytest.mark.parametrize("kind", [NAdam, RAdam], ids=lambda kind: kind.__name__)
def test_capturable_without_a_step_on_the_host(kind: type[Optimizer]) -> None:
    options: dict[str, Any] = {"lr": 1e-3, "eps": 1e-4}
    assert_same(Training(CUDA, kind, options | {"capturable": True}).run(), Training(CPU, kind, options).run())


@pytest.mark.parametrize("clock", ["steps", "lr"])
def test_a_learning_rate_that_lives_on_the_device(clock: str) -> None:
    # The rate is 1e-3 in float32 there: off by 5e-8 from the one in float64.
    options: dict[str, Any] = {"lr": torch.tensor(1e-3), "eps": 1e-4, "capturable": True}
    found = Training(CUDA, Adam, options, clock=clock).run()
    expected = Training(CPU, Adam, {"lr": 1e-3, "eps": 1e-4}, clock=clock).run()
    assert_same(found, expected)
    assert found["learning_rate"] == pytest.approx(1e-3, rel=1e-6)


def test_clipping_by_norm() -> None:
    options: dict[str, Any] = {"lr": 1e-3, "eps": 1e-4}
    found = Training(CUDA, Adam, options).run(clip=0.1)
    assert_same(found, Training(CPU, Adam, options).run(clip=0.1))
    assert found["grad_norm_clipped"] == pytest.approx(0.1, rel=1e-3)  # torch adds 1e-6 to the norm
    assert found["grad_norm"] > 0.15


# ---- no wait for the device ----------------------------------------------------------------------------

WITHOUT_SYNC: list[tuple[str, type[Optimizer], dict[str, Any], dict[str, Any]]] = [
    *((name, kind, options, {}) for name, kind, options in OPTIMIZERS),
    ("adam fused", Adam, {"lr": 1e-3, "fused": True}, {}),
    ("adamw capturable", AdamW, {"lr": 1e-3, "weight_decay": 0.1, "capturable": True}, {}),
    ("adam rate on the device", Adam, {"lr": torch.tensor(1e-3), "capturable": True}, {"clock": "lr"}),
    ("nadam capturable", NAdam, {"lr": 1e-3, "capturable": True}, {}),
    ("radam capturable", RAdam, {"lr": 1e-3, "capturable": True}, {}),
    ("sampled", AdamW, {"lr": 1e-3, "weight_decay": 0.1}, {"measure_every_n_steps": 3}),
    ("unknown changes", SGD, {"lr": 0.05}, {"gradient_changes": "unknown"}),
    ("drawn", AdamW, {"lr": 1e-3, "weight_decay": 0.1}, {"coordinates": 5000}),
    ("response", SGD, {"lr": 0.05, "momentum": 0.5}, {"momentum_mobility": "response"}),
]


@pytest.mark.parametrize(("kind", "options", "meter"), [w[1:] for w in WITHOUT_SYNC], ids=[w[0] for w in WITHOUT_SYNC])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_steps_do_not_wait_for_the_device(
    kind: type[Optimizer], options: dict[str, Any], meter: dict[str, Any], clip: float | None
) -> None:
    warm_up = Training(CUDA, kind, options)  # torch's own lazy set-up
    warm_up.step(0, clip=clip)
    warm_up.step(1, clip=clip)
    training = Training(CUDA, kind, options, **meter)
    first = 0
    while training.meter.measured == 0:  # buffers are made, and what never changes is uploaded
        training.step(first, clip=clip)
        first += 1
    for k in range(first, STEPS):
        with no_sync():
            training.step(k, clip=clip)
        if k == 5:
            training.meter.compute()
    assert math.isfinite(training.meter.compute()["path_length"])
    training.meter.close()


def test_a_changing_rate_is_uploaded_without_a_wait() -> None:
    training = Training(CUDA, SGD, {"lr": 0.05, "momentum": 0.5}, clock="lr")
    schedule = torch.optim.lr_scheduler.LambdaLR(training.optimizer, lambda k: 1 / (1 + k))
    training.step(0)
    with no_sync():
        for k in range(1, STEPS):
            schedule.step()
            training.step(k)
    elapsed = sum(0.05 / (1 + k) for k in range(STEPS))
    assert training.meter.compute()["elapsed"] == pytest.approx(elapsed, rel=1e-12)
    training.meter.close()


def test_a_wait_would_be_noticed() -> None:
    training = Training(CUDA, SGD, {"lr": 0.05})
    training.step(0)
    with no_sync(), pytest.raises(RuntimeError, match="synchroniz"):
        training.meter.compute()
    training.meter.close()


# ---- a loss scaler -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scaler_changes_nothing(fused: bool) -> None:
    # A scale of 2¹⁰ multiplies gradients exactly. Unfused the gradients are unscaled before the step begins;
    # fused the optimizer divides within the step.
    options: dict[str, Any] = {"lr": 1e-3, "eps": 1e-4, "fused": fused}
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=10**6)
    found = Training(CUDA, Adam, options).run(scaler=scaler)
    assert_same(found, Training(CPU, Adam, options | {"fused": False}).run())


def test_a_step_that_found_inf_is_no_step() -> None:
    options: dict[str, Any] = {"lr": 1e-3, "eps": 1e-4, "fused": True}
    training = Training(CUDA, Adam, options)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=10**6, backoff_factor=0.5)
    reference = Training(CPU, Adam, options | {"fused": False})
    start, path, previous = training.flat(), 0.0, training.flat()
    for k in range(STEPS):
        if k == 5:  # the weights stay, and the scale is halved
            x, _ = training.batches[k]
            kept = x.clone()
            x.fill_(math.inf)
            training.step(k, scaler=scaler)
            x.copy_(kept)
            assert torch.equal(training.flat(), previous)
        else:
            training.step(k, scaler=scaler)
            reference.step(k)
        path += float((training.flat() - previous).norm())
        previous = training.flat()
    values, expected = training.meter.compute(), reference.meter.compute()
    assert values["elapsed"] == expected["elapsed"] == STEPS - 1
    assert values["path_length"] == pytest.approx(path, rel=SAME)
    assert values["displacement"] == pytest.approx(float((training.flat() - start).norm()), rel=SAME)
    for name in ("path_length", "displacement", "action", "work_ito", "work_action", "kinematic_efficiency"):
        assert values[name] == pytest.approx(expected[name], rel=SAME), name
    assert values["efficiency_action"] == pytest.approx(expected["efficiency_action"], rel=SAME)
    training.meter.close()
    reference.meter.close()


def test_a_loss_scaler_with_a_fused_optimizer_does_not_wait() -> None:
    training = Training(CUDA, Adam, {"lr": 1e-3, "fused": True})
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    training.step(0, scaler=scaler)
    with no_sync():
        for k in range(1, STEPS):
            training.step(k, scaler=scaler)
    training.meter.close()


# ---- TF32 ----------------------------------------------------------------------------------------------


def test_tf32_does_not_reach_the_sums() -> None:
    # The sections' sums are products of matrices: in TF32 they would keep 10 bits, an error of 5e-4.
    def numbers(tf32: bool) -> dict[str, float]:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        generator = torch.Generator().manual_seed(0)
        weights = [nn.Parameter(torch.randn(50, 40, generator=generator).to(CUDA)) for _ in range(6)]
        optimizer = Adam(weights, lr=1e-3)
        meter = TrajectoryMeter(optimizer, layer_of=lambda p: str(p.dim()))
        for _ in range(5):
            for weight in weights:  # no product of matrices in the training itself
                weight.grad = torch.randn(50, 40, generator=generator).to(CUDA)
            optimizer.step()
        values = meter.compute()
        meter.close()
        return values

    assert numbers(True) == pytest.approx(numbers(False), rel=1e-12, nan_ok=True)


# ---- memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "copies"),
    [(SGD, {}, 6), (Adam, {}, 7), (AdamW, {"weight_decay": 0.1}, 9)],
    ids=["sgd", "adam", "adamw"],
)
def test_memory_on_the_device(kind: type[Optimizer], options: dict[str, Any], copies: int) -> None:
    numel = 1 << 26  # 256 MiB
    bytes_of_a_copy = 4 * numel

    def used(measured: bool) -> int:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        weight = nn.Parameter(torch.zeros(numel, device=CUDA))
        optimizer = kind([weight], lr=1e-3, **options)
        meter = TrajectoryMeter(optimizer, coordinates="all") if measured else None
        for _ in range(4):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
            optimizer.zero_grad()
        found = torch.cuda.memory_allocated() - before
        if meter is not None:
            meter.close()
        return found

    extra = (used(True) - used(False)) / bytes_of_a_copy
    # Three more to work in, and some thirty numbers for each row of 256.
    assert copies + 3 <= extra < copies + 3.5
