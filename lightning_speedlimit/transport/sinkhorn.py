"""geomloss's Sinkhorn as a source of good potentials: what comes out is proved elsewhere, not trusted."""

from __future__ import annotations

import torch
from geomloss import SamplesLoss
from torch import Tensor


def potentials(costs: Tensor, weights: tuple[Tensor, Tensor], *, sharpness: float, scaling: float) -> Tensor:
    """f (N,): the entropic potential of the rows, at a blur that follows the clouds' own spacing.

    The costs are scaled to diameter 1, and blur is `sharpness` × the median distance to the second-nearest
    particle of the other cloud. Undebiased: debiased potentials are not dual feasible. Zeros where the
    iteration came to nothing finite; the caller's transforms then start cold.

    Args:
        costs: (N, M) squared distances.
        weights: (N,), (M,).
        sharpness: blur in units of the spacing.
        scaling: ratio of successive blurs while annealing.
    """
    diameter = costs.max().item()
    spacing = costs.topk(min(2, costs.shape[1]), dim=1, largest=False).values[:, -1].median().item()
    relative = max(spacing / diameter, 1e-12) if diameter > 0 else 1.0
    dtype = torch.float32 if relative > 1e-4 else torch.float64  # exponents of up to 1/(sharpness² relative)
    scaled = (costs / (diameter or 1.0)).to(dtype)
    turned = scaled.T.contiguous()
    marks = [
        torch.full((count, 1), mark, dtype=dtype, device=costs.device)
        for count, mark in zip(costs.shape, (0, 1), strict=True)
    ]
    loss = SamplesLoss(
        "sinkhorn",
        p=2,
        blur=sharpness * relative**0.5,
        scaling=scaling,
        diameter=1.0,
        # Called with (x, y) and with (y, x): the marks tell which.
        cost=lambda first, _: (scaled if first.flatten()[0] == 0 else turned)[None],
        debias=False,
        potentials=True,
        backend="tensorized",
    )
    grad = torch.is_grad_enabled()
    try:
        with torch.autocast(costs.device.type, enabled=False):
            f, _ = loss(weights[0].to(dtype), marks[0], weights[1].to(dtype), marks[1])
    finally:
        torch.set_grad_enabled(grad)  # geomloss turns it on, and leaves it off where its loop raises
    f = f.detach().flatten().to(costs.dtype) * diameter
    return f if bool(torch.isfinite(f).all()) else torch.zeros_like(f)
