"""What the joint steps of a training cost in data: samples, tokens and epochs, from the shapes of its batches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_speedlimit.callback import lightning, training_data
from lightning_speedlimit.checks.guard import look

SAMPLES, TOKENS, EPOCHS = "samples", "tokens", "epochs"
_CURE = "SpeedLimit(samples_per_batch=…) tells it"
_INDICES = (torch.int32, torch.int64)

Amounts = tuple[float, float, float]  # samples, tokens, epochs
_NOTHING: Amounts = (0.0, 0.0, 0.0)


class SampleCount:
    """Samples, tokens and epochs of all processes. Reads shapes alone: no sync, nothing sent.

    A batch counts when its accumulation window ends, be it with a step or with one that the loss scaler skipped. Every
    process is taken to have as many samples as this one.

    Args:
        per_batch: samples of one batch of one process; None: the first dimension of the first tensor in it.

    Attributes:
        reasons: name → why it is NaN, or what to beware of.
        share: samples of the last batch over those of the one before, where it alone made its step; else NaN.
    """

    def __init__(self, per_batch: int | None, trainer: Any) -> None:
        self._per_batch = per_batch
        self._processes = lightning.data_parallel_processes(trainer)
        self.reasons: dict[str, str] = {}
        self.share = math.nan
        self._total = self._of_steps = self._window = _NOTHING
        self._before = math.nan  # samples of the last batch
        self._batch: tuple[int, Amounts] | None = None  # that is under way: its id, and what it costs
        self._counted = False  # a state that was loaded had it already
        self._data: dict[str, Any] = {}  # what the loader said of them; None of what it has not always said
        self._said: int | None = None  # the loader's batch size
        self._length: float | None = None  # batches in this epoch; None: not asked yet

    def begin(self, trainer: Any, batch: Any, *, first: bool = False) -> None:
        """A batch, as its hooks see it before the step. first: of its epoch."""
        self._counted = False
        if first:  # another loader may have come, or this one have changed
            self._length = None
        self._batch = None if batch is None else (id(batch), self._amounts(trainer, batch))

    def end(self, trainer: Any, batch: Any) -> None:
        """That batch; under `training_step(dataloader_iter)` it is known only now."""
        if not self._counted:
            known = self._batch is not None and self._batch[0] == id(batch)
            cost = self._batch[1] if known and self._batch is not None else self._amounts(trainer, batch)
            self._window = _added(self._window, cost)
            alone = self._window == cost  # in its window
            self.share, self._before = cost[0] / self._before if alone and self._before else math.nan, cost[0]
        self._batch, self._counted = None, False

    def close(self, *, stepped: bool) -> None:
        """The window ends."""
        self._total = _added(self._total, self._window)
        if stepped:
            self._of_steps = _added(self._of_steps, self._window)
        self._window = _NOTHING

    def columns(self) -> dict[str, float]:
        """Of the windows that have ended; tokens where there are any."""
        found = dict(zip((SAMPLES, TOKENS, EPOCHS), self._total, strict=True))
        return {name: value for name, value in found.items() if name != TOKENS or value}

    def described(self) -> dict[str, Any]:
        """What holds of the data of all steps so far; None where it has changed, or is not known."""
        return dict(self._data)

    def per_step(self, steps: int) -> dict[str, float]:
        """Means over the joint steps, `samples_per_step` and `tokens_per_step`; those that are known."""
        means = {f"{name}_per_step": self._of_steps[i] / steps for i, name in enumerate((SAMPLES, TOKENS))}
        return {name: int(v) if v == int(v) else v for name, v in means.items() if math.isfinite(v) and v > 0}

    # -- state -----------------------------------------------------------------------------------------------

    def state(self, *, stepped: bool) -> dict[str, Any]:
        """For a checkpoint. stepped: the batch under way has made its step, and its end is not to come again."""
        total, of_steps, window = self._total, self._of_steps, self._window
        counted = stepped and self._batch is not None
        if counted and self._batch is not None:
            window = _added(window, self._batch[1])
            total, of_steps, window = _added(total, window), _added(of_steps, window), _NOTHING
        sums = {"total": list(total), "of_steps": list(of_steps), "window": list(window)}
        return sums | {"counted": counted, "reasons": dict(self.reasons), "data": dict(self._data)}

    def load(self, state: dict[str, Any] | None) -> None:
        """What `state` returned; None: of a version that did not count."""
        if state is None:
            self._total = self._of_steps = (math.nan, math.nan, math.nan)
            why = "resumed from a checkpoint without it"
            self.reasons = {SAMPLES: why, EPOCHS: why}
            return
        total, of_steps, window = (tuple(map(float, state[name])) for name in ("total", "of_steps", "window"))
        if not len(total) == len(of_steps) == len(window) == len(_NOTHING):
            raise ValueError(f"the counts of samples, tokens and epochs got {state!r:.80}, wanted three of each")
        self._total, self._of_steps, self._window = total, of_steps, window  # type: ignore[assignment]
        self._counted, self.reasons = bool(state["counted"]), dict(state["reasons"])
        self._data = dict(state.get("data", {}))

    # -- one batch -------------------------------------------------------------------------------------------

    def _amounts(self, trainer: Any, batch: Any) -> Amounts:
        samples = self._per_batch or look(samples_of, None, batch)
        if samples is None:
            self.reasons[SAMPLES] = f"no tensor was found in a batch, which is a {type(batch).__name__}; {_CURE}"
        elif self._per_batch is None:
            self._compare(samples, trainer)
        if self._processes is None:
            strategy = type(trainer.strategy).__name__
            self.reasons[SAMPLES] = f"{strategy} does not tell how many processes have samples of their own"
        length = self._batches_in_epoch(trainer)
        if math.isnan(length):
            self.reasons[EPOCHS] = "the training's data have no length"
        times = math.nan if self._processes is None else self._processes
        tokens = 0 if self._per_batch else look(tokens_of, 0, batch)
        return (math.nan if samples is None else samples * times), (tokens * times if tokens else 0.0), 1.0 / length

    def _batches_in_epoch(self, trainer: Any) -> float:
        """NaN where their number is not known."""
        if self._length is None:
            length = look(training_data.training_batches, math.nan, trainer)
            self._length = length if 0 < length < math.inf else math.nan
            now = training_data.described(trainer)
            self._data = {name: value if self._data.get(name, value) == value else None for name, value in now.items()}
        return self._length

    def _compare(self, samples: int, trainer: Any) -> None:
        """With what the DataLoader says; its last batch may have fewer."""
        said = look(training_data.batch_size, None, trainer)
        if said != self._said:  # a schedule may change it in place, within an epoch too
            self._said, self._length = said, None
        if said is not None and (samples > said or (samples < said and not look(_is_last, True, trainer))):
            told = f"a batch's first tensor has {samples} rows, where the DataLoader says {said} samples"
            self.reasons.setdefault(SAMPLES, f"counted by rows: {told}; {_CURE}")


def samples_of(batch: Any) -> int | None:
    """The first dimension of the first tensor that has one, as Lightning takes it; None where there is no tensor."""
    found = next((t.size(0) for t in _tensors(batch) if t.ndim), None)
    return next((1 for _ in _tensors(batch)), None) if found is None else found


def tokens_of(batch: Any) -> int:
    """The elements of the first tensor where it is 2-D and of whole numbers, padding too; else 0."""
    first = next(_tensors(batch), None)
    return first.numel() if first is not None and first.ndim == 2 and first.dtype in _INDICES else 0


def _tensors(batch: Any) -> Iterator[Tensor]:
    """In order; iterators and other iterables are let alone: to look into one may use it up."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, PackedSequence):  # its data are those of all times in one row
        yield batch.data[: int(batch.batch_sizes[0])]  # sizes are kept on the host
    elif isinstance(batch, Mapping | list | tuple):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for field in dataclasses.fields(batch):
            yield from _tensors(getattr(batch, field.name))


def _is_last(trainer: Any) -> bool:
    return bool(trainer.is_last_batch)


def _added(one: Amounts, other: Amounts) -> Amounts:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]
