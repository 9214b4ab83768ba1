"""Runs of the tiny model, for the tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from buleyean_rl.training.config import load_config
from buleyean_rl.training.report import RunReport
from buleyean_rl.training.run import train
from quick import make_runs_quick

# Eight steps of two records: the ninth record starts a second epoch, so a resumed run must find its place in it.
SETTINGS = {"max_steps": 8, "per_device_train_batch_size": 2, "save_steps": 0.25, "learning_rate": 1e-2, "guard": False}


def start(
    base: Path,
    records: Path,
    run: Path,
    *,
    resume: bool = False,
    skip_bad: bool = False,
    console: Console | None = None,
    **settings: Any,
) -> RunReport:
    """Train with `SETTINGS`, overridden by `settings`, quickly."""
    config = load_config(None, run, SETTINGS | settings)
    with pytest.MonkeyPatch.context() as patch:
        make_runs_quick(patch)
        return train(records, str(base), config, resume=resume, skip_bad=skip_bad, console=console)


def adapter_bytes(run: Path) -> bytes:
    return (run / "adapter_model.safetensors").read_bytes()


def logged_steps(run: Path) -> list[dict[str, float]]:
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "floor" in entry]
