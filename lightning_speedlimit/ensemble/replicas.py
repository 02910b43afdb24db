"""Many copies of a model trained at once, each from its own start: the paper's p_0 → p_τ in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_speedlimit.checks.tensors import choice, nonnegative, positive, shown, whole
from lightning_speedlimit.optim import Langevin

MAX_REPLICAS = 10**7
Batches = Literal["shared", "independent"]
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Replicas:
    """The recorded states of all replicas, on the host; the arrays that the functions of this room take."""

    times: Tensor
    """(K,) float64: step × learning rate, parameter²/loss."""
    positions: Tensor
    """(K, R, d): trainable parameters of each replica in the order of `parameters()`, parameter."""
    losses: Tensor
    """(K, R): the loss on all data, loss."""
    temperature: float
    """T, loss."""


def train_replicas(
    modules: Sequence[nn.Module] | Callable[[], nn.Module],
    loss_fn: Loss,
    data: Sequence[Tensor] = (),
    *,
    lr: float,
    steps: int,
    replicas: int | None = None,
    temperature: float = 0.0,
    batch_size: int | None = None,
    batches: Batches = "independent",
    record_at: Iterable[int] | None = None,
    chunk_size: int | None = None,
    seed: int = 0,
) -> Replicas:
    """θ_r ← θ_r − lr ∇L_r(θ_r) + √(2 T lr) ξ_r for R replicas at once: each as if it were trained alone.

    Args:
        modules: R modules of one architecture, which are left as they are; or a function that makes one, called
            under a seed of its own.
        loss_fn: loss_fn(model, *batch) → scalar; `model` is called as the module is.
        data: tensors with the examples along their first dimension, on the modules' device; empty where the
            module itself is the potential: loss_fn(model).
        lr: learning rate, the time of one step.
        steps: how many.
        replicas: R, where `modules` is a function; at most 10⁷.
        temperature: T of the Langevin noise, in units of the loss; 0 is SGD.
        batch_size: examples per step, drawn anew with replacement; None: all of them.
        batches: "independent": each replica draws its own; "shared": all see the same, and are then no
            independent sample of the noise of SGD.
        record_at: steps after which to record, 0 the start; None: 0 and `steps`.
        chunk_size: replicas that are evaluated at a time, to save memory.
        seed: of the noise; batches, dropout and the start of replica r have seed + 1, 2 and 3 + r times 2654435769
            (modulo 2³²), since from one seed the numbers of one would be those of another.

    Raises:
        TypeError, ValueError: settings out of range, data that do not fit, modules with batch statistics, a loss
            that is no scalar.

    Memory: R copies of the parameters, gradients and activations, and K · R · d numbers on the host.
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of a model and a batch, got {shown(loss_fn)}")
    _check_settings(lr, steps, batch_size, batches, data)
    nonnegative("temperature", temperature)
    whole("seed", seed, -(2**63), 2**63 - 1)
    if chunk_size is not None:
        whole("chunk_size", chunk_size, 1)
    recorded = _record_steps(record_at, steps)
    starts = _starts(modules, replicas, seed)
    ensemble = _Ensemble(starts, loss_fn, chunk_size)
    device = ensemble.parameters[0].device
    noise = torch.Generator(device).manual_seed(seed)
    order = torch.Generator().manual_seed(_apart(seed, 1))
    draw = None if batch_size is None else (batch_size, batches == "shared", order)
    optimizer = Langevin(ensemble.parameters, lr, temperature, generator=noise)
    positions, losses = [], []
    with _seeded(_apart(seed, 2)):
        for step in range(steps + 1):
            if step in recorded:
                positions.append(ensemble.positions())
                losses.append(ensemble.losses(data, own=False).detach().cpu())
            if step < steps:
                _descend(ensemble, optimizer, _batch(data, draw, len(starts)), own=draw is not None and not draw[1])
    times = lr * torch.tensor(sorted(recorded), dtype=torch.float64, device="cpu")
    return Replicas(times, torch.stack(positions), torch.stack(losses), float(temperature))


class _Ensemble:
    """R modules as one: parameters (R, …), losses (R,)."""

    def __init__(self, modules: Sequence[nn.Module], loss_fn: Loss, chunk_size: int | None) -> None:
        stacked, self._buffers = stack_module_state(list(modules))
        self._stacked: dict[str, Tensor] = stacked
        # Not on "meta", where tied weights would come apart.
        self._base = copy.deepcopy(modules[0])
        self._loss_fn, self._chunk_size = loss_fn, chunk_size
        self.parameters = [p for p in stacked.values() if p.requires_grad]
        if not self.parameters:
            raise ValueError("modules must have trainable parameters, got none; set requires_grad")

    def losses(self, batch: Sequence[Tensor], *, own: bool) -> Tensor:
        """(R,); `own`: the batch has a first dimension for the replicas."""

        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], *mine: Tensor) -> Tensor:
            def model(*args: Any, **kwargs: Any) -> Any:
                return functional_call(self._base, (parameters, buffers), args, kwargs)

            value = self._loss_fn(model, *mine)
            if not isinstance(value, Tensor) or value.ndim:
                got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"loss_fn must return a scalar tensor, got {got}; take its mean")
            return value

        axes = (0, 0, *[0 if own else None for _ in batch])
        mapped = vmap(one, in_dims=axes, randomness="different", chunk_size=self._chunk_size)
        values: Tensor = mapped(self._stacked, self._buffers, *batch)
        return values

    def positions(self) -> Tensor:
        """(R, d) on the host."""
        return torch.cat([p.detach().flatten(1).cpu() for p in self.parameters], 1)


def _descend(ensemble: _Ensemble, optimizer: Langevin, batch: Sequence[Tensor], *, own: bool) -> None:
    optimizer.zero_grad()
    # A replica's loss depends on its own parameters alone: the gradient of the sum is each one's gradient.
    ensemble.losses(batch, own=own).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _batch(data: Sequence[Tensor], draw: tuple[int, bool, torch.Generator] | None, replicas: int) -> Sequence[Tensor]:
    if draw is None:
        return data
    size, shared, order = draw
    shape = (size,) if shared else (replicas, size)
    index = torch.randint(len(data[0]), shape, generator=order, device="cpu")
    return [part[index.to(part.device)] for part in data]


def _apart(seed: int, stream: int) -> int:
    """A seed for another stream of random numbers; torch's generators on the host read 32 bits of it."""
    return (seed + stream * 0x9E3779B9) % 2**32


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global generators under a seed, and afterwards as they were: of every device, since every one is seeded."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def _starts(modules: Sequence[nn.Module] | Callable[[], nn.Module], replicas: int | None, seed: int) -> list[nn.Module]:
    if isinstance(modules, nn.Module):
        raise TypeError("modules must be several modules or a function that makes one, got one module; use [module]")
    if callable(modules):
        if replicas is None:
            raise ValueError("replicas must say how many where modules is a function, got None")
        found = []
        for r in range(whole("replicas", replicas, 1, MAX_REPLICAS)):
            with _seeded(_apart(seed, 3 + r)):
                found.append(modules())
    elif not isinstance(modules, Iterable) or isinstance(modules, Tensor):
        raise TypeError(f"modules must be several modules or a function that makes one, got {shown(modules)}")
    else:
        found = list(modules)
        if replicas not in (None, len(found)):
            raise ValueError(f"replicas must be the number of modules, {len(found)}, or None, got {shown(replicas)}")
    if not found or not all(isinstance(module, nn.Module) for module in found):
        raise TypeError(f"modules must be nn.Modules, at least one, got {[type(m).__name__ for m in found[:3]]}")
    _check_alike(found)
    return found


def _check_alike(modules: Sequence[nn.Module]) -> None:
    """One architecture, one mode, and no statistics that training changes beside the parameters."""
    first = modules[0]
    shapes = {name: tuple(value.shape) for name, value in first.state_dict().items()}
    for module in modules:
        if type(module) is not type(first):
            raise ValueError(
                f"modules must be of one architecture, got {type(first).__name__} and {type(module).__name__}; "
                "train them apart"
            )
        if module.training != first.training:
            raise ValueError("modules must be all in training mode or all not, got both; call train() on each")
        for name, value in module.state_dict().items():
            if tuple(value.shape) != shapes.get(name):
                raise ValueError(
                    f"modules must be of one architecture, got {name} of shapes {shapes.get(name)} and "
                    f"{tuple(value.shape)}; train them apart"
                )
    for part in first.modules():
        if isinstance(part, _BatchNorm) and part.training and part.track_running_stats:
            raise ValueError(
                f"modules must not keep batch statistics, got {type(part).__name__}: its buffers change in "
                "training; use GroupNorm, or track_running_stats=False"
            )


def _record_steps(record_at: Iterable[int] | None, steps: int) -> set[int]:
    if record_at is not None and (isinstance(record_at, Tensor) or not isinstance(record_at, Iterable)):
        raise TypeError(f"record_at must be the numbers of steps, got {shown(record_at)}")
    given = [0, steps] if record_at is None else list(record_at)
    recorded = {whole("record_at", k, 0) for k in given}
    wrong = [k for k in sorted(recorded) if k > steps]
    if wrong or not recorded:
        raise ValueError(f"record_at must hold steps from 0 to {steps}, got {wrong or 'none'}")
    return recorded


def _check_settings(lr: float, steps: int, batch_size: int | None, batches: str, data: Sequence[Tensor]) -> None:
    positive("lr", lr, "times are steps × lr")
    whole("steps", steps, 1)
    choice("batches", batches, *get_args(Batches))
    if (
        isinstance(data, Tensor)
        or not isinstance(data, Sequence)
        or not all(isinstance(part, Tensor) and part.ndim for part in data)
    ):
        raise TypeError("data must be a sequence of tensors with the examples along their first dimension: (x, y)")
    if len({len(part) for part in data}) > 1:
        raise ValueError(f"data must have one number of examples, got {[len(part) for part in data]}")
    if batch_size is not None:
        whole("batch_size", batch_size, 1)
        if not data:
            raise ValueError(f"batch_size must be None without data, got {batch_size}")
