"""Two ranks with half of the coordinates each give what one process with all of them gives, and both get it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transport_ranks import CASES, CUT, by, clouds, ways, work_of_a_rank
from transport_reference import by_assignment, direct_costs
from two_processes import in_two_processes

from lightning_speedlimit.transport import wasserstein2_squared

SAME = 1e-12  # sums over the ranks in another order


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    in_two_processes(work_of_a_rank, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@pytest.mark.parametrize("way", ["tensor", "list", "generator"])
@pytest.mark.parametrize("title", CASES)
def test_two_ranks_give_what_one_process_gives(ranks: list[dict[str, Any]], title: str, way: str) -> None:
    mine, theirs = (found[f"{title} {way}"] for found in ranks)
    for name, value in mine.items():
        if name == "matching":
            assert (value is None) == (theirs[name] is None)
            assert value is None or torch.equal(value, theirs[name])
        else:
            assert value == theirs[name] or (math.isnan(value) and math.isnan(theirs[name])), name
    x, y, options = clouds(title)
    one = by(title, ways(x)[way](), ways(y)[way](), **options)
    assert mine["method"] == one.method
    assert mine["converged"] == one.converged
    assert mine["paired"] == pytest.approx(one.paired, rel=SAME, abs=0, nan_ok=True)
    if not options:
        assert mine["lower"] <= by_assignment(direct_costs(x, y)) <= mine["upper"]
    if way == "generator" and one.method != "identity":
        return  # read once, the values carry the rounding of squared norms, which differs with the order of sums
    assert mine["value"] == pytest.approx(one.value, rel=SAME, abs=0)
    if title == "moments":
        assert mine["lower"] <= one.lower  # projections on either half bound less than both together
    else:
        assert mine["lower"] == pytest.approx(one.lower, rel=1e-8, abs=0)
    if one.matching is not None and title != "duplicates":  # where two particles coincide it is not unique
        assert torch.equal(mine["matching"], one.matching)


def test_a_group_of_one_rank(ranks: list[dict[str, Any]]) -> None:
    x, y, _ = clouds("permuted")
    one = wasserstein2_squared(x, y)
    for found in ranks:
        assert found["alone"]["value"] == one.value
        assert found["alone"]["lower"] == one.lower
        assert torch.equal(found["alone"]["matching"], one.matching)


@pytest.mark.parametrize("name", ["x", "y"])
def test_every_rank_hears_of_a_cloud_that_diverged_on_one(ranks: list[dict[str, Any]], name: str) -> None:
    for found in ranks:
        assert found[f"bad {name}"].startswith(f"{name} must be finite, got NaN or inf")


def test_half_of_the_coordinates_alone_are_something_else() -> None:
    # The guard of the comparison above: a rank that kept to itself would be noticed.
    for title in CASES:
        x, y, options = clouds(title)
        whole, half = by(title, x, y, **options).value, by(title, x[:, :CUT], y[:, :CUT], **options).value
        assert half < 0.9 * whole, title
