"""What the layers of a model are called, and how many parameters each has."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_speedlimit.checks.guard import look
from lightning_speedlimit.record.layers import Layers, told

MOST = 100  # names, unless all are asked for: a reading and a table of more take their time


@dataclass(frozen=True)
class LayerNames:
    """names: id of a parameter → its layer; "" of what belongs to the model itself."""

    names: dict[int, str]
    parameters: list[Tensor]

    @classmethod
    def of(cls, module: nn.Module, *, every: bool) -> LayerNames:
        """The modules that hold parameters; of more than 100, unless every one is asked for, the blocks they are in.

        A block is the path of a module cut at the depth at which there are no more than 100.
        """
        named = look(lambda: list(module.named_parameters()), [])
        paths = [name.split(".")[:-1] for name, _ in named]
        depth = max(map(len, paths), default=0)
        while not every and depth > 1 and len({tuple(path[:depth]) for path in paths}) > MOST:
            depth -= 1
        names = {id(p): ".".join(path[:depth]) for (_, p), path in zip(named, paths, strict=True)}
        return cls(names, [p for _, p in named])

    @functools.cached_property
    def logged(self) -> dict[str, str]:
        """Layer → what it is logged under: "model" for what belongs to the model itself, if no layer is called that."""
        layers, own = {"", *self.names.values()}, "model"
        while own in layers:
            own += "_itself"
        return {layer: layer or own for layer in layers}

    def __call__(self, parameter: Tensor) -> str:
        return self.names.get(id(parameter), "")

    def measured(self, layers: Layers) -> Layers:
        """What a meter tells of its layers, for a record: with the number of trainable parameters of each."""
        numbers: Counter[str] = Counter()
        for p in self.parameters:
            numbers[self(p)] += look(p.numel, 0) if p.requires_grad else 0
        found = {name: {"parameters": float(numbers[name])} | dict(values) for name, values in layers.items()}
        return told({name: found[name] for name in dict.fromkeys([*self.names.values(), *found]) if name in found})


def layer_key(layer: str, name: str) -> str:
    """What a value of a layer is logged under."""
    return f"layers/{layer}/{name}"
