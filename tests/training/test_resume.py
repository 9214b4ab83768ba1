"""A run that is stopped resumes to the same bytes; a folder with anything else is refused."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from runs import SETTINGS, adapter_bytes, logged_steps, start

from buleyean_rl.data.records import make_record, write_records
from buleyean_rl.errors import ModelError, RecordError, TrainingError, UsageError
from buleyean_rl.models.run_files import SETTINGS_FILE, SETTINGS_FORMAT
from buleyean_rl.models.run_folder import run_base
from buleyean_rl.system.files import write_json
from buleyean_rl.system.locks import FileLock
from buleyean_rl.training import guard as guarding
from buleyean_rl.training import run as training
from buleyean_rl.training.checkpoints import mark_unfinished, mark_whole
from buleyean_rl.training.processes import Processes
from buleyean_rl.training.run_state import open_run

KILLED = """
import os, signal, sys
from pathlib import Path

import torch
from buleyean_rl.training import before_after
from buleyean_rl.training import run as training
from buleyean_rl.training.config import load_config
from buleyean_rl.training.trainer import BuleyeanTrainer

before_after.MAX_NEUTRAL_TOKENS = 8
records, base, run, settings, where = sys.argv[1:]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

log, save = BuleyeanTrainer.log, torch.save

def log_and_die(self, logs, *args):
    log(self, logs, *args)
    if where == f"after step {self.state.global_step}":
        die()

def half_save(value, path, *args, **kwargs):
    if where == "within a checkpoint" and "checkpoint-6" in str(path):
        Path(path).write_bytes(b"half a file")
        die()
    save(value, path, *args, **kwargs)

BuleyeanTrainer.log, torch.save = log_and_die, half_save
training.train(Path(records), base, load_config(None, Path(run), eval(settings)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["after step 1", "after step 7", "within a checkpoint"])
def test_a_killed_and_resumed_run_has_the_same_bytes(
    where: str, uninterrupted: Path, base: Path, rejections: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = [str(rejections), str(base), str(run), repr(SETTINGS), where]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (run / "run.json").exists()
    checkpoints = {path.name for path in run.glob("checkpoint-*")}
    assert (
        checkpoints
        == {
            "after step 1": set(),
            "after step 7": {"checkpoint-4", "checkpoint-6"},
            "within a checkpoint": {"checkpoint-2", "checkpoint-4", "checkpoint-6"},
        }[where]
    )
    start(base, rejections, run, resume=True)
    assert adapter_bytes(run) == adapter_bytes(uninterrupted)
    assert _log_without_times(run) == _log_without_times(uninterrupted)
    assert len(logged_steps(run)) == 8
    assert not list(run.glob("checkpoint-*"))


def _log_without_times(run: Path) -> list[dict[str, float]]:
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    timed = ("seconds", "runtime", "per_second")
    return [{name: value for name, value in entry.items() if not name.endswith(timed)} for entry in log]


# --- refused


@pytest.fixture
def stopped(base: Path, rejections: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was interrupted after its third step."""
    return interrupt(base, rejections, tmp_path / "stopped", 3, monkeypatch)


def interrupt(
    base: Path, records: Path, run: Path, step: int, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> Path:
    """A run that is interrupted after a step."""
    log = training.BuleyeanTrainer.log

    def stop(self: Any, logs: dict[str, float], *args: Any) -> None:
        log(self, logs, *args)
        if self.state.global_step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.BuleyeanTrainer, "log", stop)
        with pytest.raises(KeyboardInterrupt):
            start(base, records, run, **settings)
    return run


def test_an_interrupted_run_resumes_only_with_its_settings(
    stopped: Path,
    uninterrupted: Path,
    base: Path,
    rejections: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UsageError, match="has an unfinished run: resume it with --resume, or delete it"):
        start(base, rejections, stopped)
    with pytest.raises(UsageError, match=r"other settings: learning_rate \(0.01 then, 0.1 now\)"):
        start(base, rejections, stopped, resume=True, learning_rate=0.1)
    with pytest.raises(UsageError, match=r"other settings: objective \(complement then, published now\)"):
        start(base, rejections, stopped, resume=True, objective="published")
    others = tmp_path / "others.jsonl"
    write_records(others, [make_record("Hi", ["No"])])
    with pytest.raises(UsageError, match="other settings: records_sha256"):
        start(base, others, stopped, resume=True)
    with pytest.raises(UsageError, match="other settings: model"):
        start(Path("org/other"), rejections, stopped, resume=True)
    warned: list[str] = []
    monkeypatch.setattr("transformers.trainer_utils.logger.warning_once", warned.append)
    start(base, rejections, stopped, resume=True)
    # transformers' own word on file systems whose times are equal depends on the machine; nothing else is warned of
    assert [warning for warning in warned if "mtime" not in warning] == []
    assert adapter_bytes(stopped) == adapter_bytes(uninterrupted)


def test_a_run_of_an_earlier_format_is_not_resumed(stopped: Path, base: Path, rejections: Path) -> None:
    file = stopped / "settings.json"
    settings = json.loads(file.read_text())
    assert settings.pop("format") == 3
    file.write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"format 1, and this version goes on with runs of format 3"):
        start(base, rejections, stopped, resume=True)


def test_a_finished_run_is_not_changed(uninterrupted: Path, base: Path, rejections: Path) -> None:
    before = adapter_bytes(uninterrupted)
    for resume in (False, True):
        with pytest.raises(UsageError, match="already has a finished run"):
            start(base, rejections, uninterrupted, resume=resume)
    assert adapter_bytes(uninterrupted) == before


def test_a_new_folder_has_nothing_to_resume(base: Path, rejections: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing to resume in .*: start it without --resume"):
        start(base, rejections, tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()


def test_a_file_is_refused_as_run_folder(base: Path, rejections: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="file is a file: name a folder for the run"):
        start(base, rejections, tmp_path / "file")
    with pytest.raises(OSError, match="Not a directory"):
        start(base, rejections, tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_unwritable_folder_stops_the_run_before_the_model_is_loaded(
    base: Path, rejections: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a read-only folder does for anyone but root."""

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", "run")

    monkeypatch.setattr("buleyean_rl.training.run_state.write_json", denied)
    monkeypatch.setattr("buleyean_rl.models.model.load_base", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(PermissionError):
        start(base, rejections, tmp_path / "run")


def test_a_run_that_failed_before_its_first_step_can_be_restarted(base: Path, rejections: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text(rejections.read_text() + "{\n")
    with pytest.raises(RecordError, match=r"broken.jsonl:11: "):
        start(base, broken, tmp_path / "run")
    assert start(base, rejections, tmp_path / "run").steps == 8


# --- the same run


def checkpoint_of(run: Path) -> Path:
    return max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    file: str, uninterrupted: Path, base: Path, rejections: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, printed = interrupt(base, rejections, tmp_path / "run", 5, monkeypatch), io.StringIO()
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    (run / "checkpoint-4" / file).write_bytes(b"")
    start(base, rejections, run, resume=True, console=Console(file=printed, width=300))
    assert f"checkpoint-4 is damaged: {file} is empty" in printed.getvalue()
    assert "the run goes on after step 2" in printed.getvalue()
    assert adapter_bytes(run) == adapter_bytes(uninterrupted)


def test_a_run_killed_after_its_last_step_trains_no_more(
    uninterrupted: Path, base: Path, rejections: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(training, "write_report", killed)
        with pytest.raises(KeyboardInterrupt):
            start(base, rejections, run)
    with pytest.raises(ModelError, match="has an unfinished run: finish it with"):  # though its adapter is there
        run_base(run)
    monkeypatch.setattr(training.BuleyeanTrainer, "training_step", lambda *_: pytest.fail("a ninth step"))
    assert start(base, rejections, run, resume=True).steps == 8
    assert adapter_bytes(run) == adapter_bytes(uninterrupted)


def test_a_run_killed_after_run_json_is_finished(
    base: Path, rejections: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(training.RunState, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            start(base, rejections, run)
    assert (run / "settings.json").exists()
    assert run_base(run) == str(base)
    with pytest.raises(UsageError, match="already has a finished run"):
        start(base, rejections, run, resume=True)
    assert not (run / "settings.json").exists()
    assert not list(run.glob("checkpoint-*"))


def test_a_run_is_resumed_with_what_computed_it_or_not_at_all(stopped: Path, base: Path, rejections: Path) -> None:
    written = json.loads((stopped / "settings.json").read_text())
    assert written["compute"].keys() >= {"dtype", "kernels", "layout", "threads", "processes", "torch version"}
    for name, value in (("threads", 99), ("layout", "padded"), ("kernels", "off by one")):
        changed = written | {"compute": written["compute"] | {name: value}}
        (stopped / "settings.json").write_text(json.dumps(changed))
        with pytest.raises(UsageError, match=rf"not be the same run: {name} \({value} then, .* now\)"):
            start(base, rejections, stopped, resume=True)


def test_every_setting_is_compared(stopped: Path, base: Path, rejections: Path) -> None:
    for name, value in {"optim": "sgd", "adam_beta2": 0.9, "data_seed": 1, "save_steps": 0.5}.items():
        with pytest.raises(UsageError, match=rf"with other settings: {name} \("):
            start(base, rejections, stopped, resume=True, **{name: value})


def test_a_failed_run_is_not_resumed_and_may_be_begun_anew(
    uninterrupted: Path, base: Path, rejections: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, check = tmp_path / "run", guarding.violated_limit
    monkeypatch.setattr(guarding, "TOKENS_BETWEEN_CHECKS", 1)
    monkeypatch.setattr(guarding, "violated_limit", lambda *_: "ruined")
    for _ in range(2):
        with pytest.raises(TrainingError, match="first check, step 1: ruined"):
            start(base, rejections, run, guard=True)
        with pytest.raises(
            TrainingError, match="cannot be resumed, its run failed: the guard ended the run at its first"
        ):
            start(base, rejections, run, guard=True, resume=True)
    monkeypatch.setattr(guarding, "violated_limit", check)
    start(base, rejections, run)
    assert adapter_bytes(run) == adapter_bytes(uninterrupted)
    assert not (run / "settings.json").exists()


def test_the_guards_checks_from_before_a_kill_are_kept(
    base: Path, rejections: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarding, "TOKENS_BETWEEN_CHECKS", 1)
    monkeypatch.setattr(guarding, "MAX_ANSWER_TOKENS", 4)
    run = interrupt(base, rejections, tmp_path / "run", 5, monkeypatch, guard=True, guard_kl=100.0)
    report = start(base, rejections, run, resume=True, guard=True, guard_kl=100.0)
    assert report.guard is not None
    assert [check["step"] for check in report.guard["checks"]] == list(range(1, 9))
    whole = start(base, rejections, tmp_path / "whole", guard=True, guard_kl=100.0)
    assert whole.guard == report.guard


# --- the folder


def test_what_is_not_a_run_of_ours_is_not_touched(base: Path, rejections: Path, tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    (folder / "checkpoint-2").mkdir(parents=True)
    (folder / "checkpoint-2" / "weights.bin").write_text("theirs")
    (folder / "README.md").write_text("theirs")
    for place in (folder, base):
        before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
        with pytest.raises(UsageError, match="is not empty and has no run of ours"):
            start(base, rejections, place)
        assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


def test_foreign_checkpoints_in_a_run_folder_stay(stopped: Path, base: Path, rejections: Path) -> None:
    theirs = stopped / "checkpoint-best"
    theirs.mkdir()
    (theirs / "weights.bin").write_text("theirs")
    start(base, rejections, stopped, resume=True)
    assert [path.name for path in stopped.glob("checkpoint-*")] == [theirs.name]
    assert (theirs / "weights.bin").read_text() == "theirs"


def test_a_folder_has_one_run_at_a_time(stopped: Path, base: Path, rejections: Path) -> None:
    with FileLock(stopped / ".lock"), pytest.raises(UsageError, match=f"in use by process {os.getpid()}"):
        start(base, rejections, stopped, resume=True)


def test_a_run_that_does_not_say_how_many_processes_began_it_had_one(tmp_path: Path) -> None:
    """It is an earlier version's, whose steps have the records of one."""
    settings = {"model": "m", "records_sha256": "r", "config": {}}
    checkpoint = tmp_path / "checkpoint-1"
    mark_unfinished(checkpoint)
    (checkpoint / "optimizer.pt").write_text("state")
    mark_whole(checkpoint, 1)
    write_json(tmp_path / SETTINGS_FILE, {"format": SETTINGS_FORMAT} | settings | {"compute": {"threads": 1}})
    two = Processes(0, ["a", "a"])
    with open_run(tmp_path, settings, True, Console(quiet=True), two) as state:
        assert state.begun_processes == 1
