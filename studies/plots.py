"""The plots of the studies, drawn from their tables.

    python studies/plots.py

Those that the documentation shows are in `docs/images`, the others beside their table.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from harness import Row, Summary

ROOT = Path(__file__).resolve().parents[1]
RESULTS, IMAGES = ROOT / "studies/results", ROOT / "docs/images"
GOAL, CLOSE = 0.02, 0.1  # nats per token of drift: the goal, and how far the left half reaches
BOLD = {"complement alpha0.9": "black", "complement batch2-alpha0.9": "magenta"}
DRIFT = "drift of neutral text, nats per token"
LOOPS = "share of answers that loop, unseen prompts"


def plot_loops(folder: Path, path: Path) -> None:
    """Loops against drift, a line for each method over its learning rates; on the left those that hardly drift."""
    summary = Summary(folder)
    figure = Figure(figsize=(11, 5), dpi=110, layout="constrained")
    close, all_of_it = figure.subplots(1, 2, sharey=True)
    methods = defaultdict(list)
    for row in sorted(summary.runs.values(), key=lambda row: row["learning_rate"]):
        methods[" ".join(filter(None, (row["method"], row.get("label"))))].append(row)
    for axes in (close, all_of_it):
        axes.set_prop_cycle(color=colormaps["tab20"].colors)  # type: ignore[attr-defined]
        axes.scatter([0], [summary.rows["base"]["loop_rate"]], marker="*", s=160, color="0.2", label="base", zorder=3)
        for label, rows in sorted(methods.items()):
            width, size = (3.0, 9.0) if label in BOLD else (1.2, 6.0)
            axes.plot(*_points(rows), "o-", label=label, color=BOLD.get(label), linewidth=width, markersize=size)
        _draw_goal(axes, summary)
    for row in summary.runs.values():
        if row["neutral_drift"] < CLOSE:
            _annotate(close, row, "learning_rate")
    close.set_xlim(-CLOSE / 10, CLOSE)
    close.set_ylabel(LOOPS)
    all_of_it.set_xscale("symlog", linthresh=CLOSE)
    all_of_it.set_xlim(left=-CLOSE / 10)
    all_of_it.legend(frameon=False, fontsize=7)
    figure.supxlabel(f"{DRIFT}; beside the points their learning rates", fontsize="medium")
    figure.savefig(path)


def plot_strength(folder: Path, path: Path) -> None:
    """Loops against drift, a line for each adapter over the strengths it was applied at."""
    summary = Summary(folder)
    figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
    axes = figure.subplots()
    adapters = defaultdict(list)
    for name, row in summary.runs.items():
        adapters[name.rsplit("-x", 1)[0]].append(row)
    axes.set_prop_cycle(color=colormaps["tab10"].colors)  # type: ignore[attr-defined]
    for label, rows in sorted(adapters.items()):
        rows.sort(key=lambda row: row["strength"])
        axes.plot(*_points(rows), "o-", label=label)
        for row in rows:
            _annotate(axes, row, "strength")
    _draw_goal(axes, summary)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"{DRIFT}; beside the points the strength")
    axes.set_ylabel(LOOPS)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def plot_drift(folder: Path, path: Path) -> None:
    """Loops against KL, a line for each adapter: as it was trained, and scaled to the goal."""
    summary = Summary(folder)
    texts = [column for column in summary.columns if column.startswith("kl_")]
    figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=colormaps["tab10"].colors)  # type: ignore[attr-defined]
    base = summary.rows["base"]["loop_rate"]
    axes.scatter([0], [base], marker="*", s=160, color="0.2", label="base", zorder=3)
    for name, row in summary.runs.items():
        if texts[0] in row and "scale" not in row:
            scaled = summary.rows.get(f"{name} at KL {GOAL:g}")
            points = [(max(row[text] for text in texts), row["loop_rate"])]
            points += [(GOAL, scaled["loop_rate"])] if scaled else []
            axes.plot(*zip(*points, strict=True), "o-", label=name.replace("-seed42", ""))
    axes.axvline(GOAL, color="0.6", linestyle=":")
    axes.axhline(base / 10, color="0.6", linestyle=":")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=-0.001)
    axes.set_xlabel("KL(base, trained), nats per token, on the text that moved farther")
    axes.set_ylabel(LOOPS)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _points(rows: list[Row]) -> tuple[list[float], list[float]]:
    return [row["neutral_drift"] for row in rows], [row["loop_rate"] for row in rows]


def _draw_goal(axes: Any, summary: Summary) -> None:
    """A fifth of the base's loops within `GOAL` nats."""
    axes.axvline(GOAL, color="0.6", linestyle=":")
    axes.axhline(summary.rows["base"]["loop_rate"] / 5, color="0.6", linestyle=":")


def _annotate(axes: Any, row: Row, column: str) -> None:
    point = row["neutral_drift"], row["loop_rate"]
    axes.annotate(f"{row[column]:g}", point, textcoords="offset points", xytext=(5, 5), fontsize=7)


def main() -> None:
    """Draw all of them."""
    plot_loops(RESULTS / "own_loops", IMAGES / "own-loops.png")
    plot_strength(RESULTS / "strength", IMAGES / "strength.png")
    plot_drift(RESULTS / "drift", IMAGES / "drift.png")
    for study in ("own_loops_gpu", "long_training"):
        plot_loops(RESULTS / study, RESULTS / study / "plot.png")


if __name__ == "__main__":
    main()
