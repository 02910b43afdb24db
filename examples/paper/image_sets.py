"""CIFAR-10, MNIST and Fashion-MNIST from a folder, as they were published; nothing is downloaded.

    FOLDER/cifar10/data_batch_1.bin …     FOLDER/mnist/train-images-idx3-ubyte …     FOLDER/fashion-mnist/…

A shortened run without a folder makes up pictures in these formats.

And the file of results that experiments on them keep: rows that are in it are not computed again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cifar
import torch
from common import Options, parse, plain
from images import one_hot
from own_kernel import Data

sys.path += [str(Path(__file__).resolve().parents[1] / name) for name in ("tuning", "findings")]

from sets import synthesize
from tasks import read_images, read_labels
from training import Results

SETS = ("CIFAR-10", "MNIST", "Fashion-MNIST")
Row = dict[str, Any]


def begin(description: str, seeds: int) -> Options:
    """--data (pictures made up where it is quick and there is none), and --seeds, of which there are so many."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="cifar10, mnist, fashion-mnist in it")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(seeds)), metavar="S", help="of a run each")
    options = parse(description, parser)
    if options.more.data is None:
        if not options.quick:
            parser.error("wanted --data with the folder of cifar10, mnist and fashion-mnist, got none; or --quick")
        options.more.data = options.output / "data"
        synthesize(options.more.data)
    return options


def load(folder: Path, name: str, examples: int, seed: int) -> Data:
    """Some of the training images, drawn at random: (N, C, H, W) float32, 0 to 1, and one-hot labels (N, 10).

    They lie in memory with the channels last, which halves the time of convolutions.
    """
    if name == "CIFAR-10":
        try:
            images, labels = cifar.load(folder / "cifar10", examples, seed)
        except cifar.CifarError as error:
            sys.exit(str(error))
    else:
        images, labels = read_images(folder, name.lower(), "train")[:, None], read_labels(folder, name.lower(), "train")
        chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:examples]
        images, labels = images[chosen] + 0.5, labels[chosen]
    return one_hot(images.contiguous(memory_format=torch.channels_last), labels)


class Rows:
    """Of one results file."""

    def __init__(self, path: Path) -> None:
        self.results = Results(path)

    def get(self, part: str, key: Mapping[str, Any], compute: Callable[[], Row]) -> Row:
        """The row of this key; computed and written down, with the processor's seconds, where it is not there."""
        if found := self.results.find(part, key):
            return found
        started = time.process_time()
        row = dict(key) | compute()
        return self.results.add(part, plain(row | {"seconds": time.process_time() - started}))

    def of(self, part: str, **key: Any) -> list[Row]:
        """All rows of the part that have these values."""
        return [row for row in self.results.parts.get(part, []) if key.items() <= row.items()]


def seconds(rows: Sequence[Row]) -> float:
    """Of the processor, in all."""
    return sum(row["seconds"] for row in rows)
