"""From what a reading has brought to the host to the totals of the run."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lightning_speedlimit.trajectory import losses
from lightning_speedlimit.trajectory.clipping import UNTOLD, Verdict, verdict
from lightning_speedlimit.trajectory.follower import Follower
from lightning_speedlimit.trajectory.joint import JointSteps
from lightning_speedlimit.trajectory.mobility import UNKNOWN
from lightning_speedlimit.trajectory.run_totals import COLUMNS, NAMES, Numbers, RunTotals, SectionTotals, directions
from lightning_speedlimit.trajectory.stepwise import Stepwise
from lightning_speedlimit.trajectory.totals import Part, Section, kind

_BOTH_WAYS = (
    "some parameter groups descend the loss and others climb it (maximize=True): its difference is no entropy "
    'production; entropy_production="ito" counts the work of each, or measure them with a meter for each'
)
_DISAGREED = (
    "the processes have not taken the same steps, or not each of them has a loss for each (numbers of batches that "
    "differ?): there is no mean over them"
)
# What counts c times where gradients were scaled by c and not clipped; and sums whose sign is that of −f.
_SCALED = ("work_ito", "work_met", "work_anti_ito", "waiting", "work_action", "work_decay", "weighted")


def assembled(
    parts: list[Part], host: dict[str, Tensor], joint: JointSteps, stepwise: Stepwise, windows: losses.LossWindows,
    followers: list[Follower], *, agreed: bool, per_rate: bool, processes: int, coordinates: tuple[float, float],
) -> RunTotals:  # fmt: skip
    """Args:
    agreed: all processes know the same. processes: that hold shards; 0: this one has all. coordinates: that are
        measured, and that are there.
    """
    factor = joint.factor
    sections, errors, untold = _sections(parts, host, uneven=stepwise.uneven)
    loss, no_loss = _loss_drop(host, windows, joint.steps, followers, agreed=agreed)
    skipped = host["skipped"].tolist() if "skipped" in host else [0.0, 0.0]
    elapsed, squares = (
        known + on_device
        for known, on_device in zip(
            (joint.elapsed, joint.rate_squares), host.get("rate_sum", torch.zeros(2)).tolist(), strict=True
        )
    )
    steps = joint.steps - skipped[0]
    alike = elapsed * elapsed / squares / joint.steps if squares > 0.0 else 1.0
    if per_rate:
        elapsed = math.nan if joint.several_rates else elapsed - skipped[1]
    norms = host.get("whole gradients", host.get("gradients", torch.full((2,), math.nan))).sqrt().tolist()
    moved = [host[f"moves {part.key}"].tolist() for part in parts]
    moves = max((count for count, _, _ in moved), default=0.0)
    if processes:
        moves = math.ceil(moves / processes)  # each process has counted its own
        _shorten(errors, sections, factor * stepwise.path_length)
    measured, there = coordinates
    return RunTotals(
        sections=sections,
        steps=steps,
        measured=joint.measured,
        lasting=steps * alike if math.isfinite(alike) else steps,
        elapsed=elapsed if per_rate else steps,
        loss=loss,
        no_loss=no_loss,
        gradient_norm=norms[0],
        clipped_norm=norms[1],
        whole_norm="whole gradients" in host,
        step_norm=math.sqrt(float(host["squared"])) if "squared" in host else math.nan,
        learning_rate=float(host["rate"]) if "rate" in host else float(joint.rate),
        path_length=factor * stepwise.path_length if processes else None,
        layer_paths=dict(zip(joint.layers, (factor * host["paths"]).tolist(), strict=False)) if "paths" in host else {},
        overlaps=any(part.table.motion.overlap is not None for part in parts),
        per_rate=per_rate,
        coordinates=measured,
        moves=moves,
        moved=math.sqrt(sum(squared for _, squared, _ in moved)),
        unkept=any(unkept > 0 for _, _, unkept in moved),
        untold=UNTOLD if untold else "",
        unforced=any(float(host[name]) > 0 for name in host if name.startswith("unforced")),
        single=any(part.table.motion.coordinates.dtype == torch.float32 for part in parts),
        no_formula=_without_formula(parts),
        errors=(*errors, *stepwise.errors(sections, joint)),
        sampled=measured < there or joint.every > 1,
        unspread=joint.every > 1 and stepwise.sampled < 2,
        no_path=stepwise.no_path,
    )


def _sections(
    parts: list[Part], host: dict[str, Tensor], *, uneven: bool
) -> tuple[list[SectionTotals], list[dict[str, Numbers]], bool]:
    """The sections, the errors of what was drawn, and whether works can't be told."""
    found: list[SectionTotals] = []
    errors: list[dict[str, Numbers]] = []
    untold = False
    for part in parts:
        stats = host.get(f"changes {part.follower_key}")
        told = verdict(part.changes, None if stats is None else stats.tolist())
        told = told._replace(effective=True) if uneven else told
        untold |= math.isnan(told.factor)
        own = [_section(part, section, told) for section in part.table.sections]
        sums = _named(host[f"values {part.key}"], told)
        found += [
            replace(s, sums=dict(zip(NAMES, row.tolist(), strict=True))) for s, row in zip(own, sums, strict=True)
        ]
        indices = [section.group for section in part.table.sections]
        for index in part.table.covariances:
            changes = _named(directions(host[f"covariance {part.key} {index}"]), told)
            errors.append({own[indices.index(index)].group: changes})
    return found, errors, untold


def _section(part: Part, section: Section, told: Verdict) -> SectionTotals:
    """Its sums are still to come."""
    motion = part.table.motion
    runs = [r for r in motion.runs.current(motion.missing) if r.index == section.group]
    run = next((r for r in runs if not motion.members[r.members.start].gone), runs[0])
    own = "effective" if told.effective else kind(motion, section)
    inertia = UNKNOWN if run.formula is None or own == "effective" else run.formula.inertia(run.group)
    return SectionTotals(section.layer, f"{part.key} {section.group} {own}", own, {}, inertia)


def _named(columns: Tensor, told: Verdict) -> Numbers:
    """(…, COLUMNS) → (…, NAMES): works as often as they count, and work_ito with what waits for its next gradient."""
    ito = columns[:, COLUMNS.index("work_met")] + columns[:, COLUMNS.index("waiting")]
    found = torch.cat([columns, ito[:, None]], 1).numpy()
    found[:, [NAMES.index(name) for name in _SCALED]] *= told.factor
    return found


def _without_formula(parts: list[Part]) -> tuple[str, ...]:
    names = {
        part.optimizer
        for part in parts
        for section in part.table.sections
        if kind(part.table.motion, section) == "effective"
    }
    return tuple(sorted(names))


def _shorten(errors: list[dict[str, Numbers]], sections: list[SectionTotals], path_length: float) -> None:
    """Each process knows the errors of Σ ‖u of its part‖. What they do to Σ ‖u‖ is less, by the ratio of these."""
    own = sum(section.sums["path_length"] for section in sections)
    for error in errors:
        for changes in error.values():
            changes[:, NAMES.index("path_length")] *= path_length / own if own else 0.0


def _signs_of_loss(followers: list[Follower]) -> set[float]:
    """−1 where the loss is maximized: of the groups that are measured, of all before the first is."""
    groups = [run.group for f in followers for m in f.motions for run in m.runs.current(m.missing)]
    groups = groups or [g for f in followers for g in f.optimizer.param_groups]
    return {-1.0 if g.get("maximize", False) else 1.0 for g in groups} or {1.0}


def _loss_drop(
    host: dict[str, Tensor], windows: losses.LossWindows, steps: int, followers: list[Follower], *, agreed: bool
) -> tuple[losses.LossDrop | None, str]:
    """L_0 − L_K, of the probe where there is one, and why there is none."""
    signs = _signs_of_loss(followers)
    if not agreed or len(signs) != 1:
        return None, _DISAGREED if not agreed else _BOTH_WAYS
    if "probe" in host:
        found = losses.paired_drop(host["probe"])
    elif "losses" in host:
        found = losses.drop(*windows.windows(host["losses"]), steps)
    else:
        return None, ""
    return replace(found, value=signs.pop() * found.value), ""
