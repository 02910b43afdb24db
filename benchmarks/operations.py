"""How many tensor operations a TrajectoryMeter adds to a step: what an accelerator's host pays for each of them.

A CPU's are counted as if it were a device: there compiled passes do most of it, which are not counted.

python benchmarks/overhead.py --operations
"""

from __future__ import annotations

from typing import Any

import torch
from cases import CLASSES, CONTEXT, Case, CharTransformer, make_optimizer, mlp
from dispatched import Counter
from torch import nn

from lightning_speedlimit import TrajectoryMeter
from lightning_speedlimit.trajectory import gathering

# Two sizes of one transformer: neither the number of its parameters nor their size makes more of them.
COUNTED = {
    "MLP of 0.3 M parameters in 6 tensors": Case("", lambda: mlp(64, 512, 512, CLASSES), (2, 64)),
    "transformer of 0.15 M in 146": Case("", lambda: CharTransformer(32), (2, CONTEXT), letters=True),
    "transformer of 2.4 M in 146": Case("", lambda: CharTransformer(128), (2, CONTEXT), letters=True),
}
REACH = {"sgd": 60, "adamw": 90}  # and 2 for each parameter of a transformer


def dispatched(case: Case, kind: str, device: str, measured: bool) -> int:
    """Tensor operations of `step` with both hooks, the most of the third to the sixth step."""
    torch.manual_seed(0)
    model, (inputs, targets) = case.model().to(device), case.batch(device)
    optimizer = make_optimizer(kind, model.parameters())
    meter = TrajectoryMeter([optimizer], coordinates="all") if measured else None
    counts = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        with Counter() as counter:  # the hook before the step observes the gradients too
            optimizer.step()
        counts.append(counter.count)
        if meter is not None:
            meter.end_step()
            meter.record_loss(loss.detach())
    return max(counts[2:])


def measure_operations(title: str, kind: str, device: str) -> dict[str, Any]:
    """What the meter adds."""
    case, hosts = COUNTED[title], gathering.HOST
    tensors = len(list(case.model().parameters()))
    gathering.HOST = ()
    try:
        added = dispatched(case, kind, device, True) - dispatched(case, kind, device, False)
    finally:
        gathering.HOST = hosts
    reach = REACH[kind] + (2 * tensors if case.letters else 0)
    return {"title": title, "optimizer": kind, "tensors": tensors, "operations": added, "reach": reach}
