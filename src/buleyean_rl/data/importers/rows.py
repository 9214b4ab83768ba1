"""What every format of a row needs: the prompt, an answer, a number, a record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from buleyean_rl.data.records import Messages, RejectionRecord, Row, make_record, parse_messages, parse_text, pick
from buleyean_rl.data.records.record import fail, keys_of, kind_of

PROMPTS = ("prompt", "instruction", "question", "messages")


@dataclass
class Discards:
    """What importing left out on purpose.

    Args:
        chosen_discarded: answers that were chosen, accepted, or never rejected.
        ties: pairs of answers with equal scores, which are no rejection.
        without_rejection: rows in which nothing was rejected.
        duplicates_folded: rejected answers that repeat another one of their row.
        same_as_chosen: rows that reject the very text they choose.
    """

    chosen_discarded: int = 0
    ties: int = 0
    without_rejection: int = 0
    duplicates_folded: int = 0
    same_as_chosen: int = 0


def _record(
    discards: Discards,
    prompt: object,
    answers: object,
    counts: Sequence[int] | None = None,
    rounds: object = None,
) -> RejectionRecord:
    record = make_record(prompt, answers, counts, rounds)
    if isinstance(answers, list):
        discards.duplicates_folded += len(answers) - len(record.rejected_responses)
    return record


def prompt_of(row: Row) -> Any:
    """The prompt of a row, unchecked."""
    prompt = pick(row, *PROMPTS)
    if prompt is None:
        fail(f"has no prompt (its keys: {keys_of(row)})")
    # The Alpaca layout keeps the text an instruction is about in a field of its own.
    extra = row.get("input") if "instruction" in row else None
    if isinstance(prompt, str) and isinstance(extra, str) and extra.strip():
        return f"{prompt}\n{extra}"
    return prompt


def _is_messages(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _split_answer(value: object, name: str) -> tuple[Messages, str]:
    """A conversation as what came before its last answer, and that answer."""
    *context, (role, answer) = parse_messages(value, name)
    if role != "assistant":
        fail(f"{name} ends with a {role} message: its last message must be the assistant's answer")
    return tuple(context), answer


def _only_answer(value: object, name: str) -> str:
    """An answer that is a text, or a list of one assistant message."""
    if not _is_messages(value):
        return parse_text(value, name)
    context, answer = _split_answer(value, name)
    return fail(f"{name} is {len(context) + 1} messages: one answer is wanted") if context else answer


def _as_prompt(context: Messages) -> list[Row]:
    if not context:
        fail("the conversation is an answer without a prompt")
    return [{"role": role, "content": content} for role, content in context]


def _last_text(value: Any) -> Any:
    return _path(value[-1], "content") if _is_messages(value) else value


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        fail(f"{name} is {kind_of(value)}: it must be a finite number")
    return value


def _path(value: Any, *names: str) -> Any:
    """What stands at the end of a path of keys, None where it breaks off."""
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
