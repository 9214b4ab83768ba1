"""Four kinds of rejection: what of each is left on unseen prompts, beside the drift on C4 and WikiText-2.

    python studies/tasks.py --prompts P.jsonl [P2.jsonl ...] --c4 C.jsonl --wikitext W.jsonl -o FOLDER
                            [--kind K ...] [--variant V ...]

The base answers prompts greedily, a rule judges (see `kinds.py`), each rejected answer is rejected once: a plain log.
A variant is a way to train on it. Each run is measured as it was trained, and with its adapter scaled to a KL of 0.02,
so that variants can be compared at one drift. Training, validation and test prompts are apart; `--test` measures the
same adapters, as they were trained, on the last, sampled and at 512 tokens too. Stopped, the same command goes on;
`--table` only shows what there is.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from buleyean_rl.system import environment  # noqa: F401 - before torch

# isort: split

from adapters import adapted, train_adapter
from answers import draw
from buleyean_rl.data.answer_text import locate_drawn_tokens
from buleyean_rl.data.encode import tokenizer_hash
from buleyean_rl.data.prompts import read_prompts
from buleyean_rl.data.records import RejectionRecord, make_record
from buleyean_rl.data.records.answers import Spans
from buleyean_rl.evaluation.drift import Drift, sum_drift
from buleyean_rl.evaluation.repetition import distinct
from buleyean_rl.evaluation.scoring import PackedScorer
from buleyean_rl.evaluation.texts import read_texts
from buleyean_rl.inference.open import engine_of
from buleyean_rl.inference.protocol import Answer, Sampling
from buleyean_rl.models.model import Model, open_model
from buleyean_rl.models.source import BUNDLED
from harness import BATCH, Row, Summary, markdown
from kinds import KINDS, Kind

TOKENS = 128  # of an answer
MAX_CHARACTERS = 300  # of a prompt
UNSEEN = {"validation": 64, "test": 100}  # prompts of each part
MINED, RECORDS, SAMPLED = 480, 32, 48
SAMPLE_TOKENS = 80  # of the samples to one prompt: some 60 words
PASSAGES, PASSAGE_TOKENS = 12, 256


class Look(NamedTuple):
    """A way to answer the unseen prompts.

    Args:
        suffix: of its columns.
        sampling: of an answer.
        prompts: the first so many.
    """

    suffix: str
    sampling: Sampling
    prompts: int


GREEDY = Look("t0", Sampling(TOKENS), 64)
LOOKS = {
    "validation": (GREEDY,),
    "test": (
        GREEDY,
        Look("t0.8", Sampling(TOKENS, temperature=0.8, top_p=1.0), 24),
        Look("t1", Sampling(TOKENS, temperature=1.0, top_p=1.0), 24),
        Look("512", Sampling(512), 12),
    ),
}
KL = 0.02  # that adapters are scaled to
SCALES = 0.25, 2.5
SEED = 42


@dataclass(frozen=True)
class Variant:
    """A way to train on a log.

    Args:
        settings: other settings than the preset's, and `preset`.
        records: other settings of the records: see `Study.records`.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    records: dict[str, Any] = field(default_factory=dict)


WHOLE = {"learning_rate": 5e-4, "num_train_epochs": 1.5, "per_device_train_batch_size": 2}  # 36 steps
ACCEPTED = WHOLE | {"prior_mean": None}
SAMPLES = {"samples": 8}
VARIANTS = {
    "default": Variant(),
    "before": Variant({"tau": 1.0, "learning_rate": 2e-4, "num_train_epochs": 1, "per_device_train_batch_size": 4}),
    "surprising": Variant({}, {"below": 0.5}),
    "no-anchors": Variant({"anchors": 0}),
    "min_p0": Variant({"min_p": 0.0}),
    "whole8": Variant(WHOLE, SAMPLES),
    "accepted8": Variant(ACCEPTED | {"tau": 2.0, "prior_rounds": 4.0}, SAMPLES),
}


@dataclass(frozen=True)
class Drawn:
    """A prompt and an answer of the base to it, judged."""

    prompt: str
    answer: Answer
    rejected: bool


class Study:
    """What all runs share: the base, prompts, passages, the table.

    Args:
        folder: of the study.
        pool: prompts, in any order.
        texts: of each file of passages.
        part: `validation` or `test`.
    """

    def __init__(self, folder: Path, pool: Sequence[str], texts: dict[str, list[str]], part: str) -> None:
        self.summary, self.folder, self.texts, self.part = Summary(folder), folder, texts, part
        self.pool = list(pool)
        random.Random(0).shuffle(self.pool)
        self.model = open_model(BUNDLED)

    def prompts(self, kind: Kind, part: str) -> list[str]:
        """The prompts of a part: the last are for testing, those before for validation, the others for training."""
        every = kind.prompts(self.pool)
        sizes = list(UNSEEN.values())
        ends = {"test": (sizes[1], 0), "validation": (sum(sizes), sizes[1])}
        if part == "training":
            return every[: len(every) - sum(sizes)][:MINED]
        first, last = ends[part]
        return every[len(every) - first : len(every) - last]

    def answer(self, model: Model, prompts: Sequence[str], sampling: Sampling) -> list[Answer]:
        """Answers of a model."""
        return draw(engine_of(model), prompts, sampling)

    def drawn(self, name: str, samples: int) -> list[Drawn]:
        """The base's samples to training prompts, judged; or greedy answers, until enough are rejected."""
        kind, prompts = KINDS[name], self.prompts(KINDS[name], "training")

        def draw_samples() -> list[Answer]:
            sampling = Sampling(SAMPLE_TOKENS, temperature=1.0, top_p=1.0, logprobs=True)
            return self.answer(self.model, prompts, sampling)

        def draw_greedy() -> list[Answer]:
            found: list[Answer] = []
            while len(found) < len(prompts) and sum(map(kind.is_rejected, found)) < RECORDS:
                asked = prompts[len(found) : len(found) + BATCH]
                found += self.answer(self.model, asked, Sampling(TOKENS, logprobs=True))
            return found

        if samples:
            prompts = [prompt for prompt in prompts[:SAMPLED] for _ in range(samples)]
        work = draw_samples if samples else draw_greedy
        key = f"base-{name.removesuffix('_spans')}-{samples}"
        answers = [Answer(**each) for each in self.summary.cached(key, lambda: [a._asdict() for a in work()])]
        return [Drawn(p, a, kind.is_rejected(a)) for p, a in zip(prompts, answers, strict=False) if a.text.strip()]

    def records(self, name: str, samples: int = 0, below: float = 0.0) -> list[RejectionRecord]:
        """The log of a kind.

        Args:
            name: of the kind.
            samples: of each prompt, at temperature 1, all that are judged; 0 for the greedy answers that are rejected.
            below: reject only tokens that the base gave a probability below it; 0 for all.
        """
        drawn = self.drawn(name, samples)
        judged = drawn if samples else [each for each in drawn if each.rejected][:RECORDS]
        by_prompt: dict[str, list[Drawn]] = defaultdict(list)
        for each in judged:
            by_prompt[each.prompt].append(each)
        return [self._record(name, prompt, answers, below) for prompt, answers in by_prompt.items()]

    def _record(self, name: str, prompt: str, drawn: Sequence[Drawn], below: float) -> RejectionRecord:
        answers, spans = [each.answer for each in drawn], []
        for each in drawn:
            parts = self._surprising(each.answer, below) if below else KINDS[name].spans(each.answer.text)
            spans.append([list(part) for part in parts] if each.rejected else [])
        has_ids = all(answer.token_ids is not None for answer in answers)
        return make_record(
            prompt,
            [answer.text for answer in answers],
            [int(each.rejected) for each in drawn],
            1,
            spans,
            token_ids=[list(answer.token_ids or ()) for answer in answers] if has_ids else None,
            ended=[answer.ended for answer in answers],
            tokenizer=tokenizer_hash(self.model.tokenizer) if has_ids else None,
            policy={"model": BUNDLED},
        )

    def _surprising(self, answer: Answer, below: float) -> Spans:
        offsets = locate_drawn_tokens(self.model.tokenizer, list(answer.token_ids or ()), answer.text) or []
        likely = [2.718281828**logprob for logprob in answer.logprobs or ()]
        spans = [span for span, p in zip(offsets, likely, strict=False) if p < below and span[1] > span[0]]
        merged: list[tuple[int, int]] = []
        for start, end in spans:
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, end))
        return tuple(merged)

    def drifts(self, model: Model) -> dict[str, Drift]:
        """What training did to passages, by file."""
        flat = [text for members in self.texts.values() for text in members]
        scores = iter(PackedScorer(model, PASSAGE_TOKENS).texts(flat))
        return {name: sum_drift([next(scores) for _ in members]) for name, members in self.texts.items()}

    def answers_row(self, model: Model, name: str, looks: Sequence[Look]) -> Row:
        """What of a kind is left on unseen prompts, and what answers look like."""
        kind = KINDS[name]
        prompts, row = self.prompts(kind, self.part), Row()
        for look in looks:
            answers = self.answer(model, prompts[: look.prompts], look.sampling)
            row |= {
                f"rejected_{look.suffix}": sum(map(kind.is_rejected, answers)) / len(answers),
                f"tokens_{look.suffix}": sum(answer.tokens or 0 for answer in answers) / len(answers),
                f"ended_{look.suffix}": sum(answer.ended for answer in answers) / len(answers),
                f"distinct_4_{look.suffix}": distinct([answer.text for answer in answers]),
                f"loops_{look.suffix}": sum(map(KINDS["loops"].is_rejected, answers)) / len(answers),
            }
        return row

    def run_base(self, name: str) -> None:
        """Measure the base."""
        self.summary.run(
            self.run_name(f"{name}-base"),
            lambda: {"kind": name, "part": self.part} | self.answers_row(self.model, name, LOOKS[self.part]),
        )

    def run(self, name: str, label: str, variant: Variant, seed: int) -> None:
        """Train, and measure as trained and, on validation, at `KL`."""
        adapter = f"{name}-{label}" + (f"-seed{seed}" if seed != SEED else "")
        folder = self.folder / "cache" / adapter
        about: Row = {"kind": name, "variant": label, "seed": seed, "part": self.part}

        def train() -> Row:
            records = self.records(name, **variant.records)
            return train_adapter(self.model, records, variant.settings | {"seed": seed}, folder)

        def measure(scale: float, looks: Sequence[Look]) -> Row:
            trained = self.summary.cached(f"{adapter} trained", train)
            model = adapted(self.model, folder, scale)
            row = about | trained | {"scale": round(scale, 2)}
            return row | self.answers_row(model, name, looks) | _drift_columns(self.drifts(model))

        row = self.summary.run(self.run_name(adapter), lambda: measure(1.0, LOOKS[self.part]))
        if self.part == "test":
            return
        scale = (KL / max(row[f"kl_{text}"] for text in self.texts)) ** 0.5  # drift grows with its square
        scale = min(max(scale, SCALES[0]), SCALES[1])
        self.summary.run(self.run_name(f"{adapter}-scaled"), lambda: measure(scale, (GREEDY,)))

    def run_name(self, run: str) -> str:
        """The name of a run's row."""
        return run + ("-test" if self.part == "test" else "")


def _drift_columns(drifts: dict[str, Drift]) -> Row:
    return {
        f"{figure}_{name}": value
        for name, drift in drifts.items()
        for figure, value in (
            ("kl", drift.kl),
            ("entropy_more", drift.entropy / drift.entropy_base - 1),
            ("nll_more", drift.nll - drift.nll_base),
        )
    }


def table(folder: Path) -> str:
    """The figures of the runs that are done."""
    suffixes = [look.suffix for look in LOOKS["test"]]
    columns = ("run", *suffixes, "KL C4", "KL WikiText-2", "entropy", "tokens", "loops", "scale", "seconds")
    rows = []
    for name, row in Summary(folder).rows.items():
        shares = [f"{row[f'rejected_{suffix}']:.0%}" if f"rejected_{suffix}" in row else "" for suffix in suffixes]
        drift = ["", "", ""]
        if "kl_c4" in row:
            entropy = f"{row['entropy_more_c4']:+.1%} {row['entropy_more_wikitext']:+.1%}"
            drift = [f"{row['kl_c4']:.4f}", f"{row['kl_wikitext']:.4f}", entropy]
        more = [f"{row['tokens_t0']:.0f}", f"{row['loops_t0']:.0%}", f"{row.get('scale', '')}"]
        rows.append([name, *shares, *drift, *more, f"{row.get('training_seconds', '')}"])
    return markdown(columns, rows)


def main() -> None:
    """Run what is not done yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    needed = "--table" not in sys.argv
    parser.add_argument("--prompts", type=Path, nargs="+", required=needed)
    parser.add_argument("--c4", type=Path, required=needed)
    parser.add_argument("--wikitext", type=Path, required=needed)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seed", type=int, nargs="+", default=[SEED])
    parser.add_argument("--test", action="store_true", help="measure on the test prompts")
    parser.add_argument("--table", action="store_true", help="only show what there is")
    arguments = parser.parse_args()
    if not arguments.table:
        pool = dict.fromkeys(prompt for path in arguments.prompts for prompt in read_prompts(path))
        short = [prompt for prompt in pool if isinstance(prompt, str) and len(prompt) <= MAX_CHARACTERS]
        files = {"c4": arguments.c4, "wikitext": arguments.wikitext}
        texts = {name: read_texts(path)[:PASSAGES] for name, path in files.items()}
        study = Study(arguments.output, short, texts, "test" if arguments.test else "validation")
        for kind in arguments.kind:
            study.run_base(kind)
        for label in arguments.variant:
            for kind in arguments.kind:
                for seed in arguments.seed:
                    study.run(kind, label, VARIANTS[label], seed)
    print(table(arguments.output))


if __name__ == "__main__":
    main()
