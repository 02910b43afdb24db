"""The per-step path on an accelerator, with fake tensors: no host read, no copy between devices, no mixing of them.

Fake CUDA tensors have a device, a type and a shape and no values, so that this runs where there is no accelerator.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import SGD, AdamW, Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_speedlimit.trajectory import TrajectoryMeter

STEPS = 5
READS = {"item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__", "__repr__"}
Found = list[str]


# What asks for a driver before it looks further, where it is called as Python spells it; and `tensor[index]`.
DIRECT: dict[str, Any] = {"copy_": torch.ops.aten.copy_.default, "__invert__": torch.bitwise_not}


def part(tensor: Tensor, index: Any) -> Tensor:
    """`tensor[index]`."""
    dim = 0
    for i in index if isinstance(index, tuple) else (index,):
        if isinstance(i, slice):
            stop = tensor.shape[dim] if i.stop is None else i.stop
            tensor = torch.ops.aten.slice.Tensor(tensor, dim, i.start or 0, stop)
            dim += 1
        elif i is None:
            tensor, dim = tensor.unsqueeze(dim), dim + 1
        else:
            assert isinstance(i, int), i
            tensor = tensor.select(dim, i)
    return tensor


class Reads(TorchFunctionMode):
    """Notes what reads a device tensor. A counter that the optimizer keeps on the host reads as 1: it has no value."""

    def __init__(self, found: Found) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS and isinstance(args[0], Tensor):
            if args[0].device.type != "cpu":
                self.found.append(name)
            return True if name == "__bool__" else 1 if name in ("__int__", "__index__") else 1.0
        if name == "data_ptr":
            return 0  # it has no memory
        if name == "__getitem__" and isinstance(args[0], Tensor):
            return part(args[0], args[1])
        if name == "__setitem__" and isinstance(args[0], Tensor):
            place = part(args[0], args[1])
            return DIRECT["copy_"](place, args[2]) if isinstance(args[2], Tensor) else place.fill_(args[2])
        return DIRECT.get(name, func)(*args, **(kwargs or {}))


class Copies(TorchDispatchMode):
    """Notes what is copied from one device to another, but for what an upload does not wait for; `all`: that too."""

    def __init__(self, found: Found, *, all: bool = False) -> None:
        super().__init__()
        self.found, self.all = found, all

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in ("aten::_to_copy", "aten::copy_"):
            source = args[0] if name == "aten::_to_copy" else args[1]
            waits = self.all or (
                not (kwargs or {}).get("non_blocking", False) and not (name == "aten::copy_" and args[2:3] == (True,))
            )
            # A number written into a vector is a kernel's argument.
            number = name == "aten::copy_" and source.dim() == 0 and source.device.type == "cpu"
            if source.device != result.device and waits and not number:
                self.found.append(f"{name} {source.device.type} to {result.device.type}")
        return result


@contextmanager
def watched(found: Found, *, all: bool = False) -> Iterator[None]:
    with Copies(found, all=all), Reads(found):
        yield


KINDS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGD": (SGD, {"lr": 0.1}),
    "SGD with momentum and L2": (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "AdamW foreach": (AdamW, {"lr": 0.1, "foreach": True}),
    "AdamW foreach, capturable": (AdamW, {"lr": 0.1, "foreach": True, "capturable": True}),
    "AdamW fused": (AdamW, {"lr": 0.1, "fused": True}),
}
kinds = pytest.mark.parametrize("kind", KINDS)
METERS: list[dict[str, Any]] = [{"clock": "lr"}, {"gradient_changes": "unknown"}, {"gradient_changes": "given"}]


def reads(
    kind: str,
    clip: bool,
    wrong: Callable[[Tensor], object] | None = None,
    skips: bool = False,
    all: bool = False,
    **options: Any,
) -> Found:
    """What is read or copied in the steps after the first, which makes all buffers; `all`: see Copies."""
    make, group = KINDS[kind]
    found: Found = []
    with FakeTensorMode():
        shapes = [(64, 16), (64,), (10, 64), (3, 4, 3, 3), ()]
        parameters = [nn.Parameter(torch.empty(shape, device="cuda")) for shape in shapes]
        optimizer = make(parameters, **group)
        meter = TrajectoryMeter(optimizer, **options)
        if wrong is not None:
            optimizer.register_step_post_hook(lambda *stepped: _ignored(wrong(parameters[0].data)))
        with Reads([]):
            step(parameters, optimizer, meter, clip, skips)
        with watched(found, all=all):
            for _ in range(STEPS - 1):
                step(parameters, optimizer, meter, clip, skips)
        assert meter.steps == STEPS
        assert meter.recorder.failure is None, meter.recorder.failure
        for motion in meter._followers[0].motions:
            assert motion.coordinates.device.type == "cuda"
        meter.close()
    return found


def _ignored(result: object) -> None:
    """What a hook's result is."""


def step(parameters: list[nn.Parameter], optimizer: Optimizer, meter: TrajectoryMeter, clip: bool, skips: bool) -> None:
    for p in parameters:
        p.grad = torch.empty_like(p)
    meter.record_loss(torch.empty((), device="cuda"))
    if skips:  # as a loss scaler sets them
        optimizer.grad_scale = torch.empty((), device="cuda")  # type: ignore[attr-defined]
        optimizer.found_inf = torch.empty((), device="cuda")  # type: ignore[attr-defined]
    meter.observe_gradients(optimizer, scale=torch.empty((), device="cuda") if skips else None)
    if clip:
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
    optimizer.step()


@kinds
@pytest.mark.parametrize("clip", [False, True], ids=["", "clipped"])
def test_a_step_waits_for_nothing(kind: str, clip: bool) -> None:
    assert reads(kind, clip) == []


@pytest.mark.parametrize("kind", ["SGD with momentum and L2", "AdamW foreach"])
@pytest.mark.parametrize("options", METERS, ids=lambda options: "-".join(map(str, options.values())))
def test_a_step_of_another_meter_waits_for_nothing(kind: str, options: dict[str, Any]) -> None:
    assert reads(kind, clip=True, **options) == []


def test_a_fused_step_under_a_loss_scaler_waits_for_nothing() -> None:
    assert reads("AdamW fused", clip=False, skips=True) == []


@kinds
@pytest.mark.parametrize("options", [{}, {"clock": "lr"}], ids=["", "clock lr"])
def test_a_step_uploads_nothing(kind: str, options: dict[str, Any]) -> None:
    """Not even what it need not wait for: rates and step counts go into kernels as their arguments."""
    assert reads(kind, clip=True, all=True, **options) == []


def test_an_upload_would_be_noticed() -> None:
    found = reads("SGD", False, lambda p: torch.ones(2).to(p.device, non_blocking=True), all=True)
    assert set(found) == {"aten::_to_copy cpu to cuda"}


WRONG: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "item": (lambda p: p.sum().item(), "item"),
    "float": (lambda p: float(p.sum()), "__float__"),
    "truth": (lambda p: bool(p.sum() > 0), "__bool__"),
    "cpu": (lambda p: p.cpu(), "aten::_to_copy cuda to cpu"),
    "to": (lambda p: p.to("cpu"), "aten::_to_copy cuda to cpu"),
    "upload": (lambda p: torch.tensor([1.0, 2.0], device=p.device), "aten::_to_copy cpu to cuda"),
    "into a host tensor": (lambda p: torch.empty(p.shape).copy_(p), "aten::copy_ cuda to cpu"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wait_would_be_noticed(name: str) -> None:
    wrong, said = WRONG[name]
    assert set(reads("SGD", clip=False, wrong=wrong)) == {said}


def test_a_mixture_of_devices_would_be_noticed() -> None:
    with pytest.raises(RuntimeError, match="be on the same device"):
        reads("SGD", clip=False, wrong=lambda p: p + torch.ones(p.shape))
