# SPDX-License-Identifier: Apache-2.0
"""The console in a real Chromium, against the real server with the default model.

OODGATE_SCREENSHOTS=1 writes what it looks like to docs/images/.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
from base64 import b64decode, b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from benchmarks.cifar10.examples import with_static
from benchmarks.datasets import load
from tests.e2e.browser import Browser, browsing, needs_chromium
from tests.e2e.server import Process, running
from tests.helpers import EMBEDDED, GOOD, ROOT, encoded, toy_images

pytestmark = needs_chromium

SAMPLES = ROOT / "service" / "console" / "samples"
IMAGES = ROOT / "docs" / "images"


def sample(name: str) -> tuple[str, str, str]:
    """One of the samples as a file to hand over: name, type and base64."""
    return name, "image/png", b64encode((SAMPLES / name).read_bytes()).decode()


CAT, STATIC, PATCHED = map(sample, ("cat.png", "static.png", "patched.png"))
JUNK = ("junk.png", "image/png", b64encode(b"no image at all").decode())
GRAFANA = "http://grafana.example/d/oodgate"
# What a browser writes of every answer that is no 2xx, and of a network that is down.
ANSWERED = ("the server responded with a status of 4", "net::ERR_INTERNET_DISCONNECTED")
TOKEN, ADMIN = "a token", "the admin's token"


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    with running(EMBEDDED.parents[1], max_body_bytes="1000000", grafana_url=GRAFANA) as process:
        yield process


@pytest.fixture(scope="module")
def window(server: Process) -> Iterator[Browser]:
    with browsing(server.url) as browser:
        yield browser


@pytest.fixture
def browser(window: Browser) -> Iterator[Browser]:
    """The window with nothing kept from the test before; none may leave errors behind or ask anything of others."""
    window.open()
    window.run("sessionStorage.clear()")
    window.appearance("light")
    window.open()
    window.complaints()  # forget those of the test before
    yield window
    assert window.complaints(but=ANSWERED) == []
    assert all(name.startswith((window.url, "data:", "blob:")) for name in window.requested())


def verdict_of(browser: Browser) -> str:
    """The verdict, once its heat map is there too."""

    def shown() -> str:
        browser.find(".stack img:nth-child(2)")
        return browser.text("#result .word")

    return browser.until(shown)


def screenshot(browser: Browser, name: str) -> None:
    """Keep what the whole page looks like, in 256 colours."""
    if os.environ.get("OODGATE_SCREENSHOTS"):
        IMAGES.mkdir(exist_ok=True)
        size = browser.run("return [innerWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": size[0], "height": min(size[1], 1500), "scale": 1}
        shot = browser.command("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        drawn = Image.open(io.BytesIO(b64decode(shot["data"]))).convert("RGB").quantize(256, dither=Image.Dither.NONE)
        drawn.save(IMAGES / f"{name}.png", optimize=True)


def traffic(server: Process) -> None:
    """A few familiar images, each a little different, and now and then static; real ones where pictures are made."""
    generator = np.random.default_rng(0)
    if os.environ.get("OODGATE_SCREENSHOTS"):
        for part in np.split(generator.permutation(load("cifar10-test")[0])[:192], 3):
            files = [("file", (str(i), encoded(image))) for i, image in enumerate(part)]
            assert server.client.post("/v1/verdict", files=files).status_code == 200
        return
    samples = [np.asarray(Image.open(SAMPLES / f"{name}.png")) for name in ("cat", "horse")]
    for _ in range(3):
        noisy = [samples[i % 2] + generator.normal(0, generator.uniform(0, 12), (32, 32, 3)) for i in range(40)]
        images = [np.clip(image, 0, 255).astype(np.uint8) for image in noisy]
        files = [("file", (str(i), encoded(image))) for i, image in enumerate(images)]
        files.append(("file", ("static", (SAMPLES / "static.png").read_bytes())))
        assert server.client.post("/v1/verdict", files=files).status_code == 200


def test_a_dropped_image_gets_a_verdict_with_its_reasons(browser: Browser) -> None:
    browser.hand_over("drop", [CAT])
    assert verdict_of(browser) == "Accepted"
    assert "cat" in browser.text("#result .verdict")
    shown = browser.text("#result")
    assert "calibration images look as unusual" in shown
    assert "π of the OOD prototype" in shown
    assert "curl --data-binary @cat.png -H 'Content-Type: image/png'" in shown
    assert browser.until(lambda: browser.find("#result .chart canvas")).size["width"] > 100


def test_a_pasted_image_gets_a_verdict(browser: Browser) -> None:
    browser.hand_over("paste", [STATIC])
    assert verdict_of(browser).startswith("Deferred")


def test_a_chosen_file_gets_a_verdict(browser: Browser) -> None:
    browser.find("#files").send_keys(str(SAMPLES / "static.png"))
    assert verdict_of(browser).startswith("Deferred")


def test_a_sample_gets_a_verdict_by_keyboard_alone(browser: Browser) -> None:
    browser.until(lambda: browser.find("#samples button"))
    browser.find("#samples li:nth-child(4) button").send_keys(Keys.ENTER)
    assert verdict_of(browser)


def test_a_photograph_gets_a_verdict_by_keyboard_alone(browser: Browser) -> None:
    browser.find("#photo").send_keys(Keys.ENTER)
    browser.until(lambda: browser.run("return document.querySelector('video').videoWidth") > 0)
    assert browser.violations() == []
    browser.find("#shutter .main").send_keys(Keys.ENTER)
    assert verdict_of(browser)
    assert "photo.jpg" in browser.text("#result")
    assert browser.run("return document.querySelector('video').srcObject") is None  # the camera is off again
    assert browser.find("#camera").get_attribute("capture") == "environment"  # what a phone is asked with


def test_everything_on_the_page_is_reached_with_the_tab_key(browser: Browser) -> None:
    browser.driver.get("about:blank")
    browser.driver.get(f"{browser.url}/")
    browser.until(lambda: browser.find("#samples button"))
    reached = []
    texts = [one["text"] for one in json.loads((SAMPLES / "samples.json").read_text())]
    for _ in range(5 + len(texts)):
        ActionChains(browser.driver).send_keys(Keys.TAB).perform()
        active = browser.driver.switch_to.active_element
        reached.append(active.get_attribute("id") or active.text.split("\n")[0])
    assert reached[:5] == ["Skip to the content", "tab-try", "Token", "files", "photo"]
    assert reached[5:] == texts


def test_several_images_give_a_table_that_sorts_and_names_the_bad_one(browser: Browser) -> None:
    browser.hand_over("drop", [STATIC, CAT, JUNK])
    verdict_of(browser)
    assert len(browser.all("#several tbody tr")) == 3
    assert "not a JPEG, PNG or WebP" in browser.text("#several")

    def names() -> list[str]:
        return [cell.text for cell in browser.all("#several tbody button")]

    assert names() == ["junk.png", "static.png", "cat.png"]  # by p-value
    browser.find("#several th:nth-child(6) button").send_keys(Keys.ENTER)
    assert names() == ["cat.png", "static.png", "junk.png"]
    assert browser.find("#several th[aria-sort=descending]").text.startswith("p-value")
    browser.find("#several tbody tr:first-child button").send_keys(Keys.ENTER)
    assert verdict_of(browser) == "Accepted"


def test_a_bad_image_that_falls_into_a_request_of_its_own_is_a_row_like_others(browser: Browser) -> None:
    browser.hand_over("drop", [CAT] * 16 + [JUNK])  # requests hold 16
    verdict_of(browser)
    assert len(browser.all("#several tbody tr")) == 17
    assert browser.text("#several caption").startswith("17 images, 0 deferred")


def test_a_verdict_says_whose_it_is_and_goes_when_the_next_image_is_refused(browser: Browser) -> None:
    browser.hand_over("drop", [CAT])
    verdict_of(browser)
    assert browser.text("#result .verdict").split("\n")[1:3] == ["cat.png", "Accepted"]
    browser.hand_over("drop", [JUNK])
    browser.until(lambda: "junk.png: This file cannot be used" in browser.text("#problem"))
    assert not browser.find("#result").is_displayed()
    browser.open()
    assert not browser.find("#result").is_displayed()


def test_images_that_are_too_much_at_once_are_judged_one_by_one(browser: Browser) -> None:
    name, kind, body = CAT
    padded = b64encode(b64decode(body) + bytes(600_000)).decode()  # two of these are more than the server takes
    browser.hand_over("drop", [(name, kind, padded), ("other.png", kind, padded)])
    verdict_of(browser)
    assert browser.text("#several caption").startswith("2 images, 0 deferred")


def test_the_heat_map_says_what_yellow_means_and_blames_no_part_of_an_accepted_image(browser: Browser) -> None:
    browser.hand_over("drop", [CAT])
    verdict_of(browser)
    assert browser.text("#result label") == "Show which part its score depends on most"
    browser.open()
    browser.hand_over("drop", [PATCHED])
    browser.until(lambda: "patched.png, as the network sees it" in browser.text("#result"))
    assert browser.text("#result label") == "Show which part makes it most unusual"
    assert browser.text("#result .key").startswith("Yellow: hiding this part lowers the score most")


def test_the_prototypes_and_the_synthetic_one_stand_by_distance(browser: Browser) -> None:
    browser.hand_over("drop", [STATIC])
    verdict_of(browser)
    rows = [row.text.rsplit(" ", 1) for row in browser.all("#result [aria-label*=prototypes] tbody tr")]
    assert len(rows) == 4
    assert "(synthetic OOD)" in [name for name, _ in rows]
    distances = [float(distance) for _, distance in rows]
    assert distances == sorted(distances)


def test_an_image_beyond_the_histogram_is_said_to_be_so(browser: Browser) -> None:
    browser.hand_over("drop", [STATIC])
    verdict_of(browser)
    browser.until(lambda: "This image lies beyond the last edge" in browser.text("#result"))
    browser.hand_over("drop", [CAT])
    browser.until(lambda: "The end bars hold what lies beyond, too" in browser.text("#result"))


def test_only_what_is_certain_is_a_hundred_percent(browser: Browser) -> None:
    script = "const done = arguments[0]; import('/console/dom.js').then(({ confidence }) => done(%s.map(confidence)))"
    shown = browser.driver.execute_async_script(script % "[0.5, 0.99949, 0.99999, 1]")
    assert [text.replace("\xa0", " ") for text in shown] == ["50.0 %", "99.9 %", "99.9 %", "100.0 %"]


def test_a_reload_loses_nothing_and_what_is_forgotten_is_gone(browser: Browser) -> None:
    browser.hand_over("drop", [CAT, PATCHED])
    verdict_of(browser)
    before = browser.text("#result")
    browser.open()
    assert verdict_of(browser) in before
    assert len(browser.all("#several tbody tr")) == 2
    browser.find("#several tbody tr:first-child button").send_keys(Keys.ENTER)
    assert browser.text("#result .word").startswith("Deferred")
    verdict_of(browser)  # its heat map, from the image that was kept
    browser.find("#result > .note button").send_keys(Keys.ENTER)
    browser.until(lambda: not browser.find("#result").is_displayed())
    browser.open()
    assert not browser.find("#result").is_displayed()


LEFT_BEHIND = """
const [place, age, done] = arguments, asked = indexedDB.open("oodgate", 1);
asked.onsuccess = () => {
  const images = asked.result.transaction("images", "readwrite").objectStore("images");
  if (age !== null) images.put({ kept: Date.now() - age }, place);
  const found = images.count(place);
  found.onsuccess = () => { asked.result.close(); done(found.result); };
};
"""


def test_images_that_a_tab_left_behind_a_day_ago_are_deleted(browser: Browser) -> None:
    day_ms = 86_400_000
    for tab, age in (("old", day_ms + 1000), ("young", day_ms // 2)):
        assert browser.driver.execute_async_script(LEFT_BEHIND, [tab, 0], age) == 1
    browser.open()
    counts = [browser.driver.execute_async_script(LEFT_BEHIND, [tab, 0], None) for tab in ("old", "young")]
    assert counts == [0, 1]


def test_a_file_that_is_too_large_is_refused_in_plain_words(browser: Browser) -> None:
    large = b64encode(bytes(1_000_001)).decode()
    browser.hand_over("drop", [("large.png", "image/png", large)])
    browser.until(lambda: "too much for this server" in browser.text("#problem"))
    assert "Send a smaller image" in browser.text("#problem")


def test_a_damaged_file_is_refused_in_plain_words(browser: Browser) -> None:
    browser.hand_over("drop", [JUNK])
    browser.until(lambda: "cannot be used" in browser.text("#problem"))
    assert "save it again as JPEG or PNG" in browser.text("#problem")


def test_a_file_of_another_kind_is_left_out_in_plain_words(browser: Browser) -> None:
    browser.hand_over("drop", [("notes.txt", "text/plain", JUNK[2]), CAT])
    assert verdict_of(browser) == "Accepted"
    assert "1 of 2 files left out: only JPEG, PNG and WebP" in browser.text("#problem")


@contextmanager
def offline(browser: Browser) -> Iterator[None]:
    unlimited = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.command("Network.enable")
    browser.command("Network.emulateNetworkConditions", offline=True, **unlimited)
    try:
        yield
    finally:
        browser.command("Network.emulateNetworkConditions", offline=False, **unlimited)


def test_without_a_network_the_page_says_what_to_do(browser: Browser) -> None:
    with offline(browser):
        browser.hand_over("drop", [CAT])
        browser.until(lambda: "cannot be reached. Check your network" in browser.text("#problem"))
        assert browser.violations() == []
    assert verdict_of(browser) == "Accepted"  # the image was not lost
    assert not browser.find("#problem").is_displayed()


def test_an_image_that_waits_is_judged_when_the_network_is_back_whatever_tab_is_looked_at(browser: Browser) -> None:
    browser.hand_over("drop", [STATIC])
    verdict_of(browser)
    with offline(browser):
        browser.hand_over("drop", [CAT])
        browser.until(lambda: "cannot be reached. Check your network" in browser.text("#problem"))
        assert browser.text("#result").startswith("cat.png\nNot judged yet: it waits for another try.")
        browser.find("#tab-monitor").click()
        browser.until(lambda: "cannot be reached. Check your network" in browser.text("#problem"))
        browser.find("#tab-try").click()
        browser.until(lambda: browser.text("#problem button") == "Try again")
        browser.find("#tab-monitor").click()
        browser.until(lambda: browser.find("#tab-monitor").get_attribute("aria-selected") == "true")
    browser.until(lambda: browser.run("return document.querySelector('#result .word')?.textContent") == "Accepted")
    assert not browser.find("#try").is_displayed()


def test_images_that_wait_for_a_token_outlive_a_reload_and_get_it_on_another_tab(window: Browser) -> None:
    with running(EMBEDDED.parents[1], tokens=json.dumps({"someone": digest(TOKEN)})) as server:
        browser = Browser(server.url, window.driver)
        browser.open()
        browser.hand_over("drop", [CAT, STATIC])
        browser.until(lambda: "Type your token" in browser.text("#problem"))
        browser.open()
        browser.until(lambda: browser.text("#problem button") == "Try again")
        assert browser.text("#several caption").startswith("2 images, 0 deferred, 2 waiting")
        browser.find("#tab-model").click()
        browser.until(browser.find("#token").is_displayed)
        browser.find("#token").send_keys(TOKEN, Keys.ENTER)
        browser.until(lambda: browser.find("#model .card"))
        browser.find("#tab-try").click()
        browser.until(lambda: browser.text("#several caption").startswith("2 images, 1 deferred ·"))


def test_a_busy_server_says_when_to_try_again_and_the_image_is_not_lost(window: Browser) -> None:
    settings = {"max_images": "1", "queue_capacity": "1", "batch_window_s": "1"}  # each image has the server to itself
    with running(EMBEDDED.parents[1], **settings) as server:
        browser = Browser(server.url, window.driver)
        enough = threading.Event()

        def keep_busy() -> None:
            while not enough.is_set():
                server.client.post("/v1/verdict", content=GOOD, headers={"content-type": "image/png"})

        browser.open()
        with ThreadPoolExecutor(4) as pool:
            for _ in range(4):
                pool.submit(keep_busy)

            def told() -> bool:
                browser.hand_over("drop", [CAT])
                browser.until(lambda: not browser.text("#progress"))
                return "The server is busy. Wait" in browser.text("#problem")

            try:
                browser.until(told)
            finally:
                enough.set()
        browser.find("#problem button").send_keys(Keys.ENTER)
        assert verdict_of(browser) == "Accepted"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1200])
def test_axe_finds_nothing_serious_and_nothing_overflows(
    browser: Browser, server: Process, scheme: str, width: int
) -> None:
    traffic(server)
    browser.appearance(scheme, width)
    for tab in ("try", "monitor", "model"):
        browser.open(tab)
        if tab == "try":
            browser.hand_over("drop", [PATCHED] if width > 600 else [STATIC, CAT])
            verdict_of(browser)
        else:
            browser.until(partial(browser.find, f"#{tab} .chart canvas"))
        assert browser.violations() == []
        assert browser.run("return document.documentElement.scrollWidth") <= width
        if (scheme, width) == ("light", 1200) or tab == "try":
            screenshot(browser, f"console-{tab}-{scheme}-{width}")
    ground = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(16, 22, 21)") == (scheme == "dark")


def test_the_tabs_follow_the_arrow_keys(browser: Browser) -> None:
    browser.find("#tab-try").send_keys(Keys.ARROW_RIGHT)
    browser.until(lambda: browser.find("#tab-monitor").get_attribute("aria-selected") == "true")
    assert browser.driver.switch_to.active_element.get_attribute("id") == "tab-monitor"
    browser.driver.switch_to.active_element.send_keys(Keys.END)
    browser.until(browser.find("#model").is_displayed)


@pytest.mark.parametrize("width", [320, 768, 1200])
def test_no_table_of_the_monitor_is_cut_off(browser: Browser, server: Process, width: int) -> None:
    traffic(server)
    browser.appearance("light", width)
    browser.open("monitor")
    classes = "#monitor [aria-label='Decisions by predicted class']"
    browser.until(lambda: "%" in browser.text(classes))
    cut = browser.run(
        "return [...document.querySelectorAll('#monitor .scroll')].filter((one) => one.scrollWidth > one.clientWidth)"
        ".map((one) => `${one.ariaLabel}: ${one.scrollWidth} > ${one.clientWidth}`)"
    )
    assert cut == []
    assert browser.run("return document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [360, 768, 1920])
def test_nothing_overflows_from_phone_to_wide_screen(browser: Browser, width: int) -> None:
    browser.appearance("light", width)
    browser.hand_over("drop", [STATIC, CAT])
    verdict_of(browser)
    for tab in ("try", "monitor", "model"):
        browser.find(f"#tab-{tab}").click()
        browser.until(partial(browser.find, f"#{tab} .card"))
        assert browser.run("return document.documentElement.scrollWidth") <= width


def test_the_first_load_is_small(browser: Browser) -> None:
    browser.command("Network.clearBrowserCache")
    browser.open()
    browser.until(lambda: browser.find("#samples button"))
    sizes = browser.run(
        "return performance.getEntriesByType('navigation').concat(performance.getEntriesByType('resource'))"
        ".map((entry) => entry.transferSize)"
    )
    assert len(sizes) > 15
    assert 50_000 < sum(sizes) < 300_000


def test_the_monitor_moves_under_load(browser: Browser, server: Process) -> None:
    def judged() -> int:
        browser.until(lambda: "images deferred" in browser.text("#monitor [role=status]"))
        words = browser.text("#monitor [role=status]").split(" images deferred")[0].split()
        return int(words[-1].replace(",", ""))

    browser.find("#tab-monitor").click()
    before = judged()
    files = [("file", (str(i), encoded(image))) for i, image in enumerate(toy_images(32, seed=3)[0])]
    assert server.client.post("/v1/verdict", files=files).status_code == 200
    assert browser.until(lambda: judged() == before + 32)
    shown = browser.text("#monitor")
    cards = (
        "upper control limit",
        "p-values",
        "By predicted class",
        "Drift of cifar10",
        "Queue",
        "Where the time goes",
    )
    for card in cards:
        assert card in shown
    assert browser.find("#monitor a.button").get_attribute("href") == GRAFANA


def test_the_model_s_card_says_what_it_is_and_what_is_promised(browser: Browser) -> None:
    browser.open("model")
    browser.until(lambda: browser.find("#model .small canvas"))
    shown = browser.text("#model")
    assert "At least 0.95 of the images" in shown
    assert "95 % of such calibrations accept 0.9491 to 0.9606" in shown
    for part in ("airplane", "5,000 images", "cut from the centre", "0.4914", "JPEG quality 50"):
        assert part in shown
    digests = [code.text for code in browser.all("#model dd code")]
    assert len(digests) == 3
    assert all(digest.startswith("sha256:") for digest in digests)
    assert {row.text.split()[0] for row in browser.all("#model .wide tbody tr")} > {"cifar100-test", "textures"}
    assert len(browser.all("#model .small canvas")) == 7  # familiar images and six sets


def test_the_threshold_explorer_shows_what_another_target_would_defer(browser: Browser) -> None:
    browser.find("#tab-model").click()
    slider = browser.until(lambda: browser.find("#model input[type=range]"))

    def deferred() -> list[float]:
        return [float(cell.text.split()[0]) for cell in browser.all("#model .card.wide tbody td:nth-child(2)")[:6]]

    browser.until(lambda: browser.find("#model .card.wide tbody td"))
    slider.send_keys(Keys.HOME)  # accept fewer familiar images
    loose = deferred()
    slider.send_keys(Keys.END)
    strict = deferred()
    assert len(loose) == 6
    assert all(a > b for a, b in zip(loose, strict, strict=True))
    browser.open("model")
    kept = browser.until(lambda: browser.find("#model input[type=range]"))
    assert kept.get_attribute("value") == kept.get_attribute("max")


def test_with_a_token_set_the_page_asks_for_it_and_then_works(window: Browser) -> None:
    tokens = json.dumps({"someone": digest(TOKEN)})
    with running(EMBEDDED.parents[1], tokens=tokens) as server:
        browser = Browser(server.url, window.driver)
        browser.open()
        browser.hand_over("drop", [CAT])
        browser.until(lambda: "Type your token" in browser.text("#problem"))
        field = browser.find("#token")
        assert field.is_displayed()
        assert browser.violations() == []
        field.send_keys("another", Keys.ENTER)
        browser.until(lambda: "refuses the token that is set" in browser.text("#problem"))
        assert browser.text("#access summary") == "Token"
        field.send_keys(TOKEN, Keys.ENTER)
        assert verdict_of(browser) == "Accepted"  # the image was not lost
        assert not browser.find("#problem").is_displayed()
        assert TOKEN not in browser.text("#result")  # the curl shows where it goes, not what it is
        browser.open()
        browser.until(lambda: browser.text("#access summary") == "Token ✓")


def test_a_token_that_no_one_asked_for_can_be_forgotten_again(browser: Browser) -> None:
    browser.find("#access summary").click()
    browser.find("#token").send_keys("anything", Keys.ENTER)
    browser.until(lambda: "press “Forget it”" in browser.text("#problem"))
    assert browser.text("#access summary") == "Token"
    browser.find("#token-forget").click()
    browser.until(lambda: not browser.find("#problem").is_displayed())
    browser.hand_over("drop", [CAT])
    assert verdict_of(browser) == "Accepted"


def test_the_admin_applies_another_target_and_the_verdict_changes(window: Browser, tmp_path: Path) -> None:
    settings = {"admin_token_sha256": digest(ADMIN), "state_dir": str(tmp_path)}
    with running(EMBEDDED.parents[1], **settings) as server:
        browser = Browser(server.url, window.driver)
        before = judged(server)
        browser.open("model")
        slider = browser.until(lambda: browser.find("#model input[type=range]"))
        slider.send_keys(Keys.HOME)
        browser.find("#model button.main").click()
        browser.until(lambda: "Only the admin" in browser.text("#problem"))
        browser.find("#token").send_keys(ADMIN, Keys.ENTER)
        browser.until(lambda: not browser.find("#problem").is_displayed())
        slider = browser.until(lambda: browser.find("#model input[type=range]"))
        assert slider.get_attribute("value") == "0"  # what was chosen is kept
        browser.find("#model button.main").click()
        browser.until(lambda: "at least 0.8" in browser.text("#model").lower())
        after = judged(server)
        assert after["ood"]["target_id_acceptance"] == 0.8
        assert after["ood"]["threshold"] < before["ood"]["threshold"]
        assert (before["decision"], after["decision"]) == ("accept", "defer")


def test_a_verdict_from_before_another_target_says_so_and_can_be_had_anew(window: Browser, tmp_path: Path) -> None:
    settings = {"admin_token_sha256": digest(ADMIN), "state_dir": str(tmp_path)}
    with running(EMBEDDED.parents[1], **settings) as server:
        browser = Browser(server.url, window.driver)
        browser.open()
        browser.find("#access summary").click()
        browser.find("#token").send_keys(ADMIN, Keys.ENTER)
        browser.until(lambda: browser.text("#access summary") == "Token ✓")
        browser.hand_over("drop", [CAT])
        verdict_of(browser)
        browser.until(lambda: "The end bars hold what lies beyond" in browser.text("#result"))
        assert "earlier threshold" not in browser.text("#result")
        browser.find("#tab-model").click()
        browser.until(lambda: browser.find("#model input[type=range]")).send_keys(Keys.HOME)
        browser.find("#model button.main").click()
        browser.until(lambda: "at least 0.8" in browser.text("#model").lower())
        browser.find("#tab-try").click()
        browser.until(lambda: "judged under an earlier threshold" in browser.text("#result .verdict"))
        browser.find("#result .verdict button").send_keys(Keys.ENTER)
        browser.until(lambda: "earlier threshold" not in browser.text("#result .verdict"))
        assert verdict_of(browser)


def judged(server: Process) -> Any:
    """The verdict on a cat partly covered by static: its p-value lies between the two targets' cut-offs."""
    image = encoded(with_static(np.asarray(Image.open(ROOT / "examples" / "cat.png")), 12))
    return server.client.post("/v1/verdict", content=image, headers={"content-type": "image/png"}).json()
