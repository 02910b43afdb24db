"""Which records are compared, what they are called, and which are replicas of one another."""

import os
from pathlib import Path

import pytest
from comparison_cases import decay, description, straight

from lightning_speedlimit.record import RecordError, RunRecord
from lightning_speedlimit.report import runs as runs_module
from lightning_speedlimit.report.runs import gather, optimizer_title, records_within, with_sketches


def saved(folder: Path, *, sketches: int = 0, **settings: object) -> Path:
    """A small record in a folder, which it returns."""
    record = straight(range(10, 60, 10), decay(50), run=description(**settings))  # type: ignore[arg-type]
    for step in range(60, 60 + sketches):
        record.append(step, {})
        record.add_sketch(step, [float(step)] * 4093)
    record.save(folder)
    return folder


def named(*sources: object) -> dict[str, str]:
    """Name → group."""
    return {run.name: run.group for run in gather(sources).runs}  # type: ignore[arg-type]


# --- names


def test_runs_are_called_by_what_tells_their_folders_apart(tmp_path: Path) -> None:
    for name in ("adam", "sgd"):
        saved(tmp_path / "logs" / name / "version_0" / "speed_limit")
    assert named(tmp_path / "logs") == {"adam": "adam", "sgd": "sgd"}
    # the parts that all have in common are no part of the name, wherever they are
    saved(tmp_path / "logs" / "adam" / "version_1" / "speed_limit")
    assert set(named(tmp_path / "logs")) == {"adam/version_0", "adam/version_1", "sgd/version_0"}


def test_natural_order_and_a_single_run(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        saved(tmp_path / f"run {number}")
    assert list(named(tmp_path)) == ["run 1", "run 2", "run 10"]
    assert list(named(tmp_path / "run 2")) == ["run 2"]
    saved(tmp_path / "alone" / "version_3" / "speed_limit")
    assert list(named(tmp_path / "alone")) == ["version_3"], "the folder that all are named by tells nothing"


def test_a_folder_within_another_keeps_a_name(tmp_path: Path) -> None:
    outer = saved(tmp_path / "a")
    saved(tmp_path / "a" / "b")
    assert len(named(outer, tmp_path / "a" / "b")) == 2


def test_records_as_objects_are_called_by_their_optimizers() -> None:
    one = straight(range(10, 60, 10), decay(50))
    two = straight(range(10, 60, 10), decay(20))
    silent = straight(range(10, 60, 10), decay(20), run={})
    assert named(one, two, silent) == {
        "SGD lr 0.1, batch 8": "SGD lr 0.1, batch 8",
        "SGD lr 0.1, batch 8 (2)": "SGD lr 0.1, batch 8 (2)",
        "run": "run",
    }, "of one title, but nothing says that they are replicas"


def test_titles() -> None:
    groups = [{"lr": 0.1, "momentum": 0.9}, {"lr": 0.01, "momentum": 0.9}]
    assert optimizer_title({"optimizers": [{"class": "SGD", "groups": groups}]}) == "SGD lr 0.1/0.01 momentum 0.9"
    two = [{"class": "Adam", "groups": [{"lr": 1e-3}]}, {"class": "LBFGS", "groups": []}]
    assert optimizer_title({"optimizers": two, "batch_size": 32}) == "Adam lr 0.001 + LBFGS, batch 32"
    assert optimizer_title({}) == "run"
    assert optimizer_title({"optimizers": []}) == "run"


# --- groups


@pytest.mark.parametrize(
    ("first", "second", "group"),
    [
        ("adam/seed_0", "adam/seed_1", "run"),  # what all have in common is no name
        ("adam-seed1", "adam-seed12", "adam"),
        ("lr0.1_seed=2", "lr0.1_seed=3", "lr0.1"),
        ("lr0.1 Seed 2", "lr0.1 Seed 3", "lr0.1"),
        ("adam.replica.1", "adam.replica.2", "adam"),
        ("seed0_adam", "seed1_adam", "adam"),
        ("seed_0/adam", "seed_1/adam", "run"),
    ],
)
def test_folders_that_differ_in_a_seed_are_replicas(tmp_path: Path, first: str, second: str, group: str) -> None:
    saved(tmp_path / first)
    saved(tmp_path / second)
    assert list(named(tmp_path).values()) == [group, group]


def test_seeds_below_several_settings(tmp_path: Path) -> None:
    for optimizer in ("adam", "sgd"):
        for seed in (0, 1, 10):
            saved(tmp_path / optimizer / f"seed_{seed}" / "version_0" / "speed_limit", name=optimizer)
    assert named(tmp_path) == {f"{o}/seed_{s}": o for o in ("adam", "sgd") for s in (0, 1, 10)}
    for optimizer in ("adam", "sgd"):
        saved(tmp_path / "2" / f"seed_{0}" / optimizer / "lr_1", name=optimizer)
        saved(tmp_path / "2" / f"seed_{1}" / optimizer / "lr_2", name=optimizer)
    found = named(tmp_path / "2")
    assert set(found.values()) == {f"{o}/lr_{lr}" for o in ("adam", "sgd") for lr in (1, 2)}


@pytest.mark.parametrize("names", [("seedling_3", "seedling_4"), ("reseed_3", "reseed_4"), ("seeds/a", "seeds/b")])
def test_words_with_a_seed_in_them_are_names(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        saved(tmp_path / name)
    assert len(set(named(tmp_path).values())) == 2


def test_a_mapping_names_the_groups(tmp_path: Path) -> None:
    a, b, c = (saved(tmp_path / name) for name in "abc")
    record = straight(range(10, 60, 10), decay(20))
    found = gather({"one": [a, b], "two": c, "three": record}).runs
    assert [(run.name, run.group) for run in found] == [
        ("one 1", "one"),
        ("one 2", "one"),
        ("two", "two"),
        ("three", "three"),
    ]
    assert found[3].record is record
    assert found[2].path == c
    assert [run.group for run in gather({"both": [record, a], "folder": tmp_path}).runs] == ["both"] * 2 + [
        "folder"
    ] * 3


@pytest.mark.parametrize("names", [(1, "1"), (1.5, "1.5"), ("a\x1b", r"a\x1b"), (True, "True")])
def test_two_groups_of_one_name_are_no_replicas(names: tuple[object, object]) -> None:
    """The same settings, so that nothing else would tell."""
    runs = [straight(range(10, 60, 10), decay(time)) for time in (20, 30)]
    with pytest.raises(ValueError, match=r"names of groups of runs must differ, got .* twice; give each a name"):
        gather(dict(zip(names, runs, strict=True)))


def test_names_that_a_replica_and_a_group_would_share() -> None:
    replicas = [straight(range(10, 60, 10), decay(time)) for time in (20, 30)]
    other = straight(range(10, 60, 10), decay(40))
    found = gather({"A": replicas, "A 1": other}).runs
    assert [run.group for run in found] == ["A", "A", "A 1"], "a group is called as was asked for"
    assert len({run.name for run in found}) == 3
    assert [run.record for run in found] == [*replicas, other]


def test_a_run_that_is_named_twice_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = saved(tmp_path / "a")
    saved(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    os.symlink(a, tmp_path / "link")
    assert set(named(tmp_path / "a", "a", "./b/../a", "link", tmp_path / "b")) == {"a", "b"}
    record = straight(range(10, 60, 10), decay(20))
    assert len(gather([record, record]).runs) == 1
    assert len(gather({"A": [record, record]}).runs) == 1, "two equal replicas would have no spread"


def test_other_settings_are_no_replicas(tmp_path: Path) -> None:
    one, two = saved(tmp_path / "seed_0", lr=0.1), saved(tmp_path / "seed_1", lr=0.2)
    with pytest.raises(ValueError, match=r"group 'run' must be replicas, got 'seed_0' \(SGD lr 0.1.*SGD lr 0.2.*'one'"):
        gather([one, two])
    batches = [straight([10], decay(50), run=description(batch_size=size)) for size in (8, 16)]
    with pytest.raises(ValueError, match=r"batch 8\) and 'A 2' \(SGD lr 0.1, batch 16\)"):
        gather({"A": batches})
    accumulated = [straight([10], decay(50), run=description(accumulate_grad_batches=n)) for n in (1, 4)]
    with pytest.raises(ValueError, match=r"batch 32 \(8 x 4\)"):
        gather({"A": accumulated})
    assert len(gather({"A": batches[0], "B": batches[1]}).runs) == 2


# --- folders


def test_records_within(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no such folder"):
        records_within(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecordError, match=r"holds no record.*above it"):
        records_within(tmp_path / "empty")
    folder = saved(tmp_path / "runs" / "a")
    with pytest.raises(RecordError, match="is a file, wanted a folder"):
        records_within(folder / "record.json")
    assert records_within(folder) == [folder]
    assert records_within(tmp_path / "runs") == [folder]


def test_nothing_to_compare() -> None:
    for nothing in ([], {}, {"A": []}):
        with pytest.raises(ValueError, match="at least one run, got none"):
            gather(nothing)  # type: ignore[arg-type]


def test_sketches_are_read_when_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        saved(tmp_path / name, sketches=2)
    assert [len(run.record.sketch_steps) for run in gather(tmp_path).runs] == [2, 2]
    monkeypatch.setattr(runs_module, "KEEP_SKETCHES", 1)
    found = gather(tmp_path).runs
    assert [len(run.record.sketch_steps) for run in found] == [0, 0], "of many runs they would fill the memory"
    assert list(with_sketches(found[0]).sketch_steps) == [60, 61]
    record = RunRecord({})
    assert with_sketches(gather([record]).runs[0]) is record
