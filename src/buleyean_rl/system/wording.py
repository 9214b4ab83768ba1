"""Numbers and names in messages and in files of lines."""

from __future__ import annotations

import re

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number of things, such as "1 row" or "1,200 rows".

    Args:
        number: of them.
        noun: of one.
        plural: of several; None for the noun with an s.
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def in_words(seconds: float) -> str:
    """A duration in seconds, minutes or hours."""
    if seconds < 90:
        return counted(round(seconds), "second")
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def one_line(text: str) -> str:
    """A text with a space for each line break and other control character, and for what UTF-8 cannot hold."""
    return _CONTROL.sub(" ", text)
