"""Training runs, in a process of their own: one that fails does not take the server down, and it ends with the server.

    server --stdin, held open--> training_process: train(...) --stdout, a JSON line a step--> server --> store

The process keeps its libraries and its model for the next run; one whose run failed or was killed is replaced. It exits
at once where its server is gone; the next server resumes from the last checkpoint.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from buleyean_rl.data.records import write_records
from buleyean_rl.models.run_files import is_finished
from buleyean_rl.system.files import remove_folder
from buleyean_rl.system.module_process import module_command, module_environment
from buleyean_rl.void.store import Row, Store
from buleyean_rl.void.store.runs import UNFINISHED
from buleyean_rl.void.timing import RunClock, Timings, plan_steps

PROCESS = "buleyean_rl.void.training_process"
STOP = "stop"
RETRY_SECONDS = 5.0  # until the end of a run can be written to a full disk
SPARE_BYTES = 1 << 20  # less is a full disk
GONE = "the server ended before anything was learnt: train again"


class Training:
    """At most one run at a time.

    Args:
        store: of the rejections and the runs.
        folder: gets a folder for each run.
        model: the base model.
        on_trained: called with a run's id and folder before it counts as done; what it raises fails the run.
        timings: what runs take.

    Attributes:
        running: id of the run under way, if any.
    """

    def __init__(
        self, store: Store, folder: Path, model: str, on_trained: Callable[[int, Path], None], timings: Timings
    ) -> None:
        self._store, self._folder, self._model, self._on_trained = store, folder, model, on_trained
        self._timings = timings
        self._clock: RunClock | None = None  # of the run under way
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None  # of the last run; of the next too, if it lives
        self._watcher: threading.Thread | None = None
        self._closing = threading.Event()
        self._killed = False
        self._unwritten: dict[int, tuple[str, str]] = {}  # run -> state and error that the full disk did not take
        self.running: int | None = None

    def start(self, uid: str, steps: int | None = None) -> int | None:
        """Start a run on all rejections; returns its id, or None while another one runs.

        Args:
            uid: the client's name for it.
            steps: None for as many as the rejections want.

        Raises:
            OSError: the disk is full.
        """
        with self._lock:
            earlier = self._store.runs.find(uid)
            if earlier is not None:
                return int(earlier["id"])
            if self.running is not None:
                return None
            records, rejections = self._store.rejections.records(), self._store.rejections.count()
            folder = self._folder / f"run-{1 + self._store.runs.newest_id()}"
            self._folder.mkdir(parents=True, exist_ok=True)
            write_records(folder.with_suffix(".jsonl"), records)
            steps = steps or plan_steps(rejections)
            run = self._store.runs.add(uid, str(folder), len(records), rejections, steps)
            self._begin(run, folder, steps)
            return run

    def resume(self) -> None:
        """Resume the newest run that an earlier server left unfinished; others, and what was not begun, have failed."""
        with self._lock:
            for run in self._store.runs.list():
                if run["state"] not in UNFINISHED:
                    continue
                folder, stopping = self.folder(run), run["state"] == "stopping"
                if self.running is not None or not folder.with_suffix(".jsonl").exists():
                    self._end(run["id"], "failed", GONE)
                elif stopping and not any(folder.glob("checkpoint-*")) and not is_finished(folder):
                    self._end(run["id"], "stopped", GONE)
                else:
                    with suppress(OSError):  # it has failed, and says so
                        self._begin(run["id"], folder, run["steps"], stopping)

    def warm_up(self) -> None:
        """Start the process, which loads what runs need; where that fails, the next run says so."""
        with self._lock, suppress(OSError):
            _tell(self._find_process(), {"model": self._model})

    def stop(self, run: int) -> bool:
        """End a run with what it has learnt, or at once where that is nothing or it was told before.

        Returns:
            Whether it was running.
        """
        with self._lock:
            row = self._store.runs.get(run)
            if self.running != run or self._process is None or row is None:
                return False
            if not row["points"] or row["state"] == "stopping":
                self._killed = True
                self._process.kill()
            else:
                self._store.runs.mark_stopping(run)
                _tell(self._process, STOP)
            return True

    def folder(self, run: Row) -> Path:
        """A run's folder, also where all of it was moved."""
        return self._folder / Path(run["folder"]).name

    def remove(self, run: Row) -> None:
        """Delete the files of a run that has ended."""
        folder = self.folder(run)
        if folder.exists():
            remove_folder(folder)
        for suffix in (".jsonl", ".log"):
            folder.with_suffix(suffix).unlink(missing_ok=True)

    def plan(self) -> Row:
        """What a run would take now: `rejections`, `steps`, `seconds`, and the `problem` that it cannot be, or None."""
        rejections = self._store.rejections.count()
        steps = plan_steps(rejections)
        problem = "running" if self.running is not None else None if rejections else "no_rejections"
        seconds = self._timings.expected().seconds(steps)
        return {"rejections": rejections, "steps": steps, "seconds": seconds, "problem": problem}

    def describe(self, run: Row) -> Row:
        """A run of the store as it stands: its `phase` and `seconds_left`; its end may not have been written yet."""
        clock = self._clock if run["id"] == self.running else None
        run = run | {
            "phase": None if clock is None else clock.phase,
            "seconds_left": None if clock is None else clock.seconds_left(),
        }
        if run["id"] in self._unwritten:
            state, error = self._unwritten[run["id"]]
            return run | {"state": state, "error": error}
        return run

    def close(self) -> None:
        """Stop with the server; the run stays unfinished and is resumed by the next."""
        with self._lock:
            self._closing.set()
            if self._process is not None:
                self._process.kill()
        if self._watcher is not None:
            self._watcher.join()
        if self._process is not None:
            _discard(self._process)

    def _begin(self, run: int, folder: Path, steps: int, stopping: bool = False) -> None:
        try:
            folder.with_suffix(".log").touch()
            process = self._find_process()
        except OSError as error:
            self._end(run, "failed", f"could not be started: {error.strerror}: train again")
            raise
        done = (self._store.runs.get(run) or {}).get("step") or 0
        self._clock = RunClock(steps, self._timings.expected(), done)
        self.running, self._killed = run, False
        _tell(process, {"model": self._model, "folder": str(folder), "steps": steps})
        if stopping:
            _tell(process, STOP)
        self._watcher = threading.Thread(target=self._watch, args=(run, folder, process), daemon=True)
        self._watcher.start()

    def _find_process(self) -> subprocess.Popen[bytes]:
        """The process that waits for a run, or a new one.

        Raises:
            OSError: it cannot be started.
        """
        if self._process is not None and self._process.poll() is not None:
            _discard(self._process)
            self._process = None
        if self._process is None:
            self._process = subprocess.Popen(
                module_command(PROCESS),
                env=module_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # the log of each run, once it has one
            )
        return self._process

    def _watch(self, run: int, folder: Path, process: subprocess.Popen[bytes]) -> None:
        """Store a run's steps as they come, and how it ended."""
        ended = False
        try:
            ended = self._read_steps(run, process)
            if self._closing.is_set():
                return
            state, error = self._outcome(run, folder, ended)
        except OSError as problem:
            state, error = "failed", f"{problem.strerror}: free some space, then train again"
        except Exception as problem:  # otherwise the run would be shown as running for ever
            state, error = "failed", f"trained, but its model cannot be used: {problem}"
        finally:
            if not ended or self._killed:
                _discard(process)
        written = self._end(run, state, error)
        self.running = None
        while not written and not self._closing.wait(RETRY_SECONDS):
            written = self._end(run, state, error)

    def _end(self, run: int, state: str, error: str) -> bool:
        """Write how a run ended; returns whether the disk took it."""
        self._unwritten[run] = state, error
        try:
            self._store.runs.end(run, state, error)
        except OSError:
            return False
        del self._unwritten[run]
        return True

    def _read_steps(self, run: int, process: subprocess.Popen[bytes]) -> bool:
        """Store the steps of a run until it ends; returns whether it did, and not its process."""
        assert process.stdout is not None
        for line in process.stdout:
            if not line.endswith(b"\n"):  # killing may leave half a line
                break
            message = json.loads(line)
            if "ended" in message:
                return True
            self._store.runs.add_point(run, message)
            if self._clock is not None:
                self._clock.add(message["step"])
        return False

    def _outcome(self, run: int, folder: Path, ended: bool) -> tuple[str, str]:
        """The state that a run ended in, and why."""
        if self._killed:
            return "stopped", ""
        if not ended:
            return "failed", _reason(folder)
        stored = self._store.runs.get(run)
        self._on_trained(run, folder)
        if self._clock is not None:
            self._timings.learn(self._clock.measured())
        return ("stopped" if stored and stored["state"] == "stopping" else "done"), ""


def _tell(process: subprocess.Popen[bytes], message: object) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(message).encode() + b"\n")
        process.stdin.flush()
    except (OSError, ValueError):  # it has ended by itself, or its pipe is closed already
        return


def _discard(process: subprocess.Popen[bytes]) -> None:
    """End a process, and close what leads to it."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # what was not written is lost with it
                pipe.close()


def _reason(folder: Path) -> str:
    """Why a run's process failed."""
    if shutil.disk_usage(folder.parent).free < SPARE_BYTES:
        return "the disk is full: free some space, then train again"
    lines = folder.with_suffix(".log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:500] if lines else "it exited without a message"
