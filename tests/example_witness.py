"""Runs a script as `python script …` would, and writes down what its optimizers did; knows nothing of the package.

    python example_witness.py steps.npz script.py --its --arguments

For the n-th optimizer that steps: `before_n`, `after_n` (steps, parameters), θ around each step; `gradient_n` (steps,
parameters), as backward left it: before `clip_grad_norm_`, if that is called; `decay_n` (steps,), lr·w of a decoupled
weight decay.
"""

from __future__ import annotations

import contextlib
import runpy
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

raw: dict[int, Tensor] = {}  # parameter → its gradient before clipping, until the next step
tapes: dict[int, dict[str, list[Any]]] = {}
optimizers: list[torch.optim.Optimizer] = []  # alive, so that no two share an id


def joined(tensors: Iterable[Tensor]) -> np.ndarray[Any, Any]:
    return torch.cat([t.detach().flatten() for t in tensors]).numpy().copy()


def parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if id(optimizer) not in tapes:
        optimizers.append(optimizer)
        tapes[id(optimizer)] = {"before": [], "after": [], "gradient": [], "decay": []}
    tapes[id(optimizer)]["before"].append(joined(parameters(optimizer)))


def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    tape, group = tapes[id(optimizer)], optimizer.param_groups[0]
    tape["after"].append(joined(parameters(optimizer)))
    tape["gradient"].append(joined(raw.get(id(p), p.grad) for p in parameters(optimizer)))
    tape["decay"].append(group["lr"] * group["weight_decay"] if group.get("decoupled_weight_decay") else 0.0)
    raw.clear()


@contextlib.contextmanager
def witnessed(output: str) -> Iterator[None]:
    """Afterwards the file says what was done within."""
    clip = torch.nn.utils.clip_grad_norm_
    for known in (raw, tapes, optimizers):
        known.clear()  # type: ignore[attr-defined]

    def clip_grad_norm_(parameters: Iterable[Tensor], *args: Any, **kwargs: Any) -> Any:
        parameters = list(parameters)
        raw.update((id(p), p.grad.clone()) for p in parameters)
        return clip(parameters, *args, **kwargs)

    hooks = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    torch.nn.utils.clip_grad_norm_ = clip_grad_norm_
    try:
        yield
    finally:
        torch.nn.utils.clip_grad_norm_ = clip
        for hook in hooks:
            hook.remove()
    tape_of = [tapes[id(optimizer)] for optimizer in optimizers]
    np.savez(output, **{f"{name}_{n}": np.stack(rows) for n, tape in enumerate(tape_of) for name, rows in tape.items()})


if __name__ == "__main__":
    _, output, *sys.argv = sys.argv
    with witnessed(output):
        runpy.run_path(sys.argv[0], run_name="__main__")
