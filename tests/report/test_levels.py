"""The loss at which runs are compared, and the order on the way: recomputed from the records by plain numpy."""

import math
from typing import Any

import numpy as np
import pytest
from comparison_cases import Curve, decay, description, straight

from lightning_speedlimit import RunRecord, compare
from lightning_speedlimit.report.alignment import Timeline
from lightning_speedlimit.report.levels import LEARNED, SHARES, fair_level
from lightning_speedlimit.words import number


def lowest_sure(record: RunRecord) -> float:
    columns = record.columns
    values = columns["loss"] + 3 * columns["loss_se"]
    return float(np.min(values[np.isfinite(values)]))


def start_of(record: RunRecord) -> float:
    """Of records whose drop is that from a known start."""
    columns = record.columns
    row = np.flatnonzero(np.isfinite(columns["loss"]) & np.isfinite(columns["loss_drop"]))[-1]
    return float(columns["loss"][row] + columns["loss_drop"][row])


def deepest(records: list[RunRecord]) -> float:
    """max over l of n(l) · (L_0 − l), by looking at every run's lowest loss; of runs that learned, two at least."""
    start = float(np.median([start_of(record) for record in records]))
    lows = np.array([lowest_sure(record) for record in records])
    lows = lows[start - lows >= LEARNED * (start - lows.min())]
    worth = [((lows <= low).sum() * (start - low), low) for low in lows if (lows <= low).sum() >= min(2, len(lows))]
    return float(max(worth)[1])


def read(record: RunRecord, level: float) -> float:
    """Steps at the first chord that comes down to the level."""
    steps = np.concatenate([[0], record.columns["step"]])
    loss = np.concatenate([[start_of(record)], record.columns["loss"]])
    below = np.flatnonzero(loss <= level)
    if not len(below):
        return math.nan
    end = int(below[0])
    share = (loss[end - 1] - level) / (loss[end - 1] - loss[end])
    return float(steps[end - 1] + share * (steps[end] - steps[end - 1]))


def run(loss: Curve, *, steps: int = 300, every: int = 5, loss_se: float = 0.0, lr: float = 0.1) -> RunRecord:
    return straight(range(every, steps + 1, every), loss, loss_se=loss_se, run=description(lr=lr))


def test_one_run_that_did_not_come_near_does_not_set_the_loss_for_all() -> None:
    """Four at 0.05 to 0.1, one that never came below 0.6."""
    runs = {f"good {i}": run(decay(time)) for i, time in enumerate((100, 110, 120, 130))}
    runs["stuck"] = run(lambda k: 0.6 + 0.4 * math.exp(-k / 20))
    found = compare(runs)
    assert found.at == pytest.approx(deepest(list(runs.values())), rel=1e-12)
    assert found.set_by == "good 3"
    assert found.verdict()[-1] == "Left out: stuck, never below 0.600."
    assert [group.name for group in found.groups if group.reached] == [f"good {i}" for i in range(4)]
    assert compare({name: runs[name] for name in ("good 0", "stuck")}).set_by == "stuck", "of two both are kept"


@pytest.mark.parametrize("seed", range(6))
def test_the_level_and_the_order_are_those_of_plain_numpy(seed: int) -> None:
    """Sweeps of exact runs: no noise, so that every pair is apart at every level and the deepest is taken."""
    draw = np.random.default_rng(seed)
    times, floors = draw.uniform(20, 200, 9), draw.uniform(0, 0.8, 9) ** 2
    runs = {
        f"r{i}": run(lambda k, t=t, f=f: f + (1 - f) * math.exp(-k / t), every=1)
        for i, (t, f) in enumerate(zip(times, floors, strict=True))
    }
    found = compare(runs)
    level = deepest(list(runs.values()))
    assert found.at == pytest.approx(level, rel=1e-12)
    steps = {name: read(record, level) for name, record in runs.items()}
    there = sorted((name for name in steps if math.isfinite(steps[name])), key=lambda name: steps[name])
    assert [group.name for group in found.groups if group.reached] == there
    assert [group.values["cost"] for group in found.groups if group.reached] == pytest.approx(
        [steps[name] for name in there], rel=1e-9
    )
    start = float(np.median([start_of(record) for record in runs.values()]))
    assert [one.name for one in found.levels] == ["early", "middle", "late"]
    for part, one in enumerate(found.levels, 1):
        assert one.loss == pytest.approx(start ** (1 - part / 3) * level ** (part / 3), rel=1e-9)
        wanted = {name: read(record, one.loss) for name, record in runs.items()}
        wanted = {name: value for name, value in wanted.items() if math.isfinite(value)}
        assert dict(one.order) == pytest.approx(wanted, rel=1e-9)
        assert [name for name, _ in one.order] == sorted(wanted, key=lambda name: wanted[name])


def test_where_the_end_is_noise_the_level_is_further_up() -> None:
    """Three runs that fall at different rates to one floor, where nobody can tell them apart any more."""
    runs = {
        f"r{i}": run(lambda k, t=t: 0.1 + 0.9 * math.exp(-k / t), loss_se=0.03, steps=600)
        for i, t in enumerate((20, 60, 120))
    }
    timelines = {name: Timeline(record) for name, record in runs.items()}
    apart = {}
    for share in SHARES:
        level = deepest(list(runs.values())) ** share  # of the way in ln L, which starts at 0
        bounds = [timeline.cost_interval("elapsed", level) for timeline in timelines.values()]
        apart[share] = sum(a[1] < b[0] for a in bounds for b in bounds)
    best = max(SHARES, key=lambda share: (apart[share] * share, share))
    level, limit = fair_level(timelines)
    assert best < 1 < apart[best]
    assert level == pytest.approx(deepest(list(runs.values())) ** best, rel=1e-9)
    assert limit is None


def test_seeds_of_one_group_need_not_be_apart() -> None:
    """Two groups that part at the end, whose seeds part further up."""
    runs = {
        "slow": [run(lambda k, t=t: 0.1 + 0.9 * math.exp(-k / t), loss_se=0.02, steps=900) for t in (115, 150, 185)],
        "fast": [run(lambda k, t=t: 0.1 + 0.9 * math.exp(-k / t), loss_se=0.02, steps=900) for t in (38, 50, 62)],
    }
    singles = {f"{name} {i}": record for name, records in runs.items() for i, record in enumerate(records)}
    deep = deepest(list(singles.values()))
    together = compare(runs).at
    assert deep < together < deep + 0.05
    assert compare(singles).at > together + 0.05


def test_a_change_of_order_on_the_way_is_said() -> None:
    """A fast start to a floor against a slow one that goes further; and a third that is always last."""
    runs = {
        "quick": run(lambda k: 0.2 + 0.8 * math.exp(-k / 10) - 0.0002 * k, every=1),
        "steady": run(decay(80), every=1),
        "last": run(decay(140), every=1),
    }
    found = compare(runs, at=0.15)
    table = found.table()
    assert "The order changes on the way: quick is first early, steady late." in table
    assert [one.order[0][0] for one in found.levels][::2] == ["quick", "steady"]
    assert "The order does not change on the way." in compare({n: runs[n] for n in ("steady", "last")}, at=0.15).table()
    behind = {"first": run(decay(5), every=1), **{n: runs[n] for n in ("quick", "steady")}}
    assert "The first stays the first; behind it the order changes on the way." in compare(behind, at=0.15).table()
    rows = table[table.index("Who was first, in steps") :].splitlines()
    assert rows[1].split() == ["loss", "first", "second", "third"]
    assert rows[5].startswith("0.150")
    assert compare({"alone": runs["last"]}).levels
    assert "Who was first" not in compare({"alone": runs["last"]}).table()


def test_levels_of_losses_below_zero() -> None:
    found = compare({"a": run(lambda k: 1 - k / 100), "b": run(lambda k: 1 - k / 150)}, at=-0.5)
    assert [one.loss for one in found.levels] == pytest.approx([0.5, 0.0, -0.5])


def test_a_loss_without_a_start_has_no_way_to_it() -> None:
    lost = {"loss_drop": lambda k: math.nan}
    runs = {n: straight(range(1, 100), decay(t), columns=lost) for n, t in (("a", 20), ("b", 30))}
    found = compare(runs)
    assert found.levels == ()
    assert found.set_by == "b", "the worst, as there is nothing to weigh it with"


# --- a sweep


def sweep() -> dict[str, RunRecord]:
    """Ten rates, three batches: two rates that do not move, two that diverge, to infinity and to NaN."""
    draw = np.random.default_rng(0)
    found = {}
    for rate in (1e-6, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 10.0):
        for batch in (32, 128, 512):
            time = 30 / (rate / 0.1) ** 0.7 * (1 + 0.1 * math.log(batch / 32))
            noise = 0.01 * draw.normal(size=51)

            def loss(k: float, rate: float = rate, time: float = time, noise: Any = noise) -> float:
                if rate == 10:
                    return 2.3 + 0.3 * k if k < 200 else math.nan
                if rate == 1:
                    return 2.3 * math.exp(-k / 40) if k < 60 else 50.0 if k < 100 else math.inf
                return 0.05 + 2.25 * math.exp(-k / time) + (noise[int(k) // 10] if k else 0.0)

            found[f"lr {rate:g}, batch {batch}"] = straight(
                range(10, 501, 10),
                loss,
                speed=rate**0.5,
                loss_se=0.01,
                run=description(lr=rate, batch_size=batch),
                columns={"samples": lambda k, batch=batch: float(batch * k)},
            )
    return found


def test_thirty_runs_of_a_sweep_give_a_verdict_in_forty_lines() -> None:
    runs = sweep()
    found = compare(runs)
    assert found.axis.name == "samples"
    usable = [r for n, r in runs.items() if not n.startswith(("lr 10", "lr 1e-06"))]
    there = [group for group in found.groups if group.reached]
    assert 15 <= len(there) < 30
    assert found.at < 1.0, "not where the slowest came to"
    assert found.at >= min(map(lowest_sure, usable))
    told = " ".join(found.verdict())
    names = {group.name for group in there}
    assert not any(name.startswith(("lr 10,", "lr 1e-06")) for name in names)
    assert "lr 10, batch 32, lr 10, batch 128 and" in told or "lr 10, batch 32" in told
    assert "whose loss never clearly fell" in told
    assert "never below" in told
    first = found.groups[0]
    costs = {n: read(r, found.at) * int(n.rsplit(" ", 1)[1]) for n, r in runs.items() if n in names}
    assert first.values["cost"] <= min(costs.values()) * 1.05, "noisy crossings are within their noise of the first"
    text = found.table()
    assert len(text.splitlines()) <= 40
    assert text.splitlines()[9] == "25 more: in the page (--html) and in JSON (--json)"
    assert "nan" not in text
    assert len(found.to_dict()["groups"]) == 30


def test_one_dead_run_is_left_out_by_name() -> None:
    runs = {"a": run(decay(30)), "b": run(decay(40)), "dead": run(lambda k: 1 - 1e-5 * k)}
    found = compare(runs)
    assert found.winner == "a"
    assert found.at == pytest.approx(math.exp(-300 / 40), rel=1e-9)
    assert found.verdict()[-1] == "Left out: dead, never below 0.997."
    alone = compare({"a": runs["a"], "dead": runs["dead"]})
    assert alone.verdict() == [
        "At loss 4.54e-05, a is alone: it took 300 steps.",
        "Left out: dead, never below 0.997.",
    ]


def blown(end: Curve) -> RunRecord:
    """A run whose first losses ran away, and whose extrapolated ones are far below 0 until these are out of sight."""
    wild = {5: (1651.0, 849.0), 10: (-10.8, 462.0), 15: (-126.0, 289.0), 20: (-182.0, 211.0), 25: (-29.0, 248.0)}
    loss: Curve = lambda k: 244.0 if k == 0 else wild[int(k)][0] if k in wild else end(k)  # noqa: E731
    errors: Curve = lambda k: wild[int(k)][1] if k in wild else 0.02  # noqa: E731
    return straight(range(5, 301, 5), loss, columns={"loss_se": errors, "loss_drop_se": lambda k: 87.0 + errors(k)})


def test_a_run_that_ran_away_is_not_the_first_by_losses_that_are_not_known() -> None:
    runs = {"a": run(decay(30, 2.5)), "b": run(decay(60, 2.5)), "blown": blown(lambda k: 2.5 - 5e-4 * k)}
    found = compare(runs)
    assert found.winner == "a", "what is not known of the third does not spoil the verdict"
    assert found.verdict()[-1] == "Left out: blown, whose loss never clearly fell."
    assert found.at == compare({name: runs[name] for name in ("a", "b")}).at
    assert not [level for level in found.levels for name, _ in level.order if name == "blown"]


def test_a_run_that_ran_away_and_then_learned_is_where_its_known_losses_are() -> None:
    late = blown(decay(60, 2.5))
    crossing = Timeline(late).crossing(0.1)
    assert crossing.step == pytest.approx(60 * math.log(25), abs=0.1)  # chords of rows 5 apart
    assert crossing.earliest > 150
    assert Timeline(late).lowest > 0


def test_a_first_error_that_is_large_but_below_the_fall_is_no_reason() -> None:
    errors: Curve = lambda k: 0.3 if k < 12 else 0.01  # noqa: E731
    found = straight(range(5, 301, 5), decay(30, 2.5), columns={"loss_se": errors, "loss_drop_se": errors})
    assert Timeline(found).crossing(2.0).step == pytest.approx(30 * math.log(1.25), abs=1.0)
    assert Timeline(found).fell


def test_losses_that_are_never_finite_are_left_out_by_name() -> None:
    runs = {"a": run(decay(30)), "b": run(decay(40)), "lost": run(lambda k: math.nan), "wild": run(lambda k: math.inf)}
    found = compare(runs)
    assert found.verdict()[-1] == "Left out: lost and wild, whose loss never clearly fell."


def test_many_that_came_near_are_named_up_to_five() -> None:
    runs = {f"good {i}": run(decay(20 + i), every=1) for i in range(9)}
    for i, floor in enumerate(np.linspace(0.6, 0.8, 7)):
        runs[f"poor {i}"] = run(lambda k, f=floor: f + (1 - f) * math.exp(-k / 20))
    (said,) = [text for text in compare(runs).verdict() if text.startswith("Left out")]
    assert said.startswith("Left out: poor 0, never below 0.600; poor 1, never below 0.633;")
    assert said.endswith("; 2 more, never below 0.767.")


# --- a loss that was asked for


@pytest.mark.parametrize(("starts", "at"), [((1.0, 2.0), 3.0), ((1.0, 2.0), 2.0), ((2.0,), 2.5), ((-3.0, -2.0), 0.0)])
def test_a_loss_that_all_began_below_is_refused_with_those_to_choose_from(starts: tuple[float, ...], at: float) -> None:
    runs = {str(start): straight(range(1, 50), lambda k, start=start: start - k / 100) for start in starts}
    with pytest.raises(ValueError, match=rf"at must be a loss that a run came down to, got {number(at)}") as error:
        compare(runs, at=at)
    ends = f"choose between {number(min(starts) - 0.49)} and {number(max(starts))}"
    assert str(error.value).endswith(ends)


def test_a_loss_that_one_began_above_is_compared_at() -> None:
    runs = {str(start): straight(range(1, 90), lambda k, start=start: start - k / 100) for start in (1.0, 2.0)}
    assert [group.values["cost"] for group in compare(runs, at=1.5).groups] == pytest.approx([0, 50])


def test_a_start_that_is_unknown_refuses_no_loss() -> None:
    unknown = straight(range(1, 50), decay(20), columns={"loss_drop": lambda k: math.nan})
    assert compare({"a": unknown, "b": straight(range(1, 50), decay(30))}, at=1.5).groups
