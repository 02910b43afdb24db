"""The same on an accelerator: the same numbers, whatever TF32 is set to, and the clouds stay where they are."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transport_cases import KINDS, MONOTONE, Draw, features, independent, lazy, random_pair
from transport_reference import by_assignment, direct_costs

from lightning_speedlimit.transport import gaussian_wasserstein2_squared, wasserstein2, wasserstein2_squared

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
SAME = 1e-9  # asked for; sums in another order, of the same matching


@pytest.fixture(autouse=True)
def _tf32_as_before() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def on_the_device(*clouds: Tensor) -> tuple[Tensor, ...]:
    return tuple(cloud.to(CUDA) for cloud in clouds)


@pytest.mark.parametrize("kind", [*KINDS, *MONOTONE], ids=lambda kind: kind.__name__)
def test_the_same_numbers(kind: Callable[..., tuple[Tensor, Tensor]]) -> None:
    for n, d in ((1, 1), (40, 3), (200, 64), (600, 8)):
        x, y = kind(Draw(n + d), n, d)
        here, there = wasserstein2_squared(x, y), wasserstein2_squared(*on_the_device(x, y))
        assert there.value == pytest.approx(here.value, rel=SAME, abs=0)
        assert there.paired == pytest.approx(here.paired, rel=SAME, abs=0)
        assert there.converged == here.converged
        assert (there.method == "identity") == (here.method == "identity")
        assert there.lower <= here.value * (1 + 1e-12)
        assert here.lower <= there.value * (1 + 1e-12)
        assert there.matching is not None
        assert there.matching.device.type == "cpu"


def test_random_clouds_of_every_kind_and_scale() -> None:
    for seed in range(60):
        x, y = random_pair(seed, largest=200)
        expected = by_assignment(direct_costs(x, y))
        found = wasserstein2_squared(*on_the_device(x, y))
        assert found.lower <= expected <= found.upper, seed
        assert found.value == pytest.approx(expected, rel=SAME, abs=0), seed


@pytest.mark.parametrize("kind", [independent, lazy], ids=lambda kind: kind.__name__)
def test_unequal_weights(kind: Callable[..., tuple[Tensor, Tensor]]) -> None:
    x, y = kind(Draw(0), 50, 8)
    w, v = (torch.rand(n, generator=Draw(n).generator).double() for n in (50, 40))
    given = {"x": x, "y": y[:40], "weights_x": w / w.sum(), "weights_y": v / v.sum()}
    here = wasserstein2_squared(**given)
    there = wasserstein2_squared(**{name: tensor.to(CUDA) for name, tensor in given.items()})
    assert there.value == pytest.approx(here.value, rel=SAME, abs=0)
    assert there.lower <= here.value * (1 + 1e-12)
    host_weights = wasserstein2_squared(given["x"].to(CUDA), given["y"].to(CUDA), weights_y=given["weights_y"])
    assert host_weights.method == "linear program"


def test_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wasserstein2, "MAX_PAIRS", 0)
    x, y = independent(Draw(0), 50, 8)
    here, there = wasserstein2_squared(x, y), wasserstein2_squared(*on_the_device(x, y))
    assert there.value == pytest.approx(here.value, rel=SAME)
    assert there.lower == pytest.approx(here.lower, rel=SAME)


def test_between_gaussians() -> None:
    draw = Draw(0)
    root = draw.normal(6, 6)
    given = draw.normal(6), root @ root.T, draw.normal(6), torch.eye(6).double()
    there = gaussian_wasserstein2_squared(*on_the_device(*given))
    assert there == pytest.approx(gaussian_wasserstein2_squared(*given), rel=SAME)


@pytest.mark.parametrize("kind", [lazy, features, independent], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("n", [100, 600])
def test_tf32_changes_nothing(kind: Callable[..., tuple[Tensor, Tensor]], n: int) -> None:
    # TF32 keeps 10 bits: 5e-4 of an inner product, far more than W₂² itself of clouds that moved by 1e-3.
    x, y = on_the_device(*(cloud.float() for cloud in kind(Draw(n), n, 64)))
    found: dict[bool, Any] = {}
    for tf32 in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        found[tf32] = wasserstein2_squared(x, y)
    assert found[True].value == pytest.approx(found[False].value, rel=1e-12, abs=0)
    assert found[True].paired == found[False].paired
    product = {}
    for tf32 in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        product[tf32] = x @ y.T
    if torch.cuda.get_device_capability() >= (8, 0):
        assert not torch.equal(product[False], product[True])  # the setting does something here


def test_autocast_changes_nothing() -> None:
    x, y = on_the_device(*(cloud.float() for cloud in features(Draw(0), 600, 64)))
    plain = wasserstein2_squared(x, y)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cuda", dtype):
            assert wasserstein2_squared(x, y).value == pytest.approx(plain.value, rel=1e-12, abs=0)


def test_clouds_stay_on_their_device() -> None:
    x, y = on_the_device(*(cloud.float() for cloud in features(Draw(0), 600, 64)))
    before = x.clone(), y.clone(), x.data_ptr(), y.data_ptr()
    wasserstein2_squared(x, y)
    assert x.device.type == y.device.type == "cuda"
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    assert (x.data_ptr(), y.data_ptr()) == before[2:]


def test_two_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="one device"):
        wasserstein2_squared(torch.zeros(3, 2, device=CUDA), torch.zeros(3, 2))


def test_memory_on_the_device() -> None:
    # No second copy of the clouds: blocks of 8 MiB, about ten at a time.
    x = torch.zeros(32, 2**23, device=CUDA).normal_()
    y = x.mul(1.001)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = wasserstein2_squared(x, y)
    assert torch.cuda.max_memory_allocated() - before < 200 * 2**20
    assert found.method == "identity"


def test_blocks_made_on_the_device() -> None:
    x, y = independent(Draw(0), 40, 30)
    found = wasserstein2_squared((part.to(CUDA) for part in x.split(7, 1)), (part.to(CUDA) for part in y.split(7, 1)))
    assert found.lower <= by_assignment(direct_costs(x, y)) <= found.upper
