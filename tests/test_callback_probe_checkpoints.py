"""A probe in checkpoints: plain types and tensors, whatever the batches are; resumed exactly, or said to be lost."""

import enum
import io
import math
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from callback_cases import heard, last_row, quiet, repeatable, trainer
from probe_cases import KINDS, GlobalList, Pair, Reads, Stream, data
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_speedlimit import RunRecord, SpeedLimit
from lightning_speedlimit.callback.plain_batches import NotPlain, decoded, encoded, why_not_plain

PLAIN = ("tuple", "numpy")
CPU = torch.device("cpu")


def fit(folder: Path, callback: SpeedLimit, model: Any, kind: str, *, ckpt: Any = None) -> list[str]:
    """Two epochs of five steps, a checkpoint at the end of each; the warnings of the callback."""
    keep = ModelCheckpoint(folder, filename="{step}", save_top_k=-1)
    run = trainer(folder, callback, keep, max_epochs=2, log_every_n_steps=2, enable_checkpointing=True)
    with heard() as said:
        run.fit(model, Stream(lambda: data(kind)), ckpt_path=ckpt)
    return said


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_loads_everywhere_and_the_probe_goes_on_or_says_why_not(tmp_path: Path, kind: str) -> None:
    whole, resumed, ckpt = quiet(probe_batches=2), quiet(probe_batches=2), tmp_path / "step=5.ckpt"
    fit(tmp_path, whole, Reads(), kind)
    state = torch.load(ckpt, weights_only=True)["callbacks"]["SpeedLimit"]
    assert ("batches" in state["probe"]) == (kind in PLAIN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path, quiet(probe_batches=2)).test(
            Reads(), Stream(lambda: data(kind)), ckpt_path=ckpt, verbose=False
        )
        Reads.load_from_checkpoint(ckpt)
    said = fit(tmp_path / "resumed", resumed, Reads(), kind, ckpt=ckpt)
    assert whole.record is not None
    assert resumed.record is not None
    if kind in PLAIN:
        assert said == []
        for name, column in repeatable(whole.record.columns).items():
            np.testing.assert_array_equal(resumed.record.columns[name], column, err_msg=name)
        assert last_row(resumed)["loss_drop_se"] > 0.0
        return
    assert len(said) == 1
    assert "gives up probe_batches=2: a " in said[0]
    assert math.isnan(last_row(resumed)["loss_drop"])
    assert resumed.record.reasons["loss_drop"].startswith("probe_batches was given up: a ")
    assert last_row(resumed)["displacement"] == last_row(whole)["displacement"]


def test_a_probe_that_was_given_up_stays_so(tmp_path: Path) -> None:
    fit(tmp_path, quiet(probe_batches=2), GlobalList(), "tuple")
    resumed = quiet(probe_batches=2)
    said = fit(tmp_path / "resumed", resumed, GlobalList(), "tuple", ckpt=tmp_path / "step=5.ckpt")
    assert len(said) == 1
    assert "training_step changed something" in said[0]
    assert math.isnan(last_row(resumed)["loss_drop"])


class Augments(Reads):
    """Batches are kept as they enter the step: nothing is done to them again when a run is resumed."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] * 3, batch[1]


def test_what_is_done_to_a_batch_is_done_once(tmp_path: Path) -> None:
    whole, resumed = quiet(probe_batches=2), quiet(probe_batches=2)
    fit(tmp_path, whole, Augments(), "tuple")
    assert fit(tmp_path / "resumed", resumed, Augments(), "tuple", ckpt=tmp_path / "step=5.ckpt") == []
    assert last_row(resumed)["loss_drop"] == last_row(whole)["loss_drop"]


class Level(enum.IntEnum):
    LOW = 1


class Tagged(Tensor):
    """A class of tensors of one's own."""


def tagged() -> Tensor:
    found = torch.ones(2)
    found.kind = Level.LOW  # type: ignore[attr-defined]
    return found


FINE = [
    [1, -(2**63), 2**63 - 1, 0.5, math.inf, True, None, "é\ud800", ("a", [{}])],
    {"a": {1: 2, (1, "b"): torch.ones(2, dtype=torch.bfloat16)}, 0.5: None},
    [torch.ones(2, requires_grad=True), torch.zeros(2, 3).t(), torch.ones(1, dtype=torch.complex64), torch.tensor(1)],
]
UNFIT = [
    2**63, np.float64(1), np.ones(2), Level.LOW, Pair(torch.ones(1), torch.ones(1)), OrderedDict(), {1, 2}, b"a", 1j,
    Tagged(), tagged(), torch.ones(2, 2).to_sparse(), torch.nn.Parameter(torch.ones(1)), [[{"a": range(3)}]],
    {Level.LOW: 1}, torch.float32, CPU,
]  # fmt: skip


@pytest.mark.parametrize("state", FINE, ids=range(len(FINE)))
def test_what_is_called_plain_is_loaded_with_weights_only(state: Any) -> None:
    assert why_not_plain(state) is None
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert repr(torch.load(file, weights_only=True)) == repr(state)


@pytest.mark.parametrize("state", UNFIT, ids=lambda x: type(x).__name__)
def test_what_is_not_is_named(state: Any) -> None:
    assert why_not_plain([0, {"a": (state,)}])
    if not isinstance(state, (np.ndarray, np.generic)):
        with pytest.raises(NotPlain):
            encoded({"a": state}, CPU)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.uint16).reshape(2, 3).T,
        np.array([1.5, math.nan], dtype=">f8"),
        np.array(["a", "bcd"]),
        np.array(["2020-01-01"], dtype="datetime64[D]"),
        np.zeros((0, 3), np.float32),
        np.array(2, np.int8),
        np.float32(0.1),
        np.bool_(True),
        np.longdouble(1) / 3,
        np.ones(2, dtype=[("a", "f4"), ("b", "U2")]),
    ],
    ids=str,
)
def test_arrays_come_back_as_they_were(array: Any) -> None:
    state = encoded([array], CPU)
    assert why_not_plain(state) is None
    (found,) = decoded(state, CPU)
    assert type(found) is type(array)
    assert found.dtype == array.dtype
    assert found.shape == array.shape
    if isinstance(array, np.ndarray):
        assert found.tobytes() == array.tobytes()
        assert found.flags.writeable
    else:
        assert found == array  # a long double has bytes that mean nothing


@pytest.mark.parametrize(
    "array",
    [np.array([object()]), np.zeros(2, dtype=[("a", object)]), np.ma.array([1.0, 2.0], mask=[0, 1])],
    ids=["objects", "records of objects", "masked"],
)
def test_arrays_of_other_kinds_are_not_taken(array: Any) -> None:
    with pytest.raises(NotPlain, match=r"numpy"):
        encoded(array, CPU)


def test_a_state_that_is_not_plain_is_not_handed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said once; the checkpoint holds the training."""
    plainly = RunRecord.state_dict
    monkeypatch.setattr(RunRecord, "state_dict", lambda record: plainly(record) | {"mine": np.float64(1)})
    callback = quiet()
    said = fit(tmp_path, callback, Reads(), "tuple")
    assert len(said) == 1
    assert "could not put its state in a checkpoint" in said[0]
    assert "numpy.float64" in said[0]
    assert "SpeedLimit" not in torch.load(tmp_path / "step=5.ckpt", weights_only=True)["callbacks"]
    assert last_row(callback)["step"] == 10
