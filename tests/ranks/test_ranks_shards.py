"""Two processes that hold shards of the parameters measure what one process measures on the same global batches."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks_cases import CASES, READ_AT, Case, alone
from ranks_shards import RESUMED, WAYS, cases_of, work_of_a_rank
from torch.multiprocessing.spawn import spawn

from lightning_speedlimit.trajectory import ranks as process_ranks

SAME = 1e-9  # float64; gradients are added in another order, and extrapolated losses lose some digits

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
    pytest.mark.slow,  # test_ranks_lightning has a short case of FSDP2 and of tensor parallel
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    spawn(work_of_a_rank, args=(str(folder),), nprocs=2)  # type: ignore[no-untyped-call]
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
                assert got[name] == pytest.approx(value, rel=SAME, abs=1e-12, nan_ok=True), name
        assert found["reasons"] == one["reasons"]
        assert found["collectives"] == [1] * len(READ_AT)
    mine, other = (rank[f"{way}: {title}"]["readings"] for rank in ranks)
    for a, b in zip(mine, other, strict=True):
        assert a == pytest.approx(b, rel=0, abs=0, nan_ok=True)


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
        assert math.isnan(values["work_ito"])
        assert reasons["work_ito"].startswith("gradients were changed by more than one factor")
        assert math.isfinite(values["path_length"])


@pytest.mark.parametrize("title", RESUMED)
def test_resumed_between_readings(ranks: list[dict[str, Any]], title: str) -> None:
    """Each process with its own state."""
    one = alone(CASES[title])["readings"][-1]
    for found in ranks:
        for name, value in one.items():
            assert found["resumed"][title][name] == pytest.approx(value, rel=SAME, abs=1e-12, nan_ok=True), name


@pytest.mark.mode("DTensor gradients that are Partial", "refused", "a gradient is laid out as …")
def test_summands_of_a_gradient_are_refused(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        value, reasons = found["summands"]
        assert math.isnan(value)
        assert "a gradient is laid out as (Partial(sum),) and its parameter as (Replicate(),)" in reasons["path_length"]


def test_too_many_steps_between_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_ranks, "MOST", 70)
    pending = process_ranks.Pending()
    for k in range(71):
        step = torch.tensor([float(k * k), 0.0, 0.0, 0.0], dtype=torch.float64)
        pending.append(step, torch.ones(2, dtype=torch.float64))
        if k == 69:
            assert math.isfinite(pending.path_length)
            assert pending.rows is not None
            assert len(pending.rows) == 70
    assert math.isnan(pending.path_length)
    assert pending.why == "more than 70 steps were taken between two readings of shards: read more often"


def test_flat_parameters_need_a_group(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["without group"].startswith("process_group got None with parameters that FullySharded")
