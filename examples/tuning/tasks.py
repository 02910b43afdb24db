"""Three tasks with data that nobody made up, and one that needs no files: a model, batches with replacement, a loss.

    python fetch.py mnist|fashion-mnist  →  FOLDER/mnist, FOLDER/fashion-mnist: train-images-idx3-ubyte, …, as published

The text is Python's own library, as installed.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the fastest for tensors this small; and the same sums everywhere
os.environ.setdefault("MKL_NUM_THREADS", "1")

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

torch.set_num_threads(1)
PUBLISHED = {"MNIST, MLP": "mnist", "Fashion-MNIST, CNN": "fashion-mnist"}  # folders
EVALUATED = 512  # samples of the fixed evaluation set, which no training sees
CONTEXT, KINDS = 16, 96  # letters of a window, and how many there are: printable ASCII, all others as one
LEARNT = ("argparse", "ast", "dataclasses", "decimal", "_pydecimal", "difflib", "doctest", "inspect", "tarfile")
HELD_OUT = ("typing", "zipfile", "pathlib", "shutil", "statistics")


@dataclass(frozen=True)
class Task:
    """A problem with its data.

    inputs, targets: of training, one row a sample. held_inputs, held_targets: of the evaluation set. model: made anew
    from the current seed. rates: optimizer → the learning rate that the grid is laid around at the smallest batch.
    """

    name: str
    inputs: Tensor
    targets: Tensor
    held_inputs: Tensor
    held_targets: Tensor
    model: Callable[[], nn.Module]
    rates: dict[str, float]

    def loss(self, model: nn.Module, index: Tensor) -> Tensor:
        """Mean cross entropy of the training samples at `index`, nats."""
        return _crossed(model(self.inputs[index]), self.targets[index])

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        """Mean cross entropy of the evaluation set, nats."""
        return float(_crossed(model(self.held_inputs), self.held_targets))


def _crossed(scores: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(scores.flatten(0, -2), targets.flatten())


def blobs(folder: Path | None = None) -> Task:
    """Ten overlapping Gaussians in 20 dimensions; an MLP 20-32-10. Takes seconds and no files."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (4000 + EVALUATED,), generator=draw)
    centres = torch.randn(10, 20, generator=draw)
    points = centres[labels] + 1.5 * torch.randn(len(labels), 20, generator=draw)

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 10))

    rates = {"SGD": 0.1, "Adam": 3e-3}
    return Task("blobs", points[:4000], labels[:4000], points[4000:], labels[4000:], model, rates)


def mnist(folder: Path | None) -> Task:
    """An MLP 784-64-10."""

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))

    images = [
        x.flatten(1) for x in (read_images(folder, "mnist", "train"), read_images(folder, "mnist", "t10k")[:EVALUATED])
    ]
    return _pictures(folder, "MNIST, MLP", images, model, {"SGD": 0.1, "Adam": 1e-3})


def fashion(folder: Path | None) -> Task:
    """Two convolutions with stride 2, of 8 and 16 channels."""

    def model() -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.ReLU()),
            *(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 49, 10)),
        )

    name = "fashion-mnist"
    images = [read_images(folder, name, "train")[:, None], read_images(folder, name, "t10k")[:EVALUATED, None]]
    return _pictures(folder, "Fashion-MNIST, CNN", images, model, {"SGD": 0.05, "Adam": 1e-3})


def _pictures(
    folder: Path | None, name: str, images: list[Tensor], model: Callable[[], nn.Module], rates: dict[str, float]
) -> Task:
    part = PUBLISHED[name]
    labels = [read_labels(folder, part, "train"), read_labels(folder, part, "t10k")[:EVALUATED]]
    return Task(name, images[0], labels[0], images[1], labels[1], model, rates)


def read_images(folder: Path | None, name: str, part: str) -> Tensor:
    """(N, 28, 28) float32, brightness from −0.5 to 0.5."""
    content = _read(folder, name, f"{part}-images-idx3-ubyte")
    return torch.from_numpy(content[16:].reshape(-1, 28, 28).astype(np.float32)) / 255 - 0.5


def read_labels(folder: Path | None, name: str, part: str) -> Tensor:
    return torch.from_numpy(_read(folder, name, f"{part}-labels-idx1-ubyte")[8:].astype(np.int64))


def _read(folder: Path | None, name: str, file: str) -> np.ndarray:
    if folder is None or not (folder / name / file).exists():
        raise SystemExit(f"wanted {name}/{file} in the folder that --data names, got --data {folder}")
    return np.fromfile(folder / name / file, np.uint8)


class Letters(nn.Module):
    """Scores (batch, CONTEXT, KINDS) of the next letter, by one layer of attention of width 32."""

    def __init__(self) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(KINDS, 32), nn.Parameter(0.1 * torch.randn(CONTEXT, 32))
        self.block = nn.TransformerEncoderLayer(32, 2, 64, 0.0, "gelu", batch_first=True, norm_first=True)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, KINDS)
        self.register_buffer("later", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, text: Tensor) -> Tensor:
        x = self.letters(text) + self.places
        return self.head(self.norm(self.block(x, src_mask=self.later, is_causal=True)))


def text(folder: Path | None = None) -> Task:
    """All windows of some of the library's modules; evaluated on windows of others."""
    learnt, held = windows(LEARNT), windows(HELD_OUT)
    held = held[torch.randperm(len(held), generator=torch.Generator().manual_seed(0))[:EVALUATED]]
    rates = {"SGD": 0.2, "Adam": 2e-3}
    return Task("text, transformer", learnt[:, :-1], learnt[:, 1:], held[:, :-1], held[:, 1:], Letters, rates)


def windows(modules: tuple[str, ...]) -> Tensor:
    """(windows, CONTEXT + 1) int64."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [library / f"{name}.py" for name in modules if (library / f"{name}.py").exists()]
    source = "".join(file.read_text("utf-8") for file in files)
    codes = torch.tensor([ord(letter) - 31 if 32 <= ord(letter) < 127 else 0 for letter in source])
    return codes.unfold(0, CONTEXT + 1, 1)


TASKS: dict[str, Callable[[Path | None], Task]] = {"mnist": mnist, "fashion": fashion, "text": text}
