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
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

import harness
from buleyean_rl.data.importers.preferences import Preference, read_preferences
from buleyean_rl.data.trie import Boundary, Judgement
from buleyean_rl.evaluation.neutral_text import mean_nll
from buleyean_rl.evaluation.scoring import PackedScorer
from buleyean_rl.evaluation.statistics import Figure, kendall_tau
from buleyean_rl.models.model import Model
from buleyean_rl.models.source import BUNDLED
from buleyean_rl.models.weights import load_tokenizer
from harness import Method, Row, Summary
from ultrafeedback import boundaries_of, records_of

NEUTRAL = 64
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


def by_position(boundary: Boundary) -> Boundary:
    """Every node has the rejections of all nodes that are as far into an answer."""
    depths = [0]
    for parent, piece in zip(boundary.parents, boundary.run_slices(), strict=True):
        depths += range(depths[parent] + 1, depths[parent] + 1 + piece.stop - piece.start)
    merged: dict[int, dict[int, tuple[int, int, int]]] = defaultdict(dict)
    for node, token, rejected, judged, largest in boundary.judgements:
        v, n, rounds = merged[depths[node]].get(token, (0, 0, 0))
        merged[depths[node]][token] = v + rejected, n + judged, max(rounds, largest)
    judgements = [
        Judgement(node, token, *counts)
        for node, depth in enumerate(depths)
        for token, counts in sorted(merged[depth].items())
    ]
    return replace(boundary, judgements=judgements)


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


ANSWER_VIEWS = (View("true"), View("ones", ones), View("shuffled", shuffled))
TOKEN_VIEWS = (View("true"), View("merged", boundary=by_position), View("ones", ones))
METHODS = (
    (Method("listwise", 1e-4, 2), ANSWER_VIEWS),
    (Method("complement", 2e-4, 2, label="alpha0.9"), TOKEN_VIEWS),
    (Method("listwise", 1e-4, 2, label="tau3", settings=(("tau", 3.0),)), ANSWER_VIEWS),
)


def rank(model: Any, tokenizer: Any, items: Sequence[Preference], max_length: int) -> list[tuple[float, float]]:
    """Kendall's tau of every record, and 1; 0 and 0 where its counts do not differ."""
    scores = PackedScorer(Model.from_module(model.eval(), tokenizer), max_length).answers(
        [(item.prompt, item.answers) for item in items]
    )
    ranked = []
    for item, own in zip(items, scores, strict=True):
        if all(score.tokens for score in own):
            ratios = [(score.reference_nats or 0.0) - score.nats for score in own]
            value = kendall_tau(ratios, [-v for v in item.rejections])
            ranked.append((0.0, 0.0) if value is None else (value, 1.0))
    return ranked


def rank_columns(items: Sequence[Any]) -> Row:
    """Columns of Kendall's tau over some records."""
    figure = Figure(items)
    ranked = int(np.asarray(items)[:, 1].sum())
    return {"items": len(items), "ranked": ranked, **harness.with_interval("kendall_tau", figure)}


def main() -> None:
    """Run what is not done yet, and print the table."""
    parser = harness.study_parser(__doc__, "records")
    parser.add_argument("--held-out", type=int, default=100, help="prompts to test on")
    parser.add_argument("--parts", type=int, default=1, help="times to hold out others")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a prompt and an answer")
    arguments = parser.parse_args()
    summary = Summary(arguments.output)
    if not arguments.table:
        summary.require_precision(arguments.precision)
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
                name = f"{view.name}-{seeded.run}" + (f"-part{part}" if part else "")

                def run(
                    name: str = name,
                    method: Method = seeded,
                    view: View = view,
                    test: Any = test,
                    training: Any = training,
                ) -> Row:
                    draw = random.Random(method.seed)
                    records = records_of([view.counts(item, draw) for item in training], with_chosen=True)
                    boundaries = boundaries_of(records, tokenizer, 2, length)
                    model, columns = harness.train(method, [view.boundary(boundary) for boundary in boundaries])
                    ranked = rank(model, tokenizer, test, length)
                    summary.write_cache(name, {"items": ranked})
                    with model.disable_adapter():
                        before = mean_nll(Model.from_module(model), neutral)
                    drift = mean_nll(Model.from_module(model), neutral) - before
                    return {"counts": view.name} | columns | rank_columns(ranked) | {"neutral_drift": drift}

                summary.run(name, run)
        pool(summary)
    print(table(summary))


def pool(summary: Summary) -> None:
    """Write rows of parts and of seeds taken together, and what true counts have more, where the cache has the runs.

    Parts have other prompts, so their records are put together. Seeds have the same, so a record counts as its mean.
    """

    def together(name: str, members: Sequence[str], join: Callable[[list[Any]], list[Any]]) -> None:
        items = [summary.items(member) for member in members]
        if all(items) and (join is _concatenated or len({len(each) for each in items if each}) == 1):
            summary.write_cache(name, {"items": join(items)})
            drift = float(np.mean([summary.rows[member]["neutral_drift"] for member in members]))
            runs = sum(summary.rows[member].get("runs", 1) for member in members)
            columns = {key: summary.rows[members[0]][key] for key in ("counts", "method", "precision")}
            summary.add(name, columns | {"runs": runs} | rank_columns(join(items)) | {"neutral_drift": drift})

    wholes = list(summary.runs)
    for stem, parts in harness.alike(summary.runs, "-part[0-9]+").items():
        together(f"{stem} ({len(parts)} parts)", parts, _concatenated)
        wholes = [name for name in wholes if name not in parts] + [f"{stem} ({len(parts)} parts)"]
    for stem, seeds in harness.alike(wholes, "-seed[0-9]+").items():
        together(f"{stem} ({len(seeds)} seeds)", seeds, lambda items: np.mean(items, axis=0).tolist())
    for name in list(summary.rows):
        counts, _, run = name.partition("-")
        own, best = summary.items(name), summary.items(f"true-{run}")
        if counts != "true" and own and best and len(own) == len(best):
            summary.add(name, harness.with_difference("true_more", Figure(best), Figure(own)))


def _concatenated(items: list[Any]) -> list[Any]:
    return list(itertools.chain.from_iterable(items))


def table(summary: Summary) -> str:
    """The figures of the runs that are done, as Markdown; each beside the same run on the true counts."""
    columns = "run", "Kendall's tau, held-out prompts", "true counts have more by", "neutral drift, nats/token"
    names = "kendall_tau", "true_more", "neutral_drift"
    rows = [(run, *(harness.signed(row, name) for name in names)) for run, row in sorted(summary.rows.items())]
    return harness.markdown(columns, rows)


if __name__ == "__main__":
    main()
