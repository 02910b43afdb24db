"""A resumed run's record equals that of the uninterrupted run, or says what it cannot know."""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from callback_cases import EXACT, Regressor, Resumable, batches, last_row, quiet, repeatable, sgd, trainer
from packaging.version import Version
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_speedlimit import RunRecord
from lightning_speedlimit.record.latest import latest
from lightning_speedlimit.record.tuning import TUNING

PER_EPOCH, STEPS = 8, 24

OPTIMIZERS = {
    "SGD momentum": sgd(momentum=0.9, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}


def fit(
    folder: Path,
    callback: Any,
    optimizer: Any,
    *,
    width: int = 5,
    ckpt: Any = None,
    at: int | None = None,
    **options: Any,
) -> Any:
    """24 steps in 3 epochs, resumed from `ckpt`; `at`: leaves a checkpoint of that step."""
    model = Regressor(optimizer, width=width)
    callbacks = [] if callback is None else [callback]
    if at is not None:
        callbacks.append(ModelCheckpoint(folder, filename="{step}", every_n_train_steps=at, save_top_k=-1))
    settings = {"max_epochs": 3, "enable_checkpointing": at is not None, "log_every_n_steps": 3, **options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*ckpt.*|.*resum.*|.*dirpath.*", category=UserWarning, module=".*pytorch.*")
        trainer(folder, *callbacks, **settings).fit(model, Resumable(batches(PER_EPOCH)), ckpt_path=ckpt)
    return model


# Lightning 2.4 counted log steps anew from a checkpoint within an epoch, 2.5.6 does not: rows lie at other steps.
SHIFTS_LOG_STEPS = Version(pl.__version__) < Version("2.5.6")
# How well these are known is told from what lies between the rows.
OF_ALL_ROWS = {column for name in TUNING for column in (name, f"{name}_se")} if SHIFTS_LOG_STEPS else set()


def same(record: RunRecord | None, other: RunRecord | None) -> None:
    """Columns and sketches are bitwise equal: the sums go on where they were."""
    assert record is not None
    assert other is not None
    assert record.columns.keys() == other.columns.keys()
    mine, its = both_have(record.columns["step"], other.columns["step"])
    for name, column in of_a_row(repeatable(other.columns)).items():
        np.testing.assert_array_equal(record.columns[name][mine], column[its], err_msg=name)
    if OF_ALL_ROWS:  # then of the rows that both have
        assert repr(tuned(record, mine)) == repr(tuned(other, its))
    mine, its = both_have(record.sketch_steps, other.sketch_steps)
    np.testing.assert_array_equal(record.sketches[mine], other.sketches[its])
    assert of_a_row(record.reasons) == of_a_row(other.reasons)
    assert record.run == other.run


def tuned(record: RunRecord, rows: np.ndarray) -> Any:
    return latest({name: column[rows] for name, column in record.columns.items()}, record.run)


def of_a_row(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in OF_ALL_ROWS}


def both_have(steps: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which rows are of the same steps: all, but where Lightning shifts its log steps."""
    if not SHIFTS_LOG_STEPS:
        np.testing.assert_array_equal(steps, other, err_msg="step")
    mine, its = np.isin(steps, other), np.isin(other, steps)
    assert mine[-1]
    assert its[-1]
    assert mine.sum() >= 3
    return mine, its


@pytest.mark.mode("resumed within an epoch or at its end", "measured", "bitwise as uninterrupted")
@pytest.mark.parametrize("at", [5, 8, 15, 16])  # within the first and the second epoch, and at their ends
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_resumes_bitwise(tmp_path: Path, name: str, at: int) -> None:
    whole, resumed = quiet(), quiet()
    model = fit(tmp_path, whole, OPTIMIZERS[name], at=at)
    again = fit(tmp_path, resumed, OPTIMIZERS[name], ckpt=tmp_path / f"step={at}.ckpt")
    assert again.tape.losses == model.tape.losses[at:]  # the training itself resumes exactly
    same(resumed.record, whole.record)


@pytest.mark.parametrize(
    "settings",
    [
        {"probe_batches": 2},
        {"clouds": "neurons"},
        {"clouds": "neurons", "probe_batches": 2},
        {"measure_every_n_steps": 3},
        {"per_layer": True, "clock": "lr"},
        {"entropy_production": "anti_ito", "loss_window": 6},
    ],
    ids=str,
)
def test_settings_resume_bitwise(tmp_path: Path, settings: dict[str, Any]) -> None:
    whole, resumed = quiet(**settings), quiet(**settings)
    fit(tmp_path, whole, OPTIMIZERS["AdamW"], at=13)
    fit(tmp_path, resumed, OPTIMIZERS["AdamW"], ckpt=tmp_path / "step=13.ckpt")
    same(resumed.record, whole.record)


WIDE = 300  # a weight of 1200 coordinates, and two parameters of 300: of each some are drawn
COORDINATES = 500
NEURONS: dict[str, Any] = {"clouds": "neurons"}
CLOUDS = ("wasserstein2", "wasserstein2_lower", "identity_excess", "kinematic_efficiency_wasserstein2")


@pytest.mark.parametrize(
    ("settings", "optimizer"),
    [
        *[({}, name) for name in OPTIMIZERS],
        ({"probe_batches": 2, "clouds": "neurons"}, "AdamW"),
        ({"measure_every_n_steps": 3, "per_layer": True}, "SGD momentum"),
        ({"clock": "lr"}, "RMSprop"),
    ],
    ids=str,
)
def test_sampled_coordinates_resume_bitwise(tmp_path: Path, settings: dict[str, Any], optimizer: str) -> None:
    """The same coordinates, though the gradients that they were drawn by are gone."""
    whole, resumed = (quiet(coordinates=COORDINATES, **settings) for _ in range(2))
    fit(tmp_path, whole, OPTIMIZERS[optimizer], at=13, width=WIDE)
    fit(tmp_path, resumed, OPTIMIZERS[optimizer], ckpt=tmp_path / "step=13.ckpt", width=WIDE)
    same(resumed.record, whole.record)
    assert whole.record is not None
    measured = whole.record.run["measured_coordinates"]
    assert 0 < measured <= COORDINATES < whole.record.run["parameters"]
    assert last_row(resumed)["displacement_se"] > 0


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.3}], ids=str)
def test_trainer_options_resume_bitwise(tmp_path: Path, options: dict[str, Any]) -> None:
    whole, resumed = quiet(), quiet()
    fit(tmp_path, whole, OPTIMIZERS["AdamW"], at=4, **options)
    fit(tmp_path, resumed, OPTIMIZERS["AdamW"], ckpt=tmp_path / "step=4.ckpt", **options)
    same(resumed.record, whole.record)


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    """One flag less in the state, and the work of a single step is missing."""
    whole, resumed = quiet(), quiet()
    fit(tmp_path, whole, OPTIMIZERS["AdamW"], at=5)
    path = tmp_path / "step=5.ckpt"
    saved = torch.load(path, weights_only=True)
    motion = saved["callbacks"]["SpeedLimit"]["meter"]["followers"][0]["motions"][0]
    motion["waiting"] = False  # loses f_{k+1}·u_k of one step
    torch.save(saved, path)
    fit(tmp_path, resumed, OPTIMIZERS["AdamW"], ckpt=path)
    with pytest.raises(AssertionError, match="work_"):
        same(resumed.record, whole.record)


def test_resuming_twice_equals_the_uninterrupted_run(tmp_path: Path) -> None:
    whole, last = quiet(), quiet()
    fit(tmp_path / "whole", whole, OPTIMIZERS["AdamW"])
    fit(tmp_path, quiet(), OPTIMIZERS["AdamW"], at=5, max_epochs=1)
    fit(tmp_path, quiet(), OPTIMIZERS["AdamW"], ckpt=tmp_path / "step=5.ckpt", at=14, max_epochs=2)
    fit(tmp_path, last, OPTIMIZERS["AdamW"], ckpt=tmp_path / "step=14.ckpt")
    assert last.record is not None
    assert whole.record is not None
    # The end of an epoch was the end of a run, and was measured: rows that the whole run has too (8, 16).
    assert of_a_row(last_row(last)) == pytest.approx(of_a_row(last_row(whole)), rel=0, abs=0, nan_ok=True)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"probe_batches": 1, "clouds": "neurons", "per_layer": True},
        {"coordinates": COORDINATES, "measure_every_n_steps": 2},
    ],
    ids=str,
)
def test_the_state_is_of_plain_types_and_tensors(tmp_path: Path, settings: dict[str, Any]) -> None:
    fit(tmp_path, quiet(**settings), OPTIMIZERS["AdamW"], at=5, width=WIDE)
    state = torch.load(tmp_path / "step=5.ckpt", weights_only=True)["callbacks"]["SpeedLimit"]
    assert state["meter"]["followers"][0]["optimizer"] == "AdamW"
    assert [f.name for f in tmp_path.glob("**/*.pt")] == []  # all of it is in the checkpoint


def test_the_checkpoint_keeps_the_initial_weights_for_as_long_as_they_are_needed(tmp_path: Path) -> None:
    """The neurons are compared with them to the end; a probe needs them until all of its batches have come."""
    start = {name: p.detach().clone() for name, p in Regressor().named_parameters()}
    for settings, kept in (({}, False), ({"probe_batches": 9}, True), ({"probe_batches": 2}, False), (NEURONS, True)):
        folder = tmp_path / str(settings)
        fit(folder, quiet(**settings), OPTIMIZERS["AdamW"], at=5)
        state = torch.load(folder / "step=5.ckpt", weights_only=True)["callbacks"]["SpeedLimit"]
        assert (state["start"] is not None) == kept
        if kept:
            assert state["start"].keys() == start.keys()
            assert all(torch.equal(state["start"][name], value) for name, value in start.items())


def tensors(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    inner = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return [t for value in inner for t in tensors(value)]


@pytest.mark.parametrize("coordinates", [1000, 4000, "all"])
def test_the_state_is_of_the_size_of_the_measured_coordinates(tmp_path: Path, coordinates: Any) -> None:
    """Of AdamW: θ_0, θ, u, and two numbers each for Σ u and m; of drawn ones also which they are and their weights.

    With them the sums of each row of coordinates, losses, and a sketch of 4093 for each row of the record.
    """
    model, callback = Regressor(OPTIMIZERS["AdamW"], width=3000), quiet(coordinates=coordinates)
    trainer(tmp_path, callback, log_every_n_steps=100).fit(model, Resumable(batches(3)))
    size = sum(p.numel() for p in model.parameters())
    measured = size if coordinates == "all" else coordinates
    assert callback.record is not None
    assert 0.9 * measured < callback.record.run["measured_coordinates"] <= measured
    found = sum(t.numel() for t in tensors(callback.state_dict()))
    assert 7 * 0.9 * measured <= found < 11 * measured + 6000


# --- what is lost is said


@pytest.mark.mode(
    "resumed with `probe_batches` or `clouds`, from a checkpoint that was saved without",
    "caveat",
    "the initial weights are not known: `SpeedLimit resumed without the initial weights`; the rest is measured",
)
@pytest.mark.parametrize("settings", [{"probe_batches": 2}, NEURONS, NEURONS | {"probe_batches": 2}], ids=str)
def test_what_needs_the_initial_weights_is_left_out_where_they_are_unknown(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    whole, resumed = quiet(), quiet(**settings)
    fit(tmp_path, whole, OPTIMIZERS["AdamW"], at=13)
    with pytest.warns(UserWarning, match="without the initial weights") as said:
        fit(tmp_path, resumed, OPTIMIZERS["AdamW"], ckpt=tmp_path / "step=13.ckpt")
    assert sum("SpeedLimit" in str(w.message) for w in said) == 1
    got, wanted = last_row(resumed), last_row(whole)
    for name, value in wanted.items():  # the losses of the training in place of the probe's
        assert got[name] == value or math.isnan(value), name
    assert resumed.record is not None
    if "clouds" in settings:
        assert len(resumed.record.clouds["step"]) == 0
        for name in CLOUDS:
            assert math.isnan(got[name])
            assert "resumed without the initial weights" in resumed.record.reasons[name]


def test_weights_of_other_names_are_not_taken_for_the_initial_ones(tmp_path: Path) -> None:
    fit(tmp_path, quiet(**NEURONS), OPTIMIZERS["AdamW"], at=5)
    saved = torch.load(tmp_path / "step=5.ckpt", weights_only=True)
    start = saved["callbacks"]["SpeedLimit"]["start"]
    saved["callbacks"]["SpeedLimit"]["start"] = {f"other.{name}": value for name, value in start.items()}
    torch.save(saved, tmp_path / "other.ckpt")
    resumed = quiet(**NEURONS)
    with pytest.warns(UserWarning, match="without the initial weights"):
        fit(tmp_path, resumed, OPTIMIZERS["AdamW"], ckpt=tmp_path / "other.ckpt")
    assert math.isnan(last_row(resumed)["wasserstein2"])
    assert math.isfinite(last_row(resumed)["displacement"])


@pytest.mark.mode(
    "resumed from a checkpoint that has no state of the callback",
    "caveat",
    "measured from there on; `record.run['since_step']` says since when",
)
def test_a_checkpoint_without_the_callback_is_labelled(tmp_path: Path) -> None:
    fit(tmp_path, None, OPTIMIZERS["AdamW"], at=5)
    resumed = quiet()
    model = fit(tmp_path, resumed, OPTIMIZERS["AdamW"], ckpt=tmp_path / "step=5.ckpt")
    assert resumed.record is not None
    assert resumed.record.run["since_step"] == 5
    steps = model.tape.steps
    assert last_row(resumed)["step"] == len(steps) == STEPS - 5
    moved = float((steps[-1].after - steps[0].before).norm())
    assert last_row(resumed)["displacement"] == pytest.approx(moved, rel=EXACT)


def test_another_model_starts_anew_and_says_so(tmp_path: Path) -> None:
    fit(tmp_path, quiet(), OPTIMIZERS["AdamW"], at=5)
    saved = torch.load(tmp_path / "step=5.ckpt", weights_only=True)
    saved["callbacks"]["SpeedLimit"]["meter"]["followers"][0]["motions"][0]["sizes"][0] += 1
    torch.save(saved, tmp_path / "other.ckpt")
    resumed = quiet(probe_batches=2)
    with pytest.warns(UserWarning, match="starts anew at step 5"):
        fit(tmp_path, resumed, OPTIMIZERS["AdamW"], ckpt=tmp_path / "other.ckpt")
    assert resumed.record is not None
    assert resumed.record.run["since_step"] == 5
    assert last_row(resumed)["step"] == STEPS - 5


def test_a_checkpoint_of_a_callback_that_comes_first(tmp_path: Path) -> None:
    """It is written before SpeedLimit has seen the end of the batch: one loss is lost, none is misplaced."""

    class Early(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "early.ckpt")

    whole, resumed = quiet(), quiet()
    model = Regressor()
    trainer(tmp_path, Early(), whole, max_epochs=3).fit(model, Resumable(batches(PER_EPOCH)))
    fit(tmp_path, resumed, None, ckpt=tmp_path / "early.ckpt", log_every_n_steps=1)
    got, wanted = last_row(resumed), last_row(whole)
    for name in ("step", "displacement", "path_length", "work_ito", "loss_drop", "efficiency"):
        assert got[name] == pytest.approx(wanted[name], rel=1e-12, nan_ok=True), name


@pytest.mark.mode("several fits on one callback", "measured", "a record each, from where the fit starts")
def test_a_second_fit_measures_from_where_it_starts(tmp_path: Path) -> None:
    model, callback = Regressor(), quiet()
    run = trainer(tmp_path, callback)
    run.fit(model, Resumable(batches(PER_EPOCH)))
    first = callback.record
    run.fit_loop.max_epochs = 2
    run.fit(model, Resumable(batches(PER_EPOCH)))
    steps = model.tape.steps[PER_EPOCH:]
    assert first is not None
    assert callback.record is not None
    assert first.columns["step"][-1] == PER_EPOCH  # the first record is as it was
    assert callback.record.run["since_step"] == PER_EPOCH
    assert last_row(callback)["step"] == len(steps) == PER_EPOCH
    moved = float((steps[-1].after - steps[0].before).norm())
    assert last_row(callback)["displacement"] == pytest.approx(moved, rel=EXACT)
