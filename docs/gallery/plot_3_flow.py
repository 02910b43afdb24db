"""
Gradient flow against its closed form
=====================================

Least squares with two curvatures. The closed form of :func:`lightning_speedlimit.theory.gradient_flow` is what a run
with ever smaller steps would show; the meter measures runs with steps that are not small.
"""

import matplotlib.pyplot as plt
import torch

from lightning_speedlimit import TrajectoryMeter, theory

curvatures = torch.tensor([1.0, 0.05], dtype=torch.float64)
start = torch.tensor([1.0, 4.0], dtype=torch.float64)

# %%
# For L = ½ Σ h θ² the kernel's eigenvalues are the curvatures h, and the residual is √h θ.

times = torch.logspace(-1, 2, 200, dtype=torch.float64)
flow = theory.gradient_flow(curvatures, curvatures.sqrt() * start, times)

# %%
# Gradient descent on the same loss. The loss drop is given to the meter as it is, so that no window of losses is
# extrapolated. Time is learning rate × steps.


def loss_of(theta):
    return 0.5 * (curvatures * theta**2).sum()


def descend(lr):
    """Times and efficiencies of one run, read at every step."""
    theta = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([theta], lr=lr)
    meter = TrajectoryMeter(optimizer, clock="lr")
    first = loss_of(start).reshape(1)
    elapsed, efficiency = [], []
    while lr * len(elapsed) < 100:
        optimizer.zero_grad()
        loss_of(theta).backward()
        optimizer.step()
        meter.record_probe(first, loss_of(theta.detach()).reshape(1))
        values = meter.compute()
        elapsed.append(values["elapsed"])
        efficiency.append(values["efficiency"])
    return elapsed, efficiency


figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
for lr, marker in [(0.2, "."), (0.5, "x"), (1.5, "+")]:
    elapsed, efficiency = descend(lr)
    axes.semilogx(elapsed, efficiency, marker, markersize=5, label=f"gradient descent, lr = {lr}")
    print(f"lr {lr}: efficiency {efficiency[0]:.3f} after one step, {efficiency[-1]:.3f} at time {elapsed[-1]:.0f}")
axes.semilogx(times, flow.efficiency, color="black", linewidth=1, label="closed form of the flow")
axes.axhline(1, color="grey", linewidth=0.7)
axes.set(xlabel="time = learning rate × steps", ylabel="efficiency D²/(τ · loss drop)", ylim=(0, 1.6))
axes.legend(frameon=False)
plt.show()

# %%
# At first only the steep direction moves, along a straight line: the efficiency is 1. After a time of 1 that one is
# done, the path turns into the slow direction, and the efficiency falls to a plateau. After a time of 20 the slow one
# is done too, and what follows is time spent on nothing.
#
# Large steps start above 1 (lr = 1.5 at 3.6, beyond the axis): the bound is one of the flow, and holds for steps that
# are small against 1/curvature. Later all three lie on the curve.
