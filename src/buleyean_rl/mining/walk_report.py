"""Table and plot of a walk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from rich.table import Table

from buleyean_rl.evaluation.drift import BUNDLED, OWN, TITLES, Drifts, as_drifts, as_json, largest_kl
from buleyean_rl.evaluation.labels import SHARE, format_figure
from buleyean_rl.evaluation.statistics import Interval, wilson
from buleyean_rl.system.files import atomic_write
from buleyean_rl.system.wording import counted


@dataclass(frozen=True)
class Round:
    """One round of a walk, measured on held-out prompts.

    Args:
        round: 0 is the base model.
        loop_rate: share of greedy answers that loop.
        rejection_rate: share of them that any judge rejects.
        answers: number of them.
        records: number trained on, of this round and earlier ones.
        rejected: number of rejected answers of the previous round's model, mined in this round.
        seconds: spent on the round, over all processes.
        run: the run folder, relative to the walk's.
        drift: from the base, of each kind of text.
    """

    round: int
    loop_rate: float
    rejection_rate: float
    answers: int
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
    _draw_rate(left, rounds, "loop_rate", "o-C0", "loop")
    if any(r.rejection_rate != r.loop_rate for r in rounds):
        _draw_rate(left, rounds, "rejection_rate", "s--C1", "rejected", 0.04)
    left.yaxis.set_major_formatter(PercentFormatter(1.0))
    left.set_title(f"answers to {counted(rounds[0].answers, 'unseen prompt')}, with 95% intervals")
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


def _draw_rate(axes: Any, rounds: Sequence[Round], name: str, style: str, label: str, shift: float = 0.0) -> None:
    """A share of the answers over the rounds, with Wilson's intervals, shifted so that two are seen."""
    shares = [getattr(r, name) for r in rounds]
    intervals = [_interval(r, name) for r in rounds]
    # of a share of 0 or 1 an interval may end beside it, by a rounding
    below = [max(0.0, share - interval.low) for share, interval in zip(shares, intervals, strict=True)]
    above = [max(0.0, interval.high - share) for share, interval in zip(shares, intervals, strict=True)]
    axes.errorbar([r.round + shift for r in rounds], shares, yerr=[below, above], fmt=style, capsize=4, label=label)


def _interval(r: Round, name: str) -> Interval:
    return wilson(getattr(r, name) * r.answers, r.answers) or Interval(0.0, 1.0)


def rounds_table(rounds: Sequence[Round]) -> Table:
    """A table of the rounds, for a terminal of 80 columns."""
    table = Table(title="greedy answers to unseen prompts, with 95% intervals; KL from the base", box=None)
    for column in ("round", "loop", "rejected", "KL", "records", "seconds"):
        table.add_column(column, justify="right")
    for r in rounds:
        rates = (
            format_figure(getattr(r, name), _interval(r, name), SHARE).replace("[", "\\[")
            for name in ("loop_rate", "rejection_rate")
        )
        table.add_row(str(r.round), *rates, f"{largest_kl(r.drift):.3f}", str(r.records), f"{r.seconds:,.0f}")
    return table
