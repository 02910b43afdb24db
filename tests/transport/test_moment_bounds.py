"""Bounds from means and covariances, for clouds too large for a matrix of their pairs."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor
from transport_cases import KINDS, MONOTONE, Draw, random_pair
from transport_reference import bounds_by_duality, by_assignment, direct_costs

from lightning_speedlimit.transport import Transport, moments, wasserstein2, wasserstein2_squared
from lightning_speedlimit.transport.clouds import Clouds

# scipy.linalg.sqrtm of a product of covariances: good to half the digits where they are nearly singular,
# and to 1e-10 where their condition is below 1e4, as here.
SQRTM = 1e-9


@pytest.fixture(autouse=True)
def _matrix_of_no_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wasserstein2, "MAX_PAIRS", 0)
    monkeypatch.setattr(Clouds, "line", lambda self: None)  # clouds of one coordinate are sorted, however large


def gelbrich(x: Tensor, y: Tensor, w: np.ndarray | None = None, v: np.ndarray | None = None) -> float:
    """|m_x − m_y|² + tr (Σ_x + Σ_y − 2 (Σ_x^½ Σ_y Σ_x^½)^½) of the empirical moments."""
    clouds = [cloud.double().numpy() for cloud in (x, y)]
    means = [np.average(cloud, axis=0, weights=u) for cloud, u in zip(clouds, (w, v), strict=True)]
    covs = [
        np.atleast_2d(np.cov(cloud, rowvar=False, bias=True) if u is None else np.cov(cloud.T, aweights=u, bias=True))
        for cloud, u in zip(clouds, (w, v), strict=True)
    ]
    root = scipy.linalg.sqrtm(covs[0])
    cross = scipy.linalg.sqrtm(root @ covs[1] @ root)
    return float(((means[0] - means[1]) ** 2).sum() + np.trace(covs[0] + covs[1] - 2 * cross.real))


def independent_coupling(x: Tensor, y: Tensor) -> float:
    return float(direct_costs(x, y).mean())


def by_moments(x: object, y: object, **options: Tensor) -> Transport:
    found = wasserstein2_squared(x, y, **options)  # type: ignore[arg-type]
    assert found.method == "moments"
    assert found.matching is None
    assert found.lower <= found.value <= found.upper
    assert found.converged == (found.upper <= 1.001 * found.lower)
    return found


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_truth_lies_within(kind: Callable[..., object]) -> None:
    for seed in range(KINDS.index(kind), 210, len(KINDS)):
        x, y = random_pair(seed, largest=150)
        expected = by_assignment(direct_costs(x, y))
        found = by_moments(x, y)
        assert found.lower <= expected <= found.upper, seed


def test_the_truth_lies_within_for_other_numbers_and_weights() -> None:
    for seed in range(40):
        draw = Draw(seed)
        n, m, d = draw.integer(1, 60), draw.integer(1, 60), draw.integer(1, 30)
        x, y = draw.normal(n, d), draw.uniform(0.1, 3) * draw.normal(m, d) + draw.normal(1, d)
        w, v = (torch.rand(count, generator=draw.generator).double() for count in (n, m))
        w, v = w / w.sum(), v / v.sum()
        below, above = bounds_by_duality(direct_costs(x, y), w.numpy(), v.numpy())
        found = by_moments(x, y, weights_x=w, weights_y=v)
        # 1e-14: the reference's own sums
        assert found.lower <= above * (1 + 1e-14), seed
        assert found.upper >= below * (1 - 1e-14), seed
        assert np.isnan(found.paired)


@pytest.mark.parametrize("seed", range(10))
def test_gelbrichs_bound_of_the_moments(seed: int) -> None:
    draw = Draw(seed)
    d = draw.integer(1, 20)
    n, m = 10 * d + draw.integer(0, 50), 10 * d + draw.integer(0, 50)
    x, y = draw.normal(n, d), draw.normal(m, d) @ draw.rotation(d) * 2 + draw.normal(1, d)
    assert by_moments(x, y).lower == pytest.approx(gelbrich(x, y), rel=SQRTM, abs=0)
    w, v = (torch.rand(count, generator=draw.generator).double() + 0.1 for count in (n, m))
    w, v = w / w.sum(), v / v.sum()
    weighted = by_moments(x, y, weights_x=w, weights_y=v)
    assert weighted.lower == pytest.approx(gelbrich(x, y, w.numpy(), v.numpy()), rel=SQRTM, abs=0)


def test_the_upper_bound_is_the_cheaper_of_pairing_and_independence() -> None:
    draw = Draw(0)
    x = draw.normal(40, 5)
    y = x + 0.1 * draw.normal(40, 5)
    near = by_moments(x, y)
    assert near.value == near.paired == pytest.approx((y - x).square().sum(1).mean().item(), rel=1e-12)
    assert near.identity_excess == 0
    far = by_moments(x, -x)
    assert far.value == pytest.approx(independent_coupling(x, -x), rel=1e-12)
    assert far.paired == pytest.approx(4 * x.square().sum(1).mean().item(), rel=1e-12)
    assert far.identity_excess == far.paired / far.value - 1
    unequal = by_moments(x, y[:30])
    assert unequal.value == pytest.approx(independent_coupling(x, y[:30]), rel=1e-12)


@pytest.mark.parametrize("d", [1, 3, 30])
def test_exact_for_affine_maps_between_gaussians(d: int) -> None:
    # y = A x + c with A symmetric positive definite is optimal for any cloud, and reaches Gelbrich's bound.
    for seed in range(5):
        draw = Draw(seed)
        x, y = MONOTONE[0](draw, 10 * d, d)
        y = y + draw.normal(1, d)
        expected = (y - x).square().sum(1).mean().item()
        found = by_moments(x, y)
        assert found.lower <= expected <= found.upper
        # 1e-12 of the spread is taken off the root; it is at most 100 times the root of W₂² here
        assert found.lower == pytest.approx(expected, rel=1e-9, abs=0)
        assert found.value == pytest.approx(expected, rel=1e-12, abs=0)
        assert found.converged


def test_fewer_particles_than_coordinates() -> None:
    draw = Draw(0)
    x, y = draw.normal(7, 300), draw.normal(9, 300)
    found = by_moments(x, y)
    below, above = bounds_by_duality(direct_costs(x, y), np.full(7, 1 / 7), np.full(9, 1 / 9))
    assert 0 < found.lower <= above
    assert found.upper >= below


def test_groups_of_coordinates_are_taken_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # Projections on orthogonal subspaces: their bounds add up to at most W₂².
    draw = Draw(0)
    x, y = draw.normal(60, 10), 2 * draw.normal(70, 10) @ draw.rotation(10)
    whole = by_moments(x, y)
    monkeypatch.setattr(moments, "_WIDTH", 4)
    parts = by_moments(x, y)
    groups = (slice(0, 4), slice(4, 8), slice(8, 10))
    assert parts.lower == pytest.approx(sum(gelbrich(x[:, part], y[:, part]) for part in groups), rel=SQRTM)
    assert parts.lower <= whole.lower
    assert parts.value == pytest.approx(whole.value, rel=1e-12)


def test_blocks_that_are_read_once() -> None:
    draw = Draw(0)
    x, y = draw.normal(50, 30), draw.normal(50, 30) + 1

    def blocks(cloud: Tensor) -> Iterator[Tensor]:
        yield from cloud.split(30, 1)

    assert by_moments(blocks(x), blocks(y)) == by_moments(x, y)
    cut = by_moments(iter(x.split(7, 1)), iter(y.split(7, 1)))
    assert cut.value == pytest.approx(by_moments(x, y).value, rel=1e-12)
    assert cut.lower <= by_assignment(direct_costs(x, y)) <= cut.upper


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("length", [1.0, 1e-3, 1e-7])
def test_a_translation_is_bounded_by_its_square(length: float, offset: float) -> None:
    # W₂² = |c|² here, and the means that differ by c are known to rounding of the offset only.
    for seed in range(20):
        draw = Draw(seed)
        x = draw.normal(20, 3) + offset
        move = length * draw.normal(3)
        y = x + move
        expected = by_assignment(direct_costs(x, y))
        found = by_moments(x, y)
        assert found.lower <= expected <= found.upper, seed
        fewer = by_moments(x, torch.cat([y, y]))
        assert fewer.lower <= expected <= fewer.upper, seed


@pytest.mark.parametrize("length", [1.0, 1e-3])
def test_a_particle_far_away_without_weight(length: float) -> None:
    # A translation of the others: W₂² = |c|².
    for seed in range(10):
        draw = Draw(seed)
        x, move = draw.normal(16, 3), length * draw.normal(3)
        far, w = torch.cat([torch.full((1, 3), 1e9).double(), x]), torch.cat([torch.zeros(1), torch.ones(16) / 16])
        found = by_moments(far, x + move, weights_x=w.double())
        expected = by_assignment(direct_costs(x, x + move))
        assert found.lower <= expected <= found.upper, seed


def test_a_cloud_and_itself() -> None:
    x = Draw(0).normal(20, 3) + 7
    found = by_moments(x, x.clone())
    assert found.lower == found.value == found.upper == found.identity_excess == 0
    assert found.converged
    apart = x.clone()
    apart[3, 1] = torch.nextafter(apart[3, 1], apart.new_tensor(9.0))
    assert by_moments(x, apart).upper > 0


@pytest.mark.parametrize("wrong", ["x", "y"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
def test_clouds_that_diverged(wrong: str, bad: float) -> None:
    clouds = {name: torch.randn(20, 3, dtype=torch.float64) for name in "xy"}
    clouds[wrong][4, 1] = bad
    with pytest.raises(ValueError, match=f"^{wrong} must be finite, got NaN or inf"):
        by_moments(**clouds)


def test_only_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = Draw(0)
    x, y = draw.normal(20, 3), draw.normal(30, 3)
    monkeypatch.setattr(wasserstein2, "MAX_PAIRS", 600)
    assert wasserstein2_squared(x, y).method == "linear program"
    monkeypatch.setattr(wasserstein2, "MAX_PAIRS", 599)
    assert wasserstein2_squared(x, y).method == "moments"


def test_warnings_point_at_the_caller() -> None:
    with pytest.warns(UserWarning, match="weights_x sums to 4") as record:
        wasserstein2_squared(torch.zeros(4, 3), torch.ones(4, 3), weights_x=torch.ones(4))
    assert record[0].filename == __file__
