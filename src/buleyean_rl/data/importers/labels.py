"""Rows with one answer and whether it was rejected: KTO's labels, thumbs, ratings of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from buleyean_rl.data.importers.protocol import NO_CHOICES, Choices, Discards, Format, Preference
from buleyean_rl.data.importers.rows import (
    ANSWER_KEYS,
    accepted_record,
    add_context,
    answers_to_text,
    build_record,
    context_to_prompt,
    parse_answer,
    pick_answer,
    pick_prompt,
    refuse_row,
    split_conversation,
    strip_answer,
    unpack_messages,
)
from buleyean_rl.data.importers.scores import is_rejection
from buleyean_rl.data.records import RejectionRecord, Row, parse_prompt, pick
from buleyean_rl.errors import RecordError, UnsupportedContent

DATASET_LABELS = ("label", "kto_tag")
LABEL_KEYS = (*DATASET_LABELS, "rating", "feedback", "thumb", "thumbs", "vote", "score")
COMPLETION_KEYS = ("completion", "response", "answer", "output", "reply")
CONVERSATION_KEYS = ("messages", "conversations", "conversation", "prompt")


def _read_records(row: Row, discards: Discards, choices: Choices) -> Iterator[RejectionRecord]:
    """The answer of a row whose label rejects it; a round that it won where the label accepts it."""
    rejected = _parse_label(row, choices)
    if rejected is None:
        discards.unrated += 1
        discards.without_rejection += 1
    elif rejected:
        prompt, answer = _pick_labelled(row, discards)
        yield build_record(discards, prompt, [answer])
    else:
        discards.chosen_discarded += 1
        discards.without_rejection += 1
        try:
            prompt, answer = _pick_labelled(row, Discards())
        except RecordError:  # an accepted answer is only compared with rejected ones
            return
        yield from accepted_record(prompt, [answer])


def _read_preference(row: Row) -> Preference:
    prompt, answer = _pick_labelled(answers_to_text(row, ANSWER_KEYS), Discards())
    rejected = _parse_label(row, NO_CHOICES)
    if rejected is None:
        raise UnsupportedContent("nobody rated it")
    return Preference(parse_prompt(prompt), (answer,), (int(rejected),), 1)


def _parse_label(row: Row, choices: Choices) -> bool | None:
    key = next((key for key in LABEL_KEYS if key in row), None)
    if key is None:
        refuse_row("has no label", row)
    return is_rejection(row[key], choices.below, f"its {key}")


def _pick_labelled(row: Row, discards: Discards) -> tuple[Any, str]:
    """The prompt, unchecked, and the answer."""
    if any(row.get(key) is not None for key in COMPLETION_KEYS):
        answer = parse_answer(pick(row, *COMPLETION_KEYS), "the answer", discards)
        is_log = row.keys().isdisjoint(DATASET_LABELS)
        return pick_prompt(row, discards), strip_answer(answer, discards) if is_log else answer
    name = next((key for key in CONVERSATION_KEYS if row.get(key) is not None), None)
    if name is None or any(key in row for key in COMPLETION_KEYS):
        pick_answer(row, COMPLETION_KEYS)
    conversation = unpack_messages(row[str(name)], str(name), discards)
    context, answer = split_conversation(conversation, str(name), discards)
    return add_context(row, context_to_prompt(context), discards), answer


def _matches(row: Row) -> bool:
    if not row.keys().isdisjoint(DATASET_LABELS):
        return not row.keys().isdisjoint({*CONVERSATION_KEYS[:3], *COMPLETION_KEYS})
    has_answer = not row.keys().isdisjoint(COMPLETION_KEYS) and not row.keys().isdisjoint(
        {"prompt", "question", "query"}
    )
    return has_answer and not row.keys().isdisjoint(LABEL_KEYS)


KTO = Format(
    "kto",
    "messages (or prompt, completion), label (or rating)",
    _matches,
    _read_records,
    _read_preference,
    one_answer_a_row=True,
)
