"""Own loops: the model's looping answers are the rejections; loops on unseen prompts against damage elsewhere.

    python studies/own_loops.py --prompts P.jsonl [P2.jsonl ...] --neutral N.jsonl -o FOLDER

The base answers the first 400 prompts (or `--mined` of them), and the last 200 are for measuring; every method trains
on the same looping ones, with the same rejected spans, steps and batches. Stopped, the same command goes on; `--table`
only shows what there is. `plots.py` draws it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import harness
from buleyean_rl.data.answer_text import AnswerText
from buleyean_rl.data.encode import Encoder
from buleyean_rl.data.prompts import read_prompts
from buleyean_rl.data.records import Prompt, RejectionRecord
from buleyean_rl.data.trie import Boundary, build_boundaries, merge_responses
from buleyean_rl.evaluation.neutral_text import mean_nll
from buleyean_rl.evaluation.repetition import is_looping
from buleyean_rl.mining.votes import judge_loops
from buleyean_rl.models.model import Model
from buleyean_rl.models.source import BUNDLED
from buleyean_rl.models.weights import load_tokenizer
from harness import Method, Row, Summary

UNSEEN, NEUTRAL = 200, 64
ROUNDS = 60  # of a rejection
PROMPT_TOKENS = 192  # longer prompts are left out
SMALL_BATCH = ("per_device_train_batch_size", 2)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

METHODS = [
    Method("complement", 5e-4, label="alpha0.9"),
    Method("npo", 1e-4),
    Method("unlikelihood", 1e-4),
    Method("kto", 4e-5),
    Method("complement", 7e-4, 4, label="batch2-alpha0.9", settings=(SMALL_BATCH,)),
    Method("npo", 3e-5),
    Method("npo", 6e-5),
    Method("kto", 5e-4),
    Method("ascent", 2e-5),
    Method("unlikelihood", 3e-5),
    Method("kto", 2e-4),
    Method("ascent", 5e-6),
    Method("npo", 3e-4),
    Method("unlikelihood", 3e-4),
    Method("kto", 1e-3),
    Method("published", 5e-4, settings=(("alpha", 0.7),)),
    Method("complement", 5e-4, label="alpha0.7", settings=(("alpha", 0.7),)),
    Method("complement", 1e-3, label="alpha0.9"),
    Method("complement", 5e-4, 1, label="alpha0.9-anchors", anchors=99),
    Method("complement", 5e-4, label="alpha0.9-attention", settings=(("lora_targets", ATTENTION),)),
    Method("complement", 2e-4, label="alpha0.9-rejected-alone", rejected_alone=True),
]

# Ten times the steps of the table above, beside the same steps: with few records, since it takes so long.
LONG = [
    Method("complement", 5e-4, 20, label="alpha0.9-20epochs"),
    Method("npo", 1e-4, 20, label="20epochs"),
    Method("complement", 5e-4, label="alpha0.9"),
    Method("npo", 1e-4),
    Method("unlikelihood", 1e-4, 20, label="20epochs"),
    Method("unlikelihood", 1e-4),
]
REFERENCE = METHODS[0].run  # what the others are compared with, prompt by prompt


def loop_columns(loops: Sequence[int], base_loops: Sequence[int] | None) -> Row:
    """Columns of answers that loop (1) or do not (0), and how many of them the base's answers do too."""
    row = {"prompts": len(loops), "loops": sum(loops), **harness.with_interval("loop_rate", harness.shares(loops))}
    return row | ({"loops_in_base_too": sum(map(min, loops, base_loops))} if base_loops is not None else {})


def pick_prompts(paths: Sequence[Path], mined: int, tokenizer: Any) -> tuple[list[Prompt], list[Prompt]]:
    """The first prompts of some files, to mine, and the last, to measure on; long ones left out."""
    every = dict.fromkeys(prompt for path in paths for prompt in read_prompts(path))
    encoded = Encoder(tokenizer).encode_prompts(list(every))
    short = [prompt for prompt, ids in zip(every, encoded, strict=True) if ids.length <= PROMPT_TOKENS]
    if len(short) < mined + UNSEEN:
        raise SystemExit(f"{len(short)} prompts of at most {PROMPT_TOKENS} tokens: {mined + UNSEEN} are needed")
    return short[:mined], short[-UNSEEN:]


@dataclass(frozen=True)
class Task:
    """What is learnt, and what it is measured on.

    Args:
        summary: the table of the study.
        tokenizer: the model's.
        prompts: the mined ones.
        answers: the base's answers to them.
        unseen: prompts to count loops on.
        neutral: texts to measure drift on.
        precision: of the model.
    """

    summary: Summary
    tokenizer: Any
    prompts: list[Prompt]
    answers: list[str]
    unseen: list[Prompt]
    neutral: list[Boundary]
    precision: str

    @cached_property
    def records(self) -> list[RejectionRecord]:
        """The looping answers, their repeats rejected in all of `ROUNDS`, which is firm at tau 1."""
        records = judge_loops(self.prompts, self.answers)  # type: ignore[arg-type]
        looping = (record for record in records if record.rejects)
        return [replace(record, rejection_counts=(ROUNDS,), rounds=(ROUNDS,)) for record in looping]

    @cached_property
    def rejected(self) -> list[Boundary]:
        """Them, as they are trained on."""
        return self.boundaries(self.records)

    def boundaries(self, records: Sequence[RejectionRecord]) -> list[Boundary]:
        """Records as they are trained on."""
        return [b for b in build_boundaries(records, Encoder(self.tokenizer, 1024)) if b is not None]

    def anchors(self, count: int) -> list[Boundary]:
        """The first answers that do not loop: nothing of them is rejected, so the base is the target everywhere."""
        good = [pair for pair in zip(self.prompts, self.answers, strict=True) if not is_looping(pair[1])][:count]
        return [
            merge_responses(prompt.ids, [(answer.ids, answer.rejected)], [0], [ROUNDS])
            for prompt, (answer,) in Encoder(self.tokenizer).encode([(p, [AnswerText(a)]) for p, a in good])
        ]

    def run(self, method: Method, boundaries: Sequence[Boundary], **options: Any) -> None:
        """Train and measure, if it was not done before."""

        def work() -> Row:
            model, columns = harness.train(replace(method, precision=self.precision), boundaries, **options)
            return columns | self.measure(model, method.run)

        self.summary.run(method.run, work)

    def measure(self, model: Any, run: str) -> Row:
        """Loops on the unseen prompts, and nats per token of neutral and rejected text; caches the answers."""
        scored = Model.from_module(model)
        nll = mean_nll(scored, self.neutral)
        row = {"neutral_nll": nll, "rejected_nll": mean_nll(scored, self.rejected)}
        if "base" in self.summary.rows:
            row["neutral_drift"] = nll - self.summary.rows["base"]["neutral_nll"]
        answers = harness.answer(model, self.tokenizer, self.unseen)
        loops = [int(is_looping(answer.text)) for answer in answers]
        self.summary.write_cache(run, {"items": loops, "texts": [answer.text for answer in answers]})
        return {
            **row,
            **loop_columns(loops, self.summary.items("base") if run != "base" else None),
            "mean_characters": sum(len(answer.text) for answer in answers) / len(answers),
            "ended_share": sum(answer.ended for answer in answers) / len(answers),
        }


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments of a study of own loops."""
    options = harness.study_parser(description)
    options.add_argument("--prompts", type=Path, nargs="+", required="--table" not in sys.argv)
    options.add_argument("--mined", type=int, default=400, help="prompts whose answers are mined")
    return options


def prepare(arguments: argparse.Namespace) -> Task:
    """Mine, and measure the base, if it was not done before."""
    summary = Summary(arguments.output)
    summary.require_precision(arguments.precision)
    tokenizer = load_tokenizer(BUNDLED)
    prompts, unseen = pick_prompts(arguments.prompts, arguments.mined, tokenizer)
    neutral = harness.neutral_texts(arguments.neutral, tokenizer, NEUTRAL)
    base = harness.base(arguments.precision)
    mined = summary.cached("mined", lambda: {"texts": [a.text for a in harness.answer(base, tokenizer, prompts)]})
    task = Task(summary, tokenizer, prompts, mined["texts"], unseen, neutral, arguments.precision)
    print(f"{len(task.rejected)} of {len(prompts)} mined answers loop", file=sys.stderr, flush=True)
    if not task.rejected:
        raise SystemExit("nothing to train on")
    summary.run("base", lambda: {"method": "base", "precision": task.precision} | task.measure(base, "base"))
    return task


def main() -> None:
    """Run what is not done yet, and print the table."""
    options = parser(__doc__)
    options.add_argument("--long", action="store_true", help="ten times the epochs, beside as many as else")
    arguments = options.parse_args()
    if not arguments.table:
        task = prepare(arguments)
        for method in LONG if arguments.long else METHODS:
            task.run(method, [*task.rejected, *task.anchors(method.anchors)])
        for name in task.summary.runs:
            harness.compare_loops(task.summary, name, REFERENCE)
    print(table(arguments.output))


def table(folder: Path) -> str:
    """The figures of the runs that are done, as Markdown."""
    columns = "run", "loops, unseen prompts", "neutral drift", "rejected text", "characters", "ends by itself"
    summary = Summary(folder)
    rows = []
    for name in ["base", *sorted(summary.runs)]:
        row = summary.rows[name]
        cells = (
            name.replace("-seed42", ""),
            harness.share_cell(row, "loop_rate"),
            harness.signed(row, "neutral_drift"),
            f"{row['rejected_nll']:.2f}",
            f"{row['mean_characters']:.0f}",
            f"{row['ended_share']:.0%}",
        )
        rows.append(cells)
    return harness.markdown(columns, rows)


if __name__ == "__main__":
    main()
