"""Run folders while they are written: start, resume, checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from buleyean_rl.errors import UsageError
from buleyean_rl.models.run_folder import RUN_FORMAT, read_run
from buleyean_rl.system.files import write_json
from buleyean_rl.training.config import BuleyeanConfig

RESULT_SETTINGS = (  # those that decide the result
    *("objective", "alpha", "tau", "beta", "own_samples"),
    *("max_length", "micro_batch_tokens", "held_out", "guard", "guard_kl"),
    *("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "adapter_scale"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "seed"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "activation_checkpointing"),
    *("num_train_epochs", "max_steps"),
)


def run_settings(model_name: str, sha256: str, config: BuleyeanConfig) -> dict[str, Any]:
    """The contents of `settings.json`: base model, records and the settings that decide the result.

    Args:
        model_name: of the base model, absolute.
        sha256: of the records file.
        config: the settings.
    """
    values = {name: getattr(config, name) for name in RESULT_SETTINGS}
    plain = {name: str(value.value) if hasattr(value, "value") else value for name, value in values.items()}
    return {"model": model_name, "records_sha256": sha256, "config": plain}


def open_run(folder: Path, settings: dict[str, Any], resume: bool) -> Path | None:
    """Start or resume a run in a folder.

    Args:
        folder: of the run.
        settings: from `run_settings`; a resumed run must have the same.
        resume: resume a run that was stopped.

    Returns:
        The checkpoint to resume from, or None to start.

    Raises:
        UsageError: the folder has another run, or none to resume.
        ModelError: an earlier version wrote the run to resume.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: name a folder for the run")
    file = folder / "settings.json"
    if (folder / "run.json").exists():
        raise UsageError(f"{folder} already has a finished run: name another folder, or delete this one")
    if not resume:
        if file.exists() and last_checkpoint(folder) is not None:
            raise UsageError(f"{folder} has an unfinished run: resume it with --resume, or delete it")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, {"format": RUN_FORMAT} | settings)
        return None
    if not file.exists():
        raise UsageError(f"nothing to resume in {folder}: start it without --resume")
    earlier = read_run(folder, file.name)
    differences = [name for name in ("model", "records_sha256") if earlier[name] != settings[name]] + [
        f"{name} ({earlier['config'].get(name)} then, {value} now)"
        for name, value in settings["config"].items()
        if earlier["config"].get(name) != value
    ]
    if differences:
        raise UsageError(f"cannot resume {folder} with other settings: {', '.join(differences)}")
    checkpoint = last_checkpoint(folder)
    discard_checkpoints(folder, keep=checkpoint)  # transformers' rotation would count an incomplete one
    return checkpoint


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; a killed run may leave an incomplete one.

    Args:
        folder: of the run.
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
