"""Human counts: do graded rejection counts teach a ranking? True counts against shuffled ones and against all ones.

    python studies/human_counts.py --records R.jsonl --neutral N.jsonl -o FOLDER

Every run trains on the same answers of the same prompts; only the counts differ. Shuffled: a record's counts change
places. Ones: every answer that was rejected at all was rejected once in one round. Merged, for the objectives that go
by tokens: the true counts, but a token that was rejected somewhere in an answer is rejected as far into every answer to
the prompt, which is what is left of them without a trie. Tested on prompts that the run does not train on: Kendall's
tau between the implied ranking, log pi / pi_base, and the true counts. With `--parts` every run is made so many times,
each time with other prompts to test on. Stopped, the same command goes on.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import harness
from buleyean_rl.data.importers.preferences import Preference, read_preferences
from buleyean_rl.data.trie import Boundary
from buleyean_rl.evaluation.neutral_text import mean_nll
from buleyean_rl.evaluation.scoring import PackedScorer
from buleyean_rl.evaluation.statistics import Figure, Interval, kendall_tau
from buleyean_rl.models.source import BUNDLED
from buleyean_rl.models.weights import load_tokenizer
from harness import Method, keep
from ultrafeedback import boundaries_of, records_of

NEUTRAL = 64
SEEDS = (0, 1, 2)
PART, SEED = "-part", "-seed"


def true(item: Preference, draw: random.Random) -> Preference:  # noqa: ARG001 - one signature for all
    """The counts as they are."""
    return item


def shuffled(item: Preference, draw: random.Random) -> Preference:
    """The counts of a record at other answers of it."""
    return replace(item, rejections=tuple(draw.sample(item.rejections, len(item.rejections))))


def ones(item: Preference, draw: random.Random) -> Preference:  # noqa: ARG001
    """Rejected or not, and no more."""
    return replace(item, rejections=tuple(min(v, 1) for v in item.rejections), rounds=1)


def by_position(boundary: Boundary) -> Boundary:
    """Every node has the rejections of all nodes that are as far into an answer."""
    depths = [0]
    for parent, piece in zip(boundary.parents, boundary.run_slices(), strict=True):
        depths += range(depths[parent] + 1, depths[parent] + 1 + piece.stop - piece.start)
    merged: dict[int, Counter[int]] = defaultdict(Counter)
    for node, token, v in boundary.rejections:
        merged[depths[node]][token] += v
    rejections = [(node, token, v) for node, depth in enumerate(depths) for token, v in sorted(merged[depth].items())]
    return replace(boundary, rejections=rejections)


class View(NamedTuple):
    """One way to see the counts.

    Args:
        name: of it.
        counts: a record's, as they are trained on.
        boundary: its tokens' counts after that.
    """

    name: str
    counts: Callable[[Preference, random.Random], Preference] = true
    boundary: Callable[[Boundary], Boundary] = replace


OF_ANSWERS = (View("true"), View("ones", ones), View("shuffled", shuffled))
OF_TOKENS = (View("true"), View("merged", boundary=by_position), View("ones", ones))
METHODS = (
    (Method("listwise", 1e-4, 2), OF_ANSWERS),
    (Method("ratio", 2e-4, 2, label="alpha0.9", settings=(("alpha", 0.9),)), OF_TOKENS),
    (Method("listwise", 1e-4, 2, label="tau3", settings=(("tau", 3.0),)), OF_ANSWERS),
    (Method("complement", 2e-4, 2), OF_TOKENS),
)


def tau(model: Any, tokenizer: Any, items: Sequence[Preference], max_length: int) -> Figure:
    """Kendall's tau of every record whose counts differ."""
    scores = PackedScorer(model.eval(), tokenizer, max_length).answers([(item.prompt, item.answers) for item in items])
    found = []
    for item, own in zip(items, scores, strict=True):
        if all(score.tokens for score in own):
            ratios = [(score.reference_nats or 0.0) - score.nats for score in own]
            value = kendall_tau(ratios, [-v for v in item.rejections])
            found.append((0.0, 0.0) if value is None else (value, 1.0))
    return Figure(found)


def main() -> None:
    """Run what is not done yet, and print the table."""
    parser = harness.arguments_of(__doc__, "records")
    parser.add_argument("--held-out", type=int, default=100, help="prompts to test on")
    parser.add_argument("--parts", type=int, default=1, help="times to hold out others")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a prompt and an answer")
    arguments = parser.parse_args()
    folder: Path = arguments.output
    if not arguments.table:
        harness.keep_to(arguments.precision, folder)
        tokenizer = load_tokenizer(BUNDLED)
        items = list(read_preferences(str(arguments.records)).items)
        random.Random(0).shuffle(items)
        held_out, length = arguments.held_out, arguments.max_length
        neutral = harness.neutral_texts(arguments.neutral, tokenizer, NEUTRAL)
        for seed, (method, views), part in itertools.product(SEEDS, METHODS, range(arguments.parts)):
            start, stop = part * held_out, (part + 1) * held_out
            test, training = items[start:stop], items[:start] + items[stop:]
            seeded = replace(method, seed=seed, precision=arguments.precision)
            for view in views:

                def run(method: Method = seeded, view: View = view, test: Any = test, training: Any = training) -> Any:
                    draw = random.Random(method.seed)
                    records = records_of([view.counts(item, draw) for item in training], with_chosen=True)
                    boundaries = boundaries_of(records, tokenizer, 2, length)
                    model, log = harness.train(method, [view.boundary(boundary) for boundary in boundaries])
                    figure = tau(model, tokenizer, test, length)
                    with model.disable_adapter():
                        before = mean_nll(model, neutral)
                    return log | {
                        "kendall_tau": figure.value,
                        "items": figure.items.tolist(),
                        "neutral_drift": mean_nll(model, neutral) - before,
                    }

                keep(folder, f"{view.name}-{seeded.run}" + (f"{PART}{part}" if part else ""), run)
    print(table(folder))


def pooled(folder: Path) -> dict[str, dict[str, Any]]:
    """The runs that are done, those that differ in what they held out as one; and several seeds', a prompt's mean."""
    runs: dict[str, dict[str, Any]] = {}
    for name, run in harness.read_runs(folder).items():
        whole = runs.setdefault(name.partition(PART)[0], {"items": [], "drifts": []})
        whole["items"] += run["items"]
        whole["drifts"].append(run["neutral_drift"])
    alike: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for name, run in runs.items():
        alike[name.partition(SEED)[0]].append(run)
    for name, seeds in alike.items():
        if len(seeds) > 1 and len({len(run["items"]) for run in seeds}) == 1:
            items = np.mean([run["items"] for run in seeds], axis=0).tolist()
            drifts = [drift for run in seeds for drift in run["drifts"]]
            runs[f"{name}, {len(seeds)} seeds"] = {"items": items, "drifts": drifts}
    return runs


def table(folder: Path) -> str:
    """The figures of the runs that are done, as Markdown; each beside the same run on the true counts."""
    columns = "run", "Kendall's tau, held-out prompts", "true counts have more by", "neutral drift, nats/token"
    runs, rows = pooled(folder), []
    for name, run in runs.items():
        counts, _, method = name.partition("-")
        figure, best = Figure(run["items"]), Figure(runs.get(f"true-{method}", run)["items"])
        alone = counts == "true" or len(figure.items) != len(best.items)
        lead = "" if alone else written(best.value, figure.value, figure.difference(best))
        rows.append(
            (name, written(figure.value, 0.0, figure.interval()), lead, f"{statistics.fmean(run['drifts']):+.3f}")
        )
    return harness.markdown(columns, rows)


def written(value: float | None, less: float | None, interval: Interval | None) -> str:
    """A difference and its interval."""
    assert value is not None
    assert less is not None
    assert interval is not None
    return f"{value - less:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})"


if __name__ == "__main__":
    main()
