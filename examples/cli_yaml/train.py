"""LightningCLI: the callback is named in the YAML file, and in no line of Python.

    python examples/cli_yaml/train.py fit --config examples/cli_yaml/config.yaml

Every setting of the callback is a key of the file, and is checked: a wrong name or value ends before the training
begins. One setting of the last callback in the list, for this run alone:

    python examples/cli_yaml/train.py fit --config examples/cli_yaml/config.yaml \\
        --trainer.callbacks.entropy_production=ito

`python examples/cli_yaml/train.py fit --trainer.callbacks.help=lightning_speedlimit.SpeedLimit` lists them all.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset


class Classifier(pl.LightningModule):
    """64-width-10 with ReLU; its optimizer is named in the YAML file too."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self.network(images), labels)
        self.log("train_loss", loss)
        return loss


class Digits(pl.LightningDataModule):
    """The 1,797 images of 8 x 8 pixels that come with scikit-learn, in [0, 1]."""

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        images, labels = load_digits(return_X_y=True)
        data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
        return DataLoader(data, self.batch_size, shuffle=True, drop_last=True)


def main() -> None:
    logging.disable(logging.INFO)  # Lightning's list of devices, and its tips
    warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec).*")
    torch.set_num_threads(1)
    cli = LightningCLI(Classifier, Digits)
    folder = cli.trainer.log_dir
    if folder is not None:
        print("\nHow to go on")
        print(f"  settings   {Path(folder) / 'config.yaml'}   (of this very run: --config repeats it)")
        print(f"  numbers    {Path(folder) / 'metrics.csv'}")
        print(f"  record     speedlimit show {Path(folder) / 'speed_limit'}")


if __name__ == "__main__":
    main()
