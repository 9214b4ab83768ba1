"""A run that is stopped resumes to the same bytes; a folder with anything else is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import SETTINGS, adapter_bytes, logged_steps, start

from buleyean_rl.data.records import make_record, write_records
from buleyean_rl.errors import ModelError, RecordError, UsageError
from buleyean_rl.training import run as training

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
            "after step 7": {"checkpoint-6"},
            "within a checkpoint": {"checkpoint-4", "checkpoint-6"},
        }[where]
    )
    start(base, rejections, run, resume=True)
    assert adapter_bytes(run) == adapter_bytes(uninterrupted)
    assert [entry["step"] for entry in logged_steps(run)] == list(range(1, 9))
    assert not list(run.glob("checkpoint-*"))


# --- refused


@pytest.fixture
def stopped(base: Path, rejections: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was interrupted after its third step."""
    run = tmp_path / "stopped"
    log = training.BuleyeanTrainer.log

    def interrupt(self: Any, logs: dict[str, float], *args: Any) -> None:
        log(self, logs, *args)
        if self.state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.BuleyeanTrainer, "log", interrupt)
        with pytest.raises(KeyboardInterrupt):
            start(base, rejections, run)
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
    assert settings.pop("format") == 2
    file.write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"settings\.json is of format 1, whose objective names mean other losses"):
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

    monkeypatch.setattr("buleyean_rl.training.checkpoints.write_json", denied)
    monkeypatch.setattr("buleyean_rl.models.model.load_for_inference", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(PermissionError):
        start(base, rejections, tmp_path / "run")


def test_a_run_that_failed_before_its_first_step_can_be_restarted(base: Path, rejections: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text(rejections.read_text() + "{\n")
    with pytest.raises(RecordError, match=r"broken.jsonl:11: "):
        start(base, broken, tmp_path / "run")
    assert start(base, rejections, tmp_path / "run").steps == 8
