"""Table and plot of a walk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from rich.table import Table

from buleyean_rl.evaluation.drift import BUNDLED, OWN, TITLES, Drifts, as_drifts, as_json
from buleyean_rl.system.files import atomic_write

FIGURES = ("kl", "entropy", "nll")


@dataclass(frozen=True)
class Round:
    """One round of a walk, measured on held-out prompts.

    Args:
        round: 0 is the base model.
        loop_rate: share of greedy answers that loop.
        rejection_rate: share of them that any judge rejects.
        records: number trained on, of this round and earlier ones.
        rejected: number of rejected answers of the previous round's model, mined in this round.
        seconds: spent on the round, over all processes.
        run: the run folder, relative to the walk's.
        drift: from the base, of each kind of text.
    """

    round: int
    loop_rate: float
    rejection_rate: float
    records: int
    rejected: int
    seconds: float
    run: str | None
    drift: Drifts

    def as_json(self) -> dict[str, Any]:
        """For `walk.json`."""
        return asdict(self) | {"drift": as_json(self.drift)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Round:
        """What `as_json` gave.

        Raises:
            TypeError: it is something else.
        """
        return cls(**{**value, "drift": as_drifts(value.get("drift", {}))})


def plot_walk(path: Path, rounds: Sequence[Round], max_drift: float) -> None:
    """Plot rates and drift over the rounds, with the limit of the drift.

    Args:
        path: of the PNG.
        rounds: from the base on.
        max_drift: KL, in nats per token.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    numbers = [r.round for r in rounds]
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(numbers, [r.loop_rate for r in rounds], "o-", label="loop", color="C0")
    if any(r.rejection_rate != r.loop_rate for r in rounds):
        left.plot(numbers, [r.rejection_rate for r in rounds], "s--", label="rejected", color="C1")
    left.yaxis.set_major_formatter(PercentFormatter(1.0))
    left.set_title("answers to unseen prompts")
    left.set_ylim(bottom=0)
    left.legend(frameon=False)
    right.axhline(0, color="0.3", linestyle="--")
    right.axhline(max_drift, color="C3", linestyle=":", label="ends the walk")
    for kind, style in ((OWN, "o-C2"), (BUNDLED, "s--C4")):
        right.plot(numbers, [r.drift[kind].kl for r in rounds], style, label=TITLES[kind])
    right.set_title("KL(base || trained), nats per token")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    picture = BytesIO()
    figure.savefig(picture, format="png")
    with atomic_write(path) as file:
        file.write(picture.getvalue())


def rounds_table(rounds: Sequence[Round]) -> Table:
    """A table of the rounds, for the terminal."""
    table = Table(title="greedy answers to unseen prompts; own passages / bundled texts, nats per token")
    columns = ("round", "loop", "rejected", "KL", "entropy", "NLL", "mined", "records", "seconds")
    for column in columns:
        table.add_column(column, justify="right")
    for r in rounds:
        table.add_row(
            str(r.round),
            f"{r.loop_rate:.1%}",
            f"{r.rejection_rate:.1%}",
            *(" / ".join(f"{getattr(r.drift[kind], name):.3f}" for kind in (OWN, BUNDLED)) for name in FIGURES),
            str(r.rejected),
            str(r.records),
            f"{r.seconds:,.0f}",
        )
    return table
