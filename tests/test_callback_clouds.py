"""The neurons of each layer as clouds: W₂ between θ_0's and now's, against plain assignments and closed forms.

The oracle knows nothing of the package: it reads copies of the weights, builds every neuron's particle by loops,
and lets scipy pair the particles.
"""

import copy
import csv
import importlib
import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from callback_cases import (
    EXACT,
    Batch,
    Regressor,
    Resumable,
    batches,
    flat,
    heard,
    last_row,
    loader,
    of,
    quiet,
    repeatable,
    sgd,
    trainer,
)
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from scipy.optimize import linear_sum_assignment
from test_callback_input import Bare
from test_callback_lifecycle import AVERAGING, Shrink, Swap, Validated
from test_callback_neutrality import CLIP, OPTIMIZERS, run
from torch import Tensor, nn

from lightning_speedlimit import RunRecord, SpeedLimit, TrajectoryMeter
from lightning_speedlimit.callback import LOGGED, neuron_clouds
from lightning_speedlimit.callback.probe import StartWeights
from lightning_speedlimit.record import summary_text
from lightning_speedlimit.transport import wasserstein2
from lightning_speedlimit.words import listed

# Float64 weights; squared distances of numbers of order 1 carry 1e-15 each, roots and dozens of sums a few more.
CLOSE = 1e-10
# The meter takes the displacement from float32 differences of float32 weights, 6e-8 each.
FLOAT32 = 1e-6
VALUES = ("wasserstein2", "wasserstein2_lower", "identity_excess", "displacement")
TOTALS = ("wasserstein2", "wasserstein2_lower", "identity_excess", "kinematic_efficiency_wasserstein2")


def clouds(**options: Any) -> SpeedLimit:
    return quiet(clouds="neurons", **options)


# --- the oracle

State = dict[str, Tensor]
Particles = Callable[[State], list[Tensor]]


def real(values: Tensor) -> Tensor:
    return torch.view_as_real(values) if values.is_complex() else values


def rows(weight: str, bias: str | None = None) -> Particles:
    def read(state: State) -> list[Tensor]:
        parts = [[state[weight][i], *([] if bias is None else [state[bias][i]])] for i in range(len(state[weight]))]
        return [torch.cat([real(p).reshape(-1) for p in part]).double() for part in parts]

    return read


def transposed(weight: str, bias: str | None, groups: int) -> Particles:
    def read(state: State) -> list[Tensor]:
        w = state[weight]
        inputs, outputs = w.shape[0] // groups, w.shape[1]
        found = []
        for o in range(groups * outputs):
            kernel = w[(o // outputs) * inputs : (o // outputs + 1) * inputs, o % outputs].reshape(-1)
            found.append(torch.cat([kernel, *([] if bias is None else [state[bias][o].reshape(1)])]).double())
        return found

    return read


def displaced(before: State, after: State, names: list[str]) -> float:
    return math.fsum(float((real(after[n]).double() - real(before[n]).double()).square().sum()) for n in names)


def compared(before: list[Tensor], after: list[Tensor]) -> dict[str, float]:
    cost = np.array([[float((x - y).square().sum()) for y in after] for x in before])
    best, paired = math.fsum(cost[linear_sum_assignment(cost)]), math.fsum(cost.diagonal())
    # Where nothing moved both are 0; where i → i is optimal they are the same sum.
    excess = paired / best - 1 if best else (0.0 if paired == 0 else math.nan)
    root = math.sqrt(best)
    values = {"wasserstein2": root, "wasserstein2_lower": root, "identity_excess": excess}
    return {"particles": len(before), **values, "displacement": math.sqrt(paired)}


def check_layers(record: RunRecord, snapshots: list[State], particles: dict[str, Particles]) -> None:
    """Every row of the record's table against snapshots: θ_0's, then one per row."""
    table = record.clouds
    assert table["layers"] == list(particles)
    assert len(table["step"]) == len(snapshots) - 1
    for column, read in enumerate(particles.values()):
        start = read(snapshots[0])
        assert table["particles"][column] == len(start)
        for row, state in enumerate(snapshots[1:]):
            wanted = compared(start, read(state))
            for name in VALUES:
                got = table[name][row, column]
                # What rounding leaves of a certificate's gap is of the size of the whole clouds' squares.
                assert got == pytest.approx(wanted[name], rel=CLOSE, abs=1e-9), (name, row, column)


def check_totals(callback: SpeedLimit, snapshots: list[State], particles: dict[str, Particles], rest: float) -> None:
    """The last row's columns: layers add up, with the squared displacement of what is in no cloud."""
    found = [compared(read(snapshots[0]), read(snapshots[-1])) for read in particles.values()]
    got = last_row(callback)
    squares = rest + math.fsum(layer["wasserstein2"] ** 2 for layer in found)
    paired = rest + math.fsum(layer["displacement"] ** 2 for layer in found)
    assert got["displacement"] == pytest.approx(math.sqrt(paired), rel=FLOAT32)
    assert got["wasserstein2"] == pytest.approx(math.sqrt(squares), rel=CLOSE)
    assert got["wasserstein2_lower"] == pytest.approx(math.sqrt(squares), rel=1e-4)  # a dual: nearly as good
    assert got["wasserstein2_lower"] <= got["wasserstein2"] <= got["displacement"] * (1 + FLOAT32)
    assert got["identity_excess"] == pytest.approx(paired / squares - 1, rel=CLOSE, abs=CLOSE)
    ratio = squares / (got["elapsed"] * got["action"])
    assert got["kinematic_efficiency_wasserstein2"] == pytest.approx(ratio, rel=CLOSE)
    assert got["kinematic_efficiency_wasserstein2"] <= got["kinematic_efficiency"] * (1 + 2 * FLOAT32)


class Snapshots(pl.Callback):
    def __init__(self) -> None:
        self.states: list[State] = []

    def _keep(self, module: Any) -> None:
        self.states.append(copy.deepcopy(module.state_dict()))

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self._keep(module)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self._keep(module)


# --- architectures


class Random(pl.LightningModule):
    """Any body; the loss draws its outputs towards noise, so that every weight moves a good way."""

    def __init__(self, body: nn.Module, inputs: Callable[[], Any], *, optimizer: Any = None) -> None:
        super().__init__()
        self.body = body
        self.inputs, self._optimizer = inputs, optimizer or (lambda p: torch.optim.Adam(p, lr=0.3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self.body(*self.inputs())
        out = out[0] if isinstance(out, tuple) else out
        noise = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(batch_idx))
        return (out - noise).abs().square().mean()

    def configure_optimizers(self) -> Any:
        return self._optimizer([p for p in self.parameters() if p.requires_grad])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.mix = nn.Linear(3, 3)
        self.head = nn.Linear(3, 7)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(x))))


class SharedBias(nn.Module):
    """One bias for two layers: it is a coordinate of the first one's neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)
        self.b.bias = self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.b(x)


class Conv1D(nn.Module):
    """As in transformers: the neurons are columns, and here as many as there are rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class ByColumns(nn.Module):
    """A layer of one's own whose bias belongs to the columns: it is no coordinate of the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 6)), nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Any:
        return self.attend(x, x[:, :, : self.attend.kdim], x[:, :, : self.attend.vdim])[0]


class Own(nn.Module):
    """Parameters by hand: a matrix on the module itself, a scale, and a row that is one particle."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.kernel = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(5, 3, 2))
        self.bias, self.token = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.tanh(x @ self.weight.T + self.bias)
        return torch.einsum("bi,ijk->bjk", inner, self.kernel) + self.token


@dataclass(frozen=True)
class Case:
    body: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    particles: dict[str, Particles]
    rest: list[str] = field(default_factory=list)


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(9)),)


def tokens() -> tuple[Tensor]:
    return (torch.arange(14).reshape(2, 7) % 6,)


def both(path: str) -> Particles:
    return rows(f"{path}.weight", f"{path}.bias")


def numbered(kind: str, *layers: int) -> dict[str, Particles]:
    return {f"body.{kind}_{i}": rows(f"body.weight_{i}", f"body.bias_{i}") for i in layers}


LSTM = ("ih_l0", "hh_l0", "ih_l0_reverse", "hh_l0_reverse")
CASES = {
    "mlp": Case(
        lambda: nn.Sequential(nn.Linear(2, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 5, bias=False)),
        normal(8, 2),
        {"body.0": both("body.0"), "body.3": rows("body.3.weight")},
        ["body.1.weight", "body.1.bias"],
    ),
    "convolution": Case(
        lambda: nn.Sequential(nn.Conv1d(2, 6, 2, groups=2), nn.Tanh(), nn.Conv1d(6, 4, 1)),
        normal(3, 2, 5),
        {"body.0": both("body.0"), "body.2": both("body.2")},
    ),
    "channels last": Case(
        lambda: nn.Conv2d(2, 7, 2).to(memory_format=torch.channels_last), normal(2, 2, 4, 4), {"body": both("body")}
    ),
    "transposed 1d": Case(
        lambda: nn.ConvTranspose1d(4, 4, 2),
        normal(3, 4, 5),
        {"body": transposed("body.weight", "body.bias", 1)},
    ),
    "transposed 2d in groups": Case(
        lambda: nn.ConvTranspose2d(6, 6, (1, 2), groups=3, bias=False),
        normal(3, 6, 2, 2),
        {"body": transposed("body.weight", None, 3)},
    ),
    "transposed 3d in groups": Case(
        lambda: nn.ConvTranspose3d(4, 6, 1, groups=2),
        normal(2, 4, 2, 2, 2),
        {"body": transposed("body.weight", "body.bias", 2)},
    ),
    "embedding": Case(lambda: nn.Embedding(9, 2), tokens, {"body": rows("body.weight")}),
    "bilinear": Case(lambda: nn.Bilinear(2, 2, 6), lambda: normal(5, 2)() * 2, {"body": both("body")}),
    "complex": Case(
        lambda: nn.Linear(2, 6, dtype=torch.complex128),
        lambda: (torch.complex(*normal(2, 5, 2)()[0]),),
        {"body": both("body")},
    ),
    "tied": Case(
        Tied, tokens, {"body.embed": rows("body.embed.weight"), "body.mix": both("body.mix")}, ["body.head.bias"]
    ),
    "shared bias": Case(SharedBias, normal(8, 3), {"body.a": both("body.a"), "body.b": rows("body.b.weight")}),
    "lstm": Case(
        lambda: nn.LSTM(3, 2, batch_first=True, bidirectional=True),
        normal(4, 6, 3),
        {f"body.weight_{part}": rows(f"body.weight_{part}", f"body.bias_{part}") for part in LSTM},
    ),
    "projected lstm": Case(
        lambda: nn.LSTM(3, 4, proj_size=2, bias=False),
        normal(4, 6, 3),
        {f"body.weight_{part}": rows(f"body.weight_{part}") for part in ("ih_l0", "hh_l0", "hr_l0")},
    ),
    "attention": Case(
        Attention,
        normal(3, 5, 4),
        {
            "body.attend.in_proj_weight": rows("body.attend.in_proj_weight", "body.attend.in_proj_bias"),
            "body.attend.out_proj": both("body.attend.out_proj"),
        },
    ),
    "attention to other widths": Case(
        lambda: Attention(kdim=3, vdim=2, add_bias_kv=True),
        normal(3, 5, 4),
        {
            **{f"body.attend.{n}": rows(f"body.attend.{n}") for n in ("q_proj_weight", "k_proj_weight")},
            **{f"body.attend.{n}": rows(f"body.attend.{n}") for n in ("v_proj_weight", "bias_k", "bias_v")},
            "body.attend.out_proj": both("body.attend.out_proj"),
        },
        ["body.attend.in_proj_bias"],
    ),
    "columns": Case(Conv1D, normal(8, 5), {"body": transposed("body.weight", "body.bias", 1)}),
    "columns by hand": Case(ByColumns, normal(8, 3), {"body": rows("body.weight")}, ["body.bias"]),
    "by hand": Case(
        Own,
        normal(8, 3),
        {"body": both("body"), "body.kernel": rows("body.kernel"), "body.token": rows("body.token")},
    ),
    "weight norm": Case(
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 6)),
        normal(8, 2),
        {
            f"body.parametrizations.weight.original{i}": rows(f"body.parametrizations.weight.original{i}")
            for i in (0, 1)
        },
        ["body.bias"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_layer_equals_plain_assignments(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    torch.manual_seed(1)
    body = case.body()
    body = body if any(p.is_complex() for p in body.parameters()) else body.double()
    callback, kept = clouds(), Snapshots()
    trainer(tmp_path, callback, kept, max_epochs=3).fit(Random(body, case.inputs), loader(batches(6)))
    assert callback.record is not None
    assert callback.record.clouds["step"].tolist() == [6, 12, 18]
    check_layers(callback.record, kept.states, case.particles)
    check_totals(callback, kept.states, case.particles, displaced(kept.states[0], kept.states[-1], case.rest))


def test_the_cases_relabel_neurons() -> None:
    """Else they would show nothing: in most of them another pairing than i → i is the best one, and not in all."""
    excess = []
    for case in CASES.values():
        torch.manual_seed(1)
        body = case.body()
        body = body if any(p.is_complex() for p in body.parameters()) else body.double()
        model = Random(body, case.inputs)
        before = copy.deepcopy(model.state_dict())
        optimizer = model.configure_optimizers()
        for step in range(18):
            optimizer.zero_grad()
            model.training_step(None, step % 6).backward()
            optimizer.step()
        found = [compared(read(before), read(model.state_dict())) for read in case.particles.values()]
        excess += [layer["identity_excess"] for layer in found if layer["particles"] > 1]
    relabelled = sum(e > 0.01 for e in excess)
    assert len(excess) // 2 < relabelled < len(excess)


@pytest.mark.parametrize(
    ("part", "inputs"),
    [
        (nn.Linear(3, 5), (2, 3)),
        (nn.Conv2d(4, 6, 2, groups=2), (1, 4, 3, 3)),
        (nn.ConvTranspose1d(4, 6, 2), (1, 4, 3)),
        (nn.ConvTranspose2d(4, 6, 2, groups=2), (1, 4, 3, 3)),
        (nn.ConvTranspose3d(6, 3, 1, groups=3), (1, 6, 2, 2, 2)),
        (Conv1D(), (2, 5)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_particle_is_what_its_output_hears(part: nn.Module, inputs: tuple[int, ...]) -> None:
    """Row o of the cloud is all that output o's gradient reaches, and nothing else."""
    (layer,) = neuron_clouds.layers(part)
    out = part(torch.rand(inputs) + 0.5)
    channels = out.movedim(1, 0) if out.ndim > 2 else out.T
    for o, channel in enumerate(channels):
        assert layer.bias is not None
        weight, bias = torch.autograd.grad(channel.sum(), [layer.weight, layer.bias], retain_graph=True)
        reached = layer.rows(weight)
        assert bool((reached[o] != 0).all())
        assert int((reached != 0).sum()) == len(reached[o])
        assert bias.nonzero().tolist() == [[o]]


def test_names_are_the_modules_and_unique() -> None:
    root = Own()
    root.inner = nn.ModuleDict({"weight": nn.Linear(2, 2)})
    names = [layer.name for layer in neuron_clouds.layers(root)]
    assert names == ["weight", "kernel", "token", "inner.weight"]


# --- closed forms


class Moving:
    """SGD with rate 1 and a constant gradient: after k steps θ = θ_0 + (k/steps) (target − θ_0), up to rounding."""

    def __init__(self, start: Tensor, target: Tensor, *, steps: int = 1, bias: Tensor | None = None) -> None:
        super().__init__()
        self.body = nn.Linear(start.shape[1], start.shape[0], bias=bias is not None, dtype=start.dtype)
        with torch.no_grad():
            self.body.weight.copy_(start)
            if bias is not None:
                self.body.bias.copy_(bias)
                self.body.bias.requires_grad_(False)
        self.gradient = (start - target) / steps

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.body.weight * self.gradient).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1.0)


class Mover(Moving, pl.LightningModule):
    pass


# Rows whose distances are all different; 0 and 1 will meet.
ROWS = torch.tensor([[0.0, 0.0], [2.0, 1.0], [9.0, -7.0]], dtype=torch.float64)


def towards(share: float) -> Tensor:
    """Neurons 0 and 1 on their way to each other's place."""
    return ROWS + share * (ROWS[[1, 0, 2]] - ROWS)


@pytest.mark.parametrize(
    ("share", "package"),
    [(share, "pytorch_lightning") for share in (0.25, 0.5, 0.75, 0.9)] + [(0.75, "lightning.pytorch")],
)
def test_two_neurons_swap(tmp_path: Path, share: float, package: str) -> None:
    """|d|² = 2 s²|δ|² in place, 2 (1 − s)²|δ|² swapped: the excess is s²/(1 − s)² − 1 beyond half way."""
    callback, lightning = clouds(), importlib.import_module(package)
    model = type("Mover", (Moving, lightning.LightningModule), {})(ROWS, towards(share))
    trainer(tmp_path, callback, kind=lightning.Trainer).fit(model, loader(batches(1)))
    got, distance = last_row(callback), float((ROWS[0] - ROWS[1]).norm())
    assert got["displacement"] == pytest.approx(math.sqrt(2) * share * distance, rel=EXACT)
    assert got["wasserstein2"] == pytest.approx(math.sqrt(2) * min(share, 1 - share) * distance, rel=CLOSE)
    excess = max(share**2 / (1 - share) ** 2 - 1, 0.0)
    assert got["identity_excess"] == pytest.approx(excess, rel=CLOSE, abs=CLOSE)
    assert callback.record is not None
    assert callback.record.clouds["identity_excess"] == pytest.approx(np.array([[excess]]), rel=CLOSE, abs=CLOSE)
    # One step: D² = A = D²/τ, so what relabelling takes off W² it takes off the efficiency.
    assert got["kinematic_efficiency_wasserstein2"] == pytest.approx(1 / (1 + excess), rel=CLOSE)


def test_a_pure_relabelling(tmp_path: Path) -> None:
    callback = clouds()
    trainer(tmp_path, callback).fit(Mover(ROWS, ROWS[[1, 2, 0]]), loader(batches(1)))
    got = last_row(callback)
    assert got["displacement"] > 10
    assert got["wasserstein2"] == got["kinematic_efficiency_wasserstein2"] == 0.0
    assert math.isnan(got["identity_excess"])
    assert callback.record is not None
    assert "only changed places" in callback.record.reasons["identity_excess"]
    assert set(callback.record.reasons) & set(TOTALS) == {"identity_excess"}


def test_no_motion(tmp_path: Path) -> None:
    callback = clouds()
    trainer(tmp_path, callback).fit(Mover(ROWS, ROWS), loader(batches(2)))
    got = last_row(callback)
    assert got["wasserstein2"] == got["wasserstein2_lower"] == got["identity_excess"] == 0.0
    assert math.isnan(got["kinematic_efficiency_wasserstein2"])
    assert callback.record is not None
    assert "have not moved" in callback.record.reasons["kinematic_efficiency_wasserstein2"]


@pytest.mark.parametrize("gap", [0.5, 4.0])
@pytest.mark.parametrize("how", ["frozen", "in the optimizer", "without a gradient"])
def test_a_bias_that_stays_belongs_to_its_neuron(tmp_path: Path, gap: float, how: str) -> None:
    """The weights of 0 and 1 change places, the biases stay: renaming costs 2 gap², not 0."""
    model = Mover(ROWS, towards(1.0), bias=torch.tensor([0.0, gap, 1.0], dtype=torch.float64))
    if how != "frozen":
        model.body.bias.requires_grad_(True)
    if how == "without a gradient":
        model.configure_optimizers = lambda: torch.optim.SGD(model.body.parameters(), lr=1.0)  # type: ignore[method-assign]
    elif how == "in the optimizer":
        model.training_step = lambda batch, batch_idx: (  # type: ignore[method-assign]
            (model.body.weight * model.gradient).sum() + 0.0 * model.body.bias.sum()
        )
    callback = clouds()
    trainer(tmp_path, callback).fit(model, loader(batches(1)))
    paired = 2 * float((ROWS[0] - ROWS[1]).square().sum())
    squares = min(paired, 2 * gap**2)
    got = last_row(callback)
    assert got["wasserstein2"] == pytest.approx(math.sqrt(squares), rel=CLOSE)
    assert got["identity_excess"] == pytest.approx(paired / squares - 1, rel=CLOSE, abs=CLOSE)


def test_a_bias_that_is_moved_unmeasured_is_left_out(tmp_path: Path) -> None:
    """Its optimizer has no hooks: where it started is unknown, and the cloud is that of the weights."""

    class Mixed(Mover):
        def __init__(self) -> None:
            super().__init__(ROWS, towards(0.75), bias=torch.tensor([0.0, 4.0, 1.0], dtype=torch.float64))
            self.body.bias.requires_grad_(True)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward((self.body.weight * self.gradient).sum() + self.body.bias.square().sum())
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [Bare([self.body.bias]), torch.optim.SGD([self.body.weight], lr=1.0)]

    callback = clouds()
    with pytest.warns(UserWarning, match="can't measure Bare"):
        trainer(tmp_path, callback).fit(Mixed(), loader(batches(1)))
    assert last_row(callback)["identity_excess"] == pytest.approx(8.0, rel=CLOSE)  # 0.75²/0.25² − 1


def test_many_steps_on_a_straight_line(tmp_path: Path) -> None:
    """Whenever it is looked at, W₂ is that of the moment; the column has the rows of the epochs' ends alone."""
    model = Mover(ROWS, towards(0.75), steps=12)
    callback = clouds()
    trainer(tmp_path, callback, max_epochs=3).fit(model, loader(batches(4)))
    distance = math.sqrt(2) * float((ROWS[0] - ROWS[1]).norm())
    assert callback.record is not None
    columns = callback.record.columns
    ends = columns["step"] % 4 == 0
    assert columns["wasserstein2"][ends] == pytest.approx(distance * np.array([0.25, 0.5, 0.25]), rel=1e-9)
    for name in TOTALS:
        assert np.isnan(columns[name][~ends]).all()
        assert np.isfinite(columns[name][ends]).all()
    assert len(columns["step"]) == 12
    assert not set(callback.record.reasons) & set(TOTALS)


# --- what is measured, and when


def test_off_by_default(tmp_path: Path) -> None:
    callback = quiet()
    fitted = trainer(tmp_path, callback)
    fitted.fit(Regressor(), loader(batches(3)))
    assert callback.record is not None
    assert not set(callback.record.columns) & set(TOTALS)
    assert not set(callback.record.reasons) & set(TOTALS)
    assert callback.record.clouds["layers"] == []
    assert set(fitted.callback_metrics) == {f"speed_limit/{name}" for name in LOGGED}
    assert "W2" not in str(callback.record.summary())


@pytest.mark.parametrize("wrong", ["rows", "Neurons", True, ["neurons"], 3])
def test_other_clouds_raise(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"clouds got .*, wanted 'neurons' or None"):
        SpeedLimit(clouds=wrong)


def test_the_summary_and_the_callback_know_the_same_names() -> None:
    assert summary_text.CLOUDS == neuron_clouds.TOTALS == TOTALS


REGRESSOR = {"first": rows("first.weight", "first.bias"), "second": rows("second.weight", "second.bias")}


@pytest.mark.parametrize("every", [1, 3, 4, 50])
def test_the_end_of_a_fit_that_is_cut_short(tmp_path: Path, every: int) -> None:
    callback, kept = clouds(), Snapshots()
    fitted = trainer(tmp_path, callback, kept, max_steps=7, max_epochs=9, log_every_n_steps=every)
    fitted.fit(Regressor(sgd(lr=0.5)), loader(batches(4)))
    assert callback.record is not None
    assert callback.record.clouds["step"].tolist() == [4, 7]
    check_layers(callback.record, kept.states, REGRESSOR)
    check_totals(callback, kept.states, REGRESSOR, 0.0)
    saved = RunRecord.load(tmp_path / "speed_limit")
    assert str(saved.summary()) == str(callback.record.summary())
    np.testing.assert_array_equal(saved.clouds["wasserstein2"], callback.record.clouds["wasserstein2"])


def test_an_exception_within_an_epoch_says_where_the_last_clouds_are(tmp_path: Path) -> None:
    class Failing(Regressor):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            if self.tape.batch == 5:
                raise RuntimeError("out of cheese")
            return super().training_step(batch, batch_idx)

    callback = clouds()
    with pytest.raises(RuntimeError, match="out of cheese"):
        trainer(tmp_path, callback, max_epochs=3).fit(Failing(), loader(batches(4)))
    assert callback.record is not None
    assert callback.record.clouds["step"].tolist() == [4]
    summary = callback.record.summary()
    assert summary.steps == 6
    assert math.isnan(summary.wasserstein2)
    assert "ends of epochs" in summary.reasons["wasserstein2"]
    text = " ".join(str(summary).split())
    assert f"{listed(TOTALS)} are undefined: the neurons are compared at the ends of epochs" in text


@pytest.mark.parametrize("callback_first", [True, False])
@pytest.mark.parametrize("mover", [Swap, Shrink])
@pytest.mark.parametrize("every", [1, 7])
def test_weights_moved_in_validation(
    tmp_path: Path, mover: type[pl.Callback], callback_first: bool, every: int
) -> None:
    """W is between θ_0 and now: a move for good is part of it, and the action is not; one that is undone is no move."""
    model, callback, other = Validated(), clouds(), mover()
    order = [callback, other] if callback_first else [other, callback]
    options = {"val_check_interval": 5, "max_epochs": 2, "num_sanity_val_steps": 0, "log_every_n_steps": every}
    trainer(tmp_path, *order, **options).fit(model, loader(batches(10)), loader(batches(1, seed=2)))
    got, steps = last_row(callback), model.tape.steps
    wide = math.sqrt(got["wasserstein2"] ** 2 * (1 + got["identity_excess"]))
    assert wide == pytest.approx(float((flat(list(model.parameters())) - steps[0].before).norm()), rel=EXACT)
    assert got["displacement"] == pytest.approx(float(torch.stack([s.update for s in steps]).sum(0).norm()), rel=EXACT)
    name = "kinematic_efficiency_wasserstein2"
    assert callback.record is not None
    assert math.isnan(got[name]) == (mover is Shrink)
    assert ("moved outside of optimizer.step" in callback.record.reasons.get(name, "")) == (mover is Shrink)
    assert mover is Shrink or got["wasserstein2"] <= got["displacement"] * (1 + FLOAT32)


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_move_after_the_last_step_is_seen(tmp_path: Path, epochs: int) -> None:
    """In the first epoch no step has followed that could tell of it."""
    callback = clouds()
    options = {"max_epochs": epochs, "num_sanity_val_steps": 0}
    trainer(tmp_path, Shrink(), callback, **options).fit(Validated(), loader(batches(4)), loader(batches(1, seed=2)))
    got = last_row(callback)
    assert (got["moved_outside"] > 0) == (epochs > 1)
    assert math.isfinite(got["wasserstein2"])
    assert math.isnan(got["kinematic_efficiency_wasserstein2"])


@pytest.mark.parametrize("callback_first", [True, False])
@pytest.mark.parametrize("name", AVERAGING)
def test_averaging_callbacks(tmp_path: Path, name: str, callback_first: bool) -> None:
    """They swap weights in validation and at the end: the neurons are those that were trained."""
    if not hasattr(pl.callbacks, "EMAWeightAveraging"):
        pytest.skip("this Lightning has no weight averaging but the stochastic one")
    model, callback = Validated(), clouds()
    order = [callback, AVERAGING[name]()] if callback_first else [AVERAGING[name](), callback]
    fitted = trainer(tmp_path, *order, max_epochs=4, num_sanity_val_steps=0)
    fitted.fit(model, loader(batches(8)), loader(batches(1)))
    steps, shapes = model.tape.steps, {n: p.shape for n, p in Validated().named_parameters()}
    states = []
    for theta in (steps[0].before, steps[-1].after):
        parts = torch.split(theta, [shape.numel() for shape in shapes.values()])
        states.append({n: part.view(shapes[n]) for n, part in zip(shapes, parts, strict=True)})
    check_totals(callback, states, REGRESSOR, 0.0)


def test_weights_moved_between_steps_are_part_of_it(tmp_path: Path) -> None:
    class Clamp(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            if trainer.global_step >= 5:
                with torch.no_grad():
                    module.first.weight.clamp_(-0.3, 0.3)

    callback, kept = clouds(), Snapshots()
    trainer(tmp_path, Clamp(), callback, kept, max_epochs=2).fit(Regressor(), loader(batches(4)))
    assert callback.record is not None
    assert callback.record.clouds["step"].tolist() == [4, 8]
    check_layers(callback.record, kept.states, REGRESSOR)
    ratio = callback.record.columns["kinematic_efficiency_wasserstein2"]
    assert np.isfinite(ratio[3])
    assert math.isnan(ratio[-1])
    reasons = callback.record.reasons
    assert reasons["kinematic_efficiency_wasserstein2"].startswith("weights were moved outside of optimizer.step: W2")
    assert reasons["displacement"].startswith("weights were moved outside of optimizer.step before")
    assert not {"wasserstein2", "wasserstein2_lower", "identity_excess"} & reasons.keys()


def test_layers_that_come_later(tmp_path: Path) -> None:
    """Unfrozen in the second epoch: the table grows a column, and θ_0 is of that moment."""

    class Unfreezing(Regressor):
        def __init__(self) -> None:
            super().__init__(sgd(lr=0.5))
            self.second.requires_grad_(False)

        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.second.requires_grad_(True)

    callback, kept = clouds(), Snapshots()
    trainer(tmp_path, callback, kept, max_epochs=2).fit(Unfreezing(), loader(batches(4)))
    assert callback.record is not None
    table = callback.record.clouds
    assert table["layers"] == ["first", "second"]
    assert np.isnan(table["wasserstein2"][0]).tolist() == [False, True]
    assert table["wasserstein2"][1, 1] > 0
    check_totals(callback, [kept.states[0], kept.states[2]], REGRESSOR, 0.0)


def test_lazy_layers(tmp_path: Path) -> None:
    torch.manual_seed(1)
    body = nn.Sequential(nn.LazyLinear(6, dtype=torch.float64), nn.Tanh(), nn.LazyConvTranspose1d(2, 1).double())
    model = Random(body, normal(4, 3, 2))
    model.configure_optimizers = lambda: torch.optim.Adam(model.parameters(), lr=0.3)  # type: ignore[method-assign]
    callback = clouds()
    assert neuron_clouds.layers(model) == []
    stop = EarlyStopping("speed_limit/wasserstein2", mode="max", strict=True)
    trainer(tmp_path, callback, stop).fit(model, loader(batches(4)))
    assert callback.record is not None
    assert callback.record.clouds["layers"] == ["body.0", "body.2"]
    assert callback.record.clouds["particles"].tolist() == [6, 2]
    assert np.isfinite(callback.record.clouds["wasserstein2"]).all()


@pytest.mark.parametrize("sparse", [True, False])
def test_sparse_gradients(tmp_path: Path, sparse: bool) -> None:
    torch.manual_seed(1)
    model = Random(nn.Embedding(9, 2, sparse=sparse).double(), tokens, optimizer=lambda p: torch.optim.SGD(p, lr=9.0))
    callback, kept = clouds(), Snapshots()
    trainer(tmp_path, callback, kept).fit(model, loader(batches(4)))
    particles = {"body": rows("body.weight")}
    assert callback.record is not None
    check_layers(callback.record, kept.states, particles)
    check_totals(callback, kept.states, particles, 0.0)


def test_a_parameter_outside_of_the_module_counts(tmp_path: Path) -> None:
    outside = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))

    class Holding(Mover):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + (outside * torch.tensor([3.0, 4.0])).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([*self.parameters(), outside], lr=1.0)

    callback = clouds()
    trainer(tmp_path, callback).fit(Holding(ROWS, towards(0.75)), loader(batches(1)))
    squares = 2 * 0.25**2 * float((ROWS[0] - ROWS[1]).square().sum())
    assert last_row(callback)["wasserstein2"] == pytest.approx(math.sqrt(squares + 25.0), rel=CLOSE)


def test_a_model_without_matrices_says_so(tmp_path: Path) -> None:
    class Shift(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(3))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (self.shift - 1.0).square().sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = clouds()
    trainer(tmp_path, callback).fit(Shift(), loader(batches(2)))
    assert callback.record is not None
    assert math.isnan(last_row(callback)["wasserstein2"])
    assert "no layer with a weight of two or more dimensions" in callback.record.reasons["wasserstein2"]


def test_optimizers_replaced_within_a_fit(tmp_path: Path) -> None:
    """Measured anew from there; the new count of steps meets the old one at the epoch's end all the same."""

    class Replace(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.optimizers = [torch.optim.SGD(module.parameters(), lr=0.5)]

    callback, kept = clouds(), Snapshots()
    fitted = trainer(tmp_path, Replace(), callback, kept, max_epochs=2, log_every_n_steps=50)
    with pytest.warns(UserWarning, match="optimizers were replaced"):
        fitted.fit(Regressor(), loader(batches(4)))
    assert callback.record is not None
    assert callback.record.columns["step"].tolist() == callback.record.clouds["step"].tolist() == [4]
    check_totals(callback, kept.states[1:], REGRESSOR, 0.0)


# --- logging


def logged(logger: CSVLogger) -> list[dict[str, str]]:
    with open(Path(logger.log_dir) / "metrics.csv", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row.get("speed_limit/wasserstein2")]


KEYS = [f"{place}{name}" for place in ("", "layers/first/", "layers/second/") for name in neuron_clouds.SHOWN]


@pytest.mark.parametrize("monitored", [False, True])
@pytest.mark.parametrize("every", [1, 3, 4, 50])
def test_the_ends_of_epochs_are_logged_once(tmp_path: Path, every: int, monitored: bool) -> None:
    """Also where the last step was a log step, whose row then gets its values; and nothing within the epochs."""
    logger, callback = CSVLogger(tmp_path), clouds(per_layer=True)
    keep = [ModelCheckpoint(tmp_path, monitor="speed_limit/wasserstein2")] if monitored else []
    options = {"logger": logger, "max_epochs": 3, "log_every_n_steps": every, "enable_checkpointing": monitored}
    fitted = trainer(tmp_path, callback, *keep, **options)
    fitted.fit(Validated(sgd(lr=0.5)), loader(batches(4)), loader(batches(1)))
    found = logged(logger)
    assert [row["epoch"] for row in found] == ["0", "1", "2"]
    assert [row["step"] for row in found] == ["3", "7", "11"]  # Lightning counts from 0
    assert callback.record is not None
    table, columns = callback.record.clouds, callback.record.columns
    ends = np.isin(columns["step"], [4, 8, 12])
    assert ends.sum() == 3
    for key in KEYS:
        place, _, name = key.rpartition("/")
        wanted = table[name][:, ["first", "second"].index(place[7:])] if place else columns[name][ends]
        got = [float(row[f"speed_limit/{key}"]) for row in found]
        assert got == pytest.approx(wanted.tolist(), rel=1e-6, abs=1e-7)  # float32 logs
    for name in ("displacement", "work_ito"):
        assert np.isfinite(columns[name][ends]).all()  # the row is whole
    assert set(fitted.callback_metrics) >= {f"speed_limit/{key}" for key in KEYS}


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize("every", [1, 3, 50])
def test_early_stopping_and_checkpoints_on_clouds(tmp_path: Path, validated: bool, every: int) -> None:
    """W₂ grows, so early stopping for a minimum stops after two epochs; NaN would stop it after one."""
    stop = EarlyStopping("speed_limit/wasserstein2", mode="min", patience=1)
    layer = EarlyStopping("speed_limit/layers/first/wasserstein2", mode="max", patience=9)
    best = ModelCheckpoint(tmp_path, monitor="speed_limit/wasserstein2", mode="max", filename="best")
    often = ModelCheckpoint(tmp_path, monitor="speed_limit/identity_excess", every_n_train_steps=1, filename="often")
    callback, model = clouds(), Validated(sgd(lr=0.01))
    settings = {"enable_checkpointing": True, "max_epochs": 9, "log_every_n_steps": every}
    fitted = trainer(tmp_path, stop, layer, best, often, callback, **settings)
    fitted.fit(model, loader(batches(1) * 5), *([loader(batches(1))] if validated else []))
    assert fitted.current_epoch == 2
    assert callback.record is not None
    last = last_row(callback)["wasserstein2"]
    assert float(best.best_model_score) == pytest.approx(last, rel=1e-6)  # float32 logs
    assert float(layer.best_score) == pytest.approx(callback.record.clouds["wasserstein2"][-1, 0], rel=1e-6)


@pytest.mark.parametrize("monitored", [False, True])
def test_an_epoch_is_compared_once(tmp_path: Path, monitored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once more before the validation or at the end of the fit."""
    calls = []
    measure = neuron_clouds.measure
    monkeypatch.setattr(neuron_clouds, "measure", lambda *given: calls.append(given) or measure(*given))
    stop = [EarlyStopping("speed_limit/wasserstein2", mode="max", patience=9)] if monitored else []
    fitted = trainer(tmp_path, *stop, clouds(), max_epochs=3)
    fitted.fit(Validated(sgd(lr=0.01)), loader(batches(1) * 5), loader(batches(1)))
    assert len(calls) == 3


def test_a_misspelt_layer_is_not_awaited(tmp_path: Path) -> None:
    stop = EarlyStopping("speed_limit/layers/frist/wasserstein2", mode="min")
    with pytest.raises(RuntimeError, match=r"layers/frist/wasserstein2.* not available"):
        trainer(tmp_path, stop, clouds()).fit(Regressor(), loader(batches(2)))


def test_no_logger_barebones_and_fast_dev_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for options in ({"barebones": True, "max_epochs": 1}, {"fast_dev_run": 4, "logger": False}):
        callback = clouds()
        pl.Trainer(accelerator="cpu", callbacks=[callback], **options).fit(Regressor(), loader(batches(4)))
        assert last_row(callback)["step"] == 4
        assert last_row(callback)["wasserstein2"] > 0
    assert not [w for w in recwarn if "barebones" in str(w.message) and "self.log" in str(w.message)]
    assert not list(tmp_path.iterdir())


# --- the training is left alone


@pytest.mark.parametrize(
    ("name", "options"), [("SGD", {}), ("AdamW", CLIP | {"log_every_n_steps": 1, "val_check_interval": 3})], ids=str
)
def test_the_training_is_bitwise_the_same(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    without = run(tmp_path / "a", OPTIMIZERS[name], options)
    callback = clouds()
    assert run(tmp_path / "b", OPTIMIZERS[name], options, callback) == without
    assert callback.record is not None
    assert len(callback.record.clouds["step"]) == 5  # and it did measure


@pytest.mark.filterwarnings("error")
def test_no_state_of_torch_is_touched() -> None:
    """600 neurons, many of which change places: Sinkhorn potentials are needed."""
    model = nn.Linear(3, 600, bias=False)
    meter = TrajectoryMeter(torch.optim.SGD(model.parameters(), lr=1.0))
    start = StartWeights(model, meter.optimizers)
    start.take()
    (0.8 * model.weight * (model.weight - model.weight.flip(0)).detach()).sum().backward()
    meter.optimizers[0].step()
    weights = [p.detach().clone() for p in model.parameters()]
    versions = [p._version for p in model.parameters()]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            before = torch.get_rng_state(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
            found = neuron_clouds.measure(model, meter, meter.optimizers, start.of)
            after = torch.get_rng_state(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
            assert torch.is_grad_enabled() is grad
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]
    # 80 % of the way to another's place, as in the closed form above, and a pairing still better than the reversal.
    assert found.totals["identity_excess"] > 0.8**2 / 0.2**2 - 1
    assert found.reasons == {}
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert [p._version for p in model.parameters()] == versions


# --- precision


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_half_precision_is_said_once(tmp_path: Path, precision: str) -> None:
    dtype = torch.float16 if precision == "16-true" else torch.bfloat16
    model, callback, kept = Regressor(sgd(lr=0.2), dtype=dtype), clouds(), Snapshots()
    with heard("rounding of") as about:
        fitted = trainer(tmp_path, callback, kept, precision=precision, max_epochs=3)
        fitted.fit(model, loader(batches(4, dtype=dtype)))
    assert len(about) == 1
    assert f"compares the neurons as they are trained, in {dtype}" in about[0]
    assert callback.record is not None
    check_layers(callback.record, kept.states, REGRESSOR)
    check_totals(callback, kept.states, REGRESSOR, 0.0)


def test_single_precision(tmp_path: Path) -> None:
    model, callback, kept = Regressor(sgd(lr=0.5), dtype=torch.float32, width=40), clouds(), Snapshots()
    trainer(tmp_path, callback, kept, max_epochs=2).fit(model, loader(batches(4, dtype=torch.float32)))
    assert callback.record is not None
    check_layers(callback.record, kept.states, REGRESSOR)
    check_totals(callback, kept.states, REGRESSOR, 0.0)


# --- what cannot be measured is said


def poisoned(tmp_path: Path, callback: SpeedLimit) -> Any:
    """The weights of the first layer are NaN from the second epoch on, the second layer's are not."""

    class Poisoned(Regressor):
        def on_after_backward(self) -> None:
            super().on_after_backward()
            self.second.weight.grad.nan_to_num_()  # type: ignore[union-attr]
            self.second.bias.grad.nan_to_num_()  # type: ignore[union-attr]
            if self.tape.batch == 5:
                self.first.weight.grad.fill_(math.nan)  # type: ignore[union-attr]

    model = Poisoned()
    fitted = trainer(tmp_path, callback, max_epochs=4)
    fitted.fit(model, loader(batches(4)))
    assert len(model.tape.steps) == 16  # the training went on
    return fitted


def test_weights_that_are_not_finite_are_said_once_by_layer(tmp_path: Path) -> None:
    callback = clouds()
    with heard("could not compare") as about:
        fitted = poisoned(tmp_path, callback)
    assert len(about) == 1
    assert "the neurons of first (its weights are not finite)" in about[0]
    assert callback.record is not None
    table = callback.record.clouds
    assert table["step"].tolist() == [4, 8, 12, 16]
    assert np.isnan(table["wasserstein2"]).tolist() == [[False, False], *[[True, False]] * 3]
    for name in TOTALS:
        assert math.isnan(last_row(callback)[name])
        assert "first could not be compared: its weights are not finite" in callback.record.reasons[name]
    assert math.isnan(fitted.callback_metrics["speed_limit/layers/first/identity_excess"])
    assert math.isfinite(fitted.callback_metrics["speed_limit/layers/second/identity_excess"])
    text = " ".join(str(callback.record.summary()).split())
    assert f"{listed(TOTALS)} are undefined: the neurons of first could not be compared" in text


def test_a_transport_that_fails_leaves_the_other_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = neuron_clouds.wasserstein2_squared

    def sometimes(x: Any, y: Any) -> Any:
        if len(y[0]) > 1:
            raise MemoryError("no room for a matrix")
        return real(x, y)

    monkeypatch.setattr(neuron_clouds, "wasserstein2_squared", sometimes)
    callback = clouds()
    with pytest.warns(UserWarning, match=r"of first \(MemoryError: no room for a matrix\).*training goes on") as said:
        trainer(tmp_path, callback, max_epochs=3).fit(Regressor(), loader(batches(4)))
    assert sum("no room" in str(w.message) for w in said) == 1
    assert callback.record is not None
    assert np.isnan(callback.record.clouds["wasserstein2"]).tolist() == [[True, False]] * 3
    assert callback.record.clouds["particles"].tolist() == [5, 1]
    assert "MemoryError" in callback.record.reasons["wasserstein2"]
    assert last_row(callback)["displacement"] > 0


def test_a_measurement_that_fails_altogether(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning would take a StopIteration for the end of an epoch."""

    def stop(module: Any) -> Iterator[Any]:
        raise StopIteration

    monkeypatch.setattr(neuron_clouds, "layers", stop)
    model, callback = Regressor(), clouds()
    with pytest.warns(UserWarning, match="could not be compared: StopIteration") as said:
        trainer(tmp_path, callback, max_epochs=3).fit(model, loader(batches(4)))
    assert sum("StopIteration" in str(w.message) for w in said) == 1
    assert len(model.tape.steps) == 12
    assert callback.record is not None
    assert "StopIteration" in callback.record.reasons["wasserstein2"]
    assert last_row(callback)["displacement"] > 0


def test_too_many_neurons_leave_an_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wasserstein2, "MAX_PAIRS", 8)  # of neurons: moments alone bound W₂ then
    callback = clouds()
    trainer(tmp_path, callback).fit(Regressor(sgd(lr=0.5)), loader(batches(4)))
    got = last_row(callback)
    assert callback.record is not None
    assert 0 < got["wasserstein2_lower"] < got["wasserstein2"] <= got["displacement"] * (1 + FLOAT32)
    for name in ("wasserstein2", "identity_excess", "kinematic_efficiency_wasserstein2"):
        assert callback.record.reasons[name].startswith("first: no pairing was proven optimal")
    assert "wasserstein2_lower" not in callback.record.reasons
    text = " ".join(str(callback.record.summary()).split())
    assert "wasserstein2, identity_excess and kinematic_efficiency_wasserstein2: first: no pairing" in text
    assert "neurons changed places" not in text
    assert re.search(r"free to swap names; at least \d", text)


# --- resuming

PER_EPOCH = 8


def fit(folder: Path, callback: Any, *, ckpt: Any = None, at: int | None = None, others: Any = (), **more: Any) -> Any:
    """3 epochs of 8 steps, resumed from `ckpt`; `at`: leaves a checkpoint of that step."""
    callbacks = [callback, *others]
    if at is not None:
        callbacks.append(ModelCheckpoint(folder, filename="{step}", every_n_train_steps=at, save_top_k=-1))
    settings = {"max_epochs": 3, "enable_checkpointing": len(callbacks) > 1, "log_every_n_steps": 3, **more}
    fitted = trainer(folder, *callbacks, **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*ckpt.*|.*resum.*|.*dirpath.*", category=UserWarning, module=".*pytorch.*")
        model = Validated(lambda p: torch.optim.AdamW(p, lr=0.1))
        fitted.fit(model, Resumable(batches(PER_EPOCH)), loader(batches(1)), ckpt_path=ckpt)
    return fitted


def same(got: SpeedLimit, wanted: SpeedLimit) -> None:
    assert got.record is not None
    assert wanted.record is not None
    for mine, other in ((got.record.columns, wanted.record.columns), (got.record.clouds, wanted.record.clouds)):
        assert mine.keys() == other.keys()
        for name, column in repeatable(other).items():
            np.testing.assert_array_equal(mine[name], column, err_msg=name)
    assert got.record.reasons == wanted.record.reasons


@pytest.mark.parametrize("monitored", [False, True])
@pytest.mark.parametrize("at", [5, 8, 24])  # within an epoch, at its end, and at the end of the fit
def test_a_resumed_run_has_the_record_of_the_uninterrupted_one(tmp_path: Path, at: int, monitored: bool) -> None:
    whole, resumed = clouds(), clouds()
    others = [EarlyStopping("speed_limit/wasserstein2", mode="max", patience=9)] if monitored else []
    fit(tmp_path, whole, at=at, others=others)
    fitted = fit(tmp_path, resumed, ckpt=tmp_path / f"step={at}.ckpt", others=copy.deepcopy(others))
    same(resumed, whole)
    assert fitted.global_step == 24
    assert whole.record is not None
    assert whole.record.clouds["step"].tolist() == [8, 16, 24]
    assert np.isfinite(whole.record.clouds["wasserstein2"]).all()


def test_a_monitor_in_a_resumed_run_finds_what_was_known(tmp_path: Path) -> None:
    """In the middle of an epoch: that of the epoch before, and not NaN, at which early stopping would stop."""
    whole, resumed = clouds(), clouds()
    fit(tmp_path, whole, at=13)
    stop = EarlyStopping("speed_limit/wasserstein2", mode="max", patience=9)
    often = {"ckpt": tmp_path / "step=13.ckpt", "others": [stop], "val_check_interval": 2, "log_every_n_steps": 50}
    assert fit(tmp_path, resumed, **often).global_step == 24
    assert whole.record is not None
    assert resumed.record is not None
    np.testing.assert_array_equal(resumed.record.clouds["wasserstein2"], whole.record.clouds["wasserstein2"])


def test_resuming_without_clouds(tmp_path: Path) -> None:
    """The setting may change: what was measured stays in the record."""
    whole, off = clouds(), quiet()
    fit(tmp_path, whole, at=17)
    fitted = fit(tmp_path, off, ckpt=tmp_path / "step=17.ckpt")
    assert off.record is not None
    assert off.record.clouds["step"].tolist() == [8, 16]
    assert "speed_limit/wasserstein2" not in fitted.callback_metrics
    assert math.isnan(off.record.summary().wasserstein2)


def test_a_second_fit_starts_new_clouds(tmp_path: Path) -> None:
    model, callback, kept = Regressor(sgd(lr=0.5)), clouds(), Snapshots()
    fitted = trainer(tmp_path, callback, kept)
    fitted.fit(model, loader(batches(4)))
    fitted.fit_loop.max_epochs = 2
    fitted.fit(model, loader(batches(4)))
    assert callback.record is not None
    assert callback.record.clouds["step"].tolist() == [4]
    check_totals(callback, kept.states[2:], REGRESSOR, 0.0)
    assert torch.equal(flat(of(model.tape._optimizers[-1])), flat(list(model.parameters())))
