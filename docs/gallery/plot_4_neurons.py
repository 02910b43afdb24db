"""
Neurons that change places
==========================

Relabelling the neurons of a layer changes nothing of what the layer can do. So a part of a displacement may be neurons
that swapped places. With ``clouds="neurons"`` the callback compares the neurons of each layer, as a cloud of points,
with those at the start: W₂ is the displacement that is left when they may swap names, and the identity excess is by how
much the squared displacement is longer than that.
"""

import math
import tempfile

import matplotlib.pyplot as plt
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_speedlimit import SpeedLimit


def two_spirals(count=400):
    """Points (count, 2) and which of two spirals each belongs to."""
    angle = 3 * math.pi * torch.rand(count).sqrt()
    side = torch.arange(count) % 2
    points = angle[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1) / 8
    return points * (1 - 2 * side[:, None]) + 0.02 * torch.randn(count, 2), side


class Spirals(pl.LightningModule):
    """An MLP 2-64-64-2."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Linear(2, 64),
            torch.nn.Tanh(),
            torch.nn.Linear(64, 64),
            torch.nn.Tanh(),
            torch.nn.Linear(64, 2),
        )

    def training_step(self, batch, batch_idx):
        points, side = batch
        return torch.nn.functional.cross_entropy(self.body(points), side)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.03)


pl.seed_everything(0, verbose=False)
callback = SpeedLimit(clouds="neurons", print_summary=False, dirpath=tempfile.mkdtemp())
trainer = pl.Trainer(
    max_epochs=40,
    callbacks=[callback],
    log_every_n_steps=10,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Spirals(), DataLoader(TensorDataset(*two_spirals()), batch_size=50, shuffle=True))

# %%
# ``record.clouds`` has a row for each epoch and a column for each layer.

table = callback.record.clouds
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for layer, excess, style in zip(table["layers"], table["identity_excess"].T, ("-", "--", ":"), strict=True):
    axes.plot(table["step"], 100 * excess, style, label=layer)
    print(f"{layer:<8} largest identity excess {excess.max():.1%}, at the end {excess[-1]:.1%}")
axes.set(xlabel="step", ylabel="identity excess, %")
axes.legend(title="layer", frameon=False)
plt.show()

# %%
# The neurons of the first layer have three numbers each, two weights and a bias, and meet each other's places. Those of
# the second have 65, and there is more room than neurons to meet in it: a small excess does not say that a layer was
# lazy. The two neurons of the last layer are the two classes, which have names: there the number is the distance of
# two clouds and no more.
