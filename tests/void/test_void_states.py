"""Every state of the page as it is drawn: for screen readers, on a small phone, for fingers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("selenium", reason="selenium is not installed")

from browsers import AXE, IN_CHROMIUM, Browser, browsing
from scenes import STATES, enter
from stage import Stage, staged

pytestmark = IN_CHROMIUM
# What a finger touches, but for words in a text, boxes in a label, and what is not drawn.
SMALL = """
    const aside = '.unseen, .what, .code > button, input[type=checkbox], input[type=range]';
    const seen = {visibilityProperty: true, opacityProperty: true};
    return [...document.querySelectorAll('button, .button, select, nav a, input')]
        .filter((node) => node.checkVisibility(seen) && !node.closest('[inert]') && !node.matches(aside))
        .filter((node) => node.getBoundingClientRect().height < 44).map((node) => node.outerHTML.slice(0, 120));"""
WIDE = "return [document.documentElement.scrollWidth, innerWidth]"


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with staged() as opened:
        yield opened


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("states")) as opened:
        opened.patience = 10
        yield opened
        assert opened.complaints() == []


@pytest.mark.skipif(not AXE.exists(), reason="axe-core is not there: `make axe` fetches it")
@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (900, "dark"), (390, "light")])
def test_axe_finds_nothing(browser: Browser, stage: Stage, width: int, theme: str) -> None:
    browser.resize(width, 900)
    browser.prefer(theme)
    found = {}
    for name, state in STATES.items():
        enter(browser, stage, state)
        if violations := browser.violations():
            found[name] = violations
    assert found == {}


def test_the_smallest_phone_shows_all_and_fingers_find_it(browser: Browser, stage: Stage) -> None:
    browser.resize(320, 640)
    browser.prefer("dark")
    wide, small = {}, {}
    for name, state in STATES.items():
        enter(browser, stage, state)
        width, window = browser.run(WIDE)
        if width > window:
            wide[name] = width
        if found := browser.run(SMALL):
            small[name] = found
    assert wide == {}
    assert small == {}


def test_a_page_has_one_title_one_heading_and_its_landmarks(browser: Browser, stage: Stage) -> None:
    browser.resize(1280, 900)
    titles = {}
    for name in ("first-visit", "rejected-part", "ten-thousand", "models", "model", "judge", "judge-card"):
        enter(browser, stage, STATES[name])
        browser.until(lambda first=name == "first-visit": first or browser.driver.title != "The Void")  # type: ignore[misc]
        titles[browser.driver.title] = name
        assert len(browser.all("h1")) == 1, name
        assert len(browser.all("main")) == 1
    assert len(titles) == 7
