"""What was run, in plain types: the optimizers and their settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


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
