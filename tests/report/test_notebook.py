"""What a notebook shows of summaries, runs and comparisons, and the tables that pandas gets."""

from __future__ import annotations

import html
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_cases import FAST, HOSTILE, LEVEL, SEEDS, Element, comparison, read

from lightning_speedlimit import RunRecord, compare
from lightning_speedlimit.display import Page, painters
from lightning_speedlimit.record import Summary
from lightning_speedlimit.report import Comparison, notebook, page_figures, text

Shown = Summary | RunRecord | Comparison


@pytest.fixture(scope="module")
def compared() -> Comparison:
    return comparison()


@pytest.fixture(scope="module")
def record() -> RunRecord:
    """Of a run whose every name is hostile."""
    optimizers = [{"class": HOSTILE, "groups": [{"lr": 0.5}]}]
    found = FAST.record(0, model=HOSTILE, optimizers=optimizers)
    found.amend({}, {HOSTILE: HOSTILE})
    return found


@pytest.fixture(scope="module", params=["comparison", "record", "summary"])
def shown(request: pytest.FixtureRequest, compared: Comparison, record: RunRecord) -> tuple[Shown, Element]:
    """Each with the HTML that is shown of it, read as a tree."""
    found = {"comparison": compared, "record": record, "summary": record.summary()}[request.param]
    return found, read(found._repr_html_())


@pytest.fixture
def quick_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without figures."""
    monkeypatch.setattr(page_figures, "_picture", lambda *given: page_figures.Picture(*given[:3], svg="", missing="x"))


def rows_of(table: Element) -> list[list[str]]:
    return [[cell.text for cell in row.all("th", "td")] for row in table.all("tr")]


# --- inline


def test_it_is_text_and_figures_and_nothing_that_runs(shown: tuple[Shown, Element]) -> None:
    _, root = shown
    assert not root.all("script", "iframe", "img", "link", "object", "embed", "form")
    for element in root:
        assert not [name for name in element.attributes if name.startswith("on")], element.tag
        assert not any("javascript:" in (value or "") for value in element.attributes.values())
    assert HOSTILE in root.text


def test_its_styles_hold_for_nothing_else_of_the_notebook(shown: tuple[Shown, Element]) -> None:
    _, root = shown
    [frame] = root.children
    assert frame["class"] == "speedlimit"
    [style] = root.all("style")
    rules = re.sub(r"/\*.*?\*/", "", "".join(style.texts))
    selectors = [part.strip() for rule in re.findall(r"([^{}]+)\{", rules) for part in rule.split(",")]
    assert len(selectors) > 5
    assert [s for s in selectors if not s.startswith(".speedlimit ") and s != ".speedlimit"] == []


def test_a_comparison_shows_its_table_its_verdict_and_the_plane(compared: Comparison) -> None:
    root = read(compared._repr_html_())
    columns = text.shown_columns(compared)
    table = root.all("table")[0]
    assert rows_of(table) == [text.head(compared, columns), *text.rows(compared, columns, " *")]
    assert [row[0][-1] == "*" for row in rows_of(table)[1:]] == [True, True, False, False]
    for sentence in (*compared.verdict(), *text.costliest(compared), *compared.notes):
        assert sentence in root.text
    [plane] = root.all("svg")
    assert "action" in plane["aria-label"]


def test_a_run_shows_its_summary_its_figures_and_what_cost_the_most(record: RunRecord) -> None:
    root = read(record._repr_html_())
    assert record.summary().sentence() in root.text
    assert [svg["aria-label"] for svg in root.all("svg")] == ["How close to the speed limit", "Where the work went"]
    rows = {row[0]: row[1] for table in root.all("table") for row in rows_of(table)}
    assert rows["conversion"] == "0.400"
    assert rows["straightness"] == f"{FAST.straightness:.3g}"
    assert "Batch noise took" in root.text
    folded = [summary.text for summary in root.all("summary")]
    assert folded == ["How close to the speed limit", "What that rests on"]


def test_ids_of_several_figures_in_one_notebook_differ(record: RunRecord) -> None:
    other = SEEDS[0].record()
    ids = [{e["id"] for e in read(shown._repr_html_()) if e["id"]} for shown in (record, other)]
    assert all(ids)
    assert not ids[0] & ids[1]
    assert record._repr_html_() == record._repr_html_(), "a notebook that is run again has no changes"


@pytest.mark.parametrize("library", ["matplotlib", "jinja2"])
def test_without_the_libraries_it_is_the_text(
    library: str, compared: Comparison, record: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    for shown, wanted in (
        (compared, str(compared)),
        (record, f"{record!r}\n\n{record.summary()}"),
        (record.summary(), str(record.summary())),
    ):
        assert shown._repr_html_() == f"<pre>{html.escape(wanted)}</pre>"


def test_a_run_of_which_nothing_is_known_shows_itself() -> None:
    diverged = RunRecord()
    for step in (1, 2, 3):
        diverged.append(step, dict.fromkeys(("loss", "action", "elapsed", "efficiency", "work_ito"), math.inf * step))
    for shown in (RunRecord(), diverged, Summary()):
        assert not read(shown._repr_html_()).all("svg")
    assert "Nothing was measured" in RunRecord()._repr_html_()
    alone = compare([SEEDS[0].record()], by="step", at=8)
    assert "after 8" in read(alone._repr_html_()).text


def test_who_registers_is_asked_first_and_may_pass(record: RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: object) -> str:
        raise ImportError("no such library")

    monkeypatch.setattr("lightning_speedlimit.display.painters", [absent, repr])
    assert record._repr_html_() == repr(record)
    assert len(painters) == 1, "the package registers once"


def test_other_things_are_refused() -> None:
    with pytest.raises(TypeError, match="shown got int, wanted a Summary, a RunRecord or a Comparison"):
        notebook.html(3)


# --- short reprs


@pytest.mark.usefixtures("quick_page")
def test_reprs_are_a_line(compared: Comparison, record: RunRecord) -> None:
    named = compare({"x\n" * 5000: SEEDS[0].record(), "y" * 5000: FAST.record()})
    for shown in (compared, named, record, RunRecord(), record.summary(), Summary(), named.html()):
        assert "\n" not in repr(shown)
        assert len(repr(shown)) < 400
    assert repr(record.summary()).startswith("Summary(steps=120, loss=0.00248, efficiency=")
    assert repr(compared).startswith("Comparison(4 groups, 5 runs, at the same loss, 0.500; frontier: ")


# --- the page


@pytest.mark.usefixtures("quick_page")
def test_the_page_comes_without_a_path_and_in_a_frame(compared: Comparison, tmp_path: Path) -> None:
    page = compared.html()
    assert isinstance(page, Page)
    assert page.startswith("<!doctype html>")
    [frame] = read(page._repr_html_()).all("iframe")
    assert frame["srcdoc"] == page
    assert frame["sandbox"] == "allow-scripts", "not the notebook's origin"
    written = compared.html(tmp_path / "page.html")
    assert written == page == (tmp_path / "page.html").read_text("utf-8")


# --- pandas


def test_a_run_as_a_data_frame(record: RunRecord) -> None:
    pytest.importorskip("pandas", reason="the extra 'pandas' is not installed")
    record = RunRecord.from_state_dict(record.state_dict())
    record.append(200, {"late": 1.0})
    frame, columns = record.to_dataframe(), record.columns
    assert frame.index.name == "step"
    assert frame.index.tolist() == columns.pop("step").tolist()
    assert list(frame) == list(columns)
    for name, values in columns.items():
        np.testing.assert_array_equal(frame[name].to_numpy(), values)
    frame.iloc[:, :] = 0.0
    assert record.columns["late"][-1] == 1.0, "a copy"
    assert RunRecord().to_dataframe().shape == (0, 0)


def test_a_comparison_as_a_data_frame(compared: Comparison) -> None:
    """A row for each run; its means over a group are the group's."""
    pytest.importorskip("pandas", reason="the extra 'pandas' is not installed")
    frame = compared.to_dataframe()
    assert frame.index.names == ["group", "run"]
    assert frame.index.get_level_values("group").tolist() == [HOSTILE, "seeds", "seeds", "slow", "short"]
    means = frame.groupby("group").mean(numeric_only=True)
    for group in compared.groups:
        np.testing.assert_allclose(means.loc[group.name, "action"], group.values["action"], rtol=1e-12)
    assert frame.loc["seeds", "step"].tolist() == pytest.approx([case.crossing(LEVEL) for case in SEEDS])
    assert frame.loc["seeds", "beaten_by"].isna().all()
    assert frame.loc["slow", "beaten_by"].tolist() == [HOSTILE]
    for group in compared.groups:
        for point in group.points:
            row = frame.loc[(group.name, point.run.name)]
            for name in ("cost", "action", "loss"):
                ends = (row[f"{name}_low"], row[f"{name}_high"])
                np.testing.assert_array_equal(ends, getattr(point, f"{name}_interval"))


def test_without_pandas_it_says_what_to_install(
    compared: Comparison, record: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    one: Any
    for one in (compared, record):
        with pytest.raises(ImportError, match=r'to_dataframe needs pandas, got .*; pip install "lightning-speedlimit'):
            one.to_dataframe()
