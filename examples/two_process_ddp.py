"""Two processes on one machine, without a GPU: DDP over gloo, and the numbers are those of one process.

    python examples/two_process_ddp.py

Under DDP each process sees its part of every batch and all make the same step. What the callback tells is what it
would tell of one process that trains on the whole batches, so this trains twice: in one process with batches of 128,
in two with batches of 64 each, the same images in the same order. The two columns differ by rounding alone. Nothing
is to be set: it costs one message between the processes on each log step, and the first process writes the record.
"""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.strategies import DDPStrategy
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from lightning_speedlimit import RunRecord, SpeedLimit

BATCH_SIZE = 128  # of all processes together
SHOWN = (
    *("efficiency", "efficiency_low", "efficiency_drift", "efficiency_action"),
    *("kinematic_efficiency", "straightness", "steadiness"),
    *("conversion", "signal_fraction", "displacement", "path_length", "action", "loss_drop", "work_ito", "loss"),
)


class Classifier(pl.LightningModule):
    """64-128-10 with ReLU and momentum; it knows nothing of the measurement."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def train_dataloader(self) -> DataLoader[Any]:
        """This process's part of the batches: every second image of one order, which all processes draw alike.

        The first 1,792 of the images that come with scikit-learn make 14 whole batches. (DDP gives each process the
        same weight: a last batch that is shared out unequally would be another mean than that of one process.)
        """
        images, labels = load_digits(return_X_y=True)
        count = len(images) // BATCH_SIZE * BATCH_SIZE
        data = TensorDataset(torch.tensor(images[:count], dtype=torch.float32) / 16, torch.tensor(labels[:count]))
        processes = self.trainer.world_size
        order: DistributedSampler[Any] = DistributedSampler(data, processes, self.global_rank, shuffle=True, seed=0)
        return DataLoader(data, BATCH_SIZE // processes, sampler=order)


def train(folder: Path, epochs: int, **how: Any) -> Path:
    """The folder of the record."""
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        callbacks=[SpeedLimit(print_summary=False)],
        logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=5,
        max_epochs=epochs,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **how,
    )
    trainer.fit(Classifier())
    return folder / "speed_limit"


def main() -> None:
    parser = argparse.ArgumentParser(description="DDP with two processes beside one process, measured.")
    parser.add_argument("--output", type=Path, default=Path("demo_runs"), metavar="DIR", help="where the records go")
    parser.add_argument("--quick", action="store_true", help="2 epochs instead of 10")
    options = parser.parse_args()
    logging.disable(logging.INFO)  # Lightning's list of devices, and its tips
    warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec|exists and is not empty).*")
    torch.set_num_threads(1)
    folder, epochs = options.output / "two_process_ddp", 2 if options.quick else 10

    # Lightning starts this script a second time for the second process, and tells it its rank.
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    alone = train(folder / "one", epochs, devices=1) if first else None
    together = train(folder / "two", epochs, devices=2, strategy=DDPStrategy(process_group_backend="gloo"))
    if alone is None:
        return

    one, two = RunRecord.load(alone).summary(), RunRecord.load(together).summary()
    print(f"\n{one.steps} steps, {BATCH_SIZE} images each")
    print(f"\n{'':<22}{'one process':>14}{'two':>14}{'relative difference':>22}")
    for name in SHOWN:
        a, b = getattr(one, name), getattr(two, name)
        print(f"{name.replace('_', ' '):<22}{a:>14.7g}{b:>14.7g}{abs(b / a - 1):>22.0e}")
    print("\nHow to go on")
    print(f"  records   speedlimit compare {alone} {together}")


if __name__ == "__main__":
    main()
