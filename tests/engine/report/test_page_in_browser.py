"""The report in a real browser: no errors, no requests, nothing wider than a phone, readable in the dark, and by keyboard."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
WHY = "needs Debian's chromium and chromium-driver: apt-get install chromium chromium-driver"
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=WHY)

OPTIONS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--disable-breakpad",
]

TEXTS = """
const out = [];
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const e = walk.currentNode.parentElement;
  if (!walk.currentNode.data.trim() || !e.getClientRects().length || e.tagName === 'SCRIPT') continue;
  let back = e;
  while (back && getComputedStyle(back).backgroundColor === 'rgba(0, 0, 0, 0)') back = back.parentElement;
  const style = back ? getComputedStyle(back).backgroundColor : 'rgb(255, 255, 255)';
  out.push([getComputedStyle(e).color, style, walk.currentNode.data.trim().slice(0, 40)]);
}
return out;
"""


def _processes(folder):
    """Processes whose command line names a folder, such as a browser's profile."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if str(folder) in (entry / "cmdline").read_bytes().decode(errors="replace"):
                    found.append(entry.name)
            except OSError:
                continue
    return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    selenium = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install -e '.[test]'")
    from selenium.webdriver.chrome.service import Service

    profile = tmp_path_factory.mktemp("profile")
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in (*OPTIONS, f"--user-data-dir={profile}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    os.environ["SE_OFFLINE"] = "true"  # it is given the driver, and looks for none
    service = Service(DRIVER)
    driver = selenium.Chrome(options=options, service=service)
    driver.set_page_load_timeout(60)
    try:
        yield driver
    finally:
        os.environ.pop("SE_OFFLINE", None)
        driver.quit()
        service.stop()
    until = time.monotonic() + 10
    while _processes(profile) and time.monotonic() < until:
        time.sleep(0.1)
    assert not _processes(profile)  # the browser is not left running


@pytest.fixture(scope="module")
def file(small_report, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    small_report.save(path)
    return path


@pytest.fixture
def show(browser, file):
    def load(width=1200, height=900, dark=False):
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        for log in ("browser", "performance"):
            browser.get_log(log)
        browser.get(file.as_uri())
        browser.execute_async_script(
            "Promise.all([...document.images].map(i => i.decode())).then(arguments[0], arguments[0])"
        )
        return browser

    return load


def test_there_are_no_errors_and_no_requests_but_for_the_file(show, file):
    page = show()
    asked = []
    for entry in page.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked.append((message["params"]["documentURL"], message["params"]["request"]["url"]))
    own = [url for document, url in asked if document == file.as_uri()]  # others are of the browser's own first page
    assert file.as_uri() in own
    assert [url[:60] for url in own if url != file.as_uri() and not url.startswith("data:")] == []
    assert not [url for _, url in asked if url.startswith(("http:", "https:", "ws:", "wss:"))]
    assert page.get_log("browser") == []
    assert (
        page.execute_script("return document.querySelectorAll('script:not([type=\"application/json\"])').length") == 0
    )
    assert "alert(1)" in page.title  # a hostile title is text


def test_every_figure_is_drawn_and_has_a_text_alternative(show):
    page = show()
    images = page.execute_script("return [...document.images].map(i => [i.alt, i.naturalWidth, i.clientWidth])")
    assert len(images) >= 4
    for alt, natural, shown in images:
        assert len(alt) > 80
        assert natural > 0
        assert shown > 200


def test_the_numbers_that_are_shown_are_those_of_the_json(show):
    page = show()
    contents = json.loads(page.execute_script("return document.getElementById('report').textContent"))
    shown = page.execute_script(
        "return [...document.querySelectorAll('data[data-path]')].map(e => [e.dataset.path, e.value, e.textContent])"
    )
    assert len(shown) > 60
    for pointer, value, text in shown:
        found = contents
        for part in pointer.split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            found = found[int(part)] if isinstance(found, list) else found[part]
        assert float(value) == found
        assert text.strip()


@pytest.mark.parametrize("width", [360, 768, 1200])
def test_nothing_is_wider_than_the_window_but_inside_its_own_scroller(show, width):
    page = show(width)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    wide = page.execute_script(
        """return [...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1
        && !e.closest('.scroll, .card, pre')).map(e => e.outerHTML.slice(0, 80))"""
    )
    assert wide == []
    small = page.execute_script(
        "return [...document.querySelectorAll('p, td, th, dd, li, pre')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(small) >= 14


def _luminance(colour):
    rgb = [float(v) / 255 for v in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_has_contrast_in_the_light_and_in_the_dark(show):
    backs = {}
    for dark in (False, True):
        page = show(dark=dark)
        texts = page.execute_script(TEXTS)
        assert len(texts) > 100
        for ink, back, text in texts:
            high, low = sorted((_luminance(ink), _luminance(back)), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (dark, ink, back, text)
        backs[dark] = page.execute_script("return getComputedStyle(document.body).backgroundColor")
        cards = page.execute_script(
            "return [...document.querySelectorAll('.card')].map(e => getComputedStyle(e).backgroundColor)"
        )
        assert set(cards) == {"rgb(255, 255, 255)"}  # figures are drawn in black
    assert _luminance(backs[False]) > 0.9
    assert _luminance(backs[True]) < 0.05


def test_the_keyboard_reaches_the_result_the_tables_and_the_details(show):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    page = show()
    where = (
        "const e = document.activeElement; return [e.tagName, e.className, e.getAttribute('aria-labelledby') || e.id]"
    )
    ActionChains(page).send_keys(Keys.TAB).perform()
    assert page.execute_script(where)[:2] == ["A", "skip"]
    box = page.execute_script("const r = document.activeElement.getBoundingClientRect(); return [r.top, r.left]")
    assert min(box) >= 0  # it comes into view
    assert page.execute_script("return getComputedStyle(document.activeElement).outlineStyle") != "none"
    ActionChains(page).send_keys(Keys.ENTER).perform()
    assert page.execute_script(where)[2] == "result"
    ActionChains(page).send_keys(Keys.TAB).perform()
    assert page.execute_script(where)[2] == "cap-result"  # the table of the result comes next
    wanted = page.execute_script(
        "return [...document.querySelectorAll('.scroll')].filter(e => e.checkVisibility()).length"
    )
    seen, summaries = 1, 0
    for _ in range(80):
        ActionChains(page).send_keys(Keys.TAB).perform()
        tag, name, _ = page.execute_script(where)
        if tag == "BODY":
            break
        seen += name == "scroll"
        summaries += tag == "SUMMARY"
        assert page.execute_script("return getComputedStyle(document.activeElement).outlineStyle") != "none"
    assert seen == wanted
    assert summaries >= 4


def test_it_prints_without_what_only_a_screen_needs(show):
    page = show()
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    hidden = page.execute_script(
        "return ['.skip', 'nav'].map(s => getComputedStyle(document.querySelector(s)).display)"
    )
    assert hidden == ["none", "none"]
    assert page.execute_script("return getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
