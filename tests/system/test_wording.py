"""Numbers in messages."""

from __future__ import annotations

import pytest

from buleyean_rl.system.wording import counted


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
