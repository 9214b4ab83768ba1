"""Numbers in messages."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number of things, such as "1 row" or "1,200 rows".

    Args:
        number: of them.
        noun: of one.
        plural: of several; None for the noun with an s.
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"
