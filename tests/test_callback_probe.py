"""The probe: losses of fixed batches at θ_0 and now, against the same losses evaluated by hand."""

import gc
import math
import random
import re
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from callback_cases import EXACT, Batch, Regressor, batches, heard, last_row, loader, quiet, sgd, trainer
from probe_cases import Case, Stream, data
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_speedlimit import SpeedLimit
from lightning_speedlimit.callback import isolation


def loss_at(theta: Tensor, data: list[Batch]) -> Tensor:
    """(n,) losses of a fresh model with the weights of a tape."""
    model, place = Regressor(), 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(theta[place : place + parameter.numel()].view_as(parameter))
            place += parameter.numel()
        return torch.stack([model.loss(batch) for batch in data])


class Probed(Regressor):
    """Keeps the losses that carry a graph apart: the probe evaluates without."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if not torch.is_grad_enabled():
            self.tape.losses.pop()
            self.tape.batch -= 1
        return loss


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=str)
def test_the_drop_is_that_of_the_first_batches(tmp_path: Path, size: int, options: dict[str, Any]) -> None:
    data = batches(8)
    model, callback = Probed(), quiet(probe_batches=size)
    trainer(tmp_path, callback, **options).fit(model, loader(data))
    steps = model.tape.steps
    assert callback.record is not None
    columns = callback.record.columns
    complete = [
        row for row, step in enumerate(columns["step"]) if step * options.get("accumulate_grad_batches", 1) >= size
    ]
    assert complete
    for row in complete:
        after = steps[int(columns["step"][row]) - 1].after
        fall = loss_at(steps[0].before, data[:size]) - loss_at(after, data[:size])
        assert columns["loss_drop"][row] == pytest.approx(float(fall.mean()), rel=EXACT)
        error = float(fall.std()) / math.sqrt(size) if size > 1 else math.nan
        assert columns["loss_drop_se"][row] == pytest.approx(error, rel=EXACT, nan_ok=True)


def test_before_it_is_complete_the_training_losses_serve_and_it_says_so(tmp_path: Path) -> None:
    model, callback = Probed(), quiet(probe_batches=6)
    trainer(tmp_path, callback, max_steps=4).fit(model, loader(batches(8)))
    assert callback.record is not None
    assert "6 probe batches" in callback.record.reasons["loss_drop"]
    losses = model.tape.losses
    assert last_row(callback)["loss_drop"] == pytest.approx(losses[0] - (2 * losses[-1] - losses[-2]), rel=EXACT)


class Dropping(Regressor):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(nn.functional.dropout(torch.tanh(self.first(x)), 0.5, self.training))


def test_dropout_draws_the_same_masks_at_both_ends(tmp_path: Path) -> None:
    """Weights that stay have no drop: the difference is the weights' alone."""
    callback = quiet(probe_batches=3)
    trainer(tmp_path, callback).fit(Dropping(sgd(lr=0.0)), loader(batches(6)))
    assert last_row(callback)["loss_drop"] == 0.0


@pytest.mark.parametrize("kind", ["batch alone", "anything"])
def test_training_step_may_take_what_lightning_gives_it(tmp_path: Path, kind: str) -> None:
    class Alone(Regressor):
        def training_step(self, batch: Batch) -> Any:  # type: ignore[override]
            return self.loss(batch)

    class Anything(Regressor):
        def training_step(self, *args: Any) -> Any:
            assert args[1] in range(6)
            return self.loss(args[0])

    callback = quiet(probe_batches=2)
    model = Alone() if kind == "batch alone" else Anything()
    trainer(tmp_path, callback).fit(model, loader(batches(6)))
    assert last_row(callback)["loss_drop_se"] > 0  # the probe's: two losses at each end alone have none


@pytest.mark.parametrize("fails", ["at once", "later"])
def test_a_probe_that_cannot_be_evaluated_is_said_once_and_undefined(tmp_path: Path, fails: str) -> None:
    """A penalty on a gradient needs a graph, which the probe does not build."""

    class Penalised(Probed):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if fails == "at once" or len(self.tape.steps) > 4:
                torch.autograd.grad(loss, next(self.parameters()), create_graph=True)
            return loss

    model, callback = Penalised(), quiet(probe_batches=2)
    with pytest.warns(UserWarning, match="gives up probe_batches=2: RuntimeError: element 0") as said:
        trainer(tmp_path, callback).fit(model, loader(batches(8)))
    assert sum("probe_batches" in str(w.message) for w in said) == 1
    assert callback.record is not None
    drops = callback.record.columns["loss_drop"]
    assert len(drops) == 8
    known = 4 if fails == "later" else 1  # rows; in the first the training losses serve, for a batch is missing
    assert [math.isnan(drop) for drop in drops] == [False] * known + [True] * (8 - known)
    assert "given up: RuntimeError" in callback.record.reasons["loss_drop"]
    assert "given up: RuntimeError" in str(callback.record.summary())


class Following(pl.LightningModule):
    """A teacher that is moved in the step, and weights that are not there before the first one."""

    def __init__(self, *, lazy: bool = False) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.student: nn.Module = nn.LazyLinear(1) if lazy else nn.Linear(4, 1)
        self.teacher = nn.Linear(4, 1).requires_grad_(False)
        self.double()
        self.starts: list[list[Tensor]] = []
        self.ends: list[list[Tensor]] = []

    def loss(self, batch: Batch) -> Tensor:
        if not isinstance(self.student, nn.LazyLinear):
            with torch.no_grad():
                self.teacher.weight.lerp_(self.student.weight, 0.3)
        x, y = batch
        return (self.student(x) - 0.5 * y - 0.5 * self.teacher(x)).square().mean()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.starts.append([p.detach().clone() for p in self.parameters() if not is_lazy(p)])

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.ends.append([p.detach().clone() for p in self.parameters()])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.student.parameters(), lr=0.05)


def test_each_batch_is_evaluated_at_the_same_weights(tmp_path: Path) -> None:
    """The teacher of the copy moves; the next batch finds it where it was."""
    data, callback, model = batches(6), quiet(probe_batches=3), Following()
    trainer(tmp_path, callback).fit(model, loader(data))

    def losses(weights: list[Tensor]) -> Tensor:
        found = []
        for batch in data[:3]:
            fresh = Following()
            with torch.no_grad():
                for parameter, value in zip(fresh.parameters(), weights, strict=True):
                    parameter.copy_(value)
                found.append(fresh.loss(batch))
        return torch.stack(found)

    fall = losses(model.starts[0]) - losses([p.detach() for p in model.parameters()])
    assert last_row(callback)["loss_drop"] == pytest.approx(float(fall.mean()), rel=EXACT)
    assert last_row(callback)["loss_drop_se"] == pytest.approx(float(fall.std()) / 3**0.5, rel=EXACT)


@pytest.mark.parametrize("size", [1, 3])
def test_lazy_weights_are_those_of_the_training(tmp_path: Path, size: int) -> None:
    """A copy that is taken before their first forward pass would draw others."""
    data, callback, model = batches(6), quiet(probe_batches=size), Following(lazy=True)
    model.teacher.requires_grad_(False).weight.data.zero_()
    trainer(tmp_path, callback).fit(model, loader(data))
    first, teacher = model.ends[0][:2], model.ends[0][2:]
    assert not isinstance(model.student, nn.LazyLinear)

    def loss(batch: Batch, weights: list[Tensor], mean: list[Tensor]) -> Tensor:
        weight = mean[0].lerp(weights[0], 0.3)
        x, y = batch
        linear = nn.functional.linear
        return (linear(x, *weights) - 0.5 * y - 0.5 * linear(x, weight, mean[1])).square().mean()

    now = [p.detach() for p in model.parameters()]
    fall = torch.stack([loss(b, first, teacher) - loss(b, now[:2], now[2:]) for b in data[:size]])
    assert last_row(callback)["loss_drop"] == pytest.approx(float(fall.mean()), rel=EXACT)


class Normed(Case):
    """Has buffers that are not there before the first forward pass."""

    def prepare(self) -> None:
        self.norm = nn.LazyBatchNorm1d(affine=False)

    def touch(self, batch: Any, batch_idx: int) -> Tensor:
        return self.norm(batch[0]).square().mean()


def test_lazy_buffers_are_waited_for(tmp_path: Path) -> None:
    callback = quiet(probe_batches=1)
    trainer(tmp_path, callback).fit(Normed(), Stream(data))
    assert math.isfinite(last_row(callback)["loss_drop"])


class Noisy(Regressor):
    """Noise from a generator of its own, of each kind."""

    def __init__(self) -> None:
        super().__init__(sgd(lr=0.0))
        self.torch, self.numpy, self.python = torch.Generator(), np.random.default_rng(1), random.Random(2)
        self.legacy = np.random.RandomState(3)

    def loss(self, batch: Batch) -> Tensor:
        drawn = torch.rand((), generator=self.torch) + self.numpy.random() + self.python.random() + self.legacy.rand()
        return super().loss(batch) * (drawn + torch.rand(()) + np.random.rand() + random.random())  # noqa: NPY002


class CopiesItself:
    """`copy.deepcopy` is not told of the generator that its copy holds."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __deepcopy__(self, memo: dict[int, Any]) -> "CopiesItself":
        own = torch.Generator()
        own.set_state(self.generator.get_state())
        return CopiesItself(own)

    def draw(self) -> Tensor:
        return torch.rand((), generator=self.generator)


class NoisyPart(Regressor):
    """Noise from generators deep within it, two of which share their bits."""

    def __init__(self) -> None:
        super().__init__(sgd(lr=0.0))
        bits = np.random.PCG64(1)
        self.held = {"shared": [np.random.Generator(bits), np.random.Generator(bits)]}
        self.part = CopiesItself(torch.Generator())

    def loss(self, batch: Batch) -> Tensor:
        drawn = sum(generator.random() for generator in self.held["shared"])
        return super().loss(batch) * (drawn + self.part.draw())


@pytest.mark.parametrize("kind", [Noisy, NoisyPart])
def test_generators_draw_the_same_numbers_at_both_ends(tmp_path: Path, kind: type[Regressor]) -> None:
    callback = quiet(probe_batches=3)
    trainer(tmp_path, callback).fit(kind(), loader(batches(6)))
    assert last_row(callback)["loss_drop"] == 0.0


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ([[i] for i in range(3000)], r"more than 3,000 objects: .*out of the module"),
        (np.zeros(51_000, np.int8), r"besides its parameters: .*out of it"),
        (torch.zeros(51_000, dtype=torch.int8), r"besides its parameters: .*out of it"),
        (torch.zeros(45_000, dtype=torch.int8), None),
        (torch.eye(2).to_sparse(), r"a tensor of torch\.sparse_coo can't be compared"),
    ],
    ids=["objects", "array", "tensor", "small", "sparse"],
)
def test_a_module_that_holds_data_is_not_copied(
    tmp_path: Path, held: Any, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many bytes as it has weights, and some more, are no data."""
    monkeypatch.setattr("lightning_speedlimit.callback.reach.MOST_OBJECTS", 3000)
    monkeypatch.setattr("lightning_speedlimit.callback.isolation.MOST_BYTES", 10_000)
    model, callback = Case(), quiet(probe_batches=2)
    model.register_buffer("table", torch.zeros(10_000))
    model.held = held
    with heard("gives up") as told:
        trainer(tmp_path, callback).fit(model, Stream(data))
    assert len(told) == (said is not None)
    assert said is None or re.search(rf"gives up probe_batches=2: .*{said}", told[0])
    assert math.isnan(last_row(callback)["loss_drop"]) == (said is not None)


def test_copies_are_freed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for the garbage collector, though the module refers to itself, and to the trainer."""
    made: list[weakref.ref[Tensor]] = []
    deep_copy = isolation.deep_copy

    def watched(value: Any, *memo: Any) -> Any:
        found = deep_copy(value, *memo)
        if isinstance(found, nn.Module):
            made.extend(weakref.ref(t) for t in (*found.parameters(), found.kept))
        return found

    monkeypatch.setattr(isolation, "deep_copy", watched)
    model, callback = Probed(), quiet(probe_batches=2)
    model.myself, model.kept = [model], torch.zeros(3)
    gc.collect()
    gc.disable()
    try:
        trainer(tmp_path, callback).fit(model, loader(batches(6)))
        kept = sum(found.numel() for found in (ref() for ref in made) if found is not None)
    finally:
        gc.enable()
    assert len(made) > 5 * 8
    assert kept == 0
    assert last_row(callback)["loss_drop_se"] > 0


@pytest.mark.mode(
    "probe_batches under manual optimization",
    "refused",
    "raises ValueError: probe_batches=… needs automatic optimization",
)
def test_manual_optimization_is_refused(tmp_path: Path) -> None:
    model = Regressor()
    model.automatic_optimization = False
    with pytest.raises(ValueError, match=r"probe_batches=2 needs automatic optimization.*monitor="):
        trainer(tmp_path, SpeedLimit(probe_batches=2, log_figures=False)).fit(model, loader(batches(2)))
