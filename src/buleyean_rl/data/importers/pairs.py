"""Rows with a chosen and a rejected answer, and rows with one answer and a label."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from buleyean_rl.data.importers.rows import (
    PROMPTS,
    Discards,
    _as_prompt,
    _is_messages,
    _last_text,
    _only_answer,
    _record,
    _split_answer,
    prompt_of,
)
from buleyean_rl.data.records import RejectionRecord, Row, pick
from buleyean_rl.data.records.record import fail, keys_of, kind_of


def from_pair(row: Row, discards: Discards) -> Iterator[RejectionRecord]:
    """A chosen and a rejected answer: the chosen one is discarded.

    Answers are texts beside a prompt, message lists beside a prompt, or whole conversations that share
    everything but their last message, as messages or as a text of `Human:` and `Assistant:` (HH-RLHF).
    """
    row = conversing(row)
    prompt, answers = pair_answers(row)
    yield _record(discards, prompt, answers)
    chosen = pick(row, "chosen")
    if chosen is not None:
        discards.chosen_discarded += 1
        discards.same_as_chosen += _last_text(chosen) in answers


def pair_answers(row: Row, name: str = "rejected", other: str = "chosen") -> tuple[Any, list[Any]]:
    """The prompt of a pair, and the answers of one of its two sides, unchecked.

    Args:
        row: see `from_pair`.
        name: of that side.
        other: of the other, which is looked at only where the prompt is the part that both share.
    """
    answer, beside = pick(row, name), pick(row, other)
    if answer is None:
        fail(f"has no {name} answer (its keys: {keys_of(row)})")
    if not _is_messages(answer):
        return prompt_of(row), [answer] if isinstance(answer, str) else answer
    context, text = _split_answer(answer, name)
    if context and context[0][0] == "assistant":
        fail(f"{name} is more than one answer: which of them was {name} is unclear")
    if context and beside is not None and _split_answer(beside, other)[0] != context:
        fail(f"{other} and {name} part ways before their last answers: which was {name} is unclear")
    return _as_prompt(context) if context else prompt_of(row), [text]


def conversing(row: Row) -> Row:
    """A pair without a prompt, its texts that are whole conversations as messages."""
    if not row.keys().isdisjoint(PROMPTS):
        return row
    return {**row, **{side: _messages_of(row[side]) for side in ("chosen", "rejected") if side in row}}


def _messages_of(value: Any) -> Any:
    """The messages of a text in which each turn starts with its speaker; anything else as it is."""
    before, *turns = re.split(r"\n\n(Human|Assistant):", value) if isinstance(value, str) else (value,)
    if before or not turns:
        return value
    roles = ({"Human": "user", "Assistant": "assistant"}[speaker] for speaker in turns[::2])
    return [{"role": role, "content": text.strip()} for role, text in zip(roles, turns[1::2], strict=True)]


def from_label(row: Row, discards: Discards) -> Iterator[RejectionRecord]:
    """An answer and a label (KTO): true is discarded, false is a rejection."""
    if label_of(row):
        discards.chosen_discarded += 1
        discards.without_rejection += 1
        return
    prompt, answer = labelled_answer(row)
    yield _record(discards, prompt, [answer])


def label_of(row: Row) -> bool:
    """The label of a KTO row: whether its answer was accepted."""
    label = row.get("label")
    if not isinstance(label, bool):
        fail(f"label is {kind_of(label)}: it must be true (accepted) or false (rejected)")
    return label


def labelled_answer(row: Row) -> tuple[Any, str]:
    """The prompt of a KTO row, unchecked, and its answer."""
    completion = pick(row, "completion", "response")
    if completion is not None:
        return prompt_of(row), _only_answer(completion, "completion")
    context, answer = _split_answer(pick(row, "messages", "prompt"), "messages")
    return _as_prompt(context), answer
