"""Chats exported from Open WebUI, with thumbs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from buleyean_rl.data.importers.rows import Discards, _as_prompt, _path, _record, _split_answer
from buleyean_rl.data.records import RejectionRecord, Row
from buleyean_rl.data.records.record import fail


def from_open_webui(row: Row, discards: Discards) -> Iterator[RejectionRecord]:
    """Open WebUI: a row of its feedback export, or of its chat export; thumbs down are the rejections."""
    feedback = row.get("data")
    if isinstance(feedback, Mapping):
        snapshot = row.get("snapshot")
        places = (_path(snapshot, "chat", "chat"), _path(snapshot, "chat"), snapshot)  # by version
        chat = next((place for place in places if _path(place, "history")), None)
        messages = _path(chat, "history", "messages")
        rated = [(_path(row, "meta", "message_id"), feedback.get("rating"))]
    else:
        chat = row.get("chat")
        messages = _path(chat, "history", "messages")
        named = messages.items() if isinstance(messages, Mapping) else ()
        rated = [(name, _path(message, "annotation", "rating")) for name, message in named]
    down = [name for name, rating in rated if rating in (-1, "-1")]
    system = _path(chat, "params", "system")
    discards.chosen_discarded += sum(rating in (1, "1") for _, rating in rated)
    discards.without_rejection += not down
    for name in down:
        if not isinstance(messages, Mapping) or not isinstance(name, str) or name not in messages:
            fail("is a thumbs down without its conversation: export the feedback with its chat snapshots")
        thread = _thread(messages, name)
        if isinstance(system, str) and system.strip():
            thread.insert(0, {"role": "system", "content": system})
        context, answer = _split_answer(thread, "the conversation")
        yield _record(discards, _as_prompt(context), [answer])


# Open WebUI keeps reasoning and tool calls inside the message, as folded HTML that no model wrote so.
_FOLDED_HTML = re.compile(r'<details type="(?:reasoning|tool_calls|code_interpreter)".*?</details>\s*', re.DOTALL)


def _thread(messages: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The conversation that led to a message, from its first message to itself."""
    thread: list[dict[str, Any]] = []
    step: Any = name
    while isinstance(step, str) and step in messages and len(thread) <= len(messages):  # a loop ends too
        content = _path(messages[step], "content")
        if isinstance(content, str):
            content = _FOLDED_HTML.sub("", content)
        thread.append({"role": _path(messages[step], "role"), "content": content})
        step = _path(messages[step], "parentId")
    return thread[::-1]
