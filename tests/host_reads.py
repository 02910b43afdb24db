"""What waits for a device, seen on the CPU: what torch is asked to do, and which methods of a tensor are called."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# What turns a tensor into a number, a truth value or a shape: each waits for the device.
READS = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique_dim",
    "aten::_unique2",
}
# Methods that bring a tensor to the host; of a CPU tensor some pass the dispatcher by.
METHODS = {"item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__", "__repr__"}
SYNCHRONIZE = ("torch.cuda.synchronize", "torch.cpu.synchronize", "torch.accelerator.synchronize")

Found = list[tuple[str, int]]  # name, and where the tensor that was read lies


class HostReads(TorchDispatchMode):
    """Notes each operation that reads a tensor on the host, and where that tensor lies."""

    def __init__(self, found: Found | None = None) -> None:
        super().__init__()
        self.found: Found = [] if found is None else found

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        masked = name == "aten::index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        if name in READS or masked:
            self.found.append((name, args[0].data_ptr()))
        return func(*args, **(kwargs or {}))


class HostCalls(TorchFunctionMode):
    """Notes each call of a method that would bring a tensor to the host; `.to("cpu")` too.

    (Not one with non_blocking=True: uploads from the host have that, and look the same on a CPU. Nor those that
    Lightning and torch do on their own: each logged value is moved to where it is.)
    """

    def __init__(self, found: Found) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        target = [*args[1:], *(kwargs or {}).values()]
        down = name == "to" and any(str(t) == "cpu" for t in target if isinstance(t, str | torch.device))
        down = down and not (kwargs or {}).get("non_blocking", False)
        file = sys._getframe(1).f_code.co_filename
        down = down and ("site-packages" not in file or "lightning_speedlimit" in file)
        if (name in METHODS or down) and args and isinstance(args[0], Tensor):
            self.found.append((f"Tensor.{name}", args[0].data_ptr()))
        return func(*args, **(kwargs or {}))


@contextmanager
def watched(found: Found | None = None) -> Iterator[Found]:
    """All that is read on the host within."""
    kept: Found = [] if found is None else found
    patches = []
    for name in SYNCHRONIZE:
        module, _, function = name.rpartition(".")
        if module == "torch.accelerator" and not hasattr(torch, "accelerator"):
            continue
        note = mock.Mock(side_effect=lambda *args, called=name: kept.append((called, 0)))
        patches.append(mock.patch(f"{module}.{function}", note))
    for patch in patches:
        patch.start()
    try:
        with HostReads(kept), HostCalls(kept):
            yield kept
    finally:
        for patch in patches:
            patch.stop()


def step_counters(optimizer: Any) -> set[int]:
    """Where the optimizer's own counters on the CPU lie: `step`, `mu_product`."""
    return {
        value.data_ptr()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.numel() == 1 and value.dim() == 0 and value.device.type == "cpu"
    }
