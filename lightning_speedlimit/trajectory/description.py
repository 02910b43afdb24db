"""What was run, in plain types: the optimizers and their settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def describe(optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """The optimizers, the number of their coordinates, and the library."""
    parameters = {id(p): p for o in optimizers for g in o.param_groups for p in g["params"]}
    known = [p for p in parameters.values() if not isinstance(p, torch.nn.UninitializedParameter)]
    return {
        "optimizers": describe_optimizers(optimizers),
        "parameters": sum(p.numel() for p in known),
        "versions": {"torch": str(torch.__version__)},
    }


def describe_optimizers(optimizers: Sequence[Optimizer]) -> list[dict[str, Any]]:
    """For each its class and the settings of its groups; reads settings that are tensors, and so syncs for these."""
    return [
        {
            "class": type(optimizer).__name__,
            "groups": [
                {name: plain(value) for name, value in group.items() if name != "params"}
                for group in optimizer.param_groups
            ],
        }
        for optimizer in optimizers
    ]


def plain(value: Any) -> Any:
    """A setting as JSON knows it: tensors as numbers, what is no number or string by its name."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
