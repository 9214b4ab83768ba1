"""Numbers and names in messages and in files of lines."""

from __future__ import annotations

import pytest

from buleyean_rl.system.wording import counted, one_line


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((1, "row"), "1 row"),
        ((0, "row"), "0 rows"),
        ((1200, "row"), "1,200 rows"),
        ((1, "try", "tries"), "1 try"),
        ((2, "try", "tries"), "2 tries"),
    ],
)
def test_one_is_no_plural(words: tuple[int, str], text: str) -> None:
    assert counted(*words) == text


def test_a_name_is_one_line() -> None:
    assert one_line("a\nb\x1b[1m\u2028c\udce9") == "a b [1m c "
    assert one_line("naïve\xa0漢字 🙂") == "naïve\xa0漢字 🙂"
