"""What several commands share: options, and how they read and print."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

BUNDLED_DATA = "bundled"
EngineName = Annotated[str, typer.Option("--engine", help="xllamacpp or llama-cpp-python (an extra).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Prompts = Annotated[
    str | None,
    typer.Argument(
        metavar="[PROMPTS]", help="A prompt a line, or JSON Lines with prompt or messages; else the bundled."
    ),
]
Judges = Annotated[
    list[str] | None,
    typer.Option(
        "--judge",
        help="loops (the default), length:MIN-MAX, refusal, regex:PATTERN, words:FILE, language:CODE, llm:URL#MODEL, "
        "python:MODULE:FUNCTION, person, or an installed one. Several vote.",
    ),
]


def read_prompts_or_bundled(path: str | None, bundled: str) -> list[Any]:
    """The prompts of a file, or the bundled ones of a split."""
    from pathlib import Path

    from buleyean_rl import demo_data
    from buleyean_rl.data.prompts import read_prompts

    if path is not None:
        return list(read_prompts(Path(path)))
    return demo_data.mine_prompts() if bundled == "mine" else demo_data.held_out_prompts()


def find_judges(names: Sequence[str] | None, rubric: str | None) -> list[Any]:
    """The judges of these names, `loops` without any; an LLM judge goes by the rubric file."""
    from pathlib import Path

    from buleyean_rl.mining.judges import find_judge

    text = Path(rubric).read_text(encoding="utf-8") if rubric is not None else None
    return [find_judge(name, rubric=text) for name in names or ["loops"]]


def default_temperature(samples: int, given: float | None) -> float:
    """Greedy for one sample, 0.8 for several, unless given."""
    return given if given is not None else 0.0 if samples == 1 else 0.8


def stderr_console() -> Any:
    """Where progress goes: stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def print_json(value: dict[str, Any], wanted: bool) -> None:
    """One JSON object on stdout, if wanted."""
    if wanted:
        print(json.dumps(value, allow_nan=False))


def print_report(lines: Sequence[str], as_json: dict[str, Any] | None) -> None:
    """Print a report: the lines on stderr, the JSON object, if wanted, on stdout."""
    for line in lines:
        print(line, file=sys.stderr)
    if as_json is not None:
        print_json(as_json, True)


@contextmanager
def running_count(what: str) -> Iterator[Callable[[int], object] | None]:
    """A running count on stderr, if somebody watches."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console

    with Console(stderr=True).status(what) as status:
        yield lambda count: status.update(f"{count:,} {what}")
