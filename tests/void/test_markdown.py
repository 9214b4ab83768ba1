"""Rendered answers: nothing in them runs, and every selection of what is shown is the right part of the answer."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buleyean_rl.void.markdown import render

CORPUS = (
    "Plain words.",
    "Two tips:\n\n1. **Keep a schedule.** Go to bed.\n2. *Dim* the `lights`, and __sleep__ ~~well~~.\n"
    "   - nested **one**\n",
    "# A title #\n\nSetext\n======\n\n## # hash ##\n\nText  \nafter a hard break\\\nand another",
    "```python\ndef f(x):\n\treturn x  # <b>\n\n    y\n```\n\n    indented\n\n      code",
    "| a | b\\|c | a |\n|:--|:-:|--:|\n| 1 | `x\\|y` | 1 |\n|  | **2** |\n",
    "- - a | b\n  --|--\n  c | d\n",
    "> quoted `code\n> over lines` and **bold\n> too**\nlazy\n> - list\n>   more\n",
    "Fish &amp; chips &copy; &#128512; &nosuch; \\* \\q 👍🏽 👩‍👩‍👧 é e\u0301 \u202eabc",
    "[a [link](http://e.x/a) b](http://e.x \"t\") <http://e.x/%C3%A4?a&b>"
    " <me@e.x> ![alt](http://e.x/p.png)",
    "***a** b* ~~~x~~~ ** ** _a_b_ ``a ` b`` ` x ` `",
    "<script>alert(1)</script> <img src=x onerror=alert(2)>\n\n<div onclick=x>\nblock\n</div>\n",
    "[a]: http://e.x\n[a] [x](javascript:alert(1)) [y](data:text/html,x) <javascript:alert(1)>",
    "windows\r\nlines **in\r\nbold**\r\n\r\n```\r\ncode\r\nmore\r\n```\r\n",
    "- tight\n- list\n\n  with a paragraph\n\n* * *\n\n10. ten\n11) other\n",
    "1. ```\n   in a list\n   ```\n2. \ttab\n\n\t\tcode after tabs\n",
    "unclosed **bold and `code and\n\n```\nfence",
    "\0 nul \x0b\x0c control \x85 \u2028 line\n\n***\n\n   \n",
    "\n\n  indented start\n    not code\n",
    "",
)  # fmt: skip
PIECES = [
    *"*_`~[]()<>|#-+>&;\\\n \t!1.:aé👍\r",
    "**",
    "```",
    "\n\n",
    "&amp;",
    "\\|",
    "|-|-|\n",
    "> ",
    "- ",
    "1. ",
    "    ",
]
ANSWERS = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)


class Shown(HTMLParser):
    """What a reader of the HTML sees: leaves as (text, from, to, rejected), and tags with their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.leaves: list[tuple[str, int, int, bool]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: tuple[int, int, bool] | None = None
        self.stray = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append((tag, values))
        if "data-from" in values:
            self._open = int(values["data-from"] or ""), int(values["data-to"] or ""), tag == "del"
            self.leaves.append(("", *self._open))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("span", "del"):
            self._open = None

    def handle_data(self, data: str) -> None:
        if self._open is None:
            self.stray += data
        else:
            text, *rest = self.leaves[-1]
            self.leaves[-1] = (text + data, *rest)

    @property
    def places(self) -> list[tuple[int, int]]:
        """Of each character shown, the range of the answer that it stands for."""
        found = []
        for text, start, end, _ in self.leaves:
            one_to_one = len(text) == end - start
            found += [(start + k, start + k + 1) if one_to_one else (start, end) for k in range(len(text))]
        return found


def check_places(answer: str) -> Shown:
    shown = Shown(render(answer))
    assert not shown.stray.strip()
    at = 0
    for text, start, end, _ in shown.leaves:
        assert at <= start < end <= len(answer), (answer, shown.leaves)
        at = end
        if len(text) == end - start and "\r" not in answer[start:end]:
            assert text in (answer[start:end], answer[start:end].replace("\n", " ").replace("\0", "\ufffd")) or (
                end - start == 1
            )
    return shown


def check_selection(answer: str, shown: Shown, first: int, last: int) -> None:
    """Marked by the span that the page makes of a selection, just the selection is marked."""
    places = shown.places
    span = places[first][0], places[last][1]
    marked = Shown(render(answer, (span,)))
    assert marked.places == places
    rejected = [place for leaf in marked.leaves for place in [leaf[3]] * len(leaf[0])]
    expected = [span[0] <= start and end <= span[1] for start, end in places]
    assert rejected == expected, (answer, span)


@pytest.mark.parametrize("answer", CORPUS)
def test_every_selection_of_the_corpus_is_the_right_part(answer: str) -> None:
    shown = check_places(answer)
    places = range(len(shown.places))
    for first, last in [(k, k) for k in places] + list(combinations(places, 2))[:: 1 + len(shown.places) ** 2 // 600]:
        check_selection(answer, shown, first, last)


@settings(max_examples=400, deadline=None)
@given(answer=ANSWERS, data=st.data())
def test_any_selection_of_any_answer_is_the_right_part(answer: str, data: st.DataObject) -> None:
    shown = check_places(answer)
    if shown.places:
        first = data.draw(st.integers(0, len(shown.places) - 1))
        check_selection(answer, shown, first, data.draw(st.integers(first, len(shown.places) - 1)))


@pytest.mark.parametrize(
    ("answer", "words", "part"),
    [
        ("1. 1 and `1`", "1", ["1", "1"]),
        ("| a | a |\n|--|--|\n| a | a |", "a", ["a"] * 4),
        ("**Keep** a schedule.", "Keep a", ["Keep** a"]),
        ("Fish &amp; chips", "& chips", ["&amp; chips"]),
        ("> one\n> two", "one\ntwo", ["one\n> two"]),
        ("a 👍🏽 b", "👍🏽", ["👍🏽"]),
        ("```\nx = 1\n\ny\n```", "1\n\ny", ["1\n\ny"]),
    ],
)
def test_words_as_read_are_the_words_as_written(answer: str, words: str, part: list[str]) -> None:
    shown = Shown(render(answer))
    text, at, found = "".join(leaf[0] for leaf in shown.leaves), 0, []
    while (at := text.find(words, at)) >= 0:
        found.append(answer[shown.places[at][0] : shown.places[at + len(words) - 1][1]])
        at += len(words)
    assert found == part


@pytest.mark.parametrize("answer", CORPUS)
def test_nothing_that_is_rendered_runs_or_fetches(answer: str) -> None:
    shown = Shown(render(answer))
    allowed = {"data-from", "data-to", "href", "rel", "class", "start"}
    for tag, attributes in shown.tags:
        assert tag not in ("script", "img", "style", "iframe", "object", "form", "input")
        assert attributes.keys() <= allowed
        assert (attributes.get("href") or "http:").startswith(("http:", "https:", "mailto:"))


def test_a_rejected_part_is_struck_where_it_stands() -> None:
    assert [leaf[0] for leaf in Shown(render("a **bold** move", ((4, 12),))).leaves if leaf[3]] == ["bold", " m"]


def test_headings_stand_below_the_page_and_go_down_a_level_at_a_time() -> None:
    assert re.findall("<(h[1-6])>", render("## a\n\n#### b\n\n# c\n\n###### d\n")) == ["h4", "h5", "h4", "h5"]
