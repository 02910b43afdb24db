"""A training step on copies of a module, from which nothing reaches the module itself."""

from __future__ import annotations

import copy
import random
import sys
import types
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_speedlimit.callback import lightning
from lightning_speedlimit.callback.reach import GENERATORS, NotIsolated, reach
from lightning_speedlimit.callback.snapshot import Snapshot

__all__ = ["Isolation", "NotIsolated", "deep_copy"]

MOST_BYTES = 2**30  # of what a module holds besides its parameters and buffers


class Isolation:
    """Copies of a module for a step to run on, for as long as the `with` block lasts.

    At its end the module, the batches and the trainer's attributes are compared bit by bit with what they were, and
    where something differs it is put back. Global generators are as they were in any case.

    Raises:
        NotIsolated: on entering: something can't be copied without a trace; at the end: something differed.
    """

    def __init__(self, trainer: Any, module: torch.nn.Module, batches: Any) -> None:
        self._trainer, self._module = trainer, module
        self._before = Snapshot([module, batches], leave={id(trainer)}, names=[vars(trainer)])
        own = self._before.reach.own
        closing = next((x for x in own if hasattr(type(x), "__del__")), None)
        if closing is not None:
            raise NotIsolated(f"the module holds a {type(closing).__name__}, which would be closed with each copy")
        weights = [*module.parameters(), *module.buffers()]
        known = {id(t) for t in weights}
        size = sum(x.nbytes for x in own if isinstance(x, (Tensor, np.ndarray)) and id(x) not in known)
        if size > MOST_BYTES + sum(t.nbytes for t in weights):
            raise NotIsolated(f"the module holds {size / 2**30:.1f} GiB besides its parameters: keep data out of it")
        self._draws = any(isinstance(x, GENERATORS) for x in own)
        self._checked = False

    @contextmanager
    def open(self) -> Iterator[None]:
        changed: list[str] = []
        generators = Snapshot(_global_generators())
        with _eager():
            try:
                yield
            finally:
                generators.restore()
                changed = self._before.changed()
                if changed:
                    self._before.restore()
        if changed:
            how = "could not be put back" if self._before.changed() else "was put back"
            what = ", ".join(sorted(set(changed)))
            raise NotIsolated(f"training_step changed something outside of its copy of the module ({what}); it {how}")

    @contextmanager
    def copy(self, weights: Iterable[tuple[Tensor, Tensor]], seed: int) -> Iterator[torch.nn.Module]:
        """A copy of the module as it is, but for the weights given as (parameter, value); freed at the end.

        Args:
            seed: of the global generators, and of those that the module holds.

        Raises:
            NotIsolated: it shares something with the module that may change; a parameter given is not the module's.
        """
        memo: dict[int, Any] = {}
        stand_in = lightning.TrainerStandIn(self._trainer, lambda value: deep_copy(value, memo))
        memo[id(self._trainer)] = stand_in
        twin = deep_copy(self._module, memo)
        _copy_bound_callables(twin, memo)
        stand_in.take(twin, memo)
        if not self._checked:  # the others are made alike
            self._check_apart(twin)
            self._checked = True
        try:
            with torch.no_grad():
                for parameter, value in weights:
                    if id(parameter) not in memo:
                        raise NotIsolated("a parameter that is trained is not held by the module")
                    memo[id(parameter)].copy_(value)
            _seed(seed, [*_global_generators(), *self._generators_of(twin)])
            yield twin
        finally:
            _free(twin)
            memo.clear()
            vars(stand_in).clear()

    def _generators_of(self, twin: torch.nn.Module) -> list[Any]:
        """Those that a copy holds. A deep copy's memo need not: before numpy 2 a Generator's bits are made anew."""
        return [x for x in reach([twin]).own if isinstance(x, GENERATORS)] if self._draws else []

    def _check_apart(self, twin: torch.nn.Module) -> None:
        """Nothing that a copy reaches is the module's own."""
        own, found = self._before.reach.ids | {id(self._trainer)}, reach([twin])
        shared = next((x for x in (*found.own, *found.around) if id(x) in own), None)
        if shared is not None:
            raise NotIsolated(
                "the module is also reached by another way than itself, as a closure or a global: its "
                f"{type(shared).__name__} can't be replaced by a copy"
            )


def _copy_bound_callables(twin: torch.nn.Module, memo: dict[int, Any]) -> None:
    """Of a bound method `copy.deepcopy` copies the object alone: LightningCLI binds a partial with the optimizer."""
    for module in twin.modules():
        for name, method in vars(module).items():
            if isinstance(method, types.MethodType):
                vars(module)[name] = types.MethodType(deep_copy(method.__func__, memo), method.__self__)


def _free(twin: torch.nn.Module) -> None:
    """Gives the memory back at once, where the copy refers to itself too."""
    tensors = [*twin.parameters(), *twin.buffers()]
    for module in list(twin.modules()):
        vars(module).clear()
    for tensor in tensors:
        tensor.data = tensor.data.new_empty(0)


class _Detached(TorchFunctionMode):
    """Lets copies be made of tensors that are part of a graph: outputs that a module keeps, pruned weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = copy.deepcopy(tensor.detach(), memo)
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def deep_copy(value: Any, memo: dict[int, Any] | None = None) -> Any:
    """A copy, also of what is part of a graph, of which nothing is shared but code."""
    with torch.no_grad(), _Detached():
        return copy.deepcopy(value, memo)


def _seed(seed: int, generators: Iterable[Any]) -> None:
    """Dropout draws the same masks at θ_0 and later: the difference is then the weights' alone."""
    for generator in generators:
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)
        elif isinstance(generator, np.random.BitGenerator):
            generator.state = type(generator)(seed).state
        elif not isinstance(generator, np.random.Generator):  # Python's, numpy's of old
            generator.seed(seed)


def _global_generators() -> list[Any]:
    """Python's, numpy's and torch's, of the devices that are in use: one that is not is not initialised for it."""
    found = [random.seed.__self__, np.random.mtrand._rand, torch.default_generator]  # type: ignore[attr-defined]
    found += [*torch.cuda.default_generators, *torch.xpu.default_generators]
    return [*found, torch.mps._get_default_mps_generator()] if torch.backends.mps.is_available() else found


def _eager() -> AbstractContextManager[Any]:
    """Compiled parts run as they are written: each copy would be compiled anew, and count to torch's limit of these."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    if not hasattr(torch.compiler, "set_stance"):
        return _as_if_traced()
    eager: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return eager


@contextmanager
def _as_if_traced() -> Iterator[None]:
    """Before torch 2.6 nothing public does it; but within a trace of torch.fx compiled parts run as they are written.

    Besides these only torch.export asks for that flag, and torch 2.5's `nested_tensor_from_jagged`, which then raises.
    """
    tracing: Any = sys.modules["torch.fx._symbolic_trace"]
    before = tracing._is_fx_tracing_flag
    with torch._dynamo.config.patch(error_on_nested_fx_trace=False):
        tracing._is_fx_tracing_flag = True
        try:
            yield
        finally:
            tracing._is_fx_tracing_flag = before
