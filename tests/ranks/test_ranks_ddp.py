"""Two processes under DistributedDataParallel measure what one process measures on the same global batches."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks_cases import CASES, READ_AT, SOME, WIDE, Net, alone, sgd
from ranks_ddp import work_of_a_rank
from two_processes import in_two_processes

from lightning_speedlimit.trajectory import TrajectoryMeter

SAME = 1e-9  # float64; gradients are added in another order, and extrapolated losses lose some digits

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    in_two_processes(work_of_a_rank, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def assert_same(got: dict[str, float], wanted: dict[str, float], but: tuple[str, ...] = ()) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        if name not in but:
            assert got[name] == pytest.approx(value, rel=SAME, abs=1e-12, nan_ok=True), name


@pytest.mark.mode(
    "DDP, plain loop", "measured", "TrajectoryMeter(optimizer, process_group=torch.distributed.group.WORLD)"
)
@pytest.mark.parametrize("title", CASES)
def test_every_number_is_that_of_one_process(ranks: list[dict[str, Any]], title: str) -> None:
    one = alone(CASES[title])
    for found in ranks:
        assert len(found[title]["readings"]) == len(READ_AT)
        for got, wanted in zip(found[title]["readings"], one["readings"], strict=True):
            assert_same(got, wanted)
            assert math.isfinite(got["loss_drop"])
        for got, wanted in zip(found[title]["sketches"], one["sketches"], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)  # the sketch is float32
        assert found[title]["reasons"] == one["reasons"]
    # Monitors on both processes see the same number, to the last bit.
    for mine, other in zip(ranks[0][title]["readings"], ranks[1][title]["readings"], strict=True):
        assert mine == pytest.approx(other, rel=0, abs=0, nan_ok=True)


def test_all_processes_draw_the_same_coordinates(ranks: list[dict[str, Any]]) -> None:
    """Those that one process would: the first gradient is the same in all."""
    one = alone(CASES["AdamW, clipped"], width=WIDE, coordinates=SOME)
    first, second = (found["drawn"] for found in ranks)
    for mine, other, alike in zip(first["drawn"], second["drawn"], one["drawn"], strict=True):
        assert torch.equal(mine, other)
        assert torch.equal(mine, alike)
    assert 0 < sum(int(mine.sum()) for mine in first["drawn"]) <= SOME < first["numbers"][1]
    for got, other, wanted in zip(first["readings"], second["readings"], one["readings"], strict=True):
        assert_same(got, wanted)
        assert got["path_length_se"] > 0
        assert got == pytest.approx(other, rel=0, abs=0, nan_ok=True)


def test_without_the_group_losses_are_those_of_one_process_alone(ranks: list[dict[str, Any]]) -> None:
    """The comparison above can fail."""
    one = alone(CASES["SGD"])["readings"][-1]
    for found in ranks:
        got = found["without group"]["readings"][-1]
        assert abs(got["loss"] / one["loss"] - 1) > 0.01
        assert got["path_length"] == pytest.approx(one["path_length"], rel=SAME)
    assert [found["without group"]["collectives"] for found in ranks] == [[0] * len(READ_AT)] * 2


@pytest.mark.parametrize("title", CASES)
def test_each_reading_is_one_collective(ranks: list[dict[str, Any]], title: str) -> None:
    for found in ranks:
        assert found[title]["collectives"] == [1] * len(READ_AT)


def test_nothing_else_is_sent(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["sent, unmeasured"] > 0  # DDP's own are counted too: the counter can see
        assert found["sent, measured"] - found["sent, unmeasured"] == len(READ_AT)


@pytest.mark.mode(
    "DDP, plain loop, unequal numbers of batches under torch's Join",
    "caveat",
    "compute() after the Join; the loss drop is NaN, and each process's other numbers are of its own steps",
)
def test_unequal_numbers_of_batches(ranks: list[dict[str, Any]]) -> None:
    for found, steps in zip(ranks, (6, 4), strict=True):
        values, reasons = found["join"]["values"], found["join"]["reasons"]
        assert found["join"]["steps"] == steps
        assert values["path_length"] > 0
        for name in ("loss_drop", "loss"):
            assert math.isnan(values[name])
            assert reasons[name].startswith("the processes have not taken the same steps")
        assert values["displacement"] == pytest.approx(found["join"]["displacement"], rel=SAME)
    # Join moved the weights of the process that ended before, after its last step.
    assert [found["join"]["moved"] for found in ranks] == [False, True]


def test_a_loss_that_one_process_lacks(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        reasons = found["a loss is missing"]["reasons"]
        assert reasons["loss_drop"].startswith("the processes have not taken the same steps")
        assert math.isfinite(found["a loss is missing"]["values"]["kinematic_efficiency"])


def test_a_measurement_that_fails_on_one_process_stops_no_other(ranks: list[dict[str, Any]]) -> None:
    one = alone(CASES["SGD"])
    for got, wanted in zip(ranks[0]["one fails"]["readings"], one["readings"], strict=True):
        assert_same(got, wanted)
    before, after = ranks[1]["one fails"]["readings"][:2], ranks[1]["one fails"]["readings"][2:]
    assert all(math.isfinite(v["path_length"]) for v in before)
    assert all(math.isnan(x) for v in after for x in v.values())
    assert "no memory left" in ranks[1]["one fails"]["reasons"][-1]["path_length"]
    assert ranks[1]["one fails"]["collectives"] == [1] * len(READ_AT)


def test_a_probe_is_averaged_batch_by_batch(ranks: list[dict[str, Any]]) -> None:
    # (2, 3, 4) and (3, 4, 5) at θ_0; (1, 1.5, 3) and (0, 0.5, 2) now: differences 2, 2.5, 2 of the means.
    difference = torch.tensor([2.0, 2.5, 2.0], dtype=torch.float64)
    for found in ranks:
        assert found["probe"]["loss_drop"] == pytest.approx(float(difference.mean()), rel=1e-12)
        assert found["probe"]["loss_drop_se"] == pytest.approx(float(difference.std()) / 3**0.5, rel=1e-12)


def test_what_is_no_process_group_is_refused() -> None:
    with pytest.raises(TypeError, match=r"process_group got 'world', wanted a torch\.distributed process group"):
        TrajectoryMeter(sgd(Net().parameters()), process_group="world")
