"""What a console can show."""

from __future__ import annotations

from rich.console import Console


def can_redraw(console: Console) -> bool:
    """Whether a console shows bars that move: a pipe or a file would get a line of each."""
    return not console.quiet and (console.is_terminal or console.is_jupyter)


def printable(text: str) -> str:
    """A text without what would move the terminal's cursor or change its colours."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
