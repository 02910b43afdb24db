"""The one line, with TensorBoard: a small network learns handwritten digits.

    python examples/lightning_tensorboard.py
    tensorboard --logdir demo_runs/tensorboard

The callback needs no setting: it finds the optimizer and the loss, and logs on the Trainer's own log steps. In
TensorBoard everything lies under "speed_limit". Three things to look at:

- efficiency: the share of the time taken that was needed; 1 is the thermodynamic speed limit. It begins near 1, once
  the loss has fallen clearly (before, it is not drawn), and ends at 0.40.
- straightness and conversion: why it falls. The path turns (0.83 to 0.49), and in the second half of the run a growing
  share of the work no longer lowers the loss (conversion from 0.84 to 0.66): it goes into batch noise and bouncing.
- step_norm and steadiness: the steps shrink from 0.06 to below 0.02 while grad_norm hardly does. That costs the rest:
  steadiness ends at 0.77.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_speedlimit import SpeedLimit


class Classifier(pl.LightningModule):
    """64-128-10 with ReLU; it knows nothing of the measurement."""

    def __init__(self, lr: float = 1e-3) -> None:
        super().__init__()
        self.lr = lr
        self.network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self.network(images), labels)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def digits(batch_size: int) -> DataLoader[Any]:
    """The 1,797 images of 8 x 8 pixels that come with scikit-learn, in [0, 1]."""
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
    return DataLoader(data, batch_size, shuffle=True, drop_last=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="A small network on digits, measured, with TensorBoard.")
    parser.add_argument("--output", type=Path, default=Path("demo_runs"), metavar="DIR", help="where the logs go")
    parser.add_argument("--quick", action="store_true", help="2 epochs instead of 20")
    options = parser.parse_args()
    logging.disable(logging.INFO)  # Lightning's list of devices, and its tips
    warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec).*")
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)

    logger = TensorBoardLogger(options.output, name="tensorboard")
    trainer = pl.Trainer(
        callbacks=[SpeedLimit()],  # the one line
        logger=logger,
        log_every_n_steps=5,
        max_epochs=2 if options.quick else 20,
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), digits(batch_size=64))

    print("\nHow to go on")
    print(f"  curves   tensorboard --logdir {logger.root_dir}")
    print(f"  record   speedlimit show {Path(logger.log_dir) / 'speed_limit'}")


if __name__ == "__main__":
    main()
