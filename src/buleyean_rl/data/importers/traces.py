"""Logged calls with scores, as Langfuse and LangSmith export them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from buleyean_rl.data.importers.literals import parse_literal
from buleyean_rl.data.importers.protocol import Choices, Discards, Format
from buleyean_rl.data.importers.reasoning import strip_reasoning
from buleyean_rl.data.importers.rows import (
    DROPPED_KEYS,
    MEDIA_KEYS,
    REJECTED_TOOL_CALL,
    accepted_record,
    add_context,
    build_record,
    is_nothing,
    refuse_row,
    split_conversation,
    strip_answer,
    unpack_messages,
)
from buleyean_rl.data.importers.trace_scores import SCORE_KEYS, Verdicts, read_verdicts
from buleyean_rl.data.records import HISTORY_KEYS, SYSTEM_KEYS, RejectionRecord, Row, as_messages, parse_messages, pick
from buleyean_rl.data.records.messages import is_message, is_tool_call, parse_content, parse_role
from buleyean_rl.data.records.values import fail, list_keys
from buleyean_rl.errors import RecordError, UnsupportedContent

INPUT_KEYS = ("input", "inputs")
OUTPUT_KEYS = ("output", "outputs")
# `kwargs` and `args` are those of a function that Langfuse observes.
PROMPT_KEYS = ("messages", "question", "prompt", "input", "query", "text", "content", "kwargs", "args")
ANSWER_KEYS = ("content", "answer", "output", "text", "completion", "response", "message", "messages", "result")
CHOICE_KEYS = ("choices", "generations", "candidates")
# Settings of a call, which are no part of what the model read.
# fmt: off
SETTINGS = frozenset([
    "model", "model_name", "temperature", "top_p", "top_k", "max_tokens", "max_completion_tokens", "stream", "stop",
    "seed", "n", "user", "metadata", "config", "session_id", "conversation_id", "thread_id", "user_id", "id",
    "name", "role", "type", "parallel_tool_calls", "tool_choice", "response_format", "frequency_penalty",
    "presence_penalty", "logit_bias", "stream_options", "invocation_params", "lc", "kwargs", "provider",
])
# fmt: on
SEVERAL_CHOICES = "its output has several choices: which was rejected is unclear"
_UNWRAPPED = 50  # objects in objects, before it is no prompt


def _read_records(row: Row, discards: Discards, choices: Choices) -> Iterator[RejectionRecord]:
    """A trace with n ratings is n rounds; the bad ratings are its count."""
    verdicts = read_verdicts(row, choices)
    if verdicts.rejections:
        prompt, answer = _read_call(row, discards)
        yield build_record(discards, prompt, [answer], [verdicts.rejections], verdicts.rounds)
        return
    discards.without_rejection += 1
    if not verdicts.rounds:
        discards.unrated += 1
        return
    discards.chosen_discarded += 1
    yield from _read_accepted(row, verdicts)


def _read_accepted(row: Row, verdicts: Verdicts) -> Iterator[RejectionRecord]:
    try:
        prompt, answer = _read_call(row, Discards())
    except RecordError:  # an accepted answer is only compared with rejected ones
        return
    yield from accepted_record(prompt, [answer], verdicts.rounds)


def _read_call(row: Row, discards: Discards) -> tuple[Any, str]:
    """What was asked, with its context, and what was answered."""
    output = pick(row, *OUTPUT_KEYS)
    if output is None:
        if row.get("error"):
            raise UnsupportedContent("it has no output: the call ended in an error")
        refuse_row("has no output", row)
    if pick(row, *INPUT_KEYS) is None:
        refuse_row("has no input", row)
    prompt = _unwrap_prompt(pick(row, *INPUT_KEYS), discards)
    messages = _unwrap_answer(output, row)
    earlier, answer = split_conversation(messages, "the output", discards)
    answer = strip_answer(answer, discards)
    prompt = _drop_answer(prompt, answer)
    if earlier:  # a chain logs what it was asked, too, or further turns
        asked = parse_messages(prompt, "the input") if isinstance(prompt, list) else (("user", prompt),)
        prompt = as_messages(earlier if earlier[: len(asked)] == asked else (*asked, *earlier))
    return add_context({"system": row.get("system")}, prompt, discards), answer


def _unwrap_prompt(value: Any, discards: Discards, depth: int = 0) -> Any:
    """What was asked, as a text or a list of messages, out of a trace's input."""
    if depth > _UNWRAPPED:
        fail("its input is nested too deeply to hold a prompt")
    if isinstance(value, str):
        inner = parse_literal(value) if value[:1] == "{" else None
        if isinstance(inner, Mapping) and not inner.keys().isdisjoint(PROMPT_KEYS):
            discards.parsed_texts += 1
            return _unwrap_prompt(inner, discards, depth + 1)
        return unpack_messages(value, "the input", discards)
    if is_message(value):
        return [value]
    if isinstance(value, Mapping):
        key = next((key for key in PROMPT_KEYS if not is_nothing(value.get(key))), None)
        if key is None and len(value) == 1:
            key = next(iter(value))
        if key is None:
            fail(f"its input has no prompt (its keys: {list_keys(value)}): say which with --column prompt=input.NAME")
        used = {key, *SYSTEM_KEYS, *HISTORY_KEYS, *DROPPED_KEYS, *MEDIA_KEYS, *SETTINGS}
        discards.note_context(str(name) for name in value if name not in used and not is_nothing(value[name]))
        return add_context(value, _unwrap_prompt(value[key], discards, depth + 1), discards)
    if isinstance(value, list) and len(value) == 1 and not is_message(value[0]):
        return _unwrap_prompt(value[0], discards, depth + 1)  # LangSmith nests a batch of one conversation
    return value


def _unwrap_answer(value: Any, row: Row, depth: int = 0) -> list[Any]:
    """What was answered, as messages that end with it, out of a trace's output."""
    if depth > _UNWRAPPED:
        fail("its output is nested too deeply to hold an answer")
    if isinstance(value, str):
        inner = parse_literal(value) if value[:1] in ("{", "[") else None
        if isinstance(inner, Mapping) and not inner.keys().isdisjoint((*ANSWER_KEYS, *CHOICE_KEYS)):
            return _unwrap_answer(inner, row, depth + 1)
        if isinstance(inner, list) and inner and all(map(is_message, inner)):
            return _unwrap_answer(inner, row, depth + 1)
        return [{"role": "assistant", "content": value}]
    if isinstance(value, Mapping):
        return _unwrap_output(value, row, depth)
    if isinstance(value, list) and value:
        if any(map(is_message, value)):
            return _end_with_assistant(value)
        if len(value) == 1:
            return _unwrap_answer(value[0], row, depth + 1)
        if all(isinstance(part, str | Mapping) for part in value) and any("type" in part for part in value):
            return [{"role": "assistant", "content": value}]
        raise UnsupportedContent(SEVERAL_CHOICES)
    return refuse_row("its output has no answer", row)


def _unwrap_output(value: Mapping[str, Any], row: Row, depth: int) -> list[Any]:
    """The messages in an output that is an object."""
    if is_message(value) and not isinstance(value.get("message"), Mapping):
        return [value]
    for key in CHOICE_KEYS:
        choices = value.get(key)
        while isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], list):
            choices = choices[0]
        if isinstance(choices, list) and choices:
            if len(choices) > 1:
                raise UnsupportedContent(SEVERAL_CHOICES)
            choice = choices[0]
            message = choice.get("message") if isinstance(choice, Mapping) else None
            return _unwrap_answer(choice if message is None else message, row, depth + 1)
    for key in ANSWER_KEYS:
        if value.get(key) is not None:
            inner = value[key]
            if key == "content" and isinstance(inner, list):
                return [{"role": "assistant", "content": inner}]
            return _unwrap_answer(inner, row, depth + 1)
    if value.get("tool_calls") or value.get("function_call"):
        return [{"role": "assistant", **value}]
    if len(value) == 1:
        return _unwrap_answer(next(iter(value.values())), row, depth + 1)
    fail(f"its output has no answer (its keys: {list_keys(value)}): say which with --column answer=output.NAME")


def _end_with_assistant(messages: list[Any]) -> list[Any]:
    """Messages up to the last one of the assistant: what a tool said after it is no answer."""
    for k in range(len(messages) - 1, -1, -1):
        message = messages[k]
        if is_message(message) and (is_tool_call(message) or parse_role(message, "a message") == "assistant"):
            return messages[: k + 1]
    return messages


def _drop_answer(prompt: Any, answer: str) -> Any:
    """A prompt without the answer, which some tools log at its end, too.

    Raises:
        RecordError: it ends with another message of the assistant.
    """
    if not isinstance(prompt, list) or not prompt or not is_message(prompt[-1]):
        return prompt
    *asked, last = prompt
    if is_tool_call(last) or parse_role(last, "the last message of the input") != "assistant":
        return prompt
    if strip_reasoning(parse_content(last, "the last message of the input", REJECTED_TOOL_CALL)) != answer:
        raise UnsupportedContent("its input ends with an answer that is not its output")
    return asked or fail("its input is an answer without a prompt")


def _matches(row: Row) -> bool:
    if row.keys().isdisjoint(INPUT_KEYS) or row.keys().isdisjoint(OUTPUT_KEYS):
        return False
    is_export = not row.keys().isdisjoint({"timestamp", "startTime", "traceId", "run_type"})
    return is_export or not row.keys().isdisjoint(SCORE_KEYS)


TRACES = Format(
    "traces",
    "input, output, scores[name, value] (or feedback_stats, score)",
    _matches,
    _read_records,
    keeps_accepted=True,
)
