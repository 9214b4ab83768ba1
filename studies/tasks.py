"""Four kinds of rejection: what of each is left on unseen prompts, beside the drift on C4 and WikiText-2.

    python studies/tasks.py --prompts P.jsonl [P2.jsonl ...] --c4 C.jsonl --wikitext W.jsonl -o FOLDER
                            [--kind K ...] [--variant V ...]

The base answers prompts greedily, a rule judges (see `kinds.py`), each rejected answer is rejected once: a plain log.
A variant is a way to train on it. Each run is measured as it was trained, and with its adapter scaled to a KL of 0.02,
so that variants can be compared at one drift. Training, validation and test prompts are apart; `--test` measures on
the last. Stopped, the same command goes on; `--table` only shows what there is.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from buleyean_rl.system import environment  # noqa: F401 - before torch

# isort: split

from answers import draw
from buleyean_rl.data.answer_text import locate_drawn_tokens
from buleyean_rl.data.encode import tokenizer_hash
from buleyean_rl.data.prompts import read_prompts
from buleyean_rl.data.records import RejectionRecord, make_record, write_records
from buleyean_rl.data.records.answers import Spans
from buleyean_rl.evaluation.drift import Drift, sum_drift
from buleyean_rl.evaluation.repetition import distinct
from buleyean_rl.evaluation.scoring import PackedScorer
from buleyean_rl.evaluation.texts import read_texts
from buleyean_rl.inference.open import engine_of
from buleyean_rl.inference.protocol import Answer, Sampling
from buleyean_rl.models.lora import scale_adapter
from buleyean_rl.models.model import Model, open_model
from buleyean_rl.models.source import BUNDLED
from buleyean_rl.training.config import load_config
from buleyean_rl.training.run import train
from harness import Row, Summary, markdown
from kinds import KINDS, Kind

TOKENS = 128  # of an answer
MAX_CHARACTERS = 300  # of a prompt
UNSEEN = {"validation": 64, "test": 100}
MINED, RECORDS, SAMPLED = 480, 32, 12
PASSAGES, PASSAGE_TOKENS = 12, 256
TEMPERATURES = {"validation": (0.0,), "test": (0.0, 0.8, 1.0)}
KL = 0.02  # that adapters are scaled to
SCALES = 0.25, 2.5


@dataclass(frozen=True)
class Variant:
    """A way to train on a log.

    Args:
        settings: other settings than the preset's, and `preset`.
        records: other settings of the records: see `Study.records`.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    records: dict[str, Any] = field(default_factory=dict)


FIRM = {"tau": 5.93, "learning_rate": 5e-4, "num_train_epochs": 3, "per_device_train_batch_size": 2}
VARIANTS = {
    "default": Variant(),
    "before": Variant({"tau": 1.0, "learning_rate": 2e-4, "num_train_epochs": 1, "per_device_train_batch_size": 4}),
    "firm": Variant(FIRM),
    "firm-surprising": Variant(FIRM, {"below": 0.5}),
    "firm-no-anchors": Variant(FIRM | {"anchors": 0}),
    "firm-min_p0": Variant(FIRM | {"min_p": 0.0}),
    "firm-min_p0-no-anchors": Variant(FIRM | {"min_p": 0.0, "anchors": 0}),
    "accepted": Variant(FIRM | {"tau": 2.0, "prior_mean": None, "num_train_epochs": 2}, {"samples": 6}),
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

    def answer(self, model: Model, prompts: Sequence[str], temperature: float, seed: int = 0) -> list[Answer]:
        """Answers of a model."""
        sampling = Sampling(TOKENS, temperature=temperature, top_p=1.0, seed=seed, logprobs=model is self.model)
        return draw(engine_of(model), prompts, sampling)

    def drawn(self, name: str, samples: int) -> list[Drawn]:
        """The base's greedy answers to the training prompts, or samples of it, judged."""
        kind = KINDS[name]
        prompts = self.prompts(kind, "training")
        key = f"base-{name.split('_spans')[0]}-{samples}"
        if not samples:
            answers = self.summary.cached(key, lambda: [a._asdict() for a in self.answer(self.model, prompts, 0.0)])
        else:
            prompts = [prompt for prompt in prompts[:SAMPLED] for _ in range(samples)]
            answers = self.summary.cached(key, lambda: [a._asdict() for a in self.answer(self.model, prompts, 1.0)])
        found = [Answer(**answer) for answer in answers]
        return [Drawn(p, a, kind.is_rejected(a)) for p, a in zip(prompts, found, strict=True) if a.text.strip()]

    def records(self, name: str, samples: int = 0, below: float = 0.0) -> list[RejectionRecord]:
        """The log of a kind.

        Args:
            name: of the kind.
            samples: of each prompt, at temperature 1, all that are judged; 0 for the greedy answers that are rejected.
            below: reject only tokens that the base gave a probability below it; 0 for all.
        """
        rejected = [drawn for drawn in self.drawn(name, samples) if drawn.rejected]
        judged = self.drawn(name, samples) if samples else rejected[:RECORDS]
        records = []
        for drawn in judged:
            text, ids = drawn.answer.text, drawn.answer.token_ids
            spans = KINDS[name].spans(text) if drawn.rejected else ()
            if drawn.rejected and below and ids is not None:
                spans = self._surprising(drawn.answer, below)
            records.append(
                make_record(
                    drawn.prompt,
                    [text],
                    [int(drawn.rejected)],
                    1,
                    [[list(span) for span in spans]],
                    token_ids=None if ids is None else [list(ids)],
                    ended=[drawn.answer.ended],
                    tokenizer=None if ids is None else tokenizer_hash(self.model.tokenizer),
                    policy={"model": BUNDLED},
                )
            )
        return records

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

    def answers_row(self, model: Model, name: str, temperatures: Sequence[float] = ()) -> Row:
        """What of a kind is left on unseen prompts, and what answers look like."""
        kind = KINDS[name]
        prompts, row = self.prompts(kind, self.part), Row()
        for temperature in temperatures or TEMPERATURES[self.part]:
            answers, suffix = self.answer(model, prompts, temperature), f"_t{temperature:g}"
            row[f"rejected{suffix}"] = sum(map(kind.is_rejected, answers)) / len(answers)
            row[f"tokens{suffix}"] = sum(answer.tokens or 0 for answer in answers) / len(answers)
            row[f"ended{suffix}"] = sum(answer.ended for answer in answers) / len(answers)
            row[f"distinct_4{suffix}"] = distinct([answer.text for answer in answers])
            row[f"loops{suffix}"] = sum(map(KINDS["loops"].is_rejected, answers)) / len(answers)
        return row

    def run(self, name: str, label: str, variant: Variant, seed: int) -> None:
        """Train, and measure as trained and at `KL`."""
        run = f"{name}-{label}" + (f"-seed{seed}" if seed != 42 else "")
        if self.part == "test":
            run += "-test"
        if run in self.summary.rows and f"{run}-scaled" in self.summary.rows:
            return
        started = time.monotonic()
        records = self.records(name, **variant.records)
        work = self.folder / "cache" / run
        work.mkdir(parents=True, exist_ok=True)
        write_records(work / "records.jsonl", records)
        options = {"save_strategy": "no", "guard": False, "held_out": 0.0, "seed": seed} | variant.settings
        output = work / f"run-{time.time():.0f}"
        report = train(work / "records.jsonl", self.model, load_config(None, output, options))
        trained = self.model.with_source(open_model(output).source)
        row: Row = {
            "kind": name,
            "variant": label,
            "seed": seed,
            "part": self.part,
            "records": len(records),
            "steps": report.steps,
            "training_seconds": round(time.monotonic() - started, 1),
            **{key: value for key, value in variant.settings.items() if isinstance(value, int | float | str)},
            **{f"records_{key}": value for key, value in variant.records.items()},
        }
        drifts = self.drifts(trained)
        self.summary.add(run, row | {"scale": 1.0} | self.answers_row(trained, name) | _drift_columns(drifts))
        scale = (KL / max(drift.kl for drift in drifts.values())) ** 0.5  # drift grows with its square
        scale = min(max(scale, SCALES[0]), SCALES[1])
        scale_adapter(trained.module, scale)
        drifts = self.drifts(trained)
        scaled = {"scale": round(scale, 2)} | self.answers_row(trained, name, (0.0,)) | _drift_columns(drifts)
        self.summary.add(f"{run}-scaled", row | scaled | {"seconds": round(time.monotonic() - started, 1)})
        print(table(self.folder), flush=True)


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
    columns = "run", "greedy", "0.8", "1.0", "KL C4", "KL WikiText-2", "entropy", "tokens", "loops", "scale", "seconds"
    rows = []
    for name, row in Summary(folder).rows.items():
        shares = [f"{row[f'rejected_t{t:g}']:.0%}" if f"rejected_t{t:g}" in row else "" for t in TEMPERATURES["test"]]
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
    parser.add_argument("--seed", type=int, nargs="+", default=[42])
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
            study.summary.run(
                f"{kind}-base" + ("-test" if arguments.test else ""),
                lambda kind=kind: (
                    {"kind": kind, "part": study.part} | study.answers_row(study.model, kind, TEMPERATURES["test"])
                ),
            )
        for label in arguments.variant:
            for kind in arguments.kind:
                for seed in arguments.seed:
                    study.run(kind, label, VARIANTS[label], seed)
    print(table(arguments.output))


if __name__ == "__main__":
    main()
