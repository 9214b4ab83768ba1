"""Training, shown as a bar."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback


class ShowProgress(TrainerCallback):
    """A progress bar with the loss, its parts, the speed and the time left."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=console,
            disable=console.quiet,
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Show an empty bar, or one as far as an earlier run came."""
        self.progress.start()
        self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step, status="")

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Show a step's figures."""
        logs = kwargs["logs"]
        if "floor" not in logs:
            return
        status = (
            f"loss {logs['loss']:.4f}  KL {logs['kl']:.4f}  contrast {logs['contrast']:.4f}  gap {logs['gap']:.4f}  "
            f"{logs['tokens'] / logs['seconds']:.0f} tokens/s"
        )
        self.progress.update(self.task, completed=state.global_step, status=status)

    def stop(self) -> None:
        """Close the bar, whatever happened."""
        self.progress.stop()
