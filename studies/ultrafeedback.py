"""UltraFeedback rejections: does learning from the rejected answers alone rank unseen answers, and at what damage?

    python studies/ultrafeedback.py --train T.jsonl --test E.jsonl --other O.jsonl --neutral N.jsonl -o FOLDER

Everybody trains on the same records for the same steps; `dpo` and `sft` see the chosen answers too. Tested on held-out
pairs of the same data and on those of another: how often the better answer has the higher log pi / pi_base. Stopped,
the same command goes on; `--table` only prints what there is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
from baselines import NEEDS_CHOSEN
from buleyean_rl.boundary import Boundary, build_boundaries
from buleyean_rl.evaluate import mean_nll
from buleyean_rl.evaluate.scoring import PackedScorer
from buleyean_rl.evaluate.statistics import preferred, wilson
from buleyean_rl.importers.preferences import Preference, read_preferences
from buleyean_rl.models import BUNDLED, load_tokenizer
from buleyean_rl.records import RejectionRecord
from harness import Method, keep

MAX_LENGTH, NEUTRAL = 512, 64

METHODS = [
    Method("complement", 2e-4, 1),
    Method("npo", 5e-5, 1),
    Method("dpo", 5e-5, 1),
    Method("kto", 2e-4, 1),
    Method("unlikelihood", 2e-5, 1),
    Method("ascent", 5e-6, 1),
    Method("complement", 5e-4, 1),
    Method("npo", 2e-5, 1),
    Method("dpo", 2e-4, 1),
    Method("kto", 5e-5, 1),
    Method("sft", 2e-4, 1),
    Method("published", 2e-4, 1),
]


def boundaries_of(items: Sequence[Preference], tokenizer: Any, *, with_chosen: bool) -> list[Boundary]:
    """The records to train on; an answer never rejected is left out unless asked for."""
    records = []
    for item in items:
        kept = [k for k, v in enumerate(item.rejections) if v or with_chosen]
        if not any(item.rejections[k] for k in kept) or (with_chosen and len(set(item.answers)) < 2):
            continue
        answers, counts = tuple(item.answers[k] for k in kept), tuple(item.rejections[k] for k in kept)
        records.append(RejectionRecord(item.prompt, answers, counts, item.rounds, ((),) * len(kept)))
    found = (boundary for boundary in build_boundaries(records, tokenizer, MAX_LENGTH) if boundary is not None)
    return [b for b in found if not with_chosen or len(set(b.ends)) > 1]


def accuracy(model: Any, tokenizer: Any, items: Sequence[Preference]) -> dict[str, float]:
    """Share of pairs ranked right by log pi / pi_base, and by mean log pi."""
    scores = PackedScorer(model, tokenizer, MAX_LENGTH).answers([(item.prompt, item.answers) for item in items])
    by_ratio, by_mean = [], []
    for item, own in zip(items, scores, strict=True):
        for better, worse in item.pairs():
            a, b = own[better], own[worse]
            if a.tokens and b.tokens:
                assert a.reference_nats is not None
                assert b.reference_nats is not None
                by_ratio.append(preferred(a.reference_nats - a.nats, b.reference_nats - b.nats))
                by_mean.append(preferred(-a.nats / a.tokens, -b.nats / b.tokens))
    interval = wilson(sum(by_ratio), len(by_ratio))
    assert interval is not None
    return {
        "pairs": len(by_ratio),
        "accuracy_vs_reference": sum(by_ratio) / len(by_ratio),
        "low": interval.low,
        "high": interval.high,
        "accuracy": sum(by_mean) / len(by_mean),
    }


def main() -> None:
    """Run what is not done yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("train", "test", "other", "neutral"):
        parser.add_argument(f"--{name}", type=Path, required="--table" not in sys.argv)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--records", type=int, default=1000, help="to train on")
    parser.add_argument("--table", action="store_true", help="only show what there is")
    arguments = parser.parse_args()
    folder: Path = arguments.output
    if not arguments.table:
        tokenizer = load_tokenizer(BUNDLED)
        items = read_preferences(str(arguments.train), limit=arguments.records).items
        tests = {name: read_preferences(str(getattr(arguments, name))).items for name in ("test", "other")}
        neutral = harness.neutral_texts(arguments.neutral, tokenizer, NEUTRAL)
        for method in METHODS:

            def run(method: Method = method) -> dict[str, Any]:
                with_chosen = method.name in NEEDS_CHOSEN
                model, log = harness.train(method, boundaries_of(items, tokenizer, with_chosen=with_chosen))
                measured = {name: accuracy(model, tokenizer, pairs) for name, pairs in tests.items()}
                with model.disable_adapter():
                    before = mean_nll(model, neutral)
                return log | measured | {"neutral_drift": mean_nll(model, neutral) - before}

            keep(folder, method.run, run)
    print(table(folder))


def table(folder: Path) -> str:
    """The figures of the runs that are done, as Markdown."""
    rows = ["| run | held-out pairs | another data set | neutral drift, nats/token |", "|---|---|---|---|"]
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text())
        cells = [
            f"{run[n]['accuracy_vs_reference']:.1%} ({run[n]['low']:.1%} to {run[n]['high']:.1%})"
            for n in ("test", "other")
        ]
        rows.append(f"| {path.stem} | {' | '.join(cells)} | {run['neutral_drift']:+.3f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
