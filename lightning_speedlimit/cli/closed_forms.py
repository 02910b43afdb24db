"""`speedlimit theory`: the closed forms as tables over time."""

from __future__ import annotations

import math
from typing import Any

from lightning_speedlimit import theory
from lightning_speedlimit.cli import terminal
from lightning_speedlimit.cli.complaints import Complaint, from_user
from lightning_speedlimit.report.text import plain

DIGITS = 6
COLUMNS = {
    "time": "time",
    "wasserstein2_squared": "W2 squared",
    "entropy_production": "entropy production",
    "efficiency": "efficiency",
}


def print_gradient_flow(eigenvalues: str, residual: str, times: str, *, json: bool) -> None:
    """Of `theory.gradient_flow`."""
    values = [_numbers("--eigenvalues", eigenvalues), _numbers("--residual", residual), _numbers("--times", times)]
    with from_user():
        curve = theory.gradient_flow(*values)
    _print(curve, json=json)


def print_langevin(curvature: str, mean: str, std: str, temperature: float, times: str, *, json: bool) -> None:
    """Of `theory.langevin`; a list of one number holds for all modes."""
    starts = [_numbers(f"--{name}", value) for name, value in (("curvature", curvature), ("mean", mean), ("std", std))]
    instants = _numbers("--times", times)
    h, m, s = (values if len(values) > 1 else values[0] for values in starts)
    with from_user():
        curve = theory.langevin(h, m, s, temperature, instants)
    _print(curve, json=json)


def print_power_law(kernel_exponent: float, residual_exponent: float, modes: int, times: str, *, json: bool) -> None:
    """Of `theory.power_law`, with the slope that its efficiency tends to."""
    instants = _numbers("--times", times)
    with from_user():
        curve = theory.power_law(kernel_exponent, residual_exponent, modes, instants)
    lasting = kernel_exponent + residual_exponent > 1  # else no law of time
    slope = theory.power_law_exponent(kernel_exponent, residual_exponent) if lasting else math.nan
    _print(curve, json=json, asymptotic_slope=slope)
    if lasting and not json:
        law = f"goes as time^{slope:.4g}" if slope else "tends to a constant"
        print(f"\nFor 1 << time << {modes}^{kernel_exponent:g} the efficiency {law}.")


def _numbers(option: str, value: str) -> list[float]:
    try:
        return [float(part) for part in value.split(",")]
    except ValueError as error:
        raise Complaint(f"{option} must be numbers with commas between, got {value!r}; as {option} 0.1,1,10") from error


def _print(curve: theory.Curve, *, json: bool, **more: Any) -> None:
    columns = {name: getattr(curve, name).tolist() for name in COLUMNS}
    if json:
        terminal.print_json(plain({**columns, **more}))
        return
    rows = [[f"{value:.{DIGITS}g}" for value in row] for row in zip(*columns.values(), strict=True)]
    terminal.print_rows(list(COLUMNS.values()), rows)
