"""The layers of a record: what it keeps of them, on disk and off it, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damaged_records import arrays_of, whole_record, with_arrays
from torch import nn

from lightning_speedlimit import RunRecord, TrajectoryMeter
from lightning_speedlimit.record import RecordError
from lightning_speedlimit.record.layers import LAYER_VALUES, MAX_LAYERS

LAYERS = {
    "h.0": {"parameters": 12.0, "displacement": 3.0, "path_length": 6.0, "action": 9.0, "signal_fraction": -0.1},
    "": {"displacement": 0.0, "path_length": 0.0},
    "head": {"displacement": 4.0, "path_length": math.nan, "action": 1.0},
}


def layered(layers: dict[str, dict[str, float]] | None = None, *, clouds: bool = False) -> RunRecord:
    record = whole_record(clouds=clouds, steps=40)
    record.add_layers(40, LAYERS if layers is None else layers)
    return record


def same(a: RunRecord, b: RunRecord) -> None:
    np.testing.assert_equal(a.layers, b.layers)
    assert list(a.columns) == list(b.columns)


def test_layers_are_a_row_of_what_was_last_read() -> None:
    found = layered().layers
    assert list(found) == ["step", "layers", *LAYER_VALUES, "straightness"]
    assert (found["step"], found["layers"]) == (40, ["h.0", "", "head"])
    np.testing.assert_array_equal(found["action"], [9.0, math.nan, 1.0])
    np.testing.assert_array_equal(found["straightness"], [0.25, math.nan, math.nan])  # 0/0 is not known
    found["action"][:] = 0.0
    assert layered().layers["action"][0] == 9.0


def test_a_later_reading_takes_the_place_of_the_one_before() -> None:
    record = layered()
    record.add_layers(50, {"tail": {"action": 2.0}})
    assert (record.layers["step"], record.layers["layers"]) == (50, ["tail"])
    record.add_layers(60, {})
    assert (record.layers["step"], record.layers["layers"], record.layers["action"].shape) == (None, [], (0,))


@pytest.mark.parametrize(
    ("step", "layers", "message"),
    [
        (39, LAYERS, "got 39 after 40"),
        (-1, LAYERS, "got -1"),
        (50, {"h.0": {"width": 3.0}}, r"layers\['h.0'\] must have values among"),
    ],
)
def test_layers_that_are_none_raise(step: int, layers: Any, message: str) -> None:
    record = layered()
    with pytest.raises(ValueError, match=message):
        record.add_layers(step, layers)
    same(record, layered())


# --- on disk


@pytest.mark.parametrize("clouds", [False, True])
@pytest.mark.parametrize("sketches", [False, True])
def test_layers_round_trip(tmp_path: Path, *, clouds: bool, sketches: bool) -> None:
    record = layered(clouds=clouds)
    record.save(tmp_path)
    for restored in (RunRecord.load(tmp_path, sketches=sketches), RunRecord.from_state_dict(record.state_dict())):
        same(record, restored)
        np.testing.assert_equal(record.clouds, restored.clouds)
        restored.add_layers(50, LAYERS)  # and goes on


@pytest.mark.parametrize(("clouds", "version"), [(False, 1), (True, 2)])
def test_records_without_layers_are_as_before(tmp_path: Path, clouds: bool, version: int) -> None:
    """What older versions wrote is read, and what they can read is written."""
    whole_record(clouds=clouds).save(tmp_path)
    document = json.loads((tmp_path / "record.json").read_text("ascii"))
    assert document["format_version"] == version
    assert not [name for name in (*document, *arrays_of(tmp_path)) if "layer" in name]
    assert RunRecord.load(tmp_path).layers["layers"] == []
    layered(clouds=clouds).save(tmp_path)
    assert json.loads((tmp_path / "record.json").read_text("ascii"))["format_version"] == 3


def damage(folder: Path, **parts: Any) -> None:
    layered().save(folder)
    if "names" in parts:
        path = folder / "record.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"layers": parts.pop("names")}))
    with_arrays(folder, arrays_of(folder) | parts)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"names": ["a", "a", "b"]}, "layers must differ"),
        ({"names": ["a", 3, "b"]}, r"layers\[1\] must be text, got 3"),
        ({"names": "abc"}, "layers must be a list"),
        ({"names": ["a", "b"]}, "layer_values declares"),
        ({"names": list(map(str, range(1001))), "layer_values": np.zeros((7, 1001))}, "1000 at most"),
        ({"layer_step": np.array([-3])}, "layer_step must increase, from 0"),
        ({"layer_step": np.array([3, 4])}, "layer_step declares"),
        ({"layer_values": np.zeros((7, 3), dtype=np.float32)}, "layer_values declares"),
    ],
)  # fmt: skip
def test_damaged_layers_are_refused(tmp_path: Path, parts: Any, message: str) -> None:
    damage(tmp_path, **parts)
    with pytest.raises(RecordError, match=message):
        RunRecord.load(tmp_path)


def test_names_are_made_fit_for_a_terminal(tmp_path: Path) -> None:
    damage(tmp_path, names=["\x1b[2J", "b", "c"])
    assert RunRecord.load(tmp_path).layers["layers"] == ["\\x1b[2J", "b", "c"]
    assert layered({"\x1b[2J": {}}).layers["layers"] == ["\\x1b[2J"]


@pytest.mark.parametrize(("count", "length", "kept"), [(12_000, 20, MAX_LAYERS), (500, 3000, 66), (1, 300_000, 0)])
def test_very_many_layers_leave_a_record_that_can_be_written(
    tmp_path: Path, count: int, length: int, kept: int
) -> None:
    """record.json may have a megabyte: those with the largest action stay, in their order."""
    names = [f"{i:06d}".ljust(length, "x") for i in range(count)]
    record = layered({name: {"action": float(i)} for i, name in enumerate(names)})
    record.save(tmp_path)
    assert (tmp_path / "record.json").stat().st_size < 2**18
    assert RunRecord.load(tmp_path).layers["layers"] == names[count - kept :]


def test_a_transformers_layers_take_some_kilobytes(tmp_path: Path) -> None:
    """146 tensors in 75 modules, beside 512 rows."""
    sizes = []
    for layers in (False, True):
        record = RunRecord()
        for step in range(1, 513):
            record.append(step, {"loss": 0.0})
            record.add_layers(step, {f"model.h.{i}.attn": dict.fromkeys(LAYER_VALUES, 1.0) for i in range(75 * layers)})
        record.save(tmp_path / str(layers))
        sizes.append(sum(path.stat().st_size for path in (tmp_path / str(layers)).iterdir()))
    assert 4_000 < sizes[1] - sizes[0] < 8_000


# --- by hand, and of a stretch


def test_a_plain_loop_that_names_its_layers_has_them() -> None:
    first, second = parameters = [nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (4, 9)]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    meter = TrajectoryMeter(optimizer, layer_of=lambda p: "first" if p is first else "second")
    record = RunRecord(meter.description())
    for sign in (1.0, 1.0, -1.0):
        first.grad, second.grad = torch.ones_like(first), sign * torch.ones_like(second)
        optimizer.step()
        record.take(meter)
    found = record.layers
    assert (found["step"], found["layers"]) == (3, ["first", "second"])
    np.testing.assert_allclose(found["displacement"], [3.0, 1.5], rtol=1e-12)
    np.testing.assert_allclose(found["path_length"], [3.0, 4.5], rtol=1e-12)
    np.testing.assert_allclose(found["action"], [3 * 1.0, 3 * 2.25], rtol=1e-12)
    np.testing.assert_allclose(found["straightness"], [1.0, 1 / 9], rtol=1e-12)
    assert np.isnan(found["parameters"]).all(), "the meter does not tell"


def test_without_names_there_are_none() -> None:
    weight = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    meter = TrajectoryMeter(optimizer)
    record = RunRecord(meter.description())
    weight.grad = torch.ones(3)
    optimizer.step()
    record.take(meter)
    assert record.layers["layers"] == []


def test_a_stretch_has_no_layers() -> None:
    """The sums are of the whole run."""
    assert layered().stretch(10, 30).layers["layers"] == []
