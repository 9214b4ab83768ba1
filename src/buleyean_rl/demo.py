"""The whole pipeline on the bundled model and prompts.

    base answers --reject loops--> records --train--> adapter --export--> GGUF
         |                                              |                  |
         +---------------------- table -----------------+---- a sample ----+

Base and trained model answer in the decoder of this package, which is many times as fast as llama.cpp at many answers.
That the GGUF is the trained model its parity gate proves; some answers come from it, in llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from buleyean_rl import demo_data
from buleyean_rl.data.records import write_records
from buleyean_rl.evaluation.drift import TITLES, as_drifts
from buleyean_rl.evaluation.repetition import is_looping, loop_rate
from buleyean_rl.gguf.export import export
from buleyean_rl.inference.gguf_engines import DEFAULT_ENGINE, open_gguf
from buleyean_rl.inference.open import engine_of
from buleyean_rl.inference.protocol import Engine
from buleyean_rl.mining.answer_cache import cached_answers
from buleyean_rl.mining.votes import judge_loops
from buleyean_rl.mining.walk import walk_config
from buleyean_rl.models.model import Model, open_model
from buleyean_rl.models.source import BUNDLED, Source, resolve
from buleyean_rl.system.disk import name_full_disk
from buleyean_rl.system.files import read_json_object, remove_folder, write_json
from buleyean_rl.system.outputs import claim_folder
from buleyean_rl.system.program import command_line
from buleyean_rl.system.progress import working
from buleyean_rl.system.wording import counted
from buleyean_rl.training.report import RunReport
from buleyean_rl.training.run import train

FORMAT = 4  # of demo.json
MINED_TOKENS, MAX_ANSWER_TOKENS = 256, 128  # of the answers that are learnt from, and that are compared
HELLO = "hello"
SAMPLE = 16  # answers from the GGUF, beside "hello", all at once


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
class Answers:
    """Greedy answers of a model, or of a file.

    Args:
        loop_rate: share of looping answers, "hello" left out.
        answers: to "hello" and to held-out prompts.
    """

    loop_rate: float
    answers: dict[str, str]


def run_demo(
    folder: Path, *, quick: bool = False, engine: str = DEFAULT_ENGINE, console: Console | None = None
) -> dict[str, Any]:
    """Run the demo and print the results.

    Args:
        folder: new, empty or of an earlier demo, which is replaced; gets `records.jsonl`, `run/`, `model.gguf` and
            `demo.json`.
        quick: less data, fewer steps.
        engine: checks the file and lets it answer, one of `gguf_engines.ENGINES`.
        console: for progress and the table; None for no output.

    Returns:
        The contents of `demo.json`: the run, and the answers of both models and of the file.

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

    console.print(f"{BUNDLED} answers {counted(len(prompts), 'prompt')}, and {len(held_out):,} unseen ones to compare")
    model = open_model(base, keep_adapter=True)
    records = judge_loops(prompts, _answer(model.base, prompts, MINED_TOKENS, console, "the base model"))
    looping = sum(record.rejects for record in records)
    console.print(f"{looping} of {counted(len(prompts), 'answer')} loop: their repeats are the rejections")
    write_records(folder / "records.jsonl", records)

    if any((folder / "run" / name).exists() for name in ("run.json", "settings.json")):
        remove_folder(folder / "run")
    config = walk_config(None, {"save_strategy": "no"})(folder / "run")
    report = train(folder / "records.jsonl", model.base, config, console=console)
    trained = model.with_source(base.with_adapter(folder / "run"))
    before, after = (
        _make_answers(held_out, _answer(each, held_out, MAX_ANSWER_TOKENS, console, label))
        for each, label in ((model.base, "the base model"), (trained, "the trained model"))
    )
    with working(console, "exporting to GGUF, and checking it against the model"):
        export(str(folder / "run"), folder / "model.gguf", engine=engine)
    sample = held_out[: SAMPLE + 1]
    file = resolve(str(folder / "model.gguf"))
    open_file = partial(open_gguf, str(file.gguf_path), engine, parallel=len(sample), context=512)
    key, label = f"{engine} {file.fingerprint}", "model.gguf in llama.cpp"
    from_file = _make_answers(sample, cached_answers(open_file, key, sample, MAX_ANSWER_TOKENS, console, label))

    compared = {"before": before, "after": after, "gguf": from_file}
    result = {"format": FORMAT, "run": asdict(report)} | {name: asdict(each) for name, each in compared.items()}
    write_json(folder / "demo.json", result)
    console.print(_table(report, before, after, from_file))
    console.print(_side_by_side(HELLO, before.answers, from_file.answers, "after, in llama.cpp"))
    for prompt in _choose_examples(before, after):
        console.print(_side_by_side(prompt, before.answers, after.answers, "after"))
    console.print(_next_steps(folder))
    return result


def _answer(model: Model, prompts: Sequence[str], max_tokens: int, console: Console, label: str) -> list[str]:
    """Answers of a model, or of a run, whose adapter is not merged: that would round it to bf16."""

    def open_adapted() -> Engine:
        with working(console, f"loading {model.source.name}"):
            engine = engine_of(model)
        console.print(escape(model.describe()))
        return engine

    key = f"adapter kept {model.source.fingerprint}"
    return cached_answers(open_adapted, key, prompts, max_tokens, console, f"{label} answers")


def _make_answers(prompts: Sequence[str], answers: Sequence[str]) -> Answers:
    return Answers(loop_rate(answers[1:]), dict(zip(prompts, answers, strict=True)))


def _choose_examples(before: Answers, after: Answers) -> list[str]:
    """Two prompts whose base answers loop, if possible ones whose trained answers do not."""
    loops = [prompt for prompt, answer in before.answers.items() if prompt != HELLO and is_looping(answer)]
    loops.sort(key=lambda prompt: is_looping(after.answers[prompt]))
    return loops[:2]


def _table(report: RunReport, before: Answers, after: Answers, from_file: Answers) -> Table:
    prompts, sample = len(before.answers) - 1, len(from_file.answers) - 1
    table = Table(title=f"before and after training, and {sample} answers from model.gguf in llama.cpp")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row(f"answers that loop, {prompts} unseen prompts", f"{before.loop_rate:.1%}", f"{after.loop_rate:.1%}")
    in_model = loop_rate([before.answers[prompt] for prompt in list(from_file.answers)[1:]])
    table.add_row(f"  the first {sample}, after from model.gguf", f"{in_model:.1%}", f"{from_file.loop_rate:.1%}")
    for kind, drift in as_drifts(report.drift).items():
        table.add_row(f"{TITLES[kind]}: KL(before || after), nats per token", "", f"{drift.kl:.3f}")
        table.add_row("  entropy of the next token, nats", f"{drift.entropy_base:.3f}", f"{drift.entropy:.3f}")
        table.add_row("  NLL, nats per token", f"{drift.nll_base:.3f}", f"{drift.nll:.3f}")
    table.add_row("loss on the rejections, as trained", f"{report.loss_start:.4f}", f"{report.loss_final:.4f}")
    table.add_row("loss floor: irreducible", "", f"{report.loss_floor:.4f}")
    start_gap = report.loss_start - report.loss_floor
    table.add_row("optimality gap", f"{start_gap:.4f}", f"{report.optimality_gap:.4f}")
    table.add_row("steps", "", str(report.steps))
    return table


def _side_by_side(prompt: str, before: Mapping[str, str], after: Mapping[str, str], after_title: str) -> Group:
    panels = [
        Panel(escape(answers[prompt].strip()), title=title, width=58)
        for title, answers in (("before", before), (after_title, after))
    ]
    return Group(f"[bold]> {escape(prompt)}[/]", Columns(panels))


def _next_steps(folder: Path) -> str:
    commands = (
        ("chat", folder / "model.gguf"),
        ("data", "import", "YOUR_LOG.jsonl", "-o", "records.jsonl"),
        ("train", "records.jsonl", "--model", BUNDLED, "-o", "my-run"),
        ("export", "my-run", "-o", "my-model.gguf"),
    )
    return "\n".join(["Next:", *(f"    {escape(command_line(*words))}" for words in commands)])
