"""A person at a headless Chromium, if there is one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement

from voids import Process, until

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
IN_CHROMIUM = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None,
        reason="there is no chromium with its chromedriver on the path (Debian: chromium, chromium-driver)",
    ),
]
AXE = Path(__file__).parents[1] / ".cache/axe/package/axe.min.js"  # `make axe` fetches it
SCREENSHOTS = os.environ.get("BULEYEAN_SCREENSHOTS")  # a folder to look at afterwards


@contextmanager
def browsing(folder: Path, *options: str) -> Iterator[Browser]:
    settings = webdriver.ChromeOptions()
    settings.binary_location = str(CHROMIUM)
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for flag in [*flags.split(), "disable-component-update", "disable-sync", "window-size=1200,900", *options]:
        settings.add_argument(f"--{flag}")
    settings.add_argument(f"--user-data-dir={folder / 'profile'}")
    settings.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    settings.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=settings, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(120)  # the machine may be busy
    try:
        yield Browser(driver, folder)
    finally:
        driver.quit()


class Browser:
    """A person at a browser, who waits `patience` seconds for anything."""

    patience = 120.0

    def __init__(self, driver: WebDriver, folder: Path) -> None:
        self.driver, self.folder = driver, folder

    def open(self, void: Process, place: str = "") -> None:
        self.driver.get(f"{void.url}/{place}")

    def resize(self, width: int, height: int) -> None:
        """A window of a size in pixels of CSS; below 700 a phone's, which is touched."""
        phone = width < 700
        metrics = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.command("Emulation.setDeviceMetricsOverride", **metrics)
        self.command("Emulation.setTouchEmulationEnabled", enabled=phone)

    def prefer(self, theme: str) -> None:
        """Light or dark; motion is reduced, so that what is drawn has arrived."""
        features = {"prefers-color-scheme": theme, "prefers-reduced-motion": "reduce"}
        self.command("Emulation.setEmulatedMedia", features=[{"name": k, "value": v} for k, v in features.items()])

    def command(self, name: str, **words: Any) -> Any:
        """A command of Chromium's own."""
        return self.driver.execute_cdp_cmd(name, words)  # type: ignore[attr-defined]

    def find(self, css: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def all(self, css: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def run(self, script: str, *words: Any) -> Any:
        return self.driver.execute_script(script, *words)

    def click(self, css: str) -> None:
        """Click a node that the page may draw again at any moment."""
        found = "const node = document.querySelector(arguments[0]); node?.click(); return node !== null"
        self.until(lambda: self.run(found, css))

    def texts(self) -> list[str]:
        """The answers of the last turn, once they are there."""
        self.until(lambda: self.all(".answer") and not self.all('.turn:last-of-type .text[aria-busy="true"]'))
        return self.contents(".turn:last-of-type .text")

    def text(self, css: str) -> str:
        """What is to be read in a node that the page may draw again at any moment; nothing where there is none."""
        return self.run("return document.querySelector(arguments[0])?.innerText.trim() ?? ''", css)

    def attribute(self, css: str, name: str) -> str:
        """Of a node that the page may draw again at any moment."""
        return self.run("return document.querySelector(arguments[0])?.getAttribute(arguments[1]) ?? ''", css, name)

    def contents(self, css: str) -> list[str]:
        """The texts of nodes that the page may draw again at any moment."""
        texts = "return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)"
        return self.run(texts, css)

    def await_marked(self, *texts: str) -> None:
        """Wait until just these parts are shown as rejected: the server and its count know it before the page does."""
        self.until(lambda: self.contents(".turn:last-of-type del") == list(texts))

    def ask(self, prompt: str) -> list[str]:
        """Ask, and wait for the answers."""
        turns = len(self.all(".turn"))
        self.find("#prompt").send_keys(prompt, Keys.ENTER)
        self.until(lambda: len(self.all(".turn")) > turns and self.text(".turn:last-of-type .me") == prompt)
        return self.texts()

    def select(self, first: int, last: int, leaf: str = ".turn:last-of-type .text [data-from]") -> None:
        """Select some units of a leaf's text."""
        self.run(
            """const node = document.querySelector(arguments[2]).firstChild, range = document.createRange();
            range.setStart(node, arguments[0]); range.setEnd(node, arguments[1]);
            getSelection().removeAllRanges(); getSelection().addRange(range);""",
            first,
            last,
            leaf,
        )
        self.until(lambda: self.all("#marking"))

    def press(self, *keys: str) -> None:
        """Keys for the page, not for a field."""
        self.run("document.activeElement.blur()")
        self.find("body").send_keys(*keys)

    def until(self, condition: Callable[[], Any], seconds: float | None = None) -> Any:
        return until(condition, self.patience if seconds is None else seconds)

    def violations(self) -> list[str]:
        """What axe-core has against the page as it is."""
        self.run(AXE.read_text("utf-8"))
        found = self.driver.execute_async_script("axe.run().then((found) => arguments[0](found.violations))")
        return [f"{one['id']}: {node['html'][:160]} {node['failureSummary']}" for one in found for node in one["nodes"]]

    def look(self, name: str) -> None:
        if SCREENSHOTS:
            self.driver.save_screenshot(str(Path(SCREENSHOTS) / f"{name}.png"))

    def complaints(self) -> list[str]:
        """What the console says, but for the network's errors: those are told to people."""
        log = self.driver.get_log("browser")  # type: ignore[attr-defined]
        return [entry["message"] for entry in log if entry["source"] != "network"]
