"""What every judge has in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from buleyean_rl.data.records import Prompt, Spans, make_record
from buleyean_rl.errors import RecordError, UsageError


@dataclass(frozen=True)
class Answer:
    """What is judged.

    Args:
        prompt: what was asked: a text, or (role, content) messages.
        text: the answer.
    """

    prompt: Prompt
    text: str


@dataclass(frozen=True)
class Verdict:
    """What a judge says of an answer.

    Args:
        rejected: None where the judge abstains.
        spans: [start, end) characters that are wrong; () for the whole answer.
        reason: for people.
    """

    rejected: bool | None
    spans: Spans = ()
    reason: str = ""


class Judge(Protocol):
    """Says of each answer whether it is rejected.

    `name` stands for everything that decides the verdict: two judges of one name agree. `asks_person` is
    true where the terminal is needed.
    """

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def asks_person(self) -> bool:
        """Whether somebody has to sit there."""

    def judge(self, answers: Sequence[Answer]) -> Iterator[tuple[int, Verdict]]:
        """Verdicts as they fall, each with the index of its answer; a later one for the same answer counts.

        Args:
            answers: in the order they were given.
        """


@dataclass(frozen=True)
class FunctionJudge:
    """A function of a prompt's last message and an answer.

    Args:
        name: what it is called.
        function: returns true or false, a list of [start, end) spans (an empty one accepts), a `Verdict`, or
            None to abstain.
    """

    name: str
    function: Callable[[str, str], Any]
    asks_person: bool = False

    def judge(self, answers: Sequence[Answer]) -> Iterator[tuple[int, Verdict]]:
        """One after the other."""
        for index, answer in enumerate(answers):
            yield index, self._verdict(answer)

    def _verdict(self, answer: Answer) -> Verdict:
        said = self.function(last_message(answer.prompt), answer.text)
        if isinstance(said, Verdict):
            return said
        if said is None or isinstance(said, bool):
            return Verdict(said)
        if not isinstance(said, list | tuple):
            raise UsageError(
                f"judge {self.name} returned {type(said).__name__}: it must be True, False, None, spans or a Verdict"
            )
        try:
            return Verdict(bool(said), checked_spans(answer.text, said))
        except RecordError as error:
            raise UsageError(f"judge {self.name}: {error.problem}") from error


def checked_spans(text: str, spans: Sequence[Any]) -> Spans:
    """Spans as a record holds them: sorted, within the text, those that touch made one.

    Raises:
        RecordError: they are no spans of this text.
    """
    return make_record("?", [text], spans=[list(spans)]).rejected_spans[0] if spans else ()


def last_message(prompt: Prompt) -> str:
    """What the answer answers."""
    return prompt if isinstance(prompt, str) else prompt[-1][1]
