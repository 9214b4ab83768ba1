"""LibreChat: a conversation exported as JSON, its messages in a list or as a tree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from buleyean_rl.data.importers.protocol import Choices, Discards, Format
from buleyean_rl.data.importers.rows import (
    MEDIA_KEYS,
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
from buleyean_rl.data.records.values import fail
from buleyean_rl.errors import UnsupportedContent


def _read_records(row: Row, discards: Discards, choices: Choices) -> Iterator[RejectionRecord]:
    messages = _flatten(row.get("messagesTree") or row.get("messages"))
    verdicts = {
        message_id: is_rejection(_pick_rating(message), choices.below, "its rating")
        for message_id, message in messages.items()
        if _pick_rating(message) is not None
    }
    yield from read_rated(verdicts, lambda message_id, noted: _build(row, messages, message_id, noted), discards)


def _flatten(value: Any) -> dict[str, Mapping[str, Any]]:
    """The messages of an export by their ids, however deep they stand in `children`."""
    messages: dict[str, Mapping[str, Any]] = {}
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, list):
            pending += item[::-1]
        elif isinstance(item, Mapping):
            if isinstance(item.get("messageId"), str):
                messages[item["messageId"]] = item
            pending.append(item.get("children"))
    return messages


def _pick_rating(message: Mapping[str, Any]) -> Any:
    feedback = message.get("feedback")
    return get_path(feedback, "rating") if isinstance(feedback, Mapping) else feedback


def _build(row: Row, messages: Mapping[str, Any], message_id: str, discards: Discards) -> RejectionRecord:
    """The record of one message."""
    thread = [_read_message(message, discards) for message in follow_parents(messages, message_id, "parentMessageId")]
    context, answer = split_conversation(thread, "the conversation", discards)
    options = row.get("options")
    systems = (get_path(options, key) for key in ("promptPrefix", "system", "instructions"))
    system = {"system": next((text for text in systems if not is_nothing(text)), None)}
    prompt = add_context(system, context_to_prompt(context), discards)
    return build_record(discards, prompt, [strip_answer(answer, discards)])


def _read_message(message: Mapping[str, Any], discards: Discards) -> dict[str, Any]:
    """A message as role and content; content parts stand beside the text, which is empty then."""
    if message.get("error"):
        raise UnsupportedContent("the rated answer is an error of the server, or follows one")
    files = message.get("files") or message.get("attachments")
    if not is_nothing(files):
        if isinstance(files, list) and any(str(get_path(file, "type")).startswith(MEDIA_KEYS) for file in files):
            raise UnsupportedContent("its prompt came with images; training reads text")
        discards.note_context(["files"])
    by_user = message.get("isCreatedByUser")
    if not isinstance(by_user, bool):
        fail("has a message without isCreatedByUser: export the conversation as JSON")
    text = message.get("text")
    content = message.get("content") if is_nothing(text) and not is_nothing(message.get("content")) else text
    return {"role": "user" if by_user else "assistant", "content": content}


def _matches(row: Row) -> bool:
    messages = row.get("messagesTree") or row.get("messages")
    return isinstance(messages, list) and any(
        isinstance(message, Mapping) and "messageId" in message for message in messages[:1]
    )


LIBRECHAT = Format(
    "librechat", "conversationId, messages[messageId, feedback]", _matches, _read_records, keeps_accepted=True
)
