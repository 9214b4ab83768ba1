"""Run folders side by side: found, summed up, compared, deleted. None of it loads a model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from buleyean_rl.errors import ModelError, UsageError
from buleyean_rl.models.run_files import (
    REPORT_FILE,
    SETTINGS_FILE,
    final_kl,
    is_finished,
    is_run_folder,
    read_run,
    read_settings,
)
from buleyean_rl.system.files import read_json_object
from buleyean_rl.system.locks import check_unlocked
from buleyean_rl.system.outputs import LOCK, claim_folder

# What a run writes into its folder, besides checkpoints; the two marks are deleted last.
RUN_FILES = (
    *("adapter_model.safetensors", "adapter_config.json", "trainer_state.json", "loss.png", "README.md"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model"),
    *(REPORT_FILE, SETTINGS_FILE),
)


@dataclass(frozen=True)
class RunSummary:
    """A run in a line.

    Args:
        folder: of the run.
        model: its base model.
        date: when it was last written, local time.
        state: "finished", "stopped", "running", "failed" or "unreadable".
        steps: of the optimiser, so far; None where no checkpoint says it.
        total_steps: of the whole run; None where no checkpoint says it.
        records: trained on; None before the end.
        rejected_nll_base: nats per rejected token, before training.
        rejected_nll_final: after it.
        kl: see `run_files.final_kl`.
        problem: why it failed or cannot be read.
        config: its settings.
    """

    folder: Path
    model: str
    date: str
    state: str
    steps: int | None = None
    total_steps: int | None = None
    records: int | None = None
    rejected_nll_base: float | None = None
    rejected_nll_final: float | None = None
    kl: float | None = None
    problem: str | None = None
    config: Mapping[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"folder": str(self.folder)}


def find_runs(folder: Path) -> Iterator[Path]:
    """The run folders at and below a folder, in the order of their names. Hidden folders and links are left out.

    Raises:
        UsageError: there is no such folder.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    if is_run_folder(folder):
        yield folder
        return
    for path, names, _ in os.walk(folder):
        names[:] = sorted(name for name in names if not name.startswith("."))
        runs = [name for name in names if is_run_folder(Path(path, name))]
        yield from (Path(path, name) for name in runs)
        names[:] = [name for name in names if name not in runs]


def summarise(run: Path) -> RunSummary:
    """A run folder in a line."""
    finished = is_finished(run)
    file = run / (REPORT_FILE if finished else SETTINGS_FILE)
    date = datetime.fromtimestamp(file.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
    try:
        values = read_run(run) if finished else read_settings(run)
    except ModelError as error:
        known = read_json_object(file) or {}
        return RunSummary(run, str(known.get("model")), date, "unreadable", problem=str(error))
    if not finished:
        steps, total = _last_checkpoint(run)
        state = "failed" if "failed" in values else "running" if _is_running(run) else "stopped"
        problem = values.get("failed")
        return RunSummary(run, values["model"], date, state, steps, total, problem=problem, config=values["config"])
    return RunSummary(
        run,
        values["model"],
        date,
        "finished",
        values["steps"],
        values["steps"],
        values["records"],
        values["rejected_nll_base"],
        values["rejected_nll_final"],
        final_kl(values),
        config=values["config"],
    )


def differing_settings(runs: Sequence[RunSummary]) -> dict[str, list[Any]]:
    """The settings in which runs differ, with each run's value."""
    configs = [run.config or {} for run in runs]
    names = dict.fromkeys(name for config in configs for name in config)
    values = {name: [config.get(name) for config in configs] for name in names}
    return {name: column for name, column in values.items() if any(value != column[0] for value in column)}


def check_deletable(run: Path) -> None:
    """Refuse to delete what is no run of ours, or what a process is at.

    Raises:
        UsageError: says what it is.
    """
    if run.is_symlink():
        raise UsageError(f"{run} is a link: name the folder itself")
    if not run.is_dir() or not is_run_folder(run):
        raise UsageError(f"{run} has no run of ours: nothing is deleted")
    check_unlocked(run / LOCK)


def delete_run(run: Path) -> list[Path]:
    """Delete what a run wrote, and its folder if that is empty then.

    Args:
        run: its folder.

    Returns:
        What else is in the folder, which stays.

    Raises:
        UsageError: it is no run of ours, or another process is at it.
    """
    from buleyean_rl.training.checkpoints import discard_checkpoints
    from buleyean_rl.training.run_state import WORK_FILES

    check_deletable(run)
    with claim_folder(run, is_run_folder, "run"):
        discard_checkpoints(run)
        for name in (*WORK_FILES, *RUN_FILES):
            if (run / name).is_file() or (run / name).is_symlink():
                (run / name).unlink()
        left = sorted(path for path in run.iterdir() if path.name != LOCK)
    if not left:
        run.rmdir()
    return left


def _last_checkpoint(run: Path) -> tuple[int | None, int | None]:
    """The step of the newest checkpoint, and the steps of the whole run."""
    states = [read_json_object(path) or {} for path in run.glob("checkpoint-*/trainer_state.json")]
    steps = [(state["global_step"], state["max_steps"]) for state in states if {"global_step", "max_steps"} <= {*state}]
    return max(steps, default=(None, None))


def _is_running(run: Path) -> bool:
    try:
        check_unlocked(run / LOCK)
    except UsageError:
        return True
    return False
