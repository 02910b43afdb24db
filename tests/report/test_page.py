"""The page, read as HTML: what is in it, that it is well made, and that it asks for nothing from elsewhere."""

import base64
import hashlib
import math
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_cases import FAST, HOSTILE, LEVEL, SEEDS, SHORT, SLOW, Element, Zigzag, comparison, read

from lightning_speedlimit import RunRecord, compare
from lightning_speedlimit.report import Comparison, page_figures, page_words
from lightning_speedlimit.report import page as page_module
from lightning_speedlimit.report.page import page, write_page
from lightning_speedlimit.report.settings import settings_of
from lightning_speedlimit.words import listed

COMMAND = "speedlimit compare 'a & <b>' --html report.html"
TEMPLATES = Path(page_module.__file__).with_name("templates")


@pytest.fixture(scope="module")
def compared() -> Comparison:
    return comparison()


@pytest.fixture(scope="module")
def source(compared: Comparison) -> str:
    return page([compared], command=COMMAND)


@pytest.fixture(scope="module")
def tree(source: str) -> Element:
    return read(source)


@pytest.fixture(scope="module")
def two() -> Element:
    """Two comparisons without a command: one run alone at a step, and two without losses."""
    nameless = {name: _without_loss(Zigzag(20, speed, 0.1).record()) for name, speed in (("a", 0.1), ("b", 0.2))}
    return read(page([compare(FAST.record()), compare(nameless, by="step")]))


def _without_loss(record: RunRecord) -> RunRecord:
    found = RunRecord(record.run)
    names = ("elapsed", "displacement", "path_length", "action", "straightness", "steadiness", "kinematic_efficiency")
    for place, step in enumerate(record.columns["step"]):
        found.append(int(step), {name: record.columns[name][place] for name in names})
    return found


# --- well made


@pytest.mark.parametrize("which", ["tree", "two"])
def test_headings_go_down_one_level_at_a_time(which: str, request: pytest.FixtureRequest) -> None:
    found: Element = request.getfixturevalue(which)
    levels = [int(e.tag[1]) for e in found.all("h1", "h2", "h3", "h4", "h5", "h6")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(e.text for e in found.all("h1", "h2", "h3", "h4"))


@pytest.mark.parametrize("which", ["tree", "two"])
def test_ids_are_unique_and_every_reference_has_its_target(which: str, request: pytest.FixtureRequest) -> None:
    found: Element = request.getfixturevalue(which)
    ids = [e["id"] for e in found if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    asked = [e[name] for e in found for name in ("aria-labelledby", "aria-describedby") if name in e.attributes]
    asked += [e[name] for e in found for name in ("data-hint", "data-status") if name in e.attributes]
    asked += [e["href"][1:] for e in found if e["href"].startswith("#")]
    clips = [
        clip for e in found for value in e.attributes.values() for clip in re.findall(r"url\(#([^)]*)\)", value or "")
    ]
    assert len(asked) > 20
    assert len(clips) > 20
    assert set(asked + clips) <= set(ids)


def test_landmarks_language_and_labels(tree: Element) -> None:
    (html,) = tree.all("html")
    assert html["lang"] == "en"
    assert len(tree.all("main")) == len(tree.all("header")) == 1
    assert tree.all("body")[0].children[0]["href"] == "#main", "the skip link comes first"
    figures, drawings = tree.all("figure"), tree.all("svg")
    assert len(figures) == len(drawings) > 8
    captions = {e["id"]: e.text for e in tree.all("figcaption")}
    assert all(len(captions[figure["aria-labelledby"]]) > 40 for figure in figures)
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in drawings)
    for region in (e for e in tree if e["tabindex"] == "0" and e["role"] == "region"):
        assert region["aria-label"] or region["aria-labelledby"]
    for table in tree.all("table"):
        assert len(table.all("caption")[0].text) > 10
        assert {th["scope"] for th in table.all("th")} == {"col", "row"}
    assert all(e["type"] == "button" and e.text for e in tree.all("button"))


# --- nothing from elsewhere


def test_nothing_is_loaded_from_elsewhere(source: str, tree: Element) -> None:
    for element in tree:
        assert not [name for name in element.attributes if name.startswith("on")], "a handler that the policy forbids"
        for name in ("src", "srcset", "data", "poster", "action", "formaction", "background", "xlink:href", "ping"):
            assert name not in element.attributes or element[name].startswith("data:image/")
        target = element["href"]
        if element.tag == "a":
            assert target.startswith(("#", "https://arxiv.org/"))
        elif target:
            assert target.startswith(("#", "data:")), f"<{element.tag} href={target!r}>"
        assert not re.search(r"url\((?!#)", element["style"])
    assert {e.tag for e in tree} & {"iframe", "object", "embed", "base", "form", "audio", "video"} == set()
    style = tree.all("style")[0].text
    assert "url(" not in style
    assert "@import" not in style
    assert "@font-face" not in style
    assert set(re.findall(r"https?://[^\s\"'<)]*", source)) == {
        "https://arxiv.org/abs/2307.14653",
        "http://www.w3.org/2000/svg",
    }


def test_the_policy_forbids_all_but_this_script(source: str, tree: Element) -> None:
    (meta,) = [e for e in tree.all("meta") if e["http-equiv"] == "Content-Security-Policy"]
    policy = dict(part.strip().split(" ", 1) for part in meta["content"].split(";"))
    (script,) = re.findall(r"<script>(.*?)</script>", source, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'",
        "script-src": f"'sha256-{digest}'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    head = tree.all("head")[0].children
    assert head.index(meta) < head.index(tree.all("style")[0]), "what comes before the policy is not under it"


def test_what_is_put_in_is_escaped(source: str, tree: Element) -> None:
    assert len(tree.all("script")) == 1
    assert "<script>alert" not in source
    assert "alert('a')" not in tree.all("script")[0].text
    assert HOSTILE in [th["data-value"] for th in tree.all("th")]
    assert HOSTILE in [e.text for e in tree.all("summary")]
    assert HOSTILE in [e.text for e in tree.all("td")], "the model's name among the settings"
    assert COMMAND in [e.text for e in tree.all("pre")]


# --- what it says


def _cells(tree: Element) -> dict[str, dict[str, Element]]:
    """Row → heading → cell of the first table."""
    table = tree.all("table")[0]
    heads = [th.text for th in table.all("thead")[0].all("th")]
    found = {}
    for row in table.all("tbody")[0].all("tr"):
        cells = row.children
        assert len(cells) == len(heads)
        found[cells[0]["data-value"]] = dict(zip(heads, cells, strict=True))
    return found


def _written(value: float, digits: int = 3) -> str:
    """So many significant digits, by Python's own formatting; for values from 0.001 to 999."""
    return f"{value:#.{digits}g}".rstrip(".")


def test_the_table_shows_the_runs_numbers_at_the_loss(tree: Element) -> None:
    cells = _cells(tree)
    assert list(cells) == [HOSTILE, "seeds", "slow", "short"], "by steps; who did not get there last"
    for name, case in ((HOSTILE, FAST), ("slow", SLOW)):
        step = case.crossing(LEVEL)
        row = cells[name]
        # The same linear interpolation in another order of operations.
        assert float(row["steps"]["data-value"]) == pytest.approx(step, rel=1e-9)
        assert float(row["action"]["data-value"]) == pytest.approx(case.action(step), rel=1e-9)
        assert float(row["steadiness"]["data-value"]) == pytest.approx(1, rel=1e-9)
        shown = {
            "steps": f"{step:.3g}",  # what is counted has no zeros behind the point
            "seconds": _written(0.01 * step),
            "loss": _written(LEVEL),
            "action": _written(case.action(step)),
            "kinematic": _written(case.straightness, 2),
            "straightness": _written(case.straightness, 2),
            "conversion": _written(case.conversion, 2),
            "efficiency": _written(case.straightness / case.conversion, 2),
        }
        assert {key: row[key].text.split(" ")[0] for key in shown} == shown


def test_intervals_stand_below_what_the_verdict_rests_on(tree: Element) -> None:
    # The loss ± 2 · 0.01 comes down to ½ where the loss itself comes down to 0.52 and to 0.48.
    low, high = (SLOW.crossing(LEVEL + shift) for shift in (0.02, -0.02))
    row = _cells(tree)["slow"]
    (small,) = row["steps"].all("small")
    ends = [float(text) for text in small.text.split(" to ")]
    # Between two log steps, 4 apart, it is not known either.
    assert ends[0] == pytest.approx(low, abs=4)
    assert ends[1] == pytest.approx(high, abs=4)
    assert row["action"].all("small")
    assert not row["loss"].all("small"), "all are at the same loss"


def test_replicas_are_means_with_standard_errors(tree: Element) -> None:
    row = _cells(tree)["seeds"]
    steps = [case.crossing(LEVEL) for case in SEEDS]
    mean, error = sum(steps) / 2, abs(steps[0] - steps[1]) / 2  # of two: √(d²/2)/√2
    assert row["steps"].text.startswith(f"{mean:.3g} ± {_written(error, 2)}")
    assert row["loss"].text == _written(LEVEL), "no error of rounding"
    assert "2 seeds" in row["group"].text


def test_drawn_coordinates_are_said_once_with_their_errors() -> None:
    described = {"measured_coordinates": 1048576, "optimized_coordinates": 9812345}
    record = FAST.record(**described)
    last = {name: column[-1] for name, column in record.columns.items() if name != "step"}
    for k in range(1, 5):
        record.append(FAST.steps + k, {**last, "action_se": 0.5})
    found = compare({"a": record}, by="step", at=FAST.steps + 2)
    said = "Measured: 1,048,576 of 9,812,345 coordinates (10.7 %), values ± standard error."
    table = read(page([found])).all("caption")[0].text
    assert said in table
    assert f"{_written(float(record.columns['action'][-1]))} ± 0.50" in read(page([found])).text
    assert "measured:" in read(page([found])).text  # the summary of the run
    assert "Measured" not in page([compare({"a": FAST.record()}, by="step", at=8)])


def test_who_did_not_get_there_is_told_and_sorted_last(tree: Element) -> None:
    row = _cells(tree)["short"]
    assert row["standing"].text == "did not get to loss 0.500"
    for key in ("standing", "steps", "action", "efficiency"):
        assert row[key]["data-value"] == ""
    assert [(span.text, span["aria-hidden"]) for span in row["steps"].all("span")] == [("?", "true"), ("undefined", "")]
    assert not re.search(r"\bnan\b", tree.all("body")[0].text, flags=re.IGNORECASE)


def test_the_standing_of_each(tree: Element) -> None:
    cells = _cells(tree)
    assert cells[HOSTILE]["standing"].text == cells["seeds"]["standing"].text == "frontier"
    assert cells["slow"]["standing"].text.startswith("beaten by")
    assert cells[HOSTILE]["standing"]["data-value"] < cells["slow"]["standing"]["data-value"]


def test_the_losses_come_first_then_the_plane_and_the_findings_are_there(tree: Element, compared: Comparison) -> None:
    assert [figure["id"] for figure in tree.all("figure")[:2]] == ["c1-curves", "c1-plane"]
    text = tree.all("main")[0].text
    for group in compared.groups:
        for finding in group.findings:
            assert " ".join(finding.sentence.split()) in text
            assert finding.advice in text
    assert all(group.findings for group in compared.groups if group.reached)
    for note in compared.notes:
        assert note[1:] in text
    for cited in ("arXiv:2307.14653", "Benamou", "Cauchy and Schwarz", "W = d + (d − a) + (W − 2d + a)"):
        assert cited in text


def test_every_column_is_explained(tree: Element) -> None:
    meanings = {e["id"]: e.text for e in tree.all("dd")}
    buttons = tree.all("table")[0].all("button")
    assert len(buttons) == len(tree.all("table")[0].all("thead")[0].all("th"))
    for button in buttons:
        assert len(meanings[button["aria-describedby"]]) > 15
        assert button["title"] == meanings[button["aria-describedby"]]
        assert "disabled" in button.attributes, "without the script a button would do nothing"
    sorts = [th["aria-sort"] for th in tree.all("table")[0].all("thead")[0].all("th")]
    assert sorts == ["none", "none", "ascending"] + ["none"] * (len(sorts) - 3)


def test_settings_say_what_is_the_same_and_what_is_not(compared: Comparison) -> None:
    found = settings_of(compared)
    assert ("batch size", "8") in found.same
    assert ("versions", "torch 2.9, pytorch_lightning 2.6") in found.same
    assert found.differing == ("optimizers", "model")
    assert dict(found.rows)[HOSTILE] == ("SGD(lr=0.5, momentum=0)", HOSTILE)
    assert dict(found.rows)["slow"] == ("SGD(lr=0.01, momentum=0)", "not recorded")


def test_several_comparisons_are_sections_of_their_own(two: Element) -> None:
    (nav,) = two.all("nav")
    links = [a["href"] for a in nav.all("a")]
    assert links == ["#c1", "#c2"]
    assert [e["id"] for e in two.all("section")][:2] == ["c1", "c2"]
    assert len(two.all("h1")) == 1
    assert two.all("h1")[0].text == "Speed limits of 2 comparisons"


def test_without_losses_there_is_no_plane(two: Element) -> None:
    (second,) = [e for e in two.all("section") if e["id"] == "c2"]
    assert not [e for e in second.all("figure") if e["id"] == "c2-plane"]
    heads = [th.text for th in second.all("thead")[0].all("th")]
    assert "standing" not in heads
    assert "loss" not in heads
    assert "losses are unknown" in second.text
    assert "Loss against steps: not drawn." in second.text


# --- the answer


@pytest.mark.parametrize(
    ("cases", "answer"),
    [
        (
            [FAST, SEEDS[0], SLOW],
            "To loss 0.500, a needed the fewest steps (14); b needed the least action (0.347); c took more of both.",
        ),
        (
            [SEEDS[0], SLOW],
            "To loss 0.500, a needed the fewest steps (27.7) and the least action (0.347); b took more of both.",
        ),
        (
            [FAST, SEEDS[0], SHORT],
            "To loss 0.500, a needed the fewest steps (14); b needed the least action (0.347); c can't be placed.",
        ),
        (
            # Beaten by less than the loss's error tells.
            [Zigzag(40, 0.1, 0.1, error=0.05), Zigzag(41, 0.1, 0.1, error=0.05)],
            "To loss 0.500, no clear winner on steps: a (27.7) overlaps with b; no clear winner on action: a (0.555) "
            "overlaps with b; b seems to have taken more, but within the error.",
        ),
    ],
)
def test_the_answer_in_one_sentence(cases: list[Zigzag], answer: str) -> None:
    runs = {name: case.record() for name, case in zip("abc", cases, strict=False)}
    assert page_words.answer(compare(runs, at=LEVEL)) == answer


def test_the_answer_where_there_is_nothing_to_compare() -> None:
    alone = compare(FAST.record())
    assert page_words.answer(alone) == alone.verdict()[0]
    ended = compare({"a": FAST.record(), "b": SLOW.record()}, by="step", at=40)
    assert page_words.answer(ended) == "a has the lowest loss after 40.0 steps."


def test_names_are_listed_up_to_some() -> None:
    assert listed(["a"]) == "a"
    assert listed(list("abc")) == "a, b and c"
    assert listed(list("abcdefgh"), 5) == "a, b, c, d, e and 3 more"
    assert listed([]) == ""


# --- many runs


def test_of_many_runs_the_frontier_alone_has_figures() -> None:
    fast, slow = FAST.record(), Zigzag(80, 0.3, 0.6).record()
    runs: dict[str, Any] = {f"slow {i}": slow for i in range(30)}
    found = compare({**runs, "fast": [fast, FAST.record()]}, at=LEVEL)
    assert [p.run.name for p in page_figures.detailed_points(found)] == ["fast 1", "fast 2"]
    alike = compare({f"fast {i}": fast for i in range(30)}, at=LEVEL)
    assert len(page_figures.detailed_points(alike)) == page_figures.MOST_DETAILED
    few = compare({"fast": fast, "slow": slow}, at=LEVEL)
    assert len(page_figures.detailed_points(few)) == 2


def test_figures_of_a_long_run_show_some_of_its_rows_and_all_of_its_windows() -> None:
    whole = Zigzag(300, 0.1, 0.3, steps=4000).record()
    shown = page_figures.thinned(whole)
    assert len(whole) == 1000
    # 400 evenly on a logarithmic axis, of which the first steps are all there are, and those with one of 500 sketches.
    assert 500 < len(shown) < 900
    assert shown.columns["step"][0] == 4
    assert shown.columns["step"][-1] == 4000
    rows = np.searchsorted(whole.columns["step"], shown.columns["step"])
    for name, column in shown.columns.items():
        np.testing.assert_array_equal(column, whole.columns[name][rows])
    np.testing.assert_array_equal(shown.sketch_steps, whole.sketch_steps)
    assert shown.regimes() == whole.regimes()
    pictures = page_figures.of_run(compare(whole).groups[0].points[0], "r")
    assert pictures[0].caption.endswith(f"Of 1,000 log steps {len(shown)} are shown.")
    assert len(pictures[0].svg) < 3e5
    short = FAST.record()
    assert page_figures.thinned(short) is short


@pytest.mark.slow
def test_two_hundred_runs_stay_small_and_quick() -> None:
    import time

    runs = {f"run {i}": Zigzag(20 + i, 0.05 + 0.3 / (1 + i % 17), 0.2, steps=400).record() for i in range(200)}
    found = compare(runs, at=LEVEL)
    start = time.process_time()
    text = page([found])
    assert time.process_time() - start < 20
    assert len(text.encode()) < 8e6
    tree = read(text)
    assert len(tree.all("table")[0].all("tbody")[0].children) == 200
    assert "left out here" in tree.text
    ids = [e["id"] for e in tree if "id" in e.attributes]
    assert len(ids) == len(set(ids))


# --- the same again


def test_the_same_comparison_gives_the_same_page() -> None:
    alone = compare(FAST.record())
    assert page([alone]) == page([alone])


@pytest.mark.slow
def test_another_process_makes_the_same_page(source: str) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from page_cases import comparison\n"
        f"from lightning_speedlimit.report.page import page\n"
        f"sys.stdout.buffer.write(page([comparison()], command={COMMAND!r}).encode())"
    )
    env = {**os.environ, "PYTHONHASHSEED": "12345"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
    assert done.stdout.decode() == source


def test_the_python_shown_makes_the_comparison_again(tmp_path: Path) -> None:
    paths = {}
    for name, cases in (("it's", [FAST]), ("seeds", SEEDS)):
        paths[name] = [tmp_path / name / str(i) for i in range(len(cases))]
        for path, case in zip(paths[name], cases, strict=True):
            case.record().save(path)
    first = compare(paths, at=LEVEL)
    shown = page_words.python_call([first])
    assert shown.endswith(".html('report.html')")
    names: dict[str, Any] = {}
    exec(shown.replace(".html('report.html')", "").replace("compare({", "again = compare({"), names)
    assert names["again"].to_dict() == first.to_dict()
    several = page_words.python_call([first, first])
    compile(several, "shown", "exec")
    assert several.count("compare({") == 2
    assert page_words.name(first) == tmp_path.name


# --- the file


def test_the_file_is_written_at_once_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, compared: Comparison
) -> None:
    monkeypatch.setattr(page_module, "page", lambda comparisons, command=None: source)
    target = tmp_path / "report.html"
    target.write_text("old")

    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(OSError, match=r"can't be written \(No space left on device\).*report\.html"):
            write_page(target, [compared])
    assert target.read_text() == "old"
    write_page(target, [compared])
    assert target.read_bytes() == source.encode()
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    plain = tmp_path / "plain"
    plain.touch()
    assert target.stat().st_mode == plain.stat().st_mode, "others may read it where they may read a new file"
    with pytest.raises(FileNotFoundError, match="give a file in a folder that exists"):
        write_page(tmp_path / "absent" / "report.html", [compared])


@pytest.mark.skipif(os.name == "nt", reason="links need rights of their own on Windows")
def test_writing_follows_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compared: Comparison) -> None:
    """Neither one in the page's own place nor one where a temporary file would be guessed to be."""
    monkeypatch.setattr(page_module, "page", lambda comparisons, command=None: "page")
    (tmp_path / "others.txt").write_text("precious")
    for name in ("report.html", f".report.html.{os.getpid()}.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "others.txt")
    write_page(tmp_path / "report.html", [compared])
    assert (tmp_path / "others.txt").read_text() == "precious"
    assert (tmp_path / "report.html").read_text() == "page"
    assert not (tmp_path / "report.html").is_symlink()


def test_bad_input_says_the_cure(monkeypatch: pytest.MonkeyPatch, compared: Comparison) -> None:
    with pytest.raises(ValueError, match=r"the page needs at least one, got none; pass \[compare\(runs\)\]"):
        page([])
    for library in ("jinja2", "matplotlib"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, library, None)
            with pytest.raises(ImportError, match=r"pip install \"lightning-speedlimit\[report\]\""):
                page([compared])


# --- the colours


def _schemes() -> list[dict[str, str]]:
    """Light and dark: names and values of the colours; the second changes some of the first."""
    css = (TEMPLATES / "page.css").read_text("utf-8")
    blocks = re.findall(r":root \{(.*?)\}", css, flags=re.DOTALL)
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w+);", block)) for block in blocks[:2])
    assert len(light) > 8
    assert light.keys() == dark.keys()
    return [light, dark]


def _luminance(colour: str) -> float:
    """WCAG 2: 0.2126 R + 0.7152 G + 0.0722 B of linear values."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return math.fsum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _contrast(a: str, b: str) -> float:
    high, low = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("text", "ground"),
    [
        ("ink", "paper"),
        ("muted", "paper"),
        ("link", "paper"),
        ("ink", "raised"),
        ("good-ink", "good-paper"),
    ],
)
def test_text_can_be_read_in_both_schemes(scheme: int, text: str, ground: str) -> None:
    colours = _schemes()[scheme]
    assert _contrast(colours[text], colours[ground]) >= 4.5  # WCAG 2, level AA


def test_contrast_is_that_of_the_standard() -> None:
    assert _contrast("#000000", "#ffffff") == pytest.approx(21)
    assert _contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)  # the well-known grey that just fails
