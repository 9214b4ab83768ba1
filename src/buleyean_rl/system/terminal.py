"""What a console can show."""

from __future__ import annotations

from rich.console import Console


def can_redraw(console: Console) -> bool:
    """Whether a console shows bars that move: a pipe, a file or a terminal without a cursor to move gets lines."""
    return not console.quiet and (console.is_jupyter or (console.is_terminal and not console.is_dumb_terminal))


def printable(text: str) -> str:
    """A text without what would move the terminal's cursor or change its colours."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
