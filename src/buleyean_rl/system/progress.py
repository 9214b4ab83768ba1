"""How far a command is: a bar on a terminal, a line every some seconds in a pipe or a log."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from buleyean_rl.system.terminal import can_redraw
from buleyean_rl.system.wording import in_words

REDRAW_SECONDS = 0.1
LINE_SECONDS = 4.0, 60.0  # between two lines: at first, and in long runs
LINE_SHARE = 0.1  # of the time that has passed
KNOWN_SHARE, KNOWN_SECONDS = 0.01, 3.0  # once so much is done, or advances for so long, the time left is said


class ProgressBar:
    """How much of some work is done and how long the rest takes. Several threads may report.

    Args:
        console: where it is shown.
        label: of the work.
        total: of the work, in parts that take about the same time.
        completed: of it, before it goes on.
    """

    def __init__(self, console: Console, label: str, total: int, completed: int = 0) -> None:
        self._console, self._label, self._first = console, label, completed
        self._lock, self._lines = threading.Lock(), _Lines(console)
        self._started = self._shown = time.monotonic()
        self._first_advance: float | None = None  # when
        self._bar = _BarWithFigures(console) if can_redraw(console) else None
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(label, total=total, completed=completed, amount="", left="")

    def update(self, completed: float, total: float, amount: str, figures: str = "") -> None:
        """Show how far the work is.

        Args:
            completed: of it.
            total: as it is estimated by now.
            amount: both in words, such as "3 of 10 answers".
            figures: shown beside; on a terminal in a line of their own.
        """
        with self._lock:
            now = time.monotonic()
            passed, advanced = now - self._started, completed - self._first
            if advanced > 0 and self._first_advance is None:
                self._first_advance = now
            seconds = passed / advanced * (total - completed) if self._is_known(now, advanced, total) else None
            if self._bar is None:
                left = "" if seconds is None else f", about {in_words(seconds)} left"
                self._lines.print(f"{self._label}: {amount}{left}{figures and ': '}{figures}")
            elif completed >= total or now - self._shown >= REDRAW_SECONDS:
                self._shown = now
                left = "" if seconds is None else _as_clock(seconds)
                self._bar.figures = figures
                self._bar.update(self._task, completed=completed, total=total, amount=amount, left=left)

    def _is_known(self, now: float, advanced: float, total: float) -> bool:
        """Whether the speed says something: the first part comes late, after loading."""
        if self._first_advance is None:
            return False
        return advanced >= KNOWN_SHARE * (total - self._first) or now - self._first_advance >= KNOWN_SECONDS

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def working(console: Console, label: str) -> Iterator[Callable[[str], None]]:
    """Say what is done within the context, where nobody can say how long it takes.

    Args:
        console: where it is said.
        label: of the work.

    Returns:
        Says how far it is by now, such as "3,000 records"; in a pipe every some seconds.
    """
    if can_redraw(console):
        with console.status(escape(label)) as status:
            yield lambda amount: status.update(escape(f"{label}: {amount}"))
        return
    console.print(label, markup=False, soft_wrap=True)
    lines = _Lines(console)
    yield lambda amount: lines.print(f"{label}: {amount}")


class _Lines:
    """Lines of a console that nobody redraws, some seconds after each other and ever fewer."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = self._printed = time.monotonic()

    def print(self, line: str) -> None:
        """Print a line, unless there was one just now."""
        now = time.monotonic()
        wait = min(max(LINE_SECONDS[0], LINE_SHARE * (now - self._started)), LINE_SECONDS[1])
        if now - self._printed >= wait:
            self._printed = now
            self._console.print(line, markup=False, soft_wrap=True)


def _as_clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


class _BarWithFigures(Progress):
    """A bar with a line of figures below it: 80 columns are too narrow for both."""

    def __init__(self, console: Console) -> None:
        self.figures = ""
        columns = "{task.description}", "{task.fields[amount]}", "{task.fields[left]}"
        label, amount, left = (TextColumn(column, markup=False) for column in columns)
        super().__init__(label, BarColumn(bar_width=None), amount, left, console=console, expand=True)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.figures:
            yield Text(self.figures)
