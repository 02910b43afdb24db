"""An MLP on a finding's made-up pictures, with plain torch alone: a second implementation of its trainings."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy


def pictures(folder: Path, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    raw = (folder / "data" / "fashion-mnist" / f"{part}-images-idx3-ubyte").read_bytes()
    _, count, height, width = struct.unpack(">4i", raw[:16])
    x = np.frombuffer(raw, np.uint8, offset=16).reshape(count, height * width).astype(np.float32) / 255 - 0.5
    raw = (folder / "data" / "fashion-mnist" / f"{part}-labels-idx1-ubyte").read_bytes()
    y = np.frombuffer(raw, np.uint8, offset=8)
    return torch.tensor(x), torch.tensor(y.astype(np.int64))


class ByHand:
    """Fashion-MNIST's format, MLP 784-64-64-10, plain SGD."""

    def __init__(self, folder: Path, seed: int) -> None:
        x, self.y = pictures(folder, "train")
        chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        mean, spread = x[chosen].mean(), x[chosen].std()
        self.x, self.y = (x[chosen] - mean) / spread, self.y[chosen]
        held, held_y = pictures(folder, "t10k")
        self.held, self.held_y = (held[:500] - mean) / spread, held_y[:500]
        torch.manual_seed(seed)
        relu, linear = torch.nn.ReLU, torch.nn.Linear
        self.net = torch.nn.Sequential(linear(784, 64), relu(), linear(64, 64), relu(), linear(64, 10))
        self.draw = torch.Generator().manual_seed(1000 + seed)

    def gradient(self, index: torch.Tensor | None = None) -> torch.Tensor:
        """Of the next batch, flat, float64."""
        if index is None:
            index = torch.randint(len(self.x), (16,), generator=self.draw)
        self.loss = cross_entropy(self.net(self.x[index]), self.y[index])
        found = torch.autograd.grad(self.loss, list(self.net.parameters()))
        return torch.cat([g.flatten() for g in found]).double()

    @torch.no_grad()
    def move(self, update: torch.Tensor) -> None:
        for p in self.net.parameters():
            own, update = update[: p.numel()], update[p.numel() :]
            p.add_(own.view_as(p).float())

    @torch.no_grad()
    def held_loss(self) -> float:
        return cross_entropy(self.net(self.held), self.held_y).item()
