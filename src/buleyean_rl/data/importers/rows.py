"""What the readers of rows share: finding the prompt, splitting off the answer, making the record."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from buleyean_rl.data.importers.protocol import Discards
from buleyean_rl.data.records import (
    Messages,
    RejectionRecord,
    Row,
    as_messages,
    make_record,
    parse_messages,
    parse_text,
    pick,
)
from buleyean_rl.data.records.values import describe, fail, list_keys

PROMPT_KEYS = ("prompt", "instruction", "question", "messages")
ANSWER_KEYS = ("response", "completion", "text", "answer", "content")


def build_record(
    discards: Discards,
    prompt: object,
    answers: object,
    counts: Sequence[int] | None = None,
    rounds: object = None,
) -> RejectionRecord:
    """`make_record`, its folded duplicates counted in `discards`."""
    record = make_record(prompt, answers, counts, rounds)
    if isinstance(answers, list):
        discards.duplicates_folded += max(0, len(answers) - len(record.rejected_responses))
    return record


def pick_prompt(row: Row) -> Any:
    """The prompt of a row, unchecked."""
    prompt = pick(row, *PROMPT_KEYS)
    if prompt is None:
        fail(f"has no prompt (its keys: {list_keys(row)})")
    # The Alpaca layout keeps the text an instruction is about in a field of its own.
    extra = row.get("input") if "instruction" in row else None
    if isinstance(prompt, str) and isinstance(extra, str) and extra.strip():
        return f"{prompt}\n{extra}"
    return prompt


def is_conversation(value: object) -> bool:
    """Whether a value looks like a list of messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def split_conversation(value: object, name: str) -> tuple[Messages, str]:
    """A conversation as what came before its last answer, and that answer."""
    *context, (role, answer) = parse_messages(value, name)
    if role != "assistant":
        fail(f"{name} ends with a {role} message: its last message must be the assistant's answer")
    return tuple(context), answer


def context_to_prompt(context: Messages) -> list[dict[str, str]]:
    """What came before an answer, as a prompt."""
    if not context:
        fail("the conversation is an answer without a prompt")
    return as_messages(context)


def parse_answer(value: object, name: str) -> str:
    """An answer that is a text, or a list of one assistant message."""
    if not is_conversation(value):
        return parse_text(value, name)
    context, answer = split_conversation(value, name)
    return fail(f"{name} is {len(context) + 1} messages: one answer is wanted") if context else answer


def parse_number(value: object, name: str) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        fail(f"{name} is {describe(value)}: it must be a finite number")
    return value


def get_path(value: Any, *keys: str) -> Any:
    """The value at the end of a path of keys, None where it breaks off."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def answers_to_text(row: Row, *keys: str) -> Row:
    """A row whose answers are texts though a table or a script made `true` or 42 of them."""
    return {
        key: json.dumps(value) if key in keys and isinstance(value, bool | int | float) else value
        for key, value in row.items()
    }
