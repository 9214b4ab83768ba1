"""Options, input and output that several commands share."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from buleyean_rl.system.launcher import is_first

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
        print_line(line)
    if as_json is not None:
        print_json(as_json, True)


def print_line(line: str) -> None:
    """Print a line on stderr, on a terminal broken between words."""
    print(fit(line, len(line) - len(line.lstrip())) if sys.stderr.isatty() else line, file=sys.stderr, flush=True)


def fit(line: str, indent: int) -> str:
    """A line, broken between words where the terminal is narrower, with spaces before what follows."""
    width = shutil.get_terminal_size().columns
    if len(line) <= width:
        return line
    following = " " * indent
    return textwrap.fill(line, width, subsequent_indent=following, break_long_words=False, break_on_hyphens=False)


@contextmanager
def announced(line: str) -> Iterator[None]:
    """Say, on stderr, what is about to be done, and that it begins, while what it needs is imported: seconds.

    Of several processes the first says it.
    """
    if not is_first():
        yield
        return
    print_line(line)
    from buleyean_rl.system.progress import working
    from buleyean_rl.system.terminal import can_redraw

    console = stderr_console()
    if not can_redraw(console):  # the line stands there already
        yield
        return
    with working(console, "starting"):
        yield


def print_next(*words: object) -> None:
    """Print, on stderr, the command that people give next, spelled so that it runs where they are."""
    from buleyean_rl.system.program import command_line

    print(f"Next: {command_line(*words)}", file=sys.stderr)
