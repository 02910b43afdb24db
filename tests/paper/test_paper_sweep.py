"""The sweep against a training with plain sums, scipy's rank correlations, and the page against its result file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from paper_cases import page
from scipy.stats import kendalltau, spearmanr
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

NAME = "sweep"
Optimize = Callable[[Any], torch.optim.Optimizer]

# Single runs that were known before, looked at every 10 steps: steps, kinematic efficiency, straightness, steadiness,
# conversion, and how far each may be from the mean over three seeds here. The spreads are those of
# tests/trajectory/test_digits.py: about three standard deviations over seeds.
KNOWN = {
    "SGD 0.1, 16": ((720, 0.006, 0.008, 0.77, 0.02), (60, 0.0015, 0.0015, 0.06, 0.006)),
    "SGD 0.1, 128": ((620, 0.050, 0.056, 0.90, 0.12), (30, 0.008, 0.009, 0.04, 0.015)),
    "SGD 0.1, 1024": ((600, 0.230, 0.268, 0.86, 0.52), (30, 0.02, 0.02, 0.02, 0.03)),
    "SGD 0.3, 1024": ((210, 0.031, 0.052, 0.60, 0.07), (30, 0.009, 0.015, 0.07, 0.025)),
    "momentum 0.9 0.01, 128": ((630, 0.33, 0.44, 0.76, 0.62), (40, 0.03, 0.04, 0.04, 0.04)),
    "momentum 0.9 0.05, 128": ((150, 0.30, 0.38, 0.80, 0.44), (40, 0.08, 0.1, 0.05, 0.1)),
    "momentum 0.9 0.2, 128": ((70, 0.25, 0.31, 0.82, 0.14), (40, 0.1, 0.13, 0.06, 0.08)),
    "Adam 0.0003, 128": ((640, 0.37, 0.49, 0.76, 0.73), (70, 0.02, 0.04, 0.04, 0.03)),
    "Adam 0.001, 128": ((230, 0.37, 0.48, 0.78, 0.68), (40, 0.04, 0.04, 0.04, 0.05)),
    "Adam 0.003, 128": ((100, 0.34, 0.44, 0.78, 0.57), (30, 0.06, 0.06, 0.06, 0.06)),
    "Adam 0.01, 128": ((60, 0.26, 0.40, 0.66, 0.37), (60, 0.12, 0.2, 0.08, 0.12)),
}
FIELDS = ("steps", "kinematic_efficiency", "straightness", "steadiness", "conversion")
RANKED = (
    "efficiency",
    "efficiency_low",
    "kinematic_efficiency",
    "conversion",
    "signal_fraction",
    "action",
)
GROUPS = ("SGD", "momentum", "Adam")


def rows(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The table of settings, by name."""
    table = result["results"]["settings"]
    return {name: {key: values[n] for key, values in table.items()} for n, name in enumerate(table["name"])}


def column(members: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([row[name] for row in members], dtype=float)


# --- one run, with plain sums


class PlainSums:
    """θ, −g and the mobility of each step as flat float64 vectors, and from them the formulas, word by word."""

    def __init__(self, optimize: Optimize, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        self.parameters = list(self.model.parameters())
        self.optimizer = optimize(self.parameters)

    def flat(self, tensors: list[Tensor]) -> Tensor:
        return torch.cat([t.detach().double().flatten() for t in tensors])

    def mobility(self) -> Tensor:
        group = self.optimizer.param_groups[0]
        if isinstance(self.optimizer, torch.optim.SGD):
            return torch.full_like(self.flat(self.parameters), group["lr"] / (1 - group["momentum"]))
        states = [self.optimizer.state[p] for p in self.parameters]
        corrected = self.flat([s["exp_avg_sq"] for s in states]) / (1 - group["betas"][1] ** float(states[0]["step"]))
        return group["lr"] / (corrected.sqrt() + group["eps"])

    def run(self, batch: int, steps: int, seed: int) -> dict[str, float]:
        datasets = pytest.importorskip("sklearn.datasets")
        images, targets = datasets.load_digits(return_X_y=True)
        x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(targets)
        order = torch.Generator().manual_seed(seed + 100)
        weights, forces, mobilities = [self.flat(self.parameters)], [], []
        losses = [cross_entropy(self.model(x), y).item()]
        for _ in range(steps):
            index = torch.randint(len(y), (batch,), generator=order)
            self.optimizer.zero_grad()
            cross_entropy(self.model(x[index]), y[index]).backward()
            forces.append(-self.flat([p.grad for p in self.parameters if p.grad is not None]))
            self.optimizer.step()
            weights.append(self.flat(self.parameters))
            mobilities.append(self.mobility())
        losses.append(cross_entropy(self.model(x), y).item())
        u = torch.stack(weights).diff(dim=0)
        f, mobility = torch.stack(forces), torch.stack(mobilities)
        work = (f * u).sum(1)
        displacement = u.sum(0)
        clock = (mobility * (u != 0)).sum(0)  # a coordinate's idle steps do not count
        squared, path, action = displacement.square().sum(), u.norm(dim=1).sum(), u.square().sum()
        drop = losses[0] - losses[1]
        found = {
            "displacement": squared.sqrt(),
            "action": action,
            "straightness": squared / path**2,
            "steadiness": path**2 / (steps * action),
            "kinematic_efficiency": squared / (steps * action),
            "conversion": drop / work.sum(),
            "signal_fraction": (f[1:] * u[:-1]).sum() / work[:-1].sum(),
            "efficiency": (displacement.square() / clock).nan_to_num().sum() / drop,
        }
        return {name: float(value) for name, value in found.items()} | {"loss": losses[1]}


@pytest.mark.parametrize(
    ("name", "optimize"),
    [
        ("SGD 0.3, 128", lambda p: torch.optim.SGD(p, lr=0.3)),
        ("momentum 0.9 0.05, 128", lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)),
        ("Adam 0.003, 128", lambda p: torch.optim.Adam(p, lr=3e-3)),
    ],
)
def test_a_run_is_what_plain_sums_say(quick: dict[str, Any], name: str, optimize: Optimize) -> None:
    row, target = rows(quick)[name], quick["settings"]["target"]
    values = PlainSums(optimize, seed=0).run(128, round(row["steps"]), seed=0)
    assert values["loss"] <= target + 1e-6
    # Gradients and weights are float32 in both; differences of weights keep some 1e-4 of it, sums much less.
    assert {key: row[key] for key in values} == {key: pytest.approx(value, rel=2e-4) for key, value in values.items()}


def test_quick_result_is_complete(quick: dict[str, Any]) -> None:
    table = rows(quick)
    assert len(table) == 7
    for row in table.values():
        assert row["reached"]
        assert 0 < row["kinematic_efficiency"] <= 1
        assert row["kinematic_efficiency"] == pytest.approx(row["straightness"] * row["steadiness"], rel=1e-5)
        assert row["efficiency_low"] <= row["efficiency"]
    assert quick["results"]["full_batch"]["conversion"] == pytest.approx([1, 1], abs=0.01)  # O(lr²), lr ≤ 0.2


# --- the full run


def test_settings_and_seeds(full: dict[str, Any]) -> None:
    table = rows(full)
    assert len(table) >= 20
    assert len(full["settings"]["seeds"]) == 3
    assert all(row["reached"] and row["steps"] < full["settings"]["max_steps"] for row in table.values())
    assert all(0 < row["loss"] <= 0.1 for row in table.values())


@pytest.mark.parametrize("name", KNOWN)
def test_rows_known_before(full: dict[str, Any], name: str) -> None:
    row = rows(full)[name]
    got = {field: row[field] for field in FIELDS}
    assert got == {field: pytest.approx(v, abs=s) for field, v, s in zip(FIELDS, *KNOWN[name], strict=True)}


def test_full_batches_tend_to_the_flow(full: dict[str, Any]) -> None:
    batch, flow = full["results"]["full_batch"], full["results"]["flow"]
    batch = {name: values[1:] for name, values in batch.items()}  # the first bounces
    excess = np.abs(np.array(batch["conversion"]) - 1)
    assert np.all(excess < 2e-3)
    assert flow["conversion"] == pytest.approx(1, abs=1e-4)
    assert flow["signal_fraction"] == pytest.approx(1, abs=1e-4)
    # Conversion 1 and one learning rate for all: D²/(τ A) = D²/(lr K Σ lr‖g‖²), the paper's.
    assert flow["efficiency"] == pytest.approx(flow["kinematic_efficiency"], rel=1e-3)
    # The extrapolation changes little: lr 0.025 is the flow to a thousandth.
    assert batch["efficiency"][-1] == pytest.approx(flow["efficiency"], rel=2e-3)
    # A step more or less of 2400.
    assert flow["flow_time"] == pytest.approx(batch["flow_time"][-1], rel=2e-3)


def test_noise_shows_in_conversion_and_not_in_efficiency(full: dict[str, Any]) -> None:
    flow = full["results"]["flow"]
    plain = [row for row in rows(full).values() if row["family"] == "SGD"]
    ratios = column(plain, "efficiency") / flow["efficiency"]
    assert np.all(np.abs(ratios - 1) < 0.1)
    assert column(plain, "conversion").max() < 0.6
    assert column(plain, "conversion").min() < 0.02


def test_long_steps_bounce_without_noise(full: dict[str, Any]) -> None:
    batch = full["results"]["full_batch"]
    assert (batch["lr"][0], batch["batch"][0]) == (0.3, None)
    assert batch["conversion"][0] < 0.1
    assert batch["signal_fraction"][0] < -0.3


def test_rank_correlations_are_scipys(full: dict[str, Any]) -> None:
    for group, found in full["results"]["correlations"].items():
        members = [row for row in rows(full).values() if group in ("all", row["family"])]
        steps = column(members, "steps")
        for name in RANKED:
            assert found[name]["settings"] == len(members)
            for method, function in (("spearman", spearmanr), ("kendall", kendalltau)):
                expected = function(steps, column(members, name))
                got = found[name][method]
                assert got["value"] == pytest.approx(expected.statistic, abs=1e-5)
                low, high = got["interval"]
                assert low <= got["value"] <= high
                # Permutations scatter by 4 √(p (1 − p)/n); scipy's p is exact (Kendall) or from Student's t.
                scatter = 4 * (0.25 / full["settings"]["resamplings"]) ** 0.5
                assert got["p"] == pytest.approx(expected.pvalue, abs=scatter + 0.02)


def test_what_one_knob_does(full: dict[str, Any]) -> None:
    table = list(rows(full).values())
    for knob, same in (("lr", ("family", "batch", "momentum")), ("batch", ("family", "lr", "momentum"))):
        found = full["results"]["faster_has_more"][knob]
        for name in RANKED:
            more, count = 0, 0
            for i, a in enumerate(table):
                for b in table[:i]:
                    if all(a[key] == b[key] for key in same):
                        count += 1
                        more += (a["steps"] < b["steps"]) == (a[name] > b[name])
            assert found[name] == [more, count], (knob, name)
    by_rate, by_batch = (full["results"]["faster_has_more"][knob] for knob in ("lr", "batch"))
    assert by_rate["conversion"][0] == 0
    assert by_batch["conversion"][0] == by_batch["conversion"][1]
    assert by_rate["action"][0] == by_rate["action"][1]


def test_efficiency_does_not_rank_as_steps_do(full: dict[str, Any]) -> None:
    """As on the page: over all settings no interval of the ranks with efficiency or conversion leaves out 0."""
    found = full["results"]["correlations"]["all"]
    for name in ("efficiency", "kinematic_efficiency", "conversion"):
        for method in ("spearman", "kendall"):
            low, high = found[name][method]["interval"]
            assert low < 0 < high
            assert found[name][method]["p"] > 0.05
    assert found["action"]["kendall"]["p"] < 0.01


def test_the_pages_figures_stand_in_the_result_file(full: dict[str, Any]) -> None:
    text = page(NAME)
    assert f"({NAME}.png)" in text
    for name, row in rows(full).items():
        cells = [
            f"| {name} | {row['steps']:.0f} ± {row['steps_se']:.0f} | "
            f"{row['efficiency_low']:.2f} to {row['efficiency']:.2f} | {row['kinematic_efficiency']:.3f} | "
            f"{row['straightness']:.3f} | {row['steadiness']:.2f} | {row['conversion']:.3f} | "
            f"{row['signal_fraction']:.2f} | {row['action']:.3g} |"
        ]
        assert cells[0].replace("-", "−") in text, name
    bouncing = {name: values[0] for name, values in full["results"]["full_batch"].items()}
    cited = f"conversion {bouncing['conversion']:.3f}, signal {bouncing['signal_fraction']:.2f}"
    assert cited.replace("-", "−") in text
    assert f"**efficiency {full['results']['flow']['efficiency']:.3f}**" in text
    for group, found in full["results"]["correlations"].items():
        for method in ("spearman", "kendall"):
            values = " | ".join(f"{found[name][method]['value']:+.2f}" for name in RANKED)
            assert f"| {group}, {method.title()} | {values} |".replace("-", "−") in text
    for knob, found in full["results"]["faster_has_more"].items():
        values = " | ".join(f"{more} of {count}" for more, count in (found[name] for name in RANKED))
        assert f"| only {knob} differs | {values} |" in text
