"""Why a run fell short, in words: what took its work, what bent its path, what changed its speed, what its loss did.

The least time for the same displacement on the same action falls short of the time taken by

    ln(τ/τ_SL) = −ln straightness − ln steadiness = −ln conversion − ln(straightness/conversion) − ln steadiness

where the first part is work that did not lower the loss, divided between batch noise and bouncing as the work is;
the second is what the path turns without them (for plain gradient descent the action is wasted in the same
proportion as the work); the third is changes of speed. The findings are ordered by these parts, and a plateau among
them by ln(steps in all/steps until then). The second is judged only where most of the work lowered the loss: noise
hides changes of speed, and puts them into the straightness.

Of a loss that did not come down for sure that is said first, and its work is not divided.

A loss that ran away is all that is said of a run but for its clipping: its works are beyond the second order.

Whether work was lost to noise or to bouncing is told by the work balance (`work_shares`), and not by the signal
fraction: that is negative for gradient descent on all data with too large a rate, where there is no noise at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from lightning_speedlimit.checks import arguments
from lightning_speedlimit.record import RunRecord
from lightning_speedlimit.report.findings import CAUSES, Cause, Finding, JudgedRun
from lightning_speedlimit.report.findings_of_course import clipping, no_clear_fall, plateaued, rose
from lightning_speedlimit.report.findings_of_limits import above_one, nothing, undefined
from lightning_speedlimit.report.findings_of_path import curved, uneven
from lightning_speedlimit.report.findings_of_work import waste
from lightning_speedlimit.report.runs import check_record

__all__ = ["CAUSES", "Cause", "Finding", "diagnose"]


def diagnose(values: Mapping[str, float] | RunRecord, record: RunRecord | None = None) -> list[Finding]:
    """What cost a run the most work and time, in this order; then clipping, and whether its efficiency is above 1.

    Args:
        values: the run's numbers where it is looked at, named as the fields of `Summary`, and `step`, in steps: they
            say up to where the columns are read. Or the record alone: its last row.
        record: the run; gives the optimizers, the batch size and the columns.

    Returns:
        At least one finding. "nothing" comes alone. What can't be judged because a value is NaN is said as
        "undefined", and never guessed.

    Raises:
        TypeError: values without a record.
    """
    if isinstance(values, RunRecord):
        record = values
        values = _last_row(record)
    if record is None:
        raise TypeError("diagnose needs the record that the values are of, got None; pass diagnose(values, record)")
    check_record("record", record)
    run = JudgedRun(arguments.numbers("values", values), record)
    if ran_away := rose(run):
        return [*ran_away, *clipping(run)]
    costly = [*plateaued(run), *waste(run), *curved(run), *uneven(run)]
    costly.sort(key=lambda pair: -pair[0])  # stable: equal costs stay in the order above
    found = [*no_clear_fall(run), *(finding for _, finding in costly)]
    return [*found, *clipping(run), *above_one(run), *undefined(run)] or [nothing(run)]


def _last_row(record: RunRecord) -> dict[str, float]:
    summary = record.summary()
    values = {f.name: getattr(summary, f.name) for f in dataclasses.fields(summary)}
    return {name: value for name, value in values.items() if isinstance(value, float)} | {"step": summary.steps}
