"""What a squared distance between clouds does: symmetry, scaling, translation, triangle, relabelling, weights."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transport_cases import KINDS, Draw

from lightning_speedlimit.transport import Transport, wasserstein2_squared

# The same matching, summed in another order: at most 120 · 64 terms of float64.
SAME = 1e-12
# Rotated or moved coordinates are themselves rounded: 2e-16 of a coordinate, against displacements of 1e-4 of it here.
MOVED = 1e-10
# Between weights a program is solved to 1e-10 of W₂².
SOLVED = 1e-9
SEEDS = range(8)

kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
Kind = Callable[[Draw, int, int], tuple[Tensor, Tensor]]


def pair(kind: Kind, seed: int) -> tuple[Tensor, Tensor]:
    draw = Draw(seed)
    x, y = kind(draw, draw.integer(1, 120), draw.integer(1, 64))
    if (y - x).norm() < 1e-4 * x.norm():  # so that rounding of moved coordinates stays below MOVED
        y = x + (1e4 * (y - x))
    return x, y


def weights(draw: Draw, n: int) -> Tensor:
    w = -torch.rand(n, generator=draw.generator, dtype=torch.float64).log()
    return w / w.sum()


def value(x: Tensor, y: Tensor, **options: Tensor) -> float:
    return wasserstein2_squared(x, y, **options).value


def assert_overlap(first: Transport, second: Transport) -> None:
    """Two intervals of one truth."""
    assert first.lower <= second.upper
    assert second.lower <= first.upper


@kinds
def test_symmetric(kind: Kind) -> None:
    for seed in SEEDS:
        x, y = pair(kind, seed)
        there, back = wasserstein2_squared(x, y), wasserstein2_squared(y, x)
        assert back.value == pytest.approx(there.value, rel=SAME, abs=0)
        assert back.paired == pytest.approx(there.paired, rel=SAME, abs=0)
        assert_overlap(there, back)


@kinds
@pytest.mark.parametrize("scale", [2.0**-40, 3e-11, 1e12])
def test_scales_with_the_square(kind: Kind, scale: float) -> None:
    rounding = SAME if math.frexp(scale)[0] == 0.5 else MOVED  # powers of two are exact
    for seed in SEEDS:
        x, y = pair(kind, seed)
        plain, scaled = wasserstein2_squared(x, y), wasserstein2_squared(scale * x, scale * y)
        assert scaled.value == pytest.approx(scale**2 * plain.value, rel=rounding, abs=0)
        assert scaled.method == plain.method


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("length", [1e-3, 1.0, 1e3])
def test_a_translation_costs_its_square(length: float, dtype: torch.dtype) -> None:
    for seed in SEEDS:
        draw = Draw(seed)
        # Multiples of 2⁻¹⁰ below 2⁴, and of 2⁻²⁰ for what is moved: the sums of both are exact in float32 too.
        n, d = draw.integer(1, 120), draw.integer(1, 64)
        x = (draw.normal(n, d) * 2**6).round() / 2**6
        move = (length * draw.normal(d) * 2**10).round() / 2**10
        x, y = x.to(dtype), (x + move).to(dtype)
        assert torch.equal(y.double() - x.double(), move.expand(n, d))
        found = wasserstein2_squared(x, y)
        assert found.value == pytest.approx((move @ move).item(), rel=SAME, abs=0)
        assert found.lower <= (move @ move).item() <= found.upper
        assert found.method == "identity"
        assert found.identity_excess == 0


@kinds
def test_moving_both_changes_nothing(kind: Kind) -> None:
    for seed in SEEDS:
        draw, (x, y) = Draw(seed), pair(kind, seed)
        move = draw.normal(x.shape[1])
        assert value(x + move, y + move) == pytest.approx(value(x, y), rel=MOVED, abs=MOVED**2)


@kinds
def test_moving_one_adds_its_square(kind: Kind) -> None:
    # W₂²(x, y + c) = W₂²(x, y) + 2 ⟨ȳ − x̄, c⟩ + |c|²
    for seed in SEEDS:
        draw, (x, y) = Draw(seed), pair(kind, seed)
        move = draw.normal(x.shape[1])
        expected = value(x, y) + 2 * ((y.mean(0) - x.mean(0)) @ move).item() + (move @ move).item()
        assert value(x, y + move) == pytest.approx(expected, rel=MOVED, abs=0)


@kinds
def test_turning_both_changes_nothing(kind: Kind) -> None:
    for seed in SEEDS:
        x, y = pair(kind, seed)
        turn = Draw(seed).rotation(x.shape[1])
        assert value(x @ turn, y @ turn) == pytest.approx(value(x, y), rel=MOVED, abs=MOVED**2)


@kinds
def test_labels_do_not_matter(kind: Kind) -> None:
    for seed in SEEDS:
        x, y = pair(kind, seed)
        order = Draw(seed).order(len(x))
        plain, relabelled = wasserstein2_squared(x, y), wasserstein2_squared(x[order], y)
        assert relabelled.value == pytest.approx(plain.value, rel=SAME, abs=0)
        together = wasserstein2_squared(x[order], y[order])
        assert together.value == pytest.approx(plain.value, rel=SAME, abs=0)
        assert together.method == plain.method


@kinds
def test_coordinates_that_do_not_move_cost_nothing(kind: Kind) -> None:
    for seed in SEEDS:
        x, y = pair(kind, seed)
        constant = torch.full((len(x), 3), 7.0, dtype=torch.float64)
        assert value(torch.cat([x, constant], 1), torch.cat([y, constant], 1)) == pytest.approx(
            value(x, y), rel=SAME, abs=0
        )


def test_triangle_inequality_of_the_root() -> None:
    tight = 0
    for seed in range(60):
        draw = Draw(seed)
        d = draw.integer(1, 5)
        sizes = [draw.integer(1, 30) for _ in range(3)] if seed % 2 else 3 * [draw.integer(1, 30)]
        x, y, z = (draw.normal(n, d) + k * draw.normal(1, d) for k, n in enumerate(sizes))
        if seed % 3 == 0:
            y, z = 1.5 * x, 3 * x  # on one geodesic: equality
        xy, yz, xz = (math.sqrt(value(a, b)) for a, b in ((x, y), (y, z), (x, z)))
        assert xz <= (xy + yz) * (1 + SAME)
        tight += xz > (xy + yz) * (1 - SAME)
    assert tight >= 20


# ---- weights ---------------------------------------------------------------------------------------------


@kinds
def test_equal_weights_given_or_not(kind: Kind) -> None:
    for seed in SEEDS:
        x, y = pair(kind, seed)
        equal = torch.full((len(x),), 1 / len(x))  # float32: rounded, and divided by their sum
        plain = wasserstein2_squared(x, y)
        given = wasserstein2_squared(x, y, weights_x=equal, weights_y=equal)
        assert given.value == pytest.approx(plain.value, rel=SAME, abs=0)
        assert given.method == plain.method
        assert given.matching is not None
        assert plain.matching is not None
        assert torch.equal(given.matching, plain.matching)
        one_side = wasserstein2_squared(x, y, weights_y=equal.double())
        assert one_side.value == pytest.approx(plain.value, rel=SAME, abs=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_particle_twice_is_twice_its_weight(seed: int) -> None:
    draw = Draw(seed)
    n, m, d = draw.integer(2, 40), draw.integer(1, 40), draw.integer(1, 10)
    x, y = draw.normal(n, d), draw.normal(m, d)
    times = torch.randint(1, 4, (n,), generator=draw.generator)
    weighted = value(x, y, weights_x=times / times.sum())
    repeated = value(x.repeat_interleave(times, 0), y)
    # times / sum is in float32: 6e-8 of each weight is moved, at about the cost of the rest
    assert weighted == pytest.approx(repeated, rel=1e-6)
    assert value(x, y, weights_x=times.double() / times.sum()) == pytest.approx(repeated, rel=SOLVED, abs=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_splitting_a_particle_changes_nothing(seed: int) -> None:
    draw = Draw(seed)
    n, m, d = draw.integer(1, 40), draw.integer(1, 40), draw.integer(1, 10)
    x, y, w, v = draw.normal(n, d), draw.normal(m, d), weights(draw, n), weights(draw, m)
    whole = wasserstein2_squared(x, y, weights_x=w, weights_y=v)
    share = torch.rand(n, generator=draw.generator, dtype=torch.float64)
    parts = torch.cat([w * share, w * (1 - share)])
    split = wasserstein2_squared(torch.cat([x, x]), y, weights_x=parts, weights_y=v)
    assert split.value == pytest.approx(whole.value, rel=SOLVED, abs=0)
    assert_overlap(whole, split)


@pytest.mark.parametrize("seed", SEEDS)
def test_particles_without_weight_do_not_count(seed: int) -> None:
    draw = Draw(seed)
    n, m, d = draw.integer(1, 40), draw.integer(1, 40), draw.integer(1, 10)
    x, y, w, v = draw.normal(n, d), draw.normal(m, d), weights(draw, n), weights(draw, m)
    plain = value(x, y, weights_x=w, weights_y=v)
    far = torch.cat([x, 100 * draw.normal(3, d)])
    more = value(far, y, weights_x=torch.cat([w, w.new_zeros(3)]), weights_y=v)
    assert more == pytest.approx(plain, rel=SOLVED, abs=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_weights_are_divided_by_their_sum(seed: int) -> None:
    draw = Draw(seed)
    x, y, w = draw.normal(20, 3), draw.normal(20, 3), weights(draw, 20)
    plain = value(x, y, weights_x=w)
    with pytest.warns(UserWarning, match="weights_x sums to 8, not 1"):
        assert value(x, y, weights_x=8 * w) == pytest.approx(plain, rel=SAME, abs=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_common_weights_where_identity_is_optimal(seed: int) -> None:
    # y = 3 x is the gradient of a convex function, whatever weight a particle has.
    draw = Draw(seed)
    x, w = draw.normal(30, 4), weights(draw, 30)
    w[3] = 0
    w /= w.sum()
    found = wasserstein2_squared(x, 3 * x, weights_x=w, weights_y=w.clone())
    assert found.method == "identity"
    assert found.value == pytest.approx((w @ (2 * x).square().sum(1)).item(), rel=SAME)
    assert found.paired == found.value


def test_one_particle_against_many() -> None:
    draw = Draw(0)
    x, y, v = draw.normal(1, 5), draw.normal(30, 5), weights(draw, 30)
    expected = (v @ (x - y).square().sum(1)).item()
    found = wasserstein2_squared(x, y, weights_y=v)
    assert found.value == pytest.approx(expected, rel=SAME)
    assert found.lower <= expected <= found.upper
    assert found.converged
    assert math.isnan(found.paired)
    assert math.isnan(found.identity_excess)
    assert found.matching is None


def test_a_cloud_against_itself() -> None:
    x = Draw(0).normal(30, 5)
    found = wasserstein2_squared(x, x)
    assert found.value == found.lower == found.upper == found.paired == found.identity_excess == 0
    assert found.method == "identity"
    assert found.converged
