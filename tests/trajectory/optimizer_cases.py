"""Plain copies of a run, which the meter is held to, and small optimizers of the kinds that are found elsewhere."""

import math
from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from trajectory_reference import divided, flat

from lightning_speedlimit.trajectory import TrajectoryMeter

# float64: sums of some hundred products of numbers of order 1 are known to 1e-14; 1e-9 leaves room for differences.
EXACT = 1e-9
KINEMATIC = ("displacement", "path_length", "action", "straightness", "steadiness", "kinematic_efficiency", "step_norm")
WORKS = ("work_ito", "work_anti_ito", "work_stratonovich", "signal_fraction")


class Copies:
    """θ before and after each step and the gradient that is the force there, as float64 vectors.

    A parameter without a gradient has the gradient 0. `shrink`: lr·w of decoupled decay, which is no work.
    """

    def __init__(self, parameters: Iterable[Tensor], shrink: float = 0.0) -> None:
        self.parameters, self.shrink = list(parameters), shrink
        self.before: list[Tensor] = []
        self.after: list[Tensor] = []
        self.raw: list[Tensor] = []

    def weights(self) -> Tensor:
        return torch.cat([flat(p) for p in self.parameters])

    def gradient(self) -> Tensor:
        return torch.cat([flat(torch.zeros_like(p) if p.grad is None else p.grad) for p in self.parameters])

    def step(self, step: Callable[[], Any], raw: Callable[[], Tensor] | None = None) -> Any:
        """`raw`: asked after the step for the gradient that counts; None: the one that is there before it."""
        given = self.gradient()
        self.before.append(self.weights())
        result = step()
        self.after.append(self.weights())
        self.raw.append(given if raw is None else raw())
        return result

    @property
    def updates(self) -> list[Tensor]:
        return [after - before for before, after in zip(self.before, self.after, strict=True)]

    def moves(self) -> list[float]:
        """Sizes of what happened between a step's end and the next one's beginning."""
        return [float((b - a).norm()) for a, b in zip(self.after, self.before[1:], strict=False)]

    def values(self) -> dict[str, float]:
        sizes = [float(u.norm()) for u in self.updates]
        path, action = math.fsum(sizes), math.fsum(s * s for s in sizes)
        squared = float(sum(self.updates).square().sum())
        driven = [u + self.shrink * b for u, b in zip(self.updates, self.before, strict=True)]
        near = [-float(g @ u) for g, u in zip(self.raw, driven, strict=True)]
        far = [-float(g @ u) for g, u in zip(self.raw[1:], driven, strict=False)]
        return {
            "displacement": math.sqrt(squared),
            "net_displacement": float((self.after[-1] - self.before[0]).norm()),
            "path_length": path,
            "action": action,
            "straightness": divided(squared, path**2),
            "steadiness": divided(path**2, len(sizes) * action),
            "kinematic_efficiency": divided(squared, len(sizes) * action),
            "step_norm": sizes[-1],
            "work_ito": math.fsum(near),
            "work_anti_ito": math.fsum(far),
            "work_stratonovich": 0.5 * math.fsum([*near[:-1], *far]),
            "signal_fraction": divided(math.fsum(far), math.fsum(near[:-1])),
            "moved_outside": math.hypot(*self.moves()),
        }


def assert_right(
    meter: TrajectoryMeter, copies: Copies, names: Collection[str] = (*KINEMATIC, *WORKS), rel: float = EXACT
) -> dict[str, float]:
    values, expected = meter.compute(), copies.values()
    for name in names:
        assert values[name] == pytest.approx(expected[name], rel=rel), name
    return values


def assert_effective(values: dict[str, float], copies: Copies) -> None:
    """One scalar μ = Σ‖u‖²/work_ito: Q = work_action is work_ito, and its efficiency the kinematic one."""
    assert values["work_action"] == pytest.approx(copies.values()["work_ito"], rel=EXACT)
    assert values["efficiency_action"] == pytest.approx(copies.values()["kinematic_efficiency"], rel=EXACT)


class Walk:
    """½ Σ h (θ − 2)² + n_k·θ under a meter and copied beside it; h from 0.3 to 2, n_k the batch's noise."""

    def __init__(
        self,
        make: Callable[[list[nn.Parameter]], Optimizer | list[Optimizer]],
        *,
        sizes: Iterable[tuple[int, ...]] = ((4, 3), (5,)),
        dtype: torch.dtype = torch.float64,
        shrink: float = 0.0,
    ) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.parameters = [nn.Parameter(self.draw(*size).to(dtype)) for size in sizes]
        made = make(self.parameters)
        self.optimizers = made if isinstance(made, list) else [made]
        self.meter, self.copies = TrajectoryMeter(self.optimizers), Copies(self.parameters, shrink)
        self.noise = [torch.zeros_like(p) for p in self.parameters]

    def draw(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.generator, dtype=torch.float64)

    @torch.enable_grad()
    def backward(self, another: bool = True) -> Tensor:
        """The gradient in place of any other; `another`: of a new batch."""
        if another:
            self.noise = [0.3 * self.draw(*p.shape).to(p.dtype) for p in self.parameters]
        loss = torch.zeros((), dtype=torch.float64)
        for p, n in zip(self.parameters, self.noise, strict=True):
            h, p.grad = torch.linspace(0.3, 2.0, p.numel(), dtype=p.dtype).reshape(p.shape), None
            loss = loss + (0.5 * h * (p - 2.0).square() + n * p).sum()
        loss.backward()
        return loss

    def step(self, copies: Copies | None = None) -> None:
        """By the gradients that are there."""
        (copies or self.copies).step(lambda: [optimizer.step() for optimizer in self.optimizers])

    def by_closure(self, own: bool = False, prepare: Callable[[], Any] = lambda: None) -> Any:
        """With a closure, whose first gradient counts; `own`: with a gradient before it, and that one counts."""
        found: list[Tensor] = []
        if own:
            self.backward()

        def closure() -> Tensor:
            loss = self.backward(another=not own and not found)
            found.append(self.copies.gradient())
            prepare()
            return loss

        raw = None if own else lambda: found[0]
        return self.copies.step(lambda: self.optimizers[0].step(closure), raw)


class Sharpness(Optimizer):
    """SAM: climbs by ρ g/‖g‖, evaluates its closure there, comes back and descends by what it found.

    `data`: it moves through .data. `first`: it evaluates its closure before it climbs, too.
    """

    def __init__(self, parameters: Any, data: bool = False, first: bool = False) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.data, self.first = data, first

    @torch.no_grad()
    def step(self, closure: Any) -> Any:  # type: ignore[override]
        if self.first:
            closure()
        parameters = self.param_groups[0]["params"]
        size = torch.cat([p.grad.flatten() for p in parameters]).norm()
        old = [p.detach().clone() for p in parameters]
        for p in parameters:
            (p.data if self.data else p).add_(0.5 * p.grad / size)
        loss = closure()
        for p, o in zip(parameters, old, strict=True):
            if self.data:
                p.data = o
            else:
                p.copy_(o)
            p.sub_(0.1 * p.grad)
        return loss


class ScheduleFree(Optimizer):
    """θ is the average x of the iterates z; the closure is evaluated at y between the two."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.2})
        self.count = 0

    @torch.no_grad()
    def step(self, closure: Any) -> Any:  # type: ignore[override]
        parameters = self.param_groups[0]["params"]
        average = [p.detach().clone() for p in parameters]
        for p in parameters:
            p.data.lerp_(self.state[p].setdefault("z", p.detach().clone()), 0.4)
        loss = closure()
        self.count += 1
        for p, x in zip(parameters, average, strict=True):
            self.state[p]["z"].sub_(0.2 * p.grad)
            p.data.copy_(x.lerp(self.state[p]["z"], 1.0 / self.count))
        return loss


class Writer(Optimizer):
    """Gradient descent by what `write` makes of the gradient, within the step and from step `start` on."""

    def __init__(self, parameters: Any, write: Callable[[Tensor], Any], start: int = 0) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.write, self.start, self.count = write, start, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            closure()
        for p in self.param_groups[0]["params"]:
            if self.count >= self.start:
                self.write(p)
            p.sub_(0.1 * p.grad)
        self.count += 1


class Inertial(Optimizer):
    """Goes on with the last gradient where there is none."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                self.state[p]["last"] = p.grad.clone()
            p.sub_(0.05 * self.state[p]["last"])


class Bare(Optimizer):
    """Has groups and a state of its own, and none of the tables that hooks are kept in."""

    def __init__(self, parameters: Any) -> None:
        self.defaults, self.state = {"lr": 0.1}, {}
        self.param_groups = [{"params": list(parameters), "lr": 0.1}]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.sub_(0.1 * p.grad)


class Deaf(Bare):
    """Has the tables, so that hooks can be registered, and a step that never calls them."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters)
        self._optimizer_step_pre_hooks: dict[int, Any] = {}
        self._optimizer_step_post_hooks: dict[int, Any] = {}


class Around:
    """A wrapper around the optimizer of a walk, whose own steps alone are copied."""

    def __init__(self, walk: Walk) -> None:
        self.walk, self.parameters, self.count = walk, walk.parameters, 0
        self.kept = [p.detach().clone() for p in walk.parameters]


class Lookahead(Around):
    """Every third step the weights go half the way back to where they were after the last such step."""

    @torch.no_grad()
    def step(self) -> None:
        self.walk.step()
        self.count += 1
        for p, slow in zip(self.parameters, self.kept, strict=True):
            if self.count % 3 == 0:
                p.data.copy_(slow.lerp_(p, 0.5))


class Climber(Around):
    """SAM around a base: the gradient is that of a point that the weights have left, bitwise, when the base steps."""

    def step(self) -> None:
        old = [p.detach().clone() for p in self.parameters]
        for p in self.parameters:
            p.data.add_(0.3 * p.grad)
        self.walk.backward(another=False)
        for p, o in zip(self.parameters, old, strict=True):
            p.data.copy_(o)
        self.walk.step()


class Averager(Around):
    """The base moves z; before and after its step the weights are elsewhere, at the average of the z."""

    @torch.no_grad()
    def step(self) -> None:
        average = [p.detach().clone() for p in self.parameters]
        for p, z in zip(self.parameters, self.kept, strict=True):
            p.data.copy_(z)
        self.walk.step()
        self.count += 1
        for p, z, x in zip(self.parameters, self.kept, average, strict=True):
            p.data.copy_(x.lerp(z.copy_(p), 1.0 / self.count))
