"""Logged calls with scores, as Langfuse and LangSmith export them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from buleyean_rl.data.importers.protocol import Choices, Discards, Format
from buleyean_rl.data.importers.rows import build_record, read_acceptance
from buleyean_rl.data.importers.scores import is_rejection
from buleyean_rl.data.records import RejectionRecord, Row, pick
from buleyean_rl.data.records.values import fail, list_keys

PROMPT_KEYS = ("messages", "question", "prompt", "input", "query", "text", "content")
ANSWER_KEYS = ("content", "answer", "output", "text", "completion", "response", "message", "kwargs")
ANSWER_LIST_KEYS = ("messages", "choices", "generations")


def _read_records(row: Row, discards: Discards, choices: Choices) -> Iterator[RejectionRecord]:
    """A trace with n scores is n rounds; the bad scores are its count."""
    scores = _choose_scores(row, choices)
    bad_scores = sum(is_rejection(value, choices.below, f"the score {name}") for name, value in scores)
    if not scores:
        discards.without_rejection += 1
        return
    if not bad_scores:
        yield from read_acceptance(discards, lambda: _read_trace(row), len(scores))
        return
    prompt, answer = _read_trace(row)
    yield build_record(discards, prompt, [answer], [bad_scores], len(scores))


def _read_trace(row: Row) -> tuple[Any, str]:
    """The prompt, unchecked, and the answer."""
    answer = _unwrap_answer(pick(row, "output", "outputs"))
    return _drop_answers(_unwrap_prompt(pick(row, "input", "inputs"))), answer


def _choose_scores(row: Row, choices: Choices) -> list[tuple[str, Any]]:
    """The (name, value) scores of a trace that count.

    Raises:
        RecordError: several names and none chosen.
    """
    scores = list(_iterate_scores(row))
    if choices.score is not None:
        return [(name, value) for name, value in scores if name == choices.score]
    names = sorted({name for name, _ in scores})
    if len(names) > 1:
        fail(f"has the scores {', '.join(names)}: choose one with --score")
    return scores


def _iterate_scores(row: Row) -> Iterator[tuple[str, Any]]:
    """Langfuse has a list `scores`, LangSmith `feedback_stats` with means by name or a list `feedback`; a plain
    `score` is taken too.
    """
    for key in ("scores", "feedback"):
        scores = row.get(key)
        if isinstance(scores, Mapping):
            yield from ((name, value) for name, value in scores.items() if value is not None)
        for entry in scores if isinstance(scores, list) else []:
            if isinstance(entry, Mapping):
                value = pick(entry, "value", "score")
                value = value if value is not None else pick(entry, "stringValue", "string_value")
                if value is not None:
                    yield str(pick(entry, "name", "key") or "score"), value
    stats = row.get("feedback_stats")
    for name, entry in stats.items() if isinstance(stats, Mapping) else ():
        if isinstance(entry, Mapping) and entry.get("avg") is not None:
            yield name, entry["avg"]
    if row.get("score") is not None:
        yield "score", row["score"]


def _unwrap_prompt(value: Any) -> Any:
    """What was asked, as a text or a list of messages, out of a trace's input."""
    if isinstance(value, Mapping):
        for key in PROMPT_KEYS:
            if value.get(key):
                return _unwrap_prompt(value[key])
        if len(value) == 1:
            return _unwrap_prompt(next(iter(value.values())))
        fail(f"its input has no prompt (its keys: {list_keys(value)})")
    if isinstance(value, list):
        if len(value) == 1 and isinstance(value[0], list):  # LangSmith nests a batch of one conversation
            return _unwrap_prompt(value[0])
        return [_unwrap_message(message) for message in value]
    return value


def _unwrap_answer(value: Any) -> Any:
    """What was answered, as a text, out of a trace's output."""
    if isinstance(value, Mapping):
        for key in ANSWER_KEYS:
            if value.get(key) is not None:
                return _unwrap_answer(value[key])
        for key in ANSWER_LIST_KEYS:
            if value.get(key):
                return _unwrap_answer(value[key])
        if len(value) == 1:
            return _unwrap_answer(next(iter(value.values())))
        fail(f"its output has no answer (its keys: {list_keys(value)})")
    if isinstance(value, list) and value:
        return _unwrap_answer(value[-1])
    return value


def _unwrap_message(value: Any) -> Any:
    """A message as role and content; LangChain calls the roles human and ai, and wraps them twice."""
    if not isinstance(value, Mapping):
        return value
    inner = next((value[key] for key in ("kwargs", "data") if isinstance(value.get(key), Mapping)), value)
    role = inner.get("role") or inner.get("type") or value.get("type")
    if isinstance(role, str):
        role = {"human": "user", "ai": "assistant"}.get(role, role)
    return {"role": role, "content": inner.get("content")}


def _drop_answers(prompt: Any) -> Any:
    """A prompt without the answer that some tools log at its end."""
    if isinstance(prompt, list):
        while prompt and isinstance(prompt[-1], Mapping) and prompt[-1].get("role") == "assistant":
            prompt = prompt[:-1]
    return prompt


def _matches(row: Row) -> bool:
    return (
        not row.keys().isdisjoint({"input", "inputs"})
        and not row.keys().isdisjoint({"output", "outputs"})
        and not row.keys().isdisjoint({"scores", "score", "feedback", "feedback_stats"})
    )


TRACES = Format("traces", "input, output, scores[name, value] (or feedback_stats, score)", _matches, _read_records)
