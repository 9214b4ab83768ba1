"""Rows with a chosen and a rejected answer (pairs), and rows with one answer and a label (KTO)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from buleyean_rl.data.importers.protocol import Choices, Discards, Format, Preference
from buleyean_rl.data.importers.rows import (
    ANSWER_KEYS,
    PROMPT_KEYS,
    answers_to_text,
    build_record,
    context_to_prompt,
    get_path,
    is_conversation,
    parse_answer,
    pick_prompt,
    read_acceptance,
    split_conversation,
)
from buleyean_rl.data.records import RejectionRecord, Row, parse_prompt, parse_text, pick
from buleyean_rl.data.records.values import describe, fail, list_keys

# --- pairs


def _read_pair(row: Row, discards: Discards, _choices: Choices) -> Iterator[RejectionRecord]:
    """The rejected answer of a pair; the chosen one is discarded.

    Answers are texts beside a prompt, message lists beside a prompt, or whole conversations that share
    everything but their last message, as messages or as a text of `Human:` and `Assistant:` (HH-RLHF).
    """
    row = _split_transcripts(row)
    prompt, answers = _pick_side(row, "rejected", "chosen")
    yield build_record(discards, prompt, answers)
    chosen = pick(row, "chosen")
    if chosen is not None:
        discards.chosen_discarded += 1
        text = get_path(chosen[-1], "content") if is_conversation(chosen) else chosen
        discards.same_as_chosen += text in answers


def _rank_pair(row: Row) -> Preference:
    row = _split_transcripts(answers_to_text(row, "chosen", "rejected"))
    prompt, rejected = _pick_side(row, "rejected", "chosen")
    chosen = [] if pick(row, "chosen") is None else _pick_side(row, "chosen", "rejected")[1]
    answers = [*_parse_texts(chosen, "chosen"), *_parse_texts(rejected, "rejected")]
    return Preference(parse_prompt(prompt), tuple(answers), (0,) * len(chosen) + (1,) * len(rejected), 1)


def _pick_side(row: Row, side: str, other_side: str) -> tuple[Any, list[Any]]:
    """The prompt of a pair, and the answers of one of its two sides, unchecked.

    The other side is looked at only where the prompt is the part that both share.
    """
    answer, other = pick(row, side), pick(row, other_side)
    if answer is None:
        fail(f"has no {side} answer (its keys: {list_keys(row)})")
    if not is_conversation(answer):
        return pick_prompt(row), [answer] if isinstance(answer, str) else answer
    context, text = split_conversation(answer, side)
    if context and context[0][0] == "assistant":
        fail(f"{side} is more than one answer: which of them was {side} is unclear")
    if context and other is not None and split_conversation(other, other_side)[0] != context:
        fail(f"{other_side} and {side} part ways before their last answers: which was {side} is unclear")
    return context_to_prompt(context) if context else pick_prompt(row), [text]


def _split_transcripts(row: Row) -> Row:
    """A pair without a prompt, its texts that are whole conversations as messages."""
    if not row.keys().isdisjoint(PROMPT_KEYS):
        return row
    return {**row, **{side: _parse_transcript(row[side]) for side in ("chosen", "rejected") if side in row}}


def _parse_transcript(value: Any) -> Any:
    """The messages of a text in which each turn starts with its speaker; anything else as it is."""
    before, *turns = re.split(r"\n\n(Human|Assistant):", value) if isinstance(value, str) else (value,)
    if before or not turns:
        return value
    roles = ({"Human": "user", "Assistant": "assistant"}[speaker] for speaker in turns[::2])
    return [{"role": role, "content": text.strip()} for role, text in zip(roles, turns[1::2], strict=True)]


def _parse_texts(values: Any, name: str) -> list[str]:
    if not isinstance(values, list):
        fail(f"{name} is {describe(values)}: it must be text, a list of texts, or messages")
    return [parse_text(value, f"{name}[{k}]") for k, value in enumerate(values)]


PAIRS = Format(
    "pairs", "prompt, chosen, rejected", lambda row: {"chosen", "rejected"} <= row.keys(), _read_pair, _rank_pair
)

# --- labels


def _read_label(row: Row, discards: Discards, _choices: Choices) -> Iterator[RejectionRecord]:
    """The answer of a row: rejected where its label is false, accepted where it is true."""
    if _parse_label(row):
        yield from read_acceptance(discards, lambda: _pick_labelled(row))
        return
    prompt, answer = _pick_labelled(row)
    yield build_record(discards, prompt, [answer])


def _rank_label(row: Row) -> Preference:
    prompt, answer = _pick_labelled(answers_to_text(row, *ANSWER_KEYS))
    return Preference(parse_prompt(prompt), (answer,), (int(not _parse_label(row)),), 1)


def _parse_label(row: Row) -> bool:
    label = row.get("label")
    if not isinstance(label, bool):
        fail(f"label is {describe(label)}: it must be true (accepted) or false (rejected)")
    return label


def _pick_labelled(row: Row) -> tuple[Any, str]:
    """The prompt, unchecked, and the answer."""
    completion = pick(row, "completion", "response")
    if completion is not None:
        return pick_prompt(row), parse_answer(completion, "completion")
    context, answer = split_conversation(pick(row, "messages", "prompt"), "messages")
    return context_to_prompt(context), answer


KTO = Format(
    "kto",
    "messages (or prompt, completion), label",
    lambda row: "label" in row and not row.keys().isdisjoint({"messages", "completion", "response"}),
    _read_label,
    _rank_label,
    one_answer_a_row=True,
)
