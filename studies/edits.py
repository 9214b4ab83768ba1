"""One thumbs-down as an edit: is that answer gone, also for a paraphrase, and is everything else as before?

    python studies/edits.py --prompts P.jsonl [P2.jsonl ...] -o FOLDER [--edits N] [--variant V ...]

The base answers prompts greedily. Each edit rejects one of these answers, once and whole, and trains on it alone. Gone
means that less than half of the rejected answer's 4-grams are in the new greedy one. A paraphrase counts only where
the base gives it that answer too. As before means the same first 32 tokens, over 50 other prompts. Each edit is
measured at several scales of its adapter, a row each; `--table` has the means of each variant.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from buleyean_rl.system import environment  # noqa: F401 - before torch

# isort: split
from answers import draw
from buleyean_rl.data.encode import tokenizer_hash
from buleyean_rl.data.prompts import read_prompts
from buleyean_rl.data.records import make_record, write_records
from buleyean_rl.evaluation.repetition import overlap
from buleyean_rl.inference.open import engine_of
from buleyean_rl.inference.protocol import Answer, Sampling
from buleyean_rl.models.lora import scale_adapter
from buleyean_rl.models.model import Model, open_model
from buleyean_rl.models.source import BUNDLED
from buleyean_rl.training.config import load_config
from buleyean_rl.training.run import train
from harness import Row, Summary, markdown

OTHERS = 50
TOKENS, BEGINNING = 64, 32
MAX_CHARACTERS = 200  # of a prompt
GONE = 0.5
SCALES = 1.0, 0.25, 0.1
PARAPHRASES = "Please help me: {}", "I have a question. {}", "{} Thank you.", "Hello! {}"

VARIANTS: dict[str, dict[str, Any]] = {  # of preset `few`
    "few": {},
    "10-steps": {"max_steps": 10, "learning_rate": 1.5e-4},
    "sgd": {"max_steps": 6, "learning_rate": 0.1, "optim": "sgd"},
    "10-steps-anchors8": {"max_steps": 10, "learning_rate": 1.5e-4, "anchors": 8},
}


class Edit(NamedTuple):
    """A prompt, its paraphrase, and the base's answer to it, which is rejected."""

    prompt: str
    paraphrase: str | None
    answer: Answer


def answers(model: Model, prompts: Sequence[str], tokens: int = TOKENS) -> list[Answer]:
    """Greedy answers."""
    return draw(engine_of(model), prompts, Sampling(tokens))


def is_gone(rejected: str, answer: str) -> bool:
    """Whether an answer is another one than the rejected."""
    return overlap(rejected, answer) < GONE


def choose_edits(model: Model, prompts: Sequence[str], count: int) -> list[Edit]:
    """The first prompts with an answer of some length, and the first paraphrase that the base gives it too."""
    asked = [text for prompt in prompts for text in (prompt, *(form.format(prompt) for form in PARAPHRASES))]
    given = answers(model, asked)
    edits, width = [], 1 + len(PARAPHRASES)
    for i in range(0, len(asked), width):
        own, *others = given[i : i + width]
        if (own.tokens or 0) < BEGINNING // 2 or len(edits) == count:
            continue
        same = [asked[i + 1 + k] for k, other in enumerate(others) if not is_gone(own.text, other.text)]
        edits.append(Edit(asked[i], same[0] if same else None, own))
    return edits


def learn(model: Model, edit: Edit, settings: dict[str, Any], folder: Path) -> Model:
    """The base trained on one rejection."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = None if edit.answer.token_ids is None else [list(edit.answer.token_ids)]
    record = make_record(
        edit.prompt,
        [edit.answer.text],
        [1],
        1,
        token_ids=ids,
        tokenizer=ids and tokenizer_hash(model.tokenizer),
    )
    write_records(folder / "records.jsonl", [record])
    options = {"save_strategy": "no", "guard": False} | settings
    train(folder / "records.jsonl", model, load_config(None, folder / "run", options, "few"))
    return model.with_source(open_model(folder / "run").source)


def measure(model: Model, edit: Edit, others: Sequence[str], before: Sequence[Answer]) -> Row:
    """What became of an edit's answer, and of others."""
    asked = [edit.prompt, *([edit.paraphrase] if edit.paraphrase else [])]
    own = answers(model, asked)
    row: Row = {"gone": float(is_gone(edit.answer.text, own[0].text))}
    if edit.paraphrase:
        row["paraphrase_gone"] = float(is_gone(edit.answer.text, own[1].text))
    pairs = list(zip(before, answers(model, others, BEGINNING), strict=True))
    starts = [(list(a.token_ids or ()), list(b.token_ids or ())) for a, b in pairs]
    common = [
        next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))) for a, b in starts
    ]
    return row | {
        "others_unchanged": sum(a == b for a, b in starts) / len(starts),
        "others_common": sum(n / max(len(a), 1) for n, (a, _) in zip(common, starts, strict=True)) / len(starts),
    }


def table(summary: Summary) -> str:
    """Means of each variant."""
    rows = defaultdict(list)
    for row in summary.rows.values():
        rows[row["variant"]].append(row)
    columns = "variant", "edits", "gone", "gone for a paraphrase", "others unchanged", "share in common", "seconds"
    lines = []
    for variant, members in rows.items():
        cells = [variant, f"{len(members)}"]
        for name in ("gone", "paraphrase_gone", "others_unchanged", "others_common"):
            values = [row[name] for row in members if name in row]
            share = f"{sum(values) / len(values):.0%}" if values else ""
            cells.append(share + f" of {len(values)}" * (name == "paraphrase_gone"))
        lines.append([*cells, f"{sum(row['seconds'] for row in members) / len(members):.0f}"])
    return markdown(columns, lines)


def main() -> None:
    """Make the edits that are not made yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, nargs="+", required="--table" not in sys.argv)
    parser.add_argument("--edits", type=int, default=20)
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="only show what there is")
    arguments = parser.parse_args()
    summary = Summary(arguments.output)
    if not arguments.table:
        pool = dict.fromkeys(prompt for path in arguments.prompts for prompt in read_prompts(path))
        short = [prompt for prompt in pool if isinstance(prompt, str) and len(prompt) <= MAX_CHARACTERS]
        random.Random(1).shuffle(short)
        model = open_model(BUNDLED)
        others = short[:OTHERS]
        before = answers(model, others, BEGINNING)
        edits = choose_edits(model, short[OTHERS : OTHERS + 2 * arguments.edits], arguments.edits)
        for label in arguments.variant:
            for number, edit in enumerate(edits):
                if f"{label}-{number}-x{SCALES[-1]:g}" in summary.rows:
                    continue
                started, folder = time.monotonic(), arguments.output / "cache" / f"{label}-{number}"
                trained, applied = learn(model, edit, VARIANTS[label], folder), 1.0
                seconds = round(time.monotonic() - started, 1)
                for scale in SCALES:
                    scale_adapter(trained.module, scale / applied)
                    applied = scale
                    row = measure(trained, edit, others, before)
                    about = {"variant": f"{label} x{scale:g}", "seconds": seconds}
                    summary.add(f"{label}-{number}-x{scale:g}", about | row)
                shutil.rmtree(folder)
                print(table(summary), flush=True)
    print(table(summary))


if __name__ == "__main__":
    main()
