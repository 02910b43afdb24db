"""State functions of one optimizer's parameters: D², the mobility-weighted D² and the sketch, on log steps only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_speedlimit.trajectory.layout import Section, Slot
from lightning_speedlimit.trajectory.sketch import BUCKETS, Signs, Stretches, piece_size, pieces_of_shard
from lightning_speedlimit.trajectory.sums import sum_dtype


@dataclass(frozen=True)
class Survey:
    """Per slot, on the section's device: displacement ‖Δθ‖², free ‖Δθ without decoupled decay‖², weighted Σ(·)²/m."""

    displacement: Tensor
    free: Tensor
    weighted: Tensor
    sketch: Tensor | None


def survey(section: Section, factor: float, signs: dict[int, Signs] | None, sampled: bool) -> Survey:
    """Walk once through θ, θ_0, m and Σu of a section.

    Args:
        factor: steps over measured steps: what sums over measured steps are multiplied by.
        signs: cache of the sketch's signs by slot position; None: no sketch.
        sampled: `travelled` holds the decay's sum over the measured steps, not Σu.
    """
    total = sum_dtype(section.device)
    buckets = None if signs is None else torch.zeros(BUCKETS, dtype=total, device=section.device)
    rows = [_slot(section, slot, factor, signs, buckets, sampled) for slot in section.slots]
    displacement, free, weighted = (torch.stack([row[i] for row in rows]).to(total) for i in range(3))
    return Survey(displacement, free, weighted, buckets)


def _square(values: Tensor) -> Tensor:
    """Σ x²; `sum` adds in pairs, which a dot product does not."""
    return (values * values).sum(dtype=sum_dtype(values.device))


def _slot(
    section: Section,
    slot: Slot,
    factor: float,
    signs: dict[int, Signs] | None,
    buckets: Tensor | None,
    sampled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    size = piece_size(section.device)
    parameter = slot.flat(slot.parameter)
    zero = torch.zeros((), dtype=sum_dtype(section.device), device=section.device)
    displacement, free, weighted = zero, zero, zero
    first = slot.first or 0
    whole = slot.parameter.numel() * (2 if slot.parameter.is_complex() else 1)
    stretches = None if buckets is None or slot.first is None else Stretches(whole, section.device)
    for low, high, start in pieces_of_shard(first, slot.numel, size):
        here = slice(slot.offset + low, slot.offset + high)
        moved = parameter[low:high].to(section.dtype) - section.start[here]
        displacement = displacement + _square(moved)
        if stretches is not None and signs is not None:
            if slot.position not in signs:
                part = start, first + slot.numel
                signs[slot.position] = Signs(whole, slot.position, section.device, part)
            before = first + low - start  # coordinates of the stretch that another process holds
            aligned = moved if before == 0 else torch.cat([moved.new_zeros(before), moved])
            stretches.add(signs[slot.position].apply(aligned, start), start)
        if section.travelled is not None:
            moved = moved + factor * section.travelled[here] if sampled else section.travelled[here]
        free = free + _square(moved)
        if section.mobility is not None:
            mobility = section.mobility[here] * factor
            share = torch.where(mobility != 0, moved * moved / mobility, torch.zeros_like(moved))
            weighted = weighted + share.sum(dtype=zero.dtype)
    if stretches is not None and buckets is not None:
        stretches.add_to(buckets, slot.position)
    return displacement, free, weighted
