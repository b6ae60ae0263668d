# SPDX-License-Identifier: Apache-2.0
"""A real Chromium, driven through its own driver."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

T = TypeVar("T")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="chromium and chromedriver are not installed"
)
AXE = Path(__file__).parent / "vendor" / "axe-core-4.14.1" / "axe.min.js"
SECONDS = 60
# Gives the page's drop zone, or its paste listener, files as a person would.
_HAND_OVER = """
const [kind, files] = arguments, transfer = new DataTransfer();
for (const [name, type, text] of files)
  transfer.items.add(new File([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], name, { type }));
document.body.dispatchEvent(kind === "drop"
  ? new DragEvent(kind, { dataTransfer: transfer, bubbles: true, cancelable: true })
  : new ClipboardEvent(kind, { clipboardData: transfer, bubbles: true }));
"""


class Browser:
    """One window on the console of one server."""

    def __init__(self, url: str, driver: webdriver.Chrome) -> None:
        self.url, self.driver = url, driver

    def open(self, tab: str = "try") -> None:
        self.driver.get("about:blank")  # so that the same address is loaded anew
        self.driver.get(f"{self.url}/#{tab}")
        self.until(lambda: self.find("[role=tab][aria-selected=true]"))

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.find(selector).text

    def until(self, condition: Callable[[], T], seconds: float = SECONDS) -> T:
        """Wait until a condition holds; a missing element is no error before the time is over."""
        from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException

        waiting = WebDriverWait(self.driver, seconds, 0.1, (NoSuchElementException, StaleElementReferenceException))
        result: T = waiting.until(lambda _: condition())
        return result

    def hand_over(self, kind: str, files: list[tuple[str, str, str]]) -> None:
        """Drop or paste files: (name, media type, base64)."""
        self.driver.execute_script(_HAND_OVER, kind, files)

    def run(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def command(self, name: str, **parameters: object) -> Any:
        """A command of the DevTools protocol."""
        return self.driver.execute_cdp_cmd(name, parameters)

    def appearance(self, scheme: str, width: int = 1200, height: int = 900) -> None:
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.command("Emulation.setEmulatedMedia", features=features)
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def violations(self) -> list[str]:
        """What axe-core finds serious or critical, with the elements."""
        self.driver.execute_script(AXE.read_text())
        found = self.driver.execute_async_script(
            "const done = arguments[0]; axe.run(document).then(({violations}) => done(violations))"
        )
        return [
            f"{one['id']}: {[node['target'] for node in one['nodes']]} {one['nodes'][0]['failureSummary']}"
            for one in found
            if one["impact"] in ("serious", "critical")
        ]

    def requested(self) -> list[str]:
        """Addresses of everything that the page has loaded."""
        names: list[str] = self.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
        return names

    def complaints(self, but: tuple[str, ...] = ()) -> list[str]:
        """Errors on the browser's console, those that name one of `but` aside."""
        log = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        messages = [str(entry["message"]) for entry in log if entry["level"] == "SEVERE"]
        return [message for message in messages if not any(known in message for known in but)]


@contextmanager
def browsing(url: str) -> Iterator[Browser]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    for argument in ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"):  # a camera
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(DRIVER))
    driver.set_script_timeout(SECONDS)
    try:
        yield Browser(url, driver)
    finally:
        driver.quit()
