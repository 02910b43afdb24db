"""The trainings of real size, shortened: against plain torch, stopped and gone on with, and their page."""

from __future__ import annotations

import math
import runpy
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from findings_cases import DOCS, SCRIPTS, page, read_rows, scripts
from in_this_process import run_here
from torch.nn.functional import cross_entropy
from torch.utils.data import Subset

from lightning_speedlimit import RunRecord

NAME = "real_size"
PARTS = {"runs", "rows", "windows", "validations", "readings", "cost"}
RUNS = ("transformer", "resnet")
Parts = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def modules() -> Iterator[SimpleNamespace]:
    with scripts("real_size", "real_size_models", "real_size_reading") as found:
        yield found


def rows(parts: Parts, part: str, **key: Any) -> list[dict[str, Any]]:
    return [row for row in parts[part] if key.items() <= row.items()]


# --- the numbers by hand


def train_bytes(network: torch.nn.Module, text: torch.Tensor, steps: int) -> list[torch.Tensor]:
    """AdamW by its formulas, products in bfloat16: θ before each step and after the last."""
    windows = text.unfold(0, 33, 32)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    weights = list(network.parameters())
    first, second = ([torch.zeros_like(p) for p in weights] for _ in range(2))
    places = [torch.cat([p.detach().flatten() for p in weights]).double()]
    for k in range(steps):
        batch = windows[order[8 * k : 8 * k + 8]].long()
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(network(batch[:, :-1]).flatten(0, 1).float(), batch[:, 1:].flatten())
        found = torch.autograd.grad(loss, weights)
        length = math.sqrt(sum(float(g.square().sum()) for g in found))
        rate = 1e-2 * ((k + 1) / 2 if k < 2 else 0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * (k - 2) / 38)))
        with torch.no_grad():
            for p, m, v, g in zip(weights, first, second, found, strict=True):
                g = g * min(1.0, 1 / (length + 1e-6))
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.95).add_(0.05 * g * g)
                p.mul_(1 - rate * (0.1 if p.ndim >= 2 else 0.0))
                p.sub_(rate * (m / (1 - 0.9 ** (k + 1))) / ((v / (1 - 0.95 ** (k + 1))).sqrt() + 1e-8))
        places.append(torch.cat([p.detach().flatten() for p in weights]).double())
    return places


def test_the_transformer_by_hand(output: Path, modules: SimpleNamespace) -> None:
    """straightness = D²/ℓ² and steadiness = ℓ²/(τA) of 6 steps, past the warm-up, against a loop in plain torch."""
    parts = read_rows(output / "real_size.json")
    torch.manual_seed(0)
    network = modules.real_size_models.GPT(modules.real_size_models.SIZES["tiny"])
    text, _ = modules.real_size_models.library(20)
    places = torch.stack(train_bytes(network, text, 6))
    for last in (2, 6):
        (row,) = rows(parts, "rows", run="transformer", step=last)
        steps = places[: last + 1].diff(dim=0).norm(dim=1)
        straight, travelled = float((places[last] - places[0]).norm()), float(steps.sum())
        # Products in bfloat16 make of another order of float32 sums some 1e-5 by the sixth step, and much by the 20th.
        assert row["straightness"] == pytest.approx(straight**2 / travelled**2, rel=3e-4)
        assert row["steadiness"] == pytest.approx(travelled**2 / (last * float(steps.square().sum())), rel=3e-4)


def test_what_another_batch_took_is_read_between_two_looks(modules: SimpleNamespace) -> None:
    passed = modules.real_size_reading.passed
    looks = [{"step": 10, "val_loss": 2.0}, {"step": 20, "val_loss": 1.0}, {"step": 30, "val_loss": 1.5}]
    assert passed(looks, 1.25) == 17.5
    assert passed(looks, 2.5) == 10.0
    assert math.isnan(passed(looks, 0.5))


# --- in pieces


def options(modules: SimpleNamespace, folder: Path, name: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["real_size.py", "--quick", "--run", name, "--output", str(folder)])
        found: list[Any] = []
        patch.setattr(modules.real_size, "run", lambda options, made, folder: found.append(options))
        patch.setattr(modules.real_size.Reading, "collect", lambda self, folder: None)
        modules.real_size.main()
    return found[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["resnet", pytest.param("transformer", marks=pytest.mark.slow)])
def test_a_run_in_pieces_is_the_run(
    modules: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Stopped twice within an epoch and once at its end: the same weights and the same record, bit by bit."""
    if name == "resnet":  # an epoch of ten batches
        cut = modules.real_size_models.images
        monkeypatch.setattr(
            modules.real_size_models, "images", lambda folder: [Subset(part, range(500)) for part in cut(folder)]
        )
    told = options(modules, tmp_path, name)
    plan = replace(modules.real_size.PLANS[name](told), steps=16, log_every=2, validate_every=5)
    assert modules.real_size.train(plan, told, tmp_path / "whole")
    stops, trainers, made = [7, 10, 11], [], modules.real_size.trainer_of

    def keep(*given: Any) -> Any:
        trainers.append(made(*given))
        return trainers[-1]

    def spent(piece: Any) -> float:
        """Instead of the processor's seconds: all that it had, once it has come to the next of the stops."""
        return math.inf if stops and trainers[-1].global_step == stops[0] else 0.0

    monkeypatch.setattr(modules.real_size, "trainer_of", keep)
    monkeypatch.setattr(modules.real_size.Piece, "spent", property(spent))
    folder = tmp_path / "pieces"
    while not modules.real_size.train(plan, told, folder):
        stops.pop(0)
    assert [trainer.global_step for trainer in trainers] == [7, 10, 11, 16]
    states = [torch.load(tmp_path / which / "last.ckpt", weights_only=False) for which in ("whole", "pieces")]
    for key, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][key])
    one, other = (RunRecord.load(tmp_path / which / "at 100 %").columns for which in ("whole", "pieces"))
    assert one.keys() == other.keys()
    for column in one.keys() - {"seconds"}:
        np.testing.assert_array_equal(one[column], other[column], err_msg=column)


# --- sizes and data


def parameters(network: torch.nn.Module) -> int:
    return sum(part.numel() for part in network.parameters())


def test_the_sizes_are_those_that_are_said(modules: SimpleNamespace) -> None:
    models = modules.real_size_models
    with torch.device("meta"):
        assert parameters(models.GPT(models.SIZES["gpt2"])) == pytest.approx(124.4e6, rel=0.01)
        assert parameters(models.GPT(models.SIZES["10M"])) == 10_844_160
        assert parameters(models.ResNet()) == 1_228_970


def test_a_byte_sees_only_those_before_it(modules: SimpleNamespace) -> None:
    models = modules.real_size_models
    network = models.GPT(models.SIZES["tiny"])
    text = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(1))
    changed = text.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 256
    before, after = network(text), network(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:], after[:, 20:])


def test_what_is_kept_from_training_is_whole_files(modules: SimpleNamespace) -> None:
    learnt, held = (bytes(part.numpy()) for part in modules.real_size_models.library(20))
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(file for file in root.rglob("*.py") if "site-packages" not in file.parts)
    chosen = [files[i] for i in torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()[:20]]
    assert held == chosen[0].read_bytes() + chosen[10].read_bytes()
    assert len(learnt) == sum(len(file.read_bytes()) for file in chosen) - len(held)


def test_an_epoch_gives_each_sample_once_and_goes_on_within(modules: SimpleNamespace) -> None:
    samples = torch.utils.data.TensorDataset(torch.arange(50))
    loader = modules.real_size_models.ResumableLoader(samples, 8, seed=3)
    whole = [batch[0].tolist() for batch in loader]
    assert len({sample for batch in whole for sample in batch}) == 48
    begun = iter(loader)
    assert [next(begun)[0].tolist() for _ in range(4)] == whole[:4]
    again = modules.real_size_models.ResumableLoader(samples, 8, seed=3)
    again.load_state_dict(loader.state_dict())
    assert [batch[0].tolist() for batch in again] == whole[4:]
    assert [batch[0].tolist() for batch in again] == whole
    again.sampler.set_epoch(1)
    assert [batch[0].tolist() for batch in again] != whole


def test_the_rate_goes_up_and_down(modules: SimpleNamespace) -> None:
    shares = [modules.real_size_models.warmed_cosine(step, 100, 0.1, 0.2) for step in range(100)]
    assert shares[0] == 0.1
    assert max(shares) == shares[9] == shares[10] == 1.0
    assert shares[55] == pytest.approx(0.6)
    assert 0.2 < shares[-1] < 0.21


# --- the statements


def test_a_statement_can_fail(output: Path, modules: SimpleNamespace, tmp_path: Path) -> None:
    """Each of them, when one number of the file is another."""
    made = SimpleNamespace(results=SimpleNamespace(parts=read_rows(output / "real_size.json")))
    reading = modules.real_size_reading.Reading(made)
    parts = made.results.parts

    def verdict(name: str) -> bool:
        return bool(reading.verdicts("resnet")[name][0])

    mine = rows(parts, "rows", run="resnet")
    assert verdict("bounds")
    mine[0]["kinematic_efficiency"] = 1.01
    assert not verdict("bounds")
    for i, row in enumerate(mine):
        row["critical_batch_size"] = 100.0 + 100.0 * (i >= len(mine) // 2)
    assert verdict("noise")
    for row in mine[: len(mine) // 3]:
        row["critical_batch_size"] = None
    assert not verdict("noise")
    (run,) = rows(parts, "runs", run="resnet")
    run["regimes"] = [[0, 2, 0.1], [2, 30, 0.2]]
    assert verdict("regimes")
    for changed in ([[0, 3, 0.1], [3, 30, 0.2]], [[0, 2, 0.3], [2, 30, 0.2]], [[0, 30, 0.2]]):
        run["regimes"] = changed
        assert not verdict("regimes")
    (cost,) = rows(parts, "cost", run="resnet")
    cost["ratio"] = 1.09
    assert verdict("cost")
    cost["ratio"] = 1.11
    assert not verdict("cost")
    first, _, last = rows(parts, "readings", run="resnet")
    first["causes"], last["causes"] = ["noise", "bouncing"], ["bouncing", "noise"]
    assert verdict("early word")
    last["causes"] = ["noise"]
    assert not verdict("early word")


# --- the page


def test_the_page_has_what_the_file_says(tmp_path: Path) -> None:
    """Its tables are those that the script prints of the file, and so are the numbers between them."""
    found = read_rows(DOCS / "real_size.json")
    assert found.keys() == PARTS
    (tmp_path / "real_size.json").write_text((DOCS / "real_size.json").read_text("utf-8"), "utf-8")
    script = str(SCRIPTS / "real_size.py")
    arguments = [script, "--shown", "--data", str(tmp_path), "--output", str(tmp_path), "--folder", str(tmp_path)]
    done = run_here(lambda: runpy.run_path(script, run_name="__main__"), arguments, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    whole, said = (DOCS / "real_size.md").read_text("utf-8"), page("real_size")
    tables = [part for part in done.stdout.split("\n\n") if part.startswith("|")]
    assert len(tables) == 6
    for table in tables:
        assert table.strip() in whole
    assert (DOCS / "real_size.png").stat().st_size < 120_000
    gpt, resnet = (rows(found, "rows", run=name) for name in RUNS)
    assert f"at the end is {gpt[-1]['efficiency']:.3f} ± {gpt[-1]['efficiency_se']:.3f}" in said
    errors = [
        np.median(
            [row["critical_batch_size_se"] / row["critical_batch_size"] for row in run if row["critical_batch_size"]]
        )
        for run in (gpt, resnet)
    ]
    assert "its standard error is {:.0f} % (GPT) and {:.0f} % (ResNet)".format(*(100 * x for x in errors)) in said
    silent = sum(row["critical_batch_size"] is None for row in resnet)
    assert f"not in {silent} of its {len(resnet)} rows" in said
    heads = [rows(found, "readings", run=name, at="100 %")[0]["step_headroom"] for name in ("transformer", "resnet")]
    words = "{:.0f} % at 0.685 (the GPT's whole run), {:.0f} % at 0.52"
    assert words.format(*(100 * (1 - 1 / (2 * h)) for h in heads)) in said
    third = len(resnet) // 3
    middle, last = (median_of(part, "critical_batch_size") for part in (resnet[third:-third], resnet[-third:]))
    assert f"from {middle:,.0f} images in the second third to {last:,.0f} in the last" in said
    assert f"{last / 128:.0f} times the ResNet's" in said
    first = next(row["step"] for row in resnet if row["critical_batch_size"])
    assert f"From step {first:,} on it is told" in said
    third = len(gpt) // 3
    grown = median_of(gpt[-third:], "critical_batch_size") / median_of(gpt[:third], "critical_batch_size")
    assert f"for the GPT {grown:.1f} times from the first third" in said
    (whole_run,) = rows(found, "readings", run="transformer", at="100 %")
    assert f"critical batch is {whole_run['critical_batch_size'] / 2056:.1f} times the GPT's" in said
    for name, words in zip(
        RUNS, ("the measurement took {} % more", "The ResNet's steps cost {} ± 3 % more"), strict=True
    ):
        ratios = [row["ratio"] for row in rows(found, "cost", run=name)]
        assert words.format(f"{100 * np.mean(ratios) - 100:.0f}") in said
    straight = [row["straightness"] for row in rows(found, "windows", run="resnet")]
    assert f"from {min(straight):.3f} to {straight[-1]:.3f} for the ResNet" in said
    looks = {run: [row["val_loss"] for row in rows(found, "validations", run=f"resnet × {run}")] for run in (1, 4)}
    at = next(k for k, loss in enumerate(looks[4]) if loss <= looks[1][-1])  # looks are 39 steps apart, from 39 on
    share = (looks[4][at - 1] - looks[1][-1]) / (looks[4][at - 1] - looks[4][at])
    assert f"after {(39 * (at + share)) / 390:.2f} of its steps" in said
    assert f"with {4 * 39 * (at + share) / 390:.1f} times the images" in said


def median_of(part: list[dict[str, Any]], name: str) -> float:
    return float(np.median([row[name] for row in part if row[name] is not None]))
