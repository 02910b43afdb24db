"""W₂² between Gaussians against scipy's matrix root, closed forms, and what the formula does where it cancels."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor
from transport_cases import KINDS, Draw, random_pair
from transport_reference import by_assignment, direct_costs

from lightning_speedlimit.transport import gaussian_wasserstein2_squared
from lightning_speedlimit.transport.gaussian import procrustes_squared

# Sums of at most 40² float64 terms, and a singular value decomposition: a few hundred roundings.
SAME = 1e-13
# scipy.linalg.sqrtm of two matrices of condition ≤ 1e4: 1e-16 · 1e4 each, and the differences of traces.
SQRTM = 1e-9


def covariance(draw: Draw, d: int, *, rank: int | None = None) -> Tensor:
    """Eigenvalues from 0.1 to 10, or as many of them as `rank` and zeros."""
    values = 10 ** (2 * torch.rand(d, generator=draw.generator).double() - 1)
    if rank is not None:
        values[rank:] = 0
    turn = draw.rotation(d)
    cov = (turn * values) @ turn.T
    return (cov + cov.T) / 2


def by_sqrtm(mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor) -> float:
    root = scipy.linalg.sqrtm(cov_x.numpy())
    cross = scipy.linalg.sqrtm(root @ cov_y.numpy() @ root)
    traces = np.trace(cov_x.numpy()) + np.trace(cov_y.numpy()) - 2 * np.trace(cross).real
    return float(((mean_x - mean_y) ** 2).sum()) + float(traces)


@pytest.mark.parametrize("seed", range(20))
def test_against_a_matrix_root(seed: int) -> None:
    draw = Draw(seed)
    d = draw.integer(1, 40)
    given = draw.normal(d), covariance(draw, d), draw.normal(d), covariance(draw, d)
    assert gaussian_wasserstein2_squared(*given) == pytest.approx(by_sqrtm(*given), rel=SQRTM, abs=0)


@pytest.mark.parametrize("d", [1, 2, 7, 40])
def test_commuting_covariances(d: int) -> None:
    # Σ (√a − √b)²
    for seed in range(5):
        draw = Draw(seed)
        a, b = torch.rand(2, d, generator=draw.generator, dtype=torch.float64)
        mean_x, mean_y = draw.normal(d), draw.normal(d)
        expected = ((mean_x - mean_y) ** 2).sum() + ((a.sqrt() - b.sqrt()) ** 2).sum()
        found = gaussian_wasserstein2_squared(mean_x, a.diag(), mean_y, b.diag())
        assert found == pytest.approx(expected.item(), rel=SAME, abs=0)
        turn = draw.rotation(d)
        turned = [(turn * values) @ turn.T for values in (a, b)]
        found = gaussian_wasserstein2_squared(mean_x, turned[0], mean_y, turned[1])
        assert found == pytest.approx(expected.item(), rel=1e-10, abs=0)  # the turned matrices are rounded


def test_one_dimension() -> None:
    one = lambda *values: torch.tensor(values, dtype=torch.float64)  # noqa: E731
    found = gaussian_wasserstein2_squared(one(1.0), one(4.0)[None], one(-2.0), one(9.0)[None])
    assert found == pytest.approx(3**2 + (2 - 3) ** 2, rel=SAME)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_singular_covariances(rank: int) -> None:
    for seed in range(5):
        draw = Draw(seed)
        d = 8
        mean_x, mean_y = draw.normal(d), draw.normal(d)
        flat, full = covariance(draw, d, rank=rank), covariance(draw, d)
        # tr (√Σ_f Σ √Σ_f)^½ of the factors: Σ_f = A Aᵀ with A (d, rank) has the same nonzero spectrum as Aᵀ Σ A.
        values, vectors = torch.linalg.eigh(flat)
        a = (vectors * values.clamp(min=0).sqrt())[:, d - rank :]
        inner = torch.linalg.eigvalsh(a.T @ full @ a).clamp(min=0).sqrt().sum() if rank else torch.tensor(0.0)
        expected = ((mean_x - mean_y) ** 2).sum() + flat.trace() + full.trace() - 2 * inner
        for given in ((mean_x, flat, mean_y, full), (mean_y, full, mean_x, flat)):
            # A covariance that is singular but for rounding, 1e-16 of its largest eigenvalue: the root of that
            assert gaussian_wasserstein2_squared(*given) == pytest.approx(expected.item(), rel=1e-7, abs=0)


def test_rank_one_covariances() -> None:
    # Two segments: |u|² + |v|² − 2 |⟨u, v⟩|
    for seed in range(10):
        draw = Draw(seed)
        u, v, mean = draw.normal(6), draw.normal(6), draw.normal(6)
        expected = u @ u + v @ v - 2 * (u @ v).abs()
        found = gaussian_wasserstein2_squared(mean, torch.outer(u, u), mean, torch.outer(v, v))
        # Eigenvalues that should be 0 come as 1e-16 of the largest: their roots are 1e-8.
        assert found == pytest.approx(expected.item(), rel=1e-7, abs=0)


def test_points() -> None:
    draw = Draw(0)
    mean_x, mean_y, zero = draw.normal(5), draw.normal(5), torch.zeros(5, 5)
    assert gaussian_wasserstein2_squared(mean_x, zero, mean_x, zero) == 0
    expected = ((mean_x - mean_y) ** 2).sum().item()
    assert gaussian_wasserstein2_squared(mean_x, zero, mean_y, zero) == pytest.approx(expected, rel=SAME)
    cov = covariance(draw, 5)
    expected += cov.trace().item()
    assert gaussian_wasserstein2_squared(mean_x, zero, mean_y, cov) == pytest.approx(expected, rel=SAME)


@pytest.mark.parametrize("seed", range(10))
def test_properties(seed: int) -> None:
    draw = Draw(seed)
    d = draw.integer(1, 20)
    x, y, z = ((draw.normal(d), covariance(draw, d, rank=draw.integer(0, d))) for _ in range(3))
    distance = gaussian_wasserstein2_squared
    assert distance(*x, *y) == pytest.approx(distance(*y, *x), rel=1e-10, abs=0)
    # The same covariance: directions in which it vanishes but for rounding, 1e-16 of the largest, may be mistaken
    assert distance(*x, *x) <= 1e-15 * x[1].trace().item()
    regular = draw.normal(d), covariance(draw, d)
    assert distance(*regular, *regular) <= 1e-26 * d * regular[1].trace().item()  # roundings of roots, squared
    move = draw.normal(d)
    assert distance(x[0] + move, x[1], y[0] + move, y[1]) == pytest.approx(distance(*x, *y), rel=1e-10)
    assert distance(2 * x[0], 4 * x[1], 2 * y[0], 4 * y[1]) == pytest.approx(4 * distance(*x, *y), rel=1e-10)
    turn = draw.rotation(d)
    turned = [(turn @ mean, turn @ cov @ turn.T) for mean, cov in (x, y)]
    assert distance(*turned[0], *turned[1]) == pytest.approx(distance(*x, *y), rel=1e-6)  # roots of rounded zeros
    xy, yz, xz = (math.sqrt(distance(*a, *b)) for a, b in ((x, y), (y, z), (x, z)))
    assert xz <= (xy + yz) * (1 + 1e-10)


@pytest.mark.parametrize("epsilon", [1e-2, 1e-4, 1e-6, 1e-8])
def test_small_differences_do_not_cancel(epsilon: float) -> None:
    # tr Σ (√(1 + ε) − 1)², where tr Σ_x + tr Σ_y − 2 tr (…)^½ is off by 1e-16 of tr Σ: 100 % at ε = 1e-8.
    for seed in range(5):
        draw = Draw(seed)
        cov, mean = covariance(draw, 10), draw.normal(10)
        factor = 1 + epsilon
        expected = cov.trace().item() * (math.expm1(math.log1p(factor - 1) / 2)) ** 2
        found = gaussian_wasserstein2_squared(mean, cov, mean, factor * cov)
        # ε is resolved to 1e-15 relative to 1 in both covariances' roots: 1e-15/ε of the difference, a few of them
        assert found == pytest.approx(expected, rel=max(1e-12, 2e-14 / epsilon), abs=0)


@pytest.mark.parametrize("scale", [1e-100, 1e-12, 1e12, 1e100])
def test_any_scale(scale: float) -> None:
    draw = Draw(0)
    cov_x, cov_y, mean = covariance(draw, 5), covariance(draw, 5), torch.zeros(5, dtype=torch.float64)
    expected = scale * gaussian_wasserstein2_squared(mean, cov_x, mean, cov_y)
    found = gaussian_wasserstein2_squared(mean, scale * cov_x, mean, scale * cov_y)
    assert found == pytest.approx(expected, rel=1e-10, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_other_precisions_are_measured_in_float64(dtype: torch.dtype) -> None:
    draw = Draw(0)
    mean, values = draw.normal(4).to(dtype), (1 + torch.rand(4, generator=draw.generator)).to(dtype)
    found = gaussian_wasserstein2_squared(mean, values.diag(), -mean, 2 * values.diag())
    expected = (2 * mean.double()).square().sum() + (math.sqrt(2) - 1) ** 2 * values.double().sum()
    assert found == pytest.approx(expected.item(), rel=SAME)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_lower_bound_of_any_clouds(kind: Any) -> None:
    for seed in range(KINDS.index(kind), 140, len(KINDS)):
        x, y = random_pair(seed, largest=100)
        x, y = (x / x.double().abs().max()).double(), (y / x.double().abs().max()).double()
        moments = [
            part
            for cloud in (x, y)
            for part in (cloud.mean(0), torch.cov(cloud.T, correction=0).reshape(2 * (x.shape[1],)))
        ]
        bound = gaussian_wasserstein2_squared(*moments)
        # Covariances are rounded to 1e-16 of their trace: what a root makes of it may be 1e-8 of a standard deviation,
        # for every coordinate that does not vary.
        slack = 1e-8 * math.sqrt(sum(cov.trace().item() for cov in moments[1::2]) * x.shape[1])
        assert math.sqrt(bound) <= math.sqrt(by_assignment(direct_costs(x, y))) + slack, seed


@pytest.mark.parametrize("shapes", [(3, 5), (5, 3), (1, 4), (4, 4)])
def test_procrustes_of_factors_of_other_heights(shapes: tuple[int, int]) -> None:
    draw = Draw(0)
    a, b = draw.normal(shapes[0], 6), draw.normal(shapes[1], 6)
    mean = torch.zeros(6, dtype=torch.float64)
    # |A|² + |B|² − 2 ‖A Bᵀ‖₁
    expected = a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()
    assert procrustes_squared(a, b) == pytest.approx(expected.item(), rel=1e-12)
    through_covariances = gaussian_wasserstein2_squared(mean, a.T @ a, mean, b.T @ b)
    assert through_covariances == pytest.approx(expected.item(), rel=1e-6)  # roots of rounded zeros: 1e-8 each


# ---- errors ------------------------------------------------------------------------------------------------

NAMES = ["mean_x", "cov_x", "mean_y", "cov_y"]


def good() -> dict[str, Any]:
    return {"mean_x": torch.zeros(3), "cov_x": torch.eye(3), "mean_y": torch.ones(3), "cov_y": 4 * torch.eye(3)}


def assert_refused(error: type[Exception], words: list[str], **given: Any) -> None:
    with pytest.raises(error) as caught:
        gaussian_wasserstein2_squared(**(good() | given))
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_what_is_good_is_not_refused() -> None:
    assert gaussian_wasserstein2_squared(**good()) == pytest.approx(3 + 3, rel=SAME)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite(name: str, bad: float) -> None:
    assert_refused(ValueError, [f"{name} must be finite"], **{name: good()[name] * bad})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_types(name: str, dtype: torch.dtype) -> None:
    assert_refused(TypeError, [f"{name} must be a tensor", "floating", str(dtype)], **{name: good()[name].to(dtype)})


@pytest.mark.parametrize("name", NAMES)
def test_no_tensor(name: str) -> None:
    assert_refused(TypeError, [f"{name} must be a tensor", "ndarray"], **{name: good()[name].numpy()})


@pytest.mark.parametrize("name", NAMES)
def test_shapes(name: str) -> None:
    dimensions = good()[name].ndim
    words = [name, f"{dimensions} dimension(s)"]
    assert_refused(ValueError, words, **{name: good()[name][0]})
    assert_refused(ValueError, words, **{name: good()[name][None]})
    if name != "mean_x":
        small = good()[name][:2] if dimensions == 1 else good()[name][:2, :2]
        assert_refused(ValueError, [f"{name} must have shape (3", "mean_x", "(2"], **{name: small})


@pytest.mark.parametrize("name", ["cov_x", "cov_y"])
def test_no_covariance(name: str) -> None:
    skew = torch.eye(3)
    skew[0, 1] = 1e-3
    assert_refused(ValueError, [f"{name} must be symmetric", "(Σ + Σᵀ)/2"], **{name: skew})
    assert_refused(
        ValueError,
        [f"{name} must be positive semidefinite", "-1"],
        **{name: torch.eye(3) * torch.tensor([1.0, 1.0, -1.0])},
    )


def test_what_rounding_does_to_a_covariance_is_taken() -> None:
    cov = torch.eye(3, dtype=torch.float64)
    cov[0, 1] = 1e-10
    cov[2, 2] = -1e-10
    found = gaussian_wasserstein2_squared(torch.zeros(3), cov, torch.zeros(3), torch.eye(3))
    assert found == pytest.approx(1.0, rel=1e-8)


def test_inputs_and_gradients_are_left_alone() -> None:
    given = {name: torch.nn.Parameter(tensor) for name, tensor in good().items()}
    before = {name: tensor.detach().clone() for name, tensor in given.items()}
    assert isinstance(gaussian_wasserstein2_squared(**given), float)
    for name, tensor in given.items():
        assert torch.equal(tensor.detach(), before[name])
        assert tensor.grad is None
