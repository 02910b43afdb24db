"""Tiny trainings for the tests of the callback, and a tape that keeps what they did as plain copies.

The tape knows nothing of the package: θ before and after each step, the raw gradients of `on_after_backward`,
the gradients as the optimizer used them, learning rates and losses. `plain` adds them up once more.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_speedlimit import SpeedLimit

# The trainings run in float64 unless they say otherwise: a few hundred additions leave 1e-13, and differences
# of nearly equal numbers (extrapolated losses) lose three or four digits of it.
EXACT = 1e-9
# float32 gradients and tile sums carry 6e-8 each; dozens of them add.
SINGLE = 1e-5

Batch = tuple[Tensor, Tensor]
MakeOptimizer = Callable[[list[nn.Parameter]], Any]


def sgd(**options: Any) -> MakeOptimizer:
    return lambda parameters: torch.optim.SGD(parameters, **({"lr": 0.05} | options))


def batches(number: int, *, seed: int = 1, size: int = 6, dtype: torch.dtype = torch.float64) -> list[Batch]:
    """Noisy regression on 4 features; the loss falls from about 2 to 0.5 in fifty steps of SGD."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.tensor([[1.0], [-2.0], [0.5], [0.0]], dtype=torch.float64)
    found = []
    for _ in range(number):
        x = torch.randn(size, 4, generator=generator, dtype=torch.float64)
        y = x @ weight + 0.3 * torch.randn(size, 1, generator=generator, dtype=torch.float64)
        found.append((x.to(dtype), y.to(dtype)))
    return found


def loader(data: list[Batch]) -> Any:
    return torch.utils.data.DataLoader(data, batch_size=None)  # type: ignore[arg-type]


class Resumable:
    """Batches in an order that is another one in each epoch; tells a checkpoint where it is."""

    def __init__(self, data: list[Batch]) -> None:
        self.data, self.epoch, self.position = data, 0, 0

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Batch]:
        if self.position == len(self.data):
            self.epoch, self.position = self.epoch + 1, 0
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(self.epoch)).tolist()
        while self.position < len(order):
            self.position += 1
            yield self.data[order[self.position - 1]]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


@dataclass(frozen=True)
class Step:
    """One optimizer step, in flat float64 copies."""

    optimizer: int
    before: Tensor
    after: Tensor
    raw: Tensor
    used: Tensor
    rates: tuple[float, ...]
    batch: int

    @property
    def update(self) -> Tensor:
        return self.after - self.before


@dataclass
class Tape:
    steps: list[Step] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    batch: int = -1
    _raw: dict[int, Tensor] = field(default_factory=dict)
    _before: Tensor | None = None
    _optimizers: list[Optimizer] = field(default_factory=list)

    def follow(self, optimizer: Optimizer) -> Optimizer:
        self._optimizers.append(optimizer)
        optimizer.register_step_pre_hook(self._pre)
        optimizer.register_step_post_hook(self._post)
        return optimizer

    def see_gradients(self, module: nn.Module, scale: float = 1.0) -> None:
        for parameter in module.parameters():
            if parameter.grad is not None:
                self._raw[id(parameter)] = parameter.grad.detach().double().clone() / scale

    def _pre(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._before = flat(of(optimizer))

    def _post(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        parameters = of(optimizer)
        nothing = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
        raw = [self._raw.get(id(p), zero) for p, zero in zip(parameters, nothing, strict=True)]
        used = [zero if p.grad is None else p.grad for p, zero in zip(parameters, nothing, strict=True)]
        rates = tuple(float(group["lr"]) for group in optimizer.param_groups)
        assert self._before is not None
        number = next(i for i, o in enumerate(self._optimizers) if o is optimizer)
        step = Step(number, self._before, flat(parameters), flat(raw), flat(used), rates, self.batch)
        self.steps.append(step)


def of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().double().reshape(-1) for t in tensors])


class Regressor(pl.LightningModule):
    """4 → width → 1, tanh; writes a tape. The callables change one thing each."""

    def __init__(
        self,
        optimizer: MakeOptimizer | None = None,
        *,
        width: int = 5,
        dtype: torch.dtype = torch.float64,
        schedule: Callable[[Optimizer], Any] | None = None,
        interval: str = "step",
    ) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(4, width)
        self.second = nn.Linear(width, 1)
        self.to(dtype)
        self.tape = Tape()
        self._optimizer, self._schedule, self._interval = optimizer or sgd(), schedule, interval

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))

    def loss(self, batch: Batch) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self(x).to(y.dtype), y)

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        self.tape.batch += 1
        loss = self.loss(batch)
        self.tape.losses.append(float(loss.detach()))
        return loss

    def on_after_backward(self) -> None:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        self.tape.see_gradients(self, 1.0 if scaler is None else scaler.get_scale())

    def configure_optimizers(self) -> Any:
        optimizer = self.tape.follow(self._optimizer(list(self.parameters())))
        if self._schedule is None:
            return optimizer
        scheduler = {"scheduler": self._schedule(optimizer), "interval": self._interval}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class ByHand(pl.LightningModule):
    """Before a module's class: manual optimization, in which each optimizer steps, on the same gradients."""

    automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.zero_grad()
        self.manual_backward(loss)
        found = self.optimizers()
        for optimizer in found if isinstance(found, list) else [found]:
            optimizer.step()
        return loss.detach()


@contextlib.contextmanager
def heard(part: str = "SpeedLimit") -> Iterator[list[str]]:
    """Afterwards: the warnings that have this in them, each as often as it came."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield found
    found += [str(w.message) for w in said if part in str(w.message)]


def quiet(**options: Any) -> SpeedLimit:
    """Prints and draws nothing. Two losses at each end: L_0 is the first loss, L_K = 2 L_{K−1} − L_{K−2}."""
    return SpeedLimit(**({"print_summary": False, "log_figures": False, "loss_window": 2} | options))


def trainer(folder: Path, *callbacks: Any, kind: Any = pl.Trainer, **options: Any) -> Any:
    defaults = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "max_epochs": 1,
    }
    return kind(callbacks=list(callbacks), **(defaults | options))


def plain(steps: list[Step], losses: list[float], *, clock: str = "steps") -> dict[str, float]:
    """The numbers of a run of plain SGD with one parameter group, from its tape."""
    updates = [s.update for s in steps]
    squares = [float(u @ u) for u in updates]
    rates = [s.rates[0] for s in steps]
    tau = float(len(steps)) if clock == "steps" else math.fsum(rates)
    cost = [q if clock == "steps" else (q / r if r else 0.0) for q, r in zip(squares, rates, strict=True)]
    path, action = math.fsum(math.sqrt(q) for q in squares), math.fsum(cost)
    displacement = float((steps[-1].after - steps[0].before).norm())
    ito = [-float(s.raw @ s.update) for s in steps]
    anti = [-float(b.raw @ a.update) for a, b in pairwise(steps)]
    clip = [float(s.used.norm() / s.raw.norm()) for s in steps]
    mobility = math.fsum(r * c for r, c in zip(rates, clip, strict=True))
    drop = losses[0] - (2 * losses[-1] - losses[-2]) if len(losses) > 1 else 0.0
    weighted = displacement**2 / mobility
    response = math.fsum(q / (r * c) if r else 0.0 for q, r, c in zip(squares, rates, clip, strict=True))
    return {
        "displacement": displacement,
        "path_length": path,
        "action": action,
        "elapsed": tau,
        "straightness": displacement**2 / path**2,
        "steadiness": path**2 / (tau * action),
        "kinematic_efficiency": displacement**2 / (tau * action),
        "speed_limit_time": displacement**2 / action,
        "work_ito": math.fsum(ito),
        "work_anti_ito": math.fsum(anti),
        "work_stratonovich": 0.5 * (math.fsum(ito[:-1]) + math.fsum(anti)),
        "work_action": response,
        "signal_fraction": math.fsum(anti) / math.fsum(ito[:-1]) if anti else math.nan,
        "loss_drop": drop,
        "entropy_production": drop,
        "conversion": drop / math.fsum(ito),
        "efficiency": weighted / drop if drop > 0 else math.nan,
        "efficiency_action": weighted / response,
        "grad_norm": float(steps[-1].raw.norm()),
        "grad_norm_clipped": float(steps[-1].used.norm()),
        "step_norm": math.sqrt(squares[-1]),
        "learning_rate": rates[-1],
    }


def repeatable(columns: dict[str, Any]) -> dict[str, Any]:
    """The columns that two runs alike share: all but the wall clock."""
    return {name: column for name, column in columns.items() if name != "seconds"}


def last_row(callback: SpeedLimit) -> dict[str, float]:
    assert callback.record is not None
    return {name: float(column[-1]) for name, column in repeatable(callback.record.columns).items()}
