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

from buleyean_rl.void import training as module
from buleyean_rl.void.store import Store
from buleyean_rl.void.training import Training
from buleyean_rl.void.verdict import read_verdict
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
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(module, "PROCESS", "standin_run")
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.05)
    opened = Store(tmp_path / "void.db")
    opened.rejections.add("uid-1", "p", "a", (), "", "page")
    yield opened
    opened.close()


class Trains(Protocol):
    def __call__(self, how: str, on_trained: Callable[[int, Path], None] = ...) -> Training: ...


@pytest.fixture
def trains(store: Store) -> Iterator[Trains]:
    """What begins a `Training`, which is closed at the end."""
    with ExitStack() as opened:

        def begin(how: str, on_trained: Callable[[int, Path], None] = lambda _run, _folder: None) -> Training:
            training = Training(store, store.database.path.parent / "runs", how, on_trained)
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
    assert training.finished_folder(run) == store.database.path.parent / "runs/run-1"
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
    assert training.finished_folder(run) is None

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
    assert training.finished_folder(run) is not None
    assert not training.stop(first)

    second = training.start("run-uid-2", 9)
    assert second is not None
    until(lambda: store.runs.list()[0]["step"], 60)
    store.runs.mark_stopping(second)  # as if it had been told, and were slow
    assert training.stop(second)
    until(lambda: training.running is None, 60)
    assert store.runs.list()[0]["state"] == "stopped"
    assert training.finished_folder(store.runs.list()[0]) is None
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
        store.runs.add(f"run-uid-{number}", f"elsewhere/run-{number}", 1, 3)
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
        store.runs.add(f"run-uid-{number}", f"runs/run-{number}", 1, 9)
        store.runs.mark_stopping(number)
        (folder / f"run-{number}.jsonl").write_text("{}")
    (folder / "run-1" / "checkpoint-5").mkdir(parents=True)
    training.resume()
    until(lambda: training.running is None, 60)
    nothing_learnt, learnt = store.runs.list()
    assert (nothing_learnt["state"], training.finished_folder(nothing_learnt)) == ("stopped", None)
    assert (learnt["state"], training.finished_folder(learnt)) == ("stopped", folder / "run-1")


def test_a_verdict_is_what_training_did(tmp_path: Path) -> None:
    assert read_verdict(tmp_path) is None
    drift = {"own": {"kl": 0.02, "entropy_base": 3.0, "entropy": 3.1, "nll_base": 3.0, "nll": 3.2}}
    report = {"rejected_nll_base": 0.5, "rejected_nll_final": 2.5, "drift": drift}
    expected = {"rejected_nll": [0.5, 2.5], "drift": {"own": {"kl": 0.02, "entropy": [3.0, 3.1]}}}
    for guard, reason in (({"stop_reason": "too far"}, "too far"), (None, None)):
        (tmp_path / "run.json").write_text(json.dumps(report | {"guard": guard}))
        assert read_verdict(tmp_path) == expected | {"stop_reason": reason}
    del report["drift"]
    (tmp_path / "run.json").write_text(json.dumps(report))  # of an earlier version
    assert read_verdict(tmp_path) is None


def begin(void: Process, steps: int) -> int:
    void.ask("train-001", "Give me a tip.")
    void.post("rejections", uid="rejection-1", question="train-001", slot=0).raise_for_status()
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
        assert done["verdict"]["rejected_nll"][1] > done["verdict"]["rejected_nll"][0]
        assert all(drift["kl"] > 0 and drift["entropy"][0] > 0 for drift in done["verdict"]["drift"].values())
        assert done["samples"]
        assert void.get("state")["models"]["trained"] == f"run {run}"
    with running(base, tmp_path) as void:
        assert void.get("state")["models"]["trained"] == f"run {run}"


@pytest.mark.slow
def test_a_folder_that_was_moved_and_another_model(base: Path, tmp_path: Path) -> None:
    with running(base, tmp_path / "void") as void:
        run = begin(void, 3)
        assert void.finished(run)["state"] == "done"
    (tmp_path / "void").rename(tmp_path / "moved")
    with running(base, tmp_path / "moved") as void:
        assert void.get("state")["models"]["trained"] == f"run {run}"
    other = tmp_path / "other"
    other.symlink_to(base)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in base.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    with running(copy, tmp_path / "moved") as void:  # an adapter of another model is not put on this one
        assert "trained" not in void.get("state")["models"]


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
        assert void.get("state")["models"]["trained"] == f"run {run}"
