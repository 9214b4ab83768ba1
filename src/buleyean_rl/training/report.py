"""What a run leaves for people and programs to read: `run.json`, `loss.png` and, from `cards`, the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from buleyean_rl.hub.cards import run_card
from buleyean_rl.system.files import write_json
from buleyean_rl.system.host import library_versions, peak_rss_bytes
from buleyean_rl.training.config import BuleyeanConfig
from buleyean_rl.training.trainer import BuleyeanTrainer


@dataclass(frozen=True)
class RunReport:
    """The result of a training run. Losses are nats per node, measured with dropout off.

    Args:
        model: name of the base model.
        objective: name of the objective.
        records: how many were trained on.
        records_held_out: how many were kept from training.
        records_sha256: of the records file.
        steps: optimiser steps.
        tokens: tokens that went through the model, shared prompts counted once.
        loss_start: loss on the held-out records before training; where none are held out, on records trained on.
        loss_final: the same after.
        loss_floor: the least any model could have there.
        optimality_gap: loss_final - loss_floor.
        optimality_gap_relative: that over loss_start - loss_floor.
        loss_training: mean training loss of the last tenth of the steps.
        rejected_nll_base: nats per rejected token of the same records, before; unlikelier is higher.
        rejected_nll_final: after.
        neutral_nll_base: nats per token of bundled plain texts, before.
        neutral_nll_final: after; the difference is what training cost elsewhere.
        seconds: of training.
        tokens_per_second: tokens / seconds.
        peak_rss_bytes: most memory the process ever held.
        device: what it ran on.
        parameters: of the base model, and of the adapter.
        data: what was dropped or cut on the way in.
        versions: of the libraries that matter.
        config: every setting that was ours to choose.
        guard: what the guard saw, see `guard.Guard.report`; None if there was none.
        adapter_scale: factor of the trained adapter. The losses and the gap are from before it was applied, the nats of
            rejected and neutral text from after.
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
    rejected_nll_base: float
    rejected_nll_final: float
    neutral_nll_base: float
    neutral_nll_final: float
    seconds: float
    tokens_per_second: float
    peak_rss_bytes: int
    device: str
    parameters: dict[str, int]
    data: dict[str, int]
    versions: dict[str, str]
    config: dict[str, Any]
    guard: dict[str, Any] | None = None
    adapter_scale: float = 1.0


def write_report(folder: Path, report: RunReport, log: Sequence[Mapping[str, float]]) -> None:
    """Write the plot, the card, and last `run.json`: where it stands, the run is whole.

    Args:
        folder: the run folder.
        report: the result.
        log: the training log, one entry a step.
    """
    plot_losses(folder / "loss.png", report, log)
    (folder / "README.md").write_text(run_card(asdict(report)), encoding="utf-8")
    write_json(folder / "run.json", asdict(report))


def plot_losses(path: Path, report: RunReport, log: Sequence[Mapping[str, float]]) -> None:
    """Draw the loss above its floor, and its two parts, over the steps.

    Args:
        path: of the PNG.
        report: the result.
        log: the training log.
    """
    from matplotlib.figure import Figure

    entries = [entry for entry in log if "floor" in entry]
    steps = [entry["step"] for entry in entries]
    curves = {key: _smooth([entry[key] for entry in entries]) for key in ("loss", "floor", "gap", "kl", "contrast")}
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(steps, curves["loss"], label="loss", color="C0")
    left.plot(steps, curves["floor"], label="floor: the least possible", color="0.3", linestyle="--")
    left.fill_between(steps, curves["floor"], curves["loss"], color="C0", alpha=0.15, label="optimality gap")
    left.set_title(f"{report.objective}: optimality gap {report.optimality_gap:.4f} nats")
    right.plot(steps, curves["kl"], label="KL(P || model)", color="C1")
    right.plot(steps, curves["contrast"], label="contrast", color="C2")
    right.plot(steps, curves["gap"], label="gap", color="C0")
    right.set_title("its parts")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.set_ylabel("nats per node")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path)


def _smooth(values: Sequence[float]) -> list[float]:
    """A running mean over about a fiftieth of the values, so that a long run can be read."""
    width = max(1, len(values) // 50)
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(width, i + 1) for i in range(len(values))]


def _report(
    settings: dict[str, Any],
    config: BuleyeanConfig,
    model: Any,
    trainer: BuleyeanTrainer,
    data: dict[str, int],
    training: int,
    held_out: int,
    start: dict[str, float],
    final: dict[str, float],
) -> RunReport:
    log = [entry for entry in trainer.state.log_history if "floor" in entry]
    tokens, training_seconds = (sum(entry[key] for entry in log) for key in ("tokens", "seconds"))
    tail = log[-max(1, len(log) // 10) :]
    gap, gap_start = final["loss"] - final["floor"], start["loss"] - start["floor"]
    parameters = {"base": 0, "adapter": 0}
    for parameter in model.parameters():
        parameters["adapter" if parameter.requires_grad else "base"] += parameter.numel()
    return RunReport(
        model=settings["model"],
        objective=config.objective,
        records=training,
        records_held_out=held_out,
        records_sha256=settings["records_sha256"],
        steps=trainer.state.global_step,
        tokens=int(tokens),
        loss_start=start["loss"],
        loss_final=final["loss"],
        loss_floor=final["floor"],
        optimality_gap=gap,
        optimality_gap_relative=gap / gap_start if gap_start > 0 else None,
        loss_training=sum(entry["loss"] for entry in tail) / len(tail),
        rejected_nll_base=start["rejected_nll"],
        rejected_nll_final=final["rejected_nll"],
        neutral_nll_base=start["neutral_nll"],
        neutral_nll_final=final["neutral_nll"],
        seconds=training_seconds,
        tokens_per_second=tokens / training_seconds,
        peak_rss_bytes=peak_rss_bytes(),
        device=_device_name(config),
        parameters=parameters,
        data=data,
        versions=library_versions(),
        config=settings["config"],
    )


def _device_name(config: BuleyeanConfig) -> str:
    if config.device.type == "cuda":
        return torch.cuda.get_device_name(config.device)
    return f"{config.device.type}, {torch.get_num_threads()} threads"


def _data_line(data: dict[str, int], training: int, held_out: int) -> str:
    parts = [f"{training:,} record{'s' * (training != 1)} to train on, {held_out:,} held out"]
    if data["dropped"]:
        parts.append(f"{data['dropped']:,} dropped: no room for a response, or nothing in it")
    if data["truncated_responses"]:
        parts.append(f"{data['truncated_responses']:,} responses cut")
    return "; ".join(parts)


def _result_lines(report: RunReport) -> str:
    lines = [
        f"loss {report.loss_start:.4f} -> {report.loss_final:.4f}, floor {report.loss_floor:.4f}, "
        f"optimality gap {report.optimality_gap:.4f} nats",
        f"rejected answers {report.rejected_nll_base:.3f} -> {report.rejected_nll_final:.3f} nats per token, "
        f"neutral text {report.neutral_nll_base:.3f} -> {report.neutral_nll_final:.3f}",
    ]
    if report.rejected_nll_final <= report.rejected_nll_base:
        lines.append("[yellow]warning:[/] the rejected answers did not become less likely")
    return "\n".join(lines)
