"""A person at the terminal: an answer, a key, the next answer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

import typer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from buleyean_rl.data.records.rejecting import find_part
from buleyean_rl.errors import UsageError
from buleyean_rl.mining.judges.protocol import Answer, Verdict, last_message
from buleyean_rl.system.terminal import printable
from buleyean_rl.system.wording import counted

HELP = "[n]o: reject  [y]es: accept  [p]art of it is wrong  [s]kip  [u]ndo  [q]uit: verdicts so far stay"
SKIPPED = Verdict(None, (), "skipped")
LEAVING = ("q", "\x03", "\x04", "")  # Ctrl-C and Ctrl-D too, and a terminal that has gone


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
        """Until all are judged, or the person leaves. The last verdict of all can be taken back, too.

        A verdict is yielded with the next key, so that `u` can take it back. One that was yielded stands until it is
        given anew.

        Raises:
            KeyboardInterrupt: the person leaves; all verdicts are yielded before.
        """
        self._say(HELP)
        judged: list[Verdict] = []
        yielded = recorded = 0
        while answers:
            index = len(judged)
            if index < len(answers):
                self._show(answers[index], f"{index + 1}/{len(answers)}")
            else:
                self._say(f"all {len(answers):,} are judged: any key ends, [u] takes the last one back")
            key = self._ask_key()
            if key == "u":
                if judged:
                    self._say(f"taken back: {judged.pop().outcome}")
                else:
                    self._say("nothing to take back")
                continue
            verdict = self._judge_by(key, answers[index]) if index < len(answers) else None
            is_leaving = key in LEAVING or index == len(answers)
            if verdict is not None or is_leaving:
                first = min(yielded, len(judged))
                yield from ((k, judged[k]) for k in range(first, len(judged)))
                yielded = len(judged)
                recorded = max(recorded, yielded)
            if verdict is not None:
                judged.append(verdict)
            elif index == len(answers):
                return
            elif is_leaving:
                self._say(f"{recorded:,} of {counted(len(answers), 'verdict')} kept")
                raise KeyboardInterrupt

    def _judge_by(self, key: str, answer: Answer) -> Verdict | None:
        """The verdict that a key stands for, which is shown; None for a key that judges nothing."""
        match key:
            case "n":
                verdict, said = Verdict(True), "rejected"
            case "y":
                verdict, said = Verdict(False), "accepted"
            case "s":
                verdict, said = SKIPPED, "skipped"
            case "p":
                span = self._ask_part(answer.text)
                if span is None:
                    return None
                verdict, said = Verdict(True, (span,)), f"rejected: {answer.text[slice(*span)]!r}"
            case _:
                if key not in LEAVING:
                    self._say(HELP)
                return None
        self._say(said)
        return verdict

    def _show(self, answer: Answer, place: str) -> None:
        self._console.print(Text(f"\n{place}  {printable(last_message(answer.prompt))}", style="bold"))
        self._console.print(Panel(Text(printable(answer.text.strip()) or "(nothing)")))

    def _say(self, text: str) -> None:
        self._console.print(Text(text, style="dim"))

    def _ask_key(self) -> str:
        try:
            return self._read_key().lower()
        except (EOFError, KeyboardInterrupt):  # the terminal has gone, or its Ctrl-C is no key
            return ""

    def _ask_part(self, text: str) -> tuple[int, int] | None:
        try:
            words = self._read_line("which words are wrong? ")
        except EOFError:
            words = ""
        if (span := find_part(text, words)) is None:
            self._say("the answer has no such words")
        return span
