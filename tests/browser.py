"""A page in a real browser: Chromium without a window, driven as a user would use it."""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--window-size=1280,1400", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"),
]
SECONDS = 60.0
"""Longest wait for anything to appear."""


def skip_without_browser() -> None:
    """Skip a module where the page or the browser is not installed, unless REQUIRE_PAGE says that they must be."""
    if os.environ.get("REQUIRE_PAGE"):
        return
    pytest.importorskip("gradio", reason="the extra `page` is not installed")
    pytest.importorskip("selenium", reason="the extra `test` is not installed")
    for name in ("chromium", "chromedriver"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed (apt-get install chromium chromium-driver)", allow_module_level=True)


class Page:
    """What a user sees and does; elements are named by their ids."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, address: str) -> None:
        """Open a page and wait until its buttons are there."""
        self.driver.get(address)
        self.until(lambda: bool(self.all("#ask")))

    def all(self, selector: str) -> list[Any]:
        """All elements of a CSS selector that are shown."""
        return [element for element in self.driver.find_elements("css selector", selector) if element.is_displayed()]

    def one(self, selector: str) -> Any:
        """The element of a CSS selector, once it is there; it may be hidden, as fields for files are."""
        found = self.until(lambda: self.driver.find_elements("css selector", selector))
        return found[0]

    def text(self, name: str) -> str:
        """What an element says, empty where it is not shown."""
        shown = self.all(f"#{name}")
        return shown[0].text if shown else ""

    def value(self, name: str) -> str:
        """What stands in a field of text, empty where it is not shown."""
        shown = self.all(f"#{name} textarea")
        return shown[0].get_property("value") if shown else ""

    def until(self, holds: Callable[[], Any]) -> Any:
        """Wait until something holds; returns what it gave."""
        from selenium.common.exceptions import StaleElementReferenceException

        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            # The page may put another element in the place of one that was just found.
            with contextlib.suppress(StaleElementReferenceException):
                if value := holds():
                    return value
            time.sleep(0.1)
        raise AssertionError("it did not happen")

    def upload(self, medium: str, path: Path) -> None:
        """Choose a file, and wait until it is there."""
        self.one(f"#{medium} input[type=file]").send_keys(str(path))
        self.until(lambda: self.all(f"#{medium} [aria-label='Remove Image'], #{medium} [aria-label='Clear']"))

    def click(self, selector: str) -> None:
        """Press a button."""
        self.until(lambda: self.all(selector))[0].click()

    def type(self, words: str) -> None:
        """Fill in the question."""
        field = self.one("#question textarea")
        field.clear()
        field.send_keys(words)

    def move(self, name: str, *keys: str) -> None:
        """Move a slider by keys of the keyboard."""
        slider = self.one(f"#{name} input[type=range]")
        for key in keys:
            slider.send_keys(key)

    def ask(self) -> tuple[str, str]:
        """Press the button, and wait for the answer and the line below it."""
        before = self.text("used")
        self.click("#ask")
        self.until(lambda: self.text("used") not in ("", before) or self.value("problem"))
        return self.value("answer"), self.text("used")


@contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """A browser of its own with an empty profile."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for flag in [*FLAGS, f"--user-data-dir={profile}"]:
        options.add_argument(flag)
    options.binary_location = shutil.which("chromium") or ""
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        driver.set_page_load_timeout(SECONDS)
        yield Page(driver)
    finally:
        driver.quit()
