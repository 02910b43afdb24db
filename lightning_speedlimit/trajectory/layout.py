"""Where a measurement keeps its copies of the parameters, and in which stretches it walks through them.

A *slot* is one parameter. A *section* is the slots of one optimizer, parameter group and layer that share a
device and a dtype: its sums are kept apart. Its copies (start, held, mobility, …) are flat tensors in which
the slots lie one after the other. A *tile* is what is worked on while it is in the cache: a stretch of one
large parameter, or several small parameters gathered into one scratch buffer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_speedlimit.trajectory import mobility
from lightning_speedlimit.trajectory.mobility import Formula
from lightning_speedlimit.trajectory.shards import is_distributed, local

_CPU_TILE = 1 << 17  # a handful of scratch buffers of 512 KiB stay in the cache
_DEVICE_TILE = 1 << 24  # few launches matter more there


def tile_size(device: torch.device) -> int:
    return _CPU_TILE if device.type == "cpu" else _DEVICE_TILE


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """At least float32: differences of half-precision weights are exact there."""
    double = parameter.dtype in (torch.float64, torch.complex128)
    return torch.float64 if double else torch.float32


Cuts = dict[int, tuple[Tensor, ...]]  # slot index → the stretches of one of its tensors


class Slot:
    """One parameter: its place in its section, and flat views of its tensors in its own memory order."""

    def __init__(self, parameter: Tensor, index: int, offset: int, position: int) -> None:
        self.parameter = parameter
        self.index = index  # in the optimizer's trace
        self.offset = offset  # in the section's flat tensors
        self.position = position  # in the whole run's parameter vector
        self.shape = real(self.local.detach()).shape  # here and below: of what this process holds of it
        self.numel = self.shape.numel()
        self.first: int | None = 0  # its first coordinate in the whole parameter; None: they lie scattered there
        self.cuts: list[int] = []
        self.version = parameter._version
        self.address = self.local.data_ptr()
        self.place = 0  # in its group's list of parameters
        self.response: float | None = None
        self.steps = 0  # that it took part in
        self._views: dict[str, tuple[int, tuple[Tensor, ...]]] = {}

    @property
    def local(self) -> Tensor:
        return local(self.parameter)

    def flat(self, tensor: Tensor) -> Tensor:
        """A 1-D view (a copy where there is none) in the parameter's memory order; sparse: summed and dense."""
        values, model = dense(tensor), real(self.local.detach())
        if model.is_contiguous():
            return values.reshape(-1)
        if values.stride() != model.stride():
            values = torch.empty_like(model, dtype=values.dtype).copy_(values)
        if sum((n - 1) * stride for n, stride in zip(model.shape, model.stride(), strict=True)) + 1 != self.numel:
            return values.reshape(-1)  # not dense: no memory order to follow
        return values.as_strided((self.numel,), (1,), values.storage_offset())

    def ordered(self, flat: Tensor) -> Tensor:
        """A copy of a flat tensor in the parameter's shape and order (complex: pairs of real numbers)."""
        model = real(self.local.detach())
        out = torch.empty_like(model, dtype=flat.dtype)
        if out.stride() != model.stride() or model.is_contiguous():
            return flat.reshape(self.shape).clone()
        out.as_strided((self.numel,), (1,)).copy_(flat)
        return out

    def unflatten(self, flat: Tensor) -> Tensor:
        """A flat copy of the parameter back in its shape, order and dtype."""
        values = self.ordered(flat)
        if self.parameter.is_complex():
            values = torch.view_as_complex(values)
        return values.to(self.parameter.dtype)

    @property
    def alone(self) -> bool:
        """Never gathered with others: its memory order is not the one that gathering writes."""
        return not self.local.is_contiguous()

    def pieces(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The flat tensor cut into the slot's stretches."""
        return tuple(torch.split(self.flat(tensor), self.cuts))

    def kept_pieces(self, name: str, tensor: Tensor) -> tuple[Tensor, ...]:
        """`pieces` of a tensor that stays where it is from step to step (never of gradients: views keep them)."""
        address = tensor.data_ptr()
        known = self._views.get(name)
        if known is None or known[0] != address:
            known = address, self.pieces(tensor)
            if known[1][0].data_ptr() == address:  # a view, not a copy
                self._views[name] = known
        return known[1]


def real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


@dataclass
class Section:
    """Slots whose sums are kept together, and their flat tensors, each of `numel` elements.

    start: θ at the start of the measurement.
    share: 1 over the number of processes that hold the same coordinates.
    held: θ_k before and during a step; u_k (without decoupled decay) after it, until the next gradient has met it.
    mobility: m_i where it differs between coordinates.
    travelled: Σ u without decoupled decay, where there is one (where steps are sampled: Σ lr w θ_k).
    raw: the gradient before it was changed.
    before: an entry of the optimizer's state as it was before the step.
    response: B_k. guard: θ as the last step left it.
    """

    optimizer: Optimizer
    group: dict[str, Any]
    layer: str
    dtype: torch.dtype
    device: torch.device
    index: int = 0  # of the group among the optimizer's
    share: float = 1.0
    formula: Formula | None = None
    coupled: float = 0.0
    decoupled: float = 0.0
    slots: list[Slot] = field(default_factory=list)
    numel: int = 0
    effective: bool = False
    start: Tensor = field(default_factory=lambda: torch.empty(0))
    held: Tensor = field(default_factory=lambda: torch.empty(0))
    mobility: Tensor | None = None
    travelled: Tensor | None = None
    raw: Tensor | None = None
    before: Tensor | None = None
    response: Tensor | None = None
    guard: Tensor | None = None

    def __post_init__(self) -> None:
        self.formula = mobility.formula(self.optimizer, self.group)
        self._coordinates = self.formula.coordinates(self.group) if self.formula else ()
        self.read_decay()

    def read_decay(self) -> None:
        """The weight decay w of the coming step: inside the gradient, decoupled from it."""
        self.coupled, self.decoupled = mobility.weight_decay(self.optimizer, self.group)

    @property
    def coordinates(self) -> tuple[str, ...]:
        """The optimizer's state entries that its formula reads per coordinate."""
        return self._coordinates

    @property
    def diagonal(self) -> bool:
        return not self.effective and bool(self._coordinates)

    @property
    def scalar(self) -> bool:
        """Its coordinates share one μ per parameter."""
        return self.formula is not None and not self.effective and not self._coordinates

    def add(self, parameter: Tensor, index: int, position: int, tile: int) -> Slot:
        slot = Slot(parameter, index, self.numel, position)
        whole, rest = divmod(slot.numel, tile)
        slot.cuts = [tile] * whole + ([rest] if rest or not whole else [])
        self.slots.append(slot)
        self.numel += slot.numel
        return slot

    def empty(self) -> Tensor:
        return torch.empty(self.numel, dtype=self.dtype, device=self.device)

    def zeros(self) -> Tensor:
        return torch.zeros(self.numel, dtype=self.dtype, device=self.device)

    def allocate(self) -> None:
        """Buffers, and θ_0 in `start`; called once, when the slots are complete."""
        self.start = self.snapshot()
        self.held = self.zeros()
        if self.diagonal:
            self.mobility = self.zeros()
        if self.formula is not None and self.formula.before is not None:
            self.before = self.zeros()

    def theta(self, slot: Slot) -> Tensor:
        """θ of one slot now, flat, in the section's dtype."""
        return slot.flat(slot.parameter).to(self.dtype)

    def snapshot(self) -> Tensor:
        """θ now, flat."""
        copy = self.empty()
        for slot in self.slots:
            copy[slot.offset : slot.offset + slot.numel].copy_(slot.flat(slot.parameter))
        return copy


class Scratch:
    """Buffers of one tile, allocated once and used by name; as long as the longest tile so far."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.size, self.dtype, self.device = size, dtype, device
        self._buffers: dict[str, Tensor] = {}

    def fit(self, size: int) -> None:
        if size > self.size:
            self.size = size
            self._buffers.clear()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._buffers:
            self._buffers[name] = torch.empty(self.size, dtype=self.dtype, device=self.device)
        return self._buffers[name]


class Tile:
    """[low, high) of a section's flat tensors: a stretch of one slot, or several whole slots."""

    def __init__(self, section: Section, slots: list[Slot], low: int, high: int, piece: int | None, column: int):
        self.section, self.slots, self.low, self.high, self.piece = section, slots, low, high, piece
        self.column = column  # in the bank's matrices of sums
        self._tensors: list[Tensor] = [slot.parameter for slot in slots]
        self._sharded = any(map(is_distributed, self._tensors))
        self.parts: list[Tile] = []  # one tile per slot, for steps in which the slots differ
        self._slot_views: dict[str, tuple[int, list[Tensor]]] = {}
        self._flat_views: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def tensors(self) -> list[Tensor]:
        """The slots' parameters: of each what this process holds."""
        return [local(t) for t in self._tensors] if self._sharded else self._tensors

    def own(self, name: str) -> Tensor:
        """The tile's stretch of a flat tensor of the section."""
        flat: Tensor = getattr(self.section, name)
        known = self._flat_views.get(name)
        if known is None or known[0] is not flat:
            known = flat, flat[self.low : self.high]
            self._flat_views[name] = known
        return known[1]

    def forget(self, name: str) -> None:
        """Keep no view of a flat tensor that the section has dropped."""
        self._flat_views.pop(name, None)
        self._slot_views.pop(name, None)
        for part in self.parts:
            part.forget(name)

    def work(self, scratch: Scratch, name: str) -> Tensor:
        return scratch[name][: self.high - self.low]

    def parameters(self, scratch: Scratch) -> Tensor:
        """θ of the tile, 1-D."""
        if self.piece is None:
            return self.gather(scratch, "parameter", self.tensors)
        found = self.slots[0].kept_pieces("parameter", self.tensors[0])[self.piece]
        return found if found.dtype == scratch.dtype else self.work(scratch, "parameter").copy_(found)

    def gather(self, scratch: Scratch, name: str, tensors: list[Tensor], cuts: Cuts | None = None) -> Tensor:
        """One 1-D tensor in the section's dtype: a view where the tile is a stretch of one slot of that dtype.

        Args:
            tensors: one per slot.
            cuts: where the stretches of tensors that live for one step are remembered (gradients: a view kept
                longer would keep their memory). None: the tensors stay where they are from step to step.
        """
        if self.piece is None:
            out = self.work(scratch, name)
            torch._foreach_copy_(self._views(name, out), [dense(t) for t in tensors])
            return out
        slot = self.slots[0]
        if cuts is None:
            pieces = slot.kept_pieces(name, tensors[0])
        else:
            if slot.index not in cuts:
                cuts[slot.index] = slot.pieces(tensors[0])
            pieces = cuts[slot.index]
        found = pieces[self.piece]
        return found if found.dtype == scratch.dtype else self.work(scratch, name).copy_(found)

    def load(self, name: str, tensors: list[Tensor], scratch: Scratch) -> None:
        """Copy the slots' tensors into the section's flat tensor."""
        if self.piece is None:
            own = self.own(name)
            torch._foreach_copy_(self._views(name, own), [dense(t) for t in tensors])
        else:
            self.own(name).copy_(self.gather(scratch, "parameter", tensors))

    def _views(self, name: str, out: Tensor) -> list[Tensor]:
        known = self._slot_views.get(name)
        if known is None or known[0] != out.data_ptr():
            cut = torch.split(out, [s.numel for s in self.slots])
            known = (
                out.data_ptr(),
                [view.view(slot.shape) for view, slot in zip(cut, self.slots, strict=True)],
            )
            self._slot_views[name] = known
        return known[1]


def dense(tensor: Tensor) -> Tensor:
    """Detached, strided (sparse gradients are coalesced: their raw values count duplicates apart), real."""
    tensor = local(tensor).detach()
    if tensor.layout != torch.strided:
        tensor = tensor.coalesce().to_dense() if tensor.layout == torch.sparse_coo else tensor.to_dense()
    return real(tensor)


def tiles_of(section: Section, size: int, column: int) -> list[Tile]:
    """Cut a section into tiles, with consecutive `column` numbers for the tiles and their parts."""
    tiles: list[Tile] = []
    pack: list[Slot] = []

    def numbered(slots: list[Slot], low: int, high: int, piece: int | None) -> Tile:
        nonlocal column
        tile = Tile(section, slots, low, high, piece, column)
        column += 1
        return tile

    def close() -> None:
        if not pack:
            return
        low, high = pack[0].offset, pack[-1].offset + pack[-1].numel
        tile = numbered(list(pack), low, high, None if len(pack) > 1 else 0)
        if len(pack) > 1:
            tile.parts = [numbered([s], s.offset, s.offset + s.numel, 0) for s in pack]
        tiles.append(tile)
        pack.clear()

    for slot in section.slots:
        if pack and slot.offset + slot.numel - pack[0].offset > size:
            close()
        if slot.numel <= size and not slot.alone:
            pack.append(slot)
            continue
        close()
        low = slot.offset
        for piece, length in enumerate(slot.cuts):
            tiles.append(numbered([slot], low, low + length, piece))
            low += length
    close()
    return tiles


def dot(a: Tensor, b: Tensor, scratch: Scratch, out: Tensor) -> None:
    """Σ a_i b_i of a tile into a matrix of sums.

    `torch.dot` adds in a few running sums: over 131,072 equal float32 terms it is off by 5e-5 (median over random
    terms). `sum` adds in pairs: 1e-7, for twice the time in the cache.
    """
    if a.device.type != "cpu" or a.dtype == torch.float64:
        torch.dot(a, b, out=out)
        return
    product = scratch["product"][: a.numel()]
    torch.mul(a, b, out=product)
    torch.sum(product, 0, out=out)


def state_entry(section: Section, slot: Slot, name: str) -> Tensor | None:
    """An optimizer's state tensor of one parameter; None before its first step."""
    state: Mapping[str, Any] = section.optimizer.state.get(slot.parameter, {})
    entry = state.get(name, slot.local if slot.numel == 0 else None)
    return entry if isinstance(entry, Tensor) else None


def stretch(tile: Tile, scratch: Scratch, custom: Mapping[int, tuple[Tensor, Cuts]]) -> dict[str, Tensor]:
    """The state entries that the section's formula reads, cut to the tile."""
    section = tile.section
    assert section.formula is not None
    found: dict[str, Tensor] = {}
    for name in section.coordinates:
        if name == mobility.CUSTOM:
            values, cuts = [custom[slot.index][0] for slot in tile.slots], custom[tile.slots[0].index][1]
            found[name] = tile.gather(scratch, name, values, cuts)
        elif name == section.formula.before:
            found[name] = tile.own("before")
        else:
            entries = [state_entry(section, slot, name) for slot in tile.slots]
            found[name] = tile.gather(scratch, name, [e for e in entries if e is not None])
    if section.response is not None:
        found[mobility.RESPONSE] = tile.own("response")
    return found
