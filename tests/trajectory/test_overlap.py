"""The overlap of neighbouring gradients, against raw gradients that are kept step by step."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_speedlimit.trajectory import TrajectoryMeter

REL = 2e-6  # float32 products of rows of 256, added in pairs
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "momentum": lambda p: SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: Adam(p, lr=0.01),
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
}


class Run:
    """A small training, its gradients and the meter's numbers."""

    def __init__(self, make: Callable[[Iterable[nn.Parameter]], Optimizer], *, width: int = 7, **settings: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))
        self.optimizer = make(self.model.parameters())
        self.meter = TrajectoryMeter(self.optimizer, **settings)
        self.gradients: list[Tensor] = []
        self.draw = torch.Generator().manual_seed(1)

    def step(self) -> None:
        self.backward()
        self.optimizer.step()

    def backward(self) -> None:
        x = torch.randn(5, 6, generator=self.draw)
        self.optimizer.zero_grad()
        cross_entropy(self.model(x), torch.randint(3, (5,), generator=self.draw)).backward()
        self.gradients.append(torch.cat([p.grad.double().view(-1) for p in self.model.parameters()]))  # type: ignore[union-attr]

    def found(self) -> list[float]:
        values = self.meter.compute()
        return [values["gradient_signal"], values["gradient_noise"]]


def wanted(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[float]:
    signal = [float(before @ now) for before, now in pairs]
    squares = [float(now @ now) for _, now in pairs]
    return [sum(signal), sum(squares) - sum(signal)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sums_over_neighbours(name: str) -> None:
    run = Run(OPTIMIZERS[name])
    for _ in range(12):
        run.step()
    pairs = list(itertools.pairwise(run.gradients))
    assert run.found() == pytest.approx(wanted(pairs), rel=REL)


def test_an_l2_term_is_a_part_of_the_gradient() -> None:
    run = Run(lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=0.3))
    weights = []
    for _ in range(8):
        weights.append(torch.cat([p.detach().double().view(-1) for p in run.model.parameters()]))
        run.step()
    forces = [g + 0.3 * w for g, w in zip(run.gradients, weights, strict=True)]
    assert run.found() == pytest.approx(wanted(list(itertools.pairwise(forces))), rel=REL)


def test_of_sampled_steps_each_meets_the_gradient_after_it() -> None:
    run = Run(OPTIMIZERS["adam"], measure_every_n_steps=3)
    for _ in range(30):
        run.step()
    joint = run.meter._joint
    drawn = [k for k in range(30) if _measures(joint, k)]
    pairs = [(run.gradients[k], run.gradients[k + 1]) for k in drawn if k < 29]
    assert run.found() == pytest.approx([3.0 * x for x in wanted(pairs)], rel=REL)


def _measures(joint: Any, step: int) -> bool:
    known, joint.steps = joint.steps, step
    try:
        return bool(joint.measuring())
    finally:
        joint.steps = known


def test_a_step_that_found_inf_leaves_no_gradient() -> None:
    """Its neighbours meet each other; where the first step is one, the second has none to meet."""
    run, skipped = Run(lambda p: Adam(p, lr=0.01, fused=True)), {0, 4}
    for k in range(8):
        run.optimizer.found_inf = torch.tensor(float(k in skipped))  # type: ignore[attr-defined]
        run.optimizer.grad_scale = torch.tensor(1.0)  # type: ignore[attr-defined]
        run.step()
    kept = [g for k, g in enumerate(run.gradients) if k not in skipped]
    assert run.found() == pytest.approx(wanted(list(itertools.pairwise(kept))), rel=REL)


@pytest.mark.parametrize("midway", [False, True])
@pytest.mark.parametrize("coordinates", ["all", 1200])
def test_it_goes_on_from_a_checkpoint(coordinates: Any, midway: bool) -> None:
    """midway: from one that was taken between a backward, whose gradients had been observed, and its step."""
    whole, parted = (Run(OPTIMIZERS["adam"], width=200, coordinates=coordinates) for _ in range(2))
    for k in range(10):
        whole.step()
        parted.backward()
        if k == 5:
            if midway:
                parted.meter.observe_gradients()
            state = parted.meter.state_dict()
            parted.meter.close()
            parted.meter = TrajectoryMeter(parted.optimizer, coordinates=coordinates)
            parted.meter.load_state_dict(state)
        parted.optimizer.step()
    assert parted.found() == whole.found()


def test_plain_sgd_needs_none() -> None:
    run = Run(lambda p: SGD(p, lr=0.05))
    for _ in range(3):
        run.step()
    assert torch.tensor(run.found()).isnan().all()
    assert "the works tell" in run.meter.reasons["gradient_signal"]
    assert all(motion.overlap is None for f in run.meter._followers for motion in f.motions)


def test_one_gradient_has_met_none() -> None:
    run = Run(OPTIMIZERS["adam"])
    run.step()
    assert torch.tensor(run.found()).isnan().all()
    assert run.meter.reasons["gradient_noise"] == "no gradient has met the one before it"


def test_drawn_coordinates_say_how_far_off_they_are() -> None:
    """50 draws: the scatter of the sums is what they state, as far as 50 draws tell it: 1/√98, four times that."""
    found = []
    for seed in range(50):
        run = Run(OPTIMIZERS["adam"], width=200, coordinates=1200, seed=seed)
        for _ in range(6):
            run.step()
        values = run.meter.compute()
        found.append([values["gradient_noise"], values["gradient_noise_se"]])
    pairs = list(itertools.pairwise(run.gradients))
    of_all = torch.tensor(found, dtype=torch.float64)
    scatter, stated = of_all[:, 0].std(), of_all[:, 1].square().mean().sqrt()
    assert float(of_all[:, 0].mean()) == pytest.approx(wanted(pairs)[1], abs=4 * float(scatter) / 50**0.5)
    assert float(stated / scatter) == pytest.approx(1.0, abs=0.4)


@pytest.mark.parametrize("coordinates", ["all", 1200])
def test_what_decoupled_decay_did_to_the_loss(coordinates: Any) -> None:
    """Σ f_k·v_k with v = −lr w θ_k, of two groups with rates and decays of their own."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(n)) for n in (700, 900, 300)]
    groups = [{"params": weights[:1]}, {"params": weights[1:2], "lr": 0.05, "weight_decay": 0.0}]
    groups.append({"params": weights[2:], "lr": 0.02, "weight_decay": 0.3})
    optimizer = AdamW(groups, lr=0.01, weight_decay=0.1)
    meter, wanted = TrajectoryMeter(optimizer, coordinates=coordinates), 0.0
    for _ in range(6):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn_like(p) + 0.5 * p.detach()
                wanted += group["lr"] * group["weight_decay"] * float((p.grad.double() * p.detach().double()).sum())
        optimizer.step()
    values = meter.compute()
    meter.close()
    if coordinates == "all":
        assert values["work_decay"] == pytest.approx(wanted, rel=REL)
    else:
        assert values["work_decay"] == pytest.approx(wanted, abs=4 * values["work_decay_se"])
        assert 0 < values["work_decay_se"] < 0.3 * wanted
