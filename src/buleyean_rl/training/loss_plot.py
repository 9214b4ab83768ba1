"""`loss.png`, a run in one look: the loss and its floor; below, the drift at the guard's looks and at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from buleyean_rl.evaluation.drift import BUNDLED, OWN, TITLES

KINDS = {OWN: ("o", "C2"), BUNDLED: ("s", "C4")}  # form and colour


def plot_losses(path: Path, report: Mapping[str, Any], log: Sequence[Mapping[str, float]], title: str) -> None:
    """Draw a run.

    Args:
        path: of the PNG.
        report: the result, as in `run.json`.
        log: the training log, one entry a step.
        title: what the picture is of, a line or two.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 6), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    _draw_loss(above, report, [entry for entry in log if "floor" in entry])
    _draw_drift(below, report)
    heading = figure.suptitle("", fontsize=10)
    heading.set(parse_math=False, text=title.encode(errors="replace").decode())
    below.set_xlabel("step")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (above, below):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(framealpha=0.85, edgecolor="none", fontsize=8)
    figure.savefig(path)


def _draw_loss(axes: Any, report: Mapping[str, Any], entries: Sequence[Mapping[str, float]]) -> None:
    """The loss of each step, its running mean and its floor; what was measured before and after on the same records."""
    steps = [entry["step"] for entry in entries]
    loss, floor = (_smooth([entry[key] for entry in entries]) for key in ("loss", "floor"))
    axes.plot(steps, [entry["loss"] for entry in entries], color="C0", alpha=0.25, linewidth=0.8)
    axes.plot(steps, loss, color="C0", label="loss on the records of a step, smoothed")
    axes.plot(steps, floor, color="0.3", linestyle="--", label="floor: the least there can be")
    axes.fill_between(steps, floor, loss, color="C0", alpha=0.12)
    which = "held-out records" if report["records_held_out"] else "some of the records"
    measured = f"{which}, before and after: {report['loss_start']:.3f} to {report['loss_final']:.3f}"
    axes.plot(
        [0, report["steps"]],
        [report["loss_start"], report["loss_final"]],
        "D:",
        color="C1",
        markersize=5,
        label=measured,
    )
    axes.set_ylabel("loss, nats per token")


def _draw_drift(axes: Any, report: Mapping[str, Any]) -> None:
    """KL from the base at each look of the guard and at the end, with the share of answers that loop."""
    guard = report["guard"] or {"checks": [], "stop_reason": None, "restored_step": None, "limits": {}}
    checks = [check for check in guard["checks"] if check["texts"]]
    for kind, (form, color) in KINDS.items():
        looks = [(check["step"], check["texts"][kind]["kl"]) for check in checks if kind in check["texts"]]
        axes.plot(
            [0, *(step for step, _ in looks)], [0.0, *(kl for _, kl in looks)], f"{form}-", color=color, markersize=4
        )
        if kind in report["drift"]:
            at, kl = guard["restored_step"] or report["steps"], report["drift"][kind]["kl"]
            label = f"{TITLES[kind]}: {kl:.3f} at the end"
            axes.plot([at], [kl], form, color=color, markersize=8, markerfacecolor="none", label=label)
    if limit := guard["limits"].get("kl"):
        axes.axhline(limit, color="C3", linestyle=":", label=f"the guard's limit, {limit:g}")
    for check in checks:
        if check["loop_rate"] is not None:
            top = max(drift["kl"] for drift in check["texts"].values())
            text = f"{check['loop_rate']:.0%} loop"
            axes.annotate(text, (check["step"], top), (0, 5), textcoords="offset points", ha="center", fontsize=7)
    if guard["stop_reason"]:
        axes.axvline(guard["checks"][-1]["step"], color="C3", linewidth=1, label="the guard ended the run")
    axes.set_ylabel("KL from the base,\nnats per token")


def _smooth(values: Sequence[float]) -> list[float]:
    """A running mean over a twentieth of the values."""
    width = max(1, len(values) // 20)
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(width, i + 1) for i in range(len(values))]
