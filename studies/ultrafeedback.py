"""UltraFeedback rejections: does learning from the rejected answers alone rank unseen answers, and at what damage?

    python studies/ultrafeedback.py --train T.jsonl --test E.jsonl --other O.jsonl --neutral N.jsonl -o FOLDER

Everybody trains on the same records for the same steps; `dpo` and `sft` see the chosen answers too, and `listwise`,
which ranks, a sample of the base's own to each prompt. Tested on held-out pairs of the same data and on those of
another: how often the better answer has the higher log pi / pi_base, summed and per token. The sum favours short
answers wherever all answers became less likely; the share of pairs in which it does is told too. Stopped, the same
command goes on; `--table` only shows what there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
from baselines import NEEDS_CHOSEN
from buleyean_rl.data.importers.preferences import Preference, read_preferences
from buleyean_rl.data.records import RejectionRecord, read_records, write_records
from buleyean_rl.data.trie import Boundary, build_boundaries
from buleyean_rl.evaluation.neutral_text import mean_nll
from buleyean_rl.evaluation.scoring import PackedScorer
from buleyean_rl.evaluation.statistics import preferred
from buleyean_rl.inference.transformers_engine import TransformersEngine
from buleyean_rl.models.model import Model
from buleyean_rl.models.source import BUNDLED
from buleyean_rl.models.weights import load_tokenizer
from buleyean_rl.training.own_samples import add_own_samples
from harness import Method, Row, Summary

MAX_LENGTH, NEUTRAL = 512, 64

METHODS = [
    Method("complement", 2e-4, 1, label="alpha0.9"),
    Method("complement", 2e-4, 1, label="alpha0.9", seed=43),
    Method("complement", 1e-4, 1, label="alpha0.9"),
    Method("complement", 5e-4, 1, label="alpha0.9"),
    Method("complement", 2e-4, 1, label="alpha0.9-tau3", settings=(("tau", 3.0),)),
    Method("complement", 1e-4, 1, label="tau0.1", settings=(("alpha", 0.7), ("tau", 0.1))),
    Method("complement", 3e-4, 1, label="tau0.1", settings=(("alpha", 0.7), ("tau", 0.1))),
    Method("complement", 2e-4, 1, label="tau0.3", settings=(("alpha", 0.7), ("tau", 0.3))),
    Method("npo", 5e-5, 1),
    Method("npo", 1e-5, 1),
    Method("npo", 2e-5, 1),
    Method("npo", 1e-4, 1),
    Method("listwise", 1e-4, 1),
    Method("listwise", 3e-4, 1),
    Method("dpo", 5e-5, 1),
    Method("dpo", 2e-4, 1),
    Method("kto", 5e-5, 1),
    Method("kto", 2e-4, 1),
    Method("unlikelihood", 2e-5, 1),
    Method("sft", 2e-4, 1),
    Method("ascent", 5e-6, 1),
    Method("published", 2e-4, 1, settings=(("alpha", 0.7),)),
]
REFERENCE = METHODS[0].run  # what the others are compared with, pair by pair
RIGHT, PER_TOKEN, SHORTER = "right", "right_per_token", "right_if_shorter"


def records_of(items: Sequence[Preference], *, with_chosen: bool) -> list[RejectionRecord]:
    """The records to train on; an answer never rejected is left out unless asked for."""
    records = []
    for item in items:
        included = [k for k, v in enumerate(item.rejections) if v or with_chosen]
        if not any(item.rejections):
            continue
        answers, counts = tuple(item.answers[k] for k in included), tuple(item.rejections[k] for k in included)
        records.append(
            RejectionRecord(item.prompt, answers, counts, (item.rounds,) * len(included), ((),) * len(included))
        )
    return records


def boundaries_of(
    records: Sequence[RejectionRecord], tokenizer: Any, answers: int, max_length: int = MAX_LENGTH
) -> list[Boundary]:
    """Their tokens; a record that has fewer different answers left, once they are cut, is left out."""
    boundaries = build_boundaries(records, tokenizer, max_length)
    return [boundary for boundary in boundaries if boundary is not None and len(set(boundary.ends)) >= answers]


def with_samples(
    records: Sequence[RejectionRecord], tokenizer: Any, file: Path, precision: str
) -> list[RejectionRecord]:
    """A sample of the base's own, never rejected, beside the rejected answers of each record; drawn once."""
    if not file.exists():
        engine = TransformersEngine(harness.base(precision).eval(), tokenizer, batch=harness.BATCH)
        write_records(file, add_own_samples(records, engine, 1))
    return list(read_records(file))


def score(model: Any, tokenizer: Any, items: Sequence[Preference]) -> dict[str, Any]:
    """Of every answer -log pi, and over how many tokens."""
    scorer = PackedScorer(Model.from_module(model, tokenizer), MAX_LENGTH, with_reference=False)
    scores = scorer.answers([(item.prompt, item.answers) for item in items])
    return {
        "nats": [[answer.nats for answer in own] for own in scores],
        "tokens": [[answer.tokens for answer in own] for own in scores],
    }


def right_pairs(items: Sequence[Preference], own: dict[str, Any], base: dict[str, Any]) -> dict[str, list[float]]:
    """Which pairs are ranked right by log pi / pi_base, by the same per token, and by being shorter."""
    right: dict[str, list[float]] = {RIGHT: [], PER_TOKEN: [], SHORTER: []}
    for item, nats, before, tokens in zip(items, own["nats"], base["nats"], own["tokens"], strict=True):
        for a, b in item.pairs():
            if tokens[a] and tokens[b]:
                better, worse = before[a] - nats[a], before[b] - nats[b]
                right[RIGHT].append(preferred(better, worse))
                right[PER_TOKEN].append(preferred(better / tokens[a], worse / tokens[b]))
                right[SHORTER].append(preferred(-tokens[a], -tokens[b]))
    return right


def pair_columns(name: str, right: dict[str, list[float]]) -> Row:
    """Columns of a test: how many pairs, and the shares of them that are ranked right."""
    columns: Row = {f"{name}_pairs": len(right[RIGHT])}
    for by, answers in right.items():
        columns |= harness.with_interval(f"{name}_{by}", harness.shares(answers))
    return columns


def compare_pairs(summary: Summary, name: str, other: str) -> None:
    """How many more held-out pairs are ranked right than by another run, pair by pair, where the cache has both."""
    own, others = summary.items(f"{name}-pairs"), summary.items(f"{other}-pairs")
    if name != other and own is not None and others is not None:
        columns: Row = {"compared_with": other}
        for by in (RIGHT, PER_TOKEN):
            shares = harness.shares(own["test"][by]), harness.shares(others["test"][by])
            columns |= harness.with_difference(f"test_{by}_more", *shares)
        summary.add(name, columns)


def train(method: Method, items: Sequence[Preference], tokenizer: Any, samples: Path) -> tuple[Any, Row]:
    """A model trained on the rejections of some pairs.

    Args:
        method: how.
        items: the pairs.
        tokenizer: the model's.
        samples: file of the base's own answers, for `listwise`.
    """
    with_chosen = method.name in NEEDS_CHOSEN
    records = records_of(items, with_chosen=with_chosen)
    if method.name == "listwise":
        fitting = build_boundaries(records, tokenizer, MAX_LENGTH)
        records = [record for record, boundary in zip(records, fitting, strict=True) if boundary]
        records = with_samples(records, tokenizer, samples, method.precision)
    answers = 2 if with_chosen or method.name == "listwise" else 1
    return harness.train(method, boundaries_of(records, tokenizer, answers))


def main() -> None:
    """Run what is not done yet, and print the table."""
    parser = harness.study_parser(__doc__, "train", "test", "other")
    parser.add_argument("--records", type=int, default=1000, help="to train on")
    arguments = parser.parse_args()
    summary = Summary(arguments.output)
    if not arguments.table:
        summary.require_precision(arguments.precision)
        for other in {row["records"] for row in summary.runs.values()} - {arguments.records}:
            raise SystemExit(f"{summary.folder} has runs on {other} records: give that as --records, or another folder")
        tokenizer = load_tokenizer(BUNDLED)
        items = read_preferences(str(arguments.train), limit=arguments.records).items
        tests = {name: read_preferences(str(getattr(arguments, name))).items for name in ("test", "other")}
        neutral = harness.neutral_texts(arguments.neutral, tokenizer, NEUTRAL)

        def measure(model: Any) -> dict[str, Any]:
            scores = {name: score(model, tokenizer, pairs) for name, pairs in tests.items()}
            return scores | {"neutral_nll": mean_nll(Model.from_module(model), neutral)}

        for method in (replace(method, precision=arguments.precision) for method in METHODS):

            def scores(method: Method = method) -> dict[str, Any]:
                samples = summary.folder / "cache" / "samples.jsonl"
                model, columns = train(method, items, tokenizer, samples)
                return measure(model.eval()) | {"columns": columns}

            def run(method: Method = method, scores: Any = scores) -> Row:
                base = summary.cached("base", lambda: measure(harness.base(method.precision).eval()))
                own = summary.cached(method.run, scores)
                right = {name: right_pairs(pairs, own[name], base[name]) for name, pairs in tests.items()}
                summary.write_cache(f"{method.run}-pairs", {"items": right})
                row = own["columns"] | {"records": arguments.records}
                for name in tests:
                    row |= pair_columns(name, right[name])
                return row | {"neutral_drift": own["neutral_nll"] - base["neutral_nll"]}

            summary.run(method.run, run)
        for name in summary.runs:
            compare_pairs(summary, name, REFERENCE)
    print(table(arguments.output))


def table(folder: Path) -> str:
    """The figures of the runs that are done, as Markdown."""
    columns = "run", "held-out pairs", "per token", "another data set", "per token", "neutral drift, nats/token"
    runs, rows = Summary(folder).runs, []
    for name, row in sorted(runs.items()):
        cells = [harness.share_cell(row, f"{test}_{by}") for test in ("test", "other") for by in (RIGHT, PER_TOKEN)]
        rows.append((name, *cells, harness.signed(row, "neutral_drift")))
    for row in list(runs.values())[:1]:
        test, other = (harness.share_cell(row, f"{test}_{SHORTER}") for test in ("test", "other"))
        rows.append(("the shorter answer", test, "", other, "", ""))
    return harness.markdown(columns, rows)


if __name__ == "__main__":
    main()
