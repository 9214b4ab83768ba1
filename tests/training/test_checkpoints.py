"""Checkpoints: in time, marked, and whole or named as damaged."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl

from buleyean_rl.errors import UsageError
from buleyean_rl.system.files import is_temporary
from buleyean_rl.training import checkpoints
from buleyean_rl.training.checkpoints import (
    MARK,
    WriteCheckpoints,
    discard_checkpoints,
    find_checkpoint,
    has_checkpoint,
    mark_unfinished,
    mark_whole,
)
from buleyean_rl.training.processes import Processes

FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def write(folder: Path, step: int, whole: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    mark_unfinished(path)
    for name in FILES:
        (path / name).write_text(f"{name} of {step}")
    if whole:
        mark_whole(path, step)
    return path


def foreign(folder: Path) -> Path:
    path = folder / "checkpoint-best"
    path.mkdir()
    (path / "weights.bin").write_text("theirs")
    return path


def test_the_newest_whole_one_is_found(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) == (None, [])
    foreign(tmp_path)
    write(tmp_path, 12, whole=False)
    (tmp_path / "checkpoint-13").mkdir()  # killed before the mark was written
    assert find_checkpoint(tmp_path) == (None, [])
    assert not has_checkpoint(tmp_path)
    for step in (9, 10, 8):
        write(tmp_path, step)
    assert find_checkpoint(tmp_path) == ((tmp_path / "checkpoint-10", 10), [])
    assert has_checkpoint(tmp_path)


@pytest.mark.parametrize("name", [*FILES, MARK])
@pytest.mark.parametrize("damage", ["missing", "empty", "changed"])
def test_a_damaged_one_is_named_and_the_one_before_taken(name: str, damage: str, tmp_path: Path) -> None:
    before, last = write(tmp_path, 2), write(tmp_path, 4)
    file = last / name
    if damage == "missing":
        file.unlink()
    else:
        file.write_text("" if damage == "empty" else file.read_text()[:-1] + "?")
    found, damages = find_checkpoint(tmp_path)
    assert found == (before, 2)
    if (name, damage) == (MARK, "missing"):
        assert damages == []  # nothing says that it is ours
    else:
        assert len(damages) == 1
        assert str(last) in damages[0]
        assert name in damages[0]


def test_only_our_own_are_discarded(tmp_path: Path) -> None:
    theirs = foreign(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    for step in (2, 10, 4):
        write(tmp_path, step)
    write(tmp_path, 11, whole=False)
    discard_checkpoints(tmp_path, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-10", theirs.name, "run.json"}
    discard_checkpoints(tmp_path, keep=2, newest=4)
    assert not (tmp_path / "checkpoint-10").exists()
    discard_checkpoints(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {theirs.name, "run.json"}
    assert (theirs / "weights.bin").read_text() == "theirs"


def test_a_foreign_folder_is_not_written_into(tmp_path: Path) -> None:
    theirs = foreign(tmp_path)
    with pytest.raises(UsageError, match="is not a checkpoint of ours: move it elsewhere"):
        mark_unfinished(theirs)
    assert [path.name for path in theirs.iterdir()] == ["weights.bin"]


def test_one_is_due_before_five_minutes_are_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(checkpoints, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    callback, saved = WriteCheckpoints(tmp_path, limit=1), []
    callback.on_train_begin(None, None, None)
    for step in range(1, 13):
        clock[0] += 70
        control = TrainerControl(should_training_stop=step == 12)
        state = SimpleNamespace(global_step=step)
        callback.on_step_end(None, state, control)
        if control.should_save:
            assert control.should_log
            (tmp_path / f"checkpoint-{step}" / "optimizer.pt").write_text("state")
            callback.on_save(None, state, control)
            saved.append(step)
    assert saved == [4, 8, 12]  # 280 seconds each: a step more would be 350
    assert find_checkpoint(tmp_path) == ((tmp_path / "checkpoint-12", 12), [])
    assert not (tmp_path / "checkpoint-8").exists()


def test_what_the_first_process_decides_holds_for_all(tmp_path: Path) -> None:
    class Second(Processes):
        def once(self, _compute: Any) -> Any:
            return {"should_training_stop": True, "should_save": True}

    callback = WriteCheckpoints(tmp_path, limit=1, processes=Second(1, ["a", "a"]))
    for event in (callback.on_log, callback.on_epoch_end):
        control = TrainerControl()
        event(None, SimpleNamespace(global_step=1), control)
        assert control.should_training_stop
    assert not control.should_save  # it has no folder
    assert not [*tmp_path.iterdir()]


def test_a_first_step_of_five_minutes_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(checkpoints, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    callback = WriteCheckpoints(tmp_path, limit=1)
    callback.on_train_begin(None, None, None)
    clock[0] = 200.0
    control = TrainerControl()
    callback.on_step_end(None, SimpleNamespace(global_step=1), control)
    assert control.should_save


def test_one_that_is_being_deleted_is_never_taken_for_somebody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(folder: Path) -> None:
        (folder / MARK).unlink()
        raise KeyboardInterrupt

    write(tmp_path, 2)
    monkeypatch.setattr(shutil, "rmtree", half)
    with pytest.raises(KeyboardInterrupt):
        discard_checkpoints(tmp_path)
    (rest,) = tmp_path.iterdir()
    assert is_temporary(rest)
