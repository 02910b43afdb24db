"""Clouds given in blocks of coordinates: the same result, the same bounds, and no cloud whole in memory."""

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transport_cases import KINDS, MONOTONE, Draw, independent, lazy, lazy_and_permuted, permuted, random_pair
from transport_reference import bounds_by_duality, by_assignment, direct_costs

from lightning_speedlimit.transport import Transport, clouds, wasserstein2, wasserstein2_squared

SAME = 1e-12  # sums over blocks in another order


class Shards:
    """An iterable that starts anew each time, as a list of files would."""

    def __init__(self, cloud: Tensor, width: int) -> None:
        self.cloud, self.width, self.readings = cloud, width, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.readings += 1
        return iter(self.cloud.split(self.width, 1))


def one_shot(cloud: Tensor, width: int) -> Iterator[Tensor]:
    yield from cloud.split(width, 1)


def as_list(cloud: Tensor, width: int) -> list[Tensor]:
    return list(cloud.split(width, 1))


def uneven(cloud: Tensor, width: int) -> list[Tensor]:
    first = min(width, cloud.shape[1] - 1)
    return [part for part in (cloud[:, :first], cloud[:, first:]) if part.shape[1]]


def transposed(cloud: Tensor, width: int) -> list[Tensor]:
    """Blocks that are views with other strides."""
    return [part.T.contiguous().T for part in cloud.split(width, 1)]


REREADABLE: tuple[Callable[[Tensor, int], Iterable[Tensor]], ...] = (Shards, as_list, uneven, transposed)
WAYS = (*REREADABLE, one_shot)

ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
rereadable = pytest.mark.parametrize("way", REREADABLE, ids=lambda way: way.__name__)
Way = Callable[[Tensor, int], Iterable[Tensor]]


def assert_same(found: Transport, whole: Transport) -> None:
    assert found.value == pytest.approx(whole.value, rel=SAME, abs=0)
    assert found.paired == pytest.approx(whole.paired, rel=SAME, abs=0, nan_ok=True)
    # A proof comes of other roundings: as good, but not the same.
    assert found.lower == pytest.approx(whole.lower, rel=1e-8)
    assert found.method == whole.method
    assert found.converged == whole.converged
    assert (found.matching is None) == (whole.matching is None)
    if found.matching is not None and whole.matching is not None:
        assert torch.equal(found.matching, whole.matching)


@ways
@pytest.mark.parametrize("kind", MONOTONE, ids=lambda kind: kind.__name__)
def test_the_same_where_identity_is_optimal(kind: Callable[..., tuple[Tensor, Tensor]], way: Way) -> None:
    for seed, width in enumerate((1, 2, 7, 100)):
        x, y = kind(Draw(seed), 40, 30)
        found = wasserstein2_squared(way(x, width), way(y, width))
        assert found.method == "identity"
        assert_same(found, wasserstein2_squared(x, y))


@rereadable
@pytest.mark.parametrize("seed", range(14))
def test_the_same_of_what_can_be_read_again(seed: int, way: Way) -> None:
    x, y = random_pair(seed, largest=60)
    assert_same(wasserstein2_squared(way(x, 7), way(y, 7)), wasserstein2_squared(x, y))


@rereadable
def test_the_same_with_unequal_weights(way: Way) -> None:
    draw = Draw(0)
    x, y, v = draw.normal(30, 20), draw.normal(20, 20), torch.rand(20, generator=draw.generator)
    v /= v.sum()
    found = wasserstein2_squared(way(x, 7), way(y, 7), weights_y=v)
    assert_same(found, wasserstein2_squared(x, y, weights_y=v))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_generators_hold_the_truth(kind: Callable[..., object]) -> None:
    for seed in range(KINDS.index(kind), 140, len(KINDS)):
        x, y = random_pair(seed, largest=100)
        expected = by_assignment(direct_costs(x, y))
        found = wasserstein2_squared(one_shot(x, 7), one_shot(y, 7))
        assert found.lower <= expected <= found.upper, seed
        assert found.lower <= found.value <= found.upper, seed


def test_generators_are_as_exact_as_the_gram_matrix_allows() -> None:
    # 3 · 2√D roundings of the squared norms: 1e-14 of them, and a permutation of near particles costs r² of them.
    draw = Draw(0)
    x = draw.normal(50, 100)
    for r, expected_error in ((1e-1, 1e-11), (1e-3, 1e-7)):
        y = (x + r * draw.normal(50, 100))[draw.order(50)]
        expected = by_assignment(direct_costs(x, y))
        found = wasserstein2_squared(one_shot(x, 7), one_shot(y, 7))
        assert found.lower <= expected <= found.upper
        assert found.value == pytest.approx(expected, rel=expected_error)
        assert found.converged


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e8])
def test_generators_of_unequal_clouds_far_from_the_origin(offset: float) -> None:
    # The means of x and y are rounded apart, 1e-16 of the offset each.
    for seed in range(10):
        draw = Draw(seed)
        x, y = draw.normal(20, 3) + offset, draw.normal(30, 3) + 1 + offset
        below, above = bounds_by_duality(direct_costs(x, y), np.full(20, 1 / 20), np.full(30, 1 / 30))
        found = wasserstein2_squared(one_shot(x, 2), one_shot(y, 2))
        # 1e-14: the sums of the reference
        assert found.lower <= above * (1 + 1e-14), seed
        assert found.upper >= below * (1 - 1e-14), seed


def test_what_can_be_read_again_is_read_again_for_accuracy() -> None:
    draw = Draw(0)
    x, y = lazy_and_permuted(draw, 30, 20)
    blocks = Shards(x, 7)
    exact = wasserstein2_squared(blocks, Shards(y, 7))
    assert blocks.readings > 1
    assert exact.value == pytest.approx(by_assignment(direct_costs(x, y)), rel=1e-12)
    # One of the two an iterator: both are read once.
    mixed = wasserstein2_squared(Shards(x, 7), one_shot(y, 7))
    assert mixed.lower <= exact.value <= mixed.upper


def test_small_blocks_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every loop over blocks takes several turns, with an uneven last one; the bits of sums may differ.
    for seed in range(14):
        x, y = random_pair(seed, largest=60)
        whole = wasserstein2_squared(x, y)
        with monkeypatch.context() as patch:
            for module in ("clouds", "costs"):
                patch.setattr(f"lightning_speedlimit.transport.{module}.BLOCK_BYTES", 8 * 100)
            assert_same(wasserstein2_squared(x, y), whole)


def test_small_blocks_of_memory_beyond_the_cold_assignment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wasserstein2, "_SOLVED", 10)
    x, y = independent(Draw(0), 60, 20)
    whole = wasserstein2_squared(x, y)
    for module in ("clouds", "costs"):
        monkeypatch.setattr(f"lightning_speedlimit.transport.{module}.BLOCK_BYTES", 8 * 100)
    assert_same(wasserstein2_squared(x, y), whole)


# ---- blocks that do not fit --------------------------------------------------------------------------------

X, Y = torch.zeros(3, 10), torch.ones(3, 10)


def test_a_generator_that_ends_early() -> None:
    for short, long, names in (
        (X, Y, "x ended after 2 blocks, y went on"),
        (Y, X, "y ended after 2 blocks, x went on"),
    ):
        blocks = {"x": one_shot(X, 3), "y": one_shot(Y, 3)}
        blocks[names[0]] = one_shot(short[:, :6], 3)
        assert long is not short
        with pytest.raises(ValueError, match=f"{names}; both must give the same coordinates"):
            wasserstein2_squared(blocks["x"], blocks["y"])


def test_other_widths() -> None:
    with pytest.raises(ValueError, match=r"block 1 of x and y .* got \(3, 3\) and \(3, 4\); cut both"):
        wasserstein2_squared(iter([X[:, :3], X[:, 3:6]]), iter([Y[:, :3], Y[:, 3:7]]))


@pytest.mark.parametrize("name", ["x", "y"])
def test_other_rows(name: str) -> None:
    blocks = {"x": [X[:, :3], X[:, 3:6]], "y": [Y[:, :3], Y[:, 3:6]]}
    blocks[name][1] = blocks[name][1][:2]
    got = "2 and 3" if name == "x" else "3 and 2"
    with pytest.raises(
        ValueError, match=f"every block must hold all particles, .* got {got} in block 1; cut along the"
    ):
        wasserstein2_squared(iter(blocks["x"]), iter(blocks["y"]))


@pytest.mark.parametrize("name", ["x", "y"])
@pytest.mark.parametrize("thing", [None, [1.0], "text", 3.0], ids=repr)
def test_blocks_that_are_no_tensors(name: str, thing: object) -> None:
    blocks: dict[str, list[object]] = {"x": [X[:, :3], X[:, 3:]], "y": [Y[:, :3], Y[:, 3:]]}
    blocks[name][1] = thing
    with pytest.raises(TypeError, match=f"{name} must give tensors .* got {type(thing).__name__} as block 1"):
        wasserstein2_squared(iter(blocks["x"]), iter(blocks["y"]))  # type: ignore[arg-type]


def test_no_blocks() -> None:
    with pytest.raises(ValueError, match="x and y must not be empty, got no blocks; an iterator can be read once"):
        wasserstein2_squared(iter([]), iter([]))
    used = iter([X])
    next(used)
    with pytest.raises(ValueError, match="x ended after 0 blocks"):
        wasserstein2_squared(used, iter([Y]))


@pytest.mark.parametrize("name", ["x", "y"])
def test_a_block_that_is_wrong_is_named(name: str) -> None:
    blocks = {"x": [X[:, :3], X[:, 3:]], "y": [Y[:, :3], Y[:, 3:]]}
    blocks[name][1] = blocks[name][1].flatten()
    with pytest.raises(ValueError, match=rf"block 1 of {name} must have shape \(particles, coordinates\), got \(21,\)"):
        wasserstein2_squared(iter(blocks["x"]), iter(blocks["y"]))


@pytest.mark.parametrize("name", ["x", "y"])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_late_block_that_is_not_finite(name: str, bad: float) -> None:
    clouds_given = {"x": X.clone(), "y": Y.clone()}
    clouds_given[name][2, 9] = bad
    with pytest.raises(ValueError, match=f"^{name} must be finite, got NaN or inf"):
        wasserstein2_squared(one_shot(clouds_given["x"], 3), one_shot(clouds_given["y"], 3))


def test_an_error_of_the_generator_comes_through() -> None:
    def broken() -> Iterator[Tensor]:
        yield X[:, :3]
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        wasserstein2_squared(broken(), one_shot(Y, 3))


# ---- memory ------------------------------------------------------------------------------------------------

# VmHWM is the high-water mark of this process alone: ru_maxrss begins at what the parent held. Inputs are filled in
# place, and reach above what the imports took at their peak, so that nothing hides below it.
PEAK = """
import re, torch
from lightning_speedlimit.transport import wasserstein2_squared
torch.set_num_threads(1)
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024  # MiB
print(f"imports={peak()}")
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def measured(script: str) -> dict[str, float]:
    """What the script prints as name=number, of a process of its own."""
    run = subprocess.run([sys.executable, "-c", PEAK + script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return {name: float(number) for name, number in (line.split("=") for line in run.stdout.split())}


@pytest.mark.slow
@linux
def test_replicas_of_a_million_weights_take_little_beyond_themselves() -> None:
    found = measured("""
generator = torch.Generator().manual_seed(0)
x = torch.empty(32, 10**6).normal_(generator=generator)
y = torch.empty(32, 10**6).normal_(generator=generator).mul_(1e-3).add_(x)
inputs = peak()
print(f"inputs={inputs}")
print(f"lazy={wasserstein2_squared(x, y).value}")
print(f"lazy_took={peak() - inputs}")
for i in range(32):
    y[i].copy_(x[i - 1])
print(f"permuted={wasserstein2_squared(x, y).value}")
print(f"permuted_took={peak() - inputs}")
copy = x.double()
print(f"with_a_copy={peak() - inputs}")
""")
    assert found["inputs"] > found["imports"] + 10
    assert found["lazy_took"] < 200
    assert found["permuted_took"] < 200
    assert found["with_a_copy"] > 200  # one float64 copy of one cloud would be seen
    # 3.2e7 squares of 1e-3 times a normal number: relative √(2/3.2e7) = 2.5e-4, times five
    assert found["lazy"] == pytest.approx(1.0, rel=1.3e-3)
    assert found["permuted"] == 0


@pytest.mark.slow
@linux
def test_a_hundred_million_weights_made_on_the_way() -> None:
    found = measured("""
def blocks(size, r):
    generator, noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    for start in range(0, size, 2**20):
        width = min(2**20, size - start)
        block = torch.empty(4, width).normal_(generator=generator)
        if r:
            block.add_(torch.empty(4, width).normal_(generator=noise), alpha=r)
        yield block

found = wasserstein2_squared(blocks(10**8, 0), blocks(10**8, 1e-3))
print(f"peak={peak()}")
print(f"value={found.value}")
print(f"certified={int(found.converged)}")
""")
    assert found["peak"] < 1024
    # float32 rounds y to 6e-8 of itself, 6e-5 of the displacement: 4e-9 of its square; 4e8 squares: 7e-5, times five
    assert found["value"] == pytest.approx(100.0, rel=3.6e-4)
    assert found["certified"]


class LargestTensor(TorchDispatchMode):
    """The bytes of the largest tensor that was made while this was on: what has a storage of its own."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known, self.bytes = {tensor.untyped_storage().data_ptr() for tensor in known}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, made.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("kind", [lazy, permuted, independent], ids=lambda kind: kind.__name__)
def test_no_tensor_is_larger_than_a_block(
    kind: Callable[..., tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("clouds", "costs"):
        monkeypatch.setattr(f"lightning_speedlimit.transport.{module}.BLOCK_BYTES", 2**16)
    x, y = kind(Draw(0), 32, 10**5)  # 24 MiB each
    with LargestTensor(x, y) as largest:
        wasserstein2_squared(x, y)
    assert largest.bytes <= 2**16
    with LargestTensor(x, y) as largest:
        y - x
    assert largest.bytes == x.nbytes


def test_blocks_are_no_larger_than_promised() -> None:
    given = clouds.Clouds(torch.zeros(3, 10**6), torch.zeros(5, 10**6))
    sizes = [(x.nbytes, y.nbytes, x.dtype) for x, y in given.blocks()]
    assert max(max(x, y) for x, y, _ in sizes) <= clouds.BLOCK_BYTES
    assert sum(x for x, _, _ in sizes) == 3 * 8 * 10**6
    assert {dtype for _, _, dtype in sizes} == {torch.float64}


# ---- long chains of roundings ------------------------------------------------------------------------------


def test_many_equal_coordinates_in_one_block() -> None:
    # The same rounding in each of 200,000 terms: errors add up instead of averaging out.
    d = 200_000
    x, y = (torch.tensor(pair, dtype=torch.float64)[:, None].expand(2, d) for pair in ((0.0, 0.3), (0.39, -0.01)))
    costs = [[d * (Fraction(a) - Fraction(b)) ** 2 for b in y[:, 0].tolist()] for a in x[:, 0].tolist()]
    truth = min(costs[0][0] + costs[1][1], costs[0][1] + costs[1][0]) / 2
    for cloud in ((x, y), ([x], [y]), (iter([x]), iter([y]))):
        found = wasserstein2_squared(*cloud)
        assert Fraction(found.lower) <= truth <= Fraction(found.upper)
        assert found.converged


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
def test_blocks_of_one_coordinate(n: int) -> None:
    d = 300_000
    x = torch.zeros(n, 1, dtype=torch.float64) + torch.arange(n)[:, None]
    y = x + 0.1
    truth = (
        sum(d * (Fraction(b) - Fraction(a)) ** 2 for a, b in zip(x[:, 0].tolist(), y[:, 0].tolist(), strict=True)) / n
    )
    found = wasserstein2_squared((x for _ in range(d)), (y for _ in range(d)))
    assert Fraction(found.lower) <= truth <= Fraction(found.upper)
    assert found.converged
