"""A person at the terminal: an answer, a key, the next answer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

import typer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from buleyean_rl.errors import UsageError
from buleyean_rl.mining.judges.protocol import Answer, Verdict, last_message

HELP = "[r]eject  [a]ccept  [p]art of it  [s]kip  [b]ack  [q]uit: verdicts so far stay"


class PersonJudge:
    """One key an answer.

    Args:
        console: where answers are shown; stderr if None.
        read_key: returns the next key; the terminal's if None.
        read_line: returns the words that are wrong, after the key `p`.
    """

    name = "person"
    asks_person = True

    def __init__(
        self,
        console: Console | None = None,
        read_key: Callable[[], str] | None = None,
        read_line: Callable[[str], str] | None = None,
    ) -> None:
        if read_key is None and not sys.stdin.isatty():
            raise UsageError("the judge `person` needs a terminal: run it without redirecting its input")
        self._console = console or Console(stderr=True, highlight=False)
        self._read_key = read_key or typer.getchar
        self._read_line = read_line or self._console.input

    def judge(self, answers: Sequence[Answer]) -> Iterator[tuple[int, Verdict]]:
        """Until all are judged, or the person quits.

        Raises:
            KeyboardInterrupt: the person quits.
        """
        self._console.print(HELP, style="dim", markup=False)
        index = 0
        while index < len(answers):
            answer = answers[index]
            self._console.print(
                Text(f"\n{index + 1}/{len(answers)}  {_printable(last_message(answer.prompt))}", style="bold")
            )
            self._console.print(Panel(Text(_printable(answer.text.strip()) or "(nothing)")))
            match self._ask_key():
                case "r" | "x" | "n":
                    yield index, Verdict(True)
                case "a" | "y":
                    yield index, Verdict(False)
                case "s":
                    yield index, Verdict(None, (), "skipped")
                case "p":
                    span = self._ask_part(answer.text)
                    if span is None:
                        continue
                    yield index, Verdict(True, (span,))
                case "b":
                    index = max(0, index - 1)
                    continue
                case "q" | "\x03" | "\x04" | "":
                    raise KeyboardInterrupt
                case _:
                    self._console.print(HELP, style="dim", markup=False)
                    continue
            index += 1

    def _ask_key(self) -> str:
        try:
            return self._read_key().lower()
        except EOFError:  # the terminal has gone
            return ""

    def _ask_part(self, text: str) -> tuple[int, int] | None:
        try:
            words = self._read_line("which words are wrong? ").strip()
        except EOFError:
            words = ""
        start = text.lower().find(words.lower()) if words else -1
        if start < 0:
            self._console.print("the answer has no such words", style="dim")
            return None
        return start, start + len(words)


def _printable(text: str) -> str:
    """A text without what would move the terminal's cursor or change its colours."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
