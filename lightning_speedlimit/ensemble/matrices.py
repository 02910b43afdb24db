"""Matrix functions that torch lacks: the logarithm of real matrices, in batches."""

from __future__ import annotations

import torch
from torch import Tensor

_ITERATIONS = 60
_SERIES = 12  # terms of 2·artanh: 0.25^25 / 25 < 1e-16
_ROOTS = 12


def logarithm(matrix: Tensor) -> Tensor:
    """log M (…, n, n), the principal one: 2^k log M^(1/2^k), log M = 2 artanh[(M − 1)(M + 1)⁻¹].

    NaN for a matrix with an eigenvalue that is 0 or negative, which has no real principal logarithm.
    """
    one = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    values = torch.linalg.eigvals(matrix)
    size = values.abs().amax(-1, keepdim=True)
    # An angle of π, to rounding. The roots of such a matrix do not converge.
    bad = ((values.real <= 0) & (values.imag.abs() <= 1e-12 * size)).any(-1)
    root, factor = torch.where(bad[..., None, None], one, matrix), 1.0
    for _ in range(_ROOTS):
        if float((root - one).abs().sum(-1).amax()) < 0.4:
            break
        root, factor = _square_root(root), 2.0 * factor
    z = torch.linalg.solve(root + one, root - one, left=False)
    squared, term = z @ z, z
    total = z
    for order in range(1, _SERIES + 1):
        term = term @ squared
        total = total + term / (2 * order + 1)
    return torch.where(bad[..., None, None], torch.nan, 2.0 * factor * total)


def _square_root(matrix: Tensor) -> Tensor:
    """M^½ (…, n, n) by the product form of Denman and Beavers' iteration.

    Source: Cheng, Higham, Kenney, Laub 2001, SIAM J. Matrix Anal. Appl. 22.
    """
    one = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    m, x = matrix, matrix
    for _ in range(_ITERATIONS):
        inverse = torch.linalg.inv(m)
        x = 0.5 * x @ (one + inverse)
        m = 0.5 * (one + 0.5 * (m + inverse))
        if float((m - one).abs().amax()) < 1e-14 * len(one):
            break
    return x
