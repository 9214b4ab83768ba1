"""UltraFeedback rejections: does learning from the rejected answers alone rank unseen answers, and at what damage?

    python studies/ultrafeedback.py --train T.jsonl --test E.jsonl --other O.jsonl --neutral N.jsonl -o FOLDER

Everybody trains on the same records for the same steps; `dpo` and `sft` see the chosen answers too, and `listwise`,
which ranks, a sample of the base's own to each prompt. Tested on held-out
pairs of the same data and on those of another: how often the better answer has the higher log pi / pi_base, summed and
per token. The sum favours short answers wherever all answers became less likely; the share of pairs in which it does
is told too. Stopped, the same command goes on; `--table` only prints what there is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from buleyean_rl.evaluation.statistics import preferred, wilson
from buleyean_rl.inference.transformers_engine import TransformersEngine
from buleyean_rl.models.source import BUNDLED
from buleyean_rl.models.weights import load_tokenizer
from buleyean_rl.training.own_samples import add_own_samples
from harness import Method, keep

MAX_LENGTH, NEUTRAL = 512, 64

METHODS = [
    Method("npo", 5e-5, 1),
    Method("listwise", 1e-4, 1),
    Method("ratio", 1e-4, 1, label="tau0.1", settings=(("tau", 0.1),)),
    Method("ratio", 3e-4, 1, label="tau0.1", settings=(("tau", 0.1),)),
    Method("ratio", 2e-4, 1, label="tau0.3", settings=(("tau", 0.3),)),
    Method("ratio", 2e-4, 1, label="alpha0.9", settings=(("alpha", 0.9),)),
    Method("ratio", 1e-4, 1, label="alpha0.9", settings=(("alpha", 0.9),)),
    Method("ratio", 5e-4, 1, label="alpha0.9", settings=(("alpha", 0.9),)),
    Method("ratio", 2e-4, 1, label="alpha0.9", settings=(("alpha", 0.9),), seed=43),
    Method("npo", 1e-5, 1),
    Method("ratio", 2e-4, 1, label="alpha0.9-tau3", settings=(("alpha", 0.9), ("tau", 3.0))),
    Method("npo", 2e-5, 1),
    Method("dpo", 5e-5, 1),
    Method("complement", 2e-4, 1),
    Method("kto", 5e-5, 1),
    Method("listwise", 3e-4, 1),
    Method("npo", 1e-4, 1),
    Method("dpo", 2e-4, 1),
    Method("unlikelihood", 2e-5, 1),
    Method("sft", 2e-4, 1),
    Method("ascent", 5e-6, 1),
    Method("complement", 5e-4, 1),
    Method("kto", 2e-4, 1),
    Method("published", 2e-4, 1),
]


def records_of(items: Sequence[Preference], *, with_chosen: bool) -> list[RejectionRecord]:
    """The records to train on; an answer never rejected is left out unless asked for."""
    records = []
    for item in items:
        kept = [k for k, v in enumerate(item.rejections) if v or with_chosen]
        if not any(item.rejections):
            continue
        answers, counts = tuple(item.answers[k] for k in kept), tuple(item.rejections[k] for k in kept)
        records.append(RejectionRecord(item.prompt, answers, counts, item.rounds, ((),) * len(kept)))
    return records


def boundaries_of(
    records: Sequence[RejectionRecord], tokenizer: Any, answers: int, max_length: int = MAX_LENGTH
) -> list[Boundary]:
    """Their tokens; a record that has fewer different answers left, once they are cut, is left out."""
    found = (boundary for boundary in build_boundaries(records, tokenizer, max_length) if boundary is not None)
    return [boundary for boundary in found if len(set(boundary.ends)) >= answers]


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
    scorer = PackedScorer(model, tokenizer, MAX_LENGTH, with_reference=False)
    scores = scorer.answers([(item.prompt, item.answers) for item in items])
    return {
        "nats": [[answer.nats for answer in own] for own in scores],
        "tokens": [[answer.tokens for answer in own] for own in scores],
    }


def accuracy(items: Sequence[Preference], own: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Which pairs are ranked right by log pi / pi_base, by the same per token, and by being shorter."""
    right: dict[str, list[float]] = {"right": [], "right_per_token": [], "right_if_shorter": []}
    for item, nats, before, tokens in zip(items, own["nats"], base["nats"], own["tokens"], strict=True):
        for a, b in item.pairs():
            if tokens[a] and tokens[b]:
                better, worse = before[a] - nats[a], before[b] - nats[b]
                right["right"].append(preferred(better, worse))
                right["right_per_token"].append(preferred(better / tokens[a], worse / tokens[b]))
                right["right_if_shorter"].append(preferred(-tokens[a], -tokens[b]))
    return {"pairs": len(right["right"])} | right


def main() -> None:
    """Run what is not done yet, and print the table."""
    parser = harness.arguments_of(__doc__, "train", "test", "other")
    parser.add_argument("--records", type=int, default=1000, help="to train on")
    arguments = parser.parse_args()
    folder: Path = arguments.output
    if not arguments.table:
        harness.keep_to(arguments.precision, folder)
        there = keep(folder / "scores", "records", lambda: {"records": arguments.records})["records"]
        if there != arguments.records:
            raise SystemExit(f"{folder} has runs on {there} records: give that as --records, or another folder")
        tokenizer = load_tokenizer(BUNDLED)
        items = read_preferences(str(arguments.train), limit=arguments.records).items
        tests = {name: read_preferences(str(getattr(arguments, name))).items for name in ("test", "other")}
        neutral = harness.neutral_texts(arguments.neutral, tokenizer, NEUTRAL)

        def measure(model: Any) -> dict[str, Any]:
            scores = {name: score(model, tokenizer, pairs) for name, pairs in tests.items()}
            return scores | {"neutral_nll": mean_nll(model, neutral)}

        for method in (replace(method, precision=arguments.precision) for method in METHODS):

            def trained(method: Method = method) -> dict[str, Any]:
                with_chosen = method.name in NEEDS_CHOSEN
                records = records_of(items, with_chosen=with_chosen)
                if method.name == "listwise":
                    fit = build_boundaries(records, tokenizer, MAX_LENGTH)
                    records = [record for record, boundary in zip(records, fit, strict=True) if boundary]
                    records = with_samples(records, tokenizer, folder / "scores" / "samples.jsonl", method.precision)
                least = 2 if with_chosen or method.name == "listwise" else 1
                model, log = harness.train(method, boundaries_of(records, tokenizer, least))
                return measure(model.eval()) | {"log": log}

            def run(method: Method = method, trained: Callable[[], dict[str, Any]] = trained) -> dict[str, Any]:
                base = keep(folder / "scores", "base", lambda: measure(harness.base(method.precision).eval()))
                found = keep(folder / "scores", method.run, trained)
                figures = {name: accuracy(pairs, found[name], base[name]) for name, pairs in tests.items()}
                return found["log"] | figures | {"neutral_drift": found["neutral_nll"] - base["neutral_nll"]}

            keep(folder, method.run, run)
    print(table(folder))


def table(folder: Path) -> str:
    """The figures of the runs that are done, as Markdown."""
    columns = "run", "held-out pairs", "per token", "another data set", "per token", "neutral drift, nats/token"
    runs, rows = harness.read_runs(folder), []
    for name, run in runs.items():
        cells = [share(run[pairs][by]) for pairs in ("test", "other") for by in ("right", "right_per_token")]
        rows.append((name, *cells, f"{run['neutral_drift']:+.3f}"))
    if runs:
        test, other = (share(next(iter(runs.values()))[pairs]["right_if_shorter"]) for pairs in ("test", "other"))
        rows.append(("the shorter answer", test, "", other, "", ""))
    return harness.markdown(columns, rows)


def share(right: Sequence[float]) -> str:
    """How many of some pairs, with its interval."""
    interval = wilson(sum(right), len(right))
    assert interval is not None
    return f"{sum(right) / len(right):.1%} ({interval.low:.0%} to {interval.high:.0%})"


if __name__ == "__main__":
    main()
