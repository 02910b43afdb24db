"""Loops of other libraries: Accelerate's, Lightning's with schedulefree, PEFT's adapters in the Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from callback_cases import Regressor, batches, last_row, loader, quiet, trainer
from optimizer_cases import EXACT, KINEMATIC, WORKS, Copies, assert_right
from torch import nn

from lightning_speedlimit import TrajectoryMeter

STEPS, ACCUMULATED, CLIP_AT = 10, 2, 0.3
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries under test


# -- Accelerate -------------------------------------------------------------------------------------------------

PRECISIONS = {"float64": 1e-9, "bf16": 1e-5, "fp16 with a loss scaler": 1e-5}


@pytest.mark.mode("Accelerate, through TrajectoryMeter", "measured")
@pytest.mark.parametrize("given", ["wrapped", "inner"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_loop_of_accelerate(precision: str, given: str) -> None:
    """Accumulated and clipped."""
    accelerate = pytest.importorskip("accelerate")
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # of earlier tests
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=ACCUMULATED, mixed_precision="bf16" if precision == "bf16" else "no"
    )
    dtype = torch.float64 if precision == "float64" else torch.float32
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)
    inner = torch.optim.Adam(network.parameters(), lr=0.02)
    model, optimizer = accelerator.prepare(network, inner)
    scaler = None
    if "scaler" in precision:  # Accelerate itself makes one on GPUs alone
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        optimizer = AcceleratedOptimizer(inner, scaler=scaler)
        accelerator.scaler, accelerator._optimizers = scaler, [optimizer]
    meter = TrajectoryMeter(optimizer if given == "wrapped" else inner)
    copies = Copies(network.parameters())
    for x, y in batches(STEPS * ACCUMULATED, dtype=dtype):
        with accelerator.accumulate(model):
            loss = nn.functional.mse_loss(model(x), y)
            if scaler is None:
                accelerator.backward(loss)
            else:
                scaler.scale(loss / ACCUMULATED).backward()
            meter.record_loss(loss)
            if accelerator.sync_gradients:
                scale = 1.0 if scaler is None else scaler.get_scale()
                copies.raw.append(copies.gradient() / scale)
                meter.observe_gradients(scale=scale)
                if scaler is not None:
                    scaler.unscale_(inner)
                nn.utils.clip_grad_norm_(model.parameters(), CLIP_AT)
                copies.before.append(copies.weights())
            optimizer.step()
            if accelerator.sync_gradients:
                copies.after.append(copies.weights())
            optimizer.zero_grad()
    assert len(copies.after) == STEPS
    values = assert_right(meter, copies, rel=PRECISIONS[precision])
    assert values["grad_norm_clipped"] < 0.9 * values["grad_norm"]
    meter.close()


# -- Lightning with schedulefree --------------------------------------------------------------------------------


class ScheduleFree(Regressor):
    """As schedulefree asks for it: averaged weights in validations and in checkpoints."""

    def __init__(self, make: Any, **more: Any) -> None:
        super().__init__(make, **more)
        self.swaps = 0

    def on_fit_start(self) -> None:
        self.optimizers().train()

    def on_validation_model_eval(self) -> None:
        self.optimizers().eval()
        self.swaps += 1
        super().on_validation_model_eval()

    def on_validation_model_train(self) -> None:
        self.optimizers().train()
        super().on_validation_model_train()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))


@pytest.mark.mode("Lightning with schedulefree, train() and eval() in on_validation_model_eval", "measured")
@pytest.mark.parametrize("name", ["SGDScheduleFree", "AdamWScheduleFree", "RAdamScheduleFree"])
def test_schedulefree_in_lightning(tmp_path: Path, name: str) -> None:
    make = getattr(pytest.importorskip("schedulefree"), name)
    data, callback = batches(12), quiet()
    module = ScheduleFree(lambda parameters: make(parameters, lr=0.05))
    fit = trainer(tmp_path, callback, max_epochs=2, val_check_interval=3, limit_val_batches=2, num_sanity_val_steps=0)
    fit.fit(module, loader(data), loader(data[:2]))
    copies, steps = Copies(module.parameters()), module.tape.steps
    copies.before, copies.after, copies.raw = ([getattr(s, n) for s in steps] for n in ("before", "after", "raw"))
    assert (module.swaps, len(steps)) == (8, 24)
    row, wanted = last_row(callback), copies.values()
    for name in (*KINEMATIC, *WORKS):
        assert row[name] == pytest.approx(wanted[name], rel=EXACT), name
    assert row["moved_outside"] <= 1e-12 * row["path_length"]


# -- PEFT -------------------------------------------------------------------------------------------------------


@pytest.mark.mode("Hugging Face Trainer, LoRA adapters of PEFT", "measured")
@pytest.mark.parametrize("best", [False, True])
def test_adapters(tmp_path: Path, best: bool) -> None:
    peft = pytest.importorskip("peft")
    from trainer_cases import assert_right as assert_trainer_right
    from trainer_cases import model, trained

    config = peft.LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.1, fan_in_fan_out=True)
    network = peft.get_peft_model(model(), config).double()
    more: dict[str, Any] = {}
    if best:
        more = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 3, "eval_steps": 3}
        more |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    fit = trained(tmp_path, network=network, **more)
    record = assert_trainer_right(fit)
    assert record.run["measured_coordinates"] == sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert record.run["model"] == "PeftModel"
    assert record.columns["moved_outside"][-1] == 0
