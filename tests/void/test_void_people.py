"""From a question to a file in llama.cpp, for people who use a page differently and know only its words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from buleyean_rl.inference.gguf_engines import DEFAULT_ENGINE, open_gguf
from voids import Process, running

pytest.importorskip("selenium", reason="selenium is not installed")

from selenium.webdriver.common.keys import Keys

from browsers import IN_CHROMIUM, Browser, browsing

pytestmark = IN_CHROMIUM
PROMPT, TABS = "Give me a tip.", 60
NAME = "const at = document.activeElement; return at.getAttribute('aria-label') ?? at.innerText ?? ''"


class Person:
    """Finds things by role and name, as a screen reader has them, and acts on them through it."""

    width, height = 1280, 900

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        browser.resize(self.width, self.height)
        browser.prefer("light")

    def sees(self, role: str, name: str) -> int | None:
        """The node of a role whose name begins like this, unless it cannot be used."""
        for node in self.browser.command("Accessibility.getFullAXTree")["nodes"]:
            is_named = node.get("name", {}).get("value", "").startswith(name)
            refused = {each["name"]: each["value"].get("value") for each in node.get("properties", [])}.get("disabled")
            if not node["ignored"] and node["role"]["value"] == role and is_named and not refused:
                return int(node["backendDOMNodeId"])
        return None

    def press(self, role: str, name: str) -> None:
        self.act(self.browser.until(lambda: self.sees(role, name)))

    def act(self, node: int) -> None:
        found = self.browser.command("DOM.resolveNode", backendNodeId=node)["object"]["objectId"]
        click = "function () { this.focus(); this.click(); }"
        self.browser.command("Runtime.callFunctionOn", objectId=found, functionDeclaration=click)

    def write(self, name: str, text: str) -> None:
        self.press("textbox", name)
        self.browser.until(lambda: self.browser.run(NAME).startswith(name))
        self.browser.driver.switch_to.active_element.send_keys(text)


class Keyboard(Person):
    """Goes by Tab, and presses Enter."""

    def press(self, role: str, name: str) -> None:
        self.browser.until(lambda: self.sees(role, name))
        for _ in range(TABS):
            if self.browser.run(NAME).startswith(name):
                break
            self.browser.driver.switch_to.active_element.send_keys(Keys.TAB)
        else:
            raise AssertionError(f"Tab does not lead to {name}")
        if role != "textbox":
            self.browser.driver.switch_to.active_element.send_keys(Keys.ENTER)


class Finger(Person):
    """Touches a phone, where what lies on top is touched."""

    width, height = 390, 844

    def act(self, node: int) -> None:
        self.browser.command("DOM.scrollIntoViewIfNeeded", backendNodeId=node)
        quad = self.browser.command("DOM.getBoxModel", backendNodeId=node)["model"]["content"]
        point = {"x": sum(quad[::2]) / 4, "y": sum(quad[1::2]) / 4}
        self.browser.command("Input.dispatchTouchEvent", type="touchStart", touchPoints=[point])
        self.browser.command("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with browsing(tmp_path) as opened:
        yield opened
        assert opened.complaints() == []


@pytest.mark.parametrize("kind", [Person, Keyboard, Finger])
def test_somebody_rejects_trains_compares_and_downloads(
    base: Path, browser: Browser, tmp_path: Path, kind: type[Person]
) -> None:
    with running(base, tmp_path / "void") as void:
        person = kind(browser)
        browser.open(void)
        go(person, void)
        (file,) = browser.until(lambda: [path for path in tmp_path.glob("*.gguf") if path.stat().st_size])
    with closing(open_gguf(file, DEFAULT_ENGINE)) as engine:
        assert "".join(engine.generate([{"role": "user", "content": PROMPT}]))


def go(person: Person, void: Process) -> None:
    """All of it, by the page's words alone."""
    browser, is_narrow = person.browser, person.width < 1100
    person.write("Question", PROMPT)
    person.press("button", "Ask")
    browser.texts()
    person.press("button", "Reject: Answer of")
    browser.until(lambda: void.get("state")["rejections"] == 1)
    if is_narrow:
        person.press("button", "Train (1)")
    person.press("button", "Train")
    if is_narrow:
        browser.until(lambda: person.sees("button", "Stop"))
        person.press("button", "Close")
        person.press("button", "Result")
    person.press("button", "Keep")
    person.press("button", "Ask")  # what was rejected stands there to be asked again
    browser.until(lambda: len(browser.all(".answer")) == 2)
    browser.texts()
    person.press("link", "Models")
    person.press("link", "run 1")
    person.press("button", "Download: run-1-Q8_0.gguf")
