"""Run folders while they are written: claimed, resumed, their checkpoints found and discarded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from buleyean_rl.errors import UsageError
from buleyean_rl.system.files import write_json


def _open_run(folder: Path, settings: dict[str, Any], resume: bool) -> Path | None:
    """Claim the run folder; returns the checkpoint to go on from."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: name a folder for the run")
    file = folder / "settings.json"
    if (folder / "run.json").exists():
        raise UsageError(f"{folder} already holds a finished run: name another folder, or delete this one")
    if not resume:
        if file.exists() and last_checkpoint(folder) is not None:
            raise UsageError(f"{folder} holds an unfinished run: go on with --resume, or delete it")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, settings)
        return None
    if not file.exists():
        raise UsageError(f"nothing to resume in {folder}: start it without --resume")
    earlier = json.loads(file.read_text())
    differing = [name for name in ("model", "records_sha256") if earlier[name] != settings[name]] + [
        f"{name} ({earlier['config'].get(name)} then, {value} now)"
        for name, value in settings["config"].items()
        if earlier["config"].get(name) != value
    ]
    if differing:
        raise UsageError(f"cannot resume {folder} with other settings: {', '.join(differing)}")
    checkpoint = last_checkpoint(folder)
    discard_checkpoints(folder, keep=checkpoint)  # a half one would confuse the rotation
    return checkpoint


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; a killed run may leave a half one.

    Args:
        folder: where checkpoints are.
    """
    complete = []
    for path in folder.glob("checkpoint-*"):
        try:  # the state is the last file written
            complete.append((json.loads((path / "trainer_state.json").read_text())["global_step"], path))
        except (OSError, ValueError, KeyError):
            continue
    return max(complete)[1] if complete else None


def discard_checkpoints(folder: Path, keep: Path | None = None) -> None:
    """Delete all checkpoints in `folder` but one."""
    for path in folder.glob("checkpoint-*"):
        if path != keep:
            shutil.rmtree(path)
