"""Progress of a run: steps, time left, and the figures of the last step."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from buleyean_rl.system.progress import ProgressBar


class ShowProgress(TrainerCallback):
    """Shows steps and time left, the loss of the last step and its parts, and the mean speed."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: ProgressBar | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Show the bar, at the step where a resumed run starts."""
        self.tokens, self.seconds = 0, 0.0
        self.bar = ProgressBar(self.console, "training", state.max_steps, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Show a step's figures and the mean speed."""
        logs = kwargs["logs"]
        if "floor" not in logs or self.bar is None:
            return
        self.tokens += logs["tokens"]  # a mean: single steps may have waited for the guard
        self.seconds += logs["seconds"]
        figures = (
            f"loss {logs['loss']:.4f}  KL {logs['kl']:.4f}  contrast {logs['contrast']:.4f}  gap {logs['gap']:.4f}  "
            f"{self.tokens / self.seconds:.0f} tokens/s"
        )
        done, total = state.global_step, state.max_steps
        self.bar.update(done, total, f"{done:,} of {total:,} steps", figures)

    def stop(self) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
