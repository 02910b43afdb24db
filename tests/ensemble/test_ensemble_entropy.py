"""Entropies of clouds: unbiased where the law is normal, with errors that are the scatter, or NaN with a reason."""

import math
import re

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial import KDTree
from scipy.special import digamma, polygamma
from torch import Tensor

from lightning_speedlimit.ensemble import Estimate, gaussian_entropy, neighbour_entropy
from lightning_speedlimit.ensemble.entropy import _nearest

CLOUDS = 200


def normal(replicas: int, d: int, seed: int) -> Tensor:
    return torch.randn(replicas, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def exact(d: int) -> float:
    return d / 2 * math.log(2 * math.pi * math.e)


def scatter(estimates: list[Estimate]) -> tuple[float, float, float]:
    """Mean, standard deviation and the root mean square of the stated errors."""
    values = np.array([e.value for e in estimates])
    return values.mean(), values.std(ddof=1), math.sqrt(np.mean([e.standard_error**2 for e in estimates]))


@pytest.mark.parametrize(("replicas", "d"), [(30, 1), (12, 5), (40, 5), (60, 20)])
def test_gaussian_entropy_has_no_bias_and_says_its_scatter(replicas: int, d: int) -> None:
    mean, deviation, stated = scatter([gaussian_entropy(normal(replicas, d, seed)) for seed in range(CLOUDS)])
    # ½ log det of a Wishart: variance ¼ Σ ψ'((R − 1 − i)/2), exactly.
    truth = math.sqrt(sum(polygamma(1, (replicas - 1 - i) / 2) for i in range(d))) / 2
    assert mean == pytest.approx(exact(d), abs=4 * truth / math.sqrt(CLOUDS))
    assert deviation == pytest.approx(truth, rel=4 / math.sqrt(2 * CLOUDS))
    # The jackknife overestimates where R is not much above d: by 25 % at R = 12, d = 5.
    assert 0.9 * truth < stated < 1.35 * truth


def jackknifed(values: list[float]) -> float:
    """√((R − 1)/R Σ (θ_{−r} − mean)²)."""
    return math.sqrt((len(values) - 1) * np.var(values))


def test_errors_are_those_of_leaving_each_replica_out() -> None:
    """By brute force; the neighbours' in the cloud made white once."""
    cloud = normal(30, 3, 1)
    left = [torch.cat([cloud[:r], cloud[r + 1 :]]) for r in range(30)]
    plain = [float(torch.logdet(torch.cov(part.T))) / 2 for part in left]
    assert gaussian_entropy(cloud).standard_error == pytest.approx(jackknifed(plain), rel=1e-9)
    white = np.linalg.solve(np.linalg.cholesky(np.cov(cloud.numpy().T)), cloud.numpy().T).T
    nearest = []
    for r in range(30):
        part = np.delete(white, r, 0)
        nearest.append(3 * np.log(KDTree(part).query(part, 5)[0][:, 4]).mean())
    assert neighbour_entropy(cloud).standard_error == pytest.approx(jackknifed(nearest), rel=1e-9)


def test_neighbour_entropy_is_its_formula() -> None:
    cloud = normal(30, 3, 1).numpy()
    cov = np.cov(cloud.T)
    white = np.linalg.solve(np.linalg.cholesky(cov), cloud.T).T
    mean = np.log(KDTree(white).query(white, 5)[0][:, 4]).mean()
    truth = digamma(30) - digamma(4) + math.log(4 / 3 * math.pi) + 3 * mean + np.linalg.slogdet(cov)[1] / 2
    assert neighbour_entropy(torch.from_numpy(cloud)).value == pytest.approx(truth, rel=1e-12)


def test_the_bias_that_is_taken_out_is_there() -> None:
    """The plug-in ½ log det(2πe Σ̂) is too small by Σ ½[log((R−1)/2) − ψ((R−1−i)/2)]: the guard."""
    replicas, d = 12, 5
    found = []
    for seed in range(CLOUDS):
        cov = torch.cov(normal(replicas, d, seed).T)
        found.append(0.5 * float(torch.logdet(2 * math.pi * math.e * cov)))
    bias = sum(digamma((replicas - 1 - i) / 2) - math.log((replicas - 1) / 2) for i in range(d)) / 2
    assert bias < -0.7
    # The determinant scatters by 0.57.
    assert np.mean(found) - exact(d) == pytest.approx(bias, abs=4 * 0.57 / math.sqrt(CLOUDS))


@pytest.mark.parametrize(
    ("replicas", "d", "bias", "generous"),
    # What is left of the bias, measured on 200 clouds: it falls with R and grows with d. In few dimensions the
    # jackknife of a nearest-neighbour statistic is too large.
    [(100, 1, 0.03, 1.6), (150, 2, 0.07, 1.5), (150, 5, 0.12, 1.3)],
)
def test_neighbour_entropy_of_normal_clouds(replicas: int, d: int, bias: float, generous: float) -> None:
    clouds = 250
    mean, deviation, stated = scatter([neighbour_entropy(normal(replicas, d, seed)) for seed in range(clouds)])
    assert mean == pytest.approx(exact(d), abs=bias + 4 * deviation / math.sqrt(clouds))
    assert stated / deviation * (1 + 4 / math.sqrt(2 * clouds)) > 0.9
    assert stated / deviation / (1 + 4 / math.sqrt(2 * clouds)) < generous


def test_neighbour_entropy_knows_shapes_that_a_covariance_does_not() -> None:
    """A ring of radius 1 and width 0.1; its entropy by quadrature."""
    n, width = 2000, 0.1
    generator = torch.Generator().manual_seed(0)
    angle = 2 * math.pi * torch.rand(n, dtype=torch.float64, generator=generator)
    radius = 1 + width * torch.randn(n, dtype=torch.float64, generator=generator)
    ring = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    r = np.linspace(0.2, 1.8, 20001)
    radial = stats.norm(1, width).pdf(r)
    # p(x) = f(r)/(2πr): S = −∫ f log f dr + ⟨log 2πr⟩.
    truth = stats.norm(1, width).entropy() + np.trapezoid(radial * np.log(2 * math.pi * r), r)
    found = neighbour_entropy(ring)
    assert found.value == pytest.approx(truth, abs=4 * found.standard_error)
    assert gaussian_entropy(ring).value > truth + 1.0


@pytest.mark.parametrize("entropy", [gaussian_entropy, neighbour_entropy])
def test_stretching_and_shifting_moves_the_entropy_by_the_logarithm(entropy) -> None:  # type: ignore[no-untyped-def]
    cloud = normal(80, 3, 0)
    a = torch.tensor([[1e-6, 0.0, 0.0], [1.0, 1e3, 0.0], [5.0, 1.0, 1.0]], dtype=torch.float64)
    before, after = entropy(cloud), entropy(cloud @ a.T + torch.tensor([3.0, -7e3, 1.0], dtype=torch.float64))
    # log|det a| = log 1e-3; the condition number 1e9 of a leaves 1e-7 of a float64.
    assert after.value - before.value == pytest.approx(math.log(1e-3), abs=1e-5)
    assert after.standard_error == pytest.approx(before.standard_error, rel=1e-4)


def test_numpy_arrays_and_float32_will_do() -> None:
    cloud = normal(50, 2, 0)
    assert gaussian_entropy(cloud.numpy()).value == gaussian_entropy(cloud).value
    assert gaussian_entropy(cloud.float()).value == pytest.approx(gaussian_entropy(cloud).value, abs=1e-6)


@pytest.mark.parametrize(
    ("cloud", "reason"),
    [
        (normal(6, 5, 0), "6 replicas cannot show a covariance in 5 dimensions, d \\+ 2 can; W₂², the loss drop"),
        (torch.ones(10, 2, dtype=torch.float64), "all at one place in some coordinate: their entropy is −∞"),
        (normal(20, 2, 0) @ torch.ones(2, 2, dtype=torch.float64), "all lie in one hyperplane"),
    ],
    ids=["few", "point", "line"],
)
def test_what_a_cloud_cannot_tell_is_nan_with_a_reason(cloud: Tensor, reason: str) -> None:
    for found in (gaussian_entropy(cloud), neighbour_entropy(cloud)):
        assert math.isnan(found.value)
        assert math.isnan(found.standard_error)
        assert re.search(reason, found.reason)
        assert str(found).startswith("undefined: ")


def test_what_is_flat_up_to_rounding_is_flat() -> None:
    for replicas in range(10, 40):
        at_rest = torch.cat([normal(replicas, 1, 0), torch.full((replicas, 1), 0.1, dtype=torch.float64)], 1)
        assert "all at one place" in gaussian_entropy(at_rest).reason
        turned = normal(replicas, 4, replicas) @ normal(4, 5, 1)
        assert "in one hyperplane" in gaussian_entropy(turned).reason


def test_nearest_neighbours_are_scipys_also_of_a_cloud_that_is_searched_in_parts() -> None:
    cloud = normal(2500, 2, 0)  # 2²² distances at a time are 1677 rows
    distances, indices = _nearest(cloud, 3)
    truth = KDTree(cloud.numpy()).query(cloud.numpy(), 4)
    np.testing.assert_allclose(distances.numpy(), truth[0][:, 1:], rtol=1e-12)
    np.testing.assert_array_equal(indices.numpy(), truth[1][:, 1:])


def test_neighbours_are_refused_where_they_are_blind_or_missing() -> None:
    assert "blind in 11 dimensions" in neighbour_entropy(normal(100, 11, 0)).reason
    assert "have no 9 neighbours" in neighbour_entropy(normal(9, 2, 0), neighbours=8).reason
    twice = normal(20, 2, 0).repeat(3, 1)
    assert "more than 2 replicas are at one place" in neighbour_entropy(twice, neighbours=2).reason
    assert not neighbour_entropy(twice, neighbours=3).reason


def test_an_estimate_prints_itself() -> None:
    assert str(Estimate(1.25, 0.031)) == "1.25 ± 0.031"
    assert str(Estimate(1.25, math.nan, "one replica")) == "1.25"


@pytest.mark.parametrize(
    ("cloud", "error", "message"),
    [
        (torch.ones(3), ValueError, r"shape \(replicas, dimensions\), got \(3,\)"),
        (torch.ones(3, 2, dtype=torch.int64), TypeError, "real floating type, got torch.int64"),
        ([[1.0]], TypeError, "got list"),
        (torch.full((4, 2), math.nan), ValueError, "finite, got NaN or inf"),
    ],
    ids=str,
)
def test_bad_clouds_are_named(cloud, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        gaussian_entropy(cloud)
    with pytest.raises(ValueError, match="neighbours must be a whole number of at least 1, got 0"):
        neighbour_entropy(normal(9, 2, 0), neighbours=0)
