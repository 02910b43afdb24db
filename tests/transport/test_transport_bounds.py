"""lower ≤ W₂² ≤ upper in exact arithmetic, over clouds that hypothesis looks for.

The truth is rational: coordinates are small integers times a power of two, or any float32 numbers on a line,
where sorting is optimal. It is compared with the floats of the result as fractions: no rounding in between.
Weights are multiples of 1/64 where they are given, so that they too are exact.
"""

import itertools
import math
from collections.abc import Iterator
from fractions import Fraction

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor
from transport_reference import by_assignment, direct_costs

from lightning_speedlimit.transport import Transport, wasserstein2_squared

UNIT = 64  # of the weights


def assert_holds(found: Transport, truth: Fraction) -> None:
    assert Fraction(found.lower) <= truth <= Fraction(found.upper), float(truth)
    assert found.lower <= found.value <= found.upper


def assert_exact(found: Transport, truth: Fraction) -> None:
    """Relative 1e-12, what the documentation of the bounds leaves to the sums of the value."""
    assert_holds(found, truth)
    assert abs(Fraction(found.value) - truth) <= truth * Fraction(1, 10**12), float(truth)


# ---- integers on a grid: all permutations ----------------------------------------------------------------

scales = st.integers(-480, 480).map(lambda exponent: 2.0**exponent)  # squares from 1e-289 to 1e289
points = st.tuples(st.integers(-3, 3), st.integers(-3, 3))
rows = st.integers(1, 5).flatmap(lambda n: st.lists(points, min_size=2 * n, max_size=2 * n))


def squared(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return sum((s - t) ** 2 for s, t in zip(a, b, strict=True))


@settings(max_examples=200)
@given(points=rows, scale=scales, move=st.tuples(st.integers(-1000, 1000), st.integers(-1000, 1000)))
def test_integer_clouds(points: list[tuple[int, int]], scale: float, move: tuple[int, int]) -> None:
    n = len(points) // 2
    xs, ys = points[:n], [(a + move[0], b + move[1]) for a, b in points[n:]]
    best = min(sum(squared(x, y) for x, y in zip(xs, order, strict=True)) for order in itertools.permutations(ys))
    x, y = (torch.tensor(cloud, dtype=torch.float64) * scale for cloud in (xs, ys))
    assert_exact(wasserstein2_squared(x, y), Fraction(best, n) * Fraction(scale) ** 2)


# ---- any numbers on a line: sorting ----------------------------------------------------------------------

moderate = st.floats(-(2.0**40), 2.0**40, width=32, allow_subnormal=True)
wide = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)


def on_a_line(values: st.SearchStrategy[float], most: int = 20) -> st.SearchStrategy[tuple[list[float], list[float]]]:
    cloud = lambda n: st.lists(values, min_size=n, max_size=n)  # noqa: E731
    return st.integers(1, most).flatmap(lambda n: st.tuples(cloud(n), cloud(n)))


def column(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype)[:, None]


def by_sorting(xs: list[float], ys: list[float]) -> Fraction:
    pairs = zip(sorted(xs), sorted(ys), strict=True)
    return sum(((Fraction(x) - Fraction(y)) ** 2 for x, y in pairs), Fraction()) / len(xs)


@settings(max_examples=150)
@given(clouds=st.one_of(on_a_line(moderate), on_a_line(wide)))
def test_numbers_on_a_line(clouds: tuple[list[float], list[float]]) -> None:
    found = wasserstein2_squared(*map(column, clouds))
    assert_holds(found, by_sorting(*clouds))


@settings(max_examples=150)
@given(clouds=on_a_line(st.integers(-50, 50).map(float)), step=st.sampled_from([1e-7, 1e-3, 1.0, 1e5]))
def test_grids_on_a_line_far_from_the_origin(clouds: tuple[list[float], list[float]], step: float) -> None:
    # Of all sizes of the offset against the spacing that float64 resolves
    xs, ys = ([1e4 + step * value for value in cloud] for cloud in clouds)
    found = wasserstein2_squared(column(xs, torch.float64), column(ys, torch.float64))
    assert_exact(found, by_sorting(xs, ys))


# ---- weights on a line: quantiles ------------------------------------------------------------------------


@st.composite
def weights(draw: st.DrawFn, n: int) -> list[int]:
    """n integers that sum to UNIT, zeros among them."""
    cuts = sorted(draw(st.lists(st.integers(0, UNIT), min_size=n - 1, max_size=n - 1)))
    return [after - before for before, after in itertools.pairwise([0, *cuts, UNIT])]


def quantiles(values: list[float], masses: list[int]) -> Iterator[float]:
    for value, mass in sorted(zip(values, masses, strict=True)):
        yield from [value] * mass


def by_quantiles(xs: list[float], w: list[int], ys: list[float], v: list[int]) -> Fraction:
    return by_sorting(list(quantiles(xs, w)), list(quantiles(ys, v)))


@st.composite
def weighted(draw: st.DrawFn) -> tuple[list[float], list[int], list[float], list[int]]:
    n, m = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    values = draw(st.sampled_from([moderate, st.integers(-5, 5).map(float)]))
    xs, ys = (draw(st.lists(values, min_size=count, max_size=count)) for count in (n, m))
    return xs, draw(weights(n)), ys, draw(weights(m))


def shares(masses: list[int]) -> Tensor:
    return torch.tensor(masses, dtype=torch.float64) / UNIT


@settings(max_examples=150)
@given(clouds=weighted())
def test_weighted_numbers_on_a_line(clouds: tuple[list[float], list[int], list[float], list[int]]) -> None:
    xs, w, ys, v = clouds
    found = wasserstein2_squared(column(xs), column(ys), weights_x=shares(w), weights_y=shares(v))
    assert_holds(found, by_quantiles(xs, w, ys, v))


@settings(max_examples=100)
@given(clouds=weighted())
def test_weighted_clouds_that_can_be_read_once(clouds: tuple[list[float], list[int], list[float], list[int]]) -> None:
    xs, w, ys, v = clouds
    x, y = iter([column(xs)]), iter([column(ys)])
    found = wasserstein2_squared(x, y, weights_x=shares(w), weights_y=shares(v))
    assert_holds(found, by_quantiles(xs, w, ys, v))


# ---- squares below what float64 holds in full ------------------------------------------------------------


@pytest.mark.parametrize("exponent", [-500, -520, -535, -545])
@pytest.mark.parametrize("other", [3, 5])
def test_squares_that_underflow(exponent: int, other: int) -> None:
    # Squares below 2⁻¹⁰²² lose digits, and below 2⁻¹⁰⁷⁴ all of them. (No coordinates of float32 are as small.)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 1, generator=generator).double() * 2.0**exponent for n in (3, other))
    xs, ys = (cloud.flatten().tolist() for cloud in (x, y))
    truth = by_quantiles(xs, [other] * 3, ys, [3] * other)
    found = wasserstein2_squared(x, y)
    assert found.lower < found.upper
    if other == 3:
        assert_holds(found, truth)
    else:  # 1/3 and 1/5 are rounded, 1e-16 of squares that are about W₂² here
        assert Fraction(found.lower) <= truth * Fraction(10**14 + 1, 10**14)
        assert Fraction(found.upper) >= truth * Fraction(10**14 - 1, 10**14)


# ---- clouds that can be read once ------------------------------------------------------------------------


@settings(max_examples=100)
@given(clouds=st.one_of(on_a_line(moderate), on_a_line(st.integers(-3, 3).map(float))))
def test_numbers_on_a_line_read_once(clouds: tuple[list[float], list[float]]) -> None:
    xs, ys = clouds
    assert_holds(wasserstein2_squared(iter([column(xs)]), iter([column(ys)])), by_sorting(xs, ys))


# ---- the references and the check can fail -----------------------------------------------------------------


@settings(max_examples=100)
@given(clouds=on_a_line(st.integers(-20, 20).map(float), most=12))
def test_sorting_is_the_assignment(clouds: tuple[list[float], list[float]]) -> None:
    costs = direct_costs(*map(column, clouds))
    assert float(by_sorting(*clouds)) == pytest.approx(by_assignment(costs), rel=1e-12, abs=0)


@given(clouds=on_a_line(st.integers(-20, 20).map(float), most=8))
def test_an_interval_that_misses_is_noticed(clouds: tuple[list[float], list[float]]) -> None:
    truth = by_sorting(*clouds)
    assume(truth > 0)
    found = wasserstein2_squared(*map(column, clouds))
    assert_exact(found, truth)
    for wrong in (truth * Fraction(10**11 + 1, 10**11), truth * Fraction(10**11 - 1, 10**11)):
        with pytest.raises(AssertionError):
            assert_exact(found, wrong)
    assert math.isfinite(found.upper)
