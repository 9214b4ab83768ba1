"""What a judge is: answers in, verdicts out; and a function as a judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from buleyean_rl.data.records import Prompt, Spans, make_record
from buleyean_rl.errors import RecordError, UsageError

OUTCOMES = ("rejected", "accepted", "abstained")


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
    """A judge's verdict on an answer.

    Args:
        rejected: None where the judge abstains.
        spans: [start, end) characters that are wrong; () for the whole answer.
        reason: for people.
    """

    rejected: bool | None
    spans: Spans = ()
    reason: str = ""

    @property
    def outcome(self) -> str:
        """One of `OUTCOMES`."""
        return "abstained" if self.rejected is None else "rejected" if self.rejected else "accepted"


class Judge(Protocol):
    """Rejects answers, or accepts them."""

    @property
    def name(self) -> str:
        """Names everything that decides the verdict: two judges of one name agree."""

    @property
    def asks_person(self) -> bool:
        """Whether it needs the terminal for itself."""

    def judge(self, answers: Sequence[Answer]) -> Iterator[tuple[int, Verdict]]:
        """Verdicts as they fall, each with the index of its answer; the last one for an answer counts.

        Args:
            answers: to be judged, in any order.
        """


@dataclass(frozen=True)
class FunctionJudge:
    """A function of a prompt's last message and an answer.

    Args:
        name: see `Judge`.
        function: returns true or false, a list of [start, end) spans (an empty one accepts), a `Verdict`, or
            None to abstain.
    """

    name: str
    function: Callable[[str, str], Any]
    asks_person: bool = False

    def judge(self, answers: Sequence[Answer]) -> Iterator[tuple[int, Verdict]]:
        """One after the other.

        Raises:
            UsageError: the function failed, or returned something else.
        """
        for index, answer in enumerate(answers):
            yield index, self._verdict(answer)

    def _verdict(self, answer: Answer) -> Verdict:
        try:
            value = self.function(last_message(answer.prompt), answer.text)
        except Exception as error:
            raise UsageError(f"judge {self.name} failed: {describe_exception(error)}") from error
        if value is None or isinstance(value, bool):
            return Verdict(value)
        if isinstance(value, list | tuple):
            value = Verdict(bool(value), value)  # type: ignore[arg-type]
        is_verdict = isinstance(value, Verdict) and isinstance(value.rejected, bool | None)
        if not is_verdict or not isinstance(value.reason, str) or not isinstance(value.spans, list | tuple):
            raise UsageError(
                f"judge {self.name} returned {type(value).__name__}: it must be True, False, None, spans or a Verdict"
            )
        try:
            return Verdict(value.rejected, check_spans(answer.text, value.spans), value.reason)
        except RecordError as error:
            raise UsageError(f"judge {self.name}: {error.problem}") from error


def check_spans(text: str, spans: Sequence[Any]) -> Spans:
    """Spans as a record holds them: sorted, within the text, merged where they touch.

    Raises:
        RecordError: they are no spans of this text.
    """
    return make_record("?", [text], spans=[list(spans)]).rejected_spans[0] if spans else ()


def describe_exception(error: Exception) -> str:
    """An exception of somebody else's code, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def last_message(prompt: Prompt) -> str:
    """The message that an answer is to."""
    return prompt if isinstance(prompt, str) else prompt[-1][1]
