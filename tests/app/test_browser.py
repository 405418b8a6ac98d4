"""The page in a real browser, Chromium without a window."""

import shutil
import threading
from pathlib import Path

import pytest

import bcoskit
from bcoskit.models import create_model

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'bcoskit[app]'")
pytest.importorskip("playwright", reason="playwright is not installed: pip install playwright")
from playwright import sync_api

from bcoskit.app import ExplanationService, serve

PHOTOGRAPHS = Path(bcoskit.__file__).parent / "assets" / "photographs"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt install chromium")


@pytest.fixture(scope="module")
def address():
    ready, found = threading.Event(), {}

    def note(address, stop):
        found.update(address=address, stop=stop)
        ready.set()

    service = ExplanationService(
        create_model("resnet20.bcos_cifar10", weights=True),
        create_model("resnet20.standard_cifar10"),
        max_bytes=1_000_000,
    )
    thread = threading.Thread(target=serve, args=(service,), kwargs={"port": 0, "ready": note}, daemon=True)
    thread.start()
    assert ready.wait(120)
    yield found["address"]
    found["stop"]()
    thread.join(60)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_tab(browser, address):
    """Tabs in which the first photograph is explained; what they ask of other hosts, or complain of, fails the test."""
    tabs, complaints = [], []

    def note(request):
        if not request.url.startswith((address, "data:", "blob:")):
            complaints.append(request.url)

    def open_tab(width=1440, height=900):
        tab = browser.new_page(viewport={"width": width, "height": height})
        tab.set_default_timeout(60_000)
        tab.on("request", note)
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.goto(address)
        tab.wait_for_selector(".bc-viewer")
        tabs.append(tab)
        return tab

    yield open_tab
    for tab in tabs:
        tab.close()
    assert complaints == []


def shows(tab, name):
    tab.locator(".bc-subject b", has_text=name).first.wait_for()


def give(tab, path):
    tab.locator("#upload input[type=file]").set_input_files(path)


def test_load_upload_choose_point_and_compare(open_tab):
    tab = open_tab()
    assert tab.title() == "bcoskit"
    assert tab.locator(".bc-panels img").count() == 3
    give(tab, PHOTOGRAPHS / "ship.jpg")
    shows(tab, "ship")
    tab.locator("#classes button", has_text="airplane").click()
    shows(tab, "airplane")
    assert tab.locator(".bc-class.bc-target .bc-name").inner_text() == "airplane"
    picture = tab.locator(".bc-panels img").nth(1)
    picture.hover(position={"x": 60, "y": 60})
    assert "of the whole" in tab.locator(".bc-hover").inner_text()
    picture.click(position={"x": 60, "y": 60})
    tab.locator(".bc-place strong").first.wait_for()
    assert "Row" in tab.locator(".bc-place").inner_text()
    before = picture.get_attribute("src")
    tab.check("#over input")
    tab.wait_for_function("before => document.querySelectorAll('.bc-panels img')[1].src !== before", arg=before)
    assert tab.locator(".bc-marked").count() == 1
    tab.get_by_role("tab", name="Compare").click()
    for title in ("Grad-CAM", "Integrated Gradients"):
        tab.get_by_label(title).uncheck()
    tab.get_by_label("Input x Gradient").check()
    tab.click("#compare")
    tab.wait_for_selector(".bc-compare")
    assert tab.locator(".bc-methods figure").count() == 4


def test_bad_files_are_told_of_and_harm_nothing(open_tab, tmp_path):
    tab = open_tab()
    hostile = tmp_path / "<img src=x onerror=alert(1)>.png"
    hostile.write_text("no image")
    tab.on("dialog", lambda dialog: pytest.fail("a name has run"))
    give(tab, hostile)
    told = tab.locator(".toast-body", has_text="is no image of a known format")
    told.wait_for()
    assert "Traceback" not in told.inner_text()
    hostile.write_bytes(bytes(1_500_000))
    give(tab, hostile)
    tab.locator(".toast-body", has_text="exceed the maximum allowed size").wait_for()
    tab.locator("#examples button[data-index='9']").click()
    shows(tab, "ship")


def test_two_tabs_at_once(open_tab):
    one, two = open_tab(), open_tab(390, 844)
    one.locator("#examples button[data-index='9']").click()
    two.locator("#examples button[data-index='10']").click()
    shows(one, "ship")
    shows(two, "truck")
    for tab in (one, two):
        tab.locator(".bc-panels img").nth(1).click()
        tab.locator(".bc-place strong").first.wait_for()
    shows(one, "ship")
    shows(two, "truck")
    assert two.evaluate("document.documentElement.scrollWidth") <= 390
