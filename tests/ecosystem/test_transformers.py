"""SpeedLimitCallback in the real Trainer, on a GPT-2 of one layer, against copies of its weights and gradients."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizer_cases import EXACT, KINEMATIC, WORKS, Copies
from torch import Tensor

transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402 - comes with transformers
from trainer_cases import (  # noqa: E402
    BATCH,
    LENGTH,
    STEPS,
    Witness,
    Witnessed,
    arguments,
    assert_right,
    model,
    texts,
    trained,
)
from transformers import TrainerCallback  # noqa: E402

from lightning_speedlimit import RunRecord, compare  # noqa: E402
from lightning_speedlimit.integrations.transformers import LOGGED, SpeedLimitCallback  # noqa: E402

MEASURED = pytest.mark.mode("Hugging Face Trainer, SpeedLimitCallback", "measured")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries under test


@MEASURED
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adamw_torch_fused", "adafactor"])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_what_a_trainer_did(tmp_path: Path, optim: str, clip: float) -> None:
    trainer = trained(tmp_path, optim=optim, max_grad_norm=clip)
    assert not trainer.args.weight_decay
    record = assert_right(trainer)
    assert record.columns["step"].tolist() == [4, 8, 12]
    assert record.columns["samples"].tolist() == [16, 32, 48]
    assert record.columns["tokens"].tolist() == [128, 256, 384]
    assert record.columns["grad_norm"][-1] == pytest.approx(float(trainer.witness.copies.raw[-1].norm()), rel=EXACT)
    if clip:
        assert record.columns["grad_norm_clipped"][-1] == pytest.approx(clip, rel=1e-5)  # torch adds 1e-6 to the norm


@MEASURED
def test_the_saved_parameters_say_the_same(tmp_path: Path) -> None:
    """From the checkpoints of each step alone."""
    network = model()
    saved = [{n: p.detach().clone() for n, p in network.state_dict().items()}]
    trainer = trained(tmp_path, network=network, save_strategy="steps", save_steps=1)
    saved += [load_file(tmp_path / f"checkpoint-{k}" / "model.safetensors") for k in range(1, STEPS + 1)]
    names = saved[-1].keys()

    def squared(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
        return math.fsum(float((one[n] - other[n]).square().sum()) for n in names)

    columns = trainer.measured.record.columns
    action = math.fsum(squared(a, b) for a, b in pairwise(saved))
    assert columns["displacement"][-1] == pytest.approx(math.sqrt(squared(saved[0], saved[-1])), rel=EXACT)
    assert columns["action"][-1] == pytest.approx(action, rel=EXACT)
    assert columns["moved_outside"][-1] == 0


@MEASURED
@pytest.mark.parametrize("accumulated", [1, 3])
def test_the_loss_is_that_of_the_steps(tmp_path: Path, accumulated: int) -> None:
    """16 batches an epoch: the last step of each has one batch of three."""
    more = {"gradient_accumulation_steps": accumulated, "callback": {"loss_window": 2}}
    trainer = trained(tmp_path, per_device_train_batch_size=4, **more)
    record, losses = assert_right(trainer), trainer.witness.losses
    assert len(losses) == STEPS
    first, last = 1.5 * losses[0] - 0.5 * losses[1], 2 * losses[-1] - losses[-2]
    assert record.columns["loss_drop"][-1] == pytest.approx(losses[0] - last, rel=1e-6)
    assert first != last


@MEASURED
@pytest.mark.parametrize(
    ("more", "size", "count", "pool"),
    [
        ({}, BATCH, 16, 64),
        ({"per_device_train_batch_size": 5}, 5, 13, 64),
        ({"per_device_train_batch_size": 5, "dataloader_drop_last": True}, 5, None, 64),
        ({"per_device_train_batch_size": 64}, 64, 1, 64),
    ],
)
def test_what_a_run_tells_of_its_data(tmp_path: Path, more: dict[str, Any], size: int, count: int, pool: int) -> None:
    run = trained(tmp_path, max_steps=4, **more).measured.record.run
    assert (run["batch_size"], run["batches_per_epoch"], run["samples_without_replacement"]) == (size, count, pool)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_the_training_is_bitwise_the_same(tmp_path: Path, optim: str) -> None:
    with_it = trained(tmp_path / "with", optim=optim)
    without = trained(tmp_path / "without", optim=optim, measured=False)
    assert torch.equal(with_it.witness.copies.weights(), without.witness.copies.weights())
    assert with_it.witness.losses == without.witness.losses


PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "hugging-face.md"


def test_the_page_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(code, "page", "exec"), {"model": model(), "arguments": arguments(tmp_path), "data": texts()})
    assert "kinematic efficiency" in capsys.readouterr().out
    assert len(RunRecord.load(tmp_path / "speed_limit")) == 3


@MEASURED
def test_what_it_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = trained(tmp_path)
    rows = {entry["step"]: entry for entry in trainer.state.log_history if "speed_limit/straightness" in entry}
    columns = trainer.measured.record.columns
    assert sorted(rows) == [4, 8, 12]
    for place, step in enumerate(rows):
        for name in LOGGED:
            value = columns[name][place]
            assert rows[step].get(f"speed_limit/{name}", math.nan) == pytest.approx(value, nan_ok=True), name
    assert sum("loss" in entry for entry in trainer.state.log_history) == 3


def test_what_reports_show(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    os.environ["TENSORBOARD_LOGGING_DIR"] = folder = str(tmp_path / "events")  # of transformers 5
    try:
        more = {"logging_dir": folder} if transformers.__version__.startswith("4") else {}
        trainer = trained(tmp_path, report_to="tensorboard", **more)
    finally:
        del os.environ["TENSORBOARD_LOGGING_DIR"]
    events = event_accumulator.EventAccumulator(folder)
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/speed_limit/straightness")]
    columns = trainer.measured.record.columns
    assert [step for step, _ in shown] == [4, 8, 12]
    assert [value for _, value in shown] == pytest.approx(columns["straightness"].tolist(), rel=1e-6)


def test_the_record_is_beside_the_checkpoints_and_can_be_compared(tmp_path: Path) -> None:
    records = []
    for optim in ("adamw_torch", "sgd"):
        trainer = trained(tmp_path / optim, optim=optim)
        records.append(RunRecord.load(tmp_path / optim / "speed_limit"))
        for name, column in trainer.measured.record.columns.items():
            assert records[-1].columns[name].tolist() == pytest.approx(column.tolist(), nan_ok=True)
    run = records[0].run
    assert (run["model"], run["batch_size"], run["gradient_clip_val"]) == ("GPT2LMHeadModel", BATCH, 1.0)
    assert (run["samples_per_step"], run["tokens_per_step"]) == (BATCH, BATCH * LENGTH)
    assert run["versions"]["transformers"] == transformers.__version__
    assert "AdamW" in str(compare(records, by="step"))


@MEASURED
@pytest.mark.parametrize("strategy", ["evaluation", "best at the end"])
def test_evaluations_and_the_best_model_leave_the_displacement(tmp_path: Path, strategy: str) -> None:
    more: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 5}
    if strategy == "best at the end":
        more |= {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
        more |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}  # the first of the checkpoints
    trainer = trained(tmp_path, **more)
    record = assert_right(trainer)
    assert record.columns["step"].tolist() == [5, 10, 12]
    there = trainer.witness.copies
    assert torch.equal(there.weights(), there.after[-1]) == (strategy == "evaluation")
    assert record.columns["moved_outside"][-1] == 0  # what is loaded after the last step is no part of the run
    assert record.columns["net_displacement"][-1] == pytest.approx(there.values()["displacement"], rel=EXACT)


@pytest.mark.mode("Hugging Face Trainer with schedulefree, averaged weights in evaluations", "measured")
@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"])
def test_averaged_weights_in_evaluations(tmp_path: Path, name: str) -> None:
    """The Trainer calls the optimizer's eval() before an evaluation and train() before the next step."""
    make = getattr(pytest.importorskip("schedulefree"), name)
    more = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3, "logging_steps": 5}
    trainer = trained(tmp_path, optimizers=lambda p: make(p, lr=0.05), **more)
    record, there = assert_right(trainer), trainer.witness.copies
    assert record.columns["step"].tolist() == [5, 10, 12]
    assert not torch.equal(there.weights(), there.after[-1])  # the averages, since the last evaluation
    assert record.columns["moved_outside"][-1] <= 1e-12 * record.columns["path_length"][-1]


@MEASURED
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_other_precisions(tmp_path: Path, precision: str) -> None:
    trainer = trained(tmp_path, network=model(dtype=torch.float32), bf16=precision == "bf16-mixed")
    # float32 parameters keep 6e-8 of themselves, of which an update of a hundredth is known to 1e-5.
    assert assert_right(trainer, rel=1e-5).run["precision"] == precision


RESUMED = pytest.mark.mode("Hugging Face Trainer, resume_from_checkpoint", "measured")


@RESUMED
@pytest.mark.parametrize("given", ["the last", "a path"])
def test_a_resumed_run_is_measured_as_one(tmp_path: Path, given: str) -> None:
    more = {"save_strategy": "steps", "save_steps": 6, "logging_steps": 3}
    whole = trained(tmp_path / "whole", **more)
    folder = tmp_path / "parts"
    first = trained(folder, **{**more, "callback": {}})
    wanted = torch.load(folder / "checkpoint-6" / "speed_limit.pt", weights_only=True)
    assert wanted["costs"]["samples"] == 6 * BATCH
    assert wanted["record"]["arrays"]["step"].tolist() == [3, 6]
    assert RunRecord.load(folder).columns["step"].tolist()[-1] == 12, "the checkpoints hold no records of their own"
    for later in folder.glob("checkpoint-12*"):
        later.rename(tmp_path / "away")
    second = trained(folder, resume=True if given == "the last" else str(folder / "checkpoint-6"), **more)
    assert len(second.witness.copies.raw) == 6
    assert torch.equal(second.witness.copies.weights(), whole.witness.copies.weights())
    one, other = whole.measured.record.columns, second.measured.record.columns
    assert other["step"].tolist() == one["step"].tolist()
    for name in (*KINEMATIC, *WORKS, "loss_drop", "efficiency", "samples", "tokens", "epochs"):
        assert other[name][-1] == pytest.approx(one[name][-1], rel=EXACT, nan_ok=True), name
    assert first.measured.record is not second.measured.record


@pytest.mark.mode(
    "Hugging Face Trainer, resumed from a checkpoint without the measurement",
    "caveat",
    "`SpeedLimitCallback starts anew at step …`, with the reason; `record.run['since_step']` tells",
)
@pytest.mark.parametrize("harm", ["gone", "damaged", "of another setting"])
def test_resumed_without_a_measurement(tmp_path: Path, harm: str) -> None:
    more = {"save_strategy": "steps", "save_steps": 6}
    trained(tmp_path, measured=harm != "gone", **more)
    if harm == "damaged":
        (tmp_path / "checkpoint-6" / "speed_limit.pt").write_bytes(b"no archive")
    settings = {"clock": "lr"} if harm == "of another setting" else {}
    with pytest.warns(UserWarning, match="starts anew at step 6: no measurement to go on with in .*checkpoint-6"):
        trainer = trained(tmp_path, resume=str(tmp_path / "checkpoint-6"), callback=settings, **more)
    record = trainer.measured.record
    assert record.run["since_step"] == 6
    if harm != "of another setting":
        assert_right(trainer)
    assert record.columns["elapsed"][-1] == (6 if harm != "of another setting" else pytest.approx(0.01 * 21 / 12, 1e-6))


@pytest.mark.mode(
    "Hugging Face Trainer, an optimizer without step hooks", "refused", "SpeedLimitCallback measures nothing"
)
def test_an_optimizer_that_is_none(tmp_path: Path) -> None:
    class Bare(torch.optim.SGD):
        def __init__(self, parameters: Any) -> None:
            self.inner = torch.optim.SGD(parameters, lr=0.1)
            self.param_groups, self.state = self.inner.param_groups, self.inner.state
            self.defaults = self.inner.defaults

        def step(self, closure: Any = None) -> Any:
            return self.inner.step(closure)

        def state_dict(self) -> Any:
            return self.inner.state_dict()

        def load_state_dict(self, state: Any) -> None:
            self.inner.load_state_dict(state)

    with pytest.warns(UserWarning, match=r"measures nothing in this run: Bare has step hooks that never fire"):
        trainer = trained(tmp_path, optimizers=Bare)
    assert trainer.measured.record is None
    assert trainer.state.global_step == STEPS


def test_a_fault_of_the_measurement_leaves_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without = trained(tmp_path / "without", measured=False)

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("lost")

    monkeypatch.setattr(RunRecord, "take", broken)
    with pytest.warns(UserWarning, match="the measurement stopped at step 4: RuntimeError: lost"):
        trainer = trained(tmp_path / "with")
    assert torch.equal(trainer.witness.copies.weights(), without.witness.copies.weights())


def test_settings_are_checked_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="clock got 'hours'"):
        trained(tmp_path, callback={"clock": "hours"})
    with pytest.raises(TypeError, match="colour"):
        trained(tmp_path, callback={"colour": "red"})


def test_two_trainings_of_one_trainer(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    first = trainer.measured.record
    trainer.witness.copies, trainer.witness.losses = Copies(trainer.model.parameters()), []
    trainer.train()
    assert trainer.measured.record is not first
    assert_right(trainer)


def test_an_interrupted_training_leaves_its_rows(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 10:
                raise KeyboardInterrupt

    network = model()
    trainer = Witnessed(network, arguments(tmp_path), train_dataset=texts())
    trainer.witness, measured = Witness(network), SpeedLimitCallback(trainer, print_summary=False)
    for callback in (trainer.witness, measured, Stop()):
        trainer.add_callback(callback)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert RunRecord.load(tmp_path / "speed_limit").columns["step"].tolist()[0] == 4
    trainer.remove_callback(Stop)
    trainer.witness.copies = Copies(network.parameters())
    trainer.measured = measured
    trainer.train()
    assert_right(trainer)


@pytest.mark.mode("Hugging Face Trainer, two processes (DDP)", "measured")
def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = Path(__file__).parent / "trainer_ranks.py"
    done = subprocess.run([*command, str(script), str(tmp_path / "two")], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    two = RunRecord.load(tmp_path / "two" / "speed_limit")
    one = trained(tmp_path / "one", network=model(dropout=0.0)).measured.record
    for name in (*KINEMATIC, *WORKS, "samples", "tokens"):
        assert two.columns[name].tolist() == pytest.approx(one.columns[name].tolist(), rel=1e-8), name
    drops = two.columns["loss_drop"].tolist()
    assert drops == pytest.approx(one.columns["loss_drop"].tolist(), abs=1e-6)  # of losses of 3.5 in float32
    assert two.run["world_size"] == 2
