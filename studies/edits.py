"""One thumbs-down as an edit: is that answer gone, also for a paraphrase, and is everything else as before?

    python studies/edits.py --prompts P.jsonl [P2.jsonl ...] -o FOLDER [--edits N] [--together N ...] [--scales S ...]

The base answers prompts greedily. Each edit rejects one of these answers, once and whole; some are trained on together.
Gone means that less than half of the rejected answer's 4-grams are in the new greedy one. A paraphrase counts only
where the base gives it that answer too. As before means the same first 32 tokens, over other prompts. Each training is
measured at some scales of its adapter, a row each; `--table` has the means.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from buleyean_rl.system import environment  # noqa: F401 - before torch

# isort: split
from adapters import adapted, train_adapter
from answers import draw
from buleyean_rl.data.encode import tokenizer_hash
from buleyean_rl.data.prompts import read_prompts
from buleyean_rl.data.records import RejectionRecord, make_record
from buleyean_rl.evaluation.repetition import overlap
from buleyean_rl.inference.open import engine_of
from buleyean_rl.inference.protocol import Answer, Sampling
from buleyean_rl.models.model import Model, open_model
from buleyean_rl.models.source import BUNDLED
from harness import Row, Summary, markdown

OTHERS = 20
TOKENS = 32  # of an answer
MAX_CHARACTERS = 200  # of a prompt
GONE = 0.5
PARAPHRASES = "Please help me: {}", "I have a question. {}", "{} Thank you.", "Hello! {}"

VARIANTS: dict[str, dict[str, Any]] = {  # of preset `few`
    "few": {},
    "few-5e-4": {"learning_rate": 5e-4},
    "sgd": {"max_steps": 6, "learning_rate": 0.1, "optim": "sgd"},
}


class Edit(NamedTuple):
    """A prompt, its paraphrase, and the base's answer to it, which is rejected."""

    prompt: str
    paraphrase: str | None
    answer: Answer


def answers(model: Model, prompts: Sequence[str]) -> list[Answer]:
    """Greedy answers."""
    return draw(engine_of(model), prompts, Sampling(TOKENS))


def is_gone(rejected: str, answer: str) -> bool:
    """Whether an answer is another one than the rejected."""
    return overlap(rejected, answer) < GONE


def choose_edits(model: Model, prompts: Sequence[str], count: int) -> list[Edit]:
    """The first prompts with an answer of some length, and the first paraphrase that the base gives it too."""
    asked = [text for prompt in prompts for text in (prompt, *(form.format(prompt) for form in PARAPHRASES))]
    given = answers(model, asked)
    edits: list[Edit] = []
    width = 1 + len(PARAPHRASES)
    for i in range(0, len(asked), width):
        own, *others = given[i : i + width]
        if (own.tokens or 0) < TOKENS // 2 or len(edits) == count:
            continue
        same = [asked[i + 1 + k] for k, other in enumerate(others) if not is_gone(own.text, other.text)]
        edits.append(Edit(asked[i], same[0] if same else None, own))
    return edits


def as_record(model: Model, edit: Edit) -> RejectionRecord:
    """An edit's answer, rejected once and whole."""
    ids = None if edit.answer.token_ids is None else [list(edit.answer.token_ids)]
    tokenizer = ids and tokenizer_hash(model.tokenizer)
    return make_record(edit.prompt, [edit.answer.text], [1], 1, token_ids=ids, tokenizer=tokenizer)


def common_tokens(before: Answer, after: Answer) -> int:
    """How many tokens two answers begin with alike."""
    pairs = list(zip(before.token_ids or (), after.token_ids or (), strict=False))
    return next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))


def measure(model: Model, edits: Sequence[Edit], others: Sequence[str], before: Sequence[Answer]) -> Row:
    """What became of the answers of edits, and of others."""
    paraphrased = [edit for edit in edits if edit.paraphrase is not None]
    asked = [*(edit.prompt for edit in edits), *(str(edit.paraphrase) for edit in paraphrased), *others]
    given = answers(model, asked)
    gone = [is_gone(edit.answer.text, each.text) for edit, each in zip([*edits, *paraphrased], given, strict=False)]
    pairs = list(zip(before, given[len(gone) :], strict=True))
    common = [common_tokens(*pair) / max(pair[0].tokens or 0, 1) for pair in pairs]
    return {
        "edits": len(edits),
        "gone": sum(gone[: len(edits)]),
        "paraphrases": len(paraphrased),
        "paraphrases_gone": sum(gone[len(edits) :]),
        "others": len(others),
        "others_unchanged": sum(a.token_ids == b.token_ids for a, b in pairs),
        "others_common": sum(common) / len(common),
    }


def table(summary: Summary) -> str:
    """What became of all edits of a kind."""
    members = defaultdict(list)
    for row in summary.rows.values():
        members[row["variant"], row["together"], row["scale"]].append(row)
    columns = ("variant", "together", "scale", "rate", "gone", "gone for a paraphrase", "others unchanged", "in common")
    lines = []
    for (variant, together, scale), rows in members.items():
        sums = {name: sum(row[name] for row in rows) for name in rows[0] if name not in ("variant", "run")}
        lines.append(
            [
                variant,
                f"{together:g}",
                f"{scale:g}",
                f"{rows[0]['learning_rate']:.2g}",
                f"{sums['gone']:g} of {sums['edits']:g}",
                f"{sums['paraphrases_gone']:g} of {sums['paraphrases']:g}",
                f"{sums['others_unchanged'] / sums['others']:.0%}",
                f"{sums['others_common'] / len(rows):.0%}",
            ]
        )
    return markdown(columns, lines)


def main() -> None:
    """Make the edits that are not made yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, nargs="+", required="--table" not in sys.argv)
    parser.add_argument("--edits", type=int, default=30)
    parser.add_argument(
        "--together", type=int, nargs="+", default=[1, 3, 10], help="edits that are trained on together"
    )
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0])
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=["few"])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="only show what there is")
    arguments = parser.parse_args()
    summary = Summary(arguments.output)
    if not arguments.table:
        pool = dict.fromkeys(prompt for path in arguments.prompts for prompt in read_prompts(path))
        short = [prompt for prompt in pool if isinstance(prompt, str) and len(prompt) <= MAX_CHARACTERS]
        random.Random(1).shuffle(short)
        model, others = open_model(BUNDLED), short[:OTHERS]
        before = answers(model, others)
        edits = choose_edits(model, short[OTHERS : OTHERS + 2 * arguments.edits], arguments.edits)
        for label in arguments.variant:
            for together in arguments.together:
                for first in range(0, len(edits) - together + 1, together):
                    name, group = f"{label}-{first}-of{together}", edits[first : first + together]
                    if f"{name}-x{arguments.scales[-1]:g}" in summary.rows:
                        continue
                    folder = arguments.output / "cache" / name
                    records = [as_record(model, edit) for edit in group]
                    trained = train_adapter(model, records, VARIANTS[label], folder, "few")
                    for scale in arguments.scales:
                        row = {"variant": label, "together": together, "scale": scale} | trained
                        row |= measure(adapted(model, folder, scale), group, others, before)
                        summary.add(f"{name}-x{scale:g}", row)
                    shutil.rmtree(folder)
                    print(table(summary), flush=True)
    print(table(summary))


if __name__ == "__main__":
    main()
