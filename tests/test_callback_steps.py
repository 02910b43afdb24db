"""Every number of the callback against plain sums over the tape of a Lightning run."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_cases import (
    EXACT,
    Batch,
    Regressor,
    batches,
    last_row,
    loader,
    of,
    plain,
    quiet,
    sgd,
    trainer,
)
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def window_means(losses: list[float], window: int, per_epoch: int) -> list[float]:
    """Losses of accumulation windows: the last one of an epoch may be short."""
    means = []
    for epoch in range(0, len(losses), per_epoch):
        part = losses[epoch : epoch + per_epoch]
        means += [math.fsum(part[i : i + window]) / len(part[i : i + window]) for i in range(0, len(part), window)]
    return means


def agree(got: dict[str, float], wanted: dict[str, float], rel: float = EXACT) -> None:
    for name, value in wanted.items():
        # Works in which both signs meet are exact in parts of work_ito, not of themselves.
        spare = rel * abs(wanted["work_ito"]) if name.startswith(("work", "signal", "loss", "ent")) else 0.0
        assert got[name] == pytest.approx(value, rel=rel, abs=spare, nan_ok=True), name


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 3},
    "clipped by norm": {"gradient_clip_val": 0.4},
    "clipped and accumulated": {"gradient_clip_val": 0.4, "accumulate_grad_batches": 2},
}


@pytest.mark.parametrize("clock", ["steps", "lr"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_row_equals_the_sums_over_the_tape(tmp_path: Path, setting: str, clock: str) -> None:
    options, per_epoch = SETTINGS[setting], 7  # windows of 2 and 3 leave a short last one
    model, callback = Regressor(), quiet(clock=clock)
    trainer(tmp_path, callback, max_epochs=2, **options).fit(model, loader(batches(per_epoch)))

    window = options.get("accumulate_grad_batches", 1)
    losses = window_means(model.tape.losses, window, per_epoch)
    assert len(model.tape.steps) == len(losses) == 2 * -(-per_epoch // window)
    assert callback.record is not None
    columns = callback.record.columns
    assert columns["step"].tolist() == list(range(1, len(losses) + 1))
    for row in range(1, len(losses)):
        got = {name: float(column[row]) for name, column in columns.items()}
        agree(got, plain(model.tape.steps[: row + 1], losses[: row + 1], clock=clock))


def test_clipping_by_norm_works_with_the_unclipped_gradients(tmp_path: Path) -> None:
    model, callback = Regressor(), quiet()
    trainer(tmp_path, callback, gradient_clip_val=0.2).fit(model, loader(batches(8)))
    got, steps = last_row(callback), model.tape.steps
    assert got["grad_norm"] > 2 * got["grad_norm_clipped"]  # it did clip
    assert got["grad_norm_clipped"] == pytest.approx(0.2, rel=1e-5)  # torch divides by ‖g‖ + 1e-6
    clipped_work = -math.fsum(float(s.used @ s.update) for s in steps)
    drop = 2 * model.tape.losses[-1] - model.tape.losses[-2]
    assert got["conversion"] == pytest.approx((model.tape.losses[0] - drop) / got["work_ito"], rel=EXACT)
    assert got["work_ito"] > 2 * clipped_work  # what a meter would say that saw the clipped gradients


def test_clipping_by_value_keeps_the_raw_gradients(tmp_path: Path) -> None:
    model, callback = Regressor(), quiet()
    run = trainer(tmp_path, callback, gradient_clip_val=0.1, gradient_clip_algorithm="value")
    run.fit(model, loader(batches(1) * 8))
    got, wanted = last_row(callback), plain(model.tape.steps, model.tape.losses)
    # No scalar c: the mobility is the effective one, Σ‖u‖²/work_ito, so these are not the plain ones.
    ito, drop = wanted["work_ito"], wanted["loss_drop"]
    wanted["efficiency_action"] = wanted["kinematic_efficiency"]
    wanted["efficiency"] = wanted["kinematic_efficiency"] * ito / drop
    wanted["work_action"] = ito
    agree(got, wanted)
    by_factor = math.fsum(-float(s.used @ s.update) * float(s.raw.norm() / s.used.norm()) for s in model.tape.steps)
    assert abs(by_factor / ito - 1) > 0.01  # the guard can fail: one factor per step would show


# --- learning rates


def warm_up(optimizer: Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda k: min(1.0, k / 4))


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_the_lr_clock_adds_the_rates_that_were_used(tmp_path: Path, interval: str) -> None:
    model, callback = Regressor(schedule=warm_up, interval=interval), quiet(clock="lr")
    trainer(tmp_path, callback, max_epochs=3).fit(model, loader(batches(4)))
    factors = [min(1.0, (k if interval == "step" else k // 4) / 4) for k in range(12)]
    got = last_row(callback)
    assert factors[0] == 0.0  # a warm-up from 0: 0/0 in the action counts 0
    assert got["elapsed"] == pytest.approx(0.05 * math.fsum(factors), rel=EXACT)
    assert got["learning_rate"] == pytest.approx(0.05 * factors[-1], rel=EXACT)
    agree(got, plain(model.tape.steps, model.tape.losses, clock="lr"))


@pytest.mark.mode("several learning rates with clock='lr'", "caveat", "what is divided by τ is NaN")
def test_two_learning_rates_leave_the_lr_clock_undefined(tmp_path: Path) -> None:
    def two_groups(parameters: list[nn.Parameter]) -> Optimizer:
        return torch.optim.SGD([{"params": parameters[:2], "lr": 0.1}, {"params": parameters[2:], "lr": 0.02}])

    model, callback = Regressor(two_groups), quiet(clock="lr")
    trainer(tmp_path, callback).fit(model, loader(batches(1) * 8))
    got, steps = last_row(callback), model.tape.steps
    assert callback.record is not None
    for name in ("elapsed", "action", "kinematic_efficiency", "steadiness", "speed_limit_time"):
        assert math.isnan(got[name])
        assert "one learning rate for all parameter groups" in callback.record.reasons[name]
    # The weighted limit has no clock: m is the sum of each group's own rates.
    moved, cut = steps[-1].after - steps[0].before, sum(p.numel() for p in list(model.parameters())[:2])
    weighted = float(moved[:cut].square().sum()) / (8 * 0.1) + float(moved[cut:].square().sum()) / (8 * 0.02)
    drop = plain(steps, model.tape.losses)["loss_drop"]
    assert got["efficiency"] == pytest.approx(weighted / drop, rel=EXACT)


# --- manual optimization


class Pair(Regressor):
    """Two optimizers, first.* and second.*, stepped in turn; `style` is how a user may write it."""

    def __init__(self, style: str, clip: float | None = None) -> None:
        super().__init__(width=3)
        self.automatic_optimization = False
        self.style, self.clip = style, clip

    def configure_optimizers(self) -> Any:
        follow = self.tape.follow
        return [
            follow(torch.optim.SGD(self.first.parameters(), lr=0.05)),
            follow(torch.optim.SGD(self.second.parameters(), lr=0.05)),
        ]

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        self.tape.batch += 1
        losses = []
        for optimizer in self.optimizers():
            if self.style == "toggled":
                self.toggle_optimizer(optimizer)
            if self.style != "zero after":
                optimizer.zero_grad()
            losses.append(self.loss(batch))
            self.manual_backward(losses[-1])
            if self.clip is not None:
                nn.utils.clip_grad_norm_(of(optimizer.optimizer), self.clip)
            optimizer.step()
            if self.style == "zero after":
                # Both: the backward of the one has left gradients with the other.
                self.zero_grad()
            if self.style == "toggled":
                self.untoggle_optimizer(optimizer)
        self.tape.losses.append(float(losses[0].detach()))
        return losses[0].detach()

    def on_after_backward(self) -> None:
        self.tape.see_gradients(self)


def joint(model: Pair) -> dict[str, float]:
    """Sums over joint steps: the two optimizers' vectors, one after the other."""
    pairs = list(zip(model.tape.steps[0::2], model.tape.steps[1::2], strict=True))
    updates = [torch.cat([a.update, b.update]) for a, b in pairs]
    raw = [torch.cat([a.raw, b.raw]) for a, b in pairs]
    used = [torch.cat([a.used, b.used]) for a, b in pairs]
    squares = [float(u @ u) for u in updates]
    moved = torch.cat([pairs[-1][i].after - pairs[0][i].before for i in (0, 1)])
    return {
        "elapsed": float(len(pairs)),
        "displacement": float(moved.norm()),
        "path_length": math.fsum(math.sqrt(q) for q in squares),
        "action": math.fsum(squares),
        "work_ito": -math.fsum(float(g @ u) for g, u in zip(raw, updates, strict=True)),
        "work_anti_ito": -math.fsum(float(g @ u) for g, u in zip(raw[1:], updates[:-1], strict=True)),
        "grad_norm": float(raw[-1].norm()),
        "grad_norm_clipped": float(used[-1].norm()),
        "step_norm": math.sqrt(squares[-1]),
        "loss_drop": model.tape.losses[0] - (2 * model.tape.losses[-1] - model.tape.losses[-2]),
    }


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("style", ["zero before", "zero after", "toggled"])
@pytest.mark.mode("manual optimization, several optimizers", "measured")
def test_two_optimizers_take_joint_steps(tmp_path: Path, style: str, clip: float | None) -> None:
    """Also with gradients that another optimizer's backward left, and clipped between backward and step."""
    model, callback = Pair(style, clip), quiet()
    run = trainer(tmp_path, callback)
    run.fit(model, loader(batches(6)))
    assert run.global_step == 12  # Lightning counts every optimizer
    got = last_row(callback)
    assert got["step"] == 6
    agree(got, joint(model))
    if clip is not None:
        assert got["grad_norm"] > 1.5 * got["grad_norm_clipped"]  # it did clip


def test_two_steps_of_one_optimizer_in_a_batch_are_two(tmp_path: Path) -> None:
    class Twice(Pair):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            self.tape.batch += 1
            first, second = self.optimizers()
            for optimizer in (first, first, second):
                self.zero_grad()
                loss = self.loss(batch)
                self.manual_backward(loss)
                optimizer.step()
            return loss.detach()

    model, callback = Twice("own"), quiet()
    trainer(tmp_path, callback).fit(model, loader(batches(4)))
    got, steps = last_row(callback), model.tape.steps
    assert got["step"] == 8  # critic alone, critic with generator
    alone = [float(s.update.square().sum()) for s in steps[0::3]]
    pairs = zip(steps[1::3], steps[2::3], strict=True)
    both = [float(a.update.square().sum() + b.update.square().sum()) for a, b in pairs]
    assert got["path_length"] == pytest.approx(math.fsum(math.sqrt(q) for q in alone + both), rel=EXACT)
    assert got["work_ito"] == pytest.approx(-math.fsum(float(s.raw @ s.update) for s in steps), rel=EXACT)


def test_the_loss_may_be_in_a_dict_or_missing(tmp_path: Path) -> None:
    class Odd(Regressor):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 3 else {"loss": loss, "more": torch.zeros(2)}

    model, callback = Odd(), quiet()
    trainer(tmp_path, callback).fit(model, loader(batches(8)))
    got = last_row(callback)
    moving = [s for s in model.tape.steps if bool(s.update.any())]
    losses = model.tape.losses
    assert len(moving) == 7
    assert got["path_length"] == pytest.approx(math.fsum(float(s.update.norm()) for s in moving), rel=EXACT)
    assert got["loss_drop"] == pytest.approx(losses[0] - (2 * losses[-1] - losses[-2]), rel=EXACT)


@pytest.mark.mode("measure_every_n_steps > 1", "caveat", "estimates, with standard errors; bounds hold up to these")
def test_sampled_steps_scale_to_the_whole_run(tmp_path: Path) -> None:
    """One step in five: the sums estimate those of all steps; D is measured, not estimated."""
    model, callback = Regressor(sgd(lr=0.01)), quiet(measure_every_n_steps=5)
    trainer(tmp_path, callback, max_epochs=1).fit(model, loader(batches(100)))
    got, wanted = last_row(callback), plain(model.tape.steps, model.tape.losses)
    assert got["displacement"] == pytest.approx(wanted["displacement"], rel=EXACT)
    for name in ("path_length", "action", "work_ito"):
        error = got[f"{name}_se"]
        assert 0 < error < 0.3 * wanted[name]
        assert abs(got[name] - wanted[name]) < 4 * error  # four standard errors, fixed seed
