"""How a meter walks through parameters: each coordinate once, in one order, and no more kept than said."""

import gc
import math
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import SGD, Adadelta, Adam, AdamW, Optimizer, RMSprop

from lightning_speedlimit.trajectory import TrajectoryMeter
from lightning_speedlimit.trajectory.layout import Scratch, Section, Tile, compute_dtype, tiles_of

CPU = torch.device("cpu")
SINGLE = [torch.float32, torch.bfloat16, torch.float16, torch.complex64]
DOUBLE = [torch.float64, torch.complex128]

shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
layouts = st.sampled_from(["contiguous", "transposed", "channels_last", "sliced"])


def parameter(shape: tuple[int, ...], layout: str, dtype: torch.dtype, seed: int) -> nn.Parameter:
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
    return nn.Parameter(values)


def reals(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def is_dense(tensor: Tensor) -> bool:
    model = reals(tensor)
    return 1 + sum((n - 1) * s for n, s in zip(model.shape, model.stride(), strict=True)) == model.numel()


def section_of(parameters: list[nn.Parameter], tile: int) -> Section:
    optimizer = SGD(parameters, lr=0.1)
    section = Section(optimizer, optimizer.param_groups[0], "", compute_dtype(parameters[0]), CPU)
    position = 0
    for index, p in enumerate(parameters):
        position += section.add(p, index, position, tile).numel
    section.allocate()
    return section


@st.composite
def sections(draw: st.DrawFn) -> tuple[Section, int]:
    dtypes = draw(st.sampled_from([SINGLE, DOUBLE]))
    tile = draw(st.sampled_from([32, 64, 96]))
    number = draw(st.integers(1, 7))
    parameters = [parameter(draw(shapes), draw(layouts), draw(st.sampled_from(dtypes)), seed) for seed in range(number)]
    parameters = [p for p in parameters if p.numel()]  # empty ones are left out before a section is made
    if not parameters:
        parameters = [parameter((), "contiguous", dtypes[0], 0)]
    return section_of(parameters, tile), tile


# ---- tiles ---------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(sections())
def test_tiles_cover_each_coordinate_once(drawn: tuple[Section, int]) -> None:
    section, tile = drawn
    assert section.numel == sum(reals(s.parameter).numel() for s in section.slots)
    tiles = tiles_of(section, tile, 5)
    assert [t.low for t in tiles] == [0, *(t.high for t in tiles[:-1])]
    assert tiles[-1].high == section.numel
    for t in tiles:
        assert 0 < t.high - t.low <= tile
        if t.parts:
            assert [p.low for p in t.parts] == [t.low, *(p.high for p in t.parts[:-1])]
            assert t.parts[-1].high == t.high
            assert [p.slots for p in t.parts] == [[s] for s in t.slots]
    columns = [part.column for t in tiles for part in (t, *t.parts)]
    assert sorted(columns) == list(range(5, 5 + len(columns)))


def in_order_of(p: Tensor, values: Tensor) -> list[float]:
    """`values` (of the shape of p, any strides) in p's memory order, or row by row where it has gaps."""
    model, values = reals(p), reals(values)
    if is_dense(p) and model.numel():
        order = sorted(range(model.dim()), key=lambda d: (-model.stride(d), -model.shape[d]))
        values = values.permute(order)
    return values.double().reshape(-1).tolist()


@settings(max_examples=150)
@given(sections(), st.booleans())
def test_tiles_read_parameters_and_gradients_in_one_order(drawn: tuple[Section, int], keep_strides: bool) -> None:
    section, tile = drawn
    scratch = Scratch(tile, section.dtype, CPU)
    gradients = []
    for slot in section.slots:
        gradient = torch.empty_like(slot.parameter) if keep_strides else torch.empty(slot.parameter.shape)
        gradients.append(gradient.to(slot.parameter.dtype).copy_(3 * slot.parameter.detach()))
    expected = [v for s in section.slots for v in in_order_of(s.parameter, s.parameter)]
    expected_gradient = [v for s, g in zip(section.slots, gradients, strict=True) for v in in_order_of(s.parameter, g)]

    def walk(tiles: list[Tile]) -> None:
        for t in tiles:
            mine = [gradients[s.index] for s in t.slots]
            assert t.parameters(scratch).double().tolist() == expected[t.low : t.high]
            assert t.gather(scratch, "gradient", mine, {}).double().tolist() == expected_gradient[t.low : t.high]
            walk(t.parts)

    tiles = tiles_of(section, tile, 0)
    walk(tiles)
    assert section.start.double().tolist() == expected
    section.held.zero_()
    for t in tiles:
        t.load("held", t.tensors, scratch)
    assert section.held.double().tolist() == expected


@settings(max_examples=150)
@given(shapes, layouts, st.sampled_from(SINGLE + DOUBLE))
def test_flat_and_back(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    p = parameter(shape, layout, dtype, 1)
    if p.numel() == 0:
        return
    slot = section_of([p], 32).slots[0]
    flat = slot.flat(p).clone()
    assert flat.shape == (slot.numel,)
    back = slot.unflatten(flat.to(torch.float64))
    assert (back.dtype, back.shape) == (p.dtype, p.shape)
    assert torch.equal(back, p.detach())
    if is_dense(p):
        assert back.stride() == p.stride()
    assert torch.equal(slot.flat(back), flat)


# ---- the same through the meter ------------------------------------------------------------------------

ODD = [
    ((), "contiguous"),
    ((0,), "contiguous"),
    ((3, 0, 2), "contiguous"),
    ((5, 7), "transposed"),
    ((4, 3, 3, 3), "channels_last"),
    ((6, 4), "sliced"),
    ((1, 1, 1, 1), "channels_last"),
    ((70_001, 2), "contiguous"),  # more than a tile
    ((2, 70_001), "transposed"),
    ((50, 30, 10, 10), "channels_last"),
]


@pytest.mark.parametrize("dtype", SINGLE + DOUBLE, ids=str)
@pytest.mark.parametrize("pattern", ["together", "in turn"])
def test_squares_and_works_of_odd_parameters(dtype: torch.dtype, pattern: str) -> None:
    parameters = [parameter(shape, layout, dtype, seed) for seed, (shape, layout) in enumerate(ODD)]
    optimizer = SGD(parameters, lr=0.5)
    meter = TrajectoryMeter(optimizer)
    start = [reals(p).double().clone() for p in parameters]
    path = work = 0.0
    generator = torch.Generator().manual_seed(9)
    for k in range(4):
        before = [reals(p).double().clone() for p in parameters]
        for i, p in enumerate(parameters):
            p.grad = None
            if pattern == "together" or (i + k) % 3:
                random = torch.randn(reals(p).shape, generator=generator, dtype=torch.float64)
                gradient = torch.view_as_complex(random) if p.is_complex() else random
                p.grad = torch.empty_like(p).copy_(gradient)
        optimizer.step()
        square = 0.0
        for p, b in zip(parameters, before, strict=True):
            update = reals(p).double() - b
            square += float(update.square().sum())
            if p.grad is not None:
                work -= float((reals(p.grad).double() * update).sum())
        path += math.sqrt(square)
    values = meter.compute()
    meter.close()
    displacement = math.sqrt(
        sum(float((reals(p).double() - s).square().sum()) for p, s in zip(parameters, start, strict=True))
    )
    # float32 dot products over tiles of 2¹⁷ random numbers: see test_sums; the weights are read as they are.
    rounding = 1e-12 if dtype in DOUBLE else 2e-5
    assert values["displacement"] == pytest.approx(displacement, rel=rounding)
    assert values["path_length"] == pytest.approx(path, rel=rounding)
    assert values["work_ito"] == pytest.approx(work, rel=rounding)


def test_a_parameter_with_gaps_in_memory_is_read_anew() -> None:
    # A flat view of it does not exist, so that a copy kept from the first step would never move again.
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


# ---- what is kept --------------------------------------------------------------------------------------

BIG = 1 << 20  # eight tiles: scratch buffers are small beside it


def gradients_after_a_step(parameters: list[nn.Parameter], meter: TrajectoryMeter, optimizer: Optimizer) -> list[Any]:
    """Weak references to the gradients and to their memory, once the training loop has let go of them."""
    for p in parameters:
        p.grad = torch.randn_like(p)
    found = [w for p in parameters for w in (weakref.ref(p.grad), StorageWeakRef(p.grad.untyped_storage()))]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return found


def gone(reference: Any) -> bool:
    return reference.expired() if isinstance(reference, StorageWeakRef) else reference() is None


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("every", [1, 3])
def test_gradients_are_not_kept(kind: type[Optimizer], every: int) -> None:
    parameters = [parameter(shape, layout, torch.float32, 0) for shape, layout in ODD if 0 not in shape]
    optimizer = kind(parameters, lr=0.01)
    meter = TrajectoryMeter(optimizer, measure_every_n_steps=every)
    for _ in range(4):
        references = gradients_after_a_step(parameters, meter, optimizer)
        gc.collect()
        assert all(map(gone, references))
    meter.close()


def test_a_kept_view_would_be_noticed() -> None:
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.ones(4)
    memory = StorageWeakRef(p.grad.untyped_storage())
    view = p.grad.detach().view(-1)
    p.grad = None
    gc.collect()
    assert not memory.expired()
    del view
    gc.collect()
    assert memory.expired()


def tensors_under(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors reachable through attributes and containers; optimizers are passed by."""
    if id(thing) in seen or isinstance(thing, Optimizer | type | str | int | float | bytes):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        for key, value in thing.items():
            yield from tensors_under(key, seen)
            yield from tensors_under(value, seen)
    elif isinstance(thing, list | tuple | set):
        for value in thing:
            yield from tensors_under(value, seen)
    elif hasattr(thing, "__dict__"):
        yield from tensors_under(vars(thing), seen)


def copies_kept(meter: TrajectoryMeter, optimizer: Optimizer, weight: nn.Parameter) -> float:
    """Memory that a meter keeps alive beside the training's own, in copies of the parameters."""
    own = {weight.untyped_storage().data_ptr()}
    own |= {
        value.untyped_storage().data_ptr()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    }
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_under(meter, set())}
    return sum(size for place, size in sizes.items() if place not in own) / weight.untyped_storage().nbytes()


MEMORY = [
    ("SGD", SGD, {}, {}, 2),
    ("SGD momentum", SGD, {"momentum": 0.9, "weight_decay": 0.1}, {}, 2),
    ("SGD response", SGD, {"momentum": 0.9}, {"momentum_mobility": "response"}, 2),
    ("SGD raw", SGD, {}, {"keep_raw_gradient": True}, 3),
    ("Adam", Adam, {}, {}, 3),
    ("Adam L2", Adam, {"weight_decay": 0.1}, {}, 3),
    ("AdamW", AdamW, {"weight_decay": 0.1}, {}, 4),
    ("AdamW without decay", AdamW, {"weight_decay": 0.0}, {}, 3),
    ("AdamW sampled", AdamW, {"weight_decay": 0.1}, {"measure_every_n_steps": 2}, 4),
    ("RMSprop", RMSprop, {}, {}, 3),
    ("RMSprop response", RMSprop, {"momentum": 0.9}, {"momentum_mobility": "response"}, 4),
    ("Adadelta", Adadelta, {}, {}, 4),
]


@pytest.mark.parametrize(
    ("kind", "options", "meter_options", "copies"), [m[1:] for m in MEMORY], ids=[m[0] for m in MEMORY]
)
def test_memory_in_copies_of_the_parameters(
    kind: type[Optimizer], options: dict[str, Any], meter_options: dict[str, Any], copies: int
) -> None:
    weight = nn.Parameter(torch.zeros(4 * BIG))
    optimizer = kind([weight], lr=0.01, **options)
    meter = TrajectoryMeter(optimizer, **meter_options)
    kept = []
    for _ in range(4):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        kept.append(copies_kept(meter, optimizer, weight))
    meter.compute()
    # On top: at most six scratch buffers of a tile, 1/32 of the parameters each.
    assert copies <= copies_kept(meter, optimizer, weight) < copies + 6.5 / 32
    assert copies <= kept[-1] < copies + 6.5 / 32
    # Over the first two steps a copy of θ is kept, to tell moves that repeat at every step.
    assert max(kept) < copies + 1 + 6.5 / 32
    meter.close()


def test_the_sketch_keeps_bits_only() -> None:
    weight = nn.Parameter(torch.zeros(4 * BIG))
    optimizer = SGD([weight], lr=0.01)
    meter = TrajectoryMeter(optimizer)
    for _ in range(3):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    before = copies_kept(meter, optimizer, weight)
    meter.sketch()
    # One bit for each float32.
    assert copies_kept(meter, optimizer, weight) - before == pytest.approx(1 / 32, rel=0.01)
    meter.close()
