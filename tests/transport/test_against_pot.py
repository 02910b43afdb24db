"""W₂² of 300 pairs of clouds of every kind against POT, and what the result says of itself recomputed."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from transport_cases import KINDS, Draw, random_pair
from transport_reference import POT_RESOLVES, by_assignment, by_emd2, direct_costs, truth

from lightning_speedlimit.transport import Transport, wasserstein2_squared

CLOUDS = 300
AGREES = 1e-9  # asked for; the program's own target is 1e-10 per cost
SUMMED = 1e-12  # sums of at most 400 · 300 float64 terms: 1e-13 in the worst order


def assert_agrees_with_itself(found: Transport, x: Tensor, y: Tensor, costs: np.ndarray) -> None:
    """Every field by plain tensors: N = M and equal weights."""
    assert found.lower <= found.value <= found.upper
    assert found.converged == (found.upper <= 1.001 * found.lower)
    displaced = (y.double() - x.double()).square().sum(1).mean().item()
    assert found.paired == pytest.approx(displaced, rel=SUMMED, abs=0)
    if found.value:
        assert found.identity_excess == found.paired / found.value - 1
    elif displaced:
        assert math.isnan(found.identity_excess)
    else:
        assert found.identity_excess == 0
    matching = found.matching
    assert matching is not None
    assert matching.dtype == torch.int64
    assert torch.equal(matching.sort().values, torch.arange(len(x)))
    assert found.value == pytest.approx(costs[np.arange(len(x)), matching.numpy()].mean(), rel=SUMMED, abs=0)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_value_bounds_and_matching(kind: Callable[..., object]) -> None:
    for seed in range(KINDS.index(kind), CLOUDS, len(KINDS)):
        x, y = random_pair(seed)
        costs = direct_costs(x, y)
        expected = truth(costs)
        found = wasserstein2_squared(x, y)
        assert found.lower <= expected <= found.upper, seed
        assert found.value == pytest.approx(expected, rel=AGREES, abs=0), seed
        assert found.converged, seed
        assert_agrees_with_itself(found, x, y, costs)


def test_the_clouds_are_of_every_kind() -> None:
    """What the 300 are meant to reach, they do reach."""
    pairs = [random_pair(seed) for seed in range(CLOUDS)]
    sizes = [len(x) for x, _ in pairs]
    assert min(sizes) == 1
    assert max(sizes) > 350
    spread = [x.double().std().item() for x, _ in pairs if len(x) > 1]
    assert min(spread) < 1e-11
    assert max(spread) > 1e11
    assert {x.dtype for x, _ in pairs} == {torch.float32, torch.float64}
    far = [x.double().mean(0).norm() > 1e3 * (x.double() - x.double().mean(0)).norm(dim=1).mean() for x, _ in pairs]
    assert sum(far) > 30
    doubled = [len(x.unique(dim=0)) < len(x) for x, _ in pairs]
    assert sum(doubled) > 30
    ratios = [((y.double() - x.double()).norm() / x.double().norm()).item() for x, y in pairs if x.dtype.itemsize == 4]
    assert min(ratio for ratio in ratios if ratio) < 2e-7


def test_both_references_agree_where_pot_resolves_w2() -> None:
    compared = 0
    for seed in range(CLOUDS):
        costs = direct_costs(*random_pair(seed, largest=120))
        if by_assignment(costs) > POT_RESOLVES * costs.max():
            compared += 1
            assert by_emd2(costs) == pytest.approx(by_assignment(costs), rel=AGREES, abs=0), seed
    assert compared > 100


@pytest.mark.parametrize("fault", ["value", "matching", "paired", "upper", "lower"])
def test_a_wrong_field_would_be_noticed(fault: str) -> None:
    draw = Draw(0)
    x, y = draw.normal(20, 3), draw.normal(20, 3)
    costs, found = direct_costs(x, y), wasserstein2_squared(x, y)
    assert_agrees_with_itself(found, x, y, costs)
    assert found.matching is not None
    wrong = {
        "value": found.value * (1 + 1e-11),
        "matching": found.matching.roll(1),
        "paired": found.paired * (1 - 1e-11),
        "upper": found.value * (1 - 1e-11),
        "lower": found.value * (1 + 1e-11),
    }
    fields = {name: getattr(found, name) for name in Transport.__dataclass_fields__} | {fault: wrong[fault]}
    with pytest.raises(AssertionError):
        assert_agrees_with_itself(Transport(**fields), x, y, costs)
