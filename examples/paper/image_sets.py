"""CIFAR-10, MNIST and Fashion-MNIST from a folder, as they were published; nothing is downloaded.

    FOLDER/cifar10/data_batch_1.bin …     FOLDER/mnist/train-images-idx3-ubyte …     FOLDER/fashion-mnist/…

A shortened run without a folder makes up pictures in these formats.

Experiments on them are begun here, with the file of rows and the figure of the findings' `Lab`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import cifar
import torch
from images import one_hot
from own_kernel import Data

sys.path += [str(Path(__file__).resolve().parents[1] / name) for name in ("tuning", "findings")]

from lab import Lab, Row
from lab import begin as arguments
from tasks import read_images, read_labels

__all__ = ["SETS", "Lab", "Row", "begin", "load"]
SETS = ("CIFAR-10", "MNIST", "Fashion-MNIST")


def begin(name: str, description: str, seeds: int) -> Lab:
    """What the command line asks for; --seeds, of a run each, are so many where it does not say."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(seeds)), metavar="S", help="of a run each")
    return Lab(name, arguments(description, parser, "paper_runs"))


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
