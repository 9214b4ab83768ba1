"""The whole pipeline on the bundled model and prompts.

    base answers --reject loops--> records --train--> adapter --export--> GGUF --measure--> table

Answers are measured in llama.cpp, from the GGUF files of both models; KL and entropy in transformers, which has full
distributions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.progress import Progress
from rich.table import Table

from buleyean_rl import demo_data
from buleyean_rl.data.records import write_records
from buleyean_rl.evaluation.drift import NeutralFigures, neutral_figures
from buleyean_rl.evaluation.repetition import is_looping, loop_rate
from buleyean_rl.gguf.export import export
from buleyean_rl.inference.gguf_engines import DEFAULT_ENGINE, open_gguf
from buleyean_rl.inference.open import open_engine
from buleyean_rl.inference.protocol import Engine, neutral_nll
from buleyean_rl.mining.answer_cache import cached_answers
from buleyean_rl.mining.votes import reject_loops
from buleyean_rl.mining.walk import walk_config
from buleyean_rl.models.source import BUNDLED, Source, resolve
from buleyean_rl.system.disk import name_full_disk
from buleyean_rl.system.files import read_json_object, remove_folder, write_json
from buleyean_rl.system.outputs import claim_folder
from buleyean_rl.system.terminal import can_redraw
from buleyean_rl.system.wording import counted
from buleyean_rl.training.report import RunReport
from buleyean_rl.training.run import train

FORMAT = 1  # of demo.json
MAX_ANSWER_TOKENS = 128
HELLO = "hello"
ENGINE_SLOTS = 16


@dataclass(frozen=True)
class DemoSize:
    """Size of the demo.

    Args:
        mine: number of prompts to mine.
        held_out: number of prompts to measure on.
    """

    mine: int
    held_out: int


FULL_SIZE = DemoSize(mine=300, held_out=100)
QUICK_SIZE = DemoSize(mine=64, held_out=24)


@dataclass(frozen=True)
class GgufMeasurement:
    """Measurement of a GGUF file in llama.cpp.

    Args:
        loop_rate: share of looping answers to the held-out prompts.
        neutral_nll: nats per token of the neutral texts.
        answers: greedy answers to "hello" and the held-out prompts.
    """

    loop_rate: float
    neutral_nll: float
    answers: dict[str, str]


def run_demo(
    folder: Path, *, quick: bool = False, engine: str = DEFAULT_ENGINE, console: Console | None = None
) -> dict[str, Any]:
    """Run the demo and print the results.

    Args:
        folder: new, empty or of an earlier demo, which is replaced; gets `records.jsonl`, `run/`, `model.gguf` and
            `demo.json`.
        quick: less data, fewer steps.
        engine: checks and measures the files, one of `gguf_engines.ENGINES`.
        console: for progress and the table; None for no output.

    Returns:
        The contents of `demo.json`: the run, the measurements of both files, and those of neutral text.

    Raises:
        ModelError: the bundled model is not installed.
        UsageError: the folder has something else, or another process uses it.
    """
    base = resolve(BUNDLED)
    with claim_folder(folder, _has_demo, "demo"), name_full_disk(folder):
        write_json(folder / "demo.json", {"format": FORMAT})  # the folder is a demo's from now on
        return _run_demo(folder, base, QUICK_SIZE if quick else FULL_SIZE, engine, console or Console(quiet=True))


def _has_demo(folder: Path) -> bool:
    value = read_json_object(folder / "demo.json")
    return value is not None and ("format" in value or {"run", "before", "after"} <= value.keys())


def _run_demo(folder: Path, base: Source, size: DemoSize, engine: str, console: Console) -> dict[str, Any]:
    prompts = demo_data.mine_prompts()[: size.mine]
    held_out = [HELLO, *demo_data.held_out_prompts()[: size.held_out]]

    console.print(f"letting {BUNDLED} answer {counted(len(prompts), 'prompt')}")
    # many answers at once are three times as fast in transformers as in llama.cpp
    open_base = partial(open_engine, base, "transformers", console)
    key, label = f"transformers {base.fingerprint}", "the base model answers"
    answers = _answer_prompts(open_base, key, prompts, console, label)
    records = reject_loops(prompts, answers)
    console.print(f"{len(records)} of {counted(len(prompts), 'answer')} loop: their repeats are the rejections")
    write_records(folder / "records.jsonl", records)

    if any((folder / "run" / name).exists() for name in ("run.json", "settings.json")):
        remove_folder(folder / "run")
    config = walk_config(None, {"save_strategy": "no"})(folder / "run")
    report = train(folder / "records.jsonl", base, config, console=console)
    with console.status("exporting to GGUF, and checking it against the model"):
        export(str(folder / "run"), folder / "model.gguf", engine=engine)

    console.print(f"letting both models answer {counted(len(held_out), 'unseen prompt')}")
    before = _measure(base, engine, held_out, console, "measuring the base model")
    after = _measure(resolve(str(folder / "model.gguf")), engine, held_out, console, "measuring the trained model")
    with console.status("measuring drift"):
        texts = demo_data.neutral_texts()
        neutral = [neutral_figures(source, texts) for source in (base, base.with_adapter(folder / "run"))]
    result = {"format": FORMAT, "run": asdict(report), "before": asdict(before), "after": asdict(after)}
    result |= {"neutral_before": neutral[0]._asdict(), "neutral_after": neutral[1]._asdict()}
    write_json(folder / "demo.json", result)
    console.print(_table(report, before, after, neutral, len(held_out) - 1))
    for prompt in _choose_examples(before, after):
        console.print(_side_by_side(prompt, before, after))
    console.print(_next_steps(folder))
    return result


def _answer_prompts(
    open_answer_engine: Callable[[], Engine], key: str, prompts: Sequence[str], console: Console, label: str
) -> list[str]:
    with Progress(console=console, disable=not can_redraw(console), transient=True) as progress:
        task = progress.add_task(label, total=len(prompts))
        return cached_answers(
            open_answer_engine, key, prompts, MAX_ANSWER_TOKENS, lambda done: progress.update(task, completed=done)
        )


def _measure(source: Source, engine: str, held_out: Sequence[str], console: Console, label: str) -> GgufMeasurement:
    def open_answer_engine() -> Engine:
        return open_gguf(str(source.gguf_path), engine, parallel=ENGINE_SLOTS, context=512)

    answers = _answer_prompts(open_answer_engine, f"{engine} {source.fingerprint}", held_out, console, label)
    with console.status(label), closing(open_answer_engine()) as gguf_engine:
        nats, tokens = neutral_nll(gguf_engine, demo_data.neutral_texts())
    return GgufMeasurement(loop_rate(answers[1:]), nats / tokens, dict(zip(held_out, answers, strict=True)))


def _choose_examples(before: GgufMeasurement, after: GgufMeasurement) -> list[str]:
    """ "hello" and two prompts whose base answers loop, if possible ones whose trained answers do not."""
    loops = [prompt for prompt, answer in before.answers.items() if prompt != HELLO and is_looping(answer)]
    loops.sort(key=lambda prompt: is_looping(after.answers[prompt]))
    return [HELLO, *loops[:2]]


def _table(
    report: RunReport,
    before: GgufMeasurement,
    after: GgufMeasurement,
    neutral: Sequence[NeutralFigures],
    prompts: int,
) -> Table:
    base, trained = neutral
    table = Table(title="answers and NLL from the GGUF files, in llama.cpp")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row(f"answers that loop, {prompts} unseen prompts", f"{before.loop_rate:.1%}", f"{after.loop_rate:.1%}")
    table.add_row("neutral text: NLL, nats per token", f"{before.neutral_nll:.3f}", f"{after.neutral_nll:.3f}")
    table.add_row("  KL(before || after), nats per token", "", f"{trained.kl:.3f}")
    table.add_row("  entropy of the next token, nats", f"{base.entropy:.3f}", f"{trained.entropy:.3f}")
    table.add_row("loss on the rejections, as trained", f"{report.loss_start:.4f}", f"{report.loss_final:.4f}")
    table.add_row("loss floor: irreducible", "", f"{report.loss_floor:.4f}")
    start_gap = report.loss_start - report.loss_floor
    table.add_row("optimality gap", f"{start_gap:.4f}", f"{report.optimality_gap:.4f}")
    table.add_row("steps", "", str(report.steps))
    return table


def _side_by_side(prompt: str, before: GgufMeasurement, after: GgufMeasurement) -> Group:
    panels = [
        Panel(escape(measured.answers[prompt].strip()), title=title, width=58)
        for title, measured in (("before", before), ("after", after))
    ]
    return Group(f"[bold]> {escape(prompt)}[/]", Columns(panels))


def _next_steps(folder: Path) -> str:
    return f"""Next:
    buleyean chat {escape(str(folder))}/model.gguf
    buleyean data import YOUR_LOG.jsonl -o records.jsonl
    buleyean train records.jsonl --model {BUNDLED} -o my-run
    buleyean export my-run -o my-model.gguf"""
