"""What a run leaves behind: rows, sketches, the folder on disk, and every way in which it can be damaged."""

import json
import math
import os
import shutil
import zipfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_speedlimit.record import MAX_SKETCHES, SKETCH_SIZE, RecordError, RunRecord, files, reading, writing
from lightning_speedlimit.words import plain_text


def sketch_of(step: int) -> np.ndarray:
    """A sketch that tells which step it belongs to."""
    return np.full(SKETCH_SIZE, step, dtype=np.float32)


def small_record() -> RunRecord:
    record = RunRecord({"clock": "steps", "optimizers": [{"class": "SGD", "lr": 0.1}]})
    for step in (10, 20, 30):
        record.append(step, {"loss": 1 / step, "displacement": step / 10}, {"efficiency": "the loss hardly fell"})
        record.add_sketch(step, sketch_of(step))
    return record


def assert_same(a: RunRecord, b: RunRecord) -> None:
    assert a.run == b.run
    assert a.reasons == b.reasons
    assert list(a.columns) == list(b.columns)
    for name, column in a.columns.items():
        assert b.columns[name].dtype == column.dtype
        np.testing.assert_array_equal(b.columns[name], column)  # exact: the bits are stored
    np.testing.assert_array_equal(a.sketch_steps, b.sketch_steps)
    np.testing.assert_array_equal(a.sketches, b.sketches)
    np.testing.assert_equal(a.layers, b.layers)
    assert a.clouds["layers"] == b.clouds["layers"]
    for name, values in a.clouds.items():
        if name != "layers":
            assert b.clouds[name].dtype == values.dtype
            np.testing.assert_array_equal(b.clouds[name], values)


# --- rows


def test_columns_have_one_row_per_log_step() -> None:
    columns = small_record().columns
    assert list(columns) == ["step", "loss", "displacement"]
    assert columns["step"].dtype == np.int64
    assert columns["loss"].dtype == np.float64
    np.testing.assert_array_equal(columns["step"], [10, 20, 30])
    np.testing.assert_array_equal(columns["loss"], [1 / 10, 1 / 20, 1 / 30])


def test_the_same_step_replaces_its_row() -> None:
    record = small_record()
    record.append(30, {"loss": 7.0}, {"loss": "measured twice"})
    assert len(record) == 3
    np.testing.assert_array_equal(record.columns["loss"], [1 / 10, 1 / 20, 7.0])
    # The whole row is replaced: what the second one does not give is not left over from the first.
    np.testing.assert_array_equal(record.columns["displacement"], [1.0, 2.0, np.nan])
    assert record.reasons == {"loss": "measured twice"}


def test_step_zero_is_a_row_and_can_be_replaced() -> None:
    record = RunRecord()
    record.append(0, {"loss": 1.0})
    record.append(0, {"loss": 2.0})
    np.testing.assert_array_equal(record.columns["loss"], [2.0])


def test_new_columns_are_filled_back_with_nan() -> None:
    record = RunRecord()
    record.append(1, {"loss": 1.0})
    record.append(2, {"action": 2.0})
    np.testing.assert_array_equal(record.columns["loss"], [1.0, np.nan])
    np.testing.assert_array_equal(record.columns["action"], [np.nan, 2.0])


def test_a_long_run_keeps_every_row() -> None:
    record = RunRecord()
    rows = 20_000  # eight doublings beyond the first capacity
    for step in range(rows):
        record.append(step, {"loss": step} if step < 100 else {"loss": step, "late": -step})
    np.testing.assert_array_equal(record.columns["loss"], np.arange(rows))
    np.testing.assert_array_equal(record.columns["late"][100:], -np.arange(100, rows))
    assert np.isnan(record.columns["late"][:100]).all()


def test_columns_are_copies() -> None:
    record = small_record()
    record.columns["loss"][:] = 0
    record.sketches[:] = 0
    assert record.columns["loss"].all()
    assert record.sketches.all()


@pytest.mark.parametrize(
    ("step", "values", "message"),
    [(29, {}, "got 29 after 30"), (-1, {}, "got -1"), (40, {"step": 1.0}, "what the row is known by")],
)
def test_rows_that_are_none_raise(step: int, values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_record().append(step, values)


def test_the_last_row_is_amended() -> None:
    record = small_record()
    record.amend({"wasserstein2": 2.5, "loss": 0.5}, {"wasserstein2": "an upper bound"})
    np.testing.assert_array_equal(record.columns["wasserstein2"], [np.nan, np.nan, 2.5])
    np.testing.assert_array_equal(record.columns["loss"], [1 / 10, 1 / 20, 0.5])
    np.testing.assert_array_equal(record.columns["displacement"], [1.0, 2.0, 3.0])  # what it does not name stays
    assert record.reasons == {"efficiency": "the loss hardly fell", "wasserstein2": "an upper bound"}
    record.amend({"wasserstein2": 2.0})  # known now: the reason goes
    assert record.reasons == {"efficiency": "the loss hardly fell"}
    assert len(record) == 3
    record.append(40, {"loss": 0.1})
    np.testing.assert_array_equal(record.columns["wasserstein2"], [np.nan, np.nan, 2.0, np.nan])


def test_a_row_that_is_not_there_can_not_be_amended() -> None:
    with pytest.raises(ValueError, match="amend needs a row to add to, got an empty record"):
        RunRecord().amend({"loss": 1.0})
    with pytest.raises(ValueError, match="values must not hold 'step'"):
        small_record().amend({"step": 1.0})


# --- clouds


def layer(particles: int, *values: float) -> dict[str, float]:
    names = ("wasserstein2", "wasserstein2_lower", "identity_excess", "displacement")
    return {"particles": particles, **dict(zip(names, values, strict=False))}


def clouded_record() -> RunRecord:
    """Its second layer comes later, the first is missing once, and one value could not be measured."""
    record = small_record()
    record.add_clouds(10, {"body.0": layer(64, 1.0, 0.9, 0.21, 1.1)})
    record.add_clouds(20, {"body.0": layer(64, 2.0, 2.0, 0.0, 2.0), "head": layer(10)})
    record.add_clouds(30, {"head": layer(10, 3.0, math.nan, math.inf, 4.0)})
    return record


def test_clouds_are_a_table_of_steps_and_layers() -> None:
    table, nan = clouded_record().clouds, math.nan
    assert list(table) == [
        "step",
        "layers",
        "particles",
        "wasserstein2",
        "wasserstein2_lower",
        "identity_excess",
        "displacement",
    ]
    assert table["layers"] == ["body.0", "head"]
    assert table["particles"].tolist() == [64, 10]
    assert table["step"].tolist() == [10, 20, 30]
    assert table["step"].dtype == table["particles"].dtype == np.int64
    np.testing.assert_array_equal(table["wasserstein2"], [[1.0, nan], [2.0, nan], [nan, 3.0]])
    np.testing.assert_array_equal(table["wasserstein2_lower"], [[0.9, nan], [2.0, nan], [nan, nan]])
    np.testing.assert_array_equal(table["identity_excess"], [[0.21, nan], [0.0, nan], [nan, math.inf]])
    np.testing.assert_array_equal(table["displacement"], [[1.1, nan], [2.0, nan], [nan, 4.0]])


def test_a_record_without_clouds_has_an_empty_table() -> None:
    table = small_record().clouds
    assert table["layers"] == []
    assert table["wasserstein2"].shape == (0, 0)


def test_the_same_step_replaces_its_clouds() -> None:
    record = clouded_record()
    record.add_clouds(30, {"body.0": layer(64, 5.0)})
    np.testing.assert_array_equal(record.clouds["wasserstein2"], [[1.0, math.nan], [2.0, math.nan], [5.0, math.nan]])


def test_clouds_are_copies() -> None:
    record = clouded_record()
    record.clouds["wasserstein2"][:] = 0
    record.clouds["layers"].clear()
    assert record.clouds["wasserstein2"][0, 0] == 1.0
    assert record.clouds["layers"] == ["body.0", "head"]


@pytest.mark.parametrize(
    ("step", "layers", "message"),
    [
        (29, {"body.0": layer(64)}, "got 29 after 30"),
        (-1, {}, "got -1"),
        (40, {"body.0": layer(0)}, "at least one of particles"),
        (40, {"body.0": {"wasserstein2": 1.0}}, "at least one of particles"),
        (40, {"body.0": {**layer(64), "W": 1.0}}, "values among"),
    ],
)
def test_clouds_that_are_none_raise(step: int, layers: dict[str, dict[str, float]], message: str) -> None:
    record = clouded_record()
    with pytest.raises(ValueError, match=message):
        record.add_clouds(step, layers)
    assert_same(record, clouded_record())


def test_clouds_round_trip(tmp_path: Path) -> None:
    record = clouded_record()
    record.save(tmp_path)
    for restored in (RunRecord.load(tmp_path), RunRecord.from_state_dict(record.state_dict())):
        assert_same(record, restored)
        restored.add_clouds(40, {"late": layer(3, 1.0)})  # and goes on
        assert restored.clouds["wasserstein2"].shape == (4, 3)
    assert_same(record, RunRecord.from_state_dict(record.state_dict(sketches=False) | {"arrays": arrays(record)}))


def arrays(record: RunRecord) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = record.state_dict()["arrays"]
    return found


def test_a_record_without_clouds_is_written_as_before_there_were_any(tmp_path: Path) -> None:
    """Versions of the package that know none can read it; one with clouds they refuse, with the cure."""
    small_record().save(tmp_path)
    document = json.loads((tmp_path / "record.json").read_text())
    assert document["format_version"] == 1
    assert "clouds" not in document
    assert "cloud_layers" not in small_record().state_dict()
    with zipfile.ZipFile(data_file(tmp_path)) as archive:
        assert not [name for name in archive.namelist() if "cloud" in name]
    clouded_record().save(tmp_path)
    assert json.loads((tmp_path / "record.json").read_text())["format_version"] == 2


def test_a_record_of_version_1_loads(tmp_path: Path) -> None:
    """Written by hand, as the first version wrote it."""
    values, step = np.array([[0.5, 0.25]]), np.array([1, 2])
    none, sketches = np.empty(0, dtype=np.int64), np.empty((0, SKETCH_SIZE), dtype=np.float32)
    np.savez(tmp_path / "new.npz", step=step, values=values, sketch_steps=none, sketch_ticks=none, sketches=sketches)
    content = (tmp_path / "new.npz").read_bytes()
    checksum = sha256(content).hexdigest()
    (tmp_path / "new.npz").rename(tmp_path / f"data-{checksum[:32]}.npz")
    shelf = {"count": 0, "size": SKETCH_SIZE, "stride": 1, "ticks_seen": 2, "newest_step": 2}
    document = {
        "format": "lightning-speedlimit record",
        "format_version": 1,
        "run": {"clock": "steps"},
        "reasons": {},
        "columns": ["loss"],
        "rows": 2,
        "sketches": {**shelf, "last_is_provisional": 0},
        "data": {"file": f"data-{checksum[:32]}.npz", "size": len(content), "sha256": checksum},
    }
    (tmp_path / "record.json").write_text(json.dumps(document))
    record = RunRecord.load(tmp_path)
    np.testing.assert_array_equal(record.columns["loss"], [0.5, 0.25])
    assert record.clouds["layers"] == []
    record.add_clouds(2, {"body.0": layer(64, 1.0)})
    record.save(tmp_path)
    assert_same(record, RunRecord.load(tmp_path))


@pytest.fixture
def clouded(tmp_path: Path) -> Path:
    clouded_record().save(tmp_path / "clouded")
    return tmp_path / "clouded"


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["clouds"], None, "clouds must be an object, got None"),
        (["clouds"], [], "clouds must be an object"),
        (["clouds", "rows"], -1, r"clouds\.rows must be an integer from 0"),
        (["clouds", "rows"], True, r"clouds\.rows must be an integer"),
        (["clouds", "rows"], 4, "cloud_step declares"),
        (["clouds", "rows"], 0, "the record is damaged"),
        (["clouds", "rows"], 10**12, "more than 2147483648"),
        (["clouds", "layers"], {"body.0": 1}, r"clouds\.layers must be a list"),
        (["clouds", "layers"], ["body.0", 3], r"clouds\.layers\[1\] must be text, got 3"),
        (["clouds", "layers"], ["body.0"], "cloud_particles declares"),
        (["clouds", "layers"], ["body.0", "body.0"], "layers of clouds must differ"),
        (["format_version"], 4, "this version reads up to 3; upgrade"),
    ],
)
def test_every_field_of_the_clouds_is_checked(clouded: Path, keys: list[str], value: object, message: str) -> None:
    edit(clouded, *keys, value=value)
    refuses(clouded, message)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("cloud_step", None, "holds"),
        ("cloud_values", None, "holds"),
        ("cloud_step", np.array([10, 10, 30]), "must increase"),
        ("cloud_step", np.array([-1, 10, 30]), "must increase"),
        ("cloud_step", np.array([10.0, 20.0, 30.0]), "declares .*<f8.* wanted .*<i8"),
        ("cloud_particles", np.array([64, 0]), "at least one particle"),
        ("cloud_particles", np.array([64, -5]), "at least one particle"),
        ("cloud_particles", np.array([[64, 10]]), "shape"),
        ("cloud_values", np.zeros((4, 2, 3)), "shape"),
        ("cloud_values", np.zeros((4, 3, 2), dtype=np.float32), "declares"),
        ("cloud_values", np.full((4, 3, 2), {}, dtype=object), "declares"),
    ],
)
def test_damaged_clouds_are_refused(clouded: Path, name: str, array: np.ndarray | None, message: str) -> None:
    rewrite_arrays(clouded, **{name: array})
    refuses(clouded, message)


def test_untouched_clouds_load(clouded: Path) -> None:
    """So what is refused above is the damage."""
    rewrite_arrays(clouded)
    edit(clouded, "clouds", "rows", value=3)
    assert_same(clouded_record(), RunRecord.load(clouded))


def test_layers_without_rows_are_refused(folder: Path) -> None:
    edit(folder, "clouds", value={"rows": 0, "layers": ["body.0"]})
    refuses(folder, r"clouds of \['body.0'\] must have at least one row")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cloud_layers": ["body.0"]}, "cloud_particles must be"),
        ({"cloud_layers": ["body.0", "body.0"]}, "layers of clouds must differ"),
        ({"cloud_layers": 3}, "not the state"),
        ({"arrays": {**arrays(clouded_record()), "cloud_values": np.zeros((3, 3, 2))}}, "cloud_values must be"),
        ({"arrays": {**arrays(clouded_record()), "cloud_step": [10, 20, 30]}}, "cloud_step must be"),
        ({"arrays": arrays(small_record())}, "must have at least one row"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_state_with_damaged_clouds_raises(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        RunRecord.from_state_dict(clouded_record().state_dict() | change)


def test_a_state_from_before_there_were_clouds(tmp_path: Path) -> None:
    state = clouded_record().state_dict()
    del state["cloud_layers"]
    state["arrays"] = {name: array for name, array in state["arrays"].items() if not name.startswith("cloud")}
    assert_same(small_record(), RunRecord.from_state_dict(state))


# --- what was run


def test_run_keeps_what_json_has_no_word_for(tmp_path: Path) -> None:
    run = {
        "lr": math.inf,
        "eps": -math.inf,
        "betas": (0.9, np.float64(0.99)),
        "loss": math.nan,
        "n": np.int64(3),
    }
    run |= {"__float__": "nan", "\\__float__": {"__float__": "inf"}, "nested": {"flag": True, "none": None}}
    RunRecord(run).save(tmp_path)
    loaded = RunRecord.load(tmp_path).run
    assert math.isnan(loaded.pop("loss"))
    assert loaded == {**{k: v for k, v in run.items() if k != "loss"}, "betas": [0.9, 0.99]}
    assert type(loaded["n"]) is int

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not in the JSON standard")

    json.loads((tmp_path / "record.json").read_text(), parse_constant=refuse)


@pytest.mark.parametrize("run", [{"optimizer": {"lr": object()}}, {1: "x"}, {"x": b"bytes"}])
def test_run_that_json_cannot_hold_raises_at_construction(run: dict[str, object]) -> None:
    with pytest.raises(TypeError, match="run"):
        RunRecord(run)


# --- sketches


@pytest.mark.parametrize("count", [1, 2, 511, 512, 513, 514, 1023, 1024, 1025, 1300, 3000])
def test_sketches_are_thinned_evenly(count: int) -> None:
    record = RunRecord()
    for step in range(1, count + 1):
        record.append(step, {})
        record.add_sketch(step, sketch_of(step))
    steps = record.sketch_steps
    assert steps[0] == 1
    assert steps[-1] == count
    assert len(steps) == min(count, len(steps)) <= MAX_SKETCHES
    # A shelf that has just been thinned is half full: never fewer than that.
    assert len(steps) >= min(count, MAX_SKETCHES // 2)
    spacing = np.diff(steps)
    assert (spacing[:-1] == spacing[:1]).all(), "even up to the last but one"
    assert (spacing[-1:] <= spacing[:1]).all(), "the last one may come early, never late"
    np.testing.assert_array_equal(record.sketches[:, 0], steps)  # each sketch still belongs to its step
    assert record.sketches.dtype == np.float32


def test_only_wanted_sketches_need_to_be_made() -> None:
    """Asking first gives the same shelf as adding all, at a fraction of the sketches made."""
    asked, eager, made = RunRecord(), RunRecord(), 0
    for step in range(1, 3001):
        for record in (asked, eager):
            record.append(step, {})
        eager.add_sketch(step, sketch_of(step))
        if asked.wants_sketch() or step == 3000:
            made += 1
            asked.add_sketch(step, sketch_of(step))
    np.testing.assert_array_equal(asked.sketch_steps, eager.sketch_steps)
    # 512 until the first thinning, then 256 per doubling of the run: log2(3000/512) = 2.6 of them.
    assert made <= 512 + 3 * 256


def test_a_sketch_that_was_not_wanted_is_last_until_the_next() -> None:
    record = RunRecord()
    for step in range(1, 514):
        record.append(step, {})
        record.add_sketch(step, sketch_of(step))
    assert record.sketch_steps[-1] == 513  # thinned once: every second step is wanted now
    record.append(514, {})
    assert not record.wants_sketch()
    record.add_sketch(514, sketch_of(514))
    assert record.sketch_steps[-2:].tolist() == [513, 514]
    record.append(515, {})
    assert record.wants_sketch()
    record.add_sketch(515, sketch_of(515))
    assert record.sketch_steps[-2:].tolist() == [513, 515]


def test_the_same_step_replaces_its_sketch() -> None:
    record = small_record()
    record.add_sketch(30, sketch_of(31))
    assert record.sketches[:, 0].tolist() == [10, 20, 31]


def test_the_callers_buffer_is_copied() -> None:
    record, buffer = RunRecord(), sketch_of(1)
    record.add_sketch(1, buffer)
    buffer[:] = 9
    assert record.sketches[0, 0] == 1


def test_sketches_of_another_size_or_order_raise() -> None:
    with pytest.raises(ValueError, match=r"shape \(4093,\), got \(4096,\)"):
        RunRecord().add_sketch(1, np.zeros(4096))
    with pytest.raises(ValueError, match="got 29 after 30"):
        small_record().add_sketch(29, sketch_of(29))


# --- state


def test_state_goes_on_as_if_never_away() -> None:
    stayed, left = RunRecord({"lr": math.nan}), RunRecord({"lr": math.nan})
    for step in range(1, 1600):
        for record in (stayed, left):
            record.append(step, {"loss": step})
        if step in (700, 701):  # one of them with a provisional sketch; both between a row and its sketch
            left = RunRecord.from_state_dict(left.state_dict())
        for record in (stayed, left):
            record.add_sketch(step, sketch_of(step))
    np.testing.assert_array_equal(left.sketch_steps, stayed.sketch_steps)
    np.testing.assert_array_equal(left.columns["loss"], stayed.columns["loss"])
    assert math.isnan(left.run["lr"])


def test_state_without_sketches_keeps_the_rows() -> None:
    record = small_record()
    restored = RunRecord.from_state_dict(record.state_dict(sketches=False))
    np.testing.assert_array_equal(restored.columns["loss"], record.columns["loss"])
    assert len(restored.sketch_steps) == 0
    restored.append(40, {})
    assert restored.wants_sketch()
    restored.add_sketch(40, sketch_of(40))
    assert restored.sketch_steps.tolist() == [40]


def test_a_record_is_read_without_its_sketches(tmp_path: Path) -> None:
    record = clouded_record()
    for step in (10, 20, 30):
        record.append(step + 100, {"loss": 1.0})
        record.add_sketch(step + 100, sketch_of(step))
    record.save(tmp_path)
    restored = RunRecord.load(tmp_path, sketches=False)
    assert_same(restored, RunRecord.from_state_dict(record.state_dict(sketches=False)))
    assert restored.sketches.shape == (0, SKETCH_SIZE)
    assert restored.sketches.dtype == np.float32
    assert np.isnan(restored.windows([0], [10]).efficiency).all()
    restored.append(500, {})
    restored.add_sketch(500, sketch_of(7))  # and goes on
    assert restored.sketch_steps.tolist() == [500]
    assert_same(RunRecord.load(tmp_path), record)


def test_a_provisional_sketch_that_is_left_out_is_none(tmp_path: Path) -> None:
    record = RunRecord({})
    for step in range(1, MAX_SKETCHES + 3):
        record.append(step, {"loss": 1.0 / step})
        record.add_sketch(step, sketch_of(step))
    assert record.state_dict()["sketch_state"]["last_is_provisional"] == 1, "what the test is about"
    record.save(tmp_path)
    restored = RunRecord.load(tmp_path, sketches=False)
    assert restored.state_dict()["sketch_state"]["last_is_provisional"] == 0
    restored.add_sketch(MAX_SKETCHES + 2, sketch_of(1))
    assert len(restored.sketch_steps) == 1


def test_damage_is_refused_without_the_sketches_too(tmp_path: Path) -> None:
    record = small_record()
    record.save(tmp_path)
    (file,) = tmp_path.glob("*.npz")
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(RecordError, match="sha256"):
        RunRecord.load(tmp_path, sketches=False)


def test_state_is_plain() -> None:
    def kinds(value: object) -> set[type]:
        if isinstance(value, dict):
            return {dict}.union(*map(kinds, value.values())) | {type(key) for key in value}
        if isinstance(value, list):
            return {list}.union(*map(kinds, value))
        return {type(value)}

    assert kinds(clouded_record().state_dict()) <= {dict, list, str, int, float, bool, type(None), np.ndarray}


@pytest.mark.parametrize("key", ["run", "columns", "sketch_state", "arrays"])
def test_state_that_lacks_something_raises(key: str) -> None:
    state = small_record().state_dict()
    del state[key]
    with pytest.raises(RecordError, match=key):
        RunRecord.from_state_dict(state)


def test_state_whose_lengths_differ_raises() -> None:
    state = small_record().state_dict()
    state["arrays"]["values"] = state["arrays"]["values"][:, :2]
    with pytest.raises(RecordError, match="values must be"):
        RunRecord.from_state_dict(state)


# --- disk


def test_round_trip(tmp_path: Path) -> None:
    record = small_record()
    record.save(tmp_path / "new" / "folder")
    loaded = RunRecord.load(tmp_path / "new" / "folder")
    assert_same(record, loaded)
    for one in (record, loaded):
        one.append(40, {"loss": 0.0})
    assert_same(record, loaded)


def test_an_empty_record_round_trips(tmp_path: Path) -> None:
    RunRecord().save(tmp_path)
    assert_same(RunRecord(), RunRecord.load(tmp_path))


def test_saving_again_leaves_one_data_file_and_what_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "data-mine.npz").write_text("not ours")
    record = small_record()
    record.save(tmp_path)
    record.append(40, {"loss": 1.0})
    record.save(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 3
    assert names[1:] == ["data-mine.npz", "record.json"]
    assert_same(record, RunRecord.load(tmp_path))


# What steers a terminal is escaped, and so changed: tests/test_damaged_records.py.
names = st.text(max_size=8).map(plain_text).filter(lambda name: name != "step")
rows = st.lists(st.dictionaries(names, st.floats(width=64), max_size=4), max_size=6)


@given(rows=rows, reasons=st.dictionaries(names, st.text(max_size=5), max_size=3))
def test_random_columns_round_trip(
    rows: list[dict[str, float]], reasons: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    record = RunRecord()
    for step, row in enumerate(rows):
        record.append(step, row, reasons)
    folder = tmp_path_factory.mktemp("record")
    record.save(folder)
    assert_same(record, RunRecord.load(folder))
    assert_same(record, RunRecord.from_state_dict(record.state_dict()))
    for name, column in record.columns.items():
        if name != "step":
            np.testing.assert_array_equal(column, [row.get(name, math.nan) for row in rows])


class Killed(BaseException):
    """Stands in for the end of the process: nothing may catch it and tidy up."""


CALLS = ("open", "replace", "fsync", "unlink")


def kill_at(monkeypatch: pytest.MonkeyPatch, deadly: int) -> list[str]:
    """Counts the calls that change the disk; the one numbered `deadly` does not happen, and none after it."""
    seen: list[str] = []
    for name in CALLS:
        real = getattr(os, name)

        def guarded(*args: object, _name: str = name, _real: object = real, **kwargs: object) -> object:
            seen.append(_name)
            if len(seen) >= deadly:
                raise Killed
            return _real(*args, **kwargs)  # type: ignore[operator]

        monkeypatch.setattr(os, name, guarded)
    return seen


def test_a_kill_at_any_moment_leaves_a_whole_record(tmp_path: Path) -> None:
    before, after = clouded_record(), clouded_record()
    after.append(40, {"loss": 0.0})
    after.add_clouds(40, {"head": layer(10, 9.0)})
    seen_states = []
    for deadly in range(1, 100):
        folder = tmp_path / str(deadly)
        before.save(folder)
        with pytest.MonkeyPatch.context() as monkeypatch:
            calls = kill_at(monkeypatch, deadly)
            try:
                after.save(folder)
            except Killed:
                finished = False
            else:
                finished = True
        loaded = RunRecord.load(folder)
        seen_states.append(len(loaded))
        assert_same(loaded, before if len(loaded) == 3 else after)
        after.save(folder)  # and the next write succeeds and clears what the killed one left
        assert_same(RunRecord.load(folder), after)
        assert len(list(folder.iterdir())) == 2
        if finished:
            break
    assert finished
    assert set(CALLS) == set(calls), "the kill reached every kind of call"
    # Old until record.json is replaced, new from there on, and both were seen.
    assert seen_states == sorted(seen_states)
    assert set(seen_states) == {3, 4}


def test_the_kill_test_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the old data deleted before the new are named, a kill loses the record."""
    real = writing._write_arrays

    def careless(path: Path, data: files.RecordData, like: Path | None) -> dict[str, object]:
        written = real(path, data, like)
        writing._delete_leftovers(path.parent, keep=path.name)
        return written

    record = small_record()
    record.save(tmp_path)
    record.append(40, {})
    monkeypatch.setattr(writing, "_write_arrays", careless)
    with monkeypatch.context() as inner:
        inner.setattr(json, "dumps", lambda *a, **k: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            record.save(tmp_path)
    with pytest.raises(RecordError, match="missing"):
        RunRecord.load(tmp_path)


def test_a_full_disk_raises_oserror_and_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = small_record()
    record.save(tmp_path)
    before = sorted(tmp_path.iterdir())
    record.append(40, {})

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as inner:
        inner.setattr(np, "savez", full)
        with pytest.raises(OSError, match="No space left"):
            record.save(tmp_path)
    assert sorted(tmp_path.iterdir()) == before
    assert len(RunRecord.load(tmp_path)) == 3


def test_reading_while_a_run_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data file may be replaced between the two reads: the reader starts again."""
    record = small_record()
    record.save(tmp_path)
    real = reading.parse
    writes = iter([True])

    def replaced_meanwhile(text: bytes) -> dict[str, object]:
        if next(writes, False):
            record.append(40, {})
            record.save(tmp_path)
        return real(text)

    monkeypatch.setattr(reading, "parse", replaced_meanwhile)
    assert len(RunRecord.load(tmp_path)) == 4


# --- damaged records


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_record().save(tmp_path / "record")
    return tmp_path / "record"


def edit(folder: Path, *keys: str, value: object) -> None:
    """Sets one value of record.json."""
    document = json.loads((folder / "record.json").read_text())
    target = document
    for key in keys[:-1]:
        target = target[key]
    target[keys[-1]] = value
    (folder / "record.json").write_text(json.dumps(document))


def data_file(folder: Path) -> Path:
    return next(folder.glob("data-*.npz"))


def rewrite_arrays(folder: Path, compression: int = zipfile.ZIP_STORED, **members: bytes | np.ndarray | None) -> None:
    """Replaces members of the data file (None: leaves one out), and makes size and checksum agree again."""
    path = data_file(folder)
    with zipfile.ZipFile(path) as archive:
        contents: dict[str, bytes] = {name: archive.read(name) for name in archive.namelist()}
    for name, new in members.items():
        if new is None:
            del contents[f"{name}.npy"]
        elif isinstance(new, bytes):
            contents[f"{name}.npy"] = new
        else:
            np.save(path.with_suffix(".npy"), new, allow_pickle=True)
            contents[f"{name}.npy"] = path.with_suffix(".npy").read_bytes()
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    sign(folder, path.read_bytes())


def sign(folder: Path, content: bytes) -> None:
    data_file(folder).write_bytes(content)
    edit(folder, "data", "size", value=len(content))
    edit(folder, "data", "sha256", value=sha256(content).hexdigest())


def refuses(folder: Path, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        RunRecord.load(folder)


def test_an_untouched_rewrite_loads(folder: Path) -> None:
    """So what the following tests refuse is the damage, not the tools that make it."""
    rewrite_arrays(folder)
    edit(folder, "rows", value=3)
    assert_same(small_record(), RunRecord.load(folder))


def test_missing_folder_and_files_are_refused(folder: Path) -> None:
    refuses(folder / "nowhere", "no such folder")
    refuses(folder / "record.json", "is a file, wanted a folder")
    data_file(folder).unlink()
    refuses(folder, r"data-\w+\.npz is missing, record\.json names it")
    (folder / "record.json").unlink()
    refuses(folder, r"holds no record: got no record\.json")


def test_a_newer_format_is_refused_with_the_cure(folder: Path) -> None:
    edit(folder, "format_version", value=4)
    refuses(folder, "format_version 4, this version reads up to 3; upgrade")


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["format"], "something else", "is no 'lightning-speedlimit record'"),
        (["format_version"], True, "format_version"),
        (["format_version"], 0, "format_version"),
        (["run"], [], "run"),
        (["reasons"], {"loss": 1}, "reasons"),
        (["columns"], ["loss", 3], "columns"),
        (["columns"], ["loss"], "values declares"),
        (["columns"], ["loss", "loss"], "column names must differ"),
        (["columns"], ["loss", "step"], "not be 'step'"),
        (["rows"], 4, "declares"),
        (["rows"], 2, "declares"),
        (["rows"], -1, "rows"),
        (["rows"], 3.0, "rows"),
        (["rows"], 10**12, "more than 2147483648"),
        (["rows"], 10**400, "no valid JSON: a number of 401 digits"),
        (["sketches"], None, "sketches"),
        (["sketches", "count"], 513, r"sketches\.count must be an integer from 0 to 512"),
        (["sketches", "count"], 2, "declares"),
        (["sketches", "size"], 4096, "4093"),
        (["sketches", "stride"], 0, "sketches"),
        (["data"], "data.npz", "data"),
        (["data", "file"], "../elsewhere/data.npz", "file name"),
        (["data", "file"], "/etc/passwd", "file name"),
        (["data", "file"], "..\\data-0123456789abcdef0123456789abcdef.npz", "file name"),
        (["data", "file"], "data-0123456789abcdef0123456789abcdef.npz\n", "file name"),
        (["data", "size"], 1, "bytes, wanted 1"),
        (["data", "size"], 10**10, "more than 2147483648"),
        (["data", "sha256"], "0" * 64, "sha256"),
    ],
)
def test_every_field_of_the_json_is_checked(folder: Path, keys: list[str], value: object, message: str) -> None:
    edit(folder, *keys, value=value)
    refuses(folder, message)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"format": NaN}',
        b"[" * 100_000,
        b'{"rows": ' + b"9" * 5000 + b"}",
    ],
)
def test_no_json_is_refused(folder: Path, text: bytes) -> None:
    (folder / "record.json").write_bytes(text)
    refuses(folder, r"record\.json is no")


def test_nan_tokens_are_refused(folder: Path) -> None:
    edit(folder, "run", "lr", value=math.nan)  # json.dumps writes the token NaN
    refuses(folder, "NaN is not in the JSON standard")


def test_json_of_any_size_is_refused_unread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_JSON_BYTES", 100)
    refuses(folder, "more than 100 bytes")


def test_truncated_and_changed_data_are_refused(folder: Path) -> None:
    content = data_file(folder).read_bytes()
    data_file(folder).write_bytes(content[:-1])
    refuses(folder, "bytes, wanted")
    data_file(folder).write_bytes(content[:-1] + b"\x01")
    refuses(folder, "sha256")


def test_data_that_are_no_archive_are_refused(folder: Path) -> None:
    sign(folder, b"no archive")
    refuses(folder, "no archive: File is not a zip file")


def header(shape: str, dtype: str = "<i8", order: str = "False", version: bytes = b"\x01\x00") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': {order}, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text.encode()


STEPS = np.array([10, 20, 30], dtype="<i8")


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (STEPS.astype("<i4"), "declares"),
        (STEPS.astype("<f8"), "declares .*<f8.* wanted .*<i8"),
        (STEPS.astype(">i8"), "declares .*>i8.* wanted .*<i8"),
        (STEPS[:2], "declares"),
        (STEPS.reshape(3, 1), r"declares .*\(3, 1\)"),
        (STEPS[::-1].copy(), "must increase"),
        (np.array([10, 10, 30]), "must increase"),
        (np.array([-1, 10, 30]), "must increase"),
        (np.array([{}, {}, {}], dtype=object), "declares"),
        (header("(1000000000000,)") + STEPS.tobytes(), r"declares .*\(1000000000000,\)"),
        (header("(3,)", dtype="|O") + STEPS.tobytes(), "declares .*[|]O"),
        (header("(3,)", order="True") + STEPS.tobytes(), "declares .*'fortran_order': True"),
        (header("(3,)", version=b"\x02\x00") + STEPS.tobytes(), r"declares .*x02.x00"),
        (header("(3,)") + STEPS.tobytes() + b"more", "holds 25 bytes"),
        (header("__import__('os')") + STEPS.tobytes(), "header"),
        (b"x" * 152, "header"),
        (b"", "declares 0 bytes"),
    ],
)
def test_arrays_of_another_kind_are_refused(folder: Path, member: bytes | np.ndarray, message: str) -> None:
    rewrite_arrays(folder, step=member)
    refuses(folder, message)


def test_a_well_formed_handmade_header_loads(folder: Path) -> None:
    """So the headers above are refused for what they say."""
    rewrite_arrays(folder, step=header("(3,)") + STEPS.tobytes())
    assert_same(small_record(), RunRecord.load(folder))


def test_arrays_missing_added_or_compressed_are_refused(folder: Path) -> None:
    changes: dict[str, dict[str, Any]] = {"missing": {"values": None}, "added": {"extra": STEPS}}
    for name, change in changes.items():
        shutil.copytree(folder, folder / name)
        rewrite_arrays(folder / name, **change)
        refuses(folder / name, "holds")
    rewrite_arrays(folder, zipfile.ZIP_DEFLATED)
    refuses(folder, "compressed")


def test_an_archive_that_lies_about_sizes_is_refused(folder: Path) -> None:
    """The size in the archive's directory is what is checked before reading."""
    content = bytearray(data_file(folder).read_bytes())
    entry = content.index(b"PK\x01\x02")  # the first entry of the central directory: step.npy
    content[entry + 24 : entry + 28] = (2**31 - 1).to_bytes(4, "little")  # its uncompressed size
    sign(folder, bytes(content))
    refuses(folder, "declares 2147483647 bytes")


def test_non_finite_values_are_values_not_damage(tmp_path: Path) -> None:
    record = RunRecord()
    record.append(1, {"loss": math.inf, "grad_norm": math.nan})
    record.add_sketch(1, np.full(SKETCH_SIZE, math.nan))
    record.save(tmp_path)
    assert_same(record, RunRecord.load(tmp_path))


def test_sketches_may_come_after_the_rows(tmp_path: Path) -> None:
    """All rows first, then the sketches of their steps: what is written can be read."""
    record = RunRecord()
    for step in (10, 20, 30):
        record.append(step, {"loss": 1.0})
    for step in (10, 20, 30):
        record.add_sketch(step, sketch_of(step))
    record.save(tmp_path)
    loaded = RunRecord.load(tmp_path)
    assert_same(record, loaded)
    assert loaded.sketch_steps.tolist() == [10, 20, 30]
    loaded.append(40, {"loss": 1.0})
    assert loaded.wants_sketch()
