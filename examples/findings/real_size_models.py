"""The two trainings of real_size.py: a GPT on bytes of Python's library, and a ResNet on all of CIFAR-10.

The text is Python's own library, as installed: all `.py` files but those of installed packages, nine files of ten to
learn from, each tenth to evaluate on.
"""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lab  # noqa: F401 — it tells where the modules of the other experiments are
import numpy as np
import pytorch_lightning as pl
import torch
from held_out_tasks import cropped_and_flipped, read_cifar, scaled
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu, scaled_dot_product_attention
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

HELD_OUT = 10  # of so many files one is kept from training
FLOOR = 0.1  # of the highest rate, where the transformer's schedule ends


# --- models


@dataclass(frozen=True)
class Size:
    """Of a GPT. kinds: of tokens."""

    layers: int
    width: int
    heads: int
    context: int
    kinds: int = 256


SIZES = {
    "tiny": Size(2, 32, 2, 32),
    "10M": Size(6, 384, 6, 256),
    "gpt2": Size(12, 768, 12, 1024, 50_257),  # as published: bytes use 256 rows of its table, the others stay still
}


class Block(nn.Module):
    """x + attention(x), then x + mlp(x), each after a layer norm; a byte sees only those before it."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width, self.heads = size.width, size.heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.taken, self.given = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) → the same."""
        query, key, value = self.taken(self.norm_1(x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        seen = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.given(seen.transpose(1, 2).flatten(2))
        return x + self.narrow(nn.functional.gelu(self.wide(self.norm_2(x))))


class GPT(nn.Module):
    """Tokens (batch, tokens) int64 → scores of the next one (batch, tokens, kinds). Begun as GPT-2, one table."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(size.kinds, size.width), nn.Embedding(size.context, size.width)
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        for name, weights in self.named_parameters():
            if weights.ndim == 2:
                last = name.endswith(("given.weight", "narrow.weight"))
                nn.init.normal_(weights, 0.0, 0.02 / math.sqrt(2 * size.layers) if last else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weights)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        return self.norm(self.blocks(x)) @ self.tokens.weight.T


class BasicBlock(nn.Module):
    """relu(x + conv(relu(conv(x)))) with BatchNorm after each; x by 1 × 1 where its shape changes."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv_1, self.norm_1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv_2, self.norm_2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        changed = (nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        self.short = nn.Identity() if before == after and stride == 1 else nn.Sequential(*changed)

    def forward(self, x: Tensor) -> Tensor:
        inner = relu(self.norm_1(self.conv_1(x)))
        return relu(self.short(x) + self.norm_2(self.conv_2(inner)))


class ResNet(nn.Sequential):
    """Images (batch, 3, 32, 32) → scores of ten classes. Strided at once, so that most parameters see few pixels."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 256)) -> None:
        first = (nn.Conv2d(3, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        pairs = zip((widths[0], *widths), widths, strict=False)
        blocks = (BasicBlock(before, after, 1 if i == 0 else 2) for i, (before, after) in enumerate(pairs))
        super().__init__(*first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


# --- data that goes on where it was stopped


class EpochOrder(Sampler[int]):
    """All samples in an order that the seed and the epoch's number decide, without the first `skip`."""

    def __init__(self, samples: int, seed: int) -> None:
        self.samples, self.seed, self.epoch, self.skip = samples, seed, 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        yield from torch.randperm(self.samples, generator=draw)[self.skip :].tolist()


class ResumableLoader(DataLoader[Any]):
    """Shuffled batches of equal size; Lightning keeps its state in the checkpoint, and it goes on within the epoch."""

    def __init__(self, samples: Dataset[Any], batch: int, seed: int) -> None:
        order = EpochOrder(len(samples), seed)  # type: ignore[arg-type]
        super().__init__(samples, batch, sampler=order, drop_last=True)
        self._given = self._next = 0

    def __iter__(self) -> Any:
        self.sampler.skip, self._given, self._next = self._next * self.batch_size, self._next, 0  # type: ignore
        for batch in super().__iter__():
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"given": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._next = state["given"] % len(self)


class Windows(Dataset[Tensor]):
    """Windows of context + 1 bytes that meet but for one, as int64."""

    def __init__(self, text: Tensor, context: int) -> None:
        self.windows = text.unfold(0, context + 1, context)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> Tensor:
        return self.windows[i].long()


def library(most: int | None = None) -> tuple[Tensor, Tensor]:
    """Python's library as uint8: what is learnt, and what is kept from it, by whole files; of so many files at most."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(file for file in root.rglob("*.py") if "site-packages" not in file.parts)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()[:most]
    parts = [[files[i] for k, i in enumerate(order) if (k % HELD_OUT == 0) is held] for held in (False, True)]
    learnt, held = (np.frombuffer(b"".join(file.read_bytes() for file in part), np.uint8) for part in parts)
    return torch.from_numpy(learnt.copy()), torch.from_numpy(held.copy())


def images(folder: Path) -> tuple[TensorDataset, TensorDataset]:
    """CIFAR-10 as uint8 (N, 3, 32, 32) with labels: what is learnt, and the test set."""
    parts = [read_cifar(folder, f"data_batch_{k}") for k in range(1, 6)]
    learnt = TensorDataset(*(torch.cat([part[which] for part in parts]) for which in (0, 1)))
    return learnt, TensorDataset(*read_cifar(folder, "test_batch"))


# --- as Lightning trains them


def warmed_cosine(step: int, steps: int, warm_up: float, floor: float) -> float:
    """Share of the highest rate: from 0 up on a straight line, then down by a cosine to `floor`."""
    first = max(1.0, warm_up * steps)
    if step < first:
        return (step + 1) / first
    return floor + (1 - floor) * (0.5 + 0.5 * math.cos(math.pi * (step - first) / max(1.0, steps - first)))


class Bytes(pl.LightningModule):
    """A GPT; AdamW with decay of matrices alone."""

    def __init__(self, size: str, rate: float, steps: int) -> None:
        super().__init__()
        self.network, self.rate, self.steps = GPT(SIZES[size]), rate, steps

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self._loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch), batch_size=len(batch))

    def _loss(self, batch: Tensor) -> Tensor:
        """Mean cross entropy of the next byte, nats."""
        return cross_entropy(self.network(batch[:, :-1]).flatten(0, 1).float(), batch[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        parts = [[p for p in self.parameters() if (p.ndim >= 2) is matrix] for matrix in (True, False)]
        groups = [{"params": parts[0], "weight_decay": 0.1}, {"params": parts[1], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, self.rate, betas=(0.9, 0.95))
        return scheduled(optimizer, self.steps, 0.05, FLOOR)


class Pictures(pl.LightningModule):
    """A ResNet on shifted and mirrored images; Nesterov's momentum, decay 5e-4 of all parameters."""

    def __init__(self, widths: tuple[int, ...], rate: float, steps: int, seed: int) -> None:
        super().__init__()
        self.network, self.rate, self.steps, self.seed = ResNet(widths), rate, steps, seed

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        draw = torch.Generator().manual_seed(1_000_003 * self.seed + self.global_step)  # as resumable as the step
        return cross_entropy(self.network(cropped_and_flipped(batch[0], draw)), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        scores = self.network(scaled(batch[0]))
        right = (scores.argmax(1) == batch[1]).float().mean()
        self.log_dict({"val_loss": cross_entropy(scores, batch[1]), "val_accuracy": right}, batch_size=len(batch[0]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), self.rate, 0.9, weight_decay=5e-4, nesterov=True)
        return scheduled(optimizer, self.steps, 0.1, 0.0)


def scheduled(optimizer: torch.optim.Optimizer, steps: int, warm_up: float, floor: float) -> Any:
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmed_cosine(step, steps, warm_up, floor))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}
