"""Open WebUI: a row of its feedback export, or of its chat export; thumbs down are the rejections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from buleyean_rl.data.importers.protocol import Choices, Discards, Format
from buleyean_rl.data.importers.reasoning import has_folded_calls, strip_reasoning
from buleyean_rl.data.importers.rows import (
    MEDIA_KEYS,
    REJECTED_TOOL_CALL,
    add_context,
    build_record,
    context_to_prompt,
    get_path,
    is_nothing,
    split_conversation,
    strip_answer,
)
from buleyean_rl.data.importers.scores import is_rejection
from buleyean_rl.data.importers.threads import follow_parents, read_rated
from buleyean_rl.data.records import RejectionRecord, Row
from buleyean_rl.data.records.messages import TOOL_CALL_IN_CONTEXT
from buleyean_rl.data.records.values import fail
from buleyean_rl.errors import UnsupportedContent


def _read_records(row: Row, discards: Discards, choices: Choices) -> Iterator[RejectionRecord]:
    chat, ratings = _read_feedback(row) if isinstance(row.get("data"), Mapping) else _read_chat(row)
    verdicts = {message_id: _is_thumb_down(rating, choices) for message_id, rating in ratings}
    yield from read_rated(verdicts, lambda message_id, noted: _build(chat, message_id, noted), discards)


def _is_thumb_down(rating: Any, choices: Choices) -> bool | None:
    """Whether a rating rejects; 0 is a thumb that was taken back."""
    return None if rating in (0, "0") and rating is not False else is_rejection(rating, choices.below, "its rating")


def _build(chat: Any, message_id: str, discards: Discards) -> RejectionRecord:
    """The record of one message of a chat."""
    messages = get_path(chat, "history", "messages")
    if not isinstance(messages, Mapping) or message_id not in messages:
        fail("is a thumbs down without its conversation: export the feedback with its chat snapshots")
    *earlier, rated = follow_parents(messages, message_id, "parentId")
    thread = [_read_message(message, discards) for message in earlier]
    context, answer = split_conversation([*thread, _read_answer(rated, discards)], "the conversation", discards)
    system = {"system": get_path(chat, "params", "system")}
    return build_record(discards, add_context(system, context_to_prompt(context), discards), [answer])


def _read_message(message: Any, discards: Discards) -> dict[str, Any]:
    """A message before the rated one, as the model saw it."""
    if not isinstance(message, Mapping):
        fail("the conversation has a message that is no object")
    files = message.get("files")
    kinds = {str(get_path(file, "type")) for file in files} if isinstance(files, list) else set()
    for kind in sorted(kinds & {*MEDIA_KEYS}):
        raise UnsupportedContent(f"its prompt came with {kind}; training reads text")
    discards.note_context(["files"] if kinds else [])
    content = _pick_content(message)
    if isinstance(content, str):
        if has_folded_calls(content):
            raise UnsupportedContent(TOOL_CALL_IN_CONTEXT)
        content = strip_reasoning(content)
    return {"role": message.get("role"), "content": content}


def _read_answer(message: Any, discards: Discards) -> dict[str, Any]:
    """The rated message, as the model wrote it: a person may have edited it since."""
    if not isinstance(message, Mapping):
        fail("the rated message is no object")
    discards.note_context(key for key in ("sources", "citations") if not is_nothing(message.get(key)))
    original = message.get("originalContent")
    edited = isinstance(original, str) and bool(original.strip())
    discards.edited += edited
    content = original if edited else _pick_content(message)
    if is_nothing(content) and message.get("error"):
        raise UnsupportedContent("the rated answer is an error of the server")
    if isinstance(content, str):
        if has_folded_calls(content):
            raise UnsupportedContent("the rated answer was written after calls of tools")
        content = strip_answer(content, discards)
    return {"role": message.get("role"), "content": content, "tool_calls": message.get("tool_calls")}


def _pick_content(message: Mapping[str, Any]) -> Any:
    """The text of a message; newer versions keep it in items of `output`."""
    content, items = message.get("content"), message.get("output")
    if not is_nothing(content) or not isinstance(items, list) or not items:
        return content
    for item in items:
        kind = get_path(item, "type")
        if kind not in ("message", "reasoning"):
            raise UnsupportedContent(REJECTED_TOOL_CALL if len(items) == 1 else TOOL_CALL_IN_CONTEXT)
    contents = [get_path(item, "content") if get_path(item, "type") == "message" else item for item in items]
    return [part for content in contents for part in (content if isinstance(content, list) else [content])]


def _read_feedback(row: Row) -> tuple[Any, list[tuple[str, Any]]]:
    """A row of the feedback export as its chat, and its one (message id, rating)."""
    snapshot = row.get("snapshot")
    nestings = (get_path(snapshot, "chat", "chat"), get_path(snapshot, "chat"), snapshot)  # by version
    chat = next((nesting for nesting in nestings if get_path(nesting, "history")), None)
    return chat, [(str(get_path(row, "meta", "message_id")), get_path(row, "data", "rating"))]


def _read_chat(row: Row) -> tuple[Any, list[tuple[str, Any]]]:
    """A row of the chat export as its chat, and (message id, rating) of every message that was rated."""
    chat = row.get("chat")
    messages = get_path(chat, "history", "messages")
    by_id = messages.items() if isinstance(messages, Mapping) else ()
    ratings = [(message_id, get_path(message, "annotation", "rating")) for message_id, message in by_id]
    return chat, [(message_id, rating) for message_id, rating in ratings if rating is not None]


def _matches(row: Row) -> bool:
    if isinstance(row.get("data"), Mapping) and "rating" in row["data"]:
        return "snapshot" in row or "meta" in row
    return get_path(row, "chat", "history") is not None


OPEN_WEBUI = Format(
    "openwebui",
    "data.rating, meta.message_id, snapshot.chat; or chat.history",
    _matches,
    _read_records,
    keeps_accepted=True,
)
