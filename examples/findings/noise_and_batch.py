"""Noise work over signal work is B_c/B through a whole run; and does a batch that follows B_c save anything?

    python examples/findings/noise_and_batch.py --data FOLDER [--parts law schedules] [--output docs/findings]
    python examples/findings/noise_and_batch.py --quick

Fixed before the runs that are reported:

Law. A run is cut into five stretches, the last of them half of it. In each, B_c is told in the run's own numbers
(`RunRecord.tuning`): B·N/S for SGD, with the loss of the whole training set at the ends of the stretch, and the overlap
of neighbouring gradients for momentum and Adam. The truth is Σ tr Σ / Σ ‖F‖² at thirty points of the stretch, by the
samples' own gradients. Where B_c is told, it is within a factor of 1.5 of the truth in at least 80 % of the stretches,
for each of SGD, momentum, Adam. Cases where it may fail are looked at too: SGD at four times the rate, and with a batch
of 8.

Schedules. Adam until the smoothed held-out loss has come to a level. The batch is 32 to 512 throughout, or it is set
anew at steps 16, 24, 36, …, each 1.5 times the last, from B_c of the stretch that ends there: √(64 B_c) ("root", what
theory says is best), B_c/2 ("share"); or, for comparison, step/2 with nothing measured ("blind"). The rate is constant,
the best of a search in factors of 2 on another seed, for each policy its own. All policies of a seed have the same
initial weights. The excess of a policy is the smallest x for which some constant batch (between those that were run: by
a line in the logarithms) comes to the level with at most x times its steps and x times its samples. (1) x of "root" is
0.95 at least: no constant batch is better in both by more than 5 %. (2) It is more than 1.05, and two standard errors
above 1: it beats them all. By McCandlish et al. 2018 (arXiv:1812.06162), appendix D, with s what a run without noise
had done so far and γ = (∫√B_c ds)²/∫ds ∫B_c ds, x is at most 2/(1 + √γ) where steps and samples count alike.
"""

from __future__ import annotations

import argparse

from lab import Lab, begin  # isort: skip
from noise_and_batch_runs import FULL, QUICK, Plan, Schedules, law_trainings, measured_law, measured_overlap
from noise_and_batch_shown import (
    draw,
    law_cells,
    law_table,
    overlap_table,
    schedule_cells,
    schedule_table,
    stretch_table,
    verdicts,
)
from sets import load


def train_all(lab: Lab, plan: Plan, parts: list[str]) -> None:
    if "law" in parts:
        trainings = list(law_trainings(plan))
        for data in dict.fromkeys(training.data for training in trainings):
            mine = {str(training.key): training for training in trainings if training.data == data}
            found = load(data, lab.options.data, plan.examples)
            keys = [training.key for training in mine.values()]
            lab.rows("law", keys, lambda key, mine=mine, found=found: measured_law(mine[str(key)], found, plan.ends))
            keys = [key for key in keys if key["net"] == "MLP" and key["optimizer"] != "SGD"]
            lab.rows(
                "overlap",
                keys,
                lambda key, mine=mine, found=found: measured_overlap(mine[str(key)], found, plan.looked),
            )
    if "schedules" in parts:
        for data, net in plan.schedules:
            Schedules(lab, plan, load(data, lab.options.data, plan.pool, held=500), net).all()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", nargs="*", choices=("law", "schedules"), default=["law", "schedules"])
    options = begin(__doc__, parser)
    lab, plan = Lab("noise_and_batch", options), QUICK if options.quick else FULL
    train_all(lab, plan, options.more.parts)
    rows = lab.results.parts
    law, schedules = law_cells(rows.get("law", [])), schedule_cells(rows.get("schedules", []))
    tables = law_table(law), stretch_table(law), overlap_table(rows.get("overlap", [])), schedule_table(schedules)
    print(verdicts(law, schedules), *tables, sep="\n\n")
    draw(lab, law, schedules)


if __name__ == "__main__":
    main()
