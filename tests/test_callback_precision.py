"""Precisions: each training twice, with and without the callback, bitwise the same; numbers recomputed from saved
parameters and raw, unscaled gradients (style_cases.py); steps that a loss scaler skips are none.

On a CPU the flag "16-mixed" silently becomes bf16: its plugin is given with a scaler here.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_cases import Batch, batches, last_row, loader, quiet, trainer
from pytorch_lightning.plugins import MixedPrecision
from style_cases import ALL, KINEMATIC, WORKS, Diarist, Style, compare, disagreements, train
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW

from lightning_speedlimit.trajectory import TrajectoryMeter

F32 = torch.float32
# Gradients and updates of half precision are read as they are; float32 sums of dozens of them carry 6e-8 each.
SINGLE = 1e-5
POISONED = 4  # the batch with an infinite gradient


def amp(**options: Any) -> Any:
    """A plugin of its own for each training: the scaler has a state. A scale that grows every third step."""
    scaler = torch.amp.GradScaler("cpu", **({"init_scale": 16.0, "growth_interval": 3} | options))
    return lambda: MixedPrecision("16-mixed", "cpu", scaler_copy(scaler))


def scaler_copy(scaler: Any) -> Any:
    fresh = torch.amp.GradScaler("cpu")
    fresh.load_state_dict(scaler.state_dict())
    return fresh


MAKE: dict[str, Any] = {
    "SGD": lambda p: SGD(p, lr=0.05),
    "SGD fused": lambda p: SGD(p, lr=0.05, fused=True),
    "momentum": lambda p: SGD(p, lr=0.02, momentum=0.9),
    "momentum fused": lambda p: SGD(p, lr=0.02, momentum=0.9, fused=True),
    "Adam": lambda p: Adam(p, lr=0.01, eps=1e-4),
    "Adam fused": lambda p: Adam(p, lr=0.01, eps=1e-4, fused=True),
    "AdamW": lambda p: AdamW(p, lr=0.01, eps=1e-4, weight_decay=0.0),
    "AdamW fused": lambda p: AdamW(p, lr=0.01, eps=1e-4, weight_decay=0.0, fused=True),
    "Adagrad fused": lambda p: Adagrad(p, lr=0.01, fused=True),
}
NO_LOSS = tuple(name for name in ALL if name != "loss_drop")


def half(**options: Any) -> dict[str, Any]:
    return {"plugins": amp(), **options}


def style(kind: str, options: dict[str, Any], **more: Any) -> Style:
    given = {"dtype": F32, "rel": SINGLE} | more
    if kind.startswith("Adagrad"):
        given["agreeing"] = (*KINEMATIC, *WORKS, "loss_drop")  # the diary knows no formula of it
    return Style(lambda: Diarist(MAKE[kind], F32), options, **given)


CASES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("precision 32-true", "Adam", {}, {}),
    ("precision 64-true", "SGD", {"precision": "64-true"}, {"rel": 1e-9}),
    ("precision 64-true", "Adam", {"precision": "64-true"}, {"rel": 1e-9}),
    ("precision bf16-mixed", "SGD", {"precision": "bf16-mixed"}, {}),
    ("precision bf16-mixed", "Adam", {"precision": "bf16-mixed", "gradient_clip_val": 0.3}, {}),
    *(("precision 16-mixed", kind, half(), {}) for kind in MAKE),
    ("precision 16-mixed, gradient clipping", "SGD", half(gradient_clip_val=0.3), {}),
    ("precision 16-mixed, gradient clipping", "Adam", half(gradient_clip_val=0.3), {}),
    (
        "precision 16-mixed, gradient clipping",
        "momentum",
        half(gradient_clip_val=0.05, gradient_clip_algorithm="value"),
        {"agreeing": (*KINEMATIC, *WORKS, "loss_drop")},
    ),
    ("precision 16-mixed, accumulated", "Adam", half(accumulate_grad_batches=3), {"agreeing": NO_LOSS}),
    ("precision 16-mixed, accumulated", "SGD fused", half(accumulate_grad_batches=3), {"agreeing": NO_LOSS}),
    *(
        (f"precision {true}", kind, {"precision": true}, {})
        for true in ("16-true", "bf16-true")
        for kind in ("SGD", "SGD fused", "Adam", "Adam fused")
    ),
]


@pytest.mark.parametrize(
    "style",
    [
        pytest.param(style(kind, options, **more), id=f"{name}, {kind}", marks=pytest.mark.mode(name, "measured"))
        for name, kind, options, more in CASES
    ],
)
@pytest.mark.filterwarnings("error:SpeedLimit", "error:the measurement stopped")
def test_a_precision_is_measured_and_left_alone(tmp_path: Path, style: Style) -> None:
    model, callback, differing = compare(style, tmp_path)
    assert differing == []
    assert disagreements(style, model, callback) == {}


def test_half_precision_is_what_was_trained(tmp_path: Path) -> None:
    """The guard of the table above: weights of two bytes, gradients of a scaled loss."""
    seen = []

    class Looking(Diarist):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            weight = self.first.weight
            assert weight.grad is not None
            seen.append((weight.dtype, float(weight.grad.float().norm())))

    for kind, options in (("Adam", {"precision": "16-true"}), ("Adam", half()), ("Adam fused", half())):
        train(Style(lambda k=kind: Looking(MAKE[k], F32), options, size=1, epochs=1, dtype=F32), tmp_path, None)
    assert [dtype for dtype, _ in seen] == [torch.float16, F32, F32]
    assert seen[2][1] == pytest.approx(16 * seen[1][1], rel=1e-3)  # still scaled where the step unscales


# --- steps that the loss scaler skips


class Overflowing(Diarist):
    """An infinite gradient in one batch, and there an infinite loss."""

    def __init__(self, kind: str) -> None:
        super().__init__(MAKE[kind], F32)

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * math.inf if self.diary.batch == POISONED else loss


SKIP = "precision 16-mixed, steps skipped for inf"


@pytest.mark.mode(SKIP, "measured")
@pytest.mark.parametrize(
    ("kind", "clip"), [(kind, None) for kind in MAKE] + [(kind, 0.3) for kind in MAKE if "fused" not in kind]
)
def test_a_skipped_step_is_no_step(tmp_path: Path, kind: str, clip: float | None) -> None:
    """Not fused: no hook fires; fused: both fire, and θ stays. Neither the step nor its loss counts.

    (Clipping with a fused optimizer Lightning refuses, see below.)
    """
    overflowing = Style(lambda: Overflowing(kind), half(gradient_clip_val=clip), dtype=F32, rel=SINGLE)
    model, callback, differing = compare(overflowing, tmp_path)
    diary = model.diary
    skipped = [entry for entry in diary.entries if entry.batch == POISONED]
    assert all(not update.any() for entry in skipped for update in entry.update.values())
    assert len(skipped) == ("fused" in kind)
    diary.entries = [entry for entry in diary.entries if entry.batch != POISONED]
    diary.losses.pop(POISONED)
    assert differing == []
    known = ALL if kind != "Adagrad fused" else (*KINEMATIC, *WORKS, "loss_drop")
    assert disagreements(Style(Diarist, rel=SINGLE, agreeing=known), model, callback) == {}
    assert last_row(callback)["elapsed"] == len(diary.entries) == 15
    assert last_row(callback)["step"] == 15 + len(skipped)


@pytest.mark.mode(SKIP, "measured")
@pytest.mark.parametrize("kind", ["SGD", "SGD fused"])
def test_the_infinite_loss_of_a_skipped_step_is_in_no_window(tmp_path: Path, kind: str) -> None:
    callback = quiet(loss_window=50)
    train(Style(lambda: Overflowing(kind), half(), dtype=F32), tmp_path, callback)
    assert callback.record is not None
    assert math.isfinite(last_row(callback)["loss_drop"])
    assert "loss_drop" not in callback.record.reasons
    assert callback.record.run["samples_per_step"] == 6  # the skipped batch is no part of the next step,
    assert callback.record.columns["samples"][-1] == 16 * 6  # and was paid for


@pytest.mark.mode(SKIP, "measured")
@pytest.mark.parametrize("kind", ["SGD", "SGD fused", "Adam", "Adam fused"])
def test_a_run_in_which_every_step_is_skipped(tmp_path: Path, kind: str) -> None:
    class Never(Diarist):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * math.inf

    callback = quiet()
    never = Style(lambda: Never(MAKE[kind], F32), half(), size=4, dtype=F32)
    _, outcome = train(never, tmp_path, callback)
    assert outcome.differs_from(train(never, tmp_path, None)[1]) == []
    assert callback.record is not None
    if "fused" not in kind:
        assert len(callback.record) == 0  # no step was taken
        return
    got = last_row(callback)
    assert got["displacement"] == got["path_length"] == got["elapsed"] == 0.0
    for name in ("efficiency", "kinematic_efficiency"):
        assert math.isnan(got[name])
        assert callback.record.reasons[name]


@pytest.mark.mode(
    "precision 16-mixed, gradient clipping, fused optimizer",
    "refused",
    "Lightning refuses it: The current optimizer, SGD, does not allow for gradient clipping because it performs "
    "unscaling of gradients internally.",
)
def test_clipping_with_a_fused_optimizer_is_refused_by_lightning(tmp_path: Path) -> None:
    """With and without the callback, in the same words; the callback leaves no hook behind."""
    for callbacks in ([], [quiet()]):
        model = Diarist(MAKE["SGD fused"], F32)
        fit = trainer(tmp_path, *callbacks, plugins=[amp()()], gradient_clip_val=0.3)
        with pytest.raises(RuntimeError, match="SGD, does not allow for gradient clipping because it performs unsc"):
            fit.fit(model, loader(batches(2, dtype=F32)))
        hooks = fit.optimizers[0]._optimizer_step_post_hooks
        assert len(hooks) == 1  # the diary's


class Silent(Diarist):
    """No loss in two batches of each epoch of eight."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        if batch_idx in (2, 5):
            return None
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", ["SGD", "SGD fused", "Adam", "Adam fused"])
def test_without_a_loss_a_scaler_takes_no_step(tmp_path: Path, kind: str) -> None:
    silent = Style(lambda: Silent(MAKE[kind], F32), half(), dtype=F32, rel=SINGLE)
    model, callback, differing = compare(silent, tmp_path)
    assert differing == []
    assert disagreements(silent, model, callback) == {}
    assert last_row(callback)["elapsed"] == len(model.diary.entries) == 12


@pytest.mark.mode(
    "LBFGS with a loss scaler", "refused", "Lightning refuses it: AMP and the LBFGS optimizer are not compatible."
)
def test_lbfgs_with_a_scaler_is_refused_by_lightning(tmp_path: Path) -> None:
    """The loss that its later evaluations would be replaced by is the scaled one: no such run reaches that."""
    model = Diarist(lambda p: torch.optim.LBFGS(p, lr=0.1), F32)
    fit = trainer(tmp_path, quiet(), plugins=[amp()()])
    with pytest.raises(Exception, match="AMP and the LBFGS optimizer are not compatible"):
        fit.fit(model, loader(batches(2, dtype=F32)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_beyond_what_half_precision_holds(dtype: torch.dtype) -> None:
    """Σ g² = 4·10⁷ over 1000 gradients of 200, where float16 ends at 65504."""
    weight = nn.Parameter(torch.zeros(1000, dtype=dtype))
    optimizer = SGD([weight], lr=2.0**-10)
    meter = TrajectoryMeter(optimizer)
    for _ in range(2):
        weight.grad = torch.full_like(weight, 200.0)
        optimizer.step()
    values = meter.compute()
    meter.close()
    moved = weight.detach().double()
    assert values["grad_norm"] == pytest.approx(200 * 1000**0.5, rel=SINGLE)
    assert values["displacement"] == pytest.approx(float(moved.norm()), rel=SINGLE)
    assert values["work_ito"] == pytest.approx(-200.0 * float(moved.sum()), rel=SINGLE)


# --- two optimizers under a loss scaler


class Pair(Diarist):
    """Manual: a backward and a step for each of two optimizers; a gradient of the first overflows once."""

    def __init__(self, kind: str, poisoned: int | None = None) -> None:
        super().__init__(MAKE[kind], F32)
        self.automatic_optimization = False
        self.poisoned = poisoned

    def configure_optimizers(self) -> Any:
        return [self.diary.follow(self._optimizer(list(part.parameters()))) for part in (self.first, self.second)]

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        self.diary.batch += 1
        found = []
        for number, optimizer in enumerate(self.optimizers()):  # type: ignore[arg-type]
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            found.append(self.loss(batch))
            bad = self.diary.batch == self.poisoned and number == 0
            self.manual_backward(found[-1] * (math.inf if bad else 1.0))
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        self.diary.losses.append(float(found[0].detach()))
        return found[0].detach()


@pytest.mark.mode("precision 16-mixed, several optimizers", "measured")
@pytest.mark.parametrize("kind", ["SGD", "SGD fused", "Adam", "Adam fused"])
def test_two_optimizers_under_a_scaler(tmp_path: Path, kind: str) -> None:
    pair = Style(lambda: Pair(kind), half(), dtype=F32, rel=SINGLE, optimizers=2)
    model, callback, differing = compare(pair, tmp_path)
    assert differing == []
    assert disagreements(pair, model, callback) == {}


@pytest.mark.mode("precision 16-mixed, several optimizers", "measured")
@pytest.mark.parametrize("kind", ["SGD", "SGD fused", "Adam", "Adam fused"])
def test_one_of_two_optimizers_is_skipped(tmp_path: Path, kind: str) -> None:
    """The joint step is then the other one's."""
    pair = Style(lambda: Pair(kind, POISONED), half(), dtype=F32, rel=SINGLE, optimizers=2)
    model, callback, differing = compare(pair, tmp_path)
    assert differing == []
    entries = model.diary.entries
    parts = [[e for e in entries if e.batch == k and (e.batch, e.optimizer) != (POISONED, 0)] for k in range(16)]
    assert [len(p) for p in parts] == [2] * 4 + [1] + [2] * 11
    updates = [[u for e in part for u in e.update.values()] for part in parts]
    squares = [math.fsum(float(u @ u) for u in step) for step in updates]
    ito = -math.fsum(float(e.raw[k] @ e.update[k]) for part in parts for e in part for k in e.used)
    got = last_row(callback)
    assert got["elapsed"] == 16
    assert got["path_length"] == pytest.approx(math.fsum(map(math.sqrt, squares)), rel=SINGLE)
    assert got["action"] == pytest.approx(math.fsum(squares), rel=SINGLE)
    assert got["work_ito"] == pytest.approx(ito, rel=SINGLE)
    moved: dict[int, Any] = {}
    for part in parts:
        for entry in part:
            for key, update in entry.update.items():
                moved[key] = moved.get(key, 0.0) + update
    assert got["displacement"] == pytest.approx(math.sqrt(math.fsum(float(d @ d) for d in moved.values())), rel=SINGLE)


# --- clipping of one's own under a scaler


class Hooked(Diarist):
    """Clips in its own hook, where Lightning has unscaled the gradients."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 0.3)


@pytest.mark.mode("precision 16-mixed, gradient clipping", "measured")
def test_clipping_in_an_own_hook_under_a_scaler(tmp_path: Path) -> None:
    hooked = Style(lambda: Hooked(MAKE["Adam"], F32), half(), dtype=F32, rel=SINGLE)
    model, callback, differing = compare(hooked, tmp_path)
    assert differing == []
    assert disagreements(hooked, model, callback) == {}
    assert last_row(callback)["grad_norm"] > 1.5 * last_row(callback)["grad_norm_clipped"]


# --- with all that can be asked for


ASKED: dict[str, dict[str, Any]] = {
    "neurons": {"clouds": "neurons", "per_layer": True},
    "sampled": {"measure_every_n_steps": 3, "clock": "lr"},
}
WHERE: dict[str, Style] = {
    "16-mixed, fused": style("AdamW fused", half()),
    "16-mixed, clipped, accumulated": style("Adam", half(gradient_clip_val=0.3, accumulate_grad_batches=2)),
    "16-true": style("momentum", {"precision": "16-true"}),
    "bf16-mixed": style("Adam", {"precision": "bf16-mixed"}),
    "64-true": style("SGD", {"precision": "64-true"}),
}


@pytest.mark.mode(
    "probe_batches",
    "caveat",
    "training_step runs again, on a copy: what it prints itself, or writes to files or services, it does again",
)
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.filterwarnings("error:SpeedLimit", "error:the measurement stopped")
def test_a_probe_changes_nothing_in_any_precision(tmp_path: Path, where: str) -> None:
    _, callback, differing = compare(WHERE[where], tmp_path, probe_batches=2)
    assert differing == []
    assert last_row(callback)["loss_drop_se"] >= 0.0


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.filterwarnings("error:the measurement stopped")
def test_what_is_asked_for_changes_nothing_in_any_precision(tmp_path: Path, asked: str, where: str) -> None:
    _, callback, differing = compare(WHERE[where], tmp_path, **ASKED[asked])
    assert differing == []
    got = last_row(callback)
    assert math.isfinite(got["displacement"])
    assert math.isfinite(got["loss_drop"])
    if asked == "neurons":
        assert math.isfinite(got["wasserstein2"])
