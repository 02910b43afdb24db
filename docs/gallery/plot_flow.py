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
# Gradient descent on the same loss, measured from plain PyTorch. The clock "lr" counts learning rate × steps, the time
# of the flow.


def descend(lr: float) -> tuple[list[float], list[float]]:
    """Times and efficiencies of one run, read at every step."""
    theta = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([theta], lr=lr)
    meter = TrajectoryMeter(optimizer, clock="lr")
    elapsed, efficiency = [], []
    while lr * len(elapsed) < 100:
        optimizer.zero_grad()
        loss = 0.5 * (curvatures * theta**2).sum()
        loss.backward()
        meter.record_loss(loss)
        optimizer.step()
        final = 0.5 * (curvatures * theta.detach() ** 2).sum()
        displacement = float((theta.detach() - start).square().sum())
        values = meter.compute()
        elapsed.append(values["elapsed"])
        efficiency.append(displacement / values["elapsed"] / float(flow_loss - final))
    return elapsed, efficiency


flow_loss = 0.5 * (curvatures * start**2).sum()
figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
axes.semilogx(times, flow.efficiency, color="black", label="closed form")
for lr, marker in [(0.1, "."), (0.5, "x"), (1.5, "+")]:
    axes.semilogx(*descend(lr), marker, markersize=5, label=f"gradient descent, lr = {lr}")
axes.set(xlabel="time = learning rate × steps", ylabel="efficiency D²/(τ · loss drop)")
axes.axhline(1, color="grey", linewidth=0.7)
axes.legend()
plt.show()

# %%
# The fast mode is done after a time of 1, the slow one after 20. The run is as fast as it can be while one of them
# does all of the work, and is not in between: the path turns. With lr = 1.5 the fast mode bounces, and the first
# points lie above 1: the bound holds for the flow, and for steps that are small against 1/curvature.
