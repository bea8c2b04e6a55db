"""The page in headless Chromium: it opens and loads nothing; what is clicked, sorted or slid does what it says."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from commands import command

WIDTHS = [(360, 800), (1440, 900)]


def _missing():
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed"
    for program, there in (("chromium", BROWSER), ("chromedriver", shutil.which("chromedriver"))):
        if there is None:
            return f"there is no {program}: on Debian, apt-get install chromium chromium-driver"
    return None


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = _missing()
REQUIRED = os.environ.get("KNORM_REQUIRE_CHROMIUM") == "1"
if not REQUIRED:
    pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def test_what_is_required_is_there():
    assert MISSING is None


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    profile = tmp_path_factory.mktemp("profile")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={profile}")
    options.binary_location = str(BROWSER)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def made(results, tmp_path_factory):
    """A page of all kinds of results."""
    out = tmp_path_factory.mktemp("page") / "out"
    names = ("check.json", "declared.json", "ppl.json", "curve.json", "explain.json", "study", "timed")
    assert command("page", *(results / name for name in names), out, "-q") == 0
    return out


@pytest.fixture(params=WIDTHS, ids=lambda size: f"{size[0]}")
def opened(chromium, made, request):
    """The page in a window of one size."""
    chromium.set_window_size(*request.param)
    width, height = request.param
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    chromium.get("about:blank")
    for kind in ("browser", "performance"):
        chromium.get_log(kind)  # what was before
    open_file(chromium, made / "index.html")
    return chromium


def open_file(driver, file):
    """Open a file, and wait until its script has run."""
    from selenium.webdriver.support.ui import WebDriverWait

    driver.get(file.as_uri())
    WebDriverWait(driver, 20).until(lambda _: driver.execute_script("return document.readyState") == "complete")


def every(driver, selector):
    from selenium.webdriver.common.by import By

    return driver.find_elements(By.CSS_SELECTOR, selector)


def one(driver, selector):
    return every(driver, selector)[0]


def press(driver, *keys):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(driver).send_keys(*keys).perform()


def test_it_opens_without_an_error_and_asks_nobody_for_anything(opened, made):
    assert opened.title.startswith("KV-cache compression")
    assert opened.get_log("browser") == []
    sent = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in sent if event["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith(("about:", "data:"))] == [(made / "index.html").as_uri()]


def test_the_page_is_no_wider_than_the_window(opened):
    wide = opened.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide[0] <= wide[1]


def test_each_cell_opens_its_counterexample_by_click_and_by_enter(opened, made):
    from selenium.webdriver.common.keys import Keys

    told = json.loads((made / "results.json").read_text())
    rows = [
        (method["name"], row)
        for matrix in told["matrices"]
        for method in matrix["methods"]
        for row in method["results"]
        if row["verdict"] not in ("holds", "does not apply")
    ]
    cells = every(opened, "a.open")
    assert len(cells) == len(rows) >= 2
    for cell in cells:
        check = cell.get_attribute("href").split("#")[1].split("-", 2)[2]
        (row,) = [row for name, row in rows if row["check"] == check and name == _method(opened, cell)][:1]
        for keyboard in (False, True):
            opened.execute_script("arguments[0].focus(); arguments[0].scrollIntoView({block: 'center'})", cell)
            press(opened, Keys.ENTER) if keyboard else opened.execute_script("arguments[0].click()", cell)
            sheet = one(opened, "dialog")
            assert sheet.get_attribute("open") is not None
            assert row["counterexample"].split()[0] in sheet.text
            assert row["snippet"].splitlines()[-1].strip() in sheet.text
            press(opened, Keys.ESCAPE)
            assert sheet.get_attribute("open") is None
            assert opened.switch_to.active_element == cell, "the focus comes back"


def _method(driver, cell):
    return driver.execute_script("return arguments[0].closest('tr').dataset.method", cell)


@pytest.mark.parametrize(("which", "name"), [("table.costs", "KL"), ("table.times", "ratio")])
def test_a_heading_sorts_its_column_both_ways(opened, which, name):
    from selenium.webdriver.common.keys import Keys

    table = one(opened, which)
    heading = next(th for th in every(table, "th[data-kind]") if th.text.strip() == name)
    column = opened.execute_script("return arguments[0].cellIndex", heading)

    def values():
        number = "Number(row.cells[arguments[1]].querySelector('data').value)"
        return opened.execute_script(f"return [...arguments[0].tBodies[0].rows].map(row => {number})", table, column)

    before = values()
    opened.execute_script("arguments[0].focus()", one(heading, "button"))
    press(opened, Keys.ENTER)
    assert values() == sorted(before)
    assert heading.get_attribute("aria-sort") == "ascending"
    press(opened, Keys.ENTER)
    assert values() == sorted(before, reverse=True)
    assert heading.get_attribute("aria-sort") == "descending"


def test_the_second_view_is_shown_instead_of_the_first(opened):
    first, second = every(opened, ".frontier")[0].find_elements("css selector", "figure.view")
    assert (first.is_displayed(), second.is_displayed()) == (True, False)
    opened.execute_script("arguments[0].click()", every(opened, ".views input")[1])
    assert (first.is_displayed(), second.is_displayed()) == (False, True)


def test_the_slider_takes_the_text_back_in_time(opened):
    from selenium.webdriver.common.keys import Keys

    slider = one(opened, ".slider input")
    gone = {int(token.get_attribute("data-gone")) for token in every(opened, ".tokens a[data-gone]")}
    assert gone
    last = len(every(opened, ".tokens a")) - 1

    def state():
        return len(every(opened, ".tokens a.gone")), len(every(opened, ".tokens a.later"))

    assert state() == (len(every(opened, ".tokens a[data-gone]")), 0)
    opened.execute_script("arguments[0].focus()", slider)
    press(opened, Keys.HOME)
    assert state() == (0, last - 1)
    assert one(opened, ".slider output").text == "1"
    press(opened, Keys.ARROW_RIGHT)
    assert state() == (0, last - 2)
    assert one(opened, "path.now").get_attribute("d").startswith("M0 2H")
    for _ in range(min(gone) - 2):
        press(opened, Keys.ARROW_RIGHT)
    first = sum(int(token.get_attribute("data-gone")) == min(gone) for token in every(opened, ".tokens a[data-gone]"))
    assert state() == (first, last - min(gone))
    press(opened, Keys.END)
    assert state() == (len(every(opened, ".tokens a[data-gone]")), 0)


def test_a_token_tells_who_evicted_it_and_arrows_move(opened):
    from selenium.webdriver.common.keys import Keys

    tokens = every(opened, ".tokens a")
    assert [token.get_attribute("tabindex") for token in tokens[:2]] == ["0", "-1"], "one stop for the tabulator"
    opened.execute_script("arguments[0].focus()", tokens[0])
    press(opened, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert opened.switch_to.active_element == tokens[11]
    press(opened, Keys.ENTER)
    said = one(opened, "dialog").text
    assert said.count("\n") >= 9
    assert "Token 11: " in said
    assert "heads that evicted it" in said
    press(opened, Keys.ESCAPE)
    assert "chosen" in tokens[11].get_attribute("class")


def test_a_link_to_evidence_opens_what_hides_it(opened, made):
    at = one(opened, ".evidence").get_attribute("id")
    assert not one(opened, ".evidence").is_displayed()
    opened.get(f"{(made / 'index.html').as_uri()}#{at}")
    opened.refresh()
    assert one(opened, ".evidence").is_displayed()


def test_without_its_script_all_of_it_can_be_read(opened, made, tmp_path):
    html = (made / "index.html").read_text()
    start, stop = html.rindex("<script>"), html.rindex("</script>")
    Path(tmp_path, "index.html").write_text(html[:start] + html[stop + len("</script>") :])
    open_file(opened, tmp_path / "index.html")
    cell = one(opened, "a.open")
    opened.execute_script("arguments[0].click()", cell)
    assert one(opened, ".evidence:target").is_displayed()


def test_what_is_printed_has_what_was_shut(opened):
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert one(opened, "figure.view.nll").is_displayed()
        assert not every(opened, ".slider")[0].is_displayed()
        opened.execute_script("dispatchEvent(new Event('beforeprint'))")
        assert all(part.is_displayed() for part in every(opened, ".evidence"))
        opened.execute_script("dispatchEvent(new Event('afterprint'))")
        assert every(opened, "details[open]") == []
    finally:
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(opened, scheme):
    opened.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    script = """
    const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => {
      const part = (x) => (x /= 255) <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
      return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
    };
    const behind = (node) => {
      for (; node; node = node.parentElement) {
        const colour = parse(getComputedStyle(node).backgroundColor);
        if (colour.length < 4 || colour[3] === 1) return colour;
      }
      return [255, 255, 255];
    };
    return [...document.querySelectorAll("p, td, th, .v, .t, a, summary, caption, code")].map((node) => {
      const [a, b] = [light(parse(getComputedStyle(node).color)), light(behind(node))].sort((x, y) => x - y);
      return [(b + 0.05) / (a + 0.05), node.className + " " + node.tagName];
    }).filter(([contrast]) => contrast < 4.5);
    """
    assert opened.execute_script(script) == []
