"""What batches that share no sample within an epoch have in common, and what the work balance makes of it.

q is the share of an epoch's samples that a step sees. Noises of two steps of one epoch have the covariance −q s, where
s = tr Σ/B, and each has the variance (1 − q) s; steps that are j apart lie in one epoch with the chance 1 − jq:

    ρ_0 = 1 − q        ρ_j = −q max(0, 1 − jq)

An update u_k = Σ_j c_j f_{k−j} (c_j = β^j with momentum) then does on the noise of its own batch and of the next

    Σ n_k·u_k = s Σ_j c_j ρ_j        Σ n_{k+1}·u_k = s Σ_j c_j ρ_{j+1}

per step. The balance W − 2d + a adds up both; with independent batches the second is 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

_MOST = 0.5  # of an epoch in a step: beyond it next to nothing is left of the noise
_LEAST = 1e-4  # of the first weight: what is less is left out
_MOMENTUM = {"SGD": "momentum", "RMSprop": "momentum"}
_AVERAGING = ("Adam", "AdamW", "RAdam", "Adamax")  # their first beta is the momentum; NAdam's changes with the step


class Parts(NamedTuple):
    """Of W − 2d + a, the parts that are in W and in a; they add up to 1."""

    own: float
    following: float


INDEPENDENT = Parts(1.0, 0.0)


def share_of_epoch(run: Mapping[str, Any]) -> float:
    """q: of the samples that an epoch sees once each; 0 where they may come again, and where it is not known."""
    there, factors = run.get("samples_without_replacement"), batch_factors(run)
    size = math.prod(factors) if factors else run.get("samples_per_step")
    share = size / there if size and there else 0.0
    return share if 0.0 < share <= _MOST else 0.0


def batch_factors(run: Mapping[str, Any]) -> list[int]:
    """Of a step's batch: one process's, those accumulated, processes with data of their own; empty where not known."""
    size = run.get("batch_size")
    if not size or size < 0:
        return []
    processes = run.get("world_size")
    alike = "ModelParallel" in str(run.get("strategy"))  # whose processes may share their data
    others = [run.get("accumulate_grad_batches") or 1, processes if isinstance(processes, int) and not alike else 1]
    return [size, *(factor for factor in others if factor > 1)]


def parts_of_balance(run: Mapping[str, Any]) -> Parts:
    """Σ_j c_j ρ_j and Σ_j c_j ρ_{j+1} over their sum; those of independent batches where the c_j are not known."""
    q, weights = share_of_epoch(run), _weights(run)
    if not q or not weights:
        return INDEPENDENT
    together = [-q * max(0.0, 1.0 - j * q) for j in range(len(weights) + 1)]
    together[0] = 1.0 - q
    own = math.fsum(w * rho for w, rho in zip(weights, together, strict=False))
    following = math.fsum(w * rho for w, rho in zip(weights, together[1:], strict=True))
    return Parts(own / (own + following), following / (own + following)) if own + following > 0.0 else INDEPENDENT


def _weights(run: Mapping[str, Any]) -> list[float]:
    """c_j, up to a factor; empty where they are not known, or differ between groups."""
    groups = [(o.get("class"), group) for o in run.get("optimizers") or () for group in o.get("groups", ())]
    found = {_momentum(name, group) for name, group in groups}
    if len(found) != 1:
        return []
    beta, nesterov = found.pop()
    if not 0.0 <= beta < 1.0:  # NaN too
        return []
    count = 1 if beta == 0.0 else math.ceil(math.log(_LEAST) / math.log(beta))
    weights = [beta**j for j in range(count)]
    return [1.0 + beta, *(beta * w for w in weights[1:])] if nesterov else weights


def _momentum(name: Any, group: Mapping[str, Any]) -> tuple[float, bool]:
    """β, NaN where it is not known; and whether the newest gradient counts once more."""
    if name in _MOMENTUM:
        beta = group.get(_MOMENTUM[name]) or 0.0
    elif name in _AVERAGING and isinstance(group.get("betas"), list) and group["betas"]:
        beta = group["betas"][0]
    else:
        beta = math.nan
    known = isinstance(beta, int | float) and not isinstance(beta, bool)
    return (float(beta) if known else math.nan), bool(group.get("nesterov"))
