"""Networks that the findings train, made anew from the current seed; `width` and `depth` scale each of them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from sets import PICTURES
from tasks import CONTEXT, KINDS
from torch import Tensor, nn


def mlp(data: str, width: int = 64, depth: int = 2, norm: bool = False) -> nn.Sequential:
    """`depth` hidden layers of `width` neurons, ReLU; with `norm` a LayerNorm before each ReLU."""
    channels, height, length = PICTURES[data]
    sizes = [channels * height * length, *[width] * depth]
    layers: list[nn.Module] = [nn.Flatten()]
    for inner, outer in pairwise(sizes):
        layers += [nn.Linear(inner, outer), *([nn.LayerNorm(outer)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def cnn(data: str, width: int = 8, depth: int = 2, norm: bool = False) -> nn.Sequential:
    """`depth` 3 × 3 convolutions, the first two of stride 2, of `width` and then twice as many channels; ReLU."""
    channels, height, length = PICTURES[data]
    sizes = [channels, width, *[2 * width] * (depth - 1)]
    layers: list[nn.Module] = []
    for at, (inner, outer) in enumerate(pairwise(sizes)):
        layers += [nn.Conv2d(inner, outer, 3, 2 if at < 2 else 1, 1)]
        layers += [*([nn.BatchNorm2d(outer)] if norm else []), nn.ReLU()]
    shrunk = 2 ** min(depth, 2)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(sizes[-1] * (height // shrunk) * (length // shrunk), 10))


class Transformer(nn.Module):
    """Scores (batch, CONTEXT, KINDS) of the next letter by `depth` layers of attention; a letter sees those before."""

    def __init__(self, data: str, width: int = 32, depth: int = 2, norm_first: bool = True) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(KINDS, width), nn.Parameter(0.1 * torch.randn(CONTEXT, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, "gelu", batch_first=True, norm_first=norm_first)
            for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, KINDS)
        self.register_buffer("later", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, text: Tensor) -> Tensor:
        x = self.letters(text) + self.places
        for block in self.blocks:
            x = block(x, src_mask=self.later, is_causal=True)
        return self.head(self.norm(x))


NETS: dict[str, Callable[..., nn.Module]] = {"MLP": mlp, "CNN": cnn, "transformer": Transformer}
