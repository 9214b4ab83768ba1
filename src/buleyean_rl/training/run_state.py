"""A run folder while its run is under way: begun, resumed as the same run, failed, finished.

settings.json, from the first moment: what decides the result, and why the run failed if it did
run.json, at the very end: from then on the run is finished, whatever else is still there
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.markup import escape

from buleyean_rl.errors import TrainingError, UsageError
from buleyean_rl.models.run_files import (
    SETTINGS_FILE,
    SETTINGS_FORMAT,
    is_finished,
    is_run_folder,
    is_unfinished,
    read_settings,
)
from buleyean_rl.system.files import write_json
from buleyean_rl.system.outputs import claim_folder
from buleyean_rl.system.wording import counted
from buleyean_rl.training.checkpoints import Checkpoint, discard_checkpoints, find_checkpoint, has_checkpoint
from buleyean_rl.training.config import BuleyeanConfig
from buleyean_rl.training.dataset import OWN_SAMPLES_FILE
from buleyean_rl.training.guard import SOUND_ADAPTER_FILE
from buleyean_rl.training.processes import ALONE, Processes

WORK_FILES = (SOUND_ADAPTER_FILE, OWN_SAMPLES_FILE)


def run_settings(model_name: str, sha256: str, config: BuleyeanConfig) -> dict[str, Any]:
    """Base model, records and settings of a run, for `settings.json`.

    Args:
        model_name: of the base model, absolute.
        sha256: of the records file.
        config: the settings.
    """
    return {"model": model_name, "records_sha256": sha256, "config": config.settings()}


class RunState:
    """A run under way, in a folder that this process holds. From `open_run`.

    Args:
        folder: of the run; for all processes but the first one of their own, which is deleted at the end.
        settings: from `run_settings`.
        checkpoint: to resume from; None for the first step.
        begun_processes: their number when the run began.
        processes: that train together.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        checkpoint: Checkpoint | None,
        begun_processes: int,
        processes: Processes,
    ) -> None:
        self.folder, self.settings, self.checkpoint = folder, dict(settings), checkpoint
        self.begun_processes, self._processes = begun_processes, processes
        self._may_differ = set() if begun_processes == processes.size else {"processes", "hosts", "threads"}

    def record(self, name: str, values: Mapping[str, Any]) -> None:
        """Record what else decides the result, or compare it with what a resumed run began with.

        Args:
            name: of the entry in `settings.json`.
            values: JSON values by name.

        Raises:
            UsageError: a resumed run began with others, or the processes differ.
        """
        self._processes.check_same("computation", values)
        if not self._processes.is_first:
            return
        written = read_settings(self.folder)
        earlier = written.get(name, {})
        common = earlier.keys() & values.keys() - self._may_differ
        differences = _differences({key: earlier[key] for key in common}, {key: values[key] for key in common})
        if differences and self.checkpoint is not None:
            raise UsageError(
                f"cannot resume {self.folder}: it would not be the same run: {', '.join(differences)}; resume it as it "
                "was begun, or delete the folder"
            )
        if differences:
            (self.folder / OWN_SAMPLES_FILE).unlink(missing_ok=True)  # which were drawn with others
        begun = {key: value for key, value in earlier.items() if key in self._may_differ}
        write_json(self.folder / SETTINGS_FILE, written | {name: earlier | dict(values) | begun})

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Remember a failure of training within: the run cannot be resumed, and may be begun anew."""
        try:
            yield
        except TrainingError as error:
            if not self._processes.is_first:
                raise
            write_json(self.folder / SETTINGS_FILE, read_settings(self.folder) | {"failed": str(error)})
            raise

    def finish(self) -> None:
        """Delete what a finished run has no use for; `run.json` is written."""
        _discard_work(self.folder)


@contextmanager
def open_run(
    folder: Path, settings: Mapping[str, Any], resume: bool, console: Console, processes: Processes = ALONE
) -> Iterator[RunState]:
    """Begin or resume a run in a folder, held for the first process while the context lasts.

    Args:
        folder: of the run.
        settings: from `run_settings`; a resumed run must have the same.
        resume: resume a run that was stopped.
        console: for checkpoints that are damaged.
        processes: that train together; the others than the first get a copy of the checkpoint.

    Raises:
        UsageError: the folder is not ours, is in use, has another run, or none to resume.
        ModelError: another version wrote the run to resume.
        TrainingError: the run to resume failed.
    """
    processes.check_same("settings", settings)
    if not processes.is_first:
        with TemporaryDirectory() as scratch:
            path = processes.receive(None, Path(scratch))
            told: list[Any] = processes.once(list)
            checkpoint = None if path is None else Checkpoint(path, told[0])
            yield RunState(Path(scratch), settings, checkpoint, told[1], processes)
        return
    with _hold_run(folder, settings, resume, console) as checkpoint:
        begun = read_settings(folder).get("compute", {}).get("processes", 1) if checkpoint else processes.size
        processes.receive(checkpoint and checkpoint.path, folder)
        processes.once(lambda: [checkpoint and checkpoint.step, begun])
        if begun != processes.size:
            console.print(
                f"the run began with {counted(begun, 'process', 'processes')} and goes on with {processes.size}: "
                "the records of each step are the same, the last bits are not"
            )
        yield RunState(folder, settings, checkpoint, begun, processes)


@contextmanager
def _hold_run(folder: Path, settings: Mapping[str, Any], resume: bool, console: Console) -> Iterator[Checkpoint | None]:
    """The checkpoint to go on from, in a folder that is held."""
    if resume and not is_run_folder(folder):
        raise UsageError(f"nothing to resume in {folder}: start it without --resume")
    with claim_folder(folder, is_run_folder, "run"):
        if is_finished(folder):
            _discard_work(folder)  # the process may have been killed before it could
            raise UsageError(f"{folder} already has a finished run: name another folder, or delete this one")
        if resume:
            yield _resume(folder, settings, console)
        else:
            _begin(folder, settings)
            yield None


def clean_finished(folder: Path) -> None:
    """Delete what a process that was killed at the end of its run left in the folder.

    Raises:
        UsageError: another process is at it.
    """
    with claim_folder(folder, is_run_folder, "run"):
        _discard_work(folder)


def can_resume(folder: Path) -> bool:
    """Whether a folder has a run that was stopped, and did not fail."""
    return is_unfinished(folder) and "failed" not in read_settings(folder)


def _begin(folder: Path, settings: Mapping[str, Any]) -> None:
    if can_resume(folder) and has_checkpoint(folder):
        raise UsageError(f"{folder} has an unfinished run: resume it with --resume, or delete it")
    _discard_work(folder, keep_settings=True)
    write_json(folder / SETTINGS_FILE, {"format": SETTINGS_FORMAT} | dict(settings))


def _resume(folder: Path, settings: Mapping[str, Any], console: Console) -> Checkpoint | None:
    written = read_settings(folder)
    if "failed" in written:
        raise TrainingError(
            f"{folder} cannot be resumed, its run failed: {written['failed']} (begin it anew, without --resume)"
        )
    names = ("model", "records_sha256")
    differences = _differences({name: written[name] for name in names}, {name: settings[name] for name in names})
    differences += _differences(written["config"], settings["config"])
    if differences:
        raise UsageError(f"cannot resume {folder} with other settings: {', '.join(differences)}")
    checkpoint, damages = find_checkpoint(folder)
    for damage in damages:
        console.print(f"[yellow]warning:[/] {escape(damage)}", soft_wrap=True)
    console.print(f"the run goes on after step {checkpoint.step if checkpoint else 0:,}")
    discard_checkpoints(folder, keep=2, newest=checkpoint.step if checkpoint else -1)
    return checkpoint


def _differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, in words."""
    names = [*now, *(name for name in earlier if name not in now)]
    return [
        f"{name} ({_short(earlier.get(name))} then, {_short(now.get(name))} now)"
        for name in names
        if earlier.get(name) != now.get(name)
    ]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:12]}..."


def _discard_work(folder: Path, keep_settings: bool = False) -> None:
    discard_checkpoints(folder)
    for name in WORK_FILES:
        (folder / name).unlink(missing_ok=True)
    if not keep_settings:
        (folder / SETTINGS_FILE).unlink(missing_ok=True)
