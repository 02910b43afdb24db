"""What a call leaves as it was and does not depend on: inputs, grad mode, autocast, defaults. The same bits again."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from geomloss import SamplesLoss
from torch import Tensor
from transport_cases import Draw, features, independent, lazy, lazy_and_permuted

from lightning_speedlimit.transport import Transport, sinkhorn, wasserstein2, wasserstein2_squared


@pytest.fixture(autouse=True)
def _sinkhorn_from_few_particles_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wasserstein2, "_SOLVED", 512)
    monkeypatch.setattr(wasserstein2, "_FLAT", 1)


def weighted() -> dict[str, Any]:
    draw = Draw(3)
    v = torch.rand(25, generator=draw.generator, dtype=torch.float64)
    return {"x": draw.normal(30, 8).float(), "y": draw.normal(25, 8).float(), "weights_y": v / v.sum()}


def as_stored(kind: Callable[..., tuple[Tensor, Tensor]], n: int) -> dict[str, Any]:
    x, y = kind(Draw(n), n, 8)
    return {"x": x.float(), "y": y.float()}


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "lazy": lambda: as_stored(lazy, 40),
    "permuted": lambda: as_stored(lazy_and_permuted, 40),
    "independent": lambda: as_stored(independent, 40),
    "sinkhorn": lambda: as_stored(features, 520),
    "weighted": weighted,
}
cases = pytest.mark.parametrize("case", CASES)


def same_bits(first: Transport, second: Transport) -> bool:
    """NaN equals NaN; the matching too."""
    matchings = first.matching, second.matching
    equal = torch.equal(*matchings) if None not in matchings else matchings == (None, None)  # type: ignore[arg-type]
    return repr(first) == repr(second) and equal


@cases
def test_the_same_bits_at_a_second_call(case: str) -> None:
    given = CASES[case]()
    first = wasserstein2_squared(**given)
    torch.manual_seed(1)  # nothing is drawn
    state = torch.random.get_rng_state()
    assert same_bits(wasserstein2_squared(**given), first)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_other_bits_would_be_noticed() -> None:
    given = CASES["lazy"]()
    first = wasserstein2_squared(**given)
    given["y"][3, 2] += 1e-6
    assert not same_bits(wasserstein2_squared(**given), first)


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_inputs_are_not_modified(case: str, dtype: torch.dtype) -> None:
    given = {name: tensor.to(dtype) for name, tensor in CASES[case]().items()}
    before = {name: tensor.clone() for name, tensor in given.items()}
    versions = {name: tensor._version for name, tensor in given.items()}
    wasserstein2_squared(**given)
    for name, tensor in given.items():
        assert torch.equal(tensor, before[name])
        assert tensor._version == versions[name]


@cases
def test_weights_that_are_trained_are_left_alone(case: str) -> None:
    given = CASES[case]()
    plain = wasserstein2_squared(**given)
    trained = {name: torch.nn.Parameter(tensor) for name, tensor in given.items()}
    product = trained["x"] * 2  # not a leaf
    assert same_bits(wasserstein2_squared(**trained), plain)
    assert all(tensor.requires_grad and tensor.grad is None for tensor in trained.values())
    assert product.grad_fn is not None
    wasserstein2_squared(product, product.sin())
    product.sum().backward()  # the graph is whole
    assert torch.equal(trained["x"].grad, torch.full_like(trained["x"], 2))


# ---- the state of torch ------------------------------------------------------------------------------------


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "plain": nullcontext,
    "grad off": torch.no_grad,
    "grad on": torch.enable_grad,
    "inference mode": torch.inference_mode,
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device meta": lambda: torch.device("meta"),
}
states = pytest.mark.parametrize("state", STATES)


def state_of_torch() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
    )


@states
@cases
def test_the_same_in_every_state_of_torch(case: str, state: str) -> None:
    given = CASES[case]()
    plain = wasserstein2_squared(**given)
    with STATES[state]():
        before = state_of_torch()
        found = wasserstein2_squared(**given)
        assert state_of_torch() == before
    assert same_bits(found, plain)


@states
def test_states_that_are_nothing_special_would_be_noticed(state: str) -> None:
    outside = state_of_torch()
    with STATES[state]():
        assert (state_of_torch() != outside) == (state not in ("plain", "grad on"))
    assert state_of_torch() == outside


def test_tensors_made_in_inference_mode() -> None:
    given = CASES["sinkhorn"]()
    plain = wasserstein2_squared(**given)
    with torch.inference_mode():
        made = {name: tensor.clone() for name, tensor in given.items()}
    assert same_bits(wasserstein2_squared(**made), plain)


@states
def test_the_state_of_torch_after_an_error_inside_sinkhorn(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def broken(*_: object) -> None:
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        torch.autograd.set_grad_enabled(not torch.is_grad_enabled())  # geomloss turns it off, then its loop raises
        raise RuntimeError("in the loop")

    monkeypatch.setattr(SamplesLoss, "forward", broken)
    given = CASES["sinkhorn"]()
    with STATES[state]():
        before = state_of_torch()
        with pytest.raises(RuntimeError, match="in the loop"):
            wasserstein2_squared(**given)
        assert state_of_torch() == before
    assert seen == [(False, False)]


@pytest.mark.parametrize("enabled", [True, False])
def test_grad_mode_around_sinkhorn_itself(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # The room calls it without gradients; what geomloss does to the mode is mended where it is done.
    costs, equal = torch.rand(20, 20).double(), torch.full((20,), 1 / 20).double()
    forward = SamplesLoss.forward
    outcomes = []

    def meddling(self: SamplesLoss, *given: Tensor) -> Any:
        result = forward(self, *given)
        torch.autograd.set_grad_enabled(not enabled)
        outcomes.append(result)
        return result

    monkeypatch.setattr(SamplesLoss, "forward", meddling)
    with torch.set_grad_enabled(enabled):
        f = sinkhorn.potentials(costs, (equal, equal), sharpness=0.3, scaling=0.5)
        assert torch.is_grad_enabled() == enabled
    assert outcomes
    assert not f.requires_grad


def test_autocast_reaches_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    # As above, for the state in which a difference would be largest: bfloat16 keeps 8 bits.
    monkeypatch.setattr(wasserstein2, "_SOLVED", 10)
    given = CASES["independent"]()
    plain = wasserstein2_squared(**given)
    with torch.autocast("cpu", torch.bfloat16):
        product = given["x"] @ given["y"].T
        assert product.dtype == torch.bfloat16  # autocast is on
        assert same_bits(wasserstein2_squared(**given), plain)


def test_lowered_precision_of_products_changes_nothing() -> None:
    before = torch.get_float32_matmul_precision()
    given = CASES["sinkhorn"]()
    plain = wasserstein2_squared(**given)
    try:
        torch.set_float32_matmul_precision("medium")
        found = wasserstein2_squared(**given)
    finally:
        torch.set_float32_matmul_precision(before)
    # Sinkhorn's products may be in bfloat16 then; what it finds is proved in float64.
    assert found.value == pytest.approx(plain.value, rel=1e-12)
    assert found.converged
