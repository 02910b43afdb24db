"""What is no optimizer that can be hooked is refused by name, with the optimizer within it that can be.

The classes have the structure of those of other packages, which are not installed here.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_cases import EXACT, KINEMATIC, Copies
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from lightning_speedlimit import TrajectoryMeter


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.linspace(0.5, 2.0, 6, dtype=torch.float64).reshape(2, 3))]


class Lookahead(Optimizer):
    """torch_optimizer's: keeps the tables of the optimizer within it, and calls no `super().__init__`."""

    def __init__(self, optimizer: Any, k: int = 2) -> None:
        self.optimizer, self.k, self.count = optimizer, k, 0
        self.param_groups, self.defaults = optimizer.param_groups, optimizer.defaults
        self.state = defaultdict(dict)
        self.fast_state = optimizer.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = self.optimizer.step(closure)
        self.count += 1
        for p in self.param_groups[0]["params"]:
            slow = self.state[p].setdefault("slow", p.detach().clone())
            if self.count % self.k == 0:
                p.copy_(slow.lerp_(p, 0.5))
        return loss


class ScheduleFreeWrapper:
    """schedulefree's: around an optimizer, `base`; groups are a property."""

    def __init__(self, base: Any) -> None:
        self.base, self.train_mode = base, False

    @property
    def param_groups(self) -> Any:
        return self.base.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.base.step(closure)


class OptimWrapper:
    """fastai's around torch's, `opt`: lists of parameters instead of groups, and what is missing asked of `opt`."""

    def __init__(self, opt: Any) -> None:
        self.opt = opt
        self.param_lists = [group["params"] for group in opt.param_groups]

    def __getattr__(self, name: str) -> Any:
        if name in ("zero_grad", "step"):
            return getattr(self.__dict__["opt"], name)
        raise AttributeError(name)


class FastaiOptimizer:
    """fastai's own: steppers on lists of parameters."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.param_lists, self.hypers = [parameters], [{"lr": 0.1}]

    def step(self, closure: Any = None) -> None:
        for p in self.param_lists[0]:
            p.data.add_(p.grad.data, alpha=-0.1)  # type: ignore[union-attr]


class KerasOptimizer:
    """keras': variables and `apply_gradients`, no `step`."""

    def __init__(self, variables: list[nn.Parameter]) -> None:
        self.variables, self.learning_rate = variables, 0.1

    def apply_gradients(self, grads_and_vars: Any) -> None:
        for gradient, variable in grads_and_vars:
            variable.data.sub_(self.learning_rate * gradient)


class MultipleOptimizer:
    """A list of optimizers that step together."""

    def __init__(self, *optimizers: Any) -> None:
        self.optimizers = list(optimizers)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


class Secretive:
    """No attribute can be listed or asked for."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("not in this state")


class OnTheObject:
    """Has all that hooks need, and a `step` that its class knows nothing of."""

    def __init__(self) -> None:
        self._optimizer_step_post_hooks: dict[int, Any] = {}
        self.step = self.register_step_pre_hook = self.register_step_post_hook = lambda *args: None


class Silent(Optimizer):
    """The tables are there, and the hooks are refused."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def register_step_post_hook(self, hook: Any) -> Any:
        raise RuntimeError("no hooks here")

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise NotImplementedError


OWN = "derive it from torch.optim.Optimizer"
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "Lookahead": (
        lambda: Lookahead(SGD(weights(), lr=0.1)),
        r"^optimizers got Lookahead, .* never fire .*: hook the SGD within it, TrajectoryMeter\(optimizer\.optimizer\)",
    ),
    "ScheduleFreeWrapper": (
        lambda: ScheduleFreeWrapper(Adam(weights())),
        r"^optimizers got ScheduleFreeWrapper, .*no step hooks.*Adam within it, TrajectoryMeter\(optimizer\.base\)",
    ),
    "fastai's around torch's": (
        lambda: OptimWrapper(SGD(weights(), lr=0.1)),
        r"^optimizers got OptimWrapper, .*hook the SGD within it, TrajectoryMeter\(optimizer\.opt\)",
    ),
    "a wrapper in a wrapper": (
        lambda: ScheduleFreeWrapper(Lookahead(SGD(weights(), lr=0.1))),
        r"hook the SGD within it, TrajectoryMeter\(optimizer\.base\.optimizer\)",
    ),
    "several in one": (
        lambda: MultipleOptimizer(Adam(weights()), SGD(weights(), lr=0.1)),
        r"hook the Adam within it, TrajectoryMeter\(optimizer\.optimizers\[0\]\)",
    ),
    "fastai's own": (lambda: FastaiOptimizer(weights()), f"^optimizers got FastaiOptimizer, .*no step hooks.*{OWN}"),
    "keras'": (
        lambda: KerasOptimizer(weights()),
        r"^optimizers got KerasOptimizer, .*no step hooks.*give the optimizer whose step\(\) the training calls",
    ),
    "hooks that are refused": (
        lambda: Silent(weights()),
        r"^optimizers got Silent, which takes no step hooks \(RuntimeError: no hooks here\)",
    ),
    "a step on the object": (OnTheObject, "^optimizers got OnTheObject, which has step hooks that never fire"),
    "what tells nothing": (Secretive, "^optimizers got Secretive, which has no step hooks, wanted a torch.optim.Optim"),
    "None": (lambda: None, "^optimizers got NoneType, which has no step hooks"),
    "a number": (lambda: 5, "^optimizers got int, which has no step hooks"),
    "a name": (lambda: "adam", "^optimizers got str, which has no step hooks"),
    "a tensor": (lambda: torch.ones(3), "^optimizers got Tensor, which has no step hooks"),
    "parameters": (lambda: iter([*weights(), *weights()]), "^optimizers got Parameter, none of which has step hooks"),
    "wrappers": (
        lambda: [ScheduleFreeWrapper(Adam(weights())), Lookahead(SGD(weights(), lr=0.1))],
        r"none of which .*TrajectoryMeter\(optimizer\.base\).*TrajectoryMeter\(optimizer\.optimizer\)",
    ),
}


@pytest.mark.filterwarnings("ignore:.*what it does is not measured")
@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_hooked_is_refused_with_the_cure(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        TrajectoryMeter(make())


@pytest.mark.parametrize("around", [Lookahead, ScheduleFreeWrapper])
def test_the_cure_works(around: Callable[[Any], Any]) -> None:
    """The optimizer within, while the wrapper steps: its steps are measured, the wrapper's moves are outside."""
    parameters = weights()
    inner = SGD(parameters, lr=0.1)
    wrapper = around(inner)
    meter, copies = TrajectoryMeter(inner), Copies(parameters)
    real = inner.step
    inner.step = lambda closure=None: copies.step(lambda: real(closure))  # type: ignore[method-assign, assignment]
    for k in range(6):
        parameters[0].grad = None
        ((parameters[0] - k).square() * 0.5).sum().backward()
        wrapper.step()
    values, wanted = meter.compute(), copies.values()
    for name in KINEMATIC:
        assert values[name] == pytest.approx(wanted[name], rel=EXACT), name
    assert values["moved_outside"] == pytest.approx(wanted["moved_outside"], rel=EXACT)
    assert (values["moved_outside"] > 0.0) == (around is Lookahead)


def test_what_has_stepped() -> None:
    parameters: list[Tensor] = [*weights(), *weights()]
    first, second = SGD(parameters[:1], lr=0.1), SGD(parameters[1:], lr=0.1)
    meter = TrajectoryMeter([first, second])
    parameters[0].grad = torch.ones_like(parameters[0])
    first.step()
    assert meter.recorder.has_stepped(first)
    assert not meter.recorder.has_stepped(second)
    with pytest.raises(ValueError, match="Adam is not one of the optimizers"):
        meter.recorder.has_stepped(Adam(weights()))


@pytest.mark.parametrize(
    "parameter", [torch.zeros(1), torch.zeros(1, requires_grad=True)], ids=["frozen", "no gradient"]
)
def test_an_optimizer_that_has_nothing_to_do_says_so(parameter: Tensor) -> None:
    """Not that a number was not finite."""
    optimizer = Adam([parameter])
    meter = TrajectoryMeter(optimizer)
    for _ in range(3):
        optimizer.step()
    values = meter.compute()
    assert values["path_length"] == 0.0
    assert not any("finite" in why for why in meter.reasons.values())
    if not parameter.requires_grad:
        assert meter.reasons["grad_norm"] == "no parameter of the optimizers has required gradients: none is measured"
