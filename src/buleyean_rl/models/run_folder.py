"""Run folders as models: the base with the adapter on it, or merged in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from buleyean_rl.errors import ModelError
from buleyean_rl.models.adapt import _quiet_peft
from buleyean_rl.models.source import Source
from buleyean_rl.models.weights import _loading, load_base


def merge_run(run: Path) -> tuple[Any, Any]:
    """A run folder's base model with the adapter merged in, in fp32, and its tokenizer.

    Args:
        run: a folder that `buleyean train` wrote.

    Raises:
        ModelError: it is not a run folder, or its base model cannot be loaded.
    """
    model, tokenizer = load_run(run)
    return model.merge_and_unload().eval(), tokenizer


def load_run(run: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A run folder's base model with the adapter on it, and its tokenizer.

    Args:
        run: a folder that `buleyean train` wrote.
        dtype: of the base's weights.

    Returns:
        The PEFT model, in evaluation mode: its adapter can be switched off.

    Raises:
        ModelError: it is not a run folder, or its base model cannot be loaded.
    """
    return _of_run(run, dtype), run_tokenizer(run)


def _of_run(run: Path, dtype: torch.dtype = torch.float32) -> Any:
    from peft import PeftModel

    base = load_base(run_base(run), dtype)
    with _loading(Source(str(run), str(run))), _quiet_peft():
        return PeftModel.from_pretrained(base, str(run)).eval()


def run_tokenizer(run: Path) -> Any:
    """The tokenizer of a run folder.

    Raises:
        ModelError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    with _loading(Source(str(run), str(run))):
        return AutoTokenizer.from_pretrained(str(run))


def run_base(run: Path) -> str:
    """The name of the base model that a run folder's adapter belongs to.

    Raises:
        ModelError: it is not a run folder.
    """
    config = run / "adapter_config.json"
    if not config.exists():
        raise ModelError(f"{run} has no adapter_config.json: it is not a run folder, or its training never ended")
    return str(json.loads(config.read_text())["base_model_name_or_path"])


def is_run(name: str) -> bool:
    """Whether a name is a run folder."""
    return (Path(name) / "adapter_config.json").exists()
