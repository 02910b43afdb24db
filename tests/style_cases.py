"""Ways of training, each a small run, and a diary of it that knows nothing of the package.

The diary keeps, for each step and parameter, plain float64 copies: θ before and after, the raw gradient and the
gradient that was used. `sums` adds them up once more; parameters may join, leave, or have no gradient.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from callback_cases import Batch, batches, last_row, loader, of, quiet, trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_speedlimit import SpeedLimit

Vectors = dict[int, Tensor]  # by the parameter's id


def real64(tensor: Tensor) -> Tensor:
    """A flat float64 copy; sparse summed, complex numbers as pairs."""
    tensor = tensor.detach()
    if tensor.is_sparse:
        tensor = tensor.coalesce().to_dense()
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.double().reshape(-1).clone()


def weights(optimizer: Optimizer) -> Vectors:
    lazy = torch.nn.UninitializedParameter
    return {id(p): real64(p) for p in of(optimizer) if not isinstance(p, lazy)}


def gradients(parameters: list[Tensor]) -> Vectors:
    return {id(p): real64(p.grad) for p in parameters if p.grad is not None}


@dataclass(frozen=True)
class Entry:
    """One step of one optimizer; `mobility`: lr/(1 − momentum), or Adam's from its state, per parameter."""

    optimizer: int
    before: Vectors
    after: Vectors
    raw: Vectors
    used: Vectors
    mobility: Vectors
    rate: float
    batch: int

    @property
    def update(self) -> Vectors:
        """Of the parameters that had a gradient."""
        return {key: self.after[key] - self.before[key] for key in self.used}


@dataclass
class Diary:
    entries: list[Entry] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    raw: Vectors = field(default_factory=dict)
    batch: int = -1
    _optimizers: list[Optimizer] = field(default_factory=list)
    _before: Vectors = field(default_factory=dict)

    def follow(self, optimizer: Optimizer) -> Optimizer:
        self._optimizers.append(optimizer)
        untraced: Callable[[Any], Any] = torch.compiler.disable
        optimizer.register_step_pre_hook(untraced(self._pre))
        optimizer.register_step_post_hook(untraced(self._post))
        return optimizer

    def see(self, module: nn.Module, scale: float = 1.0) -> None:
        """After each backward; parameters that were lazy before it are seen here for the first time."""
        parameters = list(module.parameters())
        self.raw |= {key: value / scale for key, value in gradients(parameters).items()}
        for parameter in parameters:
            self._before.setdefault(id(parameter), real64(parameter))

    def _pre(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._before = weights(optimizer)

    def _post(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        number = next(i for i, o in enumerate(self._optimizers) if o is optimizer)
        used, after = gradients(of(optimizer)), weights(optimizer)
        raw = {key: self.raw.get(key, value) for key, value in used.items()}
        before = {key: self._before.get(key, after[key]) for key in after}
        mobility = {id(p): _mobility(optimizer, g, p) for g in optimizer.param_groups for p in g["params"]}
        rate = float(optimizer.param_groups[0]["lr"])
        self.entries.append(Entry(number, before, after, raw, used, mobility, rate, self.batch))


def _mobility(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Tensor:
    """lr/(√v̂ + ε) per coordinate for Adam; lr/(1 − β), one number, for SGD; NaN for others."""
    rate, state = float(group["lr"]), optimizer.state.get(parameter, {})
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and "exp_avg_sq" in state:
        second = real64(state["exp_avg_sq"]) / (1 - group["betas"][1] ** float(state["step"]))
        return rate / (second.sqrt() + group["eps"])
    if type(optimizer) is torch.optim.SGD:
        return torch.tensor(rate / (1 - group["momentum"]), dtype=torch.float64)
    return torch.tensor(math.nan, dtype=torch.float64)


def inner(a: Vectors, b: Vectors) -> float:
    """a·b over the parameters in both."""
    return math.fsum(float(a[key] @ b[key]) for key in a.keys() & b.keys())


def joint_steps(entries: list[Entry], optimizers: int) -> list[dict[str, Vectors]]:
    """One step per optimizer, in turn, made into one."""
    found = []
    for first in range(0, len(entries), optimizers):
        part = entries[first : first + optimizers]
        step: dict[str, Vectors] = {}
        for name in ("update", "raw", "used", "mobility"):
            step[name] = {key: value for entry in part for key, value in getattr(entry, name).items()}
        found.append(step)
    return found


def sums(diary: Diary, optimizers: int = 1, clip: bool = True) -> dict[str, float]:
    """The numbers of the run, by other sums than the package's: D = ‖Σ u‖, m = Σ c μ over the steps that moved a
    coordinate.

    A step without any gradient is a step of zero length; the update before it meets the next gradient there is.
    """
    steps = joint_steps(diary.entries, optimizers)
    told = [step for step in steps if step["raw"]]
    total: Vectors = {}
    mobility: Vectors = {}
    response = 0.0
    for step in steps:
        for key, update in step["update"].items():
            c = float(step["used"][key].norm() / step["raw"][key].norm()) if clip and step["raw"][key].any() else 1.0
            mu = step["mobility"][key] * c
            total[key] = total.get(key, 0.0) + update
            mobility[key] = mobility.get(key, 0.0) + mu * (update != 0).double()
            response += float(torch.where(update != 0, update**2 / mu, 0.0).sum())
    squares = [inner(step["update"], step["update"]) for step in steps]
    displacement_squared = inner(total, total)
    weighted = math.fsum(
        float(torch.where(m != 0, total[key] ** 2 / m, 0.0).sum()) for key, m in mobility.items() if m.numel()
    )
    action, path = math.fsum(squares), math.fsum(map(math.sqrt, squares))
    return {
        "displacement": math.sqrt(displacement_squared),
        "path_length": path,
        "action": action,
        "straightness": displacement_squared / path**2,
        "kinematic_efficiency": displacement_squared / (len(steps) * action),
        "elapsed": float(len(steps)),
        "work_ito": -math.fsum(inner(s["raw"], s["update"]) for s in steps),
        "work_anti_ito": -math.fsum(inner(b["raw"], a["update"]) for a, b in pairwise(told)),
        "work_action": response,
        "efficiency_action": weighted / response if response else math.nan,
        "grad_norm": math.sqrt(inner(steps[-1]["raw"], steps[-1]["raw"])),
        "grad_norm_clipped": math.sqrt(inner(steps[-1]["used"], steps[-1]["used"])),
        "step_norm": math.sqrt(squares[-1]),
        "loss_drop": _extrapolated_drop(diary.losses) if len(diary.losses) == len(steps) else math.nan,
    }


def _extrapolated_drop(losses: list[float]) -> float:
    """With two losses at each end: L_0 is the first one, L_K = 2 L_{K−1} − L_{K−2}."""
    return losses[0] - (2 * losses[-1] - losses[-2])


KINEMATIC = ("displacement", "path_length", "action", "straightness", "kinematic_efficiency", "elapsed", "step_norm")
WORKS = ("work_ito", "work_anti_ito", "grad_norm", "grad_norm_clipped")
WEIGHTED = ("work_action", "efficiency_action")
LOSS = ("loss_drop",)
ALL = (*KINEMATIC, *WORKS, *WEIGHTED, *LOSS)


class Diarist(pl.LightningModule):
    """A module with a diary: 4 → 5 → 1, tanh, noisy regression. Subclasses change one thing each."""

    def __init__(self, optimizer: Callable[[list[Any]], Any] | None = None, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.diary = Diary()
        self._optimizer = optimizer or (lambda p: torch.optim.SGD(p, lr=0.05))
        self.build()
        self.to(dtype)

    def build(self) -> None:
        self.first = nn.Linear(4, 5)
        self.second = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))

    def loss(self, batch: Batch) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self(x).to(y.dtype), y)

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.diary.batch += 1
        self.diary.losses.append(float(loss.detach()))
        return loss

    def on_after_backward(self) -> None:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        self.diary.see(self, 1.0 if scaler is None else scaler.get_scale())

    def configure_optimizers(self) -> Any:
        return self.diary.follow(self._optimizer(list(self.parameters())))


@dataclass(frozen=True)
class Outcome:
    """All that a training leaves behind."""

    state: dict[str, Tensor]
    losses: list[float]
    optimizers: list[Any]
    random: Tensor
    steps: int

    def differs_from(self, other: "Outcome") -> list[str]:
        """Names of what is not bitwise the same."""
        found = [n for n in self.state.keys() | other.state.keys() if not same(self.state.get(n), other.state.get(n))]
        for name in ("losses", "optimizers", "random", "steps"):
            found += [] if same(getattr(self, name), getattr(other, name)) else [name]
        return found


def same(a: Any, b: Any) -> bool:
    """Bitwise, NaN for NaN."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        return torch.equal(a.nan_to_num(nan=-7.0), b.nan_to_num(nan=-7.0))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) or (a != a and b != b)


@dataclass(frozen=True)
class Style:
    """A way of training. `agreeing`: what can be told from the diary; `size`: batches of an epoch."""

    model: Callable[[], Any]
    options: dict[str, Any] = field(default_factory=dict)
    others: Callable[[], list[pl.Callback]] = list
    size: int = 8
    epochs: int = 2
    optimizers: int = 1
    agreeing: tuple[str, ...] = ALL
    rel: float = 1e-9
    dtype: torch.dtype = torch.float64
    validated: bool = False


def train(style: Style, folder: Path, callback: SpeedLimit | None) -> tuple[Any, Outcome]:
    """The trained module, and what the training left."""
    model = style.model()
    torch.manual_seed(11)
    options = {"max_epochs": style.epochs, "num_sanity_val_steps": 0, "log_every_n_steps": 5} | style.options
    options = {name: value() if name == "plugins" else value for name, value in options.items()}
    fit = trainer(folder, *([] if callback is None else [callback]), *style.others(), **options)
    data = batches(style.size, dtype=style.dtype)
    fit.fit(model, loader(data), *([loader(data[:2])] if style.validated else []))
    model = getattr(model, "_orig_mod", model)
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimizers = [o.state_dict() for o in fit.optimizers]
    return model, Outcome(state, model.diary.losses, optimizers, torch.get_rng_state(), fit.global_step)


def compare(style: Style, folder: Path, **settings: Any) -> tuple[Any, SpeedLimit, list[str]]:
    """The module trained with the callback, the callback, and in what that training differs from one without."""
    _, without = train(style, folder / "without", None)
    callback = quiet(**settings)
    model, with_it = train(style, folder / "with", callback)
    return model, callback, with_it.differs_from(without)


def disagreements(style: Style, model: Any, callback: SpeedLimit) -> dict[str, tuple[float, float]]:
    """name → (measured, plain sums), of what does not agree."""
    got, wanted = last_row(callback), sums(model.diary, style.optimizers)
    spare = style.rel * abs(wanted["work_ito"])
    found = {}
    for name in style.agreeing:
        free = spare if name.startswith("work") else style.rel * model.diary.losses[0] if name == "loss_drop" else 0.0
        if not math.isclose(got[name], wanted[name], rel_tol=style.rel, abs_tol=free):  # NaN is close to nothing
            found[name] = got[name], wanted[name]
    return found
