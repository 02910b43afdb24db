"""Every public function of theory, ensemble, transport and metrics refuses what it cannot use, and says what and why.

Each argument in turn takes each bad value, the others stay good. What is accepted has to be accepted in time: no test
asserts it, but an unlimited count would never end.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bad_values import BAD, unclear_errors
from torch import nn

from lightning_speedlimit import ensemble, metrics, theory, transport

DRAWN = torch.Generator().manual_seed(0)
TIMES = torch.arange(5, dtype=torch.float64)
WALK = torch.randn(5, 40, 2, generator=DRAWN, dtype=torch.float64).cumsum(0)
LOSSES = 9.0 - TIMES[:, None] + 0.01 * WALK[..., 0]
CLOUD = WALK[0]
COV = torch.eye(2, dtype=torch.float64)
MODULE, INPUTS, TARGETS = nn.Linear(2, 1), torch.ones(3, 2), torch.ones(3, 1)


class Well(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones(1))

    def forward(self) -> torch.Tensor:
        return self.x.square().sum()


def loss(model: nn.Module, *_: object) -> torch.Tensor:
    return model()


def distance(**changed: Any) -> torch.Tensor:
    tolerance = {name: changed.pop(name) for name in ("tolerance",) if name in changed}
    metric = metrics.Wasserstein2Squared(**tolerance)
    metric.update(**({"x": CLOUD, "y": CLOUD + 1} | changed))
    return metric.compute()


def production(work: Any) -> torch.Tensor:
    metric = metrics.EntropyProduction()
    metric.update(work)
    return metric.compute()


def share(displacement_squared: Any, action: Any, elapsed: Any) -> torch.Tensor:
    metric = metrics.SpeedLimitEfficiency()
    metric.update(displacement_squared, action, elapsed)
    return metric.compute()


RATE = {"times": TIMES, "positions": WALK}
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "gradient_flow": (theory.gradient_flow, {"eigenvalues": [1.0, 2.0], "residual": [1.0, 1.0], "times": 1.0}),
    "split_initial": (
        theory.split_initial,
        {"eigenvalues": [1.0, 2.0], "initial": [1.0, 1.0], "targets": [0.0, 1.0], "times": 1.0},
    ),
    "langevin": (theory.langevin, {"curvature": 1.0, "mean": 1.0, "std": 1.0, "temperature": 0.1, "times": 1.0}),
    "linear_regression": (
        theory.linear_regression,
        {
            "inputs": INPUTS, "targets": TARGETS, "times": 1.0, "weights": torch.ones(2, 1), "std": 0.1,
            "reduction": "sum",
        },
    ),
    "perceptron": (
        theory.perceptron,
        {
            "inputs": INPUTS, "targets": TARGETS[:, 0], "times": 1.0, "weights": torch.ones(2), "std": 0.1,
            "temperature": 0.1, "weight_decay": 0.1, "reduction": "sum",
        },
    ),
    "power_law": (
        theory.power_law, {"kernel_exponent": 1.5, "residual_exponent": 0.5, "modes": 10, "times": 1.0}
    ),
    "power_law_exponent": (theory.power_law_exponent, {"kernel_exponent": 1.5, "residual_exponent": 0.5}),
    "empirical_ntk": (theory.empirical_ntk, {"module": MODULE, "inputs": INPUTS, "block_bytes": 2**20}),
    "ntk_eigenbasis": (
        theory.ntk_eigenbasis, {"module": MODULE, "inputs": INPUTS, "targets": TARGETS, "block_bytes": 2**20}
    ),
    "predict": (
        theory.predict,
        {
            "module": MODULE, "inputs": INPUTS, "targets": TARGETS, "times": 1.0, "reduction": "sum",
            "block_bytes": 2**20,
        },
    ),
    "wasserstein2_squared": (
        transport.wasserstein2_squared,
        {"x": CLOUD, "y": CLOUD + 1, "tolerance": 1e-3, "weights_x": torch.ones(40) / 40, "weights_y": None},
    ),
    "gaussian_wasserstein2_squared": (
        transport.gaussian_wasserstein2_squared,
        {"mean_x": CLOUD[0], "cov_x": COV, "mean_y": CLOUD[1], "cov_y": COV},
    ),
    "gaussian_entropy": (ensemble.gaussian_entropy, {"positions": CLOUD}),
    "neighbour_entropy": (ensemble.neighbour_entropy, {"positions": CLOUD, "neighbours": 4}),
    "speed_limit": (
        ensemble.speed_limit,
        {
            **RATE, "losses": LOSSES, "temperature": 0.1, "start": 0, "end": -1, "entropy": "gaussian",
            "neighbours": 4, "tolerance": 1e-3,
        },
    ),
    "entropy_production_bound": (
        ensemble.entropy_production_bound, {**RATE, "degree": 1, "lag": 1, "folds": 5, "blocks": 40}
    ),
    "entropy_production_linear": (
        ensemble.entropy_production_linear, {**RATE, "lag": 1, "stationary": False, "blocks": 40}
    ),
    "entropy_production_polynomial": (
        ensemble.entropy_production_polynomial, {**RATE, "degree": 1, "lag": 1, "blocks": 40}
    ),
    "train_replicas": (
        ensemble.train_replicas,
        {
            "modules": Well, "loss_fn": loss, "data": (), "lr": 0.1, "steps": 2, "replicas": 3, "temperature": 0.1,
            "batch_size": None, "batches": "independent", "record_at": [0, 2], "chunk_size": None, "seed": 0,
        },
    ),
    "Wasserstein2Squared": (distance, {"x": CLOUD, "y": CLOUD + 1, "tolerance": 1e-3}),
    "EntropyProduction": (production, {"work": 1.0}),
    "SpeedLimitEfficiency": (share, {"displacement_squared": 1.0, "action": 1.0, "elapsed": 2.0}),
}  # fmt: skip

OWN = {("loss_fn", "a function")}  # what a loss of the user's own raises
# A module's own forward says what it does not take.
FORWARD = {"an integer tensor", "a complex tensor", "a sparse tensor", "a tensor of another shape", "a meta tensor"}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore")
def test_bad_values_are_refused_with_a_reason(name: str) -> None:
    call, good = CALLS[name]
    own = {("inputs", kind) for kind in FORWARD} if "module" in good else set()
    assert not (unclear := unclear_errors(call, good, BAD, own | OWN)), "\n".join(unclear)


def test_every_public_function_is_called() -> None:
    functions = {
        function
        for room in (theory, ensemble, transport)
        for function in room.__all__
        if inspect.isfunction(getattr(room, function))
    }
    assert functions | set(metrics.__all__) == set(CALLS)
