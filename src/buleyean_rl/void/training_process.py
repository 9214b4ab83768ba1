"""A training run's process: trains as its server says, and prints a JSON line a step.

stdin: `stop` ends the run with what it has learnt; its end, which is the server's, ends the process.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any


def train_run(settings: dict[str, Any]) -> None:
    """Train, or resume what an earlier process began.

    Args:
        settings: model, folder and steps.
    """
    steps_out, sys.stdout = sys.stdout, sys.stderr  # stdout carries the steps alone
    stop = threading.Event()
    threading.Thread(target=_obey, args=(stop,), daemon=True).start()
    from transformers import TrainerCallback

    from buleyean_rl.errors import BuleyeanError
    from buleyean_rl.models.run_files import is_finished
    from buleyean_rl.training.config import load_config
    from buleyean_rl.training.run import train

    def report(logs: dict[str, Any], step: int) -> None:
        if "floor" in logs:
            point = {"step": step} | {name: logs[name] for name in ("loss", "floor", "gap")}
            print(json.dumps(point), file=steps_out, flush=True)

    class ReportSteps(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            for logs in state.log_history:  # a killed server may have missed the last ones
                report(logs, logs["step"])

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            control.should_training_stop |= stop.is_set()

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
            report(kwargs["logs"], state.global_step)

    folder = Path(settings["folder"])
    if is_finished(folder):  # but the server was gone by then
        return
    try:
        config = load_config(None, folder, {"max_steps": settings["steps"]}, preset="few")
        resume = (folder / "settings.json").exists()
        train(folder.with_suffix(".jsonl"), settings["model"], config, resume=resume, callbacks=[ReportSteps()])
    except BuleyeanError as error:
        sys.exit(f"{error}")


def _obey(stop: threading.Event) -> None:
    """Read what the server says, until it is gone."""
    while os.read(0, 64):
        stop.set()
    os._exit(1)


if __name__ == "__main__":
    train_run(json.loads(sys.argv[1]))
