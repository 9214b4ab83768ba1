"""The results of a run: `run.json`, `loss.png` and, from `hub.cards`, the model card."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from buleyean_rl.errors import TrainingError
from buleyean_rl.evaluation.drift import TITLES, Drifts, as_drifts, as_json, describe_drift, largest_kl
from buleyean_rl.hub.cards import run_card
from buleyean_rl.models.run_files import RUN_FORMAT
from buleyean_rl.system.files import write_json, write_text
from buleyean_rl.system.host import library_versions, peak_rss_bytes
from buleyean_rl.system.wording import counted
from buleyean_rl.training.dataset import Dataset
from buleyean_rl.training.firmness import DECIDED
from buleyean_rl.training.loss_plot import plot_losses
from buleyean_rl.training.trainer import BuleyeanTrainer

UNCHANGED_KL, LITTLE_KL = 0.01, 0.05  # nats per token; twice the latter, perplexity has been seen to rise by a sixth


@dataclass(frozen=True)
class RunReport:
    """The result of a training run. Losses are nats per node, measured with dropout off.

    Args:
        model: name of the base model.
        objective: name of the objective.
        records: number trained on.
        records_held_out: number measured on only.
        records_sha256: of the records file.
        steps: optimiser steps.
        tokens: tokens computed, shared prompts counted once.
        loss_start: loss on the held-out records before training; without any, on training records.
        loss_final: the same after training.
        loss_floor: irreducible loss of the same records.
        optimality_gap: loss_final - loss_floor.
        optimality_gap_relative: optimality_gap / (loss_start - loss_floor).
        loss_training: mean training loss of the last tenth of the steps.
        rejected_nll_base: nats per rejected token of the same records, before training; None if nothing is rejected.
        rejected_nll_final: after training; higher is less likely.
        drift: see `evaluation.drift`, by kind of text.
        seconds: of training.
        tokens_per_second: tokens / seconds.
        peak_rss_bytes: peak memory of the process; of several, of the one with most.
        compute: see `Model.describe`.
        device: name of the device.
        parameters: of the base model, and of the adapter.
        data: counts of records dropped and responses truncated.
        versions: of the libraries.
        config: the settings that decide the result, with what was decided from the data.
        guard: see `guard.Guard.report`; None without a guard.
        adapter_scale: factor of the trained adapter. The losses and the gap are from before it was applied, the nats of
            rejected answers and the drift from after.
        numerics: see `Model.training_numerics`; and the number of processes and hosts.
    """

    model: str
    objective: str
    records: int
    records_held_out: int
    records_sha256: str
    steps: int
    tokens: int
    loss_start: float
    loss_final: float
    loss_floor: float
    optimality_gap: float
    optimality_gap_relative: float | None
    loss_training: float
    rejected_nll_base: float | None
    rejected_nll_final: float | None
    drift: dict[str, dict[str, float]]
    seconds: float
    tokens_per_second: float
    peak_rss_bytes: int
    compute: str
    device: str
    parameters: dict[str, int]
    data: dict[str, int]
    versions: dict[str, str]
    config: dict[str, Any]
    guard: dict[str, Any] | None = None
    adapter_scale: float = 1.0
    numerics: dict[str, Any] = field(default_factory=dict)


def write_report(folder: Path, report: RunReport, log: Sequence[Mapping[str, float]]) -> None:
    """Write the plot, the card, and last `run.json`: where it exists, the run is complete.

    Args:
        folder: the run folder.
        report: the result.
        log: the training log, one entry a step.
    """
    values = {"format": RUN_FORMAT} | asdict(report)
    name, records = folder.resolve().name, counted(report.records, "record")
    title = f"{name}: {report.objective} on {report.model}, {records}\n{_verdict(report, '', '')}"
    plot_losses(folder / "loss.png", values, log, title)
    write_text(folder / "README.md", run_card(values))
    write_json(folder / "run.json", values)


def make_report(
    trainer: BuleyeanTrainer,
    dataset: Dataset,
    settings: Mapping[str, Any],
    before: Mapping[str, float],
    after: Mapping[str, float],
    drift: Drifts,
) -> RunReport:
    """The result of a run.

    Args:
        trainer: after training.
        dataset: what it trained on.
        settings: of `settings.json`.
        before: loss, floor, and nats of rejected answers before training.
        after: the same after it.
        drift: of each kind of text.

    Raises:
        TrainingError: a figure is not a number: the model is ruined.
    """
    figures = {
        **after,
        **{f"{name} of {TITLES[kind]}": v for kind in drift for name, v in drift[kind]._asdict().items()},
    }
    if wrong := [name for name, value in figures.items() if not math.isfinite(value)]:
        raise TrainingError(f"the trained model's {' and '.join(wrong)} are not numbers: lower the learning rate")
    log = [entry for entry in trainer.state.log_history if "floor" in entry]
    tokens, training_seconds = (sum(entry[key] for entry in log) for key in ("tokens", "seconds"))
    tail = log[-max(1, len(log) // 10) :]
    gap, gap_before = after["loss"] - after["floor"], before["loss"] - before["floor"]
    model, parameters = trainer.language_model, {"base": 0, "adapter": 0}
    for parameter in model.module.parameters():
        parameters["adapter" if parameter.requires_grad else "base"] += parameter.numel()
    return RunReport(
        model=settings["model"],
        objective=trainer.args.objective,
        records=len(dataset.training),
        records_held_out=len(dataset.held_out),
        records_sha256=settings["records_sha256"],
        steps=trainer.state.global_step,
        tokens=int(tokens),
        loss_start=before["loss"],
        loss_final=after["loss"],
        loss_floor=after["floor"],
        optimality_gap=gap,
        optimality_gap_relative=gap / gap_before if gap_before > 0 else None,
        loss_training=sum(entry["loss"] for entry in tail) / len(tail),
        rejected_nll_base=before.get("rejected_nll"),
        rejected_nll_final=after.get("rejected_nll"),
        drift=as_json(drift),
        seconds=training_seconds,
        tokens_per_second=tokens / training_seconds,
        peak_rss_bytes=peak_rss_bytes(),
        compute=model.describe().removeprefix("compute: "),
        numerics=model.training_numerics | trainer.args.processes.describe(),
        device=_device_name(model.device),
        parameters=parameters,
        data=dataset.counts,
        versions=library_versions(),
        config=settings["config"] | {name: trainer.args.settings()[name] for name in DECIDED},
    )


def result_lines(report: RunReport) -> str:
    """The result of a run, for the terminal; the last line is the verdict."""
    base, final = report.rejected_nll_base, report.rejected_nll_final
    lines = [
        f"loss {report.loss_start:.4f} -> {report.loss_final:.4f}, floor {report.loss_floor:.4f}, "
        f"optimality gap {report.optimality_gap:.4f} nats",
    ]
    if base is not None and final is not None:
        lines.append(f"rejected answers {base:.3f} -> {final:.3f} nats per token")
    lines += [f"{TITLES[kind]}: {describe_drift(drift)}" for kind, drift in as_drifts(report.drift).items()]
    return "\n".join([*lines, _verdict(report, "[yellow]", "[/]")])


def _verdict(report: RunReport, warn: str, end: str) -> str:
    """What training has done to the rejected answers and to other text, in words; a warning between two marks."""
    base, final = report.rejected_nll_base, report.rejected_nll_final
    if base is None or final is None:
        learnt = "trained"
    elif final <= base:
        learnt = f"{warn}trained, and the rejected answers did not become less likely{end}"
    else:
        learnt = f"trained: the rejected answers are now {_factor(final - base)} less likely per token"
    kl = largest_kl(as_drifts(report.drift))
    return f"{learnt}; other text {_drift_in_words(kl)} (KL {kl:.3f})"


def _factor(nats: float) -> str:
    """A ratio of probabilities, as people say it."""
    ratio = math.exp(min(nats, 20.0))
    if ratio < 1.095:
        return f"{ratio - 1:.1%}"
    return f"{ratio:.1f} times" if ratio < 9.95 else f"{ratio:,.0f} times"


def _drift_in_words(kl: float) -> str:
    """Of KL on plain text, nats per token."""
    return "unchanged" if kl < UNCHANGED_KL else "little changed" if kl < LITTLE_KL else "changed"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {counted(torch.get_num_threads(), 'thread')}"
