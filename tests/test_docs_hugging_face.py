"""The page about Hugging Face's Trainer, run in a stand-in for it.

The stand-in calls the events with the documented arguments in the documented order: `training_step` for each batch of a
step, clipping, `on_pre_optimizer_step`, the optimizer, `on_step_end`, and `on_log` on log steps.
"""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_speedlimit import RunRecord, TrajectoryMeter

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "hugging-face.md"
STEPS, ACCUMULATED, CLIP_AT = 12, 2, 0.5


class TrainerCallback:
    """Events that are sent, and answered by nothing."""

    def __getattr__(self, event: str) -> Any:
        if not event.startswith("on_"):
            raise AttributeError(event)
        return lambda args, state, control, **kwargs: None


class Trainer:
    """What of the Trainer the page rests on."""

    def __init__(self, model: nn.Module, batches: list[tuple[Tensor, Tensor]], make_optimizer: Any) -> None:
        self.model, self.batches, self.callbacks = model, batches, []
        self.optimizer = make_optimizer(model.parameters())
        self.args = SimpleNamespace(gradient_accumulation_steps=ACCUMULATED, max_grad_norm=CLIP_AT, logging_steps=5)
        self.state = SimpleNamespace(global_step=0, is_world_process_zero=True)

    def add_callback(self, callback: Any) -> None:
        self.callbacks.append(callback)

    def send(self, event: str, **more: Any) -> None:
        kwargs = {"model": self.model, "optimizer": self.optimizer, "lr_scheduler": None, "train_dataloader": None}
        for callback in self.callbacks:
            getattr(callback, event)(self.args, self.state, SimpleNamespace(), **kwargs, **more)

    def training_step(self, model: nn.Module, inputs: tuple[Tensor, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """Backward of this batch's part of the step's loss, which it returns."""
        loss = nn.functional.mse_loss(model(inputs[0]), inputs[1]) / self.args.gradient_accumulation_steps
        loss.backward()
        return loss.detach()

    def train(self) -> None:
        self.send("on_train_begin")
        for first in range(0, len(self.batches), ACCUMULATED):
            self.send("on_step_begin")
            for inputs in self.batches[first : first + ACCUMULATED]:
                self.training_step(self.model, inputs, num_items_in_batch=None)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
            self.send("on_pre_optimizer_step")
            self.optimizer.step()
            self.send("on_optimizer_step")
            self.optimizer.zero_grad()
            self.state.global_step += 1
            self.send("on_step_end")
            if self.state.global_step % self.args.logging_steps == 0:
                self.send("on_log", logs={"loss": 0.0})
        self.send("on_train_end")


def problem() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    batches = [(torch.randn(8, 4).double(), torch.randn(8, 1).double()) for _ in range(STEPS * ACCUMULATED)]
    return model, batches


def make_optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02)


def measured_plainly() -> dict[str, float]:
    """The same training as a loop, with the meter as its own page shows it."""
    model, batches = problem()
    optimizer = make_optimizer(model.parameters())
    meter = TrajectoryMeter(optimizer)
    for first in range(0, len(batches), ACCUMULATED):
        losses = [nn.functional.mse_loss(model(x), y) for x, y in batches[first : first + ACCUMULATED]]
        (sum(losses) / ACCUMULATED).backward()
        for loss in losses:
            meter.record_loss(loss)
        meter.observe_gradients()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_AT)
        optimizer.step()
        optimizer.zero_grad()
    return meter.compute()


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the page's code defines, with the stand-in in place of `transformers`."""
    stand_in = ModuleType("transformers")
    stand_in.Trainer, stand_in.TrainerCallback = Trainer, TrainerCallback  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", stand_in)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {"__name__": "page"}
    for code in blocks:
        exec(compile(code, "page", "exec"), names)
    return names


def test_it_measures_what_a_plain_loop_measures(page: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    model, batches = problem()
    trainer = page["MeasuredTrainer"](
        model, batches, make_optimizer, speed_limit=page["SpeedLimitCallback"](tmp_path / "record")
    )
    trainer.train()
    record = RunRecord.load(tmp_path / "record")
    assert record.columns["step"].tolist() == [5, 10, 12]
    wanted = measured_plainly()
    for name, column in record.columns.items():
        if name in wanted:
            # Sums of the same float64 numbers, in another order where gradients accumulate.
            assert column[-1] == pytest.approx(wanted[name], rel=1e-9, nan_ok=True), name
    assert record.columns["grad_norm"][-1] > record.columns["grad_norm_clipped"][-1]  # clipping was at work
    assert "kinematic efficiency" in capsys.readouterr().out


def test_without_the_event_before_the_step_the_loss_is_missed(page: dict[str, Any]) -> None:
    model, batches = problem()
    trainer = page["MeasuredTrainer"](model, batches, make_optimizer)
    trainer.speed_limit.on_pre_optimizer_step = lambda *args, **kwargs: None
    trainer.train()
    record = trainer.speed_limit.record
    assert math.isnan(record.columns["loss_drop"][-1])
    assert "loss" in record.reasons["loss_drop"]


def test_without_its_override_the_work_would_be_another(page: dict[str, Any]) -> None:
    """Why the page asks for more than a callback: no event is sent before the Trainer clips."""
    model, batches = problem()
    trainer = page["MeasuredTrainer"](model, batches, make_optimizer)
    trainer.speed_limit.after_backward = lambda loss: None
    trainer.train()
    clipped = trainer.speed_limit.record.columns["work_ito"][-1]
    assert clipped < 0.9 * measured_plainly()["work_ito"]
