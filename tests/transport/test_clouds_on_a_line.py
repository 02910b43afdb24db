"""Particles of one coordinate, where sorting is the optimum: the k-th smallest goes to the k-th smallest."""

from __future__ import annotations

import pytest
import torch
from transport_cases import Draw

from lightning_speedlimit.transport import wasserstein2_squared


@pytest.mark.parametrize("n", [2, 3, 50, 513, 3000])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-6, 1e3), (1e9, 0.0)])
def test_sorting_is_found_and_proved(n: int, scale: float, offset: float) -> None:
    draw = Draw(n)
    x, y = scale * draw.normal(n, 1) + offset, scale * (1.5 * draw.normal(n, 1) + 0.2) + offset
    found = wasserstein2_squared(x, y)
    exact = float((x[:, 0].sort().values - y[:, 0].sort().values).square().mean())
    assert found.value == pytest.approx(exact, rel=1e-13)
    assert found.lower <= exact <= found.upper
    assert found.upper <= found.lower * (1 + 1e-11)
    assert found.matching is not None
    assert torch.equal(x[:, 0].argsort(), y[found.matching, 0].argsort())


def test_particles_at_one_place() -> None:
    x, y = torch.tensor([[0.0], [0.0], [1.0], [1.0]]), torch.tensor([[3.0], [1.0], [1.0], [3.0]])
    found = wasserstein2_squared(x, y)
    assert found.value == pytest.approx((1 + 1 + 4 + 4) / 4)
    assert found.converged


def test_an_order_that_stays_is_the_identity() -> None:
    x = torch.tensor([[0.0], [2.0], [1.0]])
    found = wasserstein2_squared(x, 3 * x)
    assert found.method == "identity"
    assert found.identity_excess == 0
    assert found.value == pytest.approx((0 + 16 + 4) / 3)
    assert found.converged


def test_a_line_needs_no_matrix_of_pairs() -> None:
    draw = Draw(0)
    x, y = draw.normal(10**5, 1), draw.normal(10**5, 1) + 1
    found = wasserstein2_squared(x, y)
    assert found.method == "sorting"
    assert found.converged
    assert found.value == pytest.approx(float((x[:, 0].sort().values - y[:, 0].sort().values).square().mean()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
def test_values_without_a_finite_square(bad: float) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        wasserstein2_squared(torch.tensor([[0.0], [bad]], dtype=torch.float64), torch.zeros(2, 1))
