"""Adapters that a study trains and measures, at the side of `training.run`: no guard, no report, nothing measured."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from buleyean_rl.data.records import RejectionRecord, records_sha256, write_records
from buleyean_rl.data.trie import Boundary
from buleyean_rl.models.lora import scale_adapter
from buleyean_rl.models.model import Model
from buleyean_rl.training.anchors import anchor_groups
from buleyean_rl.training.config import BuleyeanConfig, load_config
from buleyean_rl.training.dataset import Dataset, RecordsFile
from buleyean_rl.training.reference_cache import open_reference_cache
from buleyean_rl.training.run import attach_run_adapter, prepare_data, settle_firmness
from buleyean_rl.training.trainer import BuleyeanTrainer

Anchors = Callable[[Model, Dataset, BuleyeanConfig], list[Sequence[Boundary]]]


def train_adapter(
    base: Model,
    records: Sequence[RejectionRecord],
    settings: dict[str, Any],
    folder: Path,
    preset: str = "log",
    anchors: Anchors = anchor_groups,
) -> dict[str, Any]:
    """Train an adapter into a folder, which is replaced.

    Args:
        base: the model; its weights are shared, not changed.
        records: to train on.
        settings: other than the preset's.
        folder: of the adapter.
        preset: one of `config.PRESETS`.
        anchors: what a run keeps to its base on.

    Returns:
        What it took: records, steps, tokens trained on, threads, seconds.
    """
    console = Console(quiet=True)
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "records.jsonl"
        write_records(file, records)
        config = load_config(None, folder, {"save_strategy": "no", "held_out": 0.0} | settings, preset)
        model = base.with_source(base.source)
        dataset = prepare_data(RecordsFile(file, records_sha256(file)), model, config, console)
        attach_run_adapter(model, config, console)
        settle_firmness(model, dataset, config, console)
        groups = anchors(model, dataset, config)
        references = open_reference_cache(model, dataset, config, groups)
        trainer = BuleyeanTrainer(model, config, dataset.training, (), references, groups)
        started = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - started
    shutil.rmtree(folder, ignore_errors=True)
    trainer.save_model(str(folder))
    log = [entry for entry in trainer.state.log_history if "floor" in entry]
    return {
        "records": len(dataset.training),
        "steps": trainer.state.global_step,
        "learning_rate": config.learning_rate,
        "tau": config.tau,
        "prior_mean": config.prior_mean,
        "trained_tokens": sum(entry["tokens"] for entry in log),
        "threads": torch.get_num_threads(),
        "training_seconds": round(seconds, 1),
    }


def adapted(base: Model, folder: Path, scale: float = 1.0) -> Model:
    """A base with an adapter of a folder at a scale."""
    model = base.with_source(base.source.with_adapter(folder))
    if scale != 1:
        scale_adapter(model.module.requires_grad_(False), scale)
    return model
