"""Every selection of rendered answers is the right characters of the answer, in a browser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("selenium", reason="selenium is not installed")

from browsers import IN_CHROMIUM, Browser, browsing
from buleyean_rl.void.markdown import render
from stage import Scene, Stage, staged

pytestmark = IN_CHROMIUM
ANSWERS = [
    "Plain words, two of them.\n\nAnd a *second* paragraph.",
    "## A **bold** head\n\n1. one `code` item\n2. two [a link](https://example.org)\n   - nested *deep*",
    "Fish &amp; chips &lt; 5 \\*stars\\* é 漢字 🙂🙃 end",
    "```python\ndef f(x):\n    return x\n```\n\nafter",
    "| a | b |\n|---|---|\n| 1 & 2 | **x** |\n\n> quoted *text*",
]
# All selections of words; as [what is seen of it, its span, does each end map one to one]. Ends lie in the leaf of the
# character that they take; with `edges`, in that of the next one too, where a mouse often leaves them.
SELECTIONS = """
    const [html, edges, done] = arguments;
    import('./text.js').then(({ showRendered, spanOf }) => {
        const root = document.getElementById('main');
        showRendered(root, html);
        const starts = [], ends = [], range = document.createRange(), found = [];
        for (const leaf of root.querySelectorAll('[data-from]')) {
            const single = Array.from(leaf.textContent).length === leaf.dataset.to - leaf.dataset.from;
            let at = 0;
            if (edges) ends.push([leaf.firstChild, 0, single, starts.length]);
            for (const character of leaf.textContent) {
                starts.push([leaf.firstChild, at, single]);
                at += character.length;
                ends.push([leaf.firstChild, at, single, starts.length]);
            }
        }
        const pairs = starts.flatMap((start, first) => ends.filter((end) => end[3] > first).map((end) => [start, end]));
        pairs.forEach(([[start, from, one], [end, to, other]]) => {
            range.setStart(start, from);
            range.setEnd(end, to);
            found.push([range.toString(), spanOf(root, range), one, other]);
        });
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
    selections = select_all(browser, stage, answer)
    assert len(selections) > 100
    for seen, (start, end), starts_exactly, ends_exactly in selections:
        source = answer[start:end]
        if starts_exactly:
            assert source.startswith(seen[0]), (seen, source)
        if ends_exactly:
            assert source.endswith(seen[-1]), (seen, source)
        if "&" not in answer:  # an entity is read otherwise than it is written
            rest = iter(source)
            assert all(letter in rest for letter in "".join(seen.split())), (seen, source)


def test_an_end_where_other_words_begin_takes_none_of_them(browser: Browser, stage: Stage) -> None:
    spans: dict[str, set[tuple[int, int]]] = {}
    for seen, span, *_ in select_all(browser, stage, "One *two* three.", edges=True):
        spans.setdefault(seen, set()).add(tuple(span))
    assert spans["One "] == {(0, 4)}
    assert spans["two"] == {(5, 8)}
    assert spans["One two"] == {(0, 8)}


def select_all(browser: Browser, stage: Stage, answer: str, edges: bool = False) -> list[Any]:
    stage.show(Scene())
    browser.driver.get(stage.url)
    return browser.driver.execute_async_script(SELECTIONS, render(answer), edges)
