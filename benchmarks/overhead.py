"""What SpeedLimit costs: time per step as a ratio to bare Lightning, and memory in copies of the parameters.

Every variant trains in a Trainer of its own; one at a time holds the baton and passes it on after a window of
50 steps (one log step in each), so that all of them meet the same disturbances. The ratio of a window to the
bare window of its round is taken first, the median over the rounds after it. "bare again" is the control: a
second bare training, whose ratio shows what is noise.

    python benchmarks/overhead.py [--rounds 12] [--cases a b c] [--output overhead.json]
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
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
from pytorch_lightning.utilities import grad_norm
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from lightning_speedlimit import SpeedLimit

WINDOW = 50
WARM_UP = 2  # windows per variant that are not counted
REACH = {("a", "sgd"): 1.20, ("b", "sgd"): 1.05, ("c", "sgd"): 1.85, ("c", "adamw"): 1.50}
REACH_SAMPLED = {("a", "sgd"): 1.05, ("b", "sgd"): 1.01, ("c", "sgd"): 1.15}
# float32 bytes per parameter and step: 32 as in trajectory/trace.py; m (read, write) and v (read) for Adam;
# the sum without decay (read, write) for AdamW's decoupled decay.
FLOOR_BYTES = {"sgd": 32, "adamw": 32 + 12 + 8}


def mlp(*sizes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Module:
    """0.5 M parameters on 3×32×32."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128 * 16, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    title: str
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int


CASES = {
    "a": Case("digits MLP 64-512-512-10, batch 128", lambda: mlp(64, 512, 512, 10), (64,), 128),
    "b": Case("CNN of 0.5 M parameters on 3x32x32, batch 64", cnn, (3, 32, 32), 64),
    "c": Case("MLP of 10 M parameters, batch 8", lambda: mlp(784, 2304, 2304, 1152, 10), (784,), 8),
}


class Module(pl.LightningModule):
    """The same for every variant."""

    def __init__(self, case: Case, optimizer: str) -> None:
        super().__init__()
        self.net, self.kind = case.model(), optimizer

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.kind == "sgd":
            return torch.optim.SGD(self.parameters(), lr=1e-3)
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class WithNorms(Module):
    """And Lightning's own grad_norm, logged at every step."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.log_dict(grad_norm(self, norm_type=2))


class Relay(IterableDataset[list[Tensor]]):
    """Hands out batches, notes when each is asked for, and passes the baton after every window."""

    def __init__(self, case: Case, windows: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batch = [
            torch.randn(case.batch, *case.shape, generator=generator),
            torch.randint(0, 10, (case.batch,), generator=generator),
        ]
        self.windows, self.times = windows, list[list[float]]()
        self.turn, self.done = threading.Semaphore(0), threading.Semaphore(0)

    def __iter__(self) -> Iterator[list[Tensor]]:
        for _ in range(self.windows):
            self.turn.acquire()
            ticks = []
            for _ in range(WINDOW):
                ticks.append(time.perf_counter())
                yield self.batch
            ticks.append(time.perf_counter())
            self.times.append([b - a for a, b in itertools.pairwise(ticks)])
            self.done.release()


@dataclass
class Variant:
    name: str
    callbacks: Callable[[], list[Any]] = list
    norms: bool = False
    relay: Relay = field(init=False)

    def start(self, case: Case, optimizer: str, windows: int) -> threading.Thread:
        self.relay = Relay(case, windows)
        thread = threading.Thread(target=self._fit, args=(case, optimizer), daemon=True)
        thread.start()
        return thread

    def _fit(self, case: Case, optimizer: str) -> None:
        torch.manual_seed(0)
        trainer = pl.Trainer(
            max_epochs=1, logger=False, accelerator="cpu", enable_progress_bar=False, log_every_n_steps=WINDOW,
            enable_model_summary=False, enable_checkpointing=False, callbacks=self.callbacks(),
            default_root_dir=os.environ.get("TMPDIR", "/tmp"),
        )  # fmt: skip
        loader = torch.utils.data.DataLoader(self.relay, batch_size=None)
        trainer.fit((WithNorms if self.norms else Module)(case, optimizer), loader)


def variants() -> list[Variant]:
    def limit(**settings: Any) -> Callable[[], list[Any]]:
        return lambda: [SpeedLimit(print_summary=False, log_figures=False, **settings)]

    return [
        Variant("bare"),
        Variant("bare again"),
        Variant("SpeedLimit", limit()),
        Variant("SpeedLimit, every 10th", limit(measure_every_n_steps=10)),
        Variant("grad_norm", norms=True),
    ]


def race(case: Case, optimizer: str, rounds: int) -> list[Variant]:
    """All variants in turn, window by window; the order turns around from round to round."""
    racers = variants()
    threads = [v.start(case, optimizer, rounds + WARM_UP) for v in racers]
    for number in range(rounds + WARM_UP):
        for variant in racers if number % 2 else racers[::-1]:
            variant.relay.turn.release()
            variant.relay.done.acquire()
    for thread in threads:
        thread.join(timeout=60)
    return racers


def result(racers: list[Variant]) -> dict[str, dict[str, float]]:
    """Medians over the rounds: ratio of windows, milliseconds of a plain step and of a log step."""
    bare = [sum(w) for w in racers[0].relay.times[WARM_UP:]]
    found = {}
    for variant in racers:
        windows = variant.relay.times[WARM_UP:]
        ratios = sorted(sum(w) / b for w, b in zip(windows, bare, strict=True))
        plain = [statistics.median(w[1:]) for w in windows]
        found[variant.name] = {
            "ratio": statistics.median(ratios),
            "ratio_low": ratios[len(ratios) // 4],
            "ratio_high": ratios[-1 - len(ratios) // 4],
            "step_ms": 1e3 * statistics.median(plain),
            "log_step_ms": 1e3 * statistics.median(w[0] for w in windows),  # Lightning fetches one batch ahead
        }
    return found


def bandwidth() -> float:
    """Bytes per second, read and written, of a copy far larger than the caches."""
    source = torch.rand(32 << 20)
    target = torch.empty_like(source)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 8 * source.numel() / statistics.median(times[1:])


def peak_memory(case: str, optimizer: str, measured: bool) -> int:
    """Peak resident bytes (Linux) of a process of its own that trains two windows."""
    code = (
        f"import sys; sys.argv=['x']; sys.path.insert(0, {os.path.dirname(os.path.abspath(__file__))!r});"
        "import overhead;"
        f"v = overhead.variants()[{2 if measured else 0}]; t = v.start(overhead.CASES[{case!r}], {optimizer!r}, 2);"
        "v.relay.turn.release(2); t.join();"
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    )
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed tensors go back at once
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment)
    if out.returncode:
        raise RuntimeError(out.stderr)
    return 1024 * int(out.stdout.split()[-1])


def measure(name: str, optimizer: str, rounds: int, speed: float) -> dict[str, Any]:
    case = CASES[name]
    count = sum(p.numel() for p in case.model().parameters())
    found: dict[str, Any] = {"case": name, "title": case.title, "optimizer": optimizer, "parameters": count}
    found["variants"] = result(race(case, optimizer, rounds))
    found["floor_ms"] = 1e3 * FLOOR_BYTES[optimizer] * count / speed
    extra = peak_memory(name, optimizer, True) - peak_memory(name, optimizer, False)
    found["memory_copies"] = extra / (4 * count)
    return found


def show(found: dict[str, Any]) -> None:
    name, optimizer = found["case"], found["optimizer"]
    print(f"\n({name}) {found['title']}, {optimizer}: {found['parameters'] / 1e6:.2f} M parameters")
    print(f"    {'':24}{'ratio':>7}  {'quartiles':>15}{'plain step':>13}{'log step':>12}")
    for label, row in found["variants"].items():
        reach = {"SpeedLimit": REACH, "SpeedLimit, every 10th": REACH_SAMPLED}.get(label, {}).get((name, optimizer))
        note = "" if reach is None else f"   reach {reach:.2f}"
        quartiles = f"[{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]"
        times = f"{row['step_ms']:10.2f} ms{row['log_step_ms']:9.2f} ms"
        print(f"    {label:24}{row['ratio']:7.3f}  {quartiles:>15}{times}{note}")
    extra = found["variants"]["SpeedLimit"]["step_ms"] - found["variants"]["bare"]["step_ms"]
    print(f"    per step {extra:+.2f} ms; the bytes alone would take {found['floor_ms']:.2f} ms")
    print(f"    peak memory: {found['memory_copies']:+.2f} copies of the parameters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--optimizers", nargs="+", default=["sgd", "adamw"], choices=["sgd", "adamw"])
    parser.add_argument("--output", help="write the figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    speed = bandwidth()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, one thread"
    print(f"{machine}; copies move {speed / 1e9:.1f} GB/s; {arguments.rounds} rounds of {WINDOW} steps")
    cases = []
    for name in arguments.cases:
        for optimizer in arguments.optimizers:
            cases.append(measure(name, optimizer, arguments.rounds, speed))
            show(cases[-1])
    if arguments.output:
        with open(arguments.output, "w") as file:
            json.dump({"machine": machine, "bytes_per_second": speed, "cases": cases}, file, indent=1)


if __name__ == "__main__":
    main()
