"""Trainings killed at random moments, a few of the thousand of `benchmarks/kills.json`; and the one who counts them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from lightning_speedlimit import RunRecord
from lightning_speedlimit.record import SKETCH_SIZE

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "kills.py"


@pytest.fixture(scope="module")
def kills() -> ModuleType:
    specification = importlib.util.spec_from_file_location("kills", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_kills_leave_whole_records(tmp_path: Path) -> None:
    """Some come within a write, or the counts say nothing."""
    counts, root = tmp_path / "counts.json", str(SCRIPT.parents[1])
    numbers = ["--alone", "40", "--fits", "12", "--saves", "12", "--figures", "6"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), *numbers, "--output", str(counts)],
        capture_output=True,
        text=True,
        timeout=1800,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found = json.loads(counts.read_text())
    assert [found[kind]["kills"] for kind in ("alone", "fits", "saves", "figures")] == [40, 12, 12, 6]
    assert found["alone"]["killed within a write"] > 0
    assert found["saves"]["killed within a write"] > 0
    assert found["figures"]["pictures"] > 0


def run_of(writer: int, rows: int) -> RunRecord:
    record = RunRecord({"optimizers": [{"class": "SGD", "groups": [{"lr": 0.01 * (writer + 1)}]}]})
    for step in range(1, rows + 1):
        record.append(step, {"loss": writer + 1.0 / step, "seconds": float(rows)})
        record.add_sketch(step, np.full(SKETCH_SIZE, step, dtype=np.float32))
    return record


def judged(kills: ModuleType, folder: Path, told: dict[int, int]) -> set[str]:
    judge = kills.Judge([run_of(0, 9), run_of(1, 9)])
    judge.record(folder, told)
    return {name for name, count in judge.counts.items() if count} - {"records"}


def test_what_is_whole_is_not_counted(kills: ModuleType, tmp_path: Path) -> None:
    run_of(0, 5).save(tmp_path / "a")
    assert judged(kills, tmp_path / "a", {0: 5}) == set()
    assert judged(kills, tmp_path / "a", {0: 4, 1: 7}) == set()  # its writer came last
    assert judged(kills, tmp_path / "nowhere", {0: 0}) == {"killed before the first write"}
    (tmp_path / "a" / ".writing-00.tmp").write_text("half")
    assert judged(kills, tmp_path / "a", {0: 5}) == {"killed within a write"}  # and the next one cleared it


def test_what_is_lost_is_counted(kills: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_of(0, 5).save(tmp_path / "a")
    assert judged(kills, tmp_path / "a", {0: 6}) == {"lost beyond the last write"}
    assert judged(kills, tmp_path / "a", {1: 2}) == {"lost beyond the last write"}  # another one's
    assert judged(kills, tmp_path / "nowhere", {0: 1}) == {"unreadable"}
    other = run_of(0, 4)
    other.append(5, {"loss": 7.0})
    other.save(tmp_path / "b")
    assert judged(kills, tmp_path / "b", {0: 5}) == {"other rows"}
    (tmp_path / "a" / "record.json").write_text("{")
    assert judged(kills, tmp_path / "a", {0: 5}) == {"unreadable"}
    assert "is no valid JSON" in capsys.readouterr().err


def test_half_pictures_are_counted(kills: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from matplotlib.image import imsave

    imsave(tmp_path / "whole.png", np.zeros((4, 4)))
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:40])
    judge = kills.Judge([])
    judge.pictures(tmp_path)
    assert (judge.counts["pictures"], judge.counts["half pictures"]) == (2, 1)
    assert "half.png" in capsys.readouterr().err
