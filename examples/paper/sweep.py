"""Learning rate, batch size and momentum: how far discrete, noisy runs are from the flow, and what ranks them.

    python examples/paper/sweep.py [--quick] [--output DIR]

An MLP 64-128-128-10 on scikit-learn's digits, cross entropy, batches drawn with replacement, until the loss on
all images is 0.1. Each run is measured by `TrajectoryMeter` on the clock "steps". Asked are

- how far a run is from gradient flow, whose values are those of full batches as the learning rate falls;
- whether efficiency at equal loss ranks the settings as their step counts do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any

import numpy as np
import torch
from common import COLOURS, MARKERS, Report, digits, figure, parse, progress
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_speedlimit import TrajectoryMeter

Floats = NDArray[np.float64]

TARGET = 0.1  # loss on all images
LOOK_EVERY = 10  # steps; every step from twice the target on
MAX_STEPS = 3000
SEEDS = 3
FIELDS = (
    "steps",
    "efficiency_low",
    "efficiency",
    "kinematic_efficiency",
    "straightness",
    "steadiness",
    "conversion",
    "signal_fraction",
    "action",
    "displacement",
)
RANKED = ("efficiency", "efficiency_low", "kinematic_efficiency", "conversion", "signal_fraction", "action")
RESAMPLINGS = 1999
FAMILIES = ("SGD", "momentum", "Adam")
HYPERBOLAS = ("SGD 0.1, 128", "momentum 0.9 0.05, 128", "Adam 0.001, 128")


@dataclass(frozen=True)
class Setting:
    """An optimizer and a batch size; batch None: all images, momentum 0: plain SGD."""

    family: str
    lr: float
    batch: int | None
    momentum: float = 0.0

    @property
    def name(self) -> str:
        beta = f"{self.momentum:g} " if self.momentum else ""
        return f"{self.family} {beta}{self.lr:g}, {'all' if self.batch is None else self.batch}"

    def optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        if self.family == "Adam":
            return torch.optim.Adam(parameters, lr=self.lr)
        return torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum)


SWEEP = (
    *(Setting("SGD", lr, batch) for lr, batch in product((0.05, 0.1, 0.3), (16, 128, 1024))),
    Setting("SGD", 0.5, 128),
    *(Setting("momentum", lr, 128, 0.9) for lr in (0.01, 0.05, 0.2)),
    *(Setting("momentum", lr, batch, 0.9) for lr, batch in product((0.01, 0.05), (16, 1024))),
    # one steady mobility lr/(1 − β) = ½
    *(Setting("momentum", lr, 128, beta) for lr, beta in ((0.25, 0.5), (0.1, 0.8), (0.025, 0.95), (0.01, 0.98))),
    *(Setting("Adam", lr, 128) for lr in (3e-4, 1e-3, 3e-3, 1e-2)),
    *(Setting("Adam", lr, batch) for lr, batch in product((3e-4, 1e-3, 3e-3), (16, 1024))),
)
FULL_BATCH = tuple(Setting("SGD", lr, None) for lr in (0.3, 0.2, 0.1, 0.05, 0.025))  # bounces; towards the flow
QUICK = (
    Setting("SGD", 0.3, 16),
    Setting("SGD", 0.3, 128),
    *(Setting("momentum", lr, 128, 0.9) for lr in (0.05, 0.2)),
    *(Setting("Adam", lr, 128) for lr in (1e-3, 3e-3, 1e-2)),
)


# --- one run


def train(setting: Setting, seed: int, target: float) -> dict[str, float]:
    """All numbers of one run, measured from θ_0 to the first θ_K with a loss on all images of at most `target`."""
    inputs, labels = digits()
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    order = torch.Generator().manual_seed(seed + 100)

    @torch.no_grad()
    def on_all_images() -> Tensor:
        return cross_entropy(model(inputs), labels).reshape(1)

    first = last = on_all_images()
    optimizer = setting.optimizer(model.parameters())
    meter = TrajectoryMeter(optimizer)
    for step in range(1, MAX_STEPS + 1):
        index: Tensor | slice = slice(None)
        if setting.batch is not None:
            index = torch.randint(len(labels), (setting.batch,), generator=order)
        optimizer.zero_grad()
        cross_entropy(model(inputs[index]), labels[index]).backward()
        optimizer.step()
        if step % LOOK_EVERY == 0 or last <= 2 * target:
            last = on_all_images()
            if last <= target:
                break
    meter.record_probe(first, last)  # the loss drop on all images
    values = meter.compute()
    meter.close()
    reached = bool(last <= target)
    return {name: values[name] for name in FIELDS if name != "steps"} | {
        "steps": values["elapsed"],
        "reached": reached,
        "loss": last.item(),
    }


def sweep(settings: Sequence[Setting], seeds: Sequence[int], target: float, label: str) -> list[dict[str, Any]]:
    """Mean and standard error over seeds of each setting."""
    runs = {
        (setting, seed): train(setting, seed, target)
        for setting, seed in progress(list(product(settings, seeds)), label)
    }
    return [summary(setting, [runs[setting, seed] for seed in seeds]) for setting in settings]


def summary(setting: Setting, runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": setting.name,
        "family": setting.family,
        "lr": setting.lr,
        "batch": setting.batch,
        "momentum": setting.momentum,
        "reached": all(run["reached"] for run in runs),
        "loss": max(run["loss"] for run in runs),
    }
    for name in FIELDS:
        values = np.array([run[name] for run in runs], dtype=float)
        row[name] = values.mean()
        row[f"{name}_se"] = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    row["flow_time"] = math.nan if setting.family == "Adam" else row["steps"] * setting.lr / (1 - setting.momentum)
    return row


def columns(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The table by columns."""
    return {name: [row[name] for row in rows] for name in rows[0]}


def limit_of_flow(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The values at lr → 0, 2 v(lr/2) − v(lr) from the two smallest rates: what is of first order in lr drops out."""
    coarse, fine = rows[-2:]
    names = ("efficiency", "kinematic_efficiency", "straightness", "steadiness", "conversion", "signal_fraction")
    found = {name: 2 * fine[name] - coarse[name] for name in names}
    return found | {"flow_time": 2 * fine["flow_time"] - coarse["flow_time"]}


# --- ranks

Score = Callable[[Floats], Floats]


def spearman(values: Floats) -> Floats:
    """a_ij = rank_i − rank_j: the scores of Spearman's ρ, from the last dimension."""
    ranks = rankdata(values, axis=-1)
    return ranks[..., :, None] - ranks[..., None, :]


def kendall(values: Floats) -> Floats:
    """a_ij = sign(x_i − x_j): the scores of Kendall's τ_b."""
    return np.sign(values[..., :, None] - values[..., None, :])


def correlate(a: Floats, b: Floats) -> Floats:
    """Σ a_ij b_ij/√(Σ a_ij² Σ b_ij²): Daniels' general coefficient, Spearman's or Kendall's by the scores."""
    with np.errstate(invalid="ignore"):  # a sample of one value only: NaN
        return (a * b).sum((-2, -1)) / np.sqrt((a * a).sum((-2, -1)) * (b * b).sum((-2, -1)))


def rank_correlation(x: Floats, y: Floats, score: Score, generator: np.random.Generator) -> dict[str, Any]:
    """The coefficient, its two-sided p-value by permutations, and a 95 % interval by resampling the settings."""
    value = correlate(score(x), score(y)).item()
    shuffled = generator.permuted(np.tile(y, (RESAMPLINGS, 1)), axis=1)
    as_far = np.abs(correlate(score(x), score(shuffled))) >= abs(value) - 1e-12  # equal but for rounding
    drawn = generator.integers(len(x), size=(RESAMPLINGS, len(x)))
    interval = np.nanquantile(correlate(score(x[drawn]), score(y[drawn])), [0.025, 0.975])
    return {"value": value, "p": (1 + as_far.sum()) / (1 + RESAMPLINGS), "interval": interval.tolist()}


def all_correlations(rows: Sequence[dict[str, Any]], seed: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Of the step counts with each quantity, over all settings and within each family: [group][quantity]."""
    generator = np.random.default_rng(seed)
    groups = {"all": list(rows)} | {family: [r for r in rows if r["family"] == family] for family in FAMILIES}
    return {
        group: {
            name: {"settings": len(members)}
            | {
                method.__name__: rank_correlation(_column(members, "steps"), _column(members, name), method, generator)
                for method in (spearman, kendall)
            }
            for name in RANKED
        }
        for group, members in groups.items()
        if len(members) > 2
    }


def one_knob(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[int]]]:
    """Pairs of settings that differ in one knob only: [in how many the faster has more, pairs], by [knob][quantity].

    What sweeps of several knobs at once hide where they go in opposite directions.
    """
    kept = {"lr": ("family", "batch", "momentum"), "batch": ("family", "lr", "momentum")}
    found: dict[str, dict[str, list[int]]] = {}
    for knob, same in kept.items():
        pairs = [(a, b) for a, b in permutations(rows, 2) if all(a[key] == b[key] for key in same)]
        pairs = [(a, b) for a, b in pairs if a["steps"] < b["steps"]]
        found[knob] = {name: [int(sum(a[name] > b[name] for a, b in pairs)), len(pairs)] for name in RANKED}
    return found


def _column(rows: Sequence[dict[str, Any]], name: str) -> Floats:
    return np.array([row[name] for row in rows])


def beaten_by_none(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Settings that no other has both fewer steps and less action than, in the mean over seeds."""
    return [
        row["name"]
        for row in sorted(rows, key=lambda row: row["steps"])
        if not any(other["steps"] < row["steps"] and other["action"] < row["action"] for other in rows)
    ]


# --- what is shown


def main() -> None:
    options = parse(__doc__.splitlines()[0])
    settings, full_batch, seeds, target = SWEEP, FULL_BATCH, range(options.seed, options.seed + SEEDS), TARGET
    if options.quick:
        settings, full_batch, seeds, target = QUICK, FULL_BATCH[1:3], range(options.seed, options.seed + 1), 0.5
    names = {"target": target, "max_steps": MAX_STEPS, "seeds": list(seeds), "resamplings": RESAMPLINGS}
    report = Report("sweep", options, names)
    rows = sweep(settings, seeds, target, "settings")
    full = sweep(full_batch, seeds, target, "full batch")
    limit = limit_of_flow(full)
    reached = [row for row in rows if row["reached"]]
    correlations = all_correlations(reached, options.seed)
    best = beaten_by_none(reached)
    knobs = one_knob(reached)
    report.add(settings=columns(rows), full_batch=columns(full), flow=limit)
    report.add(correlations=correlations, faster_has_more=knobs, beaten_by_none=best)
    say(report, [*full, *rows], limit, correlations, knobs)
    save(report, reached, full, limit)


def say(report: Report, rows: Sequence[dict[str, Any]], limit: dict[str, float], correlations: Any, knobs: Any) -> None:
    report.say("setting, batch", "steps", "efficiency", "kinematic", "straight", "steady", "conversion", "signal", "A")
    for row in rows:
        report.say(
            row["name"] + ("" if row["reached"] else " *"),
            f"{row['steps']:.0f}",
            f"[{row['efficiency_low']:.2f}, {row['efficiency']:.2f}]",
            *(f"{row[name]:.3f}" for name in ("kinematic_efficiency", "straightness", "steadiness", "conversion")),
            f"{row['signal_fraction']:.3f}",
            f"{row['action']:.3g}",
        )
    names = ("kinematic_efficiency", "straightness", "steadiness", "conversion", "signal_fraction")
    report.say("flow: lr → 0", "", f"{limit['efficiency']:.2f}", *(f"{limit[name]:.3f}" for name in names))
    report.say("")
    report.say("ranks: steps with", *(name.replace("_efficiency", "").replace("_", " ") for name in RANKED))
    for group, found in correlations.items():
        count = next(iter(found.values()))["settings"]
        for method in ("spearman", "kendall"):
            cells = [f"{found[name][method]['value']:+.2f} (p {found[name][method]['p']:.2g})" for name in RANKED]
            report.say(f"{group} ({count} settings), {method.title()}", *cells)
    report.say("")
    for knob, found in knobs.items():
        cells = [f"{more} of {count}" for more, count in (found[name] for name in RANKED)]
        report.say(f"only {knob} differs: the faster has more in", *cells)


def save(
    report: Report,
    rows: Sequence[dict[str, Any]],
    full: Sequence[dict[str, Any]],
    limit: dict[str, float],
) -> None:
    with figure(3, width=4.2, height=4.2) as (drawn, axes):
        draw_plane(axes[0], rows, full)
        draw_against_steps(axes[1], rows, full, limit, "efficiency", "Efficiency η (bar: down to its lower end)")
        draw_against_steps(axes[2], rows, full, limit, "conversion", "Conversion (on a line only lr differs)")
        handles = {
            label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        drawn.legend(handles.values(), handles, loc="outside lower center", ncols=4)
        report.save(drawn)


def draw_settings(axis: Any, rows: Sequence[dict[str, Any]], full: Sequence[dict[str, Any]], name: str) -> None:
    """A quantity against steps: a marker for each family, larger for larger batches."""
    for row in rows:
        n = FAMILIES.index(row["family"])
        size = 2.0 + 1.5 * math.log(row["batch"] / 8, 8)
        axis.plot(row["steps"], row[name], MARKERS[n], color=COLOURS[n + 1], mfc="none", ms=size * 1.4)
    for n, family in enumerate(FAMILIES):
        label = f"{family} (larger: batch 16, 128, 1024)"
        axis.plot([], [], MARKERS[n], color=COLOURS[n + 1], mfc="none", label=label)
    axis.plot(_column(full, "steps"), _column(full, name), "x", color=COLOURS[0], label="SGD, all images")
    axis.set(xscale="log", xlim=(30, 4000), xlabel=f"elapsed τ (steps to loss {TARGET:g})")


def draw_plane(axis: Any, rows: Sequence[dict[str, Any]], full: Sequence[dict[str, Any]]) -> None:
    """(elapsed, action) with τ·A = D² for one setting of each family."""
    draw_settings(axis, rows, full, "action")
    t = np.array([30, 4000])
    for line, name in zip(("-", "--", ":"), HYPERBOLAS, strict=True):
        row = next((row for row in rows if row["name"] == name), None)
        if row is not None:
            n = FAMILIES.index(row["family"])
            axis.plot(t, row["displacement"] ** 2 / t, line, color=COLOURS[n + 1], lw=1.2, label=f"τ·A = D² of {name}")
            axis.plot(row["steps"], row["action"], MARKERS[n], color=COLOURS[n + 1], ms=4.9)
    axis.set(yscale="log", ylabel="action A (parameter²/step)")
    axis.set_title("Time and action at equal loss (filled: of the lines)")


def draw_against_steps(
    axis: Any,
    rows: Sequence[dict[str, Any]],
    full: Sequence[dict[str, Any]],
    limit: dict[str, float],
    name: str,
    title: str,
) -> None:
    draw_settings(axis, rows, full, name)
    for n, family in enumerate(FAMILIES):
        members = [row for row in rows if row["family"] == family]
        if name == "efficiency":
            lower, upper = _column(members, "efficiency_low"), _column(members, name)
            axis.vlines(_column(members, "steps"), lower, upper, color=COLOURS[n + 1], lw=1)
            continue
        for key in sorted({(row["batch"], row["momentum"]) for row in members}):
            line = sorted((r for r in members if (r["batch"], r["momentum"]) == key), key=lambda r: r["steps"])
            axis.plot(_column(line, "steps"), _column(line, name), "-", color=COLOURS[n + 1], lw=0.8)
    axis.axhline(limit[name], color=COLOURS[0], lw=1, ls="-.", label="gradient flow: all images, lr → 0")
    axis.set(ylabel=name)
    axis.set_title(title)


if __name__ == "__main__":
    main()
