"""Trainings whose step touches more than its loss: each leaves a trace that a second evaluation would change."""

import copy
import ctypes
import itertools
import os
import random
import tempfile
import threading
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, update_wrapper
from pathlib import Path
from types import MethodType
from typing import Any, ClassVar, NamedTuple

import callback_cases
import numpy as np
import pytorch_lightning as pl
import torch
import torchmetrics
from torch import Tensor, nn

SEEN: list[int] = []
GRAPHS: list[int] = []
DRAWS = torch.Generator()
CALLS = 0
LINES: Iterator[int] = iter(())
REAL: list[nn.Module] = []


class Case(pl.LightningModule):
    """4 → 5 → 1; `trace` is what the training leaves besides weights and losses."""

    lazy = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.LazyLinear(5) if self.lazy else nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
        self.losses: list[float] = []
        self.prepare()

    def prepare(self) -> None:
        """The attributes of the case."""

    def touch(self, batch: Any, batch_idx: int) -> Any:
        """What the step does besides; what it returns is added to the loss."""
        return 0.0

    def trace(self) -> Any:
        return None

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch) + self.touch(batch, batch_idx)
        self.losses.append(float(loss.detach()))
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05, momentum=0.5)


class Teacher(Case):
    """BYOL: a teacher that follows the student, moved in the step."""

    def prepare(self) -> None:
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def touch(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                slow.lerp_(fast, 0.1)
        return nn.functional.mse_loss(self.net(batch[0]), self.teacher(batch[0]))


class HiddenTeacher(Teacher):
    """The teacher is in a list, which hides it from `parameters`."""

    def prepare(self) -> None:
        self.kept = [copy.deepcopy(self.net).requires_grad_(False)]

    @property
    def teacher(self) -> nn.Module:  # type: ignore[override]
        return self.kept[0]

    def trace(self) -> Any:
        return [p.tolist() for p in self.teacher.parameters()]


class Queue(Case):
    """MoCo: a queue of keys, a plain tensor that is written in place, and where it is written."""

    def prepare(self) -> None:
        self.queue, self.place = torch.zeros(4, 5), 0
        self.shown = {"last": torch.zeros(())}

    def touch(self, batch: Any, batch_idx: int) -> Any:
        out = self.net[0](batch[0]).mean(0)
        self.queue[self.place] = out.detach()
        self.place = (self.place + 1) % 4
        self.shown["last"].copy_(out.detach().sum())
        return 0.1 * (out @ self.queue.mean(0))

    def trace(self) -> Any:
        return self.queue.tolist(), self.place, float(self.shown["last"])


class Clamped(Case):
    def touch(self, batch: Any, batch_idx: int) -> Any:
        for parameter in self.net.parameters():
            parameter.data.clamp_(-0.3, 0.3)
        return self.loss(batch)


class Nested(Case):
    def prepare(self) -> None:
        self.kept: dict[str, Any] = {"a": {"b": [0, ([],)]}, "counts": Counter(), "last": deque(maxlen=2)}
        self.ordered: OrderedDict[int, int] = OrderedDict()
        self.raw = bytearray(2)

    def touch(self, batch: Any, batch_idx: int) -> Any:
        inner = self.kept["a"]["b"]
        inner[0] += 1
        inner[1][0].append(batch_idx)
        self.kept["counts"][batch_idx % 3] += 1
        self.kept["last"].append(float(batch[1].sum()))
        self.ordered[inner[0]] = batch_idx
        self.raw[batch_idx % 2] += 1
        return 0.01 * inner[0]

    def trace(self) -> Any:
        return self.kept, self.ordered, self.raw


class Arrays(Case):
    def prepare(self) -> None:
        self.sums, self.objects = np.zeros(5, np.float32), np.array([[], 0], dtype=object)

    def touch(self, batch: Any, batch_idx: int) -> Any:
        self.sums += self.net[0](batch[0]).detach().mean(0).numpy()
        self.objects[0].append(batch_idx)
        self.objects[1] += 1
        return float(self.sums.sum()) * 0.01

    def trace(self) -> Any:
        return self.sums.tolist(), self.objects.tolist()


class Generators(Case):
    """Generators of the user's own, of all three kinds."""

    def prepare(self) -> None:
        self.torch, self.numpy, self.python = torch.Generator(), np.random.default_rng(1), random.Random(2)
        self.legacy = np.random.RandomState(4)

    def touch(self, batch: Any, batch_idx: int) -> Any:
        drawn = torch.rand((), generator=self.torch) + self.numpy.random() + self.python.random()
        return self.net[2].weight.sum() * 0.1 * (drawn + self.legacy.rand())


class Globals(Case):
    """The global generators, of torch, numpy and Python."""

    def touch(self, batch: Any, batch_idx: int) -> Any:
        return self.net[2].weight.sum() * 0.1 * (torch.rand(()) + np.random.rand() + random.random())  # noqa: NPY002


class Iterators(Case):
    def prepare(self) -> None:
        self.scales, self.pair = iter([0.1 * i for i in range(99)]), zip(range(99), range(99), strict=True)

    def touch(self, batch: Any, batch_idx: int) -> Any:
        return self.net[2].weight.sum() * next(self.scales) * sum(next(self.pair))

    def trace(self) -> Any:
        return next(self.scales), next(self.pair)


class Slots:
    __slots__ = ("steps",)

    def __init__(self) -> None:
        self.steps = 0


class Counts(Case):
    def prepare(self) -> None:
        self.counter, self.number, self.register_buffers = Slots(), itertools.count(), 0
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def touch(self, batch: Any, batch_idx: int) -> Any:
        self.counter.steps += 1
        self.steps += 1
        return 0.1 / self.counter.steps + 0.01 * next(self.number) + 0.1 * self.steps

    def trace(self) -> Any:
        return self.counter.steps, next(self.number), int(self.steps)


class InPlace(Case):
    """The batch is edited in place."""

    def loss(self, batch: Any) -> Tensor:
        batch[0].mul_(0.5).add_(1)
        return super().loss(batch)


class Stops(Case):
    """Asks to stop after so many steps of its own."""

    def prepare(self) -> None:
        self.calls = 0

    def touch(self, batch: Any, batch_idx: int) -> Any:
        self.calls += 1
        if self.calls == 8:
            self.trainer.should_stop = True
        return 0.0

    def trace(self) -> Any:
        return self.calls, self.trainer.global_step, self.trainer.should_stop


class Rates(Case):
    """Sets the learning rate in the step, and steps a scheduler there."""

    def configure_optimizers(self) -> Any:
        optimizer: Any = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.9**k)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}

    def touch(self, batch: Any, batch_idx: int) -> Any:
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            group["momentum"] *= 0.97
        for group in self.trainer.optimizers[0].param_groups:
            group["weight_decay"] += 0.01
        self.lr_schedulers().step()  # type: ignore[union-attr, call-arg]
        strategy: Any = self.trainer.strategy
        strategy.lr_scheduler_configs[0].scheduler.step()
        strategy.model.net[2].bias.data.clamp_(-0.1, 0.1)
        self.trainer.lightning_module.net[0].bias.data.clamp_(-0.3, 0.3)
        return 0.0

    def trace(self) -> Any:
        return [{k: v for k, v in g.items() if k != "params"} for g in self.trainer.optimizers[0].param_groups]


class Asks(Case):
    """Looks at the trainer, as steps do, logs and prints."""

    def touch(self, batch: Any, batch_idx: int) -> Any:
        assert isinstance(self.trainer, pl.Trainer)
        self.log_dict({"share": self.global_step / self.trainer.max_steps}, prog_bar=True)
        self.print("step")
        self.trainer.callback_metrics["mine"] = torch.tensor(float(len(self.losses)))
        self.trainer.logged_by_step = self.trainer.__dict__.get("logged_by_step", 0) + 1  # type: ignore[attr-defined]
        assert self.all_gather(torch.ones(2)).shape == (2,)
        return self.current_epoch * 0.1 + self.trainer.num_training_batches

    def trace(self) -> Any:
        return vars(self.trainer)["logged_by_step"]


class Outputs(Case):
    """Keeps its last output, which has a graph, and metrics of it; pruned, with spectral and weight norms."""

    def prepare(self) -> None:
        nn.utils.parametrizations.spectral_norm(self.net[0])
        self.other = nn.utils.parametrizations.weight_norm(nn.Linear(4, 1))
        self.pruned = nn.utils.prune.random_unstructured(nn.Linear(4, 1), "weight", 0.5)
        self.error, self.last = torchmetrics.MeanSquaredError(), torch.zeros(())

    def touch(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        out = self.net(x) + self.other(x) + self.pruned(x)
        self.error.update(out, y)
        change = (out.mean() - self.last.detach()) ** 2
        self.last = out.mean()
        return change

    def trace(self) -> Any:
        return float(self.error.compute()), float(self.last)


class Part(pl.LightningModule):
    """Counts by itself, and asks the trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.calls = nn.Linear(1, 1), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1 + self.global_step
        assert self.logger is None or self.logger.experiment is not None
        return self.last(x)


class Child(Case):
    def prepare(self) -> None:
        self.part = Part()

    def touch(self, batch: Any, batch_idx: int) -> Any:
        return self.part(self.net(batch[0])).square().mean() + self.part.calls

    def trace(self) -> Any:
        return self.part.calls


class Takes(Case):
    """Takes its batches itself, from the iterator that Lightning hands it."""

    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


class Lazy(Case):
    lazy = True


class Hooked(Case):
    """Its own methods as hooks, and a partial."""

    def prepare(self) -> None:
        self.features: dict[str, Tensor] = {}
        self.net[0].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, given: Any, out: Tensor) -> None:
        self.features["last"] = out

    def touch(self, batch: Any, batch_idx: int) -> Any:
        return self.features["last"].square().mean()


class Bound(Case):
    """LightningCLI binds a partial to the module, which holds the optimizer."""

    def prepare(self) -> None:
        optimizer = super().configure_optimizers()
        bound: Any = partial(Bound.handed, optimizer=optimizer)
        self.configure_optimizers = MethodType(update_wrapper(bound, Bound.handed), self)  # type: ignore[method-assign]

    def handed(self, optimizer: Any) -> Any:
        return optimizer

    def touch(self, batch: Any, batch_idx: int) -> Any:
        (group,) = self.configure_optimizers().param_groups
        group["momentum"] *= 0.97
        return sum(p.square().sum() for p in group["params"]) * group["momentum"]

    def trace(self) -> Any:
        return self.trainer.optimizers[0].param_groups[0]["momentum"]


def counted(graph: Any, given: Any) -> Any:
    GRAPHS.append(1)
    return graph.forward


class Compiled(Case):
    """How often: each copy would be compiled anew, and at torch's limit of these the training goes on uncompiled."""

    def prepare(self) -> None:
        GRAPHS.clear()
        torch._dynamo.reset()  # type: ignore[attr-defined]
        self.quick = torch.compile(self.net[2], backend=counted)

    def touch(self, batch: Any, batch_idx: int) -> Any:
        return self.quick(self.net[0](batch[0])).square().mean()

    def trace(self) -> Any:
        assert GRAPHS
        return len(GRAPHS)


class CompiledInAList(Compiled):
    """Where no module knows of it."""

    def prepare(self) -> None:
        super().prepare()
        self.parts = [self.quick]
        del self.quick

    def touch(self, batch: Any, batch_idx: int) -> Any:
        return self.parts[0](self.net[0](batch[0])).square().mean()


class CompiledFunction(Compiled):
    """Each copy of the module that it is given would be compiled anew."""

    def prepare(self) -> None:
        super().prepare()
        self.function = torch.compile(squared, backend=counted)

    def touch(self, batch: Any, batch_idx: int) -> Any:
        return self.function(self.net, batch[0]).mean()


def squared(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).square()


class Loops(Case):
    """Counts in the trainer's loops."""

    def touch(self, batch: Any, batch_idx: int) -> Any:
        loop: Any = self.trainer.fit_loop
        loop.mine = vars(loop).get("mine", 0) + 1
        return 0.01 * loop.mine

    def trace(self) -> Any:
        return self.trainer.fit_loop.mine  # type: ignore[attr-defined]


class Whole(Case):
    """A step that compiles to one graph."""

    def prepare(self) -> None:
        GRAPHS.clear()
        torch._dynamo.reset()  # type: ignore[attr-defined]
        self.register_buffer("mean", torch.zeros(()))

    def trace(self) -> Any:
        assert GRAPHS
        return len(GRAPHS)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out = self.net(batch[0])
        self.mean.lerp_(out.detach().mean(), 0.1)
        return (out - batch[1]).square().mean() + 0.1 * self.mean


# -- what a copy does not isolate: the probe is given up, nothing else happens -----------------------------------------


class Closure(Case):
    """A hook that is a closure over the module: on a copy it would write into the module itself."""

    def prepare(self) -> None:
        self.features: dict[str, Tensor] = {}
        self.net[0].register_forward_hook(lambda module, given, out: self.features.update(last=out.detach()))

    def touch(self, batch: Any, batch_idx: int) -> Any:
        return self.features["last"].square().mean()


class Through(Case):
    """A closure that only reads: at θ_0 a copy would be evaluated with the weights of now."""

    def prepare(self) -> None:
        self.head = lambda x: self.net(x)

    def touch(self, batch: Any, batch_idx: int) -> Any:
        return self.head(batch[0]).square().mean()


class Weakly(Case):
    def prepare(self) -> None:
        self.top = weakref.ref(self)

    def touch(self, batch: Any, batch_idx: int) -> Any:
        self.top().losses.append(-1.0)  # type: ignore[union-attr]
        return 0.0


class BoundBuiltin(Case):
    def prepare(self) -> None:
        self.seen: list[int] = []
        self.see = self.seen.append

    def touch(self, batch: Any, batch_idx: int) -> Any:
        self.see(batch_idx)
        return 0.0

    def trace(self) -> Any:
        return self.seen


class GlobalList(Case):
    def prepare(self) -> None:
        SEEN.clear()

    def touch(self, batch: Any, batch_idx: int) -> Any:
        SEEN.append(batch_idx)
        return 0.01 * len(SEEN)

    def trace(self) -> Any:
        return list(SEEN)


class GlobalGenerator(Case):
    def prepare(self) -> None:
        DRAWS.manual_seed(7)

    def touch(self, batch: Any, batch_idx: int) -> Any:
        return torch.rand((), generator=DRAWS)

    def trace(self) -> Any:
        return DRAWS.get_state().tolist()


class GlobalCount(Case):
    def prepare(self) -> None:
        global CALLS
        CALLS = 0

    def touch(self, batch: Any, batch_idx: int) -> Any:
        _count()
        return 0.01 * CALLS

    def trace(self) -> Any:
        return CALLS


def _count() -> None:
    global CALLS
    CALLS += 1


class ModuleCount(Case):
    """In a module that is imported, under a name that is new there."""

    def prepare(self) -> None:
        vars(callback_cases).pop("CALLS", None)

    def touch(self, batch: Any, batch_idx: int) -> Any:
        if self.losses:  # the probe comes first
            callback_cases.CALLS = getattr(callback_cases, "CALLS", 0) + 1  # type: ignore[attr-defined]
        return 0.01 * getattr(callback_cases, "CALLS", 0)

    def trace(self) -> Any:
        return callback_cases.CALLS  # type: ignore[attr-defined]


class GlobalIterator(Case):
    def prepare(self) -> None:
        global LINES
        LINES = iter(range(99))

    def touch(self, batch: Any, batch_idx: int) -> Any:
        return 0.01 * next(LINES)

    def trace(self) -> Any:
        return next(LINES)


class GlobalModule(Case):
    """Clamps the weights of the module by another name of it."""

    def prepare(self) -> None:
        REAL[:] = [self]

    def touch(self, batch: Any, batch_idx: int) -> Any:
        for parameter in REAL[0].parameters():
            parameter.data.clamp_(-0.3, 0.3)
        return 0.0


class ClassCount(Case):
    calls: ClassVar[int] = 0
    seen: ClassVar[list[int]] = []

    def prepare(self) -> None:
        type(self).calls = 0
        self.seen.clear()

    def touch(self, batch: Any, batch_idx: int) -> Any:
        type(self).calls += 1
        self.seen.append(batch_idx)
        return 0.01 * self.calls

    def trace(self) -> Any:
        return self.calls, list(self.seen)


class Default(Case):
    def prepare(self) -> None:
        self.step.__func__.__defaults__[0].clear()  # type: ignore[attr-defined]

    def step(self, seen: list[int] = []) -> float:  # noqa: B006
        seen.append(len(seen))
        return 0.01 * len(seen)

    def touch(self, batch: Any, batch_idx: int) -> Any:
        return self.step()

    def trace(self) -> Any:
        return list(self.step.__func__.__defaults__[0])  # type: ignore[attr-defined]


class Single:
    """One for all: a deep copy is the object itself."""

    def __init__(self) -> None:
        self.steps = 0

    def __deepcopy__(self, memo: Any) -> "Single":
        return self


class Singleton(Case):
    def prepare(self) -> None:
        self.single = Single()

    def touch(self, batch: Any, batch_idx: int) -> Any:
        self.single.steps += 1
        return 0.01 * self.single.steps

    def trace(self) -> Any:
        return self.single.steps


class Alone(nn.Linear):
    """Is not copied, and its weights are seen from elsewhere."""

    def __deepcopy__(self, memo: Any) -> "Alone":
        return self


class Shared(Case):
    def prepare(self) -> None:
        self.frozen = Alone(4, 1).requires_grad_(False)
        self.flat = self.frozen.weight.view(-1)

    def touch(self, batch: Any, batch_idx: int) -> Any:
        return (self.net(batch[0]) - self.frozen(batch[0])).square().mean()

    def trace(self) -> Any:
        return self.flat.data_ptr() == self.frozen.weight.data_ptr()


class Locked(Case):
    def prepare(self) -> None:
        self.lock, self.calls = threading.Lock(), 0

    def touch(self, batch: Any, batch_idx: int) -> Any:
        with self.lock:
            self.calls += 1
        return 0.01 * self.calls


class Yields(Case):
    def prepare(self) -> None:
        self.scales = (0.1 * i for i in range(99))

    def touch(self, batch: Any, batch_idx: int) -> Any:
        return next(self.scales)

    def trace(self) -> Any:
        return next(self.scales)


class Handle:
    """Something that is open until it is no more."""

    def __init__(self) -> None:
        file, self.name = tempfile.mkstemp()
        os.close(file)

    def __del__(self) -> None:
        Path(self.name).unlink(missing_ok=True)


class Closes(Case):
    def prepare(self) -> None:
        self.handle = Handle()

    def trace(self) -> Any:
        return Path(self.handle.name).exists()


class Address(Case):
    """Finds itself by a way that no reference shows."""

    def prepare(self) -> None:
        self.mark, self.address = 123, id(self)

    def touch(self, batch: Any, batch_idx: int) -> Any:
        other = ctypes.cast(self.address, ctypes.py_object).value
        other.net[2].bias.data.add_(0.01)
        other.mark += 1
        vars(other.trainer)["mark"] = vars(other.trainer).get("mark", 0) + 1
        return 0.0

    def trace(self) -> Any:
        return self.mark, vars(self.trainer)["mark"]


COMPILED: list[type[Case]] = [Compiled, CompiledInAList, CompiledFunction]
ISOLATED: list[type[Case]] = [
    Teacher, HiddenTeacher, Queue, Clamped, Nested, Arrays, Generators, Globals, Iterators, Counts, InPlace, Stops,
    Rates, Asks, Child, Outputs, Loops, Lazy, Hooked, Bound, *COMPILED,
]  # fmt: skip
GIVEN_UP: list[type[Case]] = [
    Closure, Through, Weakly, BoundBuiltin, GlobalList, GlobalGenerator, GlobalCount, ModuleCount, GlobalIterator,
    GlobalModule, ClassCount, Default, Singleton, Shared, Locked, Yields, Address, Closes, Takes,
]  # fmt: skip


# -- batches that are no tuples ---------------------------------------------------------------------------------------


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass
class Data:
    x: Tensor
    y: Tensor
    used: int = 0


class Plain:
    """Of no kind that any library knows."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.used = x, y, 0


class Unpicklable(Plain):
    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("this batch can't be pickled")

    def __deepcopy__(self, memo: Any) -> "Unpicklable":
        return type(self)(self.x.clone(), self.y.clone())


class Uncopyable(Plain):
    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("this batch can't be copied")


def _numpy(x: Tensor, y: Tensor) -> Any:
    return {"x": x.numpy(), "y": y.numpy(), "names": np.array(["a", "bc"]), "n": np.int64(3), "how": ["s", None, 1.5]}


KINDS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda x, y: (x, y),
    "numpy": _numpy,
    "namedtuple": Pair,
    "dataclass": Data,
    "object": Plain,
    "unpicklable": Unpicklable,
    "uncopyable": Uncopyable,
}


class Reads(Case):
    """Takes a batch of any kind, and edits what can be edited."""

    def loss(self, batch: Any) -> Tensor:
        if isinstance(batch, dict):
            x, y = torch.tensor(batch["x"]), torch.tensor(batch["y"])
            batch["x"] += batch["n"] * 0.01
            batch["how"].append("used")
        elif isinstance(batch, tuple):
            x, y = batch
        else:
            x, y = batch.x, batch.y
            batch.used += 1
            batch.x = batch.x * 0.9
        return super().loss((x, y))


def data(kind: str = "tuple") -> list[Any]:
    return [KINDS[kind](x, y) for x, y in callback_cases.batches(5, dtype=torch.float32)]


class Stream:
    """The batches as they are: torch's DataLoader makes others of some types."""

    def __init__(self, given: Callable[[], list[Any]]) -> None:
        self.given = given

    def __len__(self) -> int:
        return len(self.given())

    def __iter__(self) -> Iterator[Any]:
        return iter(self.given())
