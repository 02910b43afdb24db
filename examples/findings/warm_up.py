"""When does warm-up help? Told by the first twentieth of a run without it.

    python examples/findings/warm_up.py --data FOLDER [--output docs/findings]
    python examples/findings/warm_up.py --quick

Fixed before the runs that are reported:

A setting is a network, an optimizer and a rate: the best of a run without warm-up (a search in factors of √10 on
another seed), and 10 and √10 times more and less. Adam and momentum 0.9, batch 32, 150 steps, the rate falling linearly
to 0; warm-up is linear, over 0 or 10 % of the steps (Adam, at the best rate and at √10 times that: 2 and 30 % too).
Warm-up is needed in a setting when that of 10 % lowers the final held-out loss by more than 1 % and by more than two
standard errors, of pairs of runs with the same weights and batches. A loss that is not finite, or is above that of the
start, counts as that of the start.

Statement. Of the first twentieth of the runs without warm-up, with the drop d of the mean loss (1,000 training samples
before and after) and a = Σ f_{k+1}·u_k, the headroom is (2d − a)/2(d − a). Warm-up is needed where the headroom less
its standard error is below ½, which says that the loss did not fall for certain, and is not needed elsewhere: right in
at least 80 % of all settings, and in at least 70 % both of those that need it and of those that do not.

Besides, thresholds: of the headroom and of six other numbers, the one that is best on the first half of the networks
(mean of the two rates of being right) is judged on the other half.
"""

from __future__ import annotations

import argparse
from itertools import product

from lab import Lab, begin  # isort: skip
from sets import load
from warm_up_runs import FULL, OPTIMIZERS, QUICK, Plan, Runs
from warm_up_shown import (
    course_table,
    draw,
    gain_table,
    length_table,
    settings_of,
    threshold_table,
    tuned_table,
    verdict_table,
)


def train_all(lab: Lab, plan: Plan) -> None:
    for optimizer, net in product(lab.options.more.optimizers, plan.nets):
        Runs(lab, plan, net, optimizer, load(net.data, lab.options.data, plan.examples)).all()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--optimizers", nargs="*", choices=OPTIMIZERS, default=OPTIMIZERS, help="none: only tables")
    options = begin(__doc__, parser)
    lab = Lab("warm_up", options)
    train_all(lab, QUICK if options.quick else FULL)
    parts = lab.results.parts
    found = settings_of(parts["runs"])
    tables = [table(found) for table in (verdict_table, threshold_table, gain_table, tuned_table, course_table)]
    print(*tables, length_table(parts["runs"], parts["lengths"]), sep="\n\n")
    draw(lab, found)


if __name__ == "__main__":
    main()
