"""Arguments as float64 tensors, checked: each error names the argument, what it got, what it wanted, the cure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Literal

import torch
from torch import Tensor, nn

Values = Tensor | Sequence[float] | float
Reduction = Literal["sum", "mean"]


def tensor(name: str, value: object) -> Tensor:
    """The value as a dense tensor with numbers in it; a TypeError that names it where it is none."""
    try:
        found = value if isinstance(value, Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # whatever torch says of lists of lists
        raise TypeError(f"{name} must be numbers: a tensor, an array, a sequence, got {shown(value)}") from error
    if found.layout != torch.strided or found.is_meta:
        got = "a tensor on the meta device" if found.is_meta else str(found.layout)
        raise TypeError(f"{name} must be a dense tensor with values, got {got}; use .to_dense(), or a real device")
    return found


def float64(value: Values, name: str = "values") -> Tensor:
    """Detached and in float64, on its device; on the host where the device has no float64."""
    found = tensor(name, value).detach()
    if not isinstance(value, Tensor) and not hasattr(value, "dtype"):
        return torch.as_tensor(value, dtype=torch.float64)  # numbers of Python, which torch would round to float32
    return (found.cpu() if found.device.type == "mps" else found).to(torch.float64)


def finite(name: str, value: Values) -> Tensor:
    """The float64 tensor; a ValueError where it is empty, a TypeError where it is complex."""
    given = tensor(name, value)
    if given.is_complex():
        got = getattr(value, "dtype", given.dtype)
        raise TypeError(f"{name} must be real, got {got}; pass real and imaginary parts as separate values")
    found = float64(value, name)
    if not found.numel():
        raise ValueError(f"{name} must not be empty, got shape {tuple(found.shape)}; pass at least one value")
    if not found.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or inf among its values; drop them, or use large numbers")
    return found


def modes(**values: Values) -> list[Tensor]:
    """One value per mode each, (n,): scalars are repeated, lengths must agree."""
    tensors = {name: finite(name, value) for name, value in values.items()}
    for name, found in tensors.items():
        if found.ndim > 1:
            raise ValueError(f"{name} must have shape (modes,), got {tuple(found.shape)}; use flatten()")
    shapes = {name: tuple(found.shape) for name, found in tensors.items() if found.ndim}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"{', '.join(shapes)} must have one value per mode each, got shapes {shapes}")
    device = next(iter(tensors.values())).device
    shape = next(iter(shapes.values()), (1,))
    return [found.to(device).expand(shape) for found in tensors.values()]


def instants(times: Values) -> Tensor:
    """Times of any shape, not negative."""
    found = finite("times", times)
    if found.min() < 0:
        raise ValueError(f"times must not be negative, got {found.min().item():g}; time starts at 0")
    return found


def nonnegative(name: str, value: float) -> float:
    """A plain number ≥ 0."""
    found = number(name, value)
    if found < 0:
        raise ValueError(f"{name} must be a finite number ≥ 0, got {shown(value)}; 0 turns it off")
    return found


def number(name: str, value: object) -> float:
    """A plain finite number: a real one of Python or NumPy, or a tensor of one."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex() and not value.is_meta:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {shown(value)}; use float(…)")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise ValueError(f"{name} must be finite, got {shown(value)}")
    return found


def whole(name: str, value: object, least: int, most: int = 2**31) -> int:
    """A whole number from `least` to `most`: beyond it nothing would end."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {shown(value)}; use int(…)")
    if not least <= value <= most:
        limit = f"at least {least}" if value < least else f"at most {most}"
        raise ValueError(f"{name} must be a whole number of {limit}, got {shown(value)}")
    return value


def choice(name: str, value: object, *among: str) -> None:
    if not isinstance(value, str) or value not in among:
        raise ValueError(f"{name} must be one of {', '.join(among)}, got {shown(value)}")


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")


def positive(name: str, value: object, cure: str) -> float:
    """A plain number > 0."""
    try:
        found = number(name, value)
    except (TypeError, ValueError):
        found = 0.0
    if found <= 0:
        raise ValueError(f"{name} must be a positive number, got {shown(value)}; {cure}")
    return found


def module(name: str, value: object) -> nn.Module:
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be an nn.Module, got {shown(value)}; wrap functions in one")
    return value


def shown(value: object) -> str:
    """What an error message says that it got: short, whatever it is."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, int) and abs(value) > 10**18:
        return f"an int of {value.bit_length()} bits"
    text = repr(value) if isinstance(value, Real | str | None) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}…"


def loss_factor(reduction: Reduction, residuals: int) -> float:
    """What multiplies ½‖f − y‖²: 1, or 2/(N·C) for `nn.MSELoss` over N·C residuals."""
    if not isinstance(reduction, str) or reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' (½‖f − y‖²) or 'mean' (nn.MSELoss), got {shown(reduction)}")
    return 1.0 if reduction == "sum" else 2.0 / residuals
