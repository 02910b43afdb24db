"""The page in a real browser, opened from disk: sorting, narrow screens, the dark scheme, silence on the network."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_cases import HOSTILE, comparison

from lightning_speedlimit.report.page import write_page

selenium = pytest.importorskip("selenium", reason="needs selenium")

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (CHROMIUM.exists() and DRIVER.exists()),
        reason=f"needs a browser: {CHROMIUM} and {DRIVER} (Debian's packages chromium and chromium-driver)",
    ),
]

PHONE = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
DESKTOP = {"width": 1100, "height": 800, "deviceScaleFactor": 1, "mobile": False}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(path, [comparison()], command="speedlimit compare runs --html report.html")
    return path.as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium.webdriver import Chrome
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = str(CHROMIUM)
    for flag in (
        "--headless=new",
        "--no-sandbox",  # of a container's root
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser: Any, address: str) -> Any:
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", DESKTOP)
    browser.get(address)
    return browser


def _table(browser: Any) -> dict[str, Any]:
    """The first table as the browser has it: headings' aria-sort, and each row's name and sorting values."""
    return browser.execute_script("""
        const table = document.querySelector("table.sortable");
        const heads = [...table.tHead.rows[0].cells];
        return {
            sorts: Object.fromEntries(heads.map(th => [th.textContent.trim(), th.getAttribute("aria-sort")])),
            rows: [...table.tBodies[0].rows].map(
                row => Object.fromEntries(heads.map((th, i) => [th.textContent.trim(), row.cells[i].dataset.value]))),
        };
    """)


def _button(browser: Any, heading: str) -> Any:
    buttons = browser.find_elements("css selector", "table.sortable th button")
    (found,) = [button for button in buttons if button.text.strip() == heading]
    return found


def _in_order(rows: list[dict[str, str]], heading: str) -> tuple[list[float], int]:
    """The values from above, and how many undefined ones stand below them; none may stand among them."""
    values = [row[heading] for row in rows]
    known = [float(value) for value in values if value]
    assert values[: len(known)] == [value for value in values if value], "undefined comes last"
    return known, len(values) - len(known)


def test_nothing_is_asked_for_and_nothing_complains(opened: Any, address: str) -> None:
    assert opened.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    asked = [request["request"]["url"] for request in sent if request["documentURL"] == address]
    assert address in asked, "the log tells of the page itself"
    assert all(url.startswith(("file:", "data:")) for url in asked), asked
    loaded = opened.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    assert opened.execute_script("return document.querySelectorAll('figure svg').length") > 8


def test_the_policy_is_in_force(opened: Any) -> None:
    opened.execute_script("""
        document.body.append(Object.assign(document.createElement("script"), {textContent: "window.broken = true"}));
        document.body.append(Object.assign(new Image(), {src: "https://example.org/a.png"}));
    """)
    assert opened.execute_script("return window.broken === undefined")
    refused = [entry["message"] for entry in opened.get_log("browser")]
    assert any("inline script" in message for message in refused)
    assert any("example.org" in message and "Content Security Policy" in message for message in refused)


@pytest.mark.parametrize("heading", ["steps", "action", "kinematic", "standing"])
def test_a_click_sorts_by_numbers(opened: Any, heading: str) -> None:
    _button(opened, "run" if heading == "group" else "group").click()  # from another order
    _button(opened, heading).click()
    table = _table(opened)
    known, undefined = _in_order(table["rows"], heading)
    assert known == sorted(known)
    assert len(known) == 3
    assert undefined == 1
    assert {name: sort for name, sort in table["sorts"].items() if sort != "none"} == {heading: "ascending"}
    _button(opened, heading).click()
    table = _table(opened)
    known, _ = _in_order(table["rows"], heading)
    assert known == sorted(known, reverse=True)
    assert table["sorts"][heading] == "descending"


def test_a_click_sorts_by_names(opened: Any) -> None:
    _button(opened, "group").click()
    assert [row["group"] for row in _table(opened)["rows"]] == [HOSTILE, "seeds", "short", "slow"]


def test_the_keyboard_alone_sorts_and_explains(opened: Any) -> None:
    from selenium.webdriver import ActionChains, Keys

    def press(key: str) -> None:
        ActionChains(opened).send_keys(key).perform()

    def focused() -> Any:
        return opened.switch_to.active_element

    press(Keys.TAB)
    assert focused().get_attribute("class") == "skip"
    for _ in range(30):
        press(Keys.TAB)
        if focused().tag_name == "button" and focused().text.strip() == "action":
            break
    else:
        pytest.fail("the Tab key does not come to the heading of the action")
    hint = opened.find_element("css selector", ".hint")
    assert hint.text.startswith("action: What the motion cost")
    outline = opened.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "what has the focus is to be seen"
    press(Keys.ENTER)
    table = _table(opened)
    known, _ = _in_order(table["rows"], "action")
    assert known == sorted(known)
    assert table["sorts"]["action"] == "ascending"
    assert opened.find_element("css selector", "[role=status]").get_attribute("textContent") == (
        "Sorted by action, ascending."
    )
    press(Keys.SPACE)
    assert _table(opened)["sorts"]["action"] == "descending"
    assert focused().text.strip() == "action", "the focus stays"


def test_a_laptop_shows_all_columns_of_what_it_cost_and_of_other_batches(opened: Any) -> None:
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**DESKTOP, "width": 1280})
    widths = opened.execute_script("""
        return [...document.querySelectorAll("section > .scroll")].map(
            box => [box.getAttribute("aria-labelledby"), box.scrollWidth, box.clientWidth]);
    """)
    told = {name: (wanted, there) for name, wanted, there in widths if name}
    assert {name.split("-")[-1] for name in told} >= {"numbers", "batches"}
    assert not {name: sizes for name, sizes in told.items() if sizes[0] > sizes[1]}


def test_a_phone_shows_it_without_scrolling_sideways(opened: Any) -> None:
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    opened.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    width, inner = opened.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert inner == 360
    assert width <= inner
    # The table scrolls in its own box, and its first column stays.
    left = opened.execute_script("""
        const box = document.querySelector("table.sortable").parentElement;
        box.scrollLeft = 200;
        return [box.scrollLeft, box.querySelector("tbody th").getBoundingClientRect().left,
                box.getBoundingClientRect().left];
    """)
    assert left[0] == 200
    assert left[1] == pytest.approx(left[2], abs=1)
    cut = opened.execute_script("""
        return [...document.querySelectorAll("figure .scroll")].filter(box => box.scrollWidth > box.clientWidth + 1)
            .map(box => box.parentElement.id.replace(/.*-/, ""));
    """)
    assert "plane" not in cut
    assert set(cut) <= {"curves", "layer_motion", "layers"}, "panels side by side scroll; one alone is whole"
    assert "curves" in cut
    smallest = opened.execute_script(
        "return Math.min(...[...document.querySelectorAll('main p, main td, main dd, main small')]"
        ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert smallest >= 12


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_schemes_can_be_read(opened: Any, scheme: str) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    ground, *inks = opened.execute_script("""
        const colour = (selector, what) => getComputedStyle(document.querySelector(selector))[what];
        return [colour("body", "backgroundColor"), colour("body", "color"), colour("figcaption", "color"),
                colour("small", "color"), colour("main a", "color"), colour("figure svg text", "fill")];
    """)
    assert (_luminance(ground) < 0.05) == (scheme == "dark")
    for ink in inks:
        high, low = sorted((_luminance(ink), _luminance(ground)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5  # WCAG 2, level AA


def _luminance(colour: str) -> float:
    """WCAG 2, of "rgb(r, g, b)"."""
    parts = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return math.fsum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_without_javascript_all_is_there_but_sorting(opened: Any, address: str) -> None:
    opened.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        opened.get(address)
        buttons = opened.find_elements("css selector", "table.sortable th button")
        assert buttons
        assert not any(button.is_enabled() for button in buttons)
        assert len(opened.find_elements("css selector", "table.sortable tbody tr")) == 4
        assert not opened.find_element("css selector", ".hint").is_displayed()
    finally:
        opened.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_paper_holds_the_table_and_what_is_folded(opened: Any) -> None:
    state = "return [...document.querySelectorAll('details')].filter(d => d.open).length"
    total = opened.execute_script("return document.querySelectorAll('details').length")
    assert opened.execute_script(state) == 0
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    opened.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**DESKTOP, "width": 718})  # A4 less margins of 1 cm
    box, table = opened.execute_script("""
        const table = document.querySelector("table.sortable");
        return [table.parentElement.getBoundingClientRect().right, table.getBoundingClientRect().right];
    """)
    assert table <= box + 1
    opened.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert opened.execute_script(state) == total > 4
    opened.execute_script("dispatchEvent(new Event('afterprint'))")
    assert opened.execute_script(state) == 0
