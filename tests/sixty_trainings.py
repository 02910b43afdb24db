"""Sixty trainings drawn at random, each with SpeedLimit and without it from the same seeds: what is left is the same.

Compared bit by bit: weights, gradients, losses, the metrics that are not SpeedLimit's, states of optimizers, schedulers
and other callbacks, checkpoints, the generators of torch, numpy and Python, what the process is set to (default dtype,
warnings filters, matplotlib, signal handlers, …), and what warnings came.

    python tests/sixty_trainings.py [--count 60] [--output tests/sixty_trainings.json]
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import io
import json
import logging
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import matplotlib
import numpy as np
import pytorch_lightning as pl
import torch
from callback_cases import trainer
from drawn_trainings import (
    CALLBACKS,
    CLIPPING,
    EPOCHS,
    LOGGERS,
    SAMPLES,
    STEPS_UNTIL,
    VALIDATION,
    Drawn,
    Kept,
    Stopped,
    Training,
    draw,
)
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from lightning_speedlimit import SpeedLimit

COUNT = 60
OURS = "speed_limit/"

Make = Callable[[], pl.Callback]


@dataclass(frozen=True)
class Left:
    """What a training leaves, and what SpeedLimit said."""

    found: dict[str, Any]
    warned: collections.Counter[str]
    said: list[str]


def train(training: Training, folder: Path, make: Make | None) -> tuple[Left, Any]:
    """What the training left, and the callback that `make` made for its last fit. The folder is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    random.seed(training.number)
    np.random.seed(training.number)  # noqa: NPY002
    torch.manual_seed(training.number)
    torch._dynamo.reset()
    checkpoint = None
    with warnings.catch_warnings(record=True) as said, _silence():
        warnings.simplefilter("always")
        if training.ending in STEPS_UNTIL:
            fit, *_ = _fit(training, folder, make, max_steps=_steps_until(training))
            checkpoint = folder / "middle.ckpt"
            fit.save_checkpoint(checkpoint)
        fit, model, callback = _fit(training, folder, make, checkpoint)
        found = _left(fit, model, callback, folder) | _process()
    texts = [re.sub("0x[0-9a-f]+", "0x…", f"{w.category.__name__}: {w.message}") for w in said]
    ours = [text for text in texts if "SpeedLimit" in text]
    return Left(found, collections.Counter(t for t in texts if t not in ours), ours), callback


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Tables and progress bars are not shown."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _steps_until(training: Training) -> int:
    """Optimizer steps, of both optimizers, until the training is stopped to be resumed."""
    batches = SAMPLES // 4 // training.accumulated
    return max(int(STEPS_UNTIL[training.ending] * batches), 1) * len(training.optimizers)


def _fit(
    training: Training,
    folder: Path,
    make: Make | None,
    checkpoint: Path | None = None,
    **more: Any,
) -> tuple[Any, Drawn, Any]:
    model = Drawn(training, raises_at=9 if training.ending == "raised" else -1)
    callback = None if make is None else make()
    others = [CALLBACKS[name](folder) for name in training.callbacks]
    ours = [] if callback is None else [callback]
    by_hand = training.model == "two optimizers"
    options = VALIDATION[training.validation] | ({} if by_hand else CLIPPING[training.clipping])
    fit = trainer(
        folder,
        *(ours + others if training.place == "first" else others + ours),
        max_epochs=EPOCHS,
        precision=training.precision,
        accumulate_grad_batches=training.accumulated,
        log_every_n_steps=training.log_every,
        logger=LOGGERS[training.logger](folder),
        enable_checkpointing=any("ModelCheckpoint" in name for name in training.callbacks),
        **options,
        **more,
    )
    kind, _, backend = training.compiled.partition(", ")
    trained = torch.compile(model, backend=backend) if kind == "module" else model
    with contextlib.suppress(Stopped):
        fit.fit(trained, ckpt_path=checkpoint)
    return fit, model, callback


def _left(fit: Any, model: Drawn, callback: Any, folder: Path) -> dict[str, Any]:
    others = {type(c).__name__: c.state_dict() for c in fit.callbacks if c is not callback}
    modules, parameters = list(model.modules()), list(model.parameters())
    return {
        "weights": model.state_dict(),
        "training or evaluating": [m.training for m in modules],
        "frozen": [p.requires_grad for p in parameters],
        "gradients": model.gradients,
        "losses": model.seen,
        "attributes": sorted(vars(model)),
        "hooks of modules": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules],
        "hooks of parameters": [len(p._backward_hooks or ()) for p in parameters],
        "optimizers": [o.state_dict() for o in fit.optimizers],
        "hooks of optimizers": [
            (len(o._optimizer_step_pre_hooks), len(o._optimizer_step_post_hooks)) for o in fit.optimizers
        ],
        "schedulers": [c.scheduler.state_dict() for c in fit.lr_scheduler_configs],
        "other callbacks": others,
        "metrics": _without_ours(fit.callback_metrics),
        "logged": _logged(fit),
        "progress": [fit.global_step, fit.current_epoch, fit.should_stop, fit.num_training_batches, str(fit.state)],
        "checkpoints": {str(p.relative_to(folder)): _checkpoint(p) for p in sorted(folder.rglob("*.ckpt"))},
    }


def _without_ours(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if not name.startswith(OURS)}


def _logged(fit: Any) -> list[Any]:
    """Rows of the model's own metrics, as the loggers that can tell got them."""
    rows: list[Any] = []
    for logger in fit.loggers:
        if isinstance(logger, Kept):
            rows += [(step, _without_ours(row)) for step, row in logger.rows]
        file = Path(logger.log_dir or "", "metrics.csv") if isinstance(logger, CSVLogger) else Path("none")
        if file.exists():
            with file.open() as lines:
                read = [{n: v for n, v in _without_ours(row).items() if v} for row in csv.DictReader(lines)]
            rows += [(row.pop("step"), row) for row in read]
    return [(step, row) for step, row in rows if set(row) - {"epoch"}]


def _checkpoint(path: Path) -> Any:
    held = torch.load(path, weights_only=False)
    held["callbacks"] = {name: state for name, state in held["callbacks"].items() if name != "SpeedLimit"}
    return held


def _process() -> dict[str, Any]:
    """The generators, and what holds for the whole process."""
    pyplot: Any = sys.modules.get("matplotlib.pyplot")
    modes: Any = torch._C
    return {
        "torch generator": torch.get_rng_state(),
        "numpy generator": np.random.get_state(),  # noqa: NPY002
        "python generator": random.getstate(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad mode": torch.is_grad_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "threads of torch": torch.get_num_threads(),
        "function modes": (modes._len_torch_function_stack(), modes._len_torch_dispatch_stack()),
        "hooks of all optimizers": [len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)],
        "warnings filters": [(f[0], _pattern(f[1]), f[2], _pattern(f[3]), f[4]) for f in warnings.filters],
        "numpy's errors": np.geterr(),
        "numpy's printing": {name: str(value) for name, value in np.get_printoptions().items()},
        "matplotlib": {name: str(dict.__getitem__(matplotlib.rcParams, name)) for name in matplotlib.rcParams},
        "pyplot's figures": [] if pyplot is None else pyplot.get_fignums(),
        "signal handlers": {int(s): signal.getsignal(s) for s in signal.valid_signals()},
        "excepthook": sys.excepthook,
        "working directory": os.getcwd(),
        "environment": {n: v for n, v in os.environ.items() if n != "PYTEST_CURRENT_TEST"},
        "recursion limit": sys.getrecursionlimit(),
        "root logger": (logging.root.level, len(logging.root.handlers)),
    }


def _pattern(pattern: Any) -> Any:
    return getattr(pattern, "pattern", pattern)


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two things differ in a bit; NaN is itself, 0 is not −0."""
    if type(a) is not type(b):
        return [f"{where.rstrip('/')}: {type(a).__name__} and {type(b).__name__}"]
    if isinstance(a, Tensor):
        alike = (a.dtype, a.shape) == (b.dtype, b.shape) and _bits(a) == _bits(b)
        return [] if alike else [where]
    if isinstance(a, np.ndarray):
        return [] if (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()) else [where]
    if isinstance(a, Mapping):
        if list(a) != list(b):
            return [f"{where.rstrip('/')}: {sorted(map(str, a.keys() ^ b.keys())) or 'the order of the names'}"]
        return [text for key in a for text in differences(a[key], b[key], f"{where}{key}/")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f"{where.rstrip('/')}: {len(a)} and {len(b)} entries"]
        return [text for i, (x, y) in enumerate(zip(a, b, strict=True)) for text in differences(x, y, f"{where}{i}/")]
    if isinstance(a, float):
        return [] if a.hex() == b.hex() else [f"{where.rstrip('/')}: {a} and {b}"]
    return [] if a == b else [f"{where.rstrip('/')}: {a!r:.200} and {b!r:.200}"]


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def compare(training: Training, folder: Path, make: Make) -> tuple[list[str], Left, Any]:
    """In what the training with the callback differs from the one without, what it left, and the callback."""
    without, _ = train(training, folder, None)
    left, callback = train(training, folder, make)
    return in_what_differ(without, left), left, callback


def in_what_differ(without: Left, left: Left) -> list[str]:
    # Of the warnings those that are new: some come once in a process, in its first training, which is the one without.
    return differences(without.found, left.found) + [f"warnings: {text}" for text in left.warned - without.warned]


def speed_limit(training: Training) -> Callable[[], SpeedLimit]:
    return lambda: SpeedLimit(**training.measured)


COUNTED = ("trainings", "differ", "measured", "stopped within a finder", "probes", "probes given up")


class Tally:
    """What many trainings came to."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter(dict.fromkeys(COUNTED, 0))
        self.features: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.differences: dict[str, list[str]] = {}

    def add(self, training: Training, found: list[str], left: Left, callback: SpeedLimit) -> None:
        for name, values in training.features().items():
            self.features[name].update(values)
        record = callback.record
        measured = record is not None and len(record) > 0 and bool(np.isfinite(record.columns["displacement"][-1]))
        self.counts["trainings"] += 1
        self.counts["measured"] += measured
        self.counts["stopped within a finder"] += training.stops_in_finder
        self.counts["steps"] += int(record.columns["step"][-1]) if record is not None and measured else 0
        self.counts["batches"] += len(left.found["losses"])
        self.counts["checkpoints"] += len(left.found["checkpoints"])
        self.counts["differ"] += bool(found)
        if training.measured["probe_batches"]:
            given_up = any("gives up probe_batches" in text for text in left.said)
            self.counts["probes given up" if given_up else "probes"] += 1
        if found:
            self.differences[str(training.number)] = found[:20]

    def figures(self) -> dict[str, Any]:
        features = {name: dict(sorted(counts.items())) for name, counts in sorted(self.features.items())}
        return {**self.counts, "differences": self.differences, "of them": features}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the trainings, instead of the first ones")
    parser.add_argument("--output", type=Path, help="write the counts as JSON")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    tally, began = Tally(), time.process_time()
    with tempfile.TemporaryDirectory() as name:
        for number in chosen.only or range(chosen.count):
            training, start = draw(number), time.process_time()
            found, left, callback = compare(training, Path(name) / "training", speed_limit(training))
            tally.add(training, found, left, callback)
            print(f"{number}: {time.process_time() - start:.1f} s, {training}")
            print(
                "".join(f"    {text}\n" for text in [*left.said, *(f"DIFFERS {f}" for f in found)]), end="", flush=True
            )
    figures = tally.figures() | {"processor seconds": round(time.process_time() - began)}
    figures["versions"] = {"torch": torch.__version__, "pytorch_lightning": pl.__version__}
    text = json.dumps(figures, indent=1)
    print(text)
    if chosen.output is not None:
        chosen.output.write_text(text + "\n")
    return bool(tally.differences)


if __name__ == "__main__":
    sys.exit(main())
