"""Weights & Biases without a network: two batch sizes, two runs, one project.

    python examples/wandb_offline.py
    wandb sync demo_runs/wandb/offline-run-*        # later, and only if you want the curves on a server

The runs learn handwritten digits in 300 steps of SGD, from the same weights. In W&B the numbers lie under
"speed_limit/". Look at three of them, both runs in one panel: efficiency ends at 0.72 for either, for it does not see
batch noise, and both have moved the weights as far. But with batches of 32 images 14 % of the work lowered the loss,
with 256 58 % (conversion); the rest made the path turn (straightness 0.10 against 0.45).
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import WandbLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_speedlimit import RunRecord, SpeedLimit

PROJECT = "speed-limit"
BATCH_SIZES = (32, 256)


class Classifier(pl.LightningModule):
    """64-128-10 with ReLU and SGD; it knows nothing of the measurement."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self.network(images), labels)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def digits(batch_size: int) -> DataLoader[Any]:
    """The 1,797 images of 8 x 8 pixels that come with scikit-learn, in [0, 1]."""
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
    return DataLoader(data, batch_size, shuffle=True, drop_last=True)


def train(batch_size: int, steps: int, folder: Path) -> Path:
    """One run in W&B; the folder of its record."""
    pl.seed_everything(0, verbose=False)
    logger = WandbLogger(project=PROJECT, name=f"batch {batch_size}", save_dir=folder, offline=True)
    trainer = pl.Trainer(
        callbacks=[SpeedLimit(print_summary=False)],
        logger=logger,
        log_every_n_steps=5,
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), digits(batch_size))
    record = folder / PROJECT / str(logger.version) / "speed_limit"
    logger.experiment.config["batch_size"] = batch_size
    logger.experiment.summary["in words"] = in_words(record)  # a column, in W&B's table of runs
    logger.experiment.finish()  # what comes next is a run of its own
    return record


def in_words(record: Path) -> str:
    return RunRecord.load(record).summary().sentence()


def main() -> None:
    parser = argparse.ArgumentParser(description="Two batch sizes on digits, measured, in W&B's offline mode.")
    parser.add_argument("--output", type=Path, default=Path("demo_runs"), metavar="DIR", help="where W&B writes")
    parser.add_argument("--quick", action="store_true", help="20 steps each instead of 300")
    options = parser.parse_args()
    logging.disable(logging.INFO)  # Lightning's list of devices, and its tips
    warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec).*")
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)  # W&B falls back to a temporary folder where there is none

    records = {size: train(size, 20 if options.quick else 300, options.output) for size in BATCH_SIZES}

    for size, record in records.items():
        print(f"\nbatch {size}: {in_words(record)}")
    print("\nHow to go on")
    print(f"  curves    wandb sync {options.output}/wandb/offline-run-*   (sends them to a server)")
    print("  records   speedlimit compare", *records.values())


if __name__ == "__main__":
    main()
