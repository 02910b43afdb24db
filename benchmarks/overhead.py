"""What SpeedLimit costs: time per step as a ratio to bare Lightning, memory above it, operations per step.

Every variant trains in a Trainer of its own; one at a time holds the baton and passes it on after a window of
50 steps (one log step in each, in its middle: the first steps of a window find the caches full of others' data), so
that all of them meet the same disturbances. A round is two windows of each, the second in reverse order: what drifts
cancels, and W&B's histograms, one in 100 steps, fall into every round. The ratio to bare of the same round is taken
first, the median over the rounds after it. "bare again" is the control: a second bare training, whose ratio shows what
is noise.

    python benchmarks/overhead.py                                       # times and memory; an hour on a slow core
    python benchmarks/overhead.py --cases a c --rounds 3                # some of them
    python benchmarks/overhead.py --operations --memory                 # these alone: a few minutes
    python benchmarks/overhead.py --cases a b c d --operations --memory --output overhead.json
    python benchmarks/overhead.py --device cuda                         # the device is waited for at ends of windows
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import pytorch_lightning as pl
import torch
from cases import CASES, LARGE, Case, Module, WithNorms
from operations import COUNTED, measure_operations
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_speedlimit import SpeedLimit

WARM_UP = 1  # rounds that are not counted
FEW = 2**16
DEFAULT, SAMPLED = "SpeedLimit", "SpeedLimit, 2^16 coordinates"
REACH = {DEFAULT: {"a": 1.45, "b": 1.03, "c": 1.20, "d": 1.08}, SAMPLED: {"a": 1.18, "c": 1.05, "d": 1.05}}
REACH_MEMORY = {CASES["c"].title: 60, CASES["d"].title: 60, LARGE.title: 100}  # MB, on a CPU


# --- variants of a training


class Relay(IterableDataset[list[Tensor]]):
    """Hands out one batch again and again, notes when it is asked for, passes the baton after every window."""

    def __init__(self, case: Case, windows: int, device: str) -> None:
        self.batch, self.window, self.windows, self.device = case.batch(device), case.window, windows, device
        self.times: list[list[float]] = []
        self.turn, self.done = threading.Semaphore(0), threading.Semaphore(0)

    def __iter__(self) -> Iterator[list[Tensor]]:
        for i in range(self.windows):
            self.turn.acquire()
            ticks = []
            for _ in range(self.window + (0 if i else self.window // 2)):
                ticks.append(time.perf_counter())
                yield self.batch
            if self.device == "cuda":
                torch.cuda.synchronize()
            ticks.append(time.perf_counter())
            self.times.append([b - a for a, b in itertools.pairwise(ticks)])
            self.done.release()
        self.turn.acquire()  # what a fit does at its end is in nobody's window


@dataclass
class Variant:
    name: str
    extras: Callable[[str], dict[str, Any]] = lambda folder: {}  # arguments of the Trainer
    module: type[Module] = Module
    relay: Relay = field(init=False)
    thread: threading.Thread = field(init=False)
    failure: BaseException | None = None

    def start(self, case: Case, optimizer: str, windows: int, device: str) -> None:
        self.relay = Relay(case, windows, device)
        torch.manual_seed(0)
        self.thread = threading.Thread(target=self._fit, args=(self.module(case, optimizer), device), daemon=True)
        self.thread.start()

    def take_turn(self) -> None:
        self.relay.turn.release()
        self.relay.done.acquire()
        self.check()

    def finish(self) -> None:
        self.relay.turn.release()
        self.thread.join()
        self.check()

    def check(self) -> None:
        if self.failure is not None:
            raise RuntimeError(f"{self.name} failed") from self.failure

    def _fit(self, module: Module, device: str) -> None:
        try:
            with tempfile.TemporaryDirectory() as folder:
                settings = {"logger": False, **self.extras(folder)}
                trainer = pl.Trainer(
                    max_epochs=1, accelerator=device, devices=1, log_every_n_steps=self.relay.window,
                    enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
                    default_root_dir=folder, **settings,
                )  # fmt: skip
                trainer.fit(module, DataLoader(self.relay, batch_size=None))
                check_measured(trainer)
        except BaseException as error:  # whoever waits for the baton tells of it
            self.failure = error
            self.relay.done.release()


def check_measured(trainer: pl.Trainer) -> None:
    """A measurement that fails ends without ending the training, and would look cheap."""
    for callback in trainer.callbacks:
        if isinstance(callback, SpeedLimit):
            steps = callback.record.columns["step"] if callback.record is not None else []
            if not len(steps) or steps[-1] != trainer.global_step:
                raise RuntimeError(f"SpeedLimit stopped before the last of {trainer.global_step} steps")


class Watch(pl.Callback):
    """W&B's watch, as WandbLogger.watch sets it up; its histograms go out with the loss on log steps.

    It waits for calls of the module it is given: those of `net`, for Lightning calls training_step of the other.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.logger.watch(pl_module.net, log="all", log_freq=100, log_graph=False)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:
            trainer.logger.log_metrics({"loss": outputs["loss"].item()}, step=trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.logger.experiment.finish()


def watched(folder: str) -> dict[str, Any]:
    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true")
    import wandb
    from pytorch_lightning.loggers import WandbLogger

    settings = wandb.Settings(console="off", disable_git=True, x_disable_stats=True)
    return {"callbacks": [Watch()], "logger": WandbLogger(save_dir=folder, offline=True, settings=settings)}


def limit(**settings: Any) -> Callable[[str], dict[str, Any]]:
    return lambda folder: {"callbacks": [SpeedLimit(print_summary=False, log_figures=False, **settings)]}


def variants(case: Case) -> list[Variant]:
    everything = [Variant("SpeedLimit, all coordinates", limit(coordinates="all"))] if case is CASES["c"] else []
    return [
        Variant("bare"),
        Variant("bare again"),
        Variant(DEFAULT, limit()),
        Variant(SAMPLED, limit(coordinates=FEW)),
        *everything,
        Variant("SpeedLimit, every 10th", limit(measure_every_n_steps=10)),
        Variant("grad_norm", module=WithNorms),
        Variant("W&B watch", watched),
    ]


# --- time


def race(case: Case, optimizer: str, rounds: int, device: str, names: list[str] | None) -> list[Variant]:
    """All variants in turn, window by window; the second half of a round goes backwards. names: bare and these."""
    racers = [v for v in variants(case) if names is None or v.name in ("bare", *names)]
    for variant in racers:
        variant.start(case, optimizer, 2 * (rounds + WARM_UP), device)
    for _ in range(rounds + WARM_UP):
        for variant in racers + racers[::-1]:
            variant.take_turn()
    for variant in racers:
        variant.finish()
    return racers


def result(variant: Variant, bare: Variant) -> dict[str, float | None]:
    """Medians over the rounds: ratio, milliseconds of a plain step and of a log step.

    On a device all steps are averaged, log steps too: the host runs ahead of it within a window.
    """
    windows, bare_windows = (v.relay.times[2 * WARM_UP :] for v in (variant, bare))
    seconds, bare_seconds = (
        [sum(a) + sum(b) for a, b in zip(w[::2], w[1::2], strict=True)] for w in (windows, bare_windows)
    )
    ratios = sorted(s / b for s, b in zip(seconds, bare_seconds, strict=True))
    on_device = variant.relay.device == "cuda"
    plain = [statistics.mean(w) if on_device else statistics.median(w[1:]) for w in windows]
    middle = len(windows[0]) // 2
    logging_ = [(a[middle] + b[middle]) / 2 for a, b in zip(windows[::2], windows[1::2], strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[len(ratios) // 4],
        "ratio_high": ratios[-1 - len(ratios) // 4],
        "step_ms": 1e3 * statistics.median(plain),
        # Lightning fetches one batch ahead: this is the step before that of the middle batch.
        "log_step_ms": None if on_device else 1e3 * statistics.median(logging_),
    }


def measure(name: str, optimizer: str, rounds: int, device: str, names: list[str] | None) -> dict[str, Any]:
    case = CASES[name]
    racers = race(case, optimizer, rounds, device, names)
    found = {"case": name, **measure_memory(case, optimizer, device)}
    return {**found, "variants": {v.name: result(v, racers[0]) for v in racers}}


def bandwidth(device: str) -> float:
    """Bytes per second, read and written, of a copy far larger than the caches."""
    source = torch.rand(32 << 20, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 8 * source.numel() / statistics.median(times[1:])


# --- memory


def train_alone(case: Case, optimizer: str, name: str, device: str) -> None:
    """Two windows of one variant."""
    (variant,) = (v for v in variants(case) if v.name == name)
    variant.start(case, optimizer, 2, device)
    variant.relay.turn.release(2)
    variant.finish()


def peak_memory(case: Case, optimizer: str, name: str, device: str) -> int:
    """Peak bytes of a training: allocated on the device, else resident in a process of its own (Linux)."""
    if device == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train_alone(case, optimizer, name, device)
        return torch.cuda.max_memory_allocated() - before
    code = (
        f"import sys; sys.argv = ['x']; sys.path.insert(0, {os.path.dirname(os.path.abspath(__file__))!r});"
        "from overhead import *;"
        f"(case,) = (c for c in (*CASES.values(), LARGE) if c.title == {case.title!r});"
        f"train_alone(case, {optimizer!r}, {name!r}, 'cpu');"
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    )
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed tensors go back at once
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment)
    if out.returncode:
        raise RuntimeError(out.stderr)
    return 1024 * int(out.stdout.split()[-1])


def measure_memory(case: Case, optimizer: str, device: str) -> dict[str, Any]:
    """Of the default, above bare."""
    bare, measured = (peak_memory(case, optimizer, name, device) for name in ("bare", DEFAULT))
    return {
        "title": case.title,
        "optimizer": optimizer,
        "parameters": sum(p.numel() for p in case.model().parameters()),
        "bare_mb": bare / 1e6,
        "memory_mb": (measured - bare) / 1e6,
    }


# --- output


def show_times(found: dict[str, Any], device: str) -> None:
    print(f"\n({found['case']}) {found['title']}, {found['optimizer']}: {found['parameters'] / 1e6:.2f} M parameters")
    print(f"    {'':30}{'ratio':>7}  {'quartiles':>15}{'step':>13}{'log step':>12}")
    for label, row in found["variants"].items():
        reach = REACH.get(label, {}).get(found["case"]) if device == "cpu" else None
        note = "" if reach is None else f"   reach {reach:.2f}"
        quartiles = f"[{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]"
        log_step = "" if row["log_step_ms"] is None else f"{row['log_step_ms']:9.2f} ms"
        print(f"    {label:30}{row['ratio']:7.3f}  {quartiles:>15}{row['step_ms']:10.2f} ms{log_step}{note}")
    show_memory(found, device)


def show_memory(found: dict[str, Any], device: str) -> None:
    reach = REACH_MEMORY.get(found["title"]) if device == "cpu" else None
    note = "" if reach is None else f"   reach {reach} MB"
    print(f"    peak memory, {DEFAULT}: {found['memory_mb']:+.1f} MB above bare's {found['bare_mb']:.0f} MB{note}")


def show_operations(found: dict[str, Any]) -> None:
    print(f"    {found['title']:40}{found['optimizer']:>8}{found['operations']:8d}   reach {found['reach']}")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    device = arguments.device
    found: dict[str, Any] = {"cases": [], "operations": [], "large": []}
    for name in arguments.cases:
        for optimizer in CASES[name].optimizers:
            if optimizer in arguments.optimizers:
                found["cases"].append(measure(name, optimizer, arguments.rounds, device, arguments.variants))
                show_times(found["cases"][-1], device)
    if arguments.operations:
        print("\nOperations that the meter adds to a step, all coordinates")
        for title, optimizer in itertools.product(COUNTED, arguments.optimizers):
            found["operations"].append(measure_operations(title, optimizer, device))
            show_operations(found["operations"][-1])
    if arguments.memory:
        for optimizer in arguments.optimizers:
            found["large"].append(measure_memory(LARGE, optimizer, device))
            print(f"\n{LARGE.title}, {optimizer}")
            show_memory(found["large"][-1], device)
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="two windows of each variant in each")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), help="whose time is taken")
    parser.add_argument("--optimizers", nargs="+", default=["sgd", "adamw"], choices=["sgd", "adamw"])
    parser.add_argument("--variants", nargs="+", help="beside bare these alone, by the names in the table")
    parser.add_argument("--operations", action="store_true", help="count tensor operations per step")
    parser.add_argument("--memory", action="store_true", help=f"of an {LARGE.title}")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", help="write the figures as JSON")
    arguments = parser.parse_args()
    if arguments.cases is None:
        arguments.cases = [] if arguments.operations or arguments.memory else list(CASES)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device here")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    on_device = arguments.device == "cuda"
    where = torch.cuda.get_device_name() if on_device else f"{platform.machine()}, {os.cpu_count()} cores, one thread"
    machine, speed = f"{where}, torch {torch.__version__}", bandwidth(arguments.device)
    print(f"{machine}; copies move {speed / 1e9:.1f} GB/s; {arguments.rounds} rounds of two windows of 50 steps")
    found = {"machine": machine, "bytes_per_second": speed, "rounds": arguments.rounds, **run(arguments)}
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
