"""The Jacobian of a module's outputs, row by row, without a trace on the module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import accumulate

import torch
from torch import Tensor, nn

Inputs = Tensor | tuple[Tensor, ...]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode, gradients on, no autocast; all as before at the end."""
    training = [(part, part.training) for part in module.modules()]
    device = next((parameter.device.type for parameter in module.parameters()), "cpu")
    try:
        module.eval()
        with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
            if torch.amp.is_autocast_available(device):
                stack.enter_context(torch.autocast(device, enabled=False))
            if any(isinstance(part, nn.RNNBase) for part in module.modules()):
                # cuDNN's recurrent layers refuse to go backward in eval mode; the native ones do.
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            yield
    finally:
        for part, was in training:
            part.training = was


class Jacobian:
    """∂f/∂θ, a few rows at a time, of a module in eval mode, at detached copies of its parameters."""

    def __init__(self, module: nn.Module, inputs: Inputs) -> None:
        self._module = module
        self._inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        self._parameters = {
            name: parameter.detach().clone().requires_grad_(parameter.requires_grad)
            for name, parameter in module.named_parameters()
        }
        self._moving = [parameter for parameter in self._parameters.values() if parameter.requires_grad]
        if not self._moving:
            raise ValueError(
                f"module must have parameters that require grad, got none among {len(self._parameters)}; "
                "unfreeze some: parameter.requires_grad_()"
            )
        self._sizes = [p.numel() * (2 if p.is_complex() else 1) for p in self._moving]
        self._ends = list(accumulate(self._sizes))
        self.width = self._ends[-1]
        self.samples = _count_samples(self._inputs)
        with torch.no_grad():
            self.outputs = self._forward(slice(None), self._parameters)
            _check_outputs(self.outputs, self.samples)
            independent = self._independent(self._parameters) and self._independent(self._shaken())
            self._together = 1 if independent else self.samples
        device = self._moving[0].device
        self.device = torch.device("cpu") if device.type == "mps" else device

    def rows(self, start: int, stop: int) -> Tensor:
        """(stop − start, P) float64."""
        block = torch.zeros(stop - start, self.width, dtype=torch.float64, device=self.device)
        rows = self.outputs.numel() // self.samples * self._together  # that one evaluation gives
        for first in range(start - start % rows, stop, rows):
            sample = first // rows * self._together
            values = self._forward(slice(sample, sample + self._together), self._parameters).flatten()
            if values.requires_grad:
                for row in range(max(start, first), min(stop, first + rows)):
                    self._write(block[row - start], values[row - first])
        return block

    def _write(self, row: Tensor, value: Tensor) -> None:
        gradients = torch.autograd.grad(value, self._moving, retain_graph=True, allow_unused=True)
        for end, size, gradient in zip(self._ends, self._sizes, gradients, strict=True):
            if gradient is not None:
                dense = gradient if gradient.layout == torch.strided else gradient.to_dense()
                real = torch.view_as_real(dense) if dense.is_complex() else dense
                row[end - size : end] = real.flatten()

    def _forward(self, part: slice, parameters: dict[str, Tensor]) -> Tensor:
        """Outputs of some samples. Copies of inputs and buffers: no trace of inference mode, no state moved."""
        buffers = {name: buffer.clone() for name, buffer in self._module.named_buffers()}
        arguments = tuple(x[part].clone() for x in self._inputs)
        outputs = torch.func.functional_call(self._module, (parameters, buffers), arguments)
        if not isinstance(outputs, Tensor):
            raise TypeError(f"module must return one tensor, got {type(outputs).__name__}; wrap it in one that does")
        return outputs

    def _shaken(self) -> dict[str, Tensor]:
        """The parameters a tenth of their size away: zeros in a last layer hide at θ what ∂f/∂θ depends on."""
        generator = torch.Generator().manual_seed(0)
        squares = sum(torch.linalg.vector_norm(parameter).item() ** 2 for parameter in self._moving)
        size = 0.1 * (squares / sum(parameter.numel() for parameter in self._moving)) ** 0.5 or 1.0

        def noise(parameter: Tensor) -> Tensor:
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device="cpu")
            return size * drawn.to(parameter)

        return {name: p + noise(p) if p.requires_grad else p for name, p in self._parameters.items()}

    def _independent(self, parameters: dict[str, Tensor]) -> bool:
        """Whether each sample's outputs are the same without the others; batch statistics make them differ."""
        outputs = self._forward(slice(None), parameters)
        if not outputs.isfinite().all():  # out of the module's domain: all at once is right in any case
            return False
        tolerance = torch.finfo(outputs.dtype).eps ** 0.5 * outputs.abs().max().item()
        for n, together in enumerate(outputs):
            try:
                alone = self._forward(slice(n, n + 1), parameters)
            except (RuntimeError, ValueError):  # one sample is too few for it: all at once it was able to
                return False
            if alone.numel() != together.numel():
                return False
            if not torch.allclose(alone.flatten(), together.flatten(), rtol=0, atol=tolerance):
                return False
        return True


def _count_samples(inputs: tuple[Tensor, ...]) -> int:
    for x in inputs:
        if not isinstance(x, Tensor):
            raise TypeError(f"inputs must be a tensor or a tuple of tensors, got {type(x).__name__}; wrap the module")
    shapes = [tuple(x.shape) for x in inputs]
    if not shapes or not all(shapes) or len({shape[0] for shape in shapes}) > 1 or not shapes[0][0]:
        raise ValueError(f"inputs must be tensors (N, …) of the same N ≥ 1, got shapes {shapes}")
    return shapes[0][0]


def _check_outputs(outputs: Tensor, samples: int) -> None:
    if not outputs.dtype.is_floating_point:
        raise TypeError(f"module must return real floating values, got {outputs.dtype}; use torch.view_as_real(...)")
    if outputs.ndim == 0 or len(outputs) != samples or not outputs.numel():
        raise ValueError(
            f"module must return outputs of shape ({samples}, …), one row per sample, got {tuple(outputs.shape)}; "
            "pass the model's outputs, not their mean or loss"
        )
    if not outputs.isfinite().all():
        raise ValueError("the module's outputs must be finite, got NaN or inf; look at its weights and inputs")
