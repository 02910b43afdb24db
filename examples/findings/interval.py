"""The interval of one run, held to eight replicas from one start.

    python interval.py --data FOLDER --output ../../docs/findings

One run has two ends for the efficiency of its drift: all of its displacement, and that without the random motion which
the batches may have caused. Replicas from one θ_0 tell the truth: ⟨Δθᵃ, Δθᵇ⟩ of two of them with different batches has
no random motion in it on average. Four trainings that the estimate was not made on, two batch sizes, three lengths.

Fixed before the runs:

 1. Bracket. In at least 23 of the 24 settings the truth lies between the replicas' mean `efficiency_low` and mean
    `efficiency`, give or take two of its standard errors. Of 100 brackets of single runs at least 95 hold the truth,
    give or take two standard errors of the truth and, where it is estimated, of the run's loss drop.
 2. Estimate. On each training the root mean square error of `efficiency_drift` over single runs is at most half of that
    of each end, and of the end that the package had before (`efficiency_lower`).
 3. Exponent. ⅔ in s was found on other runs. With ½ or 1 (where s = 1) the error over all settings is larger.

Without replacement the noise of an epoch's batches adds up to nothing at its end: there 2 may well fail.

The transformer and the last CNN at batch 128 ran after the other 18 settings were known, by the same plan. All was
then read again with (Σ lr)²/Σ lr² in place of the K steps, which closed forms had shown to be right under a schedule.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lab import COLOURS, MARKERS, Lab, begin, mean_of, number
from sets import Set, load
from torch import Tensor
from training import rounded
from trainings import Run, Training, flat

REPLICAS = 8
BATCHES = (16, 128)
STEPS, SAMPLES = 2400, 16384
READ_AT = (0.1, 1 / 3, 1.0)  # shares of the run
EXPONENT = 2 / 3
OLD, DRIFT = "efficiency_lower", "efficiency_drift"
NAMES = ("efficiency", "efficiency_low", DRIFT, OLD)
# What of a replica is kept: sums of the run up to a reading, and what is made of them.
KEPT = ("steps", "numerator", "work_ito", "work_met", "work_anti_ito", "work_decay", "loss_drop", "loss_drop_se",
        "true_drop", "old_noise", "rate_sum", "rate_squares")  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A training; gain: c, steady over instantaneous response; memory: β; probed: the run measures its loss drop on
    all samples, else it has its training losses."""

    training: Training
    gain: float
    memory: float
    probed: bool = True


def kinds(steps: int) -> dict[str, Kind]:
    def of(data: str, net: str, optimizer: str, rate: float, **more: Any) -> Training:
        return Training(data, net, optimizer, rate, 0, steps, 0, **more)

    return {
        "MLP, momentum, cosine": Kind(
            of("fashion-mnist", "MLP", "momentum", 0.01, schedule="cosine"), 1 / (1 - 0.9), 0.9
        ),
        "CNN, Adam, epochs": Kind(of("mnist", "CNN", "Adam", 1e-3, epochs=True), 1 / (1 - 0.9), 0.9),
        "transformer, AdamW, warm-up": Kind(
            of("text", "transformer", "AdamW", 2e-3, warm_up=0.1, decay=0.1), 1 / (1 - 0.9), 0.9
        ),
        "CNN, SGD, L2, no probe": Kind(
            of("cifar10", "CNN", "SGD", 0.05, decay=5e-4, net_options={"width": 16}),
            1.0,
            0.0,
            probed=False,
        ),
    }


class Works:
    """Σ f_k·u_k, Σ f_{k+1}·u_k and their difference weighted with the rate, in plain float64, apart from the meter."""

    def __init__(self, run: Run) -> None:
        self._network, self._optimizer = run.network, run.optimizer
        self._l2, decay = 0.0, run.training.decay
        if isinstance(run.optimizer, torch.optim.AdamW):
            self._decay = decay
        else:
            self._l2, self._decay = decay, 0.0
        self.start = flat(run.network)
        self.travelled = torch.zeros_like(self.start)
        self.ito = self.met = self.anti_ito = self.decay = self.noise = 0.0
        self.rates: list[float] = []
        self._update: Tensor | None = None
        self._work = 0.0
        self._optimizer.register_step_pre_hook(lambda *_: self._before())
        self._optimizer.register_step_post_hook(lambda *_: self._after())

    def _before(self) -> None:
        self._weights = flat(self._network)
        gradient = torch.cat([p.grad.flatten() for p in self._network.parameters()]).double()
        self._force = -(gradient + self._l2 * self._weights)
        if self._update is not None:
            anti = float(self._force @ self._update)
            self.met, self.anti_ito = self.met + self._work, self.anti_ito + anti
            self.noise += self.rates[-1] * (self._work - anti)

    def _after(self) -> None:
        rate = float(self._optimizer.param_groups[0]["lr"])
        decayed = -rate * self._decay * self._weights
        self._update = flat(self._network) - self._weights - decayed
        self._work = float(self._force @ self._update)
        self.ito, self.decay = self.ito + self._work, self.decay + float(self._force @ decayed)
        self.travelled += self._update
        self.rates.append(rate)

    def l2_drop(self) -> float:
        return 0.5 * self._l2 * float(self.start @ self.start - (now := flat(self._network)) @ now)

    def old_noise(self, gain: float) -> float:
        """N as `efficiency_lower` had it: c Σ lr_k n_k/Σ lr_k, Σ n_k clamped to [0, work_ito]."""
        raw = self.met - self.anti_ito
        if raw <= 0.0:
            return 0.0
        return gain * max(0.0, self.noise) / sum(self.rates[:-1]) * min(raw, max(0.0, self.ito)) / raw


@torch.no_grad()
def losses(run: Run) -> Tensor:
    """Mean losses of all training samples, in eight chunks of one size."""
    parts = torch.arange(len(run.data.inputs)).chunk(8)
    return torch.stack([run.loss(part) for part in parts]).double()


def replica(kind: Kind, data: Set, order: int, reads: Sequence[int]) -> list[tuple[dict[str, float], Tensor, Tensor]]:
    """At each reading what KEPT names, Δθ without decoupled decay, and m."""
    run = Run(kind.training, data, order=order)
    works, first = Works(run), losses(run)
    found = []
    for read in reads:
        while run.step < read:
            run.advance()
        now = losses(run)
        if kind.probed:
            run.meter.record_probe(first, now)
        values = run.meter.compute()
        mobility = torch.cat([run.meter.accumulated_mobility(p).flatten() for p in run.network.parameters()]).double()
        moved = works.travelled.clone()
        row = {
            "steps": float(read),
            "numerator": float(weighted(moved, moved, mobility)),
            "work_ito": works.ito,
            "work_met": works.met,
            "work_anti_ito": works.anti_ito,
            "work_decay": works.decay,
            "loss_drop": values["loss_drop"],
            "loss_drop_se": values["loss_drop_se"],
            "true_drop": float((first - now).mean()) + works.l2_drop(),
            "old_noise": works.old_noise(kind.gain),
            "rate_sum": math.fsum(works.rates),
            "rate_squares": math.fsum(rate * rate for rate in works.rates),
        }
        found.append((row, moved, mobility))
    run.meter.close()
    return found


def weighted(a: Tensor, b: Tensor, mobility: Tensor) -> Tensor:
    """Σ a_i b_i/m_i; what has no mobility has not moved."""
    return torch.where(mobility > 0, a * b / mobility, torch.zeros_like(a)).sum()


def measured(kind: Kind, data: Set, replicas: int, reads: Sequence[int]) -> dict[str, Any]:
    """KEPT by reading and replica, and `overlaps`, Σ_i Δθ_iᵃ Δθ_iᵇ/m_i with the replicas' mean m, of each pair."""
    runs = [replica(kind, data, 100 + order, reads) for order in range(replicas)]
    found: dict[str, Any] = {name: [[run[at][0][name] for run in runs] for at in range(len(reads))] for name in KEPT}
    found["overlaps"] = []
    for at in range(len(reads)):
        mobility = torch.stack([run[at][2] for run in runs]).mean(0)
        moved = torch.stack([run[at][1] for run in runs])
        scaled = torch.where(mobility > 0, moved / mobility, torch.zeros_like(moved))
        found["overlaps"].append((scaled @ moved.T).tolist())
    return {name: _rounded(value) for name, value in found.items()}


def _rounded(value: Any) -> Any:
    return [_rounded(part) for part in value] if isinstance(value, list) else rounded(value)


# --- what the rows say


def truth(overlaps: Sequence[Sequence[float]], drops: Sequence[float]) -> tuple[float, float]:
    """Mean of the overlaps over pairs a ≠ b / mean loss drop, and its standard error by the jackknife over replicas."""
    count = len(drops)

    def of(left: Sequence[int]) -> float:
        pairs = [overlaps[a][b] for a in left for b in left if a != b]
        return math.fsum(pairs) / len(pairs) / (math.fsum(drops[a] for a in left) / len(left))

    without = [of([b for b in range(count) if b != a]) for a in range(count)]
    middle = math.fsum(without) / count
    return of(range(count)), math.sqrt((count - 1) / count * math.fsum((t - middle) ** 2 for t in without))


def slowing(q: float, exponent: float = EXPONENT) -> float:
    """s = ((1 + 2q/p)^p − 1)/2q: 1 at q = 0, falling; the share of the diffusion that curvature leaves."""
    return 1.0 if q < 1e-9 else ((1 + 2 * q / exponent) ** exponent - 1) / (2 * q)


def estimates(
    kind: Kind, run: Mapping[str, float], exponent: float = EXPONENT, alike: bool = False
) -> dict[str, float]:
    """NAMES of one run from its sums, K being (Σ lr)²/Σ lr². alike: all steps instead, whatever their rate."""
    drop = run["loss_drop"]
    fallen, anti = drop - run["work_decay"], run["work_anti_ito"] * run["work_ito"] / run["work_met"]
    noise = max(0.0, run["work_ito"] + anti - 2 * fallen)
    curvature = max(0.0, 2 * (fallen - anti))
    steps = run["steps"] if alike else run["rate_sum"] ** 2 / run["rate_squares"]
    random = kind.gain * noise / steps
    s = slowing(2 * steps * (1 + kind.memory) * curvature / noise, exponent) if noise else 1.0
    return {
        "efficiency": run["numerator"] / drop,
        "efficiency_low": (run["numerator"] - random) / drop,
        DRIFT: (run["numerator"] - s * random) / drop,
        OLD: (run["numerator"] - run["old_noise"]) / drop,
    }


VARIANTS = {
    "drift, exponent 1/2": {"exponent": 0.5},
    "drift, all steps alike": {"alike": True},
}


def judged(kind: Kind, row: Mapping[str, Any], at: int) -> dict[str, Any]:
    """One setting: truth, mean and error of each estimate, and how many brackets hold the truth.

    share of …: of the bracket that lies above it, which is the share of the diffusion that is left.
    """
    runs = [{name: row[name][at][i] for name in KEPT} for i in range(len(row["steps"][at]))]
    known, error = truth(row["overlaps"][at], [run["true_drop"] for run in runs])
    of_runs = [estimates(kind, run) for run in runs]
    found = {"training": row["training"], "batch": row["batch"], "steps": runs[0]["steps"], "truth": known}
    found |= {"truth_se": error, "loss_drop": mean_of([run["loss_drop"] for run in runs]).value}
    margins = [
        2 * error if kind.probed else 2 * math.hypot(error, known * run["loss_drop_se"] / run["loss_drop"])
        for run in runs
    ]
    values = {name: [each[name] for each in of_runs] for name in NAMES}
    for name, more in VARIANTS.items():
        values[name] = [estimates(kind, run, **more)[DRIFT] for run in runs]
    for name, each in values.items():
        found |= {name: mean_of(each).value, f"{name}: rms": rms(each, known), f"{name}: worst": worst(each, known)}
    width = found["efficiency"] - found["efficiency_low"]
    found |= {f"share of {name}": (found["efficiency"] - found[name]) / width for name in ("truth", DRIFT)}
    low, high = found["efficiency_low"] - 2 * error, found["efficiency"] + 2 * error
    found["holds"] = int(low <= known <= high)
    ends = zip(values["efficiency_low"], values["efficiency"], margins, strict=True)
    found["held"] = sum(low - margin <= known <= high + margin for low, high, margin in ends)
    return found | {"replicas": len(runs)}


def rms(values: Sequence[float], known: float) -> float:
    return math.sqrt(math.fsum((value - known) ** 2 for value in values) / len(values))


def worst(values: Sequence[float], known: float) -> float:
    """The error of the largest size, with its sign."""
    return max((value - known for value in values), key=abs)


def summed_up(settings: Sequence[Mapping[str, Any]], training: str) -> dict[str, Any]:
    """Of the settings of one training, or of all: errors over single runs, and what the brackets hold."""
    own = [row for row in settings if training in (row["training"], "all")]
    found: dict[str, Any] = {"training": training, "settings": len(own)}
    for name in (*NAMES, *VARIANTS):
        found[f"{name}: rms"] = math.sqrt(math.fsum(row[f"{name}: rms"] ** 2 for row in own) / len(own))
        found[f"{name}: worst"] = max((row[f"{name}: worst"] for row in own), key=abs)
    return found | {name: sum(row[name] for row in own) for name in ("holds", "held", "replicas")}


def draw(lab: Lab, settings: Sequence[Mapping[str, Any]]) -> None:
    """A panel for each training: what one run says on average, and what its replicas know."""
    names = list(dict.fromkeys(row["training"] for row in settings))
    with lab.picture(2, -(-len(names) // 2), width=4.6, height=3.0) as (drawn, axes):
        for axis, name in zip(axes.flat, names, strict=True):
            own = [row for row in settings if row["training"] == name]
            draw_training(axis, own)
            axis.set_title(name)
            axis.set_ylabel("efficiency (no unit)")
        handles, labels = axes.flat[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=4)


def draw_training(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    places = [place + (row["batch"] != rows[0]["batch"]) for place, row in enumerate(rows)]

    def of(name: str) -> list[float]:
        return [row[name] for row in rows]

    axis.bar(
        places,
        [high - low for low, high in zip(of("efficiency_low"), of("efficiency"), strict=True)],
        width=0.5,
        bottom=of("efficiency_low"),
        color=COLOURS[6],
        alpha=0.5,
        label="bracket of one run",
    )
    axis.plot(places, of(DRIFT), MARKERS[3], color=COLOURS[1], markersize=7, label="estimate in it")
    axis.plot(places, of(OLD), MARKERS[6], color=COLOURS[2], label="lower end before")
    axis.errorbar(
        places,
        of("truth"),
        [2 * error for error in of("truth_se")],
        fmt="_",
        color=COLOURS[0],
        markersize=13,
        markeredgewidth=1.8,
        label="truth from replicas (± 2 standard errors)",
    )
    axis.axhline(0, color=COLOURS[0], linewidth=0.6)
    axis.set_xticks(places, [f"{row['steps']:.0f}" for row in rows])
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    axis.set_xlabel(f"steps, batch {' on the left, '.join(map(str, batches))}{' on the right' * (len(batches) > 1)}")
    axis.grid(visible=False, axis="x")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="part of a training's name: the others as far as they are known")
    options = begin(__doc__, parser)
    lab = Lab("interval", options)
    steps, samples, replicas = (60, 480, 3) if options.quick else (STEPS, SAMPLES, REPLICAS)
    reads = [round(share * steps) for share in READ_AT]
    trainings = kinds(steps)

    def compute(key: Mapping[str, Any]) -> dict[str, Any]:
        kind = trainings[key["training"]]
        data = load(kind.training.data, options.data, samples)
        kind = replace(kind, training=replace(kind.training, batch=key["batch"]))
        return measured(kind, data, replicas, reads)

    batches = BATCHES[:1] if options.quick else BATCHES
    keys = [{"training": name, "batch": batch} for name in trainings for batch in batches]
    lab.rows("replicas", [key for key in keys if options.more.only in key["training"]], compute)
    rows = [row for key in keys if (row := lab.find("replicas", key)) is not None]
    lab.results.replace("replicas", rows)
    settings = [judged(trainings[row["training"]], row, at) for row in rows for at in range(len(reads))]
    lab.results.replace("settings", settings)
    known = dict.fromkeys(row["training"] for row in rows)
    summary = [summed_up(settings, name) for name in (*known, "all")]
    lab.results.replace("summary", summary)
    draw(lab, settings)
    for row in summary:
        errors = "  ".join(f"{name} {number(row[f'{name}: rms'], 2)}" for name in (*NAMES, *VARIANTS))
        held = f"{row['holds']} of {row['settings']} settings, {row['held']} of {row['replicas']} runs"
        print(f"{row['training']}: rms {errors}; the bracket holds in {held}")


if __name__ == "__main__":
    main()
