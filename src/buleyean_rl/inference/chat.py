"""Talk to GGUF files in the terminal: one answer, a conversation, or two models side by side.

    ask(engine, ...)       one answer, streamed as plain text, for scripts
    talk(models, ...)      a conversation; two models both answer, side by side
    open_models(paths)     open GGUF files, close them at the end

Every model has a conversation of its own and does not see the other's answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from buleyean_rl.errors import EngineError
from buleyean_rl.inference.gguf_engines import DEFAULT_ENGINE, open_gguf
from buleyean_rl.inference.protocol import Engine, Sampling

CHAT_SAMPLING = Sampling(max_tokens=512, temperature=0.7)
HELP = "/new starts over, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


@dataclass
class ChatModel:
    """A model in a conversation: its name, its engine, and the messages so far."""

    name: str
    engine: Engine
    messages: list[dict[str, str]] = field(default_factory=list)


@contextmanager
def open_models(
    paths: Sequence[Path | str], context: int | None = None, engine: str = DEFAULT_ENGINE
) -> Iterator[list[ChatModel]]:
    """Open GGUF files; they are freed when the block ends.

    Args:
        paths: of the files, whose names the models get.
        context: maximum tokens of a conversation; None for the model's own, as memory allows.
        engine: one of `gguf_engines.ENGINES`.

    Raises:
        EngineError: a file is missing, is not GGUF, is damaged, or llama.cpp cannot run it.
    """
    with ExitStack() as stack:
        models = []
        for path in paths:
            gguf = open_gguf(path, engine, context=context)
            stack.callback(gguf.close)
            models.append(ChatModel(Path(path).stem, gguf))
        yield models


def ask(
    engine: Engine, prompt: str, out: TextIO, *, system: str | None = None, sampling: Sampling = CHAT_SAMPLING
) -> str:
    """Stream one answer to `out`, followed by a newline.

    Returns:
        The answer.
    """
    pieces = []
    for piece in engine.generate(initial_messages(prompt, system), sampling):
        pieces.append(piece)
        out.write(piece)
        out.flush()
    out.write("\n")
    out.flush()
    return "".join(pieces)


def compare(
    models: Sequence[ChatModel],
    prompt: str,
    console: Console,
    *,
    system: str | None = None,
    sampling: Sampling = CHAT_SAMPLING,
) -> list[str]:
    """Show one answer of every model, side by side.

    Returns:
        The answers, in the order of the models.
    """
    for model in models:
        model.messages = initial_messages(prompt, system)
    return _stream_answers(models, console, sampling)


def talk(
    models: Sequence[ChatModel],
    console: Console,
    *,
    system: str | None = None,
    sampling: Sampling = CHAT_SAMPLING,
    read: Callable[[], str] | None = None,
) -> None:
    """Hold a conversation until `/exit` or the end of input.

    Args:
        models: all of them answer.
        console: to print on.
        system: the system message.
        sampling: of every answer.
        read: returns the next line, raises EOFError at the end; None reads from the console.
    """
    read = read or (lambda: console.input("[bold]> [/bold]"))
    console.print(f"[dim]{escape(' and '.join(model.name for model in models))}. {HELP}[/dim]")
    _reset(models, system)
    while True:
        try:
            line = read().strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line in ("/exit", "/quit", "/bye"):
            return
        if line == "/new":
            _reset(models, system)
            console.print("[dim]a new conversation[/dim]")
        elif line.startswith("/"):
            console.print(f"[dim]{HELP}[/dim]")
        elif line:
            _answer_line(models, line, console, sampling)


def initial_messages(prompt: str, system: str | None = None) -> list[dict[str, str]]:
    """An optional system message and the user's prompt."""
    return [*_system_messages(system), {"role": "user", "content": prompt}]


def _system_messages(system: str | None) -> list[dict[str, str]]:
    return [] if system is None else [{"role": "system", "content": system}]


def _reset(models: Sequence[ChatModel], system: str | None) -> None:
    for model in models:
        model.messages = _system_messages(system)


def _answer_line(models: Sequence[ChatModel], line: str, console: Console, sampling: Sampling) -> None:
    """Add the user's line and the answers to the conversations; after an error, restore them."""
    previous = [list(model.messages) for model in models]
    for model in models:
        model.messages.append({"role": "user", "content": line})
    try:
        answers = _stream_answers(models, console, sampling)
    except EngineError as error:
        console.print(Text(f"{error} (/new starts over)", style="red"))
        for model, messages in zip(models, previous, strict=True):
            model.messages = messages
        return
    for model, answer in zip(models, answers, strict=True):
        model.messages.append({"role": "assistant", "content": answer})


def _stream_answers(models: Sequence[ChatModel], console: Console, sampling: Sampling) -> list[str]:
    """Show every model's answer as it comes; Ctrl-C ends it early."""
    answers = [""] * len(models)

    def generate(show: Callable[[], Any]) -> None:
        for index, model in enumerate(models):
            try:
                with closing(model.engine.generate(model.messages, sampling)) as pieces:
                    for piece in pieces:
                        answers[index] += piece
                        show()
            except KeyboardInterrupt:
                return

    if len(models) == 1:
        shown = 0

        def stream() -> None:
            nonlocal shown
            console.print(Text(answers[0][shown:]), end="", soft_wrap=True)
            shown = len(answers[0])

        generate(stream)
        console.print()
        return answers
    with Live(console=console, auto_refresh=False, vertical_overflow="ellipsis") as live:
        generate(lambda: live.update(_side_by_side(models, answers), refresh=True))
        live.update(_side_by_side(models, answers), refresh=True)
    return answers


def _side_by_side(models: Sequence[ChatModel], answers: Sequence[str]) -> Table:
    """One panel per model, of equal widths."""
    row = Table.grid(expand=True)
    for _ in models:
        row.add_column(ratio=1)
    row.add_row(*(Panel(Text(answer), title=escape(model.name)) for model, answer in zip(models, answers, strict=True)))
    return row
