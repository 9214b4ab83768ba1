"""Conversations kept as trees: every message names the one it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from buleyean_rl.data.importers.protocol import Discards
from buleyean_rl.data.importers.rows import accepted_record, get_path
from buleyean_rl.data.records import RejectionRecord
from buleyean_rl.errors import RecordError, UnsupportedContent

# The prompt of every rated answer is its whole conversation: without a limit, time is quadratic in a chat's length.
MAX_MESSAGES = 200


def follow_parents(messages: Mapping[str, Any], message_id: str, parent_key: str) -> list[Any]:
    """The conversation that led to a message, from its first message to itself.

    Args:
        messages: by their ids.
        message_id: one of them.
        parent_key: where a message names the one before it.

    Raises:
        UnsupportedContent: the conversation is a circle, or too long for any prompt.
    """
    thread = []
    current: Any = message_id
    while isinstance(current, str) and current in messages:
        thread.append(messages[current])
        if len(thread) > MAX_MESSAGES:
            raise UnsupportedContent(
                f"a rated answer stands after more than {MAX_MESSAGES} messages, or its chat is a circle"
            )
        current = get_path(messages[current], parent_key)
    return thread[::-1]


def read_rated(
    verdicts: Mapping[str, bool | None], build: Callable[[str, Discards], RejectionRecord], discards: Discards
) -> Iterator[RejectionRecord]:
    """The records of a conversation's rated messages.

    Args:
        verdicts: message id -> whether it was rejected, None where its rating is none.
        build: makes the record of one message.
        discards: counts what is left out.
    """
    discards.unrated += all(verdict is None for verdict in verdicts.values())
    discards.without_rejection += not any(verdicts.values())
    for message_id, rejected in verdicts.items():
        if rejected:
            try:
                yield build(message_id, discards)
            except UnsupportedContent as error:  # of several ratings in a chat the others can be used
                discards.note_unusable(error.problem)
        elif rejected is False:
            discards.chosen_discarded += 1
            try:
                accepted = build(message_id, Discards())
            except RecordError:  # an accepted answer is only compared with rejected ones
                continue
            yield from accepted_record(accepted.prompt, accepted.rejected_responses)
