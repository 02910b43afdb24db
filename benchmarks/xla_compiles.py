"""How many times XLA compiles a training that a TrajectoryMeter follows: it must not grow with the steps.

    python benchmarks/xla_compiles.py [--steps 24]

Needs torch_xla, whose CPU backend is enough: pip install torch==2.9.0 torch_xla==2.9.0
"""

from __future__ import annotations

import argparse
import os
from typing import Any

os.environ.setdefault("PJRT_DEVICE", "CPU")

import torch
from torch import nn


def train(steps: int, kind: str, measured: bool) -> list[int]:
    """Compilations after each step."""
    import torch_xla
    import torch_xla.debug.metrics as metrics

    from lightning_speedlimit.trajectory import TrajectoryMeter

    metrics.clear_all()
    torch.manual_seed(0)
    device = torch_xla.device()
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
    options: dict[str, Any] = {"lr": 0.01} if kind == "SGD" else {"lr": 1e-3, "capturable": True}
    optimizer = getattr(torch.optim, kind)(model.parameters(), **options)
    meter = TrajectoryMeter(optimizer) if measured else None
    inputs, targets = torch.randn(16, 32).to(device), torch.randint(10, (16,)).to(device)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        if meter is not None:
            meter.record_loss(loss)
        optimizer.step()
        torch_xla.sync()
        data = metrics.metric_data("CompileTime")
        found.append(0 if data is None else int(data[0]))
    if meter is not None:
        values = meter.compute()
        print(f"  {kind}: kinematic efficiency {values['kinematic_efficiency']:.4f} after {steps} steps")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24)
    steps = parser.parse_args().steps
    for kind in ("SGD", "AdamW"):
        for measured in (False, True):
            found = train(steps, kind, measured)
            print(f"{kind}, {'measured' if measured else 'bare'}: {found[-1]} compilations, the last after step "
                  f"{1 + found.index(found[-1])} of {steps}")  # fmt: skip


if __name__ == "__main__":
    main()
