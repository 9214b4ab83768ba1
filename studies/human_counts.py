"""Human counts: do graded rejection counts teach a ranking? True counts against shuffled ones and against all ones.

    python studies/human_counts.py --records R.jsonl --neutral N.jsonl -o FOLDER

Every run trains on the same answers of the same prompts; only the counts differ. Shuffled: a record's counts change
places. Ones: every answer that was rejected at all was rejected once in one round. Tested on prompts that nobody trains
on: Kendall's tau between the implied ranking, log pi / pi_base, and the true counts. Stopped, the same command goes on.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
from buleyean_rl.evaluate import mean_nll
from buleyean_rl.evaluate.scoring import PackedScorer
from buleyean_rl.evaluate.statistics import Figure, Interval, kendall_tau
from buleyean_rl.importers.preferences import Preference, read_preferences
from buleyean_rl.models import BUNDLED, load_tokenizer
from harness import Method, keep
from ultrafeedback import boundaries_of, records_of

MAX_LENGTH, NEUTRAL, HELD_OUT = 512, 64, 100
SEEDS = (0, 1, 2)


def true(item: Preference, draw: random.Random) -> Preference:  # noqa: ARG001 - one signature for all
    """The counts as they are."""
    return item


def shuffled(item: Preference, draw: random.Random) -> Preference:
    """The counts of a record at other answers of it."""
    return replace(item, rejections=tuple(draw.sample(item.rejections, len(item.rejections))))


def ones(item: Preference, draw: random.Random) -> Preference:  # noqa: ARG001
    """Rejected or not, and no more."""
    return replace(item, rejections=tuple(min(v, 1) for v in item.rejections), rounds=1)


COUNTS: tuple[Callable[[Preference, random.Random], Preference], ...] = (true, shuffled, ones)
METHODS = (Method("listwise", 1e-4, 2), Method("complement", 2e-4, 2))


def tau(model: Any, tokenizer: Any, items: Sequence[Preference]) -> Figure:
    """Kendall's tau of every record whose counts differ."""
    scores = PackedScorer(model, tokenizer, MAX_LENGTH).answers([(item.prompt, item.answers) for item in items])
    found = []
    for item, own in zip(items, scores, strict=True):
        if all(score.tokens for score in own):
            ratios = [(score.reference_nats or 0.0) - score.nats for score in own]
            value = kendall_tau(ratios, [-v for v in item.rejections])
            found.append((0.0, 0.0) if value is None else (value, 1.0))
    return Figure(found)


def main() -> None:
    """Run what is not done yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("records", "neutral"):
        parser.add_argument(f"--{name}", type=Path, required="--table" not in sys.argv)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="only show what there is")
    arguments = parser.parse_args()
    folder: Path = arguments.output
    if not arguments.table:
        tokenizer = load_tokenizer(BUNDLED)
        items = list(read_preferences(str(arguments.records)).items)
        random.Random(0).shuffle(items)
        test, training = items[:HELD_OUT], items[HELD_OUT:]
        neutral = harness.neutral_texts(arguments.neutral, tokenizer, NEUTRAL)
        for method in (replace(method, seed=seed) for seed in SEEDS for method in METHODS):
            for counts in COUNTS:

                def run(method: Method = method, counts: Any = counts) -> dict[str, Any]:
                    draw = random.Random(method.seed)
                    drawn = [counts(item, draw) for item in training]
                    records = records_of(drawn, with_chosen=True)
                    model, log = harness.train(method, boundaries_of(records, tokenizer, answers=2))
                    figure = tau(model, tokenizer, test)
                    with model.disable_adapter():
                        before = mean_nll(model, neutral)
                    return log | {
                        "kendall_tau": figure.value,
                        "items": figure.items.tolist(),
                        "neutral_drift": mean_nll(model, neutral) - before,
                    }

                keep(folder, f"{counts.__name__}-{method.run}", run)
    print(table(folder))


def table(folder: Path) -> str:
    """The figures of the runs that are done, as Markdown; each beside the same run on the true counts."""
    columns = "run", "Kendall's tau, held-out prompts", "true counts have more by", "neutral drift, nats/token"
    runs, rows = harness.read_runs(folder), []
    for name, run in runs.items():
        counts, _, method = name.partition("-")
        figure, best = Figure(run["items"]), Figure(runs.get(f"true-{method}", run)["items"])
        lead = "" if counts == "true" else written(best.value, figure.value, figure.difference(best))
        rows.append((name, written(figure.value, 0.0, figure.interval()), lead, f"{run['neutral_drift']:+.3f}"))
    return harness.markdown(columns, rows)


def written(value: float | None, less: float | None, interval: Interval | None) -> str:
    """A difference and its interval."""
    assert value is not None
    assert less is not None
    assert interval is not None
    return f"{value - less:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})"


if __name__ == "__main__":
    main()
