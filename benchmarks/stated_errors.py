"""How often two stated standard errors cover the truth, where the truth is a closed form.

    python benchmarks/stated_errors.py --output benchmarks/stated_errors.json

Gaussian clouds that relax (W₂² between distributions from few replicas), a plane that turns (its entropy production,
by polynomials), and exponentials with noise (the loss drop).
Two minutes of one core. Of normal errors 0.954 are covered; 0.90 is promised, less three standard deviations of the
draws, and what falls below is said.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_speedlimit.ensemble.distance import extrapolated, sampled_distance, sampled_gelbrich
from lightning_speedlimit.ensemble.uncertainty import entropy_production_polynomial
from lightning_speedlimit.trajectory.losses import drop
from lightning_speedlimit.transport import wasserstein2_squared

PROMISED = 0.90
# (dimensions, replicas, temperature, time): modes of curvature 1, from N(1, 0.5²).
CLOUDS = [
    (1, 60, 0.3, 1.0),
    (2, 60, 1.0, 0.3),
    (3, 60, 1.0, 0.3),
    (6, 60, 0.3, 1.0),
    (6, 60, 1.0, 0.3),
    (6, 61, 1.0, 3.0),
    (6, 300, 0.3, 1.0),
    (10, 60, 1.0, 0.3),
    (20, 60, 1.0, 0.3),
    (20, 60, 1.0, 3.0),
]

RATES = [(0.02, 1), (0.05, 1), (0.05, 3), (0.1, 1), (0.2, 1), (0.3, 1)]  # lag, degree
DROPS = [(steps, rate) for steps in (70, 200) for rate in (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)]


def least(draws: int) -> int:
    """Covered at least, of so many draws, with probability 0.999 where the coverage is as promised."""
    return math.floor(PROMISED * draws - 3 * math.sqrt(PROMISED * (1 - PROMISED) * draws))


def told(values: list[Any], truth: float, stated: dict[str, Callable[[list[float]], Any]]) -> dict[str, Any]:
    """What estimates say of the truth; `stated`: the name of their errors' middle, and which middle it is."""
    found = [e.value for e in values]
    return {
        "truth": truth,
        "found": float(np.mean(found)),
        "scatter": float(np.std(found)),
        **{name: float(middle([e.standard_error for e in values])) for name, middle in stated.items()},
        "covered": sum(abs(e.value - truth) < 2 * e.standard_error for e in values),
        "draws": len(values),
        "least": least(len(values)),
    }


def clouds(d: int, replicas: int, temperature: float, time: float, draws: int, seed: int = 0) -> dict[str, Any]:
    """W₂² from N(1, ¼) in every mode, by e^{−t} and noise of variance T(1 − e^{−2t})."""
    random = np.random.default_rng(seed)
    shrunk, noise = math.exp(-time), math.sqrt(temperature * -math.expm1(-2 * time))
    truth = d * ((1 - shrunk) ** 2 + (math.hypot(shrunk / 2, noise) - 0.5) ** 2)
    plain, found = [], []
    for _ in range(draws):
        start = 1 + 0.5 * random.standard_normal((replicas, d))
        x, y = (torch.from_numpy(a) for a in (start, shrunk * start + noise * random.standard_normal(start.shape)))
        transport = wasserstein2_squared(x, y)
        distance = sampled_distance(x, y, transport)
        plain.append(distance.estimate())
        found.append(extrapolated(distance, x, y, transport, sampled_gelbrich(x, y), 1e-3).estimate())
    return {
        "dimensions": d,
        "replicas": replicas,
        "temperature": temperature,
        "time": time,
        "truth": truth,
        "of the clouds": float(np.mean([e.value for e in plain])),
        "extrapolated": float(np.mean([e.value for e in found])),
        "stated": float(np.mean([e.standard_error for e in found])),
        "covered without": sum(abs(e.value - truth) < 2 * e.standard_error for e in plain),
        "covered": sum(abs(e.value - truth) < 2 * e.standard_error for e in found),
        "draws": draws,
        "least": least(draws),
    }


def rates(lag: float, degree: int, draws: int, seed: int = 0) -> dict[str, Any]:
    """σ = 2 of dx = −(1 − J)x dt + dW in the plane, J a quarter turn: 100 replicas, 51 records, drawn exactly."""
    kept, values = math.exp(-lag), []
    turn = kept * np.array([[math.cos(lag), math.sin(lag)], [-math.sin(lag), math.cos(lag)]])
    for draw in range(draws):
        random = np.random.default_rng(seed + draw)
        x = [math.sqrt(0.5) * random.standard_normal((100, 2))]
        for _ in range(50):
            x.append(x[-1] @ turn + math.sqrt(0.5 * (1 - kept**2)) * random.standard_normal((100, 2)))
        values.append(entropy_production_polynomial(lag * np.arange(51), np.stack(x), degree=degree))
    return {
        "lag": lag,
        "degree": degree,
    } | told(values, 2.0, {"stated": np.mean})


def drops(steps: int, rate: float, draws: int, seed: int = 0) -> dict[str, Any]:
    """L_0 − L_K of 0.3 e^{−rate·k} (rate 0: flat) with noise of 0.1, from windows of 50 losses."""
    random, number = np.random.default_rng(seed), list(range(steps + 1))
    curve = 0.3 * np.exp(-rate * np.arange(steps + 1))
    truth, values = float(curve[0] - curve[-1]), []
    for _ in range(draws):
        losses = (curve + 0.1 * random.standard_normal(steps + 1)).tolist()
        values.append(drop((number[:50], losses[:50]), (number[-50:], losses[-50:]), steps))
    return {
        "steps": steps,
        "rate": rate,
    } | told(values, truth, {"stated, median": np.median})


def shown(row: dict[str, Any]) -> str:
    values = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()]
    return ", ".join(values) + ("" if row["covered"] >= row["least"] else "   too few")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tables: dict[str, tuple[Callable[..., dict[str, Any]], list[Any], int]] = {
        "wasserstein2_squared": (clouds, CLOUDS, arguments.draws),
        "entropy_production_polynomial": (rates, RATES, arguments.draws),
        "loss_drop": (drops, DROPS, 4 * arguments.draws),
    }
    found: dict[str, list[dict[str, Any]]] = {}
    for name, (measured, cases, draws) in tables.items():
        found[name] = []
        for case in cases:
            found[name].append(measured(*case, draws=draws))
            print(shown(found[name][-1]), flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
