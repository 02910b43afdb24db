"""Learning-rate decay as dissipation control: what constant speed, the least action, costs and what decay buys.

Fixed before the runs. Speed is ‖u‖ of a step, parameter units: action and steadiness on the clock "steps" are of it.
Constant speed: before each step the rate is set to length / ‖direction‖, so that each step is as long as any other.
Falling speed: the same with a length that falls linearly to 0. All have their own peak (rate or length), the best of
factors of 2 on seed 100. The loss that all reach: of each seed, the worst end of the five schedules.

1. At the held-out loss that all schedules reach, constant speed has the least action in 3 of 4 settings.
2. At equal steps constant speed does not end lower than linear decay: nowhere by more than two standard errors.
3. What a decay will gain is known before it: training loss after 100 more steps at the constant rate, less that after
   100 steps of linear decay, is within a factor of 1.5 of `predicted` (below) in 80 % of settings and rates, means
   over five seeds; the ranks of predicted and measured correlate by 0.8 and more.

`predicted`, from the last n = 100 steps at the constant rate: their work W, of it N on noise, on curvature C, and the
loss drop d.

    c = (1 + β) C/W                              what a step takes off the distance from the minimum
    E ← (1 − s c)² E + s²/2 · c · N/((1 − β) n)  the excess loss, with s = 1, and falling to 0
    gain = E with s = 1 − E decayed − (d/n) · (flow time that the decay gives up)

β = 0 for SGD, 0.9 for momentum and Adam. For SGD on a quadratic of one curvature it is exact; a relaxed one has
E = N/(4n), a quarter of the noise work of a step: the simple rule.

    python examples/findings/decay.py --data FOLDER --output docs/findings
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from decay_runs import LOOKS, PACES, Row, begun, ended, gained, scheduled
from decay_shown import compared, draw, ends_table, gains_of, gains_table, paces_table, verdicts
from lab import Lab, begin
from sets import Set, load
from trainings import Training

Setting = tuple[str, str, str]  # data, net, optimizer
FIRST = {"SGD": 0.1, "momentum": 0.01, "Adam": 2.0**-10}  # rates that the search begins at
SEARCHED = 100  # seed
BATCH = 16
EXAMPLES = 10_000


@dataclass(frozen=True)
class Plan:
    """settings: (data, net, optimizer). steps: of a schedule. before, tail: steps at the constant rate, of the decay.

    rates: of the tuned constant one, for the gain. full: (data, net) of full batches, the case without noise.
    """

    settings: tuple[Setting, ...]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: int = 300
    before: int = 300
    tail: int = 100
    rates: tuple[float, ...] = (0.5, 1.0)
    full: tuple[tuple[str, str], ...] = (("fashion-mnist", "MLP"),)
    full_batch: int = 512
    searches: bool = True


FULL = Plan(
    (
        ("fashion-mnist", "MLP", "SGD"),
        ("fashion-mnist", "MLP", "momentum"),
        ("fashion-mnist", "MLP", "Adam"),
        ("cifar10", "CNN", "SGD"),
        ("cifar10", "CNN", "momentum"),
        ("cifar10", "CNN", "Adam"),
    )
)
QUICK = Plan(
    (("fashion-mnist", "MLP", "SGD"), ("fashion-mnist", "MLP", "Adam")),
    seeds=(0, 1),
    steps=40,
    before=40,
    tail=20,
    rates=(1.0,),
    full_batch=64,
    searches=False,
)


class Experiment:
    def __init__(self, lab: Lab, plan: Plan) -> None:
        self.lab, self.plan = lab, plan
        self._sets: dict[tuple[str, int], Set] = {}

    def data(self, name: str, examples: int = EXAMPLES) -> Set:
        if (name, examples) not in self._sets:
            self._sets[name, examples] = load(name, self.lab.options.data, examples, 500)
        return self._sets[name, examples]

    def training(self, setting: Setting, rate: float, seed: int, steps: int) -> Training:
        data, net, optimizer = setting
        return Training(data, net, optimizer, rate, BATCH, steps, seed)

    def run(self) -> tuple[list[Row], list[Row], list[Row]]:
        """Rows of schedules, of gains, and of gains without noise."""
        schedules, gains, silent = [], [], []
        for setting in self.plan.settings:
            peaks = self.peaks(setting)
            schedules += [self.schedule(setting, pace, peaks[pace], seed) for pace in PACES for seed in self.plan.seeds]
            gains += [
                self.gain(setting, share * peaks["constant"], seed)
                for share in self.plan.rates
                for seed in self.plan.seeds
            ]
            if setting[:2] in self.plan.full and setting[2] == "SGD":
                silent += [
                    self.gain(setting, share * peaks["constant"], seed, full=True)
                    for share in (1.0, 4.0)
                    for seed in self.plan.seeds
                ]
        return schedules, gains, silent

    def peaks(self, setting: Setting) -> dict[str, float]:
        """Pace → rate or length at which it ends lowest, of factors of 2."""
        found = dict[str, float]()
        for pace in PACES:
            first = FIRST[setting[2]] if not found else found["constant"]
            if "speed" in pace:
                first = 2.0 ** round(math.log2(self.length(setting, found["constant"])))
            found[pace] = self.best(lambda rate, pace=pace: self.searched(setting, pace, rate), first)
        return found

    def best(self, end: Callable[[float], float], first: float) -> float:
        """Downhill by factors of 2 until both neighbours end higher."""
        known = {first: end(first)}
        while self.plan.searches:
            best = min(known, key=known.__getitem__)
            new = [rate for rate in (best * 2, best / 2) if rate not in known]
            if not new:
                return best
            known[new[0]] = end(new[0])
        return first

    def searched(self, setting: Setting, pace: str, rate: float) -> float:
        training = self.training(setting, rate, SEARCHED, self.plan.steps)

        def compute(_: Mapping[str, Any]) -> Row:
            return {"end": ended(begun(training, pace, self.data(setting[0]), measured=False).go(looks=LOOKS))}

        (row,) = self.lab.rows("search", [{"pace": pace, **training.key}], compute)
        return math.inf if row["end"] is None else float(row["end"])

    def length(self, setting: Setting, rate: float) -> float:
        """Of a step of the tuned constant rate, mean."""
        training = self.training(setting, rate, SEARCHED, self.plan.steps)

        def compute(_: Mapping[str, Any]) -> Row:
            run = begun(training, "constant", self.data(setting[0]), measured=True).go(rows=2, looks=1)
            return {"length": float(run.record.columns["path_length"][-1]) / run.step}

        return float(self.lab.rows("lengths", [training.key], compute)[0]["length"])

    def schedule(self, setting: Setting, pace: str, rate: float, seed: int) -> Row:
        training = self.training(setting, rate, seed, self.plan.steps)
        key = {"pace": pace, **training.key}
        return self.lab.rows("schedules", [key], lambda _: scheduled(training, pace, self.data(setting[0])))[0]

    def gain(self, setting: Setting, rate: float, seed: int, *, full: bool = False) -> Row:
        training = self.training(setting, rate, seed, self.plan.before + self.plan.tail)
        examples = self.plan.full_batch if full else EXAMPLES
        if full:
            training = replace(training, batch=self.plan.full_batch, epochs=True)

        def compute(_: Mapping[str, Any]) -> Row:
            return gained(training, self.plan.tail, self.data(setting[0], examples))

        return self.lab.rows("full batch" if full else "gains", [training.key], compute)[0]


def main() -> None:
    options = begin(__doc__)
    lab = Lab("decay", options)
    schedules, gains, silent = Experiment(lab, QUICK if options.quick else FULL).run()
    ends, won, without = compared(schedules), gains_of(gains), gains_of(silent)
    tables = verdicts(ends, won), ends_table(ends), paces_table(ends, schedules), gains_table(won, without)
    print("\n\n".join(tables))
    draw(lab, ends, won)


if __name__ == "__main__":
    main()
