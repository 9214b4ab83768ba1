"""Talk to GGUF files in the terminal: one answer, a conversation, or two models side by side.

    ask(engine, ...)       one answer, streamed as plain text: what a script reads
    talk(voices, ...)      a conversation; with two voices each answers, in its own column
    open_voices(paths)     the files as engines, closed again at the end

Every voice has its own conversation: it does not see the other's answers. The command line
chooses among these; nothing here parses arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from buleyean_rl.errors import EngineError
from buleyean_rl.inference.gguf_engines import DEFAULT, open_gguf
from buleyean_rl.inference.protocol import CONTEXT, Engine, Sampling

CHAT = Sampling(max_tokens=512, temperature=0.7)
HELP = "/new starts over, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


@dataclass
class Voice:
    """A model in a conversation: its name, its engine, and the messages so far."""

    name: str
    engine: Engine
    messages: list[dict[str, str]] = field(default_factory=list)


@contextmanager
def open_voices(paths: Sequence[Path | str], context: int = CONTEXT, engine: str = DEFAULT) -> Iterator[list[Voice]]:
    """GGUF files as voices, named after the files; freed when the block ends.

    Args:
        paths: of the files.
        context: tokens of a conversation, at most.
        engine: one of `engines.ENGINES`.

    Raises:
        EngineError: a file is missing, is not GGUF, is damaged, or llama.cpp cannot run it.
    """
    with ExitStack() as stack:
        voices = []
        for path in paths:
            opened = open_gguf(path, engine, context=context)
            stack.callback(opened.close)
            voices.append(Voice(Path(path).stem, opened))
        yield voices


def ask(engine: Engine, prompt: str, out: TextIO, *, system: str | None = None, sampling: Sampling = CHAT) -> str:
    """One answer, written to `out` as it comes, and nothing else but a newline after it.

    Returns:
        The answer.
    """
    pieces = []
    for piece in engine.generate(conversation(prompt, system), sampling):
        pieces.append(piece)
        out.write(piece)
        out.flush()
    out.write("\n")
    out.flush()
    return "".join(pieces)


def compare(
    voices: Sequence[Voice],
    prompt: str,
    console: Console,
    *,
    system: str | None = None,
    sampling: Sampling = CHAT,
) -> list[str]:
    """One answer of every voice, side by side.

    Returns:
        The answers, in the order of the voices.
    """
    for voice in voices:
        voice.messages = conversation(prompt, system)
    return _answer(voices, console, sampling)


def talk(
    voices: Sequence[Voice],
    console: Console,
    *,
    system: str | None = None,
    sampling: Sampling = CHAT,
    read: Callable[[], str] | None = None,
) -> None:
    """A conversation that lasts until the end of input or `/exit`.

    Args:
        voices: one, or several that all answer.
        console: to print on.
        system: what every conversation starts with.
        sampling: for every answer.
        read: gives the next line and raises EOFError at the end; asks on the console if None.
    """
    read = read or (lambda: console.input("[bold]> [/bold]"))
    console.print(f"[dim]{' and '.join(voice.name for voice in voices)}. {HELP}[/dim]")
    _start_over(voices, system)
    while True:
        try:
            line = read().strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line in ("/exit", "/quit", "/bye"):
            return
        if line == "/new":
            _start_over(voices, system)
            console.print("[dim]a new conversation[/dim]")
        elif line.startswith("/"):
            console.print(f"[dim]{HELP}[/dim]")
        elif line:
            _turn(voices, line, console, sampling)


def conversation(prompt: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages that open with an optional system message and end with the user's prompt."""
    opening = [] if system is None else [{"role": "system", "content": system}]
    return [*opening, {"role": "user", "content": prompt}]


def _start_over(voices: Sequence[Voice], system: str | None) -> None:
    """Empty every conversation."""
    for voice in voices:
        voice.messages = [] if system is None else [{"role": "system", "content": system}]


def _turn(voices: Sequence[Voice], line: str, console: Console, sampling: Sampling) -> None:
    """The user's line and every voice's answer; a line that cannot be answered is taken back."""
    before = [list(voice.messages) for voice in voices]
    for voice in voices:
        voice.messages.append({"role": "user", "content": line})
    try:
        answers = _answer(voices, console, sampling)
    except EngineError as error:
        console.print(Text(f"{error} (/new starts over)", style="red"))
        for voice, messages in zip(voices, before, strict=True):
            voice.messages = messages
        return
    for voice, answer in zip(voices, answers, strict=True):
        voice.messages.append({"role": "assistant", "content": answer})


def _answer(voices: Sequence[Voice], console: Console, sampling: Sampling) -> list[str]:
    """Every voice's answer, shown as it comes; Ctrl-C keeps what there is."""
    answers = [""] * len(voices)

    def write(show: Callable[[], Any]) -> None:
        for index, voice in enumerate(voices):
            try:
                with closing(voice.engine.generate(voice.messages, sampling)) as pieces:
                    for piece in pieces:
                        answers[index] += piece
                        show()
            except KeyboardInterrupt:
                return

    if len(voices) == 1:
        shown = 0

        def stream() -> None:
            nonlocal shown
            console.print(Text(answers[0][shown:]), end="", soft_wrap=True)
            shown = len(answers[0])

        write(stream)
        console.print()
        return answers
    with Live(console=console, auto_refresh=False, vertical_overflow="ellipsis") as live:
        write(lambda: live.update(_side_by_side(voices, answers), refresh=True))
        live.update(_side_by_side(voices, answers), refresh=True)
    return answers


def _side_by_side(voices: Sequence[Voice], answers: Sequence[str]) -> Table:
    """One panel per voice, of equal widths, in one row."""
    row = Table.grid(expand=True)
    for _ in voices:
        row.add_column(ratio=1)
    row.add_row(*(Panel(Text(a), title=v.name) for v, a in zip(voices, answers, strict=True)))
    return row
