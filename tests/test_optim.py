"""Langevin: SGD at temperature 0 to the bit, the right noise above it, and the same noise after resuming."""

import copy
import importlib.util
import io
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_speedlimit import optim
from lightning_speedlimit.optim import Langevin
from lightning_speedlimit.trajectory import TrajectoryMeter

SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 4, 5), (0, 3)]


def tensors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in SHAPES]


def run(make: Callable[[list[Tensor]], torch.optim.Optimizer], steps: int = 20, **options: Any) -> list[Tensor]:
    """The tensors after some steps on gradients that do not depend on the optimizer; every third is None once."""
    parameters = tensors(**options)
    optimizer = make(parameters)
    gradients = torch.Generator().manual_seed(2)
    for k in range(steps):
        for i, p in enumerate(parameters):
            p.grad = torch.randn(p.shape, dtype=p.dtype, generator=gradients)
            if (k + i) % 3 == 0:
                p.grad = None
        optimizer.step()
    return [p.detach() for p in parameters]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- temperature 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"maximize": True, "weight_decay": 0.1}], ids=str)
def test_temperature_zero_is_sgd_to_the_bit(dtype: torch.dtype, foreach: bool | None, options: dict[str, Any]) -> None:
    sgd = run(lambda p: torch.optim.SGD(p, lr=0.037, foreach=foreach, **options), dtype=dtype)
    ours = run(lambda p: Langevin(p, 0.037, 0.0, foreach=foreach, **options), dtype=dtype)
    assert same(ours, sgd)


def test_temperature_zero_draws_no_random_numbers() -> None:
    generator, parameters = seeded(), tensors()
    optimizer = Langevin(parameters, 0.1, 0.0, generator=generator)
    before, own = torch.get_rng_state(), generator.get_state()
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(generator.get_state(), own)


def test_sparse_gradients_pass_at_temperature_zero_and_are_refused_above() -> None:
    def stepped(make: Callable[[Any], torch.optim.Optimizer]) -> Tensor:
        torch.manual_seed(0)
        table = nn.Embedding(5, 3, sparse=True)
        optimizer = make(table.parameters())
        table(torch.tensor([1, 3, 1])).sum().backward()
        optimizer.step()
        return table.weight.detach()

    assert torch.equal(stepped(lambda p: Langevin(p, 0.1, 0.0)), stepped(lambda p: torch.optim.SGD(p, lr=0.1)))
    with pytest.raises(RuntimeError, match="sparse gradient"):
        stepped(lambda p: Langevin(p, 0.1, 0.5))


# --- the noise


@pytest.mark.parametrize("lr", [0.03, torch.tensor(0.03)], ids=["number", "tensor"])
@pytest.mark.parametrize("foreach", [None, False, True])
def test_one_step_is_the_drift_and_noise_of_variance_2_t_lr(lr: Any, foreach: bool | None) -> None:
    parameter = torch.full((1000,), 0.5, dtype=torch.float64).requires_grad_()
    optimizer = Langevin([parameter], lr, 0.7, weight_decay=0.2, foreach=foreach, generator=seeded())
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    xi = torch.empty(1000, dtype=torch.float64).normal_(generator=seeded())
    expected = 0.5 - 0.03 * (1.0 + 0.2 * 0.5) + math.sqrt(2 * 0.7 * 0.03) * xi
    # A learning rate that is a float32 tensor makes the noise, up to 0.8, off by 1e-7 of itself.
    torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-14 if isinstance(lr, float) else 1e-7)


@pytest.mark.parametrize("foreach", [False, True])
def test_a_learning_rate_of_shape_1_moves_what_has_no_shape(foreach: bool) -> None:
    found = []
    for lr in (torch.tensor([0.125]), 0.125):
        parameter = torch.tensor(0.5).requires_grad_()
        optimizer = Langevin([parameter], lr, 1.0, foreach=foreach, generator=seeded())
        parameter.grad = torch.ones(())
        optimizer.step()
        found.append(parameter.detach())
    assert torch.equal(*found)  # √(2·1·0.125) = ½ without rounding


@pytest.mark.parametrize("foreach", [None, False, True])
def test_foreach_is_sgds(foreach: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(optim, "sgd", lambda *_, **options: given.append(options["foreach"]))
    optimizer = Langevin(tensors(), 0.1, 0.0, foreach=foreach)
    optimizer.step()
    assert given == [foreach]


def test_the_temperature_is_a_default() -> None:
    assert Langevin(tensors(), 0.1, 0.3).defaults["temperature"] == 0.3


def test_a_complex_parameter_is_two_real_ones() -> None:
    parameter = torch.zeros(20000, dtype=torch.complex128).requires_grad_()
    optimizer = Langevin([parameter], 0.5, 1.0, generator=seeded())
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    parts = torch.view_as_real(parameter.detach())
    # Variance 2·T·lr = 1 of each part; a variance of n normal numbers scatters by √(2/n): four of that.
    assert parts.var(0).tolist() == pytest.approx([1.0, 1.0], abs=4 * math.sqrt(2 / 20000))
    assert (parts[:, 0] * parts[:, 1]).mean().item() == pytest.approx(0.0, abs=4 / math.sqrt(20000))


def test_parameters_without_gradient_stay() -> None:
    moved, still = torch.zeros(3).requires_grad_(), torch.zeros(3).requires_grad_()
    optimizer = Langevin([moved, still], 0.1, 1.0, generator=seeded())
    moved.grad = torch.zeros(3)
    optimizer.step()
    assert moved.detach().abs().min() > 0
    assert still.detach().abs().max() == 0
    before, moved.grad = moved.detach().clone(), None
    optimizer.step()
    assert torch.equal(moved.detach(), before)


@pytest.mark.parametrize("lr", [0.05, 0.4, 1.2])
def test_stationary_variance_is_that_of_the_discrete_chain(lr: float) -> None:
    """θ' = (1 − lr·h)θ + √(2T lr)ξ has the stationary variance T/(h(1 − lr·h/2))."""
    h, temperature, n = 1.3, 0.6, 40000
    parameter = torch.zeros(n, dtype=torch.float64).requires_grad_()
    optimizer = Langevin([parameter], lr, temperature, generator=seeded())
    steps = math.ceil(math.log(1e-4) / math.log(abs(1 - lr * h)))  # what is left of the start: (1 − lr·h)^2k = 1e-8
    for _ in range(steps):
        parameter.grad = h * parameter.detach()
        optimizer.step()
    expected = temperature / (h * (1 - lr * h / 2))
    error = expected * math.sqrt(2 / n)  # of a variance of n normal numbers
    assert parameter.var().item() == pytest.approx(expected, abs=4 * error)
    # The guard: the continuous limit T/h is told apart from it where lr is not small.
    assert lr < 0.1 or abs(temperature / h - expected) > 10 * error


def test_a_generator_makes_the_noise_and_nothing_else_does() -> None:
    def with_seed(seed: int) -> list[Tensor]:
        torch.manual_seed(seed + 100)  # must not matter
        return run(lambda p: Langevin(p, 0.1, 0.3, generator=seeded(seed)))

    assert same(with_seed(1), with_seed(1))
    assert not same(with_seed(1), with_seed(2))
    before = torch.get_rng_state()
    parameter = torch.zeros(3).requires_grad_()
    parameter.grad = torch.zeros(3)
    Langevin([parameter], 0.1, 0.3, generator=seeded()).step()
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_generator_the_global_one_makes_the_noise() -> None:
    def stepped() -> Tensor:
        torch.manual_seed(3)
        parameter = torch.zeros(4).requires_grad_()
        parameter.grad = torch.zeros(4)
        Langevin([parameter], 0.5, 1.0).step()
        return parameter.detach()

    noise = stepped()
    torch.manual_seed(3)
    assert torch.equal(noise, torch.empty(4).normal_())  # √(2·1·0.5) = 1


def test_groups_have_their_own_settings() -> None:
    cold, warm = torch.zeros(20000).requires_grad_(), torch.zeros(20000).requires_grad_()
    optimizer = Langevin(
        [{"params": [cold], "temperature": 0.0}, {"params": [warm], "lr": 0.25}], 0.1, 2.0, generator=seeded()
    )
    for p in (cold, warm):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(cold.detach(), torch.full_like(cold, -0.1))
    # lr 0.25, T 2: variance 1, around −0.25.
    assert warm.mean().item() == pytest.approx(-0.25, abs=4 / math.sqrt(20000))
    assert warm.var().item() == pytest.approx(1.0, abs=4 * math.sqrt(2 / 20000))
    optimizer.param_groups[0]["temperature"] = 1.0  # a schedule may
    optimizer.step()
    assert cold.detach().std() > 0.1


def test_the_closure_is_called_with_gradients_on() -> None:
    parameter = torch.ones(3).requires_grad_()
    optimizer = Langevin([parameter], 0.1, 0.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (parameter**2).sum() / 2
        loss.backward()
        return loss

    assert optimizer.step(closure) == 1.5
    torch.testing.assert_close(parameter.detach(), torch.full((3,), 0.9))


# --- resuming


def walk(optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = p.detach() * 0.1
        optimizer.step()


def test_a_resumed_run_goes_on_with_the_same_noise() -> None:
    whole = tensors()
    walk(Langevin(whole, 0.1, 0.3, generator=seeded()), 12)

    first = tensors()
    optimizer = Langevin(first, 0.1, 0.3, generator=seeded())
    walk(optimizer, 5)
    file = io.BytesIO()
    torch.save({"weights": first, "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)  # nothing in it has to be trusted
    second = [p.detach().requires_grad_() for p in saved["weights"]]
    resumed = Langevin(second, 99.0, 99.0, generator=seeded(77))
    resumed.load_state_dict(saved["optimizer"])
    walk(resumed, 7)
    assert same([p.detach() for p in second], [p.detach() for p in whole])


def test_copies_and_pickles_keep_the_noise() -> None:
    for copied in (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))):
        optimizer = Langevin(tensors(), 0.1, 0.3, generator=seeded())
        walk(optimizer, 3)
        other = copied(optimizer)
        walk(optimizer, 4)
        walk(other, 4)
        mine, theirs = ([p.detach() for p in o.param_groups[0]["params"]] for o in (optimizer, other))
        assert same(mine, theirs)


def test_a_checkpoint_of_sgd_leaves_temperature_and_noise_alone() -> None:
    optimizer = Langevin(tensors(), 0.1, 0.3, generator=seeded())
    optimizer.load_state_dict(torch.optim.SGD(tensors(), lr=0.2).state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.2
    assert optimizer.param_groups[0]["temperature"] == 0.3
    walk(optimizer, 1)


def test_noise_that_nothing_could_resume_is_refused() -> None:
    state = Langevin(tensors(), 0.1, 0.3, generator=seeded()).state_dict()
    with pytest.raises(ValueError, match=r"generators for cpu, this optimizer has none; construct it with generator="):
        Langevin(tensors(), 0.1, 0.3).load_state_dict(state)


# --- the meter


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_its_mobility_is_the_learning_rate(weight_decay: float) -> None:
    """u = lr·f + noise, f = −(∇L + wθ): the meter's works are those of plain tensors."""
    torch.manual_seed(4)
    parameter = torch.randn(50, dtype=torch.float64).requires_grad_()
    optimizer = Langevin([parameter], 0.1, 0.2, weight_decay=weight_decay, generator=seeded())
    meter = TrajectoryMeter(optimizer)
    ito = action = 0.0
    for _ in range(30):
        optimizer.zero_grad()
        ((parameter**2).sum() / 2).backward()
        force, before = -(1 + weight_decay) * parameter.detach(), parameter.detach().clone()
        optimizer.step()
        update = parameter.detach() - before
        ito += (force * update).sum().item()
        action += (update**2).sum().item() / 0.1
    values = meter.compute()
    assert meter.accumulated_mobility(parameter) == pytest.approx(30 * 0.1, rel=1e-12)
    assert values["work_ito"] == pytest.approx(ito, rel=1e-9)  # rounding of sums of 1500 terms
    assert values["work_action"] == pytest.approx(action, rel=1e-9)
    assert "efficiency_action" not in meter.reasons


def test_step_hooks_run_once_also_where_sgd_was_used_before_the_import() -> None:
    walk(torch.optim.SGD(tensors(), lr=0.1), 1)  # torch marks the step of a class that it has hooked
    spec = importlib.util.spec_from_file_location("imported_later", optim.__file__)
    assert spec is not None
    assert spec.loader is not None
    later = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(later)
    for kind in (Langevin, later.Langevin):
        optimizer = kind(tensors(), 0.1, 0.3)
        calls: list[str] = []
        optimizer.register_step_pre_hook(lambda *_, calls=calls: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append("after"))
        walk(optimizer, 2)
        assert calls == ["before", "after"] * 2


# --- input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be finite and not negative, got -1.0"),
        ({"lr": math.inf}, ValueError, "lr must be finite"),
        ({"lr": torch.ones(2)}, ValueError, "lr must have one element"),
        ({"temperature": -0.1}, ValueError, "temperature must be finite and not negative, got -0.1"),
        ({"temperature": math.nan}, ValueError, "temperature must be finite"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number, got 'hot'"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator or several, got int"),
        ({"generator": ["cpu"]}, TypeError, "generator must be a torch.Generator or several, got str"),
        ({"generator": [torch.Generator(), torch.Generator()]}, ValueError, "two for cpu; leave one out"),
    ],
    ids=range(10),
)
def test_bad_settings_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Langevin(tensors(), **({"lr": 0.1, "temperature": 0.1} | options))


@pytest.mark.parametrize(
    "group",
    [{"temperature": -1.0}, {"lr": -1.0}, {"momentum": 0.9}, {"dampening": 0.1}]
    + [{name: True} for name in ("nesterov", "differentiable", "fused")],
    ids=str,
)
def test_bad_groups_are_named(group: dict[str, Any]) -> None:
    (name,) = group
    with pytest.raises(ValueError, match=f"{name} must be"):
        Langevin([{"params": tensors(), **group}], 0.1, 0.1)


def test_a_parameter_without_a_generator_for_its_device_is_named() -> None:
    with pytest.raises(ValueError, match=r"got cpu and a parameter on meta; add torch.Generator\('meta'\)"):
        Langevin([torch.zeros(2, device="meta").requires_grad_()], 0.1, 0.1, generator=seeded())


@pytest.mark.gpu
@pytest.mark.parametrize("foreach", [None, False])
def test_on_a_gpu_the_noise_comes_from_its_generator(foreach: bool | None) -> None:
    def stepped(temperature: float, kind: type = Langevin) -> Tensor:
        parameter = torch.ones(1000, device="cuda").requires_grad_()
        extra = {"temperature": temperature, "generator": torch.Generator("cuda").manual_seed(1)}
        optimizer = kind([parameter], lr=0.1, foreach=foreach, **(extra if kind is Langevin else {}))
        for _ in itertools.repeat(None, 3):
            parameter.grad = parameter.detach() * 1.3
            optimizer.step()
        return parameter.detach()

    assert torch.equal(stepped(0.0), stepped(0.0, torch.optim.SGD))
    assert torch.equal(stepped(0.5), stepped(0.5))
    assert stepped(0.5).std() > 0.1
