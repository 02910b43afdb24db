"""The experiment on Langevin dynamics against Gaussian moments in NumPy, and its page against its result file."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from paper_cases import page

NAME = "langevin"


class Modes:
    """L = ½ Σ h x² at temperature T from N(m_0, s_0²), with moments propagated one by one."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.h, self.m0, self.s0 = (np.array(case[name]) for name in ("curvature", "mean", "deviation"))
        self.heat = case["temperature"]

    def at(self, time: float) -> tuple[np.ndarray, np.ndarray]:
        left = np.exp(-self.h * time)
        return left * self.m0, left**2 * self.s0**2 + self.heat / self.h * (1 - left**2)

    def euler(self, lr: float, time: float) -> tuple[np.ndarray, np.ndarray, float]:
        """Mean, variance and action Σ ⟨‖u‖²⟩/lr of the chain x ← (1 − lr·h) x + √(2T lr) ξ, step after step."""
        mean, variance, action = self.m0, self.s0**2, 0.0
        for _ in range(round(time / lr)):
            action += float((lr * self.h**2 * (mean**2 + variance) + 2 * self.heat).sum())
            mean = (1 - lr * self.h) * mean
            variance = (1 - lr * self.h) ** 2 * variance + 2 * self.heat * lr
        return mean, variance, action

    def values(self, time: float, mean: np.ndarray, variance: np.ndarray) -> dict[str, float]:
        distance = ((mean - self.m0) ** 2 + (np.sqrt(variance) - self.s0) ** 2).sum()
        drop = 0.5 * (self.h * (self.m0**2 + self.s0**2 - mean**2 - variance)).sum()
        free = drop + 0.5 * self.heat * np.log(variance / self.s0**2).sum()
        return {
            "wasserstein2_squared": distance,
            "wasserstein2_squared_lower": distance,
            "loss_drop": drop,
            "free_energy_drop": free,
            "efficiency": distance / (time * free),
            "efficiency_lower": distance / (time * free),
            "efficiency_loss_drop": distance / (time * drop),
        }

    def entropy_produced(self, start: float, end: float) -> float:
        """(F_s − F_t)/T, nats."""
        (m, v), (n, w) = self.at(start), self.at(end)
        loss = 0.5 * (self.h * (m**2 + v - n**2 - w)).sum()
        return float(loss / self.heat + 0.5 * np.log(w / v).sum())


def within(estimate: dict[str, float], truth: float, errors: float = 4.0) -> None:
    """Four standard errors, fixed seed."""
    assert estimate["standard_error"] > 0
    assert estimate["value"] == pytest.approx(truth, abs=errors * estimate["standard_error"])


def check_stationary(result: dict[str, Any]) -> None:
    case, rows = Modes(result["settings"]["stationary"]), result["results"]["stationary"]
    assert case.s0**2 == pytest.approx(case.heat / case.h, rel=1e-5)
    assert len(rows["time"]) >= 5
    for i, time in enumerate(rows["time"]):
        half = float(case.h[0]) * time / 2
        assert rows["predicted"][i] == pytest.approx(math.tanh(half) / half, rel=1e-5)
        within(rows["efficiency"][i], math.tanh(half) / half)
        within(rows["efficiency_lower"][i], math.tanh(half) / half)


def check_relaxing(result: dict[str, Any]) -> None:
    case, rows = Modes(result["settings"]["relaxing"]), result["results"]["relaxing"]
    assert len(rows["time"]) >= 5
    for i, time in enumerate(rows["time"]):
        truth = case.values(time, *case.at(time))
        for name, predicted in rows["predicted"].items():
            assert predicted[i] == pytest.approx(truth[name], rel=1e-5), name
        for name in ("wasserstein2_squared_lower", "free_energy_drop", "loss_drop", "efficiency_lower"):
            within(rows["measured"][name][i], truth[name])
        # Finite clouds: W₂² is biased upwards where diffusion is as large as drift, and no more at the end.
        cloud = rows["measured"]["wasserstein2_squared"][i]
        assert cloud["value"] > truth["wasserstein2_squared"] - 4 * cloud["standard_error"]
        if time >= 0.4:
            within(cloud, truth["wasserstein2_squared"])
            within(rows["measured"]["efficiency"][i], truth["efficiency"])
        assert rows["certified_gap"][i] < 1e-3  # the tolerance that was asked for
    # The loss drop alone: above 1 at first.
    assert rows["predicted"]["efficiency_loss_drop"][0] > 1.3
    ratios = [each["value"] for each in result["results"]["fewer_replicas"]["ratio"]]
    assert ratios[0] > ratios[1] > ratios[2] > 1


def check_step_sizes(result: dict[str, Any]) -> None:
    case, rows = Modes(result["settings"]["relaxing"]), result["results"]["step_sizes"]
    truth = case.values(rows["time"], *case.at(rows["time"]))
    assert len(rows["learning_rate"]) >= 2
    for name, errors in rows["relative_error"].items():
        exact = []
        for lr, error in zip(rows["learning_rate"], errors, strict=True):
            mean, variance, _ = case.euler(lr, rows["time"])
            exact.append(case.values(rows["time"], mean, variance)[name] / truth[name] - 1)
            within(error, exact[-1])
        assert rows["relative_error_of_euler"][name] == pytest.approx(exact, abs=1e-7)  # six digits
        span = math.log(rows["learning_rate"][0] / rows["learning_rate"][-1])
        within(rows["order"][name], math.log(exact[0] / exact[-1]) / span)
        # 0.1: lr·h ≤ 0.2, and the next order is of that relative size.
        order = rows["order"][name]
        assert order["value"] == pytest.approx(1.0, abs=4 * order["standard_error"] + 0.1)


def check_action(result: dict[str, Any]) -> None:
    case, rows = Modes(result["settings"]["relaxing"]), result["results"]["action"]
    copies = result["settings"]["scale"]["action"]
    time = result["results"]["step_sizes"]["time"]
    free = case.values(time, *case.at(time))["free_energy_drop"]
    assert rows["entropy_production"] == pytest.approx(free, rel=1e-5)
    assert len(rows["learning_rate"]) == 3
    for lr, found, efficiency in zip(rows["learning_rate"], rows["action"], rows["efficiency"], strict=True):
        _, _, exact = case.euler(lr, time)
        # ⟨A⟩ of one copy scatters by less than its value: four standard errors of so many copies.
        assert found == pytest.approx(exact, rel=4 / math.sqrt(copies))
        assert found > 7 * free
        assert efficiency == pytest.approx(rows["true_efficiency"] * free / found, rel=1e-4)
    # Twice as large at half the step, less what the gradient adds: 8.4 of 9 + 1.4.
    assert rows["action"][2] / rows["action"][1] > 1.9
    assert rows["action"][1] / rows["action"][0] > 1.8


def check_rates(result: dict[str, Any]) -> None:
    case, rows = Modes(result["settings"]["relaxing"]), result["results"]["rates"]
    assert len(rows["time"]) >= 5
    for i, (time, lag) in enumerate(zip(rows["time"], rows["lag"], strict=True)):
        exact = case.entropy_produced(time - lag / 2, time + lag / 2) / lag
        assert rows["exact"][i] == pytest.approx(exact, rel=1e-3)  # times in six digits, a midpoint rule of 100
        for name in ("relation", "bound"):
            found = rows[name][i]
            assert found["value"] < exact + 4 * found["standard_error"]
            # Currents of degree 1 span the velocity of a linear system: close below, up to the lag.
            assert found["value"] > 0.9 * exact - 4 * found["standard_error"]


CHECKS = [check_stationary, check_relaxing, check_step_sizes, check_action, check_rates]


@pytest.mark.parametrize("check", CHECKS)
def test_the_shortened_run_agrees_with_the_formulas(quick: dict[str, Any], check: Any) -> None:
    check(quick)


@pytest.mark.parametrize("check", CHECKS)
def test_the_full_run_agrees_with_the_formulas(full: dict[str, Any], check: Any) -> None:
    assert not full["settings"]["quick"]
    check(full)


def test_the_full_run_is_sharp_enough_to_tell_something(full: dict[str, Any]) -> None:
    results = full["results"]
    for efficiency in (*results["stationary"]["efficiency"], *results["relaxing"]["measured"]["efficiency_lower"]):
        assert efficiency["standard_error"] < 0.03 * efficiency["value"]
    for order in results["step_sizes"]["order"].values():
        assert order["standard_error"] < 0.1
    # The loss drop alone is measured above the limit, by more than ten standard errors.
    first = results["relaxing"]["measured"]["efficiency_loss_drop"][0]
    assert first["value"] > 1 + 10 * first["standard_error"]


def test_what_the_page_says_of_standard_errors(full: dict[str, Any]) -> None:
    results = full["results"]
    three, steps, rates = results["relaxing"], results["step_sizes"], results["rates"]
    apart = []
    for name in ("wasserstein2_squared_lower", "free_energy_drop", "efficiency_lower"):
        truths = three["predicted"][name.removesuffix("_lower")]
        apart += [deviations(found, truth) for found, truth in zip(three["measured"][name], truths, strict=True)]
    for name in ("relation", "bound"):
        apart += [deviations(found, truth) for found, truth in zip(rates[name], rates["exact"], strict=True)]
    assert max(apart) < 1.65
    for name, errors in steps["relative_error"].items():
        for found, truth in zip(errors, steps["relative_error_of_euler"][name], strict=True):
            assert deviations(found, truth) < 2
    # What does not agree: far more than sampling would explain.
    first = three["measured"]["efficiency"][0]
    assert first["value"] > 1 + 10 * first["standard_error"]


def deviations(estimate: dict[str, float], truth: float) -> float:
    return abs(estimate["value"] - truth) / estimate["standard_error"]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_checks_can_fail(full: dict[str, Any], check: Any) -> None:
    """With another temperature behind the numbers no check passes."""
    settings = dict(full["settings"])
    for case in ("stationary", "relaxing"):
        settings[case] = settings[case] | {"temperature": 1.2 * settings[case]["temperature"]}
    with pytest.raises(AssertionError):
        check(full | {"settings": settings})


def test_the_page_cites_the_result_file(full: dict[str, Any]) -> None:
    text, results = page(NAME), full["results"]
    one, three = results["stationary"], results["relaxing"]
    for time, found, truth in zip(one["time"], one["efficiency"], one["predicted"], strict=True):
        assert f"| {time:g} | {plus_minus(found, 4)} | {truth:.4f} |" in text
    measured, predicted = three["measured"], three["predicted"]
    for i, time in enumerate(three["time"]):
        cells = [
            plus_minus(measured["wasserstein2_squared_lower"][i], 4),
            f"{predicted['wasserstein2_squared'][i]:.4f}",
            plus_minus(measured["free_energy_drop"][i], 3),
            f"{predicted['free_energy_drop'][i]:.3f}",
            plus_minus(measured["efficiency_lower"][i], 3),
            f"{predicted['efficiency'][i]:.3f}",
            plus_minus(measured["efficiency"][i], 3),
            f"{predicted['efficiency_loss_drop'][i]:.3f}",
        ]
        assert f"| {time:g} | " + " | ".join(cells) + " |" in text
    steps = results["step_sizes"]
    for name, order in steps["order"].items():
        errors = [f"{100 * each['value']:.2f} %" for each in steps["relative_error"][name]]
        cells = [*errors, plus_minus(order, 2), f"{steps['order_of_euler'][name]:.2f}"]
        assert (
            f"| {name.replace('wasserstein2_squared', 'W₂²').replace('_', ' ')} | " + " | ".join(cells) + " |" in text
        )
    action = results["action"]
    for lr, found, truth, efficiency in zip(
        *(action[n] for n in ("learning_rate", "action", "predicted", "efficiency")), strict=True
    ):
        assert f"| {lr:g} | {found:.2f} | {truth:.2f} | {efficiency:.3f} |" in text
    rates = results["rates"]
    for i, time in enumerate(rates["time"]):
        cells = [plus_minus(rates["relation"][i], 2), plus_minus(rates["bound"][i], 2), f"{rates['exact'][i]:.2f}"]
        assert f"| {time:g} | {rates['lag'][i]:g} | " + " | ".join(cells) + " |" in text
    ratios = [plus_minus(each, 2) for each in results["fewer_replicas"]["ratio"]]
    assert ", ".join(ratios) in text


def plus_minus(estimate: dict[str, float], digits: int) -> str:
    return f"{estimate['value']:.{digits}f} ± {estimate['standard_error']:.{digits}f}"
