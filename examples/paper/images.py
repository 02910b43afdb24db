"""Fully connected and convolutional networks on images: a short non-optimal stretch, then a longer one.

    python examples/paper/images.py                       # some minutes on one core: scikit-learn's digits
    python examples/paper/images.py --quick               # a few seconds, to see that everything works
    python examples/paper/images.py --cifar FOLDER --examples 1024     # CIFAR-10, unpacked in FOLDER

An FCN and a CNN learn one-hot labels with nn.MSELoss, the loss of the theory, by SGD with a small step: learning
rate × λ_1 = 0.1, λ_1 the largest eigenvalue of the loss's kernel. The full batch and minibatches, PyTorch's own
initialization, no preprocessing. They are trained by a Lightning Trainer with `SpeedLimit` attached, as in any
project, and everything is read from its record (THEORY.md, §2 and §7):

    η(s, t) = D²(s, t)/[(τ_t − τ_s) Q(s, t)]        of windows (t, 4t), and of (0, t)
    record.regimes()                                where η steps from one level to another

Then: which directions of weights and outputs carry the motion on both sides of the first boundary; what becomes of
it when these directions have nothing to do, and for other starts, inputs and depths; and η against
what the networks' own kernels predict for gradient flow (§6).
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import cifar
import numpy as np
import pytorch_lightning as pl
import torch
from common import COLOURS, LINES, MARKERS, Options, Report, digits, figure, number, parse, progress
from ntk import descend
from own_kernel import Data, Modes, tangent_kernel
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_speedlimit import RunRecord, SpeedLimit
from lightning_speedlimit.record import Windows
from lightning_speedlimit.theory import predict

STEP = 0.1  # learning rate × λ_1 of the mean-reduced loss
CLASSES = 10
Loss = Callable[[Tensor, Tensor], Tensor]  # of outputs and one-hot targets


@dataclass(frozen=True)
class Plan:
    """How much is run."""

    examples: int
    batch: int
    steps: int
    per_octave: int  # log steps
    survey: int  # of the settings compared
    kernel_images: int  # whose kernel tells the directions
    points: int  # images that a network and its own kernel are compared on
    widths: dict[str, tuple[int, int]]  # neurons or channels, narrow and wide
    seeds: int  # of these
    times: tuple[float, ...]  # λ_1·t


FULL = Plan(
    examples=512,
    batch=64,
    steps=2048,
    per_octave=16,
    survey=99,
    kernel_images=60,
    points=40,
    widths={"FCN": (16, 256), "CNN": (2, 16)},
    seeds=3,
    times=(0.5, 1, 2, 3, 5, 8, 12, 20, 32, 50, 80),
)
QUICK = Plan(
    examples=64,
    batch=16,
    steps=48,
    per_octave=4,
    survey=2,
    kernel_images=10,
    points=8,
    widths={"FCN": (8, 16), "CNN": (1, 2)},
    seeds=1,
    times=(0.5, 1, 2, 5),
)


# --- data and networks


def one_hot(images: Tensor, labels: Tensor) -> Data:
    return images, nn.functional.one_hot(labels, CLASSES).to(images)


def some_digits(examples: int, seed: int) -> tuple[Tensor, Tensor]:
    images, labels = digits()
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:examples]
    return images[chosen], labels[chosen]


def fcn(images: Tensor, width: int = 64, hidden: int = 4) -> nn.Sequential:
    """`hidden` layers of `width` neurons, ReLU."""
    sizes = [images[0].numel(), *[width] * hidden]
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(width, CLASSES))


def cnn(images: Tensor, channels: int = 8) -> nn.Sequential:
    """Three 3 × 3 convolutions with `channels`, twice and twice as many channels, ReLU, mean-pooled by 4 in all."""
    colours, height, width = images.shape[1:]
    a, b = channels, 2 * channels
    return nn.Sequential(
        *(nn.Conv2d(colours, a, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(b, b, 3, padding=1), nn.ReLU(), nn.Flatten()),
        nn.Linear(b * (height // 4) * (width // 4), CLASSES),
    )


BUILD = {"FCN": fcn, "CNN": cnn}
PLAIN = {"FCN": 64, "CNN": 8}  # the width of those that are trained on all images


def he(network: nn.Module) -> nn.Module:
    """Weights from N(0, 2/inputs), biases 0: signals keep their size from layer to layer."""
    for part in network.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
            nn.init.zeros_(part.bias)
    return network


def centre_residual(network: nn.Module, data: Data) -> Data:
    """Targets moved by one constant per output, such that the mean residual ⟨f_{θ_0} − y⟩ over images is 0."""
    x, y = data
    with torch.no_grad():
        return x, y + (network(x) - y).mean(0)


def without_first_modes(network: nn.Module, data: Data) -> Data:
    """Targets moved such that r_{θ_0} = f_{θ_0} − y has no part in the ten first modes of the kernel on these data."""
    x, y = data
    first = torch.linalg.eigh(tangent_kernel(network, x))[1][:, -CLASSES:].to(y)
    with torch.no_grad():
        residual = (network(x) - y).flatten()
    return x, y + (first @ (first.T @ residual)).reshape(y.shape)


def power(network: nn.Module, data: Data) -> float:
    """‖∇L‖² at these weights, loss²/parameter²: what gradient flow dissipates per time."""
    loss = nn.functional.mse_loss(network(data[0]), data[1])
    return sum(part.square().sum().item() for part in torch.autograd.grad(loss, list(network.parameters())))


@dataclass(frozen=True)
class Start:
    """What the kernel K = JJᵀ on some of the images says before the training; λ are 2/(N·C) of its eigenvalues."""

    eigenvalues: Tensor
    """Descending, those of nn.MSELoss, loss/parameter²."""
    power_share: float
    """Of the ten first modes, one per output, in ‖∇L‖² ∝ Σ λ r²: how much of the first motion is theirs."""

    @property
    def learning_rate(self) -> float:
        return STEP / self.eigenvalues[0].item()

    @property
    def gap(self) -> float:
        """λ_10/λ_11."""
        return (self.eigenvalues[CLASSES - 1] / self.eigenvalues[CLASSES]).item()

    @classmethod
    def of(cls, network: nn.Module, data: Data, images: int) -> Start:
        modes = Modes.of(network, (data[0][:images], data[1][:images]))
        power = modes.eigenvalues * modes.residual.square()
        return cls(modes.eigenvalues, (power[:CLASSES].sum() / power.sum()).item())


# --- training, by Lightning


class Learner(pl.LightningModule):
    """A LightningModule like any other."""

    def __init__(self, network: nn.Module, lr: float, loss: Loss) -> None:
        super().__init__()
        self.network, self.lr, self.loss = network, lr, loss

    def training_step(self, batch: Data, batch_idx: int) -> Tensor:
        x, y = batch
        return self.loss(self.network(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Batches(IterableDataset[Data]):
    """`steps` batches, shuffled anew in every pass; the first pass therefore is all the data."""

    def __init__(self, data: Data, size: int, steps: int, seed: int, label: str) -> None:
        self.data, self.size, self.steps, self.seed, self.label = data, size, steps, seed, label

    def __iter__(self) -> Iterator[Data]:
        order = self._order()
        for _ in progress(range(self.steps), self.label, self.steps):
            yield next(order)

    def _order(self) -> Iterator[Data]:
        x, y = self.data
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            if self.size >= len(x):
                yield x, y
            else:
                shuffled = torch.randperm(len(x), generator=generator)
                yield from ((x[part], y[part]) for part in shuffled.split(self.size) if len(part) == self.size)


class LogLessAndLess(pl.Callback):
    """Log steps at equal ratios: all up to 31, every 2nd up to 63, every 4th up to 127, …, where 16 are per octave.

    A record keeps 512 sketches of the weights. With log steps at equal distances in a long run these would be too
    far apart to see its first stretch.
    """

    def __init__(self, per_octave: int) -> None:
        self.per_octave = per_octave
        self.weights: dict[int, Tensor] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        octave = 1 << (batch_idx + 1).bit_length() - 1
        trainer.log_every_n_steps = max(1, octave // self.per_octave)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.log_every_n_steps == 0:
            self.weights[batch_idx + 1] = flat(pl_module.network)


def flat(network: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(network.parameters()).detach().clone()


@dataclass(frozen=True)
class Run:
    """A training that was done: its record, θ at the log steps, and the loss at the start."""

    record: RunRecord
    weights: dict[int, Tensor]
    first_loss: float


def train(
    network: nn.Module,
    data: Data,
    lr: float,
    batch: int,
    plan: Plan,
    seed: int,
    label: str,
    loss: Loss = nn.functional.mse_loss,
    probed: int | None = None,
) -> Run:
    """One run. The probe is the first pass over the data: η is of the loss on all images, whatever the batch.

    probed: images of the probe, where it is not all of them.
    """
    batches = Batches(data, batch, plan.steps, seed, label)
    module = Learner(network, lr, loss)
    with torch.no_grad():
        first_loss = module.training_step(data, 0).item()
    rhythm = LogLessAndLess(plan.per_octave)
    probe = max(1, (probed or len(data[0])) // batch)
    speed_limit = SpeedLimit(probe_batches=probe, log_figures=False, print_summary=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            callbacks=[rhythm, speed_limit],
            default_root_dir=folder,
            logger=CSVLogger(folder),
            max_epochs=1,
            accelerator="cpu",
            devices=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(module, DataLoader(batches, batch_size=None))
    assert speed_limit.record is not None
    return Run(speed_limit.record, rhythm.weights, first_loss)


# --- what a record says


def boundaries(record: RunRecord) -> list[int]:
    """The steps at which one regime ends and the next begins."""
    return [regime.last_step for regime in record.regimes()[:-1]]


def with_exact_losses(record: RunRecord) -> RunRecord:
    """The record without the losses' standard errors.

    A probe of n batches is taken for a sample, and its loss drop has the standard error of their mean. Here the
    batches are all images, and the loss is theirs without an error, which only we know.
    """
    state = record.state_dict()
    state["arrays"]["values"][state["columns"].index("loss_drop_se")] = np.nan
    return RunRecord.from_state_dict(state)


def middle(run: Run) -> int:
    """A log step: what takes the place of the boundary where there is none."""
    return max(step for step in run.weights if 2 * step <= max(run.weights))


def curves(run: Run) -> dict[str, Any]:
    """η over windows (t, 4t) and (0, t), the steps a factor of 1.3 apart or more, the loss, and the regimes.

    Undefined is a window whose loss did not fall by two standard errors; "untested" is η all the same.
    """
    record = run.record
    steps = record.sketch_steps
    chosen = [int(steps[0])]
    for step in steps.tolist():
        if step >= 1.3 * chosen[-1] or step == steps[-1]:
            chosen.append(step)
    starts = [step for step in chosen if 4 * step in steps]
    moving = record.windows(starts, [4 * step for step in starts])
    whole = record.windows(0, chosen)
    summary = record.summary()
    return {
        "windows": {
            "first_step": starts,
            "efficiency": moving.efficiency.tolist(),
            "untested": (moving.kinematic_efficiency / moving.conversion).tolist(),
        },
        "cumulative": {
            "step": chosen,
            "efficiency": whole.efficiency.tolist(),
            "loss": (run.first_loss - whole.loss_drop).tolist(),
        },
        "regimes": [asdict(regime) for regime in record.regimes()],
        "regimes_with_exact_losses": [asdict(regime) for regime in with_exact_losses(record).regimes()],
        "efficiency": summary.efficiency,
        "conversion": summary.conversion,
        "loss_drop": summary.loss_drop,
        "displacement": summary.displacement,
        "trough": trough(whole),
    }


def trough(whole: Windows) -> dict[str, float]:
    """Of η(0, t): from where it rises most, its value there, and the factor by which it then rises.

    A rise says that what came later is more optimal. A step of 1 is no trough: it only falls. NaN where η is nowhere
    defined.
    """
    known = np.isfinite(whole.efficiency)
    if not known.any():
        return dict.fromkeys(("step", "efficiency", "rise"), math.nan)
    steps, values = whole.last_step[known], whole.efficiency[known]
    highest_later = np.maximum.accumulate(values[::-1])[::-1]
    lowest = int(np.argmax(highest_later / values))
    return {"step": int(steps[lowest]), "efficiency": values[lowest], "rise": highest_later[lowest] / values[lowest]}


# --- what is behind it


def directions(network: nn.Module, data: Data, run: Run, boundary: int, images: int) -> dict[str, Any]:
    """Share of the ten first modes of the kernel at the start in Q and in D², up to the boundary and after it.

    On some of the images: K = J Jᵀ = V diag(λ) Vᵀ, r = f − y. A mode's part of the loss drop between s and t is
    ½[(vᵀr_s)² − (vᵀr_t)²], its part of D² = ‖Δθ‖² is (vᵀJΔθ)²/λ: that of Δθ along Jᵀv/√λ. J and V are those at
    the start in both stretches.
    """
    x, y = data[0][:images], data[1][:images]
    eigenvalues, basis = torch.linalg.eigh(tangent_kernel(network, x))
    first, top = flat(network), slice(-CLASSES, None)

    def outputs(weights: Tensor) -> Tensor:
        parts, values, at = list(network.named_parameters()), {}, 0
        for name, parameter in parts:
            values[name] = weights[at : at + parameter.numel()].view_as(parameter)
            at += parameter.numel()
        return torch.func.functional_call(network, values, (x,)).flatten()

    def shares(a: Tensor, b: Tensor) -> dict[str, float]:
        before, after = (basis.T @ (outputs(w) - y.flatten()).double() for w in (a, b))
        drop = before.square() - after.square()
        along = basis.T @ torch.func.jvp(outputs, (first,), (b - a,))[1].double()
        squared = along.square() / eigenvalues
        return {
            "loss_drop": (drop[top].sum() / drop.sum()).item(),
            "squared_displacement": (squared[top].sum() / (b - a).double().square().sum()).item(),
        }

    with torch.no_grad():
        at, end = run.weights[boundary], run.weights[max(run.weights)]
        residual = (basis.T @ (outputs(first) - y.flatten()).double()).square()
        return {
            "boundary": boundary,
            "share_of_residual": (residual[top].sum() / residual.sum()).item(),
            "before": shares(first, at),
            "after": shares(at, end),
        }


def kernel_along(network: nn.Module, data: Data, run: Run, steps: Sequence[int], images: int) -> list[dict[str, float]]:
    """At some steps: ‖K_t − K_0‖/‖K_0‖, the growth of λ_1 and λ_11, and the conversion since the step before.

    Conversion is loss drop over work; it falls where learning rate × λ_1 is no longer small.
    """
    x = data[0][:images]
    first, now = tangent_kernel(network, x), copy.deepcopy(network)
    at_start = torch.linalg.eigvalsh(first)
    rows = []
    for before, step in pairwise([0, *steps]):
        nn.utils.vector_to_parameters(run.weights[step], now.parameters())
        kernel = tangent_kernel(now, x)
        growth = torch.linalg.eigvalsh(kernel) / at_start
        rows.append(
            {
                "step": step,
                "moved": ((kernel - first).norm() / first.norm()).item(),
                "largest": growth[-1].item(),
                "eleventh": growth[-1 - CLASSES].item(),
                "conversion": float(run.record.windows(before, step).conversion),
            }
        )
    return rows


@dataclass(frozen=True)
class Setting:
    """One of the settings compared: what differs from the first."""

    title: str
    model: str = "FCN"
    centred_residual: bool = False
    he: bool = False
    centred_images: bool = False
    hidden: int = 4
    images: int | None = None
    no_first_modes: bool = False

    def data(self, data: Data) -> Data:
        x, y = (part[: self.images] for part in data)
        return (x - x.mean(0), y) if self.centred_images else (x, y)

    def network(self, images: Tensor, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        network = fcn(images, hidden=self.hidden) if self.model == "FCN" else cnn(images)
        return he(network) if self.he else network


def settings(plan: Plan) -> list[Setting]:
    few = {"images": plan.kernel_images}
    all_of_them = [
        Setting("FCN, mean residual 0", centred_residual=True),
        Setting("CNN, mean residual 0", "CNN", centred_residual=True),
        *(Setting(f"{model}, few images", model, **few) for model in BUILD),
        *(Setting(f"{model}, few images, no first modes", model, no_first_modes=True, **few) for model in BUILD),
        Setting("FCN, images centred", centred_images=True),
        Setting("CNN, images centred", "CNN", centred_images=True),
        Setting("FCN, 2 hidden layers", hidden=2),
        Setting("FCN, He's start", he=True),
        Setting("FCN, He's start, mean residual 0", he=True, centred_residual=True),
    ]
    return all_of_them[: plan.survey]


def survey(setting: Setting, data: Data, plan: Plan, seed: int) -> dict[str, Any]:
    """One full-batch run."""
    data = setting.data(data)
    network = setting.network(data[0], seed)
    if setting.centred_residual:
        data = centre_residual(network, data)
    if setting.no_first_modes:
        data = without_first_modes(network, data)
    start = Start.of(network, data, plan.kernel_images)
    run = train(copy.deepcopy(network), data, start.learning_rate, len(data[0]), plan, seed, setting.title)
    found = curves(run)
    return {
        "title": setting.title,
        "learning_rate": start.learning_rate,
        "gap": start.gap,
        "power": power(network, data),
        "trough": found["trough"],
        "boundaries": boundaries(run.record),
        "efficiency": found["efficiency"],
        **({"cumulative": found["cumulative"]} if setting.centred_residual else {}),
        **({"fixed_kernel": fixed_kernel(network, data, found, start)} if setting.images else {}),
    }


def fixed_kernel(network: nn.Module, data: Data, found: dict[str, Any], start: Start) -> dict[str, float]:
    """η(0, t) of gradient flow in the kernel at the start: where the run's own is lowest, and at the end."""
    lowest = found["trough"]["step"], found["cumulative"]["step"][-1]
    times = [start.learning_rate * step for step in lowest]
    curve = predict(network, *data, times, reduction="mean")
    return {"at_trough": curve.efficiency[0].item(), "at_end": curve.efficiency[1].item()}


# --- against the networks' own kernels


def own_kernel(model: str, width: int, by_he: bool, data: Data, plan: Plan, seed: int) -> dict[str, Any]:
    """η(0, t) of full-batch descent in float64, and of gradient flow in the kernel at the start; lr·λ_1 = STEP/2."""
    x, y = (part[: plan.points].double() for part in data)
    torch.manual_seed(seed)
    network = BUILD[model](x, width)
    network = (he(network) if by_he else network).double()
    kernel = tangent_kernel(network, x)
    largest = 2 / y.numel() * torch.linalg.eigvalsh(kernel)[-1].item()
    lr = STEP / 2 / largest
    marks = [round(2 * time / STEP) for time in plan.times]
    curve = predict(network, x, y, [lr * mark for mark in marks], reduction="mean")
    run = descend(network, (x, y), lr, marks, mean=True)
    bar = progress(run, f"{model} of width {width}, its own kernel", len(marks))
    measured = [values["efficiency"] for _, values in bar]
    moved = ((tangent_kernel(network, x) - kernel).norm() / kernel.norm()).item()
    return {
        "model": model,
        "width": width,
        "initialization": "He" if by_he else "PyTorch",
        "scaled_time": [STEP / 2 * mark for mark in marks],
        "measured": measured,
        "predicted": curve.efficiency,
        "departure": (torch.tensor(measured).double() / curve.efficiency - 1).abs().max(),
        "kernel_moved": moved,
    }


# --- what is shown


def draw(axes: Any, results: dict[str, Any]) -> None:
    for column, model in enumerate(BUILD):
        draw_run(axes[0, column], axes[1, column], model, results["runs"][model])
    draw_controls(axes[0, 2], results)
    draw_eigenvalues(axes[1, 2], results["networks"])
    for panel, start in zip(axes[:, 3], ("PyTorch", "He"), strict=True):
        rows = [row for row in results["own_kernel"] if row["initialization"] == start]
        draw_own_kernels(panel, rows, f"{start}'s start")


def hollow(k: int) -> dict[str, Any]:
    """Markers without a line."""
    return {"color": COLOURS[k], "marker": MARKERS[k], "markerfacecolor": "none", "linestyle": "none"}


def draw_run(top: Any, bottom: Any, model: str, runs: dict[str, Any]) -> None:
    """Above: η over windows as markers, η(0, t) as lines. Below: the loss. Vertical: the boundaries of regimes."""
    for k, (name, found) in enumerate(runs.items()):
        windows, whole = found["windows"], found["cumulative"]
        colour = COLOURS[2 * k]
        style = {**hollow(k), "color": colour, "markerfacecolor": "none" if k else colour, "markersize": 4 + 3 * k}
        top.plot(windows["first_step"], windows["efficiency"], label=f"(t, 4t), {name}", **style)
        top.plot(whole["step"], whole["efficiency"], linestyle=LINES[k], color=colour, label=f"(0, t), {name}")
        bottom.plot(whole["step"], whole["loss"], linestyle=LINES[k], color=colour, label=name)
    for boundary in (regime["last_step"] for regime in runs["full batch"]["regimes"][:-1]):
        for panel in (top, bottom):
            panel.axvline(boundary, color="#888888", linewidth=1)
        bottom.annotate(f" {boundary}", (boundary, 1), xycoords=("data", "axes fraction"), va="top", fontsize=8)
    top.set(xscale="log", yscale="log", xlabel="step t", ylabel="efficiency η", ylim=(0.07, 20))
    top.set_title(f"{model}: windows, and from the start")
    bottom.set(xscale="log", xlabel="step t", ylabel="loss on all images (MSE)", ylim=(0, None))
    bottom.set_title(f"{model}: loss, and where regimes meet")
    top.legend(loc="upper right", frameon=True, framealpha=1, edgecolor="none")
    bottom.legend(loc="lower left")


def draw_controls(axis: Any, results: dict[str, Any]) -> None:
    """η(0, t) of the full-batch runs, and of the same with nothing for the mean outputs to learn."""
    rows = {row["title"]: row for row in results["survey"]}
    for k, model in enumerate(BUILD):
        plain, other = (
            found["cumulative"] for found in (results["runs"][model]["full batch"], rows[f"{model}, mean residual 0"])
        )
        axis.plot(plain["step"], plain["efficiency"], linestyle=LINES[k], color=COLOURS[k], label=f"{model}, plain")
        axis.plot(other["step"], other["efficiency"], label=f"{model}, mean residual 0", **hollow(k))
    axis.set(xscale="log", yscale="log", xlabel="step t", ylabel="efficiency η(0, t)", ylim=(0.07, 1.5))
    axis.set_title("Without a mean residual")
    axis.legend(loc="lower left")


def draw_eigenvalues(axis: Any, networks: dict[str, Any]) -> None:
    for k, (model, found) in enumerate(networks.items()):
        axis.plot(range(1, len(found["eigenvalues"]) + 1), found["eigenvalues"], label=model, **hollow(k))
    axis.set(yscale="log", xlabel="mode k", ylabel="λ at the start (1/time)", title="Ten fast modes, one per output")
    axis.legend(loc="lower left")


def draw_own_kernels(axis: Any, rows: Sequence[dict[str, Any]], start: str) -> None:
    for k, row in enumerate(rows):
        axis.plot(row["scaled_time"], row["predicted"], linestyle=LINES[k], color=COLOURS[k])
        axis.plot(row["scaled_time"], row["measured"], label=f"{row['model']} {row['width']}", **hollow(k))
    axis.set(xscale="log", xlabel="time λ₁t", ylabel="efficiency η(0, t)", ylim=(0, None))
    axis.set_title(f"{start}: own kernel (lines)")
    axis.legend(loc="lower left")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--cifar", type=Path, metavar="FOLDER", help="CIFAR-10 as published, binary or python; else digits"
    )
    parser.add_argument(
        "--examples", type=int, metavar="N", help="images to learn; as many as a plain run takes if left out"
    )
    options = parse("η, its regimes and what is behind them, for an FCN and a CNN on images.", parser)
    quieten_lightning()
    plan = QUICK if options.quick else FULL
    plan = replace(plan, examples=options.more.examples or plan.examples)
    try:
        data = load(options, plan)
    except cifar.CifarError as error:
        sys.exit(str(error))
    run(options, replace(plan, batch=min(plan.batch, len(data[0]))), data)


def load(options: Options, plan: Plan) -> Data:
    if options.more.cifar is None:
        return one_hot(*some_digits(plan.examples, options.seed))
    return one_hot(*cifar.load(options.more.cifar, plan.examples, options.seed))


def run(options: Options, plan: Plan, data: Data) -> None:
    name = "digits" if options.more.cifar is None else "CIFAR-10"
    report = Report(
        "images",
        options,
        {
            "data": name,
            "examples": len(data[0]),
            "image": list(data[0].shape[1:]),
            "batch": plan.batch,
            "steps": plan.steps,
            "learning_rate_times_largest": STEP,
            "kernel_images": plan.kernel_images,
            "points": plan.points,
        },
    )
    seed, results = options.seed, {"runs": {}, "networks": {}, "directions": {}, "kernel": {}}
    for model in BUILD:
        start = Setting(model, model=model).network(data[0], seed)
        before = Start.of(start, data, plan.kernel_images)
        done = {
            label: train(copy.deepcopy(start), data, before.learning_rate, batch, plan, seed, f"{model}, {label}")
            for label, batch in (("full batch", len(data[0])), (f"batch {plan.batch}", plan.batch))
        }
        results["runs"][model] = {label: curves(run) for label, run in done.items()}
        whole = done["full batch"]
        marks = boundaries(whole.record) or [middle(whole)]
        results["directions"][model] = directions(start, data, whole, marks[0], plan.kernel_images)
        marks.append(max(whole.weights))
        results["kernel"][model] = kernel_along(start, data, whole, marks, plan.kernel_images)
        results["networks"][model] = {
            "parameters": len(flat(start)),
            "learning_rate": before.learning_rate,
            "eigenvalues": before.eigenvalues[: CLASSES + 10],
            "gap": before.gap,
            "power": power(start, data),
            "power_share": before.power_share,
            "first_loss": whole.first_loss,
        }
    results["survey"] = [survey(setting, data, plan, seed) for setting in settings(plan)]
    seeds = {
        f"{model} {width}": [own_kernel(model, width, True, data, plan, seed + s) for s in range(plan.seeds)]
        for model in BUILD
        for width in plan.widths[model]
    }
    results["own_kernel"] = [
        *(own_kernel(model, PLAIN[model], False, data, plan, seed) for model in BUILD),
        *(rows[0] for rows in seeds.values()),
    ]
    results["seeds"] = {
        label: {name: [row[name] for row in rows] for name in ("departure", "kernel_moved")}
        for label, rows in seeds.items()
    }
    report.add(**results)
    tell(report, results)
    with figure(4, 2, width=3.5, height=3.0) as (drawn, axes):
        draw(axes, results)
        report.save(drawn)


def tell(report: Report, results: dict[str, Any]) -> None:
    report.say("", "regimes: steps (η)", "lowest η(0, t)", "at step", "rises ×")
    for model, runs in results["runs"].items():
        for label, found in runs.items():
            report.say(f"{model}, {label}", _stretches(found["regimes"]), *_trough_cells(found["trough"]))
            if found["regimes_with_exact_losses"] != found["regimes"]:
                report.say("  its losses taken as exact", _stretches(found["regimes_with_exact_losses"]))
    for row in results["survey"]:
        report.say(row["title"], f"boundaries {row['boundaries']}", *_trough_cells(row["trough"]))
    report.say("")
    report.say("first ten modes", "Q before, after the boundary", "D² before", "after")
    for model, found in results["directions"].items():
        cells = [number(found[part]["squared_displacement"]) for part in ("before", "after")]
        drops = ", ".join(number(found[part]["loss_drop"]) for part in ("before", "after"))
        report.say(f"{model} (step {found['boundary']})", drops, *cells)
        for row in results["kernel"][model]:
            growth = f"λ_1 × {number(row['largest'])}", f"λ_11 × {number(row['eleventh'])}"
            report.say(f"  kernel at step {row['step']}", f"moved {row['moved']:.0%}", *growth)
    report.say("")
    report.say("own kernel, at the last time", "η measured", "predicted", "difference", "kernel moved")
    for row in results["own_kernel"]:
        measured, predicted = row["measured"][-1], float(row["predicted"][-1])
        label = f"{row['model']} {row['width']}, {row['initialization']}'s start"
        cells = number(measured), number(predicted), f"{measured / predicted - 1:+.1%}", f"{row['kernel_moved']:.0%}"
        report.say(label, *cells)
    for label, rows in results["seeds"].items():
        worst = ", ".join(f"{float(value):.0%}" for value in rows["departure"])
        report.say(f"{label}, He's start, largest difference", f"seeds: {worst}")


def _stretches(regimes: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{r['first_step']}–{r['last_step']} ({number(r['efficiency'])})" for r in regimes)


def _trough_cells(found: dict[str, float]) -> list[str]:
    return [number(found["efficiency"]), number(found["step"]), number(found["rise"])]


def quieten_lightning() -> None:
    """No tips, no devices that were not found, no advice for larger data sets."""
    for name in ("pytorch_lightning", "lightning.pytorch"):  # the package under its two names
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")


if __name__ == "__main__":
    main()
