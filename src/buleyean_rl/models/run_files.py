"""The files of a run folder that say what it is, without what would load a model.

settings.json, from the first moment     run.json, at the very end
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from buleyean_rl.errors import ModelError
from buleyean_rl.models.model_folder import read_json
from buleyean_rl.system.files import read_json_object

REPORT_FILE, SETTINGS_FILE = "run.json", "settings.json"
RUN_FORMAT = 2  # of run.json; in 1, without a number, objectives had other losses
SETTINGS_FORMAT = 3  # of settings.json and of the checkpoints beside it; below 3, learning rates were others


def is_run(name: str) -> bool:
    """Whether a name is a run folder."""
    return (Path(name) / "adapter_config.json").exists()


def is_finished(run: Path) -> bool:
    """Whether a folder has a finished run, whatever else is there."""
    return (run / REPORT_FILE).exists()


def is_unfinished(run: Path) -> bool:
    """Whether a folder has a run that has not ended."""
    return (run / SETTINGS_FILE).exists() and not is_finished(run)


def read_run(run: Path) -> dict[str, Any]:
    """Read a run folder's report.

    Raises:
        ModelError: it is damaged, or another version wrote it.
    """
    values = read_json(run / REPORT_FILE)
    written = values.get("format", 1)
    if written == RUN_FORMAT:
        return values
    if isinstance(written, int) and written > RUN_FORMAT:
        raise ModelError(f"{run / REPORT_FILE} is of format {written}, of a later version: update buleyean-rl")
    raise ModelError(
        f"{run / REPORT_FILE} is of format {written}, whose objective names mean other losses than those of format "
        f"{RUN_FORMAT}: train the run again in another folder"
    )


def read_settings(run: Path) -> dict[str, Any]:
    """Read the settings of a run that has not ended.

    Raises:
        ModelError: they are damaged, or another version wrote them.
    """
    values = read_json(run / SETTINGS_FILE)
    written = values.get("format", 1)
    if written != SETTINGS_FORMAT:
        raise ModelError(
            f"{run / SETTINGS_FILE} is of format {written}, and this version goes on with runs of format "
            f"{SETTINGS_FORMAT}: begin the run anew in another folder, or finish it with the version that began it"
        )
    return values


def is_run_folder(folder: Path) -> bool:
    """Whether a folder has a run of ours, finished or not."""
    reports = (read_json_object(folder / name) or {} for name in (REPORT_FILE, SETTINGS_FILE))
    return any({"model", "records_sha256", "config"} <= report.keys() for report in reports)


def final_kl(report: Mapping[str, Any]) -> float | None:
    """KL(base || trained) in nats per token, on the kind of text that moved farthest; None in earlier reports.

    Args:
        report: of `run.json`.
    """
    return max((drift["kl"] for drift in report.get("drift", {}).values()), default=None)
