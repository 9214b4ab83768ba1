"""Progress of a run: a bar on a terminal, a line a minute in a log."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from transformers import TrainerCallback

from buleyean_rl.system.terminal import can_redraw
from buleyean_rl.system.wording import counted

LINE_INTERVAL_SECONDS = 60.0


class ShowProgress(TrainerCallback):
    """Shows steps and time left, the loss of the last step and its parts, and the mean speed."""

    def __init__(self, console: Console) -> None:
        columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self.console = console
        self.progress = _WithFigures(*columns, console=console, disable=not can_redraw(console))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Show the bar, at the step where a resumed run starts."""
        self.tokens, self.seconds = 0, 0.0
        self.first, self.started = state.global_step, time.monotonic()
        self.last_line = self.started
        self.progress.start()
        self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Show a step's figures and the mean speed."""
        logs = kwargs["logs"]
        if "floor" not in logs:
            return
        self.tokens += logs["tokens"]  # a mean: single steps may have waited for the guard
        self.seconds += logs["seconds"]
        self.progress.figures = (
            f"loss {logs['loss']:.4f}  KL {logs['kl']:.4f}  contrast {logs['contrast']:.4f}  gap {logs['gap']:.4f}  "
            f"{self.tokens / self.seconds:.0f} tokens/s"
        )
        self.progress.update(self.task, completed=state.global_step)
        now = time.monotonic()
        if self.progress.disable and now - self.last_line >= LINE_INTERVAL_SECONDS:
            self.last_line = now
            left = (now - self.started) / (state.global_step - self.first) * (state.max_steps - state.global_step)
            steps = f"step {state.global_step:,} of {state.max_steps:,}, about {in_words(left)} left"
            self.console.print(f"{steps}: {self.progress.figures}", soft_wrap=True)

    def stop(self) -> None:
        """Close the bar."""
        self.progress.stop()


def in_words(seconds: float) -> str:
    """A duration in seconds, minutes or hours."""
    if seconds < 90:
        return counted(round(seconds), "second")
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


class _WithFigures(Progress):
    """A progress bar with a line of figures below it: 80 columns are too narrow for both."""

    figures = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.figures:
            yield Text(self.figures)
