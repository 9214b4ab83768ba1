"""Training, shown as a bar."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from transformers import TrainerCallback


class ShowProgress(TrainerCallback):
    """A progress bar with the time left, and under it the last step's loss and its parts and the speed of all steps."""

    def __init__(self, console: Console) -> None:
        columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self.progress = _WithFigures(*columns, console=console, disable=console.quiet)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Show an empty bar, or one as far as an earlier run came."""
        self.tokens, self.seconds = 0, 0.0
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

    def stop(self) -> None:
        """Close the bar, whatever happened."""
        self.progress.stop()


class _WithFigures(Progress):
    """A bar with figures on a line of their own: beside it, 80 columns would cut off the steps and the time."""

    figures = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.figures:
            yield Text(self.figures)
