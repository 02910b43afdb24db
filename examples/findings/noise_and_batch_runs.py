"""The runs of noise_and_batch.py: B_c by the run and by its samples' gradients, and batches that follow B_c."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any

import numpy as np
import torch
from lab import Lab
from sets import Set
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from trainings import Run, Training

from lightning_speedlimit import RunRecord

Row = dict[str, Any]
TRUTH_AT, MEAN_OF, SINGLE = 30, 256, 32  # points of a stretch; samples of the mean gradient, and of the single ones
RATES = {"MLP": 0.1, "CNN": 0.05, "transformer": 0.2}  # of SGD
ADAM = {"MLP": 1e-3, "CNN": 2e-3, "transformer": 2e-3}
FIRST, LEAST, MOST = 16, 8, 1024  # batch of a schedule's beginning, and the bounds of what it may become
GROWTH, AIM = 1.5, 64.0  # of stretches; the geometric mean of batch and B_c at B = B_c
SEARCHED = 100  # the seed of rates and levels


@dataclass(frozen=True)
class Plan:
    """law: sets and networks, with so many `examples`; `ends`: the steps at which stretches end; looked: steps
    of the overlap of full gradients.

    schedules: sets and networks, with `pool` examples. level_at: steps of the run at batch 64 whose loss is the level.
    batches: constant ones. most: √(steps · samples). powers: of 2, that a rate is searched over at most.
    """

    seeds: Sequence[int]
    law: Sequence[tuple[str, str]]
    examples: int
    ends: Sequence[int]
    looked: int
    schedules: Sequence[tuple[str, str]]
    pool: int
    level_at: int
    batches: Sequence[int]
    most: float
    powers: int


FULL = Plan(
    seeds=range(5),
    law=(("fashion-mnist", "MLP"), ("cifar10", "CNN")),
    examples=4000,
    ends=(30, 60, 120, 240, 480),
    looked=240,
    schedules=(("fashion-mnist", "MLP"), ("cifar10", "CNN")),
    pool=10_000,
    level_at=200,
    batches=(32, 64, 128, 256, 512),
    most=10_000.0,
    powers=5,
)
QUICK = Plan((0,), FULL.law[:1], 500, (30, 60), 12, FULL.schedules[:1], 500, 40, (16, 64), 500.0, 1)


# --- the law


def law_trainings(plan: Plan) -> Iterator[Training]:
    """SGD, momentum and Adam for each task; SGD where it may fail for the MLP."""
    for (data, net), seed in product(plan.law, plan.seeds):
        plain = Training(data, net, "SGD", RATES[net], 32, plan.ends[-1], seed)
        yield plain
        yield replace(plain, optimizer="momentum", rate=RATES[net] / 10)
        yield replace(plain, optimizer="Adam", rate=ADAM[net])
        if net == "MLP":
            yield replace(plain, rate=4 * RATES[net])
            yield replace(plain, batch=8)


def measured_law(training: Training, data: Set, ends: Sequence[int]) -> Row:
    """B_c in samples of the n-th stretch: told_n, true_n, their standard errors …_se_n; SGD: own_n, by batch losses."""
    run, every = Run(training, data), torch.arange(len(data.inputs))
    known, draw = RunRecord(run.record.run | {"probe_batches": 1}), torch.Generator().manual_seed(training.seed)
    first, row = mean_loss(run, every), Row()
    for stretch, (begin, end) in enumerate(pairwise((0, *ends))):
        points, apart = list[tuple[float, float]](), max(1, (end - begin) // TRUTH_AT)
        for step in range(begin, end):
            if (step - begin) % apart == apart // 2:
                points.append(gradient_moments(run, draw))
            run.advance()
            if (step + 1 - begin) % ((end - begin) // 10) == 0:
                run.record.take(run.meter, {"samples": float(training.batch * run.step)})
                drop = first - mean_loss(run, every) if run.step == end else math.nan
                values = {name: column[-1] for name, column in run.record.columns.items() if name != "step"}
                known.append(run.step, values | {"loss_drop": drop, "loss_drop_se": 0.0})
        told, true = known.tuning(begin, end)["critical_batch_size"], ratio_of_means(points)
        row |= {f"told_{stretch}": told.value, f"told_se_{stretch}": told.standard_error}
        row |= {f"true_{stretch}": true[0], f"true_se_{stretch}": true[1]}
        if training.optimizer == "SGD":
            row[f"own_{stretch}"] = run.record.tuning(begin, end)["critical_batch_size"].value
    run.meter.close()
    return row


def measured_overlap(training: Training, data: Set, steps: int) -> Row:
    """Σ F_k·F_{k−1} and Σ F_k·g_{k−1} over Σ ‖F_k‖², F of all samples: what an overlap can know of ‖F‖²."""
    run, every = Run(training, data, measured=False), torch.arange(len(data.inputs))
    weights, sums = list(run.network.parameters()), np.zeros(3)

    def joined(parts: Iterable[Tensor]) -> Tensor:
        return torch.cat([part.flatten() for part in parts]).double()

    def force() -> Tensor:
        return joined(torch.autograd.grad(run.loss(every), weights))

    while run.step < steps:
        looks = run.step % 4 == 3
        before = force() if looks else None
        run.advance()
        if before is not None:
            after, own = force(), joined(weight.grad for weight in weights)
            sums += [float(after @ before), float(after @ own), float(after @ after)]
    return {"full": sums[0] / sums[2], "own": sums[1] / sums[2]}


def ratio_of_means(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Σ x/Σ y and its standard error, as if the points were independent."""
    x, y = np.array(points).T
    found = float(x.sum() / y.sum())
    return found, float(np.std(x - found * y, ddof=1) / y.mean() / math.sqrt(len(x)))


@torch.no_grad()
def mean_loss(run: Run, index: Tensor) -> float:
    return float(run.loss(index))


def gradient_moments(run: Run, draw: torch.Generator) -> tuple[float, float]:
    """tr Σ and ‖F‖² over the training set, each without bias, from samples drawn out of it without replacement.

    E‖g‖² = ‖F‖² + tr Σ of single gradients, E‖ḡ‖² = ‖F‖² + c tr Σ of the mean of n out of N, c = (N − n)/(n (N − 1)).
    """
    of, parameters = len(run.data.inputs), dict(run.network.named_parameters())
    chosen = torch.randperm(of, generator=draw)[: min(of, MEAN_OF)]
    mean = torch.autograd.grad(run.loss(chosen), list(parameters.values()))
    weights = {name: parameter.detach() for name, parameter in parameters.items()}

    def loss(w: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(run.network, w, (x[None],)).flatten(0, -2), y.flatten())

    some = chosen[:SINGLE]
    with sdpa_kernel(SDPBackend.MATH):
        each = vmap(grad(loss), (None, 0, 0))(weights, run.data.inputs[some], run.data.targets[some])
    single = sum(float(g.flatten(1).norm(dim=1).square().sum()) for g in each.values()) / len(some)
    together = sum(float(g.norm()) ** 2 for g in mean)
    share = (of - len(chosen)) / (len(chosen) * (of - 1))
    scatter = (single - together) / (1 - share)
    return scatter, single - scatter


# --- schedules of the batch

FOLLOWED: dict[str, Callable[[int, float], float]] = {  # (step, B_c) → batch
    "root": lambda step, critical: math.sqrt(AIM * critical),
    "share": lambda step, critical: critical / 2,
    "blind": lambda step, critical: step / 2,
}


def followed(policy: str, step: int, critical: float) -> int:
    return min(MOST, max(LEAST, round(FOLLOWED[policy](step, critical))))


class Fed(Run):
    """With a batch that `policy` sets anew at the end of each stretch; a number: that batch throughout."""

    def __init__(self, training: Training, data: Set, policy: str) -> None:
        self.batch = FIRST if policy in FOLLOWED else int(policy)
        self.policy, self.samples, self.critical = policy, [0], [math.nan]
        super().__init__(training, data, measured=policy in FOLLOWED and policy != "blind")
        self._begin = 0

    def _replaced(self) -> Iterator[Tensor]:
        while True:
            yield torch.randint(len(self.data.inputs), (self.batch,), generator=self._draw)

    def to(self, level: float, most: float) -> Row:
        """steps_to and samples_to the level of the smoothed held-out loss; NaN where √(steps · samples) is `most`."""
        end, look = FIRST, 0
        while math.sqrt(self.step * self.samples[-1]) < most and not (
            self.course.losses and (self.course.diverged or self._reached(level))
        ):
            if self.step >= look:
                self.course.add(self.step, self.held_loss())
                look = max(self.step + 2, round(1.06 * self.step))
            self.advance()
            self.samples.append(self.samples[-1] + self.batch)
            every = max(2, (end - self._begin) // 10)
            if self.meter and (self.step == end or (self.step - self._begin) % every == 0):
                self.record.take(self.meter, {"samples": float(self.samples[-1])})
            if self.step == end and self.policy in FOLLOWED:
                self._set()
                end = round(GROWTH * end)
        if self.meter:
            self.meter.close()
        step = self.course.passed(level)
        samples = float(np.interp(step, range(len(self.samples)), self.samples)) if math.isfinite(step) else math.nan
        return {"steps_to": step, "samples_to": samples}

    def _set(self) -> None:
        critical = math.nan
        if self.meter:
            critical = self.record.tuning(self._begin, self.step)["critical_batch_size"].value
        self._begin = self.step
        self.critical.append(critical)
        if self.policy == "blind" or math.isfinite(critical):
            self.batch = followed(self.policy, self.step, critical)


def policies(plan: Plan) -> list[str]:
    return [*map(str, plan.batches), *FOLLOWED]


def cost(row: Mapping[str, Any]) -> float:
    """What a rate is searched for: √(steps · samples), which is the steps where the batch is constant."""
    return math.inf if row["steps_to"] is None else math.sqrt(row["steps_to"] * row["samples_to"])


class Schedules:
    """All runs of one task to one level."""

    def __init__(self, lab: Lab, plan: Plan, data: Set, net: str) -> None:
        self.lab, self.plan, self.data, self.net = lab, plan, data, net
        self.named = {"data": data.name, "net": net}

    @property
    def level(self) -> float:
        """Of the run at batch 64 with the rate that the search begins with."""

        def found(_: Mapping[str, Any]) -> Row:
            run = Fed(self._training(ADAM[self.net], SEARCHED), self.data, "64")
            run.to(-math.inf, 1.2 * self.plan.level_at * math.sqrt(64))
            return {"level": run.course.at(self.plan.level_at)}

        return float(self.lab.rows("levels", [self.named], found)[0]["level"])

    def _training(self, rate: float, seed: int) -> Training:
        return Training(self.data.name, self.net, "Adam", float(f"{rate:.6g}"), FIRST, round(self.plan.most), seed)

    def _run(self, part: str, policy: str, rate: float, seed: int, level: float, most: float) -> Row:
        training = self._training(rate, seed)
        key = {**self.named, "policy": policy, "rate": training.rate, "seed": seed}

        def found(_: Mapping[str, Any]) -> Row:
            run = Fed(training, self.data, policy)
            row = run.to(level, most)
            path = [float(f"{value:.3g}") if math.isfinite(value) else None for value in run.critical]
            return row | ({"critical": path} if policy in ("root", "share") and seed != SEARCHED else {})

        return self.lab.rows(part, [key], found)[0]

    def best(self, policy: str, level: float) -> tuple[float, float]:
        """The rate, and what it costs: from the first rate on in factors of 2, as long as it gets better."""

        def tried(power: int, most: float) -> float:
            return cost(self._run("search", policy, ADAM[self.net] * 2.0**power, SEARCHED, level, most))

        power, least = 0, tried(0, self.plan.most)
        for way in (1, -1):
            # The smoothed loss is known two looks later: nothing that is better is broken off.
            while abs(power + way) <= self.plan.powers and (found := tried(power + way, 1.2 * least)) < least:
                power, least = power + way, found
        return ADAM[self.net] * 2.0**power, least

    def all(self) -> None:
        level = self.level
        for policy in policies(self.plan):
            rate, least = self.best(policy, level)
            for seed in self.plan.seeds:
                self._run("schedules", policy, rate, seed, level, min(self.plan.most, 5 * least))
