"""The page in a real browser: Chromium through chromedriver. Skipped without them, and without selenium or gradio."""

from __future__ import annotations

import base64
import shutil
import time
from contextlib import contextmanager

import numpy as np
import pytest
import soundfile

import ldm2
from tests.helpers import tone

pytest.importorskip("gradio")
selenium = pytest.importorskip("selenium")
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if BROWSER is None or DRIVER is None:
    pytest.skip("no chromium and chromedriver here", allow_module_level=True)

from selenium.webdriver import ActionChains, Chrome, ChromeOptions, ChromeService  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

from ldm2.serve import page  # noqa: E402
from tests.serve.client import serving  # noqa: E402

# Of gradio's own use of pandas.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
PATIENCE = 120.0                           # seconds: the machine may be busy
SECONDS = 0.64                             # of the sounds that are made


@pytest.fixture(scope="module")
def server():
    """A server with the page, whose model makes short sounds in few steps."""
    pipe = ldm2.load("tiny")
    pipe.defaults = {**pipe.defaults, "steps": 3, "seconds": SECONDS}
    with serving(pipe, prepare=page.mount) as client:
        yield client


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = ChromeOptions()
    options.binary_location = BROWSER
    folder = tmp_path_factory.mktemp("browser")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--mute-audio",
                     "--window-size=1280,900", f"--user-data-dir={folder}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = Chrome(options, ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """The page in a window of its own, as a person sees it."""

    def __init__(self, browser, server, width=1280, height=900, dark=False):
        self.browser, self.server = browser, server
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500})
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        browser.get(str(server.base_url))
        self.first(".ldm2-make")

    def seen(self, css, text=""):
        """The elements that are seen, with a text in them."""
        found = self.browser.find_elements("css selector", css)
        return [each for each in found if each.is_displayed() and text in each.text]

    def first(self, css, text=""):
        """The first such element, as soon as there is one."""
        return until(lambda: (self.seen(css, text) or [None])[0])

    def open(self, tab):
        self.first("button[role=tab]", tab).click()

    def field(self, label):
        """The input below a label."""
        return until(lambda: [found[0] for each in self.seen("label, .block")
                              if each.text.split("\n")[0].strip() == label
                              and (found := each.find_elements("css selector", "textarea, input"))])[-1]

    def write(self, label, text):
        field = self.field(label)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text or Keys.BACKSPACE)
        return field

    def advanced(self):
        self.first(".ldm2-advanced button").click()

    def players(self):
        """Length in seconds and address of the players that are seen."""
        script = """return [...document.querySelectorAll('.ldm2-results audio')].filter(each => each.offsetParent)
                    .map(each => [each.duration, each.src])"""
        return self.browser.execute_script(script)

    def made(self, number=1):
        """The players, when they have loaded."""
        return until(lambda: (found := self.players()) and len(found) == number
                     and all(length for length, _ in found) and found)

    def told(self):
        """What stands where the page tells how far it is."""
        return " ".join(each.text for each in self.seen(".ldm2-status"))

    def shot(self, path):
        """A picture of all of the page."""
        height = self.browser.execute_script("return document.documentElement.scrollHeight")
        width = self.browser.execute_script("return innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": min(height, 3000), "scale": 1}
        found = self.browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        path.write_bytes(base64.b64decode(found["data"]))
        return path


def until(condition):
    """What the condition returns when it is true; elements may vanish while it looks."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            if found := condition():
                return found
        except selenium.common.exceptions.StaleElementReferenceException:
            pass
        time.sleep(0.05)
    raise AssertionError("it does not happen")


@contextmanager
def window(browser):
    """Another window, closed at the end."""
    before = browser.current_window_handle
    browser.switch_to.new_window("tab")
    try:
        yield browser.current_window_handle
    finally:
        browser.close()
        browser.switch_to.window(before)


def newest(server):
    """The job that came last."""
    return server.get("/v1/jobs").json()["data"][0]


def bell(folder):
    """A file to edit."""
    path = folder / "bell.wav"
    soundfile.write(path, tone(1.0) * np.exp(-3 * np.arange(16_000) / 16_000), 16_000)
    return path


def test_one_click_on_an_example_makes_a_sound_and_nothing_comes_from_elsewhere(browser, server):
    seen = Page(browser, server)
    seen.first(".ldm2-examples button", "a low bell").click()
    [(length, address)] = seen.made()
    assert length == pytest.approx(SECONDS, abs=0.01) and address.startswith(str(server.base_url))
    assert newest(server)["settings"]["prompt"] == "a low bell" == seen.field("Prompt").get_attribute("value")
    asked = [each["message"] for each in browser.get_log("performance") if "requestWillBeSent\"" in each["message"]]
    assert asked
    assert not [each for each in asked if '"url":"http' in each and f'"url":"{server.base_url}' not in each]


def test_candidates_stand_side_by_side_with_their_scores_and_can_be_downloaded(browser, server):
    seen = Page(browser, server)
    seen.write("Candidates", "2")
    seen.first(".ldm2-make").click()
    seen.made(2)
    first, second = (each["score"] for each in newest(server)["results"])
    assert first >= second
    cards = seen.seen(".ldm2-card")
    assert "best" in cards[0].text and f"CLAP {first:.3f}" in cards[0].text and f"CLAP {second:.3f}" in cards[1].text
    assert cards[0].location["y"] == cards[1].location["y"]
    pictures = "return [...document.querySelectorAll('.ldm2-card img')].map(each => each.naturalWidth)"
    assert until(lambda: browser.execute_script(pictures) == [640, 640])
    links = [each.get_attribute("href") for each in cards[1].find_elements("css selector", "a")]
    starts = [server.get(link).content[:4] for link in links]
    assert starts[:2] == [b"fLaC", b"RIFF"] and starts[2][:2] in (b"ID", b"\xff\xfb", b"\xff\xf3")


def test_a_running_job_is_stopped_and_a_closed_window_stops_its_own(browser, server):
    seen = Page(browser, server)
    seen.advanced()
    seen.write("Steps", "900").send_keys(Keys.CONTROL, Keys.ENTER)          # the keyboard makes, too
    until(lambda: "of 900" in seen.told() and "left" in seen.told())
    seen.first(".ldm2-stop").click()
    until(lambda: "Stopped" in seen.told())
    assert newest(server)["status"] == "cancelled" and newest(server)["step"] < 900
    with window(browser):
        other = Page(browser, server)
        other.advanced()
        other.write("Steps", "901").send_keys(Keys.CONTROL, Keys.ENTER)
        until(lambda: "of 901" in other.told())
    until(lambda: newest(server)["status"] == "cancelled")


def test_a_wrong_value_is_a_line_that_names_it_and_the_page_works_on(browser, server):
    seen = Page(browser, server)
    seen.advanced()
    seen.write("Steps", "1.5").send_keys(Keys.CONTROL, Keys.ENTER)
    until(lambda: "steps must be an integer, got '1.5'" in seen.told())
    assert seen.seen(".ldm2-error[role=alert]")
    seen.write("Steps", "").send_keys(Keys.CONTROL, Keys.ENTER)
    seen.made()
    assert not seen.seen(".ldm2-error")


def test_a_region_is_dragged_and_made_again_and_the_rest_is_kept(browser, server, tmp_path):
    seen = Page(browser, server)
    seen.open("Edit")
    seen.first(".ldm2-make").click()
    until(lambda: "there is no sound yet" in seen.told())
    upload = browser.find_element("css selector", ".ldm2-sound input[type=file]")
    upload.send_keys(str(bell(tmp_path)))
    canvas = seen.first(".ldm2-canvas")
    quarter = canvas.size["width"] // 4
    ActionChains(browser).move_to_element_with_offset(canvas, -quarter, 0).click_and_hold().move_by_offset(
        quarter, 0).release().perform()
    until(lambda: ":" in seen.field("Parts to make again (seconds)").get_attribute("value"))
    seen.write("Prompt", "slow clicks")
    seen.first(".ldm2-make").click()
    [(length, address)] = seen.made()
    assert length == pytest.approx(1.0, abs=0.01)
    [[start, end]] = newest(server)["settings"]["times"]
    assert (start, end) == (pytest.approx(0.25, abs=0.02), pytest.approx(0.5, abs=0.02))
    (tmp_path / "edited.wav").write_bytes(server.get(address).content)
    edited, given = (soundfile.read(tmp_path / name)[0] for name in ("edited.wav", "bell.wav"))
    outside = np.r_[0:int(16_000 * start), int(16_000 * end) + 1:16_000]
    assert np.array_equal(edited[outside], given[outside]) and not np.array_equal(edited, given)


def test_the_settings_of_a_file_come_back_and_make_the_same_sound(browser, server, tmp_path):
    result = ldm2.generate("wind blowing", model="tiny", steps=4, seconds=1.0, seed=2**64 - 1, guidance_scale=2.25)
    [path] = result.save(tmp_path / "old.flac")
    seen = Page(browser, server)
    seen.open("History")
    browser.find_element("css selector", ".ldm2-file input[type=file]").send_keys(str(path))
    until(lambda: "old.flac" in seen.told())
    assert [seen.field(name).get_attribute("value") for name in ("Prompt", "Seed")] == ["wind blowing", str(2**64 - 1)]
    seen.advanced()
    assert [seen.field(name).get_attribute("value") for name in ("Steps", "Guidance scale")] == ["4", "2.25"]
    seen.first(".ldm2-make").click()
    [(_, address)] = seen.made()
    (tmp_path / "again.wav").write_bytes(server.get(address).content)
    again, old = (soundfile.read(tmp_path / name, dtype="int16")[0] for name in ("again.wav", "old.flac"))
    assert np.array_equal(again, old)
    seen.open("History")
    assert len(seen.made()) == 1 and "wind blowing" in seen.first(".ldm2-past").text


def test_a_file_without_settings_is_told(browser, server, tmp_path):
    seen = Page(browser, server)
    seen.open("History")
    browser.find_element("css selector", ".ldm2-file input[type=file]").send_keys(str(bell(tmp_path)))
    until(lambda: "bell.wav holds no settings of ldm2" in seen.told())


def test_a_loop_is_heard_twice_and_prompts_follow_each_other(browser, server):
    seen = Page(browser, server)
    seen.open("Long")
    seen.write("Length", "2")
    seen.write("From (seconds)", "1")
    seen.write("Prompt from there on", "white noise")
    seen.first("label", "Loop").click()
    seen.first(".ldm2-make").click()
    [(length, _)] = seen.made()
    settings = newest(server)["settings"]
    assert length == pytest.approx(2.0, abs=0.01) and settings["loop"]
    assert settings["prompt_at"] == [[1.0, "white noise"]]
    assert seen.first(".ldm2-twice", "0:04")


def test_two_windows_at_once_have_their_own_sounds_and_see_the_queue(browser, server):
    first = Page(browser, server)
    first.advanced()
    first.write("Steps", "600")
    first.write("Prompt", "a siren").send_keys(Keys.CONTROL, Keys.ENTER)
    until(lambda: "of 600" in first.told())
    mine = browser.current_window_handle
    with window(browser) as theirs:
        second = Page(browser, server)
        second.write("Prompt", "white noise").send_keys(Keys.CONTROL, Keys.ENTER)
        until(lambda: "in the queue" in second.told())
        browser.switch_to.window(mine)
        first.first(".ldm2-stop").click()
        until(lambda: "Stopped" in first.told())
        browser.switch_to.window(theirs)
        second.made()
        assert newest(server)["settings"]["prompt"] == "white noise"
    assert not first.players()


@pytest.mark.parametrize("width, dark", [(1280, True), (390, False)], ids=["wide and dark", "narrow and light"])
def test_each_tab_fits_at_both_widths(browser, server, tmp_path, width, dark):
    seen = Page(browser, server, width, 844, dark)
    seen.first(".ldm2-make").click()
    seen.made()
    for tab in ("Make", "Edit", "Long", "History"):
        seen.open(tab)
        time.sleep(0.2)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert seen.shot(tmp_path / f"{tab}-{width}.png").stat().st_size > 10_000
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(int(part) for part in background.strip("rgba()").split(",")[:3]) < 200) == dark
