"""The figures of THEORY §2 to §4 and §8, measured again on scikit-learn's digits.

Setting: inputs/16, MLP 64-128-128-10 with ReLU and PyTorch's default initialisation, cross entropy. Batches
are drawn with replacement (the batch-1024 row of §8 tells: an epoch without replacement has 1024 of 1797
images in its first batch, and gives conversion 0.72 instead of 0.52). The table's figures are of one run
each; the tolerances are the spread over seeds of a separate script of plain sums, about three times its
standard deviation, and never less than the table's last digit.
"""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_speedlimit.trajectory import TrajectoryMeter

slow = pytest.mark.slow
Make = Callable[[Iterable[Tensor]], Optimizer]


@cache
def digits() -> tuple[Tensor, Tensor]:
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


class Training:
    """A network on digits with its meter; `batch` None is all images."""

    def __init__(self, make: Make, batch: int | None, *, seed: int = 0, **options: Any) -> None:
        self.model = network(seed)
        self.optimizer = make(self.model.parameters())
        self.meter = TrajectoryMeter(self.optimizer, **options)
        self.batch = batch
        self.generator = torch.Generator().manual_seed(seed + 100)
        self.steps = 0

    def loss(self, index: Tensor | slice = slice(None)) -> Tensor:
        x, y = digits()
        return nn.functional.cross_entropy(self.model(x[index]), y[index])

    @torch.no_grad()
    def full_loss(self) -> float:
        return self.loss().item()

    def step(self, record: bool = True) -> None:
        index: Tensor | slice = slice(None)
        if self.batch is not None:
            index = torch.randint(len(digits()[1]), (self.batch,), generator=self.generator)
        self.optimizer.zero_grad()
        loss = self.loss(index)
        loss.backward()
        if record:
            self.meter.record_loss(loss)
        self.optimizer.step()
        self.steps += 1

    def run(self, steps: int) -> dict[str, float]:
        for _ in range(steps):
            self.step()
        return self.meter.compute()

    def until(self, loss: float) -> dict[str, float]:
        """Trains until the loss on all images, looked at every 10 steps, is below `loss`."""
        self.meter.record_loss(torch.tensor(self.full_loss()))
        while True:
            for k in range(10):
                self.step(record=self.steps > 0 or k > 0)
            now = self.full_loss()
            if now < loss:
                return self.meter.compute()
            assert self.steps < 2000, "the loss does not fall"


def sgd(lr: float, **options: Any) -> Make:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, **options)


def adam(lr: float) -> Make:
    return lambda parameters: torch.optim.Adam(parameters, lr=lr)


# --- §2 and §3: 3000 steps ----------------------------------------------------------------------------------


@slow
def test_full_batch_gradient_descent() -> None:
    training = Training(sgd(0.05), None)
    values = training.run(3000)
    by_ito = values["efficiency"] * values["entropy_production"] / values["work_ito"]
    # Seeds differ by 0.002 (initialisation alone).
    assert values["efficiency"] == pytest.approx(0.257, abs=0.006)
    assert by_ito == pytest.approx(0.257, abs=0.006)
    assert values["conversion"] == pytest.approx(1, abs=0.003)


@slow
def test_minibatches_of_64() -> None:
    values = Training(sgd(0.05), 64).run(3000)
    by_ito = values["efficiency"] * values["entropy_production"] / values["work_ito"]
    assert values["efficiency"] == pytest.approx(0.258, abs=0.008)  # 0.256 and 0.261 for two seeds
    assert by_ito == pytest.approx(0.011, abs=0.001)
    assert values["conversion"] == pytest.approx(0.042, abs=0.004)  # 0.044 for two seeds


@slow
def test_adam_on_all_images() -> None:
    values = Training(adam(1e-3), None).run(3000)
    plain = values["displacement"] ** 2 / (3000 * 1e-3 * values["loss_drop"])
    assert values["efficiency"] == pytest.approx(0.010, abs=0.002)
    assert plain == pytest.approx(65, rel=0.15)  # 67 and 70 for two seeds
    assert values["loss_drop"] == pytest.approx(2.30, abs=0.015)  # ln 10 at the start, 0 at the end
    # Adam bounces a little: 0.4 % of the work; both are 2.30 in two decimals or nearly so.
    assert values["work_stratonovich"] == pytest.approx(2.30, abs=0.02)
    assert values["work_action"] == pytest.approx(2.30, abs=0.05)


@slow
def test_heavy_ball_on_all_images() -> None:
    # lr 0.02 is what reproduces the figure: lr 0.05, as in the other runs, gives 0.054.
    values = Training(sgd(0.02, momentum=0.9), None).run(3000)
    plain = values["displacement"] ** 2 / (3000 * 0.02 * values["loss_drop"])
    assert values["efficiency"] == pytest.approx(0.107, abs=0.003)
    assert plain == pytest.approx(1.08, abs=0.03)


# --- §4: the interval ---------------------------------------------------------------------------------------


def interval(batch: int, checkpoints: tuple[int, ...], seeds: int) -> dict[int, tuple[float, float]]:
    """Mean over seeds of [numerator − N, numerator] over the mean loss drop on all images.

    The ratio of means: at step 10 a single run's loss drop is mostly noise.
    """
    sums = {k: torch.zeros(3, dtype=torch.float64) for k in checkpoints}
    for seed in range(seeds):
        training = Training(sgd(0.05), batch, seed=seed, entropy_production="action")
        start = training.full_loss()
        for k in range(1, checkpoints[-1] + 1):
            training.step()
            if k in sums:
                values = training.meter.compute()
                production = values["entropy_production"]
                lower, upper = values["efficiency_low"] * production, values["efficiency"] * production
                sums[k] += torch.tensor([lower, upper, start - training.full_loss()], dtype=torch.float64)
        training.meter.close()
    return {k: (float(s[0] / s[2]), float(s[1] / s[2])) for k, s in sums.items()}


def test_interval_of_batch_8() -> None:
    ends = interval(8, (10, 100, 300), seeds=8)
    # Single runs scatter by 10 to 15 % at step 10 and 100 in the upper end (1.8 to 2.3, 0.86 to 0.99), by 3 %
    # at 300, and the lower end by as much more as it is a difference; the table's figures are of one run.
    assert ends[10] == (pytest.approx(0.38, abs=0.35), pytest.approx(1.96, rel=0.25))
    assert ends[100] == (pytest.approx(0.82, abs=0.12), pytest.approx(0.95, abs=0.12))
    assert ends[300] == (pytest.approx(0.75, abs=0.06), pytest.approx(0.82, abs=0.06))


@slow
def test_interval_of_batch_64() -> None:
    ends = interval(64, (1000,), seeds=2)
    assert ends[1000] == (pytest.approx(0.48, abs=0.02), pytest.approx(0.49, abs=0.02))


# --- §8: until the loss is 0.1 ------------------------------------------------------------------------------

FIELDS = ("kinematic_efficiency", "straightness", "steadiness", "conversion")

# name: optimizer, batch, steps, the four fields of the table; spread over three seeds of steps and fields.
ROWS = {
    "sgd 0.1, 16": (sgd(0.1), 16, 720, (0.006, 0.008, 0.77, 0.02), 60, (0.0015, 0.0015, 0.06, 0.006)),
    "sgd 0.1, 128": (sgd(0.1), 128, 620, (0.050, 0.056, 0.90, 0.12), 30, (0.008, 0.009, 0.04, 0.015)),
    "sgd 0.1, 1024": (sgd(0.1), 1024, 600, (0.230, 0.268, 0.86, 0.52), 30, (0.02, 0.02, 0.02, 0.03)),
    "sgd 0.3, 1024": (sgd(0.3), 1024, 210, (0.031, 0.052, 0.60, 0.07), 30, (0.009, 0.015, 0.07, 0.025)),
    "heavy ball 0.01": (
        sgd(0.01, momentum=0.9),
        128,
        630,
        (0.33, 0.44, 0.76, 0.62),
        40,
        (0.03, 0.04, 0.04, 0.04),
    ),
    "heavy ball 0.05": (
        sgd(0.05, momentum=0.9),
        128,
        150,
        (0.30, 0.38, 0.80, 0.44),
        40,
        (0.08, 0.1, 0.05, 0.1),
    ),
    "heavy ball 0.2": (
        sgd(0.2, momentum=0.9),
        128,
        70,
        (0.25, 0.31, 0.82, 0.14),
        40,
        (0.1, 0.13, 0.06, 0.08),
    ),
    "adam 3e-4": (adam(3e-4), 128, 640, (0.37, 0.49, 0.76, 0.73), 70, (0.02, 0.04, 0.04, 0.03)),
    "adam 1e-3": (adam(1e-3), 128, 230, (0.37, 0.48, 0.78, 0.68), 40, (0.04, 0.04, 0.04, 0.05)),
    "adam 3e-3": (adam(3e-3), 128, 100, (0.34, 0.44, 0.78, 0.57), 30, (0.06, 0.06, 0.06, 0.06)),
    "adam 1e-2": (adam(1e-2), 128, 60, (0.26, 0.40, 0.66, 0.37), 60, (0.12, 0.2, 0.08, 0.12)),
}
QUICK = ("heavy ball 0.05", "heavy ball 0.2", "adam 1e-3", "adam 3e-3", "adam 1e-2")


def check_row(name: str) -> None:
    make, batch, steps, fields, scatter, spreads = ROWS[name]
    training = Training(make, batch)
    start = training.full_loss()
    values = training.until(0.1)
    values["conversion"] = (start - training.full_loss()) / values["work_ito"]  # of the loss on all images
    training.meter.close()
    assert training.steps == pytest.approx(steps, abs=scatter)
    got = {field: values[field] for field in FIELDS}
    wanted = {
        field: pytest.approx(value, abs=spread) for field, value, spread in zip(FIELDS, fields, spreads, strict=True)
    }
    assert got == wanted


@pytest.mark.parametrize("name", QUICK)
def test_row_of_the_table(name: str) -> None:
    check_row(name)


@slow
@pytest.mark.parametrize("name", [name for name in ROWS if name not in QUICK])
def test_long_row_of_the_table(name: str) -> None:
    check_row(name)


def test_at_equal_steps_plain_sgd_wastes_what_momentum_does_not() -> None:
    """§8 in words, on the first 60 steps: batch noise shows as low straightness and low conversion."""
    plain = Training(sgd(0.1), 16).run(60)
    heavy = Training(sgd(0.01, momentum=0.9), 16).run(60)
    for name in ("straightness", "kinematic_efficiency", "signal_fraction"):
        assert plain[name] < 0.6 * heavy[name], name
