"""SpeedLimitCallback in a stand-in for the Trainer, where transformers is not installed.

The stand-in does what the callback rests on, in the Trainer's order. That the Trainer does so too is shown with the
real library: `make test-ecosystem`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_speedlimit import RunRecord, TrajectoryMeter
from lightning_speedlimit.record.folders import records_within
from lightning_speedlimit.record.keeper import RecordKeeper

NAME = "lightning_speedlimit.integrations.transformers"
STEPS, ACCUMULATED, CLIP_AT, ROWS = 12, 2, 0.5, 8


class TrainerCallback:
    """Events that are sent, and answered by nothing."""

    def __getattr__(self, event: str) -> Any:
        if not event.startswith("on_"):
            raise AttributeError(event)
        return lambda args, state, control, **kwargs: None


class Trainer:
    """`skipped`: steps that a loss scaler leaves out."""

    is_deepspeed_enabled = False
    saved_at: tuple[int, ...] = ()  # besides the end
    loader: Any = None  # that the batches come from, as events have it

    def __init__(self, folder: Path, skipped: tuple[int, ...] = ()) -> None:
        self.model, self.batches = problem()
        self.optimizer, self.skipped = torch.optim.AdamW(self.model.parameters(), lr=0.02), skipped
        self.callbacks: list[Any] = []
        self.args = SimpleNamespace(
            world_size=1,
            should_save=True,
            output_dir=str(folder),
            train_batch_size=ROWS,
            gradient_accumulation_steps=ACCUMULATED,
            max_grad_norm=CLIP_AT,
            bf16=False,
            fp16=False,
            lr_scheduler_type="constant",
        )
        self.state = SimpleNamespace(global_step=0, epoch=0.0, is_world_process_zero=True)
        self.accelerator = SimpleNamespace(sync_gradients=True, unwrap_model=lambda model: model)
        self.logged: list[dict[str, float]] = []

    def send(self, event: str, **more: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self.args, self.state, SimpleNamespace(), train_dataloader=self.loader, **more)

    def log(self, logs: dict[str, float]) -> None:
        self.logged.append(logs)
        self.send("on_log", logs=logs)

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """Backward of this batch's part of the step's loss, which it returns."""
        loss = nn.functional.mse_loss(model(inputs["x"]), inputs["y"]) / ACCUMULATED
        loss.backward()
        return loss.detach()

    def train(self, *, first: int = 0, interrupted_at: int = STEPS) -> None:
        self.state.global_step = first
        self.send("on_train_begin")
        for step in range(first, interrupted_at):
            for number in range(ACCUMULATED):
                self.accelerator.sync_gradients = number == ACCUMULATED - 1
                self.training_step(self.model, self.batches[step * ACCUMULATED + number], num_items_in_batch=None)
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_AT)
            if step not in self.skipped:
                self.optimizer.step()
            self.optimizer.zero_grad()
            self.state.global_step, self.state.epoch = step + 1, (step + 1) / STEPS
            self.send("on_step_end")
            if (step + 1) % 5 == 0:
                self.log({"loss": 0.0})
            if step + 1 in (*self.saved_at, interrupted_at):
                (Path(self.args.output_dir) / f"checkpoint-{step + 1}").mkdir(parents=True)
                self.send("on_save")
        if interrupted_at == STEPS:
            self.send("on_train_end")


def problem() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    batches = [{"x": torch.randn(ROWS, 4).double(), "y": torch.randn(ROWS, 1).double()} for _ in range(24)]
    return model, batches


def measured_plainly(skipped: tuple[int, ...] = ()) -> dict[str, float]:
    """The same training as a loop, with the meter as its own page shows it."""
    model, batches = problem()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    meter = TrajectoryMeter(optimizer)
    for step in range(STEPS):
        parts = batches[step * ACCUMULATED : (step + 1) * ACCUMULATED]
        losses = [nn.functional.mse_loss(model(part["x"]), part["y"]) for part in parts]
        (sum(losses) / ACCUMULATED).backward()
        if step not in skipped:
            for loss in losses:
                meter.record_loss(loss)
            meter.observe_gradients()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP_AT)
            optimizer.step()
        optimizer.zero_grad()
    return meter.compute()


@pytest.fixture
def callback(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The class, with stand-ins in place of `transformers` and `accelerate`."""

    def stand_in(name: str, **names: Any) -> None:
        module = ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)

    stand_in("transformers", TrainerCallback=TrainerCallback, __version__="0")
    stand_in("transformers.trainer_utils", PREFIX_CHECKPOINT_DIR="checkpoint")
    stand_in("accelerate")
    stand_in("accelerate.utils", find_batch_size=lambda inputs: len(inputs["x"]))
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME).SpeedLimitCallback
    del sys.modules[NAME]


def trained(callback: Any, folder: Path, skipped: tuple[int, ...] = (), **settings: Any) -> Any:
    trainer = Trainer(folder, skipped)
    trainer.callbacks.append(callback(trainer, **settings))
    trainer.train()
    return trainer


@pytest.mark.parametrize("skipped", [(), (3,), (0, 4, 11)])
def test_it_measures_what_a_plain_loop_measures(
    callback: Any, tmp_path: Path, capsys: Any, skipped: tuple[int, ...]
) -> None:
    trained(callback, tmp_path, skipped)
    record, wanted = RunRecord.load(tmp_path / "speed_limit"), measured_plainly(skipped)
    assert record.run["ended"] == "finished"
    assert record.columns["step"][-1] == STEPS - len(skipped)
    for name, column in record.columns.items():
        if name in wanted:
            # Sums of the same float64 numbers, in another order where gradients accumulate.
            assert column[-1] == pytest.approx(wanted[name], rel=1e-9, nan_ok=True), name
    assert record.columns["grad_norm"][-1] > record.columns["grad_norm_clipped"][-1]  # clipping was at work
    assert record.columns["samples"][-1] == STEPS * ACCUMULATED * ROWS
    out = capsys.readouterr().out
    assert "kinematic efficiency" in out
    assert f"Record: {tmp_path / 'speed_limit'}\nMore: speedlimit advise " in out


def test_what_the_loader_tells_of_its_data(callback: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what the arguments say of a batch, and nothing more."""
    plain = trained(callback, tmp_path / "plain", print_summary=False).callbacks[0].record.run
    assert (plain["batch_size"], plain["batches_per_epoch"], plain["samples_without_replacement"]) == (ROWS, None, None)
    data = torch.utils.data.TensorDataset(torch.zeros(6 * 24))
    monkeypatch.setattr(Trainer, "loader", torch.utils.data.DataLoader(data, batch_size=6, shuffle=True))
    run = trained(callback, tmp_path / "told", print_summary=False).callbacks[0].record.run
    assert (run["batch_size"], run["batches_per_epoch"], run["samples_without_replacement"]) == (6, 24, 6 * 24)


def test_a_resumed_run_goes_on(callback: Any, tmp_path: Path) -> None:
    whole, parts = trained(callback, tmp_path / "whole"), Trainer(tmp_path / "parts")
    parts.callbacks.append(callback(parts, print_summary=False))
    parts.train(interrupted_at=7)
    parts.train(first=7)
    one, other = (t.callbacks[0].record.columns for t in (whole, parts))
    assert other["step"].tolist() == one["step"].tolist() == [5, 10, 12]
    for name in ("displacement", "action", "work_ito", "efficiency", "loss_drop", "samples"):
        assert other[name].tolist() == pytest.approx(one[name].tolist(), rel=1e-9, nan_ok=True), name


def test_checkpoints_do_not_count_as_runs(callback: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "saved_at", (6, 9))
    for name in ("a", "b"):
        trained(callback, tmp_path / name, print_summary=False)
        assert len(list((tmp_path / name).glob("checkpoint-*/speed_limit.pt"))) == 3
        assert len(RunRecord.load(tmp_path / name)) == 3
    assert records_within(tmp_path) == [tmp_path / name / "speed_limit" for name in ("a", "b")]


@pytest.mark.parametrize("harm", ["no file", "another one's record", "of other parameters"])
def test_a_checkpoint_that_can_not_be_gone_on_with(callback: Any, tmp_path: Path, harm: str) -> None:
    first = Trainer(tmp_path)
    first.callbacks.append(callback(first, print_summary=False))
    first.train(interrupted_at=7)
    first.callbacks[0]._end()  # its process is over
    path = tmp_path / "checkpoint-7" / "speed_limit.pt"
    state = torch.load(path, weights_only=True)
    if harm == "no file":
        path.unlink()
    else:
        part = {"another one's record": {"record": {"run": {}}}, "of other parameters": {"meter": {}}}[harm]
        torch.save(state | part, path)
    second = Trainer(tmp_path)
    second.callbacks.append(callback(second, print_summary=False))
    with pytest.warns(UserWarning, match="starts anew at step 7: no measurement to go on with in .*checkpoint-7"):
        second.train(first=7)
    record = second.callbacks[0].record
    assert record.run["since_step"] == 7
    assert record.columns["step"].tolist() == [3, 5]


def test_it_logs_what_is_asked_for(callback: Any, tmp_path: Path) -> None:
    trainer = trained(callback, tmp_path, logged=("straightness", "efficiency_low", "none of these"))
    ours = [logs for logs in trainer.logged if "loss" not in logs]
    straightness = trainer.callbacks[0].record.columns["straightness"].tolist()
    assert [logs["speed_limit/straightness"] for logs in ours] == straightness[:2]
    assert all(logs.keys() <= {"speed_limit/straightness", "speed_limit/efficiency_low"} for logs in ours)


@pytest.mark.parametrize(
    ("trainer", "more", "message"),
    [
        (nn.Linear(1, 1), {}, r"trainer got Linear\(.*, wanted the Trainer that the callback is added to"),
        (None, {"logged": "efficiency"}, r"logged got 'efficiency', wanted names of columns"),
        (None, {"logged": ["efficiency", 3]}, "logged got 3, wanted text"),
        (None, {"print_summary": "no"}, "print_summary got 'no', wanted True or False"),
    ],
)
def test_bad_arguments(callback: Any, tmp_path: Path, trainer: Any, more: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        callback(trainer or Trainer(tmp_path), **more)


def test_a_fault_leaves_the_training(callback: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunRecord, "take", lambda *args: 1 / 0)
    with pytest.warns(UserWarning, match="the measurement stopped at step 5: ZeroDivisionError"):
        trainer = trained(callback, tmp_path)
    assert trainer.state.global_step == STEPS


def test_deepspeed_is_not_measured(callback: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "is_deepspeed_enabled", True)
    with pytest.warns(UserWarning, match="measures nothing in this run: DeepSpeed keeps"):
        trainer = trained(callback, tmp_path)
    assert trainer.callbacks[0].record is None


def test_a_folder_that_cannot_be_written(callback: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And no folder is named where there is no record."""
    (tmp_path / "speed_limit").write_text("a file")
    with pytest.warns(UserWarning, match="could not save its record in .*stays in callback.record"):
        trainer = trained(callback, tmp_path)
    assert len(trainer.callbacks[0].record) == 3
    printed = capsys.readouterr().out
    assert "Speed limit of a training run" in printed
    assert "Record: " not in printed


def test_the_folder_of_another_training_is_left_to_it(callback: Any, tmp_path: Path) -> None:
    """The record lies beside it, and that is said once, with both folders."""
    other, record = RecordKeeper(tmp_path / "speed_limit"), RunRecord()
    record.append(1, {"loss": 1.0})
    other.write(record)
    with pytest.warns(UserWarning, match="keeps its record in") as found:
        trained(callback, tmp_path, print_summary=False)
    told = [str(one.message) for one in found if "keeps its record in" in str(one.message)]
    here = tmp_path / "speed_limit"
    assert len(told) == 1
    assert f"keeps its record in {here}-2: another training, which is not over, writes in {here}." in told[0]
    assert "Give each its own output_dir" in told[0]
    assert (len(RunRecord.load(here)), len(RunRecord.load(tmp_path / "speed_limit-2"))) == (1, 3)
    other.release()
