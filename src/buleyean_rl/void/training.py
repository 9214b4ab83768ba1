"""A training run in a process of its own: it can be stopped, it ends with the server, and its memory is freed.

    server --stdin, held open--> child: train(...) --stdout, a JSON line a step--> server --> store

A child whose server is gone exits at once; the next server resumes from its last checkpoint.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from buleyean_rl.data.records import write_records
from buleyean_rl.void.store import Store


class Training:
    """At most one run at a time.

    Args:
        store: of the rejections and the runs.
        folder: gets a folder for each run.
        model: the base model.
        on_trained: called with a run's id and folder before it counts as done; what it raises fails the run.
    """

    def __init__(self, store: Store, folder: Path, model: str, on_trained: Callable[[int, Path], None]) -> None:
        self._store, self._folder, self._model, self._on_trained = store, folder, model, on_trained
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None
        self._watcher: threading.Thread | None = None
        self._stopped = self._closing = False
        self.running: int | None = None

    def start(self, uid: str, steps: int) -> int | None:
        """Start a run on all rejections; returns its id, or None while another one runs.

        Raises:
            UsageError: there is nothing to train on.
        """
        with self._lock:
            earlier = self._store.find_run(uid)
            if earlier is not None:
                return int(earlier["id"])
            if self.running is not None:
                return None
            records = self._store.records()
            number = 1 + max((int(run["id"]) for run in self._store.runs()), default=0)
            folder = self._folder / f"run-{number}"
            self._folder.mkdir(parents=True, exist_ok=True)
            write_records(folder.with_suffix(".jsonl"), records)
            run = self._store.add_run(uid, str(folder), len(records), steps)
            self._begin(run, folder, steps)
            return run

    def resume(self) -> None:
        """Resume the run that an earlier server left unfinished."""
        with self._lock:
            for run in self._store.runs():
                if run["state"] == "running":
                    self._begin(run["id"], Path(run["folder"]), run["steps"])
                    return

    def stop(self, run: int) -> bool:
        """Stop a run; returns whether it was running."""
        with self._lock:
            if self.running != run or self._child is None:
                return False
            self._stopped = True
            self._child.kill()
            return True

    def close(self) -> None:
        """Stop with the server; the run stays unfinished and is resumed by the next."""
        with self._lock:
            self._closing = True
            if self._child is not None:
                self._child.kill()
        if self._watcher is not None:
            self._watcher.join()

    def _begin(self, run: int, folder: Path, steps: int) -> None:
        settings = {"model": self._model, "folder": str(folder), "steps": steps}
        log = folder.with_suffix(".log").open("ab")
        with log:
            self._child = subprocess.Popen(
                [sys.executable, "-m", __name__, json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.running, self._stopped = run, False
        self._watcher = threading.Thread(target=self._watch, args=(run, folder, self._child), daemon=True)
        self._watcher.start()

    def _watch(self, run: int, folder: Path, child: subprocess.Popen[str]) -> None:
        assert child.stdout is not None
        assert child.stdin is not None
        for line in child.stdout:
            if line.endswith("\n"):  # killing may leave half a line
                self._store.add_point(run, json.loads(line))
        code = child.wait()
        child.stdout.close()
        child.stdin.close()
        if self._closing:
            return
        try:
            if code == 0:
                self._on_trained(run, folder)
                self._store.end_run(run, "done")
            elif self._stopped:
                self._store.end_run(run, "stopped")
            else:
                self._store.end_run(run, "failed", _last_line(folder.with_suffix(".log")))
        except Exception as error:  # otherwise the run would be shown as running for ever
            self._store.end_run(run, "failed", f"trained, but its model cannot be used: {error}")
        finally:
            self.running = None


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:500] if lines else "exited without a message"


def child(settings: dict[str, Any]) -> None:
    """Train, in the child process.

    Args:
        settings: model, folder and steps.
    """
    steps_out, sys.stdout = sys.stdout, sys.stderr  # stdout carries the steps alone
    threading.Thread(target=_exit_with_server, daemon=True).start()
    from transformers import TrainerCallback

    from buleyean_rl.errors import BuleyeanError
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

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
            report(kwargs["logs"], state.global_step)

    folder = Path(settings["folder"])
    config = load_config(None, folder, {"max_steps": settings["steps"]}, preset="few")
    if (folder / "run.json").exists():  # finished, but the server was gone by then
        return
    try:
        resume = (folder / "settings.json").exists()
        train(folder.with_suffix(".jsonl"), settings["model"], config, resume=resume, callbacks=[ReportSteps()])
    except BuleyeanError as error:
        sys.exit(f"{error}")


def _exit_with_server() -> None:
    os.read(0, 1)  # returns once the server's end of the pipe is closed
    os._exit(1)


if __name__ == "__main__":
    child(json.loads(sys.argv[1]))
