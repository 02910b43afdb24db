"""What the runs of warm_up.py say: who needed warm-up, who was told to, tables, the figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from statistics import median
from typing import Any

from lab import COLOURS, LINES, MARKERS, Lab, Mean, mean_of
from warm_up_runs import ERRORS, GAIN, LENGTHS, NETS, OPTIMIZERS, Row

ALL_RIGHT, EACH_RIGHT, HALF = 0.8, 0.7, 0.5  # of the statement
LONGEST = "− longest update, share of the weights"


@dataclass(frozen=True)
class Setting:
    """Five runs and their twins with warm-up."""

    network: str
    optimizer: str
    power: int
    rows: Sequence[Row]

    def sum(self, name: str) -> float:
        return math.fsum(math.nan if row[name] is None else row[name] for row in self.rows)

    def mean(self, name: str) -> float:
        return self.sum(name) / len(self.rows)

    @property
    def gain(self) -> Mean:
        """What 10 % of warm-up saved of the final loss, by pairs."""
        return mean_of([row["loss_0"] - row["loss_10"] for row in self.rows])

    @property
    def share(self) -> Mean:
        """The same, in % of the loss without."""
        whole = self.mean("loss_0") / 100
        return Mean(self.gain.value / whole, self.gain.error / whole, self.gain.count)

    @cached_property
    def needed(self) -> bool:
        gain = self.gain
        return gain.value > GAIN * self.mean("loss_0") and gain.value > ERRORS * gain.error

    @cached_property
    def headroom(self) -> Mean:
        """(2d − a)/2(d − a) of the sums over seeds; its error by leaving out one seed at a time.

        Without curvature, d ≤ a, there is no end to it where the loss fell, and none of it where it rose.
        """
        seeds = range(len(self.rows))
        drops, signals = ([_known(row[name]) for row in self.rows] for name in ("drop", "signal"))
        whole = headroom(math.fsum(drops), math.fsum(signals))
        without = [headroom(math.fsum(drops) - drops[out], math.fsum(signals) - signals[out]) for out in seeds]
        if not all(map(math.isfinite, (whole, *without))):
            return Mean(whole, 0.0, len(seeds))
        middle = math.fsum(without) / len(without)
        spread = math.fsum((value - middle) ** 2 for value in without) * (len(seeds) - 1) / len(seeds)
        return Mean(whole, math.sqrt(spread), len(seeds))

    @property
    def told(self) -> bool:
        """To need warm-up."""
        return not self.headroom.value - self.headroom.error > HALF


def headroom(drop: float, signal: float) -> float:
    if not (math.isfinite(drop) and math.isfinite(signal)):
        return -math.inf
    if drop <= signal:
        return math.inf if drop > 0 else -math.inf
    return (2 * drop - signal) / (2 * (drop - signal))


def _known(value: float | None) -> float:
    return math.nan if value is None else value


SCORES: dict[str, Callable[[Setting], float]] = {  # the lower, the more warm-up is needed
    "headroom": lambda setting: setting.headroom.value,
    "conversion": lambda setting: setting.sum("drop") / setting.sum("work"),
    "signal fraction": lambda setting: setting.sum("signal") / setting.sum("work"),
    "loss drop, share of the loss": lambda setting: setting.sum("drop") / setting.sum("start"),
    "steadiness": lambda setting: setting.mean("steadiness_early"),
    LONGEST: lambda setting: -setting.mean("longest_early"),
    "− rate over the best, powers of √10": lambda setting: -float(setting.power),
}


def settings_of(rows: Sequence[Row]) -> list[Setting]:
    found: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row["network"], row["optimizer"], row["power"]), []).append(row)
    order = [net.name for net in NETS]
    return [Setting(*name, found[name]) for name in sorted(found, key=lambda name: (order.index(name[0]), *name[1:]))]


def judged(settings: Sequence[Setting]) -> tuple[list[Setting], list[Setting]]:
    """Those that thresholds are fixed on, and the others."""
    later = {net.name for net in NETS if net.judged}
    return [s for s in settings if s.network not in later], [s for s in settings if s.network in later]


@dataclass(frozen=True)
class Right:
    """of_needed: right of those that need warm-up, and how many these are; of_others."""

    of_needed: tuple[int, int]
    of_others: tuple[int, int]

    @classmethod
    def of(cls, settings: Sequence[Setting], told: Callable[[Setting], bool]) -> Right:
        needed, others = ([s for s in settings if s.needed is which] for which in (True, False))
        return cls((sum(told(s) for s in needed), len(needed)), (sum(not told(s) for s in others), len(others)))

    @property
    def balanced(self) -> float:
        """The mean of both rates; NaN where one has none."""
        if not (self.of_needed[1] and self.of_others[1]):
            return math.nan
        return (self.of_needed[0] / self.of_needed[1] + self.of_others[0] / self.of_others[1]) / 2

    @property
    def counted(self) -> tuple[int, int]:
        return self.of_needed[0] + self.of_others[0], self.of_needed[1] + self.of_others[1]

    @property
    def holds(self) -> bool:
        right, of = self.counted
        each = [part for part in (self.of_needed, self.of_others) if part[1]]
        return right >= ALL_RIGHT * of and all(part[0] >= EACH_RIGHT * part[1] for part in each)


def threshold(settings: Sequence[Setting], score: Callable[[Setting], float]) -> float:
    """Half-way between two neighbours: below it warm-up is told, right most often; of several, the lowest."""
    values = sorted({value for value in map(score, settings) if math.isfinite(value)})
    between = [(low + high) / 2 for low, high in pairwise(values)] or [math.nan]
    return max(between, key=lambda limit: Right.of(settings, below(score, limit)).balanced)


# --- tables


def verdict_table(settings: Sequence[Setting]) -> str:
    lines = [
        "| settings | right | right where it is needed | right where it is not | verdict |",
        "|---|---|---|---|---|",
    ]
    groups = {"all": settings} | {name: [s for s in settings if s.optimizer == name] for name in OPTIMIZERS}
    groups |= {net.name: [s for s in settings if s.network == net.name] for net in NETS}
    for name, members in groups.items():
        if members:
            right = Right.of(members, lambda s: s.told)
            parts = " | ".join(f"{a} of {b}" for a, b in (right.counted, right.of_needed, right.of_others))
            lines.append(f"| {name} | {parts} | {'holds' if right.holds else 'fails'} |")
    return "\n".join(lines)


def below(score: Callable[[Setting], float], limit: float) -> Callable[[Setting], bool]:
    """Whether warm-up is told; where the score is not known too."""
    return lambda setting: not score(setting) >= limit


def threshold_table(settings: Sequence[Setting]) -> str:
    first, other = judged(settings)
    lines = [
        "| of the first twentieth | warm-up below | first half | other half | needed | not needed | a single run"
        " | Adam: needed, not | momentum: needed, not |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, score in SCORES.items():
        limit = threshold(first, score)
        told = below(score, limit)
        fixed, found, single = Right.of(first, told), Right.of(other, told), singly(other, told)
        parts = " | ".join(f"{a} of {b}" for a, b in (found.of_needed, found.of_others))
        rates = " | ".join(percent(right.balanced) for right in (fixed, found))
        by = [Right.of([s for s in other if s.optimizer == which], told) for which in OPTIMIZERS]
        each = " | ".join("{} of {}, {} of {}".format(*right.of_needed, *right.of_others) for right in by)
        lines.append(f"| {name} | {limit:.3g} | {rates} | {parts} | {percent(single.balanced)} | {each} |")
    return "\n".join(lines)


def singly(settings: Sequence[Setting], told: Callable[[Setting], bool]) -> Right:
    """What each run by itself tells of its setting."""
    runs = [(s, told(Setting(s.network, s.optimizer, s.power, [row]))) for s in settings for row in s.rows]
    needed, others = ([said for s, said in runs if s.needed is which] for which in (True, False))
    return Right((sum(needed), len(needed)), (len(others) - sum(others), len(others)))


def percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.0f} %"


def gain_table(settings: Sequence[Setting]) -> str:
    """By network and optimizer: the saving of 10 % warm-up, in % of the loss, at each rate; headroom behind it."""
    powers = sorted({s.power for s in settings})
    heads = [f"{10 ** (power / 2):.2g} × best" for power in powers]
    lines = [f"| network | optimizer | best rate | {' | '.join(heads)} |", "|---" * (len(powers) + 3) + "|"]
    for network, optimizer in dict.fromkeys((s.network, s.optimizer) for s in settings):
        mine = {s.power: s for s in settings if (s.network, s.optimizer) == (network, optimizer)}
        best = next(iter(mine.values()))
        rate = best.rows[0]["rate"] / 10 ** (best.power / 2)
        lines.append(f"| {network} | {optimizer} | {rate:.2g} | {' | '.join(cell(mine[power]) for power in powers)} |")
    return "\n".join(lines)


def cell(setting: Setting) -> str:
    share = setting.share
    saved = f"{share.value:.1f} ± {share.error:.1f}"
    return f"{f'**{saved}**' if setting.needed else saved} ({reading(setting.headroom)})"


def reading(found: Mean) -> str:
    if math.isinf(found.value):
        return "no curvature" if found.value > 0 else "loss rose"
    return f"{found.value:.2f} ± {found.error:.2f}"


def tuned_table(settings: Sequence[Setting]) -> str:
    """Each with its own best rate of the five: loss without and with 10 %, and the saving in %, paired by seed."""
    lines = ["| network | optimizer | without | with 10 % | saved, % |", "|---|---|---|---|---|"]
    for network, optimizer in dict.fromkeys((s.network, s.optimizer) for s in settings):
        mine = [s for s in settings if (s.network, s.optimizer) == (network, optimizer)]
        best = [min(mine, key=lambda s, name=name: s.mean(name)) for name in ("loss_0", "loss_10")]
        pairs = [(one["loss_0"], other["loss_10"]) for one, other in zip(*(s.rows for s in best), strict=True)]
        saved = mean_of([100 * (one - other) / best[0].mean("loss_0") for one, other in pairs])
        ends = [
            f"{s.mean(name):.3f} at {s.rows[0]['rate']:.2g}"
            for s, name in zip(best, ("loss_0", "loss_10"), strict=True)
        ]
        lines.append(f"| {network} | {optimizer} | {' | '.join(ends)} | {saved.value:.1f} ± {saved.error:.1f} |")
    return "\n".join(lines)


def length_table(runs: Sequence[Row], lengths: Sequence[Row]) -> str:
    """Adam: the saving in % of the loss, by how long the warm-up is: mean over seeds, paired."""
    names = ("network", "power", "seed")
    plain = {tuple(row[name] for name in names): row for row in runs if row["optimizer"] == "Adam"}
    every = sorted((10, *LENGTHS))
    lines = ["| network, rate | " + " | ".join(f"{length} % warm-up" for length in every) + " |"]
    lines.append("|---" * (len(every) + 1) + "|")
    for network, power in dict.fromkeys((row["network"], row["power"]) for row in lengths):
        mine = [row for row in lengths if (row["network"], row["power"]) == (network, power)]
        pairs = [(plain[tuple(row[name] for name in names)], row) for row in mine]
        told = []
        for length in every:
            saved = [100 * (run["loss_0"] - (run | row)[f"loss_{length}"]) / run["loss_0"] for run, row in pairs]
            told.append(f"{mean_of(saved).value:.1f} ± {mean_of(saved).error:.1f}")
        lines.append(f"| {network}, {10 ** (power / 2):.2g} × best | {' | '.join(told)} |")
    return "\n".join(lines)


def course_table(settings: Sequence[Setting]) -> str:
    """Without and with 10 %, where warm-up was needed and where not: medians over settings."""
    lines = [
        "| optimizer | warm-up was | settings | longest update, % of the weights | steadiness |",
        "|---|---|---|---|---|",
    ]
    for optimizer in OPTIMIZERS:
        for needed in (True, False):
            mine = [s for s in settings if s.optimizer == optimizer and s.needed is needed]
            if mine:
                long, steady = (changed(mine, name) for name in ("longest", "steadiness"))
                told = f"{100 * long[0]:.3g} → {100 * long[1]:.3g} | {steady[0]:.2f} → {steady[1]:.2f}"
                lines.append(f"| {optimizer} | {'' if needed else 'not '}needed | {len(mine)} | {told} |")
    return "\n".join(lines)


def changed(settings: Sequence[Setting], name: str) -> tuple[float, float]:
    """The median without warm-up, and with 10 %."""
    without, with_it = (median(s.mean(f"{name}_{percent}") for s in settings) for percent in (0, 10))
    return without, with_it


# --- the figure


def draw(lab: Lab, settings: Sequence[Setting]) -> None:
    with lab.picture(4, 2, width=3.3, height=3.1) as (drawn, axes):
        names = list(dict.fromkeys(s.network for s in settings))
        places = list(axes.flat)
        for panel, name in zip(places, names, strict=False):
            draw_network(panel, name, [s for s in settings if s.network == name])
        for panel in places[len(names) : -2]:
            panel.set_axis_off()
        draw_gain(places[-2], settings)
        draw_right(places[-1], settings)
        handles, labels = places[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def draw_network(panel: Any, name: str, settings: Sequence[Setting]) -> None:
    for optimizer, colour in zip(OPTIMIZERS, COLOURS[1:], strict=False):
        mine = sorted((s for s in settings if s.optimizer == optimizer), key=lambda s: s.power)
        powers = [10 ** (s.power / 2) for s in mine]
        for percent_, line, marker in ((0, LINES[0], MARKERS[0]), (10, LINES[1], MARKERS[1])):
            means = [mean_of([row[f"loss_{percent_}"] for row in s.rows]) for s in mine]
            panel.errorbar(
                powers, [m.value for m in means], [m.error for m in means], color=colour, linestyle=line, marker=marker,
                label=f"{optimizer}, {percent_} % warm-up" if percent_ else f"{optimizer}, none",
            )  # fmt: skip
    panel.set(xscale="log", xlabel="rate over the best without warm-up", ylabel="final held-out loss, nats", title=name)


def draw_gain(panel: Any, settings: Sequence[Setting]) -> None:
    limit = -threshold(judged(settings)[0], SCORES[LONGEST])
    for optimizer, colour, marker in zip(OPTIMIZERS, COLOURS[1:], MARKERS, strict=False):
        mine = [s for s in settings if s.optimizer == optimizer]
        panel.errorbar(
            [100 * s.mean("longest_early") for s in mine], [s.share.value for s in mine], [s.share.error for s in mine],
            color=colour, marker=marker, linestyle="none", alpha=0.7, label=optimizer,
        )  # fmt: skip
    panel.axhline(0, color=COLOURS[0], linewidth=0.8)
    panel.axvline(100 * limit, color=COLOURS[0], linewidth=0.8, linestyle=":")
    panel.set_yscale("symlog", linthresh=5)
    panel.set_yticks([-20, -5, 0, 5, 20], ["−20", "−5", "0", "5", "20"])
    panel.set(xscale="log", xlabel="longest early update, % of the weights", ylabel="saved by 10 % warm-up, %")
    panel.set_xlim(0.05, 1000)  # of those that diverge at once a few are beyond it, at 0
    panel.set_title("What it saved; dotted: threshold")
    panel.legend(loc="lower right")


def draw_right(panel: Any, settings: Sequence[Setting]) -> None:
    first, other = judged(settings)
    names = list(SCORES)
    halves = ("first half, fixed", first, 0.2, COLOURS[6]), ("other half, judged", other, -0.2, COLOURS[1])
    for half, members, shift, colour in halves:
        rates = []
        for name in names:
            limit = threshold(first, SCORES[name])
            right = Right.of(members, below(SCORES[name], limit))
            rates.append(100 * right.balanced)
        panel.barh([i + shift for i in range(len(names))], rates, 0.38, color=colour, label=half)
    panel.axvline(50, color=COLOURS[0], linewidth=0.8, linestyle=":")
    panel.set_yticks(range(len(names)), [name.split(",")[0] for name in names], fontsize=7)
    panel.set(xlim=(0, 100), xlabel="right, mean of needed and not needed, %", title="Which number tells it")
    panel.set_ylim(len(names) + 0.9, -0.6)
    panel.legend(loc="lower left", ncols=2)
