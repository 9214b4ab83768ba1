"""Options, input and output that several commands share."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

INTERRUPTED = 130  # the exit code, which typer makes of KeyboardInterrupt, too
BUNDLED_DATA = "bundled"
DEFAULT_JUDGE = "loops"
BUNDLED_MODEL = "smollm2-135m"
EngineName = Annotated[str, typer.Option("--engine", help="xllamacpp or llama-cpp-python (an extra).")]
Context = Annotated[
    int | None,
    typer.Option(
        min=2,
        metavar="TOKENS",
        help="Maximum tokens of a prompt and its answer; default, and at most: the model's own, as memory allows.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there already.")]
Prompts = Annotated[
    str,
    typer.Argument(
        metavar="[PROMPTS]", help="A prompt a line, or JSON Lines with prompt or messages; default: bundled."
    ),
]
Judges = Annotated[
    list[str] | None,
    typer.Option(
        "--judge",
        help="loops (the default), length:MIN-MAX, refusal, regex:PATTERN, words:FILE, language:CODE, llm:URL#MODEL, "
        "python:MODULE:FUNCTION, person, or an installed judge; repeatable: several vote.",
    ),
]


class Interrupted(Exception):
    """Ctrl-C, with where the command stands, and the words that it needs to go on; typer would drop them."""


def stderr_console() -> Any:
    """A console on stderr, for progress; piped, it breaks no lines."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


def print_json(value: dict[str, Any], enabled: bool) -> None:
    """Print one JSON object on stdout, if enabled."""
    if enabled:
        print(json.dumps(value, allow_nan=False))


def print_report(lines: Sequence[str], as_json: dict[str, Any] | None) -> None:
    """Print a report: the lines on stderr, the JSON object, if any, on stdout."""
    for line in lines:
        print(line, file=sys.stderr)
    if as_json is not None:
        print_json(as_json, True)


def announce(line: str) -> None:
    """Print, on stderr, what is about to be done, before what it needs is loaded."""
    print(line, file=sys.stderr, flush=True)


def print_next(*words: object) -> None:
    """Print, on stderr, the command that people give next, spelled so that it runs where they are."""
    from buleyean_rl.system.program import command_line

    print(f"Next: {command_line(*words)}", file=sys.stderr)
