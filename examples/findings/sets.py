"""Sets of pictures in their published formats, and text: training and held-out samples with their classes.

cifar10, mnist, fashion-mnist     FOLDER/NAME/…, brightness with mean 0 and variance 1 over the training pictures
text, other text                  modules of Python's own library, as installed: windows of letters
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from held_out_tasks import HELD_OUT as OTHER_HELD_OUT
from held_out_tasks import LEARNT as OTHER_LEARNT
from held_out_tasks import read_cifar
from tasks import HELD_OUT, KINDS, LEARNT, read_images, read_labels, windows
from torch import Tensor

PICTURES = {"cifar10": (3, 32, 32), "mnist": (1, 28, 28), "fashion-mnist": (1, 28, 28)}
CLASSES = 10
MADE_UP = 500  # pictures of each file of a synthetic set
SIGNAL = 240  # of these: what makes them neither trivial nor hopeless


@dataclass(frozen=True)
class Set:
    """inputs (N, …) float32 pictures or int64 letters, targets (N, …) int64; held: those that no training sees."""

    name: str
    inputs: Tensor
    targets: Tensor
    held_inputs: Tensor
    held_targets: Tensor
    classes: int = CLASSES


def load(name: str, folder: Path, examples: int | None = None, held: int = 1000) -> Set:
    """The first `examples` of the training samples, after one fixed shuffle; all for None."""
    if name in ("text", "other text"):
        return _text(name, examples, held)
    x, y, held_x, held_y = _pictures(name, folder)
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:examples]
    x = x[chosen].float() if x.dtype == torch.uint8 else x[chosen]
    held_x = held_x[:held].float() if held_x.dtype == torch.uint8 else held_x[:held]
    mean, spread = x.mean(), x.std()
    return Set(name, (x - mean) / spread, y[chosen], (held_x - mean) / spread, held_y[:held])


def _pictures(name: str, folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if name == "cifar10":
        parts = [read_cifar(folder, f"data_batch_{part}") for part in range(1, 6)]
        return *(torch.cat([part[which] for part in parts]) for which in (0, 1)), *read_cifar(folder, "test_batch")
    learnt, held = (
        (read_images(folder, name, part)[:, None], read_labels(folder, name, part)) for part in ("train", "t10k")
    )
    return *learnt, *held


def _text(name: str, examples: int | None, held: int) -> Set:
    learnt, rest = (LEARNT, HELD_OUT) if name == "text" else (OTHER_LEARNT, OTHER_HELD_OUT)
    x, y = (
        part[torch.randperm(len(part), generator=torch.Generator().manual_seed(0))[:most]]
        for part, most in ((windows(learnt), examples), (windows(rest), held))
    )
    return Set(name, x[:, :-1], x[:, 1:], y[:, :-1], y[:, 1:], KINDS)


def synthesize(folder: Path) -> None:
    """Pictures of ten faint shapes under noise, in the published format of each set; the same ones each time."""
    for seed, (name, shape) in enumerate(PICTURES.items()):
        draw = np.random.default_rng(seed)
        coarse = draw.normal(size=(CLASSES, shape[0], 4, 4))
        side = shape[1]
        shapes = coarse.repeat(side // 4, axis=2).repeat(side // 4, axis=3)
        (folder / name).mkdir(parents=True, exist_ok=True)
        for part in ("train", "t10k") if name != "cifar10" else (*range(1, 6), "test_batch"):
            kind = draw.integers(0, CLASSES, MADE_UP, dtype=np.uint8)
            noise = draw.normal(size=(MADE_UP, *shape))
            faint = SIGNAL / math.sqrt(math.prod(shape))
            pixels = np.clip(128 + faint * shapes[kind] + 60 * noise, 0, 255).astype(np.uint8)
            _write(folder / name, part, pixels, kind)


def _write(folder: Path, part: str | int, pixels: np.ndarray, kind: np.ndarray) -> None:
    if pixels.shape[1] == 3:
        file = part if isinstance(part, str) else f"data_batch_{part}"
        records = np.concatenate([kind[:, None], pixels.reshape(len(kind), -1)], 1)
        (folder / f"{file}.bin").write_bytes(records.tobytes())
        return
    heads = struct.pack(">4i", 2051, len(kind), *pixels.shape[2:]), struct.pack(">2i", 2049, len(kind))
    (folder / f"{part}-images-idx3-ubyte").write_bytes(heads[0] + pixels.tobytes())
    (folder / f"{part}-labels-idx1-ubyte").write_bytes(heads[1] + kind.tobytes())
