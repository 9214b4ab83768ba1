"""Training, as a person sees it: a bar on a terminal, and elsewhere, in a log, a line now and then."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from transformers import TrainerCallback

BETWEEN_LINES = 60.0  # seconds


class ShowProgress(TrainerCallback):
    """How far a run has come and the time left, the last step's loss and its parts, and the speed of all steps."""

    def __init__(self, console: Console) -> None:
        columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self.console, can_redraw = console, console.is_terminal or console.is_jupyter
        self.progress = _WithFigures(*columns, console=console, disable=console.quiet or not can_redraw)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Show an empty bar, or one as far as an earlier run came."""
        self.tokens, self.seconds = 0, 0.0
        self.first, self.started = state.global_step, time.monotonic()
        self.last_line = self.started
        self.progress.start()
        self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Show a step's figures, and the speed so far."""
        logs = kwargs["logs"]
        if "floor" not in logs:
            return
        self.tokens += logs["tokens"]  # one step alone may have waited for the guard
        self.seconds += logs["seconds"]
        self.progress.figures = (
            f"loss {logs['loss']:.4f}  KL {logs['kl']:.4f}  contrast {logs['contrast']:.4f}  gap {logs['gap']:.4f}  "
            f"{self.tokens / self.seconds:.0f} tokens/s"
        )
        self.progress.update(self.task, completed=state.global_step)
        now = time.monotonic()
        if self.progress.disable and now - self.last_line >= BETWEEN_LINES:
            self.last_line = now
            left = (now - self.started) / (state.global_step - self.first) * (state.max_steps - state.global_step)
            steps = f"step {state.global_step:,} of {state.max_steps:,}, about {in_words(left)} left"
            self.console.print(f"{steps}: {self.progress.figures}", soft_wrap=True)

    def stop(self) -> None:
        """Close the bar, whatever happened."""
        self.progress.stop()


def in_words(seconds: float) -> str:
    """A length of time, as a person would say it."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


class _WithFigures(Progress):
    """A bar with figures on a line of their own: beside it, 80 columns would cut off the steps and the time."""

    figures = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.figures:
            yield Text(self.figures)
