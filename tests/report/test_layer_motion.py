"""Which layer moves, turns, is noise: as a table, in sentences, as a figure, on the page and in a terminal."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from damaged_records import whole_record
from in_this_process import run_here
from page_cases import HOSTILE, read

from lightning_speedlimit import RunRecord, compare
from lightning_speedlimit.cli import main
from lightning_speedlimit.report import figures, layers, page_figures

# D², A, W: 1, 2, 1 of 4, 8, 4 and so on. "noisy" has a fifth of the work, "tiny" is worse but did next to nothing.
VALUES = ("parameters", "displacement", "path_length", "action", "work_ito", "signal_fraction")
KNOWN = {
    name: dict(zip(VALUES, values, strict=True))
    for name, values in {
        "straight": (100, 2.0, 2.0, 4.0, 5.0, 0.9),
        "turning": (100, 1.0, 4.0, 8.0, 3.0, 0.5),
        "noisy": (100, 1.0, 2.0, 4.0, 2.0, 0.05),
        "tiny": (1, 0.0, 0.5, 0.01, 0.01, -3.0),
    }.items()
}


def record_with(table: dict[str, dict[str, float]], **run: Any) -> RunRecord:
    record = whole_record(steps=100)
    record.run |= run
    record.add_layers(100, table)
    return record


def test_shares_are_of_all_layers() -> None:
    found = {layer.name: layer for layer in layers.layers_of(record_with(KNOWN))}
    assert [layer.moved for layer in found.values()] == pytest.approx([4 / 6, 1 / 6, 1 / 6, 0])
    assert [layer.action for layer in found.values()] == pytest.approx([4 / 16.01, 8 / 16.01, 4 / 16.01, 0.01 / 16.01])
    assert sum(layer.work for layer in found.values()) == pytest.approx(1)
    assert found["turning"].straightness == 1 / 16
    assert layers.rows([found["turning"]]) == [["turning", "100", "17 %", "50 %", "30 %", "0.062", "0.50"]]


def test_what_is_not_known_is_not_told() -> None:
    [a, b] = layers.layers_of(record_with({"a": {"action": 1.0}, "": {"action": math.inf}}))
    assert b.name == layers.OWN
    assert math.isnan(a.moved)
    assert layers.rows([a])[0][1:3] == ["?", "?"]
    assert layers.sentences([a, b]) == []
    assert layers.sentences(layers.layers_of(record_with({"alone": KNOWN["noisy"]}))) == []
    zero = layers.layers_of(record_with({n: {"displacement": 0.0, "action": 0.0} for n in "ab"}))
    assert all(math.isnan(layer.moved) for layer in zero), "of nothing there are no shares"


def test_sentences_name_who_moves_turns_and_is_noise() -> None:
    """A layer that did next to nothing is not blamed."""
    moved, turned, noisy = layers.sentences(layers.layers_of(record_with(KNOWN)))
    assert moved == "straight moved furthest: 67 % of the squared displacement, for 25 % of the action"
    assert turned == "turning turned most: straightness 0.062, with 50 % of the action"
    assert noisy == "noisy worked most on noise: the next batch confirmed 5.0 % of its work, which is 20 % of all"
    bouncing = KNOWN | {"noisy": KNOWN["noisy"] | {"signal_fraction": -0.5}}
    *_, bounced = layers.sentences(layers.layers_of(record_with(bouncing)))
    assert bounced == "noisy bounced most: the next batch took back 50 % of its work, which is 20 % of all"


def test_the_figure_shows_each_layer() -> None:
    shares, straightness, signal = figures.layer_motion(record_with(KNOWN)).axes
    assert [label.get_text() for label in shares.get_yticklabels()] == list(KNOWN)
    assert [bar.get_width() for bar in shares.patches] == pytest.approx([4 / 16.01, 8 / 16.01, 4 / 16.01, 0.01 / 16.01])
    for panel, values in ((straightness, [1, 1 / 16, 1 / 4, 0]), (signal, [0.9, 0.5, 0.05, -3])):
        assert panel.lines[0].get_xdata().tolist() == pytest.approx(values)
    assert "turning turned most" in figures.svg(figures.layer_motion(record_with(KNOWN)))


def test_of_very_many_layers_those_with_the_largest_action_are_drawn() -> None:
    many = {f"layer {i}": {"displacement": 1.0, "action": float(i)} for i in range(300)}
    shares, *_ = figures.layer_motion(record_with(many)).axes
    assert [label.get_text() for label in shares.get_yticklabels()] == list(many)[180:]
    assert shares.get_ylabel() == "the 120 of 300 layers with the largest action"


@pytest.mark.parametrize("table", [{}, {"alone": {"action": 1.0}}], ids=["none", "one"])
def test_there_is_no_figure_of_less_than_two_layers(table: dict[str, dict[str, float]]) -> None:
    with pytest.raises(figures.NothingToDraw, match=f"two layers at least, got {len(table)}"):
        figures.layer_motion(record_with(table))


def test_diverged_layers_are_drawn() -> None:
    wild = {n: dict.fromkeys(VALUES, x) for n, x in {"a": math.inf, "b": 1e308, "c": -1e308, "d": math.nan}.items()}
    assert "<svg" in figures.svg(figures.layer_motion(record_with(wild)))


def test_loggers_get_no_figure_of_it() -> None:
    assert "layer_motion" not in figures.OF_ONE_RUN


def test_the_page_has_the_figure_and_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    def quick(key: str, title: str, caption: str, draw: object) -> page_figures.Picture:
        drawn.append(key.partition("-r1-")[2])
        return page_figures.Picture(key, title, caption, svg="", missing="quick")

    monkeypatch.setattr(page_figures, "_picture", quick)
    root = read(compare({"run": record_with({HOSTILE: KNOWN["noisy"], **KNOWN})}, by="step").html())
    assert "layer_motion" in drawn
    [table] = [t for t in root.all("table") if t.all("th")[0].text == "layer"]
    cells = [[cell.text for cell in row.all("th", "td")] for row in table.all("tr")]
    assert cells[0] == list(layers.HEADS)
    assert [row[0] for row in cells[1:]] == [HOSTILE, *KNOWN]
    drawn.clear()
    root = read(compare({"run": record_with({})}, by="step").html())
    assert "layer_motion" not in drawn
    assert not [t for t in root.all("table") if t.all("th")[0].text == "layer"]


def test_a_notebook_has_the_table_folded() -> None:
    root = read(record_with({HOSTILE: KNOWN["noisy"], **KNOWN})._repr_html_())
    [table] = [t for d in root.all("details") for t in d.all("table") if t.all("th")[0].text == "layer"]
    assert [row.all("th")[0].text for row in table.all("tr")[1:]] == [HOSTILE, *KNOWN]
    assert "layer" not in [t.all("th")[0].text for t in read(whole_record()._repr_html_()).all("table")]


def shown(folder: Path, *options: str) -> str:
    done = run_here(main, ["speedlimit", "show", str(folder), *options], folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_show_prints_them_when_asked(tmp_path: Path) -> None:
    record_with(KNOWN).save(tmp_path / "new")
    whole_record().save(tmp_path / "old")
    assert "turning" not in shown(tmp_path / "new")
    printed = shown(tmp_path / "new", "--layers")
    assert "Layers, at step 100" in printed
    assert "- turning turned most: straightness 0.062" in printed
    assert "Layers are not known" in shown(tmp_path / "old", "--layers")
    found = json.loads(shown(tmp_path / "new", "--json"))["layers"]
    assert [layer["name"] for layer in found] == list(KNOWN)
    assert found[1]["straightness"] == 1 / 16
