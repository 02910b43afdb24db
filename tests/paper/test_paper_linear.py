"""The experiment on linear models against mode-by-mode formulas in NumPy, and its page against its result file."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from paper_cases import page

NAME = "linear"
QUANTITIES = ("wasserstein2_squared", "loss_drop", "efficiency")


def modes(result: dict[str, Any], std: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """λ and r² + λ s²."""
    settings = result["settings"]
    eigenvalues = np.array(settings["eigenvalues"])
    return eigenvalues, np.array(settings["strength"]) + eigenvalues * std**2


def regression(time: float, left: np.ndarray, eigenvalues: np.ndarray, strength: np.ndarray) -> tuple[float, ...]:
    """W₂², loss drop and η, where `left` of each mode's residual is left."""
    distance = ((1 - left) ** 2 * strength / eigenvalues).sum()
    drop = 0.5 * ((1 - left**2) * strength).sum()
    return distance, drop, distance / (time * drop)


def flow(time: float, eigenvalues: np.ndarray, strength: np.ndarray) -> tuple[float, ...]:
    return regression(time, np.exp(-eigenvalues * time), eigenvalues, strength)


def steps(time: float, lr: float, eigenvalues: np.ndarray, strength: np.ndarray) -> tuple[float, ...]:
    return regression(time, (1 - lr * eigenvalues) ** round(time / lr), eigenvalues, strength)


def ornstein_uhlenbeck(result: dict[str, Any], time: float) -> dict[str, float]:
    """The perceptron from its inputs and labels: H = XᵀX/d + κ, w* = H⁻¹Xᵀy/√d, w_0 ~ N(0, s²)."""
    rows, settings = result["results"]["perceptron"], result["settings"]["perceptron"]
    inputs, labels = np.array(rows["inputs"]), np.array(rows["labels"])
    width = inputs.shape[1]
    assert set(labels) == {-1.0, 1.0}
    hessian = inputs.T @ inputs / width + settings["weight_decay"] * np.eye(width)
    optimum = np.linalg.solve(hessian, inputs.T @ labels / math.sqrt(width))
    h, vectors = np.linalg.eigh(hessian)
    m0, s2, heat = -vectors.T @ optimum, settings["std"] ** 2, settings["temperature"]
    m, v = np.exp(-h * time) * m0, np.exp(-2 * h * time) * s2 + heat / h * (1 - np.exp(-2 * h * time))
    distance = ((m - m0) ** 2 + (np.sqrt(v) - math.sqrt(s2)) ** 2).sum()
    loss_drop = 0.5 * (h * (m0**2 + s2 - m**2 - v)).sum()
    drop = loss_drop + 0.5 * heat * np.log(v / s2).sum()
    efficiency = distance / (time * drop)
    return {
        "wasserstein2_squared": distance,
        "free_energy_drop": drop,
        "efficiency": efficiency,
        "wasserstein2_squared_lower": distance,
        "efficiency_lower": efficiency,
        "loss_drop": loss_drop,
    }


def check_one_start(result: dict[str, Any]) -> None:
    rows = result["results"]["one_start"]
    assert len(rows["learning_rate"]) == 3
    for i, time in enumerate(rows["time"]):
        # Six digits of the file, of λ and r² as well as of the values.
        predicted = [rows["predicted"][name][i] for name in QUANTITIES]
        assert predicted == pytest.approx(flow(time, *modes(result)), rel=1e-5)
        for lr, run in zip(rows["learning_rate"], rows["measured"], strict=True):
            measured = [run[name][i] for name in QUANTITIES]
            assert measured == pytest.approx(steps(time, lr, *modes(result)), rel=1e-5)
            assert run["efficiency_action"][i] <= 1  # a theorem at every step size


def check_orders(result: dict[str, Any]) -> None:
    """Root mean squares over the times, from the formulas; orders tend to 1."""
    rows = result["results"]["one_start"]
    for n, name in enumerate(QUANTITIES):
        sizes = []
        for lr in rows["learning_rate"]:
            ratios = [steps(t, lr, *modes(result))[n] / flow(t, *modes(result))[n] for t in rows["time"]]
            sizes.append(math.sqrt(np.mean((np.array(ratios) - 1) ** 2)))
        assert rows["error"][name] == pytest.approx(sizes, rel=1e-3)  # a difference that is 0.5 % of its terms
        coarse, fine = rows["order"][name]
        assert [coarse, fine] == pytest.approx(-np.diff(np.log2(sizes)), abs=3e-3)
        # lr·λ ≤ 0.2, and the next order is of that relative size; it halves with lr.
        assert abs(fine - 1) < 0.1
        assert abs(fine - 1) < 0.6 * abs(coarse - 1)


def check_starts(result: dict[str, Any]) -> None:
    rows, settings = result["results"]["many_starts"], result["settings"]
    spectrum = modes(result, settings["std"])
    for i, time in enumerate(rows["time"]):
        of_flow, of_steps = flow(time, *spectrum), steps(time, settings["lr_of_replicas"], *spectrum)
        for name, predicted, exact in zip(QUANTITIES, of_flow, of_steps, strict=True):
            measured = rows["measured"][name][i]
            assert rows["predicted"][name][i] == pytest.approx(predicted, rel=1e-5)
            # Four standard errors, fixed seed; 1e-5: six digits of the file.
            assert measured["value"] == pytest.approx(exact, abs=4 * measured["standard_error"] + 1e-5 * exact)
            # The flow's own value differs by less than lr·λ.
            assert measured["value"] == pytest.approx(
                predicted, abs=4 * measured["standard_error"] + settings["lr_of_replicas"] * predicted
            )
        certificate = rows["certificate"][i]
        assert certificate["method"] == "identity"
        assert 0 <= certificate["upper_over_lower"] < 1e-10  # rounding alone
        # Independent clouds cannot be nearer than the populations, up to sampling: 20 % with 40 of them.
        assert rows["unpaired"][i] > 0.8 * of_flow[0]
    assert rows["unpaired"][0] > 4 * rows["predicted"]["wasserstein2_squared"][0]


def check_perceptron(result: dict[str, Any]) -> None:
    rows = result["results"]["perceptron"]
    assert len(rows["time"]) == 5
    for i, time in enumerate(rows["time"]):
        truth = ornstein_uhlenbeck(result, time)
        for name in ("wasserstein2_squared", "free_energy_drop", "efficiency"):
            assert rows["predicted"][name][i] == pytest.approx(truth[name], rel=2e-5)  # six digits of the inputs
        for name in ("wasserstein2_squared_lower", "free_energy_drop", "loss_drop", "efficiency_lower"):
            measured = rows["measured"][name][i]
            # Four standard errors, fixed seed; lr·h ≤ 0.005 (0.02 with few replicas) adds less than one.
            assert measured["value"] == pytest.approx(truth[name], abs=4 * measured["standard_error"]), name
        # Finite clouds: W₂² is biased upwards.
        measured = rows["measured"]["wasserstein2_squared"][i]
        assert measured["value"] > truth["wasserstein2_squared"] - 4 * measured["standard_error"]
    ratios = rows["fewer_replicas"]["ratio"]
    assert ratios[0] > ratios[1] > ratios[2] > 1


CHECKS = [check_one_start, check_starts, check_perceptron]


@pytest.mark.parametrize("check", CHECKS)
def test_the_shortened_run_agrees_with_the_formulas(quick: dict[str, Any], check: Any) -> None:
    check(quick)


@pytest.mark.parametrize("check", [*CHECKS, check_orders])
def test_the_full_run_agrees_with_the_formulas(full: dict[str, Any], check: Any) -> None:
    assert not full["settings"]["quick"]
    check(full)


def test_the_shortened_run_has_the_order_too(quick: dict[str, Any]) -> None:
    check_orders(quick)


def test_replicas_of_the_full_run_are_many_enough_to_tell_something(full: dict[str, Any]) -> None:
    results = full["results"]
    last = [results[key]["measured"]["efficiency"][-1] for key in ("many_starts", "perceptron")]
    for efficiency in last:
        assert efficiency["standard_error"] < 0.01 * efficiency["value"]


def test_what_the_page_says_of_standard_errors(full: dict[str, Any]) -> None:
    results = full["results"]
    assert max(results["one_start"]["largest_error_against_steps"]) < 2e-13
    for run in results["one_start"]["measured"]:
        assert max(run["efficiency_action"]) < 1
    assert max(each["upper_over_lower"] for each in results["many_starts"]["certificate"]) < 2.1e-12
    unit = results["perceptron"]
    for name in ("wasserstein2_squared_lower", "free_energy_drop", "efficiency_lower"):
        for found, truth in zip(unit["measured"][name], unit["predicted"][name.removesuffix("_lower")], strict=True):
            assert abs(found["value"] - truth) < found["standard_error"]
    # What does not agree: far more than sampling would explain.
    first = unit["measured"]["efficiency"][0]
    assert first["value"] > 1 + 10 * first["standard_error"]


@pytest.mark.parametrize("key", ["one_start", "many_starts", "perceptron"])
def test_the_checks_can_fail(full: dict[str, Any], key: str) -> None:
    """5 % on any one of the measured efficiencies, or on W₂² from moments, is seen."""
    rows = full["results"][key]
    name = "efficiency_lower" if key == "perceptron" else "efficiency"
    changed: Any
    if key == "one_start":
        values = [1.05 * value for value in rows["measured"][0][name]]
        changed = [rows["measured"][0] | {name: values}, *rows["measured"][1:]]
    else:
        values = [each | {"value": 1.05 * each["value"]} for each in rows["measured"][name]]
        changed = rows["measured"] | {name: values}
    wrong = full | {"results": full["results"] | {key: rows | {"measured": changed}}}
    check = {"one_start": check_one_start, "many_starts": check_starts, "perceptron": check_perceptron}[key]
    with pytest.raises(AssertionError):
        check(wrong)


def test_the_page_cites_the_result_file(full: dict[str, Any]) -> None:
    text, results = page(NAME), full["results"]
    one, starts, unit = results["one_start"], results["many_starts"], results["perceptron"]
    for i, lr in enumerate(one["learning_rate"]):
        sizes = " | ".join(f"{100 * one['error'][name][i]:.2f} %" for name in QUANTITIES)
        assert f"| {lr:g} | {sizes} |" in text
    for i in range(2):
        assert " | ".join(f"{one['order'][name][i]:.3f}" for name in QUANTITIES) in text
    for i in range(0, len(one["time"]), 3):
        cells = [one["predicted"]["efficiency"][i], *(run["efficiency"][i] for run in one["measured"])]
        assert f"| {one['time'][i]:g} | " + " | ".join(f"{x:.4f}" for x in cells) + " |" in text
    for i, time in enumerate(starts["time"]):
        distance, efficiency = (starts["measured"][name][i] for name in ("wasserstein2_squared", "efficiency"))
        cells = [
            plus_minus(distance, 3),
            f"{starts['predicted']['wasserstein2_squared'][i]:.3f}",
            plus_minus(efficiency, 5),
            f"{starts['predicted_of_steps']['efficiency'][i]:.5f}",
            f"{starts['predicted']['efficiency'][i]:.5f}",
            f"{starts['unpaired'][i]:.1f}",
        ]
        assert f"| {time:g} | " + " | ".join(cells) + " |" in text
    for i, time in enumerate(unit["time"]):
        measured = unit["measured"]
        cells = [
            plus_minus(measured["free_energy_drop"][i], 3),
            f"{unit['predicted']['free_energy_drop'][i]:.3f}",
            plus_minus(measured["efficiency"][i], 4),
            plus_minus(measured["efficiency_lower"][i], 4),
            f"{unit['predicted']['efficiency'][i]:.4f}",
        ]
        assert f"| {time:g} | " + " | ".join(cells) + " |" in text
    assert ", ".join(f"{ratio:.2f}" for ratio in unit["fewer_replicas"]["ratio"]) in text


def plus_minus(estimate: dict[str, float], digits: int) -> str:
    return f"{estimate['value']:.{digits}f} ± {estimate['standard_error']:.{digits}f}"
