"""The page's table of other batches, and the order in which the page speaks."""

from __future__ import annotations

import pytest
from page_cases import HOSTILE, Element, read
from test_advice import run

from lightning_speedlimit import RunRecord, compare
from lightning_speedlimit.report.advice import advise
from lightning_speedlimit.report.advice_text import rate
from lightning_speedlimit.report.diagnosis import diagnose
from lightning_speedlimit.report.page import page
from lightning_speedlimit.report.page_advice import AdviceRow, AdviceTable
from lightning_speedlimit.words import amount


@pytest.fixture(scope="module")
def records() -> dict[str, RunRecord]:
    return {HOSTILE: run(), "large": run(batch=128, seconds=0.02), "short": run(rows=3)}


@pytest.fixture(scope="module")
def tree(records: dict[str, RunRecord]) -> Element:
    return read(page([compare(records, by="step", at=30)]))


def rows(tree: Element) -> dict[str, dict[str, list[str]]]:
    """Run → heading → the cell's lines."""
    (table,) = [t for t in tree.all("table") if "another batch would take" in t.all("caption")[0].text]
    heads = [th.text for th in table.all("thead")[0].all("th")]
    found = {}
    for row in table.all("tbody")[0].all("tr"):
        assert len(row.children) == len(heads)
        cells = {
            head: [cell.text.split(" ")[0], *(small.text for small in cell.all("small"))]
            for head, cell in zip(heads[1:], row.children[1:], strict=True)
        }
        found[row.children[0].text] = cells
    return found


def test_a_row_for_each_run_and_a_column_for_each_multiple(tree: Element, records: dict[str, RunRecord]) -> None:
    found = rows(tree)
    assert list(found) == [HOSTILE, "large", "short"]
    told = advise(records[HOSTILE], records.values())
    for at in told.at_batches:
        name = {1: "this run", 0.25: "x 1/4", 0.5: "x 1/2"}.get(at.multiple, f"x {at.multiple:g}")
        low, high = map(amount, at.steps_interval)
        lines = [amount(at.steps)] + ([] if low == high else [f"{low} to {high}"]) + [f"{amount(at.samples)} samples"]
        lines += {1: ["2 s"], 4: [f"{amount(0.02 * at.steps)} s"]}.get(at.multiple, [])
        assert found[HOSTILE][name] == lines
    assert found[HOSTILE]["batch"] == ["32", "samples"]
    assert found["large"]["batch"] == ["128", "samples"]
    assert found[HOSTILE]["headroom"][1].startswith("± ")
    assert found[HOSTILE]["headroom"][2:] == [f"try the rate x {told.rate_multiple:.1f}"]


def test_what_is_not_known_is_said(tree: Element) -> None:
    cells = rows(tree)["short"]
    assert [cells[name] for name in ("critical batch", "headroom", "x 4", "this run")] == [["?"]] * 4
    (remark,) = [p.text for p in tree.all("p") if p.text.startswith("short: critical batch not known, as ")]
    assert "log more often" in remark
    assert remark.endswith(".")
    assert "nan" not in tree.all("body")[0].text


def test_a_remark_is_there_once_behind_all_its_runs() -> None:
    rows = [
        AdviceRow(name, (), remarks) for name, remarks in (("a", ("x", "y")), ("b", ("y", "z", "w")), ("c", ("y",)))
    ]
    assert AdviceTable((), tuple(rows)).remarks == ["a, b and c: y.", "a: x.", "b: z; w."]


def test_what_to_change_says_what_rate_to_try(tree: Element, records: dict[str, RunRecord]) -> None:
    told = rate(advise(records["large"]))
    assert told.startswith("Step headroom ")
    found = [p.text for p in tree.all("p") if p.text.startswith("Step headroom ")]
    assert found == [told, told], "of two runs with the same works; none of the short one"
    text = compare(records, by="step", at=30).table()
    assert " ".join(text.split()).count(told) == 2


def test_nothing_stands_out_is_not_said_of_steps_with_headroom() -> None:
    calm = RunRecord(run().run)
    for i in range(1, 21):
        row = {"work_ito": 1.6 * i, "work_anti_ito": 0.9 * i, "loss_drop": 1.2 * i, "loss_drop_se": 0.01}
        row |= {"loss": 30 - 1.2 * i, "loss_se": 0.01, "conversion": 0.75, "signal_fraction": 0.56}
        row |= {"straightness": 0.9, "steadiness": 0.9, "elapsed": 10.0 * i, "action": 0.1 * i}
        row |= {"displacement": 0.95 * i, "path_length": 1.0 * i, "work_stratonovich": 1.25 * i}
        calm.append(10 * i, row | {"samples": 320.0 * i})
    assert [finding.cause for finding in diagnose(calm)] == ["nothing"]
    comparison = compare({"calm": calm}, by="step")
    assert [finding.cause for finding in comparison.groups[0].findings] == ["nothing"]
    text, html = comparison.table(), read(page([comparison])).all("main")[0].text
    assert rate(advise(calm)) in " ".join(text.split())
    assert rate(advise(calm)) in html
    assert "Nothing stands out" not in text + html


def test_the_page_speaks_of_cost_and_gain_then_change_then_physics(tree: Element) -> None:
    heads = [e.text for e in tree.all("h2")]
    wanted = ["What it cost, what it bought", "What to change", "The physics", "Run by run"]
    assert [head for head in heads if head in wanted] == wanted
    assert [e.text for e in tree.all("h3")][-1] == "Other batches", "after the findings"
    summaries = [e.text for e in tree.all("pre") if e["aria-label"].startswith("Summary")]
    parts = ("What it cost", "What it bought", "What to change", "How close to the speed limit", "What that rests on")
    for text in summaries:
        places = [text.index(part) for part in parts]
        assert places == sorted(places)
    assert len(summaries) == 3
