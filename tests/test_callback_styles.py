"""Ways of training that Lightning offers: each run twice, with and without the callback.

Weights, losses, optimizer states and random state must be bitwise the same; the numbers must be those of the plain
sums over a diary of the run (style_cases.py).
"""

import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from callback_cases import Batch, ByHand, quiet, sgd
from pytorch_lightning.callbacks import BaseFinetuning, GradientAccumulationScheduler, ModelPruning
from style_cases import ALL, KINEMATIC, WORKS, Diarist, Outcome, Style, compare, disagreements, same, train
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR


def adam(**options: Any) -> Any:
    return lambda parameters: torch.optim.Adam(parameters, lr=0.01, **options)


# --- modules that train otherwise


class Manual(Diarist):
    """Two optimizers; a backward for each, or one for both."""

    def __init__(self, *, own: bool = False, shared: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.own, self.shared = own, shared

    def configure_optimizers(self) -> Any:
        return [self.diary.follow(torch.optim.SGD(part.parameters(), lr=0.05)) for part in (self.first, self.second)]

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        found: Any = None
        for optimizer in self.optimizers(use_pl_optimizer=not self.own):  # type: ignore[union-attr]
            if found is None or not self.shared:
                self.zero_grad()
                loss = self.loss(batch)
                found = loss if found is None else found
                self.manual_backward(loss)
            optimizer.step()
        self.diary.losses.append(float(found.detach()))
        return found.detach()


class Repeating(Diarist):
    """LBFGS evaluates again and again; the gradient and the loss at θ_k are those of the first evaluation."""

    fresh = True

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.fresh = True

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        if self.fresh:
            return super().training_step(batch, batch_idx)
        return self.loss(batch)

    def on_after_backward(self) -> None:
        if self.fresh:
            super().on_after_backward()
        self.fresh = False


class Silent(Diarist):
    """No loss in two batches of each epoch."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx in (2, 5) else loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.diary.raw = {}


class Tuned(Diarist):
    def configure_optimizers(self) -> Any:
        return self.diary.follow(self._optimizer([p for p in self.parameters() if p.requires_grad]))


class Unfreeze(BaseFinetuning):
    """The first layer joins in the second epoch, at another rate."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.first)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.first, optimizer, lr=0.02)


class Lazy(Diarist):
    def build(self) -> None:
        self.first, self.second = nn.LazyLinear(5), nn.LazyLinear(1)


class Tied(Diarist):
    def build(self) -> None:
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sum(1, keepdim=True)


class Normed(Diarist):
    """Buffers that move and are no parameters, and random numbers in every step."""

    def build(self) -> None:
        self.first = nn.Linear(4, 5)
        self.second = nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 1))


class Sparse(Diarist):
    """Some rows of the embedding occur several times in a batch, most of them not at all."""

    def build(self) -> None:
        self.first, self.second = nn.Embedding(40, 3, sparse=True), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows = (x.abs() * 3).long().clamp(max=39)
        return self.second(torch.tanh(self.first(rows).sum(1)))


class SparsePair(ByHand, Sparse):
    """SparseAdam for the embedding, Adam for the rest."""

    def configure_optimizers(self) -> Any:
        found = [torch.optim.SparseAdam(self.first.parameters(), lr=0.01), adam()(self.second.parameters())]
        return [self.diary.follow(optimizer) for optimizer in found]


class Complex(Diarist):
    def __init__(self, optimizer: Any = None) -> None:
        super().__init__(optimizer)
        self.first.weight = nn.Parameter(torch.randn(5, 4, dtype=torch.complex128))
        self.first.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return self.second((x.to(torch.complex128) @ self.first.weight.T).abs())


class Parametrized(Diarist):
    def build(self) -> None:
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))
        self.second = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 1))


class Clamping(Diarist):
    """Clamps right after each step, within the module's own `optimizer_step`."""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.clamp_(-0.3, 0.3)


class Skipping(Diarist):
    """Its own `optimizer_step` leaves every third batch's step out."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 3 == 0:
            optimizer_closure()
        else:
            optimizer.step(closure=optimizer_closure)


class Alternating(Diarist):
    """A layer that is frozen in every second batch, and keeps its gradient of the batch before or has none."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.first.requires_grad_(batch_idx % 2 == 0)


class Scheduled(Diarist):
    def __init__(self, interval: str) -> None:
        super().__init__()
        self.interval = interval

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = LambdaLR(optimizer, lambda k: min(1.0, (k + 1) / 6))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": self.interval}}


class Validated(Diarist):
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


def compiled_layers() -> Diarist:
    torch._dynamo.reset()
    model = Diarist()
    model.first.compile(backend="aot_eager")
    return model


class CompiledStep(Diarist):
    """The optimizer's step is compiled; under manual optimization no closure is."""

    def __init__(self, optimizer: Any = None) -> None:
        super().__init__(optimizer)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        optimizer.step = torch.compile(optimizer.step, backend="eager")  # type: ignore[method-assign]
        return optimizer

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        optimizer.step()
        return loss.detach()


def mode(name: str, outcome: str = "measured", remark: str = "") -> Any:
    return pytest.mark.mode(name, outcome, remark)


NO_LOSS = tuple(name for name in ALL if name != "loss_drop")
EFFECTIVE = "effective mobility: efficiency is kinematic efficiency / conversion"

STYLES: list[tuple[str, Style, list[Any]]] = [
    ("automatic", Style(Diarist), [mode("automatic optimization")]),
    ("adam", Style(lambda: Diarist(adam())), [mode("automatic optimization")]),
    ("momentum", Style(lambda: Diarist(sgd(momentum=0.9))), []),
    ("manual", Style(lambda: Manual(), optimizers=2), [mode("manual optimization, several optimizers")]),
    (
        "manual, one backward",
        Style(lambda: Manual(shared=True), optimizers=2),
        [mode("manual optimization, several optimizers")],
    ),
    (
        "manual, plain optimizers",
        Style(lambda: Manual(own=True), optimizers=2),
        [mode("manual optimization, use_pl_optimizer=False")],
    ),
    (
        "LBFGS",
        Style(
            lambda: Repeating(lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4)),
            agreeing=(*KINEMATIC, "work_ito", "work_anti_ito", "grad_norm", "loss_drop"),
        ),
        [mode("LBFGS", "caveat", EFFECTIVE)],
    ),
    (
        "accumulated",
        Style(Diarist, {"accumulate_grad_batches": 3}, agreeing=NO_LOSS),
        [mode("accumulate_grad_batches, with a short last window")],
    ),
    (
        "accumulation scheduled",
        Style(Diarist, others=lambda: [GradientAccumulationScheduler({0: 1, 1: 3, 2: 2})], epochs=3, agreeing=NO_LOSS),
        [mode("GradientAccumulationScheduler")],
    ),
    ("clipped by norm", Style(Diarist, {"gradient_clip_val": 0.3}), [mode("gradient clipping by norm")]),
    (
        "clipped by value",
        Style(
            Diarist,
            {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
            agreeing=(*KINEMATIC, *WORKS, "loss_drop"),
        ),
        [mode("gradient clipping by value", "caveat", "effective mobility; works are of the raw gradients")],
    ),
    ("schedule per step", Style(lambda: Scheduled("step")), [mode("learning rate schedules, per step and per epoch")]),
    (
        "schedule per epoch",
        Style(lambda: Scheduled("epoch"), epochs=3),
        [mode("learning rate schedules, per step and per epoch")],
    ),
    (
        "no loss",
        Style(Silent, agreeing=NO_LOSS),
        [mode("training_step returns None", "caveat", "a step of zero length; with a loss scaler no step at all")],
    ),
    ("finetuning", Style(Tuned, others=lambda: [Unfreeze()], epochs=3), [mode("BaseFinetuning, groups added mid-run")]),
    (
        "finetuning, adam",
        Style(lambda: Tuned(adam()), others=lambda: [Unfreeze()], epochs=3),
        [mode("BaseFinetuning, groups added mid-run")],
    ),
    ("lazy", Style(Lazy), [mode("lazy modules")]),
    ("lazy, adam", Style(lambda: Lazy(adam())), [mode("lazy modules")]),
    ("tied", Style(lambda: Tied(adam())), [mode("tied parameters")]),
    ("buffers", Style(lambda: Normed(adam())), [mode("buffers that move, dropout")]),
    ("sparse", Style(Sparse), [mode("sparse gradients")]),
    (
        "sparse adam",
        Style(SparsePair, optimizers=2, agreeing=(*KINEMATIC, *WORKS, "loss_drop")),
        [mode("SparseAdam", "caveat", EFFECTIVE)],
    ),
    ("complex", Style(Complex), [mode("complex parameters")]),
    (
        "complex, adam",  # its μ is of the modulus: test_meter_against_reference.py
        Style(lambda: Complex(adam()), agreeing=(*KINEMATIC, *WORKS, "loss_drop")),
        [mode("complex parameters")],
    ),
    ("parametrized", Style(Parametrized), [mode("parametrizations (weight norm, spectral norm)")]),
    (
        "pruned",
        Style(Diarist, others=lambda: [ModelPruning("l1_unstructured", amount=0.2)], epochs=3),
        [mode("ModelPruning")],
    ),
    ("clamped", Style(Clamping), [mode("weights clamped after every step")]),
    ("own optimizer_step", Style(Skipping, agreeing=NO_LOSS), [mode("an own optimizer_step that leaves steps out")]),
    ("frozen and unfrozen", Style(Alternating), [mode("requires_grad switched during the run")]),
    ("validated", Style(Validated, {"val_check_interval": 3}, validated=True), [mode("validation within epochs")]),
    ("compiled layers", Style(compiled_layers), [mode("torch.compile of the module")]),
    (
        "compiled step",
        Style(lambda: CompiledStep(adam())),
        [mode("torch.compile of the optimizer's step"), pytest.mark.slow],
    ),
]
styles = pytest.mark.parametrize("style", [pytest.param(s, id=name, marks=marks) for name, s, marks in STYLES])


@styles
@pytest.mark.filterwarnings("error:SpeedLimit", "error:the measurement stopped")
def test_a_style_is_measured_and_left_alone(tmp_path: Path, style: Style) -> None:
    model, callback, differing = compare(style, tmp_path)
    assert differing == []
    assert disagreements(style, model, callback) == {}


# --- the comparisons can fail


class Nudge(pl.Callback):
    """One weight, one unit in the last place, once."""

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step == 7:
            with torch.no_grad():
                weight = module.first.weight
                weight[0, 0] = torch.nextafter(weight[0, 0], weight[0, 0] + 1)


class Draw(pl.Callback):
    def on_train_epoch_end(self, *args: Any) -> None:
        torch.rand(())


@pytest.mark.parametrize("intruder", [Nudge, Draw])
def test_what_a_callback_changes_would_be_seen(tmp_path: Path, intruder: type[pl.Callback]) -> None:
    _, without = train(Style(Diarist), tmp_path, None)
    _, again = train(Style(Diarist), tmp_path, None)
    _, disturbed = train(Style(Diarist, others=lambda: [intruder()]), tmp_path, None)
    assert without.differs_from(again) == []
    assert disturbed.differs_from(without) != []


def test_other_optimizer_states_would_be_seen() -> None:
    state = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.tensor([0.0, math.nan])}}}
    other = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.tensor([1e-45, math.nan])}}}
    one = Outcome({}, [], [state], torch.zeros(1), 1)
    assert one.differs_from(Outcome({}, [], [other], torch.zeros(1), 1)) == ["optimizers"]
    assert same(state, {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.tensor([0.0, math.nan])}}})


@pytest.mark.parametrize("wrong", ["update", "raw", "loss"])
def test_wrong_numbers_would_be_seen(tmp_path: Path, wrong: str) -> None:
    """The sums over the diary with one entry changed by 1e-6 of itself."""
    style = Style(Diarist)
    model, callback, _ = compare(style, tmp_path)
    if wrong == "loss":
        model.diary.losses[-1] *= 1 + 1e-6
    else:
        entry = model.diary.entries[3]
        key = next(iter(entry.used))
        (entry.after if wrong == "update" else entry.raw)[key] *= 1 + 1e-6
    found = disagreements(style, model, callback)
    assert {"update": "path_length", "raw": "work_ito", "loss": "loss_drop"}[wrong] in found


# --- a compiled module as a whole, and a compiled step whose closure is the training step


@pytest.mark.slow
@mode("torch.compile of the module")
def test_a_compiled_lightning_module(tmp_path: Path) -> None:
    style = Style(lambda: torch.compile(Diarist(), backend="aot_eager"))
    model, callback, differing = compare(style, tmp_path)
    assert differing == []
    assert disagreements(style, model, callback) == {}


class CompiledClosure(Diarist):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        optimizer.step = torch.compile(optimizer.step, backend="eager")  # type: ignore[method-assign]
        return optimizer


@pytest.mark.slow
@mode("torch.compile of the optimizer's step")
def test_what_is_compiled_is_not_the_measurement(tmp_path: Path) -> None:
    """Under automatic optimization the training step runs within the compiled step, and hooks within that."""
    style, callback = Style(CompiledClosure), quiet()
    frames, outcomes = [], []
    for measuring in (None, callback):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model, outcome = train(style, tmp_path, measuring)
        outcomes.append(outcome)
        frames.append(torch._dynamo.utils.counters["frames"]["total"])
    assert outcomes[1].differs_from(outcomes[0]) == []
    assert disagreements(style, model, callback) == {}
    # Lightning's own frames and, with the callback, a few of its hooks; the measurement itself was 90 more.
    assert frames[1] < frames[0] + 30
