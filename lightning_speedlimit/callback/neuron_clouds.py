"""The neurons of each layer as clouds: W₂ between θ_0's and now's, one layer at a time.

A neuron's particle is its row of the weight with its bias. Relabelling the neurons of a layer changes nothing of
what the layer can do, so W₂ is the displacement that is left when they may swap names. Neighbouring layers would
have to be relabelled together: the sum over layers is a lower bound of what a joint relabelling leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_speedlimit.callback.layer_names import layer_key
from lightning_speedlimit.trajectory import TrajectoryMeter
from lightning_speedlimit.trajectory.estimates import NOTICED
from lightning_speedlimit.trajectory.gathering import dense
from lightning_speedlimit.trajectory.run_totals import ratio
from lightning_speedlimit.transport import wasserstein2_squared

TOTALS = ("wasserstein2", "wasserstein2_lower", "identity_excess", "kinematic_efficiency_wasserstein2")
SHOWN = ("wasserstein2", "identity_excess")
_HALF = (torch.float16, torch.bfloat16)
StartOf = Callable[[Tensor], Tensor | None]
_MOVED = (
    "weights were moved outside of optimizer.step: W2 is between the neurons at the start and now, whatever moved "
    "them, and the action is of the steps alone"
)
_NAMED = 3  # layers that a message names


@dataclass(frozen=True)
class Layer:
    """A weight of two or more dimensions and the bias that belongs to its rows.

    groups: of a weight with its output channels in the second dimension, as transposed convolutions have it;
    None: they are in the first.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    groups: int | None

    def rows(self, weight: Tensor) -> Tensor:
        """(N, D) particles of a tensor in the weight's shape; complex numbers are two coordinates."""
        values = dense(weight)
        if self.groups is not None:  # (in, out/groups, …) → (out, in/groups, …)
            values = values.reshape(self.groups, -1, *values.shape[1:]).transpose(1, 2).flatten(0, 1)
        return _single(values.flatten(1))


@dataclass(frozen=True)
class Measured:
    """totals: a row's columns. layers: for `RunRecord.add_clouds`. reasons: of the totals. said: by topic."""

    totals: dict[str, float]
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)

    @classmethod
    def undefined(
        cls, why: str, layers: dict[str, dict[str, float]] | None = None, said: dict[str, str] | None = None
    ) -> Measured:
        return cls(dict.fromkeys(TOTALS, math.nan), layers or {}, dict.fromkeys(TOTALS, why), said or {})

    def shown(self) -> dict[str, float]:
        """What is logged: the totals' names, and `layers/<name>/…`."""
        found = {name: self.totals[name] for name in SHOWN}
        for layer, values in self.layers.items():
            found |= {layer_key(layer, name): values.get(name, math.nan) for name in SHOWN}
        return found


def layers(module: nn.Module) -> list[Layer]:
    """Every weight once, under the module that holds it first, with the bias of that name beside it."""
    found: list[Layer] = []
    taken: set[int] = set()
    for path, part in module.named_modules():
        own = dict(part.named_parameters(recurse=False))
        for name, weight in own.items():
            if isinstance(weight, nn.UninitializedParameter) or weight.ndim < 2 or id(weight) in taken:
                continue
            groups = _groups(part, name, weight)
            count = weight.shape[0] if groups is None else weight.shape[1] * groups
            # bias_ih_l0 beside weight_ih_l0, if it has an entry for each row and belongs to no other weight yet
            bias = own.get(name.replace("weight", "bias", 1)) if "weight" in name else None
            if bias is not None and (bias.shape != (count,) or id(bias) in taken):
                bias = None
            taken.update(id(p) for p in (weight, bias) if p is not None)
            # The module's name where the weight is its own; rnn.weight_ih_l0 where there are several.
            full = path if path and name == "weight" else f"{path}.{name}".lstrip(".")
            found.append(Layer(full, weight, bias, groups))
    return found


def _groups(part: nn.Module, name: str, weight: Tensor) -> int | None:
    """Where the output channels are in the second dimension: transposed convolutions, and Conv1D of transformers."""
    if name == "weight" and isinstance(part, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return int(part.groups)
    return 1 if name == "weight" and type(part).__name__ == "Conv1D" and weight.ndim == 2 else None


def _single(values: Tensor) -> Tensor:
    """Half precision in float32: the numbers are the same, and transport need not warn of them."""
    return values.float() if values.dtype in _HALF else values


# -- measuring -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """One layer. row: for `RunRecord.add_clouds`. failure: why its values are NaN."""

    row: dict[str, float]
    proven: bool = True
    failure: str | None = None


@torch.no_grad()
def measure(module: nn.Module, meter: TrajectoryMeter, optimizers: Iterable[Any], start_of: StartOf) -> Measured:
    """√(Σ_layers N W₂² + Σ (Δθ_i)² of the parameters in no cloud), and each layer's share, for θ as it is now.

    Args:
        optimizers: all of the training's; what those move that the meter does not measure is in no action.
        start_of: θ_0 of a parameter; None where it is not known.
    """
    values = meter.compute()

    def measured_start(parameter: Tensor) -> Tensor | None:
        return start_of(parameter) if meter.recorder.has_moved(parameter) else None

    rest = {id(p): p for p in _parameters(module, meter)}
    if not math.isfinite(values["displacement"]) and all(_finite(p) for p in rest.values()):
        return Measured.undefined(meter.reasons.get("displacement", "the displacement is unknown"))
    half = next((p.dtype for p in rest.values() if p.dtype in _HALF), None)
    unmeasured = {id(p) for o in optimizers if o not in meter.optimizers for g in o.param_groups for p in g["params"]}
    found: dict[str, Compared] = {}
    for layer in layers(module):
        compared = _compare(layer, measured_start, unmeasured, rest)
        if compared is not None:
            found[layer.name] = compared
    said = _remarks(half, {name: c.failure for name, c in found.items() if c.failure is not None})
    others = math.fsum(_displacement_squared(p, measured_start(p)) for p in rest.values())
    measured, name = _total(found, others, values, meter.reasons, said), "kinematic_efficiency_wasserstein2"
    moved = values["moved_outside"] > NOTICED * values["path_length"] or meter.recorder.moved_since()
    if moved and math.isfinite(measured.totals[name]):
        measured.totals[name], measured.reasons[name] = math.nan, _MOVED
    return measured


def _parameters(module: nn.Module, meter: TrajectoryMeter) -> Iterator[Tensor]:
    """What the meter may have measured, each once: the module's parameters and the optimizers' other ones."""
    seen: set[int] = set()
    held = (p for o in meter.optimizers for g in o.param_groups for p in g["params"])
    for parameter in (*module.parameters(), *held):
        if id(parameter) not in seen and not isinstance(parameter, nn.UninitializedParameter):
            seen.add(id(parameter))
            yield parameter


def _compare(layer: Layer, start_of: StartOf, unmeasured: set[int], rest: dict[int, Tensor]) -> Compared | None:
    """W₂² between a layer's neurons at θ_0 and now; takes its parameters out of `rest`. None: not measured."""
    start = start_of(layer.weight)
    if start is None:
        return None
    rest.pop(id(layer.weight), None)
    before, now = [layer.rows(start)], [layer.rows(layer.weight)]
    if layer.bias is not None and id(layer.bias) not in unmeasured:
        rest.pop(id(layer.bias), None)
        first = start_of(layer.bias)  # None: no optimizer has moved it, and it is its neuron's all the same
        for blocks, value in ((before, layer.bias if first is None else first), (now, layer.bias)):
            blocks.append(_single(dense(value).reshape(len(now[0]), -1)).to(now[0].device))
    count = len(now[0])
    try:
        found = wasserstein2_squared(before, now)
    except Exception as error:  # it must not reach the training
        why = f"{type(error).__name__}: {error}" if all(map(_finite, now)) else "its weights are not finite"
        return Compared({"particles": count}, failure=why)
    row = {
        "particles": count,
        "wasserstein2": math.sqrt(count * found.value),
        "wasserstein2_lower": math.sqrt(count * found.lower),
        "identity_excess": found.identity_excess,
        "displacement": math.sqrt(count * found.paired),
    }
    return Compared(row, proven=found.converged or not found.value)


def _total(
    found: dict[str, Compared], others: float, values: dict[str, float], known: dict[str, str], said: dict[str, str]
) -> Measured:
    """The run's W, its lower bound, D²/W² − 1 and W²/(τA), D being of the same parameters as W.

    Args:
        others: Σ (Δθ_i)² of the parameters in no cloud. values, known: the meter's, and its reasons.
    """
    rows = {name: compared.row for name, compared in found.items()}
    failures = {name: c.failure for name, c in found.items() if c.failure is not None}
    if failures:
        names, why = _names(list(failures)), next(iter(failures.values()))
        return Measured.undefined(f"the neurons of {names} could not be compared: {why}", rows, said)
    if not rows:
        return Measured.undefined("no layer with a weight of two or more dimensions was measured")
    upper, lower, paired = (
        others + math.fsum(row[name] ** 2 for row in rows.values())
        for name in ("wasserstein2", "wasserstein2_lower", "displacement")
    )
    totals = {
        "wasserstein2": math.sqrt(upper),
        "wasserstein2_lower": math.sqrt(lower),
        "identity_excess": paired / upper - 1 if upper else (math.nan if paired else 0.0),
        "kinematic_efficiency_wasserstein2": float(ratio(upper, values["elapsed"] * values["action"])),
    }
    reasons: dict[str, str] = {}
    unproven = [name for name, compared in found.items() if not compared.proven]
    if unproven:
        why = f"{_names(unproven)}: no pairing was proven optimal (too many neurons), W2 may be smaller"
        reasons = {name: why for name in TOTALS if name != "wasserstein2_lower"}
    if math.isnan(totals["identity_excess"]):
        reasons["identity_excess"] = "the neurons only changed places: W2 is 0 where the displacement is not"
    if not math.isfinite(totals["kinematic_efficiency_wasserstein2"]):
        why = known.get("kinematic_efficiency", "the action is not finite")
        reasons["kinematic_efficiency_wasserstein2"] = why
    return Measured(totals, rows, reasons, said)


def _displacement_squared(parameter: Tensor, start: Tensor | None) -> float:
    """Σ (Δθ_i)²; 0 for a parameter that the meter does not measure."""
    if start is None:
        return 0.0
    now, before = dense(parameter), dense(start)
    if now.device.type == "mps":  # it has no float64
        now, before = now.cpu(), before.cpu()
    return float((now.double() - before.double()).square().sum())


def _finite(values: Tensor) -> bool:
    return bool(torch.isfinite(dense(values)).all())


def _remarks(half: torch.dtype | None, failures: dict[str, str]) -> dict[str, str]:
    """What is said once in a fit, by topic."""
    said = {}
    if half is not None:
        said["half precision"] = (
            f"SpeedLimit compares the neurons as they are trained, in {half}: the rounding of weights is part of W2"
        )
    if failures:
        names, why = _names(list(failures)), next(iter(failures.values()))
        said["failure"] = (
            f"SpeedLimit could not compare the neurons of {names} ({why}): W2 is NaN there and in the total. "
            "The training goes on"
        )
    return said


def _names(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
