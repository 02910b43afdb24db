"""How coordinates are brought together: each once, in one order whatever the layout, with the weight of its draw."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD

from lightning_speedlimit.trajectory import TrajectoryMeter, compiled
from lightning_speedlimit.trajectory.coordinates import Coordinates
from lightning_speedlimit.trajectory.gathering import ROW, UNIT, dense

SINGLE = [torch.float32, torch.bfloat16, torch.float16, torch.complex64]
DOUBLE = [torch.float64, torch.complex128]

shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
layouts = st.sampled_from(["contiguous", "transposed", "channels_last", "sliced", "expanded"])


def laid_out(shape: tuple[int, ...], layout: str, dtype: torch.dtype, seed: int) -> Tensor:
    """Random values in the layout, where the shape allows it."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.complex128 if dtype.is_complex else torch.float64)
    values = values.to(dtype)
    if layout == "transposed" and len(shape) > 1:
        values = values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "channels_last" and len(shape) == 4:
        values = values.to(memory_format=torch.channels_last)
    if layout == "sliced" and shape:
        values = torch.stack([values, values], dim=-1)[..., 0]  # every second place in memory
    if layout == "expanded" and shape and shape[0]:
        values = values[:1].expand(shape)
    return values


def plain(tensor: Tensor) -> Tensor:
    """In the tensor's own order, float64; complex entries as pairs."""
    tensor = tensor.detach()
    pairs = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return pairs.contiguous().double().reshape(-1).clone()


class Drawn:
    """Some parameters, each whole or with some of its units drawn, and the places of what is measured."""

    def __init__(self, parameters: list[Tensor], seed: int, sampled: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        units: list[Tensor | None] = []
        weights: list[Tensor | None] = []
        self.places, self.weights = [], []
        for p in parameters:
            size = plain(p).numel()
            place, weight = torch.arange(size), torch.ones(size, dtype=torch.float64)
            count = size // UNIT
            if sampled and torch.rand((), generator=generator) < 0.7:
                units.append(torch.randperm(count, generator=generator)[: (count + 1) // 2].sort().values)
                weights.append(1 + torch.rand(len(units[-1]), generator=generator, dtype=torch.float64))
                tail = torch.arange(count * UNIT, size)
                place = torch.cat([(units[-1][:, None] * UNIT + torch.arange(UNIT)).view(-1), tail])
                weight = torch.cat([weights[-1].repeat_interleave(UNIT), torch.ones(len(tail), dtype=torch.float64)])
            else:
                units.append(None)
                weights.append(None)
            self.places.append(place)
            self.weights.append(weight)
        self.parameters = parameters
        self.coordinates = Coordinates(parameters, units, weights, [1.0] * len(parameters))

    def expected(self, tensors: list[Tensor | None]) -> Tensor:
        """Each parameter's measured coordinates, with zeros up to the end of its last row."""
        found, width = [], self.coordinates.width
        for tensor, p, place in zip(tensors, self.parameters, self.places, strict=True):
            values = plain(torch.zeros_like(p) if tensor is None else tensor)[place]
            found.append(torch.cat([values, torch.zeros(-len(values) % width, dtype=torch.float64)]))
        return torch.cat(found)


@st.composite
def draws(draw: st.DrawFn) -> Drawn:
    dtypes = draw(st.sampled_from([SINGLE, DOUBLE]))
    number, sampled = draw(st.integers(1, 6)), draw(st.booleans())
    parameters = [laid_out(draw(shapes), draw(layouts), draw(st.sampled_from(dtypes)), seed) for seed in range(number)]
    return Drawn(parameters, draw(st.integers(0, 99)), sampled)


@settings(max_examples=150)
@given(draws(), layouts, st.booleans())
def test_each_measured_coordinate_is_gathered_once(drawn: Drawn, layout: str, absent: bool) -> None:
    coordinates = drawn.coordinates
    vector = coordinates.vector()
    found = coordinates.gather(drawn.parameters, vector).double().reshape(-1)
    assert torch.equal(found, drawn.expected(drawn.parameters))
    others: list[Tensor | None] = [
        laid_out(tuple(p.shape), layout, p.dtype, 20 + i) for i, p in enumerate(drawn.parameters)
    ]
    if absent:
        others[0] = None
    found = coordinates.gather(others, vector).double().reshape(-1)
    assert torch.equal(found, drawn.expected(others))
    assert sum(coordinates.numbers) == sum(len(place) for place in drawn.places)
    assert coordinates.width == (ROW if coordinates.exact else UNIT)


@settings(max_examples=60)
@given(draws())
def test_rows_and_weights(drawn: Drawn) -> None:
    coordinates = drawn.coordinates
    vector = coordinates.vector()
    coordinates.gather(drawn.parameters, vector)
    assert [r.start for r in coordinates.rows] == [0, *(r.stop for r in coordinates.rows[:-1])]
    assert coordinates.rows[-1].stop == coordinates.count == len(coordinates.weights)
    for i, (p, place, weight) in enumerate(zip(drawn.parameters, drawn.places, drawn.weights, strict=True)):
        rows, values = coordinates.rows[i], plain(p)[place]
        assert bool((coordinates.of_each(range(len(drawn.parameters)), torch.int64)[rows] == i).all())
        own = coordinates.weights[rows].repeat_interleave(coordinates.width)[: len(values)]
        assert torch.equal(own, weight)
        # Only the parameter's own coordinates come back, NaN where none was measured.
        back = coordinates.scatter(vector.rows, i, elsewhere=math.nan)
        assert back.shape == dense(p).shape
        whole = torch.full((plain(p).numel(),), math.nan, dtype=torch.float64)
        whole[place] = values
        assert torch.equal(back.double().reshape(-1).nan_to_num(7.0), whole.nan_to_num(7.0))
    squared = sum(float((w * plain(p)[n].square()).sum()) for p, n, w in zip(*vars_of(drawn), strict=True))
    # float32 values, squared and added in float64.
    own = coordinates.row(torch.float64)
    coordinates.squares(vector.rows, own)
    assert float(coordinates.total(own)) == pytest.approx(squared, rel=1e-12)


def vars_of(drawn: Drawn) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return drawn.parameters, drawn.places, drawn.weights


@pytest.mark.parametrize("sampled", [False, True])
def test_sparse_gradients_count_duplicates_together(sampled: bool) -> None:
    p = torch.zeros(9, 5)
    drawn = Drawn([p, torch.zeros(3)], seed=1, sampled=sampled)
    sparse = torch.sparse_coo_tensor(
        torch.tensor([[1, 8, 1]]), torch.arange(15.0).view(3, 5), (9, 5), check_invariants=True
    )
    found = drawn.coordinates.gather([sparse, torch.ones(3)], drawn.coordinates.vector())
    whole = torch.zeros(9, 5)
    whole[1], whole[8] = torch.arange(5.0) + torch.arange(10.0, 15.0), torch.arange(5.0, 10.0)
    assert torch.equal(found.double().reshape(-1), drawn.expected([whole, torch.ones(3)]))


def test_some_parameters_alone_leave_the_others_as_they_are() -> None:
    parameters = [torch.full((n,), float(n)) for n in (5, 300, 9)]
    drawn = Drawn(parameters, seed=0, sampled=False)
    vector = drawn.coordinates.vector()
    drawn.coordinates.gather(parameters, vector)
    drawn.coordinates.gather([torch.zeros_like(parameters[1])], vector, first=1)
    assert torch.equal(vector.rows.double().reshape(-1), drawn.expected([parameters[0], None, parameters[2]]))


@settings(max_examples=60)
@given(draws(), layouts)
def test_whether_a_vector_holds_what_is_there(drawn: Drawn, layout: str) -> None:
    coordinates, vector = drawn.coordinates, drawn.coordinates.vector()
    coordinates.gather(drawn.parameters, vector)
    assert coordinates.holds(vector, drawn.parameters)
    again = [laid_out(tuple(p.shape), layout, p.dtype, 40) for p in drawn.parameters]
    for i, place in enumerate(drawn.places):
        if len(place):
            changed: list[Tensor | None] = [*drawn.parameters]
            changed[i] = again[i]
            assert not coordinates.holds(vector, changed)
            changed[i] = None
            assert coordinates.holds(vector, changed) == (not plain(drawn.parameters[i])[place].any())


@pytest.mark.parametrize("library", [compiled.LIBRARY, None], ids=["compiled", "torch"])
def test_a_parameter_of_which_no_unit_was_drawn_has_its_last_coordinates(
    library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that fill no unit are measured in any case; an empty tensor has no address of its own."""
    monkeypatch.setattr(compiled, "LIBRARY", library)
    parameter, none = torch.arange(300.0), torch.zeros(0, dtype=torch.int64)
    coordinates = Coordinates([parameter], [none], [none.double()], [1.0])
    vector = coordinates.vector()
    assert coordinates.gather([parameter], vector).tolist() == [[296.0, 297.0, 298.0, 299.0, 0.0, 0.0, 0.0, 0.0]]
    changed = parameter.clone()
    changed[:8] += 1.0
    assert coordinates.holds(vector, [changed])
    changed[-1] += 1.0
    assert not coordinates.holds(vector, [changed])


@pytest.mark.parametrize("size", [5, 2_000_003])
def test_pieces_cover_all_rows(size: int) -> None:
    coordinates = Coordinates([torch.zeros(size)], [None], [None], [1.0])
    pieces = coordinates.pieces()
    assert (len(pieces) > 2) == (size > 10)
    assert [p.start for p in pieces] == [0, *(p.stop for p in pieces[:-1])]
    assert pieces[-1].stop == coordinates.count


@pytest.mark.parametrize("library", [compiled.LIBRARY, None], ids=["compiled", "torch"])
@pytest.mark.parametrize("drawn", [False, True])
def test_products_of_rows(library: Any, drawn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "LIBRARY", library)
    a, b = torch.randn(2, 40 * ROW, generator=torch.Generator().manual_seed(0))
    units = torch.arange(40 * ROW // UNIT) if drawn else None
    coordinates = Coordinates([a], [units], [torch.ones(len(units)) if units is not None else None], [1.0])
    a, b = a.view(-1, coordinates.width), b.view(-1, coordinates.width)
    found, squared = torch.zeros(len(a)), torch.zeros(len(a), dtype=torch.float64)
    coordinates.dots([(a, b, found)])
    coordinates.squares(a, squared)
    exact, size = (a.double() * b.double()).sum(1), (a.double() * b.double()).abs().sum(1)
    # float32: a rounding of each product and of the eight levels of a sum in pairs
    assert float(((found.double() / coordinates.scale - exact).abs() / size).max()) < 9 * 2.0**-24
    torch.testing.assert_close(squared, a.double().square().sum(1), rtol=1e-14, atol=0.0)
    weights = torch.rand(len(a), dtype=torch.float64)
    coordinates.weights, coordinates._unweighted = weights, False
    whole = coordinates.totals(found, [0], 1)
    # float64: as many roundings as rows
    torch.testing.assert_close(whole, (found.double() * weights).sum().reshape(1), rtol=1e-12, atol=1e-12)


# ---- the same through the meter ------------------------------------------------------------------------

ODD = [
    ((), "contiguous"),
    ((0,), "contiguous"),
    ((3, 0, 2), "contiguous"),
    ((5, 7), "transposed"),
    ((4, 3, 3, 3), "channels_last"),
    ((6, 4), "sliced"),
    ((1, 1, 1, 1), "channels_last"),
    ((140_001, 2), "contiguous"),
    ((2, 70_001), "transposed"),
    ((50, 30, 10, 10), "channels_last"),
]


@pytest.mark.parametrize("dtype", SINGLE + DOUBLE, ids=str)
@pytest.mark.parametrize("pattern", ["together", "in turn"])
def test_squares_and_works_of_odd_parameters(dtype: torch.dtype, pattern: str) -> None:
    parameters = [nn.Parameter(laid_out(shape, layout, dtype, seed)) for seed, (shape, layout) in enumerate(ODD)]
    optimizer = SGD(parameters, lr=0.5)
    meter = TrajectoryMeter(optimizer, coordinates="all")
    start = [plain(p) for p in parameters]
    path = work = 0.0
    generator = torch.Generator().manual_seed(9)
    for k in range(4):
        before = [plain(p) for p in parameters]
        for i, p in enumerate(parameters):
            p.grad = None
            if pattern == "together" or (i + k) % 3:
                random = torch.randn(dense(p).shape, generator=generator, dtype=torch.float64)
                p.grad = torch.empty_like(p).copy_(torch.view_as_complex(random) if p.is_complex() else random)
        optimizer.step()
        updates = [plain(p) - b for p, b in zip(parameters, before, strict=True)]
        path += math.sqrt(sum(float(u @ u) for u in updates))
        work -= sum(float(plain(p.grad) @ u) for p, u in zip(parameters, updates, strict=True) if p.grad is not None)
    values = meter.compute()
    meter.close()
    distance = math.sqrt(sum(float((plain(p) - s).square().sum()) for p, s in zip(parameters, start, strict=True)))
    # The tolerance of float32 sums of 10⁵ random products in test_sums.
    rounding = 1e-12 if dtype in DOUBLE else 2e-5
    assert values["displacement"] == pytest.approx(distance, rel=rounding)
    assert values["path_length"] == pytest.approx(path, rel=rounding)
    assert values["work_ito"] == pytest.approx(work, rel=rounding)


def test_a_parameter_with_gaps_in_memory_is_read_anew() -> None:
    weight = nn.Parameter(torch.zeros(10, 8)[:, :4])
    optimizer = SGD([weight], lr=1.0)
    meter = TrajectoryMeter(optimizer)
    for _ in range(3):
        weight.grad = -torch.ones(10, 4)
        optimizer.step()
    values = meter.compute()
    meter.close()
    assert values["displacement"] == pytest.approx(3 * math.sqrt(40), rel=1e-6)
    assert values["path_length"] == pytest.approx(3 * math.sqrt(40), rel=1e-6)


def test_of_no_coordinates_nothing_has_moved() -> None:
    """A process may hold none of a flat parameter."""
    empty = torch.zeros(0)
    coordinates = Coordinates([empty], [None], [None], [1.0])
    assert coordinates.holds(coordinates.vector(), [empty])
    assert coordinates.totals(coordinates.row(), [0], 1).tolist() == [0.0]
