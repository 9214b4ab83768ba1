"""What a run would take, found out without leaving anything of it but caches."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from buleyean_rl.data.records import records_sha256
from buleyean_rl.models.model import open_model
from buleyean_rl.models.source import resolve
from buleyean_rl.system.progress import working
from buleyean_rl.system.wording import counted
from buleyean_rl.training.anchors import anchor_groups
from buleyean_rl.training.before_after import Measurement
from buleyean_rl.training.config import BuleyeanConfig
from buleyean_rl.training.dataset import RecordsFile
from buleyean_rl.training.estimate import CHECKPOINT_ADAPTERS, Estimate, checkpoints, estimate
from buleyean_rl.training.reference_cache import node_counts, planned_entry
from buleyean_rl.training.run import (
    ESTIMATE,
    OWN_TEXT,
    attach_run_adapter,
    make_guard,
    prepare_data,
    settle_firmness,
    tokens_to_read,
)
from buleyean_rl.training.trainer import BuleyeanTrainer


@dataclass(frozen=True)
class RunPlan:
    """What a run would take.

    Args:
        records: to train on.
        records_held_out: to measure on only.
        tokens: of one pass over the records, shared prompts counted once.
        need: its steps, time and memory.
        run_bytes: of the run folder at the end.
        work_bytes: of disk more while it runs: checkpoints, and the reference's states.
        free_bytes: of the disk.
        compute: what it would compute with.
    """

    records: int
    records_held_out: int
    tokens: int
    need: Estimate
    run_bytes: int
    work_bytes: int
    free_bytes: int
    compute: str

    def lines(self) -> list[str]:
        """For a person, in rich's markup, below the line that says what computes."""
        disk = f"disk: {_size(self.run_bytes)} for the run, {_size(self.work_bytes)} more while it trains"
        return [
            f"would train on {counted(self.records, 'record')} ({counted(self.tokens, 'token')} a pass), "
            f"{self.records_held_out:,} held out",
            str(self.need),
            f"{disk}; {_size(self.free_bytes)} free",
            "nothing was written",
        ]

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        values = asdict(self)
        return values.pop("need") | values


def dry_run(
    records_path: Path | str,
    model_name: str,
    config: BuleyeanConfig,
    *,
    skip_bad: bool = False,
    console: Console | None = None,
) -> RunPlan:
    """Do all that comes before the first step of a run, and try one, without its folder.

    Args:
        records_path: of the records file.
        model_name: the base model, see `models.source.resolve`.
        config: the settings; `config.output_dir` is the run folder, which is not made.
        skip_bad: skip malformed records.
        console: for progress; None for no output.

    Raises:
        RecordError: the records cannot be used.
        ModelError: the model cannot be used.
        UsageError: a setting makes no sense here.
    """
    console, folder = console or Console(quiet=True), Path(str(config.output_dir))
    records = RecordsFile(Path(records_path), records_sha256(records_path), skip_bad)
    model = open_model(resolve(model_name), config.device, base_bits=config.base_bits)
    with TemporaryDirectory() as scratch:
        config.output_dir = scratch
        dataset = prepare_data(records, model, config, console)
        attach_run_adapter(model, config, console)
        settle_firmness(model, dataset, config, console)
        with working(console, OWN_TEXT):
            anchors = anchor_groups(model, dataset, config)
        with working(console, ESTIMATE):
            trainer = BuleyeanTrainer(model, config, dataset.training, anchors=anchors)
            measurement = Measurement(model, dataset, config)
            guard = make_guard(model, measurement.texts, dataset, config) if config.guard else None
            nodes = sum(node_counts(dataset, anchors))
            entry = planned_entry(model, dataset, config, nodes)
            read_tokens = tokens_to_read(measurement, guard)
            need = estimate(trainer, dataset.training, read_tokens, is_cached=entry is not None)
    parameters = [parameter for parameter in model.module.parameters() if parameter.requires_grad]
    adapter = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    return RunPlan(
        records=len(dataset.training),
        records_held_out=len(dataset.held_out),
        tokens=int(dataset.training.sizes.sum()),
        need=need,
        run_bytes=adapter,
        work_bytes=_checkpoint_bytes(config, need.steps, adapter) + (0 if entry is None else nodes * entry.bytes),
        free_bytes=shutil.disk_usage(_existing(folder)).free,
        compute=model.describe(),
    )


def _checkpoint_bytes(config: BuleyeanConfig, steps: int, adapter: int) -> int:
    """Bytes of disk that a run's checkpoints and the guard's last sound adapter take, while it trains."""
    written = checkpoints(config, steps)
    present = min(written, (config.save_total_limit or written) + 1)  # the oldest goes when the newest is whole
    return adapter * (CHECKPOINT_ADAPTERS * present + config.guard)


def _existing(folder: Path) -> Path:
    """A folder, or the nearest above it that there is."""
    path = Path(os.path.abspath(folder))
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"
