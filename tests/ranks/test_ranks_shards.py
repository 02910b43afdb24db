"""Two processes that hold shards of the parameters measure what one process measures on the same global batches."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks_cases import CASES, READ_AT, SOME, WIDE, Case, Net, alone, loss_of
from ranks_shards import RESUMED, SHAPES, WAYS, cases_of, layers, work_of_a_rank
from two_processes import in_two_processes

from lightning_speedlimit.trajectory import ranks as process_ranks

ERRORS = 1e-6  # standard errors are central differences over a thousandth of one
SAME = 1e-9  # float64; gradients are added in another order, and extrapolated losses lose some digits

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
    pytest.mark.slow,  # test_ranks_lightning has a short case of FSDP2 and of tensor parallel
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    in_two_processes(work_of_a_rank, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def of_one_process(way: str, case: Case) -> dict[str, Any]:
    return alone(case, width=12 if way == "tensor parallel" else 11)


@pytest.mark.mode("FSDP2 (fully_shard), plain loop", "measured", "TrajectoryMeter(optimizer)")
@pytest.mark.mode("FSDP2 with replicas (HSDP), plain loop", "measured", "TrajectoryMeter(optimizer)")
@pytest.mark.mode("tensor parallel, plain loop", "caveat", "no sketch where a weight is cut by columns")
@pytest.mark.mode(
    "FSDP (FullyShardedDataParallel), plain loop",
    "caveat",
    "TrajectoryMeter(optimizer, process_group=model.process_group); no sketch",
)
@pytest.mark.parametrize(("way", "title"), [(way, title) for way in WAYS for title in cases_of(way)])
def test_every_number_is_that_of_one_process(ranks: list[dict[str, Any]], way: str, title: str) -> None:
    one = of_one_process(way, CASES[title])
    for found in (rank[f"{way}: {title}"] for rank in ranks):
        assert len(found["readings"]) == len(READ_AT)
        for got, wanted in zip(found["readings"], one["readings"], strict=True):
            assert got.keys() == wanted.keys()
            for name, value in wanted.items():
                within = ERRORS if name.endswith("_se") else SAME
                assert got[name] == pytest.approx(value, rel=within, abs=1e-12, nan_ok=True), name
        assert found["reasons"] == one["reasons"]
        assert found["collectives"] == [1] * len(READ_AT)
    mine, other = (rank[f"{way}: {title}"]["readings"] for rank in ranks)
    for a, b in zip(mine, other, strict=True):
        assert a == pytest.approx(b, rel=0, abs=0, nan_ok=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_drawn_coordinates_of_shards(ranks: list[dict[str, Any]], shape: tuple[int, ...]) -> None:
    """Each process draws from its own part of the budget; the sums are within their errors of those of all."""
    exact = alone(CASES["AdamW, clipped"], width=WIDE)["readings"]
    apart: dict[str, list[float]] = {}
    for mine, other in zip(*(rank["drawn"][shape] for rank in ranks), strict=True):
        measured, there = mine["numbers"]
        assert other["numbers"] == mine["numbers"]
        assert there == sum(p.numel() for p in Net(WIDE).parameters())
        own = [sum(int(p.sum()) for p in found["drawn"]) for found in (mine, other)]
        assert measured == pytest.approx(sum(own) / (2 if shape == (2, 1) else 1), abs=1)
        assert measured == pytest.approx(SOME, rel=0.1)
        for got, again in zip(mine["readings"], other["readings"], strict=True):
            assert got == pytest.approx(again, rel=0, abs=0, nan_ok=True)
            assert got["kinematic_efficiency"] <= 1.0
        got, wanted = mine["readings"][-1], exact[-1]
        for name in ("displacement", "path_length", "action", "work_ito", "work_action", "grad_norm", "step_norm"):
            assert 0 < got[f"{name}_se"] < 0.1 * wanted[name]
            apart.setdefault(name, []).append((got[name] - wanted[name]) / got[f"{name}_se"])
    for name, found in apart.items():
        root = math.sqrt(sum(z * z for z in found) / len(found))
        assert 0.3 < root < 1.7, (name, root)  # of 16 draws: four standard errors of a root of 1 are 0.7
    squares = [float(found["sketches"][-1].square().sum()) for found in ranks[0]["drawn"][shape]]
    # A square is off by 2.2 % √2, as all sketches are, and each draw's by twice the error of the displacement, 2 %.
    assert sum(squares) / len(squares) == pytest.approx(exact[-1]["displacement"] ** 2, rel=4 * (0.03 + 0.04 / 16**0.5))


@pytest.mark.parametrize("way", WAYS)
def test_nothing_else_is_sent(ranks: list[dict[str, Any]], way: str) -> None:
    for found in ranks:
        measured, unmeasured = found["sent"][way]
        assert measured - unmeasured == len(READ_AT)


@pytest.mark.parametrize("way", ["FSDP2", "FSDP2, replicas", "FSDP2, replicas of shards"])
@pytest.mark.parametrize("title", ["SGD", "AdamW, clipped"])
def test_sketches_of_shards_add_up(ranks: list[dict[str, Any]], way: str, title: str) -> None:
    one = of_one_process(way, CASES[title])["sketches"]
    for found in ranks:
        for got, wanted in zip(found[f"{way}: {title}"]["sketches"], one, strict=True):
            assert float(wanted.norm()) > 0
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)  # the sketch is float32


@pytest.mark.parametrize("way", ["tensor parallel", "FSDP, flat parameters", "FSDP, original parameters"])
def test_there_is_no_sketch_of_scattered_shards(ranks: list[dict[str, Any]], way: str) -> None:
    for found in ranks:
        assert found[f"{way}: SGD"]["sketches"] == [None] * len(READ_AT)


def test_layers_of_shards(ranks: list[dict[str, Any]]) -> None:
    """The length of a layer's own path is no sum over the processes: it is NaN, and so is what is made of it."""
    model = Net()
    one = layers(model, lambda both: sum(loss_of(model, part) for part in both) / 2)
    assert one.keys() == {"matrices", "vectors"}
    for found in ranks:
        for layer, values in one.items():
            for name, value in values.items():
                got = found["layers"][layer][name]
                if name in ("path_length", "straightness", "steadiness"):
                    assert math.isnan(got)
                else:
                    assert got == pytest.approx(value, rel=SAME), name


def test_the_norm_that_is_silently_local(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        local, whole, ours = found["norms"]
        assert abs(local / whole - 1) > 0.01  # what reading `g.norm()` of a shard gives
        assert ours == pytest.approx(whole, rel=SAME)
    assert ranks[0]["norms"][0] != pytest.approx(ranks[1]["norms"][0], rel=0.01)


def test_a_measurement_that_fails_on_one_process(ranks: list[dict[str, Any]]) -> None:
    """Nobody waits, and nobody takes half of the sums for the whole."""
    for found, why in zip(ranks, ("another process could not measure", "no memory left"), strict=True):
        readings, reasons = found["one fails"]["readings"], found["one fails"]["reasons"]
        assert all(math.isfinite(values["path_length"]) for values in readings[:2])
        assert all(math.isnan(value) for values in readings[2:] for value in values.values())
        assert all(why in reason for after in reasons[2:] for reason in after.values())


def test_clipping_each_shard_by_its_own_norm_is_seen(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        values, reasons = found["clipped apart"]["readings"][-1], found["clipped apart"]["reasons"][-1]
        assert reasons["efficiency"].startswith("with the effective mobility of clipping by value")
        assert values["efficiency"] == pytest.approx(values["kinematic_efficiency"], rel=SAME)  # m = K A / work_ito
        assert math.isfinite(values["path_length"])


@pytest.mark.parametrize("title", RESUMED)
def test_resumed_between_readings(ranks: list[dict[str, Any]], title: str) -> None:
    """Each process with its own state."""
    one = alone(CASES[title])["readings"][-1]
    for found in ranks:
        for name, value in one.items():
            within = ERRORS if name.endswith("_se") else SAME
            assert found["resumed"][title][name] == pytest.approx(value, rel=within, abs=1e-12, nan_ok=True), name


@pytest.mark.mode("DTensor gradients that are Partial", "refused", "a gradient is laid out as …")
def test_summands_of_a_gradient_are_refused(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        value, reasons = found["summands"]
        assert math.isnan(value)
        assert "a gradient is laid out as (Partial(sum),) and its parameter as (Replicate(),)" in reasons["path_length"]


def test_too_many_steps_between_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_ranks, "MOST", 70)
    rows = process_ranks.Rows()
    for k in range(71):
        rows.append(torch.full((4,), float(k), dtype=torch.float64))
        assert rows.full == (k == 70)
    assert rows.rows is not None
    assert rows.rows[:, 0].tolist() == list(range(70))


def test_too_many_steps_leave_no_path_length(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        first, *later = found["read too seldom"]
        assert math.isfinite(first[0]["path_length"])
        for values, reasons in later:  # for good, and after resuming
            assert reasons["path_length"].startswith("more than 5 steps were taken between two readings of shards")
            assert math.isnan(values["path_length"])
            assert math.isnan(values["straightness"])
            assert math.isfinite(values["kinematic_efficiency"])


def test_flat_parameters_need_a_group(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["without group"].startswith("process_group got None with parameters that FullySharded")
