"""The runs of warm_up.py: what a run's beginning says, and what it came to with and without warm-up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from lab import Lab
from sets import Set
from trainings import Run, Training, flat

from lightning_speedlimit import RunRecord

Row = dict[str, Any]
OPTIMIZERS = ("Adam", "momentum")
LENGTHS = (2, 30)  # of warm-up besides 10, % of the steps: Adam's, at the best rate and at √10 times that
EARLY, PROBE = 20, 1000  # the first stretch is 1/EARLY of the steps; samples of its mean loss
SEARCHED = 100  # the seed of the best rates
STEP = math.sqrt(10.0)  # from one rate to the next
GAIN, ERRORS = 0.01, 2.0  # what warm-up has to save at least: of the loss, and in standard errors


@dataclass(frozen=True)
class Net:
    """rates: where the search begins. judged: of the half that no threshold was fixed on."""

    name: str
    data: str
    net: str
    options: Mapping[str, Any]
    rates: Mapping[str, float]
    judged: bool


SMALL, LARGE = {"Adam": 1e-3, "momentum": 1e-2}, {"Adam": 1e-3 * STEP, "momentum": 1e-2 * STEP}
NETS = (
    Net("MLP", "fashion-mnist", "MLP", {}, SMALL, False),
    Net("CNN, BatchNorm", "cifar10", "CNN", {"norm": True}, LARGE, False),
    Net("transformer, norm first", "text", "transformer", {}, LARGE, False),
    Net("MLP, LayerNorm", "fashion-mnist", "MLP", {"norm": True}, LARGE, True),
    Net("CNN", "cifar10", "CNN", {}, SMALL, True),
    Net("transformer, norm last", "text", "transformer", {"norm_first": False}, LARGE, True),
)


@dataclass(frozen=True)
class Plan:
    """powers: of √10, times the best rate."""

    examples: int
    steps: int
    seeds: Sequence[int]
    nets: Sequence[Net]
    powers: Sequence[int]


FULL = Plan(10_000, 150, range(5), NETS, (-2, -1, 0, 1, 2))
QUICK = Plan(500, 40, (0, 1), (NETS[0], NETS[3]), (0, 2))


# --- the runs


class Runs:
    """Of one network with one optimizer."""

    def __init__(self, lab: Lab, plan: Plan, net: Net, optimizer: str, data: Set) -> None:
        self.lab, self.plan, self.net, self.optimizer, self.data = lab, plan, net, optimizer, data

    def _training(self, power: int, seed: int) -> Training:
        rate = float(f"{self.net.rates[self.optimizer] * STEP**power:.4g}")
        plain = Training(self.data.name, self.net.net, self.optimizer, rate, 32, self.plan.steps, seed)
        return replace(plain, schedule="linear", net_options=self.net.options)

    def best(self) -> int:
        """The power of √10 that is best, from the first rate on, as long as it gets better."""

        def tried(power: int) -> float:
            training = self._training(power, SEARCHED)
            return float(self.lab.rows("search", [training.key], lambda _: {"loss": self._end(training)})[0]["loss"])

        power = 0
        for way in (1, -1):
            while abs(power + way) <= 4 and tried(power + way) < tried(power):
                power += way
        return power

    def _end(self, training: Training) -> float:
        run = Run(training, self.data, measured=False)
        before = run.held_loss()
        return capped(run.go(looks=1).course.losses[-1], before)

    def all(self) -> None:
        best = self.best()
        wanted = {
            str(self._key(*at, best)): (self._key(*at, best), *at) for at in product(self.plan.powers, self.plan.seeds)
        }

        def found(key: Mapping[str, Any], percents: Sequence[int]) -> Row:
            _, power, seed = wanted[str(key)]
            return self._row(self._training(best + power, seed), percents)

        self.lab.rows("runs", [key for key, *_ in wanted.values()], lambda key: found(key, (0, 10)))
        if self.optimizer == "Adam":
            near = [key for key, power, _ in wanted.values() if power in (0, 1)]
            self.lab.rows("lengths", near, lambda key: found(key, LENGTHS))

    def _key(self, power: int, seed: int, best: int) -> Row:
        rate = self._training(best + power, seed).rate
        return {"network": self.net.name, "optimizer": self.optimizer, "rate": rate, "power": power, "seed": seed}

    def _row(self, training: Training, percents: Sequence[int]) -> Row:
        row = Row()
        for percent in percents:
            run = Run(replace(training, warm_up=percent / 100), self.data, measured=percent == 0)
            row |= course(run, str(percent))
        return row


def capped(loss: float, start: float) -> float:
    return min(loss, start) if math.isfinite(loss) else start


def course(run: Run, name: str) -> Row:
    """loss_n at the end, steadiness_n of the path, longest_n: the longest update, as a share of the weights.

    Of a run that is measured, besides, what `early` says.
    """
    start, lengths, shares, row = run.held_loss(), list[float](), list[float](), Row()
    steps, first = run.training.steps, max(4, round(run.training.steps / EARLY))
    every = torch.arange(min(PROBE, len(run.data.inputs)))
    loss = mean_loss(run, every) if run.meter else math.nan
    before = flat(run.network)
    while run.step < steps and before.isfinite().all():
        run.advance()
        after = flat(run.network)
        lengths.append(float((after - before).norm()))
        shares.append(lengths[-1] / float(before.norm()))
        before = after
        if run.meter and run.step == first:
            run.record.take(run.meter)
            run.meter.close()
            run.meter = None
            row = {"start": start, **early(run.record), "drop": loss - mean_loss(run, every)}
            row["longest_early"] = max(shares)
    row[f"loss_{name}"] = capped(run.held_loss(), start)
    row[f"steadiness_{name}"] = sum(lengths) ** 2 / (len(lengths) * sum(length**2 for length in lengths))
    return row | {f"longest_{name}": max(shares)}


@torch.no_grad()
def mean_loss(run: Run, index: torch.Tensor) -> float:
    """Of batches as training sees them; what a norm remembers of batches stays as it was."""
    remembered = {name: buffer.clone() for name, buffer in run.network.named_buffers()}
    parts = index.split(run.training.batch)
    found = sum(float(run.loss(part)) * len(part) for part in parts) / len(index)
    for name, buffer in run.network.named_buffers():
        buffer.copy_(remembered[name])
    return found


def early(record: RunRecord) -> Row:
    """work W, signal a (of as many steps as W), steadiness_early."""
    last = {name: float(column[-1]) for name, column in record.columns.items()}
    met = 2.0 * last["work_stratonovich"] - last["work_anti_ito"]
    signal = last["work_anti_ito"] * last["work_ito"] / met
    return {"work": last["work_ito"], "signal": signal, "steadiness_early": last["steadiness"]}
