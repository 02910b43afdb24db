"""Efficiency against time when the kernel's spectrum and the residual fall as powers.

    python examples/paper/power_laws.py [--quick] [--output DIR]

With λ_k = k^−a and r_k² = k^−b the efficiency η of gradient flow tends to a constant for b < 1, falls as
t^{(1−b)/a} for 1 < b < 1 + a, and as 1/t beyond (arXiv:2307.14653 calls the first case optimal in a scaling
sense). Shown are

- the sums over a million modes, their slopes d ln η/d ln t, and how fast these tend to the exponents;
- gradient descent on a linear model with such a spectrum, measured by `TrajectoryMeter`;
- a real spectrum: a network's tangent kernel on images of digits, and how far fitted powers describe it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from common import COLOURS, LINES, MARKERS, Report, digits, figure, number, parse, progress
from numpy.typing import NDArray
from scipy.special import gamma, zeta
from torch import Tensor, nn

from lightning_speedlimit import TrajectoryMeter
from lightning_speedlimit.theory import Curve, gradient_flow, ntk_eigenbasis, power_law, power_law_exponent

Pair = tuple[float, float]
Floats = NDArray[np.float64]

PAIRS: tuple[Pair, ...] = ((1.5, 0.5), (1.5, 1.0), (1.5, 1.5), (1.2, 2.0), (1.5, 2.5), (1.5, 3.0))  # (a, b)
DESCENT_PAIRS: tuple[Pair, ...] = ((1.5, 0.5), (1.5, 1.5))
MODES = 10**6
PER_DECADE = 4
REFERENCE = (1e3, 1e4, 1e5)  # slopes over the last of these decades are tabled: 1 ≪ t ≪ P^a
DESCENT_MODES = 2000
LEARNING_RATE = 0.5  # λ_1 = 1: stable below 2
SIZES = (64, 128, 128, 10)
FAIR = {"eigenvalues": 1.2, "residual": 1.4}  # a power law is fair where bins lie within these factors of it
BINS_PER_DECADE = 8


# --- sums over a million modes


def expansion(a: float, b: float, t: Floats) -> tuple[Floats, Floats]:
    """(W₂², Q) of infinitely many modes at t ≫ 1, up to terms that vanish faster than any power of 1/t.

    S(x; s) = Σ_k (1 − e^{−x k^−a}) k^−s = ζ(s) − Γ(z) x^−z/a, z = (s − 1)/a, from the poles of its Mellin
    transform. Q = ½ S(2t; b), and W₂² = 2 S(t; b − a) − S(2t; b − a) since (1 − e)² = 2 (1 − e) − (1 − e²).
    Where poles meet (z = 0 in either, z = −1 in W₂²) the limits stand.
    """
    constant = np.euler_gamma * (1 + 1 / a)  # of ζ(1 + az) − Γ(z) x^−z/a → γ (1 + 1/a) + ln(x)/a as z → 0
    z = (b - 1) / a
    produced = constant + np.log(2 * t) / a if z == 0 else zeta(b) - gamma(z) * (2 * t) ** -z / a
    y = z - 1  # of s = b − a
    if y == 0:
        squared = constant + np.log(t / 2) / a
    else:
        front = -2 * math.log(2) if y == -1 else gamma(y) * (2 - 2**-y)
        squared = zeta(b - a) - front * t**-y / a
    return squared, 0.5 * produced


def approach_exponent(a: float, b: float) -> float:
    """The slope's distance to theory falls as t^−min(|b − 1|, |b − 1 − a|)/a; 0: a logarithm (on a boundary).

    ζ(b) beside t^{(1−b)/a} in Q, and ζ(b − a) beside t^{(1+a−b)/a} in W₂², are corrections of these orders.
    """
    return min(abs(b - 1), abs(b - 1 - a)) / a


def constant(a: float, b: float) -> float:
    """The η that b < 1 tends to: 4 (1 − 2^−x)/(1 + x), x = (1 − b)/a, the ratio of the expansion's fronts.

    0 at b = 1, where the fall begins, and 1 at a + b = 1, where the last modes carry all.
    """
    x = (1 - b) / a
    return 4 * (1 - 2**-x) / (1 + x)


def slopes(t: Floats, efficiency: Floats) -> Floats:
    """d ln η/d ln t between neighbouring times."""
    return np.diff(np.log(efficiency)) / np.diff(np.log(t))


def between(t: Floats) -> Floats:
    """Geometric means of neighbouring times."""
    return np.sqrt(t[1:] * t[:-1])


def sum_modes(pair: Pair, modes: int) -> dict[str, Any]:
    """η and its slopes from t = 1 to P^a/10, with the expansion beside them."""
    a, b = pair
    t = 10 ** (np.arange(0, PER_DECADE * min(8.0, a * math.log10(modes) - 1) + 0.01) / PER_DECADE)
    efficiency = power_law(a, b, modes, torch.from_numpy(t)).efficiency.numpy()
    distance, expected, exponent = at_reference(pair, modes)
    squared, produced = expansion(a, b, t)
    last = power_law(a, b, modes, REFERENCE[-1]).efficiency.item()
    return {
        "a": a,
        "b": b,
        "time": t,
        "efficiency": efficiency,
        "slope": slopes(t, efficiency),
        "slope_of_expansion": slopes(t, squared / (t * produced)),
        "theory": power_law_exponent(a, b),
        "reference": {
            "efficiency": last,
            "constant": constant(a, b) if b < 1 else math.nan,
            "distance": distance,
            "distance_of_expansion": expected,
            "approach_exponent": exponent,
            "approach_exponent_theory": approach_exponent(a, b),
        },
    }


def at_reference(pair: Pair, modes: int) -> tuple[float, float, float]:
    """The slope's distance to theory over the last decade, the expansion's, and −d ln(distance)/d ln t."""
    a, b = pair
    t = np.array(REFERENCE)
    efficiency = power_law(a, b, modes, torch.from_numpy(t)).efficiency.numpy()
    squared, produced = expansion(a, b, t)
    early, late = slopes(t, efficiency) - power_law_exponent(a, b)
    expected = slopes(t, squared / (t * produced))[1] - power_law_exponent(a, b)
    return late, expected, -math.log(late / early) / math.log(10)


def cut_off(pair: Pair, modes: Sequence[int]) -> dict[str, Any]:
    """What the end of the spectrum takes from η at t = 10⁵: falls as P^{1−a−b}, the share of modes beyond P."""
    (a, b), t = pair, REFERENCE[-1]
    squared, produced = expansion(a, b, np.array([t]))
    endless = (squared / (t * produced)).item()
    lost = [power_law(a, b, p, t).efficiency.item() / endless - 1 for p in modes]
    measured = math.log(lost[1] / lost[0]) / math.log(modes[1] / modes[0])
    return {"a": a, "b": b, "modes": modes, "relative": lost, "exponent": measured, "exponent_theory": 1 - a - b}


# --- gradient descent, measured


def hartley(x: Tensor) -> Tensor:
    """Orthogonal, symmetric, and its own inverse: every mode is a wave over all coordinates."""
    transformed = torch.fft.fft(x, norm="ortho")
    return transformed.real - transformed.imag


def descend(pair: Pair, learning_rate: float, checkpoints: Iterable[int]) -> list[float]:
    """Measured η at these steps of `torch.optim.SGD` on ½‖Jθ − y‖², J = H diag(√λ) H, H the Hartley transform.

    From θ = 0 with y = H r the kernel JJᵀ has eigenvalues k^−a and the residual the components k^{−b/2}.
    """
    a, b = pair
    k = torch.arange(1, DESCENT_MODES + 1, dtype=torch.float64)
    singular, targets = k ** (-a / 2), hartley(k ** (-b / 2))
    weights = nn.Parameter(torch.zeros_like(k))

    def loss() -> Tensor:
        return 0.5 * (hartley(singular * hartley(weights)) - targets).square().sum()

    optimizer = torch.optim.SGD([weights], lr=learning_rate)
    meter = TrajectoryMeter(optimizer, clock="lr")
    first, found, step = loss().detach().reshape(1), [], 0
    for checkpoint in checkpoints:
        while step < checkpoint:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
            step += 1
        meter.record_probe(first, loss().detach().reshape(1))  # the loss drop, exactly
        found.append(meter.compute()["efficiency"])
    meter.close()
    return found


def measure_descent(pair: Pair, doublings: int) -> dict[str, Any]:
    """η at t = ½, 1, 2, 4 … beside gradient flow's."""
    steps = [2**n for n in range(doublings + 1)]
    t = LEARNING_RATE * np.array(steps, dtype=float)
    measured = np.array(descend(pair, LEARNING_RATE, steps))
    flow = power_law(*pair, DESCENT_MODES, torch.from_numpy(t)).efficiency.numpy()
    return {
        "a": pair[0],
        "b": pair[1],
        "time": t,
        "efficiency": measured,
        "flow": flow,
        "slope": slopes(t[-4:], measured[-4:]),
        "slope_of_flow": slopes(t[-4:], flow[-4:]),
    }


def measure_step_size(pair: Pair, time: float = 8.0) -> dict[str, Any]:
    """η of descent over η of flow − 1 at t = 8, for learning rates that halve: the departure is of first order."""
    rates = [LEARNING_RATE / 2**n for n in range(4)]
    flow = power_law(*pair, DESCENT_MODES, time).efficiency.item()
    excess = [descend(pair, rate, [round(time / rate)])[0] / flow - 1 for rate in rates]
    return {"a": pair[0], "b": pair[1], "time": time, "learning_rates": rates, "excess": excess}


# --- a real spectrum


@dataclass(frozen=True)
class Spectrum:
    """λ_k, the largest first, and r_k²; means over logarithmic bins of k."""

    eigenvalues: Floats
    squared_residual: Floats

    @property
    def bins(self) -> list[slice]:
        count = len(self.eigenvalues)
        edges = 10 ** (np.arange(0, BINS_PER_DECADE * math.log10(count)) / BINS_PER_DECADE)
        starts = np.unique(np.append(np.round(edges).astype(int), count + 1)) - 1
        return [slice(i, j) for i, j in pairwise(starts)]

    @property
    def binned(self) -> tuple[Floats, Floats, Floats]:
        """Geometric means of k and λ_k, means of r_k²."""
        log_k, log_rates = np.log(np.arange(1, len(self.eigenvalues) + 1)), np.log(self.eigenvalues)
        means = [(log_k[s].mean(), log_rates[s].mean(), np.log(self.squared_residual[s].mean())) for s in self.bins]
        k, rates, strength = np.exp(np.array(means).T)
        return k, rates, strength

    def curve(self, t: Floats) -> Curve:
        return gradient_flow(
            torch.from_numpy(self.eigenvalues),
            torch.from_numpy(self.squared_residual).sqrt(),
            torch.from_numpy(t),
        )


@dataclass(frozen=True)
class Fit:
    """λ_k = scale k^−a and r_k² = strength k^−b, fair for k from `first` to `last`."""

    a: float
    b: float
    scale: float
    strength: float
    first: int
    last: int

    def spectrum(self, modes: int) -> Spectrum:
        """The two powers for all k = 1 … modes."""
        k = np.arange(1, modes + 1, dtype=float)
        return Spectrum(self.scale * k**-self.a, self.strength * k**-self.b)

    def beside(self, true: Spectrum, *, tail: bool) -> Spectrum:
        """The two powers within the window, the true modes before it, and with `tail` also those beyond."""
        powers, head, end = self.spectrum(len(true.eigenvalues)), self.first - 1, self.last
        beyond = true if tail else powers
        return Spectrum(
            np.concatenate([true.eigenvalues[:head], powers.eigenvalues[head:end], beyond.eigenvalues[end:]]),
            np.concatenate(
                [true.squared_residual[:head], powers.squared_residual[head:end], beyond.squared_residual[end:]]
            ),
        )


def digits_spectrum(images: int, seed: int) -> Spectrum:
    """Of the empirical tangent kernel of an MLP 64-128-128-10 at its start, one-hot targets."""
    inputs, labels = digits()
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[:images]
    torch.manual_seed(seed)
    layers = [layer for n, m in pairwise(SIZES) for layer in (nn.Linear(n, m), nn.ReLU())]
    network = nn.Sequential(nn.Flatten(), *layers[:-1])
    targets = nn.functional.one_hot(labels[chosen], SIZES[-1]).float()
    eigenvalues, initial, goal = ntk_eigenbasis(network, inputs[chosen], targets)
    moving = eigenvalues > 0
    descending = eigenvalues[moving].flip(0).numpy().copy()
    return Spectrum(descending, (initial - goal)[moving].flip(0).square().numpy().copy())


def fit_powers(spectrum: Spectrum) -> Fit:
    """Lines through ln λ and ln r² over the longest row of bins in which both are fair."""
    k, rates, strength = spectrum.binned
    bins, best, length = spectrum.bins, None, 0.0
    for i in range(len(k)):
        for j in range(i + 4, len(k) + 1):  # four bins: two more than a line needs
            lines = [_line(k[i:j], values[i:j]) for values in (rates, strength)]
            fair = all(line[2] < factor for line, factor in zip(lines, FAIR.values(), strict=True))
            if fair and k[j - 1] / k[i] > length:
                length = k[j - 1] / k[i]
                (a, scale, _), (b, height, _) = lines
                best = Fit(a, b, scale, height, int(bins[i].start) + 1, int(bins[j - 1].stop))
    if best is None:
        raise RuntimeError("no row of four bins follows a power law; use wider bins")
    return best


def _line(k: Floats, values: Floats) -> tuple[float, float, float]:
    """(exponent, value at k = 1, largest factor between value and line) of value ~ k^−exponent."""
    slope, height = np.polyfit(np.log(k), np.log(values), 1)
    off = np.abs(np.log(values) - slope * np.log(k) - height).max()
    return -slope, math.exp(height), math.exp(off)


def compare_spectra(images: int, seed: int, endless: int) -> tuple[dict[str, Any], Spectrum, Fit]:
    """η of the true spectrum, and of the fitted powers, in whose place more and more of the truth is put.

    endless: as many modes of the fitted powers as make the end of the spectrum unseen.
    """
    true = digits_spectrum(images, seed)
    fit = fit_powers(true)
    spectra = {
        "powers": fit.spectrum(len(true.eigenvalues)),
        "head": fit.beside(true, tail=False),
        "head_and_tail": fit.beside(true, tail=True),
        "true": true,
    }
    window = 1 / true.eigenvalues[[fit.first - 1, fit.last - 1]]  # 1/λ: where the front k* passes
    t = np.geomspace(0.3 / true.eigenvalues[0], 3 / true.eigenvalues[-len(true.eigenvalues) // 10], 40)
    k, rates, strength = true.binned
    curves = {name: spectrum.curve(t).efficiency.numpy() for name, spectrum in spectra.items()}
    inside = (t > window[0]) & (t < window[1])
    return (
        {
            "images": images,
            "modes": len(true.eigenvalues),
            "k": k,
            "eigenvalues": rates,
            "squared_residual": strength,
            "fit": vars(fit),
            "window": window,
            "time": t,
            "efficiency": curves,
            "worst_factor_in_window": {
                name: math.exp(np.abs(np.log(curves[name] / curves["true"]))[inside].max())
                for name in ("powers", "head", "head_and_tail")
            },
            "slopes_in_window": {
                name: slopes_over(spectrum, window)
                for name, spectrum in {"endless_powers": fit.spectrum(endless), **spectra}.items()
            },
            "slope_theory": power_law_exponent(fit.a, fit.b),
            "share_of_loss_before_window": true.squared_residual[: fit.first - 1].sum() / true.squared_residual.sum(),
            "share_of_loss_before_window_by_powers": spectra["powers"].squared_residual[: fit.first - 1].sum()
            / spectra["powers"].squared_residual.sum(),
        },
        true,
        fit,
    )


def slopes_over(spectrum: Spectrum, window: Floats) -> dict[str, float]:
    """d ln η, d ln W₂² and d ln Q over d ln t, from one end of the window to the other."""
    curve = spectrum.curve(window)
    log_t = math.log(window[1] / window[0])
    names = {"efficiency": "efficiency", "wasserstein2_squared": "W₂²", "entropy_production": "Q"}
    return {name: getattr(curve, name).log().diff().item() / log_t for name in names}


# --- what is shown


def main() -> None:
    options = parse(__doc__.splitlines()[0])
    modes, doublings, images = (10**5, 9, 24) if options.quick else (MODES, 14, 200)
    report = Report(
        "power_laws",
        options,
        {
            "modes": modes,
            "descent_modes": DESCENT_MODES,
            "learning_rate": LEARNING_RATE,
            "reference_times": REFERENCE,
            "network": SIZES,
            "fair_within_factors": FAIR,
        },
    )
    sums = [sum_modes(pair, modes) for pair in progress(PAIRS, "sums over modes")]
    descents = [measure_descent(pair, doublings) for pair in progress(DESCENT_PAIRS, "gradient descent")]
    steps = [measure_step_size(pair) for pair in DESCENT_PAIRS]
    ends = [cut_off(pair, [modes // 10, modes]) for pair in DESCENT_PAIRS]
    spectrum, true, fit = compare_spectra(images, options.seed, modes)
    report.add(sums=sums, cut_off=ends, descent=descents, step_size=steps, spectrum=spectrum)
    say(report, sums, descents, steps, spectrum)
    save(report, sums, descents, spectrum, true, fit)


def say(report: Report, sums: list[Any], descents: list[Any], steps: list[Any], spectrum: dict[str, Any]) -> None:
    report.say("slope d ln η/d ln t", "measured", "predicted", "difference")
    for row in sums:
        reference = row["reference"]
        name = f"sum over modes, a = {row['a']:g}, b = {row['b']:g}, t = 10⁴ to 10⁵"
        _say(report, name, row["theory"] + reference["distance"], row["theory"])
        if reference["approach_exponent_theory"]:
            name = "  the difference falls as t^−"
            _say(report, name, reference["approach_exponent"], reference["approach_exponent_theory"])
        else:
            name = "  the difference, a logarithm: by the expansion"
            _say(report, name, reference["distance"], reference["distance_of_expansion"])
        if not math.isnan(reference["constant"]):
            _say(report, "  η at t = 10⁵, and its limit", reference["efficiency"], reference["constant"])
    for row in descents:
        name = f"gradient descent, a = {row['a']:g}, b = {row['b']:g}, t = {row['time'][-1]:g}: η"
        _say(report, name, row["efficiency"][-1], row["flow"][-1])
        _say(report, "  its slope, over the last doubling", row["slope"][-1], row["slope_of_flow"][-1])
    for row in steps:
        name = f"  excess at lr {row['learning_rates'][-2]:g} over that at half, a = {row['a']:g}, b = {row['b']:g}"
        _say(report, name, row["excess"][-2] / row["excess"][-1], 2)
    window, found = spectrum["window"], spectrum["slopes_in_window"]
    fit = spectrum["fit"]
    name = f"digits, fitted a = {number(fit['a'])}, b = {number(fit['b'])}, t = {window[0]:.2g} to {window[1]:.2g}"
    _say(report, name, found["true"]["efficiency"], spectrum["slope_theory"])
    for stage, words in {
        "endless_powers": "the fitted powers, summed to where no end is seen",
        "powers": "… as many modes as there are",
        "head": "… the true modes before the window",
        "head_and_tail": "… and those beyond it",
    }.items():
        _say(report, f"  {words}", found["true"]["efficiency"], found[stage]["efficiency"])


def _say(report: Report, name: str, measured: float, predicted: float) -> None:
    report.say(name, f"{measured:.4f}", f"{predicted:.4f}", f"{measured - predicted:+.1e}")


def save(
    report: Report,
    sums: list[dict[str, Any]],
    descents: list[dict[str, Any]],
    spectrum: dict[str, Any],
    true: Spectrum,
    fit: Fit,
) -> None:
    with figure(3, 2, width=4.1, height=3.3) as (drawn, axes):
        draw_sums(axes[0, 0], sums)
        draw_approach(axes[0, 1], sums)
        draw_descent(axes[0, 2], descents)
        draw_spectrum(axes[1, 0], spectrum, true, fit, "eigenvalues")
        draw_spectrum(axes[1, 1], spectrum, true, fit, "squared_residual")
        draw_comparison(axes[1, 2], spectrum)
        report.save(drawn)


def label(row: dict[str, Any]) -> str:
    return f"a = {row['a']:g}, b = {row['b']:g}"


def draw_sums(axis: Any, sums: list[dict[str, Any]]) -> None:
    """Markers: the sums; lines: t^exponent through one of them."""
    for n, row in enumerate(sums):
        t, efficiency = row["time"], row["efficiency"]
        anchor, late = len(t) * 3 // 4, t[t >= 10]
        line = efficiency[anchor] * (late / t[anchor]) ** row["theory"]
        axis.plot(t[::2], efficiency[::2], MARKERS[n], color=COLOURS[n], mfc="none", label=label(row))
        axis.plot(late, line, linestyle=LINES[n], color=COLOURS[n], lw=1)
    axis.set(xscale="log", yscale="log", xlabel="time t (1/λ₁)", ylabel="efficiency η", ylim=(1e-9, 3))
    axis.set_title("Sums over the modes, and t^exponent as lines")
    axis.legend(loc="lower left")


def draw_approach(axis: Any, sums: list[dict[str, Any]]) -> None:
    """Distance of the local slope to the exponent; line styles and markers as in `draw_sums`."""
    for n, row in enumerate(sums):
        t = between(row["time"])
        late = t > 3
        measured, expected = (np.abs(row[name] - row["theory"]) for name in ("slope", "slope_of_expansion"))
        axis.plot(t[late][::2], measured[late][::2], MARKERS[n], color=COLOURS[n], mfc="none")
        axis.plot(t[late], expected[late], linestyle=LINES[n], color=COLOURS[n], lw=1)
    axis.plot([], [], "o", color=COLOURS[0], mfc="none", label="the sums (turning up: the modes run out)")
    axis.plot([], [], "-", color=COLOURS[0], lw=1, label="endless spectrum: ζ and Γ")
    axis.set(xscale="log", yscale="log", xlabel="time t (1/λ₁)", ylabel="|local slope − exponent|", ylim=(1e-4, 1))
    axis.set_title("Slopes approach theory, near b = 1 and 1 + a slowly")
    axis.legend(loc="lower left")


def draw_descent(axis: Any, descents: list[dict[str, Any]]) -> None:
    for n, row in enumerate(descents):
        colour = COLOURS[2 * n]
        t = np.geomspace(row["time"][0], row["time"][-1], 60)
        flow = power_law(row["a"], row["b"], DESCENT_MODES, torch.from_numpy(t)).efficiency
        axis.plot(t, flow, linestyle=LINES[n], color=colour, label=f"gradient flow, {label(row)}")
        axis.plot(row["time"], row["efficiency"], MARKERS[n], color=colour, mfc="none", label="SGD, measured")
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="time t = learning rate × steps (1/λ₁)",
        ylabel="efficiency η",
        ylim=(0.01, 2),
    )
    axis.set_title(f"Gradient descent, {DESCENT_MODES} modes, lr {LEARNING_RATE:g}")
    axis.legend(loc="lower left")


def draw_spectrum(axis: Any, spectrum: dict[str, Any], true: Spectrum, fit: Fit, name: str) -> None:
    values = getattr(true, name)
    fitted = getattr(fit.spectrum(len(values)), name)
    k = np.arange(1, len(values) + 1)
    axis.axvspan(fit.first, fit.last, color="#eeeeee", zorder=0)
    axis.plot(spectrum["k"], spectrum[name], "o", color=COLOURS[1], mfc="none", label="means over bins of k")
    symbol, exponent = ("λ", fit.a) if name == "eigenvalues" else ("r²", fit.b)
    axis.plot(k, fitted, "--", color=COLOURS[2], label=f"k^−{exponent:.2f}, fitted where grey")
    axis.set(xscale="log", yscale="log", xlabel="mode k", ylabel="λ (1/time)" if symbol == "λ" else "r² (loss units)")
    axis.set_title("Digits, tangent kernel: " + ("eigenvalues" if symbol == "λ" else "squared residual"))
    axis.legend(loc="lower left")


def draw_comparison(axis: Any, spectrum: dict[str, Any]) -> None:
    t, curves = spectrum["time"], spectrum["efficiency"]
    axis.axvspan(*spectrum["window"], color="#eeeeee", zorder=0)
    axis.plot(t, curves["true"], "o", color=COLOURS[1], mfc="none", label="true spectrum")
    axis.plot(t, curves["head"], "-", color=COLOURS[0], label="true first modes, then fitted")
    axis.plot(t, curves["powers"], "--", color=COLOURS[2], label="fitted powers for all k")
    axis.set(xscale="log", yscale="log", xlabel="time t (learning rate × steps)", ylabel="efficiency η")
    axis.set_title("Digits: the first modes decide on η")
    axis.legend(loc="lower left")


if __name__ == "__main__":
    main()
