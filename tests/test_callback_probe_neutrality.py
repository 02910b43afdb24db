"""A probe changes no bit of a training, whatever its step touches: it runs on copies, or is given up and says so."""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from callback_cases import heard, last_row, quiet, trainer
from probe_cases import COMPILED, GIVEN_UP, ISOLATED, KINDS, Case, Reads, Stream, Whole, counted, data

from lightning_speedlimit import SpeedLimit

GAVE_UP = "SpeedLimit gives up probe_batches=2: "


class Watch(pl.Callback):
    """Bit by bit what there is at each end of a batch: weights, gradients, the generators, what the step left."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.look(module)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.look(module)

    def look(self, module: Case) -> None:
        weights = {} if module.lazy and not self.seen else module.state_dict()
        bits = {name: value.numpy().tobytes() for name, value in weights.items()}
        grads = [None if p.grad is None else p.grad.numpy().tobytes() for p in module.parameters()]
        self.seen.append((bits, grads, list(module.losses), generators(module)))


def generators(module: Case) -> list[Any]:
    numpy: Any = np.random.get_state()  # noqa: NPY002
    found = [torch.get_rng_state().numpy().tobytes(), numpy[1].tobytes(), numpy[2:], random.getstate()]
    if hasattr(module, "legacy"):
        own: Any = module
        found += [own.torch.get_state().tolist(), own.numpy.bit_generator.state, own.python.getstate()]
        found += [own.legacy.get_state()[1].tolist()]
    return found


def fit(folder: Path, kind: type[Case], *callbacks: Any, compiled: bool = False, batch: str = "tuple") -> Any:
    """What the training did, and the warnings of the callback."""
    model, watch, given = kind(), Watch(), data(batch)
    torch.manual_seed(1)
    np.random.seed(2)  # noqa: NPY002
    random.seed(3)
    run = trainer(folder, *callbacks, watch, log_every_n_steps=2, max_epochs=2, max_steps=9)
    with heard() as said:
        run.fit(torch.compile(model, backend=counted) if compiled else model, Stream(lambda: given))
    left = [vars(b) if hasattr(b, "x") and not isinstance(b, tuple) else b for b in given]
    attributes = sorted(vars(model))
    return (watch.seen, model.trace(), repr(left), attributes), said


def both(folder: Path, kind: type[Case], **options: Any) -> tuple[SpeedLimit, list[str]]:
    """The callback of a training that was the same, bit by bit, without it."""
    callback = quiet(probe_batches=2)
    without, _ = fit(folder / "without", kind, **options)
    got, said = fit(folder / "with", kind, callback, **options)
    assert got == without
    assert len(got[0]) > 15
    return callback, said


@pytest.mark.parametrize("kind", ISOLATED)
def test_a_probe_changes_nothing(tmp_path: Path, kind: type[Case]) -> None:
    callback, said = both(tmp_path, kind)
    assert said == []
    assert callback.record is not None
    assert "loss_drop" not in callback.record.reasons
    assert last_row(callback)["loss_drop_se"] > 0.0


@pytest.mark.skipif(not hasattr(torch.fx._symbolic_trace, "_is_fx_tracing_flag"), reason="this torch traces otherwise")
@pytest.mark.parametrize("kind", COMPILED)
def test_it_compiles_nothing_where_torch_can_not_be_told_to(
    tmp_path: Path, kind: type[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As before torch 2.6."""
    monkeypatch.delattr(torch.compiler, "set_stance", raising=False)
    callback, said = both(tmp_path, kind)
    assert said == []
    assert last_row(callback)["loss_drop_se"] > 0.0


@pytest.mark.mode(
    "probe_batches, a module or a step that can't be isolated",
    "refused",
    "SpeedLimit gives up probe_batches=2: …, with the reason; loss_drop and what rests on it are NaN",
)
@pytest.mark.parametrize("kind", GIVEN_UP)
def test_where_it_would_it_is_given_up_and_says_why(tmp_path: Path, kind: type[Case]) -> None:
    callback, said = both(tmp_path, kind)
    assert [text[: len(GAVE_UP)] for text in said] == [GAVE_UP]
    assert_undefined(callback)


def assert_undefined(callback: SpeedLimit) -> None:
    assert callback.record is not None
    row = last_row(callback)
    assert math.isnan(row["loss_drop"])
    assert math.isnan(row["efficiency"])
    assert math.isfinite(row["displacement"])
    assert callback.record.reasons["loss_drop"].startswith("probe_batches was given up: ")


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "tuple"])
def test_batches_of_any_type_are_left_alone(tmp_path: Path, kind: str) -> None:
    callback, said = both(tmp_path, Reads, batch=kind)
    if kind == "uncopyable":
        assert len(said) == 1
        assert "a batch can't be copied (TypeError: this batch can't be copied)" in said[0]
        assert_undefined(callback)
    else:
        assert said == []
        assert last_row(callback)["loss_drop_se"] > 0.0


@pytest.mark.slow
def test_a_compiled_module(tmp_path: Path) -> None:
    callback, said = both(tmp_path, Whole, compiled=True)
    assert said == []
    assert last_row(callback)["loss_drop_se"] > 0.0
