"""The tangent kernel of a network of `images.py` on its images, and the flow that it predicts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from ntk import descend, stepwise
from torch import Tensor, nn

from lightning_speedlimit.theory import Curve, empirical_ntk, gradient_flow

Data = tuple[Tensor, Tensor]


def tangent_kernel(network: nn.Module, x: Tensor) -> Tensor:
    """K = JJᵀ (N·C, N·C) float64: `empirical_ntk`, and for a chain of Linear layers the same without its Jacobian."""
    network, x = copy.deepcopy(network).double(), x.double()
    layers = list(network.modules())[1:]
    if all(isinstance(layer, nn.Flatten | nn.Linear | nn.ReLU) for layer in layers):
        return chain_kernel(layers, x)
    return empirical_ntk(network, x)


def chain_kernel(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """K = Σ (1 + a aᵀ) ∘ δδᵀ over Linear layers, a (N, in) what one takes in, δ = ∂f/∂(what it gives out).

    A layer's part of J is δ ⊗ (a, 1), which is not formed: of 3072 × 2048 weights it has gigabytes.
    """
    inputs, outputs = [], []
    for layer in layers:
        if isinstance(layer, nn.Linear):
            inputs.append(x)
        x = layer(x)
        if isinstance(layer, nn.Linear):
            outputs.append(x)
    count, classes = x.shape
    rows = [torch.autograd.grad(x[:, c].sum(), outputs, retain_graph=True) for c in range(classes)]
    total = torch.zeros(count, classes, count, classes, dtype=torch.float64)
    for a, deltas in zip(inputs, zip(*rows, strict=True), strict=True):
        delta = torch.stack(deltas, 1).flatten(0, 1)
        total += (delta @ delta.T).view_as(total) * (1 + a @ a.T).detach()[:, None, :, None]
    return total.view(count * classes, count * classes)


@dataclass(frozen=True)
class Modes:
    """Of nn.MSELoss, largest rate first. eigenvalues: λ (N·C,), loss/parameter². initial, targets: f_{θ_0} and y in
    the kernel's eigenbasis, √loss."""

    eigenvalues: Tensor
    initial: Tensor
    targets: Tensor
    kernel: Tensor
    """K itself, not scaled."""

    @classmethod
    def of(cls, network: nn.Module, data: Data) -> Modes:
        x, y = data
        found = tangent_kernel(network, x)
        rates, basis = torch.linalg.eigh(found)
        rates = torch.where(rates > len(rates) * torch.finfo(rates.dtype).eps * rates[-1], rates, 0.0)
        with torch.no_grad():
            start = network(x).flatten().double()
        scale = 2 / y.numel()
        initial, targets = (scale**0.5 * (basis.T @ part).flip(0) for part in (start, y.flatten().double()))
        return cls(scale * rates.flip(0), initial, targets, found)

    @property
    def residual(self) -> Tensor:
        return self.initial - self.targets

    def flow(self, times: Tensor) -> Curve:
        return gradient_flow(self.eigenvalues, self.residual, times)

    def descent(self, lr: float, step: int) -> tuple[float, float]:
        """(W₂², Q) of so many steps of descent in this kernel: (1 − lr λ)^k for e^{−λt}."""
        return stepwise(self.eigenvalues, self.residual, lr, step)


def trained(network: nn.Module, data: Data, lr: float, marks: Sequence[int]) -> Tensor:
    """(m, 2): W₂² and Q at these steps of full-batch descent on nn.MSELoss, as the meter has them."""
    run = descend(network, data, lr, marks, mean=True)
    return torch.tensor([[values["displacement"] ** 2, values["loss_drop"]] for _, values in run], dtype=torch.float64)


def ratio(values: Tensor) -> Tensor:
    """W₂²/Q = τ_SL of (…, 2)."""
    return values[..., 0] / values[..., 1]
