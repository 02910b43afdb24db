"""Sums over long runs and large models: what rounding leaves of them."""

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_speedlimit.trajectory import TrajectoryMeter
from lightning_speedlimit.trajectory.sums import Pair, RunningSum

CPU = torch.device("cpu")
ROUNDING = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}  # unit roundoff


def hard_terms() -> Tensor:
    """(20 000, 50): a million terms, one sum per column, each hard in its own way; float32 values."""
    steps, generator = 20_000, torch.Generator().manual_seed(0)
    ones = torch.ones(steps, 10)
    ones[0] = 2.0**24  # after this each 1 falls under the last bit
    sizes = 10.0 ** torch.empty(steps, 10).uniform_(-12, 0, generator=generator)  # positive, twelve decades
    signed = sizes * torch.randn(steps, 10, generator=generator).sign()
    decay = torch.exp(-torch.linspace(0, 30, steps))[:, None] * torch.rand(steps, 10, generator=generator)
    bursts = torch.full((steps, 10), 1e-3)
    bursts[::500] = 1e5 * torch.randn(40, 10, generator=generator)  # large ones of both signs in a small stream
    return torch.cat([ones, sizes, signed, decay, bursts], dim=1)


TERMS = hard_terms()


def exact_sums() -> tuple[Tensor, Tensor]:
    """Σ x and Σ |x| of each column, correctly rounded."""
    columns = TERMS.double().T.tolist()
    exact = torch.tensor([math.fsum(column) for column in columns], dtype=torch.float64)
    return exact, torch.tensor([math.fsum(map(abs, column)) for column in columns], dtype=torch.float64)


def running_sum(dtype: torch.dtype) -> Tensor:
    total = RunningSum(TERMS.shape[1], device=CPU, dtype=dtype)
    for term in TERMS:
        total.add_(term.to(dtype))
    return total.host()


def naive_sum(dtype: torch.dtype) -> Tensor:
    total = torch.zeros(TERMS.shape[1], dtype=dtype)
    for term in TERMS:
        total += term.to(dtype)
    return total.double()


def test_pairs_of_float32_are_as_good_as_their_last_bit() -> None:
    # Kahan: |error| ≤ (2ε + O(nε²)) Σ|x|, with nε² = 7e-11 ≪ ε. Twice that, for reading value − correction.
    exact, size = exact_sums()
    assert float(((running_sum(torch.float32) - exact).abs() / size).max()) < 4 * ROUNDING[torch.float32]


def test_float64_sums() -> None:
    # Without compensation: at most n ε Σ|x|; rounding errors of both signs make that √n, times 4 for luck.
    exact, size = exact_sums()
    bound = 4 * TERMS.shape[0] ** 0.5 * ROUNDING[torch.float64]
    assert float(((running_sum(torch.float64) - exact).abs() / size).max()) < bound


def test_naive_float32_fails() -> None:
    # The first ten columns lose all their ones: 20 000/2²⁴ = 1.2e-3, which is 10⁴ times what pairs may lose.
    exact, size = exact_sums()
    errors = (naive_sum(torch.float32) - exact).abs() / size
    assert float(errors[:10].min()) > 1e-3
    assert float(errors.max()) > 1000 * 4 * ROUNDING[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_host_value_goes_in_and_comes_out(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    value = torch.randn(3, 4, generator=generator, dtype=torch.float64) * 1e6
    total = RunningSum(3, 4, device=CPU, dtype=dtype)
    total.load_(value)
    # Two float32 carry 48 bits; float64 all.
    bound = 0.0 if dtype == torch.float64 else 2.0**-48
    assert float(((total.host() - value) / value).abs().max()) <= bound
    assert (total.host().dtype, total.host().shape) == (torch.float64, (3, 4))
    other = RunningSum(3, 4, device=CPU, dtype=dtype)
    other.load_(total.host())
    assert torch.equal(other.host(), total.host())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_going_on_from_a_host_value(dtype: torch.dtype) -> None:
    exact, size = exact_sums()
    total = RunningSum(TERMS.shape[1], device=CPU, dtype=dtype)
    for k, term in enumerate(TERMS[:4000]):
        if k % 1000 == 500:
            saved = total.host()
            total = RunningSum(TERMS.shape[1], device=CPU, dtype=dtype)
            total.load_(saved)
        total.add_(term.to(dtype))
    columns = TERMS[:4000].double().T.tolist()
    exact = torch.tensor([math.fsum(column) for column in columns], dtype=torch.float64)
    size = torch.tensor([math.fsum(map(abs, column)) for column in columns], dtype=torch.float64)
    bound = 4 * ROUNDING[torch.float32] if dtype == torch.float32 else 4 * 4000**0.5 * ROUNDING[torch.float64]
    assert float(((total.host() - exact).abs() / size).max()) < bound


def test_what_was_read_does_not_change() -> None:
    for dtype in (torch.float32, torch.float64):
        total = RunningSum(2, device=CPU, dtype=dtype)
        total.add_(torch.ones(2, dtype=dtype))
        seen = total.host()
        total.add_(torch.ones(2, dtype=dtype))
        assert seen.tolist() == [1.0, 1.0]
        value = torch.zeros(2, dtype=torch.float64)
        total.load_(value)
        total.add_(torch.ones(2, dtype=dtype))
        assert value.tolist() == [0.0, 0.0]


# ---- large models --------------------------------------------------------------------------------------

NUMEL = 6_000_000


class Large:
    """One step of SGD with lr 1 on millions of float32 weights: the meter's numbers and the truth."""

    def __init__(self, start: Tensor, motion: Tensor) -> None:
        weight = nn.Parameter(start.clone())
        optimizer = torch.optim.SGD([weight], lr=1.0)
        meter = TrajectoryMeter(optimizer, coordinates="all")
        weight.grad = -motion
        optimizer.step()
        self.values = meter.compute()
        meter.close()
        self.start, self.end, self.gradient = start, weight.detach(), -motion
        update = self.end.double() - start.double()
        self.square = float(update.square().sum())
        self.work = -float((self.gradient.double() * update).sum())

    def errors(self) -> dict[str, float]:
        """Relative errors of squares and works."""
        return {
            "displacement": self.values["displacement"] ** 2 / self.square - 1,
            "path_length": self.values["path_length"] ** 2 / self.square - 1,
            "action": self.values["action"] / self.square - 1,
            "work_ito": self.values["work_ito"] / self.work - 1,
            "work_action": self.values["work_action"] / self.square - 1,
            "grad_norm": self.values["grad_norm"] ** 2 / float(self.gradient.double().square().sum()) - 1,
        }


@pytest.fixture(scope="module", params=["common drive", "random"])
def offset(request: pytest.FixtureRequest) -> Large:
    """Weights far from 0, moved by little: θ ~ 1000 ± 0.1, u ~ 0.01, all the same or all different."""
    generator = torch.Generator().manual_seed(0)
    start = 1000 + 0.1 * torch.randn(NUMEL, generator=generator)
    alike = request.param == "common drive"
    motion = torch.full((NUMEL,), 0.01) if alike else 0.01 * torch.randn(NUMEL, generator=generator)
    return Large(start, motion)


def test_sums_over_millions_of_weights(offset: Large) -> None:
    # Squares are added in float64. Products are added in float32 within a row of 256, in pairs, and lose at most
    # log₂(256) ε = 5e-7 there, and in float64 between rows; BLAS lost 7e-5 where all updates are equal.
    for name, error in offset.errors().items():
        assert abs(error) < 1e-6, name


def test_a_flat_float32_sum_is_worse() -> None:
    # The few partial sums of one float32 dot product over six million equal squares: near the end each
    # addition is rounded the same way, by up to ε times a sum that is 10⁵ times the term.
    update = torch.full((NUMEL,), 0.01)
    flat = float(torch.dot(update, update))
    truth = NUMEL * float(update[0].double() ** 2)
    assert abs(flat / truth - 1) > 1e-5


def test_the_difference_is_taken_before_the_square(offset: Large) -> None:
    # ‖a‖² + ‖b‖² − 2a·b loses ε ‖a‖²/‖a − b‖² = 6e-8 · 10⁶/10⁻⁴ = 600: nothing right is left of it, and in
    # float64 still only 1e-16 · 10¹⁰ = 1e-6.
    a, b = offset.end, offset.start
    expanded = float(a @ a + b @ b - 2 * (a @ b))
    assert abs(expanded / offset.square - 1) >= 1
    assert abs(offset.values["displacement"] ** 2 / offset.square - 1) < 1e-6


def test_the_displacement_of_a_wide_offset_has_no_rounding_of_its_own() -> None:
    # Few weights, huge offset: θ_1 − θ_0 is exact in float32 (Sterbenz), so that the sum is exact too.
    start = torch.tensor([2.0**20, -(2.0**20), 2.0**20 + 8])
    large = Large(start, torch.tensor([0.25, 0.5, -0.125]))
    assert large.values["displacement"] == math.sqrt(0.25**2 + 0.5**2 + 0.125**2)


def test_a_long_run_of_tiny_steps_is_summed_to_the_end() -> None:
    # ‖u‖² = 4·2⁻³⁰ at each of 2000 steps after one of size 1: float32 would stop counting at once.
    weight = nn.Parameter(torch.zeros(4, dtype=torch.float32))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    meter = TrajectoryMeter(optimizer)
    weight.grad = -torch.ones(4)
    optimizer.step()
    weight.grad = torch.full((4,), 2.0**-15)
    for _ in range(2000):
        optimizer.step()
    values = meter.compute()
    meter.close()
    # Powers of two all along: θ runs from 1 downwards in multiples of 2⁻¹⁵, exact in float32 and in the sums.
    assert values["action"] == 4 + 2000 * 4 * 2.0**-30
    assert values["path_length"] == 2 + 2000 * 2 * 2.0**-15
    assert values["displacement"] == 2 * (1 - 2000 * 2.0**-15)


# ---- many equal terms in float32 ---------------------------------------------------------------------------


def test_a_pair_keeps_the_digits_of_many_equal_terms() -> None:
    """A plain float32 is off by 0.1 % and more there: equal terms are rounded the same way each time."""
    term, steps = torch.tensor([0.1, 0.3, 7e-5]), 100_000
    pair, plain = Pair(torch.zeros(3)), torch.zeros(3)
    for _ in range(steps):
        pair.low.add_(term)
        pair.added()
        plain.add_(term)
    wanted = term.double() * steps
    # `low` holds 64 terms at most: each addition is rounded to half an ulp of 64 terms, 64 · 6e-8 of one.
    assert torch.allclose(pair.value(), wanted, rtol=4e-6, atol=0.0)
    assert bool(((plain.double() - wanted).abs() > 1e-4 * wanted).any())
