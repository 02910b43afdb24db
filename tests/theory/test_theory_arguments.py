"""Bad input raises: the argument, what it got, what it wanted, the cure."""

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from torch import nn

from lightning_speedlimit import theory
from lightning_speedlimit.theory import (
    empirical_ntk,
    gradient_flow,
    langevin,
    linear_regression,
    ntk_eigenbasis,
    perceptron,
    power_law,
    power_law_exponent,
    predict,
    split_initial,
)

X, Y = torch.ones(4, 3), torch.ones(4)
NET = nn.Linear(3, 1)


class Loss(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.function = function

    def forward(self, x: torch.Tensor) -> object:
        return self.function(x @ self.weight)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gradient_flow([1.0, 2.0], [1.0], [1.0]), r"eigenvalues, residual must have one value per mode each"),
        (lambda: gradient_flow([[1.0]], [1.0], [1.0]), r"eigenvalues must have shape \(modes,\), got \(1, 1\); use"),
        (
            lambda: gradient_flow([1.0, -1e-18], 1.0, 1.0),
            r"eigenvalues must not be negative, got -1e-18; .* to 0",
        ),
        (lambda: gradient_flow([1.0], [math.nan], [1.0]), r"residual must be finite, got NaN or inf"),
        (lambda: gradient_flow([], [], [1.0]), r"eigenvalues must not be empty, got shape \(0,\)"),
        (lambda: gradient_flow([1.0], [1.0], []), r"times must not be empty"),
        (lambda: gradient_flow([1.0], [1.0], [1.0, -0.5]), r"times must not be negative, got -0.5"),
        (lambda: gradient_flow([1.0], [1.0], math.inf), r"times must be finite.*large numbers"),
        (lambda: split_initial([-1.0], [1.0], [1.0], 1.0), r"eigenvalues must not be negative"),
        (lambda: split_initial([1.0], [1.0], [1.0, 2.0], 1.0), r"initial, targets must have one value per mode"),
        (lambda: langevin(1.0, 0.0, [2.0, -1.0], 1.0, 1.0), r"std must not be negative, got -1; it is the square root"),
        (lambda: langevin(1.0, 0.0, 1.0, -0.1, 1.0), r"temperature must be a finite number ≥ 0, got -0.1; 0 turns"),
        (lambda: langevin(1.0, 0.0, 1.0, math.nan, 1.0), r"temperature must be (a )?finite"),
        (lambda: power_law(0.0, 1.0, 10, 1.0), r"kernel_exponent must be above 0, got 0"),
        (lambda: power_law(1.0, math.inf, 10, 1.0), r"residual_exponent must be finite, got inf"),
        (
            lambda: power_law(1.0, 1.0, 0, 1.0),
            r"modes must be a whole number of at least 1, got 0",
        ),
        (lambda: power_law_exponent(-1.0, 1.0), r"kernel_exponent must be above 0"),
        (lambda: linear_regression(Y, Y, 1.0), r"inputs must have shape \(N, d\), got \(4,\); use flatten"),
        (lambda: linear_regression(X, torch.ones(5), 1.0), r"targets must have shape \(4,\) or \(4, outputs\), got"),
        (lambda: linear_regression(X, Y, 1.0, weights=Y), r"weights must have shape \(3,\), one per input and output"),
        (lambda: linear_regression(X, Y, 1.0, std=-1.0), r"std must be a finite number ≥ 0, got -1.0"),
        (
            lambda: linear_regression(X, Y, 1.0, reduction="none"),
            r"reduction must be 'sum' .* or 'mean' .*, got 'none'",
        ),
        (lambda: perceptron(X, torch.ones(4, 1), 1.0), r"targets must have shape \(N,\), got \(4, 1\)"),
        (lambda: perceptron(X[:, :0], Y, 1.0), r"inputs must not be empty, got shape \(4, 0\)"),
        (lambda: perceptron(X, Y, 1.0, weight_decay=-1.0), r"weight_decay must be a finite number ≥ 0"),
        (lambda: perceptron(X, Y, 1.0, std=-1.0), r"std must not be negative"),
        (lambda: predict(NET, X, Y, 1.0), r"targets must have the shape of the outputs, \(4, 1\), got \(4,\); use"),
        (lambda: predict(NET, X, Y[:, None], 1.0, reduction="none"), r"reduction must be"),
        (lambda: predict(NET, X, Y[:, None] * math.nan, 1.0), r"targets must be finite"),
        (lambda: predict(NET, X, Y[:0], 1.0, reduction="mean"), r"targets must not be empty"),
        # Before any work is done: these inputs do not even fit.
        (lambda: predict(NET, X[:, :2], Y[:, None], -1.0), r"times must not be negative"),
        (lambda: ntk_eigenbasis(NET, X[:, :2], Y[:, None] * math.nan), r"targets must be finite"),
        (lambda: empirical_ntk(NET, (X, X[:2])), r"inputs must be tensors \(N, …\) of the same N ≥ 1, got shapes"),
        (lambda: empirical_ntk(NET, X[:0]), r"of the same N ≥ 1"),
        (lambda: empirical_ntk(NET, ()), r"of the same N ≥ 1, got shapes \[\]"),
        (lambda: empirical_ntk(NET, torch.tensor(1.0)), r"of the same N ≥ 1, got shapes \[\(\)\]"),
        (lambda: empirical_ntk(nn.Tanh(), X), r"module must have parameters that require grad, got none among 0"),
        (lambda: empirical_ntk(nn.Linear(3, 1).requires_grad_(False), X), r"got none among 2; unfreeze"),
        (lambda: empirical_ntk(Loss(torch.mean), X), r"outputs of shape \(4, …\), one row per sample, got \(\); pass"),
        (lambda: empirical_ntk(Loss(lambda f: f[:3]), X), r"one row per sample, got \(3,\)"),
        (lambda: empirical_ntk(Loss(lambda f: f[:, None][:, :0]), X), r"one row per sample, got \(4, 0\)"),
        (lambda: empirical_ntk(Loss(lambda f: f.log() * 0 - math.inf), X), r"outputs must be finite"),
        (lambda: empirical_ntk(Loss(lambda f: (f - 3).sqrt()), X), r"the Jacobian must be finite, got NaN or inf"),
    ],
)
def test_values(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gradient_flow(torch.ones(1) * 1j, [1.0], [1.0]), r"eigenvalues must be real, got torch.complex64"),
        (lambda: gradient_flow([1.0], np.ones(1) * 1j, [1.0]), r"residual must be real, got complex128"),
        (lambda: empirical_ntk(NET, [X, X]), r"inputs must be a tensor or a tuple of tensors, got list; wrap"),
        (lambda: empirical_ntk(NET, (X, 3)), r"inputs must be a tensor or a tuple of tensors, got int; wrap"),
        (lambda: power_law(1.0, 1.0, 1e6, 1.0), r"modes must be a whole number, got 1000000.0; use int"),
        (lambda: power_law(1.0, 1.0, True, 1.0), r"modes must be a whole number, got True"),
        (lambda: empirical_ntk(Loss(lambda f: (f, f)), X), r"module must return one tensor, got tuple; wrap it"),
        (lambda: empirical_ntk(Loss(lambda f: f * 1j), X), r"must return real floating values, got torch.complex64"),
    ],
)
def test_types(call: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


def test_results_are_frozen() -> None:
    share = split_initial([1.0], [1.0], [2.0], 1.0)
    with pytest.raises(FrozenInstanceError):
        share.wasserstein2_squared = share.entropy_production
    with pytest.raises(FrozenInstanceError):
        share.actual.efficiency = share.actual.time


@pytest.mark.parametrize("convert", [list, tuple, np.asarray, torch.tensor])
def test_plain_numbers_are_double_precision(convert: Callable[[list[float]], object]) -> None:
    # 0.1 is another number in single precision; torch's default type is that. A float32 tensor stays what it is.
    curve = gradient_flow(convert([0.1]), convert([1.0]), convert([0.3]))
    expected = -math.expm1(-2 * 0.1 * 0.3) / 2
    single = convert is torch.tensor
    assert curve.entropy_production.item() == pytest.approx(expected, rel=1e-6 if single else 1e-15)


def test_every_public_name_is_documented() -> None:
    for name in theory.__all__:
        assert getattr(theory, name).__doc__, name
