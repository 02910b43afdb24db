"""Adding the callback changes no number of the training: weights and losses are bitwise the same."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torchmetrics
from callback_cases import Batch, MakeOptimizer, batches, flat, loader, quiet, sgd, trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_speedlimit import SpeedLimit

STEPS = 50


class Everything(pl.LightningModule):
    """Dropout, BatchNorm, a buffer that is replaced, a torchmetrics metric, logging in every step."""

    def __init__(self, optimizer: MakeOptimizer) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))
        self.error = torchmetrics.MeanSquaredError()
        self.total = torchmetrics.MeanSquaredError()  # `update` changes its states in place, `forward` does not
        self.register_buffer("mean", torch.zeros(()))
        self._optimizer = optimizer
        self.seen: list[Tensor] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, y = batch
        out = self.body(x)
        loss = nn.functional.mse_loss(out, y)
        self.mean = 0.9 * self.mean + 0.1 * out.detach().mean()
        self.error(out, y)
        self.total.update(out, y)
        self.log("error", self.error, on_step=True, on_epoch=True)
        self.log_dict({"train_loss": loss, "noise": torch.rand(())}, on_epoch=True)
        self.seen.append(loss.detach().clone())
        return loss + 0.01 * self.mean

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self.body(batch[0]), batch[1]))

    def configure_optimizers(self) -> Optimizer:
        return self._optimizer(list(self.parameters()))


@dataclass(frozen=True)
class Outcome:
    """All that a training leaves: state, losses (closures that ran more than once too), logged metrics."""

    state: dict[str, Tensor]
    losses: Tensor
    metrics: dict[str, float]
    random: Tensor

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Outcome)
        same = self.state.keys() == other.state.keys()
        same = same and all(torch.equal(value, other.state[name]) for name, value in self.state.items())
        same = same and torch.equal(self.losses, other.losses) and self.metrics == other.metrics
        return same and torch.equal(self.random, other.random)


def run(folder: Path, optimizer: MakeOptimizer, options: dict[str, Any], *callbacks: pl.Callback) -> Outcome:
    model = Everything(optimizer)
    data = batches(10, dtype=torch.float32)
    torch.manual_seed(11)
    fit = trainer(folder, *callbacks, max_steps=STEPS, max_epochs=-1, **({"log_every_n_steps": 7} | options))
    fit.fit(model, loader(data), loader(data[:2]))
    assert fit.global_step == STEPS
    losses = model.seen  # a list that training_step appends to: the probe leaves nothing in it
    metrics = {n: float(v) for n, v in fit.callback_metrics.items() if not n.startswith("speed_limit/")}
    metrics["total"] = float(model.total.compute())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return Outcome(state, torch.stack(losses), metrics, torch.get_rng_state())


OPTIMIZERS: dict[str, MakeOptimizer] = {
    "SGD": sgd(),
    "SGD momentum": sgd(momentum=0.9, weight_decay=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}
CLIP = {"gradient_clip_val": 0.3}
VALUE = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}


@dataclass(frozen=True)
class Case:
    optimizer: str
    options: dict[str, Any] = field(default_factory=dict)
    callback: Callable[[], SpeedLimit] = quiet


CASES = {
    **{name: Case(name) for name in OPTIMIZERS},
    "clipped by norm": Case("Adam", CLIP),
    "clipped by value": Case("SGD momentum", VALUE),
    "accumulated": Case("AdamW", {"accumulate_grad_batches": 3, **CLIP}),
    "validated": Case("SGD", {"val_check_interval": 3}),
    "every step logged": Case("NAdam", {"log_every_n_steps": 1}),
    "sampled": Case("Adam", {}, lambda: quiet(measure_every_n_steps=4)),
    "per layer, lr clock": Case("AdamW", CLIP, lambda: quiet(per_layer=True, clock="lr")),
    "monitored": Case("SGD", {}, lambda: quiet(monitor="train_loss")),
}


@pytest.mark.parametrize("name", CASES)
def test_weights_losses_metrics_and_random_state_are_bitwise_the_same(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    without = run(tmp_path / "a", OPTIMIZERS[case.optimizer], case.options)
    callback = case.callback()
    assert run(tmp_path / "b", OPTIMIZERS[case.optimizer], case.options, callback) == without
    assert callback.record is not None
    assert callback.record.columns["step"][-1] == STEPS  # and it did measure


@pytest.mark.parametrize("options", [{}, CLIP | {"accumulate_grad_batches": 2}, {"val_check_interval": 3}])
@pytest.mark.parametrize("probe", [1, 3])
@pytest.mark.filterwarnings("error:SpeedLimit could not")
def test_a_probe_changes_nothing_either(tmp_path: Path, probe: int, options: dict[str, Any]) -> None:
    without = run(tmp_path / "a", OPTIMIZERS["AdamW"], options)
    callback = quiet(probe_batches=probe)
    assert run(tmp_path / "b", OPTIMIZERS["AdamW"], options, callback) == without
    assert callback.record is not None
    assert "loss_drop" not in callback.record.reasons  # the probe was in use


class Nudge(pl.Callback):
    """What must be noticed: one weight, one unit in the last place, once. (Earlier, later steps may round it away.)"""

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step == STEPS:
            with torch.no_grad():
                weight = module.body[0].weight
                weight[0, 0] = torch.nextafter(weight[0, 0], weight[0, 0] + 1)


class Draw(pl.Callback):
    """A random number drawn for oneself."""

    def on_train_epoch_end(self, *args: Any) -> None:
        torch.rand(())


@pytest.mark.parametrize("intruder", [Nudge, Draw])
def test_the_comparison_can_fail(tmp_path: Path, intruder: type[pl.Callback]) -> None:
    without = run(tmp_path / "a", OPTIMIZERS["SGD"], {})
    assert run(tmp_path / "b", OPTIMIZERS["SGD"], {}) == without
    assert run(tmp_path / "c", OPTIMIZERS["SGD"], {}, intruder()) != without


def test_gradients_are_left_alone(tmp_path: Path) -> None:
    """What on_before_zero_grad finds after a step is the same."""
    found: list[list[Tensor]] = [[], []]

    class Keep(pl.Callback):
        def __init__(self, into: list[Tensor]) -> None:
            self.into = into

        def on_before_zero_grad(self, trainer: Any, module: Any, optimizer: Any) -> None:
            grads = [p.grad for p in module.parameters() if p.grad is not None]
            if grads:
                self.into.append(flat(grads))

    run(tmp_path / "a", OPTIMIZERS["Adam"], CLIP, Keep(found[0]))
    run(tmp_path / "b", OPTIMIZERS["Adam"], CLIP, quiet(), Keep(found[1]))
    assert len(found[0]) >= STEPS - 5  # none is left at the start of an epoch
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
