"""What the studies share: the model, one training run in memory, its measurements, and results that are kept.

A study is a list of named runs. Each run's figures are written as soon as they are known, so a study that was stopped
goes on where it was, and a table can be drawn of what there is. A study keeps to one precision, fp32 unless it says
otherwise: it may be put together from runs of several machines, and greedy answers of other precisions part ways.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from buleyean_rl.system import environment  # noqa: F401 - before torch

# isort: split
import torch

from baselines import Baseline, BaselineTrainer
from buleyean_rl.data.records import as_messages
from buleyean_rl.data.trie import Boundary
from buleyean_rl.evaluation.neutral_text import mean_nll, neutral_boundary
from buleyean_rl.evaluation.repetition import is_looping
from buleyean_rl.inference.protocol import Answer, Sampling
from buleyean_rl.inference.transformers_engine import TransformersEngine
from buleyean_rl.models.adapt import attach_lora
from buleyean_rl.models.compute import default_device
from buleyean_rl.models.fused_layers import fuse_layers
from buleyean_rl.models.lora import lora_config
from buleyean_rl.models.source import BUNDLED
from buleyean_rl.models.views import output_head, plain_model
from buleyean_rl.models.weights import load_base
from buleyean_rl.objectives.losses import ObjectiveName
from buleyean_rl.system.files import write_json
from buleyean_rl.training.config import BuleyeanConfig
from buleyean_rl.training.reference_cache import ReferenceCache, entry_format
from buleyean_rl.training.trainer import BuleyeanTrainer

OBJECTIVES = get_args(ObjectiveName)
NEUTRAL_TOKENS = 128
ANSWER_TOKENS = 128
BATCH = 64  # answers drawn at once
ALPHA = 0.7  # of a method that names no other


@dataclass(frozen=True)
class Method:
    """One way to train.

    Args:
        name: an objective of the package, or a baseline.
        learning_rate: peak.
        epochs: over the records.
        beta: of a baseline that has one.
        settings: other fields of `BuleyeanConfig`.
        anchors: answers of the base's own, never rejected, to train on beside the rejected ones.
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


def keep(folder: Path, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures of a run: read if it was done before, else made and written."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    if not file.exists():
        started = time.monotonic()
        figures = work()
        write_json(file, figures | {"seconds": round(time.monotonic() - started, 1)})
        print(name, {key: value for key, value in figures.items() if not isinstance(value, list | dict)}, flush=True)
    return dict(json.loads(file.read_text(encoding="utf-8")))


def read_runs(folder: Path) -> dict[str, dict[str, Any]]:
    """The figures of the runs that are done, by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def arguments_of(description: str | None, *inputs: str) -> argparse.ArgumentParser:
    """What every study is told: the files it reads, its folder, its precision, and whether only to show what there is.

    Args:
        description: of the study.
        inputs: names of its input files, beside the neutral texts.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in (*inputs, "neutral"):
        parser.add_argument(f"--{name}", type=Path, required="--table" not in sys.argv)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="float32", help="of all runs in a folder"
    )
    parser.add_argument("--table", action="store_true", help="only show what there is")
    return parser


def keep_to(precision: str, folder: Path) -> None:
    """Refuse to put runs of another precision beside those that are there."""
    for run in read_runs(folder).values():
        there = run.get("method", run).get("precision", "float32")
        if there != precision:
            raise SystemExit(f"{folder} has runs in {there}: give that as --precision, or another folder")


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = (columns, ["---"] * len(columns), *rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def base(precision: str = "float32") -> Any:
    """The model of the studies, on a GPU if there is one."""
    model = load_base(BUNDLED, getattr(torch, precision))
    fuse_layers(model)
    return model.to(default_device())


def train(
    method: Method, boundaries: Sequence[Boundary], trainer_of: Callable[..., BuleyeanTrainer] | None = None
) -> tuple[Any, dict[str, Any]]:
    """A freshly adapted model trained on some boundaries, and what the trainer logged.

    Args:
        method: how.
        boundaries: on what.
        trainer_of: makes another trainer than the method's, of what `BuleyeanTrainer` is made of.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = BuleyeanConfig(
            output_dir=folder,
            objective=_objective(method.name),
            learning_rate=method.learning_rate,
            num_train_epochs=method.epochs,
            save_strategy="no",
            seed=method.seed,
            beta=method.beta,
            **{"alpha": ALPHA, **dict(method.settings)},
        )
        torch.manual_seed(method.seed)
        model = attach_lora(
            base(method.precision), lora_config(config.lora_rank, config.lora_alpha, 0.0, config.lora_targets)
        )
        if trainer_of is None and method.name not in OBJECTIVES:
            trainer_of = partial(BaselineTrainer, Baseline(method.name, method.beta))
        references = None
        if not method.rejected_alone:  # it has a state for every node
            kept = entry_format(output_head(model), config.loss)
            kept = kept._replace(with_rest=kept.with_rest and trainer_of is None)  # which only our own loss takes
            references = ReferenceCache(Path(folder) / "reference", [boundary.nodes for boundary in boundaries], kept)
        trainer = (trainer_of or BuleyeanTrainer)(model, config, boundaries, references=references)
        if method.rejected_alone:
            layout = trainer.layout
            trainer.layout = lambda boundaries: layout(boundaries).without_anchors()
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "floor" in entry]
    tail = log[-max(1, len(log) // 10) :]
    return model, {
        "method": asdict(method),
        "steps": trainer.state.global_step,
        "tokens": sum(entry["tokens"] for entry in log),
        "training_seconds": round(sum(entry["seconds"] for entry in log), 1),
        "loss_first": log[0]["loss"],
        "loss_last": sum(entry["loss"] for entry in tail) / len(tail),
    }


def _objective(name: str) -> ObjectiveName:
    return name if name in OBJECTIVES else "complement"  # type: ignore[return-value]


def answer(model: Any, tokenizer: Any, prompts: Sequence[Any]) -> list[Answer]:
    """Greedy answers."""
    plain_model(model).set_attn_implementation("sdpa")  # the packed layout has no padded rows
    engine = TransformersEngine(model.eval(), tokenizer, batch=BATCH)
    return engine.answer_many([as_messages(prompt) for prompt in prompts], Sampling(max_tokens=ANSWER_TOKENS))


def measure(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    neutral: Sequence[Boundary],
    rejected: Sequence[Boundary],
    texts: Path,
) -> dict[str, Any]:
    """Loops on prompts, and nats per token of neutral and of rejected text; the answers go into the file `texts`."""
    figures = {"neutral_nll": mean_nll(model, neutral), "rejected_nll": mean_nll(model, rejected)}
    answers = answer(model, tokenizer, prompts)
    texts.parent.mkdir(parents=True, exist_ok=True)
    write_json(texts, {"texts": [answer.text for answer in answers]})
    loops = [is_looping(answer.text) for answer in answers]
    return {
        **figures,
        "loop_rate": sum(loops) / len(loops),
        "loops": list(map(int, loops)),
        "mean_characters": sum(len(answer.text) for answer in answers) / len(answers),
        "ended_share": sum(answer.ended for answer in answers) / len(answers),
    }


def neutral_texts(path: Path, tokenizer: Any, count: int) -> list[Boundary]:
    """The first texts of a JSONL file with `text`, as boundaries."""
    with path.open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(count), strict=False)]
    found = (neutral_boundary(tokenizer, text, NEUTRAL_TOKENS) for text in texts)
    return [boundary for boundary in found if boundary is not None]
