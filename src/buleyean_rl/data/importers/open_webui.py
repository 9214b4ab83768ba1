"""Open WebUI: a row of its feedback export, or of its chat export; thumbs down are the rejections."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from buleyean_rl.data.importers.protocol import Choices, Discards, Format
from buleyean_rl.data.importers.rows import build_record, context_to_prompt, get_path, split_conversation
from buleyean_rl.data.records import RejectionRecord, Row
from buleyean_rl.data.records.values import fail

# Open WebUI keeps reasoning and tool calls inside the message, as folded HTML that no model wrote so.
_FOLDED_HTML = re.compile(r'<details type="(?:reasoning|tool_calls|code_interpreter)".*?</details>\s*', re.DOTALL)


def _read_records(row: Row, discards: Discards, _choices: Choices) -> Iterator[RejectionRecord]:
    chat, ratings = _read_feedback(row) if isinstance(row.get("data"), Mapping) else _read_chat(row)
    messages = get_path(chat, "history", "messages")
    system = get_path(chat, "params", "system")
    thumbs_down = [message_id for message_id, rating in ratings if rating in (-1, "-1")]
    discards.chosen_discarded += sum(rating in (1, "1") for _, rating in ratings)
    discards.without_rejection += not thumbs_down
    for message_id in thumbs_down:
        if not isinstance(messages, Mapping) or not isinstance(message_id, str) or message_id not in messages:
            fail("is a thumbs down without its conversation: export the feedback with its chat snapshots")
        thread = _follow_parents(messages, message_id)
        if isinstance(system, str) and system.strip():
            thread.insert(0, {"role": "system", "content": system})
        context, answer = split_conversation(thread, "the conversation")
        yield build_record(discards, context_to_prompt(context), [answer])


def _read_feedback(row: Row) -> tuple[Any, list[tuple[Any, Any]]]:
    """A row of the feedback export as its chat, and its one (message id, rating)."""
    snapshot = row.get("snapshot")
    nestings = (get_path(snapshot, "chat", "chat"), get_path(snapshot, "chat"), snapshot)  # by version
    chat = next((nesting for nesting in nestings if get_path(nesting, "history")), None)
    return chat, [(get_path(row, "meta", "message_id"), get_path(row, "data", "rating"))]


def _read_chat(row: Row) -> tuple[Any, list[tuple[Any, Any]]]:
    """A row of the chat export as its chat, and (message id, rating) of every message."""
    chat = row.get("chat")
    messages = get_path(chat, "history", "messages")
    by_id = messages.items() if isinstance(messages, Mapping) else ()
    return chat, [(message_id, get_path(message, "annotation", "rating")) for message_id, message in by_id]


def _follow_parents(messages: Mapping[str, Any], message_id: str) -> list[dict[str, Any]]:
    """The conversation that led to a message, from its first message to itself."""
    thread: list[dict[str, Any]] = []
    current: Any = message_id
    while isinstance(current, str) and current in messages and len(thread) <= len(messages):  # a loop ends too
        content = get_path(messages[current], "content")
        if isinstance(content, str):
            content = _FOLDED_HTML.sub("", content)
        thread.append({"role": get_path(messages[current], "role"), "content": content})
        current = get_path(messages[current], "parentId")
    return thread[::-1]


def _matches(row: Row) -> bool:
    return get_path(row, "data", "rating") is not None or get_path(row, "chat", "history") is not None


OPEN_WEBUI = Format(
    "openwebui", "data.rating, meta.message_id, snapshot.chat; or chat.history", _matches, _read_records
)
