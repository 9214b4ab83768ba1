"""Loops against drift: one thing of the demo's training changed at a time.

    python studies/drift.py --texts WIKITEXT.jsonl C4.jsonl --prompts P.jsonl -o FOLDER [VARIANT ...]

The base answers the demo's first 300 prompts once, and its looping answers are the rejections. Measured are bundled
prompts that the demo neither mines nor shows, and short ones of `--prompts`. An adapter is measured as it was trained,
and with the first seed at the scale at which the KL is 0.02 on the text that moved farther: so variants compare at
equal drift. Stopped, the same command goes on; `--table` only shows what there is.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

from buleyean_rl.system import environment  # noqa: F401 - before torch

# isort: split
from adapters import adapted, train_adapter
from answers import draw
from buleyean_rl import demo_data
from buleyean_rl.data.encode import Encoder
from buleyean_rl.data.prompts import read_prompts
from buleyean_rl.data.records import RejectionRecord
from buleyean_rl.data.trie import Boundary
from buleyean_rl.evaluation.drift import Drift, sum_drift
from buleyean_rl.evaluation.repetition import distinct, is_looping
from buleyean_rl.evaluation.scoring import PackedScorer
from buleyean_rl.evaluation.texts import read_texts
from buleyean_rl.inference.open import engine_of
from buleyean_rl.inference.protocol import Answer, Sampling
from buleyean_rl.mining.votes import judge_loops
from buleyean_rl.models.model import Model, open_model
from buleyean_rl.models.source import BUNDLED
from buleyean_rl.training import anchors as anchors_module
from buleyean_rl.training.config import BuleyeanConfig
from buleyean_rl.training.dataset import Dataset
from harness import Row, Summary, markdown, share_cell, shares, with_interval

MINED = 300  # the demo's
MINED_TOKENS = 512  # of the answers; variants use a part of them
UNSEEN, PROMPT_TOKENS = 200, 64  # prompts to measure on
PASSAGES, PASSAGE_TOKENS = 24, 256  # of each file of texts
SEEDS = (42, 43, 44)
SAMPLED = 100  # prompts answered at temperature 1, and at 512 tokens
SAMPLINGS = {"long": Sampling(512), "t1": Sampling(128, temperature=1.0, top_p=1.0)}
KL = 0.02  # nats per token, at which variants are compared
Settings = tuple[tuple[str, Any], ...]
COSTS = ("records", "steps", "trained_tokens")
BEFORE: Row = {  # the preset `loops` as it was
    "num_train_epochs": 4.0,
    "learning_rate": 7e-4,
    "per_device_train_batch_size": 2,
    "anchors": 2,
    "min_p": 0.1,
    "max_rejected": None,
    "adapter_scale": 1.0,
    "save_strategy": "no",
}


@dataclass(frozen=True)
class Variant:
    """A way to train.

    Args:
        name: of it.
        settings: other than `BEFORE`.
        tokens: of the mined answers.
        passage_tokens: of each passage that is an anchor.
        answers: whether accepted answers are anchors too, in turn with passages, where there is one for each record.
    """

    name: str
    settings: Settings = ()
    tokens: int = 128
    passage_tokens: int = 64
    answers: bool = False

    @property
    def columns(self) -> Row:
        """What a table says of it."""
        names = ("tokens", "passage_tokens", "answers")
        return {"method": self.name, **{name: getattr(self, name) for name in names}, **dict(self.settings)}


BRIEF: Settings = (("max_steps", 90), ("anchors", 1), ("max_rejected", 48))
FASTER: Settings = (("learning_rate", 1e-3), ("min_p", 0.2))
VARIANTS = [
    Variant("before"),
    Variant("default", (("num_train_epochs", 1.5), ("anchors", 1), ("max_rejected", 48)), 256, 80),
    Variant("faster", (("num_train_epochs", 1.5), ("anchors", 1), ("max_rejected", 48), *FASTER), 256, 80),
    Variant("passages-128", BRIEF, 256, 128),
    Variant("512-tokens", (*BRIEF, ("max_rejected", 24)), 512, 128),
    Variant("no-anchors", (*BRIEF, ("anchors", 0)), 256),
    Variant("answers-64", BRIEF, 256, 64, answers=True),
    Variant("whole", (*BRIEF, ("max_rejected", None)), 256, 80),
]


@dataclass(frozen=True)
class Study:
    """What variants are trained and measured on.

    Args:
        summary: the table.
        base: the model.
        unseen: prompts to measure on.
        texts: passages to measure drift on, by file.
    """

    summary: Summary
    base: Model
    unseen: list[str]
    texts: dict[str, list[str]]

    @cached_property
    def mined(self) -> list[list[int]]:
        """The base's greedy answers to the demo's prompts, in tokens."""
        return list(self.summary.cached("mined", self._mine))

    def _mine(self) -> list[list[int]]:
        prompts = demo_data.mine_prompts()[:MINED]
        return [list(answer.token_ids or ()) for answer in draw(engine_of(self.base), prompts, Sampling(MINED_TOKENS))]

    def records(self, variant: Variant) -> list[RejectionRecord]:
        """What a variant learns from."""
        texts = [self.base.tokenizer.decode(ids[: variant.tokens]) for ids in self.mined]
        return judge_loops(demo_data.mine_prompts()[:MINED], texts)

    def run(self, variant: Variant, seed: int) -> None:
        """Train and measure a variant, if it was not done before."""
        name = f"{variant.name}-seed{seed}"
        folder = self.summary.folder / "cache" / name

        def work() -> Row:
            trained = self.summary.cached(f"{name} trained", lambda: self.train(variant, seed, folder))
            return variant.columns | {"seed": seed, **trained} | self.measure(folder, name)

        row = self.summary.run(name, work)
        if seed != SEEDS[0]:
            return
        scale = (KL / max(row[f"kl_{file}"] for file in self.texts)) ** 0.5  # it grows with the square of the scale
        equal = f"{name} at KL {KL:g}"
        self.summary.run(
            equal,
            lambda: (
                {"method": variant.name, "scale": scale} | self.count_loops(adapted(self.base, folder, scale), equal)
            ),
        )

    def train(self, variant: Variant, seed: int, folder: Path) -> Row:
        """Train an adapter into a folder."""

        def anchors(model: Model, dataset: Dataset, config: BuleyeanConfig) -> list[Sequence[Boundary]]:
            with patch.object(anchors_module, "PASSAGE_TOKENS", variant.passage_tokens):
                taken, config.anchors = config.anchors, config.anchors + variant.answers
                groups = anchors_module.anchor_groups(model, dataset, config)
                config.anchors = taken
            return groups

        settings = BEFORE | dict(variant.settings) | {"seed": seed}
        return train_adapter(self.base, self.records(variant), settings, folder, "loops", anchors)

    def count_loops(self, model: Model, run: str) -> Row:
        """How many answers loop; the cache gets the answers."""
        answers = draw(engine_of(model), self.unseen, Sampling(128))
        loops = [int(is_looping(answer.text)) for answer in answers]
        self.summary.write_cache(run, {"items": loops, "texts": [answer.text for answer in answers]})
        return {"prompts": len(loops), "loops": sum(loops), **with_interval("loop_rate", shares(loops))}

    def measure_long(self, name: str) -> None:
        """Long and sampled answers of the base, or of a run."""
        model = self.base if name == "base" else adapted(self.base, self.summary.folder / "cache" / name)

        def work() -> Row:
            row: Row = {"method": name}
            for label, sampling in SAMPLINGS.items():
                answers = draw(engine_of(model), self.unseen[:SAMPLED], sampling)
                row |= {f"{label}_{figure}": value for figure, value in describe(answers).items()}
            return row

        self.summary.run(f"{name}, long and sampled", work)

    def measure(self, folder: Path, run: str) -> Row:
        """Loops and drift of an adapter."""
        row = {}
        for file, drift in self.drifts(adapted(self.base, folder)).items():
            row |= {f"kl_{file}": drift.kl, f"entropy_{file}": drift.entropy / drift.entropy_base - 1}
        return row | self.count_loops(adapted(self.base, folder), run)

    def drifts(self, model: Model) -> dict[str, Drift]:
        """KL and entropy on each file of texts."""
        scorer = PackedScorer(model, PASSAGE_TOKENS)
        return {file: sum_drift(scorer.texts(texts)) for file, texts in self.texts.items()}


def describe(answers: Sequence[Answer]) -> Row:
    """Loops, variety, length and ends of some answers."""
    count = len(answers)
    return {
        "loop_rate": sum(is_looping(answer.text) for answer in answers) / count,
        "distinct": distinct([answer.text for answer in answers]),
        "mean_tokens": sum(answer.tokens or 0 for answer in answers) / count,
        "ended": sum(answer.ended for answer in answers) / count,
    }


def unseen_prompts(paths: Sequence[Path], tokenizer: Any) -> list[str]:
    """Bundled prompts that the demo does not use, and short ones of files."""
    bundled = [*demo_data.mine_prompts()[MINED:], *demo_data.held_out_prompts()[100:]]
    others = [prompt for path in paths for prompt in read_prompts(path) if isinstance(prompt, str)]
    lengths = (encoded.length for encoded in Encoder(tokenizer).encode_prompts(others))
    short = [prompt for prompt, length in zip(others, lengths, strict=True) if length <= PROMPT_TOKENS]
    return list(dict.fromkeys([*bundled, *short]))[:UNSEEN]


def table(folder: Path) -> str:
    """The figures of what is done, as Markdown."""
    summary = Summary(folder)
    texts = [column.removeprefix("kl_") for column in summary.columns if column.startswith("kl_")]
    lines, long_lines = [], []
    for name, row in summary.rows.items():
        if "loops" in row:
            cells = [name, share_cell(row, "loop_rate"), f"{row.get('scale', 1):.2f}"]
            cells += [" / ".join(f"{row[f'kl_{text}']:.4f}" for text in texts if f"kl_{text}" in row)]
            cells += [" / ".join(f"{row[f'entropy_{text}']:+.1%}" for text in texts if f"kl_{text}" in row)]
            lines.append([*cells, *(str(row.get(column, "")) for column in COSTS)])
        else:
            shares_of = (row["long_loop_rate"], row["t1_loop_rate"], row["t1_ended"])
            cells = [*map("{:.1%}".format, shares_of), f"{row['t1_distinct']:.3f}", f"{row['t1_mean_tokens']:.0f}"]
            long_lines.append([name, *cells])
    long_columns = ("run", "loops in 512 tokens", "loops at temperature 1", "ended", "distinct", "length")
    columns = ("run", "loops", "scale", f"KL {' / '.join(texts)}", "entropy", *COSTS)
    return f"{markdown(columns, lines)}\n\n{markdown(long_columns, long_lines)}"


def main() -> None:
    """Run what is not done yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help="of VARIANTS; all of them by default")
    parser.add_argument("--texts", nargs="+", metavar="NAME=FILE", help="passages, JSON Lines with `text`")
    parser.add_argument("--prompts", type=Path, nargs="*", default=[], metavar="FILE")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="SEED", help="the first alone is scaled")
    parser.add_argument("--long", action="store_true", help="measure long and sampled answers too")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--table", action="store_true", help="only show what there is")
    arguments = parser.parse_args()
    if not arguments.table:
        base = open_model(BUNDLED, keep_adapter=True)
        named = (text.partition("=") for text in arguments.texts)
        texts = {name: read_texts(Path(file))[:PASSAGES] for name, _, file in named}
        study = Study(Summary(arguments.output), base, unseen_prompts(arguments.prompts, base.tokenizer), texts)
        study.summary.run("base", lambda: {"method": "base"} | study.count_loops(base, "base"))
        if arguments.long:
            study.measure_long("base")
        for seed in arguments.seeds:
            for variant in VARIANTS:
                if not arguments.variants or variant.name in arguments.variants:
                    study.run(variant, seed)
                    if arguments.long:
                        study.measure_long(f"{variant.name}-seed{seed}")
    print(table(arguments.output))


if __name__ == "__main__":
    main()
