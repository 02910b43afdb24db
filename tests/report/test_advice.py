"""What-if tables: recomputed by hand from the works of a record, and what is left open."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lightning_speedlimit import RunRecord
from lightning_speedlimit.record.tuning import Tuned
from lightning_speedlimit.report.advice import MULTIPLES, UNTUNED, Advice, advise
from lightning_speedlimit.report.advice_text import blocks, numbers, rate, table
from lightning_speedlimit.words import amount

SGD = {"class": "SGD", "groups": [{"lr": 0.1, "momentum": 0.0}]}


def run(
    rows: int = 20, *, batch: int = 32, seconds: float = 0.01, scatter: float = 0.02, **described: Any
) -> RunRecord:
    """SGD whose steps have a work of 0.3, of which 0.1 the next batch confirms, at a loss drop of 0.12 a step."""
    draw = np.random.default_rng(0)
    record = RunRecord({"optimizers": [SGD], "batch_size": batch, "parameters": 10, "device": "cpu", **described})
    works = draw.normal([[0.3], [0.1]], scatter, (2, rows * 10)).cumsum(1)[:, 9::10]
    for i, (work, anti) in enumerate(works.T, 1):
        row = {"work_ito": work, "work_anti_ito": anti, "loss_drop": 1.2 * i, "loss_drop_se": 0.01, "loss_se": 0.01}
        record.append(10 * i, row | {"loss": 30 - 1.2 * i, "seconds": seconds * 10 * i, "samples": 10.0 * i * batch})
    return record


def by_hand(record: RunRecord, multiple: float, ratio: float) -> float:
    """K (1 + r/m)/(1 + r)."""
    return float(record.columns["step"][-1]) * (1 + ratio / multiple) / (1 + ratio)


def test_steps_and_samples_are_by_hand() -> None:
    record = run()
    last = {name: column[-1] for name, column in record.columns.items()}
    slope = 2 * last["loss_drop"] - last["work_anti_ito"]  # of 0.14 a step
    ratio = (last["work_ito"] - slope) / slope
    found = advise(record)
    assert ratio == pytest.approx(0.16 / 0.14, rel=0.1)
    assert (found.steps, found.unit, found.batch) == (200, "samples", 32)
    assert found.critical_batch_size.value == pytest.approx(32 * ratio)
    error = record.tuning()["critical_batch_size"].standard_error / 32
    assert [at.multiple for at in found.at_batches] == list(MULTIPLES)
    for at in found.at_batches:
        assert at.batch == 32 * at.multiple
        assert at.steps == pytest.approx(by_hand(record, at.multiple, ratio))
        ends = sorted(by_hand(record, at.multiple, ratio + sign * 2 * error) for sign in (-1, 1))
        assert at.steps_interval == pytest.approx(ends)
        assert at.samples == pytest.approx(at.steps * at.batch)
        assert at.samples_interval == pytest.approx([end * at.batch for end in ends])
    own = found.at_batches[2]
    assert (own.steps, own.samples, own.steps_interval) == (200, 6400, (200, 200)), "what it was has no error"


def test_the_limits_of_the_formula() -> None:
    """Far below B_c the samples stay and the steps halve with twice the batch; far above it the steps stay."""
    noisy, calm = advise(run(scatter=1e-6)), advise(run(scatter=1e-6, batch=4096))
    ratios = [b.samples / a.samples for a, b in zip(noisy.at_batches, noisy.at_batches[1:], strict=False)]
    assert all(1 < ratio < 2 for ratio in ratios)
    assert ratios == sorted(ratios)
    # The same works in any batch: r is of the run's own batch.
    assert [at.steps for at in noisy.at_batches] == pytest.approx([at.steps for at in calm.at_batches])


def test_seconds_are_those_of_runs_of_that_batch() -> None:
    record, others = run(), [run(batch=128, seconds=0.02), run(batch=128, seconds=0.04), run(batch=64, device="cuda:0")]
    others += [run(batch=256, parameters=11), run(batch=32, seconds=9.0)]
    seconds = {at.batch: at.seconds for at in advise(record, others).at_batches}
    steps = {at.batch: at.steps for at in advise(record).at_batches}
    assert seconds[32] == pytest.approx(2.0), "its own"
    assert seconds[128] == pytest.approx(0.03 * steps[128])
    assert all(math.isnan(seconds[batch]) for batch in (8, 16, 64, 256, 512))
    alone = {at.batch: at.seconds for at in advise(record).at_batches}
    assert [batch for batch, value in alone.items() if math.isfinite(value)] == [32]


def test_no_batch_is_smaller_than_a_sample() -> None:
    assert [at.batch for at in advise(run(batch=2)).at_batches] == [1, 2, 4, 8, 16, 32]


def without(record: RunRecord, *names: str) -> RunRecord:
    found = RunRecord(record.run)
    for i, step in enumerate(record.columns["step"]):
        found.append(int(step), {n: float(c[i]) for n, c in record.columns.items() if n != "step" and n not in names})
    return found


def test_a_batch_that_rows_do_not_tell_is_that_of_the_settings() -> None:
    found, wanted = advise(without(run(accumulate_grad_batches=4), "samples")), advise(run(batch=128))
    assert found.batch == 128
    assert found.critical_batch_size == wanted.critical_batch_size
    assert found.at_batches[0].samples == pytest.approx(wanted.at_batches[0].samples)
    unknown = advise(without(run(batch_size=None), "samples"))
    assert math.isnan(unknown.critical_batch_size.value)
    assert "batch size is not known" in unknown.critical_batch_size.reason
    assert [at.steps for at in unknown.at_batches] == [at.steps for at in wanted.at_batches], "of its own batch"
    assert all(math.isnan(at.samples) for at in unknown.at_batches)


def tokens() -> RunRecord:
    record = RunRecord(run().run)
    for i, step in enumerate(run().columns["step"]):
        row = {n: float(c[i]) for n, c in run().columns.items() if n != "step"}
        record.append(int(step), row | {"tokens": 128.0 * row["samples"]})
    return record


def test_tokens_where_they_are_counted() -> None:
    found = advise(tokens())
    assert "tokens; the batch is 4,096." in numbers(found)[1], "as the table has it"
    assert [row.split()[0] for row in table(found)[3:5]] == ["4,096", "8,192"]
    assert numbers(replace(found, critical_batch_size=Tuned(15211.4, 386.0)))[1].startswith(
        "Critical batch: 15,211 +/- 386 tokens"
    )
    assert (found.unit, found.batch) == ("tokens", 32 * 128)
    assert found.at_batches[2].samples == 200 * 32 * 128


@pytest.mark.parametrize(
    ("record", "reason", "cure"),
    [
        (run(rows=3), "4 log steps are needed, got 3", "log more often, as with a row every 2 steps, or train longer"),
        (run(scatter=5.0), "can't be told from 0", "a longer run tells more"),
        (run(optimizers=[{"class": "Adam", "groups": [{"lr": 0.1}]}]), "was not recorded", "a run with this version"),
        (RunRecord(), "batch size is not known", "samples_per_batch"),
    ],
)
def test_what_is_not_known_is_said_with_a_cure(record: RunRecord, reason: str, cure: str) -> None:
    found = advise(record)
    assert found.at_batches == ()
    assert reason in found.critical_batch_size.reason
    assert cure in found.critical_batch_size.reason
    text = all_text(record, found)
    assert "Critical batch: not known, as " in text
    assert "nan" not in text


def all_text(record: RunRecord, found: Advice) -> str:
    return " ".join(" ".join(line for _, lines in blocks(record, found) for line in lines).split())


def test_of_a_run_that_diverged_nothing_is_predicted() -> None:
    record = run()
    record.append(210, {"loss": 5e3, "loss_se": 1.0, "loss_drop": -4970.0, "loss_drop_se": 1.0})
    found = advise(record)
    assert found.at_batches == ()
    for tuned in (found.critical_batch_size, found.step_headroom, found.noise_share):
        assert tuned.reason == "the loss ran away, from step 210 on"


def test_a_run_on_a_plateau_is_asked_for_the_steps_until_then() -> None:
    record = run()
    last = {name: float(column[-1]) for name, column in record.columns.items() if name != "step"}
    for i in range(1, 41):
        more = {"work_ito": 3.0 * i, "work_anti_ito": 0.0, "samples": 320.0 * i, "loss": 0.0, "loss_drop": 0.0}
        record.append(200 + 10 * i, {name: value + more.get(name, 0.0) for name, value in last.items()})
    found = advise(record)
    assert abs(found.steps - 200) <= 10
    part = record.tuning(to=found.steps)
    assert found.critical_batch_size.value == part["critical_batch_size"].value
    assert found.noise_share.value < record.tuning()["noise_share"].value - 0.2
    assert found.cautions[0] == f"the loss stopped falling at step {found.steps}: all this is of the way until then"


def test_a_negative_critical_batch_is_none() -> None:
    """Full batches: N is 0 within its error, and no batch takes other steps."""
    record = RunRecord({"optimizers": [SGD], "batch_size": 8})
    for i in range(1, 21):  # W = 2d − a − 0.001 a step
        row = {"work_ito": 1.39 * i, "work_anti_ito": i, "loss_drop": 1.2 * i, "loss": 30 - 1.2 * i}
        record.append(10 * i, row | {"samples": 80.0 * i, "loss_drop_se": 1e-4})
    found = advise(record)
    assert "no noise can be told" in found.critical_batch_size.reason
    assert not found.at_batches


def test_cautions() -> None:
    schedule = {"lr_schedules": ["CosineAnnealingLR"], "batch_norm_layers": 2, "accumulate_grad_batches": 4}
    record = run(**schedule)
    rates = np.linspace(0.1, 0.01, 20)
    found = RunRecord(record.run)
    for i, step in enumerate(record.columns["step"]):
        row = {n: float(c[i]) for n, c in record.columns.items() if n != "step"}
        found.append(int(step), row | {"learning_rate": rates[i], "grad_norm": 2.0, "grad_norm_clipped": 1.0})
    assert advise(run()).cautions == (UNTUNED,), "its steps have headroom"
    assert advise(run(rows=3)).cautions == (), "of no table"
    adams = "Adam's larger batches took fewer steps than this says"
    for kind, group, said in (("AdamW", {"lr": 1e-3}, True), ("SGD", {"lr": 0.1, "momentum": 0.9}, False)):
        other = RunRecord({**run().run, "optimizers": [{"class": kind, "groups": [group]}]})
        assert any(adams in caution for caution in advise(other).cautions) is said
    assert [caution.split(":")[0] for caution in advise(found).cautions] == [
        "the learning rate went between 0.0100 and 0.100 (CosineAnnealingLR)",
        "BatchNorm",
        "BatchNorm normalises by the 32 samples of one batch, however many are accumulated",
        "gradients were clipped at 1.00 of the log steps",
        UNTUNED,
    ]


# --- how it reads


def test_the_order_is_cost_gain_change_physics_on_one_screen() -> None:
    record = run(batch_norm_layers=2, accumulate_grad_batches=4)
    parts = blocks(record, advise(record))
    assert [title for title, _ in parts] == ["What it cost", "What it bought", "What to change", "Notes", "The physics"]
    assert "Notes" not in [title for title, _ in blocks(record, replace(advise(record), cautions=()))]
    assert sum(len(lines) + 2 for _, lines in parts) <= 40
    assert max(len(line) for _, lines in parts for line in lines) <= 92


def test_the_table_shows_the_numbers() -> None:
    found = advise(run(), [run(batch=128, seconds=0.02)])
    heads, *rows = table(found)
    assert heads.split() == ["batch", "steps", "samples", "seconds"]
    assert [row.split()[0] for row in rows] == ["8", "16", "32", "64", "128", "256", "512"]
    at = found.at_batches[4]
    assert rows[4].split()[1:3] == ["x", "4"]
    assert f"{amount(at.steps)} ({amount(at.steps_interval[0])} to {amount(at.steps_interval[1])})" in rows[4]
    assert rows[4].endswith(amount(at.seconds))
    assert "this run" in rows[2]
    assert rows[0].endswith("?")
    assert "seconds" not in table(advise(run()))[0], "its own are in what it cost"
    untimed = table(advise(without(run(), "seconds")))
    assert "seconds" not in untimed[0], "no column of what nobody knows"


@pytest.mark.parametrize(
    ("x", "text"),
    [(412.3, "412"), (38416.0, "38,400"), (0.0521, "0.0521"), (1000.0, "1,000"), (math.nan, "?"), (2e9, "2e+09")],
)
def test_amounts(x: float, text: str) -> None:
    assert amount(x) == text


def test_a_higher_rate_is_named_where_the_headroom_is_told_above_one() -> None:
    """By the headroom, 4 at most; by how much steps fall is not said."""
    found = advise(run(scatter=1e-6))
    assert found.rate_multiple == pytest.approx(0.14 / 0.04, rel=1e-3)  # S/C of the works
    text = all_text(run(), found)
    assert (
        "what a whole run at another rate would take it does not tell. Try the learning rate times 3.5: fewer" in text
    )
    for headroom, multiple in ((Tuned(8.0, 1.0), 4.0), (Tuned(1.5, 0.4), 1.5)):
        assert replace(found, step_headroom=headroom).rate_multiple == multiple
    for headroom in (Tuned(1.5, 0.6), Tuned(0.5, 0.01), Tuned(math.nan, math.nan, "why")):
        untold = replace(found, step_headroom=headroom)
        assert math.isnan(untold.rate_multiple)
        assert "Try the learning rate" not in all_text(run(), untold)


def test_no_rate_is_advised_of_optimizers_that_it_was_not_tried_with() -> None:
    record = run()
    assert math.isfinite(advise(record).rate_multiple)
    record.run["optimizers"][0]["class"] = "Muon"
    found = advise(record)
    assert math.isnan(found.rate_multiple)
    assert math.isfinite(found.step_headroom.value)


def test_a_higher_rate_in_one_sentence() -> None:
    found = replace(advise(run()), step_headroom=Tuned(3.8, 0.71))
    assert rate(found) == "Step headroom 3.8 ± 0.71: try the learning rate times 3.8."
    assert rate(replace(found, step_headroom=Tuned(9.0, 1.0))).endswith("try the learning rate times 4.0.")
    assert rate(replace(found, step_headroom=Tuned(1.5, 0.6))) == ""


def short_epochs(size: int, mean: float) -> RunRecord:
    """Batches that were set to `size`, and are `mean` on average."""
    record, whole = RunRecord(run(batch=size).run), run(batch=size)
    for i, step in enumerate(whole.columns["step"]):
        row = {n: float(c[i]) for n, c in whole.columns.items() if n != "step"}
        record.append(int(step), row | {"samples": mean * float(step)})
    return record


def test_a_batch_is_the_one_that_was_set_where_the_last_of_an_epoch_is_short() -> None:
    found = advise(short_epochs(64, 62.5))
    assert (found.batch, found.mean_batch) == (64, 62.5)
    assert [row.split()[0] for row in table(found)[1:]] == ["16", "32", "64", "128", "256", "512", "1,024"]
    own = found.at_batches[2]
    assert (own.batch, own.samples) == (64, 62.5 * 200), "what it took is what was counted"
    assert "the batch is 64 (62.5 on average: the last batch of an epoch is short)." in numbers(found)[1]
    assert "on average" not in numbers(advise(run()))[1]
    ratio = found.critical_batch_size.value / advise(run(batch=64)).critical_batch_size.value
    assert ratio == pytest.approx(62.5 / 64), "the noise is that of the batches that were there"
    other = advise(short_epochs(64, 40.0))
    assert (other.batch, other.mean_batch) == (40.0, 40.0), "another batch than the one that was set"


def test_what_is_no_record() -> None:
    with pytest.raises(TypeError, match="record got"):
        advise("runs/a")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="others got 3, wanted records"):
        advise(run(), 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a record among others"):
        advise(run(), ["runs/a"])  # type: ignore[list-item]
