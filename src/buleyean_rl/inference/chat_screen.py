"""Answers on a terminal as they come: whole words, Markdown, nothing cut off; as plain text where it is piped.

one model     finished blocks are printed, the one that grows is drawn anew with each piece
several       side by side where that is wide enough, otherwise one below the other
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.panel import Panel
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from buleyean_rl.system.terminal import printable

Stream = Callable[[Callable[[str], None]], None]  # calls its argument with each piece of an answer

MIN_COLUMN = 50  # characters that an answer beside another needs
_FENCE = re.compile(r" {0,3}(```|~~~)")
_CONTINUES = re.compile(r"\s|[-*+](\s|$)|\d+([.)]?$|[.)]\s)")  # at the end of the text, it may become one


def can_draw(console: Console) -> bool:
    """Whether a console shows Markdown, and can draw it anew."""
    return console.is_terminal and not console.is_dumb_terminal


def show_one(console: Console, stream: Stream) -> None:
    """Show one answer as it comes.

    Args:
        console: to show it on.
        stream: see `Stream`; what it raises is raised when all that came before is shown.
    """
    if not can_draw(console):
        try:
            stream(lambda piece: _write(console, piece))
        finally:
            _write(console, "\n")
        return
    growing = ""
    is_first = True

    def print_block(block: str) -> None:
        nonlocal is_first
        if block.strip():
            console.print(*([] if is_first else [""]), Markdown(block), sep="\n")
            is_first = False

    with Live(console=console, auto_refresh=False, transient=True, vertical_overflow="crop") as live:

        def add(piece: str) -> None:
            nonlocal growing
            growing += printable(piece)
            finished, growing = split_blocks(growing)
            for block in finished:
                print_block(block)
            live.update(_Tail(Markdown(growing)), refresh=True)

        try:
            stream(add)
        finally:
            live.update("", refresh=True)
            print_block(growing)


def show_side_by_side(console: Console, names: Sequence[str], streams: Sequence[Stream]) -> None:
    """Show answers of several models, one after the other computed, side by side where that is wide enough.

    Args:
        console: to show them on.
        names: of the models.
        streams: see `show_one`.
    """
    if not can_draw(console) or console.width < len(names) * MIN_COLUMN:
        for name, stream in zip(names, streams, strict=True):
            console.print(Text(f"{name}:", style="bold"))
            show_one(console, stream)
        return
    answers = [""] * len(names)
    with Live(console=console, auto_refresh=False, transient=True, vertical_overflow="crop") as live:
        try:
            for index, stream in enumerate(streams):

                def add(piece: str, index: int = index) -> None:
                    answers[index] += printable(piece)
                    live.update(_Tail(_columns(names, answers)), refresh=True)

                stream(add)
        finally:
            live.update("", refresh=True)
            console.print(_columns(names, answers))


def split_blocks(text: str) -> tuple[list[str], str]:
    """The blocks of Markdown that have ended, and the one that grows.

    A block ends at a blank line, but within fenced code, and before what may belong to it: an item of a list, and what
    is indented.

    Args:
        text: the beginning of a text.
    """
    finished: list[str] = []
    block: list[str] = []
    fence: str | None = None
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        is_blank = not line.strip()
        following = lines[number + 1] if number + 1 < len(lines) else ""
        block.append(line)
        if match := _FENCE.match(line):
            fence = match[1] if fence is None else None if match[1] == fence else fence
        if is_blank and fence is None and following and not _CONTINUES.match(following):
            finished.append("".join(block))
            block = []
    return finished, "".join(block)


def _write(console: Console, text: str) -> None:
    """Write a text as it is."""
    console.file.write(text)
    console.file.flush()


class _Tail:
    """As many of the last lines as the terminal shows."""

    def __init__(self, content: RenderableType) -> None:
        self._content = content

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._content, options, pad=False)
        for line in lines[-max(1, console.height - 1) :]:
            yield from line
            yield Segment.line()


def _columns(names: Sequence[str], answers: Sequence[str]) -> Table:
    """A panel for each model, of equal widths."""
    row = Table.grid(expand=True)
    for _ in names:
        row.add_column(ratio=1)
    row.add_row(*(Panel(Markdown(answer), title=Text(name)) for name, answer in zip(names, answers, strict=True)))
    return row
