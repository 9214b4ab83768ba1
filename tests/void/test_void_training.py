"""Runs of the Void: how they end, and what is left of them where the disk, the server or their process gives out."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import pytest

from buleyean_rl.models.run_files import is_finished
from buleyean_rl.void import training as module
from buleyean_rl.void.store import Store
from buleyean_rl.void.timing import TIMING, Timing, Timings
from buleyean_rl.void.training import Training
from void_rows import given
from voids import Process, running, until

# The process of runs without a model: what it does is the name of its model.
STANDIN = """
import json, os, queue, sys, threading
from pathlib import Path
stop, jobs = threading.Event(), queue.SimpleQueue()
def obey():
    for line in sys.stdin:
        if json.loads(line) == "stop":
            stop.set()
        else:
            stop.clear()
            jobs.put(json.loads(line))
    os._exit(1)
threading.Thread(target=obey, daemon=True).start()
while True:
    settings = jobs.get()
    if "folder" not in settings:
        continue
    folder, how = Path(settings["folder"]), settings["model"]
    folder.mkdir(exist_ok=True)
    for step in range(1, settings["steps"] + 1):
        print(json.dumps({"step": step, "loss": 1.0, "floor": 0.25, "gap": 0.75}), flush=True)
        if how == "fails" and step == 2:
            folder.with_suffix(".log").write_text("the model is broken")
            os._exit(1)
        if how == "waits":
            if stop.wait(30):
                break
    (folder / "run.json").write_text(json.dumps({"process": os.getpid()}))
    print(json.dumps({"ended": True}), flush=True)
"""


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    (tmp_path / "standin_run.py").write_text(STANDIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(module, "PROCESS", "standin_run")
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.05)
    opened = Store(tmp_path / "void.db")
    opened.rejections.add("uid-1", given())
    yield opened
    opened.close()


class Trains(Protocol):
    def __call__(self, how: str, on_trained: Callable[[int, Path], None] = ...) -> Training: ...


@pytest.fixture
def trains(store: Store) -> Iterator[Trains]:
    """What begins a `Training`, which is closed at the end."""
    with ExitStack() as opened:

        def begin(how: str, on_trained: Callable[[int, Path], None] = lambda _run, _folder: None) -> Training:
            timings = Timings(store.settings, Timing(1, 2, 3))
            training = Training(store, store.database.path.parent / "runs", how, on_trained, timings)
            opened.callback(training.close)
            return training

        yield begin


def ended(store: Store, training: Training) -> dict[str, Any]:
    until(lambda: training.running is None, 60)
    (run,) = store.runs.list()
    return run


def test_a_run_is_done_when_its_model_is_in_use(store: Store, trains: Trains) -> None:
    used: list[int] = []
    training = trains("ends", lambda run, _folder: used.append(run))
    assert training.start("run-uid", 3) == training.start("run-uid", 3) == 1
    run = ended(store, training)
    assert (run["state"], run["step"], used) == ("done", 3, [1])
    assert is_finished(training.folder(run))
    assert store.settings.get(TIMING)["start"] >= 0  # the next run is expected to take as long
    training.close()


def test_a_process_is_kept_for_the_next_run_and_replaced_where_it_died(store: Store, trains: Trains) -> None:
    training, processes = trains("ends"), list[int]()
    training.warm_up()
    for number in range(3):
        if number == 2:
            os.kill(processes[-1], signal.SIGKILL)
            time.sleep(0.1)
        run = training.start(f"run-uid-{number}", 2)
        until(lambda: training.running is None, 60)
        assert store.runs.list()[0]["state"] == "done"
        report = store.database.path.parent / f"runs/run-{run}/run.json"
        processes.append(json.loads(report.read_text())["process"])
    training.close()
    assert processes[0] == processes[1] != processes[2]
    with pytest.raises(ProcessLookupError):
        os.kill(processes[2], 0)


def test_a_run_that_fails_says_why(store: Store, trains: Trains) -> None:
    training = trains("fails")
    training.start("run-uid", 3)
    run = ended(store, training)
    assert (run["state"], run["error"]) == ("failed", "the model is broken")
    assert not is_finished(training.folder(run))

    def refuse(_run: int, _folder: Path) -> None:
        raise ValueError("no such layer")

    training = trains("ends", refuse)
    training.start("run-uid-2", 3)
    until(lambda: training.running is None, 60)
    assert "no such layer" in store.runs.list()[0]["error"]


def test_stop_ends_a_run_with_what_it_has_learnt_and_once_more_without(store: Store, trains: Trains) -> None:
    used: list[int] = []
    training = trains("waits", lambda run, _folder: used.append(run))
    first = training.start("run-uid", 9)
    assert first is not None
    until(lambda: store.runs.list()[0]["step"], 60)
    assert training.stop(first)
    run = ended(store, training)
    assert (run["state"], run["error"], used) == ("stopped", "", [first])
    assert is_finished(training.folder(run))
    assert not training.stop(first)

    second = training.start("run-uid-2", 9)
    assert second is not None
    until(lambda: store.runs.list()[0]["step"], 60)
    store.runs.mark_stopping(second)  # as if it had been told, and were slow
    assert training.stop(second)
    until(lambda: training.running is None, 60)
    assert store.runs.list()[0]["state"] == "stopped"
    assert not is_finished(training.folder(store.runs.list()[0]))
    assert used == [first]


def test_a_full_disk_fails_the_run_at_once_and_its_end_is_written_when_there_is_space(
    store: Store, trains: Trains, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = trains("waits")
    is_full = [False]
    end = store.runs.end

    def writing(*words: Any) -> None:
        if is_full[0]:
            raise OSError(28, "No space left on device")
        end(*words)

    monkeypatch.setattr(store.runs, "end", writing)
    monkeypatch.setattr(store.runs, "add_point", lambda *words: is_full.__setitem__(0, True) or writing(*words))
    training.start("run-uid", 9)
    run = ended(store, training)
    assert run["state"] == "running"  # on disk; what is shown is the truth
    shown = training.describe(run)
    assert (shown["state"], "free some space" in shown["error"]) == ("failed", True)
    is_full[0] = False
    until(lambda: store.runs.list()[0]["state"] == "failed", 60)
    assert "free some space" in store.runs.list()[0]["error"]
    training.close()


def test_what_a_killed_server_left_is_resumed_or_has_failed(store: Store, trains: Trains) -> None:
    training = trains("ends")
    runs = store.database.path.parent / "runs"
    runs.mkdir()
    for number, state in enumerate(["running", "stopping", "running", "running"], start=1):
        store.runs.add(f"run-uid-{number}", f"elsewhere/run-{number}", 1, 1, 3)
        if state == "stopping":
            store.runs.mark_stopping(number)
        if number < 4:
            (runs / f"run-{number}.jsonl").write_text("{}")
    training.resume()
    assert training.running == 3
    until(lambda: training.running is None, 60)
    assert [run["state"] for run in store.runs.list()] == ["failed", "done", "failed", "failed"]
    assert "train again" in store.runs.list()[0]["error"]


def test_a_stop_outlives_the_server(store: Store, trains: Trains) -> None:
    training = trains("waits")
    folder = store.database.path.parent / "runs"
    folder.mkdir()
    for number in (1, 2):
        store.runs.add(f"run-uid-{number}", f"runs/run-{number}", 1, 1, 9)
        store.runs.mark_stopping(number)
        (folder / f"run-{number}.jsonl").write_text("{}")
    (folder / "run-1" / "checkpoint-5").mkdir(parents=True)
    training.resume()
    until(lambda: training.running is None, 60)
    nothing_learnt, learnt = store.runs.list()
    assert nothing_learnt["state"] == learnt["state"] == "stopped"
    assert [is_finished(training.folder(run)) for run in (nothing_learnt, learnt)] == [False, True]


def test_a_run_is_planned_and_its_files_are_removed(store: Store, trains: Trains) -> None:
    training = trains("waits")
    assert training.plan() == {"rejections": 1, "steps": 12, "seconds": 1 + 12 * 2 + 3, "problem": None}
    training.start("run-uid")
    assert training.plan()["problem"] == "running"
    run = until(lambda: (row := training.describe(store.runs.list()[0]))["phase"] == "training" and row, 60)
    assert run["seconds_left"] > 0
    training.stop(run["id"])
    run = training.describe(ended(store, training))
    assert (run["phase"], run["seconds_left"]) == (None, None)
    training.remove(run)
    assert list((store.database.path.parent / "runs").iterdir()) == []
    store.rejections.undo([1])
    assert training.plan()["problem"] == "no_rejections"


def begin(void: Process, steps: int) -> int:
    answer = void.ask("train-001", "Give me a tip.", max_tokens=128)["answers"][0]
    assert answer["state"] in ("done", "cut"), answer
    void.reject("rejection-1", answer).raise_for_status()
    return int(void.post("runs", uid="run-00001", steps=steps).json()["id"])


@pytest.mark.slow
def test_a_stopped_run_is_a_model_that_answers(base: Path, tmp_path: Path) -> None:
    with running(base, tmp_path) as void:
        run = begin(void, 10_000)
        until(lambda: len(void.get(f"runs/{run}")["points"]) >= 3, 120)
        void.post(f"runs/{run}/stop").raise_for_status()
        done = void.finished(run)
        assert (done["state"], done["error"]) == ("stopped", "")
        assert 3 <= len(done["points"]) < 10_000
        details = done["verdict"]["details"]
        assert details["rejected_nll"][1] > details["rejected_nll"][0]
        assert all(drift["kl"] > 0 and drift["entropy"][0] > 0 for drift in details["drift"].values())
        assert done["samples"]
        assert void.get("state")["pair"][1]["model"] == f"run-{run}"
    with running(base, tmp_path) as void:
        assert void.get("state")["pair"][1]["model"] == f"run-{run}"


@pytest.mark.slow
def test_a_folder_that_was_moved_and_another_model(base: Path, tmp_path: Path) -> None:
    with running(base, tmp_path / "void") as void:
        run = begin(void, 3)
        assert void.finished(run)["state"] == "done"
    (tmp_path / "void").rename(tmp_path / "moved")
    with running(base, tmp_path / "moved") as void:
        assert void.get("state")["pair"][1]["model"] == f"run-{run}"
    other = tmp_path / "other"
    other.symlink_to(base)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in base.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    with running(copy, tmp_path / "moved") as void:  # an adapter of another model is not put on this one
        assert [each["model"] for each in void.get("state")["pair"]] == ["base"]
        (shown,) = void.get("models")["runs"]
        assert (shown["usable"], "it was trained on" in shown["problem"]) == (False, True)


@pytest.mark.slow
def test_a_stop_that_a_kill_interrupted_ends_after_the_restart(base: Path, tmp_path: Path) -> None:
    with running(base, tmp_path) as void:
        run = begin(void, 400)
        folder = tmp_path / "runs" / f"run-{run}"
        until(lambda: any(folder.glob("checkpoint-*/trainer_state.json")), 120)
        void.post(f"runs/{run}/stop").raise_for_status()
        void.stop(signal.SIGKILL)
        time.sleep(0.5)
    with running(base, tmp_path) as void:
        assert void.finished(run)["state"] == "stopped"
        assert void.get("state")["pair"][1]["model"] == f"run-{run}"
