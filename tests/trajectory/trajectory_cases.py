"""Training problems and optimizer settings that the tests of the trajectory share."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# Rounding of the sums that the meter keeps for parameters of each type: float32 gradients, states and tile
# sums carry a few 6e-8 each, and a hundred of them add; in float64 the same is 1e-14, and 1e-9 leaves room
# for differences of nearly equal numbers.
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-9, torch.complex64: 1e-5, torch.complex128: 1e-9}


@dataclass(frozen=True)
class Recipe:
    """An optimizer with its flags; `settled` steps of a constant gradient bring u = μ f to 1e-10."""

    kind: type[Optimizer]
    options: dict[str, Any] = field(default_factory=dict)
    settled: int = 1

    def __call__(self, parameters: Iterable[Any], **changed: Any) -> Optimizer:
        return self.kind(parameters, **(self.options | changed))

    def __str__(self) -> str:
        flags = [f"{k}={v}" for k, v in self.options.items() if k not in ("lr", "betas", "eps", "alpha")]
        return "-".join([self.kind.__name__, *flags])

    def but(self, **changed: Any) -> "Recipe":
        return Recipe(self.kind, self.options | changed, self.settled)


# 0.8^110 = 2e-11 for the momenta. RMSprop's momentum waits for its denominators too: 0.9^240 = 1e-11.
FORMULA_RECIPES = [
    Recipe(torch.optim.SGD, {"lr": 0.1}),
    Recipe(torch.optim.SGD, {"lr": 0.1, "momentum": 0.8}, 110),
    Recipe(torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "dampening": 0.3}, 110),
    Recipe(torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True}, 110),
    Recipe(torch.optim.RMSprop, {"lr": 0.01, "alpha": 0.9}),
    Recipe(torch.optim.RMSprop, {"lr": 0.01, "alpha": 0.99, "centered": True}),
    Recipe(torch.optim.RMSprop, {"lr": 0.01, "alpha": 0.9, "momentum": 0.8}, 240),
    Recipe(torch.optim.Adam, {"lr": 0.01}),
    Recipe(torch.optim.Adam, {"lr": 0.01, "betas": (0.8, 0.95), "amsgrad": True}),
    Recipe(torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.0}),
    Recipe(torch.optim.NAdam, {"lr": 0.01}),
    Recipe(torch.optim.RAdam, {"lr": 0.01}),
    Recipe(torch.optim.Adamax, {"lr": 0.01}),
    Recipe(torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.05, "initial_accumulator_value": 0.01}),
    Recipe(torch.optim.Adadelta, {"lr": 1.0}),
]


def recipe_ids(recipes: list[Recipe]) -> list[str]:
    return [str(recipe) for recipe in recipes]


class Classifier(nn.Module):
    """8 → 12 → 12 → 3, ReLU; `side` is a branch that may be left out, so that its gradients are None."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(8, 12)
        self.second = nn.Linear(12, 12)
        self.side = nn.Linear(8, 3)
        self.head = nn.Linear(12, 3)
        self.to(dtype)

    def forward(self, x: Tensor, *, side: bool = True) -> Tensor:
        hidden = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(hidden) + (self.side(x) if side else 0.0)


def batches(seed: int, number: int, dtype: torch.dtype = torch.float64) -> Iterator[tuple[Tensor, Tensor]]:
    """Random classification batches. Feature 0 is silent, and feature 1 for the first four batches:
    the weights that read them stay idle."""
    generator = torch.Generator().manual_seed(seed)
    for k in range(number):
        x = torch.randn(10, 8, generator=generator, dtype=torch.float64)
        x[:, 0] = 0
        if k < 4:
            x[:, 1] = 0
        yield x.to(dtype), torch.randint(3, (10,), generator=generator)


def gradients(loss: Tensor, optimizers: Iterable[Optimizer]) -> float:
    """Backward from scratch; the loss as a number."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    return loss.item()


@dataclass(frozen=True)
class LinearRegression:
    """½‖Jθ − y‖²: gradient flow on it is solved by THEORY §6 in the eigenbasis of K = JJᵀ."""

    jacobian: Tensor
    targets: Tensor
    start: Tensor

    @classmethod
    def random(cls, seed: int, eigenvalues: list[float], parameters: int) -> "LinearRegression":
        """Jacobian with the given spectrum of K, in a random basis on both sides."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        n = len(eigenvalues)
        left = torch.linalg.qr(draw(n, n)).Q
        right = torch.linalg.qr(draw(parameters, n)).Q
        root = torch.tensor(eigenvalues, dtype=torch.float64).sqrt()
        return cls(left * root @ right.T, draw(n), draw(parameters))

    def loss(self, theta: Tensor) -> Tensor:
        return 0.5 * (self.jacobian @ theta - self.targets).square().sum()

    def flow(self, time: float) -> tuple[float, float]:
        """(W₂², loss drop) of gradient flow after `time`."""
        eigenvalues, basis = torch.linalg.eigh(self.jacobian @ self.jacobian.T)
        residual = basis.T @ (self.jacobian @ self.start - self.targets)
        moving = eigenvalues > 1e-12 * eigenvalues.max()
        rate, r2 = eigenvalues[moving], residual[moving] ** 2
        squared = ((1 - torch.exp(-rate * time)) ** 2 * r2 / rate).sum()
        drop = 0.5 * ((1 - torch.exp(-2 * rate * time)) * r2).sum()
        return float(squared), float(drop)

    def flow_efficiency(self, time: float) -> float:
        squared, drop = self.flow(time)
        return squared / (time * drop)


def convergence_order(errors: list[float]) -> list[float]:
    """The exponents p of error ~ step^p between runs whose step halves each time."""
    return [math.log2(a / b) for a, b in pairwise(errors)]
