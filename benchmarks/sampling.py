"""How far a run's numbers by some of its coordinates are from those by all, and whether the stated errors hold.

A training is watched by one meter of all coordinates and by many that draw some, each by a seed of its own. At a few
steps, and at the end, every value that states a standard error is compared with that of all coordinates:

    error     the rms over the draws of the relative error, %
    stated    the mean of the stated relative error, %
    within    the share of draws that are within two of their stated errors (0.95 of them should be)

What a value states for the loss (conversion, efficiency) is the same for all coordinates and is taken out before.
work_anti_ito and work_stratonovich may come to nearly nothing: whether their error is small, is judged as a part of
work_ito. Below each table stands what is not as promised: an error above 2 %, or too few draws within two errors.
Meters that would need too much memory together watch the same training one group after the other.

    python benchmarks/sampling.py [--draws 100] [--coordinates 262144] [--trainings mlp-sgd ...] [--output FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import sysconfig
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_speedlimit.trajectory import TrajectoryMeter

Batch = tuple[Tensor, Tensor]
CHECKPOINTS = (0.1, 0.4, 1.0)  # of the steps
LOSSES = {"loss", "loss_drop"}  # their errors have nothing to do with coordinates
# Most of their error is that of the loss, which is no share of the value: what a draw adds can't be told beside it.
LOSSES |= {"efficiency_low", "efficiency_drift"}
# What has to be known well, and how well: the others stand in the table too.
PROMISED = ("displacement", "action", "work_ito", "work_anti_ito", "work_stratonovich", "work_action")
PROMISED += ("efficiency", "kinematic_efficiency")
CANCELLING = ("work_anti_ito", "work_stratonovich")  # terms of both signs
LARGEST_ERROR = 2.0  # %


# --- trainings


class Clusters:
    """Ten classes of twelve clusters each, in 32 hidden directions of 256 inputs of uneven size; an eighth is dead.

    One class in twenty is a wrong one, so that gradients stay noisy to the end.
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.centres = 0.8 * torch.randn(10, 12, 32, generator=generator)
        self.directions = torch.randn(32, 256, generator=generator) / 32**0.5
        self.sizes = torch.logspace(0.5, -1.5, 256)[torch.randperm(256, generator=generator)]
        self.sizes[::8] = 0.0

    def batch(self, generator: torch.Generator) -> Batch:
        """(128, 256) inputs, (128,) classes."""
        classes = torch.randint(10, (128,), generator=generator)
        which = torch.randint(12, (128,), generator=generator)
        hidden = self.centres[classes, which] + torch.randn(128, 32, generator=generator)
        noise = 0.5 * torch.randn(128, 256, generator=generator)
        wrong = torch.rand(128, generator=generator) < 0.05
        given = torch.where(wrong, torch.randint(10, (128,), generator=generator), classes)
        return (hidden @ self.directions + noise) * self.sizes, given


class Sources:
    """The first 400,000 letters of Python's own library, by the name of the module; 64 of them in a window."""

    def __init__(self) -> None:
        text = b""
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            text += path.read_text("utf-8").encode("ascii", "replace")
            if len(text) >= 400_000:
                break
        letters = torch.tensor(list(text[:400_000]))
        alphabet, self.text = letters.unique(return_inverse=True)
        self.alphabet = len(alphabet)

    def batch(self, generator: torch.Generator) -> Batch:
        """(8, 64) letters, and for each the one that follows it."""
        starts = torch.randint(len(self.text) - 64, (8, 1), generator=generator)
        windows = self.text[starts + torch.arange(65)]
        return windows[:, :-1], windows[:, 1:]


def mlp() -> nn.Module:
    """2.06 M parameters in 8 tensors."""
    sizes = [256, 1152, 1152, 384, 10]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Transformer(nn.Module):
    """Four layers of width 200 on letters: 2.0 M parameters in 53 tensors."""

    def __init__(self, alphabet: int) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(alphabet, 200), nn.Embedding(64, 200)
        layer = nn.TransformerEncoderLayer(
            200, 4, 800, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        for parameter in self.layers.parameters():  # the layers are copies of one, until they are drawn anew
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        self.norm, self.head = nn.LayerNorm(200), nn.Linear(200, alphabet)

    def forward(self, text: Tensor) -> Tensor:
        """(batch, letters) int64 → scores of the next letter (batch, letters, alphabet)."""
        later = nn.Transformer.generate_square_subsequent_mask(text.shape[1])
        x = self.letters(text) + self.places.weight[: text.shape[1]]
        return self.head(self.norm(self.layers(x, mask=later, is_causal=True)))


@dataclass(frozen=True)
class Training:
    """A model, what it learns, and by what."""

    title: str
    task: Callable[[], Clusters | Sources]
    model: Callable[[Any], nn.Module]
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def sgd(lr: float) -> Callable[[Iterable[Tensor]], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def adamw(lr: float) -> Callable[[Iterable[Tensor]], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr)


TRAININGS = {
    "mlp-sgd": Training("MLP, SGD 0.1", Clusters, lambda task: mlp(), sgd(0.1)),
    "mlp-adamw": Training("MLP, AdamW 1e-3", Clusters, lambda task: mlp(), adamw(1e-3)),
    "transformer-sgd": Training("transformer, SGD 0.1", Sources, lambda task: Transformer(task.alphabet), sgd(0.1)),
    "transformer-adamw": Training(
        "transformer, AdamW 1e-3", Sources, lambda task: Transformer(task.alphabet), adamw(1e-3)
    ),
}


# --- runs


@dataclass(frozen=True)
class Watched:
    """What meters said at each checkpoint; the first loss and the last."""

    steps: list[int]
    exact: list[dict[str, float]]
    drawn: list[list[dict[str, float]]]  # of each checkpoint one of each draw
    parameters: int
    measured: int  # coordinates, by the first of the draws
    losses: tuple[float, float]


def watch(training: Training, steps: int, coordinates: int, seeds: Sequence[int]) -> Watched:
    """Train once, from the same numbers whatever the seeds: those are of the meters alone."""
    torch.manual_seed(0)
    task = training.task()
    model = training.model(task)
    optimizer = training.optimizer(model.parameters())
    meters = [TrajectoryMeter(optimizer, coordinates="all")]
    meters += [TrajectoryMeter(optimizer, coordinates=coordinates, seed=seed) for seed in seeds]
    checkpoints = sorted({max(1, round(share * steps)) for share in CHECKPOINTS})
    generator = torch.Generator().manual_seed(2)
    found: list[list[dict[str, float]]] = []
    losses: list[float] = []
    for step in range(1, steps + 1):
        inputs, wanted = task.batch(generator)
        loss = cross_entropy(model(inputs).flatten(0, -2), wanted.flatten())
        for meter in meters:
            meter.record_loss(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step in checkpoints:
            found.append([meter.compute() for meter in meters])
    measured = meters[-1].description()["measured_coordinates"]
    for meter in meters:
        meter.close()
    return Watched(
        checkpoints,
        [values[0] for values in found],
        [values[1:] for values in found],
        sum(p.numel() for p in model.parameters()),
        int(measured),
        (losses[0], fmean(losses[-10:])),
    )


def watch_in_groups(training: Training, steps: int, coordinates: int, draws: int, together: int) -> Watched:
    """The same training as often as it takes to have all draws."""
    seeds = list(range(draws))
    whole: Watched | None = None
    for low in range(0, draws, together):
        part = watch(training, steps, coordinates, seeds[low : low + together])
        if whole is None:
            whole = part
            continue
        if part.losses != whole.losses:
            raise RuntimeError(f"the training went another way: losses {whole.losses}, then {part.losses}")
        for known, more in zip(whole.drawn, part.drawn, strict=True):
            known += more
    assert whole is not None
    return whole


# --- comparison


@dataclass(frozen=True)
class Row:
    """One value at one step; errors relative to the value by all coordinates, in %."""

    exact: float
    error: float
    stated: float
    within: float
    mean_error: float
    mean_error_se: float
    draws: int  # those in which the value is defined


def stated_error(drawn: dict[str, float], exact: dict[str, float], name: str) -> float:
    """What a draw states for its coordinates alone, in the unit of the value.

    A ratio with the loss states the loss's relative error too, as it does by all coordinates: that part is subtracted
    in squares.
    """
    stated = drawn[f"{name}_se"]
    of_loss = exact.get(f"{name}_se", 0.0) * drawn[name] / exact[name]
    return math.sqrt(max(0.0, stated**2 - of_loss**2))


def compare(exact: dict[str, float], drawn: list[dict[str, float]]) -> dict[str, Row]:
    """Every value that states an error; those undefined for all coordinates, or 0, are left out."""
    rows = {}
    for name in sorted(n for n in exact if f"{n}_se" in drawn[0] and n not in LOSSES):
        known = [d for d in drawn if math.isfinite(d[name]) and math.isfinite(d[f"{name}_se"])]
        if not math.isfinite(exact[name]) or exact[name] == 0.0 or len(known) < 2:
            continue
        percent = 100.0 / abs(exact[name])
        errors = [percent * (d[name] - exact[name]) for d in known]
        stated = [percent * stated_error(d, exact, name) for d in known]
        # A value that is measured whole states 0 and is off by the rounding of sums alone: 1e-5 of it, in percent.
        within = fmean(abs(e) <= 2.0 * s + 1e-3 for e, s in zip(errors, stated, strict=True))
        rms = math.sqrt(fmean(e * e for e in errors))
        spread = stdev(errors) / len(errors) ** 0.5
        rows[name] = Row(exact[name], rms, fmean(stated), within, fmean(errors), spread, len(known))
    return rows


def least_within(draws: int) -> float:
    """Of 100 draws 90; of others as likely, if 0.954 of all draws are: 2.6 standard deviations fewer."""
    return 0.954 - 2.6 * math.sqrt(0.954 * 0.046 / draws)


def misses(rows: dict[str, Row]) -> list[str]:
    """What of the promised values is not as promised, at one step; in plain words."""
    said = []
    for name in PROMISED:
        row = rows.get(name)
        if row is None:
            continue
        whole = "work_ito" if name in CANCELLING and "work_ito" in rows else name
        error = row.error * abs(row.exact / rows[whole].exact)
        if error > LARGEST_ERROR:
            said.append(f"{name}: error {error:.2g} % of {whole}, more than {LARGEST_ERROR:.0f} %")
        least = least_within(row.draws)
        if row.within < least:
            said.append(f"{name}: {row.within:.2f} of the draws within two stated errors, fewer than {least:.2f}")
    return said


# --- output


def table(steps: list[int], rows: list[dict[str, Row]]) -> str:
    """A line for each value, and three columns for each checkpoint; promised values first."""
    names = sorted({name for found in rows for name in found}, key=lambda n: (n not in PROMISED, n))
    width = max(map(len, names), default=0)
    lines = [" " * width + "".join(f"   {f'step {step}':^23}" for step in steps)]
    lines.append(" " * width + "".join(f"   {'error':>7}{'stated':>8}{'within':>8}" for _ in steps))
    for name in names:
        line = f"{name:{width}}"
        for found in rows:
            row = found.get(name)
            line += f"   {'undefined':>23}" if row is None else f"   {row.error:7.2f}{row.stated:8.2f}{row.within:8.2f}"
        lines.append(line)
    return "\n".join("    " + line for line in lines)


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One training, shown and as it goes into the file."""
    training, started = TRAININGS[name], time.monotonic()
    watched = watch_in_groups(training, arguments.steps, arguments.coordinates, arguments.draws, arguments.together)
    rows = [compare(exact, drawn) for exact, drawn in zip(watched.exact, watched.drawn, strict=True)]
    seconds = time.monotonic() - started
    first, last = watched.losses
    print(f"\n{training.title}: {watched.measured:,} of {watched.parameters:,} coordinates, {arguments.draws} draws")
    print(f"    {arguments.steps} steps, loss {first:.2f} -> {last:.2f}, {seconds:.0f} s")
    print(table(watched.steps, rows))
    for step, found in zip(watched.steps, rows, strict=True):
        for sentence in misses(found):
            print(f"    step {step}: {sentence}")
    return {
        "training": name,
        "title": training.title,
        "parameters": watched.parameters,
        "measured_coordinates": watched.measured,
        "draws": arguments.draws,
        "losses": list(watched.losses),
        "seconds": seconds,
        "checkpoints": [
            {"step": step, "values": {value: asdict(row) for value, row in found.items()}, "misses": misses(found)}
            for step, found in zip(watched.steps, rows, strict=True)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--coordinates", type=int, default=2**18, help="that each draw measures (default 262144)")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--trainings", nargs="+", default=list(TRAININGS), choices=list(TRAININGS))
    parser.add_argument("--together", type=int, default=50, help="meters on one training: 20 MB each (default 50)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, one thread"
    print(f"{machine}: errors in %, by {arguments.coordinates:,} coordinates against all")
    trainings = [measure(name, arguments) for name in arguments.trainings]
    if arguments.output:
        document = {"machine": machine, "coordinates": arguments.coordinates, "steps": arguments.steps}
        arguments.output.write_text(json.dumps(document | {"trainings": trainings}, indent=1) + "\n")


if __name__ == "__main__":
    main()
