"""What the runs of noise_and_batch.py say: means over seeds, verdicts, tables, the figure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median
from typing import Any

import numpy as np
from lab import COLOURS, LINES, MARKERS, Lab, Mean, mean_of
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from noise_and_batch_runs import FIRST, FOLLOWED, GROWTH, RATES, Row, followed

FACTOR, SHARE, DOUBT = 1.5, 0.8, 0.05  # of the statements
OPTIMIZERS = ("SGD", "momentum", "Adam")
AT_RISK = ("SGD, 4 × the rate", "SGD, batch 8")


# --- the law


@dataclass(frozen=True)
class Law:
    """Of one case of a task: told and true B_c, (seeds, stretches), NaN where it is not told; own: by batch losses."""

    task: str
    case: str
    told: np.ndarray[Any, Any]
    true: np.ndarray[Any, Any]
    own: np.ndarray[Any, Any]

    @property
    def ratios(self) -> np.ndarray[Any, Any]:
        return self.told / self.true


def case_of(row: Mapping[str, Any]) -> str:
    if row["batch"] == 8:
        return AT_RISK[1]
    return AT_RISK[0] if row["optimizer"] == "SGD" and row["rate"] > 2 * RATES[row["net"]] else row["optimizer"]


def law_cells(rows: Sequence[Row]) -> list[Law]:
    def place(row: Row) -> tuple[str, str]:
        return f"{row['data']}, {row['net']}", case_of(row)

    def table(members: Sequence[Row], name: str) -> np.ndarray[Any, Any]:
        stretches = sum(key.startswith("true_") and not key.startswith("true_se_") for key in members[0])
        found = [[row.get(f"{name}_{i}") for i in range(stretches)] for row in members]
        return np.array(found, dtype=float)

    members = {at: [row for row in rows if place(row) == at] for at in dict.fromkeys(map(place, rows))}
    return [Law(*at, *(table(mine, name) for name in ("told", "true", "own"))) for at, mine in members.items()]


def within(ratios: np.ndarray[Any, Any]) -> tuple[int, int]:
    """How many are right, and how many were told."""
    known = ratios[np.isfinite(ratios)]
    return int(((known <= FACTOR) & (known >= 1 / FACTOR)).sum()), len(known)


def by_seed(ratios: np.ndarray[Any, Any]) -> str:
    """The geometric mean over stretches, then over seeds: "1.05 ± 0.02"."""
    return times(mean_of([mean_of(list(row)).value for row in np.log(ratios)]))


def times(of_logarithms: Mean) -> str:
    if not of_logarithms.count:
        return "–"
    value = math.exp(of_logarithms.value)
    return f"{value:.2f}" if math.isnan(of_logarithms.error) else f"{value:.2f} ± {value * of_logarithms.error:.2f}"


def law_table(cells: Sequence[Law]) -> str:
    lines = [
        "| task | run | told | within 1.5 × | told over true | true B_c, first stretch → last |",
        "|---|---|---|---|---|---|",
    ]
    for cell in cells:
        first, last = (float(np.median(cell.true[:, at])) for at in (0, -1))
        ways = [("", cell.ratios)]
        if cell.case == "SGD":
            ways.append((", by its batch losses alone", cell.own / cell.true))
        for way, ratios in ways:
            right, told = within(ratios)
            lines.append(
                f"| {cell.task} | {cell.case}{way} | {told} of {ratios.size} | {right} of {told} | {by_seed(ratios)} |"
                f" {first:.0f} → {last:.0f} |"
            )
    return "\n".join(lines)


def stretch_table(cells: Sequence[Law]) -> str:
    """By stretch, of all tasks: how many were told, and told over true in the median."""
    stretches = cells[0].true.shape[1]
    lines = [f"| run | {' | '.join(f'stretch {i + 1}' for i in range(stretches))} |", "|---" * (stretches + 1) + "|"]
    for case, ratios in pooled(cells):
        told = [column[np.isfinite(column)] for column in ratios.T]
        texts = [f"{len(known)} of {len(ratios)}: {median(known):.2f}" if len(known) else "–" for known in told]
        lines.append(f"| {case} | {' | '.join(texts)} |")
    return "\n".join(lines)


def pooled(cells: Sequence[Law]) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    for case in (*OPTIMIZERS, *AT_RISK):
        ratios = [cell.ratios for cell in cells if cell.case == case]
        if ratios:
            yield case, np.concatenate(ratios)


def overlap_table(rows: Sequence[Row]) -> str:
    """Fashion-MNIST, MLP: what is left of ‖F‖²."""
    lines = ["| run | F_k·F_{k−1} over ‖F_k‖² | F_k·g_{k−1} over ‖F_k‖² |", "|---|---|---|"]
    for name in OPTIMIZERS[1:]:
        shares = [mean_of([row[what] for row in rows if row["optimizer"] == name]) for what in ("full", "own")]
        lines.append(f"| {name} | " + " | ".join(f"{mean.value:.2f} ± {mean.error:.2f}" for mean in shares) + " |")
    return "\n".join(lines)


# --- schedules


def excess(policy: Mapping[str, Any], constant: Sequence[Mapping[str, Any]], fine: int = 50) -> float:
    """The smallest x for which a constant batch needs at most x times the steps and x times the samples."""
    known = sorted((math.log(row["steps_to"]), math.log(row["samples_to"])) for row in constant if row["steps_to"])
    if policy["steps_to"] is None or not known:
        return math.nan
    between = np.linspace(0.0, len(known) - 1.0, fine * (len(known) - 1) + 1)
    steps, samples = (np.interp(between, range(len(known)), [place[i] for place in known]) for i in (0, 1))
    own = math.log(policy["steps_to"]), math.log(policy["samples_to"])
    return float(np.exp(np.maximum(steps - own[0], samples - own[1]).min()))


def promised(row: Mapping[str, Any]) -> float:
    """2/(1 + √γ), by B_c of the stretches that the run ended; s is what a run without noise had done so far."""
    ends = [0, FIRST]
    while len(ends) < len(row["critical"]):
        ends.append(round(GROWTH * ends[-1]))
    batch, parts = float(FIRST), []
    for steps, before, critical in zip(np.diff(ends), row["critical"], row["critical"][1:], strict=False):
        batch = batch if before is None else followed(row["policy"], 0, before)
        if critical is not None:
            parts.append((steps / (1 + critical / batch), critical))
    if not parts:
        return math.nan
    s, critical = np.array(parts).T
    gamma = (s * np.sqrt(critical)).sum() ** 2 / (s.sum() * (s * critical).sum())
    return float(2 / (1 + math.sqrt(gamma)))


@dataclass(frozen=True)
class Plane:
    """Of one task. rows: policy → its runs by seed. excess: policy that is followed → ln x by seed."""

    task: str
    rows: dict[str, list[Row]]
    excess: dict[str, list[float]]
    promised: float


def schedule_cells(rows: Sequence[Row]) -> list[Plane]:
    found = []
    for task, members in groupby(rows, lambda row: f"{row['data']}, {row['net']}"):
        by_policy: dict[str, list[Row]] = {}
        for row in members:
            by_policy.setdefault(row["policy"], []).append(row)
        constant = [runs for policy, runs in by_policy.items() if policy not in FOLLOWED]
        seeds = list(zip(*constant, strict=True))
        over = {
            policy: [math.log(excess(run, fixed)) for run, fixed in zip(by_policy[policy], seeds, strict=True)]
            for policy in FOLLOWED
        }
        found.append(Plane(task, by_policy, over, mean_of([promised(row) for row in by_policy["root"]]).value))
    return found


def schedule_table(cells: Sequence[Plane]) -> str:
    lines = [
        "| task | batch | rate | steps | samples | excess x | x that theory allows |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        for policy, runs in cell.rows.items():
            steps, samples = (mean_of([row[name] for row in runs]) for name in ("steps_to", "samples_to"))
            over = times(mean_of(cell.excess[policy])) if policy in FOLLOWED else "–"
            most = f"{cell.promised:.2f}" if policy == "root" else "–"
            lines.append(
                f"| {cell.task} | {policy} | {runs[0]['rate']:.3g} | {counted(steps)} | {counted(samples)} | {over} |"
                f" {most} |"
            )
    return "\n".join(lines)


def counted(mean: Mean) -> str:
    if not mean.count:
        return "never"
    return f"{mean.value:,.0f}" + ("" if math.isnan(mean.error) else f" ± {mean.error:,.0f}")


# --- all of it


def verdicts(law: Sequence[Law], planes: Sequence[Plane]) -> str:
    lines = ["| statement | found | verdict |", "|---|---|---|"]
    for case, ratios in pooled(law):
        right, told = within(ratios)
        verdict = "holds" if told and right >= SHARE * told else "fails"
        lines.append(f"| law, {case} | {right} of {told} that are told | {verdict} |")
    for cell in planes:
        mean = mean_of(cell.excess["root"])
        beaten = "holds" if math.exp(mean.value) >= 1 - DOUBT else "fails"
        beats = "holds" if math.exp(mean.value) > 1 + DOUBT and mean.value > 2 * mean.error else "fails"
        lines.append(f"| root not beaten, {cell.task} | x = {times(mean)} | {beaten} |")
        lines.append(f"| root beats all, {cell.task} | x = {times(mean)} | {beats} |")
    return "\n".join(lines)


def draw(lab: Lab, law: Sequence[Law], planes: Sequence[Plane]) -> None:
    with lab.picture(2, 2, width=4.6, height=3.6) as (drawn, axes):
        draw_law(axes[0][0], law)
        draw_stretches(axes[0][1], law)
        places = axes[1]
        for panel, cell in zip(places, planes, strict=False):
            draw_plane(panel, cell)
        for panel in places[len(planes) :]:
            panel.set_axis_off()
        handles, labels = places[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def draw_law(panel: Any, law: Sequence[Law]) -> None:
    for name, colour, marker in zip(OPTIMIZERS, COLOURS[1:], MARKERS, strict=False):
        told, true = (
            np.concatenate([getattr(c, what).ravel() for c in law if c.case == name]) for what in ("told", "true")
        )
        panel.plot(true, told, marker, color=colour, label=name, alpha=0.6, markersize=3.5)
    line = np.array([pick(cell.true) for pick in (np.min, np.max) for cell in law if cell.case in OPTIMIZERS])
    line = np.array([line.min() / 1.3, line.max() * 1.3])
    panel.plot(line, line, "-", color=COLOURS[0], linewidth=1)
    panel.fill_between(line, line / FACTOR, line * FACTOR, color="#cccccc", alpha=0.5, linewidth=0)
    panel.set(xscale="log", yscale="log", xlabel="tr Σ / ‖F‖², samples", ylabel="B_c that the run tells, samples")
    number_both_axes(panel)
    panel.set_title("a. Told and true; grey: within 1.5 ×")
    panel.legend()


def draw_stretches(panel: Any, law: Sequence[Law]) -> None:
    for (case, ratios), colour, line, marker in zip(pooled(law), COLOURS[1:], LINES, MARKERS, strict=False):
        middle = [median(known) if len(known) else math.nan for known in (c[np.isfinite(c)] for c in ratios.T)]
        panel.plot(range(1, len(middle) + 1), middle, marker=marker, linestyle=line, color=colour, label=case)
    panel.axhspan(1 / FACTOR, FACTOR, color="#cccccc", alpha=0.5, linewidth=0)
    panel.set(yscale="log", xlabel="stretch of the run", ylabel="told over true, median of all tasks", ylim=(0.5, 14))
    panel.set_yticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.set_xticks(range(1, law[0].true.shape[1] + 1))
    panel.set_title("b. Through the run")
    panel.legend(ncols=2, loc="upper left")


def draw_plane(panel: Any, cell: Plane) -> None:
    """Geometric means over seeds."""

    def place(policy: str) -> tuple[float, float]:
        runs = cell.rows[policy]
        one, other = (
            math.exp(mean_of([math.log(row[name]) for row in runs if row[name]]).value)
            for name in ("steps_to", "samples_to")
        )
        return one, other

    constant = [policy for policy in cell.rows if policy not in FOLLOWED]
    steps, samples = zip(*map(place, constant), strict=True)
    panel.plot(steps, samples, "o-", color=COLOURS[0], label="constant batch (its size beside it)")
    for policy, x, y in zip(constant, steps, samples, strict=True):
        panel.annotate(policy, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
    names = {"root": "batch √(64 B_c)", "share": "batch B_c/2", "blind": "batch step/2, nothing measured"}
    for policy, colour, marker in zip(names, COLOURS[1:], ("*", "s", "^"), strict=False):
        panel.plot(*place(policy), marker, color=colour, label=names[policy], markersize=9 if marker == "*" else 6)
    panel.set(xscale="log", yscale="log", xlabel="steps to the loss", ylabel="samples to the loss", title=cell.task)
    number_both_axes(panel)


def number_both_axes(panel: Any) -> None:
    """With 1, 2, 5, 10, … on logarithmic ones."""
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.set_minor_formatter(NullFormatter())
