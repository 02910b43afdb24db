"""Lightning runs whose optimizer, gradients or settings are changed midway: the training's numbers stay its own,
and the callback's are those of plain sums over the tape, or NaN with the reason."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from callback_cases import (
    EXACT,
    Batch,
    ByHand,
    Regressor,
    Step,
    batches,
    flat,
    heard,
    last_row,
    loader,
    plain,
    quiet,
    sgd,
    trainer,
)
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lightning_speedlimit import SpeedLimit

WORKS = ("work_ito", "work_anti_ito", "work_stratonovich", "work_action", "conversion", "signal_fraction")
EFFICIENCIES = ("efficiency", "efficiency_low", "efficiency_drift", "efficiency_action")


def reasons(callback: SpeedLimit) -> dict[str, str]:
    assert callback.record is not None
    return callback.record.reasons


def identical(got: dict[str, float], wanted: dict[str, float]) -> None:
    """Bitwise, NaN for NaN."""
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name] == value or (math.isnan(got[name]) and math.isnan(value)), name


# --- The optimizer's groups are replaced -------------------------------------------------------------------


class Reload(pl.Callback):
    """What a rollback does, to the state of the moment; the rate is then another one."""

    def __init__(self, *, load: bool = True) -> None:
        self.load = load

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 5:
            optimizer = trainer.optimizers[0]
            if self.load:
                optimizer.load_state_dict(optimizer.state_dict())
            optimizer.param_groups[0]["lr"] *= 0.5


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}], ids=["SGD", "momentum"])
@pytest.mark.mode("optimizer.load_state_dict during the run", "measured")
def test_the_optimizers_own_state_is_loaded(tmp_path: Path, options: dict[str, Any]) -> None:
    rows, trained, steps = [], [], []
    for callbacks, load in (([], True), ([quiet()], True), ([quiet()], False)):
        model = Regressor(sgd(**options))
        fitted = trainer(tmp_path, *callbacks, Reload(load=load))
        fitted.fit(model, loader(batches(12)))
        steps.append(fitted.global_step)
        trained.append(flat(list(model.parameters())))
        rows += [last_row(c) for c in callbacks]
    assert steps == [12, 12, 12]
    assert torch.equal(trained[0], trained[1])
    assert torch.equal(trained[0], trained[2])
    identical(rows[0], rows[1])
    if not options:
        for name, value in plain(model.tape.steps, model.tape.losses).items():
            assert rows[0][name] == pytest.approx(value, rel=EXACT), name


class Replace(pl.Callback):
    """Another optimizer from the second epoch on."""

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 1:
            self.start = [p.detach().clone() for p in module.parameters()]
            trainer.optimizers = [module.tape.follow(torch.optim.SGD(module.parameters(), lr=0.02))]


@pytest.mark.mode(
    "optimizers replaced during the fit",
    "caveat",
    "`the optimizers were replaced during the fit: SpeedLimit measures anew from here`",
)
@pytest.mark.parametrize("probe", [0, 2])
def test_replaced_optimizers_are_measured_anew(tmp_path: Path, probe: int) -> None:
    """The probe too: its θ_0 and its batches are those from there on."""
    data = batches(6)
    model, callback, other = Regressor(), quiet(probe_batches=probe), Replace()
    with pytest.warns(UserWarning, match="optimizers were replaced") as said:
        trainer(tmp_path, other, callback, max_epochs=2).fit(model, loader(data))
    assert sum("SpeedLimit" in str(w.message) for w in said) == 1
    assert callback.record is not None
    assert callback.record.run["since_step"] == 6
    got, wanted = last_row(callback), plain(model.tape.steps[6:], model.tape.losses[-6:])
    unequal = {"loss_drop", "entropy_production", "conversion", "efficiency"} if probe else set()
    for name in wanted.keys() - unequal:
        assert got[name] == pytest.approx(wanted[name], rel=EXACT, nan_ok=True), name
    if not probe:
        return
    with torch.no_grad():
        last = [float(model.loss(batch)) for batch in data[:probe]]
        for parameter, start in zip(model.parameters(), other.start, strict=True):
            parameter.copy_(start)
        first = [float(model.loss(batch)) for batch in data[:probe]]
    assert got["loss_drop"] == pytest.approx((math.fsum(first) - math.fsum(last)) / probe, rel=EXACT)


# --- Resumed with other settings ---------------------------------------------------------------------------


def test_resuming_with_other_settings_starts_anew(tmp_path: Path) -> None:
    """Six steps of an epoch of twelve have been done by another callback."""
    model, callback = Regressor(), quiet(clock="lr")
    with heard() as said:
        first = trainer(tmp_path, quiet(loss_window=3), max_epochs=1)
        first.fit(Regressor(), loader(batches(6)))
        first.save_checkpoint(tmp_path / "saved.ckpt")
        second = trainer(tmp_path, callback, max_epochs=2)
        second.fit(model, loader(batches(6)), ckpt_path=tmp_path / "saved.ckpt")
    assert second.global_step == 12
    assert len(said) == 1
    assert "starts anew at step 6" in said[0]
    assert "saved measurement was made with" in said[0]
    assert callback.record is not None
    assert callback.record.run["since_step"] == 6
    got = last_row(callback)
    for name, value in plain(model.tape.steps, model.tape.losses, clock="lr").items():
        assert got[name] == pytest.approx(value, rel=EXACT, nan_ok=True), name


# --- A step within a step ----------------------------------------------------------------------------------


class Inherited(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.mode("an optimizer whose step calls its parent's", "measured")
def test_a_step_that_calls_its_parents_counts_once(tmp_path: Path) -> None:
    torch.optim.AdamW([nn.Parameter(torch.ones(1))])  # torch hooks a class's step when its first object is made
    thetas = []

    class Watched(Regressor):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            thetas.append(flat(list(self.parameters())))

        def configure_optimizers(self) -> Any:
            return Inherited(self.parameters(), lr=0.01, weight_decay=0.0)

    model, callback = Watched(), quiet()
    fitted = trainer(tmp_path, callback)
    fitted.fit(model, loader(batches(10)))
    thetas.append(flat(list(model.parameters())))
    action = math.fsum(float((b - a).square().sum()) for a, b in pairwise(thetas))
    got = last_row(callback)
    assert got["step"] == got["elapsed"] == 10
    assert got["kinematic_efficiency"] == pytest.approx(
        float((thetas[-1] - thetas[0]).square().sum()) / (10 * action), rel=EXACT
    )


# --- Clipping of one's own ---------------------------------------------------------------------------------


class Manual(Regressor):
    """Clips by Lightning's own method, one optimizer."""

    def __init__(self, algorithm: str) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.algorithm = algorithm

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        self.clip_gradients(optimizer, 0.05, self.algorithm)  # type: ignore[arg-type]
        optimizer.step()  # type: ignore[union-attr]
        return loss.detach()


class Hooked(Regressor):
    """Clips in its own hook, after all callbacks have seen the raw gradients."""

    def __init__(self, algorithm: str) -> None:
        super().__init__()
        self.algorithm = algorithm

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.algorithm == "value":
            nn.utils.clip_grad_value_(self.parameters(), 0.05)
        elif self.algorithm == "module by module":
            for part in (self.first, self.second):
                nn.utils.clip_grad_norm_(part.parameters(), 0.05)
        else:
            nn.utils.clip_grad_norm_(self.parameters(), 0.05)


FROM_RAW = ("work_ito", "work_anti_ito", "work_stratonovich", "signal_fraction", "grad_norm", "kinematic_efficiency")


def given(steps: list[Step]) -> list[Step]:
    """Gradients as the optimizer was given them, in place of the raw ones."""
    return [replace(s, raw=s.used) for s in steps]


@pytest.mark.parametrize(
    "algorithm",
    [
        pytest.param("norm", marks=pytest.mark.mode("manual optimization, own clipping by norm", "measured")),
        pytest.param(
            "value",
            marks=pytest.mark.mode(
                "manual optimization, own clipping by value", "caveat", "works are of the clipped gradients"
            ),
        ),
    ],
)
def test_clipping_under_manual_optimization(tmp_path: Path, algorithm: str) -> None:
    model, callback = Manual(algorithm), quiet()
    trainer(tmp_path, callback).fit(model, loader(batches(10)))
    steps = model.tape.steps
    assert all(float(s.raw.abs().max()) > 0.05 for s in steps)  # it clips at each step
    got, wanted = last_row(callback), plain(steps if algorithm == "norm" else given(steps), model.tape.losses)
    for name in (*FROM_RAW, "grad_norm_clipped", "work_action", "efficiency_action"):
        assert got[name] == pytest.approx(wanted[name], rel=EXACT, abs=EXACT * wanted["work_ito"]), name
    assert not set(WORKS) & set(reasons(callback))


@pytest.mark.parametrize("algorithm", ["value", "module by module", "norm"])
@pytest.mark.mode(
    "clipping in an own on_before_optimizer_step", "caveat", "unless by one factor, works are of the clipped gradients"
)
def test_clipping_in_the_modules_own_hook(tmp_path: Path, algorithm: str) -> None:
    """By one norm it is told from other changes; by several factors it looks like gradients that were to be others."""
    model, callback = Hooked(algorithm), quiet()
    trainer(tmp_path, callback).fit(model, loader(batches(10)))
    steps = model.tape.steps
    got, wanted = last_row(callback), plain(steps if algorithm == "norm" else given(steps), model.tape.losses)
    for name in (*FROM_RAW, "grad_norm_clipped", "displacement", "work_action", "efficiency_action"):
        assert got[name] == pytest.approx(wanted[name], rel=EXACT, abs=EXACT * wanted["work_ito"]), name


class Configured(Regressor):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        nn.utils.clip_grad_value_(self.parameters(), 0.05)


@pytest.mark.mode("an own configure_gradient_clipping", "measured")
def test_clipping_where_the_reason_says_to(tmp_path: Path) -> None:
    model, callback = Configured(), quiet()
    trainer(tmp_path, callback).fit(model, loader(batches(10)))
    got, wanted = last_row(callback), plain(model.tape.steps, model.tape.losses)
    for name in FROM_RAW:
        assert got[name] == pytest.approx(wanted[name], rel=EXACT, abs=EXACT * wanted["work_ito"]), name


# --- Several optimizers on the clock "lr" -----------------------------------------------------------------


class Scheduled(ByHand, Regressor):
    """Two optimizers, one joint step a batch, and after it their schedulers, as manual optimization has it."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        for scheduler in self.lr_schedulers():  # type: ignore[union-attr]
            scheduler.step()
        return loss

    def configure_optimizers(self) -> Any:
        layers = (self.first, self.second)
        found = [self.tape.follow(torch.optim.SGD(layer.parameters(), lr=0.1)) for layer in layers]
        return found, [LambdaLR(optimizer, lambda k: 1 - k / 15) for optimizer in found]


def test_elapsed_is_the_sum_of_the_rates_that_were_used(tmp_path: Path) -> None:
    model, callback = Scheduled(), quiet(clock="lr")
    trainer(tmp_path, callback).fit(model, loader(batches(12)))
    steps = model.tape.steps
    pairs = list(zip(steps[0::2], steps[1::2], strict=True))
    rates = [a.rates[0] for a, _ in pairs]
    assert rates == pytest.approx([0.1 * (1 - k / 15) for k in range(12)])
    squares = [float(a.update.square().sum() + b.update.square().sum()) for a, b in pairs]
    action = math.fsum(q / r for q, r in zip(squares, rates, strict=True))
    moved = torch.cat([pairs[-1][i].after - pairs[0][i].before for i in (0, 1)])
    got = last_row(callback)
    assert got["elapsed"] == pytest.approx(math.fsum(rates), rel=EXACT)
    assert got["action"] == pytest.approx(action, rel=EXACT)
    assert got["learning_rate"] == pytest.approx(rates[-1], rel=EXACT)
    assert got["kinematic_efficiency"] == pytest.approx(float(moved @ moved) / (math.fsum(rates) * action), rel=EXACT)


# --- A probe leaves no trace ------------------------------------------------------------------------------


class Collecting(Regressor):
    """Keeps what it saw in a list, a dictionary and a count, on itself and on a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[float] = []
        self.by_batch: dict[int, float] = {}
        self.calls = 0
        self.first.seen = []  # type: ignore[assignment]
        self.kept = self.outputs  # another name for the same list

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.outputs.append(float(loss.detach()))
        self.by_batch[len(self.by_batch)] = float(loss.detach())
        self.calls += 1
        self.first.seen.append(batch_idx)  # type: ignore[union-attr, operator]
        return loss


def test_a_probe_is_not_among_what_the_module_collects(tmp_path: Path) -> None:
    modules = []
    for size in (0, 3):
        model, callback = Collecting(), quiet(probe_batches=size)
        outputs = model.outputs
        trainer(tmp_path, callback, max_epochs=2).fit(model, loader(batches(6)))
        assert model.outputs is model.kept is outputs
        modules.append(model)
        assert last_row(callback)["loss_drop_se"] >= 0
    with_probe, without = modules[1], modules[0]
    assert (with_probe.calls, len(with_probe.outputs)) == (12, 12)
    assert with_probe.outputs == without.outputs
    assert with_probe.by_batch == without.by_batch
    assert with_probe.first.seen == without.first.seen
    assert torch.equal(flat(list(with_probe.parameters())), flat(list(without.parameters())))
