"""Parameters that have left their optimizer: what is saved after that goes on as if uninterrupted."""

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_speedlimit.trajectory import TrajectoryMeter

STEPS, LEAVES, SAVED = 14, 4, 8
RECIPES: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGD": (SGD, {"lr": 0.05}),
    "momentum, decay": (SGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}),
    "Adam": (Adam, {"lr": 0.01}),
    "AdamW": (AdamW, {"lr": 0.01, "weight_decay": 0.1}),
}
recipes = pytest.mark.parametrize("recipe", RECIPES)
# Which of the four parameters leaves, and whether all share a group. Two of them have one size.
WAYS = {"first": (0, True), "middle": (1, True), "last": (3, True), "its whole group": (1, False)}
ways = pytest.mark.parametrize("way", WAYS)


def through_a_file(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Run:
    """Four parameters in a bowl; one leaves the optimizer after four steps, and stays where it is."""

    def __init__(self, recipe: str, way: str) -> None:
        self.kind, self.options = RECIPES[recipe]
        self.leaving, self.together = WAYS[way]
        generator = torch.Generator().manual_seed(4)
        sizes = [(5, 3), (7,), (5, 3), (11,)]
        self.weights = [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in sizes]
        self.optimizer = self.make(self.weights)
        self.meter = TrajectoryMeter(self.optimizer, loss_window=2)

    def make(self, weights: list[Any]) -> Optimizer:
        return self.kind(weights if self.together else [{"params": [w]} for w in weights], **self.options)

    def leave(self) -> None:
        groups = self.optimizer.param_groups
        if self.together:
            del groups[0]["params"][self.leaving]
        else:
            del groups[self.leaving]
        self.weights[self.leaving].requires_grad_(False)

    def steps(self, first: int, last: int) -> None:
        for k in range(first, last):
            if k == LEAVES:
                self.leave()
            generator = torch.Generator().manual_seed(k)
            loss = sum(((w - 1 - 0.1 * torch.randn(w.shape, generator=generator)) ** 2).sum() for w in self.weights)
            assert isinstance(loss, Tensor)
            self.optimizer.zero_grad()
            loss.backward()
            self.meter.record_loss(loss)
            self.optimizer.step()

    def rebuild(self) -> None:
        """Another process, whose optimizer is made without the parameter that has left."""
        state = through_a_file(self.meter.state_dict())
        kept = [w for i, w in enumerate(self.weights) if i != self.leaving]
        saved = [self.optimizer.state[w] for w in kept]
        self.meter.close()
        self.optimizer = self.make(kept)
        for weight, entry in zip(kept, saved, strict=True):
            self.optimizer.state[weight] = entry
        self.meter = TrajectoryMeter(self.optimizer, loss_window=2)
        self.meter.load_state_dict(state)


@pytest.mark.mode("a parameter that leaves its optimizer", "measured")
@ways
@recipes
@pytest.mark.parametrize("saved", [[LEAVES + 1], [SAVED], [SAVED, SAVED + 2]], ids=str)
def test_what_was_saved_after_it_left_goes_on(recipe: str, way: str, saved: list[int]) -> None:
    whole, part = Run(recipe, way), Run(recipe, way)
    whole.steps(0, STEPS)
    for first, last in zip([0, *saved], [*saved, STEPS], strict=True):
        part.steps(first, last)
        if last < STEPS:
            part.rebuild()
    assert all(torch.equal(a, b) for a, b in zip(whole.weights, part.weights, strict=True))
    found, expected = part.meter.compute(), whole.meter.compute()
    assert math.isfinite(expected["displacement"])
    assert found == pytest.approx(expected, rel=1e-12, nan_ok=True)
    torch.testing.assert_close(part.meter.sketch(), whole.meter.sketch(), rtol=1e-6, atol=1e-9)


def test_one_that_came_into_its_place_is_not_taken_for_it() -> None:
    """Another parameter of the same size, at the same place of the group: it was not there before it came."""
    run = Run("SGD", "first")
    run.steps(0, LEAVES + 1)
    late = nn.Parameter(torch.zeros(5, 3, dtype=torch.float64))
    run.optimizer.param_groups[0]["params"].insert(0, late)
    run.weights.append(late)
    run.steps(LEAVES + 1, SAVED)
    expected = run.meter.compute()["displacement"]
    state = through_a_file(run.meter.state_dict())
    restored = TrajectoryMeter(run.optimizer, loss_window=2)
    restored.load_state_dict(state)
    assert restored.compute()["displacement"] == pytest.approx(expected, rel=1e-12)
    assert torch.equal(run.meter.accumulated_mobility(late), restored.accumulated_mobility(late))
    assert torch.equal(run.meter.sketch(), restored.sketch())
