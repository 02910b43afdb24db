"""What overhead.py trains: models with their batches, and the LightningModule around them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import grad_norm
from torch import Tensor, nn

CLASSES = 10
ALPHABET = 96  # letters
CONTEXT = 64  # letters that a transformer sees


def mlp(*sizes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Module:
    """0.5 M parameters on 3×32×32."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128 * 16, 128), nn.ReLU(), nn.Linear(128, CLASSES),
    )  # fmt: skip


class CharTransformer(nn.Module):
    """Letters (batch, CONTEXT) int64 → scores of the next ones (batch · CONTEXT, ALPHABET).

    12 layers of 12 parameter tensors each and two embeddings, one of which is the head too: 146 tensors.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(ALPHABET, width), nn.Embedding(CONTEXT, width)
        nn.init.normal_(self.letters.weight, std=width**-0.5)  # as a head: scores of order 1
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(12)
        )
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, text: Tensor) -> Tensor:
        x = self.letters(text) + self.places.weight
        for layer in self.layers:
            x = layer(x, src_mask=self.mask, is_causal=True)
        return (x @ self.letters.weight.T).flatten(0, 1)


@dataclass(frozen=True)
class Case:
    title: str
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of a batch of inputs
    letters: bool = False  # the inputs are text
    optimizers: tuple[str, ...] = ("sgd", "adamw")
    window: int = 50  # steps, the last of them a log step

    def batch(self, device: str) -> list[Tensor]:
        """Inputs and targets, the same for every variant."""
        generator = torch.Generator().manual_seed(0)
        if self.letters:
            text = torch.randint(ALPHABET, (self.shape[0], self.shape[1] + 1), generator=generator)
            inputs, targets = text[:, :-1], text[:, 1:].flatten()
        else:
            inputs = torch.randn(self.shape, generator=generator)
            targets = torch.randint(CLASSES, self.shape[:1], generator=generator)
        return [inputs.to(device), targets.to(device)]


CASES = {
    "a": Case("digits MLP 64-512-512-10, batch 128", lambda: mlp(64, 512, 512, CLASSES), (128, 64)),
    "b": Case("CNN of 0.5 M parameters on 3x32x32, batch 64", cnn, (64, 3, 32, 32)),
    "c": Case("MLP of 10 M parameters, batch 8", lambda: mlp(784, 2304, 2304, 1152, CLASSES), (8, 784)),
    "d": Case(
        "char transformer of 10 M parameters in 146 tensors, batch 4x64",
        lambda: CharTransformer(264),
        (4, CONTEXT),
        letters=True,
        optimizers=("adamw",),
    ),
}
# For its memory alone.
LARGE = Case("MLP of 100 M parameters, batch 1", lambda: mlp(1024, 8192, 8192, 3072, CLASSES), (1, 1024), window=4)


def make_optimizer(kind: str, parameters: Any) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=1e-3)
    return torch.optim.AdamW(parameters, lr=1e-4)


class Module(pl.LightningModule):
    """The same for every variant."""

    def __init__(self, case: Case, optimizer: str) -> None:
        super().__init__()
        self.net, self.kind = case.model(), optimizer

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.kind, self.parameters())


class WithNorms(Module):
    """And Lightning's own grad_norm, logged at every step."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.log_dict(grad_norm(self, norm_type=2))
