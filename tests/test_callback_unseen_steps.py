"""Where weights move and no step is seen to do it, that is said, with the optimizer's name and the cure.

The optimizers have the structure of those of other packages, which are not installed here.
"""

import copy
import math
import re
from pathlib import Path
from types import MethodType
from typing import Any
from unittest.mock import Mock

import pytest
import pytorch_lightning as pl
import torch
from callback_cases import (
    EXACT,
    Batch,
    ByHand,
    Regressor,
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
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from lightning_speedlimit.callback import measuring
from lightning_speedlimit.callback.unseen_steps import UnseenSteps

STEPS = 6


class TwoStep(Optimizer):
    """davda54/sam: climbs in `first_step`, comes back and descends by its base in `second_step`."""

    def __init__(self, parameters: Any, base: type[Optimizer] = SGD, rho: float = 0.05, **options: Any) -> None:
        super().__init__(parameters, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def first_step(self) -> None:
        parameters = self.param_groups[0]["params"]
        size = torch.stack([p.grad.norm() for p in parameters]).norm()
        for p in parameters:
            self.state[p]["old"] = p.detach().clone()
            p.add_(self.param_groups[0]["rho"] * p.grad / size)

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.data = self.state[p]["old"]
        self.base_optimizer.step()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = torch.enable_grad()(closure)()
        self.first_step()
        torch.enable_grad()(closure)()
        self.second_step()
        return loss


class ScheduleFreeWrapper:
    """schedulefree's: around an optimizer, `base`, whose groups and state it shows as its own; no `Optimizer`."""

    def __init__(self, base: Optimizer) -> None:
        self.base, self.defaults = base, base.defaults
        self.state_dict, self.load_state_dict = base.state_dict, base.load_state_dict
        self.average: dict[Tensor, Tensor] = {}

    @property
    def param_groups(self) -> Any:
        return self.base.param_groups

    @property
    def state(self) -> Any:
        return self.base.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self.base.step(closure)
        for p in self.param_groups[0]["params"]:
            p.lerp_(self.average.setdefault(p, p.detach().clone()), 0.1)
        return loss


class Updated(Regressor):
    """Manual optimization by `update(optimizer, loss)`; the optimizers of `make`."""

    def __init__(self, make: Any, update: Any) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.make, self.update = make, update

    def configure_optimizers(self) -> Any:
        return self.make(list(self.parameters()))

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        optimizers = self.optimizers()
        first = optimizers[0] if isinstance(optimizers, list) else optimizers
        self.zero_grad()
        self.manual_backward(loss)
        self.update(self, first, batch)
        return loss.detach()


def two_steps(module: Any, optimizer: Any, batch: Batch) -> None:
    optimizer.first_step()
    module.zero_grad()
    module.manual_backward(module.loss(batch))
    optimizer.second_step()


@torch.no_grad()
def in_the_weights(module: Any, optimizer: Any, batch: Batch) -> None:
    for p in module.parameters():
        p.data.sub_(0.05 * p.grad)


def past_the_hooks(parameters: Any) -> SGD:
    """Its `step` is another one, put on the object: torch's hooks are in the class's."""
    made = SGD(parameters, lr=0.05)

    @torch.no_grad()
    def step(self: Any, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.sub_(0.05 * p.grad)

    made.step = MethodType(step, made)  # type: ignore[method-assign]
    return made


def stepping(module: Any, optimizer: Any, batch: Batch) -> None:
    optimizer.step()


UNSEEN = {
    "two-step SAM": (
        lambda p: TwoStep(p, lr=0.05),
        two_steps,
        r"no step of TwoStep.*in its `step` alone.*the SGD within it, TrajectoryMeter\(optimizer\.base_optimizer\)",
    ),
    "weights written by hand": (sgd(), in_the_weights, "no step of SGD.*what is written by hand"),
    "hooks that never fire": (past_the_hooks, stepping, "no step of SGD, and yet its weights have moved"),
    "one of two": (
        lambda p: [past_the_hooks(p[2:]), SGD(p[:2], lr=0.05)],
        lambda module, optimizer, batch: [o.step() for o in module.optimizers()],
        "no step of SGD, and yet its weights have moved",
    ),
}


@pytest.mark.mode(
    "weights moved where no step is seen (two-step SAM, by hand, hooks that never fire)",
    "refused",
    "SpeedLimit saw no step of TwoStep, and yet its weights have moved",
)
@pytest.mark.parametrize("every", [1, 50], ids=["at the first log step", "at the end"])
@pytest.mark.parametrize(("make", "update", "message"), UNSEEN.values(), ids=UNSEEN)
def test_weights_that_no_step_has_moved(tmp_path: Path, make: Any, update: Any, message: str, every: int) -> None:
    models = []
    for callbacks in ([], [quiet()]):
        models.append(Updated(make, update))
        with heard() as said:
            trainer(tmp_path, *callbacks, max_epochs=2, log_every_n_steps=every).fit(models[-1], loader(batches(STEPS)))
    assert torch.equal(*(flat(list(m.parameters())) for m in models))
    assert len(said) == 1
    assert re.search(message, said[0])


class Shim(Regressor):
    """scvi-tools' plan for Pyro: another optimizer moves the weights, and the Trainer's moves one of its own."""

    def __init__(self, *, here: bool, requires_grad: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.dummy = nn.Parameter(torch.zeros(1, dtype=torch.float64), requires_grad=requires_grad)
        model = self if here else copy.deepcopy(self)
        self.trained = [model.first, model.second] if here else []
        self._elsewhere = [] if here else [model]
        weights = [*model.first.parameters(), *model.second.parameters()]
        self._svi = [Adam(weights, lr=0.01)]

    def configure_optimizers(self) -> Any:
        return Adam([self.dummy])

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        model = (self._elsewhere or [self])[0]
        loss = model.loss(batch)
        self._svi[0].zero_grad()
        loss.backward()
        self._svi[0].step()
        self.optimizers().step()
        return loss.detach()


@pytest.mark.mode(
    "a dummy optimizer beside the one that trains (Pyro)",
    "refused",
    "SpeedLimit saw 1 step of Adam in which no weight moved, and yet 'first.weight' has moved",
)
@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_dummy_optimizer(tmp_path: Path, requires_grad: bool) -> None:
    callback = quiet()
    with heard() as said:
        trainer(tmp_path, callback).fit(Shim(here=True, requires_grad=requires_grad), loader(batches(12)))
    found = [m for m in said if "all frozen" not in m]
    assert len(found) == 1
    assert "saw 1 step of Adam in which no weight moved, and yet 'first.weight' has moved" in found[0]
    assert "return the optimizer that moves them from configure_optimizers" in found[0]
    assert callback.record is not None
    if not requires_grad:
        assert callback.record.reasons["grad_norm"].startswith("no parameter of the optimizers has required gradients")


def test_a_dummy_optimizer_beside_weights_that_nobody_sees(tmp_path: Path) -> None:
    """At the end alone: until then gradients may come."""
    with heard() as said:
        trainer(tmp_path, quiet()).fit(Shim(here=False), loader(batches(12)))
    (found,) = said
    assert "saw 12 steps of Adam in which no weight moved or had a gradient" in found


class Warming(Regressor):
    """The learning rate is 0 in the first steps, while a teacher that requires gradients moves."""

    def __init__(self) -> None:
        super().__init__(sgd(), schedule=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: float(k > 2)))
        self.teacher = nn.Linear(4, 1, dtype=torch.float64)

    def configure_optimizers(self) -> Any:
        found = super().configure_optimizers()
        found["optimizer"].param_groups[0]["params"] = [*self.first.parameters(), *self.second.parameters()]
        return found

    def on_before_zero_grad(self, optimizer: Any) -> None:
        with torch.no_grad():
            self.teacher.weight.mul_(0.9)


class Late(Regressor):
    """No step before the fourth batch, and a first one that a validation comes before."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


class Swapping(pl.Callback):
    """Other weights in validation."""

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        self.kept = [p.detach().clone() for p in module.parameters()]
        with torch.no_grad():
            for p in module.parameters():
                p.zero_()

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        with torch.no_grad():
            for p, kept in zip(module.parameters(), self.kept, strict=True):
                p.copy_(kept)


@pytest.mark.parametrize("kind", ["warming up", "accumulating", "validating first", "frozen", "lr 0"])
def test_nothing_is_said_where_nothing_is_amiss(tmp_path: Path, kind: str) -> None:
    model: Regressor = {
        "warming up": Warming,
        "accumulating": Regressor,
        "validating first": Late,
        "frozen": Regressor,
        "lr 0": lambda: Regressor(sgd(lr=0.0)),
    }[kind]()
    model.second.requires_grad_(kind != "frozen")
    options: dict[str, Any] = {"accumulate_grad_batches": 4} if kind in ("accumulating", "validating first") else {}
    others = [Swapping()] if kind == "validating first" else []
    callback = quiet()
    with heard() as said:
        trainer(tmp_path, callback, *others, val_check_interval=2, **options).fit(
            model, loader(batches(8)), loader(batches(1))
        )
    assert said == []
    assert callback._measured is not None
    assert callback._measured.unseen is None or kind == "lr 0"


def test_weights_are_looked_at_once_and_at_the_ends_of_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look reads from the device."""
    looks = []
    real = UnseenSteps._moved
    monkeypatch.setattr(UnseenSteps, "_moved", lambda *args: looks.append(args) or real(*args))
    model = Updated(sgd(), lambda module, optimizer, batch: None)
    trainer(tmp_path, quiet(), max_epochs=2).fit(model, loader(batches(STEPS)))
    assert len(looks) == 3
    looks.clear()
    trainer(tmp_path, quiet(), max_epochs=2).fit(Regressor(), loader(batches(STEPS)))
    assert len(looks) == 1


def test_of_two_on_the_same_parameters_the_one_that_rests_is_not_missed(tmp_path: Path) -> None:
    with heard() as said:
        both = Updated(lambda p: [SGD(p, lr=0.05), Adam(p)], stepping)
        trainer(tmp_path, quiet()).fit(both, loader(batches(4)))
    assert said == []


@pytest.mark.mode(
    "a wrapper that takes no hooks around an optimizer that does (ScheduleFreeWrapper)",
    "refused",
    "SpeedLimit can't measure ScheduleFreeWrapper, which has no step hooks: hook the SGD within it",
)
def test_a_wrapper_is_named_with_the_optimizer_within(tmp_path: Path) -> None:
    model = Regressor()
    model.configure_optimizers = lambda: ScheduleFreeWrapper(SGD(model.parameters(), lr=0.05))  # type: ignore[method-assign]
    cure = r"no step hooks: hook the SGD within it, TrajectoryMeter\(optimizer\.base\); what ScheduleFreeWrapper itself"
    with pytest.warns(UserWarning, match=f"can't measure ScheduleFreeWrapper, which has {cure}"):
        trainer(tmp_path, quiet()).fit(model, loader(batches(4)))
    assert len(model.tape.losses) == 4


# --- optimizers that come and go during a fit


class Change(pl.Callback):
    def __init__(self, change: Any, at: int) -> None:
        self.change, self.at = change, at

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.at:
            trainer.optimizers = self.change(module, trainer.optimizers)


class Growing(ByHand, Regressor):
    """Steps whatever optimizers the Trainer has; the second layer has none at first."""

    def __init__(self, both: bool = False) -> None:
        super().__init__()
        self.both = both

    def configure_optimizers(self) -> Any:
        made = [self.tape.follow(SGD(self.first.parameters(), lr=0.05))]
        return [*made, *self.grown()] if self.both else made

    def grown(self) -> list[Optimizer]:
        return [self.tape.follow(SGD(self.second.parameters(), lr=0.05))]


@pytest.mark.mode(
    "optimizers added or taken away during the fit",
    "caveat",
    "`optimizers were added to those of the Trainer during the fit: SpeedLimit measures anew from here`",
)
@pytest.mark.parametrize("place", ["before", "after"])
def test_an_optimizer_that_is_added(tmp_path: Path, place: str) -> None:
    """Measured from the batch on in which the callback finds it."""
    model, callback = Growing(), quiet()
    change = Change(lambda module, known: [*known, *module.grown()], at=4)
    order = [change, callback] if place == "before" else [callback, change]
    with pytest.warns(
        UserWarning, match="optimizers were added to those of the Trainer during the fit: .* anew"
    ) as said:
        trainer(tmp_path, *order).fit(model, loader(batches(10)))
    assert sum("SpeedLimit" in str(w.message) for w in said) == 1
    assert callback.record is not None
    since, steps = (4, 4) if place == "before" else (5, 6)
    assert callback.record.run["since_step"] == steps
    assert len(callback.record.run["optimizers"]) == 2
    of_both = [s for s in model.tape.steps if s.batch >= since]
    starts = [next(s.before for s in of_both if s.optimizer == i) for i in (0, 1)]
    ends = [[s.after for s in of_both if s.optimizer == i][-1] for i in (0, 1)]
    moved = torch.cat(ends) - torch.cat(starts)
    assert last_row(callback)["elapsed"] == 10 - since
    assert last_row(callback)["displacement"] == pytest.approx(float(moved.norm()), rel=EXACT)


def test_an_optimizer_that_is_taken_away(tmp_path: Path) -> None:
    model, callback = Growing(both=True), quiet()
    change = Change(lambda module, known: known[:1], at=4)
    with pytest.warns(UserWarning, match="optimizers were removed from those of the Trainer during the fit"):
        trainer(tmp_path, change, callback).fit(model, loader(batches(10)))
    wanted = plain([s for s in model.tape.steps if s.batch >= 4], model.tape.losses[4:])
    assert last_row(callback)["path_length"] == pytest.approx(wanted["path_length"], rel=EXACT)


def test_an_optimizer_in_its_place_that_cannot_be_measured(tmp_path: Path) -> None:
    """Rows of the one before are none of its."""
    model, callback = Growing(), quiet()
    change = Change(lambda module, known: [ScheduleFreeWrapper(known[0])], at=4)
    with pytest.warns(UserWarning, match="can't measure ScheduleFreeWrapper"):
        trainer(tmp_path, change, callback).fit(model, loader(batches(10)))
    assert len(model.tape.steps) == 10
    assert callback.record is not None
    assert callback.record.run["since_step"] == 4
    assert len(callback.record) == 0


def test_a_fault_when_optimizers_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried once."""
    fault = Mock(side_effect=MemoryError)

    def replace(module: Any, known: Any) -> Any:
        monkeypatch.setattr(measuring, "Measurement", fault)
        return module.grown()

    callback = quiet()
    with pytest.warns(UserWarning, match="the measurement stopped at step 4: MemoryError"):
        trainer(tmp_path, Change(replace, at=4), callback).fit(Growing(), loader(batches(10)))
    assert fault.call_count == 1
    assert math.isnan(last_row(callback)["path_length"])
    assert callback.record is not None
    assert "MemoryError" in callback.record.reasons["path_length"]


def test_an_optimizer_that_is_added_in_the_last_batch(tmp_path: Path) -> None:
    model, callback = Growing(), quiet()
    change = Change(lambda module, known: [*known, *module.grown()], at=5)
    with pytest.warns(UserWarning, match="in its last batch: SpeedLimit has not measured what that did") as said:
        trainer(tmp_path, callback, change).fit(model, loader(batches(6)))
    assert sum("SpeedLimit" in str(w.message) for w in said) == 1
    assert last_row(callback)["step"] == 6


def test_the_same_optimizers_in_another_order_go_on(tmp_path: Path) -> None:
    model, callback = Growing(both=True), quiet()
    with heard() as said:
        change = Change(lambda module, known: known[::-1], at=4)
        trainer(tmp_path, change, callback).fit(model, loader(batches(8)))
    assert said == []
    assert last_row(callback)["elapsed"] == 8
