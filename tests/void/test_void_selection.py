"""Every selection of rendered answers is the right characters of the answer, in a browser."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("selenium", reason="selenium is not installed")

from browsers import CHROMIUM, DRIVER, Browser, browsing
from buleyean_rl.void.markdown import render
from stage import Scene, Stage, staged

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None,
        reason="there is no chromium with its chromedriver on the path (Debian: chromium, chromium-driver)",
    ),
]
ANSWERS = [
    "Plain words, two of them.\n\nAnd a *second* paragraph.",
    "## A **bold** head\n\n1. one `code` item\n2. two [a link](https://example.org)\n   - nested *deep*",
    "Fish &amp; chips &lt; 5 \\*stars\\* é 漢字 🙂🙃 end",
    "```python\ndef f(x):\n    return x\n```\n\nafter",
    "| a | b |\n|---|---|\n| 1 & 2 | **x** |\n\n> quoted *text*",
]
# All selections whose ends are between characters; as [what is seen of it, its span, does each end map one to one].
SELECTIONS = """
    const [html, done] = [arguments[0], arguments[1]];
    import('./text.js').then(({ showRendered, spanOf }) => {
        const root = document.getElementById('main');
        showRendered(root, html);
        const ends = [], range = document.createRange(), found = [];
        for (const leaf of root.querySelectorAll('[data-from]')) {
            const single = Array.from(leaf.textContent).length === leaf.dataset.to - leaf.dataset.from;
            let at = 0;
            for (const character of leaf.textContent) {
                ends.push([leaf.firstChild, at, single]);
                at += character.length;
            }
            ends.push([leaf.firstChild, at, single]);
        }
        ends.forEach(([start, from, one], first) => ends.slice(first).forEach(([end, to, other]) => {
            range.setStart(start, from);
            range.setEnd(end, to);
            found.push([range.toString(), spanOf(root, range), one, other]);
        }));
        done(found);
    });"""


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with staged() as opened:
        yield opened


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("selection")) as opened:
        yield opened


@pytest.mark.parametrize("answer", ANSWERS)
def test_what_is_selected_is_what_is_rejected(browser: Browser, stage: Stage, answer: str) -> None:
    stage.show(Scene())
    browser.driver.get(stage.url)
    selections = browser.driver.execute_async_script(SELECTIONS, render(answer))
    assert len(selections) > 100
    for seen, span, starts_exactly, ends_exactly in selections:
        letters = "".join(seen.split())
        if not letters:
            continue
        start, end = span
        source = answer[start:end]
        if starts_exactly and seen[0] == seen.lstrip()[0]:
            assert source.startswith(seen[0]), (seen, source)
        if ends_exactly and seen[-1] == seen.rstrip()[-1]:
            assert source.endswith(seen[-1]), (seen, source)
        if "&" not in answer:  # an entity is read otherwise than it is written
            rest = iter(source)
            assert all(letter in rest for letter in letters), (seen, source)


def test_nothing_is_selected_where_nothing_is_seen(browser: Browser, stage: Stage) -> None:
    stage.show(Scene())
    browser.driver.get(stage.url)
    selections = browser.driver.execute_async_script(SELECTIONS, render("Words."))
    assert [span for seen, span, *_ in selections if not seen] == [None] * len("Words..")
    assert {tuple(span) for seen, span, *_ in selections if seen == "or"} == {(1, 3)}
