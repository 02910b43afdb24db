# %% [markdown]
# # Two trainings, seen in a notebook
#
# The same small network learns handwritten digits twice, with two batch sizes. `SpeedLimit` measures both. What it
# leaves behind, and the comparison of the two, show themselves as tables and figures.
#
# Needs `pip install "lightning-speedlimit[report,pandas]" scikit-learn`; takes about ten seconds.

# %%
import logging
import tempfile
import warnings

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_speedlimit import SpeedLimit, compare

for name in ("pytorch_lightning", "lightning.pytorch"):  # the package under its two names: no tips
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="pytorch_lightning")

digits = load_digits()
data = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch, index):
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(batch_size, epochs):
    pl.seed_everything(0, verbose=False)
    callback = SpeedLimit(dirpath=tempfile.mkdtemp(), print_summary=False, log_figures=False)  # the one line
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        log_every_n_steps=5,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), DataLoader(data, batch_size=batch_size, shuffle=True))
    return callback.record


# %% [markdown]
# ## One run
#
# What it cost, what it bought, what to change; the efficiency over the steps; where the work went.

# %%
small = train(batch_size=32, epochs=4)
small

# %% [markdown]
# Every log step is a row, for your own figures. `work_ito` is the work of the updates along the gradients, `loss_drop`
# what of it lowered the loss.

# %%
small.to_dataframe()[["loss", "loss_drop", "work_ito", "action", "efficiency", "conversion"]].tail()

# %% [markdown]
# ## Two runs
#
# At the same loss: which took fewer samples, and which less action (the squared lengths of all steps, added up)?

# %%
comparison = compare({"batch 32": small, "batch 128": train(batch_size=128, epochs=12)})
comparison

# %%
comparison.to_dataframe()[["step", "samples", "loss", "action", "straightness", "conversion", "beaten_by"]]

# %% [markdown]
# The whole page, in a frame. `comparison.html("report.html")` writes it to a file too.

# %%
comparison.html()
