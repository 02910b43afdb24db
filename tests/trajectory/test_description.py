"""Settings of optimizers in few words: whatever stands in a param group, it is told in 200 kB, and can be read."""

import collections
import enum
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_speedlimit import RunRecord, TrajectoryMeter
from lightning_speedlimit.trajectory.description import (
    MAX_OPTIMIZERS,
    MAX_SETTING,
    MAX_SETTINGS,
    MAX_TEXT,
    describe_optimizers,
    plain,
)


class Odd:
    """Says what it is told to."""

    def __init__(self, text: Any) -> None:
        self.text = text

    def __repr__(self) -> str:
        if isinstance(self.text, Exception):
            raise self.text
        return str(self.text)


class Unsized(Odd):
    def __len__(self) -> int:
        raise RuntimeError("no length")


class Color(enum.Enum):
    RED = 1


def a_function() -> None:
    pass


def itself() -> list[Any]:
    found: list[Any] = [1.0]
    found.append(found)
    return found


SETTINGS: dict[str, tuple[Any, Any]] = {
    "a number": (0.1, 0.1),
    "none": (None, None),
    "yes": (True, True),
    "a seed": (2**63 + 5, 2**63 + 5),
    "betas": ((0.9, 0.999), [0.9, 0.999]),
    "a text": ("cosine", "cosine"),
    "a learning rate that is a tensor": (torch.tensor(0.125), 0.125),
    "a tensor that is a parameter": (nn.Parameter(torch.tensor([0.5, 0.25])), [0.5, 0.25]),
    "an integer tensor": (torch.tensor([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
    "bfloat16": (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
    "numpy": (np.float32(0.5), 0.5),
    "long double": (np.longdouble("0.5"), "0.5"),
    "an array": (np.array([1.0, 2.0]), [1.0, 2.0]),
    "a dict": ({"a": torch.tensor(1.0), 3: (1, 2)}, {"a": 1.0, "3": [1, 2]}),
    "a set": ({3, 1, 2}, [1, 2, 3]),
    "a type": (torch.float32, "torch.float32"),
    "a path": (Path("a") / "b", "a/b"),
    "an enum": (Color.RED, "Color.RED"),
    "complex": (torch.tensor([1 + 2j]), ["(1+2j)"]),
    "a function": (a_function, "<function a_function>"),  # its address differs in each run
    "a large tensor": (torch.zeros(2000, 2000), "float32 tensor (2000, 2000)"),
    "a large array": (np.zeros((500, 3)), "float64 array (500, 3)"),
    "an array of objects": (np.array([Odd("x" * 10**6)], dtype=object), "object array (1,)"),
    "a large list": ([0.0] * 400_000, "list of 400,000"),
    "a large dict": ({str(n): n for n in range(100)}, "dict of 100"),
    "a large set": (set(range(1000)), "set of 1,000"),
    "a large deque": (collections.deque(range(10**5)), "deque of 100,000"),
    "lists of lists": ([[["x" * 150] * 16] * 16] * 16, "list of 16"),
    "a meta tensor": (torch.zeros(3, device="meta"), "float32 tensor (3,)"),
    "a sparse tensor": (torch.eye(3).to_sparse(), "float32 tensor (3, 3)"),
    "a list that holds itself": (itself(), [1.0, [1.0, [1.0, "list of 2"]]]),
    "a large integer": (10**5000, "integer of 16610 bits"),
    "a large text": ("x" * 10**6, "x" * (MAX_TEXT - 1) + "…"),
    "a large repr": (Odd("y" * 10**6), "y" * (MAX_TEXT - 1) + "…"),
    "a repr that raises": (Odd(ValueError("no")), "Odd that can't be told"),
    "a repr that is no text": (Odd(RecursionError()), "Odd that can't be told"),
    "no length": (Unsized("fine"), "Unsized that can't be told"),
    "half a character": ("a\ud800b", "a?b"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_each_kind_of_setting(name: str) -> None:
    value, told = SETTINGS[name]
    found = plain(value)
    assert found == told
    assert type(found) is type(told)
    assert len(json.dumps(found)) <= MAX_SETTING


def sgd(**settings: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.ones(3))], **settings}], lr=0.1)


def test_what_is_written_of_any_setting_can_be_read(tmp_path: Path) -> None:
    """All of them in one group: the meter's description becomes a record, which is small."""
    optimizer = sgd(**{f"{name} of mine": value for name, (value, _) in SETTINGS.items()})
    optimizer.param_groups[0][7] = "a key that is no text"
    optimizer.param_groups[0][Odd(ValueError("no"))] = "a key that can't be told"
    record = RunRecord(TrajectoryMeter(optimizer).description())
    record.append(1, {"loss": 1.0})
    record.save(tmp_path)
    assert RunRecord.load(tmp_path).run == record.run
    assert (tmp_path / "record.json").stat().st_size < 30_000
    [group] = record.run["optimizers"][0]["groups"]
    assert group["lr"] == 0.1
    assert group["a learning rate that is a tensor of mine"] == 0.125
    assert group["7"] == "a key that is no text"
    assert group["Odd that can't be told"] == "a key that can't be told"
    assert "params" not in group


def test_a_tensor_of_four_million_elements(tmp_path: Path) -> None:
    """It made a record of 109 MB that could not be loaded, and is never read now."""

    read: list[str] = []

    class Watched(torch.Tensor):
        def tolist(self) -> Any:
            read.append("all")
            return super().tolist()

    optimizer = sgd(mask=torch.zeros(4_000_000).as_subclass(Watched))
    record = RunRecord(TrajectoryMeter(optimizer).description())
    record.append(1, {"loss": 1.0})
    record.save(tmp_path)
    assert (tmp_path / "record.json").stat().st_size < 3000
    assert RunRecord.load(tmp_path).run["optimizers"][0]["groups"][0]["mask"] == "float32 tensor (4000000,)"
    assert not read


def test_very_many_settings() -> None:
    [group] = describe_optimizers([sgd(**{f"own {n}": n for n in range(10_000)})])[0]["groups"]
    assert len(group) == MAX_SETTINGS + 1
    assert group["settings_left_out"] == 10_000 + len(sgd().param_groups[0]) - 1 - MAX_SETTINGS
    assert group["own 0"] == 0


def test_a_group_for_each_parameter() -> None:
    """400 of AdamW are told in full; of many more so many as there is room for, over all optimizers."""

    def adam(groups: int) -> torch.optim.Optimizer:
        return torch.optim.AdamW([{"params": [nn.Parameter(torch.ones(1))], "lr": 0.1 * n} for n in range(groups)])

    [few] = describe_optimizers([adam(400)])
    assert [group["lr"] for group in few["groups"]] == [0.1 * n for n in range(400)]
    assert "groups_left_out" not in few
    found = describe_optimizers([adam(2000), adam(3)])
    assert len(json.dumps(found)) < 1.1 * MAX_OPTIMIZERS
    assert len(found[0]["groups"]) + found[0]["groups_left_out"] == 2000
    assert [len(found[1]["groups"]), found[1]["groups_left_out"]] == [0, 3]
    assert found[1]["class"] == "AdamW"


def test_a_class_with_a_long_name() -> None:
    long = type("N" * 10_000, (torch.optim.SGD,), {})
    [found] = describe_optimizers([long([nn.Parameter(torch.ones(1))], lr=0.1)])
    assert len(found["class"]) == MAX_TEXT
    assert sys.getsizeof(json.dumps(found)) < 2000


def test_replicas_with_a_function_among_their_settings_are_told_alike() -> None:
    """Its address would tell one run from another that is set alike."""
    first, second = [sgd(scale=lambda step: step) for _ in range(2)]  # both there: at two addresses
    assert describe_optimizers([first]) == describe_optimizers([second])
