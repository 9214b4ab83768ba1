"""An engine that repeats what it is told."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from buleyean_rl.inference.protocol import GREEDY, Answer, BaseEngine, OnTokens, Outcome, Sampling


class Parrot(BaseEngine):
    """An engine that says a prompt back in capitals, and counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, Sampling]] = []
        self.closed = 0

    def answers(
        self,
        conversations: Sequence[Any],
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,  # noqa: ARG002
        on_tokens: OnTokens | None = None,  # noqa: ARG002
    ) -> Generator[tuple[int, Outcome]]:
        self.asked.append((conversations, sampling))
        for index, conversation in enumerate(conversations):
            yield index, Answer(conversation[-1]["content"].upper(), None, True)

    def close(self) -> None:
        self.closed += 1
