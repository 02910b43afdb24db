"""What SIGKILL at a random moment leaves of a record: trainings that write at every step, killed, and then read.

A child tells, after each write, how many rows are on the disk now, in a file of its own. When it has been killed, the
record must be there, whole, with at least these rows, and each of them must be that of an undisturbed training, bitwise
(all but the wall clock). Then somebody else writes there, and must find, and clear, what the killed one left.

- alone: a training.
- fits: two trainings that were given one folder.
- saves: two processes that call `record.save` for one folder.
- figures: a training that is over and draws; no picture may be half a picture.

Each is killed at a time of its own: half of them at any time from the start on, the others once all have begun writing.

    python benchmarks/kills.py                                  # 1,000 kills: some minutes of one core
    python benchmarks/kills.py --alone 20 --fits 4 --saves 4 --figures 4 --output counts.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pytorch_lightning as pl
import torch
from matplotlib.image import imread

from lightning_speedlimit import RunRecord, SpeedLimit
from lightning_speedlimit.record import RecordError, keeper
from lightning_speedlimit.report import figures  # noqa: F401 - before the forks, so that no child has to

FULL = {"alone": 700, "fits": 100, "saves": 100, "figures": 100}  # kills
LIFE = 0.6  # seconds: no child is left alone longer than this
STEPS = 300  # more than a training takes within its life
DRAWN = 12  # steps of a training that comes to its end and draws


class Model(pl.LightningModule):
    def __init__(self, rate: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.rate = torch.nn.Linear(4, 1), rate

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return (self.layer(batch) - batch.sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


def fit(folder: Path, writer: int, *, steps: int = STEPS, draws: bool = False) -> None:
    """Writers differ in their learning rates."""
    data = torch.randn(50, 6, 4, generator=torch.Generator().manual_seed(1))
    callback = SpeedLimit(dirpath=folder, log_figures=draws, print_summary=False, loss_window=2)
    loader = torch.utils.data.DataLoader(list(data), batch_size=None)  # type: ignore[arg-type]
    trainer = pl.Trainer(
        callbacks=[callback],
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=folder.parent,
    )
    trainer.fit(Model(0.01 * (writer + 1)), loader)


def save(folder: Path, writer: int) -> None:
    """The rows of an undisturbed training, one more at each write."""
    whole = RunRecord.load(folder.parent.parent / f"whole-{writer}" / "record")
    record, columns = RunRecord(whole.run), whole.columns
    for row in range(len(whole)):
        values = {name: float(column[row]) for name, column in columns.items() if name != "step"}
        record.append(int(columns["step"][row]), values)
        record.add_sketch(int(columns["step"][row]), whole.sketches[row])
        record.save(folder)
        tell(f"{len(record)} {folder}")


# --- children


def tell(line: str) -> None:
    """One line to the file of this process: what the system has taken, a kill does not undo."""
    os.write(_told, f"{line}\n".encode())


_told = -1


def child(place: Path, writer: int, work: Callable[[], None], *, write_every: float = 0.0) -> int:
    """Forked: from a process that has imported everything and computed nothing."""
    process = os.fork()
    if process == 0:
        _in_child(place, writer, work, write_every)
    return process


def _in_child(place: Path, writer: int, work: Callable[[], None], write_every: float) -> NoReturn:
    global _told
    _told = os.open(place / f"told-{writer}", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    real = keeper.RecordKeeper.write

    def told(writer: Any, record: RunRecord, *, ended: str | None = None) -> None:
        real(writer, record, ended=ended)
        tell(f"{len(record)} {writer.folder}")

    keeper.WRITE_EVERY = write_every
    keeper.RecordKeeper.write = told  # type: ignore[method-assign]
    warnings.simplefilter("ignore")
    try:
        work()
        tell("over")
    finally:
        os._exit(0)


def last_told(place: Path, writer: int) -> tuple[int, Path | None]:
    """Rows on the disk, and where; 0 before the first write."""
    path = place / f"told-{writer}"
    lines = [line for line in path.read_text().splitlines() if line != "over"] if path.exists() else []
    if not lines:
        return 0, None
    rows, folder = lines[-1].split(" ", 1)
    return int(rows), Path(folder)


def kill_some_time(place: Path, processes: list[int], moments: random.Random) -> None:
    """Each at a time of its own: half of them from their start on, the others when all of them have written."""
    if moments.random() < 0.5:
        for writer, process in enumerate(processes):
            wait_until(lambda writer=writer: (place / f"told-{writer}").stat().st_size > 0, process)
    kill({process: moments.uniform(0.0, LIFE) for process in processes})


def wait_until(true: Callable[[], bool], process: int) -> None:
    for _ in range(60_000):
        with contextlib.suppress(FileNotFoundError):
            if true():
                return
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    raise TimeoutError("a child did not begin within two minutes")


def kill(processes: dict[int, float]) -> None:
    """Each after so many seconds; and waited for."""
    start = time.monotonic()
    for process, moment in sorted(processes.items(), key=lambda item: item[1]):
        time.sleep(max(start + moment - time.monotonic(), 0.0))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


# --- what they left


class Judge:
    """Counts what was found."""

    def __init__(self, wholes: list[RunRecord]) -> None:
        self.wholes, self.counts = wholes, Counter[str]()

    def record(self, folder: Path, told: dict[int, int]) -> None:
        """told: writer → rows that it knew to be on the disk; of one writer at least the record must be."""
        self.counts["records"] += 1
        if not any(told.values()) and not (folder / "record.json").exists():
            self.counts["killed before the first write"] += 1
            return
        try:
            found = RunRecord.load(folder)
        except RecordError as error:
            print(f"{folder}: {error}", file=sys.stderr)
            self.counts["unreadable"] += 1
            return
        writer = round(found.run["optimizers"][0]["groups"][0]["lr"] / 0.01) - 1
        if writer not in told or len(found) < told[writer]:
            self.counts["lost beyond the last write"] += 1
        if not same_rows(found, self.wholes[writer]):
            self.counts["other rows"] += 1
        left = {path.name for path in folder.iterdir() if path.is_file()}
        if len([name for name in left if name.startswith("data-") or name.endswith(".tmp")]) > 1:
            self.counts["killed within a write"] += 1
        found.save(folder)
        after = {path.name for path in folder.iterdir() if path.is_file()} - {".fit.lock"}
        if len(after) != 2 or len(RunRecord.load(folder)) != len(found):
            self.counts["not cleared by the next write"] += 1

    def pictures(self, folder: Path) -> None:
        found = list(folder.glob("*.png")) if folder.exists() else []
        self.counts["pictures"] += len(found)
        self.counts["killed between two pictures"] += 0 < len(found) < 4
        for path in found:
            try:
                imread(path)
            except Exception as error:
                print(f"{path}: {error}", file=sys.stderr)
                self.counts["half pictures"] += 1


BAD = ("unreadable", "lost beyond the last write", "other rows", "not cleared by the next write", "half pictures")


def same_rows(found: RunRecord, whole: RunRecord) -> bool:
    """Whether it is the beginning of the undisturbed training, bitwise."""
    rows, wanted = len(found), whole.columns
    same = all(
        np.array_equal(column, wanted[name][:rows], equal_nan=True)
        for name, column in found.columns.items()
        if name != "seconds"
    )
    return same and np.array_equal(found.sketches, whole.sketches[: len(found.sketches)])


# --- kinds of kills


def alone(place: Path, moments: random.Random, judge: Judge) -> int:
    kill_some_time(place, [child(place, 0, lambda: fit(place / "record", 0))], moments)
    judge.record(place / "record", {0: last_told(place, 0)[0]})
    return 1


def fits(place: Path, moments: random.Random, judge: Judge) -> int:
    kill_some_time(place, [child(place, w, lambda w=w: fit(place / "record", w)) for w in (0, 1)], moments)
    own: dict[Path, dict[int, int]] = {}
    for writer in (0, 1):
        rows, folder = last_told(place, writer)
        own.setdefault(folder or place / "record", {})[writer] = rows
    for folder, told in own.items():
        written = {writer: rows for writer, rows in told.items() if rows}
        judge.counts["took the folder of a dead one"] += len(written) > 1
        judge.record(folder, written or told)
    return 2


def saves(place: Path, moments: random.Random, judge: Judge) -> int:
    kill_some_time(place, [child(place, w, lambda w=w: save(place / "record", w)) for w in (0, 1)], moments)
    judge.record(place / "record", {w: last_told(place, w)[0] for w in (0, 1)})
    return 2


def drawing(place: Path, moments: random.Random, judge: Judge) -> int:
    process = child(place, 0, lambda: fit(place / "record", 0, steps=DRAWN, draws=True))
    pictures = place / "record" / "figures"
    if moments.random() < 0.5:
        wait_until(lambda: last_told(place, 0)[0] == DRAWN, process)
        kill({process: moments.uniform(0.0, LIFE)})
    else:  # where the pictures are written, which takes milliseconds
        wait_until(lambda: any(pictures.glob("*.png")), process)
        kill({process: moments.uniform(0.0, LIFE)})
    judge.record(place / "record", {0: DRAWN})
    judge.pictures(pictures)
    return 1


KINDS = {"alone": alone, "fits": fits, "saves": saves, "figures": drawing}


def undisturbed(folder: Path, writer: int) -> RunRecord:
    place = folder / f"whole-{writer}"
    place.mkdir()
    os.waitpid(child(place, writer, lambda: fit(place / "record", writer), write_every=math.inf), 0)
    return RunRecord.load(place / "record")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind, number in FULL.items():
        parser.add_argument(f"--{kind}", type=int, default=number, help=f"kills (default {number})")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    chosen = parser.parse_args(arguments)
    logging.disable(logging.INFO)
    moments, told = random.Random(0), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wholes = [undisturbed(folder, writer) for writer in (0, 1)]
        for kind, act in KINDS.items():
            judge, kills, wanted = Judge(wholes), 0, getattr(chosen, kind)
            while kills < wanted:
                place = folder / "place"
                place.mkdir()
                kills += act(place, moments, judge)
                shutil.rmtree(place)
            told[kind] = {"kills": kills, **dict.fromkeys(BAD, 0), **judge.counts}
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    told["processor_seconds"] = round(sum(u.ru_utime + u.ru_stime for u in used))
    chosen.output.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told, indent=1))
    return any(told[kind][bad] for kind in KINDS for bad in BAD)


if __name__ == "__main__":
    sys.exit(main())
