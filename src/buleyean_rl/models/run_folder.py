"""Run folders as models: the base with its adapter attached or merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from buleyean_rl.errors import ModelError
from buleyean_rl.models.adapt import quiet_peft
from buleyean_rl.models.source import Source, resolve
from buleyean_rl.models.weights import load_base, loading

RUN_FORMAT = 2  # of run.json and settings.json; in 1, without a number, objectives had other losses


def find_model(name: str | Path | Source) -> Source:
    """Resolve a model: a base model, or a run folder's base with its adapter.

    Args:
        name: a run folder, or see `resolve`.

    Raises:
        ModelError: nothing of that name can exist, or an earlier version wrote the run.
    """
    if isinstance(name, Source):
        return name
    return resolve(run_base(Path(name))).with_adapter(Path(name)) if is_run(str(name)) else resolve(str(name))


def merge_run(run: Path | Source, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load a run's base model, merge the adapter in fp32, and load the tokenizer.

    Args:
        run: a folder that `buleyean train` wrote.
        dtype: of the merged weights.

    Raises:
        ModelError: it is not a run folder, or its base model cannot be loaded.
    """
    model, tokenizer = load_run(run)
    return model.merge_and_unload().eval().to(dtype), tokenizer


def load_run(run: Path | Source, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load a run's base model with the adapter attached, and the tokenizer.

    Args:
        run: a folder that `buleyean train` wrote.
        dtype: of the base's weights.

    Returns:
        The PEFT model in evaluation mode, and the tokenizer.

    Raises:
        ModelError: it is not a run folder, or its base model cannot be loaded.
    """
    from peft import PeftModel

    source = run if isinstance(run, Source) else resolve(run_base(run)).with_adapter(run)
    folder = Path(str(source.run))
    base = load_base(source, dtype)
    with loading(source), quiet_peft():
        return PeftModel.from_pretrained(base, str(folder)).eval(), run_tokenizer(folder)


def run_tokenizer(run: Path) -> Any:
    """The tokenizer of a run folder.

    Raises:
        ModelError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    with loading(Source(str(run), str(run))):
        return AutoTokenizer.from_pretrained(str(run))


def run_base(run: Path) -> str:
    """The name of the base model that a run folder's adapter belongs to.

    Raises:
        ModelError: it is not a run folder, or an earlier version wrote it.
    """
    config = run / "adapter_config.json"
    if not config.exists():
        raise ModelError(f"{run} has no adapter_config.json: it is not a run folder, or its training has not ended")
    if (run / "run.json").exists():
        read_run(run)
    return str(json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"])


def is_run(name: str) -> bool:
    """Whether a name is a run folder."""
    return (Path(name) / "adapter_config.json").exists()


def read_run(run: Path, file: str = "run.json") -> dict[str, Any]:
    """Read a run folder's report or settings.

    Args:
        run: the folder.
        file: `run.json`, or `settings.json` of a run that has not ended.

    Raises:
        ModelError: an earlier version wrote it.
    """
    values = dict(json.loads((run / file).read_text(encoding="utf-8")))
    if values.get("format") != RUN_FORMAT:
        raise ModelError(
            f"{run / file} is of format {values.get('format', 1)}, whose objective names mean other losses than those "
            f"of format {RUN_FORMAT}: train the run again in another folder"
        )
    return values
