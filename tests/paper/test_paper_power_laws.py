"""The experiment on power laws against sums and steps of plain numpy, and its page against its result file."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from paper_cases import page

NAME = "power_laws"


def closed_form(a: float, b: float, modes: int, t: np.ndarray) -> np.ndarray:
    """η = Σ (1 − e^−λt)² r²/λ / (t ½ Σ (1 − e^−2λt) r²), one time after another."""
    k = np.arange(1, modes + 1, dtype=float)
    rates, strength = k**-a, k**-b
    squared = np.array([(np.expm1(-rates * s) ** 2 * strength / rates).sum() for s in t])
    return squared / (t * np.array([-0.5 * (np.expm1(-2 * rates * s) * strength).sum() for s in t]))


def descent(a: float, b: float, modes: int, lr: float, steps: np.ndarray) -> np.ndarray:
    """η of K steps of gradient descent: modes shrink by (1 − lr λ)^K, exactly."""
    k = np.arange(1, modes + 1, dtype=float)
    rates, strength = k**-a, k**-b
    left = [np.exp(n * np.log1p(-lr * rates)) for n in steps]
    squared = np.array([((1 - q) ** 2 * strength / rates).sum() for q in left])
    return squared / (lr * steps * np.array([0.5 * ((1 - q * q) * strength).sum() for q in left]))


def exponent(a: float, b: float) -> float:
    return 0.0 if b <= 1 else (1 - b) / a if b < 1 + a else -1.0


def test_sums_are_those_of_numpy(quick: dict[str, Any]) -> None:
    for row in quick["results"]["sums"]:
        t = np.array(row["time"][::8])
        expected = closed_form(row["a"], row["b"], quick["settings"]["modes"], t)
        assert row["efficiency"][::8] == pytest.approx(expected, rel=2e-5)  # times and values in six digits
        assert row["theory"] == pytest.approx(exponent(row["a"], row["b"]), rel=1e-5)


def test_descent_is_that_of_numpy(quick: dict[str, Any]) -> None:
    """The meter's η of a run that mixes all modes, against the exact solution mode by mode; η exceeds 1 early."""
    settings = quick["settings"]
    for row in quick["results"]["descent"]:
        steps = np.array(row["time"]) / settings["learning_rate"]
        expected = descent(row["a"], row["b"], settings["descent_modes"], settings["learning_rate"], steps)
        assert row["efficiency"] == pytest.approx(expected, rel=3e-6)  # six digits of the file
        flow = closed_form(row["a"], row["b"], settings["descent_modes"], np.array(row["time"]))
        assert row["flow"] == pytest.approx(flow, rel=3e-6)
        assert row["efficiency"][0] > 1.1  # λ_1 lr = ½, one step: η > 1, as in the page


def test_step_size_error_is_of_first_order(quick: dict[str, Any]) -> None:
    for row in quick["results"]["step_size"]:
        excess = np.array(row["excess"])
        # Halves with lr, but for second order: at most lr λ_1 = ½ of the first for the first pair, halving after.
        assert np.all(excess > 0)
        assert excess[:-1] / excess[1:] == pytest.approx(2, abs=0.1)
        steps = np.array([row["time"] / lr for lr in row["learning_rates"]])
        modes = quick["settings"]["descent_modes"]
        flow = closed_form(row["a"], row["b"], modes, np.array([row["time"]]))
        for lr, n, value in zip(row["learning_rates"], steps, excess, strict=True):
            exact = descent(row["a"], row["b"], modes, lr, np.array([n])) / flow - 1
            assert value == pytest.approx(exact.item(), rel=1e-4)


def test_spectrum_of_digits_has_its_parts(quick: dict[str, Any]) -> None:
    spectrum = quick["results"]["spectrum"]
    assert spectrum["modes"] == pytest.approx(10 * spectrum["images"], abs=10)
    assert 1 <= spectrum["fit"]["first"] < spectrum["fit"]["last"] <= spectrum["modes"]
    assert all(late <= early for early, late in pairwise(spectrum["eigenvalues"]))
    for values in spectrum["efficiency"].values():
        assert len(values) == len(spectrum["time"])
        assert all(0 < value < 1 for value in values)  # gradient flow's own
    # The powers of the fit, summed here once more for all modes.
    fit, count = spectrum["fit"], spectrum["modes"]
    k = np.arange(1, count + 1)
    rates, strength = fit["scale"] * k ** -fit["a"], fit["strength"] * k ** -fit["b"]
    t = np.array(spectrum["time"])[:, None]
    squared = (np.expm1(-rates * t) ** 2 * strength / rates).sum(1)
    expected = squared / (-0.5 * t[:, 0] * (np.expm1(-2 * rates * t) * strength).sum(1))
    assert spectrum["efficiency"]["powers"] == pytest.approx(expected, rel=1e-4)  # six digits of a, b and t


# --- the full run and its page


def row_of(full: dict[str, Any], a: float, b: float) -> dict[str, Any]:
    return next(row for row in full["results"]["sums"] if (row["a"], row["b"]) == (a, b))


@pytest.mark.parametrize(
    ("a", "b", "slope", "digits"),
    [(1.5, 0.5, -0.005, 3), (1.5, 1.5, -0.339, 3), (1.2, 2.0, -0.80, 2), (1.5, 3.0, -0.99, 2)],
)
def test_the_slopes_known_beforehand(full: dict[str, Any], a: float, b: float, slope: float, digits: int) -> None:
    row = row_of(full, a, b)
    assert round(row["theory"] + row["reference"]["distance"], digits) == slope
    early, late = closed_form(a, b, full["settings"]["modes"], np.array([1e4, 1e5]))
    assert row["theory"] + row["reference"]["distance"] == pytest.approx(np.log(late / early) / np.log(10), abs=1e-5)


def test_distances_to_the_exponents_fall(full: dict[str, Any]) -> None:
    """From t = 10 on to P^a/3000, where the last modes begin to count; once per decade."""
    for row in full["results"]["sums"]:
        t = np.array(row["time"])
        middle = np.sqrt(t[1:] * t[:-1])
        chosen = (middle > 10) & (middle < full["settings"]["modes"] ** row["a"] / 3000)
        distances = np.abs(np.array(row["slope"])[chosen] - row["theory"])[::4]
        assert len(distances) >= 3
        assert np.all(np.diff(distances) < 0), row["b"]


def test_they_fall_slowly_where_the_page_says(full: dict[str, Any]) -> None:
    for row in full["results"]["sums"]:
        a, b, reference = row["a"], row["b"], row["reference"]
        expected = min(abs(b - 1), abs(b - 1 - a)) / a
        assert reference["approach_exponent_theory"] == pytest.approx(expected, rel=1e-5, abs=1e-12)
        # the next order, t^−1/3 or slower beside the first, changes a local exponent by less than 0.05
        if expected:
            assert reference["approach_exponent"] == pytest.approx(expected, abs=0.05)
        else:  # 1/ln t and its constant: ln(2t) + γ (1 + a) for b = 1, ln(t/2) + γ (1 + a) for b = 1 + a
            log_t = np.log((2 if b == 1 else 0.5) * np.sqrt(1e4 * 1e5)) + np.euler_gamma * (1 + a)
            # a difference over a decade instead of a derivative: (ln 10)²/12 of the second, some 0.5 %
            assert abs(reference["distance"]) == pytest.approx(1 / log_t, rel=0.02)
        assert reference["distance"] == pytest.approx(reference["distance_of_expansion"], abs=3e-4)  # P^(1−a−b)


def test_the_constant_below_one(full: dict[str, Any]) -> None:
    reference = row_of(full, 1.5, 0.5)["reference"]
    x = (1 - 0.5) / 1.5
    assert reference["constant"] == pytest.approx(4 * (1 - 2**-x) / (1 + x), rel=1e-5)
    assert 0 < reference["efficiency"] / reference["constant"] - 1 < 0.01  # ~ t^−1/3/2 at t = 10⁵


def test_descent_lies_on_the_curve(full: dict[str, Any]) -> None:
    for row in full["results"]["descent"]:
        late = np.array(row["time"]) >= 64
        ratio = np.array(row["efficiency"])[late] / np.array(row["flow"])[late] - 1
        assert np.all(np.abs(ratio) < 3e-3)
        assert abs(ratio[-1]) < 1e-4
        assert row["slope"] == pytest.approx(row["slope_of_flow"], abs=1e-3)


def test_what_the_page_says_of_digits(full: dict[str, Any]) -> None:
    spectrum = full["results"]["spectrum"]
    slopes = {name: found["efficiency"] for name, found in spectrum["slopes_in_window"].items()}
    stages = [slopes[name] for name in ("endless_powers", "powers", "head", "head_and_tail", "true")]
    assert all(later < earlier for earlier, later in pairwise([spectrum["slope_theory"], *stages]))
    steps = -np.diff([spectrum["slope_theory"], *stages])
    assert steps.argmax() == 2  # the head
    assert steps[-1] < 0.01  # within the window the powers are fine
    assert spectrum["worst_factor_in_window"]["powers"] > 3
    assert spectrum["worst_factor_in_window"]["head"] < 1.2


def test_the_end_of_the_spectrum(full: dict[str, Any]) -> None:
    """Modes beyond P take a share ~ P^{1−a−b} of η: ten times the modes, and the power shows to a percent."""
    for row in full["results"]["cut_off"]:
        assert row["exponent"] == pytest.approx(1 - row["a"] - row["b"], abs=0.01)


def test_the_pages_figures_stand_in_the_result_file(full: dict[str, Any]) -> None:
    text = page(NAME)
    assert f"({NAME}.png)" in text
    for row in full["results"]["sums"]:
        distance = row["reference"]["distance"]
        pair = f"{row['a']:g}, {row['b']:g}"
        assert table(pair, f"{row['theory']:.4f}", f"{row['theory'] + distance:.4f}", f"{abs(distance):.4f}") in text
    for row in full["results"]["descent"]:
        pair = f"{row['a']:g}, {row['b']:g}"
        assert table(pair, f"{row['efficiency'][-1]:.5f}", f"{row['flow'][-1]:.5f}") in text
    spectrum = full["results"]["spectrum"]
    slopes = {name: found["efficiency"] for name, found in spectrum["slopes_in_window"].items()}
    assert f"a = {spectrum['fit']['a']:.2f}, b = {spectrum['fit']['b']:.2f}" in text
    for value in (*slopes.values(), spectrum["slope_theory"]):
        assert f"| {value:.2f} |".replace("-", "−") in text
    for factor in spectrum["worst_factor_in_window"].values():
        assert f"{factor:.2f}" in text


def table(*cells: str) -> str:
    """A row's first cells, with a typographic minus."""
    return f"| {' | '.join(cells)} |".replace("-", "−")
