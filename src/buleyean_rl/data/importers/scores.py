"""Rows that carry a verdict: traces with scores, and tables whose columns the user names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from buleyean_rl.data.records import Row, pick
from buleyean_rl.data.records.record import fail, keys_of, kind_of
from buleyean_rl.errors import UsageError

ROLES = ("prompt", "answer", "score", "system")
GOOD_WORDS = {"true", "yes", "good", "up", "like", "liked", "positive", "accept", "accepted", "pass", "👍", "correct"}
BAD_WORDS = {
    "false",
    "no",
    "bad",
    "down",
    "dislike",
    "disliked",
    "negative",
    "reject",
    "rejected",
    "fail",
    "👎",
    "incorrect",
}


@dataclass(frozen=True)
class Choices:
    """What the user says of rows that do not speak for themselves.

    Args:
        columns: role -> the column that has it; roles are `ROLES`.
        score: the score that counts, where a trace has several.
        below: a score below it is a rejection.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    score: str | None = None
    below: float = 0.5

    def __post_init__(self) -> None:
        unknown = set(self.columns) - set(ROLES)
        if unknown:
            raise UsageError(f"no role {', '.join(sorted(unknown))}: a column may be {', '.join(ROLES)}")
        missing = {"prompt", "answer"} - set(self.columns)
        if self.columns and missing:
            raise UsageError(f"no column for {' and '.join(sorted(missing))}: add --column {min(missing)}=NAME")
        if not math.isfinite(self.below):
            raise UsageError(f"--below {self.below}: it must be a number")


def is_bad(value: Any, below: float, name: str) -> bool:
    """Whether a score, a label or a word rejects.

    Args:
        value: a number, true or false, or a word such as `down`; numbers may be texts.
        below: a number below it rejects.
        name: what to call it in an error.

    Raises:
        RecordError: it is none of these.
    """
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        word = value.strip().lower().replace("thumbs_", "").replace("thumbs ", "").replace("thumbs-", "")
        if word in GOOD_WORDS | BAD_WORDS:
            return word in BAD_WORDS
        try:
            value = float(word)
        except ValueError:
            fail(f"{name} is {value.strip()[:40]!r}: it must be a number, or a word such as up, down, good or bad")
    if not isinstance(value, int | float) or not math.isfinite(value):
        fail(f"{name} is {kind_of(value)}: it must be a finite number, true or false, or a word such as up or down")
    return value < below


def trace_scores(row: Row, choices: Choices) -> list[tuple[str, Any]]:
    """The (name, value) scores of a trace.

    Langfuse has a list `scores`, LangSmith `feedback_stats` with means by name, or a list `feedback`; a plain
    `score` is taken too.

    Args:
        row: the trace.
        choices: which of them count.

    Raises:
        RecordError: several names and none chosen.
    """
    found: list[tuple[str, Any]] = []
    for name in ("scores", "feedback"):
        value = row.get(name)
        for entry in value if isinstance(value, list) else []:
            if isinstance(entry, Mapping):
                said = pick(entry, "value", "score")
                said = said if said is not None else pick(entry, "stringValue", "string_value")
                if said is not None:
                    found.append((str(pick(entry, "name", "key") or "score"), said))
        if isinstance(value, Mapping):
            found += [(key, said) for key, said in value.items() if said is not None]
    stats = row.get("feedback_stats")
    if isinstance(stats, Mapping):
        means = ((key, entry.get("avg")) for key, entry in stats.items() if isinstance(entry, Mapping))
        found += [(key, mean) for key, mean in means if mean is not None]
    if row.get("score") is not None:
        found.append(("score", row["score"]))
    if choices.score is not None:
        return [(name, value) for name, value in found if name == choices.score]
    names = sorted({name for name, _ in found})
    if len(names) > 1:
        fail(f"has the scores {', '.join(names)}: choose one with --score")
    return found


def trace_prompt(value: Any) -> Any:
    """What was asked, as a text or a list of messages, out of a trace's input."""
    if isinstance(value, Mapping):
        for name in ("messages", "question", "prompt", "input", "query", "text", "content"):
            if value.get(name):
                return trace_prompt(value[name])
        if len(value) == 1:
            return trace_prompt(next(iter(value.values())))
        fail(f"its input has no prompt (its keys: {keys_of(value)})")
    if isinstance(value, list):
        # LangSmith nests a batch of one conversation
        return (
            trace_prompt(value[0]) if len(value) == 1 and isinstance(value[0], list) else [_message(m) for m in value]
        )
    return value


def trace_answer(value: Any) -> Any:
    """What was answered, as a text, out of a trace's output."""
    if isinstance(value, Mapping):
        for name in ("content", "answer", "output", "text", "completion", "response", "message", "kwargs"):
            if value.get(name) is not None:
                return trace_answer(value[name])
        for name in ("messages", "choices", "generations"):
            if value.get(name):
                return trace_answer(value[name])
        if len(value) == 1:
            return trace_answer(next(iter(value.values())))
        fail(f"its output has no answer (its keys: {keys_of(value)})")
    if isinstance(value, list) and value:
        return trace_answer(value[-1])
    return value


def _message(value: Any) -> Any:
    """A message as role and content; LangChain calls the roles human and ai, and wraps them twice."""
    if not isinstance(value, Mapping):
        return value
    inner = next((value[name] for name in ("kwargs", "data") if isinstance(value.get(name), Mapping)), value)
    role = inner.get("role") or inner.get("type") or value.get("type")
    known = {"human": "user", "ai": "assistant"}
    return {"role": known.get(role, role) if isinstance(role, str) else role, "content": inner.get("content")}


def without_last_answers(prompt: Any) -> Any:
    """A prompt that a trace logged with the answer at its end, without it."""
    if isinstance(prompt, list):
        while prompt and isinstance(prompt[-1], Mapping) and prompt[-1].get("role") == "assistant":
            prompt = prompt[:-1]
    return prompt


def cells(row: Row, choices: Choices) -> Iterator[tuple[str, Any]]:
    """The (role, value) pairs of a table's row."""
    for role, column in choices.columns.items():
        if column not in row:
            fail(f"has no column {column!r} (its columns: {keys_of(row)})")
        yield role, row[column]
