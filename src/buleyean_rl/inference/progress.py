"""Progress of many answers, by their tokens: a bar that does not wait for the longest answer.

How many tokens are to come nobody knows: answers end early. They are taken to end at one rate in every token, the rate
seen so far.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from urllib.parse import urlsplit

from rich.console import Console

from buleyean_rl.inference.protocol import Answer, Completer, Messages, Outcome, Sampling, ServerReport
from buleyean_rl.system.progress import ProgressBar


class AnswerProgress:
    """A bar of answers that are computed.

    Args:
        console: where it is shown.
        label: of what answers.
        answers: to compute.
        max_tokens: of an answer.
        earlier: answers from before, shown as done.
        servers: that compute them; of several it is shown what each did.
    """

    def __init__(
        self,
        console: Console,
        label: str,
        answers: int,
        max_tokens: int,
        earlier: int = 0,
        servers: Sequence[ServerReport] = (),
    ) -> None:
        self._bar = ProgressBar(console, label, answers * max_tokens)
        self._answers, self._max_tokens, self._earlier = answers, max_tokens, earlier
        self._servers = servers if len(servers) > 1 else ()
        self._lock, self._started = threading.Lock(), time.monotonic()
        self._tokens = self._finished_tokens = self._finished = self._ended = 0

    def add_tokens(self, count: int) -> None:
        """Tokens were drawn."""
        with self._lock:
            self._tokens += count
        self._show()

    def add_outcome(self, outcome: Outcome) -> None:
        """An answer has come, or there is none."""
        with self._lock:
            self._finished += 1
            if isinstance(outcome, Answer):
                self._finished_tokens += outcome.tokens or 0
                self._ended += outcome.ended
        self._show()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def _show(self) -> None:
        done, total = self._earlier + self._finished, self._earlier + self._answers
        speed = self._tokens / max(time.monotonic() - self._started, 1e-9)
        figures = f"{speed:,.0f} tokens/s" if self._tokens else ""
        if self._servers:
            figures = "; ".join([figures, ", ".join(map(describe_server, self._servers))]).removeprefix("; ")
        if not self._tokens:  # an engine that does not count them
            self._bar.update(self._finished, self._answers, f"{done:,} of {total:,} answers", figures)
            return
        self._bar.update(self._tokens, self._tokens + self._tokens_left(), f"{done:,} of {total:,} answers", figures)

    def _tokens_left(self) -> float:
        """Tokens that are to come, if answers end at the rate seen so far, and at `max_tokens` at the latest."""
        unfinished, rate = self._answers - self._finished, self._ended / self._tokens
        if not unfinished:
            return 0.0
        drawn = (self._tokens - self._finished_tokens) / unfinished  # of each, on average
        most = max(self._max_tokens - drawn, 0.0)
        return unfinished * (-math.expm1(-rate * most) / rate if rate else most)


def describe_server(server: ServerReport) -> str:
    """A server and how many answers it gave, for people."""
    return f"{urlsplit(server.url).netloc} {server.answers:,}{' (given up)' if server.given_up else ''}"


def answer_all(
    engine: Completer,
    conversations: Sequence[Messages],
    sampling: Sampling,
    console: Console,
    label: str,
) -> list[Outcome]:
    """The answers to many conversations in their order, with a bar of their tokens.

    Args:
        engine: that answers.
        conversations: a list of messages each.
        sampling: for all of them.
        console: where the bar is shown.
        label: of the bar.

    Raises:
        EngineError: the engine failed.
    """
    outcomes: dict[int, Outcome] = {}
    with closing(AnswerProgress(console, label, len(conversations), sampling.max_tokens)) as progress:
        for index, outcome in engine.answers(conversations, sampling, on_tokens=progress.add_tokens):
            outcomes[index] = outcome
            progress.add_outcome(outcome)
    return [outcomes[index] for index in range(len(conversations))]
