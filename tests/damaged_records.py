"""Records that were damaged, by chance and on purpose, through everything that reads one: load, show, compare, page.

What comes of each must be a clear error (`RecordError`, or a complaint of the command in one line) or a right result:
the run beside it keeps its numbers, what is printed holds no character that steers a terminal, JSON is JSON. Nothing
warns, nothing takes more than a second of processor time (a page: than a whole run's page and a second) or 300 MB.

    python tests/damaged_records.py [--count 10000] [--page-every 20] [--output tests/damaged_records.json]
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import math
import platform
import random
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from lightning_speedlimit.cli.comparing import print_comparisons
from lightning_speedlimit.cli.complaints import Complaint
from lightning_speedlimit.cli.showing import show_runs
from lightning_speedlimit.record import SKETCH_SIZE, RecordError, RunRecord
from lightning_speedlimit.report import Comparison, compare, page
from lightning_speedlimit.words import plain_text

MOST_SECONDS, MOST_MEGABYTES = 1.0, 300.0  # of each stage
STAGES = ("load", "show", "compare", "page")

HOSTILE_TEXTS = (
    "\x1b]0;owned\x07",  # the terminal's title
    "\x1b]52;c;cm0gLXJm\x07",  # its clipboard
    "\x1b[2J\x1b[31m\x9b1A",
    "safe\u202egpj.exe\u2066\u200f",  # right to left
    "two\nlines\r\tand a tab\x00\x08\x85\u2028",
    "half of a pair \ud800",
    "<script>alert(1)</script> {{ 7 * 7 }} $\\frac$ %s",
    "x" * 300_000,
    "many words " * 30_000,
    "",
)
HOSTILE_NUMBERS = (0, -1, 1, 2**31, 2**53 + 1, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308, -1e308, 5e-324, 1e400)
EXTREMES = (math.nan, math.inf, -math.inf, 1e308, -1e308, 1e200, 1e-200, 5e-324, 0.0, -1.0, 1e30)


def nested(depth: int, kind: str = "list", innermost: Any = 0) -> Any:
    value = innermost
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


def run_description() -> dict[str, Any]:
    """What a run under Lightning says of itself."""
    settings = {"lr": 0.1, "momentum": 0.9, "maximize": False, "foreach": None, "betas": [0.9, 0.999]}
    return {
        "clock": "steps",
        "entropy_production": "loss_drop",
        "monitor": None,
        "loss_window": 50,
        "measure_every_n_steps": 1,
        "stretch": {"start": 0, "stop": 400},
        "coordinates": 1048576,
        "model": "MLP",
        "parameters": 1000,
        "trainable_parameters": 1000,
        "measured_coordinates": 1000,
        "optimized_coordinates": 1000,
        "optimizers": [{"class": "SGD", "groups": [settings, settings | {"lr": 0.01}]}],
        "batch_size": 32,
        "batches_per_epoch": 40,
        "samples_without_replacement": 1280,
        "accumulate_grad_batches": 1,
        "batch_norm_layers": 2,
        "lr_schedules": ["CosineAnnealingLR"],
        "strategy": "DDPStrategy",
        "world_size": 2,
        "samples_per_step": 63.5,
        "since_step": 0,
        "ended": "finished",
        "written": 1.7e9,
        "pause": 30.0,
        "versions": {"torch": "2.9", "pytorch_lightning": "2.6"},
        "hparams": {"width": 3, "rates": [0.1, 0.2]},
        "logger": {"class": "WandbLogger", "name": "calm-owl", "project": "limits", "id": "x3f", "tags": ["a"]},
    }


def whole_record(
    *, clouds: bool = False, layers: bool = False, rate: float = 0.02, steps: int = 200, every: int = 10
) -> RunRecord:
    """A straight path at constant speed, its loss e^(−rate·k): all its numbers are known."""
    record = RunRecord(run_description())
    drift = np.random.default_rng(0).standard_normal(SKETCH_SIZE)
    drift /= np.linalg.norm(drift)
    for step in range(every, steps + 1, every):
        drop = 1.0 - math.exp(-rate * step)
        row = {
            "elapsed": step,
            "seconds": 0.01 * step,
            "loss": 1.0 - drop,
            "loss_se": 0.01,
            "loss_drop": drop,
            "loss_drop_se": 0.01,
            "entropy_production": drop,
            "displacement": 0.1 * step,
            "action": 0.02 * step,
            "path_length": 0.12 * step,
            "work_ito": 1.25 * drop,
            "work_anti_ito": drop,
            "efficiency": 0.5,
            "work_stratonovich": 1.125 * drop,
            "work_action": 1.25 * drop,
            "efficiency_action": 0.4,
            "efficiency_low": 0.3,
            "efficiency_drift": 0.4,
            "kinematic_efficiency": 0.5,
            "straightness": 0.7,
            "steadiness": 0.72,
            "conversion": 0.8,
            "signal_fraction": 0.8,
            "learning_rate": 0.1,
            "grad_norm": 1.0,
        }
        record.append(step, row, {"efficiency_low": "an estimate"})
        record.add_sketch(step, drift * 0.1 * step)
        if clouds:
            layer = {"particles": 64, "wasserstein2": 0.05 * step, "wasserstein2_lower": 0.04 * step}
            record.add_clouds(step, {n: layer | {"displacement": 0.06 * step} for n in ("first", "second")})
        if layers:
            moved = {"parameters": 500, "displacement": 0.07 * step, "path_length": 0.08 * step, "action": 0.01 * step}
            moved |= {"work_ito": 0.6 * drop, "signal_fraction": 0.8, "efficiency_action": 0.4}
            record.add_layers(step, dict.fromkeys(("first", "second"), moved))
    return record


# --- tools that damage


def sign(folder: Path) -> None:
    """Makes record.json agree with the size and the checksum of its data file."""
    path = next(folder.glob("data-*.npz"))
    document = json.loads((folder / "record.json").read_bytes())
    content = path.read_bytes()
    document["data"] |= {"size": len(content), "sha256": sha256(content).hexdigest()}
    (folder / "record.json").write_text(json.dumps(document))


def arrays_of(folder: Path) -> dict[str, Any]:
    with np.load(next(folder.glob("data-*.npz"))) as archive:
        return dict(archive)


def with_arrays(folder: Path, arrays: dict[str, Any]) -> None:
    """Replaces the arrays, signed; the shapes in record.json stay."""
    with open(next(folder.glob("data-*.npz")), "wb") as file:
        np.savez(file, **arrays)
    sign(folder)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def put(document: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        document = document[key]
    document[path[-1]] = value


# --- damage by chance; each kind: (folder, dice) → what was done


def bytes_of_json(folder: Path, dice: random.Random) -> str:
    return _bytes(folder / "record.json", dice)


def bytes_of_data(folder: Path, dice: random.Random) -> str:
    return _bytes(next(folder.glob("data-*.npz")), dice)


def signed_bytes_of_data(folder: Path, dice: random.Random) -> str:
    """In the archive's directory and the arrays' headers, rather than among the numbers."""
    path = next(folder.glob("data-*.npz"))
    content = bytearray(path.read_bytes())
    marks = [at for mark in (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"\x93NUMPY") for at in _all(content, mark)]
    told = []
    for _ in range(dice.randint(1, 3)):
        at = dice.choice(marks) + dice.randrange(64)
        if at < len(content):
            content[at] = dice.choice([0, 1, 0x7F, 0xFF, dice.randrange(256)])
            told.append(f"{at}={content[at]}")
    path.write_bytes(bytes(content))
    sign(folder)
    return ", ".join(told)


def _all(content: bytearray, mark: bytes) -> Iterator[int]:
    at = content.find(mark)
    while at >= 0:
        yield at
        at = content.find(mark, at + 1)


def _bytes(path: Path, dice: random.Random) -> str:
    content = bytearray(path.read_bytes())
    at, many = dice.randrange(len(content)), dice.randint(1, 40)
    way = dice.choice(["flip", "cut", "insert", "end", "repeat"])
    if way == "flip":
        for _ in range(dice.randint(1, 8)):
            content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    elif way == "cut":
        del content[at : at + many]
    elif way == "insert":
        content[at:at] = bytes(dice.randrange(256) for _ in range(many))
    elif way == "end":
        del content[at:]
    else:
        content[at:at] = content[at : at + many]
    path.write_bytes(bytes(content))
    return f"{way} at {at}"


def values_of_json(folder: Path, dice: random.Random) -> str:
    """One to three places of record.json hold something else, or nothing."""
    path = folder / "record.json"
    document = json.loads(path.read_bytes())
    told = []
    for _ in range(dice.randint(1, 3)):
        every = [place for place in places(document) if len(place) < 8]  # not within what was nested before
        inside = [place for place in every if place[0] == "run"]
        place = dice.choice(inside if dice.random() < 0.7 else every)
        value = _any_value(dice)
        if dice.random() < 0.2 and isinstance(place[-1], str):
            put(document, (*place[:-1], dice.choice([*HOSTILE_TEXTS[:6], "lr", "class"])), value)
        else:
            put(document, place, value)
        told.append(f"{'.'.join(map(str, place))} = {value!r:.60}")
    path.write_text(json.dumps(document))
    return "; ".join(told)


def _any_value(dice: random.Random) -> Any:
    return dice.choice(
        [
            lambda: dice.choice([None, True, False, [], {}, [[]], {"": None}, [None], {"__float__": "nan"}]),
            lambda: dice.choice(HOSTILE_NUMBERS),
            lambda: dice.choice(HOSTILE_TEXTS),
            lambda: nested(dice.choice([3, 20, 40, 450, 850]), dice.choice(["list", "dict"])),
            lambda: [dice.choice(HOSTILE_NUMBERS), dice.choice(HOSTILE_TEXTS)],
            lambda: {"class": dice.choice(HOSTILE_TEXTS), "groups": dice.choice([None, [], 3, [None], "x"])},
        ]
    )()


def numbers(folder: Path, dice: random.Random) -> str:
    """Rows, columns or places of the arrays hold values that no run has, or only one that diverged; signed."""
    arrays = arrays_of(folder)
    told = []
    for _ in range(dice.randint(1, 4)):
        name = dice.choice([n for n in arrays if n not in ("step", "sketch_steps")] + ["values"] * 6)
        array = arrays[name]
        where = tuple(dice.choice([slice(None), dice.randrange(size)]) for size in array.shape)
        extreme = dice.choice(EXTREMES)
        with np.errstate(all="ignore"):
            if np.issubdtype(array.dtype, np.integer):
                array[where] = dice.choice([0, -1, 1, 2**62, -(2**63)])
            elif dice.random() < 0.3:
                array[where] *= extreme
            else:
                array[where] = extreme
        told.append(f"{name}[{where}] {extreme}")
    with_arrays(folder, arrays)
    return "; ".join(told)


def steps(folder: Path, dice: random.Random) -> str:
    """Steps far apart, huge, negative, out of order; signed."""
    arrays = arrays_of(folder)
    name = dice.choice(["step", "sketch_steps", "sketch_ticks", "both"])
    for each in ("step", "sketch_steps") if name == "both" else (name,):
        array = arrays[each]
        array[dice.randrange(len(array)) :] += dice.choice([1, 10**6, 2**40, 2**62, -1, -(2**62)])
        if dice.random() < 0.3:
            array[dice.randrange(len(array))] = dice.choice([0, -1, 2**63 - 1, -(2**63)])
    with_arrays(folder, arrays)
    return name


BY_CHANCE: dict[str, Callable[[Path, random.Random], str]] = {
    f.__name__: f for f in (bytes_of_json, bytes_of_data, signed_bytes_of_data, values_of_json, numbers, steps)
}


# --- what comes of it


@dataclass
class Outcome:
    """What one record came to."""

    refused: str = ""
    """The error, where it was one of ours."""
    reached: str = "load"
    """The last stage that was asked for."""
    faults: list[str] = field(default_factory=list)
    """What must not be: another exception, a warning, a wrong result, too slow, too large."""
    seconds: dict[str, float] = field(default_factory=dict)
    megabytes: dict[str, float] = field(default_factory=dict)


class Trial:
    """Takes one record after the other through all stages, beside a whole run whose numbers are known."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.beside = home / "beside"
        whole_record(rate=0.03).save(self.beside)
        self.alone = compare(self.beside, by="step", at=100)
        self.known = self.alone.groups[0].values

    @cached_property
    def seconds_of_a_page(self) -> float:
        """The figures of a whole run take about a second."""
        began = time.process_time()
        page.page([self.alone])
        return time.process_time() - began

    def _is_long(self, name: str, seconds: float) -> bool:
        return seconds > MOST_SECONDS + (self.seconds_of_a_page if name == "page" else 0.0)

    def of(self, folder: Path, *, with_page: bool = True) -> Outcome:
        """What was slow has to be slow again, beside a page of now: the machine may have been."""
        found = self._once(folder, with_page=with_page)
        if not found.faults or not all(fault.endswith(" s") for fault in found.faults):
            return found
        vars(self).pop("seconds_of_a_page", None)
        return self._once(folder, with_page=with_page)

    def _once(self, folder: Path, *, with_page: bool) -> Outcome:
        found = Outcome()
        try:
            with self._stage(found, "load"):
                RunRecord.load(folder)
            self._show(found, folder)
            self._compare(found, folder)
            if with_page:
                comparison = compare(folder)
                _ = self.seconds_of_a_page  # is not to be counted here
                with self._stage(found, "page"):
                    _is_clean(page.page([comparison]))
        except Exception as error:
            found.refused = str(error)
            if not (isinstance(error, RecordError | Complaint) or (isinstance(error, ValueError) and _is_ours(error))):
                found.faults.append(f"{found.reached}: {_last_line(error)}")
            elif not found.refused.isprintable() or not 10 < len(found.refused) < 1500:
                found.faults.append(f"{found.reached}: unclear: {found.refused!r:.200}")
        if found.refused and found.reached == "load":
            self._leave_out(found, folder)
        return found

    def _leave_out(self, found: Outcome, folder: Path) -> None:
        """The run beside a damaged one is compared all the same."""
        try:
            notes = self._by_step(folder).notes
            assert f"left out: {found.refused}" in notes, f"does not say what it left out: {notes!r:.200}"
        except Exception as error:
            found.faults.append(f"leave out: {_last_line(error)}")

    @contextlib.contextmanager
    def _stage(self, found: Outcome, name: str) -> Iterator[None]:
        found.reached = name
        _reset_peak()
        before, began = _memory("VmRSS"), time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                yield
        finally:
            found.seconds[name] = max(time.process_time() - began, found.seconds.get(name, 0.0))
            found.megabytes[name] = max(_memory("VmHWM") - before, found.megabytes.get(name, 0.0))
            if self._is_long(name, found.seconds[name]):
                found.faults.append(f"{name}: {found.seconds[name]:.1f} s")
            if found.megabytes[name] > MOST_MEGABYTES:
                found.faults.append(f"{name}: {found.megabytes[name]:.0f} MB")

    def _show(self, found: Outcome, folder: Path) -> None:
        for as_json in (False, True):
            out = io.StringIO()
            with self._stage(found, "show"), contextlib.redirect_stdout(out):
                show_runs(folder, json=as_json)
            _is_clean(out.getvalue())
        json.loads(out.getvalue(), parse_constant=_no_constant)

    def _compare(self, found: Outcome, folder: Path) -> None:
        for by in (self._by_step, self._by_loss):
            out = io.StringIO()
            with self._stage(found, "compare"), contextlib.redirect_stdout(out):
                comparison = by(folder)
                print_comparisons([comparison])
            _is_clean(out.getvalue())
            json.loads(json.dumps(comparison.to_dict(), allow_nan=False))

    def _by_step(self, folder: Path) -> Comparison:
        """The run beside it keeps its numbers, whatever else is there."""
        found = compare([folder, self.beside], by="step", at=100)
        [beside] = [group for group in found.groups if group.points[0].run.path == self.beside]
        np.testing.assert_equal(dict(beside.values), dict(self.known))
        return found

    def _by_loss(self, folder: Path) -> Comparison:
        return compare([folder, self.beside])


def _is_ours(error: BaseException) -> bool:
    """Raised by a line of this package, with a text: a complaint about the runs."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return "/report/" in Path(last.filename).as_posix() and (last.line or "").lstrip().startswith("raise ")


def _last_line(error: BaseException) -> str:
    at = [frame for frame in traceback.extract_tb(error.__traceback__) if "lightning_speedlimit" in frame.filename]
    where = f"{Path(at[-1].filename).name}:{at[-1].lineno}" if at else "?"
    return f"{where} {type(error).__name__}: {str(error)[:150]!r}"


def _is_clean(text: str) -> None:
    steering = {c for c in text if plain_text(c) != c}
    assert not steering, f"characters that steer a terminal: {steering}"


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} in JSON")


def _reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew; Linux


def _memory(name: str) -> float:
    """MB; NaN where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) / 1024
    return math.nan


def damaged(home: Path, seed: int, kinds: Sequence[str] = tuple(BY_CHANCE)) -> tuple[str, str, Path]:
    """The `seed`-th damage by chance: its kind, what was done, and where it lies."""
    dice = random.Random(seed)
    kind = dice.choice(kinds)
    folder = home / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(home / dice.choice(["plain", "clouded", "few"]), folder)
    return kind, BY_CHANCE[kind](folder, dice), folder


def save_whole(home: Path) -> None:
    """What is then damaged."""
    whole_record().save(home / "plain")
    whole_record(clouds=True, layers=True).save(home / "clouded")
    whole_record(clouds=True, layers=True, steps=30).save(home / "few")


class Tally:
    """What many records came to."""

    def __init__(self) -> None:
        self.pages = 0
        self.kinds: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.faults: collections.Counter[str] = collections.Counter()
        self.slowest, self.largest = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0.0)

    def add(self, kind: str, outcome: Outcome) -> None:
        self.kinds[kind][f"refused by {outcome.reached}" if outcome.refused else "right"] += 1
        self.faults.update(outcome.faults)
        self.pages += "page" in outcome.seconds
        for stage, seconds in outcome.seconds.items():
            self.slowest[stage] = max(self.slowest[stage], seconds)
            self.largest[stage] = max(self.largest[stage], outcome.megabytes[stage])

    def figures(self) -> dict[str, Any]:
        return {
            "kinds": {kind: dict(sorted(counts.items())) for kind, counts in sorted(self.kinds.items())},
            "pages": self.pages,
            "most processor seconds": {stage: round(value, 3) for stage, value in self.slowest.items()},
            "most MB beyond what the process held": {stage: round(value, 1) for stage, value in self.largest.items()},
            "faults": dict(self.faults.most_common(50)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--page-every", type=int, default=20, help="the page of every n-th that gets so far")
    parser.add_argument("--kinds", nargs="+", choices=list(BY_CHANCE), default=list(BY_CHANCE))
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    tally, began = Tally(), time.process_time()
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        save_whole(home)
        trial = Trial(home)
        for seed in range(arguments.count):
            kind, done, folder = damaged(home, seed, arguments.kinds)
            outcome = trial.of(folder, with_page=seed % arguments.page_every == 0)
            tally.add(kind, outcome)
            for fault in outcome.faults:
                print(f"{seed}, {kind} ({done:.120}): {fault}")
        figures = {
            "records": arguments.count,
            **tally.figures(),
            "processor seconds of a whole run's page": round(trial.seconds_of_a_page, 3),
            "processor seconds in all": round(time.process_time() - began),
            "versions": {"python": platform.python_version(), "numpy": np.__version__},
        }
    text = json.dumps(figures, indent=1)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
