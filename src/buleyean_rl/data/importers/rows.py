"""What the readers of rows share: the prompt with its context, the answer, the record of both."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from buleyean_rl.data.importers.literals import parse_messages_text
from buleyean_rl.data.importers.protocol import Discards
from buleyean_rl.data.importers.reasoning import strip_reasoning
from buleyean_rl.data.importers.suggest import suggest_columns
from buleyean_rl.data.records import (
    HISTORY_KEYS,
    SYSTEM_KEYS,
    Messages,
    RejectionRecord,
    Row,
    as_messages,
    make_record,
    parse_messages,
    parse_prompt,
    parse_text,
    pick,
)
from buleyean_rl.data.records.messages import (
    has_reasoning,
    is_message,
    is_reasoning,
    is_tool_call,
    parse_content,
    parse_role,
)
from buleyean_rl.data.records.values import describe, fail, list_keys
from buleyean_rl.errors import RecordError, UnsupportedContent

PROMPT_KEYS = ("prompt", "instruction", "question", "messages")
OTHER_PROMPT_KEYS = ("conversations", "conversation", "query", "input", "inputs")
ANSWER_KEYS = ("response", "completion", "text", "answer", "content")
# Context that no record can hold: the row is imported without it, counted.
DROPPED_KEYS = ("context", "contexts", "documents", "sources", "source_documents", "tools", "functions")
MEDIA_KEYS = ("images", "image", "videos", "video", "audios", "audio", "attachments")
REJECTED_TOOL_CALL = "the rejected answer is a call of a tool, not text"
_CONTEXT_KEYS = frozenset({*MEDIA_KEYS, *DROPPED_KEYS, *SYSTEM_KEYS, *HISTORY_KEYS})
_UNCOUNTED = Discards()  # of accepted answers, which are passed over where they are no text
_NOTHING: tuple[Any, ...] = (None, "", [], {}, (), "[]", "{}", "null")


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


def accepted_record(prompt: object, answers: Iterable[object], rounds: int = 1) -> Sequence[RejectionRecord]:
    """Rounds in which answers were not rejected, as a record without a rejection; nothing where none is an answer.

    They anchor where they are kept; else they count only where the same text was rejected elsewhere.
    """
    try:
        checked_prompt = parse_prompt(prompt)
    except RecordError:
        return ()
    texts = tuple([text for answer in answers if (text := _accepted_text(answer))])
    size = len(texts)
    return (RejectionRecord(checked_prompt, texts, (0,) * size, (rounds,) * size, ((),) * size),) if texts else ()


def _accepted_text(answer: object) -> str:
    """An answer that was not rejected, "" where it is none."""
    try:
        text = parse_answer(answer, "the answer", _UNCOUNTED)
    except RecordError:
        return ""
    return "" if text.isspace() else text


# --- prompts


def pick_prompt(row: Row, discards: Discards) -> Any:
    """The prompt of a row with all the context the row has, unchecked.

    Args:
        row: with a prompt under one of several keys.
        discards: counts what of the context is dropped.

    Raises:
        RecordError: there is none; says which keys there are.
    """
    prompt = pick(row, *PROMPT_KEYS)
    if prompt is None:
        prompt = next((row[key] for key in OTHER_PROMPT_KEYS if row.get(key) is not None), None)
    if prompt is None:
        refuse_row("has no prompt", row)
    if not isinstance(prompt, str) and isinstance(prompt, Mapping) and not is_message(prompt):
        # OpenAI: {"messages": [...], "tools": [...]}
        return add_context(row, pick_prompt(dict(prompt), discards), discards)
    # The Alpaca layout keeps the text an instruction is about in a field of its own.
    extra = row.get("input") if "instruction" in row else None
    if isinstance(prompt, str) and isinstance(extra, str) and extra.strip():
        prompt = f"{prompt}\n{extra}"
    return add_context(row, unpack_messages(prompt, "the prompt", discards), discards)


def add_context(row: Mapping[str, Any], prompt: Any, discards: Discards) -> Any:
    """A prompt after what else of the conversation stands in the row: its system prompt and earlier turns.

    Raises:
        UnsupportedContent: the prompt came with images or other files.
    """
    if row.keys().isdisjoint(_CONTEXT_KEYS):
        return prompt
    for key in MEDIA_KEYS:
        if not is_nothing(row.get(key)):
            raise UnsupportedContent(f"its prompt came with {key}; training reads text")
    discards.note_context(key for key in DROPPED_KEYS if not is_nothing(row.get(key)))
    system = next((row[key] for key in SYSTEM_KEYS if not is_nothing(row.get(key))), None)
    history = next((row[key] for key in HISTORY_KEYS if not is_nothing(row.get(key))), None)
    if system is None and history is None:
        return prompt
    messages = as_messages(parse_messages(prompt, "the prompt")) if isinstance(prompt, list | tuple) else None
    messages = [{"role": "user", "content": prompt}] if messages is None else messages
    if history is not None:
        messages = [*parse_history(history), *messages]
    if system is not None:
        content = parse_text(system, "the system prompt")
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": content}, *messages]
        elif messages[0]["content"].strip() != content.strip():
            fail("has two system prompts, one in its messages: keep one")
    return messages


def parse_history(value: Any) -> list[dict[str, str]]:
    """Earlier turns, as messages or as [question, answer] pairs."""
    if isinstance(value, str):
        parsed = parse_messages_text(value, "the history")
        if parsed is None:
            fail("the history is text: it must be messages, or [question, answer] pairs")
        value = parsed
    if not isinstance(value, list | tuple):
        fail(f"the history is {describe(value)}: it must be messages, or [question, answer] pairs")
    if all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in value) and not _are_named_turns(value):
        return [
            {"role": role, "content": parse_text(text, "a turn of the history")}
            for turn in value
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
    return as_messages(parse_messages(value, "the history"))


def _are_named_turns(value: Sequence[Any]) -> bool:
    """Whether turns are (role, text), as LangChain takes them, rather than (question, answer)."""
    return all(str(turn[0]).casefold() in ("human", "ai", "user", "assistant", "system") for turn in value)


def unpack_messages(value: Any, name: str, discards: Discards) -> Any:
    """The messages that a text spells out; anything else as it is, one message alone as a list of it."""
    if isinstance(value, str):
        if "{" not in value:  # most texts
            return value
        messages = parse_messages_text(value, name)
        discards.parsed_texts += messages is not None
        return value if messages is None else messages
    return [value] if is_message(value) else value


def context_to_prompt(context: Messages) -> list[dict[str, str]]:
    """What came before an answer, as a prompt."""
    if not context:
        fail("the conversation is an answer without a prompt")
    return as_messages(context)


def is_nothing(value: Any) -> bool:
    """Whether a value is one of the ways to write that there is none."""
    return value is None or (isinstance(value, str | list | dict | tuple) and value in _NOTHING)


# --- answers


def is_conversation(value: object) -> bool:
    """Whether a value looks like a list of messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def split_conversation(value: object, name: str, discards: Discards) -> tuple[Messages, str]:
    """A conversation as what came before its last answer, and that answer; reasoning in it is counted.

    Raises:
        UnsupportedContent: the answer, or a message before it, calls a tool or is more than text.
    """
    if not isinstance(value, list | tuple) or not value:
        fail(f"{name} is {describe(value)}: it must be a list of messages with a role and a content")
    *context, last = [message for message in value if not is_reasoning(message)] or [None]
    if is_tool_call(last):
        raise UnsupportedContent(REJECTED_TOOL_CALL)
    role = parse_role(last, f"the last message of {name}")
    if role != "assistant":
        fail(f"{name} ends with a {role} message: its last message must be the assistant's answer")
    answer = parse_content(last, f"the last message of {name}", REJECTED_TOOL_CALL)
    discards.reasoning_removed += has_reasoning(value)
    return parse_messages(context, name) if context else (), answer


def parse_answer(value: object, name: str, discards: Discards) -> str:
    """An answer that is a text, a message, or a list of one assistant message."""
    value = unpack_messages(value, name, discards)
    if not is_conversation(value):
        return parse_text(value, name)
    context, answer = split_conversation(value, name, discards)
    return fail(f"{name} is {len(context) + 1} messages: one answer is wanted") if context else answer


def strip_answer(answer: str, discards: Discards) -> str:
    """A logged answer without the reasoning before it.

    Raises:
        UnsupportedContent: nothing is left.
    """
    stripped = strip_reasoning(answer)
    if stripped != answer:
        discards.reasoning_removed += 1
        if not stripped.strip():
            raise UnsupportedContent("the rejected answer is reasoning alone")
    return stripped


def pick_answer(row: Row, keys: Sequence[str]) -> Any:
    """The answer of a row, unchecked.

    Raises:
        RecordError: there is none; says which keys there are.
    """
    answer = pick(row, *keys)
    if answer is None:
        null = next((key for key in keys if key in row), None)
        refuse_row("has no answer" if null is None else f"has no answer: its {null} is null", row)
    return answer


# --- values


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


def answers_to_text(row: Row, keys: Iterable[str]) -> Row:
    """A row whose answers are texts though a table or a script made `true` or 42 of them."""
    names = set(keys)
    return {
        key: json.dumps(value) if key in names and isinstance(value, bool | int | float) else value
        for key, value in row.items()
    }


def refuse_row(problem: str, row: Row) -> NoReturn:
    """Fail with the row's own keys, and with the options that would read it."""
    fail(f"{problem} (its keys: {list_keys(row)}). If others hold it: {suggest_columns(row)}")
