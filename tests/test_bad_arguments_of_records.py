"""Records, comparisons and figures refuse what they cannot use, and say what and why."""

from __future__ import annotations

import inspect
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bad_values import MORE_BAD, unclear_errors

from lightning_speedlimit import RunRecord, report
from lightning_speedlimit.record import SKETCH_SIZE, Summary
from lightning_speedlimit.report import figures, page, page_figures

KEYS = ("elapsed", "action", "work_ito", "loss", "loss_drop", "conversion", "signal_fraction", "efficiency")


def a_record() -> RunRecord:
    """Three rows on a straight line."""
    record = RunRecord({"clock": "steps", "parameters": 3})
    for step in (2, 4, 8):
        drop = 0.1 * step
        record.append(
            step,
            dict.fromkeys(KEYS, 0.4)
            | {"elapsed": step, "action": step, "loss": 2 - drop, "loss_drop": drop, "work_ito": 2 * drop},
        )
        record.add_sketch(step, np.full(SKETCH_SIZE, 0.01 * step))
    record.add_clouds(8, {"first": {"particles": 4, "wasserstein2": 1.0, "displacement": 1.0}})
    record.add_layers(8, {"first": {"action": 4.0}, "second": {"action": 1.0}})
    return record


RECORD = a_record()
COMPARISON = report.compare({"a": RECORD, "b": a_record()})


def on_new(name: str) -> Callable[..., Any]:
    return lambda **given: getattr(a_record(), name)(**given)


class Meter:
    steps, reasons = 9, {"loss": "unknown"}
    measured_coordinates = optimized_coordinates = 9

    @staticmethod
    def measure(*, sketch: bool) -> Any:
        return {"elapsed": 9.0}, None

    @staticmethod
    def layers() -> dict[str, dict[str, float]]:
        return {}


ONE = ("available", "efficiency", "windows", "layers", "layer_motion")  # figures of one run
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "RunRecord": (RunRecord, {"run": {"clock": "steps"}}),
    "append": (on_new("append"), {"step": 9, "values": {"loss": 1.0}, "reasons": {"loss": "none"}}),
    "take": (on_new("take"), {"meter": Meter(), "values": {"samples": 9.0}}),
    "amend": (on_new("amend"), {"values": {"loss": 1.0}, "reasons": {"loss": "none"}}),
    "add_sketch": (on_new("add_sketch"), {"step": 9, "sketch": np.ones(SKETCH_SIZE)}),
    "add_clouds": (on_new("add_clouds"), {"step": 9, "layers": {"first": {"particles": 4, "wasserstein2": 1.0}}}),
    "add_layers": (on_new("add_layers"), {"step": 9, "layers": {"first": {"action": 4.0, "work_ito": 1.0}}}),
    "tune": (on_new("tune"), {}),
    "tuning": (RECORD.tuning, {"after": 0, "to": 8}),
    "stretch": (RECORD.stretch, {"start": 0, "stop": 8}),
    "windows": (RECORD.windows, {"first_step": 0, "last_step": 8}),
    "save": (RECORD.save, {"path": "saved"}),
    "load": (RunRecord.load, {"path": "saved", "sketches": True}),
    "state_dict": (RECORD.state_dict, {"sketches": True}),
    "from_state_dict": (RunRecord.from_state_dict, {"state": RECORD.state_dict()}),
    **{
        f"from_state_dict, {part}": (
            lambda part=part, **given: RunRecord.from_state_dict(RECORD.state_dict() | {part: given["state"]}),
            {"state": RECORD.state_dict()[part]},
        )
        for part in RECORD.state_dict()
    },
    "from_row": (
        Summary.from_row, {"steps": 3, "values": {"loss": 1.0}, "reasons": {"loss": "none"}, "run": {"clock": "steps"}}
    ),
    "compare": (report.compare, {"runs": [RECORD], "by": "step", "at": 4}),
    "compare, a group": (lambda **given: report.compare({"name": given["runs"]}), {"runs": [RECORD]}),
    "compare, one of several": (lambda **given: report.compare([RECORD, given["runs"]]), {"runs": "saved"}),
    "compare_models": (report.compare_models, {"runs": [RECORD], "by": "loss", "at": None}),
    "diagnose": (report.diagnose, {"values": {"loss": 1.0}, "record": RECORD}),
    "advise": (report.advise, {"record": RECORD, "others": [RECORD]}),
    "html": (COMPARISON.html, {"path": "page.html"}),
    "page": (page.page, {"comparisons": [COMPARISON], "command": "speedlimit compare"}),
    "write_page": (page.write_page, {"path": "page.html", "comparisons": [COMPARISON], "command": "speedlimit"}),
    **{name: (getattr(figures, name), {"record": RECORD}) for name in ONE},
    **{name: (getattr(figures, name), {"runs": {"a": RECORD}}) for name in ("curves", "trajectories", "work_balance")},
    "plane": (
        figures.plane, {"points": [figures.PlanePoint("a", 1.0, 2.0, 1.0)], "clock": "steps", "title": "a title"}
    ),
    "PlanePoint": (
        lambda **given: figures.plane([figures.PlanePoint(**given)]),
        {"name": "a", "elapsed": 1.0, "action": 2.0, "displacement": 1.0, "elapsed_interval": (0.5, 2.0),
         "action_interval": (1.0, 3.0), "on_frontier": True},
    ),
    "png": (figures.png, {"figure": figures.work_balance(RECORD)}),
    "pixels": (figures.pixels, {"figure": figures.work_balance(RECORD)}),
    "svg": (figures.svg, {"figure": figures.work_balance(RECORD), "prefix": "f"}),
}  # fmt: skip


# What is said of records that are none, of folders without one, and of parts of a state.
SAID = (
    "the record is damaged",
    "no record",
    "no such folder",
    "at least one run",
    "run got",
    "run must",
    "column names",
    "layers of clouds",
    "layers must",
)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore")
def test_bad_values_are_refused_with_a_reason(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        page_figures, "_picture", lambda *given: page_figures.Picture(*given[:3], svg="", missing="quick")
    )  # quick
    RECORD.save("saved")
    missing = {("path", "a path that is not there")} if name in ("html", "write_page") else set()  # an OSError is right
    unclear = unclear_errors(*CALLS[name], MORE_BAD, missing, also_said=SAID)
    assert not unclear, "\n".join(unclear)


def test_every_public_function_of_these_is_called() -> None:
    """Those that take something: methods by their own names, which differ."""

    def takes(call: Any) -> bool:
        return inspect.isroutine(call) and set(inspect.signature(call).parameters) - {"self"} != set()

    owners = {RunRecord: dir(RunRecord), report.Comparison: dir(report.Comparison), figures: figures.__all__}
    owners |= {report: report.__all__, page: ["page", "write_page"]}
    public = {
        name for owner, names in owners.items() for name in names if name[0] != "_" and takes(getattr(owner, name))
    }
    assert len(public) > 20
    assert public <= set(CALLS), public - set(CALLS)


def test_an_error_that_names_nothing_is_seen() -> None:
    def careless(argument: Any) -> float:
        return 1.0 if argument is None else float(argument)

    assert len(unclear_errors(careless, {"argument": 1.0}, MORE_BAD)) > 15


# --- accepted, and what it becomes


def test_numbers_and_steps_of_every_library_are_taken() -> None:
    record = RunRecord()
    record.append(
        np.int64(3), {"loss": np.float32(0.5), "action": torch.tensor(2.0), "elapsed": 3, "work": float("nan")}
    )
    record.append(torch.tensor(4), {"loss": np.array(0.25)})
    assert record.columns["step"].tolist() == [3, 4]
    assert record.columns["loss"].tolist() == [0.5, 0.25]
    assert record.columns["action"][0] == 2.0


@pytest.mark.parametrize("step", [2.5, 4.0, True, "4"], ids=repr)
def test_a_step_is_a_whole_number(step: Any) -> None:
    """2.5 was taken for 2."""
    with pytest.raises(TypeError, match=r"step got .*, wanted a whole number; use int\(…\)"):
        a_record().append(step, {})
    with pytest.raises(TypeError, match=r"first_step got .*, wanted steps: whole numbers"):
        RECORD.windows([step if step != 4.0 else 4.1], [8])  # of an array whole floats are taken


def test_what_is_refused_leaves_the_record_as_it_was() -> None:
    record = a_record()
    before = record.state_dict()
    for values, reasons in (({"loss": 1.0, "action": "2"}, None), ({"loss": 1.0}, {"loss": 3})):
        for change in (lambda v, r: record.append(9, v, r), record.amend):
            with pytest.raises(TypeError, match=r"values\['action'\] got '2', wanted a number|reasons\['loss'\] got 3"):
                change(values, reasons)
    np.testing.assert_equal(record.state_dict(), before)


@pytest.mark.parametrize("call", [RECORD.save, RunRecord.load, COMPARISON.html, report.compare])
def test_no_path_is_not_the_working_directory(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"got '', wanted a .*; '.' is the working directory"):
        call("")
    assert not os.listdir(tmp_path)


def test_a_page_replaces_files_alone(tmp_path: Path) -> None:
    """A pipe, and as root a device, was replaced by the page."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "link", "folder"):
        with pytest.raises(ValueError, match=r"path got .*, wanted the name of a file: that is a folder, a pipe"):
            COMPARISON.html(tmp_path / name)
    assert stat.S_ISFIFO((tmp_path / "pipe").lstat().st_mode)
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("prefix", ['a" onload="x', "1a", "", "a b", "ä", "a" * 101], ids=str)
def test_ids_in_a_page_are_plain(prefix: str) -> None:
    with pytest.raises(ValueError, match=r"prefix got .*, wanted a letter and then letters"):
        figures.svg(figures.work_balance(RECORD), prefix=prefix)
