"""The networks of the experiments on images, their data, Jacobian and training, written once more in plain torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


def fcn(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
        *(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)),
    )


def cnn(colours: int, side: int, channels: int) -> nn.Sequential:
    more = 2 * channels
    return nn.Sequential(
        *(nn.Conv2d(colours, channels, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(channels, more, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(more, more, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(more * (side // 4) ** 2, 10)),
    )


def jacobian(network: nn.Module, x: Tensor) -> Tensor:
    """(N·10, P) float64, by reverse mode output by output."""
    parameters = list(network.parameters())
    rows = [torch.autograd.grad(value, parameters, retain_graph=True) for value in network(x).flatten()]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]).double()


def descend(network: nn.Module, x: Tensor, y: Tensor, lr: float, marks: list[int]) -> list[tuple[float, float, float]]:
    """(D², L_0 − L, Σ (Δθ_i)²/m_i) at the marks, of gradient descent written out; m_i = lr × steps that moved θ_i."""
    parameters = list(network.parameters())
    start = [p.detach().clone() for p in parameters]
    moves = [torch.zeros_like(p) for p in parameters]
    first, found = None, []
    for step in range(marks[-1] + 1):
        loss = (network(x) - y).square().mean()
        first = loss.item() if first is None else first
        if step in marks:
            squares = [(p.detach() - s).square() for p, s in zip(parameters, start, strict=True)]
            weighted = sum((d / (lr * m.clamp(min=1))).sum().item() for d, m in zip(squares, moves, strict=True))
            found.append((sum(d.sum().item() for d in squares), first - loss.item(), weighted))
        if step == marks[-1]:
            break
        with torch.no_grad():
            for p, m, gradient in zip(parameters, moves, torch.autograd.grad(loss, parameters), strict=True):
                before = p.clone()
                p -= lr * gradient
                m += p != before
    return found


def published(folder: Path, name: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Some images (N, C, H, W) float32 and one-hot labels, of CIFAR-10's five files or MNIST's two, read by hand."""
    if name == "cifar10":
        parts = [np.fromfile(folder / name / f"data_batch_{k}.bin", np.uint8) for k in range(1, 6)]
        records = np.concatenate(parts).reshape(-1, 3073)
        labels, pixels = records[:, 0], records[:, 1:].reshape(-1, 3, 32, 32)
    else:
        labels = np.fromfile(folder / name / "train-labels-idx1-ubyte", np.uint8)[8:]
        pixels = np.fromfile(folder / name / "train-images-idx3-ubyte", np.uint8)[16:].reshape(-1, 1, 28, 28)
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:count].numpy()
    images = torch.tensor(pixels[chosen].astype(np.float32)) / 255
    return images, torch.eye(10)[torch.tensor(labels[chosen]).long()]
