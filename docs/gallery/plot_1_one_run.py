"""
One run and its factors
=======================

A small network on scikit-learn's digits with plain SGD and small batches, trained by Lightning. The measurement is one
callback; all figures are of the record that it leaves.
"""

import tempfile

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from lightning_speedlimit import SpeedLimit
from lightning_speedlimit.report import figures


class Classifier(pl.LightningModule):
    """A LightningModule that knows nothing of the measurement."""

    def __init__(self) -> None:
        super().__init__()
        self.network = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return torch.nn.functional.cross_entropy(self.network(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


pl.seed_everything(0, verbose=False)
digits = load_digits()
data = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
callback = SpeedLimit(print_summary=False, dirpath=tempfile.mkdtemp())
trainer = pl.Trainer(
    max_epochs=12,
    callbacks=[callback],
    log_every_n_steps=4,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Classifier(), DataLoader(data, batch_size=32, shuffle=True))
record = callback.record
print(record.summary())

# %%
# The table says where it was lost. The factors over the steps say when.

figure = figures.efficiency(record)

# %%
# Where did the work along the gradients go?

figure = figures.work_balance({"SGD 0.1, batch 32": record})

# %%
# Efficiency between any two steps: each point is a stretch of the run, from its first to its last step.

figure = figures.windows(record)
