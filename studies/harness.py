"""What the studies share: the model, one training run in memory, its measurements, and the table of a study.

A study is a list of named runs. Each run is a row of `summary.csv`, written as soon as it is done, so a study that was
stopped goes on where it was. A study keeps to one precision, fp32 unless it says otherwise: its runs may come from
several machines, and greedy answers of other precisions part ways.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from buleyean_rl.system import environment  # noqa: F401 - before torch

# isort: split
import numpy as np
import torch

from answers import draw
from baseline_trainer import BaselineTrainer
from baselines import BASELINES, HAVE_BETA, Baseline
from buleyean_rl.data.encode import Encoder
from buleyean_rl.data.trie import Boundary
from buleyean_rl.evaluation.neutral_text import neutral_boundary
from buleyean_rl.evaluation.statistics import Figure
from buleyean_rl.inference.protocol import Answer, Sampling
from buleyean_rl.inference.transformers_engine import TransformersEngine
from buleyean_rl.models.adapt import attach_lora
from buleyean_rl.models.fused_layers import fuse_layers
from buleyean_rl.models.lora import lora_config
from buleyean_rl.models.placement import default_device
from buleyean_rl.models.source import BUNDLED
from buleyean_rl.models.views import output_head, plain_model
from buleyean_rl.models.weights import load_base
from buleyean_rl.objectives.losses import ObjectiveName
from buleyean_rl.system.files import write_json
from buleyean_rl.training.config import BuleyeanConfig
from buleyean_rl.training.reference_cache import ReferenceCache, entry_format
from buleyean_rl.training.trainer import BuleyeanTrainer

OBJECTIVES = get_args(ObjectiveName)
WITH_BETA = (*HAVE_BETA, "listwise", "listwise_unlikelihood")
NEUTRAL_TOKENS = 128
ANSWER_TOKENS = 128
BATCH = 64  # answers drawn at once
SETTINGS: dict[str, Any] = {  # of a method that names no others, whatever the package's defaults become
    "alpha": 0.9,
    "tau": 1.0,
    "per_device_train_batch_size": 4,
    "lora_rank": 16,
    "lora_alpha": 32,
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """One way to train.

    Args:
        name: an objective of the package, or a baseline.
        learning_rate: peak.
        epochs: over the records.
        beta: of a baseline that has one.
        settings: other fields of `BuleyeanConfig` than `SETTINGS`.
        anchors: the base's own answers, never rejected, to train on beside the rejected ones.
        rejected_alone: no loss at the tokens that were not rejected, which else keep to the base.
        label: tells runs of one method apart.
        seed: of the adapter and of the order of the records.
        precision: of the base model; the adapter is in fp32.
    """

    name: str
    learning_rate: float
    epochs: float = 2.0
    beta: float = 0.1
    settings: tuple[tuple[str, Any], ...] = ()
    label: str = ""
    anchors: int = 0
    rejected_alone: bool = False
    seed: int = 42
    precision: str = "float32"

    @property
    def run(self) -> str:
        """The name of its run."""
        return "-".join(filter(None, (self.name, self.label, f"lr{self.learning_rate:g}", f"seed{self.seed}")))

    @property
    def columns(self) -> Row:
        """What a table says of it."""
        settings = {"beta": self.beta} | SETTINGS | dict(self.settings)
        unused = {"alpha", "tau"} if self.name in BASELINES else set()
        if self.name not in WITH_BETA:
            unused.add("beta")
        return {
            "method": self.name,
            "label": self.label,
            "learning_rate": self.learning_rate,
            "epochs": self.epochs,
            **{name: value for name, value in settings.items() if name not in unused},
            "anchors": self.anchors,
            "rejected_alone": self.rejected_alone,
            "seed": self.seed,
            "precision": self.precision,
        }


FIRST_COLUMNS = ("method", "label", "counts", "records", "learning_rate", "epochs", "beta", *SETTINGS, "lora_targets")


class Summary:
    """The table of a study, `summary.csv`: a row for each run, and for several runs taken together.

    The answers, scores and ranks that a row was computed from are in the folder `cache` beside it, which git ignores:
    runs are compared item by item, and taken together, where it has them.

    Args:
        folder: of the study.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "summary.csv"
        self.rows: dict[str, Row] = self._read()

    def _read(self) -> dict[str, Row]:
        if not self.path.exists():
            return {}
        with self.path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
        return {
            line["run"]: {key: _parse(cell) for key, cell in line.items() if cell and key != "run"} for line in lines
        }

    @property
    def runs(self) -> dict[str, Row]:
        """The trained runs alone: neither the base, nor runs taken together."""
        return {name: row for name, row in self.rows.items() if name != "base" and "runs" not in row}

    @property
    def columns(self) -> list[str]:
        """The names of all columns."""
        return list(dict.fromkeys(column for row in self.rows.values() for column in row))

    def add(self, name: str, row: Row) -> None:
        """Write a row, or more columns of one; rows that others wrote meanwhile stay."""
        self.rows = self._read()
        self.rows[name] = self.rows.get(name, {}) | row
        columns = ["run", *sorted(self.columns, key=lambda column: column not in FIRST_COLUMNS)]
        self.folder.mkdir(parents=True, exist_ok=True)
        partial_file = self.path.with_suffix(".partial")
        with partial_file.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            for run, each in self.rows.items():
                writer.writerow([run, *(_format(each.get(column)) for column in columns[1:])])
        os.replace(partial_file, self.path)

    def run(self, name: str, work: Callable[[], Row]) -> Row:
        """The row of a run; made, timed and written unless it is there."""
        if name not in self.rows:
            started = time.monotonic()
            row = work()
            self.add(name, row | {"seconds": round(time.monotonic() - started, 1)})
            print(name, row, flush=True)
        return self.rows[name]

    def cached(self, name: str, work: Callable[[], Any]) -> Any:
        """What the cache has under a name; made and written unless it is there."""
        file = self._cache_file(name)
        if not file.exists():
            self.write_cache(name, work())
        return json.loads(file.read_text(encoding="utf-8"))

    def write_cache(self, name: str, value: Any) -> None:
        """Put something into the cache."""
        file = self._cache_file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, value)

    def items(self, name: str) -> list[Any] | None:
        """What was measured of each item of a run, where the cache has it."""
        file = self._cache_file(name)
        return json.loads(file.read_text(encoding="utf-8"))["items"] if file.exists() else None

    def _cache_file(self, name: str) -> Path:
        return self.folder / "cache" / f"{name}.json"

    def require_precision(self, precision: str) -> None:
        """Refuse to put runs of another precision beside those that are there."""
        for other in {row["precision"] for row in self.rows.values() if "precision" in row} - {precision}:
            raise SystemExit(f"{self.folder} has runs in {other}: give that as --precision, or another folder")


def _parse(cell: str) -> Any:
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            pass
    return cell


def _format(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.7g}"
    if isinstance(value, list):
        return " ".join(value)
    return "" if value is None or value is False else str(int(value) if value is True else value)


def with_interval(name: str, figure: Figure) -> Row:
    """Columns of a figure and its 95% interval."""
    low, high = figure.interval() or (None, None)
    return {name: figure.value, f"{name}_low": low, f"{name}_high": high}


def with_difference(name: str, own: Figure, other: Figure) -> Row:
    """Columns of own - other and its 95% interval, both over the same items."""
    low, high = other.difference(own) or (None, None)
    return {name: (own.value or 0.0) - (other.value or 0.0), f"{name}_low": low, f"{name}_high": high}


def shares(answers: Iterable[float]) -> Figure:
    """The share of yes (1) among answers."""
    return Figure([(float(answer), 1.0) for answer in answers])


def compare_loops(summary: Summary, name: str, other: str) -> None:
    """How many more answers loop than in another run, prompt by prompt, where the cache has both."""
    own, others = summary.items(name), summary.items(other)
    if name != other and own is not None and others is not None:
        columns: Row = {"compared_with": other}
        if "runs" not in summary.rows[name]:
            columns["loops_in_both"] = sum(map(min, own, others))
        summary.add(name, columns | with_difference("loop_rate_more", shares(own), shares(others)))


def pool_loops(summary: Summary, name: str, runs: Sequence[str]) -> None:
    """Write a row of several runs on the same prompts taken together, where the cache has them all."""
    items = [summary.items(run) for run in runs]
    if all(items):
        counts = np.sum(items, axis=0)
        row = {
            "method": summary.rows[runs[0]]["method"],
            "runs": len(runs),
            "prompts": len(counts),
            **with_interval("loop_rate", shares(counts / len(runs))),
            "loops_in_any": int((counts > 0).sum()),
            "loops_in_one": int((counts == 1).sum()),
            "loops_in_all": int((counts == len(runs)).sum()),
            "neutral_drift": float(np.mean([summary.rows[run]["neutral_drift"] for run in runs])),
        }
        summary.add(name, row)
        summary.write_cache(name, {"items": (counts / len(runs)).tolist()})


def alike(names: Iterable[str], part: str) -> dict[str, list[str]]:
    """Runs that differ in one part of their name alone, under the name without it.

    Args:
        names: of runs.
        part: a regular expression, as `-seed[0-9]+`.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[re.sub(part, "", name)].append(name)
    return {stem: group for stem, group in groups.items() if len(group) > 1}


def study_parser(description: str | None, *inputs: str) -> argparse.ArgumentParser:
    """What every study is told: the files it reads, its folder, its precision, and whether only to show what there is.

    Args:
        description: of the study.
        inputs: names of its input files, beside the neutral texts.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in (*inputs, "neutral"):
        parser.add_argument(f"--{name}", type=Path, required="--table" not in sys.argv)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the study")
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="float32", help="of all runs in a folder"
    )
    parser.add_argument("--table", action="store_true", help="only show what there is")
    return parser


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = (columns, ["---"] * len(columns), *rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def share_cell(row: Row, name: str) -> str:
    """A share and its interval, in percent."""
    return f"{row[name]:.1%} ({row[f'{name}_low']:.0%} to {row[f'{name}_high']:.0%})"


def signed(row: Row, name: str) -> str:
    """A figure with its sign, and its interval where there is one; nothing where there is no figure."""
    if name not in row:
        return ""
    interval = f" ({row[f'{name}_low']:+.3f} to {row[f'{name}_high']:+.3f})" if f"{name}_low" in row else ""
    return f"{row[name]:+.3f}{interval}"


def base(precision: str = "float32") -> Any:
    """The model of the studies, on a GPU if there is one."""
    model = load_base(BUNDLED, getattr(torch, precision))
    fuse_layers(model)
    return model.to(default_device())


def without_anchors(collate: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """A trainer's collator whose batches have nodes only where something was rejected."""

    def collate_rejected(numbered: Any) -> dict[str, Any]:
        inputs = collate(numbered)
        return inputs | {"batches": [batch.without_anchors() for batch in inputs["batches"]]}

    return collate_rejected


def train(
    method: Method, boundaries: Sequence[Boundary], trainer_type: Callable[..., BuleyeanTrainer] | None = None
) -> tuple[Any, Row]:
    """A freshly adapted model trained on some boundaries, and its columns: the method, and what the trainer logged.

    Args:
        method: how.
        boundaries: on what.
        trainer_type: makes another trainer than the method's, from the arguments of `BuleyeanTrainer`.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = BuleyeanConfig(
            output_dir=folder,
            objective=method.name if method.name in OBJECTIVES else "complement",  # type: ignore[arg-type]
            learning_rate=method.learning_rate,
            num_train_epochs=method.epochs,
            save_strategy="no",
            seed=method.seed,
            beta=method.beta,
            **(SETTINGS | dict(method.settings)),
        )
        torch.manual_seed(method.seed)
        model = attach_lora(
            base(method.precision), lora_config(config.lora_rank, config.lora_alpha, 0.0, config.lora_targets)
        )
        if trainer_type is None and method.name in BASELINES:
            trainer_type = partial(BaselineTrainer, Baseline(method.name, method.beta))
        references = None
        if not method.rejected_alone:  # it has a state for every node
            entry = entry_format(output_head(model), config.loss)
            entry = entry._replace(with_softmax=entry.with_softmax and trainer_type is None)  # for the package alone
            references = ReferenceCache(Path(folder) / "reference", [boundary.nodes for boundary in boundaries], entry)
        trainer = (trainer_type or BuleyeanTrainer)(model, config, boundaries, references=references)
        if method.rejected_alone:
            trainer.data_collator = without_anchors(trainer.data_collator)
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "floor" in entry]
    last = log[-max(1, len(log) // 10) :]
    return model, method.columns | {
        "steps": trainer.state.global_step,
        "tokens": sum(entry["tokens"] for entry in log),
        "training_seconds": round(sum(entry["seconds"] for entry in log), 1),
        "loss_first": log[0]["loss"],
        "loss_last": sum(entry["loss"] for entry in last) / len(last),
    }


def answer(model: Any, tokenizer: Any, prompts: Sequence[Any]) -> list[Answer]:
    """Greedy answers."""
    plain_model(model).set_attn_implementation("sdpa")  # the packed layout has no padded rows
    engine = TransformersEngine(model.eval(), tokenizer, batch=BATCH)
    return draw(engine, prompts, Sampling(max_tokens=ANSWER_TOKENS))


def neutral_texts(path: Path, tokenizer: Any, count: int) -> list[Boundary]:
    """The first texts of a JSONL file with `text`, as boundaries."""
    with path.open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(count), strict=False)]
    encoder = Encoder(tokenizer, NEUTRAL_TOKENS)
    boundaries = (neutral_boundary(encoder, text) for text in texts)
    return [boundary for boundary in boundaries if boundary is not None]
