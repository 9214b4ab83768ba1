"""The process that trains, one run after the other, on a model that stays in memory between them.

stdin: {"model"} loads it; {"model", "folder", "steps"} trains, and prints a JSON line a step, then {"ended": true};
`"stop"` ends the run with what it has learnt. The end of stdin, which is the server's, ends the process. So does a run
that fails: the next one has a process of its own.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any, TextIO

from buleyean_rl.system.memory import return_free_memory

Job = dict[str, Any]


class TrainingProcess:
    """Trains as its server says.

    Args:
        steps_out: gets a line a step.
    """

    def __init__(self, steps_out: TextIO) -> None:
        self._out, self._stop = steps_out, threading.Event()
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._name = ""
        self._model: Any = None

    def run(self) -> None:
        """Do what the server says, until it is gone."""
        threading.Thread(target=self._listen, daemon=True).start()
        while True:
            job = self._jobs.get()
            if "folder" not in job:
                self._prepare(job["model"])
                continue
            folder = Path(job["folder"])
            with folder.with_suffix(".log").open("ab") as log:
                os.dup2(log.fileno(), sys.stderr.fileno())
            self._train(job["model"], folder, job["steps"])
            gc.collect()  # modules are in cycles
            return_free_memory()
            self._print({"ended": True})

    def _listen(self) -> None:
        """Read what the server says, until it is gone."""
        said = b""
        while part := os.read(0, 1 << 16):  # sys.stdin would be locked while the process ends
            *lines, said = (said + part).split(b"\n")
            for message in map(json.loads, lines):
                if message == "stop":
                    self._stop.set()
                    continue
                if "folder" in message:
                    self._stop.clear()  # it was said of an earlier run
                self._jobs.put(message)
        os._exit(1)

    def _print(self, line: dict[str, Any]) -> None:
        print(json.dumps(line), file=self._out, flush=True)

    def _prepare(self, name: str) -> None:
        """Load what every run needs: libraries, weights; a model that cannot be loaded fails its run, not this."""
        from buleyean_rl.errors import BuleyeanError
        from buleyean_rl.training import run  # noqa: F401 - takes seconds

        try:
            _ = self._open(name).base_module
        except BuleyeanError:
            self._model = None

    def _open(self, name: str) -> Any:
        from buleyean_rl.models.model import open_model
        from buleyean_rl.models.source import resolve

        if self._model is None or self._name != name:
            self._name, self._model = name, open_model(resolve(name))
        return self._model

    def _train(self, name: str, folder: Path, steps: int) -> None:
        """Train, or resume what an earlier process began."""
        from transformers import TrainerCallback

        from buleyean_rl.errors import BuleyeanError
        from buleyean_rl.models.run_files import is_finished
        from buleyean_rl.training.config import load_config
        from buleyean_rl.training.run import train

        report, stop = self._report, self._stop

        class ReportSteps(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
                for logs in state.log_history:  # a killed server may have missed the last ones
                    report(logs, logs["step"])

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
                control.should_training_stop |= stop.is_set()

            def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
                report(kwargs["logs"], state.global_step)

        if is_finished(folder):  # but the server was gone by then
            return
        try:
            config = load_config(None, folder, {"max_steps": steps}, preset="few")
            resume = (folder / "settings.json").exists()
            records = folder.with_suffix(".jsonl")
            train(records, self._open(name), config, resume=resume, callbacks=[ReportSteps()])
        except BuleyeanError as error:
            sys.exit(f"{error}")

    def _report(self, logs: dict[str, Any], step: int) -> None:
        if "floor" in logs:
            self._print({"step": step} | {name: logs[name] for name in ("loss", "floor", "gap")})


if __name__ == "__main__":
    lines, sys.stdout = sys.stdout, sys.stderr  # stdout carries the steps alone
    TrainingProcess(lines).run()
