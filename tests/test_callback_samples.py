"""Samples, tokens and epochs of each row: against sums over the batches that the training was given."""

import dataclasses
import itertools
import math
import warnings
from collections import UserDict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from callback_cases import Regressor, Resumable, batches, last_row, loader, quiet, sgd, trainer
from torch import Tensor, nn

from lightning_speedlimit import SpeedLimit
from lightning_speedlimit.callback import lightning
from lightning_speedlimit.callback.batch_size import SampleCount, samples_of, tokens_of

SIZES = [6, 6, 6, 6, 6, 6, 3]  # of an epoch; the last batch is smaller, and alone in a window of three


def uneven() -> list[tuple[Tensor, Tensor]]:
    return [(x[:size], y[:size]) for (x, y), size in zip(batches(len(SIZES), size=max(SIZES)), SIZES, strict=True)]


def column(callback: SpeedLimit, name: str) -> list[float]:
    assert callback.record is not None
    return [float(value) for value in callback.record.columns[name]]


def sums_of_windows(sizes: list[int], window: int, epochs: int) -> list[int]:
    """Samples after each joint step; a window does not reach into the next epoch."""
    steps = [sum(sizes[k : k + window]) for _ in range(epochs) for k in range(0, len(sizes), window)]
    return list(itertools.accumulate(steps))


# --- one batch


@dataclasses.dataclass
class Graph:
    name: str
    nodes: Tensor


ROWS = torch.zeros(5, 2)


@pytest.mark.parametrize(
    "batch",
    [
        ROWS,
        (ROWS, torch.zeros(7)),
        ["text", [ROWS], 3],
        {"label": torch.tensor(1.0), "x": ROWS},  # a tensor without a dimension tells nothing
        UserDict({"input": ROWS}),  # as BatchEncoding
        Graph("one", ROWS),
        {"all": [Graph("two", ROWS)]},
        nn.utils.rnn.pack_sequence([torch.zeros(9 - k, 2) for k in range(5)]),
        torch.zeros(5, 2).to_sparse(),
    ],
)
def test_samples_are_the_first_dimension_of_the_first_tensor(batch: Any) -> None:
    assert samples_of(batch) == 5


def test_what_has_no_tensor_has_no_samples_and_is_not_used_up() -> None:
    stream = iter([ROWS, ROWS])
    for batch in ("text", None, 3, [], {"a": ["b"]}, stream, Graph):
        assert samples_of(batch) is None
        assert tokens_of(batch) == 0
    assert len(list(stream)) == 2
    assert samples_of(torch.tensor(2.0)) == 1  # as Lightning has it


def test_tokens_are_the_elements_of_a_table_of_whole_numbers_that_comes_first() -> None:
    ids = torch.zeros(3, 8, dtype=torch.int64)
    assert tokens_of({"ids": ids, "labels": ids[:, :2]}) == 24
    assert tokens_of({"image": torch.zeros(3, 8), "labels": ids}) == 0  # several labels of each image
    assert tokens_of((ids.int(),)) == 24
    for other in (ids.bool(), ids.byte(), ids[0], ids[None], ids.float()):
        assert tokens_of([other]) == 0


class Endless(dict[str, Any]):
    """A mapping that holds itself."""

    def values(self) -> Any:
        return [self]


class Locked(dict[str, Any]):
    def values(self) -> Any:
        raise PermissionError("not for you")


@pytest.mark.parametrize("kind", [Endless, Locked])
def test_a_batch_that_can_not_be_looked_into_ends_nothing(kind: Any) -> None:
    fake = SimpleNamespace(world_size=1, num_training_batches=4, train_dataloader=None)
    count = SampleCount(None, fake)
    count.begin(fake, kind())
    count.end(fake, kind())
    count.close(stepped=True)
    assert math.isnan(count.columns()["samples"])
    assert kind.__name__ in count.reasons["samples"]


def saying(size: int) -> SimpleNamespace:
    return SimpleNamespace(batch_size=size)


def sampling(size: int) -> SimpleNamespace:
    """A loader with a batch sampler of one's own says no size itself."""
    return SimpleNamespace(batch_size=None, batch_sampler=SimpleNamespace(batch_size=size))


def another_loader(fake: SimpleNamespace) -> None:
    fake.train_dataloader = saying(4)


def another_sampler(fake: SimpleNamespace) -> None:
    fake.train_dataloader.batch_sampler = saying(4)


def another_size(fake: SimpleNamespace) -> None:
    fake.train_dataloader.batch_sampler.batch_size = 4


def another_size_of_the_loader(fake: SimpleNamespace) -> None:
    fake.train_dataloader.batch_size = 4


@pytest.mark.parametrize(
    ("begun", "change", "rows", "said"),
    [
        (saying, None, 12, 8),
        (saying, another_loader, 8, 4),
        (saying, another_size_of_the_loader, 8, 4),
        (sampling, None, 12, 8),
        (sampling, another_loader, 8, 4),
        (sampling, another_sampler, 8, 4),
        (sampling, another_size, 8, 4),
    ],
)
def test_batches_that_are_no_longer_as_the_loader_says(begun: Any, change: Any, rows: int, said: int) -> None:
    fake = SimpleNamespace(world_size=1, num_training_batches=4, is_last_batch=False, train_dataloader=begun(8))
    count = SampleCount(None, fake)
    for _ in range(2):
        count.begin(fake, torch.zeros(8, 3))
    assert not count.reasons
    if change is not None:
        change(fake)
    count.begin(fake, torch.zeros(rows, 3))
    assert f"{rows} rows, where the DataLoader says {said} samples" in count.reasons["samples"]


# --- trainings


@pytest.mark.parametrize("window", [1, 3])
def test_rows_hold_the_sums_of_their_windows(tmp_path: Path, window: int) -> None:
    callback = quiet()
    trainer(tmp_path, callback, max_epochs=2, accumulate_grad_batches=window).fit(Regressor(), loader(uneven()))
    wanted = sums_of_windows(SIZES, window, 2)
    assert column(callback, "samples") == wanted
    per_epoch = len(wanted) // 2
    ends = [min((k + 1) * window, len(SIZES)) / len(SIZES) for k in range(per_epoch)]
    assert column(callback, "epochs") == pytest.approx([e + end for e in (0, 1) for end in ends], rel=1e-14)
    assert callback.record is not None
    assert callback.record.run["samples_per_step"] == pytest.approx(wanted[-1] / len(wanted), rel=1e-14)
    assert "tokens" not in callback.record.columns
    assert "tokens_per_step" not in callback.record.run
    assert not {"samples", "epochs"} & callback.record.reasons.keys()


def test_rows_between_log_steps_are_left_out_and_nothing_else(tmp_path: Path) -> None:
    callback = quiet()
    trainer(tmp_path, callback, log_every_n_steps=2).fit(Regressor(), loader(uneven()))
    wanted = dict(enumerate(sums_of_windows(SIZES, 1, 1), 1))
    assert column(callback, "samples") == [wanted[int(step)] for step in column(callback, "step")]


class Language(Regressor):
    def loss(self, batch: Any) -> Tensor:
        x = batch["ids"].double()[:, :4]
        return super().loss((x, x.sum(1, keepdim=True)))


def test_tokens_are_counted_where_there_are_some(tmp_path: Path) -> None:
    data: Any = [{"ids": torch.randint(2, (rows, 4 + rows))} for rows in (3, 3, 2)]
    callback = quiet()
    trainer(tmp_path, callback).fit(Language(sgd(lr=1e-3)), loader(data))
    assert column(callback, "samples") == [3, 6, 8]
    assert column(callback, "tokens") == [21, 42, 54]
    assert callback.record is not None
    assert callback.record.run["tokens_per_step"] == 18
    assert callback.record.run["samples_per_step"] == pytest.approx(8 / 3)


class Adversaries(Regressor):
    """Two optimizers by hand; the first steps twice in each batch."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.automatic_optimization, self.times = False, times

    def configure_optimizers(self) -> Any:
        parts = (self.first, self.second)
        return [self.tape.follow(torch.optim.SGD(part.parameters(), lr=0.02)) for part in parts]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for _ in range(self.times - 1):
            self.zero_grad()
            self.manual_backward(self.loss(batch))
            self.optimizers()[0].step()  # type: ignore[index, union-attr]
        loss = self.loss(batch)
        self.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()
        return loss.detach()


@pytest.mark.parametrize("times", [1, 2])
def test_several_optimizers_by_hand_share_the_samples_of_a_batch(tmp_path: Path, times: int) -> None:
    callback = quiet()
    trainer(tmp_path, callback).fit(Adversaries(times), loader(uneven()))
    assert column(callback, "samples") == list(itertools.accumulate(SIZES))
    assert callback.record is not None
    steps = column(callback, "step")[-1]
    assert callback.record.run["samples_per_step"] == pytest.approx(sum(SIZES) / steps)


def test_steps_by_hand_every_second_batch_have_the_samples_of_both(tmp_path: Path) -> None:
    class Accumulating(Regressor):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.manual_backward(loss)
            if batch_idx % 2:
                self.optimizers().step()  # type: ignore[union-attr]
                self.zero_grad()
            return loss.detach()

    callback = quiet()
    model = Accumulating()
    trainer(tmp_path, callback).fit(model, loader(uneven()))
    assert column(callback, "samples") == [12, 24, 36]  # the last batch belongs to a step that never came


class Schedule(pl.Callback):
    """Sets the batch size of a sampler in place, at the start of an epoch or in its middle."""

    def __init__(self, sampler: Any, sizes: dict[int, int], *, batch: int = 0) -> None:
        self.sampler, self.sizes, self.batch = sampler, sizes, batch

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if not self.batch:
            self.change(trainer)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if self.batch and batch_idx == self.batch:
            self.change(trainer)

    def change(self, trainer: Any) -> None:
        self.sampler.batch_size = self.sizes.get(trainer.current_epoch, self.sampler.batch_size)


ROWS_THERE = 24


def scheduled(folder: Path, sizes: dict[int, int], *, batch: int = 0, epochs: int = 3) -> SpeedLimit:
    """24 samples in batches of 4, until the schedule says otherwise."""
    data = torch.utils.data.TensorDataset(*(torch.cat(part) for part in zip(*batches(4), strict=True)))
    sampler = torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(data), 4, drop_last=False)
    callback, loads = quiet(), torch.utils.data.DataLoader(data, batch_sampler=sampler)
    schedule = Schedule(sampler, sizes, batch=batch)
    trainer(folder, schedule, callback, max_epochs=epochs).fit(Regressor(), loads)
    return callback


DATA = ("batch_size", "batches_per_epoch", "samples_without_replacement")


@pytest.mark.parametrize(
    ("sizes", "batch", "counts", "wanted"),
    [
        ({}, 0, [4] * 18, (4, 6, ROWS_THERE)),
        ({1: 8}, 0, [4] * 6 + [8] * 6, (None, None, ROWS_THERE)),
        ({1: 8, 2: 4}, 0, [4] * 6 + [8] * 3 + [4] * 6, (None, None, ROWS_THERE)),
        ({0: 8}, 0, [8] * 9, (8, 3, ROWS_THERE)),  # before the first step
        ({1: 2}, 0, [4] * 6 + [2] * 12, (None, None, ROWS_THERE)),  # Lightning ends epochs as long as the first
    ],
)
def test_a_batch_size_that_changes_in_place_is_none_of_the_runs(
    tmp_path: Path, sizes: dict[int, int], batch: int, counts: list[int], wanted: tuple[int | None, ...]
) -> None:
    record = scheduled(tmp_path, sizes, batch=batch).record
    assert record is not None
    assert record.columns["samples"].tolist() == list(itertools.accumulate(counts))
    assert tuple(record.run[name] for name in DATA) == wanted
    assert record.columns["epochs"][-1] == pytest.approx(3, rel=1e-14)  # each as long as it was


def test_a_batch_size_that_changes_within_an_epoch(tmp_path: Path) -> None:
    """The batches still to come were drawn already: they are not as the sampler says."""
    record = scheduled(tmp_path, {0: 6}, batch=4, epochs=1).record
    assert record is not None
    assert record.columns["samples"].tolist() == list(range(4, 25, 4))
    assert record.run["batch_size"] is None
    assert "4 rows, where the DataLoader says 6 samples" in record.reasons["samples"]


def test_what_trial_steps_drew_is_none_of_the_data() -> None:
    """A state holds what was said until then, and takes back what was said since."""
    fake = SimpleNamespace(world_size=1, num_training_batches=4, is_last_batch=False, train_dataloader=sampling(8))
    count = SampleCount(None, fake)
    count.begin(fake, torch.zeros(8, 3), first=True)
    state = count.state(stepped=False)
    fake.train_dataloader.batch_sampler.batch_size = 4
    count.begin(fake, torch.zeros(4, 3), first=True)
    assert count.described()["batch_size"] is None
    count.load(state)
    assert count.described()["batch_size"] == 8
    resumed = SampleCount(None, fake)  # with a loader of another size
    resumed.load(state)
    resumed.begin(fake, torch.zeros(4, 3), first=True)
    assert resumed.described()["batch_size"] is None


def test_what_is_told_overrides_what_is_found(tmp_path: Path) -> None:
    callback = quiet(samples_per_batch=20)
    trainer(tmp_path, callback, accumulate_grad_batches=2).fit(Regressor(), loader(uneven()))
    assert column(callback, "samples") == [40, 80, 120, 140]
    assert callback.record is not None
    assert callback.record.run["samples_per_step"] == 35


@pytest.mark.parametrize("bad", [0, -3, True, 2.0, "8", 2**63])
def test_samples_per_batch_is_checked(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"samples_per_batch got .*, wanted a whole number"):
        SpeedLimit(samples_per_batch=bad)


class Boxed(nn.Module):
    """No mapping, no list: what is in it can't be known."""

    def __init__(self, pair: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.pair = pair


class Unboxing(Regressor):
    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch.pair)


def test_an_unknown_batch_is_nan_with_its_reason_and_without_a_warning(tmp_path: Path) -> None:
    data: Any = [Boxed(pair) for pair in uneven()]
    callback, told = quiet(), quiet(samples_per_batch=6)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer(tmp_path, callback, log_every_n_steps=3).fit(Unboxing(), loader(data))
    assert not [str(w.message) for w in said if "batch_size" in str(w.message) or "SpeedLimit" in str(w.message)]
    assert all(math.isnan(value) for value in column(callback, "samples"))
    assert column(callback, "epochs")[-1] == pytest.approx(1)
    assert callback.record is not None
    why = "no tensor was found in a batch, which is a Boxed; SpeedLimit(samples_per_batch=…) tells it"
    assert callback.record.reasons["samples"] == why
    assert "samples_per_step" not in callback.record.run
    trainer(tmp_path, told).fit(Unboxing(), loader(data))
    assert column(told, "samples")[-1] == 42


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(uneven())


def test_a_stream_has_no_epochs_to_count(tmp_path: Path) -> None:
    callback = quiet()
    trainer(tmp_path, callback).fit(Regressor(), torch.utils.data.DataLoader(Stream(), batch_size=None))
    assert column(callback, "samples") == list(itertools.accumulate(SIZES))
    assert all(math.isnan(value) for value in column(callback, "epochs"))
    assert callback.record is not None
    assert callback.record.reasons["epochs"] == "the training's data have no length"


def test_a_loader_that_says_otherwise_is_told_of(tmp_path: Path) -> None:
    """Sequences before samples: the first dimension is time."""

    class TimeFirst(Regressor):
        def loss(self, batch: Any) -> Tensor:
            return super().loss(tuple(part.transpose(0, 1).flatten(0, 1) for part in batch))  # type: ignore[arg-type]

    x, y = torch.randn(10, 3, 4, dtype=torch.float64), torch.randn(10, 3, 1, dtype=torch.float64)
    data = torch.utils.data.TensorDataset(x, y)

    def turned(items: Any) -> Any:
        return tuple(torch.stack(part, 1) for part in zip(*items, strict=True))

    callback = quiet()
    trainer(tmp_path, callback).fit(TimeFirst(), torch.utils.data.DataLoader(data, batch_size=4, collate_fn=turned))
    assert callback.record is not None
    assert "has 3 rows, where the DataLoader says 4 samples" in callback.record.reasons["samples"]
    plain = quiet()
    model = TimeFirst()
    trainer(tmp_path, plain).fit(model, torch.utils.data.DataLoader(data, batch_size=4))  # the last one has 2
    assert plain.record is not None
    assert "samples" not in plain.record.reasons
    assert column(plain, "samples") == [4, 8, 10]


def test_a_step_that_takes_the_iterator(tmp_path: Path) -> None:
    """The batch is known at its end alone, and the iterator is left as it is."""

    class Taking(Regressor):
        def training_step(self, dataloader_iter: Any) -> Any:
            batch, _, _ = next(dataloader_iter)
            return self.loss(batch)

    callback, model = quiet(), Taking()
    trainer(tmp_path, callback).fit(model, loader(uneven()))
    assert column(callback, "samples") == list(itertools.accumulate(SIZES))


def test_a_batch_that_is_skipped_costs_nothing(tmp_path: Path) -> None:
    class Skipping(Regressor):
        """Ends the first epoch before its fourth batch."""

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 3 and self.current_epoch == 0 else None

    callback = quiet()
    trainer(tmp_path, callback, max_epochs=2).fit(Skipping(), loader(uneven()))
    assert column(callback, "samples")[-1] == sum(SIZES[:3]) + sum(SIZES)


def test_steps_that_the_loss_scaler_skips_are_paid_for_and_are_no_steps() -> None:
    fake = SimpleNamespace(world_size=1, num_training_batches=4, train_dataloader=None)
    count = SampleCount(None, fake)
    for stepped in (True, False, True):
        count.begin(fake, ROWS)
        count.end(fake, ROWS)
        count.close(stepped=stepped)
    assert count.columns() == {"samples": 15, "epochs": 0.75}
    assert count.per_step(2) == {"samples_per_step": 5}


# --- resumed


def saved_by(folder: Path, at: int) -> pl.Callback:
    class Saving(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if module.tape.batch == at:
                trainer.save_checkpoint(folder / "saved.ckpt")

    return Saving()


@pytest.mark.parametrize("early", [False, True], ids=["after ours", "before ours"])
@pytest.mark.parametrize("at", [5, 6, 8])  # at the end of a window; at an epoch's last, short one; within one
def test_a_resumed_fit_goes_on_counting(tmp_path: Path, at: int, early: bool) -> None:
    options = {"max_epochs": 3, "accumulate_grad_batches": 3}
    whole, resumed = quiet(), quiet()
    saving = saved_by(tmp_path, at)
    callbacks = [saving, whole] if early else [whole, saving]
    trainer(tmp_path, *callbacks, **options).fit(Regressor(), Resumable(uneven()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path, resumed, **options).fit(Regressor(), Resumable(uneven()), ckpt_path=tmp_path / "saved.ckpt")
    assert whole.record is not None
    assert resumed.record is not None
    assert column(whole, "samples")[-1] == 3 * sum(SIZES)
    for name in ("samples", "epochs"):
        values = dict(zip(column(whole, "step"), column(whole, name), strict=True))
        again = dict(zip(column(resumed, "step"), column(resumed, name), strict=True))
        # Between two hooks of one batch the window under way is not known to be whole.
        if not (early and at == 8):
            assert again == pytest.approx({step: values[step] for step in again}, rel=1e-12), name
    if not (early and at == 8):
        assert resumed.record.run["samples_per_step"] == whole.record.run["samples_per_step"]


def test_a_checkpoint_of_a_version_that_did_not_count(tmp_path: Path) -> None:
    first, resumed = quiet(), quiet()
    trainer(tmp_path, first, saved_by(tmp_path, 4)).fit(Regressor(), Resumable(uneven()))
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    del saved["callbacks"]["SpeedLimit"]["samples"]
    torch.save(saved, tmp_path / "old.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path, resumed).fit(Regressor(), Resumable(uneven()), ckpt_path=tmp_path / "old.ckpt")
    assert math.isnan(column(resumed, "samples")[-1])
    assert resumed.record is not None
    assert resumed.record.reasons["samples"] == "resumed from a checkpoint without it"


def test_a_state_that_is_no_count_is_refused() -> None:
    fake = SimpleNamespace(world_size=1)
    good = SampleCount(None, fake).state(stepped=False)
    with pytest.raises(ValueError, match="wanted three of each"):
        SampleCount(None, fake).load(good | {"window": [1.0]})


class Trial(pl.Callback):
    """Within the fourth batch, before or after its step: three steps that are undone, as a tuner's are."""

    def __init__(self, path: Path, when: str) -> None:
        self.path, self.when = path, when

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.go("start", trainer, module, batch, batch_idx)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.go("end", trainer, module, batch, batch_idx)

    def go(self, when: str, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if when != self.when or batch_idx != 3:
            return
        trainer.save_checkpoint(self.path)
        for _ in range(3):
            module.zero_grad()
            module.loss(batch).backward()
            trainer.optimizers[0].step()
        trainer._checkpoint_connector.restore(self.path)


@pytest.mark.parametrize("when", ["start", "end"])
@pytest.mark.parametrize("ours_first", [False, True])
def test_what_a_trial_used_is_taken_back_with_the_weights(tmp_path: Path, ours_first: bool, when: str) -> None:
    callback, trial = quiet(), Trial(tmp_path / "before.ckpt", when)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path, *([callback, trial] if ours_first else [trial, callback])).fit(Regressor(), loader(uneven()))
    sums = list(itertools.accumulate(SIZES))
    assert column(callback, "samples") == [sums[int(step) - 1] for step in column(callback, "step")]
    assert column(callback, "samples")[-1] == sum(SIZES)


def test_a_second_fit_counts_from_where_it_starts(tmp_path: Path) -> None:
    model, callback = Regressor(), quiet()
    run = trainer(tmp_path, callback)
    run.fit(model, loader(uneven()))
    run.fit_loop.max_epochs = 2
    run.fit(model, loader(uneven()))
    assert column(callback, "samples") == list(itertools.accumulate(SIZES))
    assert column(callback, "epochs")[-1] == pytest.approx(1)


# --- processes


def test_a_strategy_that_does_not_tell_is_named() -> None:
    class Odd:
        """World of 4, and not a word of who has samples of its own."""

    fake = SimpleNamespace(world_size=4, strategy=Odd(), num_training_batches=2, train_dataloader=None)
    assert lightning.data_parallel_processes(fake) is None
    count = SampleCount(8, fake)
    count.begin(fake, ROWS)
    count.end(fake, ROWS)
    count.close(stepped=True)
    assert math.isnan(count.columns()["samples"])
    assert count.reasons["samples"] == "Odd does not tell how many processes have samples of their own"
    assert count.per_step(1) == {}


@pytest.mark.parametrize(("size", "epochs"), [(2, 1), (2, 2), (3, 1), (6, 1)])
def test_the_loss_of_a_short_last_batch_is_left_out(tmp_path: Path, size: int, epochs: int) -> None:
    """Of less than half the samples of the one before: the line through the last two losses passes it by."""
    callback, model = quiet(), Regressor()
    data = [*batches(9), *batches(1, seed=2, size=size)]
    trainer(tmp_path, callback, max_epochs=epochs).fit(model, loader(data))
    losses = model.tape.losses
    last = 3.0 * losses[-2] - 2.0 * losses[-3] if size == 2 else 2.0 * losses[-1] - losses[-2]
    assert last_row(callback)["loss_drop"] == pytest.approx(losses[0] - last, rel=1e-9)


def test_smaller_batches_from_one_epoch_on_have_their_losses(tmp_path: Path) -> None:
    callback, model = quiet(), Regressor()

    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader(batches(5, size=6 if self.trainer.current_epoch == 0 else 2))  # type: ignore[union-attr]

    trainer(tmp_path, callback, max_epochs=2, reload_dataloaders_every_n_epochs=1).fit(model, Data())
    losses = model.tape.losses
    assert callback.record is not None
    for step in (6, 10):
        drop = callback.record.columns["loss_drop"][step - 1]
        assert drop == pytest.approx(losses[0] - (2.0 * losses[step - 1] - losses[step - 2]), rel=1e-9)


def test_a_short_batch_in_a_window_of_several_has_its_loss(tmp_path: Path) -> None:
    callback, model = quiet(), Regressor()
    data = [*batches(7), *batches(1, seed=2, size=2)]
    trainer(tmp_path, callback, accumulate_grad_batches=2).fit(model, loader(data))
    means = [(a + b) / 2.0 for a, b in zip(model.tape.losses[::2], model.tape.losses[1::2], strict=True)]
    assert last_row(callback)["loss_drop"] == pytest.approx(means[0] - (2.0 * means[-1] - means[-2]), rel=1e-9)
