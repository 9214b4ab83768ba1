"""Checkpoints of a run: written in time, marked as ours, proven whole before one is resumed.

    checkpoint-6/   adapter, optimizer.pt, scheduler.pt, rng_state.pth, trainer_state.json --sha256--> checkpoint.json

The mark, `checkpoint.json`, is the first file of a checkpoint and, with the hash of every other, the last. Folders
without one are somebody else's, and stay.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerCallback

from buleyean_rl.errors import UsageError
from buleyean_rl.system.files import file_sha256, is_temporary, read_json_object, remove_folder, write_json
from buleyean_rl.training.processes import ALONE, Processes

CHECKPOINT_FORMAT = 1
MARK = "checkpoint.json"
MAX_SECONDS_BETWEEN = 300.0
ENDS = ("should_training_stop", "should_epoch_stop")
DECISIONS = (*ENDS, "should_save", "should_log")


class Checkpoint(NamedTuple):
    """A whole checkpoint.

    Args:
        path: its folder.
        step: after which it was written.
    """

    path: Path
    step: int


def mark_unfinished(path: Path) -> None:
    """Mark a folder as a checkpoint of ours that is being written; it is made.

    Raises:
        UsageError: somebody else's folder has the name.
    """
    if path.exists() and not _is_ours(path):
        raise UsageError(f"{path} is not a checkpoint of ours: move it elsewhere, then go on with --resume")
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / MARK, {"format": CHECKPOINT_FORMAT, "files": None})


def mark_whole(path: Path, step: int) -> None:
    """Mark a checkpoint as whole, with the hashes of its files."""
    files = {file.name: file_sha256(file) for file in sorted(path.iterdir()) if file.is_file() and file.name != MARK}
    write_json(path / MARK, {"format": CHECKPOINT_FORMAT, "step": step, "files": files})


def find_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint of a run.

    Args:
        folder: of the run.

    Returns:
        The checkpoint, or None; and what is wrong with newer ones, in words. One that was not written to its end is
        nothing wrong.
    """
    marks = {path: _read_mark(path) for path in _checkpoints(folder)}
    damages = [f"{path} is damaged: {MARK} cannot be read" for path, mark in marks.items() if mark is None]
    whole = {path: mark for path, mark in marks.items() if mark is not None and mark["files"] is not None}
    for path, mark in sorted(whole.items(), key=lambda item: item[1]["step"], reverse=True):
        if (damage := _find_damage(path, mark)) is None:
            return Checkpoint(path, mark["step"]), damages
        damages.append(f"{path} is damaged: {damage}")
    return None, damages


def has_checkpoint(folder: Path) -> bool:
    """Whether a run has written a checkpoint to its end, damaged since or not."""
    return any(mark["files"] is not None for path in _checkpoints(folder) if (mark := _read_mark(path)))


def discard_checkpoints(folder: Path, keep: int = 0, newest: int | None = None) -> None:
    """Delete checkpoints of ours.

    Args:
        folder: of the run.
        keep: number of whole ones that stay, the newest.
        newest: step after which all are deleted first; None deletes none for that.
    """
    steps: dict[Path, int] = {}
    for path in _checkpoints(folder):
        mark = _read_mark(path)
        step = mark["step"] if mark and mark["files"] is not None else -1
        steps[path] = -1 if newest is not None and step > newest else step
    whole = sorted((path for path, step in steps.items() if step >= 0), key=lambda path: steps[path])
    for path in steps:
        if path not in whole[len(whole) - keep :]:
            remove_folder(path)


class WriteCheckpoints(TrainerCallback):
    """Has checkpoints written at least every five minutes, marks those that are whole, deletes older ones.

    It must be the last callback: it sees whether one before it ends the run.

    Args:
        folder: of the run.
        limit: number that are kept; None keeps all.
        enabled: False writes none.
        processes: that train together, of which the first writes, and decides what is next for all.
    """

    def __init__(self, folder: Path, limit: int | None, enabled: bool = True, processes: Processes = ALONE) -> None:
        self._folder, self._limit, self._enabled, self._processes = folder, limit, enabled, processes

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Start the clock."""
        self._written = self._last_step = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Ask for a checkpoint where the next step might end too late; for an entry of the log with each."""
        now = time.monotonic()
        step_seconds, self._last_step = now - self._last_step, now
        is_last = control.should_training_stop
        if self._enabled and (is_last or now - self._written + step_seconds > MAX_SECONDS_BETWEEN):
            control.should_save = True
        if is_last or control.should_save:  # the log is in the checkpoint: what it lacks is lost
            control.should_log = True
        self._agree(control, DECISIONS)  # clocks differ
        self._announce(state, control)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Let all end where a callback of the first process has seen enough."""
        self._agree(control, ENDS)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Mark the checkpoint of an epoch."""
        self._agree(control, DECISIONS)
        self._announce(state, control)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Mark the checkpoint, delete older ones."""
        mark_whole(self._path(state), state.global_step)
        if self._limit is not None:
            discard_checkpoints(self._folder, keep=self._limit)
        self._written = self._last_step = time.monotonic()

    def _agree(self, control: Any, names: Sequence[str]) -> None:
        """Decide in all processes as the first one does, which alone has a caller's callbacks."""
        vars(control).update(self._processes.once(lambda: {name: getattr(control, name) for name in names}))

    def _announce(self, state: Any, control: Any) -> None:
        control.should_save &= self._processes.is_first
        if control.should_save:
            mark_unfinished(self._path(state))

    def _path(self, state: Any) -> Path:
        return self._folder / f"checkpoint-{state.global_step}"


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of ours, whole or not."""
    return [path for path in folder.glob("checkpoint-*") if path.is_dir() and not path.is_symlink() and _is_ours(path)]


def _is_ours(path: Path) -> bool:
    return (path / MARK).is_file() or all(is_temporary(file) for file in path.iterdir())


def _read_mark(path: Path) -> dict[str, Any] | None:
    """A checkpoint's mark; None where it cannot be read."""
    if not (path / MARK).exists():  # killed before it was written
        return {"format": CHECKPOINT_FORMAT, "files": None}
    mark = read_json_object(path / MARK)
    if mark is None or mark.get("format") != CHECKPOINT_FORMAT or "files" not in mark:
        return None
    is_whole = isinstance(mark["files"], dict) and isinstance(mark.get("step"), int)
    return mark if mark["files"] is None or is_whole else None


def _find_damage(path: Path, mark: dict[str, Any]) -> str | None:
    """What is wrong with a checkpoint's files, in words; None if nothing is."""
    for name, digest in mark["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if not file.stat().st_size:
            return f"{name} is empty"
        if file_sha256(file) != digest:
            return f"{name} is not what was written"
    return None
