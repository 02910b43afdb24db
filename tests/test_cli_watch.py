"""`speedlimit watch`, and what `speedlimit show` says of a run that is going on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from callback_cases import Regressor, batches, loader, quiet, trainer
from damaged_records import whole_record
from test_cli import COMMAND, ESCAPE, complaint, environment, on_terminal, printed, speedlimit

from lightning_speedlimit import RunRecord
from lightning_speedlimit.cli import watch_view, watching
from lightning_speedlimit.cli.watching import Watch


def going(steps: int, **marks: Any) -> RunRecord:
    """A run of so many steps that goes on, written now."""
    record = whole_record(steps=steps)
    record.run |= {"ended": None, "written": time.time(), "loss_window": 1} | marks
    return record


class Script:
    """Stands in for `time`: what happens while the watch sleeps, one thing each time; then Ctrl-C."""

    def __init__(self, *acts: Callable[[], object]) -> None:
        self.acts: Iterator[Callable[[], object]] = iter(acts)
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        act = next(self.acts, None)
        if act is None:
            raise KeyboardInterrupt
        act()


def watched(monkeypatch: pytest.MonkeyPatch, folder: Path, *acts: Callable[[], object], run: str = "run") -> list[str]:
    """The lines that a pipe gets; the watch is left by Ctrl-C or ends by itself, in either case as if nothing was."""
    monkeypatch.setattr(watching, "time", Script(*acts))
    return timeless(printed("watch", run, cwd=folder)).splitlines()


def timeless(text: str) -> str:
    """Tests take some seconds, now more and now less."""
    return re.sub(r"\b\d+ s ago", "… s ago", text)


# --- lines


def test_each_new_row_is_a_line_and_the_watch_ends_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    going(40).save(run)
    lines = watched(
        monkeypatch,
        tmp_path,
        lambda: None,  # nothing new: no line
        lambda: going(60).save(run),
        lambda: going(70, ended="finished").save(run),
        lambda: pytest.fail("it looks again after the end"),
    )
    steps = [re.match(r"step (\d+)   loss (\S+)   noise share ", line) for line in lines]
    assert [match and match[1] for match in steps] == ["10", "20", "30", "40", None, "50", "60", "70", None]
    assert steps[0] is not None
    assert float(steps[0][2]) == pytest.approx(0.819, abs=1e-3)  # e^(−0.2)
    assert lines[4] == "run   still running, last written … s ago"
    assert lines[-1] == "run   ended … s ago"


def test_it_waits_where_there_is_no_record_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = watched(
        monkeypatch,
        tmp_path,
        lambda: None,
        lambda: (tmp_path / "run").mkdir(),
        lambda: going(20).save(tmp_path / "run" / "version_0" / "speed_limit"),
    )
    leave = "Ctrl-C ends, --once does not wait"
    assert lines[0] == f"Waiting for a run in run: no such folder; {leave}"
    assert lines[1] == f"Waiting for a run in run: SpeedLimit writes at the first log step; {leave}"
    assert lines[2].startswith("step 10 ")
    assert lines[-1] == "run/version_0/speed_limit   still running, last written … s ago"


def test_a_loop_of_ones_own_is_not_called_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = whole_record(steps=20)
    del record.run["ended"], record.run["written"], record.run["pause"]
    record.save(tmp_path / "run")
    lines = watched(monkeypatch, tmp_path, lambda: None)
    waiting = "Waiting for a run that goes on in run; Ctrl-C ends, --once does not wait"
    assert lines[-2:] == ["run   last written … s ago", waiting]
    assert "still running" not in "".join(lines)


def test_a_fit_that_falls_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    going(20).save(run)
    lines = watched(monkeypatch, tmp_path, lambda: os.utime(run / "record.json", (time.time() - 7200,) * 2))
    assert lines[-3:] == [
        "run   still running, last written … s ago",
        "run   not ended: last written 2 h ago, killed or still running",
        "Waiting for a run that goes on in run; Ctrl-C ends, --once does not wait",
    ]


def test_what_can_not_be_read_for_a_while_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows before stay, and what comes after is read."""
    run = tmp_path / "run"
    going(20).save(run)

    def damage() -> None:
        (run / "record.json").write_text("{")

    lines = watched(
        monkeypatch,
        tmp_path,
        damage,
        lambda: None,
        lambda: going(30).save(run),
        lambda: shutil.rmtree(run),
        lambda: None,
    )
    assert lines[2:] == [
        "run   still running, last written … s ago",
        lines[3],
        lines[4],
        "run can't be read now: No such file or directory",
    ]
    assert lines[3].startswith("run: record.json is no valid JSON")
    assert lines[4].startswith("step 30 ")


def test_lines_of_several_runs_begin_with_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b/speed_limit"):
        going(20).save(tmp_path / "run" / name)
    lines = watched(monkeypatch, tmp_path, lambda: going(40, ended="finished").save(tmp_path / "run" / "a"))
    assert sorted(line.split("   ")[0] + " " + line.split("   ")[1] for line in lines) == [
        "a ended … s ago",
        "a step 20",
        "a step 30",
        "a step 40",
        "a still running, last written … s ago",
        "b step 20",
        "b still running, last written … s ago",
    ]


def test_a_run_that_has_begun_since_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    going(20).save(tmp_path / "run" / "a")
    acts: list[Callable[[], object]] = [lambda: going(20).save(tmp_path / "run" / "b")]
    lines = watched(monkeypatch, tmp_path, *acts, *[lambda: None] * 8)
    assert len(lines) == 3, "two rows and the state of a: there is one search in ten looks"
    shutil.rmtree(tmp_path / "run" / "b")
    lines = watched(monkeypatch, tmp_path, *acts, *[lambda: None] * 9)
    assert any(line.startswith("b   step 20") for line in lines)


def steps_of(lines: list[str]) -> list[int]:
    return [int(found[1]) for line in lines if (found := re.search(r"step (\d+) ", line))]


def test_a_fit_that_begins_anew_in_the_folder_is_printed_from_its_first_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is beyond the rows of the one before at the first look."""
    run = tmp_path / "run"
    going(50).save(run)
    other = whole_record(steps=80, rate=0.03)
    other.run["ended"] = None
    lines = watched(
        monkeypatch,
        tmp_path,
        lambda: going(20).save(run),  # the same problem and seed: the same rows
        lambda: other.save(run),
        lambda: going(90, ended="finished").save(run),
    )
    assert steps_of(lines) == [*range(10, 51, 10), 10, 20, *range(10, 81, 10), *range(10, 91, 10)]


def test_a_resumed_fit_is_printed_from_where_it_left_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    going(50).save(run)
    resumed = going(30)
    resumed.append(40, {"loss": 0.4, "seconds": 2.0})
    lines = watched(monkeypatch, tmp_path, lambda: resumed.save(run))
    assert steps_of(lines) == [10, 20, 30, 40, 50, 40]


@pytest.mark.parametrize("names", [["."], ["a", "b"]])
def test_no_new_row_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str]) -> None:
    """However many were written between two looks; of what there was before the last 8, of several runs the last."""

    def save(steps: int) -> None:
        for name in names:
            going(steps).save(tmp_path / "run" / name)

    save(200)
    lines = watched(monkeypatch, tmp_path, lambda: save(500))
    first = range(130, 201, 10) if names == ["."] else [200]
    for name in names:
        own = lines if name == "." else [line for line in lines if line.startswith(f"{name} ")]
        assert steps_of(own) == [*first, *range(210, 501, 10)], name


def test_the_watch_ends_when_all_runs_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not before one that has begun just now."""
    for name in ("a", "b"):
        going(20, ended="finished").save(tmp_path / "run" / name)
    forbidden: Callable[[], object] = lambda: pytest.fail("it looks again after the end")  # noqa: E731
    lines = watched(monkeypatch, tmp_path, forbidden)
    assert sorted(lines)[::2] == ["a   ended … s ago", "b   ended … s ago"]
    going(20).save(tmp_path / "run" / "a")

    def next_one() -> None:
        going(30).save(tmp_path / "run" / "c")
        going(20, ended="finished").save(tmp_path / "run" / "a")

    lines = watched(
        monkeypatch,
        tmp_path,
        next_one,
        lambda: going(40, ended="finished").save(tmp_path / "run" / "c"),
        forbidden,
    )
    assert [line for line in lines if line.startswith("c ")][-1] == "c   ended … s ago"


# --- what is read


def test_a_file_is_read_when_it_has_changed_and_without_sketches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    going(20).save(tmp_path)
    real, read = RunRecord.load, []

    def load(path: Any, *, sketches: bool = True) -> RunRecord:
        read.append(sketches)
        return real(path, sketches=sketches)

    monkeypatch.setattr(RunRecord, "load", load)
    watch = Watch(tmp_path)
    for _ in range(3):
        watch.look()
    assert read == [False]
    going(20).save(tmp_path)
    watch.look()
    assert read == [False, False]


def test_looking_all_the_time_disturbs_no_fit(tmp_path: Path) -> None:
    """The fit keeps its folder, and leaves in it what it leaves alone; each look sees the rows that were written."""
    seen: list[int] = []
    watch = Watch(tmp_path / "run")

    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            before = sorted(os.listdir(tmp_path / "run"))
            watch.look()
            assert sorted(os.listdir(tmp_path / "run")) == before
            record = watch.read[0].record
            assert record is not None
            seen.append(len(record))
            assert watch.read[0].state.kind == "running"

    class Between(Looks):
        """Before the measurement: a look may come at any time."""

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            watch.look()

    callback = quiet(dirpath=tmp_path / "run")
    trainer(tmp_path, callback, Between(), max_epochs=3).fit(Regressor(), loader(batches(5)))
    assert callback._folder == tmp_path / "run"
    assert seen[0] == 1
    assert seen == sorted(seen), "the first row; the others when their time has come"
    watch.look()
    assert watch.over
    assert watch.read[0].record is not None
    assert len(watch.read[0].record) == 15
    assert {path.name.split("-")[0] for path in (tmp_path / "run").iterdir()} == {"record.json", "data"}


# --- one screen


def test_of_several_the_one_that_goes_on_is_shown(tmp_path: Path) -> None:
    going(50, ended="finished").save(tmp_path / "a" / "speed_limit")
    going(20).save(tmp_path / "b" / "speed_limit")
    watch = Watch(tmp_path)
    watch.look()
    view = watch.view()
    assert view.title.endswith(f"   {tmp_path / 'b' / 'speed_limit'}")
    assert view.lines[0].startswith("Fit: still running, last written ")
    assert view.lines[1].startswith("One of 2 runs in ")
    assert [row[0] for row in view.rows] == ["10", "20"]
    assert not watch.over
    going(20).save(tmp_path / "c" / "speed_limit")
    later = Watch(tmp_path)
    later.look()
    view = later.view()
    assert view.title == f"3 runs in {tmp_path}, 2 of them running"
    assert {row[0]: row[1:3] for row in view.rows} == {
        "a": ["ended", "50"], "b": ["running", "20"], "c": ["running", "20"],
    }  # fmt: skip
    assert view.rows[0][0] == "c", "the one written last is first"


def test_more_runs_than_fit_are_counted(tmp_path: Path) -> None:
    runs = [(f"run_{place}", going(20), watching.fit_state(going(20), tmp_path)) for place in range(7)]
    view = watch_view.of_several("title", runs, rows=4)
    assert [row[0] for row in view.rows] == ["run_0", "run_1", "run_2", "run_3"]
    assert view.lines == ["3 more, written earlier, are not shown"]


def test_the_shares_are_those_of_the_work(tmp_path: Path) -> None:
    """work_ito = 1.25 drop, work_anti_ito = drop: 0.8 useful, 0 bouncing; the rest is noise."""
    record = going(200)
    del record.run["samples_without_replacement"]  # of independent batches
    record.save(tmp_path)
    view = watch_view.of_run(tmp_path, record, watching.fit_state(record, tmp_path), rows=3)
    shares = dict(view.shares)
    assert shares["lowered the loss"] == pytest.approx(0.8, rel=1e-9)
    assert shares["was lost to bouncing"] == pytest.approx(0.0, abs=1e-9)
    assert shares["was lost to batch noise"] == pytest.approx(0.2, rel=1e-9)
    assert [row[0] for row in view.rows] == ["180", "190", "200"]
    assert len(view.findings) in (1, 2)
    record.amend({"loss_drop_se": 1.0})
    assert not watch_view.of_run(tmp_path, record, watching.fit_state(record, tmp_path), rows=3).shares, "not known"


def test_a_record_without_rows(tmp_path: Path) -> None:
    RunRecord({"ended": None, "written": time.time()}).save(tmp_path / "run")
    text = timeless(printed("watch", "run", "--once", cwd=tmp_path))
    assert text == "run   run\nFit: still running, last written … s ago\n"


def test_once(tmp_path: Path) -> None:
    going(40).save(tmp_path / "run" / "speed_limit")
    text = timeless(printed("watch", "run", "--once", cwd=tmp_path))
    title = "SGD lr 0.1/0.01 momentum 0.9, batch 64 (32 x 2), steps 0 to 400   run/speed_limit"
    assert text.startswith(f"{title}\nFit: still running, last written … s ago\n\nstep ")
    assert re.search(r"^40 +0\.449 ", text, re.MULTILINE)  # e^(−0.8)
    assert re.search(r"^lowered the loss +0\.800$", text, re.MULTILINE)
    assert "\nWhat costs the most so far\n- " in text
    assert ESCAPE not in text


def test_once_where_there_is_none(tmp_path: Path) -> None:
    assert "no such folder: run" in complaint("watch", "run", "--once", cwd=tmp_path)
    (tmp_path / "run").mkdir()
    assert "run holds no record" in complaint("watch", "run", "--once", cwd=tmp_path)
    (tmp_path / "run" / "record.json").write_text("{")
    assert "run: record.json is no valid JSON" in complaint("watch", "run", "--once", cwd=tmp_path)


def test_what_is_no_folder_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "file is a file, wanted a folder" in complaint("watch", "file", cwd=tmp_path)
    assert "can't be looked into: File name too long" in complaint("watch", "x" * 300, cwd=tmp_path)


def test_no_name_steers_the_terminal(tmp_path: Path) -> None:
    record = going(20, optimizers=[{"class": f"{ESCAPE}[31mSGD", "groups": []}])
    record.save(tmp_path / f"a{ESCAPE}[31m")
    record.save(tmp_path / f"b{ESCAPE}[31m")
    for name in (".", f"a{ESCAPE}[31m"):
        assert ESCAPE not in printed("watch", name, "--once", cwd=tmp_path)


# --- a terminal


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_a_terminal_gets_a_screen_that_fits(tmp_path: Path, columns: int) -> None:
    going(200, ended="finished").save(tmp_path / "run" / "speed_limit")
    raw = on_terminal("watch", "run", cwd=tmp_path, columns=columns)
    text = timeless(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw))
    assert raw.rindex("\x1b[?25h") > raw.rindex("\x1b[?25l")
    assert ESCAPE not in text
    assert max(map(len, text.splitlines())) <= columns
    assert "Fit: ended … s ago" in text
    assert re.search(r"^lowered the loss +0\.800 +█+", text, re.MULTILINE)
    assert ("efficiency" in text) == (columns >= 80), "what does not fit is left out"
    assert "…" not in text.replace("… s ago", ""), "and nothing is cut"
    assert "Ctrl-C" not in text, "it has ended"


def test_a_terminal_that_can_not_go_back_gets_lines(tmp_path: Path) -> None:
    going(30, ended="finished").save(tmp_path / "run")
    text = on_terminal("watch", "run", cwd=tmp_path, TERM="dumb")
    assert text.count("step ") == 6
    assert "step 30 " in text
    assert ESCAPE not in text


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_ctrl_c_is_how_one_leaves(tmp_path: Path) -> None:
    going(30).save(tmp_path / "run")
    process = subprocess.Popen(
        [*COMMAND, "watch", "run"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )
    assert process.stdout is not None
    while b"still running" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    rest, said = process.communicate(timeout=60)
    assert (process.returncode, rest, said) == (0, b"", b"")


# --- show


def test_show_says_whether_the_run_goes_on(tmp_path: Path) -> None:
    going(40).save(tmp_path / "runs" / "a")
    assert timeless(printed("show", "runs", cwd=tmp_path)).startswith("Fit: still running, last written … s ago\n")
    found = json.loads(printed("show", "runs", "--json", cwd=tmp_path))
    assert found["fit"]["state"] == "running"
    assert found["fit"]["ended_by"] is None
    assert 0 <= found["fit"]["seconds_since_written"] < 60
    going(40, ended="KeyboardInterrupt").save(tmp_path / "runs" / "b")
    text = printed("show", "runs", cwd=tmp_path)
    assert re.search(r"^runs/a \(calm-owl\) +40 .* running$", text, re.MULTILINE)
    assert re.search(r"^runs/b \(calm-owl\) +40 .* ended$", text, re.MULTILINE)
    assert "Fit: ended … s ago by KeyboardInterrupt" in timeless(on_terminal("show", "runs/b", cwd=tmp_path))


def test_show_says_nothing_of_a_loop_that_saved_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        record = whole_record(steps=40)
        del record.run["ended"], record.run["written"], record.run["pause"]
        record.save(tmp_path / "runs" / name)
    for done in (speedlimit("show", "runs/a", cwd=tmp_path), speedlimit("show", "runs", cwd=tmp_path)):
        assert not re.search(r"\bFit\b|running|\bfit\b", done.stdout)
    assert json.loads(printed("show", "runs/a", "--json", cwd=tmp_path))["fit"]["state"] == "unknown"
