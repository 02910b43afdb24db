"""One run until its loss on the evaluation set has come down to each of some levels; and a file that keeps all runs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tasks import Task

from lightning_speedlimit import RunRecord, TrajectoryMeter

LOOKS = 5  # whose mean is the smoothed loss
LOOK_AFTER = 256  # samples, at least; and 16 steps at most
ROW_EVERY = 10  # steps, of a record
OPTIMIZERS = {
    "SGD": lambda parameters, rate: torch.optim.SGD(parameters, rate),
    "momentum": lambda parameters, rate: torch.optim.SGD(parameters, rate, momentum=0.9),
    "Adam": lambda parameters, rate: torch.optim.Adam(parameters, rate),
}


@dataclass(frozen=True)
class Setting:
    """measured: steps of the record, from the first on."""

    task: str
    optimizer: str
    batch: int
    rate: float
    seed: int
    measured: int = 0


class Course:
    """Losses of the evaluation set over the steps."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.losses: list[float] = []

    def add(self, step: int, loss: float) -> None:
        self.steps.append(step)
        self.losses.append(loss)

    def passed(self, level: float) -> float:
        """The step, between two looks, at which the mean of five looks about it came down to the level; NaN: never."""
        before = math.nan
        for i in range(LOOKS, len(self.steps) + 1):
            smooth, middle = fmean(self.losses[i - LOOKS : i]), i - 1 - LOOKS // 2
            if smooth <= level:
                if math.isnan(before):
                    return float(self.steps[middle])
                share = (before - level) / (before - smooth)
                return self.steps[middle - 1] + share * (self.steps[middle] - self.steps[middle - 1])
            before = smooth
        return math.nan

    def at(self, step: int) -> float:
        """The smoothed loss there."""
        nearest = min(range(len(self.steps)), key=lambda i: abs(self.steps[i] - step))
        return fmean(self.losses[nearest - LOOKS // 2 : nearest + LOOKS // 2 + 1])

    @property
    def diverged(self) -> bool:
        return not math.isfinite(self.losses[-1]) or self.losses[-1] > 3 * self.losses[0]


def train(task: Task, setting: Setting, lowest: float, most: int) -> tuple[Course, RunRecord]:
    """Until the smoothed loss is at `lowest` and what is measured is over; or diverged, or after `most` steps."""
    torch.manual_seed(setting.seed)
    model = task.model()
    optimizer = OPTIMIZERS[setting.optimizer](model.parameters(), setting.rate)
    draw = torch.Generator().manual_seed(1000 * setting.seed + setting.batch)
    meter = TrajectoryMeter(optimizer) if setting.measured else None
    record = RunRecord(meter.description() if meter else {})
    course, every, step = Course(), max(1, LOOK_AFTER // setting.batch), 0
    course.add(0, task.evaluate(model))
    low = False
    while step < most and not (low and meter is None) and not course.diverged:
        loss = task.loss(model, torch.randint(len(task.inputs), (setting.batch,), generator=draw))
        optimizer.zero_grad()
        loss.backward()
        if meter:
            meter.record_loss(loss.detach())
        optimizer.step()
        step += 1
        if meter and step % ROW_EVERY == 0:
            record.append(step, {**meter.compute(), "samples": float(setting.batch * step)})
            if step >= setting.measured:
                meter.close()
                meter = None
        if step % every == 0:
            course.add(step, task.evaluate(model))
            low = low or fmean(course.losses[-LOOKS:]) <= lowest
    if meter:
        meter.close()
    return course, record


def counted(task: Task, setting: Setting, levels: Mapping[str, float], most: int) -> dict[str, Any]:
    """The run as a row of the results: its setting, the steps to each level, and what its record tells of tuning."""
    course, record = train(task, setting, min(levels.values()), most)
    row: dict[str, Any] = {**vars(setting), "steps": course.steps[-1]}
    row |= {name: course.passed(level) for name, level in levels.items()}
    if setting.measured:
        for name, tuned in record.tuning().items():
            row |= {name: tuned.value, f"{name}_se": tuned.standard_error}
            if tuned.reason:
                row[f"{name}_reason"] = tuned.reason
    return plain(row)


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: null; numbers to six digits."""
    return {k: rounded(v) if isinstance(v, float) else v for k, v in row.items()}


def rounded(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


class Results:
    """A JSON file of rows by part. What is in it is not computed again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts: dict[str, list[dict[str, Any]]] = json.loads(path.read_text("utf-8")) if path.exists() else {}

    def find(self, part: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
        wanted = plain(key).items()
        return next((row for row in self.parts.get(part, []) if wanted <= row.items()), None)

    def add(self, part: str, row: dict[str, Any]) -> dict[str, Any]:
        self.parts.setdefault(part, []).append(row)
        self.write()
        return row

    def replace(self, part: str, rows: Iterable[dict[str, Any]]) -> None:
        self.parts[part] = [plain(row) for row in rows]
        self.write()

    def run(
        self, task: Task, setting: Setting, levels: Mapping[str, float], most: int, part: str = "runs"
    ) -> dict[str, Any]:
        return self.find(part, vars(setting)) or self.add(part, counted(task, setting, levels, most))

    def write(self) -> None:
        """A row a line; whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        parts = (
            f"{json.dumps(name)}: [\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]"
            for name, rows in self.parts.items()
        )
        beside = self.path.with_suffix(".part")
        beside.write_text("{\n" + ",\n".join(parts) + "\n}\n", "utf-8")
        beside.replace(self.path)
