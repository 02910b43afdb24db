"""torch's default device and dtype, set before the measurement or midway, change none of its numbers."""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_speedlimit
from lightning_speedlimit import TrajectoryMeter

STEPS = 12
DEFAULTS: dict[str, Callable[[], None]] = {
    "the meta device": lambda: torch.set_default_device("meta"),
    "float64": lambda: torch.set_default_dtype(torch.float64),
    "bfloat16": lambda: torch.set_default_dtype(torch.bfloat16),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "all coordinates": {},
    "drawn coordinates": {"coordinates": 256},
    "drawn steps": {"measure_every_n_steps": 3, "coordinates": 256},
    "the clock lr": {"clock": "lr"},
}
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "Signs": lambda parameters: Signs(parameters, {"lr": 0.002}),
}


class Signs(torch.optim.Optimizer):
    """Without a formula: its mobility is the effective one."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad.sign(), alpha=-group["lr"])


class Run:
    """A training whose every tensor says where it is, so that the defaults are none of its business."""

    def __init__(self, optimizer: str, settings: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 1))
        self.model.register_parameter("unused", nn.Parameter(torch.ones(40, 20)))  # drawn without a gradient
        self.x, self.y = torch.randn(STEPS, 8, 24), torch.randn(STEPS, 8, 1)
        self.optimizer = OPTIMIZERS[optimizer](list(self.model.parameters()))
        self.settings = settings | {"layer_of": self.layer, "loss_window": 4}
        self.meter = self.metered()

    def layer(self, parameter: Tensor) -> str:
        return next(name.split(".")[0] for name, p in self.model.named_parameters() if p is parameter)

    def metered(self) -> TrajectoryMeter:
        return TrajectoryMeter(self.optimizer, **self.settings)

    def step(self, k: int) -> None:
        loss = nn.functional.mse_loss(self.model(self.x[k]), self.y[k])
        self.optimizer.zero_grad()
        loss.backward()
        self.meter.record_loss(float(loss.detach()) if k % 2 else loss)
        self.meter.observe_gradients()
        if k == 7:
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.optimizer.step()
        if k == 5:  # weights are moved elsewhere
            self.model[0].weight.data.mul_(0.99)

    def go_on(self) -> None:
        """Another meter, from the state of this one."""
        state = self.meter.state_dict()
        self.meter.close()
        self.meter = self.metered()
        self.meter.load_state_dict(state)

    def told(self) -> list[Any]:
        """All that a meter says, tensors as bytes."""
        meter, found = self.meter, list[Any]()
        found += [meter.compute(), meter.reasons, meter.compute_layers(), _bytes(meter.sketch())]
        for parameter in self.model.parameters():
            try:
                found.append(_bytes(meter.accumulated_mobility(parameter)))
            except ValueError as error:
                found.append(str(error))
        return [*found, meter.description(), _plain(meter.state_dict())]


def _bytes(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    assert tensor.device.type == "cpu"
    flat = tensor.detach().contiguous().view(-1)
    return str(tensor.dtype), tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


def _plain(state: Any) -> Any:
    """With tensors as bytes and NaN as text, which == takes for equal."""
    if isinstance(state, Tensor):
        return _bytes(state.reshape(-1)) if state.numel() else tuple(state.shape)
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [_plain(value) for value in state]
    return "NaN" if isinstance(state, float) and math.isnan(state) else state


def trained(optimizer: str, settings: str, change: Callable[[], None], at: int | None, resumed_at: int) -> Any:
    run = Run(optimizer, SETTINGS[settings])
    if at == -1:
        change()
        run.meter = (run.meter.close(), run.metered())[1]
    for k in range(STEPS):
        if k == at:
            change()
        if k == resumed_at:
            run.go_on()
        run.step(k)
    if at == STEPS:
        change()
    return _plain(run.told())


@functools.cache
def plainly(optimizer: str, settings: str) -> Any:
    return trained(optimizer, settings, lambda: None, None, 8)


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        ("SGD", "all coordinates"),
        ("momentum", "drawn coordinates"),
        ("AdamW", "drawn steps"),
        ("Adam", "the clock lr"),
        ("Signs", "drawn coordinates"),
    ],
)
@pytest.mark.usefixtures("defaults")
def test_a_default_of_torch_is_none_of_the_meters_business(optimizer: str, settings: str, default: str) -> None:
    wanted = plainly(optimizer, settings)
    for at in (-1, 4, STEPS):
        if default == "the meta device" and "Adam" in optimizer and at == -1:
            continue  # torch's own Adam makes its step counts on the default device
        found = trained(optimizer, settings, DEFAULTS[default], at, 8)
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
        assert found == wanted, at


# --- the rule


MAKERS = {"zeros", "ones", "empty", "full", "tensor", "as_tensor", "asarray", "scalar_tensor"}
MAKERS |= {"arange", "linspace", "logspace", "eye", "rand", "randn", "randint", "randperm"}
WHOLE = {"arange", "randint", "randperm"}  # numbers of their own dtype
LEFT = {"checks/tensors.py", "demo.py"}  # arguments as the user's defaults make them; a training of its own


def unplaced(source: str) -> list[str]:
    """Tensors that are made where torch's defaults say: "line: maker without device, dtype"."""
    found = []
    for node in ast.walk(ast.parse(source)):
        called = node.func if isinstance(node, ast.Call) else None
        if not isinstance(called, ast.Attribute) or ast.unparse(called.value) != "torch":
            continue
        wanted = {"device", "dtype"} - ({"dtype"} if called.attr in WHOLE else set())
        missing = sorted(wanted - {k.arg for k in node.keywords})  # type: ignore[attr-defined]
        if called.attr in MAKERS and missing:
            found.append(f"{node.lineno}: {called.attr} without {', '.join(missing)}")
    return found


PACKAGE = Path(lightning_speedlimit.__file__).parent
FILES = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}


def test_tensors_say_where_and_what_they_are() -> None:
    found = {name: unplaced(source) for name, source in FILES.items() if name not in LEFT}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_the_rule_can_be_broken() -> None:
    source = "torch.zeros(2, dtype=torch.float32)\ntorch.arange(3)\ntorch.rand(2, device='cpu')\nx.zeros(2)"
    assert unplaced(source) == ["1: zeros without device", "2: arange without device", "3: rand without dtype"]
    assert all(unplaced(FILES[name]) for name in LEFT), "needless exceptions"
