"""Run folders as models: the base with its adapter attached or merged."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from buleyean_rl.errors import ModelError
from buleyean_rl.models.adapt import quiet_peft
from buleyean_rl.models.adapter_folder import adapter_weights, check_adapter, read_adapter_config, untie_head
from buleyean_rl.models.run_files import is_finished, is_run, is_unfinished, read_run
from buleyean_rl.models.source import Source, resolve
from buleyean_rl.models.weights import (
    TOKENIZER_FILES,
    VOCABULARY_FILES,
    check_model,
    load_base,
    load_config,
    load_tokenizer,
    loading,
    read_tokenizer,
)


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
    untie_head(model)
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
    source = run if isinstance(run, Source) else resolve(run_base(run)).with_adapter(run)
    check_files(source)
    return attach_run(load_base(source, dtype), source), run_tokenizer(source)


def attach_run(base: Any, run: Source) -> Any:
    """Attach a run's adapter to its base model in memory; its files are checked before.

    Args:
        base: from `load_base`; its modules are changed, its weights are not.
        run: the run.

    Returns:
        The PEFT model in evaluation mode.

    Raises:
        ModelError: the adapter cannot be loaded.
    """
    from peft import PeftModel

    with loading(run), quiet_peft():
        return PeftModel.from_pretrained(base, str(run.run)).eval()


def check_files(source: Source) -> None:
    """Check a model's files, and those of a run's adapter, without loading either.

    Raises:
        ModelError: what is wrong, with the tensor or key.
    """
    if source.run is not None:
        _check_base(source.run, source.base)
    check_model(source)
    if source.run is not None:
        with loading(source):
            check_adapter(source.run, load_config(source))


def _check_base(run: Path, base: Source | None) -> None:
    """Refuse a base whose files are others than those the adapter was trained on."""
    if base is None or not is_finished(run):
        return
    numerics = read_run(run).get("numerics")
    trained_on = numerics.get("weights") if isinstance(numerics, dict) else None
    if trained_on is not None and trained_on != base.fingerprint:
        raise ModelError(
            f"{run} was trained on other files than {base.name} has now ({trained_on} then, {base.fingerprint} now): "
            "restore them, or train the run again"
        )


def run_tokenizer(run: Source) -> Any:
    """The tokenizer of a run: its folder's own, or its base model's where the folder has none.

    Raises:
        ModelError: it cannot be loaded.
    """
    folder = Path(str(run.run))
    if not any((folder / file).exists() for file in (*TOKENIZER_FILES, *VOCABULARY_FILES)):
        return load_tokenizer(run)
    with loading(run):
        return read_tokenizer(folder)


def run_base(run: Path) -> str:
    """The name of the base model that a run folder's adapter belongs to.

    Raises:
        ModelError: it is not a run folder, its training has not ended, another version wrote it, or its base is gone.
    """
    if is_unfinished(run):
        raise ModelError(f"{run} has an unfinished run: finish it with `buleyean train ... --resume`")
    config = run / "adapter_config.json"
    if not config.exists():
        raise ModelError(f"{run} has no adapter_config.json: it is not a run folder, or its training has not ended")
    if is_finished(run):
        read_run(run)
    adapter_weights(run)
    base = str(read_adapter_config(run)["base_model_name_or_path"])
    if os.path.isabs(base) and not os.path.exists(base):
        raise ModelError(
            f"{run} was trained on {base}, which is not there: move it back, or name its place in {config}"
        )
    return base
