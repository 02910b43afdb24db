"""Gradients that others change between SpeedLimit's look at them and the optimizer's step.

Works are those of plain sums over the tape, from the raw gradients where the change was clipping and from what the
optimizer was given where it was something else; where neither can be told they are NaN, with the reason.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from callback_cases import EXACT, Batch, Regressor, batches, last_row, loader, plain, quiet, trainer
from torch import Tensor, nn

from lightning_speedlimit import SpeedLimit

CLIP = 0.3  # the gradients' norms begin at 4 and stay above 0.5
NEVER = 100.0  # a norm that none of them has
UNTOLD = ("work_ito", "work_anti_ito", "work_stratonovich", "work_action", "conversion", "efficiency_action")
KINEMATIC = ("displacement", "path_length", "action", "kinematic_efficiency", "straightness", "steadiness", "elapsed")


def quartered(parameters: list[Any], step: int) -> None:
    for p in parameters:
        p.grad /= 4


def replaced(parameters: list[Any], step: int) -> None:
    for p in parameters:
        p.grad = p.grad / 4


def scattered(parameters: list[Any], step: int) -> None:
    """By another factor at each step: a mean over numbers that differ, or a clipping of one's own kind."""
    for p in parameters:
        p.grad /= 2 + step % 3


def projected(parameters: list[Any], step: int) -> None:
    """What lies along another direction is taken out, and half of that direction added, as with several tasks."""
    generator = torch.Generator().manual_seed(step)
    others = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    share = sum((p.grad * o).sum() for p, o in zip(parameters, others, strict=True))
    share = share / sum(o.square().sum() for o in others)
    for p, o in zip(parameters, others, strict=True):
        p.grad += (0.5 - share) * o


def clipped(parameters: list[Any], step: int) -> None:
    nn.utils.clip_grad_norm_(parameters, CLIP)


def by_value(parameters: list[Any], step: int) -> None:
    nn.utils.clip_grad_value_(parameters, 0.1)


def looked_at(parameters: list[Any], step: int) -> None:
    torch.stack([p.grad.norm() for p in parameters])


Change = Callable[[list[Any], int], None]
# What the works are of: the raw gradients, or those that the optimizer was given.
RIGHT: dict[Change, str] = {
    quartered: "given",
    replaced: "given",
    projected: "given",
    by_value: "given",
    clipped: "raw",
    looked_at: "raw",
    scattered: "untold",
}


class Changer(pl.Callback):
    def __init__(self, change: Change) -> None:
        self.change = change

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.change(list(module.parameters()), trainer.global_step)


class Hooked(Regressor):
    def __init__(self, change: Change) -> None:
        super().__init__()
        self.change = change

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.change(list(self.parameters()), self.trainer.global_step)


class Manual(Regressor):
    def __init__(self, change: Change) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.change = change

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        self.change(list(self.parameters()), batch_idx)
        optimizer.step()
        return loss.detach()


def trained(folder: Path, where: str, change: Change, **options: Any) -> tuple[Regressor, SpeedLimit]:
    callback, other = quiet(), Changer(change)
    model: Regressor = {"module": Hooked, "manual": Manual}.get(where, lambda _: Regressor())(change)
    callbacks = {"callback": [callback, other], "callback before": [other, callback]}.get(where, [callback])
    trainer(folder, *callbacks, **options).fit(model, loader(batches(10)))
    assert len(model.tape.steps) == 10
    return model, callback


def assert_right(model: Regressor, callback: SpeedLimit, of: str) -> None:
    """All numbers are those of the plain sums, from the tape's gradients of that kind.

    (`grad_norm` of gradients that one factor changed is of those that were seen, whatever the factor means.)
    """
    steps = model.tape.steps
    steps = [replace(s, raw=s.used) for s in steps] if of == "given" else steps
    got, wanted = last_row(callback), plain(steps, model.tape.losses)
    for name, value in wanted.items():
        if name == "grad_norm" and of == "given":
            continue
        spare = EXACT * wanted["work_ito"]
        assert got[name] == pytest.approx(value, rel=EXACT, abs=spare, nan_ok=True), name
    assert callback.record is not None
    assert not {"work_ito", "work_action"} & callback.record.reasons.keys()


def assert_untold(model: Regressor, callback: SpeedLimit) -> None:
    got, wanted = last_row(callback), plain(model.tape.steps, model.tape.losses)
    for name in KINEMATIC:
        assert got[name] == pytest.approx(wanted[name], rel=EXACT), name
    assert callback.record is not None
    for name in UNTOLD:
        assert math.isnan(got[name]), name
        assert "gradients were changed" in callback.record.reasons[name], name


def name_of(value: Any) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.mode(
    "gradients changed in on_before_optimizer_step, of the module or of a later callback",
    "caveat",
    "told from the numbers: works are of the raw gradients where they were clipped to one norm, of what the optimizer "
    "was given where one and the same factor or more than one factor was at work, else NaN",
)
@pytest.mark.mode(
    "manual optimization, gradients changed by hand",
    "caveat",
    "told from the numbers: works are of the raw gradients where they were clipped to one norm, of what the optimizer "
    "was given where one and the same factor or more than one factor was at work, else NaN",
)
@pytest.mark.parametrize("change", RIGHT, ids=name_of)
@pytest.mark.parametrize("where", ["callback", "module", "manual"])
def test_changed_gradients(tmp_path: Path, where: str, change: Change) -> None:
    model, callback = trained(tmp_path, where, change)
    if RIGHT[change] == "untold":
        assert_untold(model, callback)
    else:
        assert_right(model, callback, RIGHT[change])
    if change is not looked_at:
        works = [-sum(float(g @ s.update) for s, g in pairs) for pairs in both(model)]
        assert abs(works[0] / works[1] - 1) > 0.01, "the other gradients would be others"


def both(model: Regressor) -> list[list[tuple[Any, Tensor]]]:
    steps = model.tape.steps
    return [[(s, s.raw) for s in steps], [(s, s.used) for s in steps]]


@pytest.mark.parametrize("change", [quartered, replaced, projected, clipped], ids=name_of)
def test_a_change_before_the_look_is_the_gradient(tmp_path: Path, change: Change) -> None:
    """A callback that comes first: it is what the loss is said to be."""
    assert_right(*trained(tmp_path, "callback before", change), "given")


@pytest.mark.parametrize("change", [c for c in RIGHT if c is not looked_at], ids=name_of)
@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("where", ["callback", "module"])
def test_a_change_and_lightnings_clipping(tmp_path: Path, where: str, algorithm: str, change: Change) -> None:
    """What either did can't be told apart; that both did something is seen."""
    clip = {"gradient_clip_val": CLIP if algorithm == "norm" else 0.05, "gradient_clip_algorithm": algorithm}
    assert_untold(*trained(tmp_path, where, change, **clip))


@pytest.mark.parametrize("where", ["callback", "module"])
@pytest.mark.parametrize("change", [quartered, replaced], ids=name_of)
def test_a_change_where_lightning_had_nothing_to_clip(tmp_path: Path, where: str, change: Change) -> None:
    assert_right(*trained(tmp_path, where, change, gradient_clip_val=NEVER), "given")


@pytest.mark.parametrize("clip", [CLIP, NEVER])
@pytest.mark.parametrize("where", ["callback", "module"])
def test_a_hook_that_only_looks_does_not_hide_clipping(tmp_path: Path, where: str, clip: float) -> None:
    assert_right(*trained(tmp_path, where, looked_at, gradient_clip_val=clip), "raw")


class Accumulating(Manual):
    """A step on the mean of three batches' gradients, whose sum is divided by hand."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        loss = Regressor.training_step(self, batch, batch_idx)
        self.manual_backward(loss)
        if batch_idx % 3 == 2:
            self.change(list(self.parameters()), batch_idx)
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()


@pytest.mark.parametrize("write", ["in place", "through data", "replaced"])
def test_accumulated_gradients_that_are_divided_by_hand(tmp_path: Path, write: str) -> None:
    def divide(parameters: list[Any], step: int) -> None:
        for p in parameters:
            if write == "replaced":
                p.grad = p.grad / 3
            else:
                (p.grad if write == "in place" else p.grad.data).div_(3)

    model, callback = Accumulating(divide), quiet()
    trainer(tmp_path, callback).fit(model, loader(batches(24)))
    steps = model.tape.steps
    assert len(steps) == 8
    losses = [math.fsum(model.tape.losses[k : k + 3]) / 3 for k in range(0, 24, 3)]
    got, wanted = last_row(callback), plain([replace(s, raw=s.used) for s in steps], losses)
    for name in wanted.keys() - {"grad_norm"}:
        assert got[name] == pytest.approx(wanted[name], rel=EXACT, abs=EXACT * wanted["work_ito"], nan_ok=True), name
