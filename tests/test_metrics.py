"""The metrics against plain tensors, and against what Lightning, torchmetrics and ranks do to them."""

import copy
import doctest
import itertools
import math
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import Metric, MetricCollection
from two_processes import in_two_processes

from lightning_speedlimit import metrics
from lightning_speedlimit.metrics import EntropyProduction, SpeedLimitEfficiency, Wasserstein2Squared

# Sums of a few float64 terms; the costs of the transport are differences of Gram entries, some 10 ε of their size.
EXACT = 1e-12

Update = dict[str, Any]


def cloud(n: int, d: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    return (x.double()[:, None] - y.double()[None]).square().sum(-1)


def over_permutations(x: Tensor, y: Tensor) -> float:
    """W₂² of clouds of equal size, by trying every pairing."""
    costs = squared_distances(x, y)
    rows = range(len(x))
    return min(float(costs[rows, p].mean()) for p in itertools.permutations(rows))


def assigned(x: Tensor, y: Tensor) -> float:
    """W₂² by scipy: a particle of weight k/n is k particles of weight 1/n."""
    n = math.lcm(len(x), len(y))
    x, y = x.repeat_interleave(n // len(x), 0), y.repeat_interleave(n // len(y), 0)
    costs = squared_distances(x, y)
    rows, columns = linear_sum_assignment(costs.numpy())
    return float(costs[rows, columns].mean())


# -- the three, each with updates and what plain tensors make of them -----------------------------------------------


def w2_of(updates: list[Update]) -> float:
    x, y = (torch.cat([u[name].reshape(-1, u[name].shape[-1]) for u in updates]) for name in "xy")
    return assigned(x, y)


def production_of(updates: list[Update]) -> float:
    return math.fsum(v for u in updates for v in torch.as_tensor(u["work"], dtype=torch.float64).flatten().tolist())


def efficiency_of(updates: list[Update]) -> float:
    squared, action, elapsed = ([float(u[n]) for u in updates] for n in ("displacement_squared", "action", "elapsed"))
    return math.fsum(squared) / (max(elapsed) * math.fsum(action))


def run_of(d: int, steps: int, seed: int) -> Update:
    """D², A and τ of a random walk: D² ≤ τ A by Cauchy–Schwarz."""
    u = cloud(steps, d, seed)
    return {"displacement_squared": u.sum(0).square().sum(), "action": u.square().sum(), "elapsed": float(steps)}


@dataclass(frozen=True)
class Case:
    kind: type[Metric]
    updates: list[Update]
    expected: Callable[[list[Update]], float]

    def filled(self, updates: list[Update] | None = None) -> Any:
        metric = self.kind()
        for update in self.updates if updates is None else updates:
            metric.update(**update)
        return metric


CASES = {
    "w2": Case(
        Wasserstein2Squared,
        [
            {"x": cloud(3, 4, 0), "y": cloud(3, 4, 1)},
            {"x": cloud(1, 4, 2)[0], "y": cloud(1, 4, 3)[0]},
            {"x": cloud(2, 4, 4), "y": cloud(6, 4, 5)},
        ],
        w2_of,
    ),
    "production": Case(
        EntropyProduction, [{"work": 0.1}, {"work": cloud(2, 3, 0)}, {"work": torch.tensor(7)}], production_of
    ),
    "efficiency": Case(SpeedLimitEfficiency, [run_of(5, 8, 0), run_of(3, 8, 1), run_of(4, 6, 2)], efficiency_of),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def same(value: Any, expected: float, relative: float = EXACT) -> bool:
    assert isinstance(value, Tensor)
    assert value.shape == ()
    assert value.dtype == torch.float64
    return float(value) == pytest.approx(expected, rel=relative, nan_ok=True)


# -- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_w2_is_the_cheapest_pairing(n: int) -> None:
    x, y = cloud(n, 3, n), cloud(n, 3, n + 10)
    metric = Wasserstein2Squared()
    metric.update(x, y)
    expected = over_permutations(x, y)
    assert same(metric.compute(), expected)
    assert metric.lower <= expected * (1 + EXACT)
    assert metric.upper >= expected * (1 - EXACT)
    assert metric.upper <= metric.lower * (1 + metric.tolerance)
    paired = float((x - y).square().sum(1).mean())
    assert metric.transport is not None
    assert metric.transport.identity_excess == pytest.approx(paired / expected - 1, abs=EXACT)


@pytest.mark.parametrize(("n", "m"), [(40, 40), (40, 20), (7, 3)])
def test_w2_of_more_particles(n: int, m: int) -> None:
    x, y = cloud(n, 5, 1), cloud(m, 5, 2)
    metric = Wasserstein2Squared()
    metric.update(x, y)
    assert same(metric.compute(), assigned(x, y))


def test_w2_pairs_across_updates() -> None:
    # Two particles that change places: each alone moved by 1, the cloud not at all.
    metric = Wasserstein2Squared()
    a, b = torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0])
    assert same(metric(x=a, y=b), 1.0)
    assert same(metric(x=b, y=a), 1.0)
    assert same(metric.compute(), 0.0)


def test_w2_keeps_copies() -> None:
    # Weights go on being trained in place.
    x, y = cloud(3, 4, 0), cloud(3, 4, 1)
    metric = Wasserstein2Squared()
    metric.update(nn.Parameter(x), y)
    expected = assigned(x, y)
    x.add_(1)
    y.mul_(2)
    assert same(metric.compute(), expected)


def test_tolerance_reaches_the_transport(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    inner = metrics.wasserstein2_squared

    def spy(x: Tensor, y: Tensor, *, tolerance: float) -> Any:
        seen.append(tolerance)
        return inner(x, y, tolerance=tolerance)

    monkeypatch.setattr(metrics, "wasserstein2_squared", spy)
    metric = Wasserstein2Squared(tolerance=0.25)
    metric.update(cloud(2, 2, 0), cloud(2, 2, 1))
    metric.compute()
    assert seen == [0.25]


def test_production_takes_numbers_and_tensors_of_any_shape() -> None:
    metric = EntropyProduction()
    for work in (1, 0.5, torch.tensor(0.25), torch.ones(2, 3), torch.arange(4), torch.zeros(0)):
        metric.update(work)
    assert same(metric.compute(), 1 + 0.5 + 0.25 + 6 + 6)


def test_efficiency_of_a_run_is_that_of_its_shards() -> None:
    u = cloud(9, 10, 3)
    whole, shards = SpeedLimitEfficiency(), SpeedLimitEfficiency()
    whole.update(u.sum(0).square().sum(), u.square().sum(), 9)
    for part in u.split(3, dim=1):
        shards.update(part.sum(0).square().sum(), part.square().sum(), torch.tensor([9.0]))
    expected = float(u.sum(0) @ u.sum(0)) / (9 * float((u * u).sum()))
    assert same(whole.compute(), expected)
    assert same(shards.compute(), expected)
    assert expected < 1


def test_straight_and_steady_is_1_and_replicas_of_other_lengths_are_less() -> None:
    metric = SpeedLimitEfficiency()
    metric.update(displacement_squared=100.0, action=10.0, elapsed=10.0)
    assert same(metric.compute(), 1.0)
    metric.update(displacement_squared=16.0, action=4.0, elapsed=4.0)  # optimal too, on a shorter clock
    assert same(metric.compute(), 116 / (10 * 14))


# -- undefined ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [(0.0, 0.0, 10.0), (0.0, 0.0, 0.0), (1.0, 1.0, 0.0), (1.0, -1.0, 10.0), (1.0, 1.0, math.nan), (math.nan, 1.0, 1.0)],
    ids=["no action", "nothing", "no time", "negative action", "NaN time", "NaN displacement"],
)
def test_undefined_efficiency_is_nan(values: tuple[float, float, float]) -> None:
    metric = SpeedLimitEfficiency()
    assert math.isnan(metric(*values))
    assert math.isnan(metric.compute())


def test_efficiency_is_not_clipped() -> None:
    metric = SpeedLimitEfficiency()
    metric.update(displacement_squared=8.0, action=2.0, elapsed=2.0)
    assert same(metric.compute(), 2.0)


def test_a_nan_work_shows() -> None:
    metric = EntropyProduction()
    metric.update(1.0)
    metric.update(torch.tensor([1.0, math.nan]))
    assert math.isnan(metric.compute())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["x", "y"])
def test_a_diverged_replica_makes_w2_nan_and_raises_nothing(name: str, value: float) -> None:
    metric = CASES["w2"].filled()
    metric.compute()
    metric.update(**({"x": torch.zeros(4), "y": torch.zeros(4)} | {name: torch.tensor([0.0, value, -value, 0.0])}))
    assert math.isnan(metric.compute())
    assert math.isnan(metric.lower)
    assert math.isnan(metric.upper)
    assert metric.transport is None


def test_a_replica_beyond_squares_makes_w2_nan() -> None:
    metric = Wasserstein2Squared()
    metric.update(torch.full((4, 3), 1e200, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64))
    assert math.isnan(metric.compute())


@pytest.mark.parametrize(("name", "value"), [("w2", math.nan), ("production", 0.0), ("efficiency", math.nan)])
def test_before_the_first_update(name: str, value: float) -> None:
    metric = CASES[name].kind()
    with pytest.warns(UserWarning, match="was called before the ``update`` method"):
        assert same(metric.compute(), value)


# -- what torchmetrics does with them -------------------------------------------------------------------------------


@cases
def test_several_updates_give_the_value_of_all(case: Case) -> None:
    for number in range(1, len(case.updates) + 1):
        assert same(case.filled(case.updates[:number]).compute(), case.expected(case.updates[:number]))


@cases
def test_the_order_of_updates_does_not_matter(case: Case) -> None:
    assert same(case.filled(case.updates[::-1]).compute(), case.expected(case.updates))


@cases
def test_forward_returns_the_batch_and_accumulates(case: Case) -> None:
    metric = case.kind()
    for update in case.updates:
        assert same(metric(**update), case.expected([update]))
    assert same(metric.compute(), case.expected(case.updates))
    assert metric.update_count == len(case.updates)


@cases
def test_forward_needs_no_full_state(case: Case) -> None:
    full: Any = type("Full", (case.kind,), {"full_state_update": True})()
    metric = case.kind()
    for update in case.updates:
        assert float(metric(**update)) == float(full(**update))
    assert float(metric.compute()) == float(full.compute())
    assert case.kind.full_state_update is False


@cases
def test_compute_is_cached_until_the_next_update(case: Case) -> None:
    metric = case.filled(case.updates[:2])
    first = metric.compute()
    assert metric.compute() is first
    metric.update(**case.updates[2])
    assert same(metric.compute(), case.expected(case.updates))
    assert same(first, case.expected(case.updates[:2]))


@cases
def test_reset(case: Case) -> None:
    metric = case.filled()
    metric.compute()
    metric.reset()
    assert not metric.update_called
    metric.update(**case.updates[1])
    assert same(metric.compute(), case.expected(case.updates[1:2]))


@cases
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.clone()])
def test_a_copy_goes_on_by_itself(case: Case, copied: Callable[[Any], Any]) -> None:
    metric = case.filled(case.updates[:2])
    metric.compute()
    other = copied(metric)
    other.update(**case.updates[2])
    assert same(other.compute(), case.expected(case.updates))
    assert same(metric.compute(), case.expected(case.updates[:2]))
    metric.update(**case.updates[0])
    assert same(metric.compute(), case.expected([*case.updates[:2], case.updates[0]]))


@cases
def test_state_dict(case: Case) -> None:
    metric = case.filled(case.updates[:2])
    assert metric.state_dict() == {}
    metric.persistent(True)
    state = pickle.loads(pickle.dumps(metric.state_dict()))
    other = case.kind()
    other.load_state_dict(state)
    other.update(**case.updates[2])
    assert same(other.compute(), case.expected(case.updates))


def test_another_way_to_gather_can_be_given() -> None:
    doubled = {"dist_sync_fn": lambda held, group=None: [held, 2 * held], "distributed_available_fn": lambda: True}
    metric = Wasserstein2Squared(**doubled)
    update = CASES["w2"].updates[0]
    metric.update(**update)
    assert same(metric.compute(), w2_of([update, {name: 2 * value for name, value in update.items()}]))


@cases
def test_merge_state(case: Case) -> None:
    metric = case.filled(case.updates[:1])
    metric.merge_state(case.filled(case.updates[1:]))
    assert same(metric.compute(), case.expected(case.updates))


@pytest.mark.parametrize(
    ("kind", "higher", "differentiable"),
    [(Wasserstein2Squared, None, False), (EntropyProduction, None, True), (SpeedLimitEfficiency, True, True)],
)
def test_constants(kind: type[Metric], higher: bool | None, differentiable: bool) -> None:
    assert "higher_is_better" in vars(kind)
    assert kind.higher_is_better is higher
    assert kind.is_differentiable is differentiable


def test_gradients_are_right_where_they_are_promised() -> None:
    work = cloud(2, 3, 0).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: EntropyProduction()(w), (work,))
    values = tuple(torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (3.0, 2.0, 5.0))
    assert torch.autograd.gradcheck(lambda *v: SpeedLimitEfficiency()(*v), values)
    x = cloud(2, 3, 0).requires_grad_()
    metric = Wasserstein2Squared()
    assert not metric(x, cloud(2, 3, 1)).requires_grad
    assert not any(t.requires_grad for t in metric.x)


def test_sums_carry_no_graph() -> None:
    metric = EntropyProduction()
    work = torch.ones(2, requires_grad=True)
    metric.update(work)
    metric(work)
    assert not metric.work.requires_grad


def test_a_failed_update_changes_no_state() -> None:
    metric = CASES["efficiency"].filled()
    before = {name: value.clone() for name, value in metric.metric_state.items()}
    with pytest.raises(ValueError, match="elapsed must be a scalar"):
        metric.update(1.0, 1.0, torch.ones(2))
    assert metric.metric_state == before


# -- bounds of the last compute ---------------------------------------------------------------------------------------


def test_bounds_are_those_of_the_last_value() -> None:
    metric = Wasserstein2Squared()
    assert math.isnan(metric.lower)
    assert math.isnan(metric.upper)
    x, y = cloud(4, 2, 0), cloud(4, 2, 1)
    batch = metric(x[:2], y[:2])
    assert metric.lower <= float(batch) <= metric.upper
    metric.update(x[2:], y[2:])
    assert metric.lower <= float(batch) <= metric.upper
    value = metric.compute()
    assert float(value) != pytest.approx(float(batch), rel=0.01)
    assert metric.lower <= float(value) <= metric.upper
    metric.reset()
    assert math.isnan(metric.lower)
    assert metric.transport is None


# -- collections ----------------------------------------------------------------------------------------------------


def collected() -> MetricCollection:
    kinds: dict[str, Metric] = {name: case.kind() for name, case in CASES.items()}
    kinds |= {"production again": EntropyProduction(), "w2 roughly": Wasserstein2Squared(tolerance=0.5)}
    return MetricCollection(kinds)


@pytest.mark.parametrize("call", ["update", "forward"])
def test_a_collection_gives_each_its_own(call: str) -> None:
    collection = collected()
    for update in zip(*(case.updates for case in CASES.values()), strict=True):
        arguments = {name: value for part in update for name, value in part.items()}
        found = getattr(collection, call)(**arguments)
        if call == "forward":
            for part, (name, case) in zip(update, CASES.items(), strict=True):
                assert same(found[name], case.expected([part]))
    values = collection.compute()
    for name, case in CASES.items():
        assert same(values[name], case.expected(case.updates))
    assert same(values["production again"], CASES["production"].expected(CASES["production"].updates))
    assert collection["w2 roughly"].lower <= float(values["w2"]) * (1 + EXACT)
    collection.reset()
    collection.update(**{name: value for case in CASES.values() for name, value in case.updates[0].items()})
    for name, value in collection.compute().items():
        if name in CASES:
            assert same(value, CASES[name].expected(CASES[name].updates[:1]))


def test_compute_groups_join_no_two_kinds() -> None:
    # Equal states would be shared: all sums are 0 here.
    collection = collected()
    zeros = {"displacement_squared": 0.0, "action": 0.0, "elapsed": 0.0, "work": 0.0}
    collection.update(x=torch.zeros(1, 1), y=torch.zeros(1, 1), **zeros)
    groups = sorted(sorted(group) for group in collection.compute_groups.values())
    assert groups == [["efficiency"], ["production", "production again"], ["w2", "w2 roughly"]]
    collection.update(x=torch.ones(1, 1), y=torch.zeros(1, 1), **(zeros | {"work": 1.0}))
    values = collection.compute()
    assert float(values["production again"]) == 1
    assert math.isnan(values["efficiency"])
    assert float(values["w2"]) == 0.5


# -- precision --------------------------------------------------------------------------------------------------------

# What a module around the metrics may do to them in the middle of a run.
MOVES: dict[str, Callable[[Metric], object]] = {
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "to(dtype)": lambda m: m.to(torch.bfloat16),
    "to(device, dtype)": lambda m: m.to("cpu", torch.float16),
    "set_dtype": lambda m: m.set_dtype(torch.float32),
    "module.half": lambda m: nn.ModuleList([m]).half(),
    "module.bfloat16": lambda m: nn.ModuleList([m]).bfloat16(),
    "module.to(dtype)": lambda m: nn.ModuleList([m]).to(torch.float16),
}
moves = pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
SMALL, MANY = 2.0**-10, 1000  # exact in float64 beside 1e8, nothing beside 1e8 in float32


def small_works(metric: EntropyProduction, move: Callable[[Metric], object] = lambda m: None) -> float:
    metric.update(1e8)
    for number in range(MANY):
        if number in (0, MANY // 2):
            move(metric)
        metric.update(torch.tensor(SMALL))
    return float(metric.compute())


@moves
def test_sums_are_exact_whatever_moves_them(move: Callable[[Metric], object]) -> None:
    assert small_works(EntropyProduction(), move) == 1e8 + MANY * SMALL
    metric = EntropyProduction()
    move(metric)
    metric.reset()
    assert small_works(metric) == 1e8 + MANY * SMALL


def test_float32_sums_would_lose_every_small_work(monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a device without float64: the sum's dtype is the device's best.
    monkeypatch.setattr(metrics, "sum_dtype", lambda device: torch.float32)
    metric = EntropyProduction()
    assert small_works(metric) == 1e8
    assert metric.compute().dtype == torch.float32


@moves
def test_efficiency_is_exact_whatever_moves_it(move: Callable[[Metric], object]) -> None:
    case = CASES["efficiency"]
    metric = case.filled(case.updates[:2])
    move(metric)
    metric.update(**case.updates[2])
    assert same(metric.compute(), case.expected(case.updates))


@moves
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clouds_keep_their_precision_whatever_moves_them(move: Callable[[Metric], object], dtype: torch.dtype) -> None:
    x = cloud(4, 8, 0, dtype)
    y = x + 1e-4 * cloud(4, 8, 1, dtype)  # in bfloat16 nothing would have moved
    metric = Wasserstein2Squared()
    metric.update(x[:2], y[:2])
    move(metric)
    metric.update(x[2:], y[2:])
    assert {t.dtype for t in (*metric.x, *metric.y)} == {dtype}
    assert same(metric.compute(), assigned(x, y), relative=1e-9)  # 1e-4 of 1: four digits cancel in x − y, twice


def test_a_device_without_float64_gets_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "sum_dtype", lambda device: torch.float32)
    for case in CASES.values():
        metric = case.filled()
        value = metric.compute()
        assert value.dtype == torch.float32
        assert float(value) == pytest.approx(case.expected(case.updates), rel=1e-5)  # of float32 states
        states = [t for s in metric.metric_state.values() for t in (s if isinstance(s, list) else [s])]
        assert {t.dtype for t in states} == {torch.float32}
    metric = CASES["production"].filled()
    monkeypatch.undo()
    metric.cpu()  # back on one that has it
    assert metric.work.dtype == torch.float64
    metric.reset()
    assert metric.work.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_warns(dtype: torch.dtype) -> None:
    metric = Wasserstein2Squared()
    x, y = cloud(2, 3, 0).to(dtype), cloud(2, 3, 1).to(dtype)
    metric.update(x, y)
    with pytest.warns(UserWarning, match=f"x is {dtype}"):
        assert same(metric.compute(), assigned(x, y))


def test_large_clouds_in_half_precision_are_finite() -> None:
    # The coordinates add up to 1e5, float16 ends at 65504.
    metric = Wasserstein2Squared()
    metric.update(torch.full((2, 100), 500.0, dtype=torch.float16), torch.full((2, 100), 501.0, dtype=torch.float16))
    with pytest.warns(UserWarning, match=r"x is torch\.float16"):
        assert same(metric.compute(), 100.0)


def test_float32_warns_of_nothing() -> None:
    metric = Wasserstein2Squared()
    metric.update(cloud(2, 3, 0).float(), cloud(2, 3, 1).float())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric.compute()


# -- what updates ask for ---------------------------------------------------------------------------------------------


class HostReads(TorchDispatchMode):
    """Notes what turns a tensor into a number: each waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@cases
def test_updates_read_no_value(case: Case) -> None:
    metric = case.kind()
    with HostReads() as reads:
        for update in case.updates:
            metric.update(**update)
    assert reads.found == []


def test_host_reads_are_noticed() -> None:
    with HostReads() as reads:
        float(torch.ones(()))
    assert reads.found


@cases
def test_states_of_inference_mode_go_on_outside(case: Case) -> None:
    # Lightning validates in inference mode, and trains outside of it.
    metric = case.kind()
    with torch.inference_mode():
        metric.reset()
        metric.update(**case.updates[0])
    for update in case.updates[1:]:
        metric.update(**update)
    assert same(metric.compute(), case.expected(case.updates))


@pytest.mark.parametrize(
    ("x", "y", "error", "words"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), ValueError, r"x and y .*\(2, 3\) and \(2, 4\); particles are rows"),
        (torch.zeros(3), torch.zeros(4), ValueError, r"x and y .*\(1, 3\) and \(1, 4\)"),
        (torch.tensor(1.0), torch.zeros(1), ValueError, r"x must have shape \(particles, coord.* got \(\); use"),
        (torch.zeros(1), torch.zeros(1, 1, 1), ValueError, r"y must have shape .* got \(1, 1, 1\); use flatten"),
        (torch.zeros(0, 3), torch.zeros(1, 3), ValueError, r"x must have shape .* got \(0, 3\)"),
        ([1.0], torch.zeros(1), TypeError, "x must be a dense tensor, got list; use torch.stack"),
        (torch.zeros(1), torch.eye(2).to_sparse(), TypeError, r"y must be a dense .* got torch.sparse_coo; .*dense"),
        (torch.zeros(1, dtype=torch.int64), torch.zeros(1), TypeError, r"x must be of .*torch.int64; use \.to"),
        (torch.zeros(1), torch.zeros(1, dtype=torch.complex64), TypeError, r"y must be of .*torch.complex64"),
    ],
)
def test_clouds_that_do_not_fit(x: Any, y: Any, error: type[Exception], words: str) -> None:
    metric = Wasserstein2Squared()
    with pytest.raises(error, match=words):
        metric.update(x, y)
    assert metric.x == metric.y == []


def test_every_update_has_the_same_coordinates() -> None:
    metric = Wasserstein2Squared()
    metric.update(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"must have 3 coordinates as those before, got 4; use a metric"):
        metric.update(torch.zeros(2, 4), torch.zeros(2, 4))
    assert same(metric.compute(), 0.0)
    metric.reset()
    metric.update(torch.zeros(2, 4), torch.ones(2, 4))
    assert same(metric.compute(), 4.0)


@pytest.mark.parametrize("tolerance", [0, -1e-3, math.nan, math.inf, "1e-3", None])
def test_a_tolerance_is_positive(tolerance: Any) -> None:
    with pytest.raises(ValueError, match=r"tolerance must be a positive number, got .*; 1e-3 is the default"):
        Wasserstein2Squared(tolerance=tolerance)


@pytest.mark.parametrize("work", [None, "1", [1.0], torch.zeros(2, dtype=torch.complex64)])
def test_works_that_are_no_numbers(work: Any) -> None:
    got = "torch.complex64" if isinstance(work, Tensor) else type(work).__name__
    with pytest.raises(TypeError, match=rf"work must be a real number or a real tensor, got {got}; use float\(\)"):
        EntropyProduction().update(work)


@pytest.mark.parametrize("name", ["displacement_squared", "action", "elapsed"])
def test_efficiency_takes_scalars(name: str) -> None:
    good = {"displacement_squared": 1.0, "action": 1.0, "elapsed": 1.0}
    metric = SpeedLimitEfficiency()
    with pytest.raises(ValueError, match=rf"{name} must be a scalar, got a tensor of shape \(2,\); add it up"):
        metric.update(**(good | {name: torch.ones(2)}))
    with pytest.raises(TypeError, match=f"{name} must be a real number .* got NoneType"):
        metric.update(**(good | {name: None}))  # type: ignore[arg-type]


@cases
def test_tensors_of_another_device_are_named(case: Case) -> None:
    # A device without memory stands for an accelerator: nothing must be computed there first.
    away = {name: torch.as_tensor(value).to("meta") for name, value in case.updates[1].items()}
    with pytest.raises(ValueError, match=r"must be on the metric's device, cpu, .* got meta; use metric\.to\('meta'\)"):
        case.kind().update(**away)


@cases
def test_tensors_of_the_host_go_to_the_metric(case: Case) -> None:
    metric = case.kind().to("meta")
    for update in case.updates:
        metric.update(**update)
    states = [t for s in metric.metric_state.values() for t in (s if isinstance(s, list) else [s])]
    assert {t.device.type for t in states} == {"meta"}


def test_unknown_arguments_are_torchmetrics_errors() -> None:
    for case in CASES.values():
        with pytest.raises(ValueError, match="Unexpected keyword arguments: `nonsense`"):
            case.kind(nonsense=1)


def test_examples_of_the_docstrings() -> None:
    found = doctest.testmod(metrics)
    assert found.attempted >= 10
    assert found.failed == 0


# -- Lightning --------------------------------------------------------------------------------------------------------


class Logged(pl.LightningModule):
    """Two steps of SGD per epoch on ½θ²; logs the three, and notes what was logged at each epoch's end."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([3.0, 1.0], dtype=torch.float64))
        self.w2, self.production, self.efficiency = Wasserstein2Squared(), EntropyProduction(), SpeedLimitEfficiency()
        self.seen: list[Update] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        theta = self.theta.detach()
        update: Update = {"x": theta, "y": 0.9 * theta, "work": 0.1 * theta @ theta}
        update |= {"displacement_squared": theta @ theta, "action": 2.0 * theta @ theta, "elapsed": 1.0 + batch_idx}
        self.seen.append({name: torch.as_tensor(value).clone() for name, value in update.items()})
        self.w2.update(update["x"], update["y"])
        self.production(update["work"])
        self.efficiency.update(*(update[n] for n in ("displacement_squared", "action", "elapsed")))
        for name in CASES:
            metric = getattr(self, name)
            self.log(name, metric, on_step=name == "production", on_epoch=True)
        return 0.5 * (self.theta @ self.theta) + 0 * batch.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.theta], lr=0.1)


class Epochs(pl.Callback):
    """The epoch values as they stand once each epoch is over."""

    def __init__(self) -> None:
        self.values: list[dict[str, float]] = []

    def note(self, trainer: pl.Trainer) -> None:
        self.values.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch:
            self.note(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.note(trainer)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_logged_in_a_fit(tmp_path: Path, precision: Any) -> None:
    module, epochs = Logged(), Epochs()
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=2,
        precision=precision,
        callbacks=[epochs],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="x is torch.bfloat16")
        trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(2)))  # type: ignore[arg-type]
    assert len(epochs.values) == 2
    for epoch, values in enumerate(epochs.values):
        seen = module.seen[2 * epoch : 2 * epoch + 2]
        for name, case in CASES.items():
            key = "production_epoch" if name == "production" else name
            # callback_metrics keeps float64; the sums of two bfloat16 numbers too are exact in it.
            assert values[key] == pytest.approx(case.expected(seen), rel=EXACT)
    assert not module.production.update_called
    assert module.production.work.dtype == torch.float64


# -- ranks ------------------------------------------------------------------------------------------------------------

WORKS = [1e8, *[SMALL] * 20]
SHARDS = [run_of(4, 8, 30), run_of(6, 8, 31), run_of(2, 5, 32)]


def replicas(*numbers: int, dtype: torch.dtype = torch.float64) -> list[Update]:
    return [{"x": cloud(1, 3, 20 + i)[0].to(dtype), "y": cloud(1, 3, 40 + i)[0].to(dtype)} for i in numbers]


def clouds(n: int, m: int, seed: int) -> list[Update]:
    return [{"x": cloud(n, 3, seed), "y": cloud(m, 3, seed + 1)}]


def works(part: slice) -> list[Update]:
    return [{"work": work} for work in WORKS[part]]


SINGLE, HALF = torch.float32, torch.bfloat16

# Of which case, and what each of the two ranks is given.
RANKS: dict[str, tuple[str, list[Update], list[Update]]] = {
    "w2, one replica each": ("w2", replicas(0), replicas(1)),
    "w2, three and two": ("w2", replicas(0, 1, 2), replicas(3, 4)),
    "w2, all on the first": ("w2", replicas(0, 1, 2), []),
    "w2, all on the second": ("w2", [], replicas(0, 1, 2)),
    "w2, none": ("w2", [], []),
    "w2, clouds of other sizes": ("w2", clouds(2, 1, 60), clouds(2, 1, 70)),
    "w2, float32 and float64": ("w2", replicas(0, dtype=SINGLE), replicas(1)),
    "w2, float64 and float32": ("w2", replicas(0), replicas(1, dtype=SINGLE)),
    "w2, bfloat16 and none": ("w2", replicas(0, dtype=HALF), []),
    "w2, bfloat16": ("w2", replicas(0, 1, dtype=HALF), replicas(2, dtype=HALF)),
    "production": ("production", works(slice(15)), works(slice(15, None))),
    "production, all on the second": ("production", [], works(slice(None))),
    "efficiency of shards": ("efficiency", SHARDS[:1], SHARDS[1:2]),
    "efficiency of replicas": ("efficiency", SHARDS[:1], SHARDS[1:]),
}


def work_of_a_rank(rank: int, folder: str) -> None:
    """Runs in its own process: everything in RANKS, and what else needs two."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = f"file://{folder}/store"
    # A collective that one rank never joins ends in an error, not in a hang.
    dist.init_process_group("gloo", store, timeout=timedelta(seconds=60), rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for title, (name, *given) in RANKS.items():
        metric = CASES[name].filled(given[rank])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            value = metric.compute()
        warned = any("x is torch.bfloat16" in str(warning.message) for warning in caught)
        bounds = getattr(metric, "lower", 0), getattr(metric, "upper", 0)
        found[title] = {"value": value, "warned": warned, "bounds": bounds}
    metric = CASES["w2"].filled(replicas(rank))
    found["before"] = metric.compute()
    metric.update(**replicas(2 + rank)[0])
    found["own"] = len(metric.x)
    found["after"] = metric.compute()
    found["each"] = Wasserstein2Squared()(**replicas(rank)[0])
    found["on step"] = Wasserstein2Squared(dist_sync_on_step=True)(**replicas(rank)[0])
    group = [dist.new_group([0]), dist.new_group([1])][rank]
    alone = Wasserstein2Squared(process_group=group)
    alone.update(**replicas(rank)[0])
    found["group"] = alone.compute()
    narrow = Wasserstein2Squared()
    narrow.update(torch.zeros(1, 2 + rank), torch.zeros(1, 2 + rank))
    try:
        narrow.compute()
    except ValueError as error:
        found["narrow"] = str(error)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    in_two_processes(work_of_a_rank, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("title", RANKS)
def test_two_ranks_give_what_one_process_gives(ranks: list[dict[str, Any]], title: str) -> None:
    name, first, second = RANKS[title]
    mine, theirs = (found[title]["value"] for found in ranks)
    expected = CASES[name].expected([*first, *second]) if first or second else math.nan
    assert same(mine, expected)
    assert torch.equal(mine, theirs) or math.isnan(expected)
    if name == "production":
        assert float(mine) == expected
    if name == "w2" and (first or second):
        one = CASES[name].filled([*first, *second])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="x is torch.bfloat16")
            assert float(one.compute()) == float(mine)
        assert ranks[0][title]["bounds"] == ranks[1][title]["bounds"] == (one.lower, one.upper)
    assert ranks[0][title]["warned"] == ranks[1][title]["warned"] == ("bfloat16" in title)


def test_ranks_go_on_after_a_compute(ranks: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(ranks):
        assert same(found["before"], w2_of(replicas(0, 1)))
        assert found["own"] == 2
        assert same(found["after"], w2_of(replicas(0, 2, 1, 3)))
        assert same(found["each"], w2_of(replicas(rank)))
        assert same(found["on step"], w2_of(replicas(0, 1)))
        assert same(found["group"], w2_of(replicas(rank)))


def test_ranks_of_different_width_all_say_so(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["narrow"].startswith("particles must have as many coordinates on all ranks, got [2, 3]; use")


# -- accelerators -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@cases
@pytest.mark.parametrize("source", ["cuda", "cpu"])
def test_cuda(case: Case, source: str) -> None:
    metric = case.kind().to("cuda")
    given = [{n: v.to(source) if isinstance(v, Tensor) else v for n, v in u.items()} for u in case.updates]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for update in given:
            metric.update(**update)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    value = metric.compute()
    assert value.device.type == "cuda"
    assert same(value, case.expected(case.updates))
    assert same(metric.cpu().compute(), case.expected(case.updates))
    with pytest.raises(
        ValueError, match=r"must be on the metric's device, cpu.* got cuda:0; use metric\.to\('cuda:0'\)"
    ):
        metric.update(**{n: torch.as_tensor(v).to("cuda") for n, v in case.updates[0].items()})
