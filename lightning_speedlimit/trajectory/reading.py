"""What a reading brings to the host: one collective where there are several processes, one copy, and the totals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_speedlimit.trajectory import losses
from lightning_speedlimit.trajectory.clipping import UNTOLD, Verdict, verdict
from lightning_speedlimit.trajectory.estimates import Error, RunTotals, SectionTotals
from lightning_speedlimit.trajectory.follower import Follower, total
from lightning_speedlimit.trajectory.joint import JointSteps
from lightning_speedlimit.trajectory.mail import Mail
from lightning_speedlimit.trajectory.motion import SUMS, Motion
from lightning_speedlimit.trajectory.ranks import MOST, Ranks, Share, lengths_and_unevenness
from lightning_speedlimit.trajectory.sketch import BUCKETS, Sketch
from lightning_speedlimit.trajectory.totals import COLUMNS, Table, kind

_BOTH_WAYS = (
    "some parameter groups descend the loss and others climb it (maximize=True): its difference is no entropy "
    'production; entropy_production="ito" counts the work of each, or measure them with a meter for each'
)
_DISAGREED = (
    "the processes have not taken the same steps, or not each of them has a loss for each (numbers of batches that "
    "differ?): there is no mean over them"
)
NOT_ALIKE = (
    "the processes do not hold the same parameters, or have not taken the same steps: their shards do not add up"
)
NO_SKETCH = (
    "no sketch: a shard's coordinates lie scattered in the whole parameter (tensor parallel by columns, or FSDP's flat "
    "parameters)"
)
# What counts c times where gradients were scaled by c and not clipped; and sums whose sign is that of −f.
_SCALED = ("work_ito", "work_met", "work_anti_ito", "waiting", "noise", "work_action", "weighted")
_NEGATIVE = ("work_met", "work_anti_ito", "l2_drop")


@dataclass(frozen=True)
class Part:
    """One motion's table, and its key in the mail."""

    key: str
    follower: Follower
    table: Table


class Reader:
    """Reads what followers have measured.

    Args:
        ranks: the processes that train together. sharded: each holds a part of the parameters.
    """

    def __init__(self, followers: list[Follower], ranks: Ranks | None, *, sharded: bool) -> None:
        self.followers, self.ranks, self.sharded = followers, ranks, sharded
        self.path_length = 0.0  # of shards: Σ ‖u‖ of the whole up to the last reading
        self.no_path = ""  # why that is unknown
        self.uneven = False
        self.spread: Tensor | None = None  # Σ (x_j − x_{j−1})(x_j − x_{j−1})ᵀ of the sampled steps' sums
        self.sampled = 0
        self.mean_mobility = 0.0
        self.last: list[Tensor] = []
        self.coordinates: tuple[float, float] | None = None  # measured and there; of shards: of all processes
        self._sketches: dict[int, Sketch] = {}

    def factor(self, joint: JointSteps) -> float:
        """Steps over measured steps: what sums over measured steps are multiplied by. NaN before the first."""
        if joint.steps == 0:
            return 1.0
        return joint.steps / joint.measured if joint.measured else math.nan

    @property
    def scattered(self) -> bool:
        return any(member.first is None for f in self.followers for m in f.motions for member in m.members)

    def numbers(self) -> list[float]:
        """Coordinates that are measured, and that there are; what several processes hold alike counts once in all."""
        measured = there = 0.0
        for coordinates in (motion.coordinates for follower in self.followers for motion in follower.motions):
            for shape, share, own in zip(coordinates.shapes, coordinates.shares, coordinates.numbers, strict=True):
                measured, there = measured + share * own, there + share * shape.numel()
        return [measured, there]

    # -- to the host -----------------------------------------------------------------------------------------

    def collect(self, joint: JointSteps, *, sketch: bool) -> tuple[Mail, list[Part]]:
        """All that the motions and joint steps have to tell."""
        mail, parts = Mail(), list[Part]()
        share: Share = "sum" if self.sharded else "own"
        sketches = self._sketches if sketch and not self.scattered else None
        for f, follower in enumerate(self.followers):
            for m, motion in enumerate(follower.motions):
                if sketches is not None and id(motion) not in sketches:
                    sketches[id(motion)] = _sketch_of(motion)
                table = Table(motion, self.factor(joint), None if sketches is None else sketches[id(motion)])
                if self.sharded:  # a process may hold small parameters alone, and draw nothing of them
                    none = motion.coordinates.weights.new_zeros(len(COLUMNS), len(COLUMNS))
                    table.covariances = {group: none for group, _ in motion.groups()} | table.covariances
                parts.append(Part(f"{f} {m}", follower, table))
            if follower.changes.stats is not None:
                mail.put(f"changes {f}", follower.changes.stats, share)
            if follower.unforced is not None:
                mail.put(f"unforced {f}", follower.unforced, share)
        for part in parts:
            _put(mail, part, share)
        if self.sharded:
            mail.put("coordinates", torch.tensor(self.numbers(), dtype=torch.float64), "sum")
        self._put_sketch(mail, parts, share)
        self._put_norms(mail, joint, share)
        for name in ("skipped", "rate_sum"):
            if (total := getattr(joint, name)) is not None:
                mail.put_sum(name, total)
        for name in ("rows", "samples"):
            rows = getattr(joint, name)
            if rows is not None and rows.rows is not None:
                mail.put(name, rows.rows, share)
        if isinstance(joint.rate, Tensor):
            mail.put("rate", joint.rate)
        return mail, parts

    def _put_sketch(self, mail: Mail, parts: list[Part], share: Share) -> None:
        found = [Sketch.signed(part.table.sketch) for part in parts if part.table.sketch is not None]
        if found:
            mail.put("sketch", torch.stack([b.to(found[0].device) for b in found]).sum(0), share)

    def _put_norms(self, mail: Mail, joint: JointSteps, share: Share) -> None:
        took_part = [f for f in self.followers if f.took_part and f.motions]
        if took_part:
            mail.put("gradients", total([n for f in took_part if (n := f.norms()) is not None]), share)
        drawn = any(m.coordinates.rest is not None for f in took_part for m in f.motions)
        if drawn and not self.sharded:
            whole = [n for f in took_part if (n := f.norms_of_all()) is not None]
            if len(whole) == len(took_part):
                mail.put("whole gradients", total(whole))
        if joint.squared is not None:
            mail.put("squared", joint.squared, share)

    def room(self, joint: JointSteps, numbers: int, *, sketch: bool) -> int:
        """No process has more numbers to tell; from what one that has failed knows, too."""
        if not self.sharded:
            return 3 + numbers
        parameters = sum(len(group["params"]) for f in self.followers for group in f.optimizer.param_groups)
        each = len(COLUMNS) ** 2 + len(COLUMNS) + 2
        steps = (len(SUMS) + 4) * min(MOST, joint.steps - joint.read_at)
        return 3 + numbers + each * parameters + 5 + 7 * len(self.followers) + steps + (BUCKETS if sketch else 0)

    # -- totals ----------------------------------------------------------------------------------------------

    def fold(self, host: dict[str, Tensor], joint: JointSteps) -> None:
        """Take in what was kept step by step, and what is no sum over shards."""
        joint.read_at = joint.steps
        samples = host.get("samples")
        if joint.rows is not None:
            if "rows" in host:
                lengths, uneven = lengths_and_unevenness(host["rows"])
                if samples is not None:  # what the sums of each process say is the path of its own part
                    samples[:, SUMS.index("path_length")] = self.path_length + lengths.cumsum(0) - lengths
                self.path_length, self.uneven = self.path_length + float(lengths.sum()), self.uneven or uneven
            if joint.rows.full:
                self.path_length = math.nan
                self.no_path = f"more than {MOST} steps were taken between two readings of shards: read more often"
            joint.rows.clear()
        if joint.samples is not None and samples is not None:
            self._fold_samples(list(samples.unbind()))
            if joint.samples.full:  # the next one is no neighbour
                self.last = []
            joint.samples.clear()

    def _fold_samples(self, rows: list[Tensor]) -> None:
        """rows: the sums before each measured step; differences are what the step before them added."""
        for row in rows:
            self.last.append(row)
            if len(self.last) < 2:
                continue
            step = _step(self.last[-2], self.last[-1])
            self.sampled, self.mean_mobility = self.sampled + 1, self.mean_mobility + float(step[-1])
            if len(self.last) == 3:
                apart = step - _step(self.last[0], self.last[1])
                outer = torch.outer(apart, apart)
                self.spread = outer if self.spread is None else self.spread + outer
                self.last.pop(0)

    def totals(
        self, parts: list[Part], host: dict[str, Tensor], joint: JointSteps, *, per_rate: bool,
        loss: losses.LossDrop | None, no_loss: str,
    ) -> RunTotals:  # fmt: skip
        factor = self.factor(joint)
        sections, errors, untold = self._sections(parts, host)
        skipped = (host["skipped"] * factor).tolist() if "skipped" in host else [0.0, 0.0]
        elapsed = joint.elapsed + float(host.get("rate_sum", torch.zeros(1)).sum())
        steps = joint.steps - skipped[0]
        if per_rate:
            elapsed = math.nan if joint.several_rates else elapsed - skipped[1]
        norms = host.get("whole gradients", host.get("gradients", torch.full((2,), math.nan))).sqrt().tolist()
        moved = [host[f"moves {part.key}"].tolist() for part in parts]
        moves = max((count for count, _ in moved), default=0.0)
        if self.sharded and self.ranks is not None:
            moves = math.ceil(moves / self.ranks.size)  # each process has counted its own
            errors = _of_whole_path(errors, sections, factor * self.path_length)
        errors += self._sampling_errors(sections, joint)
        here = host["coordinates"].tolist() if "coordinates" in host else self.numbers()
        self.coordinates = measured, there = here[0], here[1]
        return RunTotals(
            sections=sections,
            steps=steps,
            measured=joint.measured,
            elapsed=elapsed if per_rate else steps,
            loss=loss,
            no_loss=no_loss,
            gradient_norm=norms[0],
            clipped_norm=norms[1],
            whole_norm="whole gradients" in host,
            step_norm=math.sqrt(float(host["squared"])) if "squared" in host else math.nan,
            learning_rate=float(host["rate"]) if "rate" in host else float(joint.rate),
            path_length=factor * self.path_length if self.sharded else None,
            per_rate=per_rate,
            coordinates=measured,
            moves=moves,
            moved=math.sqrt(sum(squared for _, squared in moved)),
            untold=UNTOLD if untold else "",
            unforced=any(float(host[name]) > 0 for name in host if name.startswith("unforced")),
            single=any(part.table.motion.coordinates.dtype == torch.float32 for part in parts),
            no_formula=_without_formula(parts),
            errors=tuple(errors),
            sampled=measured < there or joint.every > 1,
            unspread=joint.every > 1 and self.sampled < 2,
            no_path=self.no_path,
        )

    def _sections(self, parts: list[Part], host: dict[str, Tensor]) -> tuple[list[SectionTotals], list[Error], bool]:
        """The sections, the errors of what was drawn, and whether works can't be told."""
        found: list[SectionTotals] = []
        errors: list[Error] = []
        untold = False
        for part in parts:
            follower = part.follower
            stats = host.get(f"changes {self.followers.index(follower)}")
            told = verdict(follower.changes, None if stats is None else stats.tolist())
            told = told._replace(effective=True) if self.uneven else told
            untold |= math.isnan(told.factor)
            places: dict[int, int] = {}
            for i, section in enumerate(part.table.sections):
                places.setdefault(section.group, len(found))
                found.append(_section(part, i, host, told))
            for group in part.table.covariances:
                columns = directions(host[f"covariance {part.key} {group}"])
                errors += [Error({places[group]: _named(column, told)}) for column in columns]
        return found, errors, untold

    def _sampling_errors(self, sections: list[SectionTotals], joint: JointSteps) -> list[Error]:
        """K/J √(½ Σ (x_j − x_{j−1})² J/(J−1)): differences of neighbours, so that a trend is not taken for noise."""
        if joint.every == 1 or self.spread is None or self.sampled < 2 or not sections:
            return []
        count = self.sampled
        covariance = (joint.steps / count) ** 2 * 0.5 * self.spread * count / (count - 1)
        squares = sum(s.sums["squares"] for s in sections) or 1.0
        mobility = joint.steps / count * self.mean_mobility
        errors = []
        for column in directions(covariance):
            *changes, of_mobility = column.tolist()
            named = dict(zip(SUMS, changes, strict=True))
            named |= {name: -named[name] for name in _NEGATIVE}
            named["work_ito"] = named["work_met"]
            relative = of_mobility / mobility if mobility else 0.0
            shares = {i: s.sums["squares"] / squares for i, s in enumerate(sections)}
            own = {i: {n: share * v for n, v in named.items()} for i, share in shares.items()}
            for i, section in enumerate(sections):
                own[i]["weighted"] = -relative * section.sums["weighted"]
            errors.append(Error(own))
        return errors


def _put(mail: Mail, part: Part, share: Share) -> None:
    table, motion = part.table, part.table.motion
    mail.put(f"values {part.key}", table.values, share)
    mail.put_sum(f"moves {part.key}", motion.moves, share)
    for index, weight in motion.noise_weight.items():
        if isinstance(weight, Tensor):
            mail.put(f"weight {part.key} {index}", weight)
    if motion.paths is not None:
        mail.put_sum(f"paths {part.key}", motion.paths)
    for group, matrix in table.covariances.items():
        mail.put(f"covariance {part.key} {group}", matrix, share)


def _of_whole_path(errors: list[Error], sections: list[SectionTotals], path_length: float) -> list[Error]:
    """Each process knows the errors of Σ ‖u of its part‖. What they do to Σ ‖u‖ is less, by the ratio of these."""
    own = sum(section.sums["path_length"] for section in sections)
    ratio = path_length / own if own else 0.0

    def shortened(sums: Mapping[str, float]) -> dict[str, float]:
        return {**sums, "path_length": ratio * sums["path_length"]}

    return [Error({i: shortened(sums) for i, sums in error.sums.items()}, error.loss) for error in errors]


def _sketch_of(motion: Motion) -> Sketch:
    members = motion.members
    return Sketch(
        motion.coordinates, [m.position for m in members], [m.first or 0 for m in members], [m.size for m in members]
    )


def _step(before: Tensor, after: Tensor) -> Tensor:
    """What a step added to the sums, and its mean mobility ‖u‖²/Σ(u²/μ); 0 where nothing moved."""
    sums = after - before
    free, work = sums[SUMS.index("free_squares")], sums[SUMS.index("work_action")]
    free = free if float(free) else sums[SUMS.index("squares")]
    mobility = free / work if float(work) > 0 else torch.zeros_like(work)
    return torch.cat([sums, mobility.reshape(1)])


def _section(part: Part, i: int, host: dict[str, Tensor], told: Verdict) -> SectionTotals:
    section, motion = part.table.sections[i], part.table.motion
    sums = _named(host[f"values {part.key}"][i], told)
    if f"paths {part.key}" in host:
        sums["own_path_length"] = float(host[f"paths {part.key}"][i])
    weight: Any = motion.noise_weight.get(section.group, 0.0)
    weight = host.get(f"weight {part.key} {section.group}", weight)
    run = next(r for r in motion.runs.current(motion.missing) if r.index == section.group)
    own = "effective" if told.effective else kind(motion, section)
    gain = math.nan if run.formula is None or own == "effective" else run.formula.noise_gain(run.group)
    return SectionTotals(section.layer, own, sums, gain, float(weight))


def _named(column: Tensor, told: Verdict) -> dict[str, float]:
    """The columns by their names, and work_ito with what waits for its next gradient."""
    sums = dict(zip(COLUMNS, column.tolist(), strict=True))
    sums["work_ito"] = sums["work_met"] + sums["waiting"]
    return sums if told.factor == 1.0 else sums | {name: told.factor * sums[name] for name in _SCALED}


def _without_formula(parts: list[Part]) -> tuple[str, ...]:
    names = {
        type(part.follower.optimizer).__name__
        for part in parts
        for section in part.table.sections
        if kind(part.table.motion, section) == "effective"
    }
    return tuple(sorted(names))


def directions(covariance: Tensor) -> list[Tensor]:
    """Columns whose outer products add up to the covariance; what rounding made negative counts 0."""
    scale = covariance.diagonal().clamp_min(0).sqrt()
    scale = torch.where((scale > 0) & scale.isfinite(), scale, torch.ones_like(scale))
    plain = covariance / torch.outer(scale, scale)
    if not bool(plain.isfinite().all()):
        return [torch.full_like(scale, math.nan)]
    values, vectors = torch.linalg.eigh(plain)
    return [scale * v * root for v, root in zip(vectors.T, values.clamp_min(0).sqrt(), strict=True) if float(root) > 0]


def signs_of_loss(followers: list[Follower]) -> set[float]:
    """−1 where the loss is maximized: of the groups that are measured, of all before the first is."""
    groups = [run.group for f in followers for m in f.motions for run in m.runs.current(m.missing)]
    groups = groups or [g for f in followers for g in f.optimizer.param_groups]
    return {-1.0 if g.get("maximize", False) else 1.0 for g in groups} or {1.0}


def loss_drop(
    host: dict[str, Tensor], windows: losses.LossWindows, steps: int, followers: list[Follower], *, agreed: bool
) -> tuple[losses.LossDrop | None, str]:
    """L_0 − L_K, of the probe where there is one, and why there is none."""
    signs = signs_of_loss(followers)
    if not agreed or len(signs) != 1:
        return None, _DISAGREED if not agreed else _BOTH_WAYS
    if "probe" in host:
        found = losses.paired_drop(host["probe"])
    elif "losses" in host:
        found = losses.drop(*windows.windows(host["losses"]), steps)
    else:
        return None, ""
    return replace(found, value=signs.pop() * found.value), ""
