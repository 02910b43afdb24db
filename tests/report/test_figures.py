"""What the figures show, against the records' numbers, plain formulas and an SVD of its own; no pixels."""

import copy
import io
import math
import pickle
import random
import re
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from comparison_cases import decay, straight
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.collections import PolyCollection, QuadMesh
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text

from lightning_speedlimit import RunRecord
from lightning_speedlimit.record import SKETCH_SIZE
from lightning_speedlimit.report import export, figures, style
from lightning_speedlimit.report.figure_windows import MOST_EDGES, log_spaced
from lightning_speedlimit.report.figures import PlanePoint

EXACT = 1e-12  # float64 values that are drawn as they are
SINGLE = 1e-6  # sketches are kept in float32
SVG = "{http://www.w3.org/2000/svg}"


@np.errstate(all="ignore")  # some cases begin at step 0 or are infinite
def record_of(
    path: Any, losses: Any = None, *, steps: Any = None, run: dict[str, Any] | None = None, **columns: Any
) -> RunRecord:
    """A record whose sketches are this path (n, dims) of θ_t − θ_0, one step of length 1 in τ each."""
    path = np.asarray(path, dtype=np.float64)
    steps = np.arange(1, len(path) + 1) if steps is None else np.asarray(steps)
    losses = np.linspace(2, 1, len(path)) if losses is None else np.asarray(losses)
    moves = np.diff(np.concatenate([np.zeros((1, path.shape[1])), path]), axis=0)
    lengths = np.linalg.norm(moves, axis=1)
    gone = np.diff(np.concatenate([[0], steps]))
    action, length = np.cumsum(lengths**2 / gone), np.cumsum(lengths)
    squared, drop = (path**2).sum(1), 2.1 - losses
    values = {
        "elapsed": steps.astype(float),
        "action": action,
        "work_ito": 3 * action,
        "work_anti_ito": 0.9 * action,
        "loss": losses,
        "loss_drop": drop,
        "straightness": squared / length**2,
        "steadiness": length**2 / (steps * action),
        "kinematic_efficiency": squared / (steps * action),
        "conversion": drop / (3 * action),
        "signal_fraction": np.full(len(path), 0.3),
        "efficiency": squared / (0.1 * drop),
        "efficiency_low": squared / (0.1 * drop) - 0.1,
        "efficiency_drift": squared / (0.1 * drop) - 0.04,
        "efficiency_action": squared / (steps * action),
        **{name: np.broadcast_to(column, len(path)) for name, column in columns.items()},
    }
    record = RunRecord(run)
    for place, step in enumerate(steps):
        record.append(int(step), {name: float(column[place]) for name, column in values.items()})
        record.add_sketch(int(step), np.pad(path[place], (0, SKETCH_SIZE - path.shape[1])))
    return record


def wandering(count: int, *, seed: int = 0, dims: int = 9, noise: float = 0.3) -> Any:
    """A drift with a bend in it and noise upon it."""
    time = np.arange(1, count + 1)[:, None] / count
    noisy = noise / count**0.5 * np.random.default_rng(seed).standard_normal((count, dims)).cumsum(0)
    return np.concatenate([3 * time, np.sin(2 * time)], 1) @ np.eye(2, dims) + noisy


def drawn(figure: Figure) -> Figure:
    """With its layout made, as it is when written."""
    FigureCanvasAgg(figure).draw()
    return figure


def line(axes: Any, label: str) -> Any:
    (found,) = [x for x in axes.lines if x.get_label() == label]
    return found


def known(values: Any) -> Any:
    return np.asarray(values)[np.isfinite(values)]


# --- efficiency


def test_efficiency_shows_the_records_columns() -> None:
    record = record_of(wandering(40))
    upper, lower = figures.efficiency(record).axes
    columns = record.columns
    labels = {
        "efficiency η": (upper, "efficiency"),
        "an estimate within it": (upper, "efficiency_drift"),
        "by action (≤ 1)": (upper, "efficiency_action"),
        "kinematic (≤ 1)": (upper, "kinematic_efficiency"),
        "straightness (≤ 1)": (lower, "straightness"),
        "steadiness (≤ 1)": (lower, "steadiness"),
        "conversion": (lower, "conversion"),
        "signal fraction": (lower, "signal_fraction"),
    }
    for label, (axes, name) in labels.items():
        np.testing.assert_allclose(line(axes, label).get_xdata(), columns["step"], rtol=EXACT)
        np.testing.assert_allclose(line(axes, label).get_ydata(), columns[name], rtol=EXACT, err_msg=name)
    (band,) = upper.collections
    corners = band.get_paths()[0].vertices
    for name in ("efficiency", "efficiency_low"):
        assert {(float(x), float(y)) for x, y in zip(columns["step"], columns[name], strict=True)} <= {
            (float(x), float(y)) for x, y in corners
        }
    assert all(
        1.0 in [float(x.get_ydata()[0]) for x in axes.lines if len(x.get_xdata()) == 2] for axes in (upper, lower)
    )
    assert lower.get_xlabel() == "optimizer steps since the start"
    assert lower.get_xscale() == "log"


@pytest.mark.parametrize(
    "changed",
    [
        {"efficiency": np.geomspace(3e4, 0.2, 40)},
        {"efficiency_low": np.linspace(-7, 0.1, 40)},
        {"signal_fraction": np.linspace(-3, 0.1, 40), "conversion": 1e-7},
        {"conversion": np.zeros(40)},
    ],
)
def test_nothing_is_clipped(changed: dict[str, Any]) -> None:
    """Every defined value lies within the axes, and one that is far off leaves the others apart."""
    figure = drawn(figures.efficiency(record_of(wandering(40), **changed)))
    for axes in figure.axes:
        low, high = axes.get_ylim()
        for shown in axes.lines:
            values = known(shown.get_ydata())
            if len(values) > 2:
                assert low <= values.min()
                assert values.max() <= high
        if axes.collections:
            values = axes.collections[0].get_paths()[0].vertices[:, 1]
            assert low <= values.min()
            assert values.max() <= high
    upper = figure.axes[0]
    pixels = upper.transData.transform([(1, 0.5), (1, 1.0)])[:, 1]
    assert pixels[1] - pixels[0] > 5  # of some 200


def test_undefined_values_are_gaps_and_lonely_ones_get_a_marker() -> None:
    efficiency = np.full(40, np.nan)
    efficiency[[5, 20, 21, 22]] = 0.5
    record = record_of(wandering(40), efficiency=efficiency, efficiency_low=np.nan, efficiency_drift=np.nan)
    upper, _ = figures.efficiency(record).axes
    shown = line(upper, "efficiency η")
    np.testing.assert_allclose(shown.get_ydata(), efficiency, rtol=EXACT)  # NaN is equal to NaN
    assert 5 in shown.get_markevery()
    assert not upper.collections


def test_regimes_are_divided_by_lines_that_say_their_step() -> None:
    straight = np.linspace(1, 100, 100)[:, None] * np.eye(1, 9)
    slow = straight[-1] + np.linspace(0.02, 4, 900)[:, None] * np.eye(2, 9)[1]
    losses = 2.1 - np.concatenate([np.linspace(0.001, 0.1, 100), np.linspace(0.102, 1.9, 900)])
    chosen = sorted({*range(1, 101), *np.geomspace(100, 1000, 60).astype(int).tolist()})
    record = record_of(
        np.concatenate([straight, slow])[np.array(chosen) - 1], losses[np.array(chosen) - 1], steps=chosen
    )
    regimes = record.regimes()
    assert len(regimes) >= 2
    for axes in figures.efficiency(record).axes:
        at = [float(x.get_xdata()[0]) for x in axes.lines if list(x.get_ydata()) == [0, 1]]
        assert at == [r.last_step for r in regimes[:-1]]
    upper, lower = figures.efficiency(record).axes
    assert [t.get_text() for t in lower.texts] == [f"step {r.last_step}" for r in regimes[:-1]]
    shown = [t.get_text() for t in upper.texts]
    assert [float(t.partition("η ")[2].replace("−", "-")) for t in shown] == [
        float(f"{r.efficiency:.2g}") for r in regimes
    ]


def test_a_row_of_the_start_has_no_place_on_a_logarithmic_axis() -> None:
    record = record_of(wandering(5), steps=[0, 1, 2, 3, 4], elapsed=1.0)
    assert line(figures.efficiency(record).axes[0], "efficiency η").get_xdata().tolist() == [1, 2, 3, 4]


# --- windows


def plain_windows(record: RunRecord, starts: Any, ends: Any) -> Any:
    """η(s, t) by loops over the record's columns and sketches, from its definition."""
    rows = {int(step): place for place, step in enumerate(record.columns["step"])}
    sketch = {int(s): v.astype(float) for s, v in zip(record.sketch_steps, record.sketches, strict=True)}
    sketch[0] = np.zeros(SKETCH_SIZE)

    def at(name: str, step: int) -> float:
        return float(record.columns[name][rows[step]]) if step else 0.0

    found = np.full((len(starts), len(ends)), np.nan)
    for row, s in enumerate(starts):
        for column, t in enumerate(ends):
            if s < t:
                time, action, drop, work = (at(n, t) - at(n, s) for n in ("elapsed", "action", "loss_drop", "work_ito"))
                value = ((sketch[t] - sketch[s]) ** 2).sum() / (time * action) / (drop / work) if drop > 0 else math.nan
                found[row, column] = value
    return found


def mesh(figure: Figure) -> Any:
    (found,) = [c for c in figure.axes[0].collections if isinstance(c, QuadMesh)]
    return found


def test_windows_show_eta_of_every_window() -> None:
    losses = np.linspace(2, 1, 30)
    losses[12:16] = 2.05  # windows that end here have risen
    record = record_of(wandering(30), losses)
    figure = figures.windows(record)
    ends = list(range(1, 31))
    expected = plain_windows(record, [0, *ends[:-1]], ends)
    shown = np.ma.filled(mesh(figure).get_array(), np.nan).reshape(30, 30)
    np.testing.assert_allclose(shown, expected, rtol=SINGLE)
    assert np.isnan(expected[np.triu_indices(30)]).any()
    # Each column lies about its t on the logarithmic axis, and so do the rows but that of the start.
    across = mesh(figure).get_coordinates()[0, :, 0]
    assert ((across[:-1] < ends) & (ends < across[1:])).all()
    up = mesh(figure).get_coordinates()[:, 0, 1]
    assert ((up[1:-1] < ends[:-1]) & (ends[:-1] < up[2:])).all()
    assert figure.axes[0].get_yticklabels()[0].get_text() == "0"
    assert up[0] < figure.axes[0].get_yticks()[0] < up[1]


def test_windows_hatch_what_is_undefined() -> None:
    """The hatched boxes cover exactly the undefined windows: their area in cells."""
    losses = np.linspace(2, 1, 12)
    losses[5:8] = 2.3
    record = record_of(wandering(12), losses)
    figure = figures.windows(record)
    (hatched,) = [c for c in figure.axes[0].collections if isinstance(c, PolyCollection)]
    across, up = mesh(figure).get_coordinates()[0, :, 0], mesh(figure).get_coordinates()[:, 0, 1]
    covered = np.zeros((12, 12), dtype=bool)
    for path in hatched.get_paths():
        (x0, y0), (x1, y1) = path.vertices.min(0), path.vertices.max(0)
        middle_x, middle_y = (across[:-1] + across[1:]) / 2, (up[:-1] + up[1:]) / 2
        covered |= ((x0 < middle_x) & (middle_x < x1))[None] & ((y0 < middle_y) & (middle_y < y1))[:, None]
    undefined = np.triu(np.isnan(plain_windows(record, range(12), range(1, 13))))
    assert undefined.any()
    np.testing.assert_array_equal(covered, undefined)
    assert hatched.get_hatch()
    assert "hatched: undefined" in figure.axes[0].texts[0].get_text()


def test_the_colour_bar_holds_all_values_or_says_that_some_are_lower() -> None:
    figure = drawn(figures.windows(record_of(wandering(30))))
    values = mesh(figure).get_array().compressed()
    assert mesh(figure).norm.vmax >= values.max()
    bar = mesh(figure).colorbar
    assert (bar.extend == "min") == (values.min() < mesh(figure).norm.vmin)
    assert mesh(figure).cmap.name == "cividis"


def test_edges_are_log_spaced_and_few() -> None:
    steps = np.arange(10, 20001, 10)
    found = log_spaced(steps, MOST_EDGES)
    assert len(found) <= MOST_EDGES
    assert (found[0], found[-1]) == (10, 20000)
    assert set(found) <= set(steps)
    ratios = np.diff(np.log(found[found > 500]))  # where 10 steps are less than the spacing
    assert ratios.max() / ratios.min() < 1.25  # a step is 2 % there, the spacing 19 %
    assert log_spaced(steps[:7], MOST_EDGES) is not None
    np.testing.assert_array_equal(log_spaced(steps[:7], MOST_EDGES), steps[:7])


# --- trajectories


def paths_of(figure: Figure, names: Any) -> Any:
    return [np.stack(line(figure.axes[0], name).get_data(), 1) for name in names]


def test_trajectories_are_those_of_an_svd_of_all_sketches() -> None:
    walks = {"a": wandering(30, seed=1), "b": 5 * wandering(60, seed=2)[:, ::-1], "c": wandering(11, seed=3)}
    figure = figures.trajectories({name: record_of(walk) for name, walk in walks.items()})
    scaled = np.concatenate([w / np.linalg.norm(w) for w in walks.values()])
    _, singular, directions = np.linalg.svd(scaled, full_matrices=False)
    shares = singular[:2] ** 2 / 3  # the sum of squares of each run is 1
    for shown, walk in zip(paths_of(figure, walks), walks.values(), strict=True):
        expected = np.concatenate([np.zeros((1, 2)), walk @ directions[:2].T])
        signs = np.sign((shown * expected).sum(0))
        np.testing.assert_allclose(shown, expected * signs, atol=SINGLE * np.abs(walk).max())
    numbers = [
        float(x) for x in re.findall(r"([\d.]+) %", f"{figure.axes[0].get_xlabel()} {figure.axes[0].get_ylabel()}")
    ]
    np.testing.assert_allclose(numbers, 100 * shares, rtol=5e-3)  # three digits
    assert f"{100 * shares.sum():.3g} %" in figure.axes[0].get_title(loc="left")


def test_a_run_that_moves_farther_does_not_choose_the_directions() -> None:
    a, b = wandering(30, seed=1), wandering(30, seed=2)[:, ::-1]
    near = figures.trajectories({"a": record_of(a), "b": record_of(b)})
    far = figures.trajectories({"a": record_of(a), "b": record_of(100 * b)})
    (a_near, b_near), (a_far, b_far) = (paths_of(f, "ab") for f in (near, far))
    np.testing.assert_allclose(a_far, a_near, atol=1e-5)
    np.testing.assert_allclose(b_far, 100 * b_near, atol=1e-3)


def test_directions_from_a_part_of_many_sketches_are_nearly_those_of_all() -> None:
    """20 runs of 100 sketches: 30 of each choose. What they lose of the share is of second order in the angle."""
    walks = [wandering(100, seed=seed, noise=0.5) for seed in range(20)]
    figure = figures.trajectories({str(i): record_of(walk) for i, walk in enumerate(walks)})
    singular = np.linalg.svd(np.concatenate([w / np.linalg.norm(w) for w in walks]), compute_uv=False)
    shown = [float(x) for x in re.findall(r"([\d.]+) %", figure.axes[0].get_title(loc="left"))]
    best = 100 * (singular[:2] ** 2).sum() / 20
    assert best - 1 < shown[0] <= best + 0.05  # rounded to three digits
    assert len(figure.axes[0].get_legend().get_texts()) == 2  # too many to name: start and end


def test_motion_in_one_direction_has_no_second_one() -> None:
    figure = figures.trajectories(record_of(np.linspace(0.1, 1, 8)[:, None] * np.eye(1, 9)))
    path = np.stack(figure.axes[0].lines[0].get_data(), 1)
    np.testing.assert_allclose(path, np.stack([[0, *np.linspace(0.1, 1, 8)], np.zeros(9)], 1), atol=SINGLE)
    assert figure.axes[0].get_ylabel() == "direction 2: 0 %"


def test_sketches_that_are_not_finite_are_left_out() -> None:
    walk = wandering(20)
    whole = figures.trajectories(record_of(walk[:15]))
    walk[15:] = np.inf
    broken = figures.trajectories(record_of(walk))
    np.testing.assert_allclose(
        np.stack(broken.axes[0].lines[0].get_data()), np.stack(whole.axes[0].lines[0].get_data()), atol=1e-12
    )


def test_trajectories_of_two_models_are_refused() -> None:
    runs = {str(n): record_of(wandering(5), run={"parameters": n}) for n in (10, 20)}
    with pytest.raises(ValueError, match=r"got models of 10 \(10\), 20 \(20\) parameters"):
        figures.trajectories(runs)


# --- work balance


def test_work_balance_bars_are_the_shares_of_the_work() -> None:
    """Widths by d, d − a, W − 2d + a over W; a negative one to the left of 0, the others to its right."""
    cases = {"plain": (5.0, 2.0, 1.0), "beyond": (5.0, 4.0, 1.0), "rose": (5.0, -1.0, 0.5)}
    runs = {name: record_of(wandering(3), conversion=d / w, signal_fraction=a / w) for name, (w, d, a) in cases.items()}
    axes = figures.work_balance(runs).axes[0]
    bars = [bar for container in axes.containers for bar in container]
    assert [t.get_text() for t in axes.get_yticklabels()] == list(cases)
    for place, (w, d, a) in enumerate(cases.values()):
        own = [bar for bar in bars if abs(bar.get_y() + bar.get_height() / 2 - place) < 0.01]
        expected = [d / w, (d - a) / w, (w - 2 * d + a) / w]
        np.testing.assert_allclose([bar.get_width() for bar in own], expected, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(sum(bar.get_width() for bar in own), 1, rtol=1e-12)
        for sign in (1, -1):
            side = [bar for bar in own if sign * bar.get_width() > 0]
            edges = [0.0]
            for bar in side:  # one after the other, away from 0
                assert bar.get_x() == pytest.approx(edges[-1], abs=1e-12)
                edges.append(bar.get_x() + bar.get_width())
    assert axes.get_xlim()[0] < min(-1 / 5 - 1.5 / 5, (5 - 8 + 1) / 5)
    assert "negative parts to the left of 0" in axes.get_xlabel()


def test_work_balance_names_a_run_whose_balance_is_undefined() -> None:
    runs = {"known": record_of(wandering(3), conversion=0.5), "unknown": record_of(wandering(3), conversion=np.nan)}
    axes = figures.work_balance(runs).axes[0]
    assert [t.get_position()[1] for t in axes.texts if t.get_text() == "undefined"] == [1]
    assert "negative" not in axes.get_xlabel()


# --- layers


def with_clouds(steps: Any, values: dict[str, Any]) -> RunRecord:
    record = record_of(wandering(20))
    for place, step in enumerate(steps):
        layers = {}
        for name, (particles, moved, reached) in values.items():
            w, d = reached[place], moved[place]
            row = {"wasserstein2": w, "wasserstein2_lower": 0.9 * w, "displacement": d}
            layers[name] = {"particles": particles, **row, "identity_excess": d**2 / w**2 - 1}
        record.add_clouds(step, layers)
    return record


def test_layers_show_the_last_clouds_and_the_way_there() -> None:
    values = {"first": (8, [1.0, 2.0, 3.2], [0.9, 1.5, 2.0]), "second": (3, [0.5, 0.6, 0.7], [0.5, 0.6, 0.7])}
    left, right = figures.layers(with_clouds([5, 10, 20], values)).axes
    assert [t.get_text() for t in left.get_yticklabels()] == ["first (8)", "second (3)"]
    np.testing.assert_allclose(line(left, "W₂: √(N W₂²)").get_xdata(), [2.0, 0.7], rtol=EXACT)
    np.testing.assert_allclose(line(left, "displacement").get_xdata(), [3.2, 0.7], rtol=EXACT)
    (bars,) = left.containers
    ends = [path.vertices[:, 0].tolist() for path in bars[2][0].get_paths()]
    np.testing.assert_allclose(ends, [[1.8, 2.0], [0.63, 0.7]], rtol=EXACT)  # from the certified lower bound
    assert [t.get_text() for t in left.texts] == ["excess 1.6", "excess 0"]  # 3.2²/2² − 1 = 1.56, two digits
    assert "step 20" in left.get_title(loc="left")
    for name, (_, _, reached) in values.items():
        assert line(right, name).get_xdata().tolist() == [5, 10, 20]
        np.testing.assert_allclose(line(right, name).get_ydata(), reached, rtol=EXACT)


def test_of_very_many_layers_those_that_moved_most_are_drawn() -> None:
    many = {f"layer {k}": (4, [1.0 + k % 400], [1.0]) for k in range(500)}
    (panel,) = figures.layers(with_clouds([20], many)).axes
    shown = [label.get_text() for label in panel.get_yticklabels()]
    assert shown == [f"layer {k} (4)" for k in range(280, 400)]
    assert panel.get_ylabel() == "the 120 of 500 layers that moved most"
    (panel,) = figures.layers(with_clouds([20], {name: many[name] for name in list(many)[:60]})).axes
    assert panel.get_ylabel() == ""


def test_layers_of_one_measurement_have_no_way_and_many_layers_are_grey() -> None:
    assert len(figures.layers(with_clouds([20], {"only": (2, [1.0], [1.0])})).axes) == 1
    many = {f"layer {n}": (4, [0.1, 1.0 + n], [0.1, 1.0 + n]) for n in range(12)}
    _, right = figures.layers(with_clouds([10, 20], many)).axes
    named = [x.get_label() for x in right.lines if not x.get_label().startswith("_")]
    assert named == [f"layer {n}" for n in range(5, 12)]  # the 7 largest, in the model's order
    assert "(grey: 5 others)" in right.get_title(loc="left")


# --- plane


def points_of(times: Any, actions: Any, names: Any = None, **more: Any) -> list[PlanePoint]:
    names = names or [f"run {i}" for i in range(len(times))]
    pairs = list(zip(times, actions, strict=True))
    best = [not any(x < t and y < a for x, y in pairs) for t, a in pairs]
    rows = zip(names, times, actions, best, strict=True)
    return [PlanePoint(n, t, a, (0.3 * t * a) ** 0.5, **more, on_frontier=f) for n, t, a, f in rows]


def labels(figure: Figure) -> dict[str, Any]:
    """Name → box in pixels, as it is drawn."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.canvas.draw()
    # Without the line that leads to the point.
    return {t.get_text(): Text.get_window_extent(t, renderer) for t in figure.axes[0].texts}


def test_plane_shows_points_intervals_hyperbolas_and_the_frontier() -> None:
    times, actions = [100.0, 200.0, 400.0, 300.0], [9.0, 4.0, 1.0, 8.0]
    points = [
        PlanePoint(
            p.name,
            p.elapsed,
            p.action,
            p.displacement,
            (0.9 * p.elapsed, 1.2 * p.elapsed),
            (0.5 * p.action, 2 * p.action),
            p.on_frontier,
        )
        for p in points_of(times, actions)
    ]
    axes = figures.plane(points).axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    (stairs,) = [x for x in axes.lines if x.get_drawstyle() == "steps-post"]
    assert stairs.get_xdata().tolist() == [100, 200, 400]
    assert stairs.get_ydata().tolist() == [9, 4, 1]
    straight = [x for x in axes.lines if len(x.get_xdata()) == 2 and x is not stairs]
    products = [(x.get_xdata() * x.get_ydata()).tolist() for x in straight]
    np.testing.assert_allclose(products, [[p.displacement**2] * 2 for p in points], rtol=1e-12)
    for container, point in zip(axes.containers, points, strict=True):
        across, up = (bars.get_paths()[0].vertices for bars in container[2])
        np.testing.assert_allclose(across[:, 0], [0.9 * point.elapsed, 1.2 * point.elapsed], rtol=1e-12)
        np.testing.assert_allclose(up[:, 1], [0.5 * point.action, 2 * point.action], rtol=1e-12)
    low, high = axes.get_ylim()
    assert low < 0.5
    assert high > 18


CROWDS = {
    "spread": lambda r: (np.exp(5 + 0.8 * r.standard_normal(10)), np.exp(r.standard_normal(10))),
    "clustered": lambda r: (np.exp(5 + 0.03 * r.standard_normal(10)), np.exp(0.03 * r.standard_normal(10))),
    "in two corners": lambda r: (np.repeat([10.0, 1000.0], 5) * np.linspace(1, 1.01, 10), np.repeat([50.0, 0.1], 5)),
    "the same": lambda r: (np.full(10, 200.0), np.full(10, 3.0)),
}


@pytest.mark.parametrize("crowd", CROWDS)
def test_names_of_ten_runs_are_not_upon_each_other(crowd: str) -> None:
    for seed in range(2 if crowd == "clustered" else 1):
        times, actions = CROWDS[crowd](np.random.default_rng(seed))
        names = [f"AdamW lr={i}e-3 batch=128" for i in range(10)]
        figure = figures.plane(points_of(times.tolist(), actions.tolist(), names))
        boxes = labels(figure)
        assert set(boxes) == set(names)
        inside = figure.axes[0].get_window_extent()
        for name, box in boxes.items():
            assert inside.x0 <= box.x0
            assert box.x1 <= inside.x1
            assert inside.y0 <= box.y0
            assert box.y1 <= inside.y1
            assert not [other for other in boxes if other != name and box.overlaps(boxes[other])], (crowd, seed, name)


def test_of_two_hundred_runs_the_frontier_alone_is_named() -> None:
    random_ = np.random.default_rng(0)
    times = 200 * np.exp(0.8 * random_.standard_normal(200))
    actions = 900 / times * np.exp(0.9 * np.abs(random_.standard_normal(200)))
    points = points_of(times.tolist(), actions.tolist())
    figure = figures.plane(points)
    assert set(labels(figure)) == {p.name for p in points if p.on_frontier}
    (rest,) = [x for x in figure.axes[0].lines if x.get_color() == style.GREY and x.get_marker() == "o"]
    assert len(rest.get_xdata()) == sum(not p.on_frontier for p in points) > 150


def test_plane_names_who_has_no_place_on_it() -> None:
    points = [*points_of([100.0], [2.0]), PlanePoint("lost", math.nan, math.nan, 1.0), PlanePoint("there", 0, 0, 0)]
    told = figures.plane(points).axes[0].get_xlabel()
    assert told.endswith("not drawn, for their time or action is 0 or unknown: lost, there")
    assert "sum of learning rates" in figures.plane(points[:1], clock="lr").axes[0].get_xlabel()


@pytest.mark.parametrize("interval", [(math.nan, 3.0), (-1.0, 4.0), (0.5, math.inf), (2.0, 2.0)])
def test_plane_takes_intervals_of_every_kind(interval: tuple[float, float]) -> None:
    figure = drawn(figures.plane(points_of([100.0, 50.0], [2.0, 2.0], action_interval=interval)))
    assert len(figures.png(figure)) > 1000


# --- curves


def test_curves_show_medians_of_stretches() -> None:
    """With 200 rows: 24 stretches that are equally long in log(step), recomputed from their definition."""
    losses = 2 / np.arange(1, 201) ** 0.5
    losses[77] = 40.0
    record = record_of(wandering(200), losses)
    left, right = figures.curves({"only": record}).axes
    bounds = np.geomspace(1, 200, 24)
    groups = [losses[:1]] + [
        losses[(steps > low) & (steps <= high)]
        for low, high in pairwise(bounds)
        if ((steps := np.arange(1, 201) - 1e-9) > low).any()
    ]
    expected = [np.median(group) for group in groups if len(group)]
    np.testing.assert_allclose(line(left, "only").get_ydata(), expected, rtol=EXACT)
    np.testing.assert_array_equal(line(right, "only").get_xdata(), line(left, "only").get_ydata())
    ends = line(left, "only").get_xdata().astype(int)
    np.testing.assert_allclose(line(right, "only").get_ydata(), record.columns["action"][ends - 1], rtol=EXACT)
    assert right.get_xlim()[0] > right.get_xlim()[1]  # a run goes to the right


def test_replicas_have_the_colour_of_their_group_everywhere() -> None:
    """In the order of the groups, whichever of them a figure has; one name for each in the legend."""
    groups = {"a0": "a", "b0": "b", "b1": "b", "c0": "c"}
    runs = {name: record_of(wandering(20)) for name in ("b0", "c0", "b1")}
    place = {"b": 1, "c": 2}
    for figure, every in ((figures.curves(runs, groups=groups), 1), (figures.trajectories(runs, groups=groups), 2)):
        for panel in figure.axes:  # a path's end has a mark of its own
            colours = [line.get_color() for line in panel.lines[: 3 * every : every]]
            assert colours == [style.COLOURS[place[groups[name]]] for name in runs]
    legend = figures.curves(runs, groups=groups).axes[1].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["b", "c"]
    (point,) = points_of([10.0], [2.0])
    assert figures.plane([replace(point, place=2)]).axes[0].lines[-1].get_color() == style.COLOURS[2]


def test_curves_over_what_was_paid() -> None:
    record = record_of(wandering(30), 2 / np.arange(1, 31))
    for step, row in zip(record.columns["step"], [{"samples": 64.0 * k} for k in range(1, 31)], strict=True):
        if step == 30:
            record.amend(row)
    left = figures.curves({"only": record}, cost="samples").axes[0]
    assert left.get_xlabel() == "samples"
    known = line(left, "only").get_xdata()
    assert known[np.isfinite(known)].tolist() == [64.0 * 30]


# --- what has nothing to show


@pytest.mark.parametrize("name", [*figures.OF_ONE_RUN, "curves"])
def test_an_empty_record_is_told_so(name: str) -> None:
    with pytest.raises(ValueError, match=r"needs? .* got \d.*; "):
        getattr(figures, name)(RunRecord())


def test_one_without_points_is_told_so() -> None:
    with pytest.raises(ValueError, match="got 1 points and none"):
        figures.plane([PlanePoint("lost", math.nan, 1.0, 1.0)])


def test_available_is_what_can_be_drawn() -> None:
    whole = with_clouds([10, 20], {"first": (8, [1.0, 2.0], [0.9, 1.5])})
    assert list(figures.available(whole)) == ["efficiency", "windows", "trajectories", "work_balance", "layers"]
    assert all(isinstance(figure, Figure) for figure in figures.available(whole).values())
    risen = record_of(wandering(9), np.linspace(2.1, 3, 9), loss_drop_se=0.1)
    assert "windows" not in figures.available(risen)
    assert list(figures.available(RunRecord())) == []
    diverged = record_of(np.full((4, 9), np.nan), np.full(4, np.inf), **dict.fromkeys(["conversion"], np.nan))
    assert set(figures.available(diverged)) <= {"efficiency"}


def test_an_error_of_ours_is_not_taken_for_nothing_to_show(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(record: RunRecord) -> Figure:
        raise ValueError("a fault")

    monkeypatch.setitem(figures.OF_ONE_RUN, "windows", broken)
    with pytest.raises(ValueError, match="a fault"):
        figures.available(record_of(wandering(5)))


def test_long_records_are_drawn_quickly_and_small() -> None:
    """20,000 rows: the SVG is simplified, not one point per row."""
    record = record_of(wandering(20))
    for step in range(21, 20021):
        record.append(step, {"efficiency": 0.5 + 0.1 * math.sin(step / 900), "conversion": 0.4})
    assert len(figures.svg(figures.efficiency(record))) < 400_000


# --- SVG and PNG


def all_figures() -> dict[str, Figure]:
    whole = with_clouds([10, 20], {"first": (8, [1.0, 2.0], [0.9, 1.5])})
    plane = figures.plane(points_of([100.0, 200.0], [9.0, 4.0], ["a & b", "c < d"]))
    return {**figures.available(whole), "plane": plane, "curves": figures.curves({"a": whole})}


@pytest.fixture(scope="module")
def written() -> dict[str, str]:
    """Every figure as SVG."""
    return {name: figures.svg(figure) for name, figure in all_figures().items()}


def test_svg_is_an_element_that_a_page_can_hold(written: dict[str, str]) -> None:
    """Well-formed, its references within itself, in the page's colours, of no address and no page-wide rule."""
    seen: set[str] = set()
    for name, text in written.items():
        root = ElementTree.fromstring(text)
        assert text.startswith("<svg "), name
        assert root.attrib["role"] == "img"
        assert root.attrib["aria-label"] == root.findtext(f"{SVG}title") != "Figure"
        assert len(root.findtext(f"{SVG}desc") or "") > 20
        assert not [e for e in root.iter() if e.tag.rpartition("}")[2] in ("style", "metadata", "script")]
        assert set(re.findall(r"https?://[^\"' )]*", text)) == {"http://www.w3.org/2000/svg"}, name
        ids = re.findall(r'\bid="([^"]*)"', text)
        assert len(ids) == len(set(ids))
        assert not seen.intersection(ids), name
        seen.update(ids)
        refers = set(re.findall(r"url\(#([^)]*)\)", text)) | set(re.findall(r'href="#([^"]*)"', text))
        assert refers
        assert refers <= set(ids), name
        assert "currentColor" in text
        assert "var(--grid, #ddd)" in text or name == "windows"  # cells cover it there
        assert style.INK not in text
        assert len(root.findall(f".//{SVG}text")) > 5  # text is text
        assert "nan" not in re.sub(r'"data:[^"]*"', "", text)
    assert "a &amp; b" in written["plane"]
    assert "<image" in written["windows"]  # the cells are one picture, in the text itself


def test_svg_and_png_are_the_same_each_time(written: dict[str, str]) -> None:
    again = all_figures()
    for name in ("efficiency", "windows", "plane"):
        assert figures.svg(again[name]) == written[name], name
    assert figures.png(again["plane"]) == figures.png(all_figures()["plane"])
    assert figures.png(again["plane"])[:4] == b"\x89PNG"
    other = figures.svg(again["windows"], prefix="second")
    assert all(found.startswith("second-") for found in re.findall(r'\bid="([^"]*)"', other))


def test_pixels_are_the_picture_on_white() -> None:
    found = figures.pixels(figures.work_balance(record_of(wandering(3))))
    assert found.dtype == np.uint8
    assert found.shape[2] == 3
    assert found[0, 0].tolist() == [255, 255, 255]
    assert len(np.unique(found.reshape(-1, 3), axis=0)) > 10


# --- the user's matplotlib


def test_nothing_of_the_users_settings_is_read_or_changed(written: dict[str, str]) -> None:
    own = {"text.usetex": True, "font.size": 30, "axes.grid": False, "figure.facecolor": "black", "lines.linewidth": 9}
    with matplotlib.rc_context(own):
        before = dict(matplotlib.rcParams)
        changed = {name: figures.svg(figure) for name, figure in all_figures().items()}
        assert dict(matplotlib.rcParams) == before
    assert changed == written


def elsewhere(call: Any) -> Any:
    """What a call gives in another thread, while this one waits."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result(60)


def settings() -> list[dict[str, Any]]:
    """As they are read, one by one and in copies, and as they are kept."""
    known: Any = matplotlib.rcParams
    matplotlib.get_backend()  # chosen when first asked for
    copies = [known.copy(), copy.deepcopy(known), pickle.loads(pickle.dumps(known.copy()))]
    return [
        dict(known),
        {k: known[k] for k in known},
        *map(dict, copies),
        {k: dict.__getitem__(known, k) for k in known},
    ]


def test_no_setting_is_another_while_figures_are_drawn(
    monkeypatch: pytest.MonkeyPatch, written: dict[str, str]
) -> None:
    """Looked at from within what draws; matplotlib's class is there again as well."""
    places = [(Figure, "__init__"), (Axes, "plot"), (Axis, "_get_tick"), (FigureCanvasAgg, "draw")]
    places.append((FigureCanvasSVG, "print_svg"))
    reached: set[str] = set()

    def looking(name: str, real: Any) -> Any:
        def instead(*args: Any, **kwargs: Any) -> Any:
            if name not in reached and matplotlib.rcParams["font.size"] == 9:
                assert elsewhere(settings) == before
                reached.add(name)
            return real(*args, **kwargs)

        return instead

    with matplotlib.rc_context({"font.size": 30, "text.usetex": True}):
        before = settings()
        for kind, name in places:
            monkeypatch.setattr(kind, name, looking(name, getattr(kind, name)))
        figure = figures.available(record_of(wandering(9)))["work_balance"]
        figures.pixels(figure)
        figures.svg(figure)
        figures.efficiency(record_of(wandering(9)))
        assert settings() == before
    assert reached == {name for _, name in places}
    assert type(matplotlib.rcParams) is matplotlib.RcParams


def test_two_threads_that_draw_have_the_style_and_leave_the_settings(written: dict[str, str]) -> None:
    before, filters = settings(), list(warnings.filters)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: figures.svg(all_figures()["work_balance"]), range(2)))
    assert found == [written["work_balance"]] * 2
    assert settings() == before
    assert warnings.filters == filters
    assert type(matplotlib.rcParams) is matplotlib.RcParams


@pytest.mark.parametrize("fails", [True, False])
def test_what_is_set_while_a_figure_is_drawn_stays(fails: bool) -> None:
    known: Any = matplotlib.rcParams
    with matplotlib.rc_context({"font.size": 30}), warnings.catch_warnings():
        before, filters = dict(known), list(warnings.filters)
        other = ("ignore", None, DeprecationWarning, None, 7)
        try:
            with style.style(), style.style():
                assert known["font.size"] == 9
                known["figure.autolayout"] = True
                assert known["figure.autolayout"] is True  # who sets it here wants it here
                elsewhere(lambda: known.update({"legend.fontsize": 17}))
                assert known["legend.fontsize"] == 8  # who sets it there, there
                with pytest.raises(ValueError, match=r"font\.size"):
                    known["font.size"] = "a word"
                warnings.simplefilter(*other[:1], category=other[2], lineno=other[4])  # type: ignore[arg-type]
                if fails:
                    raise KeyError("drawing")
        except KeyError:
            assert fails
        assert dict(known) == before | {"figure.autolayout": True, "legend.fontsize": 17}
        assert warnings.filters == [other, *filters]
    assert type(known) is matplotlib.RcParams


def test_letters_that_the_font_lacks_warn_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    with style.style():
        drawn, axes = style.figure(height=1.0)
        axes[0, 0].set_title("\U00013080 \u0b95")
        figures.png(drawn)
        figures.png(drawn)  # and the style within the style is over
    assert not [w for w in recwarn if "Glyph" in str(w.message)]
    drawn.savefig(io.BytesIO(), format="png")
    assert [w for w in recwarn if "Glyph" in str(w.message)]


def test_no_random_number_is_drawn() -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    for figure in figures.available(record_of(wandering(20))).values():
        figures.png(figure)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_pyplot_is_not_used_and_the_package_does_without_matplotlib(tmp_path: Path) -> None:
    record_of(wandering(9)).save(tmp_path / "record")
    code = (
        "import sys, lightning_speedlimit, lightning_speedlimit.report\n"
        "from lightning_speedlimit.report import figures\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"found = figures.available(lightning_speedlimit.RunRecord.load({str(tmp_path / 'record')!r}))\n"
        "[(figures.svg(f), figures.png(f)) for f in found.values()]\n"
        "assert len(found) == 4 and 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- numbers and axes


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1, "1"),
        (0.02, "0.02"),
        (-0.5, "−0.5"),
        (20000, "20000"),
        (1e5, "10⁵"),
        (-1e-4, "−10⁻⁴"),
        (3e-5, "3·10⁻⁵"),
    ],
)
def test_ticks_are_plain_text(value: float, text: str) -> None:
    assert style.number(value) == text


def test_looks_of_fourteen_lines_differ_in_more_than_colour() -> None:
    looks = [style.look(index) for index in range(14)]
    assert len({(look["color"], look["marker"]) for look in looks}) == 14
    assert len({look["marker"] for look in looks[:7]}) == 7
    grey = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in (matplotlib.colors.to_rgb(c) for c in style.COLOURS)]
    assert grey[0] < 0.15
    assert max(grey) < 0.7  # seen on white


# --- names


def test_names_of_every_kind_are_shown_as_they_are() -> None:
    """Neither read as mathematics nor left out of a legend, and none so long that nothing else has room."""
    path = np.cumsum(np.random.default_rng(0).standard_normal((9, 5)), axis=0)
    names = {r"$\frac{$": r"$\frac{$", "$5_a$ & $6_b$": "$5_a$ & $6_b$", "_late": " _late", "a\nb\tc": "a b c"}
    names |= {"x" * 300: "x" * 35 + "…", "": "?"}
    runs = {name: record_of(path) for name in names}
    plane = figures.plane(points_of([1.0, 2, 3, 4, 5, 6], [6.0, 5, 4, 3, 2, 1], names=list(names)))
    assert {t.get_text() for t in drawn(plane).axes[0].texts} == set(names.values())
    balance = drawn(figures.work_balance(runs)).axes[0]
    assert [t.get_text() for t in balance.get_yticklabels()] == list(names.values())
    assert balance.get_position().width > 0.4
    title, legend = balance._left_title.get_window_extent(), balance.get_legend().get_window_extent()
    assert title.y0 > legend.y1 - 6, "the title stands above the legend, but for the frame's margin"
    assert balance.xaxis.label.get_window_extent().x1 <= balance.figure.bbox.x1, "what the axis says ends within"
    for figure in (figures.curves(runs), figures.trajectories(runs)):
        (legend,) = (axes.get_legend() for axes in drawn(figure).axes if axes.get_legend())
        assert set(names.values()) <= {t.get_text() for t in legend.get_texts()}
        assert figure.axes[0].get_position().width > 0.2
        ElementTree.fromstring(figures.svg(figure))


def test_names_in_letters_that_the_font_lacks_warn_of_nothing() -> None:
    point = PlanePoint("运行 🚀", elapsed=10.0, action=2.0, displacement=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = figures.plane([point])
        figures.png(drawn)
        assert "运行" in figures.svg(drawn)


def test_full_batches_have_no_noise_in_the_balance() -> None:
    """c = 0.4, s = −0.1: 0.5 bounced and 0.1 would be noise; with one step in an epoch 0.6 bounced."""
    record = RunRecord({"batches_per_epoch": 1})
    record.append(9, {"conversion": 0.4, "signal_fraction": -0.1})
    widths = [patch.get_width() for patch in figures.work_balance(record).axes[0].patches]
    assert sorted(widths)[-2:] == pytest.approx([0.4, 0.6], rel=1e-12)
    assert sum(widths) == pytest.approx(1.0, rel=1e-12)


def test_a_figure_is_as_before_when_it_was_written() -> None:
    drawn = figures.work_balance(record_of(wandering(9)))
    before = drawn.canvas, drawn.dpi, drawn.patch.get_facecolor()
    figures.svg(drawn)
    assert (drawn.canvas, drawn.dpi, drawn.patch.get_facecolor()) == before
    assert (figures.pixels(drawn)[0, 0] == 255).all()


def test_what_is_written_is_what_matplotlib_saves() -> None:
    record, buffer = record_of(wandering(9)), io.StringIO()
    with style.style(**{"svg.hashsalt": "figure"}):
        saved = figures.work_balance(record)
        saved.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    assert export._raw_svg(figures.work_balance(record)) == buffer.getvalue()


def test_a_figure_is_drawn_once_and_laid_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = figures.work_balance(record_of(wandering(9)))
    drawings, layouts = [], []
    for kind, name, seen in ((Axes, "draw", drawings), (ConstrainedLayoutEngine, "execute", layouts)):
        real = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *a, real=real, seen=seen, **k: seen.append(1) or real(*a, **k))
    figures.svg(drawn)
    assert len(drawings) == len(drawn.axes)
    assert len(layouts) == 1


# --- the plane's legend and names


def legend_of(figure: Figure) -> dict[str, Any]:
    found = figure.axes[0].get_legend()
    return dict(zip([text.get_text() for text in found.get_texts()], found.legend_handles, strict=True))


def test_the_legend_shows_what_is_drawn_in_its_line_style() -> None:
    one = figures.plane(points_of([100.0, 200.0], [2.0, 3.0]))  # the first beats the second: no stairs
    assert not [line for line in one.axes[0].lines if line.get_drawstyle() == "steps-post"]
    assert list(legend_of(one)) == ["a run's limit, τ·A = D²"]
    both = figures.plane(points_of([100.0, 200.0], [9.0, 4.0]))
    assert list(legend_of(both)) == ["a run's limit, τ·A = D²", "frontier: beaten by none in both"]
    limits = [x for x in both.axes[0].lines if x.get_linewidth() == 0.9]
    (shown, *_) = both.axes[0].get_legend().findobj(lambda part: getattr(part, "get_linewidth", int)() == 0.9)
    assert (shown.get_color(), shown.get_linestyle()) == (limits[0].get_color(), limits[0].get_linestyle())
    unknown = figures.plane([PlanePoint("lost", 100.0, 2.0, math.nan)])
    assert unknown.axes[0].get_legend() is None


@pytest.mark.parametrize("low", [0.0, 30.0])
def test_no_name_is_struck_through_by_a_bar(low: float) -> None:
    points = points_of([100.0, 120.0, 90.0], [2.0, 2.2, 1.9], ["a long name of a run", "another one", "the third"])
    points = [replace(p, elapsed_interval=(low, 400.0), action_interval=(0.6 * p.action, 2 * p.action)) for p in points]
    figure = figures.plane(points)
    boxes, panel = labels(figure), figure.axes[0]
    for point in points:
        left, up = panel.transData.transform((max(low, panel.get_xlim()[0]), point.action))
        right, _ = panel.transData.transform((400.0, point.action))
        for name, box in boxes.items():
            assert not (box.y0 < up < box.y1 and box.x0 < right and box.x1 > left), (point.name, name)


def test_a_logarithmic_axis_of_more_than_a_decade_has_several_ticks() -> None:
    figure = drawn(figures.curves({"a": straight(range(11, 277, 5), decay(100))}))
    left, right = figure.axes
    low, high = left.get_xlim()
    assert len([tick for tick in left.get_xticks() if low <= tick <= high]) >= 3
    assert right.get_ylabel() == "action A (parameter²/step)"
