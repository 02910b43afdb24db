"""
Two optimizers at the same loss
===============================

SGD and Adam from the same weights, in a plain PyTorch loop, compared where both reached the same loss.
"""

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from lightning_speedlimit import RunRecord, TrajectoryMeter, compare
from lightning_speedlimit.report import figures

digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)


def train(make_optimizer, settings, steps):
    """A record with a row and a sketch of the trajectory every 5 steps."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = make_optimizer(model.parameters(), **settings)
    meter = TrajectoryMeter(optimizer)
    record = RunRecord(meter.description())
    order = torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        chosen = torch.randint(len(images), (64,), generator=order)
        optimizer.zero_grad()
        loss = cross_entropy(model(images[chosen]), labels[chosen])
        loss.backward()
        meter.record_loss(loss)
        optimizer.step()
        if step % 5 == 0:
            record.take(meter)
    return record


runs = {
    "SGD": train(torch.optim.SGD, {"lr": 0.1}, 600),
    "Adam": train(torch.optim.Adam, {"lr": 0.002}, 300),
}
print(compare(runs).table())

# %%
# It is a trade-off and no ranking: time on one axis, action on the other. What lies to the lower left of a run
# beats it.

figure = compare(runs).figure()

# %%
# The two go different ways from the same start. This plane holds as much of both motions as any plane can; the rest of
# it is in the other dimensions.

figure = figures.trajectories(runs)

# %%
# And this is where their work went.

figure = figures.work_balance(runs)
