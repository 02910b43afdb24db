"""W₂² by several solvers: seconds, and the true relative error, beside the certified interval.

Clouds of N particles in D dimensions, float32, as weights are stored: "lazy" (every particle moved by 1e-3 of
its norm), "features" (a low-rank nonlinear motion thrice as large as the particles, and noise), "independent". The
truth is an exact assignment on float64 differences up to N = 2048, and above that a plan with a dual that
proves it to 1e-11. The solvers take turns; medians of three where a call takes less than a second. A solver
that would need more than --limit seconds, going by the N before, is left out, and the table says so.

Then few dimensions against the cold assignment alone, which takes turns with the certified interval: how many times
as long a call takes, for clouds of more kinds ("permuted": handed on, moved by 1e-3; "shifted", "scaled": independent,
5 apart, 10 times as wide; "thin": nearly on a line; "clusters"), values compared at each.

    python benchmarks/transport.py [--sizes 64 1024] [--dimensions 64] [--limit 120] [--device cuda] [--output FILE]
    python benchmarks/transport.py --cold    only the comparison in few dimensions; the other rows of the file stay
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import ot
import torch
from geomloss import SamplesLoss
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lightning_speedlimit.transport import wasserstein2_squared

KINDS = ("lazy", "features", "independent")
COLD_KINDS = (*KINDS, "permuted", "shifted", "scaled", "thin", "clusters")
COLD_SIZES = (64, 512, 1024, 2048, 4096)
COLD_DIMENSIONS = (1, 2, 3, 8)
TRUTH_BY_ASSIGNMENT = 2048


def clouds(kind: str, n: int, d: int, device: str) -> tuple[Tensor, Tensor]:
    """x and y in float32, entries of x of variance 1/D."""
    generator = torch.Generator().manual_seed(n + d)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / d**0.5

    x = normal(n, d)
    if kind == "lazy":
        y = x + 1e-3 * normal(n, d)
    elif kind == "features":
        # three directions that the particles read, three that they move along
        read, move = normal(d, 3) * d**0.5, normal(d, 3)
        y = x + 3 * torch.tanh(3 * x @ read) @ move.T + 0.1 * normal(n, d)
    elif kind == "permuted":
        y = x[torch.randperm(n, generator=generator)] + 1e-3 * normal(n, d)
    elif kind == "clusters":
        x, y = (5 * normal(10, d)[torch.randint(10, (n,), generator=generator)] + 0.1 * normal(n, d) for _ in range(2))
    else:
        y = normal(n, d)
        y = {"shifted": y + 5, "scaled": 10 * y}.get(kind, y)
        if kind == "thin":
            x[:, 1:] *= 1e-3
            y[:, 1:] *= 1e-3
    return x.to(device), y.to(device)


def costs(x: Tensor, y: Tensor) -> Tensor:
    """(N, N) squared distances in float64, from differences."""
    return torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist").square()


def by_assignment(x: Tensor, y: Tensor) -> float:
    matrix = costs(x, y).cpu().numpy()
    return float(matrix[linear_sum_assignment(matrix)].mean())


def by_emd2(x: Tensor, y: Tensor) -> float:
    matrix = costs(x, y).cpu().numpy()
    return float(ot.emd2([], [], matrix / matrix.max(), numItermax=10**8)) * float(matrix.max())


def by_default_sinkhorn(x: Tensor, y: Tensor) -> float:
    """As in geomloss's tutorials; its cost is ½|x − y|², hence the 2."""
    return 2 * SamplesLoss("sinkhorn", p=2, blur=0.05, backend="tensorized")(x, y).item()


def by_tuned_sinkhorn(x: Tensor, y: Tensor) -> float:
    """Blur at a tenth of the nearest-neighbour distance, slow annealing, float64."""
    x, y = x.double(), y.double()
    spacing = torch.cdist(x, x).fill_diagonal_(math.inf).min(1).values.median().item()
    loss = SamplesLoss("sinkhorn", p=2, blur=0.1 * spacing, scaling=0.9, backend="tensorized")
    return 2 * loss(x, y).item()


SOLVERS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "assignment": by_assignment,
    "emd2": by_emd2,
    "SamplesLoss": by_default_sinkhorn,
    "SamplesLoss tuned": by_tuned_sinkhorn,
}


def timed(call: Callable[[], Any], device: str, repeats: int = 1) -> tuple[Any, float]:
    """Result and seconds of one call: of the process on a CPU, which others may share; by the clock on a GPU."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    for _ in range(repeats):
        result = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, (clock() - start) / repeats


def measure(kind: str, n: int, d: int, device: str, left_out: set[str]) -> dict[str, Any]:
    """One row: the certified interval, and for each solver its seconds and relative error."""
    x, y = clouds(kind, n, d, device)
    seconds: dict[str, list[float]] = {}
    values: dict[str, float] = {}
    for turn in range(3):
        for name, solver in {"certified": wasserstein2_squared, **SOLVERS}.items():
            if name in left_out or (turn and statistics.median(seconds[name]) > 1):
                continue
            result, took = timed(lambda solver=solver: solver(x, y), device)
            seconds.setdefault(name, []).append(took)
            if name == "certified":
                certified = result
            values[name] = result.value if name == "certified" else result
    if n <= TRUTH_BY_ASSIGNMENT:
        truth, source = by_assignment(x, y), "assignment"
    else:
        truth, source = certified.value, "certified to 1e-11"
        if certified.upper > (1 + 1e-11) * certified.lower:
            truth, source = values.get("emd2", math.nan), "emd2"
    return {
        "kind": kind,
        "n": n,
        "d": d,
        "method": certified.method,
        "lower": certified.lower,
        "upper": certified.upper,
        "upper_over_lower_minus_1": certified.upper / certified.lower - 1,
        "identity_excess": certified.identity_excess,
        "truth": truth,
        "truth_by": source,
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "relative_error": {name: value / truth - 1 for name, value in values.items()},
        "left_out": sorted(left_out),
    }


def against_cold(kind: str, n: int, d: int) -> dict[str, Any]:
    """One row: seconds of both, which take turns (five where they are short), and the median of their ratios."""
    x, y = clouds(kind, n, d, "cpu")
    ratios, seconds = [], []
    _, first = timed(lambda: by_assignment(x, y), "cpu")
    repeats = 100 if first < 0.002 else 10 if first < 0.02 else 1  # a process's clock may tick in milliseconds
    for _ in range(5):
        found, ours = timed(lambda: wasserstein2_squared(x, y), "cpu", repeats)
        truth, cold = timed(lambda: by_assignment(x, y), "cpu", repeats)
        ratios.append(ours / cold)
        seconds.append((ours, cold))
        if cold > 1:
            break
    ours, cold = (statistics.median(side) for side in zip(*seconds, strict=True))
    if not found.lower <= truth * (1 + 1e-12) or not truth <= found.upper * (1 + 1e-12):
        raise AssertionError(f"{kind}, {n} × {d}: {truth} is outside of {found.lower} … {found.upper}")
    return {
        "kind": kind,
        "n": n,
        "d": d,
        "method": found.method,
        "ratio": statistics.median(ratios),
        "seconds": {"certified": ours, "assignment": cold},
        "relative_error": found.value / truth - 1,
        "upper_over_lower_minus_1": found.upper / found.lower - 1,
    }


def all_against_cold() -> list[dict[str, Any]]:
    print(f"\n{'N':>5} {'D':>4} {'kind':12} certified    cold  ratio")
    rows = []
    for n in COLD_SIZES:
        for d in COLD_DIMENSIONS:
            for kind in COLD_KINDS if d > 1 else tuple(k for k in COLD_KINDS if k != "thin"):
                row = against_cold(kind, n, d)
                rows.append(row)
                ours, cold = row["seconds"].values()
                print(f"{n:5} {d:4} {kind:12} {ours:8.3f} {cold:8.3f} {row['ratio']:6.2f}  {row['method']}", flush=True)
    return rows


def text(row: dict[str, Any]) -> str:
    """The row as a line for a terminal."""
    parts = [f"{row['n']:5} {row['d']:4} {row['kind']:12}", f"±{row['upper_over_lower_minus_1']:.0e}"]
    for name in ("certified", *SOLVERS):
        if name in row["seconds"]:
            parts.append(f"{row['seconds'][name]:9.3f} s {row['relative_error'][name]:+8.0e}")
        else:
            parts.append(f"{'left out':>20}")
    return "  ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 1024, 4096, 8192])
    parser.add_argument("--dimensions", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--limit", type=float, default=240.0, help="seconds that one call may take")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--cold", action="store_true", help="only few dimensions against the cold assignment")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    where = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{platform.machine()}, one thread"
    print(f"{where}, torch {torch.__version__}: seconds, relative error\n")
    print(f"{'N':>5} {'D':>4} {'kind':12}  {'width':>6}" + "".join(f"{name:>22}" for name in ("certified", *SOLVERS)))
    wasserstein2_squared(*clouds("scaled", 600, 2, "cpu"))  # imports and first calls are not counted
    if arguments.cold:
        document = json.loads(arguments.output.read_text()) | {"against_cold": all_against_cold()}
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")
        return
    rows = []
    for d in arguments.dimensions:
        for kind in KINDS:
            left_out: set[str] = set()
            previous: tuple[int, dict[str, float]] | None = None
            for n in sorted(arguments.sizes):
                if previous is not None:  # time grows with N² to N³
                    growth = (n / previous[0]) ** 2.5
                    left_out |= {name for name in SOLVERS if previous[1].get(name, 0) * growth > arguments.limit}
                row = measure(kind, n, d, arguments.device, left_out)
                rows.append(row)
                previous = n, row["seconds"]
                print(text(row), flush=True)
    document = {"machine": f"{where}, torch {torch.__version__}", "limit_s": arguments.limit, "rows": rows}
    document["against_cold"] = all_against_cold()
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    print(f"\nFigures: {arguments.output}")


if __name__ == "__main__":
    main()
