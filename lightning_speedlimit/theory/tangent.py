"""The empirical neural tangent kernel of a module, and the gradient flow that it predicts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_speedlimit.checks.tensors import Reduction, Values, finite, float64, instants, loss_factor, whole
from lightning_speedlimit.checks.tensors import module as checked_module
from lightning_speedlimit.theory.curve import Curve
from lightning_speedlimit.theory.flow import gradient_flow
from lightning_speedlimit.theory.jacobian import Inputs, Jacobian, evaluating

BLOCK_BYTES = 2**29


def empirical_ntk(module: nn.Module, inputs: Inputs, *, block_bytes: int = BLOCK_BYTES) -> Tensor:
    """K = JJᵀ, (N·C, N·C), J = ∂f/∂θ over the parameters that require grad, f the outputs (N, …) flattened.

    The module is evaluated in eval mode and left as it was: modes, parameters, gradients, buffers. Tied
    parameters count once. Rows of J are held in blocks and computed again where they do not fit: time grows
    with N·C·P/block_bytes, memory does not (besides K).

    Args:
        module: any that is differentiable; its forward takes `inputs` and returns one tensor.
        inputs: (N, …), or a tuple of such tensors for a forward of several arguments.
        block_bytes: of the rows of J in float64 that are held at a time, at least two rows.

    Returns:
        float64, on the device of the parameters (the host where it has no float64), in the order of
        outputs.flatten(): sample by sample. Unit: output²/parameter².

    Raises:
        TypeError: inputs that are not tensors, outputs that are not one real tensor.
        ValueError: no parameter requires grad, outputs that do not start with N, or a non-finite Jacobian.

    Source: Jacot, Gabriel, Hongler, arXiv:1806.07572.
    """
    whole("block_bytes", block_bytes, 1, 2**60)
    with evaluating(checked_module("module", module)):
        return _gram(Jacobian(module, inputs), block_bytes)


def ntk_eigenbasis(
    module: nn.Module, inputs: Inputs, targets: Tensor, *, block_bytes: int = BLOCK_BYTES
) -> tuple[Tensor, Tensor, Tensor]:
    """(λ, Vᵀf_{θ_0}, Vᵀy), each (N·C,), of K = V diag(λ) Vᵀ: what `gradient_flow` and `split_initial` take.

    λ ≤ n·ε·λ_max is set to 0, n = N·C: rounding. ε is float64's, or the square of the module's where that is
    larger (K is the exact square of a Jacobian rounded in the module's precision). What of the residual lies
    in those directions does not move.

    Args:
        module, inputs, block_bytes: as `empirical_ntk`.
        targets: y, of the shape of the outputs.

    Raises:
        TypeError, ValueError: as `empirical_ntk`; targets of another shape, complex or non-finite.
    """
    goal = finite("targets", targets)
    whole("block_bytes", block_bytes, 1, 2**60)
    with evaluating(checked_module("module", module)):
        jacobian = Jacobian(module, inputs)
        outputs = jacobian.outputs
        if goal.shape != outputs.shape:
            raise ValueError(
                f"targets must have the shape of the outputs, {tuple(outputs.shape)}, got {tuple(goal.shape)}; "
                "use targets.reshape(...), or one-hot rows for class labels"
            )
        kernel = _gram(jacobian, block_bytes)
    eigenvalues, basis = torch.linalg.eigh(kernel)
    eps = max(torch.finfo(torch.float64).eps, torch.finfo(outputs.dtype).eps ** 2)
    moving = eigenvalues > len(eigenvalues) * eps * eigenvalues[-1]
    start, end = (float64(x).flatten().to(kernel) for x in (outputs, goal))
    return torch.where(moving, eigenvalues, 0.0), basis.T @ start, basis.T @ end


def predict(
    module: nn.Module,
    inputs: Inputs,
    targets: Tensor,
    times: Values,
    *,
    reduction: Reduction = "sum",
    block_bytes: int = BLOCK_BYTES,
) -> Curve:
    """`gradient_flow` with the module's kernel and residual at its present weights: training on ½‖f − y‖².

    Exact where the module is linear in its parameters; the wider it is, the closer (the kernel then hardly
    moves). Full batch, eval mode, plain gradient descent with a small learning rate: t = lr × steps.

    Args:
        module, inputs, targets, block_bytes: as `ntk_eigenbasis`.
        times: any shape, ≥ 0.
        reduction: "sum" over data and outputs, or "mean" for `nn.MSELoss` over N·C residuals: the same curve at
            2t/(N·C), with 2/(N·C) of the entropy production.

    Returns:
        the curve; NaN efficiency where nothing moves.

    Raises:
        TypeError, ValueError: as `ntk_eigenbasis`; negative times, another reduction.
    """
    factor = loss_factor(reduction, finite("targets", targets).numel())
    t = instants(times)
    eigenvalues, initial, goal = ntk_eigenbasis(module, inputs, targets, block_bytes=block_bytes)
    return gradient_flow(factor * eigenvalues, factor**0.5 * (initial - goal), t)


def _gram(jacobian: Jacobian, block_bytes: int) -> Tensor:
    """JJᵀ by blocks: three quarters of the bytes hold rows, under the rest the following rows pass by."""
    count = jacobian.outputs.numel()
    fitting = block_bytes // (8 * jacobian.width)
    held, passing = max(1, fitting * 3 // 4), max(1, fitting // 4)
    kernel = torch.empty(count, count, dtype=torch.float64, device=jacobian.device)
    for start in range(0, count, held):
        stop = min(start + held, count)
        block = jacobian.rows(start, stop)
        square = block @ block.T
        kernel[start:stop, start:stop] = 0.5 * (square + square.T)  # products need not be symmetric to the last digit
        for first in range(stop, count, passing):
            last = min(first + passing, count)
            part = block @ jacobian.rows(first, last).T
            kernel[start:stop, first:last] = part
            kernel[first:last, start:stop] = part.T
    if not kernel.diagonal().isfinite().all():
        raise ValueError("the Jacobian must be finite, got NaN or inf; look for √0, 0/0 or overflow in the module")
    return kernel
