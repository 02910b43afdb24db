"""Replicas trained at once: each as if it had been trained alone, by a plain loop."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_speedlimit.ensemble import Replicas, train_replicas
from lightning_speedlimit.ensemble.replicas import Batches

# Sums of a few dozen float64 terms in another order, through 30 steps that do not amplify.
ROUNDING = 1e-12
LR, STEPS, RECORDED = 0.1, 30, (0, 1, 7, 30)


class Net(nn.Module):
    """With a buffer, a tied weight and a frozen one: none may be lost or moved by stacking."""

    def __init__(self, hidden: int = 4) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(4, hidden), nn.Linear(4, hidden), nn.Linear(hidden, 2)
        self.second.weight = self.first.weight
        self.out.bias.requires_grad_(False)
        self.register_buffer("scale", torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.scale * self.second(torch.tanh(self.first(x)))))


def network() -> nn.Module:
    return Net().double()


def loss_fn(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(model(x), y)


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(11)
    x = torch.randn(12, 4, dtype=torch.float64)
    return x, torch.sin(x[:, :2])


def alone(
    module: nn.Module, batches: list[tuple[Tensor, ...]], noise: list[list[Tensor]] | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """Positions (K, d) and losses (K,) of one replica, by plain tensors."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    positions, losses = [], []
    for k in range(STEPS + 1):
        if k in RECORDED:
            positions.append(torch.cat([p.detach().flatten() for p in parameters]))
            losses.append(loss_fn(module, *data()).detach())
        if k == STEPS:
            break
        gradients = torch.autograd.grad(loss_fn(module, *batches[k]), parameters)
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
                p -= LR * g
                if noise is not None:
                    p += math.sqrt(2 * temperature * LR) * noise[k][i]
    return torch.stack(positions), torch.stack(losses)


def drawn_batches(size: int | None, shape: Callable[[int], tuple[int, ...]], seed: int) -> list[list[Tensor]]:
    """The indices of each step, drawn as the trainer says: from a generator with its seed, with replacement."""
    order = torch.Generator().manual_seed((seed + 2654435769) % 2**32)
    return [[torch.randint(12, shape(size), generator=order)] if size else [] for _ in range(STEPS)]


def compare(together: Replicas, one_by_one: list[tuple[Tensor, Tensor]]) -> None:
    positions = torch.stack([x for x, _ in one_by_one], 1)
    losses = torch.stack([loss for _, loss in one_by_one], 1)
    torch.testing.assert_close(together.positions, positions, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(together.losses, losses, rtol=0, atol=ROUNDING)
    assert together.times.tolist() == pytest.approx([LR * k for k in RECORDED], abs=1e-15)


def modules(count: int = 5) -> list[nn.Module]:
    """Each with a buffer of its own."""
    torch.manual_seed(7)
    found = [network() for _ in range(count)]
    for r, module in enumerate(found):
        module.get_buffer("scale").add_(0.1 * r)
    return found


@pytest.mark.parametrize("batches", ["full", "shared", "independent"])
def test_gradient_descent_at_once_is_gradient_descent_alone(batches: str) -> None:
    size = None if batches == "full" else 3
    kind: Batches = "shared" if batches == "shared" else "independent"
    together = train_replicas(
        modules(), loss_fn, data(), lr=LR, steps=STEPS, batch_size=size, batches=kind, record_at=RECORDED, seed=3
    )
    drawn = drawn_batches(size, lambda n: (n,) if kind == "shared" else (5, n), 3)
    x, y = data()
    found = []
    for r, module in enumerate(modules()):
        own = []
        for step in drawn:
            index = step[0] if kind == "shared" else step[0][r] if step else None
            own.append((x, y) if not step else (x[index], y[index]))
        found.append(alone(module, own, None, 0.0))
    compare(together, found)
    # What the test would not see if all replicas were one: they differ.
    assert together.positions[-1].std(0).max() > 0.01


def test_langevin_at_once_is_langevin_alone() -> None:
    temperature = 0.05
    together = train_replicas(
        modules(), loss_fn, data(), lr=LR, steps=STEPS, temperature=temperature, record_at=RECORDED, seed=9
    )
    source = torch.Generator().manual_seed(9)
    shapes = [p.shape for p in modules(1)[0].parameters() if p.requires_grad]
    noise = [
        [torch.empty((5, *shape), dtype=torch.float64).normal_(generator=source) for shape in shapes]
        for _ in range(STEPS)
    ]
    found = [
        alone(module, [data()] * STEPS, [[xi[r] for xi in step] for step in noise], temperature)
        for r, module in enumerate(modules())
    ]
    compare(together, found)


class Point(nn.Module):
    """A potential without force; it starts from normal numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.randn(400))

    def forward(self) -> Tensor:
        return 0.0 * self.theta.sum()


def test_noise_does_not_repeat_the_starts() -> None:
    """Generators under one seed give the same numbers: the first noise was the first start."""
    made = train_replicas(Point, lambda model: model(), replicas=4, lr=0.5, steps=1, temperature=1.0, seed=5)
    starts, noise = made.positions[0], made.positions[1] - made.positions[0]
    correlations = torch.corrcoef(torch.cat([starts, noise]))
    # 28 pairs of independent rows of 400 numbers: each 0 ± 1/20, five of these
    assert correlations.fill_diagonal_(0).abs().max() < 0.25


def test_independent_batches_differ_between_replicas_and_shared_ones_do_not() -> None:
    twins = [modules(1)[0] for _ in range(4)]
    for twin in twins:
        twin.load_state_dict(modules(1)[0].state_dict())
    options: dict[str, Any] = {"lr": LR, "steps": 3, "batch_size": 3}
    shared = train_replicas(twins, loss_fn, data(), batches="shared", **options)
    own = train_replicas(twins, loss_fn, data(), batches="independent", **options)
    # Batched products of equal rows are equal to rounding only.
    assert shared.positions[-1].std(0).max() < ROUNDING
    assert own.positions[-1].std(0).max() > 1e-3


def test_a_function_makes_the_starts_under_seeds_of_their_own() -> None:
    made = train_replicas(network, loss_fn, data(), replicas=3, lr=LR, steps=1, seed=20)
    for r in range(3):
        torch.manual_seed((20 + (3 + r) * 2654435769) % 2**32)
        start = torch.cat([p.detach().flatten() for p in network().parameters() if p.requires_grad])
        assert torch.equal(made.positions[0, r], start)


def test_the_same_seed_gives_the_same_run_whatever_the_global_state() -> None:
    given = data()

    def trained(seed: int, around: int) -> Tensor:
        torch.manual_seed(around)
        options: dict[str, Any] = {"lr": LR, "steps": 5, "temperature": 0.1, "batch_size": 2, "seed": seed}
        state = torch.get_rng_state()
        found = train_replicas(network, loss_fn, given, replicas=3, **options).positions
        assert torch.equal(torch.get_rng_state(), state), "the global generator has moved"
        return found

    assert trained(1, 0).shape == (2, 3, 32)
    assert torch.equal(trained(1, 0), trained(1, 99))
    assert not torch.equal(trained(1, 0), trained(2, 0))


def test_the_modules_stay_as_they_are() -> None:
    given = modules(2)
    before = [{k: v.clone() for k, v in module.state_dict().items()} for module in given]
    train_replicas(given, loss_fn, data(), lr=LR, steps=3)
    for module, state in zip(given, before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
        assert all(p.grad is None for p in module.parameters())


def test_chunks_and_dropout() -> None:
    def dropped() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 2)).double()

    options: dict[str, Any] = {"replicas": 5, "lr": LR, "steps": 4}
    whole = train_replicas(network, loss_fn, data(), **options)
    parts = train_replicas(network, loss_fn, data(), chunk_size=2, **options)
    torch.testing.assert_close(parts.positions, whole.positions, rtol=0, atol=ROUNDING)
    a, b = (train_replicas(dropped, loss_fn, data(), **options).positions for _ in range(2))
    assert torch.equal(a, b)
    twins = [dropped()] * 3
    assert train_replicas(twins, loss_fn, data(), lr=LR, steps=1).positions[-1].std(0).max() > 1e-3


def test_a_chunk_holds_as_many_replicas_as_it_may() -> None:
    calls = []

    def counted(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        return loss_fn(model, x, y)

    train_replicas(network, counted, data(), replicas=5, lr=LR, steps=1, chunk_size=2)
    assert len(calls) == 3 * 3  # three chunks, for one step and two records


def test_what_a_module_counts_of_its_own_stays_as_it_is() -> None:
    class Counting(Net):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    module = Counting().double()
    train_replicas([module], loss_fn, data(), lr=LR, steps=1)
    assert module.calls == 0


class Potential(nn.Module):
    """L = ½|x|²: its own loss, without data."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self) -> Tensor:
        return (self.x**2).sum() / 2


def test_a_module_may_be_the_potential_itself() -> None:
    found = train_replicas(Potential, lambda model: model(), replicas=2, lr=0.5, steps=3, record_at=range(4))
    assert found.positions[:, 0, 0].tolist() == [1.0, 0.5, 0.25, 0.125]
    assert found.losses[:, 1].tolist() == [1.0, 0.25, 0.0625, 0.015625]
    assert found.times.tolist() == [0.0, 0.5, 1.0, 1.5]


class Normed(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4, dtype=torch.float64, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)[:, :2]


@pytest.mark.parametrize("make", [lambda: Normed(track_running_stats=False), lambda: Normed().eval()])
def test_batch_statistics_that_do_not_change_may_be(make: Callable[[], nn.Module]) -> None:
    found = train_replicas(make, loss_fn, data(), replicas=2, lr=LR, steps=2)
    assert bool((found.losses[1] < found.losses[0]).all())


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"lr": 0.0}, ValueError, "lr must be a positive number, got 0.0"),
        ({"steps": 0}, ValueError, "steps must be a whole number of at least 1, got 0"),
        ({"temperature": -1.0}, ValueError, "temperature must be a finite number ≥ 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be a whole number"),
        ({"batches": "own"}, ValueError, "batches must be one of shared, independent, got 'own'"),
        ({"record_at": [0, 5, 99]}, ValueError, r"record_at must hold steps from 0 to 3, got \[5, 99\]"),
        ({"record_at": []}, ValueError, "got none"),
        ({"replicas": None}, ValueError, "replicas must say how many"),
        ({"modules": [network(), network()], "replicas": 3}, ValueError, "the number of modules, 2, or None, got 3"),
        ({"modules": network()}, TypeError, r"got one module; use \[module\]"),
        ({"modules": []}, TypeError, "at least one"),
        ({"modules": [network(), nn.Linear(4, 2).double()]}, ValueError, "one architecture, got Net and Linear"),
        ({"modules": [network(), Net(5).double()]}, ValueError, r"one architecture, got first.weight of shapes \(4, 4"),
        ({"modules": [network(), network().eval()]}, ValueError, "all in training mode or all not"),
        ({"modules": Normed}, ValueError, "batch statistics, got BatchNorm1d: .*use GroupNorm"),
        ({"modules": lambda: network().requires_grad_(False)}, ValueError, "trainable parameters, got none"),
        ({"data": torch.ones(3)}, TypeError, "data must be a sequence of tensors"),
        ({"data": (torch.ones(3), torch.ones(4))}, ValueError, r"one number of examples, got \[3, 4\]"),
        ({"data": (), "batch_size": 3}, ValueError, "batch_size must be None without data"),
        ({"loss_fn": lambda model, x, y: model(x)}, ValueError, r"scalar tensor, got shape \(12, 2\); take its mean"),
        ({"loss_fn": lambda model, x, y: 1.0}, ValueError, "scalar tensor, got float"),
    ],
    ids=range(21),
)
def test_bad_input_is_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    options: dict[str, Any] = {"modules": network, "loss_fn": loss_fn, "data": data(), "replicas": 2}
    options |= {"lr": LR, "steps": 3} | changed
    if isinstance(options["modules"], list | nn.Module) and "replicas" not in changed:
        options["replicas"] = None
    with pytest.raises(error, match=message):
        train_replicas(**options)
