"""What of W₂² and of the loss drop is owed to a non-zero initial function."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from theory_cases import draw, exact_flow
from torch import nn

from lightning_speedlimit.theory import gradient_flow, ntk_eigenbasis, split_initial

ROUNDING = 1e-13  # of a sum of 5 modes, and of its difference from 1


@pytest.mark.parametrize("time", [1e-6, 0.3, 10.0, 1e4])
def test_shares_by_decimal_arithmetic(time: float) -> None:
    eigenvalues, initial, targets = [2.0, 1.0, 0.125], [0.5, -1.25, 2.0], [1.5, 1.0, -0.75]
    share = split_initial(eigenvalues, initial, targets, time)
    actual = exact_flow(eigenvalues, [f - y for f, y in zip(initial, targets, strict=True)], time)
    from_zero = exact_flow(eigenvalues, targets, time)
    assert share.wasserstein2_squared.item() == pytest.approx(1 - from_zero[0] / actual[0], abs=ROUNDING)
    assert share.entropy_production.item() == pytest.approx(1 - from_zero[1] / actual[1], abs=ROUNDING)
    for curve, expected in ((share.actual, actual), (share.from_zero, from_zero)):
        found = (curve.wasserstein2_squared, curve.entropy_production, curve.efficiency)
        assert found == pytest.approx(expected, rel=ROUNDING, abs=0)


@pytest.mark.parametrize(("multiple", "expected"), [(0.0, 0.0), (-1.0, 0.75), (0.5, -3.0), (3.0, 0.75)])
def test_an_initial_function_along_the_targets(multiple: float, expected: float) -> None:
    # f = a y: r² = (a − 1)² y² in each mode, at all times, t = 0 included.
    targets = draw(1, 5)
    share = split_initial(draw(0, 5).square(), multiple * targets, targets, [0.0, 1e-3, 1.0, 1e3])
    for value in (share.wasserstein2_squared, share.entropy_production):
        assert value.tolist() == pytest.approx([expected] * 4, abs=ROUNDING)


def test_limits_of_the_entropy_share() -> None:
    # t → ∞: 1 − Σy²/Σ(f − y)²; t → 0: the same with weights λ, for both shares. Here 1 − 5/10 and 1 − 6/13.
    share = split_initial([1.0, 2.0, 0.0], [0.0, -1.0, 9.0], [1.0, 2.0, 1.0], [0.0, 1e9])
    at_start = 1 - (1 * 1 + 2 * 4) / (1 * 1 + 2 * 9)
    assert share.entropy_production.tolist() == pytest.approx([at_start, 1 - 5 / 10], abs=ROUNDING)
    assert share.wasserstein2_squared[0].item() == pytest.approx(at_start, abs=ROUNDING)
    assert share.wasserstein2_squared[1].item() == pytest.approx(1 - (1 + 4 / 2) / (1 + 9 / 2), abs=ROUNDING)


def test_nan_where_nothing_moves() -> None:
    share = split_initial([1.0, 0.0], [2.0, 0.0], [2.0, 1.0], [0.0, 1.0])
    assert share.wasserstein2_squared.isnan().all()
    assert share.entropy_production.isnan().all()


vectors = st.lists(st.tuples(*[st.floats(-3, 3)] * 3), min_size=1, max_size=6)


@given(vectors, st.floats(0, 50))
def test_shares_agree_with_the_curves(rows: list[tuple[float, float, float]], time: float) -> None:
    exponents, initial, targets = torch.tensor(rows, dtype=torch.float64).T
    eigenvalues = 10**exponents
    share = split_initial(eigenvalues, initial, targets, time)
    actual = gradient_flow(eigenvalues, initial - targets, time)
    for name in ("wasserstein2_squared", "entropy_production"):
        value, whole = getattr(share, name), getattr(actual, name)
        torch.testing.assert_close(getattr(share.actual, name), whole, rtol=1e-13, atol=0)
        if whole > 1e-200:  # (1 − share) × whole = what is left
            left = getattr(share.from_zero, name)
            assert ((1 - value) * whole).item() == pytest.approx(left.item(), rel=1e-12, abs=1e-12 * whole.item())


def test_from_a_module() -> None:
    # The last layer is 0, so is f; then it is not.
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    for parameter in net[2].parameters():
        nn.init.zeros_(parameter)
    inputs, targets = draw(0, 6, 3), draw(1, 6, 1)
    share = split_initial(*ntk_eigenbasis(net, inputs, targets), [0.1, 1.0])
    assert share.wasserstein2_squared.tolist() == share.entropy_production.tolist() == [0.0, 0.0]
    nn.init.constant_(net[2].bias, 4.0)  # at large t all that can move: Q = ½‖f − y‖² from either start
    share = split_initial(*ntk_eigenbasis(net, inputs, targets), 1e9)
    expected = 1 - targets.square().sum() / (4 - targets).square().sum()
    # Kernel eigenvalues span 4 decades, and the last may keep a part in 1e6 of the residual in place.
    assert share.entropy_production.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("rate", [5e-324, 1e-310, 1e-200, 1e200])
@pytest.mark.parametrize("size", [1e-170, 1.0, 1e150])
@pytest.mark.parametrize("time", [0.0, 1e-5, 1.0])
def test_shares_have_no_unit(rate: float, size: float, time: float) -> None:
    # λt and the ratio of the residuals say it all, also where W₂² and the loss drop are not among the numbers.
    rows = torch.tensor([[1.0, 3.0], [0.5, 2.0], [2.0, -1.0]], dtype=torch.float64)
    expected = split_initial(rows[0], rows[1], rows[2], time)
    if time / rate == math.inf:
        pytest.skip("no such time")
    found = split_initial(rate * rows[0], size * rows[1], size * rows[2], time / rate)
    assert found.wasserstein2_squared.item() == pytest.approx(expected.wasserstein2_squared.item(), rel=1e-9)
    assert found.entropy_production.item() == pytest.approx(expected.entropy_production.item(), rel=1e-9)
