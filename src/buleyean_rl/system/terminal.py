"""What a console can show."""

from __future__ import annotations

from rich.console import Console


def can_redraw(console: Console) -> bool:
    """Whether a console shows bars that move: a pipe or a file would get a line of each."""
    return not console.quiet and (console.is_terminal or console.is_jupyter)
