"""What the runs of real_size.py left, as rows of its JSON, tables of its page, and its figure."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from lab import COLOURS, LINES, MARKERS, Lab, Row, mean_of
from training import plain

from lightning_speedlimit import RunRecord
from lightning_speedlimit.report import advise, diagnose

LOOKED_AT = {"10 %": 0.1, "50 %": 0.5, "100 %": 1.0}  # shares of the steps at which the record is kept, to be read
MOST_ROWS = 150
WINDOWS = 10
COSTS = 0.1  # of a bare step, at most
GROWS = 2.0  # times, the critical batch size
KEPT = (
    *("loss", "learning_rate", "grad_norm", "efficiency", "efficiency_se", "efficiency_action", "kinematic_efficiency"),
    *("straightness", "steadiness", "conversion", "signal_fraction", "noise_share", "noise_share_se"),
    *("critical_batch_size", "critical_batch_size_se", "step_headroom", "step_headroom_se"),
)
TOLD = ("noise_share", "critical_batch_size", "step_headroom")
DESCRIBED = ("parameters", "measured_coordinates", "samples_per_step", "tokens_per_step", "precision", "versions")
TITLES = {"transformer": "GPT, Python's library", "resnet": "ResNet, CIFAR-10", "gpt2": "GPT-2's size"}
UNITS = {"transformer": "tokens", "gpt2": "tokens", "resnet": "images"}


class Reading:
    """The rows, by part: runs, rows, windows, validations, readings, cost."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.results = lab, lab.results

    # --- from the folders of the runs

    def collect(self, folder: Path) -> None:
        """Of the runs that are over; what the file has of others stays."""
        for ended in sorted(folder.glob("*/ended.json")):
            said = json.loads(ended.read_text("utf-8"))
            record = RunRecord.load(ended.parent / "at 100 %")
            self._put("runs", said["run"], [run_row(said, record)])
            self._put("validations", said["run"], said["validations"])
            self._put("rows", said["run"], rows_of(record))
            self._put("windows", said["run"], windows_of(record))
            if said["run"] in TITLES:
                kept = {at: RunRecord.load(ended.parent / f"at {at}") for at in LOOKED_AT}
                self._put("readings", said["run"], [reading_of(at, record) for at, record in kept.items()])

    def _put(self, part: str, run: str, rows: Sequence[Row]) -> None:
        others = [row for row in self.results.parts.get(part, []) if row["run"] != run]
        self.results.replace(part, [*others, *({"run": run, **row} for row in rows)])

    def of(self, part: str, run: str, **key: Any) -> list[Row]:
        wanted = {"run": run, **key}.items()
        return [row for row in self.results.parts.get(part, []) if wanted <= row.items()]

    @property
    def runs(self) -> list[str]:
        """Names of those that the statements are of."""
        there = [row["run"] for row in self.results.parts.get("runs", [])]
        return [name for name in TITLES if name in there]

    # --- the statements

    def verdicts(self, run: str) -> dict[str, tuple[bool, str]]:
        """Statement → whether it holds, and the numbers that say so."""
        return {
            "bounds": self._bounds(run),
            "noise": self._noise(run),
            "regimes": self._regimes(run),
            "cost": self._cost(run),
            "early word": self._early(run),
        }

    def _bounds(self, run: str) -> tuple[bool, str]:
        names = ("efficiency_action", "kinematic_efficiency")
        largest = [max(row[name] for row in self.of("rows", run) if row[name] is not None) for name in names]
        return max(largest) <= 1, f"at most {largest[0]:.3f} and {largest[1]:.3f}"

    def thirds(self, run: str, name: str) -> tuple[float, float, int]:
        """Medians over the first and the last third of the rows, NaN where most are undefined; how many are, of all."""
        found = [row[name] for row in self.of("rows", run)]
        third = len(found) // 3

        def middle(part: Sequence[float | None]) -> float:
            known = [value for value in part if value is not None]
            return median(known) if 2 * len(known) > len(part) else math.nan

        return middle(found[:third]), middle(found[-third:]), sum(value is None for value in found)

    def _noise(self, run: str) -> tuple[bool, str]:
        first, last, undefined = self.thirds(run, "critical_batch_size")
        said = f"median {told(first)} → {told(last)}; undefined in {undefined} of {len(self.of('rows', run))} rows"
        return last >= GROWS * first, said

    def _regimes(self, run: str) -> tuple[bool, str]:
        (row,) = self.of("runs", run)
        found = row["regimes"]
        said = ", ".join(f"steps {first}–{last}: {told(value)}" for first, last, value in found)
        holds = len(found) > 1 and found[0][1] < row["steps"] / 10 and (found[0][2] or math.inf) < (found[1][2] or 0.0)
        return holds, said

    def _cost(self, run: str) -> tuple[bool, str]:
        ratio = mean_of([row["ratio"] for row in self.of("cost", run)])
        return ratio.value <= 1 + COSTS, f"{ratio.value:.2f} ± {ratio.error:.1g} of a bare step, {ratio.count} pairs"

    def _early(self, run: str) -> tuple[bool, str]:
        causes = {row["at"]: sorted(row["causes"]) for row in self.of("readings", run)}
        return causes["10 %"] == causes["100 %"], "; ".join(f"{at}: {', '.join(found)}" for at, found in causes.items())

    # --- the tables

    def show(self) -> None:
        for table in (self.runs_table(), self.verdict_table(), self.reading_table(), self.followed_table()):
            print(f"{table}\n")
        for run in self.runs:
            print(f"{self.window_table(run)}\n")
        rows = 5
        with self.lab.picture(max(1, len(self.runs)), rows, width=4.0, height=2.0) as (_, axes):
            for column, run in enumerate(self.runs):
                panels = [axes[row, column] if len(self.runs) > 1 else axes[row] for row in range(rows)]
                self._draw(panels, run)
            for panel in panels:  # the last column's stand for all
                panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

    def runs_table(self) -> str:
        lines = [
            "| run | parameters | measured | steps | processor min | loss at the end, held out | accuracy |",
            "|---|---|---|---|---|---|---|",
        ]
        for run in self.runs:
            (row,) = self.of("runs", run)
            share = row["measured_coordinates"] / row["parameters"]
            accuracy = f"{row['val_accuracy']:.3f}" if "val_accuracy" in row else ""
            lines.append(
                f"| {TITLES[run]} | {row['parameters']:,} | {100 * share:.0f} % | {row['steps']:,} |"
                f" {row['seconds'] / 60:.1f} | {row['val_loss']:.3f} | {accuracy} |"
            )
        return "\n".join(lines)

    def verdict_table(self) -> str:
        lines = ["| statement | run | | numbers |", "|---|---|---|---|"]
        for run in self.runs:
            for name, (holds, said) in self.verdicts(run).items():
                lines.append(f"| {name} | {TITLES[run]} | {'holds' if holds else 'fails'} | {said} |")
        return "\n".join(lines)

    def reading_table(self) -> str:
        lines = [
            "| run | at | causes | noise share | critical batch size | headroom | × 4: steps, said |",
            "|---|---|---|---|---|---|---|",
        ]
        for run in self.runs:
            for row in self.of("readings", run):
                cells = [f"{told(row[name])} ± {told(row[f'{name}_se'])}" if row[name] else "not told" for name in TOLD]
                lines.append(
                    f"| {TITLES[run]} | {row['at']} | {', '.join(row['causes'])} | {' | '.join(cells)} |"
                    f" {told(row['steps_said'])} |"
                )
        return "\n".join(lines)

    def window_table(self, run: str) -> str:
        lines = [
            f"| {TITLES[run]}: steps | efficiency | straightness | steadiness | conversion | loss drop |",
            "|---|---|---|---|---|---|",
        ]
        for row in self.of("windows", run):
            names = ("straightness", "steadiness", "conversion", "loss_drop")
            efficiency = (
                f"{told(row['efficiency'])} ± {told(row['efficiency_se'])}" if row["efficiency"] else "not told"
            )
            cells = " | ".join(told(row[name]) for name in names)
            lines.append(f"| {row['first']}–{row['last']} | {efficiency} | {cells} |")
        return "\n".join(lines)

    def followed_table(self) -> str:
        """The ResNet again with another batch: when it was at the loss at which the first one ended."""
        runs = [row for row in self.results.parts.get("runs", []) if row["run"].startswith("resnet ×")]
        lines = [
            "| batch | steps | held-out loss at the end | steps to that of the first | images |",
            "|---|---|---|---|---|",
        ]
        for row in runs:
            level = self.of("validations", runs[0]["run"])[-1]["val_loss"]
            at = passed(self.of("validations", row["run"]), level)
            cells = f"{row['batch']} | {row['steps']} | {self.of('validations', row['run'])[-1]['val_loss']:.3f}"
            lines.append(f"| {cells} | {told(at)} | {told(at * row['batch'])} |")
        return "\n".join(lines)

    # --- the figure

    def _draw(self, panels: Sequence[Any], run: str) -> None:
        rows, windows, looks = self.of("rows", run), self.of("windows", run), self.of("validations", run)
        (said,) = self.of("runs", run)
        loss, factors, share, batch, headroom = panels
        lines_of(loss, rows, {"loss": "training"})
        loss.plot([row["step"] for row in looks], [row["val_loss"] for row in looks], MARKERS[1], label="held out")
        loss.set(title=TITLES[run], ylabel="loss (nats)")
        middles = [{**row, "step": (row["first"] + row["last"]) / 2} for row in windows]
        names = {"efficiency": "efficiency", "straightness": "straightness", "steadiness": "steadiness"}
        lines_of(factors, middles, names | {"conversion": "conversion"}, marked=True, positive=True)
        factors.set(yscale="log", ylabel="in windows")
        lines_of(share, rows, {"noise_share": "noise, of the work", "signal_fraction": "next batch confirms, so far"})
        share.set(ylabel="share", ylim=(-0.5, 1.1))
        lines_of(batch, rows, {"critical_batch_size": "critical batch size"}, positive=True)
        own = said.get("tokens_per_step") or said["samples_per_step"]
        batch.axhline(own, color=COLOURS[2], linestyle=LINES[1], label="its own batch")
        batch.set(yscale="log", ylabel=UNITS[run], ylim=(own / 2, own * 200))
        lines_of(headroom, rows, {"step_headroom": "step headroom"})
        headroom.axhline(1, color="#999999", linewidth=1)
        headroom.set(xlabel="steps", ylabel="times the rate", ylim=(0, 2))
        for panel in panels:
            panel.set_xlim(0, said["steps"])


def lines_of(
    axis: Any, rows: Sequence[Row], names: dict[str, str], *, marked: bool = False, positive: bool = False
) -> None:
    """Columns over the steps; gaps where they are undefined, and where they are not above 0."""
    for at, (name, label) in enumerate(names.items()):
        values = [math.nan if row[name] is None or (positive and row[name] <= 0) else row[name] for row in rows]
        marker = MARKERS[at] if marked else None
        axis.plot(
            [row["step"] for row in rows], values, color=COLOURS[at], linestyle=LINES[at], marker=marker, label=label
        )


# --- rows of a record


def run_row(said: Row, record: RunRecord) -> Row:
    row = {name: said[name] for name in ("steps", "batch", "seed", "seconds")} | {"pieces_ended_at": said["ended"]}
    row |= {name: record.run[name] for name in DESCRIBED if name in record.run}
    found = [[r.first_step, r.last_step, six(r.efficiency)] for r in record.regimes()]
    return row | said["end"] | {"regimes": found}


def rows_of(record: RunRecord) -> list[Row]:
    columns = record.columns
    every = -(-len(record) // MOST_ROWS)
    places = [*range(len(record) - 1, -1, -every)][::-1]
    named = {"step": lambda i: int(columns["step"][i])}
    cells: dict[str, Callable[[int], Any]] = named | {n: lambda i, n=n: float(columns[n][i]) for n in KEPT}
    return [plain({name: cell(i) for name, cell in cells.items()}) for i in places]


def windows_of(record: RunRecord) -> list[Row]:
    """Equal windows between the steps that have a sketch, and their factors."""
    columns, last = record.columns, int(record.columns["step"][-1])
    kept = [0, *(int(step) for step in record.sketch_steps)]
    marks = sorted({min(kept, key=lambda step, k=k: abs(step - k * last / WINDOWS)) for k in range(WINDOWS + 1)})
    found = record.windows(marks[:-1], marks[1:])
    travelled = {0: 0.0} | dict(zip(columns["step"].tolist(), columns["path_length"].tolist(), strict=True))
    rows = []
    for i, (first, to) in enumerate(pairwise(marks)):
        straightness = float(found.displacement[i]) ** 2 / (travelled[to] - travelled[first]) ** 2
        row = {"first": first, "last": to, "straightness": straightness}
        row["steadiness"] = float(found.kinematic_efficiency[i]) / straightness
        for name in ("efficiency", "efficiency_se", "conversion", "loss_drop"):
            row[name] = float(getattr(found, name)[i])
        rows.append(plain(row))
    return rows


def reading_of(at: str, record: RunRecord) -> Row:
    """What the package tells a user who looks at the run then."""
    findings, advice = diagnose(record), advise(record)
    row: Row = {"at": at, "step": int(record.columns["step"][-1]), "causes": [found.cause for found in findings]}
    row |= {"said": [found.text for found in findings]}
    for name in TOLD:
        tuned = getattr(advice, name)
        row |= {name: tuned.value, f"{name}_se": tuned.standard_error} | (
            {f"{name}_why": tuned.reason} if tuned.reason else {}
        )
    steps = {found.multiple: found.steps for found in advice.at_batches}
    row["steps_said"] = steps[4.0] / steps[1.0] if steps else math.nan
    return plain(row | {"rate_multiple": advice.rate_multiple, "cautions": list(advice.cautions)})


def passed(looks: Sequence[Row], level: float) -> float:
    """The step at which the held-out loss came down to the level, between two looks; NaN: never."""
    before: Row | None = None
    for look in looks:
        if look["val_loss"] <= level:
            if before is None:
                return float(look["step"])
            share = (before["val_loss"] - level) / (before["val_loss"] - look["val_loss"])
            return float(before["step"] + share * (look["step"] - before["step"]))
        before = look
    return math.nan


def six(value: float) -> float | None:
    return plain({"": value})[""]


def told(value: float | None) -> str:
    """Three digits; "not told" for NaN."""
    if value is None or math.isnan(value):
        return "not told"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
